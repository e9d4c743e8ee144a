"""What a training works on: model and loss in one module, optimizer, Accelerator, state between epochs."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from paperback.errors import DataError, NotSupportedError
from paperback.training.history import History
from paperback.training.settings import Settings

if TYPE_CHECKING:
    from accelerate import Accelerator

Batch = tuple[Tensor, ...]
Loss = Callable[[Any, Batch, torch.Generator], Tensor | dict[str, Tensor]]


class LossOf(nn.Module):
    """The loss as a forward pass, so that DistributedDataParallel sees whatever methods the loss calls."""

    def __init__(self, model: nn.Module, loss: Loss, device: torch.device) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.generator = torch.Generator(device)

    def forward(self, *batch: Tensor) -> dict[str, Tensor]:
        return scalars(self.loss(self.model, batch, self.generator))


def scalars(result: Tensor | dict[str, Tensor], what: str = "loss") -> dict[str, Tensor]:
    """What a loss (or a metric) returned as a dict of scalars, of which only "loss" has a gradient."""
    terms = result if isinstance(result, dict) else {"loss": result}
    loss = terms.get("loss")
    if not isinstance(loss, Tensor) or loss.ndim != 0:
        found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise DataError(f'the {what} is {found}; return a scalar tensor, or a dict with one under "loss".')
    others = {
        key: torch.as_tensor(value, device=loss.device).detach()
        for key, value in terms.items()
        if key != "loss"
    }
    return {"loss": loss} | others


@dataclass
class Task:
    """Everything that stays the same during a training."""

    settings: Settings
    accelerator: Accelerator
    core: LossOf  # model and loss
    wrapped: nn.Module  # core, in DistributedDataParallel where there are several processes
    optimizer: torch.optim.Optimizer
    optimizer_step: Callable[[], Any]
    peaks: list[float]  # the learning rate of each parameter group, which the schedule scales
    rows: Batch
    val_rows: Batch
    val_metric: Loss
    device: torch.device
    fingerprint: dict[str, Any] = field(default_factory=dict)  # of a training that keeps checkpoints

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        rows, size = len(self.rows[0]), self.settings.rows_per_step
        return rows // size if self.settings.drop_last else math.ceil(rows / size)


@dataclass
class State:
    """What changes from epoch to epoch, and goes into a checkpoint."""

    history: History = field(default_factory=History)
    last: dict[str, Tensor] = field(default_factory=dict)  # weights after the last epoch
    best: dict[str, Tensor] = field(default_factory=dict)
    best_metric: float = math.inf
    finished: bool = False

    @property
    def epoch(self) -> int:
        """Number of finished epochs."""
        return len(self.history)


@contextmanager
def single_accelerator(model: nn.Module, mixed_precision: str | None) -> Iterator[Accelerator]:
    """An Accelerator for one training.

    Accelerate keeps its state in three singletons, so that a second training could not have another device or
    precision, and a user's own Accelerator would be changed by ours. They are put aside, and back afterwards;
    the process group of torch.distributed stays.

    Raises:
        NotSupportedError: if `accelerate launch` asks for sharded models.
        DataError: if the device does not have the precision.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from accelerate.utils import DistributedType

    singletons = (PartialState, AcceleratorState, GradientState)
    aside = [dict(singleton._shared_state) for singleton in singletons]
    for singleton in singletons:
        singleton._shared_state.clear()
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    try:
        accelerator = Accelerator(
            mixed_precision=mixed_precision,
            cpu=not torch.accelerator.is_available() if launched else device_of(model).type == "cpu",
            # A loss may leave parameters unused: a head without labels, a tier that rests.
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
        kind = accelerator.distributed_type
        if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
            raise NotSupportedError(f"training does not run under {kind.value}; launch it with DDP.")
        if accelerator.mixed_precision == "fp16" and not accelerator.native_amp:
            where = accelerator.device.type
            raise DataError(f'mixed_precision "fp16" has no effect on the {where}; use "bf16" or "no" there.')
        yield accelerator
        if accelerator.num_processes > 1:  # ends DistributedDataParallel's hooks; takes 0.1 s
            accelerator.free_memory()
    finally:
        for singleton, state in zip(singletons, aside, strict=True):
            singleton._shared_state.clear()
            singleton._shared_state.update(state)


def device_of(model: nn.Module) -> torch.device:
    if not isinstance(model, nn.Module):
        raise DataError(f"the model is a {type(model).__name__}; it must be a torch.nn.Module.")
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def prepare(
    accelerator: Accelerator,
    model: nn.Module,
    loss: Loss,
    val_metric: Loss,
    rows: Batch,
    val_rows: Batch,
    settings: Settings,
) -> Task:
    """Put model and loss into one module, on the device of the process, and make the optimizer."""
    distributed = accelerator.num_processes > 1
    device = accelerator.device if distributed else device_of(model)
    core = LossOf(model, loss, device)
    parameters = [p for p in core.parameters() if p.requires_grad]
    if not parameters:
        raise DataError(
            f"{type(model).__name__} has no parameter that requires a gradient; there is nothing to train."
        )
    wrapped = accelerator.prepare_model(core, device_placement=distributed)
    optimizer = settings.make_optimizer(parameters)
    prepared = accelerator.prepare_optimizer(optimizer, device_placement=False)
    return Task(
        settings=settings,
        accelerator=accelerator,
        core=core,
        wrapped=wrapped,
        optimizer=optimizer,
        optimizer_step=prepared.step if accelerator.scaler is not None else optimizer.step,
        peaks=[float(group["lr"]) for group in optimizer.param_groups],
        rows=rows,
        val_rows=val_rows,
        val_metric=val_metric,
        device=device,
    )


def snapshot(core: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict that later steps do not touch."""
    return {name: tensor.detach().clone() for name, tensor in core.state_dict().items()}
