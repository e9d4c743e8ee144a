"""Compressed models in folders: written whole, read with suspicion.

A folder holds safetensors files with the tensors as they are stored, packed or not, and `compression.json`,
the recipe: the version of the format, the method, for each layer that is not an ordinary one how it is
stored, which names share one tensor, and the SHA-256 of every file. Nothing in a folder is run. What a
recipe claims is compared with the headers of the safetensors files before anything is allocated, and the
tensors are read one at a time.

The folder of a transformers model is an ordinary checkpoint: `from_pretrained` opens it, with plain weights
natively, with packed ones once paperback is imported (see `hugging_face`). compressed-tensors has formats
for integer weights and for sparse ones as well, but none for codebooks and factors, and it needs that library
to be read; one format for all kinds, checked on load, is why this one is our own.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import paperback
from paperback.compress.storage.module import (
    LayerForm,
    StoredLayer,
    build,
    spec_of,
    stored_layers,
)
from paperback.errors import ArtefactError, DataError
from paperback.networks.surgery import swap
from paperback.saving import Saved
from paperback.saving.folder import address_of, digest, resolve

FORMAT = 1  # raised when a folder written by this code can no longer be read by the code before it
RECIPE = "compression.json"
WEIGHTS = "model.safetensors"
REPORT = "report.json"
MOST_RECIPE_BYTES = 2**26  # what a recipe may claim to be; one of a large model has a few million bytes


def save_model(
    model: nn.Module,
    folder: str | Path,
    report: str | Mapping[str, Any] | None = None,
    *,
    method: str = "",
    tokenizer: Any = None,
    loadable: bool = True,
) -> None:
    """Write a model to a folder, each layer as it is stored; an earlier saved model there is replaced.

    A transformers model becomes an ordinary checkpoint; its config then names the stored layers, and from
    then on its own `save_pretrained` writes them as well.

    Args:
        model: any module, with storage modules or without.
        folder: missing, empty, or with an earlier saved model.
        report: kept beside the model as report.json: JSON text, or values.
        method: what made the model, in words, for the recipe.
        tokenizer: of a transformers model, saved with it.
        loadable: whether a transformers model must come back from its config; False only writes the bytes,
            for measuring them.

    Raises:
        ArtefactError: if the folder holds something else, or a transformers model has layers of other shapes
            than its config says.
        DataError: if a tensor of the model is on the meta device.
    """
    path = Path(folder)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_meta:
            raise DataError(f"{name} is on the meta device and has no values; load the weights first.")
    with _replacing(path) as temporary:
        temporary.mkdir()
        tied: dict[str, str] = {}
        if is_transformers(model):
            from paperback.compress.storage.hugging_face import save_checkpoint

            skeleton = save_checkpoint(model, temporary, check=loadable)  # type: ignore[arg-type]
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
        else:
            tied = _save_tensors(model, temporary / WEIGHTS)
            skeleton = _skeleton(model)
        if report is not None:
            text = report if isinstance(report, str) else json.dumps(report, indent=2)
            (temporary / REPORT).write_text(text, encoding="utf-8")
        write_recipe(
            temporary,
            {
                "method": method,
                "modules": {name: spec_of(layer) for name, layer in stored_layers(model).items()},
                "tied": tied,
                "skeleton": skeleton,
            },
        )


def load_model(folder: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Read what `save_model` wrote. Nothing in the folder is run.

    Args:
        folder: the folder.
        model: a network of the architecture that was compressed, with any weights: its layers are replaced in
            place by the stored ones. Not needed for transformers models and for modules that paperback saves
            itself (`paperback.saving.Saved`).

    Returns:
        The model, on the CPU (or, given, where it was) and in evaluation mode.

    Raises:
        ArtefactError: if the folder is missing, damaged, foreign or too new, or does not fit the model.
        DataError: if a model is needed and not given.
    """
    stored = StoredModel(folder)
    kind: str
    what: Any
    kind, what = next(iter(stored.recipe["skeleton"].items()), ("other", "model"))
    if model is None and kind == "transformers":
        from paperback.compress.storage.hugging_face import load_checkpoint

        return load_checkpoint(stored.folder, str(what))
    if model is None and kind == "saved":
        cls: Any = resolve(what["class"], stored.folder, (Saved,))
        with torch.random.fork_rng(devices=[]):
            try:
                model = cls(**what["arguments"])
            except (TypeError, ValueError) as error:
                raise ArtefactError(
                    f"{stored.folder}: {cls.__name__} does not take its arguments: {error}"
                ) from error
    if model is None:
        raise DataError(
            f"{stored.folder} holds the layers of a {what}, not how to make one; "
            "give load_model a fresh one as model."
        )
    return stored.fill(model)


