"""Pictures with the objects in them, as tokens of a layout."""

from __future__ import annotations

import functools
import logging
import os
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torchvision.transforms import Resize

from taming.data.base import SkipsBroken, existing_folder
from taming.data.conditional_builder.objects_bbox import ObjectsBoundingBoxConditionalBuilder
from taming.data.conditional_builder.objects_center_points import ObjectsCenterPointsConditionalBuilder
from taming.data.conditional_builder.utils import FULL_CROP, load_object_from_string
from taming.data.helper_types import Annotation, BoundingBox, Category, ImageDescription
from taming.data.image_transforms import (
    CenterCropReturnCoordinates,
    Random2dCropReturnCoordinates,
    RandomCrop1dReturnCoordinates,
    RandomHorizontalFlipReturn,
    convert_pil_to_tensor,
)
from taming.data.images import open_rgb, to_float
from taming.util import nearest

logger = logging.getLogger(__name__)

# crop_method → the steps for a target size; a step returns a picture, or (where it cut, picture)
CROPS: dict[str | None, Any] = {
    None: lambda size: [],
    "none": lambda size: [Resize((size, size), antialias=True)],
    "center": lambda size: [Resize(size, antialias=True), CenterCropReturnCoordinates(size)],
    "random-1d": lambda size: [Resize(size, antialias=True), RandomCrop1dReturnCoordinates(size)],
    "random-2d": lambda size: [Random2dCropReturnCoordinates(size), Resize(size, antialias=True)],
}
BUILDERS = {
    "objects_center_points": ObjectsCenterPointsConditionalBuilder,
    "objects_bbox": ObjectsBoundingBoxConditionalBuilder,
}
DRAWN_KEYS = ("image", "crop_bbox", "flipped", *BUILDERS)  # what needs the picture
OTHER_KEYS = ("annotations", "image_path", *ImageDescription._fields)
LAST_CATEGORY = "/m/01s55n"  # numbered last, as published


