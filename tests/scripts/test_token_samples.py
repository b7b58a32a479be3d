"""The scripts that draw from a token transformer, run on a tiny one from its log folder."""

import importlib
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import nn

from taming.checkpoint import save_checkpoint
from taming.data.conditional_builder.objects_bbox import ObjectsBoundingBoxConditionalBuilder
from taming.data.conditional_builder.objects_center_points import ObjectsCenterPointsConditionalBuilder
from taming.data.helper_types import Annotation
from taming.util import instantiate_from_config

pytestmark = pytest.mark.usefixtures("emoji_opened_once")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

VQ = {
    "target": "taming.models.vqgan.VQModel",
    "params": {
        "ddconfig": {
            "double_z": False, "z_channels": 4, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 1, 1],
            "num_res_blocks": 0, "attn_resolutions": [], "dropout": 0.0,
        },
        "lossconfig": {"target": "taming.modules.losses.DummyLoss"}, "n_embed": 12, "embed_dim": 4,
    },
}  # fmt: skip
CLASSES = {"target": "taming.modules.util.Labelator", "params": {"n_classes": 9}}
DATA = {
    "target": "main.DataModuleFromConfig",
    "params": {
        "batch_size": 1,
        "num_workers": 0,
        "validation": {
            "target": "taming.data.emoji.EmojiImages",
            "params": {
                "size": 32,
                "split": "validation",
                "categories": ["Smileys & Emotion"],
                "validation_share": 0.05,
            },
        },
    },
}


def script(name):
    return importlib.import_module(f"scripts.{name}")


def config(cond, key, block_size=40):
    gpt = {"vocab_size": 12, "block_size": block_size, "n_layer": 1, "n_head": 2, "n_embd": 16}
    params = {
        "transformer_config": {"target": "taming.modules.transformer.mingpt.GPT", "params": gpt},
        "first_stage_config": {**VQ, "params": {**VQ["params"], "ckpt_path": "absent.ckpt"}},
        "cond_stage_config": cond,
        "first_stage_key": "image",
        "cond_stage_key": key,
        "downsample_cond_size": 16 if key == "image" else -1,
    }
    model = {"target": "taming.models.cond_transformer.Net2NetTransformer", "params": params}
    return OmegaConf.create({"model": model, "data": DATA})


def spread(model):
    """Weights that make a difference, and a codebook that images use."""
    torch.manual_seed(1)
    for parameter in model.transformer.parameters():
        nn.init.normal_(parameter, std=0.3)
    stage = model.first_stage_model
    with torch.no_grad():
        latents = stage.encode_to_prequant(torch.randn(1, 3, 16, 16)).flatten(2)[0].t()
        stage.quantize.embedding.weight.copy_(latents[:12])
    return model.eval()


def make_run(folder, cond=CLASSES, key="class_label", **params):
    """A log folder as training leaves it; the first stage's own checkpoint is gone, as it may be."""
    written = OmegaConf.merge(config(cond, key), {"model": {"params": params}})
    ready = written.copy()
    ready.model.params.first_stage_config.params.ckpt_path = None
    model = spread(instantiate_from_config(ready.model))
    (folder / "configs").mkdir(parents=True)
    OmegaConf.save(written, folder / "configs" / "2026-01-01T00-00-00-project.yaml")
    save_checkpoint(
        {"state_dict": model.state_dict(), "global_step": 70}, folder / "checkpoints" / "last.ckpt"
    )
    return folder, model


@pytest.fixture
def classes(tmp_path):
    return make_run(tmp_path / "run")


@pytest.fixture
def images(tmp_path):
    return make_run(tmp_path / "images", "__is_first_stage__", "image")


# ------------------------------------------------------------------------------------------------------ sample_fast


