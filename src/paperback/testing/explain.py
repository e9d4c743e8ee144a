"""The behaviour checks of the explain task: what every classifier that gives its reasons keeps to.

Each check is a function of an `ExplainCase`: how the classifier is built, and a small data set. A check
raises `AssertionError` with a sentence that says what was expected and what was found. Scikit-learn's own
estimator checks say the rest about `fit` and `predict`.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from paperback.errors import NotSupportedError
from paperback.explain.interface import ExplainableClassifier, Explanation
from paperback.study.stress import boundary_line_attack
from paperback.testing.density import _no_network, _raises

Build = Callable[[int], ExplainableClassifier]
Array = NDArray[Any]

N_ROWS = 12  # rows that most checks look at
WITHIN = 0.999  # part of a certified radius that an attack may use


@dataclass
class ExplainCase:
    """A classifier to be checked.

    Args:
        build: from a seed to a classifier that is not fitted; it should fit within a second.
        X: rows ``(rows, features)`` float64, at least 12.
        y: integer labels ``(rows,)`` of two classes or more.
        norm: of the certificate: 1, 2 or inf.
        tolerance: of "a batch equals its rows one by one", relative to the greatest score.
    """

    build: Build
    X: Array
    y: Array
    norm: float = 2
    tolerance: float = 1e-6

    def fitted(self, X: Array | None = None, y: Array | None = None) -> Any:
        """A fresh classifier with seed 0, fitted to copies of the data or to other data."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows = self.X.copy() if X is None else X
            return self.build(0).fit(rows, self.y.copy() if y is None else y)

    @cached_property
    def model(self) -> Any:
        """A fitted classifier that the checks share; none of them changes it."""
        assert len(self.X) >= N_ROWS, f"the check data have {len(self.X)} rows; give at least {N_ROWS}."
        return self.fitted()

    @property
    def rows(self) -> Array:
        """The rows that are asked about, of several classes."""
        order = np.argsort(np.random.default_rng(0).permutation(len(self.X)))
        return self.X[order[:N_ROWS]].copy()


def check_explainer(build: Build, X: Array, y: Array, *, norm: float = 2, tolerance: float = 1e-6) -> None:
    """Run every check of the explain task.

    Args:
        build: from a seed to a classifier that is not fitted; it should fit within a second.
        X: rows ``(rows, features)`` float64, at least 12.
        y: integer labels ``(rows,)`` of two classes or more.
        norm: of the certificate: 1, 2 or inf.
        tolerance: see `ExplainCase`.

    Raises:
        AssertionError: naming the check, what was expected and what was found.
    """
    case = ExplainCase(build, np.asarray(X, dtype=float), np.asarray(y), norm, tolerance)
    for check in EXPLAIN_CHECKS:
        try:
            check(case)
        except AssertionError as error:
            raise AssertionError(f"{check.__name__}: {error}") from error


# -- the checks ----------------------------------------------------------------------------------------------


def same_seed_same_result(case: ExplainCase) -> None:
    """One seed, one classifier; the user's random numbers are left alone."""
    before, numpy_before = torch.get_rng_state(), _numpy_state()
    again = case.fitted()
    _same(case.model.explain(case.rows), again.explain(case.rows), 0.0, "two fits with one seed")
    assert torch.equal(torch.get_rng_state(), before), "fit draws from torch's global random state."
    assert _numpy_state() == numpy_before, "fit draws from numpy's global random state."


def explanations_are_of_the_prediction(case: ExplainCase) -> None:
    """Contributions add up (`Explanation` checks that), and the greatest score is what `predict` says."""
    model, rows = case.model, case.rows
    found = model.explain(rows)
    assert isinstance(found, Explanation), f"explain returned {type(found).__name__}, not an Explanation."
    assert np.array_equal(found.classes, model.classes_), "the explanation has other classes."
    assert np.isfinite(found.contributions).all(), "a contribution is not finite."
    predicted = model.predict(rows)
    assert np.array_equal(found.prediction, predicted), "the explanation is of another prediction."
    assert len(set(found.parts)) == len(found.parts), "two parts of an explanation have one name."
    assert np.array_equal(np.asarray(found.inputs, dtype=float).reshape(len(rows), -1), rows), (
        "the explanation holds other rows than those it was asked about."
    )
    unknown = set(found.pictures) - set(found.parts)
    assert not unknown, f"there is a picture of {sorted(unknown)[:1]}, which is no part."


