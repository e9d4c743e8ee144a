"""What a HyperCuboid is made of: the paper's convolutions, layers of a perceptron, or a user's own blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from paperback.errors import DataError
from paperback.search.sharp_darts.operations import POOLS, SharpSepConv, convolution_settings, make_operation
from paperback.search.sharp_darts.steps import GroupedConvolutionStep, GroupedDenseStep

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU, "linear": nn.Identity}


class Kit(Protocol):
    """The blocks of a cuboid. `affine` is False in a search, where norms have no parameters.

    A kit may also have ``grouped_step(widths, operations, stride)``: a module with the function of
    `paperback.search.sharp_darts.steps.NestedStep`, or None for operations that it cannot group.
    """

    def stem(self, width: int, affine: bool) -> nn.Module:
        """From the input to the first map of a width."""

    def operation(self, name: str, width_in: int, width_out: int, stride: int, affine: bool) -> nn.Module:
        """One operation; all those of a step give maps of the same size."""

    def end(self, width: int, affine: bool) -> nn.Module:
        """From the last map of a width to what `head` takes; those of all widths are summed."""

    def head(self) -> nn.Module:
        """From that sum to the output."""


@dataclass(frozen=True)
class ConvolutionKit:
    """The blocks of the paper; operations are the names of `make_operation`.

    Args:
        channels: of the images.
        classes: to tell apart.
        filters: that each width ends in before the classifier.
    """

    channels: int = 3
    classes: int = 10
    filters: int = 768

    def stem(self, width: int, affine: bool) -> nn.Module:
        """A 3 x 3 convolution and batch norm."""
        convolution = nn.Conv2d(self.channels, width, 3, padding=1, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(width, affine=affine))

    def operation(self, name: str, width_in: int, width_out: int, stride: int, affine: bool) -> nn.Module:
        """A primitive; a pool is followed by a batch norm in the search."""
        operation = make_operation(name, width_in, width_out, stride, affine=affine)
        if name in POOLS and not affine:
            return nn.Sequential(operation, nn.BatchNorm2d(width_out, affine=False))
        return operation

    def end(self, width: int, affine: bool) -> nn.Module:
        """A SharpSepConv."""
        return SharpSepConv(width, self.filters, affine=affine)

    def head(self) -> nn.Module:
        """The average over the map, and a linear layer."""
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(self.filters, self.classes))

    def grouped_step(
        self, widths: Sequence[int], operations: Sequence[str], stride: int
    ) -> GroupedConvolutionStep | None:
        """The step, if its operations are pools and SharpSepConvs."""
        if all(name in POOLS or convolution_settings(name) for name in operations):
            return GroupedConvolutionStep(widths, operations, stride)
        return None


@dataclass(frozen=True)
class DenseKit:
    """Layers of a perceptron: linear, batch norm, activation; an operation is named by its activation.

    Args:
        features: of the input.
        classes: to tell apart.
        hidden: what each width ends in before the classifier.
    """

    features: int
    classes: int = 10
    hidden: int = 32

    def stem(self, width: int, affine: bool) -> nn.Module:
        """Linear and batch norm."""
        return _dense(self.features, width, affine)

    def operation(self, name: str, width_in: int, width_out: int, stride: int, affine: bool) -> nn.Module:
        """Linear, batch norm, and "relu", "tanh", "gelu" or "linear"."""
        return nn.Sequential(_dense(width_in, width_out, affine), _activation(name))

    def end(self, width: int, affine: bool) -> nn.Module:
        """Linear and batch norm."""
        return _dense(width, self.hidden, affine)

    def head(self) -> nn.Module:
        """ReLU and a linear layer."""
        return nn.Sequential(nn.ReLU(), nn.Linear(self.hidden, self.classes))

    def grouped_step(self, widths: Sequence[int], operations: Sequence[str], stride: int) -> GroupedDenseStep:
        """The step."""
        return GroupedDenseStep(widths, [_activation(name) for name in operations])


def _activation(name: str) -> nn.Module:
    if name not in ACTIVATIONS:
        raise DataError(f"there is no dense operation {name!r}; use {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[name]()


def _dense(width_in: int, width_out: int, affine: bool) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width_in, width_out, bias=False), nn.BatchNorm1d(width_out, affine=affine))
