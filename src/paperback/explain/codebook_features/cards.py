"""A card for a code: where it is active, which token describes it, what it does to the output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from paperback.errors import DataError
from paperback.explain.codebook_features.edits import zero
from paperback.explain.codebook_features.inputs import batches

if TYPE_CHECKING:
    from paperback.explain.codebook_features.model import CodebookModel

Spell = Callable[[int], str]


@dataclass(frozen=True)
class CodeCard:
    """What there is to know of one code on some text.

    Attributes:
        site, group, code: which code.
        activations: tokens at which it is active, of how many: (active, all).
        tokens: the tokens it is active at, the commonest first: (token, precision, recall). Precision is how
            many of the code's activations are at this token, recall how many of the token's occurrences have
            the code.
        examples: pieces of text with the token it is active at in brackets.
        promotes: tokens whose log-probability is higher with the code than without it, at the tokens where it
            is active: (token, difference in nats), the largest first.
        suppresses: those whose log-probability is lower.
    """

    site: str
    group: int
    code: int
    activations: tuple[int, int]
    tokens: tuple[tuple[str, float, float], ...]
    examples: tuple[str, ...]
    promotes: tuple[tuple[str, float], ...]
    suppresses: tuple[tuple[str, float], ...]

    def __str__(self) -> str:
        active, total = self.activations
        lines = [
            f"code {self.code} of {self.site}, group {self.group}: active at {active:,} of {total:,} tokens"
        ]
        lines += [f"  {t!r}: precision {p:.2f}, recall {r:.2f}" for t, p, r in self.tokens]
        lines += [f"  promotes {t!r} by {d:+.2f} nats" for t, d in self.promotes]
        lines += [f"  suppresses {t!r} by {d:+.2f} nats" for t, d in self.suppresses]
        lines += [f"  ... {example}" for example in self.examples]
        return "\n".join(lines)


def code_card(
    model: CodebookModel,
    ids: Int[Tensor, "rows length"],
    site: str,
    code: int,
    group: int = 0,
    *,
    spell: Spell | None = None,
    top: int = 5,
    context: int = 8,
    batch_size: int = 32,
) -> CodeCard:
    """Describe a code of a language model by the text at which it is active.

    The effect on the output is causal: the code is dropped (`zero`) at all tokens, and the log-probabilities
    of the next token are compared where it was active.

    Args:
        model: a causal language model with codebooks.
        ids: text, token ids.
        site: where.
        code: which code.
        group: of which group.
        spell: a token's text, such as ``tokenizer.decode``; numbers are shown if not given.
        top: so many tokens and examples of each kind.
        context: tokens of an example on each side.
        batch_size: rows of one forward pass.

    Returns:
        The card.

    Raises:
        DataError: if there is no such code, or it is active nowhere in the text.
    """
    layer = model.codebook(site)
    if not 0 <= code < layer.n_codes or not 0 <= group < layer.groups:
        raise DataError(
            f"site {site!r} has no code {code} in group {group}; it has {layer.n_codes} codes in each of "
            f"{layer.groups} groups."
        )
    name = spell or str
    active, effect = _active_and_effect(model, ids, site, code, group, batch_size)
    if not active.any():
        raise DataError(
            f"code {code} of {site!r} is active nowhere in this text; give more, or another code."
        )
    there, counts = ids[active].unique(return_counts=True)
    common = counts.argsort(descending=True, stable=True)[:top]
    tokens = [
        (name(int(there[i])), float(counts[i] / active.sum()), float(counts[i] / (ids == there[i]).sum()))
        for i in common
    ]
    order = effect.argsort(descending=True)
    return CodeCard(
        site, group, code, (int(active.sum()), active.numel()), tuple(tokens),
        _examples(ids, active, name, top, context),
        tuple((name(int(t)), float(effect[t])) for t in order[:top] if effect[t] > 0),
        tuple((name(int(t)), float(effect[t])) for t in order.flip(0)[:top] if effect[t] < 0),
    )  # fmt: skip


@torch.no_grad()
def _active_and_effect(
    model: CodebookModel, ids: Tensor, site: str, code: int, group: int, batch_size: int
) -> tuple[Tensor, Tensor]:
    """Where the code is active, and the mean change of log-probabilities by it there."""
    active, total = [], torch.zeros(())
    for batch in batches(ids, batch_size):
        here = (model.codes(batch, batch_size=batch_size)[site][:, :, group] == code).any(-1)
        active.append(here)
        if here.any():
            rows = here.any(1)
            with_code = model.run(batch[rows]).logits.log_softmax(-1)  # type: ignore[index]
            with model.intervene({site: zero(code, group=group)}):
                without = model.run(batch[rows]).logits.log_softmax(-1)  # type: ignore[index]
            total = total + (with_code - without).cpu()[here[rows]].sum(0)
    where = torch.cat(active)
    return where, total / where.sum().clamp(min=1)


def _examples(ids: Tensor, active: Tensor, name: Spell, top: int, context: int) -> tuple[str, ...]:
    """Pieces of text around activations, from different rows as far as there are enough."""
    places = active.nonzero()
    first = torch.unique_consecutive(places[:, 0], return_counts=True)[1].cumsum(0).roll(1)
    first[0] = 0
    order: Sequence[int] = [*first.tolist(), *(i for i in range(len(places)) if i not in set(first.tolist()))]
    found = []
    for row, position in places[list(order[:top])].tolist():
        before = ids[row, max(0, position - context) : position].tolist()
        after = ids[row, position + 1 : position + 1 + context].tolist()
        text = "".join(map(name, before)) + f"[{name(int(ids[row, position]))}]" + "".join(map(name, after))
        found.append(" ".join(text.split()))
    return tuple(found)
