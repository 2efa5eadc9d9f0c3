"""How states, controls, global parameters and multipliers stand in PETSc vectors."""

from __future__ import annotations

from petsc4py import PETSc
from torch import Tensor

from pdeopt.core.arrays import assign, copy, readonly
from pdeopt.steps.timegrid import TimeGrid

#: Of a primal vector: u (n_local, n), the flat controls of this rank, and p on all ranks.
Fields = tuple[Tensor, Tensor, Tensor]


class VectorLayout:
    """The sizes of u, z, p and lam on this rank, and the vectors made of them.

    A vector holds on each rank, one after the other,

        design [z | p],  primal [u | z | p],  multiplier [lam],  KKT [u | z | p | lam].

    States and multipliers are rows, one a step of this rank; controls are flat; p stands on rank 0 alone, but is
    handed out on all ranks.

    Args:
        grid: the time steps and who owns them.
        n: unknowns of a state.
        control_size: flat controls of this rank.
        param_dim: global parameters.

    Attributes:
        state_size, control_size, param_size: entries of u (and of lam), of z and of p on this rank.
        design_size, primal_size, kkt_size: entries of whole vectors on this rank.
    """

    def __init__(self, grid: TimeGrid, n: int, control_size: int, param_dim: int = 0) -> None:
        self.grid, self.n, self.param_dim = grid, n, param_dim
        self.state_size, self.control_size = grid.n_local * n, control_size
        self.param_size = param_dim if grid.is_root else 0
        self.design_size = self.control_size + self.param_size
        self.primal_size = self.state_size + self.design_size
        self.kkt_size = self.primal_size + self.state_size

    # -- new vectors, all zero -------------------------------------------------------------------------------

    def create_primal(self) -> PETSc.Vec:
        """A zero vector [u | z | p]. Collective, as all calls that make vectors."""
        return _zero(self.grid, self.primal_size)

    def create_design(self) -> PETSc.Vec:
        """A zero vector [z | p]."""
        return _zero(self.grid, self.design_size)

    def create_multiplier(self) -> PETSc.Vec:
        """A zero vector of states or multipliers."""
        return _zero(self.grid, self.state_size)

    def create_kkt(self) -> PETSc.Vec:
        """A zero vector [u | z | p | lam]."""
        return _zero(self.grid, self.kkt_size)

    # -- vectors and tensors ---------------------------------------------------------------------------------

    def rows(self, lam: PETSc.Vec) -> Tensor:
        """A copy of states or multipliers, (n_local, n)."""
        return copy(lam).reshape(-1, self.n)

    def fields(self, x: PETSc.Vec) -> Fields:
        """Copies of u (n_local, n), of the flat controls, and of p on all ranks. Collective."""
        u, z, p = copy(x).split([self.state_size, self.control_size, self.param_size])
        return u.reshape(-1, self.n), z, self.on_all_ranks(p)

    def design_fields(self, design: PETSc.Vec) -> tuple[Tensor, Tensor]:
        """Copies of the flat controls and of p on all ranks. Collective."""
        z, p = copy(design).split([self.control_size, self.param_size])
        return z, self.on_all_ranks(p)

    def kkt_fields(self, k: PETSc.Vec) -> tuple[Fields, Tensor]:
        """Copies of (u, z, p) and of lam (n_local, n). Collective."""
        u, z, p, lam = copy(k).split([self.state_size, self.control_size, self.param_size, self.state_size])
        return (u.reshape(-1, self.n), z, self.on_all_ranks(p)), lam.reshape(-1, self.n)

    def on_all_ranks(self, p: Tensor) -> Tensor:
        """The entries of p that this rank holds, all of them on rank 0, on all ranks. Collective."""
        return self.grid.from_first(p if self.grid.is_root else p.new_zeros(self.param_dim))

    def pack(self, x: PETSc.Vec, u: Tensor, z: Tensor, p: Tensor, lam: Tensor | None = None) -> PETSc.Vec:
        """Write u, the flat controls and p, and lam into a KKT vector, into x, and return it."""
        assign(x, u, z, p[: self.param_size], *(() if lam is None else (lam,)))
        return x

    # -- parts of vectors ------------------------------------------------------------------------------------

    def join(self, u: PETSc.Vec, design: PETSc.Vec) -> PETSc.Vec:
        """A new primal vector [u | design]."""
        x = self.create_primal()
        with readonly(u) as state, readonly(design) as rest:
            assign(x, state, rest)
        return x

    def split(self, x: PETSc.Vec) -> tuple[PETSc.Vec, PETSc.Vec]:
        """New vectors u and [z | p] with the entries of a primal one."""
        u, design = self.create_multiplier(), self.create_design()
        with readonly(x) as entries:
            assign(u, entries[: self.state_size])
            assign(design, entries[self.state_size :])
        return u, design

    def join_kkt(self, x: PETSc.Vec, lam: PETSc.Vec, out: PETSc.Vec) -> PETSc.Vec:
        """Write [x | lam] into `out` and return it."""
        with readonly(x) as primal, readonly(lam) as multiplier:
            assign(out, primal, multiplier)
        return out

    def split_kkt(self, k: PETSc.Vec, x: PETSc.Vec, lam: PETSc.Vec) -> None:
        """Write the parts of a KKT vector into x and lam."""
        with readonly(k) as entries:
            assign(x, entries[: self.primal_size])
            assign(lam, entries[self.primal_size :])


def _zero(grid: TimeGrid, local_size: int) -> PETSc.Vec:
    return PETSc.Vec().createMPI((local_size, None), comm=grid.comm)
