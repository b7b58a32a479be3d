"""Folders of diffusers' pipelines ⇄ whole models.

write_pipeline(model, "folder")                            # StableDiffusionPipeline.from_pretrained("folder") reads it
load_into(model, read_pipeline(model, "folder"))           # and back, bit for bit
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.conversion.autoencoder import autoencoder_module_config
from ldm.conversion.checkpoint import Network, from_diffusers, is_openclip, networks, to_diffusers
from ldm.conversion.picture import feature_extractor_config, picture_config
from ldm.conversion.precision import cast
from ldm.conversion.schedule import scheduler_config
from ldm.conversion.text import clip_config, openclip_config
from ldm.conversion.unet import TIME_IDS_WIDTH, looks_at_frames, unet_config
from ldm.conversion.video import (
    VideoFirstStage,
    require_convertible,
    video_model_index,
    video_unet_config,
    video_vae_config,
)
from ldm.modules.encoders.clip import CLIPTextModel
from ldm.modules.encoders.tokenizers import clip_tokenizer
from taming.checkpoint import load_state_dict, save_safetensors
from taming.checkpoint_files import locate
from taming.util import atomic_path

logger = logging.getLogger(__name__)

# weights that diffusers' networks have no place for; its loaders do not look at this file
REST = "others.safetensors"
WEIGHTS = {"unet": "diffusion_pytorch_model.safetensors", "vae": "diffusion_pytorch_model.safetensors"}
TRANSFORMER_WEIGHTS = "model.safetensors"


def pipeline_options(model: nn.Module) -> dict[str, dict[str, Any]]:
    """How the parts of a model are converted for a pipeline: options of `network_table`, by part.

    open_clip's text tower goes without its last layer where the encoder stops before it, as diffusers ships SD 2, and
    whole and with its projection where its pooled vector is used, as in SDXL.
    """
    encoders = {path: module for path, module in model.named_modules() if hasattr(module, "layer")}
    options: dict[str, dict[str, Any]] = {}
    for part, path, module, _ in networks(model):
        if part.startswith("text_encoder") and is_openclip(module):
            encoder: Any = encoders.get(path.rpartition(".")[0])
            pooled = bool(getattr(encoder, "return_pooled", False))
            skipped = int(not pooled and getattr(encoder, "layer", "last") == "penultimate")
            options[part] = {"skip_last": skipped, "projection": pooled}
    return options


def write_pipeline(
    model: Any,
    folder: str | Path,
    state: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> list[str]:
    """Write a model as the folder of a pipeline of diffusers.

    Args:
        model: a `LatentDiffusion`, a model of `sgm`'s make, or a first stage; parameters may be on the meta device if
            `state` is given.
        folder: is made; files in it are replaced.
        state: the weights; the model's own if None.
        dtype: of the floating-point weights, as they are if None.

    Returns:
        The parts that were written.

    Raises:
        CheckpointError: names are missing or left over.
        ValueError: something that diffusers has no counterpart of.
    """
    if getattr(model, "noise_augmentor", None) is not None:
        raise ValueError(
            f"{type(model).__name__}: diffusers' pipeline of unCLIP wants an image encoder and a normaliser that are not converted"
        )
    folder, options = Path(folder), pipeline_options(model)
    state = model.state_dict() if state is None else state
    found = {n.part: n for n in networks(model)}
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no UNet, first stage or text encoder that diffusers knows"
        )
    if is_video(found):
        _require_whole_video(model, found)
    parts = to_diffusers(model, options, state)
    alone = set(found) == {"vae"} and found["vae"].path == ""
    renamed = _published_parts(model, found)
    # all of them before the first file is written: what diffusers does not have shall not leave half a folder
    configs = {part: _part_config(model, network, options.get(part, {})) for part, network in found.items()}
    others = {} if alone else _pipeline_configs(model, found, renamed)
    for part, network in found.items():
        place = folder if alone else folder / renamed.get(part, part)
        _write_part(place, network, parts[part], configs[part], dtype)
    for name, config in others.items():
        _write_json(folder / name, config)
    if not alone:
        _write_tokenizers(folder, model, found, renamed)
    back = from_diffusers(model, parts, options)
    rest = {k: v for k, v in state.items() if k not in back}
    if rest:
        save_safetensors(rest, folder / REST, {"of": type(model).__name__})
    return list(parts)


def read_pipeline(model: nn.Module, folder: str | Path) -> dict[str, Tensor]:
    """The weights of a pipeline's folder under the names of a model, for `taming.checkpoint.load_into`.

    Args:
        model: of the configuration that the folder belongs to, see `pipeline_model_config`.
        folder: of a pipeline, or of an autoencoder alone.

    Raises:
        CheckpointError: weights do not fit the model.
        FileNotFoundError: a part is not there.
    """
    folder = Path(folder)
    found = {n.part: n for n in networks(model)}
    renamed = _published_parts(model, found)
    places = {part: folder / renamed.get(part, part) for part in found}
    if set(found) == {"vae"} and found["vae"].path == "":
        places = {"vae": folder}
    parts = {part: load_state_dict(place) for part, place in places.items()}
    options = pipeline_options(model)
    for part, option in options.items():  # a folder of other hands may hold all layers
        if option["skip_last"] and "text_projection.weight" in parts[part]:
            parts[part].pop("text_projection.weight")
    state = from_diffusers(model, parts, options)
    return state | (load_state_dict(folder / REST) if (folder / REST).is_file() else {})


def is_video(found: Mapping[str, Network]) -> bool:
    """Whether the networks are those of a model of video."""
    return "unet" in found and looks_at_frames(found["unet"].module)


def _require_whole_video(model: Any, found: Mapping[str, Network]) -> None:
    if lost := [part for part in ("vae", "image_encoder") if part not in found]:
        raise ValueError(
            f"{type(model).__name__} is a model of video without {' and '.join(lost)}, which diffusers' pipeline of video wants"
        )
    first_stage = found["vae"].module
    require_convertible(
        found["unet"].module, first_stage if isinstance(first_stage, VideoFirstStage) else None
    )


def network_file(folder: str | Path) -> Path:
    """The file of a pipeline's network, or its index."""
    return locate(Path(folder) / "unet")


