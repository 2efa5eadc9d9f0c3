"""A chain of dense residual layers by hand: its states, and its linearization with sweeps in both directions.

    u_i = u_{i-1} + dt_i act(W_i u_{i-1} + b_i),      T = [du_i - du_{i-1} - D_i W_i du_{i-1}],   D_i = dt_i act'

States are (layers, width, samples), samples last, as in `densestep`: what is not recursive is one batched operation
over all layers, and a layer of a sweep takes two calls. Sweeps go one layer after the other, from rank to rank, or by
MGRIT over intervals of layers, whose adjoint has the exact transposes of its operators on each level. A step of a
coarse level has a matrix for each sample, to second order that of the product of its layers, see `interval_matrices`.
States of another design are found from known ones by the same cycles, corrected by the layers linearized there: this is
Newton's method for the C-points, as multiple shooting has it (`DenseChain.shoot`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from nn_adapters.control.intervals import (
    CYCLES_RTOL,
    Map,
    cotangents,
    interval_matrices,
    product,
    sums_of_layers,
    tangents,
    times,
    times_transposed,
    to_columns,
)
from nn_adapters.layers.densestep import DENSE_ACTIVATIONS
from pdeopt.core.errors import SolveFailure
from pdeopt.steps.mgrit import Mgrit, MgritSettings
from pdeopt.steps.timegrid import TimeGrid
from pdeopt.steps.transfer import interval_sums


@dataclass
class SweepCount:
    """Layers on the longest path of a run, where one waits for the other.

    Attributes:
        layers: of sweeps, one after the other, those of coarse levels too.
        sweeps: how many sweeps.
        cycles: of MGRIT, in them.
    """

    layers: int = 0
    sweeps: int = 0
    cycles: int = 0


class DenseChain:
    """The layers of this rank, and how sweeps go through those of all.

    Args:
        grid: the layers; with MGRIT, whole intervals of them on each rank.
        block: a block for which `is_dense` holds.
        mgrit: settings of sweeps of linearized layers by MGRIT; None for one layer after the other.

    Attributes:
        dt: of the layers, (n_local, 1, 1).
        exact: whether sweeps must converge, see `exact_cycles`.
        count: what sweeps took.
    """

    def __init__(self, grid: TimeGrid, block: nn.Sequential, mgrit: MgritSettings | None = None) -> None:
        self.grid, self.count, self.exact = grid, SweepCount(), True
        self.act, self._backward = DENSE_ACTIVATIONS[type(block[1])]
        self.dt = grid.steps.dt[:, None, None]
        self.solvers: tuple[Mgrit, Mgrit] | None = None
        if mgrit is not None and (factors := mgrit.factors(grid.num_steps)):
            self.solvers = Mgrit(grid, factors, mgrit), Mgrit(grid, factors, mgrit, adjoint=True)

    def slope(self, w: Tensor, value: Tensor) -> Tensor:
        """act'(a) w from v = act(a)."""
        return self._backward(w, value)

    def states(self, u0: Tensor, W: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """States before and after all layers of this rank, (n_local + 1, width, samples), and act(W u + b). Collective.

        Args:
            u0: before the first layer of all, (width, samples).
            W, b: (n_local, width, width), (n_local, width).
        """
        before = self.grid.neighbors.receive_before(u0)
        n, dt = len(W), self.grid.steps.dt.tolist()
        U, V = u0.new_empty(n + 1, *u0.shape), u0.new_empty(n, *u0.shape)
        U[0] = u0 if before is None else before
        rows = zip(U[:-1].unbind(), U[1:].unbind(), V.unbind(), W.unbind(), b[:, :, None].unbind(), dt)
        for u, after, v, W_i, b_i, dt_i in rows:
            torch.addmm(b_i, W_i, u, out=v)
            torch.add(u, self.act(v), alpha=dt_i, out=after)
        self.grid.neighbors.send_after(U[-1])
        return U, V

    def shoot(self, u0: Tensor, W: Tensor, b: Tensor, near: LinearChain, points: Tensor) -> tuple[Tensor, float]:
        """The states of a design by cycles of the layers themselves, from C-points nearby. Collective.

        Args:
            u0, W, b: as for `states`.
            near: the layers linearized at states nearby, whose coarse levels correct.
            points: the C-points to begin with, (intervals, width, samples).

        Returns:
            States before the layers of this rank, as its last run had them, and that after the last layer,
            (n_local + 1, width, samples); and the misfit of the C-points.
        """
        solver, U = self.mgrit[0], u0.new_empty(len(W) + 1, *u0.shape)

        def layer(u: Tensor, rows: slice) -> Tensor:
            return torch.addcmul(u, self.values(u, W[rows], b[rows]), self.dt[rows])

        def final(u: Tensor, rows: slice) -> Tensor:
            U[:-1][rows] = u
            return layer(u, rows)

        outcome = solver.solve([layer, *near.maps(adjoint=False)[1:]], u0, guess=points, final=final)
        U[-1] = outcome.ends[-1]
        self.took_cycles(solver, solver.cycles, guessed=True)
        return U, outcome.misfit

    @property
    def mgrit(self) -> tuple[Mgrit, Mgrit]:
        """The solvers of sweeps by cycles, forward and adjoint."""
        assert self.solvers is not None
        return self.solvers

    def values(self, U: Tensor, W: Tensor, b: Tensor) -> Tensor:
        """act(W u + b) of all layers at once, at given states before them, (n_local, width, samples)."""
        return self.act(torch.baddbmm(b[:, :, None], W, U))

    def linearized(self, W: Tensor, V: Tensor) -> LinearChain:
        """The layers' derivatives where act(W u + b) is V."""
        return LinearChain(self, W, self.slope(self.dt.expand_as(V).contiguous(), V))

    def last_to_all(self, state: Tensor) -> Tensor:
        """`state` of the last rank on all ranks. Collective."""
        mpi = self.grid.mpi
        return state if mpi.size == 1 else torch.from_numpy(mpi.bcast(state.numpy(), mpi.size - 1))

    def took(self, layers: int, cycles: int = 0) -> None:
        """Count a sweep."""
        self.count.layers += layers
        self.count.sweeps += 1
        self.count.cycles += cycles

    def took_cycles(self, solver: Mgrit, cycles: int, guessed: bool = False) -> None:
        """Count a sweep by MGRIT: a start on the coarse levels, where none was given, its cycles, and the last run."""
        travels, march = sum(solver.factors), int(solver.offsets[-1][-1])
        first = 0 if guessed else march + travels - solver.factors[0]
        cycle = (1 + solver.settings.relaxation.count("C")) * travels + march
        self.took(first + cycles * cycle + solver.factors[0], cycles)


class LinearChain:
    """Sweeps through linearized layers; tensors may have axes between width and samples.

    Args:
        chain: the layers.
        W: (n_local, width, width).
        D: dt act', (n_local, width, samples).

    Attributes:
        left: C-points of the last sweep back by cycles; None before.
    """

    def __init__(self, chain: DenseChain, W: Tensor, D: Tensor) -> None:
        self.chain, self.W, self.D = chain, W, D
        self._rows = W.unbind(), W.mT.unbind(), D.unbind()
        self.left: Tensor | None = None

    @cached_property
    def _coarse(self) -> list[Tensor]:
        """The matrices of the steps of all levels but the finest."""
        found: list[Tensor] = []
        for factor, move in zip(self.chain.mgrit[0].factors, self.chain.mgrit[0].moves[1:]):
            sums = interval_sums(found[-1], factor) if found else sums_of_layers(self.W, self.D, factor)
            count = len(found[-1] if found else self.W)
            found += move.there([interval_matrices(sums, count, factor)])
        return found

    def maps(self, adjoint: bool) -> list[Map]:
        """The steps of each level, finest first; or their transposes."""
        if adjoint:
            return [cotangents(self.W, self.D), *map(times_transposed, self._coarse)]
        return [tangents(self.W, self.D), *map(times, self._coarse)]

    def rows(self, samples: Tensor) -> LinearChain:
        """The same for some of the samples."""
        return LinearChain(self.chain, self.W, self.D.index_select(2, samples))

    def forward(self, entry: Tensor, pre: Tensor | None = None, g: Tensor | None = None) -> Tensor:
        """du_i = du_{i-1} + D_i (W_i du_{i-1} + pre_i) + g_i, those after the layers of this rank. Collective.

        Args:
            entry: du_0, on all ranks, (width, samples).
            pre, g: (n_local, width, samples); None for zero.

        Returns:
            (n_local, width, samples).
        """
        if self.chain.solvers is not None:
            source = None if pre is None else self.D * pre
            source = source if g is None else g if source is None else source.add_(g)
            return self._cycles(entry, source)
        grid = self.chain.grid
        before = grid.neighbors.receive_before(entry)
        du = entry if before is None else before
        out = entry.new_empty(len(self.W), *entry.shape)
        W, _, D = self._rows
        pre_rows = [None] * len(W) if pre is None else pre.unbind()
        for i, after in enumerate(out.unbind()):
            t = torch.mm(W[i], du) if pre_rows[i] is None else torch.addmm(pre_rows[i], W[i], du)
            torch.addcmul(du, D[i], t, out=after)
            if g is not None:
                after += g[i]
            du = after
        grid.neighbors.send_after(du)
        self.chain.took(grid.num_steps)
        return out

    def backward(self, end: Tensor, guess: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Cotangents of W u + b of each layer, D_i w_i with w_{i-1} = w_i + W_i' D_i w_i, and that before the layers.

        Args:
            end: w_N, on all ranks, (width, ..., samples).
            guess: C-points to begin cycles with, as an earlier sweep has `left` them.

        Returns:
            (n_local, width, ..., samples), and of the first layer of this rank, shaped as `end`. Collective.
        """
        S = end.new_empty(len(self.W), *end.shape)
        if self.chain.solvers is not None:
            return S, self._adjoint_cycles(end, S, guess)
        grid = self.chain.grid
        after = grid.neighbors.receive_after(end)
        w = end if after is None else after
        _, W, D = self._rows
        is_flat, S_rows = end.dim() == 2, S.unbind()
        for i in reversed(range(len(W))):
            if is_flat:
                w = torch.addmm(w, W[i], torch.mul(w, D[i], out=S_rows[i]))
            else:
                s = torch.mul(w, D[i][:, None], out=S_rows[i]).flatten(1)
                w = torch.addmm(w.flatten(1), W[i], s).view_as(w)
        if not grid.is_first:
            grid.neighbors.send_before(w)
        self.chain.took(grid.num_steps)
        return S, w

    # -- by cycles ---------------------------------------------------------------------------------------------

    def _cycles(self, entry: Tensor, g: Tensor | None) -> Tensor:
        out, maps = entry.new_empty(len(self.W), *entry.shape), self.maps(adjoint=False)

        def final(u: Tensor, rows: slice) -> Tensor:
            found = maps[0](u, rows)
            out[rows] = found if g is None else found + g[rows]
            return found

        self._solve(self.chain.mgrit[0], maps, entry, g, final)
        return out

    def _adjoint_cycles(self, end: Tensor, S: Tensor, guess: Tensor | None) -> Tensor:
        def final(w: Tensor, rows: slice) -> Tensor:
            S[rows] = to_columns(self.D[rows], w) * w
            return w + product(self.W[rows].mT, S[rows])

        self.left = self._solve(self.chain.mgrit[1], self.maps(adjoint=True), end, None, final, guess)
        return self.left[0]

    def _solve(
        self, solver: Mgrit, maps: list[Map], entry: Tensor, g: Tensor | None, final: Map, guess: Tensor | None = None
    ) -> Tensor:
        """The states at the ends of the intervals of this rank. Raises `SolveFailure` where cycles do not converge."""
        outcome = solver.solve(maps, entry, g, guess=guess, final=final)
        cycles = len(outcome.residuals) if self.chain.exact else solver.cycles
        self.chain.took_cycles(solver, cycles, guess is not None)
        limit = 1e3 * CYCLES_RTOL
        if self.chain.exact and not outcome.misfit <= limit and bool(entry.isfinite().all()):
            raise SolveFailure(
                f"sweeps by MGRIT over {self.chain.grid.num_steps} layers did not converge (misfit "
                f"{outcome.misfit:.1e} after {cycles} cycles)",
                "more cycles, or -gn_sweeps serial",
            )
        return outcome.ends
