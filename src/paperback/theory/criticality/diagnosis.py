"""Reads a user's network as it is: how signals and gradients go through it, and what to do about it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from paperback.errors import DataError
from paperback.numerics.kernels import Function
from paperback.theory.criticality.initialize import critical_plans, measured_kernel, predicted_flow
from paperback.theory.criticality.network import WeightLayer, read_layers
from paperback.theory.interface import Measurement

if TYPE_CHECKING:
    import pandas as pd

TOLERATED = 10.0  # the factor over all layers up to which a network is called critical


@dataclass(frozen=True, eq=False)
class CriticalityReport:
    """The state of one network.

    Attributes:
        measurement: K of every layer on the given inputs, with the prediction from the variances of the
            weights.
        chi_par: predicted susceptibility of the size of a signal through each layer but the first, at the
            measured K.
        chi_perp: the same for the distance of two signals.
        critical_chi_par: what it would be there in a network initialised by `initialize_critical_`.
        critical_chi_perp: the same for chi_perp.
        rows: one mapping per layer.
        verdict: "critical", "vanishing" or "exploding".
        reading: what that means, in sentences.
        fix: what to do.
        left: modules with parameters that the theory does not see, and why.
    """

    measurement: Measurement
    chi_par: NDArray[np.float64]
    chi_perp: NDArray[np.float64]
    critical_chi_par: NDArray[np.float64]
    critical_chi_perp: NDArray[np.float64]
    rows: tuple[dict[str, Any], ...]
    verdict: str
    reading: str
    fix: str
    left: tuple[tuple[str, str], ...]

    @property
    def distance(self) -> float:
        """How far each layer is from critical on average, |log chi_par| + |log chi_perp|.

        Both are relative to the critical network of this depth. 0 is critical; infinite if a signal dies.
        """
        with np.errstate(divide="ignore"):
            par = np.abs(np.log(self.chi_par / self.critical_chi_par))
            perp = np.abs(np.log(self.chi_perp / self.critical_chi_perp))
        return float(np.mean(par + perp)) if len(par) else 0.0

    def table(self) -> pd.DataFrame:
        """One row per layer: what was found in the weights, measured, predicted, and would be critical."""
        import pandas as pd

        return pd.DataFrame(self.rows)

    def __str__(self) -> str:
        table = self.table().to_string(index=False, float_format="{:.4g}".format)
        return "\n".join([table, self.reading, self.fix])


def report(
    model: nn.Module, x: Tensor, activation: Function | None = None, *, residual: float = 0.0
) -> CriticalityReport:
    """Say how a network stands to criticality, layer by layer.

    C_W and C_b are the mean squares found in the weights (times fan-in) and the biases, so that the report is
    right for networks with random weights; training correlates weights with signals, and where it has, the
    measured K departs from the prediction.

    Args:
        model: any network without normalisation layers; it is not changed.
        x: a batch of inputs, ``(rows, ...)``, one row at least.
        activation: of all hidden layers; read from the activation modules if not given.
        residual: gamma of skips around every layer, in [0, 1).

    Returns:
        The report; print it, or ask for its `table()`.

    Raises:
        NotSupportedError: if the model has normalisation layers: they have no kernel flow of this form.
        DataError: if no layers or no activation can be found, or x is empty, zero or not finite.
    """
    if len(x) == 0 or not x.isfinite().all() or not (x != 0).any():
        raise DataError("x must hold at least one input; all must be finite, and not all zero.")
    layers, left = read_layers(model, x, activation, residual)
    found = [_variances(layer) for layer in layers]
    plans = [plan[:2] for plan in critical_plans(layers, residual)]
    measurement = measured_kernel(model, x, [layer.name for layer in layers], predicted_flow(layers, found))
    chi = _susceptibilities(layers, np.asarray(measurement.value), found)
    critical = _susceptibilities(layers, np.asarray(predicted_flow(layers, plans)), plans)
    rows = tuple(
        _row(layer, found[i], measurement, i, chi[i - 1] if i else None) for i, layer in enumerate(layers)
    )
    verdict, reading = _read(layers, chi, critical)
    return CriticalityReport(
        measurement=measurement,
        chi_par=chi[:, 0],
        chi_perp=chi[:, 1],
        critical_chi_par=critical[:, 0],
        critical_chi_perp=critical[:, 1],
        rows=rows,
        verdict=verdict,
        reading=reading,
        fix=_fix(layers, verdict),
        left=tuple(left),
    )


def _variances(layer: WeightLayer) -> tuple[float, float]:
    """C_b and C_W as found: mean squares, which for drawn weights are their variances."""
    bias = getattr(layer.module, "bias", None)
    c_b = 0.0 if bias is None else float(bias.detach().double().square().mean())
    weight = layer.module.weight.detach().double()  # type: ignore[operator]
    return c_b, float(weight.square().mean()) * layer.fan_in


def _susceptibilities(
    layers: Sequence[WeightLayer], K: NDArray[np.float64], variances: Sequence[tuple[float, float]]
) -> NDArray[np.float64]:
    """chi_par and chi_perp through each layer behind the first, ``(layers - 1, 2)``."""
    result = np.zeros((len(layers) - 1, 2))
    for i, layer in enumerate(layers[1:]):
        c_b, c_w = variances[i + 1]
        if layer.theory is not None and math.isfinite(K[i]) and K[i] > 0 and c_w > 0:  # else nothing passes
            result[i] = layer.theory.susceptibilities(K[i], c_b, c_w)[:2]
    return result


def _row(
    layer: WeightLayer,
    found: tuple[float, float],
    measurement: Measurement,
    i: int,
    chi: NDArray[np.float64] | None,
) -> dict[str, Any]:
    point = None if layer.theory is None else layer.theory.recommended
    ends, predicted = measurement.interval, measurement.prediction
    assert predicted is not None  # measured_kernel puts it there
    low, high = (None, None) if ends is None else (float(np.ravel(end)[i]) for end in ends)
    return {
        "layer": layer.name,
        "fed by": layer.fed_by,
        "fan-in": layer.fan_in,
        "C_b": found[0],
        "C_W": found[1],
        "critical C_b": None if point is None else point.C_b,
        "critical C_W": None if point is None else point.C_W,
        "K": float(np.ravel(measurement.value)[i]),
        "K low": low,
        "K high": high,
        "K predicted": float(np.ravel(predicted)[i]),
        "chi_par": None if chi is None else float(chi[0]),
        "chi_perp": None if chi is None else float(chi[1]),
    }


def _read(
    layers: Sequence[WeightLayer], chi: NDArray[np.float64], critical: NDArray[np.float64]
) -> tuple[str, str]:
    """The verdict, and its reason in sentences.

    The gradient's mean square is multiplied by chi_perp in each layer, so that its product over the layers is
    what the first layer sees of the last one's. Next to K* = 0 it falls as a power of the depth even in the
    critical network: what is judged is the ratio to that.
    """
    if len(chi) == 0:
        return "critical", "One layer of weights: there is no depth for a signal to be lost in."
    with np.errstate(divide="ignore"):
        par, perp = np.exp(np.log(chi).sum(0))
    best = float(np.prod(critical[:, 1]))
    ratio = perp / best
    verdict = "vanishing" if ratio < 1 / TOLERATED else "exploding" if ratio > TOLERATED else "critical"
    reading = (
        f"Over {len(chi)} layers a difference between two inputs, and the squared gradient, changes by the "
        f"factor {perp:.3g} (critical: {best:.3g}), a change of size by {par:.3g}: {verdict}."
    )
    theory = next(layer.theory for layer in layers if layer.theory is not None)
    hidden = [layer.outputs for layer in layers[:-1]]
    spread = theory.nu * sum(1 / n for n in hidden)
    reading += f" One draw of the weights differs from the next by {math.sqrt(spread):.0%} of K at the output"
    if spread > 1:
        reading += ", so that no initialisation is reliable; make it wider or less deep"
    return verdict, f"{reading}."


def _fix(layers: Sequence[WeightLayer], verdict: str) -> str:
    theories = {id(layer.theory): layer.theory for layer in layers if layer.theory is not None}
    advice = " ".join(theory.describe() for theory in theories.values())
    if verdict == "critical":
        return f"Nothing needs to be done. {advice}".rstrip()
    return f"Before training, call initialize_critical_(model, x=x). {advice}"
