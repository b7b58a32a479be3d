"""Stable Video Diffusion ⇄ the folder of diffusers' pipeline: its loaders read what we write, and each part gives the same numbers."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from ldm import conversion
from taming.checkpoint import load_state_dict, save_safetensors
from taming.util import instantiate_from_config

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

DENOISER = "sgm.modules.diffusionmodules"
EMBEDDERS = "sgm.modules.encoders.modules"
NO_LOSS = {"target": "torch.nn.Identity"}
DDCONFIG = {
    "double_z": True, "z_channels": 4, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 2], "num_res_blocks": 2,
    "attn_resolutions": [], "dropout": 0.0, "attn_type": "vanilla",
}  # fmt: skip
KL = {"embed_dim": 4, "ddconfig": DDCONFIG, "lossconfig": NO_LOSS}
ARCH = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 224, "layers": 2, "width": 32, "head_width": 16, "patch_size": 56},
    "text_cfg": {"context_length": 77, "vocab_size": 60, "width": 16, "heads": 2, "layers": 1},
}
UNET = {
    "in_channels": 8, "out_channels": 4, "model_channels": 32, "attention_resolutions": [2, 1], "num_res_blocks": 1,
    "channel_mult": [1, 2, 2], "num_head_channels": 16, "use_linear_in_transformer": True, "context_dim": 24,
    "num_classes": "sequential", "adm_in_channels": 48, "extra_ff_mix_layer": True, "use_spatial_context": True,
    "merge_strategy": "learned_with_images", "video_kernel_size": [3, 1, 1], "spatial_transformer_attn_type": "softmax-xformers",
}  # fmt: skip


def number(key):
    return {
        "input_key": key,
        "is_trainable": False,
        "target": f"{EMBEDDERS}.ConcatTimestepEmbedderND",
        "params": {"outdim": 16},
    }


def svd(
    image_decoder=False,
    unet=None,
    decoder=None,
    scaling="VScalingWithEDMcNoise",
    numbers=("fps_id", "motion_bucket_id"),
):
    clips = {
        "target": "sgm.models.autoencoder.AutoencodingEngine",
        "params": {
            "loss_config": NO_LOSS,
            "regularizer_config": {"target": "sgm.modules.autoencoding.regularizers.DiagonalGaussianRegularizer"},
            "encoder_config": {"target": f"{DENOISER}.model.Encoder", "params": DDCONFIG},
            "decoder_config": {
                "target": "sgm.modules.autoencoding.temporal_ae.VideoDecoder",
                "params": {**DDCONFIG, "video_kernel_size": [3, 1, 1], **(decoder or {})},
            },
        },
    }  # fmt: skip
    clip = {"target": f"{EMBEDDERS}.FrozenOpenCLIPImageEmbedder", "params": {"arch": ARCH, "version": None}}
    one = {"n_cond_frames": 1, "n_copies": 1}
    latents = {
        **one,
        "is_ae": True,
        "encoder_config": {"target": "sgm.models.autoencoder.AutoencoderKLModeOnly", "params": KL},
    }
    embedders = [
        {
            "input_key": "cond_frames_without_noise", "is_trainable": False,
            "target": f"{EMBEDDERS}.FrozenOpenCLIPImagePredictionEmbedder", "params": {**one, "open_clip_embedding_config": clip},
        },
        *map(number, numbers),
        {"input_key": "cond_frames", "is_trainable": False, "target": f"{EMBEDDERS}.VideoPredictionEmbedderWithEncoder", "params": latents},
        number("cond_aug"),
    ]  # fmt: skip
    return {
        "target": "sgm.models.diffusion.DiffusionEngine",
        "params": {
            "scale_factor": 0.18215, "disable_first_stage_autocast": True,
            "denoiser_config": {
                "target": f"{DENOISER}.denoiser.Denoiser",
                "params": {"scaling_config": {"target": f"{DENOISER}.denoiser_scaling.{scaling}"}},
            },
            "network_config": {"target": f"{DENOISER}.video_model.VideoUNet", "params": {**UNET, **(unet or {})}},
            "conditioner_config": {"target": "sgm.modules.GeneralConditioner", "params": {"emb_models": embedders}},
            "first_stage_config": {"target": "sgm.models.autoencoder.AutoencoderKL", "params": KL} if image_decoder else clips,
        },
    }  # fmt: skip


def built(config, seed=0):
    """A model with random weights in every layer, of a size that keeps activations near one."""
    torch.manual_seed(seed)
    model = instantiate_from_config(config).eval()
    for name, p in model.named_parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.7 * p[0].numel() ** -0.5)
        else:
            norm = re.search(r"(norm\w*|ln_\w+|in_layers\.0|out_layers\.0|out\.0)\.weight$", name)
            torch.nn.init.normal_(p, mean=1.0 if norm else 0.0, std=0.1)
    return model


def same_bits(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(one[k], other[k]) and one[k].dtype == other[k].dtype for k in one
    )


@pytest.mark.parametrize("image_decoder", [False, True])
def test_a_model_of_video_comes_back_from_a_pipelines_folder_bit_by_bit(tmp_path, image_decoder):
    """The folder's own configuration describes it, too."""
    config = svd(image_decoder)
    model = built(config)
    assert conversion.write_pipeline(model, tmp_path) == ["unet", "vae", "image_encoder"]
    assert same_bits(conversion.read_pipeline(built(config, seed=1), tmp_path), model.state_dict())
    again = instantiate_from_config(conversion.pipeline_model_config(tmp_path)["model"]).eval()
    state = conversion.read_pipeline(again, tmp_path)
    assert same_bits(state, model.state_dict())
    own = again.state_dict()
    # of the text tower, which no embedder of pictures uses, a file keeps what it has
    assert {k for k in state if k not in own or own[k].shape != state[k].shape} <= {
        f"conditioner.embedders.0.open_clip.model.{k}" for k in ("positional_embedding", "text_projection", "token_embedding.weight", "ln_final.weight", "ln_final.bias")
    }  # fmt: skip
    assert own.keys() == state.keys()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A model, and diffusers' pipeline of the folder that we wrote of it."""
    from diffusers import StableVideoDiffusionPipeline

    folder = tmp_path_factory.mktemp("svd")
    model = built(svd())
    conversion.write_pipeline(model, folder)
    return model, StableVideoDiffusionPipeline.from_pretrained(folder), folder


