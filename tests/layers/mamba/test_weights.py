"""Weights from and to transformers, agreement with its mixers and with mambapy."""

import pytest
import torch

from paperback.errors import ArtefactError, DataError, NotSupportedError
from paperback.layers.mamba import Mamba
from paperback.layers.mamba.weights import export_mixer, import_mixer

transformers = pytest.importorskip("transformers")
from transformers.models.mamba.modeling_mamba import MambaMixer  # noqa: E402
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer  # noqa: E402


def their_mixer(kind, **options):
    torch.manual_seed(0)
    if kind == "s6":
        config = transformers.MambaConfig(hidden_size=32, state_size=8, num_hidden_layers=1, **options)
        return MambaMixer(config, 0).eval()
    sizes = {"num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8} | options
    config = transformers.Mamba2Config(hidden_size=32, state_size=8, num_hidden_layers=1, **sizes)
    mixer = Mamba2Mixer(config, 0).eval()
    with torch.no_grad():
        mixer.norm.weight.uniform_(0.5, 1.5)
        mixer.D.uniform_(0.5, 1.5)
    return mixer


@pytest.mark.parametrize("kind", ["s6", "ssd"])
@pytest.mark.parametrize(
    "options", [{}, {"use_bias": True, "use_conv_bias": False}], ids=["default", "biases"]
)
def test_agrees_with_transformers(kind, options):
    theirs = their_mixer(kind, **options)
    ours = Mamba.from_pretrained(theirs)
    u = torch.randn(2, 19, 32)
    assert ours.kind == kind
    assert (ours(u) - theirs(u)).abs().max() < 1e-5
    if options:
        return  # with biases transformers lets padding through: it masks before the projection adds its bias
    mask = torch.ones(2, 19, dtype=torch.bool)
    mask[0, :5] = False
    expected = theirs(u, attention_mask=mask.long())
    assert (ours(u, mask=mask)[mask] - expected[mask]).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["s6", "ssd"])
def test_gradients_agree_with_transformers(kind):
    theirs = their_mixer(kind)
    ours = Mamba.from_pretrained(theirs)
    u = torch.randn(2, 11, 32)
    ours(u).square().sum().backward()
    theirs(u).square().sum().backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    with torch.no_grad():
        for p in ours.parameters():
            p.copy_(p.grad)
    for name, gradient in export_mixer(ours).items():
        assert torch.allclose(gradient, gradients[name], atol=1e-4, rtol=1e-4), name


@pytest.mark.parametrize("kind", ["s6", "ssd"])
def test_weights_go_there_and_come_back(kind):
    theirs = their_mixer(kind)
    ours = Mamba.from_pretrained(theirs)
    fresh = their_mixer(kind)
    for parameter in fresh.parameters():
        torch.nn.init.normal_(parameter)
    fresh.load_state_dict(export_mixer(ours))
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor), name


def test_a_state_dict_of_a_block_is_enough():
    theirs = their_mixer("s6")
    tensors = {f"backbone.layers.0.mixer.{name}": t for name, t in theirs.state_dict().items()}
    u = torch.randn(1, 7, 32)
    assert (Mamba.from_pretrained(tensors)(u) - theirs(u)).abs().max() < 1e-5
    double = their_mixer("ssd").double()
    ours = Mamba.from_pretrained(double.state_dict(), ngroups=2)
    assert ours.in_proj.weight.dtype == torch.float64
    assert (ours(u.double()) - double(u.double())).abs().max() < 1e-5


def test_agrees_with_mambapy():
    mambapy = pytest.importorskip("mambapy.mamba")
    torch.manual_seed(0)
    theirs = mambapy.MambaBlock(mambapy.MambaConfig(d_model=32, n_layers=1, d_state=8))
    ours = Mamba.from_pretrained(theirs)
    u = torch.randn(2, 16, 32)
    assert (ours(u) - theirs(u)).abs().max() < 1e-5


def test_weights_that_do_not_fit_are_refused():
    tensors = their_mixer("s6").state_dict()
    mixer = Mamba(32, d_state=8)
    with pytest.raises(ArtefactError, match="no 'A_log'"):
        import_mixer(mixer, {name: t for name, t in tensors.items() if name != "A_log"})
    with pytest.raises(ArtefactError, match="no part of"):
        import_mixer(mixer, tensors | {"gate": torch.zeros(1)})
    with pytest.raises(ArtefactError, match="'D' has shape"):
        import_mixer(mixer, tensors | {"D": torch.zeros(1)})
    with pytest.raises(DataError, match="holds 0 Mamba mixers"):
        Mamba.from_pretrained(torch.nn.Linear(2, 2))
    with pytest.raises(NotSupportedError, match="no counterpart"):
        export_mixer(Mamba(32, selective=False))
    with pytest.raises(NotSupportedError, match="limits its step sizes"):
        Mamba.from_pretrained(their_mixer("ssd", time_step_limit=(0.0, 0.1)))
    with pytest.raises(NotSupportedError, match="activation is 'gelu'"):
        Mamba.from_pretrained(their_mixer("s6", hidden_act="gelu"))
