"""Tasks as pages: what each draws, its controls, and two ways to show any of them, by Gradio and by Streamlit.

    streamlit run scripts/streamlit/text2img.py
    python scripts/gradio/depth2img.py configs/stable-diffusion/v2-midas-inference.yaml 512-depth-ema.ckpt
    streamlit run scripts/streamlit/depth2img.py configs/stable-diffusion/v2-midas-inference.yaml 512-depth-ema.ckpt

The same for inpainting, superresolution and, by Streamlit alone, stableunclip. text2img takes the model that comes with the repository
where none is named. Without a browser do scripts/txt2img.py, depth2img.py, inpaint.py and superresolution.py the same.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm import inference, inference_conditioned, inference_images
from ldm.inference import InferenceError
from scripts import flags

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Control:
    """A number that a page asks for.

    Args:
        label: what the page calls it.
        low, high, default, step: its range; whole numbers if `step` is one.
    """

    label: str
    low: float
    high: float
    default: float
    step: float = 1


@dataclass(frozen=True)
class Demo:
    """A task as a page.

    Args:
        title: of the page.
        draw: (model, pictures, values) → pictures.
        controls: by name; the defaults are those of the published Gradio page.
        streamlit: controls where the published Streamlit page differs.
        inputs: labels of the pictures that it begins with.
        shipped: the model that comes with the repository can do it, and does where none is named.
    """

    title: str
    draw: Callable[[Any, Sequence[Image.Image], Values], list[Image.Image]]
    controls: Mapping[str, Control]
    streamlit: Mapping[str, Control] = field(default_factory=dict)
    inputs: tuple[str, ...] = ("Picture",)
    shipped: bool = False


# --------------------------------------------------------------------------------------------------------------- tasks


def start_of(seed: int) -> Callable[[Sequence[int]], Tensor]:
    """The noise of a seed on any device, from numpy's generator as published."""
    return lambda shape: torch.from_numpy(np.random.RandomState(seed).randn(*shape)).float()


def as_pictures(images: Tensor) -> list[Image.Image]:
    """(b, 3, h, w) in [0, 1] → pictures."""
    return [inference.to_image(image) for image in images]


def _text(values: Values) -> dict[str, Any]:
    names = ("prompt", "negative_prompt", "steps", "batch_size", "scale", "eta")
    return {name: values[name] for name in names if name in values}


def draw_prompt(model: Any, pictures: Sequence[Image.Image], values: Values) -> list[Image.Image]:
    """Pictures of a prompt."""
    inference.require_text(model)
    name = None if model.parameterization == "flow" else "unipc"
    _, sampler = inference.make_sampler(model, name)
    made = inference.sample_text(
        model, sampler, [values["prompt"]] * values["batch_size"], values["steps"], inference.latent_shape(model), values["scale"],
        negative_prompt=values["negative_prompt"], verbose=False,
    )  # fmt: skip
    return as_pictures(made)


def draw_depth(model: Any, pictures: Sequence[Image.Image], values: Values) -> list[Image.Image]:
    """The estimated depth, and pictures of the same depth."""
    depth, made = inference_conditioned.keep_depth(
        model, pictures[0], strength=values["strength"], verbose=False, **_text(values)
    )
    return [depth, *as_pictures(made)]


def draw_inside(model: Any, pictures: Sequence[Image.Image], values: Values) -> list[Image.Image]:
    """Pictures with what a mask hides drawn anew; the mask is white there.

    Raises:
        InferenceError: picture and mask differ in size.
    """
    picture, mask = pictures
    if picture.size != mask.size:
        raise InferenceError(
            f"the mask is {mask.width}x{mask.height}, its picture {picture.width}x{picture.height}; they must be of one size"
        )
    hidden = torch.from_numpy(np.asarray(mask.convert("L")) >= 127.5).float()[None, None]
    _, sampler = inference.make_sampler(model)
    made = inference_images.fill_in(
        model, sampler, inference_images.to_pixels(picture), hidden, start=start_of(values["seed"]), verbose=False, **_text(values)
    )  # fmt: skip
    return as_pictures(made)


def draw_large(model: Any, pictures: Sequence[Image.Image], values: Values) -> list[Image.Image]:
    """The picture, four times as large."""
    _, sampler = inference.make_sampler(model)
    made = inference_conditioned.enlarge(
        model, sampler, pictures[0], noise_level=values["noise_level"], start=start_of(values["seed"]), verbose=False, **_text(values)
    )  # fmt: skip
    return as_pictures(made)


