"""The codec: equal schedules, round trips, code lengths, and bytes that are not to be trusted."""

import hashlib
import math
import random
import resource
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paperback.density.probabilistic_circuit import (
    PCCompressor,
    ProbabilisticCircuit,
    Transform,
    median_edge,
    rat,
)
from paperback.density.probabilistic_circuit.schedules import SCHEDULES
from paperback.density.probabilistic_circuit.structure import rooted
from paperback.errors import ArtefactError, DataError
from paperback.numerics.coding import BLOCK, HEAD

STATES = (3, 2, 3, 3, 2, 3)


def fitted(n=6, k=STATES, mixture=1, structure="hclt", rows=200, seed=0):
    g = torch.Generator().manual_seed(seed)
    X = torch.randint(0, 2, (rows, n), generator=g)
    X[:, 1:] = torch.where(torch.rand(rows, n - 1, generator=g) < 0.7, X[:, :-1], X[:, 1:])
    return ProbabilisticCircuit(n, k, structure, 4, mixture).fit(X, epochs=3, progress=False), X


@pytest.mark.parametrize("coder", ["rans", "arithmetic"])
@pytest.mark.parametrize("schedule", list(SCHEDULES))
@pytest.mark.parametrize("block_rows", [1, 7, 256])
def test_round_trip_near_the_likelihood(coder, schedule, block_rows):
    model, X = fitted()
    X = X[:50].reshape(50, 2, 3)
    codec = PCCompressor(model, coder, schedule, block_rows)
    data = codec.compress(X)
    assert torch.equal(codec.decompress(data), X)
    blocks = math.ceil(50 / block_rows)
    bits = -float(model.log_prob(X).sum()) / math.log(2)
    container = 8 * (100 + 8 * blocks)
    assert 8 * len(data) <= bits + 96 * blocks + 0.001 * X.numel() + container


# -- models and rows of every kind ---------------------------------------------------------------------------


def extreme(logits, kind, generator):
    """Distributions along the last axis: smooth, nearly certain (1 - 1e-9 on one state), or with zeros."""
    if kind == "smooth":
        return (3 * logits).softmax(-1)
    first = torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits)
    if kind == "certain":
        return first
    if kind == "nearly certain":
        return (1 - 1e-9) * first + 1e-9 * logits.softmax(-1)
    kept = torch.rand(logits.shape, generator=generator) < 0.5  # "zeros"
    p = logits.softmax(-1) * torch.maximum(kept.to(logits), first)
    return p / p.sum(-1, keepdim=True)


@st.composite
def circuits(draw):
    """A circuit over a tree or made of nodes, its parameters drawn and not fitted."""
    states = draw(st.lists(st.integers(2, 6), min_size=2, max_size=7))
    seed = draw(st.integers(0, 2**31))
    kind = draw(st.sampled_from(["smooth", "nearly certain", "zeros", "certain"]))
    g = torch.Generator().manual_seed(seed)
    if draw(st.booleans()):
        model = rat(len(states), states, repetitions=draw(st.integers(1, 2)), n_sums=2, seed=seed).double()
        p = (
            extreme(torch.randn(model.log_input.shape, generator=g).double(), kind, g)
            * model.valid[model.input_variables]
        )
        p = torch.where(p.sum(-1, keepdim=True) > 0, p, model.log_input.exp())
        model.log_input.copy_((p / p.sum(-1, keepdim=True)).log())
        return model
    structure = draw(st.sampled_from(["hclt", "hmm", "chow_liu", "independent"]))
    model = ProbabilisticCircuit(
        len(states), states, structure, draw(st.integers(1, 4)), draw(st.integers(1, 2))
    ).double()
    if structure == "hclt":
        edges = [(draw(st.integers(0, v - 1)), v) for v in range(1, len(states))]
        tree = rooted(edges, len(states))
        model.variables.copy_(torch.tensor(tree.variables))
        model.parents.copy_(torch.tensor(tree.parents))
    root, transition = model.log_root, model.log_transition
    root.copy_(extreme(torch.randn(root.numel(), generator=g).double(), kind, g).view_as(root).log())
    transition.copy_(extreme(torch.randn(transition.shape, generator=g).double(), kind, g).log())
    if structure != "chow_liu":  # there the latents are the variables, and the emissions fixed
        shape = model.log_emission.transpose(2, 3).shape
        p = (
            extreme(torch.randn(shape, generator=g).double(), kind, g)
            * model.valid[model.variables][:, None, None]
        )
        p = torch.where(p.sum(-1, keepdim=True) > 0, p, model.valid[model.variables][:, None, None].double())
        model.log_emission.copy_((p / p.sum(-1, keepdim=True)).log().transpose(2, 3))
    return model


