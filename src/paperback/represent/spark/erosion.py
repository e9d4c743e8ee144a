"""How far masks blur away: the share of positions that hold something of the image, layer by layer."""

from __future__ import annotations

from contextlib import ExitStack
from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from paperback.represent.spark.backbone import HierarchicalBackbone
from paperback.represent.spark.context import SparseContext


@torch.no_grad()
def active_shares(
    network: nn.Module, images: Float[Tensor, "n c h w"], mask: Bool[Tensor, "n 1 rows columns"]
) -> dict[str, float]:
    """The share of positions that depend on the visible pixels, after each convolution.

    A position counts when its value differs from that of an image without any content, so that what a bias or
    a norm puts everywhere does not count. In a sparse network the share stays 1 - mask_ratio; in a dense one
    each convolution lets the visible patches grow into the hidden ones.

    Args:
        network: with ``feature_maps``, dense or sparse; used in evaluation mode.
        images: normalised.
        mask: True where visible.

    Returns:
        Name of the convolution to share, in the order of the layers.
    """
    context = SparseContext(mask)
    visible = context.hide(images)
    before = network.training
    network.eval()
    with context.on(network):
        seen, empty = (_outputs(network, x) for x in (visible, torch.zeros_like(visible)))
    network.train(before)
    return {name: float((seen[name] != empty[name]).any(1).float().mean()) for name in seen}


def _outputs(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for name, m in network.named_modules():
            if isinstance(m, nn.Conv2d):

                def keep(_m: nn.Module, _in: object, out: Tensor, name: str = name) -> None:
                    found[name] = out

                hooks.callback(m.register_forward_hook(keep).remove)
        cast(HierarchicalBackbone, network).feature_maps(images)
    return found
