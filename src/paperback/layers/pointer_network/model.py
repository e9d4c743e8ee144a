"""The pointer network, and the two models of fixed dictionary that the paper measures it against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from paperback.errors import DataError
from paperback.layers.interface import Cost
from paperback.layers.pointer_network.attention import PointerAttention
from paperback.layers.pointer_network.checks import PAD, STOP, check_points, check_targets
from paperback.layers.pointer_network.decoding import Constraint, Decoded, beam_search
from paperback.layers.pointer_network.encoders import ENCODERS, HEADS, State
from paperback.layers.pointer_network.learning import Source, fit, reinforce
from paperback.layers.pointer_network.metrics import Metric, score
from paperback.saving import Saved
from paperback.training import History

INITIAL = 0.08  # weights begin uniform in +-0.08, section 4.1 of the paper


@dataclass
class Memory:
    """What the decoder knows of its input. Index 0 of n+1 is "stop", 1 .. n are the elements.

    Attributes:
        elements: e_0 .. e_n, ``(batch, n+1, hidden)``.
        allowed: False at padding, and at "stop" where the model has none, ``(batch, n+1)``.
        fed: what the decoder is fed after each choice; "stop" ends the output, so that its place holds the
            "go" vector of the first step, ``(batch, n+1, features)``.
        projected: the elements as each attention sees them, ``(batch, n+1, hidden)`` each.
        start: first state of the decoder.
    """

    elements: Tensor
    allowed: Tensor
    fed: Tensor
    projected: list[Tensor]
    start: State

    def rows(self, index: Tensor) -> Memory:
        """The memory of these rows of the batch, in this order."""
        h, c = self.start
        return Memory(
            self.elements[index],
            self.allowed[index],
            self.fed[index],
            [projected[index] for projected in self.projected],
            (h[:, index], c[:, index]),
        )


class PointerNetwork(Saved, nn.Module):
    """A sequence-to-sequence model whose outputs are positions of its own input.

    Outputs are indices 1 .. n of the elements; 0 is "stop". Weights do not depend on n: a network trained on
    small sets runs on large ones (not so the baselines, whose dictionary is fixed).

    Args:
        input_dim: features of an element.
        hidden: width of encoder, decoder and attention.
        layers: of the encoder and of the decoder.
        mode: "pointer"; "seq2seq" (softmax over a fixed dictionary from the decoder's state) and "attention"
            (from the state and the attended context) are the paper's baselines.
        feed: what the decoder is fed after a choice: the features of the element ("input"), or what the
            encoder made of it, without gradient ("encoder").
        glimpses: rounds of attention that refine the query before pointing.
        encoder: "lstm", or "transformer" without positions, whose answer does not depend on the order of the
            input (ours).
        n_max: size of the fixed dictionary of the baselines; the pointer network has none.
        stop: whether outputs end by "stop". Without it an output has as many entries as the input.

    Raises:
        DataError: if an argument is out of range.
    """

    def __init__(
        self,
        input_dim: int,
        hidden: int = 128,
        layers: int = 1,
        mode: Literal["pointer", "seq2seq", "attention"] = "pointer",
        feed: Literal["input", "encoder"] = "input",
        glimpses: int = 0,
        encoder: Literal["lstm", "transformer"] = "lstm",
        n_max: int | None = None,
        stop: bool = True,
    ) -> None:
        super().__init__()
        _check_arguments(input_dim, hidden, layers, mode, feed, glimpses, encoder, n_max)
        self.input_dim, self.hidden, self.layers = input_dim, hidden, layers
        self.mode, self.feed, self.n_max, self.stop = mode, feed, n_max, stop
        self.encoder = ENCODERS[encoder](input_dim, hidden, layers)
        width = input_dim if feed == "input" else hidden
        self.decoder = nn.LSTM(width, hidden, layers, batch_first=True)
        self.go = nn.Parameter(torch.empty(width))
        self.end = nn.Parameter(torch.empty(hidden))  # e_0
        rounds = {"pointer": glimpses + 1, "seq2seq": 0, "attention": 1}[mode]
        self.attentions = nn.ModuleList(PointerAttention(hidden, hidden, hidden) for _ in range(rounds))
        if n_max is not None:
            self.dictionary = nn.Linear(hidden * (1 + rounds), n_max + 1)
        kept = set(self.encoder.parameters()) if encoder == "transformer" else set()
        for parameter in self.parameters():
            if parameter not in kept:
                nn.init.uniform_(parameter, -INITIAL, INITIAL)

    def forward(
        self,
        points: Float[Tensor, "batch n input_dim"],
        targets: Int[Tensor, "batch m"],
        lengths: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch m n+1"]:
        """Logits of every output given the ones before it in the targets (teacher forcing).

        Args:
            points: the elements of each input.
            targets: indices 1 .. n of elements, 0 for "stop", -1 after it.
            lengths: real elements of each input, the first ones; all if not given.

        Returns:
            Logits over "stop" and the elements, -inf at padding.

        Raises:
            DataError: if points, targets or lengths do not fit.
        """
        lengths = self.check(points, lengths)
        check_targets(targets, lengths, self.stop)
        memory = self.encode(points, lengths)
        before = F.pad(targets[:, :-1].clamp_min(STOP), (1, 0), value=STOP)
        states, _ = self.decoder(_choose(memory.fed, before), memory.start)
        return self.logits(states, memory)

    def decode(
        self,
        points: Float[Tensor, "batch n input_dim"],
        lengths: Int[Tensor, " batch"] | None = None,
        beam: int = 1,
        constraint: Constraint | Literal["permutation", "triangles"] | None = None,
        max_len: int | None = None,
        length_normalised: bool = False,
    ) -> Decoded:
        """The most probable outputs that beam search finds; one beam is greedy search.

        A wide beam can lose the greedy output, which is therefore searched for too: more beams than one are
        never worse than one.

        Args:
            points: the elements of each input.
            lengths: real elements of each input; all if not given.
            beam: number of beams, >= 1.
            constraint: which outputs are allowed. "permutation": each element once, then stop; "triangles":
                triples of different elements; or a function, see `Constraint`.
            max_len: most entries of an output, "stop" included; n+1 if not given (n without "stop").
            length_normalised: compare outputs by log-probability per entry.

        Returns:
            The outputs with their log-probabilities.

        Raises:
            DataError: if an argument does not fit, or a constraint leaves nothing to choose.
        """
        lengths = self.check(points, lengths)
        with torch.no_grad():
            return beam_search(self, points, lengths, beam, constraint, max_len, length_normalised)

    def loss(self, points: Tensor, targets: Tensor, lengths: Tensor | None = None) -> Float[Tensor, ""]:
        """Mean negative log-probability of the outputs, per entry, in nats. Arguments as in `forward`."""
        logits = self(points, targets, lengths)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=PAD)

    def fit(
        self,
        source: Source,
        steps: int,
        lr: float = 2e-3,
        batch_size: int = 128,
        clip: float | None = 2.0,
        seed: int = 0,
        progress: bool = True,
        **training: Any,
    ) -> History:
        """Learn from inputs with their outputs; see `paperback.layers.pointer_network.learning.fit`."""
        return fit(self, source, steps, lr, batch_size, clip, seed, progress, **training)

    def reinforce(
        self,
        sampler: Callable[[int, torch.Generator], tuple[Tensor, Tensor]],
        cost: Callable[[Tensor, Tensor], Tensor],
        steps: int,
        **settings: Any,
    ) -> History:
        """Learn without outputs, from a cost of them; see `paperback.layers.pointer_network.learning`."""
        return reinforce(self, sampler, cost, steps, **settings)

    def score(
        self,
        points: Tensor,
        targets: Tensor,
        metric: Metric = "hull",
        lengths: Tensor | None = None,
        **decoding: Any,
    ) -> dict[str, float]:
        """Decode and measure; see `paperback.layers.pointer_network.metrics.score`."""
        return score(self, points, targets, metric, lengths, **decoding)

    # -- the parts that training and decoding share ---------------------------------------------------------

    def check(self, points: Tensor, lengths: Tensor | None) -> Int[Tensor, " batch"]:
        """Refuse inputs that do not fit the model; return the lengths."""
        lengths = check_points(points, lengths, self.input_dim)
        if self.n_max is not None and points.shape[1] > self.n_max:
            raise DataError(
                f'points have {points.shape[1]} elements; the dictionary of mode="{self.mode}" ends at n_max '
                f'= {self.n_max}: raise n_max and train again, or use mode="pointer", which has no limit.'
            )
        return lengths

    def encode(self, points: Tensor, lengths: Tensor) -> Memory:
        """Read the input."""
        batch, n, _ = points.shape
        features, start = self.encoder(points, lengths)
        elements = torch.cat([self.end.expand(batch, 1, -1), features], 1)
        allowed: Bool[Tensor, "batch n+1"] = torch.arange(n + 1, device=points.device) <= lengths[:, None]
        if not self.stop:
            allowed[:, STOP] = False
        shown = points if self.feed == "input" else features.detach()
        fed = torch.cat([self.go.expand(batch, 1, -1), shown], 1)
        projected = [attention.of_keys(elements) for attention in self._attentions()]
        return Memory(elements, allowed, fed, projected, start)

    def advance(self, choice: Int[Tensor, " batch"], state: State, memory: Memory) -> tuple[Tensor, State]:
        """One step of the decoder after a choice: log-probabilities ``(batch, n+1)`` and the next state."""
        states, state = self.decoder(_choose(memory.fed, choice[:, None]), state)
        return self.logits(states, memory)[:, 0].log_softmax(-1), state

    def logits(self, states: Float[Tensor, "batch m hidden"], memory: Memory) -> Tensor:
        """What the decoder's states say of every index, ``(batch, m, n+1)``."""
        if self.mode == "pointer":
            query = states
            *glimpses, pointer = self._attentions()
            for attention, projected in zip(glimpses, memory.projected[:-1], strict=True):
                query = attention.glimpse(query, projected, memory.elements, memory.allowed)
            return pointer.score(query, memory.projected[-1], memory.allowed)
        if self.mode == "attention":
            context = self._attentions()[0].glimpse(
                states, memory.projected[0], memory.elements, memory.allowed
            )
            states = torch.cat([states, context], -1)
        # The paper's baselines may name an index beyond the input; ours are spared that error.
        scores = self.dictionary(states)[..., : memory.allowed.shape[1]]
        return scores.masked_fill(~memory.allowed[:, None], -torch.inf)

    def _attentions(self) -> list[PointerAttention]:
        return [layer for layer in self.attentions if isinstance(layer, PointerAttention)]

    def cost(self, length: int, outputs: int | None = None) -> Cost:
        """Operations of one teacher-forced pass, and what it keeps for the backward pass.

        Args:
            length: elements of the input.
            outputs: entries of the output; length + 1 if not given.

        Returns:
            For the LSTM encoder, or the transformer with its scores kept.
        """
        m, n, h = length + 1 if outputs is None else outputs, length + 1, self.hidden
        matrices = sum(p.numel() for name, p in self.named_parameters() if p.ndim == 2 and "encoder" in name)
        decoder = sum(p.numel() for p in self.decoder.parameters() if p.ndim == 2)
        flops, kept = 2 * (length * matrices + m * decoder), 8 * h * self.layers * (length + m)
        if "transformer" in dict(self.encoder.named_children()):
            flops += 4 * self.layers * length * length * h
            kept += self.layers * (12 * length * h + HEADS * length * length)
        flops += len(self.attentions) * (2 * h * h * (n + m) + 4 * m * n * h)
        kept += len(self.attentions) * (m * n * h + m * n)
        if self.n_max is not None:
            flops += 2 * m * self.dictionary.weight.numel()
            kept += m * (self.n_max + 1)
        return Cost(flops, kept * self.go.element_size())


def _choose(table: Float[Tensor, "batch n features"], index: Int[Tensor, "batch m"]) -> Tensor:
    """Rows of a table by index, ``(batch, m, features)``."""
    return table.gather(1, index[..., None].expand(-1, -1, table.shape[2]))


def _check_arguments(
    input_dim: int, hidden: int, layers: int, mode: str, feed: str, glimpses: int, encoder: str,
    n_max: int | None,
) -> None:  # fmt: skip
    for name, value in (("input_dim", input_dim), ("hidden", hidden), ("layers", layers)):
        if value < 1:
            raise DataError(f"{name} is {value}; it must be at least 1.")
    for name, text, known in (
        ("mode", mode, ("pointer", "seq2seq", "attention")),
        ("feed", feed, ("input", "encoder")),
        ("encoder", encoder, tuple(ENCODERS)),
    ):
        if text not in known:
            raise DataError(f"{name} is {text!r}; it must be one of {', '.join(known)}.")
    if glimpses < 0 or (glimpses and mode != "pointer"):
        raise DataError(f'glimpses is {glimpses} with mode="{mode}"; only mode="pointer" has any, >= 0.')
    if encoder == "transformer" and hidden % HEADS:
        raise DataError(f"hidden is {hidden}; the transformer's {HEADS} heads need a multiple of {HEADS}.")
    if (n_max is None) != (mode == "pointer"):
        need = "has no dictionary: leave n_max out" if mode == "pointer" else "needs n_max, its dictionary"
        raise DataError(f'n_max is {n_max}; mode="{mode}" {need}.')
    if n_max is not None and n_max < 1:
        raise DataError(f"n_max is {n_max}; it must be at least 1.")
