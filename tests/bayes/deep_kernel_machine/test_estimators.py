"""The estimators: scikit-learn's checks, units, saving, functions, kernels for others, and bad input."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from botorch.acquisition.logei import qLogExpectedImprovement
from botorch.optim import optimize_acqf
from sklearn.svm import SVC, SVR
from sklearn.utils.estimator_checks import parametrize_with_checks

import paperback
from paperback.bayes.deep_kernel_machine import DeepKernelMachine, DeepKernelMachineClassifier, GramNorm
from paperback.errors import DataError

QUICK = {"n_inducing": 8, "epochs": 60}


@parametrize_with_checks(
    [
        DeepKernelMachine(epochs=20),
        DeepKernelMachine(n_inducing=5, epochs=60),
        DeepKernelMachineClassifier(depth=1, n_inducing=5, epochs=60),
    ]
)
def test_scikit_learn_checks(estimator, check):
    check(estimator)


def data(rows=60, outputs=None, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.uniform(-2, 2, size=(rows, 2))
    y = 30 + 100 * np.sin(2 * X[:, 0]) + 10 * rng.normal(size=rows)
    return (X, y) if outputs is None else (X, np.column_stack([y, -0.1 * y + X[:, 1]]))


def labels(rows=90, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(rows, 2))
    names = np.array(["in", "mid", "out"])
    return X, names[np.digitize(np.linalg.norm(X, axis=1), [0.8, 1.6])]


@pytest.mark.parametrize("settings", [{}, {"dof": 1000.0, "n_inducing": 20, "epochs": 300}])
def test_learns_a_curve_with_its_noise(settings):
    X, y = data(200)
    model = DeepKernelMachine(**settings).fit(X, y)
    assert 5 < model.diagnostics_["noise_std"] * y.std() < 15
    X, y = data(200, seed=1)
    mean, std = model.predict(X, return_std=True)
    assert np.sqrt(np.mean((mean - y) ** 2)) < 16
    assert 0.85 < np.mean(np.abs(mean - y) < 2 * std) <= 1


def test_objective_is_in_the_units_of_the_targets():
    X, y = data()
    small, large = (DeepKernelMachine(epochs=10).fit(X, scale * y) for scale in (1.0, 1000.0))
    assert large.elbo_ == pytest.approx(small.elbo_ - math.log(1000), abs=1e-5)
    gp = DeepKernelMachine(depth=0, epochs=10).fit(X, y)
    assert gp.log_marginal_ / len(y) == pytest.approx(gp.elbo_)
    assert not hasattr(small, "log_marginal_")  # learned Gram matrices: the objective is another one
    assert not hasattr(gp.set_params(depth=2).fit(X, y), "log_marginal_")


def test_infinite_degrees_of_freedom_are_the_wide_network():
    X, y = data()
    wide = DeepKernelMachine(dof=math.inf, epochs=20).fit(X, y)
    assert wide.diagnostics_["kl_layer_1"] == wide.diagnostics_["kl_layer_2"] == 0
    x = torch.as_tensor((X - X.mean(0)) / X.std(0)) * wide.machine_.inputs.log_scale.detach().exp()
    kernel = x @ x.T / 2
    for part in wide.machine_.layers:
        kernel = part.matrix(kernel) if hasattr(part, "matrix") else kernel
    np.testing.assert_allclose(wide.effective_kernel(X), kernel.detach(), atol=1e-8)


@pytest.mark.parametrize("settings", [{"epochs": 20}, QUICK | {"gram_norm": "inducing", "dof": [5.0, 20.0]}])
@pytest.mark.parametrize("outputs", [None, 2])
def test_functions_have_the_moments_of_the_law(settings, outputs):
    X, y = data(outputs=outputs)
    model = DeepKernelMachine(**settings).fit(X, y)
    points = torch.rand(6, 2, dtype=torch.float64, requires_grad=True)
    draws = model.sample_functions(points, 4000)
    law = model.predict_distribution(points.detach())
    noise = model.diagnostics_["noise_std"] * y.std(0)
    std = (law.variance - torch.as_tensor(noise**2)).clamp_min(0).sqrt()
    assert torch.allclose(draws.mean(0), law.mean, rtol=0, atol=float(4 * std.max() / 60))
    assert torch.allclose(draws.std(0), std, rtol=0.1, atol=1e-2 * float(std.max()))
    (slope,) = torch.autograd.grad(draws.mean(0).sum(), points)
    assert slope.isfinite().all()
    assert slope.abs().min() > 0


def test_maximises_expected_improvement_in_botorch():
    X, y = data()
    model = DeepKernelMachine(epochs=30).fit(X, y).to_botorch()
    acquisition = qLogExpectedImprovement(model, best_f=float(y.max()))
    bounds = torch.tensor([[-2.0, -2.0], [2.0, 2.0]], dtype=torch.float64)
    torch.manual_seed(0)
    points, value = optimize_acqf(acquisition, bounds, q=2, num_restarts=2, raw_samples=16)
    assert points.shape == (2, 2)
    assert value.isfinite()


@pytest.mark.parametrize(
    "model",
    [
        DeepKernelMachine(epochs=10, kernel=["sqexp", "arccos", "sqexp+linear"], dof=math.inf),
        DeepKernelMachine(**QUICK, gram_norm="batch", stochastic_gram=16, divergence="quadratic"),
        DeepKernelMachineClassifier(**QUICK),
        DeepKernelMachineClassifier(epochs=5),
    ],
)
def test_saved_and_loaded_it_is_the_same(model, tmp_path):
    is_classifier = isinstance(model, DeepKernelMachineClassifier)
    X, y = labels() if is_classifier else data(outputs=2)
    model.fit(X, y).save_pretrained(tmp_path / "model")
    loaded = paperback.load(tmp_path / "model")
    assert type(loaded) is type(model)
    np.testing.assert_array_equal(loaded.predict(X), model.predict(X))
    np.testing.assert_array_equal(loaded.gram_(1), model.gram_(1))
    assert loaded.elbo_ == model.elbo_


def test_same_seed_same_fit_and_other_seed_other_fit():
    X, y = data()
    first, second, third = (
        DeepKernelMachine(**QUICK, random_state=s).fit(X, y).predict(X) for s in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, second)
    assert np.abs(first - third).max() > 0


def test_classifier_is_calibrated_and_its_functions_agree():
    X, y = labels(300)
    model = DeepKernelMachineClassifier(n_inducing=25, epochs=150, dof=30.0).fit(X, y)
    X, y = labels(300, seed=1)
    probabilities = model.predict_proba(X)
    assert np.mean(model.predict(X) == y) > 0.85
    chosen = probabilities[np.arange(300), np.searchsorted(model.classes_, y)]
    assert -np.log(chosen).mean() < 0.4  # the frequencies alone: 1.05
    logits = model.sample_functions(X[:5], 4000)
    np.testing.assert_allclose(logits.detach().softmax(-1).mean(0), probabilities[:5], atol=0.03)


def test_kernel_for_other_methods():
    X, y = data(100)
    model = DeepKernelMachine(n_inducing=20, epochs=200, dof=100.0).fit(X, y)
    np.testing.assert_allclose(model.effective_kernel(X[:9]), model.effective_kernel(X[:9], X[:9]), atol=1e-6)
    svr = SVR(kernel="precomputed", C=1e4).fit(model.effective_kernel(X), y)
    new, truth = data(100, seed=1)
    error = svr.predict(model.effective_kernel(new, X)) - truth
    assert np.sqrt(np.mean(error**2)) < 25
    X, y = labels()
    model = DeepKernelMachineClassifier(**QUICK).fit(X, y)
    svc = SVC(kernel="precomputed").fit(model.effective_kernel(X), y)
    assert svc.score(model.effective_kernel(X), y) > 0.8


def test_gram_matrices():
    X, y = data(30)
    model = DeepKernelMachine(epochs=30, dof=20.0, jitter=1e-8).fit(X, y)
    assert model.gram_(1).shape == (30, 30)
    np.testing.assert_allclose(model.gram_(2, X), model.gram_(2), atol=1e-4)
    with pytest.raises(DataError, match="layer is 3"):
        model.gram_(3)


def test_deep_machines_are_trained_with_normalisation():
    X, y = data(100)
    model = DeepKernelMachine(depth=5, n_inducing=15, kernel="arccos", gram_norm="batch", epochs=150)
    model.fit(X, y)
    assert sum(isinstance(part, GramNorm) for part in model.machine_.layers) == 5
    linear = DeepKernelMachine(depth=0, kernel="linear", n_inducing=15, epochs=100).fit(X, y)
    assert model.elbo_ > linear.elbo_
    one_by_one = np.concatenate([model.predict(row[None]) for row in X[:5]])
    np.testing.assert_allclose(one_by_one, model.predict(X)[:5])


def test_tables_keep_their_column_names():
    X, y = data()
    table = pd.DataFrame(X, columns=["a", "b"])
    model = DeepKernelMachine(epochs=5).fit(table, y)
    with pytest.raises(ValueError, match="feature names"):
        model.predict(table.rename(columns={"a": "c"}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_inducing": 61}, "n_inducing is 61 and n_samples=60"),
        ({"n_inducing": 0}, "n_inducing is 0"),
        ({"depth": -1}, "depth is -1"),
        ({"dof": 0.0}, "dof is 0"),
        ({"dof": [1.0, 2.0, 3.0]}, "dof has 3 entries; give one for all, or 2"),
        ({"kernel": ["sqexp", "periodic", "sqexp"]}, "'periodic' is not known as a function of a Gram"),
        ({"kernel": ["sqexp"]}, "kernel has 1 entries"),
        ({"gram_norm": "layer"}, "gram_norm is 'layer'"),
        ({"gram_norm": "batch"}, "need the mini-batches"),
        ({"stochastic_gram": 4}, "need the mini-batches"),
        ({"stochastic_gram": 0, "n_inducing": 5}, "stochastic_gram is 0"),
        ({"divergence": "reverse"}, "divergence is 'reverse'"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(DataError, match=message):
        DeepKernelMachine(**settings).fit(*data())


def test_bad_data_is_named():
    with pytest.raises(DataError, match="3001 rows, the full machine takes 3000; set n_inducing"):
        DeepKernelMachine().fit(np.zeros((3001, 1)), np.zeros(3001))
    X, y = data()
    X[3, 1] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        DeepKernelMachine().fit(X, y)
    X, _ = labels()
    with pytest.raises(DataError, match="more than one class"):
        DeepKernelMachineClassifier().fit(X, ["in"] * len(X))


def test_rows_that_are_all_equal_are_borne():
    X, y = np.ones((20, 2)), np.linspace(0, 1, 20)
    for settings in ({"epochs": 10}, QUICK):
        mean = DeepKernelMachine(**settings).fit(X, y).predict(X)
        np.testing.assert_allclose(mean, 0.5, atol=1e-3)
