"""`SparK`: pre-training of a convolutional network by reconstructing the patches that it did not see."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from paperback.data.augment import Views
from paperback.errors import DataError
from paperback.represent.interface import Backbone, Encoder, ImagesOrArray
from paperback.represent.spark.backbone import HierarchicalBackbone, check_backbone, check_maps
from paperback.represent.spark.context import SparseContext
from paperback.represent.spark.conversion import check_active_set, dense_to_sparse
from paperback.represent.spark.decoder import Decoder, Densify
from paperback.represent.spark.lamb import Lamb
from paperback.represent.spark.masking import (
    kept_cells,
    masked_patch_loss,
    patch_statistics,
    patchify,
    random_mask,
    unpatchify,
)
from paperback.training import History, generator, seeded, train


class SparK(Encoder):
    """Masked-image pre-training of a convolutional network, which comes back as an ordinary dense one.

    A share of the patches of each image is hidden. The backbone's sparse twin encodes the rest, maps of all
    scales are filled up with mask tokens, and a light decoder predicts the hidden patches. `fit` needs no
    labels and ignores them.

    Args:
        backbone: "resnet", "convnext", their settings, or a module; see `Encoder` and `HierarchicalBackbone`.
        in_channels: channels of the images.
        image_size: not used; images of any size are taken.
        seed: of everything drawn.
        mask_ratio: share of patches hidden, in (0, 1); the paper has 0.6, and 0.75 for 384 pixels.
        decoder_width: channels of the decoder at the smallest map, a multiple of the stride; that of the last
            map if not given.
        sparse: False hides patches by zeros in a dense network, the ablation "zero-outing": masks blur away,
            and there is no absent position to put a token at.
        hierarchical: False decodes the last map only.
        mask_token: False leaves zeros where the map is absent.
        normalise_target: compare with patches of mean 0 and variance 1.
        pad: put zeros around images whose sides are not multiples of the stride; False refuses them.
        augmentation: preset or settings of `paperback.data.augment`; None for none.
        epochs: passes over the images.
        batch_size: images of a step.
        lr: peak learning rate; the paper's is 2e-4 for each 256 images of a batch, over 1,600 epochs.
        weight_decay: at the first and the last step, along a cosine; biases, norms and tokens have none.
        beta2: decay of the second moment; 0.95 with batch norms and 0.999 without if not given.
        optimizer: "adamw", or "lamb" for batches over 2,048.
        warmup: part of the steps in which the learning rate rises.
        clip_norm: gradients are scaled down to this norm.
        precision: "no" or "bf16"; norms keep their statistics and the loss its sums in float32.

    Attributes:
        encoder_: the dense network; its ``feature_maps`` serve dense tasks, calling it gives pooled features.
        history_: of the training.

    Raises:
        DataError: if an argument is out of range or the backbone has no feature maps.
        NotSupportedError: naming the layers of the backbone that have no sparse twin.

    Source: Tian et al. 2023, algorithm in section 3; recipe in appendix A.
    """

    def __init__(
        self,
        backbone: Backbone = "resnet",
        in_channels: int = 1,
        image_size: int = 28,
        seed: int = 0,
        *,
        mask_ratio: float = 0.6,
        decoder_width: int | None = None,
        sparse: bool = True,
        hierarchical: bool = True,
        mask_token: bool = True,
        normalise_target: bool = True,
        pad: bool = True,
        augmentation: str | Mapping[str, Any] | None = "spark",
        epochs: int = 20,
        batch_size: int = 128,
        lr: float = 2e-3,
        weight_decay: Sequence[float] = (0.04, 0.2),
        beta2: float | None = None,
        optimizer: Literal["adamw", "lamb"] = "adamw",
        warmup: float = 0.1,
        clip_norm: float = 5.0,
        precision: Literal["no", "bf16"] = "no",
    ) -> None:
        super().__init__(backbone, in_channels, image_size, seed)
        check_backbone(self.backbone)
        if not 0 < mask_ratio < 1:
            raise DataError(f"mask_ratio is {mask_ratio}; it must lie between 0 and 1.")
        if optimizer not in ("adamw", "lamb"):
            raise DataError(f'optimizer is {optimizer!r}; it must be "adamw" or "lamb".')
        if precision not in ("no", "bf16"):
            raise DataError(f'precision is {precision!r}; it must be "no" or "bf16".')
        if len(weight_decay) != 2 or min(weight_decay) < 0:
            raise DataError(f"weight_decay is {weight_decay}; give its first and last value, at least 0.")
        self.mask_ratio, self.pad, self.sparse = mask_ratio, pad, sparse
        self.normalise_target = normalise_target
        self.augmentation = None if augmentation is None else Views.of(augmentation).first
        self.epochs, self.batch_size, self.lr, self.warmup = epochs, batch_size, lr, warmup
        self.weight_decay, self.optimizer = (float(weight_decay[0]), float(weight_decay[1])), optimizer
        self.clip_norm, self.precision = clip_norm, precision
        has_batch_norm = any(isinstance(m, _BatchNorm) for m in self.backbone.modules())
        self.beta2 = beta2 if beta2 is not None else 0.95 if has_batch_norm else 0.999
        if sparse:
            dense_to_sparse(
                self.backbone
            )  # refuses layers that it cannot convert, before anything is trained
        backbone_ = self._hierarchy
        width = backbone_.widths[-1] if decoder_width is None else decoder_width
        norm = "batch" if has_batch_norm else "layer"
        with seeded(seed, "decoder"):
            self.decoder = Decoder(backbone_.stride, width, in_channels)
            widths = backbone_.widths[::-1][: len(self.decoder.blocks) if hierarchical else 1]
            self.densify = nn.ModuleList(
                Densify(w, width // 2**i, 3 if i else 1, norm, sparse, mask_token)
                for i, w in enumerate(widths)
            )
        # In channels-last order a position's channels are neighbours in memory: on a CPU convolutions are a
        # third faster so, and the rows of active positions are gathered without a transposition.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def encoder_(self) -> nn.Module:
        """The dense network."""
        return self.backbone

    def normalise(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """Images in 0..1 with zeros around them up to whole patches, then as every encoder normalises.

        Raises:
            DataError: if there are incomplete patches and ``pad`` is False.
        """
        return super().normalise(F.pad(images, self._margins(images)))

    def reconstruct(
        self, images: ImagesOrArray, mask: Tensor | None = None, seed: int = 0
    ) -> tuple[ImagesOrArray, Tensor]:
        """What the network sees in the hidden patches, around the visible ones.

        With normalised targets the network predicts a patch but for its mean and deviation; as in the paper's
        figures these are those of the true patch.

        Args:
            images: as `fit` takes them.
            mask: True where visible, ``(n, 1, rows, columns)`` with one cell for each patch of the (padded)
                images; drawn with `mask_ratio` if not given.
            seed: of that draw.

        Returns:
            Images in 0..1 of the size given, ``(n, c, h, w)`` float32, numpy if the images are; and the mask.

        Raises:
            DataError: if images or mask do not fit.
        """
        x = self._checked(images)
        left, _, top, _ = self._margins(x)
        with torch.no_grad():
            target = self.normalise(x.to(self.mean.device))
            stride = self._hierarchy.stride
            grid: tuple[int, int] = (target.shape[-2] // stride, target.shape[-1] // stride)
            if mask is None:
                mask = random_mask(len(x), grid, self.mask_ratio, generator(seed, "reconstruct"))
            if mask.shape != (len(x), 1, *grid):
                raise DataError(f"mask has shape {tuple(mask.shape)}; give {(len(x), 1, *grid)}.")
            mask = mask.to(target.device)
            guess = self._network().eval()(target, mask)
            if self.normalise_target:
                mean, deviation = patch_statistics(patchify(target, stride))
                guess = unpatchify(patchify(guess, stride) * deviation + mean, stride, grid)
            visible = SparseContext(mask).at(*target.shape[-2:])
            whole = torch.where(visible > 0, target, guess) * self.std + self.mean
        height, width = x.shape[-2:]
        cut = whole[:, :, top : top + height, left : left + width].clamp(0, 1).to(x.device)
        return cast(Any, cut.numpy() if isinstance(images, np.ndarray) else cut), mask

    # -- training --------------------------------------------------------------------------------------------

    def _fit(self, images: Float[Tensor, "n c h w"], labels: Tensor | None, progress: bool) -> History:
        network = self._network()
        grid = self._check_images(images, network)

        def loss(model: nn.Module, batch: tuple[Tensor, ...], draws: torch.Generator) -> Tensor:
            x = batch[0] if self.augmentation is None else self.augmentation(batch[0], draws)
            x = self.normalise(x)
            mask = random_mask(len(x), grid, self.mask_ratio, draws)
            return masked_patch_loss(model(x, mask), x, mask, self.normalise_target)

        history = train(
            network,
            loss,
            images,
            epochs=self.epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            optimizer=self._make_optimizer(self.epochs * math.ceil(len(images) / self.batch_size)),
            schedule="cosine",
            warmup_fraction=self.warmup,
            clip_norm=self.clip_norm,
            seed=self.seed,
            mixed_precision="bf16" if self.precision == "bf16" else None,
            progress=progress,
            description="SparK",
        )
        # Parameters are shared with the sparse twin; buffers are too, unless the twin was moved.
        self.backbone.load_state_dict(network.encoder.state_dict())
        return history

    def _network(self) -> MaskedReconstruction:
        """Encoder, densification and decoder as one module, around this object's weights."""
        encoder = dense_to_sparse(self.backbone) if self.sparse else self.backbone
        return MaskedReconstruction(encoder, self.densify, self.decoder)

    def _check_images(self, images: Tensor, network: MaskedReconstruction) -> tuple[int, int]:
        """The grid of patches; refuses what would fail later."""
        some = self.normalise(images[:2]).repeat(1 if len(images) > 1 else 2, 1, 1, 1)
        stride = self._hierarchy.stride
        grid = (some.shape[-2] // stride, some.shape[-1] // stride)
        keep = kept_cells(grid, self.mask_ratio)
        smallest = min(self.batch_size, len(images) % self.batch_size or self.batch_size)
        if smallest * keep < 2:
            raise DataError(
                f"a batch of {smallest} image(s) with {keep} visible patch(es) leaves a batch norm one "
                "position to take a variance of; take another batch_size or a lower mask_ratio."
            )
        self.eval()  # or the check would count in the running statistics
        network.eval()
        with torch.no_grad():
            check_maps(self._hierarchy.feature_maps(some), self._hierarchy.widths, grid)
        if self.sparse:
            encoder = cast(HierarchicalBackbone, network.encoder)
            check_active_set(network.encoder, encoder.feature_maps, some, stride)
        return grid

    def _make_optimizer(self, steps: int) -> Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]:
        """AdamW or LAMB with a weight decay that follows a cosine, and none for what is one vector."""
        first, last = self.weight_decay

        def make(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
            groups: list[dict[str, Any]] = [{"params": []}, {"params": [], "weight_decay": 0.0}]
            for p in parameters:
                groups[max(p.shape, default=1) == p.numel()]["params"].append(p)
            kind = Lamb if self.optimizer == "lamb" else torch.optim.AdamW
            optimizer = kind(groups, lr=self.lr, betas=(0.9, self.beta2), weight_decay=first)
            done = 0

            def decay(optimizer: torch.optim.Optimizer, *_: Any) -> None:
                nonlocal done
                share = done / max(steps - 1, 1)
                weight = last + (first - last) * (1 + math.cos(math.pi * share)) / 2
                optimizer.param_groups[0]["weight_decay"] = weight
                done += 1

            optimizer.register_step_pre_hook(decay)
            return optimizer

        return make

    @property
    def _hierarchy(self) -> HierarchicalBackbone:
        return cast(HierarchicalBackbone, self.backbone)

    def _margins(self, images: Tensor) -> tuple[int, int, int, int]:
        """Zeros to put left, right, above and below."""
        stride, (height, width) = self._hierarchy.stride, images.shape[-2:]
        down, right = -height % stride, -width % stride
        if (down or right) and not self.pad:
            raise DataError(
                f"images are {height}x{width}, which patches of {stride}x{stride}, the backbone's stride, do "
                "not fill; pass pad=True, crop them, or take a backbone of fewer stages."
            )
        return right // 2, right - right // 2, down // 2, down - down // 2


class MaskedReconstruction(nn.Module):
    """Normalised images and a mask to a reconstruction; the network that is trained."""

    def __init__(self, encoder: nn.Module, densify: nn.ModuleList, decoder: Decoder) -> None:
        super().__init__()
        self.encoder, self.densify, self.decoder = encoder, densify, decoder

    def forward(
        self, images: Float[Tensor, "n c h w"], mask: Bool[Tensor, "n 1 rows columns"]
    ) -> Float[Tensor, "n c h w"]:
        context = SparseContext(mask)
        with context.on(self):
            visible = context.hide(images).contiguous(memory_format=torch.channels_last)
            maps = cast(HierarchicalBackbone, self.encoder).feature_maps(visible)
            filled = [fill(x, context) for fill, x in zip(self.densify, reversed(maps), strict=False)]
        return self.decoder(filled)
