"""Clips of an image-to-video run: held-out pictures that move, drawn by the model and as they should be.

    python scripts/animate.py -r logs/<run>

Writes an animation (GIF): for each clip the picture, what the model makes of it, and the true motion; and prints how far the two are
apart, beside the distance of a clip that stands still. The pictures are those of the run's validation section.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from einops import rearrange
from torch import Tensor
from tqdm import trange

from ldm.inference import InferenceError, choose_device, load_run, to_image
from ldm.inference_images import Finished, free_path, report
from sgm.data.clips import collate_clips
from taming.training.arguments import split_overrides
from taming.util import atomic_path, instantiate_from_config


def get_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-r", "--resume", required=True, help="folder of a run, or a checkpoint in it")
    parser.add_argument("-o", "--out", default="outputs/clips.gif", help="the animation; never overwritten")
    parser.add_argument("-n", "--n_clips", type=int, default=16, help="clips")
    parser.add_argument("--columns", type=int, default=4, help="clips in a row")
    parser.add_argument("--batch_size", type=int, default=8, help="clips at once")
    parser.add_argument("--fps", type=float, default=6.0, help="frames a second")
    parser.add_argument("--seed", type=int, default=42, help="for reproducible clips")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    return parser


@torch.no_grad()
def animate(model: Any, clips: list[dict[str, Any]]) -> Tensor:
    """What a `DiffusionEngine` makes of first frames and motions, (b, t, 3, h, w) in [-1, 1]."""
    batch = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in collate_clips(clips).items()}
    frames = batch["num_video_frames"]
    shape = model.encode_first_stage(batch["cond_frames"][:1]).shape[1:]
    cond = model.conditioner(batch)
    z = model.sample(cond, batch_size=len(batch["jpg"]), shape=shape, num_video_frames=frames)
    return rearrange(model.decode_first_stage(z), "(b t) c h w -> b t c h w", t=frames).clamp(-1.0, 1.0)


def sheet(drawn: Tensor, truth: Tensor, columns: int) -> Tensor:
    """Frames (t, 3, h, w) in [0, 1] of a sheet: picture, drawn and true clip side by side, so many in a row."""
    still = truth[:, :1].expand_as(truth)
    clips = (torch.cat([still, drawn, truth], dim=-1) + 1.0) / 2.0
    blank = (-len(clips)) % columns
    clips = torch.cat([clips, clips.new_ones(blank, *clips.shape[1:])])
    return rearrange(clips, "(r q) t c h w -> t c (r h) (q w)", q=columns)


def save_gif(frames: Tensor, path: Path, fps: float) -> None:
    """Write an endless animation, whole or not at all, that rests a little on its last frame."""
    pictures = [to_image(frame) for frame in frames]
    pause = int(1000 / fps)
    durations = [pause] * (len(pictures) - 1) + [4 * pause]
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        pictures[0].save(
            temporary, format="GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0
        )


def run(opt: argparse.Namespace, overrides: list[str]) -> Finished:
    """Load, draw, write."""
    for flag in ("n_clips", "columns", "batch_size"):
        if getattr(opt, flag) < 1:
            raise InferenceError(f"--{flag} {getattr(opt, flag)} must be at least 1")
    loaded = load_run(opt.resume, overrides=overrides, device=choose_device(opt.device))
    if "num_video_frames" not in getattr(getattr(loaded.model, "loss_fn", None), "batch2model_keys", ()):
        raise InferenceError(f"{opt.resume} holds a {type(loaded.model).__name__}, and no video model")
    dataset = instantiate_from_config(loaded.config.data.params.validation)
    step = max(1, len(dataset) // opt.n_clips)
    clips = [dataset[i] for i in range(0, len(dataset), step)][: opt.n_clips]
    truth = torch.stack([clip["jpg"] for clip in clips])
    torch.manual_seed(opt.seed)
    with loaded.model.ema_scope():
        parts = [
            animate(loaded.model, clips[i : i + opt.batch_size]).cpu()
            for i in trange(0, len(clips), opt.batch_size, desc="Clips")
        ]
    drawn = torch.cat(parts)
    moved, still = ((x - truth)[:, 1:].square().mean().sqrt() for x in (drawn, truth[:, :1]))
    print(f"distance from the true frames: {moved:.3f}; of a clip that stands still: {still:.3f}")
    path = free_path(Path(opt.out))
    save_gif(sheet(drawn, truth, opt.columns), path, opt.fps)
    return Finished(path.parent, [path])


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    overrides, rest = split_overrides(sys.argv[1:] if argv is None else argv)
    opt = get_parser().parse_args(rest)
    return report(lambda: run(opt, overrides))


if __name__ == "__main__":
    sys.exit(main())