class StoredModel:
    """The folder of a compressed model, opened lazily: the recipe is read, tensors when they are asked for.

    Attributes:
        folder: where it lies.
        recipe: what compression.json says.
    """

    def __init__(self, folder: str | Path) -> None:
        """Read the recipe and the headers, and check every file's SHA-256.

        Args:
            folder: what `save_model` wrote.

        Raises:
            ArtefactError: if the folder is missing, damaged, foreign or too new.
        """
        self.folder = Path(folder)
        self.recipe = read_recipe(self.folder)
        self._headers = headers(self.folder / name for name in self.recipe["files"] if _is_tensors(name))

    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self._headers)

    def tensor(self, name: str) -> Tensor:
        """One tensor, as it is stored.

        Raises:
            ArtefactError: if there is none of this name.
        """
        if name not in self._headers:
            raise ArtefactError(f"{self.folder} has no tensor {name!r}; save the model again.")
        with safe_open(self._headers[name][0], framework="pt") as file:
            return file.get_tensor(name)

    def layer(self, name: str) -> StoredLayer:
        """One stored layer, read and checked; the rest of the model stays on the disk.

        Args:
            name: one of ``recipe["modules"]``.

        Raises:
            ArtefactError: if it is not there or damaged.
        """
        if name not in self.recipe["modules"]:
            raise ArtefactError(f"{self.folder} has no stored layer {name!r}.")
        layer = checked_layer(name, self.recipe["modules"][name], self._headers)
        self._read_into(layer, f"{name}." if name else "")
        return layer

    def fill(self, model: nn.Module) -> nn.Module:
        """Give a model of the same architecture the stored layers and tensors, in place.

        Raises:
            ArtefactError: if a layer or tensor is not one of the model, or one of the model's is missing.
        """
        for name, spec in self.recipe["modules"].items():
            layer = checked_layer(name, spec, self._headers)
            if not name:
                model = layer
                continue
            try:
                replaced = model.get_submodule(name)
            except AttributeError:
                raise ArtefactError(f"the model has no layer {name!r}, which {self.folder} holds.") from None
            check_form(name, layer, replaced)
            swap(model, name, layer)
        self._read_into(model, "")
        return model.eval()

    def _read_into(self, module: nn.Module, prefix: str) -> None:
        """Replace every tensor of a module by the stored one; names that are tied come to share it."""
        own = module.state_dict(keep_vars=True)
        tied = {new: kept for new, kept in self.recipe["tied"].items() if new.startswith(prefix)}
        expected = {name[len(prefix) :] for name in self._headers if name.startswith(prefix)}
        # A transformers checkpoint leaves out a name that the model itself ties to another.
        of_tensor = {id(own[name]): name for name in expected & own.keys()}
        for name in own.keys() - expected:
            if id(own[name]) in of_tensor:
                tied.setdefault(prefix + name, prefix + of_tensor[id(own[name])])
        missing = own.keys() - expected - {name[len(prefix) :] for name in tied}
        surplus = expected - own.keys()
        if missing or surplus:
            what = f"has no {min(missing)!r}" if missing else f"has {min(surplus)!r}, which the model has not"
            raise ArtefactError(f"{self.folder} {what}; it is not of a model of this architecture.")
        for name in expected:
            shape, here = self._headers[prefix + name][1], tuple(own[name].shape)
            if shape != here:
                raise ArtefactError(f"{self.folder}: {name!r} has shape {shape}, the model's {here}.")
            _put(module, name, self.tensor(prefix + name).to(_device(own[name])))
        for new, kept in tied.items():
            _put(module, new[len(prefix) :], _get(module, kept[len(prefix) :]))
        for layer in stored_layers(module).values():
            layer.check()


