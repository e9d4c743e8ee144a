"""Probabilistic circuits beside their peers: fitting and inference, decoding, entropy coding, hostile bytes.

    python benchmarks/density/probabilistic_circuit.py [--images 1000] [--epochs 10] [--fuzz 100000]

1. spflow (PyTorch; ``pip install spflow``): hidden Chow-Liu trees on the digits of scikit-learn, 64 pixels
   of 17 levels, the same rows, number of latents and full-batch steps of EM. Seconds to fit, seconds of a
   log-probability and bits per pixel on the test part, and the seconds of ours to reach spflow's bits per
   pixel. Without spflow this part says so and is left out.
2. Our codec against the ideal -log2 p of the same rows, with one stream for each row and for 256 rows.
3. The decoder on mutated containers: all must be refused or decode to what was compressed.

The masked-convolution rival is trained and timed in the study of the method. pyjuice needs a GPU and Triton
and does not run on a CPU.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Callable

import torch
from torch import Tensor

from paperback.data import images
from paperback.density.probabilistic_circuit import PCCompressor, ProbabilisticCircuit
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
    """Equal data, latents and epochs."""
    circuit = ProbabilisticCircuit(train.shape[1], LEVELS, "hclt", LATENTS)
    seconds, _ = timed(lambda: circuit.fit(train, epochs=epochs, batch_size=None, progress=False))
    inference, _ = fastest(lambda: circuit.log_prob(test))
    bits = float(circuit.bits_per_dim(test))
    print(f"paperback  fit {seconds:7.2f} s   log_prob {inference:7.3f} s   {bits:.4f} bits per pixel")
    try:
        from spflow.learn.expectation_maximization import expectation_maximization
        from spflow.zoo.hclt import learn_hclt_categorical
    except ImportError as error:
        print(f"spflow     not run: {error}; pip install spflow")
        return
    rows = train.float()
    torch.manual_seed(0)

    taken = 0

    def fit() -> torch.nn.Module:
        nonlocal taken
        model = learn_hclt_categorical(rows, num_hidden_cats=LATENTS, num_cats=LEVELS, init="random")
        taken = len(expectation_maximization(model, rows, max_steps=epochs))  # it stops when it gains nothing
        return model

    peer_seconds, model = timed(fit)
    assert isinstance(model, torch.nn.Module)
    with torch.no_grad():
        peer_inference, log_prob = fastest(lambda: model.log_likelihood(test.float()))
    assert isinstance(log_prob, Tensor)
    peer_bits = -float(log_prob.flatten(1).mean()) / (test.shape[1] * math.log(2))
    print(
        f"spflow     fit {peer_seconds:7.2f} s   log_prob {peer_inference:7.3f} s   "
        f"{peer_bits:.4f} bits per pixel"
    )
    print(f"spflow took {taken} of {epochs} steps, structure included; ours took all of them.")
    print(f"ratio of seconds per step: {peer_seconds / taken / (seconds / epochs):.1f}")
    print(f"ratio      fit {peer_seconds / seconds:7.1f}     log_prob {peer_inference / inference:7.1f}")
    for enough in range(1, epochs + 1):
        seconds, _ = timed(lambda n=enough: circuit.fit(train, epochs=n, batch_size=None, progress=False))
        if float(circuit.bits_per_dim(test)) <= peer_bits + 0.02:
            print(f"ratio at equal bits per pixel: {peer_seconds / seconds:.1f} ({enough} epochs of ours)")
            return
    print("ours did not reach spflow's bits per pixel in so many epochs.")


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
    fuzz(circuit, test[:8], options.fuzz)


if __name__ == "__main__":
    main()
