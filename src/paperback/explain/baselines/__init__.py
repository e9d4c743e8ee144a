"""The baselines of the explain wing: what is readable anyway, what is guaranteed anyway, and the ceiling.

`LogisticRegression`, `DecisionTree`, `NearestNeighbours` and `GLVQ` explain themselves and certify radii.
`SVM` is the ceiling of accuracy; it is explained by `integrated_gradients`, the attribution baseline.
"""

from paperback.explain.baselines.base import Baseline
from paperback.explain.baselines.glvq import GLVQ
from paperback.explain.baselines.gradients import integrated_gradients
from paperback.explain.baselines.linear import LogisticRegression
from paperback.explain.baselines.neighbours import NearestNeighbours
from paperback.explain.baselines.svm import SVM
from paperback.explain.baselines.tree import DecisionTree

__all__ = [
    "GLVQ",
    "SVM",
    "Baseline",
    "DecisionTree",
    "LogisticRegression",
    "NearestNeighbours",
    "integrated_gradients",
]
