"""Who is compared, and with which settings; the validation rows choose among them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paperback.compare.bench import Contender, Kind
from paperback.explain.baselines import (
    GLVQ,
    SVM,
    Baseline,
    DecisionTree,
    LogisticRegression,
    NearestNeighbours,
)
from paperback.explain.bench.data import ExplainData
from paperback.explain.interface import ExplainableClassifier
from paperback.study.budget import Budget, for_budget

Settings = Mapping[str, Any]
Make = Callable[..., ExplainableClassifier]


@dataclass(frozen=True)
class Candidates:
    """A contender with the settings that it may be fitted with.

    Attributes:
        make: from settings to a classifier that is not fitted.
        settings: at least one.
    """

    make: Make
    settings: tuple[Settings, ...]


def differentiable_scores(model: ExplainableClassifier) -> Callable[[Tensor], Tensor] | None:
    """A fitted classifier's scores as a function of rows that gradients can follow; None without.

    Of a network with codebooks the gradient passes the snapped layer straight through, as in its training.
    """
    if isinstance(model, DecisionTree | NearestNeighbours):
        return None
    if isinstance(model, Baseline):
        return model.scores
    network: Any = getattr(model, "network_", None)
    if not isinstance(network, torch.nn.Module):
        return None
    if not hasattr(model, "scale_"):
        return lambda x: network(x)
    mean, scale = (torch.as_tensor(part) for part in (model.mean_, model.scale_))
    return lambda x: network(((x - mean.to(x)) / scale.to(x)).float()).to(x)


# -- settings ------------------------------------------------------------------------------------------------


def _prototype_rbf(budget: Budget, seed: int) -> Candidates:
    from paperback.explain.prototype_rbf import RBFPrototypeClassifier

    both = ({"negative": True}, {"negative": False})
    return Candidates(
        lambda **settings: RBFPrototypeClassifier(**settings, seed=seed),
        for_budget(
            budget,
            smoke=({"n_components": 1, "epochs": 3},),
            quick=both,
            standard=tuple({**kind, "n_components": n} for kind in both for n in (2, 4, 8)),
        ),
    )


def _codebook_features(budget: Budget, seed: int) -> Candidates:
    from paperback.explain.codebook_features import CodebookExplainer

    return Candidates(
        lambda **settings: CodebookExplainer(**settings, seed=seed),
        for_budget(
            budget,
            smoke=({"hidden": (16, 8), "groups": 2, "n_codes": 8, "dense_epochs": 2, "epochs": 2},),
            quick=({"groups": 4},),
            standard=tuple({"groups": groups, "n_codes": n} for groups in (2, 4, 8) for n in (16, 64)),
        ),
    )


def _logistic(budget: Budget, seed: int) -> Candidates:
    strengths = for_budget(
        budget, smoke=(1.0,), quick=(0.01, 0.1, 1.0), standard=(1e-3, 0.01, 0.1, 1.0, 10.0)
    )
    return Candidates(LogisticRegression, tuple({"C": C} for C in strengths))


def _tree(budget: Budget, seed: int) -> Candidates:
    depths = for_budget(budget, smoke=(4,), standard=(4, 8, None))
    leaves = for_budget(budget, smoke=(1,), quick=(1, 5), standard=(1, 3, 10))
    return Candidates(
        lambda **settings: DecisionTree(**settings, seed=seed),
        tuple({"max_depth": depth, "min_samples_leaf": n} for depth in depths for n in leaves),
    )


def _neighbours(budget: Budget, seed: int) -> Candidates:
    counts = for_budget(budget, smoke=(3,), quick=(1, 3, 5), standard=(1, 3, 5, 9, 15))
    return Candidates(NearestNeighbours, tuple({"n_neighbors": k} for k in counts))


def _glvq(loss: str) -> Callable[[Budget, int], Candidates]:
    def candidates(budget: Budget, seed: int) -> Candidates:
        counts = for_budget(budget, smoke=(1,), quick=(2, 4), standard=(1, 2, 4, 8))
        epochs = for_budget(budget, smoke=3, standard=80)
        return Candidates(
            lambda **settings: GLVQ(**settings, loss=loss, epochs=epochs, seed=seed),
            tuple({"n_prototypes": n} for n in counts),
        )

    return candidates


def _svm(budget: Budget, seed: int) -> Candidates:
    strengths = for_budget(budget, smoke=(10.0,), quick=(10.0,), standard=(1.0, 10.0))
    widths = for_budget(budget, smoke=(1.0,), quick=(0.5, 1.0, 2.0), standard=(0.3, 1.0, 3.0))
    return Candidates(SVM, tuple({"C": C, "gamma": gamma} for C in strengths for gamma in widths))


# -- the list ------------------------------------------------------------------------------------------------


def _always(data: ExplainData) -> str | None:
    return None


def _has_captum(data: ExplainData) -> str | None:
    return None if importlib.util.find_spec("captum") else "needs paperback[explain] for its explanation"


def _contender(
    name: str,
    label: str,
    candidates: Callable[[Budget, int], Candidates],
    kind: Kind = "baseline",
    applies: Callable[[ExplainData], str | None] = _always,
) -> Contender:
    def build(data: ExplainData, budget: Budget, seed: int) -> Candidates:
        found = candidates(budget, seed)
        return Candidates(
            lambda **settings: found.make(**settings, image_shape=data.image_shape), found.settings
        )

    return Contender(name, label, kind, applies, build)


CONTENDERS = (
    _contender("prototype-rbf", "RBF prototypes", _prototype_rbf, "method"),
    _contender("codebook-features", "codebook features", _codebook_features, "method"),
    _contender("logistic", "logistic regression", _logistic),
    _contender("tree", "decision tree", _tree),
    _contender("neighbours", "nearest neighbours", _neighbours),
    _contender("glvq", "GLVQ", _glvq("relative")),
    _contender("glvq-margin", "GLVQ for margin", _glvq("margin")),
    _contender("svm", "SVM, integrated gradients", _svm, applies=_has_captum),
)
