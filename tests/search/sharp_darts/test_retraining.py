"""Training from scratch: rates, cutout, drop-path, and that it learns."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from paperback.errors import DataError
from paperback.search.sharp_darts import (
    PAPER_NETWORK,
    PAPER_TRAINING,
    CellSpace,
    accuracy,
    cosine_power,
    retrain,
)
from paperback.search.sharp_darts.retraining import cut_out


@pytest.fixture
def rows():
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    return x, (x[:, 0] > 0).long()


def test_it_learns_and_the_seed_decides(rows):
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        model = nn.Linear(6, 2)
        history = retrain(model, *rows, epochs=30, batch_size=8, lr=0.1, seed=3, progress=False)
        results.append(model.weight.detach())
    assert torch.equal(*results)
    assert accuracy(model, *rows) > 0.9
    assert not model.training
    assert history.train_loss[-1] < history.train_loss[0]


@pytest.mark.parametrize("power", [2.0, None])
def test_rates_follow_the_schedule_step_by_step(rows, power):
    rates = []

    def note(optimizer, *_):
        rates.append(optimizer.param_groups[0]["lr"])

    handle = register_optimizer_step_post_hook(note)
    retrain(nn.Linear(6, 2), *rows, epochs=3, batch_size=8, lr=0.1, power=power, warmup=0.4, progress=False)
    handle.remove()
    expected = [0.1] * 15 if power is None else cosine_power(range(1, 16), 15, 0.1, 1e-4, warmup=2)
    np.testing.assert_allclose(rates, expected)


def test_drop_path_rises_from_epoch_to_epoch(monkeypatch):
    x, y = torch.randn(8, 1, 8, 8), torch.arange(8) % 2
    space = CellSpace(cells=3, nodes=1, width=2, channels=1, classes=2)
    network = space.build(space.random(torch.Generator().manual_seed(0)), drop_path=0.4)
    seen, forward = [], type(network).forward

    def note(self, images):
        if self.training:
            seen.append(self.drop_path)
        return forward(self, images)

    monkeypatch.setattr(type(network), "forward", note)
    retrain(network, x, y, epochs=4, batch_size=8, progress=False)
    assert seen == pytest.approx([0.0, 0.1, 0.2, 0.3])


def test_the_auxiliary_classifier_is_trained():
    x, y = torch.randn(4, 1, 32, 32), torch.arange(4) % 2
    space = CellSpace(cells=3, nodes=1, width=2, channels=1, classes=2)
    network = space.build(space.random(torch.Generator().manual_seed(0)), auxiliary=True)
    before = network.auxiliary[-1].weight.detach().clone()
    retrain(network, x, y, epochs=1, batch_size=4, cutout=6, val=(x, y), progress=False)
    assert not torch.equal(before, network.auxiliary[-1].weight)


def test_cut_out_zeroes_one_square():
    images = torch.ones(500, 2, 12, 10)
    cut = cut_out(images, 4, torch.Generator().manual_seed(0))
    assert torch.equal(cut[:, 0], cut[:, 1])
    holes = (cut[:, 0] == 0).sum((1, 2))
    assert holes.max() == 16
    assert holes.min() >= 4  # a corner
    rows = (cut[:, 0] == 0).any(2).sum(1)
    columns = (cut[:, 0] == 0).any(1).sum(1)
    assert torch.equal(rows * columns, holes)
    assert (cut == 0).any(0).all()
    assert images.all()


def test_the_papers_settings_are_settings():
    settings = PAPER_TRAINING | {"epochs": 1, "warmup": 0, "cutout": 0}
    retrain(nn.Linear(3, 2), torch.randn(8, 3), torch.arange(8) % 2, **settings, progress=False)
    assert PAPER_NETWORK.keys() <= {"cells", "width", "drop_path", "auxiliary"}


def test_bad_settings(rows):
    for settings, words in (
        ({"epochs": 0}, "epochs is 0"),
        ({"epochs": 1, "batch_size": 0}, "batch_size is 0"),
        ({"epochs": 1, "cutout": -1}, "cutout is -1"),
        ({"epochs": 1, "power": 0.5}, "power is 0.5"),
    ):
        with pytest.raises(DataError, match=words):
            retrain(nn.Linear(6, 2), *rows, **settings, progress=False)
    with pytest.raises(DataError, match="39 rows"):
        retrain(nn.Linear(6, 2), rows[0], rows[1][1:], epochs=1, progress=False)
