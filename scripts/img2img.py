"""Image to image: a picture drawn anew under a prompt.

    python scripts/img2img.py --ckpt logs/<run> --init-img sketch.png --prompt "red heart" --strength 0.6
    python scripts/img2img.py --config configs/stable-diffusion/v1-inference.yaml --ckpt model.ckpt --init-img sketch.png --prompt "…"

Pictures go to OUTDIR/samples/00000.png, … and a grid of all to OUTDIR/grid-0000.png; nothing there is overwritten.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout first, whatever else owns `ldm`

from tqdm import trange

from ldm import inference, inference_images
from ldm.inference_images import Finished
from scripts import flags

# where the published defaults differ from those of txt2img, by family of configurations
SCALES = {"v1": 5.0}
STRENGTHS = {"v2": 0.8}


def get_parser() -> argparse.ArgumentParser:
    """The flags of the two published scripts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_text_arguments(parser)
    parser.add_argument("--from-file", dest="from_file", help="read prompts from this file, one a line")
    flags.add_model_arguments(parser)

    way = parser.add_argument_group("sampling")
    way.add_argument("--init-img", "--init_img", dest="init_img", help="the picture to begin with")
    way.add_argument(
        "--strength", type=float, help="how much may change, from 0 to 1; default: 0.75 (v2 models: 0.8)"
    )
    way.add_argument(
        "--ddim_steps", "--steps", dest="steps", type=int, default=50, help="steps of the whole way"
    )
    way.add_argument(
        "--ddim_eta", type=float, default=0.0, help="noise of DDIM, 0 for deterministic sampling"
    )
    way.add_argument(
        "--plms", action="store_true", help="refused, as published: pictures are redrawn by DDIM"
    )
    way.add_argument("--fixed_code", action="store_true", help="accepted, and without effect as published")
    way.add_argument("--C", type=int, help="accepted and not needed: the model knows its latents")
    way.add_argument("--f", type=int, help="accepted and not needed: the model knows its first stage")

    flags.add_output_arguments(parser, "outputs/img2img-samples")
    parser.set_defaults(n_samples=2, n_iter=1)
    return parser


def name_model(opt: argparse.Namespace) -> str:
    """Settle on the model that txt2img.py would take, and on the defaults of its family, which is returned."""
    asked = opt.scale
    flags.fill_defaults(opt)
    family = flags.family_of(opt)
    opt.scale = SCALES.get(family, opt.scale) if asked is None else asked
    return family


def run(opt: argparse.Namespace) -> Finished:
    """Load, noise, denoise, save."""
    if opt.plms:
        raise inference.InferenceError(
            "--plms cannot begin in the middle of the way; pictures are redrawn by DDIM"
        )
    if not opt.init_img:
        raise inference.InferenceError("name the picture to begin with: --init-img FILE")
    family = name_model(opt)
    strength = STRENGTHS.get(family, 0.75) if opt.strength is None else opt.strength
    device = inference.choose_device(opt.device)
    batches = inference.read_prompts(opt.prompt, opt.from_file, opt.n_samples)
    picture = inference_images.open_picture(opt.init_img, "--init-img")
    model, path, _ = inference.load_model(opt.ckpt, opt.config, device)
    inference_images.require_diffusion(model)
    inference.require_text(model)
    if model.model.conditioning_key != "crossattn":
        raise inference.InferenceError(
            f"this {type(model).__name__} needs more than a prompt (conditioning_key={model.model.conditioning_key!r})"
        )
    lora = flags.add_adapters(model, opt)
    picture = inference_images.shrunk_to_step(picture, inference_images.size_step(model))
    common = inference_images.described(
        path, init_img=Path(opt.init_img).name, strength=strength, negative_prompt=opt.negative_prompt, seed=opt.seed, sampler="ddim",
        steps=opt.steps, eta=opt.ddim_eta, scale=opt.scale, size=f"{picture.width}x{picture.height}", config=opt.config,
        lora=lora,
    )  # fmt: skip
    gallery = flags.make_gallery(opt, common)
    with flags.drawing(model, gallery, opt):
        pixels = inference_images.to_pixels(picture).to(device).repeat(opt.n_samples, 1, 1, 1)
        latents = inference_images.latents_of(model, pixels)
        for _ in trange(opt.n_iter, desc="Sampling", disable=opt.n_iter == 1):
            for prompts in batches:
                c, uc = inference_images.encoded_texts(model, prompts, opt.negative_prompt, opt.scale != 1.0)
                start = latents[: len(prompts)]
                made = inference_images.redraw(
                    model, start, c, uc, opt.scale, strength, opt.steps, opt.ddim_eta
                )
                for prompt, image in zip(prompts, made, strict=True):
                    gallery.add(image, prompt)
    return gallery


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    opt = get_parser().parse_args(argv)
    return inference_images.report(lambda: run(opt))


if __name__ == "__main__":
    sys.exit(main())
