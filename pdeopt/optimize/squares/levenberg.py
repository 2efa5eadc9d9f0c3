"""Levenberg-Marquardt with geodesic acceleration: f = |r|^2 by its linear models, damped."""

from __future__ import annotations

import math
import time
from dataclasses import astuple, replace
from typing import Any

import torch
from torch import Tensor

from pdeopt.core.errors import InputError
from pdeopt.core.monitor import DescentRecord, LeastSquaresRecord, Reason
from pdeopt.core.team import Team
from pdeopt.functions.smooth import SmoothFunction
from pdeopt.optimize.descent.minimizer import Minimizer, flattened, part_of
from pdeopt.optimize.parts.bounds import Bounds
from pdeopt.optimize.squares.dampedsteps import DampedSteps, LevenbergSettings, Trial
from pdeopt.optimize.squares.dampingsearch import FAIR, DampingSearch
from pdeopt.optimize.squares.linearized import Linearized
from pdeopt.optimize.squares.redrawing import Redrawing
from pdeopt.squares.residual import ResidualFunction
from pdeopt.squares.sharedrows import SharedRows

#: Iterations in a row without a step at which a run ends.
FAILURES = 3
#: A predicted decrease below this part of f, for each row, cannot be seen.
ROUNDING = 1e-15


class LevenbergMarquardt(Minimizer):
    """x <- x + p + a / 2 with (J'J + lam D) p = -J'r, the damped linear model of r, and a the acceleration along p.

    The geodesic acceleration, from one more residual,

        q = (2/h) ((r(x + h p) - r)/h - J p),    a = -(J'J + lam D)^-1 J'q,    h = 0.1,

    is the second-order term of the path of steps (M. K. Transtrum, J. P. Sethna, Improvements to the
    Levenberg-Marquardt algorithm for nonlinear least-squares minimization, arXiv:1201.5885, 2012); a step with
    2 |a| > 0.75 |p| in the norm of D is refused. Each iteration tries lam/4 first, where that has not just failed,
    again and again while the decrease is nearly the predicted one; else lam, 4 lam, 16 lam: J'J serves all of them. D
    is the identity times the mean of the diagonal of J'J, or that diagonal, its largest so far (J. J. More, Lecture
    Notes in Math. 630, 1978). With bounds, unknowns at a bound that f pushes against stay, and trial points are
    projected (C. Kanzow, N. Yamashita, M. Fukushima, J. Comput. Appl. Math. 172, 2004).

    For a network, J'J is the Gram matrix of its tangent space, and the natural gradient of the energy in it is the same
    step (J. Mueller, M. Zeinhofer, ICML 2023), by Woodbury's identity as in arXiv:2505.12149.

    With `resample_every` rows are drawn anew. f is then that of the present rows, and may rise where they change.

    Args:
        function: a `ResidualFunction`.
        bounds: on x; None for none.
        team: of ranks that share the rows of the function, and rows or columns of its Jacobian; all have the same x.

    Attributes:
        at: residual, Jacobian and linear model at x.
        search: for the damping.
        factorizations: since the start.
        outside: seconds of the processor in steps outside of the function's calls.

    Raises:
        InputError: a function that is no sum of squares, or bounds that do not fit.
    """

    Settings = LevenbergSettings
    Record = LeastSquaresRecord
    has_units = False
    function: ResidualFunction

    def __init__(
        self,
        function: SmoothFunction | None = None,
        *args: Any,
        bounds: Bounds | None = None,
        team: Team | None = None,
        **defaults: Any,
    ) -> None:
        self.bounds, self.team = bounds, team
        super().__init__(function, *args, **defaults)

    def adopt(self, function: SmoothFunction) -> None:
        if not isinstance(function, ResidualFunction):
            raise InputError("function of Levenberg-Marquardt", type(function).__name__, "a ResidualFunction")
        if self.bounds is not None and not self.bounds.lower.shape == self.bounds.upper.shape == (function.size,):
            raise InputError("bounds", f"shape {tuple(self.bounds.lower.shape)}", f"({function.size},)")
        if self.settings.rule == "radius" and self.settings.linear not in ("auto", "svd"):
            raise InputError("-lm_rule", f"radius, with -lm_linear {self.settings.linear}", "damping, or svd")
        if self.team is not None and self.team.size > 1:
            function = SharedRows(function, self.team)
        self.whole, self.function = function, function
        self._forget()
        self.is_monotone = not self.redrawing.is_on

    def start(self, x: Tensor, known: tuple[float, Tensor] | None = None) -> None:
        self._forget()
        self.factorizations, self._failed, self._why = 0, 0, Reason.ITERATING
        self._scale = torch.empty(0, dtype=torch.float64)
        self.radius = self.settings.damping
        x = x if self.bounds is None else self.bounds.nearest(x)
        self._set(self.redrawing.draw(x) if self.redrawing.is_on else self.whole, x)
        self.note_first()

    def _forget(self) -> None:
        """What no restart needs."""
        self.redrawing, self.search = Redrawing(self.whole, self.settings), DampingSearch(self.settings)
        linear = "svd" if self.settings.rule == "radius" else self.settings.linear
        self.at, self.outside, self._ending = Linearized(linear, self.settings), 0.0, Reason.ITERATING

    def _set(self, function: ResidualFunction, x: Tensor) -> None:
        """Go to this point, on these rows."""
        self.function, self.x = function, x
        self.at.set(function, x)
        self.f, self.g = self.at.f, self.at.g

    def optimality(self) -> float:
        """|f'| at x; with bounds |x - P(x - f')|, P the projection."""
        return float((self.g if self.bounds is None else self.bounds.stationarity(self.x, self.g)).norm())

    # -- one iteration -----------------------------------------------------------------------------------------

    def step(self) -> Reason:
        begin = time.process_time() - self.at.seconds
        try:
            if self.redrawing.is_due:
                old, rows = self.f, self.at.timed(lambda: self.redrawing.draw(self.x))
                self._set(rows, self.x)
                self.redrawing.compare(old, self.f)
            trial = self._search()
            self.redrawing.age += 1
            return self._stay(self.search.met) if trial is None else self._move(trial)
        finally:
            self.outside += time.process_time() - self.at.seconds - begin

    def _search(self) -> Trial | None:
        """The step to take."""
        steps = DampedSteps(self.at, self.settings, self.bounds, self._scale)
        best = self.search.best(steps)
        self._scale = steps.scale
        self.factorizations += sum(system.factorizations for system in steps.systems)
        multiplications = sum(system.multiplications for system in steps.systems)
        self.function.tally.work += self.function.costs.multiplication * multiplications
        return best

    def _move(self, trial: Trial) -> Reason:
        """Take the step; back again where there are no derivatives."""
        x, f, s = self.x, self.f, self.settings
        self._set(self.function, trial.x)
        if not self.at.is_finite:
            self._set(self.function, x)
            return self._stay([replace(trial, f=math.nan)])
        self.radius = trial.damping
        self._failed, self.note = 0, ""
        if s.ftol > 0.0 and f - self.f <= s.ftol * f and trial.ratio > FAIR:
            self._ending = Reason.CONVERGED_DECREASE
        if s.xtol > 0.0 and float((self.x - x).norm()) <= s.xtol * (s.xtol + float(x.norm())):
            self._ending = Reason.CONVERGED_STEP
        return Reason.ITERATING

    def _stay(self, met: list[Trial]) -> Reason:
        """Where no step was taken: go on with more damping, or with new rows; or why to stop.

        Args:
            met: trials that led somewhere.
        """
        self.note, redraws = "rejected", self.redrawing.is_on
        if redraws:
            self.redrawing.age = self.settings.resample_every
            self.search.begin_again()
        self.radius = self.search.damping
        promised = max((trial.predicted for trial in met), default=math.inf)
        if promised <= ROUNDING * self.function.rows * self.f and not redraws:
            return Reason(self.stop.stalled())
        is_blind = bool(met) and not any(math.isfinite(trial.f) for trial in met)
        if not self._failed:
            self._why = Reason.DIVERGED_NAN if is_blind else Reason.DIVERGED_STAGNATION
        self._failed += 1
        return self._why if self._failed >= FAILURES else Reason.ITERATING

    def test(self, record: Any) -> Reason:
        found = super().test(record)
        if found == Reason.ITERATING and 0 < self.stop.max_gradients <= record.jacobians:  # each has a gradient
            return Reason.WORK_DONE
        return self._ending if found == Reason.ITERATING else found

    # -- records and restarts --------------------------------------------------------------------------------------

    def record(self, iteration: int) -> DescentRecord:
        tally = self.spent()
        counts = int(tally.jacobians), int(tally.products), self.factorizations
        return LeastSquaresRecord(*(*astuple(super().record(iteration)), *counts))

    def unsolved(self) -> DescentRecord:
        return LeastSquaresRecord(*astuple(super().unsolved()))

    def memory(self) -> dict[str, Any]:
        numbers = {"factorizations": self.factorizations, "failed": self._failed, "why": int(self._why)}
        parts = {"search": self.search.memory(), "redrawing": self.redrawing.memory()}
        parts["sample"] = self.function.sample_memory() if self.redrawing.is_on else {}
        return super().memory() | numbers | {"scale": self._scale.clone()} | flattened(parts)

    def recall(self, memory: dict[str, Any]) -> None:
        super().recall(memory)
        self._forget()
        self.redrawing.recall(part_of(memory, "redrawing"))
        self.search.recall(part_of(memory, "search"))
        self.factorizations, self._failed = int(memory["factorizations"]), int(memory["failed"])
        self._scale, self._why = memory["scale"].clone(), Reason(int(memory["why"]))
        counted = self.function.tally.copy()
        self._set(self.whole.recalled(part_of(memory, "sample")) if self.redrawing.is_on else self.whole, self.x)
        self.function.tally.set(counted)  # it was counted in the run that wrote the memory
