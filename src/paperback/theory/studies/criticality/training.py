"""Training deep networks from five initialisations, all of one architecture side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

from paperback.data import images
from paperback.study import Run
from paperback.theory.criticality import Criticality, initialize_critical_
from paperback.theory.studies.criticality.networks import ACTIVATIONS, multilayer
from paperback.training import derive, seeded, train

INITIALIZATIONS = ("default", "Xavier", "He", "LSUV", "critical")
LEARNING_RATES = (0.01, 0.001)
CLASSES = 10


@dataclass
class Pixels:
    """Standardised images as rows, those of several seeds side by side."""

    train_x: Float[Tensor, "rows seeds 784"]
    train_y: Int[Tensor, "rows seeds"]
    val_x: Float[Tensor, "rows seeds 784"]
    val_y: Int[Tensor, "rows seeds"]
    test_x: Float[Tensor, "rows seeds 784"]
    test_y: Int[Tensor, "rows seeds"]


class Stack(nn.Module):
    """Networks of one architecture that are trained side by side, each with its own data.

    Args:
        models: equal but for their weights; the number of seeds divides their number, and the seed runs
            fastest.
        n_seeds: data sets.
    """

    def __init__(self, models: Sequence[nn.Module], n_seeds: int) -> None:
        super().__init__()
        parameters, _ = stack_module_state(list(models))
        self.template = [models[0]]  # in a list, so that its weights are not trained
        self.names = list(parameters)
        self.stacked = nn.ParameterList(parameters.values())
        self.copies = len(models) // n_seeds

    def forward(self, x: Float[Tensor, "batch seeds 784"]) -> Float[Tensor, "networks batch classes"]:
        """Logits of every network on its own rows."""
        inputs = x.transpose(0, 1).repeat(self.copies, 1, 1)

        def one(parameters: dict[str, Tensor], rows: Tensor) -> Tensor:
            return functional_call(self.template[0], parameters, (rows,))

        return torch.vmap(one)(dict(zip(self.names, self.stacked, strict=True)), inputs)


class StackedSGD(torch.optim.Optimizer):
    """SGD with momentum in which every network has its own learning rate and its own clipped gradient.

    A network whose gradient is not finite stays where it is.

    Args:
        parameters: each stacked over networks.
        lr: ``(networks,)``.
        momentum: in [0, 1).
        clip_norm: of the gradient of one network.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: Tensor, momentum: float = 0.9, clip_norm: float = 1.0
    ) -> None:
        super().__init__(parameters, {"lr": 1.0, "momentum": momentum, "clip_norm": clip_norm})
        self.rates = lr

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of every network."""
        for group in self.param_groups:
            given = [p for p in group["params"] if p.grad is not None]
            norm = torch.stack([p.grad.flatten(1).norm(dim=1) for p in given]).norm(dim=0)
            factor = group["clip_norm"] / norm.clamp_min(group["clip_norm"])
            stuck = ~norm.isfinite()
            for p in given:
                shape = (-1, *[1] * (p.ndim - 1))
                if stuck.any():
                    p.grad[stuck] = 0.0
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                buffer.mul_(group["momentum"]).addcmul_(p.grad, factor.nan_to_num(0.0).view(shape))
                p.addcmul_(buffer, self.rates.view(shape), value=-group["lr"])


def training_of_deep_networks(run: Run) -> dict[tuple[str, int], dict[str, list[float]]]:
    """Test accuracy by activation and depth, by initialisation, one number per seed."""
    data = _pixels(run)
    width = run.size(smoke=16, standard=128)
    depths: tuple[int, ...] = run.size(smoke=(4,), quick=(40,), standard=(10, 40))
    result, rows = {}, []
    cases = [(name, depth) for name in ACTIVATIONS for depth in depths]
    for name, depth in run.track(cases, "training"):
        found = _train_all(run, data, ACTIVATIONS[name], width, depth, INITIALIZATIONS)
        result[name, depth] = {key: accuracy for key, (accuracy, _) in found.items()}
        rows += [
            {
                "activation": name, "depth": depth, "initialisation": key, "test accuracy": np.mean(accuracy),
                "lowest": min(accuracy), "highest": max(accuracy), "learning rate": rate,
            }
            for key, (accuracy, rate) in found.items()
        ]  # fmt: skip
    run.table(
        "training",
        rows,
        f"Width {width}, three epochs; the learning rate is the better one on the validation part.",
    )
    run.note(
        "LSUV scales every layer to variance 1 on data. For ReLU, where every size of signal is critical, "
        "that is criticality without its fluctuations, and a strong rival. GELU and SWISH are not "
        "critical at variance 1, nor tanh with any size held fixed. At depth 10 He and LSUV are rivals "
        "for every activation and beat the critical initialisation for SWISH; nothing is claimed there."
    )
    _claim_training(run, {name: result[name, max(depths)] for name in ACTIVATIONS}, max(depths))
    if run.budget in ("standard", "full"):
        _report_depths(run, data, width)
    return result


def _pixels(run: Run) -> Pixels:
    n = run.size(smoke=200, standard=4000, full=9000)
    sets = [images.fashion_mnist(n, seed) for seed in run.seeds]
    parts = {}
    for part in ("train", "val", "test"):
        x = torch.stack([getattr(s, part).x.flatten(1).float() for s in sets], 1)
        parts[f"{part}_x"], parts[f"{part}_y"] = x, torch.stack([getattr(s, part).y for s in sets], 1)
    mean, deviation = parts["train_x"].mean(), parts["train_x"].std()
    for part in ("train_x", "val_x", "test_x"):
        parts[part] = (parts[part] - mean) / deviation
    return Pixels(**parts)


def _initialized(name: str, build: Callable[[], nn.Sequential], x: Tensor, seed: int) -> nn.Sequential:
    """A network with the weights of one of the rules, all at the best of their game."""
    with seeded(seed, "weights", name):
        model = build()
        linear = [layer for layer in model if isinstance(layer, nn.Linear)]
        if name == "critical":
            source = torch.Generator().manual_seed(derive(seed, "critical weights"))
            initialize_critical_(model, x=x, generator=source)
        elif name == "LSUV":
            _lsuv_(model, x)
        elif name != "default":
            for layer in linear:
                rule = nn.init.xavier_normal_ if name == "Xavier" else nn.init.kaiming_normal_
                rule(layer.weight)
                nn.init.zeros_(layer.bias)
    return model


@torch.no_grad()
def _lsuv_(model: nn.Sequential, x: Tensor) -> None:
    """Layer-sequential unit variance: orthogonal weights, then each layer scaled by what it gives on data."""
    z = x
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.orthogonal_(layer.weight)
            nn.init.zeros_(layer.bias)
            layer.weight /= layer(z).std()
        z = layer(z)


def _train_all(
    run: Run,
    data: Pixels,
    activation: type[nn.Module],
    width: int,
    depth: int,
    names: Sequence[str],
) -> dict[str, tuple[list[float], float]]:
    """Train every initialisation with both learning rates and all seeds at once.

    Returns:
        Test accuracy per seed and the learning rate that was better on the validation part.
    """

    def build() -> nn.Sequential:
        return multilayer(activation, data.train_x.shape[2], width, depth, CLASSES)

    seeds = len(run.seeds)
    models, rates = [], []
    for rate in LEARNING_RATES:
        for name in names:
            for i, seed in enumerate(run.seeds):
                models.append(_initialized(name, build, data.train_x[:512, i], seed))
                rates.append(rate)
    stack, lr = Stack(models, seeds), torch.tensor(rates)

    def loss(model: nn.Module, batch: tuple[Tensor, ...], _: torch.Generator) -> Tensor:
        x, y = batch
        logits = model(x).transpose(1, 2)
        labels = y.T.repeat(stack.copies, 1)
        each = F.cross_entropy(logits, labels, reduction="none").mean(1)
        return each.where(each.isfinite(), 0.0).sum()

    train(
        stack, loss, (data.train_x, data.train_y), epochs=run.size(smoke=1, standard=3, full=10),
        batch_size=64, lr=1.0, optimizer=lambda parameters: StackedSGD(parameters, lr), seed=run.seed,
        progress=False, description=f"depth {depth}",
    )  # fmt: skip
    shape = (len(LEARNING_RATES), len(names), seeds)
    validation = _accuracy(stack, data.val_x, data.val_y).view(shape)
    test = _accuracy(stack, data.test_x, data.test_y).view(shape)
    best = validation.mean(2).argmax(0)
    return {name: (test[best[i], i].tolist(), LEARNING_RATES[int(best[i])]) for i, name in enumerate(names)}


@torch.no_grad()
def _accuracy(stack: Stack, x: Tensor, y: Tensor) -> Tensor:
    correct = [
        (stack(rows).argmax(2) == labels.T.repeat(stack.copies, 1)).float().sum(1)
        for rows, labels in zip(x.split(250), y.split(250), strict=True)
    ]
    return torch.stack(correct).sum(0) / len(x)


def _claim_training(run: Run, found: dict[str, dict[str, list[float]]], depth: int) -> None:
    for name, accuracy in found.items():
        run.claim(
            f"{name} networks of depth {depth} train from the critical initialisation",
            paper="criticality removes exploding and vanishing signals for any activation",
            measured=accuracy["critical"], at_least=0.55, unit="test accuracy",
        )  # fmt: skip
        run.claim(
            f"{name} networks of depth {depth} train better from it than from PyTorch's default",
            paper="not in the book", measured=accuracy["critical"], baseline=accuracy["default"],
            at_least=0.3, unit="test accuracy",
        )  # fmt: skip
    for name in ("GELU", "SWISH"):
        run.claim(
            f"{name} networks of depth {depth} train better from it than from He's initialisation",
            paper="GELU and SWISH need C_b > 0 and K* > 0", measured=found[name]["critical"],
            baseline=found[name]["He"], at_least=0.15, unit="test accuracy",
            note="At depth 10 nothing is claimed: there He keeps up. For ReLU, He is critical.",
        )  # fmt: skip


def _report_depths(run: Run, data: Pixels, width: int) -> None:
    """Test accuracy against depth over width: the book's r* is an optimum of information, not of this."""
    theory, rows = Criticality(nn.ReLU()), []
    for depth in run.track((2, 4, 8, 16, 32), "depths"):
        accuracy, rate = _train_all(run, data, nn.ReLU, width, depth, ("critical",))["critical"]
        rows.append(
            {
                "depth": depth, "depth / width": depth / width, "test accuracy": np.mean(accuracy),
                "lowest": min(accuracy), "highest": max(accuracy), "learning rate": rate,
                "regime": theory.regime(depth, width, CLASSES),
            }
        )  # fmt: skip
    run.table(
        "depths", rows,
        f"Critical ReLU networks of width {width}, three epochs. The book's optimal aspect ratio is "
        f"{theory.aspect_ratio(CLASSES):.3f}, a depth of {theory.optimal_depth(width, CLASSES):.1f}; nothing "
        "is claimed about it.",
    )  # fmt: skip
