"""What the methods that replace weights by factors have in common: sizes from budgets, healing, packing.

A method writes how one layer is factorised and how many numbers its factors have. From a ratio (the share of
each layer's parameters that stays), bytes, or parameters of the whole model follow the sizes: the largest
whose closed form fits, found by bisection, the same ratio for every layer or more for those that mind most.
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, ClassVar, Literal, Self

from torch import Tensor, nn

from paperback.compress.budget import Budget
from paperback.compress.data import Batches, Data, default_loss
from paperback.compress.factors.layers import FactorLayer, packed_bytes
from paperback.compress.factors.sensitivity import Sensitivity, allocate, sensitivity_profile
from paperback.compress.interface import Family, Job, Streamed
from paperback.compress.statistics import LayerStatistics
from paperback.compress.storage import stored_layers
from paperback.compress.survey.healing import Healing, heal
from paperback.errors import BudgetError, DataError
from paperback.networks.surgery import weight_matrix

BITS = {None: None, "int8": 8, "int4": 4}
PROBE_BATCHES = 4  # that the sensitivity of layers is measured on
LADDER = (1.75, 1.25, 1.0, 0.75, 0.5)  # sizes of the profile, as multiples of the ratio
# What files hold beside numbers, in bytes, rounded up: configuration and recipe, name and shape of a tensor,
# the description of a layer, of a factor, and of how that is packed.
OF_FILES, OF_A_TENSOR, OF_A_LAYER, OF_A_FACTOR, OF_PACKING = 4000, 125, 900, 150, 600
Size = int | Mapping[str, int] | None


class FactorCompressor(Streamed):
    """Replaces the weights of a network by factors.

    Args:
        size: bond dimension or rank of every layer, or by name; layers without a name in it stay dense.
        ratio: share of each layer's parameters that its factors have.
        metric: "frobenius", of the weights alone; "activation", of what the layer gives out on the
            calibration data.
        allocation: "uniform", one ratio for all layers; "sensitivity", measured on the training data.
        heal_steps: steps of AdamW in which the factors are trained; 0 for none.
        heal_loss: "lm", the loss of the job; "distill", the teacher's logits (the original's, if none is
            given).
        heal_lr: peak learning rate.
        heal_batch_size: rows of a step.
        quantize: "int8" or "int4" packs the factors at the end.
        targets: as of `Compressor`.
        ignore: as of `Compressor`.
        seed: of the order of the training rows.

    Raises:
        DataError: if a setting is out of range.
    """

    family: ClassVar[Family] = "factorize"
    budgets: ClassVar[tuple[str, ...]] = ("ratio", "bytes", "parameters")

    def __init__(
        self,
        *,
        size: Size,
        size_name: str,
        ratio: float | None,
        metric: Literal["frobenius", "activation"],
        allocation: Literal["uniform", "sensitivity"],
        heal_steps: int,
        heal_loss: Literal["lm", "distill"],
        heal_lr: float,
        heal_batch_size: int,
        quantize: Literal["int8", "int4"] | None,
        targets: Sequence[str] | None,
        ignore: Sequence[str],
        seed: int,
    ) -> None:
        super().__init__(targets=targets, ignore=ignore, seed=seed)
        for name, value, known in (
            ("metric", metric, ("frobenius", "activation")),
            ("allocate", allocation, ("uniform", "sensitivity")),
            ("heal_loss", heal_loss, ("lm", "distill")),
            ("quantize", quantize, tuple(BITS)),
        ):
            if value not in known:
                raise DataError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, known))}.")
        for one in size.values() if isinstance(size, Mapping) else () if size is None else (size,):
            if not isinstance(one, int) or one < 1:
                raise DataError(f"{size_name} is {one!r}; it must be a whole number of at least 1.")
        if ratio is not None and not ratio > 0:
            raise DataError(f"ratio is {ratio}; it is the share of parameters that stays, above 0.")
        if size is not None and (ratio is not None or allocation == "sensitivity"):
            raise DataError(f"{size_name} fixes the sizes; leave out ratio and allocate='sensitivity'.")
        if heal_steps < 0:
            raise DataError(f"heal_steps is {heal_steps}; it must be at least 0.")
        self.ratio, self.metric, self.allocate = ratio, metric, allocation
        self.heal_steps, self.heal_loss, self.quantize = heal_steps, heal_loss, quantize
        self.heal_lr, self.heal_batch_size = heal_lr, heal_batch_size
        self._size, self._size_name = size, size_name
        if heal_steps:
            self._healing()  # its settings are checked now

    # -- what a method writes --------------------------------------------------------------------------------

    @abstractmethod
    def sizes_of_factors(self, shape: tuple[int, int], size: int) -> list[int]:
        """How many numbers each factor of a matrix of this shape has."""

    @abstractmethod
    def largest_size(self, shape: tuple[int, int]) -> int:
        """The size from which on a matrix of this shape is exact."""

    @abstractmethod
    def factorize(
        self, name: str, layer: nn.Module, size: int | None, gram: Tensor | None = None
    ) -> FactorLayer:
        """The factors of one layer."""

    # -- what it needs ---------------------------------------------------------------------------------------

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """Data for the metric of activations and for the sensitivities; more of it for healing."""
        calibrates = self.metric == "activation" or self.allocate == "sensitivity"
        wanted = {"calibration": calibrates, "training": self.heal_steps > 0}
        return frozenset(name for name, needed in wanted.items() if needed)

    @property
    def tuning_free(self) -> bool:  # type: ignore[override]
        """Whether nothing is healed."""
        return not self.heal_steps

    @property
    def statistics(self) -> frozenset[str]:  # type: ignore[override]
        """The Gram matrices of the inputs, for the metric of activations."""
        return frozenset({"gram"} if self.metric == "activation" else ())

    # -- compression -----------------------------------------------------------------------------------------

    def visit(self, name: str, layer: nn.Module, stats: LayerStatistics) -> nn.Module | None:
        """Factorise one layer, or leave it."""
        if name not in self._plan:
            return None
        gram = stats.gram / stats.count if self.metric == "activation" else None
        factors = self.factorize(name, layer, self._plan[name], gram)
        if factors.numbers >= weight_matrix(layer).numel():
            self.job.skip(name, "its factors would be larger than the weight")
            return None
        return factors

    def _compress(self, job: Job) -> None:
        teacher = job.teacher
        if teacher is None and self.heal_steps and self.heal_loss == "distill":
            teacher = copy.deepcopy(job.model)
        self._plan = self._planned(job)
        job.extras["sizes"] = dict(self._plan)
        super()._compress(job)
        factors = [layer for layer in stored_layers(job.model).values() if isinstance(layer, FactorLayer)]
        if not factors:
            raise DataError("no layer became smaller by factors; ask for smaller ones.")
        weights = sum(math.prod(layer.form.shape) for layer in factors)
        numbers = sum(layer.numbers for layer in factors)
        job.note(f"{numbers:,} numbers in factors stand for {weights:,} weights ({numbers / weights:.1%}).")
        if self.heal_steps:
            job.extras["history"] = self._heal(job, factors, teacher)
        bits = BITS[self.quantize]
        if bits is not None:
            for layer in factors:
                layer.quantize(bits)

    def _heal(self, job: Job, factors: Sequence[FactorLayer], teacher: nn.Module | None) -> list[float]:
        """Train the factors, and nothing else."""
        trained = {id(p) for layer in factors for p in layer.parameters()}
        flags = [(p, p.requires_grad) for p in job.model.parameters()]
        try:
            for parameter, _ in flags:
                parameter.requires_grad_(id(parameter) in trained)
            return heal(job, self._healing(), teacher=teacher if self.heal_loss == "distill" else None)
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
                parameter.grad = None

    def _healing(self) -> Healing:
        return Healing(self.heal_steps, self.heal_batch_size, self.heal_lr, teacher_weight=1.0)

    # -- sizes -----------------------------------------------------------------------------------------------

    def profile(
        self,
        model: nn.Module,
        data: Data | Batches,
        ratios: Sequence[float] = (0.5, 0.25),
        *,
        layers: Sequence[str] | None = None,
        loss: Any = None,
        progress: bool = False,
    ) -> list[Sensitivity]:
        """The sensitivity of each layer on the first batches of the training data, by the plain metric.

        Args:
            model: left as it is.
            data: its training part is used, the first batches of it.
            ratios: shares of a layer's parameters, each in (0, 1).
            layers: names; all that the method handles if not given.
            loss: ``(model, batch) -> scalar``; see `data.default_loss`.
            progress: show a bar.
        """
        batches = list(islice(Data.of(data).batches("train"), PROBE_BATCHES))
        found = self._find(model).layers
        shapes = {name: _shape(layer) for name, layer in found.items() if layers is None or name in layers}
        sizes = {
            name: sorted({self._fitting(name, shape, ratio) for ratio in ratios}, reverse=True)
            for name, shape in shapes.items()
        }

        def evaluate(model: nn.Module) -> float:
            return sum(float((loss or default_loss)(model, batch)) for batch in batches) / len(batches)

        return sensitivity_profile(model, evaluate, sizes, self.factorize, progress=progress)

    def size_for(self, shape: tuple[int, int], numbers: int) -> int:
        """The largest size whose factors have at most so many numbers; 0 if not even the smallest has.

        Args:
            shape: (out, in) of the weight as a matrix.
            numbers: parameters.
        """
        sizes = range(1, self.largest_size(shape) + 1)
        return bisect_right(sizes, numbers, key=lambda size: sum(self.sizes_of_factors(shape, size)))

    def _fitting(self, name: str, shape: tuple[int, int], ratio: float) -> int:
        size = self.size_for(shape, int(ratio * math.prod(shape)))
        if size < 1:
            least = sum(self.sizes_of_factors(shape, 1)) / math.prod(shape)
            raise BudgetError(
                f"a ratio of {ratio:.3g} leaves {name} with no {self._size_name} at all; "
                f"the smallest ratio for it is {least:.3g}."
            )
        return size

    def _planned(self, job: Job) -> dict[str, int | None]:
        """A size for each layer that is to be factorised."""
        shapes = {name: _shape(layer) for name, layer in job.layers.items()}
        if isinstance(self._size, Mapping):
            unknown = sorted(self._size.keys() - shapes.keys())
            if unknown:
                raise DataError(
                    f"{self._size_name} names {unknown[0]!r}, which is not a layer that is handled."
                )
            for name in shapes.keys() - self._size.keys():
                job.skip(name, f"{self._size_name} does not name it")
            return dict(self._size)
        if self._size is not None:
            return dict.fromkeys(shapes, self._size)
        if self.ratio is None:
            return dict.fromkeys(shapes)  # the method's own rule
        if self.ratio >= 1:
            for name in shapes:
                job.skip(name, f"a ratio of {self.ratio:g} makes nothing smaller")
            return {}
        uniform = {name: self._fitting(name, shape, self.ratio) for name, shape in shapes.items()}
        return self._by_sensitivity(job, shapes, uniform) if self.allocate == "sensitivity" else {**uniform}

    def _by_sensitivity(
        self, job: Job, shapes: Mapping[str, tuple[int, int]], uniform: Mapping[str, int]
    ) -> dict[str, int | None]:
        """As many parameters as with one ratio for all, where they matter most."""
        assert job.data is not None
        assert self.ratio is not None
        numbers = {name: sum(self.sizes_of_factors(shapes[name], size)) for name, size in uniform.items()}
        least = max(sum(self.sizes_of_factors(shape, 1)) / math.prod(shape) for shape in shapes.values())
        ratios = sorted({min(0.95, max(least, self.ratio * multiple)) for multiple in LADDER})
        profile = self.profile(
            job.model, job.data, ratios, layers=list(shapes), loss=job.loss, progress=job.progress
        )
        job.extras["profile"] = profile
        budget = sum(numbers.values())
        # A layer that stays dense keeps its floats: where factors are packed, each counts as several numbers.
        bits = BITS[self.quantize]
        dense = {
            name: math.prod(shape)
            * (1 if bits is None else 8 * weight_matrix(job.layers[name]).element_size() // bits)
            for name, shape in shapes.items()
        }
        chosen = allocate([replace(row, weights=dense[row.name]) for row in profile], budget)
        for name, row in chosen.items():
            if row is None:
                job.skip(name, "it stays dense by its sensitivity")
        plan: dict[str, int | None] = {name: row.size for name, row in chosen.items() if row is not None}
        left = budget - sum(dense[name] if row is None else row.numbers for name, row in chosen.items())
        # What the last step saved beyond the need goes to the layer that minds most of those factorised.
        for row in sorted((r for r in chosen.values() if r is not None), key=lambda r: -r.increase):
            size = self.size_for(shapes[row.name], row.numbers + left)
            grown = sum(self.sizes_of_factors(shapes[row.name], size))
            if grown < math.prod(shapes[row.name]):
                plan[row.name], left = size, left - (grown - row.numbers)
        return plan

    # -- budgets ---------------------------------------------------------------------------------------------

    def _settle(self, budget: Budget, layers: Mapping[str, nn.Module], model: nn.Module) -> Self:
        """The largest ratio at which the closed forms fit the budget."""
        if budget.unit not in self.budgets:
            raise budget.refuse(type(self).__name__, *self.budgets)
        shapes = {name: _shape(layer) for name, layer in layers.items()}
        tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
        in_numbers = budget.unit == "parameters"
        whole = sum(p.numel() for p in model.parameters()) if in_numbers else sum(map(_bytes, tensors))
        cost = self._cost(layers, whole, in_numbers, len(tensors))
        least = max(sum(self.sizes_of_factors(shape, 1)) / math.prod(shape) for shape in shapes.values())
        limit = budget.value * whole if budget.unit == "ratio" else budget.value
        low, high = least, 1 - 1e-9
        if low >= high or cost(low) > limit:
            unit = "parameters" if in_numbers else "bytes"
            raise BudgetError(
                f"{type(self).__name__} cannot reach {limit:,.0f} {unit}: "
                f"with the smallest factors this model has {cost(min(low, high)):,}; "
                f"give from that up to {whole:,}."
            )
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if cost(middle) <= limit else (low, middle)
        settled = copy.copy(self)
        settled.ratio, settled._size = low, None
        setattr(settled, self._size_name, None)
        return settled

    def _cost(self, layers: Mapping[str, nn.Module], whole: int, in_numbers: bool, tensors: int) -> Any:
        """Parameters, or bytes on disk, of the model at a ratio."""
        bits = BITS[self.quantize]
        weights = {name: weight_matrix(layer) for name, layer in layers.items()}
        rest = whole - sum(w.numel() if in_numbers else _bytes(w) for w in weights.values())
        if not in_numbers:
            factors = sum(len(self.sizes_of_factors(_shape(layer), 1)) for layer in layers.values())
            tensors += factors * (1 if bits is None else 2)
            rest += OF_FILES + OF_A_TENSOR * tensors + OF_A_LAYER * len(layers)
            rest += (OF_A_FACTOR if bits is None else OF_A_FACTOR + OF_PACKING) * factors

        def cost(ratio: float) -> int:
            total = rest
            for weight in weights.values():
                shape = (weight.shape[0], weight.shape[1])
                sizes = self.sizes_of_factors(
                    shape, max(1, self.size_for(shape, int(ratio * weight.numel())))
                )
                if in_numbers:
                    total += sum(sizes)
                else:
                    total += sum(sizes) * weight.element_size() if bits is None else packed_bytes(sizes, bits)
            return total

        return cost


def _shape(layer: nn.Module) -> tuple[int, int]:
    out, inputs = weight_matrix(layer).shape
    return out, inputs


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
