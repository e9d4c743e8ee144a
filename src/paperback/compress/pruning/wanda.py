"""Wanda: pruning by weights and activations.

The importance of a weight is its absolute value times the norm of the input that it meets,

    S_ij = |W_ij| sqrt(sum over tokens of x_j^2),

and each output row keeps its most important weights. Weights are not updated.

Source: Sun, Liu, Bair and Kolter (2024), A simple and effective pruning approach for large language models,
ICLR, equation 1 and section 3.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from paperback.compress.masks import nm_mask, row_mask
from paperback.compress.pruning.interface import MaskPruner
from paperback.compress.statistics import LayerStatistics


class Wanda(MaskPruner):
    """Keep, in each row, the weights with the largest |W_ij| times the norm of input j.

    Needs calibration data: some token ids (or inputs) like those the model will see. Arguments are those of
    `MaskPruner`.
    """

    needs = frozenset({"calibration"})
    statistics = frozenset({"moments"})

    def choose(
        self, name: str, weight: Float[Tensor, "out in"], stats: LayerStatistics
    ) -> tuple[Float[Tensor, "out in"], Bool[Tensor, "out in"]]:
        """The largest scores of each row or block; see `MaskPruner.choose`."""
        scores = wanda_scores(weight, stats.square_sum)
        if self.nm is not None:
            return weight, nm_mask(scores, *self.nm, name=name)
        return weight, row_mask(scores, self.kept(weight.shape[1], name), name=name)


def wanda_scores(
    weight: Float[Tensor, "out in"], square_sum: Float[Tensor, " in"]
) -> Float[Tensor, "out in"]:
    """Wanda's importance of each weight.

    Args:
        weight: of the layer.
        square_sum: sum over tokens of the square of each input.

    Returns:
        |W_ij| sqrt(square_sum_j), in the weight's precision.
    """
    return weight.abs() * torch.sqrt(square_sum).to(weight)
