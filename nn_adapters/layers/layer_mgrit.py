"""The solver of a chain of network steps: MGRIT for states and for adjoints, and what it remembers from call to call.

The function of autograd is `layersolve.solve_layers`. What long steps are on coarse levels, and their controls, is in
`coarsening` (S. Guenther, L. Ruthotto, J. B. Schroder, E. C. Cyr, N. R. Gauger, Layer-parallel training of deep
residual neural networks, SIAM J. Math. Data Sci. 2, 2020).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from mpi4py import MPI
from torch import Tensor

from nn_adapters.layers.parts.context import communicator_name
from nn_adapters.layers.parts.costs import Seen, mgrit_cost, serial_cost
from nn_adapters.layers.parts.intervalfit import IntervalFit
from nn_adapters.layers.parts.layerstep import StepLength
from pdeopt.core.errors import InputError
from pdeopt.steps.exchange.parcels import from_rank
from pdeopt.steps.mgrit import Mgrit, MgritSettings
from pdeopt.steps.timegrid import TimeGrid
from pdeopt.steps.transfer import whole_intervals


class Solvers(NamedTuple):
    """Of states and of adjoints, and the coarsening factor of each level but the coarsest."""

    forward: Mgrit
    adjoint: Mgrit
    factors: list[int]


class LayerMgrit:
    """MGRIT for the states of a chain of steps and for their adjoints, over the ranks of a communicator.

    A copy is on the same communicator; pickled, it comes back on `MPI.COMM_WORLD` or on one process alone.

    Args:
        num_steps, Tf: N steps over the time Tf, dt = Tf / N.
        comm: a PETSc or mpi4py communicator. Each rank has whole intervals of the finest steps.
        settings: levels, factors, cycles and tolerance.

    Attributes:
        grid: the distribution of the steps over the ranks.
        factors: the coarsening factor of each level but the coarsest.
        forward, adjoint: the solvers; their `cycles` may be changed between calls.
        exact: solvers that go one step after the other, on the same ranks.
        residuals: relative residuals of the last forward and adjoint solve, where a tolerance asks for them.
        shortest: dt of a layer.
        stages: evaluations of a layer in a long step, and what a fitted one has beside them.
        fit: of long steps to the batches so far; None where the settings do not ask for it.
        seen: the sizes of the last call.
        is_serial: whether to go one step after the other from now on.
        repeats: solves that diverged, and were repeated one step after the other.
        gaps, rough: `misfits` and `roughness` as they are kept; after a capture, where they are.
        dt_on: dt of levels whose steps are not alike, on the devices of states.
        captured: of solves in CUDA graphs, none of which repeats itself, for who replays them: whether it is one of
            adjoints, and `Outcome.gap`.

    Raises:
        InputError: coarsening factors below 2, or fewer intervals than ranks; fitted long steps of several coarse
            levels; when pickled, a communicator of some of several ranks; when read, another number of ranks.
    """

    def __init__(self, num_steps: int, Tf: float, comm: Any, settings: MgritSettings) -> None:
        self.settings = settings
        factors, uniform = settings.factors(num_steps), TimeGrid.uniform(num_steps, Tf, comm)
        offsets = whole_intervals(num_steps, factors, uniform.mpi.size)
        self.grid = TimeGrid(uniform.times, comm, offsets)
        self.forward, self.adjoint, self.factors = self._solvers(factors)
        self.exact = self._solvers([])
        self.dt = [0.0 if grid is None else _common(grid.steps.dt) for grid in self.forward.grids]
        self.shortest = float(self.grid.steps.dt.max())
        self.stages = 1.0
        self.fit = IntervalFit() if settings.long_steps == "fitted" and factors else None
        if self.fit is not None and len(factors) > 1:
            raise InputError("-layer_mgrit_long_steps", f"fitted with {1 + len(factors)} levels", "fitted with two")
        self.seen = Seen()
        self.is_serial, self.repeats = False, 0
        self.residuals: tuple[list[float], list[float]] = ([], [])
        self.captured: list[tuple[bool, Tensor]] = []
        self.gaps: tuple[float | Tensor, float | Tensor] = (0.0, 0.0)
        self.rough: float | Tensor = 0.0
        self.dt_on: dict[tuple[int, torch.device], Tensor] = {}
        self.guess: Tensor | None = None
        self._has_warned = False

    def _solvers(self, factors: list[int]) -> Solvers:
        forward, adjoint = (Mgrit(self.grid, factors, self.settings, adjoint) for adjoint in (False, True))
        return Solvers(forward, adjoint, factors)

    @property
    def solvers(self) -> Solvers:
        """Those that serve now."""
        return Solvers(self.forward, self.adjoint, self.factors)

    @property
    def misfits(self) -> tuple[float, float]:
        """Of the C-points of the last forward and adjoint solve, or of the last replay of a CUDA graph with it.

        See `Outcome`. Where a graph has left them, their device is asked.
        """
        forward, adjoint = map(float, self.gaps)
        return forward, adjoint

    @property
    def roughness(self) -> float:
        """Of the controls of the last solve, see `coarsening.roughness`; their device is asked."""
        return float(self.rough)

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerMgrit:
        new = copy.copy(self)
        new.forward, new.adjoint = copy.copy(self.forward), copy.copy(self.adjoint)
        new.guess = None if self.guess is None else self.guess.clone()
        new.captured, new.dt_on, new.gaps, new.rough = [], {}, self.misfits, self.roughness
        return new

    def __reduce__(self) -> tuple[Any, ...]:
        grid, state = self.grid, (self.forward.cycles, self.adjoint.cycles, self.is_serial, self.fit)
        where = (communicator_name(grid.mpi), grid.begin, grid.end)
        return _rebuild, (grid.num_steps, float(grid.times[-1]), self.settings, where, state)

    def look(self, u0: Tensor, parameters: Sequence[Tensor], share: float = 0.0) -> None:
        """Take note, before a solve, of how much a layer has to do.

        Args:
            u0: a state.
            parameters: of the layers, (layers, ...) each, or those that all layers share.
            share: where layers share them, that of the samples which a rank has at most, see `Seen`; 0 elsewhere.
        """
        self.seen = Seen(u0.numel(), [p.shape if share else p.shape[1:] for p in parameters], share)

    def is_dear(self) -> bool:
        """Whether cycles have no less to do, by counts, than one layer after the other on one rank, or by samples."""
        is_local = self.grid.mpi.size == 1 or self.seen.share > 0
        may_be = bool(self.factors) and is_local and self.settings.serial == "auto"
        return may_be and mgrit_cost(self) >= serial_cost(self)

    @contextmanager
    def one_by_one(self) -> Iterator[None]:
        """Inside, go one step after the other, on the same ranks: nothing is approximated."""
        kept = self.solvers
        self.forward, self.adjoint, self.factors = self.exact
        try:
            yield
        finally:
            self.forward, self.adjoint, self.factors = kept

    def warm(self, u0: Tensor) -> Tensor | None:
        """The C-points of the last solve, where the settings start there and the states are alike."""
        guess = self.guess if self.settings.start == "warm" else None
        alike = guess is not None and (guess.shape[1:], guess.dtype, guess.device) == (u0.shape, u0.dtype, u0.device)
        return guess if alike else None

    def warn_of_divergence(self, which: str, misfit: float, exact: Tensor) -> None:
        """Warn, once, where cycles went astray and an exact solve did not, so that the input is not to blame."""
        self.guess, self.repeats = None, self.repeats + 1
        if self._has_warned or self.grid.mpi.rank > 0 or not bool(exact.isfinite().all()):
            return
        self._has_warned = True
        warnings.warn(
            f"the {which} cycles over {self.grid.num_steps} layers diverged (relative misfit {misfit:.1e}); such "
            "solves are repeated one layer after the other: right, but slow. Try more cycles (-layer_mgrit_cycles), a "
            "smaller -layer_mgrit_coarsening, or smaller first weights",
            RuntimeWarning,
            stacklevel=3,
        )

    def last_to_all(self, state: Tensor) -> Tensor:
        """`state` of the last rank on all ranks. Collective."""
        return from_rank(self.grid.mpi, state, self.grid.mpi.size - 1)

    def first_to_all(self, state: Tensor) -> Tensor:
        """`state` of rank 0 on all ranks. Collective."""
        return from_rank(self.grid.mpi, state, 0)


def _rebuild(
    num_steps: int, Tf: float, settings: MgritSettings, where: tuple[str, int, int], state: tuple[Any, ...]
) -> LayerMgrit:
    """The solver that was pickled."""
    name, begin, end = where
    found = LayerMgrit(num_steps, Tf, getattr(MPI, name), settings)
    if (found.grid.begin, found.grid.end) != (begin, end):
        own = f"{found.grid.begin + 1} to {found.grid.end}"
        raise InputError("pickled layers", f"{begin + 1} to {end} for a rank that has {own}", "as many ranks as then")
    found.forward.cycles, found.adjoint.cycles, found.is_serial, *fit = state
    found.fit = fit[0] if fit else found.fit  # there is none in pickles of versions without
    return found


def _common(dt: Tensor) -> StepLength:
    return float(dt[0]) if bool((dt - dt[0]).abs().max() <= 1e-12 * dt[0].abs()) else dt
