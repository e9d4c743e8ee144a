"""Who is compared: how each contender is built and trained on a budget, and which data it applies to."""

from __future__ import annotations

from typing import Any

from paperback.compare.bench import Contender
from paperback.density.baselines import (
    CategoricalMixture,
    CategoricalRBM,
    IndependentCategorical,
    MaskedNetwork,
)
from paperback.density.bench.data import OBSERVED, DensityData
from paperback.density.interface import DensityModel, TabularGenerator
from paperback.errors import DataError
from paperback.study.budget import Budget, for_budget
from paperback.training import seeded

VAE_SHAPE: dict[str, Any] = {"hidden": 256, "latent": 8}


def _independent(data: DensityData, budget: Budget, seed: int) -> DensityModel:
    return IndependentCategorical(len(data.n_states), data.n_states)


def _mixture(data: DensityData, budget: Budget, seed: int) -> DensityModel:
    candidates = for_budget(budget, smoke=(2, 5), standard=(10, 20, 40, 80, 160))
    return CategoricalMixture(len(data.n_states), data.n_states, candidates, data.n_classes)


def _rbm(data: DensityData, budget: Budget, seed: int) -> DensityModel:
    n_hidden, n_sweeps = (
        for_budget(budget, smoke=12, standard=200),
        for_budget(budget, smoke=20, quick=200, standard=500),
    )
    return CategoricalRBM(len(data.n_states), data.n_states, n_hidden, data.n_classes, n_sweeps=n_sweeps)


def _masked_network(data: DensityData, budget: Budget, seed: int) -> DensityModel:
    return MaskedNetwork(len(data.n_states), data.n_states, data.n_classes, obs_level=OBSERVED)


def _monotone_dbm(data: DensityData, budget: Budget, seed: int) -> DensityModel:
    from paperback.density.monotone_dbm import MonotoneDBM

    with seeded(seed, "monotone-dbm"):
        return MonotoneDBM.for_data(data.n_states, data.image_shape, data.n_classes)


def _probabilistic_circuit(data: DensityData, budget: Budget, seed: int) -> DensityModel:
    from paperback.density.probabilistic_circuit import ProbabilisticCircuit

    return ProbabilisticCircuit(len(data.n_states), data.n_states)


def _marginalization(data: DensityData, budget: Budget, seed: int) -> DensityModel:
    from paperback.density.marginalization import MarginalizationModel

    return MarginalizationModel(len(data.n_states), data.n_states, seed=seed)


def _constrained_tabular(data: DensityData, budget: Budget, seed: int) -> TabularGenerator:
    from paperback.density.constrained_tabular import ConstrainedTabular

    assert data.table is not None
    return ConstrainedTabular("vae", data.table.rules, "train", **VAE_SHAPE)


def _plain_vae(data: DensityData, budget: Budget, seed: int) -> TabularGenerator:
    from paperback.density.constrained_tabular import ConstrainedTabular

    return ConstrainedTabular("vae", None, "off", **VAE_SHAPE)


def _copula(data: DensityData, budget: Budget, seed: int) -> TabularGenerator:
    from paperback.density.baselines.gaussian_copula import GaussianCopula

    return GaussianCopula()


def _training_rows(data: DensityData, budget: Budget, seed: int) -> TabularGenerator:
    from paperback.density.baselines.training_rows import TrainingRows

    return TrainingRows()


