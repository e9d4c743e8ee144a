"""Each study in the catalogue once, at its smallest, through the same door as `paperback run`."""

from __future__ import annotations

import pytest

from paperback import catalogue
from paperback.study import run_study

STUDIES = [method.slug for method in catalogue.methods() if method.study]


@pytest.mark.parametrize("slug", STUDIES)
def test_the_study_runs_and_says_what_it_found(slug, tmp_path):
    finding = run_study(slug, budget="smoke", out=tmp_path / "run", progress=False)
    assert finding.status == "complete"
    assert finding.claims
    assert {claim.verdict for claim in finding.claims} == {"not judged"}
    assert finding.tables
    assert all((tmp_path / "run" / "figures" / f"{figure.name}.png").is_file() for figure in finding.figures)
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
