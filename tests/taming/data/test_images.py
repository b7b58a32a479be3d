import numpy as np
import pytest
import torch
from PIL import Image

from taming.data.images import BrokenImageError, open_rgb, resize_and_crop, to_float


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
