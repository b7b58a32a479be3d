"""scripts/depth2img.py, end to end with a tiny model."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from ldm import inference_conditioned, inference_images
from ldm.inference import InferenceError

BASE = [
    "--init-img",
    "init.png",
    "--prompt",
    "red heart",
    "--steps",
    "3",
    "--device",
    "cpu",
    "--outdir",
    "out",
]


def test_pictures_their_depth_and_a_grid_of_the_pictures_own_size(script, run_folder, picture):
    argv = ["--ckpt", str(run_folder("depth")), "--n_samples", "2", *BASE]
    assert script("depth2img").main(argv) == 0
    assert script("depth2img").main([*argv, "--skip_grid"]) == 0
    files = sorted(str(p) for p in Path("out").rglob("*.png"))
    numbers = [f"out/samples/{i:05}.png" for i in range(4)]
    assert files == ["out/depth-0000.png", "out/depth-0001.png", "out/grid-0000.png", *numbers]
    one = Image.open(numbers[1])
    assert one.size == Image.open("out/depth-0000.png").size == (18, 11)
    said = {k: one.text[k] for k in ("prompt", "strength", "scale", "steps", "sampler", "seed", "init_img")}
    assert said == {
        "prompt": "red heart", "strength": "0.9", "scale": "9.0", "steps": "3", "sampler": "ddim", "seed": "42", "init_img": "init.png",
    }  # fmt: skip
    assert one.tobytes() == Image.open(numbers[3]).tobytes()  # the seed decides


def test_full_strength_forgets_the_picture_and_none_gives_it_back(build, picture):
    model = build("depth")
    # a picture of another colour has the same depth: the estimator sees their difference from the mean alone
    model.depth_model.weight.data.zero_()
    other = Image.new("RGB", picture.size, (200, 30, 90))

    def draw(image, strength):
        torch.manual_seed(5)
        _, made = inference_conditioned.keep_depth(
            model, image, "a", steps=4, strength=strength, scale=2.0, verbose=False
        )
        return made

    assert torch.equal(draw(picture, 1.0), draw(other, 1.0))
    assert not torch.allclose(draw(picture, 0.5), draw(other, 0.5), atol=1e-3)
    torch.manual_seed(5)
    pixels = inference_images.padded_to_step(inference_images.to_pixels(picture), 4, least=8)
    kept = (model.decode_first_stage(inference_images.latents_of(model, pixels)) + 1) / 2
    assert torch.allclose(draw(picture, 0.0), kept.clamp(0, 1)[..., :11, :18], atol=1e-5)


def test_small_pictures_are_padded_by_their_edges_to_two_steps_at_least():
    wide = inference_images.padded_to_step(torch.arange(6.0).reshape(1, 1, 2, 3), 4, least=8)
    assert wide.shape == (1, 1, 8, 8)
    assert (wide[..., 1, 2:] == 5).all() and (wide[..., 1:, 0] == 3).all()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--init-img", "absent.png"], "--init-img absent.png: there is no such file"),
        (["--init-img", ""], "name the picture to begin with"),
        (["--ckpt", ""], "name the model: --ckpt FILE"),
        (["--ckpt", "nowhere"], "there is no folder or file 'nowhere'"),
        (["--strength", "1.5"], "strength 1.5 must lie between 0"),
    ],
)
def test_bad_input_is_one_clear_sentence(script, run_folder, picture, capsys, argv, message):
    assert script("depth2img").main(["--ckpt", str(run_folder("depth")), *BASE, *argv]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_a_model_of_another_kind_is_refused_by_name(build, picture):
    with pytest.raises(
        InferenceError, match=r"this is a LatentDiffusion; a model that keeps a picture's depth"
    ):
        inference_conditioned.keep_depth(build("text"), picture, "a")


def test_a_lone_checkpoint_takes_the_published_configuration(script, tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"")
    opt = script("depth2img").get_parser().parse_args(["--ckpt", str(tmp_path / "model.ckpt")])
    script("flags").fill_config(opt, script("depth2img").CONFIG)
    assert opt.config == "configs/stable-diffusion/v2-midas-inference.yaml"


def test_the_depth_of_a_picture_is_estimated_once_for_all_that_are_drawn(build, picture):
    model, seen = build("depth"), []
    model.depth_model.register_forward_hook(lambda module, given, out: seen.append(len(given[0])))
    _, made = inference_conditioned.keep_depth(model, picture, "a", steps=2, batch_size=3, verbose=False)
    assert seen == [1] and len(made) == 3
