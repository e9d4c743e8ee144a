"""Predictions with calibrated uncertainty, from little data: scikit-learn estimators that predict a law.

Every regressor has `predict_distribution`, draws whole functions where its law is a joint one, and becomes a
BoTorch model by `to_botorch`.
"""

from paperback.bayes.interface import BayesianClassifier, BayesianRegressor

__all__ = ["BayesianClassifier", "BayesianRegressor"]
