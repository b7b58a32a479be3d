"""Nearest neighbours among CLIP's vectors of pictures, the condition of retrieval-augmented diffusion models.

Source: Blattmann et al. 2022 (retrieval-augmented diffusion models); Rombach et al. 2022 (text-guided synthesis with them);
Johnson et al. 2019 (faiss).
"""

from __future__ import annotations

import logging
import math
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from taming.data.base import existing_folder
from taming.util import atomic_path

logger = logging.getLogger(__name__)

DATABASES, SEARCHERS = Path("data/rdm/retrieval_databases"), Path("data/rdm/searchers")
SEARCHER_FILE = "searcher.faiss"
EXACT_BELOW = 100_000  # so many vectors are compared one by one, in hundredths of a second a prompt
BLOCK = 1 << 16  # vectors normalised at once
CENTRE_SHARE = 39  # vectors that faiss wants for each centre it learns
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
DAMAGED = (zipfile.BadZipFile, KeyError, ValueError, EOFError, OSError)


def import_faiss() -> Any:
    """The library that searches.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            "searching for neighbours needs faiss: pip install 'latent-generative-models[retrieval]'"
        ) from error
    return faiss


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors (…, d) of any type as float32 of length one; zeros stay zeros."""
    x = np.ascontiguousarray(vectors, dtype=np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), np.finfo(np.float32).tiny)


def unit_blocks(vectors: np.ndarray, what: str) -> Iterator[tuple[int, np.ndarray]]:
    """`unit` of so many rows at a time, each block with the number of its first row."""
    starts = range(0, len(vectors), BLOCK)
    for start in tqdm(starts, desc=what, unit="block", disable=len(starts) == 1):
        yield start, unit(vectors[start : start + BLOCK])


# ---------------------------------------------------------------------------------------------------------- database


class RetrievalDatabase:
    """Vectors of patches of pictures, from a folder of `.npz` files as published.

    Each file holds `embedding` (n, d) and, for every vector, `img_id` (n,) and `patch_coords` (n, 4); files follow each
    other in the order of their names. The vectors are in memory once, of the type that they are stored in.

    Args:
        folder: of the files.

    Attributes:
        embedding: (n, d), of any length.
        img_id, patch_coords: what is known of each vector; None where a file lacks it or holds it as a pickle.

    Raises:
        FileNotFoundError: no folder, or no `.npz` file in it.
        ValueError: a file that is damaged, or whose vectors are of another width than the first one's; or no vectors at all.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = existing_folder(
            folder, "put a published database there, or make one: scripts/train_searcher.py --images FOLDER"
        )
        files = sorted(self.folder.glob("*.npz"))
        if not files:
            raise FileNotFoundError(f"{self.folder} is no retrieval database: no .npz file lies in it")
        headers = [_vectors_header(path) for path in files]
        width = headers[0][0][1]
        if wrong := [p for p, (shape, _) in zip(files, headers, strict=True) if shape[1] != width]:
            raise ValueError(f"{wrong[0]} has vectors of another width than {width}, that of {files[0]}")
        count = sum(shape[0] for shape, _ in headers)
        if not count:
            raise ValueError(f"{self.folder} holds no vectors: its files are empty")
        kind = np.result_type(*(dtype for _, dtype in headers))
        # allocated once: the parts beside their concatenation would be twice the memory
        self.embedding = np.empty((count, width), dtype=kind)
        rows: dict[str, list[np.ndarray | None]] = {"img_id": [], "patch_coords": []}
        start = 0
        for path in tqdm(files, desc=f"Reading {self.folder.name}", unit="file", disable=len(files) == 1):
            vectors, *others = _read(path, *rows)
            self.embedding[start : start + len(vectors)] = vectors
            start += len(vectors)
            for values, found in zip(rows.values(), others, strict=True):
                values.append(found)
        self.img_id, self.patch_coords = (_joined(values) for values in rows.values())

    def __len__(self) -> int:
        return len(self.embedding)


def _array_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of an array in numpy's format."""
    shape, _, dtype = HEADERS[np.lib.format.read_magic(file)](file)
    return shape, dtype


def _vectors_header(path: Path) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of a file's vectors, without reading them."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("embedding.npy") as file:
            shape, dtype = _array_header(file)
    except DAMAGED as error:
        raise ValueError(
            f"{path} cannot be read as part of a retrieval database, an .npz file with 'embedding' (n, d): {error}"
        ) from error
    if len(shape) != 2 or not np.issubdtype(dtype, np.floating):
        raise ValueError(f"embedding in {path} must be floating-point numbers (n, d), not {shape} of {dtype}")
    return shape, dtype


