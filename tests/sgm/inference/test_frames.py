"""Frames: pictures on white squares, videos written and read, numbers that grow."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.inference import InferenceError
from sgm.inference import frames
from sgm.inference.frames import (
    VideoFolder,
    as_frames,
    find_pictures,
    object_on_white,
    objects_on_white,
    read_video,
    write_video,
)


def red_box(size=(90, 70), box=(30, 20, 50, 60)):
    image = Image.new("RGBA", size)
    image.paste((255, 0, 0, 255), box)
    return image


@pytest.mark.parametrize(("share", "height"), [(1.0, 64), (0.5, 32), (None, 40 * 64 / 90)])
def test_an_object_stands_in_the_middle_of_a_white_square_and_takes_its_share(share, height):
    square = np.asarray(object_on_white(red_box(), share, 64)).astype(int)
    red = square[..., 1] < 128
    assert square.shape == (64, 64, 3) and red.any(axis=1).sum() == pytest.approx(height, abs=1)
    assert red.any(axis=0).sum() == pytest.approx(height / 2, abs=1)  # the box is twice as high as wide
    rows, columns = np.nonzero(red)
    assert rows.mean() == pytest.approx(31.5, abs=1) and columns.mean() == pytest.approx(31.5, abs=1)
    assert (square[0, 0] == 255).all()


def test_a_videos_frames_are_cut_alike_so_that_the_object_moves():
    paper = [Image.new("RGB", (40, 40), "white") for _ in range(2)]
    for frame, left in zip(paper, (0, 20), strict=True):
        frame.paste((0, 0, 255), (left, 10, left + 20, 30))
    left, right = (np.asarray(f)[16, :, 0] < 128 for f in objects_on_white(paper, False, 1.0, 32))
    assert left[:15].all() and not left[17:].any() and right[17:].all() and not right[:15].any()


def test_errors_of_pictures_name_what_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rembg", None)
    frames.matting.cache_clear()
    with pytest.raises(InferenceError, match=r"needs rembg: python -m pip install 'rembg\[cpu\]'"):
        object_on_white(Image.new("RGB", (8, 8)))
    with pytest.raises(InferenceError, match="all of it is background"):
        object_on_white(Image.new("RGBA", (8, 8)))
    with pytest.raises(InferenceError, match="image_frame_ratio=1.5"):
        object_on_white(red_box(), 1.5)
    with pytest.raises(InferenceError, match="no picture in this folder"):
        find_pictures(tmp_path)
    with pytest.raises(InferenceError, match="no such file or folder"):
        find_pictures(tmp_path / "absent")


@pytest.mark.parametrize("size", [(16, 24), (17, 23)])
def test_videos_come_back_as_they_were_written_odd_sides_one_pixel_larger(tmp_path, size):
    shades = torch.linspace(0.1, 0.9, 4)[:, None, None, None].expand(4, 3, *size)
    write_video(shades, tmp_path / "v.mp4", fps=7)
    found = read_video(tmp_path / "v.mp4", 4)
    assert [f.size for f in found] == [(24, size[0] + size[0] % 2)] * 4
    assert [np.asarray(f).mean() / 255 for f in found] == pytest.approx([0.1, 0.367, 0.633, 0.9], abs=0.02)
    assert [p.name for p in tmp_path.iterdir()] == ["v.mp4"]


def test_too_short_videos_go_back_and_forth(tmp_path):
    for i in range(3):
        Image.new("L", (8, 8), 50 * i).save(tmp_path / f"{i}.png")
    shades = [np.asarray(f)[0, 0, 0] // 50 for f in read_video(tmp_path, 8)]
    assert shades == [0, 1, 2, 1, 0, 1, 2, 1]
    Image.new("L", (8, 8)).save(tmp_path / "only.gif", save_all=True)
    assert len(read_video(tmp_path / "only.gif", 3)) == 3
    Image.new("L", (9, 8)).save(tmp_path / "3.png")
    with pytest.raises(InferenceError, match="must be of one size"):
        read_video(tmp_path, 4)


def test_what_is_no_video_is_refused(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"no video")
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(InferenceError, match=r"a.mp4 cannot be read as a video"):
        read_video(tmp_path / "a.mp4", 1)
    with pytest.raises(InferenceError, match="a video is needed"):
        read_video(tmp_path / "a.txt", 1)
    with pytest.raises(InferenceError, match="no such file or folder"):
        read_video(tmp_path / "b.mp4", 1)


def test_without_ffmpeg_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(InferenceError, match=r"pip install 'imageio\[ffmpeg\]'"):
        write_video(torch.zeros(1, 3, 8, 8), tmp_path / "v.mp4", 7)


def test_a_folders_next_number_is_one_more_than_the_highest(tmp_path):
    (tmp_path / "000004.mp4").touch()
    made = VideoFolder(tmp_path, r"(\d+)\.mp4", 7)
    made.save_picture(Image.new("RGB", (8, 8)))
    made.save_video(torch.zeros(2, 3, 8, 8), "_view")
    assert [p.name for p in made.files] == ["000005.jpg", "000005_view.mp4"]


def test_pictures_become_frames_from_minus_one_to_one():
    out = as_frames([Image.new("RGB", (2, 3), (255, 0, 0)), Image.new("L", (2, 3))])
    assert out.shape == (2, 3, 3, 2) and out[0, :, 0, 0].tolist() == [1, -1, -1] and (out[1] == -1).all()
