"""The classifier: its divergence, its limits, learning, shared scales, saving, bad input."""

import numpy as np
import pytest
import torch
from sklearn.datasets import make_moons
from sklearn.utils.estimator_checks import parametrize_with_checks

from paperback.bayes.scale_mixture_nngp import ScaleMixtureClassifier
from paperback.bayes.scale_mixture_nngp.classification import StudentTProcess, balanced_rows
from paperback.errors import DataError

D = torch.float64
SMALL = {"n_inducing": 24, "depth": 3, "epochs": 60, "batch_size": 64}


@parametrize_with_checks([ScaleMixtureClassifier(n_inducing=8, depth=1, epochs=15, draws=5, lr=0.05)])
def test_scikit_learn_checks(estimator, check):
    check(estimator)


def moons(rows=160, seed=0):
    X, y = make_moons(rows, noise=0.15, random_state=seed)
    return X, np.array(["low", "high"])[y]


def process(alpha=2.0, beta=3.0, triangular=True, seed=0):
    made = StudentTProcess(4, 2, 3, "relu", 1, (2.0, 0.1), None, alpha, beta, triangular)
    generator = torch.Generator().manual_seed(seed)
    for parameter in (made.inducing, made.mean, made.log_diagonal, made.below, made.log_posterior):
        parameter.data += 0.4 * torch.randn(parameter.shape, generator=generator, dtype=D)
    return made


def test_divergence_is_zero_at_the_prior():
    made = StudentTProcess(4, 2, 3, "relu", 1, (2.0, 0.1), None, 2.0, 3.0, False)
    assert float(made.divergence()) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("fixed", [False, True])
def test_divergence_is_that_of_draws(fixed):
    made = process(*((None, None) if fixed else (2.0, 3.0)))
    if fixed:
        made.log_posterior.data.zero_()
    torch.manual_seed(0)
    n = 100_000
    with torch.no_grad():
        s2 = made.scales(n, torch.Generator().manual_seed(0))
        factors = made.factors()
        noise = torch.randn(n, 3, 4, dtype=D)
        v = made.mean + s2.sqrt()[:, None, None] * torch.einsum("cij,ncj->nci", factors, noise)
        log_q, log_p = torch.zeros(n, dtype=D), torch.zeros(n, dtype=D)
        for c in range(3):
            tril = s2.sqrt()[:, None, None] * factors[c]
            log_q += torch.distributions.MultivariateNormal(made.mean[c], scale_tril=tril).log_prob(v[:, c])
            log_p += torch.distributions.Normal(0.0, s2.sqrt()[:, None]).log_prob(v[:, c]).sum(1)
        if not fixed:
            a, b = made.log_posterior.exp()
            log_q += torch.distributions.InverseGamma(a, b).log_prob(s2)
            log_p += torch.distributions.InverseGamma(
                torch.tensor(2.0, dtype=D), torch.tensor(3.0, dtype=D)
            ).log_prob(s2)
        terms = log_q - log_p
    error = float(terms.std()) / n**0.5
    assert abs(float(terms.mean()) - float(made.divergence())) < 4 * error


def test_moments_are_those_of_the_formula():
    made = process()
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(1), dtype=D)
    with torch.no_grad():
        mean, variance = made.moments(x)
        gram, cross = made.kernel.forward(made.inducing, made.inducing), made.kernel.forward(x, made.inducing)
        lower = torch.linalg.cholesky(gram)
        A = cross @ torch.linalg.inv(gram)
        for c in range(3):
            m = lower @ made.mean[c]
            S = lower @ made.factors()[c] @ made.factors()[c].mT @ lower.mT
            own = made.kernel.forward(x, x).diagonal()
            expected = (A @ S @ A.mT).diagonal() + own - (A @ cross.mT).diagonal()
            torch.testing.assert_close(mean[:, c], A @ m, rtol=1e-4, atol=1e-5)  # K_ZZ has its jitter there
            torch.testing.assert_close(variance[:, c], expected, rtol=1e-4, atol=1e-5)


def test_gradients_reach_everything_that_is_learned():
    made = process()
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(6, 2, generator=draws, dtype=D)
    (made.logits(x, 5, draws).square().mean() + made.divergence()).backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name


def test_one_scale_serves_all_classes_and_rows_of_a_draw():
    made = process(alpha=0.7, beta=1.0)
    made.mean.data.zero_()
    x = torch.randn(40, 2, generator=torch.Generator().manual_seed(1), dtype=D)
    with torch.no_grad():
        logits = made.logits(x, 4000, torch.Generator().manual_seed(0))
        roots = made.moments(x)[1].sqrt()
    size = (logits / roots).square().mean((1, 2)).log()  # a mean of 120 numbers: the scale, if it is shared
    assert float(size.std()) > 0.5


@pytest.mark.parametrize("prior", [("inverse-gamma", 2.0, 2.0), ("point", 1.0)])
@pytest.mark.parametrize("covariance", ["diagonal", "triangular"])
def test_it_learns_two_moons(prior, covariance):
    X, y = moons()
    model = ScaleMixtureClassifier(**SMALL, scale_prior=prior, covariance=covariance, lr=0.05).fit(X, y)
    X_test, y_test = moons(seed=1)
    assert model.score(X_test, y_test) > 0.9
    assert ("scale_a" in model.diagnostics_) == (prior[0] == "inverse-gamma")
    draws = model.sample_functions(X_test[:7], 400)
    assert draws.shape == (400, 7, 2)
    together = draws.softmax(-1).mean(0).numpy()
    np.testing.assert_allclose(together, model.predict_proba(X_test[:7]), atol=0.1)


def test_saved_and_loaded_predicts_the_same(tmp_path):
    X, y = moons()
    model = ScaleMixtureClassifier(**SMALL | {"epochs": 3}).fit(X, y)
    model.save_pretrained(tmp_path / "model")
    again = ScaleMixtureClassifier.from_pretrained(tmp_path / "model")
    np.testing.assert_array_equal(again.predict_proba(X), model.predict_proba(X))
    assert list(again.classes_) == ["high", "low"]


def test_convolutional_kernel_on_images():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 60)
    X = rng.normal(size=(60, 5, 5)) + 2.0 * y[:, None, None] * np.eye(5)
    model = ScaleMixtureClassifier("conv", 10, 1, image_shape=(5, 5), epochs=15, lr=0.05).fit(
        X.reshape(60, -1), y
    )
    assert model.score(X.reshape(60, -1), y) > 0.9


def test_inducing_rows_come_from_the_classes_in_turn():
    labels = torch.tensor([0] * 50 + [1] * 3 + [2] * 10)
    rows = balanced_rows(labels, 9, torch.Generator().manual_seed(0))
    assert sorted(labels[rows].tolist()) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert len(balanced_rows(labels, 100, torch.Generator())) == 63


@pytest.mark.parametrize(("settings", "message"), [
    ({"scale_prior": "half-cauchy"}, "inverse gamma"),
    ({"scale_prior": ("point", 2.0)}, "inverse gamma"),
    ({"n_inducing": 0}, "n_inducing"),
    ({"draws": 0}, "draws"),
    ({"covariance": "full"}, "covariance"),
    ({"kernel": "conv"}, "image_shape"),
])  # fmt: skip
def test_bad_settings(settings, message):
    with pytest.raises(DataError, match=message):
        ScaleMixtureClassifier(**{"epochs": 1} | settings).fit(*moons(30))
