"""The checks of the wing find what they are for."""

import numpy as np
import pytest
import torch
from sklearn.datasets import make_blobs

from paperback.explain.baselines import LogisticRegression, NearestNeighbours
from paperback.explain.interface import Explanation
from paperback.testing import check_explainer

X, Y = make_blobs(60, 3, centers=3, cluster_std=2.5, random_state=0)


def test_a_classifier_that_keeps_the_contract_passes():
    check_explainer(lambda seed: LogisticRegression(), X, Y)


class Boasting(NearestNeighbours):
    """Certifies twice what it can."""

    def _radii(self, X, y):
        return 3 * super()._radii(X, y)


class Careless(LogisticRegression):
    """Writes to what it is given."""

    def fit(self, X, y):
        super().fit(X, y)
        X[0, 0] = 0.0
        return self


class Forgetful(LogisticRegression):
    """Explains the runner-up."""

    def explain(self, X):
        found = super().explain(X)
        return Explanation(
            found.classes,
            -found.scores,
            -found.contributions,
            found.parts,
            found.inputs,
            offsets=-found.offsets,
        )


class Restless(LogisticRegression):
    """Draws from a global generator."""

    def _fit(self, X, y):
        super()._fit(X, y)
        torch.rand(1)


class Dicey(LogisticRegression):
    """Draws from the other global generator, and it shows."""

    def _fit(self, X, y):
        super()._fit(X, y)
        self.intercept_ = self.intercept_ + np.random.rand(3)  # noqa: NPY002


class Crowded(LogisticRegression):
    """A row depends on the rows beside it."""

    def explain(self, X):
        self.mean_ = np.asarray(X).mean(0)
        return super().explain(X)


class Chatty(LogisticRegression):
    def predict_proba(self, X):
        print("predicting")
        return super().predict_proba(X)


class Credulous(LogisticRegression):
    """Takes what is not finite."""

    def _rows(self, X):
        return super()._rows(np.nan_to_num(np.asarray(X)))


@pytest.mark.parametrize(
    ("kind", "check"),
    [
        (Boasting, "certificates_hold"),
        (Careless, "input_is_unchanged"),
        (Forgetful, "explanations_are_of_the_prediction"),
        (Restless, "same_seed_same_result"),
        (Dicey, "same_seed_same_result"),
        (Crowded, "batch_equals_loop"),
        (Chatty, "silent_and_without_network"),
        (Credulous, "bad_inputs_are_refused"),
    ],
)
def test_what_breaks_the_contract_is_found(kind, check):
    with pytest.raises(AssertionError, match=check):
        check_explainer(lambda seed: kind(), X, Y)
