"""Trainings as processes: killed and resumed, and launched in two."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

PROGRAM = str(Path(__file__).with_name("program.py"))


def run(*arguments: str | Path, processes: int = 1) -> int:
    command = [sys.executable]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if (
        processes > 1
    ):  # --cpu would need MPI: without it accelerate starts one process only, and does not say so
        environment["ACCELERATE_USE_CPU"] = "true"
        command += ["-m", "accelerate.commands.launch", "--multi_gpu", f"--num_processes={processes}"]
        command += [
            "--num_machines=1",
            "--mixed_precision=no",
            "--dynamo_backend=no",
            "--main_process_port=0",
        ]
    result = subprocess.run(
        [*command, PROGRAM, *map(str, arguments)], env=environment, capture_output=True, text=True
    )
    if result.returncode not in (0, -signal.SIGKILL):
        raise AssertionError(result.stdout + result.stderr)
    return result.returncode


def outcome(out: Path, rank: int = 0) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    return load_file(f"{out}.{rank}.safetensors"), json.loads(Path(f"{out}.{rank}.json").read_text())


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_killed_twice_and_resumed_it_is_bit_for_bit_the_undisturbed_training(tmp_path: Path) -> None:
    run(tmp_path / "calm", "--checkpoint", tmp_path / "first")
    arguments = (tmp_path / "killed", "--checkpoint", tmp_path / "second")
    # One epoch calls the loss 6 times for training and 2 times for validation.
    assert run(*arguments, "--kill-at", "19") == -signal.SIGKILL
    assert run(*arguments, "--kill-at", "13") == -signal.SIGKILL
    index = json.loads((tmp_path / "second" / "checkpoint.json").read_text())
    assert index["file"] == "epoch-000003.safetensors"
    assert run(*arguments) == 0
    weights, facts = outcome(tmp_path / "calm")
    weights_again, facts_again = outcome(tmp_path / "killed")
    assert_same(weights, weights_again)
    assert facts == facts_again


@pytest.mark.slow
def test_two_processes_train_the_same_model_as_one(tmp_path: Path) -> None:
    run(tmp_path / "one", "--plain")
    run(tmp_path / "two", "--plain", processes=2)
    weights, facts = outcome(tmp_path / "one")
    for rank in (0, 1):
        weights_two, facts_two = outcome(tmp_path / "two", rank)
        for name in weights:
            assert torch.allclose(weights[name], weights_two[name], atol=1e-5), name
        assert facts_two["first"][0] == pytest.approx(facts["first"][0], rel=1e-4)
        assert facts_two["first"][1] == pytest.approx(facts["first"][1], rel=1e-4)
        assert facts_two["second"] == pytest.approx(facts["second"], rel=1e-4)


@pytest.mark.slow
def test_two_processes_agree_with_noise_and_resume_from_their_checkpoint(tmp_path: Path) -> None:
    """Masks and dropout differ between processes, weights and running statistics do not."""
    run(tmp_path / "two", "--checkpoint", tmp_path / "folder", processes=2)
    assert_same(outcome(tmp_path / "two", 0)[0], outcome(tmp_path / "two", 1)[0])
    assert outcome(tmp_path / "two", 0)[1] == outcome(tmp_path / "two", 1)[1]
    run(tmp_path / "again", "--checkpoint", tmp_path / "folder", processes=2)
    assert_same(outcome(tmp_path / "two", 0)[0], outcome(tmp_path / "again", 1)[0])
