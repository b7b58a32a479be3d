"""T5's encoder as a condition, alone or beside CLIP's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.modules.encoders.clip import FrozenCLIPEmbedder
from ldm.modules.encoders.tokenizers import hub_ids
from ldm.modules.encoders.weights import HubEncoder, make_empty
from taming.modules.util import AbstractEncoder

_FIGURES = ("d_model", "d_kv", "d_ff", "num_layers", "num_heads")
_WORDS = {
    "small": (512, 64, 1024, 8, 6),
    "base": (768, 64, 2048, 12, 12),
    "large": (1024, 64, 2816, 24, 16),
    "xl": (2048, 64, 5120, 24, 32),
    "xxl": (4096, 64, 10240, 24, 64),
}
_BYTES = {
    "small": (1472, 64, 3584, 12, 6),
    "base": (1536, 64, 3968, 18, 12),
    "large": (1536, 64, 3840, 36, 16),
}
_FAMILIES = {"t5-v1_1": (32128, _WORDS), "flan-t5": (32128, _WORDS), "byt5": (384, _BYTES)}

# encoders of the hub's T5 models: known without a download
ARCHITECTURES: dict[str, dict[str, Any]] = {
    f"google/{family}-{size}": {
        "vocab_size": vocabulary, **dict(zip(_FIGURES, figures, strict=True)),
        "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
    }
    for family, (vocabulary, sizes) in _FAMILIES.items()
    for size, figures in sizes.items()
}  # fmt: skip


class FrozenT5Embedder(HubEncoder):
    """T5's encoder as a condition: one vector a token. Padding is not masked, as published.

    The architectures of the hub's T5 v1.1, Flan-T5 and ByT5 are known, so that one builds without a download; its
    weights come from a checkpoint that is loaded into it, or else from the hub at first use, as does the vocabulary
    (ByT5 reads bytes and needs none).

    Args:
        version: a name on the hub, or a folder with a model of the hub's kind.
        device: accepted, as published; the ids go where the weights are.
        max_length: tokens that a text is padded or cut to.
        freeze: eval mode, no gradients.

    Source: Raffel et al. 2020; Xue et al. 2022 (ByT5).
    """

    def __init__(
        self,
        version: str = "google/t5-v1_1-large",
        device: str = "cuda",
        max_length: int = 77,
        freeze: bool = True,
    ) -> None:
        super().__init__()
        self.version, self.device, self.max_length = version, device, max_length
        self.transformer = self._build()
        self.load_folder()
        if freeze:
            self.freeze()

    def _build(self) -> Any:
        from transformers import T5Config, T5EncoderModel

        if self.version in ARCHITECTURES:
            config = T5Config(**ARCHITECTURES[self.version])
        else:
            known = f"sizes of {self.version!r} (known without a download: {', '.join(ARCHITECTURES)})"
            config = self.obtain(lambda: T5Config.from_pretrained(self.version), known)
        with torch.device("meta"):
            network = T5EncoderModel(config)
        make_empty(network)
        network.tie_weights()  # the two names of the token table
        return network.eval()

    def make_tokenizer(self) -> Any:
        """Bytes for ByT5, else the version's own vocabulary."""
        from transformers import ByT5Tokenizer

        return ByT5Tokenizer() if self.version.startswith("google/byt5") else super().make_tokenizer()

    def fetch_weights(self) -> Mapping[str, Tensor]:
        """Weights of the hub's model."""
        from transformers import T5EncoderModel

        model = self.obtain(
            lambda: T5EncoderModel.from_pretrained(self.version), f"weights of {self.version!r}"
        )
        return model.state_dict()

    def forward(self, text: str | Sequence[str]) -> Tensor:
        """Texts, a string or b strings → (b, max_length, d)."""
        self.ensure_weights()
        ids = hub_ids(self.tokenizer, text, self.max_length).to(self.transformer.shared.weight.device)
        with torch.autocast(ids.device.type, enabled=False):  # T5's activations outgrow float16
            return self.transformer(input_ids=ids).last_hidden_state

    def encode(self, text: Any) -> Tensor:
        """As `forward`."""
        return self(text)


class FrozenCLIPT5Encoder(AbstractEncoder):
    """CLIP's and T5's vectors of a prompt, as a list of two.

    Args:
        clip_version, t5_version: see the two encoders.
        device: accepted, as published; the ids go where the weights are.
        clip_max_length, t5_max_length: tokens a text.
    """

    def __init__(
        self,
        clip_version: str = "openai/clip-vit-large-patch14",
        t5_version: str = "google/t5-v1_1-xl",
        device: str = "cuda",
        clip_max_length: int = 77,
        t5_max_length: int = 77,
    ) -> None:
        super().__init__()
        self.clip_encoder = FrozenCLIPEmbedder(clip_version, device, max_length=clip_max_length)
        self.t5_encoder = FrozenT5Embedder(t5_version, device, max_length=t5_max_length)

    def forward(self, text: str | Sequence[str]) -> list[Tensor]:
        """Texts → [(b, n, d) of CLIP, (b, m, e) of T5]."""
        return [self.clip_encoder.encode(text), self.t5_encoder.encode(text)]

    def encode(self, text: Any) -> list[Tensor]:
        """As `forward`."""
        return self(text)
