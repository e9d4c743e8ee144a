"""The behaviour checks of the density task.

Each check is a function of a `DensityCase`: how the model is built, and a tiny data set on which every sum
can be written out. A check raises `AssertionError` with a sentence that says what was expected and what was
found.
"""

from __future__ import annotations

import contextlib
import copy
import io
import math
import socket
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from paperback.density.interface import Classifying, DensityModel, Interval
from paperback.errors import DataError, NotSupportedError
from paperback.numerics.enumeration import joint_states, log_partition, log_probabilities, marginals

Build = Callable[[int], DensityModel]

MOST_STATES = 4096  # joint states of the check data
N_ROWS = 12  # rows that most checks look at
N_SAMPLES = 4000


@dataclass
class DensityCase:
    """A model to be checked.

    Args:
        build: from a seed to a model that is not fitted.
        X: states ``(batch, variables)`` int64, at least 12 rows, at most 4,096 joint states.
        y: labels, for a model with a class variable.
        fit: settings of `fit` that make it quick.
        tolerance: of "a batch equals its rows one by one" and of "the same answer in float64" (there 100
            times as much). A model that answers by random sampling needs more than the default.
    """

    build: Build
    X: Tensor
    y: Tensor | None = None
    fit: Mapping[str, Any] = field(default_factory=dict)
    tolerance: float = 1e-5

    def fitted(self) -> DensityModel:
        """A fresh model, fitted to copies of the data."""
        return self.fit_on(self.X.clone(), None if self.y is None else self.y.clone())

    def fit_on(self, X: Tensor, y: Tensor | None) -> DensityModel:
        """A fresh model, fitted without progress bar to data that it may spoil."""
        model = self.build(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return model.fit(X, y, seed=0, progress=False, **self.fit)

    @cached_property
    def model(self) -> DensityModel:
        """A fitted model that the checks share; none of them changes it."""
        model = self.fitted()
        states = math.prod(model.n_states)
        assert states <= MOST_STATES, (
            f"the check data have {states} joint states; give data with at most {MOST_STATES}."
        )
        assert len(self.X) >= N_ROWS, f"the check data have {len(self.X)} rows; give at least {N_ROWS}."
        return model

    @property
    def rows(self) -> Tensor:
        """The rows that are asked about."""
        return self.X[:N_ROWS].clone()

    @property
    def observed(self) -> Tensor:
        """A mask for them: some of everything, one row with nothing, one with all."""
        mask = torch.rand(self.rows.shape, generator=torch.Generator().manual_seed(1)) < 0.5
        mask[0], mask[1] = False, True
        return mask


def check_density_model(
    build: Build,
    X: Tensor,
    y: Tensor | None = None,
    *,
    fit: Mapping[str, Any] | None = None,
    tolerance: float = 1e-5,
) -> None:
    """Run every check of the density task.

    Args:
        build: from a seed to a model that is not fitted.
        X: states ``(batch, variables)`` int64, at least 12 rows, at most 4,096 joint states.
        y: labels, for a model with a class variable.
        fit: settings of `fit` that make it quick.
        tolerance: see `DensityCase`.

    Raises:
        AssertionError: naming the check, what was expected and what was found.
    """
    case = DensityCase(build, X, y, fit or {}, tolerance)
    for check in DENSITY_CHECKS:
        try:
            check(case)
        except AssertionError as error:
            raise AssertionError(f"{check.__name__}: {error}") from error


def _supports(model: DensityModel, operation: str) -> bool:
    return model.capabilities.as_dict()[operation] != "none"


def _answers(model: DensityModel, X: Tensor, observed: Tensor, *, complete: bool = True) -> dict[str, Tensor]:
    """What the model says about the observed part of some rows and, if not told otherwise, the whole."""
    answers: dict[str, Tensor] = {}
    if _supports(model, "conditional"):
        answers["conditional"] = model.conditional(X, observed)
    if _supports(model, "classify") and isinstance(model, Classifying):
        answers["predict_proba"] = model.predict_proba(X, observed)
    for name, mask in (("log_prob", None), ("marginal", observed)):
        if _supports(model, name) and (complete or mask is not None):
            log_prob = model.log_prob(X, mask)
            if isinstance(log_prob, Interval):
                answers |= {f"{name} lower": log_prob.lower, f"{name} upper": log_prob.upper}
            else:
                answers[name] = log_prob
    return answers


def _same(a: Mapping[str, Tensor], b: Mapping[str, Tensor], tolerance: float, what: str) -> None:
    assert a.keys() == b.keys(), f"{what}: answers {sorted(a)} became {sorted(b)}."
    for name, value in a.items():
        assert value.shape == b[name].shape, (
            f"{what}: {name} has shape {tuple(value.shape)} and {tuple(b[name].shape)}."
        )
        scale = 1.0 + value.double().abs()
        error = (
            float(((value.double() - b[name].double().to(value.device)).abs() / scale).max())
            if value.numel()
            else 0.0
        )
        assert error <= tolerance, f"{what}: {name} differs by {error:.3g}, more than {tolerance:.3g}."


@contextlib.contextmanager
def _no_network() -> Iterator[None]:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the model opened a network connection; it must work without one.")

    names = ("connect", "connect_ex", "sendto")
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(socket.socket, name, refuse))
        stack.enter_context(mock.patch.object(socket, "getaddrinfo", refuse))
        yield


