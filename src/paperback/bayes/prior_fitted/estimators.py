"""Prior-fitted networks as scikit-learn estimators: fitting stores data, predicting is one forward pass."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution

from paperback.bayes.distributions import in_units
from paperback.bayes.interface import BayesianClassifier, BayesianRegressor, as_numpy
from paperback.bayes.prior_fitted.riemann import RiemannDistribution
from paperback.bayes.prior_fitted.training import in_network_units, moments
from paperback.bayes.prior_fitted.transformer import Context, PriorFittedTransformer
from paperback.errors import ArtefactError, DataError, NotSupportedError

FOLDER = Path(__file__).resolve().parents[1] / "files" / "prior-fitted"
Task = tuple[Any, Any, Any]  # features and targets that were seen, features to predict for


class _PriorFitted:
    """What the regressor and the classifier share: the network, and the reading of a context."""

    _shipped: ClassVar[str]
    _heads: ClassVar[tuple[str, ...]]

    network: PriorFittedTransformer | str | Path | None
    allow_extrapolation: bool
    network_: PriorFittedTransformer
    network_settings_: dict[str, Any]
    input_shift_: NDArray[np.float64]
    input_scale_: NDArray[np.float64]
    diagnostics_: dict[str, float]
    context_x_: Tensor
    context_y_: Tensor
    _context: Context

    @classmethod
    def pretrained(cls) -> Self:
        """An estimator with the network that ships: call `fit` with data and then `predict`; no training.

        Raises:
            ArtefactError: if the files are not as they shipped.
        """
        return cls(network=shipped_network(cls._shipped))  # type: ignore[call-arg]

    def why_not(self, X: ArrayLike | Tensor, y: ArrayLike | Tensor) -> str | None:
        """What keeps the network from being used with data, in a sentence; None if nothing does.

        Args:
            X: ``(rows, features)``.
            y: targets.

        Returns:
            What `fit` would raise about the numbers of rows, features or classes.
        """
        rows, features = np.shape(as_numpy(X))
        try:
            network = self._resolved()
            _check_features(network, features)
            _check_context(network, rows, self.allow_extrapolation)
            if network.head == "categorical":
                _check_classes(network, len(np.unique(as_numpy(y))))
        except DataError as error:
            return str(error)
        return None

    def save_pretrained(self, folder: str | Path) -> None:
        """Save the estimator with its network and context; see `SavedEstimator.save_pretrained`."""
        whole = copy.copy(self)
        whole.network = None  # the network itself is the fitted attribute network_
        super(_PriorFitted, whole).save_pretrained(folder)  # type: ignore[misc]

    def _build_modules(self) -> Mapping[str, nn.Module]:
        return {"network_": PriorFittedTransformer(**self.network_settings_)}

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        super()._restore(tensors)  # type: ignore[misc]
        self.network = self.network_
        self._read()

    def _fit_inputs(self, X: NDArray[Any]) -> Tensor:
        """Scale features as the network wants them: not at all where its prior has units."""
        self.network_ = self._resolved()
        self.network_settings_ = self.network_.settings
        _check_features(self.network_, X.shape[1])
        if self.network_.units == "data":
            return super()._fit_inputs(X)  # type: ignore[misc]
        self.input_shift_, self.input_scale_ = np.zeros(X.shape[1]), np.ones(X.shape[1])
        return torch.as_tensor(X, dtype=torch.float64)

    def _resolved(self) -> PriorFittedTransformer:
        network = self.network
        if network is None:
            network = shipped_network(self._shipped)
        elif isinstance(network, str | Path):
            network = PriorFittedTransformer.from_pretrained(network)
        if not int(network.trained_steps):
            raise DataError(
                "the network was not fitted to a prior yet; call fit_prior(network, prior, steps=...) "
                f"first, or take {type(self).__name__}.pretrained()."
            )
        if network.head not in self._heads:
            raise DataError(
                f"the network's head is {network.head!r}; {type(self).__name__} needs one of {self._heads}."
            )
        return network

    def _store(self, x: Tensor, y: Tensor) -> None:
        """Keep the context, ``(n, features)`` and ``(outputs, n)``, and read it; say what is unusual."""
        _check_context(self.network_, len(x), self.allow_extrapolation)
        self.context_x_, self.context_y_ = x, y
        outside_x, outside_y = self.network_.outside_prior(x, y)
        self.diagnostics_ = {
            "context_rows": float(len(x)),
            "rows_outside_prior": outside_x,
            "targets_outside_borders": outside_y,
        }
        for share, what in ((outside_x, "rows of X"), (outside_y, "targets")):
            if share > 0:
                warnings.warn(
                    f"{share:.1%} of the {what} lie outside of all that the prior drew; the prior does not "
                    "describe these data, so rescale them or fit a network to another prior.",
                    UserWarning,
                    stacklevel=4,
                )
        self._read()

    def _read(self) -> None:
        x = self.context_x_.expand(len(self.context_y_), *self.context_x_.shape)
        with torch.no_grad():
            self._context = self.network_.read(x, self.context_y_)

    def _outputs(self, x: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch outputs units"]:
        """What the network's head needs, at any points; each is answered by itself."""
        queries = x.reshape(1, -1, x.shape[-1]).expand(len(self.context_y_), -1, -1)
        with torch.set_grad_enabled(x.requires_grad and torch.is_grad_enabled()):
            answers = self.network_.answer(self._context, queries).transpose(0, 1)
        return answers.reshape(*x.shape[:-1], *answers.shape[1:])