def draw_varied(model: Any, pictures: Sequence[Image.Image], values: Values) -> list[Image.Image]:
    """Variations of the pictures' mean."""
    _, sampler = inference.make_sampler(model, values.get("sampler"))
    made = inference_conditioned.vary(
        model, sampler, pictures, values.get("weights"), noise_level=values["noise_level"], renoise=values.get("renoise", False),
        size=values.get("size", (None, None)), verbose=False, **_text(values),
    )  # fmt: skip
    return as_pictures(made)


SEED = Control("Seed", 0, 2**31 - 1, 0)
STRENGTH = Control("Strength", 0.0, 1.0, 0.9, 0.01)
ETA = Control("Eta", 0.0, 1.0, 0.0, 0.01)
NOISE = Control("Noise level", 0, 350, 20)


def _controls(images: int, steps: Control, scale: float, **more: Control) -> dict[str, Control]:
    return {
        "batch_size": Control("Pictures", 1, 4, images),
        "steps": steps,
        "scale": Control("Guidance scale", 0.1, 30.0, scale, 0.1),
        **more,
        "seed": SEED,
    }


DEMOS: dict[str, Demo] = {
    "text2img": Demo(
        "Text to image",
        draw_prompt,
        _controls(4, Control("Steps", 1, 50, 20), inference.SHIPPED_GUIDANCE),
        inputs=(),
        shipped=True,
    ),
    "depth2img": Demo(
        "Depth to image", draw_depth, _controls(1, Control("Steps", 1, 50, 50), 9.0, strength=STRENGTH, eta=ETA)
    ),
    "inpainting": Demo(
        "Inpainting",
        draw_inside,
        # the published page has no control for the noise of DDIM, and takes all of it
        _controls(4, Control("Steps", 1, 50, 45), 10.0, eta=Control("Eta", 0.0, 1.0, 1.0, 0.01)),
        streamlit={"steps": Control("Steps", 1, 50, 50), "eta": ETA},
        inputs=("Picture", "Mask, white where something is to be drawn"),
    ),
    "superresolution": Demo(
        "Super-resolution",
        draw_large,
        _controls(1, Control("Steps", 2, 200, 75), 10.0, noise_level=NOISE, eta=ETA),
        streamlit={"steps": Control("Steps", 2, 250, 50), "scale": Control("Guidance scale", 0.1, 30.0, 9.0, 0.1)},
    ),
    "stableunclip": Demo(
        "Variations",
        draw_varied,
        _controls(4, Control("Steps", 1, 1000, 20), 10.0, noise_level=Control("Noise level", 0, 999, 0), eta=ETA),
        streamlit={"seed": Control("Seed", 0, 2**31 - 1, 42)},
    ),
}  # fmt: skip


def perform(
    demo: Demo,
    model: Any,
    pictures: Sequence[Image.Image | None],
    values: Values,
    precision: str = "autocast",
    bf16: bool = False,
) -> list[Image.Image]:
    """Do a task: its pictures depend on the seed alone.

    Args:
        demo: the task.
        model: that fits it, on its device.
        pictures: one for each of the task's `inputs`; None where it was not given.
        values: `prompt`, `negative_prompt`, and a number for each of the task's controls.
        precision, bf16: see `precision_scope`.

    Raises:
        InferenceError: a picture is missing, or the model or a value does not suit; the message is for the page.
    """
    given = [picture.convert("RGB") for picture in pictures if picture is not None]
    if len(given) < len(demo.inputs):
        raise InferenceError(f"give: {', '.join(demo.inputs)}")
    with flags.computing(model, int(values["seed"]), precision, bf16):
        try:
            return demo.draw(model, given, values)
        except FloatingPointError as error:
            raise InferenceError(f"{error}; start the page with --precision full, or --bf16") from error


# --------------------------------------------------------------------------------------------------------------- pages


