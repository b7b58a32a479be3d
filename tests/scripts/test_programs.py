"""Scripts as programs: what python's search path looks like to them, and what surrounds their drawing."""

import argparse
import re
import subprocess
import sys
import types
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image

from ldm.inference_images import Finished, Gallery
from scripts import flags

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = sorted(
    p for p in (ROOT / "scripts").rglob("*.py") if 'if __name__ == "__main__":' in p.read_text("utf-8")
)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_program_puts_its_own_checkout_first(program):
    """Whatever else is installed as `ldm`, and from any folder."""
    found = re.search(
        r"^sys\.path\.insert\(\s*0, str\(Path\(__file__\)\.resolve\(\)\.parents\[(\d)\]\)\s*\)",
        program.read_text("utf-8"),
        re.MULTILINE,
    )
    assert found is not None and program.parents[int(found[1])] == ROOT


def test_folders_beside_a_program_do_not_stand_for_packages(tmp_path):
    """python puts the program's folder first, where a folder of the name of a package that is not installed would be imported."""
    (tmp_path / "scripts" / "absent_package").mkdir(parents=True)
    (tmp_path / "scripts" / "__init__.py").write_text((ROOT / "scripts" / "__init__.py").read_text())
    own = (
        "import sys; from pathlib import Path; sys.path.insert(0, str(Path(__file__).resolve().parents[1]))\n"
    )
    for name, code in (
        ("naive", "import absent_package\n"),
        ("program", own + "import scripts\nimport absent_package\n"),
    ):
        (tmp_path / "scripts" / f"{name}.py").write_text(code)
    status, said = {}, {}
    for name in ("naive", "program"):
        command = [sys.executable, "-S", str(tmp_path / "scripts" / f"{name}.py")]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        status[name], said[name] = done.returncode, done.stderr
    assert status == {"naive": 0, "program": 1}  # the first is what would happen
    assert "No module named 'absent_package'" in said["program"]


class Model:
    """Stands for a loaded model: notes when its averages are in place."""

    device = torch.device("cpu")
    averaged = False

    @contextmanager
    def ema_scope(self):
        self.averaged = True
        yield
        self.averaged = False


def options(**changes):
    return argparse.Namespace(**{"seed": 3, "precision": "autocast", "bf16": False, **changes})


def test_drawing_begins_with_the_seed_without_gradients_and_with_averages(tmp_path):
    model, drawn = Model(), []
    for seed in (3, 3, None):
        with flags.drawing(model, Finished(tmp_path), options(seed=seed)):
            assert model.averaged and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
            drawn.append(torch.rand(1).item())
        assert not model.averaged and torch.is_grad_enabled()
    assert drawn[0] == drawn[1] != drawn[2]
    with flags.drawing(model, Finished(tmp_path), options(bf16=True)):
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16 and torch.is_autocast_enabled("cpu")


def gallery_of(folder, **changes):
    given = {"outdir": folder, "n_rows": 0, "n_samples": 2, "skip_save": False, "skip_grid": False, **changes}
    return flags.make_gallery(types.SimpleNamespace(**given), {})


def test_a_stopped_gallery_gets_its_grid_and_a_failed_one_none(tmp_path):
    stopped, failed = gallery_of(tmp_path / "stopped"), gallery_of(tmp_path / "failed")
    with flags.drawing(Model(), stopped, options()):
        stopped.add(torch.zeros(3, 4, 4), "a")
        raise KeyboardInterrupt
    assert stopped.stopped and [p.name for p in stopped.files] == ["00000.png", "grid-0000.png"]
    with pytest.raises(ValueError, match="broken"), flags.drawing(Model(), failed, options()):
        failed.add(torch.zeros(3, 4, 4), "a")
        raise ValueError("broken")
    assert [p.name for p in failed.files] == ["00000.png"]


def test_a_gallery_follows_the_flags(tmp_path):
    for name, changes, grid in (
        ("plain", {}, True),
        ("without", {"skip_grid": True}, True),
        ("sizes", {}, False),
        ("grid alone", {"skip_save": True, "n_rows": 1}, True),
    ):
        given = {
            "outdir": tmp_path / name,
            "n_rows": 0,
            "n_samples": 2,
            "skip_save": False,
            "skip_grid": False,
        }
        gallery = flags.make_gallery(types.SimpleNamespace(**{**given, **changes}), {"seed": 1}, grid=grid)
        assert isinstance(gallery, Gallery)
        for _ in range(2):
            gallery.add(torch.zeros(3, 4, 4), "a")
        gallery.close()
    made = {
        n: sorted(p.name for p in (tmp_path / n).rglob("*.png"))
        for n in ("plain", "without", "sizes", "grid alone")
    }
    singles = ["00000.png", "00001.png"]
    assert made == {
        "plain": [*singles, "grid-0000.png"], "without": singles, "sizes": singles, "grid alone": ["grid-0000.png"],
    }  # fmt: skip
    sizes = [Image.open(tmp_path / n / "grid-0000.png").size for n in ("plain", "grid alone")]
    assert sizes == [(2 * 6 + 2, 8), (8, 2 * 6 + 2)]  # columns: n_samples, or n_rows
