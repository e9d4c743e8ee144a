"""`Saved`: what gives a module `save_pretrained` and `from_pretrained`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from huggingface_hub import PyTorchModelHubMixin, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import save_model
from torch import Tensor, nn

from paperback.errors import ArtefactError, NotSupportedError
from paperback.saving.folder import (
    BLOCK,
    CARD_TEMPLATE,
    CONFIG,
    WEIGHTS,
    read_config,
    read_weights,
    replacing,
    survives_json,
    write_config,
)


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
        savable = {name: value for name, value in arguments.items() if survives_json(value)}
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
        with replacing(folder) as temporary:
            super().save_pretrained(temporary, model_card_kwargs=model_card_kwargs)
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
        assert isinstance(self, nn.Module)
        save_model(self, str(save_directory / WEIGHTS))
        write_config(save_directory, config, type(self))

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
        config = read_config(folder, root)
        saved = config[BLOCK]["class"].rpartition(":")[2]
        if saved != cls.__name__:
            raise ArtefactError(
                f"{folder} holds a {saved}, not a {cls.__name__}; paperback.load finds the class by itself."
            )
        tensors = read_weights(folder, root, config[BLOCK])
        arguments = {key: value for key, value in config.items() if key != BLOCK} | model_kwargs
        model = _construct(cls, arguments, folder)
        _fill(model, tensors, folder)
        return model.to(map_location).eval()


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
