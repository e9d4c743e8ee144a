"""The ground of the wing, on the simplest Bayesian regressor: linear, with a known posterior."""

import numpy as np
import pandas as pd
import pytest
import torch
from botorch.acquisition.logei import qLogExpectedImprovement
from botorch.acquisition.multi_objective.logei import qLogNoisyExpectedHypervolumeImprovement
from botorch.optim import optimize_acqf
from botorch.sampling import SobolQMCNormalSampler
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch.distributions import Categorical, MultivariateNormal, Normal

from paperback.bayes.distributions import FunctionDraws, MultivariateStudentT, StudentTWithQuantiles
from paperback.bayes.interface import BayesianClassifier, BayesianRegressor
from paperback.errors import DataError, NotSupportedError


class Linear(BayesianRegressor):
    """Weights N(0, 1), noise variance given: the posterior is in closed form."""

    def __init__(self, noise=0.1, random_state=0):
        self.noise = noise
        self.random_state = random_state

    def _fit(self, x, y):
        z = self._features(x)
        precision = z.mT @ z / self.noise + torch.eye(z.shape[1], dtype=z.dtype)
        self.covariance_ = torch.linalg.inv(precision)
        self.weights_ = self.covariance_ @ z.mT @ y / self.noise
        prior = z @ z.mT + self.noise * torch.eye(len(z), dtype=z.dtype)
        law = MultivariateNormal(torch.zeros(len(z), dtype=z.dtype), prior)
        self.log_marginal_ = float(law.log_prob(y.mT).sum())

    def _features(self, x):
        return torch.cat([x, torch.ones_like(x[..., :1])], -1)

    def _law(self, x):
        z = self._features(x)
        variance = (z @ self.covariance_ * z).sum(-1, keepdim=True) + self.noise
        return Normal(z @ self.weights_, variance.sqrt().expand(*z.shape[:-1], self.n_outputs_))

    def _joint(self, x):
        z = self._features(x)
        covariance = z @ self.covariance_ @ z.mT
        covariance = covariance + 1e-9 * torch.eye(z.shape[-2], dtype=z.dtype)
        return MultivariateNormal((z @ self.weights_).mT, covariance[..., None, :, :])


class LinearDraws(Linear):
    """The same posterior, known by draws of the weights only."""

    def _fit(self, x, y):
        super()._fit(x, y)
        generator = torch.Generator().manual_seed(self.random_state)
        tril = torch.linalg.cholesky(self.covariance_)
        shape = (400, len(tril), y.shape[1])
        self.draws_ = self.weights_ + tril @ torch.randn(shape, generator=generator, dtype=y.dtype)

    def _joint(self, x):
        z = self._features(x)
        return FunctionDraws(torch.stack([z @ weights for weights in self.draws_]).movedim(-1, -2))


class LinearT(Linear):
    """The same location and scale with the tails of a Student-t law."""

    def _law(self, x):
        law = super()._law(x)
        return StudentTWithQuantiles(5.0, law.mean, law.stddev)

    def _joint(self, x):
        law = super()._joint(x)
        return MultivariateStudentT(5.0, law.loc, law.scale_tril)


class LinearPoints(Linear):
    """Point laws only."""

    _joint = BayesianRegressor._joint


class Nearest(BayesianClassifier):
    """Class probabilities from distances to the classes' means."""

    def _fit(self, x, labels):
        self.means_ = torch.stack([x[labels == c].mean(0) for c in range(len(self.classes_))])

    def _probabilities(self, x):
        return (-torch.cdist(x, self.means_)).softmax(-1)


ALL = [Linear, LinearDraws, LinearT, LinearPoints]


@parametrize_with_checks([Linear(), LinearDraws(), Nearest()])
def test_scikit_learn_checks(estimator, check):
    check(estimator)


