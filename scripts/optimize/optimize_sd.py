"""Write a copy of a model that is ready to draw, and say what that costs and saves.

    python scripts/optimize/optimize_sd.py model.ckpt fast --config configs/stable-diffusion/v1-inference.yaml
    python scripts/optimize/optimize_sd.py logs/<run> fast --dtype bf16 --quantize int8
    python scripts/txt2img.py --ckpt fast --prompt "red heart"

The copy, DST/model.safetensors with its config.yaml, has the averaged weights in the place of the live ones, in half precision, and
nothing that is for training alone. --quantize writes the linear layers of the network in 8 bits (python -m pip install torchao). Both
models then draw the same picture: DST/report.json has their size, memory, seconds a picture and the distance of the pictures, which
are DST/before.png and after.png.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout first, whatever else owns `ldm`

import numpy as np
import torch
from omegaconf import OmegaConf
from PIL import Image

from ldm import inference, inference_images, quantization
from ldm.inference import CLASS_KEYS, TEXT_KEYS, InferenceError
from ldm.inference_images import Finished
from taming.checkpoint import files_of, load_model_from_config, save_safetensors
from taming.util import atomic_path

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PROMPT = "a photograph of an astronaut riding a horse"


def get_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("src", help="a training run's folder, or a checkpoint")
    parser.add_argument("dst", help="folder for the copy; it must not hold one already")
    parser.add_argument(
        "--config", help="configuration of the checkpoint; default: the one that lies with it"
    )
    parser.add_argument(
        "--dtype", choices=sorted(DTYPES), default="fp16", help="of the weights; default: fp16"
    )
    parser.add_argument(
        "--quantize", choices=sorted(quantization.KINDS), help="the network's linear layers in 8 bits"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    report = parser.add_argument_group("the pictures to compare")
    report.add_argument("--no_report", action="store_true", help="write the copy alone")
    report.add_argument("--prompt", default=PROMPT, help="for models of text")
    report.add_argument("--steps", type=int, default=20, help="of DDIM")
    report.add_argument("--seed", type=int, default=42, help="of the noise")
    return parser


# ---------------------------------------------------------------------------------------------------------------- copy


def keep_averages(model: Any) -> None:
    """Put the averaged weights in the place of the live ones, for good."""
    if model.use_ema:
        model.model_ema.copy_to(model.model)
        del model.model_ema
        model.use_ema = False


def stripped(config: Any) -> Any:
    """The configuration of the copy: the model alone, without averages."""
    config = OmegaConf.create({"model": config.model})
    if "use_ema" in config.model.params or not config.model.target.startswith("sgm."):
        config.model.params.use_ema = False  # ldm's default is on
    return config


def write_copy(model: Any, config: Any, opt: argparse.Namespace, source: Path) -> Path:
    """Write the copy; returns its weights' path. The model is the copy afterwards."""
    folder = Path(opt.dst)
    folder.mkdir(parents=True, exist_ok=True)
    keep_averages(model)
    notes = {"source": source.name, "source_sha256": inference.file_hash(source), "dtype": opt.dtype}
    target = folder / "model.safetensors"
    if opt.quantize:
        quantization.quantize(model, opt.quantize)
        for name, value in model.named_parameters():
            if not name.startswith("model."):  # the quantised network stays as torchao made it
                value.data = value.data.to(torch.float32)
        quantization.save_quantized(model, target, opt.quantize, notes)
    else:
        floating = {name for name, value in model.named_parameters() if value.is_floating_point()}
        # buffers stay: a noise schedule in half precision is none
        state = {k: v.to(DTYPES[opt.dtype]) if k in floating else v for k, v in model.state_dict().items()}
        save_safetensors({k: v for k, v in state.items() if not k.startswith("loss.")}, target, notes)
    with atomic_path(folder / "config.yaml") as temporary:
        OmegaConf.save(stripped(config), temporary)
    return target


# -------------------------------------------------------------------------------------------------------------- report


def weights_in_memory(model: torch.nn.Module) -> int:
    """Bytes of a model's parameters and buffers, averages included."""
    total = 0
    for value in (*model.parameters(), *model.buffers()):
        inner = getattr(value, "qdata", None)  # of a quantised tensor, whose own type is that of its results
        total += value.numel() * (value if inner is None else inner).element_size()
    return total


