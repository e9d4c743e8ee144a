"""Pruning in one shot: by magnitude, by Wanda, by SparseGPT."""

from paperback.compress.pruning.interface import MaskPruner
from paperback.compress.pruning.magnitude import Magnitude
from paperback.compress.pruning.sparsegpt import SparseGPT, prune_matrix, sparsegpt_scores, update_matrix
from paperback.compress.pruning.wanda import Wanda, wanda_scores

__all__ = [
    "Magnitude",
    "MaskPruner",
    "SparseGPT",
    "Wanda",
    "prune_matrix",
    "sparsegpt_scores",
    "update_matrix",
    "wanda_scores",
]
