"""What the command lines of the sampling scripts share: flags, the model that is meant where none is named, and what surrounds drawing."""

from __future__ import annotations

import argparse
import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import seed_everything

from ldm import inference
from ldm.inference_images import Finished, Gallery
from ldm.lora import load_lora
from taming.checkpoint import find_run

__all__ = [
    "FAMILIES", "add_adapters", "add_device_arguments", "add_model_arguments", "add_output_arguments", "add_size_arguments",
    "add_text_arguments", "add_token_arguments", "computing", "drawing", "family_of", "fill_config", "fill_defaults", "make_gallery",
    "split_weight",
]  # fmt: skip

# The published scripts differ in their defaults; a configuration's path says which one it belongs to.
FAMILIES: dict[str, dict[str, Any]] = {
    "v2": {
        "prompt": "a professional photograph of an astronaut riding a triceratops",
        "steps": 50,
        "n_iter": 3,
        "n_samples": 3,
        "scale": 9.0,
    },
    "v1": {
        "prompt": "a painting of a virus monster playing guitar",
        "steps": 50,
        "n_iter": 2,
        "n_samples": 3,
        "scale": 7.5,
    },
    "txt2img-1p4B": {
        "prompt": "a painting of a virus monster playing guitar",
        "steps": 200,
        "n_iter": 1,
        "n_samples": 4,
        "scale": 5.0,
    },
    "own": {"prompt": "red heart", "steps": 50, "n_iter": 1, "n_samples": 4, "scale": 3.0},
}
# the model in the box needs no more steps
SHIPPED = {"sampler": "unipc", "steps": 20, "scale": inference.SHIPPED_GUIDANCE}
PUBLISHED_V1 = ("configs/stable-diffusion/v1-inference.yaml", "models/ldm/stable-diffusion-v1/model.ckpt")
LAION400M = (
    "configs/latent-diffusion/txt2img-1p4B-eval.yaml",
    "models/ldm/text2img-large/model.ckpt",
    "outputs/txt2img-samples-laion400m",
)


def add_text_arguments(parser: argparse.ArgumentParser) -> Any:
    """The flags of a text and of guidance by it; returns their group."""
    text = parser.add_argument_group("prompt")
    text.add_argument("--prompt", nargs="?", help="what to draw")
    text.add_argument("--negative_prompt", default="", help="what guidance leads away from")
    text.add_argument("--scale", type=float, help="guidance: ê = e(uncond) + scale · (e(cond) - e(uncond))")
    return text


def add_device_arguments(parser: Any) -> None:
    """The flags that say where to compute, and how precisely; `parser` may be a group."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument(
        "--precision",
        choices=["full", "autocast"],
        default="autocast",
        help="half precision on a GPU, or none",
    )
    parser.add_argument("--bf16", action="store_true", help="bfloat16 instead, on any device")


def add_model_arguments(parser: argparse.ArgumentParser) -> Any:
    """The flags that say what to compute with; returns their group."""
    model = parser.add_argument_group("model")
    model.add_argument(
        "--ckpt",
        help="a training run's folder (logs/<run>; logs: the newest), or a checkpoint; default: the published one where it lies, "
        "else the small model of emoji that comes with the repository",
    )
    model.add_argument("--config", help="configuration of the checkpoint; default: the one that lies with it")
    model.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:WEIGHT]",
        help="low-rank adapters, of kohya's, diffusers' or peft's layout; may be given several times",
    )
    add_device_arguments(model)
    model.add_argument("--seed", type=int, default=42, help="for reproducible pictures")
    return model


def add_size_arguments(parser: argparse.ArgumentParser) -> Any:
    """The flags of the pictures' size; returns their group."""
    size = parser.add_argument_group("size")
    size.add_argument("--H", type=int, help="height in pixels; default: the model's")
    size.add_argument("--W", type=int, help="width in pixels; default: the model's")
    return size


