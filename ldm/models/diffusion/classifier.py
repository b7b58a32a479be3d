"""A classifier of noisy latents, for guiding a latent diffusion model (Dhariwal & Nichol 2021, section 4)."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from einops import rearrange
from omegaconf import OmegaConf
from torch import Tensor, nn

from ldm.modules.diffusionmodules.openaimodel import EncoderUNetModel, UNetModel
from ldm.util import log_txt_as_img
from taming.checkpoint import load_into, load_state_dict
from taming.lr_scheduler import multipliers
from taming.models.base import image_from_batch
from taming.util import freeze, instantiate_from_config

logger = logging.getLogger(__name__)

# what is told apart: the network that does it, and whether it has a pooled output
NETWORKS: dict[str, tuple[type[nn.Module], bool]] = {
    "class_label": (EncoderUNetModel, True),
    "segmentation": (UNetModel, False),
}


class NoisyLatentImageClassifier(pl.LightningModule):
    """Tells from x_t and t what a picture shows: its class, or a map of labels in the latents' size.

    Its network has the shape of the diffusion model's own; that model is read from its log folder and stays fixed.

    Args:
        diffusion_path: a log folder; of `configs/*-project.yaml` the last one counts, in natural order.
        num_classes: classes, or labels of a map.
        ckpt_path: weights to start from.
        pool: how the classes' network pools, see `EncoderUNetModel`; "attention" needs num_head_channels in the UNet's
            configuration.
        label_key: "class_label" or "segmentation"; the diffusion model's `cond_stage_key`, where it has one, overrules it.
        diffusion_ckpt_path: the diffusion model's weights.
        scheduler_config: learning-rate multiplier.
        weight_decay: of AdamW.
        log_steps: validation measures accuracy at so many times.
        monitor: what checkpoints are ranked by.

    Raises:
        FileNotFoundError: no configuration in `diffusion_path`.
        NotImplementedError: another label key.
    """

    learning_rate: float
    diffusion_model: Any

    def __init__(
        self,
        diffusion_path: str | os.PathLike[str],
        num_classes: int,
        ckpt_path: str | None = None,
        pool: str = "attention",
        label_key: str | None = None,
        diffusion_ckpt_path: str | None = None,
        scheduler_config: Any = None,
        weight_decay: float = 1e-2,
        log_steps: int = 10,
        monitor: str = "val/loss",
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.diffusion_config = newest_config(diffusion_path).model
        if diffusion_ckpt_path is not None:
            self.diffusion_config.params.ckpt_path = diffusion_ckpt_path
        self.diffusion_model = freeze(instantiate_from_config(self.diffusion_config))
        self.label_key = getattr(self.diffusion_model, "cond_stage_key", label_key)
        if self.label_key not in NETWORKS:
            raise NotImplementedError(
                f"label_key={self.label_key!r} cannot be told apart; choose one of {sorted(NETWORKS)}"
            )
        self.model = self._network(pool)
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path)
        self.monitor = monitor
        self.log_time_interval = max(1, self.diffusion_model.num_timesteps // log_steps)
        self.scheduler_config = scheduler_config
        self.use_scheduler = scheduler_config is not None
        self.weight_decay = weight_decay

    def _network(self, pool: str) -> nn.Module:
        kind, is_pooled = NETWORKS[str(self.label_key)]
        options: Any = OmegaConf.to_container(self.diffusion_config.params.unet_config.params, resolve=True)
        # the diffusion network's input may hold a condition, its output is a latent
        options |= {"in_channels": options["out_channels"], "out_channels": self.num_classes}
        return kind(**options, **({"pool": pool} if is_pooled else {}))

    def init_from_ckpt(
        self, path: str | os.PathLike[str], ignore_keys: tuple[str, ...] = (), only_model: bool = False
    ) -> None:
        """Load weights, of everything or (`only_model`) of the classifying network."""
        load_into(
            self.model if only_model else self,
            load_state_dict(path),
            ignore_keys=list(ignore_keys),
            source=path,
        )

    # ------------------------------------------------------------------------------------ input

    def get_input(self, batch: Mapping[str, Any], k: str) -> Tensor:
        """Entry `k` of a batch, (b, h, w, c) or (b, h, w) → (b, c, h, w) in float32."""
        return image_from_batch(batch, k)

    @torch.no_grad()
    def get_conditioning(self, batch: Mapping[str, Any], k: str | None = None) -> Tensor:
        """Labels (b,), or maps (b, labels, h', w'), halved once for each level of the first stage."""
        targets = batch[str(self.label_key) if k is None else k]
        if self.label_key == "segmentation":
            targets = rearrange(targets, "b h w c -> b c h w").float()
            for _ in range(self.diffusion_model.first_stage_model.encoder.num_resolutions - 1):
                height, width = targets.shape[-2:]
                targets = F.interpolate(targets, size=(height // 2, width // 2), mode="nearest")
        return targets.to(self.device)

    @torch.no_grad()
    def get_x_noisy(self, x: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents noised as the diffusion model does it, at its times t (b,)."""
        return self.diffusion_model.q_sample(x_start=x, t=t, noise=noise)

    def forward(self, x_noisy: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Logits (b, classes), or (b, labels, h', w'), of noisy latents at times t (b,)."""
        return self.model(x_noisy, t)

    # --------------------------------------------------------------------------------- training

    @torch.no_grad()
    def compute_top_k(self, logits: Tensor, labels: Tensor, k: int, reduction: str = "mean") -> Any:
        """Is the label (b, …) among the k likeliest of logits (b, classes, …)?

        Args:
            logits, labels: see above.
            k: at most the number of classes.
            reduction: "mean" gives the share as a number, "none" ones and zeros (b,).

        Raises:
            ValueError: another reduction.
        """
        best = logits.topk(min(k, logits.shape[1]), dim=1).indices
        hits = (best == labels.unsqueeze(1)).float().sum(dim=1)
        if reduction == "mean":
            return hits.mean().item()
        if reduction == "none":
            return hits
        raise ValueError(f"reduction={reduction!r} is unknown; choose 'mean' or 'none'")

    def shared_step(
        self, batch: Mapping[str, Any], t: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Loss, logits, noisy latents and labels of a batch, at random times or all at step t."""
        diffusion = self.diffusion_model
        x, *_ = diffusion.get_input(batch, k=diffusion.first_stage_key)
        targets = self.get_conditioning(batch)
        if targets.ndim == 4:
            targets = targets.argmax(dim=1)
        if t is None:
            times = torch.randint(0, diffusion.num_timesteps, (len(x),), device=self.device).long()
        else:
            times = torch.full((len(x),), t, device=self.device, dtype=torch.long)
        x_noisy = self.get_x_noisy(x, times)
        logits = self(x_noisy, times)
        loss = F.cross_entropy(logits, targets, reduction="none")
        if t is None:
            self.write_logs(loss.detach(), logits.detach(), targets.detach())
        return loss.mean(), logits, x_noisy, targets

    def write_logs(self, loss: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Log loss and accuracies (acc@5 where there are as many classes), and the learning rate."""
        prefix = "train" if self.training else "val"
        live = self.training
        log = {f"{prefix}/loss": loss.mean()}
        for k in (1, 5):
            if k <= logits.shape[1]:
                log[f"{prefix}/acc@{k}"] = self.compute_top_k(logits, targets, k)
        size = len(logits)
        self.log_dict(
            log, prog_bar=False, logger=True, on_step=live, on_epoch=True, batch_size=size, sync_dist=not live
        )
        if live and self._trainer is not None:
            optimizer: Any = self.optimizers()
            self.log(
                "lr_abs",
                optimizer.param_groups[0]["lr"],
                on_step=True,
                logger=True,
                on_epoch=False,
                prog_bar=True,
            )

    def on_train_epoch_start(self) -> None:
        """The diffusion model's network is not needed: it need not lie on the accelerator."""
        self.diffusion_model.model.to("cpu")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Loss of a training batch at random times."""
        loss, *_ = self.shared_step(batch)
        return loss

    def reset_noise_accs(self) -> None:
        """Forget the accuracies by time."""
        steps = range(0, self.diffusion_model.num_timesteps, self.log_time_interval)
        self.noisy_acc: dict[int, dict[str, list[float]]] = {t: {"acc@1": [], "acc@5": []} for t in steps}

    def on_validation_start(self) -> None:
        """Begin anew."""
        self.reset_noise_accs()

    @torch.no_grad()
    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Loss of a validation batch at random times; its accuracies at fixed ones are kept in `noisy_acc`."""
        loss, *_ = self.shared_step(batch)
        for t, kept in self.noisy_acc.items():
            _, logits, _, targets = self.shared_step(batch, t)
            for k in (1, 5):
                kept[f"acc@{k}"].append(self.compute_top_k(logits, targets, k))
        return loss

    def configure_optimizers(self) -> Any:
        """AdamW over the classifying network, with its multiplier if there is one."""
        optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay
        )
        if not self.use_scheduler:
            return optimizer
        return [optimizer], multipliers([optimizer], self.scheduler_config)

    # --------------------------------------------------------------------------------- pictures

    @torch.no_grad()
    def log_images(
        self, batch: Mapping[str, Any], N: int = 8, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Pictures in [-1, 1]: `inputs`, their `labels`, and what is seen in them at a few times.

        Entries `inputs@t` are decoded noisy latents, `pred@t` what the network takes them for.
        """
        diffusion = self.diffusion_model
        x = self.get_input(batch, diffusion.first_stage_key)[:N].to(self.device)
        z = diffusion.get_first_stage_encoding(diffusion.encode_first_stage(x))
        targets = self.get_conditioning(batch)[:N]
        log = {"inputs": x, "labels": self._picture(targets, x)}
        for t in range(0, diffusion.num_timesteps, self.log_time_interval):
            times = torch.full((len(z),), t, device=self.device, dtype=torch.long)
            noisy = self.get_x_noisy(z, times)
            log[f"inputs@t{t}"] = diffusion.decode_first_stage(noisy)
            log[f"pred@t{t}"] = self._picture(self(noisy, times), x)
        return log

    def _picture(self, labels: Tensor, x: Tensor) -> Tensor:
        """Labels, logits or maps as pictures of the size of x."""
        size = (x.shape[3], x.shape[2])
        if labels.ndim == 4:
            grey = labels.argmax(dim=1, keepdim=True).float() / max(1, self.num_classes - 1) * 2 - 1
            return F.interpolate(grey, size=x.shape[2:]).expand(-1, 3, -1, -1)
        names = labels.argmax(dim=1) if labels.ndim == 2 else labels
        return log_txt_as_img(size, [str(int(n)) for n in names], size=max(10, x.shape[2] // 8))


def newest_config(folder: str | os.PathLike[str]) -> Any:
    """The last `configs/*-project.yaml` of a log folder, numbers in names counting as numbers.

    Raises:
        FileNotFoundError: there is none.
    """
    found = sorted(Path(folder, "configs").glob("*-project.yaml"), key=lambda path: natural(path.name))
    if not found:
        raise FileNotFoundError(
            f"no configs/*-project.yaml in {folder}: give the log folder of a diffusion model's training"
        )
    return OmegaConf.load(found[-1])


def natural(name: str) -> list[Any]:
    """A sorting key under which "run10" comes after "run9"."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
