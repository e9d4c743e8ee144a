"""Entropy coding: symbols and their probabilities to bytes and back, and a container that guards the bytes.

The coders are `constriction`'s, with probabilities of 24 bits of which every symbol gets at least the
smallest. "rans" is a stack: what is pushed last comes out first, so the symbols are pushed backwards.
"arithmetic" (range coding) is a queue. Encoder and decoder must be given bit for bit the same probabilities.

A container is

    magic (4 bytes), version, coder, what else the writer notes, the model's hash, the shape of the data,
    rows in a block, for each block its length and the checksum of its symbols, the blocks,
    checksum of all of it.

Anything that is cut, foreign, damaged or of another model is refused with an `ArtefactError`. The sizes that
a container claims never cost more memory than one block of rows at a time, and a block whose symbols do not
match their checksum ends the reading.
"""

from __future__ import annotations

import hashlib
import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import constriction
import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray

from paperback.errors import ArtefactError, DataError

Coder = Literal["rans", "arithmetic"]

MAGIC = b"PBCR"
VERSION = 1
DIGEST_BYTES = 16
HASH_BYTES = 32
HEAD = struct.Struct(
    f"<4sBBB{HASH_BYTES}sBQII"
)  # magic .. hash, axes of a row, rows, rows in a block, blocks
BLOCK = struct.Struct("<II")  # bytes, CRC-32 of the symbols
MOST_AXES = 8
MOST_ENTRIES_IN_BLOCK = 2**26  # symbols that one block may claim


class Encoder(Protocol):
    """Takes symbols in coding order and gives bytes."""

    def put(self, symbols: Int[np.ndarray, " n"], pmf: Float[np.ndarray, "n states"]) -> None:
        """Take n symbols with a distribution each."""

    def bytes(self) -> bytes:
        """What was put, encoded."""


class RangeEncoder:
    """Arithmetic coding, symbol by symbol, in the order in which they come."""

    def __init__(self) -> None:
        self._coder = constriction.stream.queue.RangeEncoder()

    def put(self, symbols: Int[np.ndarray, " n"], pmf: Float[np.ndarray, "n states"]) -> None:
        """Take n symbols with a distribution each."""
        self._coder.encode(symbols.astype(np.int32), _family(), pmf)

    def bytes(self) -> bytes:
        """What was put, encoded."""
        return _to_bytes(self._coder.get_compressed())


class RansEncoder:
    """Asymmetric numeral systems; `put` must be called with the last symbols first."""

    def __init__(self) -> None:
        self._coder = constriction.stream.stack.AnsCoder()

    def put(self, symbols: Int[np.ndarray, " n"], pmf: Float[np.ndarray, "n states"]) -> None:
        """Take n symbols with a distribution each; they come out before those that were put earlier."""
        self._coder.encode_reverse(symbols.astype(np.int32), _family(), pmf)

    def bytes(self) -> bytes:
        """What was put, encoded."""
        return _to_bytes(self._coder.get_compressed())


class Decoder:
    """Reads the bytes of an encoder, n symbols at a time, in the order in which they were coded.

    Args:
        data: the bytes.
        coder: which coder wrote them.

    Raises:
        ArtefactError: if the bytes cannot be of this coder.
    """

    def __init__(self, data: bytes, coder: Coder) -> None:
        if len(data) % 4:
            raise ArtefactError(
                f"a coded block has {len(data)} bytes, which are not whole words; it is damaged."
            )
        words = np.frombuffer(data, dtype="<u4").astype(np.uint32)
        self._rans = coder == "rans"
        try:
            self._coder = (
                constriction.stream.stack.AnsCoder(words)
                if self._rans
                else constriction.stream.queue.RangeDecoder(words)
            )
        except ValueError as error:
            raise ArtefactError("a coded block cannot be decoded; it is damaged.") from error

    def get(self, pmf: Float[np.ndarray, "n states"]) -> Int[np.ndarray, " n"]:
        """The next n symbols, given a distribution each.

        Raises:
            ArtefactError: if the bytes cannot have been made with these distributions.
        """
        try:
            return self._coder.decode(_family(), pmf)
        except (AssertionError, ValueError) as error:
            raise ArtefactError("a coded block cannot be decoded with this model; it is damaged.") from error

    def finish(self) -> None:
        """Check that nothing is left.

        Raises:
            ArtefactError: if there is.
        """
        whole = self._coder.is_empty() if self._rans else self._coder.maybe_exhausted()
        if not whole:
            raise ArtefactError("a coded block holds more than its symbols; it is damaged.")


def _family() -> constriction.stream.model.Categorical:
    return constriction.stream.model.Categorical(perfect=False)


def _to_bytes(words: NDArray[np.uint32]) -> bytes:
    return words.astype("<u4").tobytes()


def symbols_checksum(symbols: Int[np.ndarray, "rows columns"]) -> int:
    """CRC-32 of decoded symbols, whatever their dtype."""
    return zlib.crc32(np.ascontiguousarray(symbols, dtype="<i4").tobytes())


