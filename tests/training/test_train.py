"""The training loop: what it computes, what it reports, and what it leaves behind when it ends badly."""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paperback.errors import DataError, PaperbackError
from paperback.training import History, generator, seeded, train

Batch = tuple[Tensor, ...]


def data(rows: int = 50, noise: float = 0.1, seed: int = 0) -> tuple[Tensor, Tensor]:
    draws = generator(seed, "data")
    x = torch.randn(rows, 4, generator=draws)
    target = x @ torch.tensor([[1.0], [-2.0], [0.5], [3.0]]) + 1.0
    return x, target + noise * torch.randn(rows, 1, generator=draws)


def squared(model: nn.Module, batch: Batch, draws: torch.Generator) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def linear(seed: int = 0) -> nn.Linear:
    with seeded(seed, "weights"):
        return nn.Linear(4, 1)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def fit(model: nn.Module, loss: Any = squared, tensors: Any = None, **changes: Any) -> History:
    settings: dict[str, Any] = {"epochs": 3, "batch_size": 16, "lr": 0.05, "progress": False} | changes
    return train(model, loss, data() if tensors is None else tensors, **settings)


# -- what is computed --------------------------------------------------------


def test_it_finds_the_solution_of_a_linear_regression() -> None:
    model = linear()
    history = fit(model, tensors=data(200, noise=0.0), epochs=60, schedule="cosine")
    assert torch.allclose(weights(model), torch.tensor([1.0, -2.0, 0.5, 3.0, 1.0]), atol=1e-3)
    assert history.train_loss[-1] < 1e-5 < history.train_loss[0]


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("adam", lambda p: torch.optim.Adam(p, lr=0.05, weight_decay=0.1)),
        ("adamw", lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1)),
        ("sgd", lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.1)),
    ],
)
def test_it_is_the_loop_one_would_write(name: Any, make: Callable[..., torch.optim.Optimizer]) -> None:
    x, y = data()
    ours, by_hand = linear(), linear()
    history = fit(ours, optimizer=name, weight_decay=0.1, clip_norm=0.5, drop_last=True)
    fit(by_factory := linear(), optimizer=make, clip_norm=0.5, drop_last=True)
    optimizer = make(by_hand.parameters())
    for epoch in range(3):
        order = torch.randperm(50, generator=generator(0, "order", epoch))
        losses = []
        for part in order[:48].split(16):
            optimizer.zero_grad()
            loss = squared(by_hand, (x[part], y[part]), torch.Generator())
            loss.backward()
            nn.utils.clip_grad_norm_(by_hand.parameters(), 0.5)
            optimizer.step()
            losses.append(loss.item())
        assert history.train_loss[epoch] == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert torch.allclose(weights(ours), weights(by_hand), atol=1e-6)
    assert torch.allclose(weights(by_factory), weights(by_hand), atol=1e-6)


def test_every_row_is_met_once_per_epoch_in_a_new_order() -> None:
    met: list[int] = []

    def loss(model: nn.Module, batch: Batch, draws: torch.Generator) -> Tensor:
        met.extend(batch[0].flatten().int().tolist())
        return model(batch[0]).mean()

    fit(nn.Linear(1, 1), loss, torch.arange(50.0)[:, None], epochs=2)
    assert sorted(met[:50]) == sorted(met[50:]) == list(range(50))
    assert met[:50] != met[50:]
    assert met[:50] != list(range(50))


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    whole, parts = linear(), linear()
    a = fit(whole, batch_size=24)
    b = fit(parts, batch_size=6, gradient_accumulation=4)
    assert torch.allclose(weights(whole), weights(parts), atol=1e-6)
    assert a.train_loss == pytest.approx(b.train_loss, rel=1e-5)


def test_same_seed_same_model_whatever_the_global_random_state() -> None:
    def loss(model: nn.Module, batch: Batch, draws: torch.Generator) -> Tensor:
        keep = torch.rand(batch[0].shape, generator=draws) < 0.7
        return squared(model, (batch[0] * keep, batch[1]), draws)

    def run(seed: int, state: int) -> tuple[Tensor, list[float]]:
        torch.manual_seed(state)
        with seeded(0, "weights"):
            model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        history = fit(model, loss, seed=seed, val_tensors=data(20, seed=1), keep_best=False)
        return weights(model), history.train_loss + history.val_metric

    first, second, other = run(3, 0), run(3, 1), run(4, 0)
    assert torch.equal(first[0], second[0])
    assert first[1] == second[1]
    assert not torch.equal(first[0], other[0])


