"""How much a model stands: adversarial inputs within a ball, and wrong labels.

An attack looks, within a radius of each input, for the point where the model fails worst:

    x' = argmax gain(scores(x + delta), label)   over   ||delta||_p <= radius, low <= x + delta <= high

where the gain is max_{c != y} s_c - s_y for labels (positive where the class is wrong) and the squared error
for real targets. `fast_gradient_attack` takes one step, `projected_gradient_attack` many, and
`boundary_line_attack` needs no gradient: where it finds more than the others, their gradients were hidden.

Sources: Goodfellow, Shlens and Szegedy 2015 (one step, arXiv 1412.6572); Madry et al. 2018 (projected
gradient, 1706.06083); Tramer and Boneh 2019 (sparse steps for L1, 1904.13000); Duchi et al. 2008 (projection
on the L1 ball); Brendel, Rauber and Bethge 2018 (decision boundary, 1712.04248).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from paperback.errors import DataError

Scores = Callable[[Tensor], Tensor]
Bounds = tuple[float | Tensor, float | Tensor]

NORMS = (1, 2, math.inf)
BATCH = 1024  # inputs that the model is asked about at once
SPARSE = 0.05  # share of the coordinates that a step in L1 moves
BISECTIONS = 20  # of a line: the boundary to a millionth of its length
FAR = 4.0  # radii that a random direction is followed


def projected_gradient_attack(
    scores: Scores,
    inputs: Float[Tensor, "rows ..."],
    labels: Tensor,
    *,
    radius: float | Float[Tensor, " rows"],
    norm: float = 2,
    steps: int = 50,
    restarts: int = 1,
    step_size: float | None = None,
    bounds: Bounds | None = None,
    generator: torch.Generator,
) -> Float[Tensor, "rows ..."]:
    """Climb to where the model fails worst within a ball around each input.

    Args:
        scores: a differentiable model, ``(n, ...) -> (n, classes)``, or ``(n,)`` or ``(n, outputs)`` for real
            targets. Rows are independent of each other (a network is in eval mode). Scores that are
            probabilities close to 0 and 1 hide gradients; their logarithms do not.
        inputs: floating, finite.
        labels: int64 classes ``(rows,)``, or real targets in the shape of the scores.
        radius: of the ball, >= 0, one or one for each input.
        norm: 1, 2 or inf.
        steps: at least 1.
        restarts: the first starts at the input and climbs the gain; each further one starts at random in the
            ball and climbs the lead of one wrong class, another one each time. At least 1.
        step_size: length of the first step in parts of the radius; further ones fall to 0 along a half
            cosine. None for .5, or 2.5 / steps where that is more.
        bounds: (lowest, highest) value that an input may have; the inputs lie within.
        generator: of random starts, and of a direction where the gradient is 0.

    Returns:
        For each input the worst point found, itself included; never outside the ball or the bounds.

    Raises:
        DataError: if an argument cannot be used, or scores have no gradient.
    """
    if steps < 1 or restarts < 1:
        raise DataError(f"steps is {steps} and restarts is {restarts}; give at least 1 of each.")
    if step_size is not None and not 0 < step_size < math.inf:
        raise DataError(f"step_size is {step_size}; give a positive part of the radius.")
    radii = _checked(inputs, labels, radius, norm, bounds)
    first = max(0.5, 2.5 / steps) if step_size is None else step_size
    result = inputs.detach().clone()
    for rows in _batches(len(inputs)):
        center, y, r = inputs[rows].detach(), labels[rows], radii[rows]
        best = _Worst(center)
        for restart in range(restarts):
            x = center if restart == 0 else _random_start(center, r, norm, bounds, generator)
            rival = None if restart == 0 else _rival(scores, center, y, restart)
            for step in range(steps):
                gains, gradient = _gradient(scores, x, y, rival)
                best.see(x, gains)
                length = first * (1 + math.cos(math.pi * step / steps)) / 2
                moved = x + length * _each(r.to(x), x) * _steepest(gradient, norm, generator)
                x = _within(center, moved, r, norm, bounds)
            best.see(x, _gain_of(scores, x, y))
        result[rows] = best.x
    return result


def fast_gradient_attack(
    scores: Scores,
    inputs: Float[Tensor, "rows ..."],
    labels: Tensor,
    *,
    radius: float | Float[Tensor, " rows"],
    norm: float = math.inf,
    bounds: Bounds | None = None,
    generator: torch.Generator,
) -> Float[Tensor, "rows ..."]:
    """Go once along the gradient, as far as the ball reaches.

    Args:
        scores: as in `projected_gradient_attack`.
        inputs: floating, finite.
        labels: int64 classes or real targets.
        radius: of the ball, >= 0, one or one for each input.
        norm: 1, 2 or inf.
        bounds: (lowest, highest) value that an input may have; the inputs lie within.
        generator: of a direction where the gradient is 0.

    Returns:
        The point after the step, or the input itself where that is worse for the model.

    Raises:
        DataError: if an argument cannot be used, or scores have no gradient.
    """
    return projected_gradient_attack(
        scores, inputs, labels, radius=radius, norm=norm, steps=1, step_size=1.0, bounds=bounds,
        generator=generator,
    )  # fmt: skip


@torch.no_grad()
def boundary_line_attack(
    scores: Scores,
    inputs: Float[Tensor, "rows ..."],
    labels: Int[Tensor, " rows"],
    *,
    radius: float | Float[Tensor, " rows"],
    norm: float = 2,
    directions: int = 50,
    towards: tuple[Tensor, Int[Tensor, " others"]] | None = None,
    bounds: Bounds | None = None,
    generator: torch.Generator,
) -> Float[Tensor, "rows ..."]:
    """Follow lines to the decision boundary and pull what is found into the ball; no gradient is asked for.

    Half of the lines of an input go to the nearest points with other labels, half in random directions.
    Where the far end of a line is classified otherwise, bisection finds the boundary. The point behind it is
    projected on the ball, and stays what it is if it lies inside.

    Args:
        scores: the model, ``(n, ...) -> (n, classes)``; it need not be differentiable.
        inputs: floating, finite.
        labels: int64 classes.
        radius: of the ball, >= 0, one or one for each input.
        norm: 1, 2 or inf.
        directions: lines of an input, at least 1.
        towards: points ``(others, ...)`` and their labels, such as the training rows; the inputs themselves
            if None.
        bounds: (lowest, highest) value that an input may have; the inputs lie within.
        generator: of the random directions.

    Returns:
        For each input the worst point found, itself included; never outside the ball or the bounds.

    Raises:
        DataError: if an argument cannot be used.
    """
    if directions < 1:
        raise DataError(f"directions is {directions}; give at least 1.")
    radii = _checked(inputs, labels, radius, norm, bounds)
    if labels.is_floating_point():
        raise DataError("labels are real numbers; a decision boundary needs int64 classes.")
    points, owners = _line_ends(inputs, (inputs, labels) if towards is None else towards, bounds)
    result = inputs.detach().clone()
    for rows in _batches(len(inputs)):
        center, y, r = inputs[rows].detach(), labels[rows], radii[rows]
        best = _Worst(center)
        best.see(center, _gain_of(scores, center, y))
        others = _nearest_others(center, y, points, owners, (directions + 1) // 2, norm)
        for line in range(directions):
            if line < others.shape[1]:
                end = points[others[:, line]]
            else:
                way = _unit(_noise(center, norm, generator), norm)
                end = _clipped(center + FAR * _each(r.to(center), center) * way, bounds)
            behind = _behind_boundary(scores, center, end, y)
            x = _within(center, behind, r, norm, bounds)
            best.see(x, _gain_of(scores, x, y))
        result[rows] = best.x
    return result


def gain(scores: Tensor, labels: Tensor) -> Float[Tensor, " rows"]:
    """How wrong scores are: what attacks make large.

    Args:
        scores: ``(rows, classes)``; for real targets ``(rows,)`` or ``(rows, outputs)``.
        labels: int64 classes ``(rows,)``, or real targets in the shape of the scores.

    Returns:
        max_{c != y} s_c - s_y, positive where a class is wrong; or the squared error.

    Raises:
        DataError: if shapes do not fit or a label is no column of the scores.
    """
    if labels.is_floating_point():
        if scores.shape != labels.shape:
            raise DataError(f"scores are {tuple(scores.shape)} and targets {tuple(labels.shape)}.")
        return (scores - labels).square().flatten(1).sum(1) if scores.ndim > 1 else (scores - labels).square()
    if scores.ndim != 2 or len(scores) != len(labels) or scores.shape[1] < 2:
        raise DataError(
            f"scores are {tuple(scores.shape)} for {len(labels)} labels; give (rows, classes) with two "
            "classes or more."
        )
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < scores.shape[1]:
        raise DataError(f"labels reach from {labels.min()} to {labels.max()}; scores have {scores.shape[1]}.")
    own = scores.gather(1, labels[:, None])[:, 0]
    return scores.scatter(1, labels[:, None], -math.inf).amax(1) - own


def project(
    offsets: Float[Tensor, "rows ..."], radius: float | Float[Tensor, " rows"], norm: float
) -> Float[Tensor, "rows ..."]:
    """The nearest points, in L2, of a ball around 0.

    Args:
        offsets: from the centre.
        radius: of the ball, one or one for each row.
        norm: 1, 2 or inf.

    Returns:
        Points with a norm of at most the radius, but for rounding.
    """
    r = _each(
        torch.as_tensor(radius, dtype=offsets.dtype, device=offsets.device).expand(len(offsets)), offsets
    )
    if norm == math.inf:
        return offsets.clamp(-r, r)
    flat, limit = offsets.flatten(1), r.flatten(1)
    if norm == 2:
        length = flat.norm(dim=1, keepdim=True)
        return torch.where(length > limit, flat * (limit / length), flat).view_as(offsets)
    # L1: shrink all by the one threshold at which what is left has the length (Duchi et al., figure 1)
    sizes = flat.abs()
    falling = sizes.sort(dim=1, descending=True).values
    excess = falling.cumsum(1) - limit
    ranks = torch.arange(1, flat.shape[1] + 1, device=flat.device)
    kept = (falling * ranks > excess).sum(1, keepdim=True).clamp_min(1)
    threshold = (excess.gather(1, kept - 1) / kept).clamp_min(0)
    return (flat.sign() * (sizes - threshold).clamp_min(0)).view_as(offsets)


def corrupt_labels(
    labels: Int[Tensor, " rows"],
    rate: float | Float[Tensor, "classes classes"],
    n_classes: int,
    generator: torch.Generator,
) -> Int[Tensor, " rows"]:
    """Replace some labels by wrong ones.

    Args:
        labels: classes in 0 .. n_classes - 1.
        rate: share of labels that become wrong, rounded to whole rows: each of those becomes one of the other
            classes, all alike. Or a matrix: the probabilities of the new label (column) given the old (row).
        n_classes: at least 2.
        generator: of the draws.

    Returns:
        New labels; those given stay as they are.

    Raises:
        DataError: if a label, the rate or the matrix cannot be.
    """
    if n_classes < 2 or (len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < n_classes):
        raise DataError(f"labels must be classes in 0 .. n_classes - 1 with n_classes {n_classes} >= 2.")
    if isinstance(rate, Tensor):
        rows_are_distributions = torch.allclose(rate.sum(-1), torch.ones_like(rate[..., 0]), atol=1e-5)
        if rate.shape != (n_classes, n_classes) or bool((rate < 0).any()) or not rows_are_distributions:
            raise DataError(f"rate must be {n_classes} rows of {n_classes} probabilities that sum to 1.")
        if len(labels) == 0:
            return labels.clone()
        return torch.multinomial(rate[labels], 1, generator=generator)[:, 0]
    if not 0 <= rate <= 1:
        raise DataError(f"rate is {rate}; a share lies in [0, 1].")
    chosen = torch.randperm(len(labels), generator=generator, device=labels.device)[
        : round(rate * len(labels))
    ]
    shift = torch.randint(1, n_classes, chosen.shape, generator=generator, device=labels.device)
    result = labels.clone()
    result[chosen] = (labels[chosen] + shift) % n_classes
    return result


# -- helpers -------------------------------------------------------------------------------------------------


class _Worst:
    """For each input the point with the greatest gain so far."""

    def __init__(self, x: Tensor) -> None:
        self.x = x.clone()
        self.gain = torch.full((len(x),), -math.inf, dtype=x.dtype, device=x.device)

    def see(self, x: Tensor, gains: Tensor) -> None:
        better = gains > self.gain
        self.gain = torch.where(better, gains.to(self.gain), self.gain)
        self.x = torch.where(_each(better, x), x, self.x)


@torch.no_grad()
def _gain_of(scores: Scores, x: Tensor, labels: Tensor) -> Tensor:
    return gain(scores(x), labels)


def _rival(scores: Scores, x: Tensor, labels: Tensor, restart: int) -> Tensor | None:
    """For each row a wrong class: the second best for restart 1, then on through all, then again.

    The greatest gain within a ball need not be that of the class that is second at its centre, and climbing
    the greatest of all leads gets stuck at the first (Gowal et al. 2019, arXiv 1910.09338).
    """
    if labels.is_floating_point():
        return None
    with torch.no_grad():
        others = scores(x).scatter(1, labels[:, None], -math.inf)
    rank = restart % (others.shape[1] - 1)
    return others.argsort(dim=1, descending=True)[:, rank]


def _gradient(scores: Scores, x: Tensor, labels: Tensor, rival: Tensor | None) -> tuple[Tensor, Tensor]:
    """The gains at x, and how they, or the lead of a rival, change with it."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        found = scores(x)
        gains = gain(found, labels)
        climbed = gains
        if rival is not None:
            climbed = (found.gather(1, rival[:, None]) - found.gather(1, labels[:, None]))[:, 0]
        if not gains.requires_grad:
            raise DataError(
                "scores have no gradient with respect to the inputs; compute them in torch without detaching "
                "them, or use boundary_line_attack."
            )
        (gradient,) = torch.autograd.grad(climbed.sum(), x)
    return gains.detach(), gradient


