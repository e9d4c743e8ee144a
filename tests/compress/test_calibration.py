"""Streamed statistics against those of one pass over everything, and the order of the stream."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.compress.models import bert, cnn, gpt2, llama, picture_data, token_data, tokens
from torch import Tensor, nn

from paperback.compress import Data
from paperback.compress.calibration import Calibration, stream
from paperback.compress.data import run
from paperback.compress.statistics import KINDS, LayerStatistics
from paperback.errors import ArtefactError, DataError
from paperback.networks.surgery import find_layers, input_matrix, set_weight_matrix, weight_matrix

# -- statistics ----------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_batches_of_any_length_give_what_all_at_once_gives(lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(2, n, 5, generator=generator) * 3 + 1000 for n in lengths]
    streamed = LayerStatistics(KINDS, torch.Generator().manual_seed(0), sample_rows=4)
    for part in parts:
        streamed.update(part)
    rows = torch.cat([part.reshape(-1, 5) for part in parts]).double()
    torch.testing.assert_close(streamed.mean, rows.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(streamed.variance, rows.var(0, unbiased=False), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(streamed.square_sum, rows.square().sum(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(streamed.gram.double(), rows.T @ rows, rtol=1e-5, atol=0)
    torch.testing.assert_close(streamed.abs_max.double(), rows.abs().amax(0))
    torch.testing.assert_close(streamed.abs_mean, rows.abs().mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(streamed.sequence_sum, rows.sum(0) / (2 * len(parts)), rtol=1e-6, atol=0)
    assert len(streamed.sample) == min(4, len(rows))
    assert all(any(torch.equal(row, other.float()) for other in rows) for row in streamed.sample)


def test_masked_tokens_are_not_counted():
    x, mask = torch.randn(3, 4, 2), torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    masked, bare = LayerStatistics(KINDS - {"sample"}), LayerStatistics(KINDS - {"sample"})
    masked.update(x, mask)
    bare.update(x[mask.bool()][None])
    assert masked.count == 7
    torch.testing.assert_close(masked.mean, bare.mean)
    torch.testing.assert_close(masked.gram, bare.gram)
    torch.testing.assert_close(masked.sequence_sum * 3, bare.sequence_sum)


def test_the_sample_is_uniform():
    statistics = LayerStatistics(frozenset({"sample"}), torch.Generator().manual_seed(0), sample_rows=500)
    for start in range(0, 2000, 100):
        statistics.update(torch.arange(start, start + 100).float().view(1, 100, 1))
    chosen = statistics.sample.flatten()
    assert len(chosen.unique()) == 500
    assert abs(float(chosen.mean()) - 999.5) < 4 * 577 / 500**0.5


def test_what_was_not_gathered_is_named():
    with pytest.raises(DataError, match="'gram'"):
        _ = LayerStatistics(frozenset({"moments"})).gram
    with pytest.raises(DataError, match="no token"):
        _ = LayerStatistics(frozenset({"moments"})).mean
    with pytest.raises(DataError, match="no statistic 'median'"):
        LayerStatistics(frozenset({"median"}))


# -- the stream ----------------------------------------------------------------------------------------------


def watched(model: nn.Module, layers: dict[str, nn.Module], data: Data) -> dict[str, Tensor]:
    """What every layer takes in, over all batches at once."""
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}
    handles = [
        layer.register_forward_pre_hook(
            lambda m, a, n=name: seen[n].append(input_matrix(m, a[0]).flatten(0, 1))
        )
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        for batch in data.batches("train"):
            run(model, batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts).double() for name, parts in seen.items()}


def gathered(model: nn.Module, data: Data, **how: object) -> dict[str, LayerStatistics]:
    statistics: dict[str, LayerStatistics] = {}
    visit = lambda name, layer, stats: statistics.update({name: stats})  # noqa: E731
    stream(
        model, find_layers(model).layers, data,
        Calibration(visit, frozenset({"moments", "gram"}), **how), progress=False,
    )  # fmt: skip
    return statistics


@pytest.mark.parametrize("order", ["sequential", "together"])
@pytest.mark.parametrize(
    ("build", "data"), [(llama, token_data), (gpt2, token_data), (bert, token_data), (cnn, picture_data)]
)
def test_statistics_are_those_of_one_full_pass(build, data, order):
    model, data = build(), data()
    expected = watched(model, find_layers(model).layers, data)
    for name, statistics in gathered(model, data, order=order).items():
        assert statistics.count == len(expected[name])
        torch.testing.assert_close(statistics.mean, expected[name].mean(0), atol=1e-5, rtol=1e-4)
        gram = expected[name].T @ expected[name]
        assert float((statistics.gram.double() - gram).abs().max()) < 1e-4 * float(gram.abs().max())


def test_layers_with_one_input_share_their_statistics():
    statistics = gathered(llama(), token_data())
    at = "model.layers.0.self_attn."
    assert statistics[at + "q_proj"] is statistics[at + "v_proj"]
    assert statistics[at + "q_proj"] is not statistics[at + "o_proj"]


@pytest.mark.parametrize("propagate", [True, False])
def test_compressed_layers_feed_the_next(propagate):
    """After the first block is set to zero, the second sees what that gives, or else the original input."""
    model, data = llama(), token_data()
    original = watched(model, find_layers(model).layers, data)
    seen: dict[str, Tensor] = {}

    def visit(name: str, layer: nn.Module, stats: LayerStatistics) -> None:
        seen[name] = stats.mean.clone()
        if "layers.0" in name:
            set_weight_matrix(layer, torch.zeros_like(weight_matrix(layer)))

    how = Calibration(visit, frozenset({"moments"}), propagate=propagate)
    stream(model, find_layers(model).layers, data, how, progress=False)
    changed = watched(model, find_layers(model).layers, data)
    second = "model.layers.1.self_attn.q_proj"
    wanted = changed if propagate else original
    torch.testing.assert_close(seen[second], wanted[second].mean(0), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(original[second].mean(0), changed[second].mean(0), atol=1e-3)
    output = "model.layers.0.self_attn.o_proj"  # within a block, the layers before are compressed already
    torch.testing.assert_close(seen[output], changed[output].mean(0), atol=1e-5, rtol=1e-4)


def test_hidden_states_on_disk_change_nothing():
    in_memory = gathered(llama(), token_data())
    on_disk = gathered(llama(), token_data(), cache_limit=0)
    for name, statistics in in_memory.items():
        assert torch.equal(statistics.gram, on_disk[name].gram)


def test_padding_is_left_out_of_the_statistics():
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[:, 9:] = 0
    padded = gathered(llama(), Data([{"input_ids": ids, "attention_mask": mask}]))
    short = gathered(llama(), Data([ids[:, :9]]))
    for name, statistics in padded.items():
        assert statistics.count == 72
        torch.testing.assert_close(statistics.mean, short[name].mean, atol=1e-5, rtol=1e-4)


class Parallel(nn.Module):
    """Its two blocks see the same input."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.unused = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](x) + self.blocks[1](x)


