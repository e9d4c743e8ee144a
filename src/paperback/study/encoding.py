"""Findings to JSON and back: strict in what is read, standard in what is written.

JSON knows no NaN and no infinity. Such a number is written as null at its place, and a list beside the
document says which nulls were which, so that any JSON reader can read the file and ours gets the same numbers
back. Reading checks every key and every type: a file that is not exactly what it should be is refused with
the place where it departs.
"""

from __future__ import annotations

import math
import os
import types
import uuid
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from paperback.errors import ArtefactError

Json = Any  # what the json module reads and writes

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def encode(value: Any) -> Json:
    """Data classes, tuples, dictionaries and scalars as what `json.dumps` takes.

    Fields whose metadata says ``"local"`` are left out.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: encode(getattr(value, f.name)) for f in fields(value) if not f.metadata.get("local")}
    if isinstance(value, dict):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    return value


def decode(kind: Any, value: Json, place: str) -> Any:
    """The inverse of `encode`: a value of the type `kind`.

    Args:
        kind: a data class, a scalar type, or a tuple, dictionary, union or Literal of such; Any takes what is
            there.
        value: what the JSON file has there.
        place: where that is, for the message.

    Returns:
        The value, with lists as tuples and objects as data classes.

    Raises:
        ArtefactError: if the value is not of that type; the message names the place.
    """
    if kind is Any:
        return value
    origin, arguments = get_origin(kind), get_args(kind)
    if is_dataclass(kind) and isinstance(kind, type):
        return _decode_object(kind, value, place)
    if origin in (Union, types.UnionType):
        return _decode_union(arguments, value, place)
    if origin is Literal:
        if value in arguments and isinstance(value, str):
            return value
        raise ArtefactError(f"{place} is {value!r}, not one of {', '.join(map(repr, arguments))}.")
    if origin is tuple and isinstance(value, list):
        kinds = [arguments[0]] * len(value) if arguments[1:] == (...,) else list(arguments)
        if len(kinds) != len(value):
            raise ArtefactError(f"{place} has {len(value)} entries instead of {len(kinds)}.")
        return tuple(
            decode(k, item, f"{place}[{i}]") for i, (k, item) in enumerate(zip(kinds, value, strict=True))
        )
    if origin is dict and isinstance(value, dict):
        return {key: decode(arguments[1], item, f"{place}.{key}") for key, item in value.items()}
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind in (str, int, bool, type(None)) and type(value) is kind:
        return value
    raise ArtefactError(
        f"{place} is a {type(value).__name__} where a {getattr(kind, '__name__', kind)} belongs."
    )


def _decode_object(kind: type, value: Json, place: str) -> Any:
    if not isinstance(value, dict):
        raise ArtefactError(f"{place} is a {type(value).__name__} where an object belongs.")
    hints, required = _stored_fields(kind)
    if missing := sorted(required - value.keys()):
        raise ArtefactError(f"{place} lacks {', '.join(missing)}.")
    if foreign := sorted(value.keys() - hints.keys()):
        raise ArtefactError(f"{place} has unknown entries: {', '.join(foreign)}.")
    return kind(**{name: decode(hints[name], item, f"{place}.{name}") for name, item in value.items()})


@cache
def _stored_fields(kind: type) -> tuple[dict[str, Any], frozenset[str]]:
    """The types of a data class's stored fields, and which of them have no default."""
    stored = [f for f in fields(kind) if not f.metadata.get("local")]
    hints = get_type_hints(kind)
    required = (f.name for f in stored if f.default is MISSING and f.default_factory is MISSING)
    return {f.name: hints[f.name] for f in stored}, frozenset(required)


def _decode_union(kinds: tuple[Any, ...], value: Json, place: str) -> Any:
    # The exact type is tried first, so that 1 stays an integer in `int | float`.
    for kind in kinds:
        if kind is type(value):
            return value
    errors = []
    for kind in kinds:
        if kind is not type(None):
            try:
                return decode(kind, value, place)
            except ArtefactError as error:
                errors.append(error)
    raise errors[0]


def take_out_non_finite(document: Json, place: str = "") -> tuple[Json, dict[str, str]]:
    """Replace NaN and infinities by null.

    Args:
        document: what `encode` gives.
        place: JSON pointer (RFC 6901) of the document inside a larger one.

    Returns:
        The document without them, and where they were: JSON pointer to "NaN", "Infinity" or "-Infinity".
    """
    if isinstance(document, float) and not math.isfinite(document):
        return None, {place: "NaN" if math.isnan(document) else "Infinity" if document > 0 else "-Infinity"}
    found: dict[str, str] = {}
    if isinstance(document, dict):
        replaced: Json = {}
        for key, item in document.items():
            escaped = key.replace("~", "~0").replace("/", "~1")
            replaced[key], inside = take_out_non_finite(item, f"{place}/{escaped}")
            found |= inside
        return replaced, found
    if isinstance(document, list):
        replaced = []
        for index, item in enumerate(document):
            clean, inside = take_out_non_finite(item, f"{place}/{index}")
            replaced.append(clean)
            found |= inside
        return replaced, found
    return document, found


def put_back_non_finite(document: Json, places: dict[str, str]) -> Json:
    """The inverse of `take_out_non_finite`, in place.

    Raises:
        ArtefactError: if a pointer leads nowhere, or to something that is not null.
    """
    for pointer, name in places.items():
        keys = [key.replace("~1", "/").replace("~0", "~") for key in pointer.split("/")[1:]]
        holder, last = document, keys.pop() if keys else ""
        try:
            for key in keys:
                holder = holder[int(key)] if isinstance(holder, list) else holder[key]
            index: Any = int(last) if isinstance(holder, list) else last
            if holder[index] is not None:
                raise ValueError
            holder[index] = _NON_FINITE[name]
        except (KeyError, IndexError, ValueError, TypeError) as error:
            raise ArtefactError(
                f"not_finite names {pointer!r} as {name!r}, but there is no null at that place."
            ) from error
    return document


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part of it."""
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
