"""The basic modules: layers whose hyper-parameters are lists of values, and hyper-parameters without a layer.

Shapes are those of one input without the batch: ``(features,)``, ``(channels, height, width)``. A layer that
does not fit what comes before it (a 5 x 5 window on 3 x 3 pixels) is no error of the space: the walk goes on,
and compiling the model raises `InvalidTrial`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from paperback.errors import DataError
from paperback.search.deep_architect.language import (
    Decisions,
    Module,
    Or,
    Shape,
    Specified,
    check_domain,
    decide,
)

INITIALISERS: dict[str, Callable[[torch.Tensor], Any]] = {
    "kaiming": lambda weight: nn.init.kaiming_normal_(weight, nonlinearity="relu"),
    "xavier": nn.init.xavier_uniform_,
    "orthogonal": nn.init.orthogonal_,
}
INITS = ("default", *INITIALISERS)  # "default" is torch's own


class Layer(Module):
    """A basic module: an ordered list of parameters with finite domains, chosen in this order."""

    def __init__(self, **domains: Sequence[Any]) -> None:
        self.domains = {
            name: check_domain(values, f"{name} of {type(self).__name__}") for name, values in domains.items()
        }

    @abstractmethod
    def plan(self, shape: Shape, **values: Any) -> Specified:
        """What the layer is once its parameters have values."""

    def specify(self, shape: Shape, scope: str) -> Decisions:
        """As every module."""
        values = {}
        for name, domain in self.domains.items():
            values[name] = domain[(yield from decide(f"{scope}/{name}", domain))]
        made = self.plan(shape, **values)
        label = getattr(self, "name", type(self).__name__)
        return made._replace(modules=((label, *values.values()),))

    def count(self) -> int:
        """As every module."""
        return math.prod(len(domain) for domain in self.domains.values())

    def __repr__(self) -> str:
        inside = ", ".join(f"{name}={list(domain)}" for name, domain in self.domains.items())
        return f"{type(self).__name__}({inside})"


class Affine(Layer):
    """A fully connected layer; an input with several axes is flattened first.

    Args:
        units: numbers of outputs.
        inits: of the weights: "default" (torch's), "kaiming", "xavier", "orthogonal".
    """

    def __init__(self, units: Sequence[int], inits: Sequence[str] = ("default",)) -> None:
        super().__init__(units=_whole(units, "units of Affine"), inits=_known_inits(inits))

    def plan(self, shape: Shape, **values: Any) -> Specified:
        """As every layer."""
        inputs, units, init = math.prod(shape), values["units"], values["inits"]

        def build() -> nn.Module:
            layer = _initialised(nn.Linear(inputs, units), init)
            return layer if len(shape) == 1 else nn.Sequential(nn.Flatten(), layer)

        return Specified((units,), build)


class Conv2D(Layer):
    """A convolution of images.

    Args:
        filters: numbers of output channels.
        sizes: of the window, in pixels.
        strides: steps of the window, in pixels.
        paddings: "same" (zeros around, so that the output has ceil(size / stride) pixels) or "valid".
        inits: of the weights, see `Affine`.
    """

    def __init__(
        self,
        filters: Sequence[int],
        sizes: Sequence[int],
        strides: Sequence[int] = (1,),
        paddings: Sequence[str] = ("same",),
        inits: Sequence[str] = ("default",),
    ) -> None:
        super().__init__(
            filters=_whole(filters, "filters of Conv2D"),
            sizes=_whole(sizes, "sizes of Conv2D"),
            strides=_whole(strides, "strides of Conv2D"),
            paddings=_known_paddings(paddings),
            inits=_known_inits(inits),
        )

    def plan(self, shape: Shape, **values: Any) -> Specified:
        """As every layer."""
        channels, height, width = _image(shape, "Conv2D")
        filters, size, stride = values["filters"], values["sizes"], values["strides"]
        pad = _padding(size, values["paddings"], 0.0)
        out, problem = _window((height, width), size, stride, values["paddings"], "Conv2D")

        def build() -> nn.Module:
            layer = _initialised(nn.Conv2d(channels, filters, size, stride), values["inits"])
            return nn.Sequential(*pad, layer) if pad else layer

        return Specified((filters, *out), build, problem=problem)


class Pooling2D(Layer):
    """The maximum or the mean of a window of an image.

    Args:
        types: "max" and "mean".
        sizes: of the window, in pixels.
        strides: steps of the window, in pixels.
        paddings: as of `Conv2D`.
    """

    def __init__(
        self,
        types: Sequence[str],
        sizes: Sequence[int],
        strides: Sequence[int] = (2,),
        paddings: Sequence[str] = ("valid",),
    ) -> None:
        super().__init__(
            types=_known(types, ("max", "mean"), "types of Pooling2D"),
            sizes=_whole(sizes, "sizes of Pooling2D"),
            strides=_whole(strides, "strides of Pooling2D"),
            paddings=_known_paddings(paddings),
        )

    def plan(self, shape: Shape, **values: Any) -> Specified:
        """As every layer."""
        channels, height, width = _image(shape, "Pooling2D")
        size, stride = values["sizes"], values["strides"]
        kind, fill = (nn.MaxPool2d, -math.inf) if values["types"] == "max" else (nn.AvgPool2d, 0.0)
        pad = _padding(size, values["paddings"], fill)
        out, problem = _window((height, width), size, stride, values["paddings"], "Pooling2D")
        return Specified((channels, *out), lambda: nn.Sequential(*pad, kind(size, stride)), problem=problem)


def MaxPooling2D(
    sizes: Sequence[int], strides: Sequence[int] = (2,), paddings: Sequence[str] = ("valid",)
) -> Pooling2D:
    """`Pooling2D` by the maximum."""
    return Pooling2D(["max"], sizes, strides, paddings)


def AvgPooling2D(
    sizes: Sequence[int], strides: Sequence[int] = (2,), paddings: Sequence[str] = ("valid",)
) -> Pooling2D:
    """`Pooling2D` by the mean."""
    return Pooling2D(["mean"], sizes, strides, paddings)


class Dropout(Layer):
    """Dropout.

    Args:
        keep: probabilities that a unit is kept, in (0, 1].
    """

    def __init__(self, keep: Sequence[float]) -> None:
        super().__init__(keep=keep)
        if not all(isinstance(p, int | float) and 0 < p <= 1 for p in self.domains["keep"]):
            raise DataError(f"keep of Dropout is {list(keep)}; give probabilities in (0, 1].")

    def plan(self, shape: Shape, **values: Any) -> Specified:
        """As every layer."""
        return Specified(shape, lambda: nn.Dropout(1 - values["keep"]))


class BatchNormalization(Layer):
    """Batch normalisation of features, sequences ``(channels, length)`` or images."""

    def plan(self, shape: Shape, **values: Any) -> Specified:
        """As every layer."""
        if not 1 <= len(shape) <= 3:
            raise DataError(f"BatchNormalization is given inputs of shape {shape}; it takes 1 to 3 axes.")
        return Specified(shape, lambda: (nn.BatchNorm2d if len(shape) == 3 else nn.BatchNorm1d)(shape[0]))


class ReLU(Layer):
    """max(x, 0)."""

    def plan(self, shape: Shape, **values: Any) -> Specified:
        """As every layer."""
        return Specified(shape, nn.ReLU)


class Sigmoid(Layer):
    """1 / (1 + exp(-x))."""

    def plan(self, shape: Shape, **values: Any) -> Specified:
        """As every layer."""
        return Specified(shape, nn.Sigmoid)


class Tanh(Layer):
    """The hyperbolic tangent."""

    def plan(self, shape: Shape, **values: Any) -> Specified:
        """As every layer."""
        return Specified(shape, nn.Tanh)


class Flatten(Layer):
    """All axes of an input as one (the paper's Squeeze and Flatten)."""

    def plan(self, shape: Shape, **values: Any) -> Specified:
        """As every layer."""
        return Specified((math.prod(shape),), nn.Flatten)


def Nonlinearity(types: Sequence[str]) -> Or:
    """One of several activations: "relu", "sigmoid", "tanh"."""
    kinds: dict[str, Callable[[], Layer]] = {"relu": ReLU, "sigmoid": Sigmoid, "tanh": Tanh}
    names = _known(types, tuple(kinds), "types of Nonlinearity")
    return Or([kinds[name]() for name in names], names)


class Basic(Layer):
    """Any torch module as a layer.

    Args:
        factory: ``factory(shape, **values) -> nn.Module``, where shape is that of one input. It must build
            the same kind of module for the same arguments.
        out_shape: ``out_shape(shape, **values)``; if not given, two inputs of zeros are sent through the
            module, without memory for its weights (torch's meta device). Needed where inputs are no floats,
            such as an embedding's.
        name: in descriptions; that of the factory if not given.
        **domains: parameters of the factory, each with its list of values.
    """

    def __init__(
        self,
        factory: Callable[..., nn.Module],
        out_shape: Callable[..., Shape] | None = None,
        name: str | None = None,
        **domains: Sequence[Any],
    ) -> None:
        super().__init__(**domains)
        self.name = name or getattr(factory, "__name__", type(factory).__name__)
        self._factory = factory
        self._out_shape = out_shape
        self._known: dict[tuple[Any, ...], Shape] = {}

    def plan(self, shape: Shape, **values: Any) -> Specified:
        """As every layer."""
        key = (shape, *values.values())
        if key not in self._known:
            self._known[key] = self._measure(shape, values)
        return Specified(self._known[key], lambda: self._factory(shape, **values))

    def _measure(self, shape: Shape, values: Mapping[str, Any]) -> Shape:
        if self._out_shape is not None:
            return tuple(self._out_shape(shape, **values))
        try:
            with torch.device("meta"), torch.no_grad():
                return tuple(self._factory(shape, **values).eval()(torch.zeros(2, *shape)).shape[1:])
        except Exception as error:  # the user's module, whatever it raises
            raise DataError(
                f"{self.name} with {dict(values)} cannot take float inputs of shape {shape} ({error}); "
                "mend the factory, or give Basic an out_shape."
            ) from error

    def __repr__(self) -> str:
        inside = "".join(f", {name}={list(domain)}" for name, domain in self.domains.items())
        return f"Basic({self.name}{inside})"


# -- hyper-parameters without a layer ------------------------------------------------------------------------


@dataclass(frozen=True)
class When:
    """A hyper-parameter that is there only when another one has certain values.

    Attributes:
        domain: its values.
        other: name of the other hyper-parameter.
        values: those of the other under which this one is there.
    """

    domain: Sequence[Any]
    other: str
    values: Sequence[Any]


class UserHyperparams(Module):
    """Named settings that change nothing about the data: learning rate, optimizer, patience.

    The evaluation finds them in `Walk.hyperparameters`. Their decisions have their names.

    Args:
        **domains: for each name a list of values, or a `When`.

    Raises:
        DataError: if there are none, a domain is unfit, a `When` names no other hyper-parameter or values
            that it never has, or they depend on each other in a circle.
    """

    def __init__(self, **domains: Sequence[Any] | When) -> None:
        if not domains:
            raise DataError("UserHyperparams has no names; give at least one, with its list of values.")
        for name in domains:
            if "/" in name:
                raise DataError(f"the hyper-parameter {name!r} has a slash in its name; leave it out.")
        self.conditions = {name: value for name, value in domains.items() if isinstance(value, When)}
        plain = {
            name: check_domain(value.domain if isinstance(value, When) else value, name)
            for name, value in domains.items()
        }
        for name, when in self.conditions.items():
            _check_condition(name, when, plain)
        self.domains = {name: plain[name] for name in _ordered(plain, self.conditions)}
        self._asked_of = {when.other for when in self.conditions.values()}

    def specify(self, shape: Shape, scope: str) -> Decisions:
        """As every module."""
        values: dict[str, Any] = {}
        names = list(self.domains)
        for i, name in enumerate(names):
            if self._is_there(name, values):
                domain = self.domains[name]
                leaves = [self._ways(names[i + 1 :], values | {name: value}) for value in domain]
                values[name] = domain[(yield from decide(name, domain, leaves))]
        return Specified(shape, nn.Identity, (("UserHyperparams", *values.values()),), values)

    def count(self) -> int:
        """As every module."""
        return self._ways(list(self.domains), {})

    def hyperparameter_names(self) -> frozenset[str]:
        """All names."""
        return frozenset(self.domains)

    def _is_there(self, name: str, values: Mapping[str, Any]) -> bool:
        when = self.conditions.get(name)
        return when is None or (when.other in values and values[when.other] in when.values)

    def _ways(self, names: Sequence[str], values: Mapping[str, Any]) -> int:
        """Ways to choose the rest, given the values before; only what others depend on is gone through."""
        for i, name in enumerate(names):
            if name in self._asked_of and self._is_there(name, values):
                before = self._ways(names[:i], values)
                return before * sum(
                    self._ways(names[i + 1 :], {**values, name: value}) for value in self.domains[name]
                )
        return math.prod(len(self.domains[name]) for name in names if self._is_there(name, values))

    def __repr__(self) -> str:
        parts = []
        for name, domain in self.domains.items():
            when = self.conditions.get(name)
            condition = "" if when is None else f" when {when.other} in {list(when.values)}"
            parts.append(f"{name}={list(domain)}{condition}")
        return f"UserHyperparams({', '.join(parts)})"


def _check_condition(name: str, when: When, domains: Mapping[str, tuple[Any, ...]]) -> None:
    if when.other not in domains:
        raise DataError(
            f"{name!r} depends on {when.other!r}, which is not among {', '.join(domains)}; "
            "give both in one UserHyperparams."
        )
    if not set(when.values) & set(domains[when.other]):
        raise DataError(
            f"{name!r} is unreachable: it is there when {when.other!r} is one of {list(when.values)}, "
            f"which only has {list(domains[when.other])}."
        )


def _ordered(domains: Mapping[str, Any], conditions: Mapping[str, When]) -> list[str]:
    """Names in their order, but each after the one that it depends on."""
    done: list[str] = []

    def add(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            circle = " -> ".join((*path[path.index(name) :], name))
            raise DataError(f"hyper-parameters depend on each other in a circle: {circle}.")
        if name not in done:
            if name in conditions:
                add(conditions[name].other, (*path, name))
            done.append(name)

    for name in domains:
        add(name, ())
    return done


# -- what several layers check -------------------------------------------------------------------------------


def _image(shape: Shape, what: str) -> Shape:
    if len(shape) != 3:
        raise DataError(
            f"{what} is given inputs of shape {shape}; it takes (channels, height, width). Set input_shape, "
            "or put it before what flattens."
        )
    return shape


def _window(pixels: Sequence[int], size: int, stride: int, padding: str, what: str) -> tuple[Shape, str]:
    """Pixels of the output, and what is wrong if there are none (then 1 stands for them)."""
    if padding == "same":
        return tuple(-(-n // stride) for n in pixels), ""
    out = tuple((n - size) // stride + 1 for n in pixels)
    if min(out) >= 1:
        return out, ""
    small = " x ".join(map(str, pixels))
    return tuple(max(1, n) for n in out), f"a {what} of size {size} is given only {small} pixels."


def _padding(size: int, padding: str, fill: float) -> list[nn.Module]:
    if padding == "valid" or size == 1:
        return []
    before, after = (size - 1) // 2, size // 2
    return [nn.ConstantPad2d((before, after, before, after), fill)]


def _initialised(layer: nn.Linear | nn.Conv2d, init: str) -> nn.Module:
    if init != "default":
        INITIALISERS[init](layer.weight)
        assert layer.bias is not None
        nn.init.zeros_(layer.bias)
    return layer


def _whole(values: Sequence[int], what: str) -> tuple[int, ...]:
    domain = check_domain(values, what)
    if any(not isinstance(value, int) or value < 1 for value in domain):
        raise DataError(f"{what}: {list(domain)} must be whole numbers >= 1.")
    return domain


def _known(values: Sequence[str], allowed: tuple[str, ...], what: str) -> tuple[str, ...]:
    domain = check_domain(values, what)
    for value in domain:
        if value not in allowed:
            raise DataError(f"{what}: {value!r} is unknown; use {', '.join(allowed)}.")
    return domain


def _known_inits(values: Sequence[str]) -> tuple[str, ...]:
    return _known(values, INITS, "inits")


def _known_paddings(values: Sequence[str]) -> tuple[str, ...]:
    return _known(values, ("same", "valid"), "paddings")
