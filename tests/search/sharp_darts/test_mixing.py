"""Weights of a mixture: the identities of Max-W, and gradients by finite differences."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paperback.errors import DataError
from paperback.search.sharp_darts import Mixing


@pytest.fixture
def alpha():
    return torch.randn(3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_scalar_weights_are_the_softmax(alpha):
    torch.testing.assert_close(Mixing("scalar")(alpha), alpha.softmax(-1))


def test_max_w_is_its_formula(alpha):
    w, weights = alpha.softmax(-1), Mixing("max_w")(alpha)
    for row in range(3):
        for option in range(7):
            assert weights[row, option] == pytest.approx(1 - max(w[row]).item() + w[row, option].item())


@given(st.lists(st.floats(-20, 20), min_size=1, max_size=9))
def test_facts_of_max_w(values):
    alpha = torch.tensor(values, dtype=torch.float64)
    w, weights = alpha.softmax(-1), Mixing()(alpha)
    assert weights.max().item() == 1.0
    assert ((weights > 0) & (weights <= 1)).all()
    assert weights.sum().item() == pytest.approx(len(values) * (1 - w.max().item()) + 1)


def test_the_strongest_alpha_gets_no_gradient_from_its_own_output(alpha):
    alpha = alpha[0].requires_grad_()
    strongest = alpha.argmax()
    (gradient,) = torch.autograd.grad(Mixing()(alpha)[strongest], alpha)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient))
    other = (strongest + 1) % len(alpha)
    (gradient,) = torch.autograd.grad(Mixing()(alpha)[other], alpha)
    assert gradient[strongest] < 0 < gradient[other]


@pytest.mark.parametrize("weighting", ["max_w", "scalar"])
def test_gradients_by_finite_differences(alpha, weighting):
    outputs = torch.randn(7, 5, dtype=torch.float64)
    alpha = alpha[0].requires_grad_()
    assert torch.autograd.gradcheck(lambda a: Mixing(weighting)(a) @ outputs, alpha)


def test_detached_the_maximum_has_no_gradient(alpha):
    alpha = alpha.requires_grad_()
    outputs = torch.randn(7, dtype=torch.float64)
    (detached,) = torch.autograd.grad((Mixing(detach_max=True)(alpha) @ outputs).sum(), alpha)
    (scalar,) = torch.autograd.grad((Mixing("scalar")(alpha) @ outputs).sum(), alpha)
    (kept,) = torch.autograd.grad((Mixing()(alpha) @ outputs).sum(), alpha)
    torch.testing.assert_close(detached, scalar)
    assert not torch.allclose(detached, kept)


@pytest.mark.parametrize("weighting", ["max_w", "scalar"])
def test_options_may_be_reordered(alpha, weighting):
    order = torch.randperm(7)
    torch.testing.assert_close(Mixing(weighting)(alpha[:, order]), Mixing(weighting)(alpha)[:, order])


def test_there_is_no_other_weighting():
    with pytest.raises(DataError, match="weighting is 'sum'"):
        Mixing("sum")
