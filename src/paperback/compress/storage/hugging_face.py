"""Compressed transformers models as checkpoints that `from_pretrained` opens.

The config of such a checkpoint says ``"quantization_config": {"quant_method": "paperback", "modules":
{...}}``, the same table of layers as in the recipe. transformers then asks the quantizer of that name,
which is registered here, to put the storage modules into the empty network before the tensors are read.
`paperback.plugin` imports this module as soon as both paperback and transformers' quantizers are imported.
A model without storage modules, zeros or not, is an ordinary checkpoint and needs none of this.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from paperback.compress.storage.files import (
    FORMAT,
    RECIPE,
    check_form,
    checked_layer,
    headers,
    read_recipe,
)
from paperback.compress.storage.module import KINDS, spec_of, stored_layers, to_dense
from paperback.errors import ArtefactError, NotSupportedError
from paperback.networks.surgery import swap

if TYPE_CHECKING:  # transformers.modeling_utils imports the quantizers, so this module must not import it
    from transformers.modeling_utils import PreTrainedModel

METHOD = "paperback"


class PaperbackConfig(QuantizationConfigMixin):
    """The block "quantization_config" of a checkpoint: which layers are stored how."""

    def __init__(self, modules: dict[str, Any] | None = None, format: int = FORMAT, **_: Any) -> None:
        """transformers makes it from config.json.

        Args:
            modules: name of each stored layer to its spec.
            format: version of the specs.
            **_: what transformers adds of its own.

        Raises:
            ArtefactError: if the format is another, or `modules` is not a table.
        """
        self.quant_method = METHOD  # type: ignore[assignment]
        if format != FORMAT:
            raise ArtefactError(
                f"this checkpoint has the stored format {format}; this paperback reads {FORMAT}."
            )
        if not isinstance(modules, dict):
            raise ArtefactError("the quantization_config of this checkpoint has no table of modules.")
        self.modules = modules
        self.format = format


class PaperbackQuantizer(HfQuantizer):
    """Puts storage modules into a transformers model before its tensors are read, and looks at them after."""

    requires_calibration = True
    quantization_config: PaperbackConfig

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> PreTrainedModel:
        """Swap; the files' headers must agree with the config, and the recipe's checksums must be right."""
        paths = [Path(file) for file in checkpoint_files or ()]
        for folder in {path.parent for path in paths}:
            if (folder / RECIPE).is_file():
                read_recipe(folder)
        tensors = headers(path for path in paths if path.suffix == ".safetensors")
        for name, spec in self.quantization_config.modules.items():
            with torch.device("meta"):
                layer = checked_layer(name, spec, tensors)
            place = _place(model, name)
            if place is None:  # a head, in a model without one
                continue
            check_form(name, layer, model.get_submodule(place))
            swap(model, place, layer)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        for name, layer in stored_layers(model).items():
            try:
                layer.check()
            except ArtefactError as error:
                raise ArtefactError(f"{name}: {error}") from error
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
        """Before `save_pretrained` writes the config: the layers as they are now."""
        model.config.quantization_config = _config_of(model)
        return None, {}

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """It can be saved again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether every stored layer has parameters that can be trained, as factors have."""
        kinds = {spec.get("kind") for spec in self.quantization_config.modules.values()}
        return all(kind in KINDS and KINDS[kind].trainable for kind in kinds)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """What `model.dequantize()` does: dense layers again."""
        to_dense(model)
        if dtype is not None:
            nn.Module.to(model, dtype=dtype)
        return model


def register() -> None:
    """Tell transformers about the quantizer; once is enough, more do nothing."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(PaperbackConfig)
        register_quantizer(METHOD)(PaperbackQuantizer)