def add_token_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that only token transformers know."""
    tokens = parser.add_argument_group("sampling with a token transformer")
    tokens.add_argument("--top_k", type=int, default=100, help="draw among so many codes; 0: all")
    tokens.add_argument(
        "--top_p", type=float, help="draw among the codes that reach this probability together"
    )
    tokens.add_argument("--temperature", type=float, default=1.0, help="below 1 safer, above more varied")


def add_output_arguments(parser: argparse.ArgumentParser, outdir: str | None) -> Any:
    """The flags of numbered pictures and their grid; returns their group."""
    output = parser.add_argument_group("output")
    output.add_argument("--outdir", nargs="?", default=outdir, const=outdir, help="folder for the pictures")
    output.add_argument("--n_samples", type=int, help="pictures a batch (and a prompt, without a file)")
    output.add_argument("--n_iter", type=int, help="how often to go through the prompts")
    output.add_argument("--n_rows", type=int, default=0, help="columns of the grid; default: n_samples")
    output.add_argument("--skip_grid", action="store_true", help="no grid")
    output.add_argument("--skip_save", action="store_true", help="no single pictures")
    return output


def split_weight(text: str) -> tuple[str, float]:
    """`style.safetensors:0.8` → the file and 0.8; the weight is 1 unless given."""
    name, colon, weight = text.rpartition(":")
    try:
        return (name, float(weight)) if colon else (text, 1.0)
    except ValueError:  # the colon belongs to the path
        return text, 1.0


def add_adapters(model: Any, opt: argparse.Namespace) -> str | None:
    """Load the adapters that `--lora` names; returns what pictures should say of them."""
    for name, weight in map(split_weight, opt.lora):
        load_lora(model, name, weight)
    return ", ".join(opt.lora) or None


def family_of(opt: argparse.Namespace) -> str:
    """The published models that a configuration's path speaks of, or "own"."""
    return next((name for name in FAMILIES if opt.config and name in Path(opt.config).stem), "own")


def fill_config(opt: argparse.Namespace, published: str) -> None:
    """Take the published configuration for a checkpoint beside which none lies."""
    if opt.config is None:
        with contextlib.suppress(FileNotFoundError):  # loading says what is missing
            opt.config = None if find_run(opt.ckpt)[1] else published


def fill_defaults(opt: argparse.Namespace) -> None:
    """Settle on a model, and on the defaults of the script that it was published with."""
    if getattr(opt, "laion400m", False):
        config, ckpt, outdir = LAION400M
        opt.config, opt.ckpt, opt.outdir = opt.config or config, opt.ckpt or ckpt, opt.outdir or outdir
    unnamed = opt.ckpt is None
    name_model(opt)
    if unnamed and opt.ckpt == inference.SHIPPED:
        fill_shipped(opt)
    opt.outdir = opt.outdir or "outputs/txt2img-samples"
    for key, value in FAMILIES[family_of(opt)].items():
        if getattr(opt, key, None) is None:
            setattr(opt, key, value)


def name_model(opt: argparse.Namespace) -> None:
    """Settle on a model: where none is named, the published one if it is there, else the one that comes with the repository.

    Raises:
        InferenceError: a configuration is named, and its checkpoint is not there.
    """
    if opt.ckpt is not None:
        return
    published = Path(PUBLISHED_V1[1])
    if published.is_file():
        opt.config, opt.ckpt = opt.config or PUBLISHED_V1[0], str(published)
    elif opt.config is None:
        opt.ckpt = inference.SHIPPED
        logging.info("Drawing with the model of emoji that comes with the repository; --ckpt names another.")
    else:
        raise inference.InferenceError(
            f"name the checkpoint of --config {opt.config} with --ckpt (there is none at {published})"
        )


def fill_shipped(opt: argparse.Namespace) -> None:
    """The defaults of the model that comes with the repository, which come before those of scripts."""
    named = any(getattr(opt, flag, None) for flag in ("sampler", "plms", "dpm"))
    for key, value in SHIPPED.items():
        if getattr(opt, key, None) is None and not (key == "sampler" and named):
            setattr(opt, key, value)


def make_gallery(opt: argparse.Namespace, common: Mapping[str, Any], grid: bool = True) -> Gallery:
    """Where the pictures go that `add_output_arguments` speaks of.

    Args:
        opt: the flags.
        common: what all pictures say of themselves.
        grid: whether there can be one.
    """
    grid = grid and not opt.skip_grid
    return Gallery(opt.outdir, common, opt.n_rows or opt.n_samples, not opt.skip_save, grid)


@contextlib.contextmanager
def computing(
    model: Any, seed: int | None, precision: str = "autocast", bf16: bool = False
) -> Iterator[None]:
    """Draw with a loaded model's averaged weights: from a seed (None: as it comes), without gradients.

    Args:
        model: on its device.
        seed: set here, after loading, so that the pictures depend on it alone and not on how many numbers the constructors drew.
        precision, bf16: see `precision_scope`.
    """
    if seed is not None:
        seed_everything(seed, verbose=False)
    with torch.no_grad(), inference.precision_scope(model.device, precision, bf16), model.ema_scope():
        yield


@contextlib.contextmanager
def drawing(model: Any, made: Finished, opt: argparse.Namespace) -> Iterator[None]:
    """`computing` as the flags say. Ctrl-C within ends the block, not the program; a gallery gets its grid all the same.

    Args:
        model: on its device.
        made: what the block adds to.
        opt: `seed`, and the flags of `add_device_arguments`.
    """
    with computing(model, opt.seed, opt.precision, opt.bf16):
        with made.until_stopped():
            yield
        if isinstance(made, Gallery):
            made.close()
