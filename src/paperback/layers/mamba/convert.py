"""Puts Mamba layers where a user's model has self-attention, and reports what it changed, left and why.

Known are `torch.nn.MultiheadAttention`, alone or inside torch's transformer layers, and the self-attention
modules of `transformers`; other classes are named by the caller. A layer that attends causally becomes a
forward scan, another one a bidirectional scan. The new layers are untrained: the model keeps its other
weights and has to be trained further.

Survey (arXiv 2408.01129), section 4.1: Mamba as a substitute for attention, and hybrids of the two.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from paperback.errors import NotSupportedError
from paperback.layers.interface import Conversion, LayerChange
from paperback.layers.mamba.mixer import Mamba
from paperback.study.measure import parameters
from paperback.training import seeded

MakeLayer = Callable[[nn.Module], nn.Module]


def replace_attention(
    model: nn.Module,
    *,
    scan: str | None = None,
    where: Callable[[str, nn.Module], bool] | None = None,
    also: Mapping[type[nn.Module], MakeLayer] | None = None,
    in_place: bool = False,
    seed: int = 0,
    **settings: Any,
) -> Conversion:
    """Replace the self-attention layers of a model by Mamba layers of the same width.

    Args:
        model: any module; weights of other layers stay as they are.
        scan: order of the new layers. If not given, "forward" where the old layer is known to be causal (the
            self-attention of `torch.nn.TransformerDecoderLayer`, causal ones of transformers), else
            "bidirectional".
        where: says by name and module whether a layer is to be replaced; all if not given. For a hybrid:
            ``where=lambda name, _: ".0." not in name``.
        also: classes of attention layers that are not known here, each with a function that makes the new
            layer from the old one. The new one must take the same call.
        in_place: change the model itself instead of a copy.
        seed: of the new weights.
        **settings: of `Mamba`.

    Returns:
        The model, and for every attention layer what happened to it.

    Raises:
        DataError: if a setting does not fit; the model is then as it was.
    """
    with torch.no_grad():
        target = model if in_place else copy.deepcopy(model)
    parents = dict(target.named_modules())
    changes: list[LayerChange] = []
    made: dict[int, nn.Module] = {}  # one module in several places stays one
    swaps: list[tuple[str, nn.Module]] = []
    with seeded(seed, "replace_attention"):
        for name, old in _attention_layers(target, tuple(also or ())):
            reason = _why_left(name, old, parents, where)
            if reason:
                changes.append(_report(name, old, old, "left", reason))
                continue
            if id(old) not in made:
                make = (also or {}).get(type(old))
                new = make(old) if make else _adapter(name, old, parents, scan, settings)
                made[id(old)] = _like(new, old)
            swaps.append((name, made[id(old)]))
            changes.append(_report(name, old, made[id(old)], "changed", f"new weights of seed {seed}"))
    for name, new in swaps:
        target = _swap(target, name, new)
    _leave_fast_paths(target, made)
    return Conversion(target, tuple(changes))


class MultiheadMamba(nn.Module):
    """A Mamba layer that is called as `torch.nn.MultiheadAttention` is.

    Args:
        layer: the layer.
        batch_first: whether tensors are ``(batch, length, dim)``, otherwise ``(length, batch, dim)``.
        num_heads: of the attention that was here; torch's layers ask for it.
    """

    # What torch's encoder layers look at before they take a fused kernel, which knows attention only.
    in_proj_weight = in_proj_bias = None
    _qkv_same_embed_dim = True

    def __init__(self, layer: Mamba, batch_first: bool, num_heads: int) -> None:
        super().__init__()
        self.layer, self.batch_first = layer, batch_first
        self.embed_dim, self.num_heads = layer.d_model, num_heads

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """Map the query; see `torch.nn.MultiheadAttention.forward`.

        Returns:
            The output, and None: there are no attention weights.

        Raises:
            NotSupportedError: if query, key and value are not the same tensor, or the mask is not a causal
                one over a forward scan.
        """
        if key is not query or value is not query:
            raise NotSupportedError(
                "this layer was self-attention and is now a Mamba layer: query, key and value must be the "
                "same tensor; leave cross-attention out with replace_attention(where=...)."
            )
        single = query.ndim == 2
        u = query.unsqueeze(0 if self.batch_first else 1) if single else query
        u = u if self.batch_first else u.transpose(0, 1)
        if attn_mask is not None:
            hidden = attn_mask if attn_mask.dtype == torch.bool else attn_mask < 0
            _check_honoured(~hidden.reshape(-1, *hidden.shape[-2:]), None, self.layer.causal)
        elif is_causal and not self.layer.causal:
            raise _not_causal()
        mask = None
        if key_padding_mask is not None:
            padded = key_padding_mask if key_padding_mask.dtype == torch.bool else key_padding_mask < 0
            mask = ~(padded.unsqueeze(0) if single else padded)
        out = self.layer(u, mask=mask)
        out = out if self.batch_first else out.transpose(0, 1)
        return (out.squeeze(0 if self.batch_first else 1) if single else out), None


class TransformersMamba(nn.Module):
    """A Mamba layer that is called as a self-attention module of `transformers` is.

    Args:
        layer: the layer.
        names: of the arguments of the module that was here, in their order.
    """

    def __init__(self, layer: Mamba, names: tuple[str, ...]) -> None:
        super().__init__()
        self.layer, self.names = layer, names

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Map the hidden states.

        Returns:
            The output, and None: there are no attention weights.

        Raises:
            NotSupportedError: if there is a cache with something in it, or a mask that a scan cannot honour.
        """
        given = dict(zip(self.names, args, strict=False)) | kwargs
        hidden = given["hidden_states"]
        if given.get("encoder_hidden_states") is not None:
            raise NotSupportedError("a Mamba layer has replaced self-attention; it takes no encoder states.")
        cache = next((given[key] for key in ("cache", "past_key_values") if given.get(key) is not None), None)
        if cache is not None:
            raise NotSupportedError(
                "a Mamba layer keeps nothing in the cache of transformers; "
                "call the model with use_cache=False."
            )
        return self.layer(hidden, mask=self._padding(given.get("attention_mask"), hidden)), None

    def _padding(self, mask: Tensor | None, hidden: Tensor) -> Tensor | None:
        """Real positions, from the mask (batch, length) or (batch, 1, length, length) of transformers."""
        if mask is None:
            return None
        allowed = mask if mask.dtype == torch.bool else (mask > 0 if mask.ndim == 2 else mask == 0)
        if allowed.ndim == 2:
            return allowed
        # The last position may look at every real one.
        allowed = allowed[:, 0]
        real = allowed[:, -1].expand(len(hidden), -1)
        _check_honoured(allowed, real, self.layer.causal)
        return None if bool(real.all()) else real


