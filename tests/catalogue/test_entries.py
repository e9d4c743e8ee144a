"""The entries as data: that what was typed for 71 methods is plausible and consistent."""

import re
from collections import Counter

import pytest

from paperback import catalogue

ALL = pytest.mark.parametrize("method", catalogue.methods(), ids=lambda method: method.slug)


@ALL
def test_module_slug_and_task_agree(method):
    wing, name = method.module.removeprefix("paperback.").split(".")
    assert (wing, name.replace("_", "-")) == (method.task, method.slug)
    if method.available:
        assert method.object.partition(":")[0] == method.module
        assert method.study == f"paperback.{wing}.studies.{name}:study"


@ALL
def test_summary_is_one_short_sentence(method):
    assert re.fullmatch(r"[A-Z].{30,105}\.", method.summary)
    assert not re.search(r"[.!?] [A-Z]", method.summary)
    assert not method.summary.startswith(("This", "A ", "The ", "We "))


@ALL
def test_keywords_are_few_lower_case_and_distinct(method):
    assert 5 <= len(method.keywords) <= 8
    assert len(set(method.keywords)) == len(method.keywords)
    assert all(word == word.casefold().strip() for word in method.keywords)


@ALL
def test_year_fits_the_preprint(method):
    assert 2015 <= method.year <= 2026
    first = 2000 + int(method.arxiv[:2])
    assert first - 1 <= method.year <= first + 4  # a preprint mostly comes first, by a few years at most


@ALL
def test_reference_is_a_repository(method):
    assert re.fullmatch(r"|[\w.-]+/[\w.-]+", method.reference)


@pytest.mark.parametrize("field", ["slug", "title", "arxiv", "module", "summary", "authors"])
def test_no_two_methods_share(field):
    values = Counter(getattr(method, field) for method in catalogue.methods())
    assert [value for value, n in values.items() if n > 1 and value] == []
