"""The search by gradient: weights on one half of the data, architecture on the other, in turns.

In each step one batch of the validation half moves the alphas (Adam), then one batch of the training half
moves the weights (SGD with momentum, its rate by cosine power annealing). First order takes the weights as
they are; second order takes them after one step of their own, see `unrolled`.

Where torch.distributed is initialised, each process computes its share of every batch, and the gradients of
weights and alphas are averaged; norms see the share of their process.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pickle
import re
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from paperback.errors import ArtefactError, DataError, PaperbackError
from paperback.search.interface import SearchResult, Trial
from paperback.search.parameters import Config
from paperback.search.sharp_darts.annealing import CosinePowerAnnealing
from paperback.search.sharp_darts.cells import CellSpace, Genotype
from paperback.search.sharp_darts.cuboid import Chain, HyperCuboid
from paperback.search.sharp_darts.mixing import Mixing, Weighting
from paperback.search.sharp_darts.unrolled import Loss, Rows, unrolled_gradient
from paperback.study.progress import Bars
from paperback.training import generator, seeded

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# From here on Max-W may sharpen the weights: a prototype saw it at 0.02, though the study does not.
LARGE_ARCH_LR = 0.01
STATE = "search.pt"
CHANGEABLE = ("lr", "arch_lr")  # while a search is running


@dataclass(frozen=True, kw_only=True)
class DifferentiableResult(SearchResult):
    """What a search found: the one trial of a `SearchResult`, and how it came about.

    The trial's configuration is the architecture as plain JSON; its score is the accuracy of the supernet on
    the validation half, or minus the loss where the targets are not classes.

    Attributes:
        architecture: a `Genotype` or a `Chain`, for the space's `build`.
        history: for each name of the alphas their softmax before the first step and after each,
            ``(steps + 1, groups, options)``.
        losses: validation and training loss of each step, ``(steps, 2)``.
        supernet: as it was left.
    """

    architecture: Genotype | Chain
    history: dict[str, NDArray[np.float32]]
    losses: NDArray[np.float64]
    supernet: nn.Module

    def plot(self) -> Figure:
        """The largest weight of each group of options (an edge, a step), against the steps of the search."""
        from matplotlib.figure import Figure

        from paperback.study.figures import METHOD, REFERENCE, WIDE, style

        with style():
            figure = Figure(figsize=WIDE)
            panels = figure.subplots(1, len(self.history), sharey=True, squeeze=False)[0]
            for axes, (name, history) in zip(panels, self.history.items(), strict=True):
                axes.plot(history.max(-1), color=METHOD, alpha=0.6, linewidth=1.0)
                axes.axhline(1 / history.shape[-1], color=REFERENCE, linestyle="--", linewidth=0.8)
                axes.set(xlabel="step", title=name)
            panels[0].set_ylabel("largest weight (dashed: uniform)")
        return figure


@dataclass(frozen=True)
class DifferentiableSearch:
    """Searches a space by gradient.

    Args:
        space: of cells, or a cuboid.
        weighting: "max_w" or "scalar".
        order: 1, or 2 for the unrolled gradient.
        steps: of the alphas and of the weights, >= 1. The paper has 120 epochs.
        batch_size: of either half, >= 2.
        lr: greatest rate of the weights.
        lr_min: their last rate.
        power: of the annealing.
        warmup: steps before the greatest rate.
        arch_lr: rate of the alphas. From 0.01 on Max-W may not keep the weights flat, which is warned of.
        seed: of weights, alphas and the order of rows.
        detach_max: see `Mixing`.

    Raises:
        DataError: if a setting is out of range.
    """

    space: CellSpace | HyperCuboid
    weighting: Weighting = "max_w"
    order: Literal[1, 2] = 1
    steps: int = 1000
    batch_size: int = 48
    lr: float = 0.025
    lr_min: float = 1e-4
    power: float = 2.0
    warmup: int = 0
    arch_lr: float = 3e-4
    seed: int = 0
    detach_max: bool = False

    def __post_init__(self) -> None:
        Mixing(self.weighting)
        if self.order not in (1, 2):
            raise DataError(f"order is {self.order}; it must be 1 or 2.")
        if self.order == 2 and self.space.recompute:
            raise DataError(
                "a space with recompute=True cannot be searched with order=2, whose weights are not those of "
                "the supernet when it is computed again; use order=1, or recompute=False."
            )
        if self.steps < 1 or self.batch_size < 2:
            raise DataError(
                f"steps is {self.steps} and batch_size {self.batch_size}; they are at least 1 and 2 (a batch "
                "norm needs two rows)."
            )
        if not (min(self.lr, self.arch_lr) > 0 and max(self.lr, self.arch_lr) < float("inf")):
            raise DataError(f"lr is {self.lr} and arch_lr {self.arch_lr}; both must be positive numbers.")
        if not 0 <= self.lr_min <= self.lr:
            raise DataError(f"lr_min is {self.lr_min}; it must lie in 0..{self.lr}, which is lr.")
        self.anneal(torch.optim.SGD([torch.zeros(1)], self.lr))  # which checks power and warmup

    def anneal(self, optimizer: torch.optim.Optimizer) -> CosinePowerAnnealing:
        """The schedule of the weights' optimizer."""
        return CosinePowerAnnealing(optimizer, self.steps, self.lr_min, self.power, self.warmup)

    def start(self, train: Rows, val: Rows, loss: Loss = nn.functional.cross_entropy) -> RunningSearch:
        """Begin, to go on step by step.

        Args:
            train: inputs and targets that the weights learn from.
            val: inputs and targets that the alphas learn from.
            loss: ``loss(outputs, targets)``, a scalar.

        Raises:
            DataError: if one of the halves is missing or its parts differ in length.
        """
        return RunningSearch(self, train, val, loss)

    def run(
        self,
        train: Rows,
        val: Rows,
        loss: Loss = nn.functional.cross_entropy,
        *,
        store: str | os.PathLike[str] | None = None,
        store_every: int = 100,
        progress: bool = True,
    ) -> DifferentiableResult:
        """Search from beginning to end.

        Args:
            train: see `start`.
            val: see `start`.
            loss: see `start`.
            store: folder for the state of the search; one that was begun there goes on, to the same end.
            store_every: steps between two states, >= 1.
            progress: show a bar.

        Raises:
            DataError: as `start`, or if the folder holds another search or one of other data.
            ArtefactError: if the state in the folder is damaged.
            PaperbackError: if a loss is not finite.
        """
        if store_every < 1:
            raise DataError(f"store_every is {store_every}; it must be at least 1.")
        running = self.start(train, val, loss)
        file = None if store is None else Path(store) / STATE
        facts = "" if file is None else _facts(self, (*train, *val))
        if file is not None and file.exists():
            running.load_state_dict(_read(file, facts))
        for _ in Bars(progress).track(range(running.steps_done, self.steps), "search"):
            running.step()
            done = running.steps_done
            if file is not None and (done % store_every == 0 or done == self.steps):
                _write(file, facts, running.state_dict())
        return running.result()


