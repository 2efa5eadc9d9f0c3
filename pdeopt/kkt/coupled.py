"""KKT systems with explicit continuity in time: windows of steps, each with a start value of its own.

Every window but the first has a virtual variable v, which its first step takes for u_old, and the constraint

    M (v - u_prev) = 0,    u_prev: the last state of the window before,

with the multiplier mu, M the state mass. So scaled it is a residual like that of a step which only carries on:
lam and mu have the same unit and size. The adjoint equation of v says M mu = -(B'lam + W_vx x), with B and lam of
the window's first step: mu stands for the adjoint where the window starts, and is lam itself where B = -M.

The unknowns stand window by window, [v | u | z | lam | mu] each, p before all. So the KKT system of a window, its
start value given, is a diagonal block of the matrix, and continuity is all that lies beside these blocks; but for
p, and for controls that a control map shares between windows.

A window has k steps, counted from step 1; it also ends where the steps of a rank end, so that every unknown stays
where it is. Where k divides the steps of the ranks, the matrix is the same on any number of them.
"""

from __future__ import annotations

import ctypes
from itertools import pairwise

import numpy as np
import scipy.sparse as sp
import torch
from petsc4py import PETSc
from torch import Tensor

from pdeopt.control.metric import RieszMetric
from pdeopt.control.problem import ControlProblem
from pdeopt.core.arrays import Array, assign, copy, index_array
from pdeopt.core.options import set_default, take_back
from pdeopt.kkt.assembly import KKTAssembly
from pdeopt.kkt.layout import KKTLayout, selection
from pdeopt.kkt.operator import Hessian, KKTOperator
from pdeopt.steps.sparse import block_diagonal


