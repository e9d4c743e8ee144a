"""The study runs through, and says what it claims."""

from paperback.study.execute import execute


def test_study_runs_at_smoke(tmp_path):
    finding = execute("criticality", budget="smoke", out=tmp_path, progress=False)
    assert finding.status == "complete"
    assert len(finding.claims) == 16
    assert {figure.name for figure in finding.figures} == {"criticality"}
    assert {table.name for table in finding.tables} == {"flow", "training", "finite_width"}
