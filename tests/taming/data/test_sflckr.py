import numpy as np
import pytest
from PIL import Image

from taming.data import ade20k, coco, sflckr
from taming.data.sflckr import SegmentationBase


def write(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def scene(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    random = np.random.RandomState(0)
    labels = random.randint(0, 5, (20, 16), dtype=np.uint8)
    labels[0, 0] = 255
    write(tmp_path / "images/x.png", random.randint(0, 256, (20, 16, 3), dtype=np.uint8))
    write(tmp_path / "maps/x.png", labels)
    (tmp_path / "list.txt").write_text("x.png\n")
    options = {"data_csv": "list.txt", "data_root": "images", "segmentation_root": "maps", "n_labels": 7}
    return options, labels


def test_maps_become_one_hot_and_unlabelled_is_shifted_to_zero(scene):
    options, labels = scene
    item = SegmentationBase(size=-1, shift_segmentation=True, **options)[0]
    assert item["segmentation"].dtype == np.float64 and item["segmentation"].sum() == 320
    assert np.array_equal(item["segmentation"].argmax(-1), (labels.astype(int) + 1) % 256)
    assert item["relative_file_path_"] == "x.png" and item["segmentation_path_"] == "maps/x.png"


def test_picture_and_map_are_cut_alike_and_maps_never_blend(scene, tmp_path):
    options, _ = scene
    stripes = np.zeros((16, 20), np.uint8)
    stripes[:, 10:] = 6
    write(tmp_path / "maps/x.png", stripes)
    write(tmp_path / "images/x.png", np.stack([stripes * 40] * 3, -1))
    data = SegmentationBase(size=32, random_crop=True, interpolation="nearest", **options)
    for _ in range(10):
        item = data[0]
        labels = item["segmentation"].argmax(-1)
        assert set(np.unique(labels)) <= {0, 6}
        np.testing.assert_allclose(item["image"][..., 0], labels * 40 / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: write(root / "maps/x.png", np.zeros((20, 16, 3), np.uint8)), r"maps/x\.png is of mode RGB"),
        (lambda root: write(root / "maps/x.png", np.zeros((20, 15), np.uint8)), r"image is 16 x 20, segmentation is 15 x 20"),
        (lambda root: write(root / "maps/x.png", np.full((20, 16), 7, np.uint8)), r"maps/x\.png holds the label 7, but n_labels=7"),
    ],
)  # fmt: skip
def test_maps_that_do_not_fit_are_named(scene, tmp_path, change, message):
    change(tmp_path)
    with pytest.raises(ValueError, match=message):
        SegmentationBase(**scene[0])[0]


def test_a_missing_map_is_skipped_or_fatal(scene, tmp_path):
    (tmp_path / "list.txt").write_text("y.png\nx.png\n")
    write(tmp_path / "images/y.png", np.zeros((20, 16, 3), np.uint8))
    data = SegmentationBase(shift_segmentation=True, **scene[0])
    assert data[0]["relative_file_path_"] == "x.png" and list(data.broken) == ["maps/y.png"]
    with pytest.raises(FileNotFoundError, match=r"maps/y\.png"):
        SegmentationBase(on_error="raise", **scene[0])[0]


def test_wrong_options_are_named(scene):
    with pytest.raises(ValueError, match="interpolation='sinc'"):
        SegmentationBase(interpolation="sinc", **scene[0])
    with pytest.raises(FileNotFoundError, match="no folder nowhere"):
        SegmentationBase(**(scene[0] | {"segmentation_root": "nowhere"}))


@pytest.mark.parametrize(
    ("module", "name", "n_labels", "first"),
    [(sflckr, "sflckr", 182, 3), (coco, "coco", 183, 4), (ade20k, "ade20k", 151, 3)],
)
def test_examples_read_the_published_places(tmp_path, monkeypatch, module, name, n_labels, first):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / f"data/{name}_images/a.jpg", np.zeros((8, 12, 3), np.uint8))
    write(tmp_path / f"data/{name}_segmentations/a.png", np.full((8, 12), 3, np.uint8))
    (tmp_path / f"data/{name}_examples.txt").write_text("a.jpg\n")
    item = module.Examples(size=8)[0]
    assert item["segmentation"].shape == (8, 8, n_labels) and item["segmentation"].argmax(-1).max() == first
    whole = module.Examples()[0]["image"]
    assert whole.shape == ((8, 12, 3) if name == "sflckr" else (256, 256, 3))
