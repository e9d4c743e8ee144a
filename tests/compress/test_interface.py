"""The template that every compressor runs in: copies, checks, reports, files, memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from tests.compress.models import bert, cnn, gpt2, llama, picture_data, sentence_data, token_data, tokens
from torch import nn

from paperback.compress import Budget, Compressed, Data, Report, Streamed, load
from paperback.compress.report import DENSE_ZEROS
from paperback.compress.statistics import LayerStatistics
from paperback.compress.storage import PackedLinear
from paperback.compress.svd import SVD
from paperback.errors import ArtefactError, BudgetError, DataError, NotSupportedError
from paperback.networks.surgery import set_weight_matrix, weight_matrix
from paperback.study.measure import size_on_disk
from paperback.testing import check_compressor


class Smallest(Streamed):
    """Sets the smallest weights of each row, by the size of what they see, to zero."""

    family = "prune"
    needs = frozenset({"calibration"})
    statistics = frozenset({"moments"})
    budgets = ("density",)

    def __init__(self, density: float = 0.5, **common: object) -> None:
        super().__init__(**common)  # type: ignore[arg-type]
        self.density = density

    def _settle(self, budget: Budget, layers: dict, model: nn.Module) -> Smallest:
        if budget.density is None:
            raise budget.refuse("Smallest", "density")
        return Smallest(budget.density)

    def visit(self, name: str, layer: nn.Module, stats: LayerStatistics) -> None:
        weight = weight_matrix(layer)
        scores = weight.abs() * stats.square_sum.sqrt().to(weight)
        kept = scores.topk(max(1, round(self.density * weight.shape[1])), dim=1).indices
        set_weight_matrix(layer, weight * torch.zeros_like(weight).scatter(1, kept, 1.0))


class FourBits(Streamed):
    """Packs every layer into four bits."""

    family = "quantize"

    def visit(self, name: str, layer: nn.Module, stats: LayerStatistics) -> nn.Module:
        return PackedLinear.from_dense(layer, bits=4, size=8)


@pytest.mark.parametrize("method", [Smallest, FourBits])
@pytest.mark.parametrize(
    ("build", "data"), [(llama, token_data), (gpt2, token_data), (bert, sentence_data), (cnn, picture_data)]
)
def test_a_method_keeps_to_the_contract_on_every_family(method, build, data):
    check_compressor(method, build, data())


def test_the_report_counts_what_is_there():
    data = token_data()
    result = Smallest(0.25).compress(llama(), data, latency_runs=2, progress=False)
    report = result.report
    row = next(row for row in report.layers if row.name == "model.layers.0.mlp.up_proj")
    assert (row.weights, row.nonzeros, row.what) == (2048, 512, "dense, zeros")
    assert report.after.nonzeros == sum(int(p.count_nonzero()) for p in result.model.parameters())
    assert report.before.parameters == report.after.parameters
    assert report.after.latency > 0
    assert report.after.flops == report.before.flops > 0
    assert any(DENSE_ZEROS in note for note in report.notes)
    assert report.quality_before["perplexity"] > 0
    assert 0 < report.quality_after["agreement"] <= 1
    assert report.calibration_rows == 8
    text = report.to_markdown()
    assert "perplexity" in text
    assert "lm_head" in text
    assert Report.from_json(report.to_json()) == report


def test_packed_layers_are_smaller_in_every_number():
    report = FourBits().compress(llama(), token_data(), latency_runs=0, progress=False).report
    assert report.after.bytes_on_disk < 0.55 * report.before.bytes_on_disk  # the recipe is 10 kB
    assert report.after.bytes_in_memory < 0.5 * report.before.bytes_in_memory
    assert report.after.parameters == report.before.parameters
    assert {row.what for row in report.layers if "layers" in row.name} == {PackedLinear.kind}


def test_biases_and_packed_factors_are_counted_as_what_they_are():
    packed = FourBits().compress(cnn(), picture_data(), latency_runs=0, progress=False).report
    assert packed.after.parameters == packed.before.parameters
    settings = {"latency_runs": 0, "progress": False}
    plain = SVD(ratio=0.4).compress(llama(), token_data(), **settings).report
    small = SVD(ratio=0.4, quantize="int8").compress(llama(), token_data(), **settings).report
    assert small.after.parameters == plain.after.parameters < plain.before.parameters


def test_export_packs_the_zeros(tmp_path):
    result = Smallest(0.2).compress(llama(), token_data(), latency_runs=0, progress=False)
    result.save(tmp_path / "dense")
    written = result.export(tmp_path / "packed")
    assert written == size_on_disk(tmp_path / "packed") < 0.7 * size_on_disk(tmp_path / "dense")
    ids = tokens()
    with torch.no_grad():
        expected = result.model(ids).logits
        torch.testing.assert_close(load(tmp_path / "packed").model(ids).logits, expected, atol=1e-6, rtol=0)


def test_a_saved_language_model_is_an_ordinary_checkpoint(tmp_path):
    """In a process of its own, which knows nothing but ``import paperback``."""
    result = FourBits().compress(llama(), token_data(), latency_runs=0, progress=False)
    result.save(tmp_path / "model")
    torch.save(result.model(tokens()).logits.detach(), tmp_path / "logits.pt")
    program = (
        "import sys, paperback, torch; from transformers import AutoModelForCausalLM as A\n"
        "m = A.from_pretrained(sys.argv[1] + '/model'); x = torch.load(sys.argv[1] + '/logits.pt')\n"
        "ids = torch.randint(0, 64, (8, 16), generator=torch.Generator().manual_seed(0))\n"
        "print(float((m(ids).logits - x).abs().max()), m.lm_head.weight is m.model.embed_tokens.weight)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True
    )
    error, tied = done.stdout.split()
    assert float(error) <= 1e-6
    assert tied == "True"


def test_layers_with_one_weight_are_handled_once_and_stay_tied():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].weight, model[2].bias = model[0].weight, model[0].bias
    data = Data(torch.randn(16, 8))
    packed = FourBits().compress(model, data, latency_runs=0, progress=False)
    assert packed.model[0] is packed.model[2]
    pruned = Smallest().compress(model, data, latency_runs=0, progress=False)
    assert pruned.model[0].weight is pruned.model[2].weight


def test_in_place_changes_the_model_itself():
    model = llama()
    result = Smallest().compress(model, token_data(), latency_runs=0, progress=False, inplace=True)
    assert result.model is model
    assert "agreement" not in result.report.quality_after


def test_interrupted_it_goes_on_and_ends_equal(tmp_path):
    class Interrupted(Smallest):
        def visit(self, name: str, layer: nn.Module, stats: LayerStatistics) -> None:
            if "layers.1.mlp" in name and not (tmp_path / "seen").exists():
                (tmp_path / "seen").touch()
                raise KeyboardInterrupt
            super().visit(name, layer, stats)

    settings = {"latency_runs": 0, "progress": False, "folder": tmp_path / "begun"}
    with pytest.raises(KeyboardInterrupt):
        Interrupted().compress(llama(), token_data(), **settings)
    assert (tmp_path / "begun").exists()
    resumed = Interrupted().compress(llama(), token_data(), **settings)
    whole = Smallest().compress(llama(), token_data(), latency_runs=0, progress=False)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name])


def test_check_and_estimate_compute_nothing():
    model = llama()
    table = Smallest(targets=["mlp"]).check(model)
    assert table["model.layers.0.mlp.up_proj"] == "handled"
    assert "targets" in table["model.layers.0.self_attn.q_proj"]
    assert "ignored" in table["lm_head"]
    estimate = Smallest().estimate(model, token_data())
    assert estimate.layers == 14
    assert estimate.memory >= 4 * sum(p.numel() for p in model.parameters())
    assert 0 < estimate.seconds < 60


# -- what is refused -----------------------------------------------------------------------------------------


def refused(match: str, model: object, data: object = None, budget: Budget | None = None) -> None:
    with pytest.raises(DataError, match=match):
        Smallest().compress(model, data, budget, latency_runs=0, progress=False)  # type: ignore[arg-type]


def test_each_unusable_argument_has_its_own_sentence():
    refused("needs data for calibration", llama())
    refused("is a list; give a torch.nn.Module", [llama()], token_data())
    refused("no layer that Smallest handles", nn.Sequential(nn.ReLU()), token_data())
    refused("it is on the list of ignored layers", nn.ModuleDict({"lm_head": nn.Linear(3, 3)}), token_data())
    packed = FourBits().compress(llama(), token_data(), latency_runs=0, progress=False).model
    refused("compressed already: 14 layers are packed", packed, token_data())
    with pytest.raises(BudgetError, match="cannot be told bits; give it a budget in density"):
        Smallest().compress(llama(), token_data(), Budget(bits=4), latency_runs=0)
    with pytest.raises(DataError, match="list of patterns"):
        Smallest(targets="mlp")


def test_a_result_of_one_size_says_so(tmp_path):
    result = Smallest().compress(cnn(), picture_data(), latency_runs=0, progress=False)
    with pytest.raises(NotSupportedError, match="one size"):
        result.at(Budget(density=0.1))
    result.save(tmp_path / "net")
    with pytest.raises(DataError, match="fresh one as model"):
        Compressed.load(tmp_path / "net")
    (tmp_path / "net" / "report.json").write_text("{}")
    with pytest.raises(ArtefactError, match="report"):
        Compressed.load(tmp_path / "net", cnn())


def test_a_method_is_written_as_its_call():
    assert repr(Smallest(0.25)) == "Smallest(density=0.25)"
