"""Read `methods.toml`, check it, and find methods in it.

Only the standard library is imported here, because `paperback list` must answer at once and because every
other part of the package stands on this one. Each process checks the file once, when it first reads it: that
takes milliseconds, and a slip in an entry shows up where it was made.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache
from importlib import import_module
from importlib.resources import files
from typing import Any, Final, get_type_hints

from paperback.catalogue.bibtex import ENTRY_TYPES, entry
from paperback.errors import DataError, MissingExtraError, NotSupportedError, PaperbackError

TASKS: Final[dict[str, str]] = {
    "density": "Model a joint distribution: likelihood, sampling, and completion of what was not observed.",
    "bayes": "Predict with calibrated uncertainty, from little data.",
    "compress": "Make a trained network smaller or faster.",
    "represent": "Learn features from images with few or no labels.",
    "embed": "Turn text into vectors for retrieval, similarity and topics.",
    "recommend": "Rank items from interactions between users and items.",
    "explain": "Classify by features that a person can read and correct.",
    "search": "Find architectures and hyper-parameters automatically.",
    "theory": "Measure networks, and compare what theory predicts with what holds.",
    "layers": "Drop a building block into a network.",
}
EXTRAS: Final = ("bayes", "explain", "llm", "optuna", "ray")
COUNT: Final = 71

_OF_THE_VENUE = ("venue_name", "entry_type")  # filled in by the reader
_IMPORT_PATH = re.compile(r"[\w.]+:\w+")
_AUTHOR = re.compile(r"(\S+\. )+\S.*")
_ARXIV = re.compile(r"\d{4}\.\d{4,5}")


@dataclass(frozen=True)
class Method:
    """One published method.

    Attributes:
        number: 1 to 71, its place in the catalogue.
        slug: its name on the command line.
        title: of the paper, as printed.
        authors: "A. Surname", in the order of the paper.
        year: in which the paper appeared at `venue`.
        venue: short name, such as "ICLR".
        arxiv: identifier such as "2307.04990", or "".
        task: a key of `TASKS`.
        module: where the method lives, or will live.
        summary: one sentence, what a user gets.
        keywords: what a user would search by.
        object: import path "module:name" of the class or function; "" while the method is not there yet.
        study: import path "module:name" of its study, or "".
        needs: extras without which it does not run.
        reference: "owner/repository" of the published code, or "".
        venue_name: full name of the venue.
        entry_type: kind of its BibTeX entry.
    """

    number: int
    slug: str
    title: str
    authors: tuple[str, ...]
    year: int
    venue: str
    arxiv: str
    task: str
    module: str
    summary: str
    keywords: tuple[str, ...]
    object: str = ""
    study: str = ""
    needs: tuple[str, ...] = ()
    reference: str = ""
    venue_name: str = ""
    entry_type: str = "misc"

    @property
    def available(self) -> bool:
        """Whether the method is there."""
        return bool(self.object)

    def load(self) -> Any:
        """Import the class or function of the method.

        Raises:
            NotSupportedError: if the method is not there yet.
            MissingExtraError: if a package of one of its extras is not installed.
        """
        return self._resolve(self.object, "method")

    def load_study(self) -> Callable[..., None]:
        """Import the study of the method, a function of a `paperback.study.Run`.

        Raises:
            NotSupportedError: if the method is not there yet.
            MissingExtraError: if a package of one of its extras is not installed.
        """
        study: Callable[..., None] = self._resolve(self.study, "study")
        return study

    def bibtex(self) -> str:
        """The BibTeX entry of the paper."""
        return entry(self)

    def _resolve(self, path: str, what: str) -> Any:
        if not path:
            raise NotSupportedError(
                f"{self.slug} is not built yet, so it has no {what} to import; "
                "`paperback list` shows which methods work."
            )
        module, _, name = path.partition(":")
        try:
            return getattr(import_module(module), name)
        except ModuleNotFoundError as error:
            missing = (error.name or "").partition(".")[0]
            if missing == "paperback" or not self.needs:
                raise
            extras = ",".join(self.needs)
            raise MissingExtraError(
                f"{self.slug} needs the package {missing}, which is not installed; "
                f'`pip install "paperback[{extras}]"` brings it.'
            ) from error


def parse(text: str) -> tuple[Method, ...]:
    """Read and check the catalogue.

    Args:
        text: the content of `methods.toml`.

    Returns:
        The methods in the order of their numbers, 1 to 71.

    Raises:
        DataError: naming the entry and what is wrong with it.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise DataError(f"methods.toml is not valid TOML: {error}.") from error
    venues = document.get("venues", {})
    for venue, value in venues.items():
        if not isinstance(value, list) or len(value) != 2 or value[0] not in ENTRY_TYPES:
            kinds = ", ".join(ENTRY_TYPES)
            raise DataError(
                f"venue {venue} of methods.toml must be a list of its kind ({kinds}) and its name."
            )
    found = tuple(_method(table, venues) for table in document.get("methods", []))
    _check_unique(found)
    return tuple(sorted(found, key=lambda method: method.number))


@cache
def methods() -> tuple[Method, ...]:
    """All methods of the catalogue, in the order of their numbers."""
    return parse(files("paperback.catalogue").joinpath("methods.toml").read_text(encoding="utf-8"))


