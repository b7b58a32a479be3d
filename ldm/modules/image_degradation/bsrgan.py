"""The degradation model of BSRGAN: blur, scaling, noise and JPEG of random strength in random order.

`FULL` is the published strength, `LIGHT` (see `bsrgan_light`) the weaker one of latent diffusion's upscaling models.
Pictures are (h, w, 3) float32 in [0, 1] unless said otherwise. Random numbers come from Python's and numpy's generators.

Source: Zhang et al. 2021, "Designing a Practical Degradation Model for Deep Blind Image Super-Resolution", section 3.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ldm.modules.image_degradation import utils_image as util
from ldm.modules.image_degradation.kernels import (
    analytic_kernel,
    anisotropic_Gaussian,
    convolve,
    fspecial,
    fspecial_gaussian,
    fspecial_laplacian,
    gen_kernel,
    shift_pixel,
)
from ldm.modules.image_degradation.resample import resize
from ldm.modules.image_degradation.utils_image import modcrop as modcrop_np

__all__ = [
    "FULL", "LIGHT", "Strength", "add_Gaussian_noise", "add_JPEG_noise", "add_Poisson_noise", "add_blur", "add_resize", "add_sharpening",
    "add_speckle_noise", "analytic_kernel", "anisotropic_Gaussian", "bicubic_degradation", "classical_degradation", "degradation_bsrgan",
    "degradation_bsrgan_plus", "degradation_bsrgan_variant", "dpsr_degradation", "fspecial", "fspecial_gaussian", "fspecial_laplacian",
    "gen_kernel", "modcrop_np", "random_crop", "shift_pixel", "srmd_degradation",
]  # fmt: skip


@dataclass(frozen=True)
class Strength:
    """How much damage is done.

    Args:
        blurs: steps that blur, of two.
        blur_divisor: widths of blurs are divided by this.
        scaled: share of the main down-sampling steps that scale by a random factor; the others blur and take every
            sf-th pixel.
        noise: smallest and largest standard deviation of Gaussian noise, of 255.
        quality: smallest and largest quality of JPEG.
    """

    blurs: int
    blur_divisor: float
    scaled: float
    noise: tuple[int, int]
    quality: tuple[int, int]


FULL = Strength(blurs=2, blur_divisor=1.0, scaled=0.75, noise=(2, 25), quality=(30, 95))
LIGHT = Strength(blurs=1, blur_divisor=4.0, scaled=0.8, noise=(1, 2), quality=(80, 95))

INTERPOLATIONS = ("bilinear", "bicubic", "area")
JPEG_SHARE, CAMERA_SHARE, HALVING_SHARE, RARE = 0.9, 0.25, 0.25, 0.1

# -------------------------------------------------------------------------------------------- simple degradations


def bicubic_degradation(x: np.ndarray, sf: int = 3) -> np.ndarray:
    """MATLAB's bicubic scaling to 1 / sf."""
    return util.imresize_np(x, scale=1 / sf)


def srmd_degradation(x: np.ndarray, k: np.ndarray, sf: int = 3) -> np.ndarray:
    """Blur with k (borders wrap around), then scale to 1 / sf. Source: Zhang et al. 2018 (SRMD), equation 1."""
    return bicubic_degradation(convolve(x, k, "wrap"), sf)


def dpsr_degradation(x: np.ndarray, k: np.ndarray, sf: int = 3) -> np.ndarray:
    """Scale to 1 / sf, then blur with k (borders wrap around). Source: Zhang et al. 2019 (DPSR), equation 2."""
    return convolve(bicubic_degradation(x, sf), k, "wrap")


def classical_degradation(x: np.ndarray, k: np.ndarray, sf: int = 3) -> np.ndarray:
    """Blur with k (borders wrap around), then take every sf-th pixel."""
    return convolve(x, k, "wrap")[::sf, ::sf]


# ----------------------------------------------------------------------------------------------------------- steps


