"""Colour scenes: every factor in the tables is what the image shows, and no item is in two parts."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import rgb_to_hsv

from paperback.data import images
from paperback.data.simulate.scenes import COLOURS, TEXTURES, fashion_scenes
from paperback.data.simulate.scenes.render import paint_backgrounds, place, render, silhouettes
from paperback.data.simulate.scenes.textures import weave
from paperback.errors import DataError


@pytest.fixture(scope="module")
def scenes():
    return fashion_scenes(600, 40, 60, seed=1)


def hues(pixels):
    """Hue and saturation of pixels (n, 3) in 0..255."""
    return rgb_to_hsv(pixels.numpy() / 255).T


def circle(a, b):
    return np.abs((a - b + 0.5) % 1 - 0.5)


def test_the_shapes_and_the_tables_agree(scenes):
    for part, n in (("train", 600), ("val", 40), ("test", 60)):
        split = getattr(scenes, part)
        assert len(split) == n
        assert split.images.shape == (n, 3, 64, 64)
        assert split.images.dtype == torch.uint8
        assert split.owner.shape == (n, 64, 64)
        assert len(split.backgrounds) == n
        counts = split.items.groupby("scene").size()
        assert (counts.to_numpy() == split.backgrounds["n_items"].to_numpy()).all()
        assert set(counts) <= {1, 2, 3}
        assert not split.items.isna().any().any()
        assert not split.backgrounds.isna().any().any()


def test_the_same_seed_gives_the_same_scenes_whatever_the_other_parts(scenes):
    again = fashion_scenes(30, 40, 0, seed=1)
    assert torch.equal(again.val.images, scenes.val.images)
    pd.testing.assert_frame_equal(again.val.items, scenes.val.items)
    assert len(again.test) == 0
    assert not torch.equal(fashion_scenes(1, 40, 0, seed=2).val.images, scenes.val.images)


def test_an_items_class_is_that_of_its_source_and_parts_share_none(scenes):
    fashion = images.fashion_mnist()
    for part in ("train", "val", "test"):
        items, source = getattr(scenes, part).items, getattr(fashion, part)
        labels = np.array(fashion.classes)[source.y.numpy()[items["source"].to_numpy()]]
        assert (labels == items["class"]).all()
    counts = scenes.train.items["class"].value_counts()
    assert len(counts) == 10
    assert counts.max() < 2 * counts.min()


def test_the_pixels_of_an_item_have_its_hue(scenes):
    split = scenes.train
    for row in split.items[split.items["visible"] > 0.9].head(60).itertuples():
        seen = split.owner[row.scene] == row.slot
        inner = torch.nn.functional.avg_pool2d(seen[None, None].float(), 3, 1, 1)[0, 0] == 1
        if inner.sum() < 20:
            continue
        hue, _, value = hues(split.images[row.scene][:, inner].T)
        assert np.median(circle(hue, row.hue)) < 0.02
        assert value.max() <= split.backgrounds["light"][row.scene] + 0.01


def test_the_pixels_around_items_are_the_background(scenes):
    split = scenes.train
    light = torch.tensor(split.backgrounds["light"].to_numpy(np.float32))[:, None, None, None]
    bare = (paint_backgrounds(split.backgrounds, 64) * light * 255).round()
    far = torch.nn.functional.max_pool2d((split.owner >= 0)[:, None].float(), 5, 1, 2) == 0
    same = (bare - split.images.float()).abs().max(1, keepdim=True).values <= 1
    assert float(same[far].float().mean()) > 0.999


def test_a_hue_lies_near_the_middle_of_its_name(scenes):
    items = scenes.train.items
    middles = items["colour"].map(COLOURS).to_numpy()
    assert circle(items["hue"].to_numpy(), middles).max() <= 0.015 + 1e-9
    first = scenes.train.backgrounds["colour_1"].to_numpy()[items["scene"]]
    assert (first != items["colour"]).all()


def test_an_item_is_where_the_table_says():
    garments = torch.zeros(1, 28, 28, dtype=torch.uint8)
    garments[0, 4:24, 4:24] = 200
    items = pd.DataFrame(
        {"source": [0, 0], "x": [20.0, 44.0], "y": [30.0, 40.0], "scale": [0.4, 0.5], "angle": [0.0, 45.0],
         "flip": [False, True]}
    )  # fmt: skip
    alpha, shade = place(items, garments, 64)
    rows, columns = torch.meshgrid(torch.arange(64) + 0.5, torch.arange(64) + 0.5, indexing="ij")
    for k, row in enumerate(items.itertuples()):
        weight = alpha[k, 0] / alpha[k, 0].sum()
        assert float((weight * columns).sum()) == pytest.approx(row.x, abs=0.1)
        assert float((weight * rows).sum()) == pytest.approx(row.y, abs=0.1)
        area = (20 / 28 * row.scale * 64) ** 2
        assert float(alpha[k].sum()) == pytest.approx(area, rel=0.03)
    assert float(shade.max()) == pytest.approx(200 / 255, abs=0.01)


def test_angles_turn_clockwise_and_flips_mirror():
    garments = torch.zeros(1, 28, 28, dtype=torch.uint8)
    garments[0, 2:6, 12:16] = 255  # at the top
    table = pd.DataFrame({"source": [0], "x": [32.0], "y": [32.0], "scale": [0.8], "flip": [False]})
    right, _ = place(table.assign(angle=90.0), garments, 64)
    assert float(right[0, 0, 28:36, 45:].sum()) > 0.95 * float(right.sum())  # the top is at the right
    garments = garments.transpose(1, 2).contiguous()  # at the left
    plain, _ = place(table.assign(angle=0.0), garments, 64)
    mirrored, _ = place(table.assign(angle=0.0, flip=True), garments, 64)
    torch.testing.assert_close(mirrored, plain.flip(3), atol=1e-5, rtol=0)


def test_later_items_hide_earlier_ones_and_the_share_is_noted():
    garments = torch.zeros(1, 28, 28, dtype=torch.uint8)
    garments[0, 4:24, 4:24] = 255
    backgrounds = pd.DataFrame(
        {"texture": ["plain"], "hue_1": [0.5], "hue_2": [0.0], "saturation": [0.5], "angle": [0.0],
         "frequency": [3.0], "phase_1": [0.0], "phase_2": [0.0], "light": [1.0]}
    )  # fmt: skip
    items = pd.DataFrame(
        {"scene": [0, 0], "slot": [0, 1], "source": [0, 0], "hue": [0.0, 0.33], "saturation": [1.0, 1.0],
         "x": [32.0, 32.0], "y": [32.0, 32.0], "scale": [0.6, 0.3], "angle": [0.0, 0.0],
         "flip": [False, False]}
    )  # fmt: skip
    made = render(backgrounds, items, garments, 64, 3)
    assert made.visible[0, 1] == 1
    assert made.visible[0, 0] == pytest.approx(0.75, abs=0.03)
    assert np.isnan(made.visible[0, 2])
    assert made.owner[0, 32, 32] == 1
    assert tuple(made.images[0, :, 32, 32].tolist()) == pytest.approx((5, 255, 0), abs=6)


def test_a_silhouette_has_no_holes_and_images_do_not_touch():
    ring = torch.zeros(3, 28, 28, dtype=torch.uint8)
    ring[1, 5:20, 5:20] = 255
    ring[1, 8:16, 8:16] = 0
    filled = silhouettes(ring)
    assert filled[1].sum() == 15 * 15
    assert filled[0].sum() == filled[2].sum() == 0


@pytest.mark.parametrize("texture", TEXTURES)
def test_a_texture_is_a_share_at_each_place(texture):
    angle, frequency, phase = torch.tensor([0.0, 1.0]), torch.tensor([4.0, 3.0]), torch.rand(2, 2)
    share = weave(texture, 48, angle, frequency, phase)
    assert share.shape == (2, 48, 48)
    assert 0 <= float(share.min()) <= float(share.max()) <= 1
    if texture == "plain":
        assert share.max() == 0
    else:
        assert share.flatten(1).std(1).min() > 0.1
    if texture == "stripes":  # four periods from left to right, none from top to bottom
        spectrum = torch.fft.rfft(share[0, 0] - share[0, 0].mean()).abs()
        assert int(spectrum.argmax()) == 4
        torch.testing.assert_close(share[0], share[0, :1].expand(48, -1))


def test_labels_of_a_dataset_are_those_of_the_tables(scenes):
    data = scenes.dataset("class")
    last = scenes.test.items.groupby("scene")["class"].last()
    assert [data.classes[int(code)] for code in data.test.y] == list(last)
    data = scenes.dataset("texture")
    assert [data.classes[int(code)] for code in data.val.y] == list(scenes.val.backgrounds["texture"])
    counts = scenes.dataset("n_items")
    assert [counts.classes[int(code)] for code in counts.val.y] == [
        str(n) for n in scenes.val.backgrounds["n_items"]
    ]
    present = scenes.test.has_class(scenes.classes)
    row = scenes.test.items.iloc[7]
    assert present[row["scene"], scenes.classes.index(row["class"])]
    assert int(present.sum()) <= len(scenes.test.items)
    with pytest.raises(DataError, match="target is 'shape'"):
        scenes.dataset("shape")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_train": 0}, "n_train is 0"),
        ({"n_val": -1}, "n_val is -1"),
        ({"size": 8}, "size is 8"),
        ({"min_items": 3, "max_items": 2}, "min_items is 3"),
        ({"max_items": 5}, "max_items 5"),
    ],
)
def test_numbers_that_make_no_scenes_are_refused(arguments, message):
    with pytest.raises(DataError, match=message):
        fashion_scenes(**arguments)
