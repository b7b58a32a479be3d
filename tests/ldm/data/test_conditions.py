import numpy as np
import pytest
import torch

from ldm.data.conditions import MASKS, MaskedImages, SmallTwins, random_mask


def pictures(n=4, height=32, width=32):
    rng = np.random.default_rng(0)
    return [
        {"image": rng.uniform(-1, 1, (height, width, 3)).astype(np.float32), "caption": str(i)}
        for i in range(n)
    ]


@pytest.mark.parametrize("kind", MASKS)
def test_masks_hide_a_good_part_and_never_everything(kind):
    masks = np.stack([random_mask(48, 64, [kind]) for _ in range(100)])
    assert masks.shape == (100, 48, 64, 1) and masks.dtype == np.float32 and set(np.unique(masks)) == {0, 1}
    shares = masks.mean((1, 2, 3))
    assert shares.min() > 0.02 and shares.max() < 0.9 and 0.1 < shares.mean() < 0.6
    assert masks.mean(0).max() < 1  # no place is always hidden


def test_a_box_is_a_third_to_two_thirds_of_each_side():
    for _ in range(100):
        mask = random_mask(60, 90, ["box"])[..., 0]
        rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
        assert mask.sum() == len(rows) * len(columns)  # one filled rectangle
        assert 19 <= len(rows) <= 41 and 29 <= len(columns) <= 61


def test_an_edge_is_hidden_from_one_of_the_four_sides_on():
    sides = set()
    for _ in range(60):
        mask = random_mask(48, 48, ["edge"])[..., 0] > 0
        whole = {
            "left": mask[:, 0].all(),
            "right": mask[:, -1].all(),
            "top": mask[0].all(),
            "bottom": mask[-1].all(),
        }
        assert sum(whole.values()) == 1
        assert 1 / 3 - 0.02 < mask.mean() < 1 / 2 + 0.02
        sides |= {name for name, full in whole.items() if full}
    assert sides == {"left", "right", "top", "bottom"}


def test_masked_images_are_grey_where_hidden_and_themselves_elsewhere():
    data = MaskedImages(pictures())
    assert len(data) == 4
    for i in range(4):
        item = data[i]
        hidden = item["mask"][..., 0] == 1
        assert (item["masked_image"][hidden] == 0).all() and hidden.any()
        assert (item["masked_image"][~hidden] == item["image"][~hidden]).all()
        assert item["masked_image"].dtype == np.float32 and item["caption"] == str(i)


def test_a_seed_fixes_each_items_mask_and_no_seed_draws_anew():
    fixed, again, other = (MaskedImages(pictures(), seed=s) for s in (3, 3, 4))
    torch.manual_seed(1)
    first = [fixed[i]["mask"] for i in range(4)]
    torch.manual_seed(2)
    assert all(np.array_equal(first[i], again[i]["mask"]) for i in (3, 2, 1, 0))
    assert not all(np.array_equal(first[i], other[i]["mask"]) for i in range(4))
    assert not np.array_equal(first[0], first[1])
    drawn = MaskedImages(pictures())
    assert not all(np.array_equal(drawn[0]["mask"], drawn[0]["mask"]) for _ in range(4))


def test_small_twins_are_shrunk_and_keep_the_mean():
    item = SmallTwins(pictures(height=24, width=32), factor=4)[0]
    assert item["LR_image"].shape == (6, 8, 3) and item["LR_image"].dtype == np.float32
    assert abs(item["LR_image"].mean() - item["image"].mean()) < 0.02
    flat = [{"image": np.full((8, 8, 3), 0.2, np.float32)}]

    np.testing.assert_allclose(SmallTwins(flat)[0]["LR_image"], 0.2, atol=1 / 127.5)  # in 8 bits


def test_small_twins_come_back_in_the_images_size_on_request():
    item = SmallTwins(pictures(), factor=2, enlarge="nearest")[0]
    repeated = item["LR_image"].repeat(2, axis=0).repeat(2, axis=1)
    np.testing.assert_array_equal(item["LR_enlarged"], repeated)
    assert "LR_enlarged" not in SmallTwins(pictures(), factor=2)[0]


def test_the_data_set_may_be_a_configuration():
    config = {"target": "taming.data.emoji.EmojiImages", "params": {"size": 32, "split": "validation"}}
    for wrapped, keys in (
        (MaskedImages(config), {"mask", "masked_image"}),
        (SmallTwins(config), {"LR_image"}),
    ):
        assert keys | {"image", "caption", "index"} <= set(wrapped[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MaskedImages(pictures(), kinds=["circle"]), "mask 'circle' is unknown"),
        (lambda: MaskedImages(pictures(), kinds=[]), "kinds is empty; choose from box, edge, stroke"),
        (
            lambda: SmallTwins(pictures(), enlarge="cubic"),
            "enlarge='cubic' is unknown; choose one of .*'bicubic'",
        ),
        (lambda: SmallTwins(pictures(), factor=1), "factor=1 does not shrink"),
        (
            lambda: SmallTwins(pictures(height=30), factor=4)[0],
            "32 × 30 pixels: both sides must be multiples of factor=4",
        ),
    ],
)
def test_bad_options_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_item_without_an_image_names_what_it_has():
    with pytest.raises(KeyError, match="item 0 has no 'jpg'"):
        MaskedImages(pictures(), image_key="jpg")[0]
