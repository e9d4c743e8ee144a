"""Makes transformers know paperback's compressed checkpoints, without importing it.

`watch_transformers` registers our quantizer right after `transformers.quantizers.auto` is imported, or at
once if it is imported already. `import paperback` stays free of torch and transformers.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

WATCHED = "transformers.quantizers.auto"
PLUGIN = "paperback.compress.storage.hugging_face"


def watch_transformers() -> None:
    """Register the quantizer now or when transformers' quantizers are imported; twice does nothing more."""
    if WATCHED in sys.modules:
        _register()
    elif not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


class _Watcher(MetaPathFinder):
    """Finds one module, by the other finders, and wraps its loader; then it is done."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != WATCHED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(Loader):
    """A loader that registers the quantizer after the module was executed."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _register()


def _register() -> None:
    """transformers must stay usable whatever goes wrong here, but not in silence."""
    try:
        importlib.import_module(PLUGIN)
    except Exception as error:
        warnings.warn(f"paperback's compressed checkpoints cannot be opened: {error}", stacklevel=2)
