"""What every layer of this wing does.

A `SequenceLayer` maps a batch of sequences ``(batch, length, dim)`` to another of the same shape. It is an
ordinary `torch.nn.Module`: it goes where a user's network has attention or a recurrence, and works under
`torch.export`, autocast and a state dict round trip.

A mask ``(batch, length)`` is boolean and True at real positions. What stands at the others never reaches a
real position's output; what comes out there is unspecified. (`torch.nn.Transformer` has it the other way
round, transformers' ``attention_mask`` as here.)

A recurrent layer is also a machine with a state of constant size: ``step`` feeds one position, and ``length``
steps give what one ``forward`` gives. A state is a tensor or a tuple of tensors whose first axis is the
batch, so that `torch.utils._pytree` and a beam search can handle it.

A converter puts layers into a user's model and returns a `Conversion`: the model, and for each layer looked
at what was changed, or why it was left.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from paperback.errors import DataError, NotSupportedError


@dataclass(frozen=True)
class Cost:
    """What a layer costs on one sequence. Costs add up: the cost of a network is the sum over its layers.

    Attributes:
        flops: operations of a forward pass, a multiply-add being two. Elementwise work counts where it is of
            the order of the products, as in a scan.
        bytes: what a forward pass keeps for the backward pass beyond the layer's parameters, in the dtype of
            the parameters: the tensors that autograd saves.
    """

    flops: int
    bytes: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


class SequenceLayer(nn.Module, ABC):
    """A layer ``(batch, length, d_model) -> (batch, length, d_model)``.

    A subclass calls ``super().__init__(d_model)`` and implements `forward` and `cost`; a recurrent one sets
    ``recurrent = True`` and implements `init_state` and `step` too.

    Args:
        d_model: width of the input and of the output, >= 1.

    Attributes:
        d_model: the width.
        causal: whether an output depends on no later input. A causal layer can be recurrent, no other can.
        recurrent: whether the layer has a state of constant size, `init_state` and `step`.

    Raises:
        DataError: if d_model < 1.
    """

    causal: bool = False
    recurrent: bool = False

    def __init__(self, d_model: int) -> None:
        super().__init__()
        if d_model < 1:
            raise DataError(f"d_model is {d_model}; a layer has at least one feature.")
        self.d_model = d_model

    @abstractmethod
    def forward(
        self,
        u: Float[Tensor, "batch length dim"],
        mask: Bool[Tensor, "batch length"] | None = None,
        *,
        state: Any = None,
        return_state: bool = False,
    ) -> Any:
        """Map whole sequences.

        Args:
            u: input, ``(batch, length, d_model)``, length >= 1.
            mask: True at real positions, ``(batch, length)``; all are real if not given.
            state: where the sequences go on from, as an earlier call returned it; a recurrent layer starts
                from nothing if not given, any other refuses one.
            return_state: also return the state after the last position (recurrent layers).

        Returns:
            The output ``(batch, length, d_model)``; with ``return_state=True`` the pair (output, state).

        Raises:
            DataError: if u, the mask or the state does not fit.
            NotSupportedError: if the layer has no state and one is given or asked for.
        """

    @abstractmethod
    def cost(self, length: int) -> Cost:
        """Operations and bytes of one sequence of this length, in training."""

    def init_state(self, batch: int) -> Any:
        """The state before the first position, for so many sequences, on the device of the layer.

        Raises:
            NotSupportedError: if the layer is not recurrent.
        """
        raise self._stateless("init_state")

    def step(self, u_t: Float[Tensor, "batch dim"], state: Any) -> tuple[Tensor, Any]:
        """Feed one position.

        Args:
            u_t: input at this position, ``(batch, d_model)``.
            state: as `init_state`, `step` or ``forward(..., return_state=True)`` returned it; not changed.

        Returns:
            The output ``(batch, d_model)`` and the next state.

        Raises:
            DataError: if u_t or the state does not fit.
            NotSupportedError: if the layer is not recurrent.
        """
        raise self._stateless("step")

    def _stateless(self, what: str) -> NotSupportedError:
        reason = "looks at positions to come" if not self.causal else "keeps no state of constant size"
        return NotSupportedError(
            f"{type(self).__name__} has no {what}: it {reason}; call forward on whole sequences, "
            'or take a recurrent layer such as Mamba(..., scan="forward").'
        )


def check_sequence(u: Tensor, d_model: int, mask: Tensor | None = None) -> None:
    """Check the input of a layer; what it costs does not grow with the length.

    Args:
        u: should be ``(batch, length, d_model)``, floating point, length >= 1.
        d_model: the width that the layer was made for.
        mask: should be None or boolean ``(batch, length)``.

    Raises:
        DataError: naming what does not fit, and what would.
    """
    if u.ndim != 3:
        raise DataError(f"u has shape {tuple(u.shape)}; expected (batch, length, {d_model}), three axes.")
    if not u.is_floating_point():
        raise DataError(f"u has dtype {u.dtype}; expected floating point (embed integer tokens first).")
    if u.shape[2] != d_model:
        raise DataError(f"u has {u.shape[2]} features per position; this layer was made for {d_model}.")
    if u.shape[1] == 0:
        raise DataError("u has length 0; a sequence has at least one position.")
    if mask is not None:
        check_mask(mask, u)


def check_mask(mask: Tensor, u: Tensor, name: str = "mask") -> None:
    """Check a boolean mask over the positions of u, ``(batch, length)``.

    Args:
        mask: the mask.
        u: the sequences it belongs to, ``(batch, length, dim)``.
        name: what the message calls it.

    Raises:
        DataError: if its dtype is not bool, or its shape is not that of u without the features.
    """
    if mask.dtype != torch.bool:
        raise DataError(f"{name} has dtype {mask.dtype}; it must be boolean, for example {name} > 0.")
    if mask.shape != u.shape[:2]:
        raise DataError(
            f"{name} has shape {tuple(mask.shape)}; u has (batch, length) = {tuple(u.shape[:2])}, "
            "and the two must be equal."
        )


@dataclass(frozen=True)
class LayerChange:
    """What a converter did with one layer that it looked at.

    Attributes:
        name: where it stands in the model, as in ``named_modules``.
        was: class of the layer before.
        now: class of the layer after; the same as before where it was left.
        action: "changed" or "left".
        why: the reason, in a few words; for a change, where its weights come from.
        parameters_before: number of parameters before.
        parameters_after: number of parameters after.
    """

    name: str
    was: str
    now: str
    action: Literal["changed", "left"]
    why: str
    parameters_before: int
    parameters_after: int


@dataclass(frozen=True)
class Conversion:
    """A converted model and the report of what was done to it, layer by layer.

    Attributes:
        model: the model with its new layers.
        changes: one entry for each layer that the converter looked at, in the order of the model.
    """

    model: nn.Module
    changes: Sequence[LayerChange]

    @property
    def changed(self) -> list[LayerChange]:
        """The layers that were replaced."""
        return [change for change in self.changes if change.action == "changed"]

    @property
    def left(self) -> list[LayerChange]:
        """The layers that were looked at and stayed, each with its reason."""
        return [change for change in self.changes if change.action == "left"]

    def rows(self) -> list[dict[str, Any]]:
        """The report as rows for a table: one dictionary per layer."""
        return [dict(vars(change)) for change in self.changes]

    def __str__(self) -> str:
        before = sum(change.parameters_before for change in self.changes)
        after = sum(change.parameters_after for change in self.changes)
        lines = [
            f"{len(self.changed)} layers changed, {len(self.left)} left; "
            f"parameters of these layers: {before:,} before, {after:,} after"
        ]
        for change in self.changes:
            what = change.was if change.action == "left" else f"{change.was} -> {change.now}"
            lines.append(f"  {change.action:7} {change.name or '(the model)'}: {what} ({change.why})")
        return "\n".join(lines)