def _steepest(gradient: Tensor, norm: float, generator: torch.Generator) -> Tensor:
    """The direction of length 1 that climbs fastest; a random one where there is nothing to climb.

    In L1 that would be a single coordinate; the largest five percent go together, as in Tramer and Boneh.
    """
    lost = ~gradient.isfinite() | _each(gradient.flatten(1).abs().sum(1) == 0, gradient)
    if bool(lost.any()):
        gradient = torch.where(lost, _noise(gradient, norm, generator), gradient)
    if norm == math.inf:
        return gradient.sign()
    if norm == 1:
        sizes = gradient.flatten(1).abs()
        n = max(1, round(SPARSE * sizes.shape[1]))
        least = sizes.topk(n, dim=1).values[:, -1:]
        gradient = torch.where(sizes >= least, gradient.flatten(1).sign(), 0).view_as(gradient)
    return _unit(gradient, norm)


def _unit(directions: Tensor, norm: float) -> Tensor:
    length = torch.linalg.vector_norm(directions.flatten(1), norm, dim=1)
    return directions / _each(length.clamp_min(torch.finfo(directions.dtype).tiny), directions)


def _noise(like: Tensor, norm: float, generator: torch.Generator) -> Tensor:
    """Directions that, brought to length 1 in the norm, are spread over its sphere."""
    draw: dict[str, Any] = {"generator": generator, "dtype": like.dtype, "device": like.device}
    if norm == math.inf:  # uniform in the cube, then pushed to a face by `_unit`
        return 2 * torch.rand(like.shape, **draw) - 1
    if norm == 1:  # Laplace: the logarithm of a uniform number with a random sign
        sign = torch.randint(0, 2, like.shape, **draw) * 2 - 1
        return sign * -torch.rand(like.shape, **draw).clamp_min(torch.finfo(like.dtype).tiny).log()
    return torch.randn(like.shape, **draw)


