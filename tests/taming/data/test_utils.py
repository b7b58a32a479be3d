import io
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from tqdm import tqdm

from taming.data.helper_types import Annotation
from taming.data.utils import (
    custom_collate,
    download_url,
    download_urls,
    get_root,
    is_prepared,
    mark_prepared,
    prompt_download,
    quadratic_crop,
    reporthook,
    unpack,
)


@pytest.mark.parametrize(
    ("ending", "mode"), [("tar", "w"), ("tar.gz", "w:gz"), ("tgz", "w:gz"), ("zip", None)]
)
def test_archives_are_unpacked_beside_themselves(tmp_path, ending, mode):
    archive = tmp_path / f"a.{ending}"
    if mode:
        with tarfile.open(archive, mode) as tar:
            info = tarfile.TarInfo("sub/x.txt")
            info.size = 2
            tar.addfile(info, io.BytesIO(b"hi"))
    else:
        with zipfile.ZipFile(archive, "w") as packed:
            packed.writestr("sub/x.txt", "hi")
    unpack(archive)
    assert (tmp_path / "sub/x.txt").read_text() == "hi"


def test_archives_cannot_write_outside_and_unknown_ones_are_refused(tmp_path):
    inner = tmp_path / "inner"
    inner.mkdir()
    with tarfile.open(inner / "a.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("../outside.txt"), io.BytesIO())
    with pytest.raises(tarfile.OutsideDestinationError):
        unpack(inner / "a.tar")
    assert not (tmp_path / "outside.txt").exists()
    with pytest.raises(NotImplementedError, match=r"a\.rar: archives may end in"):
        unpack("a.rar")


def test_prepared_folders_are_marked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = get_root("things")
    assert root == "data/things" and not is_prepared(root)
    mark_prepared(root)
    assert is_prepared(root) and (tmp_path / "data/things/.ready").exists()


def test_downloads_appear_only_when_complete(tmp_path):
    (tmp_path / "source").write_bytes(b"x" * 100)
    target = tmp_path / "deep/er"
    found = download_urls({"b": (tmp_path / "source").as_uri()}, target)
    assert found == {"b": str(target / "b")} and (target / "b").read_bytes() == b"x" * 100
    with pytest.raises(OSError, match=r"put it at .*deep/er/c"):
        download_url("c", (tmp_path / "absent").as_uri(), target)
    assert [p.name for p in target.iterdir()] == ["b"]


def test_a_missing_download_is_asked_for_at_a_terminal_and_an_error_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with pytest.raises(FileNotFoundError, match=r"a\.tar is missing; download it from example\.org"):
        prompt_download("a.tar", "example.org", tmp_path)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda wish: (tmp_path / "a.tar").touch())
    assert prompt_download("a.tar", "example.org", tmp_path) == str(tmp_path / "a.tar")
    assert prompt_download("b.tar", "example.org", tmp_path, content_dir=tmp_path).endswith("b.tar")


def test_the_report_hook_follows_the_transfer():
    with tqdm(disable=False, file=io.StringIO()) as bar:
        hook = reporthook(bar)
        for blocks in range(4):
            hook(blocks, 10, 25)
        assert bar.n == 30 and bar.total == 25


def test_square_cut_outs_are_centred_on_the_box_and_reflected_at_the_edge():
    y, x = np.mgrid[0:24, 0:32]
    picture = np.stack([x, y], -1)
    square = quadratic_crop(picture, (4, 6, 14, 12))
    assert (
        square.shape == (10, 10, 2)
        and square[0, 0].tolist() == [4, 4]
        and square[-1, -1].tolist() == [13, 13]
    )
    beyond = quadratic_crop(picture, (20, 10, 32, 24), alpha=1.5)
    columns = np.r_[15:32, 30:26:-1]
    assert beyond.shape == (21, 21, 2) and np.array_equal(beyond[0, :, 0], columns)
    assert quadratic_crop(picture[..., 0], (5, 5, 5, 5)).shape == (2, 2)


def test_batches_are_torchs_but_lists_of_annotations_stay_lists():
    note = Annotation(area=0.1, image_id="a", bbox=(0.0, 0.1, 0.2, 0.3), category_no=3, category_id="x")
    items = [
        {"x": np.full((2, 3), i), "f": i / 2, "s": "ab"[i], "l": [i, i + 1], "annotations": [note] * i}
        for i in range(2)
    ]
    batch = custom_collate(items)
    assert batch["x"].shape == (2, 2, 3) and batch["f"].dtype == torch.float64 and batch["s"] == ["a", "b"]
    assert [t.tolist() for t in batch["l"]] == [[0, 1], [1, 2]]
    assert batch["annotations"] == [[], [note]]
    nested, numbers = custom_collate([(item, i) for i, item in enumerate(items)])
    assert nested["annotations"] == [[], [note]] and numbers.tolist() == [0, 1]
