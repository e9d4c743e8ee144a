"""Masks, patches, and the loss on masked patches: plain functions of tensors.

A patch is as large as the total stride R of the encoder, so that one cell of the mask is one position of the
last feature map. The target of a patch is normalised by its own mean and variance,
(p - mean) / sqrt(var + 1e-6), the variance being unbiased, and the loss is the mean over masked patches of
the mean squared error (Tian et al. 2023, section 3.4; the normalisation is that of He et al. 2022, MAE).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from paperback.errors import DataError

EPSILON = 1e-6  # added to the variance of a patch


def random_mask(
    n: int, grid: tuple[int, int], ratio: float, generator: torch.Generator | None = None
) -> Bool[Tensor, "n 1 rows columns"]:
    """Which cells are kept, drawn uniformly without replacement for each image.

    Args:
        n: number of images.
        grid: rows and columns of cells.
        ratio: share of cells that are masked, in (0, 1); ``round(cells * (1 - ratio))`` are kept.
        generator: of the draws; the mask is on its device.

    Returns:
        True at the kept cells, the same number in every image.

    Raises:
        DataError: if the ratio is out of range, or leaves no cell to see or none to predict.
    """
    keep = kept_cells(grid, ratio)
    cells = grid[0] * grid[1]
    device = None if generator is None else generator.device
    kept = torch.rand(n, cells, generator=generator, device=device).argsort(1)[:, :keep]
    mask = torch.zeros(n, cells, dtype=torch.bool, device=device).scatter_(1, kept, True)
    return mask.view(n, 1, *grid)


def kept_cells(grid: tuple[int, int], ratio: float) -> int:
    """How many cells of an image stay visible. Arguments and errors are those of `random_mask`."""
    if not 0 < ratio < 1:
        raise DataError(f"mask_ratio is {ratio}; it must lie between 0 and 1.")
    cells = grid[0] * grid[1]
    keep = round(cells * (1 - ratio))
    if not 0 < keep < cells:
        raise DataError(
            f"mask_ratio {ratio} keeps {keep} of {cells} cells ({grid[0]}x{grid[1]}); at least one must be "
            "kept and one masked: change mask_ratio, or take larger images or a smaller stride."
        )
    return keep


def patchify(images: Float[Tensor, "n c h w"], size: int) -> Float[Tensor, "n patches values"]:
    """Images as rows of square patches, each ``size * size * c`` values with the channel last."""
    n, c, height, width = images.shape
    cut = images.reshape(n, c, height // size, size, width // size, size)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(n, -1, size * size * c)


def unpatchify(
    patches: Float[Tensor, "n patches values"], size: int, grid: tuple[int, int]
) -> Float[Tensor, "n c h w"]:
    """The images that `patchify` cut; ``grid`` counts rows and columns of patches."""
    n, channels = len(patches), patches.shape[-1] // size**2
    cut = patches.reshape(n, *grid, size, size, channels)
    return cut.permute(0, 5, 1, 3, 2, 4).reshape(n, channels, grid[0] * size, grid[1] * size)


def patch_statistics(patches: Float[Tensor, "n patches values"]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each patch, ``(n, patches, 1)``, the latter of var + 1e-6."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (variance + EPSILON).sqrt()


def masked_patch_loss(
    reconstruction: Float[Tensor, "n c h w"],
    images: Float[Tensor, "n c h w"],
    mask: Bool[Tensor, "n 1 rows columns"],
    normalise_target: bool = True,
) -> Float[Tensor, ""]:
    """Mean squared error of the masked patches, averaged over all masked patches of the batch.

    Args:
        reconstruction: what the decoder says, in units of the target.
        images: the whole images.
        mask: True where the encoder saw the image.
        normalise_target: compare with each patch's values minus their mean, over their deviation.

    Returns:
        A scalar, float32.
    """
    size = images.shape[-2] // mask.shape[-2]
    target, guess = patchify(images.float(), size), patchify(reconstruction.float(), size)
    if normalise_target:
        mean, deviation = patch_statistics(target)
        target = (target - mean) / deviation
    hidden = ~mask.flatten(1)
    return ((guess - target).square().mean(-1) * hidden).sum() / hidden.sum()
