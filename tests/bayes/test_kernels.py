"""The gpytorch kernels: gpytorch's own test case, the recursion, wide networks, gradients."""

import unittest

import pytest
import torch
from gpytorch.test.base_kernel_test_case import BaseKernelTestCase

from paperback.bayes.kernels import ConvNNGPKernel, NNGPKernel, NTKKernel
from paperback.errors import DataError
from paperback.numerics.kernels import arc_cosine, arc_sine, nngp_and_ntk

D = torch.float64


class TestReLUKernel(unittest.TestCase, BaseKernelTestCase):
    def create_kernel_no_ard(self, **kwargs):
        return NNGPKernel(depth=2, **kwargs)


class TestErfKernel(unittest.TestCase, BaseKernelTestCase):
    def create_kernel_no_ard(self, **kwargs):
        return NNGPKernel(depth=2, activation="erf", weight_variance=3.0, bias_variance=0.4, **kwargs)


class TestTangentKernel(unittest.TestCase, BaseKernelTestCase):
    def create_kernel_no_ard(self, **kwargs):
        return NTKKernel(depth=2, activation="erf", **kwargs)


@pytest.mark.parametrize(("activation", "dual"), [("relu", arc_cosine()), ("erf", arc_sine)])
def test_the_recursion_is_the_ground_floors(activation, dual):
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=D)
    nngp, ntk = nngp_and_ntk(x, dual, depth=4, C_b=0.3, C_W=1.7)
    for cls, expected in ((NNGPKernel, nngp), (NTKKernel, ntk)):
        kernel = cls(depth=3, activation=activation).double()
        kernel.weight_variance, kernel.bias_variance = 1.7, 0.3
        torch.testing.assert_close(kernel(x).to_dense(), expected)
        torch.testing.assert_close(kernel(x[:2], x[2:]).to_dense(), expected[:2, 2:])
        torch.testing.assert_close(kernel(x, diag=True), expected.diagonal())


@pytest.mark.parametrize("cls", [NNGPKernel, NTKKernel])
def test_blocks_of_large_matrices_are_those_of_the_whole(cls):
    generator = torch.Generator().manual_seed(0)
    x, other = (torch.randn(rows, 3, generator=generator, dtype=D) for rows in (450, 300))
    kernel = cls(2).double()
    for points in (x, other):
        whole = kernel.forward(x, points).detach()  # with gradients, so in one piece
        with torch.no_grad():
            torch.testing.assert_close(kernel.forward(x, points), whole)


def test_any_activation_by_quadrature():
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=D)
    closed = NNGPKernel(2, "erf").double()(x).to_dense()
    torch.testing.assert_close(NNGPKernel(2, torch.erf).double()(x).to_dense(), closed, rtol=1e-7, atol=0)


def test_unit_readout_is_the_covariance_of_wide_networks():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, generator=generator, dtype=D)
    kernel = NNGPKernel(2, "relu", weight_variance=2.0, bias_variance=0.2, readout="unit").double()
    width, nets = 300, 400

    def layer(h, fan_out, vw, vb):
        fan_in = h.shape[-1]
        weights = torch.randn(nets, fan_in, fan_out, generator=generator, dtype=D) * (vw / fan_in) ** 0.5
        return h @ weights + vb**0.5 * torch.randn(nets, 1, fan_out, generator=generator, dtype=D)

    h = layer(x.expand(nets, 3, 5), width, 2.0, 0.2).relu()
    h = layer(h, width, 2.0, 0.2).relu()
    gram = h @ h.mT / width  # over the readout's weights the mean is exact
    error = gram.std(0) / nets**0.5
    assert bool(((gram.mean(0) - kernel(x).to_dense()).abs() < 4 * error + 0.01 * gram.mean(0)).all())


def test_gradients_are_those_of_finite_differences_also_at_equal_points():
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=D)
    for activation in ("relu", "erf"):
        kernel = NNGPKernel(2, activation).double()
        start = [parameter.detach().clone().requires_grad_() for parameter in kernel.parameters()]
        names = [name for name, _ in kernel.named_parameters()]
        assert names == ["raw_weight_variance", "raw_bias_variance"]
        loss = kernel(x, x.clone().requires_grad_()).to_dense().sum()
        gradients = torch.autograd.grad(loss, list(kernel.parameters()))
        for index, gradient in enumerate(gradients):
            values = []
            for step in (1e-5, -1e-5):
                moved = [p.detach().clone() for p in start]
                moved[index] += step
                kernel.load_state_dict(dict(zip(names, moved, strict=True)), strict=False)
                values.append(float(kernel(x).to_dense().sum().detach()))
            kernel.load_state_dict(dict(zip(names, [p.detach() for p in start], strict=True)), strict=False)
            assert float(gradient) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)


