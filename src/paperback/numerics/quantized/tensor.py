"""Tensors as codes and their grid: made, packed, and read back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from paperback.errors import ArtefactError, DataError
from paperback.numerics.quantized.grid import (
    Grid,
    Scaling,
    Scheme,
    checked,
    stored,
    uniform_grid,
    width_or_one,
)
from paperback.numerics.quantized.layout import Layout, Per
from paperback.numerics.quantized.packing import MOST_BITS, pack_bits, packed_size, unpack_bits

DTYPES = {str(dtype)[6:]: dtype for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}


@dataclass(frozen=True)
class QuantizedTensor:
    """A tensor as codes and their grid.

    Attributes:
        codes: of the tensor's shape, unsigned.
        grid: what they stand for.
        layout: which entries share which line of the grid.
        dtype: of the tensor that was quantized, and of what `dequantize` returns.
    """

    codes: Tensor
    grid: Grid
    layout: Layout
    dtype: torch.dtype = torch.float32

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor, computed in float32 (or float64), returned in `dtype`, by default its own."""
        dtype = dtype or self.dtype
        computing = dtype if dtype == torch.float64 else torch.float32
        return self.layout.merge(self.grid.decode(self.layout.split(self.codes), computing)).to(dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of what `pack` returns."""
        tensors = (
            self.grid.scale,
            None if self.grid.scheme == "affine" else self.grid.zero,
            self.grid.points,
        )
        size = packed_size(self.codes.numel(), self.grid.bits)
        size += sum(t.numel() * t.element_size() for t in tensors if t is not None)
        if self.grid.scheme == "affine":
            size += packed_size(self.layout.groups, self.grid.bits)
        return size

    def spec(self) -> dict[str, Any]:
        """What `unpack` must know besides the packed tensors, as JSON values."""
        scale, points = self.grid.scale, self.grid.points
        return {
            "shape": list(self.layout.shape),
            "per": self.layout.per,
            "size": self.layout.size,
            "bits": self.grid.bits,
            "scheme": self.grid.scheme,
            "points": None if points is None else list(points.shape),
            "scale_dtype": None if scale is None else str(scale.dtype)[6:],
            "points_dtype": None if points is None else str(points.dtype)[6:],
            "dtype": str(self.dtype)[6:],
        }

    def pack(self) -> dict[str, Tensor]:
        """The codes with `bits` bits each, and the grid: plain tensors for a file.

        Returns:
            "codes" (uint8, one axis) and, where the grid has them, "scale", "zero" (affine: packed like the
            codes) and "points".

        Raises:
            DataError: if there are more than 8 bits.
        """
        tensors = {"codes": pack_bits(self.codes, self.grid.bits)}
        for name in ("scale", "zero", "points"):
            value = getattr(self.grid, name)
            if value is not None:
                packed = name == "zero" and self.grid.scheme == "affine"
                tensors[name] = pack_bits(value, self.grid.bits) if packed else value
        return tensors

    @staticmethod
    def empty(spec: dict[str, Any]) -> dict[str, Tensor]:
        """Tensors with the names, shapes and types that `pack` gives for this `spec`, with any contents.

        Raises:
            ArtefactError: if the spec is not one of a quantized tensor.
        """
        layout, bits, scheme = _read_spec(spec)
        points = spec["points"]
        tensors = {"codes": torch.empty(packed_size(math.prod(layout.shape), bits), dtype=torch.uint8)}
        if spec["scale_dtype"] is not None:
            tensors["scale"] = torch.empty(layout.groups, dtype=DTYPES[spec["scale_dtype"]])
        if scheme == "linear":
            tensors["zero"] = torch.empty(layout.groups, dtype=DTYPES[spec["scale_dtype"]])
        elif scheme == "affine":
            tensors["zero"] = torch.empty(packed_size(layout.groups, bits), dtype=torch.uint8)
        if points is not None:
            tensors["points"] = torch.empty(tuple(points), dtype=DTYPES[spec["points_dtype"]])
        return tensors

    @staticmethod
    def unpack(tensors: dict[str, Tensor], spec: dict[str, Any], *, check: bool = True) -> QuantizedTensor:
        """The inverse of `pack` and `spec`.

        Args:
            tensors: what `pack` returned.
            spec: what `spec` returned.
            check: look whether shapes, types and ranges are right, as must be done once for what comes from
                a file.

        Returns:
            The quantized tensor.

        Raises:
            ArtefactError: if they do not belong together or hold what no quantized tensor holds.
        """
        if check:
            check_packed(tensors, spec)
        layout, bits, scheme = _read_spec(spec)
        zero = tensors.get("zero")
        if scheme == "affine":
            assert zero is not None
            zero = unpack_bits(zero, bits, layout.groups)
        grid = Grid(bits, scheme, tensors.get("scale"), zero, tensors.get("points"))
        codes = unpack_bits(tensors["codes"], bits, math.prod(layout.shape)).reshape(layout.shape)
        return QuantizedTensor(codes, grid, layout, DTYPES[spec["dtype"]])


def quantize_uniform(
    tensor: Float[Tensor, "..."],
    bits: int = 4,
    per: Per = "tensor",
    size: int | None = None,
    scheme: Scheme = "linear",
    *,
    rounding: Literal["nearest", "stochastic"] = "nearest",
    generator: torch.Generator | None = None,
    clip: float | Literal["mse"] = 1.0,
    scale_dtype: torch.dtype = torch.float32,
    name: str = "the tensor",
) -> QuantizedTensor:
    """Round a tensor to a uniform grid per group (see the module's docstring).

    Args:
        tensor: floating point, of any shape.
        bits: 1 to 8 for what is packed, up to 16 for what is only rounded; 1 needs scheme "linear".
        per: what shares a grid, see `Layout`.
        size: of a group or bucket.
        scheme: "linear" keeps minimum and maximum, "affine" zero as an integer code, "absmax" zero in the
            middle of a symmetric grid.
        rounding: "nearest" or "stochastic" (unbiased).
        generator: of stochastic rounding.
        clip: share of each group's range that the grid covers, above 0 up to 1; "mse" takes for each group
            the one of 1.0, 0.95, ..., 0.3 with the smallest squared error.
        scale_dtype: of the scale, and of the minimum of "linear".
        name: of the tensor, for error messages.

    Returns:
        The quantized tensor, whose `dtype` is that of the tensor.

    Raises:
        DataError: if an argument is out of range, or the tensor holds NaN or infinity.
    """
    layout = Layout(tuple(tensor.shape), per, size)
    groups = layout.split(checked(tensor, name))
    grid = uniform_grid(groups, bits, scheme, clip=clip, scale_dtype=scale_dtype, name=name)
    codes = layout.merge(grid.encode(groups, rounding, generator))
    return QuantizedTensor(codes, grid, layout, tensor.dtype)


def quantize_codebook(
    tensor: Float[Tensor, "..."],
    points: Float[Tensor, " points"] | Float[Tensor, "groups points"],
    per: Per = "tensor",
    size: int | None = None,
    scaling: Scaling = "linear",
    *,
    scale_dtype: torch.dtype = torch.float32,
    name: str = "the tensor",
) -> QuantizedTensor:
    """Round each entry, scaled per group, to the nearest of some points; of two as near, to the lower.

    Args:
        tensor: floating point, of any shape.
        points: 2 to 256, sorted, for all groups or for each one, in the range of the scaled values.
        per: what shares a scale, see `Layout`.
        size: of a group or bucket.
        scaling: "linear": (v - min) / (max - min), in 0 to 1; "absmax": v / max|v|, in -1 to 1; "none".
        scale_dtype: of scale and minimum.
        name: of the tensor, for error messages.

    Returns:
        The quantized tensor; its codes have ceil(log2(number of points)) bits.

    Raises:
        DataError: if the points are not sorted, too many or too few, or a value is not finite.
    """
    layout = Layout(tuple(tensor.shape), per, size)
    groups = layout.split(checked(tensor, name))
    if scaling not in get_args(Scaling):
        raise DataError(f"scaling is {scaling!r}; it must be one of {', '.join(get_args(Scaling))}.")
    count = points.shape[-1] if points.ndim in (1, 2) else 0
    if not 2 <= count <= 2**MOST_BITS or (points.ndim == 2 and len(points) != layout.groups):
        raise DataError(
            f"points have shape {tuple(points.shape)}; give (points,) or ({layout.groups}, points), 2 to 256."
        )
    if not points.isfinite().all() or (points[..., 1:] < points[..., :-1]).any():
        raise DataError("points must be finite and sorted upwards; use torch.sort.")
    scale = zero = None
    if scaling == "linear":
        low, high = groups.aminmax(dim=1)
        scale, zero = stored(width_or_one(high - low), scale_dtype, name), stored(low, scale_dtype, name)
    elif scaling == "absmax":
        scale = stored(width_or_one(groups.abs().amax(1)), scale_dtype, name)
    grid = Grid(max(1, math.ceil(math.log2(count))), scaling, scale, zero, points.detach())
    return QuantizedTensor(layout.merge(grid.encode(groups)), grid, layout, tensor.dtype)


def check_packed(tensors: dict[str, Tensor], spec: dict[str, Any]) -> None:
    """Refuse packed tensors that do not fit their spec. Nothing is allocated by what the spec claims.

    Raises:
        ArtefactError: naming the tensor, what it has and what it should have.
    """
    with torch.device("meta"):
        expected = QuantizedTensor.empty(spec)
    if tensors.keys() != expected.keys():
        raise ArtefactError(
            f"a quantized tensor has the parts {sorted(tensors)} instead of {sorted(expected)}."
        )
    for name, tensor in tensors.items():
        has, wants = (tensor.dtype, tuple(tensor.shape)), (expected[name].dtype, tuple(expected[name].shape))
        if has != wants:
            raise ArtefactError(
                f"the {name} of a quantized tensor are {has[0]} {has[1]}, not {wants[0]} {wants[1]}."
            )
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ArtefactError(f"the {name} of a quantized tensor are not finite.")
    layout, bits, scheme = _read_spec(spec)
    points = spec["points"]
    levels = points[-1] if points is not None else 2**bits - (1 if scheme == "absmax" else 0)
    if levels < 2**bits:
        codes = unpack_bits(tensors["codes"], bits, math.prod(layout.shape))
        if int(codes.max()) >= levels:
            raise ArtefactError(
                f"a quantized tensor has the code {int(codes.max())}, but only {levels} levels."
            )


def _read_spec(spec: dict[str, Any]) -> tuple[Layout, int, Any]:
    """Layout, bits and scheme of a spec that was looked at entry by entry."""
    try:
        layout = Layout(tuple(spec["shape"]), spec["per"], spec["size"])
        bits, scheme, points = spec["bits"], spec["scheme"], spec["points"]
        right = (
            all(isinstance(n, int) and n > 0 for n in layout.shape)
            and isinstance(bits, int)
            and 1 <= bits <= MOST_BITS
            and scheme in get_args(Scheme if points is None else Scaling)
            and (spec["scale_dtype"] in DTYPES if scheme != "none" else spec["scale_dtype"] is None)
            and spec["dtype"] in DTYPES
            and (points is None or spec["points_dtype"] in DTYPES)
            and (points is None or (len(points) in (1, 2) and 2 <= points[-1] <= 2**bits))
            and (points is None or len(points) == 1 or points[0] == layout.groups)
        )
    except (KeyError, TypeError, DataError) as error:
        raise ArtefactError(f"this is not the description of a quantized tensor: {error!r}.") from error
    if not right:
        raise ArtefactError(f"this is not the description of a quantized tensor: {spec}.")
    return layout, bits, scheme
