"""What README and the documents promise is there: commands, files, configurations, names."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from taming.training import cli
from taming.util import get_obj_from_str, instantiate_from_config

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [p for p in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("models/*/README.md"))]  # fmt: skip


def blocks(text, language):
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [block for name, block in fenced if name == language]


def commands(text):
    """Every shell command of a document, one argument list each."""
    lines = [line for block in blocks(text, "") for line in block.replace("\\\n", " ").splitlines()]
    return [
        words for line in lines for part in line.split("&&") if (words := shlex.split(part, comments=True))
    ]


def test_ci_runs_the_readmes_commands():
    lines = [c.strip() for c in blocks(README, "") if c.startswith("python -m pip install")]
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    installs, jobs = zip(*(line.split(" && ") for line in lines), strict=True)
    assert len(lines) == 3
    assert all(
        f"python -m pip install --quiet {install.split(' install ')[1]}\n" in ci for install in installs
    )
    draw, train, test = jobs
    assert draw.removeprefix("python scripts/") in ci.replace('"$checkout/scripts/txt2img.py"', "txt2img.py")
    assert train.split(" -t")[0] in ci and test in ci


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_name_scripts_and_flags_that_exist(document):
    for words in commands(document.read_text(encoding="utf-8")):
        if words[0] != "python" or words[1] == "-m":
            continue
        script, arguments = ROOT / words[1], words[2:]
        assert script.is_file(), words
        if script.name == "main.py":
            cli.parse(arguments)
            for base in (a for a in arguments if a.startswith("configs/")):
                assert (ROOT / base).is_file(), base
        elif (parser := getattr(load_script(script), "get_parser", None)) is not None:
            parser().parse_args(arguments)


def load_script(path):
    return importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_to_files(document):
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (document.parent / target).exists(), target
    for path in re.findall(r"`((?:configs|models|scripts|docs|taming|ldm|sgm|tests)/[\w./-]+\.\w+)`", text):
        assert (ROOT / path).exists(), path


def test_dotted_names_of_the_table_that_are_said_to_be_there_can_be_imported():
    rows = [r for r in README.splitlines() if r.startswith("| ") and "to come" not in r]
    names = [
        n for row in rows for n in re.findall(r"`((?:taming|ldm|sgm|main)\.[\w.{}, ]+)`", row.split("|")[1])
    ]
    assert len(names) >= 8
    for name in names:
        stem, _, choices = name.partition("{")
        for choice in choices.rstrip("}").split(", ") if choices else [""]:
            if not (stem + choice)[-1].isalnum():
                continue
            try:
                importlib.import_module(stem + choice)
            except ImportError:
                get_obj_from_str(stem + choice)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs" / "quickstart").glob("*.yaml")), ids=lambda p: p.stem
)
def test_quickstart_configurations_build_their_models(path):
    config = OmegaConf.load(path)
    model = instantiate_from_config(config.model)
    assert sum(p.numel() for p in model.parameters()) > 5e5
    assert path.stem in path.read_text(encoding="utf-8").split("model:")[0]  # the head says how to run it


def test_the_section_for_own_pictures_is_a_configuration(tmp_path):
    from PIL import Image

    Image.new("RGB", (90, 70), "red").save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a red card")
    (section,) = (yaml.safe_load(b) for b in blocks(README, "yaml"))
    section["data"]["params"]["train"]["params"]["root"] = str(tmp_path)
    data = instantiate_from_config(OmegaConf.create(section["data"]))
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (1, 64, 64, 3) and batch["caption"] == ["a red card"]


PYTHON = [(d, i) for d in DOCUMENTS for i in range(len(blocks(d.read_text(encoding="utf-8"), "python")))]
RUN = [
    (d, i) for d, i in PYTHON if d.name in ("README.md", "tokens.md")
]  # others take minutes, or a run of one's own


@pytest.mark.parametrize(("document", "i"), PYTHON, ids=lambda v: getattr(v, "name", v))
def test_python_blocks_import_names_that_exist(document, i):
    tree = ast.parse(blocks(document.read_text(encoding="utf-8"), "python")[i])
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    exec(compile(ast.Module(imports, []), document.name, "exec"), {})


@pytest.mark.parametrize(("document", "i"), RUN, ids=lambda v: getattr(v, "name", v))
def test_python_blocks_run(document, i, monkeypatch):
    monkeypatch.chdir(ROOT)
    scope = {}
    exec(blocks(document.read_text(encoding="utf-8"), "python")[i], scope)
    if document.name == "tokens.md":
        assert scope["codes"].shape == (2, 64) and scope["changed"].shape == (2, 3, 64, 64)
    elif document.parent.name == "emoji":
        assert scope["image"].size == (64, 64)
    else:
        assert type(scope["model"]).__name__ == "AutoencoderKL" and not scope["model"].training
