"""The samplers beside diffusers' schedulers: what a step costs without its network, turn by turn in one run.

    python scripts/benchmark/samplers.py                                     # the quickstart's geometry, on the CPU
    python scripts/benchmark/samplers.py --model v1 --device cuda --dtype fp16

Prints milliseconds a step (median) with a network that costs nothing, both with classifier-free guidance, how many times faster
ours is, and ours as a share of a step of the real UNet with guidance. Latents stay in fp32. diffusers comes with the `dev` extra.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from ldm.inference import SAMPLERS
from ldm.models.diffusion.gaussian import GaussianSchedule
from scripts.benchmark.common import DTYPES, compared, machine, measure, parser, start
from scripts.benchmark.unet import MODELS, build

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


def main() -> None:
    options = parser(__doc__, MODELS, "small", rounds=10)
    options.add_argument("--batch", type=int, default=1)
    options.add_argument("--steps", type=int, default=20)
    opt = start(options)
    m, dtype = MODELS[opt.model], DTYPES[opt.dtype]
    unet = build(opt.model)[0].eval().requires_grad_(False).to(opt.device, dtype)
    x = torch.randn(opt.batch, 4, m["size"], m["size"], device=opt.device)
    c, uc = (torch.randn(opt.batch, m["context"][1], m["context"][0], device=opt.device) for _ in range(2))
    answer = torch.randn(2 * opt.batch, *x.shape[1:], device=opt.device)
    stub = Model(lambda x, t, c: answer).to(opt.device)
    both, t = torch.cat([c, uc]).to(dtype), torch.zeros(2 * opt.batch, device=opt.device)
    with torch.no_grad():
        inputs = torch.cat([x, x]).to(dtype)
        step = measure({"step": lambda: unet(inputs, t, context=both)}, min(opt.rounds, 3), opt.device)[
            "step"
        ]
    print(f"{opt.model}, batch {opt.batch}, {opt.steps} steps, {machine(opt)}")
    print(f"  a step of the UNet with guidance: {step * 1e3:.2f} ms", flush=True)
    for name in (n for n in SAMPLERS if n != "flow"):  # the stub predicts noise
        runs = {
            who: functools.partial(run, name, stub, x, c, uc, opt.steps)
            for who, run in (("ours", our_run), ("diffusers", diffusers_run))
        }
        seconds = {who: s / opt.steps for who, s in measure(runs, opt.rounds, opt.device).items()}
        print(f"  {name}: {compared(seconds)}; {100 * seconds['ours'] / step:.3f} % of the network's step")


if __name__ == "__main__":
    main()
