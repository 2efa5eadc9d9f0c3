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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pdeopt.core.errors import InputError
from pdeopt.core.monitor import Reason
from pdeopt.core.settings import Settings, setting
from pdeopt.core.team import Team
from pdeopt.functions.decomposition import Decomposition
from pdeopt.functions.hierarchy import as_hierarchy
from pdeopt.functions.sharing import settle
from pdeopt.functions.smooth import Operator, SmoothFunction
from pdeopt.optimize.descent.minimizer import StopSettings
from pdeopt.optimize.descent.quasinewton import (
    LBFGS,
    LBFGSSettings,
    QuasiNewton,
    SSBroyden,
    SSBroydenSettings,
    first_step_setting,
    gap_setting,
    search_setting,
)
from pdeopt.optimize.parts.inversehessian import DenseInverse, InverseHessian, LimitedMemory
from pdeopt.optimize.parts.linesearch import SEARCHES, Ray

METHODS = ("lbfgs", "ssbroyden")


@dataclass(frozen=True)
class SPQNSettings(Settings, prefix="spqn_"):
    """Options `-spqn_*`."""

    type: str = setting(
        "additive", "parts at the same time, or one after the other", choices=("additive", "multiplicative")
    )
    parts: int = setting(8, "parts, where no decomposition is given", at_least=1)
    overlap: int = setting(
        0, "blocks that a part shares with each neighbor, where no decomposition is given", at_least=0
    )
    local_it: int = setting(10, "k_s, steps on each part; 0 leaves the global method alone", at_least=0)
    local: str = setting("lbfgs", "method on the parts", choices=METHODS)
    local_memory: int = setting(10, "pairs of a local L-BFGS", at_least=0)
    keep: bool = setting(False, "local H goes on in the next iteration instead of starting anew")
    sync: str = setting(
        "subspace", "one step size for all parts, or those that minimize f", choices=("line", "subspace")
    )
    sync_it: int = setting(3, "steps of the minimization over the corrections", at_least=1)
    directions: str = setting(
        "none",
        "more of the subspace, by parts: the last step, or it and the gradient",
        choices=("none", "step", "both"),
    )
    colors: int = setting(
        0, "of a multiplicative sweep, parts of one at the same time; 0 for one part each", at_least=0
    )
    coarse_it: int = setting(100, "steps on the coarse function of a hierarchy, before the first iteration", at_least=0)
    coarse_rtol: float = setting(1e-2, "of its gradient at which they end", above=0)
    every: int = setting(1, "local solves in every so many iterations", at_least=1)
    method: str = setting("lbfgs", "global method", choices=METHODS)
    memory: int = setting(10, "pairs of the global L-BFGS; 0 for steepest descent", at_least=0)
    momentum: float = setting(1.0, "mu of v <- (1 - mu) v + mu p, the global direction", above=0, at_most=1)
    pairs: str = setting("global", "steps that H learns from: the global ones, or all", choices=("global", "all"))
    update: str = setting("ssbroyden", "of dense H", choices=("ssbroyden", "ssbfgs", "bfgs"))
    line_search: str = search_setting()
    first_step: str = first_step_setting()
    gap: float = gap_setting()


