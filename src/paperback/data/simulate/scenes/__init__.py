"""Colour scenes: items of clothing on textured backgrounds, with every factor known.

scenes = fashion_scenes(n_train=2000, seed=0)
scenes.train.images            # uint8 (2000, 3, 64, 64)
scenes.train.backgrounds       # a row for each scene: texture, colours, angle, frequency, light, ...
scenes.train.items             # a row for each item: class, colour, place, size, angle, visible share, ...
scenes.train.owner             # which item is seen at each pixel
"""

from paperback.data.simulate.scenes.colours import COLOURS
from paperback.data.simulate.scenes.fashion import FashionScenes, SceneSplit, fashion_scenes
from paperback.data.simulate.scenes.textures import TEXTURES

__all__ = ["COLOURS", "TEXTURES", "FashionScenes", "SceneSplit", "fashion_scenes"]
