"""The control problem of a window of steps between two couplings, solved exactly."""

from __future__ import annotations

import math
from contextlib import suppress

import torch
from torch import Tensor

from pdeopt.control.problem import ControlProblem
from pdeopt.core.arrays import assign
from pdeopt.core.errors import SolveFailure
from pdeopt.optimize.splitting.splitconstraint import SplitWork
from pdeopt.optimize.splitting.windowkkt import FactorPool, Factors, WindowKKT
from pdeopt.optimize.splitting.windowpoint import Pulls, WindowPoint

#: A block is solved for where its reduced gradient has fallen by the first, or to the second of its largest so far.
EXACT_RTOL, ROUNDED_RTOL = 1e-2, 1e-12

#: Old factors are kept while each of their steps shrinks the reduced gradient by this.
FAST_CONTRACTION = 0.1

#: Newton steps of a block, trials of a line search, and the share of the predicted decrease that it asks for.
MAX_STEPS, MAX_TRIALS, ARMIJO = 100, 30, 1e-4

#: What a window remembers.
POINT = ("v", "u", "z", "mu")

#: Rounding of the objective, relative to it, that counts as no rise.
ROUNDING = 1e-13


class Window(WindowPoint):
    """The minimum of a window's block by Newton's method, see `WindowPoint` for the function and its unknowns.

    The states follow from the start and the controls at every step, so that each is one of descent. The matrix is the
    KKT matrix of the window at an earlier point as long as its steps contract: for a linear equation with a quadratic
    objective, one matrix for all iterations. Not collective.

    Args:
        problem, begin, end, work: see `WindowPoint`.
        pool: factors that windows share.

    Attributes:
        size: dual norm of the reduced gradient where `minimize` ended.
    """

    def __init__(self, problem: ControlProblem, begin: int, end: int, pool: FactorPool, work: SplitWork) -> None:
        super().__init__(problem, begin, end, work)
        self.pool, self._operator = pool, WindowKKT(self.metric, self.starts, self.ends)
        self._key: tuple[bytes, Factors] | None = None
        self._factored_at: tuple[float, Tensor, Tensor, Tensor, Tensor] | None = None
        self.size = self._largest = 0.0
        self._is_settled = False

    def measure(self, pulls: Pulls, beta: float) -> None:
        """Make the first states those of the start and the controls, and measure the first reduced gradient."""
        with suppress(SolveFailure):  # the first block that is solved for will say so
            self.move(self.v, self.z, self.u)
            self._is_settled = True
            self.size = self.norm(*self.gradient(pulls, beta))

    def minimize(self, pulls: Pulls, beta: float) -> None:
        """Make v, z and u the minimum.

        Raises:
            SolveFailure: numbers that are not finite, or no descent; the window may then stand anywhere.
        """
        try:
            if not self._is_settled:
                self.move(self.v, self.z, self.u)
                self._is_settled = True
            self._descend(pulls, beta)
        except SolveFailure as failure:
            where = f"window of steps {self.begin + 1} to {self.end}: {failure.what}"
            raise SolveFailure(where, failure.remedy) from None

    def _descend(self, pulls: Pulls, beta: float) -> None:
        gradient = self.gradient(pulls, beta)
        first = size = self.norm(*gradient)
        self._largest = max(self._largest, size)
        way = "old"
        for _ in range(MAX_STEPS):
            if not math.isfinite(size):
                raise SolveFailure("a gradient that is not finite", "see the residual and objective there")
            if size <= max(EXACT_RTOL * first, ROUNDED_RTOL * self._largest):
                self.size = size
                return
            if self._factored_at is None or self._factored_at[0] != beta:
                self._factor(beta)
                way = "new"
            if self._step(gradient, pulls, beta):
                gradient, last = self.gradient(pulls, beta), size
                size = self.norm(*gradient)
                if not size <= FAST_CONTRACTION * last or way == "convex":
                    self._factored_at = None
                way = "old"
            elif way == "convex":
                break
            else:
                way = "new" if way == "old" else "convex"
                self._factor(beta, is_convex=way == "convex")
        self._finish(size)

    def _finish(self, size: float) -> None:
        """No step descends any more: by rounding, or for good."""
        if not size <= 1e-6 * self._largest:
            raise SolveFailure("Newton's method finds no descent", "raise -admm_windows, or start closer")
        self.size = size

    def _factor(self, beta: float, is_convex: bool = False) -> None:
        """The KKT matrix here; a convex one leaves the constraint's curvature out."""
        lam = self.problem.create_multiplier()
        assign(lam, self.mu)
        self._operator.set_point(self.lin, None if is_convex else lam)
        old, (key, factors, is_new) = self._key, self.pool.take(self._operator, beta)
        self._key, self._factored_at = (key, factors), (beta, self.v, self.u, self.z, self.mu)
        self.work.solves += factors.flops if is_new else 0.0
        if old is not None:
            self.pool.give_back(old[0])

    def _step(self, gradient: tuple[Tensor, Tensor], pulls: Pulls, beta: float) -> bool:
        """Go along Newton's direction until the value falls by its share; False where it does not, or goes up."""
        assert self._key is not None
        g_v, g_z = gradient
        nothing = torch.zeros(self.u.numel(), dtype=torch.float64)
        right = torch.cat([nothing, -g_z.reshape(-1), nothing, -g_v if self.starts else nothing[:0]])
        d = self._key[1].solve(right)
        self.work.solves += 2 * self._key[1].entries
        du, dz, _, dv = d.split([self.u.numel(), self.z.numel(), self.u.numel(), len(g_v) if self.starts else 0])
        du, dz, dv = du.reshape(self.u.shape), dz.reshape(self.z.shape), dv if self.starts else torch.zeros_like(g_v)
        slope = float((g_z * dz).sum() + torch.dot(g_v, dv))
        if not slope < 0:
            return False
        start, here = self.value(pulls, beta), self.point()
        v, u, z, _, lin = here
        for trial in range(MAX_TRIALS):
            t = 0.5**trial
            with suppress(SolveFailure):
                self.move(v + t * dv, z + t * dz, u + t * du, lin)
                if self.value(pulls, beta) <= start + ARMIJO * t * slope + ROUNDING * abs(start):
                    return True
        self.back(here)
        return False

    # -- restarts --------------------------------------------------------------------------------------------

    def memory(self) -> dict[str, Tensor]:
        """What a restart needs: the point, and that at which the matrix was factored."""
        kept = {name: getattr(self, name) for name in POINT}
        kept |= {
            name: torch.tensor(x, dtype=torch.float64) for name, x in (("size", self.size), ("largest", self._largest))
        }
        beta, *old = self._factored_at or (0.0, self.v, self.u, self.z, self.mu)
        kept["factored"] = torch.tensor(beta, dtype=torch.float64)
        return kept | {f"factored_{name}": each for name, each in zip(POINT, old)}

    def recall(self, memory: dict[str, Tensor]) -> None:
        """Go on from what `memory` gave."""
        self.size, self._largest = float(memory["size"]), float(memory["largest"])
        if float(memory["factored"]):
            self.back((*(memory[f"factored_{name}"] for name in POINT), None))
            self._factor(float(memory["factored"]))
        self.back((*(memory[name] for name in POINT), None))
        self._is_settled = True

    def destroy(self) -> None:
        """Free matrix and factors."""
        if self._key is not None:
            self.pool.give_back(self._key[0])
            self._key = self._factored_at = None
        self._operator.free()
