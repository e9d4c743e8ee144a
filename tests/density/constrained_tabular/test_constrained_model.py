"""The generators in their modes, completion, guardrails around others, saving, and bad input."""

import numpy as np
import pandas as pd
import pytest
import torch

import paperback
from paperback.density.baselines.gaussian_copula import GaussianCopula
from paperback.density.constrained_tabular import (
    ORDERINGS,
    ConstrainedTabular,
    ConstraintLayer,
    Encoding,
    LinearConstraints,
    guard,
    order_columns,
    repair,
)
from paperback.density.constrained_tabular.vae import TabularVAE, constrain
from paperback.density.interface import TabularGenerator
from paperback.errors import DataError, NotSupportedError

RULES = ("low <= high", "high <= 2*low + 3", "low >= 0", "count <= low + 20")
QUICK = {"vae": {"epochs": 3, "batch_size": 100}, "gan": {"epochs": 2, "batch_size": 100}}


def table(n=300, seed=0):
    rng = np.random.default_rng(seed)
    low = rng.gamma(2, 2, n).round(1)
    high = (low + rng.random(n) * (low + 3)).round(1)
    note = pd.Series(rng.choice(["x", "y"], n)).where(rng.random(n) > 0.1)
    frame = pd.DataFrame(
        {"low": low, "note": note, "high": high, "count": (low + rng.integers(0, 20, n)).astype(int)}
    )
    return frame.assign(
        extra=np.where(rng.random(n) < 0.2, np.nan, rng.normal(size=n)), flag=rng.random(n) < 0.5
    )


def fitted(base="vae", mode="train", rules=RULES, **settings):
    return ConstrainedTabular(base, rules, mode, **settings).fit(table(), progress=False, **QUICK[base])


@pytest.mark.parametrize("base", ["vae", "gan"])
@pytest.mark.parametrize("mode", ["train", "guardrail"])
def test_no_row_breaks_a_rule(base, mode):
    model = fitted(base, mode)
    rows = model.sample(2_000)
    rules = LinearConstraints.parse(RULES)
    assert rules.violation_rate(rows) == 0
    assert (rows["low"] <= rows["high"]).all()
    assert list(rows.columns) == list(table().columns)
    assert (rows["low"] == rows["low"].round(1)).all()
    assert rows["count"].dtype == np.int64
    assert set(rows["note"].dropna()) <= {"x", "y"}
    assert rows["extra"].isna().any()
    assert isinstance(model, TabularGenerator)


@pytest.mark.parametrize("base", ["vae", "gan"])
def test_without_the_layer_rules_are_broken(base):
    assert LinearConstraints.parse(RULES).violation_rate(fitted(base, "off").sample(500)) > 0.05
    assert len(fitted(base, "train", None).sample(10)) == 10


@pytest.mark.parametrize("order", [*ORDERINGS, "auto", ["count", "high", "low"]])
def test_every_ordering(order):
    model = fitted(order=order)
    assert sorted(model.layer.order) == ["count", "high", "low"]
    assert LinearConstraints.parse(RULES).violation_rate(model.sample(300)) == 0


def test_orderings_put_the_worst_column_last():
    real = table(500)
    wrong = real.assign(high=real["high"].sample(frac=1, random_state=0).to_numpy() * 3 + 40)
    for how in ("corr", "kde", "wasserstein", "jsd"):
        assert order_columns(how, ["high", "low", "count"], real, wrong)[-1] == "high"
    assert order_columns("given", ["b", "a"]) == ["b", "a"]
    assert sorted(order_columns("random", ["a", "b"], seed=1)) == ["a", "b"]
    with pytest.raises(DataError, match="compares real and generated"):
        order_columns("kde", ["low"])
    with pytest.raises(DataError, match="one of given, random"):
        order_columns("best", ["low"])


@pytest.mark.parametrize("base", ["vae", "gan"])
def test_same_seed_same_rows(base):
    first, second = fitted(base).sample(50), fitted(base).sample(50)
    pd.testing.assert_frame_equal(first, second)
    model = fitted(base)
    other = model.sample(50, torch.Generator().manual_seed(1))
    assert not first.equals(other)


