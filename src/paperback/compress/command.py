"""`paperback compress`: one method on one model, by their names."""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from paperback.compress.budget import Budget
from paperback.compress.interface import Compressed, Compressor
from paperback.compress.loading import load_data, load_subject
from paperback.errors import DataError, PaperbackError
from paperback.study.encoding import write_atomically

METHODS = {
    "rtn": "paperback.compress.survey:RTN",
    "gptq": "paperback.compress.survey:GPTQ",
    "awq": "paperback.compress.survey:AWQ",
    "smoothquant": "paperback.compress.survey:SmoothQuant",
    "magnitude": "paperback.compress.pruning:Magnitude",
    "wanda": "paperback.compress.pruning:Wanda",
    "sparsegpt": "paperback.compress.pruning:SparseGPT",
    "svd": "paperback.compress.svd:SVD",
    "compactifai": "paperback.compress.compactifai:CompactifAI",
    "dsnot": "paperback.compress.dsnot:DSnoT",
    "maskllm": "paperback.compress.maskllm:MaskLLM",
    "lottery-jackpots": "paperback.compress.lottery_jackpots:LotteryJackpots",
}


def method_class(name: str) -> type[Compressor]:
    """The class of a method by its name.

    Raises:
        PaperbackError: naming close ones, if there is none.
    """
    if name not in METHODS:
        close = difflib.get_close_matches(name, METHODS, n=3, cutoff=0.5) or list(METHODS)
        raise PaperbackError(f"there is no compressor {name!r}; did you mean {', '.join(close)}?")
    module, _, attribute = METHODS[name].partition(":")
    return cast("type[Compressor]", getattr(importlib.import_module(module), attribute))


def settings_from(pairs: Sequence[str]) -> dict[str, Any]:
    """``["bits=3", "nm=[2,4]", "init=wanda"]`` as a dict; values are JSON, or else text.

    Raises:
        DataError: if an entry has no "=".
    """
    settings: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise DataError(f"--set {pair}: give name=value.")
        try:
            settings[name] = json.loads(value)
        except ValueError:
            settings[name] = value
    return settings


def build(name: str, settings: Mapping[str, Any]) -> Compressor:
    """A method with settings; lists become tuples.

    Raises:
        DataError: naming the settings there are, if one is unknown.
    """
    cls = method_class(name)
    known = list(inspect.signature(cls.__init__).parameters)[1:]
    unknown = [setting for setting in settings if setting not in known]
    if unknown:
        raise DataError(f"{name} has no setting {unknown[0]!r}; it has {', '.join(known)}.")
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    return cls(**given)


def compress_command(
    model: str,
    method: str,
    settings: Mapping[str, Any],
    out: Path,
    *,
    data: Path | None = None,
    budget: Budget | None = None,
    rows: int = 128,
    seed: int = 0,
    progress: bool = True,
) -> Compressed:
    """Compress a model and write it with its report.

    Args:
        model: as of `loading.load_subject`.
        method: a name of `METHODS`.
        settings: of the method.
        out: folder for the model; missing, empty, or with an earlier saved model.
        data: a text or images; what ships if None.
        budget: how small; the method's settings alone if None.
        rows: of calibration or training.
        seed: of rows and method.
        progress: show bars.

    Returns:
        The result, which lies in `out` with ``report.md``. While it runs, finished blocks lie in
        ``out`` + ".begun", from where an interrupted call goes on.

    Raises:
        PaperbackError: in one sentence.
    """
    compressor = build(method, {"seed": seed, **settings})
    subject = load_subject(model)
    batches = load_data(subject, data, rows=(rows, max(8, rows // 4), max(8, rows // 2)), seed=seed)
    begun = out.with_name(f".{out.name}.begun")
    result = compressor.compress(subject.model, batches, budget, folder=begun, progress=progress)
    result.save(out)
    if subject.tokenizer is not None:
        subject.tokenizer.save_pretrained(out)
    write_atomically(out / "report.md", result.report.to_markdown())
    return result
