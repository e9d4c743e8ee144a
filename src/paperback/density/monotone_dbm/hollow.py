"""Monotone hollow couplings: the pairwise weights Phi with zero diagonal blocks and bounded largest
eigenvalue (paper, section 3.1).

    A = [A_1 .. A_n] (rows x N),   Ahat_i = A_i min(sqrt(limit) / ||A_i||_2, 1),   Phi = blkdiag(Ahat'Ahat) -
    Ahat'Ahat.

blkdiag(Ahat'Ahat) <= limit I and -Ahat'Ahat <= 0, so the largest eigenvalue of Phi is at most `limit`,
whatever A is.

`MonotoneHollow` holds A as a module. Its `coupling()` computes, once per weight update, what every iteration
needs (norms, scales, diagonal blocks, or Phi itself) and returns a `DenseCoupling` or a `ConvCoupling`: the
linear map Phi and its factors, without further state.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from paperback.density.monotone_dbm.structure import Structure, padding
from paperback.errors import DataError

Engine = Literal["auto", "dense", "conv"]
DENSE_LIMIT = (
    4_096  # "auto" materialises Phi up to this N: one matrix product then beats many small convolutions
)
DENSE_MAXIMUM = 20_000  # Phi of this N takes 1.6 GB in float32


class DenseCoupling:
    """Phi and Ahat as matrices.

    Args:
        structure: the variables.
        scaled: Ahat, ``(rows, N)``.
        same: ``(N, N)``, True where two states belong to one variable.
    """

    def __init__(self, structure: Structure, scaled: Float[Tensor, "rows N"], same: Tensor) -> None:
        self.structure = structure
        self.scaled = scaled
        gram = scaled.T @ scaled
        self.phi = -gram.masked_fill(same, 0.0)
        self.diagonal = gram.diagonal()  # (Ahat_i' Ahat_i)_kk, for the bound on log Z

    def __call__(self, q: Float[Tensor, "batch N"]) -> Float[Tensor, "batch N"]:
        """Phi q for every row of a batch."""
        return q @ self.phi

    def rows(self, q: Float[Tensor, "batch N"]) -> Float[Tensor, "batch rows"]:
        """Ahat q."""
        return q @ self.scaled.T

    def rows_transposed(self, u: Float[Tensor, "batch rows"]) -> Float[Tensor, "batch N"]:
        """Ahat' u."""
        return u @ self.scaled

    def detach(self) -> DenseCoupling:
        """The same map outside the graph, sharing memory."""
        twin = object.__new__(DenseCoupling)
        twin.structure, twin.scaled = self.structure, self.scaled.detach()
        twin.phi, twin.diagonal = self.phi.detach(), self.diagonal.detach()
        return twin


