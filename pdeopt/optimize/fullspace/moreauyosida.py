"""Inequalities c(x) <= 0 on states, controls and paths by Moreau-Yosida path-following in full space.

Violations have a price that grows: for gamma -> infinity,

    min J(x) + gamma/2 |max(c(x) + nu/gamma, 0)|_w^2   subject to   F(x) = 0,

with multipliers max(nu + gamma c, 0) and, along the path, nu = 0. Each gamma is solved by semismooth Newton's method on
the KKT system of the equations, whose Hessian has gamma c'^T w c' of the violated entries on top, from the solution
before: M. Hintermueller, K. Kunisch, Path-following methods for a class of constrained minimization problems in
function space, SIAM J. Optim. 17 (2006) 159-187, and Feasible and noninterior path-following in constrained
minimization with low multiplier regularity, SIAM J. Control Optim. 45 (2006) 1198-1221. Violations fall as gamma^-1,
down to gamma^-1/2 in the largest norm where multipliers are measures.

Rounding errors of gamma c end the path before violations are as small as tolerances. From its last gamma on, nu is
moved instead, to the multipliers that were found (the method of multipliers: each time violations fall by a factor of
about gamma): D. P. Bertsekas, Constrained Optimization and Lagrange Multiplier Methods, 1982, chapter 2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import copy as copy_of
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from petsc4py import PETSc
from torch import Tensor

from pdeopt.control.metric import RieszMetric
from pdeopt.control.problem import ControlProblem
from pdeopt.core.errors import SolveFailure
from pdeopt.core.monitor import History, Reason, Record
from pdeopt.core.settings import Settings, setting
from pdeopt.optimize.fullspace.interior import CENTERING, InequalityMethod, suited
from pdeopt.optimize.fullspace.newton import NewtonKKT, go_on_with
from pdeopt.optimize.parts.inequalities import Inequalities, own_rows, whole_rows

#: Newton steps for one gamma; where they do not do, or fail, the factor between two gammas becomes its square root,
#: until it is below the least one.
STEPS_A_PRICE, POOR, LEAST_GROWTH = 12, 2, 1.3

#: Violations that a raise leaves at more than this part stay. So many raises in a row that leave them, while the
#: penalty is above |J|, say that there is no feasible point near.
STAYS, RAISES = 0.5, 2

#: The loosest relative tolerance of a KKT solve: what a looser one misses of F has a high price.
TIGHT = 1e-6

#: Ends of Newton's method that another method may not meet.
FAILED = (Reason.DIVERGED_LINE_SEARCH, Reason.DIVERGED_MAX_IT, Reason.DIVERGED_NAN, Reason.DIVERGED_LINEAR_SOLVE)

#: Slacks are not zero, so that others may divide by them.
TINY = 1e-300

#: The smallest |J| that is a unit of prices, in tolerances.
LEAST_UNIT = 1e3


@dataclass(frozen=True)
class MoreauYosidaSettings(Settings, prefix="moreau_yosida_"):
    """Moreau-Yosida path-following for inequalities on states and paths."""

    gamma: float = setting(
        10.0, "first price of squared violations; the unit is |J| over the measure of the inequalities", above=0
    )
    gamma_max: float = setting(1e7, "last price of the path, in the same unit", above=0)
    growth: float = setting(100.0, "factor between prices", above=1)
    reduction: float = setting(
        0.03, "residual that ends the Newton steps for a price, relative to the gradient of J", above=0, at_most=1
    )
    shift: bool = setting(True, "move multipliers after the last price, until violations are below the tolerance")


class Place(NamedTuple):
    """A solution on the path: x, lam, price, known multipliers of inequalities, |max(c, 0)|_w, |(L_x, F)|."""

    x: PETSc.Vec
    lam: PETSc.Vec
    gamma: float
    nu: Tensor | None
    violation: float
    size: float


class MoreauYosida(InequalityMethod):
    """See the module. Where Newton's method fails after a raise, it goes back to the solution before, and raises less.

    After multipliers have moved it lowers the price instead of going on in ever shorter steps.

    Optimality is the largest of |L_x| and nu |c|; feasibility of |F| and the entries of c.

    Args:
        problem, x, lam: the start; both vectors are moved.
        inequalities: c.
        settings: of the method.
        tol: of |(L_x, F)| for the last price, and of violations.
        rtol: relative tolerance of the KKT solves.
        outer: prefix of the linear solver's options, before `kkt_`.
        kkt: settings of the linear solver, by the names of `KKTSettings`.

    Attributes:
        gamma: the present price.
        nu: the multipliers that are known, (n_local, K); None on the path.
    """

    kind = "moreau_yosida"

    def __init__(
        self,
        problem: ControlProblem,
        x: PETSc.Vec,
        lam: PETSc.Vec,
        inequalities: Inequalities,
        settings: MoreauYosidaSettings | None = None,
        *,
        tol: float = 1e-8,
        rtol: float = 1e-8,
        outer: str = "sqp_",
        kkt: Mapping[str, Any] | None = None,
    ) -> None:
        self.problem, self.x, self.lam, self.rows = problem, x, lam, inequalities
        self.settings, self.tol, self.metric = settings or MoreauYosidaSettings(), tol, RieszMetric(problem)
        self.lin = problem.at(x)
        self.gamma = self.settings.gamma * _unit(self)
        self.nu: Tensor | None = None
        self._growth, self._raises, self._steps, self._poor = self.settings.growth, 0, 0, 0
        self._last: Place | None = None
        words: dict[str, Any] = {"rtol": rtol, "outer": outer, "kkt": kkt, "precond": suited(problem, inequalities)}
        self._newton = NewtonKKT(_priced(self), x, lam, loosest=max(rtol, TIGHT), **words)
        self._solvers = self._newton._solvers

    def pair(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """-c where nu = 0; else so that nu / s is the penalty's Hessian, and at the end, what an interior point has."""
        nu = self.rows.pressed(self.gamma, c, self.nu)
        slack = nu * self.rows.scale.square() / self.gamma
        if self.nu is not None:
            slack = torch.minimum(slack, CENTERING * self.tol / nu)
        return torch.where(nu > 0, slack, (-c).clamp_min(TINY)), nu

    def record(self, iteration: int) -> Record:
        priced = self._newton.record(iteration)
        self.lin = self._newton.lin.with_objective(self.problem.objective)
        self._size, c = math.hypot(priced.optimality, priced.feasibility), self.rows.value(self.lin)
        gap = self.rows.largest(c.abs() * self.rows.pressed(self.gamma, c, self.nu))
        words = [f"gamma {self.gamma:.1e}"]
        words += ["" if self.nu is None else "multipliers moved", priced.note]
        return replace(
            priced,
            objective=self.lin.value,
            feasibility=max(priced.feasibility, self.rows.largest(c)),
            optimality=max(priced.optimality, gap),
            note=", ".join(filter(None, words)),
        )

    def step(self) -> Reason:
        is_solved = self._size <= self._enough
        if is_solved and (reason := self._dearer()) != Reason.ITERATING:
            return reason
        try:
            reason = self._newton.step()
        except SolveFailure:
            if not self._can_retreat:
                raise
            reason = Reason.DIVERGED_LINEAR_SOLVE
        self._steps, self._poor = self._steps + 1, self._poor + self._newton.is_poor
        is_slow = self._steps >= STEPS_A_PRICE or self._poor >= POOR
        if reason == Reason.ITERATING and not (is_slow and self._can_retreat):
            return reason
        return self._retreat(reason)

    @property
    def _is_last(self) -> bool:
        """Whether the path is at its end."""
        return self.nu is not None or self.gamma >= (1 - 1e-9) * self.settings.gamma_max * _unit(self)

    @property
    def _enough(self) -> float:
        """The residual that ends the Newton steps for the present price; where all is over, that is for `iterate`."""
        goes_on = self.settings.shift or not self._is_last
        loose = self.settings.reduction * self.metric.dual_norm(self.lin.gradient)
        return max(loose, self.tol) if goes_on else self.tol

    def _dearer(self) -> Reason:
        """The next price, or at the last one the next multipliers."""
        rows, c = self.rows, self.rows.value(self.lin)
        violation = rows.norm(torch.relu(c) / rows.scale)
        stays = self._last is not None and violation > STAYS * self._last.violation
        is_dear = self.gamma * violation**2 > 2 * max(abs(self.lin.value), self.tol)
        self._raises = self._raises + 1 if stays and is_dear else 0
        if self._raises >= RAISES and rows.largest(c) > self.tol:
            return Reason.DIVERGED_INFEASIBLE
        if self._is_last and not self.settings.shift:
            return Reason.DIVERGED_STAGNATION
        before = math.inf if self._last is None else self._last.size
        self._last = Place(self.x.copy(), self.lam.copy(), self.gamma, self.nu, violation, self._size)
        if not self._is_last:
            if self._poor == 0:  # bolder again after a retreat
                self._growth = min(self._growth**2, self.settings.growth)
            least, most = self.settings.gamma * _unit(self), self.settings.gamma_max * _unit(self)
            self.gamma = min(max(self._growth * self.gamma, least), most)
            return self._go_on()
        has_moved, self.nu = self.nu is not None, rows.pressed(self.gamma, c, self.nu)
        if has_moved and rows.largest(c) <= self.tol and self._size > STAYS * before:  # gamma c is rounded
            self.gamma /= self.settings.growth
        elif has_moved and stays:
            self.gamma *= self.settings.growth
        return self._go_on()

    @property
    def _can_retreat(self) -> bool:
        if self._last is None:
            return False
        if self.nu is not None:
            return self.gamma > self.settings.growth * self.settings.gamma * _unit(self)
        return self._growth > LEAST_GROWTH**2

    def _retreat(self, reason: Reason) -> Reason:
        """Back to the last solution, for a smaller raise, or with moved multipliers a lower price.

        The reason where that is not smaller any more.
        """
        if not self._can_retreat:
            return reason
        last = self._last
        assert last is not None
        last.x.copy(self.x)
        last.lam.copy(self.lam)
        if self.nu is not None:
            self.gamma /= math.sqrt(self.settings.growth)
        else:
            self._growth = math.sqrt(self._growth)
            self.gamma = last.gamma * self._growth
        return self._go_on()

    def _go_on(self) -> Reason:
        self._steps = self._poor = 0
        go_on_with(self._newton, _priced(self))
        return Reason.ITERATING

    # -- the end -----------------------------------------------------------------------------------------------

    def remedy(self, reason: Reason) -> str:
        if reason == Reason.DIVERGED_STAGNATION:  # the path is at its end
            other = f"raise -moreau_yosida_gamma_max, {self.settings.gamma_max:g}, or let multipliers move"
        else:
            other = "or -sqp_type interior" if reason in FAILED else ""
        return "; ".join(filter(None, [super().remedy(reason), other]))

    def curves_down(self, history: History) -> bool:
        """Of the problem with a price, whose Hessian has the violated entries."""
        return self._newton.curves_down(history)

    def memory(self) -> dict[str, Any]:
        """What a restart on any number of ranks needs beside x and lam. Collective."""
        rows: list[list[float]] = [] if self.nu is None else whole_rows(self.rows, self.nu)
        path = {"gamma": self.gamma, "growth": self._growth, "raises": self._raises}
        last = (
            {} if self._last is None else {name: getattr(self._last, name) for name in ("gamma", "violation", "size")}
        )
        price = {"steps": self._steps, "poor": self._poor}
        return {"nu": rows, "path": path, "last": last, "price": price, "newton": self._newton.memory()}

    def recall(self, memory: dict[str, Any]) -> None:
        """Go on from the `memory` of an earlier run; a retreat would lead to the present point."""
        path, last, price = memory["path"], memory["last"], memory["price"]
        self.gamma, self._growth, self._raises = path["gamma"], path["growth"], path["raises"]
        if memory["nu"]:
            self.nu = own_rows(self.rows, memory["nu"])
        if last:
            self._last = Place(self.x.copy(), self.lam.copy(), last["gamma"], self.nu, last["violation"], last["size"])
        self._go_on()
        self._steps, self._poor = price["steps"], price["poor"]
        self._newton.recall(memory["newton"])

    def destroy(self) -> None:
        """Free the KKT solvers."""
        self._newton.destroy()


def _priced(method: MoreauYosida) -> ControlProblem:
    """The problem with the present price of violations; the initial node has none."""
    priced = copy_of(method.problem)
    priced.objective = method.problem.objective + method.rows.penalty(method.gamma, method.nu)
    return priced


def _unit(method: MoreauYosida) -> float:
    """Of prices. J of the start says little: it may be zero."""
    return max(abs(method.lin.value), LEAST_UNIT * method.tol) / method.rows.measure
