"""Monotone deep Boltzmann machine beside its peers: one solve, the proximal operator, the backward pass, and
the RBM baseline.

    python benchmarks/density/monotone_dbm.py [--repeats 5] [--threads 1]

1. The fixed point of a batch of 128 images of 28x28 in 20 grey bins, convolutional tiers as in the paper, to
relative change 1e-3: ours
   against a direct transcription of the authors' method (damped iteration at alpha = 1/8 or what their
   halving rule finds, Anderson acceleration with one stopping rule for the batch, nested Newton and Halley
   loops to 1e-4, diagonal blocks built in every iteration). The transcription is ours, written from the paper
   and the published description; its couplings are scaled symmetrically, as ours are, so that both solve the
   same equation. Same weights, same masks; the answers are compared.
2. The proximal operator alone, on the same points.
3. torchdeq (if installed): our forward-backward step in its Anderson solver with its implicit backward,
against ours.
4. scikit-learn's BernoulliRBM against our RBM baseline on binarised digits: pseudo-likelihood and seconds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from paperback.density.monotone_dbm import MonotoneDBM, Structure
from paperback.density.monotone_dbm.mean_field import ImplicitMeanField, MeanFieldProblem, solve
from paperback.density.monotone_dbm.proximal import solve_prox
from paperback.density.monotone_dbm.structure import padding

TIERS = [("visible", 20, 1, 28, 28), ("hidden", 4, 10, 14, 14), ("hidden", 4, 20, 7, 7), ("class", 10, 1)]
CONNECTIONS = [(20, (3, 0, 0, 0)), (40, (3, 3, 0, 0)), (80, (3, 3, 3, 0)), (10, (0, 0, 1, 1))]
BATCH, TOLERANCE = 128, 1e-3


# -- the authors' method, transcribed -----------------------------------------------------------------------


def halley_log_z(y: Tensor, alpha: float, tol: float = 1e-4, max_steps: int = 5_000) -> Tensor:
    """Root t of alpha t + (1 - alpha) exp(t) = y - alpha by Halley's iteration."""
    t = torch.minimum(y / alpha - 1.0, y - 1.0)
    for _ in range(max_steps):
        growth = (1.0 - alpha) * t.exp()
        value = alpha * t + growth - (y - alpha)
        if float(value.abs().max()) <= tol:
            break
        slope = alpha + growth
        t = t - 2.0 * value * slope / (2.0 * slope**2 - value * growth)
    return t


def nested_prox(v: Tensor, alpha: float, dim: int, tol: float = 1e-4, max_steps: int = 5_000) -> Tensor:
    """Newton's iteration on the multiplier nu, with Halley's on log z inside."""
    nu = 1.0 - v.amax(dim, keepdim=True)
    for _ in range(max_steps):
        log_z = halley_log_z(v + nu, alpha)
        z = log_z.exp()
        excess = z.sum(dim, keepdim=True) - 1.0
        if float(excess.abs().max()) < tol:
            break
        nu = nu - excess / (z / (v + nu - alpha * log_z)).sum(dim, keepdim=True)
    return z


