"""Images as sentences: a first stage turns them into tokens, a transformer learns the tokens (Esser et al. 2021)."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from taming.checkpoint import load_into, load_state_dict
from taming.lr_scheduler import multipliers
from taming.models.base import entry_of
from taming.models.condition_pictures import condition_pictures
from taming.modules.ema import LitEma, ema_scope
from taming.modules.transformer.permuter import Identity
from taming.modules.transformer.sampling import Draw, check_room, generate, top_k_logits
from taming.modules.util import SOSProvider
from taming.util import disabled_train, freeze, instantiate_from_config

__all__ = ["Net2NetTransformer", "SOSProvider", "disabled_train"]


def condition_alone(published: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Let `sample(condition, num_steps=…)` stand for `generate`, beside the published `sample(x, c, steps, …)`.

    The published call always names c and steps; the short one has `num_steps` by keyword, or a condition only.
    """

    @functools.wraps(published)
    def sample(self: Net2NetTransformer, *args: Any, **kwargs: Any) -> Tensor:
        short = {"num_steps", "condition"} & kwargs.keys()
        if short or (len(args) <= 1 and not {"x", "c", "steps"} & kwargs.keys()):
            return self.generate(*args, **kwargs)
        return published(self, *args, **kwargs)

    return sample


class Net2NetTransformer(pl.LightningModule):
    """A transformer over the tokens of a condition, followed by those of an image.

    Both stages are frozen and stay in eval mode; only the transformer learns. Tokens of conditions and of images share
    its one embedding table; only those that are codes are drawn.

    Args:
        transformer_config: of the transformer, a GPT.
        first_stage_config: of the model between images and codes.
        cond_stage_config: of the model between conditions and tokens; "__is_first_stage__" shares the first stage,
            "__is_unconditional__" is none.
        permuter_config: order in which codes are read; row by row unless given.
        ckpt_path: weights to start from.
        ignore_keys: prefixes of entries in that file to leave out.
        first_stage_key, cond_stage_key: entries of a batch that hold image and condition.
        downsample_cond_size: resize conditions to this height and width before they are encoded; -1 for not.
        pkeep: share of the image's input codes kept in training, the others become random ones. With 0 the image is
            sampled in one pass.
        sos_token: start token of an unconditional model.
        unconditional: ignore `cond_stage_config`.
        cond_drop_prob: share of training samples whose condition is replaced by `null_cond`, for guidance.
        null_cond: token that stands for "no condition"; needs a row in the transformer's vocabulary.
        scheduler_config: of a learning-rate multiplier.
        use_ema: keep an average of the transformer, as `model_ema`, and validate and draw with it.
        monitor: what checkpoints are ranked by, such as "val/loss".

    Raises:
        ValueError: a probability outside [0, 1], or `null_cond` missing or outside the vocabulary.

    Sources: Esser et al. 2021, section 3.2; guidance: Sun et al. 2024 (LlamaGen), section 2.2.
    """

    learning_rate: float
    first_stage_model: Any
    cond_stage_model: Any

    def __init__(
        self, transformer_config: Any, first_stage_config: Any, cond_stage_config: Any, permuter_config: Any = None,
        ckpt_path: str | None = None, ignore_keys: Sequence[str] = (), first_stage_key: str = "image",
        cond_stage_key: str = "depth", downsample_cond_size: int = -1, pkeep: float = 1.0, sos_token: int = 0,
        unconditional: bool = False, cond_drop_prob: float = 0.0, null_cond: int | None = None,
        scheduler_config: Any = None, use_ema: bool = False, monitor: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.be_unconditional = unconditional or cond_stage_config == "__is_unconditional__"
        self.sos_token = sos_token
        self.first_stage_key = first_stage_key
        self.cond_stage_key = first_stage_key if self.be_unconditional else cond_stage_key
        self.first_stage_model = freeze(instantiate_from_config(first_stage_config))
        self.cond_stage_model = self._condition_stage(cond_stage_config)
        self.permuter = Identity() if permuter_config is None else instantiate_from_config(permuter_config)
        self.transformer = instantiate_from_config(transformer_config)
        self.downsample_cond_size = downsample_cond_size
        self.pkeep = pkeep
        self.cond_drop_prob, self.null_cond = cond_drop_prob, null_cond
        self._check_options()
        self.scheduler_config = scheduler_config
        if monitor is not None:
            self.monitor = monitor
        if use_ema:
            self.model_ema = LitEma(self.transformer)
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys)

    def _condition_stage(self, config: Any) -> Any:
        if self.be_unconditional:
            return freeze(SOSProvider(self.sos_token))
        if config == "__is_first_stage__":
            return self.first_stage_model
        stage = instantiate_from_config(config)
        if isinstance(stage, nn.Module):
            return freeze(stage)
        stage.train = disabled_train.__get__(stage)  # plain objects have the interface, but no weights
        return stage.eval()

    def _check_options(self) -> None:
        if not 0.0 <= self.cond_drop_prob <= 1.0:
            raise ValueError(f"cond_drop_prob={self.cond_drop_prob} must lie between 0 and 1")
        if self.cond_drop_prob > 0 and self.null_cond is None:
            raise ValueError("cond_drop_prob needs null_cond: the token that stands for 'no condition'")
        vocabulary = self._vocabulary
        if self.null_cond is not None and vocabulary is not None and not 0 <= self.null_cond < vocabulary:
            raise ValueError(
                f"null_cond={self.null_cond} needs a row in the transformer's vocabulary of {vocabulary}: raise "
                "vocab_size, or choose a smaller token that nothing else uses"
            )

    @property
    def n_codes(self) -> int | None:
        """Number of the first stage's codes; larger tokens (classes, the null token) are never drawn as one."""
        return getattr(getattr(self.first_stage_model, "quantize", None), "re_embed", None)

    @property
    def _vocabulary(self) -> int | None:
        return getattr(getattr(self.transformer, "config", None), "vocab_size", None)

    def init_from_ckpt(self, path: str | os.PathLike[str], ignore_keys: Sequence[str] = ()) -> None:
        """Load weights; entries whose names begin with one of `ignore_keys` are left out, missing ones stay as they are.

        Raises:
            CheckpointError: unreadable, or of other shapes.
        """
        load_into(self, load_state_dict(path), ignore_keys=list(ignore_keys), source=path)

    @contextmanager
    def ema_scope(self, context: str | None = None) -> Iterator[None]:
        """Run a block with the averaged transformer, where an average is kept."""
        with ema_scope(self._ema, self.transformer):
            yield

    @property
    def _ema(self) -> LitEma | None:
        ema = self._modules.get("model_ema")
        return ema if isinstance(ema, LitEma) else None

    # ---------------------------------------------------------------------------------- images and tokens

    def get_input(self, key: str, batch: Mapping[str, Any]) -> Any:
        """Entry `key` of a batch: (b, h, w, c) and (b, h, w) → (b, c, h, w), other shapes and texts unchanged; float64 → float32.

        Mind the order of the arguments, which the first stages have otherwise.

        Raises:
            KeyError: the batch has no such entry; the message lists those it has.
        """
        x = entry_of(batch, key)
        if not isinstance(x, Tensor):
            return x  # a list of texts
        if x.ndim == 3:
            x = x[..., None]
        if x.ndim == 4:
            x = rearrange(x, "b h w c -> b c h w").contiguous()
        return x.float() if x.dtype == torch.float64 else x

    def get_xc(self, batch: Mapping[str, Any], N: int | None = None) -> tuple[Tensor, Any]:
        """Images and conditions of a batch, the first N if N is given."""
        x, c = self.get_input(self.first_stage_key, batch), self.get_input(self.cond_stage_key, batch)
        return (x, c) if N is None else (x[:N], c[:N])

    @torch.no_grad()
    def encode_to_z(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images (b, c, h, w) in [-1, 1] → quantised latents (b, e, h', w') and codes (b, h' w') in the permuter's order."""
        quant_z, _, info = self.first_stage_model.encode(x)
        return quant_z, self.permuter(info[2].reshape(quant_z.shape[0], -1))

    @torch.no_grad()
    def encode_to_c(self, c: Any) -> tuple[Any, Tensor]:
        """Conditions → what their stage makes of them, and tokens (b, n).

        A VQModel without `sane_index_shape` gives flat tokens, (b n,), as published.
        """
        if self.downsample_cond_size > -1:
            c = F.interpolate(c, size=(self.downsample_cond_size,) * 2)
        quant_c, _, (_, _, indices) = self.cond_stage_model.encode(c)
        indices = indices.to(self.device)
        return quant_c, indices.flatten(1) if indices.ndim > 2 else indices

    @torch.no_grad()
    def decode_to_img(self, index: Tensor, zshape: Sequence[int]) -> Tensor:
        """Codes → images.

        Args:
            index: (b, h' w') in the permuter's order.
            zshape: (b, e, h', w') of the latents.

        Returns:
            (b, c, h, w)
        """
        b, e, h, w = zshape
        index = self.permuter(index, reverse=True)
        return self.first_stage_model.decode(
            self.first_stage_model.quantize.get_codebook_entry(index.reshape(-1), shape=(b, h, w, e))
        )

    # --------------------------------------------------------------------------------------------- training

    def forward(self, x: Tensor, c: Any) -> tuple[Tensor, Tensor]:
        """Predict an image's codes from its condition and the codes before.

        Args:
            x: images (b, c, h, w) in [-1, 1].
            c: conditions, as their stage takes them.

        Returns:
            Logits (b, n, vocab_size), and the right codes (b, n).
        """
        _, target = self.encode_to_z(x)
        cond = self._token_rows(self.encode_to_c(c)[1], len(target))
        codes = target
        if self.training and self.pkeep < 1.0:
            keep = torch.bernoulli(torch.full(codes.shape, float(self.pkeep), device=codes.device)).bool()
            codes = torch.where(keep, codes, torch.randint_like(codes, self.transformer.config.vocab_size))
        if self.training and self.cond_drop_prob > 0:
            drop = torch.rand(len(cond), 1, device=cond.device) < self.cond_drop_prob
            cond = torch.where(drop, self.null_tokens(cond), cond)
        logits, _ = self.transformer(torch.cat([cond, codes], dim=1)[:, :-1])
        return logits[:, cond.shape[1] - 1 :], target

    @staticmethod
    def _token_rows(tokens: Tensor, batch: int) -> Tensor:
        """Flat tokens (b n,) or (b, …) → (b, n)."""
        if batch == 0 or tokens.numel() % batch:
            raise ValueError(
                f"condition tokens of shape {tuple(tokens.shape)} do not divide into {batch} rows"
            )
        return tokens.reshape(batch, -1)

    def null_tokens(self, c: Tensor) -> Tensor:
        """Tokens of the same shape that say "no condition".

        Raises:
            ValueError: the model was built without `null_cond`.
        """
        if self.null_cond is None:
            raise ValueError(
                "guidance needs a model trained with cond_drop_prob and null_cond; this one has no null_cond"
            )
        return torch.full_like(c, self.null_cond)

    def shared_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Mean cross-entropy of a batch, in nats a token."""
        logits, target = self(*self.get_xc(batch))
        return F.cross_entropy(logits.flatten(0, 1), target.flatten())

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """The loss, logged as `train/loss`."""
        loss = self.shared_step(batch, batch_idx)
        size = len(batch[self.first_stage_key])
        self.log("train/loss", loss, prog_bar=True, logger=True, on_step=True, on_epoch=True, batch_size=size)
        return loss

    def on_train_batch_end(self, *args: Any) -> None:
        """Move the average, where one is kept."""
        if self._ema is not None:
            self._ema(self.transformer)

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Log loss and bits a token with the live weights and, where an average is kept, the averaged (`val_ema/…`)."""
        self._evaluate(batch, batch_idx, "val")

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """As `validation_step`, for the test split."""
        self._evaluate(batch, batch_idx, "test")

    def _evaluate(self, batch: Mapping[str, Any], batch_idx: int, split: str) -> None:
        losses = {split: self.shared_step(batch, batch_idx)}
        if self._ema is not None:
            with self.ema_scope():
                losses[f"{split}_ema"] = self.shared_step(batch, batch_idx)
        for name, loss in losses.items():
            values = {f"{name}/loss": loss, f"{name}/bits_per_token": loss / math.log(2)}
            self.log_dict(
                values, prog_bar=True, logger=True, on_step=False, on_epoch=True, sync_dist=True,
                batch_size=len(batch[self.first_stage_key]),
            )  # fmt: skip

    def configure_optimizers(self) -> Any:
        """AdamW (β = 0.9, 0.95) over the transformer, and a multiplier of its learning rate if there is one.

        Weights of linear layers decay (0.01), all else does not; inside a group names are sorted, and a checkpoint's
        optimizer state relies on that order.
        """
        named = dict(self.transformer.named_parameters())
        linear = (n for n, m in self.transformer.named_modules() if isinstance(m, nn.Linear))
        decay = {f"{name}.weight" for name in linear} & named.keys()
        groups = [
            {"params": [named[n] for n in sorted(decay)], "weight_decay": 0.01},
            {"params": [named[n] for n in sorted(named.keys() - decay)], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, betas=(0.9, 0.95))
        if self.scheduler_config is None:
            return optimizer
        return [optimizer], multipliers([optimizer], self.scheduler_config)

    # --------------------------------------------------------------------------------------------- sampling

    def top_k_logits(self, logits: Tensor, k: int) -> Tensor:
        """Logits (…, vocab) with all but the `k` largest at -inf."""
        return top_k_logits(logits, k)

    @condition_alone
    @torch.no_grad()
    def sample(
        self,
        x: Tensor,
        c: Tensor,
        steps: int,
        temperature: float = 1.0,
        sample: bool = False,
        top_k: int | None = None,
        callback: Callable[[int], Any] | None = None,
        *,
        guidance: float = 1.0,
        **options: Any,
    ) -> Tensor:
        """Continue the codes of images; or `sample(condition, num_steps=100, temperature=1.0)`, see `generate`.

        The two are told apart by their arguments alone: the published call gives x, c and steps, the short one a
        condition, and `num_steps` by keyword if at all.

        Args:
            x: codes so far (b, n), in the permuter's order; n may be 0.
            c: tokens of the condition (b, m), or flat (b m,).
            steps: number of codes to draw.
            temperature, top_k: see `taming.modules.transformer.sampling.Draw`.
            sample: draw by chance; False takes the likeliest.
            callback: called with the number of each step before it.
            guidance: strength of classifier-free guidance, 1 for none; needs `null_cond`.
            options: `top_p`, `generator`, `progress`, `compiled` of `taming.modules.transformer.sampling.generate`.

        Returns:
            Given and new codes, (b, n + steps).

        Raises:
            AssertionError: the transformer is in training mode, or its block is too short (`ContextError`).
        """
        if self.transformer.training:
            raise AssertionError("sampling needs the model in eval mode: call model.eval() first")
        if x.ndim != 2:
            raise AssertionError(f"codes so far must be (b, n), not {tuple(x.shape)}")
        c = self._token_rows(c, len(x))
        if self.pkeep <= 0.0:
            return self._sample_at_once(
                x, c, steps, Draw(temperature, top_k, sample=sample, vocabulary=self.n_codes, **options)
            )
        new = generate(
            self.transformer, torch.cat([c, x], dim=1), steps, temperature=temperature, sample=sample, top_k=top_k,
            callback=callback, guidance=guidance, vocabulary=self.n_codes,
            null_prompt=None if guidance == 1.0 else torch.cat([self.null_tokens(c), x], dim=1), **options,
        )  # fmt: skip
        return torch.cat([x, new], dim=1)

    def _sample_at_once(self, x: Tensor, c: Tensor, steps: int, draw: Draw) -> Tensor:
        """One pass for a model that was trained to see random codes only: c's own codes fill the places of the image's."""
        fill = c[:, x.shape[1] : x.shape[1] + steps - 1]
        if fill.shape[1] < steps - 1:
            raise ValueError(
                f"a model with pkeep=0 fills the image's places with its condition's {c.shape[1]} tokens, too few for "
                f"{x.shape[1]} + {steps} codes"
            )
        prompt = torch.cat([c, x, fill], dim=1)
        check_room(self.transformer, prompt.shape[1])
        # drawn at every place, the condition's too, as published: the same seed gives the same codes
        tokens = draw(self.transformer(prompt)[0].flatten(0, 1)).reshape(len(x), -1)
        return torch.cat([x, tokens[:, c.shape[1] + x.shape[1] - 1 :]], dim=1)

    @torch.no_grad()
    def generate(
        self,
        condition: Any = None,
        num_steps: int = 100,
        temperature: float = 1.0,
        *,
        num_samples: int = 1,
        sample: bool = True,
        **options: Any,
    ) -> Tensor:
        """Draw codes for a condition, from the first one on.

        Args:
            condition: as the condition's stage takes it: texts, class labels (b,) or one of these, images or maps
                (b, c, h, w) in their data set's range, lists of tokens (b, m); None for an unconditional model.
            num_steps: number of codes; a whole image has h' w' (256 for a 256x256 image and a factor of 16).
            temperature: above 1 more varied, below 1 safer.
            num_samples: sequences for each condition.
            sample: draw by chance; False takes the likeliest.
            options: `top_k`, `guidance`, `callback`, … of `sample`.

        Returns:
            Codes (b * num_samples, num_steps), in the permuter's order; `decode_to_img` makes images of whole ones.

        Raises:
            ValueError: no condition for a conditional model, or a label outside the classes.
            ContextError: more than the transformer's block holds.

        Example: `transformer.sample(torch.tensor([207]), num_steps=256, temperature=1.0)`
        """
        c = self.condition_tokens(condition).repeat_interleave(num_samples, dim=0)
        return self.sample(c[:, :0], c, num_steps, temperature, sample, **options)

    def condition_tokens(self, condition: Any = None) -> Tensor:
        """Tokens (b, m) of a condition as `generate` takes it."""
        if condition is None:
            if not self.be_unconditional:
                raise ValueError(f"this model is conditioned on {self.cond_stage_key!r}: give a condition")
            condition = torch.empty(1)
        if isinstance(condition, str):
            condition = [condition]
        if isinstance(condition, Sequence) and all(isinstance(text, str) for text in condition):
            return self._token_rows(self.encode_to_c(condition)[1], len(condition))
        condition = torch.as_tensor(condition, device=self.device)
        if condition.ndim == 0:
            condition = condition[None]
        classes = getattr(self.cond_stage_model, "n_classes", None)
        if classes is not None and not bool(((condition >= 0) & (condition < classes)).all()):
            raise ValueError(f"labels {condition.tolist()} must lie between 0 and {classes - 1}")
        return self._token_rows(self.encode_to_c(condition)[1], len(condition))

    @torch.no_grad()
    def log_images(
        self,
        batch: Mapping[str, Any],
        temperature: float | None = None,
        top_k: int | None = None,
        callback: Callable[[int], Any] | None = None,
        lr_interface: bool = False,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Pictures of up to four of a batch's images in [-1, 1].

        Args:
            batch: as the data set gives it.
            temperature: of the drawn samples, 1 unless given.
            top_k: of the drawn samples, 100 unless given.
            callback: called with the number of each step.
            lr_interface: no effect, as published.
            kwargs: `pl_module`, the module whose trainer's data set draws layouts; this one unless given.

        Returns:
            `inputs`, `reconstructions`, pictures of the condition where its stage can show them, `samples_half` (the
            second half drawn), `samples_nopix` (all drawn) and `samples_det` (the likeliest codes).
        """
        x, c = (t.to(self.device) if isinstance(t, Tensor) else t for t in self.get_xc(batch, N=4))
        quant_z, z = self.encode_to_z(x)
        quant_c, tokens = self.encode_to_c(c)
        cond, length = self._token_rows(tokens, len(x)), z.shape[1]
        drawn: dict[str, Any] = {
            "temperature": 1.0 if temperature is None else temperature,
            "sample": True,
            "top_k": 100 if top_k is None else top_k,
        }
        log = {"inputs": x, "reconstructions": self.decode_to_img(z, quant_z.shape)}
        log |= condition_pictures(self, x, c, quant_c, tokens, kwargs.get("pl_module", self))
        plans: dict[str, tuple[int, dict[str, Any]]] = {
            "samples_half": (length // 2, drawn),
            "samples_nopix": (0, drawn),
            "samples_det": (0, {}),
        }
        with self.ema_scope():
            for name, (kept, options) in plans.items():
                codes = self.sample(z[:, :kept], cond, length - kept, callback=callback, **options)
                log[name] = self.decode_to_img(codes, quant_z.shape)
        return log
