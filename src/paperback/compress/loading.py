"""The user's model and data, as the command line names them.

A model is one that ships (``lm-tiny``), a `transformers` checkpoint folder, a folder that paperback saved, or
``module:function``, a function without arguments that gives the module, or the module and its tokenizer. Data
are a text for language models, images with labels (an ``.npz`` or a folder of folders) for classifiers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paperback.compare.users_code import users_function
from paperback.compress.data import Data, text_rows
from paperback.data import images, text
from paperback.errors import DataError, MissingExtraError
from paperback.networks.shipped import NAMES, pretrained, pretrained_tokenizer
from paperback.training import generator

SMOLLM2 = "smollm2-135m"
SHIPPED = (*NAMES, SMOLLM2)
PURPOSE = "called without arguments, gives the model, or the model and its tokenizer"
LENGTH = 256  # tokens of a row
CHARACTERS, PIECE = 6, 4000  # of a token, generously; and of a piece of text that is drawn
SHARES = (0.8, 0.9)  # where a user's text is cut into training, validation and test part


@dataclass(frozen=True, eq=False)
class Subject:
    """What is compressed.

    Attributes:
        model: in evaluation mode.
        tokenizer: of a language model; None for others.
        name: for tables.
    """

    model: nn.Module
    tokenizer: Any
    name: str


def load_subject(address: str | Path) -> Subject:
    """A model by its address.

    Args:
        address: the name of one that ships, a folder, or "module:function".

    Returns:
        The model, with its tokenizer where it has one.

    Raises:
        DataError: if there is none; the message says what an address can be.
        MissingExtraError: if it is a checkpoint of transformers, which is not installed.
    """
    name = str(address)
    if name in SHIPPED:
        is_language = name.startswith(("lm-", SMOLLM2))
        return Subject(pretrained(name), pretrained_tokenizer(name) if is_language else None, name)
    path = Path(name).expanduser()
    if path.is_dir():
        return _load_folder(path)
    given = users_function(name, PURPOSE)()
    model, tokenizer = given if isinstance(given, tuple) and len(given) == 2 else (given, None)
    if not isinstance(model, nn.Module):
        raise DataError(f"{name} gave a {type(model).__name__}; it must give a torch.nn.Module.")
    return Subject(model.eval(), tokenizer, name)


def _load_folder(path: Path) -> Subject:
    """A checkpoint of transformers with its tokenizer, or a model that paperback saved."""
    import paperback

    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} has no readable config.json, so it is no saved model ({error}).") from error
    if "paperback" in config:
        loaded = paperback.load(path)
        if not isinstance(loaded, nn.Module):
            raise DataError(f"{path} holds a {type(loaded).__name__}, which is no torch.nn.Module.")
        return Subject(loaded.eval(), None, path.name)
    if not list(path.glob("*.safetensors")):
        raise DataError(f"{path} has no weights as safetensors; save the checkpoint in that format.")
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError(
            f"{path} is a checkpoint of transformers; install it with: pip install 'paperback[llm]'"
        ) from error
    kind = getattr(transformers, (config.get("architectures") or ["AutoModel"])[0], transformers.AutoModel)
    model = kind.from_pretrained(path, local_files_only=True, use_safetensors=True, dtype=torch.float32)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError):
        tokenizer = None
    return Subject(model.eval(), tokenizer, path.name)


def load_data(
    subject: Subject,
    path: str | Path | None,
    *,
    rows: tuple[int, int, int] = (64, 32, 64),
    batch_size: int = 8,
    seed: int = 0,
) -> Data:
    """Data that suit a model.

    Args:
        subject: the model.
        path: a text file, an ``.npz`` or a folder of images; the texts or images that ship if None.
        rows: how many rows of 256 tokens, or images times 16, to train, validate and test on; at most.
        batch_size: of language models; images come in batches of 64.
        seed: of the choice of rows.

    Returns:
        Training, validation and test part.

    Raises:
        DataError: if the data are not there, too few, or do not suit the model.
    """
    if subject.tokenizer is None:
        return _image_data(subject, path, rows, seed)
    parts = _texts(path)
    length = int(min(LENGTH, getattr(subject.model.config, "max_position_embeddings", LENGTH)))
    made = []
    for part, wanted in zip(parts, rows, strict=True):
        found = text_rows(subject.tokenizer, _excerpt(part, 2 * CHARACTERS * wanted * length, seed), length)
        chosen = torch.randperm(len(found), generator=generator(seed, "rows"))[:wanted]
        made.append(found[chosen.sort().values])
    return Data(made[0], made[1], made[2], batch_size=batch_size)


def _texts(path: str | Path | None) -> tuple[str, str, str]:
    """Training, validation and test text: of the books and definitions that ship, or of the user's file."""
    if path is None:
        books = [text.austen(), text.kjv()]
        joined = ["\n".join(getattr(book, part).x for book in books) for part in ("train", "val", "test")]
        return joined[0], joined[1], joined[2]
    try:
        whole = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a text in UTF-8 ({error}).") from error
    first, second = (int(share * len(whole)) for share in SHARES)
    return whole[:first], whole[first:second], whole[second:]


def _excerpt(whole: str, characters: int, seed: int) -> str:
    """Pieces of a text from all over it, in order, so that no more is turned into tokens than is needed."""
    count = -(-len(whole) // PIECE)
    wanted = -(-characters // PIECE)
    if wanted >= count:
        return whole
    chosen = torch.randperm(count, generator=generator(seed, "pieces"))[:wanted].sort().values
    return "".join(whole[PIECE * i : PIECE * (i + 1)] for i in chosen.tolist())


def _image_data(subject: Subject, path: str | Path | None, rows: tuple[int, int, int], seed: int) -> Data:
    given = Path(path).expanduser() if path is not None else None
    if given is not None and given.suffix.lower() in (".txt", ".md"):
        raise DataError(
            f"{given} is a text, and {subject.name} has no tokenizer; give images, or a function that gives "
            "the model and its tokenizer."
        )
    dataset = images.fashion_mnist() if given is None else images.read(given, seed=seed, labels="required")
    parts: list[tuple[Tensor, Tensor]] = []
    for name, wanted in zip(("train", "val", "test"), rows, strict=True):
        x, y = getattr(dataset, name)
        x, y = x[: 16 * wanted], torch.as_tensor(y)[: 16 * wanted]
        parts.append(((x if x.ndim == 4 else x[:, None]).float() / 255, y))
    return Data(parts[0], parts[1], parts[2], batch_size=64)
