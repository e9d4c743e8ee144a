"""A restricted Boltzmann machine over categorical variables."""

from paperback.density.baselines.rbm.inference import Inference, Posterior
from paperback.density.baselines.rbm.model import CategoricalRBM

__all__ = ["CategoricalRBM", "Inference", "Posterior"]
