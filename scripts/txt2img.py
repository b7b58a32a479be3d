"""Text to image.

    python scripts/txt2img.py --ckpt logs/<run> --prompt "red heart"
    python scripts/txt2img.py --config configs/stable-diffusion/v1-inference.yaml --ckpt model.ckpt --prompt "…" --plms

Pictures go to OUTDIR/samples/00000.png, … and a grid of all to OUTDIR/grid-0000.png; nothing there is overwritten.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout first, whatever else owns `ldm`

import torch
from tqdm import trange

from ldm import inference
from ldm.inference_images import Gallery, described, report
from scripts import flags
from scripts.sample_fast import latent_shape
from taming.checkpoint import load_model_from_config
from taming.models.cond_transformer import Net2NetTransformer

__all__ = ["load_model_from_config", "main"]

Prepare = Callable[[Any, argparse.Namespace], dict[str, Any]]


def get_parser() -> argparse.ArgumentParser:
    """The flags of the three published scripts, both spellings where they differ."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    prompt = flags.add_text_arguments(parser)
    prompt.add_argument("--from-file", dest="from_file", help="read prompts from this file, one a line")
    prompt.add_argument("--repeat", type=int, default=1, help="how often to repeat each prompt of the file")
    prompt.add_argument(
        "--prompt_weights",
        action="store_true",
        help="brackets weigh words: (red:1.3), for encoders of the CLIP family",
    )
    prompt.add_argument(
        "--windows",
        type=int,
        help="read prompts of so many times 75 tokens, for encoders of the CLIP family",
    )

    model = flags.add_model_arguments(parser)
    model.add_argument("--laion400m", action="store_true", help="the text2img-large model")
    model.add_argument("--torchscript", action="store_true", help="accepted and not needed any more")
    model.add_argument("--ipex", action="store_true", help="accepted and not needed any more")

    add_sampling_arguments(parser)
    flags.add_token_arguments(parser)
    size = flags.add_size_arguments(parser)
    size.add_argument("--C", type=int, help="channels of the latents; default: the model's")
    size.add_argument("--f", type=int, help="factor of the first stage; default: the model's")

    flags.add_output_arguments(parser, None)
    return parser


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of diffusion models' samplers."""
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--ddim_steps", "--steps", dest="steps", type=int, help="number of steps")
    sampling.add_argument("--plms", action="store_true", help="sample with PLMS")
    sampling.add_argument(
        "--dpm_solver", "--dpm", dest="dpm", action="store_true", help="sample with DPM-Solver++"
    )
    sampling.add_argument("--sampler", choices=sorted(inference.SAMPLERS), help="or any of these by name")
    sampling.add_argument(
        "--ddim_eta", type=float, default=0.0, help="noise of DDIM, 0 for deterministic sampling"
    )
    sampling.add_argument(
        "--guidance_rescale",
        type=float,
        default=0.0,
        help="share of the contrast that guidance adds to take away again, 0 to 1",
    )
    sampling.add_argument(
        "--time_spacing",
        choices=["uniform", "trailing"],
        help="which steps to visit; trailing begins with the last training step",
    )
    sampling.add_argument(
        "--seed_per_image",
        action="store_true",
        help="the i-th picture has the seed SEED + i, whatever the batch size",
    )
    sampling.add_argument("--fixed_code", action="store_true", help="the same starting noise for every batch")


class LatentArtist:
    """Draws with a latent diffusion model.

    Args:
        model: conditioned on text.
        opt: the flags.
        device: of the model.

    Raises:
        InferenceError: a size that the first stage cannot make.
    """

    def __init__(self, model: Any, opt: argparse.Namespace, device: torch.device) -> None:
        if opt.seed_per_image and opt.fixed_code:
            raise inference.InferenceError(
                "--seed_per_image gives each picture its own noise, --fixed_code all batches the same; choose one"
            )
        self.model, self.opt, self.device = model, opt, device
        name, self.sampler = inference.make_sampler(
            model, opt.sampler or ("plms" if opt.plms else "dpm" if opt.dpm else None)
        )
        self.shape = inference.latent_shape(model, opt.H, opt.W, opt.C, opt.f)
        _, factor = inference.image_size(model)
        height, width = (side * (opt.f or factor) for side in self.shape[1:])
        self.spacing = opt.time_spacing or "uniform"
        self.details = {
            "sampler": name, "steps": opt.steps, "eta": opt.ddim_eta, "time_spacing": self.spacing,
            "guidance_rescale": opt.guidance_rescale, "size": f"{width}x{height}",
        }  # fmt: skip
        self.start: torch.Tensor | None = None
        self.drawn = 0

    def begin(self) -> None:
        """Draw the starting noise that `--fixed_code` shares between batches."""
        if self.opt.fixed_code:
            self.start = torch.randn([self.opt.n_samples, *self.shape], device=self.device)

    def draw(self, prompts: list[str]) -> torch.Tensor:
        """Images (b, 3, h, w) in [0, 1]."""
        opt, x_T = self.opt, None if self.start is None else self.start[: len(prompts)]
        first, self.drawn = self.drawn, self.drawn + len(prompts)
        seeds = [opt.seed + i for i in range(first, self.drawn)] if opt.seed_per_image else None
        return inference.sample_text(
            self.model, self.sampler, prompts, opt.steps, self.shape, opt.scale, opt.ddim_eta, x_T, opt.negative_prompt,
            generator=seeds, guidance_rescale=opt.guidance_rescale, time_spacing=self.spacing,
        )  # fmt: skip


