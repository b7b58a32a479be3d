"""What a model with another condition than text makes of held-out data: a picture, and figures where there is a truth.

    python scripts/evaluate_conditioned.py -r logs/<run> --outfile grid.png

The picture depends on what the run trains:

- classes: a row for each class, samples with guidance;
- inpainting: masked picture, result (its visible part put back), truth; PSNR of the hidden part, beside a fill with the
  mean colour of the visible part;
- super-resolution: small picture, bicubic, result, truth; PSNR and SSIM (Wang et al. 2004) of result and bicubic, and of
  the first stage alone: given the small picture with its pixels repeated, and given the truth, which is the limit.

Takes the validation section of the run's data, or the training section where there is none, and the averaged weights where
the run kept an average.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics.functional.image import structural_similarity_index_measure
from tqdm import tqdm

from ldm.inference import SAMPLERS, InferenceError, choose_device, load_run, save_grid
from ldm.models.diffusion.conditioned import LatentInpaintDiffusion
from ldm.models.diffusion.latent import CLASS_KEYS
from ldm.modules.distributions.distributions import likeliest
from ldm.util import log_txt_as_img
from taming.checkpoint import CheckpointError
from taming.data.utils import custom_collate
from taming.models.base import FirstStage, image_from_batch
from taming.training.arguments import split_overrides
from taming.util import ConfigError, instantiate_from_config

psnr = FirstStage.psnr


def get_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-r", "--resume", required=True, help="folder of a run, or a checkpoint in it")
    parser.add_argument("-b", "--base", nargs="*", default=[], metavar="config.yaml", help="further configurations")  # fmt: skip
    parser.add_argument("--outfile", default="grid.png", help="the picture")
    parser.add_argument("--sampler", choices=sorted(SAMPLERS), default="ddim", help="default: ddim")
    parser.add_argument("--steps", type=int, default=50, help="of the sampler")
    parser.add_argument("--scale", type=float, default=2.0, help="guidance towards a class; 1 is none")
    parser.add_argument("--columns", type=int, default=8, help="pictures in a row")
    parser.add_argument("--rows", type=int, default=3, help="rows of held-out pictures to show")
    parser.add_argument("--batch_size", type=int, default=60, help="held-out pictures at once")
    parser.add_argument("--seed", type=int, default=42, help="for reproducible pictures")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    return parser


class Picture:
    """Rows of pictures in [-1, 1], and figures to print.

    Args:
        columns: pictures in a row.
    """

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.cells: list[Tensor] = []
        self.figures: dict[str, Any] = {}

    def add_row(self, images: Tensor) -> None:
        """Images (n, 3, h, w); what is missing in the row stays white."""
        blank = torch.ones_like(images[0])
        self.cells += [*images[: self.columns], *[blank] * (self.columns - len(images))]

    def interleave(self, rows: int, *kinds: Tensor) -> None:
        """So many times: a row of each kind, of the same pictures below each other."""
        for start in range(0, min(rows * self.columns, len(kinds[0])), self.columns):
            for images in kinds:
                self.add_row(images[start : start + self.columns])

    def save(self, path: str) -> None:
        """Write it as one PNG."""
        images = [(cell.float().cpu().clamp(-1, 1) + 1) / 2 for cell in self.cells]
        save_grid(images, self.columns, Path(path))


def sample(model: Any, cond: Any, n: int, opt: argparse.Namespace, uncond: Any = None) -> Tensor:
    """Decoded samples (n, 3, h, w) in [-1, 1] under a condition."""
    shape = (model.channels, model.image_size, model.image_size)
    scale = 1.0 if uncond is None else opt.scale
    z, _ = SAMPLERS[opt.sampler](model).sample(
        opt.steps, n, shape, cond, verbose=False, unconditional_guidance_scale=scale, unconditional_conditioning=uncond
    )  # fmt: skip
    return model.decode_first_stage(z).float().clamp(-1, 1).cpu()


def draw_classes(model: Any, dataset: Any, opt: argparse.Namespace) -> Picture:
    """A row for each class, its name in front."""
    encoder, key = model.cond_stage_model, model.cond_stage_key
    names = list(getattr(dataset, "classes", ())) or [str(i) for i in range(encoder.n_classes - 1)]
    encoder.ucg_rate = 0.0  # it drops labels outside training, too, as published
    picture = Picture(1 + opt.columns)
    for label, name in enumerate(tqdm(names, desc="classes")):
        labels = torch.full((opt.columns,), label, device=model.device)
        cond = model.get_learned_conditioning({key: labels})
        uncond = None if opt.scale == 1.0 else model.get_unconditional_conditioning(opt.columns)
        images = sample(model, cond, opt.columns, opt, uncond)
        title = log_txt_as_img((images.shape[3], images.shape[2]), [name], size=max(10, images.shape[2] // 4))
        picture.add_row(torch.cat([title, images]))
    return picture


def over_batches(
    model: Any, dataset: Any, opt: argparse.Namespace, make: Callable[[Any, Mapping[str, Any]], tuple[Tensor, ...]]
) -> list[Tensor]:  # fmt: skip
    """What `make` gives for each batch, (z, cond) and the batch being its arguments, joined."""
    parts = []
    loader = DataLoader(dataset, opt.batch_size, collate_fn=custom_collate)
    for batch in tqdm(loader, desc="held-out pictures"):
        _, cond = model.get_input(batch, model.first_stage_key)
        parts.append(make(cond, batch))
    return [torch.cat(tensors) for tensors in zip(*parts, strict=True)]


def draw_inpainting(model: Any, dataset: Any, opt: argparse.Namespace) -> Picture:
    """Masked pictures, results and truths; how well the hidden part is met."""

    def make(cond: Any, batch: Mapping[str, Any]) -> tuple[Tensor, ...]:
        truth = image_from_batch(batch, model.first_stage_key)
        keys = [k for k in model.concat_keys if k != model.masked_image_key]
        mask = image_from_batch(batch, keys[0])
        return truth, mask, sample(model, cond, len(truth), opt)

    truth, mask, made = over_batches(model, dataset, opt, make)
    result = truth * (1 - mask) + made * mask
    masked = truth * (1 - mask)
    colour = masked.sum((2, 3), keepdim=True) / (1 - mask).sum((2, 3), keepdim=True)
    picture = Picture(opt.columns)
    picture.interleave(opt.rows, masked, result, truth)
    picture.figures = {
        "hidden share": f"{float(mask.mean()):.1%}",
        "PSNR of the hidden part": f"{hidden_psnr(truth, result, mask):.2f} dB",
        "  filled with the visible part's mean colour": f"{hidden_psnr(truth, masked + colour * mask, mask):.2f} dB",
    }
    return picture


def hidden_psnr(truth: Tensor, image: Tensor, mask: Tensor) -> float:
    """Peak signal-to-noise ratio in dB where the mask is 1, of images in [-1, 1]; from the error over all of them.

    Raises:
        ValueError: nothing is hidden.
    """
    count = float(mask.sum()) * truth.shape[1]
    if not count:
        raise ValueError("the masks hide nothing; there is no hidden part to measure")
    error = (((truth - image) * mask) ** 2).sum() / count
    return float(10 * torch.log10(4 / error))


def draw_enlarged(model: Any, dataset: Any, opt: argparse.Namespace) -> Picture:
    """Small pictures, bicubic ones, results and truths; how near each comes."""

    def make(cond: Any, batch: Mapping[str, Any]) -> tuple[Tensor, ...]:
        truth = image_from_batch(batch, model.first_stage_key)
        small = image_from_batch(batch, "LR_image")
        repeated = F.interpolate(small, size=truth.shape[-2:])
        return (
            truth,
            small,
            sample(model, cond, len(truth), opt),
            through(model, repeated),
            through(model, truth),
        )

    truth, small, made, passed, limit = over_batches(model, dataset, opt, make)
    size = truth.shape[-2:]
    bicubic = F.interpolate(small, size=size, mode="bicubic", antialias=True).clamp(-1, 1)
    picture = Picture(opt.columns)
    picture.interleave(opt.rows, F.interpolate(small, size=size), bicubic, made, truth)
    compared = {
        "this model": made, "bicubic": bicubic, "repeated pixels, through the first stage": passed, "truth, through the first stage": limit,
    }  # fmt: skip
    for name, images in compared.items():
        ssim = structural_similarity_index_measure(images, truth, data_range=2.0)
        picture.figures[name] = f"{float(psnr(truth, images)):.2f} dB PSNR, {float(ssim):.4f} SSIM"  # type: ignore[arg-type]
    return picture


def through(model: Any, images: Tensor) -> Tensor:
    """Images (n, 3, h, w) in [-1, 1], encoded and decoded again; a posterior's mean where there is one."""
    encoded = model.encode_first_stage(images.to(model.device))
    z = likeliest(encoded)
    return model.decode_first_stage(model.scale_factor * z).float().cpu().clamp(-1, 1)


