"""The vision transformer: its attention against torch's, its tokens, kept patches, saving, bad input."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from paperback.errors import DataError
from paperback.networks import ViT
from paperback.networks.vit import Attention, sine_positions
from paperback.training import generator, seeded


def images(n=3, channels=1, height=28, width=28):
    return torch.rand(n, channels, height, width, generator=generator(0, "images"))


@pytest.fixture(params=[False, True], ids=["mean", "class token"])
def vit(request):
    with seeded(0):
        return ViT(dim=16, depth=3, heads=4, class_token=request.param).eval()


def test_attention_is_torchs_multi_head_attention():
    with seeded(0):
        ours, x = Attention(24, 3), torch.randn(2, 7, 24)
    theirs = nn.MultiheadAttention(24, 3, batch_first=True)
    theirs.in_proj_weight.data, theirs.in_proj_bias.data = ours.qkv.weight.data, ours.qkv.bias.data
    theirs.out_proj.weight.data, theirs.out_proj.bias.data = ours.out.weight.data, ours.out.bias.data
    torch.testing.assert_close(ours(x), theirs(x, x, x, need_weights=False)[0])


def test_features_come_from_the_tokens(vit):
    x = images()
    states = vit.tokens(x).states
    extra = vit.class_token is not None
    assert states.shape == (3, 49 + extra, 16)
    torch.testing.assert_close(vit(x), states[:, 0] if extra else states.mean(1))
    assert (vit.dim, vit.stride, vit.widths, vit.n_patches) == (16, 4, (16,), 49)


def test_kept_patches_are_those_patches_and_no_others(vit):
    x, extra = images(), int(vit.class_token is not None)
    keep = torch.stack([torch.randperm(49, generator=generator(i))[:12] for i in range(3)])
    whole = vit.embed(x)
    for row in range(3):
        assert torch.equal(vit.embed(x, keep)[row, extra:], whole[row, extra:][keep[row]])
    # What is not kept is not seen.
    pixels = vit.patchify(x)
    hidden = torch.ones(3, 49, dtype=torch.bool).scatter(1, keep, False)
    pixels[hidden] = 7.0
    assert torch.equal(vit.tokens(vit.unpatchify(pixels), keep).states, vit.tokens(x, keep).states)
    # All patches in another order give the same tokens in that order.
    order = torch.randperm(49, generator=generator(9)).expand(3, -1)
    again = vit.tokens(x, order).states[:, extra:]
    torch.testing.assert_close(again, vit.tokens(x).states[:, extra:][:, order[0]], atol=1e-5, rtol=1e-4)


def test_queries_keys_and_values_are_those_of_the_block(vit):
    x = images()
    taps = vit.tokens(x, qkv=(0, -1)).qkv
    assert set(taps) == {0, -1}
    count = 49 + (vit.class_token is not None)
    assert all(part.shape == (3, 4, count, 4) for tap in taps.values() for part in tap)
    first = vit.blocks[0]
    projected = first.attention.qkv(first.norm1(vit.embed(x)))
    q, k, v = (part.transpose(1, 2).flatten(2) for part in taps[0])
    torch.testing.assert_close(torch.cat([q, k, v], dim=-1), projected)
    torch.testing.assert_close(vit.tokens(x, qkv=(2,)).qkv[2].k, taps[-1].k)


def test_patchify_takes_patches_row_by_row_and_is_undone():
    vit = ViT(image_size=(8, 12), in_channels=3, patch=4, dim=8, depth=1, heads=1)
    x = images(2, 3, 8, 12)
    patches = vit.patchify(x)
    assert patches.shape == (2, 6, 48)
    assert torch.equal(patches[1, 4], x[1, :, 4:8, 4:8].flatten())
    assert torch.equal(vit.unpatchify(patches), x)
    assert vit(x).shape == (2, 8)


def test_positions_begin_as_sines_of_row_and_column():
    table = sine_positions((3, 5), 8)
    assert table.shape == (15, 8)
    torch.testing.assert_close(table[7, 0], torch.sin(torch.tensor(1.0)))  # row 1
    torch.testing.assert_close(table[7, 4], torch.sin(torch.tensor(2.0)))  # column 2
    assert len({tuple(row) for row in table.tolist()}) == 15


def test_logits_saving_batches_and_export(tmp_path):
    with seeded(0):
        model = ViT(dim=16, depth=2, heads=2, class_token=True, classes=5).eval()
    x = images(4)
    assert model(x).shape == (4, 5)
    torch.testing.assert_close(model(x), model.head(model.features(x)))
    torch.testing.assert_close(model(x), torch.cat([model(row) for row in x.split(1)]), atol=1e-5, rtol=1e-4)
    model.save_pretrained(tmp_path / "vit")
    assert torch.equal(ViT.from_pretrained(tmp_path / "vit")(x), model(x))
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))


def test_every_parameter_gets_a_gradient():
    model = ViT(dim=16, depth=2, heads=2, class_token=True, classes=5)
    model(images()).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patch": 5}, "patch is 5; it must divide"),
        ({"dim": 30, "heads": 4}, "dim is 30"),
        ({"depth": 0}, "depth is 0"),
        ({"classes": 0}, "classes is 0"),
    ],
)
def test_numbers_that_make_no_network_are_refused(settings, message):
    with pytest.raises(DataError, match=message):
        ViT(**settings)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.rand(2, 28, 28), r"unsqueeze\(1\)"),
        (torch.rand(2, 1, 32, 32), "made for 28x28"),
        (torch.zeros(2, 1, 28, 28, dtype=torch.uint8), "takes floats"),
    ],
)
def test_images_that_do_not_fit_are_refused(vit, x, message):
    with pytest.raises(DataError, match=message):
        vit(x)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (torch.zeros(2, 5, dtype=torch.long), r"\(3, kept\)"),
        (torch.full((3, 5), 49), "outside 0..48"),
        (torch.zeros(3, 5), "whole numbers"),
    ],
)
def test_patches_that_are_not_there_are_refused(vit, keep, message):
    with pytest.raises(DataError, match=message):
        vit.embed(images(), keep)


def test_blocks_that_are_not_there_are_refused(vit):
    with pytest.raises(DataError, match=r"blocks 0..2"):
        vit.tokens(images(), qkv=(3,))
