"""What the benchmarks share: their options, the machine's name, measuring turn by turn, and the plain softmax to compare with."""

from __future__ import annotations

import argparse
import contextlib
import platform
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CPU_INFO = Path("/proc/cpuinfo")
# where the networks look attention up
ATTENTION_USERS = ("ldm.modules.attention", "taming.modules.diffusionmodules.blocks")


def parser(doc: str | None, models: Collection[str], model: str, rounds: int) -> argparse.ArgumentParser:
    """The options of every benchmark.

    Args:
        doc: the script's docstring.
        models: names of geometries.
        model: the geometry without an option.
        rounds: how often each way is measured without an option.
    """
    out = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--model", choices=models, default=model)
    out.add_argument(
        "--rounds", type=int, default=rounds, help="measurements of each way, after one to warm up"
    )
    out.add_argument("--device", default="cpu")
    out.add_argument(
        "--dtype", choices=DTYPES, default="fp32", help="of the weights; in training, of autocast"
    )
    out.add_argument("--threads", type=int, default=torch.get_num_threads())
    return out


def start(options: argparse.ArgumentParser) -> argparse.Namespace:
    """The options given; threads and seed are set."""
    opt = options.parse_args()
    torch.set_num_threads(opt.threads)
    torch.manual_seed(0)
    return opt


def machine(opt: argparse.Namespace) -> str:
    """What it runs on, for a headline."""
    return f"{opt.dtype}, {_processor(opt.device)}, {opt.threads} threads, torch {torch.__version__}"


def _processor(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    lines = CPU_INFO.read_text().splitlines() if CPU_INFO.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def measure(calls: Mapping[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, float]:
    """Median seconds of each call, taken turn by turn after one round to warm up, so that a busy machine slows all alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            before = time.perf_counter()
            call()
            if device.startswith("cuda"):
                torch.cuda.synchronize(device)
            if i:
                times[name].append(time.perf_counter() - before)
    return {name: statistics.median(t) for name, t in times.items()}


def compared(seconds: Mapping[str, float]) -> str:
    """Milliseconds of the first way, and of each other one with how many times faster than it the first one is."""
    (name, ours), *others = seconds.items()
    rest = (f"{other} {s * 1e3:.1f} ms ({s / ours:.2f}x)" for other, s in others)
    return f"{name} {ours * 1e3:.1f} ms; {', '.join(rest)}"


def plain_attention(q: Tensor, k: Tensor, v: Tensor, heads: int = 1, *args: Any) -> Tensor:
    """The baseline: all scores at once, softmax in float32; (b, n, heads · d) as `attention` has it, without masks."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return (scores.float().softmax(dim=-1).to(v.dtype) @ v).transpose(1, 2).flatten(2)


@contextlib.contextmanager
def plain_softmax() -> Iterator[None]:
    """Within, our networks attend as the baseline does."""
    with contextlib.ExitStack() as stack:
        for user in ATTENTION_USERS:
            stack.enter_context(mock.patch(f"{user}.attention", plain_attention))
        yield
