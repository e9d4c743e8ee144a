"""A step of the HyperCuboid: from one map of each width to the next, all operations of all pairs weighted.

``map'_j = sum_i sum_o weights[i, j, o] op_ijo(map_i)``. `NestedStep` calls each operation by itself and takes
any. The grouped steps compute the same with few large calls: operations that do not exchange anything between
channels (depthwise convolutions, norms, activations, pools) run once for all pairs of widths side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from paperback.errors import DataError
from paperback.search.sharp_darts.operations import POOL_EPS, POOLS, convolution_settings, depthwise, pool

if TYPE_CHECKING:
    from paperback.search.sharp_darts.kits import Kit


class NestedStep(nn.Module):
    """A step of any operations, one call for each.

    Args:
        widths: of the maps.
        operations: names that the kit knows.
        kit: makes the operations.
        stride: of the step.
    """

    def __init__(self, widths: Sequence[int], operations: Sequence[str], kit: Kit, stride: int) -> None:
        super().__init__()
        self.options = [
            (i, j, o) for i in range(len(widths)) for j in range(len(widths)) for o in range(len(operations))
        ]
        self.names = list(operations)
        self.blocks = nn.ModuleList(
            kit.operation(operations[o], widths[i], widths[j], stride, False) for i, j, o in self.options
        )

    def forward(self, maps: Sequence[Tensor], weights: Tensor, least: float = 0.0) -> list[Tensor]:
        """One map for each width.

        Args:
            maps: one for each width.
            weights: ``(widths, widths, operations)``.
            least: what weighs less is not computed, but for the strongest operation of each width out.

        Raises:
            DataError: if operations that are summed differ in shape.
        """
        strongest = weights.amax((0, 2), keepdim=True)
        kept = ((weights >= least) | (weights == strongest)).tolist()
        terms: list[list[Tensor]] = [[] for _ in maps]
        for (i, j, o), block in zip(self.options, self.blocks, strict=True):
            if not kept[i][j][o]:
                continue
            term = block(maps[i])
            if terms[j] and term.shape != terms[j][0].shape:
                raise DataError(
                    f"operation {self.names[o]!r} from width {i} to width {j} gives {tuple(term.shape)} "
                    f"where others give {tuple(terms[j][0].shape)}; all operations of a step must give maps "
                    "of one shape."
                )
            terms[j].append(weights[i, j, o] * term)
        return [torch.stack(own).sum(0) for own in terms]


class GroupedDenseStep(nn.Module):
    """A step of linear layers: one product for each width in, one norm and one contraction for all.

    The outputs of a width in are ordered (operation, width out, channel), so that activations work on slices.

    Args:
        widths: of the maps.
        activations: one for each operation.
    """

    owner: Tensor

    def __init__(self, widths: Sequence[int], activations: Sequence[nn.Module]) -> None:
        super().__init__()
        self.widths, total = list(widths), sum(widths)
        self.activations = nn.ModuleList(activations)
        self.products = nn.ModuleList(
            nn.Linear(width, len(activations) * total, bias=False) for width in widths
        )
        self.norm = nn.BatchNorm1d(len(widths) * len(activations) * total, affine=False)
        self.register_buffer("owner", _owner(widths), persistent=False)

    def forward(self, maps: Sequence[Tensor], weights: Tensor, least: float = 0.0) -> list[Tensor]:
        """One map for each width; nothing is left out, whatever `least` says."""
        h = self.norm(torch.cat([f(m) for f, m in zip(self.products, maps, strict=True)], dim=1))
        h = h.view(len(h), len(maps), len(self.activations), -1)
        h = torch.stack([f(h[:, :, o]) for o, f in enumerate(self.activations)], dim=2)
        per_channel = weights[:, self.owner].transpose(1, 2)  # (width in, operation, channel)
        return list(torch.einsum("bios,ios->bs", h, per_channel).split(self.widths, dim=1))


class GroupedConvolutionStep(nn.Module):
    """A step of SharpSepConvs and pools, all pairs of widths of an operation at once.

    Args:
        widths: of the maps.
        operations: names of primitives, each a pool or a SharpSepConv.
        stride: of the step.
    """

    def __init__(self, widths: Sequence[int], operations: Sequence[str], stride: int) -> None:
        super().__init__()
        self.banks = nn.ModuleList()
        for name in operations:
            if name in POOLS:
                self.banks.append(GroupedPool(widths, name, stride))
            else:
                self.banks.append(GroupedSharpSepConv(widths, stride, **(convolution_settings(name) or {})))

    def forward(self, maps: Sequence[Tensor], weights: Tensor, least: float = 0.0) -> list[Tensor]:
        """One map for each width; nothing is left out, whatever `least` says."""
        parts = [bank(maps, weights[:, :, o]) for o, bank in enumerate(self.banks)]
        return [torch.stack(own).sum(0) if len(own) > 1 else own[0] for own in zip(*parts, strict=True)]


class GroupedSharpSepConv(nn.Module):
    """The SharpSepConvs between all pairs of widths, without affine norms.

    Channels are ordered (width out, width in, channel): what belongs to one width out lies together.

    Args:
        widths: of the maps.
        stride: of the first depthwise convolution.
        kernel: k, odd.
        dilation: of the first depthwise convolution.
        mid_mult: inner width, as a multiple of the width out.
        mid: the same as a number of channels; it takes the place of `mid_mult`.
    """

    def __init__(
        self,
        widths: Sequence[int],
        stride: int,
        kernel: int,
        dilation: int,
        mid_mult: float = 1,
        mid: int | None = None,
    ) -> None:
        super().__init__()
        n, self.widths = len(widths), list(widths)
        self.mids = [int(width * mid_mult) if mid is None else mid for width in widths]
        self.first = depthwise(n * sum(widths), kernel, stride, dilation)
        self.to_mid = nn.ModuleList(Pointwise(1, width, middle) for middle in self.mids for width in widths)
        self.mid_norm = nn.BatchNorm2d(n * sum(self.mids), affine=False)
        self.second = depthwise(n * sum(self.mids), kernel)
        self.to_out = nn.ModuleList(
            Pointwise(n, middle, width) for middle, width in zip(self.mids, widths, strict=True)
        )
        self.out_norm = nn.BatchNorm2d(n * sum(widths), affine=False)

    def forward(self, maps: Sequence[Tensor], weights: Tensor) -> list[Tensor]:
        """For each width out the sum over widths in; `weights` is ``(widths, widths)``."""
        n = len(self.widths)
        x = nn.functional.relu(torch.cat(list(maps), dim=1))
        parts = self.first(x.repeat(1, n, 1, 1)).split(self.widths * n, dim=1)
        x = torch.cat([f(part) for f, part in zip(self.to_mid, parts, strict=True)], dim=1)
        x = self.second(nn.functional.relu(self.mid_norm(x)))
        parts = x.split([n * middle for middle in self.mids], dim=1)
        x = torch.cat([f(part) for f, part in zip(self.to_out, parts, strict=True)], dim=1)
        parts = self.out_norm(x).split([n * width for width in self.widths], dim=1)
        return [
            torch.einsum("bichw,i->bchw", part.unflatten(1, (n, -1)), weights[:, j])
            for j, part in enumerate(parts)
        ]


class Pointwise(nn.Module):
    """Convolutions of 1 x 1, one for each group of channels, as a matrix product.

    On a CPU this takes a half to a tenth of the time of `torch.nn.functional.conv2d`, which rearranges its
    input first.

    Args:
        groups: of channels, each with its own convolution.
        channels_in: of a group.
        channels_out: of a group.
    """

    def __init__(self, groups: int, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(groups, channels_out, channels_in))
        bound = channels_in**-0.5  # torch's initialisation of a convolution
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, groups * channels_in, H, W)`` to ``(batch, groups * channels_out, H, W)``."""
        batch, _, height, width = x.shape
        parts = x.reshape(batch, len(self.weight), -1, height * width)
        return torch.matmul(self.weight, parts).reshape(batch, -1, height, width)


