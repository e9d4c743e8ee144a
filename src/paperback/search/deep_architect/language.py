"""The language of search spaces: modules that ask for their choices one by one, and how they compose.

A module is told the shape of its input and yields its open decisions in order. When the last one is made it
returns what was specified: the shape of the output, how to build the torch module, and a flat description. A
composite runs its parts in the same way, so a part begins only when what stands before it is specified: later
decisions depend on earlier ones, and shapes are always known (Negrinho & Gordon 2017, section 4).

In the paper a module is a state machine with ``initialize``, ``choices``, ``choose`` and ``is_specified``.
Here these states are a generator's: calling `Module.specify` initialises, ``yield`` is an open choice,
``send`` chooses, and ``return`` is "specified".
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperback.errors import DataError

Shape = tuple[int, ...]


class Decision(NamedTuple):
    """An open choice.

    Attributes:
        name: unlike that of every other decision of a walk; "scope/parameter".
        values: two or more, plain JSON.
        leaves: for each value, how many ways there are to go on inside the module that asks. What lies
            outside does not depend on it.
    """

    name: str
    values: tuple[Any, ...]
    leaves: tuple[int, ...]


class Specified(NamedTuple):
    """What a module became once all its decisions were made.

    Attributes:
        shape: of one output, without the batch.
        build: makes the torch module, with new weights.
        modules: the model as a flat sequence of (name, values...).
        hyperparameters: from `UserHyperparams`, by name.
        problem: why it cannot be built, empty if it can.
    """

    shape: Shape
    build: Callable[[], nn.Module]
    modules: tuple[tuple[Any, ...], ...] = ()
    hyperparameters: Mapping[str, Any] = {}
    problem: str = ""


Decisions = Generator[Decision, int, Specified]


class Module(ABC):
    """A search space or a part of one.

    A module is never changed by a walk, so it may stand in several places.
    """

    @property
    def children(self) -> tuple[Module, ...]:
        """The modules that it is composed of."""
        return ()

    @abstractmethod
    def specify(self, shape: Shape, scope: str) -> Decisions:
        """Ask for each open choice in turn, and return what came of them.

        Args:
            shape: of one input, without the batch.
            scope: prefix for the names of decisions.
        """

    @abstractmethod
    def count(self) -> int:
        """Number of ways in which the decisions can be made."""

    def hyperparameter_names(self) -> frozenset[str]:
        """Names of the user's hyper-parameters inside.

        Raises:
            DataError: if two that may occur in one model have the same name.
        """
        return _disjoint(self.children)


def decide(
    name: str, values: Sequence[Any], leaves: Sequence[int] | None = None
) -> Generator[Decision, int, int]:
    """Ask for the index of one of several values; a single one is chosen at once."""
    if len(values) == 1:
        return 0
    ways = (1,) * len(values) if leaves is None else tuple(leaves)
    index = yield Decision(name, tuple(values), ways)
    return index


def halve(decision: Decision) -> Generator[Decision, int, int]:
    """Ask for one of k ordered values in at most ceil(log2 k) binary decisions: the left half or the right.

    The halves of low .. high are low .. floor((low + high) / 2) and the rest (the paper's bisection).
    """
    low, high, bit = 0, len(decision.values) - 1, 0
    while low < high:
        middle = (low + high) // 2
        halves = ((low, middle), (middle + 1, high))
        right = yield Decision(
            f"{decision.name}/bit{bit}",
            tuple(_span(decision.values, first, last) for first, last in halves),
            tuple(sum(decision.leaves[first : last + 1]) for first, last in halves),
        )
        low, high = halves[right]
        bit += 1
    return low


def halvings(k: int, index: int) -> list[int]:
    """The answers to `halve` that lead to an index of k: 0 is the left half, 1 the right."""
    low, high, answers = 0, k - 1, []
    while low < high:
        middle = (low + high) // 2
        answers.append(int(index > middle))
        low, high = (low, middle) if index <= middle else (middle + 1, high)
    return answers


class Concat(Module):
    """Modules one after the other.

    Args:
        modules: at least one.

    Raises:
        DataError: if there are none, or one is no module.
    """

    def __init__(self, modules: Sequence[Module]) -> None:
        self.modules = check_modules(modules, "Concat")

    @property
    def children(self) -> tuple[Module, ...]:
        """The modules."""
        return self.modules

    def specify(self, shape: Shape, scope: str) -> Decisions:
        """As every module."""
        parts = []
        for i, module in enumerate(self.modules):
            parts.append((yield from module.specify(shape, f"{scope}/{i}:{kind(module)}")))
            shape = parts[-1].shape
        return in_series(parts)

    def count(self) -> int:
        """As every module."""
        return math.prod(module.count() for module in self.modules)

    def __repr__(self) -> str:
        return f"Concat([{', '.join(map(repr, self.modules))}])"


class Or(Module):
    """One of several modules; only the chosen one is entered.

    Args:
        modules: at least one.
        names: of the branches, as decisions show them; their places and kinds if not given.

    Raises:
        DataError: if there are no branches, or names do not fit them.
    """

    def __init__(self, modules: Sequence[Module], names: Sequence[str] | None = None) -> None:
        self.modules = check_modules(modules, "Or")
        default = [f"{i}:{kind(module)}" for i, module in enumerate(self.modules)]
        self.names = tuple(default if names is None else names)
        if len(set(self.names)) != len(self.modules):
            raise DataError(
                f"Or has {len(self.modules)} branches and the names {list(self.names)}; "
                "give each branch a name of its own."
            )

    @property
    def children(self) -> tuple[Module, ...]:
        """The branches."""
        return self.modules

    def specify(self, shape: Shape, scope: str) -> Decisions:
        """As every module."""
        leaves = [module.count() for module in self.modules]
        branch = yield from decide(f"{scope}/branch", self.names, leaves)
        return (yield from self.modules[branch].specify(shape, f"{scope}/{self.names[branch]}"))

    def count(self) -> int:
        """As every module."""
        return sum(module.count() for module in self.modules)

    def hyperparameter_names(self) -> frozenset[str]:
        """Those of all branches; two branches may use one name, as they never meet."""
        return frozenset().union(*(module.hyperparameter_names() for module in self.modules))

    def __repr__(self) -> str:
        return f"Or([{', '.join(map(repr, self.modules))}], names={list(self.names)})"


class Repeat(Module):
    """One or more copies of a module in series, each with choices of its own.

    Args:
        module: what is repeated.
        copies: how many there may be, each at least 1.

    Raises:
        DataError: if copies is empty or has a number below 1.
    """

    def __init__(self, module: Module, copies: Sequence[int]) -> None:
        self.module = check_modules([module], type(self).__name__)[0]
        self.copies = check_domain(copies, f"copies of {type(self).__name__}")
        if any(not isinstance(k, int) or k < 1 for k in self.copies):
            raise DataError(
                f"{type(self).__name__} may have {list(self.copies)} copies; give whole numbers >= 1."
            )

    @property
    def children(self) -> tuple[Module, ...]:
        """The repeated module."""
        return (self.module,)

    def specify(self, shape: Shape, scope: str) -> Decisions:
        """As every module."""
        ways = self.module.count()
        k = self.copies[(yield from decide(f"{scope}/copies", self.copies, [ways**k for k in self.copies]))]
        parts = []
        for copy in range(k):
            parts.append((yield from self.module.specify(shape, f"{scope}/{copy}:{kind(self.module)}")))
            shape = parts[-1].shape
        return in_series(parts)

    def count(self) -> int:
        """As every module."""
        return sum(self.module.count() ** k for k in self.copies)

    def hyperparameter_names(self) -> frozenset[str]:
        """Those of the module, which then may have no second copy."""
        names = self.module.hyperparameter_names()
        if names and max(self.copies) > 1:
            raise DataError(
                f"{', '.join(sorted(names))} stand inside a Repeat and would occur once in every copy; "
                "take UserHyperparams out of it."
            )
        return names

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.module!r}, {list(self.copies)})"


class RepeatTied(Repeat):
    """One or more copies of a module in series that share their choices, but not their weights.

    The choices of the first copy are replayed in the others.
    """

    def specify(self, shape: Shape, scope: str) -> Decisions:
        """As every module."""
        ways = self.module.count()
        k = self.copies[(yield from decide(f"{scope}/copies", self.copies, [ways] * len(self.copies)))]
        inside = f"{scope}/tied:{kind(self.module)}"
        made: list[int] = []
        parts = [(yield from _recorded(self.module.specify(shape, inside), made))]
        for _ in range(1, k):
            parts.append(_replayed(self.module.specify(parts[-1].shape, inside), made))
        return in_series(parts)

    def count(self) -> int:
        """As every module."""
        return len(self.copies) * self.module.count()

    def hyperparameter_names(self) -> frozenset[str]:
        """Those of the module: all copies have the same values."""
        return self.module.hyperparameter_names()


class ChoiceBisection(Module):
    """A module whose k-way choices are made in ceil(log2 k) binary ones, over the order of the values.

    A tree search can then share what it learns between neighbouring values.

    Args:
        module: any, also a composite.
    """

    def __init__(self, module: Module) -> None:
        self.module = check_modules([module], "ChoiceBisection")[0]

    @property
    def children(self) -> tuple[Module, ...]:
        """The module."""
        return (self.module,)

    def specify(self, shape: Shape, scope: str) -> Decisions:
        """As every module; the name of each decision is the module's with ``/bit0``, ``/bit1``, ..."""
        inner = self.module.specify(shape, scope)
        try:
            decision = next(inner)
            while True:
                decision = inner.send((yield from halve(decision)))
        except StopIteration as end:
            return end.value

    def count(self) -> int:
        """As every module."""
        return self.module.count()

    def __repr__(self) -> str:
        return f"ChoiceBisection({self.module!r})"


class Split(Module):
    """Several modules on the same input, their outputs joined.

    Args:
        modules: the branches, at least one.
        join: "sum" adds the outputs: equal ranks are padded with zeros, on the far side of every axis, to the
            largest size; if ranks differ all are flattened first. "concatenate" puts them one after the other
            along the first axis (channels), the other axes padded likewise.

    Raises:
        DataError: if there are no branches, or join is neither.
    """

    def __init__(self, modules: Sequence[Module], join: str = "sum") -> None:
        self.modules = check_modules(modules, type(self).__name__)
        if join not in ("sum", "concatenate"):
            raise DataError(f'join is {join!r}; it is "sum" or "concatenate".')
        self.join = join

    @property
    def children(self) -> tuple[Module, ...]:
        """The branches."""
        return self.modules

    def specify(self, shape: Shape, scope: str) -> Decisions:
        """As every module."""
        parts = []
        for i, module in enumerate(self.modules):
            parts.append((yield from module.specify(shape, f"{scope}/{i}:{kind(module)}")))
        whole = in_series(parts)
        joined = _joined_shape([part.shape for part in parts], self.join)
        mark = (f"{kind(self)}:{self.join}", len(parts))
        return whole._replace(
            shape=joined,
            build=lambda: _Joined([part.build() for part in parts], joined, self.join),
            modules=(mark, *whole.modules),
        )

    def count(self) -> int:
        """As every module."""
        return math.prod(module.count() for module in self.modules)

    def __repr__(self) -> str:
        return f"{kind(self)}([{', '.join(map(repr, self.modules))}], join={self.join!r})"


class Residual(Split):
    """A module's output plus its input, see `Split` for unequal shapes.

    Args:
        module: any.
    """

    def __init__(self, module: Module) -> None:
        super().__init__([Empty(), module])

    def __repr__(self) -> str:
        return f"Residual({self.modules[1]!r})"


class Empty(Module):
    """The identity."""

    def specify(self, shape: Shape, scope: str) -> Decisions:
        """As every module."""
        return Specified(shape, nn.Identity, (("Empty",),))
        yield  # makes this a generator that has nothing to ask

    def count(self) -> int:
        """As every module."""
        return 1

    def __repr__(self) -> str:
        return "Empty()"


def Optional(module: Module) -> Or:
    """The module or nothing: ``Or([Empty(), module])``."""
    return Or([Empty(), module], names=["without", "with"])


def MaybeSwap(first: Module, second: Module) -> Or:
    """Two modules in this order or the other: ``Or([Concat([a, b]), Concat([b, a])])``."""
    return Or([Concat([first, second]), Concat([second, first])], names=["as given", "swapped"])


def check_modules(modules: Sequence[Module], owner: str) -> tuple[Module, ...]:
    """The parts of a composite as a tuple.

    Raises:
        DataError: if there are none, or one is no module.
    """
    parts = tuple(modules) if isinstance(modules, Sequence) else (modules,)
    if not parts:
        raise DataError(f"{owner} has no modules; give at least one.")
    for i, part in enumerate(parts):
        if not isinstance(part, Module):
            raise DataError(f"module {i} of {owner} is {part!r}; wrap a torch factory in Basic(...).")
    return parts


def check_domain(values: Sequence[Any], what: str) -> tuple[Any, ...]:
    """The values of a parameter as a tuple.

    Raises:
        DataError: if there are none, one is not plain JSON, or two are equal.
    """
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise DataError(f"{what}: {values!r} is no list of values; give a list, also of a single value.")
    domain = tuple(values)
    if not domain:
        raise DataError(f"{what}: the list of values is empty; give at least one.")
    for i, value in enumerate(domain):
        plain = isinstance(value, str | int | float | None)
        if not plain or (isinstance(value, float) and not math.isfinite(value)):
            raise DataError(f"{what}: {value!r} is not text, a finite number, a boolean or None.")
        if value in domain[:i]:
            raise DataError(f"{what}: the value {value!r} stands twice; values must differ.")
    return domain


def kind(module: Module) -> str:
    """What a module is called in scopes and descriptions."""
    return getattr(module, "name", type(module).__name__)


def in_series(parts: Sequence[Specified]) -> Specified:
    """Specified modules one after the other, as one."""
    hyperparameters: dict[str, Any] = {}
    for part in parts:
        hyperparameters.update(part.hyperparameters)
    return Specified(
        parts[-1].shape,
        lambda: nn.Sequential(*(part.build() for part in parts)),
        tuple(module for part in parts for module in part.modules),
        hyperparameters,
        next((part.problem for part in parts if part.problem), ""),
    )


class _Joined(nn.Module):
    """Branches on one input; see `Split`."""

    def __init__(self, branches: Sequence[nn.Module], shape: Shape, join: str) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.shape = shape
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        """Join what the branches give."""
        outputs = [branch(x) for branch in self.branches]
        if len({output.ndim for output in outputs}) > 1:
            outputs = [output.flatten(1) for output in outputs]
        if self.join == "concatenate":
            return torch.cat([pad_to(y, (y.shape[1], *self.shape[1:])) for y in outputs], dim=1)
        total = pad_to(outputs[0], self.shape)
        for output in outputs[1:]:
            total = total + pad_to(output, self.shape)
        return total


def pad_to(x: Tensor, shape: Shape) -> Tensor:
    """Zeros after the last entry of every axis but the batch, until the shape is reached."""
    missing = [wanted - size for wanted, size in zip(shape, x.shape[1:], strict=True)]
    if not any(missing):
        return x
    return F.pad(x, [amount for axis in reversed(missing) for amount in (0, axis)])


def _joined_shape(shapes: Sequence[Shape], join: str) -> Shape:
    if len({len(shape) for shape in shapes}) > 1:
        shapes = [(math.prod(shape),) for shape in shapes]
    largest = tuple(max(sizes) for sizes in zip(*shapes, strict=True))
    if join == "sum" or not largest:
        return largest
    return (sum(shape[0] for shape in shapes), *largest[1:])


def _span(values: Sequence[Any], first: int, last: int) -> str:
    return str(values[first]) if first == last else f"{values[first]} .. {values[last]}"


def _disjoint(modules: Sequence[Module]) -> frozenset[str]:
    """The names of modules that all occur in one model."""
    seen: frozenset[str] = frozenset()
    for module in modules:
        names = module.hyperparameter_names()
        if seen & names:
            raise DataError(
                f"the hyper-parameter {min(seen & names)!r} stands in two UserHyperparams; rename one."
            )
        seen |= names
    return seen


def _recorded(inner: Decisions, made: list[int]) -> Decisions:
    """Pass on the decisions of a module and note what was chosen."""
    try:
        decision = next(inner)
        while True:
            made.append((yield decision))
            decision = inner.send(made[-1])
    except StopIteration as end:
        return end.value


def _replayed(inner: Decisions, made: Sequence[int]) -> Specified:
    """Make the decisions of a module as they were made in another copy."""
    answers = iter(made)
    try:
        next(inner)
        while True:
            inner.send(next(answers))
    except StopIteration as end:
        if end.value is None:  # the answers ran out before the decisions
            raise DataError("a copy of RepeatTied has other decisions than the first; use Repeat.") from None
        return end.value
