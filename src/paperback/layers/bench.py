"""How layers are compared: on sequence tasks whose answers are known, and on what a long sequence costs.

Every contender learns four tasks of its own accord, with equally many steps: copying, selective copying,
induction, and which points of a set are corners of its convex hull. Sequences are drawn anew for each step,
so that nothing can be learned by heart; the test is on other draws, of the trained length and of twice that.
A layer works inside a small network: an embedding, two residual layers, a linear read-out. Points are read
twice, so that a layer that looks back only has seen all of them before it answers. A pointer network answers
by pointing at the place where the answer stands, and is the only one that can also give a tour.

With ``--model module:function`` a layer of the user's takes part: the function is called with the width and
returns a module ``(batch, length, dim) -> (batch, length, dim)``.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_model
from torch import Tensor, nn

from paperback.compare.bench import Bench, Contender, Metric
from paperback.compare.users_code import users_function
from paperback.data.simulate.geometry import PointSets, hull_batch, tsp_batch
from paperback.errors import DataError
from paperback.layers.mamba.blocks import BlockStack
from paperback.layers.pointer_network import PointerNetwork
from paperback.layers.sequence_tasks import (
    NO_TARGET,
    SequenceTask,
    copying,
    induction,
    selective_copying,
)
from paperback.study.budget import Budget, for_budget
from paperback.study.measure import Stopwatch, flops, parameters
from paperback.training import generator, seeded, train

SYMBOLS, ITEMS = 8, 4  # different symbols, and how many are to be copied
TASKS: dict[str, Callable[..., SequenceTask]] = {
    "copying": partial(copying, items=ITEMS, symbols=SYMBOLS),
    "selective_copying": partial(selective_copying, items=ITEMS, symbols=SYMBOLS),
    "induction": partial(induction, symbols=SYMBOLS),
}
VOCABULARY = SYMBOLS + 2
POINTS = 8  # of a set; tours have as many
COST_LENGTHS = (1024, 4096)
RATE, POINTER_RATE = 3e-3, 2e-3


@dataclass(frozen=True)
class LayersData:
    """What the contenders are given: the sizes of the tasks, and the user's layer.

    Attributes:
        width: features of a position inside a network.
        length: of the sequences that are trained on.
        steps: of each training.
        batch_size: sequences of a step.
        tested: sequences of a test.
        layer: makes the user's layer of a given width, None without one.
    """

    width: int
    length: int
    steps: int
    batch_size: int
    tested: int
    layer: Callable[[int], nn.Module] | None


def load(
    path: Path | None, target: str | None, budget: Budget, seed: int, model: str | None = None
) -> LayersData:
    """The tasks of a budget, and the user's layer.

    Args:
        path: must be None, the tasks are drawn.
        target: must be None.
        budget: how long the sequences and trainings are.
        seed: not used; every draw belongs to the seed of a job.
        model: "module:function" of the user's layer.

    Raises:
        DataError: if data are given, or there is no such function.
    """
    if path is not None or target is not None:
        raise DataError(
            "layers are compared on tasks with known answers, not on data; leave --data and --target out, or "
            "bring a layer with --model module:function."
        )
    return LayersData(
        width=for_budget(budget, smoke=16, quick=32, standard=64),
        length=for_budget(budget, smoke=8, quick=16, standard=32, full=128),
        steps=for_budget(budget, smoke=3, quick=300, standard=2000, full=10_000),
        batch_size=for_budget(budget, smoke=8, standard=64),
        tested=for_budget(budget, smoke=20, quick=500, standard=1000),
        layer=None if model is None else users_function(model, "called with the width, returns a layer"),
    )


# -- networks ------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """``u + layer(norm(u))``, for layers that bring neither."""

    def __init__(self, width: int, layer: nn.Module) -> None:
        super().__init__()
        self.norm, self.layer = nn.RMSNorm(width), layer

    def forward(self, u: Tensor) -> Tensor:
        """As the layer, shapes checked."""
        out = self.layer(self.norm(u))
        out = out[0] if isinstance(out, tuple) else out  # an nn.LSTM returns its state too
        if not isinstance(out, Tensor) or out.shape != u.shape:
            found = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise DataError(
                f"{type(self.layer).__name__} turned {tuple(u.shape)} into {found}; a layer keeps the shape "
                "(batch, length, dim)."
            )
        return u + out


class TaskNetwork(nn.Module):
    """An embedding, layers ``(batch, length, dim)``, a norm and a linear read-out of every position."""

    def __init__(self, layers: nn.Module, width: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.embed, self.layers = nn.Linear(inputs, width), layers
        self.norm, self.read = nn.RMSNorm(width), nn.Linear(width, outputs)

    def forward(self, features: Tensor) -> Tensor:
        """Logits ``(batch, length, outputs)`` of features ``(batch, length, inputs)``."""
        return self.read(self.norm(self.layers(self.embed(features))))


def _mamba(width: int, kind: str) -> nn.Module:
    settings = {"kind": kind} if kind == "s6" else {"kind": kind, "headdim": 16, "d_state": 32}
    return BlockStack("MM", width, **settings)


def _transformer(width: int) -> nn.Module:
    return BlockStack("AFAF", width)


def _lstm(width: int) -> nn.Module:
    return nn.Sequential(*(Residual(width, nn.LSTM(width, width, batch_first=True)) for _ in range(2)))


def _yours(width: int, make: Callable[[int], nn.Module]) -> nn.Module:
    layers = [make(width) for _ in range(2)]
    for layer in layers:
        if not isinstance(layer, nn.Module):
            raise DataError(f"the function of --model returned a {type(layer).__name__}; return a module.")
    return nn.Sequential(*(Residual(width, layer) for layer in layers))


# -- learning and measuring ----------------------------------------------------------------------------------


class Learner(NamedTuple):
    """How a contender takes part.

    Attributes:
        sequence: ``(task, data, seed) -> (network, share right at the trained length, at twice that)``.
        hull: ``(data, seed) -> (network, share of sets whose corners are right)``.
        pass_over: ``(length) -> a function that is one forward pass over one sequence``.
        operations: ``(length) -> floating-point operations`` of such a pass.
        tour: ``(data, seed) -> excess over the shortest tours``, None where it cannot.
        size: number of parameters of the layers alone.
    """

    sequence: Callable[[str, LayersData, int], tuple[nn.Module, float, float]]
    hull: Callable[[LayersData, int], tuple[nn.Module, float]]
    pass_over: Callable[[int], Callable[[], Any]]
    operations: Callable[[int], int]
    tour: Callable[[LayersData, int], float] | None
    size: int


def evaluate(
    contender: Contender, data: LayersData, budget: Budget, seed: int, out: Path
) -> dict[str, float | None]:
    """Learn the tasks, measure, save the networks.

    Args:
        contender: who.
        data: from `load`.
        budget: how much training.
        seed: of all draws and weights.
        out: folder for the networks, one safetensors file for each task.

    Returns:
        Metric name to number; None where the contender does not have the quantity.
    """
    learner: Learner = contender.build(data, budget, seed)
    scores: dict[str, float | None] = {}
    longer = []
    out.mkdir(parents=True, exist_ok=True)
    with Stopwatch() as learning:
        for task in TASKS:
            network, scores[task], twice = learner.sequence(task, data, seed)
            longer.append(twice)
            save_model(network, str(out / f"{task}.safetensors"))
        network, scores["hull"] = learner.hull(data, seed)
        save_model(network, str(out / "hull.safetensors"))
    seconds = learning.seconds
    scores["tour_gap"] = None if learner.tour is None else learner.tour(data, seed)
    found = [scores[name] for name in (*TASKS, "hull")]
    with seeded(seed, "cost"):
        passes = [learner.pass_over(n) for n in COST_LENGTHS]
        scores["pass_short"], scores["pass_long"] = (_median_seconds(run) for run in passes)
        scores["flops"] = float(learner.operations(COST_LENGTHS[0]))
    return scores | {
        "right": statistics.fmean(value for value in found if value is not None),
        "longer": statistics.fmean(longer),
        "fit_seconds": seconds,
        "parameters": float(learner.size),
    }


def _median_seconds(run: Callable[[], Any], repeats: int = 5) -> float:
    """Median wall time of a pass without gradients, after one that is not counted."""
    times = []
    with torch.no_grad():
        run()
        for _ in range(repeats):
            with Stopwatch() as watch:
                run()
            times.append(watch.seconds)
    return statistics.median(times)


def _fit(
    model: nn.Module, loss: Callable[[Any, int, torch.Generator], Tensor], data: LayersData, seed: int
) -> None:
    """Fresh draws for each step: the rows only count."""
    train(
        model, lambda module, batch, g: loss(module, len(batch[0]), g),
        torch.zeros(data.steps * data.batch_size), epochs=1, batch_size=data.batch_size, lr=RATE,
        schedule="cosine", warmup_fraction=0.1, clip_norm=1.0, seed=seed, progress=False,
    )  # fmt: skip


# -- layers in a network -------------------------------------------------------------------------------------


def _layer_learner(make: Callable[[int], nn.Module], data: LayersData, _: Budget, seed: int) -> Learner:
    def network(stream: str, inputs: int, outputs: int) -> TaskNetwork:
        with seeded(seed, stream):
            return TaskNetwork(make(data.width), data.width, inputs, outputs)

    def sequence(task: str, data: LayersData, seed: int) -> tuple[nn.Module, float, float]:
        model = network(task, VOCABULARY, SYMBOLS)

        def loss(module: nn.Module, size: int, g: torch.Generator) -> Tensor:
            drawn = TASKS[task](size, data.length, g)
            logits = module(F.one_hot(drawn.tokens, VOCABULARY).float())
            return F.cross_entropy(logits.flatten(0, 1), drawn.targets.flatten(), ignore_index=NO_TARGET)

        _fit(model, loss, data, seed)
        right = []
        for length in (data.length, 2 * data.length):
            test = TASKS[task](data.tested, length, generator(seed, "test", task, length))
            with torch.no_grad():
                predicted = model(F.one_hot(test.tokens, VOCABULARY).float()).argmax(-1)
            right.append(test.accuracy(predicted))
        return model, right[0], right[1]

    def hull(data: LayersData, seed: int) -> tuple[nn.Module, float]:
        model = network("hull", 3, 1)

        def loss(module: nn.Module, size: int, g: torch.Generator) -> Tensor:
            drawn = hull_batch(POINTS, size, g)
            logits = module(_twice(drawn.points))[:, POINTS:, 0]
            return F.binary_cross_entropy_with_logits(logits, _corners(drawn.targets).float())

        _fit(model, loss, data, seed)
        test = hull_batch(POINTS, data.tested, generator(seed, "test", "hull"))
        with torch.no_grad():
            found = model(_twice(test.points))[:, POINTS:, 0] > 0
        return model, _share_exact(found, test)

    def pass_over(length: int) -> Callable[[], Any]:
        layers, u = make(data.width).eval(), torch.randn(1, length, data.width)
        return lambda: layers(u)

    def operations(length: int) -> int:
        layers = make(data.width).eval()
        if isinstance(layers, BlockStack):  # a scan is elementwise work, which a counter of products misses
            return layers.cost(length).flops
        # The fused LSTM of oneDNN is not counted; to switch it off warns about GPUs.
        with warnings.catch_warnings(action="ignore"), torch.backends.mkldnn.flags(enabled=False):
            return flops(layers, torch.randn(1, length, data.width))

    with seeded(seed, "size"):
        size = parameters(make(data.width))
    return Learner(sequence, hull, pass_over, operations, None, size)


def _twice(points: Tensor) -> Tensor:
    """Points, then the points again, with a mark that says which."""
    first, again = (F.pad(points, (0, 1), value=mark) for mark in (0.0, 1.0))
    return torch.cat([first, again], 1)


def _corners(targets: Tensor) -> Tensor:
    """Which points an output names, ``(batch, POINTS)``; 0 is "stop" and -1 padding."""
    named = torch.zeros(len(targets), POINTS + 1, dtype=torch.bool)
    return named.scatter(1, targets.clamp_min(0), True)[:, 1:]


def _share_exact(found: Tensor, test: PointSets) -> float:
    return float((found == _corners(test.targets)).all(1).double().mean())


# -- the pointer network -------------------------------------------------------------------------------------


def _pointer_learner(data: LayersData, _: Budget, seed: int) -> Learner:
    def network(stream: str, inputs: int) -> PointerNetwork:
        with seeded(seed, stream):
            return PointerNetwork(inputs, hidden=data.width)

    def fit(model: PointerNetwork, draw: Callable[..., tuple[Tensor, ...]], seed: int) -> None:
        model.fit(draw, data.steps, POINTER_RATE, data.batch_size, seed=seed, progress=False)

    def sequence(task: str, data: LayersData, seed: int) -> tuple[nn.Module, float, float]:
        model = network(task, VOCABULARY)
        fit(model, lambda size, g: _to_point_at(task, TASKS[task](size, data.length, g)), seed)
        right = []
        for length in (data.length, 2 * data.length):
            test = TASKS[task](data.tested, length, generator(seed, "test", task, length))
            features, targets = _to_point_at(task, test)
            asked = targets.shape[1] - 1
            pointed = model.decode(features, max_len=targets.shape[1]).indices
            pointed = F.pad(pointed, (0, targets.shape[1] - pointed.shape[1]), value=-1)[:, :asked]
            answers = test.targets[test.targets != NO_TARGET].view(-1, asked)
            same = test.tokens.gather(1, (pointed - 1).clamp_min(0)) == answers
            right.append(float((same & (pointed > 0)).double().mean()))
        return model, right[0], right[1]

    def hull(data: LayersData, seed: int) -> tuple[nn.Module, float]:
        model = network("hull", 2)
        fit(model, lambda size, g: hull_batch(POINTS, size, g), seed)
        test = hull_batch(POINTS, data.tested, generator(seed, "test", "hull"))
        return model, _share_exact(_corners(model.decode(test.points).indices), test)

    def tour(data: LayersData, seed: int) -> float:
        model = network("tour", 2)
        fit(model, lambda size, g: tsp_batch(POINTS, size, g), seed)
        test = tsp_batch(POINTS, data.tested, generator(seed, "test", "tour"))
        return model.score(test.points, test.targets, "tsp")["gap"]

    def pass_over(length: int) -> Callable[[], Any]:
        model, points = network("size", data.width), torch.randn(1, length, data.width)
        targets = torch.tensor([[*range(1, ITEMS + 1), 0]])
        return lambda: model(points, targets)

    def operations(length: int) -> int:
        return network("size", data.width).cost(length, ITEMS + 1).flops

    return Learner(sequence, hull, pass_over, operations, tour, parameters(network("size", data.width)))


def _to_point_at(task: str, drawn: SequenceTask) -> tuple[Tensor, Tensor]:
    """A sequence task as a pointing task: the places where the answers stand, from 1, then stop."""
    if task == "induction":
        places = (drawn.tokens == SYMBOLS).int().argmax(1, keepdim=True) + 1
    else:
        places = (drawn.tokens < SYMBOLS).nonzero()[:, 1].view(-1, ITEMS)
    return F.one_hot(drawn.tokens, VOCABULARY).float(), F.pad(places + 1, (0, 1))


# -- the bench -----------------------------------------------------------------------------------------------


def _always(_: LayersData) -> None:
    return None


def _has_layer(data: LayersData) -> str | None:
    return None if data.layer is not None else "no layer was brought; give one with --model module:function"


def _your_learner(data: LayersData, budget: Budget, seed: int) -> Learner:
    assert data.layer is not None
    return _layer_learner(partial(_yours, make=data.layer), data, budget, seed)


BENCH = Bench(
    task="layers",
    metrics=(
        Metric("right", "four tasks, share right", better="higher", primary=True),
        Metric("copying", "copying, share right", better="higher"),
        Metric("selective_copying", "selective copying, share right", better="higher"),
        Metric("induction", "induction, share right", better="higher"),
        Metric("hull", "corners of the hull, sets right", better="higher"),
        Metric("longer", "sequences of twice the length, share right", better="higher"),
        Metric("tour_gap", "tours, excess over the shortest", better="lower"),
        Metric("fit_seconds", "learning four tasks", "s", better="lower", cost=True),
        Metric("pass_short", f"a pass over {COST_LENGTHS[0]:,} positions", "s", better="lower", cost=True),
        Metric("pass_long", f"a pass over {COST_LENGTHS[1]:,} positions", "s", better="lower", cost=True),
        Metric("flops", f"operations over {COST_LENGTHS[0]:,} positions", better="lower", cost=True),
        Metric("parameters", "parameters of two layers", better="lower", cost=True),
    ),
    contenders=(
        Contender(
            "mamba", "Mamba (S6)", "method", _always, partial(_layer_learner, partial(_mamba, kind="s6"))
        ),
        Contender(
            "mamba-ssd",
            "Mamba-2 (SSD)",
            "method",
            _always,
            partial(_layer_learner, partial(_mamba, kind="ssd")),
        ),
        Contender("pointer-network", "pointer network", "method", _always, _pointer_learner),
        Contender("your-layer", "your layer", "method", _has_layer, _your_learner),
        Contender("lstm", "LSTM", "baseline", _always, partial(_layer_learner, _lstm)),
        Contender(
            "transformer", "transformer (rotary)", "baseline", _always, partial(_layer_learner, _transformer)
        ),
    ),
    load=load,
    evaluate=evaluate,
    seconds={"smoke": 4, "quick": 40, "standard": 300},
    takes_model=True,
)
