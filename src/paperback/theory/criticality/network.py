"""What the theory sees in a module: its layers of weights, in order, and the activation that feeds each.

Linear and convolutional layers are layers of weights. An activation is any leaf module that acts elementwise.
With an input the order is that in which the modules are called, without one that in which they were
registered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import batchnorm, instancenorm
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from paperback.errors import DataError, NotSupportedError
from paperback.numerics.kernels import Function
from paperback.theory.criticality.analysis import Criticality

WEIGHT_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMALISED = (
    batchnorm._BatchNorm, instancenorm._InstanceNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm,
    nn.LocalResponseNorm,
)  # fmt: skip
# Parameter-free leaves that leave the flow of a signal as it is, or are no function of one number.
PASSIVE = (nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd)
NOT_ELEMENTWISE = (nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Softmax2d, nn.GLU, nn.MultiheadAttention)


@dataclass(frozen=True, eq=False)
class WeightLayer:
    """A layer of weights and what feeds it.

    Attributes:
        name: in the model.
        module: Linear or Conv.
        fan_in: inputs that one output sums over; with an input known, zero padding counts for the part of
            its positions that see the image.
        fed_by: name of the activation before it, "data" or "linear".
        theory: the theory of that activation; None for the data.
        input_square: of a layer fed by data with an input known: the mean square of what its outputs sum
            over; else 1, as of standardised data.
        outputs: neurons.
    """

    name: str
    module: nn.Module
    fan_in: float
    fed_by: str
    theory: Criticality | None
    input_square: float
    outputs: int


def read_layers(
    model: nn.Module,
    x: Tensor | None,
    activation: Function | None,
    residual: float,
) -> tuple[list[WeightLayer], list[tuple[str, str]]]:
    """The layers of weights that the theory covers, and the modules with parameters that it leaves.

    Args:
        model: any module without normalisation layers.
        x: an input batch, ``(rows, ...)``, or None.
        activation: feeds every layer but the first; if not given it is read from the modules.
        residual: gamma of the skips around the layers.

    Returns:
        Layers in the order of their calls, and pairs of name and reason.

    Raises:
        NotSupportedError: if the model has normalisation layers.
        DataError: if there is no layer of weights or no activation, or weights are not initialised.
    """
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if isinstance(module, NORMALISED):
            raise NotSupportedError(
                f"{name or 'the model'} is a {type(module).__name__}, which is not covered: normalised "
                "layers have no kernel flow of this form; give a model without them."
            )
    left, closed = _left(model)
    weighted = [
        name
        for name, module in modules.items()
        if isinstance(module, WEIGHT_LAYERS) and not any(_is_within(name, whole) for whole in closed)
    ]
    if not weighted:
        raise DataError("the model has no Linear or Conv layer whose weights could be read or set.")
    active = [] if activation is not None else [n for n, m in modules.items() if _is_activation(m)]
    if activation is None and not active and len(weighted) > 1:
        raise DataError("the model has no activation module; say activation=..., for instance torch.relu.")
    inputs: dict[str, Tensor] = {}
    order = list(modules) if x is None else _calls(model, x, [*weighted, *active], weighted, inputs)
    theories: dict[str, Criticality] = {}
    feeds = _feeds(modules, order, weighted, active, activation, x is not None)
    layers = []
    for name, feed in feeds:
        module = modules[name]
        if feed is not None and feed[0] not in theories:
            theories[feed[0]] = Criticality(feed[1], residual=residual)
        fan_in, square = _fan_in(module, inputs.get(name), data=feed is None)
        theory = None if feed is None else theories[feed[0]]
        label = "data" if feed is None else feed[0]
        layers.append(WeightLayer(name, module, fan_in, label, theory, square, module.weight.shape[0]))
    return layers, left


def _left(model: nn.Module) -> tuple[list[tuple[str, str]], list[str]]:
    """Modules with parameters of their own that are not touched, and why; and the names of those layers.

    The names are those whose weights must not be set, each standing for all that is inside it.
    """
    left: list[tuple[str, str]] = []
    closed: list[str] = []
    for name, module in model.named_modules():
        if any(_is_within(name, whole) for whole in closed):
            continue
        reason = ""
        if isinstance(module, nn.MultiheadAttention | nn.RNNBase):
            reason = f"{type(module).__name__} is not covered by the theory"
        elif isinstance(module, WEIGHT_LAYERS):
            reason = _reason_to_leave(name, module)
        if reason:
            left.append((name, reason))
            closed.append(name)
        elif _has_own_parameters(module) and not (
            isinstance(module, WEIGHT_LAYERS) or _is_activation(module)
        ):
            left.append((name, f"parameters of {type(module).__name__} are not covered by the theory"))
    return left, closed


def _has_own_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))


def _reason_to_leave(name: str, layer: nn.Module) -> str:
    weight = layer._parameters.get("weight")
    if isinstance(weight, UninitializedParameter):
        raise DataError(f"layer {name!r} is lazy and has no weights yet; run one batch through it first.")
    if weight is None or parametrize.is_parametrized(layer, "weight"):
        return "its weight is computed from other parameters"
    return "" if weight.requires_grad else "its weight is frozen"


def _is_within(name: str, whole: str) -> bool:
    return name == whole or not whole or name.startswith(f"{whole}.")


def _is_activation(module: nn.Module) -> bool:
    """Whether a module without children acts on every number by itself."""
    if any(module.children()) or isinstance(module, (*WEIGHT_LAYERS, *PASSIVE, *NOT_ELEMENTWISE)):
        return False
    if module.__module__ == nn.modules.activation.__name__:
        return sum(p.numel() for p in module.parameters()) <= 1  # PReLU with one slope
    if any(True for _ in module.parameters()) or module.__module__.startswith("torch.nn.modules"):
        return False
    probe = torch.linspace(-3.0, 3.0, 24)
    try:
        with torch.no_grad():
            value, part = module(probe), module(probe[::2])
    except Exception:  # whatever a user's module does with an input of another kind: it is no activation
        return False
    return isinstance(value, Tensor) and value.shape == probe.shape and torch.allclose(value[::2], part)


def _calls(
    model: nn.Module, x: Tensor, watched: Sequence[str], weighted: Sequence[str], inputs: dict[str, Tensor]
) -> list[str]:
    """The names in the order in which they are called; `inputs` gets what goes into the layers of weights."""
    order: list[str] = []
    handles = []
    modules = dict(model.named_modules())

    def hook(name: str) -> None:
        def before(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            order.append(name)
            if name in weighted and name not in inputs:
                inputs[name] = arguments[0].detach().clone()

        handles.append(modules[name].register_forward_pre_hook(before))

    flags = [(module, module.training) for module in model.modules()]
    try:
        for name in watched:
            hook(name)
        model.eval()
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
        for module, flag in flags:
            module.training = flag
    missing = [name for name in weighted if name not in order]
    if missing:
        raise DataError(
            f"layer {missing[0]!r} is not called when the model runs on x; remove it or freeze it."
        )
    return order


Feed = tuple[str, Function] | None


def _feeds(
    modules: dict[str, nn.Module],
    order: Sequence[str],
    weighted: Sequence[str],
    active: Sequence[str],
    activation: Function | None,
    called: bool,
) -> list[tuple[str, Feed]]:
    """For each layer of weights, at its first call, the activation that was called since the one before."""
    given: Feed = None if activation is None else (_name(activation), activation)
    kinds = {repr(modules[name]): modules[name] for name in active}
    if given is None and not called and len(kinds) == 1:
        given = (_name(*kinds.values()), next(iter(kinds.values())))
    if given is not None:
        names = list(dict.fromkeys(name for name in order if name in weighted))
        return [(name, given if i else None) for i, name in enumerate(names)]
    if not called and kinds:
        raise DataError(
            f"the model has {len(kinds)} kinds of activations, {', '.join(kinds)}; give x, so that their "
            "order can be seen."
        )
    result: dict[str, Feed] = {}
    last: Feed = None
    for name in order:
        if name in weighted:
            result.setdefault(name, last)
            last = ("linear", _identity)
        elif name in active:
            module = modules[name]
            last = (repr(module), module)
    return list(result.items())


def _identity(z: Tensor) -> Tensor:
    return z


def _name(function: Function) -> str:
    return (
        repr(function) if isinstance(function, nn.Module) else getattr(function, "__name__", repr(function))
    )


def _fan_in(module: nn.Module, given: Tensor | None, data: bool) -> tuple[float, float]:
    """Inputs that an output sums over, and their mean square when they are the data."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    fan_in = weight[0].numel()
    if given is None:
        return float(fan_in), 1.0
    if isinstance(module, nn.Linear):
        return float(fan_in), float(given.double().square().mean()) if data else 1.0
    seen = _positions_seen(module, torch.ones_like(given[:1]))
    square = _positions_seen(module, given.square()) / seen if data else 1.0
    return fan_in * seen, square


def _positions_seen(convolution: Any, squares: Tensor) -> float:
    """The mean over output positions of the mean over a patch; zero padding counts as zero."""
    c = convolution
    patch = type(c)(
        1, 1, c.kernel_size, c.stride, c.padding, c.dilation, bias=False, padding_mode=c.padding_mode,
        dtype=torch.float64,
    )  # fmt: skip
    with torch.no_grad():
        patch.weight.fill_(1 / patch.weight.numel())
        return float(patch(squares.double().cpu().mean(-len(c.kernel_size) - 1, keepdim=True)).mean())
