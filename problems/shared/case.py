"""What the scripts of control problems share: the solve, and everything that is written.

A script builds a `Case` and hands it to `run`; its options are its own and `OPTIONS`.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from mpi4py import MPI
from petsc4py import PETSc

import pdeopt as po
from pdeopt.control import CheckpointSettings, PropagatorSettings
from pdeopt.core import Section, SplitRecord, freed, interruptible, on_root, require_memory, sections, unread
from pdeopt.core.memory import DOUBLE
from pdeopt.optimize import TaoSettings, read_memory, write_memory
from pdeopt.optimize.fullspace import ON_PATHS, SQPSettings, said
from pdeopt.optimize.splitting import ADMM, CONTROL_DEFAULTS, AdmmSettings, TimeSplitting, TimeSplittingSettings
from pdeopt.steps import StepSettings
from problems.shared import pictures
from problems.shared.command_line import finish
from problems.shared.fields import Fields
from problems.shared.files import (
    CheckpointFiles,
    ReportFiles,
    SeriesFiles,
    SolutionFile,
    check_targets,
    versions,
    write_arrays,
    write_blocks,
    write_report,
)
from problems.shared.pictures import Panel

#: Solvers that honor bounds on the control.
BOUNDED = ("auto", "active_set", *ON_PATHS, "tao")

#: Solvers that honor bounds on the state.
BOUNDED_STATE = ("auto", *ON_PATHS)

#: Ends of a run by ADMM other than converged from which it can go on: not in the middle of an iteration.
GOES_ON = (po.Reason.DIVERGED_MAX_IT, po.Reason.INTERRUPTED)


@dataclass(frozen=True)
class SolverSettings(po.Settings, includes=(PropagatorSettings,)):
    """The solver of the control problem."""

    solver: str = po.setting(
        "auto",
        "Newton, and from where its steps are poor a feasible path or the composite step (auto); one of them (newton, "
        "feasible, sqp); Newton with bounds (active_set, which auto is where there are some); an interior point method "
        "(which auto is with bounds on the state), or Moreau-Yosida path-following; any TAO solver; or windows of time",
        choices=("auto", "sqp", "newton", "feasible", "active_set", *ON_PATHS, "tao", "admm"),
        reads={
            "auto": (SQPSettings,),
            "sqp": (SQPSettings,),
            "newton": (SQPSettings,),
            "feasible": (SQPSettings,),
            "active_set": (SQPSettings,),
            **dict.fromkeys(ON_PATHS, (SQPSettings,)),
            "tao": (TaoSettings, StepSettings, CheckpointSettings),
            "admm": (Section(AdmmSettings, defaults=CONTROL_DEFAULTS), TimeSplittingSettings),
        },
    )
    lower: float = po.setting(None, f"lower bound on the control (-solver {', '.join(BOUNDED)})", kind=float)
    upper: float = po.setting(None, f"upper bound on the control (-solver {', '.join(BOUNDED)})", kind=float)
    state_lower: float = po.setting(None, f"lower bound on the state (-solver {', '.join(BOUNDED_STATE)})", kind=float)
    state_upper: float = po.setting(None, f"upper bound on the state (-solver {', '.join(BOUNDED_STATE)})", kind=float)


class Shown(Protocol):
    """A control problem whose solution can be written and drawn."""

    name: str
    problem: po.ControlProblem

    def fields(self, result: po.Result) -> Fields:
        """The solution for a reader. Collective."""

    def arrays(self, result: po.Result) -> dict[str, np.ndarray] | None:
        """The fields, whole, on rank 0; None elsewhere. Collective."""

    def panels(self, arrays: dict[str, np.ndarray]) -> Sequence[Sequence[Panel]]:
        """What the picture shows beside the convergence history, by rows."""


class InSeries(Shown, Protocol):
    """One whose solution can be written as a series of files, too."""

    def write_series(self, path: str, result: po.Result) -> None:
        """The fields as FILE.pvd and a folder; no rank gathers more than its rows. Collective."""


class Case(Shown, Protocol):
    """A control problem as a script states it; a restart must have the same parameters."""

    parameters: dict[str, Any]


class CaseInSeries(Case, InSeries, Protocol):
    """Both."""


#: What every script of a control problem reads beside its own options.
OPTIONS = [*sections(SolverSettings), *sections(ReportFiles), *sections(SolutionFile), *sections(CheckpointFiles)]


def run(case: Case) -> float:
    """Solve the case as the options say, write what they ask for, and return the objective. Collective."""
    return _run(case, lambda result: None)


def run_in_series(case: CaseInSeries) -> float:
    """The same with the option of `SeriesFiles`."""
    series = po.read(SeriesFiles)

    def write(result: po.Result) -> None:
        if series.series:
            case.write_series(series.series, result)

    return _run(case, write, series)


def _run(case: Case, write: Callable[[po.Result], None], *files: po.Settings) -> float:
    grid, begin = case.problem.grid, time.perf_counter()
    run = Run(case)
    check_targets(grid.mpi, run.report, run.solution, run.checkpoints, *files)
    with interruptible():
        result = run.solve()
    po.require_all_read()
    seconds = time.perf_counter() - begin
    run.write(result, seconds)
    write(result)
    PETSc.Sys.Print(
        f"{case.name}: objective {result.objective:.14g} after {result.iterations} iterations, "
        f"{result.message.split(':')[0]} ({seconds:.2f} s){run.choice}",
        comm=grid.comm,
    )
    run.files.leave()
    finish(case.name, result.reason > 0, result.message)
    return result.objective


#: Copies of all unknowns that a solve has in memory at least: vectors, and the entries of its matrices.
COPIES = 20


def require_room(sizes: Mapping[str, int], steps: int, unknowns: int, comm: Any = None) -> None:
    """Refuse sizes of a control problem whose solve cannot have room.

    Args:
        sizes: the options, and what they are.
        steps, unknowns: time steps, and states, controls and multipliers of each.
        comm: communicator of the time steps; default PETSc's.
    """
    ranks = (PETSc.COMM_WORLD if comm is None else comm).size
    if po.read(CheckpointSettings).checkpoints:  # states and multipliers are not kept
        unknowns = unknowns // 3
    given = ", ".join(f"{name} {size}" for name, size in sizes.items())
    require_memory(DOUBLE * COPIES * steps * unknowns / ranks, "sizes", given, "smaller ones, or more machines")


@dataclass
class Run:
    """One solve of a case as the options say: start or restart, solver, checkpoints, files.

    Raises:
        InputError: bounds with a solver that knows none.
    """

    case: Case
    settings: SolverSettings = field(default_factory=lambda: po.read(SolverSettings))
    report: ReportFiles = field(default_factory=lambda: po.read(ReportFiles))
    solution: SolutionFile = field(default_factory=lambda: po.read(SolutionFile))
    checkpoints: CheckpointFiles = field(default_factory=lambda: po.read(CheckpointFiles))
    _count: int = field(default=0, init=False)
    _solver: po.SQPSolver | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        settings = self.settings
        self.files = self.checkpoints.of_run(self.case.problem.grid.mpi)
        if settings.solver not in BOUNDED and any(bound is not None for bound in self._bounds):
            is_asked = settings.lower is not None or settings.upper is not None
            legal = " | ".join(f"-solver {solver}" for solver in BOUNDED)
            raise po.InputError("-lower, -upper" if is_asked else "bounds", f"-solver {settings.solver}", legal)
        if settings.solver not in BOUNDED_STATE and (settings.state_lower, settings.state_upper) != (None, None):
            legal = " | ".join(f"-solver {solver}" for solver in BOUNDED_STATE)
            raise po.InputError("-state_lower, -state_upper", f"-solver {settings.solver}", legal)

    def solve(self) -> po.Result:
        """Solve; see `run`."""
        if self.settings.solver == "admm":
            return self._split()
        saved = self._restart()
        result = self._tao(saved) if self.settings.solver == "tao" else self._full_space(saved)
        if saved is not None:
            self.files.tell_if_finished(self.case.name, saved.history, result)
        return result

    @property
    def _fingerprint(self) -> dict[str, Any]:
        bounds = {"lower": self.settings.lower, "upper": self.settings.upper, **self._state_bounds}
        return {"problem": self.case.name, **self.case.parameters, "solver": self.settings.solver, **bounds}

    @property
    def _state_bounds(self) -> dict[str, float]:
        """Those on states that are given."""
        states = {name: getattr(self.settings, name) for name in ("state_lower", "state_upper")}
        return {name: value for name, value in states.items() if value is not None}

    @property
    def _bounds(self) -> tuple[Any, Any]:
        """Of the design: those of the control, unless the case says what they are for its own, as of split controls."""
        lower, upper = self.settings.lower, self.settings.upper
        of_design = getattr(self.case, "bounds", None)
        return (lower, upper) if of_design is None else of_design(lower, upper)

    def _restart(self) -> po.Checkpoint | None:
        if not self.checkpoints.restart:
            return None
        return po.read_checkpoint(self.checkpoints.restart, self.case.problem, self._fingerprint)

    def _full_space(self, saved: po.Checkpoint | None) -> po.Result:
        settings = self.settings
        kind = "composite" if settings.solver == "sqp" else settings.solver
        lower, upper = self._bounds
        bounds = {"lower": lower, "upper": upper, **self._state_bounds}
        solver = po.SQPSolver(self.case.problem, type=kind, **bounds)
        self._solver = solver
        if saved is None:
            result = solver.solve(observers=[self._observe])
        else:
            words = {"memory": saved.memory, "history": saved.history}
            result = solver.solve(saved.x, saved.lam, observers=[self._observe], **words)
        if self._count == 1 and self.case.problem.grid.mpi.allreduce(len(unread())):  # no step was made
            solver.rehearse(self._method.x, self._method.lam)
        self.files.end(result.iterations, lambda: self._save(self._method, result.history))
        return result

    @property
    def choice(self) -> str:
        """What a full-space solver chose, in words."""
        return "" if self._solver is None else f", {self._solver.kind}, KKT systems by {said(self._solver.ways)}"

    def _observe(self, method: Any, history: po.History) -> None:
        self._count += 1
        self._method = method
        if self._count == 2:  # by now every solver and matrix has looked for its options
            po.require_all_read()
        self.files.after(history[-1].iteration, lambda: self._save(method, history))

    def _save(self, method: Any, history: po.History) -> None:
        self._write(po.Checkpoint(method.x, method.lam, method.memory(), history))

    def _tao(self, saved: po.Checkpoint | None) -> po.Result:
        problem = self.case.problem
        solver = po.TaoSolver(po.ReducedObjective(problem), *self._bounds)

        def save() -> None:
            x = problem.join(solver.last.state, solver.design)
            self._write(po.Checkpoint(x, solver.last.multiplier, {}, solver.history))

        monitors = [lambda record: self.files.after(record.iteration, save)]
        if saved is None:
            result = solver.solve(monitors=monitors)
        else:
            result = solver.solve(problem.split(saved.x)[1], monitors=monitors, history=saved.history)
        self.files.end(result.iterations, save)
        return result

    def _split(self) -> po.Result:
        """By ADMM on windows of time; checkpoints hold what the windows remember."""
        mpi, history = self.case.problem.grid.mpi, None
        constraint = TimeSplitting(self.case.problem)
        with freed(constraint):
            method = ADMM(constraint, **CONTROL_DEFAULTS)
            fingerprint = self._fingerprint | constraint.fingerprint | method.fingerprint()
            if self.checkpoints.restart:
                memory, history = read_memory(self.checkpoints.restart, fingerprint, mpi, SplitRecord)
                method.recall(memory)

            def save(history: po.History) -> None:
                write_memory(self.checkpoints.checkpoint, fingerprint, method.memory(), history, mpi)

            def observe(_: Any, history: po.History) -> None:
                self._count += 1
                if self._count == 2:
                    po.require_all_read()
                self.files.after(history[-1].iteration, lambda: save(history))

            result = method.solve(observers=[observe], history=history)
            if result.reason >= po.Reason.ITERATING or result.reason in GOES_ON:
                self.files.end(result.iterations, lambda: save(result.history))
        if history is not None:
            self.files.tell_if_finished(self.case.name, history, result)
        return result

    def _write(self, checkpoint: po.Checkpoint) -> None:
        po.write_checkpoint(self.checkpoints.checkpoint, self.case.problem, self._fingerprint, checkpoint)

    def write(self, result: po.Result, seconds: float) -> None:
        """Write the files that the options ask for. Collective."""
        summary = self.summary(result, seconds) if self.report.summary else {}
        write_files(self.case, result, self.report, self.solution, summary)

    def summary(self, result: po.Result, seconds: float) -> dict[str, Any]:
        """The run as values of JSON. Collective."""
        case, problem, last = self.case, self.case.problem, result.history[-1]
        metric = po.RieszMetric(problem)
        u, z, _ = problem.fields(problem.join(result.state, result.design))
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return {
            "problem": {"name": case.name, **case.parameters},
            "solver": self.settings.solver,
            **({} if self._solver is None else {"method": self._solver.kind, "kkt": self._solver.ways}),
            "reason": int(result.reason),
            "message": result.message,
            "objective": last.objective,
            "control_norm": metric.control_norm(z),
            "state_norm": metric.state_norm(u),
            "optimality": last.optimality,
            "feasibility": last.feasibility,
            "iterations": last.iteration,
            "krylov_iterations": _by_iteration(result.history.columns().get("krylov", [])),
            "wall_time_s": seconds,
            "peak_memory_mb": problem.grid.mpi.allreduce(memory, MPI.MAX),
            "ranks": problem.grid.mpi.size,
            **_inequalities(result),
            "versions": versions(),
            "history": result.history.columns(),
        }


def write_files(case: Shown, result: po.Result, report: ReportFiles, solution: SolutionFile, summary: Any) -> None:
    """Write the summary, and the picture and arrays of a solution, as far as the options ask for them. Collective."""
    mpi = case.problem.grid.mpi
    in_blocks = solution.output.endswith(".h5")
    arrays = case.arrays(result) if report.plot or (solution.output and not in_blocks) else None

    def picture() -> Any:
        title = f"{case.name}: J = {result.objective:.8g}"
        return pictures.solution_picture(title, case.panels(arrays or {}), result.history)

    if in_blocks:
        write_blocks(solution.output, case.problem, case.fields(result))
    elif solution.output:
        on_root(mpi, lambda: write_arrays(solution.output, arrays or {}))
    write_report(mpi, report, summary, picture)


@dataclass(frozen=True)
class FormFiles:
    """What the options of a script of weak forms, which has no restarts, ask to be written.

    Read before DOLFINx is loaded: h5py does not load after it.
    """

    report: ReportFiles
    solution: SolutionFile
    series: SeriesFiles

    @classmethod
    def read(cls) -> FormFiles:
        """The options, checked. Collective."""
        found = cls(po.read(ReportFiles), po.read(SolutionFile), po.read(SeriesFiles))
        check_targets(PETSc.COMM_WORLD.tompi4py(), found.report, found.solution, found.series)
        return found

    def write(self, case: InSeries, result: po.Result, summary: Mapping[str, Any]) -> None:
        """Write all that is asked for. Collective."""
        write_files(case, result, self.report, self.solution, summary)
        if self.series.series:
            case.write_series(self.series.series, result)


#: The options of `FormFiles`.
FORM_OPTIONS = [*sections(ReportFiles), *sections(SolutionFile), *sections(SeriesFiles)]


def _inequalities(result: po.Result) -> dict[str, Any]:
    """What a result says about bounds on states, without the densities of multipliers."""
    if not isinstance(result, po.InequalityResult):
        return {}
    return {"inequalities": {report.name: report.as_row() for report in result.inequalities.values()}}


def _by_iteration(krylov: list[int]) -> list[int]:
    """One entry an outer iteration: what the start took is the first one's."""
    return [krylov[0] + krylov[1], *krylov[2:]] if len(krylov) > 1 else []
