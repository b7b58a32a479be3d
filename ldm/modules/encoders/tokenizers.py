"""Text into token ids."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.encoders.prompts import PromptReader, warn_of_cut


class Tokenizer(nn.Module):
    """Texts as id tensors of a fixed length; called directly, or through a quantiser's interface by `encode`.

    Args:
        device: where the ids go; "cuda" (the published default) falls back to the CPU on machines without.
        vq_interface: `encode` answers `(None, None, [None, None, ids])`.
        max_length: length that texts are padded or cut to.
        offset: added to the ids that `encode` gives: a token transformer has one table for image codes and text, so text
            begins behind the codes.
    """

    def __init__(
        self, device: str = "cuda", vq_interface: bool = True, max_length: int = 77, offset: int = 0
    ) -> None:
        super().__init__()
        self.device = device if device != "cuda" or torch.cuda.is_available() else "cpu"
        self.vq_interface = vq_interface
        self.max_length = max_length
        self.offset = offset

    @torch.no_grad()
    def encode(self, text: str | Sequence[str]) -> Any:
        """Ids of the texts, (b, max_length), in a quantiser's triple if so configured."""
        tokens = self(text) + self.offset
        return (None, None, [None, None, tokens]) if self.vq_interface else tokens

    def decode(self, text: Any) -> Any:
        """The argument itself: a condition is shown as it came."""
        return text


def hub_ids(tokenizer: Any, text: str | Sequence[str], length: int) -> Tensor:
    """Texts by a tokenizer of transformers → ids (b, length), padded, and cut with a warning that names the words lost."""
    texts = [text] if isinstance(text, str) else list(text)
    for ids in tokenizer(texts, verbose=False)["input_ids"]:
        if len(ids) > length:
            warn_of_cut(length, tokenizer.decode(ids[length - 1 :], skip_special_tokens=True))
    batch = tokenizer(texts, truncation=True, max_length=length, padding="max_length", return_tensors="pt")
    return batch["input_ids"]


class BERTTokenizer(Tokenizer):
    """The tokenizer of bert-base-uncased, from a folder, the Hugging Face hub's cache or, at first use, the hub itself.

    Args:
        version: hub name, or a local folder with the tokenizer's files.
    """

    def __init__(
        self,
        device: str = "cuda",
        vq_interface: bool = True,
        max_length: int = 77,
        version: str = "bert-base-uncased",
        offset: int = 0,
    ) -> None:
        super().__init__(device, vq_interface, max_length, offset)
        from transformers import AutoTokenizer

        self.version = version
        self.tokenizer: Any = None
        with contextlib.suppress(OSError, ValueError):
            self.tokenizer = AutoTokenizer.from_pretrained(version, local_files_only=True)

    def forward(self, text: str | Sequence[str]) -> Tensor:
        """Texts → ids (b, max_length), padded with zeros, cut at max_length with a warning.

        Raises:
            OSError: the tokenizer's files are neither cached nor downloadable.
        """
        if self.tokenizer is None:
            self.tokenizer = self._download()
        return hub_ids(self.tokenizer, text, self.max_length).to(self.device)

    def _download(self) -> Any:
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.version)
        except (OSError, ValueError) as error:
            raise OSError(
                f"the tokenizer {self.version!r} could not be loaded ({str(error).splitlines()[0]}). Fetch it on a machine with a "
                f"connection (hf download {self.version}) and name its folder as `version`, or use tokenizer='bpe', which needs "
                "no download."
            ) from error


BYTES = 512  # every byte, alone and at the end of a word
FULL = 49408


@lru_cache
def clip_vocabulary(vocab_size: int = FULL) -> tuple[Any, list[str], list[tuple[str, str]]]:
    """CLIP's byte-pair encoding, from the vocabulary that ships inside open_clip_torch: no download.

    Args:
        vocab_size: number of ids, up to 49,408. A smaller vocabulary keeps the earliest merges, so that rare words come
            in more pieces; 514 ids are bytes alone. The last two ids are start and end.

    Returns:
        A tokenizer of open_clip, its pieces in the order of their ids, and its merges.

    Raises:
        ValueError: a vocabulary size out of range.

    Source: Radford et al. 2021 (CLIP), section 2.4; Sennrich et al. 2016.
    """
    if not BYTES + 2 <= vocab_size <= FULL:
        raise ValueError(f"vocab_size={vocab_size} must lie between {BYTES + 2} and {FULL}")
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer: Any = SimpleTokenizer()
    pieces = [*list(tokenizer.encoder)[: vocab_size - 2], *list(tokenizer.encoder)[-2:]]
    merges = list(tokenizer.bpe_ranks)[: vocab_size - 2 - BYTES]
    tokenizer.bpe_ranks = {pair: rank for rank, pair in enumerate(merges)}
    tokenizer.encoder = {piece: i for i, piece in enumerate(pieces)}
    tokenizer.decoder = {i: piece for piece, i in tokenizer.encoder.items()}
    return tokenizer, pieces, merges


def clip_tokenizer(vocab_size: int = FULL) -> Any:
    """The same vocabulary as a tokenizer of transformers, equal to the published openai/clip-vit-large-patch14."""
    from transformers import CLIPTokenizer

    _, pieces, merges = clip_vocabulary(vocab_size)
    start, end = "<|startoftext|>", "<|endoftext|>"
    options = {
        "bos_token": start,
        "eos_token": end,
        "unk_token": end,
        "pad_token": end,
        "model_max_length": 77,
    }
    # through files, since the constructor's arguments differ between the releases of transformers
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "vocab.json").write_text(
            json.dumps({p: i for i, p in enumerate([*pieces[:-2], start, end])})
        )
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "CLIPTokenizer", **options})
        )
        return CLIPTokenizer.from_pretrained(folder)


class BPETokenizer(Tokenizer):
    """CLIP's byte-pair encoding without a download.

    Args:
        vocab_size: number of ids, see `clip_vocabulary`.

    Raises:
        ValueError: a vocabulary size out of range.
    """

    def __init__(
        self,
        device: str = "cuda",
        vq_interface: bool = True,
        max_length: int = 77,
        vocab_size: int = FULL,
        offset: int = 0,
    ) -> None:
        super().__init__(device, vq_interface, max_length, offset)
        self.tokenizer, _, _ = clip_vocabulary(vocab_size)
        self.vocab_size = vocab_size
        self.start, self.end = vocab_size - 2, vocab_size - 1

    def words(self, ids: Sequence[int]) -> str:
        """The text behind ids, without start, end and padding."""
        return self.tokenizer.decode([int(i) for i in ids if i not in (self.start, self.end)]).strip()

    def forward(self, text: str | Sequence[str]) -> Tensor:
        """Texts → ids (b, max_length): start, text, end, padded with the end id; a longer text is cut and warned about."""
        read = PromptReader(
            self.tokenizer.encode, self.words, self.start, self.end, pad=self.end, length=self.max_length
        )
        return read(text)[0][:, 0].to(self.device)
