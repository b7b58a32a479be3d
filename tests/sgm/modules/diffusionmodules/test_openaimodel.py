import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from ldm.modules.diffusionmodules.openaimodel import UNetModel as LdmUNet
from ldm.modules.diffusionmodules.util import timestep_embedding
from sgm.modules.diffusionmodules.openaimodel import (
    Downsample,
    ResBlock,
    TimestepEmbedSequential,
    UNetModel,
    Upsample,
)

BASE = {
    "in_channels": 4, "model_channels": 32, "out_channels": 4, "num_res_blocks": 1, "attention_resolutions": [1, 2],
    "channel_mult": [1, 2], "num_head_channels": 16,
}  # fmt: skip


def randomised(model):
    for name, p in model.named_parameters():
        nn.init.normal_(p, mean=float(name.endswith("norm.weight")), std=0.1)
    return model.eval()


def inputs(b=2, size=8, width=6):
    return torch.randn(b, 4, size, size), torch.randint(0, 1000, (b,)), torch.randn(b, 5, width)


def test_the_same_weights_give_the_same_as_ldms_network():
    """A checkpoint of SD 2 runs under either name."""
    ours = randomised(UNetModel(**BASE, context_dim=6, use_linear_in_transformer=True))
    theirs = LdmUNet(
        image_size=8,
        **BASE,
        context_dim=6,
        use_linear_in_transformer=True,
        use_spatial_transformer=True,
        legacy=False,
    ).eval()
    theirs.load_state_dict(ours.state_dict())
    x, t, context = inputs()
    assert torch.equal(ours(x, t, context), theirs(x, t, context))


def test_sdxls_unet_equals_diffusers():
    """UNet2DConditionModel with "text_time" embedding; diffusers itself converts the names."""
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    ours = randomised(
        UNetModel(
            in_channels=4, out_channels=4, model_channels=32, attention_resolutions=[4, 2], num_res_blocks=2, channel_mult=[1, 2, 4],
            num_head_channels=16, use_linear_in_transformer=True, transformer_depth=[1, 2, 3], context_dim=24, num_classes="sequential",
            adm_in_channels=12 + 6 * 8, spatial_transformer_attn_type="softmax-xformers",
        )
    )  # fmt: skip
    peer = UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64, 128), layers_per_block=2, cross_attention_dim=24, attention_head_dim=(2, 4, 8),
        use_linear_projection=True, transformer_layers_per_block=(1, 2, 3), addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=60, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    weights = {f"model.diffusion_model.{k}": v for k, v in ours.state_dict().items()}
    peer.load_state_dict(convert_ldm_unet_checkpoint(weights, dict(peer.config)))
    x, t, context = torch.randn(2, 4, 16, 16), torch.tensor([3, 700]), torch.randn(2, 7, 24)
    pooled, sizes = (
        torch.randn(2, 12),
        torch.tensor([[1024.0, 768, 0, 0, 1024, 1024], [512, 512, 8, 16, 1024, 1024]]),
    )
    y = torch.cat([pooled, timestep_embedding(sizes.flatten(), 8).reshape(2, -1)], 1)
    with torch.no_grad():
        expected = peer(x, t, context, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes}).sample
        assert torch.allclose(ours(x, t, context, y), expected, rtol=1e-3, atol=1e-4 * float(expected.std()))


def test_sdxls_unet_has_the_published_size():
    with torch.device("meta"):
        model = UNetModel(
            in_channels=4, out_channels=4, model_channels=320, attention_resolutions=[4, 2], num_res_blocks=2, channel_mult=[1, 2, 4],
            num_head_channels=64, use_linear_in_transformer=True, transformer_depth=[1, 2, 10], context_dim=2048,
            num_classes="sequential", adm_in_channels=2816,
        )  # fmt: skip
    assert (
        sum(p.numel() for p in model.parameters()) == 2_567_463_684
    )  # as diffusers counts the published weights


def test_without_context_every_attention_looks_at_the_image():
    model = randomised(UNetModel(**{**BASE, "attention_resolutions": []}))
    x, t, _ = inputs()
    assert model(x, t).shape == x.shape
    assert any(
        k.startswith("middle_block.1.transformer_blocks") for k in model.state_dict()
    )  # also where none is asked for


def test_the_middle_transformer_can_be_left_out():
    model = randomised(UNetModel(**BASE, disable_middle_transformer=True))
    x, t, _ = inputs()
    assert model(x, t).shape == x.shape
    assert not any(k.startswith("middle_block.1") for k in model.state_dict())