def _pipeline_configs(
    model: Any, found: Mapping[str, Network], renamed: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """The files of a pipeline's folder that stand beside those of its networks."""
    pictures = {"feature_extractor/preprocessor_config.json": feature_extractor_config()}
    return {
        "scheduler/scheduler_config.json": scheduler_config(model),
        **(pictures if "image_encoder" in found else {}),
        "model_index.json": model_index(model, found, renamed),
    }


def _write_part(
    folder: Path,
    network: Network,
    weights: Mapping[str, Tensor],
    config: Any,
    dtype: torch.dtype | None,
) -> None:
    save_safetensors(cast(weights, dtype), folder / WEIGHTS.get(network.part, TRANSFORMER_WEIGHTS))
    _write_json(folder / "config.json", config)


def _write_json(path: Path, contents: Mapping[str, Any]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(contents, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _published_parts(model: Any, found: Mapping[str, Network]) -> dict[str, str]:
    """SDXL's refiner has the second text encoder of its base only, and calls it so."""
    texts = [part for part in found if part.startswith("text_encoder")]
    alone = len(texts) == 1 and pipeline_options(model).get("text_encoder", {}).get("projection")
    return {"text_encoder": "text_encoder_2"} if alone else {}


# ----------------------------------------------------------------------------------------------------- configurations


def _part_config(model: Any, network: Network, options: Mapping[str, Any]) -> dict[str, Any]:
    module: Any = network.module
    if network.part == "unet" and looks_at_frames(module):
        return video_unet_config(module, _size_embedder_width(model))
    if network.part == "unet":
        config = unet_config(module, time_ids_width=_size_embedder_width(model))
        if (size := getattr(model, "image_size", None)) is not None:
            config["sample_size"] = size
        return {"_class_name": "UNet2DConditionModel", **config}
    if isinstance(module, VideoFirstStage):
        return video_vae_config(module, float(model.scale_factor))
    if network.part == "vae":
        config = autoencoder_module_config(module, float(getattr(model, "scale_factor", 1.0)))
        return {"_class_name": "VQModel" if "num_vq_embeddings" in config else "AutoencoderKL", **config}
    if network.part == "image_encoder":
        return {
            "architectures": ["CLIPVisionModelWithProjection"],
            "model_type": "clip_vision_model",
            **picture_config(module),
        }
    if isinstance(module, CLIPTextModel):
        return {
            "architectures": ["CLIPTextModel"],
            "model_type": "clip_text_model",
            **clip_config(module),
            "pad_token_id": 1,
        }
    kind = "CLIPTextModelWithProjection" if options["projection"] else "CLIPTextModel"
    config = openclip_config(module, options["skip_last"])
    return {"architectures": [kind], "model_type": "clip_text_model", **config, "pad_token_id": 1}


def _size_embedder_width(model: Any) -> int:
    """Width of each of the numbers that SDXL's conditioner embeds."""
    embedders = getattr(getattr(model, "conditioner", None), "embedders", ())
    return next((int(e.outdim) for e in embedders if hasattr(e, "outdim")), TIME_IDS_WIDTH)


def _write_tokenizers(
    folder: Path, model: Any, found: Mapping[str, Network], renamed: Mapping[str, str]
) -> None:
    """CLIP's vocabulary beside each text encoder that uses it; without transformers there is none."""
    for part, network in found.items():
        if not part.startswith("text_encoder"):
            continue
        place = folder / renamed.get(part, part).replace("text_encoder", "tokenizer")
        module: Any = network.module
        try:
            own: Any = getattr(_owner(model, network), "tokenizer", None)
            clip = isinstance(module, CLIPTextModel)
            rows = module.text_model.embeddings.token_embedding if clip else module.token_embedding
            own = own if hasattr(own, "save_pretrained") else clip_tokenizer(len(rows.weight))
        except (ImportError, OSError, ValueError) as error:
            logger.warning("no %s was written (%s); give diffusers one", place.name, error)
            continue
        if not clip:
            own.pad_token = "!"  # open_clip pads with the id 0, which is this piece's
        own.model_max_length = len(
            module.text_model.embeddings.position_embedding.weight if clip else module.positional_embedding
        )
        own.save_pretrained(place)


def _owner(model: nn.Module, network: Network) -> nn.Module:
    return model.get_submodule(network.path.rpartition(".")[0])


def model_index(model: Any, found: Mapping[str, Network], renamed: Mapping[str, str]) -> dict[str, Any]:
    """`model_index.json`: the pipeline's class and those of its parts."""
    if is_video(found):
        return video_model_index(_part_config(model, found["vae"], {})["_class_name"])
    classes: dict[str, Any] = {"unet": ["diffusers", "UNet2DConditionModel"]}
    if "vae" in found:
        quantised = hasattr(found["vae"].module, "quantize")
        classes["vae"] = ["diffusers", "VQModel" if quantised else "AutoencoderKL"]
    options = pipeline_options(model)
    for part in found:
        if part.startswith("text_encoder"):
            kind = (
                "CLIPTextModelWithProjection" if options.get(part, {}).get("projection") else "CLIPTextModel"
            )
            place = renamed.get(part, part)
            classes[place] = ["transformers", kind]
            classes[place.replace("text_encoder", "tokenizer")] = ["transformers", "CLIPTokenizer"]
    classes["scheduler"] = ["diffusers", scheduler_config(model)["_class_name"]]
    kind, others = _pipeline_kind(found["unet"].module if "unet" in found else None, classes)
    return {"_class_name": kind, **classes, **others}


def _pipeline_kind(unet: Any, classes: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The pipeline's class, and its entries that no part fills."""
    absent = [None, None]
    if "text_encoder_2" in classes:
        if "text_encoder" in classes:
            return "StableDiffusionXLPipeline", {
                "force_zeros_for_empty_prompt": True, "feature_extractor": absent, "image_encoder": absent,
            }  # fmt: skip
        return "StableDiffusionXLImg2ImgPipeline", {
            "text_encoder": absent, "tokenizer": absent, "requires_aesthetics_score": True, "force_zeros_for_empty_prompt": False,
            "feature_extractor": absent, "image_encoder": absent,
        }  # fmt: skip
    if "text_encoder" not in classes:
        return "LDMPipeline", {}
    channels = 4 if unet is None else unet.in_channels - unet.out_channels
    if unet is not None and isinstance(unet.num_classes, int):
        low = classes["scheduler"]
        return "StableDiffusionUpscalePipeline", {
            "low_res_scheduler": ["diffusers", low[1]],
            "max_noise_level": 350,
        }
    checks = {"safety_checker": absent, "feature_extractor": absent, "requires_safety_checker": False}
    if channels == 5:
        return "StableDiffusionInpaintPipeline", {**checks, "image_encoder": absent}
    if channels == 1:
        return "StableDiffusionDepth2ImgPipeline", {"depth_estimator": absent, "feature_extractor": absent}
    return "StableDiffusionPipeline", {**checks, "image_encoder": absent}