def test_the_global_random_state_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    torch.manual_seed(9)
    expected = torch.rand(3)
    torch.manual_seed(9)
    fit(model)
    assert torch.equal(torch.rand(3), expected)


def test_other_methods_than_forward_and_frozen_or_unused_parameters() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused, self.frozen = nn.Linear(4, 1), nn.Linear(4, 1), nn.Linear(4, 1)
            self.frozen.requires_grad_(False)

        def energy(self, x: Tensor) -> Tensor:
            return self.used(x) + self.frozen(x)

    model = Model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    fit(model, lambda model, batch, draws: (model.energy(batch[0]) - batch[1]).square().mean())
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"used.weight", "used.bias"}


def test_a_loss_with_parameters_is_trained_too() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, model: nn.Module, batch: Batch, draws: torch.Generator) -> Tensor:
            return (self.scale * model(batch[0]) - batch[1]).square().mean()

    loss = Scaled()
    fit(linear(), loss)
    assert loss.scale.item() != 1.0


def test_bfloat16_autocast_trains_float32_weights() -> None:
    model = linear()
    seen = []

    def loss(model: nn.Module, batch: Batch, draws: torch.Generator) -> Tensor:
        out = model(batch[0])
        seen.append(out.dtype)
        return (out - batch[1]).square().mean()

    history = fit(model, loss, epochs=20, mixed_precision="bf16", val_tensors=data(20))
    assert set(seen) == {torch.bfloat16}
    assert model.weight.dtype == torch.float32
    assert history.train_loss[-1] < history.train_loss[0] / 2


def test_float64_stays_float64() -> None:
    model = linear().double()
    history = fit(model, tensors=tuple(t.double() for t in data()))
    assert model.weight.dtype == torch.float64
    assert history.train_loss[-1] < history.train_loss[0]


# -- what is reported --------------------------------------------------------


def test_the_history_has_one_entry_per_epoch_in_each_column() -> None:
    def loss(model: nn.Module, batch: Batch, draws: torch.Generator) -> dict[str, Any]:
        error = squared(model, batch, draws)
        return {"loss": error + 0.1, "error": error, "rows": float(len(batch[0]))}

    history = fit(linear(), loss, schedule="linear", warmup_fraction=0.2, val_tensors=data(20))
    assert len(history) == 3
    assert history.terms["error"] == pytest.approx([value - 0.1 for value in history.train_loss], rel=1e-4)
    assert history.terms["rows"] == pytest.approx([(3 * 16 * 16 + 2 * 2) / 50] * 3)
    assert history.lr == sorted(history.lr, reverse=True)
    assert [len(c) for c in (history.val_metric, history.seconds, history.samples_per_second)] == [3, 3, 3]
    assert min(history.seconds + history.samples_per_second) > 0


def test_the_metric_is_the_mean_over_the_validation_rows() -> None:
    x, y = data(37, seed=2)
    model = linear()
    history = fit(model, val_tensors=(x, y), keep_best=False)
    assert history.val_metric[-1] == pytest.approx(squared(model, (x, y), torch.Generator()).item(), rel=1e-5)


def test_validation_runs_in_evaluation_mode_without_gradients_on_the_same_draws() -> None:
    draws_seen = []

    def metric(model: nn.Module, batch: Batch, draws: torch.Generator) -> Tensor:
        assert not model.training
        assert not torch.is_grad_enabled()
        draws_seen.append(torch.rand(1, generator=draws).item())
        return squared(model, batch, draws)

    model = nn.Sequential(nn.Dropout(0.5), linear())
    fit(model, val_tensors=data(10), val_metric=metric)
    assert len(draws_seen) == 3
    assert len(set(draws_seen)) == 1
    assert not model.training


def scripted(values: list[float]) -> Callable[..., Tensor]:
    """A metric that says what stands in a list, one value per epoch."""
    rest = iter(values)
    return lambda model, batch, draws: torch.tensor(next(rest))


def remember(kept: list[Tensor]) -> Callable[..., None]:
    return lambda epoch, model, history: kept.append(weights(model))


