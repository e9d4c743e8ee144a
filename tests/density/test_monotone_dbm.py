"""The mathematics of the monotone deep Boltzmann machine: identities, limits, brute force, bad input."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from scipy.optimize import brentq

from paperback.density.interface import Interval
from paperback.density.monotone_dbm import (
    MeanFieldProblem,
    MonotoneDBM,
    MonotoneHollow,
    NotConverged,
    Rows,
    Structure,
    Tier,
    likelihood,
    mean_field,
    objectives,
    prox_entropy,
    proximal,
    solve,
)
from paperback.density.monotone_dbm.hollow import DenseCoupling
from paperback.density.monotone_dbm.mean_field import implicit_gradient
from paperback.density.monotone_dbm.objectives import (
    balanced_focal_loss,
    balanced_weights,
    completion_loss,
    imputation_loss,
)
from paperback.density.monotone_dbm.proximal import solve_prox
from paperback.errors import DataError, NotSupportedError
from paperback.numerics import enumeration
from paperback.testing import DENSITY_CHECKS, DensityCase

ALPHAS = (0.02, 0.125, 0.5, 0.9)
SPATIAL = [
    ([("visible", 4, 1, 8, 8), ("hidden", 3, 2, 4, 4), ("hidden", 4, 3, 2, 2), ("class", 5, 1)],
     [(6, (3, 0, 0, 0)), (7, (3, 3, 0, 0)), (5, (3, 3, 3, 0)), (4, (0, 0, 1, 1))]),
    ([("visible", 3, 1, 8, 8), ("hidden", 3, 2, 4, 4), ("class", 5, 1)],
     [(6, (2, 0, 0)), (7, (2, 2, 0)), (4, (0, 1, 1))]),
    ([("visible", 3, 1, 8, 8), ("hidden", 3, 2, 2, 2)], [(6, (5, 0)), (7, (4, 4))]),
    ([("visible", 3, 3, 6, 4), ("hidden", 3, 2, 3, 2)], [(6, (3, 0)), (7, (3, 3))]),
    ([("visible", 4, 6), ("hidden", 3, 5), ("class", 5, 1)], [(20, (1, 1, 1))]),
]  # fmt: skip


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def hollow(index: int, limit: float | None = 1.95, seed: int = 1) -> MonotoneHollow:
    return MonotoneHollow(Structure(*SPATIAL[index]), limit, generator=generator(seed)).double()


def small_model(seed: int = 0, scale: float = 3.0, **settings) -> MonotoneDBM:
    """Five variables of three states, two hidden, a class: small enough to enumerate."""
    model = MonotoneDBM.dense(5, 3, hidden=(2, 2), n_classes=2, rows=12, seed=seed, **settings).double()
    with torch.no_grad():
        for weight in model.hollow.weights.values():
            weight.mul_(scale)
        model.bias.copy_(torch.randn(model.bias.shape, generator=generator(seed)) * 0.7)
    return model.eval()


def problem_of(
    phi: torch.Tensor, bias: torch.Tensor, n_variables: int, states: int, batch: int = 1
) -> MeanFieldProblem:
    """A problem with a given Phi (states outermost, as a tier without geometry lays them out)."""
    structure = Structure([("visible", states, n_variables)], [(1, (1,))])
    coupling = object.__new__(DenseCoupling)
    coupling.structure, coupling.phi = structure, phi
    nothing = torch.zeros(batch, structure.size, dtype=phi.dtype)
    eigenvalues = torch.linalg.eigvalsh(phi)
    return MeanFieldProblem(
        structure, coupling, bias, nothing, nothing.bool(), float(eigenvalues[0]), float(eigenvalues[-1]) < 2
    )


# -- the proximal operator ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_prox_satisfies_its_optimality_conditions(alpha, dtype):
    for scale in (0.1, 1.0, 10.0, 50.0):
        v = (torch.rand(64, 7, generator=generator(), dtype=torch.float64) * 2 - 1).to(dtype) * scale
        z = prox_entropy(v, alpha, -1)
        tolerance = 1e-6 if dtype == torch.float32 else 1e-13
        torch.testing.assert_close(z.sum(-1), torch.ones(64, dtype=dtype), atol=10 * tolerance, rtol=0)
        multiplier = (1 - alpha) * z + alpha * z.log() - v
        multiplier = torch.where(z > 1e-30, multiplier, multiplier.gather(1, z.argmax(1, keepdim=True)))
        spread = multiplier.amax(1) - multiplier.amin(1)
        assert float(spread.max()) <= 20 * max(scale, 1.0) * tolerance


def test_prox_at_one_is_softmax_and_the_limit_agrees():
    v = torch.randn(5, 4, generator=generator(), dtype=torch.float64)
    assert torch.equal(prox_entropy(v, 1.0), v.softmax(-1))
    torch.testing.assert_close(prox_entropy(v, 1 - 1e-7), v.softmax(-1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_prox_of_two_states_agrees_with_a_root_finder(alpha):
    for gap in (-3.0, -0.2, 0.0, 1.0, 7.0):
        z = prox_entropy(torch.tensor([gap, 0.0], dtype=torch.float64), alpha)

        def balance(t: float, gap: float = gap) -> float:  # t = log(p / (1 - p))
            return (1 - alpha) * np.tanh(t / 2) + alpha * t - gap

        t = brentq(balance, -1e4, 1e4, xtol=1e-14)
        assert float(z[0]) == pytest.approx(1 / (1 + np.exp(-t)), abs=1e-9)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_prox_gradient_symmetries_and_contraction(alpha):
    v = torch.randn(6, 5, dtype=torch.float64, generator=generator(1), requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: prox_entropy(v, alpha, -1), (v,))
    u, w = torch.randn(2, 200, 5, dtype=torch.float64, generator=generator(2))
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(prox_entropy(u[:, order], alpha), prox_entropy(u, alpha)[:, order])
    torch.testing.assert_close(prox_entropy(u + 3.0, alpha), prox_entropy(u, alpha))
    moved = (prox_entropy(u, alpha) - prox_entropy(w, alpha)).norm(dim=1)
    assert (moved <= (u - w).norm(dim=1) / (1 + alpha) + 1e-12).all()


def test_prox_does_not_depend_on_where_newton_starts_or_how_it_is_cut(monkeypatch):
    v = torch.randn(40, 3, 30, dtype=torch.float64, generator=generator(3)) * 4
    cold = solve_prox(v, 0.1, 1)
    for start in (
        torch.full_like(v, 1e-8),
        torch.ones_like(v),
        cold,
        torch.rand(v.shape, generator=generator()).double() + 1e-8,
    ):
        torch.testing.assert_close(solve_prox(v, 0.1, 1, start), cold, atol=1e-9, rtol=0)
    monkeypatch.setattr(proximal, "CHUNK_ELEMENTS", 100)
    torch.testing.assert_close(solve_prox(v, 0.1, 1), cold, atol=1e-12, rtol=0)


# -- couplings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(len(SPATIAL)))
@pytest.mark.parametrize("limit", [0.95, 1.95, None])
def test_convolutions_and_the_dense_matrix_agree_entry_by_entry(index, limit):
    module = hollow(index, limit)
    conv, dense = module.coupling("conv"), module.coupling("dense")
    eye = torch.eye(module.structure.size, dtype=torch.float64)
    phi = conv(eye)  # unit vectors: the block formula against probing
    torch.testing.assert_close(phi, dense.phi, atol=1e-12, rtol=0)
    torch.testing.assert_close(phi, phi.T, atol=1e-12, rtol=0)
    assert (phi * module._same()).abs().max() < 1e-12
    torch.testing.assert_close(conv.diagonal, dense.diagonal, atol=1e-12, rtol=0)
    torch.testing.assert_close(
        conv.rows_transposed(conv.rows(eye)), dense.scaled.T @ dense.scaled, atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("index", range(len(SPATIAL)))
@pytest.mark.parametrize("kind", ["random", "huge", "rank one"])
def test_the_largest_eigenvalue_stays_below_the_limit(index, kind):
    for limit in (0.95, 1.95):
        module = hollow(index, limit)
        with torch.no_grad():
            for weight in module.weights.values():
                if kind == "huge":
                    weight.mul_(1e4)
                elif kind == "rank one":
                    weight.copy_(weight[:1].expand_as(weight) * 30)
        eigenvalues = torch.linalg.eigvalsh(module.coupling("dense").phi.detach())
        assert float(eigenvalues[-1]) <= limit + 1e-9
        smallest = module.smallest_eigenvalue(module.coupling("conv"), 300)
        assert smallest == pytest.approx(float(eigenvalues[0]), rel=1e-2)


def test_lipschitz_bound_holds_in_both_engines():
    for engine in ("dense", "conv"):
        module = MonotoneHollow(
            Structure(*SPATIAL[1]), 1.95, engine=engine, lipschitz_max=0.7, generator=generator()
        )
        for _ in range(30):  # each call goes on with the power iteration
            coupling = module.double().coupling()
        eye = torch.eye(module.structure.size, dtype=torch.float64)
        assert float(torch.linalg.matrix_norm(coupling.rows(eye), 2)) ** 2 <= 0.7 * 1.02


def test_centring_only_moves_biases():
    """With A_i replaced by A_i (I - 11'/k) the distribution is the same once biases are folded in."""
    structure = Structure([("visible", 3, 4)], [(6, (1,))])
    plain = MonotoneHollow(structure, None, center=False, generator=generator()).double().coupling()
    centred = MonotoneHollow(structure, None, center=True, generator=generator()).double().coupling()
    bias = torch.randn(structure.size, dtype=torch.float64, generator=generator(1))
    difference = (plain.phi - centred.phi).unflatten(0, (3, 4)).unflatten(2, (3, 4))
    # Phi_ij changes by r_i(k) + c_j(l): folding sends row terms to b_i and column terms to b_j.
    row_mean, mean = difference.mean(2, keepdim=True), difference.mean((0, 2), keepdim=True)
    residual = difference - row_mean - difference.mean(0, keepdim=True) + mean
    assert residual.abs().max() < 1e-12
    folded = bias + (row_mean - 0.5 * mean).sum((2, 3)).flatten()

    def weight(phi: torch.Tensor, b: torch.Tensor):
        return lambda s: torch.stack([0.5 * x @ phi @ x + x @ b for x in structure.one_hot([s]).double()])

    before = enumeration.log_probabilities(weight(plain.phi, bias), (3,) * 4)
    after = enumeration.log_probabilities(weight(centred.phi, folded), (3,) * 4)
    torch.testing.assert_close(before, after, atol=1e-10, rtol=0)


# -- solvers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("margin", ["tight", "paper"])
def test_all_solvers_find_the_same_solution(margin):
    for seed in range(10):
        model = small_model(seed, scale=4.0, margin=margin)
        X = torch.randint(0, 3, (6, 5), generator=generator(seed))
        observed = torch.rand(X.shape, generator=generator(seed + 50)) < 0.4
        answers = {
            solver: model.infer(X, observed, solver=solver, tol=1e-11, max_steps=20_000)
            for solver in ("mirror", "anderson", "forward_backward", "peaceman_rachford", "fista")
        }
        reference = answers.pop("anderson")
        assert reference.residual.max() < 1e-8
        for solver, answer in answers.items():
            assert answer.converged.all(), solver
            torch.testing.assert_close(answer.q, reference.q, atol=1e-5, rtol=0)


def test_tiers_without_inner_connections_are_solved_tier_by_tier():
    """A bipartite coupling: exact minimisation of one tier given the other."""
    structure = Structure([("visible", 3, 4), ("hidden", 2, 3)], [(1, (1, 1))])
    block = torch.randn(12, 6, dtype=torch.float64, generator=generator())
    phi = torch.zeros(18, 18, dtype=torch.float64)
    phi[:12, 12:], phi[12:, :12] = block, block.T
    phi = phi * 1.8 / torch.linalg.matrix_norm(phi, 2)
    coupling = object.__new__(DenseCoupling)
    coupling.structure, coupling.phi = structure, phi
    nothing = torch.zeros(2, 18, dtype=torch.float64)
    problem = MeanFieldProblem(
        structure, coupling, torch.randn(18).double(), nothing, nothing.bool(), -1.8, True
    )
    swept = solve(problem, "tiers", tol=1e-12, max_steps=2000)
    torch.testing.assert_close(swept.x, solve(problem, "anderson", tol=1e-12).x, atol=1e-8, rtol=0)
    model = small_model()
    with pytest.raises(DataError, match="without inner connections"):
        model.infer(torch.zeros(1, 5).long(), torch.zeros(1, 5).bool(), solver="tiers")


def test_the_solution_minimises_the_free_energy():
    model = small_model(3)
    nothing = torch.zeros(1, 5, dtype=torch.int64)
    problem = model.problem_of(nothing, nothing.bool())
    best = model.infer(nothing, nothing.bool(), tol=1e-11).free_energy
    for seed in range(8):  # gradient descent on logits from random starts
        logits = (
            3 * torch.randn(1, model.structure.size, generator=generator(seed)).double()
        ).requires_grad_()
        optimizer = torch.optim.LBFGS(
            [logits], max_iter=300, line_search_fn="strong_wolfe", tolerance_grad=1e-10
        )

        def closure(logits: torch.Tensor = logits, optimizer: torch.optim.LBFGS = optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            value = problem.free_energy(model.structure.softmax(logits)).sum()
            value.backward()
            return value

        optimizer.step(closure)
        found = problem.free_energy(model.structure.softmax(logits.detach()))
        torch.testing.assert_close(found, best, atol=1e-6, rtol=0)


def test_free_energy_falls_along_short_steps():
    model = small_model(1)
    X = torch.randint(0, 3, (4, 5), generator=generator())
    problem = model.problem_of(X, torch.zeros(4, 5, dtype=torch.bool))
    q = problem.clamp(
        model.structure.softmax(torch.randn(4, model.structure.size, generator=generator()).double())
    )
    alpha, energy = min(1.0, 1.0 / (1.0 - problem.smallest)), problem.free_energy(q)
    for _ in range(30):
        q = problem.forward_backward(q, alpha)
        lower = problem.free_energy(q)
        assert (lower <= energy + 1e-12).all()
        energy = lower


def test_antiferromagnet_cycles_under_the_parallel_update_and_not_under_ours():
    n = 20
    coupling = -(torch.ones(n, n, dtype=torch.float64) - torch.eye(n, dtype=torch.float64))
    sign = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    phi = torch.einsum("ij,ab->aibj", coupling, sign).reshape(2 * n, 2 * n) * 0.9
    problem = problem_of(phi, torch.zeros(2 * n, dtype=torch.float64), n, 2)
    start = torch.cat([torch.full((1, n), 0.9), torch.full((1, n), 0.1)], 1).double()
    parallel = solve(problem, "parallel", start=start, tol=1e-6, max_steps=300)
    assert not parallel.converged.any()
    twice = problem.update(problem.update(parallel.x))
    assert (twice - parallel.x).abs().max() < 1e-6  # a cycle of two
    for solver in ("forward_backward", "anderson", "mirror"):
        solution = solve(problem, solver, start=start, tol=1e-9, max_steps=5000)
        torch.testing.assert_close(solution.x, torch.full((1, 2 * n), 0.5).double(), atol=1e-6, rtol=0)


def test_the_limit_of_two_is_sharp():
    """Two ferromagnetic two-state variables: unique below an eigenvalue of 2, two solutions above."""
    for eigenvalue, unique in ((1.9, True), (2.2, False)):
        pair = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
        sign = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
        phi = torch.einsum("ij,ab->aibj", pair, sign).reshape(4, 4) * eigenvalue / 2
        assert float(torch.linalg.eigvalsh(phi)[-1]) == pytest.approx(eigenvalue)
        problem = problem_of(phi, torch.zeros(4, dtype=torch.float64), 2, 2, batch=2)
        up = torch.tensor([[0.9, 0.9, 0.1, 0.1], [0.1, 0.1, 0.9, 0.9]], dtype=torch.float64)
        found = solve(problem, "forward_backward", alpha=0.3, start=up, tol=1e-10, max_steps=20_000).x
        spread = float((found[0] - found[1]).abs().max())
        assert (spread < 1e-3) if unique else (spread > 0.1)


def test_a_clamped_solve_is_that_of_a_smaller_model_with_folded_bias():
    model = small_model(2)
    X = torch.tensor([[0, 2, 1, 0, 2]])
    observed = torch.tensor([[True, False, True, False, False]])
    answer = model.infer(X, observed, tol=1e-11)
    problem = model.problem_of(X, observed)
    free = ~problem.observed[0]
    phi, known = problem.coupling.phi, problem.known[0]
    bias = problem.bias + phi @ known
    q = torch.full((int(free.sum()),), 0.3, dtype=torch.float64)
    groups = torch.cat(
        [
            (100 * t + torch.arange(tier.n_variables)).repeat(tier.states)
            for t, tier in enumerate(model.structure.tiers)
        ]
    )[free]
    for _ in range(4000):  # plain damped logit iteration on the small model
        logits = phi[free][:, free] @ q + bias[free]
        fresh = torch.zeros_like(q)
        for group in groups.unique():
            fresh[groups == group] = logits[groups == group].softmax(0)
        q = 0.9 * q + 0.1 * fresh
    torch.testing.assert_close(answer.q[0, free], q, atol=1e-8, rtol=0)


def test_a_warm_start_saves_steps_and_unique_solutions_do_not_depend_on_it():
    model = small_model(4)
    X = torch.randint(0, 3, (8, 5), generator=generator())
    observed = torch.rand(X.shape, generator=generator(1)) < 0.4
    cold = model.infer(X, observed, solver="anderson", tol=1e-9)
    warm = model.infer(X, observed, solver="anderson", tol=1e-9, start=cold.q)
    assert warm.steps.max() <= 2
    elsewhere = model.structure.softmax(
        4 * torch.randn(8, model.structure.size, generator=generator(2)).double()
    )
    again = model.infer(X, observed, solver="anderson", tol=1e-9, start=elsewhere)
    torch.testing.assert_close(again.q, cold.q, atol=1e-6, rtol=0)


def test_mirror_descent_falls_back_to_the_step_that_is_sure(monkeypatch):
    monkeypatch.setattr(mean_field, "PATIENCE", 1_000)
    model = small_model(5)
    X = torch.zeros(3, 5, dtype=torch.int64)
    problem = model.problem_of(X, X.bool())
    solution = solve(problem, "mirror", tol=1e-6, max_steps=4)  # too few for the bold pass
    assert solution.converged.all()
    torch.testing.assert_close(solution.x, solve(problem, "anderson", tol=1e-10).x, atol=1e-4, rtol=0)


# -- gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["dense", "conv"])
def test_implicit_gradient_agrees_with_finite_differences(engine, monkeypatch):
    tiers, connections = SPATIAL[1] if engine == "conv" else SPATIAL[4]
    model = MonotoneDBM(tiers, connections, engine=engine, tol=1e-12, max_steps=5000).double()
    states = torch.randint(0, 3, (3, model.n_variables), generator=generator())
    labels = torch.tensor([0, 3, 1])

    def loss() -> torch.Tensor:
        return imputation_loss(model, (states, labels), generator(7))

    monkeypatch.setattr(objectives, "BACKWARD_TOL", 1e-12)
    loss().backward()
    for name, parameter in model.named_parameters():
        place = int(parameter.grad.abs().argmax())
        flat, step = parameter.data.view(-1), 1e-5
        with torch.no_grad():
            flat[place] += step
            above = float(loss())
            flat[place] -= 2 * step
            below = float(loss())
            flat[place] += step
        numeric, exact = (above - below) / (2 * step), float(parameter.grad.view(-1)[place])
        assert exact == pytest.approx(numeric, abs=1e-6, rel=1e-5), name


def test_conjugate_gradients_anderson_and_unrolling_give_one_gradient(monkeypatch):
    monkeypatch.setattr(objectives, "BACKWARD_TOL", 1e-12)
    gradients = {}
    states = torch.randint(0, 3, (4, 5), generator=generator())
    for backward in ("cg", "anderson"):
        model = small_model(
            1, scale=0.7, backward=backward, tol=1e-12, max_steps=5000, alpha=0.2, solver="anderson"
        )
        imputation_loss(model, (states,), generator(3)).backward()
        gradients[backward] = [weight.grad for weight in model.hollow.parameters()]
    model = small_model(1, scale=0.7)
    observed = torch.rand(states.shape, generator=generator(3)) < model.obs_level
    coupling = model.hollow.coupling()
    known, flat = model._evidence(states, observed)
    problem = MeanFieldProblem(model.structure, coupling, model.bias, known, flat, -5.0, True)
    q = problem.start()
    for _ in range(400):
        q = torch.lerp(q, problem.update(q), 0.3)

    completion_loss(model, model._temper(problem.logits(q)), states, observed).backward()
    unrolled = [weight.grad for weight in model.hollow.parameters()]
    for mine, theirs, truth in zip(gradients["cg"], gradients["anderson"], unrolled, strict=True):
        torch.testing.assert_close(mine, truth, atol=1e-8, rtol=1e-5)
        torch.testing.assert_close(theirs, truth, atol=1e-8, rtol=1e-5)


def test_implicit_solve_is_exact_against_a_dense_jacobian():
    model = small_model(6)
    X = torch.tensor([[0, 1, 2, 0, 1]])
    observed = torch.tensor([[True, False, False, False, True]])
    problem = model.problem_of(X, observed)
    q = solve(problem, "anderson", tol=1e-13, max_steps=5000).x
    gradient = torch.randn(q.shape, generator=generator()).double()
    result, solution = implicit_gradient(problem, q, gradient, 1e-13, 200)
    jacobian = torch.autograd.functional.jacobian(
        lambda bias: problem.clamp(model.structure.softmax(problem.coupling(q) + bias))[0], problem.bias
    )  # S, with zero rows where observed
    system = torch.eye(len(jacobian), dtype=torch.float64) - problem.coupling.phi @ jacobian
    exact = jacobian @ torch.linalg.solve(system, gradient[0])
    torch.testing.assert_close(result[0], exact, atol=1e-8, rtol=0)
    assert solution.steps.max() <= 40


# -- likelihood and samples ---------------------------------------------------------------------------------


def joint_log_weight(model: MonotoneDBM):
    problem = model.free_problem(1)

    def log_weight(states: torch.Tensor) -> torch.Tensor:
        parts = states.split([tier.n_variables for tier in model.structure.tiers], 1)
        return likelihood.log_weight(problem, model.structure.one_hot(parts).to(model.bias))

    n_states = [tier.states for tier in model.structure.tiers for _ in range(tier.n_variables)]
    return log_weight, n_states


def test_bounds_bracket_the_partition_function_of_fifty_models():
    for seed in range(50):
        model = small_model(seed, scale=1.0 + seed % 4, margin="tight" if seed % 2 else "paper")
        log_weight, n_states = joint_log_weight(model)
        exact = float(enumeration.log_partition(log_weight, n_states))
        bounds = model.log_partition_bounds()
        assert float(bounds.lower) - 1e-9 <= exact <= float(bounds.upper) + 1e-9


def test_bounds_are_equal_without_couplings():
    model = small_model(0)
    with torch.no_grad():
        for weight in model.hollow.weights.values():
            weight.zero_()
    bounds = model.log_partition_bounds()
    exact = sum(float(tier.logsumexp(2).sum()) for tier in model.structure.split(model.bias[None]))
    assert float(bounds.lower) == pytest.approx(exact, abs=1e-9)
    assert float(bounds.upper) == pytest.approx(exact, abs=1e-9)


def test_log_probabilities_and_marginals_lie_in_their_intervals():
    model = small_model(8)
    log_weight, n_states = joint_log_weight(model)
    total = float(enumeration.log_partition(log_weight, n_states))
    X = torch.randint(0, 3, (4, 5), generator=generator())
    observed = torch.tensor([[True] * 5, [True, False, True, False, True], [False] * 5, [True] + [False] * 4])
    interval = model.log_prob(X, observed)
    assert isinstance(interval, Interval)
    for row in range(4):
        clamp = torch.full((len(n_states),), -1)
        clamp[:5] = torch.where(observed[row], X[row], -1)
        exact = float(enumeration.log_partition(log_weight, n_states, clamp=clamp)) - total
        assert float(interval.lower[row]) - 1e-9 <= exact <= float(interval.upper[row]) + 1e-9
    bits = model.bits_per_dim(X)
    assert bits.lower <= bits.upper


@pytest.mark.parametrize("engine", ["dense", "conv"])
def test_gibbs_samples_have_the_distribution_of_the_model(engine):
    tiers = (
        [("visible", 2, 1, 2, 2), ("class", 2, 1)]
        if engine == "conv"
        else [("visible", 2, 4), ("class", 2, 1)]
    )
    model = MonotoneDBM(tiers, [(6, (1, 1))], engine=engine).double()
    with torch.no_grad():
        model.bias.copy_(torch.randn(model.bias.shape, generator=generator(1)))
        for weight in model.hollow.weights.values():
            weight.mul_(3)
    log_weight, n_states = joint_log_weight(model)
    exact = enumeration.log_probabilities(log_weight, n_states).exp()
    problem = model.free_problem(20_000)
    q = solve(problem, "anderson").x
    x = likelihood.gibbs(problem, q, 12, generator(5))
    states = torch.cat(likelihood.flat_to_states(model.structure, x), 1)
    index = (states * torch.tensor([16, 8, 4, 2, 1])).sum(1)
    frequency = torch.bincount(index, minlength=32) / len(index)
    assert 0.5 * float((frequency - exact).abs().sum()) < 0.02
    known = torch.tensor([[1, 0, 0, 1]]).expand(500, -1)
    observed = torch.tensor([[True, False, False, True]]).expand(500, -1)
    drawn = model.complete(known, observed, "sample", generator(3))
    assert (drawn[:, [0, 3]] == known[:, [0, 3]]).all()


def test_conv_colours_are_independent_and_complete():
    module = hollow(0)
    structure = module.structure
    phi = module.coupling("dense").phi
    starts = [0]
    for tier in structure.tiers:
        starts.append(starts[-1] + tier.n_variables)
    seen = []
    for t, members in likelihood.colours(structure, module.coupling("conv")):
        tier = structure.tiers[t]
        state = torch.arange(tier.states)[:, None]
        flat = (
            structure.slices[t].start
            + (members // tier.positions * tier.states + state) * tier.positions
            + members % tier.positions
        )
        for i in range(len(members)):
            for j in range(i):
                assert phi[flat[:, i]][:, flat[:, j]].abs().max() < 1e-12
        seen += (members + starts[t]).tolist()
    assert sorted(seen) == list(range(starts[-1]))


def test_annealed_importance_sampling_agrees_with_enumeration():
    model = small_model(2, scale=2.0)
    log_weight, n_states = joint_log_weight(model)
    exact = float(enumeration.log_partition(log_weight, n_states))
    estimate = model.estimate_log_partition(n_chains=400, n_betas=60, generator=generator(1))
    assert estimate.value == pytest.approx(exact, abs=5 * estimate.standard_error + 0.02)


def test_pcd_raises_the_likelihood():
    tiers = [("visible", 2, 6)]
    rows = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]]).repeat(60, 1)
    model = MonotoneDBM(tiers, [(8, (1,))], objective="pcd")

    def mean_log_likelihood() -> float:
        log_weight, n_states = joint_log_weight(model)
        return float((log_weight(rows) - enumeration.log_partition(log_weight, n_states)).mean())

    model._initialise_visible_bias(rows)
    before = mean_log_likelihood()
    model.fit(rows, epochs=30, batch_size=30, lr=0.02, progress=False)
    assert mean_log_likelihood() > before + 0.3


