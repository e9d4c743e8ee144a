"""The behaviour checks of the layers task.

Each check is a function of a `LayerCase`: how the layer is built, and a small input. A check raises
`AssertionError` with a sentence that says what was expected and what was found.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from paperback.errors import DataError, NotSupportedError
from paperback.layers.interface import Cost, SequenceLayer

Build = Callable[[], SequenceLayer]


@dataclass
class LayerCase:
    """A layer to be checked.

    Args:
        build: makes the layer; its weights follow torch's global seed.
        length: positions of the input, for a layer that takes one length only.
        exportable: whether torch.export is expected to take it.
        tolerance: of equalities in float32; a thousandth of it in float64.
    """

    build: Build
    length: int = 12
    exportable: bool = True
    tolerance: float = 1e-5

    def layer(self) -> SequenceLayer:
        """A fresh layer, the same each time, in evaluation mode; the caller's random state is kept."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.build().eval()

    def input(self, batch: int = 3) -> Tensor:
        """Input ``(batch, length, d_model)``, the same each time."""
        generator = torch.Generator().manual_seed(1)
        return torch.randn(batch, self.length, self.layer().d_model, generator=generator)


def check_layer(build: Build, *, length: int = 12, exportable: bool = True, tolerance: float = 1e-5) -> None:
    """Run every check of the layers task.

    Args:
        build: makes the layer; its weights follow torch's global seed.
        length: positions of the input, for a layer that takes one length only.
        exportable: whether torch.export is expected to take it.
        tolerance: see `LayerCase`.

    Raises:
        AssertionError: naming the check, what was expected and what was found.
    """
    case = LayerCase(build, length, exportable, tolerance)
    for check in LAYER_CHECKS:
        try:
            check(case)
        except AssertionError as error:
            raise AssertionError(f"{check.__name__}: {error}") from error


def _same(a: Tensor, b: Tensor, tolerance: float, what: str) -> None:
    assert a.shape == b.shape, f"{what}: shapes are {tuple(a.shape)} and {tuple(b.shape)}."
    a, b = a.detach().double(), b.detach().double()
    error = float(((a - b).abs() / (1 + b.abs())).max())
    assert error <= tolerance, f"{what}: they differ by {error:.3g}, more than {tolerance:.3g}."


# -- the checks ----------------------------------------------------------------------------------------------


def shape_is_kept(case: LayerCase) -> None:
    """``(batch, length, dim)`` goes in and comes out, finite, and the input is not written to."""
    layer, u = case.layer(), case.input()
    before = u.clone()
    y = layer(u)
    assert y.shape == u.shape, f"the output has shape {tuple(y.shape)}, the input {tuple(u.shape)}."
    assert bool(y.isfinite().all()), "the output is not finite."
    assert torch.equal(u, before), "the input was changed."


def same_seed_same_result(case: LayerCase) -> None:
    """Two layers of one seed are equal, and so are two calls."""
    first, second, u = case.layer(), case.layer(), case.input()
    assert torch.equal(first(u), second(u)), "two layers of the same seed differ."
    assert torch.equal(first(u), first(u)), "two calls on the same input differ."


def state_dict_round_trips(case: LayerCase) -> None:
    """A state dict carries a layer over whole, and a deep copy is independent."""
    layer, u = case.layer(), case.input()
    torch_state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    other = case.build().eval()
    other.load_state_dict(torch_state)
    assert torch.equal(layer(u), other(u)), "a layer with the same state dict answers differently."
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(layer(u), other(u)), "a deep copy shares parameters with its original."


def every_parameter_learns(case: LayerCase) -> None:
    """Each parameter gets a finite gradient from the sum of squares of the output."""
    layer = case.layer().train()
    layer(case.input()).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient."
        assert bool(parameter.grad.isfinite().all()), f"the gradient of {name} is not finite."


def batch_equals_loop(case: LayerCase) -> None:
    """A batch gives what its sequences give one by one."""
    layer, u = case.layer(), case.input()
    _same(torch.cat([layer(row[None]) for row in u]), layer(u), case.tolerance, "one by one and together")


def precision_moves(case: LayerCase) -> None:
    """In float64 the answer is the same, in float64; autocast to bfloat16 is near it."""
    layer, u = case.layer(), case.input()
    y = layer(u)
    double = layer.double()(u.double())
    assert double.dtype == torch.float64, f"a layer in float64 returned {double.dtype}."
    _same(y, double, 10 * case.tolerance, "float32 and float64")
    layer = case.layer()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = layer(u)
    assert bool(rough.isfinite().all()), "under autocast the output is not finite."
    error = float((rough.float() - y).norm() / y.norm())
    assert error < 0.1, f"under autocast the output is off by {error:.2g} of its norm."


