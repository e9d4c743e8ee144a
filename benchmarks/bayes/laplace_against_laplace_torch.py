"""Our linearised Laplace approximation beside laplace-torch: the same weights in, mean and variance out.

    python benchmarks/bayes/laplace_against_laplace_torch.py

A tanh network of 2 x 32 is trained once; both then take the Kronecker-factored curvature at its weights and
predict at 200 points. With biases as columns of their matrices, which is ours, the two must agree to 1e-3.
laplace-torch's own way gives weights and biases separate factors; how far each way is from the full
Gauss-Newton matrix (laplace-torch's "full") is printed beside it.

laplace-torch runs in an environment of its own, `tools/setup-peers bayes`.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from peers import run_peer

from paperback.bayes.bnn_surrogate.laplace import KroneckerPosterior
from paperback.bayes.networks import RegNet, map_estimate

S2, DELTA, BAR = 0.1, 0.5, 1e-3
WAYS = {
    "columns": {"homogeneous": True, "structure": "kron"},
    "separate": {"homogeneous": False, "structure": "kron"},
    "full": {"homogeneous": False, "structure": "full"},
}


def main() -> None:
    torch.set_num_threads(1)
    for outputs in (1, 2):
        network, source = RegNet(2, outputs, (32, 32)), torch.Generator().manual_seed(0)
        x, new = (torch.rand(n, 2, generator=source, dtype=torch.float64) for n in (50, 200))
        y = torch.sin(4 * x[:, :1]).expand(-1, outputs) + 0.1 * torch.randn(50, outputs, generator=source)

        def objective(
            weights: torch.Tensor, network: RegNet = network, x: torch.Tensor = x, y: torch.Tensor = y
        ) -> torch.Tensor:
            return -(network(weights, x) - y).square().mean((1, 2)) - 5e-4 * weights.square().sum(1)

        weights = map_estimate(objective, network.initial(1, source), steps=500)[0]
        posterior = KroneckerPosterior(network)
        start = time.perf_counter()
        log_marginal = posterior.fit(weights, x, y, S2, DELTA)
        mean, features = posterior.features(weights, new)
        variance = features.square().sum(-1).numpy()
        ours = time.perf_counter() - start
        parts = {
            f"{kind}{number}": part[0].numpy()
            for number, layer in enumerate(network.split(weights[None]))
            for kind, part in zip("Wb", layer, strict=True)
        }
        given = {"x": x.numpy(), "y": y.numpy(), "new": new.numpy(), "s2": S2, "delta": DELTA, **parts}
        print(f"\n{outputs} outputs")
        found = {name: run_peer("laplace_torch_lla.py", **given, **way) for name, way in WAYS.items()}
        if missing := [each for each in found.values() if isinstance(each, str)]:
            print(f"laplace-torch: {missing[0]}")
            continue
        peers = {name: each for name, each in found.items() if not isinstance(each, str)}
        full = peers["full"]["variance"]
        print(f"{'':26}{'seconds':>8} {'log marginal':>13} {'variance, median error against full':>36}")
        for name, peer in peers.items():
            seconds, evidence = float(peer["fit_seconds"] + peer["seconds"]), float(peer["log_marginal"])
            print(
                f"laplace-torch, {name:11}{seconds:8.3f} {evidence:13.4f} {off(peer['variance'], full):36.2f}"
            )
        print(f"{'ours':26}{ours:8.3f} {log_marginal:13.4f} {off(variance, full):36.2f}")
        same = peers["columns"]
        worst_mean = np.abs(same["mean"] - mean.numpy()).max()
        worst = np.abs(same["variance"] / variance - 1).max()
        ratio = float(same["fit_seconds"] + same["seconds"]) / ours
        print(f"against columns: mean to {worst_mean:.1e}, variance to {worst:.1e} (bar: {BAR:g}); ", end="")
        print(f"{ratio:.0f} times as fast")


def off(variance: np.ndarray, full: np.ndarray) -> float:
    """Median relative error."""
    return float(np.median(np.abs(variance / full - 1)))


if __name__ == "__main__":
    main()
