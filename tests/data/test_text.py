"""The books and the definitions, and their fixed splits."""

from __future__ import annotations

import gzip

import pytest

from paperback.data import text
from paperback.data.shipped import shipped


def test_austen_is_tested_on_persuasion() -> None:
    novels = text.austen()
    assert len(novels.test.x.encode()) == 464_351
    assert len(novels.val.x.encode()) == 200_000
    assert "Anne Elliot" in novels.test.x
    assert "Anne Elliot" not in novels.train.x + novels.val.x
    assert "Catherine" in novels.val.x


@pytest.mark.parametrize("load", [text.austen, text.kjv])
def test_parts_join_to_the_whole(load: text.austen) -> None:  # type: ignore[valid-type]
    as_text, as_bytes = load("str"), load("bytes")
    whole = gzip.decompress(shipped(f"{as_text.name}.txt.gz").read_bytes())
    parts = (as_bytes.train, as_bytes.val, as_bytes.test)
    assert b"".join(part.x for part in parts) == whole
    assert as_text.test.x.encode() == as_bytes.test.x
    assert all(part.y is None for part in parts)


def test_bible_ends_with_its_last_ten_books() -> None:
    bible = text.kjv()
    assert bible.train.x.startswith("In the beginning God created")
    assert bible.test.x.lstrip().startswith("Paul, a prisoner of Jesus Christ")
    assert bible.test.x.rstrip().endswith("be with you all. Amen.")
    assert 100_000 < len(bible.val.x) < len(bible.test.x)


def test_glosses_keep_their_own_split() -> None:
    glosses = text.wordnet_glosses()
    assert [len(part) for part in (glosses.train, glosses.val, glosses.test)] == [15_176, 1_900, 1_900]
    assert list(glosses.train.x.columns) == ["synset", "words", "text", "examples"]
    assert len(glosses.classes) == 19
    assert set(glosses.test.y.value_counts()) == {100}
    assert not glosses.train.x.isna().any(axis=None)
    assert set(glosses.train.x["synset"]).isdisjoint(glosses.test.x["synset"])
    dogs = glosses.train.x[glosses.train.y == glosses.classes.index("animal")]
    assert dogs["text"].str.contains("fish|bird|insect").mean() > 0.1
