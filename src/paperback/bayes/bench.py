"""How Bayesian methods are compared: by the law they predict for a target, not only by its middle.

The data are a table with a target, a number or a class; columns of categories are one-hot. Few rows are the
point of these methods, so training rows are few: 200 under a quick budget, 1,000 under a standard one. Every
contender gets the same. The negative log density of test targets is primary. For numbers it is in nats of
the standardised target, so that it does not depend on its unit.

Calibration of numbers is the mean absolute difference between the levels 5, 10, ... 95 % and the shares of
test targets that lie below those quantiles; of classes it is the expected calibration error over ten bins of
confidence. An interval of 90 % is between the quantiles at 5 and 95 %.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

from paperback.compare.bench import Bench, Contender, Kind, Metric
from paperback.data import tables
from paperback.data.dataset import Dataset
from paperback.data.encoding import as_numbers
from paperback.errors import DataError, NotSupportedError
from paperback.saving import SavedEstimator
from paperback.study.budget import Budget, for_budget
from paperback.study.measure import Stopwatch

LEVELS = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
INTERVALS = (50, 90, 95)
SMALLEST = 1e-12  # probability of a class: a wrong certainty costs 28 nats, not infinitely many

METRICS = (
    Metric("nlpd", "negative log predictive density, nats", "nats", better="lower", primary=True),
    Metric("rmse", "root mean squared error, standard deviations", better="lower"),
    Metric("accuracy", "accuracy", better="higher"),
    Metric("calibration", "calibration error", better="lower"),
    *(Metric(f"coverage_{p}", f"coverage of {p} % intervals", better="neither") for p in INTERVALS),
    Metric("fit_seconds", "seconds to fit", "s", better="lower", cost=True),
    Metric("predict_seconds", "seconds to predict the test rows", "s", better="lower", cost=True),
)


@dataclass(frozen=True, eq=False)
class BayesData:
    """A table with a target, as numbers.

    Attributes:
        dataset: where it is from.
        X: training rows, validation rows included, ``(rows, features)`` float64.
        y: their targets: standardised numbers, or class indices.
        X_test: test rows.
        y_test: their targets, in the same units.
        columns: names of the features.
        n_classes: number of classes, None for numbers.
    """

    dataset: Dataset
    X: NDArray[np.float64]
    y: NDArray[Any]
    X_test: NDArray[np.float64]
    y_test: NDArray[Any]
    columns: tuple[str, ...]
    n_classes: int | None


def load(path: Path | None, target: str | None, budget: Budget, seed: int) -> BayesData:
    """The diamonds with the logarithm of their price, or the user's table.

    Args:
        path: a table; None for the diamonds.
        target: the column to predict; needed with a path.
        budget: larger budgets use more rows.
        seed: of the split.

    Returns:
        The data.

    Raises:
        DataError: naming the file, the place and the remedy.
    """
    if path is None:
        dataset = tables.diamonds(seed, log_target=True)
    else:
        dataset = tables.read(path, target, seed, labels="required")
    n_train = for_budget(budget, smoke=60, quick=200, standard=1000, full=2000)
    n_test = for_budget(budget, smoke=40, quick=500, standard=2000, full=10_000)
    parts = (dataset.train, dataset.val)
    x = pd.concat([part.x for part in parts], ignore_index=True).head(n_train)
    y = np.concatenate([np.asarray(part.y) for part in parts])[:n_train]
    (X, X_test), columns = as_numbers(x, dataset.test.x.head(n_test))
    y_test = np.asarray(dataset.test.y)[:n_test]
    n_classes = len(dataset.classes) or None
    if n_classes is None:
        shift, scale = y.mean(), y.std()
        if not scale > 0:
            raise DataError(f"the {len(y)} training rows all have the target {y[0]:g}; it must vary.")
        y, y_test = (y - shift) / scale, (y_test - shift) / scale
    elif len(np.unique(y)) < n_classes:
        missing = sorted(set(range(n_classes)) - set(np.unique(y)))[0]
        raise DataError(
            f"class {dataset.classes[missing]} is not among the {len(y)} training rows of budget {budget}; "
            "take a larger budget or join rare classes."
        )
    return BayesData(dataset, X, y, X_test, y_test, columns, n_classes)


def evaluate(
    contender: Contender, data: BayesData, budget: Budget, seed: int, out: Path
) -> Mapping[str, float | None]:
    """Fit one contender, measure it on the test rows, and save its predictions under `out`."""
    model = contender.build(data, budget, seed)
    with warnings.catch_warnings(), Stopwatch() as fitting:
        warnings.simplefilter("ignore")  # of optimisers that stop early; the numbers show it
        model.fit(data.X, data.y)
    out.mkdir(parents=True, exist_ok=True)
    measured: dict[str, float | None] = {metric.name: None for metric in METRICS}
    measure = measure_numbers if data.n_classes is None else measure_classes
    with Stopwatch() as predicting, torch.no_grad():
        predicted = model.predict_distribution(data.X_test) if data.n_classes is None else None
        predicted = model.predict_proba(data.X_test) if predicted is None else predicted
    scores, table = measure(predicted, data.y_test)
    table.to_csv(out / "predictions.csv", index=False)
    if isinstance(model, SavedEstimator):
        with suppress(NotSupportedError):  # trees
            model.save_pretrained(out / "model")
    return measured | scores | {"fit_seconds": fitting.seconds, "predict_seconds": predicting.seconds}


@torch.no_grad()
def measure_numbers(law: Any, y: NDArray[np.float64]) -> tuple[dict[str, float], pd.DataFrame]:
    """What a predicted law of numbers is worth.

    Args:
        law: a distribution of batch shape ``(rows,)`` with cdf and icdf.
        y: what was observed, ``(rows,)``.

    Returns:
        The metrics, and a table with the observation, mean, standard deviation and quantiles of each row.
    """
    target = torch.as_tensor(y)
    probability = law.cdf(target)
    scores = {
        "nlpd": -float(law.log_prob(target).mean()),
        "rmse": float((law.mean - target).square().mean().sqrt()),
        "calibration": float(((probability[:, None] <= LEVELS).double().mean(0) - LEVELS).abs().mean()),
    }
    table = {"observed": y, "mean": law.mean.numpy(), "std": law.stddev.numpy()}
    for percent in INTERVALS:
        tail = (1 - percent / 100) / 2
        scores[f"coverage_{percent}"] = float(
            ((probability > tail) & (probability < 1 - tail)).double().mean()
        )
        for name, level in ((f"low_{percent}", tail), (f"high_{percent}", 1 - tail)):
            table[name] = law.icdf(torch.full_like(target, level)).numpy()
    return scores, pd.DataFrame(table)


def measure_classes(
    probabilities: NDArray[np.float64], y: NDArray[Any]
) -> tuple[dict[str, float], pd.DataFrame]:
    """What predicted probabilities of classes are worth.

    Args:
        probabilities: ``(rows, classes)``.
        y: class indices, ``(rows,)``.

    Returns:
        The metrics, and a table with the observed class and the probabilities of each row.
    """
    p, labels = torch.as_tensor(probabilities), torch.as_tensor(np.asarray(y, dtype=np.int64))
    chosen = p.gather(1, labels[:, None])[:, 0]
    error: Tensor = multiclass_calibration_error(p.float(), labels, num_classes=p.shape[1], n_bins=10)
    scores = {
        "nlpd": -float(chosen.clamp_min(SMALLEST).log().mean()),
        "accuracy": float((p.argmax(1) == labels).double().mean()),
        "calibration": float(error),
    }
    columns = {f"p_{c}": probabilities[:, c] for c in range(p.shape[1])}
    return scores, pd.DataFrame({"observed": labels.numpy(), **columns})


# -- contenders ----------------------------------------------------------------------------------------------

Applies = Callable[[BayesData], str | None]


def _build(address: str, settings: Mapping[str, Any]) -> Callable[[BayesData, Budget, int], Any]:
    """Makes an estimator from "module:class"; nothing is imported before it is needed."""

    def build(data: BayesData, budget: Budget, seed: int) -> Any:
        module, _, name = address.partition(":")
        cls = getattr(importlib.import_module(module), name)
        chosen = {key: value(budget) if callable(value) else value for key, value in settings.items()}
        return cls(**chosen, random_state=seed)

    return build


def _numbers_only(data: BayesData) -> str | None:
    return None if data.n_classes is None else "predicts numbers only"


def _classes_only(data: BayesData) -> str | None:
    return "predicts classes only" if data.n_classes is None else None


def _needs_extra(applies: Applies) -> Applies:
    def check(data: BayesData) -> str | None:
        missing = importlib.util.find_spec("botorch") is None
        return "needs paperback[bayes]" if missing else applies(data)

    return check


def _contender(
    name: str, label: str, kind: Kind, address: str, applies: Applies, **settings: Any
) -> Contender:
    return Contender(name, label, kind, applies, _build(f"paperback.bayes.{address}", settings))


def _boosted_classes(data: BayesData, budget: Budget, seed: int) -> Any:
    """Gradient boosting, its learning rate and leaves chosen by cross-validation."""
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.model_selection import GridSearchCV, StratifiedKFold

    folds = min(3, int(np.unique(data.y, return_counts=True)[1].min()))
    model = HistGradientBoostingClassifier(early_stopping=False, max_iter=100, random_state=seed)
    if folds < 2:
        return model
    grid = {"learning_rate": [0.03, 0.1], "max_leaf_nodes": [7, 31]}
    shuffled = StratifiedKFold(folds, shuffle=True, random_state=seed)
    return GridSearchCV(model, grid, scoring="neg_log_loss", cv=shuffled)


def _forest_of_classes(data: BayesData, budget: Budget, seed: int) -> Any:
    from sklearn.ensemble import RandomForestClassifier

    return RandomForestClassifier(300, min_samples_leaf=3, random_state=seed)


def _logistic_regression(data: BayesData, budget: Budget, seed: int) -> Any:
    """Multinomial, standardised inputs, its penalty chosen by cross-validation."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    folds = min(5, int(np.unique(data.y, return_counts=True)[1].min()))
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    if folds < 2:
        return model
    grid = {"logisticregression__C": list(np.logspace(-3, 2, 6))}
    return GridSearchCV(model, grid, scoring="neg_log_loss", cv=folds)


