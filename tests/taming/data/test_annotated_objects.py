import csv
import json
import random

import numpy as np
import pytest
from PIL import Image

from taming.data import open_images_helper
from taming.data.annotated_objects_coco import AnnotatedObjectsCoco
from taming.data.annotated_objects_open_images import AnnotatedObjectsOpenImages, load_image_ids
from taming.data.datamodule import DataModuleFromConfig
from taming.data.open_images_helper import (
    open_images_unify_categories_for_coco,
    top_300_classes_plus_coco_compatibility,
)

OPTIONS = {
    "split": "validation", "keys": ["image", "objects_bbox", "file_name", "annotations", "crop_bbox"], "target_image_size": 16,
    "min_object_area": 0.05, "min_objects_per_image": 2, "max_objects_per_image": 4, "crop_method": "center",
    "random_flip": False, "no_tokens": 256, "use_group_parameter": True, "encode_crop": True,
}  # fmt: skip


@pytest.fixture
def coco(tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val2017").mkdir()
    sizes = [(16, 20), (24, 16), (16, 16)]
    for i, size in enumerate(sizes):
        Image.new("RGB", size, (50 * i, 0, 255)).save(tmp_path / f"val2017/{i}.png")
    images = [{"id": i, "file_name": f"{i}.png", "width": w, "height": h} for i, (w, h) in enumerate(sizes)]

    def note(number, image, category, box):
        return {"id": number, "image_id": image, "category_id": category, "bbox": box, "iscrowd": number % 2}

    things = [note(0, 0, 7, [1, 2, 8, 8]), note(1, 0, 3, [4, 4, 10, 10]), note(2, 1, 7, [0, 0, 12, 12]), note(3, 2, 3, [1, 1, 1, 1]), note(4, 2, 7, [2, 2, 9, 9])]  # fmt: skip
    stuff = [note(5, 0, 92, [0, 0, 16, 10]), note(6, 1, 92, [0, 0, 24, 8]), note(7, 1, 183, [0, 0, 9, 9])]
    classes = {"instances": {7: "cat", 3: "dog"}, "stuff": {92: "sky", 183: "other"}}
    for kind, notes in (("instances", things), ("stuff", stuff)):
        categories = [{"id": key, "supercategory": "s", "name": name} for key, name in classes[kind].items()]
        content = {"images": images, "categories": categories, "annotations": notes}
        (tmp_path / f"annotations/{kind}_val2017.json").write_text(json.dumps(content))
    return tmp_path


def test_the_recorded_answers_for_coco(coco):
    keys = ["image", "objects_bbox", "objects_center_points", "file_name", "annotations", "crop_bbox"]
    data = AnnotatedObjectsCoco(data_path=coco, **(OPTIONS | {"keys": keys}))
    random.seed(1)
    items = [data[i] for i in range(len(data))]
    assert data.image_ids == ["0", "1"] and [list(item) for item in items] == [keys, keys]
    assert [data.get_textual_label_for_category_no(i) for i in range(data.no_classes)] == [
        "dog",
        "cat",
        "sky",
    ]
    assert items[0]["objects_bbox"].tolist() == [1, 33, 136, 0, 52, 173, 2, 0, 143, 255, 255, 255, 16, 239]
    assert items[0]["objects_center_points"].tolist() == [0, 120, 2, 72, 1, 85, 255, 255, 16, 239]
    assert items[1]["crop_bbox"] == pytest.approx((1 / 6, 0, 2 / 3, 1)) and items[1]["file_name"] == "1.png"
    assert items[1]["image"].shape == (16, 16, 3) and items[1]["image"][0, 0].tolist() == pytest.approx(
        [50 / 127.5 - 1, -1, 1]
    )
    assert {a.is_group_of for a in items[0]["annotations"]} == {0, 1}


def test_things_or_stuff_alone(coco):
    options = OPTIONS | {"min_objects_per_image": 1}
    assert AnnotatedObjectsCoco(use_stuff=False, data_path=coco, **options).category_ids == ["3", "7"]
    (coco / "annotations/instances_val2017.json").unlink()
    assert AnnotatedObjectsCoco(use_things=False, data_path=coco, **options).category_ids == ["92"]
    with pytest.raises(ValueError, match="at least one must be True"):
        AnnotatedObjectsCoco(use_things=False, use_stuff=False, data_path=coco, **options)


def test_objects_of_exactly_the_smallest_area_are_left_out(coco):
    whole = AnnotatedObjectsCoco(
        data_path=coco, **(OPTIONS | {"min_object_area": 0.1999, "min_objects_per_image": 1})
    )
    exact = AnnotatedObjectsCoco(
        data_path=coco, **(OPTIONS | {"min_object_area": 0.2, "min_objects_per_image": 1})
    )
    assert [len(d.image_annotations["0"]) for d in (whole, exact)] == [3, 2]


@pytest.mark.parametrize(("method", "shape"), [("none", (8, 8)), ("center", (8, 8)), ("random-1d", (8, 8)), ("random-2d", (8, 8)), (None, (20, 16))])  # fmt: skip
def test_crop_methods(coco, method, shape):
    options = {
        "crop_method": method,
        "target_image_size": 8,
        "random_flip": True,
        "keys": ["flipped", "image", "crop_bbox"],
    }
    data = AnnotatedObjectsCoco(data_path=coco, **(OPTIONS | options))
    items = [data[0] for _ in range(20)]
    assert {item["image"].shape for item in items} == {(*shape, 3)} and {
        item["flipped"] for item in items
    } == {True, False}
    assert len({item["crop_bbox"] for item in items}) > (method in ("random-1d", "random-2d"))


def test_layouts_without_the_picture_are_those_of_its_crop(coco):
    random.seed(0)
    data = AnnotatedObjectsCoco(data_path=coco, **(OPTIONS | {"keys": ["objects_bbox"]}))
    assert list(data[0]) == ["objects_bbox"] and data[0]["objects_bbox"][-2:].tolist() == [16, 239]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"split": "test"}, ValueError, "split='test' does not exist"),
        ({"crop_method": "middle"}, ValueError, "crop_method='middle' is unknown"),
        (
            {"keys": ["image", "object_bbox"]},
            ValueError,
            "keys holds 'object_bbox'.*Did you mean 'objects_bbox'",
        ),
        ({"min_objects_per_image": 9}, ValueError, "no picture of .* has 9 to 4 objects"),
        (
            {"data_path": "nowhere"},
            FileNotFoundError,
            "no folder nowhere; put the data set there; it needs annotations/",
        ),
        ({"split": "train"}, FileNotFoundError, r"no .*instances_train2017\.json"),
    ],
)
def test_wrong_options_and_missing_files_are_named(coco, change, error, message):
    with pytest.raises(error, match=message):
        AnnotatedObjectsCoco(**({"data_path": coco} | OPTIONS | change))


