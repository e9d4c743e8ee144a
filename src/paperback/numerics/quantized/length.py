"""How many bits the codes would take in an entropy code."""

from __future__ import annotations

import heapq

import torch
from torch import Tensor

from paperback.numerics.quantized.tensor import QuantizedTensor


def code_counts(*tensors: QuantizedTensor) -> Tensor:
    """How often each code occurs in all these tensors together."""
    levels = max(tensor.grid.levels for tensor in tensors)
    return sum(
        (torch.bincount(tensor.codes.reshape(-1).int(), minlength=levels) for tensor in tensors),
        torch.zeros(levels, dtype=torch.long),
    )


def entropy_bits(counts: Tensor) -> float:
    """Mean bits per code that no code can go below: the entropy of the frequencies."""
    shares = counts[counts > 0].double() / counts.sum()
    return float(-(shares * shares.log2()).sum())


def huffman_bits(counts: Tensor) -> float:
    """Mean bits per code of a Huffman code for these frequencies; 1 when only one code occurs."""
    heap = [int(count) for count in counts if count > 0]
    total = sum(heap)
    if len(heap) < 2:
        return float(len(heap))
    heapq.heapify(heap)
    length = 0
    while len(heap) > 1:  # each merge puts one more bit before everything under it
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        length += merged
        heapq.heappush(heap, merged)
    return length / total
