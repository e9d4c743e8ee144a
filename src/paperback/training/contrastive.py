"""The contrastive losses, all on one masked log-softmax.

An anchor i has scores s_ij against candidates j. With positives P(i), admitted candidates D(i) and a
temperature t_i its loss is

    L_i = -1/|P(i)| sum_{p in P(i)} log( exp(s_ip / t_i) / sum_{j in D(i)} exp(s_ij / t_i) ).

InfoNCE (van den Oord et al. 2018) has one positive for each anchor; NT-Xent (SimCLR, Chen et al. 2020) takes
every other view of the batch as a candidate; the supervised contrastive loss (Khosla et al. 2020, its L_out)
has all views of the same class as positives. They are choices of P, D and s. Where every anchor has exactly
one positive and everything is admitted, the sum is plain cross-entropy, and torch's kernel for it is used.

Under `accelerate launch` the candidates are those of all processes: `gather` keeps the gradient. A batch that
does not fit into memory is done in pieces by `backward_in_chunks` (Gao et al. 2021): the gradient is that of
the whole batch. `alignment` and `uniformity` (Wang and Isola 2020) measure an embedding without labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from paperback.errors import DataError

Reduction = Literal["mean", "none"]


def contrastive_loss(
    scores: Float[Tensor, "anchors candidates"],
    positives: Bool[Tensor, "anchors candidates"] | Float[Tensor, "anchors candidates"],
    candidates: Bool[Tensor, "anchors candidates"] | None = None,
    temperature: float | Float[Tensor, " anchors"] = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """The masked log-softmax that every contrastive loss here is; see the module for the equation.

    Args:
        scores: s_ij, for instance cosines.
        positives: P(i): True where j is a positive of i, or weights >= 0.
        candidates: D(i), what stands in the denominator; everything if not given. A positive that is left out
            of it counts above only, as in the decoupled loss (Yeh et al. 2022).
        temperature: t_i > 0, one for all anchors or one for each.
        reduction: "mean" over the anchors that have a positive, or "none": the loss of each anchor, 0 for one
            without positives.

    Returns:
        A scalar, or ``(anchors,)``.

    Raises:
        DataError: if shapes or the temperature do not fit, or no anchor has a positive.
    """
    if positives.shape != scores.shape or (candidates is not None and candidates.shape != scores.shape):
        raise DataError(
            f"scores have shape {tuple(scores.shape)}; the masks of positives and candidates need the same."
        )
    low = temperature if isinstance(temperature, float | int) else float(temperature.min())
    if not (math.isfinite(low) and low > 0):
        raise DataError(f"temperature is {low}; it must be a positive number.")
    logits = scores / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)
    weights = positives.to(logits.dtype)
    total = weights.sum(1)
    has = total > 0
    attracted = (weights * logits).sum(1) / total.clamp(min=torch.finfo(total.dtype).tiny)
    if candidates is not None:  # not -inf: an anchor without any candidate would have NaN for a gradient
        logits = logits.masked_fill(~candidates, torch.finfo(logits.dtype).min)
    loss = torch.where(has, torch.logsumexp(logits, 1) - attracted, 0.0)
    if reduction == "none":
        return loss
    if not has.any():
        raise DataError("no anchor has a positive; give each class or each image at least two views.")
    return loss.sum() / has.sum()


def nt_xent(
    first: Float[Tensor, "batch dim"],
    second: Float[Tensor, "batch dim"],
    temperature: float = 0.2,
    *,
    gathered: bool = True,
) -> Float[Tensor, ""]:
    """SimCLR's loss: a view finds the other view of its image among all other views of the batch.

    Args:
        first: embeddings of the first views; they are normalised here.
        second: of the second views, in the same order.
        temperature: > 0; 0.2 in AdaInf's setting, 0.5 in SimCLR's for CIFAR.
        gathered: with several processes, take the views of all of them as candidates.

    Returns:
        The mean over the 2 * batch anchors of this process.

    Raises:
        DataError: if the two do not have the same shape, or hold fewer than two images.

    Source: Chen et al. 2020, equation 1.
    """
    _check_pair(first, second)
    n = len(first)
    anchors = F.normalize(torch.cat([first, second]), dim=1)
    everything, start = gather(anchors) if gathered else (anchors, 0)
    if len(everything) < 4:
        raise DataError("there is one image; nt_xent needs at least 2 to tell apart.")
    own = start + torch.arange(2 * n, device=anchors.device)
    rows = torch.arange(2 * n, device=anchors.device)
    logits = (anchors @ everything.T / _checked(temperature)).index_put(
        (rows, own), torch.tensor(-math.inf, device=anchors.device, dtype=anchors.dtype)
    )
    # One positive for each anchor: the masked log-softmax is cross-entropy, without a dense mask.
    return F.cross_entropy(logits, own.roll(n))


def info_nce(
    queries: Float[Tensor, "batch dim"],
    keys: Float[Tensor, "batch dim"],
    negatives: Float[Tensor, "negatives dim"] | None = None,
    temperature: float = 0.2,
    *,
    candidates: Bool[Tensor, "batch candidates"] | None = None,
) -> Float[Tensor, ""]:
    """InfoNCE: query i finds key i, among all keys or among its own key and given negatives.

    Args:
        queries: they are normalised here, as keys and negatives are.
        keys: key i is the positive of query i.
        negatives: candidates for every query, such as MoCo's queue; if not given, the keys of the other
            queries (of all processes) are.
        temperature: > 0.
        candidates: True where query i may see candidate j (false negatives left out): of the keys, or, with
            `negatives`, of those. The positive is always seen.

    Returns:
        The mean over queries.

    Raises:
        DataError: if shapes do not fit.

    Source: van den Oord et al. 2018, equation 4; He et al. 2020 (MoCo), equation 1.
    """
    _check_pair(queries, keys)
    queries, keys = F.normalize(queries, dim=1), F.normalize(keys, dim=1)
    target = torch.arange(len(queries), device=queries.device)
    if negatives is None:
        everything, start = gather(keys)
        scores, target = queries @ everything.T, target + start
    else:
        own = (queries * keys).sum(1, keepdim=True)
        scores = torch.cat([own, queries @ F.normalize(negatives, dim=1).T], 1)
        target = torch.zeros_like(target)
        if candidates is not None:
            candidates = torch.cat([torch.ones_like(candidates[:, :1]), candidates], 1)
    positives = F.one_hot(target, scores.shape[1]).bool()
    if candidates is None:
        return F.cross_entropy(scores / _checked(temperature), target)
    return contrastive_loss(scores, positives, candidates | positives, temperature)


def sup_con(
    embeddings: Float[Tensor, "views dim"],
    labels: Int[Tensor, " views"] | None = None,
    *,
    positives: Bool[Tensor, "views views"] | None = None,
    temperature: float | Float[Tensor, " views"] = 0.1,
) -> Float[Tensor, ""]:
    """The supervised contrastive loss: a view finds all other views of its class.

    Args:
        embeddings: one row per view; they are normalised here.
        labels: class of each view. A negative label belongs to no class: such a view is only a negative.
        positives: in place of labels: True where two views belong together; the diagonal is ignored.
        temperature: > 0, one for all views or one for each.

    Returns:
        The mean over the views that have a positive. It is `nt_xent` when a label is an image's number.

    Raises:
        DataError: unless exactly one of labels and positives is given, or if no view has a positive.

    Source: Khosla et al. 2020, equation 2 (L_out).
    """
    if (labels is None) == (positives is None):
        raise DataError("sup_con needs exactly one of labels and positives.")
    if positives is None:
        assert labels is not None
        if labels.shape != (len(embeddings),):
            raise DataError(f"labels have shape {tuple(labels.shape)}; give one for each of the views.")
        positives = (labels[:, None] == labels[None]) & (labels >= 0)[:, None]
    normed = F.normalize(embeddings, dim=1)
    others = ~torch.eye(len(normed), dtype=torch.bool, device=normed.device)
    return contrastive_loss(normed @ normed.T, positives & others, others, temperature)


def alignment(first: Float[Tensor, "batch dim"], second: Float[Tensor, "batch dim"]) -> Float[Tensor, ""]:
    """Mean squared distance of the two views of an image on the unit sphere; lower is better.

    Source: Wang and Isola 2020, equation 1 with alpha = 2.
    """
    _check_pair(first, second)
    return (F.normalize(first, dim=1) - F.normalize(second, dim=1)).square().sum(1).mean()


def uniformity(embeddings: Float[Tensor, "batch dim"], t: float = 2.0) -> Float[Tensor, ""]:
    """Logarithm of the mean Gaussian potential of all pairs on the unit sphere; lower is more uniform.

    Source: Wang and Isola 2020, equation 2.
    """
    if len(embeddings) < 2:
        raise DataError(f"there are {len(embeddings)} embeddings; uniformity needs at least two.")
    squared = torch.pdist(F.normalize(embeddings, dim=1)).square()
    return torch.logsumexp(-t * squared, 0) - math.log(len(squared))


# -- large batches -------------------------------------------------------------------------------------------


def gather(rows: Float[Tensor, "rows dim"]) -> tuple[Float[Tensor, "everything dim"], int]:
    """The rows of all processes, and where this process's begin; gradients flow back to their owners.

    Numbers of rows may differ by process. In a single process the rows themselves come back.

    Args:
        rows: of this process.

    Returns:
        All rows in the order of the ranks, and the first index of this process's.
    """
    if not _is_distributed():
        return rows, 0
    import torch.distributed.nn.functional as differentiable

    processes = torch.distributed.get_world_size()
    counts = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(processes)]
    torch.distributed.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    sizes = [int(count) for count in counts]
    padded = F.pad(rows, (0, 0, 0, max(sizes) - len(rows)))
    parts = differentiable.all_gather(padded)
    everything = torch.cat([part[:n] for part, n in zip(parts, sizes, strict=True)])
    return everything, sum(sizes[: process_rank()])


def process_rank() -> int:
    """Number of this process among those of `accelerate launch`; 0 where there is only one."""
    return torch.distributed.get_rank() if _is_distributed() else 0


def _is_distributed() -> bool:
    return (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    )


def backward_in_chunks(
    model: nn.Module,
    inputs: Tensor,
    loss: Callable[[Tensor], Tensor],
    chunk: int,
    backward: Callable[[Tensor], Any] = torch.Tensor.backward,
) -> Tensor:
    """Accumulate the gradient of a loss of a whole batch with the memory of a part (gradient caching).

    The batch is embedded in chunks without a graph; the loss gives the gradient of every embedding; each
    chunk is then embedded again, with a graph, and receives its part. A model whose rows depend on each other
    (batch normalisation in training mode) sees chunks as its batches.

    Args:
        model: from rows to embeddings ``(rows, dim)``; its random numbers (dropout) are the same both times.
        inputs: the batch, ``(rows, ...)``.
        loss: from all embeddings to a scalar.
        chunk: rows at a time, >= 1.
        backward: what starts a backward pass, for instance `accelerator.backward`.

    Returns:
        The loss, without a graph.

    Raises:
        DataError: if chunk < 1.

    Source: Gao et al. 2021, section 3.2.
    """
    if chunk < 1:
        raise DataError(f"chunk is {chunk}; it must be at least 1.")
    parts, states = inputs.split(chunk), []
    pieces = []
    with torch.no_grad():
        for part in parts:
            states.append(torch.get_rng_state())
            pieces.append(model(part))
    embeddings = torch.cat(pieces).requires_grad_()
    value = loss(embeddings)
    (cached,) = torch.autograd.grad(value, embeddings)
    after = torch.get_rng_state()
    for part, state, gradient in zip(parts, states, cached.split(chunk), strict=True):
        torch.set_rng_state(state)
        # The gradient of <embedding, cached gradient> is the chain rule's product.
        backward((model(part) * gradient).sum())
    torch.set_rng_state(after)
    return value.detach()


def _check_pair(first: Tensor, second: Tensor) -> None:
    if first.ndim != 2 or first.shape != second.shape or len(first) < 1:
        raise DataError(
            f"the embeddings have shapes {tuple(first.shape)} and {tuple(second.shape)}; give two of the "
            "same shape (batch, dim) with at least one row."
        )


def _checked(temperature: float) -> float:
    if not (math.isfinite(temperature) and temperature > 0):
        raise DataError(f"temperature is {temperature}; it must be a positive number.")
    return temperature
