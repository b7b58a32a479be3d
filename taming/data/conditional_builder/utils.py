"""Boxes, annotations and the look of layout plots."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from PIL import ImageFont

from taming.data.helper_types import Annotation, BoundingBox
from taming.util import get_obj_from_str

# ten hues that stay apart on white (Tableau 10)
COLOR_PALETTE = [
    (31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189),
    (140, 86, 75), (227, 119, 194), (127, 127, 127), (188, 189, 34), (23, 190, 207),
]  # fmt: skip
BLACK = (0, 0, 0)
GRAY_75 = (63, 63, 63)
GRAY_50 = (127, 127, 127)
GRAY_25 = (191, 191, 191)
WHITE = (255, 255, 255)
FULL_CROP: BoundingBox = (0.0, 0.0, 1.0, 1.0)

PLOT_FONT = "/usr/share/fonts/truetype/lato/Lato-Regular.ttf"
# longest side of a plot from which on these sizes hold: font, radius of a point
PLOT_SIZES = ((512, 15, 4), (256, 12, 3), (0, 10, 2))
FLAGS = ("group", "occluded", "depiction", "inside")  # Annotation.is_group_of, is_occluded, …


def intersection_area(rectangle1: BoundingBox, rectangle2: BoundingBox) -> float:
    """Area shared by two boxes (left, top, width, height)."""
    sides = (
        max(0.0, min(a + length_a, b + length_b) - max(a, b))
        for a, length_a, b, length_b in zip(
            rectangle1[:2], rectangle1[2:], rectangle2[:2], rectangle2[2:], strict=True
        )
    )
    width, height = sides
    return width * height


def horizontally_flip_bbox(bbox: BoundingBox) -> BoundingBox:
    """The box in the mirrored picture."""
    return 1 - (bbox[0] + bbox[2]), bbox[1], bbox[2], bbox[3]


def absolute_bbox(relative_bbox: BoundingBox, width: int, height: int) -> tuple[int, int, int, int]:
    """Left, top, right and bottom in pixels, rounded down."""
    x, y, w, h = (
        relative_bbox[0] * width,
        relative_bbox[1] * height,
        relative_bbox[2] * width,
        relative_bbox[3] * height,
    )
    return int(x), int(y), int(x + w), int(y + h)


def pad_list(list_: list[Any], pad_element: Any, pad_to_length: int) -> list[Any]:
    """The list, filled up at its end to a length (never cut)."""
    return list_ + [pad_element] * (pad_to_length - len(list_))


def rescale_annotations(annotations: Iterable[Annotation], crop: BoundingBox, flip: bool) -> list[Annotation]:
    """Annotations with boxes as shares of a crop, mirrored if `flip`.

    A box that begins before the crop starts at its edge but keeps its width, as published; one that ends beyond it
    ends at its edge.
    """

    def rescale(bbox: BoundingBox) -> BoundingBox:
        x, y = max(0.0, (bbox[0] - crop[0]) / crop[2]), max(0.0, (bbox[1] - crop[1]) / crop[3])
        inside = (x, y, min(bbox[2] / crop[2], 1 - x), min(bbox[3] / crop[3], 1 - y))
        return horizontally_flip_bbox(inside) if flip else inside

    return [annotation._replace(bbox=rescale(annotation.bbox)) for annotation in annotations]


def filter_annotations(annotations: Iterable[Annotation], crop: BoundingBox) -> list[Annotation]:
    """Annotations whose box shares some area with the crop."""
    return [annotation for annotation in annotations if intersection_area(annotation.bbox, crop) > 0.0]


def additional_parameters_string(annotation: Annotation, short: bool = True) -> str:
    """The flags of an object for its label, such as `(g,o)` or `(group,occluded)`; empty if it has none."""
    set_flags = zip(
        FLAGS,
        (annotation.is_group_of, annotation.is_occluded, annotation.is_depiction, annotation.is_inside),
        strict=True,
    )
    names = [name[0] if short else name for name, is_set in set_flags if is_set]
    return f"({','.join(names)})" if names else ""


def get_plot_font_size(font_size: int | None, figure_size: Sequence[int]) -> int:
    """The size, or one that fits the figure if it is None."""
    return font_size if font_size is not None else _fitting(figure_size)[1]


def get_circle_size(figure_size: Sequence[int]) -> int:
    """Radius of a point that fits the figure."""
    return _fitting(figure_size)[2]


def _fitting(figure_size: Sequence[int]) -> tuple[int, int, int]:
    return next(sizes for sizes in PLOT_SIZES if max(figure_size) >= sizes[0])


def plot_font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Lato where the system has it, else the font that comes with PIL."""
    try:
        return ImageFont.truetype(PLOT_FONT, size)
    except OSError:
        return ImageFont.load_default(size)


def load_object_from_string(object_string: str) -> Any:
    """The object behind a dotted path.

    Raises:
        ConfigError: there is no such module or name.
    """
    return get_obj_from_str(object_string)
