"""Weights of a mixer from and to `transformers` (MambaMixer, Mamba2Mixer) and mamba_ssm, of the same names.

The tensors are the same too, in the same layout; only the names differ: what our core holds stands flat
there, and Mamba-1's step bias is there the bias of ``dt_proj``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from paperback.errors import ArtefactError, DataError, NotSupportedError
from paperback.layers.mamba.core import S6Core, SSDCore
from paperback.layers.mamba.core_parts import NORM_EPS

if TYPE_CHECKING:
    from paperback.layers.mamba.mixer import Mamba

S6_NAMES = ("conv1d.weight", "conv1d.bias", "x_proj.weight", "dt_proj.weight", "A_log", "D")
SSD_NAMES = ("conv1d.weight", "conv1d.bias", "dt_bias", "A_log", "D")


def import_mixer(mixer: Mamba, tensors: Mapping[str, Tensor]) -> None:
    """Copy a mixer's weights in, in place, in the precision of ours.

    Args:
        mixer: a forward, selective mixer of kind "s6" or "ssd".
        tensors: all tensors of a MambaMixer or Mamba2Mixer by name.

    Raises:
        ArtefactError: if a tensor is missing, has another shape, or is not one of a mixer's.
        NotSupportedError: if the mixer has no counterpart.
    """
    names = _names(mixer)
    missing = sorted(names.keys() - tensors.keys())
    if missing:
        raise ArtefactError(f"the weights have no {missing[0]!r}; a {mixer.kind} mixer needs it.")
    extra = sorted(tensors.keys() - names.keys())
    if extra:
        raise ArtefactError(
            f"the weights have {extra[0]!r}, which is no part of a {mixer.kind} mixer like this one."
        )
    own = mixer.state_dict(keep_vars=True)
    for theirs, ours in names.items():
        if tensors[theirs].shape != own[ours].shape:
            raise ArtefactError(
                f"{theirs!r} has shape {tuple(tensors[theirs].shape)}; we need {tuple(own[ours].shape)}."
            )
    with torch.no_grad():
        for theirs, ours in names.items():
            own[ours].copy_(tensors[theirs])


def export_mixer(mixer: Mamba) -> dict[str, Tensor]:
    """Copies of the weights by the names of a MambaMixer or Mamba2Mixer: its ``load_state_dict`` takes them.

    Raises:
        NotSupportedError: if the mixer has no counterpart in transformers.
    """
    own = mixer.state_dict()
    return {theirs: own[ours].clone() for theirs, ours in _names(mixer).items()}


def settings_of(
    tensors: Mapping[str, Tensor], source: object = None, ngroups: int | None = None
) -> dict[str, Any]:
    """The arguments of `Mamba` that fit a mixer's weights.

    Args:
        tensors: all tensors of the mixer by name.
        source: the module they come from, which says what shapes do not.
        ngroups: groups of kind "ssd"; the module's if not given, otherwise 1.

    Raises:
        ArtefactError: if they are not the weights of a mixer.
        NotSupportedError: if the mixer does what ours does not.
    """
    for name in ("in_proj.weight", "out_proj.weight", "conv1d.weight", "A_log"):
        if name not in tensors:
            raise ArtefactError(
                f"the weights have no {name!r}; expected those of a MambaMixer or Mamba2Mixer."
            )
    _check_behaviour(source)
    d_model, d_inner = tensors["out_proj.weight"].shape
    if d_inner % d_model:
        raise NotSupportedError(
            f"the inner width {d_inner} of the weights is no multiple of the width {d_model}."
        )
    A_log, filters = tensors["A_log"], tensors["conv1d.weight"]
    settings: dict[str, Any] = {
        "d_model": d_model,
        "expand": d_inner // d_model,
        "d_conv": filters.shape[2],
        "bias": "in_proj.bias" in tensors,
        "conv_bias": "conv1d.bias" in tensors,
    }
    if A_log.ndim == 2:
        rank = tensors["dt_proj.weight"].shape[1]
        return settings | {"kind": "s6", "d_state": A_log.shape[1], "dt_rank": rank}
    groups = int(ngroups or getattr(source, "n_groups", None) or getattr(source, "ngroups", None) or 1)
    return settings | {
        "kind": "ssd",
        "d_state": (len(filters) - d_inner) // (2 * groups),
        "headdim": d_inner // len(A_log),
        "ngroups": groups,
    }


def norm_eps(source: nn.Module) -> float:
    """The epsilon of a Mamba-2 mixer's norm; ours where it does not say."""
    for norm in source.modules():
        for name in ("variance_epsilon", "eps"):
            if isinstance(getattr(norm, name, None), float):
                return float(getattr(norm, name))
    return NORM_EPS


def _check_behaviour(source: object) -> None:
    """Refuse a mixer whose activation or whose step sizes are not ours."""
    for mixer in source.modules() if isinstance(source, nn.Module) else ():
        activation = getattr(mixer, "activation", "silu")
        if isinstance(activation, str) and activation not in ("silu", "swish"):
            raise NotSupportedError(f"the mixer's activation is {activation!r}; Mamba has SiLU only.")
        limit = getattr(mixer, "time_step_limit", getattr(mixer, "dt_limit", None))
        if limit is not None and tuple(limit) != (0.0, float("inf")):
            raise NotSupportedError(
                f"the mixer limits its step sizes to {tuple(limit)}; Mamba has no such limit."
            )


def _names(mixer: Mamba) -> dict[str, str]:
    """Their name of each tensor, and ours."""
    core = mixer.core
    if isinstance(core, S6Core) and core.selective:
        names = {name: f"core.{name}" for name in S6_NAMES} | {"dt_proj.bias": "core.dt_bias"}
    elif isinstance(core, SSDCore):
        names = {name: f"core.{name}" for name in SSD_NAMES} | {"norm.weight": "norm.weight"}
    else:
        raise NotSupportedError(
            f"transformers has no counterpart of this mixer (kind {mixer.kind!r}, {type(core).__name__}); "
            'only a selective "s6" or an "ssd" that scans forward has one.'
        )
    for projection in ("in_proj", "out_proj"):
        names |= {f"{projection}.{part}": f"{projection}.{part}" for part in ("weight", "bias")}
    own = mixer.state_dict()
    return {theirs: ours for theirs, ours in names.items() if ours in own}


def mixer_tensors(source: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a mixer, or of the only mixer in a module or a state dict, by their names in the mixer.

    Raises:
        DataError: if there is no mixer in it, or more than one.
    """
    tensors = source.state_dict() if isinstance(source, nn.Module) else source
    ends = [name for name in tensors if name == "A_log" or name.endswith(".A_log")]
    if len(ends) != 1:
        raise DataError(
            f"source holds {len(ends)} Mamba mixers; give one mixer or its state dict "
            "(MambaLM.from_pretrained takes a whole language model)."
        )
    prefix = ends[0].removesuffix("A_log")
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
