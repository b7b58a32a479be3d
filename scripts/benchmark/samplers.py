"""The samplers beside diffusers' schedulers: what a step costs without its network, turn by turn in one run.

    python scripts/benchmark/samplers.py                                     # the quickstart's geometry, on the CPU
    python scripts/benchmark/samplers.py --model v1 --device cuda --dtype fp16

Prints milliseconds a step (median) with a network that costs nothing, both with classifier-free guidance, those of a step of the
real UNet with guidance, and the first as a share of the second. diffusers comes with the `dev` extra.
"""

from __future__ import annotations

import argparse
import functools
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from ldm.inference import SAMPLERS
from ldm.models.diffusion.gaussian import GaussianSchedule
from scripts.benchmark.unet import DTYPES, MODELS, build, measure

SCHEDULERS = {
    "ddim": "DDIMScheduler", "plms": "PNDMScheduler", "dpm": "DPMSolverMultistepScheduler", "unipc": "UniPCMultistepScheduler",
    "deis": "DEISMultistepScheduler",
}  # fmt: skip


class Model(GaussianSchedule):
    """A schedule and any network, as the samplers want them."""

    parameterization, v_posterior = "eps", 0.0

    def __init__(self, network: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.register_schedule(timesteps=1000, linear_start=0.00085, linear_end=0.012)
        self.apply_model = network


@torch.no_grad()
def diffusers_run(
    name: str, model: Any, x: torch.Tensor, c: torch.Tensor, uc: torch.Tensor, steps: int
) -> torch.Tensor:
    """The loop of a pipeline: both conditions in one batch, guidance, the scheduler's step."""
    import diffusers

    options: dict[str, Any] = {"skip_prk_steps": True} if name == "plms" else {}
    scheduler = getattr(diffusers, SCHEDULERS[name])(
        trained_betas=model.betas.cpu().numpy(), steps_offset=1, **options
    )
    scheduler.set_timesteps(steps, device=x.device)
    both = torch.cat([uc, c])
    for t in scheduler.timesteps:
        inputs = scheduler.scale_model_input(torch.cat([x, x]), t)
        e_uncond, e_cond = model.apply_model(inputs, t.expand(len(inputs)), both).chunk(2)
        x = scheduler.step(e_uncond + 7.5 * (e_cond - e_uncond), t, x).prev_sample
    return x


def our_run(
    name: str, model: Any, x: torch.Tensor, c: torch.Tensor, uc: torch.Tensor, steps: int
) -> torch.Tensor:
    """The sampler with guidance."""
    out, _ = SAMPLERS[name](model).sample(
        steps, len(x), x.shape[1:], c, x_T=x, unconditional_guidance_scale=7.5, unconditional_conditioning=uc, verbose=False
    )  # fmt: skip
    return out


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="small")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="fp32", help="of the network; latents stay in fp32"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def main() -> None:
    opt = arguments()
    torch.set_num_threads(opt.threads)
    torch.manual_seed(0)
    m, dtype = MODELS[opt.model], DTYPES[opt.dtype]
    unet = build(opt.model)[0].eval().requires_grad_(False).to(opt.device, dtype)
    x = torch.randn(opt.batch, 4, m["size"], m["size"], device=opt.device)
    c, uc = (torch.randn(opt.batch, m["context"][1], m["context"][0], device=opt.device) for _ in range(2))
    answer = torch.randn(2 * opt.batch, *x.shape[1:], device=opt.device)
    stub = Model(lambda x, t, c: answer).to(opt.device)
    both, t = torch.cat([c, uc]).to(dtype), torch.zeros(2 * opt.batch, device=opt.device)
    with torch.no_grad():
        inputs = torch.cat([x, x]).to(dtype)
        step = measure({"step": lambda: unet(inputs, t, context=both)}, opt.rounds, opt.device)["step"]
    machine = (
        torch.cuda.get_device_name() if opt.device == "cuda" else platform.processor() or platform.machine()
    )
    print(
        f"{opt.model}, batch {opt.batch}, {opt.dtype}, {opt.steps} steps, {machine}, {opt.threads} threads, torch {torch.__version__}\n"
        f"  a step of the UNet with guidance: {step * 1e3:.2f} ms"
    )
    for name in (n for n in SAMPLERS if n != "flow"):  # the stub predicts noise
        runs: dict[str, Callable[[], Any]] = {
            who: functools.partial(run, name, stub, x, c, uc, opt.steps)
            for who, run in (("ours", our_run), ("diffusers", diffusers_run))
        }
        ours, theirs = (s / opt.steps for s in measure(runs, opt.rounds, opt.device).values())
        print(
            f"  {name}: ours {ours * 1e3:.3f} ms a step, diffusers {theirs * 1e3:.3f} ms, ratio {ours / theirs:.2f}; "
            f"{100 * ours / step:.2f} % of the network's step"
        )


if __name__ == "__main__":
    main()
