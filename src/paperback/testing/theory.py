"""The behaviour checks of the theory task: what every function that returns a measurement keeps to.

A check raises `AssertionError` with a sentence that says what was expected and what was found.
"""

from __future__ import annotations

import contextlib
import io
import socket
from collections.abc import Callable
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from paperback.theory.interface import Measurement

Measure = Callable[[int], Measurement]


def check_measurement(measure: Measure, *, model: nn.Module | None = None, seeded: bool = True) -> None:
    """Run every check on a function that measures.

    Args:
        measure: from a seed to a measurement, without progress bar; a few seconds at most, for it is called
            four times.
        model: what is measured, if a model is: it must be left as it is.
        seeded: whether the measurement draws random numbers; another seed then gives another value.

    Raises:
        AssertionError: saying what was expected and what was found.
    """
    before = _state(model)
    torch.manual_seed(0)
    random_state = torch.get_rng_state()
    output = io.StringIO()
    with (
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
        mock.patch.object(socket.socket, "connect", side_effect=AssertionError("the network was asked for.")),
    ):
        first, again = measure(0), measure(0)
    assert not output.getvalue(), f"a silent measurement printed {output.getvalue()[:60]!r}."
    assert torch.equal(random_state, torch.get_rng_state()), "the user's global random state was touched."
    for quantity in (first, *first.parts.values()):
        _check_quantity(quantity)
    _check_equal(first, again, "the same seed gave another result")
    if seeded:
        other = measure(1)
        assert not np.array_equal(other.value, first.value), "another seed gave the same result."
    else:
        _check_equal(first, measure(1), "a measurement without random numbers depends on the seed")
    _check_shown(first)
    after = _state(model)
    assert before.keys() == after.keys(), "the measured model lost or gained entries."
    for name, value in before.items():
        assert torch.equal(value, after[name]), f"the measured model was changed at {name}."


def _state(model: nn.Module | None) -> dict[str, Tensor]:
    """Weights, training flags and the number of hooks."""
    if model is None:
        return {}
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    for name, module in model.named_modules():
        hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
        state[f"{name} (training flag and hooks)"] = torch.tensor([int(module.training), hooks])
    return state


def _check_quantity(quantity: Measurement) -> None:
    assert isinstance(quantity, Measurement), f"expected a Measurement, found {type(quantity).__name__}."
    name, value = quantity.name, np.asarray(quantity.value)
    assert name, "a measurement has no name."
    assert not np.isinf(value).any(), f"{name} is infinite."
    if quantity.interval is not None:
        low, high = (np.asarray(end) for end in quantity.interval)
        finite = np.isfinite(value)
        slack = 1e-12 + 1e-9 * np.abs(value[finite])
        inside = (low[finite] <= value[finite] + slack) & (value[finite] <= high[finite] + slack)
        assert inside.all(), f"{name} lies outside its own interval."
    if quantity.standard_error is not None:
        error = np.asarray(quantity.standard_error)
        assert not (error < 0).any(), f"{name} has a negative standard error."
    assert all(isinstance(note, str) and note for note in quantity.notes), f"{name} has an empty note."


def _check_equal(first: Measurement, second: Measurement, complaint: str) -> None:
    assert first.parts.keys() == second.parts.keys(), f"{complaint}: other parts."
    for name in (first.name, *first.parts):
        a, b = np.asarray(first[name].value), np.asarray(second[name].value)
        assert np.array_equal(a, b, equal_nan=True), f"{complaint}: {name} is {a} and {b}."


def _check_shown(measurement: Measurement) -> None:
    rows = sum(np.size(quantity.value) for quantity in (measurement, *measurement.parts.values()))
    table = measurement.table()
    assert len(table) == rows, f"the table has {len(table)} rows for {rows} numbers."
    assert str(measurement).startswith(measurement.name), (
        "the measurement in words does not begin with its name."
    )
    image = io.BytesIO()
    measurement.plot().savefig(image, format="png", dpi=40)
    assert image.getbuffer().nbytes > 500, "the figure is empty."
