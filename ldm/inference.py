"""What every sampling script shares: device and precision, prompts, models, samplers, and saving pictures."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from PIL import Image, PngImagePlugin
from torch import Tensor
from torchvision.utils import make_grid

from ldm.conversion import network_file, pipeline_model_config, read_pipeline
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.deis import DEISSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.flow import FlowSampler
from ldm.models.diffusion.plms import PLMSSampler
from ldm.models.diffusion.sampling_util import Noise
from ldm.models.diffusion.unipc import UniPCSampler
from ldm.models.diffusion.wrapper import CLASS_KEYS as CLASS_KEYS  # scripts take both from here
from ldm.models.diffusion.wrapper import TEXT_KEYS as TEXT_KEYS
from ldm.quantization import load_quantized, quantization_of
from ldm.recognition import predicts_v, published_config, recognise
from taming.checkpoint import (
    CheckpointError,
    Weights,
    build_empty,
    files_of,
    find_run,
    load_into,
    load_model_from_config,
    stream_into,
)
from taming.util import atomic_path, instantiate_from_config, nearest, sha256_hash

logger = logging.getLogger(__name__)

# the model that comes with the repository, text to pictures of 64x64 pixels, and the guidance that suits it
SHIPPED, SHIPPED_GUIDANCE = "models/emoji/text2img", 2.0
SAMPLERS = {
    "ddim": DDIMSampler, "plms": PLMSSampler, "dpm": DPMSolverSampler, "unipc": UniPCSampler, "deis": DEISSampler,
    "flow": FlowSampler,
}  # fmt: skip
MORE_PRECISION = "try --precision full, or --bf16"  # where numbers became infinite


class InferenceError(Exception):
    """A request that cannot be fulfilled; the message is all a user needs to see."""


def choose_device(name: str = "auto") -> torch.device:
    """The device by name; "auto" takes CUDA, then Apple's MPS, then the CPU.

    Raises:
        InferenceError: a device that this machine has not.
    """
    if name == "auto":
        return torch.device(
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = name.split(":")[0]
    if not available.get(kind, False):
        raise InferenceError(
            f"--device {name}: this machine has {', '.join(k for k, there in available.items() if there)}"
        )
    return torch.device(name)


@contextlib.contextmanager
def precision_scope(device: torch.device, precision: str = "autocast", bf16: bool = False) -> Iterator[None]:
    """Mixed precision: half on CUDA ("autocast"), bfloat16 anywhere (`bf16`), none otherwise ("full", or on a CPU)."""
    if bf16 or (precision == "autocast" and device.type == "cuda"):
        with torch.autocast(device.type, dtype=torch.bfloat16 if bf16 else torch.float16):
            yield
    else:
        yield


def read_prompts(prompt: str, path: str | None, batch_size: int, repeat: int = 1) -> list[list[str]]:
    """Batches of prompts: one prompt for a whole batch, or the lines of a file, each repeated.

    Raises:
        InferenceError: the file is missing or empty.
    """
    if path is None:
        return [[prompt] * batch_size]
    if not Path(path).is_file():
        raise InferenceError(f"--from-file {path}: there is no such file")
    lines = [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise InferenceError(f"--from-file {path} holds no prompts")
    prompts = [line for line in lines for _ in range(repeat)]
    return [prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size)]


def load_model(
    ckpt: str,
    config: str | None,
    device: torch.device,
    overrides: Sequence[str] = (),
    classes: Mapping[str, str] | None = None,
) -> tuple[Any, Path, Any]:
    """A model from a training run's folder, or from a checkpoint and its configuration.

    Args:
        ckpt: run folder, folder of runs, published model folder, weight file, or the folder of a pipeline of diffusers;
            `SHIPPED` is the model that comes with the repository.
        config: its configuration; if None, the one beside the checkpoint, or that of the published model that it is
            recognised as.
        device: where the model goes.
        overrides: `a.b=c` over the configuration.
        classes: what to build in the place of a configured `model.target`.

    Returns:
        The model in eval mode, the weight file, the configuration.

    Raises:
        InferenceError: something is missing; the message says what to pass.
    """
    if (Path(ckpt) / "model_index.json").is_file():
        return _load_pipeline(Path(ckpt), config, device, overrides, classes or {})
    try:
        path, found = find_run(ckpt)
        configs = [config] if config is not None else found
        twin = None
        if not configs:
            try:
                recognised = recognise(Weights(path))
            except CheckpointError as error:
                raise InferenceError(f"no configuration lies beside {path}: {error}") from error
            logger.info("%s is %s: %s", path, recognised.name, recognised.config)
            configs, twin = [published_config(recognised.config)], recognised.twin
    except FileNotFoundError as error:
        raise InferenceError(str(error)) from error
    merged = _merged(configs[0], overrides, classes or {})
    load = load_quantized if quantization_of(path) else load_model_from_config
    model: Any = load(merged, path, device)
    if twin is not None and predicts_v(model):
        logger.info("%s predicts v: %s", path, twin)
        merged = _merged(published_config(twin), overrides, classes or {})
        model = _rebuilt(model, merged, device)
    if ckpt == SHIPPED:
        model.text_guidance = SHIPPED_GUIDANCE  # of short calls that name none
    return model, path, merged


def _merged(config: str | Path, overrides: Sequence[str], classes: Mapping[str, str]) -> Any:
    if not Path(config).is_file():
        raise InferenceError(f"--config {config}: there is no such file")
    merged = OmegaConf.merge(OmegaConf.load(config), OmegaConf.from_dotlist(list(overrides)))
    # the checkpoint holds every part's weights, so none needs to be fetched from its own first source
    forget_starting_points(merged.model)
    merged.model.target = classes.get(merged.model.target, merged.model.target)
    return merged


def _rebuilt(model: Any, config: Any, device: torch.device) -> Any:
    """The model that another configuration describes, with the very weights of this one."""
    with build_empty():
        other: Any = instantiate_from_config(config.model)
    load_into(other, model.state_dict(), source="the model", assign=True)
    return other.to(device).eval()


def _load_pipeline(
    folder: Path,
    config: str | None,
    device: torch.device,
    overrides: Sequence[str],
    classes: Mapping[str, str],
) -> tuple[Any, Path, Any]:
    """A model from the folder of a pipeline of diffusers."""
    try:
        own = pipeline_model_config(folder) if config is None else OmegaConf.load(config)
        merged: Any = OmegaConf.merge(own, OmegaConf.from_dotlist(list(overrides)))
        merged.model.target = classes.get(merged.model.target, merged.model.target)
        model: Any = instantiate_from_config(merged.model)
        load_into(model, read_pipeline(model, folder), source=folder)
    except (FileNotFoundError, ValueError) as error:
        raise InferenceError(str(error)) from error
    return model.to(device).eval(), network_file(folder), merged


@dataclass
class Run:
    """A model with what is known of its training.

    Args:
        model: in eval mode.
        config: merged; every `ckpt_path` in it is cleared, unless it says where the weights are.
        folder: of the run.
        global_step: at which the checkpoint was saved, 0 if it does not say.
    """

    model: Any
    config: Any
    folder: Path
    global_step: int


def load_run(
    resume: str | None,
    bases: Sequence[str] = (),
    overrides: Sequence[str] = (),
    device: torch.device | str = "cpu",
    strict: bool = False,
    only_config: str | bool | None = None,
    ignore_base_data: bool = False,
) -> Run:
    """A model from its log folder, as the scripts of taming-transformers name it.

    Args:
        resume: run folder, or a checkpoint in it; None for a model with the weights that its configuration names.
        bases: further configurations, merged over those of the run.
        overrides: `a.b=c`, merged last.
        device: where the model goes.
        strict: refuse a checkpoint whose names are not exactly the model's.
        only_config: take this configuration and no other; True is the last of `bases`.
        ignore_base_data: drop the `data` sections of all files, to give one by `overrides`.

    Raises:
        InferenceError: something is missing; the message says what to pass.
    """
    path: Path | None = None
    found: list[Path] = []
    if resume:
        try:
            path, found = find_run(resume)
        except FileNotFoundError as error:
            raise InferenceError(f"--resume {resume}: {error}") from error
    files = [*map(str, found), *bases]
    if only_config:
        files = files[-1:] if only_config is True else [str(only_config)]
    if not files:
        raise InferenceError("no configuration: name a run with -r logs/<run>, or a file with -b")
    if missing := [f for f in files if not Path(f).is_file()]:
        raise InferenceError(f"there is no configuration {missing[0]}")
    parts: list[Any] = [OmegaConf.load(f) for f in files]
    if ignore_base_data:
        for part in parts:
            part.pop("data", None)
    config: Any = OmegaConf.merge(*parts, OmegaConf.from_dotlist(list(overrides)))
    if path is None:
        return Run(load_model_from_config(config, None, device), config, Path(files[-1]).parent, 0)
    forget_starting_points(config.model)
    weights = Weights(path)
    model = instantiate_from_config(config.model)
    stream_into(model, weights, device=device, strict=strict)
    folder = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    return Run(model.to(device).eval(), config, folder, int(weights.metadata.get("global_step", 0)))


def forget_starting_points(node: Any) -> None:
    """Clear every `ckpt_path` below a model's configuration: the full checkpoint overrides them all, already widened."""
    if OmegaConf.is_dict(node):
        if node.get("ckpt_path") is not None and {"concat_keys", "finetune_keys"} & node.keys():
            node["finetune_keys"] = None
        for key in node:
            if key == "ckpt_path":
                node[key] = None
            elif OmegaConf.is_config(node[key]):
                forget_starting_points(node[key])
    elif OmegaConf.is_list(node):
        for item in node:
            forget_starting_points(item)


