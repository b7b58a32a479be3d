import time

import numpy as np
import pytest
import torch

from taming.data.emoji import CATEGORIES, EmojiImages, load_emoji
from taming.data.images import HUES


@pytest.fixture(scope="module")
def emoji():
    return load_emoji(64)


def test_there_are_about_1620_distinct_pictures_without_flags_and_skin_tones(emoji):
    assert 1600 <= len(emoji) <= 1640
    assert (
        len({e.pixels.tobytes() for e in emoji}) >= len(emoji) - 5
    )  # distinct at 72 pixels, nearly so at 64
    assert all(e.pixels.shape == (64, 64, 3) for e in emoji)
    assert not any(set("🏻🏼🏽🏾🏿") & set(e.symbol) for e in emoji)
    assert not any("flag" in e.names[0].split(":")[0].split() and e.category == "Flags" for e in emoji)
    assert {e.category for e in emoji} == set(CATEGORIES)


def test_names_and_pictures_belong_together(emoji):
    by_name = {e.names[0]: e for e in emoji}
    heart = by_name["red heart"]
    assert heart.symbol.startswith("❤") and "heart" in heart.names
    red, green, blue = heart.pixels[32, 32].astype(int)
    assert red > 180 and green < 90 and blue < 100
    assert heart.pixels[0, 0].tolist() == [255, 255, 255]  # composited on white
    # a joined sequence has its own picture, not that of its first symbol
    assert not np.array_equal(by_name["heart on fire"].pixels, heart.pixels)
    families = [e for e in emoji if sum(n.startswith("family") for n in e.names) > 3]
    assert families and len(families) <= 6  # a few pictures stand for all families, and carry all their names


def test_variants_of_a_person_are_one_concept(emoji):
    concepts = {e.names[0]: e.concept for e in emoji}
    assert concepts["woman firefighter"] == concepts["man firefighter"] == concepts["firefighter"]
    assert concepts["man red hair"] == concepts["woman white hair"]
    assert concepts["red heart"] != concepts["blue heart"]


def test_the_splits_share_no_concept_and_together_are_everything(emoji):
    train, validation = EmojiImages(split="train"), EmojiImages(split="validation")
    assert not {e.concept for e in train.emoji} & {e.concept for e in validation.emoji}
    assert len(train) + len(validation) == len(emoji) == len(EmojiImages(split="all"))
    assert 0.05 < len(validation) / len(emoji) < 0.1
    assert "red heart" in {n for e in train.emoji for n in e.names}
    assert {e.code for e in EmojiImages(split="validation", seed=1).emoji} != {
        e.code for e in validation.emoji
    }


def test_items_are_what_the_models_take():
    data = EmojiImages(
        size=32, categories=["Smileys & Emotion"], flip_p=0.5, templates=["{name}", "a {name} emoji"]
    )
    torch.manual_seed(0)
    items = [data[i % 7] for i in range(60)]
    item = items[0]
    assert item["image"].shape == (32, 32, 3) and item["image"].dtype == np.float32
    assert -1 <= item["image"].min() < item["image"].max() == 1
    assert item["human_label"] == "Smileys & Emotion" and item["class_label"] == 0
    captions = {c["caption"] for c in items}
    assert any(c.endswith(" emoji") for c in captions) and any(not c.endswith(" emoji") for c in captions)
    # the index names the exact pixels, so mirrored pictures have their own
    by_index = {}
    for it in items:
        assert np.array_equal(by_index.setdefault(it["index"], it["image"]), it["image"])
    assert max(by_index) >= len(data) > min(by_index)


def test_classes_of_ones_own_are_made_of_categories_and_subcategories():
    groups = {"heart": ["heart"], "food": ["Food & Drink"], "fruit": ["food fruit"]}
    data = EmojiImages(size=32, split="all", classes=groups)
    items = [data[i] for i in range(len(data))]
    assert all(list(groups)[i["class_label"]] == i["human_label"] for i in items)
    assert {e.subcategory for e, i in zip(data.emoji, items, strict=True) if i["human_label"] == "heart"} == {
        "heart"
    }
    # the first class that fits is taken, the rest of the emoji is left out
    assert {i["human_label"] for i in items} == {"heart", "food"}
    assert {e.category for e in data.emoji} == {"Smileys & Emotion", "Food & Drink"}
    assert list(data.classes) == list(groups) and list(
        EmojiImages(size=32, split="validation").classes
    ) == list(CATEGORIES)


def test_validation_captions_do_not_vary():
    data = EmojiImages(size=32, split="validation", templates=["{name}, {subcategory}", "{name}"])
    assert len({data[3]["caption"] for _ in range(10)}) == 1


def test_recoloured_pictures_say_so_and_have_an_index_of_their_own():
    plain = EmojiImages(size=32, split="all")
    data = EmojiImages(size=32, split="all", recolour_p=1.0, flip_p=0.5)
    where = {e.names[0]: i for i, e in enumerate(data.emoji)}
    torch.manual_seed(0)
    cats = [data[where["cat face"]] for _ in range(60)]
    assert {c["caption"].split()[0] for c in cats} == set(HUES)
    by_index = {}
    for cat in cats:
        assert np.array_equal(by_index.setdefault(cat["index"], cat["image"]), cat["image"])
    assert len(by_index) > len(HUES)  # colours, some of them mirrored
    blue = next(c["image"] for c in cats if c["caption"].startswith("blue"))[16, 16]
    original = plain[where["cat face"]]["image"][16, 16]
    assert blue[2] > blue[0] and original[0] > original[2]
    # names of colours and grey pictures stay what they are
    assert data[where["red heart"]]["caption"] in plain.emoji[where["red heart"]].names
    assert data[where["skull"]]["caption"] in plain.emoji[where["skull"]].names


def test_long_epochs_repeat_the_same_pictures():
    once, thrice = (EmojiImages(size=32, split="validation", repeats=n) for n in (1, 3))
    assert len(thrice) == 3 * len(once)
    again = thrice[len(once) + 4]
    assert again["index"] == once[4]["index"] and np.array_equal(again["image"], once[4]["image"])
    with pytest.raises(IndexError, match=f"picture {len(once)} of {len(once)}"):
        once[len(once)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "val"}, "choose one of train, validation, all"),
        ({"categories": ["Smileys"]}, "Did you mean 'Smileys & Emotion'|Known"),
        ({"templates": ["a {nam}"]}, "fields are"),
        (
            {"classes": {"love": ["hearts"]}},
            "class 'love': there is no category or subcategory 'hearts'. Did you mean 'heart'",
        ),
    ],
)
def test_unknown_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        EmojiImages(**options)


def test_a_missing_extra_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "emoji", None)
    with pytest.raises(ImportError, match=r"latent-generative-models\[quickstart\]"):
        load_emoji()


def test_loading_takes_about_a_second():
    start = time.process_time()
    load_emoji(64)
    assert time.process_time() - start < 10  # 0.7 s on an idle core; the bound only catches a change of kind
