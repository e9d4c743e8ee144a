"""The two machines: exact solutions, limits, bounds, and the finite network that they are the limit of."""

import math
from itertools import pairwise

import gpytorch
import pytest
import torch
from torch.autograd import gradcheck
from torch.distributions import MultivariateNormal

from paperback.bayes.deep_kernel_machine import (
    FullMachine,
    LinearKernel,
    SparseMachine,
    deep_linear_grams,
    sample_finite_grams,
)
from paperback.bayes.deep_kernel_machine.estimators import maximise
from paperback.bayes.deep_kernel_machine.finite import relative_distance
from paperback.bayes.deep_kernel_machine.machine import LEAST_NOISE, PRIOR_STD
from paperback.errors import DataError

ROWS, D = 12, 2


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def data(outputs=1):
    x = normal(ROWS, D)
    return x, x.sum(1, keepdim=True).sin() * torch.arange(1, outputs + 1) + 0.1 * normal(
        ROWS, outputs, seed=1
    )


def move(machine, size=0.2, seed=3):
    """Learned Gram matrices that are not the kernels."""
    for layer in machine.gram_layers:
        with torch.no_grad():
            layer.v.add_(size * math.sqrt(len(layer.v)) * normal(*layer.v.shape, seed=seed + layer.number))
    return machine


def linear_machine(x, y, depth, dof):
    machine = FullMachine(x, y, ["linear"] * (depth + 1), [dof] * depth, noise=0, jitter=0.0, ard=False)
    for part in machine.layers:
        if isinstance(part, LinearKernel):
            part.log_variance.requires_grad_(False)
    return machine


@pytest.mark.parametrize("depth", [1, 3])
def test_deep_linear_machine_finds_the_geometric_path(depth):
    points, outputs = 6, 10
    x, y = normal(points, 9), normal(points, outputs, seed=1)
    machine = linear_machine(x, y, depth, float(outputs))
    assert maximise(machine, 500)
    expected = deep_linear_grams(x @ x.mT / 9, y @ y.mT / outputs, depth)
    for layer, gram in enumerate(expected, 1):
        assert relative_distance(machine.gram(layer, x[:0]).ii.detach(), gram) < 1e-5


def test_geometric_path_is_a_path_of_equal_steps():
    a, b = normal(5, 5), normal(5, 5, seed=1)
    kernel, target = a @ a.mT, b @ b.mT
    path = [kernel, *deep_linear_grams(kernel, target, 3), target]
    steps = [torch.linalg.solve(low, high) for low, high in pairwise(path)]
    for step in steps[1:]:
        torch.testing.assert_close(step, steps[0], rtol=1e-6, atol=1e-6)


def test_large_degrees_of_freedom_keep_the_prediction_of_the_wide_network():
    x, y = data()
    test = normal(20, D, seed=5)
    held, wide = (FullMachine(x, y, ["sqexp"] * 3, [dof] * 2, jitter=1e-9) for dof in (1e9, math.inf))
    for name, parameter in held.named_parameters():
        parameter.requires_grad_(name.endswith(".v"))
    start = held.gram_layers[0].v.detach().clone()
    maximise(held, 50)
    assert not torch.equal(held.gram_layers[0].v, start)
    with torch.no_grad():
        torch.testing.assert_close(held(test).mean, wide(test).mean, rtol=0, atol=1e-4)
        torch.testing.assert_close(held(test).covariance, wide(test).covariance, rtol=0, atol=1e-4)


class ExactGP(gpytorch.models.ExactGP):
    def __init__(self, x, y, likelihood):
        super().__init__(x, y, likelihood)
        self.mean_module = gpytorch.means.ZeroMean()
        self.covar_module = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel(ard_num_dims=D))

    def forward(self, x):
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


