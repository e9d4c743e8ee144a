"""Whole language models exchanged with `transformers`: MambaForCausalLM and Mamba2ForCausalLM.

A folder is read as data (config.json and safetensors, in one file or in shards), without transformers.
`paperback.layers.mamba.weights` knows the names inside a mixer, this module those around it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from paperback.errors import ArtefactError, DataError, MissingExtraError, NotSupportedError
from paperback.layers.mamba.blocks import NORM_EPS, MambaBlock
from paperback.layers.mamba.core import S6Core, SSDCore
from paperback.layers.mamba.weights import export_mixer, import_mixer

if TYPE_CHECKING:
    from paperback.layers.mamba.language_model import MambaLM

KINDS = {"mamba": "s6", "mamba2": "ssd"}  # transformers' model_type -> kind of Mamba
ONLY = {  # settings that our model has in one form only; a config that lacks one means that form
    "hidden_act": "silu",
    "layer_norm_epsilon": NORM_EPS,
    "time_step_scale": 1.0,
}


def is_transformers_folder(folder: Path) -> bool:
    """Whether a folder holds a model that transformers wrote, and not one of ours."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "model_type" in config and "paperback" not in config


def of_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of a folder.

    Raises:
        ArtefactError: if there are no weights, or they cannot be read.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    index = folder / "model.safetensors.index.json"
    try:
        if index.is_file():
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        else:
            names = ["model.safetensors"]
        tensors: dict[str, Tensor] = {}
        for name in names:
            if Path(name).name != name:
                raise ArtefactError(f"{index} names a file outside of the folder, {name!r}; it is not read.")
            tensors |= load_file(folder / name)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ArtefactError(
            f"the weights in {folder} cannot be read ({error}); save the model there with safetensors."
        ) from error
    return config, tensors