# -- the checks ----------------------------------------------------------------------------------------------


def same_seed_same_result(case: DensityCase) -> None:
    """One seed, one model; sampling follows its generator; the user's random state is left alone."""
    before = torch.get_rng_state()
    case.build(0)
    built = torch.get_rng_state()
    torch.set_rng_state(before)
    model = case.fitted()
    assert torch.equal(torch.get_rng_state(), built), (
        "fit draws from torch's global random state; use a generator."
    )
    first, second = case.model.state_dict(), model.state_dict()
    assert first.keys() == second.keys(), "two fits with one seed gave different sets of tensors."
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), f"two fits with one seed differ in {name}."
    if _supports(model, "sample"):
        draws = [model.sample(50, torch.Generator().manual_seed(s)) for s in (3, 3, 4)]
        assert torch.equal(draws[0], draws[1]), "two samples with generators of one seed differ."
        assert not torch.equal(draws[0], draws[2]), "samples with generators of different seeds are equal."


def save_and_load_are_equal(case: DensityCase) -> None:
    """A saved model comes back the same in every answer."""
    with tempfile.TemporaryDirectory() as folder:
        case.model.save_pretrained(f"{folder}/model")
        loaded = type(case.model).from_pretrained(f"{folder}/model")
    assert loaded.capabilities == case.model.capabilities, "the loaded model has other capabilities."
    assert loaded.n_states == case.model.n_states, "the loaded model has other n_states."
    _same(
        _answers(case.model, case.rows, case.observed),
        _answers(loaded, case.rows, case.observed),
        1e-7,
        "save and load",
    )


def batch_equals_loop(case: DensityCase) -> None:
    """A batch is answered as its rows one by one."""
    whole = _answers(case.model, case.rows, case.observed)
    parts = [_answers(case.model, x[None], m[None]) for x, m in zip(case.rows, case.observed, strict=True)]
    _same(
        whole,
        {name: torch.cat([part[name] for part in parts]) for name in whole},
        case.tolerance,
        "batch and loop",
    )


def input_is_unchanged(case: DensityCase) -> None:
    """Neither data nor mask are written to."""
    X, y = case.X.clone(), None if case.y is None else case.y.clone()
    model = case.fit_on(X, y)
    rows, observed = case.rows, case.observed
    before = (rows.clone(), observed.clone())
    _answers(model, rows, observed)
    if _supports(model, "sample_conditional"):
        model.complete(rows, observed, how="sample")
    assert torch.equal(X, case.X), "fit changed X."
    assert y is None or case.y is None or torch.equal(y, case.y), "fit changed y."
    assert torch.equal(rows, before[0]), "a query changed X."
    assert torch.equal(observed, before[1]), "a query changed the mask."


