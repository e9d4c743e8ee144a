"""Masks with an exact number of kept weights: who keeps how many, which ones, how a mask changes, its bytes.

A mask is a bool tensor of the shape of its weight; True is kept. `allocate` shares a density out over layers,
`topk_mask`, `row_mask` and `nm_mask` choose the weights, `prune`, `grow` and `swap` change a mask,
`hold_masks` keeps a training inside one, and `masks_to_bytes` writes masks down in as few bytes as a bitmap,
an entropy coder or the pattern of an N:M mask allows.
"""

from paperback.compress.masks.allocate import Allocation, allocate, kept_of
from paperback.compress.masks.change import grow, hold_masks, mask_optimizer_state, prune, swap
from paperback.compress.masks.choose import (
    check_nm,
    check_rows,
    nm_mask,
    nm_patterns,
    row_kept,
    row_mask,
    topk_mask,
)
from paperback.compress.masks.pack import bytes_to_masks, masks_to_bytes

__all__ = [
    "Allocation",
    "allocate",
    "bytes_to_masks",
    "check_nm",
    "check_rows",
    "grow",
    "hold_masks",
    "kept_of",
    "mask_optimizer_state",
    "masks_to_bytes",
    "nm_mask",
    "nm_patterns",
    "prune",
    "row_kept",
    "row_mask",
    "swap",
    "topk_mask",
]
