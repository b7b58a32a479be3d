"""sgm.inference.helpers: batches, the watermark of tensors, saving, parts of discretizations."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image

from sgm.inference import helpers
from sgm.inference.helpers import (
    WATERMARK_BITS,
    Img2ImgDiscretizationWrapper,
    Txt2NoisyDiscretizationWrapper,
    embed_watermark,
    get_batch,
    get_input_image_tensor,
    perform_save_locally,
)
from sgm.modules.diffusionmodules.discretizer import EDMDiscretization

VALUES = {
    "prompt": "a cat", "negative_prompt": "ugly", "orig_height": 10, "orig_width": 20, "crop_coords_top": 1, "crop_coords_left": 2,
    "aesthetic_score": 6.0, "negative_aesthetic_score": 2.5, "target_height": 30, "target_width": 40, "other": torch.ones(2, 1),
}  # fmt: skip


def test_a_batch_holds_what_the_conditioner_reads_for_each_sample():
    keys = [
        "txt",
        "original_size_as_tuple",
        "crop_coords_top_left",
        "aesthetic_score",
        "target_size_as_tuple",
        "other",
    ]
    batch, negative = get_batch(keys, VALUES, [2])
    assert batch["txt"] == ["a cat"] * 2 and negative["txt"] == ["ugly"] * 2
    assert batch["original_size_as_tuple"].tolist() == [[10, 20]] * 2
    assert negative["target_size_as_tuple"].tolist() == [[30, 40]] * 2
    assert (batch["aesthetic_score"].tolist(), negative["aesthetic_score"].tolist()) == (
        [[6.0]] * 2,
        [[2.5]] * 2,
    )
    assert torch.equal(batch["other"], negative["other"]) and batch["other"] is not negative["other"]
    assert get_batch(["txt"], VALUES, [2, 3])[0]["txt"] == [["a cat"] * 3] * 2


def test_a_missing_value_is_named():
    with pytest.raises(KeyError, match="aesthetic_score"):
        get_batch(["aesthetic_score"], {"aesthetic": 1.0}, 1)


def test_conditioners_keys_are_listed_once_and_those_of_several_inputs_are_among_them():
    def embedder(key, keys=None):
        return type("E", (), {"input_key": key, "input_keys": keys})()

    conditioner = type("C", (), {"embedders": [embedder("txt"), embedder("size"), embedder("txt"), embedder(None, ["a", "b"])]})  # fmt: skip
    assert helpers.get_unique_embedder_keys_from_conditioner(conditioner) == ["txt", "size", "a", "b"]


def test_images_carry_the_watermark_in_files_and_nothing_is_overwritten(tmp_path):
    from scripts.demo.detect import GetWatermarkMatch

    patches = 0.3 + 0.4 * torch.rand(2, 3, 33, 40).repeat_interleave(8, 2).repeat_interleave(8, 3)
    patches = patches + 0.05 * torch.randn_like(patches)
    assert embed_watermark(patches[None]).shape == (1, 2, 3, 264, 320)
    first, again = (
        perform_save_locally(tmp_path / "samples", patches),
        perform_save_locally(tmp_path / "samples", patches[:1]),
    )
    assert [p.name for p in first + again] == ["000000000.png", "000000001.png", "000000002.png"]
    read = np.stack([np.asarray(Image.open(p))[..., ::-1] for p in first])
    assert (GetWatermarkMatch(WATERMARK_BITS)(read) > 35).all()  # almost certainly watermarked


def test_small_images_get_no_watermark_and_that_is_said_once(caplog):
    small = torch.rand(1, 3, 8, 16)
    helpers._say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert embed_watermark(small) is small and embed_watermark(small) is small
    assert [r.message for r in caplog.records] == [
        "images of 16x8 pixels are too small for a watermark: they get none"
    ]


def test_pictures_shrink_to_multiples_of_64_and_smaller_ones_are_refused():
    assert get_input_image_tensor(Image.new("L", (200, 130), 255)).shape == (1, 3, 128, 192)
    assert get_input_image_tensor(Image.new("RGB", (64, 64), (255, 0, 0)))[0, :, 5, 5].tolist() == [
        1.0,
        -1.0,
        -1.0,
    ]
    with pytest.raises(ValueError, match="63x200 pixels is too small"):
        get_input_image_tensor(Image.new("RGB", (63, 200)))


def test_both_parts_of_a_discretization_together_are_the_whole_of_it():
    """The refiner begins at the level where the base model stops."""
    whole = EDMDiscretization()(20)
    first = Txt2NoisyDiscretizationWrapper(EDMDiscretization(), 0.3, original_steps=20)(20)
    last = Img2ImgDiscretizationWrapper(EDMDiscretization(), 0.3)(20)
    assert torch.equal(torch.cat([first, last[1:]]), whole) and first[-1] == last[0]
    assert len(Img2ImgDiscretizationWrapper(EDMDiscretization(), 0.0)(20)) == 1
    for wrapper in (Txt2NoisyDiscretizationWrapper, Img2ImgDiscretizationWrapper):
        with pytest.raises(ValueError, match="must lie between 0"):
            wrapper(EDMDiscretization(), 1.5)