def require_text(model: Any) -> None:
    """Refuse a model that is not conditioned on text.

    Raises:
        InferenceError: says what it is conditioned on.
    """
    key = getattr(model, "cond_stage_key", None)
    if key not in TEXT_KEYS:
        raise InferenceError(
            f"this {type(model).__name__} is not conditioned on text (cond_stage_key={key!r}), so it has no use for a prompt"
        )


def first_stage_factor(model: Any) -> int:
    """How many pixels' side one latent has."""
    return 2 ** int(getattr(model, "num_downs", 0))


def image_size(model: Any) -> tuple[int, int]:
    """Size of the images that a latent model was built for, and the factor of its first stage."""
    factor = first_stage_factor(model)
    return int(model.image_size) * factor, factor


def latent_shape(
    model: Any,
    height: int | None = None,
    width: int | None = None,
    channels: int | None = None,
    factor: int | None = None,
) -> tuple[int, int, int]:
    """Shape (c, h, w) of the latents of an image; what is None is the model's own.

    Args:
        model: a latent model.
        height, width: of the image, in pixels.
        channels: of the latents.
        factor: of the first stage.

    Raises:
        InferenceError: a size that the first stage cannot make.
    """
    size, own_factor = image_size(model)
    factor = factor or own_factor
    height, width = height or size, width or size
    if height % factor or width % factor:
        raise InferenceError(
            f"an image of {width}x{height} pixels: width and height must be multiples of {factor}, the factor of the first stage"
        )
    return channels or model.channels, height // factor, width // factor