class PriorFittedNetwork(_PriorFitted, BayesianRegressor):
    """Regression by a network that was fitted to a prior: the posterior predictive in one forward pass.

    Args:
        network: a `PriorFittedTransformer` that `fit_prior` has trained, or the folder of one that was saved;
            None is the one that ships, for 1 to 10 features and 2 to 50 rows of any unit.
        allow_extrapolation: warn instead of raising when there are more rows than the network was trained
            with.
        random_state: not used; nothing is random here.

    Attributes:
        diagnostics_: the rows of the context, and the shares of rows and targets outside of all that the
            prior drew.
    """

    _shipped = "regression"
    _heads = ("riemann", "gaussian")

    def __init__(
        self,
        network: PriorFittedTransformer | str | Path | None = None,
        *,
        allow_extrapolation: bool = False,
        random_state: int = 0,
    ) -> None:
        self.network = network
        self.allow_extrapolation = allow_extrapolation
        self.random_state = random_state

    def _fit(self, x: Float[Tensor, "rows features"], y: Float[Tensor, "rows outputs"]) -> None:
        if self.network_.units == "prior":  # then the targets' own units are those of the prior
            y = torch.as_tensor(self.target_shift_) + torch.as_tensor(self.target_scale_) * y
            self.target_shift_ = np.zeros_like(self.target_shift_)
            self.target_scale_ = np.ones_like(self.target_scale_)
        self._store(x, y.mT.contiguous())

    def _law(self, x: Float[Tensor, "*batch features"]) -> Distribution:
        return self.network_.law(self._outputs(x))

    def predict_distribution(self, X: ArrayLike | Tensor) -> Distribution:
        """The law of a new observation in each row, in the units of y, noise included.

        Args:
            X: ``(rows, features)``; a tensor that needs gradients gets them.

        Returns:
            A `RiemannDistribution` (with `ei`), or a normal law for the Gaussian head, of batch shape
            ``(rows,)`` or ``(rows, outputs)``.
        """
        law = self._law(self._inputs(X))
        shift, scale = self._target_units()
        return _in_units(law, shift, scale, flat=self.flat_target_)

    def predict_batch(self, tasks: Sequence[Task]) -> list[Distribution]:
        """Predict for many small data sets at once; those of one shape go through the network together.

        Args:
            tasks: triples of features ``(n, features)``, targets ``(n,)`` and features to predict for
                ``(queries, features)``; n may be 0. The estimator itself need not be fitted, and is not
                changed.

        Returns:
            One law of batch shape ``(queries,)`` for each task, in the units of its targets.

        Raises:
            DataError: if a task's shapes do not fit, it has a number that is not finite, or it is larger than
                the network was trained for.
        """
        network = self._resolved()
        groups: dict[tuple[int, ...], list[int]] = {}
        checked = [_checked_task(i, task) for i, task in enumerate(tasks)]
        for index, (X, _, new) in enumerate(checked):
            groups.setdefault((*X.shape, len(new)), []).append(index)
        laws: dict[int, Distribution] = {}
        for (n, features, _), members in groups.items():
            _check_features(network, features)
            _check_context(network, n, self.allow_extrapolation)
            X, y, new = (torch.stack(parts) for parts in zip(*(checked[i] for i in members), strict=True))
            with torch.no_grad():
                units = in_network_units(network, X, y, new, y[:, :0])
                outputs = network.answer(network.read(units.context_x, units.context_y), units.x)
            shift, scale = y.new_zeros(len(y), 1), y.new_ones(len(y), 1)
            if network.units == "data":
                shift, scale = (part[..., 0] for part in moments(y[..., None]))
            for row, index in enumerate(members):
                laws[index] = _in_units(network.law(outputs[row]), shift[row], scale[row], flat=False)
        return [laws[i] for i in range(len(checked))]

    def sample_path(
        self, X: ArrayLike | Tensor, n: int = 1, *, seed: int = 0
    ) -> Float[Tensor, "n rows *outputs"]:
        """Draw joint observations, one row after the other: each draw is fed back as a row of the context.

        This is the network's own joint law; it depends a little on the order of the rows, since the network
        only approximates a posterior. Noise is included.

        Args:
            X: ``(rows, features)``; context and rows together must not exceed the network's largest context
                by more than one.
            n: number of draws.
            seed: of the draws.

        Returns:
            ``(n, rows)`` or ``(n, rows, outputs)`` as the targets were, float64.

        Raises:
            DataError: if n < 1 or there are too many rows.
        """
        if n < 1:
            raise DataError(f"n is {n}; draw at least one path.")
        x = self._inputs(X).detach()
        _check_context(self.network_, len(self.context_x_) + len(x) - 1, self.allow_extrapolation)
        draws = torch.Generator().manual_seed(seed)
        outputs = len(self.context_y_)
        context_x = self.context_x_.expand(n * outputs, -1, -1)
        context_y = self.context_y_.repeat(n, 1)
        with torch.no_grad():
            for row in x:
                here = row.expand(n * outputs, 1, -1)
                law = self.network_.law(self.network_(context_x, context_y, here))
                uniform = torch.rand(n * outputs, 1, generator=draws, dtype=torch.float64)
                context_y = torch.cat([context_y, law.icdf(uniform.clamp_min(1e-12))], 1)
                context_x = torch.cat([context_x, here], 1)
        values = context_y[:, -len(x) :].reshape(n, outputs, len(x)).mT
        shift, scale = self._target_units()
        values = shift + scale * values
        return values[..., 0] if self.flat_target_ else values

    def sample_functions(self, X: ArrayLike | Tensor, n: int = 1, *, seed: int = 0) -> Tensor:
        """Not there: queries are independent given the context.

        Raises:
            NotSupportedError: always; it names `sample_path`.
        """
        raise NotSupportedError(
            "a prior-fitted network predicts each row by itself, so it has no joint law of functions; "
            "sample_path(X, n) draws joint observations row by row."
        )


