"""Sparse twins of the layers of convolutional networks: what is masked is absent, not zero.

Each twin has the weights, settings and state-dict names of its dense layer. With A the mask at the size of
the layer's map:

- convolution, pooling, linear: the dense layer, then y * A, so that the active set neither grows nor shrinks
  (submanifold sparse convolution);
- batch norm: the active positions as the rows of a matrix (N_active, C), normalised with the statistics of
  these rows alone, and put back; zeros elsewhere;
- layer norm: per position over channels, zeros elsewhere; group and instance norm: mean and variance over the
  active positions of each image;
- global average pooling: the mean over active positions.

Max pooling sees zeros where nothing is, as in the authors' code: beside a masked patch a negative maximum
becomes 0. After a ReLU there are none.

Source: Tian et al. 2023, section 3.2; Graham and van der Maaten 2017 (submanifold convolution).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from paperback.errors import NotSupportedError
from paperback.networks.pyramid import LayerNorm2d
from paperback.represent.spark.context import Slot, SparseContext


class Sparse(nn.Module):
    """What all twins have: a slot in which `SparseContext.on` puts the mask of a forward pass."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.slot = Slot()

    @property
    def context(self) -> SparseContext:
        """The context of this thread.

        Raises:
            NotSupportedError: outside of a context.
        """
        context = self.slot.context
        if context is None:
            raise NotSupportedError(
                f"{type(self).__name__} needs to know which positions are active; run the network inside "
                "`with SparseContext(mask).on(network):`, or make it dense with sparse_to_dense."
            )
        return context


# -- behaviours, for any class of layer ----------------------------------------------------------------------


class MaskedOutput(Sparse):
    """The dense layer, then zeros at inactive positions. The layer must not need its output for gradients."""

    def forward(self, x: Tensor) -> Tensor:
        context, y = self.context, super().forward(x)
        size = y.shape[-2:]
        return y.mul_(context.at(*size)) if context.has_positions(*size) else y


class MaskedActivation(Sparse):
    """A function with f(0) != 0, position by position, then zeros at inactive positions."""

    def forward(self, x: Tensor) -> Tensor:
        context, y = self.context, super().forward(x)
        size = y.shape[-2:]
        return y * context.at(*size) if y.ndim == 4 and context.has_positions(*size) else y


class MaskedChannelsLast(Sparse):
    """A layer on ``(n, h, w, channels)``, then zeros at inactive positions; rows ``(n, channels)`` pass."""

    def forward(self, x: Tensor) -> Tensor:
        context, y = self.context, super().forward(x)
        if y.ndim == 2:
            return y
        if y.ndim != 4:
            raise NotSupportedError(
                f"{type(self).__name__} got {x.ndim} dimensions; sparse layers take maps of 4, or rows."
            )
        size = y.shape[1:3]
        if not context.has_positions(*size):
            return y
        return y * context.at(*size).permute(0, 2, 3, 1)


class ActiveConvolution(MaskedOutput):
    """As `MaskedOutput`; a 1x1 convolution is computed at the active positions alone."""

    def forward(self, x: Tensor) -> Tensor:
        layer = cast(nn.Conv2d, self)
        # A class derived from Conv2d may do more in its forward pass, so it keeps that.
        plain = type(self) is SparseConv2d and layer.groups == 1 and layer.padding == (0, 0)
        pointwise = plain and layer.kernel_size == layer.stride == (1, 1)
        if not pointwise or not self.context.is_sparse_at(x):
            return super().forward(x)
        rows = nn.functional.linear(active_rows(x, self.context), layer.weight.flatten(1), layer.bias)
        return put_back(rows, x.shape, self.context)


class ActiveNorm(Sparse):
    """Batch norm of the active positions, gathered as rows.

    Where its input is the output of a convolution that nothing else reads (`dense_to_sparse` finds out), the
    rows go back into that map, which is 0 elsewhere already; a new map of zeros costs more than the norm.
    """

    owns_input = False

    def forward(self, x: Tensor) -> Tensor:
        context = self.context
        if not context.is_sparse_at(x):
            return super().forward(x)
        rows = active_rows(x, context)[:, :, None, None]  # the form of a matrix (N_active, C) that it takes
        y = super().forward(rows).flatten(1)
        if self.owns_input and y.dtype == x.dtype and x.is_contiguous(memory_format=torch.channels_last):
            inside: Tensor = Overwrite.apply(x, y, context.runs(*x.shape[-2:]), context.mask.shape[-1])
            return inside
        return put_back(y, x.shape, context)


