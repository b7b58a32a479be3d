"""Time every way to compute attention on this machine, for the shapes of a model, and record the fastest.

    python scripts/optimize/optimize_attention.py --config configs/stable-diffusion/v1-inference.yaml
    python scripts/optimize/optimize_attention.py --config configs/stable-diffusion/v2-inference-v.yaml --H 768 --W 768 --dtype fp16

No checkpoint is needed: the model is built without memory, and its calls are listed. What is recorded is used from then on by every
program of the library on this machine, where no gradients are wanted; a call for which PyTorch's own choice is as good is not recorded.
The record is a JSON file, ~/.cache/latent-generative-models/attention.json or $TAMING_ATTENTION; without it, all is as before.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout first, whatever else owns `ldm`

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.benchmark import Timer
from tqdm import tqdm

from ldm import inference
from ldm.inference import InferenceError
from taming.modules import attention
from taming.util import atomic_path, instantiate_from_config

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DEFAULT = "default"  # PyTorch's own choice
GAIN = 0.95  # share of the default's time that a choice must stay below
TOKENS = 77  # of a text, where a configuration does not tell


class Call(NamedTuple):
    """The shapes of a call: queries (b, heads, n, d), keys and values (b, heads, m, d)."""

    batch: int
    heads: int
    queries: int
    keys: int
    channels: int


def get_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="of a latent diffusion model, or of an engine of sgm")
    parser.add_argument("--H", type=int, default=512, help="height of the pictures in pixels")
    parser.add_argument("--W", type=int, default=512, help="width of the pictures in pixels")
    parser.add_argument("--n_samples", type=int, default=1, help="pictures a batch; guidance doubles it")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="default: fp16 on a GPU, else fp32")
    parser.add_argument("--seconds", type=float, default=0.2, help="least time for each measurement")
    parser.add_argument("--dry_run", action="store_true", help="print the times, record nothing")
    return parser


# --------------------------------------------------------------------------------------------------------------- calls


class CallList(TorchFunctionMode):
    """Notes the shapes of every attention that passes through the library's door, and how often they come."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Call] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention and (kwargs or {}).get("attn_mask") is None:
            q, k = args[:2]
            self.calls[Call(q.shape[0], q.shape[1], q.shape[2], k.shape[2], q.shape[3])] += 1
        return func(*args, **(kwargs or {}))


def network_inputs(network: Any, batch: int, size: tuple[int, int]) -> dict[str, Any]:
    """What a UNet is called with, without numbers."""
    inputs: dict[str, Any] = {
        "x": torch.zeros(batch, network.in_channels, *size),
        "timesteps": torch.zeros(batch),
    }
    readers = [m.to_k.in_features for name, m in network.named_modules() if name.endswith("attn2")]
    if readers:
        inputs["context"] = torch.zeros(batch, TOKENS, max(readers))
    labels = getattr(network, "label_emb", None)
    if isinstance(labels, torch.nn.Embedding):
        inputs["y"] = torch.zeros(batch, dtype=torch.long)
    elif labels is not None:
        first = next(m for m in labels.modules() if isinstance(m, torch.nn.Linear))
        inputs["y"] = torch.zeros(batch, first.in_features)
    return inputs


