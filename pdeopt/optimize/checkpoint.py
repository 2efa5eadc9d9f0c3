"""Checkpoints: a point, a method's memory and the history of a run, in the checked format of `core.storage`.

A file does not depend on the number of ranks. What a run goes on from is checked: the fingerprints of problem, data and
method, that no tensor is missing or too many, shapes and types.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from petsc4py import PETSc
from torch import Tensor

from pdeopt.control.problem import ControlProblem
from pdeopt.core.arrays import assign, copy
from pdeopt.core.errors import InputError, SolveFailure, on_root
from pdeopt.core.interrupt import Interrupted, interruption
from pdeopt.core.monitor import AnyRecord, DescentRecord, History, Record
from pdeopt.core.storage import read_tensors, write_tensors
from pdeopt.space.layouts.layout import Layout

FIELDS = ("state", "control", "parameters", "multiplier")


@dataclass(frozen=True)
class Checkpoint:
    """What a run goes on from.

    Attributes:
        x: the point [u | z | p], in the layout of the problem.
        lam: the multiplier.
        memory: what the method keeps from one iteration to the next, JSON values by name.
        history: of all iterations so far.
    """

    x: PETSc.Vec
    lam: PETSc.Vec
    memory: dict[str, Any]
    history: History


def write_checkpoint(path: str, problem: ControlProblem, fingerprint: dict[str, Any], checkpoint: Checkpoint) -> None:
    """Write a checkpoint atomically. Collective; an error of rank 0 is raised on all.

    Args:
        path: of the file, which is replaced.
        problem: whose layout the vectors have.
        fingerprint: what must be equal at a restart, as JSON values: the problem's parameters, the solver.
        checkpoint: what is written; the file does not depend on the number of ranks.

    Raises:
        OSError: the file cannot be written; the old one is as it was.
    """
    tensors = dict(zip(FIELDS, _gather(problem, checkpoint)))
    _write(problem.grid.mpi, path, fingerprint, checkpoint.memory, tensors, checkpoint.history)


def read_checkpoint(path: str, problem: ControlProblem, fingerprint: dict[str, Any]) -> Checkpoint:
    """Read a checkpoint of the same problem. Collective.

    Args:
        path: of the file.
        problem: with the same numbers of unknowns, on any number of ranks.
        fingerprint: as it was written.

    Returns:
        The checkpoint, its vectors in the layout of `problem`.

    Raises:
        InputError: no such file, a damaged file, or one of another problem; on all ranks.
    """
    tensors, memory, history = on_root(problem.grid.mpi, lambda: _read(path, fingerprint, Record))
    if set(tensors) != set(FIELDS):
        raise InputError(f"-restart {path}", f"fields {', '.join(sorted(tensors))}", ", ".join(FIELDS))
    x, lam = problem.create_primal(), problem.create_multiplier()
    parts = [_own_part(problem, name, tensors[name], size) for name, size in zip(FIELDS, _sizes(problem))]
    assign(x, *parts[:3])
    assign(lam, parts[3])
    return Checkpoint(x, lam, memory, history)


def write_memory(
    path: str, fingerprint: dict[str, Any], memory: Mapping[str, Any], history: History, comm: Any = None
) -> None:
    """Write what a `Minimizer` needs to go on, atomically. For unknowns that every rank has.

    Args:
        path: of the file, which is replaced.
        fingerprint: what must be equal at a restart, as JSON values.
        memory: `Minimizer.memory()`, tensors and numbers; more of both may be added.
        history: of all iterations so far.
        comm: communicator or team whose first rank writes, collective then; None: this process writes.

    Raises:
        OSError: the file cannot be written; the old one is as it was.
    """
    tensors = {name: value for name, value in memory.items() if isinstance(value, Tensor)}
    numbers = {name: value for name, value in memory.items() if name not in tensors}
    _write(comm, path, fingerprint, numbers, tensors, history)


def read_memory(
    path: str, fingerprint: dict[str, Any], comm: Any = None, kind: type[AnyRecord] = DescentRecord
) -> tuple[dict[str, Any], History]:
    """What `write_memory` wrote, for `minimize(x, memory=..., history=...)`.

    Args:
        path: of the file.
        fingerprint: as it was written.
        comm: communicator or team whose first rank reads, collective then; None: this process reads.
        kind: of the records of the history.

    Returns:
        Memory and history.

    Raises:
        InputError: no such file, a damaged file, or one of another problem.
    """

    def read() -> tuple[dict[str, Tensor], dict[str, Any], History]:
        return _read(path, fingerprint, kind)

    tensors, numbers, history = read() if comm is None else on_root(comm, read)
    return tensors | numbers, history


class CheckpointFile:
    """The checkpoints of one run: when they are due, what a signal does, and what happens where none can be written.

        file = CheckpointFile(path, every=10, comm=MPI.COMM_WORLD)
        with interruptible():
            ... after each iteration: file.after(iteration, lambda: write_memory(...))
            ... after the last: file.end(iteration, ...)

    Args:
        path: of the file; empty for a run without checkpoints, which signals end all the same.
        every: iterations from one to the next.
        comm: communicator or team of all ranks of the run.
        unit: what is counted, for messages.

    Attributes:
        signal: that has ended the run; 0 for none.
    """

    def __init__(self, path: str, every: int, comm: Any, unit: str = "iteration") -> None:
        self.path, self.every, self.comm, self.unit = path, every, comm, unit
        self.signal, self._done, self._is_failing = 0, 0, False
        self._kept: int | None = None

    def after(self, iteration: int, write: Callable[[], None], is_due: bool | None = None) -> None:
        """Write if it is time to, or if a signal has come. Collective.

        Args:
            iteration: that is done.
            write: the checkpoint of it; an `OSError` is told once, and the run goes on without checkpoints.
            is_due: whether it is time to; by default every so many iterations.

        Raises:
            Interrupted: a signal has come, to one of the ranks.
        """
        self.signal, self._done = interruption(self.comm), iteration
        if self.signal or (iteration % self.every == 0 if is_due is None else is_due):
            self.end(iteration, write)
        self.leave()

    def end(self, iteration: int, write: Callable[[], None]) -> None:
        """Write the checkpoint of the last iteration, if that is not done. Collective."""
        if not self.path or self._is_failing or self._kept == iteration:
            return
        try:
            write()
            self._kept = iteration
        except SolveFailure as failure:  # a point that nothing goes on from
            self._warn(f"{failure.what}; {self._words()}")
        except OSError as error:
            self._is_failing = True
            self._warn(f"{error.strerror or error}; {self._words()}; the run goes on without")

    def _warn(self, words: str) -> None:
        if self.comm.rank == 0:
            print(f"warning: -checkpoint {self.path}: {words}", file=sys.stderr, flush=True)

    def leave(self) -> None:
        """Raise `Interrupted` where a signal has ended the run: once more when all its files are written."""
        if self.signal:
            raise Interrupted(self.signal, f"ended after {self.unit} {self._done}; {self._words()}")

    def _words(self) -> str:
        if not self.path:
            return "there is no checkpoint of it (-checkpoint FILE)"
        if self._kept is None:
            return f"{self.path} is as it was before this run"
        return f"{self.path} holds the checkpoint of {self.unit} {self._kept}"


# -- history as tensors ------------------------------------------------------------------------------------


def _write(
    comm: Any, path: str, fingerprint: dict[str, Any], numbers: Any, tensors: Mapping[str, Tensor], history: History
) -> None:
    text = {"fingerprint": fingerprint, "memory": numbers}
    whole = {**tensors, **_columns(history)}
    if comm is None:
        write_tensors(path, whole, text)
    else:
        on_root(comm, lambda: write_tensors(path, whole, text))


def _read(
    path: str, fingerprint: dict[str, Any], kind: type[AnyRecord]
) -> tuple[dict[str, Tensor], dict[str, Any], History]:
    tensors, text = read_tensors(path, fingerprint)
    columns = {name: tensors.pop(name) for name in list(tensors) if name.startswith("history.")}
    return tensors, text["memory"], _records(path, columns, kind)


def _columns(history: History) -> dict[str, Tensor]:
    """(iterations,) numbers of each column, and the notes as letters, a line each."""
    found = {}
    for name, values in history.columns().items():
        if name == "note":
            found["history.note"] = torch.tensor(list("\n".join(values).encode()), dtype=torch.uint8)
        else:
            kind = torch.int64 if all(type(value) is int for value in values) else torch.float64
            found[f"history.{name}"] = torch.tensor(values, dtype=kind)
    return found


def _records(path: str, columns: dict[str, Tensor], kind: type[AnyRecord]) -> History:
    names = [each.name for each in fields(kind)]
    values = {name.removeprefix("history."): column.tolist() for name, column in columns.items()}
    if values:
        values["note"] = bytes(values.get("note", [])).decode().split("\n")
    if values and (set(values) != set(names) or len({len(column) for column in values.values()}) != 1):
        raise InputError(f"-restart {path}", f"a history of {', '.join(values)}", ", ".join(names))
    return History([kind(**dict(zip(values, row))) for row in zip(*values.values())])


# -- vectors of ranks --------------------------------------------------------------------------------------


def _sizes(problem: ControlProblem) -> tuple[int, int, int, int]:
    return problem.layout.state_size, problem.layout.control_size, problem.layout.param_size, problem.layout.state_size


def _gather(problem: ControlProblem, checkpoint: Checkpoint) -> list[Tensor]:
    """All fields, flat and whole, on rank 0; empty on the others."""
    entries = torch.cat([copy(checkpoint.x), copy(checkpoint.lam)]).split(_sizes(problem))
    gathered = (problem.grid.mpi.gather(part.numpy()) for part in entries)
    whole = [torch.empty(0) if parts is None else torch.cat([torch.from_numpy(p) for p in parts]) for parts in gathered]
    return [_reordered(problem, name, part) for name, part in zip(FIELDS, whole)]


def _layout_of(problem: ControlProblem, name: str) -> Layout | None:
    """The layout of the unknowns of a step in a field; None where a rank has whole steps, or there are none."""
    constraint = problem.constraint
    return {"state": constraint.layout, "control": constraint.controls, "multiplier": constraint.layout}.get(name)


def _reordered(problem: ControlProblem, name: str, whole: Tensor) -> Tensor:
    """A field rank by rank as steps with their unknowns in natural order: a file does not know how ranks were split."""
    layout, k, N = _layout_of(problem, name), problem.grid.space_ranks, problem.grid.num_steps
    if layout is None:
        return whole
    order = layout.natural_order
    if not problem.grid.is_root:
        return whole
    rows, start, widths = torch.empty(N, layout.size, dtype=whole.dtype), 0, np.diff(layout.starts)
    for time, steps in enumerate(np.diff(problem.grid.offsets)):
        first = problem.grid.offsets[time]
        for space in range(k):
            size, columns = steps * widths[space], order[layout.starts[space] : layout.starts[space + 1]]
            rows[first : first + steps, columns] = whole[start : start + size].reshape(steps, -1)
            start += size
    return rows.reshape(-1)


def _own_part(problem: ControlProblem, name: str, whole: Tensor, size: int) -> Tensor:
    layout, grid = _layout_of(problem, name), problem.grid
    if layout is not None and whole.shape == (grid.num_steps * layout.size,) and whole.dtype == torch.float64:
        _ = layout.natural_order  # which is checked
        return whole.reshape(grid.num_steps, -1)[grid.begin : grid.end][:, layout.natural].reshape(-1)
    start = int(problem.grid.mpi.exscan(size) or 0)
    total = int(problem.grid.mpi.allreduce(size))
    if whole.shape != (total,) or whole.dtype != torch.float64:
        got = f"a field of shape {tuple(whole.shape)}, {whole.dtype}"
        raise InputError("-restart", got, f"{total} numbers of double precision, as this problem has")
    return whole[start : start + size].clone()
