"""The invisible watermark."""

import numpy as np
import pytest

from ldm import watermark

BITS = [int(b) for b in f"{0b101100111110110010010000011110111011000110011110:b}"]


def textured(height, width):
    """A picture of coloured patches with grain, blue first."""
    rng = np.random.RandomState(0)
    patches = (
        rng.randint(0, 256, (-(-height // 8), -(-width // 8), 3)).repeat(8, 0).repeat(8, 1)[:height, :width]
    )
    return np.clip(patches + 20 * rng.standard_normal((height, width, 3)), 0, 255)


@pytest.mark.parametrize("size", [(264, 360), (301, 333)])
def test_bits_survive_the_rounding_of_an_8_bit_picture(size):
    picture = textured(*size)
    marked = watermark.embed(picture, BITS).clip(0, 255).astype("uint8")
    found = watermark.extract(marked, 48)
    assert np.sum(np.equal(found, BITS)) >= 44
    assert np.sum(np.equal(watermark.extract(picture, 48), BITS)) <= 33  # what any picture without it gives
    assert np.abs(marked - picture).mean() < 8


def test_a_smooth_picture_changes_as_recorded():
    y, x = np.mgrid[0:256, 0:320].astype(np.float64)
    planes = [np.floor(127 + 60 * np.sin(x / (23 + 5 * i)) * np.cos(y / (31 - 4 * i))) for i in range(3)]
    picture = np.stack(planes[::-1], axis=-1)  # blue first
    change = np.abs(watermark.embed(picture, BITS) - picture).mean(axis=(0, 1))
    assert change == pytest.approx(
        [1.4769561, 0.28842506, 0.00459973], rel=1e-4
    )  # the original's: blue, green, red


def test_the_callers_picture_stays_as_it_is():
    picture = textured(256, 256).astype(np.float32)
    before = picture.copy()
    watermark.embed(picture, BITS)
    assert np.array_equal(picture, before)


@pytest.mark.parametrize(
    ("shape", "bits", "message"),
    [
        ((255, 256, 3), BITS, "256x255 pixels has no room"),
        ((300, 300), BITS, r"\(h, w, 3\) is needed"),
        ((300, 300, 3), [], "at least one bit"),
    ],
)
def test_what_cannot_be_marked_is_refused(shape, bits, message):
    with pytest.raises(ValueError, match=message):
        watermark.embed(np.zeros(shape), bits)
