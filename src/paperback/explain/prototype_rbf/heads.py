"""Heads: from detections of components to scores of classes, and the loss on these scores.

All of them are linear in the detections, A = d (r+ - r-) + sum_k r-, and differ in how the weights are tied.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from paperback.errors import DataError

HEADS = ("cbc", "original", "rbf")

LogReasoning = tuple[Float[Tensor, "K V"], Float[Tensor, "K V"] | None]


class ComponentHead(nn.Module, ABC):
    """What the three heads share: V = classes x vectors reasoning vectors, those of a class side by side.

    Args:
        n_components: K.
        n_classes: C.
        vectors_per_class: reasoning vectors of each class; the best one of a class is its score.

    Raises:
        DataError: if there are fewer than one component, two classes or one vector.
    """

    logits: nn.Parameter

    def __init__(self, n_components: int, n_classes: int, *, vectors_per_class: int = 1) -> None:
        super().__init__()
        if n_components < 1 or n_classes < 2 or vectors_per_class < 1:
            raise DataError(
                f"a head of {n_components} components, {n_classes} classes and {vectors_per_class} vectors "
                "per class cannot be; it needs at least 1, 2 and 1."
            )
        self.n_components, self.n_classes = n_components, n_classes
        self.vectors_per_class = vectors_per_class

    @property
    def n_vectors(self) -> int:
        """V."""
        return self.n_classes * self.vectors_per_class

    @abstractmethod
    def log_reasoning(self) -> LogReasoning:
        """Logarithms of r+ and of r-; None for r- in a head without negative reasoning."""

    def reasoning(self) -> tuple[Float[Tensor, "K V"], Float[Tensor, "K V"]]:
        """r+ and r-: what a component's presence and its absence count for each vector."""
        positive, negative = self.log_reasoning()
        return positive.exp(), torch.zeros_like(positive) if negative is None else negative.exp()

    def constant(self) -> Float[Tensor, " V"]:
        """What each vector scores whatever is there or not; 0 but for `RBFHead`."""
        return self.logits.new_zeros(self.n_vectors)

    def offset(self) -> Float[Tensor, " V"]:
        """The score of each vector where no component is detected."""
        return self.reasoning()[1].sum(0) + self.constant()

    def vector_scores(self, d: Float[Tensor, "B K"]) -> Float[Tensor, "B V"]:
        """A of every reasoning vector."""
        positive, negative = self.reasoning()
        return d @ (positive - negative) + self.offset()

    def forward(self, d: Float[Tensor, "B K"]) -> Float[Tensor, "B C"]:
        """A of every class: that of its best vector."""
        return self.vector_scores(d).unflatten(1, (self.n_classes, -1)).amax(2)


class CBCHead(ComponentHead):
    """Positive and negative reasoning with one softmax over both, so that r+ and r- of a vector sum to 1.

    Put it on any module whose output says, from 0 to 1, how much of each component is there. Scores lie in
    [0, 1] and are not normalised over classes; train them with `margin_loss`.

    Args:
        n_components: K.
        n_classes: C.
        negative: whether absence may count; without it the head is an RBF head with convex weights.
        vectors_per_class: reasoning vectors of each class; the best one of a class is its score.

    Raises:
        DataError: if there are fewer than one component, two classes or one vector.
    """

    def __init__(
        self, n_components: int, n_classes: int, *, negative: bool = True, vectors_per_class: int = 1
    ) -> None:
        super().__init__(n_components, n_classes, vectors_per_class=vectors_per_class)
        self.negative = negative
        rows = n_components * (2 if negative else 1)
        self.logits = nn.Parameter(0.6 - 0.2 * torch.randn(rows, self.n_vectors))

    def log_reasoning(self) -> LogReasoning:
        log = self.logits.log_softmax(0)
        return (log[: self.n_components], log[self.n_components :]) if self.negative else (log, None)


class OriginalCBCHead(ComponentHead):
    """The older method: indefinite reasoning r0, r+ + r0 + r- = 1 per component, normalised away.

    A = sum_k (d r+ + (1 - d) r-) / sum_k (1 - r0); `reasoning` gives r+ and r- over that sum.

    Args:
        n_components: K.
        n_classes: C.
        vectors_per_class: reasoning vectors of each class.

    Raises:
        DataError: if there are fewer than one component, two classes or one vector.
    """

    def __init__(self, n_components: int, n_classes: int, *, vectors_per_class: int = 1) -> None:
        super().__init__(n_components, n_classes, vectors_per_class=vectors_per_class)
        self.logits = nn.Parameter(0.2 * torch.randn(3, n_components, self.n_vectors))  # r+, r-, r0

    def log_reasoning(self) -> LogReasoning:
        definite = self.logits.log_softmax(0)[:2]
        positive, negative = definite - definite.flatten(0, 1).logsumexp(0)
        return positive, negative


class RBFHead(ComponentHead):
    """The plain RBF head: convex weights over the components, and a constant for each vector.

    Args:
        n_components: K.
        n_classes: C.
        bias: add the constant; without it this is `CBCHead` without negative reasoning.
        vectors_per_class: weight vectors of each class.

    Raises:
        DataError: if there are fewer than one component, two classes or one vector.
    """

    def __init__(
        self, n_components: int, n_classes: int, *, bias: bool = True, vectors_per_class: int = 1
    ) -> None:
        super().__init__(n_components, n_classes, vectors_per_class=vectors_per_class)
        self.logits = nn.Parameter(0.2 * torch.randn(n_components, self.n_vectors))
        self.bias = nn.Parameter(torch.zeros(self.n_vectors)) if bias else None

    def log_reasoning(self) -> LogReasoning:
        return self.logits.log_softmax(0), None

    def constant(self) -> Float[Tensor, " V"]:
        return super().constant() if self.bias is None else self.bias


def make_head(
    kind: str, n_components: int, n_classes: int, *, negative: bool, vectors_per_class: int
) -> ComponentHead:
    """The head of that name, one of `HEADS`."""
    if kind == "cbc":
        return CBCHead(n_components, n_classes, negative=negative, vectors_per_class=vectors_per_class)
    heads = {"original": OriginalCBCHead, "rbf": RBFHead}
    return heads[kind](n_components, n_classes, vectors_per_class=vectors_per_class)


def gaps(scores: Float[Tensor, "B C"], y: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """A_y - max_{c != y} A_c: positive where y is predicted."""
    own = scores.gather(1, y[:, None])[:, 0]
    return own - scores.scatter(1, y[:, None], -torch.inf).amax(1)


def margin_loss(scores: Float[Tensor, "B C"], y: Int[Tensor, " B"], margin: float) -> Float[Tensor, ""]:
    """mean relu(margin - A_y + max_{c != y} A_c).

    -log A_y is no loss for these heads: agreements are not normalised over classes, and all of them reach 1
    together on the absence of components that are never there.

    Args:
        scores: agreements of the classes.
        y: class indices.
        margin: the gap from which a row costs nothing, in (0, 1].
    """
    return (margin - gaps(scores, y)).relu().mean()
