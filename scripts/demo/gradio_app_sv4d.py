"""A Gradio page for SV4D: python scripts/demo/gradio_app_sv4d.py

Weights belong to checkpoints/{sv3d_u,sv4d}.safetensors, videos go to outputs/gradio_sv4d.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout first, whatever else owns `sgm`

from scripts.demo.gradio_app import launch
from scripts.sampling import simple_video_sample_4d

OUT = "outputs/gradio_sv4d"


def views_of(
    video: str, seed: int, num_steps: int, encoding_t: int, decoding_t: int, remove_bg: bool
) -> list[str]:
    """The paths of a video's views: eight sides, and the flight around the object."""
    flags = {
        "input_path": video, "seed": int(seed), "num_steps": int(num_steps), "encoding_t": int(encoding_t),
        "decoding_t": int(decoding_t), "remove_bg": remove_bg, "output_folder": OUT,
    }  # fmt: skip
    opt = simple_video_sample_4d.get_parser().parse_args(
        [f"--{name}={value}" for name, value in flags.items()]
    )
    return [str(path) for path in simple_video_sample_4d.sample(opt).files[-9:]]


def build(gradio: Any) -> tuple[Callable[..., Any], Sequence[Any], Any, str]:
    """The page's parts."""
    inputs = [
        gradio.Video(label="Video of an object"),
        gradio.Number(23, label="Seed", precision=0),
        gradio.Slider(10, 50, 20, step=1, label="Steps"),
        gradio.Slider(1, 40, 8, step=1, label="Pictures encoded at once"),
        gradio.Slider(1, 14, 4, step=1, label="Pictures decoded at once"),
        gradio.Checkbox(False, label="Take the background out"),
    ]
    outputs = [*(gradio.Video(label=f"View {v}") for v in range(1, 9)), gradio.Video(label="Around")]
    return views_of, inputs, outputs, "Stable Video 4D"


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--share", action="store_true", help="make the page reachable from elsewhere")
    return launch(build, parser.parse_args(argv).share)


if __name__ == "__main__":
    sys.exit(main())
