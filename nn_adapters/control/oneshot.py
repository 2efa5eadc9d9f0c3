"""A network of dense layers whose cycles and steps converge together, in one shot.

A Gauss-Newton step takes a few cycles of MGRIT for the states, which begin at those of the last step, moved as the
conjugate gradients carried them along; a few for the adjoint, which begin at the last adjoint; and a few for each sweep
of its products. Nothing is solved before the weights are (S. Guenther, L. Ruthotto, J. B. Schroder, E. C. Cyr, N. R.
Gauger, Layer-parallel training of deep residual neural networks, SIMODS 2, 2020, with L-BFGS). For methods that
ask for values and gradients alone, as L-BFGS does, the cycles of a trial begin at states and adjoint of the one before.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nn_adapters.control.densenetwork import DenseNetwork, DensePoint
from nn_adapters.control.designcost import DesignCost
from nn_adapters.control.intervals import few_cycles
from pdeopt.control.problem import ControlProblem
from pdeopt.steps.mgrit import MgritSettings, points_among

#: States that miss their C-points by more than this share of their size are none: such a step is refused.
MOST_MISFIT = 0.1


class OneShotNetwork(DenseNetwork):
    """A `DenseNetwork` with eliminated states, whose sweeps take a few cycles, see `few_cycles`.

    Args:
        problem, loss, costs: as of a `DenseNetwork`.
        mgrit: cycles, coarsening and relaxation.
    """

    def __init__(self, problem: ControlProblem, loss: Any, costs: DesignCost, mgrit: MgritSettings) -> None:
        super().__init__(problem, loss, costs, False, few_cycles(mgrit))
        self.chain.exact, self.carries = False, True
        self._last: OneShotPoint | None = None

    def at(self, x: Tensor, state: Tensor | None = None) -> OneShotPoint:
        return OneShotPoint(self, x, state)

    def near(self, x: Tensor) -> OneShotPoint:
        last = self._last
        point = self.at(x) if last is None else OneShotPoint(self, x, None, last, last.points)
        if math.isfinite(point.value):  # a trial that went too far leaves no states to begin at
            self._last = point
        return point


class OneShotPoint(DensePoint):
    """A point whose states, and whose adjoint, are those of a few cycles from the point before.

    The first point has the states of its design. A step that is refused is tried again from the same design after
    further cycles, and all sweeps take a cycle more where that is refused, too. `state` is what a point was evaluated
    with: the cycles, the states, and the C-points at which its adjoint began.

    Args:
        network, x, state: as of a `DensePoint`.
        before: the point at whose states the layers were linearized; None for the first.
        guess: C-points to begin with.
        is_refined: whether its design is that of the point before.

    Attributes:
        misfit: of the C-points.
    """

    def __init__(
        self,
        network: DenseNetwork,
        x: Tensor,
        state: Tensor | None = None,
        before: DensePoint | None = None,
        guess: Tensor | None = None,
        is_refined: bool = False,
    ) -> None:
        self.is_refined = is_refined
        self.misfit, self._near = 0.0, None if before is None else (before.linear, guess)
        if before is not None:
            self.adjoint = before.linear.left
        super().__init__(network, x, state)
        self._near = None
        if not self.misfit < MOST_MISFIT:
            self.value = math.inf

    def _solve(self, b: Tensor, state: Tensor | None) -> Tensor:
        chain, n = self.network.chain, len(self.W)
        if state is not None:
            *cycles, refined = (int(number) for number in state[:3])
            self.is_refined = bool(refined)
            for solver, count in zip(chain.mgrit, cycles):
                solver.cycles = count
            rows = state[3:].view(-1, *self.first.shape)
            # In memory of their own, as in the run that wrote them: BLAS rounds by how its operands are aligned.
            self.U, self.adjoint = rows[: n + 1].clone(), rows[n + 1 :].clone() if len(rows) > n + 1 else None
        elif self._near is None:
            self.U, _ = chain.states(self.first, self.W, b)
            chain.took(chain.grid.num_steps)
        else:
            linear, points = self._near
            assert points is not None
            self.U, self.misfit = chain.shoot(self.first, self.W, b, linear, points)
        self.V = chain.values(self.U[:-1], self.W, b)
        how = torch.tensor([*(solver.cycles for solver in chain.mgrit), self.is_refined], dtype=self.U.dtype)
        parts = [how, self.U] if self.adjoint is None else [how, self.U, self.adjoint]
        self.state = torch.cat([part.reshape(-1) for part in parts])
        return self.U[-1]

    @property
    def points(self) -> Tensor:
        """The C-points that the last run has found."""
        chain = self.network.chain
        return points_among(torch.addcmul(self.U[:-1], self.V, chain.dt), chain.mgrit[0])

    def ahead(self, d: Tensor, state: Tensor) -> DensePoint:
        if not len(state):  # the curvature had some of the samples only
            state = self.tangents(d)
        moved = points_among(state.view(-1, *self.first.shape), self.network.chain.mgrit[0])
        return OneShotPoint(self.network, self.x + d, None, self, self.points + moved)

    def refined(self) -> DensePoint:
        if self.is_refined:
            for solver in self.network.chain.mgrit:
                solver.cycles += 1
        return OneShotPoint(self.network, self.x, None, self, self.points, is_refined=True)
