"""Matrices as chains of small tensors: matrix product operators, tensor trains over pairs of indices.

With O = o_1 ... o_n and I = i_1 ... i_n, a matrix is the chain

    W[(o_1 .. o_n), (i_1 .. i_n)] = sum over the bonds of A_1[o_1, i_1, b_1] A_2[b_1, o_2, i_2, b_2] ... A_n

whose bond dimensions chi_k bound the rank of W rearranged as (o_1 i_1 .. o_k i_k) by the rest. `tt_svd` finds
the chain by n - 1 truncated SVDs, one bond after the other; the squared error is at most the sum of the
discarded squared singular values, with equality for n = 2, where the chain is the nearest sum of chi
Kronecker products (Van Loan and Pitsianis 1993). `tt_als` refines it in the metric of the layer's inputs.

Source: Oseledets (2011), algorithm 1; arXiv 2401.14109, section 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from paperback.errors import DataError
from paperback.numerics.linear_algebra import cholesky

UNBALANCED = 4.0  # largest over smallest factor; beyond it a size is padded
RANDOMISED_FROM = 8192  # side from which a truncated SVD is a randomised one
LARGEST_SYSTEM = 4096  # unknowns of one least-squares problem of `tt_als`


def balanced_factors(size: int, n: int) -> tuple[int, ...]:
    """A size, or the next larger one, as a product of n nearly equal factors, the largest first.

    Args:
        size: at least 1.
        n: number of factors, at least 1.

    Returns:
        Factors whose product is `size`; or, where every such product is lopsided (a prime), the least number
        above it that has better ones. The matrix is then padded with zeros.
    """
    while True:
        factors = _most_balanced(size, n, size)
        if factors[0] <= UNBALANCED * factors[-1] or size < 2**n:
            return factors
        size += 1


def bond_limits(out_shape: Sequence[int], in_shape: Sequence[int]) -> tuple[int, ...]:
    """The bond dimensions at which a chain can be any matrix: the smaller side of each rearrangement."""
    pairs = [o * i for o, i in zip(out_shape, in_shape, strict=True)]
    return tuple(min(math.prod(pairs[:k]), math.prod(pairs[k:])) for k in range(1, len(pairs)))


def core_shapes(
    out_shape: Sequence[int], in_shape: Sequence[int], chi: int
) -> list[tuple[int, int, int, int]]:
    """Shapes (chi_{k-1}, o_k, i_k, chi_k) of the cores when each bond is min(chi, its limit)."""
    bonds = [1, *(min(chi, limit) for limit in bond_limits(out_shape, in_shape)), 1]
    return [
        (left, o, i, right) for (left, right), o, i in zip(pairwise(bonds), out_shape, in_shape, strict=True)
    ]


def tt_svd(
    weight: Float[Tensor, "out in"],
    out_shape: Sequence[int],
    in_shape: Sequence[int],
    chi: int | None = None,
    eps: float | None = None,
    name: str = "weight",
) -> list[Float[Tensor, "left o i right"]]:
    """A matrix as a chain of cores, by truncated SVDs from the first bond to the last.

    Args:
        weight: computed in float64 if it is that, else in float32.
        out_shape: o_1 .. o_n, with the number of rows as their product.
        in_shape: i_1 .. i_n, with the number of columns as their product.
        chi: largest bond dimension, at least 1; exact if neither it nor eps is given.
        eps: relative error: each bond discards at most eps^2 / (n - 1) of the squared norm.
        name: of the weight, for messages.

    Returns:
        n cores ``(chi_{k-1}, o_k, i_k, chi_k)``, chi_0 = chi_n = 1; all but the last are orthogonal.

    Raises:
        DataError: if the shapes do not fit, chi or eps is out of range, or a weight is not finite.

    Source: Oseledets (2011), algorithm 1.
    """
    out_shape, in_shape = tuple(out_shape), tuple(in_shape)
    _check(weight, out_shape, in_shape, chi, eps, name)
    n = len(out_shape)
    rest = weight.to(_computing(weight)).reshape(*out_shape, *in_shape)
    rest = rest.permute([axis for k in range(n) for axis in (k, n + k)])  # (o_1, i_1, o_2, i_2, ...)
    allowed = None if eps is None else eps**2 / max(1, n - 1) * float(rest.square().sum())
    cores, left = [], 1
    for o, i in zip(out_shape[:-1], in_shape[:-1], strict=True):
        u, s, v = truncated_svd(rest.reshape(left * o * i, -1), chi, allowed)
        cores.append(u.reshape(left, o, i, len(s)))
        rest, left = s[:, None] * v, len(s)
    cores.append(rest.reshape(left, out_shape[-1], in_shape[-1], 1))
    return cores


def truncated_svd(
    matrix: Float[Tensor, "m n"], rank: int | None = None, discard: float | None = None
) -> tuple[Float[Tensor, "m r"], Float[Tensor, " r"], Float[Tensor, "r n"]]:
    """The leading part of the singular value decomposition.

    Args:
        matrix: a matrix with both sides above `RANDOMISED_FROM`, of which less than a quarter of the
            rank is wanted, is decomposed by the randomised method of Halko, Martinsson and Tropp (2011).
        rank: most singular values to keep; all if not given.
        discard: sum of squared singular values that may be left out.

    Returns:
        U, s and V^T; at least one singular value is kept.
    """
    side = min(matrix.shape)
    if rank is not None and discard is None and side > RANDOMISED_FROM and 4 * rank < side:
        from sklearn.utils.extmath import randomized_svd

        parts = randomized_svd(matrix.cpu().numpy(), rank, n_iter=4, random_state=0)
        return tuple(torch.from_numpy(part.copy()).to(matrix) for part in parts)  # type: ignore[return-value]
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    kept = len(s) if rank is None else min(rank, len(s))
    if discard is not None:
        tails = s.square().flip(0).cumsum(0)  # of the 1, 2, ... smallest
        kept = min(kept, len(s) - int((tails <= discard).sum()))
    kept = max(1, kept)
    return u[:, :kept], s[:kept], v[:kept]


def tt_matrix(cores: Sequence[Float[Tensor, "left o i right"]]) -> Float[Tensor, "out in"]:
    """The matrix of a chain."""
    return _chain_before(cores, cores[0]).squeeze(2)


def tt_apply(cores: Sequence[Float[Tensor, "left o i right"]], x: Float[Tensor, "batch in"]) -> Tensor:
    """The chain's matrix times each row of x, without making the matrix.

    Contracted from the last core to the first: with x as (batch i_1 .. i_{k-1}, (i_k chi_k), o_{k+1} .. o_n),
    each step is one product with A_k as the matrix ((chi_{k-1} o_k), (i_k chi_k)), and no index is moved.

    Returns:
        ``(batch, out)``.
    """
    batch, done = len(x), 1
    for core in reversed(cores):
        left, o, i, right = core.shape
        matrix = core.reshape(left * o, i * right)
        x = x.reshape(-1, i * right) @ matrix.T if done == 1 else matrix @ x.reshape(-1, i * right, done)
        done *= o
    return x.reshape(batch, done)


def contraction_operations(shapes: Sequence[Sequence[int]]) -> int:
    """Multiplications of `tt_apply` for one row, from the shapes of the cores."""
    total, done, ahead = 0, 1, math.prod(shape[2] for shape in shapes)
    for left, o, i, right in reversed(shapes):
        ahead //= i
        total += ahead * left * o * i * right * done
        done *= o
    return total


def matrix_operations(shapes: Sequence[Sequence[int]]) -> int:
    """Multiplications of `tt_matrix`."""
    total, entries = 0, 1
    for left, o, i, right in shapes:
        total += entries * left * o * i * right
        entries *= o * i
    return total


# -- in the metric of the inputs -----------------------------------------------------------------------------


def tt_als(
    weight: Float[Tensor, "out in"],
    cores: Sequence[Float[Tensor, "left o i right"]],
    gram: Float[Tensor, "in in"],
    sweeps: int = 4,
    name: str = "weight",
) -> list[Float[Tensor, "left o i right"]]:
    """Cores that bring tr((W - M) H (W - M)^T) down, M the chain's matrix and H the inputs' Gram matrix.

    One core after the other takes the value that is best while the others stay: alternating least squares.
    For a given o_k the unknowns A_k[:, o_k, :, :] see all the same matrix, so that each step solves one
    system of chi_{k-1} i_k chi_k unknowns for o_k right-hand sides. No step makes the error larger, but for
    what the ridge of `numerics.linear_algebra.cholesky` changes where inputs are collinear.

    Args:
        weight: what is approximated.
        cores: where to begin, as of `tt_svd`.
        gram: H, positive semidefinite.
        sweeps: passes over all cores.
        name: of the weight, for messages.

    Returns:
        The cores, in their own type.

    Raises:
        DataError: if one of the systems has more than `LARGEST_SYSTEM` unknowns.
    """
    largest = max(core.shape[0] * core.shape[2] * core.shape[3] for core in cores)
    if largest > LARGEST_SYSTEM:
        raise DataError(
            f"{name} needs least squares in {largest:,} unknowns, above {LARGEST_SYSTEM:,}; take metric="
            "'frobenius', more cores, or a smaller chi."
        )
    dtype = cores[0].dtype
    current = [core.double() for core in cores]
    h = gram.double() / gram.diagonal().double().mean().clamp(min=1e-300)
    target = weight.double() @ h
    for _ in range(sweeps):
        for k in range(len(current)):
            current[k] = _best_core(target, current, h, k, name)
    return [core.to(dtype) for core in current]


def _best_core(target: Tensor, cores: list[Tensor], h: Tensor, k: int, name: str) -> Tensor:
    """The k-th core that is best beside the others; target is W H."""
    a, o, i, b = cores[k].shape
    before = _chain_before(cores[:k], cores[k])  # (o_<, i_<, a)
    after = _chain_after(cores[k + 1 :], cores[k])  # (b, o_>, i_>)
    x, u = before.shape[1], after.shape[2]
    # G[(a j b), (c l d)] = sum (sum_o< L L)[x a, y c] H[(x j u), (y l v)] (sum_o> R R)[b u, d v]
    left = torch.einsum("oxa,oyc->xayc", before, before)
    right = torch.einsum("bou,dov->budv", after, after)
    inner = torch.einsum("xayc,xjuylv->acjulv", left, h.view(x, i, u, x, i, u))
    system = torch.einsum("acjulv,budv->ajbcld", inner, right).reshape(a * i * b, -1)
    known = torch.einsum(
        "pxa,pqrxju->aqrju", before, target.view(before.shape[0], o, after.shape[1], x, i, u)
    )
    known = torch.einsum("aqrju,bru->ajbq", known, after).reshape(a * i * b, o)
    factor = cholesky((system + system.T) / 2, f"system of {name}", jitter=1e-10).lower
    return torch.cholesky_solve(known, factor).view(a, i, b, o).permute(0, 3, 1, 2).contiguous()


def _chain_before(cores: Sequence[Tensor], like: Tensor) -> Float[Tensor, "rows columns bond"]:
    """The first cores multiplied up; the bond that follows them stays open."""
    chain = like.new_ones(1, 1, 1)
    for core in cores:
        rows, columns, left = chain.shape
        _, o, i, right = core.shape
        product = chain.reshape(-1, left) @ core.reshape(left, -1)
        product = product.view(rows, columns, o, i, right).transpose(1, 2)
        chain = product.reshape(rows * o, columns * i, right)
    return chain


def _chain_after(cores: Sequence[Tensor], like: Tensor) -> Float[Tensor, "bond rows columns"]:
    """The last cores multiplied up; the bond before them stays open."""
    chain = like.new_ones(1, 1, 1)
    for core in reversed(cores):
        product = torch.einsum("aoib,bpx->aopix", core, chain)
        chain = product.reshape(core.shape[0], core.shape[1] * chain.shape[1], -1)
    return chain


# -- helpers -------------------------------------------------------------------------------------------------


def _most_balanced(size: int, n: int, most: int) -> tuple[int, ...]:
    """Of all products of n factors, none above `most`, the one with the least largest and largest least."""
    if n == 1:
        return (size,) if size <= most else ()
    best: tuple[int, ...] = ()
    for first in range(math.ceil(size ** (1 / n) - 1e-9), min(size, most) + 1):
        if size % first == 0:
            others = _most_balanced(size // first, n - 1, first)
            if others and (not best or first / others[-1] < best[0] / best[-1]):
                best = (first, *others)
    return best


def _computing(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _check(
    weight: Tensor, out_shape: tuple[int, ...], in_shape: tuple[int, ...], chi: int | None, eps: float | None,
    name: str,
) -> None:  # fmt: skip
    if len(out_shape) != len(in_shape) or not out_shape:
        raise DataError(f"out_shape {out_shape} and in_shape {in_shape} must have equally many factors.")
    for what, shape, side, of in (
        ("out_shape", out_shape, weight.shape[0], "rows"),
        ("in_shape", in_shape, weight.shape[1], "columns"),
    ):
        if math.prod(shape) != side or min(shape) < 1:
            raise DataError(
                f"{what} {shape} has the product {math.prod(shape)}, but {name} has {side} {of}; "
                "give factors of it, or pad the matrix."
            )
    if chi is not None and chi < 1:
        raise DataError(f"chi of {name} is {chi}; a bond dimension is at least 1.")
    if eps is not None and not 0 <= eps < 1:
        raise DataError(f"eps is {eps}; it is a relative error in [0, 1).")
    if not bool(torch.isfinite(weight).all()):
        raise DataError(f"{name} has values that are not finite; mend the model first.")
