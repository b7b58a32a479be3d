"""The diffusion engine: a network, a denoiser, a conditioner, a first stage, a loss and a sampler, put together and trained."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.lora import train_lora
from ldm.models.diffusion.adapted import Adapted
from ldm.models.diffusion.pixel import adamw
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from sgm.modules import UNCONDITIONAL_CONFIG
from sgm.modules.autoencoding.temporal_ae import VideoDecoder
from sgm.modules.diffusionmodules.wrappers import OPENAIUNETWRAPPER
from sgm.modules.ema import LitEma
from sgm.util import get_obj_from_str, instantiate_from_config, isimage, log_txt_as_img
from taming.checkpoint import load_into, load_state_dict
from taming.lr_scheduler import multipliers
from taming.models.base import entry_of
from taming.modules.ema import ema_scope
from taming.util import freeze

logger = logging.getLogger(__name__)

CHECKPOINTS = (".ckpt", ".safetensors")


class DiffusionEngine(Adapted):
    """A latent diffusion model in the σ view, out of exchangeable parts.

    Args:
        network_config: of the network.
        denoiser_config: of the `Denoiser`.
        first_stage_config: of the autoencoder; its weights are frozen.
        conditioner_config: of the `GeneralConditioner`; no conditions if None.
        sampler_config: of the sampler; training needs one, for its pictures.
        optimizer_config: `target` and `params`; AdamW if None.
        scheduler_config: learning-rate multiplier, see `sgm.lr_scheduler`.
        loss_fn_config: of the loss; training needs one.
        network_wrapper: dotted path of the class that calls the network with a condition; `OpenAIWrapper` if None.
        ckpt_path: weights to start from.
        use_ema, ema_decay_rate: keep an average of the network, as `model_ema`.
        scale_factor: latents are multiplied by it.
        disable_first_stage_autocast: run the first stage in the precision of its weights.
        input_key: entry of a batch that holds the images, (b, c, h, w) in [-1, 1].
        log_keys: entries of a batch that are drawn as conditions; all that embedders read if None.
        no_cond_log: draw none of them.
        compile_model: compile the network; the names of its weights stay the same.
        en_and_decode_n_samples_a_time: so many images go through the first stage at once; all if None.
        lora_config: train low-rank adapters of the network, and with `text_encoder: true` of the embedders that hold a CLIP, and
            nothing else; see `ldm.models.diffusion.adapted.Adapted`.

    Raises:
        CheckpointError: weights that cannot be read or do not fit.
        NotImplementedError: ckpt_path is no .ckpt or .safetensors (the published error class).
        ValueError: lora_config beside use_ema, or text_encoder without a text encoder of that kind.

    Source: Rombach et al. 2022; Karras et al. 2022; Podell et al. 2023 (SDXL).
    """

    learning_rate: float

    def __init__(
        self,
        network_config: Any,
        denoiser_config: Any,
        first_stage_config: Any,
        conditioner_config: Any = None,
        sampler_config: Any = None,
        optimizer_config: Any = None,
        scheduler_config: Any = None,
        loss_fn_config: Any = None,
        network_wrapper: str | None = None,
        ckpt_path: str | None = None,
        use_ema: bool = False,
        ema_decay_rate: float = 0.9999,
        scale_factor: float = 1.0,
        disable_first_stage_autocast: bool = False,
        input_key: str = "jpg",
        log_keys: Sequence[str] | None = None,
        no_cond_log: bool = False,
        compile_model: bool = False,
        en_and_decode_n_samples_a_time: int | None = None,
        lora_config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if lora_config is not None:
            self.prepare_adapters(lora_config, {"use_ema": use_ema})
        self.input_key, self.log_keys, self.no_cond_log = input_key, log_keys, no_cond_log
        self.optimizer_config, self.scheduler_config = optimizer_config, scheduler_config
        self.scale_factor = scale_factor
        self.disable_first_stage_autocast = disable_first_stage_autocast
        self.en_and_decode_n_samples_a_time = en_and_decode_n_samples_a_time
        wrapper = get_obj_from_str(network_wrapper or OPENAIUNETWRAPPER)
        self.model: nn.Module = wrapper(instantiate_from_config(network_config), compile_model=compile_model)
        self.denoiser: Any = instantiate_from_config(denoiser_config)
        self.sampler: Any = None if sampler_config is None else instantiate_from_config(sampler_config)
        self.conditioner: Any = instantiate_from_config(conditioner_config or UNCONDITIONAL_CONFIG)
        self.first_stage_model: Any = freeze(instantiate_from_config(first_stage_config))
        self.loss_fn: Any = None if loss_fn_config is None else instantiate_from_config(loss_fn_config)
        self.use_ema = use_ema
        if use_ema:
            self.model_ema = LitEma(self.model, decay=ema_decay_rate)
        self.register_load_state_dict_pre_hook(_adopt_latent_diffusion)
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path)
        if lora_config is not None:
            self._adapt(lora_config)

    # ---------------------------------------------------------------------------------------------- weights

    def init_from_ckpt(self, path: str) -> None:
        """Load weights; missing ones stay as they are, and the log says which.

        Checkpoints of `ldm` load, too: their text encoder becomes the first embedder.

        Raises:
            CheckpointError: unreadable, or of other shapes.
            NotImplementedError: another kind of file.
        """
        if Path(path).suffix not in CHECKPOINTS:
            raise NotImplementedError(
                f"ckpt_path={str(path)!r}: weights are read from {' and '.join(CHECKPOINTS)} files"
            )
        load_into(self, load_state_dict(path), source=path)

    @contextmanager
    def ema_scope(self, context: str | None = None) -> Iterator[None]:
        """Run a block with the averaged network, where an average is kept; the live one comes back even if it fails."""
        with ema_scope(self.model_ema if self.use_ema else None, self.model):
            if context is not None and self.use_ema:
                logger.debug("%s: averaged weights in place", context)
            yield

    # ------------------------------------------------------------------------------------------ first stage

    def get_input(self, batch: Mapping[str, Any]) -> Tensor:
        """The images of a batch, (b, c, h, w) in [-1, 1].

        Raises:
            KeyError: the batch has none.
        """
        return entry_of(batch, self.input_key)

    @torch.no_grad()
    def encode_first_stage(self, x: Tensor) -> Tensor:
        """Images (b, c, h, w) → scaled latents."""
        return self.scale_factor * self._through_first_stage(x, self._encode)

    @torch.no_grad()
    def decode_first_stage(self, z: Tensor) -> Tensor:
        """Scaled latents → images (b, c, h, w); a decoder of video takes all that go at once for one clip."""
        return self._through_first_stage(1.0 / self.scale_factor * z, self._decode)

    def _encode(self, x: Tensor) -> Tensor:
        z = self.first_stage_model.encode(x)
        # first stages of `ldm` leave it to the model to draw
        return z.sample() if isinstance(z, DiagonalGaussianDistribution) else z

    def _decode(self, z: Tensor) -> Tensor:
        is_video = isinstance(getattr(self.first_stage_model, "decoder", None), VideoDecoder)
        options = {"timesteps": len(z)} if is_video else {}
        return self.first_stage_model.decode(z, **options)

    def _through_first_stage(self, x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        """A batch in chunks, under autocast on a GPU; or in the precision of the first stage's weights."""
        exactly, device = self.disable_first_stage_autocast, x.device.type
        if exactly:
            x = x.to(next((p.dtype for p in self.first_stage_model.parameters()), x.dtype))
        is_set = exactly or device == "cuda"
        with torch.autocast(device, enabled=not exactly) if is_set else nullcontext():
            return torch.cat([run(part) for part in x.split(self.en_and_decode_n_samples_a_time or len(x))])

    # --------------------------------------------------------------------------------------------- training

    def _adapt(self, config: Mapping[str, Any]) -> None:
        """Freeze everything and add adapters; embedders run with gradients if, and only if, they have some."""
        self.lora = train_lora(self, config)
        adapters: Iterable[Any] = self.lora.values()
        adapted = {adapter.place.holder for adapter in adapters}
        for embedder in self.conditioner.embedders:
            embedder.is_trainable = not adapted.isdisjoint(embedder.modules())
        if config.get("text_encoder") and not any(e.is_trainable for e in self.conditioner.embedders):
            kinds = [type(embedder).__name__ for embedder in self.conditioner.embedders]
            raise ValueError(
                f"lora_config.text_encoder is set, but no embedder holds a text encoder of CLIP: they are {kinds}. Leave it out."
            )

    @property
    def lora_layout(self) -> str:
        """Kohya's layout with the blocks named as here: the published one for SDXL."""
        return "kohya-ldm"

    def forward(self, x: Tensor, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of latents under the conditions of their batch, and what to log."""
        loss = self.loss_fn(self.model, self.denoiser, self.conditioner, x, batch).mean()
        return loss, {"loss": loss}

    def shared_step(self, batch: MutableMapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch, and what to log; the batch gets an entry `global_step`."""
        x = self.encode_first_stage(self.get_input(batch))
        batch["global_step"] = self.global_step
        return self(x, batch)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Loss of a training batch."""
        loss, loss_dict = self.shared_step(batch)
        size = len(self.get_input(batch))
        self.log_dict(loss_dict, prog_bar=True, on_step=True, on_epoch=False, batch_size=size)
        self.log("global_step", float(self.global_step), on_step=True, on_epoch=False, batch_size=size)
        if self.scheduler_config is not None:
            optimizer: Any = self.optimizers()
            rate = optimizer.param_groups[0]["lr"]
            self.log("lr_abs", rate, prog_bar=True, on_step=True, on_epoch=False, batch_size=size)
        return loss

    def on_train_start(self) -> None:
        """Check that there is all that training needs.

        Raises:
            ValueError: no sampler, or no loss.
        """
        for name, part in (("sampler_config", self.sampler), ("loss_fn_config", self.loss_fn)):
            if part is None:
                raise ValueError(f"training needs a {name}; configurations for inference have none")

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Move the average."""
        if self.use_ema:
            self.model_ema(self.model)

    def trained_parameters(self) -> list[nn.Parameter]:
        """Those of the network, then of each trainable embedder; or those of the adapters."""
        if self.lora is not None:
            return list(self.lora.parameters())
        trained = [e for e in self.conditioner.embedders if e.is_trainable]
        return [p for part in (self.model, *trained) for p in part.parameters()]

    def instantiate_optimizer_from_config(
        self, params: Sequence[nn.Parameter], lr: float, cfg: Mapping[str, Any]
    ) -> torch.optim.Optimizer:
        """The optimizer that a `{target, params}` configuration describes."""
        return get_obj_from_str(cfg["target"])(params, lr=lr, **(cfg.get("params") or {}))

    def configure_optimizers(self) -> Any:
        """The optimizer over what is trained, with its multiplier of the learning rate if there is one."""
        params, config = self.trained_parameters(), self.optimizer_config
        if config is None:
            optimizer: torch.optim.Optimizer = adamw(params, self.learning_rate)
        else:
            optimizer = self.instantiate_optimizer_from_config(params, self.learning_rate, config)
        if self.scheduler_config is None:
            return optimizer
        return [optimizer], multipliers([optimizer], self.scheduler_config)

    # --------------------------------------------------------------------------------- samples and pictures

    @torch.no_grad()
    def sample(
        self,
        cond: Mapping[str, Any],
        uc: Mapping[str, Any] | None = None,
        batch_size: int = 16,
        shape: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Scaled latents under a condition.

        Args:
            cond, uc: condition and unconditional condition, as the conditioner gives them.
            batch_size: samples.
            shape: of one, (c, h, w).
            kwargs: handed to the network.

        Raises:
            ValueError: no shape, or the model has no sampler.
        """
        if shape is None:
            raise ValueError("sample needs the shape of one latent: shape=(channels, height, width)")
        if self.sampler is None:
            raise ValueError("this model has no sampler_config; call a sampler with model.denoise instead")
        # drawn on the CPU, so that a seed gives the same picture on every device
        noise = torch.randn(batch_size, *shape).to(self.device)
        return self.sampler(partial(self.denoise, **kwargs), noise, cond, uc=uc)

    def denoise(self, x: Tensor, sigma: Tensor, cond: Any, **kwargs: Any) -> Tensor:
        """The estimate of x_0 from x_0 + σ ε (b, ...) at noise levels (b,): what samplers call."""
        return self.denoiser(self.model, x, sigma, cond, **kwargs)

    @torch.no_grad()
    def log_conditionings(self, batch: Mapping[str, Any], n: int) -> dict[str, Tensor]:
        """Pictures of the conditions of n samples, by their entry in the batch.

        Raises:
            NotImplementedError: a condition that is no number, numbers, text or image (the published error class).
        """
        if self.no_cond_log:
            return {}
        keys = [key for key in self._embedder_keys() if self.log_keys is None or key in self.log_keys]
        size = self.get_input(batch).shape[2:]
        return {key: _condition_pictures(key, batch[key][:n], *size) for key in keys}

    def _embedder_keys(self) -> list[str]:
        """Entries of a batch that embedders read, one each."""
        return [e.input_key for e in self.conditioner.embedders if e.input_key is not None]

    def _network_inputs(self, batch: Mapping[str, Any], n: int) -> dict[str, Any]:
        """What the loss hands from a batch to the network, for its first n samples."""
        keys = getattr(self.loss_fn, "batch2model_keys", ())
        return {k: v[:n] if isinstance(v := batch[k], Tensor) else v for k in keys if k in batch}

    @torch.no_grad()
    def log_images(
        self,
        batch: Any,
        N: int = 8,
        sample: bool = True,
        ucg_keys: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Pictures in [-1, 1] of a batch and of samples under its conditions.

        Args:
            batch: a batch.
            N: images of it; of clips as many as are whole, or the first.
            sample: draw `samples`, with the averaged weights where there are any.
            ucg_keys: entries whose embeddings are zero in the unconditional condition; all if None.
            kwargs: accepted, as callbacks and older configurations give more.

        Returns:
            `inputs`, `reconstructions`, `samples`, and a picture of each condition under its name, (n, c, h, w).

        Raises:
            AssertionError: ucg_keys that no embedder reads (the published error class).
        """
        known = self._embedder_keys()
        if unknown := set(ucg_keys or ()) - set(known):
            raise AssertionError(f"ucg_keys={sorted(unknown)} are read by no embedder; choose among {known}")
        x = self.get_input(batch)[: _whole_clips(batch, N)].to(self.device)
        n = len(x)
        c, uc = self.conditioner.get_unconditional_conditioning(
            batch, force_uc_zero_embeddings=list(known if ucg_keys is None else ucg_keys)
        )
        z = self.encode_first_stage(x)
        log = {"inputs": x, "reconstructions": self.decode_first_stage(z), **self.log_conditionings(batch, n)}
        if sample:
            c, uc = (
                {k: v[:n].to(self.device) if isinstance(v, Tensor) else v for k, v in cond.items()}
                for cond in (c, uc)
            )
            with self.ema_scope("Plotting"):
                samples = self.sample(c, uc, n, z.shape[1:], **self._network_inputs(batch, n))
            log["samples"] = self.decode_first_stage(samples)
        return log


def _whole_clips(batch: Mapping[str, Any], n: int) -> int:
    """The largest number of images up to n that cuts no clip of `num_video_frames` in two; one clip at least."""
    frames = batch.get("num_video_frames")
    return max(n // frames, 1) * frames if isinstance(frames, int) else n


def _condition_pictures(key: str, given: Any, height: int, width: int) -> Tensor:
    """Conditions of n samples as pictures (n, 3, h, w): text in black on white; images are their own."""
    if isimage(given):
        return given
    small, canvas = max(1, height // 20), (height, width)  # as published: the sides change places
    if isinstance(given, Tensor) and given.ndim == 1:
        return log_txt_as_img(canvas, [str(v.item()) for v in given], size=max(1, height // 4))
    if isinstance(given, Tensor) and given.ndim == 2:
        return log_txt_as_img(canvas, ["x".join(map(str, v.tolist())) for v in given], size=small)
    if isinstance(given, list | tuple) and all(isinstance(v, str) for v in given):
        return log_txt_as_img(canvas, given, size=small)
    raise NotImplementedError(
        f"the condition {key!r} cannot be drawn; leave it out of log_keys, or set no_cond_log: true"
    )


def _adopt_latent_diffusion(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Rename the entries of a checkpoint of `ldm`, in place, before an engine loads them.

    Its text encoder is the first embedder here, its schedule stands in the denoiser's configuration.
    """
    theirs, ours = f"{prefix}cond_stage_model.", f"{prefix}conditioner.embedders.0."
    if f"{prefix}alphas_cumprod" not in state:
        return
    for name in [k for k in state if k.startswith(prefix)]:
        if name.startswith(theirs):
            state[ours + name.removeprefix(theirs)] = state.pop(name)
        elif "." not in name.removeprefix(prefix):
            del state[name]
    for name, value in module.denoiser.state_dict(prefix=f"{prefix}denoiser.").items():  # type: ignore[union-attr]
        state.setdefault(name, value)
