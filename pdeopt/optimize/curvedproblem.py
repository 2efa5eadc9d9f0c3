"""A control problem as a function of its design with Gauss-Newton products: by hand, or by its linearizations."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from petsc4py import PETSc
from torch import Tensor

from pdeopt.control.linearization import Elimination, Linearization
from pdeopt.control.objective import Sum
from pdeopt.control.problem import ControlProblem
from pdeopt.control.reduced import SWEEP_COSTS
from pdeopt.core.arrays import assign, copy
from pdeopt.core.errors import InputError, SolveFailure
from pdeopt.core.settings import Section, Settings, read, setting
from pdeopt.functions.curved import EMPTY, Curvature, CurvedFunction, CurvedPoint, CurvedTerm, Tangent
from pdeopt.steps.mgrit import MgritSettings

#: Cycles in one shot: with one, products are not symmetric enough to end with.
ONE_SHOT: dict[str, Any] = {"cycles": 2, "adjoint_cycles": 2}


@dataclass(frozen=True)
class CurvedSettings(Settings, prefix="gn_"):
    """States and sweeps of Gauss-Newton steps for control problems."""

    states: str = setting(
        "eliminated",
        "states are those of the design, or unknowns beside it, whose equations each step solves linearized",
        choices=("eliminated", "unknown"),
    )
    sweeps: str = setting(
        "serial",
        "sweeps through layers of a dense network: one after the other; linearized ones by MGRIT until they are exact; "
        "or all in one shot with the weights, by -layer_mgrit_cycles and adjoint ones, from those of the last step",
        choices=("serial", "mgrit", "one_shot"),
        reads={"mgrit": (MgritSettings,), "one_shot": (Section(MgritSettings, defaults=ONE_SHOT),)},
    )


def curved_function(problem: ControlProblem, **given: Any) -> CurvedFunction:
    """The reduced objective of a problem as a `CurvedFunction` of its design [z | p], flat.

    Args:
        problem: a control problem; that of a dense network has its products by hand.
        **given: defaults of `CurvedSettings`; options win.

    Raises:
        InputError: sweeps by MGRIT of something else than a dense network: `-propagator mgrit` serves there; or in
            one shot with states that are unknowns.
    """
    settings = read(CurvedSettings, **given)
    is_unknown, one_shot = settings.states == "unknown", settings.sweeps == "one_shot"
    if one_shot and is_unknown:
        raise InputError("-gn_sweeps", "one_shot with states unknown", "one_shot with eliminated ones, or mgrit")
    mgrit = None if settings.sweeps == "serial" else read(MgritSettings, **(ONE_SHOT if one_shot else {}))
    objective, words = problem.objective, {"unknown": is_unknown, "mgrit": mgrit, "one_shot": one_shot}
    for term in objective.terms if isinstance(objective, Sum) else [objective]:
        found = term.curved(problem, **words) if isinstance(term, CurvedTerm) else None
        if found is not None:
            return found
    if mgrit is not None:
        legal = "serial, but for networks of dense layers; else -propagator mgrit"
        raise InputError("-gn_sweeps", settings.sweeps, legal)
    return CurvedObjective(problem, is_unknown)


class CurvedObjective(CurvedFunction):
    """J(u(z), z) of any control problem, by its linearizations and sweeps; a user's functions are differentiated.

    The Gauss-Newton matrix leaves second derivatives of the constraint out, and those that an objective leaves out, see
    `CurvedTerm`.

    Args:
        problem: the control problem.
        unknown: whether states are unknowns beside the design.
    """

    def __init__(self, problem: ControlProblem, unknown: bool = False) -> None:
        super().__init__(problem.layout.design_size, problem.grid.mpi, SWEEP_COSTS)
        self.problem, self.unknown = problem, unknown

    def at(self, x: Tensor, state: Tensor | None = None) -> ControlPoint:
        return ControlPoint(self, x, state)


class ControlPoint(CurvedPoint):
    """A `CurvedObjective` at a design, and at states where these are unknowns.

    Args:
        function: the objective.
        x: the design, (size,).
        state: rows of the states, flat; None for those of the design.
    """

    def __init__(self, function: CurvedObjective, x: Tensor, state: Tensor | None = None) -> None:
        self.function, self.x, self.problem = function, x, function.problem
        function.tally.values += 1
        function.tally.work += function.costs.value
        self._design = self.problem.create_design()
        assign(self._design, x)
        self.state, self.value = EMPTY, math.inf
        try:
            self._evaluate(state)
        except SolveFailure:
            return

    def _evaluate(self, state: Tensor | None) -> None:
        u = self.problem.solve_state(self._design) if state is None else self._vector(state)
        self.lin = self._at(u)
        self.restored = self.lin
        if not self.function.unknown:
            self.value = self.lin.value
            return
        self.state = copy(u)
        r = self.problem.layout.rows(self.lin.residual)
        self.step = self.problem.propagator.forward(self.lin.jacobian, -r).reshape(-1)
        self.restored = self._at(self._vector(self.state + self.step))
        self.value = self.restored.value

    def _vector(self, u: Tensor) -> PETSc.Vec:
        out = self.problem.create_multiplier()
        assign(out, u)
        return out

    def _at(self, u: PETSc.Vec) -> Linearization:
        return self.problem.at(self.problem.join(u, self._design))

    @cached_property
    def gradient(self) -> Tensor:
        tally, costs, layout = self.function.tally, self.function.costs, self.problem.layout
        tally.gradients += 1
        tally.values -= 1  # it was the value of this gradient
        tally.work += costs.gradient - costs.value
        if not math.isfinite(self.value):
            return torch.full_like(self.x, torch.nan)
        j_u, j_z, j_p = self.restored.gradient_fields
        lam = self.problem.propagator.backward(self.lin.jacobian, -j_u)
        _, f_z, f_p = self.lin.vjp_fields(lam)
        return torch.cat([j_z + f_z, (j_p + f_p)[: layout.param_size]])

    def curvature(self, rows: Tensor | None = None) -> Curvature:
        return ControlCurvature(self)

    def ahead(self, d: Tensor, state: Tensor) -> ControlPoint:
        moved = self.state + self.step + state if self.function.unknown else None
        return ControlPoint(self.function, self.x + d, moved)


class ControlCurvature(Curvature):
    """The Gauss-Newton matrix of a `ControlPoint`."""

    def __init__(self, point: ControlPoint) -> None:
        self.function = point.function
        hessian = partial(point.restored.hvp_fields, None)
        self._elimination = Elimination(point.lin, point.problem.propagator, hessian)

    def product(self, d: Tensor) -> Tangent:
        tally = self.function.tally
        tally.hessian_products += 1
        tally.work += self.function.costs.hessian_product
        state, _, rest = self._elimination(d)
        return Tangent(-rest, state.reshape(-1) if self.function.unknown else EMPTY)
