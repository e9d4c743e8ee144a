"""Features from images with few or no labels.

Every method that learns an encoder is an `Encoder`: a module with `fit` and `transform`. What its features
are worth is measured by `evaluate`, which takes any function from images to features, so also networks that
are not ours.
"""

from paperback.represent.interface import Encoder, as_images

__all__ = ["Encoder", "as_images"]
