import io
import tarfile

import pytest
import yaml

from taming.data import ilsvrc
from taming.data.ilsvrc import (
    correct_index,
    fetch_checked,
    give_synsets_from_indices,
    str_to_indices,
    unpack_classes,
    unpack_sorted,
)


def tar_of(files):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return packed.getvalue()


def test_ranges_lack_their_end_and_indices_are_sorted():
    assert str_to_indices("30-32, 33-37, 5") == [5, 30, 31, 33, 34, 35, 36]
    with pytest.raises(ValueError, match="'x' in '3, x'"):
        str_to_indices("3, x")


def test_synsets_of_indices(tmp_path):
    path = tmp_path / "index.yaml"
    path.write_text("0: n01440764\n1: n01443537\n")
    assert give_synsets_from_indices([1, 0], path) == ["n01443537", "n01440764"]
    with pytest.raises(ValueError, match=r"has 2 classes and no index 7"):
        give_synsets_from_indices([0, 7], path)
    with pytest.raises(FileNotFoundError, match="write a line `index: synset`"):
        give_synsets_from_indices([0], tmp_path / "absent.yaml")


def test_a_wrong_index_is_replaced_by_the_ranks_of_the_sorted_synsets(tmp_path, caplog):
    path = tmp_path / "index.yaml"
    synsets = [f"n{i:08}" for i in range(ilsvrc.N_CLASSES)]
    wrong = dict(enumerate(synsets))
    wrong[3], wrong[4] = wrong[4], wrong[3]
    path.write_text(yaml.safe_dump(wrong))
    correct_index(set(synsets[:-1]), path)
    assert yaml.safe_load(path.read_text())[3] == synsets[4]  # a part of the classes proves nothing
    correct_index(set(synsets), path)
    assert give_synsets_from_indices(range(1000), path) == synsets and "wrong for 2 classes" in caplog.text
    caplog.clear()
    correct_index(set(synsets), path)
    assert not caplog.text


def test_a_tar_of_tars_becomes_a_folder_a_class_and_an_interrupted_run_continues(tmp_path, monkeypatch):
    classes = {f"n{i}.tar": tar_of({f"n{i}_{j}.JPEG": b"%d%d" % (i, j) for j in range(2)}) for i in range(3)}
    (tmp_path / "t.tar").write_bytes(tar_of(classes))
    whole = tarfile.TarFile.extractall

    def fail_at_the_third(self, path, **options):
        if path.name == "n2.part":
            raise OSError("disk full")
        whole(self, path, **options)

    monkeypatch.setattr(tarfile.TarFile, "extractall", fail_at_the_third)
    with pytest.raises(OSError, match="disk full"):
        unpack_classes(tmp_path / "t.tar", tmp_path / "data")
    assert not (tmp_path / "data").exists()
    done = (tmp_path / "data.part/n0").stat().st_mtime_ns
    monkeypatch.setattr(tarfile.TarFile, "extractall", whole)
    unpack_classes(tmp_path / "t.tar", tmp_path / "data")
    assert (tmp_path / "data/n2/n2_1.JPEG").read_bytes() == b"21" and (
        tmp_path / "data/n0"
    ).stat().st_mtime_ns == done
    assert len(list((tmp_path / "data").rglob("*.JPEG"))) == 6 and not (tmp_path / "data.part").exists()


def test_a_flat_archive_is_sorted_into_classes(tmp_path):
    (tmp_path / "v.tar").write_bytes(tar_of({"a.JPEG": b"a", "b.JPEG": b"b"}))
    unpack_sorted(tmp_path / "v.tar", tmp_path / "data", {"a.JPEG": "n1", "b.JPEG": "n0"})
    assert (tmp_path / "data/n1/a.JPEG").read_bytes() == b"a" and (tmp_path / "data/n0/b.JPEG").exists()
    with pytest.raises(ValueError, match=r"holds b\.JPEG, which validation_synset\.txt gives no class"):
        unpack_sorted(tmp_path / "v.tar", tmp_path / "other", {"a.JPEG": "n1"})
    assert not (tmp_path / "other").exists()


def test_damaged_archives_are_named(tmp_path):
    (tmp_path / "t.tar").write_bytes(b"no archive at all" * 100)
    with pytest.raises(ValueError, match=r"t\.tar cannot be unpacked"):
        unpack_classes(tmp_path / "t.tar", tmp_path / "data")
    (tmp_path / "t.tar").write_bytes(tar_of({"n0.tar": b"damaged" * 100}))
    with pytest.raises(ValueError, match=r"n0\.tar in .*t\.tar cannot be unpacked"):
        unpack_classes(tmp_path / "t.tar", tmp_path / "data")


def test_downloads_are_checked_by_size(tmp_path):
    (tmp_path / "source").write_bytes(b"12345")
    url = (tmp_path / "source").as_uri()
    with pytest.raises(ValueError, match=r"gave 5 bytes instead of the 6 of a\.txt"):
        fetch_checked("a.txt", url, 6, tmp_path)
    assert not (tmp_path / "a.txt").exists()
    (tmp_path / "a.txt").write_text("old")
    assert fetch_checked("a.txt", url, 5, tmp_path).read_bytes() == b"12345"
    assert fetch_checked("a.txt", "file:///nowhere", 5, tmp_path).read_bytes() == b"12345"  # there already
