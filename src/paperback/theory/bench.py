"""A report card of a network: criticality, what it learns, information plane, and inductive bias in bits.

The contenders are one architecture, the user's (``--model module:function``) or a small one of ours, under
different initial weights: as it comes (untrained), trained from its own weights, and trained from PyTorch's,
Xavier's, He's and the critical initialisation, all with the same few steps on the same data. Each is measured
by the methods of this wing: how far it starts from criticality and how fast its kernel moves, the error that
it ends with, what its last hidden layer tells of the input, and how many bits its hypothesis space lacks to
an error of a tenth of the targets' variance. What a measurement does not cover (a network with BatchNorm has
no kernel flow of this form) is left out, and the reading says why. All sentences stand in the report of the
comparison, and with the tables of the layers in each contender's ``card.txt``.

The function takes no argument and returns a new torch module from ``(rows, ...)`` to one output per class (or
one, for a number). Images are offered as ``(rows, channels, height, width)``, then flat, then without the
channel; tables as ``(rows, features)``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from safetensors.torch import save_model
from torch import Tensor, nn

from paperback.compare.bench import READING, Bench, Contender, Metric
from paperback.compare.users_code import users_function
from paperback.data import Dataset, images, read
from paperback.errors import DataError, PaperbackError
from paperback.networks import collect_activations
from paperback.study.budget import Budget, for_budget
from paperback.study.encoding import write_atomically
from paperback.study.measure import Stopwatch
from paperback.study.wording import one_sentence
from paperback.theory.adaptive_information import mutual_information
from paperback.theory.criticality import initialize_critical_, measure_flow, report
from paperback.theory.inductive_bias import Fit, InductiveBias, NetworkSpace
from paperback.training import seeded, train

TARGET = 0.1  # of the targets' variance: the error that the bits are counted to
FIT_TOL = 0.2  # training error up to which a network counts as fitting, a part of the variance too
LABEL_BINS = 10  # of a target that is a number, for I(T;Y)
WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

Make = Callable[[], nn.Module]
Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class TheoryData:
    """What the contenders are given.

    Attributes:
        dataset: where the rows come from.
        X: training inputs ``(rows, ...)``, standardised, as the network takes them.
        y: targets ``(rows, outputs)``: one-hot classes, or a standardised number.
        X_test: test inputs.
        y_test: their targets.
        labels: classes of the training rows followed by those of the test rows; of a number its decile.
        n_classes: number of classes; None where the target is a number.
        make: returns a new network with its own initial weights.
        model: what it is called.
        fixed: whether `make` returns the same weights each time, as a trained network does.
    """

    dataset: Dataset
    X: Float[Tensor, " train *event"]
    y: Float[Tensor, "train outputs"]
    X_test: Float[Tensor, " test *event"]
    y_test: Float[Tensor, "test outputs"]
    labels: Int[np.ndarray, " rows"]
    n_classes: int | None
    make: Make
    model: str
    fixed: bool


# -- data and model ------------------------------------------------------------------------------------------


def load(
    path: Path | None, target: str | None, budget: Budget, seed: int, model: str | None = None
) -> TheoryData:
    """The digits of scikit-learn or the user's data, and the user's network or a small one of ours.

    Args:
        path: a table with a target, an ``.npz`` archive or a folder of labelled images; None for the digits.
        target: column of a table to predict.
        budget: larger budgets use more rows.
        seed: of the split.
        model: "module:function"; a module in the working directory is found too.

    Returns:
        The data.

    Raises:
        DataError: naming the file or the function, and the remedy.
    """
    if path is None:
        dataset = images.digits(seed)
    else:
        dataset = read(path, target, labels="required" if target is None else "optional", seed=seed)
    if dataset.train.y is None:
        raise DataError(f"{path} has no target, which a network needs; name its column with --target.")
    n_train = for_budget(budget, smoke=120, quick=600, standard=3000)
    n_test = for_budget(budget, smoke=60, quick=300, standard=1000)
    x, x_test = _inputs(dataset, n_train, n_test)
    y, y_test, labels = _targets(dataset, n_train, n_test)
    n_classes = len(dataset.classes) or None
    make = _own(x[0].numel(), y.shape[1]) if model is None else _users_network(model)
    X, X_test = _as_taken(make, model or "the small network", (x, x_test), y.shape[1])
    return TheoryData(
        dataset, X, y, X_test, y_test, labels, n_classes, make, model or "MLP of ours", _is_fixed(make)
    )


def _inputs(dataset: Dataset, n_train: int, n_test: int) -> tuple[Tensor, Tensor]:
    """Standardised inputs: images by one mean and deviation, columns of tables each by its own."""
    train, test = dataset.train.x[:n_train], dataset.test.x[:n_test]
    if isinstance(train, Tensor):
        train, test = (part.float() if part.ndim == 4 else part[:, None].float() for part in (train, test))
        mean, std = train.mean(), train.std()
    else:
        both = pd.get_dummies(pd.concat([train, test], ignore_index=True), dtype=float).astype(float)
        values = torch.tensor(both.fillna(both.iloc[: len(train)].mean()).fillna(0.0).to_numpy()).float()
        train, test = values[: len(train)], values[len(train) :]
        mean, std = train.mean(0), train.std(0)
    std = torch.where(std > 0, std, 1.0)
    return (train - mean) / std, (test - mean) / std


def _targets(dataset: Dataset, n_train: int, n_test: int) -> tuple[Tensor, Tensor, np.ndarray]:
    """Targets of both parts as columns, and integer labels of all rows."""
    y, y_test = (np.asarray(part.y)[:n] for part, n in ((dataset.train, n_train), (dataset.test, n_test)))
    both = np.concatenate([y, y_test])
    if dataset.classes:
        one_hot = nn.functional.one_hot(torch.tensor(both).long(), len(dataset.classes)).float()
        return one_hot[: len(y)], one_hot[len(y) :], both.astype(np.int64)
    edges = np.quantile(y, np.linspace(0, 1, LABEL_BINS + 1)[1:-1])
    columns = torch.tensor((both - y.mean()) / (y.std() or 1.0)).float()[:, None]
    return columns[: len(y)], columns[len(y) :], np.searchsorted(edges, both).astype(np.int64)


def _own(n_inputs: int, n_outputs: int) -> Make:
    """A network of four hidden layers of 64 tanh units, with PyTorch's weights."""

    def make() -> nn.Module:
        layers: list[nn.Module] = [nn.Flatten()]
        for i in range(4):
            layers += [nn.Linear(64 if i else n_inputs, 64), nn.Tanh()]
        return nn.Sequential(*layers, nn.Linear(64, n_outputs))

    return make


