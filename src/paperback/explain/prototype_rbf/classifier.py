"""The classifier for users: scikit-learn's interface over the shallow and the deep network."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from paperback.errors import DataError, NotSupportedError
from paperback.explain.interface import ExplainableClassifier, Explanation
from paperback.explain.prototype_rbf import deep, fitting
from paperback.explain.prototype_rbf.deep import DeepCBC, Patch
from paperback.explain.prototype_rbf.heads import HEADS
from paperback.explain.prototype_rbf.network import (
    KERNELS,
    METRICS,
    OTHER_METRICS,
    SIGMAS,
    PrototypeNetwork,
)
from paperback.saving import SavedEstimator
from paperback.training import seeded

Array = NDArray[np.float64]

LOSSES = ("robust", "margin")
EPOCHS, DEEP_EPOCHS = 80, (12, 84, 48)
LR, DEEP_LR = 0.01, 3.75e-4
GAP, DEEP_GAP = 0.3, 0.025  # margins of agreements
BATCH = 1024  # rows of a prediction, for bounded memory


class RBFPrototypeClassifier(SavedEstimator, ExplainableClassifier):
    """Decides by which prototypes are present or absent, with a certificate for each input.

    The shallow classifier compares rows as they are: bring columns of different units to one scale first, for
    instance with scikit-learn's StandardScaler. With a backbone it compares places of a feature map.

    Args:
        n_components: prototypes of each class. With a backbone None takes its channels as they are.
        metric: "euclidean", "manhattan" or "chebyshev" (certificates in L2, L1, L-infinity); "sqeuclidean"
            and "cosine" classify but certify nothing.
        kernel: "exp", d = exp(-delta/sigma), or "gaussian", d = exp(-delta^2/sigma).
        sigma: "shared" or "per-component".
        negative: whether absence may count; only for the head "cbc".
        vectors_per_class: reasoning vectors of a class; its best one counts.
        head: "cbc"; "original" for the older method with indefinite reasoning; "rbf" for convex weights and a
            constant.
        loss: "robust" (radii of at least `margin`) or "margin" (gaps of agreements of at least it). None for
            "robust", and for "margin" where there is no radius: with a backbone or another metric.
        margin: of the loss. None for half the usual distance between classes ("robust", in units of X), .3
            ("margin") or .025 (with a backbone).
        backbone: a module ``(B, channels, height, width) -> (B, features, h, w)``, of which a copy is
            trained; None for the shallow classifier.
        image_shape: (height, width) or (channels, height, width) of rows that are images.
        epochs: passes over the rows, with a backbone a triple for its three stages. None for 80, or
            (12, 84, 48).
        batch_size: rows of a step.
        lr: of prototypes and widths, in units of four times the spread of X; the reasoning has five times as
            much. With a backbone, its own. None for .01, or 3.75e-4.
        least: with a backbone, detections below it count as absent when predicting.
        seed: of everything drawn.
        progress: show a bar.

    Attributes:
        classes_: labels.
        patches_: only with a backbone, where each component is strongest in the training images.
        network_: the fitted module.
    """

    def __init__(
        self,
        n_components: int | None = 4,
        *,
        metric: str = "euclidean",
        kernel: str = "exp",
        sigma: str = "shared",
        negative: bool = True,
        vectors_per_class: int = 1,
        head: str = "cbc",
        loss: str | None = None,
        margin: float | None = None,
        backbone: nn.Module | None = None,
        image_shape: tuple[int, ...] | None = None,
        epochs: int | tuple[int, int, int] | None = None,
        batch_size: int = 128,
        lr: float | None = None,
        least: float = 0.0,
        seed: int = 0,
        progress: bool = False,
    ) -> None:
        self.n_components = n_components
        self.metric = metric
        self.kernel = kernel
        self.sigma = sigma
        self.negative = negative
        self.vectors_per_class = vectors_per_class
        self.head = head
        self.loss = loss
        self.margin = margin
        self.backbone = backbone
        self.image_shape = image_shape
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.least = least
        self.seed = seed
        self.progress = progress

    @property
    def components_(self) -> Array:
        """Prototypes ``(components, features)``; the shallow classifier has them."""
        if not isinstance(self.network_, PrototypeNetwork):
            raise AttributeError("with a backbone components are channels, shown by patches_.")
        return self.network_.components.detach().numpy()

    @property
    def reasoning_(self) -> tuple[Array, Array]:
        """r+ and r-, each ``(components, vectors)``; vectors of a class stand side by side."""
        positive, negative = self.network_.head.reasoning()
        return positive.detach().double().numpy(), negative.detach().double().numpy()

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
        _check_arguments(self)
        rows, codes = self._checked(X, y)
        if self.image_shape is not None and int(np.prod(self.image_shape)) != rows.shape[1]:
            raise DataError(
                f"image_shape is {tuple(self.image_shape)} and a row has {rows.shape[1]} values; give "
                "(height, width) or (channels, height, width) with that product."
            )
        return self._fit_shallow(rows, codes) if self.backbone is None else self._fit_deep(rows, codes)

    def agreement(self, X: ArrayLike) -> Array:
        """Class agreements A in [0, 1], which do not sum to 1, ``(rows, classes)``."""
        return self._in_parts(self._rows(X), self.network_)

    def detections(self, X: ArrayLike) -> Array:
        """How much of each component is in each row, in [0, 1], ``(rows, components)``."""
        return self._in_parts(self._rows(X), self.network_.detections)

    def predict_proba(self, X: ArrayLike) -> Array:
        """Agreements over their sum, ``(rows, classes)``; one below 0 (head "rbf") counts as 0."""
        agreement = self.agreement(X).clip(0)
        total = agreement.sum(1, keepdims=True)
        uniform = np.full_like(agreement, 1 / agreement.shape[1])
        return np.divide(agreement, total, out=uniform, where=total > 0)

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """The class with the greatest agreement, ``(rows,)``."""
        best = self.agreement(X).argmax(1)
        result: NDArray[Any] = self.classes_[best]
        return result

    # -- reasons and guarantees ------------------------------------------------------------------------------

    def explain(self, X: ArrayLike) -> Explanation:
        """Contributions r+ d ("present") and r- (1 - d) ("absent") of each component; they add up to A.

        Of several reasoning vectors of a class, the best one on the row is explained. Pictures are the
        prototypes, or with a backbone the training patches where components are strongest.
        """
        rows = self._rows(X)
        d = self._in_parts(rows, self.network_.detections)
        positive, negative, offsets = self._best_reasoning(d)
        present, absent = positive * d[:, None], negative * (1 - d[:, None])
        names = [f"component {k}" for k in range(d.shape[1])]
        parts = [f"{name} present" for name in names]
        contributions = present
        if self.network_.head.log_reasoning()[1] is not None:
            parts += [f"{name} absent" for name in names]
            contributions = np.concatenate([present, absent], 2)
        prototypes = self._prototypes()
        shape = _shape_to_draw(self.image_shape)
        return Explanation(
            classes=self.classes_,
            scores=contributions.sum(2) + offsets,
            contributions=contributions,
            parts=tuple(parts),
            inputs=self._to_draw(rows),
            kind="table" if shape is None else "image",
            offsets=offsets,
            columns=tuple(getattr(self, "feature_names_in_", ())),
            image_shape=shape,
            pictures={part: prototypes[i % len(names)] for i, part in enumerate(parts)},
            certificates=self._radii(rows, None, tight=True) if self._is_certified() else None,
        )

    def intervene(self, X: ArrayLike, settings: Mapping[int, float]) -> NDArray[Any]:
        """Predict as if components were detected to a given degree.

        Args:
            X: rows.
            settings: index of a component to its detection in [0, 1].

        Returns:
            Labels ``(rows,)``.

        Raises:
            DataError: if there is no such component or a value is outside [0, 1].
        """
        d = self.detections(X)
        for k, value in settings.items():
            if k not in range(d.shape[1]):
                raise DataError(f"there is no component {k!r}; there are {d.shape[1]}, from 0.")
            if not 0 <= value <= 1:
                raise DataError(f"component {k} is set to {value}; a detection lies in [0, 1].")
            d[:, k] = value
        head = self.network_.head
        with torch.no_grad():
            scores = head(torch.tensor(d, dtype=head.logits.dtype))
        result: NDArray[Any] = self.classes_[scores.argmax(1).numpy()]
        return result

    def certify(self, X: ArrayLike, y: ArrayLike | None = None, *, tight: bool = True) -> Array:
        """The radius in the metric's norm within which the prediction cannot change.

        Args:
            X: rows.
            y: labels; a row that is classified otherwise has a radius of at most 0. The predictions if None.
            tight: the widest guarantee that is known (`PrototypeNetwork.widest_radii`); False for the paper's
                closed form, which is smaller and faster (the Gaussian kernel has none and is bisected).

        Returns:
            ``(rows,)``, in the units of X.

        Raises:
            NotSupportedError: with a backbone, or (then also a ValueError) for a metric without triangle
                inequality.
            DataError: for labels never seen.
        """
        rows = self._rows(X)
        if y is None:
            return self._radii(rows, None, tight=tight)
        labels = np.asarray(y)
        if labels.shape != (len(rows),) or not np.isin(labels, self.classes_).all():
            raise DataError("y must hold, for each row of X, the label of a class that was fitted.")
        return self._radii(rows, np.searchsorted(self.classes_, labels), tight=tight)

    def counterfactual(self, X: ArrayLike) -> Array:
        """The direction in which the lead over the runner-up shrinks fastest, of length 1 in L2.

        Args:
            X: rows.

        Returns:
            ``(rows, features)``; 0 where the agreements do not change with the row.

        Raises:
            NotSupportedError: with a backbone.
        """
        rows = self._rows(X)
        if self.backbone is not None:
            raise NotSupportedError(
                "with a backbone there is no direction from component to component; RBFPrototypeClassifier "
                "without one has counterfactual."
            )
        x = torch.tensor(rows, requires_grad=True)
        top = self.network_(x).topk(2).values
        (slope,) = torch.autograd.grad((top[:, 0] - top[:, 1]).sum(), x)
        direction: Array = nn.functional.normalize(-slope, dim=1, eps=1e-300).numpy()
        return direction

    # -- saving ----------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Save the shallow classifier to a folder; `from_pretrained` and `paperback.load` read it.

        Raises:
            NotSupportedError: with a backbone.
            ArtefactError: if the folder holds something that is not a saved model.
        """
        if self.backbone is not None:
            raise NotSupportedError(
                "the backbone is a module of yours that a folder cannot name; save network_.state_dict() "
                "with safetensors.torch.save_file."
            )
        super().save_pretrained(folder)

    def _build_modules(self) -> dict[str, nn.Module]:
        return {"network_": self._new_network()}

    # -- helpers ---------------------------------------------------------------------------------------------

    def _new_network(self) -> PrototypeNetwork:
        assert self.n_components is not None
        n_classes = len(self.classes_)
        with seeded(self.seed, "initial weights"):
            return PrototypeNetwork(
                self.n_features_in_, self.n_components * n_classes, n_classes, metric=self.metric,
                kernel=self.kernel, sigma=self.sigma, negative=self.negative,
                vectors_per_class=self.vectors_per_class, head=self.head,
            )  # fmt: skip

    def _fit_shallow(self, X: Array, codes: NDArray[Any]) -> Self:
        assert self.n_components is not None
        network = self._new_network()
        loss = self.loss or ("robust" if self.metric in METRICS else "margin")
        margin = self.margin
        if margin is None:
            margin = fitting.usual_margin(X, codes, self.metric, self.seed) if loss == "robust" else GAP
        epochs = EPOCHS if self.epochs is None else self.epochs
        assert isinstance(epochs, int)
        fitting.fit(
            network, X, codes, per_class=self.n_components, loss=loss, margin=margin, epochs=epochs,
            batch_size=self.batch_size, lr=LR if self.lr is None else self.lr, seed=self.seed,
            progress=self.progress,
        )  # fmt: skip
        return self._adopt(network)

    def _fit_deep(self, X: Array, codes: NDArray[Any]) -> Self:
        assert self.backbone is not None
        images, n_classes = self._images(X), len(self.classes_)
        backbone = copy.deepcopy(self.backbone)
        with torch.no_grad():
            features = backbone.eval()(images[:2])
        if features.ndim != 4:
            raise DataError(
                f"backbone gives {tuple(features.shape)}; it must keep a map, (rows, features, h, w)."
            )
        n_components = None if self.n_components is None else self.n_components * n_classes
        with seeded(self.seed, "initial weights"):
            network = DeepCBC(
                backbone, features.shape[1], n_components, n_classes, negative=self.negative,
                vectors_per_class=self.vectors_per_class, head=self.head, least=self.least,
            )  # fmt: skip
        epochs = DEEP_EPOCHS if self.epochs is None else self.epochs
        assert isinstance(epochs, tuple)
        deep.fit(
            network, images, torch.tensor(codes), epochs=epochs,
            margin=DEEP_GAP if self.margin is None else self.margin, batch_size=self.batch_size,
            lr=DEEP_LR if self.lr is None else self.lr, seed=self.seed, progress=self.progress,
        )  # fmt: skip
        self.patches_: tuple[Patch, ...] = deep.ground(network.eval(), images)
        return self._adopt(network)

    def _adopt(self, network: PrototypeNetwork | DeepCBC) -> Self:
        self.network_ = network.eval().requires_grad_(False)
        return self

    def _rows(self, X: ArrayLike) -> Array:
        check_is_fitted(self)
        rows: Array = validate_data(self, X, dtype=np.float64, reset=False)
        return rows

    def _images(self, rows: Array) -> Tensor:
        assert self.image_shape is not None
        shape = self.image_shape if len(self.image_shape) == 3 else (1, *self.image_shape)
        return torch.tensor(rows, dtype=torch.float32).unflatten(1, shape)

    def _in_parts(self, rows: Array, function: Callable[[Tensor], Tensor]) -> Array:
        """A function of rows as the network takes them, a thousand at a time."""
        with torch.no_grad():
            parts = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
            inputs = (torch.tensor(p) if self.backbone is None else self._images(p) for p in parts)
            return torch.cat([function(x) for x in inputs]).double().numpy()

    def _is_certified(self) -> bool:
        return self.backbone is None and self.metric in METRICS

    def _radii(self, rows: Array, codes: NDArray[Any] | None, *, tight: bool) -> Array:
        """Radii for class indices; what floating-point agreements predict decides the sign."""
        network = self.network_
        if not isinstance(network, PrototypeNetwork):
            raise NotSupportedError(
                "with a backbone there is no certificate, for nothing bounds the backbone; "
                "RBFPrototypeClassifier without one has certify."
            )
        predicted = self._in_parts(rows, network).argmax(1)
        wanted = predicted if codes is None else codes
        n = network.rows_at_once
        radii = network.widest_radii if tight else partial(network.radii, tight=False)
        with torch.no_grad():
            parts = [
                radii(torch.tensor(rows[i : i + n]), torch.tensor(wanted[i : i + n]))
                for i in range(0, len(rows), n)
            ]
        found = torch.cat(parts).numpy()
        # Detections that are 0 as floats decide nothing in predict, though their logarithms do in a radius.
        return np.where(predicted == wanted, found.clip(min=0), found.clip(max=0))

    def _best_reasoning(self, d: Array) -> tuple[Array, Array, Array]:
        """r+ and r- of the best vector of each class on each row, ``(rows, classes, components)``, and what
        belongs to no component, ``(rows, classes)``."""
        head = self.network_.head
        positive, negative = self.reasoning_
        scores = d @ (positive - negative) + head.offset().detach().double().numpy()
        best = scores.reshape(len(d), head.n_classes, -1).argmax(2)
        vectors = np.arange(head.n_classes) * head.vectors_per_class + best
        return positive.T[vectors], negative.T[vectors], head.constant().detach().double().numpy()[vectors]

    def _prototypes(self) -> Array:
        """What each component looks like, in the form of a row that is drawn."""
        if self.backbone is None:
            return self._to_draw(self.components_)
        return self._to_draw(np.stack([patch.picture.numpy().ravel() for patch in self.patches_]))

    def _to_draw(self, rows: Array) -> Array:
        """Rows with the channels last, where they are images with channels."""
        if self.image_shape is None or len(self.image_shape) < 3:
            return rows
        return np.moveaxis(rows.reshape(len(rows), *self.image_shape), 1, -1).reshape(len(rows), -1)


