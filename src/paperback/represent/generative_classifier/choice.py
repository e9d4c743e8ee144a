"""Which of the two probes: by cross-validated log loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedKFold, cross_val_predict

from paperback.errors import DataError
from paperback.represent.evaluate.checks import checked
from paperback.represent.generative_classifier.logistic import LogisticProbe
from paperback.represent.generative_classifier.naive_bayes import NaiveBayesProbe


@dataclass(frozen=True, eq=False)
class ProbeChoice:
    """What `choose_probe` found.

    Attributes:
        probe: the better one, fitted to all rows.
        log_losses: mean log loss of each over held-out rows, in nats.
    """

    probe: NaiveBayesProbe | LogisticProbe
    log_losses: Mapping[str, float]


def choose_probe(X: Any, y: Any, cv: int = 5, seed: int = 0) -> ProbeChoice:
    """Fit naive Bayes or logistic regression, whichever predicts held-out rows better.

    Args:
        X: features ``(rows, features)``.
        y: labels ``(rows,)``, each at least twice.
        cv: folds; fewer where a class has fewer rows.
        seed: of the folds.

    Returns:
        The fitted probe, and the log losses of both.

    Raises:
        DataError: if cv < 2, or a class has one row.
    """
    x, labels = checked(X, y, "X")
    classes, counts = np.unique(labels, return_counts=True)
    folds = min(cv, int(counts.min()))
    if folds < 2 or len(classes) < 2:
        raise DataError(
            f"cv is {cv}, and the {len(classes)} class(es) have at least {counts.min()} row(s); choosing "
            "takes two folds and two rows of each of two classes."
        )
    probes: dict[str, NaiveBayesProbe | LogisticProbe] = {
        "naive Bayes": NaiveBayesProbe(floor="auto"),
        "logistic regression": LogisticProbe(),
    }
    split = StratifiedKFold(folds, shuffle=True, random_state=seed)
    losses = {
        name: float(
            log_loss(
                labels, cross_val_predict(probe, x, labels, cv=split, method="predict_proba"), labels=classes
            )
        )
        for name, probe in probes.items()
    }
    best = min(losses, key=losses.__getitem__)
    return ProbeChoice(probes[best].fit(x, labels), losses)
