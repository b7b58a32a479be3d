"""scripts/optimize: inference-ready copies, and the recorded choice of attention back-ends."""

import importlib
import importlib.util
import json
import math
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from PIL import Image
from safetensors import safe_open

from taming.modules import attention
from taming.util import instantiate_from_config

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def optimize():
    sys.path.insert(0, str(ROOT))
    return lambda name: importlib.import_module(f"scripts.optimize.{name}")


@pytest.fixture
def trained(kinds, tmp_path, monkeypatch):
    """A text model's folder whose averages differ from its live weights."""
    monkeypatch.chdir(tmp_path)
    config = OmegaConf.create(kinds["text"])
    config.params.use_ema = True
    model = instantiate_from_config(config)
    torch.nn.init.normal_(model.model.diffusion_model.out[2].weight, std=0.1)
    model.model_ema.diffusion_modelout2weight.normal_(std=0.1)
    Path("run").mkdir()
    OmegaConf.save(OmegaConf.create({"model": config, "data": {"target": "x"}}), "run/config.yaml")
    torch.save({"state_dict": model.state_dict(), "optimizer_states": [torch.zeros(5000)]}, "run/model.ckpt")
    return model


BASE = ["run", "fast", "--device", "cpu", "--steps", "3", "--prompt", "a cat"]


def test_the_copy_holds_the_averages_in_half_precision_and_draws_the_same_picture(optimize, trained, capsys):
    assert optimize("optimize_sd").main(BASE) == 0
    with safe_open("fast/model.safetensors", framework="pt") as file:
        names = set(file.keys())
        assert not [n for n in names if n.startswith(("model_ema.", "loss."))]
        assert {
            n.removeprefix("model_ema.") for n in trained.state_dict() if not n.startswith("model_ema.")
        } == names
        last = file.get_tensor("model.diffusion_model.out.2.weight")
        assert last.dtype == torch.float16
        assert torch.equal(last, trained.model_ema.diffusion_modelout2weight.half())
        assert file.get_tensor("betas").dtype == torch.float32  # a noise schedule keeps its precision
        assert file.metadata()["source"] == "model.ckpt"
    kept = OmegaConf.load("fast/config.yaml")
    assert list(kept) == ["model"] and kept.model.params.use_ema is False
    report = json.loads(Path("fast/report.json").read_text())
    assert (
        report["after"]["file_bytes"] < 0.35 * report["before"]["file_bytes"]
    )  # no averages, half the digits
    assert report["distance"]["rms"] < 2 and report["distance"]["psnr_db"] > 40
    assert Image.open("fast/before.png").size == Image.open("fast/after.png").size
    shown = capsys.readouterr().out
    assert "seconds a picture" in shown and "distance of the pictures" in shown


def test_a_copy_is_never_overwritten_and_is_itself_a_model(optimize, trained, script, capsys):
    assert optimize("optimize_sd").main([*BASE, "--no_report", "--dtype", "fp32"]) == 0
    assert sorted(p.name for p in Path("fast").iterdir()) == ["config.yaml", "model.safetensors"]
    assert optimize("optimize_sd").main(BASE) == 2
    assert "fast holds a model.safetensors already" in capsys.readouterr().err
    drawn = []
    for ckpt in ("run", "fast"):
        argv = [
            "--ckpt",
            ckpt,
            "--prompt",
            "a",
            "--steps",
            "2",
            "--n_samples",
            "1",
            "--device",
            "cpu",
            "--outdir",
            f"of_{ckpt}",
        ]
        assert script("txt2img").main([*argv, "--n_iter", "1"]) == 0
        drawn.append(Image.open(f"of_{ckpt}/samples/00000.png").tobytes())
    assert drawn[0] == drawn[1]


def test_the_distance_of_pictures_is_that_of_its_definition(optimize):
    a, b = Image.new("RGB", (4, 4), (10, 10, 10)), Image.new("RGB", (4, 4), (13, 13, 13))
    far = optimize("optimize_sd").distance(a, b)
    assert far["rms"] == 3 and far["largest"] == 3
    assert math.isclose(far["psnr_db"], 20 * math.log10(255 / 3))
    assert optimize("optimize_sd").distance(a, a)["psnr_db"] == math.inf


