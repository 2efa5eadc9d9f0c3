"""Multigrid reduction in time for nonlinear steps u_i = Phi_i(u_{i-1}) + g_i, by full approximation.

The ends of intervals of m steps are the C-points. F-relaxation runs through all intervals at once, each from the
C-point before it; the C-points are then corrected by a coarse problem with one step an interval,

    v_k = Phi_c(v_{k-1}) + [end of interval k - Phi_c(its start)]

(R. D. Falgout, S. Friedhoff, T. V. Kolev, S. P. MacLachlan, J. B. Schroder, Parallel time integration with
multigrid, SIAM J. Sci. Comput. 36, 2014; S. Guenther, L. Ruthotto, J. B. Schroder, E. C. Cyr, N. R. Gauger,
Layer-parallel training of deep residual neural networks, SIMODS 2, 2020). What a step is, the engine need not know:
`Phi` gets the states of many steps as rows of one tensor, and which steps they are. Nor need it know the direction
of time: `adjoint` runs from the last step to the first, with the same intervals.

Each rank has whole intervals of the finest level. Where a coarser level has fewer than one interval a rank, its steps
move to as few ranks as it has intervals, and the others wait for their C-points: the finest level alone limits how
many ranks there may be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pdeopt.core.errors import InputError
from pdeopt.core.settings import Settings, setting
from pdeopt.steps.timegrid import TimeGrid
from pdeopt.steps.transfer import Move, interval_sums, level_offsets

#: (rows of states, the steps of this rank that take them on) -> rows of states, one step later.
StepMap = Callable[[Tensor, slice], Tensor]


@dataclass(frozen=True)
class IntervalMap:
    """A `StepMap` that goes through whole intervals by itself, where nothing enters between steps.

    Args:
        step: one step of each interval.
        through: (states where the intervals of this rank begin, steps of an interval) -> states where they end; the
            last interval may be shorter. For an adjoint begin and end are the other way round.
    """

    step: StepMap
    through: Callable[[Tensor, int], Tensor]

    def __call__(self, u: Tensor, rows: slice) -> Tensor:
        return self.step(u, rows)


#: As the steps of a `StepMap`.
ALL_STEPS = slice(None)

#: What `-layer_mgrit_coarsening auto` chooses from.
AUTO_FACTORS = (2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class MgritSettings(Settings, prefix="layer_mgrit_"):
    """MGRIT over the layers of a network."""

    levels: int = setting(2, "levels; 1 is one step after the other", at_least=1)
    coarsening: str = setting(
        "auto", "steps that become one, on each level: 16, or 16,4 where they differ; auto: for the fewest calls"
    )
    cycles: int = setting(1, "most forward cycles", at_least=0)
    adjoint_cycles: int = setting(0, "most adjoint cycles, after the coarser problems' solution", at_least=0)
    relaxation: str = setting("F", "relaxation before a coarse correction", choices=("F", "FCF", "FCFCF"))
    cycle: str = setting("V", "coarse levels are visited once, or again after a full cycle", choices=("V", "F"))
    start: str = setting(
        "nested",
        "first C-points: from the coarser levels, the entry everywhere, or those of the last solve",
        choices=("nested", "constant", "warm"),
    )
    long_steps: str = setting(
        "stages",
        "steps of the coarse level: two stages with one layer's weights for an interval, or its first layer and an "
        "affine map that earlier batches have taught, with two levels",
        choices=("stages", "fitted"),
    )
    rtol: float = setting(0.0, "relative residual at C-points that ends the cycles; 0 for a fixed number", at_least=0)

    cache: int = setting(
        1024,
        "kilobytes of states that go through their intervals together: as many as the processor's cache holds",
        at_least=1,
    )

    fused: str = setting(
        "auto",
        "dense layers by compiled loops, where they are cheaper: exactly on one rank, inside of intervals on several; "
        "inside of intervals on any number; never",
        choices=("auto", "intervals", "never"),
    )

    serial: str = setting(
        "auto",
        "layers on one rank: exact, one after the other, where cycles have no less to do, or never",
        choices=("auto", "never"),
    )

    def factors(self, num_steps: int) -> list[int]:
        """The coarsening factor of each level but the coarsest, as many as the steps allow.

        `auto` is the power of two up to 64 with the fewest calls of steps, one after the other; of equals the smallest,
        which converges fastest.
        """
        words = str(self.coarsening).split(",")  # a number will do, too
        if words == ["auto"]:
            words = [str(min(AUTO_FACTORS, key=lambda factor: _calls(factor, num_steps, max(self.levels, 2))))]
        try:
            given = [int(word) for word in words]
        except ValueError:
            given = [0]
        if min(given) < 2:
            raise InputError(
                "-layer_mgrit_coarsening", self.coarsening, "auto, or integers >= 2, for instance 16 or 16,4"
            )
        given += given[-1:] * (min(self.levels, 64) - 1 - len(given))  # 2^64 steps are none
        factors: list[int] = []
        for factor in given[: self.levels - 1]:
            if num_steps <= factor:
                break
            factors.append(factor)
            num_steps = -(-num_steps // factor)
        return factors


def _calls(factor: int, num_steps: int, levels: int) -> float:
    """Those of a run through all levels: the steps of an interval, and of the coarsest level; long ones count twice.

    Long steps of residual networks have two stages.
    """
    return factor + 2.0 * factor * (levels - 2) + 2.0 * num_steps / float(factor) ** (levels - 1)


@dataclass
class Outcome:
    """What a solve has done.

    Attributes:
        points: C-points of this rank, (intervals, ...).
        ends: the states at the ends of its intervals, from one more run through the finest steps.
        residuals: relative to the C-points, before each correction; empty without a tolerance.
        gap: by how much the last run misses the C-points that it began at, relative to the largest of them, of what
            it found, and of the entry: 0 where they are solved, about 1 or infinite where the cycles have diverged. A
            number in double precision, on one rank where the states are, so that no device is waited for; None where
            nothing is approximated.
    """

    points: Tensor
    ends: Tensor
    residuals: list[float] = field(default_factory=list)
    gap: Tensor | None = None

    @property
    def misfit(self) -> float:
        """`gap` as Python has it; the device is asked for it."""
        return 0.0 if self.gap is None else float(self.gap)


class Mgrit:
    """The solver of one chain of steps u_i = Phi_i(u_{i-1}) + g_i. Every verb is collective.

    Args:
        grid: of the finest level, whole intervals of it on each rank: see `whole_intervals`.
        factors: coarsening factors, finest level first; none for one step after the other.
        settings: relaxation, cycle, start, tolerance; their `cycles`, or `adjoint_cycles`.
        adjoint: from the last step to the first.

    Attributes:
        grids: of the levels, finest first; on coarse levels None on a rank that has no step there.
        offsets: who owns which steps of each level, known to all ranks.
        moves: of the steps of each level, from where the level before leaves them.

    Raises:
        InputError: a rank without whole intervals of the finest level.

    Example:
        >>> factors = settings.factors(num_steps)
        >>> mgrit = Mgrit(grid, factors, settings)
        >>> outcome = mgrit.solve([fine_step, coarse_step], u_0)       # one step map a level
    """

    def __init__(self, grid: TimeGrid, factors: Sequence[int], settings: MgritSettings, adjoint: bool = False) -> None:
        self.settings, self.adjoint, self.factors = settings, adjoint, [*factors, 1]
        self.cycles = settings.adjoint_cycles if adjoint else settings.cycles
        if factors and (grid.offsets[:-1] % factors[0]).any():
            raise InputError(
                "steps of a rank", f"{grid.begin + 1} to {grid.end}", f"whole intervals of {factors[0]} steps"
            )
        levels = level_offsets(grid.offsets, factors)
        self.offsets, self.moves = [own for _, own in levels], [Move(grid.time, *level) for level in levels]
        self.grids: list[TimeGrid | None] = [grid]
        for factor, fine, coarse in zip(factors, self.offsets, self.offsets[1:]):
            counts, above = np.diff(coarse)[np.diff(fine) > 0], self.grids[-1]
            self.grids.append(None if above is None else above.coarsen(factor, counts))
        self.last = len(factors)

    def solve(
        self,
        phis: Sequence[StepMap],
        entry: Tensor,
        g: Tensor | None = None,
        *,
        guess: Tensor | None = None,
        final: StepMap | None = None,
    ) -> Outcome:
        """Solve, and run through the finest steps once more from the C-points that were found.

        Args:
            phis: the steps of each level, finest first.
            entry: the state before the first step (adjoint: after the last), on all ranks.
            g: of the finest steps of this rank, at the node where each arrives; None for zero.
            guess: C-points of an earlier solve.
            final: stands for `phis[0]` in the last run, the one whose states count.
        """
        final = final or phis[0]
        if self.last == 0:
            end = self._march(0, final, entry, g, keep=False)
            return Outcome(end, end)
        points = self._start(phis, entry, g) if guess is None else guess
        outcome = Outcome(points, points)
        for _ in range(self.cycles):
            points, misfit = self._cycle(0, phis, entry, outcome.points, g, self.settings.cycle)
            if self.settings.rtol > 0:
                outcome.residuals.append(self._size(misfit) / max(self._size(points), 1e-300))
                if outcome.residuals[-1] <= self.settings.rtol:
                    break
            outcome.points = points
        outcome.ends = self._travel(0, final, self._departures(0, outcome.points, entry), g)
        outcome.gap = self._gap(outcome, entry)
        return outcome

    def _gap(self, outcome: Outcome, entry: Tensor) -> Tensor:
        parts = outcome.ends - outcome.points, outcome.points, outcome.ends, entry
        double = torch.promote_types(entry.dtype, torch.float64)  # complex numbers stay complex
        norms = torch.stack([torch.linalg.vector_norm(part, dtype=double) for part in parts])
        grid = _present(self.grids[0])
        if grid.mpi.size > 1:
            norms = norms.cpu()
            norms = torch.cat([grid.sum(norms[:3].square()).sqrt(), norms[3:]])
        return torch.where(norms[0].isfinite(), norms[0] / norms[1:].amax().clamp(min=1e-300), math.inf)

    def departures(self, points: Tensor, entry: Tensor) -> Tensor:
        """The states at which the finest intervals begin, from the C-points."""
        return self._departures(0, points, entry)

    def _cycle(
        self, level: int, phis: Sequence[StepMap], entry: Tensor, points: Tensor, g: Tensor | None, kind: str
    ) -> tuple[Tensor, Tensor]:
        """New C-points of a level, and by how much the old ones miss the steps before them."""
        starts = self._departures(level, points, entry)
        ends = self._travel(level, phis[level], starts, g)
        misfit = ends - points
        for _ in range(self.settings.relaxation.count("C")):
            starts = self._departures(level, ends, entry)
            points, ends = ends, self._travel(level, phis[level], starts, g)
        return self._corrected(level + 1, phis, entry, (ends, starts, points), kind), misfit

    def _corrected(
        self, coarse: int, phis: Sequence[StepMap], entry: Tensor, parts: tuple[Tensor, Tensor, Tensor], kind: str
    ) -> Tensor:
        """New C-points of the level before: the states of its coarse problem, solved by the ranks that have its steps.

        Args:
            parts: ends and starts of the intervals, and the C-points, as the level before leaves them.
        """
        move = self.moves[coarse]
        ends, starts, points = move.there(parts)
        if self.grids[coarse] is None:
            return move.back(ends)
        source = ends - phis[coarse](starts, ALL_STEPS)
        if coarse == self.last:
            return move.back(self._march(coarse, phis[coarse], entry, source))
        points = self._arrivals(coarse, points)
        for again in ("F", "V") if kind == "F" else ("V",):
            points, _ = self._cycle(coarse, phis, entry, points, source, again)
        return move.back(self._states(coarse, phis[coarse], self._departures(coarse, points, entry), source))

    def _start(self, phis: Sequence[StepMap], entry: Tensor, g: Tensor | None) -> Tensor:
        """C-points to begin with."""
        if self.settings.start == "constant":
            return entry.expand(-(-_present(self.grids[0]).n_local // self.factors[0]), *entry.shape).clone()
        return self._nested(1, phis, entry, _sums(g, self.factors[0]))

    def _nested(self, level: int, phis: Sequence[StepMap], entry: Tensor, g: Tensor | None) -> Tensor:
        """The states after the steps of a coarse level, which begins with those of the coarser ones."""
        move = self.moves[level]
        if g is not None:
            (g,) = move.there([g])
        if self.grids[level] is None:
            return move.back(entry.new_empty((0, *entry.shape)))
        if level == self.last:
            return move.back(self._march(level, phis[level], entry, g))
        points = self._nested(level + 1, phis, entry, _sums(g, self.factors[level]))
        return move.back(self._states(level, phis[level], self._departures(level, points, entry), g))

    def _travel(self, level: int, phi: StepMap, starts: Tensor, g: Tensor | None) -> Tensor:
        """The states at the ends of all intervals, from those at their starts: F-relaxation and the C-step."""
        if isinstance(phi, IntervalMap) and g is None:
            return phi.through(starts, self.factors[level])
        size = max(1024 * self.settings.cache // max(starts[0].numel() * starts.element_size(), 1), 1)
        if size >= len(starts):
            return self._through(level, phi, starts, g, 0)
        parts = ((k, starts[k : k + size]) for k in range(0, len(starts), size))
        return torch.cat([self._through(level, phi, part, g, k) for k, part in parts])

    def _through(self, level: int, phi: StepMap, starts: Tensor, g: Tensor | None, first: int) -> Tensor:
        """As `_travel`, for the intervals from `first` on."""
        u, m = starts, self.factors[level]
        begin, end = first * m, min((first + len(starts)) * m, _present(self.grids[level]).n_local)
        for j in reversed(range(m)) if self.adjoint else range(m):
            rows = slice(begin + j, end, m)
            count = len(range(begin + j, end, m))  # the last interval may be shorter
            if count == 0:
                continue
            arrived = phi(u[:count], rows)
            if g is not None:
                arrived = arrived + g[rows]
            u = arrived if count == len(u) else torch.cat([arrived, u[count:]])
        return u

    def _states(self, level: int, phi: StepMap, starts: Tensor, g: Tensor | None) -> Tensor:
        """The states after all steps of a level."""
        states = starts.new_empty((_present(self.grids[level]).n_local, *starts.shape[1:]))

        def kept(u: Tensor, rows: slice) -> Tensor:
            states[rows] = phi(u, rows)
            if g is not None:
                states[rows] += g[rows]
            return states[rows]

        self._travel(level, kept, starts, None)
        return states

    def _march(self, level: int, phi: StepMap, entry: Tensor, g: Tensor | None, keep: bool = True) -> Tensor:
        """The states after all steps of a level, one after the other, from rank to rank; or only the last of them."""
        grid = _present(self.grids[level])
        received = (grid.neighbors.receive_after if self.adjoint else grid.neighbors.receive_before)(entry)
        u = (entry if received is None else received)[None]
        if isinstance(phi, IntervalMap) and g is None and not keep:
            u = phi.through(u, grid.n_local)
            (grid.neighbors.send_before if self.adjoint else grid.neighbors.send_after)(u[0])
            return u
        states: list[Tensor] = []
        for i in reversed(range(grid.n_local)) if self.adjoint else range(grid.n_local):
            rows = slice(i, i + 1)
            u = phi(u, rows)
            if g is not None:
                u = u + g[rows]
            if not keep:
                states.clear()
            states.append(u)
        (grid.neighbors.send_before if self.adjoint else grid.neighbors.send_after)(u[0])
        return torch.cat(states[::-1] if self.adjoint else states)

    def _departures(self, level: int, points: Tensor, entry: Tensor) -> Tensor:
        """The states at which the intervals begin, from those at their ends; one message."""
        exchange = _present(self.grids[level]).neighbors.exchange
        if self.adjoint:
            after = exchange(points[0], toward=-1)
            return torch.cat([points[1:], (entry if after is None else after)[None]])
        before = exchange(points[-1], toward=+1)
        return torch.cat([(entry if before is None else before)[None], points[:-1]])

    def _arrivals(self, level: int, states: Tensor) -> Tensor:
        """The rows of all steps of a level that are its C-points, where its intervals end."""
        m = self.factors[level]
        if self.adjoint:
            return states[::m]
        points = states[m - 1 :: m]
        return points if len(states) % m == 0 else torch.cat([points, states[-1:]])  # a shorter interval ends early

    def _size(self, rows: Tensor) -> float:
        return math.sqrt(float(_present(self.grids[0]).sum(rows.double().square().sum().cpu())))


def points_among(states: Tensor, solver: Mgrit) -> Tensor:
    """The C-points of a solver among the states after all finest steps of this rank (adjoint: before them); a copy."""
    return solver._arrivals(0, states).clone()


def _sums(g: Tensor | None, factor: int) -> Tensor | None:
    """What enters in an interval, added up."""
    return None if g is None else interval_sums(g, factor)


def _present(grid: TimeGrid | None) -> TimeGrid:
    """The grid of a level on which this rank has steps."""
    assert grid is not None
    return grid
