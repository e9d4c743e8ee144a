"""A member's turn, and the states between turns."""

import numpy as np
import pytest
import torch
from torch import nn

from paperback.errors import ArtefactError, DataError
from paperback.search.engine import LocalEngine, open_engine
from paperback.search.population.turn import Files, Objects, Turn, pack, take, unpack


def turn(number=0, state=None, steps=3, lr=0.1, before=0.1):
    return Turn(number, 7, {"lr": lr}, {"lr": before}, state, steps)


def test_states_come_back_as_they_were():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "torch": torch.Generator().manual_seed(3).get_state(),
        "numpy": np.random.default_rng(3).bit_generator.state,
        "plain": [1, 2.5, "a", None, True, (3, {"b": 4})],
    }
    found = unpack(pack(state))
    assert found["numpy"] == state["numpy"]
    assert found["plain"] == state["plain"]
    assert found["optimizer"]["param_groups"] == state["optimizer"]["param_groups"]
    slot = state["optimizer"]["state"][0]
    assert all(torch.equal(found["optimizer"]["state"][0][name], slot[name]) for name in slot)
    assert torch.equal(found["model"]["weight"], model.weight)
    found["model"]["weight"].zero_()
    assert not torch.equal(found["model"]["weight"], model.weight)  # nobody shares memory


@pytest.mark.parametrize("value", [np.zeros(2), np.float64(1.0), print, nn.ReLU(), lambda: 0])
def test_what_could_not_be_read_back_is_refused(value):
    with pytest.raises(DataError, match="tensors, numbers, text"):
        pack({"x": [value]})


def test_a_damaged_state_is_named():
    content = pack({"x": torch.zeros(100)})
    for damaged in (b"", content[:50], content[:-30], b"x" * 200):
        with pytest.raises(ArtefactError, match="a stored state is damaged"):
            unpack(damaged)


def test_a_turn_in_two_parts_is_the_turn(noisy):
    metrics, state = take(noisy, turn(steps=6), None)
    _, half = take(noisy, turn(steps=3), None)
    again, end = take(noisy, turn(1, 0), half)
    assert again == metrics
    assert all(torch.equal(unpack(end)[name], value) for name, value in unpack(state).items())


def test_changed_settings_are_given_to_what_has_its_state(noisy):
    calls = []

    class Spy(noisy):
        def setup(self, config, seed):
            calls.append(("setup", config["lr"], seed))
            super().setup(config, seed)

        def load_state_dict(self, state):
            calls.append(("load",))
            super().load_state_dict(state)

        def reconfigure(self, config):
            calls.append(("reconfigure", config["lr"]))
            super().reconfigure(config)

    _, state = take(noisy, turn(), None)
    take(Spy, turn(1, 0, lr=0.2), state)
    assert calls == [("setup", 0.1, 7), ("reconfigure", 0.1), ("load",), ("reconfigure", 0.2)]


def test_files(noisy, tmp_path):
    engine, states = LocalEngine(), Files(tmp_path)
    for number, state in ((0, None), (1, 0), (2, 1)):
        task = states.begin(engine, noisy, turn(number, state))
        assert task.outcome.error is None
        states.finish(task, number)
    assert torch.equal(states.read(2)["x"], unpack(take(noisy, turn(steps=9), None)[1])["x"])
    (tmp_path / ".00000009.pt.tmp").write_bytes(b"what a kill left")
    again = Files(tmp_path)
    again.keep_only({1, 5})
    assert [path.name for path in tmp_path.iterdir()] == ["00000001.pt"]
    with pytest.raises(ArtefactError, match=r"00000000\.pt cannot be read"):
        again.read(0)


@pytest.mark.slow
def test_objects_outlive_the_worker_that_made_them(noisy, cluster, tmp_path):
    import os
    import signal
    import time

    class Pid(noisy):
        def step(self):
            super().step()
            return {"pid": float(os.getpid())}

    with open_engine("ray", 2) as engine:
        states = Objects(engine, Pid, tmp_path)
        task = states.begin(engine, Pid, turn())
        engine.wait([task])
        states.finish(task, 0)
        os.kill(int(task.outcome.value["pid"]), signal.SIGKILL)
        time.sleep(2)  # until Ray knows; before, it could give the dead worker a call
        expected = unpack(take(noisy, turn(), None)[1])
        assert torch.equal(states.read(0)["x"], expected["x"])
        following = states.begin(engine, Pid, turn(1, 0))
        engine.wait([following])
        assert following.outcome.error is None
        later = Objects(engine, Pid, tmp_path)  # another sitting reads what was written
        assert torch.equal(later.read(0)["x"], expected["x"])
