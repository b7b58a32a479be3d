import re

import pytest
import torch
from torch import nn

from ldm.conversion import unet_table
from ldm.modules.diffusionmodules.util import timestep_embedding
from sgm.modules.diffusionmodules.openaimodel import UNetModel
from sgm.modules.diffusionmodules.video_model import (
    PostHocResBlockWithTime,
    SpatialUNetModelWithTime,
    VideoResBlock,
    VideoUNet,
)

SVD = {
    "in_channels": 8, "out_channels": 4, "model_channels": 32, "attention_resolutions": [2, 1], "num_res_blocks": 2,
    "channel_mult": [1, 2, 2], "num_head_channels": 16, "use_linear_in_transformer": True, "context_dim": 7,
    "num_classes": "sequential", "adm_in_channels": 12, "extra_ff_mix_layer": True, "use_spatial_context": True,
    "merge_strategy": "learned_with_images", "video_kernel_size": [3, 1, 1], "spatial_transformer_attn_type": "softmax-xformers",
}  # fmt: skip
SV4D = {
    "in_channels": 4, "out_channels": 4, "model_channels": 32, "attention_resolutions": [2], "num_res_blocks": 1, "channel_mult": [1, 2],
    "num_head_channels": 16, "context_dim": 7, "motion_context_dim": 4, "extra_ff_mix_layer": True, "legacy": False,
    "num_classes": "sequential", "adm_in_channels": 128, "time_block_merge_strategy": "learned_with_images",
    "time_kernel_size": [3, 1, 1], "time_mix_legacy": False, "use_linear_in_transformer": True, "use_spatial_context": True,
}  # fmt: skip


def randomised(model):
    """Small random weights; those of norms around one, as trained ones are."""
    for name, p in model.named_parameters():
        norm = re.search(r"(norm\w*|in_layers\.0|out_layers\.0|^out\.0)\.weight$", name)
        nn.init.normal_(p, mean=1.0 if norm else 0.0, std=0.1)
    return model.eval()


def clip_inputs(b=1, t=3, size=8):
    y = timestep_embedding(torch.tensor([6.0, 127, 0.02]), 4).reshape(1, 12).repeat(b * t, 1)
    x = torch.randn(b * t, 8, size, size)
    context = torch.randn(b, 1, 7).repeat_interleave(t, dim=0)
    return {
        "x": x, "timesteps": torch.full((b * t,), 0.7), "context": context, "y": y, "num_video_frames": t,
        "image_only_indicator": torch.zeros(b, t),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- diffusers


def test_svds_unet_equals_diffusers():
    from diffusers import UNetSpatioTemporalConditionModel
    from diffusers.models.unets.unet_3d_blocks import SpatioTemporalResBlock

    ours = randomised(VideoUNet(**SVD))
    peer = UNetSpatioTemporalConditionModel(
        sample_size=8, block_out_channels=(32, 64, 64), layers_per_block=2, cross_attention_dim=7, num_attention_heads=(2, 4, 4),
        addition_time_embed_dim=4, projection_class_embeddings_input_dim=12, num_frames=3,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    ).eval()  # fmt: skip
    peer.load_state_dict(unet_table(ours).to_diffusers(ours.state_dict()))
    for block in (m for m in peer.modules() if isinstance(m, SpatioTemporalResBlock)):
        for norm in (m for m in block.modules() if isinstance(m, nn.GroupNorm)):
            norm.eps = 1e-5  # diffusers has 1e-6 in some
    given = clip_inputs(b=2)
    ids = torch.tensor([[6.0, 127, 0.02]] * 2)
    with torch.no_grad():
        expected = peer(
            given["x"].unflatten(0, (2, 3)), given["timesteps"][0], given["context"][::3], ids
        ).sample.flatten(0, 1)
        assert torch.allclose(ours(**given), expected, rtol=1e-3, atol=1e-4 * float(expected.std()))


def test_svds_unet_has_the_published_names_and_shapes():
    """diffusers' defaults are SVD's."""
    from diffusers import UNetSpatioTemporalConditionModel

    full = {
        "model_channels": 320,
        "attention_resolutions": [4, 2, 1],
        "channel_mult": [1, 2, 4, 4],
        "num_head_channels": 64,
    }
    with torch.device("meta"):
        ours = VideoUNet(**{**SVD, **full, "context_dim": 1024, "adm_in_channels": 768})
        peer = UNetSpatioTemporalConditionModel()
    converted = unet_table(ours).to_diffusers(ours.state_dict())
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in peer.state_dict().items()}


# ------------------------------------------------------------------------------------------------------------- one by one


def small(**options):
    return randomised(VideoUNet(**{**SVD, "num_res_blocks": 1, "channel_mult": [1, 2], **options}))


def test_checkpointing_changes_neither_outputs_nor_gradients():
    given, results = clip_inputs(), []
    for flag in (False, True):
        torch.manual_seed(1)
        model = small(use_checkpoint=flag)
        out = model(**given)
        out.square().mean().backward()
        results.append([out, *(p.grad for p in model.parameters())])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*results, strict=True))


def test_clips_of_a_batch_do_not_see_each_other_and_frames_do():
    model, given = small(), clip_inputs(b=2)
    other = {**given, "x": given["x"].clone()}
    other["x"][4] += torch.randn(8, 8, 8)
    with torch.no_grad():
        change = (model(**given) - model(**other)).abs().amax((1, 2, 3)) > 1e-6
    assert torch.equal(change, torch.arange(6) >= 3)


