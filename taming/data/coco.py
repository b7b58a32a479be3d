"""COCO 2017 with captions and maps of stuff and things."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from taming.data.base import SkipsBroken, check_presence, existing_folder
from taming.data.images import Preprocessor, open_rgb, open_stored, to_float
from taming.data.sflckr import SegmentationBase, map_name, one_hot

N_LABELS = 183  # 0: unlabelled, then things and stuff


class Examples(SegmentationBase):
    """`data/coco_examples.txt`, pictures in `data/coco_images`, maps in `data/coco_segmentations`."""

    def __init__(
        self,
        size: int | None = 256,
        random_crop: bool = False,
        interpolation: str = "bicubic",
        on_error: str = "skip",
    ) -> None:
        super().__init__(
            data_csv="data/coco_examples.txt",
            data_root="data/coco_images",
            segmentation_root="data/coco_segmentations",
            size=size,
            random_crop=random_crop,
            interpolation=interpolation,
            n_labels=N_LABELS,
            shift_segmentation=True,
            on_error=on_error,
        )


class CocoBase(SkipsBroken):
    """Pictures with one of their captions and a map.

    Items: `image` (h, w, 3) float32 in [-1, 1]; `caption`, a list of one string drawn by numpy's generator;
    `segmentation`, either (h, w, 183) int64 one-hot or the map as a picture, (h, w, 3) float32 in [-1, 1]; `img_path`,
    `seg_path`, `filename_`.

    Args:
        size: scale the shorter side to this; None leaves pictures whole.
        dataroot: folder of the pictures.
        datajson: the published captions file.
        onehot_segmentation: labels instead of colours; needs `use_stuffthing`.
        use_stuffthing: maps from `data/cocostuffthings/` (stuff and things) instead of the pixel maps of stuff below
            `data/coco/annotations/`.
        crop_size: side of the square that is cut, at random for training, else from the middle; `size` if None.
        force_no_crop: only scale.
        given_files: names of the pictures to keep; None keeps all.
        on_error: "skip" broken or missing files (logged, counted) or "raise".

    Raises:
        FileNotFoundError: a folder or the captions file is missing.
        ValueError: one-hot maps without `use_stuffthing`, or nothing left of `given_files`.
    """

    SPLIT = "validation"

    def __init__(
        self,
        size: int | None = None,
        dataroot: str = "",
        datajson: str = "",
        onehot_segmentation: bool = False,
        use_stuffthing: bool = False,
        crop_size: int | None = None,
        force_no_crop: bool = False,
        given_files: Sequence[str] | None = None,
        on_error: str = "skip",
    ) -> None:
        super().__init__(on_error)
        if onehot_segmentation and not use_stuffthing:
            raise ValueError(
                "onehot_segmentation=True needs use_stuffthing=True: the pixel maps hold colours, not labels"
            )
        self.onehot, self.stuffthing = onehot_segmentation, use_stuffthing
        self.datajson, self.split = datajson, self.SPLIT
        year = "val2017" if "val2017" in datajson else "train2017"
        maps = (
            f"data/cocostuffthings/{year}"
            if use_stuffthing
            else f"data/coco/annotations/stuff_{year}_pixelmaps"
        )
        existing_folder(dataroot, f"unpack {year}.zip of COCO (cocodataset.org) there")
        existing_folder(maps, f"put the maps of {year} there, PNG files of the pictures' names")
        self._index(dataroot, maps, given_files)
        self.preprocessor = Preprocessor(
            size,
            None if force_no_crop else (crop_size or size),
            random_crop=self.SPLIT == "train",
            interpolation={"segmentation": "nearest"},
        )

    def _index(self, dataroot: str, maps: str, given_files: Sequence[str] | None) -> None:
        if not Path(self.datajson).is_file():
            raise FileNotFoundError(
                f"there is no {self.datajson}; unpack annotations_trainval2017.zip of COCO (cocodataset.org) there"
            )
        with open(self.datajson, encoding="utf-8") as file:
            described = json.load(file)
        names = {image["id"]: image["file_name"] for image in described["images"]}
        captions: dict[Any, list[str]] = defaultdict(list)
        for annotation in described["annotations"]:
            captions[annotation["image_id"]].append(annotation["caption"])
        if given_files is not None:
            kept = set(given_files)
            names = {key: name for key, name in names.items() if name in kept}
        if not names:
            raise ValueError(
                f"no picture of {self.datajson} is left; check given_files, which must hold its file names"
            )
        self.captions = [captions[key] for key in names]
        self.labels = {
            "filename_": list(names.values()),
            "img_path": [os.path.join(dataroot, name) for name in names.values()],
            "seg_path": [os.path.join(maps, map_name(name)) for name in names.values()],
        }
        check_presence(self.labels["img_path"], self.datajson)

    def __len__(self) -> int:
        return len(self.captions)

    def preprocess_image(self, image_path: str, segmentation_path: str) -> tuple[np.ndarray, np.ndarray]:
        """Picture and map of two files, scaled and cut alike; ranges as of the items."""
        image = np.asarray(open_rgb(image_path))
        if self.onehot:
            # stored with 255 for unlabelled, which becomes 0
            labels = open_stored(segmentation_path, "L") + np.uint8(1)
        else:
            labels = np.asarray(open_rgb(segmentation_path))
        cut = self.preprocessor(image_path, image=image, segmentation=labels)
        segmentation = cut["segmentation"]
        return to_float(cut["image"]), (
            one_hot(segmentation, N_LABELS, segmentation_path, np.int64)
            if self.onehot
            else to_float(segmentation)
        )

    def load(self, index: int) -> dict[str, Any]:
        """Picture, map, one caption and the paths of one picture."""
        entry: dict[str, Any] = {name: values[index] for name, values in self.labels.items()}
        image, segmentation = self.preprocess_image(entry["img_path"], entry["seg_path"])
        captions = self.captions[index] or [""]
        caption = captions[np.random.randint(0, len(captions))]
        return {"image": image, "caption": [str(caption)], "segmentation": segmentation, **entry}


class CocoImagesAndCaptionsTrain(CocoBase):
    """`data/coco/train2017`, cropped at random."""

    SPLIT = "train"

    def __init__(
        self,
        size: int | None,
        onehot_segmentation: bool = False,
        use_stuffthing: bool = False,
        crop_size: int | None = None,
        force_no_crop: bool = False,
        on_error: str = "skip",
    ) -> None:
        super().__init__(
            size=size,
            dataroot="data/coco/train2017",
            datajson="data/coco/annotations/captions_train2017.json",
            onehot_segmentation=onehot_segmentation,
            use_stuffthing=use_stuffthing,
            crop_size=crop_size,
            force_no_crop=force_no_crop,
            on_error=on_error,
        )


class CocoImagesAndCaptionsValidation(CocoBase):
    """`data/coco/val2017`, cut from the middle."""

    def __init__(
        self,
        size: int | None,
        onehot_segmentation: bool = False,
        use_stuffthing: bool = False,
        crop_size: int | None = None,
        force_no_crop: bool = False,
        given_files: Sequence[str] | None = None,
        on_error: str = "skip",
    ) -> None:
        super().__init__(
            size=size,
            dataroot="data/coco/val2017",
            datajson="data/coco/annotations/captions_val2017.json",
            onehot_segmentation=onehot_segmentation,
            use_stuffthing=use_stuffthing,
            crop_size=crop_size,
            force_no_crop=force_no_crop,
            given_files=given_files,
            on_error=on_error,
        )
