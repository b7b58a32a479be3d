"""Pictures to videos: Stable Video Diffusion, and SV3D's orbits.

    python scripts/sampling/simple_video_sample.py --input_path photo.png --version svd_xt --decoding_t 4
    python scripts/sampling/simple_video_sample.py --input_path object.png --version sv3d_p --elevations_deg 10

The weights go to checkpoints/<version>.safetensors. Videos go to OUTPUT_FOLDER/000000.mp4, …, each beside its picture;
nothing there is overwritten. `decoding_t` frames are decoded at once: the fewer, the less memory.
"""

from __future__ import annotations

import argparse
import ast
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout first, whatever else owns `sgm`

import torch
from torch import Tensor

from ldm.inference import InferenceError, choose_device, to_image
from ldm.inference_images import Finished, open_picture, report
from sgm.inference.frames import VideoFolder, as_frames, find_pictures, object_on_white, open_with_alpha
from sgm.inference.helpers import Filter, get_input_image_tensor
from sgm.inference.video import (
    CONFIGS,
    VIDEO_MODELS,
    VideoModel,
    animate,
    frame_values,
    load_video_model,
    orbit,
    warn_of_untrained,
)
from taming.util import nearest

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[2]
ORBIT_SIZE = 576


def numbers(text: str) -> float | list[float]:
    """`10` → 10.0; `[0, 10]`, `0,10` → a list."""
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor a list of numbers") from None
    values = value if isinstance(value, list | tuple) else [value]
    if not values or not all(isinstance(v, int | float) for v in values):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor a list of numbers")
    return [float(v) for v in values] if isinstance(value, list | tuple) else float(value)


def number_list(text: str) -> list[float]:
    """`[0, 10]`, `0,10`, `10` → a list."""
    found = numbers(text)
    return found if isinstance(found, list) else [found]


def truth(text: str) -> bool:
    """`True`, `yes`, `1`, … → whether it is so."""
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return words[text.lower()]


def add_common_arguments(
    parser: argparse.ArgumentParser, unheeded: Sequence[str] = (), **defaults: Any
) -> None:
    """The flags that all video scripts share; `defaults` are a script's own, `unheeded` those that its models are not told."""
    flags: dict[str, tuple[Any, str]] = {
        "input_path": (str, "what to begin with"),
        "output_folder": (str, "where the videos go"),
        "num_steps": (int, "sampling steps; default: the model's"),
        "fps_id": (int, "frames a second that SVD is told, one less than the video has"),
        "motion_bucket_id": (int, "how much is to move in SVD, 0 to 255"),
        "cond_aug": (float, "noise on the picture"),
        "seed": (int, "for reproducible videos"),
        "decoding_t": (int, "frames decoded at once; fewer need less memory"),
        "device": (str, "auto, cpu, cuda or mps"),
        "elevations_deg": (numbers, "height of the camera in degrees: one number, or a list"),
        "azimuths_deg": (number_list, "where around the object the camera stands, in degrees"),
        "image_frame_ratio": (float, "share of the side that the object takes, for SV3D and SV4D"),
    }
    common = {"fps_id": 6, "motion_bucket_id": 127, "seed": 23, "device": "auto", **defaults}
    for name, (kind, text) in flags.items():
        text = "accepted, as published; without effect here" if name in unheeded else text
        parser.add_argument(f"--{name}", type=kind, default=common.get(name), help=text)
    parser.add_argument(
        "--verbose", type=truth, nargs="?", const=True, default=False, help="show the sampler's progress"
    )
    parser.add_argument("--ckpt", help="weights instead of checkpoints/<version>.safetensors")
    parser.add_argument("--config", help="another configuration, such as that of a training of yours")


def get_parser() -> argparse.ArgumentParser:
    """The published flags, and `--config`, `--ckpt`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_arguments(parser, input_path="assets/test_image.png", decoding_t=14, elevations_deg=10.0)
    parser.add_argument("--version", default="svd", help=f"one of {', '.join(VIDEO_MODELS)}")
    parser.add_argument("--num_frames", type=int, help="frames of the video; default: the model's")
    return parser


def config_path(given: str | None, name: str) -> Path:
    """A configuration that was asked for, or the published one."""
    return Path(given) if given else ROOT / CONFIGS / name


def prepare(path: Path, spec: VideoModel, ratio: float | None) -> Tensor:
    """A picture as (1, 3, h, w) in [-1, 1]: its object on a white square for an orbit, otherwise at the next size below.

    Raises:
        InferenceError: it cannot be read.
    """
    picture = open_picture(path, "--input_path")
    if not spec.is_orbit:
        return get_input_image_tensor(picture)
    return as_frames([object_on_white(open_with_alpha(path), ratio, ORBIT_SIZE)])


def warn_of_unheeded(version: str, azimuths_deg: Any, image_frame_ratio: Any) -> None:
    """Say which of the values the model is not told."""
    spec = VIDEO_MODELS[version]
    for flag, given, is_heeded in (
        ("azimuths_deg", azimuths_deg, spec.knows_camera),
        ("image_frame_ratio", image_frame_ratio, spec.is_orbit),
    ):
        if given is not None and not is_heeded:
            logger.warning("--%s has no effect on %s", flag, version)


def sample(
    input_path: str = "assets/test_image.png",
    num_frames: int | None = None,
    num_steps: int | None = None,
    version: str = "svd",
    fps_id: int = 6,
    motion_bucket_id: int = 127,
    cond_aug: float | None = None,
    seed: int = 23,
    decoding_t: int = 14,
    device: str = "auto",
    output_folder: str | None = None,
    elevations_deg: float | Sequence[float] = 10.0,
    azimuths_deg: Sequence[float] | None = None,
    image_frame_ratio: float | None = None,
    verbose: bool = False,
    ckpt: str | None = None,
    config: str | None = None,
    filter: Filter | None = None,
) -> Finished:
    """Make a video of each picture; the arguments are the flags.

    Args:
        filter: is called with the frames in [0, 1] before they are written.

    Raises:
        InferenceError: something that a user can mend; the message says how.
    """
    if version not in VIDEO_MODELS:
        raise InferenceError(f"--version {version} is unknown. {nearest(version, VIDEO_MODELS)}")
    spec = VIDEO_MODELS[version]
    warn_of_unheeded(version, azimuths_deg, image_frame_ratio)
    count = num_frames or spec.num_frames
    cond_aug = spec.cond_aug if cond_aug is None else cond_aug
    paths = find_pictures(input_path)
    camera = orbit(count, elevations_deg, azimuths_deg) if spec.knows_camera else {}
    where = choose_device(device)
    model = load_video_model(
        config_path(config, spec.config), where, num_steps or spec.num_steps, count, verbose, ckpt
    )
    made = VideoFolder(output_folder or f"outputs/simple_video_sample/{version}/", r"(\d+)\.mp4", fps_id + 1)
    torch.manual_seed(seed)
    with made.until_stopped():
        for path in paths:
            picture = prepare(path, spec, image_frame_ratio).to(where)
            warn_of_untrained(spec, picture, motion_bucket_id, fps_id)
            values = {**frame_values(picture, cond_aug, fps_id, motion_bucket_id), **camera}
            frames = animate(model, values, count, decoding_t, spec.is_orbit)
            made.save_picture(to_image((picture[0] + 1.0) / 2.0))
            made.save_video(frames if filter is None else filter(frames))
            made.number += 1
    return made


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    opt = get_parser().parse_args(argv)
    return report(lambda: sample(**vars(opt)))


if __name__ == "__main__":
    sys.exit(main())
