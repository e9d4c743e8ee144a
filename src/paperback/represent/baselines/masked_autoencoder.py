"""A masked autoencoder: a vision transformer sees a quarter of the patches and restores the others.

The encoder sees the visible patches alone. A small decoder gets their tokens, and a learned token with its
position for each hidden patch, and predicts the pixels there; a patch's target has mean 0 and variance 1, and
only hidden patches count. Source: He et al., Masked autoencoders are scalable vision learners, CVPR 2022,
section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from paperback.errors import DataError, NotSupportedError
from paperback.networks import ViT
from paperback.networks.vit import Block, sine_positions
from paperback.represent.baselines.trained import TrainedEncoder
from paperback.represent.interface import Backbone
from paperback.training import History, seeded


class MaskedAutoencoder(TrainedEncoder):
    """Features by restoring hidden patches.

    Args:
        backbone: "vit" or a `ViT` (with its arguments), see `Encoder`.
        in_channels, image_size, seed: see `Encoder`.
        mask_ratio: share of the patches that are hidden, in (0, 1).
        decoder_dim: length of the decoder's tokens, a multiple of 4 and of its 4 heads.
        decoder_depth: number of its blocks.
        epochs, batch_size, lr, weight_decay: see `TrainedEncoder`.

    Raises:
        DataError: if a setting is out of range.
        NotSupportedError: if the backbone is no `ViT`.
    """

    def __init__(
        self,
        backbone: Backbone = "vit",
        in_channels: int = 1,
        image_size: int = 28,
        mask_ratio: float = 0.67,
        decoder_dim: int = 48,
        decoder_depth: int = 1,
        epochs: int = 40,
        batch_size: int = 128,
        lr: float = 2e-3,
        weight_decay: float = 0.05,
        seed: int = 0,
    ) -> None:
        super().__init__(backbone, in_channels, image_size, epochs, batch_size, lr, weight_decay, seed)
        if not isinstance(self.backbone, ViT):
            raise NotSupportedError(
                f"a {type(self.backbone).__name__} cannot leave patches out; take the backbone vit, or SparK "
                "for a convolutional network."
            )
        patches = self.backbone.n_patches
        self.visible = round(patches * (1 - mask_ratio))
        if not 0 < mask_ratio < 1 or not 0 < self.visible < patches:
            raise DataError(
                f"mask_ratio is {mask_ratio}; some of the {patches} patches must be visible and some hidden."
            )
        if decoder_depth < 1 or decoder_dim < 4 or decoder_dim % 4:
            raise DataError(
                f"decoder_dim is {decoder_dim} and decoder_depth {decoder_depth}; the first must be a "
                "multiple of 4, the second at least 1."
            )
        self.decoder_dim, self.decoder_depth = decoder_dim, decoder_depth

    def _fit(self, images: Tensor, labels: Tensor | None, progress: bool) -> History:
        assert isinstance(self.backbone, ViT)
        with seeded(self.seed, "decoder"):
            decoder = Decoder(self.backbone, self.decoder_dim, self.decoder_depth)
        model = nn.ModuleDict({"encoder": self.backbone, "decoder": decoder})

        def loss(model: nn.Module, batch: tuple[Tensor, ...], draws: torch.Generator) -> Tensor:
            x = self.normalise(batch[0])
            return restoration_loss(self.backbone, decoder, x, self.draw_visible(len(x), draws))

        return self._train(model, loss, (images,), progress)

    def draw_visible(self, n: int, generator: torch.Generator) -> Tensor:
        """The numbers of the visible patches of n images, ``(n, visible)``, drawn without replacement."""
        assert isinstance(self.backbone, ViT)
        order = torch.rand(n, self.backbone.n_patches, generator=generator, device=generator.device)
        return order.argsort(1)[:, : self.visible]


class Decoder(nn.Module):
    """From the tokens of visible patches to the pixels of all."""

    def __init__(self, encoder: ViT, dim: int, depth: int) -> None:
        super().__init__()
        pixels = encoder.stride**2 * encoder.in_channels
        self.inward = nn.Linear(encoder.dim, dim)
        self.mask_token = nn.Parameter(torch.randn(dim) * 0.02)
        self.positions = nn.Parameter(sine_positions(encoder.grid, dim))
        self.blocks = nn.Sequential(*(Block(dim, 4, 4 * dim) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.outward = nn.Linear(dim, pixels)

    def forward(self, states: Tensor, keep: Tensor) -> Tensor:
        """Pixels ``(n, patches, pixels)`` from states ``(n, kept, dim)`` of the patches in `keep`."""
        tokens = self.mask_token.expand(len(states), len(self.positions), -1)
        index = keep.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])
        tokens = tokens.scatter(1, index, self.inward(states)) + self.positions
        pixels: Tensor = self.outward(self.norm(self.blocks(tokens)))
        return pixels


def restoration_loss(encoder: nn.Module, decoder: nn.Module, images: Tensor, keep: Tensor) -> Tensor:
    """Mean squared error over the hidden patches, whose targets have mean 0 and variance 1.

    Args:
        encoder: a `ViT`.
        decoder: a `Decoder` for it.
        images: normalised, ``(n, c, h, w)``.
        keep: numbers of the visible patches, ``(n, visible)``.
    """
    assert isinstance(encoder, ViT)
    states = encoder.tokens(images, keep).states
    if encoder.class_token is not None:
        states = states[:, 1:]
    pixels = encoder.patchify(images)
    var, mean = torch.var_mean(pixels, dim=-1, keepdim=True)
    target = (pixels - mean) / (var + 1e-6).sqrt()
    hidden = torch.ones(target.shape[:2], dtype=torch.bool, device=images.device).scatter(1, keep, False)
    errors = (decoder(states, keep) - target).square().mean(-1)
    return errors[hidden].mean()
