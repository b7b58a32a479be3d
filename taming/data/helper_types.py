"""What the object data sets pass around: annotations, categories, descriptions of pictures."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from PIL.Image import Image as PilImage
from torch import Tensor

Image = PilImage | Tensor
BoundingBox = tuple[float, float, float, float]
"""Left, top, width, height, as shares of the picture's width and height."""
CropMethodType = Literal["none", "random", "center", "random-2d"]
SplitType = Literal["train", "validation", "test"]


class ImageDescription(NamedTuple):
    """A picture of a data set; `original_size` is (width, height)."""

    id: str
    file_name: str
    original_size: tuple[int, int] | None
    url: str | None = None
    license: int | None = None
    coco_url: str | None = None
    date_captured: str | None = None
    flickr_url: str | None = None
    flickr_id: str | None = None
    coco_id: str | None = None


class Category(NamedTuple):
    """A class of objects."""

    id: str
    super_category: str | None
    name: str


class Annotation(NamedTuple):
    """An object in a picture; `area` and `bbox` are shares of the picture, `category_no` counts from 0."""

    area: float
    image_id: str
    bbox: BoundingBox
    category_no: int
    category_id: str
    id: int | None = None
    source: str | None = None
    confidence: float | None = None
    is_group_of: bool | None = None
    is_truncated: bool | None = None
    is_occluded: bool | None = None
    is_depiction: bool | None = None
    is_inside: bool | None = None
    segmentation: Any = None
