"""`bsrgan` with its weaker strength, for pictures whose content must survive."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from ldm.modules.image_degradation import bsrgan
from ldm.modules.image_degradation.bsrgan import (
    LIGHT,
    add_resize,
    anisotropic_Gaussian,
    fspecial,
    gen_kernel,
    random_crop,
    shift_pixel,
)
from ldm.modules.image_degradation.resample import resize

__all__ = [
    "add_Gaussian_noise", "add_JPEG_noise", "add_blur", "add_resize", "anisotropic_Gaussian", "degradation_bsrgan",
    "degradation_bsrgan_variant", "fspecial", "gen_kernel", "random_crop", "shift_pixel",
]  # fmt: skip

add_blur = partial(bsrgan.add_blur, strength=LIGHT)
add_JPEG_noise = partial(bsrgan.add_JPEG_noise, strength=LIGHT)
add_Gaussian_noise = bsrgan.add_Gaussian_noise
degradation_bsrgan = partial(bsrgan.degradation_bsrgan, strength=LIGHT)


def degradation_bsrgan_variant(
    image: np.ndarray, sf: int = 4, isp_model: Any = None, up: bool = False
) -> dict[str, np.ndarray]:
    """A picture (h, w, 3) uint8 → `{"image": …}` with its slightly degraded version at 1 / sf, uint8.

    Args:
        image: the picture.
        sf: factor of the sides.
        isp_model: see `bsrgan.degrade`.
        up: scale the result back to the picture's size (bicubic).
    """
    small = bsrgan.degradation_bsrgan_variant(image, sf, isp_model, LIGHT)["image"]
    return {"image": resize(small, image.shape[0], image.shape[1], "bicubic") if up else small}
