import random

import numpy as np
import pytest
import torch
from PIL import Image

from taming.data.image_transforms import (
    CenterCropReturnCoordinates,
    Random2dCropReturnCoordinates,
    RandomCrop1dReturnCoordinates,
    RandomHorizontalFlipReturn,
    convert_pil_to_tensor,
)


def numbered(height, width):
    return torch.arange(height * width).reshape(1, height, width)


def place(box, picture, cut):
    """Where the box says the cut lies, compared with the numbers in it."""
    height, width = picture.shape[1:]
    left, top = round(box[0] * width), round(box[1] * height)
    h, w = cut.shape[1:]
    assert torch.equal(cut, picture[:, top : top + h, left : left + w])
    assert box[2:] == pytest.approx((w / width, h / height))


@pytest.mark.parametrize("shape", [(12, 8), (8, 14), (8, 8)])
@pytest.mark.parametrize("crop", [CenterCropReturnCoordinates(8), RandomCrop1dReturnCoordinates(8), Random2dCropReturnCoordinates(5)])  # fmt: skip
def test_boxes_say_where_the_cut_lies(shape, crop):
    picture = numbered(*shape)
    for _ in range(5):
        place(*(lambda result: (result[0], picture, result[1]))(crop(picture)))


def test_the_middle_is_also_right_where_the_shorter_side_is_not_filled():
    box, cut = CenterCropReturnCoordinates(4)(Image.new("RGB", (12, 8)))
    assert box == pytest.approx((1 / 3, 0.25, 1 / 3, 0.5)) and cut.size == (4, 4)
    assert CenterCropReturnCoordinates.get_bbox_of_center_crop(30, 20) == pytest.approx((1 / 6, 0, 2 / 3, 1))
    with pytest.raises(ValueError, match="12 x 8 pixels is smaller than the crop of 9 x 9"):
        CenterCropReturnCoordinates(9)(Image.new("RGB", (12, 8)))


def test_random_squares_draw_side_top_left_and_nothing_where_there_is_no_choice():
    random.seed(7)
    box, _ = Random2dCropReturnCoordinates(5)(numbered(20, 30))
    random.seed(7)
    side = random.randint(5, 20)
    top, left = random.randint(0, 20 - side), random.randint(0, 30 - side)
    assert box == (left / 30, top / 20, side / 30, side / 20)
    random.seed(7)
    box, cut = Random2dCropReturnCoordinates(40)(numbered(8, 30))
    random.seed(7)
    assert cut.shape == (1, 8, 8) and random.randint(0, 0) == 0 and box[0] == random.randint(0, 22) / 30


def test_mirroring_says_whether_it_did():
    picture = numbered(3, 4)
    results = [RandomHorizontalFlipReturn(p=0.5)(picture) for _ in range(30)]
    assert {flipped for flipped, _ in results} == {True, False}
    for flipped, image in results:
        assert torch.equal(image, picture.flip(-1) if flipped else picture)


def test_pictures_become_bytes_with_channels_first():
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    tensor = convert_pil_to_tensor(Image.fromarray(pixels))
    assert tensor.dtype == torch.uint8 and np.array_equal(tensor.permute(1, 2, 0), pixels)