@torch.no_grad()
def test_diffusers_pipeline_embeds_the_picture_alike(written):
    model, pipeline, _ = written
    image = torch.rand(1, 3, 224, 224)
    theirs = pipeline._encode_image(image, "cpu", 1, False)
    ours = model.conditioner.embedders[0](image * 2 - 1)
    assert theirs.std() > 0.05 and (ours - theirs).abs().max() <= 1e-4


@torch.no_grad()
def test_diffusers_pipeline_has_the_same_latents_and_decodes_them_to_the_same_clip(written):
    model, pipeline, _ = written
    picture = torch.rand(1, 3, 16, 16) * 2 - 1
    theirs = pipeline.vae.encode(picture).latent_dist.mode()
    ours = model.conditioner.embedders[3](picture)
    assert theirs.std() > 0.05 and (ours - theirs).abs().max() <= 1e-4
    z, frames = torch.randn(3, 4, 8, 8), 3
    clip = pipeline.decode_latents(z[None], frames, decode_chunk_size=3)[0].movedim(0, 1)
    ours = model.first_stage_model.decode(z / model.scale_factor, timesteps=frames)
    assert clip.std() > 0.05 and (ours - clip).abs().max() <= 1e-4


@torch.no_grad()
def test_diffusers_network_predicts_the_same(written):
    """Its blocks with attention have an ε of 1e-6 in their norms where the published network has 1e-5."""
    model, pipeline, _ = written
    frames = 3
    x, context, ids = (
        torch.randn(1, frames, 8, 8, 8),
        torch.randn(1, 1, 24),
        torch.tensor([[6.0, 127.0, 0.02]]),
    )
    theirs = pipeline.unet(x, torch.tensor(0.7), context, ids).sample[0]
    vector = torch.cat([model.conditioner.embedders[i](ids[:, j]) for j, i in enumerate((1, 2, 4))], dim=1)
    ours = model.model.diffusion_model(
        x[0], torch.full((frames,), 0.7), context.repeat_interleave(frames, 0), vector.repeat_interleave(frames, 0),
        num_video_frames=frames, image_only_indicator=torch.zeros(1, frames),
    )  # fmt: skip
    assert theirs.std() > 0.05 and (ours - theirs).abs().max() <= 1e-4


