"""The first stage of chapter three: any encoder, decoder, regularizer and loss, trained by one or two optimizers."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.optim import Optimizer

from sgm.util import get_obj_from_str, instantiate_from_config
from taming.lr_scheduler import multipliers
from taming.models.base import FirstStage, entry_of
from taming.modules.ema import LitEma

__all__ = ["AbstractAutoencoder", "AutoencodingEngine"]

logger = logging.getLogger(__name__)

CHECKPOINT = "sgm.modules.checkpoint.CheckpointEngine"
# published configurations rank checkpoints by a name that the published code never logged
OLD_MONITORS = {"val/rec_loss": "val/loss/rec"}


class AbstractAutoencoder(FirstStage):
    """What all first stages here share.

    Args:
        ema_decay: keep an average of all weights with this decay, as `model_ema`.
        monitor: what checkpoints are ranked by.
        input_key: entry of a batch that holds the image or the frames, (b, c, h, w).
    """

    def __init__(
        self, ema_decay: float | None = None, monitor: str | None = None, input_key: str = "jpg"
    ) -> None:
        super().__init__(input_key, monitor=monitor)
        self.input_key = input_key
        self.use_ema = ema_decay is not None
        self.ema_decay = ema_decay

    def start_average(self) -> None:
        """Begin the averages, once every weight is there."""
        if self.ema_decay is not None:
            self.model_ema = LitEma(self, decay=self.ema_decay)

    def apply_ckpt(self, ckpt: Any) -> None:
        """Load weights: from a path, by an engine's configuration, or not at all (None)."""
        if ckpt is None:
            return
        config = ckpt if isinstance(ckpt, Mapping) else {"target": CHECKPOINT, "params": {"ckpt_path": ckpt}}
        instantiate_from_config(config)(self)

    def get_input(self, batch: Mapping[str, Any]) -> Any:
        """The batch's images (b, c, h, w) or frames."""
        return entry_of(batch, self.input_key)

    def encode(self, x: Any, **options: Any) -> Any:
        """Images → latents."""
        raise NotImplementedError(f"{type(self).__name__} must define encode(x)")

    def decode(self, z: Any, **conditions: Any) -> Any:
        """Latents → images."""
        raise NotImplementedError(f"{type(self).__name__} must define decode(z)")


