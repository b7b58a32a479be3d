"""Our networks and those of diffusers and transformers, with the same random weights: the same outputs, both ways.

The samplers' peers stand with the samplers: tests/ldm/models/diffusion/test_samplers.py (DDIM, PLMS) and test_solvers.py
(DPM-Solver, UniPC, DEIS), which say where conventions differ.
"""

import pytest
import torch

from ldm import conversion
from ldm.models.autoencoder import AutoencoderKL, VQModel
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.diffusionmodules.util import timestep_embedding
from ldm.modules.encoders.clip import CLIPTextConfig, CLIPTextModel, FrozenCLIPEmbedder
from ldm.modules.encoders.openclip import FrozenOpenCLIPEmbedder

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

BASE = {
    "image_size": 16, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": 1, "use_spatial_transformer": True,
    "context_dim": 24, "legacy": False,
}  # fmt: skip
V1 = {**BASE, "attention_resolutions": [4, 2, 1], "channel_mult": [1, 2, 2, 2], "num_heads": 4}
V2 = {
    **BASE, "attention_resolutions": [4, 2, 1], "channel_mult": [1, 2, 4, 4], "num_head_channels": 32, "use_linear_in_transformer": True,
}  # fmt: skip
UNETS = {
    "SD 1": V1,
    "SD 1 inpainting": {**V1, "in_channels": 9},
    "SD 2": {**V2, "num_res_blocks": 2},
    "SD 2 unCLIP": {**V2, "num_classes": "sequential", "adm_in_channels": 40},
    "SDXL base": {
        **V2, "attention_resolutions": [4, 2], "channel_mult": [1, 2, 4], "transformer_depth": [1, 2, 3], "num_classes": "sequential",
        "adm_in_channels": 20 + 6 * 16,
    },
    "SDXL refiner": {
        **V2, "attention_resolutions": [4, 2], "transformer_depth": 2, "num_classes": "sequential", "adm_in_channels": 20 + 5 * 16,
    },
    "upscaler": {
        **V2, "in_channels": 7, "attention_resolutions": [2, 4, 8], "num_classes": 50, "num_heads": 4, "num_head_channels": -1,
        "disable_self_attentions": [True, True, True, False], "disable_middle_self_attn": False,
    },
    "scale and shift": {**V1, "use_scale_shift_norm": True, "num_res_blocks": [1, 2, 1, 1]},
}  # fmt: skip
VECTOR = {"SD 2 unCLIP": "projection"}


def randomised(network):
    """With numbers in every weight, those that begin as zeros, too, and outputs of moderate size."""
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.5 * p[0].numel() ** -0.5) if p.ndim > 1 else torch.nn.init.normal_(
            p, 0.8, 0.2
        )
    return network.eval()


def peer_of_unet(unet, name):
    from diffusers import UNet2DConditionModel

    vector = VECTOR.get(name, "text_time")
    config = conversion.unet_config(unet, vector=vector, time_ids_width=16)
    peer = UNet2DConditionModel(**config).eval()
    table = conversion.unet_table(unet, vector)
    peer.load_state_dict(table.to_diffusers(unet.state_dict()))  # strict
    return peer, table


def vectors(unet, name):
    """What says the same thing to both: our `y`, and diffusers' arguments."""
    if unet.num_classes is None:
        return None, {}
    if isinstance(unet.num_classes, int):
        labels = torch.tensor([3, 41])
        return labels, {"class_labels": labels}
    if name in VECTOR:
        y = torch.randn(2, 40)
        return y, {"class_labels": y}
    count = (unet.label_emb[0][0].in_features - 20) // 16
    text, ids = torch.randn(2, 20), torch.randint(0, 512, (2, count)).float()
    y = torch.cat([text, timestep_embedding(ids.flatten(), 16).reshape(2, -1)], dim=1)
    return y, {"added_cond_kwargs": {"text_embeds": text, "time_ids": ids}}


def same_bits(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("name", UNETS)
def test_the_unet_equals_diffusers_and_comes_back_bit_by_bit(name):
    unet = randomised(UNetModel(**UNETS[name]))
    peer, table = peer_of_unet(unet, name)
    x, t, context = torch.randn(2, unet.in_channels, 16, 16), torch.tensor([3, 700]), torch.randn(2, 7, 24)
    y, theirs = vectors(unet, name)
    with torch.no_grad():
        ours, expected = unet(x, t, context, y), peer(x, t, context, **theirs).sample
    assert (ours - expected).abs().max() <= 1e-4 * max(1.0, float(expected.abs().max()))
    assert expected.std() > 0.05  # not an agreement about nothing
    assert same_bits(table.from_diffusers(peer.state_dict()), unet.state_dict())


@pytest.mark.parametrize("name", UNETS)
def test_diffusers_configuration_builds_our_unet(name):
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNetModel(**UNETS[name])
        config = conversion.unet_config(UNETS[name], VECTOR.get(name, "text_time"), 16)
        again = UNetModel(**conversion.unet_params(dict(UNet2DConditionModel(**config).config)))
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (unet, again)]
    assert shapes[0] == shapes[1]
    vector = VECTOR.get(name, "text_time")
    assert conversion.unet_config(again, vector, 16) == conversion.unet_config(unet, vector, 16)


