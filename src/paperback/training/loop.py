"""The one training loop: gradient descent on batches of rows, on Accelerate.

A training is a loss, a function of the model and a batch, and tensors whose first dimension counts rows. The
loop shuffles, slices, steps, validates, stops early and keeps checkpoints. It runs unchanged under
`accelerate launch`: every process takes its share of each batch, so that the loss and the gradients of a step
are those of one process, whatever the number of processes. Everything random is a function of (seed, epoch,
process); a training resumed from a checkpoint is therefore, on the same machine, bit for bit the undisturbed
one.

Two parts of Accelerate are not used. Its data loader collates single rows and fills up the last batch with
repeated rows; slicing tensors by a permutation is 10 times as fast and exact. Its optimizer looks for an
optional package at every step, 50 us, so it only steps where it is needed: where gradients are scaled.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from paperback.errors import DataError, PaperbackError
from paperback.training.checkpoint import fingerprint, resume, save
from paperback.training.history import History
from paperback.training.progress import Advance, bar
from paperback.training.schedule import Schedule, factor
from paperback.training.seeds import derive, generator, seeded
from paperback.training.settings import OptimizerFactory, Settings, check_tensors
from paperback.training.task import Batch, Loss, State, Task, prepare, scalars, single_accelerator, snapshot

Callback = Callable[[int, nn.Module, History], None]

# A look at the losses waits for the GPU and, with several processes, for the others; it is taken seldom.
CHECK_EVERY = 64  # steps
CHECK_SECONDS = 0.5  # in a single process also after so long


def train(
    model: nn.Module,
    loss: Loss,
    tensors: Tensor | Sequence[Tensor],
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    val_tensors: Tensor | Sequence[Tensor] | None = None,
    val_metric: Loss | None = None,
    optimizer: Literal["adam", "adamw", "sgd"] | OptimizerFactory = "adam",
    schedule: Schedule = "constant",
    warmup_fraction: float = 0.0,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
    patience: int | None = None,
    min_delta: float = 0.0,
    keep_best: bool = True,
    seed: int = 0,
    drop_last: bool = False,
    gradient_accumulation: int = 1,
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 1,
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
    description: str = "training",
) -> History:
    """Train a model in place. It is left in evaluation mode.

    With a validation part the model ends with the weights of its best epoch, otherwise with those of the
    last. After Ctrl-C it has the best or the last finished epoch's weights, after a loss that is not finite
    those of the last finite epoch. For that, one or two copies of the state dict are kept.

    Args:
        model: what is trained; parameters with ``requires_grad=False`` stay. In one process it is trained on
            the device it is on; under `accelerate launch` on the device of the process.
        loss: ``loss(model, batch, generator)`` gives the mean loss over the rows of the batch as a scalar
            tensor, or a dict of scalars with that under "loss"; the others are reported. Draws that the loss
            makes (masks, noise) come from the generator, on the model's device. Parameters of a loss that is
            a module are trained too.
        tensors: one or several tensors, ``(rows, ...)``; a batch is a tuple of their slices on the model's
            device.
        epochs: passes over the rows, >= 1.
        batch_size: rows of a forward pass over all processes, >= 1. The last batch of an epoch may be
            smaller.
        lr: peak learning rate. Not used when `optimizer` is a function.
        val_tensors: the validation part.
        val_metric: like `loss`, lower is better; the loss itself if not given. The generator starts anew each
            time.
        optimizer: "adam", "adamw", "sgd" (without momentum), or a function from parameters to a torch
            optimizer.
        schedule: course of the learning rate over all steps, see `paperback.training.schedule.factor`.
        warmup_fraction: part of the steps, in [0, 1), in which the learning rate rises.
        weight_decay: as torch's optimizer of that name has it.
        clip_norm: gradients are scaled down to this norm.
        patience: stop after so many epochs without a better validation metric.
        min_delta: a metric is better when it is lower than the best by more than this.
        keep_best: False leaves the weights of the last epoch in the model even with a validation part.
        seed: of the order of rows, of the generator of the loss, and of torch's global random numbers
            (dropout) during the training; afterwards these are as they were.
        drop_last: leave out the rows that do not fill a batch.
        gradient_accumulation: batches whose gradients make one step.
        mixed_precision: autocast; None is what `accelerate launch` was told, otherwise "no".
        checkpoint: folder for checkpoints; a training with the same settings and data that finds one there
            goes on from it. Of the model, the state dict is kept; a loss's or a callback's own memory is not.
        checkpoint_every: epochs between two checkpoints, >= 1.
        callbacks: called after each epoch on each process with the number of epochs done, the model and the
            history.
        progress: show a bar, if the output is a terminal.
        description: what the bar says.

    Returns:
        The course of the training.

    Raises:
        DataError: if an argument is out of range or the tensors do not agree.
        PaperbackError: if the loss or a weight is no longer finite.
        ArtefactError: if the checkpoint is damaged, or of another training.
    """
    settings = Settings(
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        optimizer=optimizer,
        schedule=schedule,
        warmup_fraction=warmup_fraction,
        weight_decay=weight_decay,
        clip_norm=clip_norm,
        patience=patience,
        min_delta=min_delta,
        keep_best=keep_best,
        seed=seed,
        drop_last=drop_last,
        gradient_accumulation=gradient_accumulation,
        mixed_precision=mixed_precision,
        checkpoint_every=checkpoint_every,
    )
    rows = check_tensors(tensors, "tensors")
    val_rows = () if val_tensors is None else check_tensors(val_tensors, "val_tensors")
    settings.check(len(rows[0]), bool(val_rows), val_metric is not None)
    with (
        single_accelerator(model, mixed_precision) as accelerator,
        seeded(seed, "training"),
        torch.enable_grad(),  # a caller may have switched gradients off
    ):
        task = prepare(accelerator, model, loss, val_metric or loss, rows, val_rows, settings)
        state = State()
        folder = None if checkpoint is None else Path(checkpoint)
        if folder is not None:
            task.fingerprint = fingerprint(task)
            state = resume(task, folder) or state
        show = progress and accelerator.is_main_process
        done = state.epoch * task.steps
        with bar(description, epochs * task.steps, len(rows[0]) / task.steps, done, show) as advance:
            _run(task, state, folder, callbacks, advance)
        task.core.eval()
        return state.history


# -- epochs ------------------------------------------------------------------


class _NotFinite(Exception):
    """The loss or the weights of a step are not finite."""


def _run(
    task: Task, state: State, folder: Path | None, callbacks: Sequence[Callback], advance: Advance
) -> None:
    """The epochs that are left; afterwards, however it ends, the model has weights that can be used."""
    settings, core = task.settings, task.core
    initial = snapshot(core)
    try:
        while not state.finished:
            _run_epoch(task, state, callbacks, advance)
            if folder is not None and (state.finished or state.epoch % settings.checkpoint_every == 0):
                save(task, state, folder)
    except KeyboardInterrupt:
        if state.last:
            core.load_state_dict(state.best or state.last)
        raise
    except _NotFinite as error:
        core.load_state_dict(state.last or initial)
        raise PaperbackError(
            f"epoch {state.epoch + 1}, {error}; the model was put back to the end of epoch {state.epoch}. "
            "Lower the learning rate, clip the gradient, or look for extreme values in the data."
        ) from None
    finally:
        core.eval()
    core.load_state_dict(state.best if settings.keep_best and state.best else state.last)


def _run_epoch(task: Task, state: State, callbacks: Sequence[Callback], advance: Advance) -> None:
    """Train, validate, note what came out, and keep a copy of the weights."""
    settings, history = task.settings, state.history
    start = time.perf_counter()

    def show(step: int, loss: float) -> None:
        advance(step, _wording(state, settings, loss))

    means, lr = _train_epoch(task, state.epoch, show)
    seconds = time.perf_counter() - start
    if not _finite(task.core):
        raise _NotFinite("after its last step: a weight is not finite")
    metric = _validate(task) if task.val_rows else None
    history.train_loss.append(means.pop("loss"))
    for name, value in means.items():
        history.terms.setdefault(name, []).append(value)
    history.lr.append(lr)
    history.samples_per_second.append(min(task.steps * settings.rows_per_step, len(task.rows[0])) / seconds)
    history.seconds.append(time.perf_counter() - start)
    if metric is not None:
        history.val_metric.append(metric)
        if metric < state.best_metric - settings.min_delta:
            state.best_metric, history.best_epoch = metric, state.epoch
        waited = state.epoch - (history.best_epoch or 0)
        history.stopped_early = settings.patience is not None and waited >= settings.patience
    for callback in callbacks:
        callback(state.epoch, task.core.model, history)
    state.last = snapshot(task.core)
    if history.best_epoch == state.epoch:
        state.best = state.last
    state.finished = history.stopped_early or state.epoch == settings.epochs


def _train_epoch(
    task: Task, epoch: int, show: Callable[[int, float], None]
) -> tuple[dict[str, float], float]:
    """One pass over the rows: the means of the loss and its terms, and the last learning rate."""
    settings, rows = task.settings, len(task.rows[0])
    rank, alone = task.accelerator.process_index, task.accelerator.num_processes == 1
    torch.manual_seed(derive(settings.seed, "global", epoch, rank))
    task.core.generator.manual_seed(derive(settings.seed, "loss", epoch, rank))
    task.core.train()
    order = torch.randperm(rows, generator=generator(settings.seed, "order", epoch))
    parameters = [p for group in task.optimizer.param_groups for p in group["params"]]
    counts: list[int] = []  # rows of each step
    values: list[list[float]] = []  # loss and terms of each step that was looked at
    pending: list[dict[str, Tensor]] = []
    names: list[str] = []
    looked = time.perf_counter()
    for step in range(task.steps):
        total = epoch * task.steps + step
        scale = factor(settings.schedule, total, settings.epochs * task.steps, settings.warmup_fraction)
        for group, peak in zip(task.optimizer.param_groups, task.peaks, strict=True):
            group["lr"] = peak * scale
        index = order[step * settings.rows_per_step : (step + 1) * settings.rows_per_step]
        task.optimizer.zero_grad()
        counts.append(len(index))
        pending.append(_backward(task, index))
        if settings.clip_norm is not None:
            task.accelerator.clip_grad_norm_(parameters, settings.clip_norm)
        task.optimizer_step()
        late = alone and time.perf_counter() - looked > CHECK_SECONDS
        if late or len(pending) == CHECK_EVERY or step + 1 == task.steps:
            names = names or list(pending[0])
            recent = _collect(task, names, pending, first=len(values))
            values += recent
            show(total + 1, sum(loss for loss, *_ in recent) / len(recent))
            pending.clear()
            looked = time.perf_counter()
    _share_buffers(task)
    # fsum is exact, so that the sums do not depend on when the losses were looked at.
    means = {
        name: math.fsum(count * row[i] for count, row in zip(counts, values, strict=True)) / sum(counts)
        for i, name in enumerate(names)
    }
    return means, task.optimizer.param_groups[0]["lr"]


def _backward(task: Task, index: Tensor) -> dict[str, Tensor]:
    """Add up the gradients of one step's batches; return this process's part of the mean loss and terms."""
    accelerator = task.accelerator
    batches = index.split(task.settings.batch_size)
    sums: dict[str, Tensor] = {}
    for i, part in enumerate(batches):
        mine, share = _share(part, accelerator.process_index, accelerator.num_processes)
        weight = share * len(part) / len(index)
        is_last = i + 1 == len(batches)
        with nullcontext() if is_last else accelerator.no_sync(task.wrapped):
            terms = task.wrapped(*_slice(task.rows, mine, task.device))
            loss = terms["loss"]
            if not loss.requires_grad:
                raise DataError(
                    "the loss does not depend on any parameter that is trained; there is nothing to learn."
                )
            # DistributedDataParallel takes the mean over processes, where the weights ask for the sum.
            whole = weight * accelerator.num_processes
            accelerator.backward(loss if whole == 1.0 else loss * whole)
        for name, value in terms.items():
            value = value.detach() if weight == 1.0 else value.detach() * weight
            sums[name] = sums[name] + value if name in sums else value
    return sums


def _share(index: Tensor, rank: int, processes: int) -> tuple[Tensor, float]:
    """This process's rows of a batch, and their part of it; one without any computes a row that counts 0."""
    if processes == 1:
        return index, 1.0
    mine = index.tensor_split(processes)[rank]
    return (mine, len(mine) / len(index)) if len(mine) else (index[:1], 0.0)


