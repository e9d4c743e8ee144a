"""The adaptor for supervised training: settings act where their names say, and a stop costs nothing."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from paperback.errors import DataError
from paperback.search import Choice, Float
from paperback.search.interface import Trainable
from paperback.search.population import PopulationTraining, replay
from paperback.search.population.turn import pack, unpack
from paperback.search.trainables import TorchTrainable, apply_setting

X = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()
DATA = TensorDataset(X, Y)
CONFIG = {"lr": 0.1, "weight_decay": 1e-3, "dropout.p": 0.2}


def network():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 2))


def adam(parameters):
    return torch.optim.AdamW(parameters, lr=1.0)


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def accuracy(model, batch):
    return (model(batch[0]).argmax(1) == batch[1]).float().mean()


def make(steps=3, train=None, **settings):
    if train is None:
        train = DataLoader(DATA, 8, shuffle=True)
    return TorchTrainable(
        network,
        adam,
        loss,
        train,
        DataLoader(DATA, 16),
        steps=steps,
        metrics={"accuracy": accuracy},
        **settings,
    )


def begin(config=CONFIG, seed=0, **settings):
    trainable = make(**settings)
    trainable.setup(config, seed)
    return trainable


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_it_is_a_trainable_that_learns():
    trainable = begin()
    assert isinstance(trainable, Trainable)
    first = trainable.step()
    for _ in range(20):
        last = trainable.step()
    assert last["score"] == -last["loss"]
    assert last["loss"] < first["loss"] / 2
    assert last["accuracy"] > 0.9


@pytest.mark.parametrize("steps", [1, 3, 7, 20])  # 7 batches an epoch
def test_a_training_that_was_stopped_goes_on_alike(steps):
    whole, stopped = begin(steps=steps), begin(steps=steps)
    for _ in range(4):
        expected = whole.step()
    for _ in range(4):
        found = stopped.step()
        again = begin(steps=steps)
        again.load_state_dict(unpack(pack(stopped.state_dict())))
        stopped = again
    assert found == expected
    assert equal(stopped.state_dict(), whole.state_dict())


def test_each_epoch_has_every_row_once_in_another_order():
    seen = []

    def note(model, batch):
        seen.append(batch[0][:, 0])
        return loss(model, batch)

    trainable = TorchTrainable(
        network, adam, note, DataLoader(DATA, 8, shuffle=True), DataLoader(DATA, 50), steps=7
    )
    trainable.setup(CONFIG, 0)
    for _ in range(2):
        trainable.step()
    epochs = [torch.cat(seen[:7]), torch.cat(seen[8:15])]  # one of the validation between them
    assert all(torch.equal(epoch.sort().values, X[:, 0].sort().values) for epoch in epochs)
    assert not torch.equal(*epochs)


def test_it_is_the_training_that_one_would_write():
    """Without shuffling and dropout: AdamW by hand gives the same weights."""
    trainable = begin({"lr": 0.01, "dropout.p": 0.0}, train=DataLoader(DATA, 8), steps=9)
    model = network()
    model.load_state_dict(trainable.model.state_dict())
    model[3].p = 0.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    trainable.step()
    batches = [*DataLoader(DATA, 8), *DataLoader(DATA, 8)][:9]
    for batch in batches:
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
    assert equal(dict(model.state_dict()), trainable.state_dict()["model"])
    model.eval()
    found = trainable.evaluate(DataLoader(DATA, 16))
    assert found["loss"] == pytest.approx(loss(model, (X, Y)).item(), abs=1e-6)
    assert found["accuracy"] == pytest.approx(accuracy(model, (X, Y)).item(), abs=1e-6)


def test_the_users_random_numbers_are_untouched():
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    trainable = begin()
    trainable.step()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_settings_reach_a_live_optimizer_without_touching_its_momenta():
    trainable = begin()
    trainable.step()
    before = pack(trainable.state_dict())
    trainable.reconfigure(
        {"lr": 0.02, "weight_decay": 0.5, "dropout.p": 0.3, "betas.0": 0.7, "1.momentum": 0.4}
    )
    group = trainable.optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["betas"]) == (0.02, 0.5, (0.7, 0.999))
    assert trainable.model[3].p == 0.3
    assert trainable.model[1].momentum == 0.4
    after, earlier = trainable.state_dict(), unpack(before)
    assert equal(after["model"], earlier["model"])
    assert equal(after["optimizer"]["state"], earlier["optimizer"]["state"])


def test_a_name_means_all_parameter_groups_and_all_modules_of_a_class():
    model = nn.ModuleDict({"a": nn.Dropout(0.1), "b": nn.Dropout(0.2), "out": nn.Linear(2, 2)})
    optimizer = torch.optim.SGD([{"params": [model["out"].weight]}, {"params": [model["out"].bias]}], lr=1.0)
    apply_setting(model, optimizer, "dropout.p", 0.5)
    apply_setting(model, optimizer, "b.p", 0.6)
    apply_setting(model, optimizer, "lr", 0.3)
    assert (model["a"].p, model["b"].p) == (0.5, 0.6)
    assert [group["lr"] for group in optimizer.param_groups] == [0.3, 0.3]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rate", "options are lr, betas, eps.*modules are 0, 1, 2"),
        ("dropout.q", "acts on nothing"),
        ("9.p", "acts on nothing"),
        ("0.weight", "acts on nothing"),
        ("betas.2", "does not have"),
        ("lr.0", "does not have"),
    ],
)
def test_a_setting_that_acts_on_nothing_is_refused(name, message):
    with pytest.raises(DataError, match=message):
        begin({name: 0.1})


class Stream(IterableDataset):
    def __iter__(self):
        return iter(DATA)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (DataLoader(Stream(), 8), "a stream"),
        (DataLoader(DATA, None), "a stream"),
        (DataLoader(DATA, 8, shuffle=True, generator=torch.Generator()), "generator of its own"),
        (DataLoader(DATA, 64, drop_last=True), "no batches"),
    ],
    ids=["stream", "single rows", "generator", "empty"],
)
def test_loaders_that_cannot_be_used(train, message):
    with pytest.raises(DataError, match=message):
        make(train=train)


def test_other_bad_input():
    with pytest.raises(DataError, match="steps is 0"):
        make(steps=0)
    trainable = begin()
    with pytest.raises(DataError, match="no rows"):
        trainable.evaluate(DataLoader(TensorDataset(X[:0], Y[:0]), 4))
    with pytest.raises(DataError, match="a batch is a int"):
        trainable.evaluate([3])


def test_a_population_of_it(tmp_path):
    space = {"lr": Float(1e-4, 1.0, log=True), "dropout.p": Choice([0.0, 0.2, 0.5], ordered=True)}
    searcher = PopulationTraining(space, size=4, interval=1, synchronous=True)
    train, val = DataLoader(DATA, 8, shuffle=True), DataLoader(DATA, 50)
    factory = partial(TorchTrainable, network, adam, loss, train, val, steps=4)
    result = searcher.run(factory, 5, store=tmp_path, progress=False)
    model = factory()
    model.setup(result.best_config, 0)
    model.load_state_dict(result.best_state)
    assert -model.evaluate(val)["loss"] == result.best.score
    others = searcher.run(factory, 5, engine="process", workers=2, progress=False)
    assert [t.score for t in others] == [t.score for t in result]
    uncopied = next(m for m in range(4) if m not in {event.child for event in result.events})
    again = replay(factory, result.schedule(uncopied))
    assert again.metrics[-1]["score"] == result.trials[result.members[uncopied]].score