# -- training, the read-out, saving ------------------------------------------------------------------------


def test_focal_weights_count_rare_states_as_much_and_survive_absent_ones():
    targets = torch.tensor([0, 0, 0, 0, 1])
    weights = balanced_weights(targets, 3)
    assert float(weights[0]) == pytest.approx((1 - 0.9999) / (1 - 0.9999**4))
    assert float(weights[1]) == float(weights[2]) == pytest.approx(1.0)
    logits = torch.randn(5, 3, generator=generator())
    p = logits.softmax(-1).gather(1, targets[:, None])[:, 0]
    own = weights.float()[targets]
    expected = (own * (1 - p) ** 2 * -p.log()).sum() / own.sum()
    torch.testing.assert_close(balanced_focal_loss(logits, targets), expected)


@pytest.mark.parametrize("loss", ["ce", "focal"])
def test_training_learns_to_complete_and_classify_and_is_reproducible(loss):
    base = torch.tensor([[0, 0, 1, 1, 2, 2], [2, 2, 0, 0, 1, 1], [1, 1, 2, 2, 0, 0]])
    y = torch.arange(3).repeat(40)
    X = base[y]
    models = [
        MonotoneDBM.dense(6, 3, hidden=(4, 2), n_classes=3, rows=20, loss=loss).fit(
            X, y, epochs=12, batch_size=30, seed=3, progress=False
        )
        for _ in range(2)
    ]
    observed = torch.zeros_like(X, dtype=torch.bool)
    observed[:, :2] = True
    assert (models[0].predict(X, observed) == y).float().mean() > 0.95
    assert (models[0].complete(X, observed) == X).float().mean() > 0.95
    for first, second in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(first, second)


