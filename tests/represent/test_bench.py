"""The bench of the represent wing: data, every contender in a tiny configuration, a whole comparison."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image

import paperback
from paperback.compare import compare
from paperback.compare.bench import READING, Bench
from paperback.compare.job import Result
from paperback.compare.worker import load_data
from paperback.errors import DataError
from paperback.represent.bench import BENCH, _labelled

NAMES = [contender.name for contender in BENCH.contenders]


@pytest.fixture(scope="module")
def fashion():
    return BENCH.load(None, None, "smoke", 0)


def test_the_bench_is_what_compare_expects():
    assert isinstance(BENCH, Bench)
    assert BENCH.primary.name == "accuracy_10"
    assert BENCH.cost.name == "fit_seconds"
    methods = {contender.name for contender in BENCH.contenders if contender.kind == "method"}
    assert all(paperback.catalogue.find(name).task == "represent" for name in methods)
    assert len(methods) == 4


@pytest.mark.parametrize("name", NAMES)
def test_every_contender_is_measured(name, fashion, tmp_path):
    measured = BENCH.evaluate(BENCH.contender(name), fashion, "smoke", 0, tmp_path)
    assert set(measured) == {metric.name for metric in BENCH.metrics}
    assert all(value is None or math.isfinite(value) for value in measured.values())
    assert measured["accuracy_10"] > 0.1
    assert measured["accuracy_50"] is None  # 300 images in ten classes
    assert measured["flops"] > 0
    assert (tmp_path / READING).read_text().startswith("Settings: ")
    assert (tmp_path / "encoder" / "config.json").is_file()


def test_labelled_rows_are_so_many_of_each_class(fashion):
    first, second = _labelled(fashion, 10, 0, 2)
    assert (np.bincount(fashion.train[1].numpy()[first]) == 10).all()
    assert set(first) != set(second)
    assert _labelled(fashion, 50, 0, 2) == []
    assert len(_labelled(fashion, None, 0, 2)[0]) == 300


def test_folders_and_archives_are_read(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(60):
        folder = tmp_path / "photos" / ("cat" if i % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 255, (40 + i % 3, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
    data = BENCH.load(tmp_path / "photos", None, "smoke", 0)
    assert data.shape == {"in_channels": 3, "image_size": 32}
    np.savez(
        tmp_path / "a.npz",
        images=rng.integers(0, 255, (60, 24, 24), dtype=np.uint8),
        labels=np.arange(60) % 2,
    )
    assert BENCH.load(tmp_path / "a.npz", None, "smoke", 0).shape == {"in_channels": 1, "image_size": 24}


def test_images_without_a_label_are_learnt_from_and_not_judged_on(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.where(rng.random(300) < 0.6, -1, np.arange(300) % 3)
    np.savez(tmp_path / "a.npz", images=rng.integers(0, 255, (300, 16, 16), dtype=np.uint8), labels=labels)
    data = BENCH.load(tmp_path / "a.npz", None, "smoke", 0)
    assert len(data.pool) > 2 * len(data.train[0])
    for part in (data.train, data.val, data.test):
        assert len(part[1].unique()) == 3
    measured = BENCH.evaluate(BENCH.contender("pca"), data, "smoke", 0, tmp_path)
    assert measured["accuracy_10"] > 0


def test_bad_data_are_one_sentence(tmp_path):
    with pytest.raises(DataError, match="no column 'price'"):
        BENCH.load(None, "price", "smoke", 0)
    np.savez(tmp_path / "a.npz", images=np.zeros((30, 8, 8), dtype=np.uint8))
    with pytest.raises(DataError, match="labels"):
        BENCH.load(tmp_path / "a.npz", None, "smoke", 0)


def run_here(jobs, folder, engine, start):
    """What `paperback.compare.engine.run_all` does, in this process, with the cheapest encoder for all."""
    for job in jobs:
        out = folder / job.name / "artefact"
        out.mkdir(parents=True)
        measured = BENCH.evaluate(BENCH.contender("pca"), load_data(BENCH, job), "smoke", job.seed, out)
        yield job, Result(job.fingerprint, "done", metrics=dict(measured), seconds=1.0)


def test_a_comparison_from_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr("paperback.compare.comparison.run_all", run_here)
    board = compare(
        "represent", methods=["spark"], budget="smoke", seeds=1, out=tmp_path / "out", progress=False
    )
    rows = {row.contender: row for row in board.rows}
    assert set(rows) == set(NAMES) - {"adaptive-inflation", "hyperspherical", "generative-classifier"}
    assert {row.status for row in rows.values()} == {"done"}
    assert (tmp_path / "out" / "leaderboard.html").is_file()