class PriorFittedClassifier(_PriorFitted, BayesianClassifier):
    """Classification by a network that was fitted to a prior over labelled tables.

    Args:
        network: as of `PriorFittedNetwork`, with the head "categorical"; None is the one that ships, for 1 to
            20 features and up to 50 rows of any unit, and 2 to 4 classes.
        allow_extrapolation: warn instead of raising when there are more rows than the network was trained
            with.
        random_state: not used; nothing is random here.
    """

    _shipped = "classification"
    _heads = ("categorical",)

    def __init__(
        self,
        network: PriorFittedTransformer | str | Path | None = None,
        *,
        allow_extrapolation: bool = False,
        random_state: int = 0,
    ) -> None:
        self.network = network
        self.allow_extrapolation = allow_extrapolation
        self.random_state = random_state

    def _fit(self, x: Float[Tensor, "rows features"], labels: Int[Tensor, " rows"]) -> None:
        _check_classes(self.network_, len(self.classes_))
        self._store(x, labels[None])

    def _probabilities(self, x: Float[Tensor, "rows features"]) -> Float[Tensor, "rows classes"]:
        logits = self._outputs(x)[..., 0, : len(self.classes_)]  # absent classes get no probability
        law = self.network_.law(logits)
        assert isinstance(law, Categorical)
        return law.probs


