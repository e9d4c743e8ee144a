import pytest
import torch

from paperback.density import (
    Capabilities,
    CategoricalMixture,
    CategoricalRBM,
    DensityModel,
    IndependentCategorical,
    Interval,
)
from paperback.density.interface import Classifying
from paperback.errors import DataError, NotSupportedError
from paperback.testing import DENSITY_CHECKS, DensityCase, check_density_model

N_STATES = (3, 2, 4, 2)


def tiny_data(n=60):
    """Four variables that depend on a class and on each other."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, 3, (n,), generator=generator)
    noise = torch.randint(0, 2, (n, 4), generator=generator)
    X = torch.stack([y, noise[:, 0], y + noise[:, 0], noise[:, 0] ^ (noise[:, 1] & noise[:, 2])], 1)
    return X, y


X, Y = tiny_data()
CASES = {
    "independent": DensityCase(lambda seed: IndependentCategorical(4, N_STATES), X),
    "mixture": DensityCase(
        lambda seed: CategoricalMixture(4, N_STATES, (2, 5)), X, fit={"max_iterations": 30}
    ),
    "mixture with classes": DensityCase(lambda seed: CategoricalMixture(4, N_STATES, 4, n_classes=3), X, Y),
    "rbm, mean field": DensityCase(
        lambda seed: CategoricalRBM(4, N_STATES, 6, n_classes=3, inference="meanfield"),
        X,
        Y,
        fit={"epochs": 3, "batch_size": 20},
        tolerance=2e-4,  # rows stop one by one, at a tolerance of their own
    ),
    "rbm, Gibbs": DensityCase(
        lambda seed: CategoricalRBM(4, N_STATES, 6, n_sweeps=300),
        X,
        fit={"epochs": 3, "batch_size": 20},
        tolerance=0.1,  # of the sampling
    ),
}


@pytest.mark.parametrize("check", DENSITY_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_baselines_keep_to_the_interface(case, check):
    check(case)


class Copycat(IndependentCategorical):
    """Breaks one rule at a time."""

    def __init__(self, n_variables, n_states, fault=""):
        super().__init__(n_variables, n_states)
        self.fault = fault

    def fit(self, X, y=None, X_val=None, y_val=None, *, seed=0, progress=True, **training):
        if self.fault == "prints":
            print("epoch 1")
        if self.fault == "writes to X":
            X[:1] = 0
        if self.fault == "global random state":
            torch.rand(1)
        return super().fit(X, y)

    def _conditional(self, states, observed):
        p = super()._conditional(states, observed)
        return p * 1.01 if self.fault == "does not sum to one" else p

    def _log_prob(self, states, observed):
        log_prob = super()._log_prob(states, observed)
        if self.fault == "not normalised":
            return log_prob + 0.1
        if self.fault == "wrong marginal" and observed is not None:
            return log_prob - 0.5 * (~observed).sum(1)
        return log_prob + (log_prob.mean() if self.fault == "rows depend on each other" else 0.0)

    def _sample_conditional(self, states, observed, generator):
        drawn = super()._sample_conditional(states, observed, generator)
        return drawn * 0 if self.fault == "samples one state" else drawn


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("prints", "progress_can_be_silenced"),
        ("writes to X", "input_is_unchanged"),
        ("global random state", "same_seed_same_result: fit draws"),
        ("does not sum to one", "conditionals_are_distributions"),
        ("not normalised", "capabilities_are_truthful: the probabilities"),
        ("wrong marginal", "capabilities_are_truthful: enumeration: marginal"),
        ("rows depend on each other", "batch_equals_loop"),
        ("samples one state", "same_seed_same_result: samples"),
    ],
)
def test_the_checks_find_a_fault(fault, message):
    with pytest.raises(AssertionError, match=message):
        check_density_model(lambda seed: Copycat(4, N_STATES, fault=fault), X)


def test_the_checks_pass_without_a_fault():
    check_density_model(lambda seed: Copycat(4, N_STATES), X)


@pytest.mark.parametrize(
    ("n_variables", "n_states", "message"),
    [
        (0, 2, "n_variables is 0"),
        (3, (2, 2), "lists 2 variables"),
        (2, (2, 1), "variable 1 has 1 state"),
        (2, 1, "at least 2"),
    ],
)
def test_impossible_sizes_are_refused(n_variables, n_states, message):
    with pytest.raises(DataError, match=message):
        IndependentCategorical(n_variables, n_states)


class Bounded(DensityModel):
    """A model that has bounds and nothing else."""

    capabilities = Capabilities(log_prob="bound")

    def fit(self, X, y=None, X_val=None, y_val=None, *, seed=0, progress=True, **training):
        return self

    def _conditional(self, states, observed):
        raise NotSupportedError("no conditional here; CategoricalMixture has one.")

    def _log_prob(self, states, observed):
        value = torch.zeros(len(states))
        return Interval(value - 2.0, value - 1.0)


def test_bits_per_dim_of_bounds_are_bounds():
    bits = Bounded(4, 2).bits_per_dim(torch.zeros(3, 4, dtype=torch.int64))
    ln2 = 0.6931472
    assert bits.lower == pytest.approx(1 / (4 * ln2))
    assert bits.upper == pytest.approx(2 / (4 * ln2))
    assert float(bits.width) == pytest.approx(1 / (4 * ln2))


def test_what_a_model_cannot_do_names_one_that_can():
    with pytest.raises(NotSupportedError, match="CategoricalMixture"):
        Bounded(4, 2).sample(1)


def test_bits_per_dim_of_fair_coins_is_one():
    assert IndependentCategorical(5, 2).bits_per_dim(torch.zeros(2, 5, dtype=torch.int64)) == pytest.approx(
        1.0
    )


def test_labels_are_required_where_there_is_a_class_variable():
    with pytest.raises(DataError, match="needs the labels"):
        CategoricalMixture(4, N_STATES, 2, n_classes=3).fit(X, progress=False)
    with pytest.raises(NotSupportedError, match="no classes"):
        CategoricalMixture(4, N_STATES, 2).predict(X)


def test_predict_takes_complete_rows_without_a_mask():
    model = CASES["mixture with classes"].model
    assert isinstance(model, Classifying)
    assert torch.equal(model.predict(X), model.predict(X, torch.ones_like(X, dtype=torch.bool)))
