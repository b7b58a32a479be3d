"""Sampling that begins with pictures: sizes, redrawing, filling in, and what the scripts for it do with their results."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm.inference import (
    MORE_PRECISION,
    TEXT_KEYS,
    InferenceError,
    decode_images,
    encoded_texts,
    file_hash,
    first_stage_factor,
    next_number,
    sample_images,
    save_grid,
    save_png,
    to_image,
)
from ldm.models.diffusion.conditioned import LatentInpaintDiffusion
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.latent import LatentDiffusion
from ldm.models.diffusion.sampling_util import Noise, draw, sources
from taming.data.images import EXTENSIONS, open_rgb, to_float

logger = logging.getLogger(__name__)

# makes the noise to begin with, from a shape (b, c, h, w); None leaves that to the sampler
Start = Callable[[Sequence[int]], Tensor] | None

# ------------------------------------------------------------------------------------------------------------ pictures


def require_diffusion(model: Any) -> None:
    """Refuse a model that does not denoise latents.

    Raises:
        InferenceError: says what it is.
    """
    if not isinstance(model, LatentDiffusion):
        raise InferenceError(f"this is a {type(model).__name__}; the script is for latent diffusion models")


def size_step(model: Any) -> int:
    """Pixels by which an image's sides may grow: those of one latent, times the network's own halvings."""
    network = model.model.diffusion_model
    return first_stage_factor(model) * getattr(network, "ds", 1) * getattr(network, "patch_size", 1)


def open_picture(path: str | Path, flag: str) -> Image.Image:
    """A picture file as RGB.

    Raises:
        InferenceError: there is none, or it cannot be read.
    """
    try:
        return open_rgb(path)
    except FileNotFoundError:
        raise InferenceError(f"{flag} {path}: there is no such file") from None
    except OSError as error:
        raise InferenceError(f"{flag} {error}") from error


def to_pixels(image: Image.Image) -> Tensor:
    """A picture as (1, 3, h, w) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(to_float(image).transpose(2, 0, 1)))[None]


