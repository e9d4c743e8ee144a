"""Classifiers whose decisions can be read, changed and, for some, guaranteed.

Every method is a scikit-learn classifier with `explain`: contributions of named parts that add up to each
class's score.
"""

from paperback.explain.interface import ExplainableClassifier, Explanation
from paperback.explain.prototype_rbf import RBFPrototypeClassifier

__all__ = ["ExplainableClassifier", "Explanation", "RBFPrototypeClassifier"]
