"""The study, from end to end with its smallest budget."""

from paperback.density.studies.constrained_tabular import study
from paperback.study import Run


def test_smoke(tmp_path):
    run = Run("constrained-tabular", budget="smoke", seeds=[0], out=tmp_path, progress=False)
    study(run)
    finding = run.finding("complete")
    assert {table.name for table in finding.tables} == {"generators", "seeds", "cost"}
    assert {figure.name for figure in finding.figures} == {"cone", "bars"}
    rows = [claim for claim in finding.claims if claim.unit == "rows"]
    assert len(rows) == 2
    assert all(claim.measured == (0.0,) for claim in rows)
    assert {claim.verdict for claim in finding.claims} == {"not judged"}
