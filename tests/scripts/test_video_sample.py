"""scripts/sampling: the video scripts, end to end with tiny models of random weights."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from sgm.inference import video
from sgm.inference.frames import read_video
from taming.checkpoint import load_model_from_config

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests/scripts/video"


@pytest.fixture(scope="module")
def scripts():
    sys.path.insert(0, str(ROOT))
    names = ("simple_video_sample", "simple_video_sample_4d", "simple_video_sample_4d2")
    return {name: importlib.import_module(f"scripts.sampling.{name}") for name in names}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A photo of an odd size, an object without background, a video of it."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.RandomState(0)
    Image.fromarray(rng.randint(0, 256, (70, 91, 3), dtype=np.uint8)).save("photo.png")
    thing = np.zeros((30, 40, 4), np.uint8)
    thing[10:20, 5:20] = rng.randint(0, 256, (10, 15, 4))
    thing[10:20, 5:20, 3] = 255
    (tmp_path / "moving").mkdir()
    for i in range(4):
        Image.fromarray(np.roll(thing, 4 * i, axis=1)).save(f"moving/{i}.png")
    return tmp_path


def flags(config, **given):
    named = {"config": TINY / f"{config}.yaml", "num_steps": 2, "device": "cpu", **given}
    return [f"--{name}={value}" for name, value in named.items()]


def test_a_picture_becomes_a_video_and_memory_of_decoding_is_bounded(scripts, folder, monkeypatch, capsys):
    seen = []
    decode = video.decode_in_chunks

    def counted(model, latents, decoding_t):
        decoder = model.first_stage_model.decoder
        decoder.register_forward_pre_hook(
            lambda _, args, options: seen.append((len(args[0]), options["timesteps"])), with_kwargs=True
        )
        return decode(model, latents, decoding_t)

    monkeypatch.setattr(video, "decode_in_chunks", counted)
    argv = ["--input_path", "photo.png", *flags("svd", num_frames=5, decoding_t=2, output_folder="out")]
    main = scripts["simple_video_sample"].main
    torch.manual_seed(0)  # decides the weights
    assert main(argv) == 0 and seen == [(2, 2), (2, 2), (1, 1)]  # the decoder of video knows its frames
    assert sorted(p.name for p in Path("out").iterdir()) == ["000000.jpg", "000000.mp4"]
    assert Image.open("out/000000.jpg").size == (64, 64)  # 91x70, cut down to multiples of 64
    frames = read_video("out/000000.mp4", 5)
    assert len(frames) == 5 and frames[0].size == (64, 64)
    assert "2 files in out" in capsys.readouterr().out
    torch.manual_seed(0)
    assert main([*argv, "--verbose"]) == 0  # nothing is overwritten, and the seed decides
    first, again = (Path(f"out/00000{i}.mp4").read_bytes() for i in (0, 1))
    assert first == again


def test_a_folder_of_pictures_makes_a_video_each_and_ctrl_c_keeps_the_finished_ones(
    scripts, folder, monkeypatch
):
    script, calls = scripts["simple_video_sample"], []

    def animate(model, values, count, decoding_t, is_orbit):
        calls.append(values)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return torch.zeros(count, 3, 64, 64)

    monkeypatch.setattr(script, "animate", animate)
    for i in range(4):
        Image.new("RGB", (64, 64), (60 * i, 0, 0)).save(f"moving/{i}.png")
    assert script.main([*flags("svd", input_path="moving", num_frames=2, output_folder="out")]) == 130
    assert sorted(p.name for p in Path("out").glob("*.mp4")) == ["000000.mp4", "000001.mp4"]


def test_an_orbit_ends_with_the_object_on_white(scripts, folder, monkeypatch):
    script = scripts["simple_video_sample"]
    monkeypatch.setattr(script, "ORBIT_SIZE", 64)
    argv = flags(
        "sv3d_p",
        version="sv3d_p",
        input_path="moving/0.png",
        num_frames=3,
        output_folder="out",
        image_frame_ratio=1,
    )
    assert script.main([*argv, "--elevations_deg=[0, 5, 10]", "--azimuths_deg", "90,180,360"]) == 0
    given, last = Image.open("out/000000.jpg"), read_video("out/000000.mp4", 3)[-1]
    assert np.abs(np.asarray(given).astype(int) - np.asarray(last)).mean() < 12  # but for compression


def test_sv4d_makes_eight_views_of_a_video_from_sv3ds_orbit(scripts, folder):
    argv = flags(
        "sv4d",
        input_path="moving",
        num_steps=1,
        img_size=16,
        output_folder="out",
        sv3d_config=TINY / "sv3d_p.yaml",
    )
    assert (
        scripts["simple_video_sample_4d"].main(
            [*argv, "--sv3d_version=sv3d_p", "--encoding_t=40", "--decoding_t=40"]
        )
        == 0
    )
    names = ["diag", "process_input", "t000", *(f"v{v:03}" for v in range(1, 9))]
    assert sorted(p.name for p in Path("out").iterdir()) == [f"000000_{name}.mp4" for name in names]
    views = [read_video(f"out/000000_v00{v}.mp4", 21) for v in (3, 4)]
    assert views[0][7].tobytes() != views[1][7].tobytes() != views[1][8].tobytes()
    assert read_video("out/000000_t000.mp4", 9)[0].size == (16, 16)


def test_sv4d2_makes_four_views_of_a_video_with_weights_named_after_the_model(scripts, folder):
    script = scripts["simple_video_sample_4d2"]
    model = load_model_from_config(OmegaConf.load(TINY / "sv4d2.yaml"), None)
    torch.save({"state_dict": model.state_dict()}, "sv4d2.ckpt")
    argv = flags(
        "sv4d2",
        input_path="moving",
        num_steps=1,
        img_size=16,
        output_folder="out",
        model_path="sv4d2.ckpt",
        n_frames=13,
    )
    assert script.main([*argv, "--decoding_t=48"]) == 0
    names = ["diag", "process_input", "t000", *(f"v{v:03}" for v in range(1, 5))]
    assert sorted(p.name for p in Path("out/sv4d2").iterdir()) == [f"000000_{name}.mp4" for name in names]


@pytest.mark.parametrize(
    ("name", "argv", "message"),
    [
        ("", ["--version=svdd"], "--version svdd is unknown. Did you mean 'svd'?"),
        ("", ["--input_path=absent.png"], "--input_path absent.png: there is no such file or folder"),
        ("", ["--input_path=photo.png", "--config=absent.yaml"], "there is no configuration absent.yaml"),
        ("", ["--input_path=photo.png"], "there are no weights checkpoints/svd.safetensors"),
        ("", ["--input_path=photo.png", "--version=sv3d_p", "--elevations_deg=[1,2]"], "elevations_deg holds 2 numbers; one, or 21"),
        ("", ["--input_path=photo.png", "--device=tpu"], "--device tpu: this machine has"),
        ("_4d", ["--sv3d_version=svd"], "--sv3d_version svd is unknown"),
        ("_4d", ["--input_path=absent.mp4"], "--input_path absent.mp4: there is no such file or folder"),
        ("_4d2", ["--model_path=other.safetensors"], "must be one of sv4d2, sv4d2_8views"),
        ("_4d2", ["--n_frames=5"], "--n_frames 5: this model needs 12 or more"),
        ("_4d2", ["--azimuths_deg=[0,1]"], "azimuths_deg holds 2 numbers; one, or 5"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_sentence(scripts, folder, capsys, name, argv, message):
    assert scripts[f"simple_video_sample{name}"].main(argv) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_flags_that_are_no_numbers_are_refused(scripts, capsys):
    parse = scripts["simple_video_sample"].get_parser().parse_args
    for argv in (
        ["--elevations_deg=high"],
        ["--azimuths_deg=[]"],
        ["--verbose=maybe"],
        ["--elevations_deg=['a']"],
    ):
        with pytest.raises(SystemExit):
            parse(argv)
        assert "is neither" in capsys.readouterr().err
    assert parse(["--azimuths_deg", "7", "--verbose", "True"]).azimuths_deg == [7.0]


def test_flags_that_a_model_is_not_told_are_said(scripts, folder, monkeypatch, caplog):
    script = scripts["simple_video_sample"]
    monkeypatch.setattr(script, "animate", lambda *_: torch.zeros(2, 3, 64, 64))
    argv = flags("svd", input_path="photo.png", num_frames=2, output_folder="out")
    assert script.main(argv) == 0 and "has no effect" not in caplog.text
    assert script.main([*argv, "--azimuths_deg=0,90", "--image_frame_ratio=0.5"]) == 0
    assert [m for m in caplog.messages if "has no effect" in m] == [
        "--azimuths_deg has no effect on svd", "--image_frame_ratio has no effect on svd",
    ]  # fmt: skip
    unheeded = {}
    for name, each in scripts.items():
        texts = {action.dest: action.help for action in each.get_parser()._actions}
        unheeded[name] = [flag for flag, text in texts.items() if "without effect" in (text or "")]
    assert list(unheeded.values()) == [
        [],
        ["fps_id", "motion_bucket_id"],
        ["fps_id", "motion_bucket_id", "cond_aug"],
    ]


def test_published_defaults_stand(scripts):
    opt = {name: vars(script.get_parser().parse_args([])) for name, script in scripts.items()}
    svd, sv4d, sv4d2 = opt.values()
    assert (svd["fps_id"], svd["motion_bucket_id"], svd["seed"], svd["decoding_t"], svd["version"]) == (
        6,
        127,
        23,
        14,
        "svd",
    )
    assert (sv4d["num_steps"], sv4d["encoding_t"], sv4d["decoding_t"], sv4d["image_frame_ratio"]) == (
        20,
        8,
        4,
        0.917,
    )
    assert (sv4d2["num_steps"], sv4d2["n_frames"], sv4d2["elevations_deg"], sv4d2["image_frame_ratio"]) == (
        50,
        21,
        0.0,
        0.9,
    )
    models = {name: (m.num_frames, m.num_steps, m.cond_aug) for name, m in video.VIDEO_MODELS.items()}
    assert models == {
        "svd": (14, 25, 0.02), "svd_xt": (25, 30, 0.02), "svd_xt_1_1": (25, 30, 0.02), "svd_image_decoder": (14, 25, 0.02),
        "svd_xt_image_decoder": (25, 30, 0.02), "sv3d_u": (21, 50, 1e-5), "sv3d_p": (21, 50, 1e-5),
    }  # fmt: skip
    for model in video.VIDEO_MODELS.values():
        assert (ROOT / video.CONFIGS / model.config).is_file()
