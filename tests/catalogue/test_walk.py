"""Walk the catalogue: a method that is there is whole, with its study, its tests and its recorded result."""

import inspect
import json
from pathlib import Path

import pytest

from paperback import catalogue

ROOT = Path(__file__).resolve().parents[2]
AVAILABLE = [method for method in catalogue.methods() if method.available]
WALK = pytest.mark.parametrize("method", AVAILABLE, ids=lambda method: method.slug)
CHECKOUT = pytest.mark.skipif(
    not (ROOT / "pyproject.toml").exists(), reason="results and tests are part of a checkout only"
)


def test_there_is_something_to_walk():
    assert AVAILABLE


@WALK
def test_object_resolves_and_is_documented(method):
    thing = method.load()
    assert inspect.isclass(thing) or inspect.isfunction(thing)
    assert thing.__module__.startswith(method.module)
    assert inspect.getdoc(thing)


@WALK
def test_study_resolves_and_takes_a_run(method):
    study = method.load_study()
    assert list(inspect.signature(study).parameters) == ["run"]
    assert inspect.getdoc(study)


@WALK
@CHECKOUT
def test_its_tests_are_there(method):
    name = method.module.rpartition(".")[2]
    folder = ROOT / "tests" / method.task
    assert any((folder / place).exists() for place in (f"test_{name}.py", f"test_{name}", name))


@WALK
@CHECKOUT
def test_its_result_is_recorded(method):
    recorded = json.loads((ROOT / "results" / f"{method.slug}.json").read_text(encoding="utf-8"))
    assert (recorded["slug"], recorded["status"], recorded["budget"]) == (method.slug, "complete", "standard")
    assert recorded["claims"]