def save_checkpoint(model: PreTrainedModel, folder: Path, *, check: bool = True) -> dict[str, Any]:
    """Write a transformers model with its storage modules as a checkpoint.

    Args:
        model: the model; with storage modules it gets the quantizer that also `save_pretrained` needs.
        folder: where to.
        check: look whether the config makes a network of these shapes.

    Returns:
        What the recipe must know to make it again.

    Raises:
        NotSupportedError: if another library has quantized the model.
        ArtefactError: if its layers have other shapes than the config says.
    """
    other = getattr(model, "hf_quantizer", None)
    if other is not None and not isinstance(other, PaperbackQuantizer):
        method = other.quantization_config.quant_method
        raise NotSupportedError(
            f"the model is quantized by {method} already; use save_pretrained of transformers for it."
        )
    if stored_layers(model):
        register()
        config = _config_of(model)
        model.config.quantization_config = config
        for name, value in (
            ("hf_quantizer", PaperbackQuantizer(config)),
            ("is_quantized", True),
            ("quantization_method", METHOD),
        ):
            setattr(model, name, value)
    elif other is not None:  # its layers are dense again
        other.remove_quantization_config(model)
    if check:
        _check_skeleton(model)
    with _silent():
        model.save_pretrained(folder)
    return {"transformers": type(model).__name__}


def load_checkpoint(folder: Path, name: str) -> nn.Module:
    """Open a checkpoint that `save_checkpoint` wrote.

    Args:
        folder: the checkpoint, its checksums already found right.
        name: of the class, one of transformers' own.

    Raises:
        ArtefactError: if there is no such class.
    """
    import transformers
    from transformers.modeling_utils import PreTrainedModel

    register()
    cls = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        raise ArtefactError(f"{folder} holds a {name!r}, which this transformers does not have.")
    with _silent():
        loaded: Any = cls.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype="auto", output_loading_info=True
        )
    model, found = loaded
    wrong = [key for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in found[kind]]
    if wrong:
        raise ArtefactError(f"{folder} does not fit a {name}: {wrong[0]}; save the model again.")
    network: nn.Module = model.eval()
    return network


def _config_of(model: PreTrainedModel) -> PaperbackConfig:
    return PaperbackConfig({name: spec_of(layer) for name, layer in stored_layers(model).items()})


def _check_skeleton(model: PreTrainedModel) -> None:
    """A network made from the config, without memory, must have the parameters that this one has."""
    config = copy.deepcopy(model.config)
    with torch.device("meta"):
        try:
            skeleton = type(model)(config)
        except Exception as error:  # a constructor may raise anything on a config that it does not know
            raise ArtefactError(f"the config does not make a {type(model).__name__}: {error}") from error
    for name, layer in stored_layers(model).items():
        try:
            check_form(name, layer, skeleton.get_submodule(name))
            swap(skeleton, name, nn.Identity())
        except AttributeError:
            raise ArtefactError(f"the config makes no layer {name!r}, which the model has.") from None
    stored = tuple(f"{name}." for name in stored_layers(model))
    shapes = {name: tuple(p.shape) for name, p in skeleton.named_parameters(remove_duplicate=False)}
    ours = {
        name: tuple(p.shape)
        for name, p in model.named_parameters(remove_duplicate=False)
        if not name.startswith(stored)
    }
    for name in sorted({*shapes, *ours}):
        if shapes.get(name) != ours.get(name):
            raise ArtefactError(
                f"{name} is {ours.get(name)}, but the config makes {shapes.get(name)}; "
                "set the config to the new widths, or save the model as a plain module."
            )


def _place(model: PreTrainedModel, name: str) -> str | None:
    """The name of a saved layer in this model, which may be the base of the saved one, or have a head."""
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    names = dict(model.named_modules())
    for candidate in (name, name.removeprefix(prefix), prefix + name):
        if candidate in names:
            return candidate
    return None


class _silent:
    """Inside this context transformers draws no bars."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self._draws = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()

    def __exit__(self, *_: Any) -> None:
        from transformers.utils import logging

        if self._draws:
            logging.enable_progress_bar()


register()
