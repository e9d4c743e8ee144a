"""Structured state-space duality and the trapezoid: attention inside chunks, recurrence between them."""

import math

import pytest
import torch

from paperback.errors import DataError
from paperback.layers.mamba import selective_scan, ssd_scan, trapezoid_scan
from paperback.layers.mamba.trapezoid import TrapezoidState, rotate
from paperback.layers.scan import decayed_attention, segment_sums


def arguments(batch=2, length=11, heads=4, headdim=3, groups=2, states=5, seed=0):
    """x, dt, A, B, C, D."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    dt, A = draw(batch, length, heads).abs() * 0.5, -draw(heads).abs() - 0.1
    return [
        draw(batch, length, heads, headdim),
        dt,
        A,
        draw(batch, length, groups, states),
        draw(batch, length, groups, states),
        draw(heads),
    ]


def recurrence(x, dt, A, B, C, D, h0=None, reset=None):
    """The definition, one position after the other."""
    heads, groups = x.shape[2], B.shape[2]
    B, C = (t.repeat_interleave(heads // groups, 2) for t in (B, C))
    h = torch.zeros(*x.shape[:1], heads, x.shape[3], B.shape[3], dtype=x.dtype) if h0 is None else h0
    outputs = []
    for t in range(x.shape[1]):
        decay = (dt[:, t] * A).exp()
        if reset is not None:
            decay = decay * ~reset[:, t, None]
        h = decay[..., None, None] * h + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        outputs.append((h @ C[:, t, :, :, None])[..., 0] + D[:, None] * x[:, t])
    return torch.stack(outputs, 1), h


@pytest.mark.parametrize("chunk", [1, 3, 4, 11, 50])
@pytest.mark.parametrize("resets", [False, True])
def test_every_chunk_size_is_the_recurrence(chunk, resets):
    inputs = arguments()
    h0 = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    reset = torch.rand(2, 11, generator=torch.Generator().manual_seed(1)) < 0.3 if resets else None
    y, h = ssd_scan(*inputs, h0=h0, reset=reset, chunk=chunk)
    expected, last = recurrence(*inputs, h0=h0, reset=reset)
    assert (y - expected).abs().max() < 1e-12
    assert (h - last).abs().max() < 1e-12


def test_one_chunk_is_masked_linear_attention():
    """Y = (L ∘ C Bᵀ)(Δ X) with L_ij = exp(Σ_{j<k<=i} Δ_k A)."""
    x, dt, A, B, C, _ = arguments(groups=1)
    y, _ = ssd_scan(x, dt, A, B, C, chunk=11)
    running = (dt * A).cumsum(1)
    mask = torch.ones(11, 11, dtype=torch.float64).tril()[..., None]
    decays = (running[:, :, None] - running[:, None]).exp() * mask
    scores = torch.einsum("blgn,bsgn->bls", C, B)[..., None] * decays
    assert torch.allclose(y, torch.einsum("blsh,bshp->blhp", scores, dt[..., None] * x))


def test_s6_with_tied_decays_is_ssd():
    x, dt, A, B, C, D = arguments(groups=1)
    batch, length, heads, headdim = x.shape
    wide_dt = dt[..., None].expand_as(x).reshape(batch, length, -1)
    wide_A = A[:, None, None].expand(heads, headdim, 5).reshape(-1, 5)
    y, h = selective_scan(
        x.flatten(2), wide_dt, wide_A, B[:, :, 0], C[:, :, 0], D.repeat_interleave(headdim), return_last=True
    )
    dual, state = ssd_scan(x, dt, A, B, C, D)
    assert torch.allclose(y, dual.flatten(2))
    assert torch.allclose(h, state.flatten(1, 2))


def test_gradients_are_those_of_the_recurrence():
    inputs = [t.requires_grad_() for t in arguments()]
    weights = torch.randn(2, 11, 4, 3, dtype=torch.float64)
    reset = torch.zeros(2, 11, dtype=torch.bool)
    reset[1, 6] = True
    dual = torch.autograd.grad((ssd_scan(*inputs, reset=reset, chunk=4)[0] * weights).sum(), inputs)
    loop = torch.autograd.grad((recurrence(*inputs, reset=reset)[0] * weights).sum(), inputs)
    for ours, theirs in zip(dual, loop, strict=True):
        assert torch.allclose(ours, theirs)


def test_segment_sums():
    x = torch.tensor([5.0, 1.0, 2.0])
    low = float("-inf")
    expected = torch.tensor([[0.0, low, low], [1.0, 0.0, low], [3.0, 2.0, 0.0]])
    assert torch.equal(segment_sums(x), expected)
    assert torch.equal(segment_sums(torch.tensor([0.0, low, 1.0])).exp()[2], torch.tensor([0.0, math.e, 1.0]))


def test_no_decay_is_a_running_sum():
    q, k, v = torch.randn(3, 1, 6, 1, 4, dtype=torch.float64)
    y, s = decayed_attention(q, k, v, chunk=4)
    expected = torch.tril(q[0, :, 0] @ k[0, :, 0].T) @ v[0, :, 0]
    assert torch.allclose(y[0, :, 0], expected)
    assert torch.allclose(s[0, 0], k[0, :, 0].T @ v[0, :, 0])


def test_bad_arguments_are_named():
    x, dt, A, B, C, _ = arguments(groups=3)
    with pytest.raises(DataError, match="must divide"):
        ssd_scan(x, dt, A, B, C)
    x, dt, A, B, C, _ = arguments()
    with pytest.raises(DataError, match="A is positive"):
        ssd_scan(x, dt, -A, B, C)


# -- the trapezoid -------------------------------------------------------------------------------------------


def trapezoid_arguments(batch=2, length=9, heads=2, headdim=3, states=6, angles=2):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "x": draw(batch, length, heads, headdim),
        "dt": draw(batch, length, heads).abs(),
        "A": -draw(batch, length, heads).abs(),
        "weight": draw(batch, length, heads).sigmoid(),
        "keys": draw(batch, length, heads, states),
        "queries": draw(batch, length, heads, states),
        "angles": draw(batch, length, angles),
        "D": draw(heads),
    }


def trapezoid_recurrence(x, dt, A, weight, keys, queries, angles, D, reset=None):
    """The definition, one position after the other."""
    batch, length, heads, headdim = x.shape
    h = x.new_zeros(batch, heads, headdim, keys.shape[3])
    angle = x.new_zeros(batch, heads, angles.shape[2])
    key, value = torch.zeros_like(keys[:, 0]), torch.zeros_like(x[:, 0])
    outputs = []
    for t in range(length):
        step, lam = dt[:, t], weight[:, t]
        angle = angle + step[..., None] * math.pi * torch.tanh(angles[:, t, None])
        k, q = rotate(keys[:, t], angle), rotate(queries[:, t], angle)
        alpha = (step * A[:, t]).exp()
        if reset is not None:
            alpha = alpha * ~reset[:, t, None]
        left, right = ((1 - lam) * step * alpha)[..., None, None], (lam * step)[..., None, None]
        h = alpha[..., None, None] * h + left * value[..., None] * key[:, :, None]
        h = h + right * x[:, t, ..., None] * k[:, :, None]
        outputs.append((h @ q[..., None])[..., 0] + D[:, None] * x[:, t])
        key, value = k, x[:, t]
    return torch.stack(outputs, 1), h


@pytest.mark.parametrize("chunk", [1, 4, 9])
@pytest.mark.parametrize("resets", [False, True])
def test_the_trapezoid_is_its_recurrence(chunk, resets):
    inputs = trapezoid_arguments()
    reset = torch.rand(2, 9, generator=torch.Generator().manual_seed(1)) < 0.3 if resets else None
    y, last = trapezoid_scan(**inputs, reset=reset, chunk=chunk)
    expected, h = trapezoid_recurrence(**inputs, reset=reset)
    assert (y - expected).abs().max() < 1e-12
    assert (last.h - h).abs().max() < 1e-12


def test_the_right_end_alone_is_ssd():
    inputs = trapezoid_arguments() | {"angles": torch.zeros(2, 9, 2, dtype=torch.float64)}
    inputs["weight"] = torch.ones_like(inputs["weight"])
    inputs["A"] = torch.full_like(inputs["A"], -0.7)
    y, _ = trapezoid_scan(**inputs)
    A = torch.full((2,), -0.7, dtype=torch.float64)
    expected, _ = ssd_scan(inputs["x"], inputs["dt"], A, inputs["keys"], inputs["queries"], inputs["D"])
    assert torch.allclose(y, expected)


def test_the_trapezoid_is_the_trapezoidal_rule():
    """A constant input under h' = -h + 1 from rest: halving the step quarters the error of λ = 1/2."""

    def error(steps):
        dt = 1.0 / steps
        ones = torch.ones(1, steps + 1, 1, 1, dtype=torch.float64)
        step = torch.full((1, steps + 1, 1), dt, dtype=torch.float64)
        step[:, 0] = 0.0  # the first position only sets the left end
        half = torch.full_like(step, 0.5)
        none = torch.zeros(1, steps + 1, 0, dtype=torch.float64)
        y, _ = trapezoid_scan(ones, step, -torch.ones_like(step), half, ones, ones, none)
        return abs(float(y[0, -1, 0, 0]) - (1 - math.exp(-1)))

    assert 3.8 < error(10) / error(20) < 4.2


def test_rotation_keeps_lengths_and_depends_on_differences():
    k, q = torch.randn(2, 6, dtype=torch.float64)
    a, b, shift = torch.randn(3, 2, dtype=torch.float64)
    assert torch.allclose(rotate(k, a).norm(), k.norm())
    assert torch.equal(rotate(k, a)[4:], k[4:])
    assert torch.allclose(rotate(q, a) @ rotate(k, b), rotate(q, a + shift) @ rotate(k, b + shift))


def test_the_trapezoid_carries_its_state():
    inputs = trapezoid_arguments()
    whole, last = trapezoid_scan(**inputs)
    parts = [
        {name: t if name == "D" else t[:, span] for name, t in inputs.items()}
        for span in (slice(4), slice(4, 9))
    ]
    first, state = trapezoid_scan(**parts[0])
    second, end = trapezoid_scan(**parts[1], state=state)
    assert torch.allclose(torch.cat([first, second], 1), whole)
    assert isinstance(end, TrapezoidState)
    for a, b in zip(end, last, strict=True):
        assert torch.allclose(a, b)
