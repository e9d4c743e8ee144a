"""Marginalization models beside their rivals, on the same data, in one script.

    python benchmarks/density/marginalization.py [--seconds 60] [--side 10] [--queries 64]

1. Energy training, the authors' Ising lattice (10x10, sigma .1, bias .2): ours, a transcription of the
   authors' procedure, and any-order autoregressive models (all conditionals; one random step), with equal
   trunks and seconds. Quality: the bound on log Z by the conditionals, higher is better, and the nats of rows
   from a Gibbs sampler by the conditionals and by the head, lower is better; the time of a step.
2. One marginal against the number of variables: our head, our conditionals along one order with all steps
   batched, and along one order with one network call after the other, as the authors' code asks.

The official code (PrincetonLIPS/MaM) is no package: it needs CUDA, hydra and igraph, and does not run here.
`Authors` is our own transcription of its algorithm: two separate passes for the two sides of a residual,
erased positions refilled over whole logits, and no product of marginals to start from.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from paperback.density.marginalization import AnyOrderARM, IsingEnergy, MarginalizationModel
from paperback.density.marginalization.orders import complete_in_order, ordered_log_prob
from paperback.numerics.spins import colour, gibbs_sweep, ising_to_potts

SETTINGS = {"hidden": 256, "n_blocks": 3}
BATCH, RATE = 256, 5e-4


def median_seconds(ask: Callable[[], object], most: float = 4.0) -> float:
    times: list[float] = []
    while len(times) < 9 and sum(times) < most:
        start = time.perf_counter()
        ask()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


# -- the authors' procedure, transcribed ---------------------------------------------------------------------


class PlainNet(nn.Module):
    """The residual network of the authors: one-hot symbols, leaky units, a linear read-out."""

    def __init__(self, n: int, outputs: int, hidden: int, n_blocks: int) -> None:
        super().__init__()
        self.first = nn.Linear(3 * n, hidden)
        self.blocks = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(n_blocks))
        self.last = nn.Linear(hidden, outputs)

    def forward(self, symbols: Tensor) -> Tensor:
        h = nn.functional.leaky_relu(self.first(nn.functional.one_hot(symbols, 3).float().flatten(1)))
        for block in self.blocks:
            h = nn.functional.leaky_relu(block(h)) + h
        return self.last(h)


class Authors(nn.Module):
    """Two networks, the KL objective, a chain that erases and refills four positions."""

    def __init__(self, n: int, hidden: int, n_blocks: int) -> None:
        super().__init__()
        self.n = n
        self.marginal = PlainNet(n, 1, hidden, n_blocks)
        self.conditional = PlainNet(n, 2 * n, hidden, n_blocks)

    def logits(self, symbols: Tensor) -> Tensor:
        return self.conditional(symbols).unflatten(1, (self.n, 2))

    def logits_at(self, symbols: Tensor, columns: Tensor) -> Tensor:
        return self.logits(symbols)[torch.arange(len(columns)), columns]

    def refill(self, states: Tensor, draws: torch.Generator) -> Tensor:
        rank = torch.rand(states.shape, generator=draws).argsort(1)
        symbols = torch.where(rank >= self.n - 4, 0, states + 1)
        for i in range(self.n - 4, self.n):
            chosen = rank == i
            p = self.logits(symbols)[chosen].softmax(-1)
            symbols = symbols + chosen * (torch.multinomial(p, 1, generator=draws) + 1)
        return symbols - 1

    def loss(self, f: IsingEnergy, states: Tensor, draws: torch.Generator, alpha: float = 4.0) -> Tensor:
        log_p = self.marginal(states + 1)[:, 0]
        with torch.no_grad():
            ratio = log_p - f(states)
            reward = (ratio - ratio.mean()) / (ratio.std() + 1e-7)
        rank = torch.rand(states.shape, generator=draws).argsort(1)
        step = torch.randint(1, self.n + 1, (len(states), 1), generator=draws)
        after, before = rank < step, rank < step - 1
        m_after = self.marginal((states + 1) * after)[:, 0]
        symbols = (states + 1) * before
        m_before = self.marginal(symbols)[:, 0]
        chosen = rank == step - 1
        log_c = self.logits(symbols)[chosen].log_softmax(-1)
        log_c = log_c.gather(1, states[chosen][:, None])[:, 0]
        residual = (m_after - m_before - log_c).square().mean()
        nothing = self.marginal(torch.zeros(1, self.n, dtype=torch.int64))[0, 0]
        begin = (nothing - self.n * torch.tensor(2.0).log()).square()
        return (reward * log_p).mean() + alpha * (self.n * residual + begin)


def train_authors(n: int, f: IsingEnergy, seconds: float) -> tuple[Authors, float, int]:
    torch.manual_seed(0)
    model, draws = Authors(n, **SETTINGS), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    nothing = torch.zeros(BATCH, n, dtype=torch.int64)
    start, steps, states = time.perf_counter(), 0, nothing
    while time.perf_counter() - start < seconds:
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - (time.perf_counter() - start) / seconds)
        if steps % 200 == 0:
            arrival = torch.rand(BATCH, n, generator=draws)
            states = complete_in_order(model, nothing, nothing.bool(), arrival, draws)
        with torch.no_grad():
            states = model.refill(states, draws)
        optimizer.zero_grad()
        model.loss(f, states, draws).backward()
        optimizer.step()
        steps += 1
    return model, (time.perf_counter() - start) / steps, steps


# -- energy training -----------------------------------------------------------------------------------------


def gibbs_rows(f: IsingEnergy, n: int, rows: int) -> Tensor:
    couplings, bias = ising_to_potts(f.couplings, f.field)
    draws = torch.Generator().manual_seed(1)
    states = torch.randint(0, 2, (rows, n), generator=draws)
    colours = colour(f.couplings != 0)
    for _ in range(300):
        states = gibbs_sweep(states, couplings, bias, colours, draws)
    return states


def steps_for(fit: Callable[[int], object], seconds: float, pilot: int) -> tuple[int, float]:
    start = time.perf_counter()
    fit(pilot)
    per_step = (time.perf_counter() - start) / pilot
    return max(pilot, int(seconds / per_step)), per_step


def energy_training(side: int, seconds: float) -> None:
    n, f = side * side, IsingEnergy.lattice(side, 0.1, 0.2)
    rows = gibbs_rows(f, n, 500)
    ranks = torch.arange(n)[None]
    print(f"1. {side}x{side} Ising lattice, sigma .1, bias .2; {seconds:.0f} s of training each")
    print(f"   {'':34s} ms per step   steps   bound on log Z   nats (conditionals)   nats (head)")

    def line(name: str, network: nn.Module, per_step: float, steps: int, head: str) -> None:
        draws = torch.Generator().manual_seed(2)
        nothing = torch.zeros(500, n, dtype=torch.int64)
        arrival = ranks.float().expand(500, -1)
        x = complete_in_order(network, nothing, nothing.bool(), arrival, draws)
        bound = float((f(x) - ordered_log_prob(network, x, x >= 0, ranks, 8192)[0]).mean())
        nats = -float(ordered_log_prob(network, rows, rows >= 0, ranks, 8192)[0].mean())
        print(f"   {name:34s} {1e3 * per_step:11.2f} {steps:7d} {bound:16.3f} {nats:21.3f} {head:>13s}")

    quiet = {"batch_size": BATCH, "lr": RATE, "progress": False}

    def ours(steps: int) -> MarginalizationModel:
        return MarginalizationModel(n, 2, **SETTINGS).fit_energy(f, steps=steps, **quiet)

    steps, per_step = steps_for(ours, seconds, 200)
    model = ours(steps)
    line("paperback", model.network, per_step, steps, f"{-float(model.log_prob(rows).mean()):.3f}")
    half = ours(steps // 2)
    line(
        "paperback, half the seconds",
        half.network,
        per_step,
        steps // 2,
        f"{-float(half.log_prob(rows).mean()):.3f}",
    )

    authors, plain_step, steps = train_authors(n, f, seconds)
    with torch.no_grad():
        m = authors.marginal(rows + 1)[:, 0] - authors.marginal(torch.zeros(1, n, dtype=torch.int64))[0, 0]
    line("the authors' procedure, transcribed", authors, plain_step, steps, f"{-float(m.mean()):.3f}")

    for estimator, name in (("exact", "any-order ARM"), ("one_step", "any-order ARM, one random step")):

        def rival(steps: int, estimator: str = estimator) -> AnyOrderARM:
            arm = AnyOrderARM(n, 2, **SETTINGS)
            return arm.fit_energy(f, steps=steps, estimator=estimator, **quiet)

        steps, arm_step = steps_for(rival, seconds, 5)
        line(name, rival(steps).network, arm_step, steps, "-")
        print(f"   {'':34s} a step of paperback is {arm_step / per_step:.1f} times as fast")
    print(f"   a step of paperback is {plain_step / per_step:.2f} times as fast as the transcription's")


# -- marginal inference --------------------------------------------------------------------------------------


@torch.no_grad()
def one_call_after_the_other(model: MarginalizationModel, states: Tensor) -> Tensor:
    """log p along one order as the authors ask for it: D calls, all logits each time."""
    symbols, total = torch.zeros_like(states), torch.zeros(len(states))
    for i in range(states.shape[1]):
        log_c = model.network.logits(symbols)[:, i].log_softmax(-1)
        total += log_c.gather(1, states[:, i : i + 1])[:, 0]
        symbols[:, i] = states[:, i] + 1
    return total


def marginal_inference(queries: int) -> None:
    print(f"2. one marginal of all D variables, ms per query in batches of {queries}; half of the variables")
    print("   halve the time along an order, not that of the head")
    print("       D      head   order, batched   order, step by step   times faster (batched, step by step)")
    for side in (8, 14, 20, 28, 40):
        d = side * side
        model = MarginalizationModel(d, 2)
        along = partial(model.log_prob, exact=True, n_orders=1)
        one_by_one = partial(one_call_after_the_other, model)
        states = torch.randint(0, 2, (queries, d), generator=torch.Generator().manual_seed(0))
        model.log_prob(states)  # the first call is slower
        head, batched, plain = (
            median_seconds(partial(ask, states)) for ask in (model.log_prob, along, one_by_one)
        )
        ms = [1e3 * t / queries for t in (head, batched, plain)]
        print(
            f"   {d:5d} {ms[0]:9.4f} {ms[1]:16.3f} {ms[2]:21.3f} {batched / head:23.0f} {plain / head:14.0f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="of energy training, each")
    parser.add_argument("--side", type=int, default=10, help="of the lattice")
    parser.add_argument("--queries", type=int, default=64)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    energy_training(arguments.side, arguments.seconds)
    marginal_inference(arguments.queries)


if __name__ == "__main__":
    main()
