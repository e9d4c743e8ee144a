"""Heads: probabilities that sum to 1, agreements in [0, 1], the older method by hand, the refused loss."""

import pytest
import torch

from paperback.errors import DataError
from paperback.explain.prototype_rbf import CBCHead, OriginalCBCHead, RBFHead, margin_loss
from paperback.explain.prototype_rbf.heads import gaps


def drawn(head, seed=0, spread=2.0):
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(0, spread, generator=torch.Generator().manual_seed(seed))
    return head.double()


HEADS = [
    lambda: CBCHead(5, 3),
    lambda: CBCHead(5, 3, negative=False),
    lambda: CBCHead(5, 3, vectors_per_class=2),
    lambda: OriginalCBCHead(5, 3),
    lambda: RBFHead(5, 3, bias=False),
]


@pytest.mark.parametrize("make", HEADS)
def test_agreements_lie_between_0_and_1_and_are_what_the_definition_says(make):
    head = drawn(make())
    d = torch.rand(50, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    d[0], d[1] = 0, 1
    positive, negative = head.reasoning()
    by_definition = torch.zeros(50, head.n_vectors, dtype=torch.float64)
    for k in range(5):
        by_definition += positive[k] * d[:, k, None] + negative[k] * (1 - d[:, k, None])
    torch.testing.assert_close(head.vector_scores(d), by_definition)
    scores = head(d)
    assert scores.shape == (50, 3)
    assert ((scores >= 0) & (scores <= 1 + 1e-12)).all()
    torch.testing.assert_close(head.vector_scores(d)[0], negative.sum(0))  # nothing there
    torch.testing.assert_close(head.vector_scores(d)[1], positive.sum(0))  # everything there


@pytest.mark.parametrize("negative", [True, False])
def test_reasoning_of_a_vector_sums_to_1(negative):
    head = drawn(CBCHead(7, 4, negative=negative, vectors_per_class=3))
    positive, absent = head.reasoning()
    assert positive.shape == absent.shape == (7, 12)
    torch.testing.assert_close((positive + absent).sum(0), torch.ones(12, dtype=torch.float64))
    assert bool(absent.any()) == negative


def test_the_score_of_a_class_is_that_of_its_best_vector():
    head = drawn(CBCHead(4, 3, vectors_per_class=2))
    d = torch.rand(20, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    each = head.vector_scores(d)
    for c in range(3):
        torch.testing.assert_close(head(d)[:, c], torch.maximum(each[:, 2 * c], each[:, 2 * c + 1]))


def test_the_original_head_by_hand():
    head = OriginalCBCHead(2, 2).double()
    # class 0: (r+, r-, r0) is (.5, .25, .25) for component 0 and (.2, .4, .4) for component 1;
    # class 1 is uniform
    tables = torch.tensor([[[0.5, 1 / 3], [0.2, 1 / 3]], [[0.25, 1 / 3], [0.4, 1 / 3]],
                           [[0.25, 1 / 3], [0.4, 1 / 3]]], dtype=torch.float64)  # fmt: skip
    with torch.no_grad():
        head.logits.copy_(tables.log())
    scores = head(torch.tensor([[0.9, 0.1]], dtype=torch.float64))[0]
    # (.9 * .5 + .1 * .25 + .1 * .2 + .9 * .4) / (.75 + .6), and half of the definite mass whatever is there
    torch.testing.assert_close(scores, torch.tensor([0.855 / 1.35, 0.5], dtype=torch.float64))


def test_positive_reasoning_alone_is_an_rbf_network_with_convex_weights():
    head = drawn(CBCHead(5, 3, negative=False))
    plain = RBFHead(5, 3, bias=False).double()
    plain.logits.data.copy_(head.logits.data)
    d = torch.rand(20, 5, dtype=torch.float64)
    torch.testing.assert_close(head(d), plain(d))
    weights = head.reasoning()[0]
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(0), torch.ones(3, dtype=torch.float64))


def test_the_constant_of_the_rbf_head_is_added():
    head, plain = RBFHead(3, 2, bias=True), RBFHead(3, 2, bias=False)
    plain.logits.data.copy_(head.logits.data)
    head.bias.data.copy_(torch.tensor([0.25, -1.0]))
    d = torch.rand(4, 3)
    torch.testing.assert_close(head(d) - plain(d), torch.tensor([[0.25, -1.0]]).expand(4, 2))


def test_the_margin_loss_by_hand():
    scores = torch.tensor([[0.9, 0.5, 0.1], [0.2, 0.3, 0.6]])
    y = torch.tensor([0, 1])
    torch.testing.assert_close(gaps(scores, y), torch.tensor([0.4, -0.3]))
    torch.testing.assert_close(margin_loss(scores, y, 0.5), torch.tensor((0.1 + 0.8) / 2))
    assert margin_loss(scores[:1], y[:1], 0.3) == 0


def test_why_log_agreement_is_no_loss():
    """All classes agree fully with the absence of a component that is never there, so -log A reaches 0."""
    head = CBCHead(3, 2).double()
    with torch.no_grad():
        head.logits.zero_()
        head.logits[3] = 50.0  # absence of component 0
    scores = head(torch.tensor([[0.0, 0.8, 0.2]], dtype=torch.float64))
    assert -scores.log().max() < 1e-12
    assert (scores[:, 0] - scores[:, 1]).abs() < 1e-12  # and nothing is decided


@pytest.mark.parametrize("sizes", [(0, 3, 1), (3, 1, 1), (3, 3, 0)])
@pytest.mark.parametrize("head", [CBCHead, OriginalCBCHead, RBFHead])
def test_impossible_sizes_are_refused(head, sizes):
    with pytest.raises(DataError, match="at least 1, 2 and 1"):
        head(sizes[0], sizes[1], vectors_per_class=sizes[2])
