"""Criticality: how to initialise a deep network of any activation, and what its width and depth make of it.

In a wide network the variance K of a preactivation goes from layer to layer as

    K' = C_b + C_W g(K),   g(K) = E s(z)^2, z ~ N(0, K),

and small changes are multiplied by chi_par = C_W g'(K) (of the size) and chi_perp = C_W E s'(z)^2 (of the
angle between two inputs). Only where both are 1 does a signal survive many layers; `Criticality` finds these
points for any activation, `initialize_critical_` sets a network there, `report` says how far a network is
from it. At finite width all this fluctuates from network to network: V / (n K^2) grows as nu depth / width,
which `Criticality.flow` predicts and `measure_flow` measures.

Source: Roberts, Yaida and Hanin, The Principles of Deep Learning Theory (Cambridge University Press 2022,
    arXiv 2106.10165), chapters 4, 5 and 9 and appendix A. What differs, and why:
- Expectations are Gauss-Legendre on panels that end at the kinks of the activation, to about 1e-13. A uniform
  grid gives <s'^2> of ReLU to 1e-4 only, for its derivative jumps.
- Activations with a kink in s or s' at zero, such as SELU and ELU, expand in sqrt K there: K falls as 1/l^2.
- For scale-invariant activations V is known to all orders in 1/n (`Flow.resummed`): the ratio E K'^2 / K'^2
  is multiplied by exactly 1 + (3 A4 / A2^2 - 1) / n in each layer.
- Activations without a critical point get the fixed point with the least |chi_par - 1| + |chi_perp - 1|.
- Residual branches, the effective fan-in of zero-padded convolutions and the scaling of the first layer by
  the data are ours.
- K* holds for the mean over networks. A single network of width n is off by sqrt(nu depth / n).
"""

from paperback.theory.criticality.analysis import Criticality, LearningRates
from paperback.theory.criticality.diagnosis import CriticalityReport, report
from paperback.theory.criticality.fixed_points import FixedPoint
from paperback.theory.criticality.flow import Flow
from paperback.theory.criticality.initialize import Initialization, initialize_critical_
from paperback.theory.criticality.measure import NetworkSample, measure_flow, sample_networks

__all__ = [
    "Criticality",
    "CriticalityReport",
    "FixedPoint",
    "Flow",
    "Initialization",
    "LearningRates",
    "NetworkSample",
    "initialize_critical_",
    "measure_flow",
    "report",
    "sample_networks",
]
