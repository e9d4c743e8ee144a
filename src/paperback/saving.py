"""Saving a fitted model to a folder and getting it back.

A saved model is a folder with `model.safetensors` (the state dict) and `config.json`: the constructor's
arguments, and a block "paperback" that names the class, the format, and the SHA-256 of the weights and of the
config itself. `Saved` gives a module `save_pretrained` and `from_pretrained`, on top of
`huggingface_hub.PyTorchModelHubMixin`, so that it can also be pushed to the Hub. `load` finds the class from
the config. It takes only classes that the catalogue or a wing's baselines hold, and it runs nothing that
stands in the folder: both files are data. What is damaged, foreign or of another format is refused with an
`ArtefactError`.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import shutil
import uuid
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from huggingface_hub import PyTorchModelHubMixin, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_model
from torch import Tensor, nn

import paperback
from paperback import catalogue
from paperback.errors import ArtefactError, NotSupportedError

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


class Saved(PyTorchModelHubMixin, library_name="paperback", model_card_template=CARD_TEMPLATE):
    """Gives a `torch.nn.Module` whose constructor takes JSON values `save_pretrained` and `from_pretrained`.

    Put it before `nn.Module` in the bases: ``class Model(Saved, nn.Module)``. The arguments of the
    constructor are noted when the object is made. A tuple comes back as a list, so the constructor has to
    take both.
    """

    _unsavable: tuple[str, ...]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Note the constructor's arguments, as JSON values, before anything can change them."""
        instance = super().__new__(cls, *args, **kwargs)
        # The mixin keeps arguments by reference and drops, without a word, what JSON does not have.
        names = list(cls._hub_mixin_init_parameters)[1:]
        passed = dict(zip(names, args, strict=False)) | kwargs
        arguments = dict(cls._hub_mixin_jsonable_default_values) | passed
        savable = {name: value for name, value in arguments.items() if _survives_json(value)}
        instance._hub_mixin_config = json.loads(json.dumps(savable, default=np.generic.item))
        unsavable = tuple(name for name in passed if name not in savable)
        instance._unsavable = unsavable + (("*args",) if len(args) > len(names) else ())
        return instance

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        config: Any = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Save the model to a folder; an older model in that folder is replaced.

        The files are written beside the folder and moved into it when they are whole, the weights first and
        the config last.

        Args:
            save_directory: the folder; it is made when it is not there.
            config: must be None, what the Hub's mixin passes; config.json holds the constructor's arguments.
            repo_id: name on the Hub, with ``push_to_hub=True``; the folder's name if not given.
            push_to_hub: also upload the model to the Hugging Face Hub.
            model_card_kwargs: passed to the template of README.md.
            **push_to_hub_kwargs: passed to `push_to_hub`.

        Returns:
            The address of the commit with ``push_to_hub=True``, otherwise None.

        Raises:
            ArtefactError: if the folder holds something that is not a saved model, or an argument of the
                constructor has no place in JSON.
            NotSupportedError: if a config is given.
        """
        if config is not None:
            raise NotSupportedError(
                f"{CONFIG} always holds the constructor's arguments; call save_pretrained without a config."
            )
        folder = Path(save_directory)
        _check_replaceable(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex}.tmp"
        try:
            super().save_pretrained(temporary, model_card_kwargs=model_card_kwargs)
            _move_into_place(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        if push_to_hub:
            repo_id = repo_id or folder.name
            return self.push_to_hub(repo_id, model_card_kwargs=model_card_kwargs, **push_to_hub_kwargs)
        return None

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write weights and config; the mixin adds the model card."""
        config: dict[str, Any] = dict(self._hub_mixin_config or {})  # type: ignore[arg-type]
        if self._unsavable or BLOCK in config:
            name = self._unsavable[0] if self._unsavable else BLOCK
            raise ArtefactError(
                f"{type(self).__name__} cannot be saved: {CONFIG} cannot hold its argument {name!r}; "
                "build the model from numbers, strings, lists and dictionaries with string keys."
            )
        weights = save_directory / WEIGHTS
        assert isinstance(self, nn.Module)
        save_model(self, str(weights))
        path, slug = _address(type(self))
        block = {
            "class": path,
            "slug": slug,
            "version": paperback.__version__,
            "format": FORMAT,
            "weights_sha256": _digest(weights),
            "weights_bytes": weights.stat().st_size,
        }
        config[BLOCK] = block | {"config_sha256": _config_digest(config | {BLOCK: block})}
        text = json.dumps(config, sort_keys=True, indent=2) + "\n"
        (save_directory / CONFIG).write_text(text, encoding="utf-8")
        # safetensors makes files that only their owner can read.
        shutil.copymode(save_directory / CONFIG, weights)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        map_location: str = "cpu",
        **model_kwargs: Any,
    ) -> Self:
        """Load a model of this class from a folder, in evaluation mode. A folder is read without any network.

        Args:
            pretrained_model_name_or_path: a folder written by `save_pretrained`, or "owner/name" of a model
                on the Hugging Face Hub.
            force_download: for the Hub: download again.
            token: for the Hub: the access token.
            cache_dir: for the Hub: where downloads are kept.
            local_files_only: for the Hub: use what was downloaded before.
            revision: for the Hub: branch, tag or commit.
            map_location: device of the weights.
            **model_kwargs: arguments of the constructor that replace the saved ones.

        Returns:
            The model.

        Raises:
            ArtefactError: if the folder is not a whole saved model of this class.
        """
        name = pretrained_model_name_or_path
        folder = root = Path(name)
        if not folder.exists() and _is_hub_name(name):
            hub = {
                "force_download": force_download,
                "token": token,
                "cache_dir": cache_dir,
                "local_files_only": local_files_only,
                "revision": revision,
            }
            folder = _download(str(name), **hub)
            root = folder.parent.parent  # the Hub's cache links snapshots/COMMIT/file to blobs/HASH
        config = _read_config(folder, root)
        saved = config[BLOCK]["class"].rpartition(":")[2]
        if saved != cls.__name__:
            raise ArtefactError(
                f"{folder} holds a {saved}, not a {cls.__name__}; paperback.load finds the class by itself."
            )
        tensors = _read_weights(folder, root, config[BLOCK])
        arguments = {key: value for key, value in config.items() if key != BLOCK} | model_kwargs
        model = _construct(cls, arguments, folder)
        _fill(model, tensors, folder)
        return model.to(map_location).eval()


