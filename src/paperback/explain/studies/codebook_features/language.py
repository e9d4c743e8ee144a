"""Codes of the small language model that ships: what they cost, what they find, and steering by them."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperback.data import text
from paperback.explain.codebook_features import (
    CodebookModel,
    Edit,
    add_codebooks,
    best_neuron,
    count_codes,
    force,
    next_token_loss,
)
from paperback.networks import collect_activations, pretrained, pretrained_tokenizer
from paperback.study import Run
from paperback.training import derive, generator, seeded, train

if TYPE_CHECKING:
    import pandas as pd

CODES, K = 512, 8
LENGTH, BATCH, LR = 128, 16, 2e-3
NEW_TOKENS = 24
STEERED, OF_EACH = 60, 4  # codes of a topic that are forced, and how many of one codebook at most
RECALL, PRECISION = 0.02, 0.15  # that they must have for the topic

# Regular expressions over definitions; what is looked for is the token that ends a match.
PATTERNS = {
    "genus": r"\bgenus\b",
    "family": r"\bfamily\b",
    "a year": r"\b1[5-9]\d\d\b",
    "someone who": r"\b(person|someone|one) who\b",
    "used for": r"\bused (for|to|in|as)\b",
    "made of": r"\b(made|consisting) (of|from)\b",
    "a number": r"\b(two|three|four|five|six|ten|hundred|thousand)\b",
    "a place": r"\b(America|Europe|Asia|Africa|Australia)\b",
    "-ing": r"\b[a-z]+ing\b",
    "bracket": r"\([a-z ]+\)",
    "act of": r"\bthe (act|process|state|quality) of\b",
    "usually": r"\b(usually|especially|often)\b",
}


@dataclass
class Corpus:
    """Definitions as token ids, in rows of `LENGTH`, with what each token belongs to."""

    ids: Tensor  # (rows, LENGTH)
    topic: Tensor  # of the token's definition
    patterns: dict[str, Tensor]  # whether a match of each pattern ends at the token


@dataclass
class Language:
    """What was found with one seed."""

    seed: int
    right: dict[str, Tensor] = field(default_factory=dict)  # model -> of the next tokens of each row
    bits: dict[str, float] = field(default_factory=dict)  # model -> per token
    code_precision: dict[str, float] = field(default_factory=dict)  # pattern -> on the test part
    neuron_precision: dict[str, float] = field(default_factory=dict)
    recall: dict[str, float] = field(default_factory=dict)
    rates: dict[str, dict[str, float]] = field(default_factory=dict)  # topic -> steering -> its rate
    samples: dict[str, str] = field(default_factory=dict)  # topic -> a steered definition
    judge: float = 0.0  # accuracy of the classifier of topics


def steer_language(run: Run) -> Language:
    """Fine-tune, search and steer the language model, with the first seed."""
    tokenizer, glosses = pretrained_tokenizer("lm-tiny"), text.wordnet_glosses()
    sizes = {"train": run.size(smoke=400, standard=15_000), "test": run.size(smoke=200, standard=1900)}
    parts = {
        name: corpus(tokenizer, *_documents(getattr(glosses, name), size)) for name, size in sizes.items()
    }
    found = Language(run.seed)
    dense = pretrained("lm-tiny")
    found.right["as it ships"], found.bits["as it ships"] = next_token(dense, parts["test"].ids)
    model = _with_codes(run, dense, parts["train"].ids)
    _fine_tune(run, dense, parts["train"].ids)
    for name, network in (("fine-tuned", dense), ("codebooks", model)):
        found.right[name], found.bits[name] = next_token(network, parts["test"].ids)
    _find_patterns(run, found, model, dense, parts)
    judge = TopicJudge(glosses, sizes["train"])
    found.judge = judge.accuracy
    _steer(run, found, model, tokenizer, glosses, judge, parts["train"])
    return found


def _steps(run: Run) -> int:
    return run.size(smoke=4, quick=40, standard=120, full=2000)


def _with_codes(run: Run, dense: nn.Module, rows: Tensor) -> CodebookModel:
    """A copy with a codebook for each head and MLP, fine-tuned from k-means."""
    n_codes = run.size(smoke=16, standard=CODES)
    model = add_codebooks(copy.deepcopy(dense), "auto", n_codes, K, seed=run.seed)
    some = rows[: run.size(smoke=20, standard=100)]
    model.init_kmeans(some, tokens=6000, seed=run.seed, progress=run.progress)
    model.fit(
        rows, steps=_steps(run), batch_size=BATCH, lr=LR, schedule="one-cycle", clip_norm=1.0,
        revive_every=50, seed=run.seed, progress=run.progress,
    )  # fmt: skip
    return model


def _fine_tune(run: Run, model: nn.Module, rows: Tensor) -> None:
    """The model without codes, for as many steps on as much text."""
    draws = generator(run.seed, "rows")
    some = rows[torch.randperm(len(rows), generator=draws)[: _steps(run) * BATCH]]
    train(
        model, next_token_loss, (some,), epochs=1, batch_size=BATCH, lr=LR, optimizer="adamw",
        weight_decay=0.01, schedule="one-cycle", clip_norm=1.0, seed=run.seed, progress=run.progress,
        description="fine-tuning",
    )  # fmt: skip


# -- texts ---------------------------------------------------------------------------------------------------


def _documents(split: Any, n: int) -> tuple[list[str], list[int]]:
    """As the model was trained, ``words: definition``, in random order."""
    some = np.random.default_rng(0).permutation(len(split))[:n]
    x, y = split.x.iloc[some], split.y.iloc[some]
    return [f"{w}: {t}\n" for w, t in zip(x["words"], x["text"], strict=True)], y.tolist()


def corpus(tokenizer: Any, texts: Sequence[str], topics: Sequence[int]) -> Corpus:
    """Token ids with the topic of their definition, and where patterns match in it."""
    ids, topic = [], []
    ends: dict[str, list[bool]] = {name: [] for name in PATTERNS}
    compiled = {name: re.compile(pattern) for name, pattern in PATTERNS.items()}
    for encoding, document, label in zip(
        tokenizer.backend_tokenizer.encode_batch(list(texts)), texts, topics, strict=True
    ):
        ids += [tokenizer.bos_token_id, *encoding.ids]
        topic += [label] * (len(encoding.ids) + 1)
        for name, pattern in compiled.items():
            last = [match.end() - 1 for match in pattern.finditer(document)]
            flags = [False] * (len(encoding.ids) + 1)
            for character in last:
                flags[1 + encoding.char_to_token(character)] = True
            ends[name] += flags
    n = len(ids) // LENGTH * LENGTH
    return Corpus(
        torch.tensor(ids[:n]).view(-1, LENGTH),
        torch.tensor(topic[:n]).view(-1, LENGTH),
        {name: torch.tensor(flags[:n]).view(-1, LENGTH) for name, flags in ends.items()},
    )


@torch.no_grad()
def next_token(model: nn.Module, ids: Tensor) -> tuple[Tensor, float]:
    """How often the likeliest token is the next one, in each row; and bits per token."""
    right, nats = [], 0.0
    for rows in ids.split(16):
        logits, after = model(input_ids=rows, use_cache=False).logits[:, :-1], rows[:, 1:]
        right.append((logits.argmax(-1) == after).double().mean(1))
        nats += float(F.cross_entropy(logits.flatten(0, 1), after.flatten(), reduction="sum"))
    return torch.cat(right), nats / ids[:, 1:].numel() / math.log(2)


# -- codes and neurons as classifiers ------------------------------------------------------------------------


def _find_patterns(
    run: Run, found: Language, model: CodebookModel, dense: Any, parts: dict[str, Corpus]
) -> None:
    """For each pattern the best code of all sites against the best neuron of all layers at equal recall.

    Both are chosen by as much of the training text (codes by F1) as they are measured on of the test part.
    """
    n = run.size(smoke=30, quick=100, standard=200)
    text = {name: part.ids[:n] for name, part in parts.items()}
    masks = {name: {p: m[:n] for p, m in part.patterns.items()} for name, part in parts.items()}
    codes = {name: model.codes(ids) for name, ids in text.items()}
    sought = [p for p in PATTERNS if min(int(masks["train"][p].sum()), int(masks["test"][p].sum())) >= 5]
    for pattern in sought:
        _, recall, site, group, code = max(
            _best_code(model, s, codes["train"][s], masks["train"][pattern]) for s in model.names
        )
        fires = (codes["test"][site][:, :, group] == code).any(-1)
        found.recall[pattern] = recall
        found.code_precision[pattern] = _precision(fires, masks["test"][pattern])
    neurons = {name: _neurons(dense, ids) for name, ids in text.items()}
    for pattern in sought:
        neuron = best_neuron(neurons["train"], masks["train"][pattern], found.recall[pattern])
        found.neuron_precision[pattern] = _precision(neuron.active(neurons["test"]), masks["test"][pattern])


def _precision(fires: Tensor, mask: Tensor) -> float:
    return float((fires & mask).sum() / fires.sum().clamp(min=1))


def _neurons(model: Any, ids: Tensor) -> Tensor:
    """Of each layer's MLP the 384 hidden neurons and 128 outputs, at every token."""
    sites = [f"model.layers.{layer}.mlp" for layer in range(model.config.num_hidden_layers)]
    hidden = collect_activations(model, ids, [f"{s}.down_proj" for s in sites], pre=True, batch_size=32)
    outputs = collect_activations(model, ids, sites, batch_size=32)
    return torch.cat([*hidden.values(), *outputs.values()], -1)


