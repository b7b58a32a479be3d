"""CLIP's text transformer, the condition of Stable Diffusion v1, under the names of the published checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.encoders.prompts import PromptEncoder, PromptReader
from ldm.modules.encoders.tokenizers import clip_tokenizer
from ldm.modules.encoders.weights import HubEncoder, make_empty
from taming.modules.attention import attention
from taming.util import nearest


@dataclass(frozen=True)
class CLIPTextConfig:
    """Sizes of a text transformer, under the names that the hub's `config.json` has for them."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int | None = None  # None: the last of the vocabulary


_SMALL = CLIPTextConfig()
_LARGE = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
_HUGE = CLIPTextConfig(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, hidden_act="gelu"
)
_GIANT = CLIPTextConfig(
    hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, hidden_act="gelu"
)

# text towers of the hub's CLIP models: known without a download
ARCHITECTURES = {
    "openai/clip-vit-base-patch32": _SMALL,
    "openai/clip-vit-base-patch16": _SMALL,
    "openai/clip-vit-large-patch14": _LARGE,
    "openai/clip-vit-large-patch14-336": _LARGE,
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": _HUGE,
    "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k": _GIANT,
}

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}


class CLIPTextOutput(NamedTuple):
    """What a text transformer gives."""

    last_hidden_state: Tensor  # (b, n, d), after the final norm
    pooler_output: Tensor  # (b, d), the vector at the end of the text
    hidden_states: tuple[Tensor, ...]  # the embeddings and each layer's output, before the final norm


class CLIPAttention(nn.Module):
    """Causal self-attention."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, d) → (b, n, d)."""
        h = attention(self.q_proj(x), self.k_proj(x), self.v_proj(x), heads=self.heads, causal=True)
        return self.out_proj(h)


class CLIPMLP(nn.Module):
    """Two linear layers around an activation."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        if config.hidden_act not in ACTIVATIONS:
            raise ValueError(
                f"hidden_act={config.hidden_act!r} is unknown. {nearest(config.hidden_act, ACTIVATIONS)}"
            )
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, d) → (b, n, d)."""
        return self.fc2(self.activation(self.fc1(x)))


class CLIPLayer(nn.Module):
    """Attention and MLP, each behind a norm and beside a skip connection."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.self_attn = CLIPAttention(config.hidden_size, config.num_attention_heads)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = CLIPMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, d) → (b, n, d)."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPEmbeddings(nn.Module):
    """Token and position vectors, added."""

    position_ids: Tensor

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        # nothing reads it: it stands in published checkpoints, and tools of that time want it back
        self.register_buffer("position_ids", torch.arange(config.max_position_embeddings)[None])

    def forward(self, input_ids: Tensor) -> Tensor:
        """(b, n) → (b, n, d).

        Raises:
            ValueError: more tokens than positions.
        """
        n, positions = input_ids.shape[-1], self.position_embedding.num_embeddings
        if n > positions:
            raise ValueError(f"{n} tokens for {positions} positions; cut the prompt or encode it in windows")
        return self.token_embedding(input_ids) + self.position_embedding.weight[:n]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # newer checkpoints lack the buffer, and merged or halved ones hold rounded numbers in it
        count = self.position_embedding.num_embeddings
        weight = state_dict.get(f"{prefix}token_embedding.weight")
        device = self.position_ids.device if weight is None else weight.device
        state_dict[f"{prefix}position_ids"] = torch.arange(count, device=device)[None]
        super()._load_from_state_dict(state_dict, prefix, *args)


class CLIPEncoder(nn.Module):
    """The layers, one after another."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(CLIPLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(b, n, d) → the input and each layer's output."""
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return tuple(states)