def _read(path: Path, *names: str) -> list[Any]:
    """A file's vectors, and its other arrays by name."""
    try:
        with np.load(path) as part:
            arrays = [part["embedding"], *(_plain(part, name) for name in names)]
    except DAMAGED as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    for name, values in zip(names, arrays[1:], strict=True):
        if values is not None and len(values) != len(arrays[0]):
            raise ValueError(f"{path} has {len(arrays[0])} vectors, but {len(values)} rows of {name}")
    if not np.isfinite(arrays[0]).all():
        raise ValueError(f"{path} holds vectors that are infinite or undefined")
    return arrays


def _plain(part: Any, name: str) -> np.ndarray | None:
    """An array of an open file, unless it is absent or a pickle, which would run code."""
    if name not in part.files:
        return None
    with part.zip.open(f"{name}.npy") as file:
        is_pickle = _array_header(file)[1].hasobject
    return None if is_pickle else part[name]


def _joined(parts: list[np.ndarray | None]) -> np.ndarray | None:
    known = [p for p in parts if p is not None]
    return np.concatenate(known) if len(known) == len(parts) else None


# ---------------------------------------------------------------------------------------------------------- searching


class Searcher:
    """The nearest of many vectors by cosine, through faiss.

    Build one with `Searcher.build(vectors)`, keep it with `save`, get it back with `Searcher.load`.

    Args:
        index: of faiss, over vectors of length one, by inner product.
    """

    def __init__(self, index: Any) -> None:
        self.index = index

    def __len__(self) -> int:
        return int(self.index.ntotal)

    @property
    def width(self) -> int:
        """Of the vectors."""
        return int(self.index.d)

    @property
    def is_exact(self) -> bool:
        """Whether every vector is looked at."""
        return not hasattr(self.index, "nlist")

    @classmethod
    def build(cls, vectors: np.ndarray) -> Searcher:
        """A searcher through vectors (n, d): exact below 100 000 of them, in √n lists above.

        Of the lists a twentieth is searched, and a tenth of the vectors places their centres, as published. In lists,
        vectors are stored in half precision: cosines are right to three digits, and memory is half as much.
        """
        faiss = import_faiss()
        n, width = vectors.shape
        if n < EXACT_BELOW:
            index = faiss.IndexFlatIP(width)
        else:
            lists = math.isqrt(n)
            index = faiss.IndexIVFScalarQuantizer(
                faiss.IndexFlatIP(width), width, lists, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
            )  # fmt: skip
            index.nprobe = max(lists // 20, 1)
            count = min(max(n // 10, CENTRE_SHARE * lists), n)
            chosen = np.sort(np.random.default_rng(0).choice(n, count, replace=False))
            index.train(unit(vectors[chosen]))
        for _, block in unit_blocks(vectors, "Indexing"):
            index.add(block)
        return cls(index)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Row numbers of the k nearest vectors (b, k), nearest first, and their cosines (b, k).

        Args:
            queries: (b, d), of any length.
            k: from 1 to the number of vectors.

        Raises:
            ValueError: another k, or queries of another width.
        """
        if queries.ndim != 2 or queries.shape[1] != self.width:
            raise ValueError(
                f"queries are {queries.shape}; this searcher holds vectors of {self.width} numbers, made by another model"
            )
        if not 1 <= k <= len(self):
            raise ValueError(f"there are {len(self)} vectors; {k} neighbours cannot be found, choose 1 to {len(self)}")  # fmt: skip
        cosines, rows = self.index.search(unit(queries), k)
        if (rows < 0).any():  # the lists searched held fewer
            params = import_faiss().SearchParametersIVF(nprobe=self.index.nlist)
            cosines, rows = self.index.search(unit(queries), k, params=params)
        return rows, cosines

    def save(self, folder: str | Path) -> Path:
        """Write the searcher into a folder, whole or not at all; returns the file."""
        path = Path(folder) / SEARCHER_FILE
        with atomic_path(path) as temporary:
            import_faiss().write_index(self.index, str(temporary))
        return path

    @classmethod
    def load(cls, folder: str | Path) -> Searcher:
        """The searcher saved in a folder.

        Raises:
            FileNotFoundError: there is none (one made by ScaNN is none).
            ValueError: the file is damaged.
        """
        path = Path(folder) / SEARCHER_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"there is no searcher {path}; make one: scripts/train_searcher.py -d DATABASE -t {folder}"
            )
        try:
            return cls(import_faiss().read_index(str(path)))
        except RuntimeError as error:
            raise ValueError(f"{path} cannot be read as a searcher; make it anew: {error}") from error


def recall(searcher: Searcher, vectors: np.ndarray, k: int, queries: int = 100) -> float:
    """The share of the true k nearest that a searcher finds, over evenly spread vectors as queries."""
    asked = unit(vectors[np.linspace(0, len(vectors) - 1, queries).astype(int)])
    best = np.full((queries, k), -np.inf, dtype=np.float32)
    rows = np.full((queries, k), -1)
    for start, block in unit_blocks(vectors, "Comparing with an exact search"):
        cosines = np.concatenate([best, asked @ block.T], axis=1)
        numbers = np.concatenate(
            [rows, np.broadcast_to(np.arange(start, start + len(block)), (queries, len(block)))], axis=1
        )
        top = np.argpartition(-cosines, k - 1, axis=1)[:, :k]
        best, rows = (np.take_along_axis(a, top, axis=1) for a in (cosines, numbers))
    found, _ = searcher.search(asked, k)
    return float(
        np.mean([len(set(a) & set(b)) / k for a, b in zip(found.tolist(), rows.tolist(), strict=True)])
    )


# ---------------------------------------------------------------------------------------------------------- retrieval


@dataclass
class Neighbours:
    """What lies nearest to b queries.

    Args:
        embedding: (b, k, d), of length one, nearest first.
        cosine: (b, k).
        rows: (b, k), where they are in the database.
        img_id, patch_coords: of each, (b, k, …), where the database says so.
    """

    embedding: Tensor
    cosine: np.ndarray
    rows: np.ndarray
    img_id: np.ndarray | None
    patch_coords: np.ndarray | None


class Retriever:
    """A database and the searcher that was made of it.

    ```python
    found = open_retriever("artbench-surrealism").neighbours(queries, k=10)  # (b, 768) → found.embedding (b, 10, 768)
    ```

    Args:
        database: the vectors.
        searcher: through them; one is built if None.

    Raises:
        ValueError: the searcher was made of another database.
    """

    def __init__(self, database: RetrievalDatabase, searcher: Searcher | None = None) -> None:
        self.database = database
        self.searcher = searcher or Searcher.build(database.embedding)
        if searcher is not None:
            self._check()

    def _check(self) -> None:
        n, width = self.database.embedding.shape
        if (len(self.searcher), self.searcher.width) == (n, width):
            asked = unit(self.database.embedding[[0, n // 2, n - 1]])
            nearest = self.searcher.search(asked, 1)[1][:, 0]
            if (nearest >= 0.99 * np.linalg.norm(asked, axis=1)).all():  # each finds itself
                return
        raise ValueError(
            f"the searcher was made of {len(self.searcher)} other vectors of {self.searcher.width} numbers than the {n} of "
            f"{width} in {self.database.folder}; make it anew: scripts/train_searcher.py -d {self.database.folder}"
        )

    def neighbours(self, queries: Tensor, k: int) -> Neighbours:
        """The k nearest of each query (b, d), on the queries' device.

        Raises:
            ValueError: fewer than k vectors, or queries of another width.
        """
        rows, cosines = self.searcher.search(queries.detach().float().cpu().numpy(), k)
        database = self.database
        found = torch.from_numpy(unit(database.embedding[rows])).to(queries)
        ids, boxes = (None if a is None else a[rows] for a in (database.img_id, database.patch_coords))
        return Neighbours(found, cosines, rows, ids, boxes)


def open_retriever(name: str | Path, searcher: str | Path | None = None) -> Retriever:
    """A database with its searcher, from where the published scripts keep them.

    Args:
        name: a folder, or the name of one below data/rdm/retrieval_databases.
        searcher: folder of the searcher; data/rdm/searchers/NAME if None, and where nothing lies there one is built, which is
            kept there if the database is large.

    Raises:
        FileNotFoundError, ValueError: see `RetrievalDatabase`, `Searcher.load` and `Retriever`.
    """
    folder = Path(name) if Path(name).is_dir() else DATABASES / name
    database = RetrievalDatabase(folder)
    place = SEARCHERS / folder.name if searcher is None else Path(searcher)
    if searcher is not None or (place / SEARCHER_FILE).is_file():
        return Retriever(database, Searcher.load(place))
    logger.info("No searcher lies in %s: one through %d vectors is built.", place, len(database))
    retriever = Retriever(database)
    if not retriever.searcher.is_exact:
        retriever.searcher.save(place)
    return retriever
