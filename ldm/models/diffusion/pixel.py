"""DDPM: diffusion in the space of the images themselves, and the ground of every latent model."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ldm.models.diffusion import visualize
from ldm.models.diffusion.gaussian import PARAMETERIZATIONS, GaussianSchedule
from ldm.models.diffusion.objectives import Objective
from ldm.models.diffusion.wrapper import DiffusionWrapper
from ldm.modules.diffusionmodules.util import noise_like
from taming.checkpoint import load_into, load_state_dict
from taming.models.base import image_from_batch
from taming.modules.ema import LitEma, ema_scope

logger = logging.getLogger(__name__)


class DDPM(GaussianSchedule, pl.LightningModule):
    """Denoising diffusion in the space of the images themselves.

    Args:
        unet_config: of the network.
        timesteps: steps of the forward process.
        beta_schedule, linear_start, linear_end, cosine_s, given_betas: see `register_schedule`.
        loss_type: "l1" or "l2".
        ckpt_path: weights to start from.
        ignore_keys: prefixes of entries in that file to leave out.
        load_only_unet: that file holds the network only.
        monitor: what checkpoints are ranked by.
        use_ema: keep an average of the network, as `model_ema`.
        first_stage_key: entry of a batch that holds the image.
        image_size, channels: of what is denoised.
        log_every_t: steps between kept intermediates.
        clip_denoised: clip predictions of x_0 to [-1, 1] when sampling.
        original_elbo_weight, l_simple_weight: of the variational bound and the simple loss.
        v_posterior: the posterior's variance lies between its two bounds at this share.
        conditioning_key: see `DiffusionWrapper`.
        parameterization: "eps", "x0", "v", or "flow" for a rectified flow.
        scheduler_config: learning-rate multiplier (used by latent models).
        use_positional_encodings: accepted, as published.
        learn_logvar, logvar_init: a log-variance of the loss for each step, learned or fixed (used by latent models).
        make_it_fit: spread weights of a narrower checkpoint over wider layers.
        ucg_training: {batch key: {p, val}}: entries are replaced by `val` with probability p, for guidance.
        reset_ema: start the average anew from the loaded weights.
        reset_num_ema_updates: start its warm-up anew.
        zero_terminal_snr: rescale the schedule so that its last step is pure noise (Lin et al. 2024).
        objective: switches of `Objective`: min-SNR weights, offset noise, input perturbation, how times are drawn.

    Raises:
        AssertionError: unknown parameterization, or an EMA option without its precondition (the published error class).
        ValueError: an objective or schedule that does not go with the parameterization.

    Source: Ho et al. 2020, algorithms 1 and 2.
    """

    learning_rate: float

    def __init__(
        self,
        unet_config: Any,
        timesteps: int = 1000,
        beta_schedule: str = "linear",
        loss_type: str = "l2",
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        load_only_unet: bool = False,
        monitor: str | None = "val/loss",
        use_ema: bool = True,
        first_stage_key: str = "image",
        image_size: int = 256,
        channels: int = 3,
        log_every_t: int = 100,
        clip_denoised: bool = True,
        linear_start: float = 1e-4,
        linear_end: float = 2e-2,
        cosine_s: float = 8e-3,
        given_betas: np.ndarray | None = None,
        original_elbo_weight: float = 0.0,
        v_posterior: float = 0.0,
        l_simple_weight: float = 1.0,
        conditioning_key: str | None = None,
        parameterization: str = "eps",
        scheduler_config: Any = None,
        use_positional_encodings: bool = False,
        learn_logvar: bool = False,
        logvar_init: float = 0.0,
        make_it_fit: bool = False,
        ucg_training: Mapping[str, Any] | None = None,
        reset_ema: bool = False,
        reset_num_ema_updates: bool = False,
        zero_terminal_snr: bool = False,
        objective: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if parameterization not in PARAMETERIZATIONS:
            raise AssertionError(
                f"parameterization={parameterization!r} is unknown; choose one of {sorted(PARAMETERIZATIONS)}"
            )
        self.parameterization = parameterization
        self.zero_terminal_snr = zero_terminal_snr
        self.objective = Objective.of(objective, parameterization)
        self.cond_stage_model: Any = None
        self.clip_denoised = clip_denoised
        self.log_every_t = log_every_t
        self.first_stage_key = first_stage_key
        self.image_size, self.channels = image_size, channels
        self.use_positional_encodings = use_positional_encodings
        self.model = DiffusionWrapper(unet_config, conditioning_key)
        self.use_ema = use_ema
        if use_ema:
            self.model_ema = LitEma(self.model)
        self.use_scheduler = scheduler_config is not None
        if self.use_scheduler:
            self.scheduler_config = scheduler_config
        self.v_posterior = v_posterior
        self.original_elbo_weight, self.l_simple_weight = original_elbo_weight, l_simple_weight
        if monitor is not None:
            self.monitor = monitor
        self.make_it_fit = make_it_fit
        if reset_num_ema_updates and not use_ema:
            raise AssertionError("reset_num_ema_updates needs use_ema")
        if reset_ema and not (use_ema and ckpt_path is not None):
            raise AssertionError("reset_ema needs use_ema and a ckpt_path")
        if ckpt_path is not None:
            self._restore(ckpt_path, ignore_keys, load_only_unet, reset_ema, reset_num_ema_updates)
        self.register_schedule(given_betas, beta_schedule, timesteps, linear_start, linear_end, cosine_s)
        self.loss_type = loss_type
        self.learn_logvar = learn_logvar
        self.logvar: Any = torch.full((self.num_timesteps,), float(logvar_init))
        if learn_logvar:
            self.logvar = nn.Parameter(self.logvar, requires_grad=True)
        self.ucg_training = dict(ucg_training) if ucg_training else None
        if self.ucg_training:
            self.ucg_prng = np.random.RandomState()

    # -------------------------------------------------------------------------------------- weights

    def _restore(
        self,
        path: str,
        ignore_keys: Sequence[str],
        only_model: bool,
        reset_ema: bool,
        reset_num_ema_updates: bool,
    ) -> None:
        self.init_from_ckpt(path, ignore_keys, only_model)
        if reset_ema:
            logger.info("The average starts anew from the weights of %s.", path)
            self.model_ema = LitEma(self.model)
        if reset_num_ema_updates:
            self.model_ema.reset_num_updates()

    def init_from_ckpt(
        self, path: str | os.PathLike[str], ignore_keys: Sequence[str] = (), only_model: bool = False
    ) -> None:
        """Load weights; missing ones stay as they are.

        Args:
            path: the checkpoint.
            ignore_keys: prefixes of entries to leave out.
            only_model: the file's names begin with `diffusion_model.`.

        Raises:
            CheckpointError: unreadable, or of other shapes (unless `make_it_fit`).
        """
        module: nn.Module = self.model if only_model else self
        own = dict([*module.named_parameters(), *module.named_buffers()])
        weights = self.fit_weights(load_state_dict(path), own)
        load_into(module, weights, ignore_keys=list(ignore_keys), source=path)

    def fit_weights(self, weights: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A checkpoint's weights in the shapes of `own` parameters and buffers, where an option asks for it."""
        return spread_weights(weights, own) if self.make_it_fit else weights

    @contextmanager
    def ema_scope(self, context: str | None = None) -> Iterator[None]:
        """Run a block with the averaged network, where an average is kept; the live one comes back even if it fails."""
        with ema_scope(self.model_ema if self.use_ema else None, self.model):
            if context is not None and self.use_ema:
                logger.debug("%s: averaged weights in place", context)
            yield

    # ------------------------------------------------------------------------------------- sampling

    def p_mean_variance(self, x: Tensor, t: Tensor, clip_denoised: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Mean of p(x_{t-1} | x_t), its variance and log-variance (b, 1, …)."""
        x_start = self.predict_start(x, t, self.model(x, t))
        return self.q_posterior(x_start.clamp(-1.0, 1.0) if clip_denoised else x_start, x, t)

    @torch.no_grad()
    def p_sample(
        self, x: Tensor, t: Tensor, clip_denoised: bool = True, repeat_noise: bool = False
    ) -> Tensor:
        """One step back; at t = 0 the noise is drawn, too, and not added."""
        mean, _, log_variance = self.p_mean_variance(x, t, clip_denoised)
        return mean + self._step_noise(x, t, log_variance, repeat_noise)

    def _step_noise(
        self,
        x: Tensor,
        t: Tensor,
        log_variance: Tensor,
        repeat: bool = False,
        temperature: Any = 1.0,
        dropout: float = 0.0,
    ) -> Tensor:
        noise = noise_like(x.shape, x.device, repeat) * temperature
        if dropout > 0.0:
            noise = F.dropout(noise, p=dropout)
        moves = (t != 0).float().reshape(-1, *((1,) * (x.ndim - 1)))
        return moves * (0.5 * log_variance).exp() * noise

    @torch.no_grad()
    def p_sample_loop(self, shape: Sequence[int], return_intermediates: bool = False) -> Any:
        """Sample from pure noise of the given shape; with the intermediates every `log_every_t` steps on request."""
        img = torch.randn(tuple(shape), device=self.betas.device)
        intermediates = [img]
        for i in tqdm(reversed(range(self.num_timesteps)), desc="Sampling t", total=self.num_timesteps):
            t = torch.full((shape[0],), i, device=img.device, dtype=torch.long)
            img = self.p_sample(img, t, clip_denoised=self.clip_denoised)
            if i % self.log_every_t == 0 or i == self.num_timesteps - 1:
                intermediates.append(img)
        return (img, intermediates) if return_intermediates else img

    @torch.no_grad()
    def sample(self, batch_size: int = 16, return_intermediates: bool = False) -> Any:
        """Draw images (batch_size, channels, image_size, image_size)."""
        shape = (batch_size, self.channels, self.image_size, self.image_size)
        return self.p_sample_loop(shape, return_intermediates=return_intermediates)

    # ------------------------------------------------------------------------------------- training

    def get_loss(self, pred: Tensor, target: Tensor, mean: bool = True) -> Tensor:
        """The configured distance, averaged or element by element.

        Raises:
            NotImplementedError: unknown `loss_type`.
        """
        if self.loss_type == "l1":
            loss = (target - pred).abs()
        elif self.loss_type == "l2":
            loss = (target - pred) ** 2
        else:
            raise NotImplementedError(f"loss_type={self.loss_type!r} is unknown; choose 'l1' or 'l2'")
        return loss.mean() if mean else loss

    def training_target(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What the network should predict."""
        return self.row.target(self, x_start, t, noise)

    def noised(self, x_start: Tensor, t: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """x_t, and what the network should predict from it; the noise is drawn as the objective says unless given."""
        noise = self.objective.draw_noise(x_start) if noise is None else noise
        target = self.training_target(x_start, t, noise)
        return self.q_sample(x_start, t, self.objective.disturb(noise) if self.training else noise), target

    def p_losses(
        self, x_start: Tensor, t: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss at given times (b,), and what to log."""
        x_noisy, target = self.noised(x_start, t, noise)
        loss = self.get_loss(self.model(x_noisy, t), target, mean=False).mean(dim=[1, 2, 3])
        bound = (self.lvlb_weights[self.table_index(t)] * loss).mean()
        weighted = self.objective.weigh(loss, self, t).mean()
        total = self.l_simple_weight * weighted + self.original_elbo_weight * bound
        prefix = "train" if self.training else "val"
        return total, {
            f"{prefix}/loss_simple": loss.mean(),
            f"{prefix}/loss_vlb": bound,
            f"{prefix}/loss": total,
        }

    def draw_times(self, x: Tensor) -> Tensor:
        """Random times (b,) to train a batch at."""
        return self.objective.draw_times(self, len(x), self.device)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Loss of a batch (b, c, h, w) in [-1, 1] at random times."""
        return self.p_losses(x, self.draw_times(x), *args, **kwargs)

    def get_input(self, batch: Mapping[str, Any], k: str) -> Any:
        """Entry `k` of a batch, (b, h, w, c) or (b, h, w) → (b, c, h, w) in float32."""
        return image_from_batch(batch, k)

    def shared_step(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch, and what to log."""
        return self(self.get_input(batch, self.first_stage_key))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Loss of a training batch; conditions are dropped first where `ucg_training` says so."""
        for key, options in (self.ucg_training or {}).items():
            value = "" if options["val"] is None else options["val"]
            for i in range(len(batch[key])):
                if self.ucg_prng.random_sample() < options["p"]:
                    batch[key][i] = value
        loss, loss_dict = self.shared_step(batch)
        size = len(batch[self.first_stage_key])
        self.log_dict(loss_dict, prog_bar=True, logger=True, on_step=True, on_epoch=True, batch_size=size)
        self.log(
            "global_step",
            float(self.global_step),
            prog_bar=False,
            logger=True,
            on_step=True,
            on_epoch=False,
            batch_size=size,
        )
        if self.use_scheduler:
            optimizer: Any = self.optimizers()
            self.log(
                "lr_abs",
                optimizer.param_groups[0]["lr"],
                prog_bar=True,
                logger=True,
                on_step=True,
                on_epoch=False,
                batch_size=size,
            )
        return loss

    @torch.no_grad()
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Losses of a validation batch, live and with averaged weights (suffix `_ema`)."""
        _, live = self.shared_step(batch)
        with self.ema_scope():
            _, averaged = self.shared_step(batch)
        size = len(batch[self.first_stage_key])
        self.log_dict(
            live, prog_bar=False, logger=True, on_step=False, on_epoch=True, batch_size=size, sync_dist=True
        )
        self.log_dict(
            {f"{k}_ema": v for k, v in averaged.items()}, prog_bar=False, logger=True, on_step=False, on_epoch=True,
            batch_size=size, sync_dist=True,
        )  # fmt: skip

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Move the average."""
        if self.use_ema:
            self.model_ema(self.model)

    def configure_optimizers(self) -> Any:
        """AdamW over the network, and the log-variance if it is learned."""
        parameters = list(self.model.parameters()) + ([self.logvar] if self.learn_logvar else [])
        return adamw(parameters, self.learning_rate)

    # ------------------------------------------------------------------------------------- pictures

    @torch.no_grad()
    def log_images(
        self, batch: Mapping[str, Any], N: int = 8, n_row: int = 2, sample: bool = True, return_keys: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Pictures in [-1, 1]: `inputs`, `diffusion_row`, and with `sample` also `samples` and `denoise_row`.

        Args:
            batch: a batch.
            N: images of it.
            n_row: images in the row of the forward process.
            sample: also draw samples with the averaged weights.
            return_keys: return only these entries (all, if none of them exists).
        """
        x = self.get_input(batch, self.first_stage_key).to(self.device)[:N]
        n_row = min(len(x), n_row)
        log = {"inputs": x, "diffusion_row": visualize.diffusion_row(self, x[:n_row], lambda noisy: noisy)}
        if sample:
            with self.ema_scope("Plotting"):
                samples, row = self.sample(batch_size=len(x), return_intermediates=True)
            log |= {"samples": samples, "denoise_row": visualize.rows(row)}
        return visualize.select(log, return_keys)


def adamw(parameters: Sequence[nn.Parameter], lr: float) -> torch.optim.AdamW:
    """AdamW with PyTorch's defaults; on a CPU its fused form, which takes half the time."""
    on_cpu = all(p.device.type == "cpu" and p.is_floating_point() for p in parameters)
    return torch.optim.AdamW(parameters, lr=lr, fused=True if on_cpu else None)


def spread_weights(weights: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Repeat a narrower checkpoint's weights over wider layers (`make_it_fit`).

    Each new channel takes an old one in turn; input channels are then divided by how often their old one is used,
    counted from one, as published (so that even an axis that fits is halved).

    Args:
        weights: of the checkpoint.
        own: parameters and buffers to fill.

    Returns:
        The weights, in the shapes of `own` where both have the entry.

    Raises:
        ValueError: a kernel of another rank or size.
    """
    fitted = dict(weights)
    for name, parameter in own.items():
        old = weights.get(name)
        if old is None or old.shape == parameter.shape:
            continue
        if old.ndim != parameter.ndim or old.shape[2:] != parameter.shape[2:] or not old.ndim:
            raise ValueError(
                f"make_it_fit: {name} is {tuple(old.shape)} in the checkpoint and {tuple(parameter.shape)} here; only the first two axes may differ"
            )
        rows = torch.arange(parameter.shape[0]) % old.shape[0]
        if parameter.ndim == 1:
            fitted[name] = old[rows]
            continue
        columns = torch.arange(parameter.shape[1]) % old.shape[1]
        used = 1 + torch.bincount(columns, minlength=old.shape[1])
        new = old[rows][:, columns]
        fitted[name] = new / used[columns].reshape(1, -1, *((1,) * (new.ndim - 2))).to(new.dtype)
    return fitted
