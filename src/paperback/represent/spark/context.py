"""Which positions of a map are there: a mask for each image, at the size of every layer.

It is held for one forward pass. The mask has one cell for each patch of the image, A in {0, 1}^(n x 1 x f x
f). A layer whose map is larger repeats every cell, A_l = A repeated to (h, w); each size is made once per
pass. The context is entered on a network and leaves it again, and each thread has its own, so that two
networks, or two threads in one network, never see each other's mask.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from paperback.errors import DataError


class SparseContext:
    """The active cells of a batch, for one forward pass through sparse layers.

    context = SparseContext(mask)
    with context.on(network):
        maps = network.feature_maps(context.hide(images))

    Args:
        mask: True where the image is visible, one cell for each patch.

    Raises:
        DataError: if the mask is not a bool tensor of that shape.
    """

    def __init__(self, mask: Bool[Tensor, "n 1 fh fw"]) -> None:
        if mask.ndim != 4 or mask.shape[1] != 1 or mask.dtype != torch.bool:
            raise DataError(
                f"mask is {mask.dtype} with shape {tuple(mask.shape)}; give bools (n, 1, rows, columns)."
            )
        self.mask = mask
        self._active = mask.float()
        self._masks: dict[tuple[int, int], Tensor] = {}
        self._runs: dict[tuple[int, int], Tensor] = {}

    def at(self, height: int, width: int) -> Float[Tensor, "n 1 h w"]:
        """The mask at the size of a map, 1 where active.

        Raises:
            DataError: if the map does not consist of whole cells.
        """
        found = self._masks.get((height, width))
        if found is None:
            n, _, rows, columns = self.mask.shape
            if height % rows or width % columns:
                raise DataError(
                    f"a map of {height}x{width} cannot be cut into the mask's {rows}x{columns} cells; "
                    "every stage must have whole cells: take another image size or stride."
                )
            size = (n, 1, rows, height // rows, columns, width // columns)
            found = self._active[:, :, :, None, :, None].expand(size).reshape(n, 1, height, width)
            self._masks[height, width] = found
        return found

    def runs(self, height: int, width: int) -> Int[Tensor, " active"]:
        """Which runs of a map are active: a run is what a cell covers of a row of the map.

        Returns:
            Indices in the order of ``(n, h, columns)``; the ``w / columns`` positions of a run are neighbours
            in memory.
        """
        found = self._runs.get((height, width))
        if found is None:
            n, _, rows, columns = self.mask.shape
            whole = self.mask[:, 0, :, None].expand(n, rows, height // rows, columns)
            found = self._runs[height, width] = whole.flatten().nonzero()[:, 0]
        return found

    def is_sparse_at(self, x: Float[Tensor, "n c h w"]) -> bool:
        """Whether a map has positions, and some of them are absent."""
        height, width = x.shape[-2:]
        if not self.has_positions(height, width):
            return False
        self.at(height, width)  # refuses maps that cannot be cut
        return len(self.runs(height, width)) < len(x) * height * self.mask.shape[-1]

    def has_positions(self, height: int, width: int) -> bool:
        """False for what global pooling left of a map: one value per channel, of no position."""
        return (height, width) != (1, 1) or self.mask.shape[-2:] == (1, 1)

    def hide(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """The images with zeros at the inactive cells."""
        return images * self.at(*images.shape[-2:])

    @contextmanager
    def on(self, network: nn.Module) -> Iterator[SparseContext]:
        """Let the sparse layers of a network see this mask, in this thread, until the block ends."""
        slots = {id(slot): slot for m in network.modules() if isinstance(slot := vars(m).get("slot"), Slot)}
        before = [slot.context for slot in slots.values()]
        for slot in slots.values():
            slot.context = self
        try:
            yield self
        finally:
            for slot, context in zip(slots.values(), before, strict=True):
                slot.context = context


class Slot(threading.local):
    """Where a sparse layer finds the context of its thread; a copy of the layer gets an empty one."""

    context: SparseContext | None = None

    def __reduce__(self) -> tuple[type[Slot], tuple[()]]:
        return Slot, ()
