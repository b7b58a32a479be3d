import os
import pickle

import numpy as np
import pytest
from PIL import Image

from ldm.data.imagenet import (
    DEGRADATIONS,
    ImageNetSR,
    ImageNetSRValidation,
    ImageNetTrain,
    ImageNetValidation,
)

SYNSETS = ("n01", "n02", "n05")


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Prepared folders of both splits, two pictures a class."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for kind in (ImageNetTrain, ImageNetValidation):
        folder = tmp_path / "cache/autoencoders/data" / kind.NAME
        names = [f"{synset}/{i}.JPEG" for synset in SYNSETS for i in range(2)]
        for number, name in enumerate(names):
            (folder / "data" / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 32), (number * 40, 0, 0)).save(folder / "data" / name, "JPEG")
        (folder / "filelist.txt").write_text("\n".join(names))
        (folder / ".ready").touch()
        (folder / "index_synset.yaml").write_text("3: n01\n7: n02\n8: n05\n")
        (folder / "synset_human.txt").write_text("n01 tench, Tinca\nn02\tgoldfish\nn05 shark\n")
        size = (folder / "synset_human.txt").stat().st_size
        monkeypatch.setattr(kind, "HUMAN_SIZE", size)
    return tmp_path / "cache/autoencoders/data"


def test_pictures_are_squares_of_256_unless_the_configuration_says_otherwise(root):
    data = ImageNetTrain()
    assert len(data) == 6 and data.random_crop and data[0]["image"].shape == (256, 256, 3)
    small = ImageNetValidation(config={"size": 16})
    assert small[0]["image"].shape == (16, 16, 3) and not small.random_crop
    assert [str(label) for label in small.human_labels] == ["tench, Tinca"] * 2 + ["goldfish"] * 2 + [
        "shark"
    ] * 2


def test_labels_are_ranks_among_the_chosen_classes_or_those_of_the_whole_data_set(root):
    chosen = {"sub_indices": "7-9"}
    assert ImageNetValidation(config=chosen).class_labels.tolist() == [0, 0, 1, 1]
    kept = ImageNetValidation(config={**chosen, "keep_orig_class_label": True, "size": 16})
    assert [int(kept[i]["class_label"]) for i in range(4)] == [7, 7, 8, 8]
    every = ImageNetValidation(config={"keep_orig_class_label": True})  # without sub_indices, too
    assert every.class_labels.tolist() == [3, 3, 7, 7, 8, 8]


def test_a_synset_without_an_index_is_named(root):
    (root / "ILSVRC2012_validation/index_synset.yaml").write_text("0: n01\n1: n02\n")
    with pytest.raises(ValueError, match="gives n05 no index"):
        ImageNetValidation(config={"keep_orig_class_label": True})


def test_the_folder_may_lie_elsewhere_and_pictures_may_stay_unopened(root, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    item = ImageNetTrain(process_images=False, data_root=str(root))[2]
    assert set(item) == {"relpath", "synsets", "class_label", "human_label", "file_path_"}
    assert os.path.isfile(item["file_path_"]) and int(item["class_label"]) == 1


def test_super_resolution_reads_the_published_list_of_large_pictures(root, tmp_path):
    with pytest.raises(FileNotFoundError, match="imagenet_val_hr_indices"):
        ImageNetSRValidation(size=16, degradation="pil_bicubic")
    (tmp_path / "data").mkdir()
    for indices in ([1, 4], np.array([1, 4])):
        (tmp_path / "data/imagenet_val_hr_indices.p").write_bytes(pickle.dumps(indices))
        data = ImageNetSRValidation(size=16, degradation="pil_bicubic", downscale_f=4)
        item = data[1]
        assert len(data) == 2 and str(item["relpath"]) == "n05/0.JPEG"
        assert item["image"].shape == (16, 16, 3) and item["LR_image"].shape == (4, 4, 3)


def test_a_list_that_would_run_code_is_refused(root, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/imagenet_val_hr_indices.p").write_bytes(pickle.dumps(os.getcwd))
    with pytest.raises(ValueError, match="whole numbers: it names"):
        ImageNetSRValidation(size=16, degradation="pil_bicubic")


class Local(ImageNetSR):
    def get_base(self):
        return [{"file_path_": "a.png"}]


@pytest.fixture
def one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    y, x = np.mgrid[:48, :80]
    Image.fromarray(np.stack([x, y, x + y], -1).astype(np.uint8)).save("a.png")


@pytest.mark.parametrize("degradation", sorted(DEGRADATIONS))
def test_every_degradation_makes_a_small_twin_of_the_same_content(one, degradation):
    np.random.seed(0)
    item = Local(size=32, degradation=degradation, downscale_f=4)[0]
    assert item["image"].dtype == item["LR_image"].dtype == np.float32
    means = item["image"].reshape(8, 4, 8, 4, 3).mean((1, 3))
    assert np.abs(means - item["LR_image"]).mean() < 0.15


def test_crops_take_a_share_of_the_shorter_side(one):
    whole = Local(size=48, degradation="cv_area", min_crop_f=1.0, max_crop_f=1.0, random_crop=False)
    assert np.allclose(
        (whole[0]["image"][0, 0] + 1) * 127.5, [16, 0, 16]
    )  # 80 wide: 16 columns off at the left
    np.random.seed(0)
    half = Local(size=24, degradation="cv_area", min_crop_f=0.5, max_crop_f=0.5)
    corners = {tuple(((half[0]["image"][0, 0] + 1) * 127.5).round().astype(int)) for _ in range(20)}
    assert len(corners) > 10


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"size": None}, AssertionError, "size=None"),
        ({"size": 30}, AssertionError, "downscale_f=4"),
        ({"max_crop_f": 1.5}, AssertionError, "max_crop_f=1.5"),
        ({"degradation": "jpeg"}, KeyError, "bsrgan_light"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        Local(**{"size": 32, "degradation": "bsrgan", **options})