def measure(
    model: Any, opt: argparse.Namespace, dtype: torch.dtype | None
) -> tuple[dict[str, Any], Image.Image]:
    """Seconds a picture, memory, and the picture.

    Raises:
        InferenceError: a model that wants more than a text, a class or nothing.
    """
    key, reads = model.cond_stage_key, model.model.conditioning_key is not None
    if reads and key not in (*TEXT_KEYS, *CLASS_KEYS):
        raise InferenceError(
            f"pictures are compared for models of text, classes or nothing, not of {key!r}: --no_report"
        )
    asked: dict[str, Any] = {}
    if reads:
        asked = {"prompt": opt.prompt} if key in TEXT_KEYS else {"condition": 0}
    cuda = model.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()

    def draw(steps: int) -> Any:
        made = model.generate(num_steps=steps, generator=opt.seed, dtype=dtype, progress=False, **asked)
        return made[0] if isinstance(made, list) else made

    draw(1)  # the first call prepares kernels
    began = time.perf_counter()
    picture = draw(opt.steps)
    figures = {"seconds": time.perf_counter() - began, "weights_bytes": weights_in_memory(model)}
    if cuda:
        figures["peak_bytes"] = torch.cuda.max_memory_allocated()
    return figures, picture


def distance(before: Image.Image, after: Image.Image) -> dict[str, float]:
    """How far two pictures are apart, in levels of 255 and in dB."""
    a, b = (np.asarray(picture, np.float64) for picture in (before, after))
    rms = float(np.sqrt(np.mean((a - b) ** 2)))
    psnr = float("inf") if rms == 0 else 20 * float(np.log10(255 / rms))
    return {"rms": rms, "largest": float(np.abs(a - b).max()), "psnr_db": psnr}


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    rows = [("", "before", "after")]
    for key, what, unit, digits in (
        ("file_bytes", "file", 1e6, 1), ("weights_bytes", "weights in memory", 1e6, 1), ("peak_bytes", "peak on the GPU", 1e6, 1),
        ("seconds", "seconds a picture", 1, 3),
    ):  # fmt: skip
        if key in report["before"]:
            before, after = (f"{report[side][key] / unit:.{digits}f}" for side in ("before", "after"))
            rows.append((f"{what}{', MB' if unit > 1 else ''}", before, after))
    far = report["distance"]
    lines = [f"{what:<24}{before:>12}{after:>12}" for what, before, after in rows]
    return "\n".join(
        [*lines, f"distance of the pictures: {far['rms']:.2f} of 255 (rms), {far['psnr_db']:.1f} dB"]
    )


def drawing_precision(opt: argparse.Namespace) -> torch.dtype | None:
    """What the copy computes in: bfloat16 if its weights are; else what the device does by default."""
    return torch.bfloat16 if opt.dtype == "bf16" and not opt.quantize else None


def load_copy(target: Path, opt: argparse.Namespace, device: torch.device) -> Any:
    """The copy as it is drawn with: its weights stay in half precision where the device computes so."""
    config = OmegaConf.load(target.with_name("config.yaml"))
    if opt.quantize:
        return quantization.load_quantized(config, target, device)
    half = device.type == "cuda" or opt.dtype == "bf16"
    return load_model_from_config(config, target, device, dtype=DTYPES[opt.dtype] if half else None)


def run(opt: argparse.Namespace) -> Finished:
    """Load, write, compare."""
    made = Finished(Path(opt.dst))
    if (made.folder / "model.safetensors").exists():
        raise InferenceError(f"{made.folder} holds a model.safetensors already; nothing is overwritten")
    device = inference.choose_device(opt.device)
    model, source, config = inference.load_model(opt.src, opt.config, device)
    inference_images.require_diffusion(model)
    before = None if opt.no_report else measure(model, opt, None)
    target = write_copy(model, config, opt, source)
    made.files += [target.with_name("config.yaml"), target]
    del model
    if before is not None:
        after = measure(load_copy(target, opt, device), opt, drawing_precision(opt))
        report = {
            "before": {"file_bytes": sum(f.stat().st_size for f in files_of(source)), **before[0]}, "after": {"file_bytes": target.stat().st_size, **after[0]},
            "distance": distance(before[1], after[1]), "device": str(device), "dtype": opt.dtype, "quantize": opt.quantize,
            "steps": opt.steps, "seed": opt.seed,
        }  # fmt: skip
        for name, (_, picture) in (("before", before), ("after", after)):
            made.save(picture, made.folder / f"{name}.png", {"seed": opt.seed, "steps": opt.steps})
        with atomic_path(made.folder / "report.json") as temporary:
            Path(temporary).write_text(json.dumps(report, indent=2) + "\n")
        made.files.append(made.folder / "report.json")
        print(table(report))
    return made


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    opt = get_parser().parse_args(argv)
    try:
        return inference_images.report(lambda: run(opt))
    except ImportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
