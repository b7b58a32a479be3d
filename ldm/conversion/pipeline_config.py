"""The configuration of our model, read off the folder of a pipeline of diffusers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ldm.conversion.autoencoder import autoencoder_params
from ldm.conversion.picture import picture_architecture
from ldm.conversion.text import openclip_architecture
from ldm.conversion.unet import unet_params
from ldm.conversion.video import DECODER, KERNEL, UNET, video_unet_params
from ldm.modules.encoders.clip import CLIPTextConfig
from taming.checkpoint import CheckpointError

ENCODERS = "ldm.modules.encoders.modules"
EMBEDDERS = "sgm.modules.encoders.modules"
ENGINE = "sgm.modules.diffusionmodules"
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
SCALINGS = {"eps": "EpsScaling", "v": "VScaling"}
SCHEDULES = {"scaled_linear": "linear", "linear": "sqrt_linear"}  # diffusers' names of a run of β, and ours
SIZES = ("original_size_as_tuple", "crop_coords_top_left")
NUMBERS_OF_VIDEO = ("fps_id", "motion_bucket_id", "cond_aug")
LAST_SIZE = {6: "target_size_as_tuple", 5: "aesthetic_score"}  # by the count of numbers


def pipeline_model_config(folder: str | Path) -> dict[str, Any]:
    """`{"model": …}` for the folder of a Stable Diffusion 1, 2 or XL, of a Stable Video Diffusion, or of an autoencoder.

    Raises:
        FileNotFoundError: a part's configuration is not there.
        CheckpointError: it cannot be read.
        ValueError: an option that our models do not have.
    """
    try:
        return {"model": _model(Path(folder))}
    except KeyError as error:
        raise ValueError(f"a configuration in {folder} lacks {error}") from error


def _model(folder: Path) -> dict[str, Any]:
    if not (folder / "model_index.json").is_file() and (folder / "config.json").is_file():
        return _first_stage(read_json(folder / "config.json"))
    index = read_json(folder / "model_index.json")
    unet = read_json(folder / "unet" / "config.json")
    vae = read_json(folder / "vae" / "config.json")
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    kind = scheduler.get("prediction_type", "epsilon")
    if kind not in PREDICTIONS:
        raise ValueError(f"prediction_type={kind!r} is unknown; our models have {', '.join(PREDICTIONS)}")
    if unet.get("_class_name") == UNET:
        tower = read_json(folder / "image_encoder" / "config.json")
        return _video_engine(unet, vae, scheduler, tower)
    towers = [
        read_json(folder / name / "config.json")
        for name in ("text_encoder", "text_encoder_2")
        if (index.get(name) or [None])[0] is not None
    ]
    make = _engine if "text_encoder_2" in index else _latent_diffusion
    return make(unet, vae, scheduler, towers)


def read_json(path: Path) -> dict[str, Any]:
    """A configuration of diffusers' kind.

    Raises:
        FileNotFoundError: it is not there.
        CheckpointError: it is no JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.parent} has no {path.name}: is it part of a pipeline's folder of diffusers?"
        )
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(contents, dict):
        raise CheckpointError(f"{path} holds a {type(contents).__name__}, not an object")
    return contents


def _first_stage(vae: Mapping[str, Any]) -> dict[str, Any]:
    params = autoencoder_params(vae)
    kind = "VQModel" if "n_embed" in params else "AutoencoderKL"
    return {
        "target": f"ldm.models.autoencoder.{kind}",
        "params": {**params, "lossconfig": {"target": "torch.nn.Identity"}},
    }


def _schedule(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    kind = scheduler.get("beta_schedule", "linear")
    if kind not in SCHEDULES or scheduler.get("trained_betas") is not None:
        raise ValueError(
            f"a scheduler with beta_schedule={kind!r} or betas of its own: ours have {', '.join(SCHEDULES)}"
        )
    return {
        "beta_schedule": SCHEDULES[kind], "linear_start": scheduler["beta_start"], "linear_end": scheduler["beta_end"],
        "timesteps": scheduler.get("num_train_timesteps", 1000),
    }  # fmt: skip


def _latent_diffusion(
    unet: Mapping[str, Any],
    vae: Mapping[str, Any],
    scheduler: Mapping[str, Any],
    towers: list[dict[str, Any]],
) -> dict[str, Any]:
    """Stable Diffusion 1 and 2: a quick GELU says that the text encoder is OpenAI's, a slow one that it is open_clip's."""
    if len(towers) != 1:
        raise ValueError(f"a pipeline with {len(towers)} text encoders; Stable Diffusion 1 and 2 have one")
    params = unet_params(unet)
    extra = params["in_channels"] - params["out_channels"]
    channels = vae["latent_channels"]
    if extra not in (0, channels + 1) or "num_classes" in params:
        raise ValueError(
            f"a network of {params['in_channels']} channels for latents of {channels}{', with class embeddings' * ('num_classes' in params)}: "
            "a folder tells the whole of text-to-image and inpainting models only; name the configuration of others, such as "
            "configs/stable-diffusion/v2-midas-inference.yaml"
        )
    return {
        "target": "ldm.models.diffusion.ddpm." + ("LatentInpaintDiffusion" if extra == channels + 1 else "LatentDiffusion"),
        "params": {
            "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": params},
            "first_stage_config": _first_stage(vae), "cond_stage_config": _condition(towers[0]),
            "conditioning_key": "hybrid" if extra else "crossattn", "parameterization": PREDICTIONS[scheduler.get("prediction_type", "epsilon")],
            "first_stage_key": "jpg", "cond_stage_key": "txt", "image_size": params["image_size"], "channels": channels,
            "scale_factor": vae.get("scaling_factor", 0.18215), "use_ema": False, **_schedule(scheduler),
            **({"zero_terminal_snr": True} if scheduler.get("rescale_betas_zero_snr") else {}),
            **({"finetune_keys": None} if extra == channels + 1 else {}),
        },
    }  # fmt: skip


