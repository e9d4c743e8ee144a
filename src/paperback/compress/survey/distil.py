"""Distillation: a student with fewer blocks learns to answer as the original does.

White box: the student sees the teacher's logits, T² KL(teacher || student), and its hidden states. Black
box: it sees only what a teacher says, text that the teacher writes after beginnings of the training rows
(labels that it gives, for classifiers), and learns that as if it were data. The student is given, or it is
the original with some of its blocks, evenly spaced, its other weights as they were.

Source: Hinton, Vinyals and Dean (2015); Sanh et al. (2019), DistilBERT, for the start; Kim and Rush (2016),
sequence-level distillation, for the black box; the survey, arXiv 2402.09748, section 5.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from paperback.compress.budget import Budget
from paperback.compress.data import run
from paperback.compress.interface import Compressor, Family, Job
from paperback.compress.survey.blocks import evenly_spaced, keep_blocks, residual_blocks
from paperback.compress.survey.fitting import largest_that_fits
from paperback.compress.survey.healing import Healing, heal, to_batch, training_rows
from paperback.errors import DataError, NotSupportedError
from paperback.training import seeded

Sight = Literal["white-box", "black-box"]


class Distil(Compressor):
    """A smaller network of the same family, taught by the original.

    Args:
        blocks: how many blocks the student keeps; half of them if not given.
        sight: what the student sees of its teacher.
        student: a network of the user's in place of the original with fewer blocks; it is copied.
        healing: steps, batch size, learning rate, temperature; weight of the hidden states (white box,
            between equal blocks only).
        prompt: tokens of a training row that begin the teacher's text (black box).
        sampling_temperature: of the teacher's text; 0 takes the most likely token.
        targets: not used.
        ignore: not used.
        seed: of the text and the order of the rows.

    Raises:
        DataError: if a setting is out of range.
    """

    family: ClassVar[Family] = "distill"
    needs: ClassVar[frozenset[str]] = frozenset({"training"})
    tuning_free: ClassVar[bool] = False
    budgets: ClassVar[tuple[str, ...]] = ("bytes", "ratio", "parameters")

    def __init__(
        self,
        blocks: int | None = None,
        sight: Sight = "white-box",
        *,
        student: nn.Module | None = None,
        healing: Healing | None = None,
        prompt: int = 8,
        sampling_temperature: float = 1.0,
        targets: Sequence[str] | None = None,
        ignore: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        super().__init__(targets=targets, ignore=ignore, seed=seed)
        if blocks is not None and blocks < 1:
            raise DataError(f"blocks is {blocks}; a student keeps at least one.")
        if sight not in ("white-box", "black-box"):
            raise DataError(f"sight is {sight!r}; it must be 'white-box' or 'black-box'.")
        if prompt < 1 or sampling_temperature < 0:
            raise DataError(
                f"prompt is {prompt}, sampling_temperature {sampling_temperature}; "
                "the first is at least 1, the second not negative."
            )
        self.blocks, self.sight, self.student = blocks, sight, student
        self.healing = healing or Healing(hidden_weight=0.1 if sight == "white-box" else 0.0)
        self.prompt, self.sampling_temperature = prompt, sampling_temperature

    def _settle(self, budget: Budget, layers: Mapping[str, nn.Module], model: nn.Module) -> Self:
        """The most blocks that meet the budget."""
        if budget.unit not in self.budgets or self.student is not None:
            raise budget.refuse("Distil", *(() if self.student is not None else self.budgets))
        total = len(residual_blocks(model))
        settled = copy.copy(self)
        settled.blocks = largest_that_fits(
            budget, model, range(total, 0, -1),
            lambda trial, kept: keep_blocks(trial, evenly_spaced(total, kept)), "Distil",
        )  # fmt: skip
        return settled

    def _compress(self, job: Job) -> None:
        teacher = job.teacher if job.teacher is not None else copy.deepcopy(job.model)
        states: list[tuple[str, str]] = []
        if self.student is not None:
            job.model = copy.deepcopy(self.student).eval()
        else:
            blocks = residual_blocks(job.model)
            kept = evenly_spaced(len(blocks), min(self.blocks or -(-len(blocks) // 2), len(blocks)))
            keep_blocks(job.model, kept)
            job.extras["blocks"] = kept
            job.note(f"The student has {len(kept)} of {len(blocks)} blocks.")
            if self.sight == "white-box" and job.teacher is None:
                # The output of a kept block stands for all blocks up to the next one that is kept.
                ends = [*(k - 1 for k in kept[1:]), len(blocks) - 1]
                states = [(blocks[i][0], blocks[end][0]) for i, end in enumerate(ends)]
        if self.sight == "white-box":
            job.extras["losses"] = heal(
                job, self.healing, teacher=teacher, states=states, description="distilling"
            )
            return
        rows = self._teachers_data(job, teacher)
        job.extras["losses"] = heal(job, self.healing, rows=rows, description="learning the teacher's text")

    @torch.no_grad()
    def _teachers_data(self, job: Job, teacher: nn.Module) -> Sequence[Tensor]:
        """What the teacher says: text after prompts, or labels of inputs."""
        assert job.data is not None
        wanted = self.healing.steps * self.healing.batch_size
        tensors, keys = training_rows(job.data, wanted, job.seed)
        ids = tensors[keys.index("input_ids") if keys is not None and "input_ids" in keys else 0]
        if ids.is_floating_point() or (len(tensors) > 1 and keys is None):
            labels = [
                run(teacher, to_batch(tuple(t[i : i + 64] for t in tensors), keys))
                for i in range(0, len(ids), 64)
            ]
            return [ids, torch.cat(labels).argmax(-1)]
        if not callable(getattr(teacher, "generate", None)):
            raise NotSupportedError(
                f"{type(teacher).__name__} has no generate(), so it cannot write text; use sight='white-box'."
            )
        with seeded(job.seed, "teacher's text"):
            texts = [
                written_text(teacher, part[:, : self.prompt], ids.shape[1], self.sampling_temperature)
                for part in ids.split(64)
            ]
        return [torch.cat(texts)]


def written_text(model: Any, prompts: Tensor, length: int, temperature: float) -> Tensor:
    """Continuations of token ids by a `transformers` causal language model, with torch's global random
    numbers.

    Args:
        model: in evaluation mode.
        prompts: ``(rows, tokens)``.
        length: tokens of a row with its prompt.
        temperature: of the draws; 0 for the most likely token.

    Returns:
        Token ids, ``(rows, length)``.
    """
    new = length - prompts.shape[1]
    how = (
        {"do_sample": True, "temperature": temperature, "top_k": 0}
        if temperature > 0
        else {"do_sample": False}
    )
    mask = torch.ones_like(prompts)
    ids: Tensor = model.generate(
        prompts, attention_mask=mask, min_new_tokens=new, max_new_tokens=new, pad_token_id=0, **how
    )
    return ids