def _random_start(
    center: Tensor, radius: Tensor, norm: float, bounds: Bounds | None, generator: torch.Generator
) -> Tensor:
    """Uniform in the ball: uniform on the sphere, at a distance that fills the volume evenly."""
    uniform = torch.rand(len(center), generator=generator, dtype=center.dtype, device=center.device)
    distance = radius.to(center) * uniform ** (1 / max(1, center[0].numel()))
    way = _unit(_noise(center, norm, generator), norm)
    return _within(center, center + _each(distance, center) * way, radius, norm, bounds)


def _within(center: Tensor, x: Tensor, radius: Tensor, norm: float, bounds: Bounds | None) -> Tensor:
    """x in the ball and the bounds, to the last digit.

    Clipping to bounds that hold the centre brings every coordinate closer to it, so that the ball is kept.
    The distance that counts is that of the rounded point. Where rounding has put it outside, it is pulled in
    by a part that grows until it is inside.
    """
    offset = project(x - center, radius, norm)
    point = _clipped(center + offset, bounds)
    pull = torch.finfo(x.dtype).eps
    while bool((outside := _distance(center, point, norm) > radius).any()):
        pull = min(4 * pull, 1.0)
        point = torch.where(_each(outside, point), _clipped(center + (1 - pull) * offset, bounds), point)
    return point


