"""What a compressor is given beside the model: batches to calibrate or train on, to choose on, to judge on.

A batch is a dict (its keyword arguments), a tensor (one argument; token ids for a language model) or a pair
(inputs, labels). How a batch is run, what its loss is and how a model is judged on batches is written once,
here, so that every method and every measurement means the same.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperback.errors import DataError
from paperback.training import generator

Batch = Any  # dict of tensors, tensor, or (inputs, labels)
Batches = Any  # tensor of rows, (inputs, labels) of rows, sequence of batches, DataLoader, or () -> iterator
Loss = Callable[[nn.Module, Batch], Tensor]
Metric = Callable[[nn.Module, Iterable[Batch]], Mapping[str, float]]
BATCH_SIZE = 8  # rows of a batch, where the data are rows


@dataclass(frozen=True, eq=False)
class Data:
    """Batches for a compressor.

    Attributes:
        train: what is calibrated or trained on. A tensor of rows (token ids, images), a pair of tensors
            (inputs, labels), a list of batches, a DataLoader, or a function that gives a fresh iterator.
        val: what settings are chosen on; methods that choose insist on it.
        test: what the report judges on; if not given, that is `val`.
        example_input: one batch for operations and latency; if not given, the first of the data.
        batch_size: rows of a batch, where a part is a tensor or a pair of tensors.
    """

    train: Batches = None
    val: Batches = None
    test: Batches = None
    example_input: Batch = None
    batch_size: int = BATCH_SIZE

    def __post_init__(self) -> None:
        for name in ("train", "val", "test"):
            part = getattr(self, name)
            if isinstance(part, Iterator):
                raise DataError(
                    f"{name} is an iterator, which ends after one pass; give a list, a DataLoader, or a "
                    "function that makes a fresh iterator."
                )
        if self.batch_size < 1:
            raise DataError(f"batch_size is {self.batch_size}; it must be at least 1.")

    @classmethod
    def of(cls, data: Data | Batches | None) -> Data:
        """The data as they are, or batches as the training part of data without others."""
        return data if isinstance(data, Data) else cls(train=data)

    def batches(self, part: str) -> Iterator[Batch]:
        """A fresh pass over one part.

        Args:
            part: "train", "val" or "test".

        Raises:
            DataError: if the part is not there or has no batch.
        """
        source = getattr(self, part)
        if source is None:
            raise DataError(f"the data have no {part} part; give Data({part}=...).")
        empty = True
        for batch in _pass_over(source, self.batch_size):
            empty = False
            yield batch
        if empty:
            raise DataError(f"the {part} part has no batch; give at least one.")

    def example(self) -> Batch | None:
        """The example input, or the first batch of the first part there is."""
        if self.example_input is not None:
            return self.example_input
        for part in ("test", "val", "train"):
            if getattr(self, part) is not None:
                return next(self.batches(part))
        return None

    @property
    def judged(self) -> str | None:
        """The part that quality is measured on: the test part, else the validation part."""
        return "test" if self.test is not None else "val" if self.val is not None else None


def _pass_over(source: Batches, batch_size: int) -> Iterable[Batch]:
    if callable(source):
        return source()
    if isinstance(source, Tensor):
        return source.split(batch_size)
    if isinstance(source, tuple) and len(source) == 2 and all(isinstance(part, Tensor) for part in source):
        inputs, labels = source
        if len(inputs) != len(labels):
            raise DataError(f"there are {len(inputs)} rows of inputs and {len(labels)} labels.")
        return zip(inputs.split(batch_size), labels.split(batch_size), strict=True)
    if isinstance(source, Mapping):
        raise DataError("a mapping is one batch; give a list of batches.")
    return source


# -- running a batch -----------------------------------------------------------------------------------------


def run(model: nn.Module, batch: Batch) -> Tensor:
    """The model's answer to a batch: logits, or whatever tensor it gives first.

    Args:
        model: any module; the batch is brought to its device, numbers with a point to its precision.
        batch: a dict, a tensor, or (inputs, labels), of which the labels are not used.

    Returns:
        A tensor.

    Raises:
        DataError: if the batch is of another kind, or the model gives no tensor.
    """
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(like) if value.is_floating_point() else value.to(like.device)

    has_cache = (
        "use_cache" in inspect.signature(model.forward).parameters
    )  # of keys and values, never read here
    cache = {"use_cache": False} if has_cache else {}
    if isinstance(batch, Mapping):
        answer = model(**{name: moved(value) for name, value in batch.items() if name != "labels"}, **cache)
    else:
        inputs = batch[0] if isinstance(batch, tuple | list) else batch
        if not isinstance(inputs, Tensor):
            raise DataError(
                f"a batch is a {type(batch).__name__}; give a dict, a tensor, or (inputs, labels)."
            )
        answer = model(moved(inputs), **cache)
    for name in ("logits", "last_hidden_state"):
        if isinstance(getattr(answer, name, None), Tensor):
            return getattr(answer, name)
    first = answer[0] if isinstance(answer, tuple | list) else answer
    if not isinstance(first, Tensor):
        raise DataError(f"the model gives a {type(answer).__name__}; it must give a tensor, or one first.")
    return first


def labels_of(batch: Batch) -> Tensor | None:
    """The class indices that come with a batch, ``(rows,)``; None for token ids and bare inputs."""
    if isinstance(batch, Mapping):
        labels = batch.get("labels")
        return labels if isinstance(labels, Tensor) and labels.ndim == 1 else None
    if isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[1], Tensor):
        return batch[1]
    return None


def default_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The mean loss of a batch: cross-entropy with its labels, or of each token given those before it.

    Args:
        model: gives logits, ``(rows, classes)`` or ``(rows, tokens, vocabulary)``.
        batch: (inputs, labels), a dict with labels, or token ids ``(rows, tokens)``, bare or under input_ids.
            Positions whose attention mask is 0, or whose label is -100, do not count.

    Returns:
        A scalar, in nats.

    Raises:
        DataError: if the batch has neither labels nor token ids; pass a loss of your own then.
    """
    logits = run(model, batch)
    labels = labels_of(batch)
    if labels is not None:
        return F.cross_entropy(logits, labels.to(logits.device))
    targets = _next_tokens(batch)
    if targets is None or logits.ndim != 3:
        raise DataError(
            "the batch has neither labels nor token ids; pass loss=, a function of model and batch."
        )
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1), targets.to(logits.device).flatten(), ignore_index=-100
    )