def _condition(tower: Mapping[str, Any]) -> dict[str, Any]:
    if tower.get("hidden_act", "quick_gelu") == "quick_gelu":
        return {"target": f"{ENCODERS}.FrozenCLIPEmbedder", "params": {"version": _clip_sizes(tower)}}
    # the last layer, which Stable Diffusion 2 does not use, is not in the folder
    whole = {**tower, "num_hidden_layers": tower["num_hidden_layers"] + 1}
    params = {"arch": openclip_architecture(whole), "version": None, "layer": "penultimate"}
    return {"target": f"{ENCODERS}.FrozenOpenCLIPEmbedder", "params": params}


def _clip_sizes(tower: Mapping[str, Any]) -> dict[str, Any]:
    sizes = {f.name: tower[f.name] for f in fields(CLIPTextConfig) if f.name in tower}
    # published files say 2, which transformers reads as "the highest id of a text"
    return sizes | ({"eos_token_id": None} if sizes.get("eos_token_id") == 2 else {})


def _engine(
    unet: Mapping[str, Any],
    vae: Mapping[str, Any],
    scheduler: Mapping[str, Any],
    towers: list[dict[str, Any]],
) -> dict[str, Any]:
    """SDXL, its base with two text encoders or its refiner with the second only."""
    schedule = _schedule(scheduler)
    if schedule.pop("beta_schedule") != "linear":
        raise ValueError(
            "a pipeline of SDXL's kind with beta_schedule='linear': ours have 'scaled_linear' there"
        )
    kind = PREDICTIONS[scheduler.get("prediction_type", "epsilon")]
    if kind not in SCALINGS or scheduler.get("rescale_betas_zero_snr"):
        raise ValueError(
            f"a pipeline of SDXL's kind that predicts {kind} with rescale_betas_zero_snr={scheduler.get('rescale_betas_zero_snr', False)}: "
            f"our engine predicts {' or '.join(SCALINGS)}, down from a level above 0"
        )
    params = {
        k: v
        for k, v in unet_params(unet).items()
        if k not in ("image_size", "legacy", "use_spatial_transformer")
    }
    steps = schedule.pop("timesteps")
    denoiser = {
        "num_idx": steps, "scaling_config": {"target": f"{ENGINE}.denoiser_scaling.{SCALINGS[kind]}"},
        "discretization_config": {
            "target": f"{ENGINE}.discretizer.LegacyDDPMDiscretization", "params": {**schedule, "num_timesteps": steps},
        },
    }  # fmt: skip
    return {
        "target": "sgm.models.diffusion.DiffusionEngine",
        "params": {
            "scale_factor": vae.get("scaling_factor", 0.13025), "disable_first_stage_autocast": True,
            "denoiser_config": {"target": f"{ENGINE}.denoiser.DiscreteDenoiser", "params": denoiser},
            "network_config": {"target": f"{ENGINE}.openaimodel.UNetModel", "params": params},
            "conditioner_config": {"target": "sgm.modules.GeneralConditioner", "params": {"emb_models": _embedders(unet, towers)}},
            "first_stage_config": _first_stage(vae),
        },
    }  # fmt: skip


