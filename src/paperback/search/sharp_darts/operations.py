"""The blocks of the search: SharpSepConv, and what else an edge can be.

DARTS lets a separable convolution of four layers compete with a dilated one of two. SharpSepConv is
one block for both: two separable convolutions with a free width between them, of which the first has
the stride and the dilation. Every operation maps ``(batch, C_in, H, W)`` to ``(batch, C_out, ceil(H/stride),
ceil(W/stride))``. (The reference code's dil_flood_conv_5x5 does not: its padding is 2 and must be 4.)
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from paperback.errors import DataError

PRIMITIVES = (
    "none",
    "max_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "dil_conv_3x3",
    "flood_conv_3x3",
    "dil_flood_conv_3x3",
    "choke_conv_3x3",
    "dil_choke_conv_3x3",
)
DARTS_PRIMITIVES = (
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)
POOLS = ("max_pool_3x3", "avg_pool_3x3")
CONVOLUTION = re.compile(r"(?:(dil)_)?(?:(sep|flood|choke)_)?conv_([357])x\3")
POOL_EPS = 1e-3  # of the batch norm of a pool that changes the number of channels, as in the reference code
FLOOD = 4  # width between the two halves of a flooded block, in multiples of C_out
CHOKE = 32  # and of a choked one, in channels


class SharpSepConv(nn.Module):
    """Two separable convolutions in one block.

    ReLU, depthwise k x k (stride, dilation), pointwise to `mid`, batch norm, ReLU, depthwise k x k, pointwise
    to `channels_out`, batch norm. It has
    ``C_in k^2 + C_in C_mid + C_mid k^2 + C_mid C_out + 2 (C_mid + C_out)`` parameters, less the last term
    without `affine`.

    Args:
        channels_in: channels of the input, >= 1.
        channels_out: channels of the output, >= 1.
        kernel: k, odd.
        stride: of the first depthwise convolution.
        dilation: of the first depthwise convolution.
        mid_mult: width between the two halves, as a multiple of `channels_out`.
        mid: the same as a number of channels; it takes the place of `mid_mult`.
        affine: whether the batch norms have parameters; not during a search.

    Raises:
        DataError: if the kernel is even or a number is less than 1.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel: int = 3,
        stride: int = 1,
        dilation: int = 1,
        *,
        mid_mult: float = 1,
        mid: int | None = None,
        affine: bool = True,
    ) -> None:
        super().__init__()
        width = int(channels_out * mid_mult) if mid is None else mid
        if min(channels_in, channels_out, kernel, stride, dilation, width) < 1:
            raise DataError(
                f"SharpSepConv({channels_in}, {channels_out}, kernel={kernel}, stride={stride}, "
                f"dilation={dilation}) with {width} channels inside: all of these are at least 1."
            )
        if kernel % 2 == 0:
            raise DataError(f"kernel is {kernel}; it must be odd, so that the size of a map is kept.")
        self.layers = nn.Sequential(
            nn.ReLU(),
            depthwise(channels_in, kernel, stride, dilation),
            nn.Conv2d(channels_in, width, 1, bias=False),
            nn.BatchNorm2d(width, affine=affine),
            nn.ReLU(),
            depthwise(width, kernel),
            nn.Conv2d(width, channels_out, 1, bias=False),
            nn.BatchNorm2d(channels_out, affine=affine),
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, C_in, H, W)`` to ``(batch, C_out, H / stride, W / stride)``, rounded up."""
        return self.layers(x)


class SepConv(nn.Module):
    """One separable convolution, the half block that SharpSepConv replaces: ReLU, depthwise, pointwise, norm.

    Args:
        channels_in: channels of the input.
        channels_out: channels of the output.
        kernel: odd.
        stride: of the depthwise convolution.
        dilation: of the depthwise convolution.
        affine: whether the batch norm has parameters.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel: int = 3,
        stride: int = 1,
        dilation: int = 1,
        *,
        affine: bool = True,
    ) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReLU(),
            depthwise(channels_in, kernel, stride, dilation),
            nn.Conv2d(channels_in, channels_out, 1, bias=False),
            nn.BatchNorm2d(channels_out, affine=affine),
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, C_in, H, W)`` to ``(batch, C_out, H / stride, W / stride)``, rounded up."""
        return self.layers(x)


class Zero(nn.Module):
    """The operation that cuts an edge: zeros of the right shape.

    Args:
        channels_out: of the output.
        stride: of the output.
    """

    def __init__(self, channels_out: int, stride: int) -> None:
        super().__init__()
        self.channels_out = channels_out
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, C_out, H / stride, W / stride)`` of zeros."""
        batch, _, height, width = x.shape
        return x.new_zeros(batch, self.channels_out, -(-height // self.stride), -(-width // self.stride))


class FactorizedReduce(nn.Module):
    """Half the size by two pointwise convolutions of stride 2, one a pixel beside the other, side by side.

    Args:
        channels_in: channels of the input.
        channels_out: channels of the output, even.
        affine: whether the batch norm has parameters.

    Raises:
        DataError: if `channels_out` is odd.
    """

    def __init__(self, channels_in: int, channels_out: int, *, affine: bool = True) -> None:
        super().__init__()
        if channels_out % 2:
            raise DataError(f"channels_out is {channels_out}; two halves of equal width need an even number.")
        self.halves = nn.ModuleList(
            nn.Conv2d(channels_in, channels_out // 2, 1, stride=2, bias=False) for _ in range(2)
        )
        self.norm = nn.BatchNorm2d(channels_out, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, C_in, H, W)`` to ``(batch, C_out, H / 2, W / 2)``, rounded up."""
        x = nn.functional.relu(x)
        shifted = nn.functional.pad(x, (0, 1, 0, 1))[:, :, 1:, 1:]
        return self.norm(torch.cat([self.halves[0](x), self.halves[1](shifted)], dim=1))


def relu_conv_norm(channels_in: int, channels_out: int, *, affine: bool = True) -> nn.Sequential:
    """ReLU, pointwise convolution, batch norm: another number of channels at the same size."""
    return nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(channels_in, channels_out, 1, bias=False),
        nn.BatchNorm2d(channels_out, affine=affine),
    )


def make_operation(
    name: str, channels_in: int, channels_out: int, stride: int = 1, *, affine: bool = True
) -> nn.Module:
    """The operation of a primitive's name.

    Args:
        name: "none", "skip_connect", "max_pool_3x3", "avg_pool_3x3", or a SharpSepConv: "sep_conv_KxK",
            "flood_conv_KxK" (4 times as wide inside), "choke_conv_KxK" (32 channels inside), "dil_conv_KxK",
            "dil_flood_conv_KxK", "dil_choke_conv_KxK" (dilation 2); K is 3, 5 or 7.
        channels_in: channels of the input.
        channels_out: channels of the output.
        stride: 1 or 2.
        affine: whether batch norms have parameters.

    Returns:
        The module.

    Raises:
        DataError: if there is no such primitive, or the stride is not 1 or 2.
    """
    if stride not in (1, 2):
        raise DataError(f"stride is {stride}; it must be 1 or 2.")
    if name == "none":
        return Zero(channels_out, stride)
    if name == "skip_connect":
        return _skip(channels_in, channels_out, stride, affine)
    if name in POOLS:
        return _resizable_pool(pool(name, stride), channels_in, channels_out, affine)
    settings = convolution_settings(name)
    if settings is None:
        raise DataError(
            f"there is no primitive {name!r}; use none, skip_connect, max_pool_3x3, avg_pool_3x3, "
            "or sep_conv, flood_conv, choke_conv, dil_conv, dil_flood_conv or dil_choke_conv with _3x3, "
            "_5x5 or _7x7."
        )
    return SharpSepConv(channels_in, channels_out, stride=stride, affine=affine, **settings)


def convolution_settings(name: str) -> dict[str, Any] | None:
    """Kernel, dilation and inner width of the `SharpSepConv` that a primitive is; None if it is another."""
    match = CONVOLUTION.fullmatch(name)
    if match is None or not (match[1] or match[2]):
        return None
    dilated, kind, kernel = match.groups()
    return {
        "kernel": int(kernel),
        "dilation": 2 if dilated else 1,
        "mid_mult": FLOOD if kind == "flood" else 1,
        "mid": CHOKE if kind == "choke" else None,
    }


def depthwise(channels: int, kernel: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    """A convolution of each channel by itself, padded so that the size is kept, but for the stride."""
    padding = dilation * (kernel - 1) // 2
    return nn.Conv2d(channels, channels, kernel, stride, padding, dilation, groups=channels, bias=False)


def pool(name: str, stride: int) -> nn.Module:
    """The pool "max_pool_3x3" or "avg_pool_3x3"."""
    kind = nn.MaxPool2d if name.startswith("max") else nn.AvgPool2d
    return kind(3, stride, padding=1)


def _skip(channels_in: int, channels_out: int, stride: int, affine: bool) -> nn.Module:
    if stride == 2:
        return FactorizedReduce(channels_in, channels_out, affine=affine)
    if channels_in == channels_out:
        return nn.Identity()
    return relu_conv_norm(channels_in, channels_out, affine=affine)


def _resizable_pool(pooled: nn.Module, channels_in: int, channels_out: int, affine: bool) -> nn.Module:
    if channels_in == channels_out:
        return pooled
    mix = nn.Conv2d(channels_in, channels_out, 1, bias=False)
    return nn.Sequential(pooled, mix, nn.BatchNorm2d(channels_out, eps=POOL_EPS, affine=affine))
