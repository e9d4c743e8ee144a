"""What is measured: completion, likelihood, and how far drawn rows are from real ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from paperback.compare.bench import Contender, Metric
from paperback.density.bench.contenders import training
from paperback.density.bench.data import DensityData
from paperback.density.binned import BinnedGenerator
from paperback.density.interface import Classifying, DensityModel, Interval, TabularGenerator
from paperback.numerics.divergence import FEWEST_ROWS, correlation_error, detection_auc, numeric_features
from paperback.saving import Saved
from paperback.study.budget import Budget
from paperback.study.measure import Stopwatch, size_on_disk

if TYPE_CHECKING:
    import pandas as pd

LEAST_PROBABILITY = 1e-6  # of the true state, so that one impossible state does not decide a mean
MOST_JUDGED = 1000  # rows that the sample classifier is given of each kind
MOST_DRAWN = 10_000  # rows that a predictor is trained on
FOLDS = 5  # of the sample classifier
MOST_EXACT = 256  # variables up to which D network calls a row cost little

METRICS = (
    Metric("completion_nll", "completion, nats per variable", "nats", better="lower", primary=True),
    Metric("completion_accuracy", "completion, share right", better="higher"),
    Metric("class_accuracy", "class, share right", better="higher"),
    Metric("violation_rate", "rows that break rules, share", better="lower"),
    Metric("row_auc", "rows told from real, AUC", better="lower"),
    Metric("row_r2", "predictor trained on rows, R²", better="higher"),
    Metric("row_class_auc", "predictor trained on rows, AUC", better="higher"),
    Metric("correlation_error", "correlations of rows, error", better="lower"),
    Metric("bits_per_dim", "bits/dim, exact", "bits", better="lower"),
    Metric("bits_per_dim_estimate", "bits/dim, estimate", "bits", better="lower"),
    Metric("bits_per_dim_at_least", "bits/dim, at least", "bits", better="lower"),
    Metric("bits_per_dim_at_most", "bits/dim, at most", "bits", better="lower"),
    Metric("sample_auc", "states told from real, AUC", better="lower"),
    Metric("fit_seconds", "fit", "s", better="lower", cost=True),
    Metric("completion_seconds", "completion of 1,000 rows", "s", better="lower", cost=True),
    Metric("sampling_seconds", "drawing 1,000 rows", "s", better="lower", cost=True),
    Metric("bytes", "model on disk", "B", better="lower", cost=True),
)


def evaluate(
    contender: Contender, data: DensityData, budget: Budget, seed: int, out: Path
) -> Mapping[str, float | None]:
    """Fit one contender on the training part, measure it on the test part, and save it under `out`.

    Args:
        contender: who.
        data: from `load`.
        budget: how much training.
        seed: of the fit and of everything drawn afterwards.
        out: folder for the fitted model.

    Returns:
        Metric name to number, None where the contender does not have the quantity.
    """
    measured: dict[str, float | None] = dict.fromkeys(metric.name for metric in METRICS)
    with Stopwatch() as fitting:
        model = _fitted(contender, data, budget, seed)
    measured["fit_seconds"] = fitting.seconds
    if isinstance(model, Saved):
        model.save_pretrained(out / "model")
        measured["bytes"] = float(size_on_disk(out / "model"))
    if isinstance(model, DensityModel):
        measured |= _completion(model, data) | _likelihood(model, data.test.x)
    if data.table is None:
        assert isinstance(model, DensityModel)
        return measured | _image_samples(model, data, seed)
    rows = _rows_of(model, contender, data, budget, seed)
    return measured | (_table_samples(rows, data, seed) if rows is not None else {})


def _fitted(
    contender: Contender, data: DensityData, budget: Budget, seed: int
) -> DensityModel | TabularGenerator:
    model: DensityModel | TabularGenerator = contender.build(data, budget, seed)
    settings = training(contender.name, budget, len(data.train.x)) | {"seed": seed, "progress": False}
    if isinstance(model, DensityModel):
        return model.fit(*data.train, *data.val, **settings)
    assert data.table is not None
    return model.fit(data.table.train, **settings)


# -- completion and likelihood -------------------------------------------------------------------------------


def _completion(model: DensityModel, data: DensityData) -> dict[str, float | None]:
    """What is hidden of the test rows, and their class, from what is observed of them."""
    states, labels = data.test
    with Stopwatch() as completing:
        probabilities = model.conditional(states, data.observed)
    accuracy = None
    if data.n_classes is not None and model.capabilities.classify != "none":
        assert isinstance(model, Classifying)
        accuracy = float((model.predict(states, data.observed).cpu() == labels).double().mean())
    return {
        **completion_scores(probabilities.cpu(), states, data.observed),
        "class_accuracy": accuracy,
        "completion_seconds": 1000 * completing.seconds / len(states),
    }


def completion_scores(probabilities: Tensor, states: Tensor, observed: Tensor) -> dict[str, float]:
    """How well marginals foresee the hidden entries.

    Args:
        probabilities: ``(rows, variables, states)``.
        states: the truth, ``(rows, variables)``.
        observed: mask of what was known.

    Returns:
        "completion_nll", nats per hidden entry, and "completion_accuracy", the part of the hidden entries
        whose most probable state is right.
    """
    hidden = ~observed
    truth = probabilities.gather(2, states[..., None])[..., 0][hidden].double()
    return {
        "completion_nll": float(-truth.clamp_min(LEAST_PROBABILITY).log().mean()),
        "completion_accuracy": float((probabilities.argmax(-1) == states)[hidden].double().mean()),
    }


def _likelihood(model: DensityModel, states: Tensor) -> dict[str, float | None]:
    """Bits per dimension of the complete test rows, in the column of the form in which the model has it."""
    exactness = model.capabilities.log_prob
    if exactness == "none":
        return {}
    bits = model.bits_per_dim(states)
    if isinstance(bits, Interval):
        return {"bits_per_dim_at_least": float(bits.lower), "bits_per_dim_at_most": float(bits.upper)}
    if exactness == "exact":
        return {"bits_per_dim": float(bits)}
    return {"bits_per_dim_estimate": float(bits), "bits_per_dim": _exact_bits(model, states)}


def _exact_bits(model: DensityModel, states: Tensor) -> float | None:
    """The marginalization model has both: an estimate in one call by its marginal head, and by its
    conditionals, in D calls, the likelihood of a distribution that sums to one.
    """
    from paperback.density.marginalization import MarginalizationModel

    if not isinstance(model, MarginalizationModel) or model.n_variables > MOST_EXACT:
        return None
    nats = float(model.log_prob(states, exact=True).mean())
    return -nats / (model.n_variables * float(np.log(2.0)))


# -- samples -------------------------------------------------------------------------------------------------


def _image_samples(model: DensityModel, data: DensityData, seed: int) -> dict[str, float | None]:
    states = data.test.x[:MOST_JUDGED]
    if model.capabilities.sample == "none" or len(states) < FEWEST_ROWS:
        return {}
    generator = torch.Generator(model.valid.device).manual_seed(seed)
    with Stopwatch() as sampling:
        samples = model.sample(len(states), generator)
    return {
        "sample_auc": _state_auc(states, samples.cpu(), seed),
        "sampling_seconds": 1000 * sampling.seconds / len(states),
    }


def _state_auc(real: Tensor, drawn: Tensor, seed: int) -> float:
    import pandas as pd

    return detection_auc(pd.DataFrame(real.numpy()), pd.DataFrame(drawn.numpy()), seed, FOLDS)


def _rows_of(
    model: DensityModel | TabularGenerator, contender: Contender, data: DensityData, budget: Budget, seed: int
) -> TabularGenerator | None:
    """The contender as a generator of whole rows; None where it cannot draw any.

    The states that a density model was fitted to lack the class of the rows, where there is one. It is then
    fitted once more, with the class as one of the variables.
    """
    if not isinstance(model, DensityModel):
        return model
    if model.capabilities.sample == "none":
        return None
    assert data.table is not None
    if data.n_classes is not None:
        whole = _fitted(contender, data.with_class_as_variable(), budget, seed)
        assert isinstance(whole, DensityModel)
        model = whole
    return BinnedGenerator.around(model, data.table.bins, data.table.train)


def _table_samples(model: TabularGenerator, data: DensityData, seed: int) -> dict[str, float | None]:
    """Rows in original units against the test rows; and both in states, which forgives what bins cannot
    know.
    """
    table = data.table
    assert table is not None
    judged = table.test.iloc[:MOST_JUDGED]
    if len(judged) < FEWEST_ROWS:
        return {}
    generator = torch.Generator(getattr(model, "device", "cpu")).manual_seed(seed)
    n = max(len(judged), min(len(table.train), MOST_DRAWN))
    with Stopwatch() as sampling:
        rows = model.sample(n, generator)
    drawn = rows.iloc[: len(judged)]
    several_numbers = len(judged.select_dtypes("number").columns) > 1
    return {
        "violation_rate": table.rules.violation_rate(rows) if table.rules is not None else None,
        "row_auc": detection_auc(judged, drawn, seed, FOLDS),
        "sample_auc": _state_auc(table.bins.transform(judged), table.bins.transform(drawn), seed),
        "correlation_error": correlation_error(table.test, rows) if several_numbers else None,
        **_usefulness(rows, data),
        "sampling_seconds": 1000 * sampling.seconds / n,
    }


def _usefulness(rows: pd.DataFrame, data: DensityData) -> dict[str, float | None]:
    """How well boosted trees that were trained on drawn rows predict the target of the test rows."""
    import pandas as pd
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

    assert data.table is not None
    target = data.dataset.target
    if not target:
        return {}
    rows, test = rows[rows[target].notna()], data.table.test  # states have room for a missing target
    both = numeric_features(pd.concat([rows, test], ignore_index=True).drop(columns=target))
    inputs = both.iloc[: len(rows)].dropna(axis=1, how="all")  # boosted trees need one known cell
    test_inputs = both.iloc[len(rows) :][inputs.columns]
    if not data.dataset.classes:
        regressor = HistGradientBoostingRegressor(random_state=0).fit(inputs, rows[target])
        return {"row_r2": float(regressor.score(test_inputs, test[target]))}
    if rows[target].nunique() < 2:
        return {"row_class_auc": 0.5}  # of a constant prediction
    classifier = HistGradientBoostingClassifier(random_state=0).fit(inputs, rows[target].astype(str))
    scores = pd.DataFrame(classifier.predict_proba(test_inputs), columns=classifier.classes_)
    return {"row_class_auc": class_auc(test[target].astype(str), scores)}


def class_auc(truth: pd.Series[str], scores: pd.DataFrame) -> float:
    """Mean over the classes of the area under the ROC curve of each against the rest.

    Args:
        truth: names of the classes, ``(rows,)``, at least two different ones.
        scores: a column for each class that was learned; others are never predicted.

    Returns:
        A number in [0, 1].
    """
    from sklearn.metrics import roc_auc_score

    zeros = np.zeros(len(truth))
    areas = [roc_auc_score(truth == name, scores.get(name, zeros)) for name in truth.unique()]
    return float(np.mean(areas))