class ActivePixels(Sparse):
    """Group and instance norm with the statistics of the active positions of each image."""

    def forward(self, x: Tensor) -> Tensor:
        context = self.context
        n, channels, height, width = x.shape
        if not context.has_positions(height, width):
            return super().forward(x)
        # An instance norm is a group norm with one channel in each group.
        groups = getattr(self, "num_groups", channels)
        mask = context.at(height, width)
        inside = mask[:, :, None]  # (n, 1, 1, h, w)
        z = x.reshape(n, groups, channels // groups, height, width)
        count = (mask.sum((1, 2, 3)) * (channels // groups)).clamp(min=1).view(n, 1, 1, 1, 1)
        centred = (z - z.sum((2, 3, 4), keepdim=True) / count) * inside  # z is 0 where it is not active
        variance = centred.square().sum((2, 3, 4), keepdim=True) / count
        y = (centred * (variance + cast(float, self.eps)).rsqrt()).reshape(x.shape)
        weight, bias = cast(Tensor | None, self.weight), cast(Tensor, self.bias)
        return y if weight is None else y * weight[:, None, None] + bias[:, None, None] * mask


class ActiveMean(Sparse):
    """Global average pooling over the active positions."""

    def forward(self, x: Tensor) -> Tensor:
        context = self.context
        if not context.has_positions(*x.shape[-2:]):
            return super().forward(x)
        count = context.at(*x.shape[-2:]).sum((2, 3), keepdim=True).clamp(min=1)
        return x.sum((2, 3), keepdim=True) / count


class LayerNormOfMaps(Sparse):
    """Layer norm over the channels, which come first or last, then zeros at inactive positions."""

    def forward(self, x: Tensor) -> Tensor:
        context, y = self.context, super().forward(x)
        if y.ndim == 2:
            return y
        first = channels_first(self)
        size = y.shape[2:] if first else y.shape[1:3]
        if not context.has_positions(*size):
            return y
        mask = context.at(*size)
        return y * (mask if first else mask.permute(0, 2, 3, 1))


def channels_first(norm: nn.Module) -> bool:
    """Whether a layer norm takes ``(n, channels, h, w)``; torch's own never does, others say so."""
    layout = getattr(norm, "data_format", None)
    return layout == "channels_first" if layout is not None else "2d" in type(norm).__name__


# -- the twins of torch's own layers -------------------------------------------------------------------------


class SparseConv2d(ActiveConvolution, nn.Conv2d):
    """Submanifold sparse convolution."""


class SparseMaxPool2d(MaskedOutput, nn.MaxPool2d):
    """Max pooling of which only the active positions remain."""


class SparseAvgPool2d(MaskedOutput, nn.AvgPool2d):
    """Average pooling of which only the active positions remain."""


class SparseAdaptiveAvgPool2d(ActiveMean, nn.AdaptiveAvgPool2d):
    """Global average pooling over the active positions."""


class SparseBatchNorm2d(ActiveNorm, nn.BatchNorm2d):
    """Batch norm whose batch and running statistics are those of the active positions."""


class SparseSyncBatchNorm(ActiveNorm, nn.SyncBatchNorm):
    """The same over all processes of a distributed training."""


class SparseLayerNorm(LayerNormOfMaps, nn.LayerNorm):
    """Layer norm of maps ``(n, h, w, channels)``."""


class SparseLayerNorm2d(LayerNormOfMaps, LayerNorm2d):
    """Layer norm over the channels of maps ``(n, channels, h, w)``."""


class SparseGroupNorm(ActivePixels, nn.GroupNorm):
    """Group norm over the active positions of each image."""


class SparseInstanceNorm2d(ActivePixels, nn.InstanceNorm2d):
    """Instance norm over the active positions of each image."""


class SparseLinear(MaskedChannelsLast, nn.Linear):
    """A linear layer on the channels of maps ``(n, h, w, channels)``."""


# -- gathering and putting back ------------------------------------------------------------------------------


def active_rows(x: Tensor, context: SparseContext) -> Tensor:
    """The active positions of a map, ``(N_active, channels)``; run by run, as a run lies in one piece."""
    n, channels, height, width = x.shape
    table = x.permute(0, 2, 3, 1).reshape(n * height * context.mask.shape[-1], -1)
    found: Tensor = Gather.apply(table, context.runs(height, width))
    return found.view(-1, channels)


def put_back(rows: Tensor, shape: torch.Size, context: SparseContext) -> Tensor:
    """Rows at the active positions of a map of that shape (its channels may be others), zeros elsewhere."""
    n, _, height, width = shape
    runs = context.runs(height, width)
    table: Tensor = Scatter.apply(rows.reshape(len(runs), -1), runs, n * height * context.mask.shape[-1])
    return table.view(n, height, width, rows.shape[1]).permute(0, 3, 1, 2)


class Gather(torch.autograd.Function):
    """Rows at unique indices. torch's own backward adds up; with unique indices a copy does."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = len(table)
        return table.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return grad.new_zeros(ctx.rows, grad.shape[1]).index_copy_(0, index, grad.contiguous()), None


class Scatter(torch.autograd.Function):
    """Rows put at unique indices of a table of zeros."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, length: int) -> Tensor:
        ctx.save_for_backward(index)
        return rows.new_zeros(length, rows.shape[1]).index_copy_(0, index, rows.contiguous())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return grad.index_select(0, index), None, None


class Overwrite(torch.autograd.Function):
    """Rows put at unique indices of a map in channels-last order, in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, index: Tensor, columns: int) -> Tensor:
        n, _, height, _ = x.shape
        table = x.permute(0, 2, 3, 1).view(n * height * columns, -1)
        table.index_copy_(0, index, rows.reshape(len(index), -1))
        ctx.save_for_backward(index)
        ctx.shape = (len(table), rows.shape)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None, None]:
        (index,) = ctx.saved_tensors
        length, shape = ctx.shape
        table = grad.permute(0, 2, 3, 1).reshape(length, -1)
        return None, table.index_select(0, index).view(shape), None, None