def _shape_to_draw(image_shape: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """(height, width) or (height, width, 3); None for what is no picture."""
    if image_shape is None:
        return None
    channels, *plane = image_shape if len(image_shape) == 3 else (1, *image_shape)
    return {1: tuple(plane), 3: (*plane, 3)}.get(channels)


def _check_arguments(settings: RBFPrototypeClassifier) -> None:
    """Refuse what cannot be.

    Raises:
        DataError: naming the argument, its value and what it must be.
    """
    choices: dict[str, tuple[str, ...]] = {
        "metric": (*METRICS, *OTHER_METRICS),
        "kernel": KERNELS,
        "sigma": SIGMAS,
        "head": HEADS,
    }
    for name, allowed in choices.items():
        value = getattr(settings, name)
        if value not in allowed:
            raise DataError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}.")
    if settings.loss is not None and settings.loss not in LOSSES:
        why = " (-log A is least where every class agrees with absences)" if settings.loss == "nll" else ""
        raise DataError(f"loss is {settings.loss!r}{why}; it must be one of {', '.join(LOSSES)}.")
    n = settings.n_components
    if (n is None and settings.backbone is None) or (n is not None and n < 1):
        raise DataError(f"n_components is {n}, fewer components than classes; give each class at least one.")
    if settings.margin is not None and not 0 < settings.margin < np.inf:
        raise DataError(f"margin is {settings.margin}; it must be a positive number.")
    if not settings.negative and settings.head == "original":
        raise DataError("negative=False has no meaning for head='original'; use head='cbc'.")
    (_check_shallow if settings.backbone is None else _check_deep)(settings)


