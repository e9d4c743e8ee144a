"""A denoising autoencoder: the network restores images from noisy ones with missing pixels.

L = mean |decoder(last map of the encoder(corrupt(x))) - x|^2, where corrupt sets a share of the pixels to 0
(masking noise) and adds Gaussian noise. Source: Vincent et al., Stacked denoising autoencoders, JMLR 2010,
section 3.3; here convolutional and trained as a whole.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperback.errors import DataError, NotSupportedError
from paperback.networks import FeaturePyramid
from paperback.represent.baselines.trained import TrainedEncoder
from paperback.represent.interface import Backbone
from paperback.training import History, seeded


class DenoisingAutoencoder(TrainedEncoder):
    """Features by restoring corrupted images.

    Args:
        backbone: "resnet" or "convnext", see `Encoder`.
        in_channels, image_size, seed: see `Encoder`.
        noise: standard deviation of what is added to pixels in 0..1.
        missing: share of the pixels that become 0, in [0, 1).
        epochs, batch_size, lr, weight_decay: see `TrainedEncoder`.

    Raises:
        DataError: if a setting is out of range.
        NotSupportedError: if the backbone has no feature maps.
    """

    def __init__(
        self,
        backbone: Backbone = "resnet",
        in_channels: int = 1,
        image_size: int = 28,
        noise: float = 0.2,
        missing: float = 0.25,
        epochs: int = 20,
        batch_size: int = 128,
        lr: float = 2e-3,
        weight_decay: float = 0.01,
        seed: int = 0,
    ) -> None:
        super().__init__(backbone, in_channels, image_size, epochs, batch_size, lr, weight_decay, seed)
        if not isinstance(self.backbone, FeaturePyramid):
            raise NotSupportedError(
                f"a {type(self.backbone).__name__} has no feature maps to restore an image from; take the "
                "backbone resnet or convnext, or a MaskedAutoencoder for a vit."
            )
        if noise < 0 or not 0 <= missing < 1:
            raise DataError(f"noise is {noise} and missing {missing}; noise >= 0 and 0 <= missing < 1.")
        self.noise, self.missing = noise, missing

    def _fit(self, images: Tensor, labels: Tensor | None, progress: bool) -> History:
        assert isinstance(self.backbone, FeaturePyramid)
        with seeded(self.seed, "decoder"):
            decoder = make_decoder(self.backbone.dim, self.backbone.stride, self.in_channels)
        model = nn.ModuleDict({"encoder": self.backbone, "decoder": decoder})

        def loss(model: nn.Module, batch: tuple[Tensor, ...], draws: torch.Generator) -> Tensor:
            assert isinstance(self.backbone, FeaturePyramid)
            (clean,) = batch
            corrupted = self.normalise(self.corrupt(clean, draws))
            height, width = clean.shape[2:]
            restored = decoder(self.backbone.feature_maps(corrupted)[-1])[:, :, :height, :width]
            return F.mse_loss(restored, self.normalise(clean))

        return self._train(model, loss, (images,), progress)

    def corrupt(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Images in 0..1 with noise and missing pixels (all channels of a pixel together)."""
        n, _, height, width = images.shape
        there = torch.rand(n, 1, height, width, generator=generator, device=images.device) >= self.missing
        noise = torch.randn(images.shape, generator=generator, device=images.device) * self.noise
        return (images + noise).clamp(0, 1) * there


def make_decoder(dim: int, stride: int, channels: int) -> nn.Sequential:
    """Transposed convolutions from a map of that stride to the image, halving the width each time."""
    layers: list[nn.Module] = []
    for _ in range(int(math.log2(stride))):
        half = max(dim // 2, 8)
        layers += [nn.ConvTranspose2d(dim, half, 4, stride=2, padding=1), nn.BatchNorm2d(half), nn.ReLU()]
        dim = half
    return nn.Sequential(*layers, nn.Conv2d(dim, channels, 3, padding=1))