def test_diffusers_scheduler_has_the_noise_levels_and_labels_of_svds_sampler(written):
    from sgm.modules.diffusionmodules.discretizer import EDMDiscretization

    scheduler = written[1].scheduler
    scheduler.set_timesteps(25)
    sigmas = EDMDiscretization(sigma_max=700.0)(25)
    torch.testing.assert_close(scheduler.sigmas, sigmas, rtol=1e-5, atol=0)
    torch.testing.assert_close(scheduler.timesteps, 0.25 * sigmas[:-1].log(), rtol=1e-5, atol=1e-5)
    assert scheduler.config.prediction_type == "v_prediction"


def test_a_sampler_of_the_models_own_says_the_noise_levels():
    sampler = {
        "target": f"{DENOISER}.sampling.EulerEDMSampler",
        "params": {
            "num_steps": 5, "guider_config": {"target": f"{DENOISER}.guiders.VanillaCFG", "params": {"scale": 1.0}},
            "discretization_config": {"target": f"{DENOISER}.discretizer.EDMDiscretization", "params": {"sigma_min": 0.01, "sigma_max": 90.0}},
        },
    }  # fmt: skip
    config = svd()
    config["params"]["sampler_config"] = sampler
    scheduler = conversion.scheduler_config(instantiate_from_config(config))
    assert (scheduler["sigma_min"], scheduler["sigma_max"]) == (0.01, 90.0)


def test_the_whole_pipeline_of_diffusers_runs_on_the_folder(written):
    from PIL import Image

    pipeline = written[1]
    pipeline.set_progress_bar_config(disable=True)
    clip = pipeline(
        Image.new("RGB", (16, 16), (200, 60, 30)), height=16, width=16, num_frames=2, num_inference_steps=2, output_type="pt",
        generator=torch.manual_seed(0),
    ).frames  # fmt: skip
    assert clip.shape[-3:] == (3, 16, 16) and clip.std() > 0.01 and clip.isfinite().all()


