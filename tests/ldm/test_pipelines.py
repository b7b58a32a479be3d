"""Folders of diffusers' pipelines: its loaders read what we write, and a full run with the same noise gives the same picture."""

import json

import pytest
import torch

from ldm import conversion
from taming.util import instantiate_from_config

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

UNET = {
    "image_size": 8, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": 1, "attention_resolutions": [2, 1],
    "channel_mult": [1, 2], "use_spatial_transformer": True, "transformer_depth": 1, "legacy": False,
}  # fmt: skip
DDCONFIG = {
    "double_z": True, "z_channels": 4, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1,
    "attn_resolutions": [], "dropout": 0.0,
}  # fmt: skip
KL = {
    "target": "ldm.models.autoencoder.AutoencoderKL",
    "params": {"ddconfig": DDCONFIG, "embed_dim": 4, "lossconfig": {"target": "torch.nn.Identity"}},
}
CLIP = {
    "vocab_size": 600, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
    "max_position_embeddings": 77,
}  # fmt: skip
ARCH = {
    "embed_dim": 24, "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 3},
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 64, "patch_size": 32},
}  # fmt: skip
ENCODERS = "ldm.modules.encoders.modules"
EMBEDDERS = "sgm.modules.encoders.modules"
DENOISER = "sgm.modules.diffusionmodules"


def latent(cond, **params):
    unet = {**UNET, **params.pop("unet")}
    return {
        "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
        "params": {
            "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": unet},
            "first_stage_config": KL, "cond_stage_config": cond, "conditioning_key": "crossattn", "timesteps": 1000,
            "linear_start": 0.00085, "linear_end": 0.012, "image_size": 8, "channels": 4, "use_ema": False, "cond_stage_key": "txt",
            "first_stage_key": "jpg", "scale_factor": 0.18215, **params,
        },
    }  # fmt: skip


def sd1(**params):
    clip = {"target": f"{ENCODERS}.FrozenCLIPEmbedder", "params": {"version": CLIP}}
    return latent(clip, unet={"num_heads": 2, "context_dim": 32}, **params)


def sd2(**params):
    text = {
        "target": f"{ENCODERS}.FrozenOpenCLIPEmbedder",
        "params": {"arch": ARCH, "version": None, "layer": "penultimate"},
    }
    unet = {"num_head_channels": 32, "use_linear_in_transformer": True, "context_dim": 32}
    return latent(text, unet=unet, parameterization="v", **params)


def sdxl(refiner=False):
    big = {
        "is_trainable": False, "input_key": "txt", "target": f"{EMBEDDERS}.FrozenOpenCLIPEmbedder2",
        "params": {"arch": ARCH, "version": None, "layer": "penultimate", "always_return_pooled": True, "legacy": False},
    }  # fmt: skip
    small = {
        "is_trainable": False, "input_key": "txt", "target": f"{EMBEDDERS}.FrozenCLIPEmbedder",
        "params": {"version": CLIP, "layer": "hidden", "layer_idx": 2},
    }  # fmt: skip
    sizes = ["original_size_as_tuple", "crop_coords_top_left"]
    sizes += ["aesthetic_score"] if refiner else ["target_size_as_tuple"]
    numbers = [
        {"is_trainable": False, "input_key": key, "target": f"{EMBEDDERS}.ConcatTimestepEmbedderND", "params": {"outdim": 16}}
        for key in sizes
    ]  # fmt: skip
    unet = {
        k: v for k, v in UNET.items() if k not in ("image_size", "legacy", "use_spatial_transformer")
    } | {
        "num_head_channels": 32, "use_linear_in_transformer": True, "context_dim": 32 if refiner else 64, "num_classes": "sequential",
        "adm_in_channels": 24 + 16 * (5 if refiner else 6), "transformer_depth": [1, 2],
    }  # fmt: skip
    return {
        "target": "sgm.models.diffusion.DiffusionEngine",
        "params": {
            "scale_factor": 0.13025,
            "denoiser_config": {
                "target": f"{DENOISER}.denoiser.DiscreteDenoiser",
                "params": {
                    "num_idx": 1000, "scaling_config": {"target": f"{DENOISER}.denoiser_scaling.EpsScaling"},
                    "discretization_config": {"target": f"{DENOISER}.discretizer.LegacyDDPMDiscretization"},
                },
            },
            "network_config": {"target": f"{DENOISER}.openaimodel.UNetModel", "params": unet},
            "conditioner_config": {
                "target": "sgm.modules.GeneralConditioner",
                "params": {"emb_models": [big, *numbers] if refiner else [small, big, *numbers]},
            },
            "first_stage_config": KL,
        },
    }  # fmt: skip


