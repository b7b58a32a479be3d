import io
import sys
import tarfile

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from taming.data.ilsvrc import give_synsets_from_indices
from taming.data.imagenet import (
    RESTRICTED,
    DRINExamples,
    ImageNetEdgesValidation,
    ImageNetScaleTrain,
    ImageNetScaleValidation,
    ImageNetTrain,
    ImageNetTrainWithDepth,
    ImageNetValidation,
    ImageNetValidationWithDepth,
    RINTrainWithDepth,
    get_preprocessor,
    str_to_indices,
)

SYNSETS = ("n00000002", "n00000001", "n06596364")
NAMES = {"n00000001": "tench, Tinca tinca", "n00000002": "goldfish", "n06596364": "comic book"}


def jpeg(seed, size=(24, 20)):
    pixels = np.random.RandomState(seed).randint(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    packed = io.BytesIO()
    Image.fromarray(pixels).save(packed, "JPEG")
    return packed.getvalue()


def write_tar(path, files):
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Both splits as archives, with the sizes and addresses of these instead of the real ones."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for kind in (ImageNetTrain, ImageNetValidation):
        root = tmp_path / "cache/autoencoders/data" / kind.NAME
        root.mkdir(parents=True)
        (root / "synset_human.txt").write_text("".join(f"{key} {name}\n" for key, name in NAMES.items()))
        monkeypatch.setattr(kind, "HUMAN_SIZE", (root / "synset_human.txt").stat().st_size)
        if kind is ImageNetTrain:
            for synset in SYNSETS:
                files = {f"{synset}_{i}.JPEG": jpeg(i) for i in range(2)}
                if synset == "n06596364":
                    files["n06596364_9591.JPEG"] = b"broken"
                write_tar(tmp_path / f"{synset}.tar", files)
            write_tar(
                root / kind.ARCHIVE, {f"{s}.tar": (tmp_path / f"{s}.tar").read_bytes() for s in SYNSETS}
            )
        else:
            write_tar(root / kind.ARCHIVE, {f"v{i}.JPEG": jpeg(i) for i in range(3)})
            listing = root / "validation_synset.txt"
            listing.write_text("".join(f"v{i}.JPEG {synset}\n" for i, synset in enumerate(SYNSETS)))
            monkeypatch.setattr(kind, "SYNSET_SIZE", listing.stat().st_size)
        monkeypatch.setattr(kind, "ARCHIVE_SIZE", (root / kind.ARCHIVE).stat().st_size)
    return tmp_path / "cache/autoencoders/data"


def test_the_archives_are_unpacked_once_and_listed(cache):
    data = ImageNetTrain()
    root = cache / "ILSVRC2012_train"
    assert (root / ".ready").exists() and len((root / "filelist.txt").read_text().splitlines()) == 7
    assert len(data) == 6 and "n06596364_9591.JPEG" not in str(data.relpaths)
    (root / ImageNetTrain.ARCHIVE).unlink()
    assert len(ImageNetTrain()) == 6


def test_items_carry_class_and_name(cache):
    item = ImageNetValidation()[0]
    assert list(item) == ["image", "relpath", "synsets", "class_label", "human_label", "file_path_"]
    assert item["relpath"] == "n00000001/v1.JPEG" and item["synsets"] == "n00000001"
    assert item["class_label"] == 0 and item["human_label"] == "tench, Tinca tinca"
    assert item["image"].shape == (20, 24, 3)
    assert [int(ImageNetValidation()[i]["class_label"]) for i in range(3)] == [0, 1, 2]


@pytest.mark.parametrize("wrap", [dict, OmegaConf.create])
def test_the_configuration_says_size_crop_and_classes(cache, wrap):
    assert ImageNetTrain().random_crop and not ImageNetValidation().random_crop
    still = ImageNetTrain(wrap({"size": 16, "ImageNetTrain": {"random_crop": False}}))
    assert np.array_equal(still[0]["image"], still[0]["image"]) and still[0]["image"].shape == (16, 16, 3)
    assert not still.random_crop
    (cache / "ILSVRC2012_train/index_synset.yaml").write_text("0: n00000001\n1: n00000002\n")
    some = ImageNetTrain(wrap({"sub_indices": "1-2"}))
    assert set(some.synsets) == {"n00000002"} and set(some.class_labels) == {0}


def test_indices_need_a_list_of_all_classes(cache):
    with pytest.raises(FileNotFoundError, match=r"index_synset\.yaml; write a line"):
        ImageNetTrain({"sub_indices": "0"})
    (cache / "ILSVRC2012_train/index_synset.yaml").write_text("0: n00000009\n")
    with pytest.raises(ValueError, match="sub_indices='0' leaves no picture"):
        ImageNetTrain({"sub_indices": "0"})


def test_restricted_imagenet_has_nine_kinds_of_animals_without_the_range_ends():
    assert len(RESTRICTED.split(",")) == 9 and len(str_to_indices(RESTRICTED)) == 203 - 9


def test_a_missing_or_incomplete_archive_says_which_file_to_put_where(cache, monkeypatch):
    archive = cache / "ILSVRC2012_validation" / ImageNetValidation.ARCHIVE
    archive.write_bytes(archive.read_bytes()[:-512])
    with pytest.raises(ValueError, match=r"ILSVRC2012_img_val\.tar has [\d,]+ bytes instead of"):
        ImageNetValidation()
    archive.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"ILSVRC2012_img_val\.tar .* fetch it from image-net\.org .* put it there"
    ):
        ImageNetValidation()
    (archive.parent / "data").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no pictures; it needs <synset>"):
        ImageNetValidation()


