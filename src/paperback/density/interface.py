"""What every density model does.

A density model is a joint distribution over discrete variables, x = (x_1 .. x_D) with x_i in {0 .. n_states_i
- 1}. Data are integer tensors of shape ``(batch, *event)``; the event shape is kept in what comes back, so a
batch of 28x28 grey levels may be given as it is. A mask ``observed`` is a boolean tensor of the same shape,
True where the value is known; what stands elsewhere in X is ignored.

A `TabularGenerator` is the other kind of method of this wing: it learns a table as it is, with mixed columns,
and draws new rows of it. It has no likelihood. The two meet on tables: a density model on the states of
`TableBins` draws rows too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from paperback.errors import DataError, NotSupportedError
from paperback.saving import Saved

if TYPE_CHECKING:
    import pandas as pd

Exactness = Literal["exact", "bound", "estimate", "none"]
How = Literal["sample", "mean", "mode"]


@dataclass(frozen=True)
class Interval:
    """Two-sided bounds on a quantity that the model cannot compute exactly.

    Attributes:
        lower: what the quantity is at least, any shape.
        upper: what it is at most, same shape.
    """

    lower: Tensor
    upper: Tensor

    @property
    def width(self) -> Tensor:
        """How much is left open: upper - lower."""
        return self.upper - self.lower


@dataclass(frozen=True)
class Capabilities:
    """How well a model does each operation.

    "exact", "bound" (an `Interval`), "estimate" (Monte Carlo or variational) or "none".
    """

    log_prob: Exactness = "none"
    marginal: Exactness = "none"
    conditional: Exactness = "none"
    sample: Exactness = "none"
    sample_conditional: Exactness = "none"
    classify: Exactness = "none"

    def as_dict(self) -> dict[str, Exactness]:
        """The same as a plain dictionary, operation to exactness."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


