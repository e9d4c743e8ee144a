"""The study's worlds are what they are called, and its wiring holds."""

import numpy as np
import pytest

from paperback.represent.studies import generative_classifier as module
from paperback.study import Run


@pytest.mark.parametrize("world", ["easy", "hard", "fixed separation"])
def test_worlds_have_their_means_and_covariances(world):
    n = 6
    means, root = module._law(world, n, 2)
    x, y = module._draw(world, n, 2, 200_000, np.random.default_rng(0))
    for k in (0, 1):
        np.testing.assert_allclose(x[y == k].mean(0), np.full(n, means[k]), atol=0.05)
        np.testing.assert_allclose(np.cov(x[y == k].T), root @ root.T, atol=0.15)
    distance = np.linalg.norm(np.linalg.solve(root, np.full(n, means[1] - means[0])))
    if world == "fixed separation":
        assert distance == pytest.approx(module.DISTANCE)
    if world == "easy":
        assert distance**2 == pytest.approx(4 * (n // 2) * (1 + 1 / n))


def test_three_classes_are_brought_to_the_scale_of_the_paper():
    x, y = module._draw("easy", 4, 3, 60_000, np.random.default_rng(0))
    found = [x[y == k].mean() for k in range(3)]
    np.testing.assert_allclose(found, [-2, 0, 1], atol=0.05)


def test_the_study_runs(tmp_path):
    run = Run("generative-classifier", budget="smoke", out=tmp_path, progress=False)
    module.study(run)
    finding = run.finding("complete")
    assert len(finding.claims) == 8
    assert all(claim.verdict == "not judged" for claim in finding.claims)
    assert {figure.name for figure in finding.figures} == {"convergence", "regimes"}