def _embedders(unet: Mapping[str, Any], towers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    *small, big = towers
    texts: list[tuple[str, dict[str, Any]]] = [
        (
            "FrozenCLIPEmbedder",
            {"version": _clip_sizes(t), "layer": "hidden", "layer_idx": t["num_hidden_layers"] - 1},
        )
        for t in small
    ]
    sizes = {"arch": openclip_architecture(big), "version": None, "layer": "penultimate"}
    texts.append(("FrozenOpenCLIPEmbedder2", {**sizes, "always_return_pooled": True, "legacy": False}))
    width = unet["addition_time_embed_dim"]
    count = (unet["projection_class_embeddings_input_dim"] - big["projection_dim"]) // width
    if count not in LAST_SIZE:
        raise ValueError(f"a UNet that takes {count} numbers beside the text; SDXL's take 6, its refiner's 5")
    embedders = [
        {"input_key": "txt", "target": f"{EMBEDDERS}.{name}", "params": params} for name, params in texts
    ]
    embedders += [
        {"input_key": key, "target": f"{EMBEDDERS}.ConcatTimestepEmbedderND", "params": {"outdim": width}}
        for key in (*SIZES, LAST_SIZE[count])
    ]
    return [{"is_trainable": False, **e} for e in embedders]


def _video_engine(
    unet: Mapping[str, Any],
    vae: Mapping[str, Any],
    scheduler: Mapping[str, Any],
    tower: Mapping[str, Any],
) -> dict[str, Any]:
    """Stable Video Diffusion, with the decoder of clips or with that of pictures."""
    if (told := scheduler.get("timestep_type", "discrete")) != "continuous":
        raise ValueError(
            f"a pipeline of video with timestep_type={told!r}: ours are told a continuous noise level"
        )
    over_frames = vae.get("_class_name", DECODER) == DECODER
    mirror = [t.replace("DownEncoder", "UpDecoder") for t in reversed(vae["down_block_types"])]
    params = autoencoder_params({"up_block_types": mirror, **vae})
    params |= {"lossconfig": {"target": "torch.nn.Identity"}}
    return {
        "target": "sgm.models.diffusion.DiffusionEngine",
        "params": {
            "scale_factor": vae.get("scaling_factor", 0.18215), "disable_first_stage_autocast": True,
            "denoiser_config": {
                "target": f"{ENGINE}.denoiser.Denoiser",
                "params": {"scaling_config": {"target": f"{ENGINE}.denoiser_scaling.VScalingWithEDMcNoise"}},
            },
            "network_config": {"target": f"{ENGINE}.video_model.VideoUNet", "params": video_unet_params(unet)},
            "conditioner_config": {"target": "sgm.modules.GeneralConditioner", "params": {"emb_models": _video_embedders(unet, params, tower)}},
            "first_stage_config": _decoder_of_clips(params["ddconfig"]) if over_frames
            else {"target": "sgm.models.autoencoder.AutoencoderKL", "params": params},
        },
    }  # fmt: skip


def _decoder_of_clips(ddconfig: Mapping[str, Any]) -> dict[str, Any]:
    half = "sgm.modules.diffusionmodules.model.Encoder", "sgm.modules.autoencoding.temporal_ae.VideoDecoder"
    return {
        "target": "sgm.models.autoencoder.AutoencodingEngine",
        "params": {
            "loss_config": {"target": "torch.nn.Identity"},
            "regularizer_config": {"target": "sgm.modules.autoencoding.regularizers.DiagonalGaussianRegularizer"},
            "encoder_config": {"target": half[0], "params": dict(ddconfig)},
            "decoder_config": {"target": half[1], "params": {**ddconfig, "video_kernel_size": KERNEL}},
        },
    }  # fmt: skip


def _video_embedders(
    unet: Mapping[str, Any], autoencoder: Mapping[str, Any], tower: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The picture as a vector, frames a second, motion, the picture's latents, and the noise on it."""
    clip = {
        "target": f"{EMBEDDERS}.FrozenOpenCLIPImageEmbedder",
        "params": {"arch": picture_architecture(tower), "version": None},
    }
    one = {"n_cond_frames": 1, "n_copies": 1}
    encoder = {"target": "sgm.models.autoencoder.AutoencoderKLModeOnly", "params": dict(autoencoder)}
    numbers = [
        {"input_key": key, "target": f"{EMBEDDERS}.ConcatTimestepEmbedderND", "params": {"outdim": unet["addition_time_embed_dim"]}}
        for key in NUMBERS_OF_VIDEO
    ]  # fmt: skip
    vector = {
        "input_key": "cond_frames_without_noise", "target": f"{EMBEDDERS}.FrozenOpenCLIPImagePredictionEmbedder",
        "params": {**one, "open_clip_embedding_config": clip},
    }  # fmt: skip
    latents = {
        "input_key": "cond_frames", "target": f"{EMBEDDERS}.VideoPredictionEmbedderWithEncoder",
        "params": {**one, "disable_encoder_autocast": True, "is_ae": True, "encoder_config": encoder},
    }  # fmt: skip
    return [{"is_trainable": False, **e} for e in (vector, *numbers[:2], latents, numbers[2])]
