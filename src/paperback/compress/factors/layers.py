"""Layers whose weight is a product of factors: `LowRankLinear` and `MPOLinear`, in floats or in a few bits.

Their factors are parameters, which can be trained on. `quantize` packs them, each in runs of consecutive
entries with one scale; what a file holds are then the packed codes. A forward pass multiplies by the factors
one after the other, and makes the dense weight only where that takes fewer operations.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paperback.compress.factors.tensor_train import (
    balanced_factors,
    contraction_operations,
    core_shapes,
    matrix_operations,
    truncated_svd,
    tt_als,
    tt_apply,
    tt_matrix,
    tt_svd,
)
from paperback.compress.storage.module import CONVOLUTIONS, LayerForm, StoredLayer, storage_module
from paperback.errors import ArtefactError, DataError
from paperback.networks.surgery import weight_matrix
from paperback.numerics.linear_algebra import cholesky
from paperback.numerics.quantized import QuantizedTensor, check_packed, packed_size, quantize_uniform

Forward = Literal["auto", "factors", "dense"]
RUN = {4: 32, 8: 64}  # entries with one float16 scale, by bits
PARTS = ("codes", "scale")
EXPENSE = 4  # seconds of a multiplication in a chain of small products over those in one large product
JITTER = 1e-6  # of the mean diagonal of a Gram matrix
DTYPES = {str(dtype)[6:]: dtype for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}


class FactorLayer(StoredLayer):
    """Base of the two: n factors, as parameters or packed. A subclass says how they make up the weight.

    Args:
        form: the layer that it stands for.
        bias: of that layer.
        factors: the tensors, in order; or their packed form, as `QuantizedTensor.pack` gives it.
        quantized: for packed factors, what `QuantizedTensor.spec` gave.
    """

    trainable: ClassVar[bool] = True
    forward_by: Forward = "auto"

    def __init__(
        self,
        form: LayerForm,
        bias: Tensor | None,
        factors: Sequence[Tensor] | Sequence[dict[str, Tensor]],
        quantized: Sequence[dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(form, bias)
        self._quantized: list[dict[str, Any]] | None = None
        self._count = len(factors)
        if quantized is not None:
            self._set_packed(factors, quantized)  # type: ignore[arg-type]
            return
        for k, factor in enumerate(factors):
            assert isinstance(factor, Tensor)
            self.register_parameter(f"factor_{k}", nn.Parameter(factor.detach().contiguous()))

    # -- what a subclass writes ------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def shapes_of(cls, spec: dict[str, Any], form: LayerForm) -> list[tuple[int, ...]]:
        """The shapes of the factors, from a spec.

        Raises:
            ArtefactError: if the spec is not of this kind.
        """

    @abstractmethod
    def multiply(self, x: Float[Tensor, "batch in"], factors: Sequence[Tensor]) -> Float[Tensor, "batch out"]:
        """The weight times each row of x, factor by factor."""

    @abstractmethod
    def operations(self) -> tuple[int, int]:
        """Multiplications of `multiply` for one row, and of `dense`."""

    @abstractmethod
    def _shape_spec(self) -> dict[str, Any]:
        """What `shapes_of` reads, as JSON values."""

    # -- factors ---------------------------------------------------------------------------------------------

    @property
    def factors(self) -> list[Tensor]:
        """The factors, computed anew if they are packed."""
        if self._quantized is None:
            return [getattr(self, f"factor_{k}") for k in range(self._count)]
        return [
            QuantizedTensor.unpack(self._parts(k), spec, check=False).dequantize()
            for k, spec in enumerate(self._quantized)
        ]

    def numbers_stored(self) -> list[Tensor]:
        """The factors: fewer numbers than the weight has."""
        return self.factors

    @property
    def numbers(self) -> int:
        """How many numbers the factors have."""
        if self._quantized is None:
            return sum(factor.numel() for factor in self.factors)
        return sum(math.prod(spec["shape"]) for spec in self._quantized)

    @torch.no_grad()
    def quantize(self, bits: int) -> None:
        """Pack the factors, in place; they can no longer be trained.

        Args:
            bits: 8 (runs of 64 entries with one scale) or 4 (runs of 32), each scale in float16.

        Raises:
            DataError: for other bits, or if they are packed already.
        """
        if bits not in RUN or self._quantized is not None:
            state = "packed already" if self._quantized is not None else f"to have {bits} bits"
            raise DataError(f"the factors are {state}; quantize takes factors in floats, and 4 or 8 bits.")
        packed = [
            quantize_uniform(
                factor, bits, "bucket", RUN[bits], "absmax", clip="mse", scale_dtype=torch.float16
            )
            for factor in self.factors
        ]
        for k in range(self._count):
            delattr(self, f"factor_{k}")
        self._set_packed([q.pack() for q in packed], [q.spec() for q in packed])

    def _set_packed(self, parts: Sequence[dict[str, Tensor]], specs: Sequence[dict[str, Any]]) -> None:
        for k, tensors in enumerate(parts):
            for name in PARTS:
                self.register_buffer(f"factor_{k}_{name}", tensors[name])
        self._quantized = list(specs)
        self.trainable = False  # type: ignore[misc]  # of this layer alone
        self.prepare(None)

    def _parts(self, k: int) -> dict[str, Tensor]:
        return {name: getattr(self, f"factor_{k}_{name}") for name in PARTS}

    # -- the protocol of storage modules ---------------------------------------------------------------------

    @classmethod
    def empty(cls, spec: dict[str, Any]) -> Self:
        """A module with factors of the right shapes and any contents."""
        form = LayerForm.read(spec.get("form"))
        bias = torch.empty(form.shape[0], dtype=_dtype(spec.get("bias_dtype"))) if form.bias else None
        shapes = cls.shapes_of(spec, form)
        quantized = spec.get("quantized")
        if quantized is None:
            return cls(form, bias, [torch.empty(shape, dtype=_dtype(spec.get("dtype"))) for shape in shapes])
        whole = isinstance(quantized, list) and all(isinstance(entry, dict) for entry in quantized)
        if not whole or [entry.get("shape") for entry in quantized] != [list(shape) for shape in shapes]:
            raise ArtefactError("the packed factors of a layer do not have the shapes that it says.")
        parts = [QuantizedTensor.empty(entry) for entry in quantized]
        if any(set(part) != set(PARTS) for part in parts):
            raise ArtefactError("the packed factors of a layer are not codes and scales.")
        return cls(form, bias, parts, quantized)

    def spec(self) -> dict[str, Any]:
        """Form, shapes and types as JSON values."""
        dtype, quantized = None, None
        if self._quantized is None:
            dtype = str(self.factors[0].dtype)[6:]
        else:
            scales = [getattr(self, f"factor_{k}_scale") for k in range(self._count)]
            quantized = [
                entry | {"scale_dtype": str(scale.dtype)[6:]}
                for entry, scale in zip(self._quantized, scales, strict=True)
            ]
        return {
            "form": self.form.spec(),
            **self._shape_spec(),
            "dtype": dtype,
            "quantized": quantized,
            "bias_dtype": None if self.bias is None else str(self.bias.dtype)[6:],
        }

    def check(self) -> None:
        """Refuse factors that are not finite, and codes beyond the last level."""
        super().check()
        for k, spec in enumerate(self.spec()["quantized"] or []):
            check_packed(self._parts(k), spec)

    def forward(self, x: Tensor) -> Tensor:
        """What the dense layer would give, by the factors or by the dense weight, whatever is less work."""
        if self._ready is not None or not self._by_factors(x):
            return super().forward(x)
        rows = x.reshape(-1, x.shape[-1])
        y = self.multiply(rows, [factor.to(x.dtype) for factor in self.factors])
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], self.out_features)

    def _by_factors(self, x: Tensor) -> bool:
        if self.form.type in CONVOLUTIONS or self.form.type == "embedding" or self.forward_by == "dense":
            return False
        if self.forward_by == "factors":
            return True
        rows = math.prod(x.shape[:-1])
        by_factors, dense = self.operations()
        return rows * by_factors <= dense + rows * math.prod(self.form.shape)

    def extra_repr(self) -> str:
        """Adds the shapes of the factors."""
        packed = "" if self._quantized is None else f", bits={self._quantized[0]['bits']}"
        shapes = " ".join("x".join(map(str, factor.shape)) for factor in self.factors)
        return f"{super().extra_repr()}, factors={shapes}{packed}"


@storage_module
class LowRankLinear(FactorLayer):
    """W = B^T A, A ``(rank, in)``, B ``(rank, out)``: a truncated SVD, plain or in the inputs' metric."""

    kind = "low-rank"

    @classmethod
    def from_dense(
        cls, layer: nn.Module, rank: int, gram: Float[Tensor, "in in"] | None = None, name: str = "weight"
    ) -> Self:
        """The nearest matrix of this rank.

        Args:
            layer: Linear, Conv1d, Conv2d or transformers' Conv1D.
            rank: at least 1; more than the smaller side is cut to it.
            gram: H = sum x x^T of the layer's inputs; the result then minimises tr((W - M) H (W - M)^T) in
                place of ||W - M||^2, by the SVD of W L with H = L L^T.
            name: of the layer, for messages.

        Raises:
            DataError: if the rank is below 1, or a weight is not finite.

        Source: Eckart and Young (1936); with a Gram matrix Chen et al. (2021), DRONE; arXiv 2403.07378.
        """
        weight = _finite(weight_matrix(layer), name)
        if rank < 1:
            raise DataError(f"the rank of {name} is {rank}; it is at least 1.")
        lower = None
        if gram is not None:
            lower = cholesky(gram.double(), f"Gram matrix of {name}", jitter=JITTER).lower
            weight = weight.double() @ lower
        u, s, v = truncated_svd(weight, rank)
        inner, outer = s.sqrt()[:, None] * v, (u * s.sqrt()).T
        if lower is not None:
            inner = torch.linalg.solve_triangular(lower, inner, upper=False, left=False)
        dtype = weight_matrix(layer).dtype
        return cls(LayerForm.of(layer), getattr(layer, "bias", None), [inner.to(dtype), outer.to(dtype)])

    @staticmethod
    def sizes(shape: tuple[int, int], rank: int) -> list[int]:
        """How many numbers each factor has."""
        return [rank * shape[1], rank * shape[0]]

    @classmethod
    def shapes_of(cls, spec: dict[str, Any], form: LayerForm) -> list[tuple[int, ...]]:
        """The shapes of the factors, from a spec."""
        rank = spec.get("rank")
        if not isinstance(rank, int) or not 1 <= rank <= min(form.shape):
            raise ArtefactError(f"a layer of {form.shape} cannot have the rank {rank!r}.")
        return [(rank, form.shape[1]), (rank, form.shape[0])]

    def _shape_spec(self) -> dict[str, Any]:
        return {"rank": self.rank}

    @property
    def rank(self) -> int:
        """Rows of the factors."""
        return self.numbers // sum(self.form.shape)

    def dense(self) -> Float[Tensor, "out in"]:
        """The weight as a matrix."""
        inner, outer = self.factors
        return outer.T @ inner

    def multiply(self, x: Float[Tensor, "batch in"], factors: Sequence[Tensor]) -> Float[Tensor, "batch out"]:
        """Down to the rank, and up."""
        inner, outer = factors
        return (x @ inner.T) @ outer

    def operations(self) -> tuple[int, int]:
        """Multiplications for one row, and of the dense weight."""
        out, inputs = self.form.shape
        return self.rank * (out + inputs), self.rank * out * inputs