@pytest.mark.parametrize(
    ("values", "settings", "best", "epochs", "stopped"),
    [
        ([3, 2, 1, 4, 5, 6, 7], {"patience": 2}, 3, 5, True),
        ([3, 2, 1, 4, 0, 6, 7], {"patience": 3}, 5, 7, False),
        ([3.0, 2.99, 2.98, 2.97, 2.96, 1, 1], {"patience": 3, "min_delta": 0.1}, 1, 4, True),
        ([3, 2, 1, 4, 5, 6, 7], {}, 3, 7, False),
        ([float("nan"), 2, 1, float("nan"), 5, 6, 7], {"patience": 5}, 3, 7, False),
    ],
)
def test_early_stopping_keeps_the_best_epoch(
    values: list[float], settings: dict[str, Any], best: int, epochs: int, stopped: bool
) -> None:
    kept: list[Tensor] = []
    model = linear()
    history = fit(
        model,
        epochs=7,
        val_tensors=data(10),
        val_metric=scripted(values),
        callbacks=[remember(kept)],
        **settings,
    )
    assert (len(history), history.best_epoch, history.stopped_early) == (epochs, best, stopped)
    assert torch.equal(weights(model), kept[best - 1])


def test_the_last_weights_on_request() -> None:
    kept: list[Tensor] = []
    model = linear()
    fit(
        model,
        val_tensors=data(9),
        val_metric=scripted([1, 2, 3]),
        keep_best=False,
        callbacks=[remember(kept)],
    )
    assert torch.equal(weights(model), kept[-1])


def test_what_a_callback_does_to_the_model_stays() -> None:
    def project(epoch: int, model: nn.Module, history: History) -> None:
        with torch.no_grad():
            model.weight.clamp_(-0.5, 0.5)

    model = linear()
    fit(model, callbacks=[project])
    assert model.weight.abs().max() <= 0.5


# -- what goes wrong ---------------------------------------------------------


@pytest.mark.parametrize(("at", "epoch", "step"), [(0, 1, 1), (2, 1, 3), (9, 3, 2)])
def test_a_loss_that_is_not_finite_names_its_place_and_leaves_the_last_good_epoch(
    at: int, epoch: int, step: int
) -> None:
    kept: list[Tensor] = []
    calls = iter(range(100))

    def loss(model: nn.Module, batch: Batch, draws: torch.Generator) -> Tensor:
        return squared(model, batch, draws) * (float("nan") if next(calls) == at else 1.0)

    model = linear()
    with pytest.raises(PaperbackError, match=rf"epoch {epoch}, step {step} of 4: the loss is nan") as error:
        fit(model, loss, epochs=5, callbacks=[remember(kept)])
    assert f"put back to the end of epoch {epoch - 1}" in str(error.value)
    assert torch.equal(weights(model), kept[-1] if kept else weights(linear()))
    assert not model.training


def test_the_step_is_right_in_a_long_epoch() -> None:
    calls = iter(range(1000))

    def loss(model: nn.Module, batch: Batch, draws: torch.Generator) -> Tensor:
        return squared(model, batch, draws) + (float("inf") if next(calls) == 380 else 0.0)

    with pytest.raises(PaperbackError, match="epoch 2, step 181 of 200: the loss is inf"):
        fit(linear(), loss, data(200), batch_size=1)


def test_a_weight_that_is_not_finite_is_noticed_although_the_loss_was() -> None:
    model = linear()
    model.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(PaperbackError, match="epoch 1, after its last step: a weight is not finite"):
        fit(model, epochs=1, batch_size=50)
    assert torch.equal(weights(model), weights(linear()))


