"""Tables to tensors and back: round trips, empty cells, decimals, and what is refused."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from paperback.density.constrained_tabular.table import Encoding, Modes
from paperback.errors import ArtefactError, DataError


def mixed(n=300, seed=0):
    rng = np.random.default_rng(seed)
    size = np.where(rng.random(n) < 0.5, rng.normal(1, 0.1, n), rng.normal(5, 0.3, n)).round(2)
    income = rng.integers(10, 90, n).astype(float)
    income[:20] = np.nan
    kind = pd.Series(rng.choice(["a", "b", "c"], n)).where(rng.random(n) > 0.1)
    return pd.DataFrame(
        {
            "kind": kind,
            "size": size,
            "income": income,
            "count": rng.integers(0, 9, n),
            "flag": rng.random(n) < 0.3,
        }
    )


def test_round_trip():
    frame = mixed()
    encoding = Encoding.fit(frame)
    amounts, states = encoding.encode(frame)
    values = Modes(encoding).values(amounts, states).double().numpy()
    back = encoding.decode(values, states.numpy())
    assert list(back.columns) == list(frame.columns)
    pd.testing.assert_series_equal(back["kind"], frame["kind"], check_dtype=False)
    pd.testing.assert_series_equal(back["flag"], frame["flag"])
    assert (back["income"].isna() == frame["income"].isna()).all()
    np.testing.assert_allclose(back["size"], frame["size"], atol=1e-4)
    np.testing.assert_allclose(back["count"], frame["count"], atol=1e-4)


def test_going_back_in_the_same_modes_is_the_inverse_and_differentiable():
    encoding = Encoding.fit(mixed())
    modes = Modes(encoding).double()
    amounts, states = encoding.encode(mixed())
    amounts = amounts.double().requires_grad_()
    again = modes.amounts(modes.values(amounts, states), states)
    torch.testing.assert_close(again, amounts, rtol=1e-9, atol=1e-9)
    (gradient,) = torch.autograd.grad(again.sum(), amounts)
    torch.testing.assert_close(gradient, torch.ones_like(gradient))


def test_two_clusters_get_modes_of_their_own():
    column = Encoding.fit(mixed()).numbers[0]
    assert column.name == "size"
    near = [min(abs(m - centre) for m in column.means) for centre in (1, 5)]
    assert max(near) < 0.3
    assert max(column.stds) < 1


def test_decimals_and_spread():
    encoding = Encoding.fit(mixed().assign(exact=np.random.default_rng(0).normal(size=300)))
    assert encoding.decimals == {"size": 2, "income": 0, "count": 0}
    assert encoding.spread["income"] == 79 or encoding.spread["income"] > 70


def test_one_hot_and_padding():
    encoding = Encoding.fit(mixed())
    modes = Modes(encoding)
    _, states = encoding.encode(mixed())
    blocks = modes.one_hot(states)
    assert (blocks.sum(1) == len(encoding.slots)).all()
    padded = modes.padded(blocks)
    assert torch.equal(modes.flat(padded), blocks)
    assert torch.equal(padded.argmax(2), states)


def test_survives_json():
    encoding = Encoding.fit(mixed())
    again = Encoding.from_list(json.loads(json.dumps(encoding.to_list())))
    assert again.columns == encoding.columns
    with pytest.raises(ArtefactError, match="damaged"):
        Encoding.from_list([{"nonsense": 1}])


def test_generated_types():
    frame = mixed().dropna()
    encoding = Encoding.fit(frame)
    amounts, states = encoding.encode(frame)
    values = Modes(encoding).values(amounts, states).double().numpy().round(2)
    back = encoding.decode(values, states.numpy())
    assert back["count"].dtype == np.int64
    assert back["flag"].dtype == bool
    assert pd.api.types.is_string_dtype(back["kind"])


def test_same_seed_same_encoding():
    assert Encoding.fit(mixed(), 3).columns == Encoding.fit(mixed(), 3).columns


def test_constant_columns():
    frame = pd.DataFrame({"a": [2.5] * 20, "b": ["x"] * 20, "c": range(20)})
    encoding = Encoding.fit(frame)
    amounts, states = encoding.encode(frame)
    assert torch.isfinite(amounts).all()
    assert Modes(encoding).values(amounts, states)[:, 0].tolist() == [2.5] * 20


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (pd.DataFrame({"a": [1.0]}), "at least two rows"),
        (pd.DataFrame({"a": [1.0, np.inf]}), "column a, row 1 is infinite"),
        (pd.DataFrame({"a": [np.nan, np.nan]}), "column a is empty"),
        (pd.DataFrame([[1, 2], [3, 4]], columns=["a", "a"]), "more than once"),
        (pd.DataFrame({"a": [f"name {i}" for i in range(60)]}), "60 different texts"),
    ],
)
def test_tables_that_cannot_be_used(frame, words):
    with pytest.raises(DataError, match=words):
        Encoding.fit(frame)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: f.drop(columns="size"), "no column 'size'"),
        (lambda f: f.assign(size=[np.nan, *f["size"][1:]]), "column size, row 0 is empty"),
        (lambda f: f.assign(size="large"), "column size holds"),
        (lambda f: f.assign(kind="z"), "column kind, row 0 is 'z'"),
    ],
)
def test_rows_that_do_not_fit(change, words):
    with pytest.raises(DataError, match=words):
        Encoding.fit(mixed()).encode(change(mixed()))
