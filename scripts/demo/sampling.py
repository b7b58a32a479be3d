"""A page for SDXL and Stable Diffusion 2.1: streamlit run scripts/demo/sampling.py

Weights belong to checkpoints/. Pictures go to outputs/demo/<task>/<model>/samples with the invisible watermark.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout first, whatever else owns `sgm`

import streamlit as st
import torch
from PIL import Image

from ldm.inference import InferenceError, to_image
from scripts.demo import backend
from sgm.inference.api import (
    DISCRETIZATION_OPTIONS,
    GUIDER_OPTIONS,
    SAMPLER_OPTIONS,
    Discretization,
    Guider,
    Sampler,
    SamplingParams,
)
from sgm.inference.helpers import get_input_image_tensor, perform_save_locally

TASKS = ("txt2img", "img2img")
OUT = Path("outputs/demo")
# options of samplers, noise levels and guidance: label, least and largest value
OPTIONS: dict[str, tuple[str, float, float]] = {
    "s_churn": ("Churn", 0.0, 100.0),
    "s_tmin": ("Churn from σ", 0.0, 999.0),
    "s_tmax": ("Churn up to σ", 0.0, 999.0),
    "s_noise": ("Scale of the noise", 0.0, 2.0),
    "eta": ("Eta", 0.0, 1.0),
    "order": ("Order", 1, 4),
    "sigma_min": ("Lowest σ", 0.001, 1.0),
    "sigma_max": ("Highest σ", 1.0, 1000.0),
    "rho": ("Rho", 1.0, 10.0),
    "scale": ("Scale", 0.0, 100.0),
}


@dataclass
class Second:
    """The second stage's model, what it is to do, and how."""

    refiner: Any = None
    strength: float = backend.REFINER_STRENGTH
    finish_denoising: bool = True


def ask_options(params: SamplingParams, names: Iterable[str]) -> None:
    """Those options of what was chosen, from the side bar."""
    for name in names:
        label, least, most = OPTIONS[name]
        given = getattr(params, name)
        digits = "%d" if isinstance(given, int) else "%.4f"
        setattr(params, name, st.sidebar.number_input(label, least, most, given, format=digits, key=name))


def ask_params(name: str, task: str) -> SamplingParams:
    """The sampling parameters, from the side bar."""
    side, params = st.sidebar, SamplingParams()
    if name.startswith("SDXL"):
        ratio = side.selectbox("Ratio (height / width)", list(backend.RATIOS), list(backend.RATIOS).index("1.0"))  # fmt: skip
        params.height, params.width = backend.RATIOS[ratio]
    else:
        edge = backend.load_pipeline(name).specs.width
        params.height = int(side.number_input("Height", 64, 2048, edge, 64))
        params.width = int(side.number_input("Width", 64, 2048, edge, 64))
    params.orig_height, params.orig_width = params.height, params.width
    params.steps = int(side.number_input("Steps", 1, 1000, 40))
    params.scale = 5.0
    params.sampler = Sampler(side.selectbox("Sampler", [s.value for s in Sampler]))
    ask_options(params, SAMPLER_OPTIONS[params.sampler])
    params.discretization = Discretization(side.selectbox("Noise levels", [d.value for d in Discretization]))
    ask_options(params, DISCRETIZATION_OPTIONS[params.discretization])
    params.guider = Guider(side.selectbox("Guidance", [g.value for g in Guider]))
    ask_options(params, GUIDER_OPTIONS[params.guider])
    if task == "img2img":
        params.img2img_strength = side.number_input("Strength", 0.05, 1.0, 0.75)
    return params


def ask_second_stage() -> Second:
    """The second stage, from the side bar."""
    if not st.sidebar.checkbox("Refine"):
        return Second()
    name = st.sidebar.selectbox("Refiner", list(backend.REFINERS))
    strength = st.sidebar.number_input("Share of the refiner", 0.0, 1.0, backend.REFINER_STRENGTH)
    finish = st.sidebar.checkbox("The refiner finishes what the first model began", True)
    return Second(backend.load_pipeline(name), strength, finish)


def page() -> None:
    """The page."""
    st.title("Stable Diffusion")
    name = st.sidebar.selectbox("Model", list(backend.BASES))
    task = st.sidebar.radio("Task", TASKS)
    prompt = st.text_input("Prompt", "Astronaut in a jungle, cold color palette, muted colors, detailed, 8k")
    negative = st.text_input("Negative prompt", "")
    base, params = backend.load_pipeline(name), ask_params(name, task)
    second = ask_second_stage() if name.startswith("SDXL") else Second()
    seed = int(st.sidebar.number_input("Seed", 0, 2**31 - 1, 42))
    samples = int(st.sidebar.number_input("Pictures", 1, 64, 2))
    image = None
    if task == "img2img":
        if (file := st.file_uploader("Picture", ["png", "jpg", "jpeg", "webp"])) is None:
            return
        image = get_input_image_tensor(Image.open(file))
    if not st.button("Sample"):
        return
    torch.manual_seed(seed)
    images = backend.draw(
        base, params, prompt, negative, samples, image, second.refiner, second.strength, second.finish_denoising,
        backend.content_filter(),
    )  # fmt: skip
    for picture in images:
        st.image(to_image(picture))
    saved = perform_save_locally(OUT / task / name / "samples", images)
    st.caption(f"{len(saved)} files in {saved[0].parent}")


def show(build: Any) -> None:
    """A page whose errors are sentences, where a user can mend them."""
    try:
        build()
    except (InferenceError, ValueError, OSError, FloatingPointError) as error:
        st.error(str(error))


if __name__ == "__main__":
    show(page)
