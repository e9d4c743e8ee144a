"""The short causal convolution in front of every scan, with carried inputs, documents and padding.

y_t = bias + Σ_j w_j x_{t-k+1+j}, one filter of k taps per channel. What lies before the first position are
the last k - 1 inputs of the call before, or zeros; no tap reaches over the start of a document.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F


def causal_convolution(
    x: Float[Tensor, "batch length channels"],
    weight: Float[Tensor, "channels 1 taps"],
    bias: Float[Tensor, " channels"] | None,
    past: Float[Tensor, "batch channels taps-1"] | None = None,
    reset: Bool[Tensor, "batch length"] | None = None,
) -> tuple[Float[Tensor, "batch length channels"], Float[Tensor, "batch length+taps-1 channels"]]:
    """Convolve along the length, each channel by itself.

    Args:
        x: input, zero at padded positions.
        weight: filters as `torch.nn.Conv1d` keeps them, the last tap for the present position.
        bias: one number per channel.
        past: the inputs just before x; zeros if not given.
        reset: True where a document starts.

    Returns:
        The output, and x with its past in front (for `last_inputs`).
    """
    batch, length, channels = x.shape
    taps = weight.shape[2]
    before = x.new_zeros(batch, taps - 1, channels) if past is None else past.transpose(1, 2).to(x.dtype)
    padded = torch.cat([before, x], dim=1)
    documents = None if reset is None else document_numbers(reset, taps - 1)
    # A few shifted products: torch.conv1d wants the length last, and two transposed copies cost more.
    y = x.new_zeros(()) if bias is None else bias.to(x.dtype)
    for tap in range(taps):
        shifted = padded[:, tap : tap + length]
        if documents is not None:
            shifted = shifted * (documents[:, tap : tap + length] == documents[:, taps - 1 :])[..., None]
        y = torch.addcmul(y, shifted, weight[:, 0, tap].to(x.dtype))
    return y, padded


def last_inputs(
    padded: Float[Tensor, "batch length+taps-1 channels"],
    taps: int,
    mask: Bool[Tensor, "batch length"] | None,
    reset: Bool[Tensor, "batch length"] | None,
) -> Float[Tensor, "batch channels taps-1"]:
    """The last taps - 1 real inputs of the present document: what the next call's convolution can see.

    Args:
        padded: the inputs with their past in front, as `causal_convolution` returns them.
        taps: taps of the filter.
        mask: True at real positions.
        reset: True where a document starts.
    """
    keep = taps - 1
    total = padded.shape[1]
    if mask is None:
        index = torch.arange(total - keep, total, device=padded.device).expand(len(padded), keep)
    else:  # a stable sort moves the real ones to the end and keeps their order
        real = F.pad(mask, (keep, 0), value=True)
        index = real.to(torch.uint8).argsort(dim=1, stable=True)[:, total - keep :]
    window = padded.take_along_dim(index[..., None], 1)
    if reset is not None:
        documents = document_numbers(reset, keep)
        window = window * (documents.take_along_dim(index, 1) == documents[:, -1:])[..., None]
    return window.transpose(1, 2)


def document_numbers(reset: Bool[Tensor, "batch length"], before: int) -> Tensor:
    """Which document each position belongs to; 0 is the one that the positions before the first belong to."""
    return F.pad(reset.long().cumsum(1), (before, 0))