def built(config, seed=0):
    torch.manual_seed(seed)
    model = instantiate_from_config(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.startswith(("model.", "first_stage_model.")):
                torch.nn.init.normal_(p, std=0.5 * p[0].numel() ** -0.5) if p.ndim > 1 else p.add_(0.05)
    return model


def same_bits(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(one[k], other[k]) and one[k].dtype == other[k].dtype for k in one
    )


FAMILIES = {"SD 1": sd1(), "SD 2-v": sd2(), "SDXL": sdxl(), "SDXL refiner": sdxl(refiner=True)}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_comes_back_from_a_pipelines_folder_bit_by_bit(tmp_path, name):
    model = built(FAMILIES[name])
    conversion.write_pipeline(model, tmp_path)
    state = conversion.read_pipeline(built(FAMILIES[name], seed=1), tmp_path)
    assert same_bits(state, model.state_dict())


@torch.no_grad()
def pictures_of_diffusers(pipeline, latents, prompt, **options):
    pipeline.set_progress_bar_config(disable=True)
    out = pipeline(
        prompt, num_inference_steps=4, guidance_scale=5.0, latents=latents, output_type="np", **options
    )
    return torch.from_numpy(out.images).permute(0, 3, 1, 2)


@pytest.mark.parametrize("name", ["SD 1", "SD 2-v"])
def test_diffusers_reads_the_folder_and_draws_the_same_picture(tmp_path, name):
    from diffusers import StableDiffusionPipeline

    from ldm import inference

    model = built(FAMILIES[name])
    conversion.write_pipeline(model, tmp_path)
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path)
    noise, prompt = torch.randn(1, 4, 8, 8), "a red heart, by hand"
    theirs = pictures_of_diffusers(pipeline, noise, prompt, height=16, width=16)
    sampler = inference.make_sampler(model, "ddim")[1]
    ours = inference.sample_text(model, sampler, [prompt], 4, (4, 8, 8), 5.0, x_T=noise, verbose=False)
    assert theirs.std() > 0.05
    assert (ours - theirs).abs().max() <= 1e-4


@torch.no_grad()
def picture_of_sgm(model, noise, prompt, steps=4, scale=5.0):
    size = torch.tensor([[16.0, 16.0]])
    batch = {"txt": [prompt], "original_size_as_tuple": size, "target_size_as_tuple": size}
    batch["crop_coords_top_left"] = torch.zeros(1, 2)
    c, uc = model.conditioner.get_unconditional_conditioning(batch, force_uc_zero_embeddings=["txt"])
    sampler = instantiate_from_config({
        "target": f"{DENOISER}.sampling.EulerEDMSampler",
        "params": {
            "num_steps": steps, "device": "cpu", "verbose": False,
            "discretization_config": {"target": f"{DENOISER}.discretizer.LegacyDDPMDiscretization"},
            "guider_config": {"target": f"{DENOISER}.guiders.VanillaCFG", "params": {"scale": scale}},
        },
    })  # fmt: skip
    z = sampler(model.denoise, noise.clone(), c, uc=uc)
    return ((model.decode_first_stage(z) + 1) / 2).clamp(0, 1)


