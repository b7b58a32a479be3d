"""Variations of pictures by Stable unCLIP, as a page of Streamlit.

    streamlit run scripts/streamlit/stableunclip.py

Several pictures are mixed by their weights. Checkpoints lie in checkpoints/, see VERSIONS; what is made is kept below
outputs/demo/stable-unclip/<version>, and nothing there is overwritten.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout first, whatever else owns `ldm`

from PIL import Image
from torchvision.transforms.functional import to_tensor

from ldm import inference
from scripts import flags, pages

VERSIONS = {
    "Stable unCLIP-L": (
        "configs/stable-diffusion/v2-1-stable-unclip-l-inference.yaml", "checkpoints/sd21-unclip-l.ckpt",
    ),
    "Stable unOpenCLIP-H": (
        "configs/stable-diffusion/v2-1-stable-unclip-h-inference.yaml", "checkpoints/sd21-unclip-h.ckpt",
    ),
}  # fmt: skip
SAMPLERS = {"DDIM": "ddim", "DPM": "dpm"}
FOLDER = Path("outputs/demo/stable-unclip")
SIZE = 768


def keep(made: list[Image.Image], version: str, details: dict[str, Any]) -> Path:
    """Write pictures below the version's folder; returns it."""
    folder = FOLDER / version
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    number = inference.next_number(folder / "samples", r"(\d+)\.png")
    for i, image in enumerate(made):
        inference.save_png(image, folder / "samples" / f"{number + i:09}.png", {**details, "index": i})
    grid = inference.next_number(folder, r"grid-(\d+)\.png")
    inference.save_grid([to_tensor(image) for image in made], 2, folder / f"grid-{grid:06}.png", details)
    return folder


def load(version: str, device: str) -> Any:
    """A version's model; the one before is forgotten first."""
    import streamlit as st

    if st.session_state.get("version") != version:
        st.session_state.pop("model", None)
        config, ckpt = VERSIONS[version]
        st.session_state.model = inference.load_model(ckpt, config, inference.choose_device(device))[0]
        st.session_state.version = version
    return st.session_state.model


def page(opt: argparse.Namespace) -> None:
    """The page."""
    import streamlit as st

    demo = pages.DEMOS["stableunclip"]
    st.title(demo.title)
    side = st.sidebar
    version = side.selectbox("Version", list(VERSIONS))
    sampler = SAMPLERS[side.selectbox("Sampler", list(SAMPLERS))]
    size = tuple(int(side.number_input(name, 64, 2048, SIZE, 64)) for name in ("Height", "Width"))
    uploads = st.file_uploader("Pictures", type=["png", "jpg", "jpeg", "webp"], accept_multiple_files=True)
    pictures = [Image.open(upload) for upload in uploads or []]
    weights = [
        float(st.number_input(f"Weight of picture {i + 1}", 0.0, 10.0, 1.0)) for i in range(len(pictures))
    ]
    values = pages.ask_streamlit(st, demo)
    values |= {"sampler": sampler, "size": size, "weights": weights}
    values["renoise"] = len(pictures) > 1 and st.checkbox("Noise the mixture again", False)
    if st.button("Run"):
        made = pages.perform(demo, load(version, opt.device), pictures, values, opt.precision, opt.bf16)
        for picture in made:
            st.image(picture)
        details = {k: v for k, v in values.items() if v not in (None, "")}
        st.caption(f"kept in {keep(made, version, {**details, 'config': VERSIONS[version][0]})}")


def main(argv: list[str] | None = None) -> int:
    """Run the page; returns the exit status."""
    import streamlit as st

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_device_arguments(parser)
    opt = parser.parse_args(argv)
    try:
        page(opt)
    except (inference.InferenceError, ValueError, OSError) as error:
        st.error(str(error))
        print(f"error: {error}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    main()
