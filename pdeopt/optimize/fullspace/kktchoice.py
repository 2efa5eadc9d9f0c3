"""Which way KKT systems are solved: what may be chosen, and where the user leaves it open, a rule of counts.

Three ways complement each other. Conjugate gradients on the reduced Hessian ("reduced") need nothing but sweeps over
time, two an iteration, and take more iterations as control gets cheaper. The matched Schur complement ("wathen") takes
about ten sweeps an iteration, has flat counts where states are observed and controls act everywhere, and fails where
not. Means over time ("circulant") have flat counts there, too, and for waves, but factors a complex matrix for every
other step, and fail where coefficients or steps vary much. So the first is given the work of a few iterations of the
second, the second and the third as much as they ever need where they fit, and then the first as much as it asks for.
The same run takes the same decisions on any machine and any number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from petsc4py import PETSc

from pdeopt.control.problem import ControlProblem
from pdeopt.core.options import given_options
from pdeopt.core.settings import Settings, read_inner, setting
from pdeopt.kkt.operator import Hessian
from pdeopt.precond.base import Preconditioner
from pdeopt.precond.blockjacobi import TimeBlockJacobi
from pdeopt.precond.circulant import CirculantPC
from pdeopt.precond.reduced import ReducedPC
from pdeopt.precond.timemg import TimeMultigridPC
from pdeopt.precond.wathen import WathenPC

#: A way to solve, and the iterations of a solve after which the next one takes over; None for as many as it likes.
Stage = tuple[str, int | None]

#: The ways in turn for constraints with a sparsity pattern.
OPEN: tuple[Stage, ...] = (("reduced", 40), ("wathen", 20), ("circulant", 40), ("reduced", None), ("direct", None))

#: Iterations after which "wathen" alone has failed.
MAX_FLAT = 60

#: Below these sizes factors are faster than iterations (measured for 1 to 128 states, 50 and 400 steps): states of a
#: step, as of an ODE, whatever the number of steps, and unknowns of the whole matrix.
SMALL_STEP, SMALL_MATRIX = 8, 10_000

#: How options of the preconditioner begin that "auto" takes for large problems.
ITERATIONS = ("wathen_", "mgrit_", "timemg_")

#: What `-precond` may be; "auto" goes through `OPEN`; "none" leaves it to PETSc's options.
PRECONDITIONERS: dict[str, type[Preconditioner] | None] = {
    "auto": None,
    "direct": None,
    "wathen": WathenPC,
    "reduced": ReducedPC,
    "circulant": CirculantPC,
    "block_jacobi": TimeBlockJacobi,
    "multigrid": TimeMultigridPC,
    "none": None,
}


@dataclass(frozen=True)
class KKTSettings(Settings, prefix="kkt_"):
    """KKT systems of the full-space solvers; without `sqp_` the options serve every KKT solver of a run.

    `-sqp_kkt_ksp_...` and `-sqp_kkt_pc_...` reach PETSc.
    """

    precond: str = setting(
        "direct",
        "how KKT systems are solved: by factors of the whole matrix, by conjugate gradients on the reduced Hessian, by "
        "an iteration preconditioned in time, or (auto) small ones by factors, others by reduced, by wathen or "
        "circulant from where that takes many iterations, and by factors from where all fail",
        choices=tuple(PRECONDITIONERS),
        reads={name: context.reads for name, context in PRECONDITIONERS.items() if context is not None}
        | {"auto": WathenPC.reads},
    )
    mat_type: str = setting(
        "auto", "form of the KKT operator; auto assembles it for factors only", choices=("auto", "aij", "shell")
    )
    form: str = setting(
        "standard",
        "form of the KKT system; coupled makes continuity in time between windows a constraint",
        choices=("standard", "coupled"),
    )
    window: int = setting(16, "steps of a window of the coupled KKT system", at_least=1)


def solves_by_sweeps(problem: ControlProblem, outer: str, given: Mapping[str, Any]) -> bool:
    """Whether the options, default "auto", leave KKT systems to sweeps over time, for which W may be the metric of the
    design alone, diag(0, R_d). Collective."""
    own = read_inner(KKTSettings, outer, **{"precond": "auto"} | dict(given))
    if own.form != "standard" or PETSc.Options(outer + KKTSettings.prefix).hasName("pc_type"):
        return False
    is_open = own.precond == "auto" and not (is_small(problem) or _asks_for_iterations())
    return own.precond == "reduced" or is_open


def is_small(problem: ControlProblem) -> bool:
    """Whether the KKT matrix is better factored: few states a step, or few unknowns at all. Collective."""
    unknowns = float(problem.grid.sum(float(problem.layout.kkt_size)))
    return problem.constraint.pattern is not None and (problem.n <= SMALL_STEP or unknowns <= SMALL_MATRIX)


def _asks_for_iterations() -> bool:
    """Whether there are options of what "auto" iterates with, which factors would not read."""
    return any(name.startswith(ITERATIONS) or "_wathen_" in name for name in given_options())


def stages(problem: ControlProblem, settings: KKTSettings, hessian: Hessian) -> tuple[Stage, ...]:
    """The ways in turn: more than one for "auto" only. Collective."""
    if settings.precond != "auto":
        return ((settings.precond, None),)
    if hessian == "design" or problem.constraint.pattern is None:
        return (("reduced", None),)
    if _asks_for_iterations():
        return ("wathen", MAX_FLAT), ("direct", None)
    return (("direct", None),) if is_small(problem) else OPEN


class Choice:
    """The present way; `give_up` goes on to the next, and there is no way back.

    Args:
        stages: the ways in turn; a single one is no choice.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages, self.stage = tuple(stages), 0

    @property
    def way(self) -> str:
        """The word for it, one of `-kkt_precond`."""
        return self.stages[self.stage][0]

    @property
    def patience(self) -> int | None:
        """Iterations of a solve after which it gives up."""
        return self.stages[self.stage][1]

    def resume(self, stage: int) -> None:
        """Go on where an earlier run was, if it had the same ways."""
        self.stage = min(stage, len(self.stages) - 1)

    def give_up(self) -> bool:
        """Go on to the next way; returns whether there is one."""
        is_last = self.stage == len(self.stages) - 1
        self.stage += not is_last
        return not is_last
