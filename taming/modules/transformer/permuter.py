"""Orders in which a map of codes is read (Esser et al. 2021, on the ordering of image representations): tables of positions."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn


class AbstractPermuter(nn.Module):
    """Something that reorders the last axis of (b, length), and puts it back."""

    def forward(self, x: Tensor, reverse: bool = False) -> Tensor:
        """(b, length) → the same, reordered; `reverse` undoes it."""
        raise NotImplementedError(f"{type(self).__name__} does not define forward")


class Identity(AbstractPermuter):
    """Row by row: the codes as they are."""

    def forward(self, x: Tensor, reverse: bool = False) -> Tensor:
        """Anything, unchanged."""
        return x


class TablePermuter(AbstractPermuter):
    """Reads a map by a table; a subclass defines `table`.

    Both the table and its inverse are buffers, since published checkpoints hold them.

    Args:
        H, W: size of the map.
    """

    forward_shuffle_idx: Tensor
    backward_shuffle_idx: Tensor

    def __init__(self, H: int, W: int) -> None:
        super().__init__()
        order = np.ascontiguousarray(self.table(H, W), dtype=np.int64)
        self.register_buffer("forward_shuffle_idx", torch.tensor(order))
        self.register_buffer("backward_shuffle_idx", torch.tensor(np.argsort(order)))

    @staticmethod
    def table(height: int, width: int) -> np.ndarray:
        """Raster positions i * width + j in the order in which they are read, (height * width,)."""
        raise NotImplementedError

    def forward(self, x: Tensor, reverse: bool = False) -> Tensor:
        """(b, H * W) → the same, reordered; `reverse` undoes it.

        Raises:
            ValueError: another length.
        """
        index = self.backward_shuffle_idx if reverse else self.forward_shuffle_idx
        if x.ndim != 2 or x.shape[1] != len(index):
            raise ValueError(
                f"{type(self).__name__} reorders (b, {len(index)}) codes, not {tuple(x.shape)}: H and W of the "
                "permuter_config must be the size of the code map"
            )
        return x[:, index]


class Subsample(TablePermuter):
    """Coarse to fine: every second code of every second row first, each of the four phases split again the same way."""

    @staticmethod
    def table(height: int, width: int) -> np.ndarray:
        """Split into the phases (0, 0), (0, 1), (1, 0), (1, 1) until single codes are left."""
        if height != width or height & (height - 1):
            raise ValueError(
                f"Subsample needs a square map whose side is a power of two, not {height}x{width}"
            )

        def split(grid: np.ndarray) -> list[np.ndarray]:
            if grid.size == 1:
                return [grid.reshape(-1)]
            return [part for i in (0, 1) for j in (0, 1) for part in split(grid[i::2, j::2])]

        return np.concatenate(split(np.arange(height * width).reshape(height, width)))


def mortonify(i: int, j: int) -> int:
    """The Morton code of a position: the bits of j at even places, those of i at odd ones."""
    code, place = 0, 0
    while i >> place or j >> place:
        code |= ((j >> place) & 1) << (2 * place)
        code |= ((i >> place) & 1) << (2 * place + 1)
        place += 1
    return code


class ZCurve(TablePermuter):
    """Along a Z-shaped curve that keeps neighbours together (Morton 1966)."""

    @staticmethod
    def table(height: int, width: int) -> np.ndarray:
        """By rising Morton code."""
        return np.argsort([mortonify(i, j) for i in range(height) for j in range(width)], kind="stable")


class SpiralOut(TablePermuter):
    """From the middle outwards."""

    @staticmethod
    def table(height: int, width: int) -> np.ndarray:
        """From (H/2, W/2 - 1): up, right, down, left, over 1, 1, 2, 2, 3, 3, … codes."""
        if height != width or height % 2:
            raise ValueError(f"a spiral needs a square map with an even side, not {height}x{width}")
        i, j = height // 2, width // 2 - 1
        path, turn = [i * width + j], 0
        while len(path) < height * width:
            di, dj = ((-1, 0), (0, 1), (1, 0), (0, -1))[turn % 4]
            for _ in range(turn // 2 + 1):
                i, j = i + di, j + dj
                path.append(i * width + j)
            turn += 1
        return np.array(path[: height * width])


class SpiralIn(TablePermuter):
    """From the rim inwards: `SpiralOut` backwards."""

    @staticmethod
    def table(height: int, width: int) -> np.ndarray:
        """The outward spiral reversed."""
        return SpiralOut.table(height, width)[::-1]


class Random(TablePermuter):
    """One fixed random order, the same for every model of that size."""

    @staticmethod
    def table(height: int, width: int) -> np.ndarray:
        """The first permutation of numpy's generator with seed 1."""
        return np.random.RandomState(1).permutation(height * width)


class AlternateParsing(TablePermuter):
    """As an ox ploughs: odd rows from right to left."""

    @staticmethod
    def table(height: int, width: int) -> np.ndarray:
        """Rows, each odd one reversed."""
        grid = np.arange(height * width).reshape(height, width)
        grid[1::2] = grid[1::2, ::-1].copy()
        return grid.reshape(-1)
