"""The command line, from YAML and flags to a trained, saved and resumed run."""

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from taming.checkpoint import load_checkpoint
from taming.training import cli
from taming.training.folders import RunFolder, UsageError

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def config(tmp_path, tiny):
    """A KL autoencoder on random pictures, a few steps long."""
    contents = {
        "model": {"base_learning_rate": 1.0e-4, **tiny.kl},
        "data": {
            "target": "main.DataModuleFromConfig",
            "params": {
                "batch_size": 2, "num_workers": 0,
                "train": {"target": "random_pictures.Pictures", "params": {"n": 8}},
                "validation": {"target": "random_pictures.Pictures", "params": {"n": 2}},
                "test": {"target": "random_pictures.Pictures", "params": {"n": 2}},
            },
        },
        "lightning": {"trainer": {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}},
    }  # fmt: skip
    (tmp_path / "random_pictures.py").write_text(
        "import torch\n\n\nclass Pictures:\n    def __init__(self, n):\n        self.n = n\n\n    def __len__(self):\n        return self.n\n\n"
        "    def __getitem__(self, i):\n        return {'image': torch.rand(16, 16, 3, generator=torch.Generator().manual_seed(i)) * 2 - 1, 'index': i, 'caption': 'red heart'}\n"
    )
    OmegaConf.save(OmegaConf.create(contents), tmp_path / "tiny.yaml")
    return tmp_path / "tiny.yaml"


@pytest.fixture
def text_config(config, tiny):
    """The same pictures, for a text-conditional latent diffusion model over that autoencoder."""
    contents = OmegaConf.load(config)
    model = tiny.latent_diffusion(
        first_stage_config=tiny.kl, cond_stage_config=tiny.text, first_stage_key="image", cond_stage_key="caption",
        cond_stage_trainable=True, scale_by_std=True, cache_latents=True, use_ema=True,
    )  # fmt: skip
    contents.model = {"base_learning_rate": 1.0e-4, **model}
    contents.lightning.callbacks = {"image_logger": {"params": {"disabled": True}}}
    OmegaConf.save(contents, config.with_name("text.yaml"))
    return config.with_name("text.yaml")


DISC_START = 3
VQ = {
    "target": "taming.models.vqgan.VQModel",
    "params": {"n_embed": 12, "embed_dim": 4, "ema_decay": 0.9, "lossconfig": {"target": "taming.modules.losses.DummyLoss"}},
}  # fmt: skip


@pytest.fixture
def vqgan_config(config, tiny):
    """The same pictures, for a VQGAN with an average, whose discriminator sets in after a few batches."""
    contents = OmegaConf.load(config)
    loss = {
        "target": "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator",
        "params": {"disc_start": DISC_START, "disc_ndf": 8, "disc_num_layers": 1, "perceptual_weight": 0.0},
    }
    params = {**VQ["params"], "ddconfig": {**tiny.ddconfig, "double_z": False}, "lossconfig": loss}
    contents.model = {"base_learning_rate": 1.0e-4, "target": VQ["target"], "params": params}
    contents.lightning.callbacks = {"image_logger": {"params": {"disabled": True}}}
    OmegaConf.save(contents, config.with_name("vqgan.yaml"))
    return config.with_name("vqgan.yaml")


@pytest.fixture
def tokens_config(config, tiny):
    """The same pictures, for a transformer over the codes of such a VQGAN, with an average."""
    contents = OmegaConf.load(config)
    first_stage = {**VQ, "params": {**VQ["params"], "ddconfig": {**tiny.ddconfig, "double_z": False}}}
    gpt = {"vocab_size": 12, "block_size": 80, "n_layer": 1, "n_head": 2, "n_embd": 16}
    params = {
        "transformer_config": {"target": "taming.modules.transformer.mingpt.GPT", "params": gpt},
        "first_stage_config": first_stage,
        "cond_stage_config": "__is_unconditional__",
        "use_ema": True,
    }
    target = "taming.models.cond_transformer.Net2NetTransformer"
    contents.model = {"base_learning_rate": 1.0e-4, "target": target, "params": params}
    contents.lightning.callbacks = {"image_logger": {"params": {"disabled": True}}}
    OmegaConf.save(contents, config.with_name("tokens.yaml"))
    return config.with_name("tokens.yaml")


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("random_pictures", None)


def run(*argv):
    return cli.main([str(a) for a in argv])