def drawer_of(model: Any) -> Callable[[Any, Any, argparse.Namespace], Picture]:
    """What draws a model's picture.

    Raises:
        InferenceError: a model of another kind.
    """
    if isinstance(model, LatentInpaintDiffusion):
        return draw_inpainting
    key = getattr(model, "cond_stage_key", None)
    if {"LR_image", "LR_enlarged"} & {key, *getattr(model, "concat_keys", ())}:
        return draw_enlarged
    if key in CLASS_KEYS:
        return draw_classes
    raise InferenceError(
        f"this {type(model).__name__} is conditioned on {key!r}: here are classes, inpainting and "
        "super-resolution (LR_image); scripts/txt2img.py draws from texts"
    )


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    overrides, flags = split_overrides(sys.argv[1:] if argv is None else argv)
    opt = get_parser().parse_args(flags)
    try:
        run = load_run(opt.resume, opt.base, overrides, choose_device(opt.device))
        draw = drawer_of(run.model)
        sections = run.config.data.params
        dataset = instantiate_from_config(sections.get("validation") or sections.train)
        torch.manual_seed(opt.seed)
        with run.model.ema_scope():
            picture = draw(run.model, dataset, opt)
    except (InferenceError, CheckpointError, ConfigError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    picture.save(opt.outfile)
    print(f"step {run.global_step}, {opt.sampler}, {opt.steps} steps: {opt.outfile}")
    for name, figure in picture.figures.items():
        print(f"  {name:<44} {figure}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