@cache
def shipped_network(name: str) -> PriorFittedTransformer:
    """A network that ships, made by ``recipes/prior_fitted.py``.

    Args:
        name: "regression" or "classification".

    Returns:
        The network, in evaluation mode; it is loaded once, so do not change it.

    Raises:
        ArtefactError: if its files are missing, or not those that shipped: config.json has their SHA-256.
    """
    folder = FOLDER / name
    if not folder.is_dir():
        raise ArtefactError(f"{folder} is missing; it ships with paperback, so install paperback again.")
    return PriorFittedTransformer.from_pretrained(folder)


def _in_units(law: Distribution, shift: Tensor, scale: Tensor, *, flat: bool) -> Distribution:
    """As `distributions.in_units`, but bars stay bars: they keep their expected improvement."""
    if not isinstance(law, RiemannDistribution):
        return in_units(law, shift, scale, flat=flat)
    logits, shift, scale = law.log_probs, shift.expand(law.batch_shape), scale.expand(law.batch_shape)
    if flat:
        logits, shift, scale = logits[..., 0, :], shift[..., 0], scale[..., 0]
    return RiemannDistribution(logits, law.borders, shift, scale)


def _check_features(network: PriorFittedTransformer, features: int) -> None:
    if features > network.num_features:
        raise DataError(
            f"X has {features} features and the network was made for at most {network.num_features}; leave "
            "some out, or fit a network with a larger num_features to a prior."
        )


def _check_classes(network: PriorFittedTransformer, classes: int) -> None:
    if classes > network.n_classes:
        raise DataError(
            f"y has {classes} classes and the network was made for {network.n_classes}; fit a network with "
            "more classes to a prior."
        )


def _check_context(network: PriorFittedTransformer, rows: int, allow_extrapolation: bool) -> None:
    if rows < network.fewest_rows:
        raise DataError(
            f"there is {rows} sample; the network standardises targets by the rows it sees, so give at least "
            f"{network.fewest_rows}."
        )
    if rows <= network.max_context:
        return
    found = f"there are {rows} rows and the network was trained with at most {network.max_context}"
    if not allow_extrapolation:
        raise DataError(f"{found}; give fewer rows, or allow_extrapolation=True to try it.")
    warnings.warn(f"{found}; it extrapolates.", UserWarning, stacklevel=5)


def _checked_task(index: int, task: Iterable[Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Features, targets and new features of a task, float64."""
    X, y, new = (torch.as_tensor(np.asarray(as_numpy(part), dtype=np.float64)) for part in task)
    if X.ndim != 2 or new.ndim != 2 or y.shape != X.shape[:1] or new.shape[1] != X.shape[1]:
        raise DataError(
            f"task {index} has shapes {tuple(X.shape)}, {tuple(y.shape)} and {tuple(new.shape)}; give (n, "
            "features), (n,) and (queries, features)."
        )
    if not all(bool(part.isfinite().all()) for part in (X, y, new)):
        raise DataError(f"task {index} holds a number that is not finite; remove or fill it first.")
    return X, y, new
