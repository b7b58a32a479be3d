import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ldm.modules.diffusionmodules.openaimodel import EncoderUNetModel, UNetModel, per_level
from ldm.modules.diffusionmodules.unet_blocks import AttentionBlock, Downsample, Upsample

BASE = {
    "image_size": 8, "in_channels": 4, "model_channels": 32, "out_channels": 4, "num_res_blocks": 1, "attention_resolutions": [1, 2],
    "channel_mult": [1, 2], "num_heads": 2,
}  # fmt: skip
TEXT = {**BASE, "use_spatial_transformer": True, "context_dim": 8}


def randomised(model):
    """Fresh UNets put out zero; give every weight a value."""
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    return model


def inputs(b=2, channels=4, size=8):
    return torch.randn(b, channels, size, size), torch.randint(0, 1000, (b,)), torch.randn(b, 5, 8)


def test_a_fresh_network_predicts_zero():
    x, t, context = inputs()
    assert not UNetModel(**TEXT)(x, t, context).any()


def test_checkpointing_equals_non_checkpointing_in_outputs_and_gradients():
    x, t, context = inputs()
    results = []
    for flag in (False, True):
        torch.manual_seed(1)
        model = randomised(UNetModel(**TEXT, use_checkpoint=flag))
        leaf = x.clone().requires_grad_()
        out = model(leaf, t, context)
        out.square().mean().backward()
        results.append([out, leaf.grad, *(p.grad for p in model.parameters())])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*results, strict=True))


def test_bfloat16_stays_near_float32():
    model = randomised(UNetModel(**TEXT, use_bf16=True)).eval()
    x, t, context = inputs()
    with torch.no_grad():
        exact = model(x, t, context)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = model(x, t, context)
        cast = model.to(torch.bfloat16)(x.bfloat16(), t, context.bfloat16())
    assert model.dtype == torch.bfloat16
    for approximate in (half, cast):
        assert (approximate.float() - exact).norm() / exact.norm() < 0.05


def test_a_configuration_for_half_precision_also_runs_without_autocast():
    """The original's v2 configurations say use_fp16 and then only ran on a GPU."""
    x, t, context = inputs()
    assert randomised(UNetModel(**TEXT, use_fp16=True))(x, t, context).dtype == torch.float32


def test_time_context_and_label_each_matter():
    model = randomised(UNetModel(**TEXT, num_classes=5)).eval()
    x, t, context = inputs()
    y = torch.tensor([0, 1])
    out = model(x, t, context, y=y)
    for other in (
        model(x, t + 100, context, y=y),
        model(x, t, context + 1, y=y),
        model(x, t, context, y=y + 1),
    ):
        assert (other - out).abs().max() > 1e-3


@pytest.mark.parametrize("size", [7, 9])
def test_sizes_that_cannot_be_halved_say_which_can(size):
    with pytest.raises(ValueError, match="multiple of 2, not"):
        UNetModel(**BASE)(torch.randn(1, 4, 8, size), torch.tensor([1]))


def test_folding_patches_equals_folding_by_hand():
    torch.manual_seed(0)
    folded = randomised(UNetModel(**BASE, patch_size=2)).eval()
    plain = UNetModel(**{**BASE, "in_channels": 16, "out_channels": 16}).eval()
    plain.load_state_dict(folded.state_dict())
    x, t, _ = inputs(size=16)
    assert torch.allclose(folded(x, t), F.pixel_shuffle(plain(F.pixel_unshuffle(x, 2), t), 2), atol=1e-5)
    with pytest.raises(ValueError, match="multiple of 4"):
        folded(torch.randn(1, 4, 16, 14), t[:1])


def test_attention_stands_where_it_was_asked_for():
    model = UNetModel(**{**BASE, "attention_resolutions": [2]})
    where = [
        i for i, block in enumerate(model.input_blocks) if any(isinstance(m, AttentionBlock) for m in block)
    ]
    assert where == [3]  # conv, level 0, down, level 1 at half the size
    assert isinstance(model.middle_block[1], AttentionBlock)
    limited = UNetModel(**{**BASE, "num_res_blocks": 2}, num_attention_blocks=[1, 0])
    assert [sum(isinstance(m, AttentionBlock) for m in b) for b in limited.input_blocks] == [0, 1, 0, 0, 0, 0]


