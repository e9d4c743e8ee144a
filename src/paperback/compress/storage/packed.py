"""Layers whose weights are quantized: `PackedLinear` on a uniform grid, `CodebookLinear` on points.

Both keep a `QuantizedTensor` in packed form: the codes with their bits and no gaps, and the scales. A forward
pass unpacks the weight of this one layer, computes, and forgets it; on a CPU that is slower than a dense
layer, and the memory of the model is the packed one. They stand for convolutions (whose weight is the matrix
(out, in / groups * kernel)) and transformers' Conv1D as well.
"""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paperback.compress.storage.module import LayerForm, StoredLayer, storage_module
from paperback.errors import ArtefactError, DataError
from paperback.networks.surgery import weight_matrix
from paperback.numerics.quantized import (
    Grid,
    Layout,
    Per,
    QuantizedTensor,
    Scaling,
    Scheme,
    check_packed,
    kmeans_points,
    normal_float_points,
    quantile_points,
    quantize_codebook,
    quantize_uniform,
    unpack_bits,
)

KERNEL_GROUPS = (32, 64, 128, 256)  # that torch's int4 kernel takes
PARTS = ("codes", "scale", "zero", "points")


class QuantizedLayer(StoredLayer):
    """A layer whose weight is a `QuantizedTensor`, packed. Made by `from_quantized` or `from_dense`."""

    codes: Tensor
    scale: Tensor | None
    zero: Tensor | None
    points: Tensor | None

    def __init__(self, form: LayerForm, bias: Tensor | None, parts: dict[str, Tensor], spec: dict[str, Any]):
        """Only for `from_quantized` and `empty`: the layer, and what `pack` and `spec` of the weight gave."""
        super().__init__(form, bias)
        for name in PARTS:
            self.register_buffer(name, parts.get(name))
        self._tensor_spec = spec

    @classmethod
    def from_quantized(cls, layer: nn.Module, quantized: QuantizedTensor) -> Self:
        """The layer with a weight that was quantized already, by whatever method.

        Args:
            layer: the dense layer; its bias is kept, its weight is not looked at.
            quantized: of the shape (out, in) of the weight as a matrix.

        Raises:
            DataError: if the shapes differ, or there are more than 8 bits.
        """
        form = LayerForm.of(layer)
        if quantized.layout.shape != form.shape:
            raise DataError(
                f"the quantized weight has shape {quantized.layout.shape}, the layer {form.shape}."
            )
        bias = getattr(layer, "bias", None)
        return cls(form, bias, quantized.pack(), quantized.spec())

    @classmethod
    def empty(cls, spec: dict[str, Any]) -> Self:
        """A module with buffers of the right shapes and any contents."""
        form, tensor = LayerForm.read(spec.get("form")), spec.get("tensor")
        bias = torch.empty(form.shape[0], dtype=_dtype(spec.get("bias_dtype"))) if form.bias else None
        if not isinstance(tensor, dict) or tensor.get("shape") != list(form.shape):
            raise ArtefactError(f"the quantized weight does not have the layer's shape {form.shape}.")
        return cls(form, bias, QuantizedTensor.empty(tensor), tensor)

    def spec(self) -> dict[str, Any]:
        """Form, bits, layout and types as JSON values."""
        kept = {"scale_dtype": self.scale, "points_dtype": self.points}
        types = {name: None if part is None else str(part.dtype)[6:] for name, part in kept.items()}
        bias = None if self.bias is None else str(self.bias.dtype)[6:]
        return {"form": self.form.spec(), "tensor": self._tensor_spec | types, "bias_dtype": bias}

    def parts(self) -> dict[str, Tensor]:
        """The packed tensors by name."""
        return {name: part for name in PARTS if (part := getattr(self, name)) is not None}

    def quantized(self) -> QuantizedTensor:
        """The weight, unpacked but not yet computed."""
        return QuantizedTensor.unpack(self.parts(), self.spec()["tensor"], check=False)

    def dense(self) -> Float[Tensor, "out in"]:
        """The weight as a matrix, in the type of the layer that was quantized."""
        return self.quantized().dequantize()

    def check(self) -> None:
        """Refuse codes beyond the last level, and scales that are not finite."""
        super().check()
        check_packed(self.parts(), self.spec()["tensor"])

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return int(self._tensor_spec["bits"])

    def extra_repr(self) -> str:
        """Adds bits and grouping."""
        spec = self._tensor_spec
        size = "" if spec["size"] is None else f" of {spec['size']}"
        return f"{super().extra_repr()}, bits={spec['bits']}, {spec['scheme']} per {spec['per']}{size}"


