"""Optimal control of Poisson's equation -Lap u = z on the unit square, u = 0 on its boundary: the problem without time.

P1 elements by scikit-fem, all L2 products by the vertices (lumped), so that bounds and sparsity hold node by node.
`-lower` and `-upper` bound the control, `-beta` prices its L1 norm, which makes it zero where it is of little use.

With `-space_ranks k`, k ranks share the unknowns.

    python -m problems.poisson -n 64 -target waves -alpha 1e-5 -beta 1e-3 -lower -30 -upper 30 -plot poisson.png
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
import skfem
import torch
from petsc4py import PETSc
from torch import Tensor

import pdeopt as po
from pdeopt.control.objective import Rows
from pdeopt.core import sections
from pdeopt.core.arrays import Array
from pdeopt.steps.innerproduct import InnerProduct
from problems.heat import Space
from problems.shared import case
from problems.shared.command_line import command_line, start
from problems.shared.fields import Fields, Readable, StepField, gather
from problems.shared.pictures import Panel


@dataclass(frozen=True)
class PoissonSettings(po.Settings):
    """The Poisson problem."""

    n: int = po.setting(64, "elements along a side", at_least=2)
    alpha: float = po.setting(1e-4, "control weight, of |z|^2 / 2", above=0)
    beta: float = po.setting(0.0, "weight of the L1 norm of the control", at_least=0)
    target: str = po.setting(
        "sine",
        "sin(pi x) sin(pi y), whose optimum is known, or sin(2 pi x) sin(2 pi y) exp(2 x) / 6",
        choices=("sine", "waves"),
    )
    space_ranks: int = po.setting(1, "ranks that share the unknowns: all there are", at_least=1)


class L1Cost(po.Objective):
    """beta sum_i D_i (z+_i + z-_i) for controls [z+ | z-] >= 0: beta |z|_1 of z = z+ - z-.

    Args:
        weights: beta [D | D] of the controls of this rank, (m,).
    """

    is_convex = is_quadratic = adds_up = True

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights

    def value(self, u: Tensor, z: Tensor, steps: po.Steps) -> Tensor:
        return z @ self.weights

    def gradient(self, u: Tensor, z: Tensor, steps: po.Steps) -> Rows:
        return torch.zeros_like(u), self.weights.expand_as(z), torch.zeros_like(steps.p)

    def hvp(self, u: Tensor, z: Tensor, steps: po.Steps, du: Tensor, dz: Tensor, dp: Tensor) -> Rows:
        return torch.zeros_like(du), torch.zeros_like(dz), torch.zeros_like(dp)

    def hessian_sparsity(self, n: int, m: int, steps: po.Steps) -> po.Sparsity:
        return po.Sparsity.empty(n + m, n + m)

    def hessian_blocks(self, u: Tensor, z: Tensor, steps: po.Steps) -> tuple[InnerProduct, InnerProduct]:
        return InnerProduct.zero(u.shape[1], len(steps)), InnerProduct.zero(z.shape[1], len(steps))


class PoissonCase(Readable):
    """min |u - d|^2 / 2 + alpha |z|^2 / 2 + beta |z|_1 subject to A u = D z, in the lumped norms of D.

    With beta > 0 the control is split, z = z+ - z-, both >= 0. One of them is zero at each node of the optimum, so that
    |z+|^2 + |z-|^2 = |z|^2 and what is left is smooth, with bounds.

    Args:
        settings: the parameters.
        comm: a communicator; default PETSc's.

    Attributes:
        own, own_controls: numbers of the states and the controls of this rank.

    Raises:
        InputError: parameters that are not legal, or another number of ranks than `space_ranks`.
    """

    name = "poisson"

    def __init__(self, settings: PoissonSettings, comm: Any = None) -> None:
        po.check(settings)
        case.require_room({"-n": settings.n}, 1, (5 if settings.beta else 3) * settings.n**2, comm)
        self.settings, self.parameters = settings, asdict(settings)
        self.parameters.pop("space_ranks")  # a restart may have another number of ranks
        x = np.linspace(0.0, 1.0, settings.n + 1)
        self.space = Space(skfem.MeshTri.init_tensor(x, x))
        self.lumped = self.space.load(lambda x, y: np.ones_like(x))  # D, the integrals of the basis functions
        self.problem = self._problem(comm)

    def _problem(self, comm: Any) -> po.ControlProblem:
        D, settings = sp.diags(self.lumped, format="csr"), self.settings
        B, Q = (sp.hstack([D, -D]), sp.block_diag([D, D])) if settings.beta else (D, D)
        A_, B_ = po.StepMatrix.constant(self.space.A), po.StepMatrix.constant(B)
        grid = po.SingleNode(comm, settings.space_ranks)
        constraint: po.TimeDependentConstraint = po.StationaryConstraint(
            lambda u, z: A_(u) - B_(z), *B.shape, pattern=(self.space.A, B), state_mass=D, control_mass=Q
        )
        self.own, self.own_controls = (np.arange(size) for size in B.shape)
        if settings.space_ranks > 1:
            constraint = spread = po.SpreadConstraint(constraint, grid, is_affine=True)
            self.own, self.own_controls = spread.own, spread.own_controls
        objective = po.Tracking(self.target[self.own], constraint.state_mass)
        objective += po.ControlCost(settings.alpha, constraint.control_mass)
        if settings.beta:
            weights = settings.beta * np.tile(self.lumped, 2)[self.own_controls]
            objective += L1Cost(torch.from_numpy(weights))
        return po.ControlProblem(constraint, objective, grid)

    @property
    def target(self) -> Array:
        """d at the free nodes, (n,)."""
        x, y = self.space.points[:, self.space.free]
        if self.settings.target == "sine":
            return np.asarray(np.sin(np.pi * x) * np.sin(np.pi * y))
        return np.asarray(np.sin(2 * np.pi * x) * np.sin(2 * np.pi * y) * np.exp(2 * x) / 6)

    @property
    def eigenvalue(self) -> float:
        """lam with A d = lam D d for the sine: 2 pi^2 up to O(1/n^2)."""
        n = self.settings.n
        return 8.0 * n**2 * float(np.sin(np.pi / (2 * n))) ** 2

    def optimum(self) -> tuple[float, float]:
        """J and the factor c of the optimal control c d for the sine, without bounds and L1 cost.

        u = c d / lam, and |d|^2 = 1/4: c = lam / (1 + alpha lam^2), J = alpha lam^2 / (1 + alpha lam^2) / 8.
        """
        price = self.settings.alpha * self.eigenvalue**2
        return price / (1.0 + price) / 8.0, self.eigenvalue / (1.0 + price)

    def bounds(self, lower: float | None, upper: float | None) -> tuple[Any, Any]:
        """Those of the design for bounds on z: of z itself, or of [z+ | z-]."""
        if not self.settings.beta:
            return lower, upper
        low, high = (-np.inf if lower is None else lower), (np.inf if upper is None else upper)
        if low > high:
            raise po.InputError("-lower, -upper", f"{low:g} > {high:g}", "lower <= upper")
        ones = np.ones(len(self.lumped))
        least, most = ((max(low, 0.0), max(-high, 0.0)), (max(high, 0.0), max(-low, 0.0)))
        return tuple(np.concatenate([plus * ones, minus * ones])[self.own_controls] for plus, minus in (least, most))

    def control(self, result: po.Result) -> Tensor | None:
        """z at the free nodes, (n,), on rank 0; None elsewhere. Collective."""
        parts = gather(self.problem, self.problem.unpack(result)[1].reshape(1, -1), "control")
        return None if parts is None else self._signed(parts[0])

    def _signed(self, design: Tensor) -> Tensor:
        """z of the design, which is z itself or [z+ | z-]."""
        z = design.reshape(-1, len(self.lumped))
        return z[0] - z[1] if self.settings.beta else z[0]

    def fields(self, result: po.Result) -> Fields:
        """Over all nodes: target, state, control and multiplier; beside them x, y, and the nodes of the triangles."""
        problem, space = self.problem, self.space
        u, z, _ = problem.unpack(result)
        lam, _, _ = problem.fields(problem.join(result.multiplier, result.design))

        def whole(rows: Tensor, t: Tensor) -> Array:
            return space.on_all_nodes(rows)[0]  # its one step is none to a reader

        return {
            "x": space.points[0],
            "y": space.points[1],
            "cells": space.cells,
            "target": whole(torch.from_numpy(self.target)[None], torch.zeros(1)),
            "state": StepField(u, "state", whole),
            "control": StepField(z.reshape(1, -1), "control", lambda rows, t: whole(self._signed(rows[0])[None], t)),
            "multiplier": StepField(lam, "state", whole),
            "objective": np.array(result.objective),
        }

    def panels(self, arrays: dict[str, np.ndarray]) -> list[list[Panel]]:
        """Target and state above control and multiplier."""
        triangles = arrays["x"], arrays["y"], arrays["cells"]

        def panel(name: str, scale: str = "") -> Panel:
            return Panel(name, arrays[name], triangles=triangles, names=("x", "y"), scale=scale)

        return [[panel("target", "state"), panel("state", "state")], [panel("control"), panel("multiplier")]]


OPTIONS = [*sections(PoissonSettings), *case.OPTIONS]


def main(argv: Sequence[str] | None = None) -> float:
    """Solve the problem of the options and return the objective."""
    with command_line(argv, __doc__, OPTIONS):
        poisson = PoissonCase(po.read(PoissonSettings))
        objective = case.run(poisson)
        settings, solver = poisson.settings, po.read(case.SolverSettings)
        if settings.target == "sine" and not settings.beta and solver.lower is None and solver.upper is None:
            known = poisson.optimum()[0]
            PETSc.Sys.Print(f"poisson: the exact optimum is {known:.14g}, relative error {objective / known - 1:.1e}")
        return objective


if __name__ == "__main__":
    start(main)
