"""Classifiers that give their reasons: what an explanation is, and what every method of this wing has.

An explanation takes each class's score apart into contributions that add up to it exactly. What a
contribution belongs to, a prototype, a column, a code, a token, is a *part* with a name, and with a picture
where it has one.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import validate_data

from paperback.errors import DataError, NotSupportedError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Kind = Literal["table", "image", "text"]
Array = NDArray[np.float64]

ROUNDING = 1e-6  # of the sum of absolute contributions, up to which they may miss the score
SHOWN = 8  # contributions of a plot


@dataclass(frozen=True, eq=False)
class Explanation:
    """Why some rows were classified as they were.

    ``scores[i, c] = offsets[i, c] + contributions[i, c].sum()`` for every row i and class c.

    Args:
        classes: labels of the classes, ``(classes,)``.
        scores: of every class, ``(rows, classes)``; the greatest is the prediction.
        contributions: of every part, ``(rows, classes, parts)``.
        parts: their names, ``(parts,)``.
        inputs: the rows that were explained, ``(rows, ...)``: numbers, or lists of tokens for text.
        kind: what a row is: "table", "image" or "text".
        offsets: what belongs to no part, ``(rows, classes)``; 0 if not given.
        columns: names of the columns of a table.
        image_shape: (height, width), or (height, width, 3), of an image whose pixels stand in one row.
        pictures: part to what it looks like, in the form of a row, where it looks like anything.
        certificates: for each row a radius within which the prediction cannot change, ``(rows,)``; None
            where there is no guarantee.

    Attributes:
        prediction: label of the class with the greatest score, ``(rows,)``.

    Raises:
        DataError: if shapes do not fit, or contributions do not add up to the scores.
    """

    classes: NDArray[Any]
    scores: Array
    contributions: Array
    parts: tuple[str, ...]
    inputs: Any
    kind: Kind = "table"
    offsets: Array | None = None
    columns: tuple[str, ...] = ()
    image_shape: tuple[int, ...] | None = None
    pictures: Mapping[str, Array] = field(default_factory=dict)
    certificates: Array | None = None

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        set_(self, "classes", np.asarray(self.classes))
        set_(self, "scores", np.asarray(self.scores, dtype=float))
        set_(self, "contributions", np.asarray(self.contributions, dtype=float))
        set_(self, "parts", tuple(map(str, self.parts)))
        rows, classes = self.scores.shape
        shape = (rows, classes, len(self.parts))
        if len(self.classes) != classes or self.contributions.shape != shape or len(self.inputs) != rows:
            raise DataError(
                f"an explanation of {rows} rows, {len(self.classes)} classes and {len(self.parts)} parts has "
                f"scores {self.scores.shape}, contributions {self.contributions.shape} and "
                f"{len(self.inputs)} inputs; they do not fit."
            )
        offsets = np.zeros((rows, classes)) if self.offsets is None else np.asarray(self.offsets, dtype=float)
        set_(self, "offsets", offsets)
        sums = offsets + self.contributions.sum(-1)
        sizes = np.abs(offsets) + np.abs(self.contributions).sum(-1) + np.abs(self.scores)
        add_up = np.abs(sums - self.scores) <= ROUNDING * sizes + np.finfo(float).tiny
        if not add_up.all():
            row, class_ = np.argwhere(~add_up)[0]
            raise DataError(
                f"the contributions of row {row} to class {self.classes[class_]} add up to "
                f"{sums[row, class_]:.6g}, and its score is {self.scores[row, class_]:.6g}."
            )

    @property
    def prediction(self) -> NDArray[Any]:
        """Label of the class with the greatest score, ``(rows,)``."""
        return self.classes[self.scores.argmax(1)]

    def __len__(self) -> int:
        return len(self.scores)

    def runner_up(self, row: int) -> Any:
        """Label of the class with the second greatest score of a row."""
        return self.classes[np.argsort(-self.scores[row], kind="stable")[1]]

    def table(self, row: int = 0, class_: Any = None, *, top: int | None = None) -> pd.DataFrame:
        """The contributions to one class's score, the largest first.

        Args:
            row: which row.
            class_: label of the class; the predicted one if not given.
            top: keep so many and put the rest into one line; all if not given.

        Returns:
            Columns "part" and "contribution"; the last line is the score, and the sum of those above it.

        Raises:
            DataError: if there is no such row or class, or top < 1.
        """
        import pandas as pd

        names, values = self._largest(row, self._class(row, class_), top)
        column = self._column(row, self._class(row, class_))
        return pd.DataFrame({"part": [*names, "score"], "contribution": [*values, self.scores[row, column]]})

    def plot(self, row: int = 0, class_: Any = None, *, top: int = SHOWN) -> Figure:
        """The row, and the largest contributions to a class's score with pictures of their parts.

        Args:
            row: which row.
            class_: label of the class; the predicted one if not given.
            top: so many contributions.

        Returns:
            The figure.

        Raises:
            DataError: if there is no such row or class, or top < 1.
        """
        from matplotlib.figure import Figure

        from paperback.study.figures import WIDE, style

        label = self._class(row, class_)
        column = self._column(row, label)
        names, values = self._largest(row, label, top)
        with style():
            figure = Figure(figsize=WIDE)
            left, right = figure.subplots(1, 2, width_ratios=(1, 2))
            self._draw_input(left, row)
            _draw_bars(right, names, values)
            right.set_title(f"{label}: score {self.scores[row, column]:.3g}")
            if self.kind == "image":
                self._draw_pictures(right, names)
        return figure

    # -- helpers ---------------------------------------------------------------------------------------------

    def _class(self, row: int, class_: Any) -> Any:
        if not -len(self) <= row < len(self):
            raise DataError(f"there is no row {row}; the explanation has {len(self)}.")
        return self.prediction[row] if class_ is None else class_

    def _column(self, row: int, class_: Any) -> int:
        found = np.flatnonzero(self.classes == class_)
        if len(found) == 0:
            raise DataError(f"there is no class {class_!r}; there are {', '.join(map(str, self.classes))}.")
        return int(found[0])

    def _largest(self, row: int, class_: Any, top: int | None) -> tuple[list[str], list[float]]:
        """Names and contributions in the order of their size; what is left over in one entry."""
        if top is not None and top < 1:
            raise DataError(f"top is {top}; show at least one contribution.")
        column = self._column(row, class_)
        values = self.contributions[row, column]
        order = np.argsort(-np.abs(values), kind="stable")
        kept, rest = order[:top], order[len(order) if top is None else top :]
        names, shown = [self.parts[k] for k in kept], [float(values[k]) for k in kept]
        if len(rest):
            names.append(f"{len(rest)} others")
            shown.append(float(values[rest].sum()))
        assert self.offsets is not None
        if self.offsets[row, column] != 0:
            names.append("offset")
            shown.append(float(self.offsets[row, column]))
        return names, shown

    def _draw_input(self, axes: Axes, row: int) -> None:
        axes.set_axis_off()
        axes.set_title("input")
        if self.kind == "image":
            axes.imshow(self._picture(self.inputs[row]), cmap="gray_r")
        elif self.kind == "text":
            axes.text(0, 1, " ".join(map(str, self.inputs[row])), va="top", wrap=True)
        else:
            values = np.asarray(self.inputs[row]).ravel()
            names = self.columns or tuple(f"column {i}" for i in range(len(values)))
            lines = [f"{name} = {_short(value)}" for name, value in zip(names, values, strict=True)]
            more = [f"and {len(lines) - 18} more"] if len(lines) > 18 else []
            axes.text(0, 1, "\n".join(lines[:18] + more), va="top", transform=axes.transAxes)

    def _draw_pictures(self, axes: Axes, names: Sequence[str]) -> None:
        """What each part looks like, at the left of its bar."""
        from matplotlib.colors import Normalize
        from matplotlib.offsetbox import AnnotationBbox, OffsetImage

        shades = Normalize(np.min(self.inputs), np.max(self.inputs))  # white and black as in the rows
        low, high = axes.get_xlim()
        axes.set_xlim(low - 0.1 * (high - low), high)  # room for them
        for place, name in enumerate(names):
            if name in self.pictures:
                pixels = self._picture(self.pictures[name])
                image = OffsetImage(pixels, zoom=20 / max(pixels.shape[:2]), cmap="gray_r", norm=shades)
                axes.add_artist(
                    AnnotationBbox(image, (0, place), xycoords=("axes fraction", "data"), frameon=False,
                                   box_alignment=(0.0, 0.5), annotation_clip=False)
                )  # fmt: skip

    def _picture(self, pixels: ArrayLike) -> NDArray[Any]:
        array = np.asarray(pixels)
        return array.reshape(self.image_shape) if self.image_shape is not None else array


class ExplainableClassifier(ClassifierMixin, BaseEstimator):
    """A scikit-learn classifier that explains what it predicts.

    Subclasses have scikit-learn's ``fit``, ``predict`` and ``predict_proba``, and `explain`. What only some
    methods have raises `NotSupportedError` where it is missing: `intervene` (methods with components,
    concepts or codes that can be set by hand) and `certify` (methods with a guarantee).
    """

    classes_: NDArray[Any]

    def _checked(self, X: ArrayLike, y: ArrayLike) -> tuple[Array, NDArray[np.int64]]:
        """Rows as float64 and labels as indices of `classes_`, which is set; two classes at least."""
        rows, labels = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(labels)
        self.classes_, codes = np.unique(labels, return_inverse=True)
        if len(self.classes_) < 2:
            raise DataError("y has one class only; a classifier needs rows of two classes or more.")
        return rows, codes

    @abstractmethod
    def explain(self, X: ArrayLike) -> Explanation:
        """Take the scores of some rows apart.

        Args:
            X: rows as `predict` takes them.

        Returns:
            The explanation; its prediction is that of `predict`.
        """

    def intervene(self, X: ArrayLike, settings: Mapping[Any, Any]) -> NDArray[Any]:
        """Predict as if parts of the model had been in a given state.

        Args:
            X: rows as `predict` takes them.
            settings: part to the state that is forced.

        Returns:
            Labels ``(rows,)``.

        Raises:
            NotSupportedError: if the method has nothing that can be set.
        """
        raise NotSupportedError(
            f"{type(self).__name__} has no parts that can be set by hand; RBFPrototypeClassifier and "
            "CodebookExplainer have."
        )

    def certify(self, X: ArrayLike, y: ArrayLike | None = None) -> Array:
        """The radius around each row within which its prediction cannot change.

        Args:
            X: rows as `predict` takes them.
            y: labels; rows that are classified otherwise get a radius of at most 0. The predictions if not
                given.

        Returns:
            ``(rows,)``, in the units of X.

        Raises:
            NotSupportedError: if the method gives no guarantee.
        """
        raise NotSupportedError(
            f"{type(self).__name__} gives no guarantee; RBFPrototypeClassifier and GLVQ do."
        )


def _draw_bars(axes: Axes, names: Sequence[str], values: Sequence[float]) -> None:
    from paperback.study.figures import BASELINE, METHOD

    places = range(len(names))
    axes.barh(places, values, color=[METHOD if value >= 0 else BASELINE for value in values], height=0.7)
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.7)
    axes.grid(axis="x")
    axes.grid(visible=False, axis="y")
    axes.locator_params(axis="x", nbins=5)  # small contributions have long labels
    axes.set_xlabel("contribution")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float | np.floating) else str(value)
