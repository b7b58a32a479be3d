"""A page for SDXL-Turbo and SD-Turbo, which draw while you type: streamlit run scripts/demo/turbo.py"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout first, whatever else owns `sgm`

import streamlit as st

from ldm.inference import to_image
from scripts.demo import backend
from scripts.demo.backend import SeededNoise, SubstepSampler, seeded_randn
from scripts.demo.sampling import show
from sgm.inference.helpers import embed_watermark

__all__ = ["SeededNoise", "SubstepSampler", "page", "seeded_randn"]


def page() -> None:
    """The page."""
    st.title("Turbo")
    name = st.sidebar.selectbox("Model", list(backend.TURBO))
    steps = int(st.sidebar.number_input("Steps", 1, len(backend.SUBSTEPS), 1))
    seed = int(st.sidebar.number_input("Seed", 0, 2**31 - 16, 0))
    prompt = st.text_input(
        "Prompt", "A cinematic shot of a baby racoon wearing an intricate italian priest robe."
    )
    model = backend.load_turbo(name)
    images = backend.draw_turbo(model, prompt, seed, steps, backend.TURBO[name][2], backend.content_filter())
    st.image(to_image(embed_watermark(images)[0]))


if __name__ == "__main__":
    show(page)
