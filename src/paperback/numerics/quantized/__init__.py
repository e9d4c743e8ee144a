"""Quantized tensors: a tensor as small integers, the codes, and the grid of values that they stand for.

A tensor is cut into groups (all of it, its rows, runs of one row, or runs of all of it: `Layout`), and each
group has a grid of 2^b values. With code q, a uniform grid is

    linear   min + s q,              s = (max - min) / (2^b - 1)       min and max are kept
    affine   s (q - z),              z an integer, min <= 0 <= max     zero is kept
    absmax   s (q - (2^(b-1) - 1)),  s = max|v| / (2^(b-1) - 1)        zero is kept, the grid is symmetric

and a codebook is a sorted list of points p, s p_q + min or s p_q. `QuantizedTensor` packs the codes with b
bits each, without gaps: what its `pack` returns is what a file holds. Rounding to the nearest goes to the
even code on a tie. Sources: arXiv 1802.05668 (buckets, codebooks), 2402.09748 (round to nearest), 2305.14314
(normal float).
"""

from __future__ import annotations

from paperback.numerics.quantized.grid import Grid, Scaling, Scheme, uniform_grid
from paperback.numerics.quantized.layout import Layout, Per
from paperback.numerics.quantized.length import code_counts, entropy_bits, huffman_bits
from paperback.numerics.quantized.packing import MOST_BITS, pack_bits, packed_size, unpack_bits
from paperback.numerics.quantized.points import (
    kmeans_points,
    normal_float_points,
    quantile_points,
    uniform_points,
)
from paperback.numerics.quantized.tensor import (
    QuantizedTensor,
    check_packed,
    quantize_codebook,
    quantize_uniform,
)

__all__ = [
    "MOST_BITS",
    "Grid",
    "Layout",
    "Per",
    "QuantizedTensor",
    "Scaling",
    "Scheme",
    "check_packed",
    "code_counts",
    "entropy_bits",
    "huffman_bits",
    "kmeans_points",
    "normal_float_points",
    "pack_bits",
    "packed_size",
    "quantile_points",
    "quantize_codebook",
    "quantize_uniform",
    "uniform_grid",
    "uniform_points",
    "unpack_bits",
]
