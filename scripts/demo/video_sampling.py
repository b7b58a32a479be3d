"""A page for Stable Video Diffusion and SV3D: streamlit run scripts/demo/video_sampling.py

Weights belong to checkpoints/. Videos go to outputs/demo/vid/<model>.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout first, whatever else owns `sgm`

import streamlit as st

from scripts.demo import backend
from scripts.demo.sampling import show
from scripts.sampling import simple_video_sample
from sgm.inference.video import VIDEO_MODELS

OUT = Path("outputs/demo/vid")


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
    if spec.knows_camera:
        options["elevations_deg"] = side.number_input("Height of the camera in degrees", -90.0, 90.0, 10.0)
    file = st.file_uploader("Picture", ["png", "jpg", "jpeg", "webp"])
    if file is None or not st.button("Sample"):
        return
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / Path(file.name).name
        picture.write_bytes(file.getvalue())
        made = simple_video_sample.sample(
            str(picture), version=version, output_folder=str(OUT / version), filter=backend.content_filter(), **options
        )  # fmt: skip
    st.video(str(made.files[-1]))
    st.caption(str(made.files[-1]))


if __name__ == "__main__":
    show(page)
