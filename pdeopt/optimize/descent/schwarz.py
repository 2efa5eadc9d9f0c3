"""Schwarz-preconditioned quasi-Newton methods: local solves on parts of the unknowns, then a global step.

A. Kopanicakova, H. Kothari, G. E. Karniadakis, R. Krause, Enhancing training of physics-informed neural networks using
domain decomposition-based preconditioning strategies, SIAM J. Sci. Comput. 46, 2024. An iteration is

1. local: from x, every part s goes k_s steps down d -> f(x + R_s' d), all from the same x (additive), or one color
   after the other (multiplicative);
2. synchronization: x_half = x + sum_s a_s R_s' W_s d_s, with one step size for all, or the a_s that minimize f;
3. global: a quasi-Newton step from x_half.

H takes in the pairs of the global steps, x_new - x_half, and on request those of 1 and 2, x_half - x.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pdeopt.core.errors import InputError
from pdeopt.core.monitor import DescentRecord, History, Reason, Result
from pdeopt.core.settings import Settings, setting
from pdeopt.core.team import Team
from pdeopt.functions.decomposition import DEFAULT_PARTS, Decomposition
from pdeopt.functions.hierarchy import Hierarchy, as_hierarchy
from pdeopt.functions.smooth import SmoothFunction
from pdeopt.optimize.descent.localsolves import METHODS, LocalSolves, quasi_newton
from pdeopt.optimize.descent.minimizer import Minimizer, StopSettings, flattened, part_of
from pdeopt.optimize.descent.quasinewton import (
    LBFGS,
    LBFGSSettings,
    QuasiNewton,
    first_step_setting,
    gap_setting,
    search_setting,
)
from pdeopt.optimize.parts.inversehessian import InverseHessian
from pdeopt.optimize.parts.linesearch import SEARCHES, Ray
from pdeopt.optimize.parts.subspace import Columns, Correction


@dataclass(frozen=True)
class SPQNSettings(Settings, prefix="spqn_"):
    """Schwarz-preconditioned quasi-Newton methods."""

    type: str = setting(
        "additive",
        "solve on the parts at the same time, or one after the other",
        choices=("additive", "multiplicative"),
    )
    parts: int = setting(
        None,
        f"parts of the unknowns, where no decomposition is given; by default {DEFAULT_PARTS} or all that there can be",
        kind=int,
        at_least=1,
    )
    overlap: int = setting(
        0, "blocks that a part shares with each neighbor, where no decomposition is given", at_least=0
    )
    local_it: int = setting(10, "steps on each part; 0 leaves the global method alone", at_least=0)
    local: str = setting("lbfgs", "quasi-Newton method on each part", choices=METHODS)
    local_memory: int = setting(10, "pairs of L-BFGS on the parts", at_least=0)
    keep: bool = setting(False, "inverse Hessians of the parts are kept from iteration to iteration")
    sync: str = setting(
        "subspace",
        "lengths of the corrections: one for all parts, or those that minimize f",
        choices=("line", "subspace"),
    )
    sync_it: int = setting(3, "steps of the minimization over the lengths of the corrections", at_least=1)
    directions: str = setting(
        "none",
        "directions beside the corrections, split by parts: none, the last step, or it and the gradient",
        choices=("none", "step", "both"),
    )
    colors: int = setting(
        0,
        "groups of parts in a multiplicative sweep, those of a group at the same time; 0: each part alone",
        at_least=0,
    )
    coarse_it: int = setting(100, "steps on the coarse function of a hierarchy, before the first iteration", at_least=0)
    coarse_rtol: float = setting(
        1e-2, "part of the first gradient at which the steps on the coarse function end", above=0
    )
    every: int = setting(1, "iterations from one with local solves to the next", at_least=1)
    method: str = setting("lbfgs", "quasi-Newton method on all unknowns", choices=METHODS)
    memory: int = setting(10, "pairs of the global L-BFGS; 0 for steepest descent", at_least=0)
    momentum: float = setting(
        1.0, "weight of the new direction in the mean with the last ones; 1: no momentum", above=0, at_most=1
    )
    pairs: str = setting(
        "global",
        "steps that the global inverse Hessian learns from: the global ones, or local ones, too",
        choices=("global", "all"),
    )
    update: str = setting("ssbroyden", "update of dense inverse Hessians", choices=("ssbroyden", "ssbfgs", "bfgs"))
    line_search: str = search_setting()
    first_step: str = first_step_setting()
    gap: float = gap_setting()


class SPQN(Minimizer):
    """Additive and multiplicative Schwarz-preconditioned quasi-Newton methods: one around a global method.

    Args:
        function: f; its `local` gives the functions of the parts.
        decomposition: default -spqn_parts blocks of neighboring unknowns, or what `function.decompose` makes of them.
        team: ranks that share the parts of that default, where the unknowns are on every rank.

    Attributes:
        method: the global method, `LBFGS` or `SSBroyden`; its point is that of this object.

    Example:
        `SPQN(function, parts=4, local_it=5, gtol=1e-6).minimize(torch.zeros(function.size, dtype=torch.float64))`
    """

    Settings = SPQNSettings
    method: QuasiNewton
    decomposition: Decomposition | None

    def __init__(
        self,
        function: SmoothFunction | None = None,
        *args: Any,
        decomposition: Decomposition | None = None,
        team: Team | None = None,
        **defaults: Any,
    ) -> None:
        self.decomposition, self.team = decomposition, team
        super().__init__(function, *args, **defaults)

    def adopt(self, function: SmoothFunction) -> None:
        self.method, hierarchy = self._method(function, self.stop, self.settings.first_step), as_hierarchy(function)
        self.method.unit, self.method.prefix = self.unit, self.prefix
        self.coarse = None if hierarchy.shares_unknowns else CoarseSpace(hierarchy, self._method)
        self.is_monotone = self.method.is_monotone
        super().adopt(self.method.function)
        if self.decomposition is None:
            self.decomposition = self.function.decompose(self.settings.parts, self.settings.overlap, self.team)
        if self.decomposition.size != self.function.size:
            raise InputError("unknowns of the decomposition", self.decomposition.size, f"{self.function.size}")

    def _method(self, function: SmoothFunction, stop: Any, first_step: str = "normalized") -> QuasiNewton:
        s = self.settings
        words = {"line_search": s.line_search, "first_step": first_step, "gap": s.gap}
        return quasi_newton(s.method, function, s.memory, s.update, stop, **words)

    def start(self, x: Tensor, known: tuple[float, Tensor] | None = None) -> None:
        self.hand_over(self.method)
        self.method.start(x, known)
        self._compare()
        if self.coarse is not None and self.settings.coarse_it:
            gtol = self.settings.coarse_rtol * self.method.optimality()
            correction = self.coarse.descend(x, StopSettings(max_it=self.settings.coarse_it, gtol=gtol))
            self.method.note = search_along(self.method, correction)
            self.coarse.teach(self.method)
        self._velocity, self._last_step, self._count = torch.zeros_like(x), torch.zeros_like(x), 0
        self._follow()

    def _compare(self) -> None:
        """What the first point says, for all that is done from here."""
        assert self.decomposition is not None
        self.first, self.gtol, self.highest = self.method.first, self.method.gtol, self.method.highest
        self.parts = LocalSolves(self.decomposition, self.settings, self.gtol)

    def _follow(self) -> None:
        """The point of the global method is that of this one."""
        method = self.method
        self.function, self.x, self.f, self.g = method.function, method.x, method.f, method.g
        self.radius, self.note = method.radius, method.note

    def step(self) -> Reason:
        reason = self.method.on_level(self._iteration)
        self._follow()
        return reason

    def _iteration(self) -> Reason:
        """Local solves, and a global step after them."""
        method, begin, local = self.method, self.method.x, ""
        if self.settings.local_it and self._count % self.settings.every == 0:
            local = self._precondition()
        self._count += 1
        if method.optimality() > self.gtol:
            reason = method.iteration(self._momentum())
            if reason < 0 and method.x is begin:
                return reason
        self._last_step = method.x - begin
        method.note = " ".join(part for part in (local, method.note) if part)
        return Reason.ITERATING if math.isfinite(method.f) else Reason.DIVERGED_NAN

    def _momentum(self) -> Tensor | None:
        """v <- (1 - mu) v + mu p, p = -H f'; None where p itself serves, without momentum or where v goes up."""
        mu, method = self.settings.momentum, self.method
        if mu == 1.0:
            return None
        self._velocity = (1.0 - mu) * self._velocity + mu * method.direction()
        return self._velocity if method.function.dot(self._velocity, method.g) < 0 else None

    def _precondition(self) -> str:
        """Move x to x_half; in words what happened."""
        method, parts = self.method, self.parts
        x, f, g = method.x, method.f, method.g
        if self.settings.type == "multiplicative":
            done = search_along(method, parts.multiplicative(method.function, x, f, g))
        elif self.settings.sync == "line":
            steps = {s: c.d for s, c in parts.additive(method.function, x, f, g).items()}
            done = search_along(method, parts.decomposition.assemble(steps))
        else:
            done = self._minimize_half(parts.additive(method.function, x, f, g))
        if self.settings.pairs == "all" and method.f < f:
            method.learn(method.x - x, method.g - g)
        return done

    def _minimize_half(self, corrections: dict[int, Correction]) -> str:
        """x + sum_s a_s R_s' W_s d_s, a by a few quasi-Newton steps, or x where there is no decrease."""
        method, parts = self.method, self.parts.decomposition
        columns = Columns(method.function, method.x, method.f, method.g)
        for s, correction in sorted(corrections.items()):
            columns.add(parts.assemble({s: correction.d}), correction.decrease)
        more = {"none": (), "step": (self._last_step,), "both": (self._last_step, -method.g)}[self.settings.directions]
        for whole in more:
            for s, indices in enumerate(parts.parts):
                columns.add(parts.assemble({s: whole[indices]}), math.nan)
        if columns.size == 0:
            return "no correction"
        it = self.settings.sync_it
        inner = LBFGS(columns, LBFGSSettings(it, first_step="unit"), StopSettings(max_it=it, gtol=self.gtol))
        inner.minimize(torch.zeros(columns.size, dtype=torch.float64), known=columns.start(), unit=1.0)
        if not columns.best[0] < method.f:
            return "no correction"
        method.f, method.x, method.g = columns.best
        return f"local {columns.size}"

    def test(self, record: DescentRecord) -> Reason:
        return self.method.test(record)

    def result(self, reason: Reason, message: str, history: History) -> Result:
        return self.method.result(reason, message, history)

    def memory(self) -> dict[str, Any]:
        own = {"velocity": self._velocity.clone(), "last_step": self._last_step.clone(), "count": self._count}
        coarse = {} if self.coarse is None else self.coarse.memory()
        return self.method.memory() | super().memory() | own | flattened(self.parts.memory() | coarse)

    def recall(self, memory: dict[str, Any]) -> None:
        self.hand_over(self.method)
        self.method.recall(memory)
        self._compare()
        self._velocity, self._last_step = memory["velocity"].clone(), memory["last_step"].clone()
        self._count = int(memory["count"])
        self.parts.recall(self.method.function, self.method.x, memory)
        if self.coarse is not None and (kept := part_of(memory, "coarse")):
            self.coarse.recall(kept)
            self.coarse.teach(self.method)
            self.method.inverse.recall(part_of(memory, "inverse"))
        self._follow()