def _users_network(model: str) -> Make:
    """The user's function, tried once."""
    make: Make = users_function(model, "without arguments, returns a torch module")
    try:
        network = make()
    except Exception as error:  # whatever the user's code does is said in a sentence
        raise DataError(
            f"{model} gave {one_sentence(error)}; it must be a function without arguments that returns a "
            "torch module."
        ) from error
    if not isinstance(network, nn.Module):
        raise DataError(f"{model} returned a {type(network).__name__}; it must return a torch module.")
    return make


@torch.no_grad()
def _as_taken(make: Make, name: str, parts: tuple[Tensor, ...], outputs: int) -> tuple[Tensor, ...]:
    """The inputs in the first layout that the network takes."""
    network, why = make().eval(), ""
    layouts: list[Callable[[Tensor], Tensor]] = [lambda x: x, lambda x: x.flatten(1), lambda x: x.squeeze(1)]
    for layout in layouts if parts[0].ndim == 4 else layouts[:1]:
        shape = tuple(layout(parts[0])[:2].shape)
        try:
            result = network(layout(parts[0])[:2])
        except Exception as error:
            why = why or f"inputs of shape {shape} give {' '.join(str(error).split())[:160]}"
            continue
        if isinstance(result, Tensor) and result.shape == (2, outputs):
            return tuple(layout(part) for part in parts)
        found = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        why = f"it gives {found} for inputs of shape {shape}, where (2, {outputs}) is needed"
    raise DataError(f"{name} does not fit the data: {why}; change the network, or give its data with --data.")