def training(name: str, budget: Budget, rows: int) -> dict[str, Any]:
    """Settings of `fit` that a budget changes.

    Args:
        name: of the contender.
        budget: of the comparison.
        rows: of the training part.

    Returns:
        Keyword arguments.
    """
    if name == "rbm":
        return {"epochs": epochs_for(for_budget(budget, smoke=4, quick=500, standard=1200), rows, 100)}
    if name == "masked-network":
        return {"epochs": epochs_for(for_budget(budget, smoke=2, quick=300, standard=900), rows, 96)}
    if name == "probabilistic-circuit":
        return {"epochs": epochs_for(for_budget(budget, smoke=2, quick=200, standard=500), rows, 256)}
    if name == "monotone-dbm":
        return {"epochs": epochs_for(for_budget(budget, smoke=2, quick=150, standard=450), rows, 96)}
    if name == "marginalization":
        # Completion needs the first stage only; the second is for marginals in one call, and slower.
        conditionals = epochs_for(for_budget(budget, smoke=2, quick=900, standard=3000), rows, 128)
        marginals = epochs_for(for_budget(budget, smoke=2, quick=300, standard=1000), rows, 128)
        return {"stage_epochs": (conditionals, marginals), "lr": 2e-3}
    if name in ("constrained-tabular", "tabular-vae"):
        epochs = epochs_for(for_budget(budget, smoke=2, quick=2000, standard=4000), rows, 500)
        settings = {"epochs": epochs, "lr": 2e-3, "schedule": "cosine", "weight_decay": 0.0}
        # A table may have a few rows that break its rules; those the layer cannot learn from.
        return settings | ({"allow_violations": True} if name == "constrained-tabular" else {})
    return {}


def epochs_for(updates: int, rows: int, batch_size: int) -> int:
    """Epochs that come to about so many updates: the same work on every data set, but at least 5 epochs.

    The settings of the contenders were chosen on 1,257 rows, where 90 epochs of the RBM are 1,200 updates.
    """
    return max(updates // max(1, rows // batch_size), min(5, updates))


# -- which data ----------------------------------------------------------------------------------------------


def _always(data: DensityData) -> str | None:
    return None


def _several_variables(data: DensityData) -> str | None:
    return None if len(data.n_states) > 1 else "a tree needs at least two variables."


def _tables(data: DensityData) -> str | None:
    return None if data.table is not None else "it draws rows of a table, and these are images."


def _encodable_tables(data: DensityData) -> str | None:
    """Deep generators need a representation of every column; numbers have one unless all are missing."""
    from paperback.data.table_files import is_numeric
    from paperback.density.constrained_tabular import Encoding

    if data.table is None:
        return _tables(data)
    train = data.table.train
    empty = [name for name in train.columns if train[name].isna().all()]
    if empty:
        return f"column {empty[0]} is empty in all training rows; leave it out."
    others = [name for name in train.columns if not is_numeric(train[name])]
    if others:
        try:
            Encoding.fit(train[others])
        except DataError as error:
            return str(error)
    return None


def _tables_with_rules(data: DensityData) -> str | None:
    if (reason := _encodable_tables(data)) is not None:
        return reason
    assert data.table is not None
    rules = data.table.rules
    if rules is None:
        return (
            "the table has no rules to keep; write some into "
            f"{data.table.rules_name} beside it, one a line, such as: high >= low. "
            "Its plain base takes part as the VAE for tables."
        )
    if rules.complies(data.table.train).sum() < 2:
        return f"fewer than two training rows keep the rules of {data.table.rules_name}; check the rules."
    return None


# -- the list ------------------------------------------------------------------------------------------------

CONTENDERS = (
    Contender("monotone-dbm", "monotone DBM", "method", _always, _monotone_dbm),
    Contender(
        "probabilistic-circuit",
        "probabilistic circuit",
        "method",
        _several_variables,
        _probabilistic_circuit,
    ),
    Contender("marginalization", "marginalization model", "method", _always, _marginalization),
    Contender(
        "constrained-tabular", "constrained tabular VAE", "method", _tables_with_rules, _constrained_tabular
    ),
    Contender("independent", "independent variables", "baseline", _always, _independent),
    Contender("mixture", "mixture (EM)", "baseline", _always, _mixture),
    Contender("rbm", "RBM (PCD, Gibbs)", "baseline", _always, _rbm),
    Contender("masked-network", "network for random masks", "baseline", _always, _masked_network),
    Contender("tabular-vae", "VAE for tables", "baseline", _encodable_tables, _plain_vae),
    Contender("gaussian-copula", "Gaussian copula", "baseline", _tables, _copula),
    Contender("training-rows", "training rows themselves", "baseline", _tables, _training_rows),
)