class ConvCoupling:
    """Phi as convolutions and their transposes, with the diagonal blocks added back position by position.

    Args:
        structure: the variables.
        weights: (row block, tier) to kernel ``(channels, tier channels, k, k)``, or to a matrix ``(channels,
            tier size)``.
        scales: per tier ``(groups, period height, period width)``.
        blocks: per tier the diagonal blocks of Ahat'Ahat, ``(groups, states, states, period height, period
            width)``.
    """

    def __init__(
        self,
        structure: Structure,
        weights: dict[tuple[int, int], Tensor],
        scales: list[Tensor],
        blocks: list[Tensor],
    ) -> None:
        self.structure = structure
        self.blocks = blocks
        self.weights = dict(weights)
        # A scale that is the same at every position goes into the weights, once; one that is not multiplies
        # the state.
        self.scales: list[Tensor | None] = []
        for t, (tier, scale) in enumerate(zip(structure.tiers, scales, strict=True)):
            uniform = tier.spatial and structure.periods[t] == (1, 1)
            for (r, seen), weight in weights.items():
                if seen == t and uniform:
                    per_channel = scale.reshape(-1, 1).expand(-1, tier.states).reshape(1, -1, 1, 1)
                    self.weights[r, t] = weight * per_channel
            self.scales.append(None if uniform else self._tile(t, scale[:, None]))

    def _tile(self, t: int, values: Tensor) -> Tensor:
        """From one period ``(groups, states, height, width)`` to all positions of a tier, ``(groups, states,
        positions)``.
        """
        tier = self.structure.tiers[t]
        height, width = (tier.height, tier.width) if tier.spatial else (1, tier.positions)
        return values.repeat(1, 1, height // values.shape[2], width // values.shape[3]).flatten(2)

    @property
    def diagonal(self) -> Float[Tensor, " N"]:
        """(Ahat_i' Ahat_i)_kk of every state of every variable."""
        parts = [
            self._tile(t, block.diagonal(dim1=1, dim2=2).movedim(-1, 1))
            for t, block in enumerate(self.blocks)
        ]
        return torch.cat([part.flatten() for part in parts])

    def _scale(self, q: Tensor) -> list[Tensor]:
        parts = self.structure.split(q)
        return [
            part if scale is None else part * scale for part, scale in zip(parts, self.scales, strict=True)
        ]

    def _rows(self, parts: list[Tensor]) -> list[Tensor]:
        """Ahat q, one tensor per row block."""
        blocks = []
        for r in range(len(self.structure.rows)):
            dense = self.structure.dense_rows(r)
            total: Tensor | None = None
            for t, tier in enumerate(self.structure.tiers):
                weight = self.weights.get((r, t))
                if weight is None:
                    continue
                if dense:
                    seen = parts[t].flatten(1) @ weight.T
                else:
                    stride = self.structure.strides[r][t]
                    image = parts[t].reshape(-1, tier.channels, tier.height, tier.width)
                    seen = F.conv2d(image, weight, stride=stride, padding=padding(stride, weight.shape[-1]))
                total = seen if total is None else total + seen
            assert total is not None
            blocks.append(total)
        return blocks

    def _rows_transposed(self, blocks: list[Tensor]) -> list[Tensor]:
        """Ahat' u, one tensor ``(batch, groups, states, positions)`` per tier."""
        parts = []
        batch = len(blocks[0])
        for t, tier in enumerate(self.structure.tiers):
            total: Tensor | None = None
            for r, block in enumerate(blocks):
                weight = self.weights.get((r, t))
                if weight is None:
                    continue
                if self.structure.dense_rows(r):
                    seen = block @ weight
                else:
                    stride, kernel = self.structure.strides[r][t], weight.shape[-1]
                    pad = padding(stride, kernel)
                    missing = (
                        (tier.height + 2 * pad - kernel) % stride,
                        (tier.width + 2 * pad - kernel) % stride,
                    )
                    seen = F.conv_transpose2d(
                        block, weight, stride=stride, padding=pad, output_padding=missing
                    )
                seen = seen.reshape(batch, tier.groups, tier.states, tier.positions)
                total = seen if total is None else total + seen
            if total is None:
                total = blocks[0].new_zeros(batch, tier.groups, tier.states, tier.positions)
            scale = self.scales[t]
            parts.append(total if scale is None else total * scale)
        return parts

    def _own(self, t: int, part: Tensor) -> Tensor:
        """blkdiag(Ahat'Ahat) q of one tier."""
        tier, block = self.structure.tiers[t], self.blocks[t]
        height, width = block.shape[-2:]
        grid = (tier.height, tier.width) if tier.spatial else (1, tier.positions)
        # One matrix product per (group, place in the period), over all samples and repetitions of the period.
        folded = rearrange(
            part,
            "n g k (y py x px) -> (g py px) k (n y x)",
            y=grid[0] // height,
            py=height,
            px=width,
            x=grid[1] // width,
        )
        own = rearrange(block, "g a b py px -> (g py px) a b") @ folded
        return rearrange(
            own,
            "(g py px) k (n y x) -> n g k (y py x px)",
            g=tier.groups,
            py=height,
            px=width,
            n=len(part),
            y=grid[0] // height,
        )

    def __call__(self, q: Float[Tensor, "batch N"]) -> Float[Tensor, "batch N"]:
        """Phi q for every row of a batch."""
        across = self._rows_transposed(self._rows(self._scale(q)))
        own = [self._own(t, part) for t, part in enumerate(self.structure.split(q))]
        return torch.cat([mine.sub_(all_).flatten(1) for mine, all_ in zip(own, across, strict=True)], 1)

    def rows(self, q: Float[Tensor, "batch N"]) -> Float[Tensor, "batch rows"]:
        """Ahat q, row blocks one after the other."""
        return torch.cat([block.flatten(1) for block in self._rows(self._scale(q))], 1)

    def rows_transposed(self, u: Float[Tensor, "batch rows"]) -> Float[Tensor, "batch N"]:
        """Ahat' u."""
        shapes = [block.shape[1:] for block in self._rows(self._scale(u.new_zeros(1, self.structure.size)))]
        blocks = [
            part.unflatten(1, shape)
            for part, shape in zip(u.split([shape.numel() for shape in shapes], 1), shapes, strict=True)
        ]
        return torch.cat([part.flatten(1) for part in self._rows_transposed(blocks)], 1)

    def detach(self) -> ConvCoupling:
        """The same map outside the graph, sharing memory."""
        twin = object.__new__(ConvCoupling)
        twin.structure = self.structure
        twin.weights = {key: weight.detach() for key, weight in self.weights.items()}
        twin.scales = [None if scale is None else scale.detach() for scale in self.scales]
        twin.blocks = [block.detach() for block in self.blocks]
        return twin


Coupling = DenseCoupling | ConvCoupling


class MonotoneHollow(nn.Module):
    """The weights A of a monotone hollow coupling, between variables of any structure.

    Args:
        structure: tiers and row blocks.
        limit: upper bound on the eigenvalues of Phi; None leaves A as it is (not monotone).
        center: subtract from each A_i its mean over the states of variable i. It changes Phi_ij only by terms
            constant in one index,
            that is by biases, and makes the norms smaller: more coupling under the same limit.
        engine: "dense" materialises Phi, "conv" applies convolutions, "auto" takes "dense" up to N = 4,096.
        lipschitz_max: scale A as a whole so that ||Ahat||^2 stays below this; None does not.
        generator: source of the initial weights, A ~ N(0, 1 / rows that a variable meets), which puts the
            norms near the limit.

    Raises:
        DataError: if the dense engine is asked for with N > 20,000, or the engine is unknown.
    """

    # Where the power iterations have come to: approximate eigenvectors of I - Phi and of Ahat'Ahat.
    _top: Tensor
    _widest: Tensor

    def __init__(
        self,
        structure: Structure,
        limit: float | None,
        center: bool = True,
        engine: Engine = "auto",
        lipschitz_max: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if engine not in ("auto", "dense", "conv"):
            raise DataError(f'engine is {engine!r}; it must be "auto", "dense" or "conv".')
        if engine == "dense" and structure.size > DENSE_MAXIMUM:
            raise DataError(
                f"the dense engine would need a {structure.size} x {structure.size} matrix; "
                f'use engine="conv" above {DENSE_MAXIMUM}.'
            )
        self.structure = structure
        self.limit = limit
        self.center = center
        self.lipschitz_max = lipschitz_max
        self.engine = engine if engine != "auto" else ("dense" if structure.size <= DENSE_LIMIT else "conv")
        self.weights = nn.ParameterDict()
        for t, tier in enumerate(structure.tiers):
            shapes: dict[int, tuple[int, ...]] = {}
            met = 0.0  # rows of A that are not zero in the columns of one variable
            for r, (channels, kernels) in enumerate(structure.rows):
                if not kernels[t]:
                    continue
                if structure.dense_rows(r):
                    shapes[r] = (channels, tier.size)
                    met += channels
                else:
                    shapes[r] = (channels, tier.channels, kernels[t], kernels[t])
                    met += channels * (kernels[t] / structure.strides[r][t]) ** 2
            for r, shape in shapes.items():
                self.weights[f"{r}_{t}"] = nn.Parameter(torch.randn(shape, generator=generator) * met**-0.5)
        self.register_buffer("_top", torch.randn(1, structure.size, generator=generator), persistent=False)
        self.register_buffer("_widest", self._top.clone(), persistent=False)
        self._same_variable: Tensor | None = None

    # -- from A to Ahat -------------------------------------------------------------------------------------

    def _centred(self) -> dict[tuple[int, int], Tensor]:
        weights = {}
        for name, weight in self.weights.items():
            r, t = (int(part) for part in name.split("_"))
            if self.center:
                grid = weight.unflatten(1, self._column_shape(t, weight))
                weight = (grid - grid.mean(2, keepdim=True)).flatten(
                    1, weight.ndim - 1 if weight.ndim == 2 else 2
                )
                weight = weight.reshape(self.weights[name].shape)
            weights[r, t] = weight
        return weights

    def _column_shape(self, t: int, weight: Tensor) -> tuple[int, ...]:
        tier = self.structure.tiers[t]
        return (tier.groups, tier.states, tier.positions) if weight.ndim == 2 else (tier.groups, tier.states)

    def _blocks(self, weights: dict[tuple[int, int], Tensor]) -> list[Tensor]:
        """Diagonal blocks A_i'A_i of every tier over one period, ``(groups, states, states, period height,
        period width)``.
        """
        blocks = []
        for t, tier in enumerate(self.structure.tiers):
            period = self.structure.periods[t]
            total = self._top.new_zeros(tier.groups, tier.states, tier.states, *period)
            for (r, seen), weight in weights.items():
                if seen != t:
                    continue
                grid = weight.unflatten(1, self._column_shape(t, weight))
                if weight.ndim == 2:
                    own = torch.einsum("rgap,rgbp->gabp", grid, grid).unflatten(-1, period)
                else:
                    own = self._fold_taps(
                        torch.einsum("rgaxy,rgbxy->gabxy", grid, grid), self.structure.strides[r][t]
                    )
                    own = own.repeat(1, 1, 1, period[0] // own.shape[-2], period[1] // own.shape[-1])
                total = total + own
            blocks.append(total)
        return blocks

    @staticmethod
    def _fold_taps(taps: Tensor, stride: int) -> Tensor:
        """Sum W_t'W_t over the taps t that a pixel at place u of the stride meets: those with (u + padding -
        t) mod stride = 0.
        """
        kernel = taps.shape[-1]
        place = (torch.arange(kernel) - padding(stride, kernel)) % stride
        meets = F.one_hot(place, stride).to(taps)
        return torch.einsum("gabxy,xu,yv->gabuv", taps, meets, meets)

    def coupling(self, engine: Engine | None = None) -> Coupling:
        """Phi at the current weights, in the graph; compute it once per weight update, not per iteration."""
        weights = self._centred()
        blocks = self._blocks(weights)
        scales = [self._scale(block) for block in blocks]
        conv = self._scaled_coupling(weights, blocks, scales)
        if self.lipschitz_max is not None:
            factor = self._norm_factor(conv, self.lipschitz_max)
            conv = self._scaled_coupling(weights, blocks, [scale * factor for scale in scales])
        if (engine or self.engine) == "conv":
            return conv
        eye = torch.eye(self.structure.size, device=self._top.device, dtype=self._top.dtype)
        return DenseCoupling(self.structure, conv.rows(eye).T, self._same())

    def _scaled_coupling(
        self, weights: dict[tuple[int, int], Tensor], blocks: list[Tensor], scales: list[Tensor]
    ) -> ConvCoupling:
        scaled = [block * (scale**2)[:, None, None] for block, scale in zip(blocks, scales, strict=True)]
        return ConvCoupling(self.structure, weights, scales, scaled)

    def _scale(self, block: Tensor) -> Tensor:
        """min(sqrt(limit) / ||A_i||_2, 1) for every variable: ``(groups, period height, period width)``."""
        if self.limit is None:
            return block.new_ones(block.shape[0], *block.shape[3:])
        top = torch.linalg.eigvalsh(block.movedim((1, 2), (-2, -1)))[..., -1]  # ||A_i||_2 squared
        return (self.limit / top.clamp(min=torch.finfo(block.dtype).tiny)).clamp(max=1.0).sqrt()

    def _same(self) -> Tensor:
        """``(N, N)``, True where two states belong to one variable."""
        if self._same_variable is None or self._same_variable.device != self._top.device:
            start, labels = 0, []
            for tier in self.structure.tiers:
                index = torch.arange(start, start + tier.n_variables).unflatten(
                    0, (tier.groups, 1, tier.positions)
                )
                labels.append(index.expand(-1, tier.states, -1).flatten())
                start += tier.n_variables
            label = torch.cat(labels).to(self._top.device)
            self._same_variable = label[:, None] == label
        return self._same_variable

    # -- step sizes -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def smallest_eigenvalue(self, coupling: Coupling, num_steps: int = 8) -> float:
        """Power iteration on I - Phi, started where the last call ended; approaches the smallest eigenvalue
        of Phi from above.
        """
        vector, value = self._top, 0.0
        for _ in range(num_steps):
            image = vector - coupling(vector)
            value = float(image.norm() / vector.norm())
            vector = image / image.norm()
        self._top.copy_(vector)
        return 1.0 - value

    @torch.no_grad()
    def _norm_factor(self, coupling: ConvCoupling, largest: float) -> Tensor:
        """min(sqrt(largest) / ||Ahat||_2, 1) from four power steps on Ahat'Ahat, started where the last call
        ended.
        """
        vector = self._widest
        norm = vector.new_ones(())
        for _ in range(4):
            image = coupling.rows_transposed(coupling.rows(vector))
            norm = image.norm() / vector.norm()
            vector = image / image.norm()
        self._widest.copy_(vector)
        return (largest / norm).clamp(max=1.0).sqrt()
