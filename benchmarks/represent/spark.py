"""SparK beside the authors' code: the same maps, and seconds of a forward pass and of a training step.

    python benchmarks/represent/spark.py [--reference /path/to/SparK/pretrain]

Three things are measured, with 128 images of 32x32 on one thread, the quickest of many calls:

1. The masked encoder at a ratio of 60 % beside its dense forward pass, in training mode, without gradients.
   Bar: at most 1.15 times as long. Masked encoders run in channels-last order, which is faster; so the dense
   pass is timed in torch's default order, what a user has, and in channels-last order too. In that order
   these narrow networks miss the bar, at 1.1 to 1.3 times: a quarter of the dense pass is batch norm, and
   gathering and putting back rows costs more than normalising fewer of them saves.
2. The feature maps of a ResNet of width 16 beside the peer's, from the same weights and masks. Bar: equal to
   1e-6 of the largest value.
3. A whole training step (forward, loss, backward, AdamW) beside the peer's. Bar: at most 1.0 times as long.

The peer is the algorithm as the authors wrote it, and as `lightly` took it over: masks are expanded anew in
every layer, active rows are gathered by three index tensors, memory is in torch's default order. lightly's
own module is not in any release (its `sparse_spark` is on a branch, with a convolution that masks its output
by the size of its input and so refuses strides; lightly 1.6.0 on PyPI has none). The authors' code is no
package either. So `Peer` below is a transcription of the algorithm; with `--reference`, a checkout of
github.com/keyu-tian/SparK, their own encoder, decoder and loss run as well.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paperback.networks.convnext import ConvNeXt
from paperback.networks.pyramid import FeaturePyramid
from paperback.networks.resnet import ResNet
from paperback.represent.spark import SparK, SparseContext, dense_to_sparse, masked_patch_loss, random_mask

BATCH, SIDE, RATIO, CELLS = 128, 32, 0.6, 4
FORWARD_BAR, MAPS_BAR, STEP_BAR = 1.15, 1e-6, 1.0
NETWORKS: dict[str, Callable[[], FeaturePyramid]] = {
    "ResNet, width 16": lambda: ResNet(1, 16, 3),
    "ResNet, width 32": lambda: ResNet(1, 32, 3),
    "ConvNeXt, width 16": lambda: ConvNeXt(1, 16, 3, 1),
}


class PeerConv2d(nn.Conv2d):
    """Dense, then times the mask, which is expanded here."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y * expanded(y.shape[-1])


class PeerBatchNorm2d(nn.BatchNorm1d):
    """Batch norm of the rows at the active indices."""

    def forward(self, x: Tensor) -> Tensor:
        index = expanded(x.shape[-1])[:, 0].nonzero(as_tuple=True)
        last = x.permute(0, 2, 3, 1)
        y = torch.zeros_like(last)
        y[index] = super().forward(last[index])
        return y.permute(0, 3, 1, 2)


def expanded(side: int) -> Tensor:
    """The mask of the moment at the size of a map."""
    factor = side // Peer.active.shape[-1]
    return Peer.active.repeat_interleave(factor, 2).repeat_interleave(factor, 3)


class Peer(nn.Module):
    """The transcription: the same networks with the peer's layers."""

    active: Tensor

    def __init__(self, model: SparK) -> None:
        super().__init__()
        plain = copy.deepcopy(model).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        self.backbone, self.densify, self.decoder = plain.backbone, plain.densify, plain.decoder
        for part in self.densify:
            part.norm = replaced(part.norm)
        replace_all(self.backbone)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        Peer.active = mask
        maps = self.backbone.feature_maps(x * expanded(x.shape[-1]))
        filled = []
        for part, s in zip(self.densify, reversed(maps), strict=True):
            token = part.token[:, None, None].expand_as(s)
            filled.append(part.project(torch.where(expanded(s.shape[-1]), part.norm(s), token)))
        return self.decoder(filled)


def replaced(layer: nn.Module) -> nn.Module:
    """The peer's layer with the same weights, or the layer itself."""
    if isinstance(layer, nn.Conv2d):
        made: nn.Module = PeerConv2d(
            layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding,
            bias=layer.bias is not None,
        )  # fmt: skip
    elif isinstance(layer, nn.BatchNorm2d):
        made = PeerBatchNorm2d(layer.num_features)
    else:
        return layer
    made.load_state_dict(layer.state_dict())
    return made


def replace_all(network: nn.Module) -> None:
    for name, child in network.named_children():
        setattr(network, name, replaced(child))
        replace_all(child)


