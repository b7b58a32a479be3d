"""Stable Diffusion's weights under the names of `ldm` ⇄ those of `sgm`, with what each stores beside them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ldm.conversion.schedule import betas_config, betas_of_sigmas
from ldm.models.diffusion.gaussian import GaussianSchedule
from ldm.modules.diffusionmodules.util import make_beta_schedule

TEXT = {"ldm": "cond_stage_model.", "sgm": "conditioner.embedders.0."}
SHARED = ("model.", "model_ema.", "first_stage_model.")
SIGMAS = "denoiser.sigmas"


class Schedule(GaussianSchedule, nn.Module):
    """The tables of a noise schedule, without a model around them."""

    parameterization = "eps"
    v_posterior = 0.0


def layout_of(names: Mapping[str, object]) -> str | None:
    """Which of the two, "ldm" or "sgm"; None for weights of neither."""
    if any(name.startswith("conditioner.") or name == SIGMAS for name in names):
        return "sgm"
    return "ldm" if any(name.startswith(TEXT["ldm"]) or name == "alphas_cumprod" for name in names) else None


def to_sgm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a `LatentDiffusion` as those of a `DiffusionEngine` with one text embedder.

    The schedule becomes the denoiser's table of σ.

    Raises:
        ValueError: a model that `sgm` has no counterpart of.
    """
    if layout_of(state) == "sgm":
        return dict(state)
    if "betas" not in state:
        raise ValueError("the weights hold no schedule (betas), so they are no whole model of ldm's layout")
    start, end, steps = _linear(state["betas"])
    renamed = _rename(state, "ldm", "sgm", skip=[k for k in state if "." not in k])
    betas = torch.as_tensor(make_beta_schedule("linear", steps, start, end), dtype=torch.float64)
    bar = (1 - betas).cumprod(0)
    return {SIGMAS: ((1 - bar) / bar).sqrt().float(), **renamed}


def to_ldm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The way back: the schedule's buffers are computed anew, to the same bits.

    Raises:
        ValueError: a model that `ldm` has no counterpart of, such as SDXL.
    """
    if layout_of(state) == "ldm":
        return dict(state)
    if SIGMAS not in state:
        raise ValueError(f"the weights hold no table of noise levels ({SIGMAS}), as ldm's models have")
    renamed = _rename(state, "sgm", "ldm", skip=[SIGMAS])
    start, end, steps = _linear(betas_of_sigmas(state[SIGMAS]))
    schedule = Schedule()
    schedule.register_schedule(None, "linear", steps, start, end)
    return {**schedule.state_dict(), **renamed}


def _rename(state: Mapping[str, Tensor], source: str, target: str, skip: list[str]) -> dict[str, Tensor]:
    kept = {k: v for k, v in state.items() if k not in skip}
    known = (*SHARED, TEXT[source])
    if foreign := sorted({".".join(k.split(".")[:3]) for k in kept if not k.startswith(known)}):
        raise ValueError(
            f"{target} has no place for {foreign[0]}: only Stable Diffusion 1 and 2 with one text encoder exist in both layouts"
        )
    return {
        k.replace(TEXT[source], TEXT[target], 1) if k.startswith(TEXT[source]) else k: v
        for k, v in kept.items()
    }


def _linear(betas: Tensor) -> tuple[float, float, int]:
    config = betas_config(betas)
    if config.get("beta_schedule") != "scaled_linear":
        raise ValueError("the schedule is not linear in √β, as those of sgm's tables are")
    return config["beta_start"], config["beta_end"], len(betas)
