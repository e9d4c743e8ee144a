"""What every loader returns: a `Dataset` of three `Split`s that knows its source and its licence.

The kinds of data differ only in the type of ``x``: a uint8 tensor for images, a DataFrame for tables and
texts with columns, a string for running text. ``y`` means the same everywhere: class indices (int64) into
``classes`` where there are classes, float64 numbers where the target is a number, None where there is no
target.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["images", "table", "text"]
Labels = Literal["optional", "required"]  # whether a reader insists on labels of two classes or more


@dataclass(frozen=True, eq=False)
class Split:
    """One part of a data set.

    Attributes:
        x: the inputs; see `Dataset`.
        y: one target per row of x, or None.
    """

    x: Any
    y: Any = None

    def __iter__(self) -> Iterator[Any]:
        """x, then y: ``x, y = dataset.train``."""
        yield self.x
        yield self.y

    def __len__(self) -> int:
        """Number of rows (characters or bytes, for running text)."""
        return len(self.x)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Data in three parts: models are fitted on train, chosen on val, judged on test.

    Attributes:
        name: short name, for tables and file names.
        kind: "images", "table" or "text".
        train: images: x is a uint8 tensor ``(n, height, width)`` or ``(n, 3, height, width)``, y an int64
            tensor ``(n,)``. Tables: x is a DataFrame without the target column, y a Series. Text: x is a
            str, bytes or a DataFrame.
        val: the validation part, same types.
        test: the test part, same types.
        source: where the data come from.
        licence: under which terms.
        description: what one row is, in one or two sentences.
        classes: names of the classes that y indexes; empty where y is a number or absent.
        target: name of the target, where it has one.
        notes: what the reader left out or decided, one sentence each.
    """

    name: str
    kind: Kind
    train: Split
    val: Split
    test: Split
    source: str
    licence: str
    description: str
    classes: tuple[str, ...] = ()
    target: str = ""
    notes: tuple[str, ...] = ()

    def describe(self) -> str:
        """A few lines for people: size and shape of each part, classes, source, licence, notes."""
        x = self.train.x
        unit = "rows" if hasattr(x, "shape") else "bytes" if isinstance(x, bytes) else "characters"
        sizes = f"train {len(self.train):,}, val {len(self.val):,}, test {len(self.test):,}"
        facts = [(unit, sizes + _shape(x))]
        if self.classes:
            shown = ", ".join(self.classes[:10]) + (", ..." if len(self.classes) > 10 else "")
            facts.append(("classes", f"{len(self.classes)} of {self.target} ({shown})"))
        elif self.target:
            y = self.train.y
            facts.append(("target", f"{self.target}, a number from {y.min():.6g} to {y.max():.6g}"))
        facts += [("source", self.source), ("licence", self.licence)]
        facts += [("note", note) for note in self.notes]
        lines = [f"{self.name}: {self.description}"] + [f"  {name + ':':<12}{fact}" for name, fact in facts]
        return "\n".join(lines)


def _shape(x: Any) -> str:
    """The shape of one row, in words; nothing for running text."""
    if hasattr(x, "columns"):
        return f", each of {len(x.columns)} columns"
    if hasattr(x, "shape"):
        return f", each {' x '.join(str(n) for n in x.shape[1:])}, values {int(x.min())} to {int(x.max())}"
    return ""
