"""The mixer: its contract in every kind, documents, padding, the control, what it keeps exact."""

import copy
import math

import pytest
import torch
from torch import nn

from paperback.errors import DataError, NotSupportedError
from paperback.layers.mamba import Mamba, no_decay_groups
from paperback.study.measure import parameters
from paperback.testing.layers import LAYER_CHECKS, LayerCase

KINDS = {
    "s6": {},
    "lti": {"selective": False},
    "ssd": {"kind": "ssd", "headdim": 4, "ngroups": 2},
    "mamba3": {"kind": "mamba3", "headdim": 4, "ngroups": 2},
}
OTHERS = {"bidirectional": {"scan": "bidirectional"}, "cross": {"scan": "cross", "grid": (3, 4)}}


def mixer(name, **options):
    torch.manual_seed(0)
    return Mamba(8, d_state=4, chunk=5, **(KINDS | OTHERS)[name], **options).double()


@pytest.mark.parametrize("check", LAYER_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", [*KINDS, *OTHERS])
def test_contract(name, check):
    options = (KINDS | OTHERS)[name]
    check(LayerCase(lambda: Mamba(8, d_state=4, chunk=5, **options)))


@pytest.mark.parametrize("name", KINDS)
def test_one_exported_program_takes_many_lengths(name):
    """S6 takes any; the kinds with a dual form take multiples of the chunk."""
    layer = Mamba(8, d_state=4, chunk=5, **KINDS[name]).eval()
    any_length = name in ("s6", "lti")
    length = torch.export.Dim("length", min=4) if any_length else 5 * torch.export.Dim("chunks", min=3)
    shapes = {"u": {0: torch.export.Dim("batch", min=1), 1: length}}
    program = torch.export.export(layer, (torch.randn(2, 15, 8),), dynamic_shapes=shapes).module()
    for shape in ((1, 20, 8), (5, 23 if any_length else 40, 8)):
        u = torch.randn(shape)
        assert torch.allclose(program(u), layer(u), atol=1e-6)


@pytest.mark.parametrize("name", KINDS)
def test_a_reset_separates_two_sequences(name):
    layer, u = mixer(name), torch.randn(3, 13, 8, dtype=torch.float64)
    for start in (1, 6, 12):
        reset = torch.zeros(3, 13, dtype=torch.bool)
        reset[:, start] = True
        y, state = layer(u, reset=reset, return_state=True)
        second, alone = layer(u[:, start:], return_state=True)
        assert torch.allclose(y, torch.cat([layer(u[:, :start]), second], 1))
        following = torch.randn(3, 8, dtype=torch.float64)
        assert torch.allclose(layer.step(following, state)[0], layer.step(following, alone)[0])


@pytest.mark.parametrize("name", KINDS)
def test_padding_on_both_sides_is_as_if_it_were_not_there(name):
    layer, u = mixer(name), torch.randn(2, 7, 8, dtype=torch.float64)
    y, state = layer(u, return_state=True)
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[:, 2:9] = True
    padded = torch.full((2, 12, 8), 50.0, dtype=torch.float64)
    padded[:, 2:9] = u
    z, after = layer(padded, mask=mask, return_state=True)
    assert torch.allclose(z[:, 2:9], y)
    following = torch.randn(2, 8, dtype=torch.float64)
    assert torch.allclose(layer.step(following, after)[0], layer.step(following, state)[0])


@pytest.mark.parametrize("name", KINDS)
def test_no_output_depends_on_a_later_input(name):
    layer, u = mixer(name), torch.randn(1, 6, 8, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(layer, u)[0, :, :, 0].abs().amax((1, 3))
    assert jacobian.triu(1).max() < 1e-15  # of the trapezoid, two terms cancel but for rounding
    assert (jacobian.tril().diagonal() > 0).all()
    assert jacobian[5, 0] > 0


def test_a_bidirectional_output_depends_on_both_sides():
    layer, u = mixer("bidirectional"), torch.randn(1, 6, 8, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(layer, u)[0, :, :, 0].abs().amax((1, 3))
    assert (jacobian > 0).all()


def test_the_control_has_as_many_parameters_and_no_selection():
    for width, states in ((8, 4), (32, 8), (48, 16)):
        assert parameters(Mamba(width, states)) == parameters(Mamba(width, states, selective=False))
    core = mixer("lti", d_conv=1).core
    u = torch.randn(1, 9, 16, dtype=torch.float64)
    nn.init.ones_(core.conv1d.weight)
    nn.init.zeros_(core.conv1d.bias)
    with torch.no_grad():
        scan = [core._scan_inputs(x)[1:] for x in (u, 3 * u)]
    for a, b in zip(*scan, strict=True):
        assert torch.equal(a, b)
    selective = mixer("s6").core
    with torch.no_grad():
        assert not torch.equal(*(selective._scan_inputs(x)[1] for x in (u, 3 * u)))


def test_initial_values():
    layer = Mamba(64, d_state=8)
    core = layer.core
    assert torch.allclose(core.A_log.exp(), torch.arange(1.0, 9.0).expand(128, 8))
    step = nn.functional.softplus(core.dt_bias)
    assert step.min() >= 0.99e-3
    assert step.max() <= 1.01e-1
    assert 0.3 < float((step.log10() < -2).float().mean()) < 0.7  # log-uniform: half in each decade
    assert core.dt_proj.weight.abs().max() <= core.dt_rank**-0.5
    assert core.dt_rank == 4
    ssd = Mamba(64, kind="ssd", headdim=4).core
    assert ssd.A_log.exp().min() >= 1
    assert ssd.A_log.exp().max() <= 16


def test_the_step_bias_survives_zeroing_all_biases():
    layer = Mamba(8)
    before = layer.core.dt_bias.clone()

    def zero(module):
        if isinstance(module, nn.Linear | nn.Conv1d) and module.bias is not None:
            nn.init.zeros_(module.bias)

    layer.apply(zero)
    assert torch.equal(layer.core.dt_bias, before)


def test_output_projection_shrinks_with_depth():
    spread = []
    for depth in (1, 16):
        layer = Mamba(64)
        torch.manual_seed(1)
        layer.reset_parameters(depth)
        spread.append(float(layer.out_proj.weight.detach().std()))
    assert math.isclose(spread[0] / spread[1], 4.0, rel_tol=1e-5)


def test_weight_decay_spares_what_it_would_harm():
    model = nn.Sequential(Mamba(8), nn.LayerNorm(8), nn.Linear(8, 3))
    decayed, spared = no_decay_groups(copy.deepcopy(model), 0.1)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert len(decayed["params"]) + len(spared["params"]) == len(list(model.parameters()))
    shapes = sorted(tuple(p.shape) for p in spared["params"])
    # A, D, step bias, bias of the convolution, norm's two, bias of the linear layer
    assert shapes == sorted([(16, 16), (16,), (16,), (16,), (8,), (8,), (3,)])


@pytest.mark.parametrize("name", KINDS)
def test_a_bfloat16_layer_keeps_the_recurrence_in_float32(name):
    layer = mixer(name).float().to(torch.bfloat16)
    for parameter in layer.core.no_weight_decay:
        if hasattr(layer.core, parameter):
            assert getattr(layer.core, parameter).dtype == torch.float32
    assert layer.in_proj.weight.dtype == torch.bfloat16
    y, state = layer(torch.randn(2, 6, 8, dtype=torch.bfloat16), return_state=True)
    assert y.dtype == torch.bfloat16
    assert state.h.dtype == torch.float32
    y_t, state = layer.step(torch.randn(2, 8, dtype=torch.bfloat16), state)
    assert y_t.dtype == torch.bfloat16
    assert state.h.dtype == torch.float32


@pytest.mark.parametrize("name", KINDS)
def test_autocast_keeps_the_state_in_float32(name):
    layer = mixer(name).float()
    u = torch.randn(2, 9, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, state = layer(u, return_state=True)
    assert state.h.dtype == torch.float32


@pytest.mark.parametrize("name", KINDS)
def test_cost_counts_what_autograd_keeps(name):
    layer, u = mixer(name).float(), torch.randn(1, 200, 8)
    own, kept = {p.untyped_storage().data_ptr() for p in layer.parameters()}, {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(u)
    del y
    measured = sum(storage.nbytes() for storage in kept.values())
    assert 0.6 < measured / layer.cost(200).bytes < 1.4


def test_save_and_load(tmp_path):
    layer = Mamba(8, d_state=4).eval()
    layer.save_pretrained(tmp_path / "mixer")
    u = torch.randn(2, 5, 8)
    assert torch.equal(Mamba.from_pretrained(tmp_path / "mixer")(u), layer(u))


def test_bad_arguments_are_named():
    with pytest.raises(DataError, match="headdim is 5"):
        Mamba(8, kind="ssd", headdim=5)
    with pytest.raises(DataError, match="ngroups is 3"):
        Mamba(8, kind="ssd", headdim=4, ngroups=3)
    with pytest.raises(DataError, match="kind is 's5'"):
        Mamba(8, kind="s5")
    with pytest.raises(DataError, match="d_state is 2"):
        Mamba(8, kind="mamba3", headdim=4, d_state=2)
    with pytest.raises(DataError, match="d_conv is 0"):
        Mamba(8, d_conv=0)
    with pytest.raises(NotSupportedError, match="selective=False"):
        Mamba(8, kind="ssd", headdim=4, selective=False)
    layer, u = Mamba(8), torch.randn(2, 5, 8)
    with pytest.raises(DataError, match="reset has dtype"):
        layer(u, reset=torch.zeros(2, 5))
    with pytest.raises(DataError, match=r"state\.h has shape"):
        layer(u, state=layer.init_state(3))
    with pytest.raises(DataError, match="state is a tuple"):
        layer.step(u[:, 0], (torch.zeros(1),))
    with pytest.raises(DataError, match="a step takes"):
        layer.step(u, layer.init_state(2))
    with pytest.raises(NotSupportedError, match="state"):
        Mamba(8, scan="bidirectional")(u, return_state=True)