def test_diffusers_reads_sdxls_folder_and_draws_the_same_picture(tmp_path):
    """Its scheduler spaces steps as `sgm` does when it is told "trailing", and then starts from σ ε instead of √(1 + σ²) ε."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    model = built(sdxl())
    conversion.write_pipeline(model, tmp_path)
    pipeline = StableDiffusionXLPipeline.from_pretrained(tmp_path)
    pipeline.scheduler = EulerDiscreteScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing"
    )
    noise, prompt = torch.randn(1, 4, 8, 8), "a blue house"
    sigma = float(model.denoiser.sigmas.max())
    start = noise * (1 + sigma**2) ** 0.5 / sigma
    theirs = pictures_of_diffusers(pipeline, start, prompt, height=16, width=16)
    assert theirs.std() > 0.05
    assert (picture_of_sgm(model, noise, prompt) - theirs).abs().max() <= 1e-4


def test_the_refiners_folder_is_read_as_the_published_class(tmp_path):
    from diffusers import DiffusionPipeline

    conversion.write_pipeline(built(sdxl(refiner=True)), tmp_path)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(pipeline).__name__ == "StableDiffusionXLImg2ImgPipeline" and pipeline.text_encoder is None
    assert pipeline.config.requires_aesthetics_score
    assert pipeline.unet.config.projection_class_embeddings_input_dim == 24 + 5 * 16


@pytest.mark.parametrize("name", ["SD 1", "SD 2-v"])
def test_diffusers_reads_our_single_file_with_our_configuration(tmp_path, name):
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from omegaconf import OmegaConf

    from taming.checkpoint import save_safetensors

    model = built(FAMILIES[name])
    save_safetensors(model.state_dict(), tmp_path / "model.safetensors")
    OmegaConf.save({"model": FAMILIES[name]}, tmp_path / "model.yaml")
    conversion.write_pipeline(model, tmp_path / "folder")
    single = StableDiffusionPipeline.from_single_file(
        tmp_path / "model.safetensors", original_config=str(tmp_path / "model.yaml"), config=str(tmp_path / "folder"),
        local_files_only=True,
    )  # fmt: skip
    folder = StableDiffusionPipeline.from_pretrained(tmp_path / "folder")
    for part in ("unet", "vae"):
        assert same_bits(getattr(single, part).state_dict(), getattr(folder, part).state_dict())
    assert isinstance(single.unet, UNet2DConditionModel)
    noise = torch.randn(1, 4, 8, 8)
    one, other = (pictures_of_diffusers(p, noise, "a tree", height=16, width=16) for p in (single, folder))
    assert (one - other).abs().max() <= 1e-4


@pytest.mark.parametrize(
    "channels, kind", [(9, "StableDiffusionInpaintPipeline"), (5, "StableDiffusionDepth2ImgPipeline")]
)
def test_the_pipelines_class_follows_from_the_network(tmp_path, channels, kind):
    import json

    config = sd1()
    config["params"]["unet_config"]["params"]["in_channels"] = channels
    conversion.write_pipeline(built(config), tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == kind and index["scheduler"] == ["diffusers", "DDIMScheduler"]


def test_a_first_stage_alone_becomes_a_folder_of_its_own(tmp_path):
    import diffusers

    model = instantiate_from_config(KL).eval()
    conversion.write_pipeline(model, tmp_path, dtype=torch.float16)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    peer = diffusers.AutoencoderKL.from_pretrained(tmp_path)
    x = torch.rand(1, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        ours = model.half().float().encode(x).parameters
        assert (ours - peer.float().encode(x).latent_dist.parameters).abs().max() <= 1e-4
    assert same_bits(
        {k: v.half() for k, v in model.state_dict().items()}, conversion.read_pipeline(model, tmp_path)
    )


@pytest.mark.parametrize(
    "betas, expected",
    [
        (torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}),
        (torch.linspace(1e-4, 0.02, 1000), {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}),
        (torch.tensor([0.1, 0.5, 0.2]), {"trained_betas": pytest.approx([0.1, 0.5, 0.2])}),
    ],
)  # fmt: skip
def test_the_schedule_is_named_or_written_out(betas, expected):
    class Model:
        parameterization = "v"

    Model.betas = betas
    config = conversion.scheduler_config(Model)
    assert {k: config[k] for k in expected} == expected and config["prediction_type"] == "v_prediction"
    Model.parameterization = "flow"
    with pytest.raises(ValueError, match="parameterization='flow'"):
        conversion.scheduler_config(Model)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_configuration_is_read_off_a_folder(tmp_path, name):
    """A model of it has the same names and shapes, draws by the same schedule, and takes the folder's weights."""
    model = built(FAMILIES[name])
    conversion.write_pipeline(model, tmp_path)
    again = instantiate_from_config(conversion.pipeline_model_config(tmp_path)["model"]).eval()
    assert {k: v.shape for k, v in again.state_dict().items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }
    assert again.scale_factor == model.scale_factor and conversion.scheduler_config(
        again
    ) == conversion.scheduler_config(model)
    again.load_state_dict(conversion.read_pipeline(again, tmp_path))
    assert same_bits(again.state_dict(), model.state_dict())
    texts = ["a word"]
    if name.startswith("SD "):
        assert torch.equal(again.get_learned_conditioning(texts), model.get_learned_conditioning(texts))


