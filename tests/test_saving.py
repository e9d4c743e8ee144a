"""Saving and loading: what comes back is what was saved, and everything else is refused in plain words."""

import copy
import hashlib
import json
import os
import re
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import paperback
from paperback import catalogue
from paperback.errors import ArtefactError
from paperback.saving import BLOCK, CONFIG, FORMAT, WEIGHTS, Saved
from paperback.saving.folder import config_digest


class Net(Saved, nn.Module):
    """A module with everything that a state dict can hold."""

    def __init__(
        self, n_inputs: int, sizes: Any = (3, 2), dropout: float = 0.5, activation: Any = torch.relu
    ) -> None:
        super().__init__()
        if n_inputs > 10_000:
            raise ValueError("n_inputs is too large")
        self.sizes = tuple(sizes)
        self.first = nn.Linear(n_inputs, self.sizes[0])
        self.tied = nn.Linear(n_inputs, self.sizes[0], bias=False)
        self.tied.weight = self.first.weight
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.activation = activation


class Other(Saved, nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 3)


class Flexible(Saved, nn.Module):
    def __init__(self, width: int, **settings: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)
        self.settings = settings


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A catalogue that holds Net of this file as its first method."""
    entry = catalogue.methods()[0]
    method = catalogue.Method(**{**vars(entry), "slug": "net", "object": f"{__name__}:Net"})
    monkeypatch.setattr(catalogue, "methods", lambda: (method,))


@pytest.fixture
def saved(tmp_path: Path, listed: None) -> Path:
    folder = tmp_path / "runs" / "model"
    Net(4).save_pretrained(folder)
    return folder


def equal(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(
        torch.equal(left[k], right[k]) and left[k].dtype == right[k].dtype for k in left
    )


def edit(folder: Path, change: Callable[[dict[str, Any]], None], sign: bool = True) -> None:
    """Change config.json; with `sign` as somebody would who knows the format."""
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    if sign:
        config[BLOCK]["config_sha256"] = config_digest(config)
    (folder / CONFIG).write_text(json.dumps(config))


def replace_weights(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Other weights, with their size and hash in the config."""
    save_file(tensors, folder / WEIGHTS)
    resign(folder)


