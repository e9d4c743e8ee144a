"""Folders of compressed models: the same outputs, in a fresh process too, and nothing damaged passes."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.compress.models import bert, cnn, gpt2, llama, pictures, tokens
from torch import nn

from paperback import plugin
from paperback.compress.storage import (
    CodebookLinear,
    PackedEmbedding,
    PackedLinear,
    SparseLinear,
    StoredModel,
    load_model,
    pack_zeros,
    save_model,
    stored_layers,
    to_dense,
)
from paperback.compress.storage.module import ELSEWHERE
from paperback.compress.storage.module import KINDS as KNOWN
from paperback.errors import ArtefactError, DataError, NotSupportedError
from paperback.networks import pretrained
from paperback.networks.surgery import find_layers, swap

KINDS = {
    "packed": lambda layer: PackedLinear.from_dense(layer, 4, 16),
    "codebook": lambda layer: CodebookLinear.from_dense(layer),
    "sparse": lambda layer: SparseLinear.from_dense(layer),
}


def compressed(model: nn.Module, kind: str = "packed") -> nn.Module:
    """A copy whose layers are stored; every fourth weight is zero."""
    model = copy.deepcopy(model)
    for name, layer in find_layers(model).layers.items():
        with torch.no_grad():
            layer.weight.view(-1)[::4] = 0
        swap(model, name, KINDS[kind](layer))
    return model.eval()


def answer(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        if hasattr(model, "config"):
            return model(tokens()).logits
        return model(pictures()[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", [llama, gpt2, bert])
def test_a_transformers_model_comes_back_through_load_model_and_from_pretrained(tmp_path, family, kind):
    model = compressed(family(), kind)
    save_model(model, tmp_path / "m", method="test")
    loaded = load_model(tmp_path / "m")
    native = type(model).from_pretrained(tmp_path / "m")
    for again in (loaded, native):
        assert stored_layers(again).keys() == stored_layers(model).keys()
        assert torch.equal(answer(again), answer(model))
        assert not again.training
    skeleton = load_model(tmp_path / "m", family())
    assert torch.equal(answer(skeleton), answer(model))


def test_tied_embeddings_stay_tied_and_are_written_once(tmp_path):
    model = compressed(llama(tied=True))
    save_model(model, tmp_path / "m")
    assert "lm_head.weight" not in StoredModel(tmp_path / "m").names()
    loaded = load_model(tmp_path / "m")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    untied = compressed(llama(tied=False))
    save_model(untied, tmp_path / "n")
    assert "lm_head.weight" in StoredModel(tmp_path / "n").names()


def test_the_base_model_opens_from_the_folder_of_a_model_with_a_head(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = compressed(llama())
    save_model(model, tmp_path / "m")
    base = transformers.AutoModel.from_pretrained(tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(base(tokens())[0], model.model(tokens())[0])


def test_it_is_saved_again_generates_and_becomes_dense_again(tmp_path):
    model = compressed(llama())
    save_model(model, tmp_path / "m")
    loaded = type(model).from_pretrained(tmp_path / "m")
    loaded.save_pretrained(tmp_path / "again")
    again = type(model).from_pretrained(tmp_path / "again")
    assert torch.equal(answer(again), answer(model))
    made = [m.generate(tokens()[:1, :4], max_new_tokens=6, do_sample=False) for m in (model, again)]
    assert torch.equal(*made)
    save_model(again, tmp_path / "m")  # over the first
    dense = load_model(tmp_path / "m").dequantize()
    assert not stored_layers(dense)
    torch.testing.assert_close(answer(dense), answer(model))
    dense.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())


def test_plain_zeros_need_no_plugin(tmp_path):
    model = to_dense(compressed(llama(), "sparse"))
    save_model(model, tmp_path / "m")
    assert "quantization_config" not in json.loads((tmp_path / "m/config.json").read_text())
    packed = pack_zeros(copy.deepcopy(model))
    assert len(stored_layers(packed)) >= 14
    save_model(packed, tmp_path / "p")
    assert torch.equal(answer(load_model(tmp_path / "p")), answer(load_model(tmp_path / "m")))
    weights = [(tmp_path / folder / "model.safetensors").stat().st_size for folder in "pm"]
    assert weights[0] < 0.87 * weights[1]


def test_a_fresh_process_opens_it_after_import_paperback(tmp_path):
    pytest.importorskip("transformers")
    model = compressed(pretrained("lm-tiny"))
    save_model(model, tmp_path / "m")
    code = f"""
import sys
import paperback
assert "torch" not in sys.modules and "transformers" not in sys.modules
from transformers import AutoModelForCausalLM
import torch
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "m")!r})
ids = torch.arange(64).view(2, 32)
with torch.no_grad():
    torch.save(model(ids).logits, {str(tmp_path / "logits.pt")!r})
