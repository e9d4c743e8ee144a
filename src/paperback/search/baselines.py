"""The search that every other has to beat: independent draws from the prior."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from paperback.search.interface import Searcher
from paperback.search.parameters import Config, Parameter, check_space, sample_config


class RandomSearch(Searcher):
    """Independent draws from the prior of a flat space.

    Args:
        space: names and parameters.
        seed: of the draws.

    Raises:
        DataError: if the space cannot be used.
    """

    def __init__(self, space: Mapping[str, Parameter], seed: int = 0) -> None:
        super().__init__(seed)
        self.space = check_space(space)

    def _settings(self) -> dict[str, Any]:
        return {"space": {name: repr(parameter) for name, parameter in self.space.items()}}

    def _propose(self, rng: np.random.Generator) -> tuple[Config, None]:
        return sample_config(self.space, rng), None