def test_variances_are_set_in_their_own_units():
    kernel = NNGPKernel(weight_variance=10.0, bias_variance=1.3)
    assert kernel.weight_variance.item() == pytest.approx(10.0)
    kernel.bias_variance = 1.6
    assert kernel.bias_variance.item() == pytest.approx(1.6)


@pytest.mark.parametrize("settings", [{"depth": 0}, {"weight_variance": 0.0}, {"bias_variance": -1.0},
                                      {"activation": "sine"}, {"activation": torch.sign}])  # fmt: skip
def test_bad_arguments(settings):
    with pytest.raises(DataError):
        NNGPKernel(**settings)


def test_residual_networks_have_the_residual_kernel():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, generator=generator, dtype=D)
    kernel = NNGPKernel(3, "erf", readout="unit", residual=True).double()
    kernel.weight_variance, kernel.bias_variance = 1.5, 0.2
    width, nets = 300, 300

    def dense(h):
        weights = torch.randn(nets, h.shape[-1], width, generator=generator, dtype=D)
        bias = torch.randn(nets, 1, width, generator=generator, dtype=D)
        return h @ weights * (1.5 / h.shape[-1]) ** 0.5 + 0.2**0.5 * bias

    h = dense(x.expand(nets, 3, 4))
    for _ in range(2):
        h = h + dense(torch.erf(h))
    gram = torch.erf(h) @ torch.erf(h).mT / width
    error = gram.std(0) / nets**0.5
    assert bool(((gram.mean(0) - kernel(x).to_dense()).abs() < 4 * error + 0.01 * gram.mean(0).abs()).all())


@pytest.mark.parametrize("channels", [1, 2])
def test_convolutional_kernel_is_that_of_wide_convolutional_networks(channels):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, channels, 4, 5, generator=generator, dtype=D)
    kernel = ConvNNGPKernel((channels, 4, 5), depth=2).double()
    kernel.weight_variance, kernel.bias_variance = 1.8, 0.3
    width, grams = 512, []
    for _ in range(12):
        h = images
        for inputs in (channels, width):
            weights = (
                torch.randn(width, inputs, 3, 3, generator=generator, dtype=D) * (1.8 / inputs / 9) ** 0.5
            )
            bias = 0.3**0.5 * torch.randn(width, generator=generator, dtype=D)
            h = torch.nn.functional.conv2d(h, weights, bias, padding=1).relu()
        h = h.flatten(1)
        grams.append(h @ h.mT / h.shape[1])
    gram = torch.stack(grams).mean(0)
    torch.testing.assert_close(kernel(images.flatten(1)).to_dense().detach(), gram, rtol=0.05, atol=0)
    torch.testing.assert_close(
        kernel(images.flatten(1), diag=True), kernel(images.flatten(1)).to_dense().diagonal()
    )


class TestConvolutionalKernel(unittest.TestCase, BaseKernelTestCase):
    def create_kernel_no_ard(self, **kwargs):
        return ConvNNGPKernel((1, 2) if "active_dims" not in kwargs else (1, 1, 4), depth=2, **kwargs)

    def test_active_dims_list(self):
        self.compare_active_dims([0, 2, 4, 6], (2, 2))

    def test_active_dims_range(self):
        self.compare_active_dims(list(range(3, 9)), (2, 3))

    def compare_active_dims(self, dims, shape):
        x = self.create_data_no_batch()
        chosen = ConvNNGPKernel(shape, active_dims=dims)(x).to_dense()
        torch.testing.assert_close(chosen, ConvNNGPKernel(shape)(x[:, dims]).to_dense())


def test_images_of_another_size_are_refused():
    with pytest.raises(DataError, match="12"):
        ConvNNGPKernel((3, 4)).forward(torch.zeros(2, 10), torch.zeros(2, 10))
    with pytest.raises(DataError, match="image_shape"):
        ConvNNGPKernel((3,))
