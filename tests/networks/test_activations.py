"""Activations by hooks: what is collected, and that the model stays as it was."""

from pathlib import Path

import pytest
import torch
from torch import nn

from paperback.errors import DataError
from paperback.networks import collect_activations


def model():
    torch.manual_seed(0)
    relu = nn.ReLU(inplace=True)
    return nn.Sequential(nn.Linear(3, 4), relu, nn.Linear(4, 5), relu, nn.BatchNorm1d(5), nn.Dropout(0.5))


X = torch.randn(70, 3, generator=torch.Generator().manual_seed(1))


def test_chunks_equal_one_pass_and_the_computation_by_hand():
    net = model().eval()
    found, whole = collect_activations(net, X, batch_size=9), collect_activations(net, X, batch_size=70)
    assert list(found) == ["0", "1", "2", "1#2", "4", "5"]
    first = net[0](X).detach()
    torch.testing.assert_close(found["0"], first)
    torch.testing.assert_close(found["1"], first.relu())
    for name in found:
        torch.testing.assert_close(found[name], whole[name])
        assert not found[name].requires_grad


def test_pre_is_what_goes_in_even_before_an_in_place_activation():
    net = model()
    pre = collect_activations(net, X, nn.ReLU, pre=True)
    torch.testing.assert_close(pre["1"], net[0](X).detach())
    assert (pre["1"] < 0).any()


def test_the_model_is_as_before():
    net = model()
    net.train()
    net[5].eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    collect_activations(net, X)
    assert [m.training for m in net] == [True, True, True, True, True, False]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_hooks_and_flags_are_restored_after_an_error():
    net = model().train()
    with pytest.raises(RuntimeError):
        collect_activations(net, torch.randn(4, 7))
    assert net.training
    assert not any(m._forward_hooks for m in net.modules())


def test_training_mode_draws_dropout():
    assert (collect_activations(model(), X, ["5"], training=True)["5"] == 0).float().mean() > 0.4


def test_beyond_the_limit_they_lie_on_disk_in_half_precision(tmp_path):
    memory = collect_activations(model(), X)
    disk = collect_activations(model(), X, memory_limit=100, folder=tmp_path)
    for name, tensor in memory.items():
        assert disk[name].dtype == torch.float16
        torch.testing.assert_close(disk[name].float(), tensor, rtol=1e-3, atol=1e-3)
    assert not list(tmp_path.iterdir())  # the file has no name
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(tmp_path) in maps.read_text()


def test_a_value_too_large_for_half_precision_is_refused():
    big = nn.Linear(3, 2)
    with torch.no_grad():
        big.weight.fill_(1e6)
    with pytest.raises(DataError, match=r"too large for torch\.float16"):
        collect_activations(big, X.abs() + 1, memory_limit=1)
    assert collect_activations(big, X, memory_limit=1, dtype=torch.float32)[""].dtype == torch.float32


def test_several_inputs_keywords_and_structured_outputs():
    lstm = nn.LSTM(3, 4, batch_first=True)
    x = torch.randn(6, 5, 3)
    torch.testing.assert_close(collect_activations(lstm, x, [""])[""], lstm(x)[0].detach())
    bilinear = nn.Bilinear(3, 3, 2)
    by_place = collect_activations(bilinear, (X, X), batch_size=8)
    by_name = collect_activations(bilinear, {"input1": X, "input2": X})
    torch.testing.assert_close(by_place[""], by_name[""])


@pytest.mark.parametrize(
    ("x", "settings", "message"),
    [
        (X[:0], {}, "at least one"),
        ((X, X[:3]), {}, "equally many"),
        (X, {"batch_size": 0}, "batch_size"),
        (X, {"layers": ["nope"]}, "nope"),
        (X, {"layers": []}, "empty"),
        (X, {"layers": nn.Conv2d}, "no module of such a type"),
    ],
)
def test_bad_arguments(x, settings, message):
    with pytest.raises(DataError, match=message):
        collect_activations(model(), x, **settings)


def test_a_layer_without_the_batch_in_front_or_without_a_call_is_named():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.turn, self.unused = nn.Identity(), nn.Linear(2, 2)

        def forward(self, x):
            return self.turn(x.T).T

    with pytest.raises(DataError, match="'unused' was not called"):
        collect_activations(Odd(), X)
    with pytest.raises(DataError, match=r"'turn' has shape \(3, 70\)"):
        collect_activations(Odd(), X, ["turn"])