def test_training_through_the_layer_has_gradients_and_changes_the_weights():
    encoding = Encoding.fit(table())
    network = TabularVAE(encoding)
    rules = LinearConstraints.parse(RULES)
    layer = ConstraintLayer(rules, [c.name for c in encoding.numbers], spread=encoding.spread)
    amounts, states = encoding.encode(table())
    start = (amounts + 0.3).requires_grad_()
    after = constrain(network.modes, layer, start, states)
    (gradient,) = torch.autograd.grad((after**2).sum(), start)
    assert torch.isfinite(gradient).all()
    assert (after != start).any()
    assert torch.equal(constrain(network.modes, layer, amounts, states)[0], amounts[0])  # a real row stays
    plain, trained = fitted(mode="guardrail"), fitted(mode="train", order=["low", "high", "count"])
    weights = [model.network.decoder[0].weight for model in (plain, trained)]
    assert not torch.equal(*weights)


def test_a_correction_out_of_a_narrow_mode_stays_bounded():
    frame = pd.DataFrame(
        {"a": np.r_[np.zeros(300), np.linspace(100, 200, 100)], "b": np.linspace(1, 300, 400)}
    )
    encoding = Encoding.fit(frame.assign(b=frame["b"] + frame["a"]))
    modes = TabularVAE(encoding).modes
    layer = ConstraintLayer(LinearConstraints.parse(["a >= b - 50"]), ["a", "b"], ["b", "a"])
    amounts, states = encoding.encode(frame.assign(b=frame["b"] + frame["a"]))
    corrected = constrain(modes, layer, amounts, states)
    assert corrected.abs().max() <= 1
    assert (corrected[:, 0] != amounts[:, 0]).any()


def test_a_network_learns():
    frame = table(600)
    model = ConstrainedTabular("vae", RULES).fit(frame, progress=False, epochs=100, batch_size=100)
    rows = model.sample(2_000)
    assert abs(rows["low"].mean() - frame["low"].mean()) < 0.25 * frame["low"].mean()
    assert rows[["low", "high"]].corr().iloc[0, 1] > 0.5
    assert model.elbo(frame).mean() > fitted().elbo(frame).mean()


@pytest.mark.parametrize("base", ["vae", "gan"])
def test_saved_and_loaded_is_the_same(tmp_path, base):
    model = fitted(base)
    model.save_pretrained(tmp_path / "model")
    again = ConstrainedTabular.from_pretrained(tmp_path / "model")
    pd.testing.assert_frame_equal(model.sample(100), again.sample(100))
    assert again.layer.order == model.layer.order
    assert isinstance(paperback.load(tmp_path / "model"), ConstrainedTabular)


def test_parsed_constraints_are_saved_as_text(tmp_path):
    model = fitted(rules=LinearConstraints.parse(RULES))
    model.save_pretrained(tmp_path / "model")
    assert ConstrainedTabular.from_pretrained(tmp_path / "model").constraints.rows == model.constraints.rows


def test_completion_keeps_what_was_observed():
    model = fitted()
    given = table(50, seed=3)[["high", "note"]].fillna("x")
    rows = model.complete(given, ["high", "note"])
    assert (rows["high"] == given["high"]).all()
    assert (rows["note"] == given["note"]).all()
    assert LinearConstraints.parse(RULES).violation_rate(rows) == 0


def test_completion_refuses_evidence_without_a_completion():
    model = fitted()
    with pytest.raises(DataError, match=r"row 1: no completion .* high = -5"):
        model.complete(pd.DataFrame({"high": [4.0, -5.0]}), ["high"])
    with pytest.raises(DataError, match="row 0: no completion"):
        model.complete(pd.DataFrame({"high": [4.0], "low": [5.0]}), ["high", "low"])
    with pytest.raises(DataError, match="'wide' is observed"):
        model.complete(pd.DataFrame({"wide": [4.0]}), ["wide"])
    with pytest.raises(NotSupportedError, match="vae"):
        fitted("gan").complete(table(), ["high"])


def test_elbo_is_below_the_density_of_a_known_law():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"a": rng.normal(10, 3, 1_000), "b": rng.choice(["x", "y"], 1_000)})
    model = ConstrainedTabular("vae", None, "off").fit(frame, progress=False, epochs=100, batch_size=100)
    fresh = pd.DataFrame({"a": rng.normal(10, 3, 2_000), "b": rng.choice(["x", "y"], 2_000)})
    entropy = 0.5 * np.log(2 * np.pi * np.e * 9) + np.log(2)
    assert -entropy - 3 < float(model.elbo(fresh).mean()) < -entropy + 0.1
    with pytest.raises(NotSupportedError, match="CategoricalMixture"):
        model.log_prob(fresh)