def test_sample_fast_writes_each_classs_pictures_and_goes_on_where_it_stopped(classes, capsys):
    folder, model = classes
    argv = ["-r", str(folder), "-n", "3", "--batch_size", "2", "--classes", "0,7", "-k", "5", "-s", "1", "--device", "cpu"]  # fmt: skip
    assert script("sample_fast").main(argv) == 0
    out = folder / "samples" / "top_k_5_temp_1.00_top_p_1.0" / "70"
    names = sorted(str(p.relative_to(out)) for p in out.rglob("*.png"))
    assert names == [f"{c}/{n:06}.png" for c in (0, 7) for n in range(3)]
    assert str(out) in capsys.readouterr().out
    # the first batch: the class is the prompt, its codes are decoded, values cut to bytes
    torch.manual_seed(1)
    log = script("sample_fast").sample_classconditional(model, 2, 0, 16, top_k=5, dim_z=4, h=4, w=4)
    assert log["class_label"].tolist() == [[0], [0]]
    expected = (255 * ((log["samples"][0] + 1) / 2).clamp(0, 1)).byte().permute(1, 2, 0).numpy()
    assert np.array_equal(np.asarray(Image.open(out / "0" / "000000.png")), expected)
    kept = (out / "0" / "000000.png").stat().st_mtime_ns
    (out / "7" / "000002.png").unlink()
    assert script("sample_fast").main(argv) == 0
    assert (out / "0" / "000000.png").stat().st_mtime_ns == kept and (out / "7" / "000002.png").is_file()


def test_sample_fast_draws_from_unconditional_models(tmp_path):
    folder, _ = make_run(tmp_path / "run", "__is_unconditional__", "class_label")
    argv = ["-r", str(folder), "-n", "2", "-o", str(tmp_path / "out"), "--device", "cpu"]
    assert script("sample_fast").main(argv) == 0
    assert len(list((tmp_path / "out" / "samples").rglob("70/00000?.png"))) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--classes", "9"], "knows the classes 0 to 8, not 9"),
        (["--classes", "cat"], "write 0,7,… or imagenet"),
        (["-r", "absent"], "--resume absent: there is no folder or file"),
        (["-b", "absent.yaml"], "there is no configuration absent.yaml"),
        (["model.params.transformer_config.params.n_embd=8"], "does not fit"),
    ],
)
def test_sample_fast_answers_bad_input_in_one_sentence(classes, capsys, flags, message):
    argv = ["-r", str(classes[0]), "-n", "1", "--device", "cpu", "--classes", "0", *flags]
    assert script("sample_fast").main(argv) == 2
    assert message in capsys.readouterr().err


def test_sample_fast_is_strict(classes, capsys):
    folder, model = classes
    state = {k: v for k, v in model.state_dict().items() if "ln_f" not in k}
    save_checkpoint({"state_dict": state}, folder / "checkpoints" / "last.ckpt")
    assert script("sample_fast").main(["-r", str(folder), "-n", "1", "--device", "cpu"]) == 2
    assert "2 missing (transformer 2)" in capsys.readouterr().err


def test_sample_fast_sends_other_conditions_elsewhere(images, capsys):
    assert script("sample_fast").main(["-r", str(images[0]), "-n", "1", "--device", "cpu"]) == 2
    assert "conditioned on 'image', not on classes; use scripts/make_samples.py" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------- make_samples


def test_make_samples_redraws_every_picture_of_the_data_by_the_window(images, tmp_path):
    folder, _ = images
    out = tmp_path / "out"
    argv = ["-r", str(folder), "--outdir", str(out), "--top_k", "4", "-s", "3", "--device", "cpu"]
    assert script("make_samples").main(argv) == 0
    root = out / "000070_4_1.0"
    pictures = {f: sorted(p.name for p in (root / f).iterdir()) for f in ("originals", "reconstructions", "samples")}  # fmt: skip
    assert (
        pictures["originals"] == pictures["reconstructions"] == pictures["samples"] and pictures["originals"]
    )
    # twice the training size: the condition is not shrunk, the map of codes is 8 x 8 and the window 4 x 4
    assert Image.open(root / "samples" / "000000.png").size == (32, 32)
    data = instantiate_from_config(config("__is_first_stage__", "image").data)
    data.setup()
    first = torch.tensor(data.datasets["validation"][0]["image"])
    original = np.asarray(Image.open(root / "originals" / "000000.png"))
    assert np.abs(original.astype(int) - ((first + 1) * 127.5).numpy()).max() <= 1


