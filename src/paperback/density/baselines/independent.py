"""Variables that have nothing to do with each other: p(x) = prod_i p_i(x_i), from counts.

Whatever a model of dependence is worth is its distance from this one. Everything about it is exact, and
observing some variables tells nothing about the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from jaxtyping import Int
from torch import Tensor, nn

from paperback.density.interface import Capabilities, DensityModel
from paperback.errors import DataError
from paperback.numerics.spins import sample_categorical


class IndependentCategorical(DensityModel):
    """The product of the marginals.

    Args:
        n_variables: number of variables, >= 1.
        n_states: states of every variable (>= 2), or one number per variable.
        pseudo_count: rows added to the counts of every variable, spread evenly over its states; > 0, so that
            no state is impossible.
    """

    capabilities = Capabilities("exact", "exact", "exact", "exact", "exact", "none")
    log_table: Tensor

    def __init__(self, n_variables: int, n_states: int | Sequence[int], pseudo_count: float = 1.0) -> None:
        super().__init__(n_variables, n_states)
        if not pseudo_count > 0:
            raise DataError(f"pseudo_count is {pseudo_count}; it must be greater than 0.")
        self.pseudo_count = pseudo_count
        uniform = self.valid / self.valid.sum(-1, keepdim=True)
        self.register_buffer(
            "log_table", uniform.log()
        )  # (variables, states); -inf at states that a variable does not have

    def fit(
        self,
        X: Int[Tensor, " batch *event"],
        y: Int[Tensor, " batch"] | None = None,
        X_val: Int[Tensor, " batch_val *event"] | None = None,
        y_val: Int[Tensor, " batch_val"] | None = None,
        *,
        seed: int = 0,
        progress: bool = True,
        **training: Any,
    ) -> Self:
        """Count. Labels, the validation part and the seed play no role.

        Args:
            X: states ``(batch, *event)``.
            y: ignored.
            X_val: ignored.
            y_val: ignored.
            seed: ignored.
            progress: ignored; counting takes no time worth showing.
            **training: there is no setting.

        Returns:
            The model itself.

        Raises:
            DataError: if X cannot be used or a setting is given.
        """
        if training:
            raise DataError(
                f"IndependentCategorical.fit has no setting {next(iter(training))!r}; leave it out."
            )
        states, _ = self.check_training(X)
        counts = nn.functional.one_hot(states, self.max_states).sum(0).to(self.log_table)
        counts = counts + self.pseudo_count * self.valid / self.valid.sum(-1, keepdim=True)
        self.log_table.copy_((counts / counts.sum(-1, keepdim=True)).log())
        return self

    def _log_prob(self, states: Tensor, observed: Tensor | None) -> Tensor:
        log_prob = self.log_table.expand(len(states), -1, -1).gather(2, states[..., None])[..., 0]
        return (log_prob if observed is None else log_prob * observed).sum(1)

    def _conditional(self, states: Tensor, observed: Tensor) -> Tensor:
        return self.log_table.exp().expand(len(states), -1, -1)

    def _sample_conditional(self, states: Tensor, observed: Tensor, generator: torch.Generator) -> Tensor:
        return torch.where(
            observed, states, sample_categorical(self._conditional(states, observed), generator)
        )