def _slice(rows: Batch, index: Tensor, device: torch.device) -> Batch:
    return tuple(t.index_select(0, index.to(t.device)).to(device, non_blocking=True) for t in rows)


def _share_buffers(task: Task) -> None:
    """Running statistics and the like differ between processes; those of the first are kept."""
    for buffer in task.core.buffers() if task.accelerator.num_processes > 1 else ():
        torch.distributed.broadcast(buffer, src=0)


def _collect(task: Task, names: list[str], pending: list[dict[str, Tensor]], first: int) -> list[list[float]]:
    """Loss and terms of some steps as numbers, over all processes; every loss is looked at."""
    for terms in pending:
        if list(terms) != names:
            raise DataError(f"the loss returned {names}, then {list(terms)}; return the same terms always.")
    table = torch.stack([torch.stack([terms[name].float() for name in names]) for terms in pending])
    values: list[list[float]] = task.accelerator.reduce(table, "sum").tolist()
    for i, (loss, *_) in enumerate(values):
        if not math.isfinite(loss):
            raise _NotFinite(f"step {first + i + 1} of {task.steps}: the loss is {loss}")
    return values


def _validate(task: Task) -> float:
    """Mean metric over the validation rows, in evaluation mode, with the same random numbers each time."""
    accelerator, settings = task.accelerator, task.settings
    draws = generator(settings.seed, "validation", accelerator.process_index, device=task.device)
    task.core.eval()
    total = torch.zeros((), device=task.device)
    rows = len(task.val_rows[0])
    with torch.no_grad(), accelerator.autocast():
        for part in torch.arange(rows).split(settings.batch_size):
            mine, share = _share(part, accelerator.process_index, accelerator.num_processes)
            batch = _slice(task.val_rows, mine, task.device)
            value = scalars(task.val_metric(task.core.model, batch, draws), "validation metric")["loss"]
            total += value.float() * (share * len(part) / rows)
    return float(accelerator.reduce(total, "sum"))


def _wording(state: State, settings: Settings, loss: float) -> str:
    text = f"epoch {state.epoch + 1}/{settings.epochs} · loss {loss:.4g}"
    metric = state.history.val_metric
    return f"{text} · validation {metric[-1]:.4g} (best {min(metric):.4g})" if metric else text


def _finite(core: nn.Module) -> bool:
    return all(bool(p.isfinite().all()) for p in core.parameters())
