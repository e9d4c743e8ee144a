"""RTN, GPTQ, AWQ and SmoothQuant: their identities, and a slow reference."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from tests.compress.models import bert, cnn, gpt2, llama, picture_data, tokens
from torch import nn

from paperback.compress import Budget, Data
from paperback.compress.data import run
from paperback.compress.storage import PackedLinear
from paperback.compress.survey import (
    AWQ,
    GPTQ,
    RTN,
    Healing,
    Int8Linear,
    QLoRA,
    SmoothQuant,
    gptq,
    round_clipped,
)
from paperback.compress.survey.smoothing import fold, smoothing_pairs
from paperback.compress.survey.smoothquant import quantize_tokens
from paperback.errors import BudgetError, DataError
from paperback.networks.surgery import find_layers, weight_matrix
from paperback.numerics.quantized import Grid, quantize_uniform
from paperback.testing import check_compressor

SMALL = Data(tokens(8, 16), tokens(4, 16, seed=1), batch_size=4)


def correlated(
    seed: int, out: int = 12, columns: int = 24, rows: int = 200
) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and the Gram matrix of correlated inputs."""
    draws = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=draws)
    inputs = torch.randn(rows, columns, generator=draws) @ mix
    return torch.randn(out, columns, generator=draws), inputs.T @ inputs


def output_error(weight, rounded, gram):
    change = rounded - weight
    return float(((change @ gram) * change).sum())


# -- RTN and GPTQ ------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounded_weights_are_within_half_a_step(bits):
    layer = nn.Linear(37, 5)
    packed = RTN(bits, 16).visit("", layer, None)
    scale = packed.quantized().grid.scale.view(5, 3).repeat_interleave(16, 1)[:, :37]
    # An integer zero point may move an end of the grid by up to half a step.
    assert bool(((packed.dense() - layer.weight).abs() <= 1.01 * scale).all())
    inside = (packed.dense() - layer.weight).abs() <= 0.5001 * scale.float() + 1e-6
    assert inside.float().mean() > 0.8


@pytest.mark.parametrize(("group", "scheme"), [(None, "affine"), (8, "affine"), (8, "absmax"), (7, "affine")])
def test_gptq_of_uncorrelated_inputs_is_rounding_to_the_nearest(group, scheme):
    weight, _ = correlated(0)
    result = gptq(weight, 3.0 * torch.eye(24), 3, group, scheme)
    per = "channel" if group is None else "group"
    nearest = quantize_uniform(weight, 3, per, group, scheme, scale_dtype=torch.float16)
    assert torch.equal(result.quantized.codes, nearest.codes)
    assert result.damping == 0.01


def test_gptq_beats_rounding_on_twenty_correlated_problems():
    for seed in range(20):
        weight, gram = correlated(seed)
        ours = gptq(weight, gram, 3).quantized.dequantize()
        nearest = quantize_uniform(
            weight, 3, "channel", None, "affine", scale_dtype=torch.float16
        ).dequantize()
        assert output_error(weight, ours, gram) <= output_error(weight, nearest, gram)


@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_agrees_with_the_slow_loop(act_order):
    """Optimal brain surgery column by column, with the inverse updated in full after each column."""
    weight, gram = correlated(1)
    result = gptq(weight, gram, 3, None, act_order=act_order, block=8)
    lines = result.quantized.grid
    wide = gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(24, dtype=torch.float64)
    order = gram.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(24)
    remaining, left = weight.double().clone(), list(order.tolist())
    codes = torch.zeros(12, 24, dtype=torch.uint8)
    while left:
        inverse = torch.linalg.inv(wide[left][:, left])  # of the columns that are not rounded yet
        column = left[0]
        code = lines.encode(remaining[:, [column]])
        codes[:, column] = code[:, 0]
        error = (remaining[:, column] - lines.decode(code, torch.float64)[:, 0]) / inverse[0, 0]
        remaining[:, left] -= torch.outer(error, inverse[0])
        left = left[1:]
    assert (codes == result.quantized.codes).float().mean() >= 0.99  # ties in float32 may fall otherwise


def test_gptq_survives_dead_and_equal_inputs():
    weight, gram = correlated(2)
    gram[3], gram[:, 3] = 0, 0
    result = gptq(weight, gram, 4, 8)
    assert result.quantized.dequantize()[:, 3].abs().max() == 0
    alike = torch.ones(24, 24)
    assert gptq(weight, alike, 4, 8).quantized.dequantize().isfinite().all()


