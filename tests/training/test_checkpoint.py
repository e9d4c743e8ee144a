"""Checkpoints: what resumes, what is refused, and what is left on the disk."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paperback.errors import ArtefactError
from paperback.training import History, seeded, train

X = torch.linspace(-1, 1, 40).reshape(20, 2)
Y = X.sum(1, keepdim=True)


def squared(model: nn.Module, batch: tuple[Tensor, ...], draws: torch.Generator) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def fit(
    folder: Path | None, model: nn.Module | None = None, stop_after: int = 99, **changes: Any
) -> nn.Module:
    """Train a small model; `stop_after` interrupts it in the epoch after."""
    if model is None:
        with seeded(0, "weights"):
            model = nn.Linear(2, 1)

    def stop(epoch: int, model: nn.Module, history: History) -> None:
        if epoch > stop_after:
            raise KeyboardInterrupt

    settings: dict[str, Any] = {"tensors": (X, Y), "epochs": 6, "batch_size": 8, "lr": 0.1, "progress": False}
    settings |= {"checkpoint": folder, "callbacks": [stop]} | changes
    try:
        model.history = train(model, squared, **settings)
    except KeyboardInterrupt:
        assert stop_after < settings["epochs"]
    return model


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd", momentum])
@pytest.mark.parametrize("validation", [{}, {"val_tensors": (X[:7], Y[:7])}])
def test_a_resumed_training_ends_bit_for_bit_as_the_undisturbed(
    tmp_path: Path, optimizer: Any, validation: dict[str, Any]
) -> None:
    settings = {"optimizer": optimizer, "schedule": "cosine", **validation}
    calm = fit(None, **settings)
    fit(tmp_path / "run", stop_after=3, **settings)
    resumed = fit(tmp_path / "run", **settings)
    assert torch.equal(calm.weight, resumed.weight)
    assert calm.history.train_loss == resumed.history.train_loss
    assert calm.history.val_metric == resumed.history.val_metric
    assert calm.history.best_epoch == resumed.history.best_epoch


def test_a_finished_training_is_not_repeated(tmp_path: Path) -> None:
    first = fit(tmp_path / "run", val_tensors=(X, Y), patience=2)
    with seeded(7, "weights"):
        other = nn.Linear(2, 1)
    again = fit(
        tmp_path / "run", other, val_tensors=(X, Y), patience=2, callbacks=[lambda *_: pytest.fail("trained")]
    )
    assert torch.equal(first.weight, again.weight)
    assert first.history == again.history


def test_one_checkpoint_is_kept_as_safetensors_and_json_every_so_many_epochs(tmp_path: Path) -> None:
    written = []

    def look(epoch: int, model: nn.Module, history: History) -> None:
        written.append(sorted(p.name for p in tmp_path.glob("run/*")))

    fit(tmp_path / "run", checkpoint_every=2, callbacks=[look], epochs=5)
    assert written[0] == written[1] == []
    assert written[2] == written[3] == ["checkpoint.json", "epoch-000002.safetensors"]
    assert sorted(p.name for p in tmp_path.glob("run/*")) == ["checkpoint.json", "epoch-000005.safetensors"]


def test_a_kill_while_writing_leaves_the_older_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    fit(tmp_path / "run", stop_after=2)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", interrupt)
        fit(tmp_path / "run", stop_after=3)
    assert (tmp_path / "run" / "epoch-000003.safetensors").exists()
    resumed = fit(tmp_path / "run")
    assert torch.equal(resumed.weight, fit(None).weight)
    assert len(list((tmp_path / "run").iterdir())) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 4}, "batch_size is 8 there, 4 here"),
        ({"seed": 1}, "seed is 0 there, 1 here"),
        ({"optimizer": momentum}, "optimizer is adam there, momentum here"),
        ({"tensors": (X, -Y)}, "data is"),
        ({"tensors": (X.double(), Y)}, "data is"),
        ({"val_tensors": (X, Y)}, "data is"),
        ({"model": nn.Linear(2, 1, bias=False)}, "is of another model"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    fit(tmp_path / "run", stop_after=2)
    with pytest.raises(ArtefactError, match=message):
        fit(tmp_path / "run", **changes)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def rewrite(**changes: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


@pytest.mark.parametrize(
    ("name", "harm", "message"),
    [
        ("epoch-000002.safetensors", cut, "SHA-256"),
        ("epoch-000002.safetensors", flip, "SHA-256"),
        ("epoch-000002.safetensors", Path.unlink, "cannot be read"),
        ("checkpoint.json", cut, "is damaged"),
        ("checkpoint.json", rewrite(format=2), "not a checkpoint of format 1"),
        ("checkpoint.json", rewrite(file="../epoch-1.safetensors"), "names no file"),
        ("checkpoint.json", rewrite(file="/etc/passwd"), "names no file"),
        ("checkpoint.json", rewrite(facts=None), "not as they were written"),
        ("checkpoint.json", rewrite(facts={"finished": True}), "not as they were written"),
        ("checkpoint.json", lambda path: path.write_text("[]"), "not a checkpoint"),
    ],
)
def test_a_damaged_checkpoint_is_refused_with_the_remedy(
    tmp_path: Path, name: str, harm: Callable[[Path], Any], message: str
) -> None:
    fit(tmp_path / "run", stop_after=2)
    harm(tmp_path / "run" / name)
    with pytest.raises(ArtefactError, match=message) as error:
        fit(tmp_path / "run")
    assert f"remove the folder {tmp_path / 'run'}" in str(error.value)
