"""COCO 2017 with boxes of things and stuff."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from taming.data.annotated_objects_dataset import AnnotatedObjectsDataset
from taming.data.helper_types import Annotation, Category, ImageDescription

COCO_PATH_STRUCTURE = {
    split: {
        "top_level": "",
        "instances_annotations": f"annotations/instances_{year}.json",
        "stuff_annotations": f"annotations/stuff_{year}.json",
        "files": year,
    }
    for split, year in (("train", "train2017"), ("validation", "val2017"))
}
KINDS = {"use_things": "instances_annotations", "use_stuff": "stuff_annotations"}
DROPPED_CATEGORY = "other"


def load_image_descriptions(description_json: list[dict[str, Any]]) -> dict[str, ImageDescription]:
    """`images` of a COCO file, by identifier."""
    return {
        str(image["id"]): ImageDescription(
            id=str(image["id"]),
            file_name=image["file_name"],
            original_size=(image["width"], image["height"]),
            license=image.get("license"),
            coco_url=image.get("coco_url"),
            date_captured=image.get("date_captured"),
            flickr_url=image.get("flickr_url"),
        )
        for image in description_json
    }


def load_categories(category_json: list[dict[str, Any]]) -> dict[str, Category]:
    """`categories` of a COCO file, by identifier, without "other"."""
    return {
        str(entry["id"]): Category(str(entry["id"]), entry.get("supercategory"), entry["name"])
        for entry in category_json
        if entry["name"] != DROPPED_CATEGORY
    }


def load_annotations(
    annotations_json: list[dict[str, Any]],
    image_descriptions: Mapping[str, ImageDescription],
    category_no_for_id: Callable[[str], int],
    split: str,
) -> dict[str, list[Annotation]]:
    """`annotations` of a COCO file, by picture; those of unknown categories (`category_no_for_id` raises) are left out.

    Boxes become shares of the picture, and the area is that of the box. `is_group_of` is the file's number `iscrowd`,
    which the builders do not count as set, as published.

    Raises:
        ValueError: an annotation of a picture that the file does not describe.
    """
    annotations: dict[str, list[Annotation]] = defaultdict(list)
    for entry in annotations_json:
        image_id, category_id = str(entry["image_id"]), str(entry["category_id"])
        try:
            category_no = category_no_for_id(category_id)
        except KeyError:
            continue
        if image_id not in image_descriptions:
            raise ValueError(
                f"annotation {entry.get('id')} ({split}) is of the picture {image_id}, which is not described"
            )
        width, height = image_descriptions[image_id].original_size or (1, 1)
        x, y, w, h = entry["bbox"]
        bbox = (x / width, y / height, w / width, h / height)
        annotations[image_id].append(
            Annotation(
                id=entry["id"],
                area=bbox[2] * bbox[3],
                is_group_of=entry.get("iscrowd"),
                image_id=image_id,
                bbox=bbox,
                category_id=category_id,
                category_no=category_no,
            )
        )
    return dict(annotations)


class AnnotatedObjectsCoco(AnnotatedObjectsDataset):
    """Things (`instances_*.json`), stuff (`stuff_*.json`) or both.

    Args:
        use_things: objects that can be counted.
        use_stuff: grass, sky, walls …
        **kwargs: as of `AnnotatedObjectsDataset`.

    Raises:
        ValueError: neither is wanted.
    """

    def __init__(self, use_things: bool = True, use_stuff: bool = True, **kwargs: Any) -> None:
        self.use_things, self.use_stuff = use_things, use_stuff
        if not (use_things or use_stuff):
            raise ValueError("use_things and use_stuff are both False; at least one must be True")
        super().__init__(**kwargs)

    def get_path_structure(self) -> Mapping[str, Mapping[str, str]]:
        """`COCO_PATH_STRUCTURE`, without the files that are not used."""
        unused = {kind for option, kind in KINDS.items() if not getattr(self, option)}
        return {
            split: {name: path for name, path in structure.items() if name not in unused}
            for split, structure in COCO_PATH_STRUCTURE.items()
        }

    def read(self) -> None:
        """Read one or both annotation files."""
        files = [
            json.loads(Path(self.paths[kind]).read_bytes()) for kind in KINDS.values() if kind in self.paths
        ]
        categories: dict[str, Category] = {}
        for content in files:
            self.image_descriptions |= load_image_descriptions(content["images"])
            categories |= load_categories(content["categories"])
        self.set_categories(categories)

        def number(category_id: str) -> int:
            return self.get_category_number(self.category_mapping.get(category_id, category_id))

        for content in files:
            found = load_annotations(content["annotations"], self.image_descriptions, number, self.split)
            for image_id, objects in found.items():
                self.image_annotations[image_id] = self.image_annotations.get(image_id, []) + objects
