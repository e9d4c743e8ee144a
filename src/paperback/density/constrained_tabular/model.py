"""A generator of tables whose rows obey linear rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from paperback.density.constrained_tabular.constraints import LinearConstraints
from paperback.density.constrained_tabular.gan import DEFAULTS as GAN_DEFAULTS
from paperback.density.constrained_tabular.gan import TabularGAN, fit_gan
from paperback.density.constrained_tabular.guard import as_constraints, replace_values
from paperback.density.constrained_tabular.layer import ConstraintLayer
from paperback.density.constrained_tabular.order import ORDERINGS, Ordering, order_columns
from paperback.density.constrained_tabular.table import Encoding
from paperback.density.constrained_tabular.vae import DEFAULTS as VAE_DEFAULTS
from paperback.density.constrained_tabular.vae import TabularVAE, fit_vae
from paperback.errors import DataError, NotSupportedError
from paperback.saving import Saved
from paperback.training import derive, seeded

if TYPE_CHECKING:
    import pandas as pd

Mode = Literal["train", "guardrail", "off"]

PILOT_SHARE = 0.1  # of the epochs, for the model that the order of the columns is chosen by
PILOT_ROWS = 2_000
ROWS_AT_A_TIME = 50_000  # of `sample`, which bounds its memory
TRIES = 20  # of rows that cannot be both rounded and compliant


class ConstrainedTabular(Saved, nn.Module):
    """Learns a table and draws new rows that satisfy linear constraints, every one of them.

    Args:
        base: what generates: "vae", "gan", or an object with ``fit(frame)`` and ``sample(n) -> frame``, which
            is used as it is and cannot be trained through the constraints or saved.
        constraints: what holds, as text (see `LinearConstraints.parse`) or parsed. None allows everything.
        mode: "train" has the constraint layer in the training and in sampling (the paper's C-DGM),
            "guardrail" in sampling only, "off" nowhere.
        order: which column is corrected first and so moves least: a list of the constrained columns, or an
            ordering of `order_columns`. "auto" is "kde"; where rows of an unconstrained model are needed, a
            short training makes one.
        eps: how far inside a strict constraint rows are put, relative to the range of its columns.
        rounded: give generated numbers the decimals that the training rows have (up to four).
        hidden: width of the hidden layers; 128 for the VAE and 256 for the GAN if not given.
        latent: dimensions of the noise.
        columns: the representation of a fitted model's columns, as `Encoding.to_list` gives it; spares `fit`
            finding it. The networks exist from then on.
        fitted_order: the order that `fit` chose; written by it.

    Attributes:
        layer: the constraint layer that sampling uses; None without constraints.

    Raises:
        DataError: if an argument is out of range or the constraints contradict each other.
        NotSupportedError: if a third party's generator is to be trained through the constraints.
    """

    _device: Tensor

    def __init__(
        self,
        base: Any = "vae",
        constraints: LinearConstraints | Sequence[str] | str | None = None,
        mode: Mode = "train",
        order: Sequence[str] | Ordering | Literal["auto"] = "auto",
        eps: float = 1e-6,
        rounded: bool = True,
        hidden: int | None = None,
        latent: int = 128,
        columns: Sequence[dict[str, Any]] | None = None,
        fitted_order: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        _check_arguments(base, mode, order, hidden, latent)
        if isinstance(constraints, LinearConstraints):  # text is what a configuration can hold
            texts = list(constraints.texts)
            self._remember(constraints=texts)
            self._unsavable = tuple(name for name in self._unsavable if name != "constraints")
        self.base, self.mode, self.order, self.eps, self.rounded = base, mode, order, eps, rounded
        self.hidden, self.latent = hidden, latent
        self._given = constraints
        self.constraints: LinearConstraints | None = None
        if constraints is not None and len(constraints):
            self.constraints = as_constraints(constraints)
        self.encoding: Encoding | None = None
        self.network: TabularVAE | TabularGAN | None = None
        self.layer: ConstraintLayer | None = None
        self.register_buffer("_device", torch.empty(0), persistent=False)  # it moves with the model
        if columns is not None:
            self.encoding = Encoding.from_list(columns)
            self.network = self._network(0)
            if fitted_order is not None:
                self.layer = self._layer(fitted_order)

    @property
    def device(self) -> torch.device:
        """Where the model is, and where it will be trained; ``to`` moves it."""
        return self._device.device

    # -- fitting -------------------------------------------------------------------------------------------

    def fit(
        self,
        frame: pd.DataFrame,
        *,
        seed: int = 0,
        progress: bool = True,
        allow_violations: bool = False,
        **training: Any,
    ) -> Self:
        """Learn a table.

        Args:
            frame: the training rows: numbers, booleans, text or categories, with empty cells allowed.
            seed: of every random draw of the fit.
            progress: show a progress bar.
            allow_violations: leave out rows that break a constraint, instead of refusing them.
            **training: settings of the training, such as ``epochs``, ``batch_size`` and ``lr``; for the GAN
                also ``pac`` and ``critic_steps``.

        Returns:
            The model itself.

        Raises:
            DataError: if the table cannot be used, does not have the constrained columns, or breaks a
                constraint.
        """
        frame = frame.set_axis([str(name) for name in frame.columns], axis=1)
        frame = self._compliant(frame, allow_violations)
        if not isinstance(self.base, str):
            self.base.fit(frame)
            self._finish(
                Encoding.fit(frame, seed),
                self._choose_order(frame, lambda: self.base.sample(PILOT_ROWS), seed),
            )
            return self
        self.encoding = self.encoding or Encoding.fit(frame, derive(seed, "modes"))
        amounts, states = (t.to(self.device) for t in self.encoding.encode(frame, derive(seed, "cells")))

        def pilot() -> pd.DataFrame:
            epochs = training.get("epochs", self._defaults["epochs"])
            settings = training | {"epochs": max(1, round(PILOT_SHARE * epochs))}
            network = self._fit_network(amounts, states, None, derive(seed, "pilot"), progress, settings)
            return self._rows(
                network,
                PILOT_ROWS,
                torch.Generator(self.device).manual_seed(derive(seed, "pilot rows")),
                None,
            )

        network, order = None, None
        if self.constraints is not None and self.mode == "guardrail":
            # The model is unconstrained itself, so that no pilot is needed.
            network = self._fit_network(amounts, states, None, seed, progress, training)
            rows = torch.Generator(self.device).manual_seed(derive(seed, "pilot rows"))
            order = self._choose_order(frame, lambda: self._rows(network, PILOT_ROWS, rows, None), seed)
        elif self.constraints is not None and self.mode == "train":
            order = self._choose_order(frame, pilot, seed)
        layer = None
        if self.mode == "train" and self.constraints is not None:
            names = [column.name for column in self.encoding.numbers]
            layer = ConstraintLayer(
                self.constraints, names, order, eps=self.eps, spread=self.encoding.spread
            ).to(self.device)
        self.network = network or self._fit_network(amounts, states, layer, seed, progress, training)
        self._finish(self.encoding, order)
        return self.eval()

    @property
    def _defaults(self) -> dict[str, Any]:
        return VAE_DEFAULTS if self.base == "vae" else GAN_DEFAULTS

    def _compliant(self, frame: pd.DataFrame, allow_violations: bool) -> pd.DataFrame:
        """The training rows that satisfy the constraints; all of them must, unless told otherwise."""
        if self._given is not None and not isinstance(self._given, LinearConstraints):
            self.constraints = LinearConstraints.parse(
                self._given, list(frame.columns)
            )  # a mistyped name shows here
        if self.constraints is None:
            return frame
        kept = self.constraints.check(frame)
        if kept.all():
            return frame
        counts = (~kept).sum(0)
        if not allow_violations:
            broken = "; ".join(
                f"{text} ({count:,} rows, first row {int((~kept[:, i]).argmax())})"
                for i, (text, count) in enumerate(zip(self.constraints.texts, counts, strict=True))
                if count
            )
            raise DataError(
                f"the training rows break constraints: {broken}; correct the rows or the constraints, or "
                "leave these rows out with allow_violations=True."
            )
        frame = frame.loc[self.constraints.complies(frame)].reset_index(drop=True)
        if len(frame) < 2:
            raise DataError("fewer than two training rows satisfy the constraints; check the constraints.")
        return frame

    def _choose_order(
        self, frame: pd.DataFrame, generated: Callable[[], pd.DataFrame], seed: int
    ) -> list[str] | None:
        """The order of the columns; rows are generated only for orderings that look at them."""
        if self.constraints is None or self.mode == "off":
            return None
        if not isinstance(self.order, str):
            return [str(name) for name in self.order]
        how: Any = "kde" if self.order == "auto" else self.order
        columns = self.constraints.columns
        if how in ("given", "random"):
            return order_columns(how, columns, seed=seed)
        return order_columns(how, columns, frame, generated(), seed)

    def _network(self, seed: int) -> TabularVAE | TabularGAN:
        assert self.encoding is not None
        with seeded(seed, "weights"):
            kind, width = (TabularVAE, 128) if self.base == "vae" else (TabularGAN, 256)
            return kind(self.encoding, self.hidden or width, self.latent).to(self.device)

    def _fit_network(
        self,
        amounts: Tensor,
        states: Tensor,
        layer: ConstraintLayer | None,
        seed: int,
        progress: bool,
        training: dict[str, Any],
    ) -> TabularVAE | TabularGAN:
        network = self._network(seed)
        if isinstance(network, TabularVAE):
            fit_vae(network, amounts, states, layer, seed=seed, progress=progress, **training)
        else:
            fit_gan(network, amounts, states, layer, seed=seed, progress=progress, **training)
        return network

    def _finish(self, encoding: Encoding, order: Sequence[str] | None) -> None:
        """Keep what `fit` found out, also for a saved model's configuration."""
        self.encoding = encoding
        self.layer = None if order is None else self._layer(order)
        self._remember(columns=encoding.to_list(), fitted_order=None if order is None else list(order))

    def _remember(self, **arguments: Any) -> None:
        """Arguments with which a saved model is made again."""
        self._hub_mixin_config = dict(self._hub_mixin_config or {}) | arguments  # type: ignore[arg-type]

    def _layer(self, order: Sequence[str]) -> ConstraintLayer:
        """The layer of sampling: over the columns that are constrained, with their decimals."""
        assert self.encoding is not None
        assert self.constraints is not None
        decimals = self.encoding.decimals if self.rounded else {}
        constrained = {name: places for name, places in decimals.items() if name in self.constraints.columns}
        return ConstraintLayer(
            self.constraints, order=order, eps=self.eps, spread=self.encoding.spread, decimals=constrained
        )

    # -- generating ----------------------------------------------------------------------------------------

    def sample(self, n: int, generator: torch.Generator | None = None) -> pd.DataFrame:
        """Draw rows.

        Args:
            n: how many, >= 1.
            generator: source of randomness; a fresh one with seed 0 if not given. A third party's generator
                has its own.

        Returns:
            A table with the columns of the training rows; every row satisfies the constraints. Rows that
            cannot satisfy them rounded are drawn again, at most 20 times, and then left unrounded.

        Raises:
            DataError: if n < 1 or the model is not fitted.
        """
        import pandas as pd

        if n < 1:
            raise DataError(f"n is {n}; ask for at least one row.")
        self._check_fitted()
        generator = generator if generator is not None else torch.Generator(self.device).manual_seed(0)
        sizes = [min(ROWS_AT_A_TIME, n - start) for start in range(0, n, ROWS_AT_A_TIME)]
        parts = [self._part(size, generator) for size in sizes]
        return parts[0] if len(parts) == 1 else pd.concat(parts, ignore_index=True)

    def _part(self, n: int, generator: torch.Generator) -> pd.DataFrame:
        if isinstance(self.base, str):
            return self._rows(self.network, n, generator, self.layer)
        frame = self.base.sample(n)
        if self.layer is None or self.constraints is None:
            return frame
        return replace_values(frame, self.layer, self.constraints.values(frame))

    @torch.no_grad()
    def _rows(
        self,
        network: TabularVAE | TabularGAN | None,
        n: int,
        generator: torch.Generator,
        layer: ConstraintLayer | None,
    ) -> pd.DataFrame:
        """Rows of a network; those that cannot be both rounded and compliant are drawn again."""
        assert self.encoding is not None
        assert network is not None
        values, states = network.draw(n, generator)
        cells, bad = self._correct(values, layer)
        for _ in range(TRIES):
            rows = np.flatnonzero(bad)
            if len(rows) == 0:
                break
            values, new_states = network.draw(len(rows), generator)
            cells[rows], bad[rows] = self._correct(values, layer)
            states[rows] = new_states
        return self.encoding.decode(cells, states.cpu().numpy())

    def _correct(self, values: Tensor, layer: ConstraintLayer | None) -> tuple[np.ndarray, np.ndarray]:
        """Values in float64 that keep decimals and constraints; and which rows missed their decimals."""
        assert self.encoding is not None
        cells = values.double().cpu().numpy()
        constrained = () if layer is None else layer.columns
        names = [column.name for column in self.encoding.numbers]
        if self.rounded:
            for name, places in self.encoding.decimals.items():
                if name not in constrained:
                    cells[:, names.index(name)] = np.round(cells[:, names.index(name)], places)
        bad = np.zeros(len(cells), bool)
        if layer is not None:
            positions = [names.index(name) for name in constrained]
            corrected = layer(torch.from_numpy(cells[:, positions]).to(layer.point.device)).cpu().numpy()
            cells[:, positions] = corrected
            if layer.unrounded_:
                for i, name in enumerate(constrained):
                    if name in layer.decimals:
                        bad |= corrected[:, i] != np.round(corrected[:, i], layer.decimals[name])
        return cells, bad

    def complete(
        self, frame: pd.DataFrame, observed: Sequence[str], generator: torch.Generator | None = None
    ) -> pd.DataFrame:
        """Fill in the other columns, given some: observed cells come back untouched, and every row is
        compliant.

        Args:
            frame: rows with at least the observed columns.
            observed: names of the columns that are known.
            generator: source of randomness; a fresh one with seed 0 if not given.

        Returns:
            Whole rows, with the columns of the training rows.

        Raises:
            DataError: if a column is unknown, or no completion of an observed row satisfies the constraints.
            NotSupportedError: if the base is not the VAE.
        """
        self._check_fitted()
        if not isinstance(self.network, TabularVAE):
            raise NotSupportedError('only base="vae" completes rows; a GAN has no encoder.')
        encoding = self.encoding
        assert encoding is not None
        known = {str(name) for name in observed}
        absent = [
            name
            for name in known
            if name not in {c.name for c in encoding.columns} or name not in frame.columns
        ]
        if absent:
            raise DataError(
                f"column {absent[0]!r} is observed, but not in the table or not known to the model."
            )
        whole = _with_stand_ins(frame, encoding, known)
        layer = self._evidence_layer(whole, known)
        amounts, states = (tensor.to(self.device) for tensor in encoding.encode(whole))
        numbers = torch.tensor([column.name in known for column in encoding.numbers], dtype=torch.bool)
        slots = torch.tensor([column.name in known for column in encoding.slots], dtype=torch.bool)
        generator = generator if generator is not None else torch.Generator(self.device).manual_seed(0)
        with torch.no_grad():
            held = (numbers.to(self.device), slots.to(self.device))
            values, states = self.network.complete(amounts, states, *held, generator)
        cells = values.double().cpu()
        for i, column in enumerate(encoding.numbers):
            if column.name in known:  # the exact cells, not those of float32
                cells[:, i] = torch.from_numpy(
                    whole[column.name].to_numpy(np.float64, copy=True, na_value=column.means[-1])
                )
        corrected, _ = self._correct(cells, layer)
        result = encoding.decode(corrected, states.cpu().numpy())
        for name in known:
            result[name] = frame[name].to_numpy()
        return result

    def _evidence_layer(self, whole: pd.DataFrame, known: set[str]) -> ConstraintLayer | None:
        """A layer that corrects the observed columns first; they must leave room for the rest."""
        if self.layer is None or self.constraints is None:
            return None
        order = [n for n in self.layer.order if n in known] + [n for n in self.layer.order if n not in known]
        decimals = {name: places for name, places in self.layer.decimals.items() if name not in known}
        assert self.encoding is not None
        layer = ConstraintLayer(
            self.constraints, order=order, eps=self.eps, spread=self.encoding.spread, decimals=decimals
        )
        values = torch.from_numpy(self.constraints.values(whole))
        lower, upper = layer.bounds(values.nan_to_num(0.0))
        tolerance = 1e-9 * values.abs().nan_to_num(0.0).clamp_min(1.0)
        outside = ((values < lower - tolerance) | (values > upper + tolerance)).numpy()
        outside &= np.array([name in known for name in self.constraints.columns])
        if outside.any():
            row, column = np.argwhere(outside)[0]
            raise DataError(
                f"row {row}: no completion satisfies the constraints, because "
                f"{self.constraints.columns[column]} = {float(values[row, column]):g} would have to lie in "
                f"{float(lower[row, column]):g} .. {float(upper[row, column]):g} given the other observed "
                "columns; correct the row."
            )
        return layer

    # -- densities -----------------------------------------------------------------------------------------

    def log_prob(self, frame: pd.DataFrame) -> Tensor:
        """Not available: a corrected row has no density with respect to volume.

        Raises:
            NotSupportedError: always.
        """
        raise NotSupportedError(
            "a constrained generator has no likelihood; CategoricalMixture on TableBins has an exact one, "
            "and elbo() "
            'bounds that of an unconstrained base="vae".'
        )

    def elbo(
        self, frame: pd.DataFrame, n_samples: int = 10, generator: torch.Generator | None = None
    ) -> Tensor:
        """Lower bound on the log-density of rows under the VAE without its constraint layer.

        Args:
            frame: rows with the columns of the training rows.
            n_samples: draws of z for each row.
            generator: source of randomness; a fresh one with seed 0 if not given.

        Returns:
            Nats, ``(rows,)``; the density is over the numbers in their units and the probability of the rest.

        Raises:
            NotSupportedError: if the base is not the VAE.
            DataError: if the rows do not fit the model.
        """
        self._check_fitted()
        if not isinstance(self.network, TabularVAE) or self.encoding is None:
            raise NotSupportedError('only base="vae" has an ELBO.')
        amounts, states = (tensor.to(self.device) for tensor in self.encoding.encode(frame))
        generator = generator if generator is not None else torch.Generator(self.device).manual_seed(0)
        with torch.no_grad():
            return self.network.elbo(amounts, states, n_samples, generator)

    def _check_fitted(self) -> None:
        if self.encoding is None or (isinstance(self.base, str) and self.network is None):
            raise DataError("the model is not fitted yet; call fit with the training rows first.")


def _check_arguments(base: Any, mode: str, order: Any, hidden: int | None, latent: int) -> None:
    if isinstance(base, str) and base not in ("vae", "gan"):
        raise DataError(f'base is {base!r}; it must be "vae", "gan" or an object with fit and sample.')
    if not isinstance(base, str) and not (hasattr(base, "fit") and hasattr(base, "sample")):
        raise DataError(
            f"base is a {type(base).__name__} without fit and sample; wrap its sampler with guard()."
        )
    if mode not in ("train", "guardrail", "off"):
        raise DataError(f'mode is {mode!r}; it must be "train", "guardrail" or "off".')
    if mode == "train" and not isinstance(base, str):
        raise NotSupportedError(
            'the training of another library\'s generator is out of reach; use mode="guardrail", or '
            'base="vae" or "gan".'
        )
    if isinstance(order, str) and order not in ("auto", *ORDERINGS):
        raise DataError(
            f'order is {order!r}; it must be a list of columns, "auto" or one of {", ".join(ORDERINGS)}.'
        )
    if (hidden is not None and hidden < 1) or latent < 1:
        raise DataError(f"hidden is {hidden} and latent {latent}; both must be at least 1.")


def _with_stand_ins(frame: pd.DataFrame, encoding: Encoding, known: set[str]) -> pd.DataFrame:
    """The observed columns, and in the others any cell that the encoding can read; it is drawn anew later."""
    import pandas as pd

    columns = {}
    for column in encoding.columns:
        if column.name in known:
            columns[column.name] = frame[column.name].reset_index(drop=True)
        else:
            cell = column.means[0] if column.kind == "number" else column.values[0]
            columns[column.name] = pd.Series([cell] * len(frame))
    return pd.DataFrame(columns)
