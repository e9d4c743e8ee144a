"""What one layer takes in, over all calibration tokens, gathered in one pass.

Means and variances of batches are merged by the formula of Chan, Golub and LeVeque (1979), so that batches of
any length give what all tokens at once would give, without cancellation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paperback.errors import DataError

KINDS = frozenset({"moments", "abs_max", "gram", "sequence_sums", "sample"})
SAMPLE_ROWS = 1024


class LayerStatistics:
    """Statistics of the input of a layer, streamed.

    Args:
        kinds: which are gathered: "moments" (mean, variance, square sum), "abs_max" (with the mean of the
            absolute value), "gram", "sequence_sums", "sample".
        generator: of the sample; needed for it only.
        sample_rows: how many tokens the sample keeps.

    Attributes:
        count: tokens so far.
        sequences: rows of batches so far.
    """

    def __init__(
        self,
        kinds: frozenset[str],
        generator: torch.Generator | None = None,
        sample_rows: int = SAMPLE_ROWS,
    ) -> None:
        unknown = sorted(set(kinds) - KINDS)
        if unknown:
            raise DataError(f"there is no statistic {unknown[0]!r}; there are {', '.join(sorted(KINDS))}.")
        self.kinds = frozenset(kinds)
        self.count = 0
        self.sequences = 0
        self._generator = generator
        self._sample_rows = sample_rows
        self._sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Take in one batch.

        Args:
            x: ``(sequences, positions, in)``.
            mask: ``(sequences, positions)``, true for tokens that count; all if not given.
        """
        if mask is not None and mask.shape != x.shape[:2]:
            mask = None  # the layer does not see tokens, such as a pooler that sees the first one only
        rows = x.reshape(-1, x.shape[-1]) if mask is None else x[mask.bool()]
        rows = rows.float()
        if len(rows) == 0:
            return
        if "moments" in self.kinds:
            self._merge_moments(rows)
        if "abs_max" in self.kinds:
            absolute = rows.abs()
            self._add("abs_sum", absolute.sum(0, dtype=torch.float64))
            highest = absolute.amax(0)
            self._sums["abs_max"] = torch.maximum(self._sums.get("abs_max", highest), highest)
        if "gram" in self.kinds:
            # In place: a matrix of in x in is the largest thing that calibration holds.
            gram = self._sums.setdefault("gram", rows.new_zeros(rows.shape[1], rows.shape[1]))
            gram.addmm_(rows.T, rows)
        if "sequence_sums" in self.kinds:
            counted = x if mask is None else x * mask.unsqueeze(-1)
            self._add("sequence_sum", counted.float().sum((0, 1), dtype=torch.float64))
        if "sample" in self.kinds:
            self._draw(rows)
        self.count += len(rows)
        self.sequences += len(x)

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def _merge_moments(self, rows: Tensor) -> None:
        mean = rows.mean(0)
        squares = (rows - mean).square().sum(0, dtype=torch.float64)
        mean = mean.double()
        self._add("square_sum", rows.square().sum(0, dtype=torch.float64))
        if self.count == 0:
            self._sums |= {"mean": mean, "squares": squares}
            return
        total = self.count + len(rows)
        step = mean - self._sums["mean"]
        self._sums["squares"] += squares + step.square() * (self.count * len(rows) / total)
        self._sums["mean"] += step * (len(rows) / total)

    def _draw(self, rows: Tensor) -> None:
        """A uniform sample of all tokens so far: those with the largest of independent uniform keys."""
        keys = torch.rand(len(rows), generator=self._generator)
        if "keys" in self._sums:
            keys, rows = torch.cat([self._sums["keys"], keys]), torch.cat([self._sums["sample"], rows])
        kept = keys.topk(min(self._sample_rows, len(keys))).indices
        self._sums |= {"keys": keys[kept], "sample": rows[kept.to(rows.device)]}

    # -- what was gathered -----------------------------------------------------------------------------------

    def _get(self, name: str, kind: str) -> Tensor:
        if kind not in self.kinds:
            raise DataError(f"{name} was not gathered; ask for the statistic {kind!r}.")
        if self.count == 0:
            raise DataError(f"{name} of no token is not defined.")
        return self._sums[name]

    @property
    def mean(self) -> Tensor:
        """Mean of each feature, ``(in,)``, float64."""
        return self._get("mean", "moments")

    @property
    def variance(self) -> Tensor:
        """Population variance of each feature over all tokens, ``(in,)``, float64."""
        return self._get("squares", "moments") / self.count

    @property
    def square_sum(self) -> Tensor:
        """Sum of squares of each feature, ``(in,)``, float64; the diagonal of the Gram matrix."""
        if "moments" not in self.kinds and "gram" in self.kinds:
            return self.gram.diagonal().double()
        return self._get("square_sum", "moments")

    @property
    def abs_max(self) -> Tensor:
        """Largest absolute value of each feature, ``(in,)``, float32."""
        return self._get("abs_max", "abs_max")

    @property
    def abs_mean(self) -> Tensor:
        """Mean absolute value of each feature, ``(in,)``, float64."""
        return self._get("abs_sum", "abs_max") / self.count

    @property
    def sequence_sum(self) -> Tensor:
        """Mean over sequences of the sum over their tokens, ``(in,)``, float64."""
        return self._get("sequence_sum", "sequence_sums") / self.sequences

    @property
    def gram(self) -> Tensor:
        """Sum over tokens of x xᵀ, ``(in, in)``, float32."""
        return self._get("gram", "gram")

    @property
    def sample(self) -> Tensor:
        """Tokens drawn uniformly without replacement, ``(rows, in)``, float32."""
        return self._get("sample", "sample")

    def check_finite(self, name: str) -> None:
        """Refuse statistics with infinities or NaN.

        Raises:
            DataError: naming the layer.
        """
        for value in self._sums.values():
            if not bool(torch.isfinite(value).all()):
                raise DataError(
                    f"the input of {name} has values that are not finite on the calibration data; look at "
                    "the data and at the layers before it."
                )
