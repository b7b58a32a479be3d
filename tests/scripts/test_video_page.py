"""scripts/demo: the cameras of the video page and what it writes, the sampling page's options; scripts/tests/attention.py."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from ldm.inference import InferenceError

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.demo import backend, sv3d_helpers
from sgm.inference.api import Discretization, Sampler
from sgm.inference.frames import read_video
from sgm.models.notebook import default_parameters

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("seed", range(5))
def test_an_uneven_way_goes_once_around_in_order_and_ends_where_the_picture_was_taken(seed):
    elevations, azimuths = sv3d_helpers.dynamic_orbit(21, 12.0, seed)
    assert (elevations[-1], azimuths[-1]) == (12.0, 0.0) and len(elevations) == len(azimuths) == 21
    on_the_way = azimuths[:-1]
    assert on_the_way == sorted(on_the_way) and on_the_way[0] > 0 and on_the_way[-1] < 360
    even = [360 * i / 21 for i in range(1, 21)]
    assert all(abs(a - b) <= 0.4 * 360 / 21 for a, b in zip(on_the_way, even, strict=True))
    assert len({round(e, 6) for e in elevations}) > 10  # it rises and sinks, by 15 degrees at most
    assert all(abs(e - 12.0) <= 15.0 for e in elevations)
    assert (elevations, azimuths) == sv3d_helpers.dynamic_orbit(21, 12.0, seed)
    assert azimuths != sv3d_helpers.dynamic_orbit(21, 12.0, seed + 1)[1]


def test_a_camera_stays_off_the_poles_and_needs_a_view():
    assert max(abs(e) for e in sv3d_helpers.dynamic_orbit(50, 88.0, 3)[0]) <= 89.0
    assert sv3d_helpers.dynamic_orbit(1, 5.0) == ([5.0], [0.0])
    with pytest.raises(InferenceError, match="one view at least, not 0"):
        sv3d_helpers.dynamic_orbit(0)


def test_a_way_is_drawn_as_a_picture(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    sv3d_helpers.plot_orbit([10.0] * 4, [90.0, 180.0, 270.0, 0.0], tmp_path / "plots/even.png")
    sv3d_helpers.plot_orbit([10.0, 40.0, 10.0, 10.0], [90.0, 180.0, 270.0, 0.0], tmp_path / "uneven.png")
    even, uneven = (np.asarray(Image.open(tmp_path / name)) for name in ("plots/even.png", "uneven.png"))
    assert even.shape == uneven.shape == (500, 500, 4) and (even != uneven).any()
    with pytest.raises(InferenceError, match="2 elevations and 1 azimuths"):
        sv3d_helpers.plot_orbit([1.0, 2.0], [1.0], tmp_path / "no.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InferenceError, match="python -m pip install matplotlib"):
        sv3d_helpers.plot_orbit([1.0], [1.0], tmp_path / "no.png")
    assert not (tmp_path / "no.png").exists()


def page_of(name):
    from streamlit.testing.v1 import AppTest

    return AppTest.from_file(str(ROOT / f"scripts/demo/{name}.py"), default_timeout=60).run()


def test_the_video_page_writes_the_frames_as_a_grid_and_the_cameras_way(tmp_path, monkeypatch):
    """From a picture to files; what the page asks is handed on to the model, which paints grey here."""
    from scripts.demo import video_sampling
    from scripts.sampling import simple_video_sample

    told = {}

    def load(config, device, num_steps, num_frames, verbose, ckpt):
        told.update(num_steps=num_steps, num_frames=num_frames)

    def animate(model, values, count, decoding_t, is_orbit):
        told.update(values)
        return torch.full((count, 3, 64, 64), 0.5)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(simple_video_sample, "load_video_model", load)
    monkeypatch.setattr(simple_video_sample, "animate", animate)
    monkeypatch.setattr(simple_video_sample, "ORBIT_SIZE", 64)
    monkeypatch.setattr(backend, "content_filter", lambda: lambda images: images * 0.5)
    thing = np.zeros((64, 64, 4), np.uint8)
    thing[10:30, 10:30] = 255
    Image.fromarray(thing).save("thing.png")
    elevations, azimuths = sv3d_helpers.dynamic_orbit(5, 20.0, 1)
    camera = {"elevations_deg": elevations, "azimuths_deg": azimuths}
    video = video_sampling.animate(Path("thing.png"), "sv3d_p", camera, num_frames=5, num_steps=2)
    assert video == Path("outputs/demo/vid/sv3d_p/000000.mp4") and told["num_frames"] == 5
    assert np.rad2deg(told["azimuths_rad"]) == pytest.approx(azimuths)
    assert 90 - np.rad2deg(told["polars_rad"]) == pytest.approx(elevations)
    names = sorted(p.name for p in video.parent.iterdir())
    assert names == ["000000.jpg", "000000.mp4", "000000_camera.png", "000000_grid.png"]
    grid = np.asarray(Image.open(video.parent / "000000_grid.png"))
    assert grid.shape == (2 + 2 * 66, 2 + 3 * 66, 3)  # five frames in rows of three, two pixels between
    # both as the filter left them
    assert abs(int(grid[20, 20, 0]) - 64) <= 1 and abs(np.asarray(read_video(video, 1)[0]).mean() - 64) < 4
    video_sampling.animate(Path("thing.png"), "svd", {}, num_frames=4)
    assert not list(Path("outputs/demo/vid/svd").glob("*_camera.png"))


def test_the_video_page_asks_for_the_way_only_where_a_model_is_told_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = page_of("video_sampling")
    assert not page.sidebar.radio
    page.sidebar.selectbox[0].set_value("sv3d_p").run()
    page.sidebar.radio[0].set_value("uneven").run()
    assert not page.exception and page.sidebar.number_input[-1].label == "Seed of the way"


def test_the_sampling_page_asks_for_each_samplers_own_options(tmp_path, monkeypatch):
    class Pipeline:
        class specs:
            width = 64

        def text_to_image(self, params, prompt, negative, samples, filter=None):
            drawn.append(params)
            return torch.ones(samples, 3, 64, 64)

    drawn = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(backend, "load_pipeline", lambda name: Pipeline())
    monkeypatch.setattr(backend, "content_filter", lambda: None)
    page = page_of("sampling")
    page.sidebar.selectbox[0].set_value("SD-2.1").run()
    for sampler in Sampler:
        page.sidebar.selectbox[1].set_value(sampler.value).run()
        assert not page.exception
    page.sidebar.selectbox[1].set_value(Sampler.EULER_EDM.value).run()
    page.sidebar.selectbox[2].set_value(Discretization.EDM.value).run()
    page.sidebar.number_input(key="s_churn").set_value(7.5)
    page.sidebar.number_input(key="rho").set_value(5.0)
    page.button[0].click().run()
    (params,) = drawn
    assert (params.sampler, params.s_churn, params.discretization, params.rho, params.scale) == (
        Sampler.EULER_EDM, 7.5, Discretization.EDM, 5.0, 5.0,
    )  # fmt: skip


def test_the_benchmark_of_attention_times_every_back_end_and_records_nothing(tmp_path, monkeypatch, capsys):
    record = tmp_path / "attention.json"
    monkeypatch.setenv("TAMING_ATTENTION", str(record))
    spec = importlib.util.spec_from_file_location("attention_benchmark", ROOT / "scripts/tests/attention.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    target = "sgm.models.diffusion.DiffusionEngine"
    tiny = {"model": {"target": target, "params": default_parameters(model_channels=32, num_heads=4)}}
    OmegaConf.save(OmegaConf.create(tiny), tmp_path / "tiny.yaml")
    flags = ["--H", "8", "--W", "8", "--device", "cpu", "--seconds", "0.0001"]
    assert benchmark.main(["--config", str(tmp_path / "tiny.yaml"), *flags]) == 0
    said = capsys.readouterr().out
    assert "milliseconds a call" in said and "of one guided step and of decoding" in said
    assert not record.exists()
    assert benchmark.main(["--config", "absent.yaml"]) == 2
    assert "--config absent.yaml: there is no such file" in capsys.readouterr().err
    # of SDXL unless told otherwise
    seen = []
    monkeypatch.setattr(benchmark.optimize_attention, "run", lambda opt: seen.append(opt) or 0)
    assert benchmark.main([]) == 0 and (seen[0].H, seen[0].W, seen[0].dry_run) == (1024, 1024, True)
    assert OmegaConf.load(seen[0].config).model.params.scale_factor == 0.13025
