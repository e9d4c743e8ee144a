"""From factors to images, many scenes at a time."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.ndimage import binary_fill_holes
from torch import Tensor

from paperback.data.simulate.scenes.colours import rgb
from paperback.data.simulate.scenes.textures import TEXTURES, weave

CHUNK = 256  # scenes that are rendered together; bounds the memory
SHADE = 0.35  # how dark an item's darkest point is, relative to its colour


class Rendered(NamedTuple):
    """Images and what is seen in them.

    Attributes:
        images: uint8 ``(n, 3, size, size)``.
        owner: int8 ``(n, size, size)``, the slot of the item that is seen, -1 for the background.
        visible: ``(n, slots)``, the share of each item that later ones do not hide; NaN where there is none.
    """

    images: Tensor
    owner: Tensor
    visible: NDArray[np.float64]


def render(
    backgrounds: pd.DataFrame, items: pd.DataFrame, garments: Tensor, size: int, slots: int
) -> Rendered:
    """Render every scene of a table.

    Args:
        backgrounds: a row for each scene, by scene.
        items: a row for each item; `scene` is a row of backgrounds, `slot` the order from back to front, and
            `source` a row of garments.
        garments: uint8 ``(m, h, w)``, black around the item.
        size: side of the scenes, pixels.
        slots: the most items of a scene.
    """
    parts = []
    scene_of = items["scene"].to_numpy()
    for start in range(0, len(backgrounds), CHUNK):
        stop = min(start + CHUNK, len(backgrounds))
        mine = items.iloc[np.searchsorted(scene_of, start) : np.searchsorted(scene_of, stop)]
        parts.append(_render(backgrounds.iloc[start:stop], mine, start, garments, size, slots))
    images, owner, visible = zip(*parts, strict=True)
    return Rendered(torch.cat(images), torch.cat(owner), np.concatenate(visible))


def _render(
    backgrounds: pd.DataFrame, items: pd.DataFrame, start: int, garments: Tensor, size: int, slots: int
) -> Rendered:
    canvas = paint_backgrounds(backgrounds, size)
    n = len(canvas)
    owner = torch.full((n, size, size), -1, dtype=torch.int8)
    whole = np.full((n, slots), np.nan)
    for slot in range(slots):
        rows = items[items["slot"] == slot]
        if rows.empty:
            continue
        scenes = torch.from_numpy(rows["scene"].to_numpy() - start)
        alpha, shade = place(rows, garments, size)
        colours = torch.from_numpy(rgb(rows["hue"].to_numpy(), rows["saturation"].to_numpy(), 1.0))
        # Where the edge of the silhouette is soft, shade was mixed with the black around it.
        light = SHADE + (1 - SHADE) * (shade / alpha.clamp(min=1e-3)).clamp(0, 1)
        painted = colours[:, :, None, None] * light
        canvas[scenes] = torch.lerp(canvas[scenes], painted, alpha)
        seen = alpha[:, 0] > 0.5
        owner[scenes] = torch.where(seen, torch.tensor(slot, dtype=torch.int8), owner[scenes])
        whole[scenes.numpy(), slot] = seen.sum((1, 2)).numpy()
    left = np.stack([(owner == slot).sum((1, 2)).numpy() for slot in range(slots)], axis=1)
    lights = torch.tensor(backgrounds["light"].to_numpy(np.float32))
    images = (canvas * lights[:, None, None, None] * 255).round().clamp(0, 255).to(torch.uint8)
    return Rendered(images, owner, left / whole)


def paint_backgrounds(backgrounds: pd.DataFrame, size: int) -> Tensor:
    """The backgrounds alone in full light, ``(n, 3, size, size)`` in 0..1."""
    saturation = backgrounds["saturation"].to_numpy()
    first, second = (
        torch.from_numpy(rgb(backgrounds[hue].to_numpy(), saturation, 0.8)) for hue in ("hue_1", "hue_2")
    )
    share = torch.empty(len(backgrounds), size, size)
    for texture in TEXTURES:
        rows = torch.from_numpy(np.flatnonzero(backgrounds["texture"].to_numpy() == texture))
        if len(rows) == 0:
            continue
        chosen = backgrounds.iloc[rows.numpy()]
        angle, frequency, phase = (
            torch.tensor(chosen[names].to_numpy(np.float32))
            for names in ("angle", "frequency", ["phase_1", "phase_2"])
        )
        share[rows] = weave(texture, size, angle * (math.pi / 180), frequency, phase)
    return torch.lerp(first[:, :, None, None], second[:, :, None, None], share[:, None])


def place(items: pd.DataFrame, garments: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Silhouette and shade of each item, turned, flipped and scaled to its place; ``(items, 1, size, size)``.

    A place p of the scene shows the garment's place R(-angle) (p - centre) / scale, coordinates in -1..1.
    """
    chosen = garments[torch.tensor(items["source"].to_numpy())]
    x, y, scale, angle, flip = (
        torch.tensor(items[name].to_numpy(np.float32)) for name in ("x", "y", "scale", "angle", "flip")
    )
    angle = angle * (math.pi / 180)
    sign = 1 - 2 * flip
    cosine, sine = angle.cos() / scale, angle.sin() / scale
    linear = torch.stack([sign * cosine, sign * sine, -sine, cosine], 1).view(-1, 2, 2)
    centre = torch.stack([2 * x / size - 1, 2 * y / size - 1], 1)[:, :, None]
    affine = torch.cat([linear, -linear @ centre], 2)
    maps = torch.stack([silhouettes(chosen), chosen.float() / 255], 1)
    grid = F.affine_grid(affine, [len(chosen), 2, size, size], align_corners=False)
    alpha, shade = F.grid_sample(maps, grid, padding_mode="zeros", align_corners=False).split(1, 1)
    return alpha, shade


def silhouettes(garments: Tensor) -> Tensor:
    """1 inside each garment, also where it is black, and 0 around it; float32 ``(n, h, w)``."""
    plane = np.zeros((3, 3, 3), dtype=bool)
    plane[1] = [[False, True, False], [True, True, True], [False, True, False]]
    # As one block with neighbours only within an image, all are filled at once.
    return torch.from_numpy(binary_fill_holes(garments.numpy() > 12, structure=plane)).float()
