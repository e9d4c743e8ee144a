"""Images as discrete states: the range of grey levels in bins of equal width, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from jaxtyping import Float, Int, Shaped
from numpy.typing import NDArray
from torch import Tensor

from paperback.data.discretise.saved import check_kind
from paperback.errors import ArtefactError, DataError


class GreyBins:
    """Grey levels as n states of equal width.

    Whole numbers lo..hi are hi - lo + 1 values of equal right: 0..16 in 4 bins gives 0-4, 5-8, 9-12, 13-16.
    Levels beyond the range that was fitted fall into the outermost bins.

    Args:
        n: number of states, >= 2.

    Attributes:
        n_states: the same number.
        low: smallest level seen in fit.
        high: largest.
        whole: whether the levels were whole numbers.

    Raises:
        DataError: if n < 2.
    """

    def __init__(self, n: int) -> None:
        if n < 2:
            raise DataError(f"GreyBins({n}): n must be at least 2.")
        self.n_states = n
        self.low: float | None = None
        self.high: float | None = None
        self.whole = True

    def fit(self, x: Shaped[Tensor, "*shape"] | NDArray[Any]) -> Self:
        """Find the range of the levels.

        Args:
            x: images of the training part, any shape, integer or floating.

        Returns:
            Itself.

        Raises:
            DataError: if there are no levels, one level only, fewer whole levels than states, or NaN.
        """
        levels = _levels(x)
        low, high = levels.min().item(), levels.max().item()
        whole = not levels.is_floating_point()
        if low == high:
            raise DataError(
                f"every pixel is {low:g}, so there is nothing to model; check that the images were read as "
                "they should."
            )
        if whole and high - low + 1 < self.n_states:
            found = int(high - low + 1)
            raise DataError(
                f"the images have grey levels {low} to {high} only; use GreyBins({found}) or fewer bins."
            )
        self.low, self.high, self.whole = low, high, whole
        return self

    def transform(self, x: Shaped[Tensor, "*shape"] | NDArray[Any]) -> Int[Tensor, "*shape"]:
        """States of the levels.

        Args:
            x: images, any shape.

        Returns:
            Their states, same shape, int64 in 0..n_states-1.

        Raises:
            DataError: if it is not fitted or x has NaN.
        """
        low, high = self._range()
        levels = _levels(x)
        if self.whole and not levels.is_floating_point():
            states = ((levels.long() - int(low)) * self.n_states).div(
                int(high - low) + 1, rounding_mode="floor"
            )
        else:
            span = high - low + (1 if self.whole else 0)
            states = ((levels.double() - low) * (self.n_states / span)).floor()
        return states.clamp(0, self.n_states - 1).long()

    def inverse_transform(self, states: Int[Tensor, "*shape"] | NDArray[Any]) -> Float[Tensor, "*shape"]:
        """The level in the middle of each state's bin.

        Args:
            states: any shape, in 0..n_states-1.

        Returns:
            Levels in the original range, same shape, float32.

        Raises:
            DataError: if it is not fitted or a state is out of range.
        """
        low, high = self._range()
        states = torch.as_tensor(states)
        if states.is_floating_point() or bool(((states < 0) | (states >= self.n_states)).any()):
            raise DataError(
                f"states must be integers in 0..{self.n_states - 1}; these are {states.dtype} from "
                f"{states.min():g} to {states.max():g}."
            )
        edges = torch.arange(self.n_states + 1, dtype=torch.float64) / self.n_states
        if self.whole:
            first = low + torch.ceil(edges * (high - low + 1))  # the first whole level of each bin
            centres = (first[:-1] + first[1:] - 1) / 2
        else:
            edges = low + edges * (high - low)
            centres = (edges[:-1] + edges[1:]) / 2
        return centres.float()[states.long()]

    def to_dict(self) -> dict[str, Any]:
        """Everything that `from_dict` needs, as plain JSON values."""
        low, high = self._range()
        return {"kind": "GreyBins", "n_states": self.n_states, "low": low, "high": high, "whole": self.whole}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Self:
        """Restore what `to_dict` gave.

        Raises:
            ArtefactError: if it is something else.
        """
        check_kind(saved, "GreyBins")
        try:
            bins = cls(int(saved["n_states"]))
            bins.low, bins.high, bins.whole = saved["low"] + 0, saved["high"] + 0, bool(saved["whole"])
        except (KeyError, TypeError, ValueError) as error:
            raise ArtefactError(f"saved GreyBins are damaged ({error!r}); fit them again.") from error
        return bins

    def _range(self) -> tuple[float, float]:
        if self.low is None or self.high is None:
            raise DataError(
                "GreyBins is not fitted yet; call fit with the images of the training part first."
            )
        return self.low, self.high


def _levels(x: Tensor | NDArray[Any]) -> Tensor:
    levels = torch.as_tensor(x)
    if levels.numel() == 0 or levels.is_complex():
        raise DataError(
            f"GreyBins got {levels.dtype} of shape {tuple(levels.shape)}; give at least one image of real "
            "numbers."
        )
    if levels.is_floating_point() and not bool(levels.isfinite().all()):
        raise DataError("the images contain NaN or infinity; replace or remove them.")
    # torch computes little with these types.
    return levels.long() if levels.dtype in (torch.bool, torch.uint16, torch.uint32, torch.uint64) else levels
