"""`HypersphericalClassifier`: trained on some classes, extended by others without training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from paperback.data import splits
from paperback.errors import DataError
from paperback.represent.hyperspherical.embedding import UnitEncoder, with_labels
from paperback.represent.hyperspherical.sphere import (
    CONSTRAINTS,
    Constraint,
    NormalizedLinear,
    scale_for_probability,
)
from paperback.represent.interface import Backbone, Images
from paperback.training import History, derive, train

Seen = Literal["means", "weights", "auto"]
Among = str | Iterable[int]

REJECTED = -1  # what `predict` says of a row that it refuses
AUTO_PROBABILITY = 0.999  # that scale "auto" makes reachable
RATES = 1001  # false rejection rates, 0 to 1, that thresholds are kept for
ZERO = 1e-12


class HypersphericalClassifier(UnitEncoder):
    """A normalised softmax whose classes can be added and removed after training.

    Args:
        backbone: see `Encoder`.
        dim: length of the embedding.
        scale: s > 0 of the softmax. "auto" takes the smallest at which a probability of .999 can be reached
            with the number of classes at hand.
        constraint: "project", "reparam", "fixed" or "none"; see `NormalizedLinear`.
        seen: what stands for a trained class: "means", the mean direction of its training images, as for new
            classes; "weights", its trained class vector, the paper's choice; "auto", whichever classifies
            held-out images better when each seen class in turn is treated as a new one.
        epochs: passes over the images.
        batch_size: images of a step.
        lr: learning rate of Adam.
        holdout: part of the images, in [0, 1), that is not trained on but calibrates rejection and "auto".
        in_channels, image_size: of the images.
        seed: of everything drawn.
        n_classes: classes in memory of a saved model; `fit` and `add_class` set it.

    Attributes:
        classes_: labels ``(classes,)``, seen ones first.
        seen_classes_: labels that were trained.
        prototypes_: unit vectors of the classes ``(classes, dim)``.

    Raises:
        DataError: if an argument is out of range.
    """

    labels: Tensor
    is_seen: Tensor
    sums: Tensor
    counts: Tensor
    weights: Tensor
    use_weights: Tensor
    cosine_scale: Tensor
    quantiles: Tensor

    def __init__(
        self,
        backbone: Backbone = "resnet",
        dim: int = 64,
        scale: float | str = 10.0,
        constraint: Constraint = "project",
        seen: Seen = "means",
        epochs: int = 10,
        batch_size: int = 128,
        lr: float = 1e-3,
        holdout: float = 0.1,
        in_channels: int = 1,
        image_size: int = 28,
        seed: int = 0,
        n_classes: int = 0,
    ) -> None:
        super().__init__(backbone, dim, in_channels, image_size, seed)
        if scale != "auto" and not (isinstance(scale, int | float) and 0 < scale < float("inf")):
            raise DataError(f'scale is {scale!r}; it must be a number above 0, or "auto".')
        if constraint not in CONSTRAINTS:
            raise DataError(f"constraint is {constraint!r}; take one of {', '.join(CONSTRAINTS)}.")
        if seen not in ("means", "weights", "auto"):
            raise DataError(f'seen is {seen!r}; it must be "means", "weights" or "auto".')
        if not 0 <= holdout < 1 or (seen == "auto" and holdout == 0):
            raise DataError(f'holdout is {holdout}; it must lie in [0, 1), above 0 with seen="auto".')
        self.scale, self.constraint, self.seen, self.holdout = scale, constraint, seen, holdout
        self.epochs, self.batch_size, self.lr = epochs, batch_size, lr
        # The memory: sums of unit vectors in double precision, so that their order does not matter.
        self.register_buffer("labels", torch.zeros(n_classes, dtype=torch.int64))
        self.register_buffer("is_seen", torch.zeros(n_classes, dtype=torch.bool))
        self.register_buffer("sums", torch.zeros(n_classes, dim, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(n_classes, dtype=torch.int64))
        self.register_buffer("weights", torch.zeros(n_classes, dim))  # trained vectors, of seen classes
        self.register_buffer("use_weights", torch.tensor(seen == "weights"))
        self.register_buffer("cosine_scale", torch.tensor(1.0 if scale == "auto" else float(scale)))
        self.register_buffer("quantiles", torch.full((RATES,), torch.nan))

    # -- classes ---------------------------------------------------------------------------------------------

    @property
    def classes_(self) -> Int[Tensor, " classes"]:
        """Labels of all classes, seen ones first."""
        return self.labels.clone()

    @property
    def seen_classes_(self) -> Int[Tensor, " seen"]:
        """Labels that were trained."""
        return self.labels[self.is_seen]

    @property
    def prototypes_(self) -> Float[Tensor, "classes dim"]:
        """Unit vectors that stand for the classes, in the order of `classes_`."""
        return self._prototypes(bool(self.use_weights))

    def add_class(self, label: int, images: Images, *, update: bool = False) -> None:
        """Take up a class, without training; or give one that is there more examples.

        Its vector is the normalised mean of the unit embeddings of its examples. Examples in several calls
        are as good as in one.

        Args:
            label: its label, >= 0.
            images: examples, one or more.
            update: add to the examples of a class that is there.

        Raises:
            DataError: if there are no images, the label is there already (or, with update, is not), or
                nothing was fitted.
        """
        self._need_fitted()
        place = (self.labels == label).nonzero()[:, 0]
        if label < 0 or bool(len(place)) != update:
            if label < 0:
                raise DataError(f"label is {label}; labels of classes are 0 or larger.")
            remedy = "add examples with update=True" if len(place) else "leave out update"
            raise DataError(f"class {label} is {'' if len(place) else 'not '}there already; {remedy}.")
        vectors = self.transform(torch.as_tensor(images)).to(self.sums)
        if len(vectors) == 0:
            raise DataError(f"class {label} has no images; give one at least.")
        total = vectors.sum(0)
        if update:
            total = total + self.sums[place[0]]
        if total.norm() < ZERO:
            raise DataError(
                f"the examples of class {label} cancel out: their mean has no direction; give more."
            )
        if update:
            self.sums[place[0]] = total
            self.counts[place[0]] += len(vectors)
            return
        self._remember(
            torch.cat([self.labels, self.labels.new_tensor([label])]),
            torch.cat([self.is_seen, self.is_seen.new_tensor([False])]),
            torch.cat([self.sums, total[None]]),
            torch.cat([self.counts, self.counts.new_tensor([len(vectors)])]),
            torch.cat([self.weights, torch.zeros_like(self.weights[:1])]),
        )

    def remove_class(self, label: int) -> None:
        """Forget a class, seen or added.

        Raises:
            DataError: if it is not there.
        """
        kept = self.labels != label
        if kept.all():
            raise DataError(f"there is no class {label}; there are {self._names(self.labels)}.")
        self._remember(*(part[kept] for part in self._memory()))

    def represent_seen(self, by: Literal["means", "weights"]) -> None:
        """Choose what stands for the trained classes from now on; see `seen`.

        Args:
            by: "means" or "weights".

        Raises:
            DataError: if it is something else.
        """
        if by not in ("means", "weights"):
            raise DataError(f'by is {by!r}; it must be "means" or "weights".')
        self.use_weights.fill_(by == "weights")

    def novel_head(self, labels: Iterable[int] | None = None) -> NovelHead:
        """A classifier of added classes alone: the disjoint scenario.

        Args:
            labels: which of them; all if not given.

        Raises:
            DataError: if none was added, or a label is not there.
        """
        rows = self._rows("novel" if labels is None else labels)
        return NovelHead(self, self.labels[rows], self.prototypes_[rows])

    # -- prediction ------------------------------------------------------------------------------------------

    def cosines(self, images: Images, among: Among = "all") -> Float[Tensor, "n classes"]:
        """Cosine of each image with the vector of each class in question.

        Args:
            images: as `fit` takes them.
            among: "all", "seen", "novel", or labels.

        Raises:
            DataError: if the images cannot be used, or there is no such class.
        """
        rows = self._rows(among)
        vectors = self.transform(torch.as_tensor(images))
        cosines: Tensor = vectors @ self.prototypes_[rows].T.to(vectors.device)
        return cosines

    def predict_proba(self, images: Images, among: Among = "all") -> Float[Tensor, "n classes"]:
        """Softmax of the scaled cosines over the classes in question, in the order of `classes_`."""
        return (self.cosine_scale * self.cosines(images, among)).softmax(1)

    def predict(self, images: Images, among: Among = "all", reject: float | None = None) -> Int[Tensor, " n"]:
        """The class with the greatest cosine.

        Args:
            images: as `fit` takes them.
            among: "all", "seen", "novel", or labels.
            reject: refuse images whose greatest cosine is below what this part of held-out images of seen
                classes falls below, in [0, 1]; they get -1.

        Returns:
            Labels.

        Raises:
            DataError: if the images cannot be used, there is no such class, or nothing was held out for a
                threshold.
        """
        cosines = self.cosines(images, among)
        best, column = cosines.max(1)
        labels = self.labels[self._rows(among)].to(column.device)[column]
        if reject is None:
            return labels
        return torch.where(best >= self.threshold(reject), labels, REJECTED)

    def threshold(self, rate: float) -> float:
        """The cosine below which a part `rate` of held-out images of seen classes falls."""
        if not 0 <= rate <= 1:
            raise DataError(f"reject is {rate}; a false rejection rate lies in [0, 1].")
        if self.quantiles.isnan().any():
            raise DataError("there is no threshold: fit with holdout above 0, or call calibrate first.")
        return float(np.interp(rate, np.linspace(0, 1, RATES), self.quantiles.cpu().numpy()))

    def calibrate(self, images: Images) -> None:
        """Set the thresholds of `predict(reject=)` by images of seen classes that were not trained on."""
        best = self.cosines(images, "seen").max(1).values
        if len(best) == 0:
            raise DataError("images is empty; thresholds need images of the seen classes.")
        levels = torch.linspace(0, 1, RATES, dtype=torch.float64, device=best.device)
        self.quantiles.copy_(best.double().quantile(levels))

    # -- training --------------------------------------------------------------------------------------------

    def _fit(self, images: Tensor, labels: Tensor | None, progress: bool) -> History:
        assert labels is not None
        x, codes, classes = with_labels(images, labels)
        held = torch.zeros(len(x), dtype=torch.bool)
        if self.holdout > 0:
            rng = np.random.default_rng(derive(self.seed, "holdout"))
            n = round(self.holdout * len(x))
            held[splits.draw(np.arange(len(x)), n, rng, codes.cpu().numpy())[0]] = True
        n_classes = len(classes)
        scale = scale_for_probability(n_classes, AUTO_PROBABILITY) if self.scale == "auto" else self.scale
        head = NormalizedLinear(
            self.dim, n_classes, float(scale), self.constraint, derive(self.seed, "head")
        ).to(self.mean.device)
        history = train(
            _Training(self, head), _cross_entropy, (x[~held], codes[~held]), epochs=self.epochs,
            batch_size=self.batch_size, lr=self.lr, optimizer=_Projected(head, self.lr), seed=self.seed,
            progress=progress, description="normalised softmax",
        )  # fmt: skip
        self.cosine_scale.fill_(float(scale))
        vectors = self.transform(x[~held]).to(self.sums)
        own = codes[~held].to(vectors.device)
        sums = torch.zeros(n_classes, self.dim, dtype=self.sums.dtype, device=vectors.device)
        sums.index_add_(0, own, vectors)
        trained = F.normalize(head.directions().detach(), dim=1)
        seen = torch.ones(n_classes, dtype=torch.bool, device=vectors.device)
        counts = own.bincount(minlength=n_classes)
        self._remember(classes.to(vectors.device), seen, sums, counts, trained)
        self.use_weights.fill_(self.seen == "weights")
        self.quantiles.fill_(torch.nan)
        if held.any():
            if self.seen == "auto":
                self.use_weights.fill_(self._weights_are_better(self.transform(x[held]), codes[held]))
            self.calibrate(x[held])
        return history

    def _weights_are_better(self, held: Tensor, codes: Tensor) -> bool:
        """Joint accuracy on held-out images, each seen class in turn being represented by its mean."""
        means, trained = self._prototypes(False), self._prototypes(True)
        by_means = int(((held @ means.T).argmax(1) == codes).sum()) * len(means)
        by_weights = 0
        for novel in range(len(means)):
            mixed = trained.clone()
            mixed[novel] = means[novel]
            by_weights += int(((held @ mixed.T).argmax(1) == codes).sum())
        return by_weights > by_means

    # -- helpers ---------------------------------------------------------------------------------------------

    def _prototypes(self, use_weights: bool) -> Tensor:
        means = F.normalize(self.sums, dim=1).float()
        return torch.where((self.is_seen & use_weights)[:, None], self.weights, means)

    def _memory(self) -> tuple[Tensor, ...]:
        return self.labels, self.is_seen, self.sums, self.counts, self.weights

    def _remember(self, *parts: Tensor) -> None:
        """Set the memory; the saved config must say its size."""
        names = ("labels", "is_seen", "sums", "counts", "weights")
        for name, part in zip(names, parts, strict=True):
            setattr(self, name, part.clone())
        self._hub_mixin_config = dict(self._hub_mixin_config or {}) | {"n_classes": len(self.labels)}  # type: ignore[arg-type]

    def _rows(self, among: Among) -> Tensor:
        """Which classes are in question, as indices of the memory."""
        self._need_fitted()
        if isinstance(among, str):
            masks = {"all": torch.ones_like(self.is_seen), "seen": self.is_seen, "novel": ~self.is_seen}
            if among not in masks:
                raise DataError(f'among is {among!r}; it must be "all", "seen", "novel", or labels.')
            rows = masks[among].nonzero()[:, 0]
            if len(rows) == 0:
                how = "add_class adds novel ones" if among == "novel" else "fit trains some"
                raise DataError(f"there are no {among} classes; {how}.")
            return rows
        asked = [int(label) for label in among]
        known = self.labels.tolist()
        absent = [label for label in asked if label not in known]
        if absent or not asked:
            what = f"has {absent[0]}, which is no class" if absent else "is empty"
            raise DataError(f"among {what}; there are {self._names(self.labels)}.")
        return torch.tensor([known.index(label) for label in asked], device=self.labels.device)

    def _need_fitted(self) -> None:
        if len(self.labels) == 0:
            raise DataError("the classifier has no classes yet; call fit first.")

    @staticmethod
    def _names(labels: Tensor) -> str:
        return ", ".join(map(str, labels.tolist()))


class NovelHead(nn.Module):
    """A classifier of some added classes, made by `HypersphericalClassifier.novel_head`.

    It keeps the class vectors of that moment, and embeds by the classifier it was made from.

    Attributes:
        classes_: labels.
        head: unit vectors to scaled cosines.
    """

    def __init__(self, encoder: HypersphericalClassifier, labels: Tensor, vectors: Tensor) -> None:
        super().__init__()
        self.encoder, self.classes_ = encoder, labels.clone()
        self.register_buffer("vectors", vectors.clone())
        self.vectors: Tensor

    def predict_proba(self, images: Images) -> Float[Tensor, "n classes"]:
        """Softmax of the scaled cosines."""
        unit = self.encoder.transform(torch.as_tensor(images))
        return (self.encoder.cosine_scale * unit @ self.vectors.T.to(unit.device)).softmax(1)

    def predict(self, images: Images) -> Int[Tensor, " n"]:
        """The label with the greatest cosine."""
        column = self.predict_proba(images).argmax(1)
        return self.classes_.to(column.device)[column]


class _Training(nn.Module):
    def __init__(self, encoder: UnitEncoder, head: NormalizedLinear) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.head(self.encoder.embed(images))
        return scores


class _Projected:
    """Adam that puts the class vectors back on the sphere after every step."""

    def __init__(self, head: NormalizedLinear, lr: float) -> None:
        self._head, self._lr = head, lr

    def __call__(self, parameters: Any) -> torch.optim.Optimizer:
        optimizer = torch.optim.Adam(parameters, lr=self._lr, fused=True)
        optimizer.register_step_post_hook(lambda *_: self._head.project_())
        return optimizer


def _cross_entropy(model: nn.Module, batch: tuple[Tensor, ...], generator: torch.Generator) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])
