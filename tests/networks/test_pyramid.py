"""ResNet and ConvNeXt: shapes, the arithmetic of their blocks, saving, and images that do not fit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from paperback.errors import DataError
from paperback.networks import ConvNeXt, LayerNorm2d, ResNet
from paperback.networks.convnext import Block
from paperback.networks.pyramid import NORMS
from paperback.study.measure import parameters
from paperback.training import generator, seeded

NETWORKS = [ResNet, ConvNeXt]


def images(n=3, channels=1, height=28, width=28):
    return torch.rand(n, channels, height, width, generator=generator(0, "images"))


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(("height", "width"), [(28, 28), (32, 32), (30, 45), (64, 64)])
def test_each_stage_halves_the_map_and_doubles_its_channels(network, height, width):
    model = network(in_channels=3, width=8).eval()
    maps = model.feature_maps(images(2, 3, height, width))
    assert model.widths == (8, 16, 32)
    assert (model.dim, model.stride) == (32, 8)
    for i, found in enumerate(maps):
        step = 2 ** (i + 1)
        assert found.shape == (2, model.widths[i], -(-height // step), -(-width // step))


@pytest.mark.parametrize("network", NETWORKS)
def test_features_are_the_pooled_last_map_and_logits_their_linear_image(network):
    x = images()
    model = network(classes=5).eval()
    pooled = model.feature_maps(x)[-1].mean((2, 3))
    expected = model.head_norm(pooled) if network is ConvNeXt else pooled
    torch.testing.assert_close(model.features(x), expected)
    torch.testing.assert_close(model(x), F.linear(expected, model.head.weight, model.head.bias))
    bare = network().eval()
    torch.testing.assert_close(bare(x), bare.features(x))


def test_the_smallest_resnet_has_the_parameters_that_its_layers_say():
    # 3x3 stem and two 3x3 in a block, 1x1 shortcuts where the width changes, two numbers a channel for a norm
    weights = 9 * 16 + 2 * 9 * 16**2 + 9 * (16 * 32 + 32**2) + 16 * 32 + 9 * (32 * 64 + 64**2) + 32 * 64
    assert parameters(ResNet(width=16)) == weights + 2 * (3 * 16 + 3 * 32 + 3 * 64)


def test_a_convnext_block_is_the_papers_with_linear_layers():
    with seeded(0):
        block = Block(8, 7)
        block.gamma.data.normal_()
        x = torch.randn(2, 8, 9, 9)
    inner = block.norm(block.depthwise(x)).permute(0, 2, 3, 1)
    inner = F.gelu(F.linear(inner, block.expand.weight.flatten(1), block.expand.bias))
    inner = F.linear(inner, block.project.weight.flatten(1), block.project.bias)
    torch.testing.assert_close(block(x), x + (inner * block.gamma.flatten()).permute(0, 3, 1, 2))
    assert block.depthwise.groups == 8


def test_layer_norm_of_a_map_is_over_the_channels_of_each_position():
    norm = LayerNorm2d(6)
    x = torch.randn(2, 6, 4, 5, generator=generator(1))
    made = norm(x)
    torch.testing.assert_close(made.mean(1), torch.zeros(2, 4, 5), atol=1e-6, rtol=0)
    torch.testing.assert_close(made.var(1, correction=0), torch.ones(2, 4, 5), atol=1e-3, rtol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_every_norm_keeps_the_order_of_the_activations_and_gives_gradients(norm):
    with seeded(0):
        model = ResNet(width=16, blocks=3, norm=norm)
    made = model(torch.randn(64, 1, 28, 28, generator=generator(0)))
    last = model.feature_maps(torch.randn(64, 1, 28, 28, generator=generator(0)))[-1]
    assert 0.3 < last.square().mean().sqrt() < 10
    made.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    kinds = {"batch": nn.BatchNorm2d, "layer": LayerNorm2d, "group": nn.GroupNorm, "none": nn.Identity}
    assert isinstance(model.stem[1], kinds[norm])


@pytest.mark.parametrize("network", NETWORKS)
def test_the_last_row_of_an_odd_map_is_seen(network):
    x = images(1)
    x.requires_grad_()
    with seeded(0):
        network(width=8).eval()(x).square().sum().backward()
    assert (x.grad.abs() > 0).float().mean() > 0.95


@pytest.mark.parametrize("network", NETWORKS)
def test_a_batch_is_its_images_one_by_one(network):
    model = network().eval()
    x = images(4)
    torch.testing.assert_close(model(x), torch.cat([model(row) for row in x.split(1)]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("network", NETWORKS)
def test_saved_and_loaded_it_is_the_same_network(network, tmp_path):
    model = network(width=8, classes=3)
    model(images(8))  # batch norm has seen something
    model.eval().save_pretrained(tmp_path / "net")
    again = network.from_pretrained(tmp_path / "net")
    assert torch.equal(again(images()), model(images()))
    assert (again.widths, again.classes, again.training) == ((8, 16, 32), 3, False)


@pytest.mark.parametrize("network", NETWORKS)
def test_it_can_be_exported(network):
    model = network(width=8, classes=3).eval()
    program = torch.export.export(model, (images(2),))
    torch.testing.assert_close(program.module()(images(2)), model(images(2)))


def test_float64_and_the_users_random_state():
    model = ResNet(width=8).double().eval()
    assert model(images().double()).dtype == torch.float64
    with seeded(3):
        first = ResNet(width=8)
    with seeded(3):
        second = ResNet(width=8)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.rand(2, 28, 28), r"unsqueeze\(1\)"),
        (torch.rand(2, 3, 28, 28), r"\(n, 1, height, width\)"),
        (torch.zeros(2, 1, 28, 28, dtype=torch.uint8), r"images.float\(\) / 255"),
    ],
)
def test_images_that_do_not_fit_are_refused(network, x, message):
    with pytest.raises(DataError, match=message):
        network()(x)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 0}, "width is 0"),
        ({"stages": 2.0}, "stages is 2.0"),
        ({"blocks": -1}, "blocks is -1"),
        ({"classes": 0}, "classes is 0"),
        ({"norm": "instance"}, "norm is 'instance'; it must be one of batch, layer, group, none"),
    ],
)
def test_numbers_that_make_no_network_are_refused(settings, message):
    with pytest.raises(DataError, match=message):
        ResNet(**settings)


def test_a_kernel_without_a_middle_is_refused():
    with pytest.raises(DataError, match="kernel_size is 4"):
        ConvNeXt(kernel_size=4)
