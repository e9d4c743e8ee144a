"""Markov chains for the weights of small networks: HMC and scale-adapted SGHMC, all chains in one batch.

A chain targets any log density that torch can differentiate, so prior and likelihood are the caller's.
Hamiltonian Monte Carlo draws momenta r ~ N(0, I), follows H(theta, r) = -log p(theta) + r.r / 2 by leapfrog
steps and accepts with probability min(1, exp(H - H')). Dual averaging moves each chain's step size during the
burn-in until the acceptance is as wanted; after it the step size stays. SGHMC replaces the acceptance step by
friction and matching noise, and needs only an unbiased estimate of the gradient.

Sources: Neal, MCMC using Hamiltonian dynamics (2011); Hoffman and Gelman, The No-U-Turn Sampler (2014),
section 3.2, for dual averaging; Springenberg et al., Bayesian optimization with robust Bayesian neural
networks (2016), equations 4 and 8, for scale-adapted SGHMC; Vehtari et al., Rank-normalization, folding, and
localization (2021) for R-hat and effective sample size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from paperback.errors import DataError

LogDensity = Callable[[Tensor], Tensor]
StochasticLogDensity = Callable[[Tensor, torch.Generator], Tensor]

MOST_STEPS = 200  # leapfrog steps of one trajectory; a longer path is halved until it fits


class Chains(NamedTuple):
    """What a sampler returns.

    Attributes:
        samples: states after the burn-in, ``(samples, chains, d)``.
        log_density: of each state, ``(samples, chains)``; of SGHMC the stochastic estimate.
        acceptance: mean acceptance probability after the burn-in, ``(chains,)``; 1 for SGHMC.
        step_size: that was used after the burn-in, ``(chains,)``.
    """

    samples: Float[Tensor, "samples chains d"]
    log_density: Float[Tensor, "samples chains"]
    acceptance: Float[Tensor, " chains"]
    step_size: Float[Tensor, " chains"]


def hmc(
    log_density: LogDensity,
    start: Float[Tensor, "chains d"],
    *,
    samples: int,
    burn_in: int,
    step_size: float,
    leapfrog_steps: int | None = None,
    path_length: float | None = None,
    target_acceptance: float = 0.8,
    jitter: float = 0.5,
    generator: torch.Generator,
) -> Chains:
    """Hamiltonian Monte Carlo, chains side by side.

    Args:
        log_density: from states ``(chains, d)`` to log densities ``(chains,)``, up to a constant. A chain's
            density must depend on its own state only.
        start: first states, ``(chains, d)``; float64 is advised.
        samples: states that are kept, >= 1.
        burn_in: states before them, in which the step size adapts; 0 keeps `step_size`.
        step_size: first step size, > 0.
        leapfrog_steps: steps of a trajectory, >= 1. Give this or `path_length`.
        path_length: step size times steps; the steps then follow from the step size, at most 200: a path that
            needs more is halved, and stays so.
        target_acceptance: in (0, 1).
        jitter: the number of steps of a trajectory is uniform within 1 +- jitter of its value, so that it is
            not each time the period of some direction, along which the chain would stand still; in [0, 1).
        generator: of all draws.

    Returns:
        The chains. A proposal whose energy is not finite is rejected.

    Raises:
        DataError: if an argument is out of range, or a first state has no finite log density.
    """
    _check_chains(start, samples, burn_in, step_size)
    if (leapfrog_steps is None) == (path_length is None):
        raise DataError("give exactly one of leapfrog_steps and path_length.")
    if (leapfrog_steps is not None and leapfrog_steps < 1) or (path_length is not None and path_length <= 0):
        raise DataError(
            f"leapfrog_steps is {leapfrog_steps} and path_length {path_length}; give at least 1, or > 0."
        )
    if not (0 < target_acceptance < 1 and 0 <= jitter < 1):
        raise DataError(
            f"target_acceptance is {target_acceptance} and jitter {jitter}; they lie in (0, 1) and [0, 1)."
        )
    state = _evaluate(log_density, start.detach())
    if not bool(state.value.isfinite().all()):
        raise DataError(
            "a first state has no finite log density; start every chain where the density is positive."
        )
    steps = _DualAveraging(state.value.new_full((len(start),), step_size), target_acceptance)
    kept, values, accepted = [], [], []
    for iteration in range(burn_in + samples):
        epsilon = steps.exploring if iteration < burn_in else steps.settled
        if path_length is not None:
            count = max(1, math.ceil(path_length / float(epsilon.mean())))
            while count > MOST_STEPS:
                path_length /= 2
                count = max(1, math.ceil(path_length / float(epsilon.mean())))
        else:
            count = leapfrog_steps or 1
        wobble = 1 + jitter * (2 * float(torch.rand((), generator=generator)) - 1)
        count = max(1, round(count * wobble))
        state, probability = _transition(log_density, state, epsilon[:, None], count, generator)
        if iteration < burn_in:
            steps.update(probability)
        else:
            kept.append(state.theta)
            values.append(state.value)
            accepted.append(probability)
    return Chains(torch.stack(kept), torch.stack(values), torch.stack(accepted).mean(0), steps.settled)


def sghmc(
    log_density: StochasticLogDensity,
    start: Float[Tensor, "chains d"],
    *,
    steps: int,
    burn_in: int,
    keep_every: int = 1,
    lr: float = 0.01,
    friction: float = 0.05,
    gradient_noise: bool = True,
    generator: torch.Generator,
) -> Chains:
    """Stochastic-gradient HMC whose mass matrix follows the size of the gradients during the burn-in.

    With V a running estimate of E g^2 the update is, elementwise (Springenberg et al., equation 8),

        v <- (1 - friction) v - lr^2 V^-1/2 g + N(0, 2 lr^2 friction V^-1/2 - lr^4),   theta <- theta + v.

    Args:
        log_density: from states ``(chains, d)`` and a generator (for its mini-batches) to unbiased estimates
            of the log density ``(chains,)``.
        start: first states, ``(chains, d)``.
        steps: all steps, > burn_in.
        burn_in: steps without samples, in which V adapts; >= 0.
        keep_every: of the steps after the burn-in, each so-many-th is a sample.
        lr: step size, > 0; the bias of the samples grows with it.
        friction: part of the momentum that is lost in a step, in (0, 1).
        gradient_noise: take lr^4, the noise of mini-batches, off the noise that is added. False for exact
            gradients.
        generator: of all draws.

    Returns:
        The chains.

    Raises:
        DataError: if an argument is out of range, or the chains run away to numbers that are not finite.
    """
    _check_chains(start, steps - burn_in, burn_in, lr)
    if keep_every < 1 or keep_every > steps - burn_in or not 0 < friction < 1:
        raise DataError(
            f"keep_every is {keep_every} and friction {friction}; keep_every is 1 to {steps - burn_in}, "
            "friction in (0, 1)."
        )
    theta = start.detach()
    momentum = torch.zeros_like(theta)
    window, mean, square = torch.ones_like(theta), torch.ones_like(theta), torch.ones_like(theta)
    kept, values = [], []
    for step in range(steps):
        value, gradient = _evaluate(lambda t: log_density(t, generator), theta)[1:]
        gradient = -gradient
        if step < burn_in:  # the window of the running means adapts too, supplement of the paper
            rate = 1 / (window + 1)
            window = window + 1 - window * mean.square() / square
            mean = mean + rate * (gradient - mean)
            square = (square + rate * (gradient.square() - square)).clamp_min(1e-12)
        inverse_mass = square.rsqrt()
        variance = 2 * lr**2 * friction * inverse_mass - (lr**4 if gradient_noise else 0.0)
        noise = torch.randn(theta.shape, generator=generator, dtype=theta.dtype)
        momentum = (
            (1 - friction) * momentum - lr**2 * inverse_mass * gradient + variance.clamp_min(0).sqrt() * noise
        )
        theta = theta + momentum
        if step >= burn_in and (step - burn_in + 1) % keep_every == 0:
            kept.append(theta)
            values.append(value)
    if not bool(theta.isfinite().all()):
        raise DataError(f"SGHMC ran away with lr {lr}; make it smaller.")
    ones = theta.new_ones(len(theta))
    return Chains(torch.stack(kept), torch.stack(values), ones, lr * ones)


def r_hat(samples: Float[Tensor, "samples chains *d"]) -> Float[Tensor, "*d"]:
    """Split R-hat of ranks: the larger of that of the values and that of their distances from the median.

    Args:
        samples: ``(samples, chains)`` or ``(samples, chains, d)``, at least 4 samples.

    Returns:
        One number per entry, about 1 where the chains agree; below 1.01 is usually asked for. NaN where
        nothing moves.

    Raises:
        DataError: if the shape is another one or there are fewer than 4 samples.
    """
    halves = _split(samples)
    folded = (halves - halves.flatten(0, 1).median(0).values).abs()
    return torch.maximum(_plain_r_hat(_normal_ranks(halves)), _plain_r_hat(_normal_ranks(folded)))


def effective_sample_size(samples: Float[Tensor, "samples chains *d"]) -> Float[Tensor, "*d"]:
    """Bulk effective sample size: of rank-normalised split chains, autocorrelation cut off by Geyer's rule.

    Args:
        samples: ``(samples, chains)`` or ``(samples, chains, d)``, at least 4 samples.

    Returns:
        How many independent draws the chains are worth, per entry; at most samples * chains *
        log10(samples * chains). NaN where nothing moves.

    Raises:
        DataError: if the shape is another one or there are fewer than 4 samples.
    """
    z = _normal_ranks(_split(samples))
    n, chains = z.shape[:2]
    covariance = _autocovariance(z).mean(1)  # (lags, *d), mean over chains
    within = covariance[0] * n / (n - 1)
    total = within * (n - 1) / n + (z.mean(0).var(0) if chains > 1 else 0.0)
    correlation = 1 - (within - covariance) / total
    correlation[0] = 1.0
    lags = len(correlation) // 2 * 2
    pairs = (
        correlation[:lags].unflatten(0, (-1, 2)).sum(1)
    )  # Geyer: positive and falling for a reversible chain
    first_negative = (pairs <= 0).cumsum(0) > 0
    pairs = pairs.cummin(0).values.masked_fill(first_negative, 0.0)
    time = -1 + 2 * pairs.sum(0)
    return n * chains / time.clamp_min(1 / math.log10(n * chains))


# -- trajectories --------------------------------------------------------------------------------------------


class _State(NamedTuple):
    theta: Tensor
    value: Tensor
    gradient: Tensor


def _evaluate(log_density: LogDensity, theta: Tensor) -> _State:
    with torch.enable_grad():
        theta = theta.detach().requires_grad_()
        value = log_density(theta)
        if value.shape != theta.shape[:1]:
            raise DataError(
                f"log_density gives shape {tuple(value.shape)} for {len(theta)} chains; it must give "
                "one number for each."
            )
        (gradient,) = torch.autograd.grad(value.sum(), theta)
    return _State(theta.detach(), value.detach(), gradient)


def leapfrog(
    log_density: LogDensity, theta: Tensor, momentum: Tensor, step_size: Tensor | float, steps: int
) -> tuple[Tensor, Tensor]:
    """Follow the Hamiltonian -log p(theta) + r.r / 2.

    Args:
        log_density: as for `hmc`.
        theta: ``(chains, d)``.
        momentum: ``(chains, d)``.
        step_size: broadcasts with ``(chains, 1)``.
        steps: >= 1.

    Returns:
        theta and momentum at the end. Run backwards by the negated momentum, it returns to the start.
    """
    end, momentum = _leapfrog(log_density, _evaluate(log_density, theta), momentum, step_size, steps)
    return end.theta, momentum


def _leapfrog(
    log_density: LogDensity, state: _State, momentum: Tensor, step_size: Tensor | float, steps: int
) -> tuple[_State, Tensor]:
    for _ in range(steps):
        momentum = momentum + step_size / 2 * state.gradient
        state = _evaluate(log_density, state.theta + step_size * momentum)
        momentum = momentum + step_size / 2 * state.gradient
    return state, momentum


def _transition(
    log_density: LogDensity, state: _State, epsilon: Tensor, steps: int, generator: torch.Generator
) -> tuple[_State, Tensor]:
    """One trajectory and its acceptance step; also the acceptance probability of each chain."""
    momentum = torch.randn(state.theta.shape, generator=generator, dtype=state.theta.dtype)
    end, moved = _leapfrog(log_density, state, momentum, epsilon, steps)
    change = end.value - state.value - (moved.square().sum(1) - momentum.square().sum(1)) / 2
    finite = change.isfinite() & end.gradient.isfinite().all(1)
    probability = change.clamp_max(0).exp().where(finite, 0.0)
    accept = torch.rand(len(probability), generator=generator, dtype=probability.dtype) < probability
    parts = (
        torch.where(accept.reshape(-1, *[1] * (new.ndim - 1)), new, old)
        for new, old in zip(end, state, strict=True)
    )
    return _State(*parts), probability


def _check_chains(start: Tensor, samples: int, burn_in: int, step_size: float) -> None:
    if start.ndim != 2 or 0 in start.shape or not start.is_floating_point():
        raise DataError(f"start has shape {tuple(start.shape)}; give floating-point states (chains, d).")
    if samples < 1 or burn_in < 0 or not 0 < step_size < math.inf:
        raise DataError(
            f"there are {samples} samples after {burn_in} of burn-in with step size {step_size}; "
            "at least 1, at least 0 and a positive number are needed."
        )


class _DualAveraging:
    """Nesterov's dual averaging of log step sizes, one per chain (Hoffman and Gelman, equation 6)."""

    def __init__(self, step_size: Tensor, target: float) -> None:
        self.exploring = step_size
        self.settled = step_size  # the average, for after the burn-in
        self._target = target
        self._centre = (10 * step_size).log()  # mu: rather too long than too short
        self._error = torch.zeros_like(step_size)
        self._count = 0

    def update(self, acceptance: Tensor, gamma: float = 0.05, t0: float = 10.0, kappa: float = 0.75) -> None:
        self._count += 1
        weight = 1 / (self._count + t0)
        self._error = (1 - weight) * self._error + weight * (self._target - acceptance)
        log_step = self._centre - math.sqrt(self._count) / gamma * self._error
        weight = self._count**-kappa
        before = self.settled.log() if self._count > 1 else log_step
        self.exploring = log_step.exp()
        self.settled = (weight * log_step + (1 - weight) * before).exp()


