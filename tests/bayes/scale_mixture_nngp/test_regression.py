"""The regressor against the multivariate t, the GP limit, brute force and many data sets."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.utils.estimator_checks import parametrize_with_checks

from paperback.bayes.bnn_surrogate import GPSurrogate
from paperback.bayes.kernels import NNGPKernel
from paperback.bayes.scale_mixture_nngp import ScaleMixtureNNGP, scale_prior_init
from paperback.errors import ArtefactError, DataError

D = torch.float64


def data(rows=25, outputs=None, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(rows, 3))
    y = 40 + 7 * (np.sin(X[:, 0]) + 0.5 * X[:, 1] + 0.2 * rng.normal(size=rows))
    return (X, y) if outputs is None else (X, np.column_stack([y, X[:, 2] - y]))


def kernel_of(model, a, b=None):
    """K in standard units, by hand."""
    a, b = (model._inputs(x) for x in (a, a if b is None else b))
    return model.kernel_.forward(a, b).detach()


@parametrize_with_checks([ScaleMixtureNNGP(depth=1, max_iter=5)])
def test_scikit_learn_checks(estimator, check):
    check(estimator)


def fixed(**settings):
    return ScaleMixtureNNGP(depth=2, learn=False, noise_variance=0.05, **settings)


def test_evidence_and_prediction_are_those_of_the_multivariate_t():
    X, y = data()
    model = fixed(scale_prior=("inverse-gamma", 2.5, 1.5)).fit(X, y)
    z = (y - model.target_shift_) / model.target_scale_
    gram = kernel_of(model, X).numpy() + 0.05 * np.eye(len(X))
    reference = stats.multivariate_t(shape=1.5 / 2.5 * gram, df=5.0)
    in_units = reference.logpdf(z) - len(X) * np.log(model.target_scale_[0])
    assert model.log_marginal_ == pytest.approx(in_units, abs=1e-7)
    # Conditioning the multivariate t, by its own formula.
    points, _ = data(4, seed=1)
    cross, own = kernel_of(model, points, X).numpy(), kernel_of(model, points).numpy() + 0.05 * np.eye(4)
    solved = np.linalg.solve(gram, z)
    df = 5.0 + len(X)
    scale = 1.5 / 2.5 * (5.0 + 2.5 / 1.5 * z @ solved) / df * (own - cross @ np.linalg.solve(gram, cross.T))
    law = model.predict_distribution(points)
    for i in range(4):
        loc = model.target_shift_ + model.target_scale_ * (cross[i] @ solved)
        one = stats.t(df, loc, model.target_scale_ * math.sqrt(scale[i, i]))
        value = torch.full((4,), 45.0, dtype=D)
        assert float(law.log_prob(value)[i]) == pytest.approx(one.logpdf(45.0)[0], abs=1e-7)
        assert float(law.cdf(value)[i]) == pytest.approx(one.cdf(45.0)[0], abs=1e-7)


def test_the_gp_is_the_limit_of_many_degrees_of_freedom():
    X, y = data()
    points, _ = data(6, seed=1)
    gp = fixed(scale_prior=("point", 0.7)).fit(X, y)
    t = fixed(scale_prior=("inverse-gamma", 1e9, 0.7e9)).fit(X, y)
    for a, b in zip(gp.predict(points, return_std=True), t.predict(points, return_std=True), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    assert t.log_marginal_ == pytest.approx(gp.log_marginal_, abs=1e-4)


@pytest.mark.parametrize("settings", [
    {"inference": "quadrature"},
    {"inference": "importance", "draws": 50_000},
])  # fmt: skip
def test_other_inference_agrees_with_the_closed_form(settings):
    X, y = data()
    points, _ = data(6, seed=1)
    exact, other = fixed().fit(X, y), fixed(**settings).fit(X, y)
    rtol = 1e-7 if settings["inference"] == "quadrature" else 0.02
    for a, b in zip(exact.predict(points, True), other.predict(points, True), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol)
    value = torch.full((6,), 42.0, dtype=D)
    np.testing.assert_allclose(
        other.predict_distribution(points).log_prob(value),
        exact.predict_distribution(points).log_prob(value),
        atol=1e-6 if rtol < 1e-3 else 0.05,
    )
    assert float(other.scale_posterior_.mean) == pytest.approx(float(exact.scale_posterior_.mean), rel=rtol)


def test_additive_noise_by_brute_force_over_the_scale():
    X, y = data(8)
    points, _ = data(3, seed=1)
    model = fixed(noise="additive", inference="quadrature", scale_prior=("half-cauchy", 1.0)).fit(X, y)
    z = (y - model.target_shift_) / model.target_scale_
    gram, cross = kernel_of(model, X).numpy(), kernel_of(model, points, X).numpy()
    own = kernel_of(model, points).numpy()
    u = np.linspace(-12, 12, 3000)
    prior = stats.halfcauchy.logpdf(np.exp(u / 2)) - np.log(2) + u / 2
    log_terms, means, variances = [], [], []
    for log_s2, log_h in zip(u, prior, strict=True):
        s2 = math.exp(log_s2)
        full = s2 * gram + 0.05 * np.eye(8)
        log_terms.append(log_h + stats.multivariate_normal.logpdf(z, cov=full))
        gain = s2 * np.linalg.solve(full, cross.T)
        means.append(gain.T @ z)
        variances.append(np.diag(s2 * own - s2 * cross @ gain))
    weights = np.exp(np.array(log_terms) - np.max(log_terms))
    evidence = np.log(weights.sum() * (u[1] - u[0])) + np.max(log_terms)
    in_units = evidence - 8 * np.log(model.target_scale_[0])
    assert model.log_marginal_ == pytest.approx(in_units, abs=2e-4)
    weights /= weights.sum()
    mean = weights @ np.array(means)
    second = weights @ (np.array(variances) + np.array(means) ** 2)
    predicted, std = model.predict(points, return_std=True)
    np.testing.assert_allclose(predicted, model.target_shift_ + model.target_scale_ * mean, rtol=1e-4)
    expected = model.target_scale_ * np.sqrt(second - mean**2 + 0.05)
    np.testing.assert_allclose(std, expected, rtol=1e-3)


@pytest.mark.parametrize("settings", [
    {},
    {"noise": "additive", "inference": "quadrature"},
    {"inference": "quadrature", "scale_prior": ("burr", 2.0, 1.0)},
])  # fmt: skip
def test_the_joint_law_has_the_marginals_of_the_point_law(settings):
    X, y = data(outputs=2)
    model = fixed(**settings).fit(X, y)
    x = model._inputs(data(4, seed=1)[0])
    joint, points = model._joint(x).marginal(), model._law(x)
    torch.testing.assert_close(joint.mean.mT, points.mean, rtol=1e-6, atol=1e-8)
    if not settings:  # noise inside is s2 noise: its mean scale comes on top
        s2 = model.scale_posterior_.mean
        torch.testing.assert_close(joint.variance.mT + 0.05 * s2, points.variance, rtol=1e-6, atol=1e-8)
    draws = model.sample_functions(data(4, seed=1)[0], 20_000)
    assert draws.shape == (20_000, 4, 2)
    np.testing.assert_allclose(draws.mean(0), model.predict(data(4, seed=1)[0]), atol=0.3)


def test_outputs_share_one_scale():
    X, y = data(outputs=2)
    model = fixed(scale_prior=("inverse-gamma", 1.1, 1.0))
    model.fit_tasks([(X, y)])  # without data: the prior
    draws = model.sample_functions(X[:1], 20_000)[:, 0]
    ratio = ((draws - draws.mean(0)) / draws.std(0)).abs().log()
    assert np.corrcoef(ratio.numpy().T)[0, 1] > 0.1  # large together


def test_only_the_width_answers_to_the_size_of_the_targets():
    X, y = data()
    points, _ = data(5, seed=1)
    settings = {"depth": 2, "learn": False, "noise_variance": 0.05}
    model = ScaleMixtureNNGP(**settings).fit_tasks([(X, y), (X, y)])
    shift = float(model.target_shift_[0])
    gp = ScaleMixtureNNGP(**settings, scale_prior=("point", 1.0)).fit_tasks([(X, y), (X, y)])
    spreads = []
    for size in (0.2, 1.0, 5.0):
        other = shift + size * (y - shift)
        mean, std = model.condition(X, other).predict(points, return_std=True)
        np.testing.assert_allclose(mean, gp.condition(X, other).predict(points), rtol=1e-8)
        spreads.append(std)
    assert (spreads[0] < spreads[1]).all()
    assert (spreads[1] < spreads[2]).all()


def test_targets_and_beta_scale_together():
    X, y = data()
    model = ScaleMixtureNNGP(depth=2, learn=False, scale_prior=("inverse-gamma", 2.0, 3.0))
    mean, std = model.fit(X, y).predict(X[:3], return_std=True)
    x, z = model._inputs(X), torch.as_tensor((y - model.target_shift_) / model.target_scale_)[:, None]
    model.scale_prior_ = ["inverse-gamma", 2.0, 3.0 * 100]
    model._condition(x, 10 * z)
    wide_mean, wide_std = model.predict(X[:3], return_std=True)
    shift = float(model.target_shift_[0])
    np.testing.assert_allclose(wide_mean - shift, 10 * (mean - shift))
    np.testing.assert_allclose(wide_std, 10 * std)


def test_learning_raises_the_evidence_and_has_true_gradients():
    X, y = data()
    before = ScaleMixtureNNGP(depth=2, learn=False).fit(X, y)
    after = ScaleMixtureNNGP(depth=2).fit(X, y)
    assert after.log_marginal_ > before.log_marginal_ + 1
    tasks_model = ScaleMixtureNNGP(depth=1, learn=False, noise="additive", inference="quadrature").fit(X, y)
    from paperback.bayes.scale_mixture_nngp.gram import Tasks

    z = torch.as_tensor((y - tasks_model.target_shift_) / tasks_model.target_scale_)[:, None]
    tasks = Tasks.of([(tasks_model._inputs(X), z), (tasks_model._inputs(X)[:7], z[:7])])
    prior = tasks_model._prior()

    def evidence(noise, alpha, beta):
        return tasks_model._evidence(tasks, prior, noise, alpha, beta)

    start = [torch.tensor(value, dtype=D, requires_grad=True) for value in (0.1, 2.0, 2.0)]
    assert torch.autograd.gradcheck(evidence, start, eps=1e-6, atol=1e-3, rtol=1e-3)
    inside = ScaleMixtureNNGP(depth=1, learn=False).fit(X, y)
    assert torch.autograd.gradcheck(
        lambda noise, alpha, beta: inside._evidence(tasks, prior, noise, alpha, beta), start
    )


def test_padded_tasks_have_the_evidence_of_each():
    X, y = data()
    sets = [(X[:5], y[:5]), (X[5:], y[5:])]
    for settings in ({}, {"noise": "additive", "inference": "quadrature"}):
        model = ScaleMixtureNNGP(depth=2, learn=False, **settings).fit_tasks(sets)
        from paperback.bayes.scale_mixture_nngp.gram import Tasks

        together = model._evidence(Tasks.of([model._standard(*pair) for pair in sets]), model._prior())
        units = [len(x) * np.log(model.target_scale_[0]) for x, _ in sets]
        apart = [model.log_marginal(*pair) for pair in sets]
        np.testing.assert_allclose(together.detach().numpy() - units, apart, rtol=1e-5)


def test_many_data_sets_identify_the_mixture():
    rng = np.random.default_rng(0)
    sets = []
    for _ in range(40):
        X = rng.normal(size=(20, 2))
        f = np.linalg.cholesky(np.exp(-0.5 * ((X[:, None] - X[None]) ** 2).sum(-1)) + 0.1 * np.eye(20))
        scale = math.sqrt(1 / rng.gamma(2.0, 1 / 2.0))
        sets.append((X, scale * f @ rng.normal(size=20)))
    model = ScaleMixtureNNGP(depth=2).fit_tasks(sets)
    assert 1.0 < model.scale_prior_[1] < 5.0  # alpha, 2 in truth
    gp = ScaleMixtureNNGP(depth=2, scale_prior=("point", 1.0)).fit_tasks(sets)
    gain = sum(model.log_marginal(*pair) - gp.log_marginal(*pair) for pair in sets)
    assert gain > 20


def test_sampler_of_scales():
    X, y = data()
    sampler = lambda n, generator: torch.rand(n, generator=generator) + 0.1  # noqa: E731
    model = fixed(scale_prior=sampler, inference="importance").fit(X, y)
    assert model.diagnostics_["effective_sample_size"] > 10
    with pytest.raises(ArtefactError, match="scale_prior"):
        model.save_pretrained("unused")
    far = lambda n, generator: 1e6 * (1 + torch.rand(n, generator=generator))  # noqa: E731
    narrow = lambda n, generator: torch.logspace(-9, 9, n)  # noqa: E731
    assert fixed(scale_prior=far, inference="importance").fit(X, y).predict(X).shape == (25,)
    with pytest.raises(DataError, match="only"):
        fixed(scale_prior=narrow, inference="importance", draws=60).fit(X, y)


def test_laws_of_trained_ensembles():
    X, y = data(6)
    points, _ = data(3, seed=1)
    model = ScaleMixtureNNGP(depth=1, learn=False, bias_variance=0.3, weight_variance=1.5).fit(X, y)
    law = model.ensemble_law(points)
    gram = kernel_of(model, X)
    cross, own = kernel_of(model, points, X), kernel_of(model, points).diagonal()
    gain = torch.linalg.solve(gram, cross.mT)
    variance = own - (gain * cross.mT).sum(0)
    unit = float(model.target_scale_[0])
    torch.testing.assert_close(
        law.variance, unit**2 * 2.0 * variance, rtol=1e-4, atol=1e-6
    )  # E s2 = beta/(alpha-1)
    z = torch.as_tensor((y - model.target_shift_) / model.target_scale_)
    torch.testing.assert_close(law.mean, model.target_shift_[0] + unit * (gain.mT @ z))
    # Trained networks: readouts drawn, then solved for zero error, which is where gradient descent ends.
    draws = torch.Generator().manual_seed(0)
    x, p = model._inputs(X).float(), model._inputs(points).float()
    values = []
    for _ in range(1500):
        network = torch.nn.Sequential(torch.nn.Linear(3, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 1))
        scale_prior_init(network, weight_variance=1.5, bias_variance=0.3, generator=draws)
        with torch.no_grad():
            features, others = network[:2](x).double(), network[:2](p).double()
            readout = network[2].weight.double()[0]
            missing = torch.linalg.solve(features @ features.mT, z - features @ readout)
            readout = readout + features.mT @ missing  # the nearest readout without error
            values.append(others @ readout)
    values = model.target_shift_[0] + unit * torch.stack(values)
    np.testing.assert_allclose(values.mean(0), law.mean, atol=0.1 * float(law.stddev.max()))
    middle = (values - values.mean(0)).abs().median(0).values / law.icdf(torch.full((3,), 0.75, dtype=D)).sub(
        law.mean
    )
    assert bool(((middle - 1).abs() < 0.12).all())
    # All layers: for a point mass the NTK law with Theta = K + s2 T.
    fixed_scale = ScaleMixtureNNGP(depth=1, learn=False, scale_prior=("point", 0.5), bias_variance=0.3).fit(
        X, y
    )
    everything = fixed_scale.ensemble_law(points, "all")
    assert not torch.allclose(everything.mean, fixed_scale.ensemble_law(points).mean)
    at_data = fixed_scale.ensemble_law(X, "all")
    np.testing.assert_allclose(at_data.mean, y, rtol=1e-4)
    assert float(at_data.stddev.max()) < 0.01 * float(everything.stddev.max())


def test_fully_trained_networks_by_gradient_descent():
    X, y = data(5)
    points, _ = data(2, seed=1)
    model = ScaleMixtureNNGP(depth=1, learn=False, scale_prior=("point", 0.5), bias_variance=0.2).fit(X, y)
    law = model.ensemble_law(points, "all")
    x, p = model._inputs(X), model._inputs(points)
    z = torch.as_tensor((y - model.target_shift_) / model.target_scale_)
    width, nets = 1024, 200
    draws = torch.Generator().manual_seed(0)
    W, b, v = (torch.randn(nets, *shape, generator=draws, dtype=D).requires_grad_()
               for shape in ((3, width), (1, width), (width, 1)))  # fmt: skip

    def f(rows):
        hidden = (rows @ W * (2.0 / 3) ** 0.5 + 0.2**0.5 * b).relu()
        return (hidden @ v)[..., 0] * (0.5 / width) ** 0.5

    for _ in range(400):
        loss = 0.5 * (f(x) - z).square().sum()
        for weights, slope in zip((W, b, v), torch.autograd.grad(loss, (W, b, v)), strict=True):
            # The readout's factor makes its rate 0.5 of what the law has; the other layers have it as it is.
            weights.data -= 0.2 * slope / (0.5 if weights is v else 1.0)
    with torch.no_grad():
        assert float((f(x) - z).abs().max()) < 0.01
        values = model.target_shift_[0] + model.target_scale_[0] * f(p)
    error = values.std(0) / nets**0.5
    assert bool(((values.mean(0) - law.mean).abs() < 5 * error + 0.05 * law.stddev).all())
    np.testing.assert_allclose(values.std(0), law.stddev, rtol=0.25)


def test_saved_and_loaded_predicts_the_same(tmp_path):
    X, y = data()
    additive = {"noise": "additive", "inference": "quadrature", "learn": False}
    burr = {"inference": "importance", "scale_prior": ("burr", 2.0, 1.0)}
    for number, settings in enumerate([{}, additive, burr]):
        model = ScaleMixtureNNGP(depth=2, max_iter=10, **settings).fit(X, y)
        model.save_pretrained(tmp_path / str(number))
        again = ScaleMixtureNNGP.from_pretrained(tmp_path / str(number))
        for a, b in zip(model.predict(X, True), again.predict(X, True), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10)
        np.testing.assert_allclose(
            again.condition(X[:9], y[:9]).predict(X), model.condition(X[:9], y[:9]).predict(X)
        )


def test_kernel_is_that_of_gpytorchs_gp():
    X, y = data()
    model = ScaleMixtureNNGP(depth=2, scale_prior=("point", 1.0)).fit(X, y)
    assert isinstance(model.kernel_, NNGPKernel)
    strong = GPSurrogate().fit(X, y)
    assert np.corrcoef(model.predict(X), strong.predict(X))[0, 1] > 0.9


@pytest.mark.parametrize(("settings", "message"), [
    ({"scale_prior": ("inverse-gamma", 0.0, 1.0)}, "positive"),
    ({"scale_prior": "half-cauchy"}, "quadrature"),
    ({"noise": "outside"}, "inside"),
    ({"inference": "guess"}, "exact"),
    ({"noise": "additive", "inference": "importance"}, "inside"),
    ({"noise": "additive", "inference": "quadrature", "scale_prior": ("point", 1.0)}, "point"),
    ({"scale_prior": torch.rand}, "sampler"),
    ({"noise_variance": 0.0}, "noise_variance"),
    ({"kernel": "conv"}, "image_shape"),
    ({"kernel": "dense"}, "kernel"),
])  # fmt: skip
def test_bad_settings(settings, message):
    with pytest.raises(DataError, match=message):
        ScaleMixtureNNGP(**settings).fit(*data())


def test_bad_data():
    X, y = data()
    model = ScaleMixtureNNGP(depth=1, learn=False)
    with pytest.raises(DataError, match="empty"):
        model.fit_tasks([])
    with pytest.raises(DataError, match="data set 1"):
        model.fit_tasks([(X, y), (X[:, :2], y)])
    model.fit(X, y)
    with pytest.raises(DataError, match="columns"):
        model.condition(X, np.column_stack([y, y]))
    constant = ScaleMixtureNNGP(depth=1, max_iter=20).fit(X, np.full(len(X), 3.0))
    np.testing.assert_allclose(constant.predict(X), 3.0)
    heavy = ScaleMixtureNNGP(depth=1, learn=False, scale_prior=("inverse-gamma", 0.4, 1.0)).fit_tasks(
        [(X, y)]
    )
    mean, std = heavy.predict(X[:2], return_std=True)  # 0.8 degrees of freedom and no data: no moments
    assert np.isnan(mean).all()
    assert not np.isfinite(std).any()
    with pytest.raises(DataError, match="train"):
        model.ensemble_law(X, "some")
    with pytest.raises(DataError, match="no linear"):
        scale_prior_init(torch.nn.ReLU(), generator=torch.Generator())