def calls_of(config: Any, height: int, width: int, batch: int) -> Counter[Call]:
    """The attention calls of one guided step of a model, and of decoding its latents.

    Raises:
        InferenceError: a model without a network to draw with, or one that cannot be called so.
    """
    params = config.model.get("params") or {}
    network_config = params.get("unet_config") or params.get("network_config")
    if network_config is None:
        raise InferenceError(f"a {config.model.target} has no network that draws")
    inference.forget_starting_points(config.model)
    with torch.device("meta"):
        network = instantiate_from_config(network_config).eval().requires_grad_(False)
        stage = instantiate_from_config(params.first_stage_config).eval().requires_grad_(False)
    encoder = getattr(stage, "encoder", None)
    factor = 1 if encoder is None else 2 ** (encoder.num_resolutions - 1)
    size = (height // factor, width // factor)
    # tensors of a CPU without numbers; a record is not used where gradients are, so that every call is seen
    with FakeTensorMode(allow_non_fake_inputs=True), torch.enable_grad(), CallList() as listed:
        try:
            network.to_empty(device="cpu")(**network_inputs(network, 2 * batch, size))
            if encoder is not None:
                stage.to_empty(device="cpu").decode(torch.zeros(batch, network.out_channels, *size))
        except (RuntimeError, NotImplementedError, TypeError) as error:
            raise InferenceError(
                f"the network cannot be called at {width}x{height} pixels: {error}"
            ) from error
    return listed.calls


# --------------------------------------------------------------------------------------------------------------- times


def explicit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention with all scores written out, as `taming.modules.attention` does it."""
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(dim=-1) @ v


@torch.no_grad()
def times_of(call: Call, device: torch.device, dtype: torch.dtype, seconds: float) -> dict[str, float]:
    """Seconds of a call by back-end; those that do not take it are left out."""
    q, k, v = (
        torch.randn(call.batch, n, call.heads, call.channels, device=device, dtype=dtype).transpose(1, 2)
        for n in (call.queries, call.keys, call.keys)
    )
    times = {}
    for name in (DEFAULT, *attention.BACKENDS, attention.EXPLICIT):
        work = explicit if name == attention.EXPLICIT else F.scaled_dot_product_attention
        allowed = (
            [attention.BACKENDS[name]] if name in attention.BACKENDS else list(attention.BACKENDS.values())
        )
        try:
            with sdpa_kernel(allowed):
                work(q, k, v)
                timer = Timer("work(q, k, v)", globals={"work": work, "q": q, "k": k, "v": v})
                times[name] = timer.blocked_autorange(min_run_time=seconds).median
        except (RuntimeError, torch.OutOfMemoryError):
            continue
    return times


def choose(times: dict[str, float]) -> str | None:
    """The back-end that beats PyTorch's own choice clearly, if one does."""
    best = min(times, key=lambda name: times[name])
    return best if best != DEFAULT and times[best] < GAIN * times[DEFAULT] else None


def record(found: dict[str, str | None], machine: str, path: Path) -> None:
    """Add choices to the file; those of other calls and machines stay."""
    try:
        known = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError:
        known = {}
    merged = {**known.get(machine, {}), **found}
    known[machine] = {name: backend for name, backend in sorted(merged.items()) if backend is not None}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        Path(temporary).write_text(json.dumps(known, indent=2) + "\n")
    attention.recorded_choices.cache_clear()


def run(opt: argparse.Namespace) -> int:
    """List, time, record."""
    if not Path(opt.config).is_file():
        raise InferenceError(f"--config {opt.config}: there is no such file")
    device = inference.choose_device(opt.device)
    dtype = DTYPES[opt.dtype or ("fp16" if device.type == "cuda" else "fp32")]
    calls = calls_of(OmegaConf.load(opt.config), opt.H, opt.W, opt.n_samples)
    if not calls:
        raise InferenceError("this model has no attention")
    machine = attention.machine_name(device)
    columns = (DEFAULT, *attention.BACKENDS, attention.EXPLICIT)
    print(f"{machine}; milliseconds a call")
    print(f"{'call':<34}{'times':>6}" + "".join(f"{name:>11}" for name in columns) + "  choice")
    found: dict[str, str | None] = {}
    gained = total = 0.0
    for call, count in tqdm(sorted(calls.items()), desc="Shapes", leave=False):
        times = times_of(call, device, dtype, opt.seconds)
        shape = torch.empty(call.batch, call.heads, call.queries, call.channels, dtype=dtype, device="meta")
        name = attention.call_name(shape, shape[:, :, :1].expand(-1, -1, call.keys, -1))
        found[name] = choose(times)
        total += count * times[DEFAULT]
        gained += count * (times[DEFAULT] - times[found[name] or DEFAULT])
        cells = "".join(f"{1e3 * times[c]:>11.3f}" if c in times else f"{'-':>11}" for c in columns)
        tqdm.write(f"{name:<34}{count:>6}{cells}  {found[name] or DEFAULT}")
    print(
        f"attention of one guided step and of decoding: {1e3 * total:.1f} ms, with these choices {1e3 * (total - gained):.1f} ms"
    )
    if not opt.dry_run:
        path = attention.choices_file()
        record(found, machine, path)
        print(f"recorded in {path}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    opt = get_parser().parse_args(argv)
    try:
        return run(opt)
    except (InferenceError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