def add_sharpening(
    img: np.ndarray, weight: float = 0.5, radius: int = 50, threshold: float = 10
) -> np.ndarray:
    """Unsharp masking where the picture differs from its blur by more than `threshold` of 255, softly bounded.

    Args:
        img: the picture.
        weight: share of the difference that is added.
        radius: of the Gaussian blur, its size in pixels; the next odd number is taken.
        threshold: of 255.
    """
    size = radius + (radius + 1) % 2
    # the width that goes with a size: six standard deviations and a bit, as image libraries choose it
    soft = fspecial_gaussian(size, 0.3 * ((size - 1) * 0.5 - 1) + 0.8)
    residual = img - convolve(img, soft, "reflect")
    mask = convolve((np.abs(residual) * 255 > threshold).astype(img.dtype), soft, "reflect")
    sharp = np.clip(img + weight * residual, 0, 1)
    return mask * sharp + (1 - mask) * img


def add_blur(img: np.ndarray, sf: int = 4, strength: Strength = FULL) -> np.ndarray:
    """Blur with a random Gaussian of 7 × 7 to 21 × 21, every second one wider in one direction. Source: section 3.1."""
    size = random.choice(range(7, 22, 2))
    weaker = strength.blur_divisor
    if random.random() < 0.5:
        variances = [random.uniform(0.5, 4.0 + sf) / weaker for _ in range(2)]
        kernel = anisotropic_Gaussian(size, random.uniform(0, np.pi), *variances)
    else:
        kernel = fspecial_gaussian(size, random.uniform(0.1, (2.0 + 0.2 * sf) / weaker))
    return convolve(img, kernel, "reflect")


