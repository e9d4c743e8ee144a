"""The deep network: detections, its losses, its three stages, patches, and explanations of images."""

import numpy as np
import pytest
import torch
from torch import nn

from paperback.errors import DataError
from paperback.explain.prototype_rbf import DeepCBC, RBFPrototypeClassifier
from paperback.explain.prototype_rbf import deep as room


def small_cnn(channels=1):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
    )  # fmt: skip


def test_detections_are_the_greatest_softmax_over_places():
    network = DeepCBC(small_cnn(), 32, 12, 3).eval()
    images = torch.rand(5, 1, 8, 8)
    maps = network.maps(images)
    assert maps.shape == (5, 12, 4, 4)
    torch.testing.assert_close(maps.sum(1), torch.ones(5, 4, 4))
    by_hand = torch.stack([maps[:, :, i, j] for i in range(4) for j in range(4)]).amax(0)
    torch.testing.assert_close(network.detections(images), by_hand)
    torch.testing.assert_close(network(images), network.head(by_hand))


def test_faint_detections_count_as_absent_only_when_predicting():
    network = DeepCBC(small_cnn(), 32, 12, 3, least=0.1)
    images = torch.rand(5, 1, 8, 8)
    full = network.train().detections(images)
    cut = network.eval().detections(images)
    assert (full < 0.1).any()
    torch.testing.assert_close(cut, torch.where(full < 0.1, 0.0, full))


def test_without_the_convolution_channels_are_components():
    network = DeepCBC(small_cnn(), 32, None, 3)
    assert isinstance(network.project, nn.Identity)
    assert network.head.n_components == 32
    images = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(network.maps(images), network.backbone(images).softmax(1))


def test_the_losses_of_the_first_stage_by_hand():
    one = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1).expand(3, 2, 2, 2)
    assert room.alignment_loss(one, one) == 0
    half = torch.full((3, 2, 2, 2), 0.5)
    torch.testing.assert_close(room.alignment_loss(half, one), torch.tensor(2.0).log())
    # component 0 is fully there in 3 images, component 1 nowhere: its part is -log of the least value
    expected = -(torch.tensor(3.0).tanh().log() + np.log(room.ALIGNED)) / 2
    torch.testing.assert_close(room.uniformity_loss(one), expected)
    assert room.uniformity_loss(half) < room.uniformity_loss(one)


def test_the_alignment_gains_weight_epoch_by_epoch():
    network = DeepCBC(small_cnn(), 32, 12, 3)
    images, losses = torch.rand(6, 1, 8, 8), []
    loss = room.Pretraining(4)
    for epoch in range(4):
        losses.append(float(loss(network, (images,), torch.Generator().manual_seed(0)).detach()))
        loss.count(epoch + 1, network, None)
    steps = np.diff(losses)
    np.testing.assert_allclose(steps, steps[0], rtol=1e-3)
    draws = torch.Generator().manual_seed(0)
    first, second = (network.maps(room.view(images, draws)) for _ in range(2))
    np.testing.assert_allclose(steps[0], float(room.alignment_loss(first, second).detach()) / 4, rtol=1e-3)


def test_views_keep_the_geometry():
    images = torch.zeros(4, 1, 8, 8)
    images[:, :, 2, 3] = 10
    seen = room.view(images, torch.Generator().manual_seed(0))
    assert (seen.flatten(1).argmax(1) == 2 * 8 + 3).all()
    assert not torch.equal(seen, room.view(images, torch.Generator().manual_seed(1)))


def test_the_last_stage_trains_the_head_alone():
    network = DeepCBC(small_cnn(), 32, 6, 3)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    images, y = torch.rand(30, 1, 8, 8), torch.arange(30) % 3
    room.fit(network, images, y, epochs=(0, 0, 2), margin=0.3, batch_size=10, lr=1e-3, seed=0, progress=False)
    changed = {k for k, v in network.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"head.logits"}
    assert all(p.requires_grad for p in network.parameters())


