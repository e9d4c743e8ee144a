"""What all circuits have beyond the density interface: the most probable completion by max-product."""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from paperback.density.interface import DensityModel, How


class Circuit(DensityModel):
    """A density model of sums and products."""

    def complete(
        self,
        X: Int[Tensor, " batch *event"],
        observed: Bool[Tensor, " batch *event"],
        how: How | Literal["mpe-approx"] = "mode",
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Fill in what was not observed; observed entries come back untouched.

        Args:
            X: states, ``(batch, *event)``; unobserved entries are ignored.
            observed: mask of the known entries.
            how: "mode", "mean" and "sample" as for every density model. "mpe-approx" fills in all hidden
                entries jointly by max-product: the entries that have, together with one choice at every sum,
                the largest probability. Where each row leaves a sum at most one choice ("chow_liu",
                "independent") that is the most probable explanation, exactly; where latents are summed out it
                is an approximation, since to find the exact one is NP-hard.
            generator: source of randomness for "sample"; a fresh one with seed 0 if not given.

        Returns:
            ``(batch, *event)``: of X's dtype, or float32 for "mean".

        Raises:
            DataError: if X, the mask or `how` cannot be used.
        """
        if how != "mpe-approx":
            return super().complete(X, observed, how, generator)
        states, mask = self.check(X, observed)
        assert mask is not None
        return torch.where(mask, states, self._most_probable(states, mask)).reshape(X.shape).to(X)

    @abstractmethod
    def _most_probable(
        self, states: Int[Tensor, "batch variables"], observed: Bool[Tensor, "batch variables"]
    ) -> Int[Tensor, "batch variables"]:
        """States of the unobserved variables by max-product; what stands at the others does not matter."""
