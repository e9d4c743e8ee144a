"""Measures the flow of real networks: thousands of draws of the weights, run together under vmap.

For every layer: K = E z^2; V / (n K^2) from pairs of neurons, E[z_i^2 z_j^2] / K^2 - 1; the excess kurtosis
E z^4 / (3 K^2) - 1, which theory says is the same number; chi_par from an input and a slightly longer one,
chi_perp from an input and a slightly turned one, in the same networks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

from paperback.errors import DataError
from paperback.theory.criticality.flow import Flow
from paperback.theory.criticality.network import WEIGHT_LAYERS
from paperback.theory.interface import Measurement, t_interval
from paperback.training import generator, seeded

LONGER, TURNED = 1.01, 0.02  # the factor, and the angle, of the inputs beside each input
FLOATS = 2**23  # of weights and activations that are worked on at once

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class NetworkSample:
    """What each of many networks does to the inputs.

    Attributes:
        names: of the layers, in the order of their calls.
        second: mean z^2 over neurons, ``(networks, inputs, layers)``.
        fourth: mean z^4 over neurons.
        pairs: mean z_i^2 z_j^2 over pairs of neurons, i != j; NaN where a layer has one neuron.
        longer: mean z^2 for the input times `LONGER`.
        turned: mean squared difference between the input and the input turned by `TURNED`.
    """

    names: tuple[str, ...]
    second: Array
    fourth: Array
    pairs: Array
    longer: Array
    turned: Array


def measure_flow(
    make_model: Callable[[], nn.Module],
    x: Tensor,
    n_models: int = 1000,
    layers: Literal["preactivations"] | Sequence[str] = "preactivations",
    seed: int = 0,
    *,
    ensemble: tuple[float, float] | None = None,
    prediction: Flow | None = None,
    progress: bool = True,
) -> Measurement:
    """Measure kernel, four-point vertex, kurtosis and susceptibilities of an ensemble of networks.

    Args:
        make_model: builds a network with freshly drawn weights, from torch's global random numbers.
        x: inputs ``(inputs, ...)``, none of them zero; what is reported is the mean over them.
        n_models: networks, >= 2.
        layers: names of the layers; "preactivations" are the outputs of all Linear and Conv layers.
        seed: of the weights.
        ensemble: (C_b, C_W): draw the weights of all Linear and Conv layers as N(0, C_W / fan_in), the biases
            as N(0, C_b), stack by stack; `make_model` is then called once. If not given, it is called for
            every network.
        prediction: what theory says of these layers; it is drawn and tabulated beside the measurement.
        progress: show a bar.

    Returns:
        K with 95 % intervals over networks, one entry per layer; its parts are "V/(n K^2)", "kurtosis",
        "chi_par" and "chi_perp" (entry l: from layer l to l + 1).

    Raises:
        DataError: if an argument is out of range, an input is zero, the layers do not exist, or the
            prediction has another number of layers.
    """
    sample = sample_networks(make_model, x, n_models, layers, seed, ensemble=ensemble, progress=progress)
    depth = len(sample.names)
    if prediction is not None and len(prediction.K) != depth:
        raise DataError(f"the prediction has {len(prediction.K)} layers, the networks have {depth}.")
    vertex = None if prediction is None else prediction.relative_vertex
    K = sample.second.mean(0)
    bias = "Deep networks have heavy tails: the interval is too narrow where the value is near 1 or above."
    index = list(range(1, depth + 1))
    parts = {}
    for name, quartic in (("V/(n K^2)", sample.pairs), ("kurtosis", sample.fourth / 3)):
        ratio = quartic.mean(0) / K**2
        influence = quartic / K**2 - 2 * ratio * sample.second / K
        parts[name] = _of_influence(name, ratio - 1, influence, vertex, index, bias)
    for name, signal in (("chi_par", sample.longer - sample.second), ("chi_perp", sample.turned)):
        before, after = signal[..., :-1], signal[..., 1:]
        ratio = after.mean(0) / before.mean(0)
        influence = (after - ratio * before) / before.mean(0)
        expected = None if prediction is None else getattr(prediction, name)[:-1]
        parts[name] = _of_influence(name, ratio, influence, expected, index[:-1], "")
    return Measurement.from_samples(
        "K",
        sample.second.mean(1),
        prediction=None if prediction is None else prediction.next_order,
        index=index,
        axis="layer",
        notes=(f"Layers {', '.join(sample.names)}.",),
        parts=parts,
    )


def _of_influence(
    name: str, value: Array, influence: Array, prediction: Array | None, index: Sequence[int], bias: str
) -> Measurement:
    """A function of means, averaged over the inputs; its error is that of its influence function."""
    n = len(influence)
    error = influence.mean(1).std(0, ddof=1) / np.sqrt(n)
    mean = value.mean(0)
    return Measurement(
        name, mean, t_interval(mean, error, n - 1), n=n, standard_error=error, prediction=prediction,
        index=index, axis="layer", bias=bias,
    )  # fmt: skip


def sample_networks(
    make_model: Callable[[], nn.Module],
    x: Tensor,
    n_models: int,
    layers: Literal["preactivations"] | Sequence[str] = "preactivations",
    seed: int = 0,
    *,
    ensemble: tuple[float, float] | None = None,
    progress: bool = True,
) -> NetworkSample:
    """Run many networks on the same inputs; see `measure_flow` for the arguments.

    Returns:
        Their moments, network by network.

    Raises:
        DataError: as `measure_flow`.
    """
    if n_models < 2:
        raise DataError(f"n_models is {n_models}; an interval needs at least 2 networks.")
    if ensemble is not None and not (ensemble[0] >= 0 and ensemble[1] > 0):
        raise DataError(f"ensemble is {ensemble}; C_b must be >= 0 and C_W > 0.")
    template = _build(make_model, seed, 0).eval()
    names = _names(template, layers)
    inputs = _with_neighbours(x, seed)
    order, floats = _dry_run(template, names, inputs)
    floats += sum(p.numel() for p in template.parameters())
    chunk = max(1, min(n_models, FLOATS // floats))
    starts = range(0, n_models, chunk)
    draw = _stacks(make_model, template, ensemble, seed, n_models, chunk)
    rows = []
    for _, state in zip(track(starts, "networks", disable=not progress), draw, strict=False):
        rows.append(_moments(_forward(template, names, order, state, inputs), len(x)))
    moments = [torch.cat(parts).numpy() for parts in zip(*rows, strict=True)]
    return NetworkSample(tuple(order), *moments)


# -- the ensemble --------------------------------------------------------------------------------------------


def _build(make_model: Callable[[], nn.Module], seed: int, i: int) -> nn.Module:
    with seeded(seed, "network", i):
        model = make_model()
    if not isinstance(model, nn.Module):
        raise DataError(f"make_model gives a {type(model).__name__}; it must build a torch module.")
    return model


State = tuple[dict[str, Tensor], dict[str, Tensor]]


def _stacks(
    make_model: Callable[[], nn.Module],
    template: nn.Module,
    ensemble: tuple[float, float] | None,
    seed: int,
    n_models: int,
    chunk: int,
) -> Iterator[State]:
    """Parameters and buffers of `chunk` networks at a time, stacked."""
    source = generator(seed, "ensemble")
    for start in range(0, n_models, chunk):
        n = min(chunk, n_models - start)
        if ensemble is None:
            state = stack_module_state([_build(make_model, seed, i) for i in range(start, start + n)])
            yield ({k: v.detach() for k, v in state[0].items()}, state[1])
            continue
        deviations = {}
        for name, module in template.named_modules():
            if isinstance(module, WEIGHT_LAYERS):
                dot = f"{name}." if name else ""
                deviations[f"{dot}weight"] = (ensemble[1] / module.weight[0].numel()) ** 0.5
                deviations[f"{dot}bias"] = ensemble[0] ** 0.5
        yield (
            {
                name: torch.randn(n, *p.shape, generator=source).mul_(deviations[name])
                if name in deviations
                else p.detach().expand(n, *p.shape)
                for name, p in template.named_parameters()
            },
            {name: b.expand(n, *b.shape) for name, b in template.named_buffers()},
        )


def _names(template: nn.Module, layers: Literal["preactivations"] | Sequence[str]) -> list[str]:
    modules = dict(template.named_modules())
    if layers == "preactivations":
        names = [name for name, module in modules.items() if isinstance(module, WEIGHT_LAYERS)]
        if not names:
            raise DataError("the model has no Linear or Conv layer; name the layers to be measured.")
        return names
    unknown = [name for name in layers if name not in modules]
    if unknown or not layers:
        raise DataError(
            f"layers names {unknown or 'nothing'}; the model has {', '.join(map(repr, modules))}."
        )
    return list(layers)


def _with_neighbours(x: Tensor, seed: int) -> Tensor:
    """Each input, the input made longer, and the input turned: ``(3 inputs, ...)``."""
    flat = x.detach().flatten(1).float()
    norm = flat.norm(dim=1, keepdim=True)
    if len(x) == 0 or not (norm > 0).all() or not flat.isfinite().all():
        raise DataError("x must hold at least one input, all of them finite and different from zero.")
    if flat.shape[1] < 2:
        raise DataError("x has one number per input; an angle needs two or more.")
    side = torch.randn(flat.shape, generator=generator(seed, "directions"))
    side -= (side * flat).sum(1, keepdim=True) / norm.square() * flat
    side *= norm / side.norm(dim=1, keepdim=True)
    turned = np.cos(TURNED) * flat + np.sin(TURNED) * side
    return torch.cat([flat, LONGER * flat, turned]).view(-1, *x.shape[1:])


# -- running it ----------------------------------------------------------------------------------------------


def _watch(
    template: nn.Module, names: Sequence[str], seen: dict[str, Tensor]
) -> list[torch.utils.hooks.RemovableHandle]:
    def hook(name: str) -> Callable[..., None]:
        def after(module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
            if name in seen:
                raise DataError(f"layer {name!r} is called twice in a pass; name the layers to be measured.")
            neurons_last = isinstance(module, nn.Linear) or output.ndim == 2
            seen[name] = output.clone() if neurons_last else output.movedim(1, -1).clone()

        return after

    return [template.get_submodule(name).register_forward_hook(hook(name)) for name in names]


def _dry_run(template: nn.Module, names: Sequence[str], inputs: Tensor) -> tuple[list[str], int]:
    """The order of the calls, and the number of activations of one network."""
    seen: dict[str, Tensor] = {}
    handles = _watch(template, names, seen)
    try:
        with torch.no_grad():
            template(inputs)
    finally:
        for handle in handles:
            handle.remove()
    if missing := [name for name in names if name not in seen]:
        raise DataError(f"layer {missing[0]!r} is not called when the model runs on x; leave it out.")
    return list(seen), sum(tensor.numel() for tensor in seen.values())


def _forward(
    template: nn.Module, names: Sequence[str], order: Sequence[str], state: State, inputs: Tensor
) -> list[Tensor]:
    """Activations of stacked networks, ``(networks, inputs, ..., neurons)`` for each layer."""
    seen: dict[str, Tensor] = {}

    def one(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.clear()
        functional_call(template, (parameters, buffers), (inputs,))
        return dict(seen)

    handles = _watch(template, names, seen)
    try:
        with torch.no_grad():
            result = torch.vmap(one)(*state)
    finally:
        seen.clear()
        for handle in handles:
            handle.remove()
    return [result[name] for name in order]


def _moments(activations: Sequence[Tensor], n_inputs: int) -> tuple[Tensor, ...]:
    """Second and fourth moment, pairs, longer and turned inputs: ``(networks, inputs, layers)`` each."""
    columns = []
    for z in activations:
        here, longer, turned = z.double().split(n_inputs, 1)
        n, square = z.shape[-1], here.square()
        second, fourth = square.mean(-1), square.square().mean(-1)
        pairs = (n * second.square() - fourth) / (n - 1) if n > 1 else torch.full_like(second, torch.nan)
        distance = (turned - here).square().mean(-1)
        found = (second, fourth, pairs, longer.square().mean(-1), distance)
        columns.append([value.flatten(2).mean(2) if value.ndim > 2 else value for value in found])
    return tuple(torch.stack(column, -1) for column in zip(*columns, strict=True))
