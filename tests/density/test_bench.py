import math
import re

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import paperback
from paperback.compare import compare
from paperback.compare.bench import Bench
from paperback.compare.job import Result
from paperback.compare.worker import load_data
from paperback.data import images
from paperback.density import ConstrainedTabular
from paperback.density.bench import BENCH, completion_scores
from paperback.density.bench.measure import class_auc
from paperback.errors import DataError, NotSupportedError

DENSITIES = ["probabilistic-circuit", "marginalization", "independent", "mixture", "rbm", "masked-network"]
GENERATORS = ["constrained-tabular", "tabular-vae", "gaussian-copula", "training-rows"]
RULES = "# lengths and prices\nlength >= -1\nprice - 10*length <= 12  # as they come\n"
OF_ROWS = ("violation_rate", "row_auc", "row_r2", "row_class_auc", "correlation_error")


def write_table(path, n=120, rules=None):
    rng = np.random.default_rng(0)
    size = rng.integers(0, 3, n)
    frame = pd.DataFrame(
        {"length": size + rng.normal(0, 0.2, n), "colour": np.where(rng.random(n) < 0.5, "red", "blue")}
    )
    frame["size"] = np.array(["small", "middle", "large"])[size]
    frame["price"] = 10.0 * size + rng.normal(0, 1, n)
    frame.to_csv(path, index=False)
    if rules is not None:
        path.with_suffix(".rules").write_text(rules, encoding="utf-8")
    return path


def measure(name, data, folder, seed=0):
    measured = BENCH.evaluate(BENCH.contender(name), data, "smoke", seed, folder)
    assert set(measured) == {metric.name for metric in BENCH.metrics}
    assert all(value is None or math.isfinite(value) for value in measured.values())
    return measured


@pytest.fixture(scope="module")
def digits():
    return BENCH.load(None, None, "smoke", 0)


def test_the_bench_is_what_compare_expects():
    assert isinstance(BENCH, Bench)
    assert BENCH.primary.name == "completion_nll"
    assert BENCH.cost is not None
    assert BENCH.cost.name == "fit_seconds"
    methods = {contender.name for contender in BENCH.contenders if contender.kind == "method"}
    assert methods == {"monotone-dbm", "probabilistic-circuit", "marginalization", "constrained-tabular"}


