"""The first stage's decoder: memory whole and in tiles, and speed beside diffusers' and a plain softmax.

    python scripts/benchmark/vae.py memory --size 2048              # SD-1's decoder, random weights, one process a way
    python scripts/benchmark/vae.py memory --ways blended whole --size 1024
    python scripts/benchmark/vae.py speed --size 512                # needs diffusers (the `dev` extra)

`memory` prints the process's peak (weights and torch's own ~0.5 GB included), seconds, and the relative L2 distance to the
exact way, which equals the whole to rounding. `speed` prints medians, taken turn by turn.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn

from ldm.models.autoencoder import AutoencoderKL

DDCONFIGS: dict[str, dict[str, Any]] = {
    "v1": {"ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2},
    "small": {"ch": 32, "ch_mult": [1, 2, 4], "num_res_blocks": 1},
}
WAYS: dict[str, dict[str, Any] | None] = {"whole": None, "blended": {}, "exact": {"exact": True}}


def build(name: str) -> AutoencoderKL:
    """An autoencoder with random weights, the same in every process."""
    torch.manual_seed(0)
    ddconfig = {
        "double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "attn_resolutions": [], "dropout": 0.0,
        **DDCONFIGS[name],
    }  # fmt: skip
    model = AutoencoderKL(ddconfig, {"target": "torch.nn.Identity"}, embed_dim=4)
    return model.eval().requires_grad_(False)


def latents(model: AutoencoderKL, size: int) -> Tensor:
    """Smooth latents, as those of pictures are: noise of a sixteenth of the resolution, enlarged."""
    side = size // 2 ** (model.decoder.num_resolutions - 1)
    noise = torch.randn(
        1, 4, max(1, side // 16), max(1, side // 16), generator=torch.Generator().manual_seed(1)
    )
    return nn.functional.interpolate(noise, size=(side, side), mode="bicubic")


def decode_once(opt: argparse.Namespace) -> None:
    """One decoding in this process; the picture goes to `opt.out`, the figures to the standard output."""
    model = build(opt.model)
    options = WAYS[opt.way]
    if options is not None:
        model.enable_tiling(size=opt.tile, overlap=opt.overlap, **options)
    z = latents(model, opt.size)
    start = time.perf_counter()
    with torch.no_grad():
        picture = model.decode(z)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform != "darwin" else 2**30)
    torch.save(picture, opt.out)
    print(json.dumps({"seconds": seconds, "peak": peak}))


def memory(opt: argparse.Namespace) -> None:
    """Each way in a process of its own, so that peaks do not mix."""
    print(f"{opt.model}, {opt.size} x {opt.size}, tiles of {opt.tile}, {machine(opt)}")
    pictures: dict[str, Tensor] = {}
    with tempfile.TemporaryDirectory() as folder:
        for way in opt.ways:
            out = str(Path(folder) / way)
            done = subprocess.run(
                [
                    sys.executable, __file__, "once", "--way", way, "--out", out, "--model", opt.model, "--size", str(opt.size),
                    "--tile", str(opt.tile), "--overlap", str(opt.overlap), "--threads", str(opt.threads),
                ],
                capture_output=True, text=True,
            )  # fmt: skip
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["killed: out of memory?"])[-1]
                print(f"  {way}: failed ({last})")
                continue
            figures = json.loads(done.stdout.splitlines()[-1])
            pictures[way] = torch.load(out, weights_only=True)
            print(f"  {way}: peak {figures['peak']:.2f} GB, {figures['seconds']:.1f} s")
    reference = next((pictures[way] for way in ("whole", "exact") if way in pictures), None)
    for way, picture in pictures.items():
        if reference is not None and picture is not reference:
            print(
                f"  {way}: relative L2 distance {float((picture - reference).norm() / reference.norm()):.1e}"
            )


def plain_attention(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The baseline: all scores at once, softmax in float32."""
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    return scores.float().softmax(dim=-1).to(v.dtype) @ v


def peer_of(model: AutoencoderKL) -> nn.Module:
    """Diffusers' autoencoder with the same weights."""
    from diffusers import AutoencoderKL as Peer
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    decoder = model.decoder
    widths = [decoder.ch * m for m in DDCONFIGS["v1" if decoder.ch == 128 else "small"]["ch_mult"]]
    peer = Peer(
        block_out_channels=widths, latent_channels=4, layers_per_block=decoder.num_res_blocks,
        down_block_types=["DownEncoderBlock2D"] * len(widths), up_block_types=["UpDecoderBlock2D"] * len(widths),
    )  # fmt: skip
    weights = {f"first_stage_model.{k}": v for k, v in model.state_dict().items()}
    peer.load_state_dict(convert_ldm_vae_checkpoint(weights, dict(peer.config)))
    return peer.eval().requires_grad_(False)


@torch.no_grad()
def speed(opt: argparse.Namespace) -> None:
    """Ours, diffusers' and the plain softmax, turn by turn in one process."""
    model = build(opt.model).to(opt.device)
    peer: Any = peer_of(model).to(opt.device)
    z = latents(model, opt.size).to(opt.device)

    def plain() -> Tensor:
        with mock.patch("taming.modules.diffusionmodules.blocks.attention", plain_attention):
            return model.decode(z)

    ways: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: model.decode(z),
        "diffusers": lambda: peer.decode(z).sample,
        "plain softmax": plain,
    }
    print(f"{opt.model}, {opt.size} x {opt.size}, {machine(opt)}")
    times: dict[str, list[float]] = {way: [] for way in ways}
    pictures: dict[str, Tensor] = {}
    for i in range(opt.rounds + 1):
        for way, decode in ways.items():
            start = time.perf_counter()
            pictures[way] = decode()
            if opt.device == "cuda":
                torch.cuda.synchronize()
            if i:
                times[way].append(time.perf_counter() - start)
    ours = statistics.median(times["ours"])
    for way, seconds in times.items():
        median = statistics.median(seconds)
        distance = float((pictures[way] - pictures["ours"]).norm() / pictures["ours"].norm())
        print(
            f"  {way}: {median * 1e3:.0f} ms, ratio {median / ours:.2f}, relative L2 distance {distance:.0e}"
        )


def machine(opt: argparse.Namespace) -> str:
    """What it runs on."""
    name = (
        torch.cuda.get_device_name() if opt.device == "cuda" else platform.processor() or platform.machine()
    )
    return f"{name}, {opt.threads} threads, torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["memory", "speed", "once"], help="once: used by memory")
    parser.add_argument("--model", choices=DDCONFIGS, default="v1")
    parser.add_argument("--size", type=int, default=512, help="side of the picture in pixels")
    parser.add_argument("--tile", type=int, default=512)
    parser.add_argument("--overlap", type=float, default=0.25)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["blended", "exact"])
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    opt = parser.parse_args()
    torch.set_num_threads(opt.threads)
    {"memory": memory, "speed": speed, "once": decode_once}[opt.what](opt)


if __name__ == "__main__":
    main()
