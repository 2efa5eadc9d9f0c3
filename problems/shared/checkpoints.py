"""Checkpoints of a script that trains: when they are written, and what a restart goes on from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, astuple
from typing import Any

import torch
from torch import Tensor

import pdeopt as po
from pdeopt.core import DescentRecord, SplitRecord
from pdeopt.optimize import read_memory, write_memory
from pdeopt.optimize.descent import Minimizer
from pdeopt.optimize.splitting import ADMM, SplitConstraint
from problems.shared.files import CheckpointFiles


class DescentCheckpoints:
    """The checkpoints of one run of a minimizer, with what the script itself remembers.

        checkpoints = DescentCheckpoints(files, comm, fingerprint, lambda: {"errors": errors})
        result = minimizer.minimize(x, observers=[checkpoints.observe], **checkpoints.resume())
        checkpoints.end(name, result)
        ... the files of the run ...
        checkpoints.leave()

    Args:
        files: their names.
        comm: communicator or team of all ranks.
        fingerprint: what must be equal at a restart, as JSON values; see `method_fingerprint`.
        run: what the script remembers, tensors and JSON values by name, at the time of a checkpoint.
        kind: of the records of the history; by default that of the class.

    Attributes:
        run_before: what the script remembered in the run that this one continues; None where it continues none.
    """

    #: Of the records of the history.
    kind: type[DescentRecord | SplitRecord] = DescentRecord

    def __init__(
        self,
        files: CheckpointFiles,
        comm: Any,
        fingerprint: dict[str, Any],
        run: Callable[[], dict[str, Any]] = dict,
        kind: type[DescentRecord | SplitRecord] | None = None,
    ) -> None:
        self.settings, self.comm, self.fingerprint, self._run = files, comm, fingerprint, run
        self.kind = kind or self.kind
        self.file = files.of_run(comm)
        self.run_before: dict[str, Any] | None = None
        self._before: po.History | None = None

    def resume(self) -> dict[str, Any]:
        """What `minimize` takes to go on: memory and history; nothing without -restart. Collective."""
        if not self.settings.restart:
            return {}
        memory, self._before = read_memory(self.settings.restart, self.fingerprint, self.comm, self.kind)
        self.run_before = {name[4:]: memory.pop(name) for name in list(memory) if name.startswith("run.")}
        return {"memory": memory, "history": self._before}

    def observe(self, minimizer: Any, history: po.History) -> None:
        """To be called after each iteration, when the script has done what it does there."""
        self._last = history[-1]
        self._look(minimizer)
        self.file.after(self._last.iteration, lambda: self._write(history))

    def end(self, name: str, result: po.Result) -> None:
        """Write the last checkpoint, and say where nothing was left to do. Collective."""
        if not len(result.history):
            return
        self.file.end(result.iterations, lambda: self._write(result.history))
        if self._before is not None:
            self.file.tell_if_finished(name, self._before, result)

    def leave(self) -> None:
        """Raise `Interrupted` where a signal has ended the run."""
        self.file.leave()

    def _look(self, minimizer: Minimizer) -> None:
        self._minimizer, self._tally = minimizer, minimizer.spent()

    def _memory(self) -> dict[str, Any]:
        """What the method remembers. Collective."""
        return self._minimizer.memory() | {"tally": torch.tensor(astuple(self._tally), dtype=torch.float64)}

    def _write(self, history: po.History) -> None:
        """What is counted after the last record, such as a comparison with the start, is no part of the run."""
        run = {f"run.{name}": value for name, value in self._run().items()}
        records = po.History([*history.records[:-1], self._last])
        write_memory(self.settings.checkpoint, self.fingerprint, self._memory() | run, records, self.comm)


class SplitCheckpoints(DescentCheckpoints):
    """The checkpoints of a run of `ADMM`, whose ranks have memories of their own: for as many ranks as wrote them.

    going_on = checkpoints.resume_split(constraint)
    result = admm.solve(observers=[checkpoints.observe], **going_on)
    """

    kind = SplitRecord

    def resume_split(self, constraint: SplitConstraint) -> dict[str, Any]:
        """Give the constraint what it remembered; what `solve` takes to go on. Collective."""
        found = self.resume()
        if memory := found.pop("memory", None):
            start = f"{self.comm.rank}."
            constraint.recall(
                {name.removeprefix(start): each for name, each in memory.items() if name.startswith(start)}
            )
        return found

    def end(self, name: str, result: po.Result) -> None:
        """As for other methods, but where a sweep broke off in its middle, which leaves nothing to go on from."""
        if result.reason >= 0 or result.reason in (po.Reason.DIVERGED_MAX_IT, po.Reason.INTERRUPTED):
            super().end(name, result)

    def _look(self, minimizer: ADMM) -> None:  # type: ignore[override]
        self._constraint = minimizer.constraint

    def _memory(self) -> dict[str, Any]:
        """The memories of all ranks on the first one, a message each for numbers that may be many."""
        own, found = self._constraint.memory(), dict[str, Any]()
        for name in sorted({name for names in self.comm.allgather(list(own)) for name in names}):
            values = self.comm.gather(own.get(name)) or []
            found |= {f"{rank}.{name}": each for rank, each in enumerate(values) if each is not None}
        return {name: _contiguous(each) for name, each in found.items()}


def _contiguous(value: Any) -> Any:
    return value.contiguous() if isinstance(value, Tensor) else value


def method_fingerprint(minimizer: Minimizer) -> dict[str, Any]:
    """The settings of a method by the names of their options; when to stop may change at a restart."""
    return {f"{minimizer.Settings.prefix}{name}": value for name, value in asdict(minimizer.settings).items()}
