"""Our HMC with batched chains beside Pyro's NUTS: effective samples per second on a network of 2 x 32.

    python benchmarks/bayes/hmc_against_pyro.py [--chains 64] [--draws 100] [--pyro-draws 100]

Both sample the weights of one tanh network with one prior and likelihood, on the same 20 rows, from the same
MAP estimate (our chains each from their own). Counted are bulk effective sample sizes of the network's
values at 41 points, by the same function for both; the seconds are those of sampling, and of sampling with
the burn-in. One thread. The bar: at least 3 times as many effective samples per second.

Pyro runs in an environment of its own, `tools/setup-peers bayes`.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from peers import run_peer

from paperback.bayes.networks import RegNet, gaussian_likelihood, log_posterior, map_estimate, normal_prior
from paperback.bayes.samplers import effective_sample_size, hmc, r_hat

P2, S2, BAR = 1.0, 0.1, 3.0


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """20 rows in two clusters, a sine with noise, standardised."""
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.uniform(0.05, 0.35, 10), rng.uniform(0.65, 0.95, 10)])[:, None]
    y = np.sin(10 * x) + 0.3 * rng.standard_normal(x.shape)
    return torch.as_tensor(x), torch.as_tensor((y - y.mean()) / y.std())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--chains", type=int, default=64)
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--burn-in", type=int, default=150)
    parser.add_argument("--leapfrog-steps", type=int, default=60)
    parser.add_argument("--pyro-draws", type=int, default=100)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    x, y = rows()
    network = RegNet(1, 1, (32, 32))
    density = log_posterior(network, x, y, normal_prior(P2), gaussian_likelihood(S2))
    source = torch.Generator().manual_seed(0)
    first = map_estimate(density, network.initial(arguments.chains, source), steps=1000)
    grid = torch.linspace(0, 1, 41, dtype=torch.float64)[:, None]

    def values(samples: torch.Tensor) -> torch.Tensor:
        """``(draws, chains, size)`` to ``(draws, chains, grid)``."""
        return network(samples.flatten(0, 1), grid)[..., 0].unflatten(0, samples.shape[:2])

    def run(
        burn_in: int, draws: int, start: torch.Tensor, step_size: float
    ) -> tuple[torch.Tensor, torch.Tensor, float]:
        begin = time.perf_counter()
        chains = hmc(
            density, start, samples=draws, burn_in=burn_in, step_size=step_size,
            leapfrog_steps=arguments.leapfrog_steps, generator=source,
        )  # fmt: skip
        return chains.samples, chains.step_size, time.perf_counter() - begin

    warm, steps, burn_in_seconds = run(arguments.burn_in, 1, first, 0.02)
    samples, _, seconds = run(0, arguments.draws, warm[-1], float(steps.median()))
    print(
        f"{'':29}{'effective':>10} {'s':>7} {'burn-in s':>10} {'per s':>8} {'with burn-in':>13} {'R-hat':>7}"
    )
    shape = f"{arguments.chains} chains x {arguments.draws}"
    ours = report("ours", shape, values(samples), seconds, burn_in_seconds)
    given = {
        "x": x.numpy(),
        "y": y.numpy(),
        "widths": np.array(network.widths),
        "p2": P2,
        "s2": S2,
        "start": first[0].numpy(),
        "draws": arguments.pyro_draws,
        "burn_in": arguments.burn_in,
    }
    peer = run_peer("pyro_network_nuts.py", limit=900, **given)
    if isinstance(peer, str):
        print(f"Pyro's NUTS: {peer}")
        return
    drawn = values(torch.from_numpy(peer["samples"])[:, None])
    shape = f"1 chain x {arguments.pyro_draws}"
    theirs = report("Pyro's NUTS", shape, drawn, float(peer["seconds"]), float(peer["burn_in_seconds"]))
    print(
        f"leapfrog steps of a draw: ours {arguments.leapfrog_steps}, NUTS {float(peer['leapfrog_steps']):.0f}"
    )
    for what, one, two in zip(("sampling", "sampling and burn-in"), ours, theirs, strict=True):
        print(f"effective samples per second, {what}: ratio {one / two:.1f} (bar: {BAR:g})")


def report(
    name: str, shape: str, values: torch.Tensor, seconds: float, burn_in_seconds: float
) -> tuple[float, float]:
    """Print a row, and give effective samples per second without and with the burn-in."""
    size = float(effective_sample_size(values).median())
    rates = size / seconds, size / (seconds + burn_in_seconds)
    print(
        f"{name:12}{shape:17}{size:10.0f} {seconds:7.1f} {burn_in_seconds:10.1f} {rates[0]:8.1f} "
        f"{rates[1]:13.1f} {float(r_hat(values).max()):7.3f}"
    )
    return rates


if __name__ == "__main__":
    main()
