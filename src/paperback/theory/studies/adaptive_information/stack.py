"""Many small networks trained as one, and the plane of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from paperback.data.simulate.icosahedron import IcosahedronTask
from paperback.study import Run
from paperback.theory.adaptive_information import InformationPlane
from paperback.training import generator, train

WIDTHS = (12, 10, 7, 5, 4, 3, 2)
LAYERS = ("1", "2", "3", "4", "5", "output")
MIDDLE = LAYERS[1:5]  # layer 1 stays near 12 bits whatever happens
ACTIVATIONS = {
    "relu": torch.relu, "tanh": torch.tanh, "elu": F.elu, "swish": F.silu, "softplus": F.softplus,
}  # fmt: skip
DECAYED = "relu + L2 0.0008"
MOST_ATTEMPTS = 50
COLLAPSED = 0.9  # a network below this test accuracy has learned nothing worth measuring


@dataclass(frozen=True)
class Condition:
    """One network of the stack: its activation, its L2 penalty, and which initial weights it has."""

    activation: str
    penalty: float
    seed: int
    attempt: int = 0

    @property
    def name(self) -> str:
        return self.activation + (f" + L2 {self.penalty:g}" if self.penalty else "")


class Stack(nn.Module):
    """Independent networks of one shape, trained as one: weights ``(networks, in, out)``.

    Each network has the initial weights of torch's Linear, its own split of the inputs and its own order of
    the rows; networks of the same seed and attempt share all three. Their losses are summed, so that Adam,
    which acts on each weight alone, does to each network what it would do if it were alone.
    """

    def __init__(self, conditions: Sequence[Condition], inputs: int) -> None:
        super().__init__()
        self.conditions = sorted(conditions, key=lambda c: list(ACTIVATIONS).index(c.activation))
        starts = sorted({(c.seed, c.attempt) for c in conditions})
        place = torch.tensor([starts.index((c.seed, c.attempt)) for c in self.conditions])
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for layer, (into, out) in enumerate(pairwise(WIDTHS)):
            sources = [generator(*start, "weights", layer) for start in starts]
            draws = torch.stack([torch.rand(into + 1, out, generator=source) for source in sources])
            uniform = (2 * draws[place] - 1) / into**0.5
            self.weights.append(nn.Parameter(uniform[:, :into].clone()))
            self.biases.append(nn.Parameter(uniform[:, into:].clone()))
        self.penalty = torch.tensor([c.penalty for c in self.conditions])
        orders = torch.stack(
            [torch.randperm(inputs, generator=generator(*start, "split")) for start in starts]
        )
        self.order = orders[place]  # the first 80 % are trained on

    def forward(self, x: Float[Tensor, "networks batch corners"]) -> list[Tensor]:
        """The activations of every layer, the last as logits: ``(networks, batch, width)`` each."""
        layers = []
        for depth, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x, weight)
            if depth < len(self.weights) - 1:
                x = self._activate(x)
            layers.append(x)
        return layers

    def _activate(self, x: Tensor) -> Tensor:
        names = [c.activation for c in self.conditions]
        parts = [(name, names.count(name)) for name in ACTIVATIONS if name in names]
        pieces = torch.split(x, [count for _, count in parts])
        return torch.cat([ACTIVATIONS[name](piece) for (name, _), piece in zip(parts, pieces, strict=True)])

    def loss(self, task: IcosahedronTask, rows: Int[Tensor, " batch"]) -> Tensor:
        """Cross-entropy, and the L2 penalty over all weights but the last layer's, summed over networks."""
        chosen = self.order[:, rows]
        logits = self(task.x[chosen])[-1]
        error = F.cross_entropy(logits.flatten(0, 1), task.y[chosen].flatten(), reduction="none")
        norms = sum((weight**2).sum((1, 2)) for weight in list(self.weights)[:-1])
        return error.view(len(logits), -1).mean(1).sum() + 0.5 * (self.penalty * norms).sum()

    def measure(
        self, task: IcosahedronTask
    ) -> tuple[list[dict[str, Tensor]], Float[np.ndarray, " networks"]]:
        """For each network the activations over all inputs, with the softmax; and the test accuracies."""
        with torch.no_grad():
            layers = self(task.x.expand(len(self.conditions), -1, -1))
        layers[-1] = layers[-1].softmax(-1)
        right = (layers[-1].argmax(-1) == task.y).float()
        accuracy = right.gather(1, self.order[:, n_train(task) :]).mean(1).numpy()
        return [dict(zip(LAYERS, T, strict=True)) for T in zip(*layers, strict=True)], accuracy


