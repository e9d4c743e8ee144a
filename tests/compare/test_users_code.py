"""The user's module:function is found in the working directory, and what is wrong with it is one sentence."""

import sys

import pytest

from paperback.compare.users_code import users_function
from paperback.errors import DataError

PURPOSE = "returns a model"


@pytest.fixture
def place(tmp_path, monkeypatch):
    (tmp_path / "of_a_user.py").write_text("number = 3\ndef make():\n    return 7\n")
    (tmp_path / "broken_of_a_user.py").write_text("import of_nobody\n")
    (tmp_path / "raises_of_a_user.py").write_text("raise ValueError('two words')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("of_a_user", "broken_of_a_user", "raises_of_a_user"):
        sys.modules.pop(name, None)


def test_a_module_of_the_working_directory_is_found(place):
    assert users_function("of_a_user:make", PURPOSE)() == 7


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("of_a_user", "give module:function, returns a model"),
        ("of_a_user.py", "give module:function"),
        ("nowhere_at_all:make", "there is no module nowhere_at_all; run from its folder"),
        ("broken_of_a_user:make", "there is no module of_nobody"),
        ("raises_of_a_user:make", "ValueError: two words"),
        ("of_a_user:missing", "the module has no missing"),
        ("of_a_user:number", "is a int; give a function, returns a model"),
    ],
)
def test_what_is_wrong_is_said(place, address, message):
    with pytest.raises(DataError, match=message):
        users_function(address, PURPOSE)