def search_along(method: QuasiNewton, total: Tensor) -> str:
    """Move a method to x + a total with a decrease, if there is one; in words what happened.

    Args:
        method: whose x, f and g move.
        total: the direction, (size,).
    """
    ray = Ray(method.function, method.x, method.f, method.g, total)
    size = SEARCHES["cubic"].along(ray) if ray.slope_at_start < 0 else None
    if size is None:
        return "no correction"
    method.x, method.f, method.g = ray.point(size), ray(size), ray.gradient(size)
    return f"local {size:.2g}"


class CoarseSpace:
    """The coarse function of a hierarchy, for the start and for the first inverse Hessian.

    H_0 = h + P (H_c - h_c) R, h and h_c what the functions know of their inverse Hessians: quasi-Newton methods learn
    what the levels share on the coarse one, at its price.

    Args:
        hierarchy: of two levels or more; the second is the coarse one.
        method: makes the quasi-Newton method of a function, from it and when to stop.
    """

    def __init__(self, hierarchy: Hierarchy, method: Callable[[SmoothFunction, Any], QuasiNewton]) -> None:
        self.function, self.transfer, self._method = hierarchy.functions[1], hierarchy.transfers[0], method
        self.inverse: InverseHessian | None = None

    def descend(self, x: Tensor, stop: StopSettings) -> Tensor:
        """P d, d the way down on the coarse function from the projection of x."""
        method, start = self._method(self.function, stop), self.transfer.project(x)
        found = method.minimize(start, unit=1.0).design
        self.inverse = method.inverse
        return self.transfer.prolong(found - start)

    def teach(self, method: QuasiNewton) -> None:
        """Make H_0 the first inverse Hessian of a method on the fine function, if both levels know theirs."""
        H, h, h_c = self.inverse, method.preconditioner, self.function.preconditioner()
        if H is None or h is None or h_c is None:
            return

        def two_levels(g: Tensor) -> Tensor:
            Rg = self.transfer.restrict(g)
            return h(g) + self.transfer.prolong(H.times(Rg) - h_c(Rg))

        method.preconditioner = two_levels
        method.inverse = method.new_inverse()

    def memory(self) -> dict[str, dict[str, Any]]:
        """What `recall` takes, under the name "coarse"."""
        return {} if self.inverse is None else {"coarse": self.inverse.memory()}

    def recall(self, memory: dict[str, Any]) -> None:
        """Go on from what `memory` gave."""
        method = self._method(self.function, StopSettings())
        method.preconditioner = self.function.preconditioner()
        self.inverse = method.new_inverse()
        self.inverse.recall(memory)