"""
    environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=dict(os.environ) | environment, timeout=100)
    with torch.no_grad():
        here = model(torch.arange(64).view(2, 32)).logits
    there = torch.load(tmp_path / "logits.pt", weights_only=True)
    assert (here - there).abs().max() <= 1e-6


def test_transformers_that_was_imported_first_learns_of_it_at_once(monkeypatch):
    pytest.importorskip("transformers")
    imported = []
    monkeypatch.setattr(plugin.importlib, "import_module", imported.append)
    plugin.watch_transformers()
    assert imported == ["paperback.compress.storage.hugging_face"]
    assert not any(type(finder).__name__ == "_Watcher" for finder in sys.meta_path)


def test_half_precision_comes_back_as_it_was(tmp_path):
    llama().save_pretrained(tmp_path / "dense")
    model = compressed(type(llama()).from_pretrained(tmp_path / "dense", dtype=torch.bfloat16))
    save_model(model, tmp_path / "m")
    loaded = load_model(tmp_path / "m")
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(answer(loaded), answer(model))


@pytest.mark.parametrize("kind", KINDS)
def test_any_other_module_comes_back_with_a_skeleton(tmp_path, kind):
    model = compressed(cnn(), kind)
    save_model(model, tmp_path / "m", report={"accuracy": 0.5})
    fresh = cnn()
    fresh[1].running_mean.fill_(7.0)
    loaded = load_model(tmp_path / "m", fresh)
    assert loaded is fresh
    assert torch.equal(answer(loaded), answer(model))
    assert json.loads((tmp_path / "m/report.json").read_text()) == {"accuracy": 0.5}
    with pytest.raises(DataError, match="give load_model a fresh one"):
        load_model(tmp_path / "m")


def test_a_storage_module_alone_and_one_layer_of_many(tmp_path):
    layer = PackedLinear.from_dense(nn.Linear(16, 4), 4, None)
    save_model(layer, tmp_path / "one")
    x = torch.randn(3, 16)
    assert torch.equal(load_model(tmp_path / "one", nn.Linear(16, 4))(x), layer(x))
    model = compressed(cnn())
    save_model(model, tmp_path / "m")
    stored = StoredModel(tmp_path / "m")
    assert torch.equal(stored.layer("6").dense(), model[6].dense())
    assert torch.equal(stored.tensor("1.weight"), model[1].weight)
    with pytest.raises(ArtefactError, match="no stored layer '1'"):
        stored.layer("1")


def test_weights_that_are_shared_are_written_once_and_shared_again(tmp_path):
    def make():
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Embedding(5, 8))
        model[1].weight = model[0].weight
        return model

    model = make()
    swap(model, "2", PackedEmbedding.from_dense(model[2], 4, None))
    save_model(model, tmp_path / "m")
    assert "1.weight" not in StoredModel(tmp_path / "m").names()
    loaded = load_model(tmp_path / "m", make())
    assert loaded[1].weight is loaded[0].weight
    assert torch.equal(loaded[0].weight, model[0].weight)


def test_the_file_is_no_larger_than_its_tensors_and_a_header(tmp_path):
    model = compressed(cnn())
    save_model(model, tmp_path / "m")
    tensors = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert 0 < (tmp_path / "m/model.safetensors").stat().st_size - tensors < 3000


# -- what is refused -----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    save_model(compressed(cnn()), tmp_path / "m")
    return tmp_path / "m"


def rewrite(folder: Path, change, recipe_only: bool = False) -> None:
    """Change tensors or recipe as an attacker would, with right checksums."""
    from paperback.compress.storage.files import write_recipe

    recipe = json.loads((folder / "compression.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    change(recipe, tensors)
    if not recipe_only:
        save_file(tensors, folder / "model.safetensors")
    (folder / "compression.json").unlink()
    write_recipe(folder, {key: recipe[key] for key in ("method", "modules", "tied", "skeleton")})


def test_damaged_and_missing_files_are_refused(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ArtefactError, match="is damaged"):
        load_model(folder, cnn())
    path.write_bytes(whole[:-100])
    with pytest.raises(ArtefactError, match="is damaged"):
        load_model(folder, cnn())
    path.unlink()
    with pytest.raises(ArtefactError, match="is missing"):
        load_model(folder, cnn())
    with pytest.raises(ArtefactError, match=r"has no compression\.json"):
        load_model(folder / "nowhere", cnn())


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": 1, "version": "0"}', '{"format": 9, "version": "9.9"}']
)
def test_recipes_that_are_none_or_too_new_are_refused(folder, text):
    (folder / "compression.json").write_text(text)
    with pytest.raises(ArtefactError, match=r"not a recipe|has format 9, written by paperback 9\.9"):
        load_model(folder, cnn())


def test_a_recipe_cannot_point_outside_the_folder(folder):
    recipe = json.loads((folder / "compression.json").read_text())
    recipe["files"]["../secret"] = {"sha256": "0", "bytes": 1}
    (folder / "compression.json").write_text(json.dumps(recipe))
    with pytest.raises(ArtefactError, match="leads out of the folder"):
        load_model(folder, cnn())


def test_what_contradicts_itself_is_refused_before_memory_is_taken(folder):
    def huge(recipe, tensors):
        spec = recipe["modules"]["6"]
        spec["form"]["shape"] = spec["tensor"]["shape"] = [10**6, 10**6]

    rewrite(folder, huge, recipe_only=True)
    with pytest.raises(ArtefactError, match=r"the tensor '6\.\w+' is"):
        load_model(folder, cnn())


def test_tensors_that_are_missing_surplus_or_of_another_shape_are_refused(tmp_path):
    def check(change, message):
        folder = tmp_path / message[:5].strip()
        save_model(compressed(cnn()), folder)
        rewrite(folder, change)
        with pytest.raises(ArtefactError, match=message):
            load_model(folder, cnn())

    check(lambda _, tensors: tensors.pop("1.weight"), "has no '1.weight'")
    check(lambda _, tensors: tensors.pop("6.codes"), "the tensor '6.codes' is missing")
    check(lambda _, tensors: tensors.update(extra=torch.ones(1)), "has 'extra'")
    check(lambda _, tensors: tensors.update({"1.weight": torch.ones(3)}), "'1.weight' has shape")
    check(lambda _, tensors: tensors["6.scale"].fill_(float("nan")), "not finite")


def test_another_architecture_is_refused(folder):
    with pytest.raises(ArtefactError, match="of the model is linear"):
        load_model(folder, nn.Sequential(*cnn()[:6], nn.Linear(7, 10)))
    with pytest.raises(ArtefactError, match="has no layer '6'"):
        load_model(folder, nn.Sequential(*cnn()[:6]))


def test_a_checkpoint_that_was_tampered_with_is_refused_by_from_pretrained_too(tmp_path):
    model = compressed(llama())
    save_model(model, tmp_path / "m")
    path = tmp_path / "m/model.safetensors"
    tensors = load_file(path)
    tensors.pop("model.layers.0.mlp.up_proj.codes")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ArtefactError, match="is damaged"):
        type(model).from_pretrained(tmp_path / "m")
    (tmp_path / "m/compression.json").unlink()  # without it there are no checksums, but there are headers
    with pytest.raises(ArtefactError, match=r"up_proj\.codes' is missing"):
        type(model).from_pretrained(tmp_path / "m")


def test_a_checkpoint_of_a_later_format_is_refused(tmp_path):
    model = compressed(llama())
    save_model(model, tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    config["quantization_config"]["format"] = 99
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    with pytest.raises(ArtefactError, match="stored format 99"):
        type(model).from_pretrained(tmp_path / "m")


def test_models_that_cannot_be_saved_say_why(tmp_path):
    with pytest.raises(DataError, match="meta device"):
        save_model(nn.Linear(4, 4, device="meta"), tmp_path / "m")
    model = llama()
    model.model.layers[0].mlp.up_proj = nn.Linear(32, 48, bias=False)
    with pytest.raises(ArtefactError, match="but the config makes"):
        save_model(model, tmp_path / "m")
    save_model(model, tmp_path / "bytes", loadable=False)
    model = llama()
    model.hf_quantizer = type("Other", (), {"quantization_config": type("C", (), {"quant_method": "bnb"})})()
    with pytest.raises(NotSupportedError, match="quantized by bnb"):
        save_model(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_other_files_are_never_written_over(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ArtefactError, match="holds files that are not a compressed model"):
        save_model(cnn(), tmp_path)
    with pytest.raises(ArtefactError, match="is a file"):
        save_model(cnn(), tmp_path / "thesis.txt")
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_kinds_of_other_modules_are_found_and_a_stored_layer_inside_another_is_part_of_it(tmp_path):
    import importlib

    for kind, module in ELSEWHERE.items():
        importlib.import_module(module)
        assert kind in KNOWN, kind
    lora = importlib.import_module("paperback.compress.survey.qlora").LoRALinear
    model = llama()
    for name, layer in find_layers(model).layers.items():
        swap(model, name, lora.from_dense(layer, rank=2))
    assert stored_layers(model).keys() == find_layers(llama()).layers.keys()
    save_model(model, tmp_path / "m")
    assert torch.equal(answer(load_model(tmp_path / "m")), answer(model))