def test_a_broken_picture_is_skipped_or_fatal(coco):
    (coco / "val2017/0.png").write_bytes(b"")
    data = AnnotatedObjectsCoco(data_path=coco, **OPTIONS)
    assert data[0]["file_name"] == "1.png" and list(data.broken) == [str(coco / "val2017/0.png")]
    with pytest.raises(OSError, match=r"0\.png \(0 bytes\)"):
        AnnotatedObjectsCoco(data_path=coco, on_error="raise", **OPTIONS)[0]


# ------------------------------------------------------------------------------------------------------- Open Images

NAMES = {
    "/m/04yx4": "Man",
    "/m/01g317": "Person",
    "/m/01s55n": "Suitcase",
    "/m/0zzz": "Zucchini",
    "/m/0aaa": "Oddity",
}
COLUMNS = [
    "ImageID",
    "Source",
    "LabelName",
    "Confidence",
    "XMin",
    "XMax",
    "YMin",
    "YMax",
    "IsOccluded",
    "IsTruncated",
    "IsGroupOf",
    "IsDepiction",
    "IsInside",
]


def write_boxes(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows([image, "xclick", label, 1, *box, *flags] for image, label, box, flags in rows)


@pytest.fixture
def open_images(tmp_path):
    (tmp_path / "validation").mkdir()
    Image.new("RGB", (20, 16)).save(tmp_path / "validation/a1.jpg")
    with open(tmp_path / "class-descriptions-boxable.csv", "w", newline="") as file:
        csv.writer(file).writerows(NAMES.items())
    (tmp_path / "validation-images.csv").write_text("ImageID,Subset\na1,validation\n")
    rows = [
        ("a1", "/m/04yx4", (0.1, 0.6, 0.0, 0.5), (1, 0, 0, -1, 1)),
        ("a1", "/m/01s55n", (0.5, 1.0, 0.5, 1.0), (0, 0, 1, 0, 0)),
        ("a1", "/m/0aaa", (0.0, 1.0, 0.0, 1.0), (0, 0, 0, 0, 0)),
        ("a1", "/m/0zzz", (0.0, 0.1, 0.0, 0.1), (0, 0, 0, 0, 0)),
        ("b2", "/m/0zzz", (0.0, 0.5, 0.0, 1.0), (0, 0, 0, 0, 0)),
    ]
    write_boxes(tmp_path / "validation-annotations-bbox.csv", rows)
    write_boxes(tmp_path / "oidv6-train-annotations-bbox.csv", [("t", key, (0, 1, 0, 1), (0,) * 5) for key in ["/m/0zzz"] * 3 + ["/m/04yx4"] * 2 + ["/m/0aaa"]])  # fmt: skip
    return tmp_path


OPEN_OPTIONS = OPTIONS | {
    "category_mapping_target": "taming.data.open_images_helper.open_images_unify_categories_for_coco",
    "use_additional_parameters": True,
}


def test_boxes_of_open_images_with_unified_classes_and_flags(open_images, caplog):
    data = AnnotatedObjectsOpenImages(data_path=open_images, **OPEN_OPTIONS)
    assert data.category_ids == ["/m/01g317", "/m/0aaa", "/m/0zzz", "/m/01s55n"]
    assert len(data) == 1 and "category_mapping names classes that" in caplog.text
    man, suitcase, oddity = data.image_annotations["a1"]
    assert (
        man.category_id == "/m/01g317"
        and man.bbox == pytest.approx((0.1, 0, 0.5, 0.5))
        and man.area == pytest.approx(0.25)
    )
    assert (man.is_occluded, man.is_inside, man.is_depiction, man.is_group_of) == (True, True, None, False)
    assert suitcase.category_no == 3 and suitcase.is_group_of is True and oddity.category_no == 1
    item = data[0]
    assert item["file_name"] == "a1.jpg" and item["image"].shape == (16, 16, 3)
    assert {0 + 4 * 10, 3 + 4 * 1, 1} == set(item["objects_bbox"][:9:3].tolist())


def test_the_list_of_classes_is_counted_once_from_the_training_boxes(open_images, monkeypatch):
    monkeypatch.setattr(open_images_helper, "MOST_FREQUENT", 2)
    target = "taming.data.open_images_helper.top_300_classes_plus_coco_compatibility"
    data = AnnotatedObjectsOpenImages(
        data_path=open_images, category_allow_list_target=target, **OPEN_OPTIONS
    )
    cache = open_images / "top_300_classes_plus_coco_compatibility.json"
    # two most frequent, and what COCO has, however rare
    assert json.loads(cache.read_text()) == [["Zucchini", 3], ["Man", 2], ["Person", 0], ["Suitcase", 0]]
    assert data.category_ids == ["/m/01g317", "/m/0zzz", "/m/01s55n"]
    (open_images / "oidv6-train-annotations-bbox.csv").unlink()
    cache.write_text(
        '[["Suitcase", 5], ["Person", 1]]'
    )  # a published list takes the place of the counted one
    again = AnnotatedObjectsOpenImages(
        data_path=open_images, category_allow_list_target=target, **OPEN_OPTIONS
    )
    assert again.category_ids == ["/m/01g317", "/m/01s55n"]
    cache.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"oidv6-train-annotations-bbox\.csv, which the list .* is counted from"
    ):
        AnnotatedObjectsOpenImages(data_path=open_images, category_allow_list_target=target, **OPEN_OPTIONS)


