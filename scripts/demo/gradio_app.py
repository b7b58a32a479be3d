"""A Gradio page for SVD-XT 1.1: python scripts/demo/gradio_app.py

Weights belong to checkpoints/svd_xt_1_1.safetensors, videos go to outputs/gradio.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout first, whatever else owns `sgm`

from ldm.inference import InferenceError
from scripts.demo import backend
from scripts.sampling import simple_video_sample

VERSION, OUT = "svd_xt_1_1", "outputs/gradio"


def get_gradio() -> Any:
    """The package.

    Raises:
        InferenceError: it is not installed.
    """
    try:
        import gradio
    except ImportError as error:
        raise InferenceError("this page needs Gradio: python -m pip install gradio") from error
    return gradio


def animate(picture: str, seed: int, motion_bucket_id: int, fps_id: int, decoding_t: int = 3) -> str:
    """The path of a picture file's video."""
    made = simple_video_sample.sample(
        picture, version=VERSION, fps_id=int(fps_id), motion_bucket_id=int(motion_bucket_id), seed=int(seed),
        decoding_t=int(decoding_t), output_folder=OUT, filter=backend.content_filter(),
    )  # fmt: skip
    return str(made.files[-1])


def launch(build: Callable[[Any], tuple[Callable[..., Any], Sequence[Any], Any, str]], share: bool) -> int:
    """Show a page in the browser; returns the exit status.

    Args:
        build: gradio → what to call, its inputs, its outputs, and the title.
        share: reachable from elsewhere, too.
    """
    try:
        gradio = get_gradio()
    except InferenceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    work, inputs, outputs, title = build(gradio)

    def told(*args: Any) -> Any:
        try:
            return work(*args)
        except (InferenceError, ValueError, OSError, FloatingPointError) as error:
            raise gradio.Error(str(error)) from error

    gradio.Interface(told, list(inputs), outputs, title=title).launch(share=share)
    return 0


def build(gradio: Any) -> tuple[Callable[..., Any], Sequence[Any], Any, str]:
    """The page's parts."""
    inputs = [
        gradio.Image(label="Picture", type="filepath"),
        gradio.Number(23, label="Seed", precision=0),
        gradio.Slider(1, 255, 127, step=1, label="Motion"),
        gradio.Slider(5, 30, 6, step=1, label="Frames a second"),
        gradio.Slider(1, 25, 3, step=1, label="Frames decoded at once"),
    ]
    return animate, inputs, gradio.Video(label="Video"), "Stable Video Diffusion"


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--share", action="store_true", help="make the page reachable from elsewhere")
    return launch(build, parser.parse_args(argv).share)


if __name__ == "__main__":
    sys.exit(main())
