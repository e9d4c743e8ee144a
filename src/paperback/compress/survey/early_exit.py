"""Early exit: a token that the network is sure of after some blocks is not changed by the blocks that are
left.

After each exit block the model's own last norm and head read the hidden state; where the confidence, the
largest probability (or its lead over the second), reaches a threshold, the hidden state of the token is
kept as it is up to the head, and later tokens attend to that state, as in CALM. One threshold for all exits
is found on the validation part: the lowest with which so many tokens get the answer of the whole network.
Weights are not changed; the exits are four settings in the model's configuration. `DropBlocks` takes whole
blocks away for all tokens.

Source: Schuster et al. (2022), CALM, NeurIPS, sections 3 and 4; Men et al. (2024), ShortGPT, for
    `DropBlocks`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from paperback.compress.budget import Budget
from paperback.compress.data import Batch, run
from paperback.compress.interface import Compressor, Family, Job
from paperback.compress.survey.blocks import block_influence, keep_blocks, residual_blocks
from paperback.compress.survey.fitting import largest_that_fits
from paperback.compress.survey.healing import Healing, heal
from paperback.compress.survey.smoothing import small_batch
from paperback.errors import DataError, NotSupportedError
from paperback.networks.surgery import HEADS_AND_EMBEDDINGS

Confidence = Literal["largest", "lead"]
BISECTIONS = 12


@dataclass
class Exits:
    """Where and when tokens leave, and what the last pass did.

    Attributes:
        after: indices of blocks after which a token may leave.
        threshold: confidence from which it does.
        confidence: "largest" probability, or its "lead" over the second.
        blocks: how many blocks the network has.
        tail: names of the modules between the last block and the answer.
        left: tokens that have left, ``(batch, tokens)``, in the pass at hand.
        worked: token-blocks computed since `reset`; `tokens` is the number of tokens.
    """

    after: tuple[int, ...]
    threshold: float
    confidence: Confidence
    blocks: int
    tail: tuple[str, ...]
    left: Tensor | None = None
    worked: int = 0
    tokens: int = 0

    def reset(self) -> None:
        """Count anew."""
        self.worked = self.tokens = 0

    @property
    def depth(self) -> float:
        """Mean number of blocks that changed a token since `reset`."""
        return self.worked / max(1, self.tokens)


@dataclass
class _ExitingForward:
    """Takes the place of a block's forward: tokens that have left are not changed, and confident ones
    leave."""

    original: Callable[..., Any]
    index: int
    exits: Exits
    tail: list[nn.Module] = field(default_factory=list)

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        exits = self.exits
        if self.index == 0 or exits.left is None:
            exits.left = torch.zeros(hidden.shape[:-1], dtype=torch.bool, device=hidden.device)
            exits.tokens += exits.left.numel()
        output = self.original(hidden, *args, **kwargs)
        changed = output if isinstance(output, Tensor) else output[0]
        changed = torch.where(exits.left.unsqueeze(-1), hidden, changed)
        exits.worked += int((~exits.left).sum())
        if self.index in exits.after:
            answer = changed
            for module in self.tail:
                answer = module(answer)
            exits.left = exits.left | (confidence_of(answer, exits.confidence) >= exits.threshold)
        return changed if isinstance(output, Tensor) else (changed, *output[1:])


def confidence_of(logits: Tensor, kind: Confidence) -> Tensor:
    """How sure logits are, ``(...)`` in [0, 1] from ``(..., classes)``."""
    best = logits.float().softmax(-1).topk(2, dim=-1).values
    return best[..., 0] if kind == "largest" else best[..., 0] - best[..., 1]


class EarlyExit(Compressor):
    """Lets tokens leave a network early, so that a stated share of answers stays as it was.

    A batch is computed block by block for all its tokens, so that what the exits save is counted, not
    gained, in a batch; the report says how many blocks a token needs.

    Args:
        agreement: share of validation tokens that must get the whole network's answer, in (0, 1].
        after: indices of blocks after which tokens may leave; all but the last if not given.
        confidence: "largest" probability, or its "lead" over the second.
        targets: not used.
        ignore: not used.
        seed: not used.

    Raises:
        DataError: if a setting is out of range.
    """

    family: ClassVar[Family] = "dynamic"
    needs: ClassVar[frozenset[str]] = frozenset({"validation"})

    def __init__(
        self,
        agreement: float = 0.95,
        *,
        after: Sequence[int] | None = None,
        confidence: Confidence = "largest",
        targets: Sequence[str] | None = None,
        ignore: Sequence[str] = HEADS_AND_EMBEDDINGS,
        seed: int = 0,
    ) -> None:
        super().__init__(targets=targets, ignore=ignore, seed=seed)
        if not 0 < agreement <= 1:
            raise DataError(f"agreement is {agreement}; it must be above 0 and at most 1.")
        if confidence not in ("largest", "lead"):
            raise DataError(f"confidence is {confidence!r}; it must be 'largest' or 'lead'.")
        self.agreement, self.confidence = agreement, confidence
        self.after = None if after is None else tuple(after)

    @torch.no_grad()
    def _compress(self, job: Job) -> None:
        assert job.data is not None
        total = len(residual_blocks(job.model))
        after = self.after if self.after is not None else tuple(range(total - 1))
        if any(not 0 <= index < total - 1 for index in after):
            raise DataError(f"after is {after}; exits stand after blocks 0 to {total - 2}.")
        batches = list(job.data.batches("val"))
        answers = [run(job.model, batch).argmax(-1) for batch in batches]
        tail = _tail(job.model, small_batch(batches[0]))
        exits = Exits(after, 1.0, self.confidence, total, tail)
        _install(job.model, exits)
        low, high = 0.0, 1.0 + 1e-6  # nobody leaves at the upper end
        for _ in range(BISECTIONS):
            exits.threshold = (low + high) / 2
            if _agreement(job.model, batches, answers) >= self.agreement:
                high = exits.threshold
            else:
                low = exits.threshold
        exits.threshold = high
        exits.reset()
        kept = _agreement(job.model, batches, answers)
        config = getattr(job.model, "config", None)
        if config is not None:
            config.early_exit = settings_of(exits)
        job.extras |= {"exits": settings_of(exits), "depth": exits.depth}
        job.note(
            f"On the validation part a token needs {exits.depth:.2f} of {total} blocks, with the "
            "whole network's "
            f"answer for {kept:.1%}; a saved model is opened with compress.survey.attach_exits."
        )


def settings_of(exits: Exits) -> dict[str, Any]:
    """Exits as JSON values, for `attach_exits`."""
    return {
        "after": list(exits.after), "threshold": exits.threshold, "confidence": exits.confidence,
        "tail": list(exits.tail),
    }  # fmt: skip


def attach_exits(model: nn.Module, settings: Mapping[str, Any] | None = None) -> Exits:
    """Let tokens leave a model early, in place, with settings that `EarlyExit` found.

    Args:
        model: the original, as it was saved.
        settings: ``extras["exits"]`` of the result; by default what the model's configuration holds.

    Returns:
        The exits, which count the blocks that were needed.

    Raises:
        DataError: if there are no settings, or they are of another model.
    """
    found = settings if settings is not None else getattr(getattr(model, "config", None), "early_exit", None)
    try:
        exits = Exits(
            tuple(found["after"]), float(found["threshold"]), found["confidence"],  # type: ignore[index]
            len(residual_blocks(model)), tuple(found["tail"]),  # type: ignore[index]
        )  # fmt: skip
        _install(model, exits)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"these are not the exits of this model ({error}); give extras['exits'].") from error
    return exits


def _install(model: nn.Module, exits: Exits) -> None:
    tail = [model.get_submodule(name) for name in exits.tail]
    for index, (_, block) in enumerate(residual_blocks(model)):
        block.forward = _ExitingForward(block.forward, index, exits, tail)


def _agreement(model: nn.Module, batches: Sequence[Batch], answers: Sequence[Tensor]) -> float:
    same = [run(model, batch).argmax(-1) == answer for batch, answer in zip(batches, answers, strict=True)]
    return sum(int(s.sum()) for s in same) / sum(s.numel() for s in same)


@torch.no_grad()
def _tail(model: nn.Module, batch: Batch) -> tuple[str, ...]:
    """Names of the modules that lead from the last block's output to the model's, each fed by the one before.

    Raises:
        NotSupportedError: if something else stands between.
    """
    last = residual_blocks(model)[-1][1]
    calls: list[tuple[str, Tensor, Tensor]] = []
    ends: list[Tensor] = []

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                calls.append((name, args[0], output))

        return hook

    handles = [m.register_forward_hook(note(n)) for n, m in model.named_modules() if not list(m.children())]
    handles.append(
        last.register_forward_hook(lambda _, __, o: ends.append(o if isinstance(o, Tensor) else o[0]))
    )
    try:
        answer = run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    names, here = [], ends[-1]
    while not _same(here, answer):
        following = [(n, o) for n, x, o in calls if _same(x, here) and n not in names]
        if not following:
            raise NotSupportedError(
                f"{type(model).__name__} does more after its last block than a norm and a head, so "
                "hidden states "
                "cannot be read early; drop blocks with DropBlocks instead."
            )
        name, here = following[-1]
        names.append(name)
    return tuple(names)


def _same(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two tensors are views of the same numbers."""
    return ours.data_ptr() == theirs.data_ptr() and ours.numel() == theirs.numel()