def test_options_may_come_from_a_yaml_file():
    """OmegaConf's lists are lists, also for context_dim, on which the original failed."""
    options = OmegaConf.create(
        {**BASE, "context_dim": [6, 6, 6, 6], "transformer_depth": 2, "num_res_blocks": [1, 2]}
    )
    model = randomised(UNetModel(**options))
    x, t, context = inputs()
    assert model(x, t, context).shape == x.shape


@pytest.mark.parametrize(
    ("num_classes", "y", "other"),
    [
        (5, torch.tensor([0, 3]), torch.tensor([0, 4])),
        ("continuous", torch.tensor([[0.1], [0.2]]), torch.tensor([[0.1], [2.2]])),
        ("timestep", torch.tensor([10.0, 500.0]), torch.tensor([10.0, 20.0])),
        ("sequential", torch.zeros(2, 6), torch.tensor([[0.0] * 6, [1.0] * 6])),
    ],
)  # fmt: skip
def test_every_kind_of_label_reaches_its_image_only(num_classes, y, other):
    model = randomised(
        UNetModel(**{**BASE, "model_channels": 64}, num_classes=num_classes, adm_in_channels=6)
    )
    x, t, _ = inputs()
    change = (model(x, t, y=y) - model(x, t, y=other)).abs().amax((1, 2, 3))
    assert change[0] == 0 and change[1] > 1e-5


def test_labels_must_come_exactly_when_expected():
    x, t, _ = inputs()
    with pytest.raises(AssertionError, match="y must be given"):
        UNetModel(**BASE, num_classes=3)(x, t)
    with pytest.raises(AssertionError, match="y must not be given"):
        UNetModel(**BASE)(x, t, y=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="num_classes='many'"):
        UNetModel(**BASE, num_classes="many")
    with pytest.raises(AssertionError, match="num_heads or num_head_channels"):
        UNetModel(**{**BASE, "num_head_channels": -1})


def test_a_residual_block_over_frames_embeds_each_frame_by_itself():
    """With a temporal kernel of 1 it is the two-dimensional block, frame by frame."""
    frames = randomised(ResBlock(64, 6, 0.0, dims=3, kernel_size=[1, 3, 3], exchange_temb_dims=True))
    image = ResBlock(64, 6, 0.0).eval()
    image.load_state_dict({k: v.squeeze(2) if v.ndim == 5 else v for k, v in frames.state_dict().items()})
    x, emb = torch.randn(2, 64, 1, 4, 4), torch.randn(2, 1, 6)  # of one frame: the norm is over all frames
    assert torch.allclose(frames(x, emb)[:, :, 0], image(x[:, :, 0], emb[:, 0]), atol=1e-5)
    x, emb = torch.randn(1, 64, 3, 4, 4), torch.randn(1, 3, 6)
    added = frames.embed(emb, x)
    assert torch.allclose(added[0, :, 1, 0, 0], frames.emb_layers(emb)[0, 1]) and added.shape == (
        1,
        64,
        3,
        1,
        1,
    )


def test_a_residual_block_without_embedding_has_no_weights_for_one():
    block = randomised(ResBlock(64, 6, 0.0, skip_t_emb=True))
    assert not any("emb" in k for k in block.state_dict())
    x = torch.randn(1, 64, 4, 4)
    assert torch.equal(block(x, torch.randn(1, 6)), block(x, None))
    with pytest.raises(ValueError, match="skip_t_emb must be False"):
        ResBlock(64, 6, 0.0, skip_t_emb=True, use_scale_shift_norm=True)


def test_resampling_can_take_time_along():
    x = torch.randn(1, 32, 2, 4, 4)
    assert Upsample(32, False, dims=3)(x).shape == (1, 32, 2, 8, 8)
    assert Upsample(32, False, dims=3, third_up=True, scale_factor=3)(x).shape == (1, 32, 6, 12, 12)
    assert Downsample(32, True, dims=3)(x).shape == (1, 32, 2, 2, 2)
    assert Downsample(32, False, dims=3, third_down=True)(x).shape == (1, 32, 1, 2, 2)


def test_layers_get_the_conditions_they_want():
    class Wanting(ResBlock):
        wants = {"count": "num_video_frames"}

        def forward(self, x, emb, count):
            return x + count

    block = TimestepEmbedSequential(
        Wanting(32, 4, 0.0), nn.Identity(), TimestepEmbedSequential(Wanting(32, 4, 0.0))
    )
    x = torch.zeros(1, 32, 2, 2)
    assert torch.equal(block(x, torch.zeros(1, 4), num_video_frames=3, unused=1), x + 6)
