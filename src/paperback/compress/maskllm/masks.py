"""N:M masks as pattern numbers: the small thing that is kept for each domain beside one set of weights."""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from paperback.compress import masked
from paperback.compress.maskllm.distribution import check_patterns
from paperback.compress.masks import check_nm, nm_patterns
from paperback.errors import ArtefactError, DataError
from paperback.numerics.quantized import pack_bits, packed_size, unpack_bits


@dataclass(frozen=True, eq=False)
class MaskNM:
    """A mask that keeps N of every M consecutive inputs.

    Attributes:
        codes: the row of `compress.masks.nm_patterns` of each group, ``(out, in / m)``, int16.
        n: weights kept of a group.
        m: weights of a group.
    """

    codes: Int[Tensor, "out groups"]
    n: int
    m: int

    @classmethod
    def of(cls, mask: Bool[Tensor, "out in"], n: int, m: int) -> MaskNM:
        """The pattern numbers of a mask.

        Raises:
            DataError: if it is not N:M, or N:M has more than 1,000 patterns.
        """
        check_patterns(n, m)
        check_nm(mask, n, m)
        # <S_k, mask> is N for the mask's own pattern and less for all others.
        overlap = mask.reshape(-1, m).float() @ nm_patterns(n, m).to(mask.device).T
        return cls(overlap.argmax(-1).view(len(mask), -1).short(), n, m)

    def dense(self) -> Bool[Tensor, "out in"]:
        """The mask, True where a weight stays."""
        patterns = nm_patterns(self.n, self.m).bool().to(self.codes.device)
        return patterns[self.codes.long()].view(len(self.codes), -1)

    @property
    def bits(self) -> int:
        """Bits of a pattern number: 3 for 2:4."""
        return _bits(self.n, self.m)

    def pack(self) -> Tensor:
        """The pattern numbers one after the other, `bits` each, as uint8."""
        places = torch.arange(self.bits, device=self.codes.device)
        digits = (self.codes.reshape(-1, 1).int() >> places) & 1
        return pack_bits(digits.to(torch.uint8).flatten(), 1)

    @classmethod
    def unpack(cls, packed: Tensor, shape: tuple[int, int], n: int, m: int) -> MaskNM:
        """The mask, ``(out, in)``, that `pack` wrote.

        Raises:
            ArtefactError: if the bytes are too few or too many, or hold a number that is no pattern.
        """
        bits, count = _bits(n, m), shape[0] * shape[1] // m
        if packed.dtype != torch.uint8 or packed.numel() != packed_size(count * bits, 1):
            raise ArtefactError(
                f"a packed {n}:{m} mask of shape {shape} has {packed.numel()} bytes, not "
                f"{packed_size(count * bits, 1)}."
            )
        digits = unpack_bits(packed.flatten(), 1, count * bits).view(count, bits).int()
        codes = (digits << torch.arange(bits)).sum(-1)
        if count and int(codes.max()) >= math.comb(m, n):
            raise ArtefactError(f"a packed mask has the pattern {int(codes.max())}, which {n}:{m} lacks.")
        return cls(codes.view(shape[0], -1).short(), n, m)


def apply_masks(model: nn.Module, masks: Mapping[str, MaskNM]) -> nn.Module:
    """Let a dense model compute with N:M masks; its weights are neither changed nor copied.

    `remove_masks` gives the dense model back, another call puts other masks in place of these.

    Args:
        model: the dense model that the masks were learned on, changed in place.
        masks: as of `load_masks`.

    Returns:
        The model.

    Raises:
        DataError: if a mask belongs to no layer or does not fit it.
    """
    return masked.apply_masks(model, {name: mask.dense() for name, mask in masks.items()})


def save_masks(masks: Mapping[str, MaskNM], path: str | Path) -> None:
    """Write masks as a safetensors file of packed pattern numbers.

    Args:
        masks: by name of the layer.
        path: of the file, which is replaced when the new one is whole.

    Raises:
        DataError: if there are no masks.
    """
    if not masks:
        raise DataError("there are no masks to save.")
    path = Path(path)
    tensors = {name: mask.pack().cpu() for name, mask in masks.items()}
    shapes = {
        name: [len(mask.codes), mask.codes.shape[1] * mask.m, mask.n, mask.m] for name, mask in masks.items()
    }
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        save_file(tensors, temporary, metadata={"nm_masks": json.dumps(shapes)})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_masks(path: str | Path) -> dict[str, MaskNM]:
    """Read what `save_masks` wrote.

    Raises:
        ArtefactError: if the file is damaged or holds something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            shapes = json.loads((file.metadata() or {})["nm_masks"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if shapes.keys() != tensors.keys():
            raise ArtefactError(f"{path} does not hold the masks that it lists.")
        masks = {}
        for name, (out, inputs, n, m) in shapes.items():
            check_patterns(n, m)
            if inputs % m:
                raise ArtefactError(f"{path}: {name} cannot be {n}:{m} with {inputs} inputs.")
            masks[name] = MaskNM.unpack(tensors[name], (out, inputs), n, m)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ArtefactError(f"{path} is not a file of N:M masks ({error}).") from error
    return masks


def _bits(n: int, m: int) -> int:
    return max(1, math.ceil(math.log2(math.comb(m, n))))
