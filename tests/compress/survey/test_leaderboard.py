"""The taxonomy and the table: complete, deterministic, and standing when a method falls."""

from __future__ import annotations

import json

import pytest
from tests.compress.models import llama, tokens

from paperback.compress import Budget, Compressor, Data
from paperback.compress.survey import GPTQ, RTN, FakeQuantTune, Healing, leaderboard, methods, taxonomy
from paperback.errors import DataError

CALIBRATION = Data(tokens(8, 16), tokens(4, 16, seed=1), batch_size=4)
TEXTS = {"near": tokens(4, 16, seed=2), "far": tokens(4, 16, seed=3)}


class Falls(RTN):
    """A method that fails in the middle."""

    def visit(self, name, layer, stats):
        raise ZeroDivisionError("by intent")


def run_it(methods, budgets, **settings):
    return leaderboard(
        llama(), CALIBRATION, TEXTS, budgets, methods, latency_runs=0, progress=False, **settings
    )


def test_every_branch_has_a_method_that_is_there():
    tree = taxonomy()
    assert len(tree) >= 8
    for branch in tree.values():
        for entry in branch.values():
            assert issubclass(entry.load(), Compressor)


def test_the_methods_as_a_table():
    table = methods()
    assert {"RTN", "GPTQ", "AWQ", "SmoothQuant", "Wanda", "SparseGPT", "SVD", "Distil"} <= set(table.index)
    assert set(methods(family="quantize").index) >= {"RTN", "FakeQuantTune"}
    assert "FakeQuantTune" not in methods(tuning_free=True).index
    assert table.loc["GPTQ", "needs"] == "calibration"
    with pytest.raises(DataError, match="there are"):
        methods(family="magic")


def test_a_failure_is_a_row():
    board = run_it([Falls(), RTN()], [Budget(bits=4), Budget(bits=2)])
    assert [row.failure[:17] for row in board.rows] == ["ZeroDivisionError", "", "ZeroDivisionError", ""]
    frame = board.to_frame()
    assert frame["bytes"].isna().sum() == 2
    assert len(json.loads(board.to_json())["rows"]) == 4


def test_a_budget_that_cannot_be_met_is_a_row_with_its_reason():
    (row,) = run_it(["rtn"], [Budget(ratio=0.001)]).rows
    assert row.failure.startswith("BudgetError: RTN reaches")


def test_methods_run_at_the_budgets_that_they_know():
    board = run_it(["RTN", "Magnitude"], [Budget(bits=4), Budget(density=0.5), Budget(nm=(2, 4))])
    assert [(row.method.split("(")[0], row.budget) for row in board.rows] == [
        ("RTN", "bits 4"), ("Magnitude", "density 0.5"), ("Magnitude", "nm (2, 4)"),
    ]  # fmt: skip
    assert max(row.ratio for row in board.rows) < 1  # pruned layers are packed


def test_the_same_seed_gives_the_same_table():
    tuned = FakeQuantTune(3, 16, healing=Healing(steps=2, batch_size=4))
    tables = [
        run_it([GPTQ(3, 16), tuned, "rtn"], [Budget(bits=3)], seed=1)
        .to_frame()
        .drop(columns=["seconds", "peak memory"])
        for _ in range(2)
    ]
    assert tables[0].equals(tables[1])


def test_the_front_and_the_drops():
    board = run_it([RTN(8), RTN(2), RTN(2, None)], [Budget(bits=8), Budget(bits=2)])
    on_front = [row for row in board.rows if row.on_front]
    assert on_front
    for row in board.rows:
        assert row.worst_drop == max(row.drop.values())
        beaten = any(o.bytes < row.bytes and o.worst_drop < row.worst_drop for o in board.rows)
        assert row.on_front != beaten or not beaten
    assert board.figure().axes[0].get_ylabel() == "worst rise of perplexity, %"


def test_saved_as_json(tmp_path):
    board = run_it([RTN()], [Budget(bits=4)])
    board.save(tmp_path / "table.json")
    assert json.loads((tmp_path / "table.json").read_text())["metric"] == "perplexity"


def test_what_cannot_be_compared():
    with pytest.raises(DataError, match="budget"):
        run_it([RTN()], [])
    with pytest.raises(DataError, match="no method"):
        run_it(["Gzip"], [Budget(bits=4)])
    with pytest.raises(DataError, match="tier"):
        run_it(None, [Budget(bits=4)], tier="free")