# -- around others -----------------------------------------------------------------


def test_guard_around_any_sampler():
    copula = GaussianCopula().fit(table().drop(columns="extra"))
    rules = LinearConstraints.parse(RULES)
    assert rules.violation_rate(copula.sample(500)) > 0.05
    rows = guard(copula.sample, RULES)(500)
    assert rules.violation_rate(rows) == 0
    assert rows["count"].dtype == table()["count"].dtype
    pd.testing.assert_series_equal(rows["note"], copula.sample(500)["note"])


def test_an_estimator_as_base():
    model = ConstrainedTabular(GaussianCopula(), RULES, "guardrail").fit(table(), progress=False)
    assert LinearConstraints.parse(RULES).violation_rate(model.sample(300)) == 0
    with pytest.raises(NotSupportedError, match="out of reach"):
        ConstrainedTabular(GaussianCopula(), RULES, "train")


def test_repair_leaves_compliant_tables_alone():
    frame = table().set_index(pd.Index(range(1_000, 1_300)))
    pd.testing.assert_frame_equal(repair(frame, RULES), frame)


def test_repair_keeps_types_index_and_missing_cells():
    frame = pd.DataFrame({"a": [5, 1], "b": [3, 4], "c": [np.nan, 2.0]}, index=["r", "s"])
    before = frame.copy()
    rows = repair(frame, ["a <= b", "b <= c"], ["c", "a", "b"])
    pd.testing.assert_frame_equal(frame, before)
    assert rows.index.tolist() == ["r", "s"]
    assert rows["a"].dtype == np.int64
    assert rows.loc["s"].tolist() == [1, 2, 2.0]
    assert np.isnan(rows.loc["r", "c"])
    assert rows.loc["r", "a"] <= rows.loc["r", "b"]


def test_repair_says_what_could_not_stay_whole():
    with pytest.warns(UserWarning, match="1 cell"):
        rows = repair(pd.DataFrame({"n": [0], "m": [3]}), ["2*n == m"], ["m", "n"])
    assert rows["n"].tolist() == [1.5]


def test_a_table_from_a_csv_file_still_complies(tmp_path):
    rows = fitted().sample(500)
    rows.to_csv(tmp_path / "rows.csv", index=False)
    assert LinearConstraints.parse(RULES).violation_rate(pd.read_csv(tmp_path / "rows.csv")) == 0


# -- bad input -----------------------------------------------------------------------


def test_training_rows_that_break_a_rule():
    frame = table()
    frame.loc[[3, 7], "low"] = 99.0
    with pytest.raises(DataError, match=r"low <= high \(2 rows, first row 3\)"):
        ConstrainedTabular("vae", RULES).fit(frame, progress=False)
    model = ConstrainedTabular("vae", RULES)
    model.fit(frame, progress=False, allow_violations=True, **QUICK["vae"])
    assert model.encoding.spread["low"] < 90


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"base": "flow"}, "base is 'flow'"),
        ({"base": object()}, "without fit and sample"),
        ({"mode": "on"}, "mode is 'on'"),
        ({"order": "best"}, "order is 'best'"),
        ({"latent": 0}, "latent 0"),
        ({"constraints": ["low >= 1", "low <= 0"]}, "no row can satisfy"),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(DataError, match=words):
        ConstrainedTabular(**arguments)


def test_bad_use():
    with pytest.raises(DataError, match="not fitted"):
        ConstrainedTabular().sample(3)
    with pytest.raises(DataError, match="n is 0"):
        fitted().sample(0)
    with pytest.raises(DataError, match="perhaps low is meant"):
        ConstrainedTabular("vae", ["lo >= 0"]).fit(table(), progress=False)
    with pytest.raises(DataError, match="needs numbers"):
        ConstrainedTabular("vae", ["note >= 0"]).fit(table(), progress=False)
    with pytest.raises(DataError, match="each of"):
        fitted(order=["low"])
    with pytest.raises(DataError, match="no setting 'momentum'"):
        ConstrainedTabular("gan", None).fit(table(), progress=False, momentum=1)
    with pytest.raises(DataError, match="divide the batch"):
        ConstrainedTabular("gan", None).fit(table(), progress=False, batch_size=105)
