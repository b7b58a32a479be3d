"""The configuration of our model, read off the folder of a pipeline of diffusers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ldm.conversion.autoencoder import autoencoder_params
from ldm.conversion.text import openclip_architecture
from ldm.conversion.unet import unet_params
from ldm.modules.encoders.clip import CLIPTextConfig
from taming.checkpoint import CheckpointError

ENCODERS = "ldm.modules.encoders.modules"
EMBEDDERS = "sgm.modules.encoders.modules"
ENGINE = "sgm.modules.diffusionmodules"
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
SCHEDULES = {"scaled_linear": "linear", "linear": "sqrt_linear"}  # diffusers' names of a run of β, and ours
SIZES = ("original_size_as_tuple", "crop_coords_top_left")
LAST_SIZE = {6: "target_size_as_tuple", 5: "aesthetic_score"}  # by the count of numbers


def pipeline_model_config(folder: str | Path) -> dict[str, Any]:
    """`{"model": …}` for the folder of a Stable Diffusion 1, 2 or XL, or of an autoencoder.

    Raises:
        FileNotFoundError: a part's configuration is not there.
        CheckpointError: it cannot be read.
        ValueError: an option that our models do not have.
    """
    folder = Path(folder)
    if not (folder / "model_index.json").is_file() and (folder / "config.json").is_file():
        return {"model": _first_stage(read_json(folder / "config.json"))}
    index = read_json(folder / "model_index.json")
    unet = read_json(folder / "unet" / "config.json")
    vae = read_json(folder / "vae" / "config.json")
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    kind = scheduler.get("prediction_type", "epsilon")
    if kind not in PREDICTIONS:
        raise ValueError(f"prediction_type={kind!r} is unknown; our models have {', '.join(PREDICTIONS)}")
    towers = [
        read_json(folder / name / "config.json")
        for name in ("text_encoder", "text_encoder_2")
        if (index.get(name) or [None])[0] is not None
    ]
    make = _engine if "text_encoder_2" in index else _latent_diffusion
    return {"model": make(unet, vae, scheduler, towers)}


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
    return {
        "target": "ldm.models.diffusion.ddpm." + ("LatentInpaintDiffusion" if extra == channels + 1 else "LatentDiffusion"),
        "params": {
            "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": params},
            "first_stage_config": _first_stage(vae), "cond_stage_config": _condition(towers[0]),
            "conditioning_key": "hybrid" if extra else "crossattn", "parameterization": PREDICTIONS[scheduler.get("prediction_type", "epsilon")],
            "first_stage_key": "jpg", "cond_stage_key": "txt", "image_size": params["image_size"], "channels": channels,
            "scale_factor": vae.get("scaling_factor", 0.18215), "use_ema": False, **_schedule(scheduler),
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
    params = {
        k: v
        for k, v in unet_params(unet).items()
        if k not in ("image_size", "legacy", "use_spatial_transformer")
    }
    scaling = {"eps": "EpsScaling", "v": "VScaling"}[PREDICTIONS[scheduler.get("prediction_type", "epsilon")]]
    steps = schedule.pop("timesteps")
    denoiser = {
        "num_idx": steps, "scaling_config": {"target": f"{ENGINE}.denoiser_scaling.{scaling}"},
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