class Reference(nn.Module):
    """The authors' own encoder, decoder and loss, from a checkout."""

    def __init__(self, folder: Path, model: SparK) -> None:
        super().__init__()
        encoder, decoder, spark = authors_modules(folder)
        backbone = copy.deepcopy(model.backbone).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        backbone.get_downsample_ratio = lambda: 8
        backbone.get_feature_map_channels = lambda: list(backbone.widths)
        sparse = encoder.SparseEncoder(backbone, SIDE)
        sparse.forward = lambda x: sparse.sp_cnn.feature_maps(x)
        self.spark = spark.SparK(sparse, decoder.LightDecoder(8, backbone.widths[-1], sbn=False), RATIO)
        # Their decoder ends in three channels, ours in those of the images.
        self.spark.dense_decoder.proj = nn.Conv2d(backbone.widths[-1] // 8, 1, 1)
        self.maps = sparse

    def loss(self, x: Tensor, mask: Tensor) -> Tensor:
        found: Tensor = self.spark(x, mask)
        return found


def authors_modules(folder: Path) -> list[Any]:
    """Their modules, with stand-ins for the two helpers that they import from elsewhere."""
    layers, misc = types.ModuleType("timm.models.layers"), types.ModuleType("utils.misc")
    layers.trunc_normal_, layers.DropPath = nn.init.trunc_normal_, nn.Identity  # type: ignore[attr-defined]
    misc.is_pow2n = lambda x: x > 0 and x & (x - 1) == 0  # type: ignore[attr-defined]
    sys.modules |= {name: types.ModuleType(name) for name in ("timm", "timm.models", "utils")}
    sys.modules |= {"timm.models.layers": layers, "utils.misc": misc}
    sys.path.insert(0, str(folder))
    return [importlib.import_module(name) for name in ("encoder", "decoder", "spark")]


def alternately(*functions: Callable[[], object], rounds: int = 40) -> list[float]:
    """Seconds of the quickest call of each function; in turns, as the machine may be busy."""
    quickest = [float("inf")] * len(functions)
    for _ in range(rounds):
        for i, function in enumerate(functions):
            start = time.perf_counter()
            function()
            quickest[i] = min(quickest[i], time.perf_counter() - start)
    return quickest


def verdict(value: float, bar: float) -> str:
    return f"(bar: {bar:g}, {'reached' if value <= bar else 'MISSED'})"


def forward_pass(name: str, make: Callable[[], FeaturePyramid], x: Tensor, mask: Tensor) -> None:
    """The masked encoder beside the dense one, in torch's default order and in its own."""
    torch.manual_seed(0)
    default = make().train()
    dense = copy.deepcopy(default).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    sparse = dense_to_sparse(dense)
    images = x.contiguous(memory_format=torch.channels_last)

    def masked() -> None:
        context = SparseContext(mask)  # made anew, as in training
        with context.on(sparse):
            sparse.feature_maps(context.hide(images))

    with torch.no_grad():
        seconds = alternately(
            lambda: default.feature_maps(x), lambda: dense.feature_maps(images), masked, rounds=100
        )
    print(
        f"{name:18} dense {1e3 * seconds[0]:5.1f} ms, in channels-last order {1e3 * seconds[1]:5.1f} ms, "
        f"masked {1e3 * seconds[2]:5.1f} ms"
    )
    for against, beside in zip(("default order", "channels-last"), seconds[:2], strict=True):
        ratio = seconds[2] / beside
        print(f"{'':18} masked over dense, {against}: {ratio:.2f} {verdict(ratio, FORWARD_BAR)}")


def stepper(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def beside(name: str, model: SparK, peer: nn.Module, peer_maps: Callable[[], list[Tensor]],
           peer_loss: Callable[[], Tensor], x: Tensor, mask: Tensor) -> None:  # fmt: skip
    """Maps and steps of both."""
    network = model._network().train()
    context = SparseContext(mask)
    with torch.no_grad(), context.on(network):
        ours = network.encoder.feature_maps(context.hide(x).contiguous(memory_format=torch.channels_last))
        theirs = peer_maps()
    worst = max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
    scale = max(float(a.abs().max()) for a in ours)
    print(
        f"{name}: maps equal to {worst / scale:.1e} of the largest value {verdict(worst / scale, MAPS_BAR)}"
    )
    seconds = alternately(
        stepper(network, lambda: masked_patch_loss(network(x, mask), x, mask)), stepper(peer, peer_loss)
    )
    ratio = seconds[0] / seconds[1]
    print(f"{name}: step {1e3 * seconds[0]:.1f} ms, the peer's {1e3 * seconds[1]:.1f} ms: ", end="")
    print(f"{ratio:.2f} times {verdict(ratio, STEP_BAR)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--reference", type=Path, help="the folder pretrain of a checkout of keyu-tian/SparK")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, 1, SIDE, SIDE, generator=draws)
    mask = random_mask(BATCH, (CELLS, CELLS), RATIO, draws)
    for name, make in NETWORKS.items():
        forward_pass(name, make, x, mask)
    print("lightly: not run; no release has its sparse_spark (see the docstring).")

    model = SparK()
    peer = Peer(model).train()

    def peer_maps() -> list[Tensor]:
        Peer.active = mask
        maps: list[Tensor] = peer.backbone.feature_maps(x * expanded(SIDE))
        return maps

    beside("transcription", model, peer, peer_maps,
           lambda: masked_patch_loss(peer(x, mask), x, mask), x, mask)  # fmt: skip
    if arguments.reference is None:
        print("the authors' code: not run; give its folder with --reference.")
        return
    model = SparK()
    reference = Reference(arguments.reference, model).train()

    def reference_maps() -> list[Tensor]:
        sys.modules["encoder"]._cur_active = mask  # type: ignore[attr-defined]
        up = mask.repeat_interleave(8, 2).repeat_interleave(8, 3)
        maps: list[Tensor] = reference.maps(x * up)
        return maps

    beside("the authors' code", model, reference, reference_maps, lambda: reference.loss(x, mask), x, mask)


if __name__ == "__main__":
    main()
