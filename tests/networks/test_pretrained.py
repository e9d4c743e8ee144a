"""The networks that ship: whole, small, good at their texts, and refused when they are not what shipped."""

from __future__ import annotations

import importlib
import json
import math
import shutil
import sys

import pytest
import torch

from paperback.data import images, text
from paperback.errors import DataError, MissingExtraError
from paperback.networks import pretrained, pretrained_folder, pretrained_tokenizer
from paperback.networks.shipped import CLASSIFIERS, FOLDER, NAMES, shipped_manifest
from paperback.study.measure import parameters, size_on_disk

MODULE = importlib.import_module("paperback.networks.shipped")


def test_every_network_that_is_named_ships_with_its_recipe():
    for name in NAMES:
        folder = pretrained_folder(name)
        assert size_on_disk(folder) < 5_000_000
        assert {path.name for path in folder.iterdir()} == {*shipped_manifest(name)["files"], "MANIFEST.json"}
        assert shipped_manifest(name)["recipe"].startswith("recipes/")


@pytest.fixture(scope="module")
def lm():
    return pretrained("lm-tiny"), pretrained_tokenizer("lm-tiny")


def test_the_language_model_is_an_ordinary_transformers_model(lm):
    model, tokenizer = lm
    assert type(model).__name__ == "LlamaForCausalLM"
    assert 1_000_000 < parameters(model) < 2_000_000
    assert not model.training
    assert model.dtype == torch.float32
    assert len(tokenizer) == model.config.vocab_size
    prompt = tokenizer("It is a truth", return_tensors="pt", add_special_tokens=False)
    made = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    assert tokenizer.decode(made[0]).startswith("It is a truth")


@pytest.mark.parametrize("words", ["dog: an animal\n", "Ünïcode £5, 漢字", "  two  spaces\t\n\n"])
def test_every_text_can_be_written_and_comes_back(lm, words):
    _, tokenizer = lm
    assert tokenizer.decode(tokenizer.encode(words, add_special_tokens=False)) == words


def test_its_bits_per_byte_are_those_that_were_recorded(lm):
    model, tokenizer = lm
    recorded = shipped_manifest("lm-tiny")["validation_bits_per_byte"]
    for name, bits in recorded.items():
        assert bits["model"] < 0.85 * bits["bigram"] < bits["unigram"], name
    words = text.kjv().val.x[:30_000]
    ids = torch.tensor(tokenizer.encode(words, add_special_tokens=False))
    rows = ids[: len(ids) // 256 * 256].view(-1, 256)
    with torch.no_grad():
        loss = model(input_ids=rows, labels=rows).loss.item()
    bits = loss / math.log(2) * len(ids) / len(words.encode())
    assert bits == pytest.approx(recorded["kjv"]["model"], abs=0.06)  # on a part


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_classifiers_of_images_are_as_good_as_was_recorded(name):
    model, manifest = pretrained(name), shipped_manifest(name)
    data = images.fashion_mnist()
    assert type(model) is CLASSIFIERS[name]
    assert not model.training
    assert manifest["classes"] == list(data.classes)
    assert parameters(model) == manifest["parameters"]
    for part in ("val", "test"):
        x, y = getattr(data, part)
        with torch.no_grad():
            right = model(x.unsqueeze(1).float() / 255).argmax(1) == y
        assert float(right.float().mean()) == pytest.approx(manifest["accuracy"][part], abs=0.003)
        assert manifest["accuracy"][part] > 0.85


def test_a_classifier_of_images_has_no_tokenizer():
    with pytest.raises(DataError, match="has no tokenizer"):
        pretrained_tokenizer("resnet-fashion")


@pytest.mark.parametrize("spoil", ["cut", "missing", "no manifest"])
def test_an_installation_that_is_not_whole_is_noticed(spoil, tmp_path, monkeypatch):
    shutil.copytree(FOLDER / "lm-tiny", tmp_path / "lm-tiny")
    weights = tmp_path / "lm-tiny" / "model.safetensors"
    if spoil == "cut":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif spoil == "missing":
        weights.unlink()
    else:
        (tmp_path / "lm-tiny" / "MANIFEST.json").write_text("{")
    monkeypatch.setattr(MODULE, "FOLDER", tmp_path)
    with pytest.raises(DataError, match="install paperback again"):
        pretrained("lm-tiny")


def test_other_names_are_refused():
    with pytest.raises(DataError, match="'gpt-4'; those that ship are lm-tiny"):
        pretrained("gpt-4")


def test_without_transformers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match="llm"):
        pretrained("lm-tiny")


def test_the_manifest_says_how_it_was_made():
    manifest = shipped_manifest("lm-tiny")
    assert manifest["parameters"] == parameters(pretrained("lm-tiny"))
    assert {"seed", "seconds", "torch", "transformers"} <= set(manifest)
    assert json.dumps(manifest)
