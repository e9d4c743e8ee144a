"""Tables as numbers: by what the training rows show, and without missing cells."""

import numpy as np
import pandas as pd
import pytest

from paperback.data import tables
from paperback.data.encoding import MAX_LEVELS, as_numbers
from paperback.errors import DataError


def table(rows=60, seed=0):
    rng = np.random.default_rng(seed)
    return pd.DataFrame({
        "size": rng.normal(size=rows),
        "count": rng.integers(0, 5, rows),
        "colour": rng.choice(["red", "blue"], rows),
        "grade": pd.Categorical(rng.choice(["a", "b", "c"], rows)),
        "fresh": rng.random(rows) < 0.5,
    })  # fmt: skip


def test_numbers_stay_and_categories_are_one_hot():
    frame = table()
    (matrix,), names = as_numbers(frame)
    assert names[:2] == ("size", "count")
    np.testing.assert_array_equal(matrix[:, 0], frame["size"])
    for colour in ("red", "blue"):
        np.testing.assert_array_equal(matrix[:, names.index(f"colour_{colour}")], frame["colour"] == colour)
    assert matrix.shape == (60, len(names))


def test_other_tables_are_encoded_by_the_first():
    train, test = table(), table(10, seed=1)
    test.loc[0, "colour"] = "green"
    (first, second), names = as_numbers(train, test)
    assert first.shape[1] == second.shape[1] == len(names)
    colours = [names.index("colour_red"), names.index("colour_blue")]
    assert second[0, colours].sum() == 0
    assert second[1:, colours].sum() == 9


def test_missing_cells_get_the_median_and_a_column():
    frame = table()
    frame.loc[[3, 5], "size"] = np.nan
    frame.loc[[1], "colour"] = None
    (matrix,), names = as_numbers(frame)
    assert np.isfinite(matrix).all()
    assert matrix[3, 0] == frame["size"].median()
    indicator = matrix[:, [i for i, name in enumerate(names) if name.startswith("missingindicator")]]
    assert indicator.sum() == 2
    assert matrix[1, names.index("colour_missing")] == 1


def test_many_levels_share_a_column():
    frame = pd.DataFrame({"name": [f"n{i}" for i in range(100)] * 2})
    (matrix,), _ = as_numbers(frame)
    assert matrix.shape[1] <= MAX_LEVELS
    np.testing.assert_array_equal(matrix.sum(1), 1)


def test_shipped_tables():
    for load in (tables.diamonds, tables.housing, tables.credit):
        data = load()
        matrices, names = as_numbers(data.train.x.head(500), data.test.x.head(100))
        assert all(np.isfinite(matrix).all() for matrix in matrices)
        assert len(set(names)) == len(names)


def test_a_table_without_values():
    with pytest.raises(DataError, match="no column"):
        as_numbers(pd.DataFrame({"a": [np.nan, np.nan]}))
