"""Sparse layers against dense layers on the active positions, and against batch norm of gathered rows."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import Tensor, nn

from paperback.errors import DataError, NotSupportedError
from paperback.networks.convnext import ConvNeXt
from paperback.networks.pyramid import LayerNorm2d
from paperback.networks.resnet import ResNet
from paperback.represent.spark import (
    SparseBatchNorm2d,
    SparseContext,
    SparseConv2d,
    active_shares,
    dense_to_sparse,
    random_mask,
    sparse_to_dense,
)


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_mask(n: int = 5, grid: tuple[int, int] = (4, 4), ratio: float = 0.6, seed: int = 0) -> Tensor:
    return random_mask(n, grid, ratio, draws(seed))


def up(mask: Tensor, factor: int) -> Tensor:
    return mask.repeat_interleave(factor, 2).repeat_interleave(factor, 3)


def run_sparse(layer: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    with SparseContext(mask).on(layer):
        return layer(x)


def test_a_full_mask_gives_the_dense_result_bit_for_bit() -> None:
    x, mask = torch.randn(5, 3, 16, 16, generator=draws()), torch.ones(5, 1, 4, 4, dtype=torch.bool)
    for dense in (nn.Conv2d(3, 8, 3, padding=1), nn.MaxPool2d(2), nn.AvgPool2d(2), nn.BatchNorm2d(3)):
        sparse = dense_to_sparse(copy.deepcopy(dense))
        assert torch.equal(run_sparse(sparse, x, mask), dense(x))


@pytest.mark.parametrize("stride", [1, 2])
def test_a_sparse_convolution_is_the_dense_one_at_active_positions_and_zero_elsewhere(stride: int) -> None:
    dense = nn.Conv2d(3, 8, 3, stride=stride, padding=1)
    mask = some_mask()
    x = torch.randn(5, 3, 16, 16, generator=draws()) * up(mask, 4)
    found, expected = run_sparse(dense_to_sparse(dense), x, mask), dense(x)
    active = up(mask, 4 // stride).expand_as(found)
    assert torch.equal(found[active], expected[active])
    assert (found[~active] == 0).all()
    assert active.any()
    assert (~active).any()


def test_the_active_set_is_the_same_after_twenty_layers() -> None:
    torch.manual_seed(0)
    layers = [m for _ in range(20) for m in (nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))]
    network, mask = dense_to_sparse(nn.Sequential(*layers)), some_mask()
    with SparseContext(mask).on(network) as context:
        y = network(context.hide(torch.randn(5, 4, 16, 16, generator=draws())))
    assert torch.equal((y != 0).any(1, keepdim=True), up(mask, 4))


def test_sparse_batch_norm_is_batch_norm_of_the_active_rows() -> None:
    mask = some_mask()
    x = torch.randn(5, 6, 8, 8, generator=draws()) * up(mask, 2)
    weights = torch.randn(5, 6, 8, 8, generator=draws(1))
    sparse, rows_norm, dense = SparseBatchNorm2d(6), nn.BatchNorm1d(6), nn.BatchNorm2d(6)
    for norm in (sparse, rows_norm, dense):
        nn.init.uniform_(norm.weight, 0.5, 1.5, generator=draws(2))
        nn.init.uniform_(norm.bias, 0.5, 1.5, generator=draws(3))
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    index = up(mask, 2)[:, 0].nonzero(as_tuple=True)
    found = run_sparse(sparse, a, mask)
    rows = rows_norm(b.permute(0, 2, 3, 1)[index])
    torch.testing.assert_close(found.permute(0, 2, 3, 1)[index], rows)
    assert (found * ~up(mask, 2) == 0).all()
    (found * weights).sum().backward()
    (rows * weights.permute(0, 2, 3, 1)[index]).sum().backward()
    torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(sparse.weight.grad, rows_norm.weight.grad)
    torch.testing.assert_close(sparse.running_mean, rows_norm.running_mean)
    torch.testing.assert_close(sparse.running_var, rows_norm.running_var)
    dense(x)
    assert (dense.running_var - sparse.running_var).abs().min() > 1e-3  # zeros count in a dense norm
    for norm in (sparse, rows_norm):
        norm.eval()
    torch.testing.assert_close(
        run_sparse(sparse, x, mask).permute(0, 2, 3, 1)[index], rows_norm(x.permute(0, 2, 3, 1)[index])
    )


@pytest.mark.parametrize("last", [False, True])
def test_sparse_layer_norm_is_per_active_position(last: bool) -> None:
    mask = some_mask()
    x = torch.randn(5, 6, 8, 8, generator=draws()) * up(mask, 2)
    active = up(mask, 2).expand_as(x)
    if last:
        x, active = x.permute(0, 2, 3, 1), active.permute(0, 2, 3, 1)
    dense = nn.LayerNorm(6) if last else LayerNorm2d(6)
    nn.init.ones_(dense.bias)
    found = run_sparse(dense_to_sparse(dense), x, mask)
    torch.testing.assert_close(found[active], dense(x)[active])
    assert (found[~active] == 0).all()


@pytest.mark.parametrize("groups", [1, 2, None])
def test_group_and_instance_norm_take_the_statistics_of_active_positions(groups: int | None) -> None:
    mask = some_mask()
    x = torch.randn(5, 6, 8, 8, generator=draws()) * up(mask, 2)
    dense = nn.InstanceNorm2d(6, affine=True) if groups is None else nn.GroupNorm(groups, 6)
    nn.init.ones_(dense.bias)
    found = run_sparse(dense_to_sparse(dense), x, mask)
    for image, active, y in zip(x, up(mask, 2)[:, 0], found, strict=True):
        seen = image[:, active][None, :, :, None]  # (1, c, active, 1)
        torch.testing.assert_close(y[:, active], dense(seen)[0, :, :, 0], rtol=1e-4, atol=1e-5)
        assert (y[:, ~active] == 0).all()


def test_global_pooling_averages_over_active_positions_and_what_follows_is_dense() -> None:
    mask = some_mask()
    x = torch.randn(5, 6, 8, 8, generator=draws()) * up(mask, 2)
    excite = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 6, 1), nn.Sigmoid())
    seen = x.sum((2, 3), keepdim=True) / up(mask, 2).sum((2, 3), keepdim=True)
    torch.testing.assert_close(
        run_sparse(dense_to_sparse(excite), x, mask), excite[1:](seen), rtol=1e-5, atol=1e-6
    )
    assert (run_sparse(dense_to_sparse(nn.Sigmoid()), x, mask) * ~up(mask, 2) == 0).all()


@pytest.mark.parametrize("make", [lambda: ResNet(1, 8, 3, 2), lambda: ConvNeXt(1, 8, 3, 1),
                                  lambda: ResNet(1, 8, 3, 1, norm="group"),
                                  lambda: ResNet(1, 8, 3, 1, norm="none")])  # fmt: skip
def test_pixels_under_the_mask_change_nothing(make) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    network, mask = dense_to_sparse(make()), some_mask()
    x = torch.randn(5, 1, 32, 32, generator=draws()).requires_grad_()
    other = torch.where(up(mask, 8), x.detach(), torch.randn(5, 1, 32, 32, generator=draws(1)))
    context = SparseContext(mask)
    with context.on(network):
        maps, changed = (network.feature_maps(context.hide(images)) for images in (x, other))
    for found, again in zip(maps, changed, strict=True):
        assert torch.equal(found, again)
        assert (found * ~up(mask, found.shape[-1] // 4) == 0).all()
    sum(found.square().sum() for found in maps).backward()  # type: ignore[union-attr]
    assert x.grad is not None
    assert (x.grad[~up(mask, 8)] == 0).all()
    assert (x.grad != 0).any()


def test_there_and_back_keeps_names_weights_and_outputs() -> None:
    torch.manual_seed(0)
    for dense in (ResNet(1, 8, 3), ConvNeXt(1, 8, 3)):
        dense.eval()
        sparse = dense_to_sparse(dense)
        back = sparse_to_dense(sparse)
        assert list(sparse.state_dict()) == list(dense.state_dict())
        assert all(a is b for a, b in zip(sparse.parameters(), dense.parameters(), strict=True))
        assert [type(m) for m in back.modules()] == [type(m) for m in dense.modules()]
        x = torch.randn(2, 1, 32, 32, generator=draws())
        assert torch.equal(back(x), dense(x))
        assert not any(isinstance(m, SparseConv2d) for m in dense.modules())


def test_networks_of_transformers_are_converted() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    configs = [
        transformers.ResNetConfig(num_channels=1, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1],
                                  layer_type="basic"),
        transformers.ConvNextConfig(num_channels=1, patch_size=2, num_stages=2, hidden_sizes=[4, 8],
                                    depths=[1, 1], layer_scale_init_value=0.5),
    ]  # fmt: skip
    for config in configs:
        network = transformers.AutoModel.from_config(config).eval()
        mask = some_mask(3, (4, 4))
        images = torch.randn(3, 1, 32, 32, generator=draws())
        sparse, context = dense_to_sparse(network), SparseContext(mask)
        with context.on(sparse):
            last = sparse(context.hide(images)).last_hidden_state
        share = (last != 0).any(1).float().mean()
        assert share == pytest.approx(float(mask.float().mean()))
        assert torch.equal(sparse_to_dense(sparse)(images).pooler_output, network(images).pooler_output)


def test_masks_erode_in_a_dense_network_and_stay_in_a_sparse_one() -> None:
    torch.manual_seed(0)
    network, mask = ResNet(1, 8, 3), some_mask(20)
    x = torch.randn(20, 1, 32, 32, generator=draws())
    sparse, dense = active_shares(dense_to_sparse(network), x, mask), active_shares(network, x, mask)
    assert set(sparse.values()) == {6 / 16}
    assert list(sparse) == list(dense)
    shares = list(dense.values())
    assert 6 / 16 < shares[0] < shares[-1]
    assert shares[-1] > 0.9


def test_two_threads_in_one_network_see_their_own_masks() -> None:
    layer = dense_to_sparse(nn.Conv2d(1, 1, 3, padding=1))
    x, barrier = torch.randn(4, 1, 8, 8, generator=draws()), threading.Barrier(2)
    masks, found = [some_mask(4, (2, 2), 0.5, seed) for seed in (0, 1)], {}

    def work(i: int) -> None:
        with SparseContext(masks[i]).on(layer):
            barrier.wait()
            found[i] = layer(x)
            barrier.wait()

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in (0, 1):
        assert torch.equal(found[i] != 0, up(masks[i], 4))
    assert not torch.equal(found[0], found[1])


def test_a_copy_of_a_sparse_network_has_no_mask_of_the_original() -> None:
    layer = dense_to_sparse(nn.Conv2d(1, 1, 3, padding=1))
    with SparseContext(some_mask(1)).on(layer):
        twin = copy.deepcopy(layer)
        with pytest.raises(NotSupportedError, match="sparse_to_dense"):
            twin(torch.zeros(1, 1, 8, 8))
    with pytest.raises(NotSupportedError, match="which positions are active"):
        layer(torch.zeros(1, 1, 8, 8))


def test_bad_masks_sizes_and_layers_are_refused_by_name() -> None:
    with pytest.raises(DataError, match="give bools"):
        SparseContext(torch.ones(1, 1, 4, 4))
    with pytest.raises(DataError, match="map of 6x6"):
        run_sparse(dense_to_sparse(nn.Conv2d(1, 1, 3)), torch.zeros(1, 1, 8, 8), some_mask(1))
    network = nn.Sequential(nn.Conv2d(1, 1, 3), nn.Upsample(scale_factor=2), nn.ConvTranspose2d(1, 1, 2))
    with pytest.raises(NotSupportedError, match=r"1 \(Upsample\), 2 \(ConvTranspose2d\)"):
        dense_to_sparse(network)
    for bad in (nn.Conv1d(1, 1, 3), nn.AdaptiveAvgPool2d(2), nn.MaxPool2d(2, return_indices=True)):
        with pytest.raises(NotSupportedError, match=type(bad).__name__):
            dense_to_sparse(nn.Sequential(bad))