@storage_module
class MPOLinear(FactorLayer):
    """A layer whose weight is a matrix product operator; its factors are the cores.

    A weight whose sides have no balanced factors is padded with zeros; what is beyond its sides is cut off.
    """

    kind = "mpo"

    @classmethod
    def from_dense(
        cls,
        layer: nn.Module,
        chi: int | None = None,
        cores: int = 2,
        *,
        eps: float | None = None,
        gram: Float[Tensor, "in in"] | None = None,
        name: str = "weight",
    ) -> Self:
        """Decompose a layer's weight by `tt_svd`.

        Args:
            layer: Linear, Conv1d, Conv2d or transformers' Conv1D.
            chi: largest bond dimension; exact if neither it nor eps is given.
            cores: n; 1 keeps the weight as its only core.
            eps: relative error, see `tt_svd`.
            gram: of the layer's inputs; the cores are then refined in its metric by `tt_als`.
            name: of the layer, for messages.

        Raises:
            DataError: as of `tt_svd` and `tt_als`.
        """
        weight = _finite(weight_matrix(layer), name)
        out_shape, in_shape = (balanced_factors(side, cores) for side in weight.shape)
        missing = math.prod(in_shape) - weight.shape[1]
        weight = nn.functional.pad(weight, (0, missing, 0, math.prod(out_shape) - weight.shape[0]))
        tensors = tt_svd(weight, out_shape, in_shape, chi, eps, name)
        if gram is not None:  # padded inputs are always zero; the ridge of the solver decides their weights
            tensors = tt_als(weight, tensors, nn.functional.pad(gram, (0, missing, 0, missing)), name=name)
        dtype = weight_matrix(layer).dtype
        bias = getattr(layer, "bias", None)
        return cls(LayerForm.of(layer), bias, [tensor.to(dtype) for tensor in tensors])

    @staticmethod
    def sizes(shape: tuple[int, int], chi: int, cores: int) -> list[int]:
        """How many numbers each core has: chi_{k-1} o_k i_k chi_k."""
        out_shape, in_shape = (balanced_factors(side, cores) for side in shape)
        return [math.prod(core) for core in core_shapes(out_shape, in_shape, chi)]

    @classmethod
    def shapes_of(cls, spec: dict[str, Any], form: LayerForm) -> list[tuple[int, ...]]:
        """The shapes of the cores, from a spec."""
        shapes = spec.get("cores")
        try:
            found = [(int(a), int(o), int(i), int(b)) for a, o, i, b in shapes]  # type: ignore[union-attr]
            sides = [math.prod(shape[axis] for shape in found) for axis in (1, 2)]
            chained = [s[0] for s in found] + [1] == [1] + [s[3] for s in found]
            bounded = all(b <= a * o * i for a, o, i, b in found)
            if found and chained and bounded and min(map(min, found)) > 0:
                fits = all(side >= wanted for side, wanted in zip(sides, form.shape, strict=True))
                if fits and math.prod(sides) <= 2 ** len(found) * math.prod(form.shape):
                    return list(found)
        except (TypeError, ValueError):
            pass
        raise ArtefactError(f"a layer of {form.shape} cannot have the cores {shapes!r}.")

    def _shape_spec(self) -> dict[str, Any]:
        return {"cores": [list(shape) for shape in self.core_shapes]}

    @property
    def core_shapes(self) -> list[tuple[int, ...]]:
        """Shapes (chi_{k-1}, o_k, i_k, chi_k)."""
        if self._quantized is not None:
            return [tuple(spec["shape"]) for spec in self._quantized]
        return [tuple(core.shape) for core in self.factors]

    @property
    def bonds(self) -> tuple[int, ...]:
        """chi_1 .. chi_{n-1}."""
        return tuple(shape[3] for shape in self.core_shapes[:-1])

    def dense(self) -> Float[Tensor, "out in"]:
        """The weight as a matrix, without what was padded."""
        return tt_matrix(self.factors)[: self.form.shape[0], : self.form.shape[1]]

    def multiply(self, x: Float[Tensor, "batch in"], factors: Sequence[Tensor]) -> Float[Tensor, "batch out"]:
        """Contract core by core."""
        missing = math.prod(core.shape[2] for core in factors) - x.shape[1]
        x = nn.functional.pad(x, (0, missing)) if missing else x
        return tt_apply(factors, x)[:, : self.form.shape[0]]

    def operations(self) -> tuple[int, int]:
        """Multiplications of a contraction for one row, weighed by their cost, and of the dense weight."""
        return EXPENSE * contraction_operations(self.core_shapes), matrix_operations(self.core_shapes)


def packed_bytes(sizes: Sequence[int], bits: int) -> int:
    """Bytes of factors of these sizes once they are quantized: codes without gaps, and float16 scales."""
    return sum(packed_size(size, bits) + 2 * math.ceil(size / min(RUN[bits], size)) for size in sizes)


def _finite(weight: Tensor, name: str) -> Tensor:
    if not bool(torch.isfinite(weight).all()):
        raise DataError(f"{name} has values that are not finite; mend the model first.")
    return weight if weight.dtype == torch.float64 else weight.float()


def _dtype(name: Any) -> torch.dtype:
    if not isinstance(name, str) or name not in DTYPES:
        raise ArtefactError(f"{name!r} is not a floating-point type.")
    return DTYPES[name]
