"""Behaviour checks for encoders.

    from paperback.testing import check_encoder
    check_encoder(lambda seed: SimCLR(epochs=1, seed=seed), images, labels)

For a test per check, parametrise over `ENCODER_CHECKS` with an `EncoderCase`.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from paperback.represent.interface import Encoder
from paperback.testing.density import _no_network, _raises

Build = Callable[[int], Encoder]

N_IMAGES = 24  # that a check needs at least
ALONE = 6  # that are also transformed one by one


@dataclass
class EncoderCase:
    """What the checks of one encoder share.

    Args:
        build: from a seed to an encoder that is not fitted; it should fit within a second.
        images: uint8 ``(n, h, w)`` or ``(n, c, h, w)``, at least 24.
        labels: integers ``(n,)`` of two classes or more.
        tolerance: of "a batch equals its images one by one".
        savable: False for an encoder around a module of the user's, which a folder cannot name.
    """

    build: Build
    images: Tensor
    labels: Tensor
    tolerance: float = 1e-4
    savable: bool = True

    def fitted(self, images: Any = None, labels: Any = None) -> Encoder:
        """A fresh encoder with seed 0, fitted to copies of the data or to other data."""
        x = self.images.clone() if images is None else images
        y = self.labels.clone() if labels is None else labels
        return self.build(0).fit(x, y, progress=False)

    @cached_property
    def model(self) -> Encoder:
        """A fitted encoder that the checks share; none of them changes it."""
        assert len(self.images) >= N_IMAGES, f"there are {len(self.images)} images; give {N_IMAGES} or more."
        return self.fitted()

    @property
    def some(self) -> Tensor:
        """The images that are asked about."""
        return self.images[:N_IMAGES].clone()


def check_encoder(
    build: Build, images: Tensor, labels: Tensor, *, tolerance: float = 1e-4, savable: bool = True
) -> None:
    """Run every check of the represent task.

    Args:
        build: from a seed to an encoder that is not fitted; it should fit within a second.
        images: uint8 ``(n, h, w)`` or ``(n, c, h, w)``, at least 24.
        labels: integers ``(n,)`` of two classes or more.
        tolerance: see `EncoderCase`.
        savable: see `EncoderCase`.

    Raises:
        AssertionError: naming the check, what was expected and what was found.
    """
    case = EncoderCase(build, images, labels, tolerance, savable)
    for check in ENCODER_CHECKS:
        try:
            check(case)
        except AssertionError as error:
            raise AssertionError(f"{check.__name__}: {error}") from error


# -- the checks ----------------------------------------------------------------------------------------------


def same_seed_same_result(case: EncoderCase) -> None:
    """One seed, one encoder; the user's random numbers are left alone."""
    expected = case.model.transform(case.some)
    before, numpy_before = torch.get_rng_state(), _numpy_state()
    found = case.fitted().transform(case.some)
    assert torch.equal(found, expected), "two fits with one seed give different features."
    assert torch.equal(torch.get_rng_state(), before), "fit draws from torch's global random state."
    assert _numpy_state() == numpy_before, "fit draws from numpy's global random state."


def features_are_as_announced(case: EncoderCase) -> None:
    """A finite row of `dim` float32 features for each image, also for none."""
    features = case.model.transform(case.some)
    shape = (len(case.some), case.model.dim)
    assert features.shape == shape, f"features have shape {tuple(features.shape)}, expected {shape}."
    assert features.dtype == torch.float32, f"features are {features.dtype}, expected float32."
    assert bool(features.isfinite().all()), "a feature is not finite."
    assert not features.requires_grad, "transform keeps gradients."
    assert case.model.transform(case.some[:0]).shape == (0, case.model.dim), "no images give another shape."
    assert case.model.fit_seconds_ > 0, "fit_seconds_ was not set."


def batch_equals_loop(case: EncoderCase) -> None:
    """An image has one feature vector, whatever stands beside it in the batch."""
    model, images = case.model, case.some
    whole = model.transform(images)
    single = torch.cat([model.transform(image[None]) for image in images[:ALONE]])
    size = float(whole.abs().max()) + 1e-12
    for what, other in (("alone", single), ("in batches of 7", model.transform(images, batch_size=7))):
        error = float((whole[: len(other)] - other).abs().max())
        assert error <= case.tolerance * size, f"an image {what} differs by {error:.3g} from the whole batch."


