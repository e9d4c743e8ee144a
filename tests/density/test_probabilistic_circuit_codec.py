"""The codec: equal schedules, round trips, code lengths, and bytes that are not to be trusted."""

import hashlib
import math
import random
import subprocess
import sys

import pytest
import torch

from paperback.density.probabilistic_circuit import PCCompressor, ProbabilisticCircuit
from paperback.density.probabilistic_circuit.schedules import SCHEDULES, CodingCircuit
from paperback.errors import ArtefactError, DataError

STATES = (3, 2, 3, 3, 2, 3)


def fitted(n=6, k=STATES, mixture=1, structure="hclt", rows=200, seed=0):
    g = torch.Generator().manual_seed(seed)
    X = torch.randint(0, 2, (rows, n), generator=g)
    X[:, 1:] = torch.where(torch.rand(rows, n - 1, generator=g) < 0.7, X[:, :-1], X[:, 1:])
    return ProbabilisticCircuit(n, k, structure, 4, mixture).fit(X, epochs=3, progress=False), X


@pytest.mark.parametrize("mixture", [1, 2])
def test_schedules_agree_and_their_costs_are_as_predicted(mixture):
    model, X = fitted(40, 2, mixture)
    pmfs, messages = {}, {}
    for name, schedule in SCHEDULES.items():
        circuit = CodingCircuit(model.tree, model.parameters_in_logs)
        steps, found = schedule(circuit, 20), []
        node, weight = next(steps)
        try:
            while True:
                found.append(circuit.pmf(node, weight))
                node, weight = steps.send(X[:20, model.tree.variables[node]])
        except StopIteration:
            pmfs[name], messages[name] = torch.stack(found), circuit.messages
    torch.testing.assert_close(pmfs["dfs"], pmfs["naive"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(pmfs["dfs"], pmfs["small_to_large"], rtol=1e-12, atol=1e-12)
    assert messages["dfs"] == 2 * 39
    assert messages["naive"] == 40 * 39
    assert messages["dfs"] <= messages["small_to_large"] < messages["naive"]
    order = list(model.variable_order_)
    coded = torch.stack([pmfs["dfs"][t].gather(1, X[:20, v, None])[:, 0] for t, v in enumerate(order)])
    torch.testing.assert_close(coded.log().sum(0), model.double().log_prob(X[:20]), rtol=1e-6, atol=1e-6)


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


@pytest.mark.parametrize("structure", ["hclt", "chow_liu", "independent", "hmm"])
def test_round_trip_of_ten_thousand_random_rows(structure):
    """Rows that the model was never fitted to, some of them all but impossible."""
    model, _ = fitted(structure=structure)
    g = torch.Generator().manual_seed(1)
    X = torch.stack([torch.randint(0, k, (10_000,), generator=g) for k in STATES], 1)
    codec = PCCompressor(model)
    assert torch.equal(codec.decompress(codec.compress(X)), X)


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


def fuzz(count: int, seed: int, sign: bool) -> int:
    """Mutated containers: refused, or decoded to what was compressed. Returns how many were refused."""
    model, X = fitted(seed=2)
    X = X[:12].reshape(12, 2, 3)
    rng, refused = random.Random(seed), 0
    codecs = [PCCompressor(model, coder, block_rows=5) for coder in ("rans", "arithmetic")]
    originals = [codec.compress(X) for codec in codecs]
    for i in range(count):
        try:
            back = codecs[i % 2].decompress(mutate(originals[i % 2], rng, sign))
        except ArtefactError:
            refused += 1
        else:
            assert torch.equal(back.flatten(), X.flatten()), "a mutated container decoded to something else"
    return refused


def test_mutated_containers_are_refused():
    assert fuzz(5_000, 0, sign=False) > 4_900


def test_mutated_containers_with_a_right_checksum_are_refused():
    assert fuzz(1_000, 1, sign=True) > 900


@pytest.mark.slow
def test_a_hundred_thousand_mutated_containers_are_refused():
    assert fuzz(100_000, 2, sign=False) > 99_000


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
