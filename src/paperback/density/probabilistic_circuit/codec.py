"""Lossless compression with a circuit: each variable is coded with its exact conditional.

Rows are coded in blocks, all rows of a block in step, so that the work is in matrix products and the stream's
fixed cost of 64 bits is shared. With ``block_rows=1`` every row is a stream of its own. rANS needs the last
symbol first, so the encoder keeps the weights of the latents, which are small, and makes the distributions
from them on the way back.

Encoder and decoder must compute equal floating-point numbers. They do on one machine with one version of
torch; elsewhere a difference in the last bit is possible, is found by the checksum of each block, and is
refused: data never come back wrong.

A ``transform`` is a bijection of the data, such as the residuals of a predictor: the circuit is fitted to and
codes what it gives (the paper's section 6 has a neural flow in this place). The checksums are those of the
data themselves, so a decoder with another transform is refused too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import get_args

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from paperback.density.probabilistic_circuit.model import ProbabilisticCircuit
from paperback.density.probabilistic_circuit.node_schedules import NodeCoding
from paperback.density.probabilistic_circuit.nodes import NodeCircuit
from paperback.density.probabilistic_circuit.schedules import (
    SCHEDULES,
    CodingCircuit,
    ScheduleName,
    Steps,
    TreeCoding,
)
from paperback.density.probabilistic_circuit.transforms import Transform, transformed
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
MOST_NUMBERS_AT_ONCE = 2**28  # of 8 bytes


class PCCompressor:
    """Compresses rows of states with a fitted circuit.

    Args:
        pc: the model, over a tree or made of nodes; what it assigns a probability p costs about -log2 p bits.
            It is copied as it is now.
        coder: "rans", or "arithmetic", which writes while it reads and keeps no weights.
        schedule: "dfs", the fastest; "small_to_large", the paper's; "naive", the definition.
        block_rows: rows that share a stream, 1 to 16,384 (fewer for a large model). More rows are faster and
            cost fewer bytes; a block is decoded as a whole.
        transform: the bijection with which the model was fitted, see `transforms`; it keeps the shape.

    Raises:
        DataError: if an argument is out of range.
    """

    def __init__(
        self,
        pc: ProbabilisticCircuit | NodeCircuit,
        coder: Coder = "rans",
        schedule: ScheduleName = "dfs",
        block_rows: int = 256,
        transform: Transform | None = None,
    ) -> None:
        if not isinstance(pc, ProbabilisticCircuit | NodeCircuit):
            raise DataError(
                f"pc is a {type(pc).__name__}; what can be coded is a ProbabilisticCircuit or a NodeCircuit."
            )
        if coder not in get_args(Coder):
            raise DataError(f"coder is {coder!r}; it must be one of {', '.join(get_args(Coder))}.")
        if schedule not in SCHEDULES:
            raise DataError(f"schedule is {schedule!r}; it must be one of {', '.join(SCHEDULES)}.")
        self.pc = pc
        self.coder: Coder = coder
        self.schedule: ScheduleName = schedule
        self.block_rows = block_rows
        self.transform = transform
        self.circuit: CodingCircuit = (
            TreeCoding(pc.tree, pc.parameters_in_logs)
            if isinstance(pc, ProbabilisticCircuit)
            else NodeCoding(pc)
        )
        self.model_hash = model_hash(pc)
        self.most_rows = max(
            1,
            min(
                MOST_ROWS_AT_ONCE,
                MOST_ENTRIES_IN_BLOCK // pc.n_variables,
                MOST_NUMBERS_AT_ONCE // max(self.circuit.width, pc.max_states),
            ),
        )
        if not 1 <= block_rows <= self.most_rows:
            raise DataError(f"block_rows is {block_rows}; it must lie in 1..{self.most_rows}.")

    def compress(self, X: Int[Tensor, " batch *event"]) -> bytes:
        """Rows to bytes.

        Args:
            X: states ``(batch, *event)``, integer; the batch may be empty.

        Returns:
            A container (see `paperback.numerics.coding`) that `decompress` reads.

        Raises:
            DataError: if X does not fit the model, or the transform does not give it back.
        """
        Z = transformed(X, self.transform)
        states, _ = self.pc.check(Z)
        states, original = states.cpu(), X.reshape(len(X), self.pc.n_variables).cpu()
        with _one_thread():
            blocks = tuple(
                self._encode(part, symbols_checksum(rows.numpy()))
                for part, rows in zip(
                    states.split(self.block_rows), original.split(self.block_rows), strict=True
                )
                if len(part)
            )
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
        if container.note >= len(SCHEDULES) or container.block_rows > self.most_rows:
            raise ArtefactError("the compressed data have a damaged head.")
        if int(np.prod(container.event_shape, dtype=np.float64)) != self.pc.n_variables:
            raise ArtefactError(
                f"the compressed rows have shape {container.event_shape}, "
                f"but the model has {self.pc.n_variables} variables."
            )
        schedule = list(SCHEDULES)[container.note]
        with _one_thread():
            parts = [
                self._decode(block, (rows, *container.event_shape), container.coder, schedule)
                for rows, block in container.rows_of_blocks()
            ]
        return torch.cat(parts) if parts else torch.empty(0, *container.event_shape, dtype=torch.int64)

    def rate(self, X: Int[Tensor, " batch *event"]) -> float:
        """Bits per variable, counted on the bytes of `compress`, container and all."""
        if not len(X):
            raise DataError("X has no rows; a rate needs at least one.")
        return 8.0 * len(self.compress(X)) / (len(X) * self.pc.n_variables)

    def _encode(self, states: Int[Tensor, "rows variables"], checksum: int) -> Block:
        visited: list[tuple[int, Tensor]] = []
        arithmetic = RangeEncoder()

        def put(place: int, weight: Tensor) -> Tensor:
            x = states[:, self.circuit.variable(place)]
            if self.coder == "arithmetic":
                arithmetic.put(x.numpy(), self.circuit.pmf(place, weight).numpy())
            else:
                visited.append((place, weight))
            return x

        _walk(self.circuit.steps(self.schedule, len(states)), put)
        if self.coder == "arithmetic":
            return Block(arithmetic.bytes(), checksum)
        stack = RansEncoder()
        while visited:
            place, weight = visited.pop()
            x = states[:, self.circuit.variable(place)]
            stack.put(x.numpy(), self.circuit.pmf(place, weight).numpy())
        return Block(stack.bytes(), checksum)

    def _decode(self, block: Block, shape: tuple[int, ...], coder: Coder, schedule: ScheduleName) -> Tensor:
        source = Decoder(block.data, coder)
        states = torch.zeros(shape[0], self.pc.n_variables, dtype=torch.int64)

        def get(place: int, weight: Tensor) -> Tensor:
            x = torch.from_numpy(source.get(self.circuit.pmf(place, weight).numpy())).long()
            states[:, self.circuit.variable(place)] = x
            return x

        _walk(self.circuit.steps(schedule, shape[0]), get)
        source.finish()
        rows = states.view(shape)
        if self.transform is not None:
            rows = self.transform.inverse(rows).long()
        if symbols_checksum(rows.reshape(states.shape).numpy()) != block.checksum:
            raise ArtefactError(
                "a block does not decode to what was compressed: it is damaged, it was written with another "
                "transform, or this machine computes other probabilities than the one that wrote it."
            )
        return rows


def _walk(steps: Steps, code: Callable[[int, Tensor], Tensor]) -> None:
    """Give `code` each place with its weights, and the schedule the states that it returns."""
    place, weight = next(steps)
    while True:
        x = code(place, weight)
        try:
            place, weight = steps.send(x)
        except StopIteration:
            return


def model_hash(pc: ProbabilisticCircuit | NodeCircuit) -> bytes:
    """32 bytes that name a model: its states, its form and its probabilities."""
    if isinstance(pc, ProbabilisticCircuit):
        form: tuple[object, ...] = (pc.structure, pc.n_states, pc.n_latents)
    else:
        form = ("nodes", pc.n_states, pc.nodes)
    digest = hashlib.sha256(repr(form).encode())
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
