"""Masks as bytes. Each mask takes the smallest of three forms:

    bitmap    a bit per weight;
    pattern   for an N:M mask, the number of each block's pattern: log2 C(M, N) bits per M weights;
    entropy   a bit with the probability of being kept: H(density) bits per weight.

The last two are coded by `paperback.numerics.coding`. The layout is magic, version, length of the head, head
(JSON: name, shape, form, lengths and checksums of the pieces), pieces, a digest of all that stands before it.
A piece is coded from a table of at most 2^20 probabilities, and a mask has as many pieces as its shape asks
for, so a head can never claim much more memory than its file has bytes for.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from paperback.compress.masks.choose import MOST_PATTERNS, nm_patterns
from paperback.errors import ArtefactError, DataError
from paperback.numerics.coding import Decoder, RangeEncoder, symbols_checksum

Form = Literal["auto", "bitmap", "entropy"]

MAGIC, VERSION, DIGEST_BYTES = b"PBMK", 1, 16
HEAD = struct.Struct("<4sBI")
TABLE = 2**20  # probabilities: symbols of a piece times the values that each can take
_PATTERNS = ((2, 4), (1, 4), (4, 8), (2, 8), (1, 2), (8, 16))  # what an N:M mask is recognised as
_MOST_AXES = 8


def masks_to_bytes(masks: Mapping[str, Tensor], form: Form = "auto") -> bytes:
    """Write masks down.

    Args:
        masks: name to bool tensor.
        form: "bitmap" or "entropy" to have that one; "auto" for the smallest.

    Returns:
        Bytes for `bytes_to_masks`.

    Raises:
        DataError: if a mask is not bool, or the form does not exist.
    """
    if form not in ("auto", "bitmap", "entropy"):
        raise DataError(f"there is no form {form!r} of a mask; choose 'auto', 'bitmap' or 'entropy'.")
    entries, payload = [], []
    for name, mask in masks.items():
        if mask.dtype != torch.bool:
            raise DataError(f"the mask {name!r} is {mask.dtype}; give torch.bool.")
        bits = mask.detach().cpu().contiguous().numpy()
        entry, pieces = min(_codings(bits, form), key=lambda coding: sum(map(len, coding[1])))
        entries.append({"name": name, "shape": list(bits.shape), **entry, "bytes": [len(p) for p in pieces]})
        payload += pieces
    head = json.dumps(entries, separators=(",", ":")).encode()
    body = b"".join([HEAD.pack(MAGIC, VERSION, len(head)), head, *payload])
    return body + _digest(body)


def bytes_to_masks(data: bytes) -> dict[str, Tensor]:
    """Read masks back.

    Args:
        data: what `masks_to_bytes` gave.

    Returns:
        Name to bool tensor, on the CPU.

    Raises:
        ArtefactError: if the bytes are cut, foreign, damaged, or of a newer version.
    """
    if len(data) < HEAD.size + DIGEST_BYTES or data[:4] != MAGIC:
        raise ArtefactError("these bytes are no masks of paperback: they do not begin with PBMK.")
    _, version, length = HEAD.unpack_from(data)
    body, digest = data[:-DIGEST_BYTES], data[-DIGEST_BYTES:]
    if version != VERSION:
        raise ArtefactError(f"the masks have format {version}; this code reads format {VERSION}.")
    if _digest(body) != digest:
        raise ArtefactError("the masks are cut short or damaged: their checksum does not match.")
    at, masks = HEAD.size + length, {}
    try:
        entries = json.loads(body[HEAD.size : at])
        for entry in entries:
            pieces = []
            for size in entry["bytes"]:
                pieces.append(body[at : at + size])
                at += size
            masks[str(entry["name"])] = torch.from_numpy(_decode(entry, pieces))
    except (KeyError, TypeError, ValueError) as error:
        raise ArtefactError("the masks have a damaged head.") from error
    if at != len(body):
        raise ArtefactError("the masks are damaged: their pieces do not fill them.")
    return masks


def _codings(bits: NDArray[np.bool_], form: Form) -> Iterator[tuple[dict[str, Any], list[bytes]]]:
    """The ways to write one mask: what the head says of it, and its pieces."""
    flat = bits.reshape(-1)
    if form != "entropy":
        yield {"form": "bitmap"}, [np.packbits(flat).tobytes()]
    if form != "bitmap" and flat.size:
        kept = int(flat.sum())
        pieces, sums = _encode(flat.astype(np.int32), _bernoulli(kept, flat.size))
        yield {"form": "entropy", "kept": kept, "sums": sums}, pieces
    if form == "auto":
        for n, m in _PATTERNS:
            if bits.ndim and flat.size and bits.shape[-1] % m == 0 and _is_nm(flat, n, m):
                codes = _pattern_codes(flat.reshape(-1, m), n)
                pieces, sums = _encode(codes, _uniform(n, m))
                yield {"form": "pattern", "nm": [n, m], "sums": sums}, pieces
                break


def _decode(entry: Mapping[str, Any], pieces: list[bytes]) -> NDArray[np.bool_]:
    shape = tuple(entry["shape"])
    if len(shape) > _MOST_AXES or any(type(n) is not int or n < 0 for n in shape):
        raise ArtefactError(f"the mask {entry['name']!r} has an impossible shape.")
    size = math.prod(shape)
    if entry["form"] == "bitmap":
        if len(pieces) != 1 or len(pieces[0]) != -(-size // 8):
            raise ArtefactError(f"the mask {entry['name']!r} does not have a bit for each weight.")
        return np.unpackbits(np.frombuffer(pieces[0], np.uint8), count=size).astype(bool).reshape(shape)
    if entry["form"] == "entropy":
        kept = int(entry["kept"])
        if not 0 <= kept <= size:
            raise ArtefactError(f"the mask {entry['name']!r} keeps an impossible number of weights.")
        symbols = _symbols(entry, pieces, size, _bernoulli(kept, max(size, 1)))
        return symbols.astype(bool).reshape(shape)
    if entry["form"] != "pattern":
        raise ArtefactError(f"the mask {entry['name']!r} has the unknown form {entry['form']!r}.")
    n, m = (int(v) for v in entry["nm"])
    if not 1 <= n <= m or math.comb(m, n) > MOST_PATTERNS or size % m:
        raise ArtefactError(f"the mask {entry['name']!r} has an impossible pattern {n}:{m}.")
    codes = _symbols(entry, pieces, size // m, _uniform(n, m))
    return nm_patterns(n, m).bool().numpy()[codes].reshape(shape)


def _encode(symbols: NDArray[np.int32], pmf: NDArray[np.float64]) -> tuple[list[bytes], list[int]]:
    """Pieces of coded symbols, all with one distribution, and their checksums."""
    pieces, sums = [], []
    most = TABLE // len(pmf)
    for start in range(0, len(symbols), most):
        piece = symbols[start : start + most]
        encoder = RangeEncoder()
        encoder.put(piece, np.broadcast_to(pmf, (len(piece), len(pmf))).copy())
        pieces.append(encoder.bytes())
        sums.append(symbols_checksum(piece))
    return pieces, sums


def _symbols(
    entry: Mapping[str, Any], pieces: list[bytes], count: int, pmf: NDArray[np.float64]
) -> NDArray[np.int32]:
    most = TABLE // len(pmf)
    if len(pieces) != -(-count // most) or len(entry["sums"]) != len(pieces):
        raise ArtefactError(f"the mask {entry['name']!r} does not have the pieces that its shape asks for.")
    parts = []
    for index, piece in enumerate(pieces):
        length = min(most, count - index * most)
        decoder = Decoder(piece, "arithmetic")
        symbols = decoder.get(np.broadcast_to(pmf, (length, len(pmf))).copy())
        if symbols_checksum(symbols) != entry["sums"][index]:
            raise ArtefactError(f"the mask {entry['name']!r} is damaged: a checksum does not match.")
        parts.append(symbols)
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)


def _bernoulli(kept: int, size: int) -> NDArray[np.float64]:
    return np.array([1 - kept / size, kept / size])


def _uniform(n: int, m: int) -> NDArray[np.float64]:
    return np.full(math.comb(m, n), 1 / math.comb(m, n))


def _is_nm(flat: NDArray[np.bool_], n: int, m: int) -> bool:
    return bool((flat.reshape(-1, m).sum(axis=1) == n).all())


def _pattern_codes(blocks: NDArray[np.bool_], n: int) -> NDArray[np.int32]:
    """The row of `nm_patterns` that each block is."""
    m = blocks.shape[1]
    powers = 1 << np.arange(m)
    values = nm_patterns(n, m).numpy().astype(np.int64) @ powers
    order = np.argsort(values)
    return order[np.searchsorted(values[order], blocks @ powers)].astype(np.int32)


def _digest(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=DIGEST_BYTES).digest()