def resign(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    facts = {"weights_sha256": hashlib.sha256(data).hexdigest(), "weights_bytes": len(data)}
    edit(folder, lambda config: config[BLOCK].update(facts))


# -- what comes back ---------------------------------------------------------


def test_a_saved_model_comes_back_equal_and_in_evaluation_mode(tmp_path: Path, listed: None) -> None:
    model = Net(4, sizes=(5, 7), dropout=0.25)
    model.steps.fill_(12)
    model.save_pretrained(tmp_path / "model")
    for loaded in (paperback.load(tmp_path / "model"), Net.from_pretrained(tmp_path / "model")):
        assert isinstance(loaded, Net)
        assert equal(loaded, model)
        assert (loaded.sizes, loaded.dropout.p, loaded.training) == ((5, 7), 0.25, False)
        assert loaded.tied.weight is loaded.first.weight


def test_the_config_says_class_slug_version_format_and_arguments(saved: Path) -> None:
    config = json.loads((saved / CONFIG).read_text())
    block = config.pop(BLOCK)
    assert config == {"n_inputs": 4, "sizes": [3, 2], "dropout": 0.5}
    assert (block["class"], block["slug"]) == (f"{__name__}:Net", "net")
    assert (block["version"], block["format"]) == (paperback.__version__, FORMAT)
    assert block["weights_sha256"] == hashlib.sha256((saved / WEIGHTS).read_bytes()).hexdigest()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_the_precision_is_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    model = Net(4).to(dtype)
    model.save_pretrained(tmp_path / "model")
    assert equal(Net.from_pretrained(tmp_path / "model"), model)


def test_arguments_are_those_at_construction_and_numpy_numbers_count_as_numbers(tmp_path: Path) -> None:
    sizes = [3, 2]
    model = Net(np.int64(4), sizes=sizes, dropout=np.float32(0.5))
    sizes[0] = 99
    model.save_pretrained(tmp_path / "model")
    assert Net.from_pretrained(tmp_path / "model").sizes == (3, 2)


def test_a_copy_is_saved_with_the_arguments_of_the_original(tmp_path: Path) -> None:
    model = copy.deepcopy(Net(4, sizes=(5, 2)))
    model.save_pretrained(tmp_path / "model")
    assert equal(Net.from_pretrained(tmp_path / "model"), model)


def test_keyword_settings_of_a_constructor_come_back(tmp_path: Path) -> None:
    Flexible(3, colour="red", depth=[1, 2]).save_pretrained(tmp_path / "model")
    assert Flexible.from_pretrained(tmp_path / "model").settings == {"colour": "red", "depth": [1, 2]}


def test_an_argument_can_be_replaced_when_loading(saved: Path) -> None:
    model = Net.from_pretrained(saved, dropout=0.0)
    assert model.dropout.p == 0.0
    assert equal(model, paperback.load(saved))


def test_loading_leaves_the_random_numbers_of_the_user_alone(saved: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    paperback.load(saved)
    assert torch.equal(torch.rand(3), expected)


def test_loading_a_folder_needs_no_network(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    assert isinstance(paperback.load(saved), Net)
    with pytest.raises(ArtefactError, match="there is no folder runs/nothing"):
        paperback.load("runs/nothing")


def test_a_method_in_a_folder_is_saved_under_its_public_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = catalogue.Method(**{**vars(catalogue.methods()[0]), "object": "paperback.density.big:Inner"})
    monkeypatch.setattr(catalogue, "methods", lambda: (method,))
    inner = type("Inner", (Net,), {"__module__": "paperback.density.big.model"})
    inner(4).save_pretrained(tmp_path / "model")
    block = json.loads((tmp_path / "model" / CONFIG).read_text())[BLOCK]
    assert (block["class"], block["slug"]) == ("paperback.density.big:Inner", method.slug)


# -- writing -----------------------------------------------------------------


def test_saving_again_replaces_the_model_and_keeps_the_users_readme(saved: Path) -> None:
    (saved / "README.md").write_text("mine")
    newer = Net(4, sizes=(6, 1))
    newer.save_pretrained(saved)
    assert equal(paperback.load(saved), newer)
    assert (saved / "README.md").read_text() == "mine"
    assert sorted(p.name for p in saved.parent.iterdir()) == [saved.name]


def test_others_may_read_what_was_saved_as_far_as_the_umask_lets_them(saved: Path) -> None:
    modes = {stat.S_IMODE((saved / name).stat().st_mode) for name in (CONFIG, WEIGHTS)}
    assert len(modes) == 1
    assert stat.S_IMODE(saved.stat().st_mode) & 0o500 == 0o500


@pytest.mark.parametrize("name", ["notes.txt", CONFIG])
def test_a_folder_that_is_no_saved_model_is_not_written_over(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"model_type": "llama"}')
    with pytest.raises(ArtefactError, match="not a model saved by paperback"):
        Net(4).save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    with pytest.raises(ArtefactError, match="is a file"):
        Net(4).save_pretrained(tmp_path / name)


@pytest.mark.parametrize(
    "value", [torch.tanh, nn.Linear(1, 1), Path("x"), {1: "a"}, {"a": {2}}, torch.float32, [torch.zeros(1)]]
)
def test_an_argument_that_json_cannot_hold_is_named(tmp_path: Path, value: Any) -> None:
    with pytest.raises(ArtefactError, match="'activation'"):
        Net(4, activation=value).save_pretrained(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_an_error_while_saving_leaves_the_older_model(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = paperback.load(saved)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("paperback.saving.module.save_model", fail)
    with pytest.raises(OSError, match="no space left"):
        Net(4).save_pretrained(saved)
    assert equal(paperback.load(saved), before)
    assert sorted(p.name for p in saved.parent.iterdir()) == [saved.name]


def test_a_kill_between_the_two_files_is_noticed(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.replace

    def stop(source: Path, target: Path) -> None:
        if Path(target).name == CONFIG:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        Net(4).save_pretrained(saved)
    with pytest.raises(ArtefactError, match="is damaged"):
        paperback.load(saved)


# -- what is refused ---------------------------------------------------------


def test_missing_folder_and_files(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="there is no folder"):
        paperback.load(tmp_path / "nowhere")
    with pytest.raises(ArtefactError, match="is a file; give the folder"):
        paperback.load(saved / CONFIG)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtefactError, match=f"has no {CONFIG}"):
        paperback.load(tmp_path / "empty")
    (saved / WEIGHTS).unlink()
    with pytest.raises(ArtefactError, match=f"has no {WEIGHTS}"):
        paperback.load(saved)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ('{"n_inputs": 4', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1, 2]", "not written by paperback"),
        ('{"n_inputs": 4}', 'no block "paperback"'),
        ('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}', r"transformers model \(llama\)"),
        ('{"_class_name": "UNet2DModel", "_diffusers_version": "0.3"}', r"diffusers model \(UNet2DModel\)"),
        ('{"paperback": {"class": 3}}', "does not say its format"),
        ('{"paperback": {"format": true}}', "does not say its format"),
        ('{"paperback": {"format": 99, "version": "7.1"}}', r"of paperback 7\.1; upgrade"),
        ('{"paperback": {"format": 0, "version": "0.0.1"}}', r"old format 0, of paperback 0\.0\.1"),
        ('{"paperback": {"format": 1}}', 'no good "class"'),
    ],
)
def test_configs_that_are_not_ours(saved: Path, text: str, message: str) -> None:
    (saved / CONFIG).write_text(text)
    with pytest.raises(ArtefactError, match=message):
        paperback.load(saved)


def test_a_config_in_another_encoding(saved: Path) -> None:
    (saved / CONFIG).write_bytes(b"\xff\xfe{\x00}\x00")
    with pytest.raises(ArtefactError, match="is damaged"):
        paperback.load(saved)


def test_a_changed_config_is_noticed(saved: Path) -> None:
    edit(saved, lambda config: config.update(dropout=0.1), sign=False)
    with pytest.raises(ArtefactError, match="not as it was saved"):
        paperback.load(saved)


def test_truncated_weights(saved: Path) -> None:
    data = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(data[:-5])
    with pytest.raises(ArtefactError, match=f"{len(data) - 5} bytes instead of {len(data)}"):
        paperback.load(saved)


def test_a_flipped_bit_in_the_weights(saved: Path) -> None:
    data = bytearray((saved / WEIGHTS).read_bytes())
    data[-3] ^= 4
    (saved / WEIGHTS).write_bytes(data)
    with pytest.raises(ArtefactError, match="SHA-256"):
        paperback.load(saved)


@pytest.mark.parametrize(
    "header", [b"", (2**40).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"[]"]
)
def test_a_bad_safetensors_header_under_a_right_hash(saved: Path, header: bytes) -> None:
    (saved / WEIGHTS).write_bytes(header)
    resign(saved)
    with pytest.raises(ArtefactError, match="not a safetensors file"):
        paperback.load(saved)


def change_one(name: str, tensor: torch.Tensor | None) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_one("first.bias", torch.zeros(9)), r"'first.bias' has shape \(9,\) instead of \(3,\)"),
        (change_one("first.bias", None), "'first.bias' is missing"),
        (change_one("extra", torch.zeros(1)), "'extra' is not one of its tensors"),
        (change_one("steps", torch.zeros(())), r"'steps' is torch.float32 instead of torch.int64"),
        (change_one("first.bias", torch.zeros(3, dtype=torch.int32)), "'first.bias' is torch.int32"),
    ],
)
def test_weights_that_do_not_fit(
    saved: Path, change: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    tensors = load_file(saved / WEIGHTS)
    change(tensors)
    replace_weights(saved, tensors)
    with pytest.raises(ArtefactError, match=message):
        paperback.load(saved)


@pytest.mark.parametrize(
    "arguments", [{"n_inputs": 99_999}, {"unknown": 1}, {"n_inputs": "four"}, {"sizes": []}]
)
def test_arguments_that_the_constructor_does_not_take(saved: Path, arguments: dict[str, Any]) -> None:
    edit(saved, lambda config: config.update(arguments))
    with pytest.raises(ArtefactError, match="does not take the saved arguments"):
        paperback.load(saved)


@pytest.mark.parametrize(
    "address",
    [
        f"{__name__}:Other",
        "os:system",
        "os.path:join",
        "paperback.saving:Saved",
        "paperback.density.interface:DensityModel",
        "paperback.density.baselines:importlib",
        "paperback.density.baselines:DensityModel",
        "paperback.density.baselines:__builtins__",
        "paperback.theory.baselines:Anything",
        "../../evil:Model",
        "paperback.density/../../evil:Model",
        ".evil:Model",
        "",
        ":",
    ],
)
def test_classes_outside_the_catalogue(saved: Path, address: str) -> None:
    edit(saved, lambda config: config[BLOCK].update({"class": address}))
    with pytest.raises(ArtefactError, match="no model of paperback"):
        paperback.load(saved)


def test_the_class_that_is_asked_for_must_be_the_saved_one(saved: Path) -> None:
    with pytest.raises(ArtefactError, match="holds a Net, not a Other"):
        Other.from_pretrained(saved)


def test_code_in_the_folder_is_not_run(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("__init__.py", "model.py", "evil.py"):
        (saved / name).write_text("raise SystemExit('code of the folder was run')")
    (saved / "pytorch_model.bin").write_bytes(b"not a pickle")
    monkeypatch.chdir(saved)
    assert isinstance(paperback.load("."), Net)
    edit(saved, lambda config: config[BLOCK].update({"class": "evil:Model"}))
    with pytest.raises(ArtefactError, match="no model of paperback"):
        paperback.load(".")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_links_that_lead_out_of_the_folder(saved: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / name
    (saved / name).rename(outside)
    (saved / name).symlink_to(outside)
    with pytest.raises(ArtefactError, match="leads out of the folder"):
        paperback.load(saved)


def test_links_inside_the_folder_and_to_the_folder_are_fine(saved: Path, tmp_path: Path) -> None:
    (saved / WEIGHTS).rename(saved / "real.safetensors")
    (saved / WEIGHTS).symlink_to("real.safetensors")
    (tmp_path / "link").symlink_to(saved)
    assert isinstance(paperback.load(tmp_path / "link"), Net)


def test_a_pipe_in_the_place_of_a_file_does_not_hang(saved: Path) -> None:
    (saved / WEIGHTS).unlink()
    os.mkfifo(saved / WEIGHTS)
    with pytest.raises(ArtefactError, match=f"has no {WEIGHTS}"):
        paperback.load(saved)


def test_a_name_on_the_hub_is_asked_for_only_if_it_is_no_path(
    tmp_path: Path, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def snapshot(name: str, **kwargs: Any) -> str:
        asked.append((name, kwargs["revision"]))
        if name == "owner/gone":
            raise OSError("offline")
        return str(cache / "snapshots" / "abc")

    cache = tmp_path / "cache" / "models--owner--net"  # as the Hub lays it out: links to blobs
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots" / "abc").mkdir(parents=True)
    for name in (CONFIG, WEIGHTS):
        (cache / "blobs" / name).write_bytes((saved / name).read_bytes())
        (cache / "snapshots" / "abc" / name).symlink_to(f"../../blobs/{name}")
    monkeypatch.setattr("paperback.saving.module.snapshot_download", snapshot)
    monkeypatch.chdir(tmp_path)
    assert isinstance(Net.from_pretrained("owner/net", revision="v1"), Net)
    with pytest.raises(ArtefactError, match="does not give it: offline"):
        Net.from_pretrained("owner/gone")
    for path in ("runs/nothing", "nothing", "./owner/net", "../owner/net", tmp_path / "owner" / "net"):
        with pytest.raises(ArtefactError, match="there is no folder"):
            Net.from_pretrained(path)
    assert asked == [("owner/net", "v1"), ("owner/gone", None)]


def same_json(a: bytes, b: bytes) -> bool:
    try:
        return bool(json.loads(a) == json.loads(b))
    except ValueError:
        return False


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_truncation_or_flipped_bit_is_refused_or_harmless(saved: Path, data: st.DataObject) -> None:
    """Damage ends in an ArtefactError, except in the white space of the JSON, where nothing changes."""
    path = saved / data.draw(st.sampled_from([CONFIG, WEIGHTS]))
    whole = path.read_bytes()
    original = paperback.load(saved)
    damaged = bytearray(whole)
    if data.draw(st.booleans(), "truncate"):
        del damaged[data.draw(st.integers(0, len(whole) - 1)) :]
    else:
        for place in data.draw(
            st.lists(st.integers(0, 8 * len(whole) - 1), min_size=1, max_size=3, unique=True)
        ):
            damaged[place // 8] ^= 1 << place % 8
    path.write_bytes(damaged)
    try:
        if same_json(bytes(damaged), whole):
            assert equal(paperback.load(saved), original)
        else:
            with pytest.raises(ArtefactError, match=re.escape(str(saved))):
                paperback.load(saved)
    finally:
        path.write_bytes(whole)