def test_default_data_are_the_digits_in_four_grey_levels(digits):
    assert digits.image_shape == (8, 8)
    assert digits.n_states == (4,) * 64
    assert digits.n_classes == 10
    assert digits.train.x.shape == (200, 64)
    assert sorted(digits.train.x.unique().tolist()) == [0, 1, 2, 3]
    assert any("budget smoke takes 200 of" in note for note in digits.dataset.notes)
    raw = images.digits(0).train.x[:200].flatten(1).long()
    assert torch.equal(digits.train.x, raw * 4 // 17)


def test_masks_are_fixed_by_seed_and_hide_something_of_every_row(digits):
    again, other = BENCH.load(None, None, "smoke", 0), BENCH.load(None, None, "smoke", 1)
    assert torch.equal(again.observed, digits.observed)
    assert torch.equal(again.test.x, digits.test.x)
    assert not torch.equal(other.observed, digits.observed)
    assert float(digits.observed.double().mean()) == pytest.approx(0.4, abs=0.03)


def test_a_table_of_few_columns_hides_something_of_every_row(tmp_path):
    data = BENCH.load(write_table(tmp_path / "t.csv"), "size", "quick", 0)
    assert bool((~data.observed).any(1).all())


def test_a_table_with_a_class_target(tmp_path):
    data = BENCH.load(write_table(tmp_path / "t.csv"), "size", "quick", 0)
    assert data.image_shape is None
    assert data.n_classes == 3
    assert len(data.n_states) == 3  # length, colour, price
    assert data.train.y.dtype == torch.int64


def test_a_numeric_target_is_one_more_column(tmp_path):
    data = BENCH.load(write_table(tmp_path / "t.csv"), "price", "quick", 0)
    assert data.n_classes is None
    assert data.train.y is None
    assert len(data.n_states) == 4


@pytest.mark.parametrize("labelled", [True, False])
def test_a_folder_of_large_colour_images_becomes_small_and_grey(tmp_path, labelled):
    rng = np.random.default_rng(0)
    for i in range(20):
        folder = tmp_path / "photos" / ("cat" if i % 2 else "dog") if labelled else tmp_path / "photos"
        folder.mkdir(parents=True, exist_ok=True)
        height = 70 if i else 84  # the first decides the shape
        Image.fromarray(rng.integers(0, 255, (height, 56, 3), dtype=np.uint8)).save(folder / f"{i:02}.png")
    data = BENCH.load(tmp_path / "photos", None, "quick", 0)
    assert max(data.image_shape) == 14
    assert data.n_classes == (2 if labelled else None)
    assert data.n_states == (4,) * (data.image_shape[0] * data.image_shape[1])
    assert any("were brought to 14x" in note for note in data.dataset.notes)
    assert max(BENCH.load(tmp_path / "photos", None, "standard", 0).image_shape) == 28


def test_binary_images_keep_two_levels(tmp_path):
    x = (np.random.default_rng(0).random((40, 6, 6)) < 0.5).astype(np.uint8)
    np.savez(tmp_path / "binary.npz", images=x)
    assert BENCH.load(tmp_path / "binary.npz", None, "quick", 0).n_states == (2,) * 36


def test_bad_data_are_one_sentence(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"a\.png"):
        BENCH.load(tmp_path / "photos", None, "quick", 0)
    with pytest.raises(DataError, match="no column 'label'"):
        BENCH.load(tmp_path / "photos", "label", "quick", 0)
    with pytest.raises(DataError, match="missing"):
        BENCH.load(tmp_path / "missing.csv", None, "quick", 0)


@pytest.mark.parametrize("name", DENSITIES)
def test_a_density_model_is_measured_and_saved(digits, name, tmp_path):
    measured = measure(name, digits, tmp_path)
    assert 0 < measured["completion_nll"] < 1.02 * math.log(4)
    without_class = ("probabilistic-circuit", "marginalization", "independent")
    assert (measured["class_accuracy"] is None) == (name in without_class)
    exact, estimate = measured["bits_per_dim"], measured["bits_per_dim_estimate"]
    assert (exact is None and estimate is None) == (name == "masked-network")
    assert (measured["sample_auc"] is None) == (name == "masked-network")
    assert all(measured[metric] is None for metric in OF_ROWS)
    assert measured["bytes"] > 1000
    loaded = paperback.load(tmp_path / "model")
    scores = completion_scores(
        loaded.conditional(digits.test.x, digits.observed), digits.test.x, digits.observed
    )
    assert scores["completion_nll"] == pytest.approx(measured["completion_nll"], abs=1e-6)


def test_the_marginalization_model_has_a_likelihood_by_each_of_its_heads(digits, tmp_path):
    measured = measure("marginalization", digits, tmp_path)
    model = paperback.load(tmp_path / "model")
    scale = -model.n_variables * math.log(2)
    assert measured["bits_per_dim"] == pytest.approx(
        float(model.log_prob(digits.test.x, exact=True).mean()) / scale, rel=1e-5
    )
    assert measured["bits_per_dim_estimate"] == pytest.approx(
        float(model.log_prob(digits.test.x).mean()) / scale, rel=1e-5
    )


def test_the_same_seed_measures_the_same(digits, tmp_path):
    runs = [measure("rbm", digits, tmp_path / str(i), seed=3) for i in range(2)]
    for name in ("completion_nll", "class_accuracy", "sample_auc", "bytes"):
        assert runs[0][name] == runs[1][name]


# -- tables with mixed columns -------------------------------------------------------------------------------


def test_rows_are_kept_as_they_are_with_the_target_among_them(tmp_path):
    path = write_table(tmp_path / "t.csv")
    for target, column in (("size", {"small", "middle", "large"}), ("price", None), (None, None)):
        data = BENCH.load(path, target, "quick", 0)
        whole = pd.concat([data.table.train, data.table.val, data.table.test])
        assert set(whole.columns) == {"length", "colour", "size", "price"}
        assert sorted(whole["price"]) == pytest.approx(sorted(pd.read_csv(path)["price"]))
        assert column is None or set(whole["size"]) == column
    assert BENCH.load(None, None, "smoke", 0).table is None


def test_numbers_that_are_classes_stay_numbers_in_the_rows(tmp_path):
    frame = pd.DataFrame({"a": np.arange(60.0), "grade": np.arange(60) % 3})
    frame.to_csv(tmp_path / "t.csv", index=False)
    (tmp_path / "t.rules").write_text("grade <= 2")
    data = BENCH.load(tmp_path / "t.csv", "grade", "quick", 0)
    assert data.n_classes == 3
    assert sorted(data.table.train["grade"].unique()) == [0, 1, 2]
    assert data.table.rules.violation_rate(data.table.test) == 0


@pytest.mark.parametrize("target", [None, "size", "price"])
@pytest.mark.parametrize("name", ["monotone-dbm", *DENSITIES, *GENERATORS])
def test_everybody_who_draws_rows_is_judged_by_them(name, target, tmp_path):
    data = BENCH.load(write_table(tmp_path / "t.csv", rules=RULES), target, "smoke", 0)
    assert BENCH.contender(name).applies(data) is None
    measured = measure(name, data, tmp_path / "out")
    draws = name != "masked-network"
    assert (measured["completion_nll"] is None) == (name in GENERATORS)
    assert (measured["row_auc"] is None) != draws
    assert (measured["correlation_error"] is None) != draws
    assert (measured["violation_rate"] is None) != draws
    assert (measured["row_r2"] is not None) == (draws and target == "price")
    assert (measured["row_class_auc"] is not None) == (draws and target == "size")
    if draws:
        assert 0.5 <= measured["row_auc"] <= 1.0
        assert 0.5 <= measured["sample_auc"] <= 1.0
        assert measured["sampling_seconds"] > 0


def test_rules_are_read_from_beside_the_table_and_kept_by_the_method_for_them(tmp_path):
    path = write_table(tmp_path / "t.csv.gz", rules=None)
    (tmp_path / "t.rules").write_text(RULES)
    data = BENCH.load(path, None, "quick", 0)
    assert len(data.table.rules) == 2
    assert BENCH.companions(path) == [tmp_path / "t.rules"]
    assert any("t.rules has 2 rules, which 0.00% of these rows break" in n for n in data.dataset.notes)
    kept = measure("constrained-tabular", data, tmp_path / "kept")
    assert kept["violation_rate"] == 0
    loaded = paperback.load(tmp_path / "kept" / "model")
    assert isinstance(loaded, ConstrainedTabular)
    assert data.table.rules.violation_rate(loaded.sample(200)) == 0
    assert measure("independent", data, tmp_path / "free")["violation_rate"] > 0


def test_training_rows_that_break_a_rule_do_not_stop_the_method(tmp_path):
    data = BENCH.load(write_table(tmp_path / "t.csv", rules="length >= 0.9"), None, "quick", 0)
    assert 0.2 < measure("training-rows", data, tmp_path / "a")["violation_rate"] < 0.6
    assert measure("constrained-tabular", data, tmp_path / "b")["violation_rate"] == 0


def test_scores_of_the_training_rows_themselves_are_the_best_there_are(tmp_path):
    data = BENCH.load(write_table(tmp_path / "t.csv", n=600), "price", "quick", 0)
    rows, free = (measure(name, data, tmp_path / name) for name in ("training-rows", "independent"))
    assert rows["row_auc"] < 0.65 < 0.75 < free["row_auc"]
    assert rows["row_r2"] > 0.9 > 0.3 > free["row_r2"]
    assert rows["correlation_error"] < 0.2 < free["correlation_error"]


def test_contenders_that_do_not_apply_say_why(digits, tmp_path):
    def reason(name, data):
        return BENCH.contender(name).applies(data)

    for name in GENERATORS:
        assert "these are images" in reason(name, digits)
    plain = BENCH.load(write_table(tmp_path / "t.csv"), "size", "smoke", 0)
    assert "t.rules" in reason("constrained-tabular", plain)
    assert [name for name in DENSITIES + GENERATORS if reason(name, plain)] == ["constrained-tabular"]
    nobody = BENCH.load(write_table(tmp_path / "u.csv", rules="length >= 100"), None, "smoke", 0)
    assert "fewer than two training rows keep" in reason("constrained-tabular", nobody)
    frame = pd.read_csv(tmp_path / "t.csv")
    frame.assign(id=[f"row {i}" for i in range(len(frame))]).to_csv(tmp_path / "id.csv", index=False)
    assert "different texts" in reason("tabular-vae", BENCH.load(tmp_path / "id.csv", None, "smoke", 0))
    frame.assign(blank=np.nan).to_csv(tmp_path / "blank.csv", index=False)
    blank = BENCH.load(tmp_path / "blank.csv", None, "smoke", 0)
    assert "column blank is empty" in reason("tabular-vae", blank)
    assert measure("mixture", blank, tmp_path / "out")["row_auc"] is not None


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ("length >= 0\nlenght <= 3", r't\.rules: constraint 2, "lenght <= 3", character 1: .*length'),
        ("length * price >= 0", "character 8: the product of two columns is not linear"),
        ("length >= 1\nlength <= 0", "constraint"),
        ("colour >= 1", "t.rules: column colour holds .* a constraint needs numbers"),
        ("# nothing\n", "t.rules: there are no constraints"),
    ],
)
def test_bad_rules_are_refused_before_anything_runs(tmp_path, rules, message):
    path = write_table(tmp_path / "t.csv", rules=rules)
    with pytest.raises(DataError, match=message):
        compare("density", data=path, budget="smoke", out=tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_rules_that_cannot_be_read_are_named(tmp_path):
    path = write_table(tmp_path / "t.csv", rules="length >= 0 or price >= 0")
    with pytest.raises(NotSupportedError, match=r"t\.rules: constraint 1, .*character 13"):
        BENCH.load(path, None, "smoke", 0)
    (tmp_path / "t.rules").write_bytes(b"length >= 0 \xff")
    with pytest.raises(DataError, match=r"t\.rules cannot be read as UTF-8"):
        BENCH.load(path, None, "smoke", 0)


def test_a_target_without_another_column_that_varies_is_refused(tmp_path):
    pd.DataFrame({"a": np.zeros(30), "b": ["x", "y"] * 15}).to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(DataError, match="beside the target b is constant"):
        BENCH.load(tmp_path / "t.csv", "b", "smoke", 0)


def run_here(jobs, folder, engine, start):
    """What `paperback.compare.engine.run_all` does, without a process for each job."""
    for job in jobs:
        out = folder / job.name / "artefact"
        out.mkdir(parents=True)
        measured = BENCH.evaluate(
            BENCH.contender(job.contender), load_data(BENCH, job), "smoke", job.seed, out
        )
        yield job, Result(job.fingerprint, "done", metrics=dict(measured), seconds=1.0)


def test_the_leaderboard_tells_who_has_no_rank_and_who_does_not_apply(tmp_path, capsys, monkeypatch):
    path = write_table(tmp_path / "t.csv")
    monkeypatch.setattr("paperback.compare.comparison.run_all", run_here)
    settings = {"data": path, "methods": ["constrained-tabular"], "budget": "smoke", "seeds": 1}
    board = compare("density", **settings, out=tmp_path / "out")
    rows = {row.contender: row for row in board.rows}
    assert rows["constrained-tabular"].status == "does not apply"
    assert {name for name, row in rows.items() if row.status == "done" and row.rank is None} == {
        "tabular-vae",
        "gaussian-copula",
        "training-rows",
    }
    printed = " ".join(capsys.readouterr().out.split())
    page = re.sub("<[^>]*>", "", (tmp_path / "out" / "leaderboard.html").read_text())
    for text in (printed, " ".join(page.split())):
        assert "does not apply: the table has no rules to keep" in text
        assert "so without a rank: VAE for tables; Gaussian copula; training rows themselves" in text
    assert "↓ states told" in printed.partition("so without a rank")[2]  # what they have stands below
    table = pd.read_csv(tmp_path / "out" / "leaderboard.csv").set_index("contender")
    assert "t.rules" in table.loc["constrained-tabular", "reason"]
    assert table.loc["gaussian-copula", "reason"].startswith("no rank: ")
    path.with_suffix(".rules").write_text(RULES)  # other rules, other results
    with pytest.raises(paperback.errors.PaperbackError, match="differs in files beside the data"):
        compare("density", **settings, out=tmp_path / "out", progress=False)


# -- numbers -------------------------------------------------------------------------------------------------


def test_completion_scores_look_at_hidden_entries_only():
    p = torch.tensor([[[0.5, 0.5], [0.9, 0.1], [0.0, 1.0]]])
    states, observed = torch.tensor([[0, 1, 0]]), torch.tensor([[True, False, False]])
    scores = completion_scores(p, states, observed)
    assert scores["completion_nll"] == pytest.approx((-math.log(0.1) - math.log(1e-6)) / 2, rel=1e-5)
    assert scores["completion_accuracy"] == 0.0


def test_class_auc_is_the_mean_over_classes_against_the_rest():
    truth = pd.Series(["a", "b", "c", "a"])
    perfect = pd.get_dummies(truth).astype(float)
    assert class_auc(truth, perfect) == 1.0
    assert class_auc(truth, 1 - perfect) == 0.0
    assert class_auc(truth, perfect[["a", "b"]]) == pytest.approx((1 + 1 + 0.5) / 3)  # c was never learned
