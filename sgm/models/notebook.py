"""The diffusion engine in a notebook: from noise to latents in one call, with any sampler of both chapters."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from ldm import inference
from ldm.models.diffusion.sampling_util import Noise
from ldm.models.notebook import is_text, spread
from ldm.modules.encoders.modules import BERTEmbedder
from sgm.models.diffusion import DiffusionEngine
from sgm.modules.diffusionmodules import sampling
from sgm.modules.diffusionmodules.discretizer import Discretization, EDMDiscretization, TableDiscretization
from sgm.modules.diffusionmodules.guiders import Guider, IdentityGuider, VanillaCFG
from sgm.modules.diffusionmodules.wrappers import DiscreteModel
from sgm.modules.encoders.modules import AbstractEmbModel, GeneralConditioner
from taming.util import nearest

SAMPLERS: dict[str, type[sampling.BaseDiffusionSampler]] = {
    "euler": sampling.EulerEDMSampler, "heun": sampling.HeunEDMSampler, "euler_ancestral": sampling.EulerAncestralSampler,
    "dpmpp2s_ancestral": sampling.DPMPP2SAncestralSampler, "dpmpp2m": sampling.DPMPP2MSampler,
    "dpmpp2m_sde": sampling.DPMPP2MSDESampler, "dpmpp3m_sde": sampling.DPMPP3MSDESampler, "lms": sampling.LinearMultistepSampler,
}  # fmt: skip
# those of `ldm` that a denoiser can drive, as a model that predicts ε
DISCRETE_SAMPLERS = {name: made for name, made in inference.SAMPLERS.items() if name != "flow"}
DEFAULT_SAMPLER, DEFAULT_STEPS = "dpmpp2m", 50
DISCRETE_STEPS = 1000  # into which a continuous range of noise levels is divided for them
ENCODED = ("crossattn", "vector", "concat", "cond_view", "cond_motion")
BASE = "sgm.modules.diffusionmodules"


class Conditions(NamedTuple):
    """What to sample under, and what to guide away from, in the conditioner's form."""

    cond: dict[str, Tensor]
    uncond: dict[str, Tensor]


class SmallTextEmbedder(AbstractEmbModel, BERTEmbedder):
    """Texts → (b, n, d), by a transformer that is trained along; see `ldm.modules.encoders.modules.BERTEmbedder`."""


def default_parameters(
    latent_dim: int = 4,
    model_channels: int = 64,
    num_heads: int = 8,
    context_dim: int = 256,
    **published: Any,
) -> dict[str, Any]:
    """Parameters of `DiffusionEngine` for a small model of text over latents, untrained; nothing of it is downloaded.

    Batches hold latents of unit variance as `jpg`, (b, latent_dim, h, w) with h and w multiples of 4, and texts as `txt`, which
    are dropped from every tenth sample for guidance. The network works in continuous noise levels (Karras et al. 2022).

    Args:
        latent_dim: channels of the latents.
        model_channels: width of the network's first level, a multiple of 32.
        num_heads: of each attention.
        context_dim: width of the text's vectors.
        published: further parameters of `DiffusionEngine`.

    Raises:
        ValueError: heads that do not divide the width.
    """
    if num_heads < 1 or model_channels % num_heads:
        raise ValueError(f"num_heads={num_heads} must divide model_channels={model_channels}")
    network = {
        "in_channels": latent_dim, "out_channels": latent_dim, "model_channels": model_channels, "channel_mult": [1, 2, 4],
        "num_res_blocks": 1, "attention_resolutions": [4, 2], "num_heads": num_heads, "context_dim": context_dim,
    }  # fmt: skip
    text = {"n_embed": context_dim, "n_layer": 2, "vocab_size": 4096, "max_seq_len": 77, "tokenizer": "bpe"}
    embedder = {
        "target": f"{__name__}.SmallTextEmbedder", "params": text, "input_key": "txt", "is_trainable": True, "ucg_rate": 0.1,
    }  # fmt: skip
    unit = {"sigma_data": 1.0}
    loss = {
        "loss_weighting_config": {"target": f"{BASE}.loss_weighting.EDMWeighting", "params": unit},
        "sigma_sampler_config": {"target": f"{BASE}.sigma_sampling.EDMSampling"},
    }
    scaling = {"target": f"{BASE}.denoiser_scaling.EDMScaling", "params": unit}
    sampler = {
        "num_steps": DEFAULT_STEPS,
        "discretization_config": {"target": f"{BASE}.discretizer.EDMDiscretization"},
        "guider_config": {"target": f"{BASE}.guiders.VanillaCFG", "params": {"scale": 7.5}},
    }
    return {
        "network_config": {"target": f"{BASE}.openaimodel.UNetModel", "params": network},
        "denoiser_config": {"target": f"{BASE}.denoiser.Denoiser", "params": {"scaling_config": scaling}},
        "first_stage_config": {"target": "ldm.models.autoencoder.IdentityFirstStage"},
        "conditioner_config": {
            "target": "sgm.modules.GeneralConditioner",
            "params": {"emb_models": [embedder]},
        },
        "sampler_config": {"target": f"{BASE}.sampling.DPMPP2MSampler", "params": sampler},
        "loss_fn_config": {"target": f"{BASE}.loss.StandardDiffusionLoss", "params": loss},
        **published,
    }


