"""Probabilistic circuits beside their peers: fitting and inference, decoding, entropy coding, hostile bytes.

    python benchmarks/density/probabilistic_circuit.py [--images 1000] [--epochs 10] [--fuzz 100000]

1. spflow, in an environment of its own (`tools/setup-peers density`): hidden Chow-Liu trees on the digits
   of scikit-learn, 64 pixels of 17 levels, the same rows, number of latents and full-batch steps of EM.
   Seconds of a step and of a log-probability, and the seconds of ours to reach spflow's best bits per pixel.
   Without the environment this part says so and is left out.
2. Our codec against the ideal -log2 p of the same rows, with one stream for each row and for 256 rows.
3. Decoding against a masked convolution that is coded with the same entropy coder.
4. The decoder on mutated containers: all must be refused or decode to what was compressed.

pyjuice needs a GPU and Triton and does not run on a CPU.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Callable

import torch
from peers import run_peer
from torch import Tensor

from paperback.data import images
from paperback.density.baselines import IndependentCategorical
from paperback.density.probabilistic_circuit import PCCompressor, ProbabilisticCircuit
from paperback.density.studies.probabilistic_circuit import (
    MaskedConvolution,
    decode_with_convolution,
    encode_with_convolution,
)
from paperback.errors import ArtefactError

LEVELS, LATENTS = 17, 16


def fastest(work: Callable[[], object], repeats: int = 7) -> tuple[float, object]:
    """The least seconds of several runs, for what takes milliseconds."""
    return min((timed(work) for _ in range(repeats)), key=lambda run: run[0])


def timed(work: Callable[[], object]) -> tuple[float, object]:
    """Seconds, and what came out."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def against_spflow(train: Tensor, test: Tensor, epochs: int) -> None:
    """Equal data, latents and full-batch steps; then ours until it is as good as spflow's best."""
    circuit = ProbabilisticCircuit(train.shape[1], LEVELS, "hclt", LATENTS)
    seconds, _ = timed(lambda: circuit.fit(train, epochs=epochs, batch_size=None, progress=False))
    inference, _ = fastest(lambda: circuit.log_prob(test))
    bits = float(circuit.bits_per_dim(test))
    print(f"paperback  fit {seconds:7.2f} s   log_prob {inference:7.4f} s   {bits:.4f} bits per pixel")
    peer = run_peer(
        "spflow_hclt.py",
        train=train.numpy(),
        test=test.numpy(),
        latents=LATENTS,
        levels=LEVELS,
        steps=epochs,
    )
    if isinstance(peer, str):
        print(f"spflow     {peer}")
        return
    bits_after = -peer["test_log_prob"] / (test.shape[1] * math.log(2))
    peer_bits = float(bits_after.min())
    enough = int((bits_after <= peer_bits + 1e-4).argmax())  # the steps that brought it there
    peer_seconds = float(peer["structure_seconds"] + peer["seconds"][:enough].sum())
    peer_inference = float(peer["inference_seconds"])
    print(
        f"spflow     fit {peer_seconds:7.2f} s   log_prob {peer_inference:7.4f} s   "
        f"{peer_bits:.4f} bits per pixel, after {enough} steps; more do not change it"
    )
    if peer["stopped"]:
        print(f"spflow's EM ends by itself at step {int(peer['stopped'])}: its likelihood no longer rises.")
    independent = float(IndependentCategorical(train.shape[1], LEVELS).fit(train).bits_per_dim(test))
    print(f"independent pixels                        {independent:.4f} bits per pixel")
    per_step = float(peer["seconds"].mean()) / (seconds / epochs)
    print(f"ratio of seconds per step: {per_step:.1f}; of log_prob: {peer_inference / inference:.1f}")
    for steps in range(1, epochs + 1):
        ours, _ = timed(lambda n=steps: circuit.fit(train, epochs=n, batch_size=None, progress=False))
        if float(circuit.bits_per_dim(test)) <= peer_bits + 0.02:
            print(f"ratio at equal bits per pixel: {peer_seconds / ours:.1f} ({steps} steps of ours)")
            return
    print("ours did not reach spflow's bits per pixel in so many steps.")


