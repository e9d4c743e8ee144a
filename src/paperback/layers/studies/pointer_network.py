"""The study of pointer networks: convex hulls and shortest tours, from examples alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Int
from matplotlib.figure import Figure
from torch import Tensor

from paperback.data.simulate.geometry import (
    PointSets,
    delaunay_batch,
    farthest_insertion,
    hull_batch,
    nearest_neighbour,
    tour_length,
    tsp_batch,
    two_opt,
)
from paperback.layers.pointer_network import PointerNetwork
from paperback.layers.pointer_network.metrics import rotated
from paperback.study import Run
from paperback.study.figures import BASELINE, METHOD, PALETTE, REFERENCE, WIDE, direct_labels, style
from paperback.training import History, derive, generator, seeded

SEEDS = (0, 1)
HULL_TRAINED, HULL_TESTED = (5, 10), (5, 10, 15, 20)  # points of a set
TOUR_TRAINED, TOUR_TESTED = (5, 9), (5, 7, 9, 12)
# The best of 2e-3, 5e-3 and 1e-2 for each on fresh sets of another seed.
RATES = {"pointer": 1e-2, "attention": 1e-2, "seq2seq": 1e-2}
LABELS = {"pointer": "pointer network", "attention": "LSTM with attention", "seq2seq": "LSTM"}
HULL_COLOUR = "#F3D9B1"
COLOURS = {"pointer": METHOD, "attention": BASELINE, "seq2seq": PALETTE[2]}

Scores = dict[int, dict[str, float]]  # number of points -> measure -> value


@dataclass
class Hulls:
    """What one seed gave on convex hulls, by mode."""

    models: dict[str, PointerNetwork] = field(default_factory=dict)
    histories: dict[str, History] = field(default_factory=dict)
    scores: dict[str, Scores] = field(default_factory=dict)


def study(run: Run) -> None:
    """Does a network whose outputs are positions of its input learn to order points, where networks of the
    same size with a fixed dictionary of positions do not, and does it go on to larger sets than it was
    trained on?

    Three networks of equal size and training learn convex hulls of 5 to 10 points; the pointer network is
    tested on up to 20. Others learn short tours of 5 to 9 points. It is false if the network with
    attention and a fixed dictionary matches the pointer network on sets of 10 points.
    """
    hulls = [_learn_hulls(run, seed) for seed in run.track(run.seeds, "hulls")]
    _report_hulls(run, hulls)
    _claim_hulls(run, hulls)
    _draw_curves(run, hulls)
    _draw_learning(run, hulls[0])
    _draw_polygons(run, hulls[0].models["pointer"])
    _report_tours(run, _learn_tours(run))
    if run.budget == "full":
        _report_triangulations(run)
    run.model("model", hulls[0].models["pointer"])
    run.note(
        "Gift wrapping finds every one of these hulls exactly and faster: the network is no better hull "
        "algorithm. What is shown is that pointing learns a geometric rule from examples."
    )


def one_size(draw: Callable[..., PointSets], fewest: int, most: int) -> Callable[..., PointSets]:
    """A sampler of batches whose sets have one size, drawn anew for each batch: nothing is padded."""

    def sampler(size: int, g: torch.Generator) -> PointSets:
        return draw(int(torch.randint(fewest, most + 1, (), generator=g)), size, g)

    return sampler


# -- convex hulls --------------------------------------------------------------------------------------------


def _learn_hulls(run: Run, seed: int) -> Hulls:
    result = Hulls()
    modes = run.size(quick=("pointer", "attention"), standard=("pointer", "attention", "seq2seq"))
    for mode in run.track(modes, "modes"):
        with seeded(seed, "initial weights"):
            model = PointerNetwork(
                2,
                hidden=run.size(smoke=16, standard=128, full=256),
                mode=mode,  # type: ignore[arg-type]
                n_max=None if mode == "pointer" else HULL_TRAINED[1],
            )
        result.histories[mode] = model.fit(
            one_size(hull_batch, *HULL_TRAINED),
            steps=run.size(smoke=10, quick=2000, standard=4000, full=40_000),
            lr=RATES[mode],
            batch_size=run.size(smoke=16, standard=128),
            seed=seed,
            progress=False,
        )
        result.models[mode] = model
        tested = HULL_TESTED if mode == "pointer" else HULL_TESTED[:2]  # a dictionary ends at 10
        result.scores[mode] = {n: _score_hulls(run, model, n, seed) for n in tested}
    return result


def _score_hulls(run: Run, model: PointerNetwork, n: int, seed: int) -> dict[str, float]:
    test = hull_batch(n, run.size(smoke=20, standard=1000), generator(seed, "test hulls", n))
    return model.score(test.points, test.targets, "hull")


def _mean(hulls: list[Hulls], mode: str, n: int, measure: str) -> float | None:
    values = _values(hulls, mode, n, measure)
    return float(np.mean(values)) if values else None


def _values(hulls: list[Hulls], mode: str, n: int, measure: str) -> list[float]:
    return [h.scores[mode][n][measure] for h in hulls if n in h.scores.get(mode, {})]


def _report_hulls(run: Run, hulls: list[Hulls]) -> None:
    rows = []
    for mode in hulls[0].scores:
        for n in HULL_TESTED:
            crossed = _mean(hulls, mode, n, "not_simple")
            area = _mean(hulls, mode, n, "area")
            rows.append(
                {
                    "model": LABELS[mode],
                    "points": n,
                    "exact": _mean(hulls, mode, n, "accuracy"),
                    "area of simple polygons": None if area is None or np.isnan(area) else area,
                    "not simple": crossed,
                    "the paper would print": None if crossed is None else _printed(area, crossed),
                }
            )
    run.table(
        "hulls",
        rows,
        "Test sets. 'Exact': the whole hull is right. 'Area': that of the predicted polygons over the true "
        "ones, where the predicted polygon does not cross itself. A fixed dictionary ends at 10 points. "
        "Training was on 5 to 10 points.",
    )


def _printed(area: float | None, crossed: float) -> str:
    return "FAIL" if crossed > 0.01 or area is None else f"{100 * area:.1f} %"


def _claim_hulls(run: Run, hulls: list[Hulls]) -> None:
    def of(mode: str, n: int, measure: str) -> list[float]:
        return [100 * value for value in _values(hulls, mode, n, measure)]

    paper = {
        "accuracy": {5: "92.0 % (one model for 5 to 50)", 10: "87.0 % (one model for 5 to 50)"},
        "area": {5: "99.6 %", 10: "99.8 %", 20: "99.9 % at twice the trained length (n = 100)"},
    }  # fmt: skip
    for n, bar in ((5, 65.0), (10, 40.0)):
        run.claim(
            f"finds the whole hull of {n} points", paper=paper["accuracy"][n],
            measured=of("pointer", n, "accuracy"), at_least=bar, unit="%",
        )  # fmt: skip
    for n, bar in ((5, 97.0), (10, 97.0), (20, 95.0)):
        crossed = float(np.mean(of("pointer", n, "not_simple")))
        run.claim(
            f"covers the area of the hull of {n} points", paper=paper["area"][n],
            measured=of("pointer", n, "area"), at_least=bar, unit="%",
            note=f"Over predicted polygons that do not cross themselves; {crossed:.1f} % do, or are none"
            + (", for which the paper would print FAIL." if crossed > 1 else "."),
        )  # fmt: skip
    run.claim(
        "predicts polygons that hardly ever cross themselves, on 10 points",
        paper="at most 1 %, otherwise it prints FAIL", measured=of("pointer", 10, "not_simple"),
        at_most=1.0, unit="%",
    )  # fmt: skip
    run.claim(
        "finds more hulls of 10 points than attention with a fixed dictionary",
        paper="72.6 % against 38.9 % (n = 50)", measured=of("pointer", 10, "accuracy"),
        baseline=of("attention", 10, "accuracy"), at_least=30.0, unit="%",
        note="Equal size and steps, each at the best of three learning rates on other sets. Whether "
        "attention leaves the plateau of its loss depends on the seed. A first record had the pointer "
        "network at an untuned rate of 2e-3 and 7,000 steps: 54.0 % against 33.6 %.",
    )  # fmt: skip


def _draw_curves(run: Run, hulls: list[Hulls]) -> None:
    with style():
        figure = Figure(figsize=WIDE)
        left, right = figure.subplots(1, 2)
        for axes, measure, title in ((left, "accuracy", "Whole hull right"), (right, "area", "Area covered")):
            axes.axvspan(*HULL_TRAINED, color=REFERENCE, alpha=0.12, lw=0)
            for mode, label in LABELS.items():
                points = [(n, _mean(hulls, mode, n, measure)) for n in HULL_TESTED]
                known = [(n, 100 * value) for n, value in points if value is not None and np.isfinite(value)]
                if known:
                    axes.plot(*zip(*known, strict=True), "o-", color=COLOURS[mode], label=label)
            axes.set(xlabel="points in a set", title=title, xticks=HULL_TESTED, ylim=(-3, 103))
            axes.set_xlim(4, 21)
        left.set_ylabel("%")
        left.text(7.5, 100, "trained", ha="center", va="top", color=REFERENCE, fontsize=9)
        left.legend(loc="upper right", bbox_to_anchor=(1.0, 0.93))
    run.figure(
        "length",
        figure,
        "Test sets of the trained sizes (shaded) and up to twice as large; mean over seeds. Exactness falls "
        "with the number of points while the area of simple polygons stays. Fixed dictionaries end at 10.",
        "Two panels against the number of points. The pointer network's share of exact hulls falls; its area "
        "stays near 100 %. The models with a fixed dictionary lie lower and end at 10 points.",
    )


def _draw_learning(run: Run, hulls: Hulls) -> None:
    with style():
        figure = Figure(figsize=WIDE)
        axes = figure.subplots()
        for mode, history in hulls.histories.items():
            steps = run.size(smoke=10, quick=2000, standard=4000, full=40_000) / len(history)
            axes.plot(
                steps * (np.arange(len(history)) + 1),
                history.train_loss,
                color=COLOURS[mode],
                label=LABELS[mode],
            )
        axes.set(
            xlabel="steps", ylabel="nats per output", title="Training loss on fresh sets", ylim=(0, None)
        )
        axes.set_xlim(0, 1.3 * steps * len(history))
        direct_labels(axes)
    run.figure(
        "learning",
        figure,
        "Loss on fresh sets while the first seed is trained; each point is the mean since the one before.",
        "Falling curves, each with a plateau at about 1.6 nats that the models leave at different times.",
    )


def _draw_polygons(run: Run, model: PointerNetwork) -> None:
    with style():
        figure = Figure(figsize=(7.2, 5.2))
        panels = figure.subplots(2, 3)
        for column, n in zip(panels.T, (5, 10, 20), strict=True):
            points, targets, _ = hull_batch(n, 2, generator(run.seed, "drawn hulls", n))
            decoded = model.decode(points).indices
            for axes, p, true, found in zip(column, points, targets, decoded, strict=True):
                for polygon, colour, width in ((true, HULL_COLOUR, 6), (found, METHOD, 1.5)):
                    corners = p[_closed(polygon)]
                    axes.plot(*corners.T, color=colour, lw=width, solid_joinstyle="round")
                axes.plot(*p.T, "o", color="black", ms=3)
                same = rotated(found[None] - 1)[0]
                right = same[same >= 0].tolist() == (true[true > 0] - 1).tolist()
                axes.set_title(f"{n} points, {'right' if right else 'not right'}", fontsize=9)
                axes.set(xticks=[], yticks=[], aspect="equal", xlim=(-0.05, 1.05), ylim=(-0.05, 1.05))
                axes.grid(False)
                axes.spines[:].set_visible(False)
    run.figure(
        "polygons",
        figure,
        "Test sets, two of each size, none chosen. Wide: the true hull; thin: what the pointer network says. "
        "20 points are twice as many as it was trained on.",
        "Six sets of points with their hulls and the predicted polygons, which mostly coincide.",
    )


def _closed(polygon: Int[Tensor, " m"]) -> Tensor:
    """Indices from 0 of a polygon's corners, the first one again at the end."""
    corners = polygon[polygon > 0] - 1
    return torch.cat([corners, corners[:1]])


