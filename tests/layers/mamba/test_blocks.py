"""Residual blocks and hybrids: step equals forward, states go on, documents and padding are kept out."""

from __future__ import annotations

import math

import pytest
import torch

from paperback.errors import DataError, NotSupportedError
from paperback.layers.mamba.blocks import AttentionBlock, BlockStack, MambaBlock, MLPBlock, rotate

DIM = 16


def block(kind):
    torch.manual_seed(0)
    made = {
        "mamba": lambda: MambaBlock(DIM, d_state=4),
        "ssd": lambda: MambaBlock(DIM, d_state=4, kind="ssd", headdim=8),
        "attention": lambda: AttentionBlock(DIM, num_heads=2),
        "mlp": lambda: MLPBlock(DIM),
    }[kind]()
    return made.double()


KINDS = ["mamba", "ssd", "attention", "mlp"]


def draw(batch=2, length=9):
    return torch.randn(batch, length, DIM, dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_one_forward(kind):
    module, u = block(kind), draw()
    state, out = module.init_state(2), []
    for u_t in u.unbind(1):
        y, state = module.step(u_t, state)
        out.append(y)
    torch.testing.assert_close(torch.stack(out, 1), module(u))


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_in_two_parts_is_one(kind):
    module, u = block(kind), draw()
    first, state = module(u[:, :4], return_state=True)
    second = module(u[:, 4:], state=state)
    torch.testing.assert_close(torch.cat([first, second], 1), module(u))


@pytest.mark.parametrize("kind", KINDS)
def test_documents_do_not_see_each_other(kind):
    module, u = block(kind), draw()
    reset = torch.zeros(2, 9, dtype=torch.bool)
    reset[0, 3] = reset[1, 7] = True
    out = module(u, reset=reset)
    torch.testing.assert_close(out[0, 3:], module(u[:1, 3:])[0])
    torch.testing.assert_close(out[0, :3], module(u[:1, :3])[0])
    torch.testing.assert_close(out[1, 7:], module(u[1:, 7:])[0])
    # and also when the document began in an earlier call
    _, state = module(u[:, :5], reset=reset[:, :5], return_state=True)
    torch.testing.assert_close(module(u[:, 5:], reset=reset[:, 5:], state=state), out[:, 5:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_reaches_nothing(kind, side):
    module, u = block(kind), draw()
    mask = torch.arange(9) < torch.tensor([[9], [5]])
    mask = mask.flip(1) if side == "left" else mask
    out = module(u, mask=mask)
    assert out.isfinite().all()
    torch.testing.assert_close(out[1, mask[1]], module(u[1:, mask[1]])[0])
    u[1, ~mask[1]] = 7.0
    torch.testing.assert_close(module(u, mask=mask)[mask], out[mask])


def test_blocks_are_residual_and_normalised():
    for kind in KINDS:
        module, u = block(kind), draw()
        torch.testing.assert_close(module(3 * u) - 3 * u, module(u) - u, atol=1e-4, rtol=1e-4)


def test_rotary_scores_depend_on_the_difference_of_positions_only():
    q, k = torch.randn(1, 1, 1, 8, dtype=torch.float64), torch.randn(1, 1, 1, 8, dtype=torch.float64)

    def score(i, j):
        return (rotate(q, torch.tensor([i])) * rotate(k, torch.tensor([j]))).sum()

    torch.testing.assert_close(score(3, 1), score(103, 101), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(rotate(q, torch.tensor([5])).norm(), q.norm())
    assert not torch.allclose(score(3, 1), score(3, 2))


def test_attention_is_the_formula():
    module, u = block("attention"), draw(1, 5)
    q, k, v = module.in_proj(module.norm(u)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    positions = torch.arange(5)
    scores = rotate(q, positions) @ rotate(k, positions).mT / math.sqrt(8)
    scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    expected = u + module.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(module(u), expected)


def test_attention_both_ways_has_no_state():
    module = AttentionBlock(DIM, 2, causal=False).double()
    u = draw()
    assert not torch.allclose(module(u)[:, 0], block("attention")(u)[:, 0])
    with pytest.raises(NotSupportedError):
        module.init_state(1)
    with pytest.raises(NotSupportedError):
        module(u, return_state=True)


def test_a_pattern_names_the_blocks_and_scales_what_they_write():
    torch.manual_seed(0)
    stack = BlockStack("MMAF", DIM, num_heads=2, d_state=4)
    assert [type(part).__name__ for part in stack] == [
        "MambaBlock",
        "MambaBlock",
        "AttentionBlock",
        "MLPBlock",
    ]
    # Linear draws its weights evenly within 1/√inputs; the scaling halves that for four blocks.
    bound = 1 / math.sqrt(DIM)
    assert bound * 0.4 < stack[2].out_proj.weight.abs().max() <= bound / 2
    assert stack[2].in_proj.weight.abs().max() > bound / 2


def test_bad_patterns():
    with pytest.raises(NotSupportedError, match="widenet"):
        BlockStack("MEM", DIM)
    with pytest.raises(DataError, match="'X' at place 1"):
        BlockStack("MX", DIM)
    with pytest.raises(DataError, match="empty"):
        BlockStack("", DIM)
    with pytest.raises(DataError, match="multiple of"):
        BlockStack("A", DIM, num_heads=3)
    with pytest.raises(DataError, match="features"):
        AttentionBlock(DIM)(torch.randn(1, 3, 5))


def test_costs_grow_as_they_should():
    attention, mlp = AttentionBlock(DIM, 2), MLPBlock(DIM)
    assert mlp.cost(200).flops == 2 * mlp.cost(100).flops
    extra = attention.cost(2000).flops - 2 * attention.cost(1000).flops
    assert extra == 2 * 2 * DIM * (2000**2 - 2 * 1000**2)
