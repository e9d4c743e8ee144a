"""The network of a prior-fitted network: a transformer over the rows of a data set.

A token stands for a row: Linear(x) + Linear(y) in the context, Linear(x) for a query. There is no encoding of
positions, so the order of the context does not matter. Every token attends to the whole context and a query
also to itself, never to another query:

    context:  C <- C + Attend(C; keys and values of C)
    query:    q <- q + Attend(q; keys and values of C, and of q itself)

The authors mask a full attention of all rows on all rows. Here a context of n rows is encoded by itself, and
queries go through in blocks that attend to it, with a mask on the other queries of the block: the same
function at about T n instead of T^2, and a context that was encoded once answers any number of queries. A
learned token that every context begins with stands for
nothing seen yet, so that a context may be empty. The output projections of attention and of the feed-forward
part start at zero: each block begins as the identity, and the first predictions ignore the context.

Source: Müller et al., Transformers Can Do Bayesian Inference (2022), section 4 and appendix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Normal

from paperback.bayes.prior_fitted.riemann import RiemannDistribution, quantile_borders
from paperback.errors import DataError
from paperback.saving import Saved

Head = Literal["riemann", "gaussian", "categorical"]
Units = Literal["prior", "data"]
QUERY_BLOCK = 128  # queries of a task that go through the network together
TOKENS_AT_ONCE = 65_536  # queries of all tasks that do
SMALLEST_STD = 1e-4  # of the Gaussian head, in standard deviations of the prior's targets

Memory = list[tuple[Tensor, Tensor]]  # keys and values of the context, for each block


class Context(NamedTuple):
    """Contexts that were read: what all queries share.

    Attributes:
        memory: keys and values ``(tasks, heads, 1 + n, width of a head)`` of each block.
    """

    memory: Memory


class PriorFittedTransformer(Saved, nn.Module):
    """A network that reads data sets and predicts the targets of further rows.

    It knows nothing before `paperback.bayes.prior_fitted.fit_prior` has trained it on a prior.

    Args:
        num_features: most features of a row, >= 1; rows with fewer are filled up with zeros and multiplied
            by the root of the ratio of the two numbers.
        head: "riemann" for bars, "gaussian" for a normal law, "categorical" for classes.
        d_model: width of a token, a multiple of `heads`.
        layers: number of blocks.
        heads: of attention.
        hidden_factor: width of the feed-forward part, in widths of a token.
        max_context: most rows of a context.
        n_bars: of the head "riemann".
        n_classes: of the head "categorical", 2 or more.
        units: "prior": features and targets are in the prior's units, which have a meaning. "data": the
            features, and in regression the targets, are standardised by the context, in the training as in
            use; for data of any unit. In regression a context then has two rows at least.
        query_attends_self: False leaves the query out of its own softmax, as attentive neural processes do.

    Attributes:
        settings: the arguments.
        borders: of the bars.
        x_shift, x_scale, y_shift, y_scale: moments of the prior, by which tokens are standardised.
        x_low, x_high, y_low, y_high: between them lay what the prior drew.
        trained_steps: 0 before the training. All but the arguments are buffers.

    Raises:
        DataError: if an argument is out of range.
    """

    borders: Tensor
    x_shift: Tensor
    x_scale: Tensor
    y_shift: Tensor
    y_scale: Tensor
    x_low: Tensor
    x_high: Tensor
    y_low: Tensor
    y_high: Tensor
    trained_steps: Tensor

    def __init__(
        self,
        num_features: int = 1,
        *,
        head: Head = "riemann",
        d_model: int = 128,
        layers: int = 4,
        heads: int = 4,
        hidden_factor: int = 2,
        max_context: int = 64,
        n_bars: int = 200,
        n_classes: int = 2,
        units: Units = "prior",
        query_attends_self: bool = True,
    ) -> None:
        super().__init__()
        sizes: dict[str, Any] = {
            "num_features": num_features,
            "d_model": d_model,
            "layers": layers,
            "heads": heads,
            "hidden_factor": hidden_factor,
            "max_context": max_context,
        }
        for name, value in sizes.items():
            if value < 1:
                raise DataError(f"{name} is {value}; it must be at least 1.")
        if d_model % heads:
            raise DataError(f"d_model is {d_model}, which {heads} heads do not divide; take a multiple.")
        if head not in get_args(Head) or units not in get_args(Units):
            raise DataError(f"head is {head!r} and units {units!r}; they are one of {Head} and of {Units}.")
        if n_bars < 3 or n_classes < 2:
            raise DataError(f"n_bars is {n_bars} and n_classes {n_classes}; give at least 3 and 2.")
        self.settings = sizes | {"head": head, "n_bars": n_bars, "n_classes": n_classes, "units": units,
                                 "query_attends_self": query_attends_self}  # fmt: skip
        self.num_features, self.max_context = num_features, max_context
        self.head, self.n_classes, self.units = head, n_classes, units
        self.embed_x = nn.Linear(num_features, d_model)
        self.embed_y = nn.Embedding(n_classes, d_model) if head == "categorical" else nn.Linear(1, d_model)
        self.nothing = nn.Parameter(0.02 * torch.randn(d_model))
        self.blocks = nn.ModuleList(
            Block(d_model, heads, hidden_factor, query_attends_self) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(d_model)
        self.fewest_rows = 2 if units == "data" and head != "categorical" else 0
        outputs = {"riemann": n_bars, "gaussian": 2, "categorical": n_classes}[head]
        hidden = hidden_factor * d_model
        self.decoder = nn.Sequential(nn.Linear(d_model, hidden), nn.GELU(), nn.Linear(hidden, outputs))
        self.register_buffer("borders", torch.linspace(-3, 3, n_bars + 1))
        for name, start in (("shift", 0.0), ("scale", 1.0)):
            self.register_buffer(f"x_{name}", torch.full((num_features,), start))
            self.register_buffer(f"y_{name}", torch.tensor(start))
        for name, start in (("low", -torch.inf), ("high", torch.inf)):
            self.register_buffer(f"x_{name}", torch.full((num_features,), start))
            self.register_buffer(f"y_{name}", torch.tensor(start))
        self.register_buffer("trained_steps", torch.zeros((), dtype=torch.int64))

    def set_prior_moments(
        self, x: Float[Tensor, "rows features"], y: Float[Tensor, " rows"], context_y: Float[Tensor, " rows"]
    ) -> None:
        """Note what the prior's numbers are like, before the training.

        Args:
            x: many rows of the prior, filled up to `num_features`.
            y: many targets that are to be predicted; the borders of the bars are their quantiles.
            context_y: many targets of contexts.
        """
        if self.units == "prior":  # otherwise features are standardised already
            std = x.std(0)
            self.x_shift.copy_(x.mean(0))
            self.x_scale.copy_(torch.where(std > 1e-6, std, 1.0))
            self.x_low.copy_(x.amin(0))
            self.x_high.copy_(x.amax(0))
        if self.head == "categorical":
            return
        # The quantiles' scale: a prior may have tails without a variance.
        low, middle, high = context_y.double().quantile(context_y.new_tensor([0.16, 0.5, 0.84]).double())
        self.y_shift.copy_(middle)
        self.y_scale.copy_(((high - low) / 2).clamp_min(1e-6))
        self.y_low.copy_(y.amin())
        self.y_high.copy_(y.amax())
        if self.head == "riemann":
            self.borders.copy_(quantile_borders(y, len(self.borders) - 1))

    # -- rows in, laws out -------------------------------------------------------------------------------

    def forward(
        self,
        context_x: Float[Tensor, "tasks n features"],
        context_y: Float[Tensor, "tasks n"],
        x: Float[Tensor, "tasks queries features"],
    ) -> Float[Tensor, "tasks queries outputs"]:
        """What the head needs, for every query of every task, in the network's own units.

        Args:
            context_x: features, standardised where `units` is "data".
            context_y: targets likewise, or class indices.
            x: features of the queries.

        Returns:
            Logits of bars or classes, or the raw mean and scale of a normal law.
        """
        return self.answer(self.read(context_x, context_y), x)

    def read(
        self, context_x: Float[Tensor, "tasks n features"], context_y: Float[Tensor, "tasks n"]
    ) -> Context:
        """Run contexts through the network and keep the keys and values that queries attend to."""
        rows = self._embedded(context_x)
        if self.head == "categorical":
            rows = rows + self.embed_y(context_y.long())
        else:
            rows = rows + self.embed_y(((context_y - self.y_shift) / self.y_scale)[..., None].to(rows))
        tokens = torch.cat([self.nothing.expand(len(rows), 1, -1), rows], 1)
        memory: Memory = []
        for i, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            query, key, value = block.projected(tokens)
            memory.append((key, value))
            if i + 1 < len(self.blocks):  # what the last block makes of the context, nobody sees
                tokens = block.finished(tokens, F.scaled_dot_product_attention(query, key, value))
        return Context(memory)

    def answer(self, context: Context, x: Float[Tensor, "tasks queries features"]) -> Tensor:
        """Run queries through the network, a block at a time; each sees the context and itself."""
        size = min(QUERY_BLOCK, max(1, TOKENS_AT_ONCE // max(1, len(x))))
        parts = [self._answer_block(context, part) for part in x.split(size, 1)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _answer_block(self, context: Context, x: Tensor) -> Tensor:
        tokens = self._embedded(x)
        n, queries = context.memory[0][0].shape[-2], x.shape[1]
        visible = torch.ones(queries, n + queries, dtype=torch.bool, device=x.device)
        visible[:, n:].fill_(False).fill_diagonal_(True)
        for block, memory in zip(self.blocks, context.memory, strict=True):
            assert isinstance(block, Block)
            tokens = block.query(tokens, *memory, visible)
        return self.decoder(self.norm(tokens))

    def law(self, outputs: Float[Tensor, "*batch outputs"]) -> Distribution:
        """The law that the head makes of the network's outputs, computed in float64."""
        outputs = outputs.double()
        if self.head == "riemann":
            return RiemannDistribution(outputs, self.borders)
        if self.head == "categorical":
            return Categorical(logits=outputs, validate_args=False)
        mean = self.y_shift + self.y_scale * outputs[..., 0]
        std = self.y_scale * (F.softplus(outputs[..., 1]) + SMALLEST_STD)
        return Normal(mean, std, validate_args=False)

    def negative_log_likelihood(self, outputs: Tensor, y: Tensor) -> Tensor:
        """-log q(y) of each query, nats, ``(tasks, queries)``."""
        if self.head == "categorical":
            return F.cross_entropy(outputs.flatten(0, -2), y.long().flatten(), reduction="none").view_as(y)
        if self.head == "riemann":
            return -RiemannDistribution(outputs, self.borders).log_prob(y)
        law = self.law(outputs)
        return -law.log_prob(y.double()).float()

    def outside_prior(
        self, x: Float[Tensor, "n features"], y: Float[Tensor, "*outputs n"]
    ) -> tuple[float, float]:
        """Shares of rows and of targets that lie well outside of all that the prior drew.

        Features are not judged where the network's units are "data".
        """
        room = 0.05 * (self.y_high - self.y_low)
        outside_y = (y < self.y_low - room) | (y > self.y_high + room)
        if self.head == "categorical":
            outside_y = torch.zeros(1)
        if self.units == "data":
            return 0.0, float(outside_y.double().mean())
        rows, margin = self.filled(x), 0.05 * (self.x_high - self.x_low)
        outside_x = ((rows < self.x_low - margin) | (rows > self.x_high + margin)).any(-1)
        return float(outside_x.double().mean()), float(outside_y.double().mean())

    def filled(self, x: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch num_features"]:
        """Rows of fewer features: multiplied by sqrt(num_features / features), then filled up with zeros.

        The variance of a token is then that of a full row. (The authors multiply by the ratio itself.)
        """
        missing = self.num_features - x.shape[-1]
        if missing < 0:
            raise DataError(
                f"X has {x.shape[-1]} features and the network was made for at most {self.num_features}; "
                "leave some out, or train a network with a larger num_features."
            )
        return F.pad(x * math.sqrt(self.num_features / x.shape[-1]), (0, missing)) if missing else x

    def _embedded(self, x: Tensor) -> Tensor:
        x = x.to(self.x_shift)
        return self.embed_x((self.filled(x) - self.x_shift) / self.x_scale)


class Block(nn.Module):
    """Attention to the context and a feed-forward part, both on normalised tokens and added to them.

    Args:
        width: of a token.
        heads: of attention.
        hidden_factor: width of the feed-forward part, in widths of a token.
        query_attends_self: whether a query's own token joins its softmax.
    """

    def __init__(self, width: int, heads: int, hidden_factor: int, query_attends_self: bool) -> None:
        super().__init__()
        self.heads, self.query_attends_self = heads, query_attends_self
        self.norm_attention, self.norm_forward = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        hidden = hidden_factor * width
        self.feed_forward = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        for parameter in (*self.out.parameters(), *self.feed_forward[-1].parameters()):
            nn.init.zeros_(parameter)

    def query(self, tokens: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
        """Tokens of queries after this block.

        Args:
            tokens: ``(tasks, queries, width)``.
            key: of the context, ``(tasks, heads, n, width of a head)``.
            value: likewise.
            visible: which of the context's keys and then the queries' a query may see, ``(queries, n +
                queries)``.

        Returns:
            As `tokens`.
        """
        query, own_key, own_value = self.projected(tokens)
        if not self.query_attends_self:
            return self.finished(tokens, F.scaled_dot_product_attention(query, key, value))
        keys, values = torch.cat([key, own_key], 2), torch.cat([value, own_value], 2)
        return self.finished(tokens, F.scaled_dot_product_attention(query, keys, values, attn_mask=visible))

    def projected(self, tokens: Tensor) -> Sequence[Tensor]:
        """Queries, keys and values, ``(tasks, heads, tokens, width of a head)`` each."""
        joint = self.query_key_value(self.norm_attention(tokens))
        return joint.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def finished(self, tokens: Tensor, attended: Tensor) -> Tensor:
        """Tokens with what attention found, and then the feed-forward part, added to them."""
        tokens = tokens + self.out(attended.transpose(1, 2).flatten(2))
        return tokens + self.feed_forward(self.norm_forward(tokens))
