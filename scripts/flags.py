"""What the command lines of the sampling scripts share: flags, and the model that is meant where none is named."""

from __future__ import annotations

import argparse
import contextlib
import logging
from pathlib import Path
from typing import Any

from ldm import inference
from ldm.lora import load_lora
from taming.checkpoint import find_run

__all__ = [
    "FAMILIES", "add_adapters", "add_model_arguments", "add_output_arguments", "add_text_arguments", "family_of", "fill_config", "fill_defaults", "split_weight",
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


def add_model_arguments(parser: argparse.ArgumentParser) -> Any:
    """The flags that say what to compute with; returns their group."""
    model = parser.add_argument_group("model")
    model.add_argument(
        "--ckpt", help="a training run's folder (logs/…), or a checkpoint; default: the newest run in logs/"
    )
    model.add_argument("--config", help="configuration of the checkpoint; default: the one that lies with it")
    model.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:WEIGHT]",
        help="low-rank adapters, of kohya's, diffusers' or peft's layout; may be given several times",
    )
    model.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    model.add_argument(
        "--precision",
        choices=["full", "autocast"],
        default="autocast",
        help="half precision on a GPU, or none",
    )
    model.add_argument("--bf16", action="store_true", help="bfloat16 instead")
    model.add_argument("--seed", type=int, default=42, help="for reproducible pictures")
    return model


def add_output_arguments(parser: argparse.ArgumentParser, outdir: str | None) -> Any:
    """The flags of numbered pictures and their grid; returns their group."""
    output = parser.add_argument_group("output")
    output.add_argument("--outdir", nargs="?", default=outdir, help="folder for the pictures")
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
    if opt.ckpt is None:
        published = Path(PUBLISHED_V1[1])
        runs = sorted(Path("logs").glob("*/checkpoints/last.ckpt"), key=lambda p: p.stat().st_mtime)
        if opt.config is None and runs:
            opt.ckpt = str(runs[-1].parents[1])
            logging.info("Sampling from the newest run: %s", opt.ckpt)
        elif published.is_file():
            opt.config, opt.ckpt = opt.config or PUBLISHED_V1[0], str(published)
        else:
            raise inference.InferenceError(
                f"name a model with --ckpt: a training run's folder or a checkpoint (there is none in logs/, nor at {published})"
            )
    opt.outdir = opt.outdir or "outputs/txt2img-samples"
    for key, value in FAMILIES[family_of(opt)].items():
        if getattr(opt, key, None) is None:
            setattr(opt, key, value)
