import numpy as np
import pytest
import torch
from PIL import Image

from taming.data import images
from taming.data.images import (
    BrokenImageError,
    ImageSizeError,
    Preprocessor,
    imscale,
    open_array,
    open_rgb,
    open_stored,
    resize_and_crop,
    resize_pixels,
    rgba_to_depth,
    to_float,
)


def test_pictures_of_every_mode_become_rgb(tmp_path):
    modes = {
        "L": 100,
        "RGB": (100, 100, 100),
        "CMYK": (0, 0, 0, 155),
        "LA": (100, 255),
        "RGBA": (100, 100, 100, 255),
        "1": 1,
        "I;16": 25700,
    }
    for mode, colour in modes.items():
        path = tmp_path / f"{mode.replace(';', '')}.{'tif' if mode in ('CMYK', 'I;16') else 'png'}"
        Image.new(mode, (4, 3), colour).save(path)
        image = open_rgb(path)
        assert (image.mode, image.size) == ("RGB", (4, 3)), mode


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    values = np.linspace(0, 65535, 12).astype(np.uint16).reshape(3, 4)
    Image.fromarray(values).save(tmp_path / "deep.png")
    pixels = np.asarray(open_rgb(tmp_path / "deep.png"))[..., 0]
    assert pixels[0, 0] == 0 and pixels[-1, -1] == 255
    assert np.abs(pixels - values / 257).max() <= 1


def test_transparent_parts_show_the_background(tmp_path):
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert np.asarray(open_rgb(tmp_path / "clear.png")).min() == 255
    assert np.asarray(open_rgb(tmp_path / "clear.png", background=(0, 0, 0))).max() == 0
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([9, 9, 9] * 256)
    palette.save(tmp_path / "palette.png", transparency=0)
    assert np.asarray(open_rgb(tmp_path / "palette.png")).min() == 255


def test_photographs_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    Image.new("RGB", (8, 4)).save(tmp_path / "photo.jpg", exif=exif)
    assert open_rgb(tmp_path / "photo.jpg").size == (4, 8)


