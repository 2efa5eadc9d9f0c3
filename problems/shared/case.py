"""What all problem scripts share: the command line, the solve, and everything that is written.

A script builds a `Case` and hands it to `run`; `start` calls its main() with the exit codes 0, 2 for bad
input, and 1 for anything unexpected, on all ranks.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from mpi4py import MPI
from petsc4py import PETSc

from pdeopt.control.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from pdeopt.control.metric import RieszMetric
from pdeopt.control.problem import ControlProblem
from pdeopt.control.propagator import PropagatorSettings
from pdeopt.control.reduced import ReducedObjective
from pdeopt.core.errors import InputError
from pdeopt.core.monitor import History, Reason, Result
from pdeopt.core.options import require_all_read
from pdeopt.core.settings import Settings, merge, read, sections, setting
from pdeopt.optimize.fullspace.sqp import SQPSettings, SQPSolver
from pdeopt.optimize.parts.loop import Method
from pdeopt.optimize.tao import TaoSettings, TaoSolver
from pdeopt.steps.stepsolve import StepSettings
from problems.shared import report

#: Seconds that a failing rank waits for the others to fail as well before it ends them all.
PATIENCE = 5.0


#: Solvers that honor bounds on the control.
BOUNDED = ("active_set", "tao")


@dataclass(frozen=True)
class ScriptSettings(Settings, includes=(PropagatorSettings,)):
    """Options of every problem script."""

    solver: str = setting(
        "sqp",
        "full space: composite step, Newton, or Newton with bounds; or any TAO solver",
        choices=("sqp", "newton", "active_set", "tao"),
        reads={
            "sqp": (SQPSettings,),
            "newton": (SQPSettings,),
            "active_set": (SQPSettings,),
            "tao": (TaoSettings, StepSettings),
        },
    )
    lower: float = setting(None, "lower bound on the control (-solver active_set or tao)", kind=float)
    upper: float = setting(None, "upper bound on the control (-solver active_set or tao)", kind=float)
    summary: str = setting("", "write a summary to this .json file")
    plot: str = setting("", "write a picture to this .png, .pdf or .svg file")
    output: str = setting("", "write the solution to this .npz, .mat or .h5 file")
    checkpoint: str = setting("", "write checkpoints to this file")
    checkpoint_every: int = setting(1, "iterations from checkpoint to checkpoint", at_least=1)
    restart: str = setting("", "go on from this checkpoint")


class Case(Protocol):
    """A problem as a script states it."""

    name: str
    parameters: dict[str, Any]
    problem: ControlProblem

    def arrays(self, result: Result) -> dict[str, np.ndarray] | None:
        """The solution for a reader, whole, on rank 0; None elsewhere. Collective."""

    def panels(self, arrays: dict[str, np.ndarray]) -> list[report.Panel]:
        """What the picture shows beside the convergence history."""


@contextmanager
def command_line(argv: Sequence[str] | None, doc: str, *own: tuple[type, str]) -> Iterator[None]:
    """Make `argv` PETSc's options inside the block; None stands for what PETSc was started with.

    With -help in them, print the options, the script's own first, and leave with code 0.

    Args:
        own: settings classes of the script and their titles.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    inserted = _insert(words) if argv is not None else []
    try:
        if {"-help", "--help", "-h"} & set(words):
            _help(doc, *own)
            raise SystemExit(0)
        yield
    finally:
        for name in inserted:
            PETSc.Options().delValue(name)


def _insert(words: list[str]) -> list[str]:
    """Put words into the options database as PETSc's own parser does; returns the names."""
    names = []
    for word, following in zip(words, [*words[1:], "-"]):
        if _is_name(word):
            value = "" if _is_name(following) or following == "-" else following
            PETSc.Options().setValue(word.lstrip("-"), value)
            names.append(word.lstrip("-"))
            if names[-1] == "options_file":
                if not os.path.isfile(value):
                    raise InputError("-options_file", f"{value}, which is no file", "a file of options")
                with open(value) as file:
                    names += _insert([w for line in file for w in line.split("#")[0].split()])
    return names


def _is_name(word: str) -> bool:
    return len(word) > 1 and word[0] == "-" and not (word[1].isdigit() or word[1] == ".")


def _help(doc: str, *own: tuple[type, str]) -> None:
    groups = [*(group for group, _ in own), ScriptSettings]
    found = merge([section for group in groups for section in sections(group)])
    text = [doc.strip(), *("\n" + section.text() for section in found)]
    PETSc.Sys.Print("\n".join(text) + "\n\nPETSc:")
    sys.stdout.flush()
    PETSc.Options().setValue("help", "")
    ksp = PETSc.KSP().create()
    ksp.setOptionsPrefix("sqp_kkt_")
    tao = PETSc.TAO().create()
    for petsc_object in (ksp, tao):
        petsc_object.setFromOptions()
        petsc_object.destroy()
    PETSc.Options().delValue("help")


