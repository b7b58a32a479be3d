"""Crops and flips that also return where they cut, for pictures whose objects have coordinates."""

from __future__ import annotations

import random
from typing import Any

import torch
from PIL.Image import Image as PilImage
from torch import Tensor
from torchvision.transforms import CenterCrop, RandomCrop, RandomHorizontalFlip
from torchvision.transforms import functional as F
from torchvision.transforms.functional import pil_to_tensor

from taming.data.helper_types import BoundingBox, Image
from taming.data.images import ImageSizeError

__all__ = [
    "CenterCropReturnCoordinates",
    "Random2dCropReturnCoordinates",
    "RandomCrop1dReturnCoordinates",
    "RandomHorizontalFlipReturn",
    "convert_pil_to_tensor",
    "pil_to_tensor",
]


def convert_pil_to_tensor(image: PilImage) -> Tensor:
    """A PIL picture as (c, h, w) uint8."""
    return pil_to_tensor(image)


def _width_and_height(image: Image) -> tuple[int, int]:
    height, width = F.get_dimensions(image)[1:]
    return width, height


class CenterCropReturnCoordinates(CenterCrop):
    """Cut the middle; returns (box, picture).

    Raises:
        ImageSizeError: the picture is smaller than the crop.
    """

    @staticmethod
    def get_bbox_of_center_crop(width: int, height: int) -> BoundingBox:
        """Box of the largest square in the middle of a picture."""
        side = min(width, height)
        return _centred_box(width, height, side, side)

    def forward(self, img: Image) -> tuple[BoundingBox, Any]:
        """Picture (PIL or (c, h, w)) → (box, the cut)."""
        width, height = _width_and_height(img)
        crop_height, crop_width = self.size
        if crop_width > width or crop_height > height:
            raise ImageSizeError(
                f"a picture of {width} x {height} pixels is smaller than the crop of {crop_width} x {crop_height}; "
                "scale it up first"
            )
        return _centred_box(width, height, crop_width, crop_height), super().forward(img)


def _centred_box(width: int, height: int, crop_width: int, crop_height: int) -> BoundingBox:
    w, h = crop_width / width, crop_height / height
    return (1 - w) / 2, (1 - h) / 2, w, h


class RandomCrop1dReturnCoordinates(RandomCrop):
    """Cut a rectangle of a given size at random, by torch's generator; returns (box, picture).

    After scaling the shorter side to that size, only the position along the longer side is random.
    """

    def forward(self, img: Image) -> tuple[BoundingBox, Any]:
        """Picture (PIL or (c, h, w)) → (box, the cut)."""
        width, height = _width_and_height(img)
        top, left, h, w = self.get_params(img, self.size)
        return (left / width, top / height, w / width, h / height), F.crop(img, top, left, h, w)


class Random2dCropReturnCoordinates(torch.nn.Module):
    """Cut a square of random side and place, by Python's generator (side, top, left); returns (box, picture).

    Args:
        min_size: smallest side; a picture with a shorter side gives its largest square.
    """

    def __init__(self, min_size: int) -> None:
        super().__init__()
        self.min_size = min_size

    def forward(self, img: Image) -> tuple[BoundingBox, Any]:
        """Picture (PIL or (c, h, w)) → (box, the cut)."""
        width, height = _width_and_height(img)
        largest = min(width, height)
        # no draw where there is no choice: the published order of random numbers
        side = random.randint(self.min_size, largest) if largest > self.min_size else largest
        top = random.randint(0, height - side)
        left = random.randint(0, width - side)
        return (left / width, top / height, side / width, side / height), F.crop(img, top, left, side, side)


class RandomHorizontalFlipReturn(RandomHorizontalFlip):
    """Mirror with probability `p`; returns (whether it did, picture)."""

    def forward(self, img: Image) -> tuple[bool, Any]:
        """Picture (PIL or (c, h, w)) → (mirrored, picture)."""
        flip = bool(torch.rand(1) < self.p)
        return flip, F.hflip(img) if flip else img
