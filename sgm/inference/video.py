"""Image to video: SVD, which animates a picture, and SV3D, which walks around an object."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from ldm.inference import InferenceError, precision_scope
from sgm.inference.helpers import (
    BUILDERS,
    Builder,
    conditions,
    denoiser_of,
    get_batch,
    get_unique_embedder_keys_from_conditioner,
)
from taming.checkpoint import load_model_from_config

logger = logging.getLogger(__name__)

CONFIGS = "scripts/sampling/configs"
ZEROED = ("cond_frames", "cond_frames_without_noise")  # what the unconditional condition knows nothing of
REPEATED = ("crossattn", "concat")  # conditions that every frame gets
NUMBERS = ("fps", "fps_id", "motion_bucket_id", "cond_aug", "polars_rad", "azimuths_rad", "polar_rad", "azimuth_rad")  # fmt: skip


@dataclass(frozen=True)
class VideoModel:
    """A published model.

    Attributes:
        config: file name of the configuration.
        num_frames, num_steps: that it is sampled with.
        is_orbit: it walks around an object on white, and ends where it began.
        knows_camera: it is told where the camera is.
        cond_aug: noise on the picture.
        size: (width, height) that it was trained with.
    """

    config: str
    num_frames: int
    num_steps: int
    is_orbit: bool = False
    knows_camera: bool = False
    cond_aug: float = 0.02
    size: tuple[int, int] = (1024, 576)


def _orbit(config: str, knows_camera: bool) -> VideoModel:
    return VideoModel(config, 21, 50, True, knows_camera, 1e-5, (576, 576))


VIDEO_MODELS = {
    "svd": VideoModel("svd.yaml", 14, 25),
    "svd_xt": VideoModel("svd_xt.yaml", 25, 30),
    "svd_xt_1_1": VideoModel("svd_xt_1_1.yaml", 25, 30),
    "svd_image_decoder": VideoModel("svd_image_decoder.yaml", 14, 25),
    "svd_xt_image_decoder": VideoModel("svd_xt_image_decoder.yaml", 25, 30),
    "sv3d_u": _orbit("sv3d_u.yaml", False),
    "sv3d_p": _orbit("sv3d_p.yaml", True),
}


# --------------------------------------------------------------------------------------------------------------- models


def load_video_model(
    config: str | Path,
    device: torch.device,
    num_steps: int | None = None,
    num_frames: int | None = None,
    verbose: bool = False,
    ckpt: str | None = None,
) -> Any:
    """An engine from a configuration of `scripts/sampling/configs`, in eval mode.

    Args:
        config: file with a sampler.
        device: where the model goes.
        num_steps, num_frames: of the sampler and of its guider; those of the configuration if None.
        verbose: show the sampler's progress.
        ckpt: weights instead of those that the configuration names.

    Raises:
        InferenceError: the configuration or the weights are missing, or it has no sampler.
    """
    if not Path(config).is_file():
        raise InferenceError(f"there is no configuration {config}")
    loaded: Any = OmegaConf.load(config)
    params = loaded.model.params
    if "sampler_config" not in params:
        raise InferenceError(f"{config} has no model.params.sampler_config; take one of {CONFIGS}")
    if ckpt is not None:
        params.ckpt_path = ckpt
    if params.get("ckpt_path") is not None and not Path(params.ckpt_path).is_file():
        raise InferenceError(
            f"there are no weights {params.ckpt_path}; put them there, or name them with --ckpt"
        )
    sampler = params.sampler_config.setdefault("params", {})
    sampler.verbose = verbose
    if num_steps is not None:
        sampler.num_steps = num_steps
    if num_frames is not None and "guider_config" in sampler:
        sampler.guider_config.params.num_frames = num_frames
    return load_model_from_config(loaded, None, device)


def encode_in_chunks(model: Any, encoding_t: int | None) -> None:
    """Have the conditioner's encoders take so many frames at once."""
    for embedder in model.conditioner.modules():
        if hasattr(embedder, "en_and_decode_n_samples_a_time"):
            embedder.en_and_decode_n_samples_a_time = encoding_t


# ----------------------------------------------------------------------------------------------------------- conditions


def _per_frame(key: str) -> Builder:
    """A number for each frame, or one for all."""

    def build(values: Mapping[str, Any], shape: Sequence[int], device: Any) -> tuple[Tensor, Tensor]:
        numbers, count = torch.as_tensor(values[key], device=device).reshape(-1), math.prod(shape)
        if numbers.is_floating_point():
            numbers = numbers.float()
        if len(numbers) not in (1, count):
            raise InferenceError(f"{key} holds {len(numbers)} numbers; one, or {count} are needed")
        numbers = numbers.expand(count)
        return numbers, numbers.clone()

    return build


VIDEO_BUILDERS: dict[str, Builder] = {**BUILDERS, **{key: _per_frame(key) for key in NUMBERS}}


def numbers_for(flag: str, given: float | Sequence[float], count: int) -> list[float]:
    """A number for each of `count` frames or views, from one or from as many.

    Raises:
        InferenceError: another number of them.
    """
    numbers = [float(given)] if isinstance(given, int | float) else [float(x) for x in given]
    if len(numbers) not in (1, count):
        raise InferenceError(f"{flag} holds {len(numbers)} numbers; one, or {count} are needed")
    return numbers if len(numbers) == count else numbers * count


