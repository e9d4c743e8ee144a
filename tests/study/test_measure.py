from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch import nn

from paperback.errors import DataError
from paperback.study import measure


def test_parameters_count_shared_ones_once_and_no_buffers() -> None:
    shared = nn.Linear(3, 3, bias=False)
    module = nn.Sequential(shared, shared, nn.BatchNorm1d(3))
    module[2].bias.requires_grad_(False)
    assert measure.parameters(module) == 9 + 6
    assert measure.parameters(module, trainable_only=True) == 9 + 3


def test_size_on_disk(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 10)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b").write_bytes(b"x" * 5)
    (tmp_path / "sub" / "link").symlink_to(tmp_path / "a")
    assert measure.size_on_disk(tmp_path / "a") == 10
    assert measure.size_on_disk(tmp_path) == 15
    with pytest.raises(DataError, match="does not exist"):
        measure.size_on_disk(tmp_path / "c")


def test_flops_of_layers_by_hand() -> None:
    assert measure.flops(nn.Linear(4, 5), torch.zeros(3, 4)) == 2 * 3 * 4 * 5
    # A 3x3 convolution on 8x8 without padding has 6x6 outputs.
    assert measure.flops(nn.Conv2d(2, 7, 3), torch.zeros(1, 2, 8, 8)) == 2 * 36 * 9 * 2 * 7
    assert measure.flops(torch.relu, torch.zeros(10)) == 0


def test_a_stopwatch_stops() -> None:
    with measure.Stopwatch() as watch:
        time.sleep(0.02)
        inside = watch.seconds
    stopped = watch.seconds
    assert 0.02 <= inside <= stopped < 1
    assert watch.seconds == stopped


def test_peak_memory_sees_what_was_held_and_can_begin_again() -> None:
    block = 200 * 2**20
    before = measure.peak_memory()
    held = torch.ones(block // 4)
    peak = measure.peak_memory()
    assert peak >= held.numel() * 4
    del held
    assert measure.peak_memory() >= max(before, block)
    if measure.reset_peak_memory():
        assert measure.peak_memory() < peak - block // 2
