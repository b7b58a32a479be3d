"""Databases of CLIP's vectors: the published layout, exact and approximate search, building from pictures."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data import retrieval, retrieval_build
from ldm.data.retrieval import RetrievalDatabase, Retriever, Searcher, open_retriever, recall, unit
from ldm.data.retrieval_build import build_database


def write_part(folder, name, vectors, **others):
    folder.mkdir(parents=True, exist_ok=True)
    n = len(vectors)
    fields = {
        "img_id": np.array([f"{name}-{i}" for i in range(n)]),
        "patch_coords": np.arange(4 * n).reshape(n, 4),
        **others,
    }
    np.savez(folder / f"{name}.npz", embedding=vectors, **{k: v for k, v in fields.items() if v is not None})


@pytest.fixture
def vectors():
    return np.random.default_rng(0).standard_normal((40, 8)).astype(np.float32)


@pytest.fixture
def folder(tmp_path, vectors):
    """A database of two files, whose names are not in the order of writing."""
    folder = tmp_path / "databases" / "mine"
    write_part(folder, "part2", vectors[30:])
    write_part(folder, "part1", vectors[:30])
    return folder


# ---------------------------------------------------------------------------------------------------------- database


def test_the_files_of_a_folder_are_one_database_in_the_order_of_their_names(folder, vectors):
    database = RetrievalDatabase(folder)
    assert len(database) == 40 and np.array_equal(database.embedding, vectors)
    assert list(database.img_id[[0, 29, 30]]) == ["part1-0", "part1-29", "part2-0"]
    assert database.patch_coords.shape == (40, 4) and database.patch_coords[30].tolist() == [0, 1, 2, 3]


def test_compressed_files_in_half_precision_stay_so_in_memory(tmp_path, vectors):
    np.savez_compressed(tmp_path / "a.npz", embedding=vectors.astype(np.float16))
    database = RetrievalDatabase(tmp_path)
    assert database.embedding.dtype == np.float16
    assert database.img_id is None and database.patch_coords is None  # not in the file


def test_pickled_names_are_left_out_and_never_run(tmp_path, vectors):
    class Trap:
        def __reduce__(self):
            return (sys.exit, ("a pickle was run",))

    write_part(tmp_path, "a", vectors, img_id=np.array([Trap()] * 40, dtype=object))
    database = RetrievalDatabase(tmp_path)
    assert database.img_id is None and database.patch_coords.shape == (40, 4)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f, v: (f / "part1.npz").write_bytes(b"no archive"), "part1.npz cannot be read as part of"),
        (lambda f, v: (f / "part2.npz").write_bytes((f / "part2.npz").read_bytes()[:300]), "part2.npz"),
        (lambda f, v: np.savez(f / "part1.npz", vectors=v), "'embedding'"),
        (lambda f, v: write_part(f, "part1", v[0]), r"must be floating-point numbers \(n, d\), not \(8,\)"),
        (lambda f, v: write_part(f, "part1", v.astype(int)), "floating-point numbers .* of int64"),
        (lambda f, v: write_part(f, "part3", v[:, :4]), "part3.npz has vectors of another width than 8"),
        (lambda f, v: write_part(f, "part1", v, img_id=np.arange(3)), "40 vectors, but 3 rows of img_id"),
        (lambda f, v: write_part(f, "part1", v * np.nan), "infinite or undefined"),
    ],
)
def test_a_damaged_file_is_named(folder, vectors, spoil, message):
    spoil(folder, vectors)
    with pytest.raises(ValueError, match=message):
        RetrievalDatabase(folder)


def test_no_folder_and_an_empty_one_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="train_searcher.py --images"):
        RetrievalDatabase(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="no .npz file lies in it"):
        RetrievalDatabase(tmp_path)
    write_part(tmp_path, "part", np.zeros((0, 8), dtype=np.float32))
    with pytest.raises(ValueError, match="holds no vectors"):
        RetrievalDatabase(tmp_path)


# ---------------------------------------------------------------------------------------------------------- searching


def by_hand(vectors, queries, k):
    cosines = torch.nn.functional.cosine_similarity(
        torch.tensor(queries)[:, None].double(), torch.tensor(vectors)[None].double(), dim=-1
    )
    return cosines.topk(k)


def test_a_small_database_is_searched_exactly_by_cosine(vectors):
    queries = 5 * np.random.default_rng(1).standard_normal((3, 8)).astype(np.float32)
    searcher = Searcher.build(vectors * np.linspace(0.1, 9, 40)[:, None])  # lengths must not count
    rows, cosines = searcher.search(queries, 6)
    expected = by_hand(vectors, queries, 6)
    assert searcher.is_exact and rows.tolist() == expected.indices.tolist()
    assert np.allclose(cosines, expected.values, atol=1e-6)


@pytest.fixture
def in_lists(monkeypatch):
    """Vectors in 40 lists of a searcher that looks into two, in several blocks."""
    monkeypatch.setattr(retrieval, "EXACT_BELOW", 1000)
    monkeypatch.setattr(retrieval, "BLOCK", 600)
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((30, 16))
    vectors = (centres[rng.integers(30, size=1600)] + 0.1 * rng.standard_normal((1600, 16))).astype(
        np.float32
    )
    return vectors, Searcher.build(vectors)


def test_a_large_database_is_searched_in_lists_with_the_published_numbers(in_lists):
    vectors, searcher = in_lists
    assert not searcher.is_exact and len(searcher) == 1600
    assert searcher.index.nlist == 40 and searcher.index.nprobe == 2  # √1600 lists, a twentieth of them
    rows, cosines = searcher.search(vectors[:50], 5)
    assert rows[:, 0].tolist() == list(range(50))  # each finds itself
    assert np.allclose(cosines, np.einsum("bkd,bd->bk", unit(vectors[rows]), unit(vectors[:50])), atol=2e-3)


def test_recall_is_the_share_of_the_true_neighbours_found(in_lists):
    vectors, searcher = in_lists
    asked = vectors[np.linspace(0, 1599, 100).astype(int)]
    truth = by_hand(vectors, asked, 10).indices.tolist()
    found = searcher.search(asked, 10)[0].tolist()
    expected = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(truth, found, strict=True)])
    assert recall(searcher, vectors, 10) == pytest.approx(expected) and 0.5 < expected < 1
    assert recall(Searcher.build(vectors[:900]), vectors[:900], 10) == pytest.approx(1, abs=0.002)  # exact


def test_lists_that_hold_too_few_are_followed_by_all_others(in_lists):
    vectors, searcher = in_lists
    rows, _ = searcher.search(vectors[:2], 1600)
    assert [sorted(r) for r in rows.tolist()] == [list(range(1600))] * 2


def test_building_is_the_same_every_time(in_lists):
    vectors, searcher = in_lists
    again = Searcher.build(vectors)
    assert np.array_equal(searcher.search(vectors[::16], 9)[0], again.search(vectors[::16], 9)[0])


def test_a_saved_searcher_finds_the_same(in_lists, tmp_path):
    vectors, searcher = in_lists
    path = searcher.save(tmp_path / "new" / "folder")
    assert [p.name for p in path.parent.iterdir()] == ["searcher.faiss"]
    loaded = Searcher.load(path.parent)
    assert loaded.index.nprobe == 2
    assert np.array_equal(loaded.search(vectors[:9], 4)[0], searcher.search(vectors[:9], 4)[0])


def test_a_failed_save_leaves_the_old_searcher(vectors, tmp_path, monkeypatch):
    path = Searcher.build(vectors).save(tmp_path)
    before = path.read_bytes()

    def full_disk(index, name):
        with open(name, "wb") as file:
            file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(retrieval.import_faiss(), "write_index", full_disk)
    with pytest.raises(OSError, match="no space left"):
        Searcher.build(vectors[:9]).save(tmp_path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_bad_questions_to_a_searcher_are_refused(vectors, tmp_path):
    searcher = Searcher.build(vectors)
    with pytest.raises(ValueError, match="40 vectors; 41 neighbours cannot be found"):
        searcher.search(vectors, 41)
    with pytest.raises(ValueError, match="0 neighbours"):
        searcher.search(vectors, 0)
    with pytest.raises(ValueError, match=r"queries are \(40, 4\); this searcher holds vectors of 8"):
        searcher.search(vectors[:, :4], 1)
    with pytest.raises(FileNotFoundError, match="train_searcher.py -d DATABASE"):
        Searcher.load(tmp_path)
    (tmp_path / "searcher.faiss").write_bytes(b"no searcher")
    with pytest.raises(ValueError, match="cannot be read as a searcher"):
        Searcher.load(tmp_path)


def test_without_faiss_the_error_names_the_command(vectors, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"pip install 'latent-generative-models\[retrieval\]'"):
        Searcher.build(vectors)


# ---------------------------------------------------------------------------------------------------------- retrieval


def test_neighbours_come_as_unit_vectors_with_their_names(folder, vectors):
    retriever = Retriever(RetrievalDatabase(folder))
    queries = torch.randn(2, 8, dtype=torch.float64)
    found = retriever.neighbours(queries, 3)
    assert found.embedding.shape == (2, 3, 8) and found.embedding.dtype == torch.float64
    assert torch.allclose(found.embedding.norm(dim=-1), torch.ones(2, 3, dtype=torch.float64))
    expected = by_hand(vectors, queries.numpy(), 3)
    assert found.rows.tolist() == expected.indices.tolist()
    cosines = torch.einsum("bkd,bd->bk", found.embedding, torch.nn.functional.normalize(queries, dim=-1))
    assert torch.allclose(cosines, expected.values, atol=1e-6)
    assert np.allclose(found.cosine, expected.values, atol=1e-6)
    assert found.img_id[0, 0] == retriever.database.img_id[found.rows[0, 0]]
    assert found.patch_coords.shape == (2, 3, 4)


def test_a_searcher_of_another_database_is_noticed(folder, vectors):
    database = RetrievalDatabase(folder)
    Retriever(database, Searcher.build(vectors))
    for others in (vectors[:39], vectors[:, :4], np.roll(vectors, 1, axis=1)):
        with pytest.raises(ValueError, match="make it anew"):
            Retriever(database, Searcher.build(others))


def test_published_names_lead_to_published_places(folder, vectors, tmp_path, monkeypatch):
    monkeypatch.setattr(retrieval, "DATABASES", folder.parent)
    monkeypatch.setattr(retrieval, "SEARCHERS", tmp_path / "searchers")
    assert open_retriever("mine").searcher.is_exact
    assert not (tmp_path / "searchers").exists()  # a small one is quickly made anew
    monkeypatch.setattr(retrieval, "EXACT_BELOW", 10)
    assert not open_retriever("mine").searcher.is_exact
    saved = tmp_path / "searchers" / "mine" / "searcher.faiss"
    before = saved.stat().st_mtime_ns
    open_retriever(folder)  # as a folder, with the searcher of the same name
    assert saved.stat().st_mtime_ns == before
    with pytest.raises(FileNotFoundError, match="there is no searcher"):
        open_retriever("mine", tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        open_retriever("yours")


# ----------------------------------------------------------------------------------------------------------- building


@pytest.fixture
def pictures(tmp_path):
    """Three pictures, one of them wide with a blue middle, and a file that is none."""
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    Image.new("RGB", (30, 50), "red").save(folder / "a.png")
    wide = Image.new("RGB", (500, 100), "lime")
    wide.paste("blue", (200, 0, 300, 100))
    wide.save(folder / "deep" / "b.png")
    (folder / "c.jpg").write_bytes(b"no picture")
    Image.new("RGB", (64, 64), "lime").save(folder / "d.png")
    (folder / "notes.txt").write_text("no picture either")
    return folder


def mean_colour(batch):
    assert batch.shape[1:] == (3, 224, 224) and not torch.is_grad_enabled()
    return batch.mean(dim=(2, 3))


def test_a_database_of_pictures_holds_a_vector_of_each_middle_square(pictures, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(retrieval_build, "PART", 2)
    target = tmp_path / "new" / "database"
    assert build_database(pictures, target, mean_colour, batch_size=2) == 3
    assert sorted(p.name for p in target.iterdir()) == ["part-00000.npz", "part-00001.npz"]
    database = RetrievalDatabase(target)
    colours = [[1, -1, -1], [-1, 1, -1], [-1, -1, 1]]  # red, lime, blue in [-1, 1]
    assert np.allclose(database.embedding, colours, atol=0.02)
    assert database.img_id.tolist() == ["a.png", "d.png", "deep/b.png"]
    assert database.patch_coords.tolist() == [[0, 10, 30, 40], [0, 0, 64, 64], [200, 0, 300, 100]]
    assert "Skipping a broken picture" in caplog.text and "c.jpg" in caplog.text


def test_a_database_is_never_mixed_with_another_nor_made_of_nothing(pictures, folder, tmp_path):
    with pytest.raises(FileExistsError, match="name an empty folder"):
        build_database(pictures, folder, mean_colour)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no pictures"):
        build_database(tmp_path / "empty", tmp_path / "new", mean_colour)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        build_database(tmp_path / "absent", tmp_path / "new", mean_colour)
    (tmp_path / "empty" / "c.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="none of the 1 pictures"):
        build_database(tmp_path / "empty", tmp_path / "new", mean_colour)
    assert not list((tmp_path / "new").glob("*"))
