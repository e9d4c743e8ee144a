"""Where codebooks are put: what goes into or comes out of named sub-modules.

For the transformers of `transformers` the paper's placements have names of their own: "attn_preproj" (each
head's mix of values, before the output projection), "mlp" (the MLP's output, before it is added to the
residual stream), "transformer_block" (the output of a block) and "preresidual" (all that a block adds to the
stream).
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from paperback.errors import DataError
from paperback.explain.codebook_features.inputs import first, run

At = Literal["output", "input", "update"]
Placement = Literal["attn_preproj", "mlp", "transformer_block", "preresidual"]
PLACEMENTS: tuple[Placement, ...] = get_args(Placement)

# Inside a block: the linear layer behind the heads in Llama and its kin, GPT-2, GPT-NeoX, OPT.
PROJECTIONS = ("self_attn.o_proj", "attn.c_proj", "attention.dense", "self_attn.out_proj")


@dataclass(frozen=True)
class Site:
    """One place for a codebook.

    Args:
        name: of the sub-module, as `named_modules` has it.
        at: "output": what the module gives (the first, where it gives several). "input": its first argument.
            "update": its output minus its input, for a block with a residual connection.
        groups: slices with a codebook each; the heads, at the input of an output projection.
        n_codes: codes of each group; the model's common number if not given.
        k: codes of a vector; the model's common number if not given.
        dim: width of the activation; found out if not given.
    """

    name: str
    at: At = "output"
    groups: int = 1
    n_codes: int | None = None
    k: int | None = None
    dim: int | None = None


def find_sites(
    model: nn.Module,
    sites: str | Sequence[str | Site],
    layers: Sequence[int] | None = None,
) -> tuple[Site, ...]:
    """Sites in full, from names, placements or "auto".

    Args:
        model: the model.
        sites: "auto" (the placements "attn_preproj" and "mlp"), a placement, the name of a sub-module (its
            output), a `Site`, or several of these.
        layers: numbers of the blocks that placements are meant for, counted from 0; all if not given.

    Raises:
        DataError: if a name does not exist, or the model's blocks are not of a kind that is known.
    """
    wanted = [sites] if isinstance(sites, str | Site) else list(sites)
    wanted = [s for w in wanted for s in (("attn_preproj", "mlp") if w == "auto" else (w,))]
    found: list[Site] = []
    for want in wanted:
        if isinstance(want, str) and want in PLACEMENTS:
            found += _of_placement(model, want, layers)
        else:
            found.append(want if isinstance(want, Site) else Site(want))
    if not found:
        raise DataError("sites is empty; name at least one sub-module or placement.")
    modules = dict(model.named_modules(remove_duplicate=False))
    for site in found:
        if site.name not in modules or site.name == "":
            near = difflib.get_close_matches(site.name, list(modules), 5, 0.3)
            raise DataError(
                f"the model has no sub-module {site.name!r}; near to it are {', '.join(map(repr, near))}."
                if near
                else f"the model has no sub-module {site.name!r}; named_modules() lists those that it has."
            )
        if site.at not in get_args(At):
            raise DataError(
                f"site {site.name!r} is at {site.at!r}; it must be one of {', '.join(get_args(At))}."
            )
    names = [site.name for site in found]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"sites name {twice!r} twice; a sub-module can have one codebook.")
    return tuple(found)


def _of_placement(model: nn.Module, placement: str, layers: Sequence[int] | None) -> list[Site]:
    blocks = _blocks(model)
    if layers is not None:
        wrong = [layer for layer in layers if not 0 <= layer < len(blocks)]
        if wrong:
            raise DataError(f"layers names {wrong[0]}; the model has {len(blocks)} blocks, counted from 0.")
        blocks = [blocks[layer] for layer in layers]
    if placement == "mlp":
        return [Site(f"{block}.mlp") for block, _ in blocks]
    if placement == "transformer_block":
        return [Site(block) for block, _ in blocks]
    if placement == "preresidual":
        return [Site(block, "update") for block, _ in blocks]
    heads = getattr(getattr(model, "config", None), "num_attention_heads", None)
    if not isinstance(heads, int):
        raise DataError("the model's config has no num_attention_heads; name the sites with their groups.")
    return [Site(f"{block}.{projection}", "input", heads) for block, projection in blocks]


def _blocks(model: nn.Module) -> list[tuple[str, str]]:
    """Blocks of a transformer with their output projections, in their order."""
    found = _find_blocks(model)
    if not found:
        raise DataError(
            f"{type(model).__name__} has no blocks with an mlp and one of {', '.join(PROJECTIONS)}; "
            "name the sub-modules that get codebooks."
        )
    return found


def _find_blocks(model: nn.Module) -> list[tuple[str, str]]:
    modules = dict(model.named_modules())
    return [
        (name.removesuffix(f".{projection}"), projection)
        for name in modules
        for projection in PROJECTIONS
        if name.endswith(f".{projection}") and f"{name.removesuffix(f'.{projection}')}.mlp" in modules
    ]


def width(model: nn.Module, site: Site, example: Any | None) -> int:
    """Width of the activation at a site: as given, from a linear layer or the config, or from an example.

    Raises:
        DataError: if it cannot be found out, or the activation is no tensor ``(..., dim)``.
    """
    if site.dim is not None:
        return site.dim
    module = model.get_submodule(site.name)
    if isinstance(module, nn.Linear):
        return module.in_features if site.at == "input" else module.out_features
    config = getattr(model, "config", None)
    if type(module).__name__ == "Conv1D" and site.at == "input":  # GPT-2's linear layer, transposed
        return len(module.weight)  # type: ignore[arg-type]
    blocks = [block for block, _ in _find_blocks(model)]
    if config is not None and site.name in [*blocks, *(f"{block}.mlp" for block in blocks)]:
        return int(config.hidden_size)
    if example is None:
        raise DataError(
            f"the width of site {site.name!r} is not known beforehand; give an example input, or "
            "Site(dim=...)."
        )
    seen: list[Any] = []
    handle = module.register_forward_hook(
        lambda _, args, kwargs, out: seen.append(carried(site, args, kwargs, out)), with_kwargs=True
    )
    try:
        with torch.no_grad():
            run(model, example)
    finally:
        handle.remove()
    if not seen:
        raise DataError(f"site {site.name!r} was not called by the model; leave it out.")
    return int(seen[0].shape[-1])


def carried(site: Site, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor:
    """The activation at a site, from what its module took and gave.

    Raises:
        DataError: if it is no floating-point tensor with a batch dimension.
    """
    given = first(args) if args else kwargs.get("hidden_states")
    value = given if site.at == "input" else first(output)
    if site.at == "update" and isinstance(value, Tensor) and isinstance(given, Tensor):
        value = value - given
    if not isinstance(value, Tensor) or value.ndim < 2 or not value.is_floating_point():
        what = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise DataError(
            f"the {site.at} of site {site.name!r} is {what}; a codebook needs floating-point numbers "
            "(..., dim)."
        )
    return value