def test_ten_thousand_random_rows_come_back_from_random_models():
    """Rows from nowhere near the model, drawn by hypothesis together with the model, coder and schedule."""
    coded = 0

    @settings(max_examples=120, deadline=None, derandomize=True, database=None)
    @given(
        model=circuits(),
        coder=st.sampled_from(["rans", "arithmetic"]),
        schedule=st.sampled_from(list(SCHEDULES)),
        block_rows=st.sampled_from([1, 7, 64, 256]),
        rows=st.sampled_from([0, 1, 150, 300, 600]),
        seed=st.integers(0, 2**31),
        one_state=st.booleans(),
    )
    def round_trip(model, coder, schedule, block_rows, rows, seed, one_state):
        nonlocal coded
        g = torch.Generator().manual_seed(seed)
        rows = min(rows, 50 * block_rows)
        X = torch.stack([torch.randint(0, k, (rows,), generator=g) for k in model.n_states], 1)
        if one_state:  # impossible for most models with zeros, and for "certain" ones
            X[:] = 1
        codec = PCCompressor(model, coder, schedule, block_rows)
        back = codec.decompress(codec.compress(X))
        assert back.shape == X.shape
        assert torch.equal(back, X)
        coded += rows

    round_trip()
    assert coded >= 10_000


@pytest.mark.parametrize("sharpness", [0.0, 1e-9, 1e-300])
def test_round_trip_of_the_least_likely_rows(sharpness):
    """Every variable is almost surely 0; all ones are sent, and states of probability 0."""
    model = ProbabilisticCircuit(5, 2, "hmm", 2).double()
    pmf = torch.tensor([1 - sharpness, sharpness], dtype=torch.float64)
    model.log_emission.copy_(pmf.log()[None, None, :, None].expand_as(model.log_emission))
    X = torch.tensor([[1] * 5, [0] * 5, [0, 1, 0, 1, 0]])
    for coder in ("rans", "arithmetic"):
        codec = PCCompressor(model, coder)
        assert torch.equal(codec.decompress(codec.compress(X)), X)
    likely = torch.zeros(200, 5, dtype=torch.int64)
    assert len(codec.compress(likely)) < 120  # next to nothing but the container


def test_empty_batch_and_one_row():
    codec = PCCompressor(fitted()[0])
    for rows in (0, 1):
        X = torch.zeros(rows, 2, 3, dtype=torch.uint8)
        back = codec.decompress(codec.compress(X))
        assert back.shape == X.shape
        assert torch.equal(back, X.long())
    with pytest.raises(DataError, match="no rows"):
        codec.rate(torch.zeros(0, 6, dtype=torch.int64))


def test_bad_input_is_refused():
    model, X = fitted()
    codec = PCCompressor(model)
    with pytest.raises(DataError, match="dtype"):
        codec.compress(X.float())
    with pytest.raises(DataError, match="variable 1 has state 5"):
        codec.compress(X.index_fill(1, torch.tensor([1]), 5))
    with pytest.raises(DataError, match="expected bytes"):
        codec.decompress("text")
    for bad in ({"coder": "zip"}, {"schedule": "fast"}, {"block_rows": 0}, {"block_rows": 10**9}):
        with pytest.raises(DataError, match=next(iter(bad))):
            PCCompressor(model, **bad)


def test_another_model_is_refused_by_name():
    data = PCCompressor(fitted(seed=0)[0]).compress(torch.zeros(3, 6, dtype=torch.int64))
    with pytest.raises(ArtefactError, match="compressed with model"):
        PCCompressor(fitted(seed=1)[0]).decompress(data)


