"""Does a constraint layer make every generated row obey the rules, and what does it cost in quality and time?

Diamonds, with rules that tie their measurements together, and sales of houses and loans as further tables.
Each deep generator is run three ways: plain, with the layer behind it (guardrail), and with the layer in its
training. The honest baseline is rejection: draw from the plain model until enough rows comply.
"""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from paperback.data import tables
from paperback.density.baselines.gaussian_copula import GaussianCopula
from paperback.density.constrained_tabular import ConstrainedTabular, Encoding, LinearConstraints
from paperback.numerics.divergence import correlation_error, detection_auc, numeric_features
from paperback.study import Run
from paperback.study.figures import BASELINE, METHOD, REFERENCE, WIDE, style
from paperback.training import derive

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEEDS = (0, 1, 2)

TOLERANCE = 1e-6  # relative to the terms of a sum; what counts as a violation here
NAMES = {"off": "plain", "guardrail": "guardrail", "train": "trained with the layer"}

DIAMONDS = (
    "z >= 0.275*(x + y)",
    "z <= 0.35*(x + y)",
    "y <= 1.05*x",
    "x <= 1.05*y",
    "50 <= depth <= 75",
    "carat >= 0.2",
    "price >= 300",
    "x >= 3.5",
)
HOUSING = (
    "Gr_Liv_Area >= First_Flr_SF + Second_Flr_SF",
    "Total_Bsmt_SF >= BsmtFin_SF_2 + Bsmt_Unf_SF",
    "Year_Remod_Add >= Year_Built",
    "Year_Sold + 1 >= Year_Remod_Add",
    "TotRms_AbvGrd >= Bedroom_AbvGr + Kitchen_AbvGr",
    "Lot_Area >= First_Flr_SF + Garage_Area",
    "Garage_Area >= 100*Garage_Cars",
    "Second_Flr_SF >= 0",
    "BsmtFin_SF_2 >= 0",
    "Bsmt_Unf_SF >= 0",
    "Garage_Cars >= 0",
)
CREDIT = (
    "Amount <= Price",
    "Age - Seniority >= 14",
    "Debt <= Assets",
    "Amount >= 0.1*Price",
    "6 <= Time <= 72",
    "Seniority >= 0",
    "Debt >= 0",
    "Expenses >= 35",
)


@dataclass(frozen=True)
class Task:
    """A table, its rules, and how the usefulness of generated rows is judged."""

    name: str
    rules: LinearConstraints
    train: pd.DataFrame
    test: pd.DataFrame
    target: str
    utility: str  # "R2 of the logarithm" or "AUC"


def study(run: Run) -> None:
    """Draws tables that obey given rules, every row of them, at no loss of usefulness."""
    diamonds = _diamonds(run)
    others = run.size(
        standard=[_other(run, tables.housing, HOUSING), _other(run, tables.credit, CREDIT)], smoke=[]
    )
    bases = run.size(standard=("vae", "gan"), quick=("vae",))
    rows: list[dict[str, Any]] = []
    costs: list[dict[str, float]] = []
    clouds: dict[str, pd.DataFrame] = {}
    for seed in run.track(run.seeds, "seeds"):
        encoding = Encoding.fit(diamonds.train, derive(seed, "modes"))
        for base in bases:
            models = _fit(run, base, diamonds, seed, encoding)
            rejected, per_row = _rejection(models["off"], diamonds, seed, run)
            for mode, model in models.items():
                drawn = _draws(model.sample, diamonds, seed, run)
                rows.append(_measure(diamonds, base, NAMES[mode], seed, drawn))
                if mode == "off":
                    clipped = [_clip(frame, diamonds.train) for frame in drawn]
                    rows.append(_measure(diamonds, base, "clip each column", seed, clipped))
            row = _measure(diamonds, base, "rejection", seed, rejected)
            rows.append(row | {"rows drawn per row kept": per_row})
            if base == "vae":
                gap = _mean_gap(models["guardrail"], rejected[0], diamonds)
                costs.append(_cost(models["off"], models["guardrail"]) | {"gap": gap})
            if base == "vae" and seed == run.seed:
                clouds = {NAMES[mode]: model.sample(3_000) for mode, model in models.items()}
                run.model("model", models["train"])
        rows += _reference_rows(diamonds, seed, run)
        for task in others:
            encoding = Encoding.fit(task.train, derive(seed, "modes"))
            for mode, model in _fit(run, "vae", task, seed, encoding).items():
                rows.append(_measure(task, "vae", NAMES[mode], seed, _draws(model.sample, task, seed, run)))
        run.log(f"seed {seed} is done")

    run.table("generators", _summary(rows), _TABLE_TEXT)
    run.table("seeds", rows, "The same, seed by seed.")
    run.table("cost", costs, "Sampling 10,000 diamonds from the VAE, and the layer's part in it; medians.")
    run.figure("cone", _cone_figure(clouds), *_CONE_TEXT)
    run.figure("bars", _bars_figure(rows, bases), *_BARS_TEXT)
    _claims(run, rows, costs, bases)
    run.note(
        "A fault of training through the layer (a correction could become hundreds of widths of a mode) "
        "was seen in an earlier run of this study, on test rows of the houses, and mended since. The "
        "test rows of the diamonds had been scored once before, so these numbers are not a first look. "
        "The gap to rejection was among what the settings were chosen by."
    )


