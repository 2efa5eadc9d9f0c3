"""What a solver tells: reasons, a record an iteration, their history, and one line a record on request."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from enum import IntEnum
from functools import wraps
from typing import Any, ClassVar, TypeVar, cast

from petsc4py import PETSc


class Reason(IntEnum):
    """Why a solver stopped: > 0 converged, < 0 diverged, 0 not yet; as PETSc.

    CONVERGED_OPTIMALITY: the gradient met its tolerance. CONVERGED_TARGET: the objective fell to a value that was
    asked for. CONVERGED_DECREASE, CONVERGED_STEP: the last decrease, or step, was within its tolerance.
    CONVERGED_ROUNDING: what is left to gain is less than the rounding errors of the objective, and no
    absolute tolerance was asked for. WORK_DONE: the evaluations that were asked for are done. CONVERGED_TAO,
    DIVERGED_TAO: TAO says so, and its own reason stands in the message. DIVERGED_MAX_IT: the limit of iterations.
    DIVERGED_STAGNATION: the objective does not fall any more where its gradient says that it should, or the trust
    region shrank to nothing. DIVERGED_LINE_SEARCH: no step lowers the merit function. DIVERGED_CYCLE: active sets come
    back. DIVERGED_INFEASIBLE: no point near keeps all inequalities. DIVERGED_LINEAR_SOLVE: a linear system could not be
    solved. DIVERGED_NAN: no finite values near the last point.
    INTERRUPTED: a signal asked the run to end.
    """

    CONVERGED_OPTIMALITY = 2
    CONVERGED_TAO = 3
    CONVERGED_TARGET = 4
    CONVERGED_ROUNDING = 5
    WORK_DONE = 6
    CONVERGED_DECREASE = 7
    CONVERGED_STEP = 8
    ITERATING = 0
    DIVERGED_MAX_IT = -2
    DIVERGED_STAGNATION = -3
    DIVERGED_NAN = -4
    DIVERGED_LINEAR_SOLVE = -5
    DIVERGED_LINE_SEARCH = -6
    DIVERGED_TAO = -7
    DIVERGED_CYCLE = -8
    DIVERGED_INFEASIBLE = -9
    INTERRUPTED = -10


#: What to try next, by the options of each family of solvers; what stands under "" serves all of them.
_REMEDIES: dict[str, dict[Reason, str]] = {
    "": {
        Reason.DIVERGED_NAN: "the residual or objective is not finite near the last good iterate, which is kept",
        Reason.DIVERGED_CYCLE: "active sets return: -sqp_type interior, -sqp_start state, -solver tao, dearer control",
        Reason.DIVERGED_INFEASIBLE: "violations are least there: loosen it, or give the controls more room",
        Reason.DIVERGED_TAO: "see -tao_monitor and -tao_view; try another -tao_type",
    },
    "sqp": {
        Reason.DIVERGED_MAX_IT: "raise -sqp_max_it, or start closer to the solution",
        Reason.DIVERGED_STAGNATION: "loosen -sqp_opt_tol, or check the derivatives with pdeopt.assert_consistent",
        Reason.DIVERGED_LINEAR_SOLVE: "use a direct KKT solver, or raise -sqp_kkt_ksp_max_it",
        Reason.DIVERGED_LINE_SEARCH: "loosen -sqp_opt_tol, or try -sqp_type composite",
    },
    "tao": {
        Reason.DIVERGED_MAX_IT: "raise -tao_max_it, or start closer to the solution",
        Reason.DIVERGED_LINEAR_SOLVE: "start closer to the solution",
    },
    "admm": {Reason.DIVERGED_MAX_IT: "raise -admm_max_it, or loosen -admm_rtol"},
    "opt": {
        Reason.DIVERGED_MAX_IT: "raise -opt_max_it, or start closer to a minimum",
        Reason.DIVERGED_STAGNATION: "check the derivatives with the function's verify(x), or loosen -opt_gtol or "
        "-opt_rtol",
        Reason.DIVERGED_LINEAR_SOLVE: "the last good point is kept; start closer to a minimum",
        Reason.DIVERGED_LINE_SEARCH: "check the derivatives with the function's verify(x), or loosen -opt_gtol or "
        "-opt_rtol",
    },
}


def remedy(reason: Reason, family: str) -> str:
    """What to try next; empty where there is nothing to mend.

    Args:
        reason: why a solver stopped.
        family: whose options are named: "sqp", "tao", "admm" or "opt".
    """
    return _REMEDIES[family].get(reason, _REMEDIES[""].get(reason, ""))


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

    header: ClassVar[str] = "  it           objective   feasible    optimal     radius  krylov  step"

    def line(self) -> str:
        """The record for a reader."""
        return (
            f"{self.iteration:4d}  {self.objective:18.11e}  {self.feasibility:9.2e}  {self.optimality:9.2e}"
            f"  {self.radius:9.2e}  {self.krylov:6d}  {self.note}"
        )


@dataclass(frozen=True)
class DescentRecord:
    """One outer iteration of an optimizer of a smooth function; calls and work are totals since the start.

    Attributes:
        iteration: 0 is the start.
        objective: f.
        optimality: |f'|.
        radius: step size of a line search, or trust radius; of the step that led here.
        values, gradients, hessian_products: calls.
        work: all calls in equivalents of full gradients.
        note: what happened to the step.
    """

    iteration: int
    objective: float
    optimality: float
    radius: float
    values: int
    gradients: int
    hessian_products: int
    work: float
    note: str = ""

    header: ClassVar[str] = (
        "  it           objective    optimal     radius   values  gradients     hvps        work  step"
    )

    def line(self) -> str:
        """The record for a reader."""
        return (
            f"{self.iteration:4d}  {self.objective:18.11e}  {self.optimality:9.2e}  {self.radius:9.2e}"
            f"  {self.values:7d}  {self.gradients:9d}  {self.hessian_products:7d}  {self.work:10.1f}  {self.note}"
        )


@dataclass(frozen=True)
class LeastSquaresRecord(DescentRecord):
    """One outer iteration of a method for sums of squares; f is |r|^2, and radius the damping.

    Attributes:
        jacobians, products: calls.
        factorizations: of damped systems.
    """

    jacobians: int = 0
    products: int = 0
    factorizations: int = 0

    header: ClassVar[str] = (
        "  it           objective    optimal    damping   values  jacobians  products  factors        work  step"
    )

    def line(self) -> str:
        """The record for a reader."""
        return (
            f"{self.iteration:4d}  {self.objective:18.11e}  {self.optimality:9.2e}  {self.radius:9.2e}"
            f"  {self.values:7d}  {self.jacobians:9d}  {self.products:8d}  {self.factorizations:7d}"
            f"  {self.work:10.1f}  {self.note}"
        )


@dataclass(frozen=True)
class SplitRecord:
    """One iteration of a method that splits; work is a total since the start.

    Attributes:
        iteration: 0 is the start.
        objective: f.
        feasibility: norm of the residuals that have multipliers.
        optimality: by how much the blocks moved.
        products, solves: multiplications of both kinds.
        bytes: sent by this rank.
        note: what happened.
    """

    iteration: int
    objective: float
    feasibility: float
    optimality: float
    products: float
    solves: float
    bytes: int
    note: str = ""

    header: ClassVar[str] = "  it           objective   feasible    optimal   products     solves      bytes  step"

    def line(self) -> str:
        """The record for a reader."""
        return (
            f"{self.iteration:4d}  {self.objective:18.11e}  {self.feasibility:9.2e}  {self.optimality:9.2e}"
            f"  {self.products:9.2e}  {self.solves:9.2e}  {self.bytes:9.2e}  {self.note}"
        )


AnyRecord = Record | DescentRecord | SplitRecord


class History:
    """The records of a run as columns, `history["objective"]`, and by row, `history[-1]`.

    Args:
        records: `Record` or `DescentRecord`, one an iteration, all of one kind; default none.
    """

    def __init__(self, records: list[Any] | None = None) -> None:
        self.records = [] if records is None else records

    def append(self, record: AnyRecord) -> None:
        """Add a record."""
        self.records.append(record)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: int | str) -> Any:
        return [getattr(r, key) for r in self.records] if isinstance(key, str) else self.records[key]

    def columns(self) -> dict[str, list[Any]]:
        """All columns by name."""
        return {f.name: self[f.name] for f in fields(self.records[0])} if self.records else {}

    def as_rows(self) -> list[dict[str, Any]]:
        """The records as plain dictionaries."""
        return [asdict(record) for record in self.records]


@dataclass
class Result:
    """What a solver returns: the last good point, why it stopped, and how it came there.

    Attributes:
        design: the unknowns that were optimized: a PETSc vector, or a tensor (n,).
        reason: see `Reason`; `converged` is reason > 0.
        message: the reason in words, with a remedy where it diverged.
        history: one record an outer iteration.
        value: J at the design, where that is not the point of the last record: of methods that return the best one.
    """

    design: Any
    reason: Reason
    message: str
    history: History = field(default_factory=History)
    value: float | None = field(default=None, kw_only=True)

    @property
    def converged(self) -> bool:
        """Whether the tolerances were met; a limit on the work that is spent is none of them, nor an error."""
        return self.reason > 0 and self.reason != Reason.WORK_DONE

    @property
    def iterations(self) -> int:
        """Outer iterations."""
        return int(self.history[-1].iteration)

    @property
    def objective(self) -> float:
        """J at the design."""
        return float(self.history[-1].objective if self.value is None else self.value)


class OnDemand:
    """An attribute that is given as a value, or as a function that finds it when it is first asked for."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = f"_{name}"

    def __get__(self, owner: Any, kind: type | None = None) -> Any:
        if owner is None:  # of the class: the default of a dataclass
            return None
        value = getattr(owner, self._name)
        if callable(value):
            value = value()
            setattr(owner, self._name, value)
        return value

    def __set__(self, owner: Any, value: Any) -> None:
        setattr(owner, self._name, value)


@dataclass
class ControlResult(Result):
    """The result for a control problem.

    Attributes:
        state, multiplier: at the design; PETSc vectors as the design, distributed over the ranks by steps. Where a
            solver kept few states, they are solved for when they are first asked for, which is collective then.
        method: the name by which `solve` knows the method; empty where a solver was called by itself.
    """

    state: PETSc.Vec = OnDemand()
    multiplier: PETSc.Vec = OnDemand()
    method: str = ""


#: Called with the record of each iteration.
Monitor = Callable[[Any], None]

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
    """A monitor that prints a line a record on rank 0, under a header.

    Args:
        comm: PETSc communicator; the calls of the monitor are collective over it.
        title: of the solver, above the header.
    """

    def monitor(record: AnyRecord) -> None:
        if record.iteration == 0:
            PETSc.Sys.Print(f"{title}\n{record.header}", comm=comm)
        PETSc.Sys.Print(record.line(), comm=comm)

    return monitor


def explain(reason: Reason, detail: str = "", remedy: str = "") -> str:
    """The reason in words: its name, the detail and the remedy."""
    words = reason.name.replace("_", " ").lower()
    return ": ".join(part for part in (words, detail, remedy) if part)
