"""The UNet beside diffusers': the same weights, the same inputs, turn by turn in one run.

    python scripts/benchmark/unet.py                        # the quickstart's geometry, on the CPU
    python scripts/benchmark/unet.py --model v1 --device cuda --dtype fp16

Prints milliseconds a step (median), the ratio, and how far the outputs are apart. diffusers comes with the `dev` extra.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import nn

from ldm.modules.diffusionmodules.openaimodel import UNetModel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# channels of the first level, multiples, blocks a level, size of latents, width and length of the context, width of heads
MODELS: dict[str, dict[str, Any]] = {
    "small": {"ch": 64, "mult": [1, 2, 3], "blocks": 2, "size": 16, "context": (256, 24), "head": 32},
    "v1": {"ch": 320, "mult": [1, 2, 4, 4], "blocks": 2, "size": 64, "context": (768, 77), "head": 40},
}


def build(name: str) -> tuple[nn.Module, nn.Module]:
    """Ours and diffusers', with the same random weights."""
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    m = MODELS[name]
    widths = [m["ch"] * k for k in m["mult"]]
    heads = [w // m["head"] for w in widths] if name == "small" else 8  # v1 has 8 heads at every level
    last = len(widths) - 1
    ours = UNetModel(
        image_size=m["size"], in_channels=4, out_channels=4, model_channels=m["ch"], channel_mult=m["mult"], num_res_blocks=m["blocks"],
        attention_resolutions=[2**i for i in range(last + (name == "small"))], use_spatial_transformer=True, context_dim=m["context"][0],
        legacy=False, **({"num_head_channels": m["head"]} if name == "small" else {"num_heads": 8}),
    )  # fmt: skip
    for p in ours.parameters():
        nn.init.normal_(p, std=0.02)  # fresh output layers are zero, and zeros compare with anything
    plain_end = name != "small"  # the deepest level of v1 has no attention
    peer = UNet2DConditionModel(
        sample_size=m["size"], block_out_channels=widths, layers_per_block=m["blocks"], cross_attention_dim=m["context"][0],
        attention_head_dim=heads,
        down_block_types=["CrossAttnDownBlock2D"] * last + ["DownBlock2D" if plain_end else "CrossAttnDownBlock2D"],
        up_block_types=["UpBlock2D" if plain_end else "CrossAttnUpBlock2D"] + ["CrossAttnUpBlock2D"] * last,
    )  # fmt: skip
    weights = {f"model.diffusion_model.{k}": v for k, v in ours.state_dict().items()}
    peer.load_state_dict(convert_ldm_unet_checkpoint(weights, dict(peer.config)))
    return ours, peer


def measure(steps: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, float]:
    """Median seconds of each, taken turn by turn so that a busy machine slows all alike."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            if i >= 2:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="small")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="fp32", help="autocast while training, weights otherwise"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--skip_training", action="store_true")
    opt = parser.parse_args()
    torch.set_num_threads(opt.threads)
    torch.manual_seed(0)
    dtype, m = DTYPES[opt.dtype], MODELS[opt.model]
    ours, peer = (net.to(opt.device) for net in build(opt.model))
    x = torch.randn(opt.batch, 4, m["size"], m["size"], device=opt.device)
    t = torch.randint(0, 1000, (opt.batch,), device=opt.device)
    context = torch.randn(opt.batch, m["context"][1], m["context"][0], device=opt.device)
    calls: dict[str, Callable[..., torch.Tensor]] = {
        "ours": lambda x, c: ours(x, t, context=c),
        "diffusers": lambda x, c: peer(x, t, c).sample,
    }
    machine = (
        torch.cuda.get_device_name() if opt.device == "cuda" else platform.processor() or platform.machine()
    )
    print(
        f"{opt.model}: {sum(p.numel() for p in ours.parameters()) / 1e6:.1f} M parameters, batch {opt.batch}, {opt.dtype}, "
        f"{machine}, {opt.threads} threads, torch {torch.__version__}"
    )

    def training(call: Callable[..., torch.Tensor], net: nn.Module) -> None:
        net.zero_grad(set_to_none=True)
        with torch.autocast(opt.device, dtype=dtype, enabled=dtype != torch.float32):
            loss = call(x, context).float().square().mean()
        loss.backward()

    results = {}
    if not opt.skip_training:
        steps = {k: lambda k=k, n=n: training(calls[k], n) for k, n in (("ours", ours), ("diffusers", peer))}
        results["training step"] = measure(steps, opt.rounds, opt.device)
    ours.eval().requires_grad_(False).to(dtype)
    peer.eval().requires_grad_(False).to(dtype)
    with torch.no_grad():
        inference = {k: lambda call=call: call(x.to(dtype), context.to(dtype)) for k, call in calls.items()}
        first, second = (f().float() for f in inference.values())
        results["inference"] = measure(inference, opt.rounds, opt.device)
    for what, seconds in results.items():
        print(
            f"  {what}: ours {seconds['ours'] * 1e3:.1f} ms, diffusers {seconds['diffusers'] * 1e3:.1f} ms, "
            f"ratio {seconds['ours'] / seconds['diffusers']:.2f}"
        )
    print(
        f"  largest difference of the outputs: {float((first - second).abs().max() / second.std()):.1e} of their deviation"
    )


if __name__ == "__main__":
    main()
