"""Quantized distillation: a student that is trained at its rounded weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Self, get_args

import torch
from torch import nn

from paperback.compress.budget import Budget
from paperback.compress.distill_quantize.rounding import Gradient, RoundedWeight, Rounding, rounding_layers
from paperback.compress.distill_quantize.training import bits_for, check_settings, imitate, store
from paperback.compress.interface import Compressor, Job
from paperback.compress.masked import asking
from paperback.compress.storage import PackedLinear
from paperback.errors import DataError
from paperback.networks.surgery import HEADS_AND_EMBEDDINGS, find_layers, is_transposed
from paperback.training import generator, seeded
from paperback.training.distillation import Reduction


class QuantizedDistillation(Compressor):
    """Trains a network of few bits a weight to answer as the original does (section 3).

    Each step rounds the weights, takes the gradient there, and applies it to the weights before rounding; at
    the end they are rounded for good and packed. ``extras`` has the bits, the mean length in a Huffman code
    and the losses.

    Args:
        student: what is trained and returned, a module (copied) or a function that makes one; the original
            itself if not given.
        bits: of a weight, 1 to 8; None rounds nothing, which is plain distillation.
        bucket: consecutive weights that share minimum and maximum, float32 each; None for a whole layer.
        temperature: T > 0.
        weight: of the teacher, in [0, 1]; 0 is quantized training without one.
        gradient: see `RoundedWeight`.
        rounding: "nearest", or "stochastic" while it trains.
        reduction: of the teacher's loss, see `training.distillation`.
        epochs: passes over the training part; 0 rounds the student as it is.
        lr: of Adam.
        batch_size: rows of a step.
        targets: see `Compressor`.
        ignore: see `Compressor`; what is left is trained in full precision.
        seed: of the order of the rows, of the student that a function makes, and of the rounding.

    Raises:
        DataError: if a setting is out of range.
    """

    family = "distill"
    needs = frozenset({"training", "loss"})
    tuning_free = False
    budgets = ("bits", "bytes", "ratio")

    def __init__(
        self,
        student: nn.Module | Callable[[], nn.Module] | None = None,
        bits: int | None = 4,
        bucket: int | None = 256,
        temperature: float = 2.0,
        weight: float = 0.7,
        gradient: Gradient = "ste",
        rounding: Rounding = "nearest",
        *,
        reduction: Reduction = "batchmean",
        epochs: int = 6,
        lr: float = 3e-3,
        batch_size: int = 64,
        targets: Sequence[str] | None = None,
        ignore: Sequence[str] = HEADS_AND_EMBEDDINGS,
        seed: int = 0,
    ) -> None:
        super().__init__(targets=targets, ignore=ignore, seed=seed)
        check_settings(8 if bits is None else bits, bucket, temperature, weight, epochs, lr, batch_size)
        for name, value, choices in (
            ("gradient", gradient, get_args(Gradient)),
            ("rounding", rounding, get_args(Rounding)),
            ("reduction", reduction, get_args(Reduction)),
        ):
            if value not in choices:
                raise DataError(f"{name} is {value!r}; it must be one of {', '.join(choices)}.")
        self.student, self.bits, self.bucket = student, bits, bucket
        self.temperature, self.weight, self.reduction = temperature, weight, reduction
        self.gradient, self.rounding = gradient, rounding
        self.epochs, self.lr, self.batch_size = epochs, lr, batch_size

    def _settle(self, budget: Budget, layers: Mapping[str, nn.Module], model: nn.Module) -> Self:
        if budget.unit not in self.budgets:
            raise budget.refuse(type(self).__name__, *self.budgets)
        student = self._made_student()
        if student is None:
            student = model
        else:
            layers = find_layers(student, self.targets, self.ignore).layers
        settled = copy.copy(self)
        settled.bits = bits_for(budget, model, student, layers, self.bucket, type(self).__name__)
        return settled

    def _made_student(self) -> nn.Module | None:
        if self.student is None or isinstance(self.student, nn.Module):
            return copy.deepcopy(self.student)
        with seeded(self.seed, "student"):
            return self.student()

    def _compress(self, job: Job) -> None:
        student = self._made_student()
        layers = job.layers
        if student is None:
            teacher = job.teacher if job.teacher is not None else copy.deepcopy(job.model)
        else:
            teacher = job.teacher if job.teacher is not None else job.model
            self._checked(student)
            job.model, layers = student.eval(), find_layers(student, self.targets, self.ignore).layers
        roundings = {} if self.bits is None else {
            name: RoundedWeight(
                self.bits, self.bucket, self.gradient, self.rounding,
                generator(self.seed, "rounding", name), is_transposed(layer),
            )
            for name, layer in layers.items()
        }  # fmt: skip

        @torch.no_grad()
        def clamp() -> None:
            for layer in layers.values():
                layer.parametrizations.weight.original.clamp_(-1, 1)  # type: ignore[union-attr, operator]

        after = clamp if roundings and self.gradient == "truncated" else None
        with (
            asking(teacher.parameters(), False),
            asking(job.model.parameters()),
            rounding_layers(layers, roundings),
        ):
            job.extras["losses"] = imitate(
                job, teacher, weight=self.weight, temperature=self.temperature, reduction=self.reduction,
                epochs=self.epochs, lr=self.lr, batch_size=self.batch_size, seed=self.seed,
                description="distilling", after_step=after,
            )  # fmt: skip
        if roundings:
            store(job, layers, PackedLinear, roundings)
