"""What all encoders do, on one that only learns mean and deviation of its images, and what they refuse."""

import numpy as np
import pytest
import torch
from torch import nn

from paperback.errors import ArtefactError, DataError, NotSupportedError
from paperback.represent import Encoder, as_images
from paperback.represent.hyperspherical import MetricLearner
from paperback.testing.represent import ENCODER_CHECKS, EncoderCase, check_encoder
from paperback.training import History

SMALL = {"name": "resnet", "width": 4, "stages": 2}


class Fixed(Encoder):
    """Learns nothing but the normalisation."""

    def _fit(self, images, labels, progress):
        self.seen = (images, labels)
        return History()


def images(n=24, channels=None, seed=0):
    shape = (n, 28, 28) if channels is None else (n, channels, 28, 28)
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


LABELS = torch.arange(24) % 3


@pytest.mark.parametrize("check", ENCODER_CHECKS)
@pytest.mark.parametrize("channels", [None, 3])
def test_the_contract(check, channels):
    check(
        EncoderCase(
            lambda seed: Fixed(SMALL, in_channels=channels or 1, seed=seed), images(channels=channels), LABELS
        )
    )


class Careless(Fixed):
    """Draws from the global random state."""

    def _fit(self, images, labels, progress):
        torch.rand(1)


class Batched(Fixed):
    """Normalises features over the batch."""

    def _features(self, images):
        found = super()._features(images)
        return found - found.mean(0)


class Writing(Fixed):
    """Writes to the labels."""

    def fit(self, images, labels=None, *, progress=True):
        labels[0] += 1
        return super().fit(images, labels, progress=progress)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Careless, "same_seed_same_result: fit draws from torch"),
        (Batched, "batch_equals_loop: an image alone"),
        (Writing, "input_is_unchanged: labels were changed"),
    ],
)
def test_the_checks_find_what_they_are_for(kind, message):
    with pytest.raises(AssertionError, match=message):
        check_encoder(lambda seed: kind(SMALL, seed=seed), images(), LABELS)


def test_normalisation_is_of_the_images_that_were_fitted():
    x = images(channels=3)
    encoder = Fixed(SMALL, in_channels=3).fit(x)
    normal = encoder.normalise(as_images(x))
    torch.testing.assert_close(normal.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(normal.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5, rtol=0)
    flat = Fixed(SMALL).fit(torch.full((4, 28, 28), 0.5))
    assert flat.std.item() == 1.0
    assert encoder.seen[0].dtype == torch.float32
    assert encoder.seen[1] is None


def test_seeds_draw_weights_and_leave_the_users_alone():
    before = torch.get_rng_state()
    first, second, other = Fixed(SMALL), Fixed(SMALL), Fixed(SMALL, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    x = images()
    assert torch.equal(first.transform(x), second.transform(x))
    assert not torch.equal(first.transform(x), other.transform(x))


def test_backbones():
    vit = Fixed({"name": "vit", "patch": 7, "dim": 16, "depth": 1, "heads": 2})
    assert vit.transform(images()).shape == (24, 16)
    with pytest.raises(NotSupportedError, match="has no feature maps"):
        vit.feature_maps(as_images(images()))
    net = Fixed(SMALL)
    assert [tuple(m.shape[1:]) for m in net.feature_maps(as_images(images()))] == [(4, 14, 14), (8, 7, 7)]
    own = nn.Sequential(nn.Flatten(), nn.Linear(784, 5))
    with pytest.raises(DataError, match="attribute dim"):
        Fixed(own)
    own.dim = 5
    encoder = Fixed(own)
    assert encoder.transform(images()).shape == (24, 5)
    with pytest.raises(ArtefactError, match="cannot be saved"):
        encoder.save_pretrained("nowhere")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbone": "alexnet"}, "no backbone 'alexnet'"),
        ({"backbone": {"width": 4}}, "no backbone None"),
        ({"backbone": {"name": "resnet", "girth": 4}}, "does not take these arguments"),
        ({"in_channels": 2}, "in_channels is 2"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(DataError, match=message):
        Fixed(**arguments)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((3, 28, 28, 3), np.uint8), "move the channels before the height"),
        (np.zeros((3, 28, 28), np.int64), "dtype int64"),
        (torch.zeros(3, 28, 28, dtype=torch.bool), "dtype torch.bool"),
        (torch.zeros(28, 28), "shape"),
        (torch.full((2, 28, 28), 1.5), "image 0 has a value outside"),
        ([[0.0]], "is a list"),
    ],
)
def test_images_that_cannot_be_used(x, message):
    with pytest.raises(DataError, match=message):
        as_images(x)


def test_channels_must_fit():
    with pytest.raises(DataError, match="in_channels=3"):
        Fixed(SMALL).transform(images(channels=3))
    with pytest.raises(DataError, match="learns from labels"):
        MetricLearner(backbone=SMALL).fit(images())
