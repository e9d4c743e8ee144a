"""A data set says what it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from paperback.data import Dataset, images, tables, text


@pytest.mark.parametrize(
    ("load", "expected"),
    [
        (
            images.digits,
            ["train 1,257, val 180, test 360, each 8 x 8, values 0 to 16", "10 of label (0, 1,", "CC BY"],
        ),
        (
            tables.credit,
            ["train 3,118, val 445, test 891, each of 13 columns", "2 of Status (bad, good)", "MIT"],
        ),
        (tables.diamonds, ["price, a number from 326 to 18823", "ggplot2"]),
        (text.kjv, ["characters:", "public domain"]),
        (lambda: text.austen("bytes"), ["bytes:", "test 464,351"]),
        (text.wordnet_glosses, ["19 of topic (act, animal,", ", ...)", "WordNet 3.0 licence"]),
    ],
)
def test_description_names_size_classes_source_and_licence(
    load: Callable[[], Dataset], expected: list[str]
) -> None:
    data = load()
    described = data.describe()
    assert described.startswith(f"{data.name}: ")
    assert data.source in described
    for words in expected:
        assert words in described


def test_a_split_unpacks_to_x_and_y() -> None:
    data = images.digits()
    x, y = data.train
    assert x is data.train.x
    assert y is data.train.y
    assert len(data.train) == len(x)
