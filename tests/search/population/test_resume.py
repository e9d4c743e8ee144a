"""A run that was stopped goes on: a synchronous one ends with the same table as if it had not been."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from paperback.errors import ArtefactError, DataError
from paperback.search import Float, read_trials
from paperback.search.population import PopulationTraining

LR = {"lr": Float(1e-3, 0.6, log=True)}


def searcher(**settings):
    return PopulationTraining(LR, **({"size": 5, "interval": 3, "synchronous": True} | settings))


def table(result):
    return [replace(trial, seconds=0.0) for trial in result]


def stopping_after(make, turns):
    """The same, until Ctrl-C."""
    left = iter(range(turns * 3))

    class Stopping(make):
        def step(self):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return super().step()

    return Stopping


@pytest.mark.parametrize("turns", [0, 1, 5, 7, 10, 18, 20])
@pytest.mark.parametrize("exploit", ["truncation", "ttest"])
def test_a_stopped_run_ends_as_it_would_have(noisy, tmp_path, turns, exploit):
    whole = searcher(exploit=exploit).run(noisy, 12, progress=False)
    run = searcher(exploit=exploit)
    if turns < 20:
        with pytest.raises(KeyboardInterrupt):
            run.run(stopping_after(noisy, turns), 12, store=tmp_path, progress=False)
    else:
        run.run(noisy, 12, store=tmp_path, progress=False)
    assert len(read_trials(tmp_path / "trials.jsonl")) == turns
    again = searcher(exploit=exploit).resume(tmp_path, noisy, progress=False)
    assert table(again) == table(whole)
    assert (again.events, again.members) == (whole.events, whole.members)
    assert all(torch.equal(again.best_state[name], whole.best_state[name]) for name in whole.best_state)


def test_a_run_may_go_on_on_another_engine(noisy, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        searcher().run(stopping_after(noisy, 8), 12, store=tmp_path, progress=False)
    again = searcher().resume(tmp_path, noisy, engine="process", workers=2, progress=False)
    assert table(again) == table(searcher().run(noisy, 12, progress=False))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ray"], indirect=True)
@pytest.mark.parametrize("first", ["ray", "local"])
def test_ray_writes_states_that_others_go_on_from(noisy, tmp_path, engine, first):
    second = {"ray": "local", "local": "ray"}[first]

    class Stops(Exception):
        pass

    run, absorbed = searcher(), []

    def stop(member, population, rng):
        absorbed.append(member)
        if len(absorbed) > 7:
            raise Stops
        return (member + 1) % 5 if member == 0 else None

    def go_on(member, population, rng):
        return (member + 1) % 5 if member == 0 else None

    stop.__qualname__ = go_on.__qualname__ = "from the next"
    run = searcher(exploit=stop)
    with pytest.raises(Stops):
        run.run(noisy, 12, store=tmp_path, engine=first, workers=2, progress=False)
    again = searcher(exploit=go_on).resume(tmp_path, noisy, engine=second, workers=2, progress=False)
    assert table(again) == table(searcher(exploit=go_on).run(noisy, 12, progress=False))


def test_a_killed_process_loses_the_turns_under_way_only(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        "import sys, time\n"
        "sys.path.insert(0, sys.argv[2])\n"
        "from tests.search.population.conftest import make_noisy\n"
        "from tests.search.population.test_resume import searcher\n"
        "class Slow(make_noisy()):\n"
        "    def step(self):\n"
        "        time.sleep(float(sys.argv[3]))\n"
        "        return super().step()\n"
        "searcher().run(Slow, 60, store=sys.argv[1], progress=False)\n"
    )
    root = str(Path(__file__).resolve().parents[3])
    process = subprocess.Popen([sys.executable, str(script), str(tmp_path / "store"), root, "0.01"])
    trials = tmp_path / "store" / "trials.jsonl"
    deadline = time.monotonic() + 60
    while len(read_trials(trials)) < 13 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 13 <= len(read_trials(trials)) < 100
    with trials.open("ab") as file:
        file.write(b'{"number": 9')  # what a kill can leave
    from tests.search.population.conftest import make_noisy

    again = searcher().resume(tmp_path / "store", make_noisy(), progress=False)
    assert table(again) == table(searcher().run(make_noisy(), 60, progress=False))


def test_an_asynchronous_run_goes_on_too(noisy, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        searcher(synchronous=False).run(stopping_after(noisy, 9), 12, store=tmp_path, progress=False)
    stored = read_trials(tmp_path / "trials.jsonl")
    again = searcher(synchronous=False).resume(tmp_path, noisy, progress=False)
    assert len(again) == 20
    assert [again.trials[trial.number] for trial in stored] == stored
    assert table(again) == table(searcher(synchronous=False).run(noisy, 12, progress=False))


def test_only_states_that_are_needed_stay(noisy, tmp_path):
    result = searcher().run(noisy, 12, store=tmp_path, progress=False)
    files = {int(path.stem) for path in (tmp_path / "states").iterdir()}
    assert files == set(result.members)


def test_another_run_is_refused(noisy, tmp_path):
    searcher().run(noisy, 12, store=tmp_path, progress=False)
    with pytest.raises(DataError, match=r"whose quantile is 0\.2, not 0\.4"):
        searcher(quantile=0.4).run(noisy, 12, store=tmp_path, progress=False)
    with pytest.raises(DataError, match="whose budget is 12, not 15"):
        searcher().run(noisy, 15, store=tmp_path, progress=False)
    with pytest.raises(ArtefactError, match=r"search\.json cannot be read"):
        searcher().resume(tmp_path / "nowhere", noisy)


def test_trials_that_do_not_follow_are_refused(noisy, tmp_path):
    searcher().run(noisy, 12, store=tmp_path, progress=False)
    path = tmp_path / "trials.jsonl"
    lines = path.read_text().splitlines()
    for change in ({"config": {"lr": 0.5}}, {"parent": 3}, {"details": {}}):
        changed = [*lines[:7], json.dumps(json.loads(lines[7]) | change)]
        path.write_text("\n".join(changed) + "\n")
        with pytest.raises(DataError, match=r"trial \d+ of the store does not follow"):
            searcher().resume(tmp_path, noisy, progress=False)


def test_a_state_that_is_gone_costs_its_member(noisy, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        searcher().run(stopping_after(noisy, 10), 12, store=tmp_path, progress=False)
    damaged = sorted((tmp_path / "states").iterdir())[0]
    damaged.write_bytes(damaged.read_bytes()[:100])
    again = searcher().resume(tmp_path, noisy, progress=False)
    failed = [trial for trial in again if trial.status == "failed"]
    assert failed
    assert all(trial.parent == int(damaged.stem) for trial in failed)
    assert "a stored state is damaged" in failed[0].reason
    assert None not in again.members
