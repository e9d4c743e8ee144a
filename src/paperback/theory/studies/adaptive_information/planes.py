"""What the planes of trained networks say: compression, L2, resolution, estimators, generalisation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy import stats

from paperback.data.simulate.icosahedron import IcosahedronTask
from paperback.study import Run
from paperback.study.figures import PALETTE, TALL, WIDE, direct_labels, style
from paperback.theory.adaptive_information import draw_plane, mutual_information
from paperback.theory.information import AdaptiveBins, FixedBins, Sample
from paperback.theory.studies.adaptive_information.stack import COLLAPSED, DECAYED, LAYERS, MIDDLE, Network
from paperback.training import derive

Networks = Mapping[tuple[str, int], Network]  # by condition and seed

# Increasing maps of [0, max T] that keep 0 where it is.
MAPS: dict[str, Callable[[NDArray], NDArray]] = {
    "cube": lambda u: u**3,
    "exponential": lambda u: np.expm1(3 * u),
    "logarithm": lambda u: np.log1p(50 * u),
    "thousandfold": lambda u: 1000 * u,
}


def report_planes(run: Run, of: Networks, networks: Sequence[Network]) -> None:
    """Compression and the effect of L2: the claims (a) and (b), with the spread over seeds."""
    conditions = list(dict.fromkeys(name for name, _ in of))
    rows = []
    for name in conditions:
        chosen = [of[name, seed] for seed in run.seeds]
        lost_runs = [not network.learned for network in networks if network.condition.name == name]
        for layer in LAYERS:
            end, lost = [o.end[layer] for o in chosen], [o.compression[layer] for o in chosen]
            rows.append({
                "network": name, "layer": layer, "I(X;T) at the end": np.mean(end), "lowest": min(end),
                "highest": max(end), "compression": np.mean(lost), "least": min(lost), "most": max(lost),
                "test accuracy": np.mean([o.accuracy for o in chosen]),
                "collapsed": f"{sum(lost_runs)} of {len(lost_runs)}",
            })  # fmt: skip
    run.table(
        "layers",
        rows,
        "I(X;T) in bits by adaptive bins, mean and range over seeds; compression is the fall from the peak. "
        f"Networks with a test accuracy below {COLLAPSED} count as collapsed, and are left out where another "
        "initialisation learned.",
    )
    plain, decayed = ([of[name, seed] for seed in run.seeds] for name in ("relu", DECAYED))
    falls = [o.compression["5"] for o in plain]
    run.claim(
        "layer 5 of ReLU networks compresses by a bit or more in three of four seeds",
        paper="compression is seen in networks that do not saturate",
        measured=float(np.mean([fall >= 1 for fall in falls])), at_least=0.75,
        note=f"Share of seeds; the falls are {', '.join(f'{fall:.2f}' for fall in falls)} bits.",
    )  # fmt: skip
    run.claim(
        "L2 of 8e-4 lowers the information of the layers 2 to 5",
        paper="L2 strongly increases compression and clusters the layers", unit="bits",
        measured=[o.middle for o in decayed], baseline=[o.middle for o in plain], at_most=-1.5,
        note="Mean I(X;T) of the four layers at the end, from equal initial weights: those of the first "
        f"initialisation with which both networks reach {COLLAPSED} on the test part.",
    )  # fmt: skip
    run.claim(
        "L2 of 8e-4 costs at most three points of accuracy", paper="no loss reported",
        measured=[o.accuracy for o in decayed], baseline=[o.accuracy for o in plain], at_least=-0.03,
        note="Accuracy on the fifth of the inputs that was not trained on; collapsed networks are left out, "
        "as the table says.",
    )  # fmt: skip
    _draw_planes(run, of)
    _draw_layers(run, of, conditions)


def report_resolution(run: Run, task: IcosahedronTask, networks: Sequence[Network]) -> None:
    """The reason for adaptive bins, claim (c): what a fixed range does to the number, on trained networks."""
    factors = (1, 2, 4, 8, 16)
    y = task.y.numpy()
    drops, moved = [], []
    fixed: list[NDArray] = []
    for network in networks:
        layers = {layer: network.activations[layer].double().numpy() for layer in MIDDLE}
        fixed.append(np.array([[_fixed(T, y, factor) for factor in factors] for T in layers.values()]))
        drops.append(float((fixed[-1][:, 0] - fixed[-1][:, factors.index(4)]).min()))
        moved.append(max(_moved_by_maps(T, y) for T in layers.values()))
    run.table(
        "resolution",
        [
            {"layer": layer, "adaptive": networks[0].end[layer]}
            | {f"fixed, {factor} times the range": value for factor, value in zip(factors, row, strict=True)}
            for layer, row in zip(MIDDLE, fixed[0], strict=True)
        ],
        f"I(X;T) in bits of the ReLU network of seed {run.seed}: 30 bins over [0, max T] and wider ranges.",
    )
    run.claim(
        "with fixed bins a range four times as wide loses 1.5 bits or more in each of the layers 2 to 5",
        paper="fixed bins depend on an arbitrary range", measured=drops, at_least=1.5, unit="bits",
        note="The smallest fall of the four layers; [0, max T] is the range at the end of training.",
    )  # fmt: skip
    run.claim(
        "increasing maps that keep zero do not change what adaptive bins find",
        paper="the estimator adapts to the activation", measured=moved, at_most=1e-9, unit="bits",
        note=f"Largest change over the layers 2 to 5 and the maps {', '.join(MAPS)}.",
    )  # fmt: skip
    with style():
        figure = Figure(figsize=WIDE)
        axes = figure.subplots()
        for i, layer in enumerate(MIDDLE):
            axes.plot(factors, fixed[0][i], color=PALETTE[i], marker="o", label=f"fixed, layer {layer}")
            axes.axhline(networks[0].end[layer], color=PALETTE[i], linestyle=":", linewidth=1.2)
        axes.set(
            xscale="log", xlabel="range of the bins / largest activation", ylabel="I(X;T) in bits",
            title="Fixed bins find what their range lets them", ylim=(-0.8, 12.3),
        )  # fmt: skip
        axes.set_xticks(factors, [str(factor) for factor in factors])
        axes.minorticks_off()
        direct_labels(axes)
    run.figure(
        "resolution",
        figure,
        f"I(X;T) of a trained ReLU network (seed {run.seed}) with 30 fixed bins over wider and wider ranges. "
        "Dotted: adaptive bins, which need no range.",
        "Four falling curves, one for each layer; the dotted horizontal lines of the adaptive bins lie above "
        "or near their beginnings.",
    )


def _fixed(T: Float[np.ndarray, "n d"], y: NDArray, factor: float) -> float:
    return FixedBins(bin_range=(0.0, factor * float(T.max()))).estimate(Sample(T, y)).xt


def _moved_by_maps(T: Float[np.ndarray, "n d"], y: NDArray) -> float:
    """Largest change of either information under the maps, in bits."""
    bins, largest = AdaptiveBins(low=0.0), max(float(T.max()), 1e-30)
    before = bins.estimate(Sample(T, y))
    after = [bins.estimate(Sample(change(T / largest), y)) for change in MAPS.values()]
    return max(max(abs(a.xt - before.xt), abs(a.ty - before.ty)) for a in after)


def report_estimators(run: Run, task: IcosahedronTask, network: Network) -> None:
    """All estimators on one trained network, side by side."""
    rows = []
    for layer in LAYERS:
        T = network.activations[layer]
        found = {
            name: mutual_information(T, task.y, estimator=name, x=task.x)
            for name in ("ebab", "fixed", "akde", "cs_qmi")
        }
        kde = found["akde"].interval or (np.nan, np.nan)
        nearest = mutual_information(T, task.y, estimator="ksg")
        rows.append({
            "layer": layer, "I(X;T): adaptive bins": found["ebab"].value,
            "fixed bins": found["fixed"].value, "aKDE, lower": kde[0], "aKDE, upper": kde[1],
            "CS-QMI(X;T)": found["cs_qmi"].value, "I(T;Y): adaptive bins": found["ebab"]["I(T;Y)"].value,
            "fixed bins, Y": found["fixed"]["I(T;Y)"].value, "aKDE, Y": found["akde"]["I(T;Y)"].value,
            "nearest neighbours, Y": nearest["I(T;Y)"].value, "CS-QMI(T;Y)": found["cs_qmi"]["I(T;Y)"].value,
        })  # fmt: skip
    run.table(
        "estimators",
        rows,
        f"The ReLU network of seed {network.condition.seed} at the end, in bits; CS-QMI is a normalised "
        "dependence without unit. Nearest neighbours have no I(X;T): it is infinite for a function of X.",
    )


def report_generalisation(run: Run, networks: Sequence[Network]) -> None:
    """Whether compression goes with test accuracy over many initialisations; reported, not judged."""
    kept = [network for network in networks if network.learned]
    if len(kept) < 10:
        run.note(
            f"Correlating compression with generalisation needs many networks; this run has {len(kept)} "
            f"with a test accuracy of {COLLAPSED} or more and leaves it out."
        )
        return
    accuracy = np.array([network.accuracy for network in kept])
    rows = []
    for layer in LAYERS:
        lost = np.array([network.compression[layer] for network in kept])
        draws = np.random.default_rng(derive(run.seed, "bootstrap")).integers(0, len(kept), (2000, len(kept)))
        low, high = np.nanquantile(_rank_correlation(lost[draws], accuracy[draws]), (0.025, 0.975))
        rows.append({
            "layer": layer, "rank correlation": float(_rank_correlation(lost[None], accuracy[None])[0]),
            "low": low, "high": high, "networks": len(kept),
        })  # fmt: skip
    run.table(
        "generalisation",
        rows,
        "Spearman correlation over initialisations between the compression of a layer and the test accuracy "
        "of its ReLU network, with a 95 % bootstrap interval. The paper finds one in the last layer only.",
    )


def _rank_correlation(
    a: Float[np.ndarray, "draws n"], b: Float[np.ndarray, "draws n"]
) -> Float[np.ndarray, " draws"]:
    """Spearman's, row by row; NaN where one of the two is constant."""
    ranks = [stats.rankdata(x, axis=1) for x in (a, b)]
    centred = [r - r.mean(1, keepdims=True) for r in ranks]
    with np.errstate(invalid="ignore"):
        norms = np.sqrt((centred[0] ** 2).sum(1) * (centred[1] ** 2).sum(1))
        return (centred[0] * centred[1]).sum(1) / norms


