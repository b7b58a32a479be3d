"""The demo pages: each task on a tiny model, and both ways to show it."""

import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm import inference, inference_conditioned
from ldm.inference import InferenceError
from scripts import pages

ROOT = Path(__file__).resolve().parents[2]
KINDS = {"depth2img": "depth", "inpainting": "inpaint", "superresolution": "enlarge", "stableunclip": "vary"}
SIZES = {"depth2img": (18, 11), "inpainting": (18, 11), "superresolution": (36, 22), "stableunclip": (16, 16)}


def values_of(demo, **changes):
    values = {name: int(c.default) if pages.whole(c) else c.default for name, c in demo.controls.items()}
    return {"prompt": "a", "negative_prompt": "", **values, "steps": 2, "batch_size": 2, **changes}


def inputs_of(demo, picture):
    mask = np.zeros((11, 18), np.uint8)
    mask[2:6, 3:9] = 255
    return [picture, Image.fromarray(mask)][: len(demo.inputs)]


@pytest.mark.parametrize("name", KINDS)
def test_each_task_draws_pictures_that_depend_on_the_seed_alone(name, build, picture):
    demo, model = pages.DEMOS[name], build(KINDS[name])
    inputs = inputs_of(demo, picture)
    first = pages.perform(demo, model, inputs, values_of(demo))
    again = pages.perform(demo, model, inputs, values_of(demo))
    other = pages.perform(demo, model, inputs, values_of(demo, seed=1))
    assert len(first) == 2 + (name == "depth2img")
    assert {p.size for p in first} == {SIZES[name]}
    assert [p.tobytes() for p in first] == [p.tobytes() for p in again]
    assert first[-1].tobytes() != other[-1].tobytes()


@pytest.mark.parametrize(
    ("name", "gradio", "streamlit"),
    [
        ("depth2img", {"batch_size": 1, "steps": 50, "scale": 9.0, "strength": 0.9, "eta": 0.0}, {}),
        ("inpainting", {"batch_size": 4, "steps": 45, "scale": 10.0, "eta": 1.0}, {"steps": 50, "eta": 0.0}),
        ("superresolution", {"batch_size": 1, "steps": 75, "scale": 10.0, "noise_level": 20, "eta": 0.0}, {"steps": 50, "scale": 9.0}),
    ],
)  # fmt: skip
def test_the_defaults_are_the_published_ones(name, gradio, streamlit):
    demo = pages.DEMOS[name]
    assert {k: c.default for k, c in demo.controls.items() if k != "seed"} == gradio
    assert {k: c.default for k, c in demo.streamlit.items()} == streamlit
    assert set(demo.streamlit) <= set(demo.controls)


def test_the_page_of_prompts_draws_with_the_model_in_the_box(monkeypatch):
    from streamlit.testing.v1 import AppTest

    monkeypatch.setattr(sys, "argv", ["text2img.py", "--device", "cpu"])
    app = AppTest.from_file(str(ROOT / "scripts" / "streamlit" / "text2img.py"), default_timeout=60).run()
    app.text_input[0].set_value("red heart")
    app.sidebar.slider[1].set_value(4)
    app.button[0].click().run()
    assert not app.exception and not app.error
    assert [e.type for e in app.main].count("image") == 4
    assert pages.main("text2img", "gradio", None, ["--device", "nowhere"]) == 2
    with pytest.raises(SystemExit):
        pages.main("text2img", "gradio", None, ["some.yaml"])


def test_only_what_the_mask_hides_changes(build, picture):
    demo = pages.DEMOS["inpainting"]
    inputs = inputs_of(demo, picture)
    made = pages.perform(demo, build("inpaint"), inputs, values_of(demo))[0]
    hidden = np.asarray(inputs[1]) > 0
    changed = (np.abs(np.asarray(made, int) - np.asarray(picture, int)) > 1).any(-1)
    assert changed[hidden].mean() > 0.5 and not changed[~hidden].any()


