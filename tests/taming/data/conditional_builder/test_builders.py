import random

import pytest
import torch

from taming.data.conditional_builder import utils
from taming.data.conditional_builder.objects_bbox import ObjectsBoundingBoxConditionalBuilder
from taming.data.conditional_builder.objects_center_points import ObjectsCenterPointsConditionalBuilder
from taming.data.helper_types import Annotation

BUILDERS = [ObjectsCenterPointsConditionalBuilder, ObjectsBoundingBoxConditionalBuilder]


def note(box, category=0, **flags):
    return Annotation(area=0.1, image_id="a", bbox=box, category_no=category, category_id="x", **flags)


def builder(
    kind=ObjectsBoundingBoxConditionalBuilder,
    classes=5,
    objects=4,
    tokens=100,
    crop=False,
    group=True,
    extra=True,
):
    return kind(classes, objects, tokens, crop, group, extra)


@pytest.mark.parametrize(("kind", "each"), [(BUILDERS[0], 2), (BUILDERS[1], 3)])
def test_lengths_and_the_token_for_nothing(kind, each):
    whole, cropped = builder(kind), builder(kind, crop=True)
    assert (whole.none, whole.no_sections, whole.object_descriptor_length) == (99, 10, each)
    assert whole.embedding_dim == 4 * each and cropped.embedding_dim == 4 * each + 2


def test_points_are_the_nearest_of_the_grid_with_halves_to_even():
    b = builder()
    assert b.tokenize_coordinates(0.5, 0.5) == 44 and b.tokenize_coordinates(1, 0) == 9
    assert b.coordinates_from_token(57) == pytest.approx((7 / 9, 5 / 9))
    assert b.token_pair_from_bbox((0.2, 0.3, 0.5, 0.1)) == (32, 46)
    assert b.bbox_from_token_pair(3, 78) == pytest.approx((3 / 9, 0, 5 / 9, 7 / 9))
    for token in range(100):
        assert b.tokenize_coordinates(*b.coordinates_from_token(token)) == token


def test_flags_count_only_when_true_and_when_wanted():
    flagged = note((0, 0, 1, 1), 2, is_group_of=True, is_occluded=True, is_depiction=True, is_inside=True)
    crowd = note((0, 0, 1, 1), 2, is_group_of=1, is_occluded=1)  # COCO's number
    answers = [
        builder(group=g, extra=e).object_representation(flagged) for g in (False, True) for e in (False, True)
    ]
    assert answers == [2, 2 + 5 * 14, 2 + 5 * 1, 2 + 5 * 15]
    assert builder().object_representation(crowd) == 2
    back = builder().representation_to_annotation(2 + 5 * 9)
    assert (back.category_no, back.is_group_of, back.is_occluded, back.is_depiction, back.is_inside) == (
        2,
        True,
        False,
        False,
        True,
    )


def test_the_recorded_sequences_of_boxes():
    notes = [
        note((0.1, 0.2, 0.3, 0.4), 3, is_group_of=True),
        note((0.6, 0.5, 0.4, 0.5), 1, is_occluded=True, is_inside=True),
        note((0.0, 0.0, 0.05, 0.05), 0, is_depiction=False),
    ]
    expected = {
        (False, None): [51, 45, 99, 0, 0, 0, 8, 21, 54, 99, 99, 99],
        (False, (0.2, 0.1, 0.5, 0.6)): [51, 67, 99, 8, 20, 85, 99, 99, 99, 99, 99, 99],
        (True, (0.2, 0.1, 0.5, 0.6)): [51, 45, 99, 8, 21, 54, 99, 99, 99, 99, 99, 99, 12, 66],
    }
    for (crop, window), tokens in expected.items():
        random.seed(3)
        assert builder(crop=crop).build(list(notes), window).tolist() == tokens
    random.seed(3)
    flipped = builder(crop=True).build(list(notes), (0.0, 0.25, 1.0, 0.75), horizontal_flip=True)
    assert (
        flipped.tolist() == [51, 40, 94, 8, 25, 58, 99, 99, 99, 99, 99, 99, 20, 99]
        and flipped.dtype == torch.int64
    )


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("flip", [False, True])
def test_sequences_lead_back_to_objects_and_crop_within_half_a_grid_step(kind, flip):
    b = builder(kind, classes=9, tokens=4096, crop=True)
    notes = [note((0.1 * i, 0.2, 0.15, 0.1 * i + 0.1), i, is_group_of=i % 2 == 0) for i in range(4)]
    crop = (0.05, 0.1, 0.9, 0.85)
    found, window = b.inverse_build(b.build(list(notes), crop, flip))
    mirror = utils.horizontally_flip_bbox if flip else lambda box: box
    assert window == pytest.approx(mirror(crop), abs=2 / 126)
    expected = {b.object_representation(n): mirror(n.bbox) for n in notes}
    for what, where in found:
        x, y, w, h = expected.pop(what)
        assert where == pytest.approx(
            (x, y, w, h) if len(where) == 4 else (x + w / 2, y + h / 2), abs=2 / 126
        )
    assert not expected


