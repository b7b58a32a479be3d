"""Latent diffusion in a notebook: pictures from a prompt in one call."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Self

import torch
from PIL import Image
from torch import Tensor

from ldm import inference
from ldm.models.diffusion.latent_space import LatentSpace
from ldm.models.diffusion.sampling_util import Noise
from ldm.models.diffusion.wrapper import ROUTES
from ldm.modules.distributions.distributions import likeliest
from taming.data.images import as_rgb, open_rgb

TEXT_GUIDANCE = 7.5
SHORT_CALL = {"prompt", "condition", "num_steps", "guidance_scale", "num_images"}
# where a tensor goes that comes beside a prompt
BESIDE_A_PROMPT = {"hybrid": "c_concat", "crossattn-adm": "c_adm"}
PRECISIONS: dict[torch.dtype | None, dict[str, Any]] = {
    None: {"precision": "autocast"},
    torch.float32: {"precision": "full"},
    torch.bfloat16: {"bf16": True},
}


class Asked(NamedTuple):
    """What a call asks for: an encoded condition, what to guide away from and how far, and how many pictures."""

    cond: Any
    uncond: Any
    scale: float
    images: int


def tensors_in(cond: Any) -> Iterator[Tensor]:
    """The tensors of a condition."""
    if isinstance(cond, Tensor):
        yield cond
    elif cond is not None:
        for part in cond.values() if isinstance(cond, Mapping) else cond:
            yield from tensors_in(part)


def spread(cond: Any, rows: int, times: int, device: Any) -> Any:
    """A condition for `rows` prompts, each `times` in a row; one of a single row stands for all.

    Raises:
        ValueError: another number of rows.
    """
    if isinstance(cond, Mapping):
        return {name: spread(part, rows, times, device) for name, part in cond.items()}
    if isinstance(cond, list | tuple):
        return [spread(part, rows, times, device) for part in cond]
    if cond is None:
        return None
    if len(cond) not in (1, rows):
        raise ValueError(
            f"a condition of {len(cond)} rows does not go with {rows} pictures; give one, or one for each"
        )
    return cond.to(device).expand(rows, *cond.shape[1:]).repeat_interleave(times, dim=0)


class NotebookCalls(LatentSpace):
    """The short calls of `LatentDiffusion`: `from_pretrained`, `generate`, `sample`, `img2img`; PIL images come out."""

    text_guidance = TEXT_GUIDANCE  # of texts, where a call names none
    cond_stage_model: Any
    get_unconditional_conditioning: Callable[..., Any]

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str] = inference.SHIPPED,
        config: str | os.PathLike[str] | None = None,
        device: str = "auto",
        overrides: Sequence[str] = (),
    ) -> Self:
        """A trained model, ready to draw.

        Args:
            path: a training run's folder (logs/…), a published model's, or a checkpoint; by default the model of emoji that comes
                with the repository.
            config: its configuration; found beside it if None.
            device: "auto", "cpu", "cuda" or "mps".
            overrides: `a.b=c` over the configuration.

        Raises:
            InferenceError: something is missing, or it is a model of another kind.
        """
        model, file, _ = inference.load_model(
            str(path), None if config is None else str(config), inference.choose_device(device), overrides
        )
        if not isinstance(model, cls):
            raise inference.InferenceError(f"{file} holds a {type(model).__name__}, not a {cls.__name__}")
        return model

    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        num_steps: int = 50,
        guidance_scale: float | None = None,
        *,
        condition: Any = None,
        negative_prompt: str = "",
        num_images: int = 1,
        height: int | None = None,
        width: int | None = None,
        sampler: str | None = None,
        eta: float = 0.0,
        guidance_rescale: float = 0.0,
        time_spacing: str = "uniform",
        generator: Noise | int = None,
        dtype: torch.dtype | None = None,
        progress: bool = True,
    ) -> Image.Image | list[Image.Image]:
        """Draw pictures.

        Example: `model.generate("red heart", num_steps=50, generator=7).save("heart.png")`

        Args:
            prompt: a text or several; None for a model without text, or where `condition` says it all.
            num_steps: of the sampler.
            guidance_scale: of classifier-free guidance; None is 7.5 for a model of text and 1, none at all, for others.
            condition: class labels (a number, or several) for a model of classes. Else encoded conditions as `apply_model` takes
                them, with one row or one for each prompt: a tensor stands for the prompt or, in a hybrid model, beside it; a
                dict without `c_crossattn` is completed by the prompt.
            negative_prompt: what guidance leads away from.
            num_images: for each prompt.
            height, width: in pixels; the model's own if None.
            sampler: a key of `ldm.inference.SAMPLERS`; DDIM, or "flow" for flows, if None.
            eta, guidance_rescale, time_spacing: see `LatentSampler.sample`.
            generator: source of the noise, or one for each picture. A number seeds each picture on its own: the i-th depends on
                number + i alone. None is torch's global generator.
            dtype: torch.bfloat16 or torch.float32; None is float32, but half precision on CUDA.
            progress: show a bar.

        Returns:
            A picture for a single text, else a list: all of the first prompt, then of the second.

        Raises:
            ValueError: conditions that do not go with the model or with each other, or an impossible number.
            InferenceError: an unknown sampler, or a size that the first stage cannot make.
            FloatingPointError: the latents became infinite or undefined.
        """
        _, chosen = inference.make_sampler(self, sampler)
        shape = inference.latent_shape(self, height, width)
        with self._drawing(dtype):
            asked = self._asked(prompt, condition, negative_prompt, num_images, guidance_scale)
            made = inference.sample_images(
                self, chosen, num_steps, asked.images, shape, asked.cond, eta=eta, verbose=progress, time_spacing=time_spacing,
                guidance_rescale=guidance_rescale, generator=seeded(generator, asked.images),
                unconditional_guidance_scale=asked.scale, unconditional_conditioning=asked.uncond,
            )  # fmt: skip
        return pictures(made, single=isinstance(prompt, str) or prompt is None)

    @functools.wraps(LatentSpace.sample, assigned=())  # its signature, but our own docstring
    def sample(self, *args: Any, **kwargs: Any) -> Any:
        """Pictures by `sample(prompt, condition=…, num_steps=50, guidance_scale=7.5)`, see `generate` for all options; else latents.

        The published call, `sample(cond, batch_size, …)`, begins with an encoded condition, and samples ancestrally.
        """
        text = bool(args) and args[0] is not None and is_text(args[0])
        if not text and not SHORT_CALL & kwargs.keys():
            return super().sample(*args, **kwargs)
        names = ("prompt", "condition", "num_steps", "guidance_scale")
        if len(args) > len(names):
            raise TypeError(f"sample takes {', '.join(names)} by position, and further options by name")
        return self.generate(**dict(zip(names, args, strict=False)), **kwargs)

    def img2img(
        self,
        init_image: Any,
        prompt: str | Sequence[str] | None = None,
        strength: float = 0.75,
        num_steps: int = 30,
        guidance_scale: float | None = None,
        *,
        condition: Any = None,
        negative_prompt: str = "",
        num_images: int = 1,
        eta: float = 0.0,
        generator: Noise | int = None,
        dtype: torch.dtype | None = None,
        progress: bool = True,
    ) -> Image.Image | list[Image.Image]:
        """Draw anew over a picture: its latents are noised as far as `strength` says, and denoised by DDIM.

        Args:
            init_image: a PIL image or a file, made smaller to the next size that the network takes; or a tensor (3, h, w) or
                (1, 3, h, w) in [-1, 1].
            prompt: see `generate`, and for the other options.
            strength: from 0, the picture as it is, to 1, almost anything.
            num_steps: of the whole way; `strength` of them are walked.

        Returns:
            A picture for a single text, else a list.

        Raises:
            ValueError: see `generate`; a tensor that is no picture.
            InferenceError: a strength out of range, a picture that is too small, or a model that is a flow.
        """
        from ldm.inference_images import redraw  # it builds on this class

        with self._drawing(dtype):
            asked = self._asked(prompt, condition, negative_prompt, num_images, guidance_scale)
            z = self._latents_of(self._picture(init_image)).expand(asked.images, -1, -1, -1)
            made = redraw(
                self, z, asked.cond, asked.uncond, asked.scale, strength, num_steps, eta, seeded(generator, asked.images), progress
            )  # fmt: skip
        return pictures(made, single=isinstance(prompt, str) or prompt is None)

    # ---------------------------------------------------------------------------------------- parts of these calls

    @contextmanager
    def _drawing(self, dtype: torch.dtype | None) -> Iterator[None]:
        """Averaged weights, eval mode, no gradients and a precision, for a while."""
        if dtype not in PRECISIONS:
            raise ValueError(
                f"dtype={dtype}: choose torch.float32, torch.bfloat16, or None for half precision on CUDA alone"
            )
        training = self.training
        self.eval()
        try:
            with (
                torch.no_grad(),
                self.ema_scope(),
                inference.precision_scope(self.device, **PRECISIONS[dtype]),
            ):
                yield
        finally:
            self.train(training)

    def _asked(
        self, prompt: Any, condition: Any, negative_prompt: str, num_images: int, scale: float | None
    ) -> Asked:
        if num_images < 1:
            raise ValueError(f"num_images={num_images} must be at least 1")
        if prompt is not None and not is_text(prompt):
            raise ValueError(f"prompt={prompt!r} must be a text, or a list of at least one")
        texts = [prompt] if isinstance(prompt, str) else None if prompt is None else list(prompt)
        cond = self._encoded(texts, condition)
        rows = max([len(texts or [""]), *(len(t) for t in tensors_in(cond))])
        cond = spread(cond, rows, num_images, self.device)
        reads = self.cond_stage_key in inference.TEXT_KEYS and self.model.conditioning_key is not None
        scale = (self.text_guidance if reads else 1.0) if scale is None else scale
        images = rows * num_images
        return Asked(
            cond, self._nothing(cond, negative_prompt, images) if scale != 1.0 else None, scale, images
        )

    def _encoded(self, texts: list[str] | None, condition: Any) -> Any:
        """One condition, in the network's form, of a prompt and what came beside it."""
        key = self.model.conditioning_key
        if (
            self.cond_stage_key in inference.CLASS_KEYS
            and condition is not None
            and not isinstance(condition, Mapping)
        ):
            condition = self._labels(condition)
        if condition is None and texts is None and key is None:
            return None
        if condition is None:
            if texts is None:
                raise ValueError(
                    f"this model is conditioned on {self.cond_stage_key!r}: give a prompt or a condition"
                )
            condition = self._read(texts)
        elif texts is not None:
            if isinstance(condition, Tensor) and key in BESIDE_A_PROMPT:
                condition = {BESIDE_A_PROMPT[key]: [condition] if key == "hybrid" else condition}
            if not isinstance(condition, Mapping) or "c_crossattn" in condition or not ROUTES[key].context:
                raise ValueError(
                    f"a prompt and a condition, but conditioning_key={key!r} has no room for both: give one of them"
                )
            condition = {**condition, "c_crossattn": listed(self._read(texts))}
        return condition

    def _read(self, texts: list[str]) -> Any:
        inference.require_text(self)
        if self.model.conditioning_key is None:
            raise ValueError(
                "this model is unconditional (conditioning_key=None), so it has no use for a prompt"
            )
        return self.get_learned_conditioning(texts)

    def _labels(self, condition: Any) -> Any:
        """Class labels, encoded; a condition that is encoded already stays as it is."""
        if isinstance(condition, list | tuple) and isinstance(next(iter(condition), None), Tensor):
            return condition
        labels = torch.as_tensor(condition)
        if labels.is_floating_point():
            return labels
        key = getattr(self.cond_stage_model, "key", self.cond_stage_key)
        return self.get_learned_conditioning({key: labels.reshape(-1).to(self.device)})

    def _nothing(self, cond: Any, negative_prompt: str, images: int) -> Any:
        """What guidance leads away from, in the form of `cond`: pictures and vectors stay, the text or class goes."""
        key = None if cond is None else self.cond_stage_key
        if key in inference.TEXT_KEYS:
            null = self.get_unconditional_conditioning(images, [negative_prompt])
        elif key in inference.CLASS_KEYS:
            null = self.get_unconditional_conditioning(images)
        else:
            raise ValueError(
                f"guidance needs a condition that can be left out, text or a class, not {key!r}; leave guidance_scale at 1"
            )
        if isinstance(cond, Mapping):
            return {**cond, "c_crossattn": listed(null)}
        return listed(null) if isinstance(cond, list) else null

    def _latents_of(self, picture: Tensor) -> Tensor:
        """The likeliest latents of a picture (1, 3, h, w), scaled."""
        return self.get_first_stage_encoding(likeliest(self.encode_first_stage(picture)))

    def _picture(self, image: Any) -> Tensor:
        """A picture of any of `img2img`'s kinds as (1, 3, h, w) in [-1, 1]."""
        if isinstance(image, Tensor):
            if (
                image.shape[-3:-2] != (3,)
                or image.ndim not in (3, 4)
                or (image.ndim == 4 and len(image) != 1)
            ):
                raise ValueError(
                    f"init_image must be one picture (3, h, w) or (1, 3, h, w), not {tuple(image.shape)}"
                )
            return image.reshape(1, *image.shape[-3:]).to(self.device, torch.float32)
        from ldm.inference_images import shrunk_to_step, size_step, to_pixels

        opened = as_rgb(image) if isinstance(image, Image.Image) else open_rgb(image)
        return to_pixels(shrunk_to_step(opened, size_step(self))).to(self.device)


def listed(cond: Any) -> list[Any]:
    """A condition among others in a list; some encoders give a list themselves."""
    return cond if isinstance(cond, list) else [cond]


def is_text(prompt: Any) -> bool:
    """Whether it is a text or a list of texts."""
    several = isinstance(prompt, list | tuple) and bool(prompt)
    return isinstance(prompt, str) or (several and all(isinstance(text, str) for text in prompt))


def seeded(generator: Noise | int, images: int) -> Noise:
    """A source of noise; a number becomes one seed for each picture."""
    return [generator + i for i in range(images)] if isinstance(generator, int) else generator


def pictures(images: Tensor, single: bool) -> Image.Image | list[Image.Image]:
    """Images (b, 3, h, w) in [0, 1] as pictures: a list, or the one."""
    made = [inference.to_image(image) for image in images]
    return made[0] if single and len(made) == 1 else made