DDCONFIG = {
    "double_z": True, "z_channels": 4, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 2, 2],
    "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0,
}  # fmt: skip
LOSS = {"target": "torch.nn.Identity"}


@pytest.mark.parametrize(
    "options",
    [{}, {"attn_resolutions": [16]}, {"attn_type": "none"}],
    ids=["SD", "attending level", "no attention"],
)
def test_the_kl_autoencoder_equals_diffusers_and_comes_back_bit_by_bit(options):
    import diffusers

    params = {"ddconfig": {**DDCONFIG, **options}, "embed_dim": 4}
    model = randomised(AutoencoderKL(**params, lossconfig=LOSS))
    peer = diffusers.AutoencoderKL(**conversion.autoencoder_config(params)).eval()
    table = conversion.autoencoder_table(model)
    peer.load_state_dict(table.to_diffusers(model.state_dict()))
    x, z = torch.randn(1, 3, 32, 32), torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        ours, theirs = model.encode(x).parameters, peer.encode(x).latent_dist.parameters
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.decode(z), peer.decode(z).sample, rtol=1e-4, atol=1e-4)
    assert same_bits(table.from_diffusers(peer.state_dict()), model.state_dict())
    again = conversion.autoencoder_params(dict(peer.config))
    assert conversion.autoencoder_config(again) == conversion.autoencoder_config(params)
    assert AutoencoderKL(**again, lossconfig=LOSS).state_dict().keys() == model.state_dict().keys()


def test_the_quantised_autoencoder_equals_diffusers_and_comes_back_bit_by_bit():
    import diffusers

    ddconfig = {**DDCONFIG, "double_z": False, "attn_resolutions": [8]}
    params = {"ddconfig": ddconfig, "embed_dim": 6, "n_embed": 64}
    model = randomised(VQModel(**params, lossconfig=LOSS))
    peer = diffusers.VQModel(**conversion.autoencoder_config(params)).eval()
    table = conversion.autoencoder_table(model)
    peer.load_state_dict(table.to_diffusers(model.state_dict()))
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(x)[0], peer(x).sample, rtol=1e-4, atol=1e-4)
    assert same_bits(table.from_diffusers(peer.state_dict()), model.state_dict())
    again = conversion.autoencoder_params(dict(peer.config))
    assert conversion.autoencoder_config(again) == conversion.autoencoder_config(params)


SIZES = {
    "vocab_size": 60, "hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2,
    "max_position_embeddings": 12,
}  # fmt: skip


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("kind", ["CLIPTextModel", "CLIPTextModelWithProjection"])
def test_the_clip_text_model_equals_transformers_and_comes_back_bit_by_bit(act, kind):
    """The class with a projection has published names, the one without has lost its first level: both are read."""
    import transformers

    model = randomised(CLIPTextModel(CLIPTextConfig(**SIZES, hidden_act=act)))
    config = transformers.CLIPTextConfig(**conversion.clip_config(model), pad_token_id=0)
    peer = getattr(transformers, kind)(config).eval()
    table = conversion.clip_table(model)
    ids = torch.randint(0, 58, (2, 12))
    ids[:, 7:] = 59
    weights = table.to_diffusers(model.state_dict())
    if kind == "CLIPTextModel":
        weights = {k.removeprefix("text_model."): v for k, v in weights.items()}
    _, unexpected = peer.load_state_dict(weights, strict=False)
    assert not unexpected
    with torch.no_grad():
        ours, theirs = model(ids), peer(ids, output_hidden_states=True)
    torch.testing.assert_close(ours.last_hidden_state, theirs.last_hidden_state, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.hidden_states[-2], theirs.hidden_states[-2], rtol=1e-4, atol=1e-4)
    kept = {k: v for k, v in peer.state_dict().items() if k != "text_projection.weight"}
    assert same_bits(table.from_diffusers(kept), model.state_dict())