def write_recipe(folder: Path, recipe: dict[str, Any]) -> None:
    """Write compression.json, with the SHA-256 of every other file of the folder."""
    files = {
        str(path.relative_to(folder)): {"sha256": digest(path), "bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    recipe = {"format": FORMAT, "version": paperback.__version__, **recipe, "files": files}
    text = json.dumps(recipe, indent=1, sort_keys=True) + "\n"
    (folder / RECIPE).write_text(text, encoding="utf-8")
    for name in files:  # safetensors makes files that only their owner can read
        shutil.copymode(folder / RECIPE, folder / name)


def read_recipe(folder: Path) -> dict[str, Any]:
    """The recipe of a folder, once its files were found as they were written.

    Raises:
        ArtefactError: if the folder is missing, damaged, foreign or too new.
    """
    path = folder / RECIPE
    try:
        if path.stat().st_size > MOST_RECIPE_BYTES:
            raise ArtefactError(f"{path} is too large to be a recipe; save the model again.")
        recipe = json.loads(path.read_text(encoding="utf-8"))
        found, version = recipe["format"], recipe["version"]
        if found != FORMAT:
            raise ArtefactError(
                f"{path} has format {found}, written by paperback {version}; "
                f"this is {paperback.__version__} and reads format {FORMAT}."
            )
        for kind in ("modules", "files", "tied", "skeleton"):
            if not isinstance(recipe[kind], dict):
                raise TypeError(f"{kind} is not a table")
        files = {name: (entry["sha256"], entry["bytes"]) for name, entry in recipe["files"].items()}
    except FileNotFoundError as error:
        raise ArtefactError(f"{folder} has no {RECIPE}; give a folder that save_model wrote.") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtefactError(f"{path} is not a recipe of a compressed model ({error}).") from error
    for name, (sha256, size) in files.items():
        check_file(folder, name, sha256, size)
    return recipe


def check_file(folder: Path, name: str, sha256: str, size: int) -> None:
    """Refuse a file that is missing, of another size or of other contents than were written."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ArtefactError(f"{path} leads out of the folder; copy the file itself there.")
    if not path.is_file():
        raise ArtefactError(f"{path} is missing; copy or save the model again.")
    if path.stat().st_size != size or digest(path) != sha256:
        raise ArtefactError(f"{path} is damaged: it is not the file that was saved; copy or save it again.")


def headers(paths: Iterator[Path] | list[Path]) -> dict[str, tuple[Path, tuple[int, ...], str]]:
    """File, shape and type of every tensor of some safetensors files; no tensor is read."""
    found: dict[str, tuple[Path, tuple[int, ...], str]] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    part = file.get_slice(name)
                    found[name] = (path, tuple(part.get_shape()), part.get_dtype())
        except (SafetensorError, OSError) as error:
            raise ArtefactError(
                f"{path} is not a safetensors file ({error}); save the model again."
            ) from error
    return found


def checked_layer(
    name: str, spec: dict[str, Any], tensors: Mapping[str, tuple[Path, tuple[int, ...], str]]
) -> StoredLayer:
    """The layer of a recipe's entry, empty, once the files were found to hold just what it claims.

    Args:
        name: of the layer.
        spec: of the recipe.
        tensors: as of `headers`, by the same names.

    Raises:
        ArtefactError: naming the tensor that is missing or other than the recipe says.
    """
    if not isinstance(spec, dict):
        raise ArtefactError(f"the recipe of {name!r} is not a table.")
    with torch.device("meta"):
        claimed = build(spec).state_dict()
    for part, tensor in claimed.items():
        full = f"{name}.{part}" if name else part
        if full not in tensors:
            raise ArtefactError(f"the tensor {full!r} is missing; save the model again.")
        _, shape, dtype = tensors[full]
        wanted = str(tensor.dtype)[6:]
        if shape != tuple(tensor.shape) or SAFETENSORS_TYPES.get(dtype) != wanted:
            raise ArtefactError(
                f"the tensor {full!r} is {shape} of {dtype}, "
                f"but its recipe says {tuple(tensor.shape)} of {wanted}."
            )
    return build(spec)


def check_form(name: str, layer: StoredLayer, replaced: nn.Module) -> None:
    """Refuse to put a stored layer in the place of one of another kind or shape."""
    try:
        here = LayerForm.of(replaced)
    except DataError as error:
        raise ArtefactError(f"{name!r} of the model is a {type(replaced).__name__}, not a layer.") from error
    if here.type != layer.form.type or here.shape != layer.form.shape:
        raise ArtefactError(
            f"{name!r} of the model is {here.type} {here.shape}, "
            f"but {layer.form.type} {layer.form.shape} is stored."
        )


def is_transformers(model: nn.Module) -> bool:
    """Whether it is a transformers model; the library is not imported for the question."""
    utils = sys.modules.get("transformers.modeling_utils")
    return utils is not None and isinstance(model, utils.PreTrainedModel)


SAFETENSORS_TYPES = {
    "U8": "uint8", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64", "BOOL": "bool",
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
}  # fmt: skip


def _skeleton(model: nn.Module) -> dict[str, Any]:
    """How the architecture is made again, where we know it; otherwise its name, for the error message."""
    if isinstance(model, Saved) and not model._unsavable:
        address, _ = address_of(type(model))
        try:
            resolve(address, Path(), (Saved,))
        except ArtefactError:
            return {"other": type(model).__name__}
        return {"saved": {"class": address, "arguments": dict(model._hub_mixin_config or {})}}  # type: ignore[arg-type]
    return {"other": type(model).__name__}


def _save_tensors(model: nn.Module, path: Path) -> dict[str, str]:
    """Write the state of a model, tensors that several names share once.

    Returns:
        Each name that was left out, with the one under which its tensor is kept.
    """
    kept: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in kept:
            tied[name] = kept[id(tensor)]
            continue
        kept[id(tensor)] = name
        tensors[name] = tensor.detach().cpu().contiguous()
    pointers = [tensor.untyped_storage().data_ptr() for tensor in tensors.values() if tensor.numel()]
    if len(set(pointers)) < len(pointers):  # views of one storage; safetensors wants them apart
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    return tied


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Set a parameter or buffer by its dotted name; a parameter stays one."""
    where, _, last = name.rpartition(".")
    parent = module.get_submodule(where)
    if last in parent._buffers:
        parent._buffers[last] = tensor
        return
    old = parent._parameters[last]
    if isinstance(tensor, nn.Parameter):
        parent._parameters[last] = tensor
    else:
        assert old is not None
        parent._parameters[last] = nn.Parameter(tensor, requires_grad=old.requires_grad)


def _get(module: nn.Module, name: str) -> Tensor:
    where, _, last = name.rpartition(".")
    return getattr(module.get_submodule(where), last)


def _device(tensor: Tensor) -> torch.device:
    return torch.device("cpu") if tensor.is_meta else tensor.device


def _is_tensors(name: str) -> bool:
    return name.endswith(".safetensors")


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`, which it replaces once it is whole."""
    if folder.exists() and not folder.is_dir():
        raise ArtefactError(f"{folder} is a file; give the name of a folder to save the model to.")
    if folder.exists() and any(folder.iterdir()) and not (folder / RECIPE).is_file():
        raise ArtefactError(
            f"{folder} holds files that are not a compressed model; choose an empty or a new folder."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex}.tmp"
    old = temporary.with_suffix(".old")
    try:
        yield temporary
        if folder.exists():
            os.replace(folder, old)
        os.replace(temporary, folder)
    except BaseException:
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