@dataclass(frozen=True)
class Block:
    """Some rows, coded together.

    Attributes:
        data: the coded bytes.
        checksum: CRC-32 of their symbols, from `symbols_checksum`.
    """

    data: bytes
    checksum: int


@dataclass(frozen=True)
class Container:
    """Coded rows with all that is needed to read them, except the model.

    Attributes:
        coder: which coder wrote the blocks.
        note: a number 0..255 of the writer, such as the order of the symbols.
        model_hash: 32 bytes that name the model.
        n_rows: number of rows.
        event_shape: shape of a row, at most 8 axes.
        block_rows: rows in a block; the last may have fewer.
        blocks: the coded blocks, ceil(n_rows / block_rows) of them.
    """

    coder: Coder
    note: int
    model_hash: bytes
    n_rows: int
    event_shape: tuple[int, ...]
    block_rows: int
    blocks: tuple[Block, ...]

    def rows_of_blocks(self) -> Iterator[tuple[int, Block]]:
        """Number of rows of each block, and the block."""
        for index, block in enumerate(self.blocks):
            yield min(self.block_rows, self.n_rows - index * self.block_rows), block

    def to_bytes(self) -> bytes:
        """The container as bytes, checksum last."""
        head = HEAD.pack(
            MAGIC,
            VERSION,
            get_args(Coder).index(self.coder),
            self.note,
            self.model_hash,
            len(self.event_shape),
            self.n_rows,
            self.block_rows,
            len(self.blocks),
        )
        shape = struct.pack(f"<{len(self.event_shape)}I", *self.event_shape)
        index = b"".join(BLOCK.pack(len(block.data), block.checksum) for block in self.blocks)
        body = b"".join([head, shape, index, *(block.data for block in self.blocks)])
        return body + _digest(body)

    @classmethod
    def from_bytes(cls, data: bytes, model_hash: bytes) -> Container:
        """Read and check a container.

        Args:
            data: what `to_bytes` gave.
            model_hash: of the model that is to decode it.

        Raises:
            DataError: if data is not bytes.
            ArtefactError: if it is cut, foreign, damaged, of another version or of another model.
        """
        if not isinstance(data, bytes | bytearray | memoryview):
            raise DataError(f"expected bytes to decompress, got {type(data).__name__}.")
        data = bytes(data)
        if data[:4] != MAGIC:
            raise ArtefactError("this is not compressed by paperback: it does not begin with PBCR.")
        if len(data) < HEAD.size + DIGEST_BYTES:
            raise ArtefactError(f"the compressed data are cut short after {len(data)} bytes.")
        body, digest = data[:-DIGEST_BYTES], data[-DIGEST_BYTES:]
        if body[4] != VERSION:
            raise ArtefactError(
                f"the compressed data have format {body[4]}; this code reads format {VERSION}."
            )
        if _digest(body) != digest:
            raise ArtefactError(
                "the compressed data are cut short or damaged: their checksum does not match."
            )
        _, _, coder, note, wanted, axes, n_rows, block_rows, n_blocks = HEAD.unpack_from(body)
        if wanted != model_hash:
            raise ArtefactError(
                f"the data were compressed with model {wanted.hex()[:12]}, not with {model_hash.hex()[:12]}; "
                "load that model to decompress them."
            )
        return cls._read_body(body, coder, note, wanted, axes, n_rows, block_rows, n_blocks)

    @classmethod
    def _read_body(
        cls,
        body: bytes,
        coder: int,
        note: int,
        model_hash: bytes,
        axes: int,
        n_rows: int,
        block_rows: int,
        n_blocks: int,
    ) -> Container:
        """The parts after the head. A right checksum alone does not make their numbers fit each other."""
        start = HEAD.size
        blocks_at = start + 4 * axes + BLOCK.size * n_blocks
        if coder >= len(get_args(Coder)) or axes > MOST_AXES or blocks_at > len(body):
            raise ArtefactError("the compressed data have a damaged head.")
        shape = struct.unpack_from(f"<{axes}I", body, start)
        if block_rows < 1 or -(-n_rows // block_rows) != n_blocks:
            raise ArtefactError("the compressed data have a damaged head: rows and blocks do not match.")
        if min(block_rows, n_rows) * math.prod(shape) > MOST_ENTRIES_IN_BLOCK:
            raise ArtefactError("the compressed data have a damaged head: a block is impossibly large.")
        index = [BLOCK.unpack_from(body, start + 4 * axes + i * BLOCK.size) for i in range(n_blocks)]
        if blocks_at + sum(length for length, _ in index) != len(body):
            raise ArtefactError("the compressed data are damaged: their blocks do not fill them.")
        blocks, at = [], blocks_at
        for length, checksum in index:
            blocks.append(Block(body[at : at + length], checksum))
            at += length
        return cls(get_args(Coder)[coder], note, model_hash, n_rows, shape, block_rows, tuple(blocks))


def _digest(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=DIGEST_BYTES).digest()