def completion_keeps_what_is_observed(case: DensityCase) -> None:
    """Observed entries come back untouched, the others are states; shape and dtype are those of X."""
    model, rows, observed = case.model, case.rows.to(torch.int16), case.observed
    limit = torch.tensor(model.n_states)
    hows = ["mode", "mean"] + (["sample"] if _supports(model, "sample_conditional") else [])
    for how in hows:
        filled = model.complete(rows, observed, how=how)  # type: ignore[arg-type]
        assert filled.shape == rows.shape, f"complete(how={how!r}) returned shape {tuple(filled.shape)}."
        assert torch.equal(filled[observed].double(), rows[observed].double()), (
            f"complete(how={how!r}) changed an observed entry."
        )
        assert bool(((filled >= 0) & (filled <= limit - 1)).all()), (
            f"complete(how={how!r}) returned a state out of range."
        )
        expected = torch.float32 if how == "mean" else rows.dtype
        assert filled.dtype == expected, f"complete(how={how!r}) returned {filled.dtype}, not {expected}."
    if "sample" not in hows:
        _raises(
            NotSupportedError, "complete(how='sample')", lambda: model.complete(rows, observed, how="sample")
        )


def conditionals_are_distributions(case: DensityCase) -> None:
    """Conditionals sum to one, keep to states that exist, and depend on observed entries only."""
    model, rows, observed = case.model, case.rows, case.observed
    p = model.conditional(rows, observed)
    assert p.shape == (*rows.shape, model.max_states), f"conditional returned shape {tuple(p.shape)}."
    assert bool((p >= 0).all()), "a conditional probability is negative or NaN."
    error = float((p.sum(-1) - 1).abs().max())
    assert error < 1e-4, f"conditionals sum to one only up to {error:.2g}."
    known = torch.nn.functional.one_hot(rows, model.max_states).to(p)
    assert torch.equal(p[observed], known[observed]), "conditionals are not one-hot at observed entries."
    assert not bool(p.masked_select(~model.valid.to(p.device)).any()), (
        "a state that its variable does not have got probability."
    )
    garbage = torch.where(observed, rows, 10_000)
    given, changed = (_answers(model, x, observed, complete=False) for x in (rows, garbage))
    _same(given, changed, 0.0, "other unobserved entries")


def event_shape_is_kept(case: DensityCase) -> None:
    """Rows may have any event shape; the answers keep it."""
    model, rows, observed = case.model, case.rows, case.observed
    flat = model.conditional(rows, observed)
    shaped = model.conditional(rows[:, None, :], observed[:, None, :])
    assert shaped.shape == (len(rows), 1, model.n_variables, model.max_states), (
        f"conditional returned shape {tuple(shaped.shape)}."
    )
    assert torch.equal(shaped[:, 0], flat), "the event shape changes the conditional."
    completed = model.complete(rows[:, None, :], observed[:, None, :])
    assert completed.shape == (len(rows), 1, model.n_variables), (
        f"complete returned shape {tuple(completed.shape)}."
    )


def precision_and_device_move(case: DensityCase) -> None:
    """The model answers in float64 after ``double()``, and on a GPU if there is one."""
    reference = _answers(case.model, case.rows, case.observed)
    double = copy.deepcopy(case.model).double()
    answers = _answers(double, case.rows, case.observed)
    for name, value in answers.items():
        assert value.dtype == torch.float64, f"{name} of a float64 model is {value.dtype}."
    _same(reference, answers, 100 * case.tolerance, "float32 and float64")
    if torch.cuda.is_available():
        moved = _answers(copy.deepcopy(case.model).cuda(), case.rows, case.observed)
        _same(reference, moved, 100 * case.tolerance, "CPU and GPU")


