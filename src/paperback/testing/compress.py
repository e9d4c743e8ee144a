"""The behaviour checks of the compress task.

Each check is a function of a `CompressCase`: how the method is built, a model and data. A check raises
`AssertionError` with a sentence that says what was expected and what was found.
"""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from paperback.compress import Budget, Compressed, Compressor, Data, Report
from paperback.compress.data import run
from paperback.errors import BudgetError, DataError, PaperbackError
from paperback.study.measure import size_on_disk

Build = Callable[[], Compressor]


@dataclass
class CompressCase:
    """A method to be checked.

    Args:
        build: makes the method; the same each time.
        model: makes a trained or untrained network that it handles; the same each time.
        data: with a training part, and a validation part where the method needs one.
        budget: passed to compress; None for the method's own settings.
        tolerance: of the outputs of a saved and loaded model.
        half: whether a model in bfloat16 is taken; methods that refuse it do so with a DataError.
    """

    build: Build
    model: Callable[[], nn.Module]
    data: Data
    budget: Budget | None = None
    tolerance: float = 1e-6
    half: bool = True

    def compress(self, model: nn.Module | None = None, **settings: Any) -> Compressed:
        """One compression, silent and without timing."""
        model = self.model() if model is None else model
        settings = {"latency_runs": 0, "progress": False} | settings
        return self.build().compress(model, self.data, self.budget, **settings)

    def answer(self, model: nn.Module) -> Tensor:
        """The model's output on the first batch."""
        batch = next(self.data.batches("train"))
        model.eval()
        with torch.no_grad():
            return run(model, batch).float()


def check_compressor(
    build: Build,
    model: Callable[[], nn.Module],
    data: Data,
    budget: Budget | None = None,
    *,
    tolerance: float = 1e-6,
    half: bool = True,
) -> None:
    """Run every check of the compress task.

    Args:
        build: makes the method.
        model: makes a network that it handles.
        data: with the parts that the method needs.
        budget: passed to compress.
        tolerance: see `CompressCase`.
        half: see `CompressCase`.

    Raises:
        AssertionError: naming the check, what was expected and what was found.
    """
    case = CompressCase(build, model, data, budget, tolerance, half)
    for check in COMPRESS_CHECKS:
        try:
            check(case)
        except AssertionError as error:
            raise AssertionError(f"{check.__name__}: {error}") from error


# -- the checks ----------------------------------------------------------------------------------------------


def model_is_left_alone(case: CompressCase) -> None:
    """The given model keeps its weights, its modes, its gradients' flags, and has no hook left."""
    model = case.model().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    case.compress(model)
    assert all(m.training for m in model.modules()), "the model's training mode was changed."
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} of the given model was changed."
    assert flags == {n: p.requires_grad for n, p in model.named_parameters()}, "requires_grad was changed."
    hooked = [n for n, m in model.named_modules() if m._forward_pre_hooks or m._forward_hooks]
    assert not hooked, f"hooks were left on {hooked}."


def same_seed_same_result(case: CompressCase) -> None:
    """Two calls give the same network, whatever torch's global random state."""
    torch.manual_seed(1)
    first = case.compress()
    torch.manual_seed(2)
    second = case.compress()
    same = torch.equal(case.answer(first.model), case.answer(second.model))
    assert same, "two calls with the same seed give different networks."


def report_is_true(case: CompressCase) -> None:
    """Bytes are those of the files, non-zeros those of the weights, and nothing is drawn or fetched."""
    with _offline():
        result = case.compress()
    report = result.report
    assert report.layers, "the report names no layer."
    assert Report.from_json(report.to_json()) == report, "the report does not survive JSON."
    with tempfile.TemporaryDirectory() as folder:
        result.save(Path(folder) / "model")
        files = (Path(folder) / "model").rglob("*.safetensors")
        weights = sum(size_on_disk(file) for file in files)
    assert weights <= report.after.bytes_on_disk <= weights + 200_000, (
        f"the report says {report.after.bytes_on_disk:,} bytes, the saved weights have {weights:,}."
    )
    assert not result.model.training, "the compressed model is in training mode."
    assert bool(case.answer(result.model).isfinite().all()), "the compressed model's output is not finite."


def saved_is_loaded(case: CompressCase) -> None:
    """A saved model answers like the one in memory."""
    result = case.compress()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        result.save(path)
        loaded = Compressed.load(path, case.model())
    ours, theirs = case.answer(result.model), case.answer(loaded.model)
    error = float((ours - theirs).abs().max())
    assert error <= case.tolerance, f"saved and loaded, the outputs differ by {error:.3g}."


def unusable_models_are_refused(case: CompressCase) -> None:
    """NaN weights, the meta device and a model without layers each get a sentence of their own."""
    model = case.model()
    name, parameter = next((n, p) for n, p in model.named_parameters() if p.ndim > 1)
    with torch.no_grad():
        parameter.view(-1)[0] = float("nan")
    message = _refused(lambda: case.compress(model), DataError)
    assert name in message, f"the message about NaN does not name {name}: {message}"
    message = _refused(lambda: case.compress(case.model().to("meta")), DataError)
    assert "meta" in message, f"the message about the meta device does not name it: {message}"
    _refused(lambda: case.compress(nn.Sequential(nn.ReLU())), DataError)


def foreign_budgets_are_refused(case: CompressCase) -> None:
    """One byte cannot be met, or is a unit that the method does not have."""
    _refused(
        lambda: case.build().compress(
            case.model(), case.data, Budget(bytes=1), latency_runs=0, progress=False
        ),
        BudgetError,
    )


def half_precision_is_kept(case: CompressCase) -> None:
    """A model in bfloat16 is compressed in bfloat16, or refused with a sentence."""
    if not case.half:
        _refused(lambda: case.compress(case.model().bfloat16()), PaperbackError)
        return
    result = case.compress(case.model().bfloat16())
    wide = [n for n, p in result.model.named_parameters() if p.dtype in (torch.float32, torch.float64)]
    assert not wide, f"{wide[:3]} of a model in bfloat16 are wider now."
    assert bool(case.answer(result.model).isfinite().all()), "the output is not finite in bfloat16."


def compressed_again(case: CompressCase) -> None:
    """A model that is compressed already is compressed further or refused with a sentence."""
    first = case.compress()
    try:
        second = case.compress(first.model)
    except PaperbackError:
        return
    assert bool(case.answer(second.model).isfinite().all()), "compressed twice, the output is not finite."


def _refused(call: Callable[[], object], kind: type[PaperbackError]) -> str:
    try:
        call()
    except kind as error:
        return str(error)
    except Exception as error:
        raise AssertionError(f"{type(error).__name__} ({error}) in place of {kind.__name__}.") from error
    raise AssertionError(f"no {kind.__name__} was raised.")


@contextmanager
def _offline() -> Iterator[None]:
    """Inside this context opening a connection raises."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a network connection was asked for.")

    with mock.patch.object(socket.socket, "connect", refuse):
        yield


COMPRESS_CHECKS: tuple[Callable[[CompressCase], None], ...] = (
    model_is_left_alone,
    same_seed_same_result,
    report_is_true,
    saved_is_loaded,
    unusable_models_are_refused,
    foreign_budgets_are_refused,
    half_precision_is_kept,
    compressed_again,
)
