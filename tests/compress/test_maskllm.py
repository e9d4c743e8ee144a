"""MaskLLM: patterns, laws, priors and gradients against brute force; frozen weights; packed masks."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tests.compress.models import cnn, gpt2, llama, picture_data, token_data, tokens
from torch import Tensor, nn

from paperback.compress import Budget, Compressed, Data
from paperback.compress.data import default_loss, run
from paperback.compress.maskllm import (
    MaskDistribution,
    MaskLLM,
    MaskNM,
    apply_masks,
    load_masks,
    remove_masks,
    save_masks,
)
from paperback.compress.masks import nm_mask, nm_patterns
from paperback.errors import ArtefactError, BudgetError, DataError
from paperback.networks.surgery import find_layers, weight_matrix
from paperback.numerics.relaxation import gumbel_noise
from paperback.testing.compress import check_compressor
from paperback.training import generator

PATTERNS = [(1, 4), (2, 4), (4, 8)]
QUICK = {"prior": "magnitude", "steps": 4, "lr": 1e-2, "batch_size": 4}


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    return llama()


@pytest.fixture(scope="module")
def result(dense: nn.Module) -> Compressed:
    method = MaskLLM(prior="magnitude", steps=12, lr=2e-2, batch_size=4)
    return method.compress(dense, token_data(), latency_runs=0, progress=False)


# -- the law of a mask ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_the_mode_keeps_n_of_every_m(n: int, m: int) -> None:
    law = MaskDistribution((6, 3 * m), n, m, generator(0))
    assert law.gates.shape == (math.comb(m, n), 18)
    assert len({tuple(row) for row in law.patterns.tolist()}) == math.comb(m, n)
    assert bool((law.mode().view(-1, m).sum(1) == n).all())
    sample = law.sample(100.0, 1.0, generator=generator(1))
    assert torch.allclose(sample.view(-1, m).sum(1), torch.full((18,), float(n)), atol=1e-5)


def test_a_sharp_law_without_noise_is_its_mode() -> None:
    law = MaskDistribution((8, 16), 2, 4, generator(0))
    sample = law.sample(1e5, 0.01, noise=torch.zeros_like(law.gates))
    assert torch.equal(sample.round().bool(), law.mode())
    hard = law.sample(1.0, 1.0, generator=generator(2), hard=True)
    assert bool(((hard == 0) | (hard == 1)).all())


def test_cold_samples_have_the_mean_of_the_law() -> None:
    law = MaskDistribution((1, 4), 2, 4, generator(0))
    draws, n = generator(3), 20_000
    with torch.no_grad():
        law.gates.copy_(torch.tensor([[0.3, 0.0, -0.2, 0.1, 0.4, -0.5]]).T)
        noise = gumbel_noise((6, n), draws)
        many = MaskDistribution((n, 4), 2, 4)
        many.gates.copy_(law.gates.expand(6, n))
        mean = many.sample(3.0, 1e-3, noise=noise).mean(0)
    expected = law.expected(3.0).flatten()
    error = (expected * (1 - expected) / n).sqrt()
    assert bool(((mean - expected).abs() < 3.5 * error).all())
    assert torch.allclose(expected, (3.0 * law.gates[:, 0]).softmax(0) @ nm_patterns(2, 4))


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_a_strong_prior_is_the_mask_and_moves_no_mean(n: int, m: int) -> None:
    law = MaskDistribution((5, 4 * m), n, m, generator(0))
    prior = nm_mask(torch.rand(5, 4 * m, generator=generator(4)), n, m)
    before, deviation = law.gates.detach().clone(), law.gates.std()
    law.add_prior(prior, 1e4)
    assert torch.equal(law.mode(), prior)
    shift = (law.gates.detach() - before) / (deviation.detach() * 1e4)
    assert float(shift.mean(0).abs().max()) < 1e-4
    assert float(shift.max()) == pytest.approx(n - n**2 / m, abs=1e-4)


def test_gradient_of_the_gates_is_that_of_finite_differences() -> None:
    law = MaskDistribution((3, 8), 2, 4, generator(0)).double()
    weight, x = torch.randn(3, 8, generator=generator(5)).double(), torch.randn(4, 8).double()
    noise = gumbel_noise(law.gates.shape, generator(6), dtype=torch.float64)

    def loss(gates: Tensor) -> Tensor:
        weights = ((50 * gates + noise) / 2.0).softmax(0).T
        return F.linear(x, weight * (weights @ law.patterns).view(3, 8)).square().sum()

    assert torch.autograd.gradcheck(loss, law.gates.detach().clone().requires_grad_())
    direct = F.linear(x, weight * law.sample(50.0, 2.0, noise=noise)).square().sum()
    gates = law.gates.detach().clone().requires_grad_()
    expected = torch.autograd.grad(loss(gates), gates)[0]
    assert torch.allclose(torch.autograd.grad(direct, law.gates)[0], expected, rtol=1e-10)


# -- a whole compression -------------------------------------------------------------------------------------


def test_kept_weights_are_the_dense_ones(dense: nn.Module, result: Compressed) -> None:
    for name, layer in find_layers(dense).layers.items():
        old, new = weight_matrix(layer), weight_matrix(result.model.get_submodule(name))
        mask = result.extras["masks"][name].dense()
        assert bool((mask.view(-1, 4).sum(1) == 2).all())
        assert torch.equal(new, old * mask), name
    assert not any("parametrizations" in name for name in result.model.state_dict())
    assert all(p.requires_grad for p in result.model.parameters())


def test_training_lowers_the_loss_and_sharpens_the_law(result: Compressed) -> None:
    history = result.extras["history"]
    assert history["step"] == list(range(12))
    assert history["max_prob"][-1] > history["max_prob"][0]
    assert sum(history["changed"]) > 0
    assert all(b > 0 for b in history["kept_square"])


def test_one_step_is_the_published_one(dense: nn.Module) -> None:
    """One step without regularisation is a plain step of AdamW on the loss of the sampled masks."""
    settings = {"prior": None, "steps": 1, "lr": 1e-2, "batch_size": 8, "reg": 0.0}
    rows = tokens()
    ours = MaskLLM(**settings).compress(dense, rows, latency_runs=0, progress=False)
    losses = ours.extras["history"]["loss"]
    layers = find_layers(dense).layers
    laws = {
        name: MaskDistribution(tuple(weight_matrix(layer).shape), 2, 4, generator(0, "gates", name))
        for name, layer in layers.items()
    }
    draws = generator(0, "loss", 0, 0)
    weights = {
        f"{name}.weight": layers[name].weight.detach() * law.sample(1e2, 4.0, generator=draws)
        for name, law in laws.items()
    }
    logits = torch.func.functional_call(dense, weights, (rows,)).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
    assert losses[0] == pytest.approx(float(loss.detach()), rel=1e-5)
    parameters = [law.gates for law in laws.values()]
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    torch.optim.AdamW(parameters, lr=1e-2, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1).step()
    same = [float((laws[n].mode() == ours.extras["masks"][n].dense()).float().mean()) for n in laws]
    assert min(same) > 0.999


def test_distillation_alone_needs_no_labels(dense: nn.Module) -> None:
    def no_loss(model: nn.Module, batch: Tensor) -> Tensor:
        raise AssertionError("with distill=1 the loss is not used")

    method = MaskLLM(**QUICK, distill=1.0)
    result = method.compress(dense, tokens(), loss=no_loss, latency_runs=0, progress=False)
    assert 0 < result.extras["history"]["loss"][0] < 5


def test_any_model_and_loss() -> None:
    result = MaskLLM(**QUICK).compress(cnn(), picture_data(), latency_runs=0, progress=False)
    report = {row.name: row.what for row in result.report.layers}
    assert "4 does not divide" in report["0"]
    assert set(result.extras["masks"]) == {"3", "6"}
    transposed = MaskLLM(**QUICK).compress(gpt2(), token_data(), latency_runs=0, progress=False)
    weight = transposed.model.transformer.h[0].attn.c_attn.weight
    assert bool(((weight.T.reshape(-1, 4) != 0).sum(1) == 2).all())


@pytest.mark.parametrize("prior", ["wanda", "sparsegpt"])
def test_one_shot_priors(dense: nn.Module, prior: str) -> None:
    from paperback.compress.pruning import SparseGPT, Wanda

    method = MaskLLM(prior=prior, prior_strength=1e4, steps=1, lr=1e-9, batch_size=8)
    ours = method.compress(dense, tokens(), latency_runs=0, progress=False).extras["masks"]
    one_shot = {"wanda": Wanda, "sparsegpt": SparseGPT}[prior](nm=(2, 4))
    theirs = one_shot.compress(dense, tokens(), latency_runs=0, progress=False).extras["masks"]
    for name, mask in ours.items():
        assert torch.equal(mask.dense(), theirs[name]), name


def test_a_learned_mask_is_a_prior(dense: nn.Module, result: Compressed) -> None:
    masks = result.extras["masks"]
    method = MaskLLM(prior=masks, prior_strength=1e4, steps=1, lr=1e-9, batch_size=8)
    again = method.compress(dense, tokens(), latency_runs=0, progress=False)
    for name, mask in again.extras["masks"].items():
        assert torch.equal(mask.codes, masks[name].codes), name


def test_a_loss_that_is_not_finite_stops_and_keeps_the_masks(dense: nn.Module) -> None:
    calls = []

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        calls.append(1)
        return default_loss(model, batch) * (math.nan if len(calls) > 2 else 1.0)

    result = MaskLLM(**QUICK).compress(dense, tokens(), loss=loss, latency_runs=0, progress=False)
    assert any("Training stopped" in note for note in result.report.notes)
    assert all(p.isfinite().all() for p in result.model.parameters())


# -- masks beside the weights --------------------------------------------------------------------------------


def test_masks_take_turns_on_one_set_of_weights(result: Compressed) -> None:
    model, batch = llama(), tokens()
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    with torch.no_grad():
        dense, pruned = run(model, batch), run(result.model, batch)
        first, second = (run(apply_masks(model, result.extras["masks"]), batch) for _ in range(2))
        other = {n: MaskNM.of(~m.dense(), 2, 4) for n, m in result.extras["masks"].items()}
        third = run(apply_masks(model, other), batch)
    assert torch.equal(first, pruned)
    assert torch.equal(second, pruned)
    assert not torch.equal(third, pruned)
    remove_masks(model)
    assert torch.equal(run(model, batch), dense)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before
    remove_masks(apply_masks(model, result.extras["masks"]), fold=True)
    assert torch.equal(run(model, batch), pruned)


@pytest.mark.parametrize(("n", "m"), [*PATTERNS, (3, 12)])
def test_packed_masks_come_back(n: int, m: int, tmp_path: Path) -> None:
    mask = nm_mask(torch.rand(7, 3 * m, generator=generator(7)), n, m)
    packed = MaskNM.of(mask, n, m)
    bits = math.ceil(math.log2(math.comb(m, n)))
    assert packed.pack().numel() == math.ceil(21 * bits / 8)
    assert torch.equal(packed.dense(), mask)
    save_masks({"a.b": packed}, tmp_path / "masks")
    assert torch.equal(load_masks(tmp_path / "masks")["a.b"].dense(), mask)


def test_a_mask_file_has_three_bits_a_group(tmp_path: Path) -> None:
    mask = MaskNM.of(nm_mask(torch.rand(64, 256, generator=generator(8)), 2, 4), 2, 4)
    save_masks({"x": mask}, tmp_path / "masks")
    payload = 64 * 64 * 3 // 8
    assert payload <= (tmp_path / "masks").stat().st_size <= payload + 250
    damaged = (tmp_path / "masks").read_bytes()
    (tmp_path / "masks").write_bytes(damaged[:-3])
    with pytest.raises(ArtefactError):
        load_masks(tmp_path / "masks")
    with pytest.raises(ArtefactError, match="pattern"):
        MaskNM.unpack(torch.full((1536,), 255, dtype=torch.uint8), (64, 256), 2, 4)


def test_saved_checkpoint_is_an_ordinary_one(result: Compressed, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    result.save(tmp_path / "model")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(run(loaded.eval(), tokens()), run(result.model, tokens()))
    if torch.cuda.is_available():
        weight = loaded.model.layers[0].mlp.up_proj.weight.detach().half().cuda()
        torch.sparse.to_sparse_semi_structured(weight)


def test_behaviour_of_a_compressor() -> None:
    check_compressor(lambda: MaskLLM(**QUICK), llama, token_data())


# -- bad input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"nm": (4, 4)}, "N < M"),
        ({"nm": (0, 4)}, "N < M"),
        ({"nm": (8, 16)}, "12,870 patterns.*bytes"),
        ({"prior": "best"}, "prior"),
        ({"steps": 0}, "steps"),
        ({"temperature": (4.0, 0.0)}, "temperature"),
        ({"logit_scale": (-1.0, 1.0)}, "logit_scale"),
        ({"distill": 2.0}, "distill"),
    ],
)
def test_bad_settings(settings: dict[str, object], words: str) -> None:
    with pytest.raises(DataError, match=words):
        MaskLLM(**settings)


def test_bad_calls(dense: nn.Module, result: Compressed) -> None:
    quiet = {"latency_runs": 0, "progress": False}
    with pytest.raises(BudgetError, match=r"0\.5"):
        MaskLLM(**QUICK).compress(dense, tokens(), Budget(density=0.3), **quiet)
    with pytest.raises(DataError, match="training"):
        MaskLLM(**QUICK).compress(dense, **quiet)
    with pytest.raises(DataError, match="scalar"):
        MaskLLM(**QUICK).compress(dense, tokens(), loss=lambda model, batch: run(model, batch), **quiet)
    masks = {n: m.dense() for n, m in result.extras["masks"].items()}
    broken = dict(masks) | {next(iter(masks)): torch.ones_like(next(iter(masks.values())))}
    with pytest.raises(DataError, match="prior mask"):
        MaskLLM(prior=broken, steps=1).compress(dense, tokens(), **quiet)
    with pytest.raises(DataError, match="no mask for"):
        MaskLLM(prior={}, steps=1).compress(dense, tokens(), **quiet)
    with pytest.raises(DataError, match="no layer"):
        apply_masks(llama(), {"nowhere": next(iter(result.extras["masks"].values()))})
    with pytest.raises(DataError, match="needs"):
        apply_masks(llama(), {"model.layers.0.mlp.up_proj": MaskNM.of(nm_mask(torch.rand(4, 8), 2, 4), 2, 4)})
    assert MaskLLM(nm=(2, 4), **QUICK)._settle(Budget(nm=(1, 4)), {}, dense).nm == (1, 4)


def test_tied_layers_share_their_mask() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).relu())

    x = (torch.randn(16, 8), torch.randint(0, 8, (16,)))
    result = MaskLLM(**QUICK).compress(Twice(), Data(x), latency_runs=0, progress=False)
    assert result.model.a.weight is result.model.b.weight
    assert bool(((result.model.a.weight.view(-1, 4) != 0).sum(1) == 2).all())
