"""The UNet beside diffusers' and beside a plain softmax: the same weights, the same inputs, turn by turn in one run.

    python scripts/benchmark/unet.py                                             # the quickstart's geometry, on the CPU
    python scripts/benchmark/unet.py --model v1 --batch 1 --rounds 3 --skip_training
    python scripts/benchmark/unet.py --model v1 --device cuda --dtype fp16

Prints milliseconds a step (median), how many times faster ours is, and how far the outputs are apart. diffusers comes with the
`dev` extra.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import nn

from ldm.modules.diffusionmodules.openaimodel import UNetModel
from scripts.benchmark.common import DTYPES, compared, machine, measure, parser, plain_softmax, start

# channels of the first level, multiples, blocks a level, size of latents, width and length of the context, width of heads
MODELS: dict[str, dict[str, Any]] = {
    "small": {"ch": 64, "mult": [1, 2, 3], "blocks": 2, "size": 16, "context": (256, 24), "head": 32},
    "v1": {"ch": 320, "mult": [1, 2, 4, 4], "blocks": 2, "size": 64, "context": (768, 77), "head": 40},
}


def build(name: str) -> tuple[nn.Module, nn.Module]:
    """Ours and diffusers', sharing the same random weights."""
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
    peer.load_state_dict(
        convert_ldm_unet_checkpoint(weights, dict(peer.config)), assign=True
    )  # one copy in memory
    return ours, peer


@torch.no_grad()
def draw(opt: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents, times and contexts."""
    m = MODELS[opt.model]
    x = torch.randn(opt.batch, 4, m["size"], m["size"])
    t, context = (
        torch.randint(0, 1000, (opt.batch,)),
        torch.randn(opt.batch, m["context"][1], m["context"][0]),
    )
    return x.to(opt.device), t.to(opt.device), context.to(opt.device)


def training(
    opt: argparse.Namespace, nets: dict[str, nn.Module], calls: dict[str, Callable[..., Any]]
) -> None:
    """Forward and backward pass."""
    x, t, context = draw(opt)
    dtype = DTYPES[opt.dtype]

    def step(name: str) -> None:
        nets[name].zero_grad(set_to_none=True)
        with torch.autocast(opt.device, dtype=dtype, enabled=dtype != torch.float32):
            loss = calls[name](x, t, context).float().square().mean()
        loss.backward()

    seconds = measure({name: lambda name=name: step(name) for name in nets}, opt.rounds, opt.device)
    print(f"  training step: {compared(seconds)}", flush=True)


@torch.no_grad()
def inference(
    opt: argparse.Namespace, nets: dict[str, nn.Module], calls: dict[str, Callable[..., Any]]
) -> None:
    """Forward pass, the plain softmax included."""
    x, t, context = draw(opt)
    x, context = (a.to(DTYPES[opt.dtype]) for a in (x, context))
    for net in nets.values():
        net.eval().requires_grad_(False).to(DTYPES[opt.dtype])

    def plain() -> torch.Tensor:
        with plain_softmax():
            return calls["ours"](x, t, context)

    ways = {name: lambda call=call: call(x, t, context) for name, call in calls.items()} | {
        "plain softmax": plain
    }
    first, second, _ = (way().float() for way in ways.values())
    print(f"  inference: {compared(measure(ways, opt.rounds, opt.device))}")
    apart = float((first - second).abs().max() / second.std())
    print(f"  largest difference of the outputs: {apart:.1e} of their deviation")


def main() -> None:
    options = parser(__doc__, MODELS, "small", rounds=10)
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--skip_training", action="store_true")
    opt = start(options)
    ours, peer = (net.to(opt.device) for net in build(opt.model))
    size = sum(p.numel() for p in ours.parameters()) / 1e6
    print(f"{opt.model}: {size:.1f} M parameters, batch {opt.batch}, {machine(opt)}", flush=True)
    nets = {"ours": ours, "diffusers": peer}
    calls: dict[str, Callable[..., Any]] = {
        "ours": lambda x, t, c: ours(x, t, context=c),
        "diffusers": lambda x, t, c: peer(x, t, c).sample,
    }
    if not opt.skip_training:
        training(opt, nets, calls)
    inference(opt, nets, calls)


if __name__ == "__main__":
    main()
