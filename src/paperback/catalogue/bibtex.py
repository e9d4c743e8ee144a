"""BibTeX entries of the papers.

The title stands in double braces, because BibTeX styles would otherwise lower the capitals of "MaskLLM" or
"Boltzmann". Accented letters stay as they are (LaTeX reads UTF-8 since 2018); letters and signs that LaTeX
cannot set in text are written as commands.
"""

from __future__ import annotations

import re
import unicodedata
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from paperback.catalogue.reader import Method

# Kind of entry -> the field that holds the name of the venue; a preprint has none.
ENTRY_TYPES: Final = {"article": "journal", "inproceedings": "booktitle", "book": "publisher", "misc": None}

_COMMANDS = str.maketrans({"&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "$": r"\$", "γ": r"$\gamma$"})
_FILLER = {
    "a",
    "an",
    "the",
    "on",
    "of",
    "for",
    "to",
    "towards",
    "in",
    "with",
    "and",
    "via",
    "how",
    "do",
    "you",
    "is",
    "all",
    "from",
}


def entry(method: Method) -> str:
    """The BibTeX entry of a method's paper, several lines without a newline at the end."""
    fields = {
        "title": f"{{{method.title.translate(_COMMANDS)}}}",
        "author": " and ".join(_author(name) for name in method.authors),
    }
    if venue_field := ENTRY_TYPES[method.entry_type]:
        fields[venue_field] = method.venue_name.translate(_COMMANDS)
    fields["year"] = str(method.year)
    if method.arxiv:
        fields |= {
            "eprint": method.arxiv,
            "archivePrefix": "arXiv",
            "url": f"https://arxiv.org/abs/{method.arxiv}",
        }
    lines = [f"  {name} = {{{value}}}," for name, value in fields.items()]
    return "\n".join([f"@{method.entry_type}{{{_key(method)},", *lines, "}"])


def _author(name: str) -> str:
    """The family name first, as in "Van den Broeck, G.": the form that BibTeX never splits wrongly."""
    initials, family = _split(name)
    return f"{family}, {initials}"


def _split(name: str) -> tuple[str, str]:
    """Initials and family name."""
    words = name.split(" ")
    count = next(i for i, word in enumerate(words) if not word.endswith("."))
    return " ".join(words[:count]), " ".join(words[count:])


def _key(method: Method) -> str:
    """Family name of the first author, year, first telling word of the title: feng2023monotone."""
    family = _split(method.authors[0])[1]
    words = re.findall(r"\w+", _ascii(method.title))
    word = next((word for word in words if len(word) > 1 and word not in _FILLER), words[0])
    return "".join(re.findall(r"[a-z]", _ascii(family))) + str(method.year) + word


def _ascii(text: str) -> str:
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().casefold()