def _best_code(
    model: CodebookModel, site: str, ids: Tensor, mask: Tensor
) -> tuple[float, float, str, int, int]:
    """F1, recall and address of a site's best code."""
    n_codes = model.codebook(site).n_codes
    active, hits = count_codes(ids, mask, n_codes)
    f1 = 2 * hits / (active + mask.sum())
    group, code = divmod(int(f1.argmax()), n_codes)
    return float(f1[group, code]), float(hits[group, code] / mask.sum()), site, group, code


# -- steering ------------------------------------------------------------------------------------------------


class TopicJudge:
    """Says which of the 19 topics a definition is of: TF-IDF and logistic regression.

    Args:
        glosses: the data set; it is fitted to (a part of) the training split.
        n: so many definitions.

    Attributes:
        accuracy: on the validation split.
    """

    def __init__(self, glosses: Any, n: int) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline

        self.classes = glosses.classes
        self.model = make_pipeline(
            TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), min_df=2),
            LogisticRegression(C=10, max_iter=200),
        )
        some = np.random.default_rng(0).permutation(len(glosses.train))[:n]
        self.model.fit(glosses.train.x["text"].iloc[some], glosses.train.y.iloc[some])
        self.accuracy = float(self.model.score(glosses.val.x["text"], glosses.val.y))

    def rate(self, texts: Sequence[str], topic: int) -> float:
        """How many of some definitions are of a topic."""
        return float(np.mean(self.model.predict(list(texts)) == topic))


