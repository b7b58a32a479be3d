"""Prompts with the pictures nearest to them, the condition of retrieval-augmented diffusion models."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from ldm.data.retrieval import Retriever, open_retriever
from ldm.modules.encoders.openclip import FrozenCLIPTextEmbedder
from taming.modules.util import AbstractEncoder


class RetrievalTextEmbedder(AbstractEncoder):
    """A prompt as a vector of CLIP, followed by those of the nearest pictures in a database, all of length one.

    The empty prompt is zeros, from which guidance leads away. As `cond_stage_config` of a model it replaces the published
    `torch.nn.Identity`, for which scripts/knn2img.py computes the same.

    ```python
    context = RetrievalTextEmbedder(database="artbench-surrealism").encode(["a fox in a forest"])  # (1, 1 + 10, 768)
    ```

    Args:
        version: see `FrozenCLIPTextEmbedder`; the database's vectors must be of the same model.
        n_repeat: copies of the prompt's vector.
        database: name or folder, see `ldm.data.retrieval.open_retriever`; None for prompts alone. It is opened at first use.
        knn: neighbours of a prompt.
        searcher: folder of the searcher, if it is not where the published scripts keep it.

    Source: Rombach et al. 2022 (text-guided synthesis of artistic images with retrieval-augmented diffusion models).
    """

    def __init__(
        self,
        version: str = "ViT-L/14",
        n_repeat: int = 1,
        database: str | None = None,
        knn: int = 10,
        searcher: str | None = None,
    ) -> None:
        super().__init__()
        self.text = FrozenCLIPTextEmbedder(version, n_repeat=n_repeat)
        self.database, self.knn, self.searcher = database, knn, searcher

    @cached_property
    def retriever(self) -> Retriever | None:
        """The database with its searcher, opened now.

        Raises:
            FileNotFoundError: no such database.
            ValueError: it is damaged, too small, or of another model of CLIP.
        """
        if self.database is None:
            return None
        retriever = open_retriever(self.database, self.searcher)
        width = self.text.model.text_projection.shape[-1]
        if retriever.searcher.width != width:
            raise ValueError(
                f"database {self.database!r} holds vectors of {retriever.searcher.width} numbers, this CLIP gives {width}; "
                "choose the model that the database was made with"
            )
        if not 1 <= self.knn <= len(retriever.database):
            raise ValueError(
                f"knn={self.knn}: the database {self.database!r} holds {len(retriever.database)} vectors"
            )
        return retriever

    @torch.no_grad()
    def encode(self, text: str | Sequence[str]) -> Tensor:
        """b prompts → (b, n_repeat + knn, d)."""
        prompts = [text] if isinstance(text, str) else list(text)
        vectors = self.text.encode(prompts)
        if self.retriever is not None:
            vectors = torch.cat(
                [vectors, self.retriever.neighbours(vectors[:, 0], self.knn).embedding], dim=1
            )
        empty = torch.tensor([not prompt.strip() for prompt in prompts], device=vectors.device)
        return vectors.masked_fill(empty[:, None, None], 0.0)