class RunningSearch:
    """A search on its way, a `paperback.search.Trainable`: it can be stored and gone on with, bit for bit.

    Args:
        settings: of the search.
        train: inputs and targets of the weights.
        val: inputs and targets of the alphas.
        loss: of outputs and targets.

    Attributes:
        settings: as they are now.
        supernet: as it is now.
        steps_done: how many.
    """

    def __init__(self, settings: DifferentiableSearch, train: Rows, val: Rows, loss: Loss) -> None:
        self.settings = settings
        self.train, self.val = _checked(train, "train"), _checked(val, "val")
        self.loss = loss
        self.setup({}, settings.seed)

    def setup(self, config: Config, seed: int) -> None:
        """Begin anew.

        Args:
            config: settings of `DifferentiableSearch` by name.
            seed: of the search.

        Raises:
            DataError: if there is no such setting, or it is out of range.
        """
        names = [field.name for field in fields(DifferentiableSearch)]
        self.settings = replace(self.settings, **_known(config, names), seed=seed)
        settings = self.settings
        if settings.weighting == "max_w" and settings.arch_lr >= LARGE_ARCH_LR:
            warnings.warn(
                f"arch_lr is {settings.arch_lr}: at such a rate Max-W may not keep the weights flat; the "
                "paper's is 3e-4.",
                stacklevel=4,
            )
        with seeded(seed, "supernet"):
            self.supernet = settings.space.supernet(Mixing(settings.weighting, settings.detach_max))
        self.supernet.to(self.train[0].device)
        self.alphas = dict(self.supernet.alphas.items())
        self.weights = {n: p for n, p in self.supernet.named_parameters() if not n.startswith("alphas.")}
        self._sgd = torch.optim.SGD(self.weights.values(), settings.lr, momentum=0.9, weight_decay=3e-4)
        self._adam = torch.optim.Adam(
            self.alphas.values(), settings.arch_lr, betas=(0.5, 0.999), weight_decay=1e-3
        )
        self._schedule = settings.anneal(self._sgd)
        self.steps_done = 0
        self._seconds = 0.0
        self._losses: list[tuple[float, float]] = []
        self._history: list[dict[str, Tensor]] = [self._softmax()]

    def reconfigure(self, config: Config) -> None:
        """Go on with other rates.

        Args:
            config: "lr", the greatest rate of the weights, or "arch_lr", or both.

        Raises:
            DataError: if something else is to be changed.
        """
        self.settings = replace(self.settings, **_known(config, CHANGEABLE))
        self._schedule.base_lrs = [self.settings.lr]
        for group, rate in zip(self._sgd.param_groups, self._schedule.get_lr(), strict=True):
            group["lr"] = rate
        for group in self._adam.param_groups:
            group["lr"] = self.settings.arch_lr

    def step(self) -> dict[str, float]:
        """Move the alphas, then the weights.

        Returns:
            The losses of both halves, and the score: minus that of the validation half.

        Raises:
            PaperbackError: if a loss or a gradient is not finite; the weights stay as they were.
        """
        start = time.perf_counter()
        train, val = self._batch(self.train, "train"), self._batch(self.val, "val")
        self.supernet.train()
        with seeded(self.settings.seed, "step", self.steps_done):  # dropout of a user's blocks
            val_loss = self._step_alphas(train, val)
            train_loss = self._step_weights(train)
        self._schedule.step()
        self.steps_done += 1
        self._losses.append((val_loss, train_loss))
        self._history.append(self._softmax())
        self._seconds += time.perf_counter() - start
        return {"score": -val_loss, "val_loss": val_loss, "train_loss": train_loss}

    def _step_alphas(self, train: Rows, val: Rows) -> float:
        if self.settings.order == 1:
            output = self.loss(self.supernet(val[0]), val[1])
            gradients = list(torch.autograd.grad(output, list(self.alphas.values())))
            val_loss = output.detach()
        else:
            val_loss, gradients = self._unrolled(train, val)
        _average([val_loss, *gradients])
        self._check_finite(val_loss, "validation loss")
        for alpha, gradient in zip(self.alphas.values(), gradients, strict=True):
            alpha.grad = gradient
        self._adam.step()
        return float(val_loss)

    def _step_weights(self, train: Rows) -> float:
        output = self.loss(self.supernet(train[0]), train[1])
        weights = list(self.weights.values())
        gradients = torch.autograd.grad(output, weights, allow_unused=True)  # those of skipped operations
        train_loss = output.detach()
        _average([train_loss, *(gradient for gradient in gradients if gradient is not None)])
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        norm = nn.utils.clip_grad_norm_(weights, 5.0)
        self._check_finite(train_loss + norm, "training loss or its gradient")
        self._sgd.step()
        return float(train_loss)

    def _check_finite(self, value: Tensor, what: str) -> None:
        if not torch.isfinite(value):
            raise PaperbackError(
                f"the {what} is not finite in step {self.steps_done + 1} of the search; lower lr, or scale "
                "the data."
            )

    def result(self) -> DifferentiableResult:
        """What the alphas say now."""
        self.supernet.eval()
        with torch.no_grad():
            outputs = torch.cat([self.supernet(x) for x in self.val[0].split(512)])
            y = self.val[1]
            classes = outputs.ndim == 2 and y.ndim == 1 and not y.is_floating_point()
            score = (outputs.argmax(1) == y).double().mean() if classes else -self.loss(outputs, y)
        architecture = self.supernet.architecture()
        config = json.loads(json.dumps({"seed": self.settings.seed, **asdict(architecture)}))
        return DifferentiableResult(
            (Trial(0, config, "done", float(score), seconds=self._seconds),),
            seconds=self._seconds,
            architecture=architecture,
            history={name: np.stack([h[name].numpy() for h in self._history]) for name in self.alphas},
            losses=np.array(self._losses).reshape(-1, 2),
            supernet=self.supernet,
        )

    def state_dict(self) -> dict[str, Any]:
        """All that another running search with the same settings and data needs to go on alike."""
        return copy.deepcopy(
            {
                "steps_done": self.steps_done,
                "seconds": self._seconds,
                "supernet": dict(self.supernet.state_dict()),
                "sgd": self._sgd.state_dict(),
                "adam": self._adam.state_dict(),
                "schedule": self._schedule.state_dict(),
                "losses": self._losses,
                "history": self._history,
            }
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        state = copy.deepcopy(dict(state))
        self.supernet.load_state_dict(state["supernet"])
        self._sgd.load_state_dict(state["sgd"])
        self._adam.load_state_dict(state["adam"])
        self._schedule.load_state_dict(state["schedule"])
        self.steps_done, self._seconds = state["steps_done"], state["seconds"]
        self._losses, self._history = state["losses"], state["history"]

    def _softmax(self) -> dict[str, Tensor]:
        return {name: alpha.detach().softmax(-1).cpu() for name, alpha in self.alphas.items()}

    def _batch(self, rows: Rows, name: str) -> Rows:
        """The batch of this step, a function of seed and step; the rows that do not fill one are left out."""
        processes, rank = (dist.get_world_size(), dist.get_rank()) if _distributed() else (1, 0)
        n, size = len(rows[0]), min(self.settings.batch_size, len(rows[0]))
        if size % processes or size < 2 * processes:
            raise DataError(
                f"a batch of {size} rows cannot be shared by {processes} processes; make batch_size a "
                f"multiple of {processes}, with two rows or more for each."
            )
        epoch, place = divmod(self.steps_done, n // size)
        order = torch.randperm(n, generator=generator(self.settings.seed, "order", name, epoch))
        batch = order[place * size : (place + 1) * size]
        chosen = batch.tensor_split(processes)[rank].to(rows[0].device)
        return rows[0][chosen], rows[1][chosen]

    def _unrolled(self, train: Rows, val: Rows) -> tuple[Tensor, list[Tensor]]:
        momenta = {
            name: self._sgd.state[weight].get("momentum_buffer")
            for name, weight in self.weights.items()
            if weight in self._sgd.state
        }
        group = self._sgd.param_groups[0]
        return unrolled_gradient(
            self.supernet,
            self.loss,
            train,
            val,
            xi=group["lr"],
            momentum=group["momentum"],
            weight_decay=group["weight_decay"],
            momenta={name: buffer for name, buffer in momenta.items() if buffer is not None},
        )


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _average(tensors: list[Tensor]) -> None:
    """In place over all processes, if there are several."""
    if _distributed():
        for tensor in tensors:
            dist.all_reduce(tensor)
            tensor /= dist.get_world_size()


def _known(config: Mapping[str, Any], names: Sequence[str]) -> Config:
    unknown = [name for name in config if name not in names or name == "seed"]
    if unknown:
        allowed = ", ".join(name for name in names if name != "seed")
        raise DataError(f"the configuration sets {unknown[0]!r} of a search; here it can set {allowed}.")
    return dict(config)


def _checked(rows: Rows | None, name: str) -> Rows:
    if rows is None or len(rows) != 2:
        raise DataError(
            f"{name} is missing; give inputs and targets. A search needs both halves of the data."
        )
    x, y = rows
    if len(x) != len(y) or len(x) < 2:
        raise DataError(f"{name} has {len(x)} inputs and {len(y)} targets; equally many, two or more.")
    return x, y


def _facts(search: DifferentiableSearch, tensors: Sequence[Tensor]) -> str:
    """What tells a search from others: its settings, without addresses in memory, and its data."""
    data = hashlib.sha256()
    for tensor in tensors:
        data.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        data.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return f"{re.sub(r' at 0x[0-9a-fA-F]+', '', repr(search))} on {data.hexdigest()[:16]}"


def _write(file: Path, search: str, state: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.tmp")
    torch.save({"search": search, "state": state}, temporary)
    os.replace(temporary, file)


def _read(file: Path, search: str) -> dict[str, Any]:
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
        known, state = found["search"], found["state"]
    except (
        OSError,
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
        TypeError,
        pickle.UnpicklingError,
    ) as error:
        raise ArtefactError(f"{file} is damaged ({error}); remove it, or take another folder.") from error
    if known != search:
        raise DataError(f"{file} is of another search, {known}; take another folder.")
    return dict(state)
