"""The weights of a tanh network by Pyro's NUTS.

Runs in `.venv-peers-bayes`, called by `run_peer`. Reads x ``(n, features)``, y ``(n, 1)``, widths, prior and
noise variance, start ``(size,)``, draws and burn_in; writes samples ``(draws, size)``, seconds, seconds of
the burn-in, and leapfrog steps of a draw. NUTS is given the potential itself, which is its fastest way.
"""

import itertools
import sys
import time

import numpy as np
import pyro
import torch
from pyro.infer import MCMC, NUTS


def main() -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    given = np.load(sys.argv[1])
    x, y = torch.from_numpy(given["x"]), torch.from_numpy(given["y"])
    widths = given["widths"].tolist()
    p2, s2, burn_in = float(given["p2"]), float(given["s2"]), int(given["burn_in"])
    layers = list(itertools.pairwise(widths))
    sizes = [size for i, o in layers for size in (i * o, o)]
    calls = [0]

    def potential(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        calls[0] += 1
        weights, h = parameters["weights"], x
        parts = weights.split(sizes)
        for layer, (i, o) in enumerate(layers):
            h = torch.addmm(parts[2 * layer + 1], h, parts[2 * layer].view(o, i).T)
            if layer < len(layers) - 1:
                h = h.tanh()
        return (y - h).square().sum() / (2 * s2) + weights.square().sum() / (2 * p2)

    pyro.set_rng_seed(0)
    marks = []

    def watch(kernel, samples, stage, i):
        if stage == "Warmup" and i + 1 == burn_in:
            marks.extend([time.perf_counter(), calls[0]])

    kernel = NUTS(potential_fn=potential)
    chain = MCMC(
        kernel,
        int(given["draws"]),
        burn_in,
        initial_params={"weights": torch.from_numpy(given["start"])},
        hook_fn=watch,
        disable_progbar=True,
    )
    start = time.perf_counter()
    chain.run()
    end = time.perf_counter()
    samples = chain.get_samples()["weights"].numpy()
    middle, before = marks[:2]
    np.savez(
        sys.argv[2],
        samples=samples,
        seconds=end - middle,
        burn_in_seconds=middle - start,
        leapfrog_steps=(calls[0] - before) / len(samples),
    )


if __name__ == "__main__":
    main()
