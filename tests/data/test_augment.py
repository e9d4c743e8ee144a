"""Augmentations of image batches: measured frequencies, exact cases, seeds, the siamese mode."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paperback.data.augment import LUMINANCE, PRESETS, Augment, Views
from paperback.errors import DataError

MANY = 5000


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def images(n=8, channels=3, height=28, width=28, seed=1):
    return torch.rand(n, channels, height, width, generator=seeded(seed))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_keep_shape_range_and_input(name, channels):
    x = images(channels=channels)
    before = x.clone()
    for view in Views.of(name)(x, seeded()):
        assert view.shape == x.shape
        assert view.dtype == x.dtype
        assert 0 <= view.min() <= view.max() <= 1
        assert not torch.equal(view, x)
    assert torch.equal(x, before)


def test_the_default_changes_nothing():
    x = images()
    assert torch.equal(Augment()(x, seeded()), x)


def test_the_same_seed_gives_the_same_views_and_another_seed_others():
    x, views = images(), Views.of("simclr")
    first, again, other = (torch.cat(views(x, seeded(s))) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_images_have_parameters_of_their_own():
    same = images(1).expand(16, -1, -1, -1)
    views = Augment(brightness=0.8, jitter=1.0)(same, seeded())
    assert len(torch.unique(views.mean((1, 2, 3)))) == 16


def test_global_random_numbers_are_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    Views.of("simclr")(images(), seeded())
    assert torch.equal(torch.rand(3), expected)


# -- geometry ------------------------------------------------------------------------------------------------


def test_a_certain_flip_mirrors():
    x = images()
    assert torch.allclose(Augment(flip=1.0)(x, seeded()), x.flip(3), atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(28, 28), (24, 40)])
def test_a_turn_by_half_a_circle_mirrors_both_axes(height, width):
    augment = Augment(rotate=180.0)
    x = images(4, height=height, width=width)
    draws = augment.draw(x.shape, seeded())
    half = torch.tensor([[-1.0, 0, 0], [0, -1, 0]]).expand(4, 2, 3)
    object.__setattr__(draws, "affine", half)
    assert torch.allclose(augment.apply(x, draws), x.flip(2, 3), atol=1e-5)


def test_a_turn_is_one_of_pixels_in_images_that_are_not_square():
    draws = Augment(rotate=90.0).draw((2000, 1, 20, 40), seeded())
    to_pixels = torch.diag(torch.tensor([20.0, 10.0]))  # half of width and height
    linear = to_pixels @ draws.affine[:, :, :2] @ torch.inverse(to_pixels)
    assert torch.allclose(linear @ linear.mT, torch.eye(2).expand(2000, 2, 2), atol=1e-5)
    assert torch.allclose(torch.linalg.det(linear), torch.ones(2000), atol=1e-5)


def test_zoom_magnifies():
    draws = Augment(zoom=(2.0, 2.0)).draw((3, 1, 20, 20), seeded())
    assert torch.allclose(draws.affine[:, :, :2], torch.eye(2).expand(3, 2, 2) / 2)


def crop_by_loop(rng, height, width, scale, ratio):
    """RandomResizedCrop, written out: area and ratio until the box fits, at most ten times."""
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if w <= width and h <= height:
            return h * w / (height * width)
    return 1.0


@pytest.mark.parametrize("name", ["standard", "adainf"])
def test_mean_crop_area_and_jitter_frequency(name):
    import numpy as np

    augment = Views.of(name).first
    draws = augment.draw((MANY, 3, 28, 28), seeded())
    area = torch.linalg.det(draws.affine[:, :, :2]).abs()
    rng = np.random.default_rng(0)
    expected = np.array([crop_by_loop(rng, 28, 28, augment.crop_scale, (3 / 4, 4 / 3)) for _ in range(MANY)])
    error = math.sqrt((float(area.var()) + expected.var()) / MANY)
    assert abs(float(area.mean()) - expected.mean()) < 3 * error
    assert area.min() >= augment.crop_scale[0] - 1e-6
    p = augment.jitter
    assert abs(float(draws.jittered.float().mean()) - p) < 3 * math.sqrt(p * (1 - p) / MANY)
    inside = draws.affine[:, :, 2].abs() + torch.linalg.vector_norm(draws.affine[:, :, :2], dim=2)
    assert inside.max() <= 1 + 1e-5  # a crop does not leave its image


def test_a_crop_that_never_fits_is_the_largest_central_one():
    augment = Augment(crop_scale=(0.99, 1.0), crop_ratio=(2.0, 2.0))
    draws = augment.draw((5, 1, 28, 28), seeded())
    assert torch.allclose(draws.affine[:, :, :2], torch.diag(torch.tensor([1.0, 0.5])).expand(5, 2, 2))


# -- colours -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "invariant"),
    [
        ("hue", lambda x: torch.stack([x.max(1).values, x.min(1).values])),  # value and chroma
        ("saturation", lambda x: (x * torch.tensor(LUMINANCE).view(1, 3, 1, 1)).sum(1)),
        ("contrast", lambda x: (x * torch.tensor(LUMINANCE).view(1, 3, 1, 1)).sum(1).mean((1, 2))),
    ],
)
def test_what_a_colour_step_leaves_alone(setting, invariant):
    x = 0.4 + 0.2 * images()  # far from 0 and 1, so that nothing is clipped
    changed = Augment(jitter=1.0, **{setting: 0.4})(x, seeded())
    assert not torch.allclose(changed, x, atol=1e-3)
    assert torch.allclose(invariant(changed), invariant(x), atol=1e-5)


def test_hue_agrees_with_the_standard_library():
    import colorsys

    augment = Augment(jitter=1.0, hue=0.5)
    x = images(20, height=1, width=1)
    draws = augment.draw(x.shape, seeded())
    changed = augment.apply(x, draws)
    for image, turned, factor in zip(x, changed, draws.factors, strict=True):
        h, s, v = colorsys.rgb_to_hsv(*image.flatten().tolist())
        expected = colorsys.hsv_to_rgb((h + float(factor[3])) % 1, s, v)
        assert torch.allclose(turned.flatten(), torch.tensor(expected), atol=1e-4)


def test_grey_images_only_change_in_brightness_and_contrast():
    x = images(channels=1)
    assert torch.equal(Augment(jitter=1.0, saturation=0.8, hue=0.4)(x, seeded()), x)
    assert torch.equal(Augment(grey=1.0)(x, seeded()), x)


def test_grey_makes_three_equal_channels():
    grey = Augment(grey=1.0)(images(), seeded())
    assert torch.equal(grey[:, 0], grey[:, 1])
    assert torch.equal(grey[:, 0], grey[:, 2])


def test_the_order_of_the_colour_steps_is_drawn_for_each_image():
    draws = Views.of("simclr").first.draw((MANY, 3, 8, 8), seeded())
    assert len(torch.unique(draws.order, dim=0)) == 24
    x = torch.full((2, 1, 4, 4), 0.5)
    x[:, :, 0, 0] = 1.0
    augment = Augment(jitter=1.0, brightness=0.5, contrast=0.5)
    pair = augment.draw(x.shape, seeded())
    object.__setattr__(pair, "factors", torch.tensor([[1.5, 0.5, 1, 0]] * 2))
    object.__setattr__(pair, "order", torch.tensor([[0, 1, 2, 3], [1, 0, 2, 3]]))
    first, second = augment.apply(x, pair)
    assert not torch.allclose(first, second)  # clipping after brightness comes before or after contrast


def test_solarise_inverts_the_bright_half():
    x = images()
    changed = Augment(solarise=1.0)(x, seeded())
    assert torch.equal(changed, torch.where(x >= 0.5, 1 - x, x))


# -- blur, holes, noise --------------------------------------------------------------------------------------


def test_blur_agrees_with_a_convolution():
    from scipy.ndimage import gaussian_filter1d

    x = images(6).double()
    augment = Augment(blur=1.0, blur_sigma=(0.5, 1.5))
    draws = augment.draw(x.shape, seeded())
    changed = augment.apply(x, draws)
    for image, blurred, sigma in zip(x.numpy(), changed.numpy(), draws.sigma.tolist(), strict=True):
        expected = image
        for axis in (1, 2):
            expected = gaussian_filter1d(expected, sigma, axis, mode="mirror", radius=5)
        assert abs(blurred - expected).max() < 1e-6


def test_blur_keeps_a_constant_and_works_on_tiny_images():
    constant = torch.full((3, 1, 2, 1), 0.3)
    assert torch.allclose(Augment(blur=1.0)(constant, seeded()), constant)


def test_cutout_fills_a_square_with_the_mean():
    x = images(200, 1, 20, 20)
    changed = Augment(cutout=1.0, cutout_size=0.5)(x, seeded())
    cut = changed != x
    mean = x.mean((2, 3), keepdim=True).expand_as(x)
    assert torch.equal(changed[cut], mean[cut])
    assert cut.sum((1, 2, 3)).min() >= 20  # a corner of 5 by 5 pixels at least, but for rounding
    assert cut.sum((1, 2, 3)).max() <= 121
    assert not (Augment(cutout=0.3)(x, seeded()) != x).flatten(1).any(1).all()


def test_noise_has_the_size_that_was_drawn():
    x = torch.full((400, 1, 28, 28), 0.5)
    augment = Augment(noise=0.1)
    changed = augment(x, seeded())
    spread = (changed - x).flatten(1).std(1)
    assert spread.max() < 0.11
    assert abs(float(spread.mean()) - 0.05) < 0.005


# -- whole ---------------------------------------------------------------------------------------------------


def test_the_siamese_mode_gives_two_batches_the_same_parameters():
    augment = Augment(crop_scale=(0.2, 1.0), flip=0.5, rotate=20, jitter=0.8, brightness=0.5, noise=0.1)
    x = images()
    draws = augment.draw(x.shape, seeded())
    assert torch.equal(augment.apply(x, draws), augment.apply(x.clone(), draws))
    assert torch.equal(augment.apply(x, draws), augment(x, seeded()))


def test_it_is_differentiable_in_the_images():
    x = images(4).requires_grad_()
    a, b = Views.of("adainf_asym")(x, seeded())
    (a + b).sum().backward()
    assert x.grad.isfinite().all()
    assert (x.grad.flatten(1).abs().sum(1) > 0).all()


def test_the_weak_augmentation_moves_pixels_less():
    from paperback.data import images as shipped

    x = shipped.fashion_mnist(500, n_val=1000).train.x[:, None].float() / 255
    distance = {
        name: float((Views.of(name)(x, seeded())[0] - x).square().mean())
        for name in ("weak", "adainf", "standard")
    }
    assert distance["weak"] < distance["adainf"] < distance["standard"]


def test_the_way_between_two_augmentations():
    standard, weak = Views.of("standard"), Views.of("adainf")
    assert standard.towards(weak, 0.0) == standard
    assert standard.towards(weak, 1.0) == weak
    half = standard.towards(weak, 0.5).first
    assert half.jitter == pytest.approx(0.6)
    assert half.crop_scale == pytest.approx((0.14, 1.0))


@settings(max_examples=30, deadline=None)
@given(
    low=st.floats(0.01, 1), flip=st.floats(0, 1), rotate=st.floats(0, 180), hue=st.floats(0, 0.5),
    noise=st.floats(0, 2), cutout=st.floats(0, 1), channels=st.sampled_from([1, 3]),
)  # fmt: skip
def test_any_setting_keeps_the_range_and_survives_json(low, flip, rotate, hue, noise, cutout, channels):
    augment = Augment(
        crop_scale=(low, 1.0), flip=flip, rotate=rotate, jitter=1.0, hue=hue, noise=noise, cutout=cutout
    )
    assert Views.of(json.loads(json.dumps(augment.settings()))).first == augment
    view = augment(images(3, channels, 9, 7), seeded())
    assert view.isfinite().all()
    assert 0 <= view.min() <= view.max() <= 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"crop_scale": (0.5, 1.5)}, "crop_scale"),
        ({"crop_scale": (0.9, 0.5)}, "crop_scale"),
        ({"flip": 1.5}, "flip"),
        ({"hue": 0.7}, "hue"),
        ({"noise": -1.0}, "noise"),
        ({"zoom": (0.0, 1.0)}, "zoom"),
    ],
)
def test_settings_out_of_range(settings, words):
    with pytest.raises(DataError, match=words):
        Augment(**settings)


def test_unknown_presets_and_settings():
    with pytest.raises(DataError, match="adainf_asym"):
        Views.of("strong")
    with pytest.raises(DataError, match="'strength'"):
        Views.of({"strength": 1})


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (torch.zeros(4, 28, 28), "shape"),
        (torch.zeros(4, 2, 28, 28), "1 or 3 channels"),
        (torch.zeros(4, 1, 28, 28, dtype=torch.uint8), "uint8"),
        ([[0.0]], "list"),
    ],
)
def test_images_that_cannot_be_augmented(bad, words):
    with pytest.raises(DataError, match=words):
        Views.of("simclr")(bad, seeded())