def only_run(folder="logs"):
    (found,) = [p for p in Path(folder).iterdir() if p.is_dir()]
    return found


def test_a_run_leaves_checkpoints_configs_pictures_a_curve_and_words(config, capsys, caplog):
    with caplog.at_level(logging.INFO):
        assert (
            run(
                "-b",
                config,
                "-t",
                "lightning.callbacks.image_logger.params.batch_frequency=2",
                "lightning.callbacks.loss_curve.params.every_n_steps=1",
            )
            == 0
        )
    logdir = only_run()
    assert logdir.name.endswith("_tiny")
    assert (logdir / "checkpoints" / "last.ckpt").is_file()
    saved = sorted(p.name.split("-", 5)[-1] for p in (logdir / "configs").iterdir())
    assert saved == ["lightning.yaml", "project.yaml"]
    pictures = {p.name.split("_gs")[0] for p in (logdir / "images" / "train").iterdir()}
    assert pictures == {"inputs", "reconstructions", "samples"}
    assert (logdir / "loss_curve.png").stat().st_size > 5000
    assert len(list((logdir / "csv").glob("*/metrics.csv"))) == 1
    assert (
        "Learning rate 2.00e-04 = 1 (accumulate_grad_batches) × 1 (devices) × 2 (batch size) × 1.00e-04"
        in caplog.text
    )
    assert "Trained 4 steps" in caplog.text and f"python main.py -t -r {logdir}" in caplog.text
    assert "test/psnr" in capsys.readouterr().out  # the test split runs afterwards


