"""Objects of a scene as tokens: what each is, and the corners of its box."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import ImageDraw

from taming.data.conditional_builder.objects_center_points import ObjectsCenterPointsConditionalBuilder
from taming.data.conditional_builder.utils import BLACK, absolute_bbox
from taming.data.helper_types import Annotation


class ObjectsBoundingBoxConditionalBuilder(ObjectsCenterPointsConditionalBuilder):
    """As its base, with three tokens an object: what, top left corner, bottom right corner."""

    object_descriptor_length = 3

    def _descriptor(self, annotation: Annotation) -> tuple[int, ...]:
        return self.object_representation(annotation), *self.token_pair_from_bbox(annotation.bbox)

    def _place(self, tokens: Sequence[int]) -> tuple[float, ...]:
        return self.bbox_from_token_pair(tokens[0], tokens[1])

    def _draw_object(
        self,
        draw: ImageDraw.ImageDraw,
        where: tuple[float, ...],
        label: str,
        color: tuple[int, int, int],
        font: Any,
        size: tuple[int, int],
        line_width: int,
    ) -> None:
        x, y, w, h = where
        left, top, right, bottom = absolute_bbox((x, y, w, h), *size)
        draw.rectangle((left, top, max(left, right), max(top, bottom)), outline=color, width=line_width)
        draw.text((left + line_width, top + line_width), label, anchor="la", fill=BLACK, font=font)