def test_every_cut_is_refused():
    model, X = fitted()
    codec = PCCompressor(model)
    data = codec.compress(X[:20])
    for length in range(len(data)):
        with pytest.raises(ArtefactError):
            codec.decompress(data[:length])
    with pytest.raises(ArtefactError):
        codec.decompress(data + b"\0")


def mutate(data: bytes, rng: random.Random, sign: bool) -> bytes:
    """Flip, overwrite, cut, repeat or extend; `sign` gives the result a right checksum over its body."""
    body = bytearray(data[:-16] if sign else data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at, kind = rng.randrange(len(body)) if body else 0, rng.randrange(6)
        if kind == 0 and body:
            body[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and body:
            body[at] = rng.choice((0, 1, 127, 128, 255))
        elif kind == 2:
            del body[at : at + rng.randrange(1, 9)]
        elif kind == 3:
            body[at:at] = body[at : at + rng.randrange(1, 9)]
        elif kind == 4:
            body[at : at + 4] = rng.randbytes(4)
        else:
            body += rng.randbytes(rng.randrange(1, 9))
    return bytes(body) + hashlib.blake2b(bytes(body), digest_size=16).digest() if sign else bytes(body)


def mutate_block(data: bytes, rng: random.Random, payload: int) -> bytes:
    """Change coded words only, and sign: only the decoder or a block's checksum can see it."""
    body = bytearray(data[:-16])
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(payload, len(body))
        body[at] = rng.choice((0, 255, body[at] ^ 1 << rng.randrange(8), rng.randrange(256)))
    return bytes(body) + hashlib.blake2b(bytes(body), digest_size=16).digest()


def fuzz(count: int, seed: int, kind: str) -> int:
    """Mutated containers: refused, or decoded to what was compressed. Returns how many were refused."""
    model, X = fitted(seed=2)
    X = X[:12].reshape(12, 2, 3)
    rng, refused = random.Random(seed), 0
    codecs = [PCCompressor(model, coder, block_rows=5) for coder in ("rans", "arithmetic")]
    codecs.append(PCCompressor(rat(6, STATES, n_sums=2, repetitions=1), "rans", "small_to_large", 12))
    residuals = ProbabilisticCircuit(6, 3, n_latents=2)
    codecs.append(PCCompressor(residuals, "arithmetic", transform=median_edge((2, 3), 3)))
    originals = [codec.compress(X) for codec in codecs]
    payloads = [HEAD.size + 4 * 2 + BLOCK.size * blocks for blocks in (3, 3, 1, 1)]
    slowest, memory = 0.0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i in range(count):
        codec, original = codecs[i % 4], originals[i % 4]
        if kind == "blocks":
            data = mutate_block(original, rng, payloads[i % 4])
        else:
            data = mutate(original, rng, sign=kind == "signed")
        start = time.perf_counter()
        try:
            back = codec.decompress(data)
        except ArtefactError:
            refused += 1
        else:
            assert torch.equal(back, X), "a mutated container decoded to something else"
        slowest = max(slowest, time.perf_counter() - start)
    assert slowest < 10  # seconds, on a busy machine: a hang is another thing
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 300 * 1024  # KiB
    return refused


@pytest.mark.parametrize(("kind", "count"), [("plain", 70_000), ("signed", 30_000), ("blocks", 3_000)])
def test_a_hundred_thousand_mutated_containers_are_refused(kind, count):
    """As damage makes them; with a right checksum over all; and with damage to the coded words alone."""
    assert fuzz(count, 0, kind) > 0.95 * count


def test_a_saved_model_decodes_in_a_new_process(tmp_path):
    model, X = fitted()
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "rows.pbc").write_bytes(PCCompressor(model).compress(X))
    code = (
        "import sys, paperback; from pathlib import Path\n"
        "from paperback.density.probabilistic_circuit import PCCompressor, ProbabilisticCircuit\n"
        "folder = Path(sys.argv[1]); model = ProbabilisticCircuit.from_pretrained(folder / 'model')\n"
        "print(PCCompressor(model).decompress((folder / 'rows.pbc').read_bytes()).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(X.tolist())


# -- transforms ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "k"), [((1, 1), 2), ((1, 7), 5), ((6, 1), 5), ((5, 4), 3), ((8, 9), 256)])
def test_the_median_edge_residuals_give_every_image_back(shape, k):
    transform = median_edge(shape, k)
    X = torch.randint(0, k, (50, *shape), generator=torch.Generator().manual_seed(0))
    Z = transform.forward(X)
    assert Z.shape == X.shape
    assert int(Z.min()) >= 0
    assert int(Z.max()) < k
    assert torch.equal(transform.inverse(Z), X)
    assert torch.equal(transform.forward(transform.inverse(X)), X)  # onto, too
    flat = X.flatten(1)
    assert torch.equal(transform.forward(flat), Z.flatten(1))
    assert transform.forward(X[:0]).shape == X[:0].shape


def test_the_median_edge_detector_predicts_as_defined():
    X = torch.randint(0, 256, (20, 6, 7), generator=torch.Generator().manual_seed(1))
    Z = median_edge((6, 7), 256).forward(X)
    at = [(n, r, c) for n in range(20) for r in range(6) for c in range(7)]
    for n, r, c in at:
        a = int(X[n, r, c - 1]) if c else 0
        b = int(X[n, r - 1, c]) if r else 0
        corner = int(X[n, r - 1, c - 1]) if r and c else 0
        guess = min(a, b) if corner >= max(a, b) else max(a, b) if corner <= min(a, b) else a + b - corner
        assert int(Z[n, r, c]) == (int(X[n, r, c]) - guess) % 256


def test_a_ramp_costs_less_through_the_predictor():
    g = torch.Generator().manual_seed(0)
    slope = torch.randint(0, 3, (400, 2, 1, 1), generator=g)
    row, column = torch.arange(6)[:, None], torch.arange(6)
    X = slope[:, 0] * row + slope[:, 1] * column  # at most 20
    predicted = median_edge((6, 6), 32)
    plain = ProbabilisticCircuit(36, 32, n_latents=4).fit(X[:300], epochs=5, progress=False)
    through = ProbabilisticCircuit(36, 32, n_latents=4)
    through.fit(X[:300], X_val=X[300:350], epochs=5, progress=False, transform=predicted)
    codec = PCCompressor(through, transform=predicted)
    assert torch.equal(codec.decompress(codec.compress(X[300:])), X[300:])
    assert codec.rate(X[300:]) < 0.8 * PCCompressor(plain).rate(X[300:])
    bits = float(through.bits_per_dim(predicted.forward(X[300:])))
    assert codec.rate(X[300:]) == pytest.approx(bits, abs=8 * 100 / X[300:].numel())


def test_another_transform_is_refused():
    model, X = fitted(6, 3)
    data = PCCompressor(model, transform=median_edge((2, 3), 3)).compress(X)
    for other in (None, median_edge((3, 2), 3)):
        with pytest.raises(ArtefactError, match="another transform"):
            PCCompressor(model, transform=other).decompress(data)


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (Transform(lambda X: X // 2, lambda Z: 2 * Z), "give a bijection"),
        (Transform(lambda X: X[:, :3], lambda Z: Z), "keep the shape"),
        (Transform(lambda X: 1 - X, lambda Z: 1 - Z), r"has state -1"),
    ],
)
def test_what_is_no_bijection_of_the_states_is_refused(transform, message):
    model, X = fitted(6, 3)
    X[0, 0], X[0, 1] = 2, 1
    with pytest.raises(DataError, match=message):
        PCCompressor(model, transform=transform).compress(X)
    with pytest.raises(DataError, match=message):
        ProbabilisticCircuit(6, 3).fit(X, transform=transform, progress=False)


def test_bad_arguments_of_the_predictor_are_refused():
    with pytest.raises(DataError, match="shape is"):
        median_edge((0, 3), 4)
    with pytest.raises(DataError, match="expected 2 x 3 pixels"):
        median_edge((2, 3), 4).forward(torch.zeros(2, 7, dtype=torch.int64))
    with pytest.raises(DataError, match="dtype"):
        PCCompressor(fitted()[0], transform=median_edge((2, 3), 3)).compress(torch.zeros(2, 6))