@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_a_broken_file_is_named_with_its_size(tmp_path, damage):
    path = tmp_path / "picture.png"
    Image.fromarray(np.random.RandomState(0).randint(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes({"truncated": path.read_bytes()[:2000], "empty": b"", "text": b"<html>"}[damage])
    with pytest.raises(BrokenImageError, match=r"picture\.png \([\d,]+ bytes\) cannot be read"):
        open_rgb(path)


def test_the_shorter_side_is_scaled_and_the_middle_cut():
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = 255
    square = np.asarray(resize_and_crop(Image.fromarray(pixels), 10))
    assert square.shape == (10, 10, 3) and square[:, 2:8].min() > 250
    assert resize_and_crop(Image.new("RGB", (7, 3)), 12).size == (12, 12)  # smaller than the crop: enlarged
    with pytest.raises(ValueError, match="bilinear"):
        resize_and_crop(Image.new("RGB", (7, 3)), 12, interpolation="cubic")


def test_random_crops_follow_torchs_seed():
    image = Image.fromarray(np.arange(100, dtype=np.uint8)[None].repeat(10, 0))
    crops = []
    for seed in (1, 1, 2, 3):
        torch.manual_seed(seed)
        crops.append(np.asarray(resize_and_crop(image, 10, random_crop=True)).tobytes())
    assert crops[0] == crops[1] and len(set(crops)) > 1


def test_pixels_become_numbers_from_minus_one_to_one():
    assert to_float(np.array([[[0, 255, 51]]], np.uint8)).flatten().tolist() == pytest.approx(
        [-1.0, 1.0, -0.6]
    )


# ------------------------------------------------------------------------------------- arrays scaled, cut, mirrored


def test_bilinear_scaling_samples_a_ramp_at_the_pixel_centres():
    ramp = np.arange(12, dtype=np.float32)[None].repeat(12, 0)
    halved = resize_pixels(ramp, 6, 6)
    np.testing.assert_allclose(halved[3], np.arange(6) * 2 + 0.5)  # (i + 1/2) * 2 - 1/2
    assert resize_pixels(ramp.astype(np.float64), 5, 5).dtype == np.float64


def test_bicubic_scaling_has_the_published_kernel_without_smoothing():
    impulse = np.zeros((8, 8), np.float32)
    impulse[:, 4] = 1
    # cubic convolution with a = -0.75, half way between samples (Keys 1981)
    np.testing.assert_allclose(
        resize_pixels(impulse, 4, 4, "bicubic")[1], [0, -0.09375, 0.59375, 0], atol=1e-6
    )


def test_area_scaling_is_the_mean_and_nearest_keeps_labels():
    block = np.arange(16, dtype=np.float32).reshape(4, 4)
    np.testing.assert_allclose(resize_pixels(block, 2, 2, "area"), [[2.5, 4.5], [10.5, 12.5]])
    labels = np.random.RandomState(0).randint(0, 9, (11, 7, 2))
    picked = resize_pixels(labels, 5, 16, "nearest")
    tensor = torch.from_numpy(labels).permute(2, 0, 1)[None].float()
    peer = torch.nn.functional.interpolate(tensor, (5, 16), mode="nearest")[0].permute(1, 2, 0)
    assert picked.dtype == labels.dtype and np.array_equal(picked, peer.numpy())


def test_whole_numbers_are_rounded_and_stay_in_their_range():
    edge = np.zeros((8, 8, 3), np.uint8)
    edge[:, 4:] = 255
    scaled = resize_pixels(edge, 16, 16, "bicubic")
    assert scaled.dtype == np.uint8 and scaled[0, 0, 0] == 0 and scaled[0, -1, 0] == 255
    assert resize_pixels(np.array([[0, 1], [1, 1]], np.uint8), 1, 1, "area").item() == 1
    with pytest.raises(ValueError, match="interpolation='cubic'.*bicubic"):
        resize_pixels(edge, 4, 4, "cubic")


def test_preprocessing_scales_the_shorter_side_and_cuts_the_middle():
    picture = np.zeros((30, 45, 3), np.uint8)
    assert Preprocessor(size=25)(image=picture)["image"].shape == (25, 38, 3)  # 37.5 rounds to even
    assert Preprocessor(size=25, crop_size=20)(image=picture)["image"].shape == (20, 20, 3)
    marked = np.arange(7)[None].repeat(4, 0)
    assert Preprocessor(crop_size=4)(image=marked)["image"][0].tolist() == [1, 2, 3, 4]


def test_inputs_are_cut_and_mirrored_alike():
    both = Preprocessor(crop_size=5, random_crop=True, random_flip=True)
    numbers = np.arange(12 * 9).reshape(12, 9)
    cuts = [both(image=np.stack([numbers] * 3, -1), coord=numbers[..., None] / 2) for _ in range(40)]
    for cut in cuts:
        assert np.array_equal(cut["image"][..., :1] / 2, cut["coord"])
    assert len({int(c["image"][0, 0, 0]) for c in cuts}) > 10
    assert {bool(c["image"][0, 0, 0] < c["image"][0, 1, 0]) for c in cuts} == {True, False}


def test_pictures_too_small_or_unequal_are_named():
    with pytest.raises(ImageSizeError, match=r"a\.png is 5 x 9 pixels, smaller than the crop of 6"):
        Preprocessor(crop_size=6)("a.png", image=np.zeros((9, 5, 3)))
    with pytest.raises(ImageSizeError, match=r"a\.png: image is 5 x 9, depth is 4 x 9"):
        Preprocessor()("a.png", image=np.zeros((9, 5, 3)), depth=np.zeros((9, 4)))
    with pytest.raises(ValueError, match="crop_size=8 is larger than size=4"):
        Preprocessor(size=4, crop_size=8)
    with pytest.raises(ValueError, match="interpolation='linear'"):
        Preprocessor(size=4, interpolation={"image": "linear"})


def test_shrinking_and_enlarging_keeps_the_mean_and_refuses_nonsense():
    image = np.random.RandomState(0).uniform(-1, 1, (24, 32, 3)).astype(np.float32)
    assert imscale(image, None) is image and imscale(image, 1) is image
    assert imscale(image, 5).shape == (4, 6, 3)
    kept = imscale(image, 4, keepshapes=True, keepmode="nearest")
    assert kept.shape == image.shape and abs(kept.mean() - image.mean()) < 0.02
    assert np.array_equal(kept[:4, :4], np.broadcast_to(kept[:1, :1], (4, 4, 3)))
    with pytest.raises(ValueError, match="keepmode='area'"):
        imscale(image, 2, True, "area")
    with pytest.raises(ValueError, match="32 x 24 pixels shrunk by 25"):
        imscale(image, 25)


def test_depth_is_the_bytes_of_its_numbers():
    depth = np.random.RandomState(0).standard_normal((5, 4)).astype(np.float32)
    assert np.array_equal(rgba_to_depth(depth.view(np.uint8).reshape(5, 4, 4)), depth)
    with pytest.raises(ValueError, match=r"got \(5, 4\) of float32"):
        rgba_to_depth(depth)


def test_stored_numbers_and_arrays_say_what_is_wrong_with_their_file(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "colour.png")
    with pytest.raises(ValueError, match=r"colour\.png is of mode RGB; it must be a PNG of mode L"):
        open_stored(tmp_path / "colour.png", "L")
    (tmp_path / "cut.png").write_bytes((tmp_path / "colour.png").read_bytes()[:40])
    with pytest.raises(BrokenImageError, match=r"cut\.png \(40 bytes\)"):
        open_stored(tmp_path / "cut.png", "L")
    np.save(tmp_path / "odd.npy", np.zeros((2, 3, 4, 4), np.uint8))
    with pytest.raises(BrokenImageError, match=r"odd\.npy.*\(2, 3, 4, 4\) of uint8"):
        open_array(tmp_path / "odd.npy")


@pytest.mark.parametrize("mode, matrix", [("area", images._area_matrix), ("lanczos", images._lanczos_matrix)])
def test_pictures_of_one_size_share_the_matrices_that_scale_them(mode, matrix):
    matrix.cache_clear()
    first, second = (
        resize_pixels(np.full((9, 7, 3), value), 4, 5 if mode == "lanczos" else 3, mode)
        for value in (0.25, 0.5)
    )
    assert np.allclose(first, 0.25) and np.allclose(second, 0.5)
    assert (matrix.cache_info().misses, matrix.cache_info().hits) == (2, 2)
