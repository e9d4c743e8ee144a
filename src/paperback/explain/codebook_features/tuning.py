"""Fine-tuning a model together with its codes: two groups of weights, dead codes, and a falling k."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperback.errors import DataError
from paperback.explain.codebook_features.layer import CodebookLayer
from paperback.training import History, Schedule, generator, train

if TYPE_CHECKING:
    from paperback.explain.codebook_features.model import CodebookModel

Loss = Callable[[nn.Module, tuple[Tensor, ...], torch.Generator], Tensor]


def next_token_loss(model: nn.Module, batch: tuple[Tensor, ...], _: torch.Generator) -> Tensor:
    """Mean cross-entropy of each token given those before it: the loss of a causal language model."""
    logits = model(input_ids=batch[0], use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[0][:, 1:].flatten())


def fit(
    model: CodebookModel,
    data: Tensor | Sequence[Tensor],
    loss: Loss | None = None,
    *,
    steps: int,
    batch_size: int = 32,
    lr: float = 1e-3,
    code_lr_factor: float = 1.0,
    weight_decay: float = 0.01,
    train_model: bool = True,
    schedule: Schedule = "constant",
    warmup_fraction: float = 0.0,
    clip_norm: float | None = None,
    revive_every: int = 0,
    revive_rho: float = 1e-4,
    anneal_k_from: int | None = None,
    code_penalty: float | None = None,
    code_penalty_weight: float = 0.01,
    seed: int = 0,
    progress: bool = True,
) -> History:
    """Train the codes of a model, and the model with them, by AdamW.

    Args:
        model: the model with its codebooks.
        data: tensors of rows; a batch is a tuple of their slices.
        loss: as of `paperback.training.train`; `next_token_loss` of token ids if not given.
        steps: so many steps, rounded up to whole passes over the rows; of more rows than are needed for
            that, a random part is used.
        batch_size: rows of a step.
        lr: peak learning rate of the model.
        code_lr_factor: that of the codes, relative to it.
        weight_decay: of the model's weights; codes have none.
        train_model: False leaves the model's weights, and trains codes and their LayerNorms.
        schedule: course of the learning rates; see `paperback.training.schedule.factor`.
        warmup_fraction: of the schedule.
        clip_norm: gradients are scaled down to this norm.
        revive_every: after so many steps the codes that were not chosen in them are set anew
            (`CodebookLayer.revive`); 0 is never.
        revive_rho: size of the noise of revived codes.
        anneal_k_from: codes of a vector at the beginning; they fall evenly to k in the first half.
        code_penalty: p of a penalty on the p-norm of the codes; none if not given.
        code_penalty_weight: its weight.
        seed: of the order of rows, and of revived codes.
        progress: show a bar.

    Returns:
        The course of the training.

    Raises:
        DataError: if nothing can be trained or an argument is out of range.
    """
    rows = (data,) if isinstance(data, Tensor) else tuple(data)
    layers = [model.codebook(name) for name in model.names]
    _check(layers, steps, batch_size, code_lr_factor, revive_every, anneal_k_from, code_penalty)
    if rows and len(rows[0]) > steps * batch_size:
        some = torch.randperm(len(rows[0]), generator=generator(seed, "part"))[: steps * batch_size]
        rows = tuple(part[some] for part in rows)
    per_epoch = -(-len(rows[0]) // batch_size) if rows and len(rows[0]) else 1
    epochs = -(-steps // per_epoch)
    course = _Course(
        layers, loss or next_token_loss, epochs * per_epoch, revive_every, revive_rho, anneal_k_from,
        code_penalty, code_penalty_weight, generator(seed, "revive"),
    )  # fmt: skip
    codes = {id(layer.codes) for layer in layers}

    def optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        trained = list(parameters)
        groups = [
            {"params": [p for p in trained if id(p) not in codes], "weight_decay": weight_decay},
            {
                "params": [p for p in trained if id(p) in codes],
                "weight_decay": 0.0,
                "lr": lr * code_lr_factor,
            },
        ]
        return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, fused=True)

    frozen = [] if train_model else [p for p in model.model.parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        return train(
            model, course, rows, epochs=epochs, batch_size=batch_size, lr=lr, optimizer=optimizer,
            schedule=schedule, warmup_fraction=warmup_fraction, clip_norm=clip_norm, seed=seed,
            progress=progress, description="codebooks",
        )  # fmt: skip
    finally:
        course.end()
        for parameter in frozen:
            parameter.requires_grad_(True)


class _Course:
    """The loss of each step, and what happens to the codes before it."""

    def __init__(
        self,
        layers: Sequence[CodebookLayer],
        loss: Loss,
        steps: int,
        revive_every: int,
        rho: float,
        anneal_k_from: int | None,
        penalty: float | None,
        penalty_weight: float,
        draws: torch.Generator,
    ) -> None:
        self.layers, self.loss, self.steps, self.step = layers, loss, steps, 0
        self.revive_every, self.rho, self.draws = revive_every, rho, draws
        self.anneal_k_from, self.final_k = anneal_k_from, [layer.k for layer in layers]
        self.penalty, self.penalty_weight = penalty, penalty_weight
        for layer in layers:
            layer.counts.zero_()
            layer.remember(revive_every > 0)

    def __call__(self, model: nn.Module, batch: tuple[Tensor, ...], draws: torch.Generator) -> Tensor:
        if self.revive_every and self.step and self.step % self.revive_every == 0:
            for layer in self.layers:
                layer.revive(self.rho, self.draws)
        for layer, k in zip(self.layers, self.final_k, strict=True):
            layer.k = k + self._more(k)
        self.step += 1
        loss = self.loss(model, batch, draws)
        if self.penalty is not None:
            norms = [
                torch.linalg.vector_norm(layer.codes, self.penalty, dim=-1).mean() for layer in self.layers
            ]
            loss = loss + self.penalty_weight * torch.stack(norms).mean()
        return loss

    def _more(self, k: int) -> int:
        """How many codes more than k a vector has at this step."""
        if self.anneal_k_from is None:
            return 0
        left = max(0.0, 1 - 2 * self.step / self.steps)
        return math.ceil(max(0, self.anneal_k_from - k) * left)

    def end(self) -> None:
        """k as it was, and no activations kept."""
        for layer, k in zip(self.layers, self.final_k, strict=True):
            layer.k = k
            layer.remember(False)


def _check(
    layers: Sequence[CodebookLayer],
    steps: int,
    batch_size: int,
    code_lr_factor: float,
    revive_every: int,
    anneal_k_from: int | None,
    code_penalty: float | None,
) -> None:
    if steps < 1 or batch_size < 1:
        raise DataError(f"steps is {steps} and batch_size {batch_size}; both must be at least 1.")
    if not any(layer.codes.requires_grad for layer in layers):
        raise DataError("no codebook has codes with requires_grad; there is nothing to fit.")
    if not any(layer.snap for layer in layers):
        raise DataError("all codebooks are disabled; there is nothing to fit.")
    if not code_lr_factor >= 0 or revive_every < 0:
        raise DataError(
            f"code_lr_factor is {code_lr_factor} and revive_every {revive_every}; both must be at least 0."
        )
    fewest = min(layer.n_codes for layer in layers)
    if anneal_k_from is not None and not max(layer.k for layer in layers) <= anneal_k_from <= fewest:
        raise DataError(
            f"anneal_k_from is {anneal_k_from}; it must lie between k and the number of codes, {fewest}."
        )
    if code_penalty is not None and not code_penalty > 0:
        raise DataError(f"code_penalty is {code_penalty}; it is the p of a norm, a positive number.")
