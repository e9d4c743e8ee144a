"""The encoder of AdaInf: its rules, equal steps, its report, generators, saving, bad input."""

import math

import numpy as np
import pytest
import torch

import paperback
from paperback.data import images
from paperback.data.augment import Views
from paperback.errors import DataError
from paperback.represent.adaptive_inflation import AdaptiveInflation, MixtureGenerator, real_share
from paperback.represent.adaptive_inflation.method import set_moments
from paperback.represent.adaptive_inflation.rules import paper_replication, paper_rule
from paperback.represent.contrastive import SimCLR
from paperback.represent.contrastive.learner import Shuffle
from paperback.represent.interface import Encoder
from paperback.testing.represent import ENCODER_CHECKS, EncoderCase

SMALL = {"name": "resnet", "width": 4, "stages": 2}
SYMMETRIC = ("standard", "adainf")


@pytest.fixture(scope="module")
def clothes():
    train = images.fashion_mnist(100, n_val=1000).train
    return train.x, train.y


@pytest.fixture(scope="module")
def made(clothes):
    return MixtureGenerator(2, dims=10).fit(clothes[0]).sample(200)


def make(learner="simclr", **settings):
    arguments = {"name": learner, "backbone": SMALL, "batch_size": 32, "projection": (16, 8)}
    return AdaptiveInflation(arguments, **({"steps": 4, "diagnose": False} | settings))


# -- rules ---------------------------------------------------------------------------------------------------


def test_the_papers_rule_at_the_papers_size():
    choice = paper_rule(50_000, 950_000, SYMMETRIC)  # twenty times as much data
    assert choice.views == Views.of("adainf")
    assert paper_replication(50_000, 1_000_000) == 10
    assert paper_rule(1000, 10**7, SYMMETRIC).share == 1.0
    assert paper_rule(1000, 1, SYMMETRIC).share == pytest.approx(math.log(1.001) / math.log(20))
    assert paper_rule(1000, 1, SYMMETRIC).replicate == 1
    shares = [paper_rule(1000, n, SYMMETRIC).share for n in (100, 1000, 5000, 20_000)]
    assert shares == sorted(shares)


@pytest.mark.parametrize("learner", ["simclr", "moco", "byol", "barlow_twins"])
def test_every_learner_gets_its_own_weak_views(learner, clothes, made):
    encoder = make(learner, rule={"augment": 1.0, "beta": 0.5}).fit(
        clothes[0], generated=made, progress=False
    )
    name = "adainf_asym" if learner in ("byol", "barlow_twins") else "adainf"
    assert encoder.learner.views == Views.of(name)
    assert encoder.report_["beta"] == pytest.approx(0.5)
    assert encoder.report_["replicate"] == 2
    assert encoder.transform(clothes[0]).shape == (100, encoder.dim)


def test_all_arms_take_the_same_steps(clothes, made, monkeypatch):
    taken = []
    take = Shuffle.take
    monkeypatch.setattr(Shuffle, "take", lambda self, k: taken.append(k) or take(self, k))
    for rule, part in (("paper", made), ({"replicate": 1}, made[:60]), ({"replicate": 7}, made)):
        taken.clear()
        make(rule=rule, steps=6).fit(clothes[0], generated=part, progress=False)
        assert taken == [32] * 6
    taken.clear()
    make(rule="grid", steps=6, grid_steps=2).fit(clothes[0], clothes[1], generated=made, progress=False)
    assert taken == [32] * (2 * 6 + 6)  # replications 1 and 3, three augmentations, then the training


def test_the_grid_keeps_the_best(clothes, made):
    encoder = make(rule="grid", grid_steps=2).fit(*clothes, generated=made, progress=False)
    scores = encoder.report_["scores"]
    assert len(scores) == 6
    chosen = f"replicate {encoder.report_['replicate']}, augmentation {encoder.report_['augmentation']:g}"
    assert scores[chosen] == max(scores.values())
    assert all(0 <= score <= 1 for score in scores.values())


def test_the_grid_without_labels_must_be_allowed(clothes, made):
    with pytest.raises(DataError, match="allow_unlabelled"):
        make(rule="grid").fit(clothes[0], generated=made, progress=False)
    unknown = torch.full((100,), -1)
    with pytest.raises(DataError, match="allow_unlabelled"):
        make(rule="grid").fit(clothes[0], unknown, generated=made, progress=False)
    encoder = make(rule="grid", grid_steps=2, allow_unlabelled=True)
    encoder.fit(clothes[0], generated=made, progress=False)
    assert len(encoder.report_["scores"]) == 6


def test_the_graph_rule_takes_the_weakest_that_is_connected_enough(clothes, made):
    encoder = make(rule="graph").fit(clothes[0], generated=made, progress=False)
    scores = dict(encoder.report_["scores"])
    needed = scores.pop("needed: real images, augmentation 0")
    tried = {float(name.rpartition(" ")[2]): value for name, value in scores.items()}
    chosen = encoder.report_["augmentation"]
    assert chosen == min(tried)
    assert all(value < needed for share, value in tried.items() if share > chosen)
    assert tried[chosen] >= needed or chosen == 0


def test_the_report(clothes, made):
    encoder = make(diagnose=True).fit(*clothes, generated=made, progress=False)
    report = encoder.report_
    assert report["rule"] == "paper"
    assert report["beta"] == real_share(100, 200, report["replicate"])
    assert 0 <= report["lambda_k1"] <= 2
    assert 0 <= report["alpha"] <= 1
    assert 0 <= report["tv_bound"] <= report["classifier_tv"] <= 1
    assert Views.of(report["views"][0]).first == encoder.learner.views.first
    without = make(diagnose=True).fit(clothes[0], generated=made, progress=False).report_
    assert "alpha" not in without