def _is_fixed(make: Make) -> bool:
    models = []
    for i in range(2):
        with seeded(i, "fixed"):
            models.append(make())
    return all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models), strict=True))


# -- contenders ----------------------------------------------------------------------------------------------


def _own_weights(data: TheoryData, budget: Budget, seed: int) -> Make:
    return data.make


def _initialised(set_weights: Callable[[nn.Module, Tensor], object]) -> Callable[..., Make]:
    """Networks whose weights are set anew by a function of the module and a batch of inputs."""

    def build(data: TheoryData, budget: Budget, seed: int) -> Make:
        def make() -> nn.Module:
            network = data.make()
            set_weights(network, data.X[:256])
            return network

        return make

    return build


def _default(network: nn.Module, x: Tensor) -> None:
    for module in network.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()


def _by_fan(set_weight: Callable[[Tensor], object]) -> Callable[[nn.Module, Tensor], None]:
    def set_weights(network: nn.Module, x: Tensor) -> None:
        _default(network, x)
        for module in network.modules():
            if isinstance(module, WEIGHTED):
                set_weight(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    return set_weights


def _he(weight: Tensor) -> None:
    nn.init.kaiming_normal_(weight, nonlinearity="relu")


def _critical(network: nn.Module, x: Tensor) -> None:
    _default(network, x)
    source = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    initialize_critical_(network, x=x, generator=source)


def _always(data: TheoryData) -> str | None:
    return None


def _has_critical_point(data: TheoryData) -> str | None:
    """Why the critical initialisation does not take this network, in its own words."""
    try:
        with seeded(0, "applies"):
            _critical(data.make(), data.X[:64])
    except PaperbackError as error:
        return str(error)
    return None


# -- measuring -----------------------------------------------------------------------------------------------


class Card:
    """What is said of one contender: sentences, and the tables below them."""

    def __init__(self) -> None:
        self.sentences: list[str] = []
        self.tables: list[str] = []

    def attempt(self, what: str, measure: Callable[[], Result]) -> Result | None:
        """A measurement, or None and a sentence why there is none."""
        try:
            return measure()
        except Exception as error:  # a user's network may do anything; its reason is the reading
            reason = " ".join(str(error).split()) or type(error).__name__
            if not isinstance(error, PaperbackError):
                reason = f"{type(error).__name__}: {reason}"
            self.sentences.append(f"{what}: not measured: {reason}")
            return None

    def write(self, out: Path) -> None:
        """The card into the folder of the artefact."""
        write_atomically(out / READING, "\n".join(self.sentences) + "\n")
        write_atomically(out / "card.txt", "\n\n".join([*self.sentences, *self.tables]) + "\n")


def evaluate(
    contender: Contender, data: TheoryData, budget: Budget, seed: int, out: Path
) -> Mapping[str, float | None]:
    """Measure a network before training, train it, measure it after, and write its card.

    Args:
        contender: which initial weights.
        data: from `load`.
        budget: how much training, and how many networks.
        seed: of weights and training.
        out: folder for the card and the network's weights (``network.safetensors``).

    Returns:
        Metric name to number, None where it was not measured; the card says why.
    """
    make, card = contender.build(data, budget, seed), Card()
    with seeded(seed, "network"):
        network = copy.deepcopy(make())  # a function may return one object each time, which stays the user's
    numbers: dict[str, float | None] = {metric.name: None for metric in BENCH.metrics}
    numbers |= card.attempt("Criticality", lambda: _criticality(card, network, data)) or {}
    numbers |= card.attempt("Kernel flow", lambda: _flow(card, make, data, budget, seed)) or {}
    is_trained = contender.name != "as-is"
    fit = _fit(budget)
    with Stopwatch() as watch:
        trained = not is_trained or card.attempt("Training", lambda: _train(network, data, fit, seed))
    numbers["fit_seconds"] = watch.seconds if is_trained else 0.0
    if trained:
        numbers |= _quality(card, network, data)
        numbers |= card.attempt("Information", lambda: _information(card, network, data)) or {}
    if is_trained:
        numbers |= card.attempt("Inductive bias", lambda: _bias(card, make, data, budget, seed)) or {}
    else:
        card.sentences.append("Inductive bias: that of the untrained weights is not asked; see the others.")
    save_model(network, str(out / "network.safetensors"))
    card.write(out)
    return numbers


def _fit(budget: Budget) -> Fit:
    return Fit(epochs=for_budget(budget, smoke=40, quick=60, standard=100), batch_size=32, lr=2e-3)


def _criticality(card: Card, network: nn.Module, data: TheoryData) -> dict[str, float | None]:
    found = report(network, data.X[:256])
    card.sentences.append(f"Criticality at the start: {found.reading} {found.fix}")
    card.tables.append(str(found))
    return {"critical_distance": found.distance if np.isfinite(found.distance) else None}


def _flow(card: Card, make: Make, data: TheoryData, budget: Budget, seed: int) -> dict[str, float | None]:
    """Mean change of log K per layer, over an ensemble of networks."""
    if data.fixed and make is data.make:
        raise DataError("the function returns the same weights each time, so that there is no ensemble.")
    n = for_budget(budget, smoke=8, quick=64, standard=200)
    flow = measure_flow(make, data.X[:4], n, seed=seed, progress=False)
    card.tables.append(flow.table().to_string(index=False))
    K = np.atleast_1d(flow.value)
    if len(K) < 2:
        raise DataError("the network has one layer of weights, so that nothing flows.")
    assert flow.interval is not None
    low, high = (float(np.atleast_1d(end)[-1]) for end in flow.interval)
    slope = float(np.log(K[-1] / K[0])) / (len(K) - 1)
    card.sentences.append(
        f"Kernel flow: over {n} draws of the weights the variance of a signal goes from {K[0]:.3g} in the "
        f"first layer to {K[-1]:.3g} [{low:.3g}, {high:.3g}] in the last, by {np.exp(slope):.3g} a layer."
    )
    return {"kernel_slope": abs(slope)}


def _train(network: nn.Module, data: TheoryData, fit: Fit, seed: int) -> bool:
    def loss(model: nn.Module, batch: tuple[Tensor, ...], _: torch.Generator) -> Tensor:
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    train(
        network, loss, (data.X, data.y), epochs=fit.epochs, batch_size=fit.batch_size, lr=fit.lr,
        schedule=fit.schedule, seed=seed, progress=False,
    )  # fmt: skip
    return True


@torch.no_grad()
def _quality(card: Card, network: nn.Module, data: TheoryData) -> dict[str, float | None]:
    """Test error as a part of the targets' variance, and accuracy."""
    network.eval()
    outputs = torch.cat([network(part) for part in data.X_test.split(256)])
    error = float((outputs - data.y_test).square().mean()) / _variance(data)
    if not np.isfinite(error):
        card.sentences.append("Test: the outputs are not finite.")
        return {}
    accuracy = None
    if data.n_classes is not None:
        accuracy = float((outputs.argmax(1) == data.y_test.argmax(1)).double().mean())
    said = "" if accuracy is None else f", and the right class for {accuracy:.1%} of {len(outputs)} rows"
    card.sentences.append(f"Test: an error of {error:.3g} of the targets' variance{said}.")
    return {"test_error": error, "accuracy": accuracy}


def _variance(data: TheoryData) -> float:
    return float(data.y.double().var(0, unbiased=False).mean())


def _information(card: Card, network: nn.Module, data: TheoryData) -> dict[str, float | None]:
    """The end of the information plane, over training and test rows, by adaptive bins."""
    X = torch.cat([data.X, data.X_test])
    weighted = [name for name, module in network.named_modules() if isinstance(module, WEIGHTED)]
    if len(weighted) < 2:
        raise DataError("the network has no hidden layer.")
    # What a layer of weights takes in is the activation of the layer before it, whatever module made it.
    hidden = collect_activations(network, X, weighted[1:], pre=True)
    measured = {
        name: mutual_information(T.flatten(1).double(), data.labels, subsets=8) for name, T in hidden.items()
    }
    lines = [f"{'into layer':<20} I(X;T) and I(T;Y), bits"]
    for name, both in measured.items():
        lines.append(f"{name:<20} {both}")
    card.tables.append("\n".join(lines))
    last = list(measured.values())[-1]
    said = f"{float(last.value):.2f} bits of the input and {float(last['I(T;Y)'].value):.2f} of the target"
    saturated = " It is saturated: nothing more than the number of rows can be told." if last.flags else ""
    target = "" if data.n_classes else f" (the target in {LABEL_BINS} bins)"
    card.sentences.append(f"Information: the last hidden layer tells {said}{target}.{saturated}")
    return {"information": float(last.value)}


def _bias(card: Card, make: Make, data: TheoryData, budget: Budget, seed: int) -> dict[str, float | None]:
    space = NetworkSpace(
        make, _fit(budget), for_budget(budget, smoke=8, quick=12, standard=24), fit_tol=FIT_TOL,
        stack_size=12, progress=False,
    )  # fmt: skip
    bias = InductiveBias(space, n_bootstrap=for_budget(budget, smoke=5, quick=50, standard=100), seed=seed)
    bits = bias.fit(data.X, data.y, data.X_test, data.y_test).bits(TARGET * _variance(data))
    card.tables.append(str(bits))
    assert bits.interval is not None
    low, high = (float(end) for end in bits.interval)
    notes = "".join(f" {note[0].upper()}{note[1:]}." for note in bits.notes)
    card.sentences.append(
        f"Inductive bias: among networks that fit the training data it takes {_few(float(bits.value))} bits "
        f"[{_few(low)}, {_few(high)}] to pick one with an error of {TARGET:.0%} of the variance.{notes}"
    )
    return {"bits": float(bits.value) if np.isfinite(bits.value) else None}


def _few(bits: float) -> str:
    """Bits for a sentence: two decimals below ten, none above."""
    return f"{bits:.2f}" if bits < 9.995 else f"{bits:.0f}"


BENCH = Bench(
    task="theory",
    metrics=(
        Metric("test_error", "test error, part of variance", better="lower", primary=True),
        Metric("accuracy", "accuracy", better="higher"),
        Metric("bits", "bias lacking at 10 % of variance", "bits", better="lower"),
        Metric("critical_distance", "distance from criticality", better="lower"),
        Metric("kernel_slope", "|change of log K| a layer", better="lower"),
        Metric("information", "I(X;T), last hidden layer", "bits", better="neither"),
        Metric("fit_seconds", "time to train", "s", better="lower", cost=True),
    ),
    contenders=(
        Contender("as-is", "as it comes, untrained by us", "baseline", _always, _own_weights),
        Contender("own-weights", "from its own weights", "baseline", _always, _own_weights),
        Contender("default", "PyTorch's default", "baseline", _always, _initialised(_default)),
        Contender("xavier", "Xavier", "baseline", _always, _initialised(_by_fan(nn.init.xavier_normal_))),
        Contender("he", "He", "baseline", _always, _initialised(_by_fan(_he))),
        Contender("effective-theory", "critical", "method", _has_critical_point, _initialised(_critical)),
    ),
    load=load,
    evaluate=evaluate,
    seconds={"smoke": 10, "quick": 60, "standard": 180},
    takes_model=True,
)  # fmt: skip