def against_convolution(seed: int = 0, n: int = 16) -> None:
    """Decoding 28x28 images of 256 levels, both with the same rANS; the network's weights do not matter."""
    data = images.fashion_mnist(1000, seed)
    train, rows = data.train.x.flatten(1).long()[:1000], data.test.x.flatten(1).long()[:n]
    circuit = ProbabilisticCircuit(784, 256, "hclt", LATENTS)
    circuit.fit(train, epochs=1, structure_rows=1000, structure_bins=8, progress=False)
    codec = PCCompressor(circuit)
    data_of_ours = codec.compress(rows)
    ours, back = timed(lambda: codec.decompress(data_of_ours))
    assert isinstance(back, Tensor)
    assert torch.equal(back, rows)
    torch.manual_seed(seed)
    network = MaskedConvolution()
    words = encode_with_convolution(network, rows, (28, 28))
    theirs, back = timed(lambda: decode_with_convolution(network, words, n, (28, 28)))
    assert isinstance(back, Tensor)
    assert torch.equal(back, rows)
    print(
        f"decoding {n} images: circuit {1e3 * ours / n:.1f} ms each, masked convolution "
        f"{1e3 * theirs / n:.1f} ms each; ratio {theirs / ours:.1f} (the bar is 5)"
    )


def against_the_ideal(circuit: ProbabilisticCircuit, rows: Tensor) -> None:
    """Bytes of our container against the sum of -log2 p."""
    ideal = -float(circuit.log_prob(rows).double().sum()) / math.log(2) / 8
    for coder in ("rans", "arithmetic"):
        for block_rows in (1, 256):
            codec = PCCompressor(circuit, coder, block_rows=block_rows)
            encode, data = timed(lambda c=codec: c.compress(rows))
            assert isinstance(data, bytes)
            decode, back = timed(lambda c=codec, d=data: c.decompress(d))
            assert isinstance(back, Tensor)
            assert torch.equal(back, rows)
            print(
                f"{coder:10s} {block_rows:4d} rows a block: {len(data) / ideal - 1:+.3%} over -log2 p, "
                f"{1e3 * encode / len(rows):.2f} ms to code a row, {1e3 * decode / len(rows):.2f} to decode"
            )


def fuzz(circuit: ProbabilisticCircuit, rows: Tensor, count: int) -> None:
    """Flipped bits and bytes, cuts, insertions."""
    codec, rng, refused = PCCompressor(circuit, block_rows=4), random.Random(0), 0
    original = codec.compress(rows)
    start = time.perf_counter()
    for _ in range(count):
        data = bytearray(original)
        for _ in range(rng.choice((1, 1, 2, 8))):
            at = rng.randrange(len(data))
            kind = rng.randrange(4)
            if kind == 0:
                data[at] ^= 1 << rng.randrange(8)
            elif kind == 1:
                data[at] = rng.randrange(256)
            elif kind == 2:
                data[at:at] = rng.randbytes(rng.randrange(1, 9))
            elif len(data) > 16:
                del data[at : at + rng.randrange(1, 9)]
        try:
            back = codec.decompress(bytes(data))
        except ArtefactError:
            refused += 1
        else:
            if not torch.equal(back, rows):
                raise RuntimeError("a mutated container decoded to something else.")
    seconds = time.perf_counter() - start
    print(f"{count:,} mutated containers: {refused:,} refused, the others unchanged; {seconds:.1f} s")


def main() -> None:
    """Run all parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=1257, help="training images")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--fuzz", type=int, default=100_000, help="mutated containers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    digits = images.digits(0)
    train, test = digits.train.x.flatten(1).long()[: options.images], digits.test.x.flatten(1).long()
    against_spflow(train, test, options.epochs)
    circuit = ProbabilisticCircuit(train.shape[1], LEVELS, "hclt", LATENTS).fit(train, progress=False)
    against_the_ideal(circuit, test)
    against_convolution()
    fuzz(circuit, test[:8], options.fuzz)


if __name__ == "__main__":
    main()
