"""A target network that follows a trained one: an exponential moving average of its weights."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn


class MomentumCopy(nn.Module):
    """A copy of a module that is not trained; each `follow` moves it towards the original.

    Its momentum rises from `start` to `end` along half a cosine over the training (BYOL, equation 2 and
    section 3.3). Batch normalisation in it uses its own batches, as in the reference codes.
    """

    step: Tensor

    def __init__(self, original: nn.Module, start: float, end: float, total_steps: int) -> None:
        super().__init__()
        self.module = copy.deepcopy(original).requires_grad_(False)
        self.start, self.end, self.total_steps = start, end, total_steps
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def momentum(self) -> float:
        """The share of the old weights in the next step."""
        progress = min(int(self.step) / self.total_steps, 1.0)
        return self.end - (self.end - self.start) * (1 + math.cos(math.pi * progress)) / 2

    @torch.no_grad()
    def follow(self, original: nn.Module) -> None:
        """Move towards the original's weights; its buffers are left to this module's own forward passes."""
        mine, theirs = ([p.detach() for p in network.parameters()] for network in (self.module, original))
        torch._foreach_lerp_(mine, theirs, 1 - self.momentum())
        self.step += 1

    @torch.no_grad()
    def forward(self, *inputs: Tensor) -> Tensor:
        """The copy's output, without gradients."""
        output: Tensor = self.module(*inputs)
        return output
