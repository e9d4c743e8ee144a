"""The image classifier: shapes, scans, class token, saving, learning."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from paperback.errors import DataError
from paperback.layers.mamba.scan_orders import GRID_SCANS
from paperback.layers.mamba.vision import VisionMamba


def model(scan="bidirectional", **settings):
    torch.manual_seed(0)
    return VisionMamba((4, 6), d_model=8, classes=3, layers="M", scan=scan, d_state=4, **settings)


@pytest.mark.parametrize("scan", ["forward", "bidirectional", *GRID_SCANS, "hilbert_two_way"])
def test_every_scan_gives_logits_of_every_image_by_itself(scan):
    module = model(scan).double().eval()
    images = torch.randn(3, 4, 6, dtype=torch.float64)
    logits = module(images)
    assert logits.shape == (3, 3)
    torch.testing.assert_close(logits, torch.cat([module(image) for image in images.split(1)]))
    torch.testing.assert_close(logits, module(images.unsqueeze(1)))


def test_patches_and_channels():
    module = VisionMamba(8, patch=2, channels=3, d_model=8, layers="MAF", scan="bidirectional", num_heads=2)
    assert module.grid == (4, 4)
    assert module.features(torch.randn(2, 3, 8, 8)).shape == (2, 17, 8)
    assert module(torch.randn(2, 3, 8, 8)).shape == (2, 10)


def test_the_class_token_in_the_middle_sees_every_pixel():
    module = model().double()
    assert module.pool == "class"
    images = torch.randn(1, 4, 6, dtype=torch.float64, requires_grad=True)
    module(images)[0, 0].backward()
    assert (images.grad != 0).all()


def test_each_scan_is_another_function():
    outputs = []
    images = torch.randn(1, 4, 6)
    for scan in ("snake", "hilbert", "local"):
        module = model(scan)
        outputs.append(module(images))
    assert not torch.allclose(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2])


def test_saved_and_loaded_it_is_the_same(tmp_path):
    images = torch.randn(2, 4, 6)
    for scan in ("bidirectional", "cross"):
        module = model(scan).eval()
        module.save_pretrained(tmp_path / scan)
        assert torch.equal(VisionMamba.from_pretrained(tmp_path / scan)(images), module(images))


def test_it_learns_where_a_dot_is():
    """Three classes by the column of the only bright pixel: no bag of pixels can tell them apart."""
    source = torch.Generator().manual_seed(0)
    place = torch.randint(24, (64,), generator=source)
    images = F.one_hot(place, 24).float().view(-1, 4, 6)
    labels = place % 6 // 2
    module = model("cross")
    optimizer = torch.optim.Adam(module.parameters(), lr=2e-2)
    for _ in range(120):
        optimizer.zero_grad()
        loss = F.cross_entropy(module(images), labels)
        loss.backward()
        optimizer.step()
    assert (module(images).argmax(1) == labels).float().mean() > 0.9


def test_bad_input():
    with pytest.raises(DataError, match="patch"):
        VisionMamba(8, patch=3)
    with pytest.raises(DataError, match="class token"):
        model("cross", pool="class")
    with pytest.raises(DataError, match="pool"):
        model(pool="max")
    with pytest.raises(DataError, match="one of forward"):
        model("zigzag")
    module = model()
    with pytest.raises(DataError, match="1, 4, 6"):
        module(torch.zeros(1, 6, 4))
    with pytest.raises(DataError, match="floating point"):
        module(torch.zeros(1, 4, 6, dtype=torch.uint8))


def test_cost_adds_up():
    assert model("cross").cost().flops > model("forward").cost().flops > 0