def test_head_counts_by_number_or_by_width():
    by_width = UNetModel(**{**BASE, "num_heads": -1}, num_head_channels=16)
    assert [m.num_heads for m in by_width.modules() if isinstance(m, AttentionBlock)][:2] == [2, 4]
    upsample = UNetModel(**BASE, num_heads_upsample=4)
    assert upsample.output_blocks[0][1].num_heads == 4 and upsample.input_blocks[1][1].num_heads == 2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_heads": -1}, AssertionError, "num_heads or num_head_channels"),
        ({"context_dim": 8}, AssertionError, "only used with use_spatial_transformer"),
        ({"use_spatial_transformer": True}, AssertionError, "needs context_dim"),
        ({"num_res_blocks": [1, 2, 3]}, ValueError, "num_res_blocks has 3 entries for 2 levels"),
        ({"num_classes": "many"}, ValueError, "num_classes='many'"),
        ({"num_classes": "sequential"}, AssertionError, "adm_in_channels"),
        ({"model_channels": 40}, ValueError, "multiple of 32"),
    ],
)
def test_wrong_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        UNetModel(**{**BASE, **options})


def test_labels_must_come_exactly_when_expected():
    x, t, _ = inputs()
    with pytest.raises(AssertionError, match="y must be given"):
        UNetModel(**BASE, num_classes=3)(x, t)
    with pytest.raises(AssertionError, match="y must not be given"):
        UNetModel(**BASE)(x, t, y=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="needs timesteps"):
        UNetModel(**BASE)(x)


def test_the_first_level_may_be_wider_than_the_base():
    x, t, _ = inputs()
    wide = {**BASE, "channel_mult": [2, 3]}
    assert randomised(UNetModel(**wide))(x, t).shape == x.shape
    assert randomised(UNetModel(**wide, n_embed=5))(x, t).shape == (2, 5, 8, 8)


def test_resampling_keeps_the_first_of_three_axes():
    x = torch.randn(1, 32, 3, 4, 4)
    assert Upsample(32, True, dims=3)(x).shape == (1, 32, 3, 8, 8)
    assert Downsample(32, True, dims=3)(x).shape == (1, 32, 3, 2, 2)
    with pytest.raises(ValueError, match="built for 32 channels, not 16"):
        Upsample(32, False)(torch.randn(1, 16, 4, 4))
    with pytest.raises(ValueError, match="use a convolution"):
        Downsample(32, False, out_channels=64)


@pytest.mark.parametrize("pool", ["adaptive", "attention", "spatial", "spatial_v2"])
def test_the_encoder_pools_to_one_vector_an_image(pool):
    options = {**BASE, "num_heads": 1, "num_head_channels": 16 if pool == "attention" else -1}
    model = randomised(EncoderUNetModel(**{**options, "out_channels": 10}, pool=pool))
    assert model(torch.randn(3, 4, 8, 8), torch.tensor([1, 2, 3])).shape == (3, 10)


def test_unknown_pools_are_refused():
    with pytest.raises(NotImplementedError, match="choose adaptive, attention, spatial"):
        EncoderUNetModel(**BASE, pool="mean")


def test_per_level_repeats_a_single_value():
    assert per_level(2, 3, "x") == [2, 2, 2] and per_level([1, 2], 2, "x") == [1, 2]


def test_a_full_size_stable_diffusion_unet_has_the_published_size():
    """859.52 M parameters, as the model card of Stable Diffusion v1 counts them (without weights in memory)."""
    with torch.device("meta"):
        model = UNetModel(
            image_size=32, in_channels=4, out_channels=4, model_channels=320, attention_resolutions=[4, 2, 1], num_res_blocks=2,
            channel_mult=[1, 2, 4, 4], num_heads=8, use_spatial_transformer=True, transformer_depth=1, context_dim=768,
            use_checkpoint=True, legacy=False,
        )  # fmt: skip
    assert sum(p.numel() for p in model.parameters()) == 859_520_964


@pytest.mark.parametrize("linear", [False, True], ids=["v1: convolutions", "v2: linear projections"])
def test_the_text_unet_equals_diffusers_class(linear):
    """UNet2DConditionModel with the weights under its own names (converted by diffusers itself)."""
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    model = randomised(
        UNetModel(
            image_size=16, in_channels=4, out_channels=4, model_channels=32, attention_resolutions=[4, 2, 1], num_res_blocks=2,
            channel_mult=[1, 2, 4, 4], use_spatial_transformer=True, context_dim=48, legacy=False, use_linear_in_transformer=linear,
            num_heads=-1 if linear else 4, num_head_channels=32 if linear else -1,
        )
    ).eval()  # fmt: skip
    peer = UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64, 128, 128), layers_per_block=2, cross_attention_dim=48,
        attention_head_dim=(1, 2, 4, 4) if linear else 4, use_linear_projection=linear,
    ).eval()  # fmt: skip
    weights = {f"model.diffusion_model.{k}": v for k, v in model.state_dict().items()}
    peer.load_state_dict(convert_ldm_unet_checkpoint(weights, dict(peer.config)))
    x, t, context = torch.randn(2, 4, 16, 16), torch.tensor([3, 700]), torch.randn(2, 7, 48)
    with torch.no_grad():
        ours, theirs = model(x, t, context), peer(x, t, context).sample
    assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.std()))