def topic_edits(found: pd.DataFrame, n: int = STEERED, of_each: int = OF_EACH) -> dict[str, list[Edit]]:
    """The codes that are forced for a topic: the n of the greatest ratio, at most so many of one codebook.

    The ratio is of how often a code is active on the topic's tokens to how often it is elsewhere.
    """
    ranked = found.sort_values("ratio", ascending=False, kind="stable")
    best = ranked.groupby(["site", "group"], sort=False).head(of_each).head(n)
    chosen: dict[str, dict[int, list[int]]] = {}
    for site, group, code in zip(best["site"], best["group"], best["code"], strict=True):
        chosen.setdefault(str(site), {}).setdefault(int(group), []).append(int(code))
    return {
        site: [force(codes, group=group) for group, codes in groups.items()]
        for site, groups in chosen.items()
    }


def _steer(
    run: Run,
    found: Language,
    model: CodebookModel,
    tokenizer: Any,
    glosses: Any,
    judge: TopicJudge,
    corpus: Corpus,
) -> None:
    """Definitions of words of all topics: free, with a topic's codes forced, with as many random codes."""
    names = judge.classes[: run.size(smoke=2, standard=len(judge.classes))]
    some = slice(run.size(smoke=30, quick=200, standard=600))
    masks = {name: corpus.topic[some] == topic for topic, name in enumerate(names)}
    tables = model.search(corpus.ids[some], masks, min_recall=RECALL, min_precision=PRECISION)
    draw = np.random.default_rng(derive(found.seed, "prompts"))
    chosen = draw.choice(len(glosses.test), run.size(smoke=8, quick=32, standard=64), replace=False)
    prompts = [f"{tokenizer.bos_token}{words}:" for words in glosses.test.x["words"].iloc[chosen]]
    free = define(model, tokenizer, prompts, {}, found.seed)
    for topic, name in enumerate(run.track(names, "topics")):
        edits = topic_edits(tables[name])
        steered = define(model, tokenizer, prompts, edits, found.seed)
        chance = define(model, tokenizer, prompts, _random_codes(model, edits, draw), found.seed)
        found.rates[name] = {
            "free": judge.rate(free, topic),
            "codes of the topic": judge.rate(steered, topic),
            "random codes": judge.rate(chance, topic),
        }
        found.samples[name] = prompts[0].removeprefix(tokenizer.bos_token) + steered[0]


def _random_codes(
    model: CodebookModel, edits: dict[str, list[Edit]], draw: np.random.Generator
) -> dict[str, list[Edit]]:
    """In the same codebooks as many codes, whichever."""
    return {
        site: [
            force(
                draw.choice(model.codebook(site).n_codes, len(edit.codes), replace=False).tolist(),
                group=edit.group,
            )
            for edit in several
        ]
        for site, several in edits.items()
    }


def define(
    model: CodebookModel, tokenizer: Any, prompts: Sequence[str], edits: dict[str, list[Edit]], seed: int
) -> list[str]:
    """Sample what follows each prompt, up to the end of its line, under some edits at all positions."""
    tokenizer.padding_side = "left"
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True, add_special_tokens=False)
    ids, attention = batch["input_ids"], batch["attention_mask"]
    with model.intervene(edits), seeded(seed, "definitions"), torch.no_grad():
        made = model.generate(
            input_ids=ids, attention_mask=attention, max_new_tokens=NEW_TOKENS, do_sample=True, top_k=0
        )
    texts = tokenizer.batch_decode(made[:, ids.shape[1] :], skip_special_tokens=True)
    return [t.partition("\n")[0] for t in texts]
