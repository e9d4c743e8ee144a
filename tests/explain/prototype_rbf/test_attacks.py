"""No attack within a certified radius changes a prediction: by gradients, and by lines to the boundary."""

import numpy as np
import pytest
import torch

from paperback.explain.prototype_rbf import RBFPrototypeClassifier
from paperback.explain.prototype_rbf.network import METRICS
from paperback.study.stress import boundary_line_attack, projected_gradient_attack

KINDS = [
    {},
    {"loss": "margin"},
    {"negative": False},
    {"head": "original"},
    {"head": "rbf"},
    {"vectors_per_class": 2},
    {"sigma": "per-component"},
    {"kernel": "gaussian"},
    {"metric": "manhattan"},
    {"metric": "manhattan", "kernel": "gaussian", "sigma": "per-component"},
    {"metric": "chebyshev"},
    {"metric": "chebyshev", "kernel": "gaussian"},
]
IDS = ["-".join(map(str, k.values())) or "default" for k in KINDS]


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_no_attack_within_the_certified_radius_succeeds_and_beyond_it_some_do(kind, digits):
    rows, labels, test, truth = (part[:300] for part in digits)
    model = RBFPrototypeClassifier(epochs=10, **kind).fit(rows, labels)
    radii = torch.tensor(model.certify(test, truth)).clamp_min(0)
    inputs, y = torch.tensor(test), torch.tensor(truth)
    assert (radii > 0).double().mean() > 0.6

    def scores(x):
        return model.network_(x).clamp_min(1e-300).log()

    shared = {"norm": METRICS[model.metric], "generator": torch.Generator().manual_seed(0)}
    for scale in (1.0, 0.5):
        attacked = [
            projected_gradient_attack(scores, inputs, y, radius=scale * radii, steps=15, **shared),
            boundary_line_attack(scores, inputs, y, radius=scale * radii, directions=4, **shared),
        ]
        for found in attacked:
            kept = model.predict(found.numpy()) == truth
            assert kept[(radii > 0).numpy()].all()
    beyond = projected_gradient_attack(scores, inputs, y, radius=6 * radii, steps=15, **shared)
    changed = model.predict(beyond.numpy()) != truth
    assert np.mean(changed[(radii > 0).numpy()]) > 0.5  # the attack is one, and the radius no trifle