class TokenArtist:
    """Draws with a token transformer, code by code.

    Args:
        model: conditioned on text.
        opt: the flags.
        device: of the model.

    Raises:
        InferenceError: a flag of diffusion models, or guidance for a model that was not trained for it.
    """

    def __init__(self, model: Any, opt: argparse.Namespace, device: torch.device) -> None:
        self.model, self.opt = model, opt
        foreign = [
            "lora", "sampler", "plms", "dpm", "fixed_code", "negative_prompt", "H", "W", "C", "f", "guidance_rescale", "time_spacing",
            "seed_per_image",
        ]  # fmt: skip
        if given := [name for name in foreign if getattr(opt, name)]:
            raise inference.InferenceError(
                f"--{given[0]} is for diffusion models; this is a token transformer, which takes --top_k, --top_p, --temperature"
            )
        if model.null_cond is None and opt.scale != 1.0:
            logging.info(
                "This model was trained without dropped conditions: no guidance, --scale has no effect."
            )
            opt.scale = 1.0
        self.latent = latent_shape(model)
        resolution = model.first_stage_model.encoder.resolution
        self.details = {
            "sampler": "tokens", "steps": self.latent[1] * self.latent[2], "top_k": opt.top_k, "top_p": opt.top_p,
            "temperature": opt.temperature, "size": f"{resolution}x{resolution}",
        }  # fmt: skip

    def begin(self) -> None:
        """There is nothing to share between batches."""

    @torch.no_grad()
    def draw(self, prompts: list[str]) -> torch.Tensor:
        """Images (b, 3, h, w) in [0, 1]."""
        opt, steps = self.opt, self.latent[1] * self.latent[2]
        cond = self.model.condition_tokens(prompts)
        codes = self.model.sample(
            cond[:, :0], cond, steps, opt.temperature, True, opt.top_k, guidance=opt.scale, top_p=opt.top_p, progress=True
        )  # fmt: skip
        images = self.model.decode_to_img(codes, (len(prompts), *self.latent))
        return ((images.float() + 1.0) / 2.0).clamp(0.0, 1.0)


def encoder_options(opt: argparse.Namespace) -> list[str]:
    """What the flags say about reading prompts, as overrides of the configuration."""
    given = {"prompt_weights": opt.prompt_weights or None, "windows": opt.windows}
    where = "model.params.cond_stage_config.params"
    return [f"{where}.{name}={value}" for name, value in given.items() if value is not None]


def run(opt: argparse.Namespace, prepare: Prepare | None = None) -> Gallery:
    """Load, sample, save.

    Args:
        opt: the flags.
        prepare: called with the loaded model and the flags; what it returns is noted in the pictures.
    """
    asked = opt.scale
    flags.fill_defaults(opt)
    for flag in ("torchscript", "ipex"):
        if getattr(opt, flag):
            logging.warning("--%s has no effect: PyTorch's own kernels do its work now", flag)
    device = inference.choose_device(opt.device)
    model, path, _ = inference.load_model(opt.ckpt, opt.config, device, encoder_options(opt))
    noted = prepare(model, opt) if prepare else {}
    inference.require_text(model)
    tokens = isinstance(model, Net2NetTransformer)
    if tokens and asked is None:
        opt.scale = 1.0  # the defaults are those of diffusion
    artist = (TokenArtist if tokens else LatentArtist)(model, opt, device)
    lora = flags.add_adapters(model, opt)
    batches = inference.read_prompts(opt.prompt, opt.from_file, opt.n_samples, opt.repeat)
    common = described(
        path, negative_prompt=opt.negative_prompt, seed=opt.seed, **artist.details, **noted, scale=opt.scale, config=opt.config,
        lora=lora,
    )  # fmt: skip
    gallery = flags.make_gallery(opt, common)
    with flags.drawing(model, gallery, opt):
        artist.begin()
        for _ in trange(opt.n_iter, desc="Sampling", disable=opt.n_iter == 1):
            for prompts in batches:
                for prompt, image in zip(prompts, artist.draw(prompts), strict=True):
                    own = {"seed": opt.seed + gallery.count} if opt.seed_per_image else {}
                    gallery.add(image, prompt, **own)
    return gallery


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    opt = get_parser().parse_args(argv)
    return report(lambda: run(opt))


if __name__ == "__main__":
    sys.exit(main())
