"""Tables, claims and figures of the study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paperback.explain.studies.codebook_features.language import Language
from paperback.explain.studies.codebook_features.machine import CODES, PATCHES, Machine
from paperback.study import Run
from paperback.study.figures import BASELINE, METHOD, REFERENCE, style
from paperback.study.statistics import paired_bootstrap

STEERINGS = {"free": REFERENCE, "random codes": BASELINE, "codes of the topic": METHOD}


def report_machines(run: Run, found: Sequence[Machine]) -> None:
    """The claims about the finite-state machine."""
    names = tuple(dict.fromkeys(name for machine in found for name in machine.accuracy))
    run.table(
        "machine",
        [
            {"seed": m.seed, "model": name, "accuracy": m.accuracy[name], "legal mass": m.mass[name]}
            for m in found
            for name in names
            if name in m.accuracy
        ],
        "Of the likeliest successors of each state, how many are real ones; and their probability.",
    )
    run.table(
        "codes_and_neurons",
        [
            {
                "seed": m.seed, "layer": layer, "purity of codes": m.purity[layer],
                "precision of codes": m.code_precision[layer],
                "precision of neurons": m.neuron_precision[layer], "recall of codes": m.recall[layer],
            }
            for m in found
            for layer in range(len(m.purity))
        ],
        "Codes of the MLPs, and the best of 128 hidden neurons and 32 outputs at the same recall, as "
        "classifiers of what must be known at a token; means over contexts, on the test part.",
    )  # fmt: skip
    run.table(
        "patches",
        [
            {
                "seed": m.seed, "codes exchanged": patch, "divergence": m.divergence[patch],
                "legal mass": m.legal[patch], "legal mass of both digits": m.swap[patch],
            }
            for m in found
            for patch in PATCHES
        ],
        "State a is given the codes of state b: Jensen-Shannon divergence (nats) of the next digit from what "
        "follows b in the machine, and probability of what may follow b. The first two exchange the codes of "
        "the last token; the last those of the whole state, and looks at the whole next state.",
    )  # fmt: skip
    _claims_of_machines(run, found)
    with style():
        figure = Figure(figsize=(7.2, 6.4))
        left, right = figure.subplots(2, 1, height_ratios=(1.25, 1))
        _draw_states(left, found[0])
        _draw_patches(right, found)
    run.figure(
        "machine",
        figure,
        caption="Above: how the codes of the first MLP share the states of the machine (first seed), at the "
        "last digit of a state. A filled row with one dark cell is a code that stands for one state. Below: "
        "what exchanging codes does to the prediction, each dot a seed; at 0 it is exactly that of the other "
        "state.",
        alt="A matrix of codes by states, dark along a diagonal. Bars of divergence: largest without an "
        "exchange, smaller for the codes of the heads, small for those of the MLPs, and smallest for both.",
    )


def _claims_of_machines(run: Run, found: Sequence[Machine]) -> None:
    accuracy = [m.accuracy["codebooks"] for m in found]
    run.claim(
        "a network of codes follows the machine", paper="97.5 % (100 states, 10 edges)", measured=accuracy,
        at_least=0.95, note="Accuracy of the first transition. 36 states and 4 edges here.",
    )  # fmt: skip
    run.claim(
        "codes cost little accuracy", paper="97.5 % against 98 to 99 %", measured=accuracy, at_least=-0.03,
        baseline=[m.accuracy["dense"] for m in found],
        note="Against the same transformer without codes, before fine-tuning.",
    )  # fmt: skip
    run.claim(
        "codes of the first MLP stand for states", paper="nearly one to one, purity over 90 %",
        measured=[m.purity[0] for m in found], at_least=0.9,
        note="Share of a code's activations that lie in its commonest context: the last state and the digit "
        "since.",
    )  # fmt: skip
    run.claim(
        "a code tells a context better than the best neuron", paper="by about 30 points of precision (text)",
        measured=[m.code_precision[0] for m in found], at_least=0.3,
        baseline=[m.neuron_precision[0] for m in found],
        note="First MLP; the neuron is the best of 160, either sign, at the recall of the code. Both are "
        "chosen on other sequences than they are measured on.",
    )  # fmt: skip
    run.claim(
        "the codes of the MLPs carry the state", paper="the output moves almost wholly",
        measured=[m.divergence["MLP"] / m.divergence["nothing"] for m in found], at_most=0.35,
        note="Divergence from the other state's next digit when the MLP codes of the last token are "
        "exchanged, over that without an exchange.",
    )  # fmt: skip
    run.claim(
        "all codes together are the state", paper="divergence near 0",
        measured=[m.divergence["both"] / m.divergence["nothing"] for m in found], at_most=0.1,
        note="As before, with the codes of heads and MLPs.",
    )  # fmt: skip
    run.claim(
        "after an exchange of all codes the other state's digits follow",
        paper="the output moves almost wholly", measured=[m.legal["both"] for m in found], at_least=0.9,
        note="Probability of digits that may follow the other state. Only the last token's codes are "
        "exchanged, so the second digit of the next state still sees the first state's first digit: see the "
        "last column of the table of patches.",
    )  # fmt: skip


def _draw_states(axes: Axes, machine: Machine) -> None:
    """Codes by states at the last digit of a state, codes in the order of their commonest state."""
    tokens = machine.search_part
    contexts = machine.fsm.contexts(tokens)
    codes = machine.codebooks.codes(tokens, batch_size=250)["transformer.h.0.mlp"][..., 0, 0]
    ends = (contexts >= 0) & (contexts < machine.fsm.n_states)
    table = torch.zeros(CODES, machine.fsm.n_states)
    table.index_put_((codes[ends], contexts[ends]), torch.ones(int(ends.sum())), accumulate=True)
    table = table[table.sum(1) > 0.002 * table.sum() / machine.fsm.n_states]
    share = (table / table.sum(1, keepdim=True)).numpy()
    share = share[np.lexsort((-share.max(1), share.argmax(1)))]
    axes.imshow(share.T, aspect="auto", cmap="Blues", vmin=0, vmax=1)
    axes.grid(False)
    axes.set_xlabel(f"the {len(share)} codes that occur, ordered by state")
    axes.set_ylabel("state")
    axes.set_title("Codes and states, first MLP")


def _draw_patches(axes: Axes, found: Sequence[Machine]) -> None:
    bars = {patch: [m.divergence[patch] for m in found] for patch in PATCHES}
    _draw_bars(axes, bars, ["codes exchanged: " + p for p in PATCHES], [REFERENCE, METHOD, METHOD, METHOD])
    axes.set_xlabel("divergence from the other state's next digit (nats)")
    axes.set_title("Exchanging codes exchanges states")


def _draw_bars(
    axes: Axes, bars: Mapping[str, Sequence[float]], labels: Sequence[str], colours: Sequence[str]
) -> None:
    """Horizontal bars of means with their seeds as dots and their means as numbers."""
    for place, (values, colour) in enumerate(zip(bars.values(), colours, strict=True)):
        axes.barh(place, np.mean(values), color=colour, height=0.6)
        axes.plot(values, [place] * len(values), "o", color="black", markersize=3)
        axes.annotate(
            f"{np.mean(values):.3f}",
            (max(values), place),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
        )
    axes.set_yticks(range(len(bars)), labels)
    axes.invert_yaxis()
    axes.grid(axis="x")
    axes.grid(visible=False, axis="y")


# -- the language model --------------------------------------------------------------------------------------


def report_language(run: Run, found: Language) -> None:
    """The claims about the language model."""
    run.table(
        "language",
        [
            {"model": name, "accuracy": float(right.mean()), "bits per token": found.bits[name]}
            for name, right in found.right.items()
        ],
        "Prediction of the next token in definitions that were never seen.",
    )
    run.table(
        "patterns",
        [
            {
                "pattern": name, "precision of codes": precision,
                "precision of neurons": found.neuron_precision[name], "recall": found.recall[name],
            }
            for name, precision in found.code_precision.items()
        ],
        "Regular expressions: the best code of all heads and MLPs, and the best neuron of all MLPs of the "
        "fine-tuned model without codes at the same recall; chosen on training text, measured on the test "
        "part.",
    )  # fmt: skip
    run.table(
        "topics",
        [
            {"topic": topic, **rates, "a steered definition": found.samples[topic]}
            for topic, rates in found.rates.items()
        ],
        "How many of the definitions written are of the topic, as a classifier says. The prompts are words "
        "of all topics.",
    )
    _claims_of_language(run, found)
    with style():
        figure = Figure(figsize=(7.2, 6.0))
        _draw_topics(figure.subplots(), found)
    run.figure(
        "topics",
        figure,
        caption="Definitions of the same words, written freely, with random codes forced, and with the "
        "codes of a topic forced: how many are of that topic.",
        alt="A dot plot: for each of the topics three dots, the rates of free definitions, of those with "
        "random codes, and of those with the topic's codes.",
    )


def _claims_of_language(run: Run, found: Language) -> None:
    right = {name: rows.numpy() for name, rows in found.right.items()}
    codes, dense = right["codebooks"], right["fine-tuned"]
    run.claim(
        "a language model of codes predicts nearly as well",
        paper="46 to 47 % against 48 to 50 % of tokens (410 million parameters)",
        measured=float(codes.mean()), baseline=float(dense.mean()), at_least=-0.03,
        interval=paired_bootstrap(codes, dense)[1:],
        note="Eight codes for each head and MLP; the baseline is fine-tuned for as many steps without codes. "
        "One seed; the interval is over rows of text. The paper fine-tunes for 15,000 steps with 10,000 "
        "codes, this study for 120 with 512, and the loss still falls when it ends (validation: 7.1 bits per "
        "token after k-means, 6.5 after 30 steps, 6.0 after 200, against 5.2 without codes).",
    )  # fmt: skip
    rates = {name: np.array([r[name] for r in found.rates.values()]) for name in STEERINGS}
    free = max(float(rates["free"].mean()), 1e-9)
    ratio = rates["codes of the topic"] / free
    run.claim(
        "forcing the codes of a topic at least doubles how often it is written about",
        paper="shown in examples", measured=float(ratio.mean()), at_least=2.0,
        interval=paired_bootstrap(ratio, np.zeros(len(ratio)))[1:],
        note=f"Mean rate over {len(ratio)} topics, over that of free definitions of the same words, "
        f"{free:.3f}. As many random codes in the same places give {rates['random codes'].mean():.3f}. The "
        f"classifier is right for {found.judge:.0%} of real definitions of the validation part. One seed; "
        "the interval is over topics. On the validation part, 20 choices of how many codes are forced and "
        "how precise they must be, after 200 steps, moved the rate of five topics from .054 to .071 at most: "
        "codes that are active on a topic are found, but the model is too weak to write about it.",
    )  # fmt: skip


def _draw_topics(axes: Axes, found: Language) -> None:
    topics = sorted(found.rates, key=lambda topic: found.rates[topic]["codes of the topic"])
    for name, colour in STEERINGS.items():
        rates = [found.rates[topic][name] for topic in topics]
        axes.plot(rates, range(len(topics)), "o", color=colour, label=name)
    axes.set_yticks(range(len(topics)), topics)
    axes.grid(axis="both")
    axes.set_xlabel("part of the definitions that are of the topic")
    axes.set_title("Steering by codes")
    axes.legend(loc="lower right")