# -- tours ---------------------------------------------------------------------------------------------------


def _learn_tours(run: Run) -> dict[int, dict[str, float]]:
    """Gap to the shortest tours by number of points and way to find a tour, as a fraction; the first seed.

    The encoder is the set transformer: the paper's LSTM did not get through the plateau of its loss in an
    affordable time.
    """
    models = {}
    for name in ("labels", "cost"):
        with seeded(run.seed, "initial weights of tours"):
            models[name] = PointerNetwork(
                2, hidden=run.size(smoke=16, standard=128), layers=2, encoder="transformer"
            )
    models["labels"].fit(
        one_size(tsp_batch, *TOUR_TRAINED),
        steps=run.size(smoke=5, quick=500, standard=2500, full=40_000),
        lr=1e-3,
        batch_size=run.size(smoke=16, standard=128),
        seed=run.seed,
        progress=False,
    )
    models["cost"].reinforce(
        _unlabelled,
        tour_length,
        steps=run.size(smoke=5, quick=200, standard=1200, full=40_000),
        lr=1e-3,
        batch_size=run.size(smoke=16, standard=64, full=128),
        seed=run.seed,
        progress=False,
    )
    tested = TOUR_TESTED[: run.size(smoke=1, standard=len(TOUR_TESTED))]
    return {n: _tour_gaps(run, models, n) for n in tested}