# -- finding -------------------------------------------------------------------------------------------------


def _attention_layers(model: nn.Module, also: tuple[type[nn.Module], ...]) -> Iterator[tuple[str, nn.Module]]:
    """Every attention layer with its name, a shared one under each of its names."""
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (nn.MultiheadAttention, *also)) or _is_of_transformers(module):
            yield name, module


def _is_of_transformers(module: nn.Module) -> bool:
    """Modules of transformers that attend say whether they are causal; those around them do not."""
    kind = type(module)
    return (
        kind.__module__.startswith("transformers.")
        and kind.__name__.endswith("Attention")
        and hasattr(module, "is_causal")
    )


def _why_left(
    name: str,
    old: nn.Module,
    parents: Mapping[str, nn.Module],
    where: Callable[[str, nn.Module], bool] | None,
) -> str:
    """Why an attention layer stays, or nothing."""
    parent = parents.get(name.rpartition(".")[0])
    if isinstance(parent, nn.TransformerDecoderLayer) and old is parent.multihead_attn:
        return "cross-attention: it reads another sequence"
    if isinstance(old, nn.MultiheadAttention) and not old._qkv_same_embed_dim:
        return "keys or values of another width: it reads another sequence"
    if getattr(old, "is_cross_attention", False) or "CrossAttention" in type(old).__name__:
        return "cross-attention: it reads another sequence"
    if _is_of_transformers(old) and not hasattr(getattr(old, "config", None), "hidden_size"):
        return "its config does not say hidden_size; name the class with also="
    return "not asked for by where=" if where is not None and not where(name, old) else ""


