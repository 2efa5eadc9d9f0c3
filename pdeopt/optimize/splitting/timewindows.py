"""The windows of time steps that a rank owns, and where they meet others."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from petsc4py import PETSc
from torch import Tensor

from pdeopt.control.problem import ControlProblem
from pdeopt.core.arrays import assign
from pdeopt.core.errors import SolveFailure, together
from pdeopt.optimize.splitting.couplings import Couplings
from pdeopt.optimize.splitting.pair import Pair
from pdeopt.optimize.splitting.splitconstraint import SplitWork
from pdeopt.optimize.splitting.window import Window
from pdeopt.optimize.splitting.windowkkt import FactorPool
from pdeopt.optimize.splitting.windowpoint import Pulls

#: The blocks: windows 1, 3, ... and 2, 4, ...
ODD, EVEN = "odd", "even"


class TimeWindows:
    """This rank's windows between the steps of `cuts`, even shares of all; calls are collective but where it says so.

    Args:
        problem: of all steps.
        cuts: 0, and the last steps of all windows.
        work: is counted on.

    Attributes:
        own: numbers of the windows, counted from 0.
        places: where windows meet.
    """

    def __init__(self, problem: ControlProblem, cuts: list[int], work: SplitWork) -> None:
        self.problem, self.work, self.mpi, count = problem, work, problem.grid.mpi, len(cuts) - 1
        share = [round(count * r / self.mpi.size) for r in range(self.mpi.size + 1)]
        self.own, pool = range(share[self.mpi.rank], share[self.mpi.rank + 1]), FactorPool()
        self.windows = [Window(problem, cuts[w], cuts[w + 1], pool, work) for w in self.own]
        self.places = Couplings(self.mpi, self.own, count, problem.state_mass)
        # by place: whether its first side, that of an odd window, is where a window ends
        self._is_end = torch.tensor([place % 2 == 0 for place in self.places.held], dtype=torch.bool)[:, None]

    def pair(self, beta: float | None) -> Pair:
        """Both sides where every window goes from u_0 without control.

        Args:
            beta: the penalty; None for half of what a jump can cost.
        """
        start = self.windows[0].v.expand(len(self.places.held), -1)
        pair = Pair(start, start, self.places, beta or self._stiffness() / 2)
        for w, window in zip(self.own, self.windows):
            window.measure(self._pulls(w, pair), pair.beta)
        return Pair(*self._sides(pair, ODD, EVEN), self.places, pair.beta)

    def _stiffness(self) -> float:
        """The objective's curvature in a state, summed over a window, relative to the mass: what a jump can cost."""
        found = []
        for window in self.windows:
            lin = window.lin
            ones, no_z, no_p = torch.ones_like(lin.u), torch.zeros_like(lin.z_step), torch.zeros_like(lin.p)
            h, _, _ = self.problem.objective.hvp(lin.u, lin.z_step, lin.steps, ones, no_z, no_p)
            found.append(float((ones * h).sum() / (ones[:1] * self.problem.state_mass(ones[:1])).sum()))
        everywhere = [each for those in self.mpi.allgather(found) for each in those]
        mean = math.fsum(everywhere) / len(everywhere)
        return mean if mean > 0 else 1.0

    def update(self, block: str, pair: Pair) -> None:
        """Minimize the windows of a block, and move its side of the pair. Raises `SolveFailure`; all is as it was."""
        before = [window.point() for window in self.windows]
        try:
            together(self.mpi, lambda: self._minimize(block, pair))
        except SolveFailure:
            for window, point in zip(self.windows, before):
                window.back(point)
            raise
        first, second = self._sides(pair, block)
        if block == ODD:
            pair.move_first(first)
        else:
            pair.move_second(second)

    def _minimize(self, block: str, pair: Pair) -> None:
        for w, window in zip(self.own, self.windows):
            if _block(w) == block:
                window.minimize(self._pulls(w, pair), pair.beta)

    def _pulls(self, w: int, pair: Pair) -> Pulls:
        """What the pair says at the start and at the end of a window. Not collective."""
        window, pull, row = self.windows[w - self.own.start], pair.pull(_block(w) == ODD), w - self.places.held.start
        return pull[row - 1] if window.starts else None, pull[row] if window.ends else None

    def _sides(self, pair: Pair, *blocks: str) -> tuple[Tensor, Tensor]:
        """Both sides, new from the windows of these blocks, those of other ranks too."""
        ends, starts = self._by_end(pair.first, pair.second)
        for w, window in zip(self.own, self.windows):
            row = w - self.places.held.start
            if window.starts and _block(w) in blocks:
                starts[row - 1] = window.v
            if window.ends and _block(w) in blocks:
                ends[row] = window.u[-1]
        if len(ends):
            self.work.bytes += self.places.exchange(ends, starts)
        return self._by_end(ends, starts)

    def _by_end(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Ends and starts of both sides, or both sides of ends and starts: new tensors. Not collective."""
        return torch.where(self._is_end, first, second), torch.where(self._is_end, second, first)

    def sum(self, own: list[float]) -> float:
        """The sum of numbers of all windows, the same to the last bit on any number of ranks."""
        return math.fsum(each for those in self.mpi.allgather(own) for each in those)

    def vector(self, name: str, out: PETSc.Vec) -> PETSc.Vec:
        """Rows of the windows' steps in `out`, brought to the ranks that own these steps."""
        grid, begin = self.problem.grid, self.windows[0].begin
        rows = torch.cat([getattr(window, name) for window in self.windows])
        at = np.clip(grid.offsets - begin, 0, len(rows))
        parts = self.mpi.alltoall([rows[at[r] : at[r + 1]].clone() for r in range(self.mpi.size)])
        assign(out, torch.cat(parts))
        return out

    def memory(self) -> dict[str, Any]:
        """What a restart needs, whole on the first rank; for any number of ranks."""
        kept = self.mpi.gather([window.memory() for window in self.windows])
        windows = [each for those in kept or [] for each in those]
        memory: dict[str, Any] = {f"window{w}.{name}": x for w, each in enumerate(windows) for name, x in each.items()}
        return memory | {"work": self.mpi.gather((self.work.products, self.work.solves, self.work.bytes))}

    def recall(self, memory: dict[str, Any]) -> None:
        """Go on from what `memory` gave."""
        for w, window in zip(self.own, self.windows):
            start = f"window{w}."
            window.recall({name.removeprefix(start): x for name, x in memory.items() if name.startswith(start)})
            window.objective()  # what it takes is counted in the run before
        counted = memory["work"][min(self.mpi.rank, len(memory["work"]) - 1)]
        self.work.products, self.work.solves, self.work.bytes = counted


def _block(w: int) -> str:
    return EVEN if w % 2 else ODD
