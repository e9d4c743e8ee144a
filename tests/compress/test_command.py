"""`paperback compress`, the user's models and data, and the bench at sizes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tests.compress.models import llama
from torch import nn
from typer.testing import CliRunner

from paperback.cli import app
from paperback.compare.bench import load_bench
from paperback.compress import load
from paperback.compress.bench import BENCH
from paperback.compress.command import METHODS, build, method_class, settings_from
from paperback.compress.interface import Compressor
from paperback.compress.loading import load_data, load_subject
from paperback.errors import DataError, PaperbackError
from paperback.study.measure import size_on_disk

transformers = pytest.importorskip("transformers")


def small_classifier() -> nn.Module:
    """What a user's ``module:function`` gives."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3))


def nothing() -> str:
    """No model."""
    return "nothing"


@pytest.fixture(scope="module")
def picture_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "images.npz"
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (120, 8, 8)).astype(np.uint8), rng.integers(0, 3, 120)
    np.savez(path, x=x, y=y)
    return path


def test_every_named_method_is_a_compressor():
    for name in METHODS:
        assert issubclass(method_class(name), Compressor)
    with pytest.raises(PaperbackError, match="did you mean wanda"):
        method_class("wandda")


def test_settings_are_json_or_text():
    assert settings_from(["bits=3", "nm=[2, 4]", "init=wanda", "pack=true"]) == {
        "bits": 3, "nm": [2, 4], "init": "wanda", "pack": True,
    }  # fmt: skip
    assert build("wanda", {"nm": [2, 4]}).nm == (2, 4)
    with pytest.raises(DataError, match="name=value"):
        settings_from(["bits"])
    with pytest.raises(DataError, match="has no setting 'bits'; it has sparsity"):
        build("wanda", {"bits": 3})


def test_a_checkpoint_folder_is_compressed_by_one_command(tmp_path):
    """A Llama of the user's, with a tokenizer, on the user's text."""
    from paperback.networks import pretrained_tokenizer

    folder, out, text = tmp_path / "mine", tmp_path / "small", tmp_path / "text.txt"
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**(llama().config.to_dict() | {"vocab_size": 2048}))
    )
    model.save_pretrained(folder, max_shard_size="200KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    pretrained_tokenizer("lm-tiny").save_pretrained(folder)
    text.write_text("It was the best of times, and it was the worst of times. " * 300)
    arguments = ["compress", str(folder), "--method", "wanda", "--sparsity", "0.6", "--rows", "4"]
    done = CliRunner().invoke(app, [*arguments, "--data", str(text), "--out", str(out), "--quiet"])
    assert done.exit_code == 0, done.output
    assert "perplexity" in done.output
    assert json.loads((out / "report.json").read_text())["method"] == "Wanda(sparsity=0.6)"
    opened = transformers.AutoModelForCausalLM.from_pretrained(out)
    weight = opened.model.layers[0].mlp.up_proj.weight
    assert float((weight == 0).float().mean()) == pytest.approx(0.6, abs=0.03)
    assert transformers.AutoTokenizer.from_pretrained(out)("It was")["input_ids"]
    assert not (tmp_path / ".small.begun").exists()


def test_a_module_of_the_users_is_compressed(tmp_path, picture_file):
    out = tmp_path / "small"
    arguments = ["compress", f"{__name__}:small_classifier", "--method", "rtn", "--bits", "4"]
    done = CliRunner().invoke(app, [*arguments, "--data", str(picture_file), "--out", str(out), "--quiet"])
    assert done.exit_code == 0, done.output
    loaded = load(out, small_classifier())
    assert loaded.report.quality_after.keys() == {"accuracy", "loss", "agreement"}
    assert size_on_disk(out / "model.safetensors") < 4 * 1100


def test_unusable_addresses_say_what_there_could_be(tmp_path, picture_file):
    with pytest.raises(DataError, match=r"must give a torch\.nn\.Module"):
        load_subject(f"{__name__}:nothing")
    with pytest.raises(DataError, match=r"no readable config\.json"):
        load_subject(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match="safetensors"):
        load_subject(tmp_path)
    with pytest.raises(DataError, match="no tokenizer"):
        load_data(load_subject(f"{__name__}:small_classifier"), tmp_path / "text.txt")
    with pytest.raises(DataError, match="not a text in UTF-8"):
        load_data(load_subject("lm-tiny"), picture_file)


@pytest.mark.parametrize("name", ["original", "rtn@0.4", "wanda@0.4"])
def test_the_bench_stays_below_the_size_it_was_asked_for(name, tmp_path):
    bench = load_bench("paperback.compress.bench:BENCH@0.4")
    data = bench.load(None, None, "smoke", 0)
    contender = bench.contender(name)
    assert contender.applies(data) is None
    measured = bench.evaluate(contender, data, "smoke", 0, tmp_path)
    whole = 5_900_000
    if name != "original":
        assert measured["bytes"] <= 0.4 * whole
        assert (tmp_path / "model" / "config.json").exists()
        assert 0 < measured["agreement"] <= 1
    assert measured["loss"] > 0


def test_methods_that_cannot_be_as_small_say_so():
    bench = load_bench("paperback.compress.bench:BENCH@0.05")
    data = bench.load(None, None, "smoke", 0)
    assert "RTN reaches" in str(bench.contender("rtn@0.05").applies(data))
    assert {c.name for c in bench.choose(["rtn"])} >= {"rtn@0.05", "original"}
    assert BENCH.models[0] == "lm-tiny"
    with pytest.raises(PaperbackError, match="different numbers"):
        load_bench("paperback.compress.bench:BENCH@2")
    with pytest.raises(PaperbackError, match="not compared at sizes"):
        load_bench("paperback.bayes.bench:BENCH@0.5")


def test_the_command_line_takes_sizes():
    from paperback.cli import _effort_and_sizes

    assert _effort_and_sizes("standard") == ("standard", None)
    assert _effort_and_sizes("0.5,0.25") == ("quick", [0.5, 0.25])
    assert _effort_and_sizes("smoke:0.5") == ("smoke", [0.5])
    with pytest.raises(PaperbackError, match="must be numbers"):
        _effort_and_sizes("quick:half")