def probabilities_agree_with_predict(case: ExplainCase) -> None:
    """Class probabilities sum to one and the greatest is predicted."""
    p = case.model.predict_proba(case.rows)
    assert p.shape == (len(case.rows), len(case.model.classes_)), f"predict_proba returned shape {p.shape}."
    assert bool((p >= 0).all()), "a probability is negative or NaN."
    assert np.abs(p.sum(1) - 1).max() < 1e-6, "class probabilities do not sum to one."
    own = p[np.arange(len(p)), np.searchsorted(case.model.classes_, case.model.predict(case.rows))]
    assert bool((own >= p.max(1) - 1e-9).all()), "predict is not the most probable class."


def batch_equals_loop(case: ExplainCase) -> None:
    """A batch is explained as its rows one by one."""
    whole = case.model.explain(case.rows)
    for i, row in enumerate(case.rows):
        _same(_only(whole, i), case.model.explain(row[None]), case.tolerance, f"row {i} in a batch and alone")


def input_is_unchanged(case: ExplainCase) -> None:
    """Neither rows nor labels are written to."""
    X, y = case.X.copy(), case.y.copy()
    model = case.fitted(X, y)
    rows = case.rows
    model.predict_proba(rows)
    model.explain(rows)
    _radii(model, rows)
    assert np.array_equal(X, case.X), "fit changed X."
    assert np.array_equal(y, case.y), "fit changed y."
    assert np.array_equal(rows, case.rows), "a query changed X."


def labels_may_be_words(case: ExplainCase) -> None:
    """Strings as labels give the same classifier, which answers in strings."""
    labels, codes = np.unique(case.y, return_inverse=True)
    words = np.array([f"class {i:03}" for i in range(len(labels))])
    model = case.fitted(y=words[codes])
    expected = words[np.searchsorted(labels, case.model.predict(case.rows))]
    assert np.array_equal(model.predict(case.rows), expected), "labels in words give other predictions."
    assert np.array_equal(model.explain(case.rows).prediction, expected), (
        "the explanation does not answer in the labels that were given."
    )


def certificates_hold(case: ExplainCase) -> None:
    """No point within a radius is classified otherwise; a wrong label has no radius."""
    model, rows = case.model, case.rows
    radii = _radii(model, rows)
    if radii is None:
        return
    assert radii.shape == (len(rows),), f"certify returned shape {radii.shape} for {len(rows)} rows."
    assert bool((radii >= 0).all()), "the radius of a row's own prediction is negative or NaN."
    explained = model.explain(rows).certificates
    assert explained is not None, "certify gives radii and explain leaves them out."
    assert np.allclose(explained, radii), "explain and certify give different radii."
    predicted = np.searchsorted(model.classes_, model.predict(rows))
    wrong = model.classes_[(predicted + 1) % len(model.classes_)]
    assert bool((model.certify(rows, wrong) <= 0).all()), "a row has a radius for a class it does not get."

    def scores(x: Tensor) -> Tensor:
        return torch.tensor(model.predict_proba(x.numpy()), dtype=x.dtype)

    spread = 10 * float(np.abs(case.X).max() + 1)
    reached = boundary_line_attack(
        scores,
        torch.tensor(rows),
        torch.tensor(predicted),
        radius=torch.tensor(WITHIN * np.minimum(radii, spread)),
        norm=case.norm,
        directions=30,
        generator=torch.Generator().manual_seed(0),
    )
    broken = int((model.predict(reached.numpy()) != model.predict(rows)).sum())
    assert not broken, f"{broken} of {len(rows)} certified rows were classified otherwise within the radius."


def interventions_are_asked_for(case: ExplainCase) -> None:
    """Setting nothing changes nothing; a classifier without parts to set says so."""
    labels = _unless_refused("intervene", lambda: case.model.intervene(case.rows, {}))
    assert labels is None or np.array_equal(labels, case.model.predict(case.rows)), (
        "an intervention that sets nothing changed a prediction."
    )


def save_and_load_are_equal(case: ExplainCase) -> None:
    """A saved classifier comes back the same in every answer; one that cannot be saved says why."""
    with tempfile.TemporaryDirectory() as folder:
        saved = _unless_refused("saving", lambda: case.model.save_pretrained(f"{folder}/model") or True)
        if saved is None:
            return
        loaded = type(case.model).from_pretrained(f"{folder}/model")
    _same(case.model.explain(case.rows), loaded.explain(case.rows), 1e-12, "save and load")
    assert np.array_equal(case.model.predict(case.rows), loaded.predict(case.rows)), (
        "the loaded classifier predicts otherwise."
    )
    assert loaded.get_params().keys() == case.model.get_params().keys(), (
        "the loaded one has other parameters."
    )


