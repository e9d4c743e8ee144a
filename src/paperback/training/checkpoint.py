"""The checkpoint of a training: tensors in one safetensors file, everything else in checkpoint.json.

The tensors are written first, under a name of their own; checkpoint.json, which names the file and its
SHA-256, takes effect by one rename, and only then is the older file removed. A kill at any moment leaves the
older or the newer checkpoint, never a mixture.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from paperback.errors import ArtefactError
from paperback.training.history import History
from paperback.training.task import State, Task

FORMAT = 1
INDEX = "checkpoint.json"
PATTERN = "epoch-*.safetensors"


def fingerprint(task: Task) -> dict[str, Any]:
    """What must agree for a checkpoint to be of this training: settings, number of processes, data."""
    data = hashlib.sha256()
    for tensor in (*task.rows, *task.val_rows):
        data.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        data.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    facts = task.settings.facts() | {"processes": task.accelerator.num_processes, "data": data.hexdigest()}
    compared: dict[str, Any] = json.loads(json.dumps(facts))  # as they come back from the file
    return compared


def save(task: Task, state: State, folder: Path) -> None:
    """Write the checkpoint of a training; only the main process does.

    Args:
        task: the training.
        state: its state after an epoch.
        folder: where the checkpoint is kept.
    """
    if not task.accelerator.is_main_process:
        return
    tensors = {f"last.{name}": tensor for name, tensor in state.last.items()}
    if state.best is not state.last:
        tensors |= {f"best.{name}": tensor for name, tensor in state.best.items()}
    slots: list[tuple[int, str, Any]] = []
    for place, slot in task.optimizer.state_dict()["state"].items():
        for name, value in slot.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{place}.{name}"] = value
            else:
                slots.append((place, name, value))
    facts = {
        "training": task.fingerprint,
        "history": asdict(state.history),
        "best_metric": state.best_metric,
        "best_is_last": state.best is state.last,
        "finished": state.finished,
        "optimizer": slots,
        "scaler": task.accelerator.scaler.state_dict() if task.accelerator.scaler is not None else None,
    }
    write(folder, state.epoch, tensors, facts)


def resume(task: Task, folder: Path) -> State | None:
    """Put model and optimizer where the checkpoint in a folder has them.

    Args:
        task: the training.
        folder: where the checkpoint is kept.

    Returns:
        The state after the checkpoint's last epoch, or None if there is no checkpoint.

    Raises:
        ArtefactError: if the checkpoint is damaged, or is of another training.
    """
    found = read(folder)
    if found is None:
        return None
    tensors, facts = found
    theirs = facts["training"]
    for name, value in task.fingerprint.items():
        if theirs.get(name) != value:
            raise ArtefactError(
                f"the checkpoint in {folder} is of another training: {name} is {theirs.get(name)} "
                f"there, {value} here; give another folder, or remove that one."
            )
    last = _part(tensors, "last.")
    own = task.core.state_dict()
    if {n: t.shape for n, t in own.items()} != {n: t.shape for n, t in last.items()}:
        raise ArtefactError(
            f"the checkpoint in {folder} is of another model; give another folder, or remove that one."
        )
    task.core.load_state_dict(last)
    slots: dict[int, dict[str, Any]] = {}
    for key, value in _part(tensors, "optimizer.").items():
        place, _, name = key.partition(".")
        slots.setdefault(int(place), {})[name] = value
    for place, name, value in facts["optimizer"]:
        slots.setdefault(place, {})[name] = value
    groups = task.optimizer.state_dict()["param_groups"]
    task.optimizer.load_state_dict({"state": slots, "param_groups": groups})
    if task.accelerator.scaler is not None:
        task.accelerator.scaler.load_state_dict(facts["scaler"])
    best = last if facts["best_is_last"] else _part(tensors, "best.")
    history = History(**facts["history"])
    return State(history, last, best, facts["best_metric"], facts["finished"])


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose name begins so, without the beginning."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


# -- files -------------------------------------------------------------------


def write(folder: Path, epoch: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Replace the checkpoint in a folder.

    Args:
        folder: the folder; it is made when it is not there.
        epoch: number of finished epochs, larger than that of the checkpoint before.
        tensors: no two of them share memory.
        facts: JSON values.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = PATTERN.replace("*", f"{epoch:06d}")
    temporary = folder / f".{name}.tmp"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary)
    digest = _digest(temporary)
    os.replace(temporary, folder / name)
    index = {
        "format": FORMAT,
        "file": name,
        "sha256": digest,
        "facts_sha256": _facts_digest(facts),
        "facts": facts,
    }
    temporary = folder / f".{INDEX}.tmp"
    temporary.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, folder / INDEX)
    for path in [
        *folder.glob(PATTERN),
        *folder.glob(".*.tmp"),
    ]:  # the one before, and what kills have left behind
        if path.name != name:
            path.unlink()


def read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The checkpoint in a folder.

    Args:
        folder: the folder.

    Returns:
        Tensors (on the CPU) and facts, or None if there is no checkpoint.

    Raises:
        ArtefactError: if the checkpoint is damaged or of another format.
    """
    index = _index(folder)
    if index is None:
        return None
    path = folder / index["file"]
    try:
        if _digest(path) != index["sha256"]:
            raise ArtefactError(f"{path} is damaged: its SHA-256 is not that in {INDEX}; {_remedy(folder)}.")
        return load_file(path), index["facts"]
    except (OSError, SafetensorError) as error:
        raise ArtefactError(f"{path} cannot be read ({error}); {_remedy(folder)}.") from error


def _index(folder: Path) -> dict[str, Any] | None:
    """checkpoint.json, checked, or None if there is none."""
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ArtefactError(f"{path} is damaged ({error}); {_remedy(folder)}.") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise ArtefactError(f"{path} is not a checkpoint of format {FORMAT}; {_remedy(folder)}.")
    name, digest = index.get("file"), index.get("sha256")
    if not (isinstance(name, str) and Path(name).match(PATTERN) and Path(name).name == name and digest):
        raise ArtefactError(f"{path} is damaged: it names no file of tensors; {_remedy(folder)}.")
    if index.get("facts_sha256") != _facts_digest(index.get("facts")):
        raise ArtefactError(f"{path} is damaged: its facts are not as they were written; {_remedy(folder)}.")
    return index


def _remedy(folder: Path) -> str:
    return f"remove the folder {folder} to train from the beginning"


def _facts_digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
