"""Random augmentation of batches of images, as tensors.

Every image of a batch gets a random parameter set of its own; all are drawn from one explicit
`torch.Generator`, then applied to the whole batch at once. Crop, flip, rotation and zoom are one affine map,

    x_source = flip * R(angle) / zoom * (crop_size * x_target) + crop_centre,

and therefore one resampling, bilinear with reflected borders. Colours work on values in 0..1, so images are
augmented before they are normalised; clipping follows every step that can leave that range. The order of the
colour steps is drawn for each image, as the pipelines of SimCLR and BYOL do.

    views = Views.of("simclr")
    first, second = views(images, torch.Generator().manual_seed(0))

Two batches that belong together (the siamese mode) take the same parameters: ``draws = augment.draw(x.shape,
generator)``, then ``augment.apply(x, draws)`` and ``augment.apply(y, draws)``. Everything is differentiable
in the images.

kornia has all of these steps. It is not used: its draws come from torch's global random numbers and cannot
be given a generator, so that one more draw anywhere would change every augmentation after it.

Source: Chen et al. 2020 (SimCLR), appendix A; Grill et al. 2020 (BYOL), appendix B; DeVries and Taylor 2017
(cutout); the presets' numbers are those of solo-learn's and AdaInf's settings for CIFAR.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from paperback.errors import DataError

Range = tuple[float, float]
CROP_TRIALS = 10  # boxes that are tried before the whole image is taken, as torchvision does
LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601
ADJUSTMENTS = ("brightness", "contrast", "saturation", "hue")


@dataclass(frozen=True)
class Draws:
    """The random parameters of a batch: the first dimension of each tensor counts images.

    None stands for a step that the augmentation does not have.
    """

    affine: Float[Tensor, "batch 2 3"] | None  # target to source, in grid_sample's coordinates
    jittered: Tensor | None  # (batch,) bool
    factors: Tensor | None  # (batch, 4) in the order of ADJUSTMENTS
    order: Tensor | None  # (batch, 4) a permutation of the adjustments
    grey: Tensor | None  # (batch,) bool
    sigma: Tensor | None  # (batch,) pixels; 0 is not blurred
    solarised: Tensor | None  # (batch,) bool
    hole: Tensor | None  # (batch, 4) top, left, bottom, right in pixels; empty where not cut
    noise: Tensor | None  # of the images' shape


@dataclass(frozen=True)
class Augment:
    """One random augmentation, and how strong it is. The default changes nothing.

    Attributes:
        crop_scale: least and largest share of the area that is cropped and resized, 0 < a <= b <= 1; (1, 1)
            does not crop.
        crop_ratio: least and largest width : height of the crop, log-uniform.
        flip: probability of a left-right flip.
        rotate: largest angle to either side, degrees.
        zoom: least and largest factor of magnification, > 0.
        jitter: probability that the colours are changed; the next four say how much.
        brightness: the factor is uniform in 1 -/+ this, at least 0.
        contrast: likewise, about the mean luminance of the image.
        saturation: likewise, about the luminance of each pixel; grey images have none.
        hue: largest turn to either side, 0..0.5 of the colour circle.
        grey: probability that colours are taken away.
        blur: probability of a Gaussian blur.
        blur_sigma: its least and largest standard deviation, pixels.
        solarise: probability that values of 0.5 and more are inverted.
        cutout: probability that a square is filled with the image's mean colour; parts of it may lie outside.
        cutout_size: side of the square, as a share of the shorter side of the image.
        noise: largest standard deviation of Gaussian noise, in units of the value range 0..1.

    Raises:
        DataError: naming the setting that is out of range.
    """

    crop_scale: Range = (1.0, 1.0)
    crop_ratio: Range = (3 / 4, 4 / 3)
    flip: float = 0.0
    rotate: float = 0.0
    zoom: Range = (1.0, 1.0)
    jitter: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    grey: float = 0.0
    blur: float = 0.0
    blur_sigma: Range = (0.1, 2.0)
    solarise: float = 0.0
    cutout: float = 0.0
    cutout_size: float = 0.5
    noise: float = 0.0

    def __post_init__(self) -> None:
        for name in ("crop_scale", "crop_ratio", "zoom", "blur_sigma"):
            pair = getattr(self, name)
            if len(pair) != 2 or not 0 < pair[0] <= pair[1] < math.inf:
                raise DataError(f"{name} is {pair}; give two positive numbers, the smaller first.")
            object.__setattr__(self, name, (float(pair[0]), float(pair[1])))  # JSON gives lists
        if self.crop_scale[1] > 1:
            raise DataError(f"crop_scale is {self.crop_scale}; a crop holds at most 1, the whole image.")
        for name in ("flip", "jitter", "grey", "blur", "solarise", "cutout"):
            if not 0 <= getattr(self, name) <= 1:
                raise DataError(f"{name} is {getattr(self, name)}; it is a probability, 0..1.")
        for name in ("rotate", "brightness", "contrast", "saturation", "noise", "cutout_size"):
            if not 0 <= getattr(self, name) < math.inf:
                raise DataError(f"{name} is {getattr(self, name)}; it must be at least 0.")
        if not 0 <= self.hue <= 0.5:
            raise DataError(f"hue is {self.hue}; it must lie in 0..0.5, half the colour circle.")

    def __call__(
        self, images: Float[Tensor, "batch channels height width"], generator: torch.Generator
    ) -> Float[Tensor, "batch channels height width"]:
        """Augment every image with parameters of its own.

        Args:
            images: values in 0..1, 1 or 3 channels, any device.
            generator: source of all draws. With one of the images' device nothing is copied.

        Returns:
            New images of the same shape and dtype, values in 0..1.

        Raises:
            DataError: if the images are not a batch of floats with 1 or 3 channels.
        """
        check_images(images)
        return self.apply(images, self.draw(images.shape, generator))

    def draw(self, shape: torch.Size | tuple[int, ...], generator: torch.Generator) -> Draws:
        """Draw the parameters for a batch of images.

        Args:
            shape: of the batch, (batch, channels, height, width).
            generator: source of the draws; they lie on its device.

        Returns:
            The parameters, for `apply`.
        """
        n, channels, height, width = shape
        device = generator.device

        def uniform(low: float, high: float, *size: int) -> Tensor:
            return torch.rand(n, *size, generator=generator, device=device) * (high - low) + low

        def happens(probability: float) -> Tensor | None:
            return None if probability == 0 else uniform(0, 1) < probability

        jittered = happens(self.jitter)
        factors = order = None
        if jittered is not None:
            spread = torch.tensor([getattr(self, name) for name in ADJUSTMENTS], device=device)
            factors = 1 + spread * uniform(-1, 1, 4)
            factors = torch.cat([factors[:, :3].clamp(min=0), factors[:, 3:] - 1], 1)
            order = uniform(0, 1, 4).argsort(1)
        blurred = happens(self.blur)
        return Draws(
            affine=self._draw_affine(n, height, width, generator),
            jittered=jittered,
            factors=factors,
            order=order,
            grey=happens(self.grey),
            sigma=None if blurred is None else uniform(*self.blur_sigma) * blurred,
            solarised=happens(self.solarise),
            hole=self._draw_hole(n, height, width, generator),
            noise=None
            if self.noise == 0
            else uniform(0, self.noise, 1, 1, 1)
            * torch.randn(n, channels, height, width, generator=generator, device=device),
        )

    def apply(self, images: Float[Tensor, "batch channels height width"], draws: Draws) -> Tensor:
        """Apply parameters that were drawn before; see `__call__`."""
        check_images(images)
        if draws.affine is not None:
            images = _warp(images, draws.affine)
        if draws.jittered is not None:
            images = _jitter(images, draws)
        if draws.grey is not None and images.shape[1] == 3:
            images = torch.where(_column(draws.grey, images), _luminance(images), images)
        if draws.sigma is not None:
            images = _blur(images, draws.sigma, self.blur_sigma[1])
        if draws.solarised is not None:
            inverted = torch.where(images >= 0.5, 1 - images, images)
            images = torch.where(_column(draws.solarised, images), inverted, images)
        if draws.hole is not None:
            images = _cut(images, draws.hole)
        if draws.noise is not None:
            images = (images + draws.noise.to(images)).clamp(0, 1)
        return images

    def settings(self) -> dict[str, Any]:
        """The settings that differ from the default, as JSON values; `Views.of` takes them."""
        default = Augment()
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
            if value != getattr(default, key)
        }

    def towards(self, other: Augment, share: float) -> Self:
        """The augmentation on the way to another one: every number interpolated linearly.

        Args:
            other: where a share of 1 leads.
            share: 0 is this one.
        """

        def between(a: Any, b: Any) -> Any:
            if isinstance(a, tuple):
                return tuple(between(x, y) for x, y in zip(a, b, strict=True))
            return a + share * (b - a)

        values = {f.name: between(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        return replace(self, **values)

    def _draw_affine(self, n: int, height: int, width: int, generator: torch.Generator) -> Tensor | None:
        """The maps from target to source coordinates, both in -1..1, or None if there is nothing to do."""
        crops, turns = self.crop_scale != (1.0, 1.0), self.rotate != 0 or self.zoom != (1.0, 1.0)
        if not (crops or turns or self.flip):
            return None

        def uniform(low: float, high: float) -> Tensor:
            return torch.rand(n, generator=generator, device=generator.device) * (high - low) + low

        size = torch.ones(n, 2, device=generator.device)  # of the crop, as a share of width and height
        centre = torch.zeros_like(size)
        if crops:
            size = self._draw_crop_size(n, height, width, generator)
            place = torch.rand(n, 2, generator=generator, device=generator.device)
            centre = (2 * place - 1) * (1 - size)
        linear = torch.diag_embed(size)
        if turns:
            angle, zoom = uniform(-self.rotate, self.rotate) * math.pi / 180, uniform(*self.zoom)
            cosine, sine = angle.cos() / zoom, angle.sin() / zoom
            aspect = height / width  # a turn is one of pixels, not of coordinates in -1..1
            rotation = torch.stack([cosine, -sine * aspect, sine / aspect, cosine], 1).view(n, 2, 2)
            linear = linear @ rotation
        if self.flip:
            sign = torch.where(uniform(0, 1) < self.flip, -1.0, 1.0)
            linear = linear * torch.stack([sign, torch.ones_like(sign)], 1)[:, None, :]
        return torch.cat([linear, centre[:, :, None]], 2)

    def _draw_crop_size(self, n: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """Width and height of the crops as shares of the image's, ``(n, 2)``.

        Area and ratio are drawn until the box fits; after ten trials the largest central box of an allowed
        ratio is taken.
        """
        draws = torch.rand(n, CROP_TRIALS, 2, generator=generator, device=generator.device)
        low, high = self.crop_scale
        area = (low + (high - low) * draws[..., 0]) * (height * width)
        least, most = (math.log(bound) for bound in self.crop_ratio)
        ratio = torch.exp(least + (most - least) * draws[..., 1])
        sizes = torch.stack([(area * ratio).sqrt() / width, (area / ratio).sqrt() / height], 2)
        fits = (sizes <= 1).all(2)
        first = fits.int().argmax(1)  # the first that fits
        chosen = sizes[torch.arange(n, device=sizes.device), first]
        whole = min(max(width / height, self.crop_ratio[0]), self.crop_ratio[1]) * height / width
        fallback = torch.tensor([min(whole, 1.0), min(1 / whole, 1.0)], device=sizes.device)
        return torch.where(fits.any(1)[:, None], chosen, fallback)

    def _draw_hole(self, n: int, height: int, width: int, generator: torch.Generator) -> Tensor | None:
        if self.cutout == 0:
            return None
        draws = torch.rand(n, 3, generator=generator, device=generator.device)
        centre = draws[:, :2] * torch.tensor([height, width], device=draws.device)
        half = self.cutout_size * min(height, width) / 2 * (draws[:, 2:] < self.cutout)
        return torch.cat([centre - half, centre + half], 1)


@dataclass(frozen=True)
class Views:
    """Two random views of each image, for methods that learn from pairs.

    Attributes:
        first: how the first view is made.
        second: how the second one is; where it is the same augmentation, with draws of its own.
    """

    first: Augment
    second: Augment

    @classmethod
    def of(cls, setting: str | Mapping[str, Any] | Augment | Views) -> Views:
        """Views by the name of a preset, from the settings of an `Augment`, or as they are.

        Args:
            setting: one of `PRESETS`: "simclr" (also called "standard"), "adainf", "standard_asym",
                "adainf_asym", "weak", "spark"; or a dict of `Augment`'s settings.

        Raises:
            DataError: if there is no such preset or setting.
        """
        if isinstance(setting, Views):
            return setting
        if isinstance(setting, Augment):
            return cls(setting, setting)
        if isinstance(setting, str):
            if setting not in PRESETS:
                raise DataError(f"augmentation is {setting!r}; it must be one of {', '.join(PRESETS)}.")
            return PRESETS[setting]
        unknown = set(setting) - {field.name for field in fields(Augment)}
        if unknown:
            names = ", ".join(field.name for field in fields(Augment))
            raise DataError(f"augmentation has no setting {min(unknown)!r}; it has {names}.")
        return cls.of(Augment(**setting))

    def __call__(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The two views of a batch; arguments, values and errors are those of `Augment`."""
        return self.first(images, generator), self.second(images, generator)

    def towards(self, other: Views, share: float) -> Views:
        """The views on the way to others; see `Augment.towards`."""
        return Views(self.first.towards(other.first, share), self.second.towards(other.second, share))


