"""The baselines of the represent wing: their mathematics, what they learn, saving, bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA as SklearnPCA
from torch import nn

import paperback
from paperback.data import images
from paperback.errors import DataError, NotSupportedError
from paperback.networks import ViT
from paperback.represent.baselines import (
    PCA,
    DenoisingAutoencoder,
    MaskedAutoencoder,
    RandomFeatures,
    SimCLR,
    Supervised,
)
from paperback.represent.baselines.denoising import make_decoder
from paperback.represent.baselines.masked_autoencoder import Decoder, restoration_loss
from paperback.training import generator, seeded

SMALL = {"name": "resnet", "width": 8}
TINY_VIT = {"name": "vit", "dim": 16, "depth": 1, "heads": 2}
MAKERS = {
    "random": lambda **more: RandomFeatures(SMALL, **more),
    "pca": lambda **more: PCA(n_components=8, **more),
    "denoising": lambda **more: DenoisingAutoencoder(SMALL, epochs=1, **more),
    "mae": lambda **more: MaskedAutoencoder(TINY_VIT, decoder_dim=16, epochs=1, **more),
    "supervised": lambda **more: Supervised(SMALL, epochs=1, **more),
    "simclr": lambda **more: SimCLR(SMALL, epochs=1, **more),
}


@pytest.fixture(scope="module")
def data():
    return images.fashion_mnist(600)


@pytest.mark.parametrize("name", MAKERS)
def test_the_same_seed_gives_the_same_encoder_and_it_can_be_saved(name, data, tmp_path):
    x, y = data.train.x[:256], data.train.y[:256]
    first = MAKERS[name]().fit(x, y, progress=False)
    second = MAKERS[name]().fit(x, y, progress=False)
    features = first.transform(data.test.x[:20])
    assert features.shape == (20, first.dim)
    assert features.std(0).max() > 0
    assert torch.equal(features, second.transform(data.test.x[:20]))
    first.save_pretrained(tmp_path / "encoder")
    again = (
        paperback.load(tmp_path / "encoder")
        if name != "simclr"
        else SimCLR.from_pretrained(tmp_path / "encoder")
    )
    assert torch.equal(features, again.transform(data.test.x[:20]))


def test_principal_components_are_scikit_learns(data):
    x = data.train.x
    ours = PCA(n_components=10).fit(x)
    flat = ours.normalise(x[:, None].float() / 255).flatten(1).numpy().astype(np.float64)
    theirs = SklearnPCA(10, svd_solver="full").fit(flat)
    coordinates, expected = ours.transform(x).numpy(), theirs.transform(flat)
    signs = np.sign((coordinates * expected).sum(0))
    np.testing.assert_allclose(coordinates * signs, expected, atol=2e-3)
    white = PCA(n_components=10, whiten=True).fit(x).transform(x)
    torch.testing.assert_close(white.std(0, correction=0), torch.ones(10), atol=1e-3, rtol=0)


def test_constant_pixels_are_no_trouble_when_whitened():
    x = torch.zeros(40, 1, 6, 6)
    x[:, :, :2] = torch.rand(40, 1, 2, 6, generator=generator(0))
    features = PCA(n_components=20, whiten=True, image_size=6).fit(x).transform(x)
    assert torch.isfinite(features).all()


def test_an_untrained_network_keeps_its_weights_and_learns_the_statistics(data):
    x = data.train.x
    encoder = RandomFeatures(SMALL)
    before = {name: p.clone() for name, p in encoder.named_parameters()}
    encoder.fit(x)
    assert all(torch.equal(before[name], p) for name, p in encoder.named_parameters())
    norm = encoder.backbone.stem[1]
    inner = encoder.backbone.stem[0](encoder.normalise(x[:512, None].float() / 255))
    torch.testing.assert_close(norm.running_mean, inner.mean((0, 2, 3)), atol=0.05, rtol=0.05)
    assert norm.momentum == 0.1


def test_corruption_hides_and_adds_what_it_says():
    x = torch.full((50, 3, 28, 28), 0.5)
    encoder = DenoisingAutoencoder(SMALL, in_channels=3, noise=0.0, missing=0.3)
    hidden = encoder.corrupt(x, generator(0)) == 0
    assert float(hidden.float().mean()) == pytest.approx(0.3, abs=0.01)
    assert torch.equal(hidden[:, 0], hidden[:, 2])
    noisy = DenoisingAutoencoder(SMALL, in_channels=3, noise=0.1, missing=0.0).corrupt(x, generator(0))
    assert float((noisy - x).std()) == pytest.approx(0.1, abs=0.005)
    assert make_decoder(32, 8, 3)(torch.zeros(2, 32, 4, 4)).shape == (2, 3, 32, 32)


def test_the_loss_of_the_masked_autoencoder_is_that_of_hidden_patches_alone():
    with seeded(0):
        vit = ViT(image_size=8, dim=8, depth=1, heads=2, class_token=True)
        decoder = Decoder(vit, 8, 1)
    x = torch.randn(5, 1, 8, 8, generator=generator(0))
    keep = torch.tensor([[0, 3]]).expand(5, -1)
    pixels = vit.patchify(x)
    target = (pixels - pixels.mean(-1, keepdim=True)) / (pixels.var(-1, keepdim=True) + 1e-6).sqrt()
    made = decoder(vit.tokens(x, keep).states[:, 1:], keep)
    expected = (made - target)[:, [1, 2]].square().mean()
    torch.testing.assert_close(restoration_loss(vit, decoder, x, keep), expected)
    # Nothing of a hidden patch reaches the prediction.
    other = pixels.clone()
    other[:, 1] = 3.0
    again = decoder(vit.tokens(vit.unpatchify(other), keep).states[:, 1:], keep)
    assert torch.equal(again, made)


def test_patches_are_hidden_evenly_and_without_repetition():
    encoder = MaskedAutoencoder(TINY_VIT, mask_ratio=0.75)
    keep = encoder.draw_visible(2000, generator(0))
    assert keep.shape == (2000, 12)
    assert all(len(set(row)) == 12 for row in keep[:50].tolist())
    share = torch.bincount(keep.flatten(), minlength=49) / 2000
    assert float((share - 12 / 49).abs().max()) < 0.05


@pytest.mark.parametrize("name", ["denoising", "mae", "supervised"])
def test_the_loss_falls(name, data):
    encoder = {
        "denoising": DenoisingAutoencoder(SMALL, epochs=4),
        "mae": MaskedAutoencoder(TINY_VIT, decoder_dim=16, epochs=4),
        "supervised": Supervised(SMALL, epochs=4),
    }[name].fit(data.train.x, data.train.y, progress=False)
    losses = encoder.history_.train_loss
    assert losses[-1] < 0.95 * losses[0]


def test_images_without_a_label_are_left_out(data):
    x, y = data.train.x[:200], data.train.y[:200].clone()
    y[100:] = -1
    few = Supervised(SMALL, epochs=1)
    few.fit(x, y, progress=False)
    assert len(few.history_) == 1
    with pytest.raises(DataError, match=r"hold 1 class"):
        Supervised(SMALL).fit(x, torch.where(y == y[0], 3, -1))
    with pytest.raises(DataError, match="learns from labels"):
        Supervised(SMALL).fit(x)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: PCA(n_components=0), DataError, "n_components is 0"),
        (lambda: PCA(n_components=785), DataError, r"1\.\.784"),
        (lambda: Supervised(epochs=0), DataError, "epochs is 0"),
        (lambda: DenoisingAutoencoder(missing=1.0), DataError, "missing 1.0"),
        (lambda: DenoisingAutoencoder("vit"), NotSupportedError, "no feature maps"),
        (lambda: MaskedAutoencoder("resnet"), NotSupportedError, "backbone vit"),
        (lambda: MaskedAutoencoder(mask_ratio=0.999), DataError, "some of the 49 patches"),
        (lambda: MaskedAutoencoder(decoder_dim=30), DataError, "decoder_dim is 30"),
        (lambda: Supervised(augment="strong"), DataError, "augmentation is 'strong'"),
    ],
)
def test_settings_that_cannot_be_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_images_that_do_not_fit_are_refused(data):
    with pytest.raises(DataError, match="image_size"):
        PCA(n_components=4, image_size=28).fit(data.train.x[:, :20])
    with pytest.raises(DataError, match="fewer than n_components"):
        PCA(n_components=50).fit(data.train.x[:20])


def test_a_network_of_ones_own_is_taken():
    class Mine(nn.Module):
        dim = 4

        def forward(self, x):
            return x[:, 0, :2, :2].flatten(1)

    x = torch.rand(5, 1, 28, 28, generator=generator(0))
    assert RandomFeatures(Mine()).fit(x).transform(x).shape == (5, 4)
