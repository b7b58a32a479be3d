import numpy as np
import pytest
from PIL import Image

from taming.data.custom import CustomTest, CustomTrain


@pytest.mark.parametrize(
    ("kind", "option"), [(CustomTrain, "training_images_list_file"), (CustomTest, "test_images_list_file")]
)
def test_listed_pictures_are_cut_from_the_middle_and_never_mirrored(tmp_path, monkeypatch, kind, option):
    monkeypatch.chdir(tmp_path)
    pixels = np.random.RandomState(0).randint(0, 256, (16, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("a.png")
    (tmp_path / "list.txt").write_text("a.png\na.png\n")
    data = kind(size=16, **{option: "list.txt"})
    assert len(data) == 2
    for _ in range(5):
        np.testing.assert_allclose(data[1]["image"], pixels[:, 2:18] / 127.5 - 1, atol=1e-6)


def test_a_missing_or_empty_list_says_what_to_write(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no list .*train\.txt; write the paths of your pictures"):
        CustomTrain(16, str(tmp_path / "train.txt"))
    (tmp_path / "train.txt").write_text("")
    with pytest.raises(ValueError, match=r"train\.txt is empty"):
        CustomTrain(16, str(tmp_path / "train.txt"))
    (tmp_path / "train.txt").write_text("nowhere/a.png\n")
    with pytest.raises(FileNotFoundError, match=r"nowhere/a\.png; relative paths start at"):
        CustomTrain(16, str(tmp_path / "train.txt"))


def test_a_broken_picture_can_be_fatal(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "list.txt").write_text(str(tmp_path / "a.png"))
    with pytest.raises(OSError, match=r"a\.png \(0 bytes\) cannot be read"):
        CustomTrain(16, str(tmp_path / "list.txt"), on_error="raise")[0]
