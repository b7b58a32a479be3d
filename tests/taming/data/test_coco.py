import json

import numpy as np
import pytest
from PIL import Image

from taming.data.coco import CocoImagesAndCaptionsTrain, CocoImagesAndCaptionsValidation


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data"
    labels = (np.arange(14 * 20).reshape(14, 20) % 182).astype(np.uint8)
    labels[0] = 255
    for year in ("train2017", "val2017"):
        for folder in (f"coco/{year}", f"cocostuffthings/{year}", f"coco/annotations/stuff_{year}_pixelmaps"):
            (data / folder).mkdir(parents=True)
        images, captions = [], []
        for i in range(2):
            images.append({"id": 10 + i, "file_name": f"{i}.jpg"})
            captions += [{"image_id": 10 + i, "caption": f"{word} {i}"} for word in ("first", "second")]
            Image.new("RGB", (20, 14), (0, 0, 255)).save(data / f"coco/{year}/{i}.jpg")
            Image.fromarray(labels).save(data / f"cocostuffthings/{year}/{i}.png")
            Image.new("RGB", (20, 14), (255, 0, 0)).save(
                data / f"coco/annotations/stuff_{year}_pixelmaps/{i}.png"
            )
        (data / f"coco/annotations/captions_{year}.json").write_text(
            json.dumps({"images": images, "annotations": captions})
        )
    return labels


def test_items_hold_picture_one_of_the_captions_and_paths(root):
    data = CocoImagesAndCaptionsValidation(size=14)
    np.random.seed(0)
    item = data[1]
    assert list(item) == ["image", "caption", "segmentation", "filename_", "img_path", "seg_path"]
    assert {data[1]["caption"][0] for _ in range(20)} == {"first 1", "second 1"}
    assert item["img_path"] == "data/coco/val2017/1.jpg" and item["filename_"] == "1.jpg"
    np.testing.assert_allclose(item["segmentation"], np.broadcast_to([1.0, -1, -1], (14, 14, 3)))


def test_labels_are_shifted_one_hot_and_never_blend(root):
    item = CocoImagesAndCaptionsValidation(
        size=14, onehot_segmentation=True, use_stuffthing=True, force_no_crop=True
    )[0]
    expected = (root.astype(int) + 1) % 256
    assert item["segmentation"].dtype == np.int64 and item["segmentation"].shape == (14, 20, 183)
    assert np.array_equal(item["segmentation"].argmax(-1), expected)
    stripes = np.full((14, 20), 90, np.uint8)
    stripes[:, 10:] = 3
    Image.fromarray(stripes).save("data/cocostuffthings/train2017/0.png")
    scaled = CocoImagesAndCaptionsTrain(size=32, crop_size=28, onehot_segmentation=True, use_stuffthing=True)[
        0
    ]
    assert scaled["segmentation"].shape == (28, 28, 183)
    assert set(np.unique(scaled["segmentation"].argmax(-1))) <= {91, 4}


def test_given_files_choose(root):
    data = CocoImagesAndCaptionsValidation(size=8, given_files=["1.jpg"])
    assert len(data) == 1 and data[0]["filename_"] == "1.jpg"
    with pytest.raises(ValueError, match="no picture .* is left; check given_files"):
        CocoImagesAndCaptionsValidation(size=8, given_files=["x.jpg"])


def test_wrong_options_and_missing_files_are_named(root, tmp_path):
    with pytest.raises(ValueError, match="needs use_stuffthing=True"):
        CocoImagesAndCaptionsTrain(size=8, onehot_segmentation=True)
    (tmp_path / "data/coco/annotations/captions_train2017.json").unlink()
    with pytest.raises(FileNotFoundError, match="annotations_trainval2017.zip"):
        CocoImagesAndCaptionsTrain(size=8)
