"""Published models, recognised by the names and shapes of their weights alone; recorded configurations are built without memory."""

import pytest
import torch

from ldm import recognition
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.recognition import recognise, traits_of
from taming.checkpoint import CheckpointError, Weights, save_safetensors

UNET = "model.diffusion_model."


def unet_shapes(channels, context, width=320, vector=None, labels=None, frames=False):
    """The few entries that tell UNets apart, as they are in the published files."""
    shapes = {
        f"{UNET}input_blocks.0.0.weight": (width, channels, 3, 3),
        f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (width, context),
        "first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3),
    }
    if vector:
        shapes[f"{UNET}label_emb.0.0.weight"] = (4 * width, vector)
    if labels:
        shapes[f"{UNET}label_emb.weight"] = (labels, 4 * width)
    if frames:
        shapes[f"{UNET}input_blocks.1.1.time_stack.0.attn2.to_k.weight"] = (width, context)
    return shapes


LDM, SGM = {"cond_stage_model.x": (1,)}, {"conditioner.embedders.0.x": (1,)}
VIDEO_DECODER = {"first_stage_model.decoder.conv_out.time_mix_conv.weight": (3, 3, 3, 1, 1)}
VIEWS = {f"{UNET}input_blocks.1.1.time_mix_blocks.0.attn1.to_q.weight": (320, 320)}
MOTION = {f"{UNET}input_blocks.1.1.time_mixer_motion.mix_factor": (1,)}
SD = "configs/stable-diffusion/"
PUBLISHED = {
    f"{SD}v1-inference.yaml": unet_shapes(4, 768) | LDM,
    f"{SD}v1-inpainting-inference.yaml": unet_shapes(9, 768) | LDM,
    f"{SD}v2-inference.yaml": unet_shapes(4, 1024) | LDM,
    f"{SD}v2-inpainting-inference.yaml": unet_shapes(9, 1024) | LDM,
    f"{SD}v2-midas-inference.yaml": unet_shapes(5, 1024) | LDM,
    f"{SD}x4-upscaling.yaml": unet_shapes(7, 1024, width=256, labels=1000) | LDM,
    f"{SD}v2-1-stable-unclip-h-inference.yaml": unet_shapes(4, 1024, vector=2048) | LDM,
    f"{SD}v2-1-stable-unclip-l-inference.yaml": unet_shapes(4, 1024, vector=1536) | LDM,
    "configs/inference/sd_2_1.yaml": unet_shapes(4, 1024) | SGM,
    "configs/inference/sd_xl_base.yaml": unet_shapes(4, 2048, vector=2816) | SGM,
    "configs/inference/sd_xl_refiner.yaml": unet_shapes(4, 1280, width=384, vector=2560) | SGM,
    "configs/inference/svd.yaml": unet_shapes(8, 1024, vector=768, frames=True) | SGM | VIDEO_DECODER,
    "configs/inference/svd_image_decoder.yaml": unet_shapes(8, 1024, vector=768, frames=True) | SGM,
    "configs/inference/sv3d_u.yaml": unet_shapes(8, 1024, vector=256, frames=True) | SGM,
    "configs/inference/sv3d_p.yaml": unet_shapes(8, 1024, vector=1280, frames=True) | SGM,
    "scripts/sampling/configs/sv4d.yaml": unet_shapes(8, 1024, vector=1280) | SGM | VIEWS,
    "scripts/sampling/configs/sv4d2.yaml": unet_shapes(8, 1024, vector=1280) | SGM | VIEWS | MOTION,
    "configs/latent-diffusion/txt2img-1p4B-eval.yaml": unet_shapes(4, 1280) | LDM,
}


@pytest.mark.parametrize("config", PUBLISHED)
def test_published_diffusion_models_are_recognised(config):
    found = recognise({k: torch.empty(s, device="meta") for k, s in PUBLISHED[config].items()})
    assert found.config == config
    assert (found.twin is not None) == (config in (f"{SD}v2-inference.yaml", "configs/inference/sd_2_1.yaml"))


def test_every_configuration_that_a_file_may_be_recognised_as_is_there():
    for known in recognition.MODELS:
        for config in filter(None, (known.config, known.twin)):
            assert recognition.published_config(config).is_file()


@pytest.mark.parametrize("config", ["svd", "sv3d_u", "sv3d_p", "sv4d", "sv4d2"])
def test_networks_of_video_are_recognised_by_what_their_configurations_build(config):
    from omegaconf import OmegaConf

    from taming.util import instantiate_from_config

    path = f"scripts/sampling/configs/{config}.yaml"
    with torch.device("meta"):
        unet = instantiate_from_config(
            OmegaConf.load(recognition.published_config(path)).model.params.network_config
        )
    found = recognise(
        {f"{UNET}{k}": v for k, v in unet.state_dict().items()}
        | {"conditioner.x": torch.ones(1), "first_stage_model.decoder.time_": torch.ones(1)}
    )
    assert found.config.rpartition("/")[2] == f"{config}.yaml"


def test_sdxls_inpainting_is_told_by_nine_channels_and_has_no_configuration():
    shapes = unet_shapes(9, 2048, vector=2816) | SGM
    with pytest.raises(
        CheckpointError, match="Stable Diffusion XL, inpainting, of which no configuration .*--config"
    ):
        recognise({k: torch.empty(s, device="meta") for k, s in shapes.items()})