def test_what_does_not_suit_is_one_clear_sentence(build, picture):
    demos = pages.DEMOS
    with pytest.raises(InferenceError, match=r"give: Picture, Mask"):
        pages.perform(demos["inpainting"], build("inpaint"), [picture, None], values_of(demos["inpainting"]))
    small = Image.new("L", (3, 3))
    with pytest.raises(InferenceError, match=r"the mask is 3x3, its picture 18x11"):
        pages.perform(demos["inpainting"], build("inpaint"), [picture, small], values_of(demos["inpainting"]))
    with pytest.raises(InferenceError, match=r"noise level 60 must lie between 0 and 59"):
        values = values_of(demos["stableunclip"], noise_level=60)
        pages.perform(demos["stableunclip"], build("vary"), [picture], values)


def test_embeddings_are_averaged_by_their_weights(build, picture):
    model, other = build("vary"), Image.new("RGB", (30, 30), (200, 30, 90))

    def embed(images, weights, **options):
        torch.manual_seed(0)
        return inference_conditioned.embedding_of(model, images, weights, **options)

    one = embed([picture], [3.0])
    assert one.shape == (1, 16)
    assert torch.allclose(embed([picture, other], [1.0, 0.0]), one, atol=1e-5)
    second = embed([picture, other], [0.0, 1.0])
    # the noise of both is drawn in turn, so the mean of the two is the mean of the extremes
    assert torch.allclose(embed([picture, other], [1.0, 3.0]), 0.25 * one + 0.75 * second, atol=1e-5)
    renoised = embed([picture, other], [1.0, 1.0], renoise=True)
    level = model.noise_augmentor.time_embed(torch.tensor([50]))
    assert torch.equal(renoised[:, 8:], level)
    with pytest.raises(InferenceError, match=r"2 pictures and weights \[1.0\]"):
        embed([picture, other], [1.0])