def test_without_couplings_the_read_out_is_the_marginals():
    model = MonotoneDBM.dense(4, 3, hidden=None, n_classes=None)
    X = torch.randint(0, 3, (200, 4), generator=generator())
    model._initialise_visible_bias(X)
    with torch.no_grad():
        for weight in model.hollow.weights.values():
            weight.zero_()
    marginals = model.conditional(X[:1], torch.zeros(1, 4, dtype=torch.bool))[0]
    counts = torch.stack([torch.bincount(column, minlength=3) for column in X.T]) + 1.0
    torch.testing.assert_close(marginals, counts / counts.sum(1, keepdim=True), atol=1e-4, rtol=0)


def test_columns_with_different_numbers_of_states_come_back_in_order():
    n_states = [4, 2, 3, 2, 4]
    model = MonotoneDBM.dense(5, n_states, hidden=(3, 2), n_classes=None, rows=10)
    X = torch.stack([torch.randint(0, k, (30,), generator=generator(k)) for k in n_states], 1)
    probabilities = model.conditional(X, torch.zeros_like(X, dtype=torch.bool))
    assert model.n_states == tuple(n_states)
    for column, k in enumerate(n_states):
        assert (probabilities[:, column, :k] > 0).all()
        assert (probabilities[:, column, k:] == 0).all()
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(30, 5))
    assert torch.equal(model.complete(X, torch.ones_like(X, dtype=torch.bool)), X)


