"""Windows of steps: the parts into which time-parallel methods cut the time axis."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import torch
from torch import Tensor

from pdeopt.steps.sparse import StepMatrix
from pdeopt.steps.timegrid import TimeGrid


class Windows:
    """Windows of `size` steps, counted from step 1: what of them this rank owns, as numbers of its rows.

    Attributes:
        starts: rows at which a window or the slab starts.
        coupled: rows that start a window and have a step before them.
        ends: rows that end a window.
        enters, leaves: a window goes on from the rank before, to the rank after.

    Args:
        grid: the steps.
        size: steps of a window; the last one may be shorter.
    """

    def __init__(self, grid: TimeGrid, size: int) -> None:
        self.grid, self.size = grid, size
        step = np.arange(grid.begin, grid.end)
        starts = step % size == 0
        self.coupled = np.flatnonzero(starts & (step > 0))
        self.enters = grid.begin % size != 0
        self.leaves = grid.end % size != 0 and not grid.is_last
        self.ends = np.flatnonzero(np.isin(step + 1, grid.window_ends(size)))
        starts[0] = True
        self.starts = np.flatnonzero(starts)

    def sum(self, rows: Tensor) -> Tensor:
        """Sums of `rows`, (n_local, k), over the windows that end here, (len(ends), k). Collective."""
        part = torch.zeros(len(self.starts), rows.shape[1], dtype=rows.dtype)
        part.index_add_(0, torch.from_numpy(np.searchsorted(self.starts, np.arange(len(rows)), side="right") - 1), rows)
        before = self.grid.neighbors.receive_before(part[0]) if self.enters else None
        if before is not None:
            part[0] += before
        if self.leaves:
            self.grid.neighbors.send_after(part[-1])
        return part[: len(self.ends)]


def alike(grid: TimeGrid, *matrices: StepMatrix) -> bool:
    """Whether all steps of all ranks share these matrices; a rank with one step cannot tell alone. Collective.

    Args:
        grid: of the ranks.
        *matrices: of the steps of this rank.
    """
    constant = all(matrix.is_constant for matrix in matrices)
    if grid.mpi.size == 1:
        return constant
    data = (part for matrix in matrices for part in (matrix.sparsity.rows, matrix.sparsity.cols, matrix.values.numpy()))
    digest = sha256(b"".join(part.tobytes() for part in data)).digest() if constant else None
    digests = set(grid.time.allgather(digest))  # ranks with other rows have other entries
    return grid.all(digests == {digest} and constant)


def sum_windows(windows: Windows, matrix: StepMatrix) -> StepMatrix:
    """The sums of a matrix over the windows that end on this rank. Collective.

    Args:
        windows: of the steps of this rank.
        matrix: of these steps, or one for all.

    Returns:
        One matrix a window, or one for all where all windows are alike.
    """
    if alike(windows.grid, matrix) and windows.grid.num_steps % windows.size == 0:
        return StepMatrix(matrix.sparsity, windows.size * matrix.values)
    return StepMatrix(matrix.sparsity, windows.sum(matrix.values.expand(windows.grid.n_local, -1)))


@dataclass(frozen=True)
class Stretch:
    """Rows begin to end - 1, which one call runs through; the first of a window or not."""

    begin: int
    end: int
    is_first: bool


def chunks(begin: int, end: int, most: int) -> list[Stretch]:
    """A window in chunks of `most` steps or fewer: of one length, where one above half of that divides it."""
    steps, most = end - begin, max(min(most, end - begin), 1)
    length = next((k for k in range(most, most // 2, -1) if steps % k == 0), most)
    return [Stretch(a, min(a + length, end), a == begin) for a in range(begin, end, length)]
