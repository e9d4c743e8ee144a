"""The orders in which a scan visits the positions of a sequence, an image or a graph (survey, section 4.2).

A recurrence sees what it has visited before, so the order is the inductive bias. A `ScanOrder` holds K paths
over L positions. `scan` lays the positions out along every path, a layer runs over each path, and `merge`
brings the K results back to their positions and adds them:

    merge(scan(x)) = c x,    c = number of paths that visit a position (K for permutations, 1 for "atrous").

Sources: Vim (bidirectional), VMamba (cross: SS2D), PlainMamba and Zigma (continuous: snake), LocalMamba
(windows), EfficientVMamba (atrous), Graph-Mamba (nodes by degree), as the survey arXiv 2408.01129 sorts them.
The Hilbert curve of a rectangle of any size follows the recursion that cuts a rectangle into an ascent, a
crossing and a descent; it is a chain of neighbours whenever parity allows one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from paperback.errors import DataError

Merge = Literal["sum", "mean"]
MERGES: tuple[str, ...] = ("sum", "mean")
PATHS = {"forward": 1, "reverse": 1, "bidirectional": 2}  # orders of a sequence: name -> number of paths
GRID_SCANS = ("cross", "cross_rot90", "snake", "hilbert", "local", "atrous")  # orders of an image
TWO_WAY = "_two_way"  # after the name of an image's order: every path also backwards


@dataclass(frozen=True)
class ScanOrder:
    """K paths over the positions 0 .. L - 1.

    Attributes:
        indices: ``(K, M)`` int64, the positions along each path; or ``(batch, K, M)``, other ones for every
            sample. M is L for permutations, and less where the paths share the positions out between them.
        inverse: ``(L, c)`` or ``(batch, L, c)`` int64: for every position, where in the K * M steps of all
            paths it is visited.
    """

    indices: Int[Tensor, "*batch paths steps"]
    inverse: Int[Tensor, "*batch length visits"]

    # -- of sequences --------------------------------------------------------------------------------------

    @classmethod
    def forward(cls, length: int) -> Self:
        """From the first position to the last.

        Args:
            length: number of positions, >= 1.
        """
        return cls._of_permutation(torch.arange(length))

    @classmethod
    def reverse(cls, length: int) -> Self:
        """From the last position to the first.

        Args:
            length: number of positions, >= 1.
        """
        return cls._of_permutation(torch.arange(length).flip(0))

    @classmethod
    def bidirectional(cls, length: int) -> Self:
        """Two paths, one each way (Vim).

        Args:
            length: number of positions, >= 1.
        """
        return cls.forward(length).both_ways()

    # -- of images, position = row * width + column --------------------------------------------------------

    @classmethod
    def cross(cls, height: int, width: int) -> Self:
        """Four paths: along the rows, along the columns, and both backwards (VMamba's SS2D).

        Args:
            height: of the image in positions, >= 1.
            width: of the image in positions, >= 1.
        """
        grid = _grid(height, width)
        return cls.of_paths(torch.stack([grid.flatten(), grid.T.flatten()])).both_ways()

    @classmethod
    def cross_rot90(cls, height: int, width: int) -> Self:
        """Four paths: along the rows of the image turned by 0, 90, 180 and 270 degrees.

        Args:
            height: of the image in positions, >= 1.
            width: of the image in positions, >= 1.
        """
        grid = _grid(height, width)
        return cls.of_paths(torch.stack([torch.rot90(grid, turns).flatten() for turns in range(4)]))

    @classmethod
    def snake(cls, height: int, width: int) -> Self:
        """One path along the rows, every second one backwards: consecutive positions are neighbours.

        Args:
            height: of the image in positions, >= 1.
            width: of the image in positions, >= 1.
        """
        grid = _grid(height, width).clone()
        grid[1::2] = grid[1::2].flip(1)
        return cls.of_paths(grid.view(1, -1))

    @classmethod
    def hilbert(cls, height: int, width: int) -> Self:
        """One path along a Hilbert curve: consecutive positions are neighbours, and near ones stay near.

        Args:
            height: of the image in positions, >= 1.
            width: of the image in positions, >= 1; any rectangle will do, not only powers of two.
        """
        grid = _grid(height, width)
        # The curve ends where it began, but for the first axis. On a chessboard of even size the two ends
        # have different colours, so that axis must be even; on one of odd size any axis will do.
        along_rows = width >= height if (width - height) % 2 == 0 else width % 2 == 0
        across, up = ((0, width), (height, 0)) if along_rows else ((height, 0), (0, width))
        cells = torch.tensor(_hilbert((0, 0), across, up))
        return cls.of_paths(grid[cells[:, 0], cells[:, 1]].view(1, -1))

    @classmethod
    def local(cls, height: int, width: int, window: int = 2) -> Self:
        """One path through windows of the image, each one whole before the next (LocalMamba).

        Args:
            height: of the image in positions, >= 1.
            width: of the image in positions, >= 1.
            window: side of a window, >= 1; those at the lower and right edges may be smaller.
        """
        if window < 1:
            raise DataError(f"window is {window}; it must be at least 1.")
        grid = _grid(height, width)
        blocks = [part for band in grid.split(window, 0) for part in band.split(window, 1)]
        return cls.of_paths(torch.cat([block.flatten() for block in blocks]).view(1, -1))

    @classmethod
    def atrous(cls, height: int, width: int, stride: int = 2) -> Self:
        """stride² paths, each over its own interleaved sub-grid, in turn along the four ways of `cross`
        (EfficientVMamba): all together they visit every position once, a quarter of the work of `cross`.

        Args:
            height: of the image in positions, a multiple of the stride.
            width: of the image in positions, a multiple of the stride.
            stride: distance of neighbours in a sub-grid, >= 1.
        """
        if stride < 1 or height % stride or width % stride:
            raise DataError(
                f"stride is {stride}, the grid {height}x{width}; the stride must divide height and width."
            )
        grid = _grid(height, width)
        ways = ScanOrder.cross(height // stride, width // stride).indices
        parts = [grid[i::stride, j::stride].flatten() for i in range(stride) for j in range(stride)]
        return cls.of_paths(torch.stack([part[ways[k % 4]] for k, part in enumerate(parts)]))

    # -- of graphs, and any other --------------------------------------------------------------------------

    @classmethod
    def degree(
        cls, degrees: Tensor, generator: torch.Generator | None = None, descending: bool = False
    ) -> Self:
        """One path over the nodes of a graph by their degree, so that hubs come last and have seen the rest
        (Graph-Mamba).

        Args:
            degrees: ``(nodes,)``, or ``(batch, nodes)`` for one graph per sample; any real numbers.
            generator: shuffles nodes of equal degree, as in training; without it they stay in order.
            descending: hubs first.
        """
        if degrees.ndim not in (1, 2) or degrees.shape[-1] == 0:
            raise DataError(f"degrees has shape {tuple(degrees.shape)}; give (nodes,) or (batch, nodes).")
        if generator is None:
            path = degrees.argsort(dim=-1, descending=descending, stable=True)
        else:
            noise = torch.rand(degrees.shape, generator=generator, device=generator.device)
            shuffle = noise.to(degrees.device).argsort(-1)
            path = degrees.gather(-1, shuffle).argsort(dim=-1, descending=descending, stable=True)
            path = shuffle.gather(-1, path)
        return cls._of_permutation(path)

    @classmethod
    def of_paths(cls, indices: Tensor) -> Self:
        """Any paths: a permutation ``(L,)``, K of them ``(K, L)``, or ``(batch, K, L)``; also shorter paths
        that together visit every position equally often.

        Args:
            indices: positions 0 .. L - 1, an integer tensor.

        Raises:
            DataError: if it is no integer tensor of that form, or positions are left out or visited unevenly.
        """
        if not isinstance(indices, Tensor) or indices.is_floating_point() or indices.dtype == torch.bool:
            kind = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
            raise DataError(f"the scan order is {kind}; give a tensor of integers, the positions in turn.")
        if indices.ndim not in (1, 2, 3) or indices.numel() == 0:
            raise DataError(
                f"the scan order has shape {tuple(indices.shape)}; give (L,), (K, L) or (batch, K, L)."
            )
        paths = (indices if indices.ndim > 1 else indices[None]).long()
        flat = paths.flatten(-2)
        length = int(flat.max()) + 1
        visits = flat.shape[-1] // max(length, 1)
        even = torch.arange(length, device=flat.device).repeat_interleave(visits)
        ordered, inverse = flat.sort(dim=-1, stable=True)
        if int(flat.min()) < 0 or ordered.shape[-1] != len(even) or not bool((ordered == even).all()):
            raise DataError(
                f"the scan order names positions {int(flat.min())} to {length - 1}, but not all of them "
                "equally often; every position 0 .. L - 1 must be on the same number of paths."
            )
        return cls(paths, inverse.unflatten(-1, (length, visits)))

    @classmethod
    def _of_permutation(cls, path: Tensor) -> Self:
        """A path that is known to be a permutation: nothing is looked at, so that it can be exported."""
        return cls(path.unsqueeze(-2), path.argsort(dim=-1).unsqueeze(-1))

    # -- what is done with an order ------------------------------------------------------------------------

    @property
    def length(self) -> int:
        """Number of positions."""
        return self.inverse.shape[-2]

    @property
    def paths(self) -> int:
        """Number of paths."""
        return self.indices.shape[-2]

    def both_ways(self) -> Self:
        """The same paths, and each of them backwards."""
        paths, steps = self.indices.shape[-2:]
        # Step m of path k is step M - 1 - m of path K + k.
        mirrored = paths * steps + self.inverse + (steps - 1 - 2 * (self.inverse % steps))
        indices = torch.cat([self.indices, self.indices.flip(-1)], -2)
        return type(self)(indices, torch.cat([self.inverse, mirrored], -1))

    @classmethod
    def join(cls, *orders: ScanOrder) -> Self:
        """The paths of several orders over the same positions, together.

        Raises:
            DataError: if the orders differ in length or in the steps of their paths.
        """
        if len({(order.length, order.indices.shape[-1]) for order in orders}) != 1:
            lengths = [(order.length, order.indices.shape[-1]) for order in orders]
            raise DataError(f"orders of (positions, steps) {lengths} cannot be joined; they must agree.")
        return cls.of_paths(torch.cat([order.indices for order in orders], -2))

    def to(self, device: torch.device | str) -> Self:
        """The order on a device."""
        return type(self)(self.indices.to(device), self.inverse.to(device))

    def scan(self, x: Tensor) -> Tensor:
        """Lay positions out along the paths.

        Args:
            x: ``(batch, L, ...)``, anything that belongs to positions.

        Returns:
            ``(batch, K, M, ...)``.

        Raises:
            DataError: if the order is for another length or batch.
        """
        self.check(x.shape[0], x.shape[1])
        return _pick(x, self.indices)

    def merge(self, y: Float[Tensor, "batch paths steps *rest"], how: Merge = "sum") -> Tensor:
        """Bring what was computed along the paths back to its positions, and add it up.

        Args:
            y: ``(batch, K, M, ...)``.
            how: "sum", or "mean" over the visits of a position.

        Returns:
            ``(batch, L, ...)``.
        """
        visits = _pick(y.flatten(1, 2), self.inverse)
        return visits.sum(2) if how == "sum" else visits.mean(2)

    def check(self, batch: int, length: int) -> None:
        """Refuse a sequence that this order is not for.

        Raises:
            DataError: naming both lengths, or both batch sizes.
        """
        if self.length != length:
            raise DataError(
                f"the scan order is for {self.length} positions, the input has {length}; "
                "make the order for this length, or pass one with forward(..., order=)."
            )
        if self.indices.ndim == 3 and self.indices.shape[0] not in (1, batch):
            raise DataError(
                f"the scan order is for a batch of {self.indices.shape[0]}, the input has {batch} samples."
            )


def paths_of(scan: str | ScanOrder, stride: int = 2) -> int:
    """How many paths a scan has: how many sets of parameters a layer needs.

    Args:
        scan: a name, see `order_of`, or an order.
        stride: of "atrous".

    Raises:
        DataError: if there is no such scan.
    """
    if isinstance(scan, ScanOrder):
        return scan.paths
    base = scan.removesuffix(TWO_WAY)
    ways = 2 if scan != base else 1
    if scan in PATHS:
        return PATHS[scan]
    if base in GRID_SCANS:
        return ways * {"cross": 4, "cross_rot90": 4, "atrous": stride**2}.get(base, 1)
    raise DataError(
        f"scan is {scan!r}; it must be one of {', '.join([*PATHS, *GRID_SCANS])}, an image's order followed "
        f"by {TWO_WAY!r}, or a ScanOrder."
    )


def needs_grid(scan: str | ScanOrder) -> bool:
    """Whether a scan is one of images, that needs to know their height and width."""
    return isinstance(scan, str) and scan.removesuffix(TWO_WAY) in GRID_SCANS


def order_of(
    scan: str, length: int, grid: tuple[int, int] | None = None, window: int = 2, stride: int = 2
) -> ScanOrder:
    """The order of that name.

    Args:
        scan: "forward", "reverse", "bidirectional"; of images "cross", "cross_rot90", "snake", "hilbert",
            "local", "atrous", each of which may be followed by "_two_way" for every path backwards, too.
        length: number of positions.
        grid: height and width of an image in positions, with height * width = length.
        window: of "local".
        stride: of "atrous".

    Raises:
        DataError: if there is no such scan, or the grid is missing or does not have that many positions.
    """
    paths_of(scan, stride)
    if not needs_grid(scan):
        return {
            "forward": ScanOrder.forward, "reverse": ScanOrder.reverse,
            "bidirectional": ScanOrder.bidirectional,
        }[scan](length)  # fmt: skip
    height, width = check_grid(scan, grid, length)
    base = scan.removesuffix(TWO_WAY)
    if base == "local":
        order = ScanOrder.local(height, width, window)
    elif base == "atrous":
        order = ScanOrder.atrous(height, width, stride)
    else:
        makers = {
            "cross": ScanOrder.cross, "cross_rot90": ScanOrder.cross_rot90,
            "snake": ScanOrder.snake, "hilbert": ScanOrder.hilbert,
        }  # fmt: skip
        order = makers[base](height, width)
    return order if scan == base else order.both_ways()


def check_grid(scan: str, grid: tuple[int, int] | None, length: int | None = None) -> tuple[int, int]:
    """Height and width, if they are there and fit.

    Raises:
        DataError: if the grid is missing, or its positions are not `length`.
    """
    if grid is None:
        raise DataError(f'scan="{scan}" visits images; give their size in positions as grid=(height, width).')
    height, width = grid
    if height < 1 or width < 1:
        raise DataError(f"grid is {(height, width)}; height and width must be at least 1.")
    if length is not None and height * width != length:
        raise DataError(
            f"grid {height}x{width} has {height * width} positions, the input has {length}; they must agree."
        )
    return height, width


# -- helpers -------------------------------------------------------------------------------------------------


def _grid(height: int, width: int) -> Tensor:
    """The positions of an image, ``(height, width)``."""
    check_grid("of an image", (height, width))
    return torch.arange(height * width).view(height, width)


def _pick(x: Tensor, table: Tensor) -> Tensor:
    """Entries of x along dimension 1, by a table of one index for all samples or of one for each."""
    if table.ndim == 2:
        return x[:, table]
    rows = torch.arange(x.shape[0], device=x.device).view(-1, 1, 1)
    return x[rows, table]


def _hilbert(corner: tuple[int, int], across: tuple[int, int], up: tuple[int, int]) -> list[tuple[int, int]]:
    """Cells of a rectangle along a curve from its corner to the other end of the side `across`.

    The sides are vectors along one axis each, with a sign: |across| x |up| cells. A long rectangle is cut
    in two; another one is climbed on the left, crossed on top, and descended on the right.
    """
    (row, column), wide, high = corner, abs(sum(across)), abs(sum(up))
    step, rise = _sign(across), _sign(up)
    if high == 1:
        return [(row + i * step[0], column + i * step[1]) for i in range(wide)]
    if wide == 1:
        return [(row + i * rise[0], column + i * rise[1]) for i in range(high)]
    half, middle = wide // 2, high // 2
    if 2 * wide > 3 * high:
        if half % 2 and wide > 2:
            half += 1  # an even first part can end on the side where it began
        left, right = _times(step, half), _times(step, wide - half)
        return _hilbert(corner, left, up) + _hilbert(_plus(corner, left), right, up)
    if middle % 2 and high > 2:
        middle += 1
    lower, upper = _times(rise, middle), _times(rise, high - middle)
    left, right = _times(step, half), _times(step, wide - half)
    top_right = _plus(_plus(corner, _times(step, wide - 1)), _times(rise, middle - 1))
    ascent = _hilbert(corner, lower, left)
    crossing = _hilbert(_plus(corner, lower), across, upper)
    descent = _hilbert(top_right, _times(rise, -middle), _times(step, half - wide))
    return ascent + crossing + descent


def _sign(side: tuple[int, int]) -> tuple[int, int]:
    return (side[0] > 0) - (side[0] < 0), (side[1] > 0) - (side[1] < 0)


def _times(direction: tuple[int, int], n: int) -> tuple[int, int]:
    return direction[0] * n, direction[1] * n


def _plus(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    return a[0] + b[0], a[1] + b[1]
