"""Super-resolution: small pictures, four times as large.

    python scripts/superresolution.py --ckpt x4-upscaler-ema.ckpt --init-img small.png --prompt "a white cat"
    python scripts/superresolution.py --ckpt models/ldm/bsr_sr --init-img small.png

The first is Stable Diffusion's upscaler, which reads a prompt; the second the model of latent-diffusion for pictures of unknown damage,
which reads none, takes large pictures patch by patch, and makes sides multiples of 16. Pictures go to OUTDIR/samples/00000.png, …;
nothing there is overwritten. The same as a page: scripts/gradio/superresolution.py and scripts/streamlit/superresolution.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout first, whatever else owns `ldm`

from torch import Tensor
from tqdm import tqdm

import notebook_helpers
from ldm import inference, inference_conditioned, inference_images
from ldm.inference_images import Finished
from scripts import flags
from taming.data.images import EXTENSIONS

CONFIG = inference_conditioned.KINDS["enlarge"][2]
SCALE, NOISE_LEVEL = 10.0, 20  # of the published demo
BSR_KEY = "LR_image"  # what the published model without a prompt is conditioned on
Draw = Callable[[Path], Tensor]


def get_parser() -> argparse.ArgumentParser:
    """The flags of img2img without a strength, with the defaults of the published demo."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_text_arguments(parser)
    flags.add_model_arguments(parser)
    way = parser.add_argument_group("sampling")
    way.add_argument(
        "--init-img", "--init_img", dest="init_img", help="the small picture, or a folder of them"
    )
    way.add_argument(
        "--noise_level",
        type=int,
        help="noise added to it first: more leaves more to the model; default: 20",
    )
    way.add_argument("--ddim_steps", "--steps", dest="steps", type=int, default=75, help="number of steps")
    way.add_argument("--sampler", choices=sorted(inference.SAMPLERS), help="default: ddim")
    way.add_argument(
        "--ddim_eta", type=float, help="noise of DDIM; default: 0, and 1 for the model without a prompt"
    )
    flags.add_output_arguments(parser, "outputs/superresolution")
    parser.set_defaults(n_samples=1, n_iter=1, prompt="")
    return parser


def find_pictures(name: str | None) -> list[Path]:
    """The picture, or those of a folder.

    Raises:
        InferenceError: there is none.
    """
    if not name:
        raise inference.InferenceError("name the small picture: --init-img FILE")
    path = Path(name)
    found = sorted(p for p in path.iterdir() if p.suffix.lower() in EXTENSIONS) if path.is_dir() else [path]
    if not found:
        raise inference.InferenceError(f"--init-img {name} holds no pictures")
    return found


def draw_upscaled(model: Any, opt: argparse.Namespace) -> tuple[dict[str, Any], Draw]:
    """What says how Stable Diffusion's upscaler draws, and what enlarges a picture with it."""
    name, sampler = inference.make_sampler(model, opt.sampler)
    eta, scale = opt.ddim_eta or 0.0, SCALE if opt.scale is None else opt.scale
    level = NOISE_LEVEL if opt.noise_level is None else opt.noise_level
    said = {
        "negative_prompt": opt.negative_prompt, "sampler": name, "eta": eta, "scale": scale, "noise_level": level,
    }  # fmt: skip
    return said, lambda path: inference_conditioned.enlarge(
        model, sampler, inference_images.open_picture(path, "--init-img"), opt.prompt, opt.negative_prompt, opt.steps,
        opt.n_samples, scale, level, eta,
    )  # fmt: skip


def draw_restored(model: Any, opt: argparse.Namespace) -> tuple[dict[str, Any], Draw]:
    """What says how the model for unknown damage draws, and what enlarges a picture with it."""
    if opt.prompt or opt.sampler not in (None, "ddim") or opt.ddim_eta not in (None, 1.0):
        raise inference.InferenceError(
            "this model reads no prompt, and is sampled by DDIM with --ddim_eta 1, as published"
        )
    foreign = [
        flag for flag in ("negative_prompt", "scale", "noise_level") if getattr(opt, flag) not in (None, "")
    ]
    if foreign or opt.n_samples != 1:
        raise inference.InferenceError(
            f"--{(foreign or ['n_samples'])[0]} is for Stable Diffusion's upscaler; this model is asked again with --n_iter alone"
        )

    def draw(path: Path) -> Tensor:
        inference_images.open_picture(path, "--init-img")  # a missing file is a sentence
        log = notebook_helpers.run(model, path, "superresolution", opt.steps, resize_enabled=True)
        return ((log["sample"].float() + 1.0) / 2.0).clamp(0.0, 1.0)

    return {"sampler": "ddim", "eta": 1.0}, draw


def make_drawing(model: Any, opt: argparse.Namespace) -> tuple[dict[str, Any], Draw]:
    """What fits the model.

    Raises:
        InferenceError: it does not enlarge pictures.
    """
    if getattr(model, "cond_stage_key", None) == BSR_KEY:
        return draw_restored(model, opt)
    inference_conditioned.require_kind(model, "enlarge")
    return draw_upscaled(model, opt)


def run(opt: argparse.Namespace) -> Finished:
    """Load, and enlarge picture after picture."""
    opt.prompt = opt.prompt or ""  # --prompt without a value
    pictures = find_pictures(opt.init_img)
    if not opt.ckpt:
        raise inference.InferenceError("name the model: --ckpt FILE, or --ckpt models/ldm/bsr_sr")
    device = inference.choose_device(opt.device)
    flags.fill_config(opt, CONFIG)
    model, path, _ = inference.load_model(opt.ckpt, opt.config, device)
    lora = flags.add_adapters(model, opt)
    said, draw = make_drawing(model, opt)
    common = inference_images.described(
        path, seed=opt.seed, steps=opt.steps, config=opt.config, lora=lora, **said
    )
    gallery = flags.make_gallery(opt, common, grid=len(pictures) == 1)  # a grid's pictures are of one size
    every = pictures * opt.n_iter
    with flags.drawing(model, gallery, opt):
        for picture in tqdm(every, desc="Pictures", disable=len(every) == 1):
            for image in draw(picture):
                gallery.add(image, opt.prompt, init_img=picture.name)
    return gallery


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    opt = get_parser().parse_args(argv)
    return inference_images.report(lambda: run(opt))


if __name__ == "__main__":
    sys.exit(main())
