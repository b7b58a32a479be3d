"""scripts/inpaint.py, end to end with tiny models of each kind that can fill pictures in."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from ldm import inference_images
from taming.util import instantiate_from_config

ROOT = Path(__file__).resolve().parents[2]
PLAIN = {"use_spatial_transformer": False, "context_dim": None}


@pytest.fixture(scope="module")
def inpaint():
    sys.path.insert(0, str(ROOT))
    return importlib.import_module("scripts.inpaint")


@pytest.fixture
def kinds(tiny):
    """Configurations: an inpainting model with and without text, the published kind, and two that know nothing of masks."""

    def config(target=None, **params):
        made = tiny.latent_diffusion(first_stage_config=tiny.kl, **params)
        return {**made, "target": target} if target else made

    joined = "ldm.models.diffusion.ddpm.LatentInpaintDiffusion"
    text = {"cond_stage_config": tiny.text, "cond_stage_key": "caption"}
    return {
        "text inpainting": config(joined, finetune_keys=None, conditioning_key="hybrid", unet={"in_channels": 7}, **text),
        "inpainting": config(
            joined, finetune_keys=None, conditioning_key="concat", cond_stage_config="__is_unconditional__", force_null_conditioning=True,
            unet={"in_channels": 7, **PLAIN},
        ),
        "published": config(
            conditioning_key=None, concat_mode=True, cond_stage_key="masked_image", cond_stage_config="__is_first_stage__",
            unet={"in_channels": 7, **PLAIN},
        ),
        "text": config(cond_stage_trainable=True, **text),
        "unconditional": config(conditioning_key=None, cond_stage_config="__is_unconditional__", unet=PLAIN),
    }  # fmt: skip


def build(config):
    model = instantiate_from_config(OmegaConf.create(config)).eval()
    torch.nn.init.normal_(model.model.diffusion_model.out[2].weight, std=0.1)
    return model


def save(config, folder, name="model.ckpt"):
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.create({"model": config}), folder / "config.yaml")
    torch.save({"state_dict": build(config).state_dict(), "global_step": 1}, folder / name)
    return str(folder)


@pytest.fixture(autouse=True)
def pairs(tmp_path, monkeypatch):
    """A picture of odd size with a mask of one corner, and a picture without a mask."""
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    pixels = np.random.RandomState(0).randint(0, 256, (17, 22, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("in/one.png")
    Image.fromarray(pixels).save("in/no.png")
    mask = np.zeros((17, 22), dtype=np.uint8)
    mask[:8, :8] = 255
    mask[8:, 8:] = 127  # less than half is not hidden
    Image.fromarray(mask).save("in/one_mask.png")
    return pixels, mask > 127


BASE = ["--indir", "in", "--outdir", "out", "--steps", "2", "--device", "cpu"]


@pytest.mark.parametrize("kind", ["text inpainting", "inpainting", "published", "text", "unconditional"])
def test_what_is_hidden_is_drawn_and_the_rest_stays(inpaint, kinds, kind, tmp_path, pairs):
    ckpt = save(kinds[kind], tmp_path / "model")
    prompt = ["--prompt", "red heart"] if "text" in kind else []
    assert inpaint.main(["--ckpt", ckpt, *BASE, *prompt]) == 0
    assert [str(p) for p in Path("out").iterdir()] == ["out/one.png"]
    made, (before, hidden) = Image.open("out/one.png"), pairs
    after = np.asarray(made)
    assert after.shape == before.shape and np.abs(after[~hidden].astype(int) - before[~hidden]).max() <= 1
    assert np.abs(after[hidden].astype(int) - before[hidden]).mean() > 20
    assert made.text["picture"] == "one.png" and made.text["sampler"] == "ddim" and made.text["seed"] == "42"
    assert (
        made.text["scale"] == ("10.0" if prompt else "1.0")
        and made.text.get("prompt") == (prompt or [None])[-1]
    )


@pytest.mark.parametrize("sampler", ["plms", "dpm", "unipc"])
def test_other_samplers_fill_in_too(inpaint, kinds, sampler, tmp_path, pairs):
    ckpt = save(kinds["unconditional"], tmp_path / "model")
    assert inpaint.main(["--ckpt", ckpt, *BASE, "--sampler", sampler, "--steps", "4"]) == 0
    after, (before, hidden) = np.asarray(Image.open("out/one.png")), pairs
    assert np.abs(after[~hidden].astype(int) - before[~hidden]).max() <= 1


def test_the_seed_decides_and_nothing_is_overwritten(inpaint, kinds, tmp_path):
    ckpt = save(kinds["inpainting"], tmp_path / "model")
    for seed in ("1", "1", "2"):
        assert inpaint.main(["--ckpt", ckpt, *BASE, "--seed", seed]) == 0
    assert inpaint.main(["--ckpt", ckpt, *BASE, "--n_samples", "2"]) == 0
    names = ["one.png", *(f"one-{i:04}.png" for i in range(1, 5))]
    assert sorted(p.name for p in Path("out").iterdir()) == sorted(names)
    first, again, other = (Image.open(f"out/{n}").tobytes() for n in names[:3])
    assert first == again != other
    assert Image.open("out/one-0004.png").text["index"] == "1"


def test_the_published_model_is_the_default_else_the_one_in_the_box(inpaint, kinds, tmp_path, capsys):
    assert inpaint.main([*BASE, "--config", "some.yaml"]) == 2
    assert "name the checkpoint of --config some.yaml" in capsys.readouterr().err
    opt = inpaint.get_parser().parse_args([*BASE, "--prompt", "red heart"])
    inpaint.name_model(opt)
    assert opt.ckpt == "models/emoji/text2img" and opt.scale == 2.0
    save(kinds["published"], tmp_path / inpaint.PUBLISHED, "last.ckpt")
    opt = inpaint.get_parser().parse_args(BASE)
    inpaint.name_model(opt)
    assert opt.ckpt == "models/ldm/inpainting_big" and opt.scale == 1.0 and opt.prompt == ""


def test_an_inpainting_model_gets_the_mask_and_what_is_left_of_the_picture(kinds):
    model = build(kinds["text inpainting"])
    model.encode_first_stage = lambda x: torch.nn.functional.avg_pool2d(x, 2)
    image, mask = torch.rand(1, 3, 8, 8), torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    filling = inference_images.way_of_filling(model)(model, image, mask, lambda: ("c", "uc"))
    joined = filling.cond["c_concat"][0]
    assert filling.shape == (3, 4, 4) and filling.known == {}
    assert torch.equal(joined[:, :1], torch.nn.functional.interpolate(mask, size=(4, 4)))
    assert torch.equal(joined[:, 1:], torch.nn.functional.avg_pool2d(image * (1 - mask), 2))
    assert filling.cond["c_crossattn"] == ["c"] and filling.uncond == {
        "c_concat": [joined],
        "c_crossattn": ["uc"],
    }


def test_the_published_model_gets_the_masked_picture_black_where_hidden_and_the_mask_last(kinds):
    model = build(kinds["published"])
    model.cond_stage_model.encode = lambda x: torch.nn.functional.avg_pool2d(x, 2)
    image, mask = torch.rand(1, 3, 8, 8), torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    filling = inference_images.way_of_filling(model)(model, image, mask, lambda: None)
    assert filling.shape == (3, 4, 4) and filling.cond.shape == (1, 4, 4, 4)
    assert bool((filling.cond[:, :3, :, :2] == -1).all())  # black, in [-1, 1]
    assert torch.allclose(filling.cond[:, :3, :, 2:], torch.nn.functional.avg_pool2d(image, 2)[..., 2:])
    assert torch.equal(filling.cond[0, 3, 0], torch.tensor([1.0, 1.0, -1.0, -1.0]))


def test_any_other_model_keeps_latents_of_which_no_pixel_is_hidden(kinds):
    model = build(kinds["unconditional"])
    image, mask = torch.rand(1, 3, 8, 8), torch.zeros(1, 1, 8, 8)
    mask[0, 0, 3, 3] = 1
    filling = inference_images.way_of_filling(model)(model, image, mask, lambda: None)
    kept = torch.ones(1, 1, 4, 4)
    kept[0, 0, 1, 1] = 0
    assert torch.equal(filling.known["mask"], kept) and filling.known["x0"].shape == (1, 3, 4, 4)


def test_when_stopped_the_finished_pictures_are_kept(inpaint, kinds, tmp_path, monkeypatch):
    for name in ("two", "three"):
        for end in ("", "_mask"):
            Image.open(f"in/one{end}.png").save(f"in/{name}{end}.png")
    fill, calls = inference_images.fill_in, []

    def twice(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return fill(*args, **kwargs)

    monkeypatch.setattr(inference_images, "fill_in", twice)
    assert inpaint.main(["--ckpt", save(kinds["unconditional"], tmp_path / "model"), *BASE]) == 130
    assert sorted(p.name for p in Path("out").iterdir()) == ["one.png", "three.png"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--indir", "absent"], "there is no such folder"),
        (["--indir", "empty"], "holds no mask"),
        (["--indir", "lonely"], "a.png is missing"),
        (["--indir", "uneven"], "is 4x4, its picture 8x8"),
        (["--outdir", ""], "name the folder --outdir"),
        (["--ckpt", "nowhere"], "there is no folder or file 'nowhere'"),
        (["--steps", "5000"], "choose from 1 to 1000"),
    ],
)
def test_bad_input_is_one_clear_sentence(inpaint, kinds, tmp_path, capsys, argv, message):
    for folder in ("empty", "lonely", "uneven"):
        Path(folder).mkdir()
    Image.new("L", (4, 4)).save("lonely/a_mask.png")
    Image.new("L", (4, 4)).save("uneven/a_mask.png")
    Image.new("RGB", (8, 8)).save("uneven/a.png")
    ckpt = save(kinds["unconditional"], tmp_path / "model")
    assert inpaint.main(["--ckpt", ckpt, *BASE, *argv]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_models_that_want_something_else_are_refused(inpaint, kinds, tiny, tmp_path, capsys):
    ckpt = save(tiny.latent_diffusion(cond_stage_key="class_label"), tmp_path / "classes")
    assert inpaint.main(["--ckpt", ckpt, *BASE]) == 2
    assert "cond_stage_key='class_label'" in capsys.readouterr().err
    more = {
        **kinds["inpainting"],
        "params": {**kinds["inpainting"]["params"], "concat_keys": ["mask", "masked_image", "depth"]},
    }
    assert inpaint.main(["--ckpt", save(more, tmp_path / "more"), *BASE]) == 2
    assert "concat_keys=['mask', 'masked_image', 'depth']" in capsys.readouterr().err