def get_parser(demo: Demo, doc: str | None) -> argparse.ArgumentParser:
    """The published positional arguments, and where to compute."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    nargs, default = (
        ("?", "; default: the model that comes with the repository") if demo.shipped else (None, "")
    )
    parser.add_argument("config", nargs=nargs, help=f"configuration of the checkpoint{default}")
    parser.add_argument("ckpt", nargs=nargs, help=f"the checkpoint{default}")
    flags.add_device_arguments(parser)
    return parser


def whole(control: Control) -> bool:
    """Whether a control takes whole numbers alone."""
    return control.step == 1


def build_gradio(demo: Demo, model: Any, **how: Any) -> Any:
    """The task as a page of Gradio, not yet launched; `how` are options of `perform`.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import gradio
    except ImportError as error:
        raise ImportError("the page needs python -m pip install gradio") from error
    names = list(demo.controls)

    def answer(*given: Any) -> list[Image.Image]:
        pictures, (prompt, negative), numbers = (
            given[: len(demo.inputs)],
            given[len(demo.inputs) :][:2],
            given[len(demo.inputs) + 2 :],
        )
        values = {
            name: int(v) if whole(demo.controls[name]) else v for name, v in zip(names, numbers, strict=True)
        }
        try:
            return perform(
                demo, model, pictures, {"prompt": prompt, "negative_prompt": negative, **values}, **how
            )
        except (InferenceError, ValueError) as error:
            raise gradio.Error(str(error)) from error

    with gradio.Blocks(title=demo.title) as page:
        gradio.Markdown(f"# {demo.title}")
        with gradio.Row():
            with gradio.Column():
                inputs: list[Any] = [gradio.Image(type="pil", label=label) for label in demo.inputs]
                inputs += [gradio.Textbox(label="Prompt"), gradio.Textbox(label="Negative prompt")]
                button = gradio.Button("Run")
                for name, c in demo.controls.items():
                    if name == "seed":
                        inputs.append(gradio.Number(label=c.label, value=c.default, precision=0))
                    else:
                        inputs.append(
                            gradio.Slider(c.low, c.high, value=c.default, step=c.step, label=c.label)
                        )
            gallery = gradio.Gallery(label="Pictures")
        button.click(fn=answer, inputs=inputs, outputs=[gallery])
    return page


def ask_streamlit(st: Any, demo: Demo) -> dict[str, Any]:
    """The text and the numbers of a page of Streamlit."""
    values: dict[str, Any] = {
        "prompt": st.text_input("Prompt", ""),
        "negative_prompt": st.text_input("Negative prompt", ""),
    }
    for name, published in demo.controls.items():
        c = demo.streamlit.get(name, published)
        kind = int if whole(c) else float
        low, high, default, step = (kind(v) for v in (c.low, c.high, c.default, c.step))
        ask = st.sidebar.number_input if name == "seed" else st.sidebar.slider
        values[name] = ask(c.label, low, high, default, step)
    return values


def show_streamlit(demo: Demo, load: Callable[[], Any], **how: Any) -> None:
    """The task as a page of Streamlit; `how` are options of `perform`."""
    import streamlit as st

    st.title(demo.title)
    if "model" not in st.session_state:
        try:
            st.session_state.model = load()
        except (InferenceError, ValueError, OSError) as error:
            st.error(str(error))
            return
    uploads = [st.file_uploader(label, type=["png", "jpg", "jpeg", "webp"]) for label in demo.inputs]
    values = ask_streamlit(st, demo)
    if st.button("Run"):
        try:
            pictures = [None if upload is None else Image.open(upload) for upload in uploads]
            made = perform(demo, st.session_state.model, pictures, values, **how)
        except (InferenceError, ValueError, OSError) as error:
            st.error(str(error))
        else:
            for picture in made:
                st.image(picture)


def main(name: str, front: str, doc: str | None, argv: list[str] | None = None) -> int:
    """Run the page of a task; returns the exit status.

    Args:
        name: a key of `DEMOS`.
        front: "gradio" or "streamlit".
        doc: what `--help` says first.
        argv: the command line, the process's own if None.
    """
    demo = DEMOS[name]
    parser = get_parser(demo, doc)
    opt = parser.parse_args(argv)
    if opt.config and not opt.ckpt:
        parser.error(f"name the checkpoint of {opt.config}, too")
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    how = {"precision": opt.precision, "bf16": opt.bf16}

    def load() -> Any:
        ckpt = opt.ckpt or inference.SHIPPED
        return inference.load_model(ckpt, opt.config, inference.choose_device(opt.device))[0]

    try:
        if front == "streamlit":
            show_streamlit(demo, load, **how)
        else:
            build_gradio(demo, load(), **how).launch()
    except (ImportError, InferenceError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
