"""The contrastive losses: formulas written out, agreement of the family, gradients, gathered negatives."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from paperback.errors import DataError
from paperback.training.contrastive import (
    alignment,
    backward_in_chunks,
    contrastive_loss,
    gather,
    info_nce,
    nt_xent,
    process_rank,
    sup_con,
    uniformity,
)


@pytest.fixture
def views():
    draws = torch.Generator().manual_seed(0)
    return [torch.randn(6, 5, generator=draws, dtype=torch.float64) for _ in range(2)]


def by_loop(embeddings, positives, temperature):
    """The masked log-softmax over all others, one term at a time."""
    z = F.normalize(embeddings, dim=1)
    losses = []
    for i in range(len(z)):
        own = [j for j in range(len(z)) if j != i and positives(i, j)]
        if own:
            scores = {j: math.exp(float(z[i] @ z[j]) / temperature) for j in range(len(z)) if j != i}
            losses.append(-sum(math.log(scores[j] / sum(scores.values())) for j in own) / len(own))
    return sum(losses) / len(losses)


def test_nt_xent_is_its_formula(views):
    n = len(views[0])
    expected = by_loop(torch.cat(views), lambda i, j: (i - j) % n == 0, 0.2)
    assert float(nt_xent(*views, temperature=0.2)) == pytest.approx(expected, rel=1e-10)


def test_sup_con_is_its_formula(views):
    labels = torch.tensor([0, 0, 1, 2, -1, 1, 2, 0, 1, -1, 3, 0])
    expected = by_loop(torch.cat(views), lambda i, j: labels[i] == labels[j] >= 0, 0.1)
    assert float(sup_con(torch.cat(views), labels)) == pytest.approx(expected, rel=1e-10)


def test_sup_con_with_image_numbers_is_nt_xent(views):
    numbers = torch.arange(len(views[0])).repeat(2)
    assert torch.allclose(
        sup_con(torch.cat(views), numbers, temperature=0.3), nt_xent(*views, temperature=0.3)
    )


def test_sup_con_takes_a_mask_for_labels(views):
    labels = torch.arange(12) % 3
    mask = labels[:, None] == labels[None]
    assert torch.allclose(sup_con(torch.cat(views), labels), sup_con(torch.cat(views), positives=mask))


def test_info_nce_is_cross_entropy_of_cosines(views):
    q, k = (F.normalize(v, dim=1) for v in views)
    expected = F.cross_entropy(q @ k.T / 0.2, torch.arange(6))
    assert torch.allclose(info_nce(*views), expected)


def test_info_nce_with_given_negatives_does_not_see_other_keys(views):
    queue = torch.randn(7, 5, dtype=torch.float64)
    q, k, u = (F.normalize(v, dim=1) for v in (*views, queue))
    own = torch.exp((q * k).sum(1) / 0.5)
    expected = -torch.log(own / (own + torch.exp(q @ u.T / 0.5).sum(1))).mean()
    assert torch.allclose(info_nce(*views, queue, 0.5), expected)


def test_a_masked_candidate_is_as_good_as_none(views):
    queue = torch.randn(7, 5, dtype=torch.float64)
    seen = torch.ones(6, 7, dtype=torch.bool)
    seen[:, 4:] = False
    assert torch.allclose(info_nce(*views, queue, candidates=seen), info_nce(*views, queue[:4]))
    everything = torch.ones(6, 6, dtype=torch.bool)
    assert torch.allclose(info_nce(*views, candidates=everything), info_nce(*views))
    # The positive is seen even if the mask says otherwise; alone, it costs nothing.
    assert float(info_nce(*views, candidates=~everything)) == pytest.approx(0.0, abs=1e-12)


def test_temperatures_by_anchor(views):
    scores = views[0] @ views[1].T
    positives = torch.eye(6, dtype=torch.bool)
    each = torch.linspace(0.1, 1, 6, dtype=torch.float64)
    losses = contrastive_loss(scores, positives, temperature=each, reduction="none")
    for i, t in enumerate(each):
        one = contrastive_loss(scores, positives, temperature=float(t), reduction="none")
        assert losses[i] == pytest.approx(float(one[i]))


def test_a_positive_outside_the_denominator_counts_above_only():
    scores = torch.tensor([[2.0, 0.0, 1.0]])
    positives = torch.tensor([[True, False, False]])
    loss = contrastive_loss(scores, positives, ~positives)
    assert float(loss) == pytest.approx(math.log(math.exp(0) + math.exp(1)) - 2)


def test_anchors_without_positives_are_left_out_and_have_no_gradient():
    scores = torch.randn(3, 4, requires_grad=True)
    positives = torch.zeros(3, 4, dtype=torch.bool)
    positives[0, 1] = True
    candidates = torch.ones(3, 4, dtype=torch.bool)
    candidates[2] = False
    contrastive_loss(scores, positives, candidates).backward()
    assert torch.equal(scores.grad[1:], torch.zeros(2, 4))
    assert scores.grad[0].abs().sum() > 0


def test_gradients(views):
    for v in views:
        v.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: nt_xent(a, b, 0.5), views)
    labels = torch.arange(12) % 4
    assert torch.autograd.gradcheck(lambda a, b: sup_con(torch.cat([a, b]), labels), views)


def test_equal_views_of_far_images_cost_least():
    far = torch.eye(4)
    assert float(nt_xent(far, far, 0.05)) < 1e-6
    same = torch.ones(4, 3)
    assert float(nt_xent(same, same)) == pytest.approx(math.log(7), rel=1e-5)


def test_alignment_and_uniformity():
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    assert float(alignment(x, 3 * x)) == pytest.approx(0, abs=1e-6)
    assert float(alignment(x, -x)) == pytest.approx(4, rel=1e-5)
    assert float(uniformity(torch.ones(5, 3))) == pytest.approx(0, abs=1e-5)
    pair = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert float(uniformity(pair)) == pytest.approx(-8, rel=1e-5)
    assert uniformity(x) < uniformity(x + 3)


def test_chunks_give_the_gradient_of_the_whole_batch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 4)).double()
    x = torch.randn(20, 7, dtype=torch.float64)

    def loss(z):
        return nt_xent(*z.chunk(2))

    model.eval()  # without dropout the order of draws does not matter
    whole = loss(model(x))
    whole.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    for chunk in (3, 20, 100):
        model.zero_grad()
        assert torch.allclose(backward_in_chunks(model, x, loss, chunk), whole)
        for p, gradient in zip(model.parameters(), expected, strict=True):
            assert torch.allclose(p.grad, gradient)


def test_dropout_is_the_same_in_both_passes_over_a_chunk():
    torch.manual_seed(0)
    seen = []

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x):
            z = F.dropout(x * self.weight, 0.5)
            seen.append(z.detach().clone())
            return z

    backward_in_chunks(Noisy(), torch.randn(4, 3), lambda z: z.square().sum(), 2)
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])


def test_in_one_process_gathering_changes_nothing(views):
    everything, start = gather(views[0])
    assert everything is views[0]
    assert (start, process_rank()) == (0, 0)


def _gathered(rank, folder, results):
    """One of two processes: 2 and 1 images of 3; the mean of gradients over processes must be the whole's."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    weight = torch.ones(4, dtype=torch.float64, requires_grad=True)
    data = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mine = slice(0, 2) if rank == 0 else slice(2, 3)
    share = (mine.stop - mine.start) / 3
    first, second = data[0, mine] * weight, data[1, mine] * weight
    loss = share * nt_xent(first, second)
    loss.backward()
    dist.all_reduce(weight.grad)
    dist.all_reduce(loss.detach())
    results[rank] = weight.grad.tolist()
    dist.barrier()
    dist.destroy_process_group()


