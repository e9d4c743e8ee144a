"""How density models are compared: on completing rows of which 40 % are observed, and on what else they do.

Every contender sees the same rows, the same split and the same masks. Completion is primary, because every
density model does it; it is judged by the marginals of the hidden variables, so that a mean field competes on
equal terms with exact inference. Likelihood is reported in the form in which a model has it: exact, as an
estimate, or as two bounds, each in a column of its own, since the middle of two bounds is the likelihood of
nothing. Samples are judged by how well a classifier tells them from test rows.

Images become 4 grey levels and are brought to at most 28 pixels a side (14 on a quick budget), colour to
grey; table columns become at most 8 bins. A target with classes is the class variable; a numeric target is
one more column.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from paperback.compare.bench import Bench, Contender, Metric
from paperback.data import Dataset, GreyBins, Split, TableBins, images, read
from paperback.data.image_folder import list_images
from paperback.density.baselines import (
    CategoricalMixture,
    CategoricalRBM,
    IndependentCategorical,
    MaskedNetwork,
)
from paperback.density.interface import Classifying, DensityModel, Interval
from paperback.errors import DataError
from paperback.study.budget import Budget, for_budget
from paperback.study.measure import Stopwatch, size_on_disk
from paperback.training import seeded

OBSERVED = 0.4  # part of each test row that is known
GREY_LEVELS = 4
TABLE_BINS = 8
LONGEST_SIDE, LONGEST_SIDE_QUICK = 28, 14  # pixels
LEAST_PROBABILITY = 1e-6  # of the true state, so that one impossible state does not decide a mean
FEWEST_JUDGED, MOST_JUDGED = 10, 1000  # rows that the sample classifier is given of each kind


@dataclass(frozen=True, eq=False)
class DensityData:
    """What the contenders are given.

    Attributes:
        dataset: where the rows come from.
        train: states ``(rows, variables)`` int64, and labels ``(rows,)`` int64 or None.
        val: the same, for choosing.
        test: the same, for measuring.
        observed: mask of the test rows, True where the value is known.
        n_states: states of each variable.
        image_shape: (height, width), None for tables.
        n_classes: number of classes, None without labels.
    """

    dataset: Dataset
    train: Split
    val: Split
    test: Split
    observed: Bool[Tensor, "rows variables"]
    n_states: tuple[int, ...]
    image_shape: tuple[int, int] | None
    n_classes: int | None


# -- data ----------------------------------------------------------------------------------------------------


def load(
    path: Path | None, target: str | None, budget: Budget, seed: int, longest_side: int | None = None
) -> DensityData:
    """The digits of scikit-learn in 4 grey levels, or the user's data as discrete states.

    Args:
        path: a table (CSV, Parquet), an ``.npz`` archive or a folder of images; None for the digits.
        target: column of a table to predict.
        budget: larger budgets use more rows.
        seed: of the split and of the masks.
        longest_side: larger images are brought to so many pixels; 28, or 14 on a quick budget, if not given.

    Returns:
        The data.

    Raises:
        DataError: naming the file, the place and the remedy.
    """
    if path is None:
        dataset = images.digits(seed)
    elif path.is_dir() or path.suffix.lower() == ".npz":
        quick, most = LONGEST_SIDE_QUICK, LONGEST_SIDE
        side = longest_side or for_budget(budget, smoke=quick, quick=quick, standard=most)
        dataset = _read_images(path, target, seed, side)
    else:
        dataset = read(path, target, seed=seed)
    dataset = _bounded(dataset, budget)
    states, n_states = _image_states(dataset) if dataset.kind == "images" else _table_states(dataset)
    n_classes = len(dataset.classes) or None
    parts = {}
    for name, x in states.items():
        y = getattr(dataset, name).y
        parts[name] = Split(x, None if n_classes is None else torch.tensor(np.asarray(y), dtype=torch.int64))
    return DensityData(
        dataset=dataset,
        **parts,
        observed=_mask(states["test"].shape, seed),
        n_states=n_states,
        image_shape=tuple(dataset.train.x.shape[1:]) if dataset.kind == "images" else None,
        n_classes=n_classes,
    )


def _mask(shape: tuple[int, ...], seed: int) -> Bool[Tensor, "rows variables"]:
    """Each entry observed with probability 0.4; of every row at least one entry is hidden."""
    draw = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    return (draw < OBSERVED) & (draw < draw.amax(1, keepdim=True))


def _bounded(dataset: Dataset, budget: Budget) -> Dataset:
    """The first rows of each part, as many as the budget allows; parts are in random order."""
    limits = {
        "train": for_budget(budget, smoke=200, quick=2000, standard=10_000, full=10**9),
        "val": for_budget(budget, smoke=50, quick=500, standard=1000, full=10**9),
        "test": for_budget(budget, smoke=50, quick=500, standard=1000, full=10**9),
    }
    parts = {name: getattr(dataset, name) for name in limits}
    if all(len(part) <= limits[name] for name, part in parts.items()):
        return dataset
    heads = {}
    for name, part in parts.items():
        heads[name] = Split(part.x[: limits[name]], None if part.y is None else part.y[: limits[name]])
    sizes = ", ".join(f"{len(head):,} of {len(parts[name]):,} for {name}" for name, head in heads.items())
    notes = (*dataset.notes, f"budget {budget} takes {sizes}.")
    return replace(dataset, train=heads["train"], val=heads["val"], test=heads["test"], notes=notes)


def _read_images(path: Path, target: str | None, seed: int, longest_side: int) -> Dataset:
    """Grey images, no side longer than told; a folder is brought to the shape of its first image."""
    if target is not None:
        raise DataError(f"{path} holds images, which have no column {target!r}; leave the target out.")
    found = (
        _first_size(path)
        if path.is_dir()
        else images.read(path, seed=seed, channels="grey").train.x.shape[1:]
    )
    if found is None:
        return images.read(path, None, seed, channels="grey")  # it says what is wrong with the first image
    scale = min(1.0, longest_side / max(found))
    size = (max(1, round(found[0] * scale)), max(1, round(found[1] * scale)))
    dataset = images.read(path, size, seed, channels="grey")
    if size == tuple(found):
        return dataset
    note = f"the images, {found[0]}x{found[1]} pixels, were brought to {size[0]}x{size[1]}."
    return replace(dataset, notes=(*dataset.notes, note))


def _first_size(folder: Path) -> tuple[int, int] | None:
    """Height and width of the first image of a folder; None where it cannot be read."""
    listings, _ = list_images(folder)
    try:
        with Image.open(next(iter(listings.values())).files[0]) as image:
            return image.height, image.width
    except (OSError, UnidentifiedImageError):
        return None


def _image_states(dataset: Dataset) -> tuple[dict[str, Int[Tensor, "rows variables"]], tuple[int, ...]]:
    levels = dataset.train.x
    n = min(GREY_LEVELS, int(levels.max()) - int(levels.min()) + 1)
    bins = GreyBins(max(2, n)).fit(levels)
    states = {name: bins.transform(getattr(dataset, name).x).flatten(1) for name in ("train", "val", "test")}
    return states, (bins.n_states,) * states["train"].shape[1]


def _table_states(dataset: Dataset) -> tuple[dict[str, Int[Tensor, "rows variables"]], tuple[int, ...]]:
    parts = {name: getattr(dataset, name) for name in ("train", "val", "test")}
    frames = {name: part.x for name, part in parts.items()}
    if dataset.target and not dataset.classes:
        frames = {
            name: frame.assign(**{dataset.target: np.asarray(parts[name].y)})
            for name, frame in frames.items()
        }
    bins = TableBins(TABLE_BINS).fit(frames["train"])
    return {name: bins.transform(frame) for name, frame in frames.items()}, bins.n_states


# -- contenders ----------------------------------------------------------------------------------------------


def _independent(data: DensityData, budget: Budget, seed: int) -> DensityModel:
    return IndependentCategorical(len(data.n_states), data.n_states)


def _mixture(data: DensityData, budget: Budget, seed: int) -> DensityModel:
    candidates = for_budget(budget, smoke=(2, 5), standard=(10, 20, 40, 80, 160))
    return CategoricalMixture(len(data.n_states), data.n_states, candidates, data.n_classes)


def _rbm(data: DensityData, budget: Budget, seed: int) -> DensityModel:
    n_hidden, n_sweeps = (
        for_budget(budget, smoke=12, standard=200),
        for_budget(budget, smoke=20, quick=200, standard=500),
    )
    return CategoricalRBM(len(data.n_states), data.n_states, n_hidden, data.n_classes, n_sweeps=n_sweeps)


def _masked_network(data: DensityData, budget: Budget, seed: int) -> DensityModel:
    return MaskedNetwork(len(data.n_states), data.n_states, data.n_classes, obs_level=OBSERVED)


def _monotone_dbm(data: DensityData, budget: Budget, seed: int) -> DensityModel:
    from paperback.density.monotone_dbm import MonotoneDBM

    with seeded(seed, "monotone-dbm"):
        return MonotoneDBM.for_data(data.n_states, data.image_shape, data.n_classes)


def _probabilistic_circuit(data: DensityData, budget: Budget, seed: int) -> DensityModel:
    from paperback.density.probabilistic_circuit import ProbabilisticCircuit

    return ProbabilisticCircuit(len(data.n_states), data.n_states)


def _several_variables(data: DensityData) -> str | None:
    return None if len(data.n_states) > 1 else "a tree needs at least two variables."


def _always(data: DensityData) -> str | None:
    return None


def _training(name: str, budget: Budget, rows: int) -> dict[str, Any]:
    """Settings of `fit` that a budget changes."""
    if name == "rbm":
        return {"epochs": epochs_for(for_budget(budget, smoke=4, quick=500, standard=1200), rows, 100)}
    if name == "masked-network":
        return {"epochs": epochs_for(for_budget(budget, smoke=2, quick=300, standard=900), rows, 96)}
    if name == "probabilistic-circuit":
        return {"epochs": epochs_for(for_budget(budget, smoke=2, quick=200, standard=500), rows, 256)}
    if name == "monotone-dbm":
        return {"epochs": epochs_for(for_budget(budget, smoke=2, quick=150, standard=450), rows, 96)}
    return {}


def epochs_for(updates: int, rows: int, batch_size: int) -> int:
    """Epochs that come to about so many updates: the same work on every data set, but at least 5 epochs.

    The settings of the contenders were chosen on 1,257 rows, where 90 epochs of the RBM are 1,200 updates.
    """
    return max(updates // max(1, rows // batch_size), min(5, updates))


# -- measuring -----------------------------------------------------------------------------------------------


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
    model = contender.build(data, budget, seed)
    with Stopwatch() as fitting:
        model.fit(
            *data.train,
            *data.val,
            seed=seed,
            progress=False,
            **_training(contender.name, budget, len(data.train.x)),
        )
    model.save_pretrained(out / "model")
    states, labels = data.test
    capabilities = model.capabilities
    with Stopwatch() as completing:
        probabilities = model.conditional(states, data.observed)
    classifies = data.n_classes is not None and capabilities.classify != "none"
    samples = None
    if capabilities.sample != "none" and len(states) >= FEWEST_JUDGED:
        samples = model.sample(
            min(len(states), MOST_JUDGED), torch.Generator(model.valid.device).manual_seed(seed)
        )
    return {
        **completion_scores(probabilities.cpu(), states, data.observed),
        "class_accuracy": _of_classes(model, states, labels, data.observed) if classifies else None,
        **_likelihood(model, states),
        "sample_auc": None if samples is None else detection_auc(states[:MOST_JUDGED], samples.cpu(), seed),
        "fit_seconds": fitting.seconds,
        "completion_seconds": 1000 * completing.seconds / len(states),
        "bytes": float(size_on_disk(out / "model")),
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


def detection_auc(real: Tensor, drawn: Tensor, seed: int) -> float:
    """How well a classifier tells samples from real rows: cross-validated area under the ROC curve.

    A classifier two-sample test (Lopez-Paz & Oquab 2017) with boosted trees, which see interactions between
    variables; a linear one would call an independent model perfect. Values below 0.5 are chance and count as
    0.5.

    Args:
        real: states ``(rows, variables)``, at least 10 rows.
        drawn: samples, the same shape but for the number of rows.
        seed: of the folds.

    Returns:
        A number in [0.5, 1].
    """
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    rows = np.concatenate([real.numpy(), drawn.numpy()])
    is_drawn = np.concatenate([np.zeros(len(real), int), np.ones(len(drawn), int)])
    classifier = HistGradientBoostingClassifier(max_iter=50, early_stopping=False, random_state=seed)
    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    score = cross_val_predict(classifier, rows, is_drawn, cv=folds, method="predict_proba")[:, 1]
    return max(0.5, float(roc_auc_score(is_drawn, score)))


def _of_classes(model: DensityModel, states: Tensor, labels: Tensor, observed: Tensor) -> float:
    """Part of the test rows whose class is found from what is observed of them."""
    assert isinstance(model, Classifying)
    return float((model.predict(states, observed).cpu() == labels).double().mean())


def _likelihood(model: DensityModel, states: Tensor) -> dict[str, float | None]:
    """Bits per dimension of the complete test rows, in the column of the form in which the model has it."""
    columns: dict[str, float | None] = dict.fromkeys(
        ("bits_per_dim", "bits_per_dim_estimate", "bits_per_dim_at_least", "bits_per_dim_at_most")
    )
    exactness = model.capabilities.log_prob
    if exactness == "none":
        return columns
    bits = model.bits_per_dim(states)
    if isinstance(bits, Interval):
        columns["bits_per_dim_at_least"], columns["bits_per_dim_at_most"] = (
            float(bits.lower),
            float(bits.upper),
        )
    else:
        columns["bits_per_dim" if exactness == "exact" else "bits_per_dim_estimate"] = float(bits)
    return columns


BENCH = Bench(
    task="density",
    metrics=(
        Metric("completion_nll", "completion, nats per variable", "nats", better="lower", primary=True),
        Metric("completion_accuracy", "completion, share right", better="higher"),
        Metric("class_accuracy", "class, share right", better="higher"),
        Metric("bits_per_dim", "bits/dim, exact", "bits", better="lower"),
        Metric("bits_per_dim_estimate", "bits/dim, estimate", "bits", better="lower"),
        Metric("bits_per_dim_at_least", "bits/dim, at least", "bits", better="lower"),
        Metric("bits_per_dim_at_most", "bits/dim, at most", "bits", better="lower"),
        Metric("sample_auc", "samples told from data, AUC", better="lower"),
        Metric("fit_seconds", "fit", "s", better="lower", cost=True),
        Metric("completion_seconds", "completion of 1,000 rows", "s", better="lower", cost=True),
        Metric("bytes", "model on disk", "B", better="lower", cost=True),
    ),
    contenders=(
        Contender("monotone-dbm", "monotone DBM", "method", _always, _monotone_dbm),
        Contender(
            "probabilistic-circuit",
            "probabilistic circuit",
            "method",
            _several_variables,
            _probabilistic_circuit,
        ),
        Contender("independent", "independent variables", "baseline", _always, _independent),
        Contender("mixture", "mixture (EM)", "baseline", _always, _mixture),
        Contender("rbm", "RBM (PCD, Gibbs)", "baseline", _always, _rbm),
        Contender("masked-network", "network for random masks", "baseline", _always, _masked_network),
    ),
    load=load,
    evaluate=evaluate,
    seconds={"smoke": 5, "quick": 10, "standard": 40, "full": 40},
)
