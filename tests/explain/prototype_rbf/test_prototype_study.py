"""The study: its wiring, and that its attacks and counts would show a violation."""

import numpy as np
import pytest
import torch

from paperback.explain.baselines import GLVQ
from paperback.explain.prototype_rbf import RBFPrototypeClassifier
from paperback.explain.studies import prototype_rbf as room
from paperback.study import Run


@pytest.fixture
def smoke(tmp_path):
    return Run("prototype-rbf", budget="smoke", seeds=[0], out=tmp_path, progress=False)


def test_the_study_runs(smoke):
    room.study(smoke)
    finding = smoke.save("complete")
    holds, robust, accuracy, glvq = finding.claims
    assert holds.measured == (0,)
    assert (robust.bar, accuracy.bar, glvq.bar) == (0.07, 0.93, -0.02)
    assert {table.name for table in finding.tables} == {"arms", "norms"}
    assert all((smoke.out / "figures" / f"{figure.name}.png").exists() for figure in finding.figures)
    assert len(finding.figures) == 4


def test_a_radius_that_is_too_large_is_found_out(smoke):
    data = room._digits(smoke, 0)
    model = RBFPrototypeClassifier(epochs=5).fit(data.train, data.train_labels)
    radii = model.certify(data.test, data.test_labels).clip(0)
    outcome = room.Outcome(model, 0.0, 0.0, radii, radii)
    for factor, found in ((1, False), (5, True)):
        left = room._stands(model, data, factor * radii, 0, smoke, lines=True)
        room._count(outcome, left, radii > 0)
        assert (outcome.violations > 0) == found
    assert outcome.attacks == 2 * (radii > 0).sum()


def test_radii_of_glvq_by_the_triangle_inequality(smoke):
    data = room._digits(smoke, 0)
    model = GLVQ(2, epochs=2).fit(data.train, data.train_labels)
    found = room._triangle_radii(model, data.test, data.test_labels)
    for i in range(10):
        distances = np.linalg.norm(data.test[i] - model.prototypes_, axis=1).reshape(10, 2).min(1)
        rivals = np.delete(distances, data.test_labels[i])
        assert found[i] == pytest.approx(max(0, (rivals.min() - distances[data.test_labels[i]]) / 2))
    assert (found <= model.certify(data.test, data.test_labels).clip(0) + 1e-6).all()


def test_attacks_climb_logarithms_that_do_not_vanish():
    model = RBFPrototypeClassifier(1, epochs=1, negative=False).fit(
        [[0.0], [1.0], [0.1], [1.1]], [0, 1, 0, 1]
    )
    x = torch.tensor([[30.0]], dtype=torch.float64, requires_grad=True)
    room._log_scores(model)(x)[0, 1].backward()
    assert x.grad.abs() > 0.1