# -- data ----------------------------------------------------------------------------------------------------


def _diamonds(run: Run) -> Task:
    """10,000 training rows and 6,000 test rows; the few that break a rule are left out."""
    data = tables.diamonds(run.seed, target=None)
    rules = LinearConstraints.parse(DIAMONDS, list(data.train.x.columns))
    train = _complying(data.train.x, rules).iloc[: run.size(standard=10_000, smoke=400)]
    test = _complying(data.test.x, rules).iloc[: run.size(standard=6_000, smoke=400)]
    return Task("diamonds", rules, train, test, "price", "R2 of the logarithm")


def _other(run: Run, load: Callable[..., Any], texts: Sequence[str]) -> Task:
    data = load(run.seed, target=None)
    rules = LinearConstraints.parse(texts, list(data.train.x.columns))
    train, test = _complying(data.train.x, rules), _complying(data.test.x, rules)
    if data.name == "credit":
        known = train["Status"].notna()
        return Task("credit", rules, train[known].reset_index(drop=True), test, "Status", "AUC")
    return Task("housing", rules, train, test, "Sale_Price", "R2 of the logarithm")


def _complying(frame: pd.DataFrame, rules: LinearConstraints) -> pd.DataFrame:
    return frame.loc[rules.complies(frame)].reset_index(drop=True)


# -- generating ----------------------------------------------------------------------------------------------


def _fit(run: Run, base: str, task: Task, seed: int, encoding: Encoding) -> dict[str, ConstrainedTabular]:
    """A generator in its three modes; the plain one has the weights of the guarded one."""
    # Chosen on validation rows of the diamonds, with usefulness, violations, the gap to rejection and
    # detection in view together. A critic of single rows learns faster than one of packs in so few steps.
    epochs = {
        "vae": run.size(standard=200, smoke=2, quick=60, full=300),
        "gan": run.size(standard=60, smoke=2, full=300),
    }[base]
    shapes: dict[str, dict[str, Any]] = {"vae": {"hidden": 256, "latent": 8}, "gan": {}}
    settings: dict[str, dict[str, Any]] = {
        "vae": {"lr": 2e-3, "schedule": "cosine", "weight_decay": 0.0},
        "gan": {"lr": 1e-3, "pac": 1},
    }
    columns = encoding.to_list()
    plain = ConstrainedTabular(base, None, "off", columns=columns, **shapes[base])
    guarded = ConstrainedTabular(base, task.rules, "guardrail", columns=columns, **shapes[base])
    trained = ConstrainedTabular(base, task.rules, "train", columns=columns, **shapes[base])
    for model in (guarded, trained):
        model.fit(task.train, seed=seed, progress=run.progress, epochs=epochs, **settings[base])
    plain.load_state_dict(guarded.state_dict())
    return {"off": plain.eval(), "guardrail": guarded, "train": trained}


def _draws(sample: Callable[..., pd.DataFrame], task: Task, seed: int, run: Run) -> list[pd.DataFrame]:
    """Tables of the size of the training rows; several, so that scores are of the model, not of a draw."""
    n = run.size(standard=5, smoke=1, quick=2)
    return [sample(len(task.train), torch.Generator().manual_seed(derive(seed, "draw", k))) for k in range(n)]


def _rejection(
    model: ConstrainedTabular, task: Task, seed: int, run: Run
) -> tuple[list[pd.DataFrame], float]:
    """Rows of the plain model that comply; and how many were drawn for one that was kept."""
    kept, drawn = [], 0
    for k in range(run.size(standard=5, smoke=1, quick=2)):
        generator = torch.Generator().manual_seed(derive(seed, "rejection", k))
        parts: list[pd.DataFrame] = []
        while sum(map(len, parts)) < len(task.train) and drawn < 1_000 * len(task.train):
            frame = model.sample(len(task.train), generator)
            drawn += len(frame)
            parts.append(frame.loc[task.rules.complies(frame)])
        kept.append(pd.concat(parts, ignore_index=True).iloc[: len(task.train)])
    return kept, drawn / sum(map(len, kept))


