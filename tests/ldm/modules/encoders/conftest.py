"""Small models of the hub's kind, saved in folders, and the vocabulary files that belong to them."""

from __future__ import annotations

import json

import pytest
import torch


@pytest.fixture(scope="session")
def letters_folder(tmp_path_factory):
    """A function: save a CLIP tokenizer of single letters, 12 tokens long, beside a model's weights."""

    def save(model):
        folder = tmp_path_factory.mktemp("clip")
        words = [c + end for c in map(chr, range(97, 123)) for end in ("", "</w>")]
        words += ["ca", "cat</w>", "<|startoftext|>", "<|endoftext|>"]
        (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
        (folder / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
        special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}  # fmt: skip
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 12, **special})
        )
        model.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def hub_clip(letters_folder):
    """A small text model of transformers with random weights, and its folder."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=56, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=12, bos_token_id=54, eos_token_id=55, pad_token_id=55,
    )  # fmt: skip
    model = CLIPTextModel(config).eval()
    with torch.no_grad():
        for p in model.parameters():  # biases and norms too
            p.add_(0.3 * torch.randn_like(p))
    return model, letters_folder(model)


OPEN_CLIP = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 224, "layers": 1, "width": 32, "head_width": 16, "patch_size": 112},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 3},
}


@pytest.fixture(scope="session")
def open_clip_model(tmp_path_factory):
    """A small model of open_clip with random weights, its configuration, and a file with its weights."""
    import open_clip

    torch.manual_seed(0)
    model = open_clip.CLIP(**OPEN_CLIP).eval()
    path = tmp_path_factory.mktemp("open_clip") / "weights.pt"
    torch.save(model.state_dict(), path)
    return model, OPEN_CLIP, path
