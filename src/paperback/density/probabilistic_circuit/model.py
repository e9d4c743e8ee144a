"""The public class: structure from data, parameters by EM, every operation exact."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, Self, get_args

import torch
from jaxtyping import Int
from rich.progress import track
from torch import Tensor

from paperback.density.interface import Capabilities
from paperback.density.probabilistic_circuit import tree as inference
from paperback.density.probabilistic_circuit.circuit import Circuit
from paperback.density.probabilistic_circuit.structure import (
    RootedTree,
    chain,
    chow_liu,
    mutual_information,
    quantile_bins,
    star,
)
from paperback.density.probabilistic_circuit.transforms import Transform, transformed
from paperback.density.probabilistic_circuit.tree import Parameters
from paperback.errors import DataError

Structure = Literal["hclt", "hmm", "chow_liu", "independent"]
CHUNK_ENTRIES = 2**24  # numbers held in one array of messages


class ProbabilisticCircuit(Circuit):
    """A circuit of sums and products over a tree, exact in every operation.

    Args:
        n_variables: number of variables, >= 2.
        n_states: states of every variable (>= 2), or one number per variable.
        structure: "hclt", the Chow-Liu tree of the data with a latent variable above each variable; "hmm",
            the variables one after another with latents; "chow_liu", the tree without latents;
            "independent".
        n_latents: states of each latent, >= 1; "chow_liu" and "independent" have no use for it.
        mixture: number of components, each a circuit of this shape with its own parameters, >= 1.

    Raises:
        DataError: if an argument is out of range.
    """

    capabilities = Capabilities("exact", "exact", "exact", "exact", "exact", "none")
    variables: Tensor
    parents: Tensor
    log_root: Tensor
    log_transition: Tensor
    log_emission: Tensor

    def __init__(
        self,
        n_variables: int,
        n_states: int | Sequence[int],
        structure: Structure = "hclt",
        n_latents: int = 16,
        mixture: int = 1,
    ) -> None:
        super().__init__(n_variables, n_states)
        if structure not in get_args(Structure):
            raise DataError(
                f"structure is {structure!r}; it must be one of {', '.join(get_args(Structure))}."
            )
        if n_variables < 2:
            raise DataError("n_variables is 1; a circuit over a tree needs at least 2 variables.")
        if n_latents < 1 or mixture < 1:
            raise DataError(f"n_latents is {n_latents} and mixture {mixture}; both must be at least 1.")
        self.structure = structure
        self.n_latents = {"chow_liu": self.max_states, "independent": 1}.get(structure, n_latents)
        m, k = self.n_latents, self.max_states
        shape = star(n_variables) if structure == "independent" else chain(n_variables)
        self.register_buffer("variables", torch.tensor(shape.variables))
        self.register_buffer("parents", torch.tensor(shape.parents))
        self.register_buffer("log_root", torch.full((mixture, m), 1.0 / (m * mixture)).log())
        self.register_buffer("log_transition", torch.full((n_variables, mixture, m, m), 1.0 / m).log())
        self.register_buffer("log_emission", torch.empty(n_variables, mixture, k, m))
        uniform = (self.valid / self.valid.sum(-1, keepdim=True)).log()
        self.log_emission.copy_(uniform[:, None, :, None])
        if structure == "chow_liu":  # a "latent" is the variable itself
            self.log_emission.copy_(torch.eye(k).log())
            self._set_transitions_to(uniform)

    # -- what it is made of ---------------------------------------------------------------------------------

    @property
    def tree(self) -> RootedTree:
        """The tree, from the saved numbers."""
        return RootedTree.from_buffers(self.variables, self.parents)

    @property
    def parameters_in_logs(self) -> Parameters:
        """Log-probabilities of root, transitions and emissions."""
        return Parameters(self.log_root, self.log_transition, self.log_emission)

    @property
    def variable_order_(self) -> tuple[int, ...]:
        """The variables in the order in which the codec visits them."""
        tree = self.tree
        return tuple(tree.variables[node] for node in tree.coding_order)

    @property
    def n_edges_(self) -> int:
        """Edges of the circuit with weights: root, transitions and emissions."""
        states = int(self.valid.sum()) if self.structure != "chow_liu" else 0
        per_component = self.n_latents + (self.n_variables - 1) * self.n_latents**2 + states * self.n_latents
        return len(self.log_root) * per_component

    # -- operations -----------------------------------------------------------------------------------------

    def _rows_at_once(self) -> int:
        return max(1, CHUNK_ENTRIES // (self.n_variables * self.n_latents * len(self.log_root)))

    @torch.no_grad()
    def _log_prob(self, states: Tensor, observed: Tensor | None) -> Tensor:
        rows, tree, p = self._rows_at_once(), self.tree, self.parameters_in_logs
        masks = [None] * (len(states) // rows + 1) if observed is None else list(observed.split(rows))
        parts = zip(states.split(rows), masks, strict=False)
        return torch.cat([inference.upward(tree, p, x, mask).log_prob for x, mask in parts]).to(self.log_root)

    @torch.no_grad()
    def _conditional(self, states: Tensor, observed: Tensor) -> Tensor:
        rows, tree, p = self._rows_at_once(), self.tree, self.parameters_in_logs
        parts = zip(states.split(rows), observed.split(rows), strict=True)
        return torch.cat([inference.variable_marginals(tree, p, x, mask) for x, mask in parts])

    @torch.no_grad()
    def _sample_conditional(self, states: Tensor, observed: Tensor, generator: torch.Generator) -> Tensor:
        rows, tree, p = self._rows_at_once(), self.tree, self.parameters_in_logs
        parts = zip(states.split(rows), observed.split(rows), strict=True)
        return torch.cat([inference.sample_conditional(tree, p, x, mask, generator) for x, mask in parts])

    @torch.no_grad()
    def _most_probable(self, states: Tensor, observed: Tensor) -> Tensor:
        rows, tree, p = max(1, self._rows_at_once() // self.n_latents), self.tree, self.parameters_in_logs
        parts = zip(states.split(rows), observed.split(rows), strict=True)
        return torch.cat([inference.most_probable(tree, p, x, mask) for x, mask in parts])

    # -- fitting --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def fit(
        self,
        X: Int[Tensor, " batch *event"],
        y: Int[Tensor, " batch"] | None = None,
        X_val: Int[Tensor, " batch_val *event"] | None = None,
        y_val: Int[Tensor, " batch_val"] | None = None,
        *,
        seed: int = 0,
        progress: bool = True,
        epochs: int = 10,
        batch_size: int | None = 256,
        step_size: float = 0.4,
        smallest_step: float = 0.02,
        pseudocount: float = 0.1,
        patience: int = 3,
        structure_rows: int = 4000,
        structure_bins: int = 16,
        transform: Transform | None = None,
        **training: Any,
    ) -> Self:
        """Learn the tree, then the parameters by EM.

        A step of mini-batch EM is theta <- (1 - s) theta + s (flow + pseudocount / size) / normaliser, with s
        falling linearly from step_size to smallest_step. "chow_liu" needs no EM: its parameters are counts.

        Args:
            X: states ``(batch, *event)``.
            y: ignored.
            X_val: held-out states; the epoch with their best likelihood is kept.
            y_val: ignored.
            seed: of the rows that the tree is learned from, the start and the order of the rows.
            progress: show a progress bar.
            epochs: passes over the data, >= 1.
            batch_size: rows in a step, >= 1; None for full-batch EM with steps of size 1, which never lowers
                the likelihood when pseudocount is 0.
            step_size: first s, in (0, 1].
            smallest_step: least s, in (0, step_size].
            pseudocount: spread over the outcomes of each distribution, >= 0.
            patience: epochs without a gain on X_val before stopping, >= 1.
            structure_rows: most rows for the mutual information, >= 1.
            structure_bins: values are cut to so many bins for it, >= 2.
            transform: a bijection; the model is one of what it makes of X and X_val, and so are the rows that
                the other methods take and give. Hand it to `PCCompressor` too, which codes X itself.
            **training: there is no other setting.

        Returns:
            The model itself.

        Raises:
            DataError: if X cannot be used, or a setting is unknown or out of range.
        """
        if training:
            raise DataError(
                f"ProbabilisticCircuit.fit has no setting {next(iter(training))!r}; leave it out."
            )
        _check_settings(epochs, batch_size, step_size, smallest_step, pseudocount, patience)
        if structure_rows < 1 or structure_bins < 2:
            raise DataError("structure_rows must be at least 1 and structure_bins at least 2.")
        states, _ = self.check_training(transformed(X, transform))
        held_out = None if X_val is None else self.check_training(transformed(X_val, transform))[0]
        generator = torch.Generator(states.device).manual_seed(seed)
        if self.structure in ("hclt", "chow_liu"):
            self._learn_tree(states, structure_rows, structure_bins, generator)
        if self.structure == "chow_liu":
            self._count(states, pseudocount)
            return self
        self._initialise(states, generator)
        best, best_score, waited = self._copied(), -torch.inf, 0
        steps_of_epoch = 1 if batch_size is None else -(-len(states) // batch_size)
        total, step = epochs * steps_of_epoch, 0
        for _ in track(range(epochs), "EM", disable=not progress, transient=True):
            order = torch.randperm(len(states), generator=generator, device=states.device)
            for rows in [order] if batch_size is None else order.split(batch_size):
                s = 1.0 if batch_size is None else max(step_size * (1 - step / total), smallest_step)
                self.em_step(states[rows], s, pseudocount)
                step += 1
            if held_out is not None and len(held_out):
                score = float(self._log_prob(held_out, None).mean())
                best, best_score, waited = (
                    (self._copied(), score, 0) if score > best_score else (best, best_score, waited + 1)
                )
                if waited >= patience:
                    break
        if best_score > -torch.inf:
            self._assign(best)
        return self

    @torch.no_grad()
    def em_step(self, states: Int[Tensor, "batch variables"], step_size: float, pseudocount: float) -> float:
        """One EM step on some rows; returns their mean log-probability before it, in nats."""
        tree, p, rows = self.tree, self.parameters_in_logs, self._rows_at_once()
        first, *others = states.split(rows)
        counts, log_prob = inference.flows(tree, p, first)
        for part in others:  # memory stays bounded on a full batch
            more, also = inference.flows(tree, p, part)
            pairs = zip(vars(counts).values(), vars(more).values(), strict=True)
            counts = Parameters(*(a + b for a, b in pairs))
            log_prob = torch.cat([log_prob, also])
        valid = self.valid[self.variables][:, None, :, None]

        def blend(old: Tensor, flow: Tensor, prior: Tensor | float, dims: tuple[int, ...]) -> Tensor:
            new = flow + pseudocount * prior
            total = new.sum(dims, keepdim=True)
            # A state that no row reaches keeps its distribution.
            new = torch.where(total > 0, new / total, old.exp())
            return ((1 - step_size) * old.exp() + step_size * new).log()

        self._assign(
            Parameters(
                blend(p.root, counts.root, 1.0 / p.root.numel(), (0, 1)),
                blend(p.transition, counts.transition, 1.0 / self.n_latents, (-1,)),
                blend(p.emission, counts.emission, valid / valid.sum(2, keepdim=True), (2,)),
            )
        )
        return float(log_prob.mean())

    def _learn_tree(self, states: Tensor, rows: int, n_bins: int, generator: torch.Generator) -> None:
        chosen = torch.randperm(len(states), generator=generator, device=states.device)[:rows]
        n_bins = min(n_bins, self.max_states)
        binned = quantile_bins(states[chosen], self.n_states, n_bins)
        tree = chow_liu(mutual_information(binned, n_bins).cpu())
        self.variables.copy_(torch.tensor(tree.variables))
        self.parents.copy_(torch.tensor(tree.parents))

    def _marginals(self, states: Tensor, pseudocount: float) -> Tensor:
        """Smoothed marginals of the node's variables, ``(nodes, states)``."""
        offset = torch.arange(self.n_variables, device=states.device) * self.max_states
        counts = torch.bincount((states + offset).flatten(), minlength=self.n_variables * self.max_states)
        counts = (counts.view(self.n_variables, -1) + pseudocount) * self.valid
        return (counts / counts.sum(1, keepdim=True)).to(self.log_root)[self.variables]

    def _initialise(self, states: Tensor, generator: torch.Generator) -> None:
        """Transitions at random; emissions near the marginals, different enough to break the symmetry."""

        def normal(like: Tensor) -> Tensor:
            return torch.randn(like.shape, generator=generator, device=like.device).to(like)

        logits = 0.7 * self._marginals(states, 0.1).log()[:, None, :, None] + 0.5 * normal(self.log_emission)
        self._assign(
            Parameters(
                normal(self.log_root).flatten().log_softmax(0).view_as(self.log_root),
                normal(self.log_transition).log_softmax(-1),
                logits.log_softmax(2),
            )
        )

    def _count(self, states: Tensor, pseudocount: float) -> None:
        """Transitions of the plain tree: counts, shrunk towards the marginals by `pseudocount` rows."""
        marginals = self._marginals(states, 1.0 / self.max_states)
        pseudocount = max(pseudocount, 1e-6)
        self._set_transitions_to(marginals.log())
        k = self.max_states
        for node, parent in enumerate(self.parents.tolist()):
            if parent < 0:
                continue
            pair = states[:, self.variables[parent]] * k + states[:, self.variables[node]]
            counts = torch.bincount(pair, minlength=k * k).view(1, k, k).to(self.log_root)
            new = counts + pseudocount * marginals[node]
            self.log_transition[node].copy_((new / new.sum(-1, keepdim=True)).log())

    def _set_transitions_to(self, log_marginals: Tensor) -> None:
        components = len(self.log_root)
        self.log_transition.copy_(log_marginals[:, None, None, :])
        self.log_root.copy_(log_marginals[0] - math.log(components))

    def _copied(self) -> Parameters:
        return Parameters(*(value.clone() for value in vars(self.parameters_in_logs).values()))

    def _assign(self, p: Parameters) -> None:
        self.log_root.copy_(p.root)
        self.log_transition.copy_(p.transition)
        self.log_emission.copy_(p.emission)


def _check_settings(
    epochs: int,
    batch_size: int | None,
    step_size: float,
    smallest_step: float,
    pseudocount: float,
    patience: int,
) -> None:
    if epochs < 1 or patience < 1 or (batch_size is not None and batch_size < 1):
        raise DataError(
            f"epochs is {epochs}, patience {patience}, batch_size {batch_size}; each must be at least 1."
        )
    if not 0 < smallest_step <= step_size <= 1:
        raise DataError(
            f"smallest_step is {smallest_step} and step_size {step_size}; "
            "0 < smallest_step <= step_size <= 1 must hold."
        )
    if pseudocount < 0:
        raise DataError(f"pseudocount is {pseudocount}; it must not be negative.")
