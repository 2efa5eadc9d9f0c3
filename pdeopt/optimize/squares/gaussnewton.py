"""Damped Gauss-Newton steps by a few conjugate gradients: f = l(y(x)) with many unknowns and a convex l.

    (G + mu) d = -f',   G = y' l'' y',

with an approximation of G + mu as the preconditioner, which is made anew every few steps. A few iterations of
conjugate gradients are a step: as many as the gradient's decrease deserves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pdeopt.control.linearization import Eliminated
from pdeopt.core.errors import InputError
from pdeopt.core.monitor import Reason
from pdeopt.core.settings import Settings, setting
from pdeopt.functions.curved import EMPTY, Curvature, CurvatureFactors, CurvedFunction, CurvedPoint, NoFactors
from pdeopt.functions.smooth import SmoothFunction
from pdeopt.optimize.descent.minimizer import Minimizer, flattened, part_of
from pdeopt.precond.carrying import carrying_cg


@dataclass(frozen=True)
class GaussNewtonSettings(Settings, prefix="gn_"):
    """Damped Gauss-Newton steps by conjugate gradients."""

    damping: float = setting(1e-2, "first damping mu", above=0)
    least: float = setting(1e-9, "damping at least", above=0)
    cg_max_it: int = setting(5, "conjugate gradients of a step at most", at_least=1)
    cg_rtol: float = setting(0.1, "relative tolerance of the first steps; later sqrt(|g| / |g_0|)", above=0, at_most=1)
    cg_least_rtol: float = setting(1e-3, "relative tolerance at least", above=0, at_most=1)
    precond: str = setting("factors", "preconditioner: factors of the curvature, or none", choices=("factors", "none"))
    factors_every: int = setting(5, "steps between two preconditioners", at_least=1)
    samples: int = setting(
        0, "samples of the curvature, which doubles after two poor ratios; 0 for all of them", at_least=0
    )
    seed: int = setting(0, "seed of the samples of the curvature", at_least=0)


#: Ratios of the decrease and that of the model: above these the damping is divided, below the last it is multiplied.
RATIOS, DIVIDED, POOR, MULTIPLIED, REFUSED = (0.95, 0.75), (3.0, 2.0), 0.25, 3.0, 4.0

#: A step must gain this part of what its model promises.
ACCEPT = 1e-4

#: Poor ratios in a row after which the curvature gets twice as many samples, and the most damping where it has some of
#: them: there a poor ratio tells of the samples, not of the step.
PATIENCE, MOST_SAMPLED = 2, 0.1

#: Steps in a row that are refused before a run ends.
FAILURES = 12


class GaussNewton(Minimizer):
    """x <- x + d with (G + mu) d = -f'(x) to a tolerance, by at most a few conjugate gradients.

    The tolerance is max(1e-3, min(0.1, sqrt(|g| / |g_0|))) in the norm of the preconditioner, at most 5 iterations; mu
    falls where the decrease is as its model says, and grows where it is not (D. W. Marquardt, SIAM J. Appl. Math. 11,
    1963; for networks J. Martens, ICML 2010, who takes more iterations: with Kronecker factors as preconditioner a few
    are enough). Where states are unknowns, conjugate gradients carry them along, and f is the objective of the states
    that solve the linearized equations: a step asks for linear sweeps alone.

    With `samples` the gradient is that of all samples, and the curvature, with its preconditioner, that of some, drawn
    anew with every preconditioner (R. H. Byrd, G. M. Chin, W. Neveitt, J. Nocedal, SIAM J. Optim. 21, 2011).

    Args:
        function: a `CurvedFunction`.

    Attributes:
        at: the present point.
        damping: mu.
        iterations: conjugate gradients of the last step.
        sampled: samples of the curvature; 0 for all.

    Raises:
        InputError: a function without a Gauss-Newton matrix.

    Example:
        >>> result = GaussNewton(function, target=1e-2).minimize(x)
    """

    Settings = GaussNewtonSettings
    has_units = False
    is_monotone = True
    function: CurvedFunction
    at: CurvedPoint

    def adopt(self, function: SmoothFunction) -> None:
        if not isinstance(function, CurvedFunction):
            legal = "a CurvedFunction, as that of a network or of a control problem"
            raise InputError("function of Gauss-Newton", type(function).__name__, legal)
        self.function = function

    def start(self, x: Tensor, known: tuple[float, Tensor] | None = None) -> None:
        s, most = self.settings, self.function.samples
        self.damping, self.iterations, self._age, self._failed, self._poor = s.damping, 0, 0, 0, 0
        self.sampled = s.samples if s.samples < most else 0
        self.factors: CurvatureFactors = NoFactors()
        self.rows: Tensor | None = None
        self.generator = torch.Generator().manual_seed(s.seed)
        self._go(self.function.at(x))
        self._first_norm = self.function.norm(self.g)
        self.note_first()

    def _go(self, point: CurvedPoint) -> None:
        self.at, self.x, self.f, self.g, self.radius = point, point.x, point.value, point.gradient, self.damping
        self._curvature: Curvature | None = None

    # -- one iteration -----------------------------------------------------------------------------------------

    def step(self) -> Reason:
        if self._age % self.settings.factors_every == 0:
            self._renew()
        self._age += 1
        if self._curvature is None:
            self._curvature = self.at.curvature(self.rows)
        found = self._direction(self._curvature)
        if found is None:
            return Reason(self.stop.stalled())
        d, state, promised = found
        trial = self.at.ahead(d, state)
        gained = self.f - trial.value
        ratio = gained / promised if promised > 0.0 and math.isfinite(gained) else -math.inf
        is_taken = ratio > ACCEPT and bool(self.function.sum((~trial.gradient.isfinite()).sum().double()) == 0)
        self._adapt(ratio, is_taken)
        self.note = f"{self.iterations} CG" if is_taken else "rejected"
        if is_taken:
            self._failed = 0
            self._go(trial)
            return Reason.ITERATING
        better = self.at.refined()
        if better is not self.at:
            self._go(better)
        self.radius, self._failed = self.damping, self._failed + 1
        if self._failed < FAILURES:
            return Reason.ITERATING
        return Reason.DIVERGED_NAN if not math.isfinite(trial.value) else Reason(self.stop.stalled())

    def _renew(self) -> None:
        """Draw samples, and make the preconditioner of the curvature here."""
        if self.sampled:
            order = torch.randperm(self.function.samples, generator=self.generator)
            self.rows = order[: self.sampled].sort().values
        else:
            self.rows = None
        self._curvature = self.at.curvature(self.rows)
        if self.settings.precond == "factors":
            self.factors = self._curvature.factors()

    def _direction(self, curvature: Curvature) -> tuple[Tensor, Tensor, float] | None:
        """d, the way of the states, and the decrease that the damped model promises; None at a zero."""
        size, s = self.function.norm(self.g), self.settings
        rtol = max(s.cg_least_rtol, min(s.cg_rtol, math.sqrt(size / self._first_norm))) if size > 0.0 else 0.0
        if rtol == 0.0:
            return None
        matrix = DampedCurvature(self.function, curvature, self.damping)
        sizes: list[float] = []

        def stop(iteration: int, square: float) -> int:
            sizes.append(square)
            return int(not square > rtol**2 * sizes[0]) or 2 * int(iteration == s.cg_max_it)

        d, carried, _ = carrying_cg(matrix, self.factors.inverse(self.damping), -self.g, stop)
        self.iterations = len(sizes) - 1
        if carried is None:
            return None
        slope, rest = self.function.products([self.g, carried.rest], d).tolist()
        return d, carried.state, 0.5 * (rest - slope)  # of f + g.d + d.(G + mu)d / 2

    def _adapt(self, ratio: float, is_taken: bool) -> None:
        """The damping of the next step, and the samples of its curvature."""
        if ratio > RATIOS[0]:
            self.damping /= DIVIDED[0]
        elif ratio > RATIOS[1]:
            self.damping /= DIVIDED[1]
        elif not is_taken:
            self.damping *= REFUSED
        elif ratio < POOR:
            self.damping *= MULTIPLIED
        self.damping = max(self.damping, self.settings.least)
        if not self.sampled:
            return
        self.damping = min(self.damping, max(MOST_SAMPLED, self.settings.damping))
        self._poor = self._poor + 1 if ratio < POOR else 0
        if self._poor == PATIENCE:
            self.sampled, self._poor, self._age = 2 * self.sampled, 0, 0
            if self.sampled >= self.function.samples:
                self.sampled = 0

    # -- restarts ----------------------------------------------------------------------------------------------

    def memory(self) -> dict[str, Any]:
        numbers = {
            **{"damping": self.damping, "age": self._age, "failed": self._failed, "poor": self._poor},
            **{"sampled": self.sampled, "first_norm": self._first_norm, "iterations": self.iterations},
        }
        rows = {} if self.rows is None else {"rows": self.rows}
        parts = flattened({"factors": self.factors.memory()})
        state = {"state": self.at.state.clone(), "random": self.generator.get_state()}
        return super().memory() | numbers | rows | state | parts

    def recall(self, memory: dict[str, Any]) -> None:
        super().recall(memory)
        self.damping, self._first_norm = float(memory["damping"]), float(memory["first_norm"])
        for name in ("age", "failed", "poor"):
            setattr(self, f"_{name}", int(memory[name]))
        self.sampled, self.iterations = int(memory["sampled"]), int(memory["iterations"])
        self.rows = memory["rows"].clone() if "rows" in memory else None
        self.generator = torch.Generator()
        self.generator.set_state(memory["random"])
        self.factors = self.function.recalled(part_of(memory, "factors"))
        counted, radius = self.function.tally.copy(), self.radius
        self._go(self.function.at(self.x, memory["state"] if len(memory["state"]) else None))
        self.radius = radius
        self.function.tally.set(counted)  # it was counted in the run that wrote the memory


class DampedCurvature:
    """G + mu as `carrying_cg` multiplies by it.

    Args:
        function: whose inner products.
        curvature: G.
        damping: mu.

    Attributes:
        curvature: d.(G + mu)d of the last product.
    """

    def __init__(self, function: SmoothFunction, curvature: Curvature, damping: float) -> None:
        self.function, self._matrix, self.damping, self.curvature = function, curvature, damping, 0.0

    def product(self, d: Tensor) -> Eliminated:
        """States along d, and -(G + mu) d."""
        image, state = self._matrix.product(d)
        rest = torch.add(image, d, alpha=self.damping).neg_()
        self.curvature = -self.function.dot(d, rest)
        return Eliminated(state, EMPTY, rest)

    def sum(self, own: Tensor) -> Tensor:
        """Over the ranks."""
        return self.function.sum(own)
