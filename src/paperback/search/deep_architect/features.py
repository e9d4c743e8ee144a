"""What a surrogate sees of a model: the choices that made it, or the n-grams of its modules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal

from paperback.errors import DataError

if TYPE_CHECKING:
    from paperback.search.deep_architect.space import Walk

FeatureMap = Literal["choices", "ngram"]
FEATURE_MAPS = ("choices", "ngram")
LONGEST = 4  # n-gram, in modules


def features_of(walk: Walk, features: FeatureMap) -> dict[Any, float]:
    """Features of a finished walk.

    Args:
        walk: every choice made.
        features: "ngram" is the paper's: the number of modules, and how often each sequence of 1 to 4 modules
            with their values occurs. "choices": 1 for every choice made, name and value, and for every pair
            of them; choices that a model does not have are absent, so they count as 0.

    Returns:
        Feature to value.

    Raises:
        DataError: if there is no such feature map, or a choice is open.
    """
    if features == "choices":
        walk.specified  # noqa: B018 - raises if a choice is open
        return choice_features(walk.config)
    if features != "ngram":
        raise DataError(f"features is {features!r}; use {' or '.join(FEATURE_MAPS)}.")
    modules = walk.modules
    grams = Counter(
        modules[start : start + length]
        for length in range(1, LONGEST + 1)
        for start in range(len(modules) - length + 1)
    )
    return {"modules": float(len(modules)), **{gram: float(n) for gram, n in grams.items()}}


def choice_features(config: Mapping[str, Any]) -> dict[Any, float]:
    """Choices and their pairs of a configuration; see `features_of`."""
    made = list(config.items())
    found: dict[Any, float] = dict.fromkeys(made, 1.0)
    found.update(dict.fromkeys(combinations(made, 2), 1.0))
    return found
