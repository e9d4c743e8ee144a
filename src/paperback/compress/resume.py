"""Finished blocks of a compression, kept on disk so that an interrupted one goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from paperback.compress.data import Data
from paperback.compress.storage.module import build, stored_layers
from paperback.errors import ArtefactError
from paperback.networks.surgery import swap

FILE = "begun.json"


class Finished:
    """The finished blocks of one call.

    Args:
        folder: where they are kept; None for nowhere, then nothing is ever restored.
        model: the model before the call; its weights are part of what the folder is checked against.
        data: of which the first calibration batch is checked, too.
        method: the method with its settings, likewise.

    Raises:
        ArtefactError: if the folder holds something else, or blocks of another call.
    """

    def __init__(self, folder: Path | None, model: nn.Module, data: Data, method: str) -> None:
        self._folder = Path(folder) if folder is not None else None
        if self._folder is None:
            return
        fingerprint = _fingerprint(model, data, method)
        begun = self._folder / FILE
        if begun.exists():
            if json.loads(begun.read_text(encoding="utf-8")).get("fingerprint") != fingerprint:
                raise ArtefactError(
                    f"{self._folder} was begun with another model, method or data; give a new folder."
                )
        elif self._folder.exists() and any(self._folder.iterdir()):
            raise ArtefactError(f"{self._folder} holds other files; give an empty or a new folder.")
        else:
            self._folder.mkdir(parents=True, exist_ok=True)
            _write(begun, {"fingerprint": fingerprint})

    def keep(self, name: str, block: nn.Module) -> None:
        """Write one finished block."""
        if self._folder is None:
            return
        state = {key: value.contiguous().clone() for key, value in block.state_dict().items()}
        specs = {inner: {"kind": m.kind} | m.spec() for inner, m in stored_layers(block).items()}
        path = self._path(name)
        temporary = path.with_suffix(".tmp")
        save_file(state, temporary)
        _write(path.with_suffix(".json"), specs)
        os.replace(temporary, path)

    def restore(self, name: str, block: nn.Module) -> bool:
        """Bring a block back to how it was kept.

        Returns:
            Whether it was kept.
        """
        if self._folder is None or not self._path(name).exists():
            return False
        path = self._path(name)
        for inner, spec in json.loads(path.with_suffix(".json").read_text(encoding="utf-8")).items():
            swap(block, inner, build(spec))
        block.load_state_dict(load_file(path))
        return True

    def discard(self) -> None:
        """Remove the folder: the call has come to its end."""
        if self._folder is not None:
            shutil.rmtree(self._folder)

    def _path(self, name: str) -> Path:
        assert self._folder is not None
        return self._folder / f"block-{name or 'whole'}.safetensors"


def _fingerprint(model: nn.Module, data: Data, method: str) -> str:
    digest = hashlib.sha256(method.encode())
    for name, value in model.state_dict().items():
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(_bytes(value))
    for leaf in tree_leaves(next(data.batches("train"))):
        if isinstance(leaf, Tensor):
            digest.update(_bytes(leaf))
    return digest.hexdigest()


def _bytes(value: Tensor) -> Any:
    return value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()


def _write(path: Path, content: Any) -> None:
    temporary = path.with_suffix(f"{path.suffix}.tmp")
    temporary.write_text(json.dumps(content), encoding="utf-8")
    os.replace(temporary, path)
