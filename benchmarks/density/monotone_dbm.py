"""Monotone deep Boltzmann machine beside its peers: one solve, the proximal operator, the backward pass, and
the RBM baseline.

    python benchmarks/density/monotone_dbm.py [--repeats 5] [--threads 1] [--train-steps 50]

1. The proximal operator, against nested Newton and Halley loops.
2. torchdeq (extra "peers"): our forward-backward step in its Anderson solver with its implicit backward.
3. scikit-learn's BernoulliRBM against our RBM baseline on binary digits.
4. The fixed point of a batch of 128 images of 28x28 in 20 grey bins, convolutional tiers as in the paper,
   against a direct transcription of the authors' method: the damped iteration, Anderson acceleration with one
   stopping rule for the batch, nested Newton and Halley loops to 1e-4, diagonal blocks built in every
   iteration. The transcription is ours, written from the published description. Its couplings are scaled
   symmetrically as ours are, so that both solve the same equation. Same weights, same masks, at the start of
   training and after some steps of it; both answers are compared with the exact one.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from sklearn.neural_network import BernoulliRBM
from torch import Tensor

from paperback.data import GreyBins, images
from paperback.density import CategoricalRBM
from paperback.density.monotone_dbm import MonotoneDBM, Structure, prox_entropy
from paperback.density.monotone_dbm.mean_field import ImplicitMeanField, MeanFieldProblem, solve
from paperback.density.monotone_dbm.proximal import solve_prox
from paperback.density.monotone_dbm.structure import padding

TIERS = [("visible", 20, 1, 28, 28), ("hidden", 4, 10, 14, 14), ("hidden", 4, 20, 7, 7), ("class", 10, 1)]
CONNECTIONS = [(20, (3, 0, 0, 0)), (40, (3, 3, 0, 0)), (80, (3, 3, 3, 0)), (10, (0, 0, 1, 1))]
BATCH, TOLERANCE, SAME_ANSWER = 128, 1e-3, 1e-3
ALPHA = 0.125  # the authors' default; their rule of halving it while that saves steps keeps it here


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


def image_model(steps: int, seed: int = 0) -> tuple[MonotoneDBM, Tensor, Tensor]:
    """The paper's model for images in 20 grey bins after some steps of training on Fashion-MNIST, and a batch
    with 40 % of its pixels observed.
    """
    data = images.fashion_mnist(seed=seed)
    bins = GreyBins(20).fit(data.train.x)
    states = bins.transform(data.train.x[: 32 * max(steps, 1)]).flatten(1)
    model = MonotoneDBM(TIERS, CONNECTIONS, margin="paper", m=0.01, engine="conv", seed=seed)
    if steps:
        model.fit(states, data.train.y[: len(states)], epochs=1, batch_size=32, seed=seed, progress=False)
    batch = bins.transform(data.test.x[:BATCH]).flatten(1)
    return model, batch, torch.rand(batch.shape, generator=torch.Generator().manual_seed(seed)) < 0.4


@torch.no_grad()
def bench_solve(train_steps: int, repeats: int) -> None:
    """Both stop at a relative change of the undamped map of 1e-3; ours measures it in logits, theirs in q.
    Where the answers then differ by more than 1e-3, theirs goes on, with the loosest tolerance that suffices.
    """
    for steps in (0, train_steps):
        model, batch, observed = image_model(steps)
        problem = model.problem_of(batch, observed)
        transcription = TranscribedSolver(model, problem)
        ours = solve(problem, "auto", tol=TOLERANCE)
        tolerance = ALPHA * TOLERANCE  # a damped step changes q by alpha times as much
        theirs, their_steps = transcription.solve(ALPHA, tolerance)
        while float((theirs - ours.x).abs().max()) > SAME_ANSWER:
            tolerance *= 0.8
            theirs, their_steps = transcription.solve(ALPHA, tolerance)
        exact = solve(problem, "anderson", tol=1e-6).x
        our_seconds = seconds(partial(solve, problem, "auto", tol=TOLERANCE), repeats)
        their_seconds = seconds(partial(transcription.solve, ALPHA, tolerance), max(1, repeats // 2))
        print(
            f"fixed point, batch {BATCH}, N = {model.structure.size}, weights after {steps} training steps "
            f"(smallest eigenvalue {problem.smallest:.1f})"
        )
        for name, q, count, spent in (
            ("paperback", ours.x, int(ours.steps.max()), our_seconds),
            ("transcription", theirs, their_steps, their_seconds),
        ):
            residual, error = float(problem.residual(q).max()), float((q - exact).abs().max())
            print(f"  {name:14s}{spent:8.3f} s {count:4d} steps, residual {residual:.1e}, error {error:.1e}")
        gap = float((ours.x - theirs).abs().max())
        print(f"  {their_seconds / our_seconds:.1f} times as fast; largest difference {gap:.1e}")


@torch.no_grad()
def bench_prox(repeats: int) -> None:
    """Cold start on both sides; inside our solvers the proximal operator starts warm and is faster still."""
    points = torch.randn(BATCH, 20, 784, generator=torch.Generator().manual_seed(0)) * 0.5
    print("proximal operator, 100,352 variables of 20 states")
    for alpha in (0.5, 0.125, 0.02):
        ours = seconds(partial(solve_prox, points, alpha, 1), repeats)
        theirs = seconds(partial(nested_prox, points, alpha, 1), repeats)
        gap = float((solve_prox(points, alpha, 1) - nested_prox(points, alpha, 1)).abs().max())
        print(
            f"  alpha {alpha:5.3f}: {ours:.3f} s against {theirs:.3f} s, "
            f"{theirs / ours:.1f} times as fast; largest difference {gap:.1e}"
        )


def bench_torchdeq(repeats: int) -> None:
    """Our forward-backward step in torchdeq's Anderson solver, with its implicit backward."""
    try:
        from torchdeq import get_deq
    except ImportError:
        print("torchdeq is not installed: pip install paperback[peers]")
        return
    model = MonotoneDBM.dense(64, 4, seed=0)
    draws = torch.Generator().manual_seed(0)
    states = torch.randint(0, 4, (BATCH, 64), generator=draws)
    problem = model.problem_of(states, torch.rand(states.shape, generator=draws) < 0.4)
    alpha, target = problem.step_size(), torch.randn(BATCH, model.structure.size, generator=draws)
    limits = {"f_tol": 1e-4, "b_tol": 1e-4, "f_max_iter": 200, "b_max_iter": 200}
    deq = get_deq(f_solver="anderson", b_solver="anderson", ift=True, **limits)

    def step(q: Tensor, bias: Tensor) -> Tensor:
        point = (1 - alpha) * q + alpha * (problem.coupling(q) + bias)
        parts = [prox_entropy(tier, alpha, 2).flatten(1) for tier in model.structure.split(point)]
        return problem.clamp(torch.cat(parts, 1))

    def theirs() -> tuple[Tensor, Tensor, float]:
        bias = problem.bias.clone().requires_grad_()
        outputs, _ = deq(lambda q: step(q, bias), problem.start())
        return differentiate(outputs[-1], bias)

    def ours() -> tuple[Tensor, Tensor, float]:
        bias = problem.bias.clone().requires_grad_()
        with torch.no_grad():
            q = solve(problem, "anderson", tol=1e-4).x
        return differentiate(ImplicitMeanField.apply(problem.coupling(q) + bias, q, problem, 1e-4, 60), bias)

    def differentiate(q: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, float]:
        start = time.perf_counter()
        (gradient,) = torch.autograd.grad((q * target).sum(), bias)
        return q.detach(), gradient, time.perf_counter() - start

    print("equilibrium layer of 506 states, batch 128: forward and backward to 1e-4")
    (q_theirs, g_theirs, _), (q_ours, g_ours, _) = theirs(), ours()
    times = {}
    for name, run in (("paperback", ours), ("torchdeq", theirs)):
        times[name] = seconds(run, repeats)
        backward = statistics.median(run()[2] for _ in range(repeats))
        print(f"  {name:14s}{times[name]:8.3f} s in all, {backward:.3f} s of it backward")
    gap = float((g_ours - g_theirs).norm() / g_ours.norm())
    print(
        f"  {times['torchdeq'] / times['paperback']:.1f} times as fast; largest difference of q "
        f"{float((q_ours - q_theirs).abs().max()):.1e}, of the gradient {gap:.1e} (relative)"
    )


