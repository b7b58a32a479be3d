"""Text encoders as embedders; the encoders themselves live in `ldm.modules.encoders`, with their published names.

On a GPU the encoders of the CLIP family run under autocast, as published, and T5 without.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ldm.modules.encoders import clip, openclip, t5
from ldm.modules.encoders.prompts import PromptEncoder
from sgm.modules.encoders.conditioner import AbstractEmbModel
from sgm.util import autocast


class TextEmbedder(AbstractEmbModel, PromptEncoder):
    """What the text embedders of the CLIP family share.

    Weighted prompts and windows (see `PromptEncoder`) keep SDXL's two encoders in step if both have the same options: they
    share one vocabulary, so a word stands at the same place in both. The pooled vector is that of the first window.
    """

    return_pooled = False

    @autocast
    def forward(self, text: str | Sequence[str]) -> Tensor | tuple[Tensor, Tensor]:
        """Prompts, a string or b strings → (b, windows · n, d); if so configured, the pooled vectors (b, p), too.

        Raises:
            OSError: weights or tokenizer are neither here nor downloadable; the message says what to do.
        """
        z, pooled = self.encode_prompts(text)
        return (z, pooled) if self.return_pooled else z  # type: ignore[return-value]


class FrozenCLIPEmbedder(TextEmbedder, clip.FrozenCLIPEmbedder):
    """CLIP's text encoder: one vector a token, the first half of SDXL's text condition.

    Args:
        version, device, max_length, freeze, layer, layer_idx: see `ldm.modules.encoders.clip.FrozenCLIPEmbedder`. SDXL
            takes "hidden" with layer_idx 11 of 12: the output of the last layer but one, without the final norm.
        always_return_pooled: give the vector at the end of the text, too.
        prompt_weights, windows: see `TextEmbedder`.

    Source: Radford et al. 2021; Podell et al. 2023.
    """

    def __init__(
        self,
        version: str | Mapping[str, Any] = "openai/clip-vit-large-patch14",
        device: str = "cuda",
        max_length: int = 77,
        freeze: bool = True,
        layer: str = "last",
        layer_idx: int | None = None,
        always_return_pooled: bool = False,
        prompt_weights: bool = False,
        windows: int = 1,
    ) -> None:
        super().__init__(version, device, max_length, freeze, layer, layer_idx, prompt_weights, windows)
        self.return_pooled = always_return_pooled


class FrozenOpenCLIPEmbedder(TextEmbedder, openclip.FrozenOpenCLIPEmbedder):
    """The text encoder of an open_clip model: the condition of Stable Diffusion v2; see `ldm.modules.encoders.openclip`."""


class FrozenOpenCLIPEmbedder2(TextEmbedder, openclip.FrozenOpenCLIPEmbedder):
    """The text encoder of an open_clip model, and its vector for the whole text: the second half of SDXL's text condition.

    Args:
        arch, version, device, max_length, freeze: see `ldm.modules.encoders.openclip.FrozenOpenCLIPEmbedder`.
        layer: "last" or "penultimate".
        always_return_pooled: give the projected vector at the end of the text, too.
        legacy: the final norm follows the chosen layer; False gives the layer's own output.
        prompt_weights, windows: see `TextEmbedder`.

    Raises:
        ValueError: always_return_pooled with legacy.

    Source: Cherti et al. 2023 (OpenCLIP); Podell et al. 2023.
    """

    def __init__(
        self,
        arch: str | Mapping[str, Any] = "ViT-H-14",
        version: str | None = "laion2b_s32b_b79k",
        device: str = "cuda",
        max_length: int = 77,
        freeze: bool = True,
        layer: str = "last",
        always_return_pooled: bool = False,
        legacy: bool = True,
        prompt_weights: bool = False,
        windows: int = 1,
    ) -> None:
        if always_return_pooled and legacy:
            raise ValueError("always_return_pooled=True needs legacy=False")
        super().__init__(arch, version, device, max_length, freeze, layer, prompt_weights, windows)
        self.return_pooled, self.legacy = always_return_pooled, legacy

    def needs(self, name: str) -> bool:
        """All is read for the pooled vector, but for the temperature."""
        return not name.startswith("logit_scale") if self.return_pooled else super().needs(name)

    def encode_tokens(self, ids: Tensor) -> Tensor:
        """Ids (b, n) → (b, n, d)."""
        return super().encode_tokens(ids) if self.legacy else self.hidden_states(ids)[0]

    def encode_pooled(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """As `encode_tokens`, and the projected vectors at the ends (b, p) if they are wanted."""
        if not self.return_pooled:
            return self.encode_tokens(ids), None
        z, last = self.hidden_states(ids, with_last=True)
        return z, self.pool(self.model.ln_final(last), ids)

    def pool(self, x: Tensor, text: Tensor) -> Tensor:
        """States (b, n, d) of ids (b, n) → the projected vectors of the end tokens, whose id is the highest, (b, p)."""
        ends = text.argmax(dim=-1, keepdim=True)
        return x.take_along_dim(ends[..., None], dim=1)[:, 0] @ self.model.text_projection


class FrozenT5Embedder(AbstractEmbModel, t5.FrozenT5Embedder):
    """T5's encoder: one vector a token; see `ldm.modules.encoders.t5`."""

    def __init__(
        self,
        version: str = "google/t5-v1_1-xxl",
        device: str = "cuda",
        max_length: int = 77,
        freeze: bool = True,
    ) -> None:
        super().__init__(version, device, max_length, freeze)


class FrozenByT5Embedder(FrozenT5Embedder):
    """ByT5's encoder, which reads bytes: one vector a byte."""

    def __init__(
        self,
        version: str = "google/byt5-base",
        device: str = "cuda",
        max_length: int = 77,
        freeze: bool = True,
    ) -> None:
        super().__init__(version, device, max_length, freeze)


class FrozenCLIPT5Encoder(AbstractEmbModel, t5.FrozenCLIPT5Encoder):
    """CLIP's and T5's vectors of a prompt, as a list of two; see `ldm.modules.encoders.t5`."""