def test_overrides_and_trainer_shorthands_win_over_the_files(config):
    assert (
        run(
            "-b",
            config,
            "-t",
            "--no-test",
            "--scale_lr",
            "no",
            "-n",
            "named",
            "-f",
            "_x",
            "trainer.max_steps=1",
            "model.params.embed_dim=2",
        )
        == 0
    )
    logdir = only_run()
    assert logdir.name.endswith("_named_x")
    checkpoint = load_checkpoint(logdir / "checkpoints" / "last.ckpt")
    assert checkpoint["global_step"] == 1
    assert checkpoint["state_dict"]["quant_conv.weight"].shape[0] == 4
    assert checkpoint["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(1e-4)


def test_several_files_merge_from_left_to_right(config, tmp_path):
    (tmp_path / "more.yaml").write_text(
        "lightning: {trainer: {max_steps: 2}}\nmodel: {params: {image_key: image}}\n"
    )
    merged = cli.load_config([str(config), str(tmp_path / "more.yaml")], ["model.params.embed_dim=5"])
    assert (
        merged.lightning.trainer.max_steps,
        merged.lightning.trainer.max_epochs,
        merged.model.params.embed_dim,
    ) == (2, 1, 5)


def test_a_resumed_run_stays_in_its_folder_and_continues(config, caplog):
    assert run("-b", config, "-t", "--no-test") == 0
    logdir = only_run()
    with caplog.at_level(logging.INFO):
        assert run("-r", logdir, "-t", "--no-test", "--max_epochs", "3") == 0
    assert only_run() == logdir
    checkpoint = load_checkpoint(logdir / "checkpoints" / "last.ckpt")
    assert (checkpoint["global_step"], checkpoint["batch_counter"]) == (12, 12)
    curve = next(v for k, v in checkpoint["callbacks"].items() if "LossCurve" in k)
    assert curve["points"] is not None


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "nothing to run"),
        (["-b", "absent.yaml"], "there is no configuration absent.yaml"),
        (["-b", "{config}", "-n", "x", "-r", "logs/y"], "cannot be used together"),
        (["-r", "logs/absent"], "cannot resume"),
        (["-b", "{config}", "--max_epoch", "1"], "Did you mean '--max_epochs'"),
        (["-b", "{config}", "lightning.trainer.max_step=1"], "lightning.trainer.max_step"),
        (
            ["-b", "{config}", "model.params.embed_dmi=1"],
            r"has no parameter 'embed_dmi'. Did you mean 'embed_dim'",
        ),
        (["-b", "{config}", "data.params.train.target=random_pictures.Pictuers"], "Did you mean 'Pictures'"),
        (["-b", "{config}", "model.target="], "no section `model` with a `target`|must be a dotted path"),
    ],
)
def test_a_wrong_command_line_is_one_clear_sentence_and_status_2(config, capsys, argv, message):
    import re

    assert run(*(a.format(config=config) for a in argv)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and re.search(message, error)


def test_yaml_that_is_none_says_where(tmp_path, capsys):
    (tmp_path / "broken.yaml").write_text("model: {target: x\ndata: [")
    assert run("-b", "broken.yaml", "-t") == 2
    assert "broken.yaml is no valid YAML" in capsys.readouterr().err


def test_sgm_configurations_train_by_default_and_do_not_scale_the_rate(tmp_path, config, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        cli,
        "effective_learning_rate",
        lambda config, scale, devices, accumulate: seen.setdefault("scale", scale) and None,
    )
    monkeypatch.setattr(cli.Trainer, "fit", lambda self, *a, **k: seen.setdefault("trained", True))
    monkeypatch.setattr(
        cli,
        "instantiate_from_config",
        lambda c, original=cli.instantiate_from_config: original(
            {**c, "target": c["target"].removeprefix("sgm.")}
        ),
    )
    assert run("-b", config, "--no-test", "model.target=sgm.ldm.models.autoencoder.AutoencoderKL") == 0
    assert seen == {"scale": False, "trained": True}


def test_an_exception_while_training_saves_what_was_learned(config, tmp_path):
    pictures = tmp_path / "random_pictures.py"
    pictures.write_text(
        pictures.read_text()
        + "\n\nclass Failing(Pictures):\n    def __getitem__(self, i):\n        if i == 5:\n            raise RuntimeError('the disk is gone')\n        return super().__getitem__(i)\n"
    )
    with pytest.raises(RuntimeError, match="the disk is gone"):
        run("-b", config, "-t", "data.params.train.target=random_pictures.Failing", "-s", "1")
    assert load_checkpoint(only_run() / "checkpoints" / "last.ckpt")["global_step"] >= 1


def test_debug_runs_are_moved_aside(config):
    import unittest.mock

    with unittest.mock.patch("pdb.post_mortem"):
        assert run("-b", config, "-t", "-d", "--no-test", "--max_steps", "1") == 0
    assert only_run("logs/debug_runs").name.endswith("_tiny")


def test_names_of_run_folders(tmp_path):
    def name(*argv):
        return RunFolder(cli.parse(argv)[0]).name

    assert name("-b", "configs/a/b.yaml", "--no_date") == "b"
    assert name("-b", "configs/a/b.yaml", "--no_date", "--legacy_naming") == "a_b"
    assert name("-b", "b.yaml", "-n", "x", "-f", "_1").endswith("_x_1")
    assert "b" not in name("-b", "b.yaml", "--no_base_name").split("T")[1]
    with pytest.raises(UsageError, match="no checkpoints/last.ckpt"):
        (tmp_path / "logs" / "empty").mkdir(parents=True)
        RunFolder(cli.parse(["-r", "logs/empty"])[0])


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="the signal does not exist on Windows")
def test_sigusr1_saves_a_checkpoint():
    saved = []
    before = signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGUSR2)
    try:
        cli.install_signal_handlers(lambda: saved.append(True))
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.01)
    finally:
        signal.signal(signal.SIGUSR1, before[0])
        signal.signal(signal.SIGUSR2, before[1])
    assert saved == [True]


@pytest.mark.parametrize(
    "which",
    ["config", "text_config", "vqgan_config", "tokens_config"],
    ids=["autoencoder", "text2img", "vqgan", "tokens"],
)
def test_a_killed_run_continues_from_its_last_checkpoint(which, request):
    """SIGKILL in the middle, then -r: counters go on, and the first process' checkpoint was whole."""
    config = request.getfixturevalue(which)
    often = "lightning.modelcheckpoint.params.every_n_train_steps=2"
    command = [sys.executable, str(ROOT / "main.py"), "-b", str(config), "-t", "--no-test", "--max_epochs", "200", often,
               "lightning.modelcheckpoint.params.save_top_k=1"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(config.parent)}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
    try:
        for _ in range(600):
            found = list(Path("logs").glob("*/checkpoints/last.ckpt"))
            if found and load_checkpoint(found[0])["global_step"] >= 6:
                break
            assert process.poll() is None, process.stderr.read().decode()
            time.sleep(0.1)
        else:
            pytest.fail("no checkpoint within a minute")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    logdir = only_run()
    saved = load_checkpoint(logdir / "checkpoints" / "last.ckpt")
    target = saved["global_step"] + 4
    assert run("-r", logdir, "-t", "--no-test", "--max_steps", target, often) == 0
    resumed = load_checkpoint(logdir / "checkpoints" / "last.ckpt")
    assert resumed["global_step"] == target
    for name in ("batch_counter", "scale_factor"):  # a first stage counts batches; latents keep their scale
        for where in (saved, saved["state_dict"]):
            if name in where:
                after = resumed[name] if where is saved else resumed["state_dict"][name]
                assert after == (target if name == "batch_counter" else where[name])
    if which == "text_config":
        assert saved["state_dict"]["scale_factor"] != 1
    if which == "vqgan_config":  # the discriminator began at its batch, not at that of the resumed process
        rested = int(torch.as_tensor(resumed["optimizer_states"][1]["state"][0]["step"]))
        assert rested == target - DISC_START
        assert len(resumed["recent_codes"]) > len(saved["recent_codes"])
    if which != "config":
        updates = [int(v["state_dict"]["model_ema.num_updates"]) for v in (saved, resumed)]
        # callbacks save before the model's own hook moves the average: each save may be one update behind
        assert saved["global_step"] - updates[0] in (0, 1)
        assert target - updates[1] in (0, 1, 2)
    steps = resumed["optimizer_states"][0]["state"][0]["step"]
    assert int(torch.as_tensor(steps)) == target  # the optimizer went on, too