@pytest.mark.parametrize("with_validation", [False, True])
def test_an_interrupt_keeps_the_best_or_the_last_epoch(with_validation: bool) -> None:
    kept: list[Tensor] = []
    calls = iter(range(100))

    def loss(model: nn.Module, batch: Batch, draws: torch.Generator) -> Tensor:
        if next(calls) == 14:
            raise KeyboardInterrupt
        return squared(model, batch, draws)

    model = linear()
    validation = {"val_tensors": data(9), "val_metric": scripted([1, 0, 3, 4])} if with_validation else {}
    with pytest.raises(KeyboardInterrupt):
        fit(model, loss, epochs=9, callbacks=[remember(kept)], **validation)
    assert len(kept) == 3
    assert torch.equal(weights(model), kept[1 if with_validation else 2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"clip_norm": -1.0}, "clip_norm is -1.0"),
        ({"min_delta": -0.1}, "min_delta is -0.1"),
        ({"weight_decay": float("nan")}, "weight_decay is nan"),
        ({"warmup_fraction": 1.0}, r"warmup_fraction is 1.0; it must lie in \[0, 1\)"),
        ({"schedule": "staircase"}, "schedule is 'staircase'"),
        ({"optimizer": "lion"}, "optimizer is 'lion'; it must be one of adam, adamw, sgd"),
        ({"mixed_precision": "fp8"}, "mixed_precision is 'fp8'"),
        ({"mixed_precision": "fp16"}, '"fp16" has no effect on the cpu; use "bf16"'),
        ({"patience": 3}, "patience needs val_tensors"),
        ({"val_metric": squared}, "val_metric needs val_tensors"),
        ({"batch_size": 64, "drop_last": True}, "drop_last leaves nothing of 50 rows"),
        ({"tensors": ()}, "tensors is empty"),
        ({"tensors": (torch.zeros(3, 4), torch.zeros(2, 1))}, r"tensors\[1\] has 2 rows, tensors\[0\] has 3"),
        ({"tensors": (torch.zeros(3, 4), [1, 2, 3])}, r"tensors\[1\] is list"),
        ({"tensors": torch.zeros(0, 4)}, "tensors has no rows"),
        ({"val_tensors": torch.zeros(0, 4)}, "val_tensors has no rows"),
        ({"loss": lambda m, b, g: m(b[0])}, r"the loss is shape \(16, 1\)"),
        ({"loss": lambda m, b, g: {"error": m(b[0]).mean()}}, 'the loss is NoneType; .* under "loss"'),
        ({"val_tensors": data(9), "val_metric": lambda m, b, g: 0.5}, "the validation metric is float"),
        ({"loss": lambda m, b, g: b[0].mean()}, "does not depend on any parameter"),
    ],
)
def test_arguments_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    model = linear()
    with pytest.raises(DataError, match=message):
        fit(model, **changes)


def test_models_that_cannot_be_trained() -> None:
    with pytest.raises(DataError, match="Linear has no parameter that requires a gradient"):
        fit(linear().requires_grad_(False))
    with pytest.raises(DataError, match=r"the model is a int; it must be a torch.nn.Module"):
        fit(3)  # type: ignore[arg-type]


def test_terms_that_come_and_go() -> None:
    calls = iter(range(100))

    def loss(model: nn.Module, batch: Batch, draws: torch.Generator) -> dict[str, Tensor]:
        value = squared(model, batch, draws)
        return {"loss": value, "odd" if next(calls) % 2 else "even": value}

    with pytest.raises(DataError, match="return the same terms always"):
        fit(linear(), loss)


# -- manners -----------------------------------------------------------------


def test_accelerates_global_state_does_not_leak() -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    fit(linear(), mixed_precision="bf16")
    states = (PartialState, AcceleratorState, GradientState)
    assert [dict(state._shared_state) for state in states] == [{}, {}, {}]
    fit(linear(), mixed_precision="no")
    users = Accelerator(cpu=True, mixed_precision="no", gradient_accumulation_steps=3)
    try:
        fit(linear(), mixed_precision="bf16")
        assert (users.mixed_precision, users.gradient_accumulation_steps) == ("no", 3)
        with pytest.raises(DataError, match="does not depend"):
            fit(linear(), lambda m, b, g: b[0].mean())
        assert users.num_processes == 1
    finally:
        GradientState._reset_state()
        AcceleratorState._reset_state(reset_partial_state=True)


def test_importing_the_training_imports_neither_accelerate_nor_its_friends() -> None:
    program = "import sys, paperback.training; print('accelerate' in sys.modules)"
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=os.environ, check=True
    )
    assert answer.stdout.strip() == "False"


def test_nothing_is_printed_where_the_output_is_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    fit(linear(), progress=True)
    assert capfd.readouterr() == ("", "")


def test_the_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    from rich.console import Console

    from paperback.training import progress

    screen = Console(file=io.StringIO(), force_terminal=True, width=120)
    monkeypatch.setattr(progress, "console", lambda: screen)
    monkeypatch.setattr(progress, "PERIOD", 0.0)
    fit(linear(), epochs=4, progress=True, description="regression", val_tensors=data(9))
    text = screen.file.getvalue()
    assert "regression" in text
    assert "epoch 4/4 · loss" in text
    assert "rows/s" in text
    fit(linear(), progress=False)
    assert screen.file.getvalue() == text
