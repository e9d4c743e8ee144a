"""Fixed points of batched maps, and gradients through them without storing the iteration.

`fixed_point` iterates x <- step(x), plainly or with Anderson acceleration, until every sample has converged;
samples that have are taken out of the batch. `fista` is the accelerated proximal gradient method with
restarts, `peaceman_rachford` the splitting that needs a resolvent, `conjugate_gradient` the batched linear
solver that implicit gradients need. `FixedPoint` is an equilibrium layer: it solves without a graph and
differentiates by the implicit function theorem.

Sources: Walker and Ni, Anderson acceleration for fixed-point iterations (2011); O'Donoghue and Candès,
    Adaptive restart for accelerated
gradient schemes (2015); Winston and Kolter, Monotone operator equilibrium networks (2020); Bai, Kolter and
Koltun, Deep equilibrium models (2019).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

Step = Callable[[Tensor], Tensor]
Restrict = Callable[[Tensor], Step]
Safeguard = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Solution:
    """Where an iteration ended.

    Attributes:
        x: the last iterates ``(batch, n)``.
        steps: applications of the map that each sample took ``(batch,)``.
        residual: relative change |step(x) - x| / |step(x)| at the end ``(batch,)``.
        converged: whether the residual came below the tolerance ``(batch,)``.
        history: the residual after each step ``(steps, batch)``; a sample that has converged keeps its last
            value.
    """

    x: Float[Tensor, "batch n"]
    steps: Int[Tensor, " batch"]
    residual: Float[Tensor, " batch"]
    converged: Bool[Tensor, " batch"]
    history: Float[Tensor, "steps batch"]


class _Progress:
    """Bookkeeping of a batched iteration: which samples still run, and what has been reached for each."""

    def __init__(self, start: Tensor, tol: float, damping: float = 1.0) -> None:
        batch = len(start)
        self.tol, self.damping = tol, damping
        self.x = start.clone()
        self.rows = torch.arange(batch, device=start.device)  # the samples that still run
        self.steps = torch.zeros(batch, dtype=torch.int64, device=start.device)
        self.residual = torch.full((batch,), torch.inf, dtype=start.dtype, device=start.device)
        self.history: list[Tensor] = []

    def record(self, image: Tensor, change: Tensor) -> Tensor:
        """Note one step of the running samples; returns which of them go on."""
        tiny = torch.finfo(image.dtype).tiny
        size = self.damping * torch.linalg.vector_norm(image, dim=1).clamp(min=tiny)
        residual = torch.linalg.vector_norm(change, dim=1) / size
        self.steps[self.rows] += ~(
            self.residual[self.rows] <= self.tol
        )  # a sample that is only iterated along takes no further steps
        self.residual[self.rows] = residual
        self.history.append(self.residual.clone())
        return ~(residual <= self.tol)

    def keep(self, image: Tensor, running: Tensor) -> None:
        """Store the iterates of the running samples and narrow to those that go on."""
        self.x[self.rows] = image
        self.rows = self.rows[running]

    def solution(self) -> Solution:
        history = (
            torch.stack(self.history) if self.history else self.residual.new_zeros(0, len(self.residual))
        )
        return Solution(self.x, self.steps, self.residual, self.residual <= self.tol, history)


@torch.no_grad()
def fixed_point(
    step: Step,
    start: Float[Tensor, "batch n"],
    *,
    tol: float = 1e-3,
    max_steps: int = 200,
    memory: int = 5,
    ridge: float = 1e-6,
    damping: float = 1.0,
    restrict: Restrict | None = None,
    safeguard: Safeguard | None = None,
) -> Solution:
    """Iterate x <- step(x) to a fixed point, each sample by itself.

    Args:
        step: the map; samples must not influence each other.
        start: first iterates ``(batch, n)``; not changed.
        tol: a sample is done when |step(x) - x| <= tol |step(x)|.
        max_steps: most applications of the map.
        memory: iterates that Anderson acceleration mixes; 1 is the plain iteration.
        ridge: regulariser of the mixing problem, relative to its mean diagonal.
        damping: d of a step x + d (T(x) - x); the tolerance is then for the change of the undamped map T.
        restrict: given the indices of the samples that still run, the map for these alone. With it, samples
            that have converged cost nothing further; without it, they are iterated along.
        safeguard: ``(mixed, plain) -> next``, a last word on each mixed iterate, for maps with a domain.

    Returns:
        The solution; samples that did not converge say so.
    """
    progress = _Progress(start, tol, damping)
    x = start
    shape = (len(start), memory, start.shape[1])
    images, changes = (start.new_empty(shape), start.new_empty(shape)) if memory > 1 else (start, start)
    gram = start.new_zeros(len(start), memory, memory)
    for count in range(max_steps):
        image = step(x)
        change = image - x
        running = progress.record(image, change)
        if not running.any() or count == max_steps - 1:
            progress.keep(image, running)
            break
        if restrict is not None and 2 * int(running.sum()) <= len(running):
            progress.keep(image, running)
            step = restrict(progress.rows)
            image, change, gram = image[running], change[running], gram[running]
            if memory > 1:
                images, changes = images[running], changes[running]
        if memory == 1:
            x = image
            continue
        slot, used = count % memory, min(count + 1, memory)
        images[:, slot], changes[:, slot] = image, change
        products = torch.bmm(changes[:, :used], change[:, :, None])[:, :, 0]
        gram[:, slot, :used] = gram[:, :used, slot] = products
        x = torch.bmm(_mixing_weights(gram[:, :used, :used], ridge)[:, None], images[:, :used])[:, 0]
        if safeguard is not None:
            x = safeguard(x, image)
    return progress.solution()


def _mixing_weights(gram: Tensor, ridge: float) -> Tensor:
    """Weights a, summing to one, that minimise |sum_i a_i change_i|^2 + ridge |a|^2: the solution of (G +
    ridge) a ~ 1.
    """
    diagonal = gram.diagonal(dim1=1, dim2=2)
    scale = diagonal.mean(1, keepdim=True).clamp(min=torch.finfo(gram.dtype).tiny)
    system = gram / scale[:, :, None] + ridge * torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    weights = torch.linalg.solve(system, torch.ones_like(diagonal))
    return weights / weights.sum(1, keepdim=True)


@torch.no_grad()
def fista(
    step: Step, start: Float[Tensor, "batch n"], *, tol: float = 1e-3, max_steps: int = 500
) -> Solution:
    """Accelerated proximal gradient with a restart, sample by sample, whenever the momentum points uphill.

    Args:
        step: one proximal gradient step with a step size of at most 1 / L.
        start: first iterates ``(batch, n)``.
        tol: as in `fixed_point`, for the change that the step makes at the extrapolated point.
        max_steps: most applications of the step.

    Returns:
        The solution.
    """
    progress = _Progress(start, tol)
    x, point = start, start
    momentum = start.new_ones(len(start), 1)
    for _ in range(max_steps):
        image = step(point)
        running = progress.record(image, image - point)
        uphill = ((point - image) * (image - x)).sum(1, keepdim=True) > 0
        grown = torch.where(uphill, 1.0, 0.5 * (1.0 + (1.0 + 4.0 * momentum**2).sqrt()))
        weight = torch.where(uphill, 0.0, (momentum - 1.0) / grown)
        point, x, momentum = image + weight * (image - x), image, grown
        if not running.any():
            break
    progress.x = x
    return progress.solution()


@torch.no_grad()
def peaceman_rachford(
    resolvent: Step,
    prox: Step,
    start: Float[Tensor, "batch n"],
    *,
    tol: float = 1e-3,
    max_steps: int = 500,
) -> Solution:
    """Peaceman-Rachford splitting for 0 in A(x) + B(x): u <- R_A(R_B(u)) with the reflections R = 2 J - 1.

    Args:
        resolvent: J_A, the resolvent of the affine part.
        prox: J_B, the proximal operator of the other part; the solution is its value.
        start: first u ``(batch, n)``.
        tol: as in `fixed_point`, for the change of u.
        max_steps: most iterations.

    Returns:
        The solution, with x = J_B(u).
    """

    def reflect(u: Tensor) -> Tensor:
        mirrored = 2.0 * prox(u) - u
        return 2.0 * resolvent(mirrored) - mirrored

    solution = fixed_point(reflect, start, tol=tol, max_steps=max_steps, memory=1)
    return Solution(prox(solution.x), solution.steps, solution.residual, solution.converged, solution.history)


@torch.no_grad()
def conjugate_gradient(
    operator: Step,
    rhs: Float[Tensor, "batch n"],
    precondition: Step,
    *,
    tol: float = 1e-6,
    max_steps: int = 100,
) -> Solution:
    """Preconditioned conjugate gradients for a symmetric positive (semi-)definite operator, each sample by
    itself.

    Args:
        operator: x -> K x on ``(batch, n)``.
        rhs: right-hand sides in the range of K.
        precondition: r -> approximately K^-1 r, symmetric positive.
        tol: stop when the preconditioned residual has fallen to this fraction of its first value.
        max_steps: most applications of the operator.

    Returns:
        The solution; `residual` is the ratio that `tol` bounds.
    """
    x, r = torch.zeros_like(rhs), rhs.clone()
    z = precondition(r)
    p, rho = z, (r * z).sum(1)
    first = rho.clamp(min=torch.finfo(rhs.dtype).tiny)
    steps = torch.zeros(len(rhs), dtype=torch.int64, device=rhs.device)
    ratio = (rho / first).clamp(min=0).sqrt()
    history = []
    for _ in range(max_steps):
        running = ratio > tol
        if not running.any():
            break
        image = operator(p)
        curvature = (p * image).sum(1)
        # A sample that has converged, or whose curvature is rounding error, stays where it is.
        moving = running & (curvature > 0)
        length = torch.where(moving, rho / curvature, 0.0)
        x = x + length[:, None] * p
        r = r - length[:, None] * image
        z = precondition(r)
        rho, previous = (r * z).sum(1), rho
        p = torch.where(moving[:, None], z + (rho / previous)[:, None] * p, 0.0)
        steps += running
        ratio = torch.where(running, (rho / first).clamp(min=0).sqrt(), ratio)
        history.append(ratio)
    return Solution(
        x, steps, ratio, ratio <= tol, torch.stack(history) if history else ratio.new_zeros(0, len(rhs))
    )


class FixedPoint(nn.Module):
    """An equilibrium layer: x* = step(x*, *inputs), differentiable in the inputs and in what the step closes
    over.

    The forward iteration runs without a graph. One tracked step at the solution carries the gradient out, and
    the linear system y = J'y + g of the implicit function theorem is solved by the same iteration with
    vector-Jacobian products of that step.

    Args:
        step: ``(x, *inputs) -> x`` on ``(batch, n)``, a contraction near its fixed point.
        tol: tolerance of the forward solve.
        backward_tol: tolerance of the backward solve.
        max_steps: most steps of each solve.
        memory: Anderson memory of each solve; 1 is the plain iteration.

    Source: Bai, Kolter and Koltun (2019), theorem 1.
    """

    def __init__(
        self,
        step: Callable[..., Tensor],
        tol: float = 1e-4,
        backward_tol: float = 1e-6,
        max_steps: int = 200,
        memory: int = 5,
    ) -> None:
        super().__init__()
        self.step = step
        self.tol = tol
        self.backward_tol = backward_tol
        self.max_steps = max_steps
        self.memory = memory

    def forward(
        self, start: Float[Tensor, "batch n"], *inputs: Tensor
    ) -> tuple[Float[Tensor, "batch n"], Solution]:
        """Solve from `start`; returns the differentiable fixed point and how the forward solve went."""
        solution = fixed_point(
            lambda x: self.step(x, *inputs), start, tol=self.tol, max_steps=self.max_steps, memory=self.memory
        )
        if not torch.is_grad_enabled():
            return solution.x, solution
        tracked = self.step(solution.x, *inputs)
        point = solution.x.detach().requires_grad_()
        image = self.step(point, *inputs)

        def solve(gradient: Tensor) -> Tensor:
            def pull(y: Tensor) -> Tensor:
                with torch.enable_grad():
                    return torch.autograd.grad(image, point, y, retain_graph=True)[0] + gradient

            return fixed_point(
                pull, gradient, tol=self.backward_tol, max_steps=self.max_steps, memory=self.memory
            ).x

        if tracked.requires_grad:
            tracked.register_hook(solve)
        return tracked, solution
