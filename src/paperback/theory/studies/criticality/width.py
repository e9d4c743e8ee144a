"""How far one random network is from the next, over widths and depths."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import nn

from paperback.study import Run
from paperback.theory.criticality import Criticality, sample_networks
from paperback.theory.studies.criticality.networks import ACTIVATIONS, multilayer
from paperback.training import generator


@dataclass
class Spread:
    """Standard deviation of the log of the output's norm, over networks of one width and depth."""

    activation: str
    seed: int
    width: int
    depth: int
    std: float


def spread_at_finite_width(run: Run) -> list[Spread]:
    widths: tuple[int, ...] = run.size(smoke=(16, 24, 32), standard=(16, 32, 64, 128, 256))
    depths: tuple[int, ...] = run.size(smoke=(2, 4, 8), standard=(5, 10, 20, 40))
    networks = run.size(smoke=20, quick=100, standard=200, full=2000)
    cases = [("ReLU", seed) for seed in run.seeds] + [("tanh", run.seed)]
    spreads = []
    for name, seed in run.track(cases, "finite width"):
        point = Criticality(ACTIVATIONS[name]()).recommended
        for width in widths:
            norms = _log_norms(ACTIVATIONS[name], point.C_W, width, max(depths), networks, seed)
            spreads += [Spread(name, seed, width, d, float(norms[:, d - 1].std(ddof=1))) for d in depths]
    ranks = []
    for seed in run.seeds:
        of_seed = [s for s in spreads if (s.activation, s.seed) == ("ReLU", seed)]
        ratio = [s.depth / s.width for s in of_seed]
        ranks.append(float(stats.spearmanr(ratio, [s.std for s in of_seed]).statistic))
    run.table(
        "finite_width",
        [vars(s) | {"depth / width": s.depth / s.width} for s in spreads if s.seed == run.seed],
        f"Standard deviation of log |z| at the output over {networks} random networks, first seed.",
    )
    run.claim(
        "how far one network is from the next depends on depth over width",
        paper="the expansion parameter is L/n", measured=ranks, at_least=0.95,
        note="Rank correlation of the spread of the log-norm of a ReLU network's output with L/n, over "
        f"{len(widths) * len(depths)} pairs of width and depth. Pairs of equal L/n are ties: a "
        "perfect order gives 0.989.",
    )  # fmt: skip
    return spreads


def _log_norms(
    activation: type[nn.Module], c_w: float, width: int, depth: int, networks: int, seed: int
) -> NDArray[np.float64]:
    """log |z| of every layer, ``(networks, depth)``."""
    x = torch.randn(1, width, generator=generator(seed, "finite width", width))
    x /= x.square().mean().sqrt() * c_w**0.5
    sample = sample_networks(
        lambda: multilayer(activation, width, width, depth), x, networks, seed=seed, ensemble=(0.0, c_w),
        progress=False,
    )  # fmt: skip
    return 0.5 * np.log(width * sample.second[:, 0])
