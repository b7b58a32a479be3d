"""A video of an object to videos of it from eight more sides: SV3D, then SV4D.

    python scripts/sampling/simple_video_sample_4d.py --input_path walk.mp4 --remove_bg True --decoding_t 1

The weights go to checkpoints/{sv3d_u,sv4d}.safetensors. Written are 000000_process_input.mp4 (what the models saw),
_t000.mp4 (all sides of the first frame), _v001.mp4, … (each side) and _diag.mp4 (a flight around the object); nothing is overwritten.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout first, whatever else owns `sgm`

import torch
from torch import Tensor

from ldm.inference import InferenceError, choose_device
from ldm.inference_images import Finished, report
from scripts.sampling.simple_video_sample import add_common_arguments, config_path, truth
from sgm.inference.frames import VideoFolder, as_frames, objects_on_white, read_video
from sgm.inference.multiview import MULTIVIEW_MODELS, SUBSAMPLED_VIEWS, MultiviewSampler, ViewGrid
from sgm.inference.video import VIDEO_MODELS, animate, encode_in_chunks, frame_values, load_video_model, orbit
from taming.util import nearest

N_FRAMES = 21
FPS = 10
ORBITS = [name for name, spec in VIDEO_MODELS.items() if spec.is_orbit]


def get_parser() -> argparse.ArgumentParser:
    """The published flags, and `--config`, `--ckpt` (of SV4D), `--sv3d_config`, `--sv3d_ckpt`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_arguments(
        parser, ("fps_id", "motion_bucket_id"), input_path="assets/sv4d_videos/test_video1.mp4", output_folder="outputs/sv4d",
        num_steps=20, cond_aug=1e-5, decoding_t=4, elevations_deg=10.0, image_frame_ratio=0.917,
    )  # fmt: skip
    add_4d_arguments(parser)
    parser.add_argument("--sv3d_version", default="sv3d_u", help=f"one of {', '.join(ORBITS)}")
    parser.add_argument("--sv3d_config", help="another configuration of SV3D")
    parser.add_argument("--sv3d_ckpt", help="weights instead of checkpoints/<sv3d_version>.safetensors")
    return parser


def add_4d_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that both 4D scripts share."""
    parser.add_argument("--img_size", type=int, default=576, help="side of the videos in pixels")
    parser.add_argument("--encoding_t", type=int, default=8, help="pictures encoded at once")
    parser.add_argument(
        "--remove_bg", type=truth, nargs="?", const=True, default=False,
        help="take the background out, with rembg; otherwise it must be transparent or white",
    )  # fmt: skip


def process_input(
    made: VideoFolder, input_path: str, n_frames: int, remove_bg: bool, ratio: float | None, size: int
) -> Tensor:
    """The video as a model is to see it, (t, 3, h, w) in [-1, 1]; it is written, too."""
    frames = as_frames(objects_on_white(read_video(input_path, n_frames), remove_bg, ratio, size))
    made.save_video((frames + 1.0) / 2.0, "_process_input", marked=False)
    return frames


def write_views(made: VideoFolder, grid: ViewGrid) -> None:
    """Write each new view, and the flight around the object."""
    for v in grid.new_views:
        made.save_video(grid.view(v), f"_v{v:03}")
    made.save_video(grid.diagonal(), "_diag")


def orbit_around(
    picture: Tensor, opt: argparse.Namespace, device: torch.device, camera: dict[str, list[float]]
) -> Tensor:
    """SV3D's views of a picture (1, 3, h, w) in [-1, 1], itself first: (21, 3, h, w) in [-1, 1]."""
    spec = VIDEO_MODELS[opt.sv3d_version]
    config = config_path(opt.sv3d_config, spec.config)
    model = load_video_model(config, device, opt.num_steps, N_FRAMES, opt.verbose, opt.sv3d_ckpt)
    torch.manual_seed(opt.seed)
    values = frame_values(picture.to(device), opt.cond_aug, opt.fps_id, opt.motion_bucket_id)
    frames = animate(model, {**values, **camera}, N_FRAMES, opt.decoding_t, is_orbit=True)
    return frames.roll(1, dims=0) * 2.0 - 1.0


def sample(opt: argparse.Namespace) -> Finished:
    """Make the views of a video; `opt` holds the flags.

    Raises:
        InferenceError: something that a user can mend; the message says how.
    """
    if opt.sv3d_version not in ORBITS:
        raise InferenceError(f"--sv3d_version {opt.sv3d_version} is unknown. {nearest(opt.sv3d_version, ORBITS)}")  # fmt: skip
    device, spec = choose_device(opt.device), MULTIVIEW_MODELS["sv4d"]
    camera = orbit(N_FRAMES, opt.elevations_deg, opt.azimuths_deg)
    made = VideoFolder(opt.output_folder, r"(\d+)_process_input\.mp4", FPS)
    with made.until_stopped():
        video = process_input(
            made, opt.input_path, N_FRAMES, opt.remove_bg, opt.image_frame_ratio, opt.img_size
        )
        first = orbit_around(video[:1], opt, device, camera)
        around = [camera[key][-1:] + camera[key][:-1] for key in ("polars_rad", "azimuths_rad")]
        polars, azimuths = (torch.tensor(x).rad2deg()[list(SUBSAMPLED_VIEWS)].tolist() for x in around)
        grid = ViewGrid(video, [90.0 - p for p in polars], azimuths)
        grid.set_views(0, first[list(SUBSAMPLED_VIEWS[1:])])
        made.save_video(grid.time(0), "_t000")
        model = load_video_model(
            config_path(opt.config, spec.config), device, opt.num_steps, None, opt.verbose, opt.ckpt
        )
        encode_in_chunks(model, opt.encoding_t)
        MultiviewSampler(model, grid, spec.T, opt.decoding_t, opt.seed).fill_between_anchors()
        write_views(made, grid)
    return made


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    opt = get_parser().parse_args(argv)
    return report(lambda: sample(opt))


if __name__ == "__main__":
    sys.exit(main())
