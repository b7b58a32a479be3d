"""Inpainting: what a mask hides of a picture is drawn anew.

    python scripts/inpaint.py --indir pictures --outdir filled --ckpt logs/<run>
    python scripts/inpaint.py --indir pictures --outdir filled --ckpt model.ckpt --config configs/….yaml --prompt "a red heart"

INDIR holds pairs: example.png, and example_mask.png with white where something is to be drawn. The results go to OUTDIR under the
picture's name; nothing there is overwritten. Inpainting models (their mask is an input of the network) do it best; any other model
conditioned on text or on nothing does it, too: then the rest of the picture is put back, noised, before every step.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout first, whatever else owns `ldm`

from tqdm import tqdm

from ldm import inference, inference_images
from ldm.inference_images import Finished
from scripts import flags

PUBLISHED = "models/ldm/inpainting_big"
TEXT_GUIDANCE = 10.0  # of the published demos of the text-conditioned model


def get_parser() -> argparse.ArgumentParser:
    """The published flags, and those of the model, the sampler and a text."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--indir", nargs="?", help="folder with pairs <name>.png and <name>_mask.png")
    parser.add_argument("--outdir", nargs="?", help="folder for the results")
    parser.add_argument("--steps", "--ddim_steps", dest="steps", type=int, default=50, help="number of steps")
    parser.add_argument(
        "--sampler", choices=sorted(inference.SAMPLERS), help="default: ddim, or flow for flows"
    )
    parser.add_argument(
        "--ddim_eta", type=float, default=0.0, help="noise of DDIM, 0 for deterministic sampling"
    )
    parser.add_argument("--n_samples", type=int, default=1, help="results for each picture")
    flags.add_model_arguments(parser)
    flags.add_text_arguments(parser)
    return parser


def name_model(opt: argparse.Namespace) -> None:
    """Settle on a model: the published one where it lies, else what txt2img.py would take; and on the guidance."""
    if opt.ckpt is None and opt.config is None and Path(PUBLISHED, "last.ckpt").is_file():
        opt.ckpt = PUBLISHED
    flags.name_model(opt)
    if opt.scale is None:
        text = inference.SHIPPED_GUIDANCE if opt.ckpt == inference.SHIPPED else TEXT_GUIDANCE
        opt.scale = text if opt.prompt else 1.0
    opt.prompt = opt.prompt or ""


def run(opt: argparse.Namespace) -> Finished:
    """Load, and fill in picture after picture."""
    for flag in ("indir", "outdir"):
        if not getattr(opt, flag):
            raise inference.InferenceError(f"name the folder --{flag}")
    pairs = inference_images.find_pairs(opt.indir)
    name_model(opt)
    device = inference.choose_device(opt.device)
    model, path, _ = inference.load_model(opt.ckpt, opt.config, device)
    inference_images.require_diffusion(model)
    lora = flags.add_adapters(model, opt)
    name, sampler = inference.make_sampler(model, opt.sampler)
    common = inference_images.described(
        path, prompt=opt.prompt or None, negative_prompt=opt.negative_prompt or None, seed=opt.seed, sampler=name, steps=opt.steps,
        eta=opt.ddim_eta, scale=opt.scale, config=opt.config, lora=lora,
    )  # fmt: skip
    made = Finished(Path(opt.outdir))
    made.folder.mkdir(parents=True, exist_ok=True)
    with flags.drawing(model, made, opt):
        for picture, mask in tqdm(pairs, desc="Pictures", disable=len(pairs) == 1):
            image, hidden = inference_images.open_pair(picture, mask)
            filled = inference_images.fill_in(
                model, sampler, image, hidden, opt.steps, opt.n_samples, opt.prompt, opt.negative_prompt, opt.scale, opt.ddim_eta
            )  # fmt: skip
            for index, result in enumerate(filled):
                target = inference_images.free_path(made.folder / f"{picture.stem}.png")
                made.save(
                    inference.to_image(result), target, {"picture": picture.name, "index": index, **common}
                )
    return made


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    opt = get_parser().parse_args(argv)
    return inference_images.report(lambda: run(opt))


if __name__ == "__main__":
    sys.exit(main())