def check_images(images: Tensor) -> None:
    """Refuse what is not a batch of images that can be augmented.

    Raises:
        DataError: saying what they are.
    """
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] not in (1, 3):
        found = f"shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise DataError(
            f"images are {found}; give a tensor (batch, channels, height, width) with 1 or 3 channels."
        )
    if not images.is_floating_point():
        raise DataError(f"images have dtype {images.dtype}; give floats in 0..1 (divide uint8 by 255).")


# -- the steps -----------------------------------------------------------------------------------------------


def _column(values: Tensor, images: Tensor) -> Tensor:
    """One value per image, on the images' device, ready to broadcast."""
    return values.to(images.device).view(-1, 1, 1, 1)


def _warp(images: Tensor, affine: Tensor) -> Tensor:
    grid = F.affine_grid(affine.to(images), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def _luminance(images: Tensor) -> Tensor:
    if images.shape[1] == 1:
        return images
    weights = torch.tensor(LUMINANCE, device=images.device, dtype=images.dtype).view(1, 3, 1, 1)
    return (images * weights).sum(1, keepdim=True)


def _jitter(images: Tensor, draws: Draws) -> Tensor:
    """Brightness, contrast, saturation and hue of the chosen images, each in its own order."""
    assert draws.jittered is not None
    assert draws.factors is not None
    assert draws.order is not None
    chosen = draws.jittered.nonzero()[:, 0]
    factors, order = draws.factors[chosen].to(images), draws.order[chosen].to(images.device)
    chosen = chosen.to(images.device)
    some = images[chosen]
    for place in range(len(ADJUSTMENTS)):
        # Images with the same step at this place go through it together.
        groups = [(order[:, place] == step).nonzero()[:, 0] for step in range(len(ADJUSTMENTS))]
        parts = [
            _adjust(some[rows], step, factors[rows, step]) for step, rows in enumerate(groups) if len(rows)
        ]
        if parts:
            some = torch.cat(parts)[torch.cat(groups).argsort()]
    return images.index_copy(0, chosen, some)


def _adjust(images: Tensor, step: int, factor: Tensor) -> Tensor:
    amount = factor.view(-1, 1, 1, 1)
    if ADJUSTMENTS[step] == "brightness":
        return (images * amount).clamp(0, 1)
    if ADJUSTMENTS[step] == "contrast":
        mean = _luminance(images).mean((1, 2, 3), keepdim=True)
        return torch.lerp(mean.expand_as(images), images, amount).clamp(0, 1)
    if images.shape[1] == 1:  # without colours there is neither saturation nor hue
        return images
    if ADJUSTMENTS[step] == "saturation":
        return torch.lerp(_luminance(images).expand_as(images), images, amount).clamp(0, 1)
    return _turn_hue(images, amount)


def _turn_hue(images: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue by a share of the circle; value and saturation of HSV stay."""
    value, top = images.max(1, keepdim=True)
    chroma = value - images.min(1, keepdim=True).values
    red, green, blue = images.split(1, 1)
    divisor = chroma.clamp(min=torch.finfo(images.dtype).tiny)
    sixths = torch.stack([green - blue, blue - red, red - green], 1)[:, :, 0] / divisor
    hue = sixths.gather(1, top) + 2 * top + 6 * turn  # in sixths of the circle, from red
    offsets = torch.tensor([5.0, 3.0, 1.0], device=images.device, dtype=images.dtype).view(1, 3, 1, 1)
    k = (offsets + hue) % 6
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


def _blur(images: Tensor, sigma: Tensor, largest: float) -> Tensor:
    """A separable Gaussian of each image's own width; borders are reflected.

    Along one axis a blur is a banded matrix, another one for each image. Two batched products are several
    times as fast as a convolution with as many groups as images.
    """
    chosen = (sigma > 0).nonzero()[:, 0].to(images.device)
    if len(chosen) == 0:
        return images
    height, width = images.shape[2:]
    wide = sigma.to(images)[chosen]
    rows, columns = _blur_matrices(wide, largest, height), _blur_matrices(wide, largest, width)
    blurred = (rows[:, None] @ images[chosen] @ columns[:, None].mT).clamp(0, 1)  # but for rounding
    return images.index_copy(0, chosen, blurred)


def _blur_matrices(sigma: Tensor, largest: float, size: int) -> Tensor:
    """``(images, size, size)``: row i holds the weights of the pixels that make pixel i."""
    reach = min(math.ceil(3 * largest), size - 1)
    offsets = torch.arange(-reach, reach + 1, device=sigma.device)
    weights = torch.exp(-0.5 * (offsets / sigma[:, None]) ** 2)
    weights = weights / weights.sum(1, keepdim=True)
    position = (torch.arange(size, device=sigma.device)[None] + offsets[:, None]).abs()
    source = torch.where(position < size, position, 2 * (size - 1) - position)  # reflected at both ends
    taps = F.one_hot(source, size).to(sigma.dtype)  # (offsets, size, size)
    return (weights @ taps.flatten(1)).view(-1, size, size)


def _cut(images: Tensor, hole: Tensor) -> Tensor:
    top, left, bottom, right = (_column(edge, images) for edge in hole.unbind(1))
    y = torch.arange(images.shape[2], device=images.device).view(1, 1, -1, 1) + 0.5
    x = torch.arange(images.shape[3], device=images.device).view(1, 1, 1, -1) + 0.5
    inside = (y > top) & (y < bottom) & (x > left) & (x < right)
    return torch.where(inside, images.mean((2, 3), keepdim=True), images)


# -- presets -------------------------------------------------------------------------------------------------

_STANDARD = Augment(
    crop_scale=(0.08, 1.0), flip=0.5, jitter=0.8, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2,
    grey=0.2, blur=0.5,
)  # fmt: skip
_ADAINF = replace(
    _STANDARD, crop_scale=(0.2, 1.0), jitter=0.4, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1
)
_STANDARD_ASYM = replace(_STANDARD, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, blur=0.0)
_ADAINF_ASYM = replace(_STANDARD_ASYM, crop_scale=(0.2, 1.0), jitter=0.4)
_WEAK = Augment(crop_scale=(0.6, 1.0), flip=0.5)
_SPARK = Augment(crop_scale=(0.67, 1.0), flip=0.5)

PRESETS: dict[str, Views] = {
    "simclr": Views(_STANDARD, _STANDARD),
    "standard": Views(_STANDARD, _STANDARD),
    "adainf": Views(_ADAINF, _ADAINF),
    "standard_asym": Views(_STANDARD_ASYM, replace(_STANDARD_ASYM, solarise=0.2)),
    "adainf_asym": Views(_ADAINF_ASYM, replace(_ADAINF_ASYM, solarise=0.2)),
    "weak": Views(_WEAK, _WEAK),
    "spark": Views(_SPARK, _SPARK),
}
