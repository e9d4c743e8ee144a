"""A variational autoencoder for tables, with a place for a constraint layer in its training.

    loss = -2 E_q [log p(row | z)] + KL(q(z | row) || N(0, 1)),

where the numbers' amounts are Gaussian about tanh of the decoder's output with a learned width per column,
and modes and categories are categorical. With a layer, the decoded amounts are taken to original units in the
row's own modes, corrected, and taken back in the same modes before they are compared with the row.

The network is the TVAE of Xu et al., Modeling tabular data using conditional GAN (NeurIPS 2019).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from paperback.density.constrained_tabular.layer import ConstraintLayer
from paperback.density.constrained_tabular.table import Encoding, Modes
from paperback.training import train

LOSS_FACTOR = 2.0  # weight of the reconstruction against the divergence
MIN_WIDTH, MAX_WIDTH = 0.01, 1.0  # of the Gaussians, in amounts
GIBBS_STEPS = 50
DEFAULTS: dict[str, Any] = {"epochs": 300, "batch_size": 500, "lr": 1e-3, "weight_decay": 1e-5}


class TabularVAE(nn.Module):
    """The network; `ConstrainedTabular` is what a user wants.

    Args:
        encoding: of the table.
        hidden: width of the two hidden layers of encoder and decoder.
        latent: dimensions of z.
    """

    def __init__(self, encoding: Encoding, hidden: int = 128, latent: int = 128) -> None:
        super().__init__()
        self.modes = Modes(encoding)
        n, width = self.modes.n_numbers, self.modes.width
        self.latent = latent
        self.encoder = nn.Sequential(
            nn.Linear(n + width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()
        )
        self.posterior = nn.Linear(hidden, 2 * latent)
        self.decoder = nn.Sequential(
            nn.Linear(latent, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, n + width),
        )
        self.log_width = nn.Parameter(torch.full((n,), math.log(0.1)))
        empty = torch.tensor(
            [c.n_states - 1 if c.missing else -1 for c in encoding.numbers], dtype=torch.long
        )
        self.register_buffer("empty", empty, persistent=False)

    empty: Tensor

    def encode(self, amounts: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance of z, ``(batch, latent)`` each."""
        hidden = self.encoder(torch.cat([amounts, self.modes.one_hot(states)], 1))
        mean, log_variance = self.posterior(hidden).chunk(2, 1)
        return mean, log_variance

    def decode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Means of the amounts, and log-probabilities of the states ``(batch, slots, most states)``."""
        out = self.decoder(z)
        n = self.modes.n_numbers
        return torch.tanh(out[:, :n]), self.modes.padded(out[:, n:]).log_softmax(2)

    @property
    def width(self) -> Tensor:
        """Standard deviations of the amounts about their means."""
        return self.log_width.exp().clamp(MIN_WIDTH, MAX_WIDTH)

    def log_likelihood(self, means: Tensor, log_probs: Tensor, amounts: Tensor, states: Tensor) -> Tensor:
        """log p(row | z) in amounts, ``(batch,)``; an empty cell has a state only."""
        gaussian = (
            -0.5 * ((amounts - means) / self.width) ** 2 - self.width.log() - 0.5 * math.log(2 * math.pi)
        )
        known = states[:, : self.modes.n_numbers] != self.empty
        return (gaussian * known).sum(1) + log_probs.gather(2, states[..., None]).sum((1, 2))

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Rows: values of the numbers in original units ``(n, numbers)``, and states ``(n, slots)``."""
        return self._draw_given(
            torch.randn(n, self.latent, generator=generator, device=generator.device), generator
        )

    def _draw_given(self, z: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        means, log_probs = self.decode(z)
        noise = torch.randn(means.shape, generator=generator, device=means.device)
        states = sample_states(log_probs, generator)
        return self.modes.values((means + self.width * noise).clamp(-1, 1), states), states

    def complete(
        self,
        amounts: Tensor,
        states: Tensor,
        fixed_numbers: Tensor,
        fixed_slots: Tensor,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """Rows given some of their cells, by alternating between encoder and decoder with these cells held.

        The alternation is a Markov chain whose stationary distribution is the model's conditional as far as
        the encoder is the true posterior (Rezende et al. 2014).

        Args:
            amounts: ``(batch, numbers)``; right where fixed.
            states: ``(batch, slots)``; right where fixed.
            fixed_numbers: which numbers are held, ``(numbers,)``.
            fixed_slots: which slots are held, ``(slots,)``.
            generator: source of randomness.

        Returns:
            Values in original units and states.
        """
        values, start = self.draw(len(states), generator)
        now_states = torch.where(fixed_slots, states, start)
        now_amounts = torch.where(fixed_numbers, amounts, self.modes.amounts(values, start))
        for _ in range(GIBBS_STEPS):
            mean, log_variance = self.encode(now_amounts, now_states)
            noise = torch.randn(mean.shape, generator=generator, device=mean.device)
            values, drawn = self._draw_given(mean + (0.5 * log_variance).exp() * noise, generator)
            now_states = torch.where(fixed_slots, states, drawn)
            now_amounts = torch.where(fixed_numbers, amounts, self.modes.amounts(values, drawn))
        return self.modes.values(now_amounts, now_states), now_states

    def elbo(self, amounts: Tensor, states: Tensor, n_samples: int, generator: torch.Generator) -> Tensor:
        """Lower bound on the log-density of rows in original units, nats ``(batch,)``."""
        mean, log_variance = self.encode(amounts, states)
        total = torch.zeros(len(states), device=mean.device)
        for _ in range(n_samples):
            noise = torch.randn(mean.shape, generator=generator, device=mean.device)
            total += self.log_likelihood(
                *self.decode(mean + (0.5 * log_variance).exp() * noise), amounts, states
            )
        n = self.modes.n_numbers
        scales = self.modes.scales.expand(len(states), -1, -1).gather(2, states[:, :n, None])[..., 0]
        jacobian = (scales.log() * (states[:, :n] != self.empty)).sum(1)
        return total / n_samples - divergence(mean, log_variance) - jacobian


def constrain(modes: Modes, layer: ConstraintLayer, amounts: Tensor, states: Tensor) -> Tensor:
    """Amounts after the layer has corrected the values that they stand for, in the same modes.

    They are kept within [-1, 1], as all amounts are. A narrow mode (a column that is mostly zero has one)
    would otherwise turn a small correction into hundreds of its widths, and one cell would outweigh the rest
    of the loss.
    """
    values = modes.values(amounts, states)
    moved = modes.amounts(layer(values), states) - modes.amounts(values, states)
    return (amounts + moved).clamp(-1.0, 1.0)


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(0, 1)), ``(batch,)``."""
    return 0.5 * (mean**2 + log_variance.exp() - log_variance - 1).sum(1)


def sample_states(log_probs: Tensor, generator: torch.Generator) -> Tensor:
    """One state per slot by Gumbel's trick, ``(batch, slots)``."""
    uniform = torch.rand(log_probs.shape, generator=generator, device=log_probs.device).clamp_min_(1e-20)
    return (log_probs - (-uniform.log()).log()).argmax(2)


def fit_vae(
    network: TabularVAE,
    amounts: Tensor,
    states: Tensor,
    layer: ConstraintLayer | None,
    *,
    seed: int,
    progress: bool,
    **training: Any,
) -> None:
    """Train the network in place.

    Args:
        network: the network.
        amounts: of the training rows, ``(rows, numbers)``.
        states: of the training rows, ``(rows, slots)``.
        layer: the constraint layer, over the columns of numbers; None trains without.
        seed: of the training.
        progress: show a bar.
        **training: settings of `paperback.training.train`.
    """

    def loss(model: TabularVAE, batch: tuple[Tensor, ...], generator: torch.Generator) -> dict[str, Tensor]:
        a, s = batch
        mean, log_variance = model.encode(a, s)
        noise = torch.randn(mean.shape, generator=generator, device=mean.device)
        means, log_probs = model.decode(mean + (0.5 * log_variance).exp() * noise)
        if layer is not None:
            means = constrain(model.modes, layer, means, s)
        fit, kl = model.log_likelihood(means, log_probs, a, s).mean(), divergence(mean, log_variance).mean()
        return {"loss": kl - LOSS_FACTOR * fit, "kl": kl, "log_likelihood": fit}

    settings = DEFAULTS | training
    train(network, loss, (amounts, states), seed=seed, progress=progress, description="VAE", **settings)
