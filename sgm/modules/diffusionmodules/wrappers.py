"""How a network is called, and bridges between the σ view of this chapter and the discrete ᾱ view of chapter two."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldm.models.diffusion.gaussian import GaussianSchedule
from sgm.modules.diffusionmodules.denoiser import TableDenoiser
from sgm.modules.diffusionmodules.discretizer import TableDiscretization
from sgm.util import append_dims

OPENAIUNETWRAPPER = "sgm.modules.diffusionmodules.wrappers.OpenAIWrapper"


class IdentityWrapper(nn.Module):
    """The network, called as it is.

    Args:
        diffusion_model: the network.
        compile_model: compile it; the names of its weights stay the same.
    """

    def __init__(self, diffusion_model: nn.Module, compile_model: bool = False) -> None:
        super().__init__()
        self.diffusion_model = diffusion_model
        if compile_model:
            self.diffusion_model.compile()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network's output."""
        return self.diffusion_model(*args, **kwargs)


class OpenAIWrapper(IdentityWrapper):
    """A UNet, called with the entries of a condition: `concat` joins the input's channels, `crossattn` is context, `vector` is y."""

    def forward(self, x: Tensor, t: Tensor, c: Mapping[str, Any], **kwargs: Any) -> Tensor:
        """Predict.

        Args:
            x: scaled input (b, c, h, w).
            t: noise labels (b,).
            c: the condition; `cond_view` and `cond_motion` are handed on where there is a `cond_view`.
            kwargs: handed on.

        Raises:
            ValueError: `concat` is of another size than x.
        """
        concat = c.get("concat")
        if concat is not None and concat.numel():
            if concat.shape[2:] != x.shape[2:] or len(concat) != len(x):
                raise ValueError(
                    f"the condition's concat {tuple(concat.shape)} cannot be joined to an input of {tuple(x.shape)}: batch, height "
                    "and width must be the same"
                )
            x = torch.cat([x, concat.type_as(x)], dim=1)
        views = {name: c.get(name) for name in ("cond_view", "cond_motion")} if "cond_view" in c else {}
        return self.diffusion_model(
            x, timesteps=t, context=c.get("crossattn"), y=c.get("vector"), **views, **kwargs
        )


# -------------------------------------------------------------------------------------------------------------- bridges

SCALINGS = {
    "eps": "EpsScaling",
    "v": "VScaling",
    "x0": "StartScaling",
    "flow": "FlowScaling",
}
# entries of this chapter's conditions → those of chapter two, and whether these are lists
ENTRIES = {"crossattn": ("c_crossattn", True), "concat": ("c_concat", True), "vector": ("c_adm", False)}
# stands for σ = ∞, pure noise: far above the σ of any image, and small enough for float32
INFINITE_SIGMA = 4096.0


