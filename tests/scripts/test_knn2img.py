"""scripts/knn2img.py and scripts/train_searcher.py, end to end with a tiny model, a tiny CLIP and a tiny database."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from ldm.data import retrieval
from ldm.data.retrieval import RetrievalDatabase, Searcher
from taming.modules.ema import LitEma
from taming.util import instantiate_from_config

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def scripts():
    sys.path.insert(0, str(ROOT))
    return {name: importlib.import_module(f"scripts.{name}") for name in ("knn2img", "train_searcher")}


@pytest.fixture
def knn2img(scripts):
    return scripts["knn2img"].main


@pytest.fixture
def train_searcher(scripts):
    return scripts["train_searcher"].main


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def model(tiny):
    """A checkpoint beside its configuration, shaped as the published one: vectors come from outside."""
    config = {
        "model": tiny.latent_diffusion(
            first_stage_config=tiny.kl, cond_stage_key="nix", cond_stage_trainable=False, use_ema=True
        )
    }
    folder = Path("models/rdm")
    folder.mkdir(parents=True)
    OmegaConf.save(OmegaConf.create(config), folder / "config.yaml")
    model = instantiate_from_config(OmegaConf.create(config).model)
    torch.nn.init.normal_(model.model.diffusion_model.out[2].weight, std=0.1)
    for name, p in model.model.diffusion_model.named_parameters():
        if "proj_out" in name:  # zero in a fresh model, which would not look at its context
            torch.nn.init.normal_(p, std=0.5)
    model.model_ema = LitEma(model.model)
    torch.save({"state_dict": model.state_dict(), "global_step": 1}, folder / "model.ckpt")
    return folder


@pytest.fixture
def database():
    folder = Path("data/rdm/retrieval_databases/artbench-surrealism")
    folder.mkdir(parents=True)
    vectors = np.random.default_rng(0).standard_normal((20, 8)).astype(np.float32)
    np.savez(folder / "part.npz", embedding=vectors, img_id=np.arange(20), patch_coords=np.zeros((20, 4)))
    return folder


@pytest.fixture
def base(model, clip_folder):
    return ["--ckpt", str(model), "--clip_type", str(clip_folder), "--ddim_steps", "2", "--device", "cpu", "--outdir", "out"]  # fmt: skip


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_the_published_flags_and_defaults_are_there(scripts):
    opt = scripts["knn2img"].get_parser().parse_args([])
    expected = {
        "outdir": None, "skip_grid": False, "steps": 50, "n_repeat": 1, "plms": False, "ddim_eta": 0.0, "n_iter": 1, "n_samples": 3,
        "n_rows": 0, "scale": 5.0, "from_file": None, "ckpt": "models/rdm/rdm768x768/model.ckpt", "clip_type": "ViT-L/14",
        "use_neighbors": False, "knn": 10, "database": "artbench-surrealism",
    }  # fmt: skip
    assert {name: getattr(opt, name) for name in expected} == expected
    opt = scripts["train_searcher"].get_parser().parse_args([])
    assert (opt.database, opt.target_path, opt.knn) == (
        "data/rdm/retrieval_databases/openimages", "data/rdm/searchers/openimages", 20
    )  # fmt: skip


def test_a_prompt_alone_and_with_its_neighbours(knn2img, base, database, capsys):
    assert knn2img(["--prompt", "a fox", *base]) == 0
    files = sorted(str(p.relative_to("out")) for p in Path("out").rglob("*.png"))
    assert files == ["grid-0000.png", "samples/00000.png", "samples/00001.png", "samples/00002.png"]
    notes = Image.open("out/samples/00000.png").text
    assert notes["prompt"] == "a fox" and notes["scale"] == "5.0" and "database" not in notes
    assert knn2img(["--prompt", "a fox", *base, "--use_neighbors", "--knn", "4", "--outdir", "knn"]) == 0
    notes = Image.open("knn/samples/00000.png").text
    assert notes["database"] == "artbench-surrealism" and notes["knn"] == "4"
    alone, with_neighbours = (pixels(f"{out}/samples/00000.png") for out in ("out", "knn"))
    assert alone.shape == (16, 16, 3) and np.abs(alone - with_neighbours).max() > 1
    assert "4 files in knn" in capsys.readouterr().out


def test_the_model_is_given_the_prompt_its_neighbours_and_zeros_to_lead_away_from(
    knn2img, base, database, monkeypatch
):
    from ldm.models.diffusion.ddpm import LatentDiffusion

    seen, apply_model = [], LatentDiffusion.apply_model

    def watch(self, x, t, cond, **kwargs):
        seen.append(cond)
        return apply_model(self, x, t, cond, **kwargs)

    monkeypatch.setattr(LatentDiffusion, "apply_model", watch)
    flags = ["--use_neighbors", "--knn", "4", "--n_repeat", "2", "--n_samples", "1", "--skip_grid"]
    assert knn2img(["--prompt", "a fox", *base, *flags]) == 0
    uncond, cond = seen[0]
    assert cond.shape == (6, 8) and not uncond.any()
    assert torch.allclose(cond.norm(dim=-1), torch.ones(6)) and torch.equal(cond[0], cond[1])
    rows = torch.nn.functional.normalize(torch.from_numpy(RetrievalDatabase(database).embedding), dim=-1)
    assert torch.allclose(cond[2:], rows[(rows @ cond[0]).topk(4).indices], atol=1e-6)


def test_prompts_of_a_file_each_have_neighbours_of_their_own(knn2img, base, database):
    Path("prompts.txt").write_text("a fox\na cat\na dog\n")
    flags = ["--from-file", "prompts.txt", "--n_samples", "2", "--use_neighbors", "--plms", "--n_rows", "3"]
    assert knn2img([*base, *flags]) == 0
    assert [Image.open(p).text["prompt"] for p in sorted(Path("out/samples").iterdir())] == ["a fox", "a cat", "a dog"]  # fmt: skip
    assert Image.open("out/grid-0000.png").size == (3 * 18 + 2, 20)


def test_a_lone_checkpoint_takes_the_published_configuration_and_one_with_its_own_keeps_it(scripts, model):
    def config_of(ckpt):
        opt = scripts["knn2img"].get_parser().parse_args(["--ckpt", str(ckpt)])
        scripts["knn2img"].flags.fill_config(opt, scripts["knn2img"].CONFIG)
        return opt.config

    assert config_of(model / "model.ckpt") is None  # found beside the checkpoint when loading
    (model / "config.yaml").unlink()
    published = config_of(model / "model.ckpt")
    assert published == "configs/retrieval-augmented-diffusion/768x768.yaml" and (ROOT / published).is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--use_neighbors", "--database", "nowhere"],
            "there is no folder data/rdm/retrieval_databases/nowhere",
        ),
        (["--use_neighbors", "--knn", "21"], "holds 20 vectors"),
        (["--use_neighbors", "--searcher", "absent"], "there is no searcher absent/searcher.faiss"),
        (["--n_repeat", "0"], "--n_repeat 0"),
        (["--windows", "2"], "here a prompt is one vector"),
        (["--clip_type", "ViT-L/41"], "Did you mean 'ViT-L-14'"),
        (["--clip_type", "models"], "holds no model of open_clip"),
        (["--ckpt", "absent.ckpt"], "there is no folder or file 'absent.ckpt'"),
    ],
)
def test_bad_input_is_one_clear_sentence(knn2img, base, database, capsys, flags, message):
    assert knn2img(["--prompt", "x", *base, *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_a_model_that_encodes_its_own_condition_is_refused(knn2img, base, model, tiny, capsys):
    config = tiny.latent_diffusion(cond_stage_config=tiny.text, cond_stage_key="caption")
    OmegaConf.save(OmegaConf.create({"model": config}), model / "config.yaml")
    torch.save({"state_dict": instantiate_from_config(config).state_dict()}, model / "model.ckpt")
    assert knn2img(["--prompt", "x", *base]) == 2
    assert "conditioned through its own BERTEmbedder, not on vectors" in capsys.readouterr().err


def test_without_faiss_the_command_to_install_it_is_named(knn2img, base, database, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert knn2img(["--prompt", "x", *base, "--use_neighbors"]) == 2
    assert "pip install 'latent-generative-models[retrieval]'" in capsys.readouterr().err


def test_a_database_that_would_not_be_used_is_pointed_out(knn2img, base, database, caplog):
    assert knn2img(["--prompt", "x", *base, "--database", "openimages"]) == 0
    assert "no effect without --use_neighbors" in caplog.text


# ----------------------------------------------------------------------------------------------------- train_searcher


def test_a_searcher_is_made_and_found_again(knn2img, train_searcher, base, database, monkeypatch, capsys):
    monkeypatch.setattr(retrieval, "EXACT_BELOW", 10)
    target = "data/rdm/searchers/artbench-surrealism"
    assert train_searcher(["-d", str(database), "-t", target, "-k", "3"]) == 0
    assert (
        "20 vectors of 8 numbers, " in (out := capsys.readouterr().out) and "% of the 3 nearest found" in out
    )
    assert not Searcher.load(target).is_exact
    monkeypatch.setattr(Searcher, "build", None)  # what lies there is used
    assert knn2img(["--prompt", "x", *base, "--use_neighbors"]) == 0
    assert len(list(Path("out").rglob("*.png"))) == 4


def test_pictures_become_a_database_that_prompts_are_looked_up_in(knn2img, train_searcher, base, clip_folder):
    Path("pictures").mkdir()
    for i in range(5):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(f"pictures/{i}.png")  # fmt: skip
    flags = ["--images", "pictures", "--clip_type", str(clip_folder), "--device", "cpu", "-k", "2"]
    assert train_searcher(["-d", "mine", "-t", "searcher", *flags]) == 0
    database = RetrievalDatabase("mine")
    assert database.embedding.shape == (5, 8) and database.img_id[4] == "4.png"
    flags = ["--use_neighbors", "--database", "mine", "--searcher", "searcher", "--knn", "5", "--skip_grid"]
    assert knn2img(["--prompt", "x", *base, *flags]) == 0
    assert Image.open("out/samples/00000.png").text["database"] == "mine"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-d", "absent"], "there is no folder absent"),
        (["-k", "21"], "--knn 21: there are 20 vectors"),
        (["--images", "absent", "--clip_type", "{clip}"], "part.npz is there already"),
        (["-d", "new", "--images", "absent", "--clip_type", "{clip}"], "there is no folder absent"),
    ],
)
def test_a_searcher_of_nothing_is_refused(train_searcher, database, clip_folder, capsys, flags, message):
    given = [flag.format(clip=clip_folder) for flag in flags]
    assert train_searcher(["-d", str(database), "-t", "target", "--device", "cpu", *given]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and not Path("target").exists()