def test_make_samples_takes_data_from_the_command_line(images, tmp_path, capsys):
    argv = ["-r", str(images[0]), "--outdir", str(tmp_path / "out"), "--ignore_base_data", "--device", "cpu"]
    assert script("make_samples").main(argv) == 2
    assert "no data: give a data section" in capsys.readouterr().err
    own = tmp_path / "own"
    own.mkdir()
    Image.new("RGB", (20, 24), "red").save(own / "a.png")
    given = ["data.target=main.DataModuleFromConfig", "data.params.batch_size=1", "data.params.num_workers=0",
             "data.params.test.target=taming.data.captioned.CaptionedImages", f"data.params.test.params.root={own}",
             "data.params.test.params.size=16"]  # fmt: skip
    assert script("make_samples").main([*argv, *given]) == 0
    assert len(list((tmp_path / "out").rglob("*.png"))) == 3


# ---------------------------------------------------------------------------------------------------------- txt2img

TEXT = {
    "target": "ldm.modules.encoders.tokenizers.BPETokenizer",
    "params": {"device": "cpu", "vocab_size": 600, "max_length": 8, "offset": 12},
}


def test_txt2img_draws_with_a_token_transformer_too(tmp_path, capsys):
    vocabulary = {"transformer_config": {"params": {"vocab_size": 613}}}
    folder, _ = make_run(tmp_path / "run", TEXT, "caption", null_cond=612, **vocabulary)
    out = tmp_path / "out"
    argv = ["--ckpt", str(folder), "--prompt", "red heart", "--n_samples", "2", "--outdir", str(out), "--device", "cpu", "--scale", "2", "--top_k", "5"]  # fmt: skip
    module = script("txt2img")
    assert module.main(argv) == 0
    first = Image.open(out / "samples" / "00000.png")
    assert first.size == (16, 16)
    assert (
        first.text["prompt"] == "red heart"
        and first.text["sampler"] == "tokens"
        and first.text["top_k"] == "5"
    )
    assert Image.open(out / "grid-0000.png").size == (2 * 18 + 2, 20)
    assert module.main([*argv, "--outdir", str(tmp_path / "again")]) == 0
    again = Image.open(tmp_path / "again" / "samples" / "00000.png")
    assert np.array_equal(np.asarray(again), np.asarray(first))  # the seed decides
    assert module.main([*argv, "--plms"]) == 2
    assert "--plms is for diffusion models" in capsys.readouterr().err


def test_txt2img_says_when_guidance_has_no_effect(tmp_path, caplog):
    folder, _ = make_run(
        tmp_path / "run", TEXT, "caption", transformer_config={"params": {"vocab_size": 612}}
    )
    argv = ["--ckpt", str(folder), "--prompt", "ghost", "--n_samples", "1", "--outdir", str(tmp_path / "o"), "--device", "cpu"]  # fmt: skip
    with caplog.at_level("INFO"):
        assert script("txt2img").main(argv) == 0
        assert "--scale has no effect" not in caplog.text
        assert script("txt2img").main([*argv, "--scale", "3"]) == 0
    assert "--scale has no effect" in caplog.text


# --------------------------------------------------------------------------------------------------- evaluate_tokens


def test_the_baseline_costs_what_frequencies_say():
    module = script("evaluate_tokens")
    train = torch.tensor([[0, 0, 0, 1]])  # with one added to each of four codes: 4, 2, 1, 1 of 8
    assert module.unigram_bits(train, torch.tensor([0, 1, 2, 3]), 4) == pytest.approx((1 + 2 + 3 + 3) / 4)


