"""One's own pictures, from a text file with a path a line."""

from __future__ import annotations

from typing import Any

from taming.data.base import DelegatingDataset, ImagePaths, check_presence, read_list


class CustomBase(DelegatingDataset):
    """A data set over `self.data`, which subclasses set."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.data: Any = None


class CustomTrain(CustomBase):
    """Pictures of a list, the shorter side scaled to `size` and the middle cut out.

    Args:
        size: of the square pictures.
        training_images_list_file: one path a line, relative to the working directory.
        on_error: "skip" broken pictures (logged, counted) or "raise".

    Raises:
        FileNotFoundError: no such list, or none of its first files exists.
        ValueError: the list is empty.
    """

    def __init__(self, size: int, training_images_list_file: str, on_error: str = "skip") -> None:
        super().__init__()
        self.data = _listed(training_images_list_file, size, on_error)


class CustomTest(CustomBase):
    """As `CustomTrain`, for validation."""

    def __init__(self, size: int, test_images_list_file: str, on_error: str = "skip") -> None:
        super().__init__()
        self.data = _listed(test_images_list_file, size, on_error)


def _listed(list_file: str, size: int, on_error: str) -> ImagePaths:
    paths = read_list(list_file, "write the paths of your pictures into it, one a line")
    check_presence(paths, list_file)
    return ImagePaths(paths, size=size, random_crop=False, on_error=on_error)
