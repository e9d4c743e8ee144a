"""A vision transformer for small images whose tokens can be reached.

An image is cut into patches; each becomes a token by one linear map, plus a learned position. Pre-norm blocks
x <- x + attention(norm(x)), x <- x + mlp(norm(x)) mix them, and features are the class token or the mean of
the patches' tokens after a last norm. A method can keep some patches only (masked autoencoders), and read the
queries, keys and values of any block.

Source: Dosovitskiy et al., An image is worth 16x16 words, ICLR 2021, section 3.1. Positions begin as
two-dimensional sines, as He et al. (Masked autoencoders, 2022) have them, and are learned from there.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from paperback.errors import DataError
from paperback.networks.pyramid import check_images, check_sizes, make_head
from paperback.saving import Saved


class QKV(NamedTuple):
    """Queries, keys and values of a block, each ``(n, heads, tokens, dim / heads)``."""

    q: Tensor
    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class Tokens:
    """What `ViT.tokens` returns.

    Attributes:
        states: ``(n, tokens, dim)`` after the last norm; the class token, where there is one, is the first.
        qkv: by number of the block, what was asked for.
    """

    states: Tensor
    qkv: dict[int, QKV] = field(default_factory=dict)


class ViT(Saved, nn.Module):
    """A vision transformer: images to pooled features, or to logits where classes are given.

    Attributes:
        grid: rows and columns of patches.
        n_patches: number of patches of an image.
        dim: length of tokens and features.
        stride: the side of a patch.
        widths: ``(dim,)``.
    """

    def __init__(
        self,
        image_size: int | Sequence[int] = 28,
        in_channels: int = 1,
        patch: int = 4,
        dim: int = 64,
        depth: int = 4,
        heads: int = 4,
        class_token: bool = False,
        classes: int | None = None,
        mlp_ratio: float = 4.0,
    ) -> None:
        """Draw the weights from torch's global generator (`paperback.training.seeded` fixes it).

        Args:
            image_size: side of the images, or height and width.
            in_channels: channels of the images.
            patch: side of a patch; it divides both sides of the image.
            dim: length of the tokens, a multiple of 4 and of heads.
            depth: number of blocks.
            heads: attention heads of each block.
            class_token: whether features are those of a token of its own; otherwise the mean of the patches'.
            classes: number of logits; None gives pooled features.
            mlp_ratio: width of a block's perceptron, relative to dim.

        Raises:
            DataError: if the numbers do not fit together.
        """
        super().__init__()
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        check_sizes(height=height, width=width, in_channels=in_channels, patch=patch, dim=dim, depth=depth)
        check_sizes(heads=heads, **({} if classes is None else {"classes": classes}))
        if height % patch or width % patch:
            raise DataError(f"patch is {patch}; it must divide both sides of an image of {height}x{width}.")
        if dim % heads or dim % 4:
            raise DataError(f"dim is {dim}; it must be a multiple of 4 and of heads, {heads}.")
        self.image_size, self.in_channels, self.classes = (height, width), in_channels, classes
        self.grid = height // patch, width // patch
        self.n_patches = self.grid[0] * self.grid[1]
        self.dim, self.stride, self.widths = dim, patch, (dim,)
        self.patch_embedding = nn.Conv2d(in_channels, dim, patch, stride=patch)
        self.positions = nn.Parameter(sine_positions(self.grid, dim))
        self.class_token = nn.Parameter(torch.randn(dim) * 0.02) if class_token else None
        self.blocks = nn.ModuleList(Block(dim, heads, round(dim * mlp_ratio)) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = make_head(dim, classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def embed(
        self, images: Float[Tensor, "n c h w"], keep: Int[Tensor, "n k"] | None = None
    ) -> Float[Tensor, "n tokens dim"]:
        """The tokens before the first block: patches with their positions, behind the class token.

        Args:
            images: float ``(n, in_channels, h, w)`` of the network's size.
            keep: the patches of each image that are kept, by number, row by row; all if None.

        Returns:
            The tokens, in the order of `keep`.

        Raises:
            DataError: if images or `keep` do not fit the network.
        """
        check_images(images, self.in_channels)
        if tuple(images.shape[2:]) != self.image_size:
            raise DataError(
                f"images are {images.shape[2]}x{images.shape[3]}; this network was made for "
                f"{self.image_size[0]}x{self.image_size[1]}: resize them or give image_size."
            )
        tokens = self.patch_embedding(images).flatten(2).transpose(1, 2) + self.positions
        if keep is not None:
            tokens = take(tokens, keep)
        if self.class_token is not None:
            tokens = torch.cat([self.class_token.expand(len(tokens), 1, -1), tokens], dim=1)
        return tokens

    def tokens(
        self,
        images: Float[Tensor, "n c h w"],
        keep: Int[Tensor, "n k"] | None = None,
        qkv: Collection[int] = (),
    ) -> Tokens:
        """All tokens after the last block, and the queries, keys and values of chosen blocks.

        Args:
            images: as of `embed`.
            keep: as of `embed`.
            qkv: numbers of blocks, negative ones counted from the end.

        Returns:
            The `Tokens`; its `qkv` has the numbers that were asked for as keys.

        Raises:
            DataError: if images, `keep` or a number of a block do not fit the network.
        """
        depth = len(self.blocks)
        if any(not -depth <= i < depth for i in qkv):
            raise DataError(f"qkv is {sorted(qkv)}; this network has the blocks 0..{depth - 1}.")
        x = self.embed(images, keep)
        wanted, taps = {i % depth for i in qkv}, {}
        for i, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            x, tap = block.with_qkv(x)
            if i in wanted:
                taps[i] = tap
        return Tokens(self.norm(x), {i: taps[i % depth] for i in qkv})

    def features(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n dim"]:
        """The class token, or the mean of the patches' tokens, also of a network that has classes."""
        x = self.embed(images)
        for block in self.blocks:
            x = block(x)
        # The norm acts on each token alone, so of a class token nothing else need be normalised.
        return self.norm(x[:, 0]) if self.class_token is not None else self.norm(x).mean(dim=1)

    def forward(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n out"]:
        """Logits ``(n, classes)``, or features ``(n, dim)`` without classes."""
        return self.head(self.features(images))

    def patchify(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n patches pixels"]:
        """The pixels of each patch, row by row, ``(n, n_patches, patch * patch * in_channels)``."""
        check_images(images, self.in_channels)
        return F.unfold(images, self.stride, stride=self.stride).transpose(1, 2)

    def unpatchify(self, patches: Float[Tensor, "n patches pixels"]) -> Float[Tensor, "n c h w"]:
        """The images of the patches; undoes `patchify`."""
        return F.fold(patches.transpose(1, 2), self.image_size, self.stride, stride=self.stride)


class Block(nn.Module):
    """A pre-norm block: attention, then a perceptron, each added to its input."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attention = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Float[Tensor, "n tokens dim"]) -> Float[Tensor, "n tokens dim"]:
        return self.with_qkv(x)[0]

    def with_qkv(self, x: Float[Tensor, "n tokens dim"]) -> tuple[Tensor, QKV]:
        """The block's output, and its queries, keys and values."""
        qkv = self.attention.project(self.norm1(x))
        x = x + self.attention.attend(qkv)
        return x + self.mlp(self.norm2(x)), qkv


class Attention(nn.Module):
    """Multi-head self-attention in two steps, so that queries, keys and values can be seen in between."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def project(self, x: Float[Tensor, "n tokens dim"]) -> QKV:
        """Queries, keys and values."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return QKV(q, k, v)

    def attend(self, qkv: QKV) -> Float[Tensor, "n tokens dim"]:
        """out(softmax(q k' / sqrt(d)) v), the heads side by side."""
        mixed = F.scaled_dot_product_attention(*qkv)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def forward(self, x: Float[Tensor, "n tokens dim"]) -> Float[Tensor, "n tokens dim"]:
        return self.attend(self.project(x))


def take(tokens: Float[Tensor, "n tokens dim"], keep: Int[Tensor, "n k"]) -> Float[Tensor, "n k dim"]:
    """Each row's tokens of the given numbers.

    Raises:
        DataError: if there are no such tokens.
    """
    n, count = tokens.shape[:2]
    if keep.ndim != 2 or len(keep) != n or keep.is_floating_point():
        raise DataError(
            f"keep is {keep.dtype} of shape {tuple(keep.shape)}; it must hold whole numbers ({n}, kept)."
        )
    if keep.numel() and not 0 <= int(keep.min()) <= int(keep.max()) < count:
        raise DataError(f"keep has numbers outside 0..{count - 1}, the patches that there are.")
    return tokens.gather(1, keep.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def sine_positions(grid: tuple[int, int], dim: int) -> Float[Tensor, "patches dim"]:
    """Sines and cosines of the row and of the column, a quarter of dim each, at wavelengths 2 pi to 2e4 pi.

    Args:
        grid: rows and columns.
        dim: a multiple of 4.
    """
    quarter = dim // 4
    frequencies = torch.exp(-math.log(1e4) * torch.arange(quarter) / quarter)
    rows, columns = torch.meshgrid(*(torch.arange(side).float() for side in grid), indexing="ij")
    angles = [place.flatten()[:, None] * frequencies for place in (rows, columns)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)