def test_bits_are_those_that_validation_logs(images, capsys):
    folder, model = images
    module = script("evaluate_tokens")
    train = ["data.params.train.target=taming.data.emoji.EmojiImages", "data.params.train.params.size=16",
             "data.params.train.params.repeats=3", "data.params.train.params.categories=[Activities]",
             "data.params.validation.params.size=16"]  # fmt: skip
    assert module.main(["-r", str(folder), "--batch_size", "2", "--device", "cpu", *train]) == 0
    out = capsys.readouterr().out
    validation = OmegaConf.merge(config("__is_first_stage__", "image").data, {"params": {"validation": {"params": {"size": 16}}}})  # fmt: skip
    data = instantiate_from_config(validation)
    data.setup()
    dataset = data.datasets["validation"]
    batch = {"image": torch.stack([torch.tensor(item["image"]) for item in dataset])}
    with torch.no_grad():
        bits = float(model.shared_step(batch, 0)) / np.log(2)
    assert (
        f"{bits:6.2f} bits a token" in out and f"{len(dataset)} held-out images of 16 codes out of 12" in out
    )
    assert f"all alike          {np.log2(12):6.2f}" in out
    assert module.main(["-r", str(folder), "--device", "cpu"]) == 2
    assert "has no train section" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ sample_conditional


def test_completion_keeps_the_upper_half_and_reports_on_the_way(images):
    _, model = images
    module = script("sample_conditional")
    batch = {"image": torch.rand(1, 16, 16, 3) * 2 - 1}
    seen = []
    log = module.sample_image(model, batch, completion=True, update_every=4, callback=seen.append, progress=False)  # fmt: skip
    assert set(log) == {"original", "reconstruction", "sample", "conditioning"}
    before, after = (model.encode_to_z(log[k])[1] for k in ("reconstruction", "sample"))
    assert len(seen) == 2 and seen[0].shape == (1, 3, 16, 16)
    codes = model.encode_to_z(log["original"])[1]
    torch.manual_seed(5)
    again = module.sample_image(model, batch, sample=False, progress=False)["sample"]
    assert not torch.equal(again, log["sample"])
    assert codes.shape == before.shape == after.shape == (1, 16)
    larger = module.sample_image(model, batch, scale_factor=2.0, progress=False)
    assert larger["sample"].shape == (1, 3, 32, 32)
    with pytest.raises(ValueError, match="smaller than the window"):
        module.sample_image(model, batch, scale_factor=0.5)


def test_the_same_without_a_browser_writes_pictures_and_an_animation(images, tmp_path, capsys):
    argv = ["-r", str(images[0]), "--outdir", str(tmp_path / "o"), "--index", "0", "1", "--animate", "--device", "cpu"]  # fmt: skip
    module = script("sample_conditional")
    assert module.main(argv) == 0
    names = {p.name for p in (tmp_path / "o").iterdir()}
    assert {"000000_sample.png", "000001_original.png", "000000_sampling.mp4"} <= names
    assert (tmp_path / "o" / "000001_sampling.mp4").read_bytes()[4:8] == b"ftyp"
    assert module.main([*argv, "--index", "999"]) == 2
    assert "--index 999: the data set has the pictures 0 to" in capsys.readouterr().err


def test_the_page_draws_when_asked(images, tmp_path, monkeypatch):
    from streamlit.testing.v1 import AppTest

    monkeypatch.setattr(
        sys, "argv", ["sample_conditional.py", "-r", str(images[0]), "--outdir", str(tmp_path), "--device", "cpu"]
    )  # fmt: skip
    app = AppTest.from_file(str(ROOT / "scripts" / "sample_conditional.py"), default_timeout=60).run()
    assert not app.exception and app.title[0].value == "Conditional samples"
    assert [e.type for e in app.main] == ["main", "title", "image", "button"]
    app.checkbox[2].check()  # animate
    app.button[0].click().run()
    assert not app.exception
    # the sample, its condition, the reconstruction
    assert [e.type for e in app.main][4:] == ["image", "image", "image", "video"]
    assert (tmp_path / "sampling.mp4").stat().st_size > 0


# ------------------------------------------------------------------------------------------------ make_scene_samples


def boxes():
    return ObjectsBoundingBoxConditionalBuilder(5, 3, 100, False, False, False)


def annotation(number, bbox):
    return Annotation(area=0.0, image_id="", bbox=bbox, category_no=number, category_id="")


