"""Whole numbers of 1 to 8 bits as a stream of bytes, without gaps."""

from __future__ import annotations

import torch
from jaxtyping import UInt8
from torch import Tensor

from paperback.errors import DataError

MOST_BITS = 8


def pack_bits(codes: Tensor, bits: int) -> UInt8[Tensor, " bytes"]:
    """Codes as a stream of `bits` bits each, without gaps; the first code is in the lowest bits of byte 0.

    Args:
        codes: whole numbers from 0 to 2^bits - 1, of any shape.
        bits: 1 to 8.

    Returns:
        ceil(n * bits / 8) bytes; what is over in the last one is 0.

    Raises:
        DataError: if bits is not 1 to 8, or a code is out of range.
    """
    _check_bits(bits)
    flat = codes.detach().reshape(-1)
    if flat.numel() and (int(flat.max()) >= 2**bits or int(flat.min()) < 0):
        raise DataError(
            f"codes go from {int(flat.min())} to {int(flat.max())}; {bits} bits hold 0 to {2**bits - 1}."
        )
    flat = flat.to(torch.uint8)
    if bits == 8:
        return flat.clone()
    per_word, dtype = _word(bits)
    lines = torch.nn.functional.pad(flat, (0, -len(flat) % per_word)).view(-1, per_word)
    words = torch.zeros(len(lines), dtype=dtype, device=flat.device)
    for position in range(per_word):
        words |= lines[:, position].to(dtype) << (position * bits)
    if dtype == torch.uint8:
        return words
    stream = torch.stack([(words >> (8 * byte)) & 255 for byte in range(bits)], dim=1)
    return stream.to(torch.uint8).reshape(-1)[: packed_size(len(flat), bits)].clone()


def unpack_bits(packed: UInt8[Tensor, " bytes"], bits: int, count: int) -> UInt8[Tensor, " count"]:
    """The inverse of `pack_bits`.

    Args:
        packed: ceil(count * bits / 8) bytes.
        bits: 1 to 8.
        count: of the codes.

    Returns:
        The codes, in one axis.

    Raises:
        DataError: if bits is not 1 to 8, or the number of bytes is another.
    """
    _check_bits(bits)
    if packed.dtype != torch.uint8 or packed.shape != (packed_size(count, bits),):
        raise DataError(
            f"{count} codes of {bits} bits are {packed_size(count, bits)} bytes, "
            f"not {tuple(packed.shape)} of {packed.dtype}."
        )
    if bits == 8:
        return packed.clone()
    per_word, dtype = _word(bits)
    words = packed
    if dtype == torch.int64:
        lines = torch.nn.functional.pad(packed, (0, -len(packed) % bits)).view(-1, bits)
        words = torch.zeros(len(lines), dtype=dtype, device=packed.device)
        for byte in range(bits):
            words |= lines[:, byte].to(dtype) << (8 * byte)
    codes = torch.empty((len(words), per_word), dtype=torch.uint8, device=packed.device)
    for position in range(per_word):
        codes[:, position] = (words >> (position * bits)) & (2**bits - 1)
    return codes.view(-1)[:count]


def packed_size(count: int, bits: int) -> int:
    """Bytes of `count` packed codes."""
    return -(-count * bits // 8)


def _check_bits(bits: int) -> None:
    if not isinstance(bits, int) or not 1 <= bits <= MOST_BITS:
        raise DataError(f"bits is {bits!r}; codes are packed with 1 to {MOST_BITS} bits.")


def _word(bits: int) -> tuple[int, torch.dtype]:
    """How many codes end on the edge of a byte together, and a type that holds them."""
    return (8 // bits, torch.uint8) if 8 % bits == 0 else (8, torch.int64)
