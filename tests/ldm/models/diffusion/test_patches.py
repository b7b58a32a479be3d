import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from taming.util import instantiate_from_config

SETTINGS = {
    "ks": (4, 4), "stride": (2, 2), "vqf": 2, "patch_distributed_vq": True, "tie_braker": False, "clip_min_weight": 0.01,
    "clip_max_weight": 0.5, "clip_min_tie_weight": 0.01, "clip_max_tie_weight": 0.5,
}  # fmt: skip


def build(tiny, settings=None, **params):
    model = instantiate_from_config(copy.deepcopy(tiny.latent_diffusion(**params))).eval()
    model.split_input_params = {**SETTINGS, **(settings or {})}
    return model


class Pointwise(nn.Module):
    """A network without a view beyond its pixel: in patches it must give what it gives on the whole."""

    def forward(self, x, t, context=None, **others):
        shift = 0 if context is None else context.mean(dim=(1, 2)).reshape(-1, 1, 1, 1)
        return x[:, :3] ** 2 + x[:, -3:] + 0.01 * t.reshape(-1, 1, 1, 1) + shift


# ---------------------------------------------------------------------------------------------------------- blending


@pytest.mark.parametrize("tie_braker", [False, True])
@pytest.mark.parametrize(("ks", "stride"), [((4, 4), (2, 2)), ((4, 6), (4, 3)), ((20, 20), (20, 20))])
def test_blended_crops_of_a_picture_are_the_picture(tiny, tie_braker, ks, stride):
    """The weights of each pixel sum to one: also with oblong crops, and with crops larger than the picture."""
    model = build(tiny, {"ks": ks, "stride": stride, "tie_braker": tie_braker})
    x = torch.randn(2, 3, 8, 12)
    assert torch.allclose(model.blend(x, lambda crop, i: crop), x, atol=1e-6)
    larger = model.blend(x, lambda crop, i: F.interpolate(crop, scale_factor=2), uf=2)
    assert torch.allclose(larger, F.interpolate(x, scale_factor=2), atol=1e-6)
    even = {"ks": (4, 4), "stride": (2, 2)}
    model.split_input_params.update(even)
    smaller = model.blend(x, lambda crop, i: F.avg_pool2d(crop, 2), df=2)
    assert torch.allclose(smaller, F.avg_pool2d(x, 2), atol=1e-6)


def test_weights_fall_off_from_the_middle_of_a_crop_to_its_border(tiny):
    model = build(tiny)
    assert torch.allclose(
        model.delta_border(5, 5)[2], torch.tensor([0, 0.25, 0.5, 0.25, 0])
    )  # distance / size
    weights = model.get_weighting(5, 5, 1, 1, "cpu").reshape(5, 5)
    assert float(weights.min()) == pytest.approx(0.01) and float(weights[2, 2]) == 0.5
    assert model.meshgrid(2, 3)[1, 2].tolist() == [1, 2]


def test_an_axis_of_one_crop_has_weights(tiny):
    """The original's are 0/0 there."""
    model = build(tiny, {"tie_braker": True})
    assert model.delta_border(1, 3).tolist() == [[0.0, 0.5, 0.0]]
    assert torch.isfinite(model.get_weighting(4, 4, 1, 1, "cpu")).all()


def test_crops_that_leave_a_part_uncovered_are_refused_with_the_sizes_that_fit(tiny):
    model = build(tiny)
    with pytest.raises(
        ValueError, match=r"crops of 4 at a distance of 2 do not cover 9 pixels.*\(8 or 10 here\)"
    ):
        model.blend(torch.randn(1, 3, 8, 9), lambda crop, i: crop)
    model.split_input_params.update(ks=(2, 2), stride=(3, 3))
    with pytest.raises(ValueError, match="must not exceed the crop"):
        model.blend(torch.randn(1, 3, 8, 8), lambda crop, i: crop)
    with pytest.raises(NotImplementedError, match="not both"):
        model.get_fold_unfold(torch.randn(1, 3, 8, 8), (4, 4), (2, 2), uf=2, df=2)


# --------------------------------------------------------------------------------------------------- network in crops


def test_a_network_without_a_view_gives_the_same_in_crops(tiny):
    model = build(tiny)
    model.model.diffusion_model = Pointwise()
    x, t, context = torch.randn(2, 3, 8, 8), torch.tensor([1, 7]), torch.randn(2, 4, 8)
    in_crops = model.apply_model(x, t, context)
    loss, _ = model.p_losses(x, context, t, noise=torch.randn_like(x))
    del model.split_input_params
    assert torch.allclose(in_crops, model.apply_model(x, t, context), atol=1e-5)
    assert torch.isfinite(loss)


def test_conditions_that_are_pictures_are_cropped_along_and_texts_are_not(tiny):
    model = build(tiny, cond_stage_key="LR_image", conditioning_key="hybrid", unet={"in_channels": 6})
    model.model.diffusion_model = Pointwise()
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([1, 7])
    cond = {"c_concat": [torch.randn(2, 3, 8, 8)], "c_crossattn": [torch.randn(2, 4, 8)]}
    in_crops = model.apply_model(x, t, cond)
    with pytest.raises(
        ValueError, match=r"of \(4, 4\) pixels cannot be cropped along with latents of \(8, 8\)"
    ):
        model.apply_model(x, t, {**cond, "c_concat": [torch.randn(2, 3, 4, 4)]})
    del model.split_input_params
    assert torch.allclose(in_crops, model.apply_model(x, t, cond), atol=1e-5)


def test_a_model_samples_pictures_larger_than_its_crops(tiny):
    model = build(tiny, timesteps=10)
    samples, _ = model.sample_log(torch.randn(1, 4, 8), 1, ddim=True, ddim_steps=2)
    assert samples.shape == (1, 3, 8, 8) and torch.isfinite(samples).all()


def test_crops_know_their_place_in_the_whole_picture(tiny):
    model = build(tiny, {"ks": (4, 4), "stride": (2, 4)}, first_stage_config=tiny.kl)
    with pytest.raises(ValueError, match=r"original_image_size'\] = \(height, width\)"):
        model._boxes_of_crops(torch.zeros(1, 3, 8, 8))
    model.split_input_params["original_image_size"] = (16, 32)
    boxes = model._boxes_of_crops(
        torch.zeros(1, 3, 8, 16)
    )  # left, top, width, height; latents are half as large
    assert len(boxes) == 3 * 4
    assert (
        boxes[0] == (0, 0, 0.25, 0.5)
        and boxes[1] == (0.25, 0, 0.25, 0.5)
        and boxes[4] == (0, 0.25, 0.25, 0.5)
    )


# ----------------------------------------------------------------------------------------------- first stage in crops


def test_a_first_stage_that_gives_a_distribution_is_blended_too(tiny):
    model = build(tiny, {"ks": (16, 16), "stride": (8, 8)}, first_stage_config=tiny.kl)
    x = torch.randn(1, 3, 32, 16)
    posterior = model.encode_first_stage(x)
    assert isinstance(posterior, DiagonalGaussianDistribution) and posterior.mean.shape == (1, 3, 16, 8)
    assert model.split_input_params["original_image_size"] == (32, 16)
    one = model.encode_first_stage(x[:, :, :16])  # one crop: the whole picture
    z = one.mean
    model.split_input_params.update(ks=(8, 8), stride=(8, 8))
    decoded = model.decode_first_stage(z)
    model.split_input_params["patch_distributed_vq"] = False
    assert torch.allclose(one.mean, model.encode_first_stage(x[:, :, :16]).mean, atol=1e-5)
    assert torch.allclose(decoded, model.decode_first_stage(z), atol=1e-5)
