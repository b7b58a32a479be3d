"""Pictures as arrays and tensors of several number types, colour spaces, and measures of likeness.

In names, `uint` is uint8 in 0 … 255, `single` is float32 in [0, 1], `tensor3` is (c, h, w), `tensor4` is (1, c, h, w).
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from ldm.modules.image_degradation.resample import matlab_bicubic
from taming.data.images import open_rgb
from taming.util import atomic_path

# ------------------------------------------------------------------------------------------------------------- files


def imread_uint(path: str | os.PathLike[str], n_channels: int = 3) -> np.ndarray:
    """A file as (h, w, 3), or (h, w, 1) in grey, uint8."""
    if n_channels not in (1, 3):
        raise ValueError(f"n_channels={n_channels} must be 1 (grey) or 3 (RGB)")
    picture = open_rgb(path)
    return np.asarray(picture) if n_channels == 3 else np.asarray(picture.convert("L"))[..., None]


def imsave(img: np.ndarray, img_path: str | os.PathLike[str]) -> None:
    """Write (h, w, 3), (h, w, 1) or (h, w) uint8 as a file; its name says the format."""
    kind = Image.registered_extensions().get(Path(img_path).suffix.lower())
    if kind is None:
        raise ValueError(f"{img_path}: the name should end as a picture's does, such as .png")
    with atomic_path(img_path) as temporary:
        Image.fromarray(np.squeeze(img)).save(temporary, kind)


imwrite = imsave

# ------------------------------------------------------------------------------------------------------ number types


def uint2single(img: np.ndarray) -> np.ndarray:
    """0 … 255 → [0, 1], float32."""
    return img.astype(np.float32) / np.float32(255)


def single2uint(img: np.ndarray) -> np.ndarray:
    """[0, 1] → uint8, clipped and rounded."""
    return (img.clip(0, 1) * 255.0).round().astype(np.uint8)


def single2uint16(img: np.ndarray) -> np.ndarray:
    """[0, 1] → uint16, clipped and rounded."""
    return (img.clip(0, 1) * 65535.0).round().astype(np.uint16)


def single2tensor3(img: np.ndarray) -> Tensor:
    """(h, w, c) → (c, h, w), float32, the numbers as they are."""
    return torch.from_numpy(np.ascontiguousarray(img)).permute(2, 0, 1).float()


def single2tensor4(img: np.ndarray) -> Tensor:
    """(h, w, c) → (1, c, h, w), float32, the numbers as they are."""
    return single2tensor3(img)[None]


def uint2tensor3(img: np.ndarray) -> Tensor:
    """(h, w, c) or (h, w) in 0 … 255 → (c, h, w) in [0, 1]."""
    return single2tensor3(img if img.ndim == 3 else img[..., None]) / 255.0


def uint2tensor4(img: np.ndarray) -> Tensor:
    """(h, w, c) or (h, w) in 0 … 255 → (1, c, h, w) in [0, 1]."""
    return uint2tensor3(img)[None]


def tensor2single(img: Tensor) -> np.ndarray:
    """(1, c, h, w) or (c, h, w) → (h, w, c) float32, or (h, w) if there is one channel."""
    pixels = img.detach().squeeze().float().cpu().numpy()
    return pixels.transpose(1, 2, 0) if pixels.ndim == 3 else pixels


def tensor2uint(img: Tensor) -> np.ndarray:
    """(1, c, h, w) or (c, h, w) in [0, 1] → (h, w, c) uint8, clipped and rounded."""
    return single2uint(tensor2single(img))


def tensor2img(
    tensor: Tensor, out_type: type[np.number] = np.uint8, min_max: tuple[float, float] = (0, 1)
) -> np.ndarray:
    """A tensor as a picture in the order blue, green, red; a batch becomes one picture, a grid.

    Args:
        tensor: (b, c, h, w), (c, h, w) or (h, w); axes of length 1 are dropped.
        out_type: np.uint8 (0 … 255, rounded), or a floating type ([0, 1]).
        min_max: numbers that become 0 and 1; what lies outside is clipped.

    Raises:
        ValueError: another number of axes.
    """
    low, high = min_max
    tensor = (tensor.detach().squeeze().float().cpu().clamp(low, high) - low) / (high - low)
    if tensor.ndim == 4:
        tensor = make_grid(tensor, nrow=math.isqrt(len(tensor)), normalize=False)
    if tensor.ndim not in (2, 3):
        raise ValueError(f"a picture has 2 to 4 axes, but {tuple(tensor.shape)} came")
    pixels = tensor.numpy()
    if pixels.ndim == 3:
        pixels = pixels[::-1].transpose(1, 2, 0)
    return (pixels * 255.0).round().astype(out_type) if out_type is np.uint8 else pixels.astype(out_type)


# -------------------------------------------------------------------------------------------------- shape and colour

# a quarter turns anticlockwise, then whether top and bottom change places
TURNS = {0: (0, False), 1: (1, True), 2: (0, True), 3: (3, False), 4: (2, True), 5: (1, False), 6: (2, False), 7: (3, True)}  # fmt: skip


def augment_img(img: np.ndarray, mode: int = 0) -> np.ndarray:
    """One of the eight turned and mirrored copies of a picture (h, w, …)."""
    if mode not in TURNS:
        raise ValueError(f"mode={mode} is unknown; choose one of {list(TURNS)}")
    turns, mirrored = TURNS[mode]
    turned = np.rot90(img, turns)
    return np.flipud(turned) if mirrored else turned


def modcrop(img: np.ndarray, scale: int) -> np.ndarray:
    """A copy of (h, w) or (h, w, c), cut at the right and bottom to multiples of `scale`."""
    height, width = (n - n % scale for n in img.shape[:2])
    return img[:height, :width].copy()


def shave(img: np.ndarray, border: int = 0) -> np.ndarray:
    """A copy without its border of that many pixels."""
    height, width = img.shape[:2]
    return img[border : height - border, border : width - border].copy()


# ITU-R BT.601 in studio range: rows make Y, Cb, Cr of red, green, blue in [0, 1]
BT601 = np.array([[65.481, 128.553, 24.966], [-37.797, -74.203, 112.0], [112.0, -93.786, -18.214]])
OFFSET = np.array([16.0, 128.0, 128.0])


def _affine(img: np.ndarray, matrix: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """An affine map of colours in 0 … 255, in the input's type: uint8 rounded, or floating point in [0, 1]."""
    unit = 1.0 if img.dtype == np.uint8 else 255.0
    out = img.astype(np.float64) * unit @ matrix.T + shift
    return out.round().clip(0, 255).astype(np.uint8) if unit == 1.0 else (out / 255.0).astype(img.dtype)


