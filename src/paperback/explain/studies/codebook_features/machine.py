"""Codes of a transformer that has learned a finite-state machine, against the machine itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from paperback.data.simulate.tokfsm import TokFSM, tokfsm
from paperback.explain.codebook_features import (
    CodebookModel,
    add_codebooks,
    best_neuron,
    count_codes,
    force,
    next_token_loss,
)
from paperback.networks import collect_activations
from paperback.study import Run
from paperback.training import generator, seeded, train

BASE, EDGES, STATES = 6, 4, 12  # 36 states of two digits; states of a sequence
WIDTH, LAYERS, HEADS = 32, 2, 2
CODES = 200
BATCH, DENSE_LR, LR = 64, 1e-2, 5e-3
PATCHES = ("nothing", "attention", "MLP", "both")
RARE = 20  # contexts with fewer tokens in the search part are left out


@dataclass
class Machine:
    """What one seed gave."""

    seed: int
    fsm: TokFSM
    codebooks: CodebookModel
    accuracy: dict[str, float] = field(default_factory=dict)  # model -> of the first transition
    mass: dict[str, float] = field(default_factory=dict)  # model -> on legal next states
    purity: list[float] = field(default_factory=list)  # of each layer's MLP codes
    code_precision: list[float] = field(default_factory=list)
    neuron_precision: list[float] = field(default_factory=list)
    recall: list[float] = field(default_factory=list)
    divergence: dict[str, float] = field(default_factory=dict)  # patch -> Jensen-Shannon, nats
    legal: dict[str, float] = field(default_factory=dict)  # patch -> mass on legal next digits
    swap: dict[str, float] = field(default_factory=dict)  # patch of the whole state -> mass on next states
    search_part: Tensor = field(default_factory=lambda: torch.empty(0))


def learn_machines(run: Run) -> list[Machine]:
    """One machine, one transformer without codes and one with them for each seed."""
    return [_one_seed(run, seed) for seed in run.track(run.seeds, "machines")]


def _one_seed(run: Run, seed: int) -> Machine:
    fsm = tokfsm(BASE, EDGES, seed=seed)
    steps = run.size(smoke=30, quick=600, standard=1500)
    dense_steps, held_out = run.size(smoke=30, standard=400), run.size(smoke=100, standard=1000)
    text = {
        part: fsm.write(fsm.walk(n, STATES, generator(seed, part)))
        for part, n in (
            ("train", steps * BATCH), ("dense", dense_steps * BATCH), ("search", held_out), ("test", held_out)
        )
    }  # fmt: skip
    dense = transformer(fsm, seed)
    train(
        dense, next_token_loss, (text["dense"],), epochs=1, batch_size=BATCH, lr=DENSE_LR,
        schedule="one-cycle", optimizer="adamw", weight_decay=0.01, seed=seed, progress=False,
    )  # fmt: skip
    neurons = {part: _neurons(dense, text[part]) for part in ("search", "test")}
    accuracy, mass = first_transition(dense, fsm)
    model = add_codebooks(dense, "auto", CODES, k=1, seed=seed)
    found = Machine(seed, fsm, model, {"dense": accuracy}, {"dense": mass}, search_part=text["search"])
    model.init_kmeans(text["search"], seed=seed, progress=False)
    found.accuracy["clusters, not fine-tuned"], found.mass["clusters, not fine-tuned"] = first_transition(
        model, fsm
    )
    model.fit(
        text["train"], steps=steps, batch_size=BATCH, lr=LR, schedule="one-cycle", revive_every=100,
        seed=seed, progress=False,
    )  # fmt: skip
    found.accuracy["codebooks"], found.mass["codebooks"] = first_transition(model, fsm)
    _compare_with_neurons(found, neurons, text)
    _patch(found)
    if seed == run.seed and run.budget != "quick":
        _from_scratch(run, found, text)
    return found


def transformer(fsm: TokFSM, seed: int) -> Any:
    """A GPT-2 so narrow that it has fewer neurons than the machine has contexts."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=fsm.vocabulary, n_positions=64, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.15,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    with seeded(seed, "transformer"):
        return GPT2LMHeadModel(config)


# -- what the network knows of the machine -------------------------------------------------------------------


@torch.no_grad()
def first_transition(model: nn.Module, fsm: TokFSM) -> tuple[float, float]:
    """How many of the likeliest successors of each state are real ones, and the probability of real ones."""
    following = next_states(model, fsm, torch.arange(fsm.n_states))
    likeliest = following.topk(fsm.edges).indices
    return (
        float(fsm.transitions.gather(1, likeliest).double().mean()),
        float((following * fsm.transitions).sum(1).mean()),
    )


@torch.no_grad()
def next_states(model: nn.Module, fsm: TokFSM, states: Tensor) -> Tensor:
    """Probability of every state after each of some first states, ``(n, states)``."""
    start = fsm.write(states[:, None])
    digits = torch.arange(fsm.base)
    ids = torch.cat((start[:, None].expand(-1, fsm.base, -1), digits.expand(len(states), -1)[..., None]), 2)
    probability = model(ids.flatten(0, 1)).logits.double().softmax(-1).unflatten(0, (-1, fsm.base))
    first = probability[:, 0, -2, : fsm.base]  # the digit after the state
    second = probability[:, :, -1, : fsm.base]
    return (first[..., None] * second).flatten(1)


