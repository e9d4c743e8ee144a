import math

import pytest
import torch

from paperback.errors import DataError
from paperback.numerics import enumeration


def random_table(n_states, seed=0):
    """A joint distribution given as a table of log weights, and the function that reads it."""
    table = torch.randn(tuple(n_states), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return table, lambda states: table[tuple(states.T)]


@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_joint_states_are_all_states_in_lexicographic_order(chunk):
    states = torch.cat(list(enumeration.joint_states((2, 3, 4), chunk=chunk)))
    expected = torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(4))
    assert torch.equal(states, expected)


def test_joint_states_leave_clamped_variables_alone():
    states = torch.cat(list(enumeration.joint_states((2, 3, 2), clamp=torch.tensor([-1, 2, -1]))))
    assert torch.equal(states, torch.tensor([[0, 2, 0], [0, 2, 1], [1, 2, 0], [1, 2, 1]]))


def test_joint_states_of_nothing_free_is_the_clamped_row():
    assert [s.tolist() for s in enumeration.joint_states((2, 3), clamp=torch.tensor([1, 2]))] == [[[1, 2]]]


def test_a_domain_that_is_too_large_is_refused():
    with pytest.raises(DataError, match="30 free variables"):
        next(enumeration.joint_states((4,) * 30))


def test_log_partition_and_marginals_against_the_whole_table():
    table, log_weight = random_table((3, 2, 4))
    assert math.isclose(
        float(enumeration.log_partition(log_weight, (3, 2, 4))), float(table.logsumexp((0, 1, 2)))
    )
    probability = table.exp() / table.exp().sum()
    found = enumeration.marginals(log_weight, (3, 2, 4))
    torch.testing.assert_close(found[0, :3], probability.sum((1, 2)))
    torch.testing.assert_close(found[1, :2], probability.sum((0, 2)))
    torch.testing.assert_close(found[2], probability.sum((0, 1)))
    assert float(found[1, 2:].sum()) == 0.0


def test_clamped_marginals_are_conditionals():
    table, log_weight = random_table((3, 2, 4), seed=1)
    found = enumeration.marginals(log_weight, (3, 2, 4), clamp=torch.tensor([-1, 1, -1]))
    conditional = table[:, 1].exp() / table[:, 1].exp().sum()
    torch.testing.assert_close(found[0, :3], conditional.sum(1))
    torch.testing.assert_close(found[1], torch.tensor([0.0, 1, 0, 0], dtype=torch.float64))
    torch.testing.assert_close(found[2], conditional.sum(0))


def test_the_sum_over_many_chunks_is_the_sum():
    bias = torch.randn(
        18, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )  # 2^18 states, four chunks
    found = enumeration.log_partition(lambda states: states.double() @ bias, (2,) * 18)
    torch.testing.assert_close(found, torch.nn.functional.softplus(bias).sum())
    torch.testing.assert_close(
        enumeration.marginals(lambda states: states.double() @ bias, (2,) * 18)[:, 1], bias.sigmoid()
    )


def test_kl_divergence():
    p, q = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.25, 0.5, 0.25])
    assert math.isclose(float(enumeration.kl_divergence(p.log(), q.log())), 0.5 * math.log(2), rel_tol=1e-6)
    assert float(enumeration.kl_divergence(q.log(), p.log())) == math.inf
    assert float(enumeration.kl_divergence(p.log(), p.log())) == 0.0