class SPQN(QuasiNewton):
    """Additive and multiplicative Schwarz-preconditioned quasi-Newton methods.

    Args:
        function: f; its `local` gives the functions of the parts.
        decomposition: default -spqn_parts blocks of neighboring unknowns, or what `function.decompose` makes of them.
        team: ranks that share the parts of that default, where the unknowns are on every rank.
    """

    name, Settings = "spqn", SPQNSettings

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

    def attach(self, function: SmoothFunction) -> None:
        super().attach(function)
        function, self.hierarchy = self.function, as_hierarchy(function)
        if self.decomposition is None:
            self.decomposition = function.decompose(self.settings.parts, self.settings.overlap, self.team)
        if self.decomposition.size != function.size:
            raise InputError("unknowns of the decomposition", self.decomposition.size, f"{function.size}")

    def new_inverse(self) -> InverseHessian:
        return self._inverse_of(self.function, self.settings.method, self.settings.memory, self.preconditioner)

    def _inverse_of(
        self, function: SmoothFunction, method: str, pairs: int, initial: Operator | None = None
    ) -> InverseHessian:
        if method == "lbfgs":
            return LimitedMemory(function, pairs, initial)
        return DenseInverse(function, self.settings.update, initial=initial)

    def start(self, x: Tensor, known: tuple[float, Tensor] | None = None, inverse: Any = None) -> None:
        super().start(x, known, inverse)
        self._coarse: InverseHessian | None = None
        if not self.hierarchy.shares_unknowns and self.settings.coarse_it:
            self._begin_coarse()
        self._locals: dict[int, InverseHessian] = {}
        self._velocity, self._last_step, self._count = torch.zeros_like(x), torch.zeros_like(x), 0

    def _begin_coarse(self) -> None:
        """Go down on the coarse function; what its steps found moves x, and its H is the first one, where it serves.

        H_0 = h + P (H_c - h_c) R, h and h_c what the functions know of their inverse Hessians: quasi-Newton methods
        learn what the levels share on the coarse one, at its price.
        """
        coarse, transfer = self.hierarchy.functions[1], self.hierarchy.transfers[0]
        stop = StopSettings(max_it=self.settings.coarse_it, gtol=self.settings.coarse_rtol * self.optimality())
        method, start = self._method(coarse, self.settings.method, self.settings.memory, stop), transfer.project(self.x)
        found = method.minimize(start).design
        self.note = self._search_half(transfer.prolong(found - start))
        self._coarse = method.inverse
        self._take_over()

    def _take_over(self) -> None:
        coarse, transfer, H = self.hierarchy.functions[1], self.hierarchy.transfers[0], self._coarse
        h, h_c = self.preconditioner, coarse.preconditioner()
        if H is None or h is None or h_c is None:
            return

        def two_levels(g: Tensor) -> Tensor:
            Rg = transfer.restrict(g)
            return h(g) + transfer.prolong(H.times(Rg) - h_c(Rg))

        self.preconditioner = two_levels
        self.inverse = self.new_inverse()

    def iteration(self) -> Reason:
        begin, local = self.x, ""
        if self.settings.local_it and self._count % self.settings.every == 0:
            local = self._precondition()
        self._count += 1
        if self.optimality() > self.stop.gtol:
            reason = super().iteration()
            if reason < 0 and self.x is begin:
                return reason
        self._last_step = self.x - begin
        self.note = " ".join(part for part in (local, self.note) if part)
        return Reason.ITERATING if math.isfinite(self.f) else Reason.DIVERGED_NAN

    def direction(self) -> tuple[Tensor, bool]:
        """v of the momentum; -H f' without one, or where v goes up."""
        mu, (p, is_newton) = self.settings.momentum, super().direction()
        if mu == 1.0:
            return p, is_newton
        self._velocity = (1.0 - mu) * self._velocity + mu * p
        return (self._velocity, False) if self.function.dot(self._velocity, self.g) < 0 else (p, is_newton)

    # -- local solves ------------------------------------------------------------------------------------

    def _precondition(self) -> str:
        """Move x to x_half; in words what happened."""
        x, f, g = self.x, self.f, self.g
        if self.settings.type == "multiplicative":
            done = self._search_half(self._sweep())
        elif self.settings.sync == "line":
            done = self._search_half(self._parts.assemble(self._steps(range(len(self._parts)))))
        else:
            done = self._minimize_half(self._corrections(range(len(self._parts)), x, known=True))
        if self.settings.pairs == "all" and self.f < f and self.inverse.update(self.x - x, self.g - g):
            self._pairs += 1
        return done

    @property
    def _parts(self) -> Decomposition:
        assert self.decomposition is not None
        return self.decomposition

    def _corrections(self, parts: Sequence[int], x: Tensor, known: bool) -> dict[int, Correction]:
        """What local solves on these parts from x give, on all ranks. Collective over the team.

        Args:
            known: whether f and g are those of x.
        """
        mine = self._parts.mine()
        if not self._parts.is_replicated:  # all ranks have a part in evaluations at x
            functions = {s: self.function.local(self._parts, s, x) for s in parts}
        before = self.function.tally.copy()
        if self._parts.is_replicated:
            functions = {s: self.function.local(self._parts, s, x) for s in parts if s in mine}
        found = {s: self._solve(s, local, known) for s, local in functions.items() if s in mine}
        if self._parts.team is None:
            return found
        tally, gathered = self.function.tally, self._parts.team.allgather((self.function.tally - before, found))
        settle(tally, before, [calls for calls, _ in gathered])
        for rank, (_, others) in enumerate(gathered):
            if rank != self._parts.team.rank:
                found |= others if self._parts.is_replicated else {s: c.without_step() for s, c in others.items()}
        return found

    def _solve(self, s: int, local: SmoothFunction, known: bool) -> Correction:
        settings, stop = self.settings, StopSettings(max_it=self.settings.local_it, gtol=0.1 * self.stop.gtol)
        method = self._method(local, settings.local, settings.local_memory, stop)
        at_zero = (self.f, self.g[self._parts.parts[s]]) if known else None
        zero = torch.zeros(local.size, dtype=torch.float64)
        result = method.minimize(zero, known=at_zero, inverse=self._locals.get(s))
        if settings.keep:
            self._locals[s] = method.inverse
        return Correction(result.design, result.history[0].objective - result.objective)

    def _method(self, function: SmoothFunction, name: str, memory: int, stop: StopSettings) -> QuasiNewton:
        """A method of its own on a part, or on the coarse function."""
        if name == "lbfgs":
            return LBFGS(function, LBFGSSettings(memory, self.settings.line_search), stop)
        return SSBroyden(function, SSBroydenSettings(self.settings.update, self.settings.line_search), stop)

    def _sweep(self) -> Tensor:
        """The sum of all corrections, one color after the other, each from where the last ones led."""
        x = self.x
        for color in self._parts.colors(self.settings.colors):
            found = self._corrections(color, x, known=x is self.x)
            x = x + self._parts.assemble({s: c.d for s, c in found.items()}, weighted=False)
        return x - self.x

    def _steps(self, parts: Sequence[int]) -> dict[int, Tensor]:
        return {s: c.d for s, c in self._corrections(parts, self.x, known=True).items()}

    # -- synchronization ---------------------------------------------------------------------------------

    def _search_half(self, total: Tensor) -> str:
        """x + a total with a decrease, or x where there is none."""
        ray = Ray(self.function, self.x, self.f, self.g, total)
        size = SEARCHES["cubic"].along(ray) if ray.slope_at_start < 0 else None
        if size is None:
            return "no correction"
        self.x, self.f, self.g = ray.point(size), ray(size), ray.gradient(size)
        return f"local {size:.2g}"

    def _minimize_half(self, corrections: dict[int, Correction]) -> str:
        """x + sum_s a_s R_s' W_s d_s, a by a few quasi-Newton steps, or x where there is no decrease."""
        columns = Columns(self.function, self.x, self.f, self.g)
        for s, correction in sorted(corrections.items()):
            columns.add(self._parts.assemble({s: correction.d}), correction.decrease)
        more = {"none": (), "step": (self._last_step,), "both": (self._last_step, -self.g)}[self.settings.directions]
        for whole in more:
            for s, indices in enumerate(self._parts.parts):
                columns.add(self._parts.assemble({s: whole[indices]}), math.nan)
        if columns.size == 0:
            return "no correction"
        it = self.settings.sync_it
        method = LBFGS(columns, LBFGSSettings(it, first_step="unit"), StopSettings(max_it=it, gtol=self.stop.gtol))
        method.minimize(torch.zeros(columns.size, dtype=torch.float64), known=columns.start())
        if not columns.best[0] < self.f:
            return "no correction"
        self.f, self.x, self.g = columns.best
        return f"local {columns.size}"

    # -- restarts ----------------------------------------------------------------------------------------

    def memory(self) -> dict[str, Any]:
        own = {"velocity": self._velocity.clone(), "last_step": self._last_step.clone(), "count": self._count}
        kept = {f"local.{s}": H.memory() for s, H in self._locals.items()}
        if self._parts.team is not None and self._parts.is_replicated:  # any rank's memory serves any number of ranks
            kept = {name: H for of_rank in self._parts.team.allgather(kept) for name, H in of_rank.items()}
        coarse = {} if self._coarse is None else {"coarse": self._coarse.memory()}
        return super().memory() | own | _flat(kept | coarse)

    def recall(self, memory: dict[str, Any]) -> None:
        super().recall(memory)
        self._velocity, self._last_step = memory["velocity"].clone(), memory["last_step"].clone()
        self._count, self._locals, self._coarse = int(memory["count"]), {}, None
        for s in self._parts.mine():
            if kept := _part(memory, f"local.{s}"):
                local = self.function.local(self._parts, s, self.x)
                self._locals[s] = self._inverse_of(local, self.settings.local, self.settings.local_memory)
                self._locals[s].recall(kept)
        if kept := _part(memory, "coarse"):
            coarse = self.hierarchy.functions[1]
            self._coarse = self._inverse_of(coarse, self.settings.method, self.settings.memory, coarse.preconditioner())
            self._coarse.recall(kept)
            self._take_over()
            self.inverse.recall(_part(memory, "inverse"))


