"""The three surrogates that are sets of networks: HMC, SGHMC and the deep ensemble.

Each holds weight vectors of one small network, and its law of a point is the mixture of N(f_k(x), s2) over
them. The set is frozen when it is fitted, so that draw k is one and the same function at every point and in
every call, and an acquisition function averaged over draws is deterministic and smooth.

The variances p2 of the prior and s2 of the noise are chosen at each fit, unless they are given: all pairs of
a grid are fitted in one batch to four fifths of the rows, five times over, and the pair with the largest
Gaussian log density of the rows held out is kept. (The function that does this is missing in the reference
implementation, which holds out the last fifth only; of ten rows that is two.)

Sources: Li, Rudner and Wilson (2024), sections 3 and appendix B; Neal (2011) for HMC; Springenberg et al.
(2016) for SGHMC; Lakshminarayanan et al. (2017) for ensembles.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Normal

from paperback.bayes import samplers
from paperback.bayes.bnn_surrogate.box import Bounds, BoxRegressor
from paperback.bayes.bnn_surrogate.variances import (
    FALLBACK,
    FEWEST_ROWS,
    Cases,
    Variance,
    folds,
    nearest,
    variance_grid,
)
from paperback.bayes.distributions import FunctionDraws, NormalMixture
from paperback.bayes.networks import (
    Activation,
    RegNet,
    gaussian_likelihood,
    log_posterior,
    map_estimate,
    minibatch_log_posterior,
    normal_prior,
)
from paperback.errors import DataError
from paperback.training import generator

BUFFER = 4_000_000  # numbers of a hidden layer that are held at once


class NetworkSurrogate(BoxRegressor):
    """A set of networks with one architecture and a Gaussian likelihood."""

    hidden: Sequence[int]
    activation: Activation
    prior_variance: Variance
    noise_variance: Variance
    random_state: int

    weights_: Float[Tensor, "draws size"]
    prior_variance_: float
    noise_variance_: float

    @abstractmethod
    def _draw(
        self,
        x: Tensor,
        y: Tensor,
        cases: Cases,
        source: torch.Generator,
        *,
        trial: bool,
    ) -> Float[Tensor, "draws cases size"]:
        """Weight vectors for every case; fewer will do for a trial that chooses variances."""

    def _fit(self, x: Tensor, y: Tensor) -> None:
        p2, s2 = self._choose_variances(x, y)
        self.prior_variance_, self.noise_variance_ = p2, s2
        self.diagnostics_ |= {"prior_variance": p2, "noise_variance": s2}
        prior, noise = torch.tensor([[p2], [s2]], dtype=torch.float64)
        cases = Cases(prior, noise, x.new_ones(1, len(x)))
        source = generator(self.random_state, "fit")
        self.weights_ = self._draw(x, y, cases, source, trial=False)[:, 0].contiguous()

    def _law(self, x: Tensor) -> NormalMixture:
        return NormalMixture(self._values(x), self.noise_variance_**0.5)

    def _joint(self, x: Tensor) -> FunctionDraws:
        return FunctionDraws(self._values(x).movedim(-1, -2))

    def _network(self) -> RegNet:
        return RegNet(self.n_features_in_, self.n_outputs_, tuple(self.hidden), self.activation)

    def _values(self, x: Float[Tensor, "*batch features"]) -> Float[Tensor, "draws *batch outputs"]:
        network = self._network()
        rows = x.reshape(-1, x.shape[-1])
        size = max(1, BUFFER // (len(self.weights_) * max(network.widths)))
        values = torch.cat([network(self.weights_, part) for part in rows.split(size)], 1)
        return values.unflatten(1, x.shape[:-1])

    def _choose_variances(self, x: Tensor, y: Tensor) -> tuple[float, float]:
        priors = variance_grid("prior_variance", self.prior_variance)
        noises = variance_grid("noise_variance", self.noise_variance)
        pairs = list(itertools.product(priors, noises))
        if len(pairs) == 1:
            return pairs[0]
        if len(x) < FEWEST_ROWS:
            return nearest(priors, FALLBACK[0]), nearest(noises, FALLBACK[1])
        source = generator(self.random_state, "variances")
        p2, s2 = torch.tensor(pairs, dtype=torch.float64).unbind(1)
        held = folds(len(x), source)
        seen = (~held).double().repeat_interleave(len(pairs), 0)
        cases = Cases(p2.repeat(len(held)), s2.repeat(len(held)), seen)
        weights = self._draw(x, y, cases, source, trial=True)
        scores = torch.zeros_like(p2)
        for rows, drawn in zip(held, weights.unflatten(1, (len(held), -1)).unbind(1), strict=True):
            values = self._network()(drawn.flatten(0, 1), x[rows]).unflatten(0, drawn.shape[:2])
            variance = values.var(0, correction=0) + s2[:, None, None]
            scores += Normal(values.mean(0), variance.sqrt()).log_prob(y[rows]).sum((1, 2))
        best = int(scores.argmax())
        self.diagnostics_["held_out_log_density"] = float(scores[best]) / y.numel()
        return pairs[best]


class HMCSurrogate(NetworkSurrogate):
    """Networks drawn from their posterior by full-batch Hamiltonian Monte Carlo, after a MAP training.

    Args:
        hidden: widths of the hidden layers.
        activation: "tanh" or "relu".
        prior_variance: p2 of all weights and biases; a list is the grid it is chosen from, None the grid
            0.1, 1, 10.
        noise_variance: s2 of standardised targets; likewise.
        samples: states kept, of all chains together.
        burn_in: states of each chain before them, in which the step size adapts.
        chains: run in one batch, each from its own MAP estimate.
        step_size: where the adaptation begins.
        leapfrog_steps: of one trajectory. The reference fixes the path's length at 0.01 instead, which is
            one step: a Langevin walk that hardly leaves its MAP estimate within its 500 samples.
        map_steps: of Adam before the chains.
        bounds: box of the inputs, ``(2, features)``; that of the training rows if not given.
        random_state: of all draws.

    `diagnostics_` has the acceptance, the step size, and of the predictions at the training rows the largest
    R-hat and the smallest effective sample size.
    """

    def __init__(
        self,
        hidden: Sequence[int] = (128, 128, 128),
        activation: Activation = "tanh",
        prior_variance: Variance = None,
        noise_variance: Variance = None,
        samples: int = 500,
        burn_in: int = 500,
        chains: int = 4,
        step_size: float = 0.02,
        leapfrog_steps: int = 10,
        map_steps: int = 1000,
        *,
        bounds: Bounds | None = None,
        random_state: int = 0,
    ) -> None:
        self.hidden = hidden
        self.activation = activation
        self.prior_variance = prior_variance
        self.noise_variance = noise_variance
        self.samples = samples
        self.burn_in = burn_in
        self.chains = chains
        self.step_size = step_size
        self.leapfrog_steps = leapfrog_steps
        self.map_steps = map_steps
        self.bounds = bounds
        self.random_state = random_state

    def _draw(self, x: Tensor, y: Tensor, cases: Cases, source: torch.Generator, *, trial: bool) -> Tensor:
        if self.chains < 1 or self.samples < 4 * self.chains:
            raise DataError(
                f"there are {self.samples} samples of {self.chains} chains; each chain needs at least 4."
            )
        chains = 1 if trial else self.chains
        samples = min(50, self.samples) if trial else -(-self.samples // chains)
        density, start = _posterior_and_map(self, x, y, cases.repeat(chains), source)
        run = samplers.hmc(
            density,
            start,
            samples=samples,
            burn_in=min(50, self.burn_in) if trial else self.burn_in,
            step_size=self.step_size,
            leapfrog_steps=self.leapfrog_steps,
            generator=source,
        )
        if not trial:
            values = self._network()(run.samples.flatten(0, 1), x).unflatten(0, run.samples.shape[:2])
            self.diagnostics_ |= {
                "acceptance": float(run.acceptance.mean()),
                "step_size": float(run.step_size.mean()),
                "r_hat": float(samplers.r_hat(values).max()),
                "effective_sample_size": float(samplers.effective_sample_size(values).min()),
            }
        return run.samples.unflatten(1, (chains, len(cases.p2))).flatten(0, 1)


class SGHMCSurrogate(NetworkSurrogate):
    """Networks drawn by stochastic-gradient HMC from mini-batches.

    Args:
        hidden: widths of the hidden layers.
        activation: "tanh" or "relu".
        prior_variance: as for `HMCSurrogate`.
        noise_variance: as for `HMCSurrogate`.
        steps: of the chain, burn-in included.
        burn_in: steps in which the mass matrix adapts and nothing is kept.
        keep_every: of the others, each so-many-th is kept.
        chains: run in one batch.
        lr: step size.
        batch_size: rows of a gradient.
        bounds: box of the inputs, ``(2, features)``; that of the training rows if not given.
        random_state: of all draws.
    """

    def __init__(
        self,
        hidden: Sequence[int] = (128, 128, 128),
        activation: Activation = "tanh",
        prior_variance: Variance = None,
        noise_variance: Variance = None,
        steps: int = 2000,
        burn_in: int = 1000,
        keep_every: int = 5,
        chains: int = 1,
        lr: float = 0.01,
        batch_size: int = 5,
        *,
        bounds: Bounds | None = None,
        random_state: int = 0,
    ) -> None:
        self.hidden = hidden
        self.activation = activation
        self.prior_variance = prior_variance
        self.noise_variance = noise_variance
        self.steps = steps
        self.burn_in = burn_in
        self.keep_every = keep_every
        self.chains = chains
        self.lr = lr
        self.batch_size = batch_size
        self.bounds = bounds
        self.random_state = random_state

    def _draw(self, x: Tensor, y: Tensor, cases: Cases, source: torch.Generator, *, trial: bool) -> Tensor:
        if self.chains < 1:
            raise DataError(f"chains is {self.chains}; at least one is needed.")
        chains = 1 if trial else self.chains
        network = self._network()
        every = cases.repeat(chains)
        parts = (normal_prior(every.p2), gaussian_likelihood(every.s2))
        run = samplers.sghmc(
            minibatch_log_posterior(network, x, y, *parts, self.batch_size, every.seen),
            network.initial(len(every.p2), source),
            steps=self.steps,
            burn_in=self.burn_in,
            keep_every=self.keep_every,
            lr=self.lr,
            gradient_noise=self.batch_size < float(cases.seen.sum(1).max()),
            generator=source,
        )
        return run.samples.unflatten(1, (chains, len(cases.p2))).flatten(0, 1)


class EnsembleSurrogate(NetworkSurrogate):
    """Networks trained from different first weights, each to the MAP estimate of a random part of the rows.

    Args:
        hidden: widths of the hidden layers.
        activation: "tanh" or "relu".
        prior_variance: as for `HMCSurrogate`.
        noise_variance: as for `HMCSurrogate`.
        members: networks.
        part: of the rows that each member sees, in (0, 1].
        map_steps: of Adam.
        lr: of Adam.
        bounds: box of the inputs, ``(2, features)``; that of the training rows if not given.
        random_state: of first weights and parts.
    """

    def __init__(
        self,
        hidden: Sequence[int] = (128, 128, 128),
        activation: Activation = "tanh",
        prior_variance: Variance = None,
        noise_variance: Variance = None,
        members: int = 10,
        part: float = 0.8,
        map_steps: int = 1000,
        lr: float = 0.01,
        *,
        bounds: Bounds | None = None,
        random_state: int = 0,
    ) -> None:
        self.hidden = hidden
        self.activation = activation
        self.prior_variance = prior_variance
        self.noise_variance = noise_variance
        self.members = members
        self.part = part
        self.map_steps = map_steps
        self.lr = lr
        self.bounds = bounds
        self.random_state = random_state

    def _draw(self, x: Tensor, y: Tensor, cases: Cases, source: torch.Generator, *, trial: bool) -> Tensor:
        if self.members < 2 or not 0 < self.part <= 1:
            raise DataError(
                f"there are {self.members} members on {self.part:g} of the rows; at least 2 members are "
                "needed, on a part in (0, 1]."
            )
        members = min(2, self.members) if trial else self.members
        every = cases.repeat(members)
        # Of the rows that a case may see, those with the smallest of random numbers.
        order = (
            torch.rand(every.seen.shape, generator=source)
            .masked_fill(every.seen == 0, 2.0)
            .argsort(1)
            .argsort(1)
        )
        count = (self.part * every.seen.sum(1, keepdim=True)).round().clamp_min(1)
        _, weights = _posterior_and_map(self, x, y, every._replace(seen=(order < count).double()), source)
        return weights.unflatten(0, (members, len(cases.p2)))


def _posterior_and_map(
    surrogate: HMCSurrogate | EnsembleSurrogate, x: Tensor, y: Tensor, cases: Cases, source: torch.Generator
) -> tuple[samplers.LogDensity, Tensor]:
    """The posterior of every case, and a MAP estimate of each."""
    network = surrogate._network()
    parts = (normal_prior(cases.p2), gaussian_likelihood(cases.s2))
    density = log_posterior(network, x, y, *parts, cases.seen)
    start = network.initial(len(cases.p2), source)
    return density, map_estimate(density, start, steps=surrogate.map_steps, lr=getattr(surrogate, "lr", 0.01))
