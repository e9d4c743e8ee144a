"""The energy of a restricted Boltzmann machine with softmax visible variables, and what follows from it.

``log weight(v, y, h) = b'v + d'y + c'h + v'Wh + y'Uh`` with v the stacked one-hot visible variables, y the
one-hot class and h binary. Given h the visible variables and the class are independent, given them the hidden
units are; the hidden units sum out: ``-F(v, y) = b'v + d'y + sum_j softplus((c + W'v + U'y)_j)``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from paperback.numerics.spins import sample_categorical


@dataclass(frozen=True)
class Weights:
    """The parameters; those of states that a variable does not have are never met.

    Attributes:
        visible: W, ``(variables * states, hidden)``.
        label: U, ``(classes, hidden)``; no rows without classes.
        visible_bias: b, ``(variables * states,)``.
        label_bias: d, ``(classes,)``.
        hidden_bias: c, ``(hidden,)``.
        valid: states that each variable has, ``(variables, states)``.
    """

    visible: Float[Tensor, "entries hidden"]
    label: Float[Tensor, "classes hidden"]
    visible_bias: Float[Tensor, " entries"]
    label_bias: Float[Tensor, " classes"]
    hidden_bias: Float[Tensor, " hidden"]
    valid: Bool[Tensor, "variables states"]

    def hidden_input(
        self, v: Float[Tensor, "batch entries"], y: Float[Tensor, "batch classes"]
    ) -> Float[Tensor, "batch hidden"]:
        """c + W'v + U'y: the logits of the hidden units."""
        return torch.addmm(self.hidden_bias, v, self.visible) + y @ self.label

    def visible_logits(self, h: Float[Tensor, "batch hidden"]) -> Float[Tensor, "batch variables states"]:
        """b + Wh, -inf at states that a variable does not have."""
        logits = torch.addmm(self.visible_bias, h, self.visible.T).unflatten(1, self.valid.shape)
        return logits.masked_fill(~self.valid, -torch.inf)

    def label_logits(self, h: Float[Tensor, "batch hidden"]) -> Float[Tensor, "batch classes"]:
        """d + Uh."""
        return torch.addmm(self.label_bias, h, self.label.T)

    def log_weight(
        self, v: Float[Tensor, "batch entries"], y: Float[Tensor, "batch classes"]
    ) -> Float[Tensor, " batch"]:
        """-F(v, y): the unnormalised log-probability with the hidden units summed out."""
        return (
            v @ self.visible_bias
            + y @ self.label_bias
            + nn.functional.softplus(self.hidden_input(v, y)).sum(1)
        )

    def log_weight_by_class(self, v: Float[Tensor, "batch entries"]) -> Float[Tensor, "batch classes"]:
        """-F(v, y) for every class y; with no class variable there is one column, -F(v)."""
        hidden = torch.addmm(self.hidden_bias, v, self.visible)
        visible = v @ self.visible_bias
        if len(self.label_bias) == 0:
            return (visible + nn.functional.softplus(hidden).sum(1))[:, None]
        by_class = [
            nn.functional.softplus(hidden + u).sum(1) + d
            for u, d in zip(self.label, self.label_bias, strict=True)
        ]
        return torch.stack(by_class, 1) + visible[:, None]

    def draw_hidden(self, v: Tensor, y: Tensor, generator: torch.Generator) -> Float[Tensor, "batch hidden"]:
        """One draw of the hidden units given the rest, as zeros and ones."""
        return bernoulli(self.hidden_input(v, y).sigmoid(), generator)

    def draw_visible(
        self, h: Tensor, generator: torch.Generator
    ) -> tuple[Float[Tensor, "batch entries"], Float[Tensor, "batch classes"]]:
        """One draw of visible variables and class given the hidden units, one-hot."""
        return draw_one_hot(self.visible_logits(h).softmax(-1), self.label_logits(h).softmax(-1), generator)


def bernoulli(probability: Tensor, generator: torch.Generator) -> Tensor:
    """Zeros and ones, of the type of the probabilities."""
    noise = torch.rand(
        probability.shape, generator=generator, dtype=probability.dtype, device=probability.device
    )
    return (noise < probability).to(probability.dtype)


def draw_one_hot(
    visible: Float[Tensor, "batch variables states"],
    label: Float[Tensor, "batch classes"],
    generator: torch.Generator,
) -> tuple[Float[Tensor, "batch entries"], Float[Tensor, "batch classes"]]:
    """Draws of visible variables and class from their probabilities, one-hot."""
    v = (
        nn.functional.one_hot(sample_categorical(visible, generator), visible.shape[-1])
        .to(visible.dtype)
        .flatten(1)
    )
    if label.shape[1] == 0:
        return v, label
    return v, nn.functional.one_hot(sample_categorical(label, generator), label.shape[1]).to(label.dtype)


def tempered_step(
    weights: Weights,
    base: tuple[Tensor, Tensor],
    state: tuple[Tensor, Tensor],
    beta: float,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """One Gibbs step at an inverse temperature between base rates (0) and the machine (1).

    Args:
        weights: the machine.
        base: logits of the base rates of visible entries and classes.
        state: visible variables and class, one-hot; nothing else is remembered.
        beta: in [0, 1].
        generator: source of randomness.

    Returns:
        The new state.
    """
    h = bernoulli((beta * weights.hidden_input(*state)).sigmoid(), generator)
    base_v, base_y = base[0].unflatten(0, weights.valid.shape), base[1]
    visible = ((1.0 - beta) * base_v + beta * weights.visible_logits(h)).masked_fill(
        ~weights.valid, -torch.inf
    )
    label = (1.0 - beta) * base_y + beta * weights.label_logits(h)
    return draw_one_hot(visible.softmax(-1), label.softmax(-1), generator)
