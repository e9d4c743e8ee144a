"""The mathematics of Gram matrices, kernels, layers and readouts, each against a formula or a simulation."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal, kl_divergence

from paperback.bayes.deep_kernel_machine import (
    ArcCosineKernel,
    Features2Gram,
    GPReadout,
    GramLayer,
    GramNorm,
    LinearKernel,
    Matern32Kernel,
    Matern52Kernel,
    MixtureKernel,
    SquaredExponentialKernel,
    StructGram,
)
from paperback.bayes.deep_kernel_machine.kernels import KERNELS, make_kernel
from paperback.errors import DataError

P, B, D = 7, 5, 3


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def inputs(whole=True):
    return Features2Gram(normal(P, D))(normal(B, D, seed=1), whole)


def block(gram):
    """The Gram matrix of all points."""
    return torch.cat([torch.cat([gram.ii, gram.ti.mT], 1), torch.cat([gram.ti, gram.tt], 1)])


def moved(layer, seed=2):
    with torch.no_grad():
        layer.v.add_(normal(*layer.v.shape, seed=seed))
    return layer


# -- kernels -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*KERNELS, "sqexp+arccos"])
def test_pieces_are_the_blocks_of_one_kernel_matrix(name):
    kernel, gram = make_kernel(name), inputs()
    pieces = kernel(gram)
    torch.testing.assert_close(block(pieces), kernel.matrix(block(gram)), rtol=1e-12, atol=1e-12)
    diagonal = kernel(gram._replace(tt=gram.tt.diagonal())).tt
    torch.testing.assert_close(diagonal, pieces.tt.diagonal(), rtol=1e-7, atol=1e-7)


def test_squared_exponential_is_the_covariance_of_random_fourier_features():
    gram, x = inputs(), torch.cat([normal(P, D), normal(B, D, seed=1)]) / math.sqrt(D)
    frequencies = math.sqrt(0.7) * normal(D, 400_000, seed=3)
    features = torch.cat([(x @ frequencies).cos(), (x @ frequencies).sin()], 1) / math.sqrt(400_000)
    kernel = SquaredExponentialKernel(inverse_length=0.7)
    torch.testing.assert_close(kernel.matrix(block(gram)), features @ features.mT, rtol=0, atol=6e-3)


def test_arc_cosine_is_the_covariance_of_relu_features_and_keeps_the_diagonal():
    gram, x = block(inputs()), torch.cat([normal(P, D), normal(B, D, seed=1)]) / math.sqrt(D)
    features = (x @ normal(D, 400_000, seed=3)).relu() * math.sqrt(2 / 400_000)
    value = ArcCosineKernel().matrix(gram)
    torch.testing.assert_close(value, features @ features.mT, rtol=0, atol=2e-2)
    torch.testing.assert_close(value.diagonal(), gram.diagonal(), rtol=1e-7, atol=0)


@pytest.mark.parametrize(("kernel", "nu"), [(Matern32Kernel, 1.5), (Matern52Kernel, 2.5)])
def test_matern_agrees_with_scikit_learn(kernel, nu):
    from sklearn.gaussian_process.kernels import Matern

    x = normal(P, D) / math.sqrt(D)
    expected = torch.as_tensor(Matern(length_scale=2.0, nu=nu)(x.numpy()))
    value = kernel(inverse_length=0.25).matrix(x @ x.mT)
    torch.testing.assert_close(value, expected, rtol=1e-7, atol=1e-7)


def test_variance_bias_and_weights_of_a_mixture():
    gram = block(inputs())
    linear, square = LinearKernel(variance=3.0, bias=0.5), SquaredExponentialKernel()
    torch.testing.assert_close(linear.matrix(gram), 3 * gram + 0.5)
    mixture = MixtureKernel([linear, square])
    with torch.no_grad():
        mixture.logits.copy_(torch.tensor([0.3, 0.7]).double().log())
    expected = 0.3 * linear.matrix(gram) + 0.7 * square.matrix(gram)
    torch.testing.assert_close(mixture.matrix(gram), expected)
    assert sum(p.numel() for p in mixture.parameters()) == 7  # 2 weights, 3 variances, bias, length


def test_what_is_no_kernel_of_a_gram_matrix_is_refused():
    with pytest.raises(DataError, match="periodic"):
        make_kernel("sqexp+periodic")
    with pytest.raises(DataError, match="must be a function of a Gram matrix"):
        make_kernel(nn.Identity())
    with pytest.raises(DataError, match="variance is -1"):
        LinearKernel(variance=-1.0)


# -- layers --------------------------------------------------------------------------------------------------


def test_divergence_is_that_of_torch():
    kernel = SquaredExponentialKernel()(inputs())
    layer = moved(GramLayer(P, 3.0, jitter=0.0))
    zero = torch.zeros(P, dtype=torch.float64)
    learned, prior = (MultivariateNormal(zero, part) for part in (layer(kernel).ii, kernel.ii))
    torch.testing.assert_close(layer.kl(), 3 * kl_divergence(learned, prior), rtol=1e-6, atol=1e-9)


def test_a_new_layer_is_the_wide_network_with_divergence_zero():
    kernel = SquaredExponentialKernel()(inputs())
    for layer in (GramLayer(P, 3.0, jitter=0.0), GramLayer(P, math.inf)):
        torch.testing.assert_close(block(layer(kernel)), block(kernel), rtol=1e-9, atol=1e-9)
        assert layer.kl().item() == pytest.approx(0.0, abs=1e-12)
    assert not list(GramLayer(P, math.inf).parameters())


def test_quadratic_divergence_is_the_second_order_of_the_exact_one():
    for size in (1e-2, 1e-3):
        exact, quadratic = GramLayer(P, 2.0), GramLayer(P, 2.0, divergence="quadratic")
        for layer in (exact, quadratic):
            with torch.no_grad():
                layer.v.add_(size * normal(P, P))
        assert quadratic.kl().item() == pytest.approx(exact.kl().item(), rel=5 * size)


def test_propagation_is_the_formula_with_inverses():
    kernel = SquaredExponentialKernel()(inputs())
    gram = moved(GramLayer(P, 3.0, jitter=0.0))(kernel)
    t = kernel.ti @ torch.linalg.inv(kernel.ii)
    torch.testing.assert_close(gram.ti, t @ gram.ii, rtol=1e-6, atol=1e-8)
    expected = kernel.tt - t @ kernel.ti.mT + t @ gram.ii @ t.mT
    torch.testing.assert_close(gram.tt, expected, rtol=1e-6, atol=1e-8)


def test_points_that_are_inducing_points_get_the_inducing_gram():
    x = normal(P, D)
    gram = Features2Gram(x)(x, True)
    learned = moved(GramLayer(P, 3.0, jitter=0.0))(SquaredExponentialKernel()(gram))
    torch.testing.assert_close(learned.ti, learned.ii, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(learned.tt, learned.ii, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", KERNELS)
def test_every_layer_is_positive_definite_and_its_diagonal_the_whole_blocks(name):
    gram = Features2Gram(normal(P, 20))(normal(B, 20, seed=1), True)
    diagonal = gram._replace(tt=gram.tt.diagonal())
    for number in range(1, 4):
        kernel, layer = make_kernel(name), moved(GramLayer(P, 3.0, number=number), seed=number)
        gram, diagonal = layer(kernel(gram)), layer(kernel(diagonal))
        assert torch.linalg.eigvalsh(block(gram))[0].item() > 0
        torch.testing.assert_close(diagonal.tt, gram.tt.diagonal(), rtol=1e-6, atol=1e-8)
        assert not diagonal.whole


def test_batches_of_points_are_as_one_by_one():
    layers = nn.Sequential(SquaredExponentialKernel(), moved(GramLayer(P, 3.0)), ArcCosineKernel())
    features, x = Features2Gram(normal(P, D)), normal(2, 4, B, D, seed=1)
    gram = layers(features(x, True))
    one = layers(features(x[1, 2], True))
    torch.testing.assert_close(gram.tt[1, 2], one.tt)
    torch.testing.assert_close(gram.ti[1, 2], one.ti)


def test_rotation_of_the_inputs_changes_nothing_and_permutation_permutes():
    rotation = torch.linalg.qr(normal(D, D, seed=5)).Q
    x, layer = normal(P, D), moved(GramLayer(P, 3.0))
    kernel = SquaredExponentialKernel()
    before = layer(kernel(Features2Gram(x)(x))).ii
    torch.testing.assert_close(layer(kernel(Features2Gram(x @ rotation)(x @ rotation))).ii, before)
    new = GramLayer(P, 3.0)  # without a learned part, whose basis is that of the points
    order = torch.randperm(P, generator=torch.Generator().manual_seed(0))
    plain = new(kernel(Features2Gram(x)(x))).ii
    torch.testing.assert_close(new(kernel(Features2Gram(x[order])(x))).ii, plain[order][:, order])


def test_norm_makes_the_mean_diagonal_the_learned_scale():
    gram = inputs()._replace(tt=10 * inputs().tt.diagonal(), ti=3 * inputs().ti)
    norm = GramNorm("batch")
    scaled = norm(gram)
    assert scaled.ii.diagonal().mean().item() == pytest.approx(1.0)
    assert scaled.tt.mean().item() == pytest.approx(1.0)
    assert float(norm.running) == pytest.approx(0.9 + 0.1 * float(gram.tt.mean()))
    assert norm.eval()(gram).tt.mean().item() == pytest.approx(float(gram.tt.mean() / norm.running))
    whole = GramNorm("inducing")(inputs())
    torch.testing.assert_close(block(whole), block(inputs()) / inputs().ii.diagonal().mean())
    with pytest.raises(DataError, match="gram_norm is 'mean'"):
        GramNorm("mean")


def test_stochastic_gram_has_the_learned_one_as_its_mean_and_is_still_in_evaluation():
    kernel = SquaredExponentialKernel()(inputs())
    layer = moved(GramLayer(P, 3.0, columns=30))
    torch.manual_seed(0)
    mean = torch.stack([layer(kernel).ii for _ in range(4000)]).mean(0)
    layer.eval()
    expected = layer(kernel).ii
    torch.testing.assert_close(mean, expected, rtol=0, atol=0.05 * float(expected.diagonal().max()))
    torch.testing.assert_close(layer(kernel).ii, expected, rtol=0, atol=0)


def test_a_matrix_without_a_factor_names_its_layer():
    bad = -torch.eye(P, dtype=torch.float64)
    kernel = StructGram(bad, torch.zeros(0, P, dtype=torch.float64), torch.zeros(0, dtype=torch.float64))
    with pytest.raises(DataError, match=r"kernel matrix below layer 3 .*raise jitter"):
        GramLayer(P, 3.0, number=3)(kernel)


@pytest.mark.parametrize("dof", [0.0, -1.0, math.nan])
def test_degrees_of_freedom_must_be_positive(dof):
    with pytest.raises(DataError, match="dof is"):
        GramLayer(P, dof)


# -- readout -------------------------------------------------------------------------------------------------


def test_readout_divergence_is_that_of_torch():
    readout = GPReadout(P, 2)
    with torch.no_grad():
        readout.mean.copy_(normal(P, 2))
        readout.root.copy_(normal(P, P) / 3)
    prior = MultivariateNormal(torch.zeros(P).double(), torch.eye(P).double())
    q = (MultivariateNormal(mean, scale_tril=readout.scale_tril) for mean in readout.mean.mT)
    torch.testing.assert_close(readout.kl(), sum(kl_divergence(law, prior) for law in q))


def test_readout_is_the_formula_with_inverses():
    kernel = SquaredExponentialKernel()(inputs())
    readout = GPReadout(P, 2, jitter=0.0)
    with torch.no_grad():
        readout.mean.copy_(normal(P, 2))
        readout.root.copy_(normal(P, P) / 3)
    lower = torch.linalg.cholesky(kernel.ii)
    t = kernel.ti @ torch.linalg.inv(kernel.ii)
    a = lower @ readout.scale_tril
    mean, covariance = readout(kernel)
    torch.testing.assert_close(mean, t @ lower @ readout.mean, rtol=1e-6, atol=1e-8)
    expected = kernel.tt - t @ kernel.ti.mT + t @ a @ a.mT @ t.mT
    torch.testing.assert_close(covariance, expected, rtol=1e-6, atol=1e-8)
