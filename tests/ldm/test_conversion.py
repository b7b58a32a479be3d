"""Tables of names at the sizes of the published models, and what cannot be converted. Numbers: tests/ldm/test_peers.py."""

import pytest
import torch

from ldm import conversion
from ldm.models.autoencoder import AutoencoderKL
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.encoders.clip import CLIPTextConfig, CLIPTextModel
from taming.checkpoint import CheckpointError

SMALL = {
    "image_size": 8, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": 1, "attention_resolutions": [1],
    "channel_mult": [1, 2], "num_heads": 2, "use_spatial_transformer": True, "context_dim": 8, "legacy": False,
}  # fmt: skip
SD1 = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "attention_resolutions": [4, 2, 1], "num_res_blocks": 2,
    "channel_mult": [1, 2, 4, 4], "num_heads": 8, "use_spatial_transformer": True, "transformer_depth": 1, "context_dim": 768,
    "use_checkpoint": True, "legacy": False,
}  # fmt: skip
SD2 = {
    **SD1,
    "num_heads": -1,
    "num_head_channels": 64,
    "use_linear_in_transformer": True,
    "context_dim": 1024,
}
SDXL = {
    "image_size": 128, "in_channels": 4, "out_channels": 4, "model_channels": 320, "attention_resolutions": [4, 2], "num_res_blocks": 2,
    "channel_mult": [1, 2, 4], "num_head_channels": 64, "use_spatial_transformer": True, "use_linear_in_transformer": True,
    "transformer_depth": [1, 2, 10], "context_dim": 2048, "num_classes": "sequential", "adm_in_channels": 2816, "legacy": False,
}  # fmt: skip
SDXL_REFINER = {
    **SDXL, "model_channels": 384, "channel_mult": [1, 2, 4, 4], "transformer_depth": 4, "context_dim": 1280, "adm_in_channels": 2560,
}  # fmt: skip
UPSCALER = {
    **SDXL, "in_channels": 7, "model_channels": 256, "attention_resolutions": [2, 4, 8], "channel_mult": [1, 2, 2, 4], "num_classes": 1000,
    "num_heads": 8, "num_head_channels": -1, "transformer_depth": 1, "context_dim": 1024,
    "disable_self_attentions": [True, True, True, False], "disable_middle_self_attn": False,
}  # fmt: skip

# as the repositories of these models on the hub have it in unet/config.json
FACTS = {
    "SD 1": {"block_out_channels": [320, 640, 1280, 1280], "attention_head_dim": 8, "cross_attention_dim": 768},
    "SD 2": {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True},
    "SD 1 inpainting": {"in_channels": 9},
    "SDXL": {
        "block_out_channels": [320, 640, 1280], "attention_head_dim": [5, 10, 20], "transformer_layers_per_block": [1, 2, 10],
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    },
    "SDXL refiner": {
        "block_out_channels": [384, 768, 1536, 1536], "attention_head_dim": [6, 12, 24, 24], "projection_class_embeddings_input_dim": 2560,
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    },
    "upscaler": {"num_class_embeds": 1000, "only_cross_attention": [True, True, True, False], "in_channels": 7},
}  # fmt: skip
PARAMS = {
    "SD 1": SD1, "SD 2": SD2, "SD 1 inpainting": {**SD1, "in_channels": 9}, "SDXL": SDXL, "SDXL refiner": SDXL_REFINER,
    "upscaler": UPSCALER,
}  # fmt: skip


@pytest.mark.parametrize("name", FACTS)
def test_published_unets_have_diffusers_names_and_shapes(name):
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNetModel(**PARAMS[name])
        config = conversion.unet_config(unet)
        peer = UNet2DConditionModel(**config)
    assert {k: config[k] for k in FACTS[name]} == FACTS[name]
    converted = conversion.unet_table(unet).to_diffusers(unet.state_dict())
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in peer.state_dict().items()}


def test_a_layers_path_is_known_in_both_networks():
    with torch.device("meta"):
        modules = conversion.unet_table(UNetModel(**SMALL)).modules
    assert modules["input_blocks.1.0.emb_layers.1"] == "down_blocks.0.resnets.0.time_emb_proj"
    assert modules["input_blocks.2.0.op"] == "down_blocks.0.downsamplers.0.conv"
    assert modules["output_blocks.1.1.conv"] == "up_blocks.0.upsamplers.0.conv"
    ours = "output_blocks.3.1.transformer_blocks.0.attn2.to_k"
    assert modules[ours] == "up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_k"