def make_sampler(model: Any, name: str | None = None) -> tuple[str, Any]:
    """A sampler for a model by name, with that name; None takes "flow" for rectified flows and "ddim" for the others.

    Raises:
        InferenceError: unknown name.
        ValueError: a sampler for models of the other kind.
    """
    name = name or ("flow" if model.parameterization == "flow" else "ddim")
    if name not in SAMPLERS:
        raise InferenceError(f"there is no sampler {name!r}. {nearest(name, SAMPLERS)}")
    return name, SAMPLERS[name](model)


def file_hash(path: str | Path) -> str:
    """The first ten digits of a file's SHA-256, the usual way to name a checkpoint; of several files, those of their sums' own."""
    sums = [sha256_hash(file) for file in files_of(path)]
    return (sums[0] if len(sums) == 1 else hashlib.sha256("".join(sums).encode()).hexdigest())[:10]


# ---------------------------------------------------------------------------------------------------------- sampling


@torch.no_grad()
def sample_images(
    model: Any,
    sampler: Any,
    steps: int,
    batch_size: int,
    shape: Sequence[int],
    conditioning: Any = None,
    **options: Any,
) -> Tensor:
    """Images under a condition.

    Args:
        model: a latent model.
        sampler: one of `SAMPLERS`, made for the model.
        steps: of the sampler.
        batch_size: images.
        shape: of one latent, (c, h, w).
        conditioning: encoded, see `LatentSampler.sample`; so are the options.

    Returns:
        (b, 3, H, W) in [0, 1].

    Raises:
        FloatingPointError: the latents became infinite or undefined.
    """
    samples, _ = sampler.sample(
        S=steps, conditioning=conditioning, batch_size=batch_size, shape=list(shape), **options
    )
    return decode_images(model, samples)


