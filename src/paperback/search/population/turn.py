"""A member's turn: what a worker does with it, and where its state rests between turns.

A turn begins in a new object, which is set up, takes over the state, is reconfigured if the settings have
changed, and makes its steps. So a turn depends on nothing but its arguments, wherever it is made. A state is
bytes (`torch.save`, read with ``weights_only``): nobody shares tensors with anybody, and a member that copies
another needs only its name.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from paperback.errors import ArtefactError, DataError, PaperbackError
from paperback.search.engine import Engine, Outcome, RayEngine, Task
from paperback.search.interface import Trainable
from paperback.search.parameters import Config

Make = Callable[[], Trainable]


@dataclass(frozen=True)
class Turn:
    """One turn of one member.

    Attributes:
        number: of the trial that it is.
        seed: that the trainable is set up with.
        config: the settings of this turn.
        config_of_state: the settings that the state was trained with.
        state: number of the trial whose state it goes on from, None at the beginning.
        steps: how many, >= 1.
    """

    number: int
    seed: int
    config: Config
    config_of_state: Config
    state: int | None
    steps: int


def take(make: Make, turn: Turn, state: bytes | None) -> tuple[Mapping[str, float], bytes]:
    """Make the steps of a turn.

    Args:
        make: gives a new trainable.
        turn: what to do.
        state: what to go on from, None at the beginning.

    Returns:
        What the last step returned, and the state after it.

    Raises:
        ArtefactError: if the state is damaged.
        DataError: if the trainable's state cannot be stored.
    """
    trainable = make()
    trainable.setup(dict(turn.config_of_state), turn.seed)
    if state is not None:
        trainable.load_state_dict(unpack(state))
        if turn.config != turn.config_of_state:
            trainable.reconfigure(dict(turn.config))
    metrics: Mapping[str, float] = {}
    for _ in range(turn.steps):
        metrics = trainable.step()
    return metrics, pack(trainable.state_dict())


def pack(state: Mapping[str, Any]) -> bytes:
    """A state as bytes.

    Raises:
        DataError: if it holds something that could not be read back.
    """
    buffer = io.BytesIO()
    try:
        torch.save(dict(state), buffer)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise DataError(
            f"state_dict holds something that cannot be stored ({error}); use tensors, numbers, text, lists, "
            "tuples and dictionaries."
        ) from error
    content = buffer.getvalue()
    foreign = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(content))
    if foreign:
        raise DataError(
            f"state_dict holds {', '.join(foreign)}; use tensors, numbers, text, lists, tuples and "
            "dictionaries."
        )
    return content


def unpack(content: bytes) -> dict[str, Any]:
    """The state that `pack` made bytes of, on the CPU.

    Raises:
        ArtefactError: if the bytes are damaged.
    """
    try:
        state: dict[str, Any] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise ArtefactError(f"a stored state is damaged ({error}); begin again in another folder.") from error
    return state


class States(Protocol):
    """Where states rest between turns, by the numbers of the trials that they are of."""

    def begin(self, engine: Engine, make: Make, turn: Turn) -> Task:
        """Begin a turn; `finish` is to be called when the engine has it."""

    def finish(self, task: Task, number: int) -> None:
        """Keep the state that a successful turn left."""

    def read(self, number: int) -> dict[str, Any]:
        """The state of a trial."""

    def keep_only(self, numbers: set[int]) -> None:
        """Forget all states but these."""


class Files:
    """States as files of a folder, for engines on this machine: a worker reads and writes them itself.

    Args:
        folder: it is made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()  # processes may have another working directory
        self.folder.mkdir(parents=True, exist_ok=True)
        for unfinished in self.folder.glob(".*.tmp"):
            unfinished.unlink()
        self._kept = {int(path.stem) for path in self.folder.glob("*.pt")}

    def path(self, number: int) -> Path:
        """The file of a trial's state."""
        return self.folder / f"{number:08d}.pt"

    def begin(self, engine: Engine, make: Make, turn: Turn) -> Task:
        """The worker is told where to read and where to write."""
        source = None if turn.state is None else self.path(turn.state)
        return engine.submit(take_in_files, make, turn, source, self.path(turn.number))

    def finish(self, task: Task, number: int) -> None:
        """The worker has written it."""
        self._kept.add(number)

    def write(self, number: int, content: bytes) -> None:
        """Keep a state that was made elsewhere."""
        write_file(self.path(number), content)
        self._kept.add(number)

    def read(self, number: int) -> dict[str, Any]:
        """The state in its file."""
        return unpack(read_file(self.path(number)))

    def keep_only(self, numbers: set[int]) -> None:
        """Remove the files of other states."""
        for number in self._kept - numbers:
            self.path(number).unlink(missing_ok=True)
        self._kept &= numbers


def take_in_files(make: Make, turn: Turn, source: Path | None, target: Path) -> Mapping[str, float]:
    """A turn whose state is read from one file and written to another."""
    metrics, state = take(make, turn, None if source is None else read_file(source))
    write_file(target, state)
    return metrics


def write_file(path: Path, content: bytes) -> None:
    """Write a state's file; a kill on the way leaves none."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def read_file(path: Path) -> bytes:
    """The bytes of a state's file.

    Raises:
        ArtefactError: if there is no such file.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise ArtefactError(f"{path} cannot be read ({error}); begin again in another folder.") from error


class Objects:
    """States in Ray's object store, where a worker leaves them and fetches them by reference.

    They never pass through this process, unless there is a folder that they are also to be written to. They
    belong to this process, so that one outlives the worker that made it.

    Turns are tasks. Measured on two CPUs with 10 members, a turn without any training takes 1.5, 3.6, 21 and
    83 ms with states of 4 kB and 1, 10 and 40 MB, and 0.9, 3.3, 22 and 100 ms if the workers are actors,
    where a worker that was killed would have to be found out and replaced. An actor for each member, with its
    model live, saves packing (26 ms at 40 MB), but needs memory for all models at once.

    Args:
        engine: of Ray.
        make: gives a new trainable; it is sent to the cluster once.
        folder: where a later sitting finds them, None if there will be none.
    """

    def __init__(self, engine: RayEngine, make: Make, folder: Path | None = None) -> None:
        self._engine = engine
        self._make = engine.put(make)
        self._references: dict[int, Any] = {}
        self._files = None if folder is None else Files(folder)

    def begin(self, engine: Engine, make: Make, turn: Turn) -> Task:
        """The worker is given references."""
        state = None if turn.state is None else self._reference(turn.state)
        return self._engine.submit_keeping(take, self._make, turn, state)

    def finish(self, task: Task, number: int) -> None:
        """Note the reference; a state that its node took with it makes the turn a failed one."""
        self._references[number] = task.kept
        if self._files is None:
            return
        try:
            self._files.write(number, self._engine.get(task.kept))
        except PaperbackError as error:
            task.outcome = Outcome(None, str(error), type(error).__name__)

    def read(self, number: int) -> dict[str, Any]:
        """The state, brought here."""
        return unpack(self._engine.get(self._reference(number)))

    def keep_only(self, numbers: set[int]) -> None:
        """Let go of other states, which Ray then frees."""
        for number in self._references.keys() - numbers:
            del self._references[number]
        if self._files is not None:
            self._files.keep_only(numbers)

    def _reference(self, number: int) -> Any:
        if number not in self._references:  # from an earlier sitting
            assert self._files is not None
            self._references[number] = self._engine.put(read_file(self._files.path(number)))
        return self._references[number]