class CoupledLayout(KKTLayout):
    """Where the unknowns stand: [p | v u z lam mu | v u z lam mu | ...], window by window.

    Args:
        window: the largest number of steps of a window.

    Attributes:
        first: the first steps of all windows, counted from 0.
        own: the windows of this rank.
        begin: the first number of this rank.
    """

    def __init__(self, problem: ControlProblem, window: int) -> None:
        super().__init__(problem)
        grid, n = self.grid, problem.n
        self.first = np.union1d(np.arange(0, grid.num_steps, window), grid.offsets[:-1])
        states = n * np.diff(np.r_[self.first, grid.num_steps])
        self._first_control = self._controls_before(self.first)
        controls = np.diff(np.r_[self._first_control, self._design_starts[-1]])
        virtual = np.where(self.first > 0, n, 0)
        sizes = np.stack([virtual, states, controls, states, virtual], axis=1)
        ends = problem.param_dim + np.cumsum(sizes).reshape(sizes.shape)
        self._v, self._u, self._z, self._lam, self._mu = (ends - sizes).T
        self._bounds = np.r_[0, ends[:, -1]]  # of the windows; p counts to the first
        self.own = slice(*np.searchsorted(self.first, [grid.begin, grid.end]))
        self.begin, end = (int(self._bounds[window]) for window in (self.own.start, self.own.stop))
        self.global_size, self.local_size = int(self._bounds[-1]), end - self.begin

    def _controls_before(self, step: Array) -> Array:
        """How many controls of all ranks belong to the steps before."""
        owner = np.searchsorted(self.grid.offsets, step, side="right") - 1
        own, steps = step - self.grid.offsets[owner], np.diff(self.grid.offsets)[owner]
        return np.asarray(self._design_starts[owner] - -own * self._sizes[owner, 1] // steps)  # rounded up

    def _window(self, step: Array) -> Array:
        return np.searchsorted(self.first, step, side="right") - 1

    def state(self, step: Array, dof: Array) -> Array:
        return np.where(step >= 0, self._in_window(self._u, step) + dof, -1)

    def old_state(self, step: Array, dof: Array) -> Array:
        starts = np.isin(step, self.first[1:])
        return np.where(starts, self._v[self._window(step)] + dof, self.state(step - 1, dof))

    def multiplier(self, step: Array, dof: Array) -> Array:
        return np.where(step >= 0, self._in_window(self._lam, step) + dof, -1)

    def _in_window(self, start: Array, step: Array) -> Array:
        window = self._window(step)
        return np.asarray(start[window] + (step - self.first[window]) * self.problem.n)

    def controls(self, place: Array) -> Array:
        window = self._window(self.control_step(place))
        return np.asarray(self._z[window] + place - self._first_control[window])

    def parameters(self) -> Array:
        return np.arange(self.problem.param_dim)

    def continuity(self, windows: slice) -> tuple[Array, Array, Array]:
        """Numbers of v, u_prev and mu of those windows that have them, (windows, n) each."""
        first, dof = self.first[windows], np.arange(self.problem.n)
        later = first > 0
        v, mu = (start[windows][later, None] + dof for start in (self._v, self._mu))
        return v, self.state(first[later, None] - 1, dof), mu

    def _pairs(self) -> list[tuple[Array, Array, Array]]:
        v, _, mu = (numbers.ravel() for numbers in self.continuity(slice(None)))
        step = np.repeat(self.first[1:], self.problem.n)
        return [(mu, v, step), (v, mu, step), *super()._pairs()]

    def windows(self) -> list[PETSc.IS]:
        """The unknowns of each window of this rank, as sets of this rank alone."""
        bounds = self._bounds[self.own.start : self.own.stop + 1]
        return [PETSc.IS().createStride(b - a, a, 1, comm=PETSc.COMM_SELF) for a, b in pairwise(bounds)]

    def standard(self) -> tuple[Array, Array, Array]:
        """Numbers of u, [z | p] and lam of this rank, flat."""
        step, dof = np.arange(self.grid.begin, self.grid.end)[:, None], np.arange(self.problem.n)
        p = self.parameters()[: self.problem.layout.param_size]
        return self.state(step, dof).ravel(), np.r_[self.own_controls(), p], self.multiplier(step, dof).ravel()

    def index_sets(self, two: bool = False) -> dict[str, PETSc.IS]:
        """As of the base; v is a state, mu a multiplier."""
        (v, _, mu), (u, design, lam) = self.continuity(self.own), self.standard()
        fields = {"state": np.r_[v.ravel(), u], "control": design, "multiplier": np.r_[lam, mu.ravel()]}
        if two:
            fields = {"primal": np.r_[v.ravel(), u, design], "multiplier": fields["multiplier"]}
        sets = {name: index_array(np.sort(numbers)) for name, numbers in fields.items()}
        return {name: PETSc.IS().createGeneral(numbers, comm=self.grid.comm) for name, numbers in sets.items()}


class CoupledKKT(KKTOperator):
    """A KKT operator with continuity constraints in its assembled matrix.

    `assemble` gives the matrix over the unknowns of `coupled`; `mult`, `shell` and all else are of the standard form.

    Args:
        metric, hessian: see `KKTOperator`.
        window: the largest number of steps of a window.
    """

    def __init__(self, metric: RieszMetric, hessian: Hessian = "full", window: int = 16) -> None:
        super().__init__(metric, hessian)
        self.coupled = CoupledLayout(self.problem, window)
        self._defaults: dict[str, str] = {}  # of PETSc options
        u, design, lam = self.coupled.standard()
        self._standard = torch.from_numpy(np.r_[u, design, lam] - self.coupled.begin)  # where u, z, p and lam went

    def assemble(self) -> PETSc.Mat:
        """The coupled matrix as AIJ at the present point, refilled at each call. Collective.

        Raises:
            InputError: the constraint has no sparsity pattern.
        """
        if self._assembly is None:
            self._assembly = KKTAssembly(
                self.problem,
                self._sparsity(self.lin.objective),
                self._parameter_pattern(),
                self.coupled,
                self._continuity(),
            )
        fixed, self.fixed = self.fixed, None  # they have other numbers here
        matrix = super().assemble()
        matrix.setAttr("kkt", None)  # preconditioners of the standard form do not fit
        self.fixed = fixed
        if fixed is not None:
            matrix.zeroRowsColumns(index_array(self.coupled.standard()[1][fixed.numpy()]), diag=self.pin)
        return matrix

    def _continuity(self) -> tuple[sp.csr_matrix, sp.csr_matrix]:
        """mu'M (v - u_prev) of the windows that start here: rows of (v - u_prev, mu), and [0 M; M 0]."""
        (v, before, mu), width = self.coupled.continuity(self.coupled.own), self.coupled.global_size
        jump = selection(v, width) - selection(before, width)
        M = block_diagonal(self.metric.state_mass, len(v))
        stored = sp.csr_matrix((np.zeros(v.size), np.arange(v.size), np.arange(v.size + 1)), shape=M.shape)
        D = sp.csr_matrix(sp.bmat([[None, M], [M, stored]])) if v.size else sp.csr_matrix((0, 0))
        D.sort_indices()
        return sp.csr_matrix(sp.vstack([jump, selection(mu, width)])), D

    def to_coupled(self, k: PETSc.Vec) -> PETSc.Vec:
        """A right-hand side of the coupled system from one of the standard form; continuity gets zero. A new vector."""
        out = PETSc.Vec().createMPI((self.coupled.local_size, None), comm=self.problem.grid.comm)
        entries = copy(out)
        entries[self._standard] = copy(k)
        assign(out, entries)
        return out

    def to_standard(self, k: PETSc.Vec, out: PETSc.Vec) -> PETSc.Vec:
        """Write u, z, p and lam of a coupled solution into a vector of the standard form and return it."""
        assign(out, copy(k)[self._standard])
        return out

    def continuity_multipliers(self, k: PETSc.Vec) -> Tensor:
        """mu of a coupled solution for the windows that start on this rank, the first one left out, (windows, n)."""
        return copy(k)[self.coupled.continuity(self.coupled.own)[2] - self.coupled.begin]

    def split(self, pc: PETSc.PC) -> None:
        """Make the windows the blocks of a PC of type asm or bjacobi, without overlap; MUMPS is their default."""
        sets, prefix = self.coupled.windows(), pc.getOptionsPrefix() or ""
        if pc.getType() == "asm":
            pc.setASMLocalSubdomains(len(sets), sets)
        elif pc.getType() == "bjacobi":  # petsc4py has no call for it
            sizes = index_array(np.array([each.getSize() for each in sets]))
            number = {4: ctypes.c_int32, 8: ctypes.c_int64}[sizes.itemsize](len(sizes))
            ctypes.CDLL(PETSc.__file__).PCBJacobiSetLocalBlocks(
                ctypes.c_void_p(pc.handle), number, sizes.ctypes.data_as(ctypes.c_void_p)
            )
        if pc.getType() in ("asm", "bjacobi") and PETSc.Sys.hasExternalPackage("mumps"):
            self._defaults = {f"{prefix}sub_pc_type": "cholesky", f"{prefix}sub_pc_factor_mat_solver_type": "mumps"}
            for name, value in self._defaults.items():  # they are read when the first window is factored
                set_default(name, value)

    def free(self) -> None:
        super().free()
        take_back(*self._defaults)  # other preconditioners have solvers of this prefix, too
