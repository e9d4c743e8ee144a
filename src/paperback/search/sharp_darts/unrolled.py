"""The second order of DARTS: the gradient of the validation loss through one step of the weights.

The step is ``w' = w - xi (momentum + grad L_train(w) + decay w)``. By the chain rule, with a finite
difference in place of the mixed second derivative, the gradient is
``d/dalpha L_val(w') - xi [d/dalpha L_train(w+) - d/dalpha L_train(w-)] / (2 eps)`` with
``w+- = w +- eps d/dw' L_val(w')`` and ``eps = 0.01 / |d/dw' L_val(w')|`` (DARTS, equations 7 and 8).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

Loss = Callable[[Tensor, Tensor], Tensor]  # of outputs and targets
Rows = tuple[Tensor, Tensor]  # inputs and targets


def unrolled_gradient(
    supernet: nn.Module,
    loss: Loss,
    train: Rows,
    val: Rows,
    *,
    xi: float,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    momenta: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """The gradient of the validation loss after one step of the weights (DARTS, equations 7 and 8).

    Args:
        supernet: with parameters "alphas.*"; it keeps its weights.
        loss: of outputs and targets.
        train: batch of the step.
        val: batch of the validation loss.
        xi: rate of the step.
        momentum: factor of the momenta.
        weight_decay: of the step.
        momenta: of the optimizer, by the names of the weights; none where there are none yet.

    Returns:
        The validation loss after the step, and one gradient for each of the alphas.
    """
    parameters = dict(supernet.named_parameters())
    alphas = {name: p for name, p in parameters.items() if name.startswith("alphas.")}
    weights = {name: p for name, p in parameters.items() if name not in alphas}
    to_alphas = list(alphas.values())

    def at(moved: Mapping[str, Tensor], rows: Rows) -> Tensor:
        return loss(functional_call(supernet, {**alphas, **moved}, (rows[0],)), rows[1])

    def gradient(value: Tensor, places: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Zeros where an operation was skipped."""
        return torch.autograd.grad(value, places, allow_unused=True, materialize_grads=True)

    slopes = gradient(at(weights, train), list(weights.values()))
    ahead = {}
    for (name, weight), slope in zip(weights.items(), slopes, strict=True):
        before = (momenta or {}).get(name)
        move = slope + weight_decay * weight.detach() + (0.0 if before is None else momentum * before)
        ahead[name] = (weight.detach() - xi * move).requires_grad_()
    val_loss = at(ahead, val)
    both = gradient(val_loss, [*to_alphas, *ahead.values()])
    direct, vector = both[: len(to_alphas)], both[len(to_alphas) :]
    eps = 0.01 / torch.stack([v.square().sum() for v in vector]).sum().sqrt().clamp_min(1e-12)
    sides = []
    for sign in (1, -1):
        moved = {n: w.detach() + sign * eps * v for (n, w), v in zip(weights.items(), vector, strict=True)}
        sides.append(gradient(at(moved, train), to_alphas))
    implicit = [(plus - minus) / (2 * eps) for plus, minus in zip(*sides, strict=True)]
    return val_loss.detach(), [d - xi * i for d, i in zip(direct, implicit, strict=True)]
