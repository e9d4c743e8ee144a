"""Two-sample measures on tables."""

import numpy as np
import pandas as pd
import pytest

from paperback.errors import DataError
from paperback.numerics.divergence import correlation_error, detection_auc, numeric_features


def table(n, seed, tie=1.0):
    rng = np.random.default_rng(seed)
    a = rng.normal(size=n)
    return pd.DataFrame({"a": a, "b": tie * a + 0.1 * rng.normal(size=n), "c": rng.choice(["x", "y"], n)})


def test_equal_laws_cannot_be_told_apart():
    assert detection_auc(table(600, 0), table(600, 1)) < 0.58


def test_dependence_is_seen_though_the_margins_agree():
    drawn = table(600, 1).assign(b=table(600, 2)["b"])
    assert detection_auc(table(600, 0), drawn) > 0.9


def test_categories_and_empty_cells_are_seen():
    assert detection_auc(table(300, 0), table(300, 1).assign(c="x")) > 0.7
    empty = table(300, 1)
    empty.loc[::2, "a"] = np.nan
    assert detection_auc(table(300, 0), empty) > 0.7


@pytest.mark.parametrize("known", [0, 1, 5])
def test_a_column_that_is_hardly_ever_known_does_no_harm(known):
    real, drawn = table(100, 0).assign(d=np.nan), table(100, 1).assign(d=np.nan)
    real.loc[: known - 1, "d"] = 1.0
    assert 0.5 <= detection_auc(real, drawn, folds=5) < 0.7


def test_correlation_error():
    real = table(4_000, 0)
    assert correlation_error(real, real) == 0
    assert correlation_error(real, table(4_000, 1, tie=0.0)) == pytest.approx(1, abs=0.05)


def test_features():
    frame = pd.DataFrame({"t": ["b", None, "a"], "f": [True, False, True], "n": [1, 2, 3]})
    features = numeric_features(frame)
    assert features["t"].tolist()[::2] == [1.0, 0.0]
    assert np.isnan(features["t"][1])
    assert features["f"].tolist() == [1.0, 0.0, 1.0]


def test_bad_input():
    with pytest.raises(DataError, match="no column 'c'"):
        detection_auc(table(20, 0), table(20, 0).drop(columns="c"))
    with pytest.raises(DataError, match="at least 10"):
        detection_auc(table(5, 0), table(20, 0))
    with pytest.raises(DataError, match="two numeric columns"):
        correlation_error(table(20, 0)[["a", "c"]], table(20, 0))
