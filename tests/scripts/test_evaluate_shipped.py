"""Retrieval among the training pictures, and edits of pictures, by the model in the box."""

import torch
from omegaconf import OmegaConf
from PIL import Image

from scripts import evaluate_edits, evaluate_retrieval


def test_the_nearest_rows_come_first():
    among = torch.tensor([[0.0, 0.0], [1.0, 0.0], [5.0, 5.0]])
    near = evaluate_retrieval.nearest_rows(torch.tensor([[0.9, 0.0], [4.0, 4.0]]), among, 2)
    assert near.tolist() == [[1, 0], [2, 1]]
    assert evaluate_retrieval.nearest_rows(among[:1], among, 9).shape == (1, 3)


def test_a_caption_is_found_if_one_of_the_first_pictures_carries_it_among_its_names():
    names = [["cat", "kitty"], ["dog"], ["cow"]]
    indices = torch.tensor([[1, 0], [0, 2]])
    assert evaluate_retrieval.found(indices, ["kitty", "cow"], names, 1) == 0.0
    assert evaluate_retrieval.found(indices, ["kitty", "cow"], names, 2) == 1.0
    assert evaluate_retrieval.found(indices, ["dog", "dog"], names, 1) == 0.5


def test_the_model_in_the_box_draws_what_it_is_asked_for(tmp_path, capsys):
    argv = ["-r", "models/emoji/text2img", "-b", "configs/emoji/text2img.yaml", "--samplers", "unipc", "--steps", "8", "-n", "20"]  # fmt: skip
    few = [
        "--scale",
        "2",
        "--outfile",
        str(tmp_path / "grid.png"),
        "data.params.train.params.categories=[Activities]",
    ]
    assert evaluate_retrieval.main([*argv, *few]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| unipc, 8 steps"))
    shares = [float(cell.strip(" %")) for cell in row.split("|")[2:6]]
    assert min(shares) >= 80.0
    assert Image.open(tmp_path / "grid.png").width == 20 * 66 + 2


def test_data_that_are_no_emoji_are_refused(tmp_path, capsys):
    data = {"data": {"params": {"train": {"target": "collections.UserList", "params": {"initlist": [1]}}}}}
    OmegaConf.save(data, tmp_path / "data.yaml")
    assert evaluate_retrieval.main(["-r", "models/emoji/text2img", "-b", str(tmp_path / "data.yaml")]) == 2
    assert "names of pictures are known of EmojiImages" in capsys.readouterr().err


def test_pictures_are_drawn_over_and_filled_in_and_nothing_is_overwritten(tmp_path):
    argv = ["--outdir", str(tmp_path), "--steps", "2", "--strengths", "0.5", "--device", "cpu"]
    (tmp_path / "emoji_img2img.png").write_bytes(b"mine")
    assert evaluate_edits.main(argv) == 0
    assert (tmp_path / "emoji_img2img.png").read_bytes() == b"mine"
    (drawn,) = (p for p in tmp_path.glob("emoji_img2img*.png") if p.name != "emoji_img2img.png")
    pairs, filled = Image.open(drawn), Image.open(tmp_path / "emoji_inpainting.png")
    assert pairs.size == (4 * 66 + 2, 4 * 66 + 2) and filled.size == (10 * 66 + 2, 3 * 66 + 2)
    truth, seen = filled.crop((2, 134, 66, 198)), filled.crop((2, 2, 66, 66))
    assert truth.crop((0, 0, 32, 64)).tobytes() == seen.crop((0, 0, 32, 64)).tobytes()
    assert set(seen.crop((32, 0, 64, 64)).getdata()) == {(127, 127, 127)}