def _check_shallow(settings: RBFPrototypeClassifier) -> None:
    if settings.loss == "robust" and settings.metric not in METRICS:
        raise DataError(
            f"metric {settings.metric!r} has no triangle inequality and gives no radius for the robust loss; "
            f"use loss='margin' or one of {', '.join(METRICS)}."
        )
    if settings.epochs is not None and not isinstance(settings.epochs, int):
        raise DataError(f"epochs is {settings.epochs!r}; without a backbone it must be one whole number.")
    if settings.least != 0:
        raise DataError(f"least is {settings.least}; it only has a meaning with a backbone.")


def _check_deep(settings: RBFPrototypeClassifier) -> None:
    usual = {"metric": "euclidean", "kernel": "exp", "sigma": "shared"}
    for name, value in usual.items():
        if getattr(settings, name) != value:
            raise DataError(f"{name} is {getattr(settings, name)!r}; it has no meaning with a backbone.")
    if settings.loss == "robust":
        raise DataError("loss is 'robust', and with a backbone there is no radius; use loss='margin'.")
    if settings.image_shape is None:
        raise DataError(
            "image_shape is None; with a backbone give (height, width) or (channels, height, width)."
        )
    if settings.epochs is not None and not (isinstance(settings.epochs, tuple) and len(settings.epochs) == 3):
        raise DataError(f"epochs is {settings.epochs!r}; with a backbone give those of its three stages.")
    if not 0 <= settings.least < 1:
        raise DataError(f"least is {settings.least}; it must lie in [0, 1).")