def test_the_published_configuration_for_own_images_trains_on_a_list_of_them(tmp_path):
    for i in range(4):
        Image.new("RGB", (80 + i, 70), (60 * i, 90, 30)).save(tmp_path / f"{i}.png")
    (tmp_path / "own.txt").write_text("\n".join(str(tmp_path / f"{i}.png") for i in range(4)))
    small = ["model.params.ddconfig.ch=32", "model.params.ddconfig.resolution=64", "model.params.n_embed=16",
             "model.params.lossconfig.params.perceptual_weight=0", "data.params.num_workers=0", "data.params.batch_size=2"]  # fmt: skip
    lists = [f"data.params.{s}.params.{k}_images_list_file=own.txt" for s, k in (("train", "training"), ("validation", "test"))]  # fmt: skip
    sizes = [f"data.params.{s}.params.size=64" for s in ("train", "validation")]
    assert (
        run("-b", ROOT / "configs/custom_vqgan.yaml", "-t", "--max_steps", "2", *small, *lists, *sizes) == 0
    )
    logdir = only_run()
    assert list((logdir / "images" / "train").glob("reconstructions_*.png"))
    assert load_checkpoint(logdir / "checkpoints" / "last.ckpt")["batch_counter"] == 2


def test_last_ckpt_is_the_latest_state_past_the_best_one_and_between_two_saves(config, tmp_path):
    (tmp_path / "worsening.py").write_text(
        "from ldm.models.autoencoder import AutoencoderKL\n\n\nclass Worsening(AutoencoderKL):\n"
        "    def on_validation_epoch_end(self):\n        self.log('val/worse', float(self.current_epoch))\n"
    )
    flags = ["model.target=worsening.Worsening", "model.params.monitor=val/worse", "lightning.modelcheckpoint.params.save_top_k=1"]  # fmt: skip
    assert run("-b", config, "-t", "--no-test", "--max_epochs", "3", *flags) == 0
    logdir = only_run()
    assert sorted(p.name for p in (logdir / "checkpoints").iterdir()) == ["epoch=000000.ckpt", "last.ckpt"]
    assert load_checkpoint(logdir / "checkpoints" / "last.ckpt")["global_step"] == 12
    every = "lightning.modelcheckpoint.params.every_n_train_steps=3"
    assert (
        run("-b", config, "-t", "--no-test", "--max_steps", "7", "--max_epochs", "9", "-l", "other", every)
        == 0
    )
    (between,) = Path("other").glob("*/checkpoints/last.ckpt")
    assert load_checkpoint(between)["global_step"] == 7


def test_data_parallel_runs_allow_weights_without_a_gradient():
    """Lightning 1 looked for unused parameters; Lightning 2's plain `ddp` hangs at the first one."""
    for manual in (False, True):
        model = type("Model", (), {"automatic_optimization": not manual})()
        kwargs = {"strategy": "ddp", "accumulate_grad_batches": 2}
        cli.hand_over_manual_options(model, kwargs)
        assert kwargs.pop("strategy") == "ddp_find_unused_parameters_true"
        assert (kwargs, getattr(model, "accumulate_grad_batches", None)) == (
            ({}, 2) if manual else ({"accumulate_grad_batches": 2}, None)
        )
