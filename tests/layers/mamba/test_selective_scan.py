"""The selective scan: its back ends agree, its gradients are right, it keeps little."""

import importlib

import pytest
import torch

from paperback.errors import DataError, MissingExtraError, NotSupportedError
from paperback.layers.mamba import selective_scan
from paperback.layers.scan import associative_recurrence, linear_recurrence, sequential_recurrence

module = importlib.import_module("paperback.layers.mamba.selective_scan")


def arguments(batch=2, length=7, channels=3, states=2, constant=False, dtype=torch.float64, seed=0):
    """u, dt, A, B, C, D, z, h0, all with gradients."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    direction = (channels, states) if constant else (batch, length, states)
    dt, A = draw(batch, length, channels).abs() * 0.5, -draw(channels, states).abs() - 0.1
    tensors = [draw(batch, length, channels), dt, A, draw(*direction), draw(*direction), draw(channels)]
    tensors += [draw(batch, length, channels), draw(batch, channels, states)]
    return [t.requires_grad_() for t in tensors]


def outputs_and_gradients(inputs, **options):
    y, h = selective_scan(*inputs, return_last=True, **options)
    generator = torch.Generator().manual_seed(9)
    weights = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in (y, h)]
    gradients = torch.autograd.grad((y * weights[0]).sum() + (h * weights[1]).sum(), inputs)
    return [y, h, *gradients]


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize(("length", "chunk"), [(1, 4), (7, 1), (7, 3), (8, 4), (7, 50)])
def test_back_ends_agree(length, chunk, resets, constant):
    inputs = arguments(length=length, constant=constant)
    reset = torch.rand(2, length, generator=torch.Generator().manual_seed(3)) < 0.4 if resets else None
    chunked = outputs_and_gradients(inputs, backend="chunk", chunk=chunk, reset=reset)
    for backend in ("sequential", "associative"):
        for ours, theirs in zip(
            chunked, outputs_and_gradients(inputs, backend=backend, reset=reset), strict=True
        ):
            assert (ours - theirs).abs().max() < 1e-10


def test_many_small_blocks_agree_with_one(monkeypatch):
    inputs = arguments(batch=5, length=11, channels=150, states=3)
    whole = outputs_and_gradients(inputs, backend="chunk", chunk=4)
    monkeypatch.setattr(module, "BLOCK", 1000)  # several blocks of rows and of channels
    for ours, theirs in zip(outputs_and_gradients(inputs, backend="chunk", chunk=4), whole, strict=True):
        assert (ours - theirs).abs().max() < 1e-10


@pytest.mark.parametrize("constant", [False, True])
def test_gradcheck(constant):
    reset = torch.zeros(2, 7, dtype=torch.bool)
    reset[0, 3] = True

    def chunked(*inputs):
        return selective_scan(*inputs, reset=reset, backend="chunk", chunk=3, return_last=True)

    assert torch.autograd.gradcheck(chunked, arguments(constant=constant))


def test_gradcheck_of_the_shared_recurrence():
    a = torch.rand(5, 3, dtype=torch.float64, requires_grad=True)
    b = torch.randn(5, 3, 2, dtype=torch.float64, requires_grad=True)
    h0 = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(linear_recurrence, (a, b, h0))
    expected = sequential_recurrence(a.T[..., None], b.transpose(0, 1), h0).transpose(0, 1)
    assert torch.allclose(linear_recurrence(a, b, h0), expected)


@pytest.mark.parametrize("length", [1, 2, 3, 6, 17])
def test_the_tree_is_the_loop(length):
    a, b = torch.rand(2, 3, length, 4, dtype=torch.float64)
    h0 = torch.randn(3, 4, dtype=torch.float64)
    for start in (None, h0):
        assert torch.allclose(associative_recurrence(a, b, start), sequential_recurrence(a, b, start))


def test_one_state_by_hand():
    """h_1 = 2·3·5 and h_2 = e^{-1·4} h_1 + 4·7·11, with y = h C + D u."""
    u, dt = torch.tensor([[[3.0], [7.0]]]), torch.tensor([[[2.0], [4.0]]])
    B, C = torch.tensor([[[5.0], [11.0]]]), torch.tensor([[[1.0], [2.0]]])
    y = selective_scan(u, dt, torch.tensor([[-1.0]]), B, C, torch.tensor([10.0]))
    second = 30 * torch.tensor(-4.0).exp() + 308
    assert torch.allclose(y.flatten(), torch.stack([torch.tensor(60.0), 2 * second + 70]))


def test_two_calls_carry_the_state_and_its_gradient():
    inputs = arguments(length=9)
    whole = selective_scan(*inputs, backend="chunk", chunk=4)
    u, dt, A, B, C, D, z, h0 = inputs
    first, h = selective_scan(u[:, :5], dt[:, :5], A, B[:, :5], C[:, :5], D, z[:, :5], h0, return_last=True)
    second = selective_scan(u[:, 5:], dt[:, 5:], A, B[:, 5:], C[:, 5:], D, z[:, 5:], h)
    parts = torch.cat([first, second], 1)
    assert torch.allclose(parts, whole)
    for a, b in zip(
        torch.autograd.grad(parts.sum(), inputs), torch.autograd.grad(whole.sum(), inputs), strict=True
    ):
        assert torch.allclose(a, b)


def test_masked_positions_leave_the_state_untouched():
    inputs = arguments(length=6)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[:, 4:] = False
    u, dt, A, B, C, D, z, h0 = inputs
    _, padded = selective_scan(*inputs, mask=mask, return_last=True)
    _, short = selective_scan(u[:, :4], dt[:, :4], A, B[:, :4], C[:, :4], D, z[:, :4], h0, return_last=True)
    assert torch.allclose(padded, short)


def test_state_stays_bounded_for_long():
    length = 100_000
    generator = torch.Generator().manual_seed(0)
    u, dt = torch.randn(1, length, 2, generator=generator), torch.full((1, length, 2), 0.01)
    B = torch.randn(1, length, 4, generator=generator)
    A = -torch.arange(1.0, 5.0).expand(2, 4)
    with torch.no_grad():
        y, h = selective_scan(u, dt, A, B, B, return_last=True)
    assert y.isfinite().all()
    # A sum of dt·u·B with weights that decay by at most e^{-0.01} has variance dt² / (1 - e^{-0.02}).
    assert h.abs().max() < 10 * 0.01 / (1 - torch.tensor(-0.02).exp()).sqrt()


def test_autocast_keeps_float32_inside():
    inputs = [t.detach().float() for t in arguments(length=40, channels=8)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, h = selective_scan(*inputs, return_last=True)
    expected, state = selective_scan(*inputs, return_last=True)
    assert h.dtype == torch.float32
    assert torch.equal(h, state)
    assert torch.equal(y, expected)


def saved_bytes(inputs, **options):
    """Bytes of distinct memory that autograd keeps, inputs not counted."""
    own, kept = {t.untyped_storage().data_ptr() for t in inputs}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = selective_scan(*inputs, **options)
    del y
    return sum(storage.nbytes() for storage in kept.values())


def test_what_is_kept_is_far_less_than_all_states():
    inputs = arguments(batch=1, length=4096, channels=16, states=16, dtype=torch.float32)[:5]
    states = 4096 * 16 * 16 * 4
    chunked = saved_bytes(inputs, backend="chunk")
    assert chunked < states / 4
    assert chunked < saved_bytes(inputs, backend="sequential") / 4


def test_the_operator_keeps_torchs_rules():
    u, dt, A, B, C, *_, h0 = arguments()
    reset = torch.zeros(2, 7, dtype=torch.bool)
    for start, documents in ((None, None), (h0, reset)):
        torch.library.opcheck(module.chunked_scan, (u, dt, A, B, C, start, documents, 3))


@pytest.mark.slow
def test_compiled_tree_agrees():
    inputs = arguments(length=12)
    compiled = outputs_and_gradients(inputs, backend="compile")
    for ours, theirs in zip(compiled, outputs_and_gradients(inputs, backend="chunk"), strict=True):
        assert (ours - theirs).abs().max() < 1e-8


def test_bad_arguments_are_named():
    u, dt, A, B, C, *_ = (t.detach() for t in arguments())
    with pytest.raises(DataError, match="A is positive"):
        selective_scan(u, dt, -A, B, C)
    with pytest.raises(DataError, match="backend is 'fast'"):
        selective_scan(u, dt, A, B, C, backend="fast")
    with pytest.raises(DataError, match="dt has shape"):
        selective_scan(u, dt[:, 1:], A, B, C)
    with pytest.raises(DataError, match="A has shape"):
        selective_scan(u, dt, A[1:], B, C)
    with pytest.raises(DataError, match="h0 has shape"):
        selective_scan(u, dt, A, B, C, h0=torch.zeros(3, 3, 2))
    with pytest.raises(DataError, match="reset has dtype"):
        selective_scan(u, dt, A, B, C, reset=torch.zeros(2, 7))
    with pytest.raises(DataError, match="chunk is 0"):
        selective_scan(u, dt, A, B, C, chunk=0)
    with pytest.raises(DataError, match="expected floats"):
        selective_scan(u[0], dt, A, B, C)


def test_the_kernel_is_refused_on_the_cpu_and_when_absent(monkeypatch):
    u, dt, A, B, C, *_ = (t.detach() for t in arguments())
    with pytest.raises(NotSupportedError, match='use backend="chunk"'):
        selective_scan(u, dt, A, B, C, backend="mamba_ssm")

    class OnGPU:
        is_cuda = True
        device = "cuda"

    monkeypatch.setattr(module, "_kernel", lambda: None)
    with pytest.raises(MissingExtraError, match="pip install mamba-ssm"):
        module._choose("mamba_ssm", OnGPU(), None, None, False)
    assert module._choose("auto", OnGPU(), None, None, False) is module._chunked
    monkeypatch.setattr(module, "_kernel", lambda: object())
    assert module._choose("auto", OnGPU(), None, None, False) is module._mamba_ssm
    assert module._choose("auto", OnGPU(), torch.zeros(1), None, False) is module._chunked
    with pytest.raises(NotSupportedError, match="no h0"):
        module._choose("mamba_ssm", OnGPU(), torch.zeros(1), None, False)
