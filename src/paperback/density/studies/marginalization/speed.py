"""Many variables: the time of a marginal against their number, at equal quality."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from torch import Tensor

from paperback.data import images
from paperback.density.marginalization import MarginalizationModel
from paperback.density.studies.marginalization.answers import speed_up
from paperback.study import Run
from paperback.study.figures import BASELINE, METHOD, PALETTE, WIDE, direct_labels, style


@dataclass
class Large:
    """What one seed gave on large images: quality at the largest trained size, speed over sizes."""

    bits_head: float
    bits_arm: float
    spearman: float
    speed: dict[int, tuple[float, float, float]]  # D -> speed-up, ms along an order, ms of one call
    seconds: float


def train_on_images(run: Run, seed: int) -> Large:
    data = images.fashion_mnist(run.size(smoke=200, quick=2000, standard=6000), seed=seed)
    side = run.size(smoke=8, standard=28)

    def prepare(x: Tensor) -> Tensor:
        small = F.adaptive_avg_pool2d(x.float()[:, None], side)
        return (small >= 128).long().flatten(1)

    train, val = prepare(data.train.x), prepare(data.val.x[:500])
    # The first hundred were seen while the study was made.
    test = prepare(data.test.x[100 : 100 + run.size(smoke=20, standard=100)])
    model = MarginalizationModel(side * side, 2, seed=seed)
    start = time.perf_counter()
    model.fit(train, X_val=val, lr=2e-3, seed=seed, progress=run.progress,
              stage_epochs=run.size(smoke=(1, 1), quick=(8, 6), standard=(20, 40)))  # fmt: skip
    took = time.perf_counter() - start
    head, arm = model.log_prob(test), model.log_prob(test, exact=True, n_orders=2)
    speed = {}
    for other in run.size(smoke=(4, 8), standard=(8, 14, 28, 40)):
        # Time does not depend on the weights: sizes that were not trained are timed as they begin.
        timed = model if other == side else MarginalizationModel(other * other, 2, seed=seed)
        states = torch.randint(0, 2, (64, other * other), generator=torch.Generator().manual_seed(seed))
        speed[other * other] = speed_up(timed, states)
    bits = math.log(2) * side * side
    return Large(
        bits_head=float(-head.mean()) / bits,
        bits_arm=float(-arm.mean()) / bits,
        spearman=float(spearmanr(head, arm).statistic),
        speed=speed,
        seconds=took,
    )


def report_speed(run: Run, outcomes: list[Large]) -> None:
    first = outcomes[0]
    sizes = sorted(first.speed)
    trained = 784 if 784 in sizes else sizes[-1]
    rows = [
        {"D": d, "times faster": s, "ms along one order": slow, "ms in one call": fast}
        for d, (s, slow, fast) in sorted(first.speed.items())
    ]
    run.table("speed", rows, caption="One marginal of all D variables, in batches of 64 rows; first seed.")
    run.table(
        "images",
        [{"answer": "marginal head", "bits per pixel": first.bits_head},
         {"answer": "any-order ARM (conditionals)", "bits per pixel": first.bits_arm}],
        caption=f"Binary Fashion-MNIST, {trained} pixels; {first.seconds:.0f} s of training; first seed.",
    )  # fmt: skip
    run.claim("a marginal of the largest trained images is faster than along one order",
              paper="100 to 1,000 times on binary MNIST", measured=[o.speed[trained][0] for o in outcomes],
              at_least=10.0, unit="times")  # fmt: skip
    run.claim("the speed-up grows with the number of variables", paper="D-fold", at_least=2.0, unit="times",
              measured=[o.speed[trained][0] / o.speed[sizes[0]][0] for o in outcomes])  # fmt: skip
    run.claim("at that size the head's likelihood is that of the conditionals",
              paper="0.149 and 0.148 bits, about equal", at_most=0.03, unit="bits per pixel",
              measured=[abs(o.bits_head - o.bits_arm) for o in outcomes])  # fmt: skip
    run.claim("at that size the head ranks images as the conditionals do", paper="0.99 on binary MNIST",
              measured=[o.spearman for o in outcomes], at_least=0.90)  # fmt: skip
    with style():
        figure = Figure(figsize=WIDE)
        axes = figure.subplots()
        axes.margins(y=0.15)  # room for the numbers below the lower line
        axes.loglog(sizes, [first.speed[d][1] for d in sizes], "o-", color=BASELINE, label="along one order")
        axes.loglog(sizes, [first.speed[d][2] for d in sizes], "o-", color=METHOD, label="one call")
        for d in sizes:
            axes.annotate(f"{first.speed[d][0]:.0f}x", (d, first.speed[d][2]), xytext=(0, -16),
                          textcoords="offset points", ha="center", color=PALETTE[2])  # fmt: skip
        axes.set(xlabel="number of variables D", title="Milliseconds for one marginal")
        direct_labels(axes)
    run.figure(
        "speed",
        figure,
        "Time of one marginal of all variables against their number, by the conditionals along one order and "
        "by the marginal head; green: how many times faster.",
        "Two rising lines on logarithmic axes; the distance between them grows with D.",
    )