class DiffusionModel(DiffusionEngine):
    """`DiffusionEngine` with short calls.

    ```python
    vae, diffusion = AutoencoderKL(), DiffusionModel()
    image = vae.decode(diffusion.sample(torch.randn(1, 4, 64, 64), condition="a cat", num_steps=30, guidance_scale=7.5))
    ```

    Args:
        parameters: those of `DiffusionEngine`; without a network_config among them, those of `default_parameters`, and
            learning_rate (1e-4), so that it can be trained at once.
    """

    def __init__(self, **parameters: Any) -> None:
        rate = parameters.pop("learning_rate", 1e-4)
        super().__init__(
            **(parameters if "network_config" in parameters else default_parameters(**parameters))
        )
        self.learning_rate = rate

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        config: str | os.PathLike[str] | None = None,
        device: str = "auto",
        overrides: Sequence[str] = (),
    ) -> Self:
        """A trained engine, ready to sample.

        Args:
            path: a training run's folder (logs/…), or a checkpoint.
            config: its configuration; found beside it if None.
            device: "auto", "cpu", "cuda" or "mps".
            overrides: `a.b=c` over the configuration.

        Raises:
            InferenceError: something is missing.
        """
        target = f"model.target={cls.__module__}.{cls.__qualname__}"
        file = None if config is None else str(config)
        return inference.load_model(str(path), file, inference.choose_device(device), [target, *overrides])[0]

    def sample(self, latent: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        """Latents for a decoder, from noise: see `sample_latents`. Given a condition instead, as published, scaled ones."""
        if isinstance(latent, Tensor):
            return self.sample_latents(latent, *args, **kwargs)
        return super().sample(kwargs.pop("cond", latent), *args, **kwargs)

    def sample_latents(
        self,
        latent: Tensor,
        condition: Any = None,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        *,
        sampler: str | None = None,
        eta: float | None = None,
        unconditional: Any = None,
        generator: Noise = None,
        callback: Callable[[int], Any] | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Latents from noise.

        Args:
            latent: standard normal noise (b, c, h, w); it is not changed.
            condition: one, or one for each sample: texts, class labels, entries of a batch (a dict, as the model's embedders read
                them), or encoded: a dict of crossattn, vector, concat, or a tensor, whose axes tell which. None is no condition.
            num_steps: of the sampler; the model's own number if None, or 50.
            guidance_scale: of classifier-free guidance; 1 is none. None leaves the model's own guidance.
            sampler: a key of `SAMPLERS` or `DISCRETE_SAMPLERS`; the model's own if None.
            eta: noise of a stochastic sampler, from 0 to 1; its own default if None.
            unconditional: what guidance leads away from, in the form of `condition`. If None: what training put in the place of
                dropped conditions; empty texts where it dropped none; zeros for encoded conditions.
            generator: source of the sampler's noise, or one for each sample; torch's global one if None.
            callback: called with the number of each step.
            progress: show a bar.

        Returns:
            Latents of the first stage, of `latent`'s shape: not scaled, ready for its `decode`.

        Raises:
            ValueError: an unknown sampler, one that has no eta, or a condition that does not go with the model.
            FloatingPointError: the latents became infinite or undefined.
        """
        if latent.ndim < 3:
            raise ValueError(f"latent must be noise (b, c, h, w), not {tuple(latent.shape)}")
        with self._sampling():
            x = latent.to(self.device)
            c, uc = self._conditions(condition, unconditional, len(x))
            if sampler in DISCRETE_SAMPLERS:
                z = self._sample_discrete(
                    DISCRETE_SAMPLERS[sampler], x, c, uc, num_steps or self._own_steps, guidance_scale, eta=eta or 0.0,
                    generator=generator, callback=callback, verbose=progress,
                )  # fmt: skip
            else:
                chosen = self._chosen(sampler, guidance_scale, eta)
                chosen.verbose = progress
                seen = None if callback is None else lambda i, _: callback(i)
                steps = num_steps or self._own_steps
                z = chosen(self.denoise, x, c, uc, num_steps=steps, generator=generator, callback=seen)
            return z / self.scale_factor

    # ------------------------------------------------------------------------------------------------- sampler

    @contextmanager
    def _sampling(self) -> Iterator[None]:
        """Averaged weights, eval mode and no gradients, for a while."""
        training = self.training
        self.eval()
        try:
            with torch.no_grad(), self.ema_scope():
                yield
        finally:
            self.train(training)

    @property
    def _own_steps(self) -> int:
        return getattr(self.sampler, "num_steps", None) or DEFAULT_STEPS

    def _discretization(self) -> Discretization:
        """The model's noise levels: those of its sampler, of its denoiser's table, or Karras' of 2022."""
        if self.sampler is not None:
            return self.sampler.discretization
        table = getattr(self.denoiser, "sigmas", None)
        return EDMDiscretization() if table is None else TableDiscretization(table)

    def _chosen(
        self, name: str | None, scale: float | None, eta: float | None
    ) -> sampling.BaseDiffusionSampler:
        """The sampler of that name with the model's noise levels, or a copy of the model's own."""
        if name is not None and name not in SAMPLERS:
            raise ValueError(
                f"there is no sampler {name!r}. {nearest(name, {**SAMPLERS, **DISCRETE_SAMPLERS})}"
            )
        if name is None and self.sampler is not None:
            chosen = copy.copy(self.sampler)
        else:
            own: Guider = IdentityGuider() if self.sampler is None else self.sampler.guider
            kind = SAMPLERS[name or DEFAULT_SAMPLER]
            chosen = kind(discretization_config=self._discretization(), guider_config=own)
        if scale is not None:
            chosen.guider = IdentityGuider() if scale == 1.0 else VanillaCFG(scale)
        if eta is not None and hasattr(chosen, "eta"):
            chosen.eta = eta
        elif eta:
            raise ValueError(
                f"eta={eta}: {type(chosen).__name__} adds no noise; choose one that does, or leave eta at 0"
            )
        return chosen

    def _sample_discrete(
        self, kind: Any, x: Tensor, c: Any, uc: Any, steps: int, scale: float | None, **options: Any
    ) -> Tensor:
        """Scaled latents by a sampler of `ldm`, from noise."""
        levels = getattr(self.denoiser, "sigmas", None)
        if levels is None:
            levels = self._discretization()(DISCRETE_STEPS, do_append_zero=False, flip=True).to(x.device)
        model = DiscreteModel(self.denoise, levels)
        own = getattr(getattr(self.sampler, "guider", None), "scale", 1.0)
        scale = (float(own) if isinstance(own, int | float) else 1.0) if scale is None else scale
        samples, _ = kind(model).sample(
            steps, len(x), tuple(x.shape[1:]), c or None, x_T=x, unconditional_guidance_scale=scale,
            unconditional_conditioning=uc or None, **options,
        )  # fmt: skip
        return samples

    # ----------------------------------------------------------------------------------------------- condition

    def _conditions(self, condition: Any, unconditional: Any, n: int) -> Conditions:
        encoded = _encoded(condition)
        if encoded is not None:
            c = spread(encoded, n, 1, self.device)
            given = _encoded(unconditional)
            uc = (
                {k: torch.zeros_like(v) for k, v in c.items()}
                if given is None
                else spread(given, n, 1, self.device)
            )
            return Conditions(c, uc)
        embedders = list(self.conditioner.embedders)
        if not embedders:
            if condition is not None:
                raise ValueError("this model is unconditional; it has no use for a condition")
            return Conditions({}, {})
        batch = self._batch(condition, n)
        keys = [e.input_key for e in embedders]
        zeroed = [e.input_key for e in embedders if e.ucg_rate and e.legacy_ucg_val is None]
        if unconditional is not None:
            batch_uc, zeroed = {**batch, **self._batch(unconditional, n)}, []
        else:
            texts = {
                e.input_key: e.legacy_ucg_val or "" for e in embedders if is_text(batch.get(e.input_key))
            }
            batch_uc = {**batch, **{key: [text] * n for key, text in texts.items()}}
        c, uc = self.conditioner.get_unconditional_conditioning(
            batch, batch_uc, zeroed, keys if condition is None and zeroed else None
        )
        return Conditions(c, uc)

    def _batch(self, condition: Any, n: int) -> dict[str, Any]:
        """A batch of n samples for the embedders."""
        if isinstance(condition, Mapping):
            return {key: self._entry(value, n) for key, value in condition.items()}
        keys = [e.input_key for e in self.conditioner.embedders]
        for known, is_kind, nothing in (
            (inference.TEXT_KEYS, is_text, ""),
            (inference.CLASS_KEYS, lambda given: not is_text(given), 0),
        ):
            key = next((k for k in keys if k in known), None)
            if key is not None and (condition is None or is_kind(condition)):
                return {key: self._entry(nothing if condition is None else condition, n)}
        raise ValueError(
            f"condition={condition!r:.80}: this model reads {keys}; give a dict of these, or encoded conditions ({', '.join(ENCODED)})"
        )

    def _entry(self, given: Any, n: int) -> Any:
        """An entry of a batch for n samples, from one or from n."""
        if is_text(given):
            texts = [given] if isinstance(given, str) else list(given)
            if len(texts) not in (1, n):
                raise ValueError(f"{len(texts)} texts do not go with {n} latents; give one, or one for each")
            return texts * (n // len(texts))
        values = torch.as_tensor(list(given) if isinstance(given, range) else given)
        return spread(values.reshape(1) if values.ndim == 0 else values, n, 1, self.device)


def _encoded(condition: Any) -> dict[str, Tensor] | None:
    """A condition in the conditioner's form, if it is encoded already."""
    if isinstance(condition, Mapping) and condition and set(condition) <= set(ENCODED):
        return dict(condition)
    if isinstance(condition, Tensor) and condition.is_floating_point():
        if condition.ndim not in GeneralConditioner.OUTPUT_DIM2KEYS:
            raise ValueError(f"an encoded condition has 1 to 5 axes, not {condition.ndim}")
        return {GeneralConditioner.OUTPUT_DIM2KEYS[condition.ndim]: condition}
    return None
