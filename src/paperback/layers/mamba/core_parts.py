"""What the cores of a Mamba mixer share: sizes, the convolution with its state, step sizes, costs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paperback.errors import DataError
from paperback.layers.interface import Cost
from paperback.layers.mamba.convolution import causal_convolution, last_inputs

if TYPE_CHECKING:
    from paperback.layers.mamba.core import ScanState

DT_RANGE = (1e-3, 1e-1)
DT_FLOOR = 1e-4
NORM_EPS = 1e-5


def count_heads(d_inner: int, headdim: int, ngroups: int) -> int:
    if headdim < 1 or d_inner % headdim:
        raise DataError(
            f"headdim is {headdim}, and the inner width expand * d_model = {d_inner} is no multiple of it; "
            "choose a headdim that divides the inner width."
        )
    heads = d_inner // headdim
    if ngroups < 1 or heads % ngroups:
        raise DataError(f"ngroups is {ngroups}; it must divide the {heads} heads.")
    return heads


def make_convolution(channels: int, taps: int | None, bias: bool) -> nn.Conv1d | None:
    return None if taps is None else nn.Conv1d(channels, channels, taps, groups=channels, bias=bias)


def cost_of(flops: int, saved: int, like: Tensor) -> Cost:
    return Cost(flops, saved * like.element_size())


def convolution_cost(conv: nn.Conv1d | None, channels: int, length: int) -> Cost:
    """A multiply-add per tap; saved are its input, its output and the activation."""
    if conv is None:
        return Cost(0, 0)
    return cost_of(2 * conv.kernel_size[0] * channels * length, 3 * channels * length, conv.weight)


def attention_cost(length: int, chunk: int, groups: int, heads: int, headdim: int, states: int) -> Cost:
    """Of `decayed_attention` in float32: scores, values, states in and out; saved are their factors."""
    chunk = min(chunk, length)
    inner, chunks = heads * headdim, -(-length // chunk)
    scores = length * chunk
    flops = 2 * scores * (groups * states + inner) + 4 * length * inner * states
    factors = length * (2 * groups * states + 5 * inner) + scores * (groups + 2 * heads)
    return Cost(flops, 4 * (factors + 2 * chunks * inner * states))


def reset_children(core: nn.Module) -> None:
    """Draw what torch's layers draw for themselves."""
    for module in core.children():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.RMSNorm):
            module.reset_parameters()


def resting_step_(dt_bias: Tensor) -> None:
    """softplus⁻¹ of step sizes log-uniform in DT_RANGE (softplus⁻¹(v) = v + log(-expm1(-v)))."""
    low, high = map(math.log, DT_RANGE)
    step = dt_bias.uniform_(low, high).exp().clamp(min=DT_FLOOR)
    dt_bias.copy_(step + (-torch.expm1(-step)).log())


def step_size(projected: Tensor, bias: Tensor) -> Tensor:
    """Δ = softplus(projection + bias) in the precision of the bias, autocast or not."""
    return F.softplus(projected.to(bias.dtype) + bias)


def convolve(
    conv: nn.Conv1d | None, x: Tensor, mask: Tensor | None, reset: Tensor | None, state: ScanState | None
) -> tuple[Tensor, Tensor]:
    """Convolution and activation; returned too is the input with its past in front."""
    if mask is not None:
        x = x * mask[..., None]
    if conv is None:
        return x, x
    past = None if state is None else state.inputs
    y, padded = causal_convolution(x, conv.weight, conv.bias, past, reset)
    return F.silu(y), padded


def next_inputs(conv: nn.Conv1d | None, padded: Tensor, mask: Tensor | None, reset: Tensor | None) -> Tensor:
    """The inputs that the convolution of the next call can see."""
    return last_inputs(padded, 1 if conv is None else conv.kernel_size[0], mask, reset)


def convolve_step(conv: nn.Conv1d | None, x_t: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
    if conv is None:
        return x_t, past
    window = torch.cat([past.to(x_t.dtype), x_t[..., None]], dim=-1)
    y = (window * conv.weight[:, 0]).sum(-1)
    return F.silu(y if conv.bias is None else y + conv.bias).to(x_t.dtype), window[..., 1:]


def no_inputs(conv: nn.Conv1d | None, like: Tensor, batch: int, channels: int | None = None) -> Tensor:
    width = channels if channels is not None else len(like)
    return like.new_zeros(batch, width, 0 if conv is None else conv.kernel_size[0] - 1)