def test_pipelines_of_the_first_years_are_read():
    """Their autoencoders say query, key, value, proj_attn; ours come out all the same."""
    ddconfig = {
        "double_z": True, "z_channels": 4, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 2],
        "num_res_blocks": 1, "attn_resolutions": [],
    }  # fmt: skip
    model = AutoencoderKL(ddconfig, {"target": "torch.nn.Identity"}, 4)
    table = conversion.autoencoder_table(model)
    present = table.to_diffusers(model.state_dict())
    old = present
    for new, name in (
        (".to_q.", ".query."),
        (".to_k.", ".key."),
        (".to_v.", ".value."),
        (".to_out.0.", ".proj_attn."),
    ):
        old = {k.replace(new, name): v for k, v in old.items()}
    assert "encoder.mid_block.attentions.0.query.weight" in old
    back = table.from_diffusers(old)
    assert all(torch.equal(v, back[k]) for k, v in model.state_dict().items())


def test_text_models_of_all_versions_of_transformers_are_read():
    """With the first level of names or without, with the positions' buffer or without."""
    sizes = CLIPTextConfig(
        vocab_size=20, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = CLIPTextModel(sizes)
    table, weights = (
        conversion.clip_table(model),
        conversion.clip_table(model).to_diffusers(model.state_dict()),
    )
    assert "text_model.embeddings.position_ids" not in weights
    for file in (
        weights | {"text_model.embeddings.position_ids": torch.arange(77.0)[None]},
        {k.removeprefix("text_model."): v for k, v in weights.items()},
    ):
        back = table.from_diffusers(file)
        assert back.keys() == model.state_dict().keys()
        assert all(torch.equal(v, back[k]) for k, v in model.state_dict().items())


def test_losses_and_averages_stay_behind():
    ddconfig = {
        "double_z": True, "z_channels": 4, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1], "num_res_blocks": 1,
        "attn_resolutions": [],
    }  # fmt: skip
    loss = {"target": "torch.nn.Linear", "params": {"in_features": 1, "out_features": 1}}
    model = AutoencoderKL(ddconfig, loss, 4, ema_decay=0.9)
    converted = conversion.to_diffusers(model)["vae"]
    assert len(converted) == sum(
        k.split(".")[0] in ("encoder", "decoder", "quant_conv", "post_quant_conv") for k in model.state_dict()
    )


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "options, named",
    [
        ({"patch_size": 2}, "patch_size=2"),
        ({"resblock_updown": True}, "resblock_updown=True"),
        ({"conv_resample": False}, "conv_resample=False"),
        ({"use_spatial_transformer": False, "context_dim": None}, "use_spatial_transformer=False"),
        ({"n_embed": 16}, "n_embed"),
        ({"num_attention_blocks": [1, 1]}, "num_attention_blocks"),
        ({"transformer_depth": 2, "context_dim": [8, 16]}, r"context_dim=\[8, 16\]"),
    ],
)
def test_networks_without_a_counterpart_are_refused_by_name(options, named):
    with torch.device("meta"):
        unet = UNetModel(**{**SMALL, **options})
    for convert in (conversion.unet_table, conversion.unet_config):
        with pytest.raises(ValueError, match=f"no counterpart of {named}: it cannot be converted"):
            convert(unet)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"act_fn": "gelu"}, "act_fn='gelu'; UNetModel has 'silu' only"),
        ({"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}, "holds 'AttnDownBlock2D'"),
        ({"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]}, "is not the mirror"),
        ({"block_out_channels": [32, 48]}, "48 is no multiple of the first"),
        ({"attention_head_dim": [2, 3]}, "not equally wide"),
    ],
)
def test_configurations_of_other_networks_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        conversion.unet_params({**conversion.unet_config(SMALL), **options})


def test_weights_of_another_network_are_named():
    table = conversion.unet_table(UNetModel(**SMALL))
    weights = UNetModel(**{**SMALL, "num_res_blocks": 2}).state_dict()
    with pytest.raises(CheckpointError, match=r"left over \(input_blocks.*Was it built with the options"):
        table.to_diffusers(weights)
    with pytest.raises(
        CheckpointError, match=r"missing \(conv_in.bias, conv_in.weight, conv_norm_out.bias, …\)"
    ):
        table.from_diffusers({})


def test_bad_options_get_a_sentence():
    model = CLIPTextModel(CLIPTextConfig(vocab_size=20, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2))  # fmt: skip
    with pytest.raises(ValueError, match="CLIPTextModel has no part 'unet'. Known: text_encoder"):
        conversion.from_diffusers(model, {"unet": {}})
    with pytest.raises(ValueError, match="vector='vec' is unknown"):
        conversion.unet_table(UNetModel(**SMALL), vector="vec")
    params = {"embed_dim": 3, "ddconfig": {
        "z_channels": 4, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1], "num_res_blocks": 1,
        "attn_resolutions": [], "attn_type": "linear",
    }}  # fmt: skip
    with pytest.raises(ValueError, match="attn_type='linear', embed_dim=3 beside z_channels=4"):
        conversion.autoencoder_config(params)