class LatentDiffusionDenoiser(TableDenoiser):
    """Any diffusion model of `ldm` as a denoiser x, σ, condition → x_0 for this chapter's samplers.

    ```python
    denoiser = LatentDiffusionDenoiser(model)
    sampler = DPMPP2MSampler(denoiser.discretization, num_steps=20, guider_config=VanillaCFG(7.5))
    z = sampler(denoiser, torch.randn(1, 4, 64, 64), model.get_learned_conditioning(["a cat"]), model.get_learned_conditioning([""]))
    ```

    Conditions are those of the model (a tensor, list or dict of `c_concat`, `c_crossattn`, `c_adm`), or dicts of this chapter
    (`concat`, `crossattn`, `vector`).

    Args:
        model: with the buffers of `GaussianSchedule` and `apply_model`; of parameterization "eps", "v", "x0" or "flow".
        quantize: round noise levels to those of training, as `DiscreteDenoiser` does. False asks the network at times between
            its steps, which makes a difference for noise levels that were not chosen from among the model's own.

    Raises:
        ValueError: another parameterization.
    """

    model: Any

    def __init__(self, model: Any, quantize: bool = True) -> None:
        if model.parameterization not in SCALINGS:
            raise ValueError(
                f"parameterization={model.parameterization!r} is unknown; choose one of {sorted(SCALINGS)}"
            )
        bar = model.alphas_cumprod.detach().float()
        sigmas = ((1 - bar) / bar).sqrt().clamp(max=INFINITE_SIGMA)
        scaling = f"sgm.modules.diffusionmodules.denoiser_scaling.{SCALINGS[model.parameterization]}"
        super().__init__({"target": scaling}, sigmas)
        object.__setattr__(self, "model", model)  # not a part of this module: its weights stay its own
        self.quantize = quantize
        self.discretization = TableDiscretization(sigmas.cpu())

    def possibly_quantize_sigma(self, sigma: Tensor) -> Tensor:
        """See `TableDenoiser`."""
        return super().possibly_quantize_sigma(sigma) if self.quantize else sigma

    def possibly_quantize_c_noise(self, c_noise: Tensor) -> Tensor:
        """Steps, or times between them by interpolation in ln σ."""
        if self.quantize:
            return super().possibly_quantize_c_noise(c_noise)
        table = self.sigmas.log()
        wanted = c_noise.log().clamp(table[0], table[-1])
        above = torch.searchsorted(table, wanted).clamp(1, len(table) - 1)
        low, high = table[above - 1], table[above]
        return above - 1 + (wanted - low) / (high - low)

    def forward(self, input: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
        """The estimate of x_0, from latents x_0 + σ ε (b, ...) at noise levels (b,)."""
        return super().forward(self.model.apply_model, input, sigma, _for_latent_diffusion(cond))


def _for_latent_diffusion(cond: Any) -> Any:
    """A condition under the names of chapter two."""
    if not isinstance(cond, Mapping) or not set(cond) & set(ENTRIES):
        return cond
    unknown = sorted(set(cond) - set(ENTRIES))
    if unknown:
        raise ValueError(f"a model of ldm knows no condition {unknown}; give it {sorted(ENTRIES)}")
    out = {}
    for key, value in cond.items():
        name, is_list = ENTRIES[key]
        out[name] = [value] if is_list else value
    return out


class DiscreteModel(GaussianSchedule):
    """A denoiser of this chapter as a model that predicts ε, for the samplers of `ldm`.

    ```python
    denoise = lambda x, sigma, cond: engine.denoiser(engine.model, x, sigma, cond)
    samples, _ = DDIMSampler(DiscreteModel(denoise, engine.denoiser.sigmas)).sample(50, 4, (4, 64, 64), conditioning=c)
    ```

    Args:
        denoiser: x, σ, condition → x_0.
        sigmas: noise levels that are the steps, ascending, (T,): those of a discrete denoiser, or any for a continuous one.

    Raises:
        ValueError: levels that do not ascend from above 0.
    """

    denoiser: Any
    sigmas: Tensor

    def __init__(self, denoiser: Callable[[Tensor, Tensor, Any], Tensor], sigmas: Tensor) -> None:
        super().__init__()
        levels = sigmas.detach().double().cpu().numpy()
        if levels.ndim != 1 or levels[0] <= 0 or np.any(np.diff(levels) <= 0):
            raise ValueError(
                "sigmas must be a vector that ascends from above 0; use discretization(n, do_append_zero=False, flip=True)"
            )
        self.parameterization, self.v_posterior = "eps", 0.0
        bar = 1 / (1 + levels**2)
        self.register_schedule(given_betas=1 - bar / np.append(1.0, bar[:-1]))
        self.register_buffer("sigmas", sigmas.detach().clone(), persistent=False)
        object.__setattr__(self, "denoiser", denoiser)  # not a part of this module: its weights stay its own
        self.to(sigmas.device)

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        """ε, from latents of unit variance (b, ...) at steps (b,) or at times between them, by interpolation in ln σ."""
        sigma = self._between(t) if t.is_floating_point() else self.sigmas[t]
        broad = append_dims(sigma, x_noisy.ndim)
        x = x_noisy * (1 + broad**2).sqrt()
        return (x - self.denoiser(x, sigma, cond)) / broad

    def _between(self, t: Tensor) -> Tensor:
        """Noise levels at times between the steps."""
        last, table = self.num_timesteps - 1, self.sigmas.log()
        t = t.clamp(0, last)
        below = t.long()
        return torch.lerp(table[below], table[(below + 1).clamp(max=last)], (t - below).to(table)).exp()