def test_blocks_of_columns_change_only_the_speed():
    weight, gram = correlated(3)
    whole = gptq(weight, gram, 3, 4, block=24).quantized
    parts = gptq(weight, gram, 3, 4, block=4).quantized
    assert (whole.codes == parts.codes).float().mean() >= 0.99


# -- smoothing ------------------------------------------------------------------------------


def pairs_of(model, batch):
    return smoothing_pairs(model, lambda: run(model, batch), find_layers(model).layers)


def test_pairs_of_a_llama_are_found_by_tensors():
    found = {pair.source: pair for pair in pairs_of(llama(), tokens(2, 8))}
    first = found["model.layers.0.input_layernorm"]
    assert first.layers == tuple(f"model.layers.0.self_attn.{p}_proj" for p in "qkv")
    assert first.parent == "model.layers.0.self_attn"
    assert found["model.layers.0.mlp.up_proj"].layers == ("model.layers.0.mlp.down_proj",)
    assert len(found) == 6  # two norms and up to down in each of two blocks; grouped values do not fit


def test_pairs_of_other_networks():
    assert {p.source for p in pairs_of(gpt2(), tokens(2, 8))} == {
        f"transformer.h.{i}.ln_{j}" for i in (0, 1) for j in (1, 2)
    }
    # In BERT every norm also goes round its layer: only values to outputs can be scaled.
    assert all("value" in p.source for p in pairs_of(bert(), tokens(2, 8)))
    relu = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4)).eval()
    assert [(p.source, p.layers) for p in pairs_of(relu, torch.randn(3, 6))] == [("0", ("2",))]
    gelu = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 4)).eval()
    assert pairs_of(gelu, torch.randn(3, 6)) == []


@pytest.mark.parametrize("make", [llama, gpt2, bert])
def test_folding_leaves_the_output(make):
    model, batch = make(), tokens(2, 8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)  # an untrained network hardly looks at its input
        before = run(model, batch)
        for pair in pairs_of(model, batch):
            width = weight_matrix(model.get_submodule(pair.layers[0])).shape[1]
            fold(model, pair, torch.rand(width, generator=torch.Generator().manual_seed(0)) + 0.5)
        after = run(model, batch)
    assert float((after - before).abs().max()) <= 1e-5 * float(before.abs().max().clamp(min=1))


def test_finding_pairs_puts_every_weight_back():
    model = llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pairs_of(model, tokens(2, 8))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_clipping_never_makes_a_group_worse():
    weight, gram = correlated(4)
    nearest = quantize_uniform(weight, 2, "group", 8, "affine", scale_dtype=torch.float16).dequantize()
    clipped = round_clipped(weight, gram, 2, 8).dequantize()
    for start in range(0, 24, 8):
        part = slice(start, start + 8)
        ours = output_error(weight[:, part], clipped[:, part], gram[part, part])
        assert ours <= output_error(weight[:, part], nearest[:, part], gram[part, part]) * (1 + 1e-5)


def test_awq_protects_the_channel_with_large_inputs():
    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16)).eval()
    with torch.no_grad():
        model[0].weight[3] = 100.0
        model[1].weight.normal_(generator=torch.Generator().manual_seed(0))
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    errors = {}
    for method in (RTN(3, None), AWQ(3, None)):
        result = method.compress(model, Data([x]), latency_runs=0, progress=False)
        errors[type(method).__name__] = float((result.model(x) - model(x)).detach().square().mean())
    assert errors["AWQ"] < 0.5 * errors["RTN"]


def test_tokens_in_eight_bits():
    x = torch.tensor([[1.0, -2.54, 0.0], [0.0, 0.0, 0.0]])
    codes, step = quantize_tokens(x)
    assert codes.tolist() == [[50, -127, 0], [0, 0, 0]]
    assert torch.allclose(step[:, 0], torch.tensor([0.02, 1.0]))


@pytest.mark.parametrize("group", [None, 8])
def test_int8_product_is_that_of_the_rounded_matrices(group):
    layer = nn.Linear(24, 7)
    packed = Int8Linear.from_dense(layer, 8, group, "absmax")
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0))
    codes, step = quantize_tokens(x.view(-1, 24))
    wanted = ((codes * step) @ packed.dense().T + layer.bias).view(2, 5, 7)
    assert torch.allclose(packed(x), wanted, atol=1e-5)
    assert float((packed(x) - layer(x)).detach().abs().max()) < 0.05


