"""What is measured: accuracy, certificates and attacks, the size of explanations and their faithfulness."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from paperback.compare.bench import READING, Contender, Metric
from paperback.errors import NotSupportedError
from paperback.explain.baselines import DecisionTree, integrated_gradients
from paperback.explain.bench.contenders import Candidates, differentiable_scores
from paperback.explain.bench.data import Array, ExplainData
from paperback.explain.interface import ExplainableClassifier, Explanation
from paperback.study.budget import Budget, for_budget
from paperback.study.encoding import write_atomically
from paperback.study.measure import Stopwatch, size_on_disk
from paperback.study.stress import boundary_line_attack, projected_gradient_attack
from paperback.training import generator

SHARE = 0.9  # of all that speaks for and against a class, that an explanation's size counts
LEVELS = 10  # amounts of columns that are taken away or brought back
MOST_EXPLAINED = 500  # test rows

METRICS = (
    Metric("accuracy", "accuracy", better="higher", primary=True),
    Metric("certified_accuracy", "certified accuracy", better="higher"),
    Metric("attacked_accuracy", "accuracy under attack", better="higher"),
    Metric("broken", "broken certificates", better="lower"),
    Metric("explanation_size", "parts for 90 % of a decision", better="lower"),
    Metric("deletion", "deletion, predictions kept", better="lower"),
    Metric("insertion", "insertion, predictions kept", better="higher"),
    Metric("fit_seconds", "fit, choice of settings included", "s", better="lower", cost=True),
    Metric("explain_seconds", "explanation of 1,000 rows", "s", better="lower", cost=True),
    Metric("bytes", "model on disk", "B", better="lower", cost=True),
)


def evaluate(
    contender: Contender, data: ExplainData, budget: Budget, seed: int, out: Path
) -> Mapping[str, float | None]:
    """Fit one contender, choose its settings on the validation rows, measure it on the test rows.

    Args:
        contender: who.
        data: from `load`.
        budget: how many settings, and how strong the attacks.
        seed: of fits and attacks.
        out: folder for the model, one drawn explanation and the sentences of the report.

    Returns:
        Metric name to number, None where the contender does not have the quantity.
    """
    measured: dict[str, float | None] = dict.fromkeys(metric.name for metric in METRICS)
    with Stopwatch() as fitting:
        model, sentence = _chosen(contender.build(data, budget, seed), data)
    X, y = data.test
    labels = model.predict(X)
    measured |= {"fit_seconds": fitting.seconds, "accuracy": float((labels == y).mean())}
    measured |= _robustness(model, data, budget, seed)
    some = X[:MOST_EXPLAINED]
    with Stopwatch() as explaining:
        explanation = model.explain(some)
    measured["explain_seconds"] = 1000 * explaining.seconds / len(some)
    measured["explanation_size"] = explanation_size(explanation)
    order, source = _order_of_columns(model, explanation, data)
    sentences = [sentence, _radius_in_words(data), source]
    if order is not None:
        rng = np.random.default_rng(seed)
        found = faithfulness(model.predict, some, order, data.train[0].mean(0))
        chance = faithfulness(model.predict, some, rng.permuted(order, axis=1), data.train[0].mean(0))
        measured |= {"deletion": found.deletion, "insertion": found.insertion}
        sentences.append(
            f"Columns in random order would keep {chance.deletion:.1%} of the predictions under deletion and "
            f"{chance.insertion:.1%} under insertion."
        )
    out.mkdir(parents=True, exist_ok=True)
    measured["bytes"] = _saved(model, out / "model")
    explanation.plot(0).savefig(out / "explanation.png", dpi=120)
    write_atomically(out / READING, "\n".join(sentences) + "\n")
    return measured


def _chosen(candidates: Candidates, data: ExplainData) -> tuple[Any, str]:
    """The best on the validation rows, of equals the first; and a sentence about the choice."""
    best: tuple[float, Any, Mapping[str, Any]] | None = None
    for settings in candidates.settings:
        model: Any = candidates.make(**settings).fit(*data.train)
        accuracy = float((model.predict(data.val[0]) == data.val[1]).mean())
        if best is None or accuracy > best[0]:
            best = accuracy, model, settings
    assert best is not None
    words = ", ".join(f"{name}={value}" for name, value in best[2].items())
    n = len(candidates.settings)
    how = f"best of {n} settings" if n > 1 else "the only setting tried"
    return best[1], f"Settings: {words}, {how}, right for {best[0]:.1%} of the validation rows."


# -- robustness ----------------------------------------------------------------------------------------------


def _radius_in_words(data: ExplainData) -> str:
    unit = "pixels in 0..1" if data.bounds is not None else "standard deviations of the columns"
    return (
        f"Radius: {data.radius:.3g} in L2, of {unit}: a quarter of the usual distance from a row to the "
        "nearest of another class."
    )


def _robustness(
    model: ExplainableClassifier, data: ExplainData, budget: Budget, seed: int
) -> dict[str, float | None]:
    X, y = data.test
    right = model.predict(X) == y
    withstood = right & (model.predict(_attacked(model, data, budget, seed)) == y)
    found: dict[str, float | None] = {"attacked_accuracy": float(withstood.mean())}
    try:
        certified = right & (model.certify(X, y) >= data.radius)
    except NotSupportedError:
        return found
    return found | {
        "certified_accuracy": float(certified.mean()),
        "broken": float((certified & ~withstood).sum()),
    }


def _attacked(model: ExplainableClassifier, data: ExplainData, budget: Budget, seed: int) -> Array:
    """For each test row a point within the radius, classified otherwise if an attack found one."""
    X, labels = torch.tensor(data.test[0]), torch.tensor(_columns_of(model, data.test[1]))
    known = labels >= 0  # a class without training rows is never predicted: nothing to attack
    n_classes = len(model.classes_)
    settings: dict[str, Any] = {"radius": data.radius, "norm": 2, "bounds": data.bounds}
    settings["generator"] = generator(seed, "attack")

    def asked(x: Tensor) -> Tensor:
        return torch.from_numpy(np.asarray(model.predict_proba(x.numpy()), dtype=np.float64))

    towards = _ends_of_lines(model, data)
    n = for_budget(budget, smoke=6, quick=20, standard=50)
    points = X.clone()
    points[known] = boundary_line_attack(
        asked, X[known], labels[known], directions=n, towards=towards, **settings
    )
    scores = differentiable_scores(model)
    if scores is None:
        return points.numpy()
    steps = for_budget(budget, smoke=5, quick=20, standard=40)
    restarts = for_budget(budget, smoke=1, quick=min(4, n_classes), standard=n_classes)
    climbed = X.clone()
    climbed[known] = projected_gradient_attack(
        scores, X[known], labels[known], steps=steps, restarts=restarts, **settings
    )
    broken = torch.from_numpy(model.predict(points.numpy()) != data.test[1])
    result: Array = torch.where(broken[:, None], points, climbed).numpy()
    return result


def _ends_of_lines(model: Any, data: ExplainData) -> tuple[Tensor, Tensor]:
    """Training rows; of a tree, which lines to them seldom cross at its nearest, its counterexamples too."""
    points, labels = data.train[0], _columns_of(model, data.train[1])
    if isinstance(model, DecisionTree):
        nearest = model.counterexamples(data.test[0])
        points = np.concatenate([points, nearest])
        labels = np.concatenate([labels, np.searchsorted(model.classes_, model.predict(nearest))])
    return torch.tensor(points), torch.tensor(labels)


def _columns_of(model: Any, y: NDArray[np.int64]) -> NDArray[np.int64]:
    """Columns of the scores that belong to class indices; -1 for a class without training rows."""
    place = np.searchsorted(model.classes_, y).clip(max=len(model.classes_) - 1)
    return np.where(model.classes_[place] == y, place, -1)


# -- explanations --------------------------------------------------------------------------------------------


def explanation_size(explanation: Explanation) -> float:
    """How many parts a person has to read.

    Args:
        explanation: of some rows.

    Returns:
        The mean number of parts, the largest first, that make up 90 % of the sum of the absolute
        contributions to the predicted class's lead over the runner-up.
    """
    sizes = np.sort(np.abs(_lead(explanation)), axis=1)[:, ::-1]
    reached = sizes.cumsum(1) >= SHARE * sizes.sum(1, keepdims=True) * (1 - 1e-12)
    return float(np.where(sizes.any(1), reached.argmax(1) + 1, 0).mean())


class Faithfulness(NamedTuple):
    """Shares of predictions that stay the same, in the mean over amounts of columns.

    Attributes:
        deletion: while columns are taken away.
        insertion: while they are brought back.
    """

    deletion: float
    insertion: float


def faithfulness(
    predict: Callable[[Array], NDArray[Any]], X: Array, order: NDArray[np.int64], reference: Array
) -> Faithfulness:
    """Whether the columns that are said to decide do decide.

    Args:
        predict: rows to labels.
        X: rows ``(rows, features)``.
        order: columns of each row, those that speak most for its prediction first, ``(rows, features)``.
        reference: what stands in the place of a column that is taken away, ``(features,)``.

    Returns:
        Areas under the curves of kept predictions over the share of columns.
    """
    labels = predict(X)
    features = X.shape[1]
    amounts = np.unique(np.linspace(0, features, LEVELS + 1).round().astype(int))
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.arange(features)[None], axis=1)
    kept = [
        (
            (predict(np.where(rank < n, reference, X)) == labels).mean(),
            (predict(np.where(rank < n, X, reference)) == labels).mean(),
        )
        for n in amounts
    ]
    return Faithfulness(*(float(area) for area in np.trapezoid(kept, amounts / features, axis=0)))


def _lead(explanation: Explanation) -> Array:
    """Contributions of the parts to the lead of the predicted class over the runner-up, ``(rows, parts)``."""
    best = np.argsort(-explanation.scores, axis=1, kind="stable")
    row = np.arange(len(best))
    lead: Array = explanation.contributions[row, best[:, 0]] - explanation.contributions[row, best[:, 1]]
    return lead


def _order_of_columns(
    model: ExplainableClassifier, explanation: Explanation, data: ExplainData
) -> tuple[NDArray[np.int64] | None, str]:
    """Columns of each row by what they do for the prediction, and where that comes from; None without."""
    if explanation.parts == explanation.columns:
        return np.argsort(-_lead(explanation), axis=1, kind="stable"), (
            "Deletion and insertion follow the contributions of the explanation."
        )
    scores = differentiable_scores(model)
    if scores is None:
        return None, "Deletion and insertion: its reasons are no columns, and its scores have no gradient."
    if importlib.util.find_spec("captum") is None:
        return None, "Deletion and insertion: its reasons are no columns; paperback[explain] would find some."
    best = torch.from_numpy(np.argsort(-explanation.scores, axis=1, kind="stable")[:, :2].copy())

    def lead(x: Tensor, pair: Tensor) -> Tensor:
        found = scores(x).gather(1, pair)
        return found[:, 0] - found[:, 1]

    X, mean = torch.tensor(data.test[0][: len(best)]), torch.tensor(data.train[0].mean(0))
    relevance = integrated_gradients(lead, X, mean, arguments=(best,)).numpy()
    return np.argsort(-relevance, axis=1, kind="stable"), (
        "Deletion and insertion follow integrated gradients of its scores, for its reasons are no columns."
    )


def _saved(model: Any, folder: Path) -> float | None:
    """Bytes of the saved model; None for one that cannot be saved."""
    try:
        model.save_pretrained(folder)
    except NotSupportedError:
        return None
    return float(size_on_disk(folder))