@storage_module
class PackedLinear(QuantizedLayer):
    """A layer with weights of 1 to 8 bits on uniform grids, one for each row or group of inputs."""

    kind = "packed"
    _kernel: tuple[Tensor, Tensor] | None = None

    @classmethod
    def from_dense(
        cls,
        layer: nn.Module,
        bits: int = 4,
        size: int | None = 128,
        scheme: Scheme = "affine",
        *,
        per: Per | None = None,
        clip: float | Literal["mse"] = 1.0,
        scale_dtype: torch.dtype = torch.float16,
    ) -> Self:
        """Round a layer's weight to the nearest values of its grids.

        Args:
            layer: Linear, Conv1d, Conv2d or transformers' Conv1D.
            bits: 1 to 8.
            size: inputs that share a grid; None for whole rows.
            scheme: see `paperback.numerics.quantized`.
            per: another grouping, see `Layout`; by default "group", or "channel" without a size.
            clip: share of the range that is covered, or "mse" for the best.
            scale_dtype: of the scales in memory and in files.

        Raises:
            DataError: if the layer has no stored form, an argument is out of range, or a weight is not
                finite.
        """
        per = per or ("channel" if size is None else "group")
        quantized = quantize_uniform(
            weight_matrix(layer), bits, per, size, scheme, clip=clip, scale_dtype=scale_dtype
        )
        return cls.from_quantized(layer, quantized)

    def prepare(self, how: Literal["dense", "kernel"] | None = "dense") -> bool:
        """As of `StoredLayer`; the kernel is torch's for 4 bits on the CPU, with sums in another order.

        It takes Linear and Conv1D in bfloat16 with 4 bits in groups of 32, 64, 128 or 256 inputs that divide
        them, and a multiple of 16 outputs. In float32 torch's kernel is slower than unpacking.
        """
        self._kernel = _int4_kernel(self.quantized()) if how == "kernel" and self._has_kernel() else None
        return super().prepare(None if how == "kernel" else how) or self._kernel is not None

    def forward(self, x: Tensor) -> Tensor:
        """What the dense layer would give, by the kernel if it was prepared."""
        if self._kernel is None or x.dtype != torch.bfloat16 or (torch.is_grad_enabled() and x.requires_grad):
            return super().forward(x)
        codes, scale_and_zero = self._kernel
        flat = x.reshape(-1, x.shape[-1])
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, codes, self._tensor_spec["size"], scale_and_zero)
        y = y.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias

    def _has_kernel(self) -> bool:
        spec, (out, inputs) = self._tensor_spec, self.form.shape
        right = (
            spec["dtype"] == "bfloat16"
            and spec["bits"] == 4
            and spec["per"] == "group"
            and spec["size"] in KERNEL_GROUPS
        )
        fits = (
            self.form.type in ("linear", "transposed")
            and out % 16 == 0
            and right
            and inputs % spec["size"] == 0
        )
        return fits and self.codes.device.type == "cpu"