def _draw_planes(run: Run, of: Networks) -> None:
    shown = [n for n in ("relu", DECAYED, "tanh", "elu", "swish", "softplus") if (n, run.seed) in of]
    rows = (len(shown) + 1) // 2
    with style():
        figure = Figure(figsize=(TALL[0], 0.6 + 2.9 * rows))
        panels = figure.subplots(rows, 2, sharex=True, sharey=True, squeeze=False).ravel()
        for name, axes in zip(shown, panels, strict=False):
            draw_plane(axes, of[name, run.seed].plane.table())
            axes.set_title(name)
            axes.label_outer()
            axes.get_legend().remove()
        for axes in panels[len(shown) :]:
            axes.set_visible(False)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, title="layer, at the end", ncols=len(labels), loc="outside lower center"
        )
    run.figure(
        "planes",
        figure,
        f"Information planes by adaptive bins, seed {run.seed}: a point per recorded epoch, darker later, a "
        "ring at the end. To the left is compression, upwards is learning.",
        "Panels for each kind of network. The points of the deeper layers rise first, then move to the left.",
    )


def _draw_layers(run: Run, of: Networks, conditions: Sequence[str]) -> None:
    decay = [name for name in conditions if name.startswith("relu")]
    decay.sort(key=lambda name: of[name, run.seed].condition.penalty)
    plain = [name for name in conditions if "L2" not in name]
    with style():
        figure = Figure(figsize=(TALL[0] + 2.4, 3.9))
        left, right = figure.subplots(1, 2)
        for names, axes, what in ((decay, left, "end"), (plain, right, "compression")):
            for i, name in enumerate(names):
                values = np.array(
                    [[getattr(of[name, s], what)[layer] for layer in LAYERS] for s in run.seeds]
                )
                mean = values.mean(0)
                spread = np.abs(np.stack([values.min(0), values.max(0)]) - mean)
                place = np.arange(len(LAYERS)) + 0.07 * (i - len(names) / 2)
                axes.errorbar(
                    place,
                    mean,
                    spread,
                    color=PALETTE[i],
                    marker="o",
                    linewidth=1.2,
                    elinewidth=0.9,
                    label=name,
                )
            axes.set_xticks(range(len(LAYERS)), LAYERS)
            axes.set_xlabel("layer")
            axes.legend(fontsize=8)
        left.set(ylabel="I(X;T) at the end, bits", ylim=(0, 12.5), title="L2 takes information away")
        right.set(ylabel="fall of I(X;T) from its peak, bits", title="Compression by activation")
    run.figure(
        "layers",
        figure,
        f"Mean and range over {len(run.seeds)} seeds. Left: ReLU networks with L2 of four strengths. Right: "
        "how much each layer lost, without L2.",
        "Left, lines that fall from layer to layer, lower with more L2. Right, lines that rise towards the "
        "deeper layers, with wide ranges.",
    )