@pytest.mark.parametrize("name", ["SD 1", "SD 2-v"])
def test_ldms_layout_becomes_sgms_and_comes_back_bit_by_bit(name):
    state = built(FAMILIES[name]).state_dict()
    there = conversion.to_sgm(state)
    assert conversion.layout_of(there) == "sgm" and conversion.layout_of(state) == "ldm"
    from sgm.modules.diffusionmodules.discretizer import LegacyDDPMDiscretization

    sigmas = LegacyDDPMDiscretization()(1000, do_append_zero=False, flip=True)
    torch.testing.assert_close(there["denoiser.sigmas"], sigmas, rtol=2e-7, atol=0)
    assert any(k.startswith("conditioner.embedders.0.") for k in there)
    assert same_bits(conversion.to_ldm(there), dict(state))
    assert same_bits(conversion.to_ldm(state), dict(state)) and same_bits(conversion.to_sgm(there), there)


def test_models_that_exist_in_one_layout_only_are_named():
    state = built(sdxl()).state_dict()
    with pytest.raises(ValueError, match="ldm has no place for conditioner.embedders.1"):
        conversion.to_ldm(state)
    depth = {**built(sd1()).state_dict(), "depth_model.model.x": torch.ones(1)}
    with pytest.raises(ValueError, match="sgm has no place for depth_model.model.x"):
        conversion.to_sgm(depth)
    with pytest.raises(ValueError, match="no schedule"):
        conversion.to_sgm({"model.x": torch.ones(1)})
    linear = {"betas": torch.linspace(0.1, 0.3, 10)}
    with pytest.raises(ValueError, match="not linear in √β"):
        conversion.to_sgm(linear)
    with pytest.raises(ValueError, match="no table of noise levels"):
        conversion.to_ldm({"conditioner.x": torch.ones(1)})


def changed(folder, file, **entries):
    path = folder / file
    contents = json.loads(path.read_text()) | entries
    path.write_text(json.dumps({k: v for k, v in contents.items() if v != "gone"}))


@pytest.mark.parametrize(
    ("family", "file", "entries", "message"),
    [
        ("SD 1", "unet/config.json", {"in_channels": 5}, "a network of 5 channels for latents of 4"),
        ("SD 1", "unet/config.json", {"in_channels": 7}, "name the configuration of others"),
        ("SD 1", "unet/config.json", {"cross_attention_dim": "gone"}, "lacks 'cross_attention_dim'"),
        ("SD 1", "scheduler/scheduler_config.json", {"beta_start": "gone"}, "lacks 'beta_start'"),
        ("SD 1", "vae/config.json", {"shift_factor": 0.1}, "shift_factor=0.1"),
        ("SD 1", "vae/config.json", {"latents_mean": [0.0]}, "latents_mean"),
        ("SDXL", "scheduler/scheduler_config.json", {"prediction_type": "sample"}, "predicts x0"),
        ("SDXL", "scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr=True"),
    ],
)  # fmt: skip
def test_folders_of_what_ours_cannot_be_are_refused(tmp_path, family, file, entries, message):
    conversion.write_pipeline(built(FAMILIES[family]), tmp_path)
    changed(tmp_path, file, **entries)
    with pytest.raises(ValueError, match=message):
        conversion.pipeline_model_config(tmp_path)


def test_a_zero_terminal_snr_is_read_off_a_folder(tmp_path):
    conversion.write_pipeline(built(sd2()), tmp_path)
    changed(tmp_path, "scheduler/scheduler_config.json", rescale_betas_zero_snr=True)
    model = instantiate_from_config(conversion.pipeline_model_config(tmp_path)["model"])
    assert float(model.alphas_cumprod[-1]) < 1e-6


def test_a_model_of_unclip_is_refused_before_anything_is_written(tmp_path):
    model = built(sd2())
    model.noise_augmentor = torch.nn.Identity()
    with pytest.raises(ValueError, match="unCLIP wants an image encoder"):
        conversion.write_pipeline(model, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
