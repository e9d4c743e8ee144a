"""What is compared on: images or a table as discrete states, the table also as it is, and its rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Int
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn

from paperback.data import Dataset, GreyBins, Split, TableBins, images, read
from paperback.data.image_folder import list_images
from paperback.density.constrained_tabular import LinearConstraints
from paperback.errors import DataError, PaperbackError
from paperback.study.budget import Budget, for_budget

if TYPE_CHECKING:
    import pandas as pd

OBSERVED = 0.4  # part of each test row that is known
GREY_LEVELS = 4
TABLE_BINS = 8
LONGEST_SIDE, LONGEST_SIDE_QUICK = 28, 14  # pixels
PARTS = ("train", "val", "test")


@dataclass(frozen=True, eq=False)
class Table:
    """A table as it is: columns of any kind, in their units, the target among them.

    Attributes:
        train: the training rows.
        val: rows for choosing.
        test: rows for measuring.
        bins: all columns as states, fitted on the training rows.
        rules: what every row should satisfy; None without a file of rules.
        rules_name: name of that file, whether or not it is there.
    """

    train: pd.DataFrame
    val: pd.DataFrame
    test: pd.DataFrame
    bins: TableBins
    rules: LinearConstraints | None
    rules_name: str


@dataclass(frozen=True, eq=False)
class DensityData:
    """What the contenders are given.

    Attributes:
        dataset: where the rows come from.
        train: states ``(rows, variables)`` int64, and labels ``(rows,)`` int64 or None.
        val: the same, for choosing.
        test: the same, for measuring.
        observed: mask of the test rows, True where the value is known.
        n_states: states of each variable.
        image_shape: (height, width), None for tables.
        n_classes: number of classes, None without labels.
        table: the rows as they are; None for images.
    """

    dataset: Dataset
    train: Split
    val: Split
    test: Split
    observed: Bool[Tensor, "rows variables"]
    n_states: tuple[int, ...]
    image_shape: tuple[int, int] | None
    n_classes: int | None
    table: Table | None = None

    def with_class_as_variable(self) -> DensityData:
        """The same table, its class as one more variable that is never observed: what a model of whole rows
        is fitted to.
        """
        assert self.table is not None
        bins = self.table.bins
        train, val, test = (Split(bins.transform(getattr(self.table, name))) for name in PARTS)
        observed = nn.functional.pad(self.observed, (0, len(bins.n_states) - len(self.n_states)))
        return replace(
            self, train=train, val=val, test=test, observed=observed, n_states=bins.n_states, n_classes=None
        )


def load(
    path: Path | None, target: str | None, budget: Budget, seed: int, longest_side: int | None = None
) -> DensityData:
    """The digits of scikit-learn in 4 grey levels, or the user's data as discrete states.

    Args:
        path: a table (CSV, Parquet), an ``.npz`` archive or a folder of images; None for the digits. Rules
            that the rows of a table should satisfy are read from ``NAME.rules`` beside it, if that is there.
        target: column of a table to predict.
        budget: larger budgets use more rows.
        seed: of the split and of the masks.
        longest_side: larger images are brought to so many pixels; 28, or 14 on a quick budget, if not given.

    Returns:
        The data.

    Raises:
        PaperbackError: naming the file, the place and the remedy.
    """
    if path is None:
        dataset = images.digits(seed)
    elif is_images(path):
        quick, most = LONGEST_SIDE_QUICK, LONGEST_SIDE
        side = longest_side or for_budget(budget, smoke=quick, quick=quick, standard=most)
        dataset = _read_images(path, target, seed, side)
    else:
        dataset = read(path, target, seed=seed)
    dataset = _bounded(dataset, budget)
    table = None
    if dataset.kind == "images":
        states, n_states = _image_states(dataset)
    else:
        assert path is not None
        dataset, table = _with_table(dataset, path)
        states, n_states = _table_states(dataset, table)
    n_classes = len(dataset.classes) or None
    parts = {}
    for name, x in states.items():
        y = getattr(dataset, name).y
        parts[name] = Split(x, None if n_classes is None else torch.tensor(np.asarray(y), dtype=torch.int64))
    return DensityData(
        dataset=dataset,
        **parts,
        observed=_mask(states["test"].shape, seed),
        n_states=n_states,
        image_shape=tuple(dataset.train.x.shape[1:]) if dataset.kind == "images" else None,
        n_classes=n_classes,
        table=table,
    )


def is_images(path: Path) -> bool:
    """Whether a path names images rather than a table."""
    return path.is_dir() or path.suffix.lower() == ".npz"


def companions(path: Path) -> Sequence[Path]:
    """The file of rules of a table, if it is there: it belongs to the data as the table itself does."""
    rules = rules_path(path)
    return [rules] if not is_images(path) and rules.is_file() else []


def rules_path(path: Path) -> Path:
    """Where the rules of a table are looked for: ``diamonds.rules`` beside ``diamonds.csv.gz``."""
    return Path(path.with_name(path.name.removesuffix(".gz"))).with_suffix(".rules")


def _mask(shape: tuple[int, ...], seed: int) -> Bool[Tensor, "rows variables"]:
    """Each entry observed with probability 0.4; of every row at least one entry is hidden."""
    draw = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    return (draw < OBSERVED) & (draw < draw.amax(1, keepdim=True))


def _bounded(dataset: Dataset, budget: Budget) -> Dataset:
    """The first rows of each part, as many as the budget allows; parts are in random order."""
    limits = {
        "train": for_budget(budget, smoke=200, quick=2000, standard=10_000, full=10**9),
        "val": for_budget(budget, smoke=50, quick=500, standard=1000, full=10**9),
        "test": for_budget(budget, smoke=50, quick=500, standard=1000, full=10**9),
    }
    parts = {name: getattr(dataset, name) for name in limits}
    if all(len(part) <= limits[name] for name, part in parts.items()):
        return dataset
    heads = {}
    for name, part in parts.items():
        heads[name] = Split(part.x[: limits[name]], None if part.y is None else part.y[: limits[name]])
    sizes = ", ".join(f"{len(head):,} of {len(parts[name]):,} for {name}" for name, head in heads.items())
    notes = (*dataset.notes, f"budget {budget} takes {sizes}.")
    return replace(dataset, train=heads["train"], val=heads["val"], test=heads["test"], notes=notes)


def _read_images(path: Path, target: str | None, seed: int, longest_side: int) -> Dataset:
    """Grey images, no side longer than told; a folder is brought to the shape of its first image."""
    if target is not None:
        raise DataError(f"{path} holds images, which have no column {target!r}; leave the target out.")
    found = (
        _first_size(path)
        if path.is_dir()
        else images.read(path, seed=seed, channels="grey").train.x.shape[1:]
    )
    if found is None:
        return images.read(path, None, seed, channels="grey")  # it says what is wrong with the first image
    scale = min(1.0, longest_side / max(found))
    size = (max(1, round(found[0] * scale)), max(1, round(found[1] * scale)))
    dataset = images.read(path, size, seed, channels="grey")
    if size == tuple(found):
        return dataset
    note = f"the images, {found[0]}x{found[1]} pixels, were brought to {size[0]}x{size[1]}."
    return replace(dataset, notes=(*dataset.notes, note))


def _first_size(folder: Path) -> tuple[int, int] | None:
    """Height and width of the first image of a folder; None where it cannot be read."""
    listings, _ = list_images(folder)
    try:
        with Image.open(next(iter(listings.values())).files[0]) as image:
            return image.height, image.width
    except (OSError, UnidentifiedImageError):
        return None


def _image_states(dataset: Dataset) -> tuple[dict[str, Int[Tensor, "rows variables"]], tuple[int, ...]]:
    levels = dataset.train.x
    n = min(GREY_LEVELS, int(levels.max()) - int(levels.min()) + 1)
    bins = GreyBins(max(2, n)).fit(levels)
    states = {name: bins.transform(getattr(dataset, name).x).flatten(1) for name in PARTS}
    return states, (bins.n_states,) * states["train"].shape[1]


# -- tables --------------------------------------------------------------------------------------------------


def _with_table(dataset: Dataset, path: Path) -> tuple[Dataset, Table]:
    """The rows as they are, with the target back among the columns; and a note on their rules."""
    frames = {name: _whole_rows(dataset, getattr(dataset, name)) for name in PARTS}
    where = rules_path(path)
    rules = _read_rules(where, frames) if companions(path) else None
    if rules is not None:
        broken = [rules.violation_rate(frame) * len(frame) for frame in frames.values()]
        share = sum(broken) / sum(len(frame) for frame in frames.values())
        many = "rule" if len(rules) == 1 else "rules"
        note = f"{where.name} has {len(rules)} {many}, which {share:.2%} of these rows break."
        dataset = replace(dataset, notes=(*dataset.notes, note))
    bins = TableBins(TABLE_BINS).fit(frames["train"])
    return dataset, Table(**frames, bins=bins, rules=rules, rules_name=where.name)


def _whole_rows(dataset: Dataset, part: Split) -> pd.DataFrame:
    """The columns of a part with the target as the last one: its number, or the name of its class."""
    import pandas as pd

    if not dataset.target:
        frame: pd.DataFrame = part.x
        return frame
    target = np.asarray(part.y)
    if dataset.classes:
        names = pd.Series(dataset.classes)
        numbers = pd.to_numeric(names, errors="coerce")
        target = (names if numbers.isna().any() else numbers).to_numpy()[target]
    whole: pd.DataFrame = part.x.assign(**{dataset.target: target})
    return whole


def _read_rules(path: Path, frames: dict[str, pd.DataFrame]) -> LinearConstraints:
    """The rules of a file, over columns of numbers that the table has."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text ({error}); write it again.") from error
    try:
        rules = LinearConstraints.parse(text, list(frames["train"].columns))
        for frame in frames.values():
            rules.values(frame)  # refuses rules about columns that hold no numbers
    except PaperbackError as error:
        raise type(error)(f"{path}: {error}") from error
    return rules


def _table_states(
    dataset: Dataset, table: Table
) -> tuple[dict[str, Int[Tensor, "rows variables"]], tuple[int, ...]]:
    """The columns as states, but for the class, which is a variable of its own kind."""
    bins = table.bins
    kept = [i for i, name in enumerate(bins.columns) if not (dataset.classes and name == dataset.target)]
    if not kept:
        raise DataError(
            f"every column beside the target {dataset.target} is constant, so there is nothing to model; "
            "check the file."
        )
    states = {name: bins.transform(getattr(table, name))[:, kept] for name in PARTS}
    return states, tuple(bins.n_states[i] for i in kept)
