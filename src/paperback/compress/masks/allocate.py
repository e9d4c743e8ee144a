"""Who keeps how many: a density shared out over layers so that the sum is exact.

uniform  every layer keeps the density;
global   every layer keeps its part of the largest scores of all layers together;
erk      density_l = min(1, c * (sum of the dimensions of l) / (their product)), with c such that the sum
         fits: thin layers keep more (Mocanu et al. 2018; Evci et al., RigL, 2020);
row      every row of every layer keeps the same share, rounded down.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from paperback.compress.masks.choose import check_density, row_kept, whole
from paperback.errors import DataError

Allocation = Literal["uniform", "global", "erk", "row"]

_HIGH_BITS = 16


def kept_of(total: int, density: float) -> int:
    """How many of `total` weights a density keeps: never more than it says.

    Raises:
        DataError: if the density is not in (0, 1], or keeps none.
    """
    check_density(density)
    kept = whole(density * total)
    if kept < 1:
        raise DataError(
            f"a density of {density:g} keeps none of {total} weights; give at least {1 / total:.2g}."
        )
    return kept


def allocate(
    weights: Mapping[str, Tensor],
    density: float,
    rule: Allocation = "uniform",
    *,
    scores: Mapping[str, Tensor] | None = None,
) -> dict[str, int]:
    """Share a density out over layers.

    Args:
        weights: layer name to weight; only "global" without scores looks at more than their shapes.
        density: share of all the weights that is kept, in (0, 1].
        rule: see above.
        scores: for "global", what decides instead of the absolute weights; non-negative, of their shapes.

    Returns:
        Layer name to number of weights kept. They sum to the whole part of density times all weights; with
        "row" each layer's number is a whole number of weights per row and the sum may be smaller.

    Raises:
        DataError: if the rule or density does not exist, or a layer (a row) would keep none.
    """
    if rule not in get_args(Allocation):
        raise DataError(f"there is no allocation {rule!r}; those are {', '.join(get_args(Allocation))}.")
    if not weights:
        raise DataError("there are no weights to allocate; no layer is targeted.")
    sizes = {name: w.numel() for name, w in weights.items()}
    total = kept_of(sum(sizes.values()), density)
    if rule == "row":
        kept = {name: len(w) * row_kept(w[0].numel(), density, name=name) for name, w in weights.items()}
    elif rule == "global":
        kept = _largest(scores if scores is not None else weights, total, magnitudes=scores is None)
    else:
        wanted = {n: density * s for n, s in sizes.items()} if rule == "uniform" else _erk(weights, total)
        kept = _whole_numbers(wanted, sizes, total)
    empty = [name for name, k in kept.items() if k < 1]
    if empty:
        raise DataError(
            f"with {rule!r} the layer {empty[0]} would keep none of its {sizes[empty[0]]} weights; "
            "raise the density, or choose the allocation 'erk'."
        )
    return kept


def _erk(weights: Mapping[str, Tensor], total: int) -> dict[str, float]:
    """Real-valued counts of Erdos-Renyi-Kernel; a layer that would keep more than all it has is full."""
    raw = {name: float(sum(w.shape)) for name, w in weights.items()}  # the count is proportional to this
    full: set[str] = set()
    while True:
        left = total - sum(weights[name].numel() for name in full)
        c = left / max(sum(raw[name] for name in raw if name not in full), 1e-300)
        more = {n for n, w in weights.items() if n not in full and c * raw[n] > w.numel()}
        if not more:
            return {n: float(w.numel()) if n in full else c * raw[n] for n, w in weights.items()}
        full |= more


def _whole_numbers(wanted: Mapping[str, float], sizes: Mapping[str, int], total: int) -> dict[str, int]:
    """Round counts down, then give what is left to the largest remainders that have room."""
    kept = {name: min(whole(w), sizes[name]) for name, w in wanted.items()}
    order = sorted(wanted, key=lambda name: (kept[name] - wanted[name], name))
    while (missing := total - sum(kept.values())) > 0:
        for name in [name for name in order if kept[name] < sizes[name]][:missing]:
            kept[name] += 1
    return kept


def _largest(scores: Mapping[str, Tensor], total: int, *, magnitudes: bool) -> dict[str, int]:
    """How many of the `total` largest scores lie in each layer; of ties the first.

    Non-negative float32 sort as the integers that their bits are, so the edge is found from two histograms of
    16 bits each, and no more than one layer is copied at a time.
    """

    def bits(name: str) -> Tensor:
        score = scores[name].detach().float().abs() if magnitudes else scores[name].detach().float()
        if not bool((torch.isfinite(score) & (score >= 0)).all()):
            raise DataError(
                f"{name} has scores that are negative or not finite; a global allocation needs both."
            )
        return (score + 0.0).flatten().contiguous().view(torch.int32)  # + 0.0 makes -0.0 a plain zero

    high = sum(torch.bincount(bits(n) >> _HIGH_BITS, minlength=1 << 15).cpu() for n in scores)
    assert isinstance(high, Tensor)
    bucket, above = _edge(high, total)

    def low_bits(name: str) -> Tensor:
        b = bits(name)
        return b[(b >> _HIGH_BITS) == bucket] & ((1 << _HIGH_BITS) - 1)

    low = sum(torch.bincount(low_bits(n), minlength=1 << _HIGH_BITS).cpu() for n in scores)
    assert isinstance(low, Tensor)
    last, above_last = _edge(low, total - above)
    edge, ties = (bucket << _HIGH_BITS) | last, total - above - above_last
    kept = {}
    for name in scores:
        b = bits(name)
        tied = min(int((b == edge).sum()), ties)
        kept[name] = int((b > edge).sum()) + tied
        ties -= tied
    return kept


def _edge(histogram: Tensor, count: int) -> tuple[int, int]:
    """The bucket in which the count-th largest lies, and how many lie above that bucket."""
    from_top = histogram.flip(0).cumsum(0)
    index = int(torch.searchsorted(from_top, count))
    return len(histogram) - 1 - index, int(from_top[index] - histogram[len(histogram) - 1 - index])
