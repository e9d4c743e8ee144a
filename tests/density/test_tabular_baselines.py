"""What draws tables without a deep network: the Gaussian copula, and density models on binned columns."""

import numpy as np
import pandas as pd
import pytest
import torch

from paperback.density.baselines import CategoricalMixture, IndependentCategorical
from paperback.density.baselines.gaussian_copula import GaussianCopula
from paperback.density.binned import BinnedGenerator
from paperback.density.constrained_tabular import LinearConstraints, guard
from paperback.density.interface import TabularGenerator
from paperback.errors import DataError
from paperback.numerics.divergence import detection_auc


def table(n=800, seed=0):
    rng = np.random.default_rng(seed)
    a = rng.gamma(2.0, 2.0, n)
    b = a + rng.gamma(1.0, 1.0, n)
    c = np.where(a + rng.normal(size=n) > 4, "large", "small")
    empty = np.where(rng.random(n) < 0.1, np.nan, rng.integers(0, 5, n))
    return pd.DataFrame({"a": a, "b": b, "c": c, "d": empty})


def test_copula_keeps_margins_and_correlation():
    rows = GaussianCopula().fit(table()).sample(4_000)
    assert list(rows.columns) == ["a", "b", "c", "d"]
    assert rows["a"].mean() == pytest.approx(table()["a"].mean(), rel=0.05)
    assert (rows["c"] == "large").mean() == pytest.approx((table()["c"] == "large").mean(), abs=0.03)
    assert rows["d"].isna().mean() == pytest.approx(0.1, abs=0.03)
    assert rows[["a", "b"]].corr("spearman").iloc[0, 1] == pytest.approx(
        table()[["a", "b"]].corr("spearman").iloc[0, 1], abs=0.05
    )
    assert set(rows["a"]) <= set(table()["a"])


def test_copula_of_independent_columns_is_independent():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"a": rng.normal(size=2_000), "b": rng.normal(size=2_000)})
    assert abs(GaussianCopula().fit(frame).sample(4_000).corr().iloc[0, 1]) < 0.06


def test_a_mixture_on_bins_is_harder_to_tell_from_real_rows_than_independent_columns():
    def mixture(states):
        return CategoricalMixture(len(states), states, 10)

    def independent(states):
        return IndependentCategorical(len(states), states)

    bins = BinnedGenerator(mixture).fit(table(), progress=False).bins
    real = bins.inverse_transform(bins.transform(table(seed=1)))
    scores = []
    for build in (mixture, independent):
        scores.append(detection_auc(real, BinnedGenerator(build).fit(table(), progress=False).sample(800)))
    assert scores[0] < scores[1] - 0.05


@pytest.mark.parametrize(
    "make",
    [GaussianCopula, lambda: BinnedGenerator(lambda states: IndependentCategorical(len(states), states))],
)
def test_the_contract(make):
    model = make()
    assert isinstance(model, TabularGenerator)
    with pytest.raises(DataError, match="fit"):
        model.sample(3)
    model.fit(table(), progress=False)
    first, second = (model.sample(20, torch.Generator().manual_seed(1)) for _ in range(2))
    pd.testing.assert_frame_equal(first, second)
    assert not first.equals(model.sample(20, torch.Generator().manual_seed(2)))
    rules = LinearConstraints.parse(["b >= a", "a >= 0"])
    assert rules.violation_rate(guard(model.sample, rules)(500)) == 0
    with pytest.raises(DataError, match="n is 0"):
        model.sample(0)
    with pytest.raises(DataError, match="no setting 'epochs'"):
        make().fit(table(), progress=False, epochs=3)