def _resized(img: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scaled by one of the plain ways."""
    return np.clip(resize(img, height, width, random.choice(INTERPOLATIONS)), 0, 1)


def _scale(img: np.ndarray, factor: float) -> np.ndarray:
    height, width = (max(1, int(n * factor)) for n in img.shape[:2])
    return _resized(img, height, width)


def add_resize(img: np.ndarray, sf: int = 4) -> np.ndarray:
    """Scale by a random factor: up to 2 (with probability 0.2), down to 1 / (2 sf) (0.7), or not at all."""
    draw = np.random.rand()
    factor = random.uniform(1, 2) if draw > 0.8 else random.uniform(0.5 / sf, 1) if draw < 0.7 else 1.0
    return _scale(img, factor)


def _covariance(level: float) -> np.ndarray:
    """A random covariance of three channels, of largest variance level²."""
    values = np.random.rand(3)
    axes, _ = np.linalg.qr(np.random.rand(3, 3))
    return level**2 * axes @ np.diag(values) @ axes.T


def _noise(shape: tuple[int, ...], low: int, high: int) -> np.ndarray:
    """Gaussian noise of random deviation: coloured (0.4), grey (0.4), or with correlated channels (0.2)."""
    level = random.randint(low, high) / 255.0
    draw = np.random.rand()
    if draw > 0.6:
        return np.random.normal(0, level, shape)
    if draw < 0.4:
        return np.random.normal(0, level, (*shape[:2], 1)) * np.ones(shape[2])
    return np.random.multivariate_normal(np.zeros(3), _covariance(level), shape[:2])


def add_Gaussian_noise(img: np.ndarray, noise_level1: int = 2, noise_level2: int = 25) -> np.ndarray:
    """Add Gaussian noise of a deviation from `noise_level1` to `noise_level2`, of 255. Source: section 3.3."""
    return np.clip(img + _noise(img.shape, noise_level1, noise_level2), 0, 1).astype(img.dtype)


def add_speckle_noise(img: np.ndarray, noise_level1: int = 2, noise_level2: int = 25) -> np.ndarray:
    """As `add_Gaussian_noise`, with the noise multiplied by the picture."""
    return np.clip(img + img * _noise(img.shape, noise_level1, noise_level2), 0, 1).astype(img.dtype)


def add_Poisson_noise(img: np.ndarray) -> np.ndarray:
    """Shot noise of 10² to 10⁴ photons at full brightness, coloured or (every second one) grey."""
    photons = 10 ** (2 * random.random() + 2.0)
    if random.random() < 0.5:
        noisy = np.random.poisson(np.clip(img, 0, 1) * photons) / photons
    else:
        grey = np.clip(img @ np.array([0.299, 0.587, 0.114], img.dtype), 0, 1)
        noisy = img + (np.random.poisson(grey * photons) / photons - grey)[..., None]
    return np.clip(noisy, 0, 1).astype(img.dtype)


def add_JPEG_noise(img: np.ndarray, strength: Strength = FULL) -> np.ndarray:
    """Write as JPEG of a random quality, and read it again. Source: section 3.4."""
    packed = io.BytesIO()
    Image.fromarray(util.single2uint(img)).save(packed, "JPEG", quality=random.randint(*strength.quality))
    return util.uint2single(np.asarray(Image.open(packed)))


def random_crop(
    lq: np.ndarray, hq: np.ndarray, sf: int = 4, lq_patchsize: int = 64
) -> tuple[np.ndarray, np.ndarray]:
    """The same random square of the small picture (side lq_patchsize) and of the large one (sf times that)."""
    top, left = (random.randint(0, n - lq_patchsize) for n in lq.shape[:2])
    big = lq_patchsize * sf
    return (
        lq[top : top + lq_patchsize, left : left + lq_patchsize],
        hq[top * sf : top * sf + big, left * sf : left * sf + big],
    )


# ------------------------------------------------------------------------------------------- the whole degradation


def _halve(img: np.ndarray) -> np.ndarray:
    """Half the size, by one of the plain ways or by MATLAB's."""
    if np.random.rand() < 0.5:
        return _resized(img, *(n // 2 for n in img.shape[:2]))
    return np.clip(util.imresize_np(img, 1 / 2), 0, 1)


def _sample(img: np.ndarray, sf: int, strength: Strength) -> np.ndarray:
    """The main down-sampling, by about sf. Source: section 3.2."""
    if random.random() < strength.scaled:
        return _scale(img, 1 / random.uniform(1, 2 * sf))
    kernel = shift_pixel(fspecial_gaussian(25, random.uniform(0.1, 0.6 * sf)), sf)
    return convolve(img, kernel / kernel.sum(), "reflect")[::sf, ::sf]


def _perhaps(share: float, step: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    return lambda img: step(img) if random.random() < share else img


def degrade(
    img: np.ndarray, sf: int, strength: Strength, isp_model: Any = None
) -> tuple[np.ndarray, np.ndarray]:
    """All steps in random order, and a JPEG at the end.

    Args:
        img: (h, w, 3), sides multiples of sf.
        sf: the result has 1 / sf of the sides.
        strength: of the damage.
        isp_model: a camera's processing, `isp_model.forward(small, large)` → (small, large), a step of its own in a
            quarter of the pictures.

    Returns:
        The degraded picture, and the good one (which only `isp_model` changes).
    """
    height, width = (n // sf for n in img.shape[:2])
    large = img
    if sf == 4 and random.random() < HALVING_SHARE:
        img, sf = _halve(img), 2

    def camera(small: np.ndarray) -> np.ndarray:
        nonlocal large
        small, large = isp_model.forward(small.copy(), large)
        return small

    def final_size(small: np.ndarray) -> np.ndarray:
        return _resized(small, height, width)

    def jpeg(small: np.ndarray) -> np.ndarray:
        return add_JPEG_noise(small, strength)

    steps: list[Callable[[np.ndarray], np.ndarray]] = [
        lambda small: _sample(small, sf, strength),
        final_size,
        *[lambda small: add_blur(small, sf, strength)] * strength.blurs,
        lambda small: add_Gaussian_noise(small, *strength.noise),
        _perhaps(JPEG_SHARE, jpeg),
    ]
    if isp_model is not None:
        steps.append(_perhaps(CAMERA_SHARE, camera))
    order = random.sample(range(len(steps)), len(steps))
    first, second = order.index(0), order.index(1)
    if first > second:  # the final size comes after the main down-sampling
        order[first], order[second] = order[second], order[first]
    for i in order:
        img = steps[i](img)
    return jpeg(img), large


def degradation_bsrgan_variant(
    image: np.ndarray, sf: int = 4, isp_model: Any = None, strength: Strength = FULL
) -> dict[str, np.ndarray]:
    """A picture (h, w, 3) uint8 → `{"image": …}` with its degraded version at 1 / sf, uint8."""
    _check_factor(sf, image)
    small, _ = degrade(modcrop_np(util.uint2single(image), sf), sf, strength, isp_model)
    return {"image": util.single2uint(small)}


def degradation_bsrgan(
    img: np.ndarray, sf: int = 4, lq_patchsize: int = 72, isp_model: Any = None, strength: Strength = FULL
) -> tuple[np.ndarray, np.ndarray]:
    """A random square of the degraded picture, and of the good one.

    Args:
        img: (h, w, 3) float32 in [0, 1].
        sf: factor between both.
        lq_patchsize: side of the degraded square.
        isp_model: see `degrade`.
        strength: of the damage.

    Raises:
        ValueError: a picture smaller than the square.
    """
    small, large = degrade(_large_enough(img, sf, lq_patchsize), sf, strength, isp_model)
    return random_crop(small, large, sf, lq_patchsize)


def degradation_bsrgan_plus(
    img: np.ndarray,
    sf: int = 4,
    shuffle_prob: float = 0.5,
    use_sharp: bool = True,
    lq_patchsize: int = 64,
    isp_model: Any = None,
) -> tuple[np.ndarray, np.ndarray]:
    """As `degradation_bsrgan`, every kind of damage twice, with shot and speckle noise, too.

    Args:
        img: (h, w, 3) float32 in [0, 1].
        sf: factor between both.
        shuffle_prob: share of the pictures whose steps are shuffled as a whole; otherwise only within each half.
        use_sharp: sharpen the good picture first.
        lq_patchsize: side of the degraded square.
        isp_model: see `degrade`.

    Raises:
        ValueError: a picture smaller than the square.
    """
    large = _large_enough(img, sf, lq_patchsize)
    large = add_sharpening(large) if use_sharp else large
    height, width = (n // sf for n in large.shape[:2])
    small = large

    def camera(x: np.ndarray) -> np.ndarray:
        nonlocal large
        x, large = isp_model.forward(x.copy(), large)
        return x

    half: list[Callable[[np.ndarray], np.ndarray]] = [
        lambda x: add_blur(x, sf),
        lambda x: add_resize(x, sf),
        add_Gaussian_noise,
        _perhaps(RARE, add_Poisson_noise),
        _perhaps(RARE, add_speckle_noise),
    ]
    if isp_model is not None:
        half.append(_perhaps(CAMERA_SHARE, camera))
    jpeg = _perhaps(JPEG_SHARE, add_JPEG_noise)
    steps = [*half, jpeg, *half]
    for step in (
        _shuffled(steps) if random.random() < shuffle_prob else [*_shuffled(half), jpeg, *_shuffled(half)]
    ):
        small = step(small)
    small = _resized(small, height, width)
    return random_crop(add_JPEG_noise(small), large, sf, lq_patchsize)


def _shuffled(
    steps: Sequence[Callable[[np.ndarray], np.ndarray]],
) -> list[Callable[[np.ndarray], np.ndarray]]:
    return random.sample(list(steps), len(steps))


def _check_factor(sf: int, img: np.ndarray) -> None:
    if not isinstance(sf, int) or sf < 1 or min(img.shape[:2]) < sf:
        raise ValueError(f"sf={sf} must be a whole number from 1 to the shorter side, {min(img.shape[:2])}")


def _large_enough(img: np.ndarray, sf: int, lq_patchsize: int) -> np.ndarray:
    """The picture cut to multiples of sf."""
    _check_factor(sf, img)
    if min(img.shape[:2]) < lq_patchsize * sf:
        raise ValueError(
            f"a picture of {img.shape[1]} x {img.shape[0]} is too small for squares of "
            f"lq_patchsize · sf = {lq_patchsize} · {sf} = {lq_patchsize * sf} pixels"
        )
    return modcrop_np(img, sf)