def test_a_broken_picture_is_skipped_or_fatal(cache):
    data = ImageNetValidation()
    (cache / "ILSVRC2012_validation/data/n00000001/v1.JPEG").write_bytes(b"")
    assert data[0]["relpath"] == "n00000002/v0.JPEG" and len(data.data.broken) == 1
    with pytest.raises(OSError, match=r"v1\.JPEG \(0 bytes\)"):
        ImageNetValidation({"on_error": "raise"})[0]


# --------------------------------------------------------------------------------------------------- depth and scale


def write_depth(path, depth):
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = depth.shape
    Image.fromarray(np.ascontiguousarray(depth).view(np.uint8).reshape(height, width, 4), "RGBA").save(path)


@pytest.fixture
def depth(cache, tmp_path):
    ramp = np.linspace(3.0, 7.0, 480, dtype=np.float32).reshape(20, 24)
    for split, kind in (("train", ImageNetTrain), ("val", ImageNetValidation)):
        for name in kind().relpaths:
            write_depth(tmp_path / "data/imagenet_depth" / split / name.replace(".JPEG", ".png"), ramp)
    return ramp


def test_depth_is_scaled_to_its_range_and_cut_with_the_picture(depth):
    whole = ImageNetValidationWithDepth()[0]
    np.testing.assert_allclose(whole["depth"], np.linspace(-1, 1, 480).reshape(20, 24), atol=1e-6)
    cut = ImageNetValidationWithDepth(size=20, crop_size=10)[0]
    assert np.array_equal(cut["image"], whole["image"][5:15, 7:17])
    assert np.array_equal(cut["depth"], whole["depth"][5:15, 7:17])


def test_training_cuts_and_mirrors_at_random(depth):
    items = [ImageNetTrainWithDepth(size=20)[0] for _ in range(30)]
    whole = ImageNetTrainWithDepth(random_crop=False)[0]["image"]
    for item in items:
        falls = item["depth"][0, 0] > item["depth"][0, 1]
        upright = item["image"][:, ::-1] if falls else item["image"]
        assert any(np.array_equal(upright, whole[:, left : left + 20]) for left in range(5))
    assert len({i["depth"][0, 0].item() for i in items}) > 5