def test_marked_as_images_the_frames_are_images():
    """And the network is the UNet of images with the same weights."""
    model, given = small(), clip_inputs()
    given["image_only_indicator"] = torch.ones(1, 3)
    names = (
        "in_channels",
        "out_channels",
        "model_channels",
        "attention_resolutions",
        "num_head_channels",
        "use_linear_in_transformer",
    )
    image = UNetModel(
        **{k: SVD[k] for k in names}, num_res_blocks=1, channel_mult=[1, 2], context_dim=7, num_classes="sequential", adm_in_channels=12
    ).eval()  # fmt: skip
    image.load_state_dict({k: v for k, v in model.state_dict().items() if k in image.state_dict()})
    with torch.no_grad():
        expected = image(*(given[k] for k in ("x", "timesteps", "context", "y")))
        assert torch.allclose(model(**given), expected, atol=1e-5)


def test_half_precision_weights_stay_near_float32():
    model, given = small(), clip_inputs()
    with torch.no_grad():
        expected = model(**given)
        half = {k: v.bfloat16() if k in ("x", "context", "y") else v for k, v in given.items()}
        out = model.bfloat16()(**half)
    assert out.dtype == torch.bfloat16
    assert float((out - expected).std()) < 0.05 * float(expected.std())


def test_depths_of_levels_and_middle():
    with torch.device("meta"):
        model = VideoUNet(**{**SVD, "transformer_depth": [1, 2, 3], "transformer_depth_middle": 4})
        default = VideoUNet(**{**SVD, "transformer_depth": [1, 2, 3]})
    depths = [
        len(model.get_submodule(f"{path}.time_stack"))
        for path in ("input_blocks.1.1", "input_blocks.4.1", "middle_block.1")
    ]
    assert depths == [1, 2, 4] and len(default.middle_block[1].time_stack) == 3


def test_residual_blocks_may_resample():
    model = small(resblock_updown=True)
    assert isinstance(model.input_blocks[2][0], VideoResBlock)
    given = clip_inputs()
    assert model(**given).shape == (3, 4, 8, 8)


@pytest.mark.parametrize(
    ("frames", "message"), [(None, "needs the number of frames"), (2, "clips of 2 frames")]
)
def test_a_batch_must_consist_of_clips(frames, message):
    with pytest.raises(ValueError, match=message):
        small()(**{**clip_inputs(), "num_video_frames": frames})


def test_a_video_network_needs_a_context():
    with pytest.raises(AssertionError, match="needs context_dim"):
        VideoUNet(**{**SVD, "context_dim": None})


@pytest.mark.parametrize(
    "options", [{}, {"use_camera_emb": True, "use_3d_attention": True, "separate_motion_merge_factor": True}]
)
def test_sv4ds_network_runs_on_several_clips_and_sizes(options):
    """Clips do not see each other; which views and moments do is told in test_spacetime_attention.py."""
    model = randomised(SpatialUNetModelWithTime(**SV4D, **options))
    b, t, v = 2, 3, 2
    n = b * t * v
    given = {
        "x": torch.randn(n, 4, 4, 8), "timesteps": torch.rand(n), "context": torch.randn(b, t, 7), "y": torch.randn(n, 128),
        "num_video_frames": t * v, "cond_view": torch.randn(b * v, 4, 8, 8), "cond_motion": torch.randn(b * t, 4, 8, 8),
        "image_only_indicator": torch.zeros(b, t * v),
    }  # fmt: skip
    other = {**given, "x": given["x"].clone()}
    other["x"][0] += torch.randn(4, 4, 8)
    with torch.no_grad():
        change = (model(**given) - model(**other)).abs().amax((1, 2, 3)) > 1e-7
    assert torch.equal(change, torch.arange(n) < t * v)


def test_sv4d_without_temporal_residual_blocks_has_plain_ones():
    with torch.device("meta"):
        model = SpatialUNetModelWithTime(**SV4D, use_temporal_resblock=False)
    assert not any("time_mix_blocks.in_layers" in k for k in model.state_dict())
    assert any("time_mix_blocks.0.attn1" in k for k in model.state_dict())


def test_sv4ds_residual_blocks_mix_marked_images_too():
    """As published, unlike SVD's."""
    ours = randomised(
        PostHocResBlockWithTime(64, 8, 0.0, [3, 1, 1], "learned_with_images", time_mix_legacy=False)
    )
    svd = VideoResBlock(64, 8, 0.0, [3, 1, 1], "learned_with_images").eval()
    svd.load_state_dict({k.replace("time_mix_blocks", "time_stack"): v for k, v in ours.state_dict().items()})
    x, emb, marks = torch.randn(3, 64, 4, 4), torch.randn(3, 8), torch.ones(1, 3)
    assert torch.equal(ours(x, emb, 3, marks), svd(x, emb, 3, torch.zeros(1, 3)))
    assert not torch.allclose(ours(x, emb, 3, marks), svd(x, emb, 3, marks), atol=1e-3)


@pytest.mark.parametrize(
    "wrong", [{"time_mix_legacy": True}, {"use_motion_attention": False}, {"use_spatial_transformer": False}]
)
def test_options_of_sv4d_that_never_worked_say_so(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}.*never worked"):
        SpatialUNetModelWithTime(**{**SV4D, **wrong})
