"""Images that ship and images of the user: shapes, ranges, labels, splits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.data.corpus import grey_images, save_images

from paperback import data
from paperback.data import images
from paperback.errors import DataError

RNG = np.random.default_rng(3)
GREY = grey_images(RNG, 40)
LABELS = np.arange(40) % 4


def test_fashion_mnist_is_balanced_and_in_range() -> None:
    fashion = images.fashion_mnist()
    for split, per_class in ((fashion.train, 900), (fashion.val, 100), (fashion.test, 200)):
        assert split.x.dtype == torch.uint8
        assert split.x.shape == (10 * per_class, 28, 28)
        assert split.y.dtype == torch.int64
        assert split.y.bincount().tolist() == [per_class] * 10
    assert fashion.train.x.float().mean() / 255 == pytest.approx(0.2867, abs=0.002)
    assert fashion.classes[9] == "ankle boot"


def test_fashion_mnist_subset_shares_the_validation_part() -> None:
    small, large = images.fashion_mnist(600, seed=1), images.fashion_mnist(seed=1)
    assert small.train.y.bincount().tolist() == [60] * 10
    assert torch.equal(small.val.x, large.val.x)
    assert torch.equal(small.train.x, images.fashion_mnist(600, seed=1).train.x)
    assert not torch.equal(small.train.x, images.fashion_mnist(600, seed=2).train.x)
    assert torch.equal(small.test.x, images.fashion_mnist(600, seed=2).test.x)


def test_loaded_tensors_are_the_callers_own() -> None:
    images.fashion_mnist().test.x.zero_()
    assert images.fashion_mnist().test.x.max() == 255


@pytest.mark.parametrize("n_train", [0, 9, 9001])
def test_fashion_mnist_refuses_impossible_sizes(n_train: int) -> None:
    with pytest.raises(DataError, match=f"n_train is {n_train}; it must lie in 10..9,000"):
        images.fashion_mnist(n_train)


def test_digits_can_leave_everything_for_training() -> None:
    digits = images.digits(n_val=0)
    assert [len(part) for part in (digits.train, digits.val, digits.test)] == [1437, 0, 360]
    assert digits.train.x.dtype == torch.uint8
    assert digits.train.x.max() == 16
    assert digits.val.x.shape == (0, 8, 8)


def everything(dataset: data.Dataset) -> torch.Tensor:
    """All images of the three parts, in an order of their own."""
    x = torch.cat([dataset.train.x, dataset.val.x, dataset.test.x]).flatten(1)
    return x[torch.from_numpy(np.lexsort(x.numpy().T))]


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (GREY, GREY),
        (GREY[..., None], GREY),
        (GREY[:, None], GREY),
        (GREY.astype(np.int64), GREY),
        (GREY.astype(np.float32), GREY),
        (GREY.astype(np.float64) / 255, GREY),
        (GREY.astype(">f4") / 255, GREY),
        (np.asfortranarray(GREY), GREY),
        (GREY > 127, (GREY > 127).astype(np.uint8)),
        (GREY // 16, GREY // 16),
    ],
    ids=["uint8", "NHW1", "N1HW", "int64", "whole floats", "0..1", "big endian", "Fortran", "bool", "0..15"],
)
def test_archive_of_any_type_keeps_the_grey_levels(
    stored: np.ndarray, expected: np.ndarray, tmp_path: Path
) -> None:
    np.savez(tmp_path / "a.npz", images=stored)
    found = data.read(tmp_path / "a.npz")
    assert found.train.x.dtype == torch.uint8
    flat = expected.reshape(40, -1)
    np.testing.assert_array_equal(everything(found).numpy(), flat[np.lexsort(flat.T)])


@pytest.mark.parametrize(
    "names", [("images", "labels"), ("X", "y"), ("x_train", "y_train"), ("train_images", "train_labels")]
)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_archive_labels_stay_with_their_images(names: tuple[str, str], save: type, tmp_path: Path) -> None:
    marked = GREY.copy()
    marked[:, 0, 0] = LABELS
    save(tmp_path / "a.npz", **{names[0]: marked, names[1]: LABELS[:, None].astype(np.float32)})
    found = data.read(tmp_path / "a.npz", labels="required")
    assert found.classes == ("0", "1", "2", "3")
    assert [len(part) for part in (found.train, found.val, found.test)] == [28, 4, 8]
    assert found.test.y.bincount().tolist() == [2, 2, 2, 2]
    for part in (found.train, found.val, found.test):
        assert torch.equal(part.x[:, 0, 0].long(), part.y)


def test_positional_arrays_are_images_and_labels(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", GREY, LABELS)
    assert data.read(tmp_path / "a.npz").classes == ("0", "1", "2", "3")


def test_archive_keeps_its_own_test_part_and_names(tmp_path: Path) -> None:
    classes = np.array(["ant", "bee", "cow", "dog"])
    np.savez(
        tmp_path / "a.npz", x_train=GREY, y_train=LABELS, x_test=GREY[:9], y_test=LABELS[:9], classes=classes
    )
    found = data.read(tmp_path / "a.npz")
    assert torch.equal(found.test.x, torch.tensor(GREY[:9]))
    assert found.test.y.tolist() == LABELS[:9].tolist()
    assert (len(found.train), len(found.val)) == (36, 4)
    assert found.classes == ("ant", "bee", "cow", "dog")


def test_labels_may_be_names(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=GREY, labels=np.array(["dog", "ant"])[LABELS % 2])
    found = data.read(tmp_path / "a.npz")
    assert found.classes == ("ant", "dog")
    assert found.train.y.bincount().tolist() == [14, 14]


def test_colour_comes_channels_first_and_turns_grey_on_demand(tmp_path: Path) -> None:
    colour = RNG.integers(0, 256, (40, 8, 6, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=colour)
    np.savez(tmp_path / "b.npz", images=np.moveaxis(colour, -1, 1))
    found = data.read(tmp_path / "a.npz")
    assert found.train.x.shape == (28, 3, 8, 6)
    assert torch.equal(found.train.x, data.read(tmp_path / "b.npz").train.x)
    grey = data.read(tmp_path / "a.npz", channels="grey").train.x
    luma = (found.train.x.float() * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1)
    assert (grey - luma).abs().max() <= 1
    assert data.read(tmp_path / "a.npz", size=(4, 3)).train.x.shape == (28, 3, 4, 3)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".gif", ".webp", ".PNG"])
def test_flat_folder_of_any_lossless_format(suffix: str, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    save_images(folder, GREY, suffix)
    found = data.read(folder, channels="grey")
    flat = GREY.reshape(40, -1)
    np.testing.assert_array_equal(everything(found).numpy(), flat[np.lexsort(flat.T)])
    assert found.train.y is None
    assert found.classes == ()


def test_sub_folders_are_classes(tmp_path: Path) -> None:
    for name, level in (("dark", 10), ("light", 240)):
        save_images(tmp_path / name, np.full((10, 4, 4), level, np.uint8))
    save_images(tmp_path / "light" / "deeper", np.full((5, 4, 4), 250, np.uint8))
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / ".hidden").mkdir()
    found = data.read(tmp_path)
    assert found.classes == ("dark", "light")
    assert sum(len(part) for part in (found.train, found.val, found.test)) == 25
    assert torch.equal(found.train.x[:, 0, 0] > 128, found.train.y == 1)


@pytest.mark.parametrize("parts", [("train",), ("train", "test"), ("Train", "valid", "test")])
def test_parts_of_a_folder_are_kept(parts: tuple[str, ...], tmp_path: Path) -> None:
    for part, level in zip(parts, (10, 20, 30), strict=False):
        for name in ("cat", "dog"):
            save_images(tmp_path / part / name, np.full((10, 4, 4), level, np.uint8))
    found = data.read(tmp_path)
    assert found.classes == ("cat", "dog")
    assert set(found.train.x.unique().tolist()) == {10}
    assert set(found.test.x.unique().tolist()) == ({10} if len(parts) == 1 else {10 * len(parts)})


def test_links_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    inside = save_images(folder, GREY)
    outside = save_images(tmp_path / "outside", GREY)
    (folder / "secret.png").symlink_to(outside[0])
    (folder / "secrets").symlink_to(outside[0].parent)
    (folder / "copy.png").symlink_to(inside[0])
    found = data.read(folder)
    assert len(everything(found)) == 41
    assert len(found.notes) == 1
    assert found.notes[0].startswith("2 link(s) not followed, first ")


def test_size_brings_all_images_to_one(tmp_path: Path) -> None:
    save_images(tmp_path, np.kron(GREY[:6], np.ones((1, 2, 2), np.uint8)))
    Image.fromarray(np.zeros((5, 3), np.uint8)).save(tmp_path / "odd.png")
    found = data.read(tmp_path, size=8)
    assert {tuple(row) for row in GREY[:6].reshape(6, -1)} < {
        tuple(row) for row in everything(found).tolist()
    }


def test_colour_transparency_and_depth(tmp_path: Path) -> None:
    transparent = np.zeros((4, 4, 4), np.uint8)
    transparent[..., 3] = [[0, 255, 255, 255]] * 4
    Image.fromarray(transparent).save(tmp_path / "a.png")
    Image.fromarray(np.full((4, 4), 65535, np.uint16)).save(tmp_path / "b.png")
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "c.tif")
    Image.fromarray(np.array([[[255, 0, 0]] * 4] * 4, np.uint8)).save(tmp_path / "d.png")
    grey = {tuple(row[:2]) for row in everything(data.read(tmp_path, channels="grey")).tolist()}
    assert grey == {(255, 0), (255, 255), (128, 128), (76, 76)}
    assert data.read(tmp_path).train.x.shape[1:] == (3, 4, 4)


def test_orientation_of_photographs_is_honoured(tmp_path: Path) -> None:
    wide = np.zeros((8, 16), np.uint8)
    wide[:, 8:] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter clockwise
    for name in "abc":
        Image.fromarray(wide).save(tmp_path / f"{name}.jpg", exif=exif, quality=95)
    x = data.read(tmp_path).train.x
    assert x.shape == (1, 16, 8)
    assert x[0, :8].float().mean() < 10
    assert x[0, 8:].float().mean() > 245


def test_seed_decides_the_split(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=GREY)
    first, again, other = (data.read(tmp_path / "a.npz", seed=seed).test.x for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