class DropBlocks(Compressor):
    """Takes away the blocks that turn their input least, for every token.

    Args:
        blocks: how many stay; three quarters of them, rounded up, if not given.
        healing: a training afterwards, with the original as its teacher; none if not given.
        targets: not used.
        ignore: not used.
        seed: of the order of the rows in the training.

    Raises:
        DataError: if blocks is below 1.
    """

    family: ClassVar[Family] = "dynamic"
    needs: ClassVar[frozenset[str]] = frozenset({"calibration"})
    budgets: ClassVar[tuple[str, ...]] = ("bytes", "ratio", "parameters")

    def __init__(
        self,
        blocks: int | None = None,
        *,
        healing: Healing | None = None,
        targets: Sequence[str] | None = None,
        ignore: Sequence[str] = HEADS_AND_EMBEDDINGS,
        seed: int = 0,
    ) -> None:
        super().__init__(targets=targets, ignore=ignore, seed=seed)
        if blocks is not None and blocks < 1:
            raise DataError(f"blocks is {blocks}; at least one stays.")
        self.blocks, self.healing = blocks, healing

    def _settle(self, budget: Budget, layers: Mapping[str, nn.Module], model: nn.Module) -> Self:
        """The most blocks that meet the budget."""
        if budget.unit not in self.budgets:
            raise budget.refuse("DropBlocks", *self.budgets)
        settled = copy.copy(self)
        settled.blocks = largest_that_fits(
            budget, model, range(len(residual_blocks(model)), 0, -1),
            lambda trial, kept: keep_blocks(trial, range(kept)), "DropBlocks",
        )  # fmt: skip
        return settled

    def _compress(self, job: Job) -> None:
        assert job.data is not None
        teacher = (job.teacher or copy.deepcopy(job.model)) if self.healing is not None else None
        influence = block_influence(job.model, job.data.batches("train"))
        kept = self.blocks if self.blocks is not None else -(-3 * len(influence) // 4)
        order = sorted(range(len(influence)), key=lambda i: influence[i], reverse=True)
        chosen = sorted(order[:kept])
        keep_blocks(job.model, chosen)
        job.extras |= {"influence": influence, "blocks": chosen}
        job.note(f"Blocks {', '.join(map(str, chosen))} of {len(influence)} stay.")
        if self.healing is not None:
            job.extras["losses"] = heal(job, self.healing, teacher=teacher)
