"""The study's wiring, and its simulations against the closed form."""

import numpy as np
import pytest

from paperback.search.studies import population as study
from paperback.study import Run


def test_a_smoke_run_records_everything(tmp_path):
    run = Run("population", budget="smoke", seeds=(0, 1), out=tmp_path, progress=False)
    study.study(run)
    finding = run.finding("complete")
    assert len(finding.claims) == 9
    assert {table.name for table in finding.tables} == {"toy", "quadratic", "fashion_mnist"}
    assert {figure.name for figure in finding.figures} == {"toy", "quadratic", "fashion_mnist"}


@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_the_noisy_quadratic_has_its_expected_loss(rate):
    """x is an autoregression, so that its second moment is known at every step."""
    steps, c = 150, study.CURVATURES
    a = (1 - rate * c) ** 2
    second = 25.0 * a**steps + rate**2 * c * (1 - a**steps) / (1 - a)
    expected = 0.5 * float(c @ second)
    simulated = study.descend(np.full((steps, 4000), rate), 0)
    assert simulated.mean() == pytest.approx(expected, abs=4 * simulated.std() / 4000**0.5)
    trainable, losses = study.Quadratic(), []
    for seed in range(200):
        trainable.setup({"lr": rate}, seed)
        losses.append([trainable.step()["loss"] for _ in range(steps // study.CHUNK)][-1])
    assert np.mean(losses) == pytest.approx(expected, abs=4 * np.std(losses) / 200**0.5)


def test_workers_of_the_toy_stop_where_the_paper_says():
    """Each sees one coordinate: the other keeps its 0.9, and Q is 1.2 - 0.81."""
    toy = study.Toy()
    toy.setup({"h0": 1.0, "h1": 0.0}, 0)
    scores = [toy.step()["score"] for _ in range(800)]
    assert scores[0] == pytest.approx(1.2 - (0.9 * 0.98) ** 2 - 0.81)
    assert scores[-1] == pytest.approx(0.39, abs=1e-6)
