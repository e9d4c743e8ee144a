"""The networks: trunks that read partly known rows, and the two heads on them.

A partly known row is written in symbols, ``(batch, variables)`` int64: 0 is "?", not known, and k + 1 is
state k. A trunk turns symbols into features, either one vector for the row, ``(batch, width)``, or one for
each variable, ``(batch, variables, width)``. On them stand

- the marginal head m(x_S), one number: the log-probability of what is known, up to a constant;
- the conditional head c(x_S), logits of every variable's states, meant at those that are not known.

With ``heads="dual"`` each head has a trunk of its own, with "single" they share one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from paperback.errors import DataError

Heads = Literal["dual", "single"]
HEADS = ("dual", "single")
TRUNKS = ("mlp", "transformer")
ATTENTION_HEADS = 4


def to_symbols(
    states: Int[Tensor, "batch variables"], known: Bool[Tensor, "batch variables"]
) -> Int[Tensor, "batch variables"]:
    """Symbols of partly known states: 0 where not known, the state plus 1 elsewhere."""
    return torch.where(known, states + 1, 0)


class ResidualMLP(nn.Module):
    """h <- h + act(W h) over the one-hot symbols, flattened; one feature vector for the row.

    Args:
        n_variables: number of variables.
        n_symbols: states and "?".
        width: of the hidden layers.
        n_blocks: residual layers.
    """

    def __init__(self, n_variables: int, n_symbols: int, width: int, n_blocks: int) -> None:
        super().__init__()
        self.width = width
        self.n_symbols = n_symbols
        self.first = nn.Linear(n_variables * n_symbols, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(n_blocks))

    def forward(self, symbols: Int[Tensor, "batch variables"]) -> Float[Tensor, "batch width"]:
        # Rows of an identity are taken much faster than torch's one_hot makes them.
        one_hot = torch.eye(self.n_symbols, dtype=self.first.weight.dtype, device=symbols.device)[symbols]
        h = F.leaky_relu(self.first(one_hot.flatten(1)))
        for block in self.blocks:
            h = h + F.leaky_relu(block(h))
        return h


class Transformer(nn.Module):
    """Attention between all variables, each embedded by its place and its symbol; one feature vector for each
    variable.

    Args:
        n_variables: number of variables.
        n_symbols: states and "?".
        width: of the embeddings, a multiple of 4.
        n_blocks: layers.
    """

    def __init__(self, n_variables: int, n_symbols: int, width: int, n_blocks: int) -> None:
        super().__init__()
        if width % ATTENTION_HEADS:
            raise DataError(
                f"hidden is {width}; a transformer with {ATTENTION_HEADS} heads needs a multiple of "
                f"{ATTENTION_HEADS}."
            )
        self.width = width
        self.symbol = nn.Embedding(n_symbols, width)
        self.place = nn.Parameter(torch.randn(n_variables, width) / math.sqrt(width))
        layer = nn.TransformerEncoderLayer(
            width,
            ATTENTION_HEADS,
            4 * width,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.layers = nn.TransformerEncoder(layer, n_blocks, nn.LayerNorm(width), enable_nested_tensor=False)

    def forward(self, symbols: Int[Tensor, "batch variables"]) -> Float[Tensor, "batch variables width"]:
        return self.layers(self.symbol(symbols) + self.place)


class MarginalHead(nn.Module):
    """m(x_S) = w'h + sum_i (h'e_i(symbol_i) + field_i(symbol_i)): features, features met with the symbols,
    and the symbols alone.

    The fields alone are a product of marginals. They are set to that of the data, or to the uniform
    distribution, before training, so that the network learns what the variables have to do with each other,
    not how many of them are known. The middle term starts at 0; with it the head can say of each known
    variable how much it adds, as the conditional head does.
    """

    def __init__(self, n_variables: int, n_symbols: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1)
        self.field = nn.Parameter(torch.zeros(n_variables, n_symbols))
        self.meeting = nn.Parameter(torch.zeros(width, n_variables * n_symbols))

    def forward(self, features: Tensor, symbols: Int[Tensor, "batch variables"]) -> Float[Tensor, " batch"]:
        alone = self.field.expand(len(symbols), -1, -1).gather(2, symbols[..., None])[..., 0].sum(1)
        if features.ndim == 3:
            e = self.meeting.T.unflatten(0, self.field.shape)[
                torch.arange(symbols.shape[1], device=symbols.device), symbols
            ]
            met = (features * e).sum((1, 2)) / math.sqrt(features.shape[2])
            features = features.mean(1)
        else:
            one_hot = torch.eye(self.field.shape[1], dtype=self.field.dtype, device=symbols.device)[symbols]
            met = (features * F.linear(one_hot.flatten(1), self.meeting)).sum(1) / math.sqrt(
                features.shape[1]
            )
        return self.linear(features)[:, 0] + met + alone


class ConditionalHead(nn.Module):
    """Logits of every variable's states from the features; from a vector for each variable with shared
    weights."""

    valid: Tensor

    def __init__(self, valid: Bool[Tensor, "variables states"], width: int, per_variable: bool) -> None:
        super().__init__()
        n_variables, n_states = valid.shape
        self.per_variable = per_variable
        self.register_buffer("valid", valid.clone(), persistent=False)
        rows = n_states if per_variable else n_variables * n_states
        self.weight = nn.Parameter(torch.empty(rows, width).uniform_(-1.0, 1.0) / math.sqrt(width))
        self.bias = nn.Parameter(torch.zeros(n_variables, n_states))

    def forward(self, features: Tensor) -> Float[Tensor, "batch variables states"]:
        logits = F.linear(features, self.weight)
        if not self.per_variable:
            logits = logits.unflatten(1, self.bias.shape)
        return (logits + self.bias).masked_fill(~self.valid, -torch.inf)

    def at(self, features: Tensor, columns: Int[Tensor, " batch"]) -> Float[Tensor, "batch states"]:
        """Logits of one variable of each row; the others are not computed."""
        if self.per_variable:
            logits = F.linear(
                features[torch.arange(len(columns), device=columns.device), columns], self.weight
            )
        else:
            weight = self.weight.unflatten(0, self.bias.shape)[columns]
            logits = torch.bmm(weight, features[..., None])[..., 0]
        return (logits + self.bias[columns]).masked_fill(~self.valid[columns], -torch.inf)


class ConditionalNet(nn.Module):
    """A trunk with the conditional head: an any-order autoregressive network.

    Args:
        valid: which states exist, ``(variables, states)``.
        trunk: see `make_trunk`.
        hidden: width of a trunk that is made here.
        n_blocks: its layers.
    """

    def __init__(self, valid: Tensor, trunk: str | nn.Module, hidden: int, n_blocks: int) -> None:
        super().__init__()
        self.trunk, width, per_variable = make_trunk(valid, trunk, hidden, n_blocks)
        self.head = ConditionalHead(valid, width, per_variable)

    def logits(self, symbols: Int[Tensor, "batch variables"]) -> Float[Tensor, "batch variables states"]:
        """Logits of every variable given the known ones; -inf at states that do not exist."""
        return self.head(self.trunk(symbols))

    def logits_at(
        self, symbols: Int[Tensor, "batch variables"], columns: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch states"]:
        """The same for one variable of each row."""
        return self.head.at(self.trunk(symbols), columns)


class MarginalNet(nn.Module):
    """A trunk with the marginal head. ``trunk`` may be that of a `ConditionalNet`, which is then shared."""

    def __init__(self, valid: Tensor, trunk: str | nn.Module, hidden: int, n_blocks: int) -> None:
        super().__init__()
        self.trunk, width, _ = make_trunk(valid, trunk, hidden, n_blocks)
        self.head = MarginalHead(valid.shape[0], valid.shape[1] + 1, width)

    def forward(self, symbols: Int[Tensor, "batch variables"]) -> Float[Tensor, " batch"]:
        return self.head(self.trunk(symbols), symbols)


class MarginalizationNetwork(nn.Module):
    """Both heads, on a trunk each ("dual") or on one ("single")."""

    def __init__(
        self, valid: Tensor, trunk: str | nn.Module, hidden: int, n_blocks: int, heads: Heads
    ) -> None:
        super().__init__()
        if heads not in HEADS:
            raise DataError(f"heads is {heads!r}; it must be one of {', '.join(HEADS)}.")
        self.heads = heads
        self.conditional = ConditionalNet(valid, trunk, hidden, n_blocks)
        other = copy.deepcopy(trunk) if isinstance(trunk, nn.Module) else trunk
        self.marginal = MarginalNet(
            valid, other if heads == "dual" else self.conditional.trunk, hidden, n_blocks
        )

    def log_marginal(self, symbols: Int[Tensor, "batch variables"]) -> Float[Tensor, " batch"]:
        """m(x_S), which includes the constant m("?")."""
        return self.marginal(symbols)

    def logits(self, symbols: Int[Tensor, "batch variables"]) -> Float[Tensor, "batch variables states"]:
        """c(x_S), see `ConditionalNet.logits`."""
        return self.conditional.logits(symbols)

    def logits_at(
        self, symbols: Int[Tensor, "batch variables"], columns: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch states"]:
        """c(x_S) at one variable of each row."""
        return self.conditional.logits_at(symbols, columns)

    @torch.no_grad()
    def start_from(self, log_table: Float[Tensor, "variables states"], log_z: float) -> None:
        """Make the model the product of the given marginals, but for what the trunks add, with m("?") near
        log_z.

        Args:
            log_table: log-probabilities of each variable's states; what stands at states that do not exist is
                ignored.
            log_z: the constant of m.
        """
        start_bias(self.conditional.head, log_table)
        self.marginal.head.field.copy_(F.pad(self.conditional.head.bias, (1, 0)))
        self.marginal.head.linear.bias.fill_(log_z)


@torch.no_grad()
def start_bias(head: ConditionalHead, log_table: Float[Tensor, "variables states"]) -> None:
    """Make the conditionals the given marginals, but for what the trunk adds."""
    head.bias.copy_(log_table.masked_fill(~head.valid, 0.0))


def make_trunk(
    valid: Tensor, trunk: str | nn.Module, hidden: int, n_blocks: int
) -> tuple[nn.Module, int, bool]:
    """The trunk, the width of its features, and whether there is a vector for each variable.

    Args:
        valid: which states exist, ``(variables, states)``.
        trunk: "mlp", "transformer", or a module from symbols to features.
        hidden: width of a trunk that is made here, >= 1.
        n_blocks: its layers, >= 1.

    Raises:
        DataError: if an argument is out of range, or the module does not give features.
    """
    n_variables, n_states = valid.shape
    if isinstance(trunk, str):
        if trunk not in TRUNKS:
            raise DataError(f"trunk is {trunk!r}; it must be one of {', '.join(TRUNKS)}, or a module.")
        if hidden < 1 or n_blocks < 1:
            raise DataError(f"hidden is {hidden} and n_blocks {n_blocks}; both must be at least 1.")
        kind = ResidualMLP if trunk == "mlp" else Transformer
        return kind(n_variables, n_states + 1, hidden, n_blocks), hidden, trunk == "transformer"
    with torch.no_grad():
        features = trunk(torch.zeros(2, n_variables, dtype=torch.int64))
    shape, fits = tuple(features.shape), features.ndim in (2, 3) and features.is_floating_point()
    if not fits or shape[:-1] != (2, n_variables)[: features.ndim - 1]:
        raise DataError(
            f"the trunk turns symbols (2, {n_variables}) into {features.dtype} of shape {shape}; "
            f"it must give floating features, (2, width) or (2, {n_variables}, width)."
        )
    return trunk, features.shape[-1], features.ndim == 3


def uniform_log_table(n_states: Sequence[int], max_states: int) -> Float[Tensor, "variables states"]:
    """Log-probabilities of the uniform distribution of each variable."""
    return -torch.tensor([float(k) for k in n_states]).log()[:, None].expand(-1, max_states)


def log_shares(
    states: Int[Tensor, "batch variables"], valid: Bool[Tensor, "variables states"]
) -> Float[Tensor, "variables states"]:
    """Log of the smoothed shares of each variable's states in the data."""
    counts = torch.stack([(states == k).sum(0) for k in range(valid.shape[1])], 1)
    return ((counts + valid / valid.sum(1, keepdim=True)) / (len(states) + 1.0)).log()
