"""Our tensor trains beside tensorly's, and our layer beside tensorly-torch's: errors, seconds.

    python -m pip install --no-deps --target PEERS tensorly==0.10.0 tensorly-torch==0.5.0 opt_einsum==3.4.0
    PYTHONPATH=PEERS python benchmarks/compress/compactifai.py [--side 512]

Both decompose the same float64 weights, some of `pretrained("lm-tiny")` and one larger matrix, at the same
bond dimensions: `tt_svd` and tensorly's `tensor_train_matrix` (PyTorch backend). For the forward pass both
layers get the same cores; tensorly-torch's BlockTT layer runs with implementation "factorized" (its
contraction) and "reconstructed" (it makes the weight), and the faster of the two counts. Times are medians,
in one thread, the two in turn.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from paperback.compress.factors import MPOLinear, balanced_factors, bond_limits, tt_matrix, tt_svd
from paperback.networks import pretrained
from paperback.networks.surgery import find_layers, weight_matrix
from paperback.training import generator

RATIOS = (0.5, 0.3)
KINDS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")  # of block 2


def medians(calls: dict[str, Callable[[], Any]], runs: int) -> dict[str, float]:
    """Seconds of each call, the median of some runs made in turn, after one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(runs + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if i:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def bond(out_shape: tuple[int, ...], in_shape: tuple[int, ...], ratio: float) -> int:
    """The largest chi at which the cores have at most this share of the weight's parameters."""
    limits = bond_limits(out_shape, in_shape)
    whole = math.prod(out_shape) * math.prod(in_shape)

    def numbers(chi: int) -> int:
        bonds = [1, *(min(chi, limit) for limit in limits), 1]
        pairs = zip(out_shape, in_shape, strict=True)
        return sum(bonds[k] * o * i * bonds[k + 1] for k, (o, i) in enumerate(pairs))

    return max(chi for chi in range(1, max(limits) + 1) if numbers(chi) <= ratio * whole)


def decompositions(weights: dict[str, Tensor], runs: int) -> None:
    """Print errors and seconds of both decompositions."""
    import tensorly
    from tensorly.decomposition import tensor_train_matrix

    tensorly.set_backend("pytorch")
    worst_error, ratios = 0.0, []
    for name, weight in weights.items():
        for n in (2, 3):
            out_shape, in_shape = (balanced_factors(side, n) for side in weight.shape)
            for ratio in RATIOS:
                chi = bond(out_shape, in_shape, ratio)
                limits = bond_limits(out_shape, in_shape)
                ranks = [1, *(min(chi, limit) for limit in limits), 1]
                tensor = weight.reshape(*out_shape, *in_shape)
                seconds = medians(
                    {
                        "ours": lambda w=weight, o=out_shape, i=in_shape, c=chi: tt_svd(w, o, i, c),
                        "tensorly": lambda t=tensor, r=ranks: tensor_train_matrix(t, r),
                    },
                    runs,
                )
                ours = tt_matrix(tt_svd(weight, out_shape, in_shape, chi))
                theirs = tt_matrix(list(tensor_train_matrix(tensor, ranks).factors))
                errors = [float((m - weight).norm() / weight.norm()) for m in (ours, theirs)]
                worst_error = max(worst_error, abs(errors[0] / errors[1] - 1))
                ratios.append(seconds["ours"] / seconds["tensorly"])
                print(
                    f"{name:32} n={n} chi={chi:4}  error {errors[0]:.4f} / {errors[1]:.4f}"
                    f"  seconds {seconds['ours']:.5f} / {seconds['tensorly']:.5f} = {ratios[-1]:.2f}"
                )
    print(f"error over tensorly's: 1 within {worst_error:.1e} (bar 1e-6)")
    print(
        f"time over tensorly's: median {statistics.median(ratios):.2f}, largest {max(ratios):.2f} (bar 1.2)"
    )


def passes(side: int, runs: int) -> None:
    """Print seconds of a forward pass of both layers with the same cores."""
    import tltorch

    dense = nn.Linear(side, side)
    with torch.no_grad():
        dense.weight.copy_(torch.randn(side, side, generator=generator(0)) / side**0.5)
    ratios = []
    for n in (2, 3):
        out_shape, in_shape = (balanced_factors(side, n) for _ in range(2))
        for ratio in (0.3, 0.05):
            chi = bond(out_shape, in_shape, ratio)
            ours = MPOLinear.from_dense(dense, chi, n)
            layers: dict[str, nn.Module] = {"ours": ours, "dense": dense}
            for way in ("factorized", "reconstructed"):
                peer = tltorch.FactorizedLinear(
                    in_tensorized_features=in_shape, out_tensorized_features=out_shape, bias=True,
                    factorization="blocktt", rank=[1, *ours.bonds, 1], implementation=way,
                )  # fmt: skip
                with torch.no_grad():
                    for theirs, core in zip(peer.weight.factors, ours.factors, strict=True):
                        theirs.copy_(core)
                    peer.bias.copy_(dense.bias)
                layers[f"tensorly-torch, {way}"] = peer
            for rows in (1, 64, 1024):
                x = torch.randn(rows, side, generator=generator(1))
                with torch.no_grad():
                    difference = float((layers["tensorly-torch, factorized"](x) - ours(x)).abs().max())
                    seconds = medians({k: lambda m=m, x=x: m(x) for k, m in layers.items()}, runs)
                best = min(v for k, v in seconds.items() if k.startswith("tensorly"))
                ratios.append(seconds["ours"] / best)
                times = ", ".join(f"{k} {v * 1e6:.0f}" for k, v in seconds.items())
                print(f"n={n} chi={chi:4} rows={rows:5}  microseconds: {times}; ours over the better: "
                      f"{ratios[-1]:.2f}; outputs differ by {difference:.0e}")  # fmt: skip
    print(
        f"forward over tensorly-torch's: median {statistics.median(ratios):.2f}, "
        f"largest {max(ratios):.2f} (bar 1)"
    )


def main() -> None:
    """Run both parts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--runs", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    layers = find_layers(pretrained("lm-tiny")).layers
    kinds = tuple(f"layers.2.{part}" for part in KINDS)
    weights = {n: weight_matrix(m).double() for n, m in layers.items() if n.endswith(kinds)}
    weights["random"] = torch.randn(arguments.side, arguments.side, generator=generator(0)).double()
    decompositions(weights, arguments.runs)
    with torch.no_grad():
        passes(arguments.side, 10 * arguments.runs)


if __name__ == "__main__":
    main()
