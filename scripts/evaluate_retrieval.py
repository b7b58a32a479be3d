"""Does a text-to-image model draw what it is asked for? Retrieval among the pictures it was trained on.

    python scripts/evaluate_retrieval.py -r logs/<run> --samplers ddim unipc --steps 8 30
    python scripts/evaluate_retrieval.py -r models/emoji/text2img -b configs/emoji/text2img.yaml

For captions of the emoji, evenly spread over them, one picture each is drawn. The training pictures nearest to it are looked up by their
Euclidean distance, once among latents (the posterior's means) and once among pixels. A drawing counts as found if one of the k nearest
carries its caption among its names. Chance finds one in a thousand.

Printed as a markdown table: the share that is found for k = 1 and k = 5. Uses the averaged weights where the run kept an average.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.inference import SAMPLERS, InferenceError, choose_device, load_run, require_text, save_grid
from scripts.evaluate_samplers import Cell, Comparison, decode, print_report, real_pictures, table
from taming.data.emoji import EmojiImages

RANKS = (1, 5)


def get_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-r", "--resume", required=True, help="folder of a run, or a checkpoint in it")
    parser.add_argument("-b", "--base", nargs="*", default=[], metavar="config.yaml", help="further configurations")  # fmt: skip
    parser.add_argument("--samplers", nargs="+", choices=sorted(SAMPLERS), default=["ddim", "unipc"])
    parser.add_argument("--steps", nargs="+", type=int, default=[8, 30])
    parser.add_argument("-n", "--n_samples", type=int, default=200, help="captions, evenly spread over the data set")  # fmt: skip
    parser.add_argument("--split", default="train", help="section of the configuration's data to take them from")  # fmt: skip
    parser.add_argument("--batch_size", type=int, default=50)
    parser.add_argument("--scale", type=float, default=3.0, help="guidance; 1 is none")
    parser.add_argument("--time_spacing", default="uniform", help="uniform, as published, or trailing")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--outfile", help="grid of the drawings of the last sampler and number of steps")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    return parser


def nearest_rows(queries: Tensor, among: Tensor, k: int) -> Tensor:
    """Indices (n, k) of the rows of `among` (m, d) that are nearest to each row of `queries` (n, d), nearest first."""
    return torch.cdist(queries, among).topk(min(k, len(among)), largest=False).indices


def found(indices: Tensor, captions: Sequence[str], names: Sequence[Sequence[str]], k: int) -> float:
    """Share of the captions (n) that are among the names of one of the k first pictures at their indices (n, ≥ k)."""
    hits = [
        any(caption in names[int(i)] for i in row[:k]) for row, caption in zip(indices, captions, strict=True)
    ]
    return sum(hits) / len(hits)


@torch.no_grad()
def latents_and_pixels(model: Any, pixels: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """Pictures (m, 3, h, w) in [-1, 1] → their scaled posteriors' means and themselves, each (m, d)."""
    latents = [
        model.scale_factor * model.encode_first_stage(batch.to(model.device)).mode()
        for batch in tqdm(pixels.split(batch_size), desc="training pictures")
    ]
    return torch.cat(latents).flatten(1).float().cpu(), pixels.flatten(1)


def evaluate(opt: argparse.Namespace, overrides: list[str]) -> str:
    """Draw, look up, count; returns the report.

    Raises:
        InferenceError: the model takes no text, or its data are no emoji.
    """
    run = load_run(opt.resume, opt.base, overrides, choose_device(opt.device))
    model = run.model
    require_text(model)
    dataset = real_pictures(run.config, opt.split).dataset
    if not isinstance(dataset, EmojiImages):
        raise InferenceError(
            f"the data are {type(dataset).__name__}; names of pictures are known of EmojiImages"
        )
    names = [emoji.names for emoji in dataset.emoji]
    n = min(opt.n_samples, len(names))
    captions = [names[i * len(names) // n][0] for i in range(n)]
    pixels = torch.stack([torch.from_numpy(e.pixels.copy()) for e in dataset.emoji]).permute(0, 3, 1, 2)
    z_all, x_all = latents_and_pixels(model, pixels.float() / 127.5 - 1, opt.batch_size)

    torch.manual_seed(opt.seed)
    noise = torch.randn(n, model.channels, model.image_size, model.image_size)
    compared = Comparison(model, captions, noise, opt.scale, opt.batch_size, opt.time_spacing)
    cells: list[Cell] = [(name, steps) for name in opt.samplers for steps in opt.steps]
    rows: dict[str, list[str]] = {}
    with model.ema_scope():
        for name, steps in tqdm(cells, desc="samplers"):
            start = time.perf_counter()
            z, _ = compared.draw(name, steps)
            pictures = decode(model, z)
            seconds = (time.perf_counter() - start) / n
            near = [
                nearest_rows(z.flatten(1), z_all, max(RANKS)),
                nearest_rows(2 * pictures.flatten(1) - 1, x_all, max(RANKS)),
            ]
            shares = [f"{found(indices, captions, names, k):.1%}" for indices in near for k in RANKS]
            rows[f"{name}, {steps} steps"] = [*shares, f"{seconds:.2f} s"]
    if opt.outfile:
        save_grid(list(pictures), 20, Path(opt.outfile))
    heads = [f"{space}, top {k}" for space in ("latents", "pixels") for k in RANKS]
    return "\n\n".join(
        [
            f"step {run.global_step}, {n} captions, {len(names)} pictures, guidance {opt.scale:g}, {opt.time_spacing} steps, "
            f"seed {opt.seed}; torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads",
            table("found", rows, [*heads, "a picture"]),
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return print_report(get_parser(), evaluate, argv)


if __name__ == "__main__":
    sys.exit(main())
