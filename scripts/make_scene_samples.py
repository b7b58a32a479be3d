"""Scenes from layouts: images with given objects in given places, by a transformer conditioned on boxes or centre points.

    python scripts/make_scene_samples.py -r logs/<run> --outdir scenes -R 256,512 -N 4

Writes <outdir>/<step>_<top_k>_<temperature>/<batch>_<i>.png: the samples for a layout, then the layout. Above the training size a
window slides over the codes, and each window sees the layout of the part of the scene that it covers.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from pytorch_lightning import seed_everything
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.utils import make_grid
from tqdm import tqdm

from ldm.inference import InferenceError, save_png
from scripts.make_samples import add_run_arguments, load, to_pixels, window_of
from taming.checkpoint import CheckpointError
from taming.data.conditional_builder.utils import FULL_CROP
from taming.data.helper_types import Annotation, BoundingBox
from taming.data.utils import custom_collate
from taming.models.sliding_window import sample_windows
from taming.training.arguments import split_overrides
from taming.util import ConfigError

SEED = 42424242  # as published
POINT = 1e-6  # side of the box that stands for a centre point


def resolution(text: str) -> tuple[int, int]:
    """`h,w` in pixels, at least 256 and rounded to multiples of 16."""
    try:
        height, width = (int(n) for n in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} must be height,width, such as 256,512") from error
    return max(256, round(height / 16) * 16), max(256, round(width / 16) * 16)


def get_parser() -> argparse.ArgumentParser:
    """The published flags, and `--device`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_run_arguments(parser)
    parser.set_defaults(seed=SEED)
    parser.add_argument("--outdir", required=True, help="folder for the pictures")
    parser.add_argument("-R", "--resolution", type=resolution, default=(256, 256), help="height,width in pixels")  # fmt: skip
    parser.add_argument("-C", "--conditional", default="objects_bbox", help="objects_bbox or objects_center_points")  # fmt: skip
    parser.add_argument("-N", "--n_samples_per_layout", type=int, default=4, help="scenes of each layout")
    return parser


def part_of(crop: BoundingBox, part: BoundingBox) -> BoundingBox:
    """A part of a crop, both as shares (left, top, width, height), as a share of the whole."""
    return (
        crop[0] + part[0] * crop[2],
        crop[1] + part[1] * crop[3],
        part[2] * crop[2],
        part[3] * crop[3],
    )


def layout_at(builder: Any, tokens: Tensor, part: BoundingBox) -> Tensor:
    """A layout's tokens (n,) as seen through a window that covers `part` of its scene."""
    objects, crop = builder.inverse_build(tokens)
    annotations: list[Annotation] = []
    for what, where in objects:
        box = where if len(where) == 4 else (where[0] - POINT / 2, where[1] - POINT / 2, POINT, POINT)
        annotations.append(builder.representation_to_annotation(what)._replace(bbox=box))
    return builder.build(annotations, part_of(crop or FULL_CROP, part), False)


def condition_for(
    builder: Any, layouts: Tensor, size: tuple[int, int], window: int
) -> Tensor | Callable[[int, int], Tensor]:
    """What `sample_windows` should see: the layouts themselves at the training size, else those of each window.

    Args:
        builder: conditional builder of the data set.
        layouts: tokens (b, n).
        size: of the map of codes, (h, w).
        window: side of the window.
    """
    if size == (window, window):
        return layouts
    height, width = size

    def at(top: int, left: int) -> Tensor:
        part = (left / width, top / height, window / width, window / height)
        return torch.stack([layout_at(builder, row.cpu(), part) for row in layouts]).to(layouts.device)

    return at


@torch.no_grad()
def sample_layouts(
    model: Any, builder: Any, layouts: Tensor, size: tuple[int, int], top_k: int, temperature: float
) -> Tensor:
    """A scene for each layout (b, n): images (b, 3, *size) in [-1, 1]."""
    stage, window = model.first_stage_model, window_of(model)
    factor = stage.encoder.resolution // window
    height, width = (max(side // factor, window) for side in size)
    codes = torch.zeros(len(layouts), height, width, dtype=torch.long, device=model.device)
    condition = condition_for(builder, layouts.to(model.device), (height, width), window)
    drawn = sample_windows(
        model, codes, condition, window=window, lead=(window - 1) // 2, top_k=top_k, temperature=temperature, progress=True
    )  # fmt: skip
    return stage.decode(stage.quantize.get_codebook_entry(drawn.flatten(), (*codes.shape, stage.embed_dim)))


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    overrides, flags = split_overrides(sys.argv[1:] if argv is None else argv)
    opt = get_parser().parse_args(flags)
    try:
        run, dataset = load(opt, overrides)
        seed_everything(opt.seed)
        random.seed(opt.seed)  # layouts are put together in random order
        builders = getattr(dataset, "conditional_builders", {})
        if opt.conditional not in builders:
            raise InferenceError(
                f"-C {opt.conditional}: this data set makes {', '.join(builders) or 'no layouts'}; see its keys"
            )
        builder: Any = builders[opt.conditional]
        label = dataset.get_textual_label_for_category_no  # type: ignore[attr-defined]
        root = Path(opt.outdir) / f"{run.global_step:06}_{opt.top_k}_{opt.temperature}"
        loader: Any = DataLoader(dataset, batch_size=1, shuffle=True, collate_fn=custom_collate)
        with run.model.ema_scope():
            for number, batch in enumerate(tqdm(loader, desc="batches")):
                for i, layout in enumerate(batch[opt.conditional]):
                    layouts = layout.repeat(opt.n_samples_per_layout, 1)
                    images = sample_layouts(run.model, builder, layouts, opt.resolution, opt.top_k, opt.temperature)  # fmt: skip
                    plot = builder.plot(layout.cpu(), label, tuple(images.shape[2:]))
                    grid = make_grid(torch.cat([images.cpu(), plot[None]]), nrow=len(images) + 1)
                    save_png(to_pixels(grid), root / f"{number:04}_{i:02}.png")
    except (InferenceError, CheckpointError, ConfigError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"pictures are in {root}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