def orbit(
    num_frames: int, elevations_deg: float | Sequence[float], azimuths_deg: Sequence[float] | None
) -> dict[str, list[float]]:
    """Where the camera is: polar angles, and azimuths relative to that of the last frame, in radians.

    Args:
        num_frames: of the video.
        elevations_deg: one, or one for each frame.
        azimuths_deg: for each frame; evenly once around if None.

    Raises:
        InferenceError: another number of them.
    """
    if azimuths_deg is None:
        azimuths_deg = [360.0 * (i + 1) / num_frames % 360 for i in range(num_frames)]
    elevations = numbers_for("elevations_deg", elevations_deg, num_frames)
    azimuths = numbers_for("azimuths_deg", azimuths_deg, num_frames)
    return {
        "polars_rad": [math.radians(90 - e) for e in elevations],
        "azimuths_rad": [math.radians((a - azimuths[-1]) % 360) for a in azimuths],
    }


def frame_values(picture: Tensor, cond_aug: float, fps_id: int, motion_bucket_id: int) -> dict[str, Any]:
    """What the conditioner is told of the picture to begin with, (1, 3, h, w) in [-1, 1]; it is noised a little here."""
    return {
        "cond_frames_without_noise": picture,
        "cond_frames": picture + cond_aug * torch.randn_like(picture),
        "cond_aug": cond_aug, "fps_id": fps_id, "fps": fps_id, "motion_bucket_id": motion_bucket_id,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- sampling


def video_conditions(
    model: Any, values: Mapping[str, Any], num_frames: int, zeroed: Sequence[str] = ZEROED
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The condition and the unconditional one of a clip of so many frames (or frames × views).

    Raises:
        KeyError: a value that the conditioner reads is missing.
    """
    keys = get_unique_embedder_keys_from_conditioner(model.conditioner)
    batch, batch_uc = get_batch(keys, values, [1, num_frames], model.device, VIDEO_BUILDERS)
    return conditions(model, batch, batch_uc, num_frames, [key for key in zeroed if key in keys])


def for_every_frame(cond: Mapping[str, Tensor], num_frames: int) -> dict[str, Tensor]:
    """A condition whose picture (1, ...) is repeated for all frames."""
    return {k: v.repeat_interleave(num_frames, dim=0) if k in REPEATED else v for k, v in cond.items()}


def clip_denoiser(model: Any, num_frames: int) -> Any:
    """A model as a function (x, σ, condition) → x_0 over clips of so many frames, "(b t)"."""

    def denoise(x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        indicator = x.new_zeros(len(x) // num_frames, num_frames)  # none of the frames is a lone image
        run = denoiser_of(model, num_video_frames=num_frames, image_only_indicator=indicator)
        return run(x, sigma, cond)

    return denoise


def start_noise(c: Mapping[str, Tensor], num_frames: int) -> Tensor:
    """Noise of the latents' shape, which is that of the picture's latents in the condition.

    Drawn on the CPU, so that a seed gives the same video on every device.
    """
    picture = c["concat"]
    return torch.randn(num_frames, *picture.shape[1:]).to(picture.device)


def decode_in_chunks(model: Any, latents: Tensor, decoding_t: int | None) -> Tensor:
    """Latents (t, c, h, w) → images (t, 3, H, W) in [-1, 1] on the CPU, so many at once: memory does not grow with their number.

    Raises:
        InferenceError: fewer than one at once.
    """
    if decoding_t is not None and decoding_t < 1:
        raise InferenceError(f"decoding_t={decoding_t} must be 1 or more")
    parts = latents.split(decoding_t or len(latents))
    return torch.cat([model.decode_first_stage(part).float().cpu() for part in parts])


@torch.no_grad()
def animate(
    model: Any,
    values: Mapping[str, Any],
    num_frames: int,
    decoding_t: int | None = None,
    is_orbit: bool = False,
) -> Tensor:
    """A video that begins with a picture.

    Args:
        model: an engine with a sampler, see `load_video_model`.
        values: what the conditioner reads, see `frame_values` and `orbit`.
        num_frames: of the video.
        decoding_t: frames to decode at once; all if None.
        is_orbit: the last frame is the picture itself.

    Returns:
        (num_frames, 3, h, w) in [0, 1], on the CPU.

    Source: Blattmann et al. 2023 (Stable Video Diffusion); Voleti et al. 2024 (SV3D).
    """
    with precision_scope(model.device), model.ema_scope():
        c, uc = (for_every_frame(cond, num_frames) for cond in video_conditions(model, values, num_frames))
        latents = model.sampler(clip_denoiser(model, num_frames), start_noise(c, num_frames), cond=c, uc=uc)
        frames = decode_in_chunks(model, latents, decoding_t)
    if is_orbit:
        frames[-1:] = values["cond_frames_without_noise"].cpu()
    return ((frames + 1.0) / 2.0).clamp(0.0, 1.0)


def warn_of_untrained(spec: VideoModel, picture: Tensor, motion_bucket_id: int, fps_id: int) -> None:
    """Say which of the values the model never saw in training."""
    height, width = picture.shape[-2:]
    doubts = (
        ((width, height) != spec.size, f"a picture of {width}x{height} pixels; the model was trained with {spec.size[0]}x{spec.size[1]}"),
        (not 0 <= motion_bucket_id <= 255, f"motion_bucket_id={motion_bucket_id}; values go from 0 to 255"),
        (not 5 <= fps_id <= 30, f"fps_id={fps_id}; values from 5 to 30 work"),
    )  # fmt: skip
    for is_so, message in doubts:
        if is_so:
            logger.warning("%s: the video may not be good", message)
