"""Damped steps from one point: within bounds, with geodesic acceleration, and how good they are."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pdeopt.core.settings import setting
from pdeopt.optimize.parts.bounds import Bounds
from pdeopt.optimize.parts.trustregion import reduction_ratio
from pdeopt.optimize.squares.damping import (
    FEW,
    LINEAR_SOLVERS,
    DampedSystem,
    Factored,
    Normal,
    Products,
    Singular,
    Woodbury,
)
from pdeopt.optimize.squares.linearized import Linearized
from pdeopt.optimize.squares.redrawing import RedrawSettings
from pdeopt.optimize.squares.schwarz import Schwarz, SchwarzSettings

#: The part of a step at which residuals are looked at for the second derivative along it.
PROBE = 0.1
#: Times that the unknowns which a bound stops are fixed there, and the others follow.
FIXINGS = 2
#: Ways to solve with a matrix.
FACTORED: dict[str, type[Factored]] = {"normal": Normal, "woodbury": Woodbury}
#: Unknowns from which single precision is worth its rounding errors.
MANY = 256


@dataclass(frozen=True)
class LevenbergSettings(RedrawSettings, SchwarzSettings, prefix="lm_"):
    """Levenberg-Marquardt."""

    linear: str = setting(
        "auto",
        f"how damped systems are solved; auto: svd up to {FEW} unknowns, woodbury for fewer rows than unknowns, cg "
        "where no matrix fits, else normal",
        choices=LINEAR_SOLVERS,
    )
    rule: str = setting(
        "damping",
        "damping: lam/4, lam, 4 lam, ... are tried, and the best is taken, where r costs less than J; radius: lam "
        "follows from a trust radius, by singular values",
        choices=("damping", "radius"),
    )
    radius: float = setting(1.0, "first trust radius, in lengths of x", above=0)
    damping: float = setting(1.0, "first damping, in means of the diagonal of J'J", above=0)
    single: float = setting(
        1e-3,
        f"damping from which on J'J and its factor are of single precision, for {MANY} unknowns or more; 0: never",
        at_least=0,
    )
    scaling: str = setting(
        "identity",
        "D of the damping: identity, for the rule of damping times the mean of the diagonal of J'J, or that diagonal, "
        "its largest so far; with cg always identity",
        choices=("identity", "diagonal"),
    )
    geodesic: bool = setting(True, "accelerate along the geodesic: the second derivative along each step")
    geodesic_limit: float = setting(0.75, "acceleration over step above which a step is refused", above=0)
    ftol: float = setting(0.0, "relative decrease within which a run has converged; 0: none", at_least=0)
    xtol: float = setting(0.0, "relative step within which a run has converged; 0: none", at_least=0)


@dataclass(frozen=True)
class Trial:
    """Where a step of some damping leads: f there, the decrease that was predicted, the part of it that came, |p|_D."""

    damping: float
    x: Tensor
    f: float
    predicted: float
    ratio: float
    length: float


class DampedSteps:
    """Steps p + a / 2 of any damping from the point of a linear model.

    Args:
        at: the model.
        settings: `LevenbergSettings`.
        bounds: on x; None for none.
        scale: the largest diagonal of J'J so far, (n,); empty where there is none.

    Attributes:
        scale: the same, with that of J.
        systems: that were set up.
    """

    def __init__(self, at: Linearized, settings: LevenbergSettings, bounds: Bounds | None, scale: Tensor) -> None:
        self.at, self.settings, self.bounds, self.scale = at, settings, bounds, scale
        if settings.scaling == "diagonal" and at.J is not None:
            diagonal = at.J.diagonal()
            self.scale = torch.maximum(scale, diagonal) if len(scale) else diagonal
            self._D = self.scale.clamp(min=1e-12 * float(self.scale.max()) or 1.0)
        else:
            unit = 1.0 if settings.rule == "radius" else at.mean_diagonal()
            self._D = unit * torch.ones_like(at.x)
        self.systems = list[DampedSystem]()
        self._schwarz: Schwarz | None = None
        self._whole = self._system(None if bounds is None else bounds.free(at.x, at.g))

    def length(self, x: Tensor) -> float:
        """|x|_D."""
        return self._whole.length(x)

    def damping_for(self, radius: float) -> float:
        """That of the step of this length, by singular values; 0 where the undamped step is no longer."""
        assert isinstance(self._whole, Singular)
        return self._whole.damping_for(radius, self.at.r)

    def trial(self, damping: float) -> Trial | None:
        """The step of this damping; None where there is none, or where it is refused for its acceleration."""
        at, s = self.at, self.settings
        p, system = self._damped(damping)
        if p is None:
            return None
        Jp = at.forward(p)
        step = p
        if s.geodesic:
            q = (2.0 / PROBE) * ((at.residual(at.x + PROBE * p) - at.r) / PROBE - Jp)
            a = system.solve(damping, q) if bool(q.isfinite().all()) else None
            if a is None or at.agreed(2.0 * system.length(a) - s.geodesic_limit * system.length(p))[0] > 0.0:
                return None
            step = p + 0.5 * a
        x = self._inside(at.x + step)
        r = at.residual(x)
        f, predicted, length = at.agreed(float(r @ r), -float((2.0 * at.r + Jp) @ Jp), system.length(p))
        return Trial(damping, x, f, predicted, reduction_ratio(at.f, f, predicted), length)

    def _damped(self, damping: float) -> tuple[Tensor | None, DampedSystem]:
        """The damped step p within the bounds, and the system of the unknowns that no bound holds.

        Unknowns that a step takes beyond their bounds go to these, and the others follow; what is still beyond is
        projected.
        """
        at, system = self.at, self._whole
        p = system.solve(damping, at.r)
        if self.bounds is None or p is None:
            return p, system
        free, fixed = self.bounds.free(at.x, at.g), torch.zeros_like(at.x)
        for _ in range(FIXINGS):
            there = self._inside(at.x + p)
            hit = there != at.x + p
            if not bool(hit.any()):
                break
            free, fixed = free * ~hit, torch.where(hit, there - at.x, fixed)
            system = self._system(free)
            others = system.solve(damping, at.r + at.forward(fixed))
            if others is None:
                return None, system
            p = fixed + free * others
        return self._inside(at.x + p) - at.x, system

    def _system(self, free: Tensor | None) -> DampedSystem:
        """Of the damped steps of the unknowns that are free: columns of the others are zero."""
        at, s = self.at, self.settings
        if at.J is not None:
            J = at.J if free is None else at.J.masked(free)
            single = s.single if s.single and len(at.x) >= MANY else math.inf
            is_singular = at.kind == "svd"
            self.systems.append(Singular(J.matrix, self._D) if is_singular else FACTORED[at.kind](J, self._D, single))
        else:
            self.systems.append(self._products(torch.ones_like(at.x) if free is None else free))
        return self.systems[-1]

    def _products(self, mask: Tensor) -> Products:
        """By products, with zeros for the unknowns that are not free."""
        at, s = self.at, self.settings
        if not self.systems:
            self._schwarz = at.schwarz(float(self._D[0]))
        J = at.kept
        if J is None:
            forward, backward = (lambda d: at.forward(d * mask)), (lambda w: at.backward(w) * mask)
            return Products(forward, backward, self._D, s.cg_rtol, s.cg_it, self._schwarz)
        own = mask[J.columns.own]
        forward, backward = (lambda d: J.forward_own(d * own)), (lambda w: J.backward_own(w) * own)
        return Products(forward, backward, self._D, s.cg_rtol, s.cg_it, self._schwarz, J.columns)

    def _inside(self, x: Tensor) -> Tensor:
        return x if self.bounds is None else self.bounds.nearest(x)
