"""The tuned baselines: what they train, what they keep, and that they learn."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from tests.compress.models import bert, cnn, gpt2, llama, picture_data, sentence_data, tokens
from torch import nn

from paperback.compress import Budget, Compressed, Data
from paperback.compress.data import evaluate, run
from paperback.compress.survey import (
    RTN,
    Distil,
    DropBlocks,
    EarlyExit,
    FakeQuantTune,
    GroupedQueries,
    Healing,
    LoRALinear,
    QLoRA,
    attach_exits,
    merge_heads,
)
from paperback.compress.survey.blocks import block_influence, evenly_spaced, keep_blocks
from paperback.compress.survey.early_exit import confidence_of
from paperback.compress.survey.fake_quant_tune import FakeQuantized
from paperback.compress.survey.healing import training_rows
from paperback.errors import BudgetError, DataError, NotSupportedError
from paperback.testing import check_compressor
from paperback.testing.compress import COMPRESS_CHECKS, CompressCase

SMALL = Data(tokens(8, 16), tokens(4, 16, seed=1), batch_size=4)
SHORT = Healing(steps=2, batch_size=4)


def short(**settings):
    return Healing(steps=2, batch_size=4, **settings)


# -- learned steps ------------------------------------------------------------------------------


def test_gradients_of_a_learned_step():
    """LSQ's equation 3: round(w/s) - w/s inside the grid, its end outside; identity for the weight inside."""
    layer = nn.Linear(4, 1, bias=False)
    fake = FakeQuantized(layer, 2, None, "absmax")  # codes -1, 0, 1
    with torch.no_grad():
        fake.latent.copy_(torch.tensor([[0.3, -0.6, 5.0, -7.0]]))
        fake.step.fill_(1.0)
    upstream = torch.tensor([[1.0, 10.0, 100.0, 1000.0]])
    (fake.weight_rounded() * upstream).sum().backward()
    assert fake.weight_rounded().tolist() == [[0.0, -1.0, 1.0, -1.0]]
    assert fake.latent.grad.tolist() == [[1.0, 10.0, 0.0, 0.0]]
    wanted = (0 - 0.3) * 1 + (-1 + 0.6) * 10 + 1 * 100 - 1 * 1000
    assert float(fake.step.grad) == pytest.approx(wanted / (4 * 2) ** 0.5, rel=1e-5)


def test_what_is_packed_is_what_was_trained():
    layer = nn.Linear(20, 6)
    fake = FakeQuantized(layer, 3, 8, "affine")
    with torch.no_grad():
        fake.step.copy_(fake.step.half())
    assert torch.allclose(fake.quantized().dequantize(), fake.weight_rounded(), atol=1e-6)


def test_tuning_beats_rounding():
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    x = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))
    data = Data((x, torch.zeros(256, dtype=torch.long)))
    before = model(x).softmax(-1)
    errors = {}
    for method in (RTN(2, None), FakeQuantTune(2, None, healing=Healing(60, 32, 3e-3))):
        result = method.compress(model, data, latency_runs=0, progress=False)
        errors[type(method).__name__] = float((result.model(x).softmax(-1) - before).detach().square().mean())
    assert errors["FakeQuantTune"] < 0.5 * errors["RTN"]


# -- adapters ------------------------------------------------------------------------------


def test_adapters_begin_as_nothing_and_are_all_that_is_trained():
    layer = nn.Linear(24, 7)
    adapted = LoRALinear.from_dense(layer, 2, 4.0)
    x = torch.randn(3, 24)
    assert torch.equal(adapted(x), adapted.base(x))
    assert {n for n, p in adapted.named_parameters() if p.requires_grad} == {"down", "up"}
    with torch.no_grad():
        adapted.up.normal_()
    assert torch.allclose(adapted(x), x @ adapted.dense().T + layer.bias, atol=1e-5)
    copy = LoRALinear.empty(adapted.spec())
    copy.load_state_dict(adapted.state_dict())
    assert torch.equal(copy(x), adapted(x))


def test_qlora_lowers_the_loss_it_is_given():
    data = Data(tokens(8, 16), tokens(8, 16), batch_size=8)  # a text to learn by heart
    result = QLoRA(4, healing=Healing(30, 8, 1e-2, teacher_weight=0)).compress(
        llama(), data, latency_runs=0, progress=False
    )
    assert result.report.quality_after["loss"] < result.report.quality_before["loss"] - 0.02


# -- blocks, heads, exits ------------------------------------------------------------------------------