class AutoencodingEngine(AbstractAutoencoder):
    """An encoder, a regularizer, a decoder and a loss, each from its configuration.

    A loss with `forward_keys` is called with the images, their reconstructions and what it names of: z, optimizer_idx,
    global_step, last_layer, split, regularization_log, autoencoder. Any other is called with both images only. Its
    `get_trainable_parameters` make a second optimizer, that of the discriminator.

    As published, a batch updates one of both optimizers in turn; with `alternate=False` it updates the autoencoder, then the
    discriminator on the same reconstructions, as the papers describe.

    Args:
        encoder_config, decoder_config, loss_config, regularizer_config: what to build.
        optimizer_config: of both optimizers; Adam if None.
        lr_g_factor: the autoencoder learns at this multiple of the learning rate.
        trainable_ae_params: groups of regular expressions: only parameters whose names begin with a match are trained.
        ae_optimizer_args: for each of these groups, options of its own.
        trainable_disc_params, disc_optimizer_args: the same for the discriminator.
        disc_start_iter: before this step the autoencoder has every turn.
        diff_boost_factor: brightens the pictures of differences.
        ckpt_engine: configuration of what loads weights, or their path.
        ckpt_path: the same, as it was called once.
        additional_decode_keys: entries of a batch that `decode` gets, too.
        alternate: see above.
        scheduler_config: learning-rate multiplier for both optimizers.
        options: `ema_decay`, `monitor`, `input_key`.

    Raises:
        AssertionError: another number of groups than of their options (the published error class).
    """

    def __init__(
        self,
        *,
        encoder_config: Any,
        decoder_config: Any,
        loss_config: Any,
        regularizer_config: Any,
        optimizer_config: Any = None,
        lr_g_factor: float = 1.0,
        trainable_ae_params: Sequence[Sequence[str]] | None = None,
        ae_optimizer_args: Sequence[Mapping[str, Any]] | None = None,
        trainable_disc_params: Sequence[Sequence[str]] | None = None,
        disc_optimizer_args: Sequence[Mapping[str, Any]] | None = None,
        disc_start_iter: int = 0,
        diff_boost_factor: float = 3.0,
        ckpt_engine: Any = None,
        ckpt_path: str | None = None,
        additional_decode_keys: Sequence[str] | None = None,
        alternate: bool = True,
        scheduler_config: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.encoder: Any = instantiate_from_config(encoder_config)
        self.decoder: Any = instantiate_from_config(decoder_config)
        self.loss = instantiate_from_config(loss_config)
        self.regularization: Any = instantiate_from_config(regularizer_config)
        self.optimizer_config = optimizer_config or {"target": "torch.optim.Adam"}
        self.lr_g_factor, self.scheduler_config = lr_g_factor, scheduler_config
        self.trainable_ae_params, self.ae_optimizer_args = trainable_ae_params, ae_optimizer_args
        self.trainable_disc_params, self.disc_optimizer_args = trainable_disc_params, disc_optimizer_args
        for patterns, args in (
            (trainable_ae_params, ae_optimizer_args),
            (trainable_disc_params, disc_optimizer_args),
        ):
            if args is not None and len(args) != len(patterns or ()):
                raise AssertionError(
                    f"{len(patterns or ())} groups of trainable parameters, but options for {len(args)}; name options for each, or none"
                )
        self.disc_start_iter, self.alternate = disc_start_iter, alternate
        self.diff_boost_factor = diff_boost_factor
        self.additional_decode_keys = set(additional_decode_keys or ())
        self._shared: dict[str, Any] | None = None  # between the players of one batch
        self.make_projections()
        self.start_average()
        self.apply_ckpt(ckpt_path if ckpt_engine is None else ckpt_engine)

    def make_projections(self) -> None:
        """Layers between encoder, regularizer and decoder; none here."""

    # -------------------------------------------------------------------------------------------------- latents

    def get_input(self, batch: Mapping[str, Any]) -> Any:
        """The batch's images as the encoder wants them; those of the chapters below, (b, h, w, c), are turned round."""
        x = super().get_input(batch)
        channels = getattr(self.encoder, "in_channels", None)
        last = isinstance(x, Tensor) and x.ndim == 4 and x.shape[1] != channels and x.shape[3] == channels
        return rearrange(x, "b h w c -> b c h w").contiguous() if last else x

    def encode(self, x: Tensor, return_reg_log: bool = False, unregularized: bool = False) -> Any:
        """Images (b, c, h, w) → latents.

        Args:
            x: in [-1, 1].
            return_reg_log: return the regularizer's log, too.
            unregularized: return what comes out of the encoder, and an empty log.
        """
        z = self.encoder(x)
        if unregularized:
            return z, {}
        z, log = self.regularization(z)
        return (z, log) if return_reg_log else z

    def decode(self, z: Tensor, **conditions: Any) -> Tensor:
        """Latents → images; conditions go to the decoder."""
        return self.decoder(z, **conditions)

    def forward(self, x: Tensor, **conditions: Any) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Images → latents, reconstructions, and the regularizer's log."""
        z, log = self.encode(x, return_reg_log=True)
        return z, self.decode(z, **conditions), log

    # ------------------------------------------------------------------------------------------------- training

    def get_autoencoder_params(self) -> list[nn.Parameter]:
        """What the first optimizer trains by default: of the loss, of the regularizer, encoder and decoder."""
        return [
            *_trainable(self.loss, "get_trainable_autoencoder_parameters"),
            *_trainable(self.regularization, "get_trainable_parameters"),
            *self.encoder.parameters(),
            *self.decoder.parameters(),
        ]

    def get_discriminator_params(self) -> list[nn.Parameter]:
        """What the second optimizer trains by default; nothing if the loss does not learn."""
        return _trainable(self.loss, "get_trainable_parameters")

    def get_param_groups(
        self, groups: Sequence[Sequence[str] | str], options: Sequence[Mapping[str, Any]] | None
    ) -> list[dict[str, Any]]:
        """Parameters whose names begin with a match of a group's regular expressions, with the options of that group."""
        found = []
        for patterns, extra in zip(groups, options or [{}] * len(groups), strict=True):
            params: list[nn.Parameter] = []
            for pattern in [patterns] if isinstance(patterns, str) else patterns:
                matches = [p for name, p in self.named_parameters() if re.match(pattern, name)]
                if not matches:
                    logger.warning(
                        "No parameter's name begins with a match of %r: nothing is trained by it.", pattern
                    )
                params += [p for p in matches if not any(p is other for other in params)]
            found.append({"params": params, **extra})
        return found

    def instantiate_optimizer_from_config(self, params: Any, lr: float, cfg: Mapping[str, Any]) -> Optimizer:
        """The configured optimizer over parameters or groups of them."""
        return get_obj_from_str(cfg["target"])(params, lr=lr, **(cfg.get("params") or {}))

    def configure_optimizers(self) -> Any:
        """One optimizer for the autoencoder, another if the loss has parameters to train; and their multipliers, if any."""
        players = [
            (
                self.trainable_ae_params,
                self.ae_optimizer_args,
                self.get_autoencoder_params,
                self.lr_g_factor,
            ),
            (self.trainable_disc_params, self.disc_optimizer_args, self.get_discriminator_params, 1.0),
        ]
        optimizers = []
        for groups, options, by_default, factor in players:
            params = by_default() if groups is None else self.get_param_groups(groups, options)
            if params:
                rate = factor * self.learning_rate
                optimizers.append(self.instantiate_optimizer_from_config(params, rate, self.optimizer_config))
        if self.scheduler_config is None:
            return optimizers
        return optimizers, multipliers(optimizers, self.scheduler_config)

    def players(self, count: int, batch_idx: int) -> list[int]:
        """Whose turns a batch has: one of both in turn, or both; before `disc_start_iter` only the autoencoder's."""
        if self.global_step < self.disc_start_iter:
            return [0]
        if self.alternate:
            return [batch_idx // self.accumulate_grad_batches % count]
        return super().players(count, batch_idx)

    def turn(self, player: int, batch: Mapping[str, Any], batch_idx: int, shared: dict[str, Any]) -> Tensor:
        """One player's loss, by `inner_training_step`; a second one judges the first one's reconstructions."""
        shared.setdefault(
            "step", self.global_step
        )  # the first one's update must not make it later for the second
        self._shared = shared
        try:
            return self.inner_training_step(batch, batch_idx, optimizer_idx=player)
        finally:
            self._shared = None

    def inner_training_step(self, batch: Mapping[str, Any], batch_idx: int, optimizer_idx: int = 0) -> Tensor:
        """The loss of one of the two players on a batch, logged."""
        x, z, reconstruction, reg_log = self._outputs(batch)
        loss, log = self._judge(x, z, reconstruction, reg_log, optimizer_idx, "train")
        every: dict[str, Any] = {"logger": True, "on_step": True, "batch_size": len(x)}
        self.log_dict(log, prog_bar=False, on_epoch=True, **every)
        if optimizer_idx == 0:
            self.log("loss", loss.mean().detach(), prog_bar=True, on_epoch=False, **every)
        return loss

    def _outputs(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        """Images, latents, reconstructions and the regularizer's log; detached if an earlier player made them."""
        if self._shared is not None and "outputs" in self._shared:
            return self._shared["outputs"]
        x = self.get_input(batch)
        z, reconstruction, log = self(x, **self._conditions(batch))
        if self._shared is not None:
            kept = {k: v.detach() if isinstance(v, Tensor) else v for k, v in log.items()}
            self._shared["outputs"] = (x, z.detach(), reconstruction.detach(), kept)
        return x, z, reconstruction, log

    def _conditions(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return {key: batch[key] for key in self.additional_decode_keys if key in batch}

    def _judge(
        self,
        x: Tensor,
        z: Tensor,
        reconstruction: Tensor,
        reg_log: dict[str, Any],
        player: int,
        split: str,
    ) -> tuple[Tensor, dict[str, Any]]:
        """The loss, and what to log."""
        step = self.global_step if self._shared is None else self._shared["step"]
        told = {
            "z": z, "optimizer_idx": player, "global_step": step, "last_layer": self.get_last_layer(), "split": split,
            "regularization_log": reg_log, "autoencoder": self,
        }  # fmt: skip
        keys = getattr(self.loss, "forward_keys", ())
        out = self.loss(x, reconstruction, **{key: told[key] for key in keys})
        return (out, {f"{split}/loss/rec": out.detach()}) if isinstance(out, Tensor) else out

    # ------------------------------------------------------------------------------------------------ validation

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Any]:
        """Losses and PSNR with the live weights (`val/…`) and with the averaged ones (`val_ema/…`), returned without the PSNR."""
        return self._evaluate_twice(batch, "val")

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Any]:
        """As `validation_step`, for the test split."""
        return self._evaluate_twice(batch, "test")

    def _evaluate_twice(self, batch: Mapping[str, Any], split: str) -> dict[str, Any]:
        log = self._evaluate_split(batch, split)
        with self.ema_scope():
            return log | self._evaluate_split(batch, f"{split}_ema")

    def _evaluate_split(self, batch: Mapping[str, Any], split: str) -> dict[str, Any]:
        x = self.get_input(batch)
        z, reconstruction, reg_log = self(x, **self._conditions(batch))
        log = self._judge(x, z, reconstruction, reg_log, 0, split)[1]
        if self.get_discriminator_params():
            log = log | self._judge(x, z, reconstruction, reg_log, 1, split)[1]
        over_epoch: dict[str, Any] = {
            "on_step": False,
            "on_epoch": True,
            "sync_dist": True,
            "batch_size": len(x),
        }
        if f"{split}/loss/rec" in log:
            self.log(f"{split}/loss/rec", log[f"{split}/loss/rec"], **over_epoch)
        old = getattr(self, "monitor", None)
        if old in OLD_MONITORS and OLD_MONITORS[old] in log:
            self.log(old, log[OLD_MONITORS[old]], **over_epoch)
        if x.ndim == 4 and x.shape == reconstruction.shape:
            self.log(f"{split}/psnr", self.psnr(x, reconstruction), **over_epoch)
        self.log_dict({k: v for k, v in log.items() if k != f"{split}/loss/rec"}, **over_epoch)
        return log

    # -------------------------------------------------------------------------------------------------- pictures

    @torch.no_grad()
    def log_images(
        self, batch: Mapping[str, Any], additional_log_kwargs: Mapping[str, Any] | None = None, **ignored: Any
    ) -> dict[str, Tensor]:
        """Pictures in [-1, 1].

        Returns:
            `inputs`, `reconstructions`, `diff` (absolute, -1 for none), `diff_boost`; what the loss draws; the same three with
            averaged weights, `…_ema`; and reconstructions with other conditions of the decoder, `reconstructions-name=value`.
        """
        x, conditions = self.get_input(batch).to(self.device), self._conditions(batch)
        reconstruction = self(x, **conditions)[1]
        log = {"inputs": x} | self._compare(x, reconstruction, "")
        if hasattr(self.loss, "log_images"):
            log |= self.loss.log_images(x, reconstruction)
        with self.ema_scope():
            log |= self._compare(x, self(x, **conditions)[1], "_ema")
        if additional_log_kwargs:
            name = "-".join(f"{key}={value}" for key, value in additional_log_kwargs.items())
            log[f"reconstructions-{name}"] = self(x, **{**conditions, **additional_log_kwargs})[1]
        return log

    def _compare(self, x: Tensor, reconstruction: Tensor, suffix: str) -> dict[str, Tensor]:
        difference = 0.5 * (reconstruction.clamp(-1.0, 1.0) - x).abs()
        return {
            f"reconstructions{suffix}": reconstruction,
            f"diff{suffix}": 2.0 * difference.clamp(0, 1) - 1.0,
            f"diff_boost{suffix}": 2.0 * (self.diff_boost_factor * difference).clamp(0, 1) - 1.0,
        }


def _trainable(part: Any, method: str) -> list[nn.Parameter]:
    return list(getattr(part, method)()) if hasattr(part, method) else []
