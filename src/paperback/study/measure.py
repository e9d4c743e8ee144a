"""What things cost, one definition of each number: parameters, bytes, operations, seconds, memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import psutil

from paperback.errors import DataError

if TYPE_CHECKING:
    from torch import nn


def parameters(module: nn.Module, *, trainable_only: bool = False) -> int:
    """Number of parameters of a module, shared ones counted once; buffers are not parameters.

    Args:
        module: any module.
        trainable_only: leave out those with ``requires_grad=False``.

    Returns:
        A count of scalars.
    """
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable_only)


def size_on_disk(path: str | Path) -> int:
    """Bytes of a file, or of all regular files below a folder.

    Their contents count, not the blocks they occupy; links are not followed.

    Raises:
        DataError: if there is nothing at the path.
    """
    path = Path(path)
    if path.is_file():
        return path.stat().st_size
    if not path.is_dir():
        raise DataError(f"{path} does not exist, so its size cannot be measured; save the model there first.")
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file() and not p.is_symlink())


def flops(function: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Floating-point operations of one call, a multiply-add being two.

    Counted is what torch's flop counter knows: matrix products, convolutions, attention. Elementwise work is
    not.

    Args:
        function: a module or function on tensors; it is called once, without gradients.
        *args: its arguments.
        **kwargs: its keyword arguments.

    Returns:
        A count of operations.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function(*args, **kwargs)
    return int(counter.get_total_flops())


class Stopwatch:
    """Wall-clock seconds of a block; work queued on a GPU is waited for at both ends.

    ``with Stopwatch() as watch: ...`` and then ``watch.seconds``. Inside the block `seconds` is the time so
    far.
    """

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._stop: float | None = None

    @property
    def seconds(self) -> float:
        """Seconds since the start, or of the whole block once it has ended."""
        return (self._stop if self._stop is not None else time.perf_counter()) - self._start

    def __enter__(self) -> Self:
        _synchronise()
        self._start, self._stop = time.perf_counter(), None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _synchronise()
        self._stop = time.perf_counter()


def _synchronise() -> None:
    torch = sys.modules.get("torch")  # without torch in the process nothing can be queued on a GPU
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def reset_peak_memory() -> bool:
    """Let `peak_memory` count from now on.

    Returns whether the system allows it (Linux does); otherwise it counts from the process's start.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_memory() -> int:
    """The most resident memory that this process has held, in bytes; its child processes are not counted.

    Counts since `reset_peak_memory` where that works, otherwise since the process began.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
