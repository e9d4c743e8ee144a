"""paperback: published deep-learning methods behind one interface per task.

Importing the package is cheap: no torch, no numpy. The methods live in the wings (`paperback.density`,
`paperback.compress`, ...); `paperback.catalogue` knows them all, and `paperback.load` reads back what any of
them has saved.
"""

from typing import TYPE_CHECKING, Any

from paperback.plugin import watch_transformers

if TYPE_CHECKING:
    from paperback.saving import load

__all__ = ["__version__", "load"]
__version__ = "0.1.0"

watch_transformers()  # compressed checkpoints open with transformers' from_pretrained


def __getattr__(name: str) -> Any:
    """Import `load`, and torch with it, at its first use."""
    if name == "load":
        from paperback.saving import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
