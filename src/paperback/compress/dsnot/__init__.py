"""Dynamic Sparse No Training: repairs the mask of a pruned language model without training.

One-shot pruning loses, in every row, what the pruned weights gave on average,

    e_i = sum over pruned j of D_ij,   D_ij = W_ij s_j,

with s_j the expected sum of input j over a sequence. DSnoT brings e_i back to about 0 by swaps: the pruned
weight with the largest D_ij / var_j^p of the error's sign comes back, and the kept weight with the smallest
|W_ij| ||x_j|| among those whose loss also pushes e_i back goes. No gradient, no weight update; the number of
weights in a row stays.

Source: Zhang et al., Dynamic Sparse No Training: training-free fine-tuning for sparse LLMs, ICLR 2024, arXiv
2310.08915. Otherwise than in the released code, variances are pooled exactly (it drops the variance between
batches), and the cap on swaps is in proportion to the width unless given: 50 is 1.2 % of a row of the paper's
models and most of a row of a narrow one.
"""

from paperback.compress.dsnot.method import DSnoT
from paperback.compress.dsnot.refine import Refined, cycles_for, exact_swaps, refine_mask

__all__ = ["DSnoT", "Refined", "cycles_for", "exact_swaps", "refine_mask"]
