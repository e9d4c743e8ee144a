"""The trials of a search on disk: appended as they end, readable while it runs, gone on with after a kill.

A store is a folder. ``search.json`` says which search it belongs to; ``trials.jsonl`` has one trial a line,
and a line is written in one piece. What a kill left of a last line is cut off when the search goes on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from paperback.errors import ArtefactError, DataError
from paperback.search.interface import Trial
from paperback.study.encoding import decode, encode, write_atomically

TRIALS, SEARCH = "trials.jsonl", "search.json"


class TrialStore:
    """An append-only list of trials in a folder.

    Args:
        folder: where; it is made.
        facts: what identifies the search (settings, seed, space), plain JSON. A folder that holds a search
            with other facts is refused.

    Raises:
        DataError: if the folder holds another search.
        ArtefactError: if what is in the folder cannot be read.
    """

    def __init__(self, folder: str | Path, facts: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        known = json.loads(json.dumps(facts))
        path = self.folder / SEARCH
        if not path.exists():
            if (self.folder / TRIALS).exists():
                raise ArtefactError(f"{self.folder} has trials but no {SEARCH}; take another folder.")
            write_atomically(path, json.dumps(known, indent=2))
            return
        found = read_facts(self.folder)
        differing = [key for key in {**found, **known} if found.get(key) != known.get(key)]
        if differing:
            key = differing[0]
            raise DataError(
                f"{self.folder} holds a search whose {key} is {found.get(key)!r}, not {known.get(key)!r}; "
                "take another folder."
            )

    def append(self, trial: Trial) -> None:
        """Add a trial; once this returns, a kill of the process does not lose it."""
        line = json.dumps(encode(trial), allow_nan=False) + "\n"
        with (self.folder / TRIALS).open("ab", buffering=0) as file:
            file.write(line.encode())

    def read(self, *, repair: bool = False) -> list[Trial]:
        """The trials in the order in which they ended; an unfinished last line is left out.

        Args:
            repair: also cut it off the file; only whoever writes the store may.

        Raises:
            ArtefactError: if a whole line is not a trial.
        """
        return read_trials(self.folder / TRIALS, repair=repair)


def read_facts(folder: str | Path) -> dict[str, Any]:
    """What identifies the search of a store.

    Args:
        folder: of the store.

    Raises:
        ArtefactError: if there is none, or it cannot be read.
    """
    path = Path(folder) / SEARCH
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{path} cannot be read ({error}); take another folder.") from error
    return facts


def read_trials(path: str | Path, *, repair: bool = False) -> list[Trial]:
    """The trials of a ``trials.jsonl``, also of a search that is running.

    Args:
        path: the file; a search that has no trial yet has none.
        repair: cut off an unfinished last line.

    Raises:
        ArtefactError: if a whole line is not a trial.
    """
    path = Path(path)
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if repair and whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)
    trials = []
    for number, line in enumerate(content[:whole].splitlines(), start=1):
        try:
            value = json.loads(line)
        except ValueError as error:
            raise ArtefactError(f"{path}, line {number}, is not JSON ({error}).") from error
        trials.append(decode(Trial, value, f"{path}, line {number}"))
    return trials