def _unlabelled(size: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Points of one size for the batch, without tours."""
    n = int(torch.randint(TOUR_TRAINED[0], TOUR_TRAINED[1] + 1, (), generator=g))
    return torch.rand(size, n, 2, generator=g), torch.full((size,), n)


def _tour_gaps(run: Run, models: dict[str, PointerNetwork], n: int) -> dict[str, float]:
    points, targets, _ = tsp_batch(n, run.size(smoke=20, standard=1000), derive(run.seed, "test tours", n))
    best = float(tour_length(points, targets[:, :n] - 1).mean())
    shuffled = torch.rand(points.shape[:2], generator=generator(run.seed, "random tours", n)).argsort(1)
    heuristics = {
        "2-opt from nearest neighbour": two_opt(points, nearest_neighbour(points)),
        "farthest insertion": farthest_insertion(points),
        "nearest neighbour": nearest_neighbour(points),
        "random": shuffled,
    }
    found = {}
    for how, model in models.items():
        for beam in (1, 5):
            name = f"pointer network from {how}, {'greedy' if beam == 1 else 'beam 5'}"
            found[name] = model.score(points, targets, "tsp", beam=beam)["gap"]
    return found | {
        name: float(tour_length(points, order).mean()) / best - 1 for name, order in heuristics.items()
    }


def _report_tours(run: Run, gaps: dict[int, dict[str, float]]) -> None:
    percent = {n: {name: 100 * gap for name, gap in found.items()} for n, found in gaps.items()}
    names = list(percent[TOUR_TESTED[0]])
    rows = [{"tour": name} | {f"{n} points": percent[n][name] for n in percent} for name in names]
    run.table(
        "tours",
        rows,
        "By how many per cent tours exceed the shortest ones (Held and Karp) in mean length; first seed. "
        "'From labels' learned from shortest tours of 5 to 9 points, 'from cost' by REINFORCE without any. "
        "Networks may name each point only once.",
    )
    trained = [n for n in percent if n <= TOUR_TRAINED[1]]

    def over_sizes(name: str) -> float:
        return float(np.mean([percent[n][name] for n in trained]))

    for how, name in (
        ("taught shortest tours", "pointer network from labels, greedy"),
        ("taught by tour length alone", "pointer network from cost, greedy"),
    ):
        run.claim(
            f"{how}, finds tours near the shortest, on the trained sizes",
            paper="from labels: 2.12 against 2.12 (n = 5), 2.87 against 2.87 (n = 10)",
            measured=over_sizes(name), at_most=8.0, unit="%",
            note="Excess over the shortest tours in mean length, mean over 5, 7 and 9 points, greedy search, "
            "one seed, set encoder. On validation sets the paper's LSTM encoder was 13, 24 and 36 % over "
            "after 8,500 steps that began with 5 points, and 13, 27 and 38 % after 5,000 steps: its loss had "
            "just left its plateau. The paper trained on a million examples.",
        )  # fmt: skip
        run.claim(
            f"{how}, finds shorter tours than nearest neighbour",
            paper="from labels: about the optimum up to n = 20",
            measured=over_sizes(name), baseline=over_sizes("nearest neighbour"),
            at_most=0.0, unit="%", note="Excess over the shortest tours, as above.",
        )  # fmt: skip
    _draw_tours(run, percent)


def _draw_tours(run: Run, means: dict[int, dict[str, float]]) -> None:
    shown = [name for name in means[TOUR_TESTED[0]] if name != "random" and "beam" not in name]
    colours = (METHOD, PALETTE[4], PALETTE[2], PALETTE[3], BASELINE)
    with style():
        figure = Figure(figsize=WIDE)
        axes = figure.subplots()
        axes.axvspan(*TOUR_TRAINED, color=REFERENCE, alpha=0.12, lw=0)
        for name, colour in zip(shown, colours, strict=True):
            axes.plot(list(means), [means[n][name] for n in means], "o-", color=colour, label=name)
        axes.set(xlabel="points in a set", ylabel="% over the shortest", title="Tours", xticks=list(means))
        axes.set_xlim(4.5, 17)
        direct_labels(axes)
    run.figure(
        "tours",
        figure,
        "Excess of mean tour length over the shortest tours; the trained sizes are shaded. Greedy search.",
        "Lines against the number of points; those of the pointer network rise fastest beyond 9.",
    )


# -- triangulations, at the full budget only -----------------------------------------------------------------


def _report_triangulations(run: Run) -> None:
    with seeded(run.seed, "initial weights of triangulations"):
        model = PointerNetwork(2, hidden=256)
    model.fit(one_size(delaunay_batch, 5, 5), steps=40_000, seed=run.seed, progress=False)
    test = delaunay_batch(5, 1000, derive(run.seed, "test triangulations"))
    found = model.score(test.points, test.targets, "delaunay")
    run.table(
        "triangulations",
        [{"points": 5} | found],
        "Delaunay triangulations of 5 points; the paper has 80.7 % exact, 93.0 % of the triangles.",
    )
