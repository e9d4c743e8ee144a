"""Losses of metric learning: embeddings of one class near, of different classes far, by pairs and triplets.

Embeddings are brought to length one; distances are Euclidean, between 0 and 2. With d_ap the distance of an
anchor to another row of its class and d_an to a row of another class, a triplet costs

    max(0, d_ap - d_an + margin).

`triplet_batch_hard` takes each anchor's farthest positive and nearest negative (Hermans, Beyer and Leibe
2017, arXiv 1703.07737, equation 5); `triplet_semi_hard` each pair's nearest negative beyond the positive, in
squared distances (Schroff, Kalenichenko and Philbin 2015, section 3.2); `contrastive_pairs` pulls pairs of a
class together and pushes others apart to a margin (Hadsell, Chopra and LeCun 2006, equation 4). Whole batches
at once, O(B^2) memory. `paperback.training.contrastive.sup_con` is the loss with all positives in a softmax.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from paperback.errors import DataError

EPSILON = 1e-12  # of a squared distance, below which the gradient of its root is left out


def triplet_batch_hard(
    embeddings: Float[Tensor, "batch dim"], labels: Int[Tensor, " batch"], margin: float = 0.2
) -> Float[Tensor, ""]:
    """Each anchor with its farthest positive and its nearest negative.

    Args:
        embeddings: one row per image; they are normalised here.
        labels: classes.
        margin: > 0, in distances of unit vectors.

    Returns:
        The mean over anchors that have both a positive and a negative.

    Raises:
        DataError: if shapes do not fit, or no anchor has both.
    """
    same, other = _masks(embeddings, labels, margin)
    valid = same.any(1) & other.any(1)
    if not valid.any():
        raise DataError("no row has another of its class and one of another class; take a larger batch.")
    # Which is farthest and nearest needs no gradient; the two distances that count do.
    with torch.no_grad():
        cosines = _cosines(embeddings)
        farthest = cosines.masked_fill(~same, torch.inf).argmin(1)
        nearest = cosines.masked_fill(~other, -torch.inf).argmax(1)
    unit = F.normalize(embeddings, dim=1)
    to_positive = _root((unit - unit[farthest]).square().sum(1))
    to_negative = _root((unit - unit[nearest]).square().sum(1))
    return F.relu(to_positive - to_negative + margin)[valid].mean()


def triplet_semi_hard(
    embeddings: Float[Tensor, "batch dim"], labels: Int[Tensor, " batch"], margin: float = 0.2
) -> Float[Tensor, ""]:
    """Each pair of a class with the nearest negative that is farther than the positive.

    Where every negative is nearer than the positive, the farthest of them stands in. Distances are squared.

    Args:
        embeddings: one row per image; they are normalised here.
        labels: classes.
        margin: > 0, in squared distances of unit vectors.

    Returns:
        The mean over pairs whose anchor has a negative.

    Raises:
        DataError: if shapes do not fit, or there is no such pair.
    """
    same, other = _masks(embeddings, labels, margin)
    valid = same & other.any(1, keepdim=True)
    if not valid.any():
        raise DataError("no row has another of its class and one of another class; take a larger batch.")
    squared = 2 - 2 * _cosines(embeddings)
    with torch.no_grad():
        order = squared.masked_fill(~other, torch.inf).argsort(1)
        ascending = squared.gather(1, order).masked_fill(~other.gather(1, order), torch.inf).contiguous()
        beyond = torch.searchsorted(ascending, squared.contiguous(), right=True)
        last = other.sum(1, keepdim=True) - 1
        picked = order.gather(1, torch.minimum(beyond, last.clamp(min=0)))
    return F.relu(squared - squared.gather(1, picked) + margin)[valid].mean()


def contrastive_pairs(
    embeddings: Float[Tensor, "batch dim"], labels: Int[Tensor, " batch"], margin: float = 1.0
) -> Float[Tensor, ""]:
    """Squared distance of pairs of a class, and what other pairs lack to a margin, squared.

    Args:
        embeddings: one row per image; they are normalised here.
        labels: classes.
        margin: > 0, in distances of unit vectors.

    Returns:
        Mean over pairs of a class plus mean over the others; there are far more of these, and a single mean
        would forget the first.

    Raises:
        DataError: if shapes do not fit, or there are no pairs of one of the two kinds.
    """
    same, other = _masks(embeddings, labels, margin)
    if not same.any() or not other.any():
        raise DataError("the batch has no two rows of one class, or of two classes; take a larger batch.")
    squared = 2 - 2 * _cosines(embeddings)
    attracted = squared[same].mean()
    repelled = F.relu(margin - _root(squared[other])).square().mean()
    return attracted + repelled


# -- helpers -------------------------------------------------------------------------------------------------


def _masks(embeddings: Tensor, labels: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """Pairs of one class without the diagonal, and pairs of two classes."""
    if embeddings.ndim != 2 or labels.shape != (len(embeddings),):
        raise DataError(
            f"embeddings have shape {tuple(embeddings.shape)} and labels {tuple(labels.shape)}; expected "
            "(batch, dim) and one label for each row."
        )
    if not margin > 0:
        raise DataError(f"margin is {margin}; it must be above 0.")
    same = labels[:, None] == labels[None]
    return same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device), ~same


def _cosines(embeddings: Tensor) -> Tensor:
    unit = F.normalize(embeddings, dim=1)
    return unit @ unit.T


def _root(squared: Tensor) -> Tensor:
    """Square root whose gradient is 0 at 0."""
    return torch.where(squared > EPSILON, squared.clamp(min=EPSILON).sqrt(), 0.0)
