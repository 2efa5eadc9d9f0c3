"""Which way KKT systems are solved: what may be chosen, and where the user leaves it open, a rule of counts.

Three ways complement each other. Conjugate gradients on the reduced Hessian ("reduced") need nothing but sweeps over
time, two an iteration, and take more iterations as control gets cheaper. The matched Schur complement ("wathen") takes
about ten sweeps an iteration, has flat counts where states are observed and controls act everywhere, and fails where
not. Means over time ("circulant") have flat counts there, too, and for waves, but factor a complex matrix for every
other step, and fail where coefficients or steps vary much.

Where all states are observed and reached, the first begins, and ends as soon as the bound of conjugate gradients, which
their first product tells, promises more work than the second takes; that one goes on as long as its counts are flat.
Elsewhere the first is weighed against factors of the whole matrix, and where these are large, too, against the third.
The same run takes the same decisions on any machine, as nothing asks a clock.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from petsc4py import PETSc
from scipy.sparse.csgraph import reverse_cuthill_mckee

from pdeopt.control.problem import ControlProblem
from pdeopt.core.errors import InputError
from pdeopt.core.options import given_options
from pdeopt.core.settings import Settings, read_inner, setting
from pdeopt.kkt.operator import Hessian
from pdeopt.precond.base import Preconditioner
from pdeopt.precond.blockjacobi import TimeBlockJacobi
from pdeopt.precond.circulant import CirculantPC
from pdeopt.precond.reduced import ReducedPC
from pdeopt.precond.timemg import TimeMultigridPC
from pdeopt.precond.wathen import WathenPC


@dataclass(frozen=True)
class Stage:
    """A way to solve KKT systems, until the next one takes over.

    Attributes:
        way: the word for it, one of `-kkt_precond`.
        patience: iterations of a solve after which it gives up; None for as many as it likes.
        per_digit: so many more for each digit that the residual is to fall by.
        foresees: give up after the first iteration where that promises more, see `ReducedPC`.
    """

    way: str
    patience: int | None = None
    per_digit: float = 0.0
    foresees: bool = False

    def limit(self, reduction: float) -> float:
        """Iterations of a solve that is to reduce the residual by this factor, below 1."""
        return math.inf if self.patience is None else self.patience - self.per_digit * math.log10(reduction)


#: The ways in turn where all states are observed and reached by controls. An iteration of wathen costs 4 to 5 of
#: reduced, and as much to begin with; it takes one for two digits.
FLAT = (Stage("reduced", 8, per_digit=2.5, foresees=True), Stage("wathen", 20))

#: Elsewhere, where factors cost more than `MOST_FOR_FACTORS` iterations of reduced.
LARGE = (
    Stage("reduced", 40, foresees=True),
    Stage("circulant", 40),
    Stage("wathen", 20),
    Stage("reduced"),
    Stage("direct"),
)
MOST_FOR_FACTORS = 500

#: How many times as much factors cost where the objective has no curvature in some states: pivots wait (measured: 1 for
#: a tenth of the domain observed, 8 for nine points).
WITHOUT_PIVOTS = 4

#: Iterations after which "wathen" alone has failed.
MAX_FLAT = 60

#: Below these sizes factors are faster than iterations (measured for 1 to 128 states, 50 and 400 steps): states of a
#: step, as of an ODE, whatever the number of steps, and unknowns of the whole matrix.
SMALL_STEP, SMALL_MATRIX = 8, 10_000

#: How options of the preconditioner begin that "auto" takes for large problems.
ITERATIONS = ("wathen_", "mgrit_", "timemg_")

#: What `-precond` may be; "auto" goes through `stages`; "none" leaves it to PETSc's options.
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


#: Those that serve steps which ranks share.
SPREAD = ("auto", "direct", "wathen", "reduced", "none")


@dataclass(frozen=True)
class KKTSettings(Settings, prefix="kkt_"):
    """KKT systems of the full-space solvers; without `sqp_` the options serve every KKT solver of a run.

    `-sqp_kkt_ksp_...` and `-sqp_kkt_pc_...` reach PETSc.
    """

    precond: str = setting(
        "auto",
        "how KKT systems are solved: by factors of the whole matrix, by conjugate gradients on the reduced Hessian, by "
        "an iteration preconditioned in time, or (auto) small ones by factors, others by reduced, and from where that "
        "promises more work than another by wathen, circulant or factors",
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
    step = problem.n if problem.constraint.layout is None else problem.constraint.layout.size
    return problem.constraint.pattern is not None and (step <= SMALL_STEP or unknowns <= SMALL_MATRIX)


def _asks_for_iterations() -> bool:
    """Whether there are options of what "auto" iterates with, which factors would not read."""
    return any(name.startswith(ITERATIONS) or "_wathen_" in name for name in given_options())


def stages(problem: ControlProblem, settings: KKTSettings, hessian: Hessian) -> tuple[Stage, ...]:
    """The ways in turn: more than one for "auto" only. Collective."""
    if problem.grid.space_ranks > 1:
        _require_spread(problem, settings)
    if settings.precond != "auto":
        return (Stage(settings.precond),)
    found = _automatic(problem, hessian)
    if _factors_steps_alone(problem):
        return tuple(each for each in found if each.way != "direct") or (Stage("reduced"),)
    return found


def _factors_steps_alone(problem: ControlProblem) -> bool:
    """Whether this PETSc can factor KKT matrices only where a rank has whole steps: others want MUMPS."""
    return problem.grid.space_ranks > 1 and not PETSc.Sys.hasExternalPackage("mumps")


def _automatic(problem: ControlProblem, hessian: Hessian) -> tuple[Stage, ...]:
    if hessian == "design" or problem.constraint.pattern is None:
        return (Stage("reduced"),)
    if _asks_for_iterations():
        return Stage("wathen", MAX_FLAT), Stage("direct")
    if is_small(problem):
        return (Stage("direct"),)
    sees_all, sees_each_step = _seen(problem)
    factors = price_of_factors(problem) if problem.grid.space_ranks == 1 else MOST_FOR_FACTORS + 1
    if not sees_all:
        factors *= WITHOUT_PIVOTS
    is_flat = _reaches_all_states(problem) and (hessian == "metric" or sees_all)
    if factors <= MOST_FOR_FACTORS:
        return (*(FLAT if is_flat else ()), Stage("reduced", factors, foresees=True), Stage("direct"))
    if not sees_each_step:
        return Stage("reduced"), Stage("direct")  # no mean over time stands for a loss at its end
    others = LARGE if problem.grid.space_ranks == 1 else tuple(each for each in LARGE if each.way != "circulant")
    return (*FLAT, Stage("reduced"), Stage("direct")) if is_flat else others


def _require_spread(problem: ControlProblem, settings: KKTSettings) -> None:
    """Refuse what takes the rows of a rank for whole steps where ranks share them."""
    k = problem.grid.space_ranks
    legal = [each for each in SPREAD if each != "direct" or not _factors_steps_alone(problem)]
    if settings.precond not in legal:
        raise InputError("-kkt_precond", f"{settings.precond} with {k} ranks a step", " | ".join(legal))
    if settings.form != "standard":
        raise InputError("-kkt_form", f"{settings.form} with {k} ranks a step", "standard")


def price_of_factors(problem: ControlProblem) -> int:
    """What factors of the KKT matrix cost, in iterations of "reduced", by a count of operations; at least 20.

    Nested dissection of a box of nt steps by n/b by b unknowns, b the bandwidth of a step: its largest separator has
    s = (2 + m/n) * (product of the two short sides) rows, for states, multipliers and controls, and about 10 s^3
    operations follow for each cube of the long side. An iteration takes two sweeps through nt steps with bands of
    2b + 1, at a tenth of the speed of dense blocks.
    """
    assert problem.constraint.pattern is not None
    n, nt, csr = problem.n, problem.grid.num_steps, problem.constraint.pattern.A.csr
    order = reverse_cuthill_mckee(csr)
    rows, cols = csr[order][:, order].nonzero()
    band = max(1, int(np.abs(rows - cols).max(initial=1)))
    short, middle, long = sorted((band, max(1, n // band), nt))
    separator = (2.0 + problem.m / n) * short * middle
    factors, sweeps = 10.0 * separator**3 * long / middle, 8.0 * nt * n * (2 * band + 1)
    return max(20, int(factors / (10.0 * sweeps)))


def _seen(problem: ControlProblem) -> tuple[bool, bool]:
    """Whether the objective has curvature in all states of all steps, and in some of each, at the initial state.

    Collective.
    """
    z, p = (torch.zeros(size, dtype=torch.float64) for size in ((problem.grid.n_local, problem.m), problem.param_dim))
    u, steps = problem.initial_state(p).expand(len(z), -1), problem.grid.steps.with_parameters(p)
    state, _ = problem.objective.hessian_blocks(u, z, steps)
    unseen = state.zero_rows()
    some, whole = (float(problem.grid.max(each.any().double())) for each in (unseen, unseen.all(dim=1)))
    return not some, not whole


def _reaches_all_states(problem: ControlProblem) -> bool:
    """Whether a control acts in each row of a step."""
    pattern = problem.constraint.pattern
    return pattern is not None and problem.grid.all(bool((np.diff(pattern.C.csr.indptr) > 0).all()))


class Choice:
    """The present way; `give_up` goes on to the next, and there is no way back.

    Args:
        stages: the ways in turn; a single one is no choice.

    Attributes:
        stage: the number of the present one.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages, self.stage = tuple(stages), 0

    @property
    def present(self) -> Stage:
        """The present stage."""
        return self.stages[self.stage]

    @property
    def way(self) -> str:
        """The word for it, one of `-kkt_precond`."""
        return self.present.way

    @property
    def ways(self) -> list[str]:
        """All of them until now."""
        return [stage.way for stage in self.stages[: self.stage + 1]]

    def resume(self, stage: int) -> None:
        """Go on where an earlier run was, if it had the same ways."""
        self.stage = min(stage, len(self.stages) - 1)

    def give_up(self) -> bool:
        """Go on to the next way; returns whether there is one."""
        is_last = self.stage == len(self.stages) - 1
        self.stage += not is_last
        return not is_last