def test_counting_needs_open_images(coco):
    target = "taming.data.open_images_helper.top_300_classes_plus_coco_compatibility"
    with pytest.raises(ValueError, match="AnnotatedObjectsCoco takes only lists"):
        AnnotatedObjectsCoco(data_path=coco, category_allow_list_target=target, **OPTIONS)


def test_lists_of_pictures_in_both_published_forms(tmp_path):
    (tmp_path / "new.csv").write_text("ImageID,Subset\nab,train\n")
    (tmp_path / "old.csv").write_text("image_name,image_url\nab.jpg,http://x/ab.jpg\n")
    assert load_image_ids(tmp_path / "new.csv") == load_image_ids(tmp_path / "old.csv") == ["ab"]


def test_twelve_classes_are_unified_into_seven_without_chains():
    mapping = open_images_unify_categories_for_coco
    assert len(mapping) == 12 and len(set(mapping.values())) == 7 and not set(mapping) & set(mapping.values())
    assert len(open_images_helper.COCO_THINGS) == 80 and callable(top_300_classes_plus_coco_compatibility)
    assert np.all([key.startswith("/m/") for key in (*mapping, *mapping.values())])


def test_loaders_batch_layouts_and_leave_annotations_as_lists(coco):
    params = {"data_path": str(coco), **OPTIONS}
    target = "taming.data.annotated_objects_coco.AnnotatedObjectsCoco"
    module = DataModuleFromConfig(
        batch_size=2, num_workers=0, validation={"target": target, "params": params}
    )
    module.setup()
    batch = next(iter(module.val_dataloader()))
    assert batch["image"].shape == (2, 16, 16, 3) and batch["objects_bbox"].shape == (2, 14)
    assert [len(notes) for notes in batch["annotations"]] == [3, 2] and batch["file_name"] == [
        "0.png",
        "1.png",
    ]