def test_negatives_of_several_processes(tmp_path):
    import torch.multiprocessing as mp

    with mp.Manager() as manager:
        results = manager.dict()
        mp.start_processes(_gathered, (str(tmp_path), results), nprocs=2, start_method="fork")
        found = [torch.tensor(results[rank], dtype=torch.float64) for rank in range(2)]
    weight = torch.ones(4, dtype=torch.float64, requires_grad=True)
    data = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    nt_xent(data[0] * weight, data[1] * weight).backward()
    for gradient in found:
        assert torch.allclose(gradient, weight.grad)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: nt_xent(torch.ones(3, 2), torch.ones(4, 2)), "same shape"),
        (lambda: nt_xent(torch.ones(1, 2), torch.ones(1, 2)), "at least 2"),
        (lambda: nt_xent(torch.ones(3, 2), torch.ones(3, 2), 0.0), "temperature"),
        (lambda: info_nce(torch.ones(3, 2), torch.ones(3, 2), temperature=-1.0), "temperature"),
        (lambda: sup_con(torch.ones(3, 2)), "exactly one"),
        (lambda: sup_con(torch.ones(3, 2), torch.ones(2)), "labels"),
        (lambda: sup_con(torch.ones(3, 2), torch.arange(3)), "positive"),
        (lambda: contrastive_loss(torch.ones(2, 2), torch.ones(2, 3)), "same"),
        (lambda: uniformity(torch.ones(1, 2)), "at least two"),
        (lambda: backward_in_chunks(nn.Identity(), torch.ones(2, 2), torch.sum, 0), "chunk"),
    ],
)
def test_what_does_not_fit(call, words):
    with pytest.raises(DataError, match=words):
        call()
