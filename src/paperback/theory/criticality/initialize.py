"""Sets the weights of a user's network at the critical point of its activation, in place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from paperback.errors import DataError
from paperback.networks import collect_activations
from paperback.numerics.kernels import Function
from paperback.theory.criticality.fixed_points import FixedPoint
from paperback.theory.criticality.network import WeightLayer, read_layers
from paperback.theory.interface import Measurement

if TYPE_CHECKING:
    import pandas as pd

MEASURED_ROWS = 256  # of x, for what the report measures


@dataclass(frozen=True, eq=False)
class Initialization:
    """What was done to a model, and what was left.

    Attributes:
        rows: one mapping per layer: name, kind, fan-in, fed by, C_b, C_W, the standard deviations drawn from,
            and a note where something stands in the way.
        points: by name of the activation, the point that was used.
        left: name and reason of every module with parameters that was not touched.
        notes: sentences for the reader.
        measured: with an input given, the mean square of the preactivations of each layer afterwards; its
            prediction is what the point promises.
    """

    rows: tuple[dict[str, Any], ...]
    points: dict[str, FixedPoint]
    left: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    measured: Measurement | None = None

    def table(self) -> pd.DataFrame:
        """One row per layer that was set, then one per module that was left."""
        import pandas as pd

        return pd.DataFrame(
            [*self.rows, *({"layer": name, "note": f"left: {why}"} for name, why in self.left)]
        )

    def __str__(self) -> str:
        lines = [f"set {len(self.rows)} layers, left {len(self.left)} modules"]
        for name, point in self.points.items():
            lines.append(f"  fed by {name}: {point.kind}, C_b = {point.C_b:.5g}, C_W = {point.C_W:.5g}")
        lines += [f"  left {name}: {why}" for name, why in self.left]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def initialize_critical_(
    module: nn.Module,
    activation: Function | None = None,
    x: Tensor | None = None,
    *,
    residual: float = 0.0,
    generator: torch.Generator | None = None,
) -> Initialization:
    """Draw the weights of a network anew, in place, so that signals neither grow nor shrink with depth.

    Every Linear and Conv layer gets W ~ N(0, C_W / fan_in) and b ~ N(0, C_b) of the activation that feeds it.
    The first layer, fed by the data, is scaled so that its outputs have the variance K* of the fixed point,
    or 1 where every variance is fixed or K* = 0. Nothing is changed when an error is raised.

    Args:
        module: any network without normalisation layers, in which layers of weights and activations follow
            each other; pooling between them is not accounted for.
        activation: elementwise function of all hidden layers. If not given, it is read from the activation
            modules; several kinds need `x`.
        x: a batch of inputs, ``(rows, ...)``, as the network is given in training. It scales the first layer
            and counts what convolutions lose to zero padding. Without it the inputs are taken to be
            standardised, and padding not to matter.
        residual: gamma of skips z' = gamma z + layer(z) around every layer, in [0, 1).
        generator: source of the draws, on the CPU; a fresh one with seed 0 if not given.

    Returns:
        What was done to each layer, what was left and why.

    Raises:
        NotSupportedError: if the model has normalisation layers: its signals do not flow in this way.
        DataError: if there is no layer or no activation to be found, or x is zero.
    """
    layers, left = read_layers(module, x, activation, residual)
    source = torch.Generator().manual_seed(0) if generator is None else generator
    plans = critical_plans(layers, residual)
    for layer, plan in zip(layers, plans, strict=True):
        _draw(layer, plan, source)
    rows = tuple(_row(layer, plan) for layer, plan in zip(layers, plans, strict=True))
    points = {ly.fed_by: ly.theory.recommended for ly in layers if ly.theory is not None}
    notes = [ly.describe() for ly in {id(ly.theory): ly.theory for ly in layers if ly.theory}.values()]
    if len({point.K for point in points.values() if point.kind == "K*>0"}) > 1:
        notes.append("The activations have different fixed points, so that no size of signal suits them all.")
    if x is None:
        notes.append("The inputs are taken to have mean square 1; give x to measure it.")
    measured = None
    if x is not None:
        predicted = predicted_flow(layers, [plan[:2] for plan in plans])
        measured = measured_kernel(module, x[:MEASURED_ROWS], [layer.name for layer in layers], predicted)
    return Initialization(rows, points, tuple(left), tuple(notes), measured)


class Plan(NamedTuple):
    """The variances for one layer, and what there is to say about them."""

    C_b: float
    C_W: float
    note: str = ""


def critical_plans(layers: Sequence[WeightLayer], residual: float) -> list[Plan]:
    """The critical variances of every layer; the first one is scaled by its inputs.

    Raises:
        DataError: if the inputs are zero or not finite.
    """
    return [
        _plan_first(layer, layers[i + 1 : i + 2], residual)
        if layer.theory is None
        else _plan(layer.module, layer.theory.recommended)
        for i, layer in enumerate(layers)
    ]


def _plan(module: nn.Module, point: FixedPoint) -> Plan:
    missing = point.C_b > 0 and getattr(module, "bias", None) is None
    return Plan(point.C_b, point.C_W, "has no bias, so that K* is not held" if missing else "")


def _plan_first(layer: WeightLayer, after: Sequence[WeightLayer], residual: float) -> Plan:
    if not (math.isfinite(layer.input_square) and layer.input_square > 0):
        raise DataError(
            f"the inputs have mean square {layer.input_square}; x must be finite and not all zero."
        )
    point = after[0].theory.recommended if after and after[0].theory is not None else None
    target, c_b = 1.0, 0.0
    if point is not None and point.kind in ("K*>0", "none"):
        target = point.K
        if getattr(layer.module, "bias", None) is not None:
            c_b = min(point.C_b / (1 - residual**2), target / 2)
    return Plan(c_b, (target - c_b) / layer.input_square, f"scaled by its inputs to K = {target:.4g}")


def predicted_flow(layers: Sequence[WeightLayer], variances: Sequence[tuple[float, float]]) -> list[float]:
    """K of every layer at infinite width, given (C_b, C_W) of each."""
    result, K = [], 0.0
    for layer, (c_b, c_w) in zip(layers, variances, strict=True):
        K = layer.theory.step(K, c_b, c_w) if layer.theory else c_b + c_w * layer.input_square
        result.append(K)
    return result


@torch.no_grad()
def _draw(layer: WeightLayer, plan: Plan, source: torch.Generator) -> None:
    for name, variance in (("weight", plan.C_W / layer.fan_in), ("bias", plan.C_b)):
        parameter = getattr(layer.module, name, None)
        if parameter is not None:
            draw = (
                torch.randn(parameter.shape, generator=source) if variance else torch.zeros(parameter.shape)
            )
            parameter.copy_(draw * math.sqrt(variance))


def _row(layer: WeightLayer, plan: Plan) -> dict[str, Any]:
    return {
        "layer": layer.name,
        "kind": type(layer.module).__name__,
        "fan-in": layer.fan_in,
        "fed by": layer.fed_by,
        "C_b": plan.C_b,
        "C_W": plan.C_W,
        "weight std": math.sqrt(plan.C_W / layer.fan_in),
        "bias std": math.sqrt(plan.C_b),
        "note": plan.note,
    }


def measured_kernel(
    model: nn.Module, x: Tensor, names: Sequence[str], predicted: Sequence[float]
) -> Measurement:
    """K of one network: the mean square of the preactivations of each layer, over neurons and inputs.

    The interval is over inputs; how far another draw of the weights would be away it cannot say.
    """
    found = collect_activations(model, x, names)
    squares = torch.stack([found[name].double().square().flatten(1).mean(1) for name in names], 1)
    return Measurement.from_samples(
        "K",
        squares.numpy(),
        prediction=predicted,
        index=names,
        axis="layer",
        bias="One network: its own weights scatter by sqrt(nu depth / width) about the prediction.",
    )
