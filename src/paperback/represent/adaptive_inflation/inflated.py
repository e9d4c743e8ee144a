"""A training set of real images, each of them several times, and generated ones: by index, without copies."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from paperback.errors import DataError
from paperback.represent.adaptive_inflation.gap import real_share, replication


class InflatedDataset:
    """Numbers 0 .. len - 1: first the real images `replicate` times over, then the generated ones.

    Both arrays stay what they are, for instance uint8 memory maps; a batch is made when it is asked for.

    Args:
        real: images as `inflate` takes them.
        generated: likewise.
        replicate: how often each real image stands in a pass, >= 1.
        shuffle_seed: of `order`.

    Attributes:
        real, generated, replicate, shuffle_seed: as given.
        beta: the share of real images.
    """

    def __init__(self, real: Any, generated: Any, replicate: int, shuffle_seed: int = 0) -> None:
        self.real, self.generated = real, generated
        self.replicate, self.shuffle_seed = replicate, shuffle_seed
        self._n_real = replicate * len(real)
        self.beta = real_share(len(real), len(generated), replicate)

    def __len__(self) -> int:
        """Number of images of a pass."""
        return self._n_real + len(self.generated)

    @property
    def source(self) -> Bool[Tensor, " n"]:
        """Which numbers are real images."""
        return torch.arange(len(self)) < self._n_real

    def order(self, epoch: int = 0) -> Int[Tensor, " n"]:
        """All numbers in the random order of a pass; every real image comes exactly `replicate` times."""
        from paperback.training import generator

        return torch.randperm(len(self), generator=generator(self.shuffle_seed, "inflated", epoch))

    def __getitem__(self, index: Int[Tensor, " k"]) -> Float[Tensor, "k c h w"]:
        """The images of some numbers, float32 in 0..1.

        Raises:
            DataError: if a number lies outside.
        """
        numbers = np.asarray(index, dtype=np.int64).reshape(-1)
        if len(numbers) and (numbers.min() < 0 or numbers.max() >= len(self)):
            raise DataError(f"an index lies outside 0..{len(self) - 1}.")
        real = numbers < self._n_real
        first = _take(self.real, numbers[real] % len(self.real))
        second = _take(self.generated, numbers[~real] - self._n_real)
        place = torch.from_numpy(np.argsort(np.concatenate([np.flatnonzero(real), np.flatnonzero(~real)])))
        return torch.cat([first, second])[place]

    def images(self) -> Float[Tensor, "n c h w"]:
        """The whole set as one tensor, for encoders that cannot be fed by number. This one is a copy."""
        return self[torch.arange(len(self))]


def inflate(
    real: Any,
    generated: Any,
    replicate: int | None = None,
    beta: float | None = None,
    shuffle_seed: int = 0,
    generated_labels: Any = None,
) -> InflatedDataset:
    """Add generated images to real ones.

    Args:
        real: images ``(n, h, w)`` or ``(n, c, h, w)``, uint8 or floats in 0..1, array, memory map or tensor.
        generated: of the same shape, type and range.
        replicate: how often each real image counts in a pass, >= 1; 10 if neither this nor beta is given, as
            in the paper (50,000 real and 1 million generated images: beta is 1/3).
        beta: in place of that, the share of real images, in (0, 1]; the nearest whole replication is taken.
        shuffle_seed: of the order of a pass.
        generated_labels: of generated images; nobody knows them, so that others than -1 are ignored with a
            warning.

    Returns:
        The mixed set; its `beta` is what was reached.

    Raises:
        DataError: if the two do not fit each other (shape, dtype or range), or the share cannot be had.
    """
    _check_alike(real, generated)
    if replicate is not None and beta is not None:
        raise DataError("replicate and beta both say how much the real images count; give one of them.")
    if beta is not None:
        replicate = whole_replication(len(real), len(generated), beta)
    replicate = 10 if replicate is None else replicate
    if isinstance(replicate, bool) or int(replicate) != replicate or replicate < 1:
        raise DataError(f"replicate is {replicate}; each real image counts a whole number of times, >= 1.")
    if generated_labels is not None and (np.asarray(generated_labels) != -1).any():
        warnings.warn("labels of generated images are ignored: the generator has not seen any.", stacklevel=2)
    return InflatedDataset(real, generated, int(replicate), shuffle_seed)


def whole_replication(n_real: int, n_generated: int, beta: float) -> int:
    """The whole replication whose share of real images is nearest to beta.

    Raises:
        DataError: if beta is out of range, or the share is larger when each real image counts once.
    """
    replicate = round(replication(n_real, n_generated, beta))
    if replicate < 1:
        least = real_share(n_real, n_generated, 1)
        raise DataError(
            f"beta is {beta}, but the real images are {least:.3g} of all when each counts once; "
            "ask for at least that, or add generated images."
        )
    return replicate


def _check_alike(real: Any, generated: Any) -> None:
    """Refuse generated images that are not of the real ones' kind."""
    for name, images in (("real", real), ("generated", generated)):
        if not isinstance(images, np.ndarray | Tensor) or images.ndim not in (3, 4):
            found = f"of shape {tuple(images.shape)}" if hasattr(images, "shape") else type(images).__name__
            raise DataError(f"{name} images are {found}; give (n, h, w) or (n, channels, h, w).")
    if len(real) == 0:
        raise DataError("there are no real images; inflation needs some.")
    shapes = tuple(real.shape[1:]), tuple(generated.shape[1:])
    types = str(real.dtype).removeprefix("torch."), str(generated.dtype).removeprefix("torch.")
    if shapes[0] != shapes[1]:
        raise DataError(
            f"real images have shape {shapes[0]} and generated ones {shapes[1]}; make them equal."
        )
    if types[0] != types[1]:
        raise DataError(
            f"real images have dtype {types[0]} and generated ones {types[1]}; bring both to uint8 in 0..255 "
            "or to float32 in 0..1."
        )
    if types[0] != "uint8":
        for name, images in (("real", real), ("generated", generated)):
            low, high = (float(images.min()), float(images.max())) if len(images) else (0.0, 1.0)
            if low < 0 or not high <= 1:
                raise DataError(f"{name} images lie in {low:.3g}..{high:.3g}; scale floats to 0..1.")


def _take(images: Any, index: np.ndarray) -> Tensor:
    """Some images as ``(k, c, h, w)`` float32 in 0..1; only these are read from a memory map."""
    chosen = (
        images[torch.from_numpy(index)] if isinstance(images, Tensor) else torch.from_numpy(images[index])
    )
    chosen = chosen[:, None] if chosen.ndim == 3 else chosen
    return chosen.float() / 255 if chosen.dtype == torch.uint8 else chosen.float()