def _clip(frame: pd.DataFrame, train: pd.DataFrame) -> pd.DataFrame:
    """Each column clipped to the range of the training rows; rules between columns may still break."""
    numeric = train.select_dtypes("number").columns
    result = frame.copy()
    result[numeric] = frame[numeric].clip(train[numeric].min(), train[numeric].max(), axis=1)
    return result


def _reference_rows(task: Task, seed: int, run: Run) -> list[dict[str, Any]]:
    """What needs no deep generator: a Gaussian copula, and the training rows drawn again."""
    copula = GaussianCopula().fit(task.train, seed=seed)
    rows = [_measure(task, "copula", "plain", seed, _draws(copula.sample, task, seed, run))]
    rng = np.random.default_rng(derive(seed, "bootstrap"))
    again = [task.train.iloc[rng.integers(0, len(task.train), len(task.train))].reset_index(drop=True)]
    return [*rows, _measure(task, "real rows", "bootstrap", seed, again)]


# -- measuring -----------------------------------------------------------------------------------------------


def _measure(task: Task, base: str, way: str, seed: int, drawn: Sequence[pd.DataFrame]) -> dict[str, Any]:
    """One row of the table: violations over all draws, scores as means over the draws."""
    together = pd.concat(drawn, ignore_index=True)
    written = pd.read_csv(io.StringIO(together.to_csv(index=False)))
    rules = task.rules
    return {
        "table": task.name,
        "generator": base,
        "way": way,
        "seed": seed,
        "rows violating": rules.violation_rate(together, TOLERANCE),
        "rules broken": rules.violation_coverage(together, TOLERANCE),
        "pairs broken": rules.violation_mean(together, TOLERANCE),
        "violations": int((~rules.complies(together, TOLERANCE)).sum()),
        "violations after CSV": int((~rules.complies(written, TOLERANCE)).sum()),
        "usefulness": statistics.fmean(_usefulness(task, frame) for frame in drawn),
        "F1": _f1_of_cut(task, drawn[0]) if task.name == "diamonds" else None,
        "detection": detection_auc(task.test, drawn[0].iloc[: len(task.test)], seed),
        "correlation error": correlation_error(task.test, together),
    }


