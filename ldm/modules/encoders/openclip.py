"""Encoders over open_clip's models: the text condition of Stable Diffusion v2, and OpenAI's CLIP under its old names."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from ldm.modules.encoders.prompts import PromptEncoder, PromptReader
from ldm.modules.encoders.tokenizers import clip_vocabulary
from ldm.modules.encoders.weights import PretrainedEncoder, make_empty
from taming.checkpoint import load_state_dict
from taming.util import nearest


class OpenCLIPWeights(PretrainedEncoder):
    """What the encoders over open_clip's models share: `model`, built without a download, and its weights.

    Args:
        arch: an architecture that open_clip knows, or one of its configurations as a mapping.
        version: a tag of published weights, a file with weights, or None for fresh ones (a mapping has no tags).
        without: the tower that is left out, "visual" or "transformer".
    """

    model: Any

    def build(self, arch: str | Mapping[str, Any], version: str | None, without: str | None = None) -> None:
        """Make `model`.

        Raises:
            ValueError: an architecture or weights that open_clip does not know.
        """
        import open_clip

        config = _architecture(arch)
        self.arch, self.version = arch, version
        is_file = version is not None and Path(version).is_file()
        tag = open_clip.get_pretrained_cfg(arch, version) if isinstance(arch, str) and version else {}
        if isinstance(arch, str) and version and not (tag or is_file):
            tags = open_clip.list_pretrained_tags_by_model(arch)
            raise ValueError(
                f"{arch} has no published weights {version!r}, nor is that a file. {nearest(version, tags)}"
            )
        config["quick_gelu"] = bool(config.get("quick_gelu") or tag.get("quick_gelu"))
        fresh = not (tag or is_file)
        with torch.device(torch.get_default_device() if fresh else "meta"):
            model = open_clip.CLIP(**config)
        if without:
            delattr(model, without)
        self.model = model.eval()
        if not fresh:
            make_empty(self.model)
        mask = self.model.attn_mask
        self.model.attn_mask = torch.full_like(mask, -torch.inf).triu(1)  # no checkpoint has it
        if is_file and not mask.is_meta:
            self.ensure_weights()

    def network(self) -> nn.Module:
        """open_clip's model."""
        return self.model

    def fetch_weights(self) -> Mapping[str, Tensor]:
        """Weights of the file or of the tag."""
        import open_clip

        path = self.version
        if path is None or not Path(path).is_file():
            tag = open_clip.get_pretrained_cfg(self.arch, self.version)
            path = self.obtain(
                lambda: open_clip.download_pretrained(tag), f"weights {self.version!r} of {self.arch}"
            )
        # open_clip's own trainings write `module.` before each name
        return {name.removeprefix("module."): value for name, value in load_state_dict(path).items()}

    def clip_reader(self, windows: int = 1, weighted: bool = False) -> PromptReader:
        """Prompts by CLIP's vocabulary, padded with zeros."""
        own = clip_vocabulary()[0]
        return PromptReader(
            encode=own.encode, decode=lambda ids: own.decode(ids).strip(), start=own.sot_token_id, end=own.eot_token_id,
            pad=0, length=len(self.model.positional_embedding), windows=windows, weighted=weighted,
        )  # fmt: skip