def load(folder: str | Path) -> nn.Module:
    """Load a model that `save_pretrained` wrote, whatever method it is of. Nothing in the folder is run.

    Args:
        folder: the folder of the model.

    Returns:
        The model, on the CPU and in evaluation mode.

    Raises:
        ArtefactError: if the folder is missing, damaged, foreign, of another format, or its class is not one
            of paperback's.
    """
    path = Path(folder)
    cls = _resolve(_read_config(path, path)[BLOCK]["class"], path)
    return cls.from_pretrained(path)


# -- writing -----------------------------------------------------------------


def _survives_json(value: Any) -> bool:
    """Whether a value is the same after JSON, but for tuples, which become lists."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _survives_json(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(_survives_json, value))
    if isinstance(value, np.generic):
        value = value.item()
    return value is None or isinstance(value, bool | int | float | str)


def _check_replaceable(folder: Path) -> None:
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


def _move_into_place(temporary: Path, folder: Path) -> None:
    """A new folder appears by one rename. In an old one the config comes last, so that no mixture passes."""
    if not folder.exists():
        temporary.rename(folder)
        return
    if not (folder / CARD).exists():  # one that is there may be the user's own
        os.replace(temporary / CARD, folder / CARD)
    os.replace(temporary / WEIGHTS, folder / WEIGHTS)
    os.replace(temporary / CONFIG, folder / CONFIG)


def _address(cls: type) -> tuple[str, str | None]:
    """Import path and slug of a class; a method in a folder is known by the folder, not by a file in it."""
    for method in catalogue.methods():
        module, _, name = method.object.partition(":")
        if name == cls.__name__ and f"{cls.__module__}.".startswith(f"{module}."):
            return method.object, method.slug
    for module in _baselines():
        if f"{cls.__module__}.".startswith(f"{module}."):
            return f"{module}:{cls.__name__}", None
    return f"{cls.__module__}:{cls.__name__}", None


def _baselines() -> list[str]:
    return [f"paperback.{task}.baselines" for task in catalogue.TASKS]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _config_digest(config: dict[str, Any]) -> str:
    """SHA-256 of the config without this very entry, in canonical JSON."""
    block = {key: value for key, value in config[BLOCK].items() if key != "config_sha256"}
    return hashlib.sha256(json.dumps(config | {BLOCK: block}, sort_keys=True).encode()).hexdigest()


# -- reading -----------------------------------------------------------------


def _is_hub_name(name: str | Path) -> bool:
    """Whether a name must mean a model on the Hub; where "owner" is a folder, it is a mistyped path."""
    if not isinstance(name, str) or Path(name).parent.exists():
        return False
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) is not None


def _download(name: str, **hub: Any) -> Path:
    """The folder in the Hub's cache that holds config and weights of a model."""
    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS], **hub))
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ArtefactError(
            f"there is no folder {name} here, and the Hugging Face Hub does not give it: {reason}"
        ) from error