def run(case: Case, settings: ScriptSettings) -> float:
    """Solve the case as the options say, write what they ask for, and return the objective. Collective."""
    report.check_targets(case.problem.grid.mpi, settings)
    if settings.solver not in BOUNDED and (settings.lower is not None or settings.upper is not None):
        raise InputError("-lower, -upper", f"-solver {settings.solver}", " | ".join(f"-solver {s}" for s in BOUNDED))
    begin = time.perf_counter()
    result = Run(case, settings).solve()
    require_all_read()
    seconds = time.perf_counter() - begin
    if not result.converged:
        PETSc.Sys.Print(f"{case.name}: {result.message}", comm=case.problem.grid.comm)
    report.write(case, settings, result, RieszMetric(case.problem), seconds)
    return result.objective


@dataclass
class Run:
    """One solve of a case: start or restart, solver, checkpoints."""

    case: Case
    settings: ScriptSettings
    _count: int = field(default=0, init=False)

    def solve(self) -> Result:
        """Solve; see `run`."""
        saved = self._restart()
        return self._tao(saved) if self.settings.solver == "tao" else self._full_space(saved)

    @property
    def _fingerprint(self) -> dict[str, Any]:
        return {"problem": self.case.name, **self.case.parameters, "solver": self.settings.solver}

    def _restart(self) -> Checkpoint | None:
        if not self.settings.restart:
            return None
        return read_checkpoint(self.settings.restart, self.case.problem, self._fingerprint)

    def _full_space(self, saved: Checkpoint | None) -> Result:
        settings = self.settings
        kind = "composite" if settings.solver == "sqp" else settings.solver
        solver = SQPSolver(self.case.problem, type=kind, lower=settings.lower, upper=settings.upper)
        if saved is None:
            return solver.solve(observers=[self._observe])
        history = History(saved.history.records[:-1])  # the last record is made again, from the same point
        return solver.solve(saved.x, saved.lam, observers=[self._observe], memory=saved.memory, history=history)

    def _observe(self, method: Method, history: History) -> None:
        self._count += 1
        if self._count == 2:  # by now every solver and matrix has looked for its options
            require_all_read()
        if self.settings.checkpoint and history[-1].iteration % self.settings.checkpoint_every == 0:
            self._save(Checkpoint(method.x, method.lam, method.memory(), history))

    def _tao(self, saved: Checkpoint | None) -> Result:
        problem, settings = self.case.problem, self.settings
        solver = TaoSolver(ReducedObjective(problem), settings.lower, settings.upper)

        def save(record: Any) -> None:
            if settings.checkpoint and record.iteration % settings.checkpoint_every == 0:
                x = problem.join(solver.state, solver.design)
                self._save(Checkpoint(x, solver.multiplier, {}, solver.history))

        if saved is None:
            return solver.solve(monitors=[save])
        history = History(saved.history.records[:-1])
        return solver.solve(problem.split(saved.x)[1], monitors=[save], history=history)

    def _save(self, checkpoint: Checkpoint) -> None:
        write_checkpoint(self.settings.checkpoint, self.case.problem, self._fingerprint, checkpoint)


def start(main: Callable[[], float]) -> None:
    """Call main() as the program: exit codes, and no rank left waiting for one that failed."""
    comm = MPI.COMM_WORLD
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # the arrays of one step are too small to share
    try:
        main()
    except InputError as error:
        if comm.rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        _leave(comm, 2)
    except Exception:  # the outermost call: whatever it is, no rank may be left waiting
        print(traceback.format_exc(), file=sys.stderr, flush=True)
        if comm.size > 1:
            time.sleep(0.5)  # for mpiexec to pass the traceback on before it is ended as well
            comm.Abort(1)
        raise SystemExit(1) from None


def _leave(comm: Any, code: int) -> None:
    """Exit together if all ranks come here within `PATIENCE`, else end them all."""
    if comm.size > 1:
        request, deadline = comm.Ibarrier(), time.monotonic() + PATIENCE
        while not request.Test():
            if time.monotonic() > deadline:
                comm.Abort(code)
            time.sleep(0.01)
    raise SystemExit(code)


__all__ = ["Case", "Reason", "ScriptSettings", "command_line", "read", "run", "start"]