@pytest.mark.parametrize("name", ["depth2img", "inpainting", "superresolution"])
def test_a_page_of_streamlit_shows_every_control_and_the_pictures(name, run_folder, picture, monkeypatch):
    from streamlit.testing.v1 import AppTest

    demo, folder = pages.DEMOS[name], run_folder(KINDS[name])
    argv = [f"{name}.py", str(folder / "config.yaml"), str(folder / "model.ckpt"), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", argv)
    app = AppTest.from_file(str(ROOT / "scripts" / "streamlit" / f"{name}.py"), default_timeout=60).run()
    assert not app.exception and app.title[0].value == demo.title
    assert [s.label for s in app.sidebar.slider] == [c.label for k, c in demo.controls.items() if k != "seed"]
    assert app.sidebar.number_input[0].value == 0
    app.button[0].click().run()  # nothing is uploaded yet
    assert not app.exception and app.error[0].value == f"give: {', '.join(demo.inputs)}"


def test_a_page_of_streamlit_draws_what_was_uploaded(run_folder, picture, monkeypatch):
    """The test client cannot upload files, so the page gets them from a stand-in for the widget."""
    import streamlit
    from streamlit.testing.v1 import AppTest

    folder = run_folder("depth")
    monkeypatch.setattr(
        streamlit, "file_uploader", lambda *_args, **_options: str(Path("init.png").resolve())
    )
    argv = ["depth2img.py", str(folder / "config.yaml"), str(folder / "model.ckpt"), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", argv)
    app = AppTest.from_file(str(ROOT / "scripts" / "streamlit" / "depth2img.py"), default_timeout=60).run()
    app.sidebar.slider[1].set_value(2)
    app.button[0].click().run()
    assert not app.exception and not app.error
    assert [e.type for e in app.main].count("image") == 2  # the depth, and a picture


def test_a_page_of_streamlit_says_what_is_wrong_with_the_model_and_with_a_picture(
    run_folder, picture, monkeypatch
):
    import streamlit
    from streamlit.testing.v1 import AppTest

    folder = run_folder("depth")
    page = str(ROOT / "scripts" / "streamlit" / "depth2img.py")
    argv = ["depth2img.py", str(folder / "config.yaml"), "absent.ckpt", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", argv)
    app = AppTest.from_file(page, default_timeout=60).run()
    assert not app.exception and "absent.ckpt" in app.error[0].value and not app.button
    Path("broken.png").write_text("no picture")
    monkeypatch.setattr(
        streamlit, "file_uploader", lambda *_args, **_options: str(Path("broken.png").resolve())
    )
    argv[2] = str(folder / "model.ckpt")
    app = AppTest.from_file(page, default_timeout=60).run()
    app.button[0].click().run()
    assert not app.exception and "cannot identify image file" in app.error[0].value


class Recorder:
    """Takes the place of a Gradio component: remembers what it was made of."""

    made: list = []

    def __init__(self, *args, **options):
        self.args, self.options = args, options
        Recorder.made.append(self)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def click(self, **wiring):
        self.wiring = wiring


def test_a_page_of_gradio_hands_its_inputs_over_in_order(build, picture, monkeypatch):
    names = (
        "Blocks",
        "Markdown",
        "Row",
        "Column",
        "Image",
        "Textbox",
        "Button",
        "Number",
        "Slider",
        "Gallery",
    )
    fake = types.SimpleNamespace(Error=RuntimeError, **{n: type(n, (Recorder,), {}) for n in names})
    monkeypatch.setitem(sys.modules, "gradio", fake)
    demo = pages.DEMOS["depth2img"]
    pages.build_gradio(demo, build("depth"))
    button = next(c for c in Recorder.made if type(c).__name__ == "Button")
    inputs = button.wiring["inputs"]
    labels = [c.options["label"] for c in inputs]
    assert labels == ["Picture", "Prompt", "Negative prompt", *(c.label for c in demo.controls.values())]
    given = [picture, "a", "", *values_of(demo, batch_size=1).values()][: len(inputs)]
    given[3:] = [values_of(demo, batch_size=1)[name] for name in demo.controls]
    assert [p.size for p in button.wiring["fn"](*given)] == [(18, 11)] * 2
    with pytest.raises(RuntimeError, match=r"give: Picture"):
        button.wiring["fn"](None, *given[1:])


def test_without_gradio_the_page_says_what_to_install(script, run_folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    folder = run_folder("depth")
    argv = [str(folder / "config.yaml"), str(folder / "model.ckpt"), "--device", "cpu"]
    assert pages.main("depth2img", "gradio", None, argv) == 2
    assert "python -m pip install gradio" in capsys.readouterr().err


def test_variations_are_kept_under_their_version_and_never_overwritten(
    script, build, picture, tmp_path, monkeypatch
):
    import streamlit
    from streamlit.testing.v1 import AppTest

    model = build("vary")
    monkeypatch.setattr(inference, "load_model", lambda *_: (model, None, None))
    monkeypatch.setattr(streamlit, "file_uploader", lambda *_args, **_options: ["init.png", "init.png"])
    monkeypatch.setattr(sys, "argv", ["stableunclip.py", "--device", "cpu"])
    page = ROOT / "scripts" / "streamlit" / "stableunclip.py"
    app = AppTest.from_file(str(page), default_timeout=60).run()
    assert not app.exception and app.title[0].value == "Variations"
    for label, value in (("Height", 64), ("Width", 64)):
        next(n for n in app.sidebar.number_input if n.label == label).set_value(value)
    for slider, value in zip(app.sidebar.slider[:2], (1, 2), strict=True):
        slider.set_value(value)
    app.checkbox[0].check()
    for _ in range(2):
        app.button[0].click().run()
        assert not app.exception and not app.error
    kept = sorted(str(p) for p in Path("outputs").rglob("*.png"))
    folder = "outputs/demo/stable-unclip/Stable unCLIP-L"
    assert kept == [
        f"{folder}/grid-000000.png", f"{folder}/grid-000001.png", f"{folder}/samples/000000000.png", f"{folder}/samples/000000001.png",
    ]  # fmt: skip
    said = Image.open(kept[2]).text
    assert (
        said["renoise"] == "True" and said["weights"] == "[1.0, 1.0]" and Image.open(kept[2]).size == (64, 64)
    )