def causality_is_as_said(case: LayerCase) -> None:
    """A causal layer does not look ahead, and any other does."""
    layer, u = case.layer(), case.input(1)
    changed = u.clone()
    changed[:, -1] += 1.0
    moved = bool((layer(u)[:, :-1] - layer(changed)[:, :-1]).abs().max() > 1e-6)
    assert moved != layer.causal, (
        f"causal is {layer.causal}, but the last input moves earlier outputs: {moved}."
    )


def mask_is_honoured(case: LayerCase) -> None:
    """What stands in the padding, left or right, reaches no real position; a full mask changes nothing."""
    layer, u = case.layer(), case.input()
    everything = torch.ones(u.shape[:2], dtype=torch.bool)
    _same(layer(u, mask=everything), layer(u), case.tolerance, "with a full mask and without")
    for side in ("left", "right"):
        mask = everything.clone()
        mask[:, :3] = side == "right"
        mask[:, -3:] = side == "left"
        other = torch.where(mask[..., None], u, 100.0)
        _same(
            layer(u, mask=mask)[mask], layer(other, mask=mask)[mask], case.tolerance, f"padding on the {side}"
        )


def step_equals_forward(case: LayerCase) -> None:
    """Steps one by one, and two halves with a carried state, give what one call gives."""
    layer, u = case.layer().double(), case.input().double()
    tolerance = case.tolerance / 1000
    if not layer.recurrent:
        for ask in (lambda: layer.init_state(1), lambda: layer(u, return_state=True)):
            try:
                ask()
            except NotSupportedError:
                continue
            raise AssertionError(
                "a layer that is not recurrent gave a state; it must raise NotSupportedError."
            )
        return
    whole, last = layer(u, return_state=True)
    state, outputs = layer.init_state(len(u)), []
    for u_t in u.unbind(1):
        y_t, state = layer.step(u_t, state)
        outputs.append(y_t)
    _same(torch.stack(outputs, 1), whole, tolerance, "steps and forward")
    for a, b in zip(pytree.tree_leaves(state), pytree.tree_leaves(last), strict=True):
        _same(a, b, tolerance, "the state after steps and after forward")
    half = u.shape[1] // 2
    first, state = layer(u[:, :half], return_state=True)
    second = layer(u[:, half:], state=state)
    _same(torch.cat([first, second], 1), whole, tolerance, "two halves and the whole")


def cost_is_plausible(case: LayerCase) -> None:
    """Cost is positive and grows with the length; a recurrent layer's no faster than the length."""
    layer = case.layer()
    short, long = layer.cost(case.length), layer.cost(4 * case.length)
    assert isinstance(short, Cost), f"cost returned a {type(short).__name__}."
    for name in ("flops", "bytes"):
        a, b = getattr(short, name), getattr(long, name)
        assert 0 < a < b, f"cost.{name} is {a} at length {case.length} and {b} at four times that."
    if layer.recurrent:
        one, two = layer.cost(1024), layer.cost(2048)
        assert two.flops <= 2.01 * one.flops, "a recurrent layer costs more than linearly."


def bad_input_is_refused(case: LayerCase) -> None:
    """Wrong axes, widths, dtypes and masks raise DataError."""
    layer, u = case.layer(), case.input()
    inputs: dict[str, Callable[[], object]] = {
        "an input of two axes": lambda: layer(u[0]),
        "integers": lambda: layer(u.long()),
        "another width": lambda: layer(u[..., 1:]),
        "length 0": lambda: layer(u[:, :0]),
        "a mask of integers": lambda: layer(u, mask=torch.ones(u.shape[:2], dtype=torch.int64)),
        "a mask of another shape": lambda: layer(u, mask=torch.ones(2, 2, dtype=torch.bool)),
    }
    if layer.recurrent:
        inputs["a state of another batch"] = lambda: layer(u, state=layer.init_state(len(u) + 1))
    for what, call in inputs.items():
        try:
            call()
        except DataError:
            continue
        except Exception as error:
            raise AssertionError(f"{what} raised {type(error).__name__} ({error}), not DataError.") from error
        raise AssertionError(f"{what} was accepted; it must raise DataError.")


def export_agrees(case: LayerCase) -> None:
    """torch.export takes the layer, and the exported program answers the same."""
    if not case.exportable:
        return
    layer, u = case.layer(), case.input()
    program = torch.export.export(layer, (u,))
    _same(program.module()(u), layer(u), case.tolerance, "exported and eager")


LAYER_CHECKS: tuple[Callable[[LayerCase], None], ...] = (
    shape_is_kept,
    same_seed_same_result,
    state_dict_round_trips,
    every_parameter_learns,
    batch_equals_loop,
    precision_moves,
    causality_is_as_said,
    mask_is_honoured,
    step_equals_forward,
    cost_is_plausible,
    bad_input_is_refused,
    export_agrees,
)
