"""What a solver tells: reasons, a record an iteration, their history, and one line a record on request."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from enum import IntEnum
from functools import wraps
from typing import Any, TypeVar, cast

from petsc4py import PETSc


class Reason(IntEnum):
    """Why a solver stopped: > 0 converged, < 0 diverged, as PETSc."""

    CONVERGED_OPTIMALITY = 2
    CONVERGED_TAO = 3
    ITERATING = 0
    DIVERGED_MAX_IT = -2
    DIVERGED_STAGNATION = -3
    DIVERGED_NAN = -4
    DIVERGED_LINEAR_SOLVE = -5
    DIVERGED_LINE_SEARCH = -6
    DIVERGED_TAO = -7
    DIVERGED_CYCLE = -8

    @property
    def remedy(self) -> str:
        """What to try next; empty where there is nothing to mend."""
        return _REMEDIES.get(self, "")


_REMEDIES = {
    Reason.DIVERGED_MAX_IT: "raise -sqp_max_it (-tao_max_it), or start closer to the solution",
    Reason.DIVERGED_STAGNATION: "loosen -sqp_opt_tol, or check the derivatives with pdeopt.verify",
    Reason.DIVERGED_NAN: "the residual or objective is not finite near the last good iterate, which is kept",
    Reason.DIVERGED_LINEAR_SOLVE: "use a direct KKT solver, or raise -sqp_kkt_ksp_max_it",
    Reason.DIVERGED_LINE_SEARCH: "loosen -sqp_opt_tol, or try -sqp_type composite",
    Reason.DIVERGED_CYCLE: "active sets come back: try -sqp_start state, a larger control weight, or -solver tao",
    Reason.DIVERGED_TAO: "see -tao_monitor and -tao_view; try another -tao_type",
}


@dataclass(frozen=True)
class Record:
    """One outer iteration.

    Attributes:
        iteration: 0 is the start.
        objective: J.
        feasibility: norm of the constraint residual.
        optimality: dual norm of the Lagrangian's gradient.
        radius: trust radius, or step size of a line search; of the step that led here.
        krylov: Krylov iterations of all linear solves of this iteration.
        note: what happened to the step.
    """

    iteration: int
    objective: float
    feasibility: float
    optimality: float
    radius: float
    krylov: int
    note: str = ""

    def line(self) -> str:
        """The record for a reader."""
        return (
            f"{self.iteration:4d}  {self.objective:18.11e}  {self.feasibility:9.2e}  {self.optimality:9.2e}"
            f"  {self.radius:9.2e}  {self.krylov:6d}  {self.note}"
        )


HEADER = "  it           objective   feasible    optimal     radius  krylov  step"


class History:
    """The records of a run as columns, `history["objective"]`, and by row, `history[-1]`."""

    def __init__(self, records: list[Record] | None = None) -> None:
        self.records = [] if records is None else records

    def append(self, record: Record) -> None:
        """Add a record."""
        self.records.append(record)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: int | str) -> Any:
        return [getattr(r, key) for r in self.records] if isinstance(key, str) else self.records[key]

    def columns(self) -> dict[str, list[Any]]:
        """All columns by name."""
        return {f.name: self[f.name] for f in fields(Record)}

    def as_rows(self) -> list[dict[str, Any]]:
        """The records as plain dictionaries."""
        return [asdict(record) for record in self.records]


@dataclass
class Result:
    """What a solver returns: the last good point, why it stopped, and how it came there.

    Attributes:
        state, design, multiplier: PETSc vectors.
        reason: see `Reason`; `converged` is reason > 0.
        message: the reason in words, with a remedy where it diverged.
        history: one `Record` an outer iteration.
    """

    state: PETSc.Vec
    design: PETSc.Vec
    multiplier: PETSc.Vec
    reason: Reason
    message: str
    history: History = field(default_factory=History)

    @property
    def converged(self) -> bool:
        """Whether the tolerances were met."""
        return self.reason > 0

    @property
    def iterations(self) -> int:
        """Outer iterations."""
        return int(self.history[-1].iteration)

    @property
    def objective(self) -> float:
        """J at the last point."""
        return float(self.history[-1].objective)


Monitor = Callable[[Record], None]

Method = TypeVar("Method", bound=Callable[..., Any])


def logged(name: str) -> Callable[[Method], Method]:
    """Time the calls of a function as an event of `-log_view`."""

    def decorate(function: Method) -> Method:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with PETSc.Log.Event(name):
                return function(*args, **kwargs)

        return cast(Method, call)

    return decorate


def print_monitor(comm: Any, title: str) -> Monitor:
    """A monitor that prints a line a record on rank 0, under a header."""

    def monitor(record: Record) -> None:
        if record.iteration == 0:
            PETSc.Sys.Print(f"{title}\n{HEADER}", comm=comm)
        PETSc.Sys.Print(record.line(), comm=comm)

    return monitor


def explain(reason: Reason, detail: str = "") -> str:
    """The reason in words: its name, the detail and the remedy."""
    words = reason.name.replace("_", " ").lower()
    return ": ".join(part for part in (words, detail, reason.remedy) if part)
