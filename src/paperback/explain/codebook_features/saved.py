"""A model with codebooks in a folder: weights as safetensors, everything else as JSON."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_model
from torch import nn

from paperback.errors import ArtefactError, PaperbackError
from paperback.explain.codebook_features.layer import CodebookLayer
from paperback.explain.codebook_features.sites import Site

if TYPE_CHECKING:
    from paperback.explain.codebook_features.model import CodebookModel

FORMAT = 1
WEIGHTS, FACTS, BASE = "model.safetensors", "codebooks.json", "config.json"


def save(model: CodebookModel, folder: Path, more: dict[str, Any] | None = None) -> None:
    """See `CodebookModel.save_pretrained`; `more` goes into the facts. Files are written beside it first."""
    if folder.exists() and not (folder / FACTS).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise ArtefactError(
            f"{folder} holds something that is not a model with codebooks; choose an empty or a new folder."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        save_model(model, str(temporary / WEIGHTS))
        layers = [model.codebook(name) for name in model.names]
        facts: dict[str, Any] = {
            "format": FORMAT,
            "sites": [
                asdict(site) | {"n_codes": layer.n_codes, "k": layer.k, "dim": layer.dim}
                for site, layer in zip(model.sites, layers, strict=True)
            ],
            "similarity": layers[0].similarity,
            "loss": layers[0].loss,
            "beta": layers[0].beta,
            "sha256": _digest(temporary / WEIGHTS),
        } | (more or {})
        config: Any = getattr(model.model, "config", None)
        if hasattr(config, "save_pretrained"):
            config.save_pretrained(temporary)
            facts["class"] = type(model.model).__name__
        (temporary / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        for path in temporary.iterdir():
            path.chmod(0o644)
        temporary.chmod(0o755)
        if folder.exists():  # the facts come last, so that a mixture is noticed by its hash
            for path in sorted(temporary.iterdir(), key=lambda p: p.name == FACTS):
                os.replace(path, folder / path.name)
        else:
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load(folder: Path, model: nn.Module | None) -> CodebookModel:
    """See `CodebookModel.from_pretrained`."""
    from paperback.explain.codebook_features.model import CodebookModel, key

    facts = read_facts(folder)
    weights = folder / WEIGHTS
    if not weights.is_file() or _digest(weights) != facts["sha256"]:
        raise ArtefactError(f"{weights} is missing or damaged: its SHA-256 is not the one in {FACTS}.")
    base = _fresh(folder, facts) if model is None else model
    try:
        sites = [Site(**site) for site in facts["sites"]]
        layers = nn.ModuleDict(
            {
                key(site.name): CodebookLayer(
                    site.dim or 0, site.n_codes or 0, site.k or 0, facts["similarity"], facts["loss"],
                    facts["beta"], site.groups,
                )
                for site in sites
            }
        )  # fmt: skip
        wrapped = CodebookModel(base, sites, layers)
        kinds = {name: tensor.dtype for name, tensor in load_file(weights).items()}
        for name, parameter in wrapped.named_parameters():
            parameter.data = parameter.data.to(kinds.get(name, parameter.dtype))
        load_model(wrapped, str(weights))
    except (AttributeError, KeyError, TypeError, RuntimeError, SafetensorError, PaperbackError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ArtefactError(f"{folder} does not fit a {type(base).__name__}: {reason}") from error
    return wrapped.eval()


def read_facts(folder: Path) -> dict[str, Any]:
    """What codebooks.json says.

    Raises:
        ArtefactError: if it cannot be read, or is of another format.
    """
    path = folder / FACTS
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtefactError(
            f"{path} cannot be read ({error}); give a folder that save_pretrained wrote."
        ) from error
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise ArtefactError(
            f"{path} has another format than {FORMAT}; save the model again with this version."
        )
    return facts


def _fresh(folder: Path, facts: dict[str, Any]) -> nn.Module:
    """An untrained `transformers` model of the saved config."""
    if not (folder / BASE).is_file():
        raise ArtefactError(
            f"{folder} holds weights only; give from_pretrained the model that they belong to."
        )
    import transformers

    cls: Any = getattr(transformers, str(facts.get("class")), None)
    known = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
    if not known:
        raise ArtefactError(
            f"{folder} asks for the class {facts.get('class')!r}, which transformers "
            f"{transformers.__version__} does not have; give from_pretrained the model."
        )
    return cls(cls.config_class.from_pretrained(folder))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
