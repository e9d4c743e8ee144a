"""Lossless compression with a circuit: each variable is coded with its exact conditional.

Rows are coded in blocks, all rows of a block in step, so that the work is in matrix products and the stream's
fixed cost of 64 bits is shared. With ``block_rows=1`` every row is a stream of its own. rANS needs the last
symbol first, so the encoder keeps the weights of the latents, which are small, and makes the distributions
from them on the way back.

Encoder and decoder must compute equal floating-point numbers. They do on one machine with one version of
torch; elsewhere a difference in the last bit is possible, is found by the checksum of each block, and is
refused: data never come back wrong.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import get_args

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from paperback.density.probabilistic_circuit.model import ProbabilisticCircuit
from paperback.density.probabilistic_circuit.schedules import SCHEDULES, CodingCircuit, ScheduleName
from paperback.errors import ArtefactError, DataError
from paperback.numerics.coding import (
    MOST_ENTRIES_IN_BLOCK,
    Block,
    Coder,
    Container,
    Decoder,
    RangeEncoder,
    RansEncoder,
    symbols_checksum,
)

MOST_ROWS_AT_ONCE = 2**14


class PCCompressor:
    """Compresses rows of states with a fitted circuit.

    Args:
        pc: the model; what it assigns a probability p costs about -log2 p bits. It is copied as it is now.
        coder: "rans" or "arithmetic".
        schedule: "dfs", the fastest; "small_to_large", the paper's; "naive", the definition.
        block_rows: rows that share a stream, 1 to 16,384. More rows are faster and cost fewer bytes; a block
            is decoded as a whole.

    Raises:
        DataError: if an argument is out of range.
    """

    def __init__(
        self,
        pc: ProbabilisticCircuit,
        coder: Coder = "rans",
        schedule: ScheduleName = "dfs",
        block_rows: int = 256,
    ) -> None:
        if coder not in get_args(Coder):
            raise DataError(f"coder is {coder!r}; it must be one of {', '.join(get_args(Coder))}.")
        if schedule not in SCHEDULES:
            raise DataError(f"schedule is {schedule!r}; it must be one of {', '.join(SCHEDULES)}.")
        largest = min(MOST_ROWS_AT_ONCE, MOST_ENTRIES_IN_BLOCK // pc.n_variables)
        if not 1 <= block_rows <= largest:
            raise DataError(f"block_rows is {block_rows}; it must lie in 1..{largest}.")
        self.pc = pc
        self.coder: Coder = coder
        self.schedule: ScheduleName = schedule
        self.block_rows = block_rows
        self.circuit = CodingCircuit(pc.tree, pc.parameters_in_logs)
        self.model_hash = model_hash(pc)

    def compress(self, X: Int[Tensor, " batch *event"]) -> bytes:
        """Rows to bytes.

        Args:
            X: states ``(batch, *event)``, integer; the batch may be empty.

        Returns:
            A container (see `paperback.numerics.coding`) that `decompress` reads.

        Raises:
            DataError: if X does not fit the model.
        """
        states, _ = self.pc.check(X)
        states = states.cpu()
        with _one_thread():
            blocks = tuple(self._encode(part) for part in states.split(self.block_rows) if len(part))
        return Container(
            coder=self.coder,
            note=list(SCHEDULES).index(self.schedule),
            model_hash=self.model_hash,
            n_rows=len(states),
            event_shape=tuple(X.shape[1:]),
            block_rows=self.block_rows,
            blocks=blocks,
        ).to_bytes()

    def decompress(self, data: bytes) -> Int[Tensor, " batch *event"]:
        """Bytes back to rows.

        Args:
            data: what `compress` of the same model gave; coder, schedule and block size are read from it.

        Returns:
            States int64 of the shape that was compressed.

        Raises:
            ArtefactError: if the bytes are cut, foreign, damaged or of another model.
        """
        container = Container.from_bytes(data, self.model_hash)
        if container.note >= len(SCHEDULES) or container.block_rows > MOST_ROWS_AT_ONCE:
            raise ArtefactError("the compressed data have a damaged head.")
        if int(np.prod(container.event_shape, dtype=np.float64)) != self.pc.n_variables:
            raise ArtefactError(
                f"the compressed rows have shape {container.event_shape}, "
                f"but the model has {self.pc.n_variables} variables."
            )
        schedule = list(SCHEDULES)[container.note]
        with _one_thread():
            parts = [
                self._decode(block, rows, container.coder, schedule)
                for rows, block in container.rows_of_blocks()
            ]
        states = torch.cat(parts) if parts else torch.empty(0, self.pc.n_variables, dtype=torch.int64)
        return states.view(container.n_rows, *container.event_shape)

    def rate(self, X: Int[Tensor, " batch *event"]) -> float:
        """Bits per variable, counted on the bytes of `compress`, container and all."""
        if not len(X):
            raise DataError("X has no rows; a rate needs at least one.")
        return 8.0 * len(self.compress(X)) / (len(X) * self.pc.n_variables)

    def _encode(self, states: Int[Tensor, "rows variables"]) -> Block:
        steps = SCHEDULES[self.schedule](self.circuit, len(states))
        variables = self.circuit.tree.variables
        visited = []
        node, weight = next(steps)
        arithmetic = RangeEncoder() if self.coder == "arithmetic" else None
        while True:
            x = states[:, variables[node]]
            if arithmetic is not None:
                arithmetic.put(x.numpy(), self.circuit.pmf(node, weight).numpy())
            else:
                visited.append((node, weight))
            try:
                node, weight = steps.send(x)
            except StopIteration:
                break
        checksum = symbols_checksum(states.numpy())
        if arithmetic is not None:
            return Block(arithmetic.bytes(), checksum)
        stack = RansEncoder()
        while visited:
            node, weight = visited.pop()
            stack.put(states[:, variables[node]].numpy(), self.circuit.pmf(node, weight).numpy())
        return Block(stack.bytes(), checksum)

    def _decode(self, block: Block, rows: int, coder: Coder, schedule: ScheduleName) -> Tensor:
        source = Decoder(block.data, coder)
        states = torch.zeros(rows, self.pc.n_variables, dtype=torch.int64)
        steps = SCHEDULES[schedule](self.circuit, rows)
        node, weight = next(steps)
        while True:
            x = torch.from_numpy(source.get(self.circuit.pmf(node, weight).numpy())).long()
            states[:, self.circuit.tree.variables[node]] = x
            try:
                node, weight = steps.send(x)
            except StopIteration:
                break
        source.finish()
        if symbols_checksum(states.numpy()) != block.checksum:
            raise ArtefactError(
                "a block does not decode to what was compressed: it is damaged, "
                "or this machine computes other probabilities than the one that wrote it."
            )
        return states


def model_hash(pc: ProbabilisticCircuit) -> bytes:
    """32 bytes that name a model: its states, its tree and its probabilities."""
    digest = hashlib.sha256(repr((pc.structure, pc.n_states, pc.n_latents)).encode())
    for name, value in sorted(pc.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.digest()


@contextmanager
def _one_thread() -> Iterator[None]:
    """The order of a sum must not depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_num_threads(threads)
