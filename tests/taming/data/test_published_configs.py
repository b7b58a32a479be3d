"""Every `data:` section that was published names, when it is set up, the folder or list that is missing."""

import pytest

from taming.data.datamodule import DataModuleFromConfig

OBJECTS = {
    "keys": ["image", "objects_bbox", "file_name", "annotations"], "no_tokens": 8192, "target_image_size": 256,
    "min_objects_per_image": 2, "max_objects_per_image": 30, "use_group_parameter": True, "encode_crop": True,
}  # fmt: skip
HELPER = "taming.data.open_images_helper."
OPEN_IMAGES = OBJECTS | {
    "data_path": "data/open_images_annotations_100", "min_object_area": 0.0001, "use_additional_parameters": True,
    "category_allow_list_target": HELPER + "top_300_classes_plus_coco_compatibility",
    "category_mapping_target": HELPER + "open_images_unify_categories_for_coco",
}  # fmt: skip
COCO_OBJECTS = OBJECTS | {"data_path": "data/coco_annotations_100", "min_object_area": 0.00001}
MAPS = {"crop_size": 256, "onehot_segmentation": True, "use_stuffthing": True}
TRAINING = {"split": "train", "crop_method": "random-1d", "random_flip": True}
VALIDATION = {"split": "validation", "crop_method": "center", "random_flip": False}

# target below taming.data → published parameters, what the error names
SECTIONS = [
    ("coco.CocoImagesAndCaptionsTrain", {"size": 296} | MAPS, "data/coco/train2017"),
    ("coco.CocoImagesAndCaptionsValidation", {"size": 256} | MAPS, "data/coco/val2017"),
    ("annotated_objects_coco.AnnotatedObjectsCoco", COCO_OBJECTS | TRAINING, "data/coco_annotations_100"),
    ("annotated_objects_coco.AnnotatedObjectsCoco", COCO_OBJECTS | VALIDATION, "data/coco_annotations_100"),
    ("custom.CustomTrain", {"training_images_list_file": "some/training.txt", "size": 256}, "some/training.txt"),
    ("custom.CustomTest", {"test_images_list_file": "some/test.txt", "size": 256}, "some/test.txt"),
    ("imagenet.RINTrainWithDepth", {"size": 256}, "ILSVRC2012_img_train.tar"),
    ("imagenet.RINValidationWithDepth", {"size": 256}, "ILSVRC2012_img_val.tar"),
    ("faceshq.FacesHQTrain", {"size": 256, "crop_size": 256, "coord": True}, "data/celebahq"),
    ("faceshq.FacesHQValidation", {"size": 256, "crop_size": 256, "coord": True}, "data/celebahq"),
    ("faceshq.FacesHQTrain", {"size": 256, "crop_size": 256}, "data/celebahq"),
    ("imagenet.ImageNetTrain", {"config": {"size": 256}}, "ILSVRC2012_img_train.tar"),
    ("imagenet.ImageNetValidation", {"config": {"size": 256}}, "ILSVRC2012_img_val.tar"),
    ("imagenet.ImageNetTrainWithDepth", {"size": 256}, "ILSVRC2012_img_train.tar"),
    ("imagenet.ImageNetValidationWithDepth", {"size": 256}, "ILSVRC2012_img_val.tar"),
    ("annotated_objects_open_images.AnnotatedObjectsOpenImages", OPEN_IMAGES | TRAINING | {"crop_method": "random-2d"}, "data/open_images_annotations_100"),
    ("annotated_objects_open_images.AnnotatedObjectsOpenImages", OPEN_IMAGES | VALIDATION, "data/open_images_annotations_100"),
    ("sflckr.Examples", {"size": 256}, "data/sflckr_images"),
]  # fmt: skip


@pytest.mark.parametrize(("target", "params", "missing"), SECTIONS)
def test_the_missing_place_is_named(tmp_path, monkeypatch, target, params, missing):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data = DataModuleFromConfig(batch_size=2, train={"target": f"taming.data.{target}", "params": params})
    with pytest.raises(FileNotFoundError) as caught:
        data.setup()
    assert missing in str(caught.value) and "\n" not in str(caught.value)