# -- diagnostics ---------------------------------------------------------------------------------------------


def _split(samples: Tensor) -> Tensor:
    """Each chain as two chains, its halves: a drift then shows as a difference between chains."""
    if samples.ndim < 2 or samples.shape[0] < 4:
        raise DataError(
            f"samples has shape {tuple(samples.shape)}; give (samples, chains, ...) with at least 4 samples."
        )
    half = samples.shape[0] // 2
    return torch.cat([samples[:half], samples[-half:]], 1).to(torch.float64)


def _normal_ranks(halves: Tensor) -> Tensor:
    """Normal quantiles of the ranks of the values in all chains; equal values share their mean rank."""
    flat = halves.flatten(0, 1).movedim(0, -1).contiguous()  # (*d, n)
    ordered = flat.sort(-1).values
    below, upto = (torch.searchsorted(ordered, flat, right=right) for right in (False, True))
    rank = (below + 1 + upto).double() / 2
    z = torch.special.ndtri((rank - 0.375) / (flat.shape[-1] + 0.25))
    return z.movedim(-1, 0).reshape(halves.shape)


def _plain_r_hat(z: Tensor) -> Tensor:
    n = z.shape[0]
    within, between = z.var(0).mean(0), n * z.mean(0).var(0)
    return ((n - 1) / n + between / within / n).sqrt()


def _autocovariance(z: Tensor) -> Tensor:
    """Biased autocovariance along the first dimension, by Fourier transform."""
    n = z.shape[0]
    centred = z - z.mean(0)
    spectrum = torch.fft.rfft(centred, 2 * n, dim=0)
    return torch.fft.irfft(spectrum.abs().square(), 2 * n, dim=0)[:n] / n