def test_no_layer_is_the_exact_gp_of_gpytorch():
    x, y = data()
    likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
    gp = ExactGP(x, y[:, 0], likelihood).double()
    gp.covar_module.outputscale = 1.7
    gp.covar_module.base_kernel.lengthscale = torch.tensor([0.8, 1.9]).double()
    likelihood.noise = 0.05
    machine = FullMachine(x, y, ["sqexp"], [], noise=0.05 - LEAST_NOISE)
    with torch.no_grad():
        machine.layers[0].log_variance.fill_(math.log(1.7))
        machine.inputs.log_scale.copy_(torch.tensor([math.sqrt(D) / 0.8, math.sqrt(D) / 1.9]).log())
    mll = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, gp)
    torch.testing.assert_close(machine.objective() / ROWS, mll(gp(x), y[:, 0]), rtol=0, atol=1e-5)
    test = normal(20, D, seed=5)
    law = gp.eval()(test)
    mean, covariance = machine(test, whole=True)
    torch.testing.assert_close(mean[:, 0], law.mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(covariance, law.covariance_matrix, rtol=0, atol=1e-5)


def sparse_of(full, inducing, outputs, depth):
    """The sparse machine with the parameters of a full one."""
    sparse = SparseMachine(
        inducing, ["sqexp"] * (depth + 1), [3.0] * depth, outputs, learn_inducing=False, jitter=1e-10
    )
    state = {k: v for k, v in full.state_dict().items() if not k.startswith("readout")}
    if len(inducing) < ROWS:
        state = {k: v for k, v in state.items() if not k.endswith((".v", "inducing"))}
    sparse.load_state_dict(state, strict=False)
    return sparse


@pytest.mark.parametrize(("depth", "outputs"), [(0, 1), (2, 2)])
def test_sparse_machine_on_all_points_with_the_best_readout_is_the_full_one(depth, outputs):
    x, y = data(outputs)
    full = move(FullMachine(x, y, ["sqexp"] * (depth + 1), [3.0] * depth, jitter=1e-10))
    sparse = sparse_of(full, x, outputs, depth)
    objective = full.objective().item() / ROWS
    assert sparse.whole_elbo(x, y) < objective
    sparse.solve_readout(x, y)
    assert sparse.whole_elbo(x, y) == pytest.approx(objective, abs=1e-6)
    test = normal(20, D, seed=5)
    for a, b in zip(sparse(test, whole=True), full(test, whole=True), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_fewer_inducing_points_give_a_lower_bound():
    x, y = data()
    full = FullMachine(x, y, ["sqexp"], [], jitter=1e-10)
    bounds = []
    for number in (2, 4, 8, ROWS):
        sparse = sparse_of(full, x[:number], 1, 0)
        sparse.solve_readout(x, y)
        bounds.append(sparse.whole_elbo(x, y))
    assert bounds == sorted(bounds)
    assert bounds[-1] == pytest.approx(full.objective().item() / ROWS, abs=1e-6)


def test_solved_readout_is_where_the_gradient_vanishes():
    x, y = data(2)
    machine = move(SparseMachine(x[:5], ["sqexp", "arccos"], [3.0], 2))
    machine.solve_readout(x, y)
    loss = machine.elbo(x, y, ROWS)
    for gradient in torch.autograd.grad(loss, list(machine.readout.parameters())):
        assert float(gradient.abs().max()) < 1e-8


def test_expected_log_likelihood_of_a_gaussian_is_the_mean_over_draws():
    x, y = data(2)
    machine = SparseMachine(x[:5], ["sqexp"], [], 2)
    with torch.no_grad():
        mean, variance = machine(x)
        f = mean + variance.sqrt()[:, None] * normal(200_000, ROWS, 2, seed=7)
        drawn = torch.distributions.Normal(f, machine.noise.sqrt()).log_prob(y).sum(-1).mean(0)
        exact = machine.expected_log_likelihood(x, y)
    torch.testing.assert_close(drawn, exact, rtol=0.02, atol=0.02)


def test_expected_log_likelihood_of_labels_settles_with_the_draws():
    x, labels = normal(ROWS, D), torch.arange(ROWS) % 3
    machine = SparseMachine(x[:5], ["sqexp", "sqexp"], [3.0], 3, likelihood="categorical")
    with torch.no_grad():
        few, many = (
            machine.expected_log_likelihood(x, labels, draws=n, generator=torch.Generator().manual_seed(n))
            for n in (20_000, 40_000)
        )
    torch.testing.assert_close(few, many, rtol=0, atol=0.03)
    assert float(many.max()) < 0


@pytest.mark.parametrize("whole", [True, False])
def test_gradients_of_the_objective(whole):
    """Autograd against finite differences, in the Gram matrices and in the inputs of the points."""
    x, _ = data()
    machine = move(SparseMachine(x[:4], ["sqexp", "arccos", "matern32"], [3.0, 5.0], 1))
    names = ["layers.1.v", "layers.3.v", "inputs.inducing", "inputs.log_scale"]

    def objective(points, *values):
        state = dict(zip(names, values, strict=True))
        law = torch.func.functional_call(machine, state, (points, whole))
        kl = sum(3.0 * (v.square().sum() - 2 * torch.linalg.slogdet(v).logabsdet) for v in values[:2])
        return law.mean, law.covariance, kl

    values = [machine.get_parameter(name).detach().clone().requires_grad_() for name in names]
    assert gradcheck(objective, (x[5:7].clone().requires_grad_(), *values), atol=1e-5)


def test_prior_is_normal_in_the_logarithms_of_the_kernels():
    x, y = data()
    machine = FullMachine(x, y, ["sqexp", "sqexp+linear"], [3.0])
    with torch.no_grad():
        machine.inputs.log_scale.copy_(torch.tensor([0.5, -1.0]))
        machine.layers[2].kernels[0].log_inverse_length.fill_(2.0)
        machine.gram_layers[0].v.add_(1.0)  # not a kernel's
    assert machine.log_prior().item() == pytest.approx(-(0.25 + 1 + 4) / 2 / PRIOR_STD**2)


def test_gram_of_a_layer_and_the_prediction_at_training_points():
    x, y = data()
    machine = move(FullMachine(x, y, ["sqexp"] * 3, [3.0, 4.0], jitter=1e-10))
    for layer in (1, 2):
        gram = machine.gram(layer, x, whole=True)
        torch.testing.assert_close(gram.tt, gram.ii, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(machine.gram(0, x).ii, x @ x.mT / D)
    law = MultivariateNormal(
        torch.zeros(ROWS).double(), machine.kernel(x).ii + machine.noise * torch.eye(ROWS)
    )
    expected = law.log_prob(y.mT).sum() - sum(machine.layer_kls())
    torch.testing.assert_close(machine.objective(), expected)


# -- the finite network --------------------------------------------------------------------------------------


def test_wide_finite_network_approaches_the_machine():
    points, noise, width = 5, 0.1, 200
    x, y = normal(points, 3), normal(points, 1, seed=1)
    gram, linear = x @ x.mT / 3 + 0.1 * torch.eye(points), LinearKernel()
    machine = FullMachine(torch.linalg.cholesky(gram) * math.sqrt(points), y, ["linear"] * 2, [1.0],
                          noise=noise - LEAST_NOISE, ard=False, jitter=1e-10)  # fmt: skip
    for name, parameter in machine.named_parameters():
        parameter.requires_grad_(name.endswith(".v"))
    maximise(machine, 300)
    limit = machine.gram(1, x[:0, :0].new_zeros(0, points)).ii.detach()
    with torch.no_grad():
        found = sample_finite_grams(
            gram, y, [linear.matrix] * 2, width, noise=noise, samples=80, burn_in=80, chains=4,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
    assert relative_distance(found.mean[0], limit) < 0.1
    assert relative_distance(gram, limit) > 0.2
    assert 0.5 < found.acceptance < 1


def test_finite_network_of_no_width_is_refused():
    gram = torch.eye(3, dtype=torch.float64)
    linear = [LinearKernel().matrix] * 2
    with pytest.raises(DataError, match="width is 0"):
        sample_finite_grams(gram, gram[:, :1], linear, 0, noise=0.1, samples=1, burn_in=1,
                            generator=torch.Generator())  # fmt: skip
