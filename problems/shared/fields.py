"""Fields of a solution over time: rows of each rank, and what a reader sees of them.

Whole on the first rank, for pictures; or block by block, for a file that no rank could hold.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import pdeopt as po

#: Bytes of a block of rows, as the first rank gathers it.
BLOCK = 2**26


def _as_it_is(rows: Tensor, t: Tensor) -> np.ndarray:
    return rows.numpy()


@dataclass(frozen=True)
class StepField:
    """A field at steps 1 to N that ranks have rows of.

    Attributes:
        rows: of this rank, (n_local, unknowns of it); of controls at nodes in time one more in all.
        of: state | control, whose unknowns they are: whole rows have these in their natural order; "" leaves it.
        shown: whole rows (batch, n) and their times (batch,) -> what a reader sees, (batch, ...).
        first: the whole row at t_0, (n,), which comes before the others; None for none.
    """

    rows: Tensor
    of: str = "state"
    shown: Callable[[Tensor, Tensor], np.ndarray] = _as_it_is
    first: Tensor | None = None

    def blocks(self, problem: po.ControlProblem, most: float) -> Iterator[np.ndarray | None]:
        """On rank 0 rows in their order, as many at a time as have `most` bytes; None elsewhere. Collective."""
        grid, times = problem.grid, torch.from_numpy(problem.grid.times)
        if self.first is not None:
            yield self.shown(self.first[None], times[:1]) if grid.is_root else None
        begin, total = grid.time.exscan(len(self.rows)) or 0, grid.time.allreduce(len(self.rows))
        length = max(int(min(most / (8 * max(grid.space.allreduce(self.rows.shape[1]), 1)), total)), 1)
        for start in range(0, total, length):
            own = [min(max(end - begin, 0), len(self.rows)) for end in (start, start + length)]
            whole = gather(problem, self.rows[slice(*own)], self.of)
            yield None if whole is None else self.shown(whole, times[start + 1 : start + 1 + length])


@dataclass(frozen=True)
class TimeField:
    """A field at nodes 0 to N that each rank can tell: times (batch,) -> (batch, ...)."""

    at: Callable[[Tensor], np.ndarray]

    def blocks(self, problem: po.ControlProblem, most: float) -> Iterator[np.ndarray | None]:
        """On rank 0 rows in their order, as many at a time as have `most` bytes; None elsewhere."""
        times = torch.from_numpy(problem.grid.times)
        length = max(int(min(most / max(self.at(times[:1]).nbytes, 1), len(times))), 1)
        for start in range(0, len(times), length):
            yield self.at(times[start : start + length]) if problem.grid.is_root else None


#: By names; arrays do not depend on the step, and every rank has them.
Fields = Mapping[str, StepField | TimeField | np.ndarray]


class Readable(ABC):
    """A control problem whose solution a reader gets as fields."""

    problem: po.ControlProblem

    @abstractmethod
    def fields(self, result: po.Result) -> Fields:
        """The solution for a reader. Collective."""

    def arrays(self, result: po.Result) -> dict[str, np.ndarray] | None:
        """The fields of the solution, whole, on rank 0; None elsewhere. Collective."""
        found = {}
        for name, field in self.fields(result).items():
            blocks = [field] if isinstance(field, np.ndarray) else list(field.blocks(self.problem, np.inf))
            if self.problem.grid.is_root:
                found[name] = np.concatenate(blocks) if len(blocks) > 1 else blocks[0]
        return found if self.problem.grid.is_root else None


def gather(problem: po.ControlProblem, rows: Any, of: str = "state") -> Any:
    """All rows of states or controls, (N, dim), in their order on one rank, on rank 0; None elsewhere. Collective."""
    constraint = problem.constraint
    layout = {"state": constraint.layout, "control": constraint.controls, "": None}[of]
    order = None if layout is None else np.argsort(layout.natural_order)
    whole = problem.grid.gather(rows)
    return whole if whole is None or order is None else whole[:, order]