def openclip(layer="last", **text):
    sizes = {"context_length": 12, "vocab_size": 60, "width": 32, "heads": 2, "layers": 3, **text}
    arch = {
        "embed_dim": 24, "text_cfg": sizes,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 64, "patch_size": 32},
    }  # fmt: skip
    encoder = FrozenOpenCLIPEmbedder(arch=arch, version=None, layer=layer)
    randomised(encoder.model)
    return encoder


def test_the_open_clip_text_tower_equals_transformers_and_comes_back_bit_by_bit():
    import transformers

    encoder = openclip()
    model, table = encoder.model, conversion.openclip_table(encoder.model)
    config = transformers.CLIPTextConfig(**conversion.openclip_config(model), pad_token_id=0)
    peer = transformers.CLIPTextModelWithProjection(config).eval()
    peer.load_state_dict(table.to_diffusers(model.state_dict()))
    ids = torch.randint(0, 58, (2, 12))
    ids[:, 9:] = 59
    with torch.no_grad():
        ours, theirs = encoder.encode_with_transformer(ids), peer(ids)
        torch.testing.assert_close(ours, theirs.last_hidden_state, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.encode_text(ids), theirs.text_embeds, rtol=1e-4, atol=1e-4)
    kept = {k: v for k, v in model.state_dict().items() if k != "logit_scale"}
    assert same_bits(table.from_diffusers(peer.state_dict()), kept)


def test_sd2s_text_encoder_of_diffusers_is_ours_without_the_last_layer():
    """diffusers ships 23 of its 24 layers: its final output is our penultimate one."""
    import transformers

    encoder = openclip(layer="penultimate")
    table = conversion.openclip_table(encoder.model, skip_last=1, projection=False)
    config = transformers.CLIPTextConfig(
        **conversion.openclip_config(encoder.model, skip_last=1), pad_token_id=0
    )
    peer = transformers.CLIPTextModel(config).eval()
    weights = table.to_diffusers(encoder.model.state_dict())
    peer.load_state_dict({k.removeprefix("text_model."): v for k, v in weights.items()})
    ids = torch.randint(0, 60, (2, 12))
    with torch.no_grad():
        expected = peer(ids).last_hidden_state
        torch.testing.assert_close(encoder.encode_with_transformer(ids), expected, rtol=1e-4, atol=1e-4)
    again = conversion.openclip_architecture(conversion.openclip_config(encoder.model))
    rebuilt = FrozenOpenCLIPEmbedder(arch=again, version=None).model.state_dict()
    assert {k: v.shape for k, v in rebuilt.items()} == {
        k: v.shape for k, v in encoder.model.state_dict().items()
    }


def test_a_whole_pipeline_of_diffusers_draws_the_latents_that_we_draw(tiny):
    """DDIM over UNet and text encoder together; diffusers' steps are ours, its last ᾱ is that of step 0."""
    from diffusers import DDIMScheduler, UNet2DConditionModel

    from ldm.models.diffusion.ddim import DDIMSampler
    from taming.util import instantiate_from_config

    cond = {
        "target": f"{FrozenCLIPEmbedder.__module__}.FrozenCLIPEmbedder",
        "params": {"version": {**SIZES, "hidden_size": 16}},
    }
    config = tiny.latent_diffusion(
        unet={**V1, "in_channels": 3, "out_channels": 3, "context_dim": 16}, cond_stage_config=cond, cond_stage_key="txt"
    )  # fmt: skip
    model = instantiate_from_config(config).eval()
    randomised(model.model)
    parts = conversion.to_diffusers(model)
    assert list(parts) == ["unet", "text_encoder"]
    assert same_bits(
        conversion.from_diffusers(model, parts),
        {k: v for k, v in model.state_dict().items() if k.startswith(("model.", "cond_stage_model."))},
    )
    peer = UNet2DConditionModel(**conversion.unet_config(model.model.diffusion_model)).eval()
    peer.load_state_dict(parts["unet"])
    context, x = torch.randn(1, 5, 16), torch.randn(1, 3, 16, 16)
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.0015, beta_end=0.0195, clip_sample=False, steps_offset=1, set_alpha_to_one=False
    )  # fmt: skip
    scheduler.set_timesteps(5)
    latents = x
    with torch.no_grad():
        for t in scheduler.timesteps:
            latents = scheduler.step(peer(latents, t, context).sample, t, latents).prev_sample
    ours, _ = DDIMSampler(model).sample(5, 1, (3, 16, 16), context, x_T=x, eta=0.0, verbose=False)
    assert (ours - latents).abs().max() <= 1e-4 * max(1.0, float(latents.abs().max()))
