import math

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import paperback
from paperback.compare.bench import Bench
from paperback.data import images
from paperback.density import CategoricalMixture, IndependentCategorical
from paperback.density.bench import BENCH, completion_scores, detection_auc
from paperback.errors import DataError

BASELINES = [contender.name for contender in BENCH.contenders if contender.kind == "baseline"]


def write_table(path, n=120):
    rng = np.random.default_rng(0)
    size = rng.integers(0, 3, n)
    frame = pd.DataFrame(
        {"length": size + rng.normal(0, 0.2, n), "colour": np.where(rng.random(n) < 0.5, "red", "blue")}
    )
    frame["size"] = np.array(["small", "middle", "large"])[size]
    frame["price"] = 10.0 * size + rng.normal(0, 1, n)
    frame.to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def digits():
    return BENCH.load(None, None, "smoke", 0)


def test_the_bench_is_what_compare_expects():
    assert isinstance(BENCH, Bench)
    assert BENCH.primary.name == "completion_nll"
    assert BENCH.cost is not None
    assert BENCH.cost.name == "fit_seconds"
    assert {"independent", "mixture", "rbm", "masked-network"} <= set(BASELINES)


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


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_is_measured_and_saved(digits, name, tmp_path):
    measured = BENCH.evaluate(BENCH.contender(name), digits, "smoke", 0, tmp_path)
    assert set(measured) == {metric.name for metric in BENCH.metrics}
    assert all(value is None or math.isfinite(value) for value in measured.values())
    assert 0 < measured["completion_nll"] < math.log(4)
    assert (measured["class_accuracy"] is None) == (name == "independent")
    exact, estimate = measured["bits_per_dim"], measured["bits_per_dim_estimate"]
    assert (exact is None and estimate is None) == (name == "masked-network")
    assert measured["bytes"] > 1000
    loaded = paperback.load(tmp_path / "model")
    scores = completion_scores(
        loaded.conditional(digits.test.x, digits.observed), digits.test.x, digits.observed
    )
    assert scores["completion_nll"] == pytest.approx(measured["completion_nll"], abs=1e-6)


def test_the_same_seed_measures_the_same(digits, tmp_path):
    runs = [BENCH.evaluate(BENCH.contender("rbm"), digits, "smoke", 3, tmp_path / str(i)) for i in range(2)]
    for name in ("completion_nll", "class_accuracy", "sample_auc", "bytes"):
        assert runs[0][name] == runs[1][name]


@pytest.mark.parametrize("name", BASELINES)
def test_a_table_without_target_is_measured(name, tmp_path):
    data = BENCH.load(write_table(tmp_path / "t.csv"), None, "smoke", 0)
    measured = BENCH.evaluate(BENCH.contender(name), data, "smoke", 0, tmp_path / "out")
    assert measured["class_accuracy"] is None
    assert measured["completion_nll"] > 0


def test_completion_scores_look_at_hidden_entries_only():
    p = torch.tensor([[[0.5, 0.5], [0.9, 0.1], [0.0, 1.0]]])
    states, observed = torch.tensor([[0, 1, 0]]), torch.tensor([[True, False, False]])
    scores = completion_scores(p, states, observed)
    assert scores["completion_nll"] == pytest.approx((-math.log(0.1) - math.log(1e-6)) / 2, rel=1e-5)
    assert scores["completion_accuracy"] == 0.0


def test_samples_of_the_data_are_not_told_apart_and_independent_ones_are():
    generator = torch.Generator().manual_seed(0)
    factor = torch.randint(0, 2, (600, 1), generator=generator)
    rows = factor ^ (torch.rand(600, 8, generator=generator) < 0.1)
    real, more = rows[:300], rows[300:]
    independent = IndependentCategorical(8, 2).fit(real).sample(300)
    mixture = CategoricalMixture(8, 2, 2).fit(real, progress=False).sample(300)
    assert detection_auc(real, more, 0) < 0.6
    assert detection_auc(real, mixture, 0) < 0.6
    assert detection_auc(real, independent, 0) > 0.8