# -- generators and learners ---------------------------------------------------------------------------------


class Shifted:
    """A generator of the user's; it must not see labels."""

    def fit(self, x):
        self.x = x
        return self

    def sample(self, n):
        return self.x.roll(1, 2).repeat(n // len(self.x) + 1, 1, 1)[:n]


def test_generators(clothes):
    x = clothes[0]
    own = make(n_generated=150).fit(x, generated=Shifted(), progress=False)
    assert own.report_["beta"] == real_share(100, 150, own.report_["replicate"])
    default = make(generator={"name": "mixture", "components": 2}).fit(x, progress=False)
    assert default.report_["beta"] == real_share(100, 1000, 5)


def test_arrays_and_memory_maps(clothes, made, tmp_path):
    np.save(tmp_path / "made.npy", made.numpy())
    mapped = np.load(tmp_path / "made.npy", mmap_mode="r")
    from_arrays = make().fit(clothes[0].numpy(), generated=mapped, progress=False)
    from_tensors = make().fit(clothes[0], generated=made, progress=False)
    assert np.array_equal(
        from_arrays.transform(clothes[0].numpy()), from_tensors.transform(clothes[0]).numpy()
    )


def test_moments_are_those_of_the_real_images(clothes, made):
    encoder = make().fit(clothes[0], generated=made, progress=False)
    x = clothes[0].float() / 255
    assert float(encoder.mean) == pytest.approx(float(x.mean()), abs=1e-5)
    assert float(encoder.learner.std) == pytest.approx(float(x.std(correction=0)), abs=1e-5)
    colour = torch.rand(30, 3, 8, 8)
    simclr = SimCLR(SMALL, in_channels=3)
    set_moments(simclr, colour)
    assert torch.allclose(simclr.mean.flatten(), colour.mean((0, 2, 3)), atol=1e-6)


class Mean(Encoder):
    """An encoder that is no contrastive learner: it is fitted to the mixed images."""

    def __init__(self):
        super().__init__(SMALL)

    def _fit(self, x, labels, progress):
        self.seen = x


def test_another_encoder_is_fitted_to_the_mixture(clothes, made):
    encoder = AdaptiveInflation(Mean(), rule={"replicate": 3}, diagnose=False)
    encoder.fit(clothes[0], generated=made, progress=False)
    assert len(encoder.learner.seen) == 3 * 100 + 200
    assert encoder.report_["augmentation"] is None
    assert torch.equal(encoder.transform(clothes[0]), encoder.learner.transform(clothes[0]))
    with pytest.raises(DataError, match="views of its own"):
        AdaptiveInflation(Mean(), rule="graph").fit(clothes[0], generated=made, progress=False)


def test_save_and_load(clothes, made, tmp_path):
    encoder = make().fit(clothes[0], generated=made, progress=False)
    encoder.save_pretrained(tmp_path / "model")
    loaded = paperback.load(tmp_path / "model")
    assert type(loaded) is AdaptiveInflation
    assert torch.equal(loaded.transform(clothes[0]), encoder.transform(clothes[0]))


def test_the_same_seed_gives_the_same_features(clothes):
    first, again, other = (
        make(n_generated=100, seed=seed).fit(clothes[0], progress=False).transform(clothes[0])
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x, g: make(rule="best"), "rule"),
        (lambda x, g: make(steps=0), "steps"),
        (lambda x, g: make("clr"), "no learner 'clr'"),
        (lambda x, g: AdaptiveInflation({"name": "simclr", "depth": 3}), "does not take"),
        (lambda x, g: make(generator="gan"), "no generator 'gan'"),
        (lambda x, g: make(generator=MixtureGenerator()), "generated="),
        (lambda x, g: make(generator={"name": "mixture", "depth": 1}), "does not take"),
        (lambda x, g: make(rule={"weight": 1}).fit(x, generated=g), "'weight'"),
        (lambda x, g: make(rule={"beta": 0.5, "replicate": 1}).fit(x, generated=g), "one of them"),
        (lambda x, g: make(rule={"beta": 1.5}).fit(x, generated=g), "beta is 1.5"),
        (lambda x, g: make(rule={"beta": 0.1}).fit(x, generated=g), "at least that"),
        (lambda x, g: make(rule="graph", steps=1).fit(x[:20], generated=g), "22 real images"),
        (lambda x, g: make(rule={"replicate": 0}).fit(x, generated=g), "replicate is 0"),
        (lambda x, g: make().fit(x, generated=g[:20]), "less than a batch"),
        (lambda x, g: make().fit(x, generated=g[:, :20]), r"\(20, 28\)"),
        (lambda x, g: make().fit(x, generated=g.float() / 255), "float32"),
        (lambda x, g: make().fit(x, generated=object()), "fit and sample"),
        (lambda x, g: make().fit(x[:1], generated=g), "at least two"),
        (lambda x, g: make().fit(x, torch.zeros(3, dtype=torch.long), generated=g), "expected 100"),
    ],
)
def test_what_does_not_fit(call, words, clothes, made):
    with pytest.raises(DataError, match=words):
        call(clothes[0], made)


@pytest.mark.parametrize("check", ENCODER_CHECKS, ids=lambda check: check.__name__)
def test_behaviour(check, clothes):
    check(
        EncoderCase(
            lambda seed: make(
                steps=2, n_generated=60, generator={"name": "mixture", "components": 2}, seed=seed
            ),
            *clothes,
        )
    )
