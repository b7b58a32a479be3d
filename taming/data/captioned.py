"""A user's own pictures: a folder, or a list with captions."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from taming.data.base import SkipsBroken, existing_folder, read_list
from taming.data.images import EXTENSIONS, BrokenImageError, open_rgb, resize_and_crop, to_float
from taming.util import nearest

IMAGE_COLUMNS = ("image", "file_name", "file", "path", "filename", "image_path")
CAPTION_COLUMNS = ("caption", "text", "prompt", "captions", "title")
LIST_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".txt")


class CaptionedImages(SkipsBroken):
    """Images of any size and format with captions, as `{image, caption, index, file_path_, …}`.

    `image` is (size, size, 3) float32 in [-1, 1]. A caption comes from the list; without a list from a text file of
    the same name (`cat.jpg`, `cat.txt`); failing that it is `default_caption`. Several captions (a JSON list, or the
    lines of the text file) are drawn from at random. With `classes_from_folders` the items also carry `class_label`
    and `human_label`.

    A file that is damaged or missing is logged and counted in `broken`, and the next good one takes its place, so
    that one bad file does not end a week of training.

    Args:
        root: folder of the pictures, searched through; with a list, what its paths are relative to (its own folder if None).
        captions: `.csv`, `.tsv`, `.json`, `.jsonl` or `.parquet` with a column of paths and one of captions, or a
            `.txt` with a path a line; None takes every picture below `root`.
        size: of the square pictures.
        random_crop: cut at random along the longer side instead of from the middle.
        flip_p: probability of a mirrored picture.
        interpolation: of the resizing.
        image_column, caption_column: of the list; if None, the first of the usual names that it has.
        default_caption: where there is none.
        classes_from_folders: label by the first folder below `root`.
        on_error: "skip" or "raise".
        check: open every file at the start, with a progress bar, and leave out the broken ones.
        image_key, caption_key: names of these two entries of an item.

    Raises:
        FileNotFoundError: the folder or list does not exist, or holds no picture.
        ValueError: an unknown option, or a list without the columns.
    """

    def __init__(
        self,
        root: str | None = None,
        captions: str | None = None,
        size: int = 256,
        random_crop: bool = False,
        flip_p: float = 0.0,
        interpolation: str = "lanczos",
        image_column: str | None = None,
        caption_column: str | None = None,
        default_caption: str = "",
        classes_from_folders: bool = False,
        on_error: str = "skip",
        check: bool = False,
        image_key: str = "image",
        caption_key: str = "caption",
    ) -> None:
        super().__init__(on_error)
        if root is None and captions is None:
            raise ValueError("name a folder of pictures (root), a list of them (captions), or both")
        self.root = Path(root) if root is not None else Path(str(captions)).parent
        existing_folder(self.root, "name the folder of the pictures (root)")
        self.size, self.random_crop, self.flip_p, self.interpolation = (
            size,
            random_crop,
            flip_p,
            interpolation,
        )
        self.default_caption = default_caption
        self.image_key, self.caption_key = image_key, caption_key
        if captions is None:
            self.items = [
                (p, None)
                for p in sorted(self.root.rglob("*"))
                if p.suffix.lower() in EXTENSIONS and p.is_file()
            ]
        else:
            self.items = [
                (self.root / path, text)
                for path, text in _read_list(Path(captions), image_column, caption_column)
            ]
        if not self.items:
            raise FileNotFoundError(f"{captions or self.root} holds no pictures ({', '.join(EXTENSIONS)})")
        folders = (
            sorted({p.relative_to(self.root).parts[0] for p, _ in self.items}) if classes_from_folders else []
        )
        self.classes = {name: i for i, name in enumerate(folders)}
        if check:
            self._check()

    def _check(self) -> None:
        good = []
        for path, text in tqdm(self.items, desc="checking pictures", unit="file"):
            try:
                open_rgb(path)
                good.append((path, text))
            except (BrokenImageError, FileNotFoundError) as error:
                self.note_broken(error)
        self.items = good
        if not good:
            raise FileNotFoundError(
                f"all {len(self.broken)} pictures below {self.root} are broken or missing; the first: {next(iter(self.broken.values()))}"
            )

    def __len__(self) -> int:
        return len(self.items)

    def load(self, index: int) -> dict[str, Any]:
        """Picture, caption and labels of one file."""
        path, text = self.items[index]
        return self._example(index, path, text, open_rgb(path))

    def _example(self, index: int, path: Path, text: Any, image: Any) -> dict[str, Any]:
        pixels = to_float(resize_and_crop(image, self.size, self.interpolation, self.random_crop))
        flipped = self.flip_p > 0 and float(torch.rand(())) < self.flip_p
        example = {
            self.image_key: pixels[:, ::-1].copy() if flipped else pixels,
            self.caption_key: self._caption(path, text),
            "file_path_": str(path),
        }
        if not self.random_crop:
            example["index"] = (
                index + len(self) * flipped
            )  # names the exact pixels, so that latents can be cached
        if self.classes:
            folder = path.relative_to(self.root).parts[0]
            example |= {"class_label": self.classes[folder], "human_label": folder}
        return example

    def _caption(self, path: Path, text: Any) -> str:
        if text is None:
            beside = path.with_suffix(".txt")
            text = (
                [line for line in beside.read_text(encoding="utf-8").splitlines() if line.strip()]
                if beside.is_file()
                else None
            )
        if isinstance(text, Sequence) and not isinstance(text, str):
            text = text[int(torch.randint(len(text), ()))] if len(text) else None
        return str(text).strip() if text is not None else self.default_caption


def _read_list(path: Path, image_column: str | None, caption_column: str | None) -> list[tuple[str, Any]]:
    """Paths and captions (None where the list has none)."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no list {path}")
    if path.suffix == ".txt":
        return [(line, None) for line in read_list(path)]
    rows = _read_rows(path)
    if not rows:
        return []
    columns = list(rows[0])
    image = str(_column(path, columns, image_column, IMAGE_COLUMNS, "image_column"))
    caption = _column(
        path, columns, caption_column, CAPTION_COLUMNS, "caption_column", optional=caption_column is None
    )
    return [(str(row[image]), row.get(caption) if caption else None) for row in rows]


