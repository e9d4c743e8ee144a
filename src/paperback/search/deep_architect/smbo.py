"""Sequential model-based optimisation: a ridge regression of the score decides (paper section 5.3).

Each step draws a pool of random models, predicts their scores, and tries the best predicted; with a small
probability it tries a random one of the pool instead. The surrogate is `RidgeSurrogate` on the features of
`paperback.search.deep_architect.features`.

The paper's code has a penalty of 1000, which nearly ignores scores of about 1; the default here is 1. It may
also try one model twice, which costs an evaluation and teaches nothing; here it does so only when a draw
finds nothing else.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from paperback.errors import DataError
from paperback.search.deep_architect.features import FEATURE_MAPS, FeatureMap, choice_features
from paperback.search.deep_architect.mcts import MCTS
from paperback.search.deep_architect.searchers import Key, SpaceSearcher, key_of, untried
from paperback.search.deep_architect.space import Space
from paperback.search.deep_architect.surrogate import Features, RidgeSurrogate
from paperback.search.interface import Proposal
from paperback.search.parameters import Config
from paperback.training import derive

LEAST = 3  # models with an n-gram before it becomes a feature
MOST_REMEMBERED = 10_000  # models whose n-grams are kept
FEWEST = 2  # scores that a surrogate is fitted to


class SMBO(SpaceSearcher):
    """Sequential model-based optimisation with a ridge surrogate.

    A trial that failed or is invalid counts as the worst score told until then. Trials that are pending are
    not proposed again.

    Args:
        space: what is searched.
        features: "choices" (default, found better in the study) or the paper's "ngram".
        pool: models drawn for each proposal.
        explore: probability of a random model of the pool instead of the best, in [0, 1].
        ridge: penalty of the surrogate.
        initial: trials that are random.
        refit_interval: trials between two fits of the surrogate.
        acquisition: "pool", or "mcts": as in the successor of the paper's code the best predicted model is
            sought by an inner tree search on predicted scores, anew for each proposal.
        num_samples: rollouts of the inner tree search.
        seed: of the draws.

    Raises:
        DataError: if a setting is out of range.
    """

    def __init__(
        self,
        space: Space,
        *,
        features: FeatureMap = "choices",
        pool: int = 50,
        explore: float = 0.25,
        ridge: float = 1.0,
        initial: int = 5,
        refit_interval: int = 1,
        acquisition: Literal["pool", "mcts"] = "pool",
        num_samples: int = 100,
        seed: int = 0,
    ) -> None:
        super().__init__(space, seed)
        if features not in FEATURE_MAPS or acquisition not in ("pool", "mcts"):
            raise DataError(
                f"features is {features!r} and acquisition {acquisition!r}; use {' or '.join(FEATURE_MAPS)}, "
                "and pool or mcts."
            )
        if min(pool, refit_interval, num_samples) < 1 or initial < 0 or not 0 <= explore <= 1:
            raise DataError(
                f"pool is {pool}, refit_interval {refit_interval}, num_samples {num_samples} (each at least "
                f"1), initial {initial} (at least 0), explore {explore} (in 0..1); one is out of range."
            )
        self.features: FeatureMap = features
        self.pool, self.explore, self.initial = pool, explore, initial
        self.refit_interval = refit_interval
        self.acquisition, self.num_samples = acquisition, num_samples
        self.surrogate = RidgeSurrogate(ridge, LEAST if features == "ngram" else 1)
        self._tried: set[Key] = set()
        self._grams: dict[Key, Features] = {}  # of models that pools contained; a pool draws many again
        self._worst = 0.0
        self._scored = 0

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {
            "features": self.features,
            "pool": self.pool,
            "explore": self.explore,
            "ridge": self.surrogate.ridge,
            "initial": self.initial,
            "refit_interval": self.refit_interval,
            "acquisition": self.acquisition,
            "num_samples": self.num_samples,
        }

    def predict(self, config: Config) -> float:
        """The score that the surrogate expects of a configuration."""
        return self.surrogate.predict(self._features(config))

    def _propose(self, rng: np.random.Generator) -> tuple[Config, None]:
        tried = self._tried | self._pending_keys() if self._pending else self._tried
        random = self.asked < self.initial or self._scored < FEWEST
        if random or rng.random() < self.explore:
            found = untried(self.space, rng, tried, 1, self.pool)
            return (found[0] if found else self.space.sample(rng).config), None
        if self.acquisition == "mcts":
            return self._tree_search(tried, rng), None
        found = untried(self.space, rng, tried, self.pool) or [self.space.sample(rng).config]
        return max(found, key=self.predict), None

    def _tree_search(self, tried: set[Key], rng: np.random.Generator) -> Config:
        """The best predicted model that an inner tree search meets and that has not been tried."""
        inner = MCTS(self.space, seed=derive(self.seed, "inner", int(rng.integers(2**31))))
        best, config = -np.inf, None
        for _ in range(self.num_samples):
            proposal = inner.ask()
            predicted = self.predict(proposal.config)
            inner.tell(Proposal(proposal.number, proposal.config), predicted)
            if predicted > best and key_of(proposal.config) not in tried:
                best, config = predicted, proposal.config
        return self.space.sample(rng).config if config is None else config

    def _features(self, config: Config) -> Features:
        if self.features == "choices":
            return choice_features(config)
        key = key_of(config)
        if key not in self._grams:
            if len(self._grams) >= MOST_REMEMBERED:
                self._grams.clear()
            self._grams[key] = self.space.replay(config).features("ngram")
        return self._grams[key]

    def _learn(self, number: int, config: Config, score: float | None) -> None:
        if score is not None:
            self._worst = score if self._scored == 0 else min(self._worst, score)
            self._scored += 1
        self._tried.add(key_of(config))
        self.surrogate.add(self._features(config), self._worst if score is None else score)
        if len(self.told) % self.refit_interval == 0:
            self.surrogate.fit()
