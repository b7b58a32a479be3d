"""The first stage's decoder: memory whole and in tiles, and speed beside diffusers' and a plain softmax.

    python scripts/benchmark/vae.py memory --size 2048              # SD-1's decoder, random weights, one process a way
    python scripts/benchmark/vae.py memory --ways blended whole --size 1024
    python scripts/benchmark/vae.py speed --size 512                # needs diffusers (the `dev` extra)
    python scripts/benchmark/vae.py seams --size 256 --tile 128 --out docs/gallery/tiled.png

`memory` prints the process's peak (weights and torch's own ~0.5 GB included), seconds, and the relative L2 distance to the
exact way, which equals the whole to rounding. `speed` prints medians, taken turn by turn, and how many times faster ours is.
`seams` decodes enlarged emoji with the quickstart's trained autoencoder, a row each: whole, in blended tiles and twenty times
their difference from the whole, in the exact way and twenty times its difference.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn

from ldm.models.autoencoder import AutoencoderKL
from scripts.benchmark.common import DTYPES, compared, machine, measure, parser, plain_softmax, start

DDCONFIGS: dict[str, dict[str, Any]] = {
    "v1": {"ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2},
    "small": {"ch": 32, "ch_mult": [1, 2, 4], "num_res_blocks": 1},
}
ROOT = Path(__file__).resolve().parents[2]
SEAMS = ("😀", "🍎")  # large plain surfaces, where a seam would show
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
    dtype = DTYPES[opt.dtype]
    model = build(opt.model).to(opt.device, dtype)
    peer: Any = peer_of(model).to(opt.device, dtype)
    z = latents(model, opt.size).to(opt.device, dtype)

    def plain() -> Tensor:
        with plain_softmax():
            return model.decode(z)

    ways: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: model.decode(z),
        "diffusers": lambda: peer.decode(z).sample,
        "plain softmax": plain,
    }
    print(f"{opt.model}, {opt.size} x {opt.size}, {machine(opt)}", flush=True)
    reference, *others = (decode().float() for decode in ways.values())
    print(f"  {compared(measure(ways, opt.rounds, opt.device))}")
    for way, picture in zip(list(ways)[1:], others, strict=True):
        print(f"  {way}: relative L2 distance {float((picture - reference).norm() / reference.norm()):.0e}")


@torch.no_grad()
def seams(opt: argparse.Namespace) -> None:
    """A picture of what tiles do to pictures."""
    from omegaconf import OmegaConf

    from ldm.inference import save_png, to_image
    from taming.checkpoint import load_model_from_config
    from taming.data.emoji import EmojiImages

    config = OmegaConf.load(ROOT / "configs/quickstart/autoencoder.yaml")
    model = load_model_from_config(config, ROOT / "models/quickstart/autoencoder.safetensors").eval()
    found = {e["symbol"]: e["image"] for e in EmojiImages(size=72, split="all") if e["symbol"] in SEAMS}
    small = torch.stack([torch.from_numpy(found[symbol]) for symbol in SEAMS]).permute(0, 3, 1, 2)
    # contiguous: PyTorch's group normalisation of channels-last maps on a CPU is off by 1e-4, and the exact way is not
    z = model.encode(nn.functional.interpolate(small.contiguous(), size=opt.size, mode="bicubic")).mode()
    whole = model.decode(z)
    columns = [whole]
    for way in ("blended", "exact"):
        model.enable_tiling(size=opt.tile, overlap=opt.overlap, **(WAYS[way] or {}))
        picture = model.decode(z)
        difference = (picture - whole).abs()
        columns += [picture, 20 * difference - 1]
        distance = float((picture - whole).norm() / whole.norm())
        print(
            f"  {way}: relative L2 distance {distance:.1e}, largest difference {float(difference.max()):.1e}"
        )
    grid = torch.cat([torch.cat(list(c), dim=1) for c in columns], dim=2)
    save_png(to_image((grid.clamp(-1, 1) + 1) / 2), Path(opt.out))


def main() -> None:
    options = parser(__doc__, DDCONFIGS, "v1", rounds=5)
    options.add_argument("what", choices=["memory", "speed", "seams", "once"], help="once: used by memory")
    options.add_argument("--size", type=int, default=512, help="side of the picture in pixels")
    options.add_argument("--tile", type=int, default=512)
    options.add_argument("--overlap", type=float, default=0.25)
    options.add_argument("--ways", nargs="+", choices=WAYS, default=["blended", "exact"])
    options.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options.add_argument("--out", default="tiled.png", help="file for the picture of `seams`")
    opt = start(options)
    {"memory": memory, "speed": speed, "seams": seams, "once": decode_once}[opt.what](opt)


if __name__ == "__main__":
    main()
