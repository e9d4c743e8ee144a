"""A mixture of products of categoricals, fitted by expectation maximisation.

    p(x, y) = sum_m w_m p_m(y) prod_i p_mi(x_i)

With two states per variable it is the mixture of Bernoullis. The class is one more variable of every
component, so classification from any observed part is exact, like the likelihood, every marginal, every
conditional and every draw. The number of components is chosen on the validation part. Components are smoothed
towards the overall marginals, which is the maximum a posteriori estimate under a Dirichlet prior, so EM never
lowers the penalised likelihood that `expectation_maximisation` reports.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from jaxtyping import Bool, Float, Int
from rich.progress import track
from torch import Tensor, nn

from paperback.density.interface import Capabilities, Classifying, DensityModel
from paperback.errors import DataError, NotSupportedError
from paperback.numerics.spins import sample_categorical

CHUNK_ENTRIES = 2**22  # one-hot entries held at once


@dataclass(frozen=True)
class Components:
    """The parameters of a mixture, in log space.

    Attributes:
        log_weight: ``(components,)``.
        log_table: ``(components, variables * states)``; 0 at states that a variable does not have.
        log_class: ``(components, classes)``; no columns without classes.
    """

    log_weight: Float[Tensor, " components"]
    log_table: Float[Tensor, "components entries"]
    log_class: Float[Tensor, "components classes"]

    def log_joint(
        self, x: Float[Tensor, "batch entries"], y: Float[Tensor, "batch classes"]
    ) -> Float[Tensor, "batch components"]:
        """log p(x, y, component) of one-hot rows; rows of zeros leave a variable out."""
        return self.log_weight + x @ self.log_table.T + y @ self.log_class.T


class CategoricalMixture(Classifying, DensityModel):
    """A mixture of products of categoricals, exact in every operation.

    Args:
        n_variables: number of variables, >= 1.
        n_states: states of every variable (>= 2), or one number per variable.
        n_components: how many components; of several, the best on the validation part is taken.
        n_classes: number of classes (>= 2), None for a model without a class variable.
        smoothing: pseudo-counts of each variable in each component, spread as the overall marginals; > 0.

    Raises:
        DataError: if an argument is out of range.
    """

    capabilities: Capabilities
    log_weight: Tensor
    log_table: Tensor
    log_class: Tensor

    def __init__(
        self,
        n_variables: int,
        n_states: int | Sequence[int],
        n_components: int | Sequence[int] = (10, 20, 40, 80, 160),
        n_classes: int | None = None,
        smoothing: float = 3.0,
    ) -> None:
        super().__init__(n_variables, n_states)
        self.candidates = (n_components,) if isinstance(n_components, int) else tuple(n_components)
        if not self.candidates or min(self.candidates) < 1:
            raise DataError(
                f"n_components is {n_components}; give one number of at least 1, or several to choose from."
            )
        if n_classes is not None and n_classes < 2:
            raise DataError(f"n_classes is {n_classes}; it must be at least 2, or None.")
        if not smoothing > 0:
            raise DataError(f"smoothing is {smoothing}; it must be greater than 0.")
        self.n_classes = n_classes
        self.smoothing = smoothing
        self.capabilities = Capabilities(
            "exact", "exact", "exact", "exact", "exact", "exact" if n_classes else "none"
        )
        n = self.candidates[0]
        uniform = (1.0 / self.valid.sum(-1, keepdim=True)).log().masked_fill(~self.valid, 0.0).flatten()
        classes = n_classes or 0
        self.register_buffer("log_weight", torch.full((n,), 1.0 / n).log())
        self.register_buffer("log_table", uniform.repeat(n, 1))
        self.register_buffer("log_class", torch.full((n, classes), 1.0 / max(classes, 1)).log())

    @property
    def n_components(self) -> int:
        """Number of components: the chosen one after `fit`, the first candidate before."""
        return len(self.log_weight)

    def fit(
        self,
        X: Int[Tensor, " batch *event"],
        y: Int[Tensor, " batch"] | None = None,
        X_val: Int[Tensor, " batch_val *event"] | None = None,
        y_val: Int[Tensor, " batch_val"] | None = None,
        *,
        seed: int = 0,
        progress: bool = True,
        n_starts: int = 3,
        max_iterations: int = 200,
        tolerance: float = 1e-5,
        **training: Any,
    ) -> Self:
        """Run EM from several starts for each number of components; the best on the validation part stays.

        Args:
            X: states ``(batch, *event)``.
            y: labels ``(batch,)``, required with ``n_classes``.
            X_val: validation states; without them a tenth of X is put aside where there are several numbers
                to choose from.
            y_val: their labels.
            seed: of the starts and of the part put aside.
            progress: show a progress bar.
            n_starts: starts for each number of components, >= 1.
            max_iterations: most EM iterations of one start, >= 1.
            tolerance: EM stops when an iteration gains less than this many nats per row.
            **training: there is no other setting.

        Returns:
            The model itself.

        Raises:
            DataError: if X or y cannot be used, or a setting is unknown or out of range.
        """
        if training:
            raise DataError(f"CategoricalMixture.fit has no setting {next(iter(training))!r}; leave it out.")
        if n_starts < 1 or max_iterations < 1:
            raise DataError(
                f"n_starts is {n_starts} and max_iterations {max_iterations}; both must be at least 1."
            )
        states, labels = self.check_training(X, y)
        generator = torch.Generator(states.device).manual_seed(seed)
        jobs = [m for m in self.candidates for _ in range(n_starts)]
        if X_val is not None:
            val_states, val_labels = self.check_training(X_val, y_val)
        elif len(self.candidates) == 1 or len(states) < 2:
            val_states, val_labels = states, labels
        else:
            order = torch.randperm(len(states), generator=generator, device=states.device)
            held, kept = order[: max(1, len(order) // 10)], order[max(1, len(order) // 10) :]
            val_states, val_labels = states[held], None if labels is None else labels[held]
            states, labels = states[kept], None if labels is None else labels[kept]
        best, best_score = None, -torch.inf
        for n_components in track(jobs, "mixture", disable=not progress, transient=True):
            components, _ = self.expectation_maximisation(
                states, labels, n_components, generator, max_iterations=max_iterations, tolerance=tolerance
            )
            score = self._mean_log_joint(components, val_states, val_labels)
            if best is None or score > best_score:
                best, best_score = components, score
        assert best is not None
        self.log_weight, self.log_table, self.log_class = best.log_weight, best.log_table, best.log_class
        # A saved model is built again with the number that was chosen: its tensors have that shape.
        assert isinstance(self._hub_mixin_config, dict)
        self._hub_mixin_config = {**self._hub_mixin_config, "n_components": self.n_components}
        return self

    def expectation_maximisation(
        self,
        states: Int[Tensor, "batch variables"],
        labels: Int[Tensor, " batch"] | None,
        n_components: int,
        generator: torch.Generator,
        *,
        max_iterations: int,
        tolerance: float,
    ) -> tuple[Components, list[float]]:
        """One run of EM. Components start half way between a random row and the overall marginals.

        Args:
            states: checked states.
            labels: checked labels, or None.
            n_components: number of components.
            generator: of the start.
            max_iterations: most iterations.
            tolerance: stop when an iteration gains less than this many nats per row.

        Returns:
            The components, and the penalised log-likelihood per row before each iteration: it never falls,
            but for rounding.
        """
        n, classes = len(states), self.n_classes or 0
        marginal = self._mean_one_hot(states)
        class_marginal = torch.full((classes,), 1.0 / max(classes, 1)).to(marginal)
        rows = torch.randint(0, n, (n_components,), generator=generator, device=states.device)
        components = Components(
            torch.full((n_components,), 1.0 / n_components).log().to(marginal),
            self._log((self._one_hot(states[rows]) + marginal) / 2),
            class_marginal.log().repeat(n_components, 1),
        )
        history: list[float] = []
        for _ in range(max_iterations):
            likelihood, weight, table, by_class = self._expect(components, states, labels)
            penalty = components.log_weight.sum() + (components.log_table @ marginal).sum()
            penalty = penalty + (components.log_class @ class_marginal).sum()
            history.append((likelihood + self.smoothing * float(penalty)) / n)
            if len(history) > 1 and history[-1] - history[-2] < tolerance:
                break
            total = (weight + self.smoothing)[:, None]
            components = Components(
                ((weight + self.smoothing) / (n + self.smoothing * n_components)).log(),
                self._log((table + self.smoothing * marginal) / total),
                ((by_class + self.smoothing * class_marginal) / total).log(),
            )
        return components, history

    def _expect(
        self, components: Components, states: Tensor, labels: Tensor | None
    ) -> tuple[float, Tensor, Tensor, Tensor]:
        """The E-step, streamed: log-likelihood, expected counts of components, of states and of classes."""
        likelihood = 0.0
        weight, table, by_class = (
            torch.zeros_like(t) for t in (components.log_weight, components.log_table, components.log_class)
        )
        for rows in torch.arange(len(states), device=states.device).split(self._chunk):
            x, y = (
                self._one_hot(states[rows]),
                self._one_hot_class(None if labels is None else labels[rows], len(rows)),
            )
            joint = components.log_joint(x, y)
            log_prob = joint.logsumexp(1)
            responsibility = (joint - log_prob[:, None]).exp()
            likelihood += float(log_prob.double().sum())
            weight += responsibility.sum(0)
            table += responsibility.T @ x
            by_class += responsibility.T @ y
        return likelihood, weight, table, by_class

    def _mean_log_joint(self, components: Components, states: Tensor, labels: Tensor | None) -> float:
        return self._expect(components, states, labels)[0] / len(states)

    @property
    def _chunk(self) -> int:
        return max(1, CHUNK_ENTRIES // (self.n_variables * self.max_states))

    def _one_hot(self, states: Tensor, observed: Tensor | None = None) -> Tensor:
        x = nn.functional.one_hot(states, self.max_states).to(self.log_table)
        return (x if observed is None else x * observed[..., None]).flatten(1)

    def _one_hot_class(self, labels: Tensor | None, n_rows: int) -> Tensor:
        if labels is None:
            return self.log_class.new_zeros(n_rows, self.n_classes or 0)
        return nn.functional.one_hot(labels, self.n_classes or 0).to(self.log_class)

    def _mean_one_hot(self, states: Tensor) -> Tensor:
        counts = sum(self._one_hot(rows).sum(0) for rows in states.split(self._chunk))
        uniform = (self.valid / self.valid.sum(-1, keepdim=True)).to(self.log_table).flatten()
        return (counts + uniform) / (len(states) + 1.0)

    def _log(self, probabilities: Tensor) -> Tensor:
        """Logarithm, 0 at states that a variable does not have, so that 0 times it stays 0."""
        return probabilities.log().masked_fill(~self.valid.flatten(), 0.0)

    # -- queries ---------------------------------------------------------------------------------------------

    def _log_joint(self, states: Tensor, observed: Tensor | None) -> Tensor:
        """log p(x_observed, component), the class summed out: (batch, components)."""
        components = Components(self.log_weight, self.log_table, self.log_class)
        pieces = []
        for rows in torch.arange(len(states), device=states.device).split(self._chunk):
            x = self._one_hot(states[rows], None if observed is None else observed[rows])
            pieces.append(components.log_joint(x, self._one_hot_class(None, len(rows))))
        return torch.cat(pieces)

    def _log_prob(self, states: Tensor, observed: Tensor | None) -> Tensor:
        return self._log_joint(states, observed).logsumexp(1)

    def _conditional(self, states: Tensor, observed: Tensor) -> Tensor:
        table = self.log_table.exp() * self.valid.flatten()
        return (self._log_joint(states, observed).softmax(1) @ table).unflatten(
            1, (self.n_variables, self.max_states)
        )

    def _sample_conditional(self, states: Tensor, observed: Tensor, generator: torch.Generator) -> Tensor:
        component = sample_categorical(self._log_joint(states, observed).softmax(1), generator)
        table = (self.log_table.exp() * self.valid.flatten()).unflatten(
            1, (self.n_variables, self.max_states)
        )
        drawn = [sample_categorical(table[chosen], generator) for chosen in component.split(self._chunk)]
        return torch.where(observed, states, torch.cat(drawn))

    def predict_proba(
        self, X: Int[Tensor, " batch *event"], observed: Bool[Tensor, " batch *event"] | None = None
    ) -> Float[Tensor, "batch classes"]:
        """Exact class probabilities given the observed part.

        Args:
            X: states ``(batch, *event)``.
            observed: mask of the known entries; all, if not given.

        Returns:
            ``(batch, n_classes)``, rows sum to one.

        Raises:
            DataError: if X or the mask does not fit the model.
            NotSupportedError: if the model was built without classes.
        """
        if self.n_classes is None:
            raise NotSupportedError(
                "this CategoricalMixture has no classes; build it with n_classes and fit it with labels."
            )
        return self._log_joint(*self.check(X, observed)).softmax(1) @ self.log_class.exp()