def test_blocks_evenly_spaced():
    assert evenly_spaced(6, 3) == [0, 2, 5]
    assert evenly_spaced(4, 4) == [0, 1, 2, 3]
    assert evenly_spaced(4, 1) == [0]


@pytest.mark.parametrize("make", [lambda: llama(4), gpt2, bert])
def test_fewer_blocks_stay_a_model(make, tmp_path):
    model = make()
    keep_blocks(model, [1])
    answer = run(model, tokens(2, 8))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.allclose(run(again.eval(), tokens(2, 8)), answer, atol=1e-6)


def test_a_block_that_does_nothing_has_no_influence():
    model = llama(3)
    block = model.model.layers[1]
    with torch.no_grad():
        block.self_attn.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()
    influence = block_influence(model, [tokens(2, 8)])
    assert influence[1] == pytest.approx(0, abs=1e-5)
    assert min(influence[0], influence[2]) > 1e-4
    result = DropBlocks(2).compress(model, tokens(2, 8), latency_runs=0, progress=False)
    assert result.extras["blocks"] == [0, 2]
    assert torch.allclose(run(result.model, tokens(2, 8)), run(model, tokens(2, 8)), atol=1e-5)


def test_merged_heads_are_means_and_equal_heads_lose_nothing():
    model = llama()
    attention = model.model.layers[0].self_attn
    for layer in (m.self_attn for m in model.model.layers):
        for projection in (layer.k_proj, layer.v_proj):
            with torch.no_grad():
                projection.weight[8:] = projection.weight[:8]
    before = run(model, tokens(2, 8))
    merge_heads(model, 1)
    assert attention.k_proj.weight.shape == (8, 32)
    assert model.config.num_key_value_heads == 1
    assert torch.allclose(run(model, tokens(2, 8)), before, atol=1e-6)
    other = llama()
    wanted = other.model.layers[0].self_attn.k_proj.weight.view(2, 8, 32).mean(0).clone()
    merge_heads(other, 1)
    assert torch.equal(other.model.layers[0].self_attn.k_proj.weight, wanted)


def test_exits_at_the_ends_of_the_threshold():
    model, data = llama(4), Data(None, tokens(8, 16), batch_size=4)
    all_stay = EarlyExit(1.0).compress(model, data, latency_runs=0, progress=False)
    assert all_stay.report.quality_after["agreement"] == 1.0
    hasty = EarlyExit(0.01).compress(model, data, latency_runs=0, progress=False)
    assert hasty.extras["depth"] < all_stay.extras["depth"] <= 4


def test_a_token_that_left_is_not_changed_any_more():
    model = llama(3)
    exits = attach_exits(
        model, {"after": [0], "threshold": 0.0, "confidence": "largest", "tail": ["model.norm", "lm_head"]}
    )
    answer = run(model, tokens(2, 8))
    short_model = llama(3)
    keep_blocks(short_model, [0])
    assert torch.allclose(answer, run(short_model, tokens(2, 8)), atol=1e-6)
    assert exits.depth == 1.0


def test_confidence():
    logits = torch.tensor([[0.0, 0.0], [50.0, 0.0]])
    assert confidence_of(logits, "largest").tolist() == pytest.approx([0.5, 1.0])
    assert confidence_of(logits, "lead").tolist() == pytest.approx([0.0, 1.0])


def test_saved_exits_come_back(tmp_path):
    model, data = llama(4), Data(None, tokens(8, 16), batch_size=4)
    result = EarlyExit(0.6).compress(model, data, latency_runs=0, progress=False)
    result.save(tmp_path / "model")
    again = type(model).from_pretrained(tmp_path / "model").eval()
    attach_exits(again)
    assert torch.allclose(run(again, tokens(4, 16)), run(result.model, tokens(4, 16)), atol=1e-6)


# -- distillation ------------------------------------------------------------------------------


@pytest.mark.parametrize("sight", ["white-box", "black-box"])
def test_students(sight):
    result = Distil(1, sight, healing=short(), prompt=2).compress(
        llama(), SMALL, latency_runs=0, progress=False
    )
    assert result.model.config.num_hidden_layers == 1
    assert result.report.after.parameters < result.report.before.parameters
    assert evaluate(result.model, SMALL.batches("val"))["perplexity"] < 100


def test_a_student_of_the_users_own_learns_from_labels_and_from_logits():
    teacher = cnn()
    student = nn.Sequential(OrderedDict(flat=nn.Flatten(), head=nn.Linear(144, 10)))
    for sight in ("white-box", "black-box"):
        result = Distil(student=student, sight=sight, healing=Healing(40, 8, 1e-2)).compress(
            teacher, picture_data(), latency_runs=0, progress=False
        )
        assert result.extras["losses"][-1] < 0.8 * result.extras["losses"][0]