@storage_module
class CodebookLinear(QuantizedLayer):
    """A layer whose weights are, up to a scale, the points of a codebook."""

    kind = "codebook"

    @classmethod
    def from_dense(
        cls,
        layer: nn.Module,
        points: Tensor | Literal["normal-float", "quantile", "kmeans"] = "normal-float",
        bits: int = 4,
        size: int | None = 64,
        scaling: Scaling | None = None,
        *,
        per: Per | None = None,
        scale_dtype: torch.dtype = torch.float16,
    ) -> Self:
        """Round a layer's weight to the nearest points.

        Args:
            layer: Linear, Conv1d, Conv2d or transformers' Conv1D.
            points: sorted, in the range of the scaled weights; or "normal-float" (quantiles of the normal
                distribution, scaling "absmax"), "quantile" (of these weights, "linear"), "kmeans" (smallest
                squared error, one codebook without scales, "none").
            bits: 2^bits points are made; not used when they are given.
            size: consecutive weights that share a scale; None for all of them.
            scaling: see `quantize_codebook`; by default the one that goes with the points, "linear" for given
                ones.
            per: another grouping, see `Layout`; by default "bucket", or "tensor" without a size.
            scale_dtype: of the scales in memory and in files.

        Raises:
            DataError: if the layer has no stored form, an argument is out of range, or a weight is not
                finite.
        """
        matrix = weight_matrix(layer)
        usual: dict[str, Scaling] = {"normal-float": "absmax", "quantile": "linear", "kmeans": "none"}
        if isinstance(points, str):
            if points not in usual or not 1 <= bits <= 8:
                raise DataError(
                    f"points={points!r} with bits={bits!r}: give one of {', '.join(usual)}, 1 to 8 bits."
                )
            scaling = scaling or usual[points]
            if points == "kmeans":
                points, size, per = kmeans_points(matrix, 2**bits), None, "tensor"
            else:
                points = (
                    quantile_points(matrix, 2**bits) if points == "quantile" else normal_float_points(bits)
                )
        per = per or ("tensor" if size is None else "bucket")
        quantized = quantize_codebook(matrix, points, per, size, scaling or "linear", scale_dtype=scale_dtype)
        return cls.from_quantized(layer, quantized)


@storage_module
class PackedEmbedding(PackedLinear):
    """An embedding with packed rows; a forward pass unpacks the rows that are asked for, not the table."""

    kind = "packed-embedding"

    @classmethod
    def from_quantized(cls, layer: nn.Module, quantized: QuantizedTensor) -> Self:
        """As of `PackedLinear`; the rows must end on whole bytes and have scales of their own."""
        form = LayerForm.of(layer)
        per, bits, width = quantized.layout.per, quantized.grid.bits, form.shape[1]
        if form.type != "embedding" or per not in ("channel", "group") or width * bits % 8:
            raise DataError(
                f"a {form.type} of {width} columns with {bits} bits per {per} has no packed rows; "
                "give an Embedding, per='channel' or 'group', and rows of whole bytes."
            )
        return super().from_quantized(layer, quantized)

    def forward(self, x: Tensor) -> Tensor:
        """The rows of these tokens."""
        rows, where = x.reshape(-1).unique(return_inverse=True)
        return self._rows(rows)[where].reshape(*x.shape, self.form.shape[1])

    def _rows(self, rows: Tensor) -> Tensor:
        spec, (tokens, width) = self.spec()["tensor"], self.form.shape
        layout = Layout((len(rows), width), spec["per"], spec["size"])
        codes = unpack_bits(self.codes.view(tokens, -1)[rows].reshape(-1), self.bits, len(rows) * width)
        scale, zero = self.scale, self.zero
        if zero is not None and spec["scheme"] == "affine":
            zero = unpack_bits(zero, self.bits, Layout((tokens, width), spec["per"], spec["size"]).groups)
        scale, zero = (None if v is None else v.view(tokens, -1)[rows].reshape(-1) for v in (scale, zero))
        grid = Grid(self.bits, spec["scheme"], scale, zero)
        return QuantizedTensor(codes.view(layout.shape), grid, layout, self._dense_dtype()).dequantize()

    def _dense_dtype(self) -> torch.dtype:
        return _dtype(self._tensor_spec["dtype"])


def _int4_kernel(quantized: QuantizedTensor) -> tuple[Tensor, Tensor]:
    """The weight as torch's kernel wants it: its value is scale (q - 8) + zero, zero a float."""
    grid, (out, inputs) = quantized.grid, quantized.layout.shape
    assert grid.scale is not None
    scale = grid.scale.float()
    if grid.scheme == "linear":
        assert grid.zero is not None
        zero = grid.zero.float() + 8 * scale
    else:  # scale (q - z): z is kept for affine, 7 for absmax
        zero = scale * (8 - (7 if grid.zero is None else grid.zero.float()))
    codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(quantized.codes.int(), 1)
    pairs = torch.stack([scale, zero], dim=-1).view(out, inputs // quantized.layout.width, 2)
    return codes, pairs.transpose(0, 1).to(torch.bfloat16).contiguous()


def _dtype(name: Any) -> torch.dtype:
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ArtefactError(f"{name!r} is not a floating-point type.")
    return dtype