def bench_rbm() -> None:
    """The baseline RBM against scikit-learn's, on digits in two grey levels."""
    data = images.digits(seed=0)
    bins = GreyBins(2).fit(data.train.x)
    train, test = bins.transform(data.train.x).flatten(1), bins.transform(data.test.x).flatten(1)
    start = time.perf_counter()
    ours = CategoricalRBM(64, 2, 100).fit(train, progress=False)
    our_seconds, start = time.perf_counter() - start, time.perf_counter()
    theirs = BernoulliRBM(100, learning_rate=0.05, batch_size=100, n_iter=90, random_state=0)
    theirs.fit(train.numpy())
    their_seconds = time.perf_counter() - start
    twin = CategoricalRBM(
        64, 2, 100
    )  # scikit-learn's weights in our machine, to be judged by the same formula
    with torch.no_grad():
        components = torch.from_numpy(theirs.components_).float().T
        twin.weight.copy_(torch.stack([torch.zeros_like(components), components], 1).flatten(0, 1))
        visible = torch.from_numpy(theirs.intercept_visible_).float()
        twin.visible_bias.copy_(torch.stack([torch.zeros_like(visible), visible], 1).flatten())
        twin.hidden_bias.copy_(torch.from_numpy(theirs.intercept_hidden_).float())
    print("restricted Boltzmann machine, 100 hidden units, 90 epochs on 1,257 binary digits")
    for name, model, spent in (("paperback", ours, our_seconds), ("scikit-learn", twin, their_seconds)):
        quality = pseudo_log_likelihood(model, test)
        print(f"  {name:14s}{spent:8.3f} s, pseudo-log-likelihood {quality:.2f} nats per image")


@torch.no_grad()
def pseudo_log_likelihood(model: CategoricalRBM, states: Tensor) -> float:
    """Mean over images of sum_i log p(x_i | all other pixels), from exact free energies."""
    total = torch.zeros(len(states))
    energy = model.free_energy(states)
    for pixel in range(states.shape[1]):
        flipped = states.clone()
        flipped[:, pixel] = 1 - flipped[:, pixel]
        total += F.logsigmoid(model.free_energy(flipped) - energy)
    return float(total.mean())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--train-steps", type=int, default=50)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    bench_prox(arguments.repeats)
    bench_torchdeq(arguments.repeats)
    bench_rbm()
    bench_solve(arguments.train_steps, arguments.repeats)


if __name__ == "__main__":
    main()