class TranscribedSolver:
    """Damped forward-backward iteration on a tuple of tiers, with everything that does not depend on q
    recomputed as the authors do.
    """

    def __init__(self, model: MonotoneDBM, problem: MeanFieldProblem) -> None:
        self.structure: Structure = model.structure
        self.weights = {key: weight.detach() for key, weight in model.hollow._centred().items()}
        self.problem = problem
        with torch.no_grad():
            self.limit = model.hollow.limit
            blocks = [self.diagonal_block(t) for t in range(len(self.structure.tiers))]
            # Norms are kept between iterations in the authors' code too.
            self.scales = [
                (self.limit / torch.linalg.matrix_norm(block.movedim((1, 2), (-2, -1)), 2))
                .clamp(max=1.0)
                .sqrt()
                for block in blocks
            ]

    def diagonal_block(self, t: int) -> Tensor:
        """A_i'A_i over one period, tap by tap."""
        tier, (height, width) = self.structure.tiers[t], self.structure.periods[t]
        total = torch.zeros(tier.groups, tier.states, tier.states, height, width)
        for (r, seen), weight in self.weights.items():
            if seen != t:
                continue
            if weight.ndim == 2:
                grid = weight.unflatten(1, (tier.groups, tier.states, height, width))
                total += torch.einsum("rgaxy,rgbxy->gabxy", grid, grid)
                continue
            stride, kernel = self.structure.strides[r][t], weight.shape[-1]
            grid = weight.unflatten(1, (tier.groups, tier.states))
            products = torch.einsum("rgaxy,rgbxy->gabxy", grid, grid)
            for row in range(kernel):
                for column in range(kernel):
                    first = (
                        (row - padding(stride, kernel)) % stride,
                        (column - padding(stride, kernel)) % stride,
                    )
                    total[..., first[0] :: stride, first[1] :: stride] += products[
                        :, :, :, row, column, None, None
                    ]
        return total

    def couple(self, tiers: list[Tensor]) -> list[Tensor]:
        """Phi q, tier images ``(batch, channels, height, width)`` in and out."""
        structure = self.structure
        scaled = [self.apply_scale(t, part) for t, part in enumerate(tiers)]
        rows = []
        for r in range(len(structure.rows)):
            seen = 0
            for t, tier in enumerate(structure.tiers):
                weight = self.weights.get((r, t))
                if weight is None:
                    continue
                if weight.ndim == 2:
                    kernel = weight.unflatten(1, (tier.channels, *tiers[t].shape[2:]))
                    seen = seen + F.conv2d(scaled[t], kernel)
                else:
                    stride = structure.strides[r][t]
                    seen = seen + F.conv2d(
                        scaled[t], weight, stride=stride, padding=padding(stride, weight.shape[-1])
                    )
            rows.append(seen)
        result = []
        for t, tier in enumerate(structure.tiers):
            total = 0
            for r, row in enumerate(rows):
                weight = self.weights.get((r, t))
                if weight is None:
                    continue
                if weight.ndim == 2:
                    total = total + F.conv_transpose2d(
                        row, weight.unflatten(1, (tier.channels, *tiers[t].shape[2:]))
                    )
                else:
                    stride, kernel = structure.strides[r][t], weight.shape[-1]
                    pad = padding(stride, kernel)
                    extra = (tier.height + 2 * pad - kernel) % stride
                    total = total + F.conv_transpose2d(
                        row, weight, stride=stride, padding=pad, output_padding=extra
                    )
            own = self.apply_block(t, self.diagonal_block(t), scaled[t])
            result.append(self.apply_scale(t, own - total))
        return result

    def apply_scale(self, t: int, part: Tensor) -> Tensor:
        tier, (height, width) = self.structure.tiers[t], self.structure.periods[t]
        grid = part.reshape(len(part), tier.groups, tier.states, -1, height, part.shape[3] // width, width)
        return (grid * self.scales[t][None, :, None, None, :, None, :]).reshape(part.shape)

    def apply_block(self, t: int, block: Tensor, part: Tensor) -> Tensor:
        tier, (height, width) = self.structure.tiers[t], self.structure.periods[t]
        grid = part.reshape(len(part), tier.groups, tier.states, -1, height, part.shape[3] // width, width)
        own = block.permute(3, 4, 0, 1, 2) @ grid.permute(3, 5, 4, 6, 1, 2, 0)
        return own.permute(6, 4, 5, 0, 2, 1, 3).reshape(part.shape)

    def step(self, q: Tensor, alpha: float) -> Tensor:
        problem = self.problem
        parts = [self.image(t, part) for t, part in enumerate(self.structure.split(problem.clamp(q)))]
        biases = [self.image(t, part) for t, part in enumerate(self.structure.split(problem.bias[None]))]
        points = [
            (1.0 - alpha) * part + alpha * (phi + bias)
            for part, phi, bias in zip(parts, self.couple(parts), biases, strict=True)
        ]
        tiers = self.structure.tiers
        z = [
            nested_prox(point.reshape(-1, tier.states, *point.shape[2:]), alpha, 1).reshape(len(q), -1)
            for tier, point in zip(tiers, points, strict=True)
        ]
        return problem.clamp(torch.cat(z, 1))

    def image(self, t: int, part: Tensor) -> Tensor:
        tier = self.structure.tiers[t]
        size = (tier.height, tier.width) if tier.spatial else (1, 1)
        return part.reshape(len(part), -1, *size)

    def solve(
        self, alpha: float, tol: float, max_steps: int = 200, memory: int = 5, ridge: float = 1e-4
    ) -> tuple[Tensor, int]:
        """Anderson acceleration with one stopping rule for the whole batch."""
        q = self.problem.start()
        batch, size = q.shape
        points, images = torch.zeros(batch, memory, size), torch.zeros(batch, memory, size)
        points[:, 0], images[:, 0] = q, self.step(q, alpha)
        points[:, 1], images[:, 1] = images[:, 0], self.step(images[:, 0], alpha)
        system = torch.zeros(batch, memory + 1, memory + 1)
        system[:, 0, 1:] = system[:, 1:, 0] = 1.0
        rhs = torch.zeros(batch, memory + 1, 1)
        rhs[:, 0] = 1.0
        for count in range(2, max_steps):
            used, slot = min(count, memory), count % memory
            changes = images[:, :used] - points[:, :used]
            system[:, 1 : used + 1, 1 : used + 1] = changes @ changes.transpose(1, 2) + ridge * torch.eye(
                used
            )
            weights = torch.linalg.solve(system[:, : used + 1, : used + 1], rhs[:, : used + 1])[:, 1:, 0]
            points[:, slot] = (weights[:, None] @ images[:, :used])[:, 0]
            images[:, slot] = self.step(points[:, slot], alpha)
            change = float((images[:, slot] - points[:, slot]).norm() / (1e-5 + images[:, slot].norm()))
            if change < tol:
                break
        return images[:, slot], count + 1


# -- timing -------------------------------------------------------------------------------------------------


def seconds(run: Callable[[], object], repeats: int) -> float:
    """Median wall time of a call, after one that warms up."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def image_problem(seed: int = 0) -> tuple[MonotoneDBM, MeanFieldProblem]:
    """Fashion-MNIST in 20 grey bins, 40 % of the pixels observed, weights at their start (norms at the
    limit).
    """
    from paperback.data import GreyBins, images

    data = images.fashion_mnist(seed=seed)
    states = GreyBins(20).fit(data.train.x).transform(data.train.x[:BATCH]).reshape(BATCH, -1)
    observed = torch.rand(states.shape, generator=torch.Generator().manual_seed(seed)) < 0.4
    model = MonotoneDBM(TIERS, CONNECTIONS, margin="paper", m=0.01, engine="conv", seed=seed)
    return model, model.problem_of(states, observed)


@torch.no_grad()
def bench_solve(repeats: int) -> None:
    model, problem = image_problem()
    transcription = TranscribedSolver(model, problem)
    ours, (theirs, their_steps) = (
        solve(problem, "anderson", tol=TOLERANCE),
        transcription.solve(0.125, TOLERANCE),
    )
    exact = solve(problem, "anderson", tol=1e-6).x
    our_seconds = seconds(lambda: solve(problem, "anderson", tol=TOLERANCE), repeats)
    their_seconds = seconds(lambda: transcription.solve(0.125, TOLERANCE), max(1, repeats // 2))
    print(f"fixed point, batch {BATCH}, N = {model.structure.size}, relative change {TOLERANCE:g}")
    for name, q, steps, spent in (
        ("paperback", ours.x, int(ours.steps.max()), our_seconds),
        ("transcription", theirs, their_steps, their_seconds),
    ):
        error = float((q - exact).abs().max())
        print(
            f"  {name:14s} {spent:8.3f} s  {steps:4d} steps  residual {float(problem.residual(q).max()):.1e}  error {error:.1e}"
        )
    print(
        f"  largest difference {float((ours.x - theirs).abs().max()):.1e}; ratio {their_seconds / our_seconds:.1f} times as fast"
    )


@torch.no_grad()
def bench_prox(repeats: int) -> None:
    points = torch.randn(BATCH, 20, 784, generator=torch.Generator().manual_seed(0)) * 0.5
    print("proximal operator, 100,352 variables of 20 states")
    for alpha in (0.5, 0.125, 0.02):
        ours = seconds(lambda: solve_prox(points, alpha, 1), repeats)  # noqa: B023
        theirs = seconds(lambda: nested_prox(points, alpha, 1), repeats)  # noqa: B023
        gap = float((solve_prox(points, alpha, 1) - nested_prox(points, alpha, 1)).abs().max())
        print(
            f"  alpha {alpha:5.3f}: {ours:.3f} s against {theirs:.3f} s, ratio {theirs / ours:.1f}, largest difference {gap:.1e}"
        )


def bench_torchdeq(repeats: int) -> None:
    try:
        from torchdeq import get_deq
    except ImportError:
        print("torchdeq is not installed; pip install paperback[peers]")
        return
    model = MonotoneDBM.dense(64, 4, seed=0)
    generator = torch.Generator().manual_seed(0)
    states = torch.randint(0, 4, (128, 64), generator=generator)
    problem = model.problem_of(states, torch.rand(states.shape, generator=generator) < 0.4)
    alpha, target = problem.step_size(), torch.randn(128, model.structure.size, generator=generator)

    def step(q: Tensor, bias: Tensor) -> Tensor:
        from paperback.density.monotone_dbm import prox_entropy

        point = (1 - alpha) * q + alpha * (problem.coupling(q) + bias)
        parts = [prox_entropy(tier, alpha, 2).flatten(1) for tier in model.structure.split(point)]
        return problem.clamp(torch.cat(parts, 1))

    deq = get_deq(
        f_solver="anderson",
        b_solver="anderson",
        f_tol=1e-4,
        b_tol=1e-4,
        f_max_iter=200,
        b_max_iter=200,
        ift=True,
    )

    def theirs() -> tuple[Tensor, Tensor, float]:
        bias = problem.bias.clone().requires_grad_()
        out, _ = deq(lambda q: step(q, bias), problem.start())
        start = time.perf_counter()
        (out[-1] * target).sum().backward()
        return out[-1].detach(), bias.grad, time.perf_counter() - start

    def ours() -> tuple[Tensor, Tensor, float]:
        bias = problem.bias.clone().requires_grad_()
        with torch.no_grad():
            q = solve(problem, "anderson", tol=1e-4).x
        value = ImplicitMeanField.apply(problem.coupling(q) + bias, q, problem, 1e-4, 60)
        start = time.perf_counter()
        (value * target).sum().backward()
        return value.detach(), bias.grad, time.perf_counter() - start

    print("equilibrium layer, digits size, Anderson forward to 1e-4 and implicit backward to 1e-4")
    (q_theirs, g_theirs, _), (q_ours, g_ours, _) = theirs(), ours()
    for name, run in (("paperback", ours), ("torchdeq", theirs)):
        whole = seconds(run, repeats)
        backward = statistics.median(run()[2] for _ in range(repeats))
        print(f"  {name:14s} {whole:.3f} s in all, {backward:.3f} s backward")
    gap = float((g_ours - g_theirs).norm() / g_ours.norm())
    print(
        f"  largest difference of q {float((q_ours - q_theirs).abs().max()):.1e}, of the gradient {gap:.1e} (relative)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    bench_solve(arguments.repeats)
    bench_prox(arguments.repeats)
    bench_torchdeq(arguments.repeats)


if __name__ == "__main__":
    main()
