"""What every function of this wing returns: a measurement, with its uncertainty and what theory predicts.

A measurement is a number, or an array with one number per layer, epoch or error, together with an interval,
the number of independent repetitions behind it, the prediction of theory where there is one, and in words
what the estimator is known to get wrong.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from paperback.errors import DataError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Numbers = float | NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Measurement:
    """A measured quantity.

    Args:
        name: of the quantity, such as "K" or "I(X;T)".
        value: a number, or ``(entries,)``.
        interval: lower and upper end, each like `value`; None where there is none. An infinite end says that
            this side is not known.
        unit: such as "bits"; empty for plain numbers.
        n: independent repetitions or samples behind the value, >= 1.
        standard_error: of the value, like `value`; None for what is not an average.
        prediction: of theory, like `value`; NaN where theory says nothing.
        index: of the entries: layer names, epochs, errors; 1, 2, ... if not given.
        axis: what the index counts, such as "layer".
        confidence: of the interval, in (0, 1); None when it is a bound, not a confidence interval.
        bias: what the estimator is known to get wrong, a sentence.
        notes: further sentences for the reader.
        flags: short marks that a program can ask for, such as "saturated".
        parts: further quantities of the same measurement by name, each a measurement of its own.

    Raises:
        DataError: if the shapes do not fit, an interval is upside down, or n < 1.
    """

    name: str
    value: Numbers
    interval: tuple[Numbers, Numbers] | None = None
    unit: str = ""
    n: int = 1
    standard_error: Numbers | None = None
    prediction: Numbers | None = None
    index: Sequence[Any] | None = None
    axis: str = ""
    confidence: float | None = 0.95
    bias: str = ""
    notes: tuple[str, ...] = ()
    flags: frozenset[str] = frozenset()
    parts: Mapping[str, Measurement] = field(default_factory=dict)

    def __post_init__(self) -> None:
        value = _numbers(self.value)
        if np.ndim(value) > 1:
            raise DataError(f"{self.name} has shape {np.shape(value)}; give a number or one dimension.")
        if self.n < 1:
            raise DataError(f"{self.name} has n = {self.n}; a measurement has at least one repetition.")
        object.__setattr__(self, "value", value)
        object.__setattr__(self, "flags", frozenset(self.flags))
        object.__setattr__(self, "notes", tuple(self.notes))
        for what in ("standard_error", "prediction"):
            if getattr(self, what) is not None:
                object.__setattr__(self, what, self._like_value(getattr(self, what), what))
        if self.interval is not None:
            low, high = (self._like_value(end, "interval") for end in self.interval)
            if np.any(np.asarray(low) > np.asarray(high)):
                raise DataError(f"the interval of {self.name} has its lower end above its upper end.")
            object.__setattr__(self, "interval", (low, high))
        if self.index is not None:
            index = tuple(self.index)
            if np.ndim(value) == 0 or len(index) != len(np.atleast_1d(value)):
                raise DataError(f"{self.name} has {np.size(value)} entries, its index {len(index)}.")
            object.__setattr__(self, "index", index)

    @classmethod
    def from_samples(
        cls, name: str, samples: ArrayLike, *, confidence: float = 0.95, **rest: Any
    ) -> Measurement:
        """The mean of independent repetitions with its standard error and Student's t interval.

        Args:
            name: of the quantity.
            samples: ``(repetitions,)`` or ``(repetitions, entries)``.
            confidence: of the interval, in (0, 1).
            **rest: further fields of the measurement.

        Returns:
            The measurement; with a single repetition it has no interval.

        Raises:
            DataError: if there is no repetition, or confidence lies outside (0, 1).
        """
        x = np.asarray(samples, dtype=np.float64)
        if x.ndim not in (1, 2) or len(x) == 0:
            raise DataError(f"the samples of {name} have shape {x.shape}; give one row per repetition.")
        if len(x) == 1:
            return cls(name, x[0], n=1, **rest)
        error = x.std(0, ddof=1) / math.sqrt(len(x))
        low, high = t_interval(x.mean(0), error, len(x) - 1, confidence)
        return cls(
            name, x.mean(0), (low, high), n=len(x), standard_error=error, confidence=confidence, **rest
        )

    def __getitem__(self, part: str) -> Measurement:
        """One of the parts, or by its own name the measurement itself."""
        if part == self.name:
            return self
        if part not in self.parts:
            raise DataError(f"{self.name} has no part {part!r}; it has {', '.join(self.parts) or 'none'}.")
        return self.parts[part]

    def __str__(self) -> str:
        return "\n".join([self._words(), *(f"  {part._words()}" for part in self.parts.values())])

    def table(self) -> pd.DataFrame:
        """One row per entry, those of the parts below; columns that nothing fills are left out."""
        import pandas as pd

        rows = []
        for quantity in (self, *self.parts.values()):
            value = np.atleast_1d(quantity.value)
            scalar = np.ndim(quantity.value) == 0
            columns: dict[str, Any] = {
                "quantity": [quantity.name] * len(value),
                quantity.axis or "entry": pd.Series([None] if scalar else quantity.entries),
                "value": value,
            }
            if quantity.interval is not None:
                columns["low"], columns["high"] = map(np.atleast_1d, quantity.interval)
            if quantity.standard_error is not None:
                columns["standard error"] = np.atleast_1d(quantity.standard_error)
            if quantity.prediction is not None:
                columns["prediction"] = np.atleast_1d(quantity.prediction)
            columns |= {"unit": [quantity.unit or None] * len(value), "n": [quantity.n] * len(value)}
            rows.append(pd.DataFrame(columns))
        return pd.concat(rows, ignore_index=True).dropna(axis=1, how="all")

    def plot(self, axes: Axes | None = None) -> Figure:
        """Draw the value with its interval and, dashed, the prediction; one panel per part.

        Args:
            axes: draw this quantity alone into these axes; if not given, a new figure in the house style with
                the parts beside it.

        Returns:
            The figure.
        """
        from matplotlib.figure import Figure

        from paperback.study.figures import style

        with style():
            if axes is not None:
                self._draw(axes)
                return axes.get_figure(root=True)  # type: ignore[return-value]
            shown = (self, *self.parts.values())
            columns = min(3, len(shown))
            rows = math.ceil(len(shown) / columns)
            figure = Figure(figsize=(1.2 + 3.2 * columns, 0.6 + 2.8 * rows))
            panels = figure.subplots(rows, columns, squeeze=False).ravel()
            for quantity, panel in zip(shown, panels, strict=False):
                quantity._draw(panel)
            for panel in panels[len(shown) :]:
                panel.set_visible(False)
        return figure

    @property
    def entries(self) -> tuple[Any, ...]:
        """The index, or 1, 2, ... where none was given; empty for a single number."""
        if self.index is not None:
            return tuple(self.index)
        return () if np.ndim(self.value) == 0 else tuple(range(1, np.size(self.value) + 1))

    # -- helpers ---------------------------------------------------------------------------------------------

    def _like_value(self, numbers: Any, what: str) -> Numbers:
        result, shape = _numbers(numbers), np.shape(self.value)
        if np.shape(result) != shape:
            raise DataError(f"{what} of {self.name} has shape {np.shape(result)}, the value has {shape}.")
        return result

    def _words(self) -> str:
        if np.ndim(self.value):
            ends = f"{np.ravel(self.value)[0]:.4g} ... {np.ravel(self.value)[-1]:.4g}" if self.entries else ""
            text = f"{self.name}: {np.size(self.value)} entries, {ends}"
        else:
            text = f"{self.name} = {float(self.value):.4g}"
            if self.interval is not None:
                text += f" [{float(self.interval[0]):.4g}, {float(self.interval[1]):.4g}]"
        text += f" {self.unit}" if self.unit else ""
        if self.prediction is not None and np.ndim(self.prediction) == 0:
            text += f", predicted {float(self.prediction):.4g}"
        return text + f" (n = {self.n:,}{''.join(f', {flag}' for flag in sorted(self.flags))})"

    def _draw(self, axes: Axes) -> None:
        from paperback.study.figures import METHOD, REFERENCE

        value, index = np.atleast_1d(self.value), self.entries or (0,)
        numeric = all(isinstance(i, int | float | np.number) for i in index)
        x = np.asarray(index, dtype=float) if numeric else np.arange(1.0, len(index) + 1)
        if self.interval is not None:
            low, high = (np.atleast_1d(end) for end in self.interval)
            if len(value) > 1:
                axes.fill_between(x, low, high, color=METHOD, alpha=0.2, linewidth=0)
            else:
                axes.errorbar(x, value, [value - low, high - value], color=METHOD, capsize=4)
        axes.plot(x, value, color=METHOD, marker="o", markersize=3.5, label="measured")
        if self.prediction is not None:
            dashed = {"linestyle": "--"} if len(value) > 1 else {"linestyle": "none", "marker": "_"}
            axes.plot(x, np.atleast_1d(self.prediction), color=REFERENCE, label="predicted", **dashed)  # type: ignore[arg-type]
            axes.legend()
        if not self.entries:
            axes.set_xticks([])
        elif not numeric:
            axes.set_xticks(x, [str(i) for i in index], rotation=90 if len(index) > 6 else 0)
        axes.set(title=self.name, xlabel=self.axis, ylabel=self.unit)


def t_interval(
    value: Numbers, standard_error: Numbers, degrees_of_freedom: float, confidence: float = 0.95
) -> tuple[Numbers, Numbers]:
    """Student's t interval about a value.

    Args:
        value: a number or an array.
        standard_error: like value.
        degrees_of_freedom: > 0; infinity gives the normal interval.
        confidence: in (0, 1).

    Returns:
        Lower and upper end.

    Raises:
        DataError: if confidence lies outside (0, 1).
    """
    from scipy import stats

    if not 0 < confidence < 1:
        raise DataError(f"confidence is {confidence}; it must lie strictly between 0 and 1.")
    half = float(stats.t.ppf((1 + confidence) / 2, degrees_of_freedom)) * np.asarray(standard_error)
    return _numbers(value - half), _numbers(value + half)


def _numbers(value: Any) -> Numbers:
    """A float, or a float64 array that nobody can write to."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    array = np.array(value, dtype=np.float64)
    if array.ndim == 0:
        return float(array)
    array.setflags(write=False)
    return array
