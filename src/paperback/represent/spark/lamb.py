"""LAMB: Adam whose step for each layer is as long as its weights, for batches of thousands of images.

r = m / (sqrt(v) + eps) + decay * w,    w <- w - lr * (|w| / |r|) * r

with bias-corrected moments m and v, and the ratio of norms 1 where one of them is 0 or where there is no
weight decay (norms, biases, tokens). Source: You et al. 2020, Large batch optimization for deep learning,
algorithm 2; torch has none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Lamb(torch.optim.Optimizer):
    """The optimizer of the paper's pre-training.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled, inside of the step that is scaled.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; ``closure``, if given, is called first and its loss returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, group)
        return loss

    def _update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["step"] = 0
            state["mean"], state["square"] = torch.zeros_like(p), torch.zeros_like(p)
        state["step"] += 1
        first, second = group["betas"]
        mean = state["mean"].lerp_(grad, 1 - first)
        square = state["square"].lerp_(grad.square(), 1 - second)
        root = (square / (1 - second ** state["step"])).sqrt_().add_(group["eps"])
        update = (mean / (1 - first ** state["step"])).div_(root)
        ratio = 1.0
        if group["weight_decay"] > 0:
            update.add_(p, alpha=group["weight_decay"])
            weights, length = p.norm(), update.norm()
            ratio = float(weights / length) if weights > 0 and length > 0 else 1.0
        p.add_(update, alpha=-group["lr"] * ratio)