def _next_tokens(batch: Batch) -> Tensor | None:
    """The token that follows each position but the last, ``(rows, tokens - 1)``; -100 where none counts."""
    if isinstance(batch, Mapping):
        labels = batch.get("labels", batch.get("input_ids"))
        if not isinstance(labels, Tensor):
            return None
        mask = batch.get("attention_mask")
        targets = labels[:, 1:]
        return targets if mask is None else targets.masked_fill(mask[:, 1:] == 0, -100)
    inputs = batch[0] if isinstance(batch, tuple | list) else batch
    return (
        inputs[:, 1:]
        if isinstance(inputs, Tensor) and inputs.ndim == 2 and not inputs.is_floating_point()
        else None
    )


# -- judging -------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    metric: Metric | None = None,
    original: nn.Module | None = None,
) -> dict[str, float]:
    """How good a model is on batches.

    Args:
        model: what is judged; put into evaluation mode, and back.
        batches: as of `Data.batches`.
        metric: a function ``(model, batches) -> {name: number}`` that takes the place of the usual numbers.
        original: the model before compression; adds "agreement", the share of rows (tokens) whose most
            likely class is the same.

    Returns:
        With labels "accuracy" and "loss", for language models "perplexity" and "loss" (nats a token; each row
        counts from its second token), and what the metric says.

    Raises:
        DataError: as `default_loss`, or if nothing counts.
    """
    batches = list(batches)
    with evaluating(model):
        if metric is not None:
            result = {name: float(value) for name, value in metric(model, batches).items()}
        else:
            result = _usual(model, batches)
        if original is not None:
            with evaluating(original):
                same = [_agreement(run(model, batch), run(original, batch)) for batch in batches]
            result["agreement"] = sum(s for s, _ in same) / max(1, sum(n for _, n in same))
    return result


def _usual(model: nn.Module, batches: Sequence[Batch]) -> dict[str, float]:
    nats, correct, count, labelled = 0.0, 0, 0, False
    for batch in batches:
        logits = run(model, batch)
        targets = labels_of(batch)
        labelled = targets is not None
        if targets is None:
            targets = _next_tokens(batch)
            if targets is None or logits.ndim != 3:
                raise DataError("the batches have neither labels nor token ids; pass metric= to judge by.")
            logits, targets = logits[:, :-1].flatten(0, 1), targets.flatten()
        targets = targets.to(logits.device)
        kept = targets != -100
        nats += float(F.cross_entropy(logits[kept].float(), targets[kept], reduction="sum"))
        correct += int((logits[kept].argmax(-1) == targets[kept]).sum())
        count += int(kept.sum())
    if count == 0:
        raise DataError("no row counts; every label is masked.")
    loss = nats / count
    if labelled:
        return {"accuracy": correct / count, "loss": loss}
    return {"perplexity": math.exp(min(loss, 700.0)), "loss": loss}


def _agreement(ours: Tensor, theirs: Tensor) -> tuple[int, int]:
    if ours.ndim < 2:
        return int((ours == theirs).sum()), ours.numel()
    same = ours.argmax(-1) == theirs.argmax(-1)
    return int(same.sum()), same.numel()


class evaluating:
    """Inside this context a module is in evaluation mode; afterwards every part is as it was."""

    def __init__(self, model: nn.Module) -> None:
        self._modes = [(module, module.training) for module in model.modules()]
        self._model = model

    def __enter__(self) -> nn.Module:
        return self._model.eval()

    def __exit__(self, *_: object) -> None:
        for module, mode in self._modes:
            module.training = mode


# -- text ----------------------------------------------------------------------------------------------------


def text_rows(tokenizer: Any, text: str, length: int, rows: int | None = None, seed: int = 0) -> Tensor:
    """A running text as rows of tokens.

    Args:
        tokenizer: of `transformers`.
        text: any text.
        length: tokens of a row.
        rows: how many, drawn without replacement and kept in order; all if not given.
        seed: of the draw.

    Returns:
        Token ids, ``(rows, length)``, int64; tokens that do not fill a row are left out.

    Raises:
        DataError: if the text has fewer tokens than the rows need.
    """
    ids = torch.tensor(
        tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long
    )
    whole = ids[: len(ids) // length * length].view(-1, length)
    if len(whole) < (rows or 1):
        raise DataError(f"the text has {len(ids):,} tokens; {rows or 1} rows of {length} need more.")
    if rows is None:
        return whole
    chosen = torch.randperm(len(whole), generator=generator(seed, "text rows"))[:rows]
    return whole[chosen.sort().values]
