"""What a text-to-image model makes of pictures that are there: drawn over (img2img) and filled in (inpainting).

    python scripts/evaluate_edits.py --outdir docs/gallery

Writes OUTDIR/emoji_img2img.png, a row for each pair of a picture and a prompt: the picture, then the drawing at each strength; and
OUTDIR/emoji_inpainting.png, three rows each: what the model sees, what it makes, the picture. The model in the box unless --ckpt
names another. Nothing is overwritten.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from tqdm import tqdm

from ldm import inference
from ldm.inference_images import Finished, fill_in, free_path, report
from ldm.models import LatentDiffusion
from taming.data.emoji import load_emoji
from taming.data.images import to_float

EDITS = (
    ("octopus", "green octopus"), ("dolphin", "red dolphin"), ("gem stone", "red gem stone"), ("balloon", "blue balloon"),
    ("grinning face", "blue grinning face"), ("grinning face", "crying face"), ("red heart", "broken heart"), ("robot", "alien monster"),
)  # fmt: skip
FILLED = (
    "grinning face",
    "red heart",
    "robot",
    "panda",
    "blue circle",
    "skull",
    "evergreen tree",
    "house",
    "hamburger",
    "octopus",
)


def get_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ckpt", default=inference.SHIPPED, help="run folder or checkpoint")
    parser.add_argument("--outdir", default="outputs/edits", help="folder for the two grids")
    parser.add_argument("--strengths", nargs="+", type=float, default=[0.4, 0.6, 0.8], help="of img2img")
    parser.add_argument("--steps", type=int, default=50, help="of the whole way, and of inpainting")
    parser.add_argument("--scale", type=float, default=inference.SHIPPED_GUIDANCE, help="guidance")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    return parser


def pictures_by_name() -> dict[str, Tensor]:
    """Every emoji (3, 64, 64) in [-1, 1], by each of its names; the first that has a name keeps it."""
    found: dict[str, Tensor] = {}
    for emoji in load_emoji():
        for name in emoji.names:
            found.setdefault(name, torch.as_tensor(to_float(emoji.pixels)).permute(2, 0, 1))
    return found


def drawn_over(model: Any, known: dict[str, Tensor], opt: argparse.Namespace) -> list[Tensor]:
    """Cells (3, 64, 64) in [0, 1], row by row: a picture, and a drawing over it at each strength."""
    cells = []
    for name, prompt in tqdm(EDITS, desc="img2img"):
        cells.append((known[name] + 1) / 2)
        for strength in opt.strengths:
            picture = model.img2img(known[name], prompt, strength, opt.steps, opt.scale, generator=opt.seed, progress=False)  # fmt: skip
            cells.append((torch.as_tensor(to_float(picture)).permute(2, 0, 1) + 1) / 2)
    return cells


def filled_in(model: Any, known: dict[str, Tensor], opt: argparse.Namespace) -> list[Tensor]:
    """Cells (3, 64, 64) in [0, 1], a column for each picture: its visible half, the filled one, the truth."""
    seen, made, truth = [], [], []
    name, sampler = inference.make_sampler(model)
    for index, name in enumerate(tqdm(FILLED, desc="inpainting")):
        image = known[name][None]
        mask = torch.zeros(1, 1, *image.shape[2:])
        mask[..., 32:] = 1.0
        if index % 2:  # the lower half of every second picture
            mask = mask.mT
        result = fill_in(model, sampler, image, mask, opt.steps, 1, name, "", opt.scale, generator=[opt.seed], verbose=False)  # fmt: skip
        seen.append(torch.where(mask > 0, 0.5, (image + 1) / 2)[0])
        made.append(result[0].cpu())
        truth.append((image[0] + 1) / 2)
    return [*seen, *made, *truth]


def run(opt: argparse.Namespace) -> Finished:
    """Load, draw, save."""
    model = LatentDiffusion.from_pretrained(opt.ckpt, device=opt.device)
    inference.require_text(model)
    known = pictures_by_name()
    torch.manual_seed(opt.seed)
    folder = Path(opt.outdir)
    folder.mkdir(parents=True, exist_ok=True)
    saved = []
    with torch.no_grad(), model.ema_scope():
        for stem, draw, columns in (
            ("emoji_img2img", drawn_over, 2 * (1 + len(opt.strengths))),
            ("emoji_inpainting", filled_in, len(FILLED)),
        ):
            path = free_path(folder / f"{stem}.png")
            inference.save_grid(draw(model, known, opt), columns, path)
            saved.append(path)
    return Finished(folder, saved)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    opt = get_parser().parse_args(argv)
    return report(lambda: run(opt))


if __name__ == "__main__":
    sys.exit(main())