def rgb2ycbcr(img: np.ndarray, only_y: bool = True) -> np.ndarray:
    """RGB (h, w, 3), uint8 or floating in [0, 1] → luma (h, w), or Y, Cb, Cr (h, w, 3), in the same type."""
    if only_y:
        return _affine(img, BT601[:1] / 255.0, OFFSET[:1])[..., 0]
    return _affine(img, BT601 / 255.0, OFFSET)


def bgr2ycbcr(img: np.ndarray, only_y: bool = True) -> np.ndarray:
    """As `rgb2ycbcr`, of a picture whose channels come as blue, green, red."""
    return rgb2ycbcr(img[..., ::-1], only_y)


def ycbcr2rgb(img: np.ndarray) -> np.ndarray:
    """The inverse of `rgb2ycbcr(…, only_y=False)`."""
    inverse = np.linalg.inv(BT601) * 255.0
    return _affine(img, inverse, -inverse @ OFFSET)


# ---------------------------------------------------------------------------------------------------------- measures


def _paired(img1: np.ndarray, img2: np.ndarray, border: int) -> tuple[np.ndarray, np.ndarray]:
    if img1.shape != img2.shape:
        raise ValueError(
            f"pictures of {img1.shape} and {img2.shape} cannot be compared; make them of one size"
        )
    first, second = (shave(img, border).astype(np.float64) for img in (img1, img2))
    return first, second


def calculate_psnr(img1: np.ndarray, img2: np.ndarray, border: int = 0) -> float:
    """Peak signal-to-noise ratio in dB of pictures in 0 … 255, infinite for equal ones; `border` pixels are left out."""
    first, second = _paired(img1, img2, border)
    error = np.mean((first - second) ** 2)
    return float("inf") if error == 0 else 20 * math.log10(255.0 / math.sqrt(error))


def calculate_ssim(img1: np.ndarray, img2: np.ndarray, border: int = 0) -> float:
    """Structural similarity of pictures (h, w) or (h, w, c) in 0 … 255, the mean over channels.

    Args:
        img1: a picture.
        img2: another of the same size, at least 11 × 11 without the border.
        border: pixels left out.

    Source: Wang et al. 2004, equation 13, with a Gaussian window of 11 × 11, σ = 1.5.
    """
    first, second = (
        torch.from_numpy(np.atleast_3d(x)).permute(2, 0, 1)[:, None] for x in _paired(img1, img2, border)
    )
    line = torch.exp(-((torch.arange(11, dtype=torch.float64) - 5) ** 2) / (2 * 1.5**2))
    window = (line[:, None] * line / line.sum() ** 2)[None, None]

    def mean(x: Tensor) -> Tensor:
        return F.conv2d(x, window)

    m1, m2 = mean(first), mean(second)
    v1, v2 = mean(first**2) - m1**2, mean(second**2) - m2**2
    covariance = mean(first * second) - m1 * m2
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    likeness = (2 * m1 * m2 + c1) * (2 * covariance + c2) / ((m1**2 + m2**2 + c1) * (v1 + v2 + c2))
    return float(likeness.mean())


# ----------------------------------------------------------------------------------------------------------- scaling


def imresize_np(img: np.ndarray, scale: float, antialiasing: bool = True) -> np.ndarray:
    """MATLAB's bicubic scaling of (h, w) or (h, w, c) in floating point; see `resample.matlab_bicubic`."""
    return matlab_bicubic(img, scale, antialiasing)


def imresize(img: Tensor, scale: float, antialiasing: bool = True) -> Tensor:
    """MATLAB's bicubic scaling of a tensor (c, h, w) or (h, w)."""
    pixels = img.detach().cpu().numpy()
    pixels = pixels if pixels.ndim == 2 else pixels.transpose(1, 2, 0)
    scaled = torch.from_numpy(matlab_bicubic(pixels, scale, antialiasing))
    return (scaled if scaled.ndim == 2 else scaled.permute(2, 0, 1)).to(img)
