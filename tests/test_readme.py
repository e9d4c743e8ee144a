"""The README's Python runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(compile(block, str(README), "exec"), {})
    printed = capsys.readouterr().out
    assert float(re.search(r"tensor\((.*)\)", printed)[1]) > 0.6
    assert re.search(r"linear +500 +0\.[789]", printed)
    assert (tmp_path / "my-model" / "model.safetensors").is_file()


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", README.read_text(encoding="utf-8")))
def test_the_links_of_the_readme_lead_somewhere(link):
    assert "://" in link or (README.parent / link).exists()
