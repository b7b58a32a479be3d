"""Write a checkpoint's weights as safetensors: smaller, safe to share, ready to load.

    python scripts/convert.py logs/<run> model.safetensors --ema --dtype fp16

SRC may be a training run's folder or any checkpoint; optimizer states and counters stay behind.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # this checkout first, whatever else owns `taming`

import torch

from taming.checkpoint import averaged_weights, find_run, load_state_dict, save_safetensors

DTYPES = {"keep": None, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def get_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("src", help="training run's folder, or checkpoint (.ckpt, .pt, .safetensors)")
    parser.add_argument("dst", help="file to write, .safetensors")
    parser.add_argument(
        "--ema", action="store_true", help="take the moving averages instead of the live weights"
    )
    parser.add_argument(
        "--dtype", choices=sorted(DTYPES), default="keep", help="type of the floating-point weights"
    )
    parser.add_argument(
        "--drop", nargs="*", default=[], metavar="PREFIX", help="leave out entries that begin so, e.g. loss."
    )
    parser.add_argument(
        "--metadata", nargs="*", default=[], metavar="KEY=VALUE", help="notes to store in the file"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    opt = get_parser().parse_args(argv)
    try:
        if not opt.dst.endswith(".safetensors"):
            raise ValueError(f"{opt.dst} must end in .safetensors")
        if wrong := [m for m in opt.metadata if "=" not in m]:
            raise ValueError(f"--metadata {wrong[0]}: write KEY=VALUE")
        source, _ = find_run(opt.src)
        weights = load_state_dict(source)
        weights = (
            averaged_weights(weights)
            if opt.ema
            else {k: v for k, v in weights.items() if not k.startswith("model_ema.")}
        )
        weights = {k: v for k, v in weights.items() if not k.startswith(tuple(opt.drop))}
        if (dtype := DTYPES[opt.dtype]) is not None:
            weights = {k: v.to(dtype) if v.is_floating_point() else v for k, v in weights.items()}
        save_safetensors(weights, opt.dst, dict(m.split("=", 1) for m in opt.metadata))
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    count = sum(v.numel() for v in weights.values())
    print(
        f"{opt.dst}: {len(weights)} tensors, {count / 1e6:.2f} M numbers, {Path(opt.dst).stat().st_size / 1e6:.2f} MB"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
