"""Text that ships: six novels by Jane Austen, the King James Bible, and the definitions of WordNet.

The books are running text, split at fixed places between whole works so that the test part is a book that
was never seen. Bytes and characters agree but for one pound sign in Austen.
"""

from __future__ import annotations

import gzip
from typing import Literal

import numpy as np

from paperback.data.dataset import Dataset, Split
from paperback.data.shipped import manifest, shipped

Form = Literal["str", "bytes"]

_AUSTEN_VAL_BYTES = 200_000
_KJV_PARTS = 10  # the last ten parts are the test, the ten before them the validation part


def austen(form: Form = "str") -> Dataset:
    """Six novels by Jane Austen, one paragraph per line with a blank line between.

    The test part is *Persuasion* (464,351 bytes), the validation part the last 200,000 bytes of *Northanger
    Abbey*, the training part everything before (3,353,047 bytes).

    Args:
        form: "str" for text, "bytes" for its UTF-8 bytes.

    Returns:
        A `Dataset` of kind "text"; x of each split is one str or bytes, y is None.
    """
    start = manifest()["austen.txt.gz"]["parts"][-1]["start"]
    return _running_text(
        "austen",
        cuts=(start - _AUSTEN_VAL_BYTES, start),
        form=form,
        source="R package janeaustenr (Project Gutenberg's texts), from Debian r-cran-janeaustenr 1.0.0",
        licence="public domain; the package is MIT (J. Silge)",
        description="six novels by Jane Austen (1811 to 1817); the test is Persuasion.",
    )


def kjv(form: Form = "str") -> Dataset:
    """The King James Bible, one verse per line with a blank line between chapters.

    The test part is the last ten books (Philemon to Revelation), the validation part the ten before them (2
    Corinthians to Titus).

    Args:
        form: "str" for text, "bytes" for its UTF-8 bytes.

    Returns:
        A `Dataset` of kind "text"; x of each split is one str or bytes, y is None.
    """
    parts = manifest()["kjv.txt.gz"]["parts"]
    return _running_text(
        "kjv",
        cuts=(parts[-2 * _KJV_PARTS]["start"], parts[-_KJV_PARTS]["start"]),
        form=form,
        source="Debian bible-kjv-text 4.38",
        licence="public domain (Crown patent in the United Kingdom); unrestricted use if its notice is kept",
        description="the King James Bible (1611); the test is Philemon to Revelation.",
    )


def wordnet_glosses() -> Dataset:
    """Definitions of English nouns, each with one of 19 topics.

    Returns:
        A `Dataset` of kind "text". x of each split is a DataFrame of strings: ``synset``, ``words``
        (synonyms, separated by "; "), ``text`` (the definition) and ``examples`` (separated by " | ",
        mostly empty); y is the topic as a Series of int64 that indexes ``classes``. A classifier of
        ``text`` must not see ``words``. The parts are the file's own: 15,176, 1,900 and 1,900 rows.
    """
    import pandas as pd

    glosses = pd.read_csv(shipped("wordnet_glosses.csv.gz"), keep_default_na=False, dtype=str)
    classes, codes = np.unique(glosses["topic"].to_numpy(dtype=str), return_inverse=True)
    y = pd.Series(codes.astype(np.int64), index=glosses.index, name="topic")
    x = glosses.drop(columns=["topic", "split"])

    def part(name: str) -> Split:
        mine = glosses["split"] == name
        return Split(x[mine].reset_index(drop=True), y[mine].reset_index(drop=True))

    return Dataset(
        name="wordnet_glosses",
        kind="text",
        train=part("train"),
        val=part("valid"),
        test=part("test"),
        source="Princeton WordNet 3.0, from Debian wordnet-base",
        licence="WordNet 3.0 licence (free use and redistribution; keep the notice)",
        description="definitions of English nouns, each with its topic.",
        classes=tuple(str(name) for name in classes),
        target="topic",
    )


def python_manual() -> Dataset:
    """Technical prose: the reference manual of the Python that runs, as its help pages have it.

    It is unlike the other texts, so it shows what a language model trained on them keeps outside its domain.
    It comes with every Python, each version having its own wording, and is no part of the package.

    Returns:
        A `Dataset` of kind "text"; x of each split is one str, y is None. The training part is the first
        eight tenths of the pages in alphabetical order, the validation part the next, the test part the last.
    """
    import platform
    from pydoc_data.topics import topics

    pages = [topics[name] for name in sorted(topics)]
    cuts = len(pages) * 8 // 10, len(pages) * 9 // 10
    parts = pages[: cuts[0]], pages[cuts[0] : cuts[1]], pages[cuts[1] :]
    train, val, test = (Split("\n\n".join(part)) for part in parts)
    return Dataset(
        name="python_manual",
        kind="text",
        train=train,
        val=val,
        test=test,
        source=f"pydoc_data of Python {platform.python_version()}",
        licence="PSF licence; read from the interpreter, not shipped",
        description="help pages of the Python language reference.",
    )


def _running_text(
    name: str, *, cuts: tuple[int, int], form: Form, source: str, licence: str, description: str
) -> Dataset:
    """A shipped book, cut into three parts at two byte positions."""
    whole = gzip.decompress(shipped(f"{name}.txt.gz").read_bytes())
    parts = whole[: cuts[0]], whole[cuts[0] : cuts[1]], whole[cuts[1] :]
    train, val, test = (Split(part if form == "bytes" else part.decode("utf-8")) for part in parts)
    return Dataset(name, "text", train, val, test, source, licence, description)
