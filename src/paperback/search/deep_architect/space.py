"""A search space, and walks through it: ask for the open choice, choose, compile.

A walk is what searchers see of a space. It begins with the first open choice and ends in a configuration,
plain JSON from the names of choices to values, from which it can be replayed at any time and place.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from paperback.errors import DataError
from paperback.search.deep_architect.features import FeatureMap, features_of
from paperback.search.deep_architect.language import (
    ChoiceBisection,
    Decision,
    Decisions,
    Module,
    Shape,
    Specified,
    halve,
    halvings,
    kind,
)
from paperback.search.deep_architect.layers import UserHyperparams, When
from paperback.search.interface import InvalidTrial
from paperback.search.parameters import Choice, Config, Float, Integer, Parameter, check_space
from paperback.study.measure import parameters

Weight = Literal["choices", "leaves"]
MOST_REMEMBERED = 100_000  # prefixes; a space that has more forgets them and begins anew
FEW = 64  # configurations that are drawn at the start to find what does not fit


class Space:
    """All models that an expression stands for, for inputs of one shape.

    Args:
        expression: modules of the language.
        input_shape: of one input without the batch; () for a space of hyper-parameters only.
        max_params: models with more parameters are invalid; no limit if not given.

    Attributes:
        expression, input_shape, max_params: as given.
        prefixes: what walks have met, for the next ones.
        remembered: number of prefixes.

    Raises:
        DataError: if the expression contains itself, two of the user's hyper-parameters in one model share a
            name, or a layer cannot take what comes before it. All options of every choice are tried for that.
    """

    def __init__(
        self, expression: Module, input_shape: Sequence[int] = (), max_params: int | None = None
    ) -> None:
        if not isinstance(expression, Module):
            raise DataError(f"the space is {expression!r}; give a module of the language, such as Concat.")
        if any(not isinstance(size, int) or size < 1 for size in input_shape):
            raise DataError(f"input_shape is {tuple(input_shape)}; give whole numbers >= 1.")
        if max_params is not None and max_params < 1:
            raise DataError(f"max_params is {max_params}; it is at least 1.")
        self.expression = expression
        self.input_shape: Shape = tuple(input_shape)
        self.max_params = max_params
        self.prefixes = Prefix()
        self.remembered = 0
        _check_no_cycle(expression, ())
        expression.hyperparameter_names()
        self._try_every_option()

    def walk(self, *, bisect: bool = False) -> Walk:
        """A new walk, at its first open choice.

        Args:
            bisect: ask for each choice in binary ones, see `ChoiceBisection`. The configuration that comes
                out is the same.
        """
        return Walk(self, bisect)

    def sample(self, rng: np.random.Generator, weight: Weight = "choices") -> Walk:
        """A finished walk, drawn at random.

        Args:
            rng: of the draws.
            weight: "choices" makes all values of a decision equally probable, so that models in shallow parts
                of the space are drawn more often; "leaves" makes all models equally probable.
        """
        if weight not in ("choices", "leaves"):
            raise DataError(f'weight is {weight!r}; it is "choices" or "leaves".')
        return wander(self.walk(), rng, weight)

    def count(self) -> int:
        """Number of models, exact and without going through them."""
        return self.expression.count()

    def enumerate(self, limit: int = 100_000) -> Iterator[Walk]:
        """Every model, as finished walks, the first value of the last decision first.

        Args:
            limit: most models.

        Raises:
            DataError: if there are more than the limit.
        """
        if self.count() > limit:
            raise DataError(f"the space has {self.count():,} models, more than the limit of {limit:,}.")
        path: list[int] = []
        while True:
            walk, widths = self.walk(), []
            while walk.open is not None:
                widths.append(len(walk.open.values))
                if len(path) < len(widths):
                    path.append(0)
                walk.choose(path[len(widths) - 1])
            yield walk
            while path and path[-1] == widths[len(path) - 1] - 1:
                path.pop()
            if not path:
                return
            path[-1] += 1

    def replay(self, choices: Mapping[str, Any] | Sequence[tuple[str, Any]]) -> Walk:
        """The finished walk that made these choices.

        Args:
            choices: the configuration of a trial, or the key of a walk.

        Raises:
            DataError: if a choice is missing, unknown, or has a value that it cannot have.
        """
        config = dict(choices)
        walk = self.walk()
        while walk.open is not None:
            walk.choose(walk.toward(config))
        unknown = [name for name in config if name not in walk.config]
        if unknown:
            raise DataError(
                f"the configuration sets {unknown[0]!r}, which this model does not ask for "
                f"({', '.join(walk.config)})."
            )
        return walk

    def bisected(self) -> Space:
        """The same models by binary choices only."""
        return Space(ChoiceBisection(self.expression), self.input_shape, self.max_params)

    def to_dict(self) -> dict[str, Parameter]:
        """A flat space as the other searches take it, each name with its list of values.

        Raises:
            DataError: if the space is not flat.
        """
        flat = self.expression
        if not isinstance(flat, UserHyperparams) or flat.conditions:
            raise DataError("only a space of one UserHyperparams without conditions is flat.")
        return {name: Choice(domain, ordered=is_ordered(domain)) for name, domain in flat.domains.items()}

    def __getstate__(self) -> dict[str, Any]:
        """What a process that evaluates models is sent: not what was remembered."""
        return self.__dict__ | {"prefixes": Prefix(), "remembered": 0}

    def _try_every_option(self) -> None:
        """Walk until every option of every decision met has been taken, always the one taken least often."""
        taken: dict[tuple[str, int], int] = {}
        options: set[tuple[str, int]] = set()
        for _ in range(FEW):
            walk = self.walk()
            names = set()
            while walk.open is not None:
                name, values, _ = walk.open
                if name in names:
                    raise DataError(f"two decisions of one model are called {name!r}; rename one.")
                names.add(name)
                choices = [(name, i) for i in range(len(values))]
                options.update(choices)
                choice = min(choices, key=lambda option: taken.get(option, 0))
                taken[choice] = taken.get(choice, 0) + 1
                walk.choose(choice[1])
            if len(taken) == len(options):
                return

    def __repr__(self) -> str:
        return f"Space({self.expression!r}, input_shape={self.input_shape}, max_params={self.max_params})"


class Prefix:
    """What is asked after some choices. Spaces remember it, since searchers pass the same places often.

    Attributes:
        known: whether `decision` is known.
        decision: the next one, None if there is none.
        after: the prefixes that are longer by one choice, by its index.
    """

    __slots__ = ("after", "decision", "known")

    def __init__(self) -> None:
        self.known = False
        self.decision: Decision | None = None
        self.after: dict[int, Prefix] = {}


class Walk:
    """A way through a space, see `Space.walk`.

    Attributes:
        space: that is walked through.
        open: the decision to make next, None when all are made.
        config: what was chosen until now: names and values.
        indices: the same as places in the lists of values.
    """

    def __init__(self, space: Space, bisect: bool = False) -> None:
        self.space = space
        self.open: Decision | None = None
        self.config: Config = {}
        self.indices: list[int] = []
        self._bisect = bisect
        self._steps: Decisions | None = None
        self._sent = 0  # how many of the indices the expression has been told
        self._specified: Specified | None = None
        if space.remembered > MOST_REMEMBERED:
            space.prefixes, space.remembered = Prefix(), 0
        self._at = space.prefixes
        self._ask()

    @property
    def done(self) -> bool:
        """Whether every decision is made."""
        return self.open is None

    def choose(self, index: int) -> None:
        """Make the open decision.

        Args:
            index: place of the value in the list.

        Raises:
            DataError: if nothing is open, or there is no such value.
        """
        if self.open is None:
            raise DataError("every choice of this walk is made; begin a new one.")
        if not 0 <= index < len(self.open.values):
            raise DataError(
                f"the index {index} is out of range: {self.open.name!r} has {len(self.open.values)} values."
            )
        if self._bisect:
            self._answers.append(int(index))
            try:
                self.open = self._halving.send(index)
                return
            except StopIteration as end:
                index = end.value
        self.config[self._plain.name] = self._plain.values[index]
        self.indices.append(int(index))
        self._at = self._at.after.setdefault(index, Prefix())
        self._ask()

    def toward(self, config: Mapping[str, Any]) -> int:
        """The index at the open decision that leads to a configuration.

        Raises:
            DataError: if the configuration does not say, or what it says is no value of the decision.
        """
        name, values, _ = self._plain
        if name not in config:
            raise DataError(f"the configuration does not set {name!r}; it may be {list(values)}.")
        try:
            index = values.index(config[name])
        except ValueError:
            raise DataError(
                f"the configuration sets {name!r} to {config[name]!r}; it may be {list(values)}."
            ) from None
        return halvings(len(values), index)[len(self._answers)] if self._bisect else index

    @property
    def key(self) -> tuple[tuple[str, Any], ...]:
        """The choices made, as something hashable that `Space.replay` takes."""
        return tuple(self.config.items())

    @property
    def specified(self) -> Specified:
        """What was chosen, in full.

        Raises:
            DataError: if a choice is still open.
        """
        if self.open is not None:
            raise DataError(f"the choice {self.open.name!r} is still open; make it first.")
        self._run()
        assert self._specified is not None
        return self._specified

    @property
    def modules(self) -> tuple[tuple[Any, ...], ...]:
        """The model as a flat sequence of (name, values...)."""
        return self.specified.modules

    @property
    def out_shape(self) -> Shape:
        """Shape of one output."""
        return self.specified.shape

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """What `UserHyperparams` were given, those with a single value too."""
        return dict(self.specified.hyperparameters)

    def compile(self) -> nn.Module:
        """The model, with weights from torch's global random numbers.

        Raises:
            InvalidTrial: if it cannot be built or has too many parameters.
            DataError: if a choice is still open.
        """
        made = self.specified
        if made.problem:
            raise InvalidTrial(made.problem)
        if self.space.max_params is not None:
            with torch.device("meta"):
                size = parameters(made.build())
            if size > self.space.max_params:
                raise InvalidTrial(f"{size:,} parameters, more than max_params = {self.space.max_params:,}.")
        return made.build()

    def features(self, features: FeatureMap = "choices") -> dict[Any, float]:
        """What a surrogate sees of this walk, see `paperback.search.deep_architect.features`."""
        return features_of(self, features)

    def _ask(self) -> None:
        """Open the next decision, as remembered or from the expression itself."""
        if not self._at.known:
            self._at.decision, self._at.known = self._run(), True
            self.space.remembered += 1
        self.open = self._at.decision
        if self.open is None:
            return
        self._plain = self.open
        if self._bisect:
            self._answers: list[int] = []
            self._halving = halve(self._plain)
            self.open = next(self._halving)

    def _run(self) -> Decision | None:
        """Tell the expression what was chosen since the last time; the next decision, None at the end."""
        decision = None
        try:
            if self._steps is None:
                self._steps = self.space.expression.specify(
                    self.space.input_shape, kind(self.space.expression)
                )
                decision = next(self._steps)
            while self._sent < len(self.indices):
                self._sent += 1
                decision = self._steps.send(self.indices[self._sent - 1])
        except StopIteration as end:
            self._specified = end.value
            return None
        return decision


def wander(walk: Walk, rng: np.random.Generator, weight: Weight = "choices") -> Walk:
    """Make what is left of a walk at random; see `Space.sample`."""
    while walk.open is not None:
        _, values, leaves = walk.open
        if weight == "choices":
            walk.choose(int(rng.random() * len(values)))
        else:
            sums = list(accumulate(leaves))  # whole numbers of any size
            walk.choose(bisect.bisect_right(sums, _below(sums[-1], rng)))
    return walk


def from_dict(space: Mapping[str, Parameter | Sequence[Any] | When], points: int = 8) -> Space:
    """A dictionary of hyper-parameters as a `Space`, for the searches that walk.

    Args:
        space: names and lists of values, parameters of `paperback.search`, or `When`.
        points: a `Float`, and an `Integer` with more values, becomes so many values: the quantiles
            (i + 1/2) / points of its prior.

    Raises:
        DataError: if the dictionary is empty or something in it is no parameter.
    """
    if points < 1:
        raise DataError(f"points is {points}; it is at least 1.")
    if not isinstance(space, Mapping) or not space:
        raise DataError(f"the search space is {space!r}; give a dictionary with at least one parameter.")
    flat = {name: value for name, value in space.items() if isinstance(value, Float | Integer | Choice)}
    if flat:
        check_space(flat)
    domains: dict[str, Any] = {
        name: _grid(value, points) if name in flat else value for name, value in space.items()
    }
    return Space(UserHyperparams(**domains))


def is_ordered(values: Sequence[Any]) -> bool:
    """Whether these are growing or falling numbers, so that neighbours are alike."""
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in values):
        return False
    steps = [b - a for a, b in pairwise(values)]
    return all(step > 0 for step in steps) or all(step < 0 for step in steps)


def _grid(parameter: Any, points: int) -> list[Any]:
    if isinstance(parameter, Choice):
        return list(parameter.values)
    if isinstance(parameter, Integer) and parameter.high - parameter.low < points:
        return list(range(parameter.low, parameter.high + 1))
    quantiles = (np.arange(points) + 0.5) / points
    # An integer's prior is uniform on bins of width 1 about it.
    margin = 0.5 if isinstance(parameter, Integer) else 0.0
    low, high = parameter.low - margin, parameter.high + margin
    values = low * (high / low) ** quantiles if parameter.log else low + (high - low) * quantiles
    return list(dict.fromkeys(parameter.clip(float(value)) for value in values))


def _below(bound: int, rng: np.random.Generator) -> int:
    """A uniform whole number in 0 .. bound - 1, also beyond 64 bits."""
    if bound <= 2**62:
        return int(rng.integers(bound))
    # 64 bits more than needed: the remainder is uniform to one part in 2^64.
    return int.from_bytes(rng.bytes(bound.bit_length() // 8 + 9), "big") % bound


def _check_no_cycle(module: Module, above: tuple[Module, ...]) -> None:
    if any(module is other for other in above):
        raise DataError(f"a {kind(module)} contains itself; use Repeat for what stands in series.")
    for child in module.children:
        _check_no_cycle(child, (*above, module))
