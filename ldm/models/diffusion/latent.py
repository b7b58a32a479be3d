"""Latent diffusion: diffusion in the space of a first stage, with any condition (Rombach et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import repeat
from omegaconf import ListConfig
from torch import Tensor, nn

from ldm.lora import train_lora
from ldm.models.autoencoder import AutoencoderKL, IdentityFirstStage
from ldm.models.default import buildable
from ldm.models.diffusion import visualize
from ldm.models.diffusion.adapted import Adapted
from ldm.models.diffusion.ancestral import trim
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.flow import FlowSampler
from ldm.models.diffusion.latent_cache import LatentCache
from ldm.models.diffusion.pixel import adamw
from ldm.models.diffusion.wrapper import CLASS_KEYS, TEXT_KEYS
from ldm.models.notebook import NotebookCalls
from ldm.modules.diffusionmodules.util import extract_into_tensor
from ldm.modules.distributions.distributions import likeliest, normal_kl
from ldm.util import isimage, ismap, log_txt_as_img, mean_flat
from taming.lr_scheduler import multipliers
from taming.util import freeze, instantiate_from_config

TAKEN_AS_THEY_ARE = (*TEXT_KEYS, "coordinates_bbox")  # entries of a batch
RESTORE_OPTIONS = {"ckpt_path": None, "ignore_keys": (), "reset_ema": False, "reset_num_ema_updates": False}


class LatentDiffusion(Adapted, NotebookCalls):
    """Diffusion on the latents of a frozen first stage, conditioned through a second encoder.

    Args:
        first_stage_config: of the autoencoder; its weights are frozen.
        cond_stage_config: of the condition's encoder; "__is_first_stage__" shares the autoencoder,
            "__is_unconditional__" means none.
        num_timesteps_cond: noise the condition, too, over so many steps.
        cond_stage_key: entry of a batch that holds the condition: texts (caption, txt), classes (class_label, cls) or images.
        cond_stage_trainable: train its encoder along.
        concat_mode: without a conditioning_key: join the condition to the channels (True) or attend to it.
        cond_stage_forward: method of its encoder to call, instead of `encode` or the call itself.
        conditioning_key: see `DiffusionWrapper`.
        scale_factor: latents are multiplied by it.
        scale_by_std: measure that factor on the first training batch, so that latents have unit variance.
        force_null_conditioning: keep the conditioning_key although there is no condition.
        cache_latents: run the first stage once for each training picture; needs a batch entry `index` that names the
            exact pixels (see `LatentCache`).
        lora_config: train low-rank adapters and nothing else, see `Adapted`.

    Further arguments are those of `DDPM`; `timesteps` is 1000 unless given. Without any configuration, as in
    `LatentDiffusion(latent_dim=4, attention_resolutions=[8, 16, 32], num_heads=8)`, it is a small model of text, see
    `ldm.models.default.default_parameters`.

    Raises:
        ValueError: more noising steps for the condition than there are.
    """

    @buildable
    def __init__(
        self,
        first_stage_config: Any,
        cond_stage_config: Any,
        num_timesteps_cond: int | None = None,
        cond_stage_key: str = "image",
        cond_stage_trainable: bool = False,
        concat_mode: bool = True,
        cond_stage_forward: str | None = None,
        conditioning_key: str | None = None,
        scale_factor: float = 1.0,
        scale_by_std: bool = False,
        force_null_conditioning: bool = False,
        cache_latents: bool = False,
        lora_config: Mapping[str, Any] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        if lora_config is not None:
            cond_stage_trainable |= self.prepare_adapters(lora_config, kwargs)
        self.num_timesteps_cond = num_timesteps_cond if num_timesteps_cond is not None else 1
        self.scale_by_std = scale_by_std
        self.force_null_conditioning = force_null_conditioning
        if self.num_timesteps_cond > kwargs.setdefault("timesteps", 1000):
            raise ValueError(
                f"num_timesteps_cond={num_timesteps_cond} exceeds timesteps={kwargs['timesteps']}"
            )
        if conditioning_key is None:
            conditioning_key = "concat" if concat_mode else "crossattn"
        if cond_stage_config == "__is_unconditional__" and not force_null_conditioning:
            conditioning_key = None
        # the whole model is loaded at the end, so that a checkpoint's schedule and scale win over the configuration's
        restore = {name: kwargs.pop(name, default) for name, default in RESTORE_OPTIONS.items()}
        super().__init__(*args, **{"conditioning_key": conditioning_key, **kwargs})
        self.concat_mode = concat_mode
        self.cond_stage_trainable = cond_stage_trainable
        self.cond_stage_key = cond_stage_key
        self.cond_stage_forward = cond_stage_forward
        try:
            # by attribute, as published: a plain dict gives 0
            self.num_downs = len(first_stage_config.params.ddconfig.ch_mult) - 1
        except AttributeError:
            self.num_downs = 0
        if scale_by_std:
            self.register_buffer("scale_factor", torch.tensor(scale_factor))
        else:
            self.scale_factor = scale_factor
        self.first_stage_model = freeze(instantiate_from_config(first_stage_config))
        self._instantiate_cond_stage(cond_stage_config)
        self.clip_denoised = False
        self.bbox_tokenizer = None
        self.latent_cache = LatentCache() if cache_latents else None
        self.restarted_from_ckpt = False
        self.build_stages()
        if restore["ckpt_path"] is not None:
            self._restore(
                restore["ckpt_path"],
                restore["ignore_keys"],
                False,
                restore["reset_ema"],
                restore["reset_num_ema_updates"],
            )
            self.restarted_from_ckpt = True
        if lora_config is not None:
            self.lora = train_lora(self, lora_config)

    def build_stages(self) -> None:
        """Build what a subclass has beside first stage and condition; called before a checkpoint is loaded into it, too."""

    def register_schedule(self, *args: Any, **kwargs: Any) -> None:
        """As in `DDPM`, and the noising steps of the condition if they are fewer."""
        super().register_schedule(*args, **kwargs)
        self.shorten_cond_schedule = self.num_timesteps_cond > 1
        if self.shorten_cond_schedule:
            self.cond_ids = torch.full((self.num_timesteps,), self.num_timesteps - 1, dtype=torch.long)
            steps = torch.linspace(0, self.num_timesteps - 1, self.num_timesteps_cond)
            self.cond_ids[: self.num_timesteps_cond] = torch.round(steps).long()

    def _instantiate_cond_stage(self, config: Any) -> None:
        if config == "__is_first_stage__" and not self.cond_stage_trainable:
            self.cond_stage_model = self.first_stage_model
        elif config == "__is_unconditional__" and not self.cond_stage_trainable:
            self.cond_stage_model = None
        elif isinstance(config, str):
            raise AssertionError(
                f"cond_stage_config={config!r} has nothing to train; set cond_stage_trainable=False"
            )
        else:
            model = instantiate_from_config(config)
            self.cond_stage_model = model if self.cond_stage_trainable else freeze(model)

    @torch.no_grad()
    def on_train_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int | None = None) -> None:
        """Measure the latents' standard deviation on the very first batch, with `scale_by_std`."""
        first = self.current_epoch == 0 and self.global_step == 0 and batch_idx == 0
        if not (self.scale_by_std and first and not self.restarted_from_ckpt):
            return
        x = super().get_input(batch, self.first_stage_key).to(self.device)
        self.scale_factor = self.measure_scale(x)  # replaces the buffer

    # ---------------------------------------------------------------------------------- conditions

    def get_learned_conditioning(self, c: Any) -> Any:
        """The encoded condition: by `cond_stage_forward` if named, else by `encode` if there is one, else by the call."""
        if self.cond_stage_forward is not None:
            return getattr(self.cond_stage_model, self.cond_stage_forward)(c)
        encode = getattr(self.cond_stage_model, "encode", None)
        if not callable(encode):
            return self.cond_stage_model(c)
        return likeliest(encode(c))

    @torch.no_grad()
    def get_unconditional_conditioning(self, batch_size: int, null_label: Any = None) -> Any:
        """The encoding of "no condition", repeated for a batch.

        Args:
            batch_size: samples.
            null_label: what stands for it (an empty text, say); None asks the class encoder for its own.

        Raises:
            NotImplementedError: no null label, and the condition is no class.
        """
        if null_label is None:
            if self.cond_stage_key not in CLASS_KEYS:
                raise NotImplementedError(
                    f"no null label is known for cond_stage_key={self.cond_stage_key!r}; pass null_label"
                )
            return self.get_learned_conditioning(
                self.cond_stage_model.get_unconditional_conditioning(batch_size, device=self.device)
            )
        if isinstance(null_label, ListConfig):
            null_label = list(null_label)
        c = self.get_learned_conditioning(
            null_label.to(self.device) if isinstance(null_label, Tensor) else null_label
        )
        if isinstance(c, list):
            return [repeat(x, "1 ... -> b ...", b=batch_size).to(self.device) for x in c]
        return repeat(c, "1 ... -> b ...", b=batch_size).to(self.device)

    def _raw_condition(self, batch: Mapping[str, Any], key: str, x: Tensor) -> Any:
        if key == self.first_stage_key:
            return x
        if key in CLASS_KEYS:
            return batch  # the class encoder looks its own key up
        if key in TAKEN_AS_THEY_ARE:
            return batch[key]
        return super().get_input(batch, key).to(self.device)

    @torch.no_grad()
    def get_input(
        self,
        batch: Mapping[str, Any],
        k: str,
        return_first_stage_outputs: bool = False,
        force_c_encode: bool = False,
        cond_key: str | None = None,
        return_original_cond: bool = False,
        bs: int | None = None,
        return_x: bool = False,
    ) -> list[Any]:
        """Latents and condition of a batch.

        Args:
            batch: images, and whatever the condition is made of.
            k: entry with the images.
            return_first_stage_outputs: also return images and reconstructions.
            force_c_encode: encode the condition even if its encoder is being trained (then it is left to `forward`).
            cond_key: entry with the condition; the model's `cond_stage_key` if None.
            return_original_cond: also return the condition as it came.
            bs: only so many samples.
            return_x: also return the images.

        Returns:
            [z, c], then on request images, reconstructions, images, condition.
        """
        x = super().get_input(batch, k)[:bs].to(self.device)
        if self.latent_cache is not None and self.training and "index" in batch:
            posterior = self.latent_cache.encode(x, batch["index"][:bs], self.encode_first_stage)
        else:
            posterior = self.encode_first_stage(x)
        z = self.get_first_stage_encoding(posterior).detach()
        c = xc = None
        if self.model.conditioning_key is not None and not self.force_null_conditioning:
            xc = self._raw_condition(batch, self.cond_stage_key if cond_key is None else cond_key, x)
            c = xc
            if not self.cond_stage_trainable or force_c_encode:
                c = self.get_learned_conditioning(xc.to(self.device) if isinstance(xc, Tensor) else xc)
            if bs is not None:
                c = trim(c, bs)
        out = [z, c]
        if return_first_stage_outputs:
            out += [x, self.decode_first_stage(z)]
        if return_x:
            out.append(x)
        if return_original_cond:
            out.append(xc)
        return out

    # ------------------------------------------------------------------------------------ training

    def shared_step(self, batch: Mapping[str, Any], **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch, and what to log."""
        x, c = self.get_input(batch, self.first_stage_key)
        return self(x, c)

    def forward(self, x: Tensor, c: Any, *args: Any, **kwargs: Any) -> Any:
        """Loss of latents at random times; a trainable encoder runs here, on the condition as it came."""
        t = self.draw_times(x)
        if self.model.conditioning_key is not None:
            if c is None:
                raise AssertionError(f"conditioning_key={self.model.conditioning_key!r} needs a condition")
            if self.cond_stage_trainable:
                c = self.get_learned_conditioning(c)
            if self.shorten_cond_schedule:
                c = self._noise_condition(c, t)
        return self.p_losses(x, c, t, *args, **kwargs)

    def _noise_condition(self, c: Tensor, t: Tensor) -> Tensor:
        return self.q_sample(
            c, self.cond_ids.to(t.device)[self.table_index(t)], noise=torch.randn_like(c.float())
        )

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Any, return_ids: bool = False) -> Any:
        """The network's prediction under a condition.

        Args:
            x_noisy: (b, c, h, w).
            t: steps (b,).
            cond: a tensor, a list of tensors, or a dict of `DiffusionWrapper`'s keywords.
            return_ids: keep all of a network's several outputs.
        """
        if not isinstance(cond, Mapping):
            key = "c_concat" if self.model.conditioning_key == "concat" else "c_crossattn"
            cond = {key: cond if isinstance(cond, list) else [cond]}
        if self.patch_settings is not None:
            return self.apply_patchwise(x_noisy, t, cond)
        out = self.model(x_noisy, t, **cond)
        return out[0] if isinstance(out, tuple) and not return_ids else out

    def p_losses(
        self, x_start: Tensor, cond: Any, t: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss at given times (b,), and what to log."""
        x_noisy, target = self.noised(x_start, t, noise)
        simple = self.get_loss(self.apply_model(x_noisy, t, cond), target, mean=False).mean(dim=[1, 2, 3])
        prefix = "train" if self.training else "val"
        log = {f"{prefix}/loss_simple": simple.mean()}
        index = self.table_index(t)
        logvar = self.logvar.to(t.device)[index]
        loss = self.objective.weigh(simple, self, t) / logvar.exp() + logvar
        if self.learn_logvar:
            log |= {f"{prefix}/loss_gamma": loss.mean(), "logvar": self.logvar.data.mean()}
        bound = (self.lvlb_weights[index] * simple).mean()
        total = self.l_simple_weight * loss.mean() + self.original_elbo_weight * bound
        return total, log | {f"{prefix}/loss_vlb": bound, f"{prefix}/loss": total}

    def trained_parameters(self) -> list[nn.Parameter]:
        """Those of the network, of a trainable condition encoder, and a learned log-variance; or those of the adapters."""
        if self.lora is not None:
            return list(self.lora.parameters())
        parameters = list(self.model.parameters())
        if self.cond_stage_trainable:
            parameters += list(self.cond_stage_model.parameters())
        return [*parameters, self.logvar] if self.learn_logvar else parameters

    def configure_optimizers(self) -> Any:
        """AdamW over what is trained, with its multiplier of the learning rate if there is one."""
        optimizer = adamw(self.trained_parameters(), self.learning_rate)
        if not self.use_scheduler:
            return optimizer
        return [optimizer], multipliers([optimizer], self.scheduler_config)

    # ------------------------------------------------------------------------- samples and pictures

    @torch.no_grad()
    def sample_log(
        self, cond: Any, batch_size: int, ddim: bool, ddim_steps: int | None, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        """Latents and intermediates: by DDIM, or Euler's steps for a flow (a dict of lists), or ancestrally (a list)."""
        if ddim and ddim_steps is not None:
            shape = (self.channels, self.image_size, self.image_size)
            sampler = FlowSampler(self) if self.parameterization == "flow" else DDIMSampler(self)
            return sampler.sample(ddim_steps, batch_size, shape, cond, verbose=False, **kwargs)
        return self.sample(
            cond=cond, batch_size=batch_size, return_intermediates=True, verbose=False, **kwargs
        )

    def to_rgb(self, x: Tensor) -> Tensor:
        """Maps (b, n, h, w) → (b, 3, h, w) in [-1, 1] by a random projection, the same at each call."""
        if not hasattr(self, "colorize"):
            self.colorize = torch.randn(3, x.shape[1], 1, 1)
        x = F.conv2d(x.float(), weight=self.colorize.to(x.device))
        return 2.0 * (x - x.min()) / (x.max() - x.min()) - 1.0

    @torch.no_grad()
    def log_images(
        self,
        batch: Mapping[str, Any],
        N: int = 8,
        n_row: int = 4,
        sample: bool = True,
        ddim_steps: int | None = 50,
        ddim_eta: float = 0.0,
        return_keys: Sequence[str] | None = None,
        quantize_denoised: bool = True,
        inpaint: bool = True,
        plot_denoise_rows: bool = False,
        plot_progressive_rows: bool = True,
        plot_diffusion_rows: bool = True,
        unconditional_guidance_scale: float = 1.0,
        unconditional_guidance_label: Any = None,
        use_ema_scope: bool = True,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Pictures in [-1, 1] of a batch and of samples under its conditions.

        Args:
            batch: a batch.
            N: images of it.
            n_row: images in the row of the forward process.
            sample: draw `samples`.
            ddim_steps, ddim_eta: of DDIM; None samples ancestrally.
            return_keys: return only these entries (all, if none of them exists).
            quantize_denoised: also sample with quantised estimates, for VQ first stages.
            inpaint: also fill the middle, and all but the middle, of the images.
            plot_denoise_rows, plot_progressive_rows, plot_diffusion_rows: rows over time.
            unconditional_guidance_scale, unconditional_guidance_label: above 1, also sample with guidance.
            use_ema_scope: sample with the averaged weights.

        Returns:
            `inputs`, `reconstruction`, `conditioning`, `diffusion_row`, `samples`, … (n, 3, h, w), rows as (3, H, W).
        """
        z, c, x, xrec, xc, extra = self.input_to_log(batch, N)
        N, n_row = min(len(x), N), min(len(x), n_row)
        draw = visualize.LatentPictures(self, c, N, ddim_steps, ddim_eta, use_ema_scope)
        log = {"inputs": x, "reconstruction": xrec} | extra | self._condition_pictures(batch, c, x, xc, N)
        if plot_diffusion_rows:
            log["diffusion_row"] = visualize.diffusion_row(self, z[:n_row], self.decode_first_stage)
        if sample:
            quantizable = not isinstance(self.first_stage_model, AutoencoderKL | IdentityFirstStage)
            log |= draw.samples(plot_denoise_rows, quantize_denoised and quantizable)
        if unconditional_guidance_scale > 1.0:
            uc: Any = self.get_unconditional_conditioning(N, unconditional_guidance_label)
            if isinstance(c, Mapping):
                uc = {
                    **c,
                    "c_crossattn": [uc],
                }  # pictures and vectors stay: only the text is guided away from
            log |= draw.guided(unconditional_guidance_scale, uc)
        if inpaint:
            log |= draw.inpainted(z[:N])
        if plot_progressive_rows:
            log |= draw.progressive()
        return visualize.select(log, return_keys)

    def input_to_log(self, batch: Mapping[str, Any], n: int) -> tuple[Any, ...]:
        """Latents, conditions, images, reconstructions, conditions as they came, and further pictures by name, of n samples."""
        given = self.get_input(
            batch, self.first_stage_key, return_first_stage_outputs=True, force_c_encode=True, return_original_cond=True, bs=n
        )  # fmt: skip
        return (*given, {})

    def _condition_pictures(
        self, batch: Mapping[str, Any], c: Any, x: Tensor, xc: Any, n: int
    ) -> dict[str, Tensor]:
        """The conditions as pictures, where there is a way to show them."""
        if self.model.conditioning_key is None:
            return {}
        decode = getattr(self.cond_stage_model, "decode", None)
        size = (x.shape[3], x.shape[2])
        font = max(10, x.shape[2] // 25)
        if callable(decode) and self.cond_stage_key not in TAKEN_AS_THEY_ARE:
            return {"conditioning": decode(c["c_crossattn"][0] if isinstance(c, Mapping) else c)}
        if self.cond_stage_key in TEXT_KEYS:
            return {"conditioning": log_txt_as_img(size, batch[self.cond_stage_key][:n], size=font)}
        if self.cond_stage_key in CLASS_KEYS:
            named = "human_label" in batch
            return (
                {"conditioning": log_txt_as_img(size, batch["human_label"][:n], size=font)} if named else {}
            )
        if isimage(xc):
            return {"conditioning": xc}
        return {"original_conditioning": self.to_rgb(xc)} if ismap(xc) else {}

    def next_steps(self, logdir: str) -> str:
        """What to do with the trained model, for the end of a training run."""
        if self.cond_stage_key in TEXT_KEYS:
            return f'  sample       python scripts/txt2img.py --ckpt {logdir} --prompt "…"'
        return f"  notebook     ldm.models.LatentDiffusion.from_pretrained({logdir!r}), then its generate() or sample(condition=…)"

    # ------------------------------------------------------------------------------------- algebra

    def _predict_eps_from_xstart(self, x_t: Tensor, t: Tensor, pred_xstart: Tensor) -> Tensor:
        """ε from x_t and an estimate of x_0."""
        scaled = extract_into_tensor(self.sqrt_recip_alphas_cumprod, t, x_t.shape) * x_t
        return (scaled - pred_xstart) / extract_into_tensor(self.sqrt_recipm1_alphas_cumprod, t, x_t.shape)

    def _prior_bpd(self, x_start: Tensor) -> Tensor:
        """KL divergence of q(x_T | x_0) from the prior, in bits a dimension, (b,)."""
        t = torch.full((len(x_start),), self.num_timesteps - 1, device=x_start.device)
        mean, _, log_variance = self.q_mean_variance(x_start, t)
        return mean_flat(normal_kl(mean, log_variance, 0.0, 0.0)) / torch.log(torch.tensor(2.0))