def n_train(task: IcosahedronTask) -> int:
    """80 % of the inputs."""
    return int(0.8 * len(task.y))


@dataclass
class Network:
    """A trained network with its plane."""

    condition: Condition
    accuracy: float
    plane: InformationPlane
    activations: dict[str, Tensor]  # at the end

    def __post_init__(self) -> None:
        table = self.plane.compression().set_index("layer")
        self.end, self.compression = table["end"], table["compression"]

    @property
    def learned(self) -> bool:
        """Whether it is more than a collapsed network."""
        return self.accuracy >= COLLAPSED

    @property
    def middle(self) -> float:
        """Mean I(X;T) over the layers 2 to 5 at the end."""
        return float(self.end[list(MIDDLE)].mean())


def choose(networks: Sequence[Network]) -> dict[tuple[str, int], Network]:
    """One network for each condition and seed.

    Narrow ReLU networks often die, at the start or under L2; their information is then 0 for a reason that
    is none of the paper's. For ReLU with and without L2 of 8e-4 it is the first initialisation with
    which both learned, so that the two are compared from equal weights; otherwise the first that learned.
    Where none did it is the first.
    """
    by = {(n.condition.name, n.condition.seed, n.condition.attempt): n for n in networks}
    chosen = {}
    for name, seed in dict.fromkeys((n.condition.name, n.condition.seed) for n in networks):
        together = ("relu", DECAYED) if name in ("relu", DECAYED) else (name,)
        shared = [a for a in range(MOST_ATTEMPTS) if all((other, seed, a) in by for other in together)]
        learned = [a for a in shared if all(by[other, seed, a].learned for other in together)]
        chosen[name, seed] = by[name, seed, (learned or shared)[0]]
    return chosen


def train_networks(run: Run, task: IcosahedronTask) -> list[Network]:
    """All networks of the study in one stack, with their information planes."""
    tries = run.size(smoke=1, quick=3, standard=6)  # initialisations of the networks that may die
    many = run.size(smoke=4, quick=3, standard=14, full=50)  # ReLU, for the correlation with generalisation
    attempts = {("relu", 0.0): many, ("relu", 8e-4): tries, ("tanh", 0.0): 1, ("elu", 0.0): 1}
    if run.budget in ("standard", "full"):
        attempts |= {("relu", 3e-4): 2, ("relu", 1.2e-3): 2}
        attempts |= {("tanh", 8e-4): 1, ("swish", 0.0): 1, ("softplus", 0.0): 1}
    conditions = [
        Condition(*kind, seed, attempt)
        for kind, count in attempts.items()
        for seed in run.seeds
        for attempt in range(count)
    ]
    stack = Stack(conditions, len(task.y))
    epochs = run.size(smoke=8, quick=1000, standard=1200, full=8000)
    records = run.size(smoke=5, quick=30, standard=40, full=400)
    planes = [InformationPlane(None, task.x, task.y, n=records, epochs=epochs) for _ in stack.conditions]

    def record(epoch: int, *_: object) -> None:
        if planes[0].due(epoch):
            for plane, activations in zip(planes, stack.measure(task)[0], strict=True):
                plane.add(epoch, activations)

    record(0)
    train(
        stack,
        lambda model, batch, _: model.loss(task, batch[0]),
        torch.arange(n_train(task)),
        epochs=epochs,
        batch_size=512,
        lr=1e-3,
        seed=run.seed,
        callbacks=[record],
        progress=run.progress,
        description=f"{len(conditions)} networks",
    )
    final, accuracy = stack.measure(task)
    return [
        Network(condition, float(a), plane, T)
        for condition, a, plane, T in zip(stack.conditions, accuracy, planes, final, strict=True)
    ]
