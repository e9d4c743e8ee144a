"""A small generator of images: a mixture of Gaussians on their principal components.

It is the imperfect generator of the study: with one component it knows the mean and the covariance only, with
more it comes nearer. Any object with ``fit(images)`` and ``sample(n)`` does in its place.
"""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from paperback.errors import DataError


class MixtureGenerator:
    """Draws images like those it was fitted to; labels are not seen.

    Args:
        components: number of Gaussians, each with a covariance of its own.
        dims: principal components that are modelled; what is left of an image is its mean.
        seed: of the fit and the draws.

    Raises:
        DataError: if a number is below 1.
    """

    def __init__(self, components: int = 20, dims: int = 40, seed: int = 0) -> None:
        if components < 1 or dims < 1:
            raise DataError(f"components and dims are {components} and {dims}; both must be at least 1.")
        self.components, self.dims, self.seed = components, dims, seed

    def fit(self, images: Any) -> Self:
        """Learn from images ``(n, ...)``, uint8 or floats in 0..1, array or tensor.

        Raises:
            DataError: if there are fewer images than components.
        """
        from sklearn.decomposition import PCA
        from sklearn.mixture import GaussianMixture

        array = np.asarray(images)
        if len(array) < max(2, self.components):
            raise DataError(f"{len(array)} images are too few for {self.components} components.")
        self._shape, self._dtype, self._as_tensor = array.shape[1:], array.dtype, isinstance(images, Tensor)
        rows = array.reshape(len(array), -1).astype(np.float64)
        self._scale = 255.0 if array.dtype == np.uint8 else 1.0
        dims = min(self.dims, *rows.shape)
        self._pca = PCA(dims, random_state=self.seed).fit(rows / self._scale)
        self._mixture = GaussianMixture(self.components, reg_covar=1e-4, random_state=self.seed)
        self._mixture.fit(self._pca.transform(rows / self._scale))
        return self

    def sample(self, n: int, seed: int | None = None) -> NDArray[Any] | Tensor:
        """Draw n images of the shape, type and range of those it was fitted to.

        Args:
            n: how many, >= 1.
            seed: of the draws; the generator's own if not given.

        Raises:
            DataError: if n < 1 or the generator is not fitted.
        """
        import torch

        if not hasattr(self, "_mixture"):
            raise DataError("the generator is not fitted; call fit with images first.")
        if n < 1:
            raise DataError(f"n is {n}; ask for at least one image.")
        rng = np.random.default_rng(self.seed if seed is None else seed)
        counts = rng.multinomial(n, self._mixture.weights_)
        scores = np.concatenate([
            rng.multivariate_normal(mean, covariance, size=count, method="cholesky")
            for mean, covariance, count in zip(
                self._mixture.means_, self._mixture.covariances_, counts, strict=True
            )
        ])  # fmt: skip
        rows = self._pca.inverse_transform(rng.permutation(scores)).clip(0, 1) * self._scale
        rows = rows.round() if self._dtype == np.uint8 else rows
        images = rows.reshape(n, *self._shape).astype(self._dtype)
        return torch.from_numpy(images) if self._as_tensor else images