# -- as compressors ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build",
    [lambda: FakeQuantTune(3, 16, healing=SHORT), lambda: QLoRA(2, healing=short(teacher_weight=0))],
    ids=["fake-quant", "qlora"],
)
def test_behaviour(build):
    check_compressor(build, llama, SMALL)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Distil(1, healing=SHORT), lambda: GroupedQueries(1, healing=SHORT), lambda: DropBlocks(1),
        lambda: EarlyExit(0.6),
    ],
    ids=["distil", "grouped-queries", "drop-blocks", "early-exit"],
)  # fmt: skip
def test_behaviour_of_methods_that_change_the_architecture(build, tmp_path):
    case = CompressCase(build, llama, SMALL)
    for check in COMPRESS_CHECKS:
        if check.__name__ != "saved_is_loaded":  # that check loads into a network of the old shapes
            check(case)
    result = case.compress()
    result.save(tmp_path / "model")
    loaded = Compressed.load(tmp_path / "model").model
    if "exits" in result.extras:
        attach_exits(loaded)
    assert torch.allclose(case.answer(loaded), case.answer(result.model), atol=1e-6)


def test_budgets_choose_blocks_heads_and_ranks():
    model = llama(4)
    size = {}
    for method, ratio in (
        (Distil(healing=SHORT), 0.93), (GroupedQueries(healing=SHORT), 0.97), (QLoRA(healing=SHORT), 0.7),
        (DropBlocks(), 0.93),
    ):  # fmt: skip
        result = method.compress(model, SMALL, Budget(ratio=ratio), latency_runs=0, progress=False)
        size[type(method).__name__] = result.report.ratio / ratio
        with pytest.raises(BudgetError, match="reaches"):
            method.compress(model, SMALL, Budget(ratio=0.001), latency_runs=0, progress=False)
    assert 0.5 < min(size.values()) <= max(size.values()) <= 1


def test_training_rows_of_all_kinds_of_data():
    rows, keys = training_rows(Data(tokens(10, 4)), 6, 0)
    assert rows[0].shape == (6, 4) and keys is None  # noqa: PT018
    loader = [{"input_ids": tokens(4, 4), "attention_mask": torch.ones(4, 4)} for _ in range(3)]
    rows, keys = training_rows(Data(loader), 6, 0)
    assert keys == ("input_ids", "attention_mask")
    assert [len(part) for part in rows] == [6, 6]
    ragged = [tokens(2, 4), tokens(2, 5)]
    with pytest.raises(DataError, match="one length"):
        training_rows(Data(ragged), 4, 0)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: Healing(steps=0), "steps"), (lambda: Healing(teacher_weight=2), "teacher_weight"),
        (lambda: Healing(lr=0), "lr"), (lambda: QLoRA(0), "rank"), (lambda: Distil(0), "blocks"),
        (lambda: Distil(sight="grey-box"), "sight"), (lambda: Distil(prompt=0), "prompt"),
        (lambda: GroupedQueries(0), "kv_heads"), (lambda: EarlyExit(0), "agreement"),
        (lambda: EarlyExit(confidence="much"), "confidence"), (lambda: DropBlocks(0), "blocks"),
    ],
)  # fmt: skip
def test_settings_out_of_range(make, word):
    with pytest.raises(DataError, match=word):
        make()


def test_models_that_do_not_fit():
    with pytest.raises(NotSupportedError, match="k_proj and v_proj"):
        GroupedQueries().compress(gpt2(), SMALL, latency_runs=0, progress=False)
    with pytest.raises(DataError, match="divide"):
        merge_heads(llama(), 3)
    with pytest.raises(NotSupportedError, match="no list of equal blocks"):
        DropBlocks().compress(cnn(), picture_data(), latency_runs=0, progress=False)
    with pytest.raises(NotSupportedError, match="DropBlocks"):
        EarlyExit().compress(bert(), sentence_data(), latency_runs=0, progress=False)
    with pytest.raises(DataError, match="exits of this model"):
        attach_exits(llama())
    with pytest.raises(DataError, match="exits stand after"):
        EarlyExit(after=[1]).compress(llama(), SMALL, latency_runs=0, progress=False)
    with pytest.raises(DataError, match="training"):
        FakeQuantTune().compress(llama(), latency_runs=0, progress=False)