def _distance(a: Tensor, b: Tensor, norm: float) -> Tensor:
    return torch.linalg.vector_norm((a.double() - b.double()).flatten(1), norm, dim=1)


def _clipped(x: Tensor, bounds: Bounds | None) -> Tensor:
    if bounds is None:
        return x
    low, high = (torch.as_tensor(bound, dtype=x.dtype, device=x.device) for bound in bounds)
    return torch.minimum(torch.maximum(x, low), high)


def _behind_boundary(scores: Scores, start: Tensor, end: Tensor, labels: Tensor) -> Tensor:
    """The first found wrong point of the lines from start to end; the end where it is not wrong."""
    wrong_end = gain(scores(end), labels) > 0
    low, high = torch.zeros_like(wrong_end, dtype=start.dtype), torch.ones_like(wrong_end, dtype=start.dtype)
    if bool(wrong_end.any()):
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            wrong = gain(scores(torch.lerp(start, end, _each(middle, start))), labels) > 0
            low, high = torch.where(wrong, low, middle), torch.where(wrong, middle, high)
    place = torch.where(wrong_end, high, 1.0)
    return torch.lerp(start, end, _each(place, start))


def _line_ends(
    inputs: Tensor, towards: tuple[Tensor, Tensor], bounds: Bounds | None
) -> tuple[Tensor, Tensor]:
    """Points within the bounds, and their labels.

    Raises:
        DataError: if their shapes do not go with the inputs.
    """
    points, owners = towards
    if points.shape[1:] != inputs.shape[1:] or len(points) != len(owners):
        raise DataError(
            f"towards are {tuple(points.shape)} with {len(owners)} labels for inputs {tuple(inputs.shape)}; "
            "give points in the shape of the inputs, and a label for each."
        )
    return _clipped(points.to(inputs), bounds), owners.to(inputs.device)


