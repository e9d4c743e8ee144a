"""The study of population training: a toy, a problem whose best rate moves in time, and a real network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from paperback.data import images
from paperback.data.dataset import Split
from paperback.search import Float
from paperback.search.engine import LocalEngine, Task
from paperback.search.parameters import Config
from paperback.search.population import PopulationResult, PopulationTraining, Schedule, replay
from paperback.search.population.result import draw_tree
from paperback.search.trainables import TorchTrainable
from paperback.study import Run
from paperback.study.figures import BASELINE, METHOD, PALETTE, REFERENCE, TALL, WIDE, style
from paperback.training import derive

SEEDS = tuple(range(20))
TOY = "grid search ends near 0.39, the population near 1.2 (figure 2)"
SCHEDULES = "populations find schedules that constant settings do not reach (sections 4.1 to 4.3)"
FASHION = "better than random search of the same size in every domain (sections 4.1 to 4.3)"

Array = NDArray[np.float64]


def study(run: Run) -> None:
    """Does a population that copies and changes its settings beat constant settings at equal compute?"""
    _toy(run)
    _quadratic(run)
    _fashion(run)


# -- A. Figure 2 of the paper ----------------------------------------------------


class Toy:
    """Two numbers to be maximised by workers who are told only of their own part of the objective."""

    def setup(self, config: Config, seed: int) -> None:
        self.theta = np.array([0.9, 0.9])
        self.reconfigure(config)

    def step(self) -> dict[str, float]:
        self.theta = self.theta - 0.01 * 2 * self.weights * self.theta
        q, (x, y) = 1.2 - float(self.theta @ self.theta), self.theta
        return {"score": q, "theta0": float(x), "theta1": float(y)}

    def state_dict(self) -> dict[str, Any]:
        return {"theta": torch.tensor(self.theta)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.theta = state["theta"].numpy()

    def reconfigure(self, config: Config) -> None:
        self.weights = np.array([config["h0"], config["h1"]])


class RandomTurns(LocalEngine):
    """Two workers, either of which may be the next to end its turn; with strict alternation the two members
    would tie for ever and nothing would be copied."""

    workers = 2

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._rng = np.random.default_rng(derive(seed, "turns"))

    def wait(self, tasks: Sequence[Task]) -> Task:
        return tasks[int(self._rng.integers(len(tasks)))]


def _add_noise(config: Config, rng: np.random.Generator) -> Config:
    return {name: value + rng.normal(0, 0.1) for name, value in config.items()}


TOY_SETTINGS: dict[str, Any] = {"exploit": "tournament", "explore": _add_noise}
TOY_ARMS: dict[str, dict[str, Any]] = {
    "population": {},
    "weights are copied only": {"copy": "weights"},
    "copies without exploring": {"explore": lambda config, rng: config},
    "nothing is copied": {"exploit": None},
}


def _toy(run: Run) -> None:
    turns = run.size(smoke=10, standard=100)  # of each of the two
    results: dict[str, list[PopulationResult]] = {name: [] for name in TOY_ARMS}
    for seed in run.track(run.seeds, "toy"):
        for name, settings in TOY_ARMS.items():
            searcher = PopulationTraining(
                {"h0": Float(0.0, 10.0), "h1": Float(0.0, 10.0)},
                size=2, interval=4, start=[{"h0": 1.0, "h1": 0.0}, {"h0": 0.0, "h1": 1.0}], seed=seed,
                **(TOY_SETTINGS | settings),
            )  # fmt: skip
            result = searcher.run(Toy, 4 * turns, engine=RandomTurns(seed), progress=False)
            results[name].append(result)
    scores = {name: [float(r.best.score or 0.0) for r in found] for name, found in results.items()}
    run.table(
        "toy",
        [
            {"copying": name, "median": np.median(q), "least": min(q), "greatest": max(q)}
            for name, q in scores.items()
        ],
        f"The toy: Q after {2 * turns} turns, at most 1.2, over {len(run.seeds)} seeds.",
    )
    ours = scores["population"]
    run.claim(
        "toy: the population gets close to the maximum of 1.2", paper=TOY,
        measured=float(np.median(ours)), at_least=1.15, interval=_interval(np.median, ours),
        note="Median over seeds of Q of the best member; bootstrap interval.",
    )  # fmt: skip
    run.claim(
        "toy: without copies both workers stop at 0.39", paper=TOY,
        measured=float(np.abs(np.array(scores["nothing is copied"]) - 0.39).max()), at_most=0.005,
        note="Greatest distance from 0.39 over seeds.",
    )  # fmt: skip
    _draw_toy(run, {name: found[0] for name, found in results.items()})


def _draw_toy(run: Run, results: dict[str, PopulationResult]) -> None:
    grid = np.linspace(-0.1, 1.0, 60)
    q = 1.2 - grid[:, None] ** 2 - grid[None, :] ** 2
    with style():
        figure = Figure(figsize=(WIDE[0], 0.92 * WIDE[0]))
        panels = figure.subplots(2, 2, sharex=True, sharey=True).ravel()
        for axes, (name, result) in zip(panels, results.items(), strict=True):
            axes.contour(grid, grid, q, levels=12, colors=REFERENCE, linewidths=0.5, alpha=0.5)
            for member, colour in enumerate((METHOD, BASELINE)):
                own = [trial for trial in result if trial.details["member"] == member]
                x, y = ([trial.details[key] for trial in own] for key in ("theta0", "theta1"))
                axes.plot(x, y, ".-", color=colour, markersize=3, linewidth=0.8, label=f"member {member + 1}")
            axes.plot(0, 0, "+", color="black", markersize=10)
            axes.set(title=f"{name[0].upper()}{name[1:]}: {result.best.score:.2f}", aspect="equal")
            axes.grid(False)
        panels[0].legend(loc="lower right")
        for axes in panels[2:]:
            axes.set_xlabel("θ₀")
        for axes in panels[::2]:
            axes.set_ylabel("θ₁")
    run.figure(
        "toy", figure,
        "The toy, first seed, as in figure 2 of the paper: where the two members are after each of their "
        "turns, from (0.9, 0.9) on; the maximum of Q, 1.2, is at the cross, and the best Q stands in the "
        "title. A jump is a copy. Each setting sees one direction only: members get on in both if copies are "
        "explored, or if a member with one setting takes over weights from the other.",
        "Four planes with the paths of two members. In the upper two, the population and copies of weights "
        "only, they end at the maximum; in the lower two they end away from it, one coordinate still at 0.9.",
    )  # fmt: skip


def _interval(statistic: Callable[..., Any], *samples: Sequence[float] | Array) -> tuple[float, float] | None:
    """Bootstrap interval of a statistic of independent samples, one number per seed; None for one seed."""
    if min(map(len, samples)) < 2:
        return None
    found = stats.bootstrap(
        [np.asarray(sample) for sample in samples], statistic, n_resamples=5000, method="percentile",
        vectorized=True, rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return float(found.low), float(found.high)


def _ratio(a: Array, b: Array, axis: int = -1) -> Array:
    ratio: Array = a.mean(axis=axis) / b.mean(axis=axis)
    return ratio


# -- B. The noisy quadratic model ------------------------------------------------

CURVATURES = np.logspace(-2, 0, 50)
LOW, HIGH = 1e-3, 1.6  # of the learning rate
CHUNK = 50  # optimizer steps in one step of the trainable
RATES = np.geomspace(LOW, HIGH, 33)


class Quadratic:
    """Gradient descent on sum(c x^2) / 2, with noise of covariance c in the gradient."""

    def setup(self, config: Config, seed: int) -> None:
        self.x, self.chunk, self.seed = np.full(len(CURVATURES), 5.0), 0, seed
        self.reconfigure(config)

    def step(self) -> dict[str, float]:
        rng = np.random.default_rng(derive(self.seed, "noise", self.chunk))
        noise = rng.normal(size=(CHUNK, len(CURVATURES))) * np.sqrt(CURVATURES)
        for n in noise:
            self.x = self.x - self.rate * (CURVATURES * self.x + n)
        self.chunk += 1
        return {"loss": float(quadratic_loss(self.x))}

    def state_dict(self) -> dict[str, Any]:
        return {"x": torch.tensor(self.x), "chunk": self.chunk}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.x, self.chunk = state["x"].numpy(), state["chunk"]

    def reconfigure(self, config: Config) -> None:
        self.rate = config["lr"]


def quadratic_loss(x: Array) -> Array:
    """The true loss of points, ``(..., 50)``."""
    loss: Array = 0.5 * (CURVATURES * x * x).sum(-1)
    return loss


def descend(rates: Array, seed: int) -> Array:
    """True losses at the end of independent trainings.

    Args:
        rates: of each training and step, ``(steps, trainings)``, or ``(steps, 1)``.
        seed: of the noise.
    """
    rng = np.random.default_rng(derive(seed, "descend"))
    x = np.full((rates.shape[1], len(CURVATURES)), 5.0)
    for rate in rates:
        noise = rng.normal(size=x.shape) * np.sqrt(CURVATURES)
        x = x - rate[:, None] * (CURVATURES * x + noise)
    return quadratic_loss(x)


def search_rates(seed: int, *, size: int, chunks: int, interval: int, **settings: Any) -> PopulationResult:
    """A population on this problem; `interval` is in optimizer steps."""
    searcher = PopulationTraining(
        {"lr": Float(LOW, HIGH, log=True)}, size=size, interval=interval // CHUNK, mode="min", metric="loss",
        seed=seed, **({"synchronous": True} | settings),
    )  # fmt: skip
    return searcher.run(Quadratic, chunks, progress=False)


QUADRATIC_ARMS: dict[str, dict[str, Any]] = {
    "population, every 50 steps": {"interval": 50},
    "population, every 100 steps": {"interval": 100},
    "population, every 50 steps, asynchronous": {"interval": 50, "synchronous": False},
    "random search": {"interval": 50, "exploit": None},
}
MAIN = "population, every 50 steps"


def _quadratic(run: Run) -> None:
    size, chunks = run.size(smoke=6, standard=20), run.size(smoke=4, standard=40)
    repeats = run.size(smoke=3, standard=20)
    results: dict[str, list[PopulationResult]] = {name: [] for name in QUADRATIC_ARMS}
    for seed in run.track(run.seeds, "noisy quadratic"):
        for name, settings in QUADRATIC_ARMS.items():
            results[name].append(search_rates(seed, size=size, chunks=chunks, **settings))
    losses = {name: np.array([r.best.score for r in found], float) for name, found in results.items()}
    constant, constant_rate = _best_of_grid(np.ones(chunks * CHUNK), repeats, 1)
    fall = 0.5 * (1 + np.cos(np.pi * np.arange(chunks * CHUNK) / (chunks * CHUNK)))
    cosine, cosine_rate = _best_of_grid(fall, repeats, 2)
    many = descend(np.full((chunks * CHUNK, size * repeats), constant_rate), 3).reshape(repeats, size)
    again = np.array([_replayed(run, seed, r) for seed, r in zip(run.seeds, results[MAIN], strict=True)])
    losses |= {
        "the best constant rate": constant,
        "the best constant rate, best of as many runs": many.min(1),
        "the best cosine decay": cosine,
        "the population's schedule, on fresh noise": again,
    }
    run.table(
        "quadratic",
        [
            {"training": name, "loss": found.mean(), "standard deviation": found.std()}
            for name, found in losses.items()
        ],
        f"The noisy quadratic model after {chunks * CHUNK:,} steps, {size} members: true loss, mean over "
        f"{len(run.seeds)} seeds, or over {repeats} repeats for the best of {len(RATES)} constant rates "
        f"({constant_rate:.3g}) and of as many cosine decays (from {cosine_rate:.3g}).",
    )
    _claim_quadratic(run, losses, results[MAIN])
    run.note(
        f"Who knows the shape of a good schedule beforehand needs no population on the noisy quadratic: the "
        f"best of {len(RATES)} cosine decays ends at {cosine.mean():.3f}, the population, which was told of "
        f"constant rates only, at {losses[MAIN].mean():.3f}."
    )
    _draw_quadratic(run, results[MAIN][0], constant_rate, cosine_rate * fall)


def _best_of_grid(shape: Array, repeats: int, stream: int) -> tuple[Array, float]:
    """The losses of the best rate of the grid, ``(repeats,)``, and the rate; it is multiplied by a shape."""
    rates = np.repeat(RATES, repeats)
    losses = descend(shape[:, None] * rates, stream).reshape(len(RATES), repeats)
    place = int(losses.mean(1).argmin())
    return losses[place], float(RATES[place])


def _replayed(run: Run, seed: int, result: PopulationResult) -> float:
    """The mean loss of new models trained with the schedule that a population found."""
    plan = result.schedule()
    seeds = [derive(seed, "fresh", i) for i in range(run.size(smoke=2, standard=10))]
    return float(np.mean([replay(Quadratic, plan, seed=s).metrics[-1]["loss"] for s in seeds]))


def _claim_quadratic(run: Run, losses: dict[str, Array], results: list[PopulationResult]) -> None:
    ours, fresh = losses[MAIN], losses["the population's schedule, on fresh noise"]
    for who, a, name, bar in (
        ("the population's loss", ours, "the best constant rate", 0.5),
        ("the population's loss", ours, "random search", 0.5),
        ("the population's loss", ours, "the best constant rate, best of as many runs", 1.0),
        ("the loss of a new model with its schedule", fresh, "the best constant rate", 0.6),
    ):
        b = losses[name]
        run.claim(
            f"noisy quadratic: {who} is at most {bar} times that of {name}", paper=SCHEDULES,
            measured=float(a.mean() / b.mean()), at_most=bar, interval=_interval(_ratio, a, b), unit="times",
            note=f"Mean loss {a.mean():.3f} against {b.mean():.3f}; bootstrap interval.",
        )  # fmt: skip
    falls = [_fall(result) for result in results]
    run.claim(
        "noisy quadratic: the rates of the population fall with time", paper=SCHEDULES,
        measured=float(np.median(falls)), at_least=5.0, interval=_interval(np.median, falls), unit="times",
        note="Greatest median rate of the members in a turn over that in the last; median over seeds. The "
        "first turn's is that of the prior, before anybody has chosen anything.",
    )  # fmt: skip


def _fall(result: PopulationResult) -> float:
    turns = sorted({trial.details["turn"] for trial in result})
    rates = [np.median([t.config["lr"] for t in result if t.details["turn"] == turn]) for turn in turns]
    return float(max(rates) / rates[-1])


def _draw_quadratic(run: Run, result: PopulationResult, constant: float, cosine: Array) -> None:
    with style():
        figure = Figure(figsize=TALL)
        upper, lower = figure.subplots(2, 1, sharex=True)
        draw_tree(upper, result)
        upper.set(yscale="log", ylabel="true loss", title="The tree of ancestors")
        _draw_rates(lower, result, result.schedule(), constant, cosine)
        lower.set_xlabel("turns of 50 optimizer steps")
    run.figure(
        "quadratic", figure,
        "The noisy quadratic model, first seed. Above: the loss of every member at the end of each turn, "
        "joined to the one that its weights came from. Below: the learning rates of all members, the "
        "schedule that the best weights were trained with, the best constant rate and the best cosine decay.",
        "A tree of losses that fall over time; below it, learning rates that fall from between 0.1 and 1 to "
        "near 0.01.",
    )  # fmt: skip


def _draw_rates(axes: Axes, result: PopulationResult, plan: Schedule, constant: float, cosine: Array) -> None:
    steps = [trial.details["step"] for trial in result]
    axes.plot(
        steps, [t.config["lr"] for t in result], ".", color=REFERENCE, alpha=0.35, markersize=4,
        label="members",
    )  # fmt: skip
    firsts = [first for first, _ in plan.pieces]
    rates = [config["lr"] for _, config in plan.pieces]
    axes.step([*firsts, plan.steps], [*rates, rates[-1]], where="post", color=METHOD, label="best weights")
    axes.axhline(constant, color=BASELINE, linestyle="--", label="best constant")
    axes.plot(np.arange(len(cosine)) / CHUNK, cosine, color=PALETTE[2], label="best cosine decay")
    axes.set(yscale="log", ylabel="learning rate", title="Learning rates", ylim=(LOW, 2 * HIGH))
    axes.legend(ncols=2, loc="lower left")


# -- C. A network for Fashion-MNIST ----------------------------------------------

SPACE = {
    "lr": Float(1e-4, 1.0, log=True),
    "weight_decay": Float(1e-6, 1e-2, log=True),
    "dropout.p": Float(0.0, 0.6),
}


class Rows(Dataset[tuple[Tensor, Tensor]]):
    """Images and labels in memory, taken a batch at a time."""

    def __init__(self, split: Split) -> None:
        self.x, self.y = split.x.flatten(1).float() / 255, split.y

    def __len__(self) -> int:
        return len(self.y)

    def __getitems__(self, places: list[int]) -> tuple[Tensor, Tensor]:
        return self.x[places], self.y[places]


def _loader(split: Split, batch_size: int, shuffle: bool = False) -> DataLoader[Any]:
    return DataLoader(Rows(split), batch_size, shuffle=shuffle, collate_fn=_as_it_is)


def _as_it_is(batch: Any) -> Any:
    return batch


@cache
def _loaders(n_train: int, seed: int) -> tuple[DataLoader[Any], DataLoader[Any], DataLoader[Any]]:
    """Training, validation and test batches."""
    data = images.fashion_mnist(n_train, seed=seed)
    assert data.val is not None
    return _loader(data.train, 64, shuffle=True), _loader(data.val, 1000), _loader(data.test, 1000)


def _network() -> nn.Module:
    return nn.Sequential(nn.Dropout(0.0), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))


def _momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def _cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def _accuracy(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch[0]).argmax(1) == batch[1]).double().mean()


def _fashion(run: Run) -> None:
    size, rounds = run.size(smoke=3, standard=10), run.size(smoke=2, standard=20)
    n_train, steps = run.size(smoke=200, standard=3000), run.size(smoke=5, standard=60)
    rows: dict[str, list[dict[str, float]]] = {"population": [], "random search": []}
    results: list[tuple[PopulationResult, PopulationResult]] = []
    for seed in run.track(run.seeds[:3], "Fashion-MNIST"):
        train, val, test = _loaders(n_train, seed)
        make = partial(
            TorchTrainable, _network, _momentum, _cross_entropy, train, val, steps=steps,
            metrics={"accuracy": _accuracy},
        )  # fmt: skip
        pair = []
        for name, exploit in (("population", "truncation"), ("random search", None)):
            searcher = PopulationTraining(
                SPACE, size=size, interval=1, synchronous=True, seed=seed, exploit=exploit
            )
            result = searcher.run(make, rounds, progress=run.progress)
            rows[name].append(_measured(make, result, val, test))
            pair.append(result)
        results.append((pair[0], pair[1]))
    _claim_fashion(run, rows, [random for _, random in results])
    _draw_fashion(run, *results[0])


def _measured(
    make: Callable[[], TorchTrainable], result: PopulationResult, val: DataLoader[Any], test: DataLoader[Any]
) -> dict[str, float]:
    """Loss and accuracy of the best weights, on rows that chose them and on rows that did not."""
    model = make()
    model.setup(result.best_config, 0)
    model.load_state_dict(result.best_state)
    on_val, on_test = model.evaluate(val), model.evaluate(test)
    return {
        "validation loss": on_val["loss"],
        "test loss": on_test["loss"],
        "test accuracy": on_test["accuracy"],
    }


def _claim_fashion(run: Run, rows: dict[str, list[dict[str, float]]], random: list[PopulationResult]) -> None:
    def column(name: str, key: str) -> list[float]:
        return [row[key] for row in rows[name]]

    table = [
        {"search": name, **{key: float(np.mean(column(name, key))) for key in found[0]}}
        for name, found in rows.items()
    ]
    stopped = [min(-float(t.score) for t in result if t.score is not None) for result in random]
    table.append({"search": "random search, stopped early", "validation loss": float(np.mean(stopped))})
    run.table(
        "fashion_mnist", table,
        f"Fashion-MNIST, mean over {len(random)} seeds. The best member of each is chosen by its validation "
        "loss at the end; stopped early: the least validation loss that any member had in any turn.",
    )  # fmt: skip
    key = "validation loss"
    run.claim(
        "Fashion-MNIST: the validation loss is no worse than random search's", paper=FASHION,
        measured=column("population", key), baseline=column("random search", key), at_most=0.0,
        note="Same members at the start, same steps. Random search keeps its settings all along.",
    )  # fmt: skip
    key = "test accuracy"
    run.claim(
        "Fashion-MNIST: the test accuracy is that of random search, within 0.01", paper=FASHION,
        measured=column("population", key), baseline=column("random search", key), at_least=-0.01,
        note="On 2,000 test images. The bar asks only that it is not worse: a trial run before had seen the "
        "better validation loss without a better accuracy.",
    )  # fmt: skip


def _draw_fashion(run: Run, ours: PopulationResult, random: PopulationResult) -> None:
    with style():
        figure = Figure(figsize=WIDE)
        left, right = figure.subplots(1, 2, sharey=True)
        draw_tree(left, ours)
        draw_tree(right, random)
        scores = [float(t.score) for t in (*ours, *random) if t.score is not None]
        bottom = max(min(scores), float(np.quantile(scores, 0.25)) - 0.3)
        left.set(title="Population", ylabel="minus validation loss", xlabel="turns")
        right.set(title="Random search", ylabel="", xlabel="turns", ylim=(bottom, max(scores) + 0.03))
    run.figure(
        "fashion_mnist", figure,
        "Fashion-MNIST, first seed: minus the validation loss of every member after each turn, joined to the "
        "turn that its weights came from. Members below the axis are not shown.",
        "Two trees of scores; on the left the branches end where members copy better ones.",
    )  # fmt: skip
