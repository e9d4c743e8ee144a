"""How far two samples are from having been drawn from the same distribution."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from paperback.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

FEWEST_ROWS = 10  # of each sample


def detection_auc(real: pd.DataFrame, drawn: pd.DataFrame, seed: int = 0, folds: int = 3) -> float:
    """How well a classifier tells drawn rows from real ones: cross-validated area under the ROC curve.

    A classifier two-sample test (Lopez-Paz and Oquab 2017) with boosted trees, on columns of any kind. Trees
    see interactions between columns; a linear classifier would call independent columns perfect.

    Args:
        real: real rows, at least 10.
        drawn: generated rows, at least 10, with the same columns; others are ignored.
        seed: of the folds and the classifier.
        folds: of the cross-validation, >= 2.

    Returns:
        A number in [0.5, 1]; 0.5 is what cannot be told apart. Values below are chance and count as 0.5.

    Raises:
        DataError: if a column is missing or there are too few rows.
    """
    import pandas as pd
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    absent = [name for name in real.columns if name not in drawn.columns]
    if absent:
        raise DataError(f"the drawn rows have no column {absent[0]!r}, which the real ones have.")
    if min(len(real), len(drawn)) < FEWEST_ROWS:
        raise DataError(
            f"there are {len(real)} real and {len(drawn)} drawn rows; give at least {FEWEST_ROWS} of each."
        )
    rows = numeric_features(pd.concat([real, drawn[list(real.columns)]], ignore_index=True))
    # Boosted trees need a known cell of each column in every fold; a hardly known one gets a number below.
    rare = rows.columns[rows.notna().sum() < FEWEST_ROWS]
    rows[rare] = rows[rare].fillna(rows[rare].min() - 1.0).fillna(0.0)
    is_drawn = np.repeat([0, 1], [len(real), len(drawn)])
    classifier = HistGradientBoostingClassifier(max_iter=50, early_stopping=False, random_state=seed)
    split = StratifiedKFold(folds, shuffle=True, random_state=seed)
    score = cross_val_predict(classifier, rows, is_drawn, cv=split, method="predict_proba")[:, 1]
    return max(0.5, float(roc_auc_score(is_drawn, score)))


def correlation_error(real: pd.DataFrame, drawn: pd.DataFrame) -> float:
    """Mean distance between the correlations of the numeric columns in two tables, over all pairs; 0 is best.

    Args:
        real: real rows, with two numeric columns or more.
        drawn: generated rows with the same columns.

    Returns:
        A number in [0, 2]. A column that is constant in one of the tables has correlation 0 there.

    Raises:
        DataError: if there are fewer than two numeric columns.
    """
    numeric = real.select_dtypes("number").columns
    if len(numeric) < 2:
        raise DataError("correlations need two numeric columns or more.")
    first, second = (table[numeric].astype(float).corr().fillna(0.0).to_numpy() for table in (real, drawn))
    return float(np.abs(first - second)[np.triu_indices(len(numeric), 1)].mean())


def numeric_features(frame: pd.DataFrame) -> pd.DataFrame:
    """Numbers as they are, other columns as codes of their sorted values; empty cells are NaN."""
    import pandas as pd

    columns = {}
    for name, cells in frame.items():
        if pd.api.types.is_numeric_dtype(cells) and not pd.api.types.is_bool_dtype(cells):
            columns[name] = cells.to_numpy(dtype=np.float64, na_value=np.nan)
        else:
            texts = cells.astype(object).where(cells.notna(), None).map(str, na_action="ignore")
            codes = texts.astype("category").cat.codes.to_numpy(np.float64)
            columns[name] = np.where(codes < 0, np.nan, codes)
    return pd.DataFrame(columns)
