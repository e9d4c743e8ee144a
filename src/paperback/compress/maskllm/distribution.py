"""The law of one layer's N:M mask: a categorical over patterns for each group of M weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from paperback.compress.masks import check_nm, nm_patterns
from paperback.errors import DataError
from paperback.numerics.relaxation import gumbel_softmax

MOST_PATTERNS = 1_000
INITIAL_DEVIATION = 0.01  # of the gate logits


class MaskDistribution(nn.Module):
    """Independent categorical laws over the patterns of each group of M consecutive inputs.

    Args:
        shape: (out, in) of the weight; m divides in.
        n: weights kept of a group.
        m: weights of a group.
        generator: of the initial gates, N(0, 0.01).

    Attributes:
        gates: pi, ``(patterns, groups)``, float32. The long axis comes last because torch's softmax over a
            short last axis takes 16 times as long.
        patterns: S, ``(patterns, m)``, 0 and 1.

    Raises:
        DataError: if m does not divide the inputs, or there are more than 1,000 patterns.
    """

    def __init__(
        self, shape: tuple[int, int], n: int, m: int, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        check_patterns(n, m)
        if shape[1] % m:
            raise DataError(f"the weight has {shape[1]} inputs; {n}:{m} needs a multiple of {m}.")
        self.shape, self.n, self.m = (int(shape[0]), int(shape[1])), n, m
        patterns = nm_patterns(n, m)
        gates = torch.randn(len(patterns), shape[0] * shape[1] // m, generator=generator)
        self.gates = nn.Parameter(INITIAL_DEVIATION * gates)
        self.patterns: Tensor
        self.register_buffer("patterns", patterns, persistent=False)

    @torch.no_grad()
    def add_prior(self, mask: Bool[Tensor, "out in"], strength: float = 3.0) -> None:
        """Prefer patterns that resemble a mask: pi_k += std(pi) strength (<S_k, M0> - N²/M), equation 8.

        The similarity <S_k, M0> has the mean N²/M over all patterns, so the gates' mean stays.

        Args:
            mask: M0, N:M.
            strength: alpha >= 0; at 0 nothing changes.

        Raises:
            DataError: if the mask has another shape or is not N:M.
        """
        if mask.shape != self.shape:
            raise DataError(f"the prior mask is {tuple(mask.shape)}, the weight {self.shape}.")
        check_nm(mask, self.n, self.m, name="the prior mask")
        groups = mask.reshape(-1, self.m).to(self.patterns)
        similarity = self.patterns @ groups.T - self.n**2 / self.m
        self.gates.add_(self.gates.std() * strength * similarity)

    def sample(
        self,
        scale: float,
        temperature: float,
        *,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        hard: bool = False,
    ) -> Float[Tensor, "out in"]:
        """A relaxed mask (equations 5 to 7), with a gradient to the gates.

        Args:
            scale: kappa > 0; large makes the law sharp against the noise.
            temperature: tau > 0; large makes the sample even.
            noise: Gumbel noise, ``(patterns, groups)``, or
            generator: where it comes from.
            hard: pass a single pattern forward, with the gradient of the soft sample.

        Returns:
            Numbers in [0, 1]; of each group they sum to N.
        """
        weights = gumbel_softmax(
            scale * self.gates, temperature, noise=noise, generator=generator, hard=hard, dim=0
        )
        return (weights.T @ self.patterns).view(self.shape)

    @torch.no_grad()
    def codes(self) -> Int[Tensor, "out groups"]:
        """The most likely pattern of each group, a row number of `patterns`."""
        return self.gates.argmax(0).view(self.shape[0], -1)

    def mode(self) -> Bool[Tensor, "out in"]:
        """The most likely mask: exactly N of every M."""
        return self.patterns[self.codes()].view(self.shape).bool()

    @torch.no_grad()
    def expected(self, scale: float) -> Float[Tensor, "out in"]:
        """The mean of hard samples, softmax(kappa pi) S."""
        return ((scale * self.gates).softmax(0).T @ self.patterns).view(self.shape)

    @torch.no_grad()
    def max_prob(self, scale: float) -> Float[Tensor, ""]:
        """Probability of the most likely pattern under softmax(kappa pi), the mean over groups."""
        return (scale * self.gates).softmax(0).amax(0).mean()

    def extra_repr(self) -> str:
        """Shape and pattern."""
        return f"{self.shape[0]}, {self.shape[1]}, {self.n}:{self.m}"


def check_patterns(n: Any, m: Any) -> None:
    """Check that N:M is a pattern and that its gates fit memory.

    Raises:
        DataError: if not 0 < n < m, or there are more than 1,000 patterns; the memory is named.
    """
    if not (isinstance(n, int) and isinstance(m, int) and 0 < n < m):
        raise DataError(f"nm is ({n}, {m}); give whole numbers (N, M) with 0 < N < M.")
    patterns = math.comb(m, n)
    if patterns > MOST_PATTERNS:
        raise DataError(
            f"{n}:{m} has {patterns:,} patterns, so that its gates, their gradients and moments take "
            f"{gate_bytes(n, m):,.0f} bytes a weight; choose N:M with at most {MOST_PATTERNS:,} patterns."
        )


def gate_bytes(n: int, m: int) -> float:
    """Bytes a weight of gates, gradients and two moments of Adam, all float32."""
    return 16 * math.comb(m, n) / m
