"""The codebook layer beside its peers: the same codes, and the time of one training step, in one process.

    python benchmarks/explain/codebook_features.py

The authors' package `codebook-features` is pinned to versions of transformers and transformer_lens that do
not run beside ours; its layer is therefore written down here from its description (`official`): similarities
with all codes at once, `torch.topk` over them, and a backward pass that differentiates the embedding and the
auto-encoder's term by autograd. `vector-quantize-pytorch` 1.32 (pip install vector-quantize-pytorch) has one
code per vector only: its VectorQuantize is compared at k = 1 by Euclidean distance, with codes that learn by
gradient, as ours do, in place of moving averages; `ours, euclidean` does the same work. Times are medians of
interleaved repetitions of forward and backward on one thread.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperback.explain.codebook_features import CodebookLayer
from paperback.study.measure import Stopwatch

SHAPES = (
    (8, 128, 128, 10_000, 8),
    (8, 128, 128, 10_000, 1),
    (4, 256, 512, 10_000, 8),
    (16, 128, 32, 1000, 8),
)
REPETITIONS = 7


class OfficialSnap(torch.autograd.Function):
    """Inner-product snap with the loss "aeloss", as the authors' code computes it."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, codes: Tensor, k: int) -> tuple[Tensor, Tensor]:
        scores = u @ codes.T / codes.norm(dim=-1)
        ids = scores.topk(k, dim=-1).indices
        with torch.enable_grad():
            out = F.embedding(ids, codes).sum(-2) / k
        ctx.save_for_backward(u, codes, out)
        return out.detach().clone(), ids

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        u, codes, out = ctx.saved_tensors
        with torch.enable_grad():
            error = (out - u).square().sum(-1).mean()
            to_codes = torch.autograd.grad(error, codes, retain_graph=True)[0]
        to_codes = to_codes + torch.autograd.grad(out, codes, gradients[0])[0]
        return gradients[0], to_codes, None


class Official(nn.Module):
    """The authors' layer: LayerNorm, then the snap."""

    def __init__(self, dim: int, n_codes: int, k: int) -> None:
        super().__init__()
        self.norm, self.codes, self.k = nn.LayerNorm(dim), nn.Parameter(torch.randn(n_codes, dim)), k

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Output and ids."""
        return OfficialSnap.apply(self.norm(x), self.codes, self.k)


def contenders(dim: int, n_codes: int, k: int) -> dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]]:
    """The layers, ours and the official one with equal codes."""
    torch.manual_seed(0)
    ours, official = CodebookLayer(dim, n_codes, k), Official(dim, n_codes, k)
    ours.codes.data.copy_(official.codes[None])
    found: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {"ours": ours, "official": official}
    if k == 1:
        try:
            from vector_quantize_pytorch import VectorQuantize
        except ImportError as error:
            print(f"  vector-quantize-pytorch is left out: {error}")
            return found
        theirs = VectorQuantize(dim, codebook_size=n_codes, learnable_codebook=True, ema_update=False)
        norm = nn.LayerNorm(dim)

        def vector_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
            out, ids, loss = theirs(norm(x))
            return out + 0 * loss, ids  # its loss is part of what backward does

        found["ours, euclidean"] = CodebookLayer(dim, n_codes, k, "euclidean", "fullae")
        found["vector-quantize-pytorch"] = vector_quantize
    return found


def milliseconds(layers: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]], x: Tensor) -> dict[str, float]:
    """Median time of forward and backward, the layers taking turns."""
    times: dict[str, list[float]] = {name: [] for name in layers}
    for repetition in range(REPETITIONS + 1):
        for name, layer in layers.items():
            with Stopwatch() as watch:
                layer(x)[0].square().sum().backward()
            if repetition:  # the first warms up
                times[name].append(watch.seconds * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Print the tables."""
    torch.set_num_threads(1)
    for batch, length, dim, n_codes, k in SHAPES:
        print(f"(batch, length, dim) = ({batch}, {length}, {dim}), {n_codes} codes, k = {k}")
        layers = contenders(dim, n_codes, k)
        x = torch.randn(batch, length, dim, generator=torch.Generator().manual_seed(1), requires_grad=True)
        times = milliseconds(layers, x)
        for name, time in times.items():
            print(f"  {name:24} {time:8.1f} ms = {time / times['ours']:5.2f} x ours")
        ours, official = layers["ours"], layers["official"]
        assert isinstance(ours, CodebookLayer)
        assert isinstance(official, Official)
        ours.zero_grad()
        official.zero_grad()
        (a, ids), (b, others) = ours(x), official(x)
        a.square().sum().backward()
        b.square().sum().backward()
        same = float((ids[:, :, 0].sort(-1).values == others.sort(-1).values).all(-1).float().mean())
        assert ours.codes.grad is not None
        assert official.codes.grad is not None
        error = float(
            (ours.codes.grad[0] - official.codes.grad).abs().max() / official.codes.grad.abs().max()
        )
        print(
            f"  ours and official: the same codes at {same:.3%} of tokens, outputs differ by at most "
            f"{float((a - b).detach().abs().max()):.1e}, gradients of codes by {error:.1e} of the largest"
        )


if __name__ == "__main__":
    main()
