"""The grid of values that codes stand for, uniform or a codebook, group by group."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from paperback.errors import DataError

Scheme = Literal["linear", "affine", "absmax"]
Scaling = Literal["linear", "absmax", "none"]

SMALLEST_RANGE = 1e-10  # a group whose values differ by less is constant (1802.05668, reference code)
CLIPS = 15  # ratios from 1.0 to 0.3 that the search for the best clipping tries


@dataclass(frozen=True)
class Grid:
    """The values that codes stand for, one line of them per group.

    Attributes:
        bits: 1 to 16.
        scheme: of a uniform grid a `Scheme`; of a codebook (with `points`) a `Scaling`.
        scale: (groups,), the step of a uniform grid, the factor of a codebook; None with scaling "none".
        zero: (groups,): linear: the smallest value; affine: the code of 0, an integer; otherwise None.
        points: (points,) or (groups, points), sorted; None for a uniform grid.
    """

    bits: int
    scheme: Scheme | Scaling
    scale: Tensor | None
    zero: Tensor | None = None
    points: Tensor | None = None

    @property
    def levels(self) -> int:
        """How many codes there are: 0 to levels - 1."""
        if self.points is not None:
            return self.points.shape[-1]
        return 2**self.bits - (1 if self.scheme == "absmax" else 0)

    def encode(
        self,
        values: Float[Tensor, "groups n"],
        rounding: Literal["nearest", "stochastic"] = "nearest",
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Codes of the values, group by group; what lies outside the grid goes to its end.

        Args:
            values: (groups, n).
            rounding: "nearest", or for a uniform grid "stochastic": up with the probability of the fraction,
                so that the mean over draws is the value.
            generator: of the draws; needed for "stochastic".

        Returns:
            (groups, n), uint8 up to 8 bits, int32 above.
        """
        values = _computable(values)
        if self.points is not None:
            return self._nearest_points(values).to(_code_dtype(self.bits))
        assert self.scale is not None
        scale = self.scale.to(values.dtype)[:, None]
        if self.scheme == "linear":
            assert self.zero is not None
            position = (values - self.zero.to(values.dtype)[:, None]) / scale
        else:
            position = values / scale + self._code_of_zero(values.dtype)
        if rounding == "stochastic":
            if generator is None:
                raise DataError("stochastic rounding needs a generator; give a torch.Generator with a seed.")
            noise = torch.rand(
                position.shape, dtype=position.dtype, generator=generator, device=position.device
            )
            position = torch.floor(position + noise)
        elif rounding == "nearest":
            position = torch.round(position)
        else:
            raise DataError(f"rounding is {rounding!r}; it must be 'nearest' or 'stochastic'.")
        return position.clamp_(0, self.levels - 1).to(_code_dtype(self.bits))

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values (groups, n) that codes (groups, n) stand for."""
        if self.points is not None:
            points = self.points.to(dtype)
            index = codes.long()
            values = points[index] if points.ndim == 1 else points.gather(1, index)
        else:  # in place from here on: this is what a forward pass of packed layers spends its time on
            values = codes.to(dtype)
            if self.scheme != "linear":
                values -= self._code_of_zero(dtype)
        if self.scale is not None:
            values *= self.scale.to(dtype)[:, None]
        if self.scheme == "linear":
            assert self.zero is not None
            values += self.zero.to(dtype)[:, None]
        return values

    def round(self, values: Float[Tensor, "groups n"]) -> Float[Tensor, "groups n"]:
        """Each value replaced by the nearest one of its grid."""
        values = _computable(values)
        return self.decode(self.encode(values), values.dtype)

    def at(self, groups: Any) -> Grid:
        """The grid of some groups, by index, slice or mask, as GPTQ needs it column by column."""
        shared = self.points is None or self.points.ndim == 1
        return replace(
            self,
            scale=None if self.scale is None else self.scale[groups],
            zero=None if self.zero is None else self.zero[groups],
            points=self.points if shared else self.points[groups],  # type: ignore[index]
        )

    def _code_of_zero(self, dtype: torch.dtype) -> Tensor | int:
        return 2 ** (self.bits - 1) - 1 if self.zero is None else self.zero.to(dtype)[:, None]

    def _nearest_points(self, values: Tensor) -> Tensor:
        """Index of the nearest point; of two as near, the lower (1802.05668, section 2.2)."""
        assert self.points is not None
        if self.scheme == "linear":
            assert self.zero is not None
            values = values - self.zero.to(values.dtype)[:, None]
        if self.scale is not None:
            values = values / self.scale.to(values.dtype)[:, None]
        points = self.points.to(values.dtype)
        middles = ((points[..., 1:] + points[..., :-1]) / 2).contiguous()
        return torch.searchsorted(middles, values.contiguous())


def uniform_grid(
    groups: Float[Tensor, "groups width"],
    bits: int,
    scheme: Scheme = "affine",
    *,
    clip: float | Literal["mse"] = 1.0,
    scale_dtype: torch.dtype = torch.float32,
    name: str = "the tensor",
) -> Grid:
    """The uniform grid of each group of values. Arguments and errors are those of `quantize_uniform`."""
    if scheme not in get_args(Scheme):
        raise DataError(f"scheme is {scheme!r}; it must be one of {', '.join(get_args(Scheme))}.")
    if not isinstance(bits, int) or not 1 <= bits <= 16 or (bits == 1 and scheme != "linear"):
        raise DataError(f"bits is {bits!r}; it must be 1 to 16, and 1 only with scheme 'linear'.")
    groups = _computable(groups)
    if clip == "mse":
        return _best_clip(groups, bits, scheme, scale_dtype, name)
    if isinstance(clip, str) or not 0 < clip <= 1:
        raise DataError(f"clip is {clip!r}; it must be above 0 and at most 1, or 'mse'.")
    if scheme == "absmax":
        top = groups.abs().amax(1) * clip
        return Grid(bits, scheme, stored(width_or_one(top) / (2 ** (bits - 1) - 1), scale_dtype, name))
    low, high = (bound * clip for bound in groups.aminmax(dim=1))
    if scheme == "affine":
        low, high = low.clamp(max=0), high.clamp(min=0)
    scale = stored(width_or_one(high - low) / (2**bits - 1), scale_dtype, name)
    if scheme == "linear":
        return Grid(bits, scheme, scale, stored(low, scale_dtype, name))
    code_of_zero = (-low / scale.to(low.dtype)).round().clamp(0, 2**bits - 1)
    return Grid(bits, scheme, scale, code_of_zero.to(_code_dtype(bits)))


def _best_clip(groups: Tensor, bits: int, scheme: Scheme, scale_dtype: torch.dtype, name: str) -> Grid:
    """For each group the clipping with the smallest squared error; of two as good, the wider."""
    best = uniform_grid(groups, bits, scheme, scale_dtype=scale_dtype, name=name)
    assert best.scale is not None
    least = (best.round(groups) - groups).square().sum(1)
    for clip in torch.linspace(1.0, 0.3, CLIPS).tolist()[1:]:
        grid = uniform_grid(groups, bits, scheme, clip=clip, scale_dtype=scale_dtype, name=name)
        error = (grid.round(groups) - groups).square().sum(1)
        better = error < least
        least = torch.where(better, error, least)
        scale = torch.where(better, grid.scale, best.scale)  # type: ignore[arg-type]
        zero = None if best.zero is None else torch.where(better, grid.zero, best.zero)  # type: ignore[arg-type]
        best = Grid(bits, scheme, scale, zero)
    return best


def stored(value: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """A scale or an offset in the precision in which it is kept: the codes are made for what is kept."""
    info = torch.finfo(dtype)
    if value.abs().max() > info.max:
        raise DataError(
            f"{name} has a range of {float(value.abs().max()):g}, too large for {dtype}; use float32."
        )
    smallest = info.smallest_normal * info.eps
    return torch.where((value > 0) & (value < smallest), smallest, value).to(dtype)


def width_or_one(width: Tensor) -> Tensor:
    """The width of a group, or 1 where the group is constant."""
    return torch.where(width < SMALLEST_RANGE, 1.0, width)


def checked(tensor: Tensor, name: str) -> Tensor:
    if not tensor.is_floating_point():
        raise DataError(f"{name} is {tensor.dtype}; only floating-point tensors are quantized.")
    if not tensor.isfinite().all():
        raise DataError(f"{name} holds NaN or infinity; mend the weights before you quantize them.")
    return _computable(tensor.detach())


def _computable(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _code_dtype(bits: int) -> torch.dtype:
    return torch.uint8 if bits <= 8 else torch.int32
