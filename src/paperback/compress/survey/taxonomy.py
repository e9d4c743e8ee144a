"""The survey's classes of compression and one reference method of each, as data.

Every entry names the class that does it; what it needs and whether it trains are read from that class.

Source: Wang et al. (2024), arXiv 2402.09748, figure 1, and the papers of the methods.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from paperback.compress.interface import Compressor
from paperback.errors import DataError

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Entry:
    """A reference method of the survey.

    Attributes:
        name: of its class.
        branch: of the survey's tree.
        where: module of its class.
        storage: what its result is kept as.
        bytes: of a layer of n weights in r rows, in words and symbols (b bits, g weights a group).
        paper: who published it.
    """

    name: str
    branch: str
    where: str
    storage: str
    bytes: str
    paper: str

    def load(self) -> type[Compressor]:
        """Its class."""
        found: type[Compressor] = getattr(importlib.import_module(self.where), self.name)
        return found


_SURVEY, _PRUNING = "paperback.compress.survey", "paperback.compress.pruning"
_GRID = "n b / 8 + (n / g) (2 + b / 8)"
_BITMAP = "4 kept + n / 8"

ENTRIES = (
    Entry("RTN", "post-training quantization", _SURVEY, "packed codes", _GRID, "round to nearest"),
    Entry("GPTQ", "post-training quantization", _SURVEY, "packed codes", _GRID, "Frantar et al. 2023"),
    Entry("AWQ", "post-training quantization", _SURVEY, "packed codes", _GRID, "Lin et al. 2024"),
    Entry(
        "SmoothQuant",
        "weights and activations quantized",
        _SURVEY,
        "8-bit codes",
        "n + 2 r",
        "Xiao et al. 2023",
    ),
    Entry(
        "FakeQuantTune", "quantization-aware training", _SURVEY, "packed codes", _GRID, "Esser et al. 2020"
    ),
    Entry(
        "QLoRA",
        "quantization-aware training",
        _SURVEY,
        "normal floats and adapters",
        "n b / 8 + n / 32 + 4 rank (rows + columns)",
        "Dettmers et al. 2023",
    ),
    Entry("Magnitude", "unstructured pruning", _PRUNING, "bitmap and values", _BITMAP, "Han et al. 2015"),
    Entry("Wanda", "unstructured pruning", _PRUNING, "bitmap and values", _BITMAP, "Sun et al. 2024"),
    Entry(
        "SparseGPT", "unstructured pruning", _PRUNING, "bitmap and values", _BITMAP, "Frantar, Alistarh 2023"
    ),
    Entry(
        "SVD",
        "low-rank factors",
        "paperback.compress.svd",
        "two factors",
        "4 rank (rows + columns)",
        "Jaderberg et al. 2014",
    ),
    Entry(
        "Distil",
        "knowledge distillation",
        _SURVEY,
        "smaller dense",
        "4 n of the blocks kept",
        "Hinton et al. 2015",
    ),
    Entry(
        "GroupedQueries", "compact architecture", _SURVEY, "smaller dense", "4 kept", "Ainslie et al. 2023"
    ),
    Entry("EarlyExit", "dynamic network", _SURVEY, "as it was", "4 n", "Schuster et al. 2022"),
    Entry(
        "DropBlocks", "dynamic network", _SURVEY, "smaller dense", "4 n of the blocks kept", "Men et al. 2024"
    ),
)


def taxonomy() -> dict[str, dict[str, Entry]]:
    """The survey's tree: branch to method to what is known of it, in the survey's order."""
    tree: dict[str, dict[str, Entry]] = {}
    for entry in ENTRIES:
        tree.setdefault(entry.branch, {})[entry.name] = entry
    return tree


def methods(family: str | None = None, tuning_free: bool | None = None) -> pd.DataFrame:
    """The reference methods as a table.

    Args:
        family: only those of one family ("quantize", "prune", "factorize", "distill", "compact", "dynamic").
        tuning_free: only those that train (False), or that do not (True).

    Returns:
        One row a method, indexed by its name: branch, family, tuning_free, needs, budgets, storage, bytes,
        paper.

    Raises:
        DataError: if there is no such family.
    """
    import pandas as pd

    rows = []
    for entry in ENTRIES:
        method = entry.load()()  # with its own settings: on some, budgets depend on them
        rows.append(
            {
                "method": entry.name, "branch": entry.branch, "family": method.family,
                "tuning_free": method.tuning_free, "needs": ", ".join(sorted(method.needs)),
                "budgets": ", ".join(method.budgets), "storage": entry.storage, "bytes": entry.bytes,
                "paper": entry.paper,
            }
        )  # fmt: skip
    table = pd.DataFrame(rows).set_index("method")
    if family is not None:
        if family not in set(table["family"]):
            raise DataError(
                f"there is no family {family!r}; there are {', '.join(table['family'].unique())}."
            )
        table = table[table["family"] == family]
    return table if tuning_free is None else table[table["tuning_free"] == tuning_free]


def find_method(name: str) -> type[Compressor]:
    """The class of a reference method.

    Raises:
        DataError: if there is none of this name.
    """
    for entry in ENTRIES:
        if entry.name.lower() == name.lower():
            return entry.load()
    raise DataError(f"there is no method {name!r}; there are {', '.join(e.name for e in ENTRIES)}.")
