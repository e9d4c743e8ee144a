"""Weights as products of factors: truncated SVD and matrix product operators, one family behind two methods.

`LowRankLinear` and `MPOLinear` are storage modules whose factors are trainable parameters, or packed in 8 or
4 bits. `FactorCompressor` finds their sizes for a budget, by one ratio or by `sensitivity_profile` and
`allocate`, heals them, and packs them; `paperback.compress.svd` and `paperback.compress.compactifai` are its
two methods.
"""

from paperback.compress.factors.layers import FactorLayer, LowRankLinear, MPOLinear, packed_bytes
from paperback.compress.factors.method import FactorCompressor
from paperback.compress.factors.sensitivity import Sensitivity, allocate, sensitivity_profile
from paperback.compress.factors.tensor_train import (
    balanced_factors,
    bond_limits,
    core_shapes,
    tt_als,
    tt_apply,
    tt_matrix,
    tt_svd,
)

__all__ = [
    "FactorCompressor",
    "FactorLayer",
    "LowRankLinear",
    "MPOLinear",
    "Sensitivity",
    "allocate",
    "balanced_factors",
    "bond_limits",
    "core_shapes",
    "packed_bytes",
    "sensitivity_profile",
    "tt_als",
    "tt_apply",
    "tt_matrix",
    "tt_svd",
]
