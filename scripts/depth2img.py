"""Depth to image: a picture drawn anew under a prompt, its depth kept.

    python scripts/depth2img.py --ckpt 512-depth-ema.ckpt --init-img room.png --prompt "the same room, under water"

Pictures go to OUTDIR/samples/00000.png, …, the estimated depth to OUTDIR/depth-0000.png, and a grid of all to OUTDIR/grid-0000.png;
nothing there is overwritten. The same as a page: scripts/gradio/depth2img.py and scripts/streamlit/depth2img.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout first, whatever else owns `ldm`

from tqdm import trange

from ldm import inference, inference_conditioned, inference_images
from ldm.inference_images import Finished
from scripts import flags

CONFIG = inference_conditioned.KINDS["depth"][2]


def get_parser() -> argparse.ArgumentParser:
    """The flags of img2img, with the defaults of the published demo."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_text_arguments(parser)
    flags.add_model_arguments(parser)
    way = parser.add_argument_group("sampling")
    way.add_argument("--init-img", "--init_img", dest="init_img", help="the picture whose depth is kept")
    way.add_argument(
        "--strength",
        type=float,
        default=0.9,
        help="how much may change, from 0 to 1; 1 keeps the depth alone; default: 0.9",
    )
    way.add_argument("--ddim_steps", "--steps", dest="steps", type=int, default=50, help="steps of the way")
    way.add_argument(
        "--ddim_eta", type=float, default=0.0, help="noise of DDIM, 0 for deterministic sampling"
    )
    flags.add_output_arguments(parser, "outputs/depth2img-samples")
    parser.set_defaults(n_samples=1, n_iter=1, scale=9.0, prompt="")
    return parser


def run(opt: argparse.Namespace) -> Finished:
    """Load, estimate the depth, noise, denoise, save."""
    for flag, what in (("init_img", "the picture to begin with"), ("ckpt", "the model")):
        if not getattr(opt, flag):
            raise inference.InferenceError(f"name {what}: --{flag.replace('_', '-')} FILE")
    opt.prompt = opt.prompt or ""  # --prompt without a value
    picture = inference_images.open_picture(opt.init_img, "--init-img")
    device = inference.choose_device(opt.device)
    flags.fill_config(opt, CONFIG)
    model, path, _ = inference.load_model(opt.ckpt, opt.config, device)
    inference_conditioned.require_kind(model, "depth")
    lora = flags.add_adapters(model, opt)
    common = inference_images.described(
        path, init_img=Path(opt.init_img).name, strength=opt.strength, negative_prompt=opt.negative_prompt, seed=opt.seed,
        sampler="ddim", steps=opt.steps, eta=opt.ddim_eta, scale=opt.scale, config=opt.config, lora=lora,
    )  # fmt: skip
    gallery = flags.make_gallery(opt, common)
    with flags.drawing(model, gallery, opt):
        for i in trange(opt.n_iter, desc="Sampling", disable=opt.n_iter == 1):
            depth, made = inference_conditioned.keep_depth(
                model, picture, opt.prompt, opt.negative_prompt, opt.steps, opt.n_samples, opt.scale, opt.strength, opt.ddim_eta
            )  # fmt: skip
            if i == 0:
                number = inference.next_number(gallery.folder, r"depth-(\d+)\.png")
                gallery.save(depth, gallery.folder / f"depth-{number:04}.png", common)
            for image in made:
                gallery.add(image, opt.prompt)
    return gallery


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    opt = get_parser().parse_args(argv)
    return inference_images.report(lambda: run(opt))


if __name__ == "__main__":
    sys.exit(main())
