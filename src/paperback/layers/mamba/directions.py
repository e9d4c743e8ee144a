"""One Mamba layer that scans along several paths: the core of `Mamba` for every scan but "forward".

A path lays the positions out in its order, a core with parameters of its own runs over it, and the results
are added where they belong:

    y = merge_k( core_k( scan_k(x) ) ).

Input and output projection and the gate are shared: they belong to the layer around. On sequences each core
has its own causal convolution along its path (Vim's second version; with ``share="all_but_A"`` the paths
share everything but A, Vim's first). On images a depth-wise 3x3 convolution that all paths share takes its
place, and a LayerNorm follows the merge (VMamba's SS2D).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from paperback.errors import DataError, NotSupportedError
from paperback.layers.interface import Cost
from paperback.layers.mamba.core import Core
from paperback.layers.mamba.scan_orders import (
    MERGES,
    Merge,
    ScanOrder,
    check_grid,
    needs_grid,
    order_of,
    paths_of,
)

Share = Literal["none", "all_but_A"]


class Directions(nn.Module):
    """Cores along the paths of a scan, merged.

    Args:
        make_core: makes the core of one path; its argument says whether with a causal convolution.
        scan: the name of a scan, see `paperback.layers.mamba.scan_orders.order_of`, or a `ScanOrder`.
        merge: "sum", or "mean" over the paths that visit a position.
        grid: height and width of an image in positions, for the scans that are of images; may be given with
            a `ScanOrder` too, whose positions then are an image's.
        share: "none", a core of its own for every path; "all_but_A", one core whose A alone differs.

    Attributes:
        cores: one for each path.

    Raises:
        DataError: if an argument is none of these, or the grid is missing or does not fit the order.
    """

    indices: Tensor
    inverse: Tensor

    def __init__(
        self,
        make_core: Callable[[bool], Core],
        scan: str | ScanOrder,
        merge: Merge = "sum",
        grid: tuple[int, int] | None = None,
        share: Share = "none",
    ) -> None:
        super().__init__()
        if merge not in MERGES:
            raise DataError(f'merge is {merge!r}; it must be "sum" or "mean".')
        if share not in ("none", "all_but_A"):
            raise DataError(f'share is {share!r}; it must be "none" or "all_but_A".')
        paths = paths_of(scan)
        is_image = grid is not None or needs_grid(scan)
        if is_image:
            name = scan if isinstance(scan, str) else "a ScanOrder"
            grid = check_grid(name, grid, scan.length if isinstance(scan, ScanOrder) else None)
        self.scan, self.merge, self.grid, self.share = scan, merge, grid, share
        self.cores = nn.ModuleList(make_core(not is_image) for _ in range(paths))
        first = self._cores()[0]
        self.in_width, self.d_inner = first.in_width, first.d_inner
        self.conv_width = first.conv_width if is_image else 0
        if self.conv_width:
            self.conv2d = nn.Conv2d(self.conv_width, self.conv_width, 3, padding=1, groups=self.conv_width)
        if share == "all_but_A":
            self._share_all_but_A()
        self.norm = nn.LayerNorm(self.d_inner) if is_image else nn.Identity()
        fixed = self._fixed_order()
        # An order of known length is kept on the layer's device; it is an argument, not a weight.
        self.register_buffer("indices", None if fixed is None else fixed.indices, persistent=False)
        self.register_buffer("inverse", None if fixed is None else fixed.inverse, persistent=False)

    def forward(
        self,
        x: Float[Tensor, "batch length in_width"],
        mask: Bool[Tensor, "batch length"] | None = None,
        reset: Bool[Tensor, "batch length"] | None = None,
        state: Any = None,
        order: ScanOrder | None = None,
    ) -> tuple[Float[Tensor, "batch length d_inner"], None]:
        """Run over all paths.

        Args:
            x: what the input projection gives.
            mask: True at real positions.
            reset: True where a document begins: no path carries anything over from one to another.
            state: must be None.
            order: in place of the layer's, with as many paths: a graph's, which differ from sample to sample.

        Returns:
            The merged output, and None: there is no state to go on from.

        Raises:
            DataError: if the order or the grid does not fit the input.
            NotSupportedError: if a state is given, or documents are to be kept apart on an image.
        """
        if state is not None:
            raise NotSupportedError(
                'a scan that looks at later positions has no state to go on from; use scan="forward".'
            )
        if reset is not None and self.grid is not None:
            raise NotSupportedError(
                "reset separates documents in a sequence; an image has none, leave it out."
            )
        order = self._order(x, order)
        if self.conv_width:
            x = self._convolve(x, mask)
        along = order.scan(x)
        masks = None if mask is None else order.scan(mask)
        resets = None if reset is None else document_starts(order, reset)
        outputs = [
            core(
                along[:, k], None if masks is None else masks[:, k], None if resets is None else resets[:, k]
            )[0]
            for k, core in enumerate(self.cores)
        ]
        return self.norm(order.merge(torch.stack(outputs, 1), self.merge)), None

    def reset_parameters(self) -> None:
        """Draw fresh parameters for every path."""
        for core in self._cores():
            core.reset_parameters()
        if self.conv_width:
            self.conv2d.reset_parameters()
        if isinstance(self.norm, nn.LayerNorm):
            self.norm.reset_parameters()

    def cost(self, length: int) -> Cost:
        """Operations and saved bytes of one sequence: every core over its path, and what images need more."""
        steps = length if self.indices is None else length * self.indices.shape[-1] // self.inverse.shape[-2]
        total = sum((core.cost(steps) for core in self._cores()), Cost(0, 0))
        if self.conv_width:
            # Saved are the input of the convolution and that of SiLU.
            saved = 2 * self.conv_width * length * self.conv2d.weight.element_size()
            total += Cost(2 * 9 * self.conv_width * length, saved)
        if isinstance(self.norm, nn.LayerNorm):
            total += Cost(0, length * self.d_inner * self.norm.weight.element_size())
        return total

    def extra_repr(self) -> str:
        """As torch prints a module."""
        name = self.scan if isinstance(self.scan, str) else f"ScanOrder of {self.scan.length}"
        return f"scan={name!r}, paths={len(self.cores)}, merge={self.merge!r}, share={self.share!r}"

    def _share_all_but_A(self) -> None:
        """One core, whose parameters the others take over but for A."""
        first, *others = self._cores()
        for core in others:
            for name, _ in list(core.named_parameters()):
                if name != "A_log":
                    owner, _, leaf = name.rpartition(".")
                    setattr(core.get_submodule(owner), leaf, first.get_parameter(name))

    def _cores(self) -> list[Core]:
        return cast("list[Core]", list(self.cores))

    def _fixed_order(self) -> ScanOrder | None:
        """The order, if its length is known before the input is."""
        if isinstance(self.scan, ScanOrder):
            return self.scan
        return order_of(self.scan, self.grid[0] * self.grid[1], self.grid) if self.grid else None

    def _order(self, x: Tensor, given: ScanOrder | None) -> ScanOrder:
        length = x.shape[1]
        if given is not None:
            if given.paths != len(self.cores):
                raise DataError(
                    f"order has {given.paths} paths, this layer has cores for {len(self.cores)}; "
                    "they must agree."
                )
            return given.to(x.device)
        if self.grid is not None:
            check_grid("of an image", self.grid, length)
        if self.indices is not None:
            return ScanOrder(self.indices, self.inverse)
        assert isinstance(self.scan, str)
        return order_of(self.scan, length).to(x.device)

    def _convolve(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """SiLU of the 3x3 convolution of the channels that a core would convolve; padding counts as zero."""
        head, tail = x[..., : self.conv_width], x[..., self.conv_width :]
        if mask is not None:
            head = head * mask.unsqueeze(-1)
        image = head.transpose(1, 2).unflatten(2, self.grid)
        convolved = F.silu(self.conv2d(image)).flatten(2).transpose(1, 2)
        return torch.cat([convolved, tail], -1) if tail.shape[-1] else convolved


def document_starts(
    order: ScanOrder, reset: Bool[Tensor, "batch length"]
) -> Bool[Tensor, "batch paths steps"]:
    """Where along each path another document begins than the one before.

    Documents are numbered by the resets before them; a path that comes from another document's position
    starts anew. Backwards, that is at the last position of each document.

    Args:
        order: the paths.
        reset: True at the first position of a document.
    """
    documents = order.scan(reset.cumsum(1))
    changes = documents[..., 1:] != documents[..., :-1]
    return F.pad(changes, (1, 0))
