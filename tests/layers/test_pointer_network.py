"""The pointer network: its distribution, its search, its learning, its bad input."""

import math
from itertools import product

import pytest
import torch
from torch import nn

import paperback
from paperback.data.simulate.geometry import held_karp, hull_batch, tsp_batch
from paperback.errors import DataError
from paperback.layers.pointer_network import PointerAttention, PointerNetwork
from paperback.layers.pointer_network import attention as attention_module
from paperback.layers.pointer_network.decoding import permutation, triangles
from paperback.layers.pointer_network.learning import sequence_log_prob
from paperback.layers.pointer_network.metrics import delaunay_measures, hull_measures, tsp_measures
from paperback.training import seeded

KINDS = [
    {},
    {"feed": "encoder", "glimpses": 2, "layers": 2},
    {"encoder": "transformer"},
    {"mode": "seq2seq", "n_max": 9},
    {"mode": "attention", "n_max": 9},
]


def network(seed=0, spread=1.0, hidden=16, **settings):
    """A small network; `spread` scales its weights, so that its outputs differ."""
    with seeded(seed, "test"):
        model = PointerNetwork(2, hidden=hidden, **settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= spread
    return model


def draw(batch, n, seed=0):
    return torch.rand(batch, n, 2, generator=torch.Generator().manual_seed(seed))


def log_prob_of(model, points, decoded):
    """Of outputs, those that were cut too, by teacher forcing."""
    targets = torch.nn.functional.pad(decoded, (0, 1), value=-1)
    targets[~(decoded == 0).any(1), -1] = 0
    with torch.no_grad():
        log_probs = model(points, targets).log_softmax(-1)[:, :-1]
    chosen = log_probs.gather(2, decoded.clamp_min(0)[..., None])[..., 0]
    return chosen.masked_fill(decoded < 0, 0).sum(1)


# -- the distribution ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_of_real_positions_sum_to_one_and_padding_gets_none(kind):
    model = network(spread=4.0, **kind)
    points, targets, lengths = hull_batch((4, 8), 12, 0)
    p = model(points, targets, lengths).softmax(-1)
    assert p.shape == (12, targets.shape[1], points.shape[1] + 1)
    padding = torch.arange(points.shape[1] + 1) > lengths[:, None]
    assert (p.masked_select(padding[:, None].expand_as(p)) == 0).all()
    assert torch.allclose(p.sum(-1), torch.ones(p.shape[:2]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_batch_equals_its_rows_alone(kind):
    model = network(spread=4.0, **kind)
    points, targets, lengths = hull_batch((3, 8), 12, 1)
    together = model(points, targets, lengths)
    decoded = model.decode(points, lengths)
    for i, n in enumerate(lengths.tolist()):
        m = int((targets[i] >= 0).sum())
        alone = model(points[i : i + 1, :n], targets[i : i + 1, :m])
        assert torch.allclose(together[i, :m, : n + 1], alone[0], atol=1e-5)
        one = model.decode(points[i : i + 1, :n], max_len=points.shape[1] + 1)
        assert decoded.indices[i, : one.indices.shape[1]].tolist() == one.indices[0].tolist()
        assert torch.allclose(decoded.log_prob[i], one.log_prob[0], atol=1e-4)


def test_the_same_weights_run_at_any_length():
    model = network()
    for n in (1, 3, 300):
        targets = torch.tensor([[1, 0]])
        assert model(draw(1, n), targets).shape == (1, 2, n + 1)


def test_the_loss_by_hand():
    model, points = network(spread=6.0), draw(1, 3)
    targets = torch.tensor([[2, 3, 0]])
    states, (h, c) = model.encoder.lstm(points)
    elements = torch.cat([model.end[None], states[0]])
    fed, nats = model.go, 0.0
    for target in targets[0].tolist():
        _, (h, c) = model.decoder(fed.view(1, 1, -1), (h, c))
        pointing = model.attentions[0]
        scores = [
            (
                pointing.direction
                @ torch.tanh(pointing.of_keys.weight @ e + pointing.of_query.weight @ h[0, 0])
            ).item()
            for e in elements
        ]
        nats += math.log(sum(math.exp(s) for s in scores)) - scores[target]
        fed = points[0, target - 1]
    assert model.loss(points, targets).item() == pytest.approx(nats / 3, abs=1e-5)


def test_padding_of_targets_does_not_count():
    model, points = network(spread=4.0), draw(2, 4)
    targets = torch.tensor([[2, 3, 1, 0], [4, 0, -1, -1]])
    nats = -log_prob_of(model, points, targets)
    assert model.loss(points, targets).item() == pytest.approx(nats.sum().item() / 6, abs=1e-5)


def test_fed_encodings_carry_no_gradient():
    model, points = network(feed="encoder"), draw(2, 4)
    memory = model.encode(points, model.check(points, None))
    assert memory.elements.requires_grad
    (gradient,) = torch.autograd.grad(
        memory.fed[:, 1:].sum() + 0 * model.go.sum(), model.encoder.lstm.weight_ih_l0, allow_unused=True
    )
    assert gradient is None


def test_permuting_a_set_permutes_the_logits():
    model = network(spread=3.0, encoder="transformer", layers=2)
    points, targets, _ = hull_batch(7, 6, 0)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    place = torch.cat([torch.zeros(1, dtype=torch.int64), order.argsort() + 1])  # where each index went
    moved = torch.where(targets >= 0, place[targets.clamp_min(0)], targets)
    logits, other = model(points, targets), model(points[:, order], moved)
    assert torch.allclose(other[..., place], logits, atol=1e-5)


def test_without_stop_an_output_has_the_length_of_its_input():
    model = network(spread=5.0, stop=False)
    points, lengths = draw(5, 6), torch.tensor([6, 2, 3, 4, 1])
    targets = torch.full((5, 6), -1)
    for i, n in enumerate(lengths.tolist()):
        targets[i, :n] = torch.arange(1, n + 1)
    assert (model(points, targets, lengths)[..., 0] == -math.inf).all()
    for beam in (1, 3):
        decoded = model.decode(points, lengths, beam=beam, constraint="permutation")
        for i, n in enumerate(lengths.tolist()):
            assert sorted(decoded.indices[i, :n].tolist()) == list(range(1, n + 1))
            assert (decoded.indices[i, n:] == -1).all()
        assert decoded.finished.all()


# -- the layer alone -----------------------------------------------------------------------------------------


def test_gradients_of_pointing_by_finite_differences():
    layer = PointerAttention(3, 4, 5).double()
    query = torch.rand(2, 3, 3, dtype=torch.float64, requires_grad=True)
    keys = torch.rand(2, 6, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(6) < torch.tensor([[6], [4]])
    assert torch.autograd.gradcheck(lambda q, k: layer(q, k, mask).softmax(-1), (query, keys), eps=1e-6)
    weights = list(layer.parameters())
    assert torch.autograd.gradcheck(lambda *_: layer(query, keys).softmax(-1), weights)


@pytest.mark.parametrize("block", [1, 2 * 6 * 5, 7 * 6 * 5])  # one output, two, a row at a time
@pytest.mark.parametrize("kept", [0, 2**24])
def test_pointing_in_blocks_is_the_formula(monkeypatch, block, kept):
    monkeypatch.setattr(attention_module, "BLOCK", block)
    monkeypatch.setattr(attention_module, "KEPT", kept)
    layer = PointerAttention(3, 4, 5).double()
    query, keys = (torch.rand(2, n, d, dtype=torch.float64, requires_grad=True) for n, d in ((7, 3), (6, 4)))
    weights = torch.rand(2, 7, 6, dtype=torch.float64)
    found = layer(query, keys)
    inner = torch.tanh(layer.of_keys(keys)[:, None] + layer.of_query(query)[:, :, None])
    expected = inner @ layer.direction
    assert torch.allclose(found, expected, atol=1e-12)
    wanted = [query, keys, *layer.parameters()]
    one, other = (torch.autograd.grad((x * weights).sum(), wanted) for x in (found, expected))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(one, other, strict=True))
    with torch.no_grad():
        assert torch.allclose(layer(query, keys), expected, atol=1e-12)


def test_the_layer_goes_into_any_model():
    layer = PointerAttention(8, 8, 8)
    encoded, _ = nn.GRU(3, 8, batch_first=True)(torch.rand(2, 9, 3))
    each = torch.rand(2, 4, 9) > 0.5
    each[..., 0] = True
    logits = layer(encoded[:, :4], encoded, each)
    assert ((logits == -math.inf) == ~each).all()
    exported = torch.export.export(layer, (encoded[:, :4], encoded))
    assert torch.allclose(exported.module()(encoded[:, :4], encoded), layer(encoded[:, :4], encoded))


# -- search --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_log_probabilities_of_decoded_outputs_are_those_of_the_model(kind):
    model, points = network(spread=6.0, **kind), draw(6, 5)
    for beam in (1, 4):
        decoded = model.decode(points, beam=beam)
        assert torch.allclose(log_prob_of(model, points, decoded.indices), decoded.log_prob, atol=1e-4)
        short = model.decode(points, beam=beam, max_len=2)
        assert torch.allclose(log_prob_of(model, points, short.indices), short.log_prob, atol=1e-4)


def test_greedy_takes_the_most_probable_index_at_each_step():
    model, points = network(spread=6.0), draw(8, 5)
    decoded = model.decode(points, max_len=6).indices
    targets = torch.nn.functional.pad(decoded, (0, 1), value=-1)
    targets[~(decoded == 0).any(1), -1] = 0
    best = model(points, targets).argmax(-1)[:, :-1]
    assert torch.equal(best[decoded >= 0], decoded[decoded >= 0])
    assert len(set(decoded[decoded >= 0].tolist())) > 2


@pytest.mark.parametrize("length_normalised", [False, True])
def test_more_beams_are_never_worse_than_greedy(length_normalised):
    model, points = network(spread=8.0), draw(64, 6)

    def value(decoded):
        entries = (decoded.indices >= 0).sum(1) if length_normalised else 1
        return decoded.log_prob / entries

    greedy = value(model.decode(points))
    gains = [
        value(model.decode(points, beam=b, length_normalised=length_normalised)) - greedy for b in (2, 5)
    ]
    assert all((gain >= -1e-6).all() for gain in gains)
    assert gains[1].max() > 1e-3


@pytest.mark.parametrize("constraint", [None, "permutation"])
def test_a_full_beam_is_exhaustive_search(constraint):
    model, points = network(spread=8.0), draw(6, 4)
    every = [t for m in range(5) for t in product(range(1, 5), repeat=m)]
    if constraint:
        every = [t for t in every if sorted(t) == [1, 2, 3, 4]]
    targets = torch.full((len(every), 5), -1)
    for i, t in enumerate(every):
        targets[i, : len(t) + 1] = torch.tensor([*t, 0])
    decoded = model.decode(points, beam=700, constraint=constraint)
    rule = permutation if constraint else None
    for i in range(6):
        lengths = torch.full((len(every),), 4)
        with torch.no_grad():
            values = sequence_log_prob(model, points[i].expand(len(every), -1, -1), targets, lengths, rule)
        best = int(values.argmax())
        cut = decoded.indices[i].tolist()
        if decoded.finished[i]:
            assert cut[: len(every[best]) + 1] == [*every[best], 0]
            assert float(decoded.log_prob[i]) == pytest.approx(float(values[best]), abs=1e-4)
        else:  # an output that was cut is more probable than all that end
            assert decoded.log_prob[i] >= values[best]
    assert decoded.finished.any()


@pytest.mark.parametrize("beam", [1, 5, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_the_permutation_constraint_always_yields_one(kind, beam):
    model = network(spread=8.0, **kind)
    points, lengths = draw(8, 6), torch.tensor([6, 5, 4, 3, 2, 1, 6, 6])
    decoded = model.decode(points, lengths, beam=beam, constraint="permutation")
    for row, n in zip(decoded.indices.tolist(), lengths.tolist(), strict=True):
        assert sorted(row[:n]) == list(range(1, n + 1))
        assert row[n:] == [0] + [-1] * (6 - n)


def test_the_triangle_constraint_yields_triples_of_different_elements():
    model, points = network(spread=8.0), draw(8, 5)
    decoded = model.decode(points, beam=3, constraint="triangles", max_len=15)
    for row in decoded.indices.tolist():
        chosen = [i for i in row if i > 0]
        assert len(chosen) % 3 == 0
        assert all(len(set(chosen[i : i + 3])) == 3 for i in range(0, len(chosen), 3))
    prefix = torch.tensor([[1, 2]])
    assert triangles(prefix, torch.tensor([3]), 4).tolist() == [[False, False, False, True, False]]


def test_a_constraint_that_leaves_nothing_names_the_step():
    def two_at_most(prefix, lengths, n):
        return torch.full((len(prefix), n + 1), prefix.shape[1] < 2)

    with pytest.raises(DataError, match="nothing at step 3 of row 0"):
        network(spread=8.0).decode(
            draw(2, 6),
            constraint=lambda p, lengths, n: two_at_most(p, lengths, n) & (torch.arange(n + 1) > 0),
        )


def test_equal_weights_decode_equally():
    points = draw(4, 7)
    one, other = network(3).decode(points, beam=3), network(3).decode(points, beam=3)
    assert torch.equal(one.indices, other.indices)


# -- learning ------------------------------------------------------------------------------------------------


def test_it_learns_64_hulls_by_heart():
    model = network(hidden=128)
    points, targets, _ = hull_batch(5, 64, 0)
    history = model.fit((points, targets), steps=300, lr=2e-2, batch_size=64, progress=False)
    assert len(history) == 300
    assert model.loss(points, targets).item() < 0.05
    assert model.score(points, targets, "hull")["accuracy"] > 0.95


def test_the_same_seed_learns_the_same_from_fresh_draws():
    losses = []
    for seed in (1, 1, 2):
        model = network()
        history = model.fit(
            lambda size, g: hull_batch((4, 6), size, g), steps=6, batch_size=8, seed=seed, progress=False
        )
        losses.append(history.train_loss)
    assert len(losses[0]) == 6
    assert losses[0] == losses[1] != losses[2]


def test_reinforce_learns_from_a_cost_alone():
    """The first of the outputs should be the rightmost point; nobody ever says which one that is."""
    model = network(hidden=32, encoder="transformer")

    def sampler(size, generator):
        return torch.rand(size, 5, 2, generator=generator), torch.full((size,), 5)

    def cost(points, order):
        assert torch.equal(order[:, :5].sort(1).values, torch.arange(5).expand(len(order), -1))
        return -points[torch.arange(len(points)), order[:, 0], 0]

    history = model.reinforce(sampler, cost, steps=60, lr=5e-3, batch_size=64, progress=False)
    assert history.terms["cost"][0] == pytest.approx(-0.5, abs=0.06)  # at random
    points, _ = sampler(500, torch.Generator().manual_seed(0))
    first = model.decode(points, constraint="permutation").indices[:, 0] - 1
    assert (first == points[..., 0].argmax(1)).float().mean() > 0.8


def test_the_gradient_of_reinforce_flows_through_the_constrained_probability():
    model = network(spread=3.0)
    points, targets, lengths = tsp_batch((3, 5), 4, 0)
    log_prob = sequence_log_prob(model, points, targets, lengths, permutation)
    assert ((log_prob < 0) & log_prob.isfinite()).all()
    (gradient,) = torch.autograd.grad(log_prob.sum(), model.attentions[0].direction)
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0


def test_save_and_load(tmp_path):
    model, points = network(spread=5.0, feed="encoder", glimpses=1), draw(3, 5)
    model.save_pretrained(tmp_path / "model")
    loaded = paperback.load(tmp_path / "model")
    assert torch.equal(loaded.decode(points, beam=2).indices, model.decode(points, beam=2).indices)


def test_it_runs_in_bfloat16_under_autocast_and_in_float64():
    points, targets, _ = hull_batch(6, 4, 0)
    model = network()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(points, targets)
    assert loss.item() == pytest.approx(model.loss(points, targets).item(), rel=0.05)
    assert model.double().loss(points.double(), targets).item() == pytest.approx(loss.item(), rel=0.05)


def test_cost_grows_linearly_in_the_outputs_and_counts_what_torch_counts():
    from paperback.study.measure import flops

    model = network(hidden=32)
    points, targets, _ = hull_batch(8, 1, 0)
    m = targets.shape[1]
    counted = flops(lambda: model(points, targets))
    assert model.cost(8, m).flops >= counted
    slope = [model.cost(8, m + 1).flops - model.cost(8, m).flops for m in (3, 9)]
    assert slope[0] == slope[1]


# -- measures ------------------------------------------------------------------------------------------------


def test_hull_measures():
    points = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]]).expand(4, -1, -1)
    targets = torch.tensor([[1, 2, 3, 4, 0]] * 4)
    decoded = torch.tensor([[3, 4, 1, 2, 0], [1, 2, 3, 0, -1], [1, 3, 2, 4, 0], [1, 2, 3, 4, -1]])
    found = hull_measures(points, decoded, targets)
    assert found["accuracy"] == 0.25  # rotated is right, a triangle, a bow tie and one without end are not
    assert found["not_simple"] == 0.25
    assert found["area"] == pytest.approx(2.5 / 3)
    assert found["fail"] == 1.0
    assert hull_measures(points, targets, targets) == {"accuracy": 1, "area": 1, "not_simple": 0, "fail": 0}
    nothing = torch.zeros(4, 1, dtype=torch.int64)
    assert hull_measures(points, nothing, targets)["not_simple"] == 1


def test_delaunay_measures():
    points = draw(3, 4)
    targets = torch.tensor([[1, 2, 3, 2, 3, 4, 0]] * 3)
    decoded = torch.tensor([[2, 3, 4, 3, 1, 2, 0], [1, 2, 3, 0, -1, -1, -1], [1, 2, 3, 2, 3, 4, 1]])
    assert delaunay_measures(points, decoded, targets) == {
        "accuracy": pytest.approx(1 / 3),
        "coverage": pytest.approx(5 / 6),
    }


def test_tsp_measures():
    points = draw(3, 5)
    targets = held_karp(points) + 1
    targets = torch.cat([targets, torch.zeros(3, 1, dtype=torch.int64)], 1)
    twice = targets.clone()
    twice[1, 2] = twice[1, 1]
    assert tsp_measures(points, targets, targets)["gap"] == pytest.approx(0, abs=1e-12)
    assert tsp_measures(points, twice, targets)["invalid"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    "metric", ["hull", "delaunay", "tsp", lambda p, d, t: {"same": float((p == p).all())}]
)
def test_score_by_every_metric(metric):
    points, targets, lengths = hull_batch((4, 6), 12, 0)
    if metric == "tsp":
        points, targets, lengths = tsp_batch((4, 6), 12, 0)
    found = network(spread=4.0).score(points, targets, metric, lengths)
    assert found
    assert all(isinstance(value, float) for value in found.values())


# -- bad input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        ([[1, 5, 0], [1, 2, 0]], r"target 1 of row 0 is 5; it must lie in 0\.\.4"),
        ([[1, 2, 0], [1, 4, 0]], r"target 1 of row 1 is 4; it must lie in 0\.\.3"),
        ([[1, 2, 0], [1, 2, 3]], "row 1 of the targets has 0 stops"),
        ([[1, 0, 0], [1, 2, 0]], "row 0 of the targets has 2 stops"),
        ([[1, 0, 2], [1, 2, 0]], "row 0 .* goes on after its end"),
        ([[1, -1, 0], [1, 2, 0]], "row 0 .* goes on after its end"),
        ([[1.0, 2.0, 0.0]] * 2, "dtype"),
        ([[1, 2, 0]], r"shape \(1, 3\)"),
    ],
)
def test_bad_targets(targets, words):
    with pytest.raises(DataError, match=words):
        network()(draw(2, 4), torch.tensor(targets), torch.tensor([4, 3]))