def find(slug: str) -> Method:
    """The method of that name.

    Args:
        slug: its name, such as "monotone-dbm".

    Raises:
        PaperbackError: if there is none; the message names the closest ones.
    """
    by_slug = {method.slug: method for method in methods()}
    if slug in by_slug:
        return by_slug[slug]
    wanted = slug.strip().casefold().replace("_", "-").replace(" ", "-")
    inside = [name for name in by_slug if len(wanted) > 2 and (wanted in name or name in wanted)]
    close = list(dict.fromkeys(inside + difflib.get_close_matches(wanted, by_slug)))[:3]
    hint = f"did you mean {' or '.join(close)}?" if close else "`paperback list` shows all of them."
    raise PaperbackError(f"there is no method {slug!r}; {hint}")


def search(words: str = "", task: str | None = None) -> tuple[Method, ...]:
    """Methods that contain each of the words in slug, title, summary, keywords or authors.

    Args:
        words: separated by blanks, case and order do not matter; "" matches all.
        task: only those of this task.

    Returns:
        In the order of their numbers; empty if nothing matches.

    Raises:
        PaperbackError: if the task is unknown.
    """
    if task is not None:
        check_task(task)
    wanted = words.casefold().split()
    return tuple(
        method
        for method in methods()
        if task in (None, method.task) and all(word in _searchable(method) for word in wanted)
    )


def check_task(task: str) -> None:
    """Refuse a task that does not exist.

    Raises:
        PaperbackError: naming the closest tasks, or all.
    """
    if task not in TASKS:
        close = difflib.get_close_matches(task.casefold(), TASKS)
        hint = f"did you mean {' or '.join(close)}?" if close else f"the tasks are {', '.join(TASKS)}."
        raise PaperbackError(f"there is no task {task!r}; {hint}")


def _searchable(method: Method) -> str:
    return " ".join((method.slug, method.title, method.summary, *method.keywords, *method.authors)).casefold()


def _method(table: Mapping[str, Any], venues: Mapping[str, list[str]]) -> Method:
    """One checked entry."""
    name = f"entry {table.get('number', '?')} ({table.get('slug', 'without a slug')}) of methods.toml"
    if problem := _problem_of_fields(table) or _problem_of_values(table, venues):
        raise DataError(f"{name} {problem}")
    entry_type, venue_name = venues[table["venue"]]
    values: dict[str, Any] = {
        field: tuple(value) if isinstance(value, list) else value for field, value in table.items()
    }
    return Method(**values, venue_name=venue_name, entry_type=entry_type)


def _problem_of_fields(table: Mapping[str, Any]) -> str | None:
    """The first missing, unknown or mistyped field of an entry, or None."""
    types = {field: kind for field, kind in get_type_hints(Method).items() if field not in _OF_THE_VENUE}
    required = {field.name for field in fields(Method) if field.default is MISSING}
    if missing := sorted(required - table.keys()):
        return f"lacks {', '.join(missing)}."
    if unknown := sorted(table.keys() - types.keys()):
        return f"has the unknown field {', '.join(unknown)}; the fields are {', '.join(types)}."
    for field, value in table.items():
        if not _is_of(types[field], value):
            expected = "a list of strings" if types[field] not in (int, str) else types[field].__name__
            return f"has {field} = {value!r}; it must be {expected}."
    return None


def _is_of(kind: Any, value: Any) -> bool:
    """Whether a value read from TOML is of a kind: int, str, or else a list of strings."""
    if kind in (int, str):
        return type(value) is kind  # not isinstance: True is no number here
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _problem_of_values(table: Mapping[str, Any], venues: Mapping[str, list[str]]) -> str | None:
    """The first thing wrong with the values of an entry, or None."""
    slug, task, module = table["slug"], table["task"], table["module"]
    arxiv, venue, authors = table["arxiv"], table["venue"], table["authors"]
    paths = [path for path in (table.get("object", ""), table.get("study", "")) if path]
    checks = (
        (1 <= table["number"] <= COUNT, f"has a number outside 1..{COUNT}."),
        (task in TASKS, f"has the unknown task {task!r}; the tasks are {', '.join(TASKS)}."),
        (
            module == f"paperback.{task}.{slug.replace('-', '_')}",
            f"has the module {module!r}, which does not agree with its task and slug.",
        ),
        (
            not arxiv or _ARXIV.fullmatch(arxiv),
            f"has arxiv = {arxiv!r}; an identifier looks like 2307.04990.",
        ),
        (venue in venues, f"has the venue {venue!r}, which is not in the table [venues]."),
        (
            set(table.get("needs", ())) <= set(EXTRAS),
            f"needs an unknown extra; they are {', '.join(EXTRAS)}.",
        ),
        (authors and all(map(_AUTHOR.fullmatch, authors)), 'must name its authors, each as "A. Surname".'),
        (all(map(_IMPORT_PATH.fullmatch, paths)), 'must write object and study as "module:name".'),
        (len(paths) != 1, "has only one of object and study; a method that is there has both."),
    )
    return next((message for holds, message in checks if not holds), None)


def _check_unique(found: tuple[Method, ...]) -> None:
    """Numbers 1..71 each once, slugs each once."""
    numbers: dict[int, str] = {}
    slugs: dict[str, int] = {}
    for method in found:
        if method.number in numbers:
            both = f"{numbers[method.number]} and {method.slug}"
            raise DataError(f"entry {method.number} stands twice in methods.toml: {both}.")
        if method.slug in slugs:
            both = f"entries {slugs[method.slug]} and {method.number}"
            raise DataError(f"the slug {method.slug} stands twice in methods.toml: {both}.")
        numbers[method.number] = method.slug
        slugs[method.slug] = method.number
    if missing := [str(number) for number in range(1, COUNT + 1) if number not in numbers]:
        raise DataError(f"methods.toml lacks entry {', '.join(missing)}.")
