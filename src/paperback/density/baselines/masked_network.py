"""A feed-forward network from the observed part to the rest, trained for random masks.

It is no model of a joint distribution: it has no likelihood and no samples. But where completion or the class
is all that is wanted, it is the direct way, and what a density model has to be measured against.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from paperback.density.interface import Capabilities, Classifying, DensityModel
from paperback.errors import DataError, NotSupportedError
from paperback.training import seeded, train


class MaskedNetwork(Classifying, DensityModel):
    """Two hidden layers from the one-hot observed states and the mask to all states and the class.

    Args:
        n_variables: number of variables, >= 1.
        n_states: states of every variable (>= 2), or one number per variable.
        n_classes: number of classes (>= 2), None without labels.
        width: units of a hidden layer, >= 1.
        obs_level: probability with which a variable is observed in training, in (0, 1).

    Raises:
        DataError: if an argument is out of range.
    """

    def __init__(
        self,
        n_variables: int,
        n_states: int | Sequence[int],
        n_classes: int | None = None,
        width: int = 256,
        obs_level: float = 0.4,
    ) -> None:
        super().__init__(n_variables, n_states)
        if width < 1 or not 0.0 < obs_level < 1.0:
            raise DataError(f"width is {width} and obs_level {obs_level}; they must be >= 1 and in (0, 1).")
        if n_classes is not None and n_classes < 2:
            raise DataError(f"n_classes is {n_classes}; it must be at least 2, or None.")
        self.n_classes = n_classes
        self.obs_level = obs_level
        self.capabilities = Capabilities(conditional="estimate", classify="estimate" if n_classes else "none")
        self.body = nn.Sequential(
            nn.Linear(n_variables * (self.max_states + 1), width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
        )
        self.state_head = nn.Linear(width, n_variables * self.max_states)
        self.class_head = nn.Linear(width, n_classes or 1)

    def logits(
        self, states: Int[Tensor, "batch variables"], observed: Tensor
    ) -> tuple[Float[Tensor, "batch variables states"], Float[Tensor, "batch classes"]]:
        """Logits of every variable's states, -inf where there is none, and of the class."""
        known = F.one_hot(states, self.max_states) * observed[..., None]
        inputs = torch.cat([known.flatten(1), observed], 1).to(self.state_head.weight.dtype)
        hidden = self.body(inputs)
        by_state = self.state_head(hidden).unflatten(1, (self.n_variables, self.max_states))
        return by_state.masked_fill(~self.valid, -torch.inf), self.class_head(hidden)

    def fit(
        self,
        X: Int[Tensor, "batch ..."],
        y: Int[Tensor, " batch"] | None = None,
        X_val: Int[Tensor, "batch_val ..."] | None = None,
        y_val: Int[Tensor, " batch_val"] | None = None,
        *,
        seed: int = 0,
        progress: bool = True,
        epochs: int = 60,
        batch_size: int = 96,
        lr: float = 1e-3,
        **training: Any,
    ) -> Self:
        """Minimise the cross-entropy of hidden variables and of the class, under masks drawn anew each time.

        Args:
            X: states ``(batch, *event)``.
            y: labels ``(batch,)``, required with ``n_classes``.
            X_val: validation states; with them the best epoch is kept.
            y_val: their labels.
            seed: of initial weights, order and masks.
            progress: show a progress bar.
            epochs: passes over the rows, >= 1.
            batch_size: rows of a step, >= 1.
            lr: learning rate of AdamW at the start; it falls to zero along a cosine.
            **training: further settings of `paperback.training.train`.

        Returns:
            The model itself.

        Raises:
            DataError: if X or y cannot be used.
        """
        if (y is None) != (self.n_classes is None):
            raise DataError(
                "y and n_classes go together: give labels to a model with classes, and only then."
            )
        rows = self._rows(X, y)
        val_rows = None if X_val is None else self._rows(X_val, y_val)
        with seeded(seed, "weights"):
            for layer in self.modules():
                if isinstance(layer, nn.Linear):
                    layer.reset_parameters()
        settings: dict[str, Any] = {"schedule": "cosine", "weight_decay": 1e-2, "description": "network"}
        train(
            self,
            _masked_cross_entropy,
            rows,
            val_tensors=val_rows,
            optimizer="adamw",
            epochs=epochs,
            batch_size=min(batch_size, len(rows[0])),
            lr=lr,
            seed=seed,
            progress=progress,
            **{**settings, **training},
        )
        return self

    def _rows(self, X: Tensor, y: Tensor | None) -> tuple[Tensor, ...]:
        states, labels = self.check_training(X, y if self.n_classes else None)
        return (states,) if labels is None else (states, labels)

    @torch.no_grad()
    def _conditional(self, states: Tensor, observed: Tensor) -> Tensor:
        return self.logits(states, observed)[0].softmax(-1)

    @torch.no_grad()
    def predict_proba(
        self, X: Int[Tensor, "batch ..."], observed: Tensor | None = None
    ) -> Float[Tensor, "batch classes"]:
        """Class probabilities given the observed part (see `Classifying`)."""
        if self.n_classes is None:
            raise NotSupportedError("this network has no class; build it with n_classes.")
        states, mask = self.check(X, observed)
        mask = torch.ones_like(states, dtype=torch.bool) if mask is None else mask
        return self.logits(states, mask)[1].softmax(-1)


def _masked_cross_entropy(
    model: MaskedNetwork, batch: tuple[Tensor, ...], generator: torch.Generator
) -> Float[Tensor, ""]:
    states = batch[0]
    draw = torch.rand(states.shape, generator=generator, device=generator.device).to(states.device)
    observed = draw < model.obs_level
    by_state, by_class = model.logits(states, observed)
    loss = (
        F.cross_entropy(by_state[~observed], states[~observed]) if not observed.all() else by_class.sum() * 0
    )
    return loss + F.cross_entropy(by_class, batch[1]) if len(batch) > 1 else loss
