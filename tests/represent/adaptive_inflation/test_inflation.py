"""Mixing real and generated data, the gap between them, and a small generator."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paperback.errors import DataError
from paperback.represent.adaptive_inflation import (
    MixtureGenerator,
    classifier_tv,
    inflate,
    real_share,
    replication,
    total_variation,
    total_variation_mixture,
)

REAL = np.arange(5, dtype=np.uint8)[:, None, None] * np.ones((1, 4, 4), np.uint8)
MADE = 100 + np.arange(7, dtype=np.uint8)[:, None, None] * np.ones((1, 4, 4), np.uint8)


# -- shares --------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 10**6), st.integers(1, 10**6), st.floats(0.01, 0.99))
def test_share_and_replication_are_inverse(n_real, n_generated, beta):
    assert real_share(n_real, n_generated, replication(n_real, n_generated, beta)) == pytest.approx(beta)


def test_the_papers_share():
    assert real_share(50_000, 1_000_000, 10) == pytest.approx(1 / 3)
    assert replication(50_000, 1_000_000, 1 / 3) == pytest.approx(10)
    assert replication(10, 0, 1.0) == 1


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.floats(0.01, 1))
def test_the_gap_of_a_mixture_is_exact(seed, beta):
    p, q = np.random.default_rng(seed).dirichlet(np.full(20, 0.4), size=2)
    mixed = total_variation(beta * p + (1 - beta) * q, p)
    assert mixed == pytest.approx(total_variation_mixture(beta, total_variation(q, p)), abs=1e-12)


# -- the data set --------------------------------------------------------------------------------------------


def test_a_pass_holds_each_real_image_so_many_times_and_each_generated_one_once():
    data = inflate(REAL, MADE, replicate=3, shuffle_seed=2)
    assert len(data) == 3 * 5 + 7
    assert data.beta == pytest.approx(15 / 22)
    drawn = (data[data.order()] * 255).round().int()[:, 0, 0, 0]
    values, counts = drawn.unique(return_counts=True)
    assert dict(zip(values.tolist(), counts.tolist(), strict=True)) == (
        dict.fromkeys(range(5), 3) | dict.fromkeys(range(100, 107), 1)
    )
    assert torch.equal(data.source[data.order()], drawn < 100)
    assert torch.equal(data.order(0), data.order(0))
    assert not torch.equal(data.order(0), data.order(1))


@pytest.mark.parametrize("kind", ["array", "tensor", "floats", "colour"])
def test_images_come_in_the_order_asked_for(kind):
    real, made = REAL, MADE
    if kind == "colour":
        real, made = (np.repeat(x[:, None], 3, 1) for x in (real, made))
    if kind == "floats":
        real, made = (x.astype(np.float32) / 255 for x in (real, made))
    if kind == "tensor":
        real, made = torch.from_numpy(real), torch.from_numpy(made)
    data = inflate(real, made, replicate=2)
    batch = data[torch.tensor([12, 0, 5, 16, 4])]
    assert batch.dtype == torch.float32
    assert batch.shape == (5, 3 if kind == "colour" else 1, 4, 4)
    assert (batch[:, 0, 0, 0] * 255).round().tolist() == [102, 0, 0, 106, 4]
    assert torch.equal(data.images()[12], batch[0])


def test_memory_maps_are_not_copied(tmp_path):
    np.save(tmp_path / "made.npy", MADE)
    mapped = np.load(tmp_path / "made.npy", mmap_mode="r")
    data = inflate(REAL, mapped, replicate=1)
    assert data.generated is mapped
    assert data.real is REAL
    assert (data[torch.tensor([11])] * 255).round().unique().tolist() == [106]


def test_a_share_becomes_the_nearest_replication():
    data = inflate(REAL, MADE, beta=0.6)
    assert data.replicate == 2  # 2.1 would be exact
    assert data.beta == pytest.approx(10 / 17)
    assert inflate(REAL, MADE).replicate == 10


def test_labels_of_generated_images_are_ignored_with_a_warning():
    with pytest.warns(UserWarning, match="ignored"):
        inflate(REAL, MADE, generated_labels=np.zeros(7, int))
    inflate(REAL, MADE, generated_labels=np.full(7, -1))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: inflate(REAL, MADE, replicate=0), "replicate is 0"),
        (lambda: inflate(REAL, MADE, replicate=1.5), "replicate is 1.5"),
        (lambda: inflate(REAL, MADE, replicate=2, beta=0.5), "one of them"),
        (lambda: inflate(REAL, MADE, beta=0.0), "beta is 0"),
        (lambda: inflate(REAL, MADE, beta=1.5), "beta is 1.5"),
        (lambda: inflate(REAL, MADE, beta=1.0), "no replication"),
        (lambda: inflate(REAL, MADE, beta=0.01), "at least that"),
        (lambda: inflate(REAL, MADE[:, :3]), r"\(4, 4\).*\(3, 4\)"),
        (lambda: inflate(REAL, MADE.astype(np.float32)), "uint8.*float32"),
        (lambda: inflate(REAL / 255, MADE / 1.0), r"100\.\.106"),
        (lambda: inflate(REAL[:0], MADE), "no real images"),
        (lambda: inflate(REAL.tolist(), MADE), "list"),
        (lambda: inflate(REAL, MADE)[torch.tensor([57])], "outside"),
        (lambda: total_variation([0.5, 0.5], [1.0]), "equal"),
        (lambda: total_variation([0.5, 0.6], [0.5, 0.5]), "sum to 1"),
        (lambda: total_variation_mixture(0.0, 0.5), "beta"),
        (lambda: total_variation_mixture(0.5, 1.5), "tv"),
        (lambda: classifier_tv(REAL, MADE), "give 20 each"),
        (lambda: classifier_tv(np.zeros((30, 2)), np.zeros((30, 3))), "numbers each"),
        (lambda: MixtureGenerator(0), "at least 1"),
        (lambda: MixtureGenerator(20).fit(REAL), "too few"),
        (lambda: MixtureGenerator().sample(3), "not fitted"),
    ],
)
def test_what_does_not_fit(call, words):
    with pytest.raises(DataError, match=words):
        call()


# -- the gap and the generator -------------------------------------------------------------------------------


def test_the_classifiers_gap():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1200, 2))
    same = classifier_tv(x[:600], x[600:])
    assert same.estimate < 0.08
    assert same.at_least == 0
    apart = classifier_tv(x[:600], x[600:] + 20)
    assert apart.estimate >= 0.9
    assert apart.at_least >= 0.9
    half = classifier_tv(x[:600], np.where(np.arange(600)[:, None] < 300, x[600:], x[600:] + 20))
    assert half.at_least <= 0.5 < half.estimate + 0.1  # half of the second sample lies where the first is


@pytest.mark.parametrize("kind", ["array", "tensor"])
def test_the_generator_draws_images_of_the_same_kind(kind):
    from sklearn.datasets import load_digits

    x = (load_digits().images * 15).astype(np.uint8)
    images = torch.from_numpy(x) if kind == "tensor" else x
    generator = MixtureGenerator(5, dims=20).fit(images)
    drawn = generator.sample(400)
    assert type(drawn) is type(images)
    assert drawn.shape == (400, 8, 8)
    assert drawn.dtype == images.dtype
    assert (np.asarray(drawn) == np.asarray(generator.sample(400))).all()
    assert (np.asarray(drawn) != np.asarray(generator.sample(400, seed=1))).any()
    assert np.abs(np.asarray(drawn).mean(0) - x.mean(0)).max() < 12


def test_one_gaussian_keeps_mean_and_covariance():
    rng = np.random.default_rng(0)
    x = (0.5 + rng.normal(size=(800, 6)) @ (rng.normal(size=(6, 6)) / 60)).astype(np.float32)
    drawn = MixtureGenerator(1, dims=6).fit(x[:, :, None]).sample(20_000)[:, :, 0]
    assert np.allclose(drawn.mean(0), x.mean(0), atol=0.003)
    assert np.allclose(np.cov(drawn.T), np.cov(x.T) + 1e-4 * np.eye(6), atol=3e-4)