def data(rows=40, outputs=None, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.uniform(size=(rows, 2))
    y = 50 + 200 * (X[:, 0] - 2 * X[:, 1]) + rng.normal(size=rows)
    return (X, y) if outputs is None else (X, np.column_stack([y, -0.01 * y + X[:, 0]]))


def test_units_of_the_targets_do_not_matter():
    X, y = data()
    mean, std = Linear().fit(X, y).predict(X, return_std=True)
    mean2, std2 = Linear().fit(X * 7 - 3, 1e4 * y + 5).predict(X * 7 - 3, return_std=True)
    np.testing.assert_allclose(mean2, 1e4 * mean + 5)
    np.testing.assert_allclose(std2, 1e4 * std)


def test_numpy_pandas_and_torch_give_the_same():
    X, y = data()
    expected = Linear().fit(X, y).predict(X)
    table = pd.DataFrame(X, columns=["a", "b"])
    np.testing.assert_allclose(Linear().fit(table, pd.Series(y)).predict(table), expected)
    tensors = torch.as_tensor(X), torch.as_tensor(y)
    np.testing.assert_allclose(Linear().fit(*tensors).predict(tensors[0]), expected)


def test_arrays_with_negative_strides():
    X, y = data()
    model = Linear().fit(X[::-1], y[::-1])
    np.testing.assert_allclose(model.predict(X[::-1]), Linear().fit(X, y).predict(X)[::-1])


def test_log_marginal_is_in_the_units_of_the_targets():
    X, y = data()
    small, large = Linear().fit(X, y), Linear().fit(X, 1000 * y)
    assert large.log_marginal_ == pytest.approx(small.log_marginal_ - len(y) * np.log(1000))


def test_distribution_has_the_moments_of_predict_and_counts_all_outputs():
    for outputs in (None, 2):
        X, y = data(outputs=outputs)
        model = Linear().fit(X, y)
        law = model.predict_distribution(X)
        mean, std = model.predict(X, return_std=True)
        assert law.batch_shape == y.shape
        np.testing.assert_allclose(law.mean, mean)
        np.testing.assert_allclose(law.stddev, std)
        assert isinstance(law, Normal)


@pytest.mark.parametrize("cls", [Linear, LinearDraws, LinearT])
def test_sampled_functions_have_the_right_moments_and_gradients(cls):
    X, y = data(outputs=2)
    model = cls().fit(X, y)
    points = torch.rand(5, 2, dtype=torch.float64, requires_grad=True)
    draws = model.sample_functions(points, 4000)
    assert draws.shape == (4000, 5, 2)
    law = Linear().fit(X, y).predict_distribution(points.detach().numpy())
    assert torch.allclose(draws.mean(0), law.mean, atol=float(4 * law.stddev.max() / 60))
    (slope,) = torch.autograd.grad(draws[0, 0, 0], points)
    assert slope[0].abs().min() > 0
    assert slope[1:].abs().max() < 1e-3 * slope[0].abs().max() or cls is not LinearDraws
    torch.testing.assert_close(draws, model.sample_functions(points, 4000))
    assert not torch.equal(draws, model.sample_functions(points, 4000, seed=1))


def test_point_laws_refuse_functions_and_still_make_a_botorch_model():
    X, y = data()
    model = LinearPoints().fit(X, y)
    with pytest.raises(NotSupportedError, match="law of each point"):
        model.sample_functions(X)
    with pytest.raises(DataError, match="at least one"):
        Linear().fit(X, y).sample_functions(X, 0)
    posterior = model.to_botorch().posterior(torch.as_tensor(X[:3]))
    assert posterior.rsample(torch.Size([7])).shape == (7, 3, 1)


@pytest.mark.parametrize("cls", ALL)
def test_botorch_posterior_has_the_shapes_and_moments_of_the_law(cls):
    X, y = data(outputs=2)
    model = cls().fit(X, y).to_botorch()
    points = torch.rand(3, 4, 2, dtype=torch.float64)
    posterior = model.posterior(points)
    assert posterior.mean.shape == posterior.variance.shape == (3, 4, 2)
    samples = SobolQMCNormalSampler(torch.Size([2048]), seed=0)(posterior)
    assert samples.shape == (2048, 3, 4, 2)
    assert torch.allclose(
        samples.mean(0), posterior.mean, rtol=0, atol=float(0.1 * posterior.variance.max().sqrt())
    )
    ratio = samples.var(0) / posterior.variance
    assert float((ratio - 1).abs().max()) < (0.35 if cls is LinearT else 0.1)  # heavy tails settle slowly
    second = model.posterior(points, output_indices=[1])
    torch.testing.assert_close(second.mean[..., 0], posterior.mean[..., 1])
    torch.testing.assert_close(model.subset_output([1]).posterior(points).mean, second.mean)


@pytest.mark.parametrize("cls", ALL)
def test_expected_improvement_is_maximised(cls):
    X, y = data()
    model = cls().fit(X, y).to_botorch()
    acquisition = qLogExpectedImprovement(model, best_f=float(y.max()))
    bounds = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    torch.manual_seed(0)
    points, value = optimize_acqf(acquisition, bounds, q=2, num_restarts=2, raw_samples=16)
    assert points.shape == (2, 2)
    assert torch.isfinite(value)
    assert points[:, 0].max() > 0.95  # the plane rises to the corner (1, 0)
    assert points[:, 1].min() < 0.05


@pytest.mark.parametrize("cls", ALL)
def test_hypervolume_improvement_of_two_outputs(cls):
    X, y = data(15, outputs=2)
    model = cls().fit(X, y).to_botorch()
    acquisition = qLogNoisyExpectedHypervolumeImprovement(
        model, ref_point=[float(v) for v in y.min(0)], X_baseline=torch.as_tensor(X), prune_baseline=True,
        sampler=SobolQMCNormalSampler(torch.Size([32]), seed=0),
    )  # fmt: skip
    bounds = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    torch.manual_seed(0)
    points, value = optimize_acqf(acquisition, bounds, q=2, num_restarts=1, raw_samples=8, sequential=True)
    assert points.shape == (2, 2)
    assert torch.isfinite(value).all()


def test_one_draw_is_one_function_in_every_acquisition():
    X, y = data()
    model = LinearDraws().fit(X, y).to_botorch()
    points = torch.rand(6, 2, dtype=torch.float64)
    sampler = SobolQMCNormalSampler(torch.Size([50]), seed=0)
    together = sampler(model.posterior(points))
    apart = SobolQMCNormalSampler(torch.Size([50]), seed=0)(model.posterior(points[:, None]))
    torch.testing.assert_close(apart[:, :, 0], together)


def test_noise_is_refused_rather_than_left_out():
    X, y = data()
    with pytest.raises(NotSupportedError, match="noise-free"):
        Linear().fit(X, y).to_botorch().posterior(torch.as_tensor(X), observation_noise=True)


def test_classifier_says_what_it_has():
    X, y = data()
    labels = np.where(y > 0, "warm", "cold")
    model = Nearest().fit(X, labels)
    assert set(model.predict(X)) == {"cold", "warm"}
    np.testing.assert_allclose(model.predict_proba(X).sum(1), 1)
    law = model.predict_distribution(X)
    assert isinstance(law, Categorical)
    np.testing.assert_allclose(law.probs.numpy(), model.predict_proba(X))
    with pytest.raises(NotSupportedError, match="predict_proba"):
        model.sample_functions(X)
    with pytest.raises(DataError, match="more than one class"):
        Nearest().fit(X, np.full(len(X), "one"))


def test_saved_and_loaded_predicts_the_same(tmp_path):
    X, y = data(outputs=2)
    model = LinearDraws(noise=0.2).fit(pd.DataFrame(X, columns=["a", "b"]), y)
    model.save_pretrained(tmp_path / "model")
    again = LinearDraws.from_pretrained(tmp_path / "model")
    table = pd.DataFrame(X, columns=["a", "b"])
    np.testing.assert_array_equal(again.predict(table), model.predict(table))
    torch.testing.assert_close(again.sample_functions(table, 3), model.sample_functions(table, 3))
    assert again.noise == 0.2
    assert list(again.feature_names_in_) == ["a", "b"]
