"""Distillation and quantization: rounding and its gradients, points, sizes, limits, bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.compress.models import cnn, llama, picture_data, token_data
from torch import nn

from paperback.compress import Budget, Compressed
from paperback.compress.distill_quantize import (
    CodebookWeight,
    DifferentiableQuantization,
    QuantizedDistillation,
    RoundedWeight,
    deal_points,
)
from paperback.compress.storage import stored_layers
from paperback.errors import BudgetError, DataError
from paperback.testing.compress import check_compressor
from paperback.training import generator

QUIET = {"latency_runs": 0, "progress": False}


def weight(rows: int = 5, columns: int = 7) -> torch.Tensor:
    return torch.randn(rows, columns, generator=generator(0), dtype=torch.float64)


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_rounding_keeps_the_ends_and_stays_near(bits: int) -> None:
    w = weight()
    for gradient in ("ste", "exact"):
        q = RoundedWeight(bits, 8, gradient)(w)
        assert q.shape == w.shape  # 35 entries, the last bucket has 3
        for ours, theirs in zip(q.flatten().split(8), w.flatten().split(8), strict=True):
            alpha = theirs.max() - theirs.min()
            torch.testing.assert_close(ours.max(), theirs.max())
            torch.testing.assert_close(ours.min(), theirs.min())
            assert bool(((ours - theirs).abs() <= alpha / (2 * (2**bits - 1)) + 1e-6).all())
            assert len(ours.mul(1e9).round().unique()) <= 2**bits
        torch.testing.assert_close(RoundedWeight(bits, 8, gradient)(q), q, atol=1e-6, rtol=0)
    constant = torch.full((4, 4), 0.3, dtype=torch.float64)
    torch.testing.assert_close(RoundedWeight(bits, 8)(constant), constant, atol=1e-7, rtol=0)


@pytest.mark.parametrize("gradient", ["ste", "exact"])
def test_stochastic_rounding_is_unbiased(gradient: str) -> None:
    w = weight(2, 4)
    rounded = RoundedWeight(2, None, gradient, "stochastic", generator(1))
    draws = torch.stack([rounded(w) for _ in range(4000)])
    error = draws.std(0) / 4000**0.5
    assert bool(((draws.mean(0) - w).abs() <= 4.5 * error + 1e-6).all())


def test_exact_gradient_is_the_formula() -> None:
    w, g = weight().requires_grad_(), torch.randn(5, 7, generator=generator(2), dtype=torch.float64)
    RoundedWeight(2, 8, "exact")(w).backward(g)
    expected = g.flatten().clone()
    flat = w.detach().flatten()
    for start in range(0, 35, 8):
        v, grad = flat[start : start + 8], g.flatten()[start : start + 8]
        alpha, beta = v.max() - v.min(), v.min()
        scaled = (v - beta) / alpha
        ends = (grad * ((scaled * 3).round() / 3 - scaled)).sum()
        expected[start + int(v.argmax())] += ends
        expected[start + int(v.argmin())] -= ends
    torch.testing.assert_close(w.grad, expected.view(5, 7))


def test_straight_and_truncated_gradients() -> None:
    w, g = (3 * weight()).requires_grad_(), torch.ones(5, 7, dtype=torch.float64)
    RoundedWeight(2, 8, "ste")(w).backward(g)
    assert torch.equal(w.grad, g)
    w.grad = None
    RoundedWeight(2, 8, "truncated")(w).backward(g)
    assert torch.equal(w.grad, (w.abs() <= 1).double())


def test_points_have_the_gradient_of_finite_differences() -> None:
    w, x = weight(), torch.randn(6, 7, generator=generator(3), dtype=torch.float64)
    rounding = CodebookWeight(torch.tensor([0.0, 0.2, 0.55, 1.0], dtype=torch.float64), 8)

    def loss() -> torch.Tensor:
        return F.linear(x, rounding(w)).tanh().square().sum()

    loss().backward()
    for j in range(4):
        values = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                rounding.points[j] += step
                values.append(float(loss()))
                rounding.points[j] -= step
        assert float(rounding.points.grad[j]) == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5)
    torch.testing.assert_close(rounding.quantized(w).dequantize(), rounding(w).detach(), atol=1e-6, rtol=0)


def test_points_are_dealt_out_exactly() -> None:
    norms = {"a": 5.0, "b": 1.0, "c": 0.1, "d": 0.0}
    for mean in (2, 4, 8, 256):
        counts = deal_points(norms, mean)
        assert sum(counts.values()) == 4 * mean
        assert min(counts.values()) >= 2
        assert max(counts.values()) <= 256
    assert deal_points(norms, 16)["a"] > deal_points(norms, 16)["c"]
    assert set(deal_points(dict.fromkeys("abc", 0.0), 4).values()) == {4}


def test_many_levels_are_full_precision_and_few_are_not() -> None:
    many = QuantizedDistillation(bits=8, epochs=1, bucket=16, lr=1e-3)
    many.bits = 16  # more than can be packed
    whole = QuantizedDistillation(bits=None, epochs=1, lr=1e-3).compress(cnn(), picture_data(), **QUIET)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("paperback.compress.distill_quantize.distillation.store", lambda *_: None)
        fine = many.compress(cnn(), picture_data(), **QUIET)
    expected = dict(whole.model.named_parameters())
    for name, ours in fine.model.named_parameters():
        if name != "0.bias":  # the norm after it takes it out; its gradient is rounding, which Adam scales up
            torch.testing.assert_close(ours, expected[name], atol=1e-3, rtol=0)
    coarse = QuantizedDistillation(bits=2, epochs=1, lr=1e-3).compress(cnn(), picture_data(), **QUIET)
    assert set(stored_layers(coarse.model)) == {"0", "3", "6"}
    assert stored_layers(coarse.model)["6"].dense().unique().numel() <= 4 * 6


def test_without_the_teachers_weight_the_teacher_does_not_matter() -> None:
    results = []
    for teacher in (None, nn.Sequential(nn.Flatten(), nn.Linear(144, 10))):
        method = QuantizedDistillation(bits=3, weight=0.0, epochs=1)
        results.append(method.compress(cnn(), picture_data(), teacher=teacher, **QUIET))
    states = [result.model.state_dict() for result in results]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_student_is_returned_and_a_teacher_with_other_classes_refused() -> None:
    student = nn.Sequential(nn.Flatten(), nn.Linear(144, 10))
    method = QuantizedDistillation(student, bits=3, epochs=1)
    result = method.compress(cnn(), picture_data(), **QUIET)
    assert list(stored_layers(result.model)) == ["1"]
    made = QuantizedDistillation(lambda: nn.Sequential(nn.Flatten(), nn.Linear(144, 7)), epochs=1)
    with pytest.raises(DataError, match="7 classes, the teacher 10"):
        made.compress(cnn(), picture_data(), **QUIET)


def test_points_are_sorted_and_weights_stay_unless_they_alternate() -> None:
    plain = DifferentiableQuantization(3, epochs=2, lr=0.05).compress(cnn(), picture_data(), **QUIET)
    for name, points in plain.extras["points"].items():
        assert bool((points.diff() >= 0).all())
        assert not torch.equal(points, plain.extras["first_points"][name])
    other = DifferentiableQuantization(3, epochs=1, alternate=True).compress(cnn(), picture_data(), **QUIET)
    assert torch.equal(plain.model[3].bias, cnn()[3].bias)
    assert not torch.equal(other.model[3].bias, cnn()[3].bias)
    assert not torch.equal(plain.model[1].running_mean, cnn()[1].running_mean)


def test_equal_weights_merge_points() -> None:
    model = cnn()
    with torch.no_grad():
        model[6].weight.copy_(model[6].weight.sign())
    result = DifferentiableQuantization(4, allocate=False, epochs=0).compress(model, picture_data(), **QUIET)
    assert len(result.extras["points"]["6"]) == 2
    assert any("merged" in note for note in result.report.notes)


@pytest.mark.parametrize("method", [QuantizedDistillation, DifferentiableQuantization])
def test_budgets(method: type) -> None:
    result = method(epochs=0).compress(cnn(), picture_data(), Budget(bits=3), **QUIET)
    assert result.extras["bits"] == 3
    assert result.extras["huffman_bits"] <= 3
    size = result.report.after.bytes_on_disk
    again = method(epochs=0).compress(cnn(), picture_data(), Budget(bytes=size + 500), **QUIET)
    assert again.report.after.bytes_on_disk <= size + 500
    with pytest.raises(BudgetError, match="bits or bytes or ratio"):
        method().compress(cnn(), picture_data(), Budget(density=0.5), **QUIET)
    with pytest.raises(BudgetError, match="1 to 8"):
        method().compress(cnn(), picture_data(), Budget(bits=9), **QUIET)


@pytest.mark.parametrize("method", [QuantizedDistillation, DifferentiableQuantization])
@pytest.mark.parametrize(
    "bad",
    [
        {"bits": 0}, {"bits": 9}, {"bits": 2.5}, {"bucket": 0}, {"bucket": 1.5}, {"temperature": 0.0},
        {"weight": 1.5}, {"epochs": -1}, {"lr": 0.0}, {"batch_size": 0}, {"reduction": "none"},
    ],
)  # fmt: skip
def test_bad_settings_are_named(method: type, bad: dict[str, object]) -> None:
    with pytest.raises(DataError, match=next(iter(bad))):
        method(**bad)


@pytest.mark.parametrize(
    "build",
    [
        lambda: QuantizedDistillation(bits=3, epochs=1, bucket=32),
        lambda: DifferentiableQuantization(bits=3, epochs=1, bucket=32),
    ],
)
def test_checks_of_the_wing(build: object) -> None:
    check_compressor(build, cnn, picture_data())


def test_language_models_are_handled() -> None:
    for method in (QuantizedDistillation(epochs=1), DifferentiableQuantization(epochs=1)):
        result = method.compress(llama(), token_data(), **QUIET)
        assert isinstance(result, Compressed)
        assert len(stored_layers(result.model)) == 14