def _read_rows(path: Path) -> list[Mapping[str, Any]]:
    try:
        if path.suffix in (".csv", ".tsv"):
            with open(path, newline="", encoding="utf-8-sig") as file:
                return list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
        if path.suffix in (".jsonl", ".ndjson"):
            with open(path, encoding="utf-8") as file:
                return [json.loads(line) for line in file if line.strip()]
        if path.suffix == ".json":
            loaded = json.loads(path.read_text(encoding="utf-8"))
            return (
                [{"image": k, "caption": v} for k, v in loaded.items()]
                if isinstance(loaded, dict)
                else list(loaded)
            )
    except (json.JSONDecodeError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as {path.suffix[1:]}: {error}") from error
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise ImportError(
                "parquet lists need pyarrow: python -m pip install 'latent-generative-models[parquet]'"
            ) from error
        return pyarrow.parquet.read_table(path).to_pylist()
    raise ValueError(f"{path}: lists may end in {', '.join(LIST_SUFFIXES)}")


def _column(
    path: Path,
    columns: list[str],
    wanted: str | None,
    usual: Sequence[str],
    option: str,
    optional: bool = False,
) -> str | None:
    if wanted is not None:
        if wanted not in columns:
            raise ValueError(f"{path} has no column {wanted!r} ({option}). {nearest(wanted, columns)}")
        return wanted
    found = next((name for name in usual if name in columns), None)
    if found is None and not optional:
        raise ValueError(
            f"{path} has the columns {', '.join(columns)}; which one holds the paths? Say it with {option}."
        )
    return found
