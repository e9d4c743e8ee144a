"""Methods of one task side by side on the same data: quality against cost, with intervals, none able to take
down the others.

`compare` runs a task's bench and returns a `Leaderboard`. A wing describes its bench in the words of
`paperback.compare.bench`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paperback.compare.comparison import compare
    from paperback.compare.leaderboard import Leaderboard

__all__ = ["Leaderboard", "compare"]


def __getattr__(name: str) -> Any:
    """Import at first use: the process of a job needs neither, and should be small."""
    if name == "compare":
        from paperback.compare.comparison import compare

        return compare
    if name == "Leaderboard":
        from paperback.compare.leaderboard import Leaderboard

        return Leaderboard
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
