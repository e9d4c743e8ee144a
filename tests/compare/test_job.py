import json
from dataclasses import replace

import pytest

from paperback.compare.job import Job, Result, content_hash, fingerprint, read_job, read_result, write_json
from paperback.errors import DataError

RESULT = Result(
    "abc", "done", metrics={"loss": 0.5, "size": None}, seconds=1.5, peak_memory=7, artefact="artefact"
)


def test_a_job_and_a_result_come_back_as_they_were(tmp_path):
    job = Job("m:B", "plain", 3, "quick", None, "price", None, "abc")
    write_json(tmp_path / "job.json", job)
    assert read_job(tmp_path / "job.json") == job
    write_json(tmp_path / "result.json", RESULT)
    assert read_result(tmp_path, "abc") == RESULT


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(path.read_bytes()[:-20]),
        lambda path: path.write_text("[]"),
        lambda path: path.write_text('{"status": "done"}'),
        lambda path: path.write_bytes(b"\xff\xfe"),
        lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | {"status": "perhaps"})),
    ],
)
def test_a_result_that_is_not_whole_does_not_count(tmp_path, damage):
    write_json(tmp_path / "result.json", RESULT)
    damage(tmp_path / "result.json")
    assert read_result(tmp_path, "abc") is None


def test_a_result_of_another_specification_does_not_count(tmp_path):
    write_json(tmp_path / "result.json", replace(RESULT, fingerprint="other"))
    assert read_result(tmp_path, "abc") is None


def test_nothing_half_written_is_left_when_a_value_is_not_json(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "result.json", replace(RESULT, seconds=float("nan")))
    assert list(tmp_path.iterdir()) == []


def test_fingerprints_differ_in_every_part():
    base = {"task": "density", "data": None, "budget": "quick", "seed": 0}
    seen = {fingerprint(**base)} | {fingerprint(**(base | {key: "other"})) for key in base}
    assert len(seen) == 5
    assert fingerprint(**dict(reversed(base.items()))) == fingerprint(**base)


def test_the_hash_of_a_folder_sees_names_and_contents_but_not_hidden_files(tmp_path):
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats" / "1.png").write_bytes(b"one")
    before = content_hash(tmp_path)
    (tmp_path / ".DS_Store").write_bytes(b"noise")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "x").write_bytes(b"noise")
    assert content_hash(tmp_path) == before
    (tmp_path / "cats" / "1.png").write_bytes(b"two")
    changed = content_hash(tmp_path)
    (tmp_path / "cats" / "1.png").rename(tmp_path / "cats" / "2.png")
    assert len({before, changed, content_hash(tmp_path)}) == 3


def test_the_hash_of_nothing_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no file or folder .*nowhere\.csv"):
        content_hash(tmp_path / "nowhere.csv")
