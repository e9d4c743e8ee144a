"""Scenes of Fashion-MNIST items: the factors are drawn first, the images rendered from them.

A scene has a background (texture, two colours, angle, frequency, light) and a few items, each of a class,
with a colour, a place, a size, an angle, perhaps mirrored. All factors are independent of each other, except
that items of a scene lie in different quarters of it (they may still overlap) and have other colours than the
background's first. Items of the training scenes are of the training part of Fashion-MNIST, those of the
validation and test scenes of its validation and test part, so that no item is in two parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from paperback.data import images
from paperback.data.dataset import Dataset, Split
from paperback.data.simulate.scenes.colours import COLOURS, draw_colours
from paperback.data.simulate.scenes.render import render
from paperback.data.simulate.scenes.textures import TEXTURES
from paperback.errors import DataError

PARTS = ("train", "val", "test")
QUARTERS = 4
SCALES = (0.36, 0.52)  # side of an item, as a share of the scene's
ANGLE = 25.0  # degrees to either side


@dataclass(frozen=True, eq=False)
class SceneSplit:
    """One part of the scenes.

    Attributes:
        images: uint8 ``(n, 3, size, size)``.
        backgrounds: a row for each scene: texture; colour_1, colour_2 (names) and hue_1, hue_2, saturation;
            angle (degrees), frequency (periods to the side), phase_1, phase_2; light in 0..1; n_items.
        items: a row for each item, by scene and slot: scene (row of images), slot (0 is the rearmost), class,
            source (row of the part of Fashion-MNIST), colour (name), hue, saturation, x, y (its middle in
            pixels from the left and the top), quarter (0 upper left, 1 upper right, 2 lower left, 3 lower
            right), scale (its side relative to the scene's), angle (degrees, clockwise), flip, visible (the
            share that items before it do not hide).
        owner: int8 ``(n, size, size)``, the slot of the item that is seen, -1 for the background.
    """

    images: Tensor
    backgrounds: pd.DataFrame
    items: pd.DataFrame
    owner: Tensor

    def __len__(self) -> int:
        """Number of scenes."""
        return len(self.images)

    def has_class(self, classes: Sequence[str]) -> Tensor:
        """Whether a scene has an item of each class, bool ``(n, classes)``."""
        present = np.zeros((len(self), len(classes)), dtype=bool)
        number = pd.Index(classes).get_indexer(pd.Index(self.items["class"]))
        known = number >= 0
        present[self.items["scene"].to_numpy()[known], number[known]] = True
        return torch.from_numpy(present)


@dataclass(frozen=True, eq=False)
class FashionScenes:
    """Scenes in three parts.

    Attributes:
        train: models are fitted on these,
        val: chosen on these,
        test: and judged on these.
        classes: names of the items' classes.
    """

    train: SceneSplit
    val: SceneSplit
    test: SceneSplit
    classes: tuple[str, ...]

    def dataset(self, target: str = "class") -> Dataset:
        """Images with one label each, as other image sets have.

        Args:
            target: "class" or "colour" of the foremost item; "texture", "colour_1", "colour_2" or "n_items".

        Returns:
            A `Dataset` of kind "images": x uint8 ``(n, 3, size, size)``, y int64.

        Raises:
            DataError: if there is no such label.
        """
        items = (1, 2, 3, 4)
        names: dict[str, tuple[str, ...]] = {
            "class": self.classes,
            "colour": tuple(COLOURS),
            "texture": TEXTURES,
            "colour_1": tuple(COLOURS),
            "colour_2": tuple(COLOURS),
            "n_items": tuple(str(n) for n in items),
        }
        if target not in names:
            raise DataError(f"target is {target!r}; a scene has the labels {', '.join(names)}.")

        def part(scenes: SceneSplit) -> Split:
            if target in ("class", "colour"):
                column = scenes.items.groupby("scene")[target].last()
            else:
                column = scenes.backgrounds[target].astype(str)
            codes = pd.Index(names[target]).get_indexer(pd.Index(column))
            return Split(scenes.images, torch.from_numpy(codes.astype(np.int64)))

        return Dataset(
            name="fashion_scenes",
            kind="images",
            train=part(self.train),
            val=part(self.val),
            test=part(self.test),
            source="simulated from Fashion-MNIST (Xiao, Rasul and Vollgraf 2017)",
            licence="MIT",
            description="colour scenes: items of clothing on textured backgrounds.",
            classes=names[target],
            target=target,
        )


def fashion_scenes(
    n_train: int = 4000,
    n_val: int = 500,
    n_test: int = 1000,
    seed: int = 0,
    *,
    size: int = 64,
    min_items: int = 1,
    max_items: int = 3,
) -> FashionScenes:
    """Draw and render scenes; the same seed gives the same scenes, whatever the sizes of other parts.

    Args:
        n_train: number of training scenes, >= 1.
        n_val: number of validation scenes, >= 0.
        n_test: number of test scenes, >= 0.
        seed: of all draws.
        size: side of the scenes, 16 to 256 pixels.
        min_items: the fewest items of a scene, >= 1.
        max_items: the most, at most 4.

    Returns:
        The scenes with their factors.

    Raises:
        DataError: if a number is out of range.
    """
    for name, value, least in (("n_train", n_train, 1), ("n_val", n_val, 0), ("n_test", n_test, 0)):
        if value < least:
            raise DataError(f"{name} is {value}; it must be at least {least}.")
    if not 16 <= size <= 256:
        raise DataError(f"size is {size}; it must lie in 16..256 pixels.")
    if not 1 <= min_items <= max_items <= QUARTERS:
        raise DataError(
            f"min_items is {min_items} and max_items {max_items}; 1 <= min_items <= max_items <= {QUARTERS}."
        )
    garments = images.fashion_mnist()
    splits = {}
    for number, (name, n) in enumerate(zip(PARTS, (n_train, n_val, n_test), strict=True)):
        rng = np.random.default_rng([seed, number])
        source: Split = getattr(garments, name)
        splits[name] = _part(n, source, garments.classes, rng, size, min_items, max_items)
    return FashionScenes(**splits, classes=garments.classes)


def _part(
    n: int,
    source: Split,
    classes: tuple[str, ...],
    rng: np.random.Generator,
    size: int,
    min_items: int,
    max_items: int,
) -> SceneSplit:
    backgrounds, first = _draw_backgrounds(n, rng)
    backgrounds["n_items"] = rng.integers(min_items, max_items + 1, n)
    items = _draw_items(backgrounds["n_items"].to_numpy(), first, source, classes, rng, size)
    if n == 0:
        items["visible"] = np.zeros(0)
        empty = torch.zeros(0, 3, size, size, dtype=torch.uint8)
        return SceneSplit(empty, backgrounds, items, torch.zeros(0, size, size, dtype=torch.int8))
    drawn = render(backgrounds, items, source.x, size, max_items)
    items["visible"] = drawn.visible[items["scene"], items["slot"]]
    return SceneSplit(drawn.images, backgrounds, items, drawn.owner)


def _draw_backgrounds(n: int, rng: np.random.Generator) -> tuple[pd.DataFrame, np.ndarray]:
    """A row of factors for each scene, and the numbers of the first colours."""
    names = np.array(list(COLOURS))
    first, hue_1 = draw_colours(n, rng)
    second, hue_2 = draw_colours(n, rng, but=first)
    table = pd.DataFrame(
        {
            "texture": np.array(TEXTURES)[rng.integers(0, len(TEXTURES), n)],
            "colour_1": names[first],
            "colour_2": names[second],
            "hue_1": hue_1,
            "hue_2": hue_2,
            "saturation": rng.uniform(0.3, 0.6, n),
            "angle": rng.uniform(0, 180, n),
            "frequency": rng.uniform(2, 6, n),
            "phase_1": rng.random(n),
            "phase_2": rng.random(n),
            "light": rng.uniform(0.6, 1.0, n),
        }
    )
    return table, first


def _draw_items(
    counts: np.ndarray,
    background: np.ndarray,
    source: Split,
    classes: tuple[str, ...],
    rng: np.random.Generator,
    size: int,
) -> pd.DataFrame:
    """A row of factors for each item, by scene and slot; classes are equally likely."""
    scene = np.repeat(np.arange(len(counts)), counts)
    n = len(scene)
    slot = np.arange(n) - np.repeat(counts.cumsum() - counts, counts)
    quarter = rng.random((len(counts), QUARTERS)).argsort(1)[scene, slot]
    label = rng.integers(0, len(classes), n)
    # The rows of each class, one after the other; a share of the class picks one of them.
    y = source.y.numpy()
    by_class, sizes = np.argsort(y, kind="stable"), np.bincount(y, minlength=len(classes))
    pick = (rng.random(n) * sizes[label]).astype(np.int64)
    colour, hue = draw_colours(n, rng, but=background[scene])
    place = rng.uniform(-0.08, 0.08, (n, 2)) + np.stack([quarter % 2, quarter // 2], 1) * 0.5 + 0.25
    return pd.DataFrame(
        {
            "scene": scene,
            "slot": slot,
            "class": np.array(classes)[label],
            "source": by_class[(sizes.cumsum() - sizes)[label] + pick],
            "colour": np.array(list(COLOURS))[colour],
            "hue": hue,
            "saturation": rng.uniform(0.75, 1.0, n),
            "x": place[:, 0] * size,
            "y": place[:, 1] * size,
            "quarter": quarter,
            "scale": rng.uniform(*SCALES, n),
            "angle": rng.uniform(-ANGLE, ANGLE, n),
            "flip": rng.random(n) < 0.5,
        }
    )
