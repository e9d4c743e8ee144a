"""Small networks that ship with the package, trained by the recipes in the repository.

A network is a folder in ``networks/files``; its MANIFEST.json holds the SHA-256 of every file, and nothing is
read before they were found right. Nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paperback.errors import DataError, MissingExtraError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FOLDER = Path(__file__).parent / "files"
MANIFEST = "MANIFEST.json"
NAMES = {
    "lm-tiny": "a Llama of 1.4 million parameters for English (Austen, the King James Bible, WordNet)",
}


def pretrained(name: str) -> PreTrainedModel:
    """A network that ships, with its trained weights in float32 and in evaluation mode.

    Args:
        name: "lm-tiny", a causal language model of `transformers` (`LlamaForCausalLM`): 1.4 million
            parameters, 2,048 byte-pair tokens, contexts up to 512 tokens. `pretrained_tokenizer` has its
            tokenizer. A document begins with the token ``<|endoftext|>``; a definition of WordNet reads
            ``words: definition``.

    Returns:
        The network.

    Raises:
        DataError: if there is no such network, or its files are not as they shipped.
        MissingExtraError: if transformers is not installed.
    """
    folder = pretrained_folder(name)
    transformers = _transformers(name)
    import torch

    with _silent(transformers):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
        )
    return model.eval()


def pretrained_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a language model that ships. Arguments and errors are those of `pretrained`."""
    folder = pretrained_folder(name)
    return _transformers(name).AutoTokenizer.from_pretrained(folder, local_files_only=True)


def pretrained_folder(name: str) -> Path:
    """The folder of a network that ships, an ordinary checkpoint, once all its files were found whole.

    Args:
        name: as of `pretrained`.

    Raises:
        DataError: if there is no such network, or a file is missing or not as it shipped.
    """
    if name not in NAMES:
        raise DataError(f"there is no network {name!r}; those that ship are {', '.join(NAMES)}.")
    folder = FOLDER / name
    for file, entry in shipped_manifest(name)["files"].items():
        path = folder / file
        if not path.is_file():
            raise DataError(f"{path} is missing; it ships with paperback, so install paperback again.")
        with path.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        if digest != entry["sha256"]:
            raise DataError(f"{path} is not the file that shipped; install paperback again.")
    return folder


def shipped_manifest(name: str) -> dict[str, Any]:
    """What MANIFEST.json says of a network: its files, its recipe, and what was measured when it was made.

    Raises:
        DataError: if it is missing or not JSON.
    """
    path = FOLDER / name / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); install paperback again.") from error
    return manifest


@contextmanager
def _silent(transformers: Any) -> Iterator[None]:
    """Inside this context transformers draws no bars; a network that ships loads in milliseconds."""
    logging = transformers.utils.logging
    draws = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if draws:
            logging.enable_progress_bar()


def _transformers(name: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError(
            f"the network {name!r} needs transformers; install it with: pip install 'paperback[llm]'"
        ) from error
    return transformers