def of_model(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of a model of transformers.

    Raises:
        DataError: if it is no such model.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        raise DataError(
            f"{type(model).__name__} is not a model of transformers; give a MambaForCausalLM, a "
            "Mamba2ForCausalLM, or a folder."
        )
    return {**config.to_dict(), "model_type": config.model_type}, model.state_dict()


def arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `MambaLM` that a transformers config means.

    Raises:
        ArtefactError: if the config is of another architecture, or of a variant that we do not have.
    """
    kind = KINDS.get(str(config.get("model_type")))
    if kind is None:
        raise ArtefactError(
            f"the model is a {config.get('model_type')!r}; a MambaLM takes {' and '.join(KINDS)} only."
        )
    for name, only in ONLY.items():
        if config.get(name, only) != only:
            raise ArtefactError(f"the model has {name}={config[name]!r}; a MambaLM has {only!r} only.")
    low, high = map(_number, config.get("time_step_limit") or (0.0, float("inf")))
    if low > 0 or high != float("inf"):
        raise ArtefactError(f"the model limits its time step to {(low, high)}; a MambaLM has no such limit.")
    try:
        found = {
            "vocab": config["vocab_size"],
            "d_model": config["hidden_size"],
            "layers": "M" * config["num_hidden_layers"],
            "tie": config.get("tie_word_embeddings", kind == "s6"),
            "kind": kind,
            "d_state": config["state_size"],
            "d_conv": config["conv_kernel"],
            "expand": config["expand"],
            "bias": config["use_bias"],
            "conv_bias": config["use_conv_bias"],
        }
        if kind == "ssd":
            return found | {"headdim": config["head_dim"], "ngroups": config["n_groups"]}
        return found | {"dt_rank": config.get("time_step_rank", "auto")}
    except KeyError as error:
        raise ArtefactError(f"the config of the model lacks {error}; save it again.") from error


def _number(value: Any) -> float:
    """A number of a transformers config, which writes infinity as {"__float__": "Infinity"}."""
    return float(value["__float__"] if isinstance(value, dict) else value)


def fill(model: MambaLM, tensors: Mapping[str, Tensor]) -> None:
    """Copy the tensors of a transformers model into ours: every one, in the precision they have.

    Raises:
        ArtefactError: if one is missing, left over, or of another shape.
    """
    # MambaModel alone, without the output matrix, has no prefix.
    rest = {name.removeprefix("backbone."): tensor for name, tensor in tensors.items()}
    own: dict[str, Tensor] = {"embeddings.weight": model.embedding.weight, "norm_f.weight": model.norm.weight}
    if model.head.weight is model.embedding.weight:
        rest.pop("lm_head.weight", None)
    else:
        own["lm_head.weight"] = model.head.weight
    for i, block in enumerate(model.blocks):
        assert isinstance(block, MambaBlock)
        own[f"layers.{i}.norm.weight"] = block.norm.weight
        start = f"layers.{i}.mixer."
        mixer = {name.removeprefix(start): rest.pop(name) for name in list(rest) if name.startswith(start)}
        import_mixer(block.mixer, mixer)
    for name, target in own.items():
        if name not in rest:
            raise ArtefactError(f"the model has no tensor {name!r}; save it again.")
        source = rest.pop(name)
        if source.shape != target.shape:
            raise ArtefactError(
                f"the model's {name!r} has shape {tuple(source.shape)}, but its config says "
                f"{tuple(target.shape)}; save the model again."
            )
        with torch.no_grad():
            target.copy_(source)
    if rest:
        raise ArtefactError(
            f"the model has a tensor {next(iter(rest))!r}, which a MambaLM has no place for; "
            "its config and its weights do not belong together."
        )


def to_transformers(model: MambaLM) -> nn.Module:
    """The same model as one of transformers; see `MambaLM.to_transformers`."""
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError(
            'to_transformers needs transformers; install it with pip install "paperback[llm]".'
        ) from error
    blocks = [block for block in model.blocks if isinstance(block, MambaBlock)]
    if len(blocks) < len(model.blocks):
        raise NotSupportedError(
            f"layers={model.layers!r} mixes blocks, which transformers' Mamba does not; "
            "only models of M blocks can be handed over."
        )
    mixer, core = blocks[0].mixer, blocks[0].mixer.core
    if not isinstance(core, S6Core | SSDCore) or (isinstance(core, S6Core) and not core.selective):
        raise NotSupportedError(
            f"transformers has no Mamba of kind={mixer.kind!r} that is not selective or trapezoidal; "
            'hand over a model of kind "s6" or "ssd", with selective=True.'
        )
    assert core.conv1d is not None
    shared: dict[str, Any] = {
        "vocab_size": model.vocab,
        "hidden_size": mixer.d_model,
        "num_hidden_layers": len(blocks),
        "state_size": core.d_state,
        "conv_kernel": core.conv1d.kernel_size[0],
        "expand": core.d_inner // mixer.d_model,
        "use_bias": mixer.in_proj.bias is not None,
        "use_conv_bias": core.conv1d.bias is not None,
        "layer_norm_epsilon": NORM_EPS,
        "tie_word_embeddings": model.head.weight is model.embedding.weight,
        # Which tokens mean something is the tokenizer's affair; those of the defaults may not exist.
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    target: Any
    if isinstance(core, S6Core):
        config = transformers.MambaConfig(**shared, time_step_rank=core.dt_rank)
        target = transformers.MambaForCausalLM(config)
    else:
        heads: dict[str, Any] = {"num_heads": core.heads, "head_dim": core.headdim, "n_groups": core.ngroups}
        target = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**shared, **heads))
    tensors: dict[str, Tensor] = {
        "backbone.embeddings.weight": model.embedding.weight,
        "backbone.norm_f.weight": model.norm.weight,
        "lm_head.weight": model.head.weight,
    }
    for i, block in enumerate(blocks):
        tensors[f"backbone.layers.{i}.norm.weight"] = block.norm.weight
        for name, tensor in export_mixer(block.mixer).items():
            tensors[f"backbone.layers.{i}.mixer.{name}"] = tensor
    target.load_state_dict(tensors)
    handed_over: nn.Module = target.to(model.embedding.weight.device).eval()
    return handed_over
