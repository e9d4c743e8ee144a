"""A classifier of rows whose last hidden layer is a list of codes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from paperback.errors import ArtefactError, DataError
from paperback.explain.codebook_features import saved
from paperback.explain.codebook_features.edits import ban, force
from paperback.explain.codebook_features.model import CodebookModel, add_codebooks
from paperback.explain.codebook_features.sites import Site
from paperback.explain.interface import ExplainableClassifier, Explanation
from paperback.training import seeded, train

Array = NDArray[np.float64]

SITE = "body"  # the last hidden layer, in front of the linear head
ROWS_AT_ONCE = 4096


class CodebookExplainer(ExplainableClassifier):
    """A network of rows with a codebook before its linear head, so that each score is a sum over few codes.

    The network is trained without codebook first, then with it, from k-means of its activations.

    Args:
        hidden: widths of the hidden layers; the last is snapped.
        groups: slices of the last hidden layer with a codebook each; divides its width.
        n_codes: codes of a group; fewer where there are fewer rows.
        k: codes that a group uses for a row.
        dense_epochs: passes over the rows without codebook.
        epochs: passes with it.
        batch_size: rows of a step.
        lr: peak learning rate, of both.
        weight_decay: of the network.
        image_shape: (height, width) of rows that are images.
        seed: of everything drawn.
        progress: show bars.

    Attributes:
        classes_: labels.
        mean_, scale_: columns are brought to mean 0 and spread 1 by these.
        network_: the `CodebookModel`; `network_.search` and the rest work on it.
        pictures_: code to the mean of the training rows that have it.
    """

    def __init__(
        self,
        hidden: tuple[int, ...] = (128, 32),
        *,
        groups: int = 4,
        n_codes: int = 32,
        k: int = 1,
        dense_epochs: int = 30,
        epochs: int = 40,
        batch_size: int = 64,
        lr: float = 3e-3,
        weight_decay: float = 0.01,
        image_shape: tuple[int, int] | None = None,
        seed: int = 0,
        progress: bool = False,
    ) -> None:
        self.hidden = hidden
        self.groups = groups
        self.n_codes = n_codes
        self.k = k
        self.dense_epochs = dense_epochs
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.weight_decay = weight_decay
        self.image_shape = image_shape
        self.seed = seed
        self.progress = progress

    # -- scikit-learn ----------------------------------------------------------------------------------------

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Fit to rows and labels.

        Args:
            X: ``(rows, features)``, finite.
            y: labels ``(rows,)`` of two classes or more.

        Returns:
            The classifier.

        Raises:
            DataError: if an argument or the data cannot be used.
        """
        rows, codes = self._checked(X, y)
        self._check(rows)
        self.mean_ = rows.mean(0)
        spread = rows.std(0)
        self.scale_ = np.where(spread > 0, spread, 1.0)
        x, targets = self._scaled(rows), torch.from_numpy(codes.astype(np.int64))
        with seeded(self.seed, "explainer"):
            network = _network(x.shape[1], self.hidden, len(self.classes_))
        train(
            network, _cross_entropy, (x, targets), epochs=self.dense_epochs, batch_size=self.batch_size,
            lr=self.lr, optimizer="adamw", weight_decay=self.weight_decay, schedule="one-cycle",
            seed=self.seed, progress=self.progress, description="dense network",
        )  # fmt: skip
        n_codes = min(self.n_codes, len(rows))
        self.network_ = add_codebooks(
            network, [Site(SITE, groups=self.groups)], n_codes, min(self.k, n_codes),
            example=x[:1], seed=self.seed,
        )  # fmt: skip
        self.network_.init_kmeans(x, batch_size=ROWS_AT_ONCE, seed=self.seed, progress=self.progress)
        self.network_.fit(
            (x, targets), _cross_entropy, steps=self.epochs * -(-len(rows) // self.batch_size),
            batch_size=self.batch_size, lr=self.lr, weight_decay=self.weight_decay, schedule="one-cycle",
            seed=self.seed, progress=self.progress,
        )  # fmt: skip
        self.network_.eval()
        self.pictures_ = self._mean_rows(rows)
        return self

    def decision_function(self, X: ArrayLike) -> Array:
        """Scores; of two classes the difference ``(rows,)``, of more all of them ``(rows, classes)``."""
        scores = self._scores(self._rows(X))
        return scores[:, 1] - scores[:, 0] if len(self.classes_) == 2 else scores

    def predict_proba(self, X: ArrayLike) -> Array:
        """Softmax of the scores, ``(rows, classes)``."""
        return torch.from_numpy(self._scores(self._rows(X))).softmax(1).numpy()

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """The class with the greatest score, ``(rows,)``."""
        best = self._scores(self._rows(X)).argmax(1)
        result: NDArray[Any] = self.classes_[best]
        return result

    # -- reasons ---------------------------------------------------------------------------------------------

    def codes(self, X: ArrayLike) -> NDArray[np.int64]:
        """The codes of each row, ``(rows, groups, k)``."""
        ids = self.network_.codes(self._scaled(self._rows(X)), batch_size=ROWS_AT_ONCE)[SITE]
        return ids.numpy()

    def explain(self, X: ArrayLike) -> Explanation:
        """What each code adds to each class's score: its product with the head's weights, over k.

        Parts are the codes that any of the rows has, "group g code c". Their pictures, for images, are the
        mean of the training rows with that code. The offset is the head's bias.
        """
        rows = self._rows(X)
        ids = torch.from_numpy(self.codes(X))
        layer, head = self.network_.codebook(SITE), self._head()
        weights = head.weight.detach().double().unflatten(1, (self.groups, -1))
        each = torch.einsum("gnd,cgd->gnc", layer.codes.detach().double(), weights) / layer.k
        places = ids + torch.arange(self.groups)[:, None] * layer.n_codes
        used, index = places.unique(return_inverse=True)
        of_part = each.flatten(0, 1)[used]  # (parts, classes)
        present = torch.zeros(len(rows), len(used), dtype=torch.float64)
        present.scatter_(1, index.flatten(1), 1.0)
        contributions = present[:, None, :] * of_part.T
        offsets = head.bias.detach().double().expand(len(rows), -1)
        names = [_part(*divmod(int(place), layer.n_codes)) for place in used]
        return Explanation(
            classes=self.classes_,
            scores=(contributions.sum(2) + offsets).numpy(),
            contributions=contributions.numpy(),
            parts=tuple(names),
            inputs=rows,
            kind="table" if self.image_shape is None else "image",
            offsets=offsets.numpy(),
            columns=tuple(getattr(self, "feature_names_in_", ())),
            image_shape=self.image_shape,
            pictures={name: self.pictures_[name] for name in names if name in self.pictures_},
        )

    def intervene(self, X: ArrayLike, settings: Mapping[tuple[int, int], bool]) -> NDArray[Any]:
        """Predict as if rows had, or could not have, certain codes.

        Args:
            X: rows.
            settings: (group, code) to True, which forces the code, or False, which bans it.

        Returns:
            Labels ``(rows,)``.

        Raises:
            DataError: if there is no such group or code, or more than k codes of a group are forced.
        """
        forced: dict[int, list[int]] = {}
        banned: dict[int, list[int]] = {}
        for (group, code), state in settings.items():
            (forced if state else banned).setdefault(group, []).append(code)
        edits = [force(codes, group=group) for group, codes in forced.items()]
        edits += [ban(codes, group=group) for group, codes in banned.items()]
        with self.network_.intervene({SITE: edits}):
            return self.predict(X)

    # -- saving ----------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Save the classifier to a folder; `from_pretrained` reads it.

        Raises:
            ArtefactError: if the folder holds something else.
        """
        check_is_fitted(self)
        facts = {
            "arguments": self.get_params(deep=False) | {"hidden": list(self.hidden)},
            "classes": self.classes_.tolist(),
            "mean": self.mean_.tolist(),
            "scale": self.scale_.tolist(),
            "columns": list(getattr(self, "feature_names_in_", ())),
            "pictures": {name: row.tolist() for name, row in self.pictures_.items()},
        }
        saved.save(self.network_, Path(folder), {"explainer": facts})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> CodebookExplainer:
        """Read a classifier that `save_pretrained` wrote.

        Raises:
            ArtefactError: if the folder is not a whole saved classifier.
        """
        facts = saved.read_facts(Path(folder)).get("explainer")
        if not isinstance(facts, dict):
            raise ArtefactError(f"{folder} holds a model with codebooks that is no CodebookExplainer.")
        arguments = dict(facts["arguments"])
        shape = arguments.pop("image_shape")
        arguments |= {"hidden": tuple(arguments["hidden"])}
        result = cls(**arguments, image_shape=None if shape is None else tuple(shape))
        result.classes_ = np.asarray(facts["classes"])
        result.mean_, result.scale_ = np.asarray(facts["mean"]), np.asarray(facts["scale"])
        result.pictures_ = {name: np.asarray(row) for name, row in facts["pictures"].items()}
        result.n_features_in_ = len(result.mean_)
        if facts["columns"]:
            result.feature_names_in_ = np.asarray(facts["columns"], dtype=object)
        with torch.random.fork_rng(devices=[]):
            network = _network(result.n_features_in_, result.hidden, len(result.classes_))
            result.network_ = CodebookModel.from_pretrained(folder, network)
        return result

    # -- helpers ---------------------------------------------------------------------------------------------

    def _check(self, rows: Array) -> None:
        if not self.hidden or min(self.hidden) < 1:
            raise DataError(f"hidden is {self.hidden}; give the widths of one hidden layer or more.")
        if self.hidden[-1] % self.groups or self.hidden[-1] // self.groups < 2:
            raise DataError(
                f"groups is {self.groups} and the last hidden layer {self.hidden[-1]} wide; groups must "
                "divide it into slices of at least two."
            )
        if self.k < 1 or self.n_codes < self.k:
            raise DataError(f"k is {self.k} and n_codes {self.n_codes}; k must lie between 1 and n_codes.")
        if self.image_shape is not None and int(np.prod(self.image_shape)) != rows.shape[1]:
            raise DataError(
                f"image_shape is {tuple(self.image_shape)} and a row has {rows.shape[1]} values; give "
                "(height, width) with that product."
            )

    def _rows(self, X: ArrayLike) -> Array:
        check_is_fitted(self)
        rows: Array = validate_data(self, X, dtype=np.float64, reset=False)
        return rows

    def _scaled(self, rows: Array) -> Tensor:
        return torch.from_numpy((rows - self.mean_) / self.scale_).float()

    @torch.no_grad()
    def _scores(self, rows: Array) -> Array:
        parts = [self.network_.run(part) for part in self._scaled(rows).split(ROWS_AT_ONCE)]
        return torch.cat(parts).double().numpy()

    def _head(self) -> nn.Linear:
        head = self.network_.model.get_submodule("head")
        assert isinstance(head, nn.Linear)
        return head

    def _mean_rows(self, rows: Array) -> dict[str, Array]:
        ids = self.network_.codes(self._scaled(rows), batch_size=ROWS_AT_ONCE)[SITE].numpy()
        return {
            _part(group, code): rows[(ids[:, group] == code).any(1)].mean(0)
            for group in range(self.groups)
            for code in np.unique(ids[:, group]).tolist()
        }


def _part(group: int, code: int) -> str:
    return f"group {group} code {code}"


def _network(features: int, hidden: tuple[int, ...], classes: int) -> nn.Module:
    """A multilayer perceptron in two pieces; the body ends linearly, its codebook is the nonlinearity."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise((features, *hidden)):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(
        OrderedDict([(SITE, nn.Sequential(*layers[:-1])), ("head", nn.Linear(hidden[-1], classes))])
    )


def _cross_entropy(model: nn.Module, batch: tuple[Tensor, ...], _: torch.Generator) -> Tensor:
    x, targets = batch
    return F.cross_entropy(model(x), targets)
