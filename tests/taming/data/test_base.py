import numpy as np
import pytest
from PIL import Image

from taming.data.base import (
    ConcatDatasetWithIndex,
    ImagePaths,
    NumpyPaths,
    check_presence,
    existing_folder,
    read_list,
)
from taming.data.images import BrokenImageError


@pytest.fixture
def pixels():
    return np.random.RandomState(0).randint(0, 256, (21, 16, 3), dtype=np.uint8)


@pytest.fixture
def paths(tmp_path, pixels):
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels[..., 0]).save(tmp_path / "grey.png")
    np.save(tmp_path / "array.npy", pixels.transpose(2, 0, 1)[None])
    return [str(tmp_path / name) for name in ("a.png", "grey.png", "array.npy")]


def test_items_hold_the_picture_then_the_labels_then_the_path(paths, pixels):
    labels = {"class": [4, 5, 6]}
    item = ImagePaths(paths, labels=labels)[1]
    assert list(item) == ["image", "class", "file_path_"] and item["class"] == 5
    assert labels["file_path_"] is paths
    np.testing.assert_allclose(item["image"], pixels[..., :1].repeat(3, 2) / 127.5 - 1, atol=1e-6)
    assert item["image"].dtype == np.float32


@pytest.mark.parametrize("index", [0, 2])
def test_the_middle_is_cut_from_files_and_arrays(paths, pixels, index):
    expected = pixels[2:18] / 127.5 - 1  # 21 - 16 = 5, half of which is 2
    np.testing.assert_allclose(ImagePaths(paths, size=16)[index]["image"], expected, atol=1e-6)


def test_arrays_are_arrays_whatever_they_are_called(paths, pixels, tmp_path):
    (tmp_path / "array.npy").rename(tmp_path / "array.bin")
    item = NumpyPaths([str(tmp_path / "array.bin")])[0]
    np.testing.assert_allclose(item["image"], pixels / 127.5 - 1, atol=1e-6)


def test_the_recorded_answer_of_bilinear_scaling(tmp_path):
    y, x = np.mgrid[0:37, 0:53]
    ramp = np.stack([4 * x, 6 * y, 2 * (x + y) + 20], -1).clip(0, 255).astype(np.uint8)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    image = ImagePaths([str(tmp_path / "a.png")], size=16)[0]["image"]
    expected = [-0.7647059, -0.96862745, -0.7176471, -0.69411767, -0.96862745, -0.6784314]
    np.testing.assert_allclose(image.ravel()[:6], expected, atol=1.01 / 127.5)


def test_random_crops_move(paths):
    data = ImagePaths(paths[:1], size=16, random_crop=True)
    assert len({data[0]["image"][0, 0].tobytes() for _ in range(40)}) == 6


def test_a_truncated_picture_is_skipped_counted_and_logged(paths, tmp_path, caplog):
    broken = tmp_path / "cut.png"
    broken.write_bytes((tmp_path / "a.png").read_bytes()[:500])
    data = ImagePaths([str(broken), str(tmp_path / "absent.png"), *paths], size=8)
    assert [data[i]["file_path_"] for i in (0, 1, 0)] == [paths[0]] * 3
    assert list(data.broken) == [str(broken), str(tmp_path / "absent.png")]
    assert "Skipping a broken picture (2 so far)" in caplog.text and "cut.png" in caplog.text
    with pytest.raises(BrokenImageError, match=r"cut\.png \(500 bytes\)"):
        ImagePaths([str(broken)], on_error="raise")[0]
    with pytest.raises(BrokenImageError, match="all 1 pictures are broken"):
        ImagePaths([str(broken)])[0]


def test_wrong_use_is_named(paths):
    with pytest.raises(IndexError, match="no item 3: the data set has 3"):
        ImagePaths(paths)[3]
    with pytest.raises(IndexError, match="no item -4"):
        ImagePaths(paths)[-4]
    assert ImagePaths(paths)[-1]["file_path_"] == paths[2] and len(list(ImagePaths(paths))) == 3
    with pytest.raises(ValueError, match=r"labels\['class'\] has 2 values for 3 paths"):
        ImagePaths(paths, labels={"class": [1, 2]})
    with pytest.raises(ValueError, match="on_error='ignore'"):
        ImagePaths(paths, on_error="ignore")


def test_concatenated_sets_say_which_set_an_item_is_of():
    data = ConcatDatasetWithIndex([["a", "b"], ["c"], ["d"]])
    assert [data[i] for i in (0, 1, 2, 3, -1, -4)] == [
        ("a", 0),
        ("b", 0),
        ("c", 1),
        ("d", 2),
        ("d", 2),
        ("a", 0),
    ]
    with pytest.raises(ValueError, match="no item -5"):
        data[-5]
    with pytest.raises(IndexError, match="no item 4"):
        data[4]


def test_lists_and_folders_that_are_missing_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.txt").write_text("a.png\n\n  b.png \n")
    assert read_list("list.txt") == ["a.png", "b.png"]
    with pytest.raises(FileNotFoundError, match=r"no list other\.txt; make it"):
        read_list("other.txt", "make it")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"list empty\.txt is empty; write one path a line"):
        read_list("empty.txt")
    with pytest.raises(FileNotFoundError, match="no folder data; unpack it"):
        existing_folder("data", "unpack it")
    with pytest.raises(
        FileNotFoundError, match=r"none of the first 2 files of list\.txt.*a\.png.*working directory"
    ):
        check_presence(read_list("list.txt"), "list.txt")
    (tmp_path / "b.png").touch()
    check_presence(read_list("list.txt"), "list.txt")
