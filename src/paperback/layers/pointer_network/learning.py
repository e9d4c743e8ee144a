"""How a pointer network learns: from outputs that are given, or from a cost alone.

With outputs, teacher forcing: all steps of the decoder are one call of the LSTM, and pointing is one tensor
operation. Without, REINFORCE with a greedy rollout for a baseline (Kool, van Hoof and Welling, 2019): an
output is drawn, and made more probable by how much cheaper it is than the greedy output of the best network
so far,

    gradient = mean of (cost(drawn) - cost(greedy)) * grad log p(drawn)
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from paperback.errors import DataError
from paperback.layers.pointer_network.checks import PAD, STOP
from paperback.layers.pointer_network.decoding import Constraint, constrain, resolve, sample
from paperback.training import History, generator, train

if TYPE_CHECKING:
    from paperback.layers.pointer_network.model import PointerNetwork

# Draws a batch: (size, generator) -> (points, targets) or (points, targets, lengths).
Sampler = Callable[[int, torch.Generator], tuple[Tensor, ...]]
Source = Sampler | tuple[Tensor, ...]

MOST_EPOCHS = 20  # of a training without end: how often the history has an entry
JUDGED = 1000  # inputs that decide whether the baseline of REINFORCE is replaced
SIGNIFICANT = 0.05


def fit(
    model: PointerNetwork, source: Source, steps: int, lr: float, batch_size: int, clip: float | None,
    seed: int, progress: bool, **training: Any,
) -> History:  # fmt: skip
    """Learn from inputs with their outputs, by Adam with a cosine schedule after a short warm-up.

    Args:
        model: the network.
        source: a function ``(size, generator) -> (points, targets, lengths)`` that draws a fresh batch for
            each step, such as ``lambda size, g: hull_batch((5, 10), size, g)``; or tensors ``(points,
            targets)`` or ``(points, targets, lengths)``, which are gone through again and again.
        steps: of the optimizer. With tensors, whole passes are made: at least so many steps.
        lr: peak learning rate.
        batch_size: inputs of a step.
        clip: largest norm of the gradient.
        seed: of the draws and of the order.
        progress: show a progress bar.
        **training: other settings of `paperback.training.train`. ``optimizer="sgd", lr=1.0,
            schedule="constant"`` is the paper's.

    Returns:
        The course of the training, one entry for each pass (20 at most, of a sampler).

    Raises:
        DataError: if an argument is out of range, or a batch does not fit the model.
    """
    if steps < 1:
        raise DataError(f"steps is {steps}; it must be at least 1.")
    if callable(source):
        rows, epochs = _endless(steps, batch_size)
        tensors: tuple[Tensor, ...] = (rows,)
    else:
        tensors = tuple(source)
        if len(tensors) not in (2, 3):
            raise DataError(
                f"the data are {len(tensors)} tensors; give points, targets and, if any, lengths."
            )
        epochs = -(-steps // -(-len(tensors[0]) // batch_size))

    def loss(module: PointerNetwork, batch: tuple[Tensor, ...], draws: torch.Generator) -> Tensor:
        device = module.go.device
        drawn = tuple(t.to(device) for t in source(len(batch[0]), draws)) if callable(source) else batch
        return module.loss(*drawn)

    settings: dict[str, Any] = {
        "schedule": "cosine",
        "warmup_fraction": 0.05,
        "description": "pointer network",
    } | training
    return train(
        model, loss, tensors, epochs=epochs, batch_size=batch_size, lr=lr, clip_norm=clip, seed=seed,
        progress=progress, **settings,
    )  # fmt: skip


def _endless(steps: int, batch_size: int) -> tuple[Tensor, int]:
    """Rows that stand for fresh draws, and the number of passes over them: exactly `steps` in all."""
    epochs = max(e for e in range(1, MOST_EPOCHS + 1) if steps % e == 0)
    return torch.zeros(steps // epochs * batch_size), epochs


# -- without outputs -----------------------------------------------------------------------------------------


def reinforce(
    model: PointerNetwork,
    sampler: Callable[[int, torch.Generator], tuple[Tensor, Tensor]],
    cost: Callable[[Tensor, Tensor], Tensor],
    steps: int,
    constraint: Constraint | Literal["permutation", "triangles"] | None = "permutation",
    lr: float = 1e-3,
    batch_size: int = 128,
    clip: float | None = 2.0,
    seed: int = 0,
    progress: bool = True,
    **training: Any,
) -> History:
    """Learn from a cost of outputs, where no right output is known.

    Args:
        model: the network.
        sampler: ``(size, generator) -> (points, lengths)``.
        cost: ``(points, order) -> (batch,)``, lower is better; `order` holds indices from 0, -1 after the
            last, as `tour_length` takes it.
        steps: of the optimizer.
        constraint: which outputs are allowed, in training as in decoding.
        lr: peak learning rate.
        batch_size: inputs of a step.
        clip: largest norm of the gradient.
        seed: of all draws.
        progress: show a progress bar.
        **training: other settings of `paperback.training.train`.

    Returns:
        The course of the training; ``terms["cost"]`` is the mean cost of drawn outputs.

    Raises:
        DataError: if an argument is out of range, or a batch does not fit the model.
    """
    if steps < 1:
        raise DataError(f"steps is {steps}; it must be at least 1.")
    allowed = resolve(constraint)
    # Held in a list, so that the copy is no part of the module that is trained.
    baseline = [copy.deepcopy(model).requires_grad_(False).eval()]
    points, lengths = sampler(JUDGED, generator(seed, "judged"))
    judged = points.to(model.go.device), lengths.to(model.go.device)
    best = [_greedy_cost(model, judged, cost, allowed)]

    def loss(module: PointerNetwork, batch: tuple[Tensor, ...], draws: torch.Generator) -> dict[str, Tensor]:
        points, lengths = (t.to(module.go.device) for t in sampler(len(batch[0]), draws))
        with torch.no_grad():
            memory = module.encode(points, module.check(points, lengths))
            drawn = sample(module, memory, lengths, allowed, draws)
        paid = cost(points, to_order(drawn.indices))
        gain = paid - _greedy_cost(baseline[0], (points, lengths), cost, allowed)
        log_prob = sequence_log_prob(module, points, drawn.indices, lengths, allowed)
        return {"loss": (gain.to(log_prob) * log_prob).mean(), "cost": paid.mean()}

    def replace_baseline(*_: Any) -> None:
        from scipy.stats import ttest_rel

        now = _greedy_cost(model, judged, cost, allowed)
        if ttest_rel(now.cpu(), best[0].cpu(), alternative="less").pvalue < SIGNIFICANT:
            baseline[0], best[0] = copy.deepcopy(model).requires_grad_(False).eval(), now

    rows, epochs = _endless(steps, batch_size)
    settings: dict[str, Any] = {
        "schedule": "cosine",
        "warmup_fraction": 0.05,
        "description": "REINFORCE",
    } | training
    return train(
        model, loss, (rows,), epochs=epochs, batch_size=batch_size, lr=lr, clip_norm=clip, seed=seed,
        progress=progress, callbacks=(replace_baseline,), **settings,
    )  # fmt: skip


def sequence_log_prob(
    model: PointerNetwork, points: Tensor, targets: Tensor, lengths: Tensor, constraint: Constraint | None
) -> Tensor:
    """Log-probability of whole outputs ``(batch,)`` under a model and its constraint, with gradient."""
    log_probs = model(points, targets, lengths).log_softmax(-1)
    if constraint is not None:
        existing = torch.arange(points.shape[1] + 1, device=points.device) <= lengths[:, None]
        existing[:, STOP] &= model.stop
        steps = [
            constrain(log_probs[:, i], targets[:, :i], lengths, targets[:, i] == PAD, existing, constraint)
            for i in range(targets.shape[1])
        ]
        log_probs = torch.stack(steps, 1)
    chosen = log_probs.gather(2, targets.clamp_min(STOP)[..., None])[..., 0]
    return chosen.masked_fill(targets == PAD, 0.0).sum(1)


def to_order(indices: Tensor) -> Tensor:
    """Outputs as the geometry takes them: indices from 0, -1 from "stop" on."""
    return (indices - 1).clamp_min(-1)


def _greedy_cost(
    model: PointerNetwork, inputs: tuple[Tensor, Tensor], cost: Callable[[Tensor, Tensor], Tensor],
    constraint: Constraint | None,
) -> Tensor:  # fmt: skip
    points, lengths = inputs
    return cost(points, to_order(model.decode(points, lengths, constraint=constraint).indices))
