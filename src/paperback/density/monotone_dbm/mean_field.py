"""Mean-field inference: the minimiser of F(q) = -H(q) - 1/2 q'Phi q - b'q over products of categoricals
(paper, section 3).

Its stationary points are q_i = softmax((Phi q + b)_i). With the convex f(q) = sum q log q - 1/2 |q|^2 on the
simplexes they solve 0 in (I - Phi) q - b + df(q), and splitting methods find the one solution of a monotone
model:

    forward-backward:  q <- prox^alpha_f((1 - alpha) q + alpha (Phi q + b)).

F is strictly convex on the simplexes whenever Phi < 2 I there (-H is 2-strongly convex along directions that
sum to zero), and the iteration contracts with factor max(|1 - alpha + alpha lmax|, |1 - alpha + alpha lmin|)
/ (1 + alpha) if lmax < 2, alpha < 2 / |lmin|.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from paperback.density.monotone_dbm.hollow import Coupling, DenseCoupling
from paperback.density.monotone_dbm.proximal import solve_prox
from paperback.density.monotone_dbm.structure import Structure
from paperback.errors import DataError
from paperback.numerics.fixed_point import Solution, conjugate_gradient, fista, fixed_point, peaceman_rachford

Solver = Literal[
    "auto",
    "mirror",
    "anderson",
    "forward_backward",
    "peaceman_rachford",
    "fista",
    "tiers",
    "krahenbuhl",
    "parallel",
]
SOLVERS: tuple[Solver, ...] = get_args(Solver)
KRAHENBUHL_DAMPING = 0.5
BOLD = 5.0  # accelerated mirror descent takes steps so many times the sure one
PATIENCE = 10  # and has so many times the iterations to finish plainly


class NotConverged(UserWarning):
    """Mean-field inference stopped before it reached its tolerance."""


@dataclass(frozen=True)
class MeanFieldProblem:
    """A batch of mean-field problems that share Phi.

    Attributes:
        structure: the variables.
        coupling: Phi.
        bias: b, ``(N,)``.
        known: one-hot values of the observed variables, zero elsewhere ``(batch, N)``.
        observed: flat mask of the observed variables ``(batch, N)``.
        smallest: smallest eigenvalue of Phi, for the step size.
        monotone: whether the eigenvalues of Phi are known to lie below 2.
    """

    structure: Structure
    coupling: Coupling
    bias: Float[Tensor, " N"]
    known: Float[Tensor, "batch N"]
    observed: Bool[Tensor, "batch N"]
    smallest: float
    monotone: bool

    def restrict(self, rows: Tensor) -> MeanFieldProblem:
        """The problems with these indices alone."""
        return MeanFieldProblem(
            self.structure,
            self.coupling,
            self.bias,
            self.known[rows],
            self.observed[rows],
            self.smallest,
            self.monotone,
        )

    def clamp(self, q: Tensor) -> Tensor:
        """q with the observed variables at their values."""
        return torch.where(self.observed, self.known, q)

    def logits(self, q: Tensor) -> Tensor:
        """Phi q + b."""
        return self.coupling(q) + self.bias

    def update(self, q: Tensor) -> Tensor:
        """The undamped parallel update softmax(Phi q + b), observed variables kept."""
        return self.clamp(self.structure.softmax(self.logits(q)))

    def forward_backward(self, q: Tensor, alpha: float) -> Tensor:
        """One step q <- prox^alpha_f((1 - alpha) q + alpha (Phi q + b)), observed variables kept.

        Near the solution the proximal operator hardly moves q, so its Newton iteration starts there. What it
        gives for observed variables is thrown away; they are made uniform before, which it leaves at once.
        """
        point = self.logits(q).mul_(alpha).add_(q, alpha=1.0 - alpha)
        near = q.clamp(min=torch.finfo(q.dtype).tiny)
        for t in self.structure.visible + (
            (self.structure.class_tier,) if self.structure.class_tier is not None else ()
        ):
            part, states = self.structure.slices[t], self.structure.tiers[t].states
            point[:, part].masked_fill_(self.observed[:, part], 0.0)
            near[:, part].masked_fill_(self.observed[:, part], 1.0 / states)
        return self.clamp(self.prox(point, alpha, near))

    def prox(self, point: Tensor, alpha: float, start: Tensor | None = None) -> Tensor:
        """prox^alpha_f over the states of every variable, its Newton iteration started at `start` where that
        is given.
        """
        if alpha == 1.0:
            return self.structure.softmax(point)
        tiers = self.structure.split(point)
        starts = [None] * len(tiers) if start is None else self.structure.split(start)
        solved = [solve_prox(tier, alpha, 2, near) for tier, near in zip(tiers, starts, strict=True)]
        return torch.cat([tier.flatten(1) for tier in solved], 1)

    def step_size(self) -> float:
        """Default alpha: min(.8, 1.7 / |lmin|), and 1 (plain softmax) where that is a contraction already."""
        return min(0.8, 1.7 / max(abs(self.smallest), 1e-12))

    def mirror_step_size(self) -> float:
        """Largest step at which mirror descent is known to go down, 1 / (1 + |lmin| / 2)."""
        return 1.0 / (1.0 + 0.5 * abs(self.smallest))

    def start(self) -> Tensor:
        """Softmax of the bias, observed variables at their values."""
        uniform = self.structure.softmax(self.bias[None]).expand(len(self.known), -1)
        return self.clamp(uniform)

    def free_energy(self, q: Tensor) -> Float[Tensor, " batch"]:
        """F(q) = sum q log q - 1/2 q'Phi q - b'q; an observed variable has energy but no entropy."""
        entropy = -torch.special.entr(q).sum(1)
        return entropy - 0.5 * (q * self.coupling(q)).sum(1) - q @ self.bias

    def residual(self, q: Tensor) -> Float[Tensor, " batch"]:
        """max |q - softmax(Phi q + b)| of each sample: 0 exactly at a fixed point."""
        return (q - self.update(q)).abs().amax(1)


@dataclass(frozen=True)
class MeanField:
    """The answer of mean-field inference.

    Attributes:
        q: marginals of all variables, visible, hidden and class, as a flat vector ``(batch, N)``.
        logits: Phi q + b ``(batch, N)``; q = softmax(logits) at the solution.
        visible: marginals of the data variables ``(batch, n_variables, max_states)``; observed ones are
            one-hot.
        class_probabilities: ``(batch, n_classes)``, or None without a class tier.
        steps: iterations that each sample took.
        residual: max |q - softmax(Phi q + b)| over the free variables of each sample.
        converged: whether the tolerance was reached.
        free_energy: F(q), an upper bound on minus the log-partition function of the clamped model.
        history: relative change after each iteration ``(steps, batch)``.
    """

    q: Float[Tensor, "batch N"]
    logits: Float[Tensor, "batch N"]
    visible: Float[Tensor, "batch variables states"]
    class_probabilities: Float[Tensor, "batch classes"] | None
    steps: Int[Tensor, " batch"]
    residual: Float[Tensor, " batch"]
    converged: Bool[Tensor, " batch"]
    free_energy: Float[Tensor, " batch"]
    history: Float[Tensor, "steps batch"]


def solve(
    problem: MeanFieldProblem,
    solver: Solver,
    *,
    alpha: float | Literal["auto"] = "auto",
    tol: float = 1e-3,
    max_steps: int = 500,
    start: Float[Tensor, "batch N"] | None = None,
) -> Solution:
    """Solve a batch of mean-field problems.

    Args:
        problem: what to solve.
        solver: "mirror" (accelerated mirror descent), "anderson" (accelerated forward-backward, the paper's),
            "forward_backward", "peaceman_rachford" (dense engine), "fista", "tiers" (exact minimisation tier
            by tier), or the baselines without a guarantee "krahenbuhl" (damped by a half) and "parallel"
            (undamped). "auto" is "peaceman_rachford" where Phi is a matrix with eigenvalues below 2, and
            "mirror" elsewhere: the fastest of each on trained models.
        alpha: step size in (0, 1], or "auto": 1 for Peaceman-Rachford (its proximal operator is then a
            softmax), five times the step that is sure for mirror descent, else `step_size`.
        tol: relative change at which a sample is done: of the iterates, for mirror descent of the logits in
            an undamped step.
        max_steps: most iterations.
        start: first iterates ``(batch, N)``, for a warm start.

    Returns:
        The solution; what did not converge says so.

    Raises:
        DataError: if the solver does not exist or does not fit the structure or the engine, or alpha is out
            of range.
    """
    if solver not in SOLVERS:
        raise DataError(f"solver is {solver!r}; it must be one of {', '.join(SOLVERS)}.")
    if alpha != "auto" and not 0.0 < alpha <= 1.0:
        raise DataError(f'alpha is {alpha}; it must lie in (0, 1] or be "auto".')
    if solver == "auto":
        solver = (
            "peaceman_rachford"
            if problem.monotone and isinstance(problem.coupling, DenseCoupling)
            else "mirror"
        )
    # Peaceman-Rachford takes any step; at 1 its proximal operator is a softmax.
    automatic = 1.0 if solver == "peaceman_rachford" else problem.step_size()
    size = automatic if alpha == "auto" else float(alpha)
    first = problem.start() if start is None else problem.clamp(start)
    if solver == "mirror":
        return _mirror_descent(problem, None if alpha == "auto" else size, start, tol, max_steps)
    if solver in ("anderson", "forward_backward"):
        return fixed_point(
            lambda q: problem.forward_backward(q, size),
            first,
            memory=5 if solver == "anderson" else 1,
            restrict=lambda rows: _forward_backward_of(problem.restrict(rows), size),
            safeguard=_stay_positive,
            tol=tol,
            max_steps=max_steps,
        )
    if solver == "fista":
        smooth = min(size, 1.0 / (1.0 - problem.smallest))  # momentum needs steps of at most 1 / ||I - Phi||
        return fista(lambda q: problem.forward_backward(q, smooth), first, tol=tol, max_steps=max_steps)
    if solver == "peaceman_rachford":
        return _peaceman_rachford(problem, size, first, tol=tol, max_steps=max_steps)
    if solver == "tiers":
        return fixed_point(_tier_sweep(problem), first, memory=1, tol=tol, max_steps=max_steps)
    damping = KRAHENBUHL_DAMPING if solver == "krahenbuhl" else 1.0
    return fixed_point(
        lambda q: torch.lerp(q, problem.update(q), damping), first, memory=1, tol=tol, max_steps=max_steps
    )


def _mirror_descent(
    problem: MeanFieldProblem, alpha: float | None, start: Tensor | None, tol: float, max_steps: int
) -> Solution:
    """Accelerated mirror descent on F in the geometry of -H: logits u <- (1 - a) u + a (Phi softmax(u) + b).

    -H is 2-strongly convex on the simplexes, so the quadratic part is smooth relative to it with constant
    |lmin| / 2, and F falls in every plain step with a <= 1 / (1 + |lmin| / 2), linearly if lmax < 2. A step
    costs one softmax where forward-backward has a proximal operator to solve, and mixed iterates need no
    guard, as all logits are allowed. Accelerated, steps several times longer converge faster still; samples
    that do not are taken up again, plainly, with the step that is sure.
    """

    def step_of(part: MeanFieldProblem, size: float) -> Callable[[Tensor], Tensor]:
        return lambda u: torch.lerp(u, part.logits(part.clamp(part.structure.softmax(u))), size)

    first = (
        problem.bias.expand(len(problem.known), -1)
        if start is None
        else start.clamp(min=torch.finfo(start.dtype).tiny).log()
    )
    sure = problem.mirror_step_size()
    size = min(0.8, BOLD * sure) if alpha is None else alpha
    solution = fixed_point(
        step_of(problem, size),
        first,
        tol=tol,
        max_steps=max_steps,
        damping=size,
        restrict=lambda rows: step_of(problem.restrict(rows), size),
    )
    u, steps, residual, converged = solution.x, solution.steps, solution.residual, solution.converged
    failed = (~converged).nonzero()[:, 0]
    if alpha is None and len(failed) and problem.monotone:
        again = problem.restrict(failed)
        plain = fixed_point(
            step_of(again, sure),
            first[failed],
            tol=tol,
            max_steps=PATIENCE * max_steps,
            memory=1,
            damping=sure,
        )
        u = u.index_copy(0, failed, plain.x)
        steps = steps.index_add(0, failed, plain.steps)
        residual = residual.index_copy(0, failed, plain.residual)
        converged = converged.index_copy(0, failed, plain.converged)
    q = problem.clamp(problem.structure.softmax(u))
    return Solution(q, steps, residual, converged, solution.history)


def _forward_backward_of(problem: MeanFieldProblem, alpha: float) -> Callable[[Tensor], Tensor]:
    return lambda q: problem.forward_backward(q, alpha)


def _stay_positive(mixed: Tensor, plain: Tensor) -> Tensor:
    """Mixed iterates have rows that sum to one but may leave the simplex: a little is cut off, a lot is not
    trusted.
    """
    wild = mixed.amin(1, keepdim=True) < -0.5
    return torch.where(wild, plain, mixed.clamp_(min=torch.finfo(mixed.dtype).tiny))


def _peaceman_rachford(
    problem: MeanFieldProblem, alpha: float, start: Tensor, tol: float, max_steps: int
) -> Solution:
    """Peaceman-Rachford splitting with one unit of f's strong convexity moved to the affine part, so that it
    covers limits up to 2.

    0 in (2 I - Phi) q - b + d(f - 1/2 |.|^2)(q): both parts are monotone when Phi < 2 I. The step size a =
    alpha / (1 + alpha) makes the proximal operator of the second part prox^alpha_f((1 + alpha) u). Observed
    variables stay in the linear system, which is then the same for all samples and factored once; the
    proximal step holds them, as their indicator function belongs to f.
    """
    if not isinstance(problem.coupling, DenseCoupling):
        raise DataError('solver "peaceman_rachford" factors 2 I - Phi; it needs engine="dense".')
    phi, step = problem.coupling.phi, alpha / (1.0 + alpha)
    system = (1.0 + 2.0 * step) * torch.eye(len(phi), dtype=phi.dtype, device=phi.device) - step * phi
    factor, information = torch.linalg.cholesky_ex(system)
    if int(information):
        raise DataError(
            f"I + a (2 I - Phi) is not positive definite at alpha = {alpha:g}; the coupling is not monotone."
        )

    def resolvent(u: Tensor) -> Tensor:
        return torch.cholesky_solve((u + step * problem.bias).T, factor).T

    def prox(u: Tensor) -> Tensor:
        return problem.clamp(problem.prox((1.0 + alpha) * u, alpha))

    return peaceman_rachford(resolvent, prox, start, tol=tol, max_steps=max_steps)


def _tier_sweep(problem: MeanFieldProblem) -> Callable[[Tensor], Tensor]:
    """One sweep of exact block minimisation, tier by tier; only for tiers without connections inside."""
    structure = problem.structure
    for t, part in enumerate(structure.slices):
        probe = torch.zeros(1, structure.size, dtype=problem.bias.dtype, device=problem.bias.device)
        generator = torch.Generator().manual_seed(0)
        probe[:, part] = torch.randn(1, structure.tiers[t].size, generator=generator).to(probe)
        if problem.coupling(probe)[:, part].abs().amax() > 1e-6 * probe.abs().amax():
            raise DataError(
                f'solver "tiers" needs tiers without inner connections; tier {t} has some. Use "anderson".'
            )

    def sweep(q: Tensor) -> Tensor:
        q = q.clone()
        for part in structure.slices:
            q[:, part] = problem.update(q)[:, part]
        return q

    return sweep


def check_converged(solution: Solution, residual: Tensor, tol: float, strict: bool) -> None:
    """Warn, or raise if `strict`, where some samples did not converge; names how many, the worst residual
    and the remedy.
    """
    failed = int((~solution.converged).sum())
    if not failed:
        return
    message = (
        f"mean-field inference did not converge for {failed} of {len(solution.converged)} samples in "
        f"{int(solution.steps.max())} steps "
        f"(tolerance {tol:g}, largest residual {float(residual.max()):.2g}); "
        'raise max_steps, lower alpha, or use solver="anderson".'
    )
    if strict:
        raise DataError(message)
    warnings.warn(message, NotConverged, stacklevel=4)


# -- gradients ----------------------------------------------------------------------------------------------


class ImplicitMeanField(torch.autograd.Function):
    """q*(logits) at the solution: forward returns q*, backward the implicit derivative by preconditioned
    conjugate gradients.

    q = softmax(l), l = Phi q + b, has dq = S (Phi dq + dl) with S = blkdiag(diag q_i - q_i q_i') and dl the
    change of l through the weights at fixed q. So dL/dl = S w with (I - Phi S) w = g. Multiplied by S the
    system is symmetric and positive on the tangent space of
    the simplexes: (S - S Phi S) w = S g. Observed variables do not move: S = 0 there.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, q: Tensor, problem: MeanFieldProblem, tol: float, max_steps: int
    ) -> Tensor:
        ctx.save_for_backward(q)
        ctx.problem, ctx.tol, ctx.max_steps = problem, tol, max_steps
        return q.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        (q,) = ctx.saved_tensors
        return implicit_gradient(ctx.problem, q, gradient, ctx.tol, ctx.max_steps)[0], None, None, None, None


def implicit_gradient(
    problem: MeanFieldProblem, q: Tensor, gradient: Tensor, tol: float, max_steps: int
) -> tuple[Tensor, Solution]:
    """S w, the gradient with respect to l = Phi q + b at fixed q, and how its linear solve went."""
    structure, coupling = problem.structure, problem.coupling
    free = torch.where(problem.observed, 0.0, q)
    safe = free.clamp(min=torch.finfo(q.dtype).tiny)

    def covariance(w: Tensor) -> Tensor:  # S w
        parts = [(a * b) for a, b in zip(structure.split(free), structure.split(w), strict=True)]
        means = [part.sum(2, keepdim=True) for part in parts]
        return torch.cat(
            [
                (part - a * mean).flatten(1)
                for part, a, mean in zip(parts, structure.split(free), means, strict=True)
            ],
            1,
        )

    def precondition(r: Tensor) -> Tensor:  # the pseudo-inverse of S on the tangent space
        scaled = torch.where(problem.observed, 0.0, r / safe)
        return torch.cat(
            [(part - part.mean(2, keepdim=True)).flatten(1) for part in structure.split(scaled)], 1
        )

    def operator(w: Tensor) -> Tensor:  # (S - S Phi S) w
        spread = covariance(w)
        return spread - covariance(coupling(spread))

    solution = conjugate_gradient(operator, covariance(gradient), precondition, tol=tol, max_steps=max_steps)
    return covariance(solution.x), solution
