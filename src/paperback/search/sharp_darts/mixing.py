"""How strongly each option counts in the mixture that is searched: scalar weights, and Max-W.

With ``w = softmax(alpha)`` over the options, scalar is ``w_o``; Max-W is ``1 - max(w) + w_o``. So the
strongest option always counts 1 and its own alpha gets no gradient from its own output; every weight lies in
(0, 1], and they sum to ``n (1 - max w) + 1``. The gradient through max(w) is kept. A comment in the reference
code wishes it were not; without it nothing holds the alphas together, and they drift.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from paperback.errors import DataError

Weighting = Literal["max_w", "scalar"]


@dataclass(frozen=True)
class Mixing:
    """From alphas to the weights of a mixture.

    Args:
        weighting: "max_w" or "scalar".
        detach_max: let no gradient through max(w); for experiments.

    Raises:
        DataError: if there is no such weighting.
    """

    weighting: Weighting = "max_w"
    detach_max: bool = False

    def __post_init__(self) -> None:
        if self.weighting not in get_args(Weighting):
            raise DataError(f'weighting is {self.weighting!r}; it must be "max_w" or "scalar".')

    def __call__(self, alpha: Tensor) -> Tensor:
        """Weights of the same shape; the options are the last axis."""
        w = alpha.softmax(-1)
        if self.weighting == "scalar":
            return w
        strongest = w.amax(-1, keepdim=True)
        return 1 - (strongest.detach() if self.detach_max else strongest) + w