def test_depth_of_chosen_classes(depth, cache):
    (cache / "ILSVRC2012_train/index_synset.yaml").write_text(
        "".join(f"{i}: n0000000{i % 9}\n" for i in range(1000))
    )
    assert {str(s) for s in ImageNetTrainWithDepth(sub_indices="2").base_dset.synsets} == {"n00000002"}
    expected = set(
        give_synsets_from_indices(str_to_indices(RESTRICTED), cache / "ILSVRC2012_train/index_synset.yaml")
    )
    assert set(RINTrainWithDepth(size=16).base_dset.synsets) == expected & set(SYNSETS)


def test_missing_or_unfit_depth_is_named(depth, tmp_path):
    folder = tmp_path / "data/imagenet_depth/val"
    write_depth(folder / "n00000001/v1.png", np.zeros((8, 9), np.float32))
    with pytest.raises(ValueError, match=r"v1\.JPEG: image is 24 x 20, depth is 9 x 8"):
        ImageNetValidationWithDepth()[0]
    (folder / "n00000001/v1.png").unlink()
    data = ImageNetValidationWithDepth()
    assert data[0]["relpath"] == "n00000002/v0.JPEG" and "n00000001/v1.png" in next(iter(data.broken))
    with pytest.raises(
        FileNotFoundError, match=r"no folder nowhere; make the depth maps with scripts/extract_depth\.py"
    ):
        ImageNetValidationWithDepth(root="nowhere")


def test_example_pictures_with_depth(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/drin_images").mkdir(parents=True)
    (tmp_path / "data/drin_images/a.JPEG").write_bytes(jpeg(0))
    write_depth(tmp_path / "data/drin_depth/a.png", np.zeros((20, 24), np.float32))
    (tmp_path / "data/drin_examples.txt").write_text("a.JPEG\n")
    item = DRINExamples()[0]
    assert (
        item["image"].shape == (256, 256, 3)
        and item["depth"].shape == (256, 256)
        and (item["depth"] == -1).all()
    )


def test_the_shrunk_twin_has_the_pictures_size(cache):
    item = ImageNetScaleValidation(crop_size=16, up_factor=4, keep_mode="nearest")[0]
    assert item["image"].shape == item["lr"].shape == (16, 16, 3)
    # the crop starts 2 rows and 4 columns in: blocks of 4 end there
    assert np.array_equal(item["lr"][2:6, 0:4], np.broadcast_to(item["lr"][2, 0], (4, 4, 3)))
    assert np.abs(item["lr"] - item["image"]).mean() > 0.1


def test_pictures_smaller_than_the_crop_are_scaled_up_to_it(cache):
    item = ImageNetScaleTrain(crop_size=16, hr_factor=2)[0]
    assert item["image"].shape == (16, 16, 3) and item["lr"].shape == (16, 16, 3)


def test_edges_without_scikit_image_say_what_to_install(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(ImportError, match="pip install"):
        ImageNetEdgesValidation()[0]


def test_edges_are_cannys_with_sigma_two(cache):
    from skimage.color import rgb2gray
    from skimage.feature import canny

    item = ImageNetEdgesValidation()[0]
    expected = canny(rgb2gray(item["image"]), sigma=2).astype(np.float32)
    assert item["lr"].dtype == np.float32 and item["lr"].shape == item["image"].shape
    assert all(np.array_equal(item["lr"][..., c], expected) for c in range(3))


def test_preprocessors_for_further_inputs():
    image = np.random.RandomState(0).uniform(-1, 1, (12, 16, 3)).astype(np.float32)
    assert get_preprocessor()(image=image)["image"].shape == image.shape
    masks = get_preprocessor(size=24, additional_targets={"labels": "mask"})
    scaled = masks(image=image, labels=np.arange(192).reshape(12, 16))
    assert scaled["labels"].dtype == np.int64 and scaled["labels"].shape == (24, 24)
    with pytest.raises(ValueError, match="additional_targets: depth is 'map'"):
        get_preprocessor(additional_targets={"depth": "map"})