def types_of_images_agree(case: EncoderCase) -> None:
    """uint8 and floats in 0..1, numpy and torch give the same; numpy comes back as numpy."""
    model, images = case.model, case.some
    expected = model.transform(images)
    as_floats = model.transform(images.float() / 255)
    assert torch.allclose(as_floats, expected, atol=1e-5), "floats in 0..1 give other features than uint8."
    array = model.transform(images.numpy())
    assert isinstance(array, np.ndarray), "numpy images come back as a tensor."
    assert np.allclose(array, expected.numpy()), "numpy images give other features."
    if images.ndim == 3:
        assert torch.equal(model.transform(images[:, None]), expected), (
            "a channel dimension changes features."
        )


def input_is_unchanged(case: EncoderCase) -> None:
    """Neither images nor labels are written to; transform leaves the encoder as it is."""
    images, labels = case.images.clone(), case.labels.clone()
    model = case.fitted(images, labels)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.transform(images)
    assert torch.equal(images, case.images), "images were changed."
    assert torch.equal(labels, case.labels), "labels were changed."
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), f"transform changed {name}."
    assert not model.training, "fit leaves the encoder in training mode."


def gradients_reach_the_backbone(case: EncoderCase) -> None:
    """A forward pass on floats can be fine-tuned."""
    model = case.fitted()
    x = case.some.float() / 255
    model(x[:, None] if x.ndim == 3 else x).square().sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if any(p.requires_grad for p in model.parameters()):
        assert any(bool(g.abs().sum() > 0) for g in gradients), "no gradient reaches a parameter."


def save_and_load_are_equal(case: EncoderCase) -> None:
    """A saved encoder comes back the same."""
    if not case.savable:
        return
    with tempfile.TemporaryDirectory() as folder:
        case.model.save_pretrained(f"{folder}/model")
        loaded = type(case.model).from_pretrained(f"{folder}/model")
    assert torch.equal(loaded.transform(case.some), case.model.transform(case.some)), (
        "the loaded encoder gives other features."
    )


def bad_inputs_are_refused(case: EncoderCase) -> None:
    """What cannot be used raises a ValueError (`DataError` is one), in words."""
    model, images = case.model, case.some
    floats = images.float() / 255
    holed = floats.clone()
    holed.view(len(holed), -1)[3, 0] = torch.nan
    queries: list[tuple[str, Callable[[], Any]]] = [
        ("NaN in images", lambda: model.transform(holed)),
        ("floats in 0..255", lambda: model.transform(255 * floats)),
        ("integers that are not uint8", lambda: model.transform(images.long())),
        ("one image without a batch dimension", lambda: model.transform(images[0, 0])),
        ("two channels", lambda: model.transform(torch.zeros(2, 2, 28, 28))),
        ("a batch size of 0", lambda: model.transform(images, batch_size=0)),
        ("a list", lambda: cast(Any, model).transform(images.tolist())),
        ("fit on no images", lambda: case.fitted(images[:0], case.labels[:0])),
        ("fit on NaN", lambda: case.fitted(holed, case.labels[: len(holed)])),
    ]
    if model.supervised:
        queries += [
            ("a supervised fit without labels", lambda: case.build(0).fit(images, progress=False)),
            ("too few labels", lambda: case.fitted(labels=case.labels[1:])),
            ("labels that are no integers", lambda: case.fitted(labels=case.labels.float())),
        ]
    for what, query in queries:
        _raises(ValueError, what, query)


def silent_and_without_network(case: EncoderCase) -> None:
    """Fitting and transforming print nothing and open no connection."""
    out, err = io.StringIO(), io.StringIO()
    with _no_network(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        case.fitted().transform(case.some)
    assert not out.getvalue(), f"printed to stdout: {out.getvalue()[:80]!r}."
    assert not err.getvalue(), f"printed to stderr: {err.getvalue()[:80]!r}."


ENCODER_CHECKS: tuple[Callable[[EncoderCase], None], ...] = (
    same_seed_same_result,
    features_are_as_announced,
    batch_equals_loop,
    types_of_images_agree,
    input_is_unchanged,
    gradients_reach_the_backbone,
    save_and_load_are_equal,
    bad_inputs_are_refused,
    silent_and_without_network,
)


def _numpy_state() -> tuple[bytes, int]:
    """Of numpy's global generator."""
    state = np.random.get_state(legacy=False)["state"]  # noqa: NPY002 (to see that nobody draws from it)
    return state["key"].tobytes(), state["pos"]