# -- as compressors ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build",
    [lambda: RTN(4, 16), lambda: GPTQ(3, 16), lambda: AWQ(3, 16, steps=4), lambda: SmoothQuant()],
    ids=["rtn", "gptq", "awq", "smoothquant"],
)
def test_behaviour(build):
    check_compressor(build, llama, SMALL)


@pytest.mark.parametrize("make", [gpt2, bert])
def test_other_families(make):
    for method in (GPTQ(4, 16), AWQ(4, 16, steps=3), SmoothQuant()):
        model = make()
        result = method.compress(model, tokens(4, 8), latency_runs=0, progress=False)
        assert float((run(result.model, tokens(2, 8)) - run(model, tokens(2, 8))).detach().abs().max()) < 0.2


def test_convolutions_are_packed():
    for method in (RTN(4, None), GPTQ(4, None)):
        result = method.compress(cnn(), picture_data(), latency_runs=0, progress=False)
        assert sum(isinstance(m, PackedLinear) for m in result.model.modules()) == 3
        assert result.report.quality_after["agreement"] > 0.5


def test_budgets_choose_the_bits():
    model = llama()
    by_bits = RTN().compress(model, budget=Budget(bits=3), latency_runs=0, progress=False)
    assert by_bits.report.method == "RTN(bits=3)"
    limit = by_bits.report.after.bytes_on_disk + 500
    by_bytes = RTN().compress(model, budget=Budget(bytes=limit), latency_runs=0, progress=False)
    assert by_bytes.report.after.bytes_on_disk <= limit
    assert by_bytes.report.method == "RTN(bits=3)"
    with pytest.raises(BudgetError, match=r"RTN reaches [\d,]+ to [\d,]+ bytes"):
        RTN().compress(model, budget=Budget(ratio=0.01), latency_runs=0, progress=False)
    with pytest.raises(BudgetError, match="density"):
        GPTQ().compress(model, SMALL, Budget(density=0.5), latency_runs=0, progress=False)
    with pytest.raises(BudgetError, match="8 bits"):
        SmoothQuant().compress(model, SMALL, Budget(bits=4), latency_runs=0, progress=False)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: RTN(1), "bits"), (lambda: RTN(4, 0), "group"), (lambda: RTN(clip=2.0), "clip"),
        (lambda: GPTQ(damp=0.0), "damp"), (lambda: AWQ(steps=0), "steps"),
        (lambda: SmoothQuant(1.5), "alpha"), (lambda: SmoothQuant(group=0), "group"),
    ],
)  # fmt: skip
def test_settings_out_of_range(make, word):
    with pytest.raises(DataError, match=word):
        make()


def test_data_that_cannot_calibrate():
    with pytest.raises(DataError, match="calibration"):
        GPTQ().compress(llama(), latency_runs=0, progress=False)
    with pytest.raises(DataError, match="no batch"):
        GPTQ().compress(llama(), [], latency_runs=0, progress=False)


def test_a_constant_calibration_text_is_survived():
    result = GPTQ(4, 16).compress(llama(), torch.full((4, 8), 5), latency_runs=0, progress=False)
    assert run(result.model, tokens(1, 8)).isfinite().all()


def test_grid_lines_of_one_column():
    grid = Grid(2, "affine", torch.tensor([1.0, 2.0]), torch.tensor([1, 0], dtype=torch.uint8))
    assert grid.encode(torch.tensor([[0.2], [3.9]])).tolist() == [[1], [2]]


def test_own_storage_is_opened_in_a_fresh_process(tmp_path):
    """The kinds that this folder registers are imported when a file names them."""
    batch = tokens(2, 8)
    answers = {}
    for method in (SmoothQuant(), QLoRA(2, healing=Healing(steps=2, batch_size=4))):
        name = type(method).__name__
        result = method.compress(llama(), SMALL, latency_runs=0, progress=False)
        result.save(tmp_path / name)
        answers[name] = run(result.model, batch).detach()
    torch.save(batch, tmp_path / "batch.pt")
    script = (
        "import paperback, sys, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "batch = torch.load(sys.argv[1] + '/batch.pt', weights_only=True)\n"
        "for name in sys.argv[2:]:\n"
        "    model = AutoModelForCausalLM.from_pretrained(sys.argv[1] + '/' + name).eval()\n"
        "    torch.save(model(batch).logits.detach(), sys.argv[1] + '/' + name + '.pt')\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path), *answers], check=True)
    for name, answer in answers.items():
        again = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        assert float((again - answer).abs().max()) <= 1e-6