@pytest.mark.parametrize(
    ("points", "lengths", "words"),
    [
        (torch.rand(2, 0, 2), None, "something to point at"),
        (torch.rand(2, 4, 3), None, r"\(batch, n, 2\)"),
        (torch.ones(2, 4, 2, dtype=torch.int64), None, "floating point"),
        (torch.rand(2, 4, 2), [4, 5], "row 1 has length 5"),
        (torch.rand(2, 4, 2), [0, 4], "row 0 has length 0"),
        (torch.rand(2, 4, 2), [4], "2 integers"),
        (torch.full((1, 2, 2), torch.nan), None, "element 0 of row 0 has feature nan"),
    ],
)
def test_bad_points(points, lengths, words):
    with pytest.raises(DataError, match=words):
        network().decode(points, None if lengths is None else torch.tensor(lengths))


def test_a_fixed_dictionary_refuses_larger_inputs():
    for mode in ("seq2seq", "attention"):
        model = network(mode=mode, n_max=5)
        model.decode(draw(1, 5))
        with pytest.raises(DataError, match=r'n_max = 5.*mode="pointer"'):
            model.decode(draw(1, 6))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mode": "seq2seq"}, "needs n_max"),
        ({"n_max": 5}, "has no dictionary"),
        ({"mode": "magic"}, "pointer, seq2seq, attention"),
        ({"feed": "x"}, "input, encoder"),
        ({"encoder": "x"}, "lstm, transformer"),
        ({"glimpses": -1}, "glimpses is -1"),
        ({"mode": "attention", "n_max": 4, "glimpses": 1}, "only mode"),
        ({"encoder": "transformer", "hidden": 6}, "multiple of 4"),
        ({"layers": 0}, "layers is 0"),
    ],
)
def test_bad_arguments(settings, words):
    with pytest.raises(DataError, match=words):
        PointerNetwork(2, **settings)


def test_bad_calls():
    model, (points, targets, _) = network(), hull_batch(4, 3, 0)
    for call, words in (
        (lambda: model.decode(points, beam=0), "beam is 0"),
        (lambda: model.decode(points, max_len=0), "max_len is 0"),
        (lambda: model.decode(points, constraint="x"), "permutation, triangles"),
        (lambda: model.decode(points, constraint=lambda p, lengths, n: torch.ones(1)), "constraint returned"),
        (lambda: model.score(points, targets, "x"), "hull, delaunay, tsp"),
        (lambda: model.fit((points,), steps=3), "1 tensors"),
        (lambda: model.fit((points, targets), steps=0), "steps is 0"),
        (lambda: PointerAttention(2, 0, 2), "key_dim is 0"),
        (lambda: PointerAttention(2, 2, 2)(torch.rand(1, 2), torch.rand(1, 2, 2)), "same batch"),
    ):
        with pytest.raises(DataError, match=words):
            call()