def _nearest_others(x: Tensor, labels: Tensor, points: Tensor, owners: Tensor, n: int, norm: float) -> Tensor:
    """Indices of the n nearest points with another label, ``(rows, n)``; fewer if there are not so many."""
    distances = torch.cdist(x.flatten(1), points.flatten(1), p=float(norm))
    alike = labels[:, None] == owners
    available = int((~alike).sum(1).min()) if len(alike) else 0
    nearest = distances.masked_fill(alike, math.inf).topk(min(n, available), dim=1, largest=False)
    return nearest.indices


def _each(values: Tensor, like: Tensor) -> Tensor:
    """Values of rows, in a shape that goes with the rows."""
    return values.view(-1, *[1] * (like.ndim - 1))


def _batches(n: int) -> Iterator[slice]:
    return (slice(i, i + BATCH) for i in range(0, n, BATCH))


def _checked(
    inputs: Tensor, labels: Tensor, radius: float | Tensor, norm: float, bounds: Bounds | None
) -> Tensor:
    """The radii ``(rows,)`` of arguments that can be used.

    Raises:
        DataError: naming the argument and what it must be.
    """
    if not inputs.is_floating_point() or inputs.ndim < 2 or not bool(inputs.isfinite().all()):
        raise DataError("inputs must be finite floating numbers in rows, (rows, ...).")
    if len(labels) != len(inputs) or not (labels.is_floating_point() or labels.dtype == torch.int64):
        raise DataError(
            f"labels are {tuple(labels.shape)} {labels.dtype} for {len(inputs)} inputs; give one int64 "
            "class, or one real target, for each."
        )
    if norm not in NORMS:
        raise DataError(f"norm is {norm}; it must be 1, 2 or inf.")
    radii = torch.as_tensor(radius, dtype=torch.float64, device=inputs.device)
    if radii.ndim > 1 or (radii.ndim == 1 and len(radii) != len(inputs)):
        raise DataError(f"radius has shape {tuple(radii.shape)}; give one number or one for each input.")
    if not bool((radii.isfinite() & (radii >= 0)).all()):
        raise DataError("radius must be finite and >= 0; clip infinite or negative certificates first.")
    if bounds is not None and not bool((_clipped(inputs, bounds) == inputs).all()):
        raise DataError("some inputs lie outside bounds; give bounds that hold all of them.")
    return radii.expand(len(inputs))
