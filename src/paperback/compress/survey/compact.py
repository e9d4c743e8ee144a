"""Fewer heads of keys and values: grouped-query and multi-query attention from a model that has more.

The key (and value) projections of the heads that come to share one are averaged, which leaves the rotary
positions as they are, and a short training lets the rest of the network settle. The cache of a generation
shrinks in proportion to the heads.

Source: Ainslie et al. (2023), GQA, EMNLP, section 2.1; Shazeer (2019) for a single head.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from paperback.compress.budget import Budget
from paperback.compress.interface import Compressor, Family, Job
from paperback.compress.survey.fitting import largest_that_fits
from paperback.compress.survey.healing import Healing, heal
from paperback.errors import BudgetError, DataError, NotSupportedError


class GroupedQueries(Compressor):
    """Merges the key and value heads of a `transformers` model of the Llama kind.

    Args:
        kv_heads: heads of keys and values that stay; it must divide those there are.
        healing: the training afterwards, with the original as its teacher; only if there is training data.
        targets: not used.
        ignore: not used.
        seed: of the order of the rows.

    Raises:
        DataError: if kv_heads is below 1.
    """

    family: ClassVar[Family] = "compact"
    tuning_free: ClassVar[bool] = False
    budgets: ClassVar[tuple[str, ...]] = ("bytes", "ratio", "parameters")

    def __init__(
        self,
        kv_heads: int = 1,
        *,
        healing: Healing | None = None,
        targets: Sequence[str] | None = None,
        ignore: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        super().__init__(targets=targets, ignore=ignore, seed=seed)
        if kv_heads < 1:
            raise DataError(f"kv_heads is {kv_heads}; at least one stays.")
        self.kv_heads = kv_heads
        self.healing = healing or Healing()

    def _settle(self, budget: Budget, layers: Mapping[str, nn.Module], model: nn.Module) -> Self:
        """The most heads that meet the budget."""
        if budget.unit not in self.budgets:
            raise budget.refuse("GroupedQueries", *self.budgets)
        try:
            heads = _heads(model)
        except NotSupportedError as error:
            raise BudgetError(str(error)) from error
        settled = copy.copy(self)
        divisors = [n for n in range(heads, 0, -1) if heads % n == 0]
        settled.kv_heads = largest_that_fits(budget, model, divisors, merge_heads, "GroupedQueries")
        return settled

    def _compress(self, job: Job) -> None:
        teacher = job.teacher if job.teacher is not None else copy.deepcopy(job.model)
        before = _heads(job.model)
        merge_heads(job.model, self.kv_heads)
        job.note(
            f"Each layer keeps {self.kv_heads} of {before} heads of keys and values, and as much of "
            "its cache."
        )
        if job.data is not None and job.data.train is not None:
            job.extras["losses"] = heal(job, self.healing, teacher=teacher)


@torch.no_grad()
def merge_heads(model: nn.Module, kv_heads: int) -> None:
    """Average groups of neighbouring key and value heads, in place.

    Args:
        model: of `transformers`, of the Llama kind.
        kv_heads: how many stay.

    Raises:
        NotSupportedError: if the model has no separate key and value projections with shared heads.
        DataError: if kv_heads does not divide the heads there are.
    """
    before = _heads(model)
    if before % kv_heads:
        raise DataError(f"kv_heads is {kv_heads}; it must divide the {before} heads that there are.")
    for attention in _attentions(model):
        for name in ("k_proj", "v_proj"):
            setattr(attention, name, _merged(getattr(attention, name), before, kv_heads))
        attention.num_key_value_groups *= before // kv_heads  # type: ignore[operator, assignment]
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "num_key_value_heads"):
            module.config.num_key_value_heads = kv_heads  # type: ignore[union-attr]


def _merged(layer: nn.Linear, before: int, after: int) -> nn.Linear:
    def pooled(tensor: Tensor) -> Tensor:
        heads = tensor.view(after, before // after, len(tensor) // before, *tensor.shape[1:])
        return heads.mean(1).flatten(0, 1)

    weight = pooled(layer.weight)
    with torch.device("meta"):
        merged = nn.Linear(layer.in_features, len(weight), bias=layer.bias is not None)
    merged.weight = nn.Parameter(weight, layer.weight.requires_grad)
    if layer.bias is not None:
        merged.bias = nn.Parameter(pooled(layer.bias), layer.bias.requires_grad)
    return merged


def _attentions(model: nn.Module) -> list[nn.Module]:
    return [
        module
        for module in model.modules()
        if isinstance(getattr(module, "num_key_value_groups", None), int)
        and all(isinstance(getattr(module, name, None), nn.Linear) for name in ("k_proj", "v_proj"))
    ]


def _heads(model: nn.Module) -> int:
    heads = getattr(getattr(model, "config", None), "num_key_value_heads", None)
    if not isinstance(heads, int) or not _attentions(model):
        raise NotSupportedError(
            f"{type(model).__name__} has no grouped heads of keys and values to merge (a dense k_proj "
            "and v_proj "
            "and num_key_value_heads, as Llama has); factorise or prune its layers instead."
        )
    return heads