class CLIPTextTransformer(nn.Module):
    """Embeddings, layers, final norm."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.embeddings = CLIPEmbeddings(config)
        self.encoder = CLIPEncoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class CLIPTextModel(nn.Module):
    """The text tower of CLIP, with the published names: `text_model.encoder.layers.0.self_attn.q_proj.weight` and so on.

    Weights without the `text_model.` level, as transformers 5 writes them, load as well.

    Source: Radford et al. 2021, section 2.4.
    """

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.config = config
        self.text_model = CLIPTextTransformer(config)

    def reset_parameters(self) -> None:
        """Fresh weights, as CLIP's training began. Source: Radford et al. 2019, section 2.3, scaled by width."""
        width, depth = self.config.hidden_size, self.config.num_hidden_layers
        inner = width**-0.5 * (2 * depth) ** -0.5
        scale = {"q_proj": width**-0.5, "k_proj": width**-0.5, "v_proj": width**-0.5, "out_proj": inner,
                 "fc1": (2 * width) ** -0.5, "fc2": inner, "token_embedding": 0.02, "position_embedding": 0.01}  # fmt: skip
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=scale[name.rpartition(".")[2]])
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, input_ids: Tensor) -> CLIPTextOutput:
        """Ids (b, n) → states of all layers."""
        states = self.text_model.encoder(self.text_model.embeddings(input_ids))
        last = self.text_model.final_layer_norm(states[-1])
        return CLIPTextOutput(
            last, last[torch.arange(len(last), device=last.device), self._ends(input_ids)], states
        )

    def _ends(self, input_ids: Tensor) -> Tensor:
        """Position of each text's first end token."""
        end = self.config.eos_token_id
        # 2 is what old configurations say of vocabularies whose end token is the last one
        if end is None or end == 2:
            return input_ids.argmax(dim=-1)
        return (input_ids == end).int().argmax(dim=-1)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for part in self.text_model._modules:
            for key in [k for k in state_dict if k.startswith(f"{prefix}{part}.")]:
                state_dict[f"{prefix}text_model.{key.removeprefix(prefix)}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)


class FrozenCLIPEmbedder(PromptEncoder, HubEncoder):
    """CLIP's text encoder as a condition: one vector a token.

    Padding is not masked, as published. The architectures of the hub's CLIP models are known, so that one builds
    without a download; its weights come from a checkpoint that is loaded into it, or else from the hub at first use.

    Args:
        version: a name on the hub, a folder with a model of the hub's kind, or sizes (see `CLIPTextConfig`) for fresh
            weights.
        device: accepted, as published; the ids go where the weights are.
        max_length: tokens a window.
        freeze: eval mode, no gradients.
        layer: "last", after the final norm; "pooled", the vector at the end of the text as the only one; or "hidden",
            a layer's output without the final norm.
        layer_idx: of "hidden": 0 the embeddings, -1 the last layer, -2 the one before (known as clip skip 2).
        prompt_weights, windows: see `PromptEncoder`.

    Raises:
        AssertionError: an unknown layer, or "hidden" without a layer_idx that exists.
        ValueError: weights or windows for "pooled".

    Source: Rombach et al. 2022; Radford et al. 2021.
    """

    LAYERS = ("last", "pooled", "hidden")

    def __init__(
        self,
        version: str | Mapping[str, Any] = "openai/clip-vit-large-patch14",
        device: str = "cuda",
        max_length: int = 77,
        freeze: bool = True,
        layer: str = "last",
        layer_idx: int | None = None,
        prompt_weights: bool = False,
        windows: int = 1,
    ) -> None:
        super().__init__(prompt_weights, windows)
        if layer not in self.LAYERS:
            raise AssertionError(f"layer={layer!r} is unknown; choose one of {', '.join(self.LAYERS)}")
        if layer == "pooled" and (prompt_weights or windows > 1):
            raise ValueError(
                "layer='pooled' gives one vector a prompt: prompt_weights and windows need 'last' or 'hidden'"
            )
        self.version, self.device, self.max_length = version, device, max_length
        self.layer, self.layer_idx = layer, layer_idx
        self.transformer = self._build()
        depth = self.transformer.config.num_hidden_layers
        if layer == "hidden" and (layer_idx is None or abs(layer_idx) > depth):
            raise AssertionError(
                f"layer='hidden' needs a layer_idx from {-depth} to {depth}, not {layer_idx}"
            )
        self.load_folder()
        if freeze:
            self.freeze()

    def _build(self) -> CLIPTextModel:
        if isinstance(self.version, Mapping):
            sizes = {f.name for f in fields(CLIPTextConfig)}
            for name in self.version:
                if name not in sizes:
                    raise ValueError(f"CLIP's text transformer has no size {name!r}. {nearest(name, sizes)}")
            network = CLIPTextModel(CLIPTextConfig(**self.version))
            network.reset_parameters()
            return network.eval()
        config = ARCHITECTURES.get(self.version) or self._hub_config(self.version)
        with torch.device("meta"):
            network = CLIPTextModel(config)
        make_empty(network)
        network.text_model.embeddings.position_ids.copy_(torch.arange(config.max_position_embeddings))
        return network.eval()

    def _hub_config(self, version: str) -> CLIPTextConfig:
        from transformers import CLIPTextConfig as HubConfig

        known = f"sizes of {version!r} (known without a download: {', '.join(ARCHITECTURES)})"
        config = self.obtain(lambda: HubConfig.from_pretrained(version), known)
        return CLIPTextConfig(**{f.name: getattr(config, f.name) for f in fields(CLIPTextConfig)})

    def make_tokenizer(self) -> Any:
        """CLIP's vocabulary, which needs no download, unless the version is a folder or a model with its own."""
        if not isinstance(self.version, str) or self.version in ARCHITECTURES:
            return clip_tokenizer(self.transformer.config.vocab_size)
        return super().make_tokenizer()

    def fetch_weights(self) -> Mapping[str, Tensor]:
        """Weights of the hub's model, under the published names."""
        from transformers import CLIPTextModel as HubModel

        model = self.obtain(lambda: HubModel.from_pretrained(self.version), f"weights of {self.version!r}")
        return {f"text_model.{k.removeprefix('text_model.')}": v for k, v in model.state_dict().items()}

    def reader(self) -> PromptReader:
        """Prompts by the tokenizer, padded with its padding token."""
        own = self.tokenizer
        return PromptReader(
            encode=lambda text: own(text, add_special_tokens=False, verbose=False)["input_ids"],
            decode=lambda ids: own.decode(ids).strip(), start=own.bos_token_id, end=own.eos_token_id,
            pad=own.pad_token_id, length=self.max_length, windows=self.windows, weighted=self.prompt_weights,
        )  # fmt: skip

    def encode_tokens(self, ids: Tensor) -> Tensor:
        """Ids (b, n) → (b, n, d), or (b, 1, d) for "pooled"."""
        return self.encode_pooled(ids)[0]

    def encode_pooled(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """As `encode_tokens`, and the vector at the end of each text, (b, d)."""
        self.ensure_weights()
        out = self.transformer(ids)
        if self.layer == "hidden":
            return out.hidden_states[self.layer_idx or 0], out.pooler_output
        z = out.last_hidden_state if self.layer == "last" else out.pooler_output[:, None]
        return z, out.pooler_output
