"""Searching for settings and architectures: what to search over, who searches, and where the work is done.

A `Searcher` proposes configurations and learns from their scores; a `Trainable` is a training that can be
stopped, stored and changed on the way. `search` drives the first; population training the second. Engines run
the work in this process, in others, or on a Ray cluster, with the same result.
"""

from paperback.search.baselines import RandomSearch
from paperback.search.engine import Engine, open_engine
from paperback.search.halving import SuccessiveHalving
from paperback.search.interface import (
    InvalidTrial,
    Proposal,
    Searcher,
    SearchError,
    SearchResult,
    Trainable,
    Trial,
)
from paperback.search.loop import search
from paperback.search.parameters import Choice, Float, Integer
from paperback.search.population import PopulationTraining
from paperback.search.store import TrialStore, read_trials

__all__ = [
    "Choice",
    "Engine",
    "Float",
    "Integer",
    "InvalidTrial",
    "PopulationTraining",
    "Proposal",
    "RandomSearch",
    "SearchError",
    "SearchResult",
    "Searcher",
    "SuccessiveHalving",
    "Trainable",
    "Trial",
    "TrialStore",
    "open_engine",
    "read_trials",
    "search",
]
