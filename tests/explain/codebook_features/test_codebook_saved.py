"""Save and load: the same logits, damage noticed, nothing foreign overwritten."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from paperback.errors import ArtefactError
from paperback.explain.codebook_features import CodebookModel, Site, add_codebooks


def test_a_transformer_comes_back_whole(transformer, ids, tmp_path):
    model = add_codebooks(transformer, n_codes=12, k=2, loss="fullae", beta=0.5, similarity="euclidean")
    model.save_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "model")  # over itself
    loaded = CodebookModel.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.names == model.names
    layers = zip(loaded.codebooks.values(), model.codebooks.values(), strict=True)
    assert all(repr(a) == repr(b) and a.beta == b.beta for a, b in layers)
    assert not loaded.training
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_any_module_comes_back_into_one_like_it(tmp_path):
    def fresh():
        return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))

    model = add_codebooks(fresh().double(), [Site("0", groups=2)], n_codes=6)
    model.save_pretrained(tmp_path / "model")
    loaded = CodebookModel.from_pretrained(tmp_path / "model", fresh())
    x = torch.randn(4, 5, dtype=torch.float64)
    assert torch.equal(loaded(x), model(x))
    with pytest.raises(ArtefactError, match="give from_pretrained"):
        CodebookModel.from_pretrained(tmp_path / "model")
    with pytest.raises(ArtefactError, match="does not fit a Sequential"):
        CodebookModel.from_pretrained(tmp_path / "model", nn.Sequential(nn.Linear(5, 6)))
    with pytest.raises(ArtefactError, match="does not fit a Linear"):
        CodebookModel.from_pretrained(tmp_path / "model", nn.Linear(5, 6))


@pytest.mark.parametrize("spoil", ["cut", "flip", "no weights", "no facts", "not json", "format", "class"])
def test_damage_is_noticed(llama, tmp_path, spoil):
    folder = tmp_path / "model"
    add_codebooks(llama, n_codes=12).save_pretrained(folder)
    weights, facts = folder / "model.safetensors", folder / "codebooks.json"
    data = json.loads(facts.read_text())
    if spoil == "cut":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif spoil == "flip":
        whole = bytearray(weights.read_bytes())
        whole[-1] ^= 1
        weights.write_bytes(whole)
    elif spoil == "no weights":
        weights.unlink()
    elif spoil == "no facts":
        facts.unlink()
    elif spoil == "not json":
        facts.write_text("{")
    elif spoil == "format":
        facts.write_text(json.dumps(data | {"format": 99}))
    else:
        facts.write_text(json.dumps(data | {"class": "Trainer"}))
    with pytest.raises(ArtefactError):
        CodebookModel.from_pretrained(folder)


def test_other_things_are_not_overwritten(llama, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ArtefactError, match="choose an empty or a new folder"):
        add_codebooks(llama, n_codes=12).save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
