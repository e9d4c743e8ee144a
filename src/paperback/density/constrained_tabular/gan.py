"""A Wasserstein GAN for tables, with a place for a constraint layer between generator and critic.

The generator is shown one category of one column (chosen by log-frequency, so that rare ones are met) and has
to keep to it; the critic judges packs of rows under a gradient penalty. Amounts leave the generator through
tanh, modes and categories through Gumbel-softmax. With a layer, amounts are taken to original units in the
modes that were drawn, corrected, and taken back in the same modes before the critic sees them.

The networks are the CTGAN of Xu et al., Modeling tabular data using conditional GAN (NeurIPS 2019).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperback.density.constrained_tabular.layer import ConstraintLayer
from paperback.density.constrained_tabular.table import Encoding, Modes
from paperback.density.constrained_tabular.vae import constrain, sample_states
from paperback.errors import DataError, PaperbackError
from paperback.training import seeded
from paperback.training.progress import bar

TEMPERATURE = 0.2
PENALTY = 10.0
DEFAULTS: dict[str, Any] = {
    "epochs": 150,
    "batch_size": 500,
    "lr": 2e-4,
    "weight_decay": 1e-6,
    "critic_steps": 1,
    "pac": 10,
}


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.layers(x), x], 1)


class TabularGAN(nn.Module):
    """The generator and what it needs to draw rows; `ConstrainedTabular` is what a user wants.

    Args:
        encoding: of the table.
        hidden: width of the two residual layers.
        latent: dimensions of the noise.
    """

    frequencies: Tensor

    def __init__(self, encoding: Encoding, hidden: int = 256, latent: int = 128) -> None:
        super().__init__()
        self.modes = Modes(encoding)
        self.latent, n = latent, self.modes.n_numbers
        sizes = self.modes.sizes[n:]
        self.condition_width = sum(sizes)
        inputs = latent + self.condition_width
        self.layers = nn.Sequential(
            _Residual(inputs, hidden),
            _Residual(inputs + hidden, hidden),
            nn.Linear(inputs + 2 * hidden, n + self.modes.width),
        )
        self.register_buffer(
            "frequencies", torch.zeros(len(sizes), max(sizes, default=0))
        )  # of the categories
        starts = torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()][: len(sizes)], dtype=torch.long)
        self.register_buffer("condition_starts", starts, persistent=False)

    condition_starts: Tensor

    def forward(self, noise: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Amounts ``(batch, numbers)`` and padded logits ``(batch, slots, most states)``."""
        out = self.layers(torch.cat([noise, condition], 1))
        n = self.modes.n_numbers
        return torch.tanh(out[:, :n]), self.modes.padded(out[:, n:])

    def choose(self, n: int, weights: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """A column and one of its categories for each row, ``(n,)`` each, and their condition vectors."""
        condition = torch.zeros(n, self.condition_width, device=weights.device)
        columns = torch.zeros(n, dtype=torch.long, device=weights.device)
        if not self.condition_width:
            return columns, columns, condition
        columns = torch.randint(len(weights), (n,), generator=generator, device=weights.device)
        states = torch.multinomial(weights[columns], 1, generator=generator)[:, 0]
        return columns, states, condition.scatter_(1, (self.condition_starts[columns] + states)[:, None], 1.0)

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Rows: values of the numbers in original units ``(n, numbers)``, and states ``(n, slots)``."""
        _, _, condition = self.choose(n, self.frequencies, generator)
        noise = torch.randn(n, self.latent, generator=generator, device=condition.device)
        amounts, logits = self(noise, condition)
        states = sample_states(logits.log_softmax(2), generator)
        return self.modes.values(amounts, states), states


def make_critic(width: int, pac: int, hidden: int = 256) -> nn.Sequential:
    """The critic of packs of `pac` rows."""
    return nn.Sequential(
        nn.Unflatten(0, (-1, pac)),
        nn.Flatten(),
        nn.Linear(pac * width, hidden),
        nn.LeakyReLU(0.2),
        nn.Dropout(0.5),
        nn.Linear(hidden, hidden),
        nn.LeakyReLU(0.2),
        nn.Dropout(0.5),
        nn.Linear(hidden, 1),
    )


class _Rows:
    """The training rows, found by a category of a column."""

    def __init__(self, network: TabularGAN, amounts: Tensor, states: Tensor) -> None:
        self.amounts, self.states = amounts, states
        categories = states[:, network.modes.n_numbers :]
        most = network.frequencies.shape[1]
        self.by_state = categories.argsort(dim=0, stable=True).T  # (columns, rows), sorted by category
        self.counts = (
            torch.stack([torch.bincount(c, minlength=most) for c in categories.T])
            if most
            else torch.zeros(0, 0)
        )
        self.starts = self.counts.cumsum(1) - self.counts if most else self.counts
        network.frequencies.copy_(self.counts / max(len(states), 1))
        self.log_frequencies = (self.counts + 1.0).log() * (self.counts > 0)

    def take(self, columns: Tensor, states: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A row for each condition, at random among those that have the category."""
        uniform = torch.rand(len(columns), generator=generator, device=columns.device)
        if len(self.counts):
            place = self.starts[columns, states] + (uniform * self.counts[columns, states]).long()
            index = self.by_state[columns, place]
        else:
            index = (uniform * len(self.states)).long()
        return self.amounts[index], self.states[index]


def fit_gan(
    network: TabularGAN,
    amounts: Tensor,
    states: Tensor,
    layer: ConstraintLayer | None,
    *,
    seed: int,
    progress: bool,
    **training: Any,
) -> None:
    """Train the generator in place, against a critic that is not kept.

    Two players with an optimizer each do not fit `paperback.training.train`, so the steps are taken here.

    Args:
        network: the generator.
        amounts: of the training rows, ``(rows, numbers)``.
        states: of the training rows, ``(rows, slots)``.
        layer: the constraint layer, over the columns of numbers; None trains without.
        seed: of the training.
        progress: show a bar.
        **training: epochs, batch_size, lr, weight_decay, critic_steps (of the critic for one of the
        generator) and
            pac (rows of a pack, which divides batch_size).

    Raises:
        DataError: if a setting is unknown or out of range.
        PaperbackError: if a loss is no longer finite.
    """
    settings = _settings(training)
    size, pac, device = settings["batch_size"], settings["pac"], amounts.device
    steps = settings["epochs"] * math.ceil(len(states) / size)
    generator = torch.Generator(device).manual_seed(seed)
    with seeded(seed, "GAN"), bar("GAN", steps, size, show=progress) as advance:
        critic = make_critic(network.modes.n_numbers + network.modes.width + network.condition_width, pac).to(
            device
        )
        rows = _Rows(network, amounts, states)
        optimizers = [
            torch.optim.Adam(
                player.parameters(),
                settings["lr"],
                (0.5, 0.9),
                weight_decay=settings["weight_decay"],
                fused=True,
            )
            for player in (network, critic)
        ]
        network.train()
        for step in range(steps):
            for _ in range(settings["critic_steps"]):
                critic_loss = _critic_loss(network, critic, rows, layer, size, pac, generator)
                _descend(optimizers[1], critic_loss)
            generator_loss = _generator_loss(network, critic, rows, layer, size, generator)
            _descend(optimizers[0], generator_loss)
            if step % 50 == 0 and not math.isfinite(critic_loss.item() + generator_loss.item()):
                raise PaperbackError(
                    f"step {step} of the GAN has a loss that is not finite; lower the learning rate."
                )
            advance(step + 1, "")
        network.eval()


def _settings(training: dict[str, Any]) -> dict[str, Any]:
    unknown = [name for name in training if name not in DEFAULTS]
    if unknown:
        raise DataError(
            f"the training of a GAN has no setting {unknown[0]!r}; there are {', '.join(DEFAULTS)}."
        )
    settings = DEFAULTS | training
    for name, value in settings.items():
        if name != "weight_decay" and not value > 0:
            raise DataError(f"{name} is {value}; it must be greater than 0.")
    if settings["batch_size"] % settings["pac"]:
        raise DataError(
            f"pac is {settings['pac']}; it must divide the batch of {settings['batch_size']} rows."
        )
    return settings


def _descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def _fake(
    network: TabularGAN, condition: Tensor, layer: ConstraintLayer | None, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Generated rows as the critic sees them, ``(batch, numbers + width)``, and their states' logits."""
    noise = torch.randn(len(condition), network.latent, generator=generator, device=condition.device)
    amounts, logits = network(noise, condition)
    uniform = torch.rand(logits.shape, generator=generator, device=logits.device).clamp_min_(1e-20)
    soft = ((logits - (-uniform.log()).log()) / TEMPERATURE).softmax(2)
    if layer is not None:
        amounts = constrain(network.modes, layer, amounts, soft.argmax(2))
    return torch.cat([amounts, network.modes.flat(soft)], 1), logits


def _critic_loss(
    network: TabularGAN,
    critic: nn.Module,
    rows: _Rows,
    layer: ConstraintLayer | None,
    size: int,
    pac: int,
    generator: torch.Generator,
) -> Tensor:
    columns, states, condition = network.choose(size, rows.log_frequencies, generator)
    with torch.no_grad():
        fake, _ = _fake(network, condition, layer, generator)
        shuffle = torch.randperm(size, generator=generator, device=condition.device)
        amounts, real_states = rows.take(columns[shuffle], states[shuffle], generator)
        real = torch.cat([amounts, network.modes.one_hot(real_states), condition[shuffle]], 1)
        fake = torch.cat([fake, condition], 1)
    share = (
        torch.rand(size // pac, 1, 1, generator=generator, device=real.device)
        .expand(-1, pac, 1)
        .reshape(size, 1)
    )
    between = (share * real + (1 - share) * fake).requires_grad_()
    (gradient,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    penalty = ((gradient.reshape(size // pac, -1).norm(dim=1) - 1) ** 2).mean()
    return critic(fake).mean() - critic(real).mean() + PENALTY * penalty


def _generator_loss(
    network: TabularGAN,
    critic: nn.Module,
    rows: _Rows,
    layer: ConstraintLayer | None,
    size: int,
    generator: torch.Generator,
) -> Tensor:
    columns, states, condition = network.choose(size, rows.log_frequencies, generator)
    fake, logits = _fake(network, condition, layer, generator)
    loss = -critic(torch.cat([fake, condition], 1)).mean()
    if network.condition_width:
        asked = logits[torch.arange(size, device=logits.device), network.modes.n_numbers + columns]
        loss = loss + F.cross_entropy(asked, states)
    return loss
