"""What is compared on: rows of numbers, whether they were images or a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from paperback.data import Dataset, Split, images, read
from paperback.data.table_files import is_numeric
from paperback.errors import DataError
from paperback.explain.prototype_rbf.fitting import usual_margin
from paperback.study.budget import Budget, for_budget

if TYPE_CHECKING:
    from sklearn.compose import ColumnTransformer

Array = NDArray[np.float64]
Codes = NDArray[np.int64]

LONGEST_SIDE = 28  # pixels
MOST_VALUES = 20  # columns that a column of words becomes
RADIUS = 0.5  # parts of the usual margin, which is half the usual distance to another class
PARTS = ("train", "val", "test")


@dataclass(frozen=True, eq=False)
class ExplainData:
    """What the contenders are given.

    Attributes:
        dataset: where the rows come from.
        columns: names of the columns, or of the pixels.
        train: rows ``(rows, features)`` and class indices ``(rows,)``.
        val: the same, for choosing.
        test: the same, for measuring.
        image_shape: (height, width), None for tables.
        bounds: lowest and highest value of a pixel, None for tables.
        radius: in L2, within which rows are attacked and certificates are asked for.
    """

    dataset: Dataset
    columns: tuple[str, ...]
    train: tuple[Array, Codes]
    val: tuple[Array, Codes]
    test: tuple[Array, Codes]
    image_shape: tuple[int, int] | None
    bounds: tuple[float, float] | None
    radius: float


def load(path: Path | None, target: str | None, budget: Budget, seed: int) -> ExplainData:
    """The digits of scikit-learn, or the user's rows with classes.

    Args:
        path: a table (CSV, Parquet), an ``.npz`` archive or a folder of images; None for the digits.
        target: column of a table to predict, of classes.
        budget: larger budgets use more rows.
        seed: of the split.

    Returns:
        The data.

    Raises:
        PaperbackError: naming the file, the place and the remedy.
    """
    if path is None:
        if target is not None:
            raise DataError(f"the digits have no column {target!r}; leave the target out, or give data.")
        dataset = images.digits(seed)
    elif path.is_dir() or path.suffix.lower() == ".npz":
        if target is not None:
            raise DataError(f"{path} holds images, which have no column {target!r}; leave the target out.")
        dataset = _read_images(path, seed)
    else:
        dataset = read(path, target, labels="required", seed=seed)
    if not dataset.classes:
        raise DataError(
            f"{path}: the target {dataset.target} is a number, and classifiers are compared; give one "
            "of classes."
        )
    dataset = _bounded(dataset, budget)
    is_images = dataset.kind == "images"
    rows, columns = _pixels(dataset) if is_images else _table(dataset)
    train, val, test = ((rows[name], np.asarray(getattr(dataset, name).y, dtype=np.int64)) for name in PARTS)
    if len(np.unique(train[1])) < 2 or not len(val[0]) or not len(test[0]):
        raise DataError(
            f"{path}: of {len(dataset.classes)} classes, the training rows hold {len(np.unique(train[1]))}, "
            f"with {len(val[0])} rows for validation and {len(test[0])} for the test; give more rows."
        )
    return ExplainData(
        dataset=dataset,
        columns=columns,
        train=train,
        val=val,
        test=test,
        image_shape=(int(dataset.train.x.shape[1]), int(dataset.train.x.shape[2])) if is_images else None,
        bounds=(0.0, 1.0) if is_images else None,
        radius=RADIUS * usual_margin(*train, "euclidean", seed),
    )


def _bounded(dataset: Dataset, budget: Budget) -> Dataset:
    """The first rows of each part, as many as the budget allows; parts are in random order."""
    limits = {
        "train": for_budget(budget, smoke=200, quick=1500, standard=5000, full=10**9),
        "val": for_budget(budget, smoke=50, quick=500, standard=1000, full=10**9),
        "test": for_budget(budget, smoke=40, quick=200, standard=500, full=2000),
    }
    parts = {name: getattr(dataset, name) for name in limits}
    if all(len(part) <= limits[name] for name, part in parts.items()):
        return dataset
    heads = {name: Split(part.x[: limits[name]], part.y[: limits[name]]) for name, part in parts.items()}
    sizes = ", ".join(f"{len(head):,} of {len(parts[name]):,} for {name}" for name, head in heads.items())
    notes = (*dataset.notes, f"budget {budget} takes {sizes}.")
    return replace(dataset, train=heads["train"], val=heads["val"], test=heads["test"], notes=notes)


def _read_images(path: Path, seed: int) -> Dataset:
    """Grey images of at most 28 pixels a side; those of a folder are made square."""
    size = LONGEST_SIDE if path.is_dir() else None
    dataset = images.read(path, size, seed, channels="grey", labels="required")
    height, width = dataset.train.x.shape[1:]
    if max(height, width) <= LONGEST_SIDE:
        return dataset
    scale = LONGEST_SIDE / max(height, width)
    size_now = max(1, round(height * scale)), max(1, round(width * scale))
    dataset = images.read(path, size_now, seed, channels="grey", labels="required")
    note = f"the images, {height}x{width} pixels, were brought to {size_now[0]}x{size_now[1]}."
    return replace(dataset, notes=(*dataset.notes, note))


def _pixels(dataset: Dataset) -> tuple[dict[str, Array], tuple[str, ...]]:
    """Pixels over the brightest of the training images, which digits have at 16 and others at 255."""
    brightest = max(1, int(dataset.train.x.max()))
    rows = {
        name: getattr(dataset, name).x.flatten(1).double().numpy().clip(max=brightest) / brightest
        for name in PARTS
    }
    shape = tuple(dataset.train.x.shape[1:])
    return rows, tuple(f"pixel {', '.join(map(str, place))}" for place in np.ndindex(*shape))


def _table(dataset: Dataset) -> tuple[dict[str, Array], tuple[str, ...]]:
    frame = dataset.train.x
    empty = [name for name in frame.columns if frame[name].isna().all()]
    numeric = [name for name in frame.columns if name not in empty and is_numeric(frame[name])]
    others = [name for name in frame.columns if name not in empty and name not in numeric]
    if not numeric and not others:
        raise DataError(
            f"every column of {dataset.name} beside the target is empty; there is nothing to fit."
        )
    encoder = _encoder(numeric, others)
    prepared = {name: _words_as_text(getattr(dataset, name).x, others) for name in PARTS}
    encoder.fit(prepared["train"])
    rows = {name: np.asarray(encoder.transform(part), dtype=np.float64) for name, part in prepared.items()}
    return rows, tuple(map(str, encoder.get_feature_names_out()))


def _encoder(numeric: Sequence[str], others: Sequence[str]) -> ColumnTransformer:
    """Numbers standardised, an empty cell being the mean and noted in a column; a column for each value of
    the others, rare ones in one, an empty cell being a value of its own.
    """
    from sklearn.compose import ColumnTransformer
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    numbers = make_pipeline(
        StandardScaler(), SimpleImputer(strategy="constant", fill_value=0.0, add_indicator=True)
    )
    words = OneHotEncoder(
        max_categories=MOST_VALUES, handle_unknown="infrequent_if_exist", sparse_output=False
    )
    return ColumnTransformer(
        [("numbers", numbers, list(numeric)), ("words", words, list(others))], verbose_feature_names_out=False
    )


def _words_as_text(frame: object, others: Sequence[str]) -> object:
    """Columns of words, booleans and mixtures as text, an empty cell as "missing"."""
    import pandas as pd

    assert isinstance(frame, pd.DataFrame)
    texts = {
        name: frame[name].astype(object).where(frame[name].notna(), "missing").map(str) for name in others
    }
    return frame.assign(**texts).astype(dict.fromkeys(others, object))