# -- making and putting in place -----------------------------------------------------------------------------


def _adapter(
    name: str,
    old: nn.Module,
    parents: Mapping[str, nn.Module],
    scan: str | None,
    settings: Mapping[str, Any],
) -> nn.Module:
    """The new layer for a known kind of attention."""
    parent = parents.get(name.rpartition(".")[0])
    causal = isinstance(parent, nn.TransformerDecoderLayer) or bool(getattr(old, "is_causal", False))
    order = scan or ("forward" if causal else "bidirectional")
    if isinstance(old, nn.MultiheadAttention):
        layer = Mamba(old.embed_dim, scan=order, **settings)
        return MultiheadMamba(layer, old.batch_first, old.num_heads)
    config: Any = old.config
    layer = Mamba(config.hidden_size, scan=order, **settings)
    return TransformersMamba(layer, tuple(inspect.signature(old.forward).parameters))


def _like(new: nn.Module, old: nn.Module) -> nn.Module:
    """The new layer on the device, in the precision and in the mode of the old one."""
    weight = next(old.parameters(), None)
    if weight is not None:
        new = new.to(weight.device, weight.dtype)
    return new.train(old.training)


def _swap(model: nn.Module, name: str, new: nn.Module) -> nn.Module:
    if not name:
        return new
    model.set_submodule(name, new)
    return model


def _leave_fast_paths(model: nn.Module, made: Mapping[int, nn.Module]) -> None:
    """Torch's encoder must not pack sequences for a kernel of attention, transformers not keep a cache."""
    new = {id(module) for module in made.values()}
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(id(part) in new for part in module.modules()):
            module.use_nested_tensor = False
    if any(isinstance(module, TransformersMamba) for module in made.values()):
        for name in ("config", "generation_config"):
            config = getattr(model, name, None)
            if config is not None:
                config.use_cache = False


def _report(name: str, old: nn.Module, new: nn.Module, action: Any, why: str) -> LayerChange:
    layer = getattr(new, "layer", new)
    return LayerChange(
        name, type(old).__name__, type(layer).__name__, action, why, parameters(old), parameters(new)
    )


# -- masks ---------------------------------------------------------------------------------------------------


def _check_honoured(
    allowed: Bool[Tensor, "batch asking seen"], real: Bool[Tensor, "batch seen"] | None, causal: bool
) -> None:
    """Refuse a mask that says anything but causality and padding: a scan could not keep to it.

    Args:
        allowed: what each position may look at; rows of padding do not count.
        real: positions that are no padding.
        causal: whether the layer looks at no later position.

    Raises:
        NotSupportedError: if the mask says something else, or the layer looks ahead where it may not.
    """
    asking, seen = allowed.shape[-2:]
    if asking != seen:
        raise NotSupportedError("a mask of another length than the input came from a cache; do without one.")
    honest = allowed.new_ones(asking, seen).tril() if causal else allowed.new_ones(asking, seen)
    agrees = (
        (allowed == honest) if real is None else (allowed == (honest & real[:, None])) | ~real[:, :, None]
    )
    if not bool(agrees.all()):
        if causal:
            raise NotSupportedError(
                "the attention mask is not a causal one; a forward scan can honour causality and padding "
                "only."
            )
        raise _not_causal()


def _not_causal() -> NotSupportedError:
    return NotSupportedError(
        "the attention mask hides later or other positions, and this Mamba layer looks both ways; "
        'convert with replace_attention(..., scan="forward") for causal models.'
    )
