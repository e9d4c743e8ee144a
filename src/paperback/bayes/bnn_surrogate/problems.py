"""Problems of the study: synthetic functions, draws of networks, and pest control; all are maximised.

Of the study's problems, those that need a simulator or data of their own (the Brusselator, the lunar lander,
the oil sorbent, optics, cell coverage, distillation) are left to the user's own function: a `Problem` is a
function with its bounds.

Sources: Li, Rudner and Wilson (2024), section 4; Oh et al., Combinatorial Bayesian optimization using the
graph Cartesian product (2019) for pest control.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import botorch.test_functions as botorch_problems
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from paperback.bayes.networks import RegNet
from paperback.errors import DataError
from paperback.training import generator

STATIONS = 25  # of pest control: each may spray one of four pesticides, or none


@dataclass(frozen=True)
class Problem:
    """A function to be maximised, and how much may be spent on it.

    Attributes:
        name: for tables.
        f: from points ``(n, features)`` to values ``(n,)`` or ``(n, outputs)``.
        bounds: ``(2, features)``, lower ends first.
        n_init: Sobol points first.
        iters: rounds after them.
        q: points of a round.
        discrete: feature to the values that it may take.
        ref_point: ``(outputs,)`` if there are several outputs.
    """

    name: str
    f: Callable[[NDArray[np.float64]], ArrayLike]
    bounds: Sequence[Sequence[float]]
    n_init: int = 10
    iters: int = 6
    q: int = 5
    discrete: Mapping[int, Sequence[float]] = field(default_factory=dict)
    ref_point: Sequence[float] | None = None


def problem(name: str, *, n_init: int = 10, iters: int = 6, q: int = 5) -> Problem:
    """A problem by name.

    Args:
        name: "branin", "hartmann", "ackley", "branin-currin", "dtlz1", "dtlz5" or "pest-control".
        n_init: Sobol points first.
        iters: rounds after them.
        q: points of a round.

    Returns:
        The problem.

    Raises:
        DataError: if there is none of that name.
    """
    if name == "pest-control":
        bounds = [[0.0] * STATIONS, [4.0] * STATIONS]
        choices = {station: range(5) for station in range(STATIONS)}
        return Problem(name, pest_control, bounds, n_init, iters, q, choices)
    makers: dict[str, Callable[[], Any]] = {
        "branin": lambda: botorch_problems.Branin(negate=True),
        "hartmann": lambda: botorch_problems.Hartmann(dim=6, negate=True),
        "ackley": lambda: botorch_problems.Ackley(dim=10, negate=True),
        "branin-currin": lambda: botorch_problems.BraninCurrin(negate=True),
        "dtlz1": lambda: botorch_problems.DTLZ1(dim=5, num_objectives=2, negate=True),
        "dtlz5": lambda: botorch_problems.DTLZ5(dim=5, num_objectives=2, negate=True),
    }
    if name not in makers:
        raise DataError(f"there is no problem {name!r}; there are {', '.join([*makers, 'pest-control'])}.")
    function = makers[name]()
    reference = function.ref_point.tolist() if hasattr(function, "ref_point") else None

    def f(X: NDArray[np.float64]) -> NDArray[np.float64]:
        return function(torch.as_tensor(X)).numpy()

    return Problem(name, f, function.bounds.tolist(), n_init, iters, q, ref_point=reference)


def network_draw(
    features: int,
    seed: int = 0,
    *,
    n_init: int = 20,
    iters: int = 6,
    q: int = 5,
    hidden: tuple[int, ...] = (256, 256),
) -> Problem:
    """A random function on the unit cube: a tanh network all of whose weights and biases are N(0, 1).

    Args:
        features: inputs; 200 and 400 in the study.
        seed: of the weights.
        n_init: Sobol points first.
        iters: rounds after them.
        q: points of a round.
        hidden: widths of the network.

    Returns:
        The problem.
    """
    network = RegNet(features, 1, hidden, "tanh")
    source = generator(seed, "network draw", features)
    weights = torch.randn(1, network.size, generator=source, dtype=torch.float64)

    def f(X: NDArray[np.float64]) -> NDArray[np.float64]:
        return network(weights, torch.as_tensor(X))[0, :, 0].numpy()

    bounds = [[0.0] * features, [1.0] * features]
    return Problem(f"network draw, {features}-d", f, bounds, n_init, iters, q)


def pest_control(X: ArrayLike) -> NDArray[np.float64]:
    """Minus the cost of pesticides and of the pest along 25 stations, ``(n,)``.

    From station to station the pest grows by a random part of what is left to it, or, where a pesticide is
    sprayed, shrinks by a random part that becomes smaller the oftener this pesticide was used before. The
    cost is the price of what is sprayed, with a discount for quantity, and the mean number of stations at
    which the pest is above 0.1. The random numbers are fixed, so that this is a function.

    Args:
        X: ``(n, 25)``, entries 0 (none) to 4.

    Returns:
        Values to be maximised.
    """
    kinds = np.rint(np.asarray(X, dtype=np.float64)).astype(int)
    price = np.array([0.0, 1.0, 0.8, 0.7, 0.5])  # the first entries stand for no pesticide
    largest_discount = np.array([0.0, 0.2, 0.3, 0.3, 0.0])  # if all stations get it
    weakness = np.array([1.0, 2 / 7, 3 / 7, 3 / 7, 5 / 7])  # what it kills is Beta(1, weakness)
    tolerance = np.array([0.0, 1 / 7, 2.5 / 7, 2 / 7, 0.5 / 7]) / STATIONS  # what a use adds to the weakness
    rng = np.random.default_rng(1)
    simulations = 100
    pest = np.tile(rng.beta(1, 30, simulations), (len(kinds), 1))
    spread = rng.beta(1, 17 / 3, (STATIONS, simulations))
    uniform = rng.random((STATIONS, simulations))
    above = np.zeros(len(kinds))
    for station, kind in enumerate(kinds.T):
        above += (pest > 0.1).mean(1)
        used = (kinds[:, :station] == kind[:, None]).sum(1)
        strength = weakness[kind] + tolerance[kind] * used
        kept = (1 - uniform[station]) ** (1 / strength[:, None])  # 1 - Beta(1, b), by its inverse cdf
        grown = pest + spread[station] * (1 - pest)
        pest = np.where(kind[:, None] > 0, kept * pest, grown)
    counts = (kinds[..., None] == np.arange(5)).sum(1)
    paid = (counts * price * (1 - largest_discount * counts / STATIONS)).sum(1)
    return -(paid + above)