def _flat(nested: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {f"{name}.{key}": value for name, inner in nested.items() for key, value in inner.items()}


def _part(memory: dict[str, Any], name: str) -> dict[str, Any]:
    return {key.removeprefix(f"{name}."): value for key, value in memory.items() if key.startswith(f"{name}.")}


@dataclass(frozen=True)
class Correction:
    """Of one part: the step d, and the decrease of the local function."""

    d: Tensor
    decrease: float

    def without_step(self) -> Correction:
        """On a rank that has none of its unknowns."""
        return Correction(self.d[:0], self.decrease)


class Columns(SmoothFunction):
    """a -> f(x + C a), the columns of C scaled by what is known of their curvature; remembers the best point.

    A. Kopanicakova and others (arXiv 2601.08709) minimize over the corrections of the parts in this way.
    """

    def __init__(self, function: SmoothFunction, x: Tensor, f: float, g: Tensor) -> None:
        super().__init__(0, costs=function.costs, tally=function.tally)
        self.function, self.x, self.g0 = function, x, g
        self.rows: list[Tensor] = []
        self.best = (f, x, g)

    def add(self, column: Tensor, decrease: float) -> None:
        """A direction that goes down; along it, f falls by `decrease` to where it is 1; NaN where nobody knows."""
        slope = self.function.dot(self.g0, column)
        if slope > 0 and not math.isfinite(decrease):
            column, slope = -column, -slope
        if not slope < 0:
            return
        curvature = 2.0 * (-decrease - slope)
        if not (math.isfinite(curvature) and curvature > 0):
            curvature = -slope
        self.rows.append(column / math.sqrt(curvature))
        self.size = len(self.rows)

    def start(self) -> tuple[float, Tensor]:
        """Value and gradient at a = 0."""
        return self.best[0], self.function.products(self.rows, self.g0)

    def _value_and_gradient(self, a: Tensor) -> tuple[float, Tensor]:
        C = torch.stack(self.rows)
        x = self.x + a @ C
        f, g = self.function._value_and_gradient(x)
        if f < self.best[0]:
            self.best = (f, x, g)
        return f, self.function.products(C, g)
