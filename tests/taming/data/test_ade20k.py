import numpy as np
import pytest
from PIL import Image

from taming.data.ade20k import ADE20kTrain, ADE20kValidation


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "data/ade20k_root"
    for folder in ("images/training", "annotations/training"):
        (root / folder).mkdir(parents=True)
    ramp = np.arange(20 * 14, dtype=np.int64).reshape(14, 20) % 151
    Image.fromarray(np.zeros((14, 20, 3), np.uint8)).save(root / "images/training/ADE_train_1.jpg")
    Image.fromarray(ramp.astype(np.uint8)).save(root / "annotations/training/ADE_train_1.png")
    (root / "sceneCategories.txt").write_text("ADE_train_1 airport_terminal\n")
    for split in ("train", "test"):
        (tmp_path / f"data/ade20k_{split}.txt").write_text("training/ADE_train_1.jpg\n")
    return root


def test_items_carry_151_labels_and_the_scene(root):
    item = ADE20kValidation()[0]
    assert item["segmentation"].shape == (14, 20, 151) and item["scene_category"] == "airport_terminal"
    assert item["relative_segmentation_path_"] == "training/ADE_train_1.png"


def test_the_crop_is_the_size_unless_named(root):
    assert ADE20kValidation(size=10)[0]["image"].shape == (10, 10, 3)
    train = ADE20kTrain(size=14, crop_size=8)
    corners = {int(train[0]["segmentation"][0, 0].argmax()) for _ in range(30)}
    assert train[0]["image"].shape == (8, 8, 3) and len(corners) > 10


def test_pictures_without_a_scene_are_named(root):
    (root / "sceneCategories.txt").write_text("ADE_train_2 park\n")
    with pytest.raises(ValueError, match=r"no line for training/ADE_train_1\.jpg \(1 in all\)"):
        ADE20kTrain()
    (root / "sceneCategories.txt").unlink()
    with pytest.raises(FileNotFoundError, match="ADEChallengeData2016"):
        ADE20kTrain()