def _both(numbers: Contender, classes: Contender) -> Contender:
    """One contender for either kind of target, by the name and label of the one for numbers."""

    def chosen(data: BayesData) -> Contender:
        return numbers if data.n_classes is None else classes

    return Contender(
        numbers.name,
        numbers.label,
        numbers.kind,
        lambda data: chosen(data).applies(data),
        lambda data, budget, seed: chosen(data).build(data, budget, seed),
    )


def _steps(smoke: int, otherwise: int) -> Callable[[Budget], int]:
    return lambda budget: for_budget(budget, smoke=smoke, standard=otherwise)


def _pretrained(name: str) -> tuple[Applies, Callable[[BayesData, Budget, int], Any]]:
    """Whether the network that ships takes the data, and the estimator with it."""

    def estimator() -> Any:
        return getattr(importlib.import_module("paperback.bayes.prior_fitted"), name).pretrained()

    def applies(data: BayesData) -> str | None:
        kind = _numbers_only if name == "PriorFittedNetwork" else _classes_only
        return kind(data) or estimator().why_not(data.X, data.y)

    return applies, lambda data, budget, seed: estimator()


_surrogate = "bnn_surrogate:{}".format
NETWORK = {"hidden": (32, 32), "map_steps": _steps(20, 1000)}

BENCH = Bench(
    task="bayes",
    metrics=METRICS,
    contenders=(
        _both(
        _contender(
            "deep-kernel-machine",
            "deep kernel machine",
            "method",
            "deep_kernel_machine:DeepKernelMachine",
            _needs_extra(_numbers_only),
            n_inducing=_steps(20, 50),
            epochs=_steps(2, 400),
        ),
        _contender(
            "deep-kernel-machine",
            "deep kernel machine",
            "method",
            "deep_kernel_machine:DeepKernelMachineClassifier",
            _needs_extra(_classes_only),
            n_inducing=_steps(20, 50),
            epochs=_steps(2, 400),
        ),
        ),
        _contender(
            "bnn-surrogate",
            "Bayesian network, HMC",
            "method",
            _surrogate("HMCSurrogate"),
            _needs_extra(_numbers_only),
            **NETWORK,
            samples=_steps(20, 400),
            burn_in=_steps(10, 300),
        ),
        _contender(
            "bnn-surrogate-laplace",
            "linearised Laplace",
            "method",
            _surrogate("LaplaceSurrogate"),
            _needs_extra(_numbers_only),
            **NETWORK,
        ),
        _contender(
            "bnn-surrogate-infinite",
            "infinitely wide network",
            "method",
            _surrogate("InfiniteBNN"),
            _needs_extra(_numbers_only),
            learn_kernel=True,
        ),
        _both(
        _contender(
            "scale-mixture-nngp",
            "Student-t process of a network",
            "method",
            "scale_mixture_nngp:ScaleMixtureNNGP",
            _needs_extra(_numbers_only),
            depth=2,
            max_iter=_steps(5, 100),
        ),
        _contender(
            "scale-mixture-nngp",
            "scale mixture of networks' GPs",
            "method",
            "scale_mixture_nngp:ScaleMixtureClassifier",
            _needs_extra(_classes_only),
            depth=2,
            n_inducing=_steps(10, 60),
            epochs=_steps(2, 60),
        ),
        ),
        _both(
        Contender(
            "prior-fitted",
            "prior-fitted network, as it ships",
            "method",
            *_pretrained("PriorFittedNetwork"),
        ),
        Contender(
            "prior-fitted",
            "prior-fitted network, as it ships",
            "method",
            *_pretrained("PriorFittedClassifier"),
        ),
        ),
        _contender(
            "exact-gp",
            "exact GP",
            "baseline",
            _surrogate("GPSurrogate"),
            _needs_extra(_numbers_only),
        ),
        _contender("sparse-gp", "sparse GP", "baseline", "baselines:SparseGP", _needs_extra(_numbers_only)),
        _both(
            _contender("deep-ensemble", "deep ensemble", "baseline", "baselines:DeepEnsembleRegressor",
                       _numbers_only, epochs=_steps(5, 300)),
            _contender("deep-ensemble", "deep ensemble", "baseline", "baselines:DeepEnsembleClassifier",
                       _classes_only, epochs=_steps(5, 300)),
        ),
        _both(
            _contender("boosting", "gradient boosting", "baseline", "baselines:QuantileBoosting",
                       _numbers_only, n_trees=_steps(10, 300)),
            Contender("boosting", "gradient boosting", "baseline", _classes_only, _boosted_classes),
        ),
        _both(
            _contender("forest", "random forest", "baseline", "baselines:ForestRegressor", _numbers_only),
            Contender("forest", "random forest", "baseline", _classes_only, _forest_of_classes),
        ),
        Contender("logistic", "logistic regression", "baseline", _classes_only, _logistic_regression),
    ),
    load=load,
    evaluate=evaluate,
    seconds={"smoke": 4, "quick": 15, "standard": 60, "full": 120},
)  # fmt: skip
