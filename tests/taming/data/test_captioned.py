import json

import numpy as np
import pytest
import torch
from PIL import Image

from taming.data.captioned import CaptionedImages
from taming.data.images import BrokenImageError


@pytest.fixture
def folder(tmp_path):
    for i, (name, size) in enumerate(
        {"cats/a.png": (40, 30), "cats/b.jpg": (8, 50), "dogs/c.webp": (32, 32)}.items()
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", size, (40 * i, 100, 200)).save(path)
    (tmp_path / "cats" / "a.txt").write_text("a tabby cat\nan orange cat\n")
    (tmp_path / "notes.md").write_text("no picture")
    return tmp_path


def test_a_folder_of_any_sizes_with_captions_beside_the_pictures(folder):
    data = CaptionedImages(root=str(folder), size=16, default_caption="a pet", classes_from_folders=True)
    items = [data[i] for i in range(len(data))]
    assert len(items) == 3 and all(
        i["image"].shape == (16, 16, 3) and i["image"].dtype == np.float32 for i in items
    )
    assert items[0]["caption"] in ("a tabby cat", "an orange cat") and items[2]["caption"] == "a pet"
    assert [(i["class_label"], i["human_label"]) for i in items] == [(0, "cats"), (0, "cats"), (1, "dogs")]
    assert {data[0]["caption"] for _ in range(30)} == {"a tabby cat", "an orange cat"}
    assert data[2]["file_path_"].endswith("c.webp")


ROWS = [{"file_name": "cats/a.png", "text": "first"}, {"file_name": "dogs/c.webp", "text": "second"}]


def write_list(folder, suffix):
    path = folder / f"list.{suffix}"
    if suffix == "csv":
        path.write_text("file_name,text\n" + "\n".join(f'{r["file_name"]},"{r["text"]}"' for r in ROWS))
    elif suffix == "tsv":
        path.write_text("file_name\ttext\n" + "\n".join("\t".join(r.values()) for r in ROWS))
    elif suffix == "jsonl":
        path.write_text("\n".join(json.dumps(r) for r in ROWS))
    elif suffix == "json":
        path.write_text(json.dumps(ROWS))
    elif suffix == "parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_lists_in_every_format_give_the_same(folder, suffix):
    data = CaptionedImages(captions=str(write_list(folder, suffix)), size=8)
    assert [data[i]["caption"] for i in range(len(data))] == ["first", "second"]


def test_a_bare_list_of_paths_and_a_json_object(folder):
    (folder / "paths.txt").write_text("cats/b.jpg\n\ndogs/c.webp\n")
    assert len(CaptionedImages(captions=str(folder / "paths.txt"), size=8)) == 2
    (folder / "map.json").write_text(json.dumps({"cats/a.png": ["one", "two"]}))
    data = CaptionedImages(captions=str(folder / "map.json"), size=8)
    assert {data[0]["caption"] for _ in range(30)} == {"one", "two"}


def test_broken_files_are_counted_logged_and_replaced_by_the_next_good_one(folder, caplog):
    (folder / "cats" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n truncated")
    data = CaptionedImages(root=str(folder), size=8)
    names = [p.name for p, _ in data.items]
    item = data[names.index("broken.png")]
    assert item["file_path_"].endswith("c.webp")
    assert item["index"] == names.index("c.webp")
    assert list(data.broken) == [str(folder / "cats" / "broken.png")]
    assert "Skipping a broken picture (1 so far)" in caplog.text
    data[names.index("broken.png")]
    assert len(data.broken) == 1  # counted once


def test_broken_files_can_be_fatal_or_sorted_out_at_the_start(folder):
    (folder / "cats" / "broken.png").write_bytes(b"")
    strict = CaptionedImages(root=str(folder), size=8, on_error="raise")
    with pytest.raises(BrokenImageError, match=r"broken\.png"):
        strict[[p.name for p, _ in strict.items].index("broken.png")]
    checked = CaptionedImages(root=str(folder), size=8, check=True)
    assert len(checked) == 3 and len(checked.broken) == 1


def test_when_everything_is_broken_it_says_so(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(BrokenImageError, match="all 1 pictures"):
        CaptionedImages(root=str(tmp_path))[0]
    with pytest.raises(FileNotFoundError, match="all 1 pictures"):
        CaptionedImages(root=str(tmp_path), check=True)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "name a folder"),
        ({"root": "no/such/folder"}, FileNotFoundError, "no folder no/such/folder"),
        ({"root": ".", "on_error": "ignore"}, ValueError, "on_error='ignore'"),
    ],
)
def test_wrong_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        CaptionedImages(**options)


def test_lists_without_the_columns_say_which_there_are(folder):
    path = folder / "odd.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="columns a, b.*image_column"):
        CaptionedImages(captions=str(path))
    with pytest.raises(ValueError, match="no column 'c'"):
        CaptionedImages(captions=str(path), image_column="c")
    (folder / "bad.jsonl").write_text("{not json}")
    with pytest.raises(ValueError, match="cannot be read as jsonl"):
        CaptionedImages(captions=str(folder / "bad.jsonl"))
    with pytest.raises(FileNotFoundError, match="no list"):
        CaptionedImages(captions=str(folder / "absent.csv"))


def test_mirrored_pictures_have_their_own_index_and_random_crops_none(folder):
    data = CaptionedImages(root=str(folder), size=8, flip_p=1.0)
    assert data[0]["index"] == 3
    assert "index" not in CaptionedImages(root=str(folder), size=8, random_crop=True)[0]
    torch.utils.data.default_collate([data[0], data[2]])
