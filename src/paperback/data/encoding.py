"""Table columns as numbers, for methods that take nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from sklearn.compose import ColumnTransformer
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder

from paperback.data.table_files import is_numeric
from paperback.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

MAX_LEVELS = 20  # of a column of categories that get a column each; rarer ones share one


def as_numbers(
    train: pd.DataFrame, *others: pd.DataFrame
) -> tuple[list[NDArray[np.float64]], tuple[str, ...]]:
    """Encode tables by what is seen in the first of them.

    Numbers stay, and their missing cells get the median, with a column that says so where training rows miss
    some. Categories are one-hot: at most twenty to a column, rarer ones and those never seen together.

    Args:
        train: the rows to learn the encoding from.
        *others: more rows with the same columns.

    Returns:
        A matrix for each table, float64 without missing cells, and the names of their columns.

    Raises:
        DataError: if no column has a value in the training rows.
    """
    empty = [name for name in train.columns if train[name].isna().all()]
    train = train.drop(columns=empty)
    if not len(train.columns):
        raise DataError("no column of the table has a value in the training rows; clean the table.")
    numbers = [name for name in train.columns if is_numeric(train[name])]
    categories = [name for name in train.columns if name not in numbers]
    one_hot = OneHotEncoder(
        handle_unknown="infrequent_if_exist", max_categories=MAX_LEVELS, sparse_output=False, dtype=np.float64
    )
    text = make_pipeline(SimpleImputer(strategy="constant", fill_value="missing"), one_hot)
    encoder = ColumnTransformer(
        [
            ("numbers", SimpleImputer(strategy="median", add_indicator=True), numbers),
            ("categories", text, categories),
        ],
        verbose_feature_names_out=False,
    )
    parts = [table.drop(columns=empty).copy() for table in (train, *others)]
    for part in parts:
        part[categories] = part[categories].astype(object).where(part[categories].notna(), None)
        part[categories] = part[categories].map(lambda cell: "missing" if cell is None else str(cell))
        part[numbers] = part[numbers].astype(np.float64)
    matrices = [encoder.fit_transform(parts[0]), *(encoder.transform(part) for part in parts[1:])]
    names = tuple(map(str, encoder.get_feature_names_out()))
    return [np.asarray(matrix, dtype=np.float64) for matrix in matrices], names