def bad_inputs_are_refused(case: DensityCase) -> None:
    """What cannot be used raises `DataError`, in words."""
    model, rows, observed = case.model, case.rows, case.observed
    too_high = rows.clone()
    too_high[3, 1] = model.n_states[1]
    known = torch.ones_like(observed)
    queries: list[tuple[str, Callable[[], Any]]] = [
        ("floating X", lambda: model.conditional(rows.float(), observed)),
        ("boolean X", lambda: model.conditional(rows.bool(), observed)),
        ("a state out of range", lambda: model.conditional(too_high, known)),
        ("a negative state", lambda: model.conditional(rows - 100, known)),
        ("too few variables", lambda: model.conditional(rows[:, 1:], observed[:, 1:])),
        ("X without a batch dimension", lambda: model.conditional(rows[0], observed[0])),
        ("a mask of another shape", lambda: model.conditional(rows, observed[:-1])),
        ("an integer mask", lambda: model.conditional(rows, observed.long())),
        ("an unknown how", lambda: model.complete(rows, observed, how="guess")),  # type: ignore[arg-type]
        ("zero samples", lambda: model.sample(0)),
        ("fit on floating X", lambda: case.fit_on(case.X.float(), case.y)),
        ("fit on a state out of range", lambda: case.fit_on(too_high.clone(), _head(case.y, len(too_high)))),
        ("fit on no rows", lambda: case.fit_on(case.X[:0].clone(), _head(case.y, 0))),
    ]
    if case.y is not None and model.n_classes is not None:
        labels = case.y.clone()
        labels[0] = model.n_classes
        queries += [
            ("fit on too few labels", lambda: case.fit_on(case.X.clone(), labels[1:])),
            ("fit on a label out of range", lambda: case.fit_on(case.X.clone(), labels)),
        ]
    for what, query in queries:
        _raises(DataError, what, query)


def _head(y: Tensor | None, n: int) -> Tensor | None:
    return None if y is None else y[:n]


def _raises(kind: type[Exception], what: str, query: Callable[[], Any]) -> None:
    try:
        query()
    except kind as error:
        message = str(error)
    except Exception as error:  # the check is that nothing else is raised
        raise AssertionError(
            f"{what} raises {type(error).__name__} ({error}); expected {kind.__name__}."
        ) from error
    else:
        raise AssertionError(f"{what} is taken without complaint; expected {kind.__name__}.")
    assert len(message.split()) > 3, f"{what} raises {kind.__name__} without saying why ({message!r})."


def capabilities_are_truthful(case: DensityCase) -> None:
    """What is called exact is, bounds hold, and what is called none raises `NotSupportedError`."""
    model, rows, observed = case.model, case.rows, case.observed
    capabilities = model.capabilities.as_dict()
    assert set(capabilities.values()) <= {"exact", "bound", "estimate", "none"}, (
        f"unknown capability in {capabilities}."
    )
    whole = torch.ones_like(observed)
    raising: dict[str, Callable[[], Any]] = {
        "log_prob": lambda: model.log_prob(rows),
        "marginal": lambda: model.log_prob(rows, observed),
        "conditional": lambda: model.conditional(rows, observed),
        "sample": lambda: model.sample(2),
        "sample_conditional": lambda: model.complete(rows, observed, how="sample"),
    }
    if isinstance(model, Classifying):
        raising["classify"] = lambda: model.predict_proba(rows, whole)
    for name, query in raising.items():
        if capabilities[name] == "none":
            _raises(NotSupportedError, f"{name} (capability none)", query)
    if capabilities["log_prob"] in ("exact", "bound"):
        _check_likelihood(case)
    if capabilities["log_prob"] == "exact":
        _check_against_enumeration(case)


def _check_likelihood(case: DensityCase) -> None:
    """An exact likelihood sums to one; bounds sum to at most and at least one."""
    every = torch.cat(list(joint_states(case.model.n_states)))
    log_prob = case.model.log_prob(every)
    if isinstance(log_prob, Interval):
        assert bool((log_prob.lower <= log_prob.upper).all()), "a lower bound lies above its upper bound."
        low, high = float(log_prob.lower.double().exp().sum()), float(log_prob.upper.double().exp().sum())
        assert low <= 1 + 1e-4, f"lower bounds of all probabilities sum to {low:.5g}, more than one."
        assert high >= 1 - 1e-4, f"upper bounds of all probabilities sum to {high:.5g}, less than one."
        return
    total = float(log_prob.double().exp().sum())
    assert abs(total - 1) < 1e-4, f"the probabilities of all states sum to {total:.6g}, not to one."