def bad_inputs_are_refused(case: ExplainCase) -> None:
    """What cannot be used raises a ValueError (`DataError` is one), in words."""
    model, rows = case.model, case.rows
    holed = rows.copy()
    holed[3, 0] = np.nan
    queries: list[tuple[str, Callable[[], Any]]] = [
        ("NaN in X", lambda: model.predict(holed)),
        ("NaN in X to explain", lambda: model.explain(holed)),
        ("infinite X", lambda: model.explain(np.where(np.isnan(holed), np.inf, holed))),
        ("another number of columns", lambda: model.predict(rows[:, 1:])),
        ("one row without a batch dimension", lambda: model.explain(rows[0])),
        ("no rows", lambda: model.explain(rows[:0])),
        ("a classifier that is not fitted", lambda: case.build(0).predict(rows)),
        ("a classifier that is not fitted, to explain", lambda: case.build(0).explain(rows)),
        ("fit on NaN", lambda: case.fitted(holed, case.y[: len(holed)])),
        ("fit on too few labels", lambda: case.fitted(y=case.y[1:])),
        ("fit on one class", lambda: case.fitted(y=np.zeros(len(case.X), dtype=int))),
        ("fit on real targets", lambda: case.fitted(y=np.linspace(0, 1, len(case.X)))),
    ]
    for what, query in queries:
        _raises(ValueError, what, query)


def explanations_can_be_shown(case: ExplainCase) -> None:
    """Every row has a table whose last line is the score, and a figure."""
    found = case.model.explain(case.rows)
    for row in range(len(found)):
        table = found.table(row)
        total, score = table["contribution"][:-1].sum(), table["contribution"].iloc[-1]
        size = float(np.abs(table["contribution"]).max())
        assert abs(total - score) <= 1e-5 * (1 + size), (
            f"the table of row {row} does not add up to its score."
        )
    image = io.BytesIO()
    found.plot(0).savefig(image, format="png", dpi=40)
    assert image.getbuffer().nbytes > 500, "the figure is empty."


def silent_and_without_network(case: ExplainCase) -> None:
    """Fitting and asking print nothing and open no connection."""
    out, err = io.StringIO(), io.StringIO()
    with _no_network(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        model = case.fitted()
        model.predict_proba(case.rows)
        model.explain(case.rows)
    assert not out.getvalue(), f"printed to stdout: {out.getvalue()[:80]!r}."
    assert not err.getvalue(), f"printed to stderr: {err.getvalue()[:80]!r}."


EXPLAIN_CHECKS: tuple[Callable[[ExplainCase], None], ...] = (
    same_seed_same_result,
    explanations_are_of_the_prediction,
    probabilities_agree_with_predict,
    batch_equals_loop,
    input_is_unchanged,
    labels_may_be_words,
    certificates_hold,
    interventions_are_asked_for,
    save_and_load_are_equal,
    bad_inputs_are_refused,
    explanations_can_be_shown,
    silent_and_without_network,
)


# -- helpers -------------------------------------------------------------------------------------------------


def _numpy_state() -> tuple[bytes, int]:
    """Of numpy's global generator."""
    state = np.random.get_state(legacy=False)["state"]  # noqa: NPY002 (to see that nobody draws from it)
    return state["key"].tobytes(), state["pos"]


def _radii(model: Any, rows: Array) -> Array | None:
    """None where the method gives no guarantee."""
    radii: Array | None = _unless_refused("certify", lambda: model.certify(rows))
    return radii


def _unless_refused(what: str, query: Callable[[], Any]) -> Any:
    """The answer, or None if the classifier says in words that it has none."""
    try:
        return query()
    except NotSupportedError as error:
        reason = str(error)
    assert len(reason.split()) > 3, f"{what} is refused without a reason ({reason!r})."
    return None


def _only(whole: Explanation, row: int) -> Explanation:
    """The explanation of one row of several."""
    assert whole.offsets is not None
    return Explanation(
        classes=whole.classes,
        scores=whole.scores[[row]],
        contributions=whole.contributions[[row]],
        parts=whole.parts,
        inputs=whole.inputs[row : row + 1],
        offsets=whole.offsets[[row]],
    )


def _same(a: Explanation, b: Explanation, tolerance: float, what: str) -> None:
    """Equal scores, and equal contributions of each part; a part that one has not contributes nothing."""
    size = float(np.abs(a.scores).max()) + float(np.abs(a.contributions).max(initial=0.0))
    error = float(np.abs(a.scores - b.scores).max())
    assert error <= tolerance * size, f"{what}: scores differ by {error:.3g}."
    names = sorted({*a.parts, *b.parts})
    error = float(np.abs(_aligned(a, names) - _aligned(b, names)).max(initial=0.0))
    assert error <= tolerance * size, f"{what}: contributions differ by {error:.3g}."


def _aligned(explanation: Explanation, names: list[str]) -> Array:
    place = {name: i for i, name in enumerate(names)}
    result = np.zeros((*explanation.scores.shape, len(names)))
    result[:, :, [place[part] for part in explanation.parts]] = explanation.contributions
    return result