def decode_images(model: Any, latents: Tensor) -> Tensor:
    """Latents → images (b, 3, H, W) in [0, 1].

    Raises:
        FloatingPointError: the latents are infinite or undefined.
    """
    if not torch.isfinite(latents).all():
        raise FloatingPointError("the latents became infinite or undefined")
    images = model.decode_first_stage(latents).float()
    return torch.clamp((images + 1.0) / 2.0, min=0.0, max=1.0)


def encoded_texts(model: Any, prompts: Sequence[str], negative: str, guided: bool) -> tuple[Any, Any]:
    """The condition of prompts, and what guidance leads away from, if there is guidance. Equal texts are encoded once."""
    uncond = _encoded(model, [negative] * len(prompts)) if guided else None
    return _encoded(model, prompts), uncond


def _encoded(model: Any, texts: Sequence[str]) -> Any:
    place = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    made, rows = model.get_learned_conditioning(list(place)), [place[text] for text in texts]
    return [part[rows] for part in made] if isinstance(made, list) else made[rows]


@torch.no_grad()
def sample_text(
    model: Any,
    sampler: Any,
    prompts: Sequence[str],
    steps: int,
    shape: Sequence[int],
    scale: float = 7.5,
    eta: float = 0.0,
    x_T: Tensor | None = None,
    negative_prompt: str = "",
    generator: Noise = None,
    verbose: bool = True,
    guidance_rescale: float = 0.0,
    time_spacing: str = "uniform",
) -> Tensor:
    """Images for prompts.

    Args:
        model: conditioned on text.
        sampler: one of `SAMPLERS`, made for the model.
        prompts: b texts.
        steps: of the sampler.
        shape: of one latent, (c, h, w).
        scale: of classifier-free guidance.
        eta: of DDIM.
        x_T: latents (b, c, h, w) to start from.
        negative_prompt: what guidance leads away from.
        generator: source of the noise, or one for each image; torch's global one if None.
        verbose: show progress.
        guidance_rescale, time_spacing: see `LatentSampler.sample`.

    Returns:
        (b, 3, H, W) in [0, 1].

    Raises:
        InferenceError: the latents became infinite or undefined.
    """
    c, uc = encoded_texts(model, prompts, negative_prompt, scale != 1.0)
    try:
        return sample_images(
            model, sampler, steps, len(prompts), shape, c, verbose=verbose, x_T=x_T, eta=eta,
            unconditional_guidance_scale=scale, unconditional_conditioning=uc, generator=generator,
            guidance_rescale=guidance_rescale, time_spacing=time_spacing,
        )  # fmt: skip
    except FloatingPointError as error:
        raise InferenceError(f"{error}; {MORE_PRECISION}") from error


# ------------------------------------------------------------------------------------------------------------ saving


def to_image(pixels: Tensor) -> Image.Image:
    """(3, h, w) in [0, 1] → an 8-bit picture (values are cut, not rounded, as published)."""
    return Image.fromarray((255.0 * pixels.permute(1, 2, 0).cpu().float().numpy()).astype("uint8"))


def save_png(image: Image.Image, path: Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Write a PNG, whole or not at all, with text entries that say how it was made."""
    info = PngImagePlugin.PngInfo()
    for key, value in (metadata or {}).items():
        info.add_itxt(key, str(value))
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def next_number(folder: Path, pattern: str) -> int:
    """One more than the highest number among a folder's files, at least their count: nothing is overwritten.

    Args:
        folder: where to look.
        pattern: regular expression with one group, the number.
    """
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    numbers = [int(m.group(1)) for n in names if (m := re.fullmatch(pattern, n))]
    return max([len(numbers), *(n + 1 for n in numbers)])


def save_grid(
    images: Sequence[Tensor], columns: int, path: Path, metadata: Mapping[str, Any] | None = None
) -> None:
    """All images (3, h, w) in [0, 1] in one picture."""
    save_png(to_image(make_grid(torch.stack(list(images)), nrow=columns)), path, metadata)
