"""Fixed points against linear algebra, and gradients through them against finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from paperback.numerics.fixed_point import (
    FixedPoint,
    conjugate_gradient,
    fista,
    fixed_point,
    peaceman_rachford,
)


def contraction(n: int = 6, norm: float = 0.8, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(n, n, dtype=torch.float64, generator=generator)
    matrix = norm * matrix / torch.linalg.matrix_norm(matrix, 2)
    return matrix, torch.randn(4, n, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("memory", [1, 5])
def test_affine_map_gives_the_solution_of_the_linear_system(memory):
    matrix, offset = contraction()
    solution = fixed_point(
        lambda x: x @ matrix.T + offset, torch.zeros_like(offset), tol=1e-12, memory=memory, max_steps=500
    )
    exact = torch.linalg.solve(torch.eye(6, dtype=torch.float64) - matrix, offset.T).T
    torch.testing.assert_close(solution.x, exact, atol=1e-10, rtol=0)
    assert solution.converged.all()
    assert (solution.history[-1] <= 1e-12).all()


def test_anderson_solves_an_affine_map_of_n_dimensions_in_about_n_steps():
    matrix, offset = contraction(norm=0.99)
    start = torch.zeros_like(offset)
    plain = fixed_point(lambda x: x @ matrix.T + offset, start, tol=1e-8, memory=1, max_steps=5000)
    mixed = fixed_point(
        lambda x: x @ matrix.T + offset, start, tol=1e-8, memory=8, ridge=1e-14, max_steps=5000
    )
    assert mixed.steps.max() <= 12
    assert mixed.steps.max() < plain.steps.min() / 3


def test_samples_that_have_converged_are_taken_out_and_change_nothing():
    matrix, offset = contraction()
    exact = torch.linalg.solve(torch.eye(6, dtype=torch.float64) - matrix, offset.T).T
    start = torch.zeros_like(offset)
    start[:3] = exact[:3]  # three of four are done at once
    seen: list[int] = []

    def step_of(rows: torch.Tensor):
        def step(x: torch.Tensor) -> torch.Tensor:
            seen.append(len(x))
            return x @ matrix.T + offset[rows]

        return step

    restricted = fixed_point(step_of(torch.arange(4)), start, tol=1e-9, restrict=step_of)
    alone = fixed_point(lambda x: x @ matrix.T + offset[3:], start[3:], tol=1e-9)
    assert seen[0] == 4
    assert set(seen[1:]) == {1}
    assert restricted.steps.tolist()[:3] == [1, 1, 1]
    assert int(restricted.steps[3]) == int(alone.steps[0])
    torch.testing.assert_close(restricted.x[3:], alone.x)


def test_a_map_without_fixed_point_says_that_it_did_not_converge():
    solution = fixed_point(lambda x: x + 1.0, torch.zeros(2, 3), tol=1e-3, memory=1, max_steps=7)
    assert not solution.converged.any()
    assert solution.steps.tolist() == [7, 7]


def test_damping_is_taken_out_of_the_residual():
    matrix, offset = contraction()
    start = torch.zeros_like(offset)
    undamped = fixed_point(lambda x: x @ matrix.T + offset, start, tol=0.0, memory=1, max_steps=1)
    damped = fixed_point(
        lambda x: torch.lerp(x, x @ matrix.T + offset, 0.01),
        start,
        tol=0.0,
        memory=1,
        max_steps=1,
        damping=0.01,
    )
    # |d T(0)| / (d |image|), and the image of a damped step from 0 is d T(0).
    torch.testing.assert_close(damped.residual, undamped.residual / 0.01)


def test_fista_and_peaceman_rachford_solve_a_lasso_like_problem():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(8, 5, dtype=torch.float64, generator=generator)
    target = torch.randn(3, 8, dtype=torch.float64, generator=generator)
    quadratic, linear = matrix.T @ matrix, target @ matrix
    size = 1.0 / float(torch.linalg.eigvalsh(quadratic)[-1])

    def shrink(v: torch.Tensor, by: float) -> torch.Tensor:
        return v.sign() * (v.abs() - by).clamp(min=0.0)

    def gradient_step(x: torch.Tensor) -> torch.Tensor:
        return shrink(x - size * (x @ quadratic - linear), size * 0.5)

    start = torch.zeros(3, 5, dtype=torch.float64)
    slow = fixed_point(gradient_step, start, tol=1e-13, memory=1, max_steps=20_000).x
    fast = fista(gradient_step, start, tol=1e-12, max_steps=5_000)
    inverse = torch.linalg.inv(torch.eye(5, dtype=torch.float64) + quadratic)
    split = peaceman_rachford(
        lambda u: (u + linear) @ inverse, lambda u: shrink(u, 0.5), start, tol=1e-12, max_steps=5_000
    )
    torch.testing.assert_close(fast.x, slow, atol=1e-9, rtol=0)
    torch.testing.assert_close(split.x, slow, atol=1e-9, rtol=0)
    assert fast.steps.max() < 2_000


def test_conjugate_gradients_solve_each_system_of_a_batch():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(3, 7, 7, dtype=torch.float64, generator=generator)
    matrices = root @ root.mT + torch.eye(7, dtype=torch.float64)
    rhs = torch.randn(3, 7, dtype=torch.float64, generator=generator)
    solution = conjugate_gradient(
        lambda x: torch.einsum("bij,bj->bi", matrices, x),
        rhs,
        lambda r: r / matrices.diagonal(dim1=1, dim2=2),
        tol=1e-12,
    )
    torch.testing.assert_close(solution.x, torch.linalg.solve(matrices, rhs), atol=1e-9, rtol=0)
    assert solution.converged.all()
    nothing = conjugate_gradient(lambda x: x, torch.zeros(2, 3), lambda r: r)
    assert torch.equal(nothing.x, torch.zeros(2, 3))


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        matrix, _ = contraction(4, 0.5)
        self.weight = nn.Parameter(matrix)

    def forward(self, x: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.weight.T + inputs)


def test_equilibrium_layer_has_the_gradient_of_its_fixed_point():
    cell = Cell()
    layer = FixedPoint(cell, tol=1e-13, backward_tol=1e-13)
    inputs = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    start = torch.zeros(2, 4, dtype=torch.float64)

    def solve(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        cell.weight.data = weight.data
        x, solution = layer(start, inputs)
        assert solution.converged.all()
        return x

    inputs.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda i: solve(i, cell.weight), (inputs,), atol=1e-6, check_undefined_grad=False
    )
    layer(start, inputs)[0].square().sum().backward()
    implicit = cell.weight.grad.clone()
    x = start
    cell.weight.grad = None
    for _ in range(80):  # unrolled: the same gradient, with the whole iteration in memory
        x = cell(x, inputs)
    x.square().sum().backward()
    torch.testing.assert_close(implicit, cell.weight.grad, atol=1e-9, rtol=0)
    with torch.no_grad():
        assert not layer(start, inputs)[0].requires_grad
