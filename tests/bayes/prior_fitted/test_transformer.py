"""The network and its training: what may depend on what, and that the loss falls."""

import math

import pytest
import torch
from torch import nn

import paperback
from paperback.bayes.prior_fitted import PriorFittedTransformer, fit_prior, priors
from paperback.bayes.prior_fitted.exact import gp_posterior
from paperback.bayes.prior_fitted.training import draw_tasks, in_network_units
from paperback.errors import DataError
from paperback.training import seeded


def awake(**settings):
    """A network whose blocks are no longer the identity."""
    with seeded(1, "awake"):
        network = PriorFittedTransformer(2, d_model=16, layers=3, heads=2, n_bars=10, **settings)
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.3)
    return network.double().eval()


def task(n=6, queries=4, tasks=2, features=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((tasks, n, features), (tasks, n), (tasks, queries, features))
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


def masked_reference(network, context_x, context_y, x):
    """The authors' form: full attention of all rows on all rows, and a mask."""
    targets = ((context_y - network.y_shift) / network.y_scale)[..., None]
    rows = network._embedded(context_x) + network.embed_y(targets)
    tokens = torch.cat([network.nothing.expand(len(x), 1, -1), rows, network._embedded(x)], 1)
    n, total = rows.shape[1] + 1, tokens.shape[1]
    allowed = torch.zeros(total, total, dtype=torch.bool)
    allowed[:, :n] = True
    allowed |= torch.eye(total, dtype=torch.bool)
    for block in network.blocks:
        attention = nn.MultiheadAttention(tokens.shape[-1], block.heads, batch_first=True).double()
        attention.in_proj_weight.data = block.query_key_value.weight
        attention.in_proj_bias.data = block.query_key_value.bias
        attention.out_proj.load_state_dict(block.out.state_dict())
        normed = block.norm_attention(tokens)
        tokens = tokens + attention(normed, normed, normed, attn_mask=~allowed)[0]
        tokens = tokens + block.feed_forward(block.norm_forward(tokens))
    return network.decoder(network.norm(tokens[:, n:]))


@torch.no_grad()
def test_it_is_the_masked_transformer():
    network = awake()
    torch.testing.assert_close(network(*task()), masked_reference(network, *task()))


@torch.no_grad()
def test_the_order_of_the_context_does_not_matter():
    network, (context_x, context_y, x) = awake(), task()
    order = torch.tensor([3, 5, 0, 1, 4, 2])
    torch.testing.assert_close(
        network(context_x, context_y, x),
        network(context_x[:, order], context_y[:, order], x),
        atol=1e-9,
        rtol=0,
    )


@torch.no_grad()
def test_a_query_does_not_see_other_queries():
    network, (context_x, context_y, x) = awake(), task()
    together = network(context_x, context_y, x)
    alone = torch.cat([network(context_x, context_y, x[:, i : i + 1]) for i in range(x.shape[1])], 1)
    torch.testing.assert_close(together, alone)
    many = x.repeat(1, 50, 1)  # more than a block
    torch.testing.assert_close(network(context_x, context_y, many), together.repeat(1, 50, 1))


@torch.no_grad()
def test_targets_of_the_context_matter_and_each_task_has_its_own():
    network, (context_x, context_y, x) = awake(), task()
    changed = context_y.clone()
    changed[0, 2] += 1
    difference = (network(context_x, changed, x) - network(context_x, context_y, x)).abs().amax((1, 2))
    assert difference[0] > 1e-4
    assert difference[1] == 0


@torch.no_grad()
def test_without_its_own_key_a_query_differs():
    assert not torch.allclose(awake()(*task()), awake(query_attends_self=False)(*task()))


@torch.no_grad()
def test_a_fresh_network_ignores_the_context():
    network = PriorFittedTransformer(2, d_model=16, layers=2, heads=2)
    context_x, context_y, x = (part.float() for part in task())
    torch.testing.assert_close(
        network(context_x, context_y, x), network(context_x[:, :0], context_y[:, :0], x)
    )


@torch.no_grad()
def test_an_empty_context_and_few_features_are_taken():
    network = awake()
    assert network(*task(n=0)).shape == (2, 4, 10)
    context_x, context_y, x = task(features=1)
    padded = [torch.nn.functional.pad(math.sqrt(2) * part, (0, 1)) for part in (context_x, x)]
    torch.testing.assert_close(network(context_x, context_y, x), network(padded[0], context_y, padded[1]))


@pytest.mark.parametrize("head", ["riemann", "gaussian", "categorical"])
def test_the_loss_is_that_of_the_head_s_law(head):
    network = PriorFittedTransformer(1, head=head, d_model=8, layers=1, heads=1, n_bars=5, n_classes=3)
    network.y_shift.fill_(2.0)
    width = {"riemann": 5, "gaussian": 2, "categorical": 3}[head]
    outputs = torch.randn(4, 6, width, generator=torch.Generator().manual_seed(0))
    y = torch.randint(3, (4, 6), generator=torch.Generator().manual_seed(1)).float()
    expected = -network.law(outputs).log_prob(y.double()).float()
    torch.testing.assert_close(network.negative_log_likelihood(outputs, y), expected, rtol=1e-4, atol=1e-5)


def test_standardised_tasks_do_not_depend_on_units():
    network = PriorFittedTransformer(2, d_model=8, layers=1, units="data")
    context_x, context_y, x = task()
    y = torch.randn(2, 4, dtype=torch.float64)
    ours = in_network_units(network, context_x, context_y, x, y)
    other = in_network_units(network, 5 * context_x - 3, 100 * context_y + 7, 5 * x - 3, 100 * y + 7)
    for a, b in zip(ours, other, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(ours.context_y.std(1, correction=0), torch.ones(2, dtype=torch.float64))


def test_training_falls_below_the_prior_s_entropy(gp_network):
    _, history = gp_network
    entropy = 0.5 * math.log(2 * math.pi * math.e * 1.01)
    assert history.train_loss[-1] < entropy - 0.2


@torch.no_grad()
def test_the_trained_network_is_near_the_exact_posterior(gp_network):
    network, _ = gp_network
    x, y = priors.GP(lengthscale=0.4, noise=0.01)(500, 20, torch.Generator().manual_seed(5))
    known = (x[:, :6], y[:, :6], x[:, 12:])
    truth = y[:, 12:].double()
    exact = gp_posterior(*known, lengthscale=0.4, outputscale=1.0, noise=0.01).law
    prior = -math.log(math.sqrt(2 * math.pi * math.e * 1.01))
    ours = float(network.law(network(*known)).log_prob(truth).mean())
    best = float(exact.log_prob(truth).mean())
    assert ours < best
    assert (best - ours) < 0.5 * (best - prior)


def test_the_same_seed_gives_the_same_network():
    networks = []
    for _ in range(2):
        with seeded(3, "twice"):
            network = PriorFittedTransformer(1, d_model=8, layers=1, heads=1, n_bars=5, max_context=4)
        fit_prior(network, priors.Ridge(), steps=3, batch_size=4, progress=False)
        networks.append(network)
    for a, b in zip(networks[0].state_dict().values(), networks[1].state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert int(networks[0].trained_steps) == 3


def test_a_second_training_keeps_borders_and_goes_on(gp_network):
    network, _ = gp_network
    again = PriorFittedTransformer(**network.settings)
    again.load_state_dict(network.state_dict())
    fit_prior(again, priors.GP(lengthscale=0.4, noise=0.01), steps=2, batch_size=4, progress=False)
    assert torch.equal(again.borders, network.borders)
    assert int(again.trained_steps) == int(network.trained_steps) + 2


@pytest.mark.parametrize("head", ["riemann", "gaussian"])
@pytest.mark.parametrize("units", ["prior", "data"])
def test_tasks_have_finite_losses_at_every_size_of_context(head, units):
    network = PriorFittedTransformer(3, head=head, d_model=8, layers=1, max_context=3, n_bars=5, units=units)
    prior = priors.GPMixture((1, 3))
    fit_prior(network, prior, steps=2, batch_size=4, split="uniform", progress=False)
    draws = torch.Generator().manual_seed(0)
    for _ in range(12):
        tasks = draw_tasks(network, prior, 3, 2, "uniform", draws)
        loss = network.negative_log_likelihood(network(tasks.context_x, tasks.context_y, tasks.x), tasks.y)
        assert loss.isfinite().all()


def test_save_and_load(gp_network, tmp_path):
    network, _ = gp_network
    network.save_pretrained(tmp_path / "model")
    loaded = paperback.load(tmp_path / "model")
    assert isinstance(loaded, PriorFittedTransformer)
    known = tuple(part.float() for part in task(features=1))
    with torch.no_grad():
        assert torch.equal(loaded(*known), network(*known))
    assert int(loaded.trained_steps) == int(network.trained_steps)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_features": 0}, "num_features"),
        ({"d_model": 10, "heads": 4}, "do not divide"),
        ({"head": "poisson"}, "head"),
        ({"units": "metric"}, "units"),
        ({"n_bars": 2}, "n_bars"),
        ({"head": "categorical", "n_classes": 1}, "n_classes"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(DataError, match=message):
        PriorFittedTransformer(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"steps": 0}, "steps"), ({"batch_size": 0}, "batch_size"), ({"queries": 0}, "queries"),
     ({"split": "half"}, "split")],
)  # fmt: skip
def test_bad_training_is_named(settings, message):
    network = PriorFittedTransformer(1, d_model=8, layers=1)
    with pytest.raises(DataError, match=message):
        fit_prior(network, priors.Ridge(), **({"steps": 1, "progress": False} | settings))