def test_svds_configurations_have_the_published_sizes(tmp_path):
    """Those of diffusers' classes' defaults, and of its published folders."""
    from omegaconf import OmegaConf

    from ldm.conversion.checkpoint import networks
    from ldm.conversion.picture import picture_config
    from ldm.conversion.video import video_unet_config, video_vae_config
    from taming.checkpoint import build_empty

    root = Path(__file__).resolve().parents[2]
    config = OmegaConf.load(root / "configs/inference/svd.yaml").model
    for e in config.params.conditioner_config.params.emb_models:
        if "open_clip_embedding_config" in e.params:
            e.params.open_clip_embedding_config.params.version = None
    with build_empty():
        model = instantiate_from_config(config)
    found = {n.part: n.module for n in networks(model)}
    from diffusers import UNetSpatioTemporalConditionModel

    with torch.device("meta"):
        default = UNetSpatioTemporalConditionModel().config
    for key, value in video_unet_config(found["unet"]).items():
        wanted = default.get(key, value)
        assert value == (list(wanted) if isinstance(wanted, tuple) else wanted), key
    vae = video_vae_config(found["vae"], 0.18215)
    assert (
        vae["block_out_channels"] == [128, 256, 512, 512]
        and vae["_class_name"] == "AutoencoderKLTemporalDecoder"
    )
    tower = picture_config(found["image_encoder"])
    expected = {
        "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16, "patch_size": 14,
        "image_size": 224, "projection_dim": 1024, "hidden_act": "gelu",
    }  # fmt: skip
    assert {k: tower[k] for k in expected} == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unet": {"video_kernel_size": 3}}, "video_kernel_size=3"),
        ({"unet": {"merge_strategy": "learned"}}, "merge_strategy='learned'"),
        ({"unet": {"extra_ff_mix_layer": False}}, "ff_in=False"),
        ({"unet": {"use_linear_in_transformer": False}}, "use_linear_in_transformer=False"),
        ({"unet": {"max_ddpm_temb_period": 500}}, "max_time_embed_period=500"),
        ({"unet": {"num_classes": None}}, "num_classes=None"),
        ({"decoder": {"num_res_blocks": 1}}, "1 residual blocks a level"),
        ({"decoder": {"time_mode": "all"}}, "time_mode"),
        ({"scaling": "EDMScaling"}, "scaling is EDMScaling"),
        ({"unet": {"adm_in_channels": 32}, "numbers": ("fps_id",)}, "SV3D does not"),
    ],
)
def test_what_diffusers_does_not_have_is_named(tmp_path, options, message):
    from taming.checkpoint import build_empty

    with build_empty():
        model = instantiate_from_config(svd(**options))
    with pytest.raises(ValueError, match=re.escape(message)):
        conversion.write_pipeline(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_network_of_video_alone_is_no_pipeline(tmp_path):
    from sgm.modules.diffusionmodules.video_model import VideoUNet

    with torch.device("meta"):
        unet = VideoUNet(**UNET)
    with pytest.raises(ValueError, match="without vae and image_encoder"):
        conversion.write_pipeline(unet, tmp_path)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("scheduler/scheduler_config.json", {"timestep_type": "discrete"}, "timestep_type='discrete'"),
        ("image_encoder/config.json", {"hidden_act": "relu"}, "hidden_act='relu'"),
        ("unet/config.json", {"down_block_types": ["X"] * 3}, "down_block_types holds 'X'"),
    ],
)
def test_a_folder_that_is_not_svds_says_so(written, tmp_path, file, change, message):
    for part in (
        "model_index.json",
        "unet/config.json",
        "vae/config.json",
        "scheduler/scheduler_config.json",
        "image_encoder/config.json",
    ):
        (tmp_path / part).parent.mkdir(exist_ok=True)
        contents = json.loads((written[2] / part).read_text())
        (tmp_path / part).write_text(json.dumps(contents | (change if part == file else {})))
    with pytest.raises(ValueError, match=message):
        conversion.pipeline_model_config(tmp_path)


def test_the_script_writes_the_folder_and_comes_back(tmp_path, capsys):
    from omegaconf import OmegaConf

    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    convert = importlib.import_module("scripts.convert")
    state = built(svd()).state_dict()
    save_safetensors(state, tmp_path / "svd.safetensors")
    OmegaConf.save({"model": svd()}, tmp_path / "svd.yaml")
    assert (
        convert.main([str(tmp_path / "svd.safetensors"), str(tmp_path / "folder"), "--to", "diffusers"]) == 0
    )
    assert "unet, vae, image_encoder" in capsys.readouterr().out
    assert convert.main([str(tmp_path / "folder"), str(tmp_path / "back.safetensors")]) == 0
    assert same_bits(load_state_dict(tmp_path / "back.safetensors"), dict(state))


def test_a_folder_of_diffusers_own_hand_is_read(written, tmp_path):
    """It holds what sampling needs: the encoder of the first stage and what is left of the text tower are not there."""
    model, pipeline, _ = written
    pipeline.save_pretrained(tmp_path)
    again = instantiate_from_config(conversion.pipeline_model_config(tmp_path)["model"])
    state, expected = conversion.read_pipeline(again, tmp_path), model.state_dict()
    assert same_bits(state, {k: expected[k] for k in state})
    spare = (
        "first_stage_model.encoder.",
        "conditioner.embedders.0.open_clip.model.",
        "conditioner.embedders.3.encoder.",
    )
    assert all(k.startswith(spare) for k in expected.keys() - state.keys())
    needed = (
        "model.",
        "first_stage_model.decoder.",
        "conditioner.embedders.0.open_clip.model.visual.",
        "conditioner.embedders.3.encoder.encoder.",
    )
    assert all(k in state for k in expected if k.startswith(needed))
