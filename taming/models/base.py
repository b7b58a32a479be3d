"""The first stages' common ground: reading batches and checkpoints, pictures, and the two-player training loop."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio

from taming.checkpoint import load_into, load_state_dict
from taming.lr_scheduler import multipliers
from taming.modules.diffusionmodules.model import Decoder, Encoder
from taming.modules.ema import LitEma, ema_scope
from taming.util import instantiate_from_config, nearest


def entry_of(batch: Mapping[str, Any], key: str) -> Any:
    """Entry `key` of a batch.

    Raises:
        KeyError: the batch has no such entry; the message lists those it has.
    """
    if key not in batch:
        raise KeyError(
            f"the batch has no entry {key!r}. {nearest(key, batch)} It holds: {', '.join(map(str, batch))}."
        )
    return batch[key]


def image_from_batch(batch: Mapping[str, Any], key: str) -> Tensor:
    """Entry `key` of a batch, (b, h, w, c) or (b, h, w) of any number type → (b, c, h, w) in float32.

    Raises:
        KeyError: the batch has no such entry; the message lists those it has.
    """
    x = entry_of(batch, key)
    if x.ndim == 3:
        x = x[..., None]
    return rearrange(x, "b h w c -> b c h w").contiguous().float()


class FirstStage(pl.LightningModule):
    """An encoder, a decoder, and a loss with or without a discriminator.

    A subclass builds its networks (`build`), then defines `encode`, `decode`, `forward` and `player_loss`. Training is by hand
    (Lightning 2 has no automatic loop for two optimizers): each batch updates the autoencoder, then the discriminator
    on the same reconstructions. Gradient accumulation and clipping work in it: set `accumulate_grad_batches`,
    `gradient_clip_val` and `gradient_clip_algorithm` (the command line moves them here from the trainer's section).

    `batch_counter` counts the training batches that moved the weights, and is saved: a loss's `disc_start` means
    batches, as in the papers. Lightning's `global_step` counts the autoencoder's steps only, so that `max_steps` and
    checkpoint intervals mean batches, too.

    Args:
        image_key: entry of a batch that holds the image, (b, h, w, c) or (b, h, w).
        colorize_nlabels: number of labels to draw in random colours, if the images are segmentations.
        monitor: what checkpoints are ranked by.
    """

    learning_rate: float
    colorize: Tensor
    accumulate_grad_batches: int = 1
    gradient_clip_val: float | None = None
    gradient_clip_algorithm: str = "norm"
    scheduler_config: Any = None  # learning-rate multiplier for both players
    lr_g_factor: float = 1.0  # the autoencoder learns at this multiple of the learning rate

    def __init__(
        self, image_key: str = "image", colorize_nlabels: int | None = None, monitor: str | None = None
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.image_key = image_key
        self.batch_counter = 0
        if colorize_nlabels is not None:
            if not isinstance(colorize_nlabels, int):
                raise AssertionError(f"colorize_nlabels={colorize_nlabels!r} must be a whole number")
            self.register_buffer("colorize", torch.randn(3, colorize_nlabels, 1, 1))
        if monitor is not None:
            self.monitor = monitor

    def build(self, ddconfig: Any, lossconfig: Any) -> None:
        """Make encoder, decoder and loss from their configurations."""
        self.encoder = Encoder(**ddconfig)
        self.decoder = Decoder(**ddconfig)
        self.loss = instantiate_from_config(lossconfig)

    # ---------------------------------------------------------------------------------------------- reading

    def init_from_ckpt(self, path: str | os.PathLike[str], ignore_keys: Sequence[str] = ()) -> None:
        """Load weights; entries whose names begin with one of `ignore_keys` are left out, missing ones stay as they are.

        Raises:
            CheckpointError: unreadable, or of other shapes.
        """
        load_into(self, load_state_dict(path), ignore_keys=list(ignore_keys), source=path)

    def get_input(self, batch: Mapping[str, Any], k: str) -> Tensor:
        """Entry `k` of a batch, (b, h, w, c) or (b, h, w) → (b, c, h, w) in float32."""
        return image_from_batch(batch, k)

    def get_last_layer(self) -> Tensor:
        """The decoder's last weight, at which the adversarial loss is balanced."""
        return self.decoder.get_last_layer()

    @contextmanager
    def ema_scope(self, context: str | None = None) -> Iterator[None]:
        """Run a block with the averaged weights, where an average is kept."""
        with ema_scope(self._ema, self):
            yield

    @property
    def _ema(self) -> LitEma | None:
        """The averages of a subclass that keeps them, as `model_ema`."""
        ema = self._modules.get("model_ema")
        return ema if isinstance(ema, LitEma) else None

    # --------------------------------------------------------------------------------------------- training

    def reconstruct(self, inputs: Tensor) -> tuple[Any, ...]:
        """The reconstruction, and whatever else `player_loss` needs to judge it."""
        return self(inputs)

    def player_loss(
        self, player: int, inputs: Tensor, outputs: tuple[Any, ...], split: str
    ) -> tuple[Tensor, dict[str, Any]]:
        """Loss and logs of the autoencoder (player 0) or the discriminator (1), given what `reconstruct` returned."""
        raise NotImplementedError

    def autoencoder_parameters(self) -> list[nn.Parameter]:
        """What the first optimizer trains, in the published order."""
        raise NotImplementedError

    @property
    def discriminator(self) -> nn.Module | None:
        """The loss's discriminator, if it has one."""
        return getattr(self.loss, "discriminator", None)

    def configure_optimizers(self) -> Any:
        """Adam (β = 0.5, 0.9) for the autoencoder, another for the discriminator if there is one, and their multipliers."""
        rates = [self.learning_rate * self.lr_g_factor, self.learning_rate]
        players = [self.autoencoder_parameters()]
        if self.discriminator is not None:
            players.append(list(self.discriminator.parameters()))
        optimizers = [
            torch.optim.Adam(p, lr=rate, betas=(0.5, 0.9)) for p, rate in zip(players, rates, strict=False)
        ]
        if self.scheduler_config is None:
            return optimizers, []
        return optimizers, multipliers(optimizers, self.scheduler_config)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """One batch: the autoencoder's update, then the discriminator's on the same, detached reconstruction."""
        optimizers = _as_list(self.optimizers())
        moves = (batch_idx + 1) % self.accumulate_grad_batches == 0 or self.trainer.is_last_batch
        players = self.players(len(optimizers), batch_idx)
        shared: dict[str, Any] = {}
        for player in players:
            with optimizers[player].toggle_model(sync_grad=moves):
                loss = self.turn(player, batch, batch_idx, shared)
                self.manual_backward(loss / self.accumulate_grad_batches)
                if moves:
                    self._step(optimizers[player], counts=player == players[0])
        if moves:
            self.batch_counter += 1
            for scheduler in _as_list(self.lr_schedulers()):
                scheduler.step()

    def players(self, count: int, batch_idx: int) -> list[int]:
        """Whose turns a batch has, in their order: numbers of optimizers, of which there are `count`."""
        return [0, 1] if count > 1 and self._discriminator_plays() else [0]

    def turn(self, player: int, batch: Mapping[str, Any], batch_idx: int, shared: dict[str, Any]) -> Tensor:
        """One player's loss on a batch, logged; `shared` hands on to the next player what need not be computed again."""
        if not shared:
            inputs = self.get_input(batch, self.image_key)
            shared |= {"inputs": inputs, "outputs": self.reconstruct(inputs)}
        loss, log = self.player_loss(player, **shared, split="train")
        every: dict[str, Any] = {
            "logger": True,
            "on_step": True,
            "on_epoch": True,
            "batch_size": len(shared["inputs"]),
        }
        self.log(f"train/{('aeloss', 'discloss')[player]}", loss.detach(), prog_bar=True, **every)
        self.log_dict(log, prog_bar=False, **every)
        return loss

    def _discriminator_plays(self) -> bool:
        """Before `disc_start` the discriminator's loss is zero: its pass would cost time and change nothing."""
        active = getattr(self.loss, "active_factor", None)
        return active is None or active(self.batch_counter) > 0

    def _step(self, optimizer: Any, counts: bool) -> None:
        if self.gradient_clip_val:
            self.clip_gradients(optimizer, self.gradient_clip_val, self.gradient_clip_algorithm)
        if counts:
            optimizer.step()
        else:
            # through the strategy (so that precision plugins see it), but past Lightning's count of steps
            self.trainer.strategy.optimizer_step(optimizer.optimizer, lambda: None)
        optimizer.zero_grad()

    def on_train_batch_end(self, *args: Any) -> None:
        """Move the average, where one is kept."""
        if self._ema is not None:
            self._ema(self)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the batch counter beside Lightning's own state."""
        checkpoint["batch_counter"] = self.batch_counter

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the batch counter up again; an older trainer's `global_step` was one a batch."""
        self.batch_counter = int(checkpoint.get("batch_counter", checkpoint.get("global_step", 0)))

    # ------------------------------------------------------------------------------------------- validation

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Losses and PSNR with the live weights and, where an average is kept, with the averaged ones (`val_ema/…`)."""
        self._evaluate(batch, "val")
        if self._ema is not None:
            with self.ema_scope():
                self._evaluate(batch, "val_ema")

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """As `validation_step`, for the test split (`test/…`, `test_ema/…`)."""
        self._evaluate(batch, "test")
        if self._ema is not None:
            with self.ema_scope():
                self._evaluate(batch, "test_ema")

    def _evaluate(self, batch: Mapping[str, Any], split: str) -> None:
        inputs = self.get_input(batch, self.image_key)
        outputs = self.reconstruct(inputs)
        aeloss, log = self.player_loss(0, inputs, outputs, split=split)
        over_epoch: dict[str, Any] = {
            "on_step": False,
            "on_epoch": True,
            "sync_dist": True,
            "batch_size": len(inputs),
        }
        if f"{split}/rec_loss" in log:
            self.log(f"{split}/rec_loss", log.pop(f"{split}/rec_loss"), prog_bar=True, **over_epoch)
        log[f"{split}/aeloss"] = aeloss
        if self.discriminator is not None:
            log |= self.player_loss(1, inputs, outputs, split=split)[1]
        log |= {f"{split}/{name}": value for name, value in self.quality(inputs, outputs[0]).items()}
        self.log_dict(log, **over_epoch)

    def quality(self, inputs: Tensor, reconstructions: Tensor) -> dict[str, Tensor]:
        """What validation measures beside the losses."""
        return {"psnr": self.psnr(inputs, reconstructions)}

    @staticmethod
    def psnr(inputs: Tensor, reconstructions: Tensor) -> Tensor:
        """Peak signal-to-noise ratio in dB, the mean over images in [-1, 1]."""
        return peak_signal_noise_ratio(
            reconstructions.float().clamp(-1, 1),
            inputs.float(),
            data_range=2.0,
            reduction="elementwise_mean",
            dim=(1, 2, 3),
        )

    # --------------------------------------------------------------------------------------------- pictures

    def to_rgb(self, x: Tensor) -> Tensor:
        """Segmentation maps (b, labels, h, w) → (b, 3, h, w) in [-1, 1], each label in a random colour."""
        if self.image_key != "segmentation":
            raise AssertionError(
                f"only segmentations are drawn in colours, not {self.image_key!r} with {x.shape[1]} channels"
            )
        if not hasattr(self, "colorize"):
            self.register_buffer("colorize", torch.randn(3, x.shape[1], 1, 1).to(x))
        x = F.conv2d(x, weight=self.colorize)
        return 2.0 * (x - x.min()) / (x.max() - x.min()) - 1.0

    def displayable(self, *images: Tensor) -> Iterable[Tensor]:
        """Images as they are if they have up to three channels, else in colours."""
        return (self.to_rgb(x) if x.shape[1] > 3 else x for x in images)

    def log_images(self, batch: Mapping[str, Any], **kwargs: Any) -> dict[str, Tensor]:
        """Pictures of a batch in [-1, 1]: `inputs` and `reconstructions`."""
        x = self.get_input(batch, self.image_key).to(self.device)
        inputs, reconstructions = self.displayable(x, self(x)[0])
        return {"inputs": inputs, "reconstructions": reconstructions}


def _as_list(schedulers: Any) -> list[Any]:
    if schedulers is None:
        return []
    return list(schedulers) if isinstance(schedulers, Sequence) else [schedulers]