def test_a_window_sees_the_layout_of_its_part_only():
    module, builder = script("make_scene_samples"), boxes()
    random.seed(0)
    left, right = annotation(1, (0.0, 0.0, 1 / 3, 1.0)), annotation(2, (2 / 3, 0.0, 1 / 3, 1.0))
    layout = builder.build([left, right])
    seen = builder.inverse_build(module.layout_at(builder, layout, (0.0, 0.0, 0.5, 1.0)))[0]
    assert [what for what, _ in seen] == [1]
    x, y, w, h = seen[0][1]
    assert (x, y, h) == (0.0, 0.0, 1.0) and w == pytest.approx(2 / 3, abs=0.06)  # a grid of ten
    both = module.layout_at(builder, layout, (0.0, 0.0, 1.0, 1.0))
    assert sorted(w for w, _ in builder.inverse_build(both)[0]) == [1, 2]


def test_centre_points_and_encoded_crops_follow_the_window_too():
    module = script("make_scene_samples")
    points = ObjectsCenterPointsConditionalBuilder(5, 3, 100, True, False, False)
    layout = points.build([annotation(1, (0.0, 0.0, 0.2, 0.2)), annotation(2, (0.8, 0.8, 0.2, 0.2))], (0.0, 0.0, 1.0, 1.0))  # fmt: skip
    objects, crop = points.inverse_build(module.layout_at(points, layout, (0.0, 0.0, 2 / 3, 2 / 3)))
    assert [what for what, _ in objects] == [1]
    assert crop == pytest.approx((0.0, 0.0, 2 / 3, 2 / 3), abs=0.06)
    assert module.part_of((0.5, 0.0, 0.5, 1.0), (0.5, 0.5, 0.5, 0.5)) == (0.75, 0.5, 0.25, 0.5)


class Scenes:
    """Two layouts with the interface of the object data sets."""

    conditional_builders = {"objects_bbox": boxes()}

    def __len__(self):
        return 2

    def __getitem__(self, i):
        layout = boxes().build([annotation(i, (0.0, 0.0, 0.5, 0.5))])
        return {"objects_bbox": layout, "image": np.zeros((16, 16, 3), np.float32)}

    def get_textual_label_for_category_no(self, number):
        return f"thing {number}"


def test_scenes_are_drawn_beside_their_layout_at_any_size(tmp_path, monkeypatch, capsys):
    module = script("make_scene_samples")
    scene = config({"target": "taming.models.dummy_cond_stage.DummyCondStage", "params": {"conditional_key": "objects_bbox"}}, "objects_bbox")  # fmt: skip
    scene.model.params.first_stage_config.params.ckpt_path = None
    scene.model.params.transformer_config.params.vocab_size = 100
    model = spread(instantiate_from_config(scene.model))
    run = script("make_samples").Run(model, scene, tmp_path, 70)
    monkeypatch.setattr(module, "load", lambda opt, overrides: (run, Scenes()))
    monkeypatch.setattr(module, "resolution", None)
    for size, name in (((16, 16), "small"), ((16, 32), "wide")):
        monkeypatch.setattr(module, "get_parser", parser_with(module.get_parser, size))
        out = tmp_path / name
        assert module.main(["-r", "x", "--outdir", str(out), "-N", "2"]) == 0
        pictures = sorted(p.name for p in (out / "000070_100_1.0").iterdir())
        assert pictures == ["0000_00.png", "0001_00.png"]
        height, width = size
        found = Image.open(out / "000070_100_1.0" / "0000_00.png").size
        assert found == (3 * (width + 2) + 2, height + 4)  # two samples and the layout, framed by two pixels
        monkeypatch.undo()
        monkeypatch.setattr(module, "load", lambda opt, overrides: (run, Scenes()))
    assert module.main(["-r", "x", "--outdir", str(tmp_path), "-C", "segmentation"]) == 2
    assert "this data set makes objects_bbox" in capsys.readouterr().err


def parser_with(published, size):
    def get_parser():
        parser = published()
        parser.set_defaults(resolution=size)
        return parser

    return get_parser


def test_resolutions_are_at_least_256_and_multiples_of_16():
    module = script("make_scene_samples")
    assert module.resolution("256,512") == (256, 512)
    assert module.resolution("100,300") == (256, 304)
    with pytest.raises(Exception, match="must be height,width"):
        module.resolution("256")