def test_blocks_that_are_no_chain_are_gone_through_at_once():
    notes: list[str] = []
    skipped: dict[str, str] = {}
    data = Data([torch.randn(6, 4)])
    model = Parallel()
    statistics = gathered(model, data, note=notes.append, skip=skipped.__setitem__)
    assert set(statistics) == {"blocks.0", "blocks.1"}
    assert "at once" in notes[0]
    assert "no calibration token" in skipped["unused"]


def test_infinite_activations_name_their_layer():
    model = llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(3e38)
    with pytest.raises(DataError, match=r"layers\.0\.mlp\.down_proj"):
        gathered(model, token_data())


# -- memory -------------------------------------------------------------------------------------------------


def test_peak_memory_is_bounded_by_one_block():
    """A wide network: beside the model, memory holds what one block needs, not the Gram matrices of all."""
    program = """
import sys, torch
from torch import nn
from paperback.compress import Data
from paperback.compress.calibration import Calibration, stream
from paperback.networks.surgery import find_layers
from paperback.study.measure import peak_memory, reset_peak_memory
class Block(nn.Module):
    def __init__(self): super().__init__(); self.up = nn.Linear(1024, 1024); self.down = nn.Linear(1024, 1024)
    def forward(self, x): return x + self.down(self.up(x).relu())
class Net(nn.Module):
    def __init__(self): super().__init__(); self.blocks = nn.ModuleList(Block() for _ in range(12))
    def forward(self, x):
        for block in self.blocks: x = block(x)
        return x
kept = []
def visit(name, layer, stats):
    layer.weight.data.mul_(0.5)
    if sys.argv[1] == "all": kept.append(stats)
torch.set_num_threads(1)
data = Data(lambda: (torch.randn(256, 1024, generator=torch.Generator().manual_seed(i)) for i in range(4)))
net = Net()
layers = find_layers(net).layers
how = Calibration(visit, frozenset({"moments", "gram"}))
few = {name: layer for name, layer in layers.items() if name.startswith("blocks.0.")}
stream(net, few, data, how, progress=False)  # what is loaded at first use is there
kept.clear()
reset_peak_memory(); before = peak_memory()
stream(net, layers, data, how, progress=False)
print(peak_memory() - before)
"""

    def peak(what: str) -> int:
        command = [sys.executable, "-c", program, what]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
        )
        return int(done.stdout)

    all_grams = 24 * 4 * 2**20
    assert peak("one") < all_grams / 2  # 16 MB of hidden states, Grams and activations, and the allocator's
    assert peak("all") > all_grams  # the measurement sees it when they are all kept


# -- interruption --------------------------------------------------------------------------------------------


def halve(model: nn.Module, folder: Path | None, stop_at: str = "", method: str = "halve") -> list[str]:
    """Halve every weight, in proportion to its statistics; return what was visited."""
    visited: list[str] = []

    def visit(name: str, layer: nn.Module, stats: LayerStatistics) -> None:
        if stop_at and stop_at in name:
            raise KeyboardInterrupt
        visited.append(name)
        set_weight_matrix(layer, weight_matrix(layer) * (0.5 + 0.1 * stats.mean.tanh().float()))

    how = Calibration(visit, frozenset({"moments"}))
    stream(model, find_layers(model).layers, token_data(), how, folder=folder, method=method, progress=False)
    return visited


def test_an_interrupted_stream_goes_on_at_the_block(tmp_path):
    undisturbed = llama(layers=3)
    halve(undisturbed, None)
    folder = tmp_path / "begun"
    with pytest.raises(KeyboardInterrupt):
        halve(llama(layers=3), folder, stop_at="layers.1.mlp")
    resumed = llama(layers=3)
    visited = halve(resumed, folder)
    assert not any("layers.0." in name for name in visited)
    for name, value in undisturbed.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert not folder.exists()


def test_the_begun_work_of_another_call_is_refused(tmp_path):
    folder = tmp_path / "begun"
    with pytest.raises(KeyboardInterrupt):
        halve(llama(), folder, stop_at="layers.1")
    with pytest.raises(ArtefactError, match="another model, method or data"):
        halve(llama(), folder, method="quarter")
    other = tmp_path / "other"
    other.mkdir()
    (other / "letter.txt").write_text("mine")
    with pytest.raises(ArtefactError, match="other files"):
        halve(llama(), other)
    assert (other / "letter.txt").exists()
