"""A page for Stable Video Diffusion and SV3D: streamlit run scripts/demo/video_sampling.py

Weights belong to checkpoints/. Videos go to outputs/demo/vid/<model>, each beside a grid of its frames and, where the camera is told
its way, a plot of that.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout first, whatever else owns `sgm`

import streamlit as st
from torch import Tensor

from ldm.inference import save_grid
from scripts.demo import backend
from scripts.demo.sampling import show
from scripts.demo.sv3d_helpers import dynamic_orbit, plot_orbit
from scripts.sampling import simple_video_sample
from sgm.inference.helpers import embed_watermark
from sgm.inference.video import VIDEO_MODELS, orbit

OUT = Path("outputs/demo/vid")
PATHS = ("even", "uneven")


def ask_camera(num_frames: int) -> dict[str, list[float]]:
    """Where the camera is at each frame, in degrees, from the side bar."""
    side = st.sidebar
    path = side.radio("Way of the camera", PATHS)
    height = side.number_input("Height of the camera in degrees", -90.0, 90.0, 10.0)
    if path == "uneven":
        seed = int(side.number_input("Seed of the way", 0, 2**31 - 1, 0))
        elevations, azimuths = dynamic_orbit(num_frames, height, seed)
    else:
        elevations = [height] * num_frames
        azimuths = [math.degrees(a) for a in orbit(num_frames, height, None)["azimuths_rad"]]
    return {"elevations_deg": elevations, "azimuths_deg": azimuths}


def animate(picture: Path, version: str, camera: Mapping[str, Any], **options: Any) -> Path:
    """A picture's video; beside it are the grid of its frames, and a plot of the camera's way if there is one."""
    unsafe, frames = backend.content_filter(), []

    def seen(images: Tensor) -> Tensor:
        frames.append(images if unsafe is None else unsafe(images))
        return frames[-1]

    made = simple_video_sample.sample(
        str(picture), version=version, output_folder=str(OUT / version), filter=seen, **camera, **options
    )
    video = Path(made.files[-1])
    columns = math.ceil(math.sqrt(len(frames[-1])))
    save_grid(list(embed_watermark(frames[-1])), columns, video.with_name(f"{video.stem}_grid.png"))
    if camera:
        plot_orbit(**camera, path=video.with_name(f"{video.stem}_camera.png"))
    return video


def page() -> None:
    """The page."""
    st.title("Image to video")
    side = st.sidebar
    version = side.selectbox("Model", list(VIDEO_MODELS))
    spec = VIDEO_MODELS[version]
    options = {
        "num_frames": int(side.number_input("Frames", 1, 100, spec.num_frames)),
        "num_steps": int(side.number_input("Steps", 1, 1000, spec.num_steps)),
        "fps_id": int(side.number_input("Frames a second", 1, 60, 6)),
        "motion_bucket_id": int(side.number_input("Motion", 0, 511, 127)),
        "cond_aug": side.number_input("Noise on the picture", 0.0, 1.0, spec.cond_aug, format="%.5f"),
        "seed": int(side.number_input("Seed", 0, 2**31 - 1, 23)),
        "decoding_t": int(side.number_input("Frames decoded at once", 1, 100, 14)),
    }
    camera = ask_camera(int(options["num_frames"])) if spec.knows_camera else {}
    file = st.file_uploader("Picture", ["png", "jpg", "jpeg", "webp"])
    if file is None or not st.button("Sample"):
        return
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / Path(file.name).name
        picture.write_bytes(file.getvalue())
        video = animate(picture, version, camera, **options)
    st.video(str(video))
    st.caption(str(video))
    for ending in ("grid", "camera"):
        if (shown := video.with_name(f"{video.stem}_{ending}.png")).is_file():
            st.image(str(shown))


if __name__ == "__main__":
    show(page)