@pytest.mark.parametrize("index", range(len(SPATIAL)))
def test_saved_and_loaded_it_gives_the_same_answers(index, tmp_path):
    import paperback

    model = MonotoneDBM(*SPATIAL[index], obs_level=0.3, alpha=0.2).eval()
    model.save_pretrained(tmp_path / "model")
    again = paperback.load(tmp_path / "model")
    X = torch.zeros(2, model.n_variables, dtype=torch.int64)
    observed = torch.rand(X.shape, generator=generator()) < 0.5
    assert isinstance(again, MonotoneDBM)
    assert again.alpha == 0.2
    torch.testing.assert_close(again.infer(X, observed).q, model.infer(X, observed).q, atol=1e-6, rtol=0)


def test_compiled_inference_gives_the_same_answer():
    model = small_model(1)
    X = torch.zeros(2, 5, dtype=torch.int64)
    problem = model.problem_of(X, X.bool())
    step = torch.compile(lambda q: problem.forward_backward(q, 0.2), backend="eager")
    torch.testing.assert_close(step(problem.start()), problem.forward_backward(problem.start(), 0.2))


@pytest.mark.parametrize("check", DENSITY_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("with_classes", [True, False])
def test_it_behaves_as_every_density_model(check, with_classes):
    X = torch.randint(0, 3, (24, 4), generator=generator(4))
    y = torch.randint(0, 2, (24,), generator=generator(5)) if with_classes else None

    def build(seed: int) -> MonotoneDBM:
        classes = 2 if with_classes else None
        return MonotoneDBM.dense(4, 3, hidden=(2, 2), n_classes=classes, rows=8, seed=seed)

    check(DensityCase(build, X, y, {"epochs": 2, "batch_size": 12}, tolerance=2e-3))


# -- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"m": 0.0}, "m is 0.0"),
        ({"m": 1.0}, "m is 1.0"),
        ({"alpha": 0.0}, "alpha"),
        ({"alpha": 1.2}, "alpha"),
        ({"solver": "newton"}, "solver"),
        ({"margin": "loose"}, "margin"),
        ({"engine": "sparse"}, "engine"),
        ({"obs_level": 1.5}, "obs_level"),
        ({"tol": 0.0}, "tol"),
        ({"loss": "hinge"}, "loss"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(DataError, match=message):
        MonotoneDBM.dense(4, 3, **settings)


@pytest.mark.parametrize(
    ("tiers", "connections", "message"),
    [
        ([("seen", 3, 4)], None, "role"),
        ([("hidden", 3, 4)], None, "no visible tier"),
        ([("visible", 1, 4)], None, "states >= 2"),
        ([("visible", 3, 4), ("class", 3, 2)], None, "class tier"),
        ([("visible", 3, 1, 7, 7), ("hidden", 2, 2, 3, 3)], [(4, (3, 3))], "whole multiple"),
        ([("visible", 3, 1, 8, 8), ("hidden", 2, 2, 4, 4)], [(4, (3, 2))], "grids of different sizes"),
        ([("visible", 3, 4)], [(0, (1,))], "channels >= 1"),
        ([("visible", 3, 4)], [(2, (1, 1))], "one kernel size"),
    ],
)
def test_structures_that_do_not_fit_are_refused(tiers, connections, message):
    with pytest.raises(DataError, match=message):
        MonotoneDBM(tiers, connections)


def test_inputs_that_cannot_be_answered_are_refused_or_answered_rightly():
    model = small_model(0)
    X = torch.zeros(2, 5, dtype=torch.int64)
    assert torch.equal(model.complete(X, torch.ones_like(X, dtype=torch.bool)), X)  # all observed
    with pytest.raises(DataError, match="state 3"):
        model.infer(X + 3)
    with pytest.raises(DataError, match="dtype"):
        model.infer(X.float())
    with pytest.raises(DataError, match="mask has shape"):
        model.infer(X, torch.zeros(2, 4, dtype=torch.bool))
    with pytest.raises(DataError, match="no class tier"):
        MonotoneDBM.dense(5, 3, n_classes=None).fit(X, torch.zeros(2, dtype=torch.int64), progress=False)
    with pytest.raises(NotSupportedError, match="n_classes"):
        MonotoneDBM.dense(5, 3, n_classes=None).predict(X)
    with pytest.raises(DataError, match=r"0\.\.1"):
        model.infer(X, y=torch.tensor([0, 5]))
    with pytest.raises(DataError, match="dense engine"):
        MonotoneDBM.dense(5_001, 4, hidden=None, n_classes=None, engine="dense")
    with pytest.raises(DataError, match="stride"):
        MonotoneDBM.conv((7, 7), 3, hidden=[(2, 2, 2)])
    with pytest.raises(DataError, match="dense"):
        MonotoneDBM(*SPATIAL[1], engine="conv").infer(
            torch.zeros(1, 64).long(), torch.zeros(1, 64).bool(), solver="peaceman_rachford"
        )
    with torch.no_grad():
        next(iter(model.hollow.weights.values()))[0, 0] = float("nan")
    with pytest.raises(DataError, match="NaN"):
        model.infer(X)


def test_a_solve_that_does_not_converge_warns_or_raises():
    model = small_model(0)
    X = torch.zeros(2, 5, dtype=torch.int64)
    with pytest.warns(NotConverged, match="2 of 2 samples"):
        answer = model.infer(X, X.bool(), solver="forward_backward", max_steps=2, tol=1e-9)
    assert not answer.converged.any()
    strict = small_model(0, strict=True)
    with pytest.raises(DataError, match="did not converge"):
        strict.infer(X, X.bool(), solver="forward_backward", max_steps=2, tol=1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.infer(X, X.bool())


def test_tiers_are_plain_tuples():
    model = MonotoneDBM([Tier("visible", 3, 4)], [Rows(5, (1,))])
    assert model.n_variables == 4
