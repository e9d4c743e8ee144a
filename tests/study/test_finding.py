from __future__ import annotations

import json
import math
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from paperback.errors import ArtefactError
from paperback.study.claim import make_claim
from paperback.study.encoding import put_back_non_finite, take_out_non_finite, write_atomically
from paperback.study.finding import (
    Environment,
    Failure,
    FigureFile,
    Finding,
    Model,
    Table,
    read_run,
)


def example(**changes: Any) -> Finding:
    whole = Finding(
        slug="fake",
        question="Why?",
        status="complete",
        failure=None,
        budget="standard",
        seeds=(0, 1),
        data=None,
        command="paperback run fake",
        started="2026-01-02T03:04:05+00:00",
        seconds=12.5,
        peak_memory_bytes=10**8,
        environment=Environment({"python": "3.11"}, None, "Linux x86_64", 2, 10**10),
        claims=(
            make_claim("one", paper="1", measured=[1.0, math.nan], at_least=1),
            make_claim("two", paper="2", measured=2.0, baseline=[1.0, 1.5], at_most=5.0, unit="s", note="so"),
            make_claim("three", paper="3", measured=3.0, at_least=3, interval=(2.0, math.inf)),
        ),
        tables=(
            Table("t", "A table.", ("a", "b"), ((1, "x"), (None, 2.5), (True, math.nan), (-math.inf, ""))),
        ),
        figures=(FigureFile("f", "A figure.", "A line."),),
        models=(Model("m", 8, 100),),
        notes=("a note",),
    )
    return replace(whole, **changes)


def schema() -> Draft202012Validator:
    text = files("paperback.study").joinpath("findings.schema.json").read_text(encoding="utf-8")
    Draft202012Validator.check_schema(json.loads(text))
    return Draft202012Validator(json.loads(text))


def test_a_finding_survives_json_with_everything_that_is_not_finite() -> None:
    finding = example()
    again = Finding.from_json(finding.to_json())
    assert repr(again) == repr(finding)  # repr, because NaN differs from itself


@pytest.mark.parametrize(
    "finding",
    [
        example(),
        example(claims=(), tables=(), figures=(), models=(), notes=()),
        example(status="failed", failure=Failure("ValueError", "why"), budget="quick", data="my.csv"),
        example(status="running", environment=replace(example().environment, commit="abc+changes")),
    ],
)
def test_findings_satisfy_the_schema(finding: Finding) -> None:
    schema().validate(json.loads(finding.to_json()))


def test_the_schema_describes_every_field_and_no_other() -> None:
    document = json.loads(example().to_json())
    assert set(schema().schema["properties"]) == set(document)
    document["more"] = 1
    assert not schema().is_valid(document)


def test_what_is_not_finite_is_null_and_named() -> None:
    text = example().to_json()
    document = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert document["claims"][0]["measured"] == [1.0, None]
    assert document["not_finite"]["/claims/0/measured/1"] == "NaN"
    assert document["not_finite"]["/claims/2/interval/1"] == "Infinity"
    assert document["not_finite"]["/tables/0/rows/3/0"] == "-Infinity"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("a/~b", max_size=3), inner, max_size=3)
    ),
)


@given(st.lists(json_values, max_size=3))
def test_numbers_that_are_not_finite_come_back(document: list[Any]) -> None:
    clean, places = take_out_non_finite(document)
    restored = put_back_non_finite(json.loads(json.dumps(clean, allow_nan=False)), places)
    assert repr(restored) == repr(document)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("schema_version"), "not a finding of paperback"),
        (lambda d: d.update(schema_version="1"), "not a finding of paperback"),
        (lambda d: d.update(schema_version=2), "schema version 2, this paperback reads 1; update paperback"),
        (lambda d: d.update(schema_version=0), "run the study again"),
        (lambda d: d.pop("seeds"), "the finding lacks seeds"),
        (lambda d: d.update(colour="red"), "unknown entries: colour"),
        (lambda d: d.update(seconds="12"), "the finding.seconds is a str where a float belongs"),
        (lambda d: d.update(status="fine"), "the finding.status is 'fine'"),
        (lambda d: d.update(seeds=[0, 1.5]), r"the finding.seeds\[1\]"),
        (lambda d: d.update(seeds=3), "the finding.seeds"),
        (lambda d: d.update(environment=[]), "the finding.environment is a list where an object belongs"),
        (lambda d: d["claims"][1].update(verdict="maybe"), r"claims\[1\].verdict"),
        (lambda d: d["claims"][1].update(interval=[1.0]), "1 entries instead of 2"),
        (lambda d: d["claims"][0].update(bar_reached=1), "bar_reached is a int where a bool belongs"),
        (lambda d: d["models"][0].update(name="../../etc"), "Model cannot be named"),
        (lambda d: d["figures"][0].update(name="/tmp/x"), "FigureFile cannot be named"),
        (lambda d: d["tables"][0]["rows"].append([1]), "not as wide as its 2 columns"),
        (lambda d: d["not_finite"].update({"/claims/9/bar": "NaN"}), "there is no null at that place"),
        (lambda d: d["not_finite"].update({"/slug": "NaN"}), "there is no null at that place"),
        (lambda d: d.update(not_finite={"/claims/0/measured/1": "big"}), "there is no null at that place"),
    ],
)
def test_a_file_that_departs_is_refused_with_the_place(change: Any, message: str) -> None:
    document = json.loads(example().to_json())
    change(document)
    with pytest.raises(ArtefactError, match=message):
        Finding.from_json(json.dumps(document))


@given(st.integers(0, len(example().to_json()) - 3))
def test_a_truncated_file_is_refused(length: int) -> None:
    with pytest.raises(ArtefactError):
        Finding.from_json(example().to_json()[:length])


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "3", '"x"', "{}", "[" * 100_000, '{"schema_version": true}']
)
def test_foreign_json_is_refused(text: str) -> None:
    with pytest.raises(ArtefactError):
        Finding.from_json(text)


def test_reading_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="did not finish"):
        read_run(tmp_path)
    (tmp_path / "findings.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ArtefactError, match="cannot be read"):
        read_run(tmp_path)
    write_atomically(tmp_path / "findings.json", example(status="running").to_json())
    finding = read_run(tmp_path)
    assert (finding.outcome, finding.folder) == ("did not finish", tmp_path)


def test_writing_leaves_the_old_file_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old")

    def full_disk(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