def test_bfloat16_weights_stay_so_in_memory(optimize, trained):
    assert optimize("optimize_sd").main([*BASE, "--dtype", "bf16"]) == 0
    report = json.loads(Path("fast/report.json").read_text())
    assert report["after"]["weights_bytes"] < 0.45 * report["before"]["weights_bytes"]
    assert report["distance"]["rms"] < 8


def test_quantising_without_torchao_says_what_to_install(optimize, trained, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torchao", None)
    assert optimize("optimize_sd").main([*BASE, "--no_report", "--quantize", "int8"]) == 2
    assert "python -m pip install torchao" in capsys.readouterr().err


@pytest.fixture
def torchao(monkeypatch):
    """torchao; where it is not installed, what rounds weights to 8 bits in its place, under the names that are used of it."""
    if importlib.util.find_spec("torchao") is not None:
        return

    def quantize_(model, config, filter_fn):
        for name, module in model.named_modules():
            if filter_fn(module, name):
                scale = module.weight.detach().abs().amax(1, keepdim=True) / 127
                module.weight = torch.nn.Parameter(
                    (module.weight / scale).round() * scale, requires_grad=False
                )

    quantization = types.ModuleType("torchao.quantization")
    quantization.quantize_ = quantize_
    quantization.Int8WeightOnlyConfig = quantization.Float8WeightOnlyConfig = object
    support = types.ModuleType("torchao.prototype.safetensors.safetensors_support")
    support.flatten_tensor_state_dict = lambda state: (
        dict(state),
        {"tensor_names": json.dumps(sorted(state))},
    )
    support.unflatten_tensor_state_dict = lambda tensors, metadata: (
        {name: tensors[name] for name in json.loads(metadata["tensor_names"])}, {},
    )  # fmt: skip
    safetensors = types.ModuleType("torchao.prototype.safetensors")
    safetensors.safetensors_support = support
    top, prototype = types.ModuleType("torchao"), types.ModuleType("torchao.prototype")
    top.quantization = quantization
    for module in (top, quantization, prototype, safetensors, support):
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_quantised_copy_is_read_back_as_it_was_written(optimize, trained, torchao, kind):
    from ldm import inference, quantization

    assert optimize("optimize_sd").main([*BASE, "--quantize", kind]) == 0
    assert quantization.quantization_of("fast/model.safetensors") == kind
    model, _, _ = inference.load_model("fast", None, torch.device("cpu"))
    linear = model.model.diffusion_model.time_embed[0]
    own = instantiate_from_config(OmegaConf.load("run/config.yaml").model)
    own.load_state_dict(torch.load("run/model.ckpt", weights_only=True)["state_dict"])
    with own.ema_scope():
        exact = own.model.diffusion_model.time_embed[0].weight.detach().clone()
    eye = torch.eye(exact.shape[1])
    rounded = (linear(eye) - linear.bias).T  # what the layer multiplies by
    error = (rounded - exact).abs().amax(1) / exact.abs().amax(1)
    assert 0 < error.max() < (0.01 if kind == "int8" else 0.07)
    report = json.loads(Path("fast/report.json").read_text())
    assert report["distance"]["rms"] < 12
    assert (
        report["after"]["weights_bytes"] < report["before"]["weights_bytes"]
    )  # at least the averages are gone


# ---------------------------------------------------------------------------------------------------------- attention


@pytest.fixture
def record(tmp_path, monkeypatch):
    path = tmp_path / "cache" / "attention.json"
    monkeypatch.setenv("TAMING_ATTENTION", str(path))
    attention.recorded_choices.cache_clear()
    yield path
    attention.recorded_choices.cache_clear()


def test_the_calls_of_a_model_are_listed_without_memory_and_recorded(
    optimize, record, kinds, tmp_path, monkeypatch, capsys
):
    config = {**kinds["text"]}
    OmegaConf.save(OmegaConf.create({"model": config}), tmp_path / "tiny.yaml")
    module = optimize("optimize_attention")
    calls = module.calls_of(OmegaConf.load(tmp_path / "tiny.yaml"), 16, 32, 3)
    # the network: latents of 8×16, halved once: 32 queries to themselves and to the text, six pictures with guidance.
    # Seven transformers: one down, one in the middle, two up, … ; the first stage attends in the middle of its decoder
    shapes = {(c.batch, c.heads, c.queries, c.keys, c.channels) for c in calls}
    assert shapes == {(6, 2, 32, 32, 32), (6, 2, 32, 77, 32), (3, 1, 128, 128, 64)}
    argv = [
        "--config",
        str(tmp_path / "tiny.yaml"),
        "--H",
        "16",
        "--W",
        "16",
        "--device",
        "cpu",
        "--seconds",
        "0.001",
    ]
    asked = []  # listing takes long, and was looked at above
    monkeypatch.setattr(module, "calls_of", lambda config, *size: asked.append(size) or calls)
    assert module.main([*argv, "--dry_run"]) == 0 and not record.exists()
    assert module.main(argv) == 0
    [machine] = json.loads(record.read_text())
    assert machine == attention.machine_name(torch.device("cpu"))
    assert asked == [(16, 16, 1)] * 2 and "float32 2x32 32x77" in capsys.readouterr().out


def test_a_choice_is_recorded_only_where_it_clearly_beats_the_default(optimize, record):
    module = optimize("optimize_attention")
    assert module.choose({"default": 1.0, "math": 0.9, "explicit": 1.1}) == "math"
    assert module.choose({"default": 1.0, "math": 0.97}) is None
    module.record({"a": "math", "b": "explicit"}, "here", record)
    module.record({"a": None, "c": "math"}, "here", record)
    module.record({"a": "math"}, "there", record)
    assert json.loads(record.read_text()) == {"here": {"b": "explicit", "c": "math"}, "there": {"a": "math"}}


@pytest.mark.parametrize("backend", ["explicit", "math", "flash", "cudnn"])
def test_attention_follows_the_record_and_gives_the_same_numbers(record, backend):
    q, k, v = torch.randn(2, 5, 8), torch.randn(2, 7, 8), torch.randn(2, 7, 8)
    expected = attention.attention(q, k, v, heads=2)
    machine = attention.machine_name(torch.device("cpu"))
    record.parent.mkdir()
    record.write_text(json.dumps({machine: {"float32 2x4 5x7": backend}}))
    attention.recorded_choices.cache_clear()
    calls = []
    original = F.scaled_dot_product_attention

    def seen(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(F, "scaled_dot_product_attention", seen)
        assert torch.allclose(attention.attention(q, k, v, heads=2), expected, atol=1e-6)
        assert bool(calls) == (backend != "explicit")
        attention.attention(q, k, v, heads=1)  # a call of another shape
        assert len(calls) == 1 + (backend != "explicit")
    attention.attention(q, k, v, heads=2)  # with gradients the record is not asked


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[1]",
        '{"another machine": {"float32 2x4 5x7": "explicit"}}',
        '{"%s": {"float32 2x4 5x7": "magic"}}',
    ],
)
def test_a_record_that_does_not_suit_changes_nothing(record, text):
    record.parent.mkdir()
    record.write_text(text.replace("%s", attention.machine_name(torch.device("cpu"))))
    attention.recorded_choices.cache_clear()
    assert attention.recorded_choices("cpu") == {}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("absent.yaml", "--config absent.yaml: there is no such file"),
        ("configs/quickstart/autoencoder.yaml", "has no network that draws"),
    ],
)
def test_bad_input_is_one_clear_sentence(optimize, record, capsys, config, message):
    path = config if config == "absent.yaml" else str(ROOT / config)
    assert optimize("optimize_attention").main(["--config", path, "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err