def _architecture(arch: str | Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of open_clip's model."""
    import open_clip

    if isinstance(arch, DictConfig):
        config: Any = OmegaConf.to_container(arch, resolve=True)
    else:
        config = dict(arch) if isinstance(arch, Mapping) else open_clip.get_model_config(arch)
    if config is None:
        raise ValueError(
            f"open_clip knows no architecture {arch!r}. {nearest(str(arch), open_clip.list_models())}"
        )
    if config.pop("custom_text", False) or "hf_model_name" in config["text_cfg"]:
        raise ValueError(
            f"{arch!r} has another text tower than CLIP's; choose an architecture such as 'ViT-H-14'"
        )
    return config


class FrozenOpenCLIPEmbedder(PromptEncoder, OpenCLIPWeights):
    """The text encoder of an open_clip model as a condition: one vector a token.

    Args:
        arch, version: see `OpenCLIPWeights`. The weights come from a checkpoint that is loaded into it, or else from
            the hub at first use.
        device: accepted, as published; the ids go where the weights are.
        max_length: accepted, as published; the model's own length holds, 77 for all published ones.
        freeze: eval mode, no gradients.
        layer: "last", or "penultimate", which leaves the last layer out; the final norm follows in both cases.
        prompt_weights, windows: see `PromptEncoder`.

    Raises:
        AssertionError: an unknown layer.
        ValueError: an unknown architecture or unknown weights.

    Source: Cherti et al. 2023 (OpenCLIP); Rombach et al. 2022.
    """

    LAYERS = ("last", "penultimate")

    def __init__(
        self,
        arch: str | Mapping[str, Any] = "ViT-H-14",
        version: str | None = "laion2b_s32b_b79k",
        device: str = "cuda",
        max_length: int = 77,
        freeze: bool = True,
        layer: str = "last",
        prompt_weights: bool = False,
        windows: int = 1,
    ) -> None:
        super().__init__(prompt_weights, windows)
        if layer not in self.LAYERS:
            raise AssertionError(f"layer={layer!r} is unknown; choose one of {', '.join(self.LAYERS)}")
        self.device, self.max_length = device, max_length
        self.layer, self.layer_idx = layer, self.LAYERS.index(layer)
        self.build(arch, version, without="visual")
        if freeze:
            self.freeze()

    def needs(self, name: str) -> bool:
        """Neither the projection nor a layer that is left out is read."""
        depth = len(self.model.transformer.resblocks)
        unread = (
            "text_projection",
            "logit_scale",
            *(f"transformer.resblocks.{depth - 1}.",) * self.layer_idx,
        )
        return not name.startswith(unread)

    def reader(self) -> PromptReader:
        """Prompts by CLIP's vocabulary, with this encoder's options."""
        return self.clip_reader(self.windows, self.prompt_weights)

    def encode_tokens(self, ids: Tensor) -> Tensor:
        """Ids (b, n) → (b, n, d)."""
        return self.encode_with_transformer(ids)

    def encode_with_transformer(self, text: Tensor) -> Tensor:
        """Ids (b, n) → (b, n, d), after the final norm."""
        return self.model.ln_final(self.hidden_states(text)[0])

    def hidden_states(self, text: Tensor, with_last: bool = False) -> list[Tensor]:
        """Ids (b, n) → (b, n, d) behind the chosen layer and, if wanted, behind the last one; before the final norm."""
        self.ensure_weights()
        x = self.model.token_embedding(text) + self.model.positional_embedding
        batch_first = getattr(self.model.transformer, "batch_first", False)
        states = [
            self.text_transformer_forward(x if batch_first else x.transpose(0, 1), self.model.attn_mask)
        ]
        if with_last:
            rest = len(self.model.transformer.resblocks) - self.layer_idx
            states.append(self.text_transformer_forward(states[0], self.model.attn_mask, slice(rest, None)))
        return [z if batch_first else z.transpose(0, 1) for z in states]

    def text_transformer_forward(
        self, x: Tensor, attn_mask: Tensor | None = None, layers: slice | None = None
    ) -> Tensor:
        """The layers up to the chosen one, or the given ones; (b, n, d), or (n, b, d) where the model is not batch-first."""
        blocks = self.model.transformer.resblocks
        for block in blocks[layers or slice(len(blocks) - self.layer_idx)]:
            x = block(x, attn_mask=attn_mask)
        return x


def openai_architecture(name: str) -> str:
    """open_clip's name for one of OpenAI's models: "ViT-L/14@336px" → "ViT-L-14-336".

    Raises:
        ValueError: OpenAI has published no such model.
    """
    import open_clip

    known = open_clip.list_pretrained_models_by_tag("openai")
    arch = name.replace("/", "-").replace("@336px", "-336")
    if arch not in known:
        raise ValueError(f"OpenAI has published no CLIP model {name!r}. {nearest(arch, known)}")
    return arch


# the files of a model that open_clip saves, on the hub or in a folder
CONFIG_FILE = "open_clip_config.json"
WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


def clip_model(name: str) -> tuple[str | Mapping[str, Any], str]:
    """Architecture and weights, as `OpenCLIPWeights.build` takes them.

    Args:
        name: of one of OpenAI's models, or a folder with a model that open_clip saved.

    Raises:
        FileNotFoundError: a folder that lacks the configuration or the weights.
        ValueError: OpenAI has published no such model.
    """
    folder = Path(name)
    if not folder.is_dir():
        return openai_architecture(name), "openai"
    weights = next((folder / file for file in WEIGHT_FILES if (folder / file).is_file()), None)
    if weights is None or not (folder / CONFIG_FILE).is_file():
        raise FileNotFoundError(
            f"{name} holds no model of open_clip: {CONFIG_FILE} and {' or '.join(WEIGHT_FILES)} belong in it"
        )
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    return config["model_cfg"], str(weights)


class FrozenCLIPTextEmbedder(OpenCLIPWeights):
    """A prompt as one vector of OpenAI's CLIP, in the space it shares with images.

    Args:
        version: OpenAI's name of the model, "ViT-L/14", or a folder (see `clip_model`).
        device: accepted, as published; the ids go where the weights are.
        max_length: accepted, as published; the model's own length holds.
        n_repeat: copies of the vector that `encode` gives.
        normalize: unit length.

    Source: Blattmann et al. 2022 (retrieval-augmented diffusion models); Radford et al. 2021.
    """

    def __init__(
        self,
        version: str = "ViT-L/14",
        device: str = "cuda",
        max_length: int = 77,
        n_repeat: int = 1,
        normalize: bool = True,
    ) -> None:
        super().__init__()
        self.build(*clip_model(version))
        self.device, self.max_length, self.n_repeat, self.normalize = device, max_length, n_repeat, normalize

    def forward(self, text: str | Sequence[str]) -> Tensor:
        """b prompts → (b, d)."""
        self.ensure_weights()
        ids, _ = self.clip_reader()(text)
        z = self.model.encode_text(ids[:, 0].to(self.model.positional_embedding.device))
        return F.normalize(z, dim=-1) if self.normalize else z

    def encode(self, text: Any) -> Tensor:
        """b prompts → (b, n_repeat, d)."""
        z = self(text)
        z = z[:, None] if z.ndim == 2 else z
        return z.repeat(1, self.n_repeat, 1)