class GroupedPool(nn.Module):
    """The pools between all pairs of widths, each followed by a norm without parameters, as in the search.

    Args:
        widths: of the maps.
        name: "max_pool_3x3" or "avg_pool_3x3".
        stride: of the pool.
    """

    owner: Tensor

    def __init__(self, widths: Sequence[int], name: str, stride: int) -> None:
        super().__init__()
        self.widths, total = list(widths), sum(widths)
        self.pool = pool(name, stride)
        others = [total - width for width in widths]
        # A pool between equal widths has no convolution; the others of a width in share their pooled map.
        self.mixes = nn.ModuleList(
            nn.Sequential(Pointwise(1, width, other), nn.BatchNorm2d(other, eps=POOL_EPS, affine=False))
            if other
            else nn.Identity()
            for width, other in zip(widths, others, strict=True)
        )
        self.norm = nn.BatchNorm2d(len(widths) * total, affine=False)
        self.register_buffer("owner", _owner(widths), persistent=False)

    def forward(self, maps: Sequence[Tensor], weights: Tensor) -> list[Tensor]:
        """For each width out the sum over widths in; `weights` is ``(widths, widths)``."""
        parts: list[Tensor] = []
        for i, (x, mix) in enumerate(zip(maps, self.mixes, strict=True)):
            pooled = self.pool(x)
            if len(maps) == 1:
                parts.append(pooled)
                continue
            others = mix(pooled).split(self.widths[:i] + self.widths[i + 1 :], dim=1)
            parts += [*others[:i], pooled, *others[i:]]
        x = self.norm(torch.cat(parts, dim=1)).unflatten(1, (len(maps), -1))
        return list(torch.einsum("bishw,is->bshw", x, weights[:, self.owner]).split(self.widths, dim=1))


def _owner(widths: Sequence[int]) -> Tensor:
    """For each channel of all maps side by side, which map it belongs to."""
    return torch.arange(len(widths)).repeat_interleave(torch.tensor(list(widths)))