def first_stage(z, ch_mult, attends=(), codes=None, middle="vanilla"):
    from ldm.models.autoencoder import AutoencoderKL, VQModel

    ddconfig = {
        "double_z": codes is None, "z_channels": z, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": ch_mult,
        "num_res_blocks": 1, "attn_resolutions": list(attends), "attn_type": middle,
    }  # fmt: skip
    loss = {"target": "torch.nn.Identity"}
    with torch.device("meta"):
        if codes is None:
            return AutoencoderKL(ddconfig, loss, z)
        return VQModel(ddconfig=ddconfig, lossconfig=loss, n_embed=codes, embed_dim=z)


@pytest.mark.parametrize(
    "name, sizes",
    [
        ("KL-f4", (3, [1, 2, 4])), ("KL-f8", (4, [1, 2, 4, 4])), ("KL-f16", (16, [1, 1, 2, 2, 4], [16])),
        ("KL-f32", (64, [1, 1, 2, 2, 4, 4], [16, 8])), ("VQ-F4", (3, [1, 2, 4], [], 8192)),
        ("VQ-F4-NOATTN", (3, [1, 2, 4], [], 8192, "none")), ("VQ-F8", (4, [1, 2, 2, 4], [32], 16384)),
        ("VQ-F8-N256", (4, [1, 2, 2, 4], [32], 256)), ("VQ-F16", (8, [1, 1, 2, 2, 4], [16], 16384)),
        ("VQGAN", (256, [1, 1, 2, 2, 4], [16], 1024)), ("VQGAN of 16384 codes", (256, [1, 1, 2, 2, 4], [16], 16384)),
    ],
)  # fmt: skip
def test_published_first_stages_are_recognised_by_factor_latent_and_codebook(name, sizes):
    assert recognise(first_stage(*sizes).state_dict()).name == name


def test_weights_of_no_published_model_are_described():
    with pytest.raises(CheckpointError, match="of no published model .*channels 4, context 99, .*layout ldm"):
        recognise({k: torch.empty(s, device="meta") for k, s in (unet_shapes(4, 99) | LDM).items()})
    with pytest.raises(CheckpointError, match="no UNet, no first stage"):
        recognise({"w": torch.ones(1)})
    assert traits_of({}).channels is None


@pytest.mark.parametrize(
    "notes, config, twin",
    [
        ({"modelspec.prediction_type": "v"}, "v2-inference-v", None),
        ({"modelspec.prediction_type": "epsilon"}, "v2-inference", None),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, "v2-inference-v", None),
        ({"modelspec.architecture": "stable-diffusion-v2-512"}, "v2-inference", "v2-inference-v"),
        ({}, "v2-inference", "v2-inference-v"),
    ],
)
def test_notes_in_the_file_say_what_the_network_predicts(tmp_path, notes, config, twin):
    shapes = unet_shapes(4, 1024, width=8) | LDM
    shapes[f"{UNET}input_blocks.0.0.weight"] = (320, 4, 1, 1)
    save_safetensors({k: torch.zeros(s) for k, s in shapes.items()}, tmp_path / "m.safetensors", notes)
    found = recognise(Weights(tmp_path / "m.safetensors"))
    assert found.config == f"{SD}{config}.yaml" and found.twin == (twin and f"{SD}{twin}.yaml")


class Noise(UNetModel):
    """What a good network of ε says at the last step: its input; of v: nothing of it."""

    keeps = 1.0

    def forward(self, x, timesteps=None, context=None, **kwargs):
        return self.keeps * x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("keeps, expected", [(1.0, False), (0.068, True), (-0.3, True)])
def test_one_call_on_noise_tells_v_from_eps(keeps, expected):
    model = torch.nn.Module()
    model.model = torch.nn.Module()
    model.model.diffusion_model = unet = Noise(
        image_size=8, in_channels=4, out_channels=4, model_channels=32, num_res_blocks=1, attention_resolutions=[1], num_heads=2,
        channel_mult=[1], use_spatial_transformer=True, context_dim=8, legacy=False,
    )  # fmt: skip
    unet.keeps = keeps
    assert recognition.predicts_v(model) is expected


def test_a_configuration_that_is_not_here_is_named():
    with pytest.raises(FileNotFoundError, match=r"there is no configs/nothing\.yaml"):
        recognition.published_config("configs/nothing.yaml")


def test_a_bare_file_is_loaded_by_what_it_is_recognised_as(tmp_path, tiny, monkeypatch):
    """The published configuration stands in for a small one here; at first it is taken for one of ε."""
    from omegaconf import OmegaConf

    from ldm import inference
    from taming.util import instantiate_from_config

    unet = {"use_spatial_transformer": True, "context_dim": 8, "num_heads": 2, "legacy": False}
    model = instantiate_from_config(tiny.latent_diffusion(unet=unet))
    save_safetensors(model.state_dict(), tmp_path / "bare.safetensors")
    files = {}
    for kind in ("eps", "v"):
        config = {"model": tiny.latent_diffusion(unet=unet, parameterization=kind)}
        files[kind] = tmp_path / "configs" / f"{kind}.yaml"
        files[kind].parent.mkdir(exist_ok=True)
        OmegaConf.save(config, files[kind])
    with pytest.raises(inference.InferenceError, match="no configuration lies beside .*no published model"):
        inference.load_model(str(tmp_path / "bare.safetensors"), None, torch.device("cpu"))
    found = recognition.Recognised("test", str(files["eps"]), str(files["v"]))
    monkeypatch.setattr(inference, "recognise", lambda weights: found)
    loaded, path, config = inference.load_model(str(tmp_path / "bare.safetensors"), None, torch.device("cpu"))
    assert (
        path.name == "bare.safetensors" and config.model.params.parameterization == "v"
    )  # zero output: no ε in it
    assert loaded.parameterization == "v"
    state = model.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in loaded.state_dict().items())