class DensityModel(Saved, nn.Module, ABC):
    """A joint distribution over discrete variables, with any of them observed.

    A subclass sets `capabilities` (of the class, or of the object where they depend on its size), calls
    ``super().__init__(n_variables, n_states)`` and implements `fit`, `_conditional` and what else it can;
    what it cannot raises `NotSupportedError` naming a model that can. The underscored methods receive
    checked, flattened input on the device of the model: states ``(batch, n_variables)`` int64 and a mask of
    that shape (or None).

    Args:
        n_variables: number of variables D >= 1.
        n_states: number of states of every variable (>= 2), or one number per variable.

    Raises:
        DataError: if a number is out of range or the two disagree.
    """

    capabilities: Capabilities
    valid: Tensor
    n_classes: int | None = None  # set by models that hold a class variable, see `Classifying`

    def __init__(self, n_variables: int, n_states: int | Sequence[int]) -> None:
        super().__init__()
        states = (n_states,) * n_variables if isinstance(n_states, int) else tuple(int(k) for k in n_states)
        if n_variables < 1 or len(states) != n_variables:
            raise DataError(
                f"n_states lists {len(states)} variables, but n_variables is {n_variables}; give one each."
            )
        if min(states) < 2:
            raise DataError(
                f"variable {states.index(min(states))} has {min(states)} state(s); it needs at least 2."
            )
        self.n_variables = n_variables
        self.n_states = states
        self.max_states = max(states)
        valid = torch.arange(self.max_states) < torch.tensor(states)[:, None]
        self.register_buffer("valid", valid, persistent=False)  # (variables, max_states): which states exist

    # -- what a user calls ----------------------------------------------------------------------------------

    @abstractmethod
    def fit(
        self,
        X: Int[Tensor, " batch *event"],
        y: Int[Tensor, " batch"] | None = None,
        X_val: Int[Tensor, " batch_val *event"] | None = None,
        y_val: Int[Tensor, " batch_val"] | None = None,
        *,
        seed: int = 0,
        progress: bool = True,
        **training: Any,
    ) -> Self:
        """Fit the model to complete data.

        Args:
            X: states, integer, ``(batch, *event)`` with D entries per event.
            y: class labels ``(batch,)``, for models that classify; others ignore it.
            X_val: held-out states on which early stopping and model selection are decided.
            y_val: their labels.
            seed: of every random draw in the fit; the same seed gives the same model on the same machine.
            progress: show a progress bar.
            **training: settings of the training of this model, such as ``epochs``.

        Returns:
            The model itself.

        Raises:
            DataError: if X or y cannot be used.
        """

    def log_prob(
        self, X: Int[Tensor, " batch *event"], observed: Bool[Tensor, " batch *event"] | None = None
    ) -> Float[Tensor, " batch"] | Interval:
        """Log-probability of each row, in nats.

        Args:
            X: states, ``(batch, *event)``.
            observed: mask of the known entries; the others are summed out, which gives the log marginal of
                the observed part.

        Returns:
            ``(batch,)``, or an `Interval` of that shape where the model has bounds only.

        Raises:
            DataError: if X or the mask does not fit the model.
            NotSupportedError: if the model has no likelihood.
        """
        states, mask = self.check(X, observed)
        return self._log_prob(states, mask)

    def conditional(
        self, X: Int[Tensor, " batch *event"], observed: Bool[Tensor, " batch *event"]
    ) -> Float[Tensor, "batch ... states"]:
        """Marginals of each variable given the observed ones, p(x_i = k | x_observed).

        Args:
            X: states, ``(batch, *event)``; unobserved entries are ignored.
            observed: mask of the known entries.

        Returns:
            Probabilities ``(batch, *event, max_states)``; one-hot at observed entries, zero at states that a
            variable does not have.

        Raises:
            DataError: if X or the mask does not fit the model.
        """
        states, mask = self.check(X, observed)
        assert mask is not None
        probabilities = self._conditional(states, mask)
        known = nn.functional.one_hot(states, self.max_states).to(probabilities)
        return torch.where(mask[..., None], known, probabilities).reshape(*X.shape, self.max_states)

    def complete(
        self,
        X: Int[Tensor, " batch *event"],
        observed: Bool[Tensor, " batch *event"],
        how: How = "mode",
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Fill in what was not observed; observed entries come back untouched.

        Args:
            X: states, ``(batch, *event)``; unobserved entries are ignored.
            observed: mask of the known entries.
            how: "mode" takes the most probable state of each variable, "mean" the expected state (for ordered
                states; float), "sample" one joint draw from p(x_unobserved | x_observed).
            generator: source of randomness for "sample"; a fresh one with seed 0 if not given.

        Returns:
            ``(batch, *event)``: of X's dtype, or float32 for "mean".

        Raises:
            DataError: if X, the mask or `how` cannot be used.
            NotSupportedError: if the model cannot sample from its conditional.
        """
        states, mask = self.check(X, observed)
        assert mask is not None
        if how == "sample":
            generator = generator if generator is not None else torch.Generator(states.device).manual_seed(0)
            filled = self._sample_conditional(states, mask, generator)
        elif how == "mode":
            filled = self._conditional(states, mask).argmax(-1)
        elif how == "mean":
            probabilities = self._conditional(states, mask)
            filled = probabilities @ torch.arange(self.max_states).to(probabilities)
        else:
            raise DataError(f'how is {how!r}; it must be "sample", "mean" or "mode".')
        result = torch.where(mask, states.to(filled.dtype), filled).reshape(X.shape)
        return result.float().to(X.device) if how == "mean" else result.to(X)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Int[Tensor, "n variables"]:
        """Draw from the joint distribution.

        Args:
            n: how many, >= 1.
            generator: source of randomness; a fresh one with seed 0 if not given.

        Returns:
            States ``(n, n_variables)`` int64.

        Raises:
            DataError: if n < 1.
            NotSupportedError: if the model cannot sample.
        """
        if n < 1:
            raise DataError(f"n is {n}; ask for at least one sample.")
        device = self.valid.device
        return self._sample(n, generator if generator is not None else torch.Generator(device).manual_seed(0))

    def bits_per_dim(self, X: Int[Tensor, " batch *event"]) -> Float[Tensor, ""] | Interval:
        """Mean negative log2-probability per variable, lower is better; an `Interval` where `log_prob` is."""
        log_prob = self.log_prob(X)
        scale = -1.0 / (self.n_variables * torch.log(torch.tensor(2.0)).item())
        if isinstance(log_prob, Interval):
            return Interval(log_prob.upper.mean() * scale, log_prob.lower.mean() * scale)
        return log_prob.mean() * scale

    # -- what a subclass fills in ---------------------------------------------------------------------------

    @abstractmethod
    def _conditional(self, states: Tensor, observed: Tensor) -> Tensor:
        """Marginals ``(batch, variables, max_states)`` given the observed entries, summing to one."""

    def _log_prob(self, states: Tensor, observed: Tensor | None) -> Tensor | Interval:
        raise NotSupportedError(
            f"{type(self).__name__} has no likelihood; CategoricalMixture has an exact one."
        )

    def _sample(self, n: int, generator: torch.Generator) -> Tensor:
        """A joint draw is a conditional draw with nothing observed."""
        nothing = torch.zeros(n, self.n_variables, dtype=torch.bool, device=self.valid.device)
        return self._sample_conditional(nothing.long(), nothing, generator)

    def _sample_conditional(self, states: Tensor, observed: Tensor, generator: torch.Generator) -> Tensor:
        raise NotSupportedError(
            f"{type(self).__name__} cannot draw from its conditional; CategoricalMixture can."
        )

    # -- checks ---------------------------------------------------------------------------------------------

    def check(self, X: Tensor, observed: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Check and flatten states and mask.

        Both become ``(batch, variables)`` on the model's device, states int64 with unobserved entries 0.

        Raises:
            DataError: naming what does not fit: dtype, number of variables, the range of a state, the shape
                of the mask.
        """
        device = self.valid.device
        if X.dtype.is_floating_point or X.dtype.is_complex or X.dtype == torch.bool:
            raise DataError(
                f"X has dtype {X.dtype}; expected integer states (quantise first, for example with GreyBins)."
            )
        if X.ndim < 2 or X[0:1].numel() != self.n_variables * min(len(X), 1):
            raise DataError(
                f"X has shape {tuple(X.shape)}; expected (batch, ...) with {self.n_variables} variables each."
            )
        states = X.reshape(len(X), self.n_variables).to(device, torch.int64)
        mask = None
        if observed is not None:
            if observed.dtype != torch.bool:
                raise DataError(
                    f"the mask has dtype {observed.dtype}; it must be boolean, True where the value is known."
                )
            if observed.shape != X.shape:
                raise DataError(
                    f"the mask has shape {tuple(observed.shape)}, X has {tuple(X.shape)}; they must be equal."
                )
            mask = observed.reshape(states.shape).to(device)
            states = states.masked_fill(~mask, 0)
        limit = self.valid.sum(-1)
        outside = (states < 0) | (states >= limit)
        if outside.any():
            row, column = (int(i) for i in outside.nonzero()[0])
            raise DataError(
                f"row {row}, variable {column} has state {int(states[row, column])}; "
                f"it must lie in 0..{int(limit[column]) - 1}."
            )
        return states, mask

    def check_training(self, X: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Check and flatten a training or validation set; like `check`, and the labels with it.

        Labels are for models that hold a class variable: there they are required, elsewhere they are left
        out.

        Raises:
            DataError: as `check`; also if there is no row, or the labels are missing or do not fit.
        """
        states, _ = self.check(X)
        if len(states) == 0:
            raise DataError("X has no rows; a model needs at least one to be fitted.")
        if self.n_classes is None:
            return states, None
        if y is None:
            raise DataError(
                f"{type(self).__name__} has {self.n_classes} classes; fit needs the labels y too."
            )
        if y.shape != (len(X),) or y.dtype.is_floating_point or y.dtype.is_complex or y.dtype == torch.bool:
            raise DataError(
                f"y has shape {tuple(y.shape)} and dtype {y.dtype}; expected {len(X)} integer labels."
            )
        labels = y.to(states.device, torch.int64)
        outside = (labels < 0) | (labels >= self.n_classes)
        if outside.any():
            row = int(outside.nonzero()[0])
            raise DataError(
                f"row {row} has label {int(labels[row])}; it must lie in 0..{self.n_classes - 1}."
            )
        return states, labels


class Classifying(ABC):
    """Mixin for density models that also hold a class variable: they classify from any observed part."""

    n_classes: int | None

    @abstractmethod
    def predict_proba(
        self, X: Int[Tensor, " batch *event"], observed: Bool[Tensor, " batch *event"] | None = None
    ) -> Float[Tensor, "batch classes"]:
        """Class probabilities given the observed part.

        Args:
            X: states, ``(batch, *event)``.
            observed: mask of the known entries; all, if not given.

        Returns:
            ``(batch, n_classes)``, rows sum to one.

        Raises:
            DataError: if X or the mask does not fit the model.
            NotSupportedError: if the model was built without classes.
        """

    def predict(
        self, X: Int[Tensor, " batch *event"], observed: Bool[Tensor, " batch *event"] | None = None
    ) -> Int[Tensor, " batch"]:
        """The most probable class of each row, ``(batch,)`` int64."""
        return self.predict_proba(X, observed).argmax(-1)


@runtime_checkable
class TabularGenerator(Protocol):
    """A generator of tables with mixed columns."""

    def fit(self, frame: pd.DataFrame, *, seed: int = 0, progress: bool = True, **training: Any) -> Self:
        """Learn a table.

        Args:
            frame: the training rows: numbers, booleans, text or categories; cells may be empty.
            seed: of every random draw in the fit; the same seed gives the same model on the same machine.
            progress: show a progress bar.
            **training: settings of the training of this model, such as ``epochs``.

        Returns:
            The model itself.

        Raises:
            DataError: if the table cannot be used.
        """

    def sample(self, n: int, generator: torch.Generator | None = None) -> pd.DataFrame:
        """Draw rows.

        Args:
            n: how many, >= 1.
            generator: source of randomness; a fresh one with seed 0 if not given.

        Returns:
            A table with the columns and types of the training rows.

        Raises:
            DataError: if n < 1 or the model is not fitted.
        """