def test_the_callers_list_is_shuffled_and_too_many_or_none_are_warned_of():
    notes = [note((0.1, 0.1, 0.2, 0.2), i % 5) for i in range(4)]
    given = list(notes)
    random.seed(0)
    builder().build(given)
    assert given != notes and sorted(given) == sorted(notes)
    with pytest.warns(UserWarning, match="Received 4 annotations; keeping the first 3"):
        tokens = builder(objects=3).build(list(notes))
    assert {t for t in tokens[::3].tolist()} == {0, 1, 2}
    with pytest.warns(UserWarning, match="Did not receive any"):
        assert builder().build([]).tolist() == [99] * 12


def test_a_vocabulary_too_small_is_named():
    with pytest.raises(ValueError, match="vocabulary is 0 to 99; raise no_tokens"):
        builder(classes=50).build([note((0, 0, 1, 1), 40, is_occluded=True)])
    with pytest.raises(ValueError, match="no_tokens=3 gives no grid"):
        builder(tokens=3)


@pytest.mark.parametrize("kind", BUILDERS)
def test_plots_show_objects_and_crop_with_any_font(kind, monkeypatch):
    monkeypatch.setattr(utils, "PLOT_FONT", "/nowhere.ttf")
    b = builder(kind, crop=True)
    tokens = b.build([note((0.25, 0.25, 0.5, 0.5), 1)], (0.0, 0.0, 1.0, 1.0))
    picture = b.plot(tokens, lambda number: f"class {number}", (64, 96))
    assert picture.shape == (3, 64, 96) and picture.min() >= -1 and picture.max() == 1
    pixels = ((picture + 1) * 127.5).round().int()

    def shows(color):
        return bool((pixels == torch.tensor(color)[:, None, None]).all(0).any())

    assert shows(utils.COLOR_PALETTE[1]) and shows(utils.GRAY_75)
    assert bool((pixels < 50).all(0).any())  # letters, which are smoothed
    empty = b.plot(torch.full_like(tokens, b.none), str, (64, 96))
    assert not (
        (((empty + 1) * 127.5).round().int() == torch.tensor(utils.COLOR_PALETTE[1])[:, None, None]).all(0)
    ).any()


def test_boxes_overlap_mirror_and_rescale():
    assert utils.intersection_area((0, 0, 0.5, 0.5), (0.25, 0.3, 1, 1)) == pytest.approx(0.05)
    assert utils.intersection_area((0, 0, 0.1, 0.1), (0.5, 0.5, 0.1, 0.1)) == 0
    assert utils.absolute_bbox((0.1, 0.2, 0.33, 0.5), 100, 50) == (10, 10, 43, 35)
    notes = [note((0.1, 0.2, 0.3, 0.4)), note((0.7, 0.7, 0.3, 0.3))]
    plain, mirrored = (
        [n.bbox for n in utils.rescale_annotations(notes, (0.2, 0.0, 0.6, 0.8), flip)]
        for flip in (False, True)
    )
    assert plain[0] == pytest.approx((0, 0.25, 0.5, 0.5)) and mirrored[0] == pytest.approx(
        (0.5, 0.25, 0.5, 0.5)
    )
    assert plain[1] == pytest.approx((5 / 6, 0.875, 1 / 6, 0.125)) and mirrored[1] == pytest.approx(
        (0, 0.875, 1 / 6, 0.125)
    )
    assert utils.filter_annotations(notes, (0, 0, 0.6, 0.6)) == notes[:1]


def test_labels_and_sizes_for_plots():
    flagged = note((0, 0, 1, 1), is_group_of=True, is_depiction=True)
    assert utils.additional_parameters_string(flagged) == "(g,d)"
    assert utils.additional_parameters_string(flagged, short=False) == "(group,depiction)"
    assert utils.additional_parameters_string(note((0, 0, 1, 1))) == ""
    assert [utils.get_plot_font_size(None, s) for s in ((64, 64), (256, 64), (100, 512))] == [10, 12, 15]
    assert [utils.get_circle_size(s) for s in ((64, 64), (256, 64), (100, 512))] == [2, 3, 4]
    assert utils.get_plot_font_size(7, (9, 9)) == 7
    assert utils.pad_list([1], 9, 3) == [1, 9, 9] and utils.pad_list([1, 2], 9, 1) == [1, 2]
    with pytest.raises(ValueError, match="no module"):
        utils.load_object_from_string("taming.nowhere.thing")
