import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_bench import METRICS
from scipy import stats

from paperback.compare.leaderboard import note_on, rank, to_csv, write_tables
from paperback.compare.words import without_rank_text
from paperback.data.dataset import Dataset, Split


def test_one_seed_has_no_interval(make_row):
    spread = make_row("a", 0.5).metrics["loss"]
    assert (spread.mean, spread.low, spread.high) == (0.5, None, None)


def test_two_to_four_seeds_have_their_range(make_row):
    spread = make_row("a", 0.1, 0.4, 0.4).metrics["loss"]
    assert spread.mean == pytest.approx(0.3)
    assert (spread.low, spread.high) == (0.1, 0.4)


def test_five_seeds_have_a_t_interval(make_row):
    values = (0.1, 0.2, 0.3, 0.4, 0.6)
    spread = make_row("a", *values).metrics["loss"]
    expected = stats.t.interval(0.95, 4, loc=0.32, scale=stats.sem(values))
    assert (spread.low, spread.high) == pytest.approx(expected)


def test_what_is_not_measured_in_the_primary_metric_has_no_rank_and_says_so(make_board, make_row):
    other = make_row("other", 0.0)
    other = replace(other, metrics=other.metrics | {"loss": None})
    board = make_board([other, make_row("a", 0.4), make_row("b", "it hung.")])
    assert [(row.contender, row.rank) for row in board.rows] == [("a", 1), ("other", None), ("b", None)]
    assert board.without_rank == (board.rows[1],)
    assert board.rows[1].reason == 'no rank: "loss" is not measured.'
    assert [metric.name for metric in board.of_unranked] == ["size"]
    assert without_rank_text(board) == 'Not measured in "loss", and so without a rank: other.'
    assert without_rank_text(make_board([make_row("a", 0.4)])) == ""


def test_rows_are_sorted_by_the_primary_metric_and_equals_share_a_rank(make_row):
    rows = [make_row(name, loss) for name, loss in (("c", 0.3), ("a", 0.1), ("b", 0.3), ("d", 0.9))]
    assert [(row.contender, row.rank) for row in rank(rows, METRICS[0])] == [
        ("a", 1),
        ("c", 2),
        ("b", 2),
        ("d", 4),
    ]


def test_where_higher_is_better_the_highest_is_first(make_row):
    rows = [make_row(name, 0.5, cost=cost) for name, cost in (("a", 1.0), ("b", 3.0), ("c", 2.0))]
    metric = METRICS[1].__class__("fit_seconds", "x", better="higher", primary=True)
    assert [row.contender for row in rank(rows, metric)] == ["b", "c", "a"]


def test_what_cannot_be_told_from_the_best_is_marked(make_row):
    rows = [make_row("best", 0.10, 0.20), make_row("near", 0.19, 0.25), make_row("far", 0.21, 0.30)]
    assert [row.like_best for row in rank(rows, METRICS[0])] == [True, True, False]
    single = [make_row("best", 0.1), make_row("near", 0.1001)]
    assert [row.like_best for row in rank(single, METRICS[0])] == [None, None]


def test_rows_without_a_value_come_last_whatever_their_order(make_row):
    rows = [
        make_row("broken", "it broke.", "it broke."),
        make_row("waiting", n_seeds=2),
        make_row("good", 0.5, 0.6),
    ]
    ordered = rank(rows, METRICS[0])
    assert [(row.contender, row.status, row.rank) for row in ordered] == [
        ("good", "done", 1),
        ("waiting", "not run", None),
        ("broken", "failed", None),
    ]


def test_reasons_are_told_once_and_counted_where_seeds_differ(make_row):
    assert make_row("a", "it broke.", "it broke.").reason == "it broke."
    row = make_row("a", 0.5, "it broke.", "it hung.", "it broke.")
    assert row.status == "partly failed"
    assert row.reason == "2 of 4 seeds: it broke. 1 of 4 seeds: it hung."
    assert row.seeds == (0,)
    assert row.metrics["loss"].values == (0.5,)


def test_the_artefact_is_that_of_the_first_seed_that_was_done(make_row):
    assert make_row("a", "it broke.", 0.5, 0.6).artefact == "jobs/a-1/artefact/model"
    assert make_row("a", "it broke.").artefact is None


def test_the_files_hold_every_number_in_full(make_board, make_row):
    board = make_board(
        [make_row("a", 1 / 3, 2 / 3, 1.0), make_row("b", "no, it broke", "no, it broke", "no, it broke")]
    )
    write_tables(board)
    stored = json.loads((board.folder / "leaderboard.json").read_text())
    assert stored["schema_version"] == 1
    assert stored["rows"][0]["metrics"]["loss"]["values"] == [1 / 3, 2 / 3, 1.0]
    assert stored["rows"][0]["metrics"]["accuracy"] is None
    assert "folder" not in stored
    first, second = csv.DictReader(io.StringIO((board.folder / "leaderboard.csv").read_text()))
    assert float(first["loss"]) == pytest.approx(2 / 3, abs=1e-15)
    assert (float(first["loss_low"]), float(first["loss_high"])) == (1 / 3, 1.0)
    assert (first["accuracy"], first["rank"], first["seeds_done"]) == ("", "1", "3")
    assert (second["status"], second["reason"], second["loss"]) == ("failed", "no, it broke", "")


def test_the_csv_has_the_same_columns_on_every_line(make_board, make_row):
    lines = list(csv.reader(io.StringIO(to_csv(make_board([make_row("a", 0.5), make_row("b", "broke")])))))
    assert len({len(line) for line in lines}) == 1
    assert len(lines) == 3


@pytest.mark.parametrize(
    ("n", "words"), [(1, "no intervals"), (3, "range over 3 seeds"), (5, "95 % t intervals")]
)
def test_the_rule_of_the_intervals_is_said(make_board, n, words):
    assert words in make_board([], n_seeds=n).interval_rule


def test_a_metric_that_nobody_has_is_not_shown(make_board, make_row):
    board = make_board([make_row("a", 0.5)])
    assert [metric.name for metric in board.measured] == ["loss", "size", "fit_seconds"]


def test_data_sets_are_described_and_other_data_named_by_their_path():
    split = Split("some words")
    dataset = Dataset("novel", "text", split, split, split, "a library", "public domain", "one book")
    for data in (dataset, SimpleNamespace(dataset=dataset)):
        note = note_on(data, None)
        assert (note.name, note.source, note.licence) == ("novel", "a library", "public domain")
        assert "one book" in note.description
    assert note_on([1.0], Path("/data/mine.csv")).name == "mine.csv"
