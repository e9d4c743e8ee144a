"""DeepArchitect: search spaces of architectures as expressions, and searchers that walk them.

An expression of small modules stands for a tree of models. Any searcher asks for the next open choice and
makes it, and once every choice is made the expression compiles to a torch module for the given input shape.
Monte Carlo tree search goes to the child with the largest ``mean + c sqrt(2 ln n_parent / n_child)``; SMBO
tries the model that a ridge regression predicts to be best.

    space = Space(
        Concat([
            UserHyperparams(lr=[1e-3, 1e-2], optimizer=["adam", "sgd"]),
            RepeatTied(Concat([Affine([16, 64]), ReLU(), Optional(Dropout([0.5]))]), [1, 2, 4]),
            Affine([10]),
        ]),
        input_shape=(64,),
    )

    def evaluate(config, seed):
        walk = space.replay(config)
        return accuracy(walk.compile(), **walk.hyperparameters)

    result = search(SMBO(space), evaluate, budget=64)

Source: R. Negrinho and G. Gordon, "DeepArchitect: Automatically Designing and Training Deep Architectures",
arXiv 1704.08792, 2017.
"""

from paperback.search.deep_architect.features import features_of
from paperback.search.deep_architect.language import (
    ChoiceBisection,
    Concat,
    Decision,
    Empty,
    MaybeSwap,
    Module,
    Optional,
    Or,
    Repeat,
    RepeatTied,
    Residual,
    Specified,
    Split,
)
from paperback.search.deep_architect.layers import (
    Affine,
    AvgPooling2D,
    Basic,
    BatchNormalization,
    Conv2D,
    Dropout,
    Flatten,
    Layer,
    MaxPooling2D,
    Nonlinearity,
    Pooling2D,
    ReLU,
    Sigmoid,
    Tanh,
    UserHyperparams,
    When,
)
from paperback.search.deep_architect.mcts import MCTS
from paperback.search.deep_architect.searchers import Evolution, RandomSearch, SpaceSearcher, mutate
from paperback.search.deep_architect.smbo import SMBO
from paperback.search.deep_architect.space import Space, Walk, from_dict
from paperback.search.deep_architect.surrogate import RidgeSurrogate

__all__ = [
    "MCTS",
    "SMBO",
    "Affine",
    "AvgPooling2D",
    "Basic",
    "BatchNormalization",
    "ChoiceBisection",
    "Concat",
    "Conv2D",
    "Decision",
    "Dropout",
    "Empty",
    "Evolution",
    "Flatten",
    "Layer",
    "MaxPooling2D",
    "MaybeSwap",
    "Module",
    "Nonlinearity",
    "Optional",
    "Or",
    "Pooling2D",
    "RandomSearch",
    "ReLU",
    "Repeat",
    "RepeatTied",
    "Residual",
    "RidgeSurrogate",
    "Sigmoid",
    "Space",
    "SpaceSearcher",
    "Specified",
    "Split",
    "Tanh",
    "UserHyperparams",
    "Walk",
    "When",
    "features_of",
    "from_dict",
    "mutate",
]
