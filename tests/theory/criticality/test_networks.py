"""Real networks: set at criticality in place, measured, reported."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from paperback.errors import DataError, NotSupportedError
from paperback.testing.theory import check_measurement
from paperback.theory.criticality import (
    Criticality,
    initialize_critical_,
    measure_flow,
    report,
    sample_networks,
)
from paperback.theory.interface import Measurement
from paperback.theory.studies.criticality.networks import multilayer


def source(seed=0):
    return torch.Generator().manual_seed(seed)


def rows(*shape, scale=1.0):
    return scale * torch.randn(*shape, generator=source(1))


# -- initialize_critical_ ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nn.ReLU, nn.GELU, nn.SiLU])
def test_the_kernel_stays_at_its_fixed_point_through_thirty_layers(kind):
    """The mean over networks is K*; a single network of this width is off by sqrt(5 * 30 / 512) = 54 %."""
    width, depth, networks = 512, 30, 12
    x, means = rows(2, 40, scale=3.0), []
    for seed in range(networks):
        model = multilayer(kind, 40, width, depth)
        done = initialize_critical_(model, x=x, generator=source(seed))
        means.append(done.measured.value)
    means = np.array(means)
    K = Criticality(kind()).recommended.K
    steps = np.log(means[:, 1:] / means[:, :-1])  # what one layer does, free of what came before
    assert abs(steps.mean()) * depth < 0.05 + 3 * steps.std() * math.sqrt(depth / networks)
    error = means.std(0, ddof=1) / math.sqrt(networks)
    assert (np.abs(means.mean(0) - K) <= 0.05 * K + 3 * error).all()
    assert abs(means[:, :5].mean() / K - 1) < 0.05 + 3 * (error[:5] / K).max()


def test_weights_and_biases_have_the_variances_that_are_reported():
    model = multilayer(nn.GELU, 300, 400, 3)
    done = initialize_critical_(model, x=rows(50, 300))
    point = Criticality(F.gelu).recommended
    assert done.points["GELU(approximate='none')"].C_W == point.C_W
    for layer, row in zip((model[0], model[2], model[4]), done.rows, strict=True):
        assert float(layer.weight.detach().std()) == pytest.approx(row["weight std"], rel=0.02)
        assert float(layer.bias.detach().std()) == pytest.approx(row["bias std"], rel=0.2)
    assert done.rows[1]["C_W"] == point.C_W
    assert float(done.measured.value[0]) == pytest.approx(point.K, rel=0.15)


def test_convolutions_count_their_fan_in_and_what_padding_hides():
    model = nn.Sequential(
        nn.Conv2d(8, 32, 3, padding=1, groups=2), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1, padding_mode="circular"), nn.ReLU(), nn.Flatten(),
        nn.Linear(64 * 16, 5),
    )  # fmt: skip
    done = initialize_critical_(model, x=rows(64, 8, 4, 4))
    seen = (10 / 12) ** 2  # of the taps of a 3 x 3 patch on a 4 x 4 image
    assert [row["fan-in"] for row in done.rows] == pytest.approx([36 * seen, 288 * seen, 576, 1024])
    np.testing.assert_allclose(done.measured.prediction, 1.0, rtol=1e-9)
    assert np.mean(np.abs(done.measured.value[:3] - 1)) < 0.25


def test_deep_convolutional_signal_survives_zero_padding():
    parts = [m for i in range(20) for m in (nn.Conv2d(3 if i == 0 else 48, 48, 3, padding=1), nn.ReLU())]
    values = []
    for seed in range(6):
        done = initialize_critical_(nn.Sequential(*parts), x=rows(4, 3, 6, 6), generator=source(seed))
        values.append(done.measured.value)
    mean = float(np.mean(values, 0)[-5:].mean())
    assert 0.3 < mean < 3  # by the plain fan-in it would be (0.89^2)^20 = 0.01


def test_the_same_generator_gives_the_same_weights_and_the_data_scale_the_first_layer():
    nets = [multilayer(nn.Tanh, 6, 8, 3) for _ in range(2)]
    for net in nets:
        initialize_critical_(net, generator=source(3))
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(a, b)
    small, large = (initialize_critical_(nets[0], x=rows(30, 6, scale=s)) for s in (1.0, 10.0))
    assert small.rows[0]["C_W"] == pytest.approx(100 * large.rows[0]["C_W"], rel=1e-5)


def test_activations_in_order_of_calls_even_when_one_module_is_shared():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu, self.tanh = nn.ReLU(), nn.Tanh()
            self.c, self.b, self.a = nn.Linear(6, 3), nn.Linear(6, 6), nn.Linear(5, 6)

        def forward(self, x):
            return self.c(self.tanh(self.b(self.relu(self.a(x)))))

    done = initialize_critical_(Shared(), x=rows(10, 5))
    assert [(r["layer"], r["fed by"]) for r in done.rows] == [("a", "data"), ("b", "ReLU()"), ("c", "Tanh()")]
    assert [r["C_W"] for r in done.rows[1:]] == pytest.approx([2, 1])
    with pytest.raises(DataError, match="2 kinds of activations"):
        initialize_critical_(Shared())


def test_functional_activations_are_said_and_users_modules_recognised():
    class Snake(nn.Module):
        def forward(self, z):
            return z + torch.sin(z) ** 2

    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.b(F.gelu(self.a(x)))

    with pytest.raises(DataError, match="no activation module"):
        initialize_critical_(Functional())
    assert initialize_critical_(Functional(), F.gelu).rows[1]["fed by"] == "gelu"
    done = initialize_critical_(nn.Sequential(nn.Linear(4, 4), Snake(), nn.Linear(4, 4)))
    assert done.rows[1]["C_W"] == pytest.approx(Criticality(Snake()).recommended.C_W)


def test_what_is_left_is_told():
    frozen, normed = nn.Linear(4, 4), parametrizations.weight_norm(nn.Linear(4, 4))
    frozen.weight.requires_grad_(False)
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.ReLU(), frozen, normed, nn.Linear(4, 2))
    model.append(nn.MultiheadAttention(2, 1))
    before = frozen.weight.clone()
    done = initialize_critical_(model)
    reasons = dict(done.left)
    assert set(reasons) == {"0", "3", "4", "6"}
    assert "frozen" in reasons["3"]
    assert "computed from other parameters" in reasons["4"]
    assert torch.equal(frozen.weight, before)
    assert len(done.table()) == 6
    assert "set 2 layers, left 4 modules" in str(done)


def test_a_parameter_of_the_model_itself_does_not_hide_its_layers():
    class Scaled(nn.Sequential):
        def __init__(self, *parts):
            super().__init__(*parts)
            self.scale = nn.Parameter(torch.ones(1))

    done = initialize_critical_(Scaled(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)))
    assert len(done.rows) == 2
    assert done.left == (("", "parameters of Scaled are not covered by the theory"),)


def test_a_layer_without_bias_where_one_is_needed_is_noted():
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4, bias=False))
    assert "has no bias" in initialize_critical_(model).rows[1]["note"]


def test_nothing_changes_when_an_error_is_raised():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for x in (torch.zeros(3, 4), torch.full((3, 4), math.nan)):
        with pytest.raises(DataError, match="mean square"):
            initialize_critical_(model, x=x)
    with pytest.raises(DataError, match="residual"):
        initialize_critical_(model, residual=1.0)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.LayerNorm, nn.RMSNorm, lambda n: nn.GroupNorm(1, n)])
def test_normalised_models_are_refused(norm):
    model = nn.Sequential(nn.Linear(4, 4), norm(4), nn.ReLU(), nn.Linear(4, 2))
    for call in (initialize_critical_, lambda m: report(m, rows(5, 4))):
        with pytest.raises(NotSupportedError, match="normalised layers have no kernel flow of this form"):
            call(model)


def test_models_without_layers_and_lazy_ones():
    with pytest.raises(DataError, match="no Linear or Conv"):
        initialize_critical_(nn.Sequential(nn.ReLU()))
    with pytest.raises(DataError, match="lazy"):
        initialize_critical_(nn.Sequential(nn.LazyLinear(3), nn.ReLU(), nn.LazyLinear(2)))


def test_one_layer_and_bfloat16():
    model = nn.Sequential(nn.Linear(400, 300)).to(torch.bfloat16)
    done = initialize_critical_(model, x=rows(20, 400).to(torch.bfloat16))
    assert float(done.measured.value[0]) == pytest.approx(1, rel=0.2)
    assert model[0].weight.dtype == torch.bfloat16


# -- measure_flow --------------------------------------------------------------------------------------------


def test_flow_of_tanh_networks_is_as_predicted():
    n, depth = 32, 5
    theory = Criticality(torch.tanh)
    x = rows(1, n)
    x /= x.square().mean().sqrt()
    flow = theory.flow(1.1, 0.1, 1.0, depth, n)
    measured = measure_flow(
        lambda: multilayer(nn.Tanh, n, n, depth),
        x,
        3000,
        ensemble=(0.1, 1.0),
        prediction=flow,
        progress=False,
    )
    for name in ("K", "V/(n K^2)", "kurtosis", "chi_par", "chi_perp"):
        part = measured[name]
        error = np.abs(part.value - part.prediction)
        assert (error <= 4 * part.standard_error + 0.05 * np.abs(part.prediction)).all(), name
        assert part.n == 3000
    assert len(measured["chi_par"].value) == depth - 1


def test_vmapped_networks_equal_one_by_one():
    def make():
        return nn.Sequential(nn.Conv1d(2, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(15, 4))

    x = rows(2, 2, 5)
    sample = sample_networks(make, x, 3, seed=5, progress=False)
    from paperback.training import seeded

    for i in range(3):
        with seeded(5, "network", i):
            model = make()
        hidden = model[0](x)
        expected = [hidden.square().mean((1, 2)), model(x).square().mean(1)]
        torch.testing.assert_close(
            torch.from_numpy(sample.second[i]).float(),
            torch.stack(expected, 1).detach(),
            rtol=1e-4,
            atol=1e-6,
        )
    z = hidden.movedim(1, -1).double()  # pairs of channels at one position
    products = (z[..., :, None] * z[..., None, :]).square()
    off = products.sum((-1, -2)) - products.diagonal(dim1=-1, dim2=-2).sum(-1)
    expected = (off / 6).mean(1).detach().numpy()
    np.testing.assert_allclose(sample.pairs[2, :, 0], expected, rtol=1e-4)


def test_measurement_is_repeatable_and_chunks_do_not_matter_to_the_mean(monkeypatch):
    from paperback.theory.criticality import measure

    def run():
        return sample_networks(
            lambda: multilayer(nn.ReLU, 4, 6, 3), rows(1, 4), 40, ensemble=(0.0, 2.0), progress=False
        ).second

    whole = run()
    np.testing.assert_array_equal(whole, run())
    monkeypatch.setattr(measure, "FLOATS", 500)
    assert run().shape == whole.shape


def test_own_initialisations_are_measured_as_they_are():
    measured = measure_flow(lambda: multilayer(nn.Tanh, 50, 50, 3), rows(1, 50), 60, progress=False)
    assert float(measured.value[0]) == pytest.approx(float(rows(1, 50).square().mean()) / 3, rel=0.15)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_models": 1}, "n_models"),
        ({"x": torch.zeros(1, 4)}, "different from zero"),
        ({"x": torch.ones(1, 1)}, "one number per input"),
        ({"layers": ["nope"]}, "nope"),
        ({"ensemble": (0.0, 0.0)}, "ensemble"),
        ({"make_model": lambda: 3}, "torch module"),
    ],
)
def test_bad_measurements(change, message):
    arguments = {"make_model": lambda: multilayer(nn.ReLU, 4, 4, 2), "x": rows(1, 4), "n_models": 3}
    with pytest.raises(DataError, match=message):
        measure_flow(**(arguments | change), progress=False)


def test_a_prediction_of_another_depth_is_refused():
    flow = Criticality(F.relu).flow(1.0, 0.0, 2.0, 5, 4)
    with pytest.raises(DataError, match="prediction has 5 layers"):
        measure_flow(lambda: multilayer(nn.ReLU, 4, 4, 2), rows(1, 4), 3, prediction=flow, progress=False)


# -- report --------------------------------------------------------------------------------------------------


def test_a_default_network_vanishes_and_a_critical_one_does_not():
    model, x = multilayer(nn.Tanh, 30, 200, 20), rows(40, 30)
    before = report(model, x)
    assert before.verdict == "vanishing"
    assert "initialize_critical_" in before.fix
    initialize_critical_(model, x=x)
    after = report(model, x)
    assert after.verdict == "critical"
    assert after.distance < 0.1 < before.distance
    assert after.rows[3]["C_W"] == pytest.approx(1, rel=0.02)
    assert len(after.table()) == 20
    np.testing.assert_allclose(after.measurement.value, after.measurement.prediction, rtol=0.5)


def test_large_weights_explode_and_dead_layers_vanish():
    model, x = multilayer(nn.ReLU, 30, 100, 10), rows(40, 30)
    initialize_critical_(model, x=x)
    with torch.no_grad():
        for layer in model[2::2]:
            layer.weight *= 2
    assert report(model, x).verdict == "exploding"
    with torch.no_grad():
        model[4].weight.zero_()
        model[4].bias.zero_()
    dead = report(model, x)
    assert dead.verdict == "vanishing"
    assert math.isinf(dead.distance)
    assert "nan" not in dead.reading


def test_report_leaves_the_model_as_it_is_and_speaks_of_width():
    model, x = multilayer(nn.ReLU, 30, 8, 12).train(), rows(10, 30)
    initialize_critical_(model, x=x)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    text = str(report(model, x))
    assert "make it wider or less deep" in text
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("x", [torch.zeros(2, 4), torch.empty(0, 4), torch.full((2, 4), math.inf)])
def test_report_refuses_bad_inputs(x):
    with pytest.raises(DataError, match="x must hold"):
        report(multilayer(nn.ReLU, 4, 4, 2), x)


# -- what every measurement keeps to -------------------------------------------------------------------------


def test_measurements_keep_to_the_contract():
    x = rows(2, 6)

    def flow(seed):
        return measure_flow(lambda: multilayer(nn.Tanh, 6, 8, 3), x, 20, seed=seed, progress=False)

    check_measurement(flow)
    check_measurement(
        lambda seed: measure_flow(
            lambda: multilayer(nn.ReLU, 6, 8, 3), x, 20, seed=seed, ensemble=(0.1, 2.0), progress=False
        )
    )
    model = multilayer(nn.GELU, 6, 8, 4)
    initialize_critical_(model, x=x)
    check_measurement(lambda seed: report(model, x).measurement, model=model, seeded=False)


def test_the_contract_is_able_to_fail():
    def good(seed):
        return Measurement("x", float(seed), (-1.0, 2.0))

    check_measurement(good)
    model = nn.Linear(2, 2)

    def spoils(seed):
        with torch.no_grad():
            model.weight += 1
        return good(seed)

    noise = np.random.default_rng(0)
    for measure, message in (
        (spoils, "changed at weight"),
        (lambda seed: Measurement("x", noise.random()), "the same seed gave another result"),
        (lambda seed: Measurement("x", 1.0), "another seed gave the same"),
        (lambda seed: Measurement("x", float(seed), (0.5, 2.0)), "outside its own interval"),
        (lambda seed: (print("hello"), good(seed))[1], "printed"),
        (lambda seed: (torch.rand(1), good(seed))[1], "random state"),
    ):
        with pytest.raises(AssertionError, match=message):
            check_measurement(measure, model=model)
