import numpy as np
import pytest
from PIL import Image

from taming.data.faceshq import CelebAHQTrain, FacesHQTrain, FacesHQValidation, FFHQValidation


@pytest.fixture
def faces(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    random = np.random.RandomState(0)
    for name in ("celebahq", "ffhq"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for split in ("train", "validation"):
            (tmp_path / "data" / f"{name}{split}.txt").write_text(
                "a.npy\n" if name == "celebahq" else "a.png\nb.png\n"
            )
    np.save("data/celebahq/a.npy", random.randint(0, 256, (1, 3, 20, 20), dtype=np.uint8))
    for name in "ab":
        Image.fromarray(random.randint(0, 256, (20, 20, 3), dtype=np.uint8)).save(f"data/ffhq/{name}.png")


def test_both_sets_follow_each_other_with_their_class(faces):
    data = FacesHQTrain(size=16)
    assert [data[i]["class"] for i in range(len(data))] == [0, 1, 1]
    assert data[0]["image"].shape == (16, 16, 3) and "coord" not in data[0]


def test_coordinates_count_pixels_before_the_crop(faces):
    coord = FacesHQValidation(size=16, crop_size=8, coord=True)[1]["coord"]
    assert coord.shape == (8, 8, 1) and coord.dtype == np.float64
    assert coord[0, 0, 0] == (4 * 16 + 4) / 256 and coord[-1, -1, 0] == (11 * 16 + 11) / 256
    starts = {FacesHQTrain(size=16, crop_size=8, coord=True)[0]["coord"][0, 0, 0] for _ in range(20)}
    assert len(starts) > 5


def test_coordinates_belong_to_the_pixels_that_are_cut(faces):
    whole = FacesHQTrain(size=16, coord=True)[1]
    assert whole["coord"].shape == (16, 16, 1)
    item = FacesHQTrain(size=16, crop_size=8, coord=True)[1]
    row, column = divmod(round(item["coord"][0, 0, 0] * 256), 16)
    assert np.array_equal(item["image"], whole["image"][row : row + 8, column : column + 8])


def test_only_the_wanted_keys(faces):
    assert list(FFHQValidation(size=8, keys=["file_path_"])[0]) == ["file_path_"]


def test_missing_parts_are_named(faces, tmp_path):
    (tmp_path / "data" / "celebahqtrain.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"data/celebahqtrain\.txt; write the names of the pictures"):
        FacesHQTrain(size=8)
    (tmp_path / "data" / "celebahq").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="no folder data/celebahq; put the pictures there"):
        CelebAHQTrain(size=8)


def test_a_picture_smaller_than_the_crop_is_named(faces):
    with pytest.raises(ValueError, match=r"data/celebahq/a\.npy is 8 x 8 pixels, smaller than the crop of 9"):
        FacesHQTrain(size=8, crop_size=9)[0]
