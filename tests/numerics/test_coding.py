"""Entropy coders and the container."""

import struct

import numpy as np
import pytest

from paperback.errors import ArtefactError, DataError
from paperback.numerics.coding import (
    HEAD,
    Block,
    Container,
    Decoder,
    RangeEncoder,
    RansEncoder,
    _digest,
    symbols_checksum,
)

HASH = bytes(range(32))


def container(**changes):
    values = {
        "coder": "rans",
        "note": 2,
        "model_hash": HASH,
        "n_rows": 5,
        "event_shape": (2, 3),
        "block_rows": 4,
        "blocks": (Block(b"abcd", 7), Block(b"", 9)),
    }
    return Container(**(values | changes))


def coded(coder, symbols, pmf):
    if coder == "arithmetic":
        encoder, order = RangeEncoder(), range(len(symbols))
    else:
        encoder, order = RansEncoder(), reversed(range(len(symbols)))
    for step in order:
        encoder.put(symbols[step], pmf[step])
    return encoder.bytes()


@pytest.mark.parametrize("coder", ["rans", "arithmetic"])
@pytest.mark.parametrize("seed", range(20))
def test_symbols_come_back_at_the_cost_of_their_probabilities(coder, seed):
    rng = np.random.default_rng(seed)
    k, steps, n = int(rng.integers(2, 300)), 40, 7
    pmf = rng.dirichlet(np.full(k, rng.choice([0.01, 0.1, 10.0])), (steps, n)) + 1e-12
    pmf /= pmf.sum(-1, keepdims=True)
    symbols = np.array([[rng.choice(k, p=p) for p in row] for row in pmf])
    data = coded(coder, symbols, pmf)
    decoder = Decoder(data, coder)
    assert np.array_equal([decoder.get(p) for p in pmf], symbols)
    decoder.finish()
    bits = -np.log2(np.take_along_axis(pmf, symbols[..., None], -1)).sum()
    assert 8 * len(data) <= bits + 64 + 0.01 * symbols.size


@pytest.mark.parametrize("coder", ["rans", "arithmetic"])
def test_states_of_probability_zero_can_be_coded(coder):
    pmf = np.array([[[1.0, 0.0]], [[1 - 1e-9, 1e-9]], [[0.0, 1.0]]])
    symbols = np.array([[1], [1], [0]])
    decoder = Decoder(coded(coder, symbols, pmf), coder)
    assert np.array_equal([decoder.get(p) for p in pmf], symbols)


def test_bytes_that_are_no_code_are_refused():
    with pytest.raises(ArtefactError, match="whole words"):
        Decoder(b"abc", "rans")
    with pytest.raises(ArtefactError, match="damaged"):
        Decoder(bytes(8), "rans")
    decoder = Decoder(b"abcdefgh", "rans")
    with pytest.raises(ArtefactError, match="more than its symbols"):
        decoder.finish()


@pytest.mark.parametrize("changes", [{}, {"n_rows": 0, "blocks": ()}, {"event_shape": (6,)}])
def test_container_round_trip(changes):
    original = container(**changes)
    assert Container.from_bytes(original.to_bytes(), HASH) == original


def test_rows_of_blocks():
    assert [rows for rows, _ in container().rows_of_blocks()] == [4, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: b"PNG" + d[3:], "does not begin with PBCR"),
        (lambda d: d[:20], "cut short"),
        (lambda d: d[:-1], "checksum"),
        (lambda d: d[:4] + b"\x09" + d[5:], "format 9"),
        (lambda d: d[:50] + bytes([d[50] ^ 1]) + d[51:], "checksum"),
        (lambda d: b"", "does not begin"),
    ],
)
def test_damaged_containers_are_refused_with_the_reason(change, message):
    with pytest.raises(ArtefactError, match=message):
        Container.from_bytes(change(container().to_bytes()), HASH)


def test_another_models_container_is_refused():
    with pytest.raises(ArtefactError, match="compressed with model 000102030405"):
        Container.from_bytes(container().to_bytes(), bytes(32))
    with pytest.raises(DataError, match="expected bytes"):
        Container.from_bytes("text", HASH)


@pytest.mark.parametrize(
    ("axes", "rows", "block_rows", "blocks"),
    [(2, 2**63, 4, 2), (2, 5, 0, 2), (2, 5, 4, 2**32 - 1), (255, 5, 4, 2), (2, 2**32 - 1, 2**32 - 1, 1)],
)
def test_sizes_that_a_signed_head_makes_up_are_refused(axes, rows, block_rows, blocks):
    """The checksum is right: only the sizes lie."""
    body = bytearray(container().to_bytes()[:-16])
    HEAD.pack_into(body, 0, b"PBCR", 1, 0, 2, HASH, axes, rows, block_rows, blocks)
    with pytest.raises(ArtefactError, match="damaged"):
        Container.from_bytes(bytes(body) + _digest(bytes(body)), HASH)


def test_a_shape_that_a_signed_head_makes_up_is_refused():
    body = bytearray(container().to_bytes()[:-16])
    struct.pack_into("<2I", body, HEAD.size, 2**32 - 1, 2**32 - 1)
    with pytest.raises(ArtefactError, match="impossibly large"):
        Container.from_bytes(bytes(body) + _digest(bytes(body)), HASH)


def test_checksum_does_not_depend_on_the_dtype():
    symbols = np.arange(12).reshape(3, 4)
    assert symbols_checksum(symbols) == symbols_checksum(symbols.astype(np.uint8))
