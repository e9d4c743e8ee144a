"""What draws tables without a deep network: the Gaussian copula, and density models on binned columns."""

import numpy as np
import pandas as pd
import pytest
import torch

from paperback.density.baselines import CategoricalMixture, IndependentCategorical
from paperback.density.baselines.gaussian_copula import GaussianCopula
from paperback.density.baselines.training_rows import TrainingRows
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

    scores = []
    for build in (mixture, independent):
        drawn = BinnedGenerator(build).fit(table(), progress=False).sample(800)
        scores.append(detection_auc(table(seed=1), drawn))
    assert scores[0] < scores[1] - 0.05


def test_a_binned_generator_draws_training_cells_of_the_states_of_its_model():
    frame = table().assign(e=7, f=[f"rare {i}" if i < 60 else "often" for i in range(800)])
    generator = BinnedGenerator(lambda states: IndependentCategorical(len(states), states))
    rows = generator.fit(frame, progress=False).sample(3_000)
    assert list(rows.columns) == list(frame.columns)
    assert (rows.dtypes == frame.dtypes).all()
    assert (rows["e"] == 7).all()
    for name in frame.columns:
        assert set(rows[name].dropna()) <= {*frame[name], "(other)"}  # a state that was reserved
    assert rows["f"].nunique() > 21  # categories without a state of their own come back too
    assert rows["a"].quantile(0.5) == pytest.approx(frame["a"].quantile(0.5), rel=0.1)
    states = generator.model.sample(3_000, torch.Generator().manual_seed(0))
    assert torch.equal(generator.bins.transform(rows), states)


def test_a_state_that_no_training_cell_has_is_written_as_bins_do():
    class Unseen(IndependentCategorical):
        def _sample(self, n, generator):
            return torch.tensor(self.n_states).repeat(n, 1) - 1

    frame = pd.DataFrame({"number": np.arange(100), "text": ["x", "y"] * 50})
    rows = BinnedGenerator(lambda states: Unseen(len(states), states)).fit(frame, progress=False).sample(5)
    assert rows["number"].isna().all()
    assert (rows["text"] == "(other)").all()


def test_training_rows_come_back_whole():
    rows = TrainingRows().fit(table()).sample(1_000)
    assert (rows.merge(table(), how="left", indicator=True)["_merge"] == "both").all()
    assert rows["a"].iloc[:800].nunique() == 800  # each comes once before any comes twice
    assert rows["a"].iloc[:800].tolist() != table()["a"].tolist()
    assert detection_auc(table(seed=1), rows.iloc[:800]) < 0.56


@pytest.mark.parametrize(
    "make",
    [
        GaussianCopula,
        TrainingRows,
        lambda: BinnedGenerator(lambda states: IndependentCategorical(len(states), states)),
    ],
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
