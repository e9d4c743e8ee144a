"""A restricted Boltzmann machine over categorical variables, with a class variable if labels are given.

It is trained on the likelihood gradient with persistent chains (Tieleman 2008) or with contrastive divergence
(Hinton 2002); the class is one more softmax variable of the visible side (Larochelle & Bengio 2008). Free
energies are exact. The likelihood is exact where one side of the machine is small, and otherwise estimated by
annealed importance sampling (Salakhutdinov & Murray 2008).

The default settings were chosen on 8x8 digits in 4 grey levels (1,150 rows to fit, 287 to choose on, 40 % of
the pixels observed), before any test row was looked at. Tried: learning rates .003 to .02 with Adam and .05
to .1 with plain and centred gradient descent, k of 1, 2, 5 and 10, momentum 0, .5 and .9, weight decay 0 to
1, 64 to 400 hidden units, 60 to 250 epochs, batches of 50 and 100, 100 and 400 chains, averaged weights. What
mattered: a learning rate that falls to zero, and no momentum (chains cannot follow a parameter with
momentum). Longer training went on improving Gibbs inference and made mean field worse; 90 epochs with weight
decay .3 is best for the two together.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal, Self, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from paperback.density.baselines.rbm.energy import Weights, tempered_step
from paperback.density.baselines.rbm.inference import Beliefs, Inference, Posterior, gibbs, mean_field
from paperback.density.baselines.rbm.objective import LikelihoodGradient, adam, mean_pseudo_log_likelihood
from paperback.density.baselines.rbm.partition import anneal_log_partition, exact_log_marginal, is_small
from paperback.density.interface import Capabilities, Classifying, DensityModel
from paperback.errors import DataError, NotSupportedError
from paperback.numerics.spins import LogPartition
from paperback.training import generator as named_generator
from paperback.training import train

CHUNK_ENTRIES = 2**22  # one-hot entries held at once in inference
INITIAL_WEIGHT = 0.01


class CategoricalRBM(Classifying, DensityModel):
    """A restricted Boltzmann machine with softmax visible variables and binary hidden units.

    Args:
        n_variables: number of visible variables, >= 1.
        n_states: states of every variable (>= 2), or one number per variable.
        n_hidden: number of hidden units, >= 1.
        n_classes: number of classes (>= 2), None for a machine without a class variable.
        inference: how `conditional`, `complete` and `predict` answer: "gibbs", "meanfield" or "parallel"; see
            `infer`.
        n_sweeps: Gibbs sweeps of an answer and of a draw, >= 2.

    Raises:
        DataError: if an argument is out of range.
    """

    base_visible: Tensor
    base_label: Tensor

    def __init__(
        self,
        n_variables: int,
        n_states: int | Sequence[int],
        n_hidden: int = 200,
        n_classes: int | None = None,
        inference: Inference = "gibbs",
        n_sweeps: int = 500,
    ) -> None:
        super().__init__(n_variables, n_states)
        if n_hidden < 1:
            raise DataError(f"n_hidden is {n_hidden}; it must be at least 1.")
        if n_classes is not None and n_classes < 2:
            raise DataError(f"n_classes is {n_classes}; it must be at least 2, or None.")
        if n_sweeps < 2:
            raise DataError(f"n_sweeps is {n_sweeps}; it must be at least 2.")
        self.n_hidden = n_hidden
        self.n_classes = n_classes
        self.inference = _check_inference(inference)
        self.n_sweeps = n_sweeps
        self.is_small = is_small(self.n_states, n_hidden)
        self.capabilities = Capabilities(
            log_prob="exact" if self.is_small else "estimate",
            marginal="exact" if self.is_small else "none",
            conditional="estimate",
            sample="estimate",
            sample_conditional="estimate",
            classify="estimate" if n_classes else "none",
        )
        entries, classes = n_variables * self.max_states, n_classes or 0
        self.weight = nn.Parameter(torch.zeros(entries, n_hidden))
        self.label_weight = nn.Parameter(torch.zeros(classes, n_hidden))
        self.visible_bias = nn.Parameter(torch.zeros(entries))
        self.label_bias = nn.Parameter(torch.zeros(classes))
        self.hidden_bias = nn.Parameter(torch.zeros(n_hidden))
        # Logits of the independent model that annealing starts from: the data's marginals after `fit`.
        self.register_buffer("base_visible", torch.zeros(entries))
        self.register_buffer("base_label", torch.zeros(classes))
        self._known_partition: tuple[tuple[float, ...], LogPartition] | None = None

    @property
    def weights(self) -> Weights:
        """The parameters, with the functions that follow from them in closed form."""
        return Weights(
            self.weight, self.label_weight, self.visible_bias, self.label_bias, self.hidden_bias, self.valid
        )

    # -- fitting ---------------------------------------------------------------------------------------------

    def fit(
        self,
        X: Int[Tensor, " batch *event"],
        y: Int[Tensor, " batch"] | None = None,
        X_val: Int[Tensor, " batch_val *event"] | None = None,
        y_val: Int[Tensor, " batch_val"] | None = None,
        *,
        seed: int = 0,
        progress: bool = True,
        algorithm: Literal["pcd", "cd"] = "pcd",
        k: int = 2,
        epochs: int = 90,
        batch_size: int = 100,
        lr: float = 0.01,
        weight_decay: float = 0.3,
        patience: int | None = None,
        **training: Any,
    ) -> Self:
        """Follow the likelihood gradient, its negative part estimated by Gibbs chains.

        The learning rate falls linearly to zero. With a validation part the epoch with the best
        pseudo-likelihood on it is kept.

        Args:
            X: states ``(batch, *event)``.
            y: labels ``(batch,)``, required with ``n_classes``.
            X_val: validation states.
            y_val: their labels.
            seed: of initial weights, order and chains.
            progress: show a progress bar.
            algorithm: "pcd" keeps its chains from step to step, "cd" starts them at the data.
            k: Gibbs steps of the chains per update, >= 1.
            epochs: passes over the rows, >= 1.
            batch_size: rows of an update and number of chains, >= 1.
            lr: learning rate of Adam at the start.
            weight_decay: decoupled decay of the couplings (not of the biases), >= 0.
            patience: stop after so many epochs without a better pseudo-likelihood on the validation part.
            **training: further settings of `paperback.training.train`.

        Returns:
            The model itself.

        Raises:
            DataError: if X or y cannot be used, or a setting is out of range.
        """
        if algorithm not in ("pcd", "cd"):
            raise DataError(f'algorithm is {algorithm!r}; it must be "pcd" or "cd".')
        if k < 1:
            raise DataError(f"k is {k}; it must be at least 1.")
        rows = self._one_hot_rows(*self.check_training(X, y))
        val_rows = None if X_val is None else self._one_hot_rows(*self.check_training(X_val, y_val))
        self._initialise(rows, seed)
        start = torch.randint(0, len(X), (batch_size,), generator=named_generator(seed, "chains"))
        gradient = LikelihoodGradient((rows[0][start], rows[1][start]), k, persistent=algorithm == "pcd")

        def validate(model: CategoricalRBM, batch: tuple[Tensor, ...], generator: torch.Generator) -> Tensor:
            return -mean_pseudo_log_likelihood(model.weights, batch[0], batch[1], generator)

        settings: dict[str, Any] = {"schedule": "linear", "description": "RBM", **training}
        train(
            self,
            lambda model, batch, generator: gradient(model.weights, batch, generator),
            rows,
            val_tensors=val_rows,
            val_metric=None if val_rows is None else validate,
            optimizer=adam(lr, weight_decay),
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            patience=patience,
            seed=seed,
            progress=progress,
            **settings,
        )
        return self

    @torch.no_grad()
    def _initialise(self, rows: tuple[Tensor, Tensor], seed: int) -> None:
        """Small random couplings, biases at the base rates of the data."""
        v, y = rows
        uniform = (self.valid / self.valid.sum(-1, keepdim=True)).to(v).flatten()
        base = ((v.sum(0) + uniform) / (len(v) + 1.0)).log().masked_fill(~self.valid.flatten(), 0.0)
        self.base_visible.copy_(base)
        self.visible_bias.copy_(base)
        if self.n_classes is not None:
            self.base_label.copy_(((y.sum(0) + 1.0 / self.n_classes) / (len(y) + 1.0)).log())
            self.label_bias.copy_(self.base_label)
        self.hidden_bias.zero_()
        generator = named_generator(seed, "weights")
        for couplings in (self.weight, self.label_weight):
            couplings.copy_(INITIAL_WEIGHT * torch.randn(couplings.shape, generator=generator))
        self.weight.mul_(self.valid.flatten()[:, None])

    def _one_hot_rows(self, states: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        v = nn.functional.one_hot(states, self.max_states).to(self.weight.dtype).flatten(1)
        if labels is None:
            return v, v.new_zeros(len(v), 0)
        return v, nn.functional.one_hot(labels, self.n_classes or 0).to(v)

    # -- energies --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def free_energy(
        self, X: Int[Tensor, " batch *event"], y: Int[Tensor, " batch"] | None = None
    ) -> Float[Tensor, " batch"]:
        """Minus the unnormalised log-probability of complete rows, the hidden units summed out; exact.

        Args:
            X: states ``(batch, *event)``.
            y: labels ``(batch,)``; without them the class is summed out too.

        Returns:
            Free energies ``(batch,)``, in nats.

        Raises:
            DataError: if X or y does not fit the model.
        """
        if y is None:
            v, _ = self._one_hot_rows(self.check(X)[0], None)
            return -self.weights.log_weight_by_class(v).logsumexp(1)
        return -self.weights.log_weight(*self._one_hot_rows(*self.check_training(X, y)))

    @torch.no_grad()
    def log_partition(self, n_chains: int = 100, n_temperatures: int = 1000, seed: int = 0) -> LogPartition:
        """The log-partition function: exact if one side has at most 2^20 states, otherwise annealed.

        Args:
            n_chains: chains of the estimate.
            n_temperatures: temperatures of the estimate.
            seed: of the estimate.

        Returns:
            The value with its standard error, which is 0 where it is exact.
        """
        if self.is_small:
            nothing = torch.zeros(1, self.n_variables, dtype=torch.bool, device=self.valid.device)
            v = self.weight.new_zeros(1, len(self.weight))
            return LogPartition(float(exact_log_marginal(self.weights, self.n_states, v, nothing)))
        base = (self.base_visible, self.base_label)
        return anneal_log_partition(
            self.weights, base, n_chains=n_chains, n_temperatures=n_temperatures, seed=seed
        )

    @torch.no_grad()
    def _log_prob(self, states: Tensor, observed: Tensor | None) -> Tensor:
        v, _ = self._one_hot_rows(states, None)
        if observed is None or bool(observed.all()):
            log_weight = self.weights.log_weight_by_class(v).logsumexp(1)
        elif self.is_small:
            log_weight = exact_log_marginal(self.weights, self.n_states, v, observed)
        else:
            raise NotSupportedError(
                "a CategoricalRBM of this size cannot compute the likelihood of an observed part; "
                "CategoricalMixture has it exactly."
            )
        return log_weight - self._partition().value

    def _partition(self) -> LogPartition:
        """`log_partition`, kept for as long as the parameters stay as they are."""
        key = tuple(float(p.double().sum()) for p in self.parameters())
        if self._known_partition is None or self._known_partition[0] != key:
            self._known_partition = (key, self.log_partition())
        return self._known_partition[1]

    # -- inference -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def infer(
        self,
        X: Int[Tensor, " batch *event"],
        observed: Bool[Tensor, " batch *event"],
        method: Inference | None = None,
        *,
        n_sweeps: int | None = None,
        n_chains: int = 1,
        max_iterations: int = 1000,
        tolerance: float = 1e-4,
        random_start: bool = False,
        seed: int = 0,
    ) -> Posterior:
        """Marginals of the unobserved variables, the class and the hidden units, given the observed ones.

        Args:
            X: states ``(batch, *event)``; unobserved entries are ignored.
            observed: mask of the known entries.
            method: "gibbs" averages over sweeps; "meanfield" alternates between the two sides; "parallel"
                updates both at once, undamped. The model's own `inference`, if not given.
            n_sweeps: Gibbs: sweeps that are averaged, after a fifth as many that are not; the model's own, if
                not given.
            n_chains: Gibbs: independent chains for each row.
            max_iterations: mean field: most updates.
            tolerance: mean field: of the largest change of a marginal.
            random_start: mean field: start from random values, drawn with `seed`, instead of base rates and
                undecided hidden units.
            seed: of chains and random starts.

        Returns:
            The marginals, and for each row iterations, residual and whether it converged.

        Raises:
            DataError: if X, the mask or the method cannot be used.
        """
        method = self.inference if method is None else _check_inference(method)
        n_sweeps = self.n_sweeps if n_sweeps is None else n_sweeps
        if n_sweeps < 2 or n_chains < 1 or max_iterations < 1:
            raise DataError(
                f"n_sweeps is {n_sweeps}, n_chains {n_chains}, max_iterations {max_iterations}; "
                "they must be at least 2, 1 and 1."
            )
        states, mask = self.check(X, observed)
        assert mask is not None
        known = nn.functional.one_hot(states, self.max_states).to(self.weight.dtype)
        generator = torch.Generator(known.device).manual_seed(seed)
        parts = []
        for rows in torch.arange(len(states), device=known.device).split(self._chunk(n_chains)):
            if method == "gibbs":
                part = gibbs(
                    self.weights,
                    known[rows],
                    mask[rows],
                    n_sweeps=n_sweeps,
                    burn_in=n_sweeps // 5,
                    n_chains=n_chains,
                    tolerance=tolerance,
                    generator=generator,
                )
            else:
                part = mean_field(
                    self.weights,
                    known[rows],
                    mask[rows],
                    parallel=method == "parallel",
                    max_iterations=max_iterations,
                    tolerance=tolerance,
                    start=self._start(len(rows), generator if random_start else None),
                )
            parts.append(part)
        return Posterior.join(parts)

    def _start(self, n: int, generator: torch.Generator | None) -> Beliefs:
        """First values of a mean field: base rates and undecided hidden units, or random ones."""
        visible = self.base_visible.unflatten(0, self.valid.shape).expand(n, -1, -1)
        label, hidden = self.base_label.expand(n, -1), visible.new_full((n, self.n_hidden), 0.5)
        if generator is not None:
            # The softmax of log-exponentials is uniform on the simplex.
            visible = torch.empty_like(visible).exponential_(generator=generator).log()
            label = torch.empty_like(label).exponential_(generator=generator).log()
            hidden = torch.rand(hidden.shape, generator=generator, dtype=hidden.dtype, device=hidden.device)
        return visible.masked_fill(~self.valid, -torch.inf).softmax(-1), label.softmax(-1), hidden

    def _infer_warning(self, states: Tensor, observed: Tensor) -> Posterior:
        """`infer`, with a warning where a mean field did not settle."""
        posterior = self.infer(states, observed)
        failed = int((~posterior.converged).sum())
        if failed and self.inference != "gibbs":
            warnings.warn(
                f"{failed} of {len(states)} rows did not reach a fixed point of the {self.inference} update "
                f"(largest residual {float(posterior.residual.max()):.2g}).",
                RuntimeWarning,
                stacklevel=3,
            )
        return posterior

    def _conditional(self, states: Tensor, observed: Tensor) -> Tensor:
        return self._infer_warning(states, observed).visible

    @torch.no_grad()
    def predict_proba(
        self, X: Int[Tensor, " batch *event"], observed: Bool[Tensor, " batch *event"] | None = None
    ) -> Float[Tensor, "batch classes"]:
        """Class probabilities given the observed part; exact for rows that are observed whole.

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
                "this CategoricalRBM has no classes; build it with n_classes and fit it with labels."
            )
        states, mask = self.check(X, observed)
        exact = self.weights.log_weight_by_class(self._one_hot_rows(states, None)[0]).softmax(1)
        if mask is None or bool(mask.all()):
            return exact
        return torch.where(mask.all(1)[:, None], exact, self._infer_warning(states, mask).label)

    @torch.no_grad()
    def _sample_conditional(self, states: Tensor, observed: Tensor, generator: torch.Generator) -> Tensor:
        """Gibbs sweeps from the base rates; the inverse temperature rises to 1 over the first half."""
        pieces = []
        for rows in torch.arange(len(states), device=states.device).split(self._chunk(1)):
            known = self._one_hot_rows(states[rows], None)[0]
            mask = observed[rows].repeat_interleave(self.max_states, 1)
            state = (known, known.new_zeros(len(rows), self.n_classes or 0))
            for sweep in range(self.n_sweeps + 1):
                beta = min(1.0, 2.0 * sweep / self.n_sweeps)  # at beta = 0 it is a draw from the base rates
                v, y = tempered_step(
                    self.weights, (self.base_visible, self.base_label), state, beta, generator
                )
                state = (torch.where(mask, known, v), y)
            pieces.append(state[0].unflatten(1, self.valid.shape).argmax(-1))
        return torch.cat(pieces)

    def _chunk(self, n_chains: int) -> int:
        return max(1, CHUNK_ENTRIES // (self.n_variables * self.max_states * n_chains))


def _check_inference(method: str) -> Inference:
    if method not in get_args(Inference):
        raise DataError(f'inference is {method!r}; it must be "gibbs", "meanfield" or "parallel".')
    return method  # type: ignore[return-value]
