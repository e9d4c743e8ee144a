"""The contrastive learners: budgets, order, the pretexts' mathematics, learning, saving."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from paperback.data import images
from paperback.errors import DataError
from paperback.represent.contrastive import BYOL, BarlowTwins, MoCo, SimCLR, barlow_twins_loss
from paperback.represent.contrastive.learner import Shuffle, projector
from paperback.represent.contrastive.momentum import MomentumCopy
from paperback.testing.represent import ENCODER_CHECKS, EncoderCase
from paperback.training.contrastive import nt_xent

LEARNERS = [SimCLR, MoCo, BYOL, BarlowTwins]
SMALL = {"name": "resnet", "width": 4, "stages": 2}
TINY = {"projection": (16, 8)}


@pytest.fixture(scope="module")
def clothes():
    train = images.fashion_mnist(120, n_val=1000).train
    return train.x, train.y


def make(cls, **settings):
    return cls(SMALL, **({"batch_size": 32} | TINY | settings))


# -- order and budget ----------------------------------------------------------------------------------------


def test_a_pass_holds_every_image_at_most_once():
    shuffle = Shuffle(10, seed=0)
    passes = [torch.cat([shuffle.take(3) for _ in range(3)]) for _ in range(4)]
    for one in passes:
        assert len(one.unique()) == 9
    assert not torch.equal(passes[0], passes[1])
    assert torch.equal(Shuffle(10, 0).take(3), passes[0][:3])


@pytest.mark.parametrize(
    ("settings", "steps", "entries"),
    [
        ({"epochs": 2}, 2 * 3, 2),  # 120 images, batches of 32: three whole ones
        ({"steps": 7}, 7, 1),
        ({"steps": 100}, 100, 2),
        ({"epochs": 2, "batch_size": 1000}, 2, 2),  # one batch of all images
    ],
)
def test_steps_and_entries_of_the_history(clothes, settings, steps, entries, monkeypatch):
    taken = []
    take = Shuffle.take
    monkeypatch.setattr(Shuffle, "take", lambda self, k: taken.append(k) or take(self, k))
    encoder = make(SimCLR, augment="weak", **settings)
    encoder.learn_from(clothes[0][:, None, ::4, ::4].float() / 255, progress=False)
    assert taken == [min(settings.get("batch_size", 32), 120)] * steps
    monkeypatch.undo()
    assert len(
        make(SimCLR, augment="weak", **settings).fit(clothes[0][:, ::4, ::4], progress=False).history_
    ) == (entries)


# -- pretexts ------------------------------------------------------------------------------------------------


def test_simclr_is_nt_xent_of_the_projected_views():
    encoder = make(SimCLR, temperature=0.3)
    pretext = encoder.pretext(10).eval()
    a, b = torch.rand(2, 6, 1, 28, 28)
    expected = nt_xent(pretext.head(encoder.backbone(a)), pretext.head(encoder.backbone(b)), 0.3)
    assert torch.allclose(pretext(a, b), expected, atol=1e-6)


def test_moco_against_its_formula():
    encoder = make(MoCo, queue_size=5, temperature=0.5)
    pretext = encoder.pretext(10).eval()  # in evaluation neither the queue nor the keys move
    a, b = torch.rand(2, 4, 1, 28, 28)

    def unit(z):
        return nn.functional.normalize(z, dim=1)

    total = 0.0
    for query, key in ((a, b), (b, a)):
        q, k, u = unit(pretext.queries(query)), unit(pretext.keys(key)), pretext.queue
        own = torch.exp((q * k).sum(1) / 0.5)
        total -= torch.log(own / (own + torch.exp(q @ u.T / 0.5).sum(1))).mean() / 2
    assert torch.allclose(pretext(a, b), total, atol=1e-6)


def test_mocos_queue_drops_the_oldest():
    pretext = make(MoCo, queue_size=5).pretext(10)
    keys = nn.functional.normalize(torch.randn(8, 8), dim=1)
    pretext._enqueue(keys[:2])
    pretext._enqueue(keys[2:4])
    assert torch.equal(pretext.queue[:4], keys[:4])
    pretext._enqueue(keys[4:6])
    assert torch.equal(pretext.queue, keys[[5, 1, 2, 3, 4]])
    pretext._enqueue(keys)  # more than it holds: the newest stay
    assert {tuple(row) for row in pretext.queue.tolist()} == {tuple(row) for row in keys[3:].tolist()}
    negatives = pretext.queue.clone()
    loss = pretext(*torch.rand(2, 4, 1, 28, 28))
    assert loss.requires_grad
    assert not torch.equal(pretext.queue, negatives)
    loss.backward()  # the queue that the loss saw was not changed under it


def test_byol_against_its_formula():
    encoder = make(BYOL)
    pretext = encoder.pretext(10).eval()
    a, b = torch.rand(2, 4, 1, 28, 28)

    def one_way(query, target):
        p, t = pretext.predictor(pretext.online(query)), pretext.target(target)
        return (2 - 2 * nn.functional.cosine_similarity(p, t)).mean()

    assert torch.allclose(pretext(a, b), one_way(a, b) + one_way(b, a), atol=1e-5)


@pytest.mark.parametrize("cls", [MoCo, BYOL])
def test_targets_have_no_gradient_and_follow(cls):
    pretext = make(cls, momentum=(0.5, 0.5)).pretext(10)
    target = pretext.keys if cls is MoCo else pretext.target
    online = pretext.queries if cls is MoCo else pretext.online
    before = [p.clone() for p in target.module.parameters()]
    with torch.no_grad():
        for p in online.parameters():
            p.add_(1.0)
    pretext(*torch.rand(2, 4, 1, 28, 28)).backward()
    for p, old in zip(target.module.parameters(), before, strict=True):
        assert p.grad is None
        assert torch.allclose(p, old + 0.5, atol=1e-6)


def test_momentum_rises_along_a_cosine():
    copy_ = MomentumCopy(nn.Linear(2, 2), 0.9, 1.0, total_steps=10)
    found = []
    for step in (0, 5, 10, 20):
        copy_.step.fill_(step)
        found.append(copy_.momentum())
    assert found == pytest.approx([0.9, 0.95, 1.0, 1.0])
    frozen = [p.clone() for p in copy_.module.parameters()]
    copy_.follow(nn.Linear(2, 2))
    assert all(torch.equal(p, q) for p, q in zip(copy_.module.parameters(), frozen, strict=True))


def test_barlow_twins_loss_against_its_formula():
    a, b = torch.randn(2, 50, 4, dtype=torch.float64)
    correlation = np.corrcoef(a.T.numpy(), b.T.numpy())[:4, 4:]
    off = correlation[~np.eye(4, dtype=bool)]
    expected = ((1 - np.diag(correlation)) ** 2).sum() + 0.01 * (off**2).sum()
    assert float(barlow_twins_loss(a, b, 0.01)) == pytest.approx(expected, rel=1e-4)


def test_barlow_twins_loss_is_zero_for_whitened_equal_views():
    white = torch.randn(64, 5, dtype=torch.float64)
    white = torch.linalg.qr(white - white.mean(0))[0]
    assert float(barlow_twins_loss(1e3 * white, 1e3 * white)) < 1e-6
    assert torch.autograd.gradcheck(
        barlow_twins_loss, [torch.randn(6, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    )


def test_projector():
    assert [type(m).__name__ for m in projector((4, 3, 2))] == ["Linear", "ReLU", "Linear"]
    with_norm = projector((4, 3, 2), norm=True)
    assert [type(m).__name__ for m in with_norm] == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert with_norm[0].bias is None


# -- learning ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", LEARNERS)
def test_a_learner_learns_reproducibly_and_is_saved(cls, clothes, tmp_path):
    x = clothes[0]
    before = x.clone()
    encoder = make(cls, steps=6).fit(x, progress=False)
    again = make(cls, steps=6).fit(x, progress=False)
    other = make(cls, steps=6, seed=1).fit(x, progress=False)
    assert torch.equal(x, before)
    features = encoder.transform(x)
    assert features.shape == (120, encoder.dim)
    assert features.isfinite().all()
    assert torch.equal(features, again.transform(x))
    assert not torch.allclose(features, other.transform(x))
    assert not torch.allclose(features, make(cls).transform(x))
    encoder.save_pretrained(tmp_path / "model")
    loaded = cls.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded.transform(x), features)
    assert set(loaded.state_dict()) == set(encoder.state_dict())
    assert not any("head" in name or "queue" in name for name in loaded.state_dict())


@pytest.mark.parametrize("cls", LEARNERS)
def test_the_loss_falls(cls, clothes):
    settings = {"queue_size": 64} if cls is MoCo else {}  # random at first, and then harder to tell apart
    encoder = make(cls, augment="weak", epochs=10, lr=0.01, **settings)
    history = encoder.fit(clothes[0], progress=False).history_
    assert history.train_loss[-1] < history.train_loss[1]
    assert all(math.isfinite(loss) for loss in history.train_loss)


def test_norms_and_biases_do_not_decay():
    encoder = make(SimCLR, weight_decay=0.3)
    groups = encoder._optimizer(encoder.pretext(1).parameters()).param_groups
    decays = {group["weight_decay"]: {p.ndim for p in group["params"]} for group in groups}
    assert set(decays) == {0.3, 0.0}
    assert decays[0.0] == {1}
    assert min(decays[0.3]) > 1


def test_colour_images_and_other_backbones():
    x = torch.rand(40, 3, 16, 16)
    vit = {"name": "vit", "patch": 4, "dim": 16, "depth": 1, "heads": 2}
    for backbone in (SMALL, vit):
        encoder = SimCLR(backbone, in_channels=3, image_size=16, steps=2, batch_size=16, **TINY)
        assert encoder.fit(x, progress=False).transform(x.numpy()).shape == (40, encoder.dim)


def test_fitting_leaves_the_layout_of_the_weights_and_the_users_random_numbers(clothes):
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    encoder = make(SimCLR, steps=2).fit(clothes[0], progress=False)
    assert torch.equal(torch.rand(2), expected)
    assert all(p.is_contiguous() for p in encoder.parameters())
    assert copy.deepcopy(encoder).transform(clothes[0][:3]).shape == (3, encoder.dim)


@pytest.mark.parametrize(
    ("cls", "settings", "words"),
    [
        (SimCLR, {"augment": "strong"}, "augmentation"),
        (SimCLR, {"epochs": 0}, "epochs"),
        (SimCLR, {"steps": 0}, "steps"),
        (SimCLR, {"batch_size": 1}, "batch_size"),
        (MoCo, {"queue_size": 0}, "queue_size"),
        (MoCo, {"momentum": (0.9, 1.1)}, "momentum"),
        (BYOL, {"momentum": (0.9,)}, "momentum"),
    ],
)
def test_bad_settings(cls, settings, words):
    with pytest.raises(DataError, match=words):
        make(cls, **settings)


def test_one_image_is_too_few(clothes):
    with pytest.raises(DataError, match="at least two"):
        make(SimCLR).fit(clothes[0][:1], progress=False)


def test_barlow_twins_loss_refuses_what_does_not_fit():
    with pytest.raises(DataError, match="same shape"):
        barlow_twins_loss(torch.ones(3, 2), torch.ones(3, 4))


@pytest.mark.parametrize("cls", LEARNERS)
@pytest.mark.parametrize("check", ENCODER_CHECKS, ids=lambda check: check.__name__)
def test_behaviour(check, cls, clothes):
    check(EncoderCase(lambda seed: make(cls, steps=2, seed=seed), *clothes))