class AnnotatedObjectsDataset(SkipsBroken):
    """Base of the object data sets; items hold the wanted `keys`, in their order.

    Keys: `image` (h, w, 3) float32 in [-1, 1]; `objects_bbox` and `objects_center_points`, tokens (embedding_dim,) int64;
    `annotations` of the picture; `crop_bbox` (what is seen of the picture, as shares); `flipped`; `image_path`; the
    fields of `ImageDescription`.

    Args:
        data_path: folder of the data set.
        split: train, validation or test, as far as the data set has it.
        keys: of the items.
        target_image_size: side of the square pictures.
        min_object_area: objects of this share of the picture or less are left out.
        min_objects_per_image, max_objects_per_image: pictures with fewer or more are left out.
        crop_method: "none" (squeeze to a square), "center", "random-1d" (along the longer side), "random-2d" (side and
            place), or None (picture as it is).
        random_flip: mirror every second picture.
        no_tokens, use_group_parameter, encode_crop: see `ObjectsCenterPointsConditionalBuilder`.
        category_allow_list_target: dotted path of a list of (class name, …), or of a function that gives one from the
            data set's files (see `allow_list`); empty allows every class.
        category_mapping_target: dotted path of a dict, class identifier → the one to use instead.
        no_object_classes: number of classes in the tokens; those that the data set has if None.
        on_error: "skip" broken or missing files (logged, counted) or "raise".

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: an unknown split, key or crop method, or no picture passes the filters.
    """

    use_additional_parameters = False

    def __init__(
        self,
        data_path: str | Path,
        split: str,
        keys: Sequence[str],
        target_image_size: int,
        min_object_area: float,
        min_objects_per_image: int,
        max_objects_per_image: int,
        crop_method: str | None,
        random_flip: bool,
        no_tokens: int,
        use_group_parameter: bool,
        encode_crop: bool,
        category_allow_list_target: str = "",
        category_mapping_target: str = "",
        no_object_classes: int | None = None,
        on_error: str = "skip",
    ) -> None:
        super().__init__(on_error)
        self.data_path, self.split, self.keys = str(data_path), split, list(keys)
        self.target_image_size, self.crop_method, self.random_flip = (
            target_image_size,
            crop_method,
            random_flip,
        )
        self.min_object_area = min_object_area
        self.min_objects_per_image, self.max_objects_per_image = min_objects_per_image, max_objects_per_image
        self.no_tokens, self.no_object_classes = no_tokens, no_object_classes
        self.use_group_parameter, self.encode_crop = use_group_parameter, encode_crop
        self._check_options()
        existing_folder(self.data_path, f"put the data set there; it needs {', '.join(self._needed())}")
        self.paths = self.build_paths(self.data_path)
        self.category_allow_list = None
        if category_allow_list_target:
            allowed = load_object_from_string(category_allow_list_target)
            self.category_allow_list = self.allow_list(allowed) if callable(allowed) else allowed
        self.category_mapping = (
            load_object_from_string(category_mapping_target) if category_mapping_target else {}
        )
        self.image_descriptions: dict[str, ImageDescription] = {}
        self.categories: dict[str, Category] = {}
        self.image_annotations: dict[str, list[Annotation]] = {}
        self.category_ids: list[str] = []
        self.category_number: dict[str, int] = {}
        self.read()
        self.image_annotations = self.filter_object_number(
            self.image_annotations, min_object_area, min_objects_per_image, max_objects_per_image
        )
        self.image_ids = sorted(self.image_annotations)
        if not self.image_ids:
            raise ValueError(
                f"no picture of {self.data_path} ({split}) has {min_objects_per_image} to {max_objects_per_image} objects "
                f"larger than {min_object_area}; loosen these three"
            )

    def _check_options(self) -> None:
        structure = self.get_path_structure()
        if self.split not in structure:
            raise ValueError(f"split={self.split!r} does not exist; choose one of {sorted(structure)}")
        if self.crop_method not in CROPS:
            raise ValueError(f"crop_method={self.crop_method!r} is unknown; choose one of {list(CROPS)}")
        known = (*DRAWN_KEYS, *OTHER_KEYS)
        for key in self.keys:
            if key not in known:
                raise ValueError(f"keys holds {key!r}, which items do not have. {nearest(key, known)}")

    # --------------------------------------------------------------------------------------- what a data set defines

    @abstractmethod
    def get_path_structure(self) -> Mapping[str, Mapping[str, str]]:
        """Split → name → path below `data_path`; `files` is the folder of the pictures."""

    @abstractmethod
    def read(self) -> None:
        """Fill `image_descriptions`, the categories (`set_categories`) and `image_annotations`."""

    def get_image_path(self, image_id: str) -> str:
        """File of a picture."""
        return os.path.join(self.paths["files"], self.image_descriptions[image_id].file_name)

    def allow_list(self, count: Any) -> Sequence[tuple[str, Any]]:
        """What a `category_allow_list_target` that is a function gives for this data set."""
        raise ValueError(
            f"{type(self).__name__} takes only lists as category_allow_list_target, no function {count!r}"
        )

    # ---------------------------------------------------------------------------------------------------- categories

    def _needed(self) -> list[str]:
        return [path for name, path in self.get_path_structure()[self.split].items() if name != "top_level"]

    def build_paths(self, top_level: str) -> dict[str, str]:
        """Name → path of everything the split needs.

        Raises:
            FileNotFoundError: something is missing.
        """
        structure = dict(self.get_path_structure()[self.split])
        root = os.path.join(top_level, structure.pop("top_level", ""))
        paths = {name: os.path.join(root, path) for name, path in structure.items()}
        for name, path in paths.items():
            if not os.path.exists(path):
                raise FileNotFoundError(
                    f"there is no {path} ({name} of {type(self).__name__}, split {self.split!r})"
                )
        return paths

    def set_categories(self, categories: Mapping[str, Category]) -> None:
        """Keep the allowed categories, without those mapped to others, and number them by their identifiers."""
        kept = {key: category for key, category in categories.items() if key not in self.category_mapping}
        if self.category_allow_list is not None:
            allowed = {e if isinstance(e, str) else e[0] for e in self.category_allow_list}
            kept = {key: category for key, category in kept.items() if category.name in allowed}
        self.categories = kept
        self.category_ids = sorted(kept, key=lambda key: (key == LAST_CATEGORY, key))
        self.category_number = {key: number for number, key in enumerate(self.category_ids)}

    @property
    def no_classes(self) -> int:
        """Number of classes in the tokens."""
        return self.no_object_classes if self.no_object_classes else len(self.category_ids)

    def get_category_number(self, category_id: str) -> int:
        """Number of a class."""
        return self.category_number[category_id]

    def get_category_id(self, category_no: int) -> str:
        """Identifier of a class."""
        return self.category_ids[category_no]

    def get_textual_label_for_category_id(self, category_id: str) -> str:
        """Name of a class from its identifier."""
        return self.categories[category_id].name

    def get_textual_label_for_category_no(self, category_no: int) -> str:
        """Name of a class from its number."""
        return self.get_textual_label_for_category_id(self.get_category_id(category_no))

    @staticmethod
    def filter_object_number(
        all_annotations: Mapping[str, list[Annotation]],
        min_object_area: float,
        min_objects_per_image: int,
        max_objects_per_image: int,
    ) -> dict[str, list[Annotation]]:
        """Objects larger than `min_object_area`, of the pictures that have neither too few nor too many of them."""
        large = {
            image_id: [annotation for annotation in annotations if annotation.area > min_object_area]
            for image_id, annotations in all_annotations.items()
        }
        return {k: v for k, v in large.items() if min_objects_per_image <= len(v) <= max_objects_per_image}

    # --------------------------------------------------------------------------------------------------------- items

    @functools.cached_property
    def conditional_builders(self) -> dict[str, ObjectsCenterPointsConditionalBuilder]:
        """The builders of this data set's tokens, by key."""
        return {
            key: builder(
                self.no_classes,
                self.max_objects_per_image,
                self.no_tokens,
                self.encode_crop,
                self.use_group_parameter,
                self.use_additional_parameters,
            )
            for key, builder in BUILDERS.items()
        }

    @functools.cached_property
    def image_transforms(self) -> list[Any]:
        """The steps from a picture (3, h, w) to a square one."""
        steps = CROPS[self.crop_method](self.target_image_size)
        return [*steps, RandomHorizontalFlipReturn(p=0.5)] if self.random_flip else steps

    def _draw(self, image_path: str) -> tuple[Tensor, BoundingBox, bool]:
        """Picture (3, h, w) uint8, what is seen of it, and whether mirrored."""
        image = convert_pil_to_tensor(open_rgb(image_path))
        crop, flipped = FULL_CROP, False
        for step in self.image_transforms:
            result = step(image)
            if isinstance(result, Tensor):
                image = result
            elif isinstance(result[0], bool):
                flipped, image = result
            else:
                crop, image = result
        return image, crop, flipped

    def load(self, index: int) -> dict[str, Any]:
        """The wanted entries of one picture."""
        image_id = self.image_ids[index]
        annotations = self.image_annotations[image_id]
        path = self.get_image_path(image_id)
        sample: dict[str, Any] = self.image_descriptions[image_id]._asdict()
        sample |= {"annotations": annotations, "image_path": path}
        if set(self.keys) & set(DRAWN_KEYS):
            image, crop, flipped = self._draw(path)
            pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
            sample |= {"image": to_float(pixels), "crop_bbox": crop, "flipped": flipped}
            for key, builder in self.conditional_builders.items():
                if key in self.keys:
                    sample[key] = builder.build(annotations, crop, flipped)
        return {key: sample[key] for key in self.keys}

    def __len__(self) -> int:
        return len(self.image_ids)
