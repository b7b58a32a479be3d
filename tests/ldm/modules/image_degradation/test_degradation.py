import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ldm.modules.image_degradation import bsrgan, bsrgan_light, degradation_fn_bsr, degradation_fn_bsr_light
from ldm.modules.image_degradation import utils_image as util
from ldm.modules.image_degradation.kernels import convolve
from ldm.modules.image_degradation.resample import resize


@pytest.fixture(autouse=True)
def seeds():
    random.seed(0)
    np.random.seed(0)


def picture(height=64, width=64):
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 9), np.cos(y / 7), np.sin((x + y) / 11)]
    return (127 + 100 * np.stack(waves, -1)).astype(np.uint8)


@pytest.mark.parametrize("degrade", [degradation_fn_bsr, degradation_fn_bsr_light])
@pytest.mark.parametrize("sf", [1, 2, 3, 4])
def test_sides_become_a_share_of_the_old_whatever_they_are(degrade, sf):
    for height, width in ((64, 64), (50, 71)):
        image = picture(height, width)
        before = image.copy()
        small = degrade(image, sf=sf)["image"]
        assert small.shape == (height // sf, width // sf, 3) and small.dtype == np.uint8
        assert np.array_equal(image, before)


def test_the_light_strength_keeps_more_of_the_picture():
    image = picture()
    clean = resize(image, 32, 32, "area").astype(float)
    error = {
        name: np.mean([np.abs(degrade(image, sf=2)["image"] - clean).mean() for _ in range(30)])
        for name, degrade in (("full", degradation_fn_bsr), ("light", degradation_fn_bsr_light))
    }
    assert error["light"] < 0.6 * error["full"]


def test_the_light_version_can_come_back_to_its_old_size():
    assert degradation_fn_bsr_light(picture(), sf=4, up=True)["image"].shape == (64, 64, 3)


def test_a_camera_takes_part_in_a_quarter_of_the_pictures():
    class Camera:
        calls = 0

        def forward(self, small, large):
            self.calls += 1
            return small, large

    camera = Camera()
    for _ in range(80):
        degradation_fn_bsr_light(picture(16, 16), sf=2, isp_model=camera)
    assert 8 <= camera.calls <= 34


@pytest.mark.parametrize("degrade", [bsrgan.degradation_bsrgan, bsrgan.degradation_bsrgan_plus])
def test_patches_of_both_pictures_show_the_same_place(degrade):
    image = util.uint2single(picture(90, 120))
    for _ in range(5):
        small, large = degrade(image, sf=2, lq_patchsize=32)
        assert small.shape == (32, 32, 3) and large.shape == (64, 64, 3)
    with pytest.raises(ValueError, match="too small for squares of"):
        degrade(image, sf=4, lq_patchsize=32)


def test_crops_are_aligned():
    large = np.arange(40 * 48 * 3, dtype=np.float32).reshape(40, 48, 3)
    small, crop = bsrgan.random_crop(large[::4, ::4], large, sf=4, lq_patchsize=5)
    assert np.array_equal(crop[::4, ::4], small)


def test_noise_has_the_level_asked_for():
    grey = np.full((200, 200, 3), 0.5, np.float32)
    deviations = [float((bsrgan.add_Gaussian_noise(grey, 10, 10) - grey).std()) * 255 for _ in range(20)]
    assert max(deviations) < 11 and np.median(deviations) > 5
    assert (
        float((bsrgan.add_speckle_noise(grey, 10, 10) - grey).std()) * 255 < 6
    )  # half the level on half the light
    counts = [float((bsrgan.add_Poisson_noise(grey) - grey).std()) for _ in range(20)]
    assert all(np.sqrt(0.5 / 1e4) * 0.9 < c < np.sqrt(0.5 / 1e2) * 1.1 for c in counts)


def test_sharpening_widens_an_edge_s_contrast_and_leaves_flat_places():
    step = np.zeros((80, 80, 3), np.float32) + 0.3
    step[:, 40:] = 0.7
    sharp = bsrgan.add_sharpening(step)
    assert sharp[40, 41, 0] > 0.75 and sharp[40, 38, 0] < 0.25
    assert np.allclose(bsrgan.add_sharpening(np.full((60, 60, 3), 0.4, np.float32)), 0.4)


def test_kernels_sum_to_one_and_lie_as_their_options_say():
    wide = bsrgan.anisotropic_Gaussian(15, theta=0.0, l1=6, l2=0.5)  # along x
    assert wide.sum() == pytest.approx(1) and wide[7, 3] > wide[3, 7]
    for kernel in (bsrgan.gen_kernel(), bsrgan.fspecial("gaussian", 7, 1.2), bsrgan.analytic_kernel(wide)):
        assert kernel.sum() == pytest.approx(1)
    assert np.argmax(bsrgan.gen_kernel(scale_factor=(1, 1))) == 15 * 7 + 7
    assert bsrgan.fspecial("laplacian", 0.2).sum() == pytest.approx(0)
    with pytest.raises(ValueError, match="gaussian"):
        bsrgan.fspecial("sobel")


def test_a_shifted_kernel_makes_strided_sampling_keep_the_middle():
    spot = np.zeros((9, 9))
    spot[4, 4] = 1.0
    shifted = bsrgan.shift_pixel(spot, 3)
    assert shifted[3, 3] == 1.0
    assert np.array_equal(bsrgan.shift_pixel(spot, 3, upper_left=False), np.roll(spot, (1, 1), (0, 1)))


def test_convolution_equals_torch_s_at_wrapped_borders():
    image = np.random.rand(12, 10, 2)
    kernel = np.random.rand(5, 3)
    padded = F.pad(torch.from_numpy(image).permute(2, 0, 1)[:, None], (1, 1, 2, 2), mode="circular")
    expected = F.conv2d(padded, torch.from_numpy(kernel).flip(0, 1)[None, None])[:, 0].permute(1, 2, 0)
    assert np.allclose(convolve(image, kernel, "wrap"), expected.numpy())
    assert np.allclose(bsrgan.classical_degradation(image, kernel, sf=2), expected.numpy()[::2, ::2])


def test_bicubic_scaling_equals_pillow_s_inside_and_keeps_planes():
    ramp = np.add.outer(np.arange(16.0), 2 * np.arange(24.0))[..., None]
    half = util.imresize_np(ramp, 0.5)
    inner = np.add.outer(np.arange(16).reshape(-1, 2).mean(1), 2 * np.arange(24).reshape(-1, 2).mean(1))
    assert np.allclose(half[2:-2, 2:-2, 0], inner[2:-2, 2:-2])
    tensor = torch.from_numpy(ramp).permute(2, 0, 1)
    assert np.allclose(util.imresize(tensor, 0.5)[0].numpy(), half[..., 0])
    assert util.imresize_np(ramp, 1 / 3).shape == (6, 8, 1)


def test_area_means_take_the_share_of_each_pixel():
    row = np.array([[0.0, 3.0, 6.0]])
    assert np.allclose(resize(row, 1, 2, "area"), [[1.0, 5.0]])  # (0 + 3/2) / 1.5, (3/2 + 6) / 1.5
    assert np.allclose(resize(np.full((5, 5), 2.0), 3, 9, "lanczos"), 2.0)
    with pytest.raises(ValueError, match="mode='spline'"):
        resize(row, 1, 2, "spline")


def test_colours_come_back_and_arguments_are_left_alone():
    image = np.random.rand(6, 7, 3).astype(np.float32)
    before = image.copy()
    there = util.rgb2ycbcr(image, only_y=False)
    assert np.allclose(util.ycbcr2rgb(there), image, atol=1e-5) and np.array_equal(image, before)
    assert util.rgb2ycbcr(np.full((1, 1, 3), 255, np.uint8))[0, 0] == 235  # white in studio range
    assert np.allclose(util.bgr2ycbcr(image[..., ::-1]), util.rgb2ycbcr(image))


def test_the_eight_copies_are_all_different_and_measures_know_equal_pictures():
    image = np.arange(12.0).reshape(4, 3)
    copies = {util.augment_img(image, mode).tobytes() + bytes(util.augment_img(image, mode).shape) for mode in range(8)}  # fmt: skip
    assert len(copies) == 8
    eight = picture(20, 20)
    assert util.calculate_psnr(eight, eight) == float("inf") and util.calculate_ssim(eight, eight) == 1.0
    with pytest.raises(ValueError, match="one size"):
        util.calculate_psnr(eight, eight[1:])


def test_pictures_survive_files(tmp_path):
    image = picture(8, 9)
    util.imsave(image, tmp_path / "a.png")
    assert np.array_equal(util.imread_uint(tmp_path / "a.png"), image)
    assert util.imread_uint(tmp_path / "a.png", n_channels=1).shape == (8, 9, 1)
    with pytest.raises(ValueError, match=r"such as .png"):
        util.imwrite(image, tmp_path / "a.xyz")


def test_factors_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="sf=0"):
        degradation_fn_bsr(picture(), sf=0)
    with pytest.raises(ValueError, match="augment|mode=9"):
        util.augment_img(picture(), 9)
    assert bsrgan_light.add_blur(np.full((9, 9, 3), 0.5, np.float32)).shape == (9, 9, 3)
