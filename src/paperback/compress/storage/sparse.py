"""Layers with many zeros: `SparseLinear` keeps the values that are not zero, and where they stand.

Where they stand is a bitmap, one bit per weight, or, with N values in every M consecutive inputs, the
number of one of the C(M, N) patterns per M weights, in ceil(log2 C(M, N)) bits: 3 bits for 2:4, where a
bitmap has 4. A forward pass builds the dense weight of this one layer and forgets it: the file and the
memory become smaller, the CPU's time does not.
"""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paperback.compress.storage.module import LayerForm, StoredLayer, storage_module
from paperback.compress.storage.packed import _dtype
from paperback.errors import ArtefactError, DataError
from paperback.networks.surgery import find_layers, swap, weight_matrix
from paperback.numerics.quantized import pack_bits, packed_size, unpack_bits

MOST_PATTERNS = 256


@storage_module
class SparseLinear(StoredLayer):
    """A layer that keeps its weights that are not zero. It stands for convolutions as well."""

    kind = "sparse"
    where: Tensor
    values: Tensor

    def __init__(
        self, form: LayerForm, bias: Tensor | None, where: Tensor, values: Tensor, nm: tuple[int, int] | None
    ) -> None:
        """Only for `from_dense` and `empty`."""
        super().__init__(form, bias)
        self.register_buffer("where", where)
        self.register_buffer("values", values)
        self._nm = nm
        self._tables: dict[torch.device, Tensor] = {}

    @classmethod
    def from_dense(cls, layer: nn.Module, nm: tuple[int, int] | None = None) -> Self:
        """Keep what is not zero in a layer's weight, exactly.

        Args:
            layer: Linear, Conv1d, Conv2d, Embedding or transformers' Conv1D, with its zeros.
            nm: (N, M) if every M consecutive inputs have at most N values that are not zero; without it, a
                bitmap.

        Raises:
            DataError: if the layer has no stored form, or its weight is not N:M.
        """
        form, matrix = LayerForm.of(layer), weight_matrix(layer)
        bias = getattr(layer, "bias", None)
        nonzero = matrix != 0
        if nm is None:
            return cls(form, bias, pack_bits(nonzero, 1), matrix[nonzero].clone(), None)
        n, m = _checked_nm(nm, form)
        groups = nonzero.reshape(-1, m)
        most = int(groups.sum(1).max())
        if most > n:
            raise DataError(
                f"the weight has {most} values in {m} consecutive inputs, more than {n}; it is not {n}:{m}."
            )
        # Where fewer than N are not zero, zeros are kept to make N.
        kept = (groups.byte() * 2).argsort(dim=1, descending=True, stable=True)[:, :n].sort(dim=1).values
        code = _codes_of_patterns(n, m, matrix.device)[(1 << kept).sum(1)]
        values = matrix.reshape(-1, m).gather(1, kept).reshape(-1)
        return cls(form, bias, pack_bits(code, _pattern_bits(n, m)), values, (n, m))

    @classmethod
    def empty(cls, spec: dict[str, Any]) -> Self:
        """A module with buffers of the right shapes and any contents."""
        form, dtype, nm = LayerForm.read(spec.get("form")), _dtype(spec.get("dtype")), spec.get("nm")
        size, count = math.prod(form.shape), spec.get("count")
        if nm is None:
            positions = packed_size(size, 1)
            if not isinstance(count, int) or not 0 <= count <= size:
                raise ArtefactError(f"a sparse layer of {size} weights cannot have {count!r} values.")
        else:
            try:
                n, m = _checked_nm(tuple(nm), form)
            except (DataError, TypeError, ValueError) as error:
                raise ArtefactError(f"a sparse layer cannot be {nm!r}: {error}") from error
            positions, count, nm = packed_size(size // m, _pattern_bits(n, m)), size // m * n, (n, m)
        bias = torch.empty(form.shape[0], dtype=_dtype(spec.get("bias_dtype"))) if form.bias else None
        where = torch.empty(positions, dtype=torch.uint8)
        return cls(form, bias, where, torch.empty(count, dtype=dtype), nm)

    def spec(self) -> dict[str, Any]:
        """Form, number of values and N:M as JSON values."""
        return {
            "form": self.form.spec(),
            "nm": None if self._nm is None else list(self._nm),
            "count": self.values.numel(),
            "dtype": str(self.values.dtype)[6:],
            "bias_dtype": None if self.bias is None else str(self.bias.dtype)[6:],
        }

    def dense(self) -> Float[Tensor, "out in"]:
        """The weight with its zeros."""
        out, inputs = self.form.shape
        if self._nm is None:
            mask = unpack_bits(self.where, 1, out * inputs).bool()
            flat = torch.zeros(out * inputs, dtype=self.values.dtype, device=self.values.device)
            return flat.masked_scatter_(mask, self.values).view(out, inputs)
        n, m = self._nm
        groups = out * inputs // m
        codes = unpack_bits(self.where, _pattern_bits(n, m), groups).int()
        weight = torch.zeros((groups, m), dtype=self.values.dtype, device=self.values.device)
        weight.scatter_(1, self._table(n, m)[codes], self.values.view(groups, n))
        return weight.view(out, inputs)

    def check(self) -> None:
        """Refuse a bitmap with another number of ones than there are values, and patterns beyond the last."""
        super().check()
        size = math.prod(self.form.shape)
        if self._nm is None:
            ones = int(unpack_bits(self.where, 1, size).sum())
            if ones != self.values.numel():
                raise ArtefactError(f"a sparse layer has {ones} places for {self.values.numel()} values.")
            return
        n, m = self._nm
        last = int(unpack_bits(self.where, _pattern_bits(n, m), size // m).max())
        if last >= math.comb(m, n):
            raise ArtefactError(f"a sparse layer has the pattern {last}, but {n}:{m} has {math.comb(m, n)}.")

    def extra_repr(self) -> str:
        """Adds the share that is not zero."""
        form = "bitmap" if self._nm is None else f"{self._nm[0]}:{self._nm[1]}"
        return f"{super().extra_repr()}, {form}, values={self.values.numel()}"

    def _table(self, n: int, m: int) -> Tensor:
        device = self.values.device
        if device not in self._tables:
            self._tables[device] = torch.tensor(list(combinations(range(m), n)), device=device)
        return self._tables[device]


def pack_zeros(model: nn.Module) -> nn.Module:
    """Replace, in place, each layer whose zeros are worth it by a `SparseLinear`.

    It is worth it when bitmap and values are smaller than the dense weight. A weight with at most 2 of 4 (4
    of 8, 1 of 4) consecutive inputs not zero is kept as N:M where that is smaller. Weights that several
    layers share stay dense, so that they stay shared.

    Args:
        model: any module.

    Returns:
        The model.
    """
    found = find_layers(model, ignore=())
    shared = set(found.tied.values())
    for name, layer in found.layers.items():
        matrix = weight_matrix(layer)
        dense = matrix.numel() * matrix.element_size()
        values = int(matrix.count_nonzero()) * matrix.element_size()
        if name and name not in shared and values + packed_size(matrix.numel(), 1) < dense:
            swap(
                model, name, min((SparseLinear.from_dense(layer, nm) for nm in _fitting(matrix)), key=_bytes)
            )
    return model


def _bytes(layer: StoredLayer) -> int:
    return layer.nbytes


def _fitting(matrix: Tensor) -> list[tuple[int, int] | None]:
    """A bitmap, and the N:M forms that the weight has."""
    fits: list[tuple[int, int] | None] = [None]
    for n, m in ((2, 4), (4, 8), (1, 4)):
        if matrix.shape[1] % m == 0 and int((matrix != 0).reshape(-1, m).sum(1).max()) <= n:
            fits.append((n, m))
    return fits


def _pattern_bits(n: int, m: int) -> int:
    return max(1, math.ceil(math.log2(math.comb(m, n))))


def _codes_of_patterns(n: int, m: int, device: torch.device) -> Tensor:
    """The number of each pattern, found by its bits as a whole number."""
    codes = torch.zeros(2**m, dtype=torch.uint8, device=device)
    for number, pattern in enumerate(combinations(range(m), n)):
        codes[sum(1 << place for place in pattern)] = number
    return codes


def _checked_nm(nm: tuple[int, ...], form: LayerForm) -> tuple[int, int]:
    n, m = nm
    if not (isinstance(n, int) and isinstance(m, int) and 0 < n < m <= 16) or math.comb(m, n) > MOST_PATTERNS:
        raise DataError(f"{n}:{m} cannot be kept; give 0 < N < M with at most {MOST_PATTERNS} patterns.")
    if form.shape[1] % m:
        raise DataError(f"a layer with {form.shape[1]} inputs cannot be {n}:{m}; {m} must divide the inputs.")
    return n, m
