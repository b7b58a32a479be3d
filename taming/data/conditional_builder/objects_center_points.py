"""Objects of a scene as tokens: what each is, and where its centre lies."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image as PIL_Image
from PIL import ImageDraw
from torch import LongTensor, Tensor

from taming.data.conditional_builder.utils import (
    BLACK,
    COLOR_PALETTE,
    FULL_CROP,
    GRAY_75,
    WHITE,
    absolute_bbox,
    additional_parameters_string,
    filter_annotations,
    get_circle_size,
    get_plot_font_size,
    horizontally_flip_bbox,
    pad_list,
    plot_font,
    rescale_annotations,
)
from taming.data.helper_types import Annotation, BoundingBox
from taming.data.images import to_float


class ObjectsCenterPointsConditionalBuilder:
    """Writes objects as (what, where) tokens, `no_max_objects` of them, then two for the crop if it is encoded.

    "What" is the class plus `no_object_classes` times the set flags (group 1, occluded 2, depiction 4, inside 8).
    "Where" is the nearest point of a grid of ⌊√no_tokens⌋ × ⌊√no_tokens⌋ in reading order. The last token stands for
    "nothing".

    Args:
        no_object_classes: number of classes.
        no_max_objects: objects beyond this are left out.
        no_tokens: size of the vocabulary.
        encode_crop: keep coordinates of the whole picture and append the crop's corners.
        use_group_parameter: encode the flag "group".
        use_additional_parameters: encode the other flags.

    Raises:
        ValueError: the vocabulary is too small for what is to be encoded.

    Source: Esser et al. 2021 (taming transformers), scene images from bounding boxes.
    """

    object_descriptor_length = 2

    def __init__(
        self,
        no_object_classes: int,
        no_max_objects: int,
        no_tokens: int,
        encode_crop: bool,
        use_group_parameter: bool,
        use_additional_parameters: bool,
    ) -> None:
        self.no_object_classes, self.no_max_objects, self.no_tokens = (
            no_object_classes,
            no_max_objects,
            no_tokens,
        )
        self.encode_crop = encode_crop
        self.use_group_parameter, self.use_additional_parameters = (
            use_group_parameter,
            use_additional_parameters,
        )
        self.no_sections = math.isqrt(no_tokens)
        if self.no_sections < 2:
            raise ValueError(f"no_tokens={no_tokens} gives no grid of coordinates; use 4 or more")

    @property
    def none(self) -> int:
        """The token for "nothing"."""
        return self.no_tokens - 1

    @property
    def embedding_dim(self) -> int:
        """Length of the sequence that `build` returns."""
        return self.no_max_objects * self.object_descriptor_length + 2 * self.encode_crop

    # --------------------------------------------------------------------------------------- what and where as tokens

    def object_representation(self, annotation: Annotation) -> int:
        """Class and flags of an object as one token."""
        flags = self.use_group_parameter and annotation.is_group_of is True
        modifier = int(flags)
        if self.use_additional_parameters:
            others = (annotation.is_occluded, annotation.is_depiction, annotation.is_inside)
            modifier += sum(2 << bit for bit, is_set in enumerate(others) if is_set is True)
        return annotation.category_no + self.no_object_classes * modifier

    def representation_to_annotation(self, representation: int) -> Annotation:
        """Class and flags that a token stands for; the other fields say nothing."""
        modifier, category_no = divmod(representation, self.no_object_classes)
        extra = self.use_additional_parameters
        return Annotation(
            area=0.0,
            image_id="",
            bbox=FULL_CROP,
            category_no=category_no,
            category_id="",
            is_group_of=bool(modifier & 1) and self.use_group_parameter,
            is_occluded=bool(modifier & 2) and extra,
            is_depiction=bool(modifier & 4) and extra,
            is_inside=bool(modifier & 8) and extra,
        )

    def tokenize_coordinates(self, x: float, y: float) -> int:
        """Token of the grid point nearest to (x, y) in [0, 1]²."""
        last = self.no_sections - 1
        return round(y * last) * self.no_sections + round(x * last)

    def coordinates_from_token(self, token: int) -> tuple[float, float]:
        """The grid point (x, y) of a token."""
        row, column = divmod(int(token), self.no_sections)
        return column / (self.no_sections - 1), row / (self.no_sections - 1)

    def bbox_from_token_pair(self, token1: int, token2: int) -> BoundingBox:
        """The box between its top left and bottom right corner."""
        (left, top), (right, bottom) = (
            self.coordinates_from_token(token1),
            self.coordinates_from_token(token2),
        )
        return left, top, right - left, bottom - top

    def token_pair_from_bbox(self, bbox: BoundingBox) -> tuple[int, int]:
        """Tokens of a box's top left and bottom right corner."""
        return (
            self.tokenize_coordinates(bbox[0], bbox[1]),
            self.tokenize_coordinates(bbox[0] + bbox[2], bbox[1] + bbox[3]),
        )

    def _descriptor(self, annotation: Annotation) -> tuple[int, ...]:
        x, y, w, h = annotation.bbox
        return self.object_representation(annotation), self.tokenize_coordinates(x + w / 2, y + h / 2)

    def _place(self, tokens: Sequence[int]) -> tuple[float, ...]:
        return self.coordinates_from_token(tokens[0])

    # ----------------------------------------------------------------------------------------------------- sequences

    def build(
        self,
        annotations: list[Annotation],
        crop_coordinates: BoundingBox | None = None,
        horizontal_flip: bool = False,
    ) -> LongTensor:
        """Objects as (embedding_dim,) int64, in random order (Python's generator).

        Args:
            annotations: with boxes as shares of the whole picture; as published, this list itself is shuffled.
            crop_coordinates: the part of the picture that is seen; objects outside are left out.
            horizontal_flip: that part is mirrored.

        Raises:
            ValueError: a token beyond the vocabulary.
        """
        if len(annotations) == 0:
            warnings.warn("Did not receive any annotations.", stacklevel=2)
        if len(annotations) > self.no_max_objects:
            warnings.warn(
                f"Received {len(annotations)} annotations; keeping the first {self.no_max_objects}.",
                stacklevel=2,
            )
            annotations = annotations[: self.no_max_objects]
        crop = crop_coordinates or FULL_CROP
        random.shuffle(annotations)
        seen = filter_annotations(annotations, crop)
        tail: tuple[int, ...] = ()
        if self.encode_crop:
            seen = rescale_annotations(seen, FULL_CROP, horizontal_flip)
            tail = self.token_pair_from_bbox(horizontally_flip_bbox(crop) if horizontal_flip else crop)
        else:
            seen = rescale_annotations(seen, crop, horizontal_flip)
        descriptors = [self._descriptor(annotation) for annotation in seen]
        nothing = (self.none,) * self.object_descriptor_length
        groups = pad_list(descriptors, nothing, self.no_max_objects)
        return self._checked([token for group in groups for token in group] + list(tail))

    def _checked(self, tokens: list[int]) -> LongTensor:
        if max(tokens) >= self.no_tokens or min(tokens) < 0:
            raise ValueError(
                f"objects give the tokens {min(tokens)} to {max(tokens)}, but the vocabulary is 0 to {self.none}; "
                "raise no_tokens, or check the boxes, whose numbers must lie in [0, 1]"
            )
        return LongTensor(tokens)

    def inverse_build(
        self, conditional: Tensor
    ) -> tuple[list[tuple[int, tuple[float, ...]]], BoundingBox | None]:
        """Tokens (embedding_dim,) → [(what, where)], and the crop if it is encoded."""
        tokens = conditional.tolist()
        crop = None
        if self.encode_crop:
            crop = self.bbox_from_token_pair(tokens[-2], tokens[-1])
            tokens = tokens[:-2]
        length = self.object_descriptor_length
        groups = (tokens[i : i + length] for i in range(0, len(tokens), length))
        return [(group[0], self._place(group[1:])) for group in groups if group[0] != self.none], crop

    def plot(
        self,
        conditional: Tensor,
        label_for_category_no: Callable[[int], str],
        figure_size: tuple[int, int],
        line_width: int = 3,
        font_size: int | None = None,
    ) -> Tensor:
        """A drawing of the layout, (3, *figure_size) in [-1, 1].

        Args:
            conditional: tokens (embedding_dim,).
            label_for_category_no: name of a class.
            figure_size: height and width.
            line_width: of boxes, and of the crop.
            font_size: of the names; by the figure's size if None.
        """
        height, width = figure_size
        canvas = PIL_Image.new("RGB", (width, height), WHITE)
        draw = ImageDraw.Draw(canvas)
        font = plot_font(get_plot_font_size(font_size, figure_size))
        objects, crop = self.inverse_build(conditional)
        for what, where in objects:
            annotation = self.representation_to_annotation(what)
            label = (
                label_for_category_no(annotation.category_no) + " " + additional_parameters_string(annotation)
            )
            color = COLOR_PALETTE[annotation.category_no % len(COLOR_PALETTE)]
            self._draw_object(draw, where, label.strip(), color, font, (width, height), line_width)
        if crop is not None:
            draw.rectangle(absolute_bbox(crop, width, height), outline=GRAY_75, width=line_width)
        return torch.from_numpy(to_float(np.array(canvas))).permute(2, 0, 1)

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
        x, y = where[0] * size[0], where[1] * size[1]
        radius = get_circle_size(size)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)
        draw.text((x, y), label, anchor="md", fill=BLACK, font=font)
