"""Two ways to lay out a monotone deep Boltzmann machine: without geometry, and with convolutional tiers.

Both return plain lists, as the constructor takes them and config.json keeps them.
"""

from __future__ import annotations

from collections.abc import Sequence

from paperback.density.monotone_dbm.structure import Tier
from paperback.errors import DataError

Tiers = list[list[int | str]]
Connections = list[list]


def dense(
    n_visible: int,
    n_states: int | Sequence[int],
    hidden: tuple[int, int] | None,
    n_classes: int | None,
    rows: int,
) -> tuple[Tiers, Connections, list[int] | None]:
    """Tiers without geometry and one row block that sees them all; see `MonotoneDBM.dense`.

    Columns with the same number of states share a tier. The third value says which column of X each visible
    variable holds; None where that is the order of X.
    """
    states = [n_states] * n_visible if isinstance(n_states, int) else list(n_states)
    kinds = sorted(set(states))
    columns = sorted(range(n_visible), key=lambda column: states[column])
    tiers = [Tier("visible", k, states.count(k)) for k in kinds]
    tiers += [Tier("hidden", hidden[1], hidden[0])] if hidden else []
    tiers += [Tier("class", n_classes, 1)] if n_classes else []
    connections = [[rows, [1] * len(tiers)]]
    return [list(tier) for tier in tiers], connections, columns if len(kinds) > 1 else None


def conv(
    image_shape: Sequence[int],
    n_states: int,
    hidden: Sequence[tuple[int, int, int]],
    n_classes: int | None,
    kernel: int,
) -> tuple[Tiers, Connections]:
    """A pyramid of tiers; the row block of each sees it and all finer ones, as in the paper.

    See `MonotoneDBM.conv`.

    Raises:
        DataError: if a stride does not divide the image.
    """
    channels, height, width = (1, *image_shape) if len(image_shape) == 2 else tuple(image_shape)
    tiers = [Tier("visible", n_states, channels, height, width)]
    for states, variables, stride in hidden:
        if stride < 1 or height % stride or width % stride:
            raise DataError(f"stride {stride} does not divide the image of {height}x{width}.")
        tiers.append(Tier("hidden", states, variables, height // stride, width // stride))
    spatial = len(tiers)
    tiers += [Tier("class", n_classes, 1)] if n_classes else []
    connections = []
    for t in range(spatial):
        kernels = [kernel if seen <= t else 0 for seen in range(len(tiers))]
        connections.append([tiers[t].channels, kernels])
    if n_classes:
        connections.append([n_classes, [0] * (spatial - 1) + [1, 1]])
    return [list(tier) for tier in tiers], connections