def _features(task: Task, frame: pd.DataFrame, target: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Inputs of a predictor: generated rows and test rows, with the same codes."""
    both = numeric_features(pd.concat([frame, task.test], ignore_index=True).drop(columns=target))
    return both.iloc[: len(frame)], both.iloc[len(frame) :]


def _usefulness(task: Task, frame: pd.DataFrame) -> float:
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
    from sklearn.metrics import roc_auc_score

    inputs, test = _features(task, frame, task.target)
    if task.utility == "AUC":
        bad, test_bad = frame[task.target] == "bad", task.test[task.target] == "bad"
        if bad.nunique() < 2:
            return 0.5
        classifier = HistGradientBoostingClassifier(random_state=0).fit(inputs, bad)
        return float(roc_auc_score(test_bad, classifier.predict_proba(test)[:, 1]))
    # A price of zero has no logarithm; only plain models draw one.
    log_price, test_price = (np.log(f[task.target].clip(lower=1)) for f in (frame, task.test))
    return float(HistGradientBoostingRegressor(random_state=0).fit(inputs, log_price).score(test, test_price))


def _f1_of_cut(task: Task, frame: pd.DataFrame) -> float:
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.metrics import f1_score

    inputs, test = _features(task, frame, "cut")
    if frame["cut"].nunique() < 2:
        return 0.0
    classifier = HistGradientBoostingClassifier(max_iter=50, random_state=0).fit(inputs, frame["cut"])
    return float(f1_score(task.test["cut"], classifier.predict(test), average="macro"))


def _cost(
    plain: ConstrainedTabular, guarded: ConstrainedTabular, n: int = 10_000, repeats: int = 31
) -> dict[str, float]:
    """Milliseconds of drawing rows and of the layer on the same number of rows, and their quotient."""
    assert guarded.layer is not None
    assert guarded.constraints is not None
    raw = torch.from_numpy(guarded.constraints.values(plain.sample(n)))
    whole, layer = [], []
    with torch.no_grad():
        for _ in range(repeats):
            start = time.perf_counter()
            guarded.sample(n)
            whole.append(time.perf_counter() - start)
            start = time.perf_counter()
            guarded.layer(raw)
            layer.append(time.perf_counter() - start)
    times = statistics.median(whole), statistics.median(layer)
    return {"sampling ms": 1e3 * times[0], "layer ms": 1e3 * times[1], "share": times[1] / times[0]}


def _mean_gap(model: ConstrainedTabular, rejected: pd.DataFrame, task: Task) -> float:
    """Largest relative distance between the column means of guarded and of rejected rows."""
    guarded = model.sample(len(rejected))[list(task.rules.columns)].mean()
    reference = rejected[list(task.rules.columns)].mean()
    return float(((guarded - reference).abs() / reference.abs()).max())


# -- claims --------------------------------------------------------------------------------------------------


def _claims(
    run: Run, rows: list[dict[str, Any]], costs: list[dict[str, float]], bases: Sequence[str]
) -> None:
    def numbers(key: str, base: str, way: str) -> list[float]:
        return [r[key] for r in rows if (r["table"], r["generator"], r["way"]) == ("diamonds", base, way)]

    ways = [NAMES["guardrail"], NAMES["train"]]
    for base in bases:
        run.claim(
            f"A plain {base.upper()} breaks rules in at least a fifth of its rows",
            paper="more than half of the rows for many models and tables, more than 95 % for some",
            measured=numbers("rows violating", base, NAMES["off"]),
            at_least=0.20,
        )
    run.claim(
        "With the layer no row breaks a rule",
        paper="0 violations, by construction",
        measured=[
            float(sum(r["violations"] for r in rows if r["seed"] == s and r["way"] in ways))
            for s in run.seeds
        ],
        at_most=0,
        unit="rows",
        note=f"All tables and generators; tolerance {TOLERANCE:g} of a rule's terms, in float64.",
    )
    run.claim(
        "After a round trip through a CSV file no row breaks a rule",
        paper="not reported",
        measured=[
            float(sum(r["violations after CSV"] for r in rows if r["seed"] == s and r["way"] in ways))
            for s in run.seeds
        ],
        at_most=0,
        unit="rows",
    )
    for base in bases:
        run.claim(
            f"The guardrail costs the {base.upper()} no usefulness",
            paper="a gain for most models and tables, smaller than with training",
            measured=numbers("usefulness", base, ways[0]),
            baseline=numbers("usefulness", base, NAMES["off"]),
            at_least=-0.003,
            note="R2 of the logarithm of a diamond's price; the same weights with and without the layer.",
        )
        run.claim(
            f"Training the {base.upper()} with the layer is as useful as the guardrail",
            paper="up to 6.5 % better than the plain model",
            measured=numbers("usefulness", base, ways[1]),
            baseline=numbers("usefulness", base, ways[0]),
            at_least=-0.003,
            note="Two trainings from the same seed; how far seeds differ stands in the table.",
        )
    run.claim(
        "The layer takes at most a twentieth of the time of sampling",
        paper="sampling time unchanged",
        measured=[cost["share"] for cost in costs],
        at_most=0.05,
        note="10,000 diamonds from the VAE, drawn as a table; medians of 31 repetitions.",
    )
    run.claim(
        "Column means agree with rejection sampling",
        paper="not reported",
        measured=[cost["gap"] for cost in costs],
        at_most=0.03,
        note="The largest relative distance over constrained columns. Rejection also changes columns that "
        "the layer hardly moves, such as carat and price, because the rows that it keeps are not typical.",
    )
    plain, trained = numbers("usefulness", "vae", NAMES["off"]), numbers("usefulness", "vae", ways[1])
    change = [100 * (b - a) for a, b in zip(plain, trained, strict=True)]
    run.note(
        "The paper's gain of up to 6.5 % is not claimed here. Training the VAE with the layer changed R2 "
        f"by {statistics.fmean(change):+.2f} points (from {min(change):+.2f} to {max(change):+.2f} over the "
        "seeds)."
    )
    run.note(
        "Trees tell all deep generators from real rows almost surely; the paper's gain in detection is not "
        "claimed at this scale. 53,920 of 53,940 diamonds have all sizes, and 99.84 % of those keep the "
        "rules; the rest is left out."
    )


def _summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over the seeds, and how far usefulness spreads."""
    frame = pd.DataFrame(rows)
    result = []
    for (table, generator, way), group in frame.groupby(["table", "generator", "way"], sort=False):
        means = {
            key: None if group[key].isna().all() else float(group[key].mean())
            for key in (
                "rows violating",
                "rules broken",
                "pairs broken",
                "usefulness",
                "F1",
                "detection",
                "correlation error",
            )
        }
        spread = float((group["usefulness"] - group["usefulness"].mean()).abs().max())
        calls = group.get("rows drawn per row kept")
        drawn = None if calls is None or calls.isna().all() else float(calls.mean())
        row = {"table": table, "generator": generator, "way": way, **means, "spread of usefulness": spread}
        result.append(row | {"rows drawn per row kept": drawn})
    return result


# -- figures -------------------------------------------------------------------------------------------------

_TABLE_TEXT = (
    "Generated tables, mean over the seeds, with the largest distance of a seed from it. Violations are "
    f"judged at {TOLERANCE:g} of the size of a rule's terms. Usefulness is the score on real test rows of "
    "boosted trees that were trained on generated rows: R2 of the logarithm of the price for diamonds and "
    "houses, AUC of the loan's status for credit; F1 is of a diamond's cut. Detection is the AUC with "
    "which trees tell generated from real rows."
)
_CONE_TEXT = (
    "Height z of a diamond against the sum of its length x and width y, 3,000 generated rows each. The "
    "lines are the two rules that bound the height; orange rows break a rule. Rows that complied stay "
    "where they are.",
    "Three scatter plots with a narrow cone of allowed rows. The plain model puts many orange points "
    "outside; with the guardrail and with training through the layer all points lie inside.",
)
_BARS_TEXT = (
    "Left: share of generated diamonds that break a rule. Right: usefulness, the R2 on real test rows of a "
    "predictor that was trained on generated ones. Dots are seeds; the dashed line is a predictor trained "
    "on real rows.",
    "Bars for each way of generating. Plain models and clipping break rules in many rows, the guardrail, "
    "training with the layer and rejection in none. Usefulness is about the same for all ways of one "
    "generator.",
)


def _cone_figure(parts: dict[str, pd.DataFrame]) -> Figure:
    from matplotlib.figure import Figure

    rules = LinearConstraints.parse(DIAMONDS)
    with style():
        figure = Figure(figsize=WIDE)
        axes = figure.subplots(1, len(parts), sharex=True, sharey=True)
        for axis, (name, frame) in zip(axes, parts.items(), strict=True):
            bad = ~rules.complies(frame, TOLERANCE)
            total = frame["x"] + frame["y"]
            for chosen, colour in ((~bad, METHOD), (bad, BASELINE)):
                axis.scatter(
                    total.to_numpy()[chosen],
                    frame["z"].to_numpy()[chosen],
                    s=3,
                    color=colour,
                    alpha=0.5,
                    linewidths=0,
                )
            ends = np.array([7.0, 19.0])
            for slope in (0.275, 0.35):
                axis.plot(ends, slope * ends, color=REFERENCE, linewidth=0.8)
            axis.set(title=name, xlabel="x + y, mm", xlim=ends, ylim=(1.5, 6.5))
        axes[0].set_ylabel("z, mm")
    return figure


def _bars_figure(rows: list[dict[str, Any]], bases: Sequence[str]) -> Figure:
    from matplotlib.figure import Figure

    ways = [NAMES["off"], "clip each column", "rejection", NAMES["guardrail"], NAMES["train"]]
    labels = [(base, way) for base in bases for way in ways]
    real = [row["usefulness"] for row in rows if row["generator"] == "real rows"]
    with style():
        figure = Figure(figsize=(WIDE[0], 0.8 + 0.32 * len(labels)))
        axes = figure.subplots(1, 2, sharey=True)
        for axis, key, title in zip(
            axes, ("rows violating", "usefulness"), ("rows that break a rule", "usefulness, R2"), strict=True
        ):
            for i, (base, way) in enumerate(labels):
                values = [
                    r[key] for r in rows if (r["table"], r["generator"], r["way"]) == ("diamonds", base, way)
                ]
                colour = METHOD if way in (NAMES["guardrail"], NAMES["train"]) else BASELINE
                axis.barh(i, max(0.0, statistics.fmean(values)), color=colour, alpha=0.35)
                axis.plot(values, [i] * len(values), "o", color=colour, markersize=4)
            axis.set(title=title, xlim=(0, 1))
        axes[1].axvline(statistics.fmean(real), color=REFERENCE, linestyle="--", linewidth=0.8)
        axes[0].set_yticks(range(len(labels)), [f"{base.upper()}, {way}" for base, way in labels])
        axes[0].invert_yaxis()
        for axis in axes:
            axis.grid(False)
    return figure
