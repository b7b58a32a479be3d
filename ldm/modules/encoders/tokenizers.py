"""Text into token ids."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)


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


class BERTTokenizer(Tokenizer):
    """The tokenizer of bert-base-uncased, from the Hugging Face hub or its cache.

    It can be built offline; the error, which says what to do, comes when it is first needed.

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
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(version)
        except (OSError, ValueError) as error:
            self._unavailable = error
            logger.warning("The tokenizer %r is not available yet: %s", version, str(error).splitlines()[0])

    def forward(self, text: str | Sequence[str]) -> Tensor:
        """Texts → ids (b, max_length), padded with zeros, cut at max_length.

        Raises:
            OSError: the tokenizer's files are neither cached nor downloadable.
        """
        if self.tokenizer is None:
            raise OSError(
                f"the tokenizer {self.version!r} could not be loaded ({self._unavailable}). Fetch it on a machine with a connection "
                f"(huggingface-cli download {self.version}) and name its folder as `version`, or use tokenizer='bpe', which needs no download."
            )
        batch = self.tokenizer(
            [text] if isinstance(text, str) else list(text), truncation=True, max_length=self.max_length,
            return_overflowing_tokens=False, padding="max_length", return_tensors="pt",
        )  # fmt: skip
        return batch["input_ids"].to(self.device)


class BPETokenizer(Tokenizer):
    """CLIP's byte-pair encoding, from the vocabulary that ships inside open_clip_torch: no download.

    Args:
        vocab_size: number of ids, up to 49,408. A smaller vocabulary keeps the earliest merges, so that rare words come
            in more pieces; 514 ids are bytes alone.

    Raises:
        ValueError: a vocabulary size out of range.

    Source: Radford et al. 2021 (CLIP), section 2.4; Sennrich et al. 2016.
    """

    BYTES = 512  # every byte, alone and at the end of a word
    FULL = 49408

    def __init__(
        self,
        device: str = "cuda",
        vq_interface: bool = True,
        max_length: int = 77,
        vocab_size: int = FULL,
        offset: int = 0,
    ) -> None:
        super().__init__(device, vq_interface, max_length, offset)
        if not self.BYTES + 2 <= vocab_size <= self.FULL:
            raise ValueError(f"vocab_size={vocab_size} must lie between {self.BYTES + 2} and {self.FULL}")
        from open_clip.tokenizer import SimpleTokenizer

        self.tokenizer: Any = SimpleTokenizer()
        self.vocab_size = vocab_size
        self.start, self.end = vocab_size - 2, vocab_size - 1
        merges = vocab_size - 2 - self.BYTES
        pieces = list(self.tokenizer.encoder)[: self.BYTES + merges]
        self.tokenizer.bpe_ranks = {
            pair: rank for pair, rank in self.tokenizer.bpe_ranks.items() if rank < merges
        }
        self.tokenizer.encoder = {piece: i for i, piece in enumerate(pieces)}
        self.tokenizer.decoder = {i: piece for piece, i in self.tokenizer.encoder.items()}

    def words(self, ids: Sequence[int]) -> str:
        """The text behind ids, without start, end and padding."""
        return self.tokenizer.decode([int(i) for i in ids if i not in (self.start, self.end)]).strip()

    def forward(self, text: str | Sequence[str]) -> Tensor:
        """Texts → ids (b, max_length): start, text, end, padded with the end id; a longer text is cut and warned about."""
        texts = [text] if isinstance(text, str) else list(text)
        rows = torch.full((len(texts), self.max_length), self.end, dtype=torch.long)
        for row, words in zip(rows, texts, strict=True):
            ids = self.tokenizer.encode(words)
            room = self.max_length - 2
            if len(ids) > room:
                logger.warning(
                    "The prompt is cut after %d tokens; without effect: %r", room, self.words(ids[room:])
                )
            ids = [self.start, *ids[:room], self.end]
            row[: len(ids)] = torch.tensor(ids)
        return rows.to(self.device)