def _check_against_enumeration(case: DensityCase) -> None:
    """Marginals, conditionals and samples that are called exact, against sums over the exact likelihood."""
    model, rows, observed = case.model, case.rows, case.observed
    capabilities = model.capabilities

    def log_weight(states: Tensor) -> Tensor:
        log_prob = model.log_prob(states)
        assert isinstance(log_prob, Tensor)
        return log_prob.double()

    clamps = torch.where(observed, rows, -1)
    if capabilities.marginal == "exact":
        expected = torch.stack([log_partition(log_weight, model.n_states, clamp=clamp) for clamp in clamps])
        found = model.log_prob(rows, observed)
        assert isinstance(found, Tensor), "a marginal that is called exact came as bounds."
        _same({"marginal": expected}, {"marginal": found}, 1e-4, "enumeration")
    if capabilities.conditional == "exact":
        expected = torch.stack([marginals(log_weight, model.n_states, clamp=clamp) for clamp in clamps])
        _same(
            {"conditional": expected}, {"conditional": model.conditional(rows, observed)}, 1e-4, "enumeration"
        )
    if capabilities.sample == "exact":
        truth = log_probabilities(log_weight, model.n_states).exp()
        distance = _total_variation(
            model.sample(N_SAMPLES, torch.Generator().manual_seed(0)), truth, model.n_states
        )
        # Expected distance of a sample of this size from its own distribution, and a quarter as much again.
        limit = 1.25 * float((truth * (1 - truth) / (2 * math.pi * N_SAMPLES)).sqrt().sum()) + 0.005
        assert distance < limit, (
            f"samples are at total variation {distance:.3g} from the likelihood; chance explains {limit:.3g}."
        )


def _total_variation(states: Tensor, probabilities: Tensor, n_states: tuple[int, ...]) -> float:
    index = torch.zeros(len(states), dtype=torch.int64)
    for i, k in enumerate(n_states):
        index = index * k + states[:, i]
    share = torch.bincount(index, minlength=len(probabilities)) / len(states)
    return 0.5 * float((share - probabilities).abs().sum())


def samples_are_states(case: DensityCase) -> None:
    """Samples have the right shape, dtype and range."""
    model = case.model
    if not _supports(model, "sample"):
        return
    drawn = model.sample(20, torch.Generator().manual_seed(0))
    assert drawn.shape == (20, model.n_variables), f"sample(20) returned shape {tuple(drawn.shape)}."
    assert drawn.dtype == torch.int64, f"sample returned {drawn.dtype}, not int64."
    assert bool(((drawn >= 0) & (drawn < torch.tensor(model.n_states))).all()), (
        "a sample has a state out of range."
    )


def classification_is_a_distribution(case: DensityCase) -> None:
    """Class probabilities sum to one and `predict` takes the largest."""
    model = case.model
    if not (isinstance(model, Classifying) and _supports(model, "classify")):
        return
    assert isinstance(model, DensityModel)
    p = model.predict_proba(case.rows, case.observed)
    assert p.shape == (len(case.rows), model.n_classes), f"predict_proba returned shape {tuple(p.shape)}."
    assert float((p.sum(1) - 1).abs().max()) < 1e-4, "class probabilities do not sum to one."
    assert torch.equal(model.predict(case.rows, case.observed), p.argmax(1)), (
        "predict is not the most probable class."
    )


def progress_can_be_silenced(case: DensityCase) -> None:
    """With ``progress=False`` nothing is printed, and no query prints anything."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        model = case.fitted()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _answers(model, case.rows, case.observed)
    assert not out.getvalue(), f"printed to stdout: {out.getvalue()[:80]!r}."
    assert not err.getvalue(), f"printed to stderr: {err.getvalue()[:80]!r}."


def no_network_is_needed(case: DensityCase) -> None:
    """Fitting, asking, saving and loading open no connection."""
    with _no_network(), tempfile.TemporaryDirectory() as folder:
        model = case.fitted()
        _answers(model, case.rows, case.observed)
        model.save_pretrained(f"{folder}/model")
        type(model).from_pretrained(f"{folder}/model")


DENSITY_CHECKS: tuple[Callable[[DensityCase], None], ...] = (
    same_seed_same_result,
    save_and_load_are_equal,
    batch_equals_loop,
    input_is_unchanged,
    completion_keeps_what_is_observed,
    conditionals_are_distributions,
    event_shape_is_kept,
    precision_and_device_move,
    bad_inputs_are_refused,
    capabilities_are_truthful,
    samples_are_states,
    classification_is_a_distribution,
    progress_can_be_silenced,
    no_network_is_needed,
)
