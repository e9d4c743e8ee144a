"""The information plane of a model over its training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from paperback.errors import DataError
from paperback.networks.activations import MEMORY_LIMIT, collect_activations
from paperback.theory.adaptive_information.layer import as_rows, make_sample, measure
from paperback.theory.information import (
    EstimatorName,
    FixedBins,
    InformationEstimator,
    Sample,
    make_estimator,
)
from paperback.theory.information.binning import natural_range
from paperback.theory.interface import Measurement

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class InformationPlane:
    """Watches the layers of a model during training and draws their information planes.

        plane = InformationPlane(model, X, y, epochs=1000)
        train(model, loss, tensors, epochs=1000, ..., callbacks=[plane])
        plane.table(), plane.plot(), plane.compression()

    Args:
        model: any module. One forward pass in evaluation mode is made for each record. None if activations
            come through `add` only.
        X: all inputs, training and test, ``(n, ...)``.
        y: ``(n,)`` integer labels.
        layers: names of modules as `model.named_modules` has them; if not given, the activation modules and
            the last layer, or every leaf module where there are no activation modules.
        estimator: as in `mutual_information`. Fixed bins without a range wait for the largest activation over
            all epochs, so the activations are kept until then (on disk as float16 beyond 1 GB).
        schedule: "log" for records at equal ratios of epochs, "all" for every epoch, or the epochs.
        n: how many records "log" spreads over the training.
        epochs: length of the training, for "log"; the last epoch is recorded.
        x_ids: as in `mutual_information`.
        batch_size: rows of a forward pass.
        **settings: of the estimator.

    Raises:
        DataError: if the data, a layer or a setting cannot be used.
    """

    def __init__(
        self,
        model: nn.Module | None,
        X: Tensor,
        y: ArrayLike | Tensor,
        layers: Sequence[str] | None = None,
        estimator: EstimatorName | InformationEstimator = "ebab",
        schedule: Literal["log", "all"] | Sequence[int] = "log",
        n: int = 50,
        *,
        epochs: int = 1000,
        x_ids: ArrayLike | Tensor | None = None,
        batch_size: int = 1024,
        **settings: Any,
    ) -> None:
        if isinstance(schedule, str) and schedule not in ("log", "all"):
            raise DataError(f'schedule is {schedule!r}; give "log", "all" or a list of epochs.')
        if n < 1 or epochs < 1:
            raise DataError(f"n is {n} and epochs {epochs}; both must be at least 1.")
        self.model, self.X, self.layers = model, X, layers
        self.estimator = make_estimator(estimator, **settings)
        self.schedule, self.n, self.epochs, self.batch_size = schedule, n, epochs, batch_size
        self._of_inputs = make_sample(X, y, x_ids, X)  # the inputs stand for the activations in this check
        self._measured: dict[tuple[int, str], Measurement] = {}
        self._kept: dict[tuple[int, str], Tensor | NDArray] = {}
        self._ranges: dict[str, tuple[float, float]] = {}
        self._kept_bytes = 0

    def __call__(self, epoch: int, *_: Any) -> None:
        """As a callback of `paperback.training.train`."""
        self.record(epoch)

    def due(self, epoch: int) -> bool:
        """Whether an epoch is one that the schedule records."""
        if self.schedule == "all":
            return True
        if self.schedule != "log":
            return epoch in self.schedule
        if epoch in (0, 1, self.epochs):
            return True

        def step(e: int) -> int:
            return math.floor(self.n * math.log(e) / math.log(max(2, self.epochs)))

        return epoch > 1 and step(epoch) > step(epoch - 1)

    def record(self, epoch: int, *, force: bool = False) -> bool:
        """Measure all layers, if the schedule has this epoch.

        Args:
            epoch: how many epochs of training are done, >= 0; each is recorded once.
            force: measure whatever the schedule says.

        Returns:
            Whether it was measured.
        """
        if not (force or self.due(epoch)):
            return False
        if self.model is None:
            raise DataError("this plane has no model; give activations to add(epoch, activations).")
        activations = collect_activations(
            self.model,
            self.X,
            self._chosen_layers(self.model),
            batch_size=self.batch_size,
            memory_limit=max(0, MEMORY_LIMIT - self._kept_bytes) if self._waits else MEMORY_LIMIT,
        )
        self.add(epoch, activations)
        return True

    def add(self, epoch: int, activations: Mapping[str, ArrayLike | Tensor]) -> None:
        """Measure activations that were obtained elsewhere.

        Args:
            epoch: as in `record`.
            activations: by layer, ``(n, ...)`` in the order of the inputs.

        Raises:
            DataError: if this epoch has been recorded, or an activation cannot be used.
        """
        if epoch < 0 or any(epoch == e for e, _ in (*self._measured, *self._kept)):
            raise DataError(f"epoch {epoch} is negative or has been recorded; give each epoch once.")
        found: dict[tuple[int, str], Measurement] = {}
        for layer, T in activations.items():
            sample = self._sample_of(T, layer)
            if self._waits:
                low, high = natural_range(sample.T)
                before = self._ranges.get(layer, (low, high))
                self._ranges[layer] = (min(low, before[0]), max(high, before[1]))
                self._kept[epoch, layer] = T.detach() if isinstance(T, Tensor) else np.asarray(T)
                self._kept_bytes += sample.T.nbytes
            else:
                found[epoch, layer] = measure(sample, self.estimator)
        self._measured |= found

    def measurement(self, layer: str) -> Measurement:
        """I(X;T) of a layer over the epochs recorded, with I(T;Y) as its part."""
        course = {epoch: m for (epoch, name), m in self._results().items() if name == layer}
        if not course:
            raise DataError(
                f"layer {layer!r} was not recorded; there is {', '.join(self._names()) or 'none'}."
            )
        parts = [_course(list(course), [m[name] for m in course.values()]) for name in ("I(X;T)", "I(T;Y)")]
        last = list(course.values())[-1]
        return replace(parts[0], parts={"I(T;Y)": parts[1]}, bias=last.bias, flags=last.flags)

    def table(self) -> pd.DataFrame:
        """One row for each epoch and layer: both informations, bounds where there are some, saturation."""
        import pandas as pd

        rows = []
        for (epoch, layer), measured in self._results().items():
            row: dict[str, Any] = {"epoch": epoch, "layer": layer}
            for quantity in (measured, measured["I(T;Y)"]):
                row[quantity.name] = quantity.value
                if quantity.interval is not None:
                    row[f"{quantity.name} low"], row[f"{quantity.name} high"] = quantity.interval
            rows.append(row | {"saturated": "saturated" in measured.flags})
        if not rows:
            raise DataError("nothing was recorded; call record(epoch) during training.")
        return pd.DataFrame(rows).sort_values("epoch", kind="stable", ignore_index=True)

    def compression(self) -> pd.DataFrame:
        """How far I(X;T) of each layer fell from its peak: C = max_e I(X;T)(e) - I(X;T)(end)."""
        import pandas as pd

        table = self.table().pivot(index="epoch", columns="layer", values="I(X;T)")[self._names()]
        return pd.DataFrame(
            {
                "layer": table.columns,
                "peak": table.max().to_numpy(),
                "epoch of peak": table.idxmax().to_numpy(),
                "end": table.iloc[-1].to_numpy(),
                "compression": compression_score(table.to_numpy()),
            }
        )

    def plot(self) -> Figure:
        """The information plane: I(T;Y) against I(X;T), a line per layer, darker with the epochs."""
        from matplotlib.figure import Figure

        from paperback.study.figures import NARROW, style

        with style():
            figure = Figure(figsize=(NARROW[0] + 1.2, NARROW[1]))
            axes = figure.subplots()
            draw_plane(axes, self.table(), self.estimator.unit)
        return figure

    # -- helpers ---------------------------------------------------------------------------------------------

    @property
    def _waits(self) -> bool:
        """Whether the bins are only known when the training is over."""
        return isinstance(self.estimator, FixedBins) and self.estimator.bin_range is None

    def _chosen_layers(self, model: nn.Module) -> list[str]:
        if self.layers is None:
            leaves = [(name, m) for name, m in model.named_modules() if not any(m.children())]
            kinds = [name for name, m in leaves if type(m).__module__ == nn.ReLU.__module__]
            self.layers = (
                list(dict.fromkeys([*kinds, leaves[-1][0]])) if kinds else [name for name, _ in leaves]
            )
        return list(self.layers)

    def _sample_of(self, T: ArrayLike | Tensor, layer: str) -> Sample:
        values, given = as_rows(T, f"layer {layer!r}"), self._of_inputs
        if len(values) != len(given):
            raise DataError(
                f"layer {layer!r} has {len(values)} rows for {len(given)} inputs; give all of them."
            )
        return Sample(values, given.y, given.x_ids, given.x)

    def _results(self) -> dict[tuple[int, str], Measurement]:
        if self._waits:  # with what is known by now; a later epoch may widen the range
            assert isinstance(self.estimator, FixedBins)
            bins = {layer: replace(self.estimator, bin_range=ends) for layer, ends in self._ranges.items()}
            return {
                (epoch, layer): measure(self._sample_of(T, layer), bins[layer])
                for (epoch, layer), T in self._kept.items()
            }
        return self._measured

    def _names(self) -> list[str]:
        return list(dict.fromkeys(layer for _, layer in (*self._measured, *self._kept)))


def compression_score(information: ArrayLike) -> Float[np.ndarray, "..."]:
    """C = max over epochs of I(X;T), less its last value.

    Args:
        information: ``(epochs, ...)``, in the order of training.

    Returns:
        ``(...)``, >= 0.
    """
    values = np.asarray(information, np.float64)
    return values.max(axis=0) - values[-1]


def draw_plane(axes: Axes, table: pd.DataFrame, unit: str = "bits") -> None:
    """Draw an information plane: a line per layer, its points darker with the epochs, a ring at the end.

    Args:
        axes: empty.
        table: as `InformationPlane.table` gives it.
        unit: of both axes.
    """
    from matplotlib.colors import to_rgba_array

    from paperback.study.figures import PALETTE

    epochs = np.sort(table["epoch"].unique())
    for i, (layer, course) in enumerate(table.groupby("layer", sort=False)):
        colour = PALETTE[i % len(PALETTE)]
        age = 0.15 + 0.85 * np.searchsorted(epochs, course["epoch"]) / max(1, len(epochs) - 1)
        x, y = course["I(X;T)"].to_numpy(), course["I(T;Y)"].to_numpy()
        axes.plot(x, y, color=colour, linewidth=0.6, alpha=0.5)
        axes.scatter(x, y, s=14, c=to_rgba_array(colour, age), linewidths=0)
        axes.scatter(
            x[-1:], y[-1:], s=52, facecolors="none", edgecolors=colour, linewidths=1.5, label=str(layer)
        )
    said = f" ({unit})" if unit else ""
    axes.set(xlabel=f"I(X;T){said}", ylabel=f"I(T;Y){said}")
    axes.legend(
        title="layer, at the end", fontsize=8, title_fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5)
    )


def _course(epochs: list[int], measured: list[Measurement]) -> Measurement:
    """One quantity over the epochs."""
    ends = [m.interval for m in measured if m.interval is not None]
    interval = (
        None
        if len(ends) < len(measured)
        else (np.array([e[0] for e in ends]), np.array([e[1] for e in ends]))
    )
    return Measurement(
        measured[0].name,
        np.array([m.value for m in measured]),
        interval,
        unit=measured[0].unit,
        n=measured[0].n,
        index=epochs,
        axis="epoch",
        confidence=measured[0].confidence,
    )