def test_a_component_is_grounded_where_it_is_strongest():
    network = DeepCBC(small_cnn(), 32, 6, 3).eval()
    images = torch.rand(23, 1, 8, 8)
    patches = room.ground(network, images, batch_size=5)
    maps = network.maps(images).detach()
    assert len(patches) == 6
    for k, patch in enumerate(patches):
        assert patch.activation == pytest.approx(float(maps[:, k].max()))
        assert float(maps[patch.image, k, patch.row, patch.column]) == pytest.approx(patch.activation)
        rows, columns = slice(2 * patch.row, 2 * patch.row + 2), slice(2 * patch.column, 2 * patch.column + 2)
        clear = torch.zeros(8, 8, dtype=torch.bool)
        clear[rows, columns] = True  # a place of the 4 x 4 map stands for 2 x 2 pixels
        torch.testing.assert_close(patch.picture[0][clear], images[patch.image, 0][clear])
        torch.testing.assert_close(patch.picture[0][~clear], room.FADED * images[patch.image, 0][~clear])


def test_it_learns_digits_and_explains_them(digits, tmp_path):
    rows, labels, test, truth = digits
    model = RBFPrototypeClassifier(
        4, backbone=small_cnn(), image_shape=(8, 8), epochs=(1, 12, 1), batch_size=16, lr=1e-3, margin=0.1
    ).fit(rows, labels)
    assert model.score(test, truth) > 0.9
    found = model.explain(test[:5])
    np.testing.assert_array_equal(found.prediction, model.predict(test[:5]))
    assert found.kind == "image"
    assert found.certificates is None
    np.testing.assert_allclose(
        found.pictures["component 4 present"], model.patches_[4].picture.ravel().numpy()
    )
    found.plot(0).savefig(tmp_path / "figure.png")
    assert set(model.intervene(test[:5], dict.fromkeys(range(40), 0.0))) <= set(range(10))


def test_the_users_backbone_stays_as_it_is(digits):
    backbone = small_cnn()
    before = [p.clone() for p in backbone.parameters()]
    RBFPrototypeClassifier(1, backbone=backbone, image_shape=(8, 8), epochs=(0, 1, 0)).fit(
        digits[0][:100], digits[1][:100]
    )
    assert all(torch.equal(a, b) for a, b in zip(before, backbone.parameters(), strict=True))


def test_colour_images_are_drawn_with_channels_last(tmp_path):
    rows = np.random.default_rng(0).uniform(size=(30, 3 * 8 * 6))
    model = RBFPrototypeClassifier(None, backbone=small_cnn(3), image_shape=(3, 8, 6), epochs=(1, 1, 1))
    model.fit(rows, np.arange(30) % 3)
    found = model.explain(rows[:2])
    assert found.image_shape == (8, 6, 3)
    pixels = found.inputs[1].reshape(8, 6, 3)
    np.testing.assert_array_equal(pixels[:, :, 2], rows[1].reshape(3, 8, 6)[2])
    found.plot(1).savefig(tmp_path / "figure.png")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metric": "manhattan"}, "metric is 'manhattan'; it has no meaning with a backbone"),
        ({"kernel": "gaussian"}, "kernel is 'gaussian'"),
        ({"sigma": "per-component"}, "sigma is 'per-component'"),
        ({"loss": "robust"}, "loss='margin'"),
        ({"image_shape": None}, "image_shape is None"),
        ({"image_shape": (7, 8)}, "image_shape is"),
        ({"epochs": 5}, "three stages"),
        ({"least": 1.0}, "least is 1.0"),
        ({"backbone": nn.Sequential(nn.Flatten(), nn.Linear(64, 8))}, "must keep a map"),
        ({"backbone": nn.Conv2d(1, 2, 3), "n_components": None}, "2 components for 3 classes"),
    ],
)
def test_bad_settings_are_named(settings, message):
    rows = np.random.default_rng(0).normal(size=(30, 64))
    given = {"backbone": small_cnn(), "image_shape": (8, 8), "epochs": (1, 1, 1)} | settings
    with pytest.raises(DataError, match=message):
        RBFPrototypeClassifier(**given).fit(rows, np.arange(30) % 3)


def test_a_module_of_another_shape_is_refused_in_the_network():
    with pytest.raises(DataError, match="must keep a map"):
        DeepCBC(nn.Flatten(), 64, 6, 3).maps(torch.rand(2, 1, 8, 8))
