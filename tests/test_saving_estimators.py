"""Saving scikit-learn estimators: everything that was fitted comes back, and nothing else is taken."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.base import BaseEstimator
from sklearn.exceptions import NotFittedError
from torch import nn

import paperback
from paperback import catalogue
from paperback.errors import ArtefactError
from paperback.saving import BLOCK, CONFIG, WEIGHTS, SavedEstimator
from paperback.saving.folder import config_digest, digest


class Fitted(SavedEstimator, BaseEstimator):
    """An estimator with an attribute of every kind."""

    def __init__(self, width=3, prior="flat", limit=float("inf")):
        self.width = width
        self.prior = prior
        self.limit = limit

    def fit(self, X, y=None):
        generator = torch.Generator().manual_seed(0)
        self.n_features_in_ = np.int64(2)
        self.classes_ = np.array(["no", "yes"])
        self.names_ = np.array(["a", "b"], dtype=object)
        self.mean_ = np.arange(6.0).reshape(2, 3).T  # not contiguous
        self.counts_ = np.arange(3)
        self.draws_ = torch.randn(4, 2, generator=generator, dtype=torch.float64)
        self.view_ = self.draws_[::2]
        self.diagnostics_ = {"loss": 0.1, "steps": np.int32(5)}
        self.network_ = nn.Linear(2, self.width).double()
        self.cache = object()  # not fitted: no underscore at its end
        return self

    def _build_modules(self):
        return {"network_": nn.Linear(int(self.n_features_in_), self.width)}


@pytest.fixture
def folder(tmp_path):
    Fitted(width=5).fit(None).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change(folder, edit):
    """Edit config and tensors, and make every digest right again, as an attacker would."""
    config = json.loads((folder / CONFIG).read_text())
    tensors = load_file(folder / WEIGHTS)
    edit(config, tensors)
    save_file(tensors, folder / WEIGHTS)
    config[BLOCK]["weights_sha256"] = digest(folder / WEIGHTS)
    config[BLOCK]["weights_bytes"] = (folder / WEIGHTS).stat().st_size
    config[BLOCK]["config_sha256"] = config_digest(config)
    (folder / CONFIG).write_text(json.dumps(config))


def test_every_kind_of_attribute_comes_back(folder):
    before, after = Fitted(width=5).fit(None), Fitted.from_pretrained(folder)
    assert after.get_params() == before.get_params()
    assert after.n_features_in_ == 2
    for name in ("classes_", "names_", "mean_", "counts_"):
        np.testing.assert_array_equal(getattr(after, name), getattr(before, name))
        assert getattr(after, name).dtype == getattr(before, name).dtype
    torch.testing.assert_close(after.draws_, before.draws_, rtol=0, atol=0)
    torch.testing.assert_close(after.view_, before.view_, rtol=0, atol=0)
    assert after.diagnostics_ == {"loss": 0.1, "steps": 5}
    assert after.network_.weight.dtype == torch.float64
    assert after.network_.weight.shape == (5, 2)
    assert not hasattr(after, "cache")


def test_load_finds_the_class_of_a_catalogued_module(folder, monkeypatch):
    with pytest.raises(ArtefactError, match="no model of paperback"):
        paperback.load(folder)
    module = Fitted.__module__
    method = SimpleNamespace(object=f"{module}:Another", module=module, slug="fitted")
    monkeypatch.setattr(catalogue, "methods", lambda: (method,))
    monkeypatch.setitem(__import__("sys").modules, module, __import__("sys").modules[__name__])
    assert isinstance(paperback.load(folder), Fitted)


def test_the_unfitted_and_the_unwritable_are_refused(tmp_path):
    with pytest.raises(NotFittedError):
        Fitted().save_pretrained(tmp_path / "model")
    with pytest.raises(ArtefactError, match="parameter 'prior'"):
        Fitted(prior=print).fit(None).save_pretrained(tmp_path / "model")
    model = Fitted().fit(None)
    model.function_ = print
    with pytest.raises(ArtefactError, match="'function_'"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    assert list(tmp_path.iterdir()) == []


def test_saving_again_replaces_and_other_folders_are_kept(folder, tmp_path):
    Fitted(width=2).fit(None).save_pretrained(folder)
    assert Fitted.from_pretrained(folder).width == 2
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "config.json").write_text("{}")
    with pytest.raises(ArtefactError, match="not a model"):
        Fitted().fit(None).save_pretrained(tmp_path / "notes")


@pytest.mark.parametrize("edit", [
    lambda config, tensors: config["fitted"].update(get_params=1),
    lambda config, tensors: config["fitted"].update(__class__=1),
    lambda config, tensors: config["parameters"].update(unknown=1),
    lambda config, tensors: config.pop("fitted"),
    lambda config, tensors: config["arrays"].update(gone_=None),
    lambda config, tensors: config["arrays"].update(classes_={"values": [1], "dtype": "nonsense"}),
    lambda config, tensors: tensors.pop("network_.weight"),
    lambda config, tensors: tensors.update({"network_.weight": torch.zeros(1, 1)}),
    lambda config, tensors: tensors.update(fit=torch.zeros(1)),
])  # fmt: skip
def test_what_does_not_fit_is_refused(folder, edit):
    change(folder, edit)
    with pytest.raises(ArtefactError):
        Fitted.from_pretrained(folder)


def test_another_class_is_named(folder):
    class Other(Fitted):
        pass

    with pytest.raises(ArtefactError, match="holds a Fitted"):
        Other.from_pretrained(folder)