def _file(folder: Path, name: str, root: Path) -> Path:
    """The path of a regular file that lies under `root`, links followed."""
    path = folder / name
    if not path.resolve().is_relative_to(root.resolve()):
        raise ArtefactError(f"{path} is a link that leads out of the folder; copy the file itself there.")
    if not path.is_file():
        raise ArtefactError(f"{folder} has no {name}; a saved model is {CONFIG} and {WEIGHTS} together.")
    return path


def _read_config(folder: Path, root: Path) -> dict[str, Any]:
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
    if block["config_sha256"] != _config_digest(config):
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


def _read_weights(folder: Path, root: Path, block: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of model.safetensors, after size and hash were found right."""
    path = _file(folder, WEIGHTS, root)
    size = path.stat().st_size
    if size != block["weights_bytes"]:
        raise ArtefactError(
            f"{path} is damaged: {size} bytes instead of {block['weights_bytes']}; copy or save it again."
        )
    if _digest(path) != block["weights_sha256"]:
        raise ArtefactError(
            f"{path} is damaged: its SHA-256 is not the one in {CONFIG}; copy or save it again."
        )
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ArtefactError(f"{path} is not a safetensors file ({error}); save the model again.") from error


def _resolve(address: str, folder: Path) -> Any:
    """The class behind an address, if it is one of the catalogue's or of a wing's baselines."""
    module, _, name = address.partition(":")
    cls = None
    if module in _baselines() or address in {method.object for method in catalogue.methods()}:
        try:
            cls = getattr(importlib.import_module(module), name, None)
        except ModuleNotFoundError as error:
            if not f"{module}.".startswith(f"{error.name}."):  # a missing extra is another matter
                raise
    if not (isinstance(cls, type) and issubclass(cls, Saved) and _address(cls)[0] == address):
        raise ArtefactError(
            f"{folder} asks for {address!r}, which is no model of paperback {paperback.__version__}; "
            "a class of your own is loaded by its from_pretrained."
        )
    return cls


def _construct(cls: Any, arguments: dict[str, Any], folder: Path) -> Any:
    """Make a fresh model; constructors draw initial weights, so the user's random state is kept."""
    try:
        with torch.random.fork_rng(devices=[]):
            return cls(**arguments)
    except Exception as error:  # a constructor may raise anything on arguments that were not its own
        reason = str(error) or type(error).__name__
        raise ArtefactError(
            f"{folder}: {cls.__name__} does not take the saved arguments: {reason}"
        ) from error


def _fill(model: nn.Module, tensors: dict[str, Tensor], folder: Path) -> None:
    """Copy the weights in: every name, every shape, in the precision they were saved in."""
    own = model.state_dict(keep_vars=True)
    given = {own[name].untyped_storage().data_ptr() for name in own.keys() & tensors.keys()}
    # Of tensors that share their storage safetensors keeps one.
    missing = [n for n in own if n not in tensors and own[n].untyped_storage().data_ptr() not in given]
    problem = None
    if missing:
        problem = f"{missing[0]!r} is missing"
    for name, tensor in tensors.items():
        if name not in own:
            problem = f"{name!r} is not one of its tensors"
        elif tensor.shape != own[name].shape:
            problem = f"{name!r} has shape {tuple(tensor.shape)} instead of {tuple(own[name].shape)}"
        elif tensor.dtype != own[name].dtype:
            if not (tensor.is_floating_point() and own[name].is_floating_point()):
                problem = f"{name!r} is {tensor.dtype} instead of {own[name].dtype}"
            else:
                own[name].data = own[name].data.to(tensor.dtype)
    if problem:
        raise ArtefactError(
            f"{folder / WEIGHTS} does not fit a {type(model).__name__}: {problem}; save the model again."
        )
    model.load_state_dict(tensors, strict=False)
