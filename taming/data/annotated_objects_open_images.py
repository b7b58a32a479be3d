"""Open Images with boxes."""

from __future__ import annotations

import csv
import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from taming.data.annotated_objects_dataset import AnnotatedObjectsDataset
from taming.data.helper_types import Annotation, Category, ImageDescription
from taming.data.open_images_helper import read_class_names

logger = logging.getLogger(__name__)

# the names under which Open Images V6 is distributed
OPEN_IMAGES_STRUCTURE = {
    split: {
        "top_level": "",
        "class_descriptions": "class-descriptions-boxable.csv",
        "annotations": annotations,
        "file_list": file_list,
        "files": split,
    }
    for split, annotations, file_list in (
        ("train", "oidv6-train-annotations-bbox.csv", "train-images-boxable.csv"),
        ("validation", "validation-annotations-bbox.csv", "validation-images.csv"),
        ("test", "test-annotations-bbox.csv", "test-images.csv"),
    )
}
FLAG_COLUMNS = {
    "is_group_of": "IsGroupOf",
    "is_truncated": "IsTruncated",
    "is_occluded": "IsOccluded",
    "is_depiction": "IsDepiction",
    "is_inside": "IsInside",
}
FLAGS = {"1": True, "0": False}  # -1: not known


def load_image_ids(csv_path: str | Path) -> list[str]:
    """Identifiers of the pictures: the first column, without an ending."""
    with open(csv_path, newline="", encoding="utf-8") as file:
        rows = csv.reader(file)
        next(rows, None)
        return [Path(row[0]).stem for row in rows if row]


def load_categories(csv_path: str | Path) -> dict[str, Category]:
    """Classes by identifier."""
    return {key: Category(key, None, name) for key, name in read_class_names(csv_path).items()}


def load_annotations(
    descriptor_path: str | Path,
    min_object_area: float,
    category_mapping: Mapping[str, str],
    category_no_for_id: Callable[[str], int],
) -> dict[str, list[Annotation]]:
    """Boxes by picture, without small ones (`min_object_area` or less) and those of unknown classes.

    Args:
        descriptor_path: file of box annotations.
        min_object_area: share of the picture.
        category_mapping: class → the one to use instead.
        category_no_for_id: number of a class; KeyError leaves the box out.
    """
    annotations: dict[str, list[Annotation]] = defaultdict(list)
    with open(descriptor_path, newline="", encoding="utf-8") as file:
        for row in tqdm(
            csv.DictReader(file), desc=f"reading {Path(descriptor_path).name}", unit="box", unit_scale=True
        ):
            x, y = float(row["XMin"]), float(row["YMin"])
            width, height = float(row["XMax"]) - x, float(row["YMax"]) - y
            category_id = category_mapping.get(row["LabelName"], row["LabelName"])
            if width * height <= min_object_area:
                continue
            try:
                category_no = category_no_for_id(category_id)
            except KeyError:
                continue
            annotations[row["ImageID"]].append(
                Annotation(
                    area=width * height,
                    image_id=row["ImageID"],
                    bbox=(x, y, width, height),
                    category_no=category_no,
                    category_id=category_id,
                    source=row["Source"],
                    confidence=float(row["Confidence"]),
                    **{field: FLAGS.get(row[column]) for field, column in FLAG_COLUMNS.items()},
                )
            )
    return dict(annotations)


class AnnotatedObjectsOpenImages(AnnotatedObjectsDataset):
    """Open Images V6: `OPEN_IMAGES_STRUCTURE` below `data_path`, pictures as `<split>/<identifier>.jpg`.

    Args:
        use_additional_parameters: encode whether objects are occluded, depictions or seen from inside.
        **kwargs: as of `AnnotatedObjectsDataset`.
    """

    def __init__(self, use_additional_parameters: bool, **kwargs: Any) -> None:
        self.use_additional_parameters = use_additional_parameters
        super().__init__(**kwargs)

    def get_path_structure(self) -> Mapping[str, Mapping[str, str]]:
        """`OPEN_IMAGES_STRUCTURE`."""
        return OPEN_IMAGES_STRUCTURE

    def allow_list(self, count: Any) -> Sequence[tuple[str, Any]]:
        """The list that a counting function gives for the training boxes, kept in `data_path` under its name.

        Every split takes that of the training boxes, so that class numbers agree.
        """
        top = Path(self.data_path)
        return count(
            self.paths["class_descriptions"],
            top / OPEN_IMAGES_STRUCTURE["train"]["annotations"],
            top / f"{count.__name__}.json",
        )

    def read(self) -> None:
        """Read classes, boxes and the list of pictures."""
        categories = load_categories(self.paths["class_descriptions"])
        used = set(self.category_mapping) | set(self.category_mapping.values())
        if absent := sorted(used - set(categories)):
            logger.warning(
                "category_mapping names classes that %s lacks: %s",
                self.paths["class_descriptions"],
                ", ".join(absent),
            )
        self.set_categories(categories)
        annotations = load_annotations(
            self.paths["annotations"], self.min_object_area, self.category_mapping, self.get_category_number
        )
        listed = set(load_image_ids(self.paths["file_list"]))
        self.image_annotations = {key: value for key, value in annotations.items() if key in listed}
        self.image_descriptions = {
            key: ImageDescription(id=key, file_name=f"{key}.jpg", original_size=None)
            for key in self.image_annotations
        }
