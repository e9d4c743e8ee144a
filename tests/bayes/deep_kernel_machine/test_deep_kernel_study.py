"""The study: its wiring, and what it measures with."""

import numpy as np

import paperback
from paperback.bayes.studies import deep_kernel_machine as room
from paperback.study import Run


def test_a_smoke_run_records_everything(tmp_path):
    run = Run("deep-kernel-machine", budget="smoke", seeds=[0], out=tmp_path, progress=False)
    room.study(run)
    finding = run.finding("complete")
    assert [claim.bar for claim in finding.claims] == [1e-5, -0.02, 0.98, 0.03, 0.0, -0.4, 3.0]
    assert {table.name for table in finding.tables} == {"diamonds", "other-tables", "finite-networks"}
    assert {figure.name for figure in finding.figures} == {"kernels", "degrees-of-freedom", "finite-networks"}
    assert paperback.load(tmp_path / "model").predict(room.diamonds(0, 5, 5).x).shape == (5,)


def test_diamonds_are_numbers_without_unmeasured_rows():
    table = room.diamonds(0, 3000, 2000)
    assert table.x.shape == (3000, 9)
    assert table.x_test.shape == (2000, 9)
    assert np.isfinite(table.x).all()
    assert (table.x[:, -3:] > 0).all()
    assert np.corrcoef(table.x[:, 0], table.y)[0, 1] > 0.9  # carat
    assert not np.array_equal(table.y, room.diamonds(1, 3000, 2000).y)
