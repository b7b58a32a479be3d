"""Peak memory of loading a checkpoint, against the size of the weights: ours (streamed) beside torch.load and load_state_dict.

    python scripts/benchmark/memory.py --layers 64 --width 2048
    python scripts/benchmark/memory.py --dtype fp16 --suffix .ckpt

Each way runs in a process of its own; what is read off is the high-water mark of its resident memory (Linux).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(
    0, str(Path(__file__).resolve().parents[2])
)  # this checkout first, whatever else owns `taming`

import torch
from torch import nn

from taming.checkpoint import load_model_from_config, save_safetensors

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
WAYS = ("nothing", "streamed", "torch")


class Stack(nn.Sequential):
    """Square layers, the bulk of any network."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__(*(nn.Linear(width, width, bias=False) for _ in range(layers)))


def high_water() -> int:
    """The most resident memory that this process ever had, in bytes."""
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")
    )
    return int(line.split()[1]) * 1024


def measure(way: str, path: str, layers: int, width: int, dtype: str) -> int:
    """Load in this process, and say its high-water mark."""
    sys.modules["stack"] = sys.modules[__name__]
    config = {"target": "stack.Stack", "params": {"layers": layers, "width": width}}
    model: Any = None
    if way == "streamed":
        model = load_model_from_config(config, path, dtype=DTYPES[dtype])
    elif way == "torch":
        from safetensors.torch import load_file

        model = Stack(layers, width)
        state = load_file(path) if path.endswith(".safetensors") else torch.load(path, weights_only=True)
        model.load_state_dict(state)
        model = model.to(DTYPES[dtype])
    return high_water() if model is not None or way == "nothing" else 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=64)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument(
        "--dtype", choices=DTYPES, default="fp32", help="of the loaded model; the file has fp32"
    )
    parser.add_argument("--suffix", choices=[".safetensors", ".ckpt"], default=".safetensors")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--path", help=argparse.SUPPRESS)
    opt = parser.parse_args(argv)
    if opt.way:
        print(json.dumps(measure(opt.way, opt.path, opt.layers, opt.width, opt.dtype)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"weights{opt.suffix}"
        state = Stack(opt.layers, opt.width).state_dict()
        size = sum(v.numel() for v in state.values()) * DTYPES[opt.dtype].itemsize
        save_safetensors(state, path) if opt.suffix == ".safetensors" else torch.save(state, path)
        del state
        own = [f"--{k}={v}" for k, v in vars(opt).items() if v is not None]
        peaks = {}
        for way in WAYS:
            command = [sys.executable, __file__, *own, f"--way={way}", f"--path={path}"]
            peaks[way] = json.loads(
                subprocess.run(command, capture_output=True, text=True, check=True).stdout
            )
    print(f"weights of {size / 1e6:.0f} MB in {opt.dtype}, from {opt.suffix}")
    for way in WAYS[1:]:
        print(f"{way:10} peak {(peaks[way] - peaks['nothing']) / size:.2f} × the weights")
    return 0


if __name__ == "__main__":
    sys.exit(main())