def shrunk_to_step(image: Image.Image, step: int) -> Image.Image:
    """The picture with each side the next multiple of `step` below, by Lanczos filtering.

    Raises:
        InferenceError: a side is shorter than that.
    """
    size = (image.width // step * step, image.height // step * step)
    if 0 in size:
        raise InferenceError(
            f"a picture of {image.width}x{image.height} pixels is too small: this model takes multiples of {step}"
        )
    if size == image.size:
        return image
    logger.info("%dx%d pixels become %dx%d, multiples of %d", *image.size, *size, step)
    return image.resize(size, Image.Resampling.LANCZOS)


def padded_to_step(x: Tensor, step: int, least: int = 0) -> Tensor:
    """(b, c, h, w) with its last row and column repeated up to the next multiples of `step`, and to `least` pixels."""
    height, width = (max(side + -side % step, least) - side for side in x.shape[2:])
    return F.pad(x, (0, width, 0, height), mode="replicate")


def latents_of(model: Any, images: Tensor) -> Tensor:
    """Scaled latents of images (b, 3, h, w) in [-1, 1], drawn where the first stage gives a distribution."""
    return model.get_first_stage_encoding(model.encode_first_stage(images))


# -------------------------------------------------------------------------------------------------- redrawing, filling


@torch.no_grad()
def redraw(
    model: Any,
    latents: Tensor,
    cond: Any,
    uncond: Any = None,
    scale: float = 1.0,
    strength: float = 0.75,
    steps: int = 50,
    eta: float = 0.0,
    generator: Noise = None,
    verbose: bool = True,
    from_noise: bool = False,
) -> Tensor:
    """Images like others: latents are noised as far as `strength` says, and denoised by DDIM under a condition.

    Args:
        model: any latent diffusion model but a rectified flow.
        latents: of the images to begin with, (b, c, h, w).
        cond, uncond, scale: see `LatentSampler.guided`.
        strength: from 0, the images as they are, to 1, almost anything.
        steps: of the whole way; int(strength · steps) of them are walked.
        eta: of DDIM.
        generator: see `LatentSampler.sample`.
        verbose: show progress.
        from_noise: full strength begins with noise alone; all steps but one are walked at most.

    Returns:
        (b, 3, H, W) in [0, 1].

    Raises:
        InferenceError: a strength out of range, or a flow.
        FloatingPointError: the latents became infinite or undefined.

    Source: Meng et al. 2022 (SDEdit); Song et al. 2021 (DDIM), equation 12.
    """
    if not 0.0 <= strength <= 1.0:
        raise InferenceError(f"strength {strength} must lie between 0 (nothing changes) and 1 (everything)")
    if model.parameterization == "flow":
        raise InferenceError("pictures are redrawn by DDIM, which does not sample rectified flows")
    sampler, walked = DDIMSampler(model), min(int(strength * steps), steps - from_noise)
    sampler.make_schedule(steps, ddim_eta=eta, verbose=False)
    if walked:
        source = sources(generator, len(latents))
        noise = draw(latents.shape, latents.device, source)
        levels = torch.full((len(latents),), walked, device=latents.device)
        if not (from_noise and strength == 1.0):
            noise = sampler.stochastic_encode(latents, levels, noise=noise)
        latents = sampler.decode(
            noise, cond, walked, unconditional_guidance_scale=scale, unconditional_conditioning=uncond, generator=source,
            verbose=verbose,
        )  # fmt: skip
    return decode_images(model, latents)


@dataclass
class Filling:
    """What a sampler needs to fill in what a mask hides.

    Args:
        shape: of one latent.
        cond, uncond: the conditions, in the model's form.
        known: `x0` and `mask` for a model that knows nothing of masks, else nothing.
    """

    shape: tuple[int, ...]
    cond: Any
    uncond: Any = None
    known: dict[str, Tensor] = field(default_factory=dict)


def beside_texts(fixed: Mapping[str, Any], texts: tuple[Any, Any]) -> tuple[Any, Any]:
    """`encoded_texts`, each with what stays the same under guidance."""
    c, uc = texts
    return {**fixed, "c_crossattn": [c]}, None if uc is None else {**fixed, "c_crossattn": [uc]}


def _joined_filling(model: Any, images: Tensor, mask: Tensor, texts: Callable[[], Any]) -> Filling:
    """For `LatentInpaintDiffusion`: mask and masked picture beside the latents, and a text where it reads one."""
    if len(model.concat_keys) != 2:
        raise InferenceError(
            f"a mask and a masked picture are there to be joined, but the model wants concat_keys={list(model.concat_keys)}"
        )
    factor = first_stage_factor(model)
    size = (images.shape[2] // factor, images.shape[3] // factor)
    batch = {key: mask.movedim(1, -1) for key in model.concat_keys}
    batch[model.masked_image_key] = (images * (mask < 0.5)).movedim(1, -1)
    joined = model.concat_conditions(batch, images.new_empty(len(images), model.channels, *size))
    shape = (model.channels, *size)
    if model.model.conditioning_key == "concat":
        return Filling(shape, joined)
    return Filling(shape, *beside_texts(joined, texts()))


def _encoded_filling(model: Any, images: Tensor, mask: Tensor, texts: Callable[[], Any]) -> Filling:
    """For the published inpainting_big: the masked picture is the condition, black in [0, 1] where hidden; the mask in [-1, 1]."""
    c = model.get_learned_conditioning((1 - mask) * (images + 1.0) - 1.0)
    small = F.interpolate(mask * 2.0 - 1.0, size=c.shape[-2:])
    return Filling((model.channels, *c.shape[-2:]), torch.cat([c, small], dim=1))


def _masked_filling(model: Any, images: Tensor, mask: Tensor, texts: Callable[[], Any]) -> Filling:
    """For any other model: at every step, what is not hidden is put back, noised; a latent is kept if no pixel of it is hidden."""
    if model.model.conditioning_key is None:
        c = uc = None
    elif model.cond_stage_key in TEXT_KEYS and model.model.conditioning_key == "crossattn":
        c, uc = texts()
    else:
        raise InferenceError(
            f"pictures can be filled in by inpainting models, and by those conditioned on text or on nothing; this "
            f"{type(model).__name__} has cond_stage_key={model.cond_stage_key!r} and conditioning_key={model.model.conditioning_key!r}"
        )
    z = latents_of(model, images)
    return Filling(z.shape[1:], c, uc, {"x0": z, "mask": 1.0 - F.adaptive_max_pool2d(mask, z.shape[2:])})


def way_of_filling(model: Any) -> Callable[[Any, Tensor, Tensor, Callable[[], Any]], Filling]:
    """How this model fills pictures in."""
    if isinstance(model, LatentInpaintDiffusion):
        return _joined_filling
    return _encoded_filling if model.cond_stage_key == "masked_image" else _masked_filling


@torch.no_grad()
def fill_in(
    model: Any,
    sampler: Any,
    image: Tensor,
    mask: Tensor,
    steps: int = 50,
    batch_size: int = 1,
    prompt: str = "",
    negative_prompt: str = "",
    scale: float = 1.0,
    eta: float = 0.0,
    generator: Noise = None,
    verbose: bool = True,
    start: Start = None,
) -> Tensor:
    """A picture with what a mask hides drawn anew, and the rest as it was.

    Args:
        model: a latent diffusion model: an inpainting model, or one conditioned on text or on nothing.
        sampler: one of `SAMPLERS`, made for the model.
        image: (1, 3, h, w) in [-1, 1], of any size.
        mask: (1, 1, h, w), 1 where something is to be drawn, else 0.
        steps, eta: of the sampler.
        batch_size: how many to draw.
        prompt, negative_prompt, scale: for models that read a text; scale 1 is no guidance.
        generator, verbose: see `LatentSampler.sample`.
        start: see `Start`.

    Returns:
        (batch_size, 3, h, w) in [0, 1].

    Raises:
        InferenceError: a model that cannot do it.
        FloatingPointError: the latents became infinite or undefined.
    """
    step, (height, width) = size_step(model), image.shape[2:]
    wide, hidden = (
        padded_to_step(x.to(model.device), step).repeat(batch_size, 1, 1, 1) for x in (image, mask)
    )
    filling = way_of_filling(model)(
        model,
        wide,
        hidden,
        lambda: encoded_texts(model, [prompt] * batch_size, negative_prompt, scale != 1.0),
    )
    x_T = None if start is None else start((batch_size, *filling.shape)).to(wide)
    drawn = sample_images(
        model, sampler, steps, batch_size, filling.shape, filling.cond, eta=eta, verbose=verbose, generator=generator,
        unconditional_guidance_scale=scale, unconditional_conditioning=filling.uncond, x_T=x_T, **filling.known,
    )  # fmt: skip
    kept = ((wide.float() + 1.0) / 2.0).clamp(0.0, 1.0)
    return ((1.0 - hidden) * kept + hidden * drawn)[..., :height, :width]


def find_pairs(folder: str | Path) -> list[tuple[Path, Path]]:
    """Pictures and their masks: <name>.png (or another picture format) and <name>_mask.png, sorted.

    Raises:
        InferenceError: no folder, no mask in it, or a mask without a picture.
    """
    if not Path(folder).is_dir():
        raise InferenceError(f"--indir {folder}: there is no such folder")
    pairs = []
    for mask in sorted(Path(folder).glob("*_mask.png")):
        stem = mask.name.removesuffix("_mask.png")
        picture = next((p for e in EXTENSIONS if (p := mask.with_name(stem + e)).is_file()), None)
        if picture is None:
            raise InferenceError(f"{mask} has no picture beside it: {stem}.png is missing")
        pairs.append((picture, mask))
    if not pairs:
        raise InferenceError(
            f"--indir {folder} holds no mask: pictures are <name>.png, masks <name>_mask.png"
        )
    return pairs


def open_pair(picture: Path, mask: Path) -> tuple[Tensor, Tensor]:
    """A picture (1, 3, h, w) in [-1, 1] and its mask (1, 1, h, w): 1 from middle grey on, else 0.

    Raises:
        InferenceError: one of them cannot be read, or they differ in size.
    """
    image, grey = open_picture(picture, "--indir"), open_picture(mask, "--indir").convert("L")
    if image.size != grey.size:
        raise InferenceError(
            f"{mask} is {grey.width}x{grey.height}, its picture {image.width}x{image.height}; they must be of one size"
        )
    return to_pixels(image), torch.from_numpy(np.asarray(grey) >= 127.5).float()[None, None]


# -------------------------------------------------------------------------------------------------- results of scripts


@dataclass
class Finished:
    """What a script has made, and whether it was stopped."""

    folder: Path
    files: list[Path] = field(default_factory=list)
    stopped: bool = False

    @contextlib.contextmanager
    def until_stopped(self) -> Iterator[None]:
        """Ctrl-C within ends the block, not the program: what is finished is kept."""
        try:
            yield
        except KeyboardInterrupt:
            self.stopped = True
            logger.warning("Stopped; what is finished is kept.")

    def save(self, image: Image.Image, path: Path, details: Mapping[str, Any]) -> None:
        """Write a picture that says how it was made."""
        save_png(image, path, details)
        self.files.append(path)


class Gallery(Finished):
    """Numbered pictures below a folder's `samples/`, and a grid of all; nothing there is overwritten.

    Args:
        folder: made if it is not there.
        common: what all pictures say of themselves.
        columns: of the grid.
        singles, grid: what to write.
    """

    def __init__(
        self,
        folder: str | Path,
        common: Mapping[str, Any],
        columns: int,
        singles: bool = True,
        grid: bool = True,
    ) -> None:
        super().__init__(Path(folder))
        self.common, self.columns, self.singles, self.grid = common, columns, singles, grid
        self.images: list[Tensor] = []
        self.prompts: list[str] = []
        (self.folder / "samples").mkdir(parents=True, exist_ok=True)
        self.number = next_number(self.folder / "samples", r"(\d+)\.png")

    @property
    def count(self) -> int:
        """How many pictures there are so far."""
        return len(self.prompts)

    def add(self, image: Tensor, prompt: str, **own: Any) -> None:
        """Write a picture (3, h, w) in [0, 1]; `own` is what it alone says of itself."""
        details = {"prompt": prompt, "index": self.count, **self.common, **own}
        if self.grid:
            self.images.append(image.cpu())
        self.prompts.append(prompt)
        if self.singles:
            self.save(to_image(image), self.folder / "samples" / f"{self.number:05}.png", details)
            self.number += 1

    def close(self) -> None:
        """Write the grid of all pictures."""
        if self.images:
            number = next_number(self.folder, r"grid-(\d+)\.png")
            path = self.folder / f"grid-{number:04}.png"
            save_grid(self.images, self.columns, path, {"prompts": "\n".join(self.prompts), **self.common})
            self.files.append(path)


def described(checkpoint: Path, **details: Any) -> dict[str, Any]:
    """What pictures say of how they were made; what is None goes unsaid."""
    said = {
        **details, "checkpoint": checkpoint.name, "checkpoint_sha256": file_hash(checkpoint), "software": "latent-generative-models",
    }  # fmt: skip
    return {key: value for key, value in said.items() if value is not None}


def free_path(path: Path) -> Path:
    """The path, or <name>-0001, -0002, … where there is a file already."""
    number, free = 0, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.stem}-{number:04}{path.suffix}")
    return free


def report(work: Callable[[], Finished]) -> int:
    """Do a script's work and say what came of it; what a user can mend is one sentence. Returns the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        made = work()
    except FloatingPointError as error:
        print(f"error: {error}; {MORE_PRECISION}", file=sys.stderr)
        return 2
    except (InferenceError, ValueError, OSError) as error:
        # the library's ValueErrors (sizes, step counts, checkpoints, configurations) are written for users
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"{len(made.files)} files in {made.folder}"
        + (f", the last is {made.files[-1]}" if made.files else "")
    )
    return 130 if made.stopped else 0
