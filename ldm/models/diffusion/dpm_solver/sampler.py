"""DPM-Solver++ behind the samplers' common interface."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.models.diffusion.dpm_solver.dpm_solver import DPM_Solver, NoiseScheduleVP, model_wrapper
from ldm.models.diffusion.sampler import LatentSampler, batch_of
from ldm.modules.diffusionmodules.util import noise_like

logger = logging.getLogger(__name__)

MODEL_TYPES = {"eps": "noise", "v": "v", "x0": "x_start"}


class DPMSolverSampler(LatentSampler):
    """Multistep DPM-Solver++ of order 2: about 20 steps give what DDIM needs 50 for.

    Source: Lu et al. 2022b, algorithm 2.
    """

    @torch.no_grad()
    def sample(
        self,
        S: int,
        batch_size: int,
        shape: Sequence[int],
        conditioning: Any = None,
        callback: Any = None,
        normals_sequence: Any = None,
        img_callback: Any = None,
        quantize_x0: bool = False,
        eta: float = 0.0,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: Any = None,
        corrector_kwargs: Any = None,
        verbose: bool = True,
        x_T: Tensor | None = None,
        log_every_t: int = 100,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
        generator: torch.Generator | None = None,
        **ignored: Any,
    ) -> tuple[Tensor, None]:
        """Draw latents (batch_size, *shape); the arguments are those of `LatentSampler.sample`.

        This solver is deterministic and, as published, knows no masks, callbacks and intermediates; a mask is warned about.
        """
        found = batch_of(conditioning)
        if found is not None and found != batch_size:
            logger.warning("%d conditionings for batch_size=%d", found, batch_size)
        if mask is not None:
            logger.warning("DPMSolverSampler keeps no masked part; use DDIMSampler for inpainting by mask")
        x = (
            noise_like((batch_size, *shape), self.device, generator=generator)
            if x_T is None
            else x_T.to(self.device)
        )
        schedule = NoiseScheduleVP("discrete", alphas_cumprod=self.model.alphas_cumprod.detach().float())
        # the wrapper counts time up to 1000, as published, whatever the number of training steps
        rescale = self.ddpm_num_timesteps / 1000.0
        model_fn = model_wrapper(
            lambda x, t, cond=None: self.model.apply_model(x, t * rescale, cond),
            schedule,
            model_type=MODEL_TYPES[self.model.parameterization],
            guidance_type="classifier-free",
            condition=conditioning,
            unconditional_condition=unconditional_conditioning,
            guidance_scale=unconditional_guidance_scale,
        )
        with tqdm(total=S, desc="DPM-Solver++", disable=not verbose) as bar:

            def counted(x: Tensor, t: Tensor) -> Tensor:
                bar.update()
                return model_fn(x, t)

            solver = DPM_Solver(counted, schedule, predict_x0=True)
            out = solver.sample(
                x,
                steps=S,
                skip_type="time_uniform",
                method="multistep",
                order=min(2, S),
                lower_order_final=True,
            )
        return out, None
