"""A video of an object to videos of it from four or eight more sides: SV4D 2.0, which needs no SV3D.

    python scripts/sampling/simple_video_sample_4d2.py --input_path walk.mp4 --remove_bg True --decoding_t 1
    python scripts/sampling/simple_video_sample_4d2.py --input_path walk.mp4 --model_path checkpoints/sv4d2_8views.safetensors

Written are 000000_process_input.mp4 (what the model saw), _t000.mp4 (all sides of the first frame), _v001.mp4, … (each side) and
_diag.mp4 (a flight around the object), in a folder named after the model; nothing is overwritten.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout first, whatever else owns `sgm`

from ldm.inference import InferenceError, choose_device
from ldm.inference_images import Finished, report
from scripts.sampling.simple_video_sample import add_common_arguments, config_path
from scripts.sampling.simple_video_sample_4d import FPS, add_4d_arguments, process_input, write_views
from sgm.inference.frames import VideoFolder
from sgm.inference.multiview import MULTIVIEW_MODELS, MultiviewSampler, ViewGrid
from sgm.inference.video import encode_in_chunks, load_video_model, numbers_for

MODELS = {name: spec for name, spec in MULTIVIEW_MODELS.items() if spec.azimuths}


def get_parser() -> argparse.ArgumentParser:
    """The published flags, and `--config`; `--ckpt` is another name of `--model_path`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_arguments(
        parser, ("fps_id", "motion_bucket_id", "cond_aug"), input_path="assets/sv4d_videos/camel.gif", output_folder="outputs",
        num_steps=50, decoding_t=4, elevations_deg=0.0, image_frame_ratio=0.9,
    )  # fmt: skip
    add_4d_arguments(parser)
    parser.add_argument(
        "--model_path", default="checkpoints/sv4d2.safetensors", help=f"weights; the name says which: {', '.join(MODELS)}"
    )  # fmt: skip
    parser.add_argument("--n_frames", type=int, default=21, help="frames of the video")
    return parser


def sample(opt: argparse.Namespace) -> Finished:
    """Make the views of a video; `opt` holds the flags.

    Raises:
        InferenceError: something that a user can mend; the message says how.
    """
    weights = opt.ckpt or opt.model_path
    name = Path(weights).stem
    if name not in MODELS:
        raise InferenceError(f"--model_path {weights}: the file's name must be one of {', '.join(MODELS)}")
    spec, device = MODELS[name], choose_device(opt.device)
    azimuths = numbers_for("azimuths_deg", opt.azimuths_deg or spec.azimuths or (), spec.V + 1)
    if opt.n_frames < spec.T:
        raise InferenceError(f"--n_frames {opt.n_frames}: this model needs {spec.T} or more")
    model = load_video_model(
        config_path(opt.config, spec.config), device, opt.num_steps, None, opt.verbose, weights
    )
    encode_in_chunks(model, opt.encoding_t)
    made = VideoFolder(Path(opt.output_folder) / name, r"(\d+)_process_input\.mp4", FPS)
    with made.until_stopped():
        video = process_input(
            made, opt.input_path, opt.n_frames, opt.remove_bg, opt.image_frame_ratio, opt.img_size
        )
        grid = ViewGrid(video, opt.elevations_deg, azimuths)
        MultiviewSampler(model, grid, spec.T, opt.decoding_t, opt.seed).fill_in_turn()
        made.save_video(grid.time(0), "_t000")
        write_views(made, grid)
    return made


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    opt = get_parser().parse_args(argv)
    return report(lambda: sample(opt))


if __name__ == "__main__":
    sys.exit(main())