# -- codes and neurons as classifiers ------------------------------------------------------------------------


def _neurons(model: nn.Module, ids: Tensor) -> list[Tensor]:
    """Of each layer's MLP all 128 hidden neurons and its 32 outputs, at every token."""
    layers = range(LAYERS)
    hidden = collect_activations(model, ids, [f"transformer.h.{i}.mlp.c_proj" for i in layers], pre=True)
    outputs = collect_activations(model, ids, [f"transformer.h.{i}.mlp" for i in layers])
    return [torch.cat(pair, -1) for pair in zip(hidden.values(), outputs.values(), strict=True)]


def _compare_with_neurons(found: Machine, neurons: dict[str, list[Tensor]], text: dict[str, Tensor]) -> None:
    """For every context the code of the best F1 against the best neuron at the same recall.

    Both are chosen on the search part and measured on the test part; means are over tokens' contexts.
    """
    model = found.codebooks
    contexts = {part: found.fsm.contexts(text[part]) for part in ("search", "test")}
    ids = {part: model.codes(text[part], batch_size=250) for part in ("search", "test")}
    for layer in range(LAYERS):
        site = f"transformer.h.{layer}.mlp"
        found.purity.append(purity(ids["test"][site][..., 0, 0], contexts["test"]))
        code, neuron, recall = [], [], []
        for context in contexts["search"].unique().tolist():
            mask, other = contexts["search"] == context, contexts["test"] == context
            if context < 0 or mask.sum() < RARE or not other.any():
                continue
            active, hits = count_codes(ids["search"][site], mask, CODES)
            best = int((2 * hits / (active + mask.sum())).argmax())
            rival = best_neuron(neurons["search"][layer], mask, float(hits[0, best] / mask.sum()))
            fires = (ids["test"][site] == best).any(-1).squeeze(-1)
            code.append(float((fires & other).sum() / fires.sum().clamp(min=1)))
            recall.append(float((fires & other).sum() / other.sum()))
            rival_fires = rival.active(neurons["test"][layer])
            neuron.append(float((rival_fires & other).sum() / rival_fires.sum().clamp(min=1)))
        for values, numbers in (
            (found.code_precision, code),
            (found.neuron_precision, neuron),
            (found.recall, recall),
        ):
            values.append(sum(numbers) / max(len(numbers), 1))


def purity(codes: Tensor, contexts: Tensor) -> float:
    """How much of a code's activations are in its commonest context, the mean over activations."""
    known = contexts >= 0
    table = torch.zeros(int(codes.max()) + 1, int(contexts.max()) + 1)
    table.index_put_((codes[known], contexts[known]), torch.ones(int(known.sum())), accumulate=True)
    return float(table.amax(1).sum() / table.sum())


# -- interventions -------------------------------------------------------------------------------------------


@torch.no_grad()
def _patch(found: Machine) -> None:
    """Give state a the codes of state b, for all pairs; at its last digit, and at both."""
    fsm, model = found.fsm, found.codebooks
    a, b = torch.cartesian_prod(torch.arange(fsm.n_states), torch.arange(fsm.n_states)).T
    a, b = a[a != b], b[a != b]
    codes = model.codes(fsm.write(b[:, None]), batch_size=len(b))
    wanted = fsm.next_digit()[b]
    for patch in PATCHES:
        sites = [s for s in model.names if patch == "both" or (patch == "MLP") == s.endswith("mlp")]
        sites = [] if patch == "nothing" else sites
        with model.intervene({s: force(codes[s][:, -1:], positions=[fsm.digits]) for s in sites}):
            given = model.run(fsm.write(a[:, None])).logits[:, -1].double().softmax(-1)[:, : fsm.base]
        found.divergence[patch] = float(jensen_shannon(given, wanted).mean())
        found.legal[patch] = float((given * (wanted > 0)).sum(1).mean())
        places = list(range(1, fsm.digits + 1))
        edits = {s: force(codes[s][:, 1:].repeat_interleave(fsm.base, 0), positions=places) for s in sites}
        with model.intervene(edits):
            found.swap[patch] = float((next_states(model, fsm, a) * fsm.transitions[b]).sum(1).mean())


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """Divergence of distributions in the last dimension, in nats."""
    middle = (p + q) / 2
    return (torch.special.entr(middle) - (torch.special.entr(p) + torch.special.entr(q)) / 2).sum(-1)


def _from_scratch(run: Run, found: Machine, text: dict[str, Tensor]) -> None:
    """The paper's way: codes from the first step on, with dead ones revived; no dense network before."""
    steps = run.size(smoke=30, standard=1500)
    fsm, seed = found.fsm, found.seed
    model = add_codebooks(transformer(fsm, seed), "auto", CODES, k=1, seed=seed)
    rows = fsm.write(fsm.walk(steps * BATCH, STATES, generator(seed, "from scratch")))
    model.fit(
        rows, steps=steps, batch_size=BATCH, lr=LR, schedule="one-cycle", revive_every=100, seed=seed,
        progress=False,
    )  # fmt: skip
    found.accuracy["codebooks from scratch"], found.mass["codebooks from scratch"] = first_transition(
        model, fsm
    )
