"""Differentiable quantization: the points that weights are rounded to are learned."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from paperback.compress.budget import Budget
from paperback.compress.distill_quantize.rounding import CodebookWeight, bucket_layout, rounding_layers
from paperback.compress.distill_quantize.training import ALL_ROWS, bits_for, check_settings, imitate, store
from paperback.compress.interface import Compressor, Job
from paperback.compress.masked import asking
from paperback.compress.storage import CodebookLinear
from paperback.compress.survey.healing import to_batch, training_rows
from paperback.errors import DataError
from paperback.networks.surgery import HEADS_AND_EMBEDDINGS, is_transposed, weight_matrix
from paperback.numerics.quantized import quantile_points, uniform_points
from paperback.numerics.quantized.grid import width_or_one
from paperback.training.distillation import Reduction

Init = Literal["quantile", "uniform"]
GRADIENT_BATCHES = 5  # that the points are dealt out by
MOST_POINTS = 256


class DifferentiableQuantization(Compressor):
    """Learns where the points of each layer lie; the weights stay, but for `alternate` (section 4).

    Running statistics of batch norms follow the rounded network. ``extras["points"]`` are the learned points
    by layer, ``extras["first_points"]`` those that they began as.

    Args:
        bits: of a weight on the mean, 1 to 8: 2^bits points a layer.
        bucket: consecutive weights that share minimum and maximum, float32 each; None for a whole layer.
        init: "quantile" of the scaled weights, or "uniform".
        allocate: deal half of all points out by the gradient's norm of each layer; a layer then has other
            bits than `bits`. Not used with a budget, which holds for every layer.
        alternate: train the weights (straight through) for an epoch before each epoch of the points.
        temperature: T > 0.
        weight: of the teacher, which is the original if none is given; in [0, 1].
        reduction: of the teacher's loss, see `training.distillation`.
        epochs: passes over the training part, of the points.
        lr: of Adam, on the points.
        weight_lr: of Adam, on the weights, with `alternate`.
        batch_size: rows of a step.
        targets: see `Compressor`.
        ignore: see `Compressor`.
        seed: of the order of the rows.

    Raises:
        DataError: if a setting is out of range.
    """

    family = "quantize"
    needs = frozenset({"training", "loss"})
    tuning_free = False
    budgets = ("bits", "bytes", "ratio")

    def __init__(
        self,
        bits: int = 4,
        bucket: int | None = 256,
        init: Init = "quantile",
        allocate: bool = True,
        alternate: bool = False,
        temperature: float = 2.0,
        weight: float = 0.7,
        *,
        reduction: Reduction = "batchmean",
        epochs: int = 3,
        lr: float = 1e-3,
        weight_lr: float = 1e-3,
        batch_size: int = 64,
        targets: Sequence[str] | None = None,
        ignore: Sequence[str] = HEADS_AND_EMBEDDINGS,
        seed: int = 0,
    ) -> None:
        super().__init__(targets=targets, ignore=ignore, seed=seed)
        check_settings(bits, bucket, temperature, weight, epochs, lr, batch_size)
        if not weight_lr > 0:
            raise DataError(f"weight_lr is {weight_lr}; it must be positive.")
        for name, value, choices in (
            ("init", init, get_args(Init)), ("reduction", reduction, get_args(Reduction)),
        ):  # fmt: skip
            if value not in choices:
                raise DataError(f"{name} is {value!r}; it must be one of {', '.join(choices)}.")
        self.bits, self.bucket, self.init, self.allocate = bits, bucket, init, allocate
        self.alternate, self.temperature, self.weight = alternate, temperature, weight
        self.reduction, self.epochs, self.lr, self.weight_lr = reduction, epochs, lr, weight_lr
        self.batch_size = batch_size

    def _settle(self, budget: Budget, layers: Mapping[str, nn.Module], model: nn.Module) -> Self:
        if budget.unit not in self.budgets:
            raise budget.refuse(type(self).__name__, *self.budgets)
        settled = copy.copy(self)
        settled.bits = bits_for(budget, model, model, layers, self.bucket, type(self).__name__, points=True)
        settled.allocate = False
        return settled

    def _compress(self, job: Job) -> None:
        teacher = job.teacher if job.teacher is not None else copy.deepcopy(job.model)
        counts = dict.fromkeys(job.layers, 2**self.bits)
        if self.allocate and self.bits > 1:
            counts = deal_points(self._gradient_norms(job), 2**self.bits)
        roundings = {
            name: CodebookWeight(
                self._first_points(job, name, counts[name]), self.bucket, is_transposed(layer)
            )
            for name, layer in job.layers.items()
        }
        job.extras["first_points"] = {name: r.points.detach().clone() for name, r in roundings.items()}
        job.extras["losses"] = self._learn(job, teacher, roundings)
        job.extras["points"] = {name: r.points.detach().clone() for name, r in roundings.items()}
        store(job, job.layers, CodebookLinear, roundings)

    def _learn(self, job: Job, teacher: nn.Module, roundings: Mapping[str, CodebookWeight]) -> list[float]:
        def sort() -> None:
            for rounding in roundings.values():
                rounding.sort()

        common: dict[str, Any] = {
            "weight": self.weight, "temperature": self.temperature, "reduction": self.reduction,
            "batch_size": self.batch_size,
        }  # fmt: skip
        losses: list[float] = []
        own = list(job.model.parameters())
        points = [rounding.points for rounding in roundings.values()]
        rounds, epochs = (self.epochs, 1) if self.alternate else (1, self.epochs)
        with asking(teacher.parameters(), False), rounding_layers(job.layers, roundings):
            for turn in range(rounds):
                if self.alternate:
                    with asking(own), asking(points, False):
                        losses += imitate(
                            job, teacher, epochs=1, lr=self.weight_lr, seed=self.seed + turn,
                            description="training weights", **common,
                        )  # fmt: skip
                with asking(own, False):
                    losses += imitate(
                        job, teacher, epochs=epochs, lr=self.lr, seed=self.seed + turn, after_step=sort,
                        description="learning points", **common,
                    )  # fmt: skip
        return losses

    def _first_points(self, job: Job, name: str, count: int) -> Tensor:
        """Quantiles of the scaled weights, or equally far apart; equal ones are merged."""
        matrix = weight_matrix(job.layers[name]).float()
        if self.init == "uniform":
            return uniform_points(count).to(matrix.device)
        groups = bucket_layout(tuple(matrix.shape), self.bucket).split(matrix)
        low = groups.amin(1, keepdim=True)
        scaled = (groups - low) / width_or_one(groups.amax(1, keepdim=True) - low)
        points = quantile_points(scaled, count).unique()
        if len(points) < count:
            job.note(f"{name} has fewer distinct values than its {count} points; equal points were merged.")
        return points if len(points) > 1 else uniform_points(2).to(matrix.device)

    def _gradient_norms(self, job: Job) -> dict[str, float]:
        """The norm of the loss's gradient by each weight, the mean over a few batches."""
        assert job.data is not None  # the method needs training data
        rows, keys = training_rows(job.data, ALL_ROWS, self.seed)
        weights: dict[str, Any] = {name: layer.weight for name, layer in job.layers.items()}
        norms = dict.fromkeys(weights, 0.0)
        starts = list(range(0, len(rows[0]), self.batch_size))[:GRADIENT_BATCHES]
        for start in starts:
            batch = to_batch(tuple(part[start : start + self.batch_size] for part in rows), keys)
            with torch.enable_grad(), asking(weights.values()):
                found = torch.autograd.grad(job.loss(job.model, batch), list(weights.values()))
            for name, gradient in zip(weights, found, strict=True):
                norms[name] += float(gradient.float().norm()) / len(starts)
        return norms


def deal_points(norms: Mapping[str, float], mean: int) -> dict[str, int]:
    """How many points each layer gets: half of the mean, and a share of the other half by its gradient.

    Args:
        norms: of the gradient, by layer, not negative.
        mean: points a layer on the mean, 2 to 256.

    Returns:
        Counts from 2 to 256 whose sum is the mean times the number of layers. What rounding gives too much
        is taken from the largest, what is missing is added to the smallest (section 4).
    """
    total, sum_of_norms = mean * len(norms), sum(norms.values())
    first = max(2, mean // 2)
    rest = total - first * len(norms)
    counts = {}
    for name, norm in norms.items():
        share = norm / sum_of_norms if sum_of_norms > 0 else 1 / len(norms)
        counts[name] = min(MOST_POINTS, first + round(rest * share))
    while (excess := sum(counts.values()) - total) != 0:
        name = max(counts, key=counts.__getitem__) if excess > 0 else min(counts, key=counts.__getitem__)
        counts[name] -= 1 if excess > 0 else -1
    return counts
