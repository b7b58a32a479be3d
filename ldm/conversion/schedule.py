"""Noise schedules ⇄ the configurations of diffusers' schedulers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def scheduler_config(model: Any) -> dict[str, Any]:
    """The configuration of diffusers' scheduler: DDIM for models of `ldm`'s make, Euler for those of `sgm`'s."""
    if (
        type(getattr(model, "denoiser", None)).__name__ == "Denoiser"
    ):  # of any noise level, as models of video have
        return _video_scheduler_config(model)
    betas = _betas_of(model)
    of_sgm = hasattr(model, "denoiser")
    scaling = type(getattr(getattr(model, "denoiser", None), "scaling", None)).__name__
    kind = getattr(model, "parameterization", "v" if scaling.startswith("V") else "eps")
    predictions = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
    if kind not in predictions:
        raise ValueError(
            f"parameterization={kind!r}: diffusers' schedulers here have {', '.join(predictions)}"
        )
    own: dict[str, Any] = {"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False}
    if of_sgm:
        own = {
            "_class_name": "EulerDiscreteScheduler",
            "interpolation_type": "linear",
            "use_karras_sigmas": False,
        }
    return {
        **own, **betas_config(betas), "num_train_timesteps": len(betas), "prediction_type": predictions[kind],
        "steps_offset": 1, "timestep_spacing": "leading",
    }  # fmt: skip


def _video_scheduler_config(model: Any) -> dict[str, Any]:
    """The configuration of diffusers' Euler scheduler: EDM's noise levels, up to SVD's unless the model has a sampler of its own.

    Raises:
        ValueError: the network predicts something else than v, told ¼ ln σ.
    """
    scaling = type(model.denoiser.scaling).__name__
    if scaling != "VScalingWithEDMcNoise":
        raise ValueError(
            f"the denoiser's scaling is {scaling}; diffusers' scheduler of video pipelines has VScalingWithEDMcNoise only"
        )
    levels = getattr(getattr(model, "sampler", None), "discretization", None)
    return {
        "_class_name": "EulerDiscreteScheduler", "prediction_type": "v_prediction", "timestep_type": "continuous",
        "use_karras_sigmas": True, "sigma_min": getattr(levels, "sigma_min", 0.002), "sigma_max": getattr(levels, "sigma_max", 700.0),
        "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000,
        "interpolation_type": "linear", "timestep_spacing": "leading", "steps_offset": 1,
    }  # fmt: skip


def betas_config(betas: Tensor) -> dict[str, Any]:
    """diffusers' words for a schedule's β (T,): a kind of run and its ends, or all of them."""
    for digits in (4, 7):  # a table of σ in single precision says the ends to four digits
        start, end = (float(f"{float(betas[i]):.{digits}g}") for i in (0, -1))
        kinds = {
            "scaled_linear": torch.linspace(start**0.5, end**0.5, len(betas), dtype=torch.float64) ** 2,
            "linear": torch.linspace(start, end, len(betas), dtype=torch.float64),
        }
        for kind, run in kinds.items():
            if torch.allclose(run, betas.double(), rtol=3e-4, atol=0):
                return {"beta_schedule": kind, "beta_start": start, "beta_end": end}
    return {"trained_betas": betas.tolist()}


def _betas_of(model: Any) -> Tensor:
    """The schedule's β (T,), in double precision.

    Raises:
        ValueError: the model has no table of noise levels.
    """
    if hasattr(model, "betas"):
        return model.betas.double().cpu()
    sigmas = getattr(getattr(model, "denoiser", None), "sigmas", None)
    if sigmas is None:
        raise ValueError(
            f"{type(model).__name__} knows no table of noise levels, as diffusers' schedulers of this kind want"
        )
    return betas_of_sigmas(sigmas)


def betas_of_sigmas(sigmas: Tensor) -> Tensor:
    """β (T,) of a table of noise levels σ² = (1 - ᾱ) / ᾱ, in double precision."""
    bar = 1 / (1 + sigmas.double().cpu().sort().values ** 2)
    return 1 - bar / torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]])
