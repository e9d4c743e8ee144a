"""The folder of a saved model: `model.safetensors` and `config.json`, written whole, read with suspicion."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

import paperback
from paperback import catalogue
from paperback.errors import ArtefactError

FORMAT = 1  # raised when a folder written by this code can no longer be read by the code before it
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
CARD = "README.md"
BLOCK = "paperback"

CARD_TEMPLATE = """---
{{ card_data }}
---

# A model saved by paperback

`config.json` holds the class and its arguments, `model.safetensors` the weights.

```python
import paperback

model = paperback.load("this folder")
```
"""


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Write a saved model in a temporary folder beside `folder`, which it replaces when it is whole.

    Args:
        folder: where the model goes; missing, empty, or with an earlier saved model in it.

    Yields:
        The temporary folder, not made yet.

    Raises:
        ArtefactError: if the folder holds something that is not a saved model.
    """
    check_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex}.tmp"
    try:
        yield temporary
        move_into_place(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_config(folder: Path, config: dict[str, Any], cls: type) -> None:
    """Write config.json beside the weights, which it names with their size and hash.

    Args:
        folder: where model.safetensors stands already.
        config: JSON values.
        cls: the class that reads them back.
    """
    weights = folder / WEIGHTS
    path, slug = address_of(cls)
    block = {
        "class": path,
        "slug": slug,
        "version": paperback.__version__,
        "format": FORMAT,
        "weights_sha256": digest(weights),
        "weights_bytes": weights.stat().st_size,
    }
    config = config | {BLOCK: block}
    config[BLOCK] = block | {"config_sha256": config_digest(config)}
    text = json.dumps(config, sort_keys=True, indent=2) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")
    # safetensors makes files that only their owner can read.
    shutil.copymode(folder / CONFIG, weights)


def survives_json(value: Any) -> bool:
    """Whether a value is the same after JSON, but for tuples, which become lists."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and survives_json(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(survives_json, value))
    if isinstance(value, np.generic):
        value = value.item()
    return value is None or isinstance(value, bool | int | float | str)


def check_replaceable(folder: Path) -> None:
    """Refuse to write over anything that is not an earlier saved model."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not folder.is_dir():
        raise ArtefactError(f"{folder} is a file; give the name of a folder to save the model to.")
    try:
        ours = BLOCK in json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        ours = False
    if not ours:
        raise ArtefactError(
            f"{folder} holds files that are not a model saved by paperback; choose an empty or a new folder."
        )


def move_into_place(temporary: Path, folder: Path) -> None:
    """A new folder appears by one rename. In an old one the config comes last, so that no mixture passes."""
    if not folder.exists():
        temporary.rename(folder)
        return
    if not (folder / CARD).exists():  # one that is there may be the user's own
        os.replace(temporary / CARD, folder / CARD)
    os.replace(temporary / WEIGHTS, folder / WEIGHTS)
    os.replace(temporary / CONFIG, folder / CONFIG)


def address_of(cls: type) -> tuple[str, str | None]:
    """Import path and slug of a class; a method in a folder is known by the folder, not by a file in it."""
    for method in catalogue.methods():
        module, _, name = method.object.partition(":")
        if name == cls.__name__ and f"{cls.__module__}.".startswith(f"{module}."):
            return method.object, method.slug
    for method in catalogue.methods():  # a method may have several classes: a regressor and a classifier
        if f"{cls.__module__}.".startswith(f"{method.module}."):
            return f"{method.module}:{cls.__name__}", method.slug
    for module in _baselines():
        if f"{cls.__module__}.".startswith(f"{module}."):
            return f"{module}:{cls.__name__}", None
    return f"{cls.__module__}:{cls.__name__}", None


def _baselines() -> list[str]:
    """Modules that the catalogue does not name and whose classes are saved all the same."""
    shared = ["paperback.networks", "paperback.represent.contrastive"]
    return [f"paperback.{task}.baselines" for task in catalogue.TASKS] + shared


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def config_digest(config: dict[str, Any]) -> str:
    """SHA-256 of the config without this very entry, in canonical JSON."""
    block = {key: value for key, value in config[BLOCK].items() if key != "config_sha256"}
    return hashlib.sha256(json.dumps(config | {BLOCK: block}, sort_keys=True).encode()).hexdigest()


def _file(folder: Path, name: str, root: Path) -> Path:
    """The path of a regular file that lies under `root`, links followed."""
    path = folder / name
    if not path.resolve().is_relative_to(root.resolve()):
        raise ArtefactError(f"{path} is a link that leads out of the folder; copy the file itself there.")
    if not path.is_file():
        raise ArtefactError(f"{folder} has no {name}; a saved model is {CONFIG} and {WEIGHTS} together.")
    return path


def read_config(folder: Path, root: Path) -> dict[str, Any]:
    """config.json, checked: ours, of this format, undamaged."""
    if not folder.exists():
        raise ArtefactError(f"there is no folder {folder}; give the folder that save_pretrained wrote.")
    if not folder.is_dir():
        raise ArtefactError(f"{folder} is a file; give the folder that holds {CONFIG} and {WEIGHTS}.")
    path = _file(folder, CONFIG, root)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtefactError(f"{path} is damaged: not JSON ({error}); save the model again.") from error
    if not isinstance(config, dict) or not isinstance(config.get(BLOCK), dict):
        raise ArtefactError(f"{path} was not written by paperback: {_foreign(config)}.")
    block = config[BLOCK]
    _check_format(block, path)
    types = {"class": str, "weights_sha256": str, "weights_bytes": int, "config_sha256": str}
    for key, kind in types.items():
        if not isinstance(block.get(key), kind):
            raise ArtefactError(f'{path} is damaged: "{BLOCK}" has no good "{key}"; save the model again.')
    if block["config_sha256"] != config_digest(config):
        raise ArtefactError(
            f"{path} is not as it was saved: its SHA-256 differs; save the model again "
            "(changed arguments go to from_pretrained)."
        )
    return config


def _foreign(config: object) -> str:
    """Say whose config.json this is, as far as it can be told."""
    if isinstance(config, dict):
        if "transformers_version" in config or "model_type" in config or "architectures" in config:
            kind = config.get("model_type") or config.get("architectures") or "of unknown type"
            return f"it is a transformers model ({kind}); load it with transformers.AutoModel.from_pretrained"
        if "_diffusers_version" in config:
            return f"it is a diffusers model ({config.get('_class_name')}); load it with diffusers"
    return f'it has no block "{BLOCK}"; load it with the library that saved it'


def _check_format(block: dict[str, Any], path: Path) -> None:
    saved, version = block.get("format"), block.get("version")
    if type(saved) is not int:
        raise ArtefactError(f"{path} is damaged: it does not say its format; save the model again.")
    if saved > FORMAT:
        raise ArtefactError(
            f"{path} has format {saved}, of paperback {version}; upgrade paperback, this is "
            f"{paperback.__version__} and reads format {FORMAT}."
        )
    if saved < FORMAT:
        raise ArtefactError(
            f"{path} has the old format {saved}, of paperback {version}, no longer read; fit the model again."
        )


def read_weights(folder: Path, root: Path, block: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of model.safetensors, after size and hash were found right."""
    path = _file(folder, WEIGHTS, root)
    size = path.stat().st_size
    if size != block["weights_bytes"]:
        raise ArtefactError(
            f"{path} is damaged: {size} bytes instead of {block['weights_bytes']}; copy or save it again."
        )
    if digest(path) != block["weights_sha256"]:
        raise ArtefactError(
            f"{path} is damaged: its SHA-256 is not the one in {CONFIG}; copy or save it again."
        )
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ArtefactError(f"{path} is not a safetensors file ({error}); save the model again.") from error


def resolve(address: str, folder: Path, kinds: tuple[type, ...]) -> Any:
    """The class behind an address, if it is one of `kinds` that the catalogue or a wing's baselines hold."""
    module, _, name = address.partition(":")
    objects = {method.object for method in catalogue.methods()}
    modules = {method.module for method in catalogue.methods() if method.object}
    cls = None
    if address in objects or module in {*modules, *_baselines()}:
        try:
            cls = getattr(importlib.import_module(module), name, None)
        except ModuleNotFoundError as error:
            if not f"{module}.".startswith(f"{error.name}."):  # a missing extra is another matter
                raise
    if not (isinstance(cls, type) and issubclass(cls, kinds) and address_of(cls)[0] == address):
        raise ArtefactError(
            f"{folder} asks for {address!r}, which is no model of paperback {paperback.__version__}; "
            "a class of your own is loaded by its from_pretrained."
        )
    return cls
