"""Masks, patches, loss and decoder; the encoder as a user has it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn

import paperback
from paperback.errors import DataError, NotSupportedError
from paperback.networks.resnet import ResNet
from paperback.represent.spark import (
    Decoder,
    FeatureMaps,
    Lamb,
    MaskedReconstruction,
    SparK,
    masked_patch_loss,
    patchify,
    random_mask,
    unpatchify,
)
from paperback.represent.spark.masking import patch_statistics
from paperback.testing import check_encoder

SMALL = {"backbone": {"name": "resnet", "width": 8, "stages": 2}, "epochs": 1, "batch_size": 16}


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def photos() -> Tensor:
    """Smooth random images."""
    coarse = torch.rand(40, 1, 6, 6, generator=draws())
    return F.interpolate(coarse, (16, 16), mode="bicubic").clamp(0, 1)


@pytest.fixture(scope="module")
def fitted(photos: Tensor) -> SparK:
    return SparK(**SMALL).fit(photos, progress=False)  # type: ignore[arg-type]


# -- masks, patches, loss ------------------------------------------------------------------------------------


def test_every_image_keeps_exactly_so_many_cells_and_every_cell_is_kept_equally_often() -> None:
    for grid, ratio, keep in (((4, 4), 0.6, 6), ((7, 7), 0.6, 20), ((2, 3), 0.5, 3)):
        mask = random_mask(3000, grid, ratio, draws())
        assert (mask.sum((1, 2, 3)) == keep).all()
        counts = mask.sum(0).flatten().double().numpy()
        assert stats.chisquare(counts).pvalue > 1e-3
        assert torch.equal(mask, random_mask(3000, grid, ratio, draws()))
        assert not torch.equal(mask, random_mask(3000, grid, ratio, draws(1)))


def test_patches_are_squares_of_the_image_and_go_back() -> None:
    images = torch.randn(2, 3, 8, 12, generator=draws())
    patches = patchify(images, 4)
    assert patches.shape == (2, 6, 48)
    assert torch.equal(patches[1, 4], images[1, :, 4:8, 4:8].permute(1, 2, 0).flatten())
    assert torch.equal(unpatchify(patches, 4, (2, 3)), images)


def test_targets_have_mean_zero_and_variance_one() -> None:
    patches = patchify(torch.rand(4, 1, 16, 16, generator=draws()), 8)
    mean, deviation = patch_statistics(patches)
    variance, centre = torch.var_mean((patches - mean) / deviation, -1)
    torch.testing.assert_close(centre, torch.zeros_like(centre), atol=1e-5, rtol=0)
    torch.testing.assert_close(variance, torch.ones_like(variance), atol=1e-4, rtol=0)


@pytest.mark.parametrize("normalise", [True, False])
def test_the_loss_is_the_mean_over_masked_patches(normalise: bool) -> None:
    images, guess = (torch.randn(3, 2, 8, 8, generator=draws(i)) for i in (0, 1))
    mask = random_mask(3, (2, 2), 0.5, draws())
    mask[0] = True  # an image with nothing hidden counts for nothing
    errors = []
    for n, row, column in (~mask[:, 0]).nonzero().tolist():
        place = (n, slice(None), slice(4 * row, 4 * row + 4), slice(4 * column, 4 * column + 4))
        patch = images[place]
        if normalise:
            patch = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()
        errors.append((guess[place] - patch).square().mean())
    found = masked_patch_loss(guess, images, mask, normalise)
    torch.testing.assert_close(found, torch.stack(errors).mean())


def test_the_loss_ignores_what_is_said_of_visible_patches() -> None:
    images, guess = (torch.randn(3, 1, 8, 8, generator=draws(i)) for i in (0, 1))
    mask = random_mask(3, (2, 2), 0.5, draws())
    visible = mask.repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert torch.equal(
        masked_patch_loss(guess, images, mask), masked_patch_loss(guess + 7 * visible, images, mask)
    )
    assert masked_patch_loss(guess + ~visible, images, mask) != masked_patch_loss(guess, images, mask)


# -- the network ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [4, 8, 16, 32])
def test_the_decoder_comes_back_to_the_size_of_the_image(stride: int) -> None:
    decoder = Decoder(stride, stride, 3)
    assert decoder([torch.zeros(2, stride, 2, 1)]).shape == (2, 3, 2 * stride, stride)


def test_the_reconstruction_does_not_depend_on_hidden_pixels(fitted: SparK, photos: Tensor) -> None:
    network, mask = fitted._network().eval(), random_mask(8, (4, 4), 0.6, draws())
    x = fitted.normalise(photos[:8])
    visible = mask.repeat_interleave(4, 2).repeat_interleave(4, 3)
    other = torch.where(visible, x, torch.randn(x.shape, generator=draws()))
    assert torch.equal(network(x, mask), network(other, mask))
    assert not torch.equal(network(x, mask), network(torch.where(visible, other + 1, other), mask))


def test_last_scale_only_is_the_same_as_projections_of_zero() -> None:
    full, last = SparK(**SMALL), SparK(**SMALL, hierarchical=False)  # type: ignore[arg-type]
    assert len(full.densify) == 2
    assert len(last.densify) == 1
    for part in full.densify[1:]:
        nn.init.zeros_(part.project.weight)
        nn.init.zeros_(part.project.bias)
    last.load_state_dict({k: v for k, v in full.state_dict().items() if not k.startswith("densify.1")})
    x, mask = torch.randn(4, 1, 16, 16, generator=draws()), random_mask(4, (4, 4), 0.6, draws())
    assert torch.equal(full._network()(x, mask), last._network()(x, mask))


def test_tokens_fill_absent_positions_only_and_have_no_weight_decay() -> None:
    model = SparK(**SMALL)  # type: ignore[arg-type]
    tokens = [part.token for part in model.densify]
    assert [len(t) for t in tokens] == [16, 8]
    assert all(0 < t.abs().max() <= 0.02 for t in tokens)
    network = model._network()
    optimizer = model._make_optimizer(10)(network.parameters())
    decayed, free = ({id(p) for p in group["params"]} for group in optimizer.param_groups)
    assert all(id(t) in free for t in tokens)
    assert id(model.backbone.stem[0].weight) in decayed
    assert SparK(**SMALL, mask_token=False).densify[0].token is None  # type: ignore[arg-type]
    assert SparK(**SMALL, sparse=False).densify[0].token is None  # type: ignore[arg-type]


def test_weight_decay_follows_its_cosine() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = SparK(**SMALL)._make_optimizer(3)([weight])  # type: ignore[arg-type]
    seen = []
    for _ in range(3):
        weight.grad = torch.ones(2, 2)
        optimizer.step()
        seen.append(optimizer.param_groups[0]["weight_decay"])
    assert seen == pytest.approx([0.04, 0.12, 0.2])


def test_lamb_steps_as_its_formula_says() -> None:
    w = torch.randn(3, 4, generator=draws())
    p, grads = nn.Parameter(w.clone()), torch.randn(2, 3, 4, generator=draws(1))
    optimizer = Lamb([p], lr=0.1, betas=(0.9, 0.99), weight_decay=0.3)
    mean, square = torch.zeros(3, 4), torch.zeros(3, 4)
    for t, grad in enumerate(grads, 1):
        p.grad = grad.clone()
        optimizer.step()
        mean, square = 0.9 * mean + 0.1 * grad, 0.99 * square + 0.01 * grad**2
        r = mean / (1 - 0.9**t) / ((square / (1 - 0.99**t)).sqrt() + 1e-6) + 0.3 * w
        w = w - 0.1 * w.norm() / r.norm() * r
    torch.testing.assert_close(p.detach(), w)


# -- the encoder ---------------------------------------------------------------------------------------------


def test_fitting_lowers_the_loss_and_gives_a_dense_network(photos: Tensor) -> None:
    model = SparK(**SMALL | {"epochs": 30, "lr": 1e-2}).fit(photos, progress=False)  # type: ignore[arg-type]
    losses = model.history_.train_loss  # type: ignore[union-attr]
    assert losses[-1] < 0.85 * losses[0]
    assert type(model.encoder_) is ResNet
    assert not any("Sparse" in type(m).__name__ for m in model.encoder_.modules())
    features = model.transform(photos)
    assert features.shape == (40, 16)
    torch.testing.assert_close(
        features, model.encoder_(model.normalise(photos)).detach(), rtol=1e-4, atol=1e-5
    )
    assert model.encoder_.stem[1].num_batches_tracked == 30 * 3


def test_same_seed_same_result_and_another_seed_another(fitted: SparK, photos: Tensor) -> None:
    again = SparK(**SMALL).fit(photos, progress=False)  # type: ignore[arg-type]
    assert torch.equal(again.transform(photos), fitted.transform(photos))
    other = SparK(**SMALL, seed=1).fit(photos, progress=False)  # type: ignore[arg-type]
    assert not torch.equal(other.transform(photos), fitted.transform(photos))


def test_saved_and_loaded_it_is_the_same(fitted: SparK, photos: Tensor, tmp_path) -> None:  # type: ignore[no-untyped-def]
    fitted.save_pretrained(tmp_path / "spark")
    loaded = paperback.load(tmp_path / "spark")
    assert torch.equal(loaded.transform(photos), fitted.transform(photos))
    assert torch.equal(loaded.reconstruct(photos)[0], fitted.reconstruct(photos)[0])


def test_reconstruct_leaves_visible_pixels_and_normalises_back(fitted: SparK, photos: Tensor) -> None:
    whole, mask = fitted.reconstruct(photos, seed=3)
    visible = mask.repeat_interleave(4, 2).repeat_interleave(4, 3)
    torch.testing.assert_close(whole[visible], photos[visible], atol=1e-6, rtol=0)
    assert (whole[~visible] != photos[~visible]).float().mean() > 0.9
    arrays, again = fitted.reconstruct(photos.numpy(), mask)
    assert isinstance(arrays, np.ndarray)
    assert torch.equal(again, mask)
    np.testing.assert_allclose(arrays, whole.numpy(), atol=1e-6)


def test_images_that_are_not_whole_patches_are_padded_and_cut_back(photos: Tensor) -> None:
    model = SparK(**SMALL).fit(photos[:, :, :14, :15], progress=False)  # type: ignore[arg-type]
    assert model.normalise(photos[:, :, :14, :15]).shape[-2:] == (16, 16)
    whole, mask = model.reconstruct(photos[:, :, :14, :15])
    assert whole.shape[-2:] == (14, 15)
    assert mask.shape == (40, 1, 4, 4)
    with pytest.raises(DataError, match="14x15, which patches of 4x4"):
        SparK(**SMALL, pad=False).fit(photos[:, :, :14, :15], progress=False)  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", [
    {"sparse": False}, {"hierarchical": False}, {"mask_token": False}, {"normalise_target": False},
    {"optimizer": "lamb"}, {"augmentation": None}, {"precision": "bf16"}, {"decoder_width": 8},
    {"backbone": {"name": "convnext", "width": 8, "stages": 2, "blocks": 1, "kernel_size": 3}},
    {"backbone": {"name": "resnet", "width": 8, "stages": 2, "norm": "group"}},
])  # fmt: skip
def test_every_variant_trains(settings: dict[str, object], photos: Tensor) -> None:
    model = SparK(**SMALL | settings).fit(photos, progress=False)  # type: ignore[arg-type]
    assert model.transform(photos).isfinite().all()
    assert model.history_.train_loss[0] > 0  # type: ignore[union-attr]


def test_a_network_that_is_not_ours_is_a_backbone(photos: Tensor) -> None:
    class Foreign(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(1, 4, 3, stride=2, padding=1)
            self.second = nn.Sequential(nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.ReLU())

        def forward(self, x: Tensor) -> list[Tensor]:
            half = self.first(x)
            return [half, self.second(half)]

    model = SparK(FeatureMaps(Foreign(), (4, 8), 4), epochs=1, batch_size=16).fit(photos, progress=False)
    assert model.transform(photos).shape == (40, 8)

    class Leaking(Foreign):
        def forward(self, x: Tensor) -> list[Tensor]:
            half = self.first(x) + 1
            return [half, self.second(half)]

    with pytest.raises(NotSupportedError, match=r"feature map 1 .* outside of modules"):
        SparK(FeatureMaps(Leaking(), (4, 8), 4), epochs=1).fit(photos, progress=False)
    with pytest.raises(DataError, match="feature map 1 of the backbone"):
        SparK(FeatureMaps(Foreign(), (5, 8), 4), epochs=1).fit(photos, progress=False)


def test_the_loop_and_the_module_agree_on_what_is_trained() -> None:
    model = SparK(**SMALL)  # type: ignore[arg-type]
    network = model._network()
    assert isinstance(network, MaskedReconstruction)
    assert {id(p) for p in network.parameters()} == {id(p) for p in model.parameters()}


@pytest.mark.parametrize(("settings", "message"), [
    ({"mask_ratio": 1.0}, "mask_ratio is 1.0"),
    ({"mask_ratio": 0.0}, "mask_ratio is 0.0"),
    ({"decoder_width": 6}, "decoder_width is 6"),
    ({"backbone": {"name": "vit", "patch": 4}, "image_size": 16}, "feature maps"),
    ({"optimizer": "sgd"}, "optimizer is 'sgd'"),
    ({"precision": "fp16"}, "precision is 'fp16'"),
    ({"weight_decay": (0.1,)}, "weight_decay is"),
])  # fmt: skip
def test_settings_that_cannot_be_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        SparK(**SMALL | settings)  # type: ignore[arg-type]


def test_data_that_cannot_be_used_are_refused(photos: Tensor) -> None:
    with pytest.raises(DataError, match="keeps 0 of 16 cells"):
        SparK(**SMALL, mask_ratio=0.99).fit(photos, progress=False)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="one position"):
        SparK(**SMALL | {"batch_size": 1}, mask_ratio=0.94).fit(photos, progress=False)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"outside 0\.\.1"):
        SparK(**SMALL).fit(255 * photos, progress=False)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="power of two"):
        Decoder(6, 12, 1)
    with pytest.raises(DataError, match="mask has shape"):
        SparK(**SMALL).reconstruct(photos, torch.ones(1, 1, 2, 2, dtype=torch.bool))  # type: ignore[arg-type]


def test_it_behaves_as_every_encoder(photos: Tensor) -> None:
    images = (255 * photos[:, 0]).to(torch.uint8)
    check_encoder(lambda seed: SparK(**SMALL, seed=seed), images, torch.arange(len(images)) % 2)  # type: ignore[arg-type]
