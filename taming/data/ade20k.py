"""ADE20K scene parsing: 150 classes and "other"."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from taming.data.base import read_list
from taming.data.sflckr import SegmentationBase, map_name


class Examples(SegmentationBase):
    """`data/ade20k_examples.txt`, pictures in `data/ade20k_images`, maps in `data/ade20k_segmentations`."""

    def __init__(
        self,
        size: int | None = 256,
        random_crop: bool = False,
        interpolation: str = "bicubic",
        on_error: str = "skip",
    ) -> None:
        super().__init__(
            data_csv="data/ade20k_examples.txt",
            data_root="data/ade20k_images",
            segmentation_root="data/ade20k_segmentations",
            size=size,
            random_crop=random_crop,
            interpolation=interpolation,
            n_labels=151,
            on_error=on_error,
        )


class ADE20kBase(SegmentationBase):
    """The data set as it is distributed (ADEChallengeData2016), below `data/ade20k_root`.

    Items are those of `SegmentationBase` with 151 labels, and `relative_segmentation_path_` and `scene_category`.
    Needed: `images/`, `annotations/` and `sceneCategories.txt` in `data/ade20k_root`, and the lists
    `data/ade20k_train.txt` and `data/ade20k_test.txt` (validation) of paths below `images/`, such as
    `training/ADE_train_00000001.jpg`.

    Args:
        config: not used; kept for published configurations.
        size: scale the shorter side to this; None or <= 0 leaves pictures whole.
        random_crop: cut anywhere instead of from the middle.
        interpolation: of the picture, see `SegmentationBase`.
        crop_size: side of the square that is cut; `size` if None.
        on_error: "skip" broken or missing files (logged, counted) or "raise".
    """

    LIST = "data/ade20k_test.txt"

    def __init__(
        self,
        config: Any = None,
        size: int | None = None,
        random_crop: bool = False,
        interpolation: str = "bicubic",
        crop_size: int | None = None,
        on_error: str = "skip",
    ) -> None:
        root = Path("data/ade20k_root")
        super().__init__(
            data_csv=self.LIST,
            data_root=str(root / "images"),
            segmentation_root=str(root / "annotations"),
            size=size,
            random_crop=random_crop,
            interpolation=interpolation,
            n_labels=151,
            crop_size=crop_size,
            on_error=on_error,
        )
        scenes = dict(
            line.split(maxsplit=1)
            for line in read_list(root / "sceneCategories.txt", "it comes with ADEChallengeData2016")
        )
        names = self.labels["relative_file_path_"]
        absent = [name for name in names if Path(name).stem not in scenes]
        if absent:
            raise ValueError(
                f"{root / 'sceneCategories.txt'} has no line for {absent[0]} ({len(absent)} in all)"
            )
        self.labels["relative_segmentation_path_"] = [map_name(name) for name in names]
        self.labels["scene_category"] = [scenes[Path(name).stem] for name in names]


class ADE20kTrain(ADE20kBase):
    """`data/ade20k_train.txt`, cropped at random."""

    LIST = "data/ade20k_train.txt"

    def __init__(
        self,
        config: Any = None,
        size: int | None = None,
        random_crop: bool = True,
        interpolation: str = "bicubic",
        crop_size: int | None = None,
        on_error: str = "skip",
    ) -> None:
        super().__init__(config, size, random_crop, interpolation, crop_size, on_error)


class ADE20kValidation(ADE20kBase):
    """`data/ade20k_test.txt`."""
