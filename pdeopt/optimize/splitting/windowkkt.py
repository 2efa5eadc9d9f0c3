"""The KKT matrix of a window of steps whose start is an unknown, and its factors."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np
import scipy.sparse as sp
import torch
from petsc4py import PETSc
from torch import Tensor

from pdeopt.control.metric import RieszMetric
from pdeopt.control.problem import ControlProblem
from pdeopt.core.arrays import Array
from pdeopt.core.errors import SolveFailure, as_raised
from pdeopt.kkt.assembly import KKTAssembly
from pdeopt.kkt.layout import KKTLayout, selection
from pdeopt.kkt.operator import KKTOperator
from pdeopt.precond.direct import use_direct

#: Prefix of PETSc's options for the factors.
PREFIX = "admm_kkt_"


class WindowLayout(KKTLayout):
    """[u | z | lam | v]: v is what the first step of a window has for u_old, where that is an unknown.

    Args:
        problem: of the window.
        starts_free: whether there is a v.
    """

    def __init__(self, problem: ControlProblem, starts_free: bool) -> None:
        super().__init__(problem)
        self.start = self.global_size + np.arange(problem.n if starts_free else 0)
        self.global_size += len(self.start)
        self.local_size += len(self.start)

    def old_state(self, step: Array, dof: Array) -> Array:
        before = super().old_state(step, dof)
        return np.where(step == 0, self.start[dof], before) if len(self.start) else before

    def _pairs(self) -> list[tuple[Array, Array, Array]]:
        return [(self.start, self.start, np.zeros_like(self.start)), *super()._pairs()]


class WindowKKT(KKTOperator):
    """K of the steps of a window plus 2 beta M at its start v and at its last state, as far as these are coupled.

    Args:
        metric: of the window's problem.
        starts, ends: whether v is an unknown, and whether another window goes on from the last state.
    """

    def __init__(self, metric: RieszMetric, starts: bool, ends: bool) -> None:
        super().__init__(metric, "full")
        self.unknowns = WindowLayout(self.problem, starts)
        last = self.unknowns.state(np.array([self.problem.grid.num_steps - 1]), np.arange(self.problem.n))
        places = np.concatenate([self.unknowns.start, last.ravel() if ends else []]).astype(int)
        mass = self.metric.state_mass.as_csr()
        self._mass = sp.csr_matrix(sp.block_diag([mass] * (starts + ends))) if len(places) else sp.csr_matrix((0, 0))
        self._mass.sort_indices()
        self._penalized = self._mass.copy()
        extra = selection(places, self.unknowns.global_size), self._penalized
        self._assembly = KKTAssembly(
            self.problem, self._sparsity(self.problem.objective), self._parameter_pattern(), self.unknowns, extra
        )

    def with_penalty(self, beta: float) -> PETSc.Mat:
        """The matrix at the present point, refilled at each call."""
        self._penalized.data[:] = 2 * beta * self._mass.data
        return self.assemble()


@dataclass
class Factors:
    """Factors of one matrix, and how many windows use them.

    Attributes:
        ksp: PETSc's solver.
        flops: multiplications that they took.
        entries: of them; a solve takes two multiplications with each.
    """

    ksp: PETSc.KSP
    flops: float
    entries: float
    users: int = 0

    def solve(self, right: Tensor) -> Tensor:
        """K^-1 right, flat. Raises `SolveFailure` where it is not finite."""
        b, x = self.ksp.getOperators()[0].createVecs()
        b.setArray(right.numpy())
        with as_raised():
            self.ksp.solve(b, x)
        found = torch.from_numpy(x.getArray().copy())
        b.destroy()
        x.destroy()
        if not bool(found.isfinite().all()):
            raise SolveFailure("its KKT matrix is singular or not finite", "raise -admm_windows")
        return found


@dataclass
class FactorPool:
    """Factors by the content of their matrix: windows of a linear equation with equal steps share them."""

    found: dict[bytes, Factors] = field(default_factory=dict)

    def take(self, operator: WindowKKT, beta: float) -> tuple[bytes, Factors, bool]:
        """Factors of the operator's matrix, by what they are given back with, and whether they are new."""
        matrix = operator.with_penalty(beta)
        key = hashlib.sha256(b"".join(part.tobytes() for part in matrix.getValuesCSR())).digest()
        is_new = key not in self.found
        if is_new:
            self.found[key] = _factor(matrix, operator.unknowns)
        self.found[key].users += 1
        return key, self.found[key], is_new

    def give_back(self, key: bytes) -> None:
        """Free factors that no window uses any more."""
        self.found[key].users -= 1
        if not self.found[key].users:
            matrix = self.found[key].ksp.getOperators()[0]
            self.found.pop(key).ksp.destroy()
            matrix.destroy()


def _factor(matrix: PETSc.Mat, layout: WindowLayout) -> Factors:
    own = matrix.copy()  # that of the operator is refilled, upon which PETSc would factor it again
    own.setOption(PETSc.Mat.Option.SYMMETRIC, True)
    ksp = PETSc.KSP().create(PETSc.COMM_SELF)
    ksp.setOptionsPrefix(PREFIX)
    ksp.setOperators(own)
    ksp.setType("preonly")
    use_direct(ksp.getPC(), layout)
    ksp.setUp()
    if ksp.getPC().getType() != "cholesky":
        return Factors(ksp, 0.0, float(len(own.getValuesCSR()[1])))
    factor = ksp.getPC().getFactorMatrix()
    if (code := factor.getMumpsInfog(1)) < 0:
        raise SolveFailure(f"its KKT matrix cannot be factored (INFOG(1) of MUMPS is {code})", "raise -admm_windows")
    return Factors(ksp, factor.getMumpsRinfog(3) / 2, float(factor.getMumpsInfog(29)))
