"""The language model: step equals forward, generation, saving, and exchange with transformers."""

from __future__ import annotations

import json

import pytest
import torch

from paperback.errors import ArtefactError, DataError, NotSupportedError
from paperback.layers.mamba.language_model import MambaLM, draw

VOCAB = 11


def model(layers="MM", **settings):
    torch.manual_seed(0)
    made = MambaLM(VOCAB, 16, layers, num_heads=2, d_state=4, **settings)
    with torch.no_grad():  # an embedding of the usual size gives logits that are nearly equal
        made.embedding.weight.mul_(20)
    return made.eval()


def tokens(batch=2, length=8):
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("layers", ["MM", "MAF", "AFAF"])
def test_steps_are_one_forward(layers):
    lm, text = model(layers), tokens()
    state, out = lm.init_state(2), []
    for token in text.unbind(1):
        logits, state = lm.step(token, state)
        out.append(logits)
    torch.testing.assert_close(torch.stack(out, 1), lm(text), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layers", ["MM", "MAF"])
def test_greedy_generation_is_the_argmax_of_whole_passes(layers):
    lm, text = model(layers), tokens()
    made = lm.generate(text, 6, temperature=0)
    expected = text
    for _ in range(6):
        expected = torch.cat([expected, lm(expected)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(made, expected)


@pytest.mark.parametrize("layers", ["MM", "MAF"])
def test_prompts_of_unequal_length_are_padded_on_the_left(layers):
    lm, text = model(layers), tokens(1, 5)
    alone = lm.generate(text, 6, temperature=0)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), text], 1)
    batch = torch.cat([padded, tokens(1, 8)])
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[0, :3] = False
    assert torch.equal(lm.generate(batch, 6, temperature=0, mask=mask)[:1, 3:], alone)
    with pytest.raises(DataError, match="left"):
        lm.generate(batch, 1, mask=mask.flip(1))


def test_generation_stops_and_is_repeatable():
    lm, text = model(), tokens()
    free = lm.generate(text, 8, temperature=0)
    stop = int(free[0, 9])
    made = lm.generate(text, 8, temperature=0, stop=stop)
    first = (made[0, 8:] == stop).nonzero()[0, 0]
    assert (made[0, 8 + first :] == stop).all()
    a = lm.generate(text, 5, generator=torch.Generator().manual_seed(3))
    assert torch.equal(a, lm.generate(text, 5, generator=torch.Generator().manual_seed(3)))
    assert torch.equal(lm.generate(text, 0), text)
    lm.train()
    lm.generate(text, 1)
    assert lm.training


def test_draws_follow_the_distribution_and_its_cuts():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(20_000, 4)
    source = torch.Generator().manual_seed(0)

    def shares(**cut):
        return torch.bincount(draw(logits, generator=source, **cut), minlength=4) / len(logits)

    torch.testing.assert_close(shares(), torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.015, rtol=0)
    torch.testing.assert_close(shares(top_k=2), torch.tensor([0.625, 0.375, 0, 0]), atol=0.015, rtol=0)
    torch.testing.assert_close(shares(top_p=0.7), torch.tensor([0.625, 0.375, 0, 0]), atol=0.015, rtol=0)
    torch.testing.assert_close(shares(top_p=0.01), torch.tensor([1.0, 0, 0, 0]))
    cold = torch.tensor([0.5, 0.3, 0.15, 0.05]) ** 2
    torch.testing.assert_close(shares(temperature=0.5), cold / cold.sum(), atol=0.015, rtol=0)


def test_saved_and_loaded_it_is_the_same(tmp_path):
    for layers, settings in (("MAF", {}), ("M", {"kind": "ssd", "headdim": 8, "tie": False})):
        lm = model(layers, **settings)
        lm.save_pretrained(tmp_path / layers)
        again = MambaLM.from_pretrained(tmp_path / layers)
        assert torch.equal(again(tokens()), lm(tokens()))
        assert (again.head.weight is again.embedding.weight) == settings.get("tie", True)


def test_documents_in_one_row_are_as_if_alone():
    lm, text = model("MA"), tokens(1, 9)
    reset = torch.zeros(1, 9, dtype=torch.bool)
    reset[0, 4] = True
    torch.testing.assert_close(lm(text, reset=reset)[:, 4:], lm(text[:, 4:]), atol=1e-5, rtol=1e-5)


def test_bad_input():
    lm = model()
    with pytest.raises(DataError, match="integers"):
        lm(torch.zeros(1, 4))
    with pytest.raises(DataError, match="integers"):
        lm(torch.zeros(4, dtype=torch.int64))
    with pytest.raises(DataError, match="length 0"):
        lm(torch.zeros(1, 0, dtype=torch.int64))
    with pytest.raises(DataError, match="later tokens"):
        MambaLM(VOCAB, 16, scan="bidirectional")
    for wrong in ({"temperature": -1}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}):
        with pytest.raises(DataError, match=next(iter(wrong))):
            lm.generate(tokens(), 1, **wrong)


# -- transformers ------------------------------------------------------------------------------------------


def theirs(kind):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shared = {
        "vocab_size": VOCAB, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "pad_token_id": None,
        "bos_token_id": None, "eos_token_id": None, "initializer_range": 0.5,
    }  # fmt: skip
    if kind == "mamba":
        return transformers.MambaForCausalLM(transformers.MambaConfig(**shared)).eval()
    config = transformers.Mamba2Config(**shared, num_heads=4, head_dim=8, n_groups=2, chunk_size=8)
    return transformers.Mamba2ForCausalLM(config).eval()


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_models_of_transformers_give_the_same_logits_here_and_go_back(kind, tmp_path):
    source, text = theirs(kind), tokens()
    with torch.no_grad():
        expected = source(text).logits
    lm = MambaLM.from_pretrained(source)
    torch.testing.assert_close(lm(text), expected, atol=1e-5, rtol=1e-4)
    source.save_pretrained(tmp_path)
    torch.testing.assert_close(MambaLM.from_pretrained(tmp_path)(text), expected, atol=1e-5, rtol=1e-4)
    back = lm.to_transformers()
    with torch.no_grad():
        torch.testing.assert_close(back(text).logits, expected, atol=1e-5, rtol=1e-4)


def test_models_that_are_not_ours_are_refused(tmp_path):
    source = theirs("mamba")
    with pytest.raises(DataError, match="Linear"):
        MambaLM.from_pretrained(torch.nn.Linear(2, 2))
    source.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for change, words in (
        ({"model_type": "llama"}, "llama"),
        ({"hidden_act": "relu"}, "relu"),
        ({"state_size": 5}, "shape"),
        ({"num_hidden_layers": 3}, "A_log|no tensor"),
        ({"num_hidden_layers": 1}, "no place"),
    ):
        path.write_text(json.dumps(config | change))
        with pytest.raises(ArtefactError, match=words):
            MambaLM.from_pretrained(tmp_path)
    path.write_text(json.dumps(config))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ArtefactError, match="cannot be read"):
        MambaLM.from_pretrained(tmp_path)


def test_hybrids_and_controls_stay_here():
    pytest.importorskip("transformers")
    with pytest.raises(NotSupportedError, match="MA"):
        model("MA").to_transformers()
    with pytest.raises(NotSupportedError, match="selective"):
        model("M", selective=False).to_transformers()
