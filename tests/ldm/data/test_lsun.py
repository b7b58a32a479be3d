import numpy as np
import pytest
from PIL import Image
from torch.utils.data import ChainDataset

from ldm.data.base import Txt2ImgIterableBaseDataset
from ldm.data.lsun import LSUNBase, LSUNChurchesTrain, LSUNChurchesValidation


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "data/lsun/churches/a"
    root.mkdir(parents=True)
    columns = np.tile(np.arange(30, dtype=np.uint8), (20, 1))
    Image.fromarray(np.stack([columns] * 3, -1)).save(root / "1.png")
    for split in ("train", "val"):
        (tmp_path / f"data/lsun/church_outdoor_{split}.txt").write_text("a/1.png\n")
    return tmp_path


def test_squares_come_from_the_middle(folder):
    item = LSUNChurchesValidation()[0]
    assert item["image"].shape == (20, 20, 3)
    assert np.allclose((item["image"][0, :, 0] + 1) * 127.5, np.arange(5, 25))
    assert item["relative_file_path_"] == "a/1.png"
    assert item["file_path_"].endswith("churches/a/1.png")


def test_half_of_the_training_pictures_are_mirrored_and_no_others(folder):
    def mirrored(data):
        pictures = [data[0]["image"] for _ in range(60)]  # brightness rises to the right
        return sum(float(picture[0, 0, 0]) > float(picture[0, -1, 0]) for picture in pictures)

    assert 15 < mirrored(LSUNChurchesTrain(size=8)) < 45
    assert mirrored(LSUNChurchesTrain(size=8, flip_p=0.0)) == mirrored(LSUNChurchesValidation()) == 0


def test_linear_is_another_name_of_bilinear(folder):
    options = {
        "txt_file": "data/lsun/church_outdoor_val.txt",
        "data_root": "data/lsun/churches",
        "flip_p": 0.0,
    }
    first, second = (LSUNBase(**options, size=7, interpolation=name)[0] for name in ("linear", "bilinear"))
    assert np.array_equal(first["image"], second["image"])
    with pytest.raises(ValueError, match="interpolation='nearest'"):
        LSUNBase(**options, interpolation="nearest")
    with pytest.raises(ValueError, match="flip_p=2"):
        LSUNBase(**{**options, "flip_p": 2})


def test_a_missing_list_says_what_to_write(folder):
    with pytest.raises(FileNotFoundError, match="one a line"):
        LSUNBase("data/lsun/cat_train.txt", "data/lsun/cats")


def test_streams_can_be_chained():
    class Words(Txt2ImgIterableBaseDataset):
        def __iter__(self):
            return iter(self.sample_ids)

    words = Words(num_records=2, valid_ids=["a", "b"])
    assert len(words) == 2 and list(ChainDataset([words, words])) == ["a", "b", "a", "b"]
    with pytest.raises(NotImplementedError, match="__iter__"):
        iter(Txt2ImgIterableBaseDataset())
