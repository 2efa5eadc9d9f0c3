"""The reduced objective without its trajectory: few states are kept, and the others are solved for again.

The steps of a rank are cut into stretches. The state before a stretch is what a checkpoint holds; binomial schedules
say which ones to keep, and from which to go on (A. Griewank, A. Walther, Algorithm 799: revolve, ACM TOMS 26, 2000;
P. Stumm, A. Walther, MultiStage approaches for optimal offline checkpointing, SIAM J. Sci. Comput. 31, 2009). They come
from the library `checkpoint-schedules`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from petsc4py import PETSc
from torch import Tensor

from pdeopt.control.problem import ControlProblem, stretch_length
from pdeopt.control.propagator import from_rank_to_rank
from pdeopt.control.state_solve import adjoint_of_steps, solve_stretches
from pdeopt.core.arrays import free_garbage, writable
from pdeopt.core.errors import InputError, SolveFailure, agree
from pdeopt.core.memory import DOUBLE
from pdeopt.core.settings import Settings, setting
from pdeopt.steps.innerproduct import InnerProduct
from pdeopt.steps.windows import chunks


@dataclass(frozen=True)
class CheckpointSettings(Settings, prefix="reduced_"):
    """States that the reduced objective keeps."""

    checkpoints: int = setting(
        0, "states kept by an evaluation, on each rank; the others are solved for again; 0 keeps all", at_least=0
    )
    checkpoints_disk: str = setting("", "folder in which they are kept; default in memory")


class ReducedPoint(NamedTuple):
    """The reduced objective at a design.

    Attributes:
        value: J.
        gradient: flat, of the design variables of this rank, (design_size,).
        feasibility: norm of the constraint's residual at the state that was found.
    """

    value: float
    gradient: Tensor
    feasibility: float


class CheckpointedSweeps:
    """States and adjoints of a problem by stretches of steps, with few states in memory or on disk.

    Beside them there are the states and the Jacobian of one stretch, and vectors of the size of the design. Each rank
    keeps states of its own steps, and the ranks work one after the other.

    Args:
        problem: the control problem.
        settings: how many states are kept, and where.

    Attributes:
        stretches: rows of this rank.
        solved: stretches whose states were found so far, in all evaluations.

    Raises:
        InputError: the library `checkpoint-schedules` is missing; a folder that cannot be written; -propagator mgrit,
            which solves for all steps at once.
    """

    def __init__(self, problem: ControlProblem, settings: CheckpointSettings) -> None:
        self.problem, self.settings, self.library = problem, settings, _library()
        if problem.propagator.settings.propagator != "serial":
            raise InputError("-propagator with -reduced_checkpoints", problem.propagator.settings.propagator, "serial")
        cut = chunks(0, problem.grid.n_local, stretch_length(problem.n))
        self.stretches = [slice(stretch.begin, stretch.end) for stretch in cut]
        self._storage()  # a folder that is none is found here
        self.mass, self.solved = InnerProduct(torch.ones(1, dtype=torch.float64), problem.state_mass), 0

    def value(self, design: PETSc.Vec) -> float:
        """J(u(z, p), z, p) by one sweep forward, which keeps nothing. Collective. Raises `SolveFailure`."""
        sweep = _Sweep(self, design)
        sweep.over_ranks(lambda: sweep.advance(0, len(self.stretches)))
        return sweep.value()

    def evaluate(self, design: PETSc.Vec, multiplier: Tensor | None = None) -> ReducedPoint:
        """J and its gradient, by a schedule. Collective.

        Args:
            design: [z | p].
            multiplier: rows for the adjoint, (n_local, n); None where it is not asked for.

        Raises:
            SolveFailure: a step has no solution or a singular Jacobian; on all ranks.
        """
        sweep, actions = _Sweep(self, design, adjoint=multiplier, kept=self._storage()), self._actions()
        sweep.over_ranks(lambda: sweep.follow(actions, self.library.EndForward))
        sweep.back_over_ranks(lambda: sweep.follow(actions, self.library.EndReverse))
        return ReducedPoint(sweep.value(), sweep.gradient(), sweep.feasibility())

    def state(self, design: PETSc.Vec) -> PETSc.Vec:
        """u(z, p) at all steps, a new vector. Collective. Raises `SolveFailure`."""
        out = self.problem.create_multiplier()
        with writable(out) as entries:
            sweep = _Sweep(self, design, states=entries.reshape(-1, self.problem.n))
            sweep.over_ranks(lambda: sweep.advance(0, len(self.stretches)))
        return out

    def multiplier(self, design: PETSc.Vec) -> PETSc.Vec:
        """The adjoint at all steps, a new vector. Collective. Raises `SolveFailure`."""
        out = self.problem.create_multiplier()
        with writable(out) as entries:
            self.evaluate(design, entries.reshape(-1, self.problem.n))
        return out

    def _actions(self) -> Iterator[Any]:
        """The schedule of an evaluation."""
        in_memory, on_disk = self.settings.checkpoints, 0
        if self.settings.checkpoints_disk:
            in_memory, on_disk = on_disk, in_memory
        return iter(self.library.MultistageCheckpointSchedule(len(self.stretches), in_memory, on_disk))

    def _storage(self) -> InMemory | OnDisk:
        folder = self.settings.checkpoints_disk
        most, n = min(self.settings.checkpoints, len(self.stretches)), self.problem.n
        return OnDisk(n, folder) if folder else InMemory(most, n)


class _Sweep:
    """One evaluation at a design, over the stretches of this rank: the state forward, the adjoint back.

    Args:
        sweeps: whose stretches they are.
        design: [z | p].
        states, adjoint: rows in which states and multipliers are written, (n_local, n); None where they are not asked
            for.
        kept: the checkpoints, where a schedule is followed.
    """

    def __init__(
        self,
        sweeps: CheckpointedSweeps,
        design: PETSc.Vec,
        states: Tensor | None = None,
        adjoint: Tensor | None = None,
        kept: InMemory | OnDisk | None = None,
    ) -> None:
        problem = sweeps.problem
        self.sweeps, self.grid = sweeps, problem.grid
        self.constraint, self.objective, self.controls = problem.constraint, problem.objective, problem.controls
        self.initial = problem.initial
        self.states, self.adjoint, self.kept = states, adjoint, kept
        z, self.p = problem.layout.design_fields(design)
        self.z, self.steps = problem.controls(z), problem.grid.steps.with_parameters(self.p)
        self.before = problem.initial_state(self.p)  #: the state before the next stretch
        self.turned: tuple[Tensor, Tensor] | None = None  #: of a stretch: the state before it, and its states
        self.following = torch.zeros_like(self.before)  #: B_{i+1}'lam_{i+1} of the step after the last stretch
        self.measured = 0  #: stretches that J and the residual know
        self.J, self.residual_square = (torch.zeros((), dtype=torch.float64) for _ in range(2))
        self.g_z, self.g_p = torch.empty(0), torch.zeros_like(self.p)

    # -- what a schedule may ask for -----------------------------------------------------------------------------

    def follow(self, actions: Iterator[Any], end: type) -> None:
        """Do what the schedule says, until an action of the kind `end`."""
        library, kept = self.sweeps.library, self.kept
        assert kept is not None
        for action in actions:
            if isinstance(action, end):
                return
            if isinstance(action, library.Forward):
                if action.write_ics:
                    kept[action.n0] = self.before
                self.advance(action.n0, action.n1)
            elif isinstance(action, library.Reverse):
                self.turn(action.n0)
            else:  # to copy, or to move
                self.before = kept[action.n]
                if isinstance(action, library.Move):
                    del kept[action.n]

    def advance(self, begin: int, end: int) -> None:
        """Find the states of the stretches begin to end - 1; those of the last one are there for `turn`."""
        for k in range(begin, end):
            rows, before = self.sweeps.stretches[k], self.before
            z, steps = self.z[rows], self.steps[rows]
            u = solve_stretches(self.constraint, before, None, z, steps, [slice(0, len(z))])
            self.turned, self.before = (before, u), u[-1].clone()
            self.sweeps.solved += 1
            free_garbage(PETSc.COMM_SELF)  # triangles of a stretch, which petsc4py would queue to the end
            if k == self.measured:
                self._measure(rows, before, u)

    def _measure(self, rows: slice, before: Tensor, u: Tensor) -> None:
        """What a stretch adds to J, and to |F|^2, the sum of F_i'(dt_i M)^-1 F_i."""
        z, steps = self.z[rows], self.steps[rows]
        self.J = self.J + self.objective.value(u, z, steps).sum()
        r = self.constraint.residual(torch.cat([before[None], u[:-1]]), u, z, steps)
        self.residual_square = self.residual_square + ((r * self.sweeps.mass.solve(r)).sum(1) / steps.dt).sum()
        if self.states is not None:
            self.states[rows] = u
        self.measured += 1

    def turn(self, k: int) -> None:
        """The adjoint of stretch k, whose states were found last."""
        assert self.turned is not None
        rows, (before, u) = self.sweeps.stretches[k], self.turned
        self.turned = None
        part = before, u, self.z[rows], self.steps[rows], self.following
        lam, self.g_z[rows], g_p, self.following = adjoint_of_steps(self.constraint, self.objective, *part)
        self.g_p = self.g_p + g_p
        if self.adjoint is not None:
            self.adjoint[rows] = lam

    # -- from rank to rank ---------------------------------------------------------------------------------------

    def over_ranks(self, forward: Callable[[], None]) -> None:
        """Forward from the last state of the rank before. Raises `SolveFailure` on all ranks."""

        def sweep(before: Tensor) -> Tensor:
            self.before = before
            forward()
            return self.before[None]

        from_rank_to_rank(self.grid, self.before, self.before[None], sweep)

    def back_over_ranks(self, backward: Callable[[], None]) -> None:
        """Back from what the rank after says of this one's last state. Raises `SolveFailure` on all ranks."""
        known, failure = self.grid.neighbors.receive_after(self.following), None
        self.following, self.g_z = self.following if known is None else known, torch.empty_like(self.z)
        try:
            backward()
        except SolveFailure as broken:
            self.following, failure = torch.full_like(self.following, torch.nan), broken.bare()
        self.grid.neighbors.send_before(self.following)
        agree(self.grid.mpi, failure)

    # -- what was found ------------------------------------------------------------------------------------------

    def value(self) -> float:
        return float(self.grid.sum(self.J + self.initial.value(self.p) if self.grid.is_first else self.J))

    def feasibility(self) -> float:
        return float(self.grid.sum(self.residual_square).clamp(min=0.0).sqrt())

    def gradient(self) -> Tensor:
        """[J_z + F_z'lam | J_p + F_p'lam + G'(p)'(...)], flat."""
        g = self.controls.adjoint(self.g_z)
        if not len(self.p):
            return g
        if self.grid.is_first:
            self.g_p = self.g_p + self.initial.gradient(self.p) + self.initial.vjp(self.p, self.following)
        g_p = self.grid.sum(self.g_p)
        return torch.cat([g, g_p]) if self.grid.is_root else g


# -- where checkpoints are -------------------------------------------------------------------------------------


class InMemory:
    """States by the number of the stretch that follows them, in one block.

    (Small arrays that stay, each made after a stretch, would leave holes between them that the next one does not fit
    into: over a million steps that was a gigabyte.)

    Args:
        most: so many at a time.
        n: unknowns of a state.
    """

    def __init__(self, most: int, n: int) -> None:
        self._states = torch.empty(most, n, dtype=torch.float64)
        self._places, self._free = dict[int, int](), list(reversed(range(most)))

    def __setitem__(self, k: int, state: Tensor) -> None:
        self._places[k] = self._free.pop()
        self._states[self._places[k]] = state

    def __getitem__(self, k: int) -> Tensor:
        return self._states[self._places[k]].clone()

    def __delitem__(self, k: int) -> None:
        self._free.append(self._places.pop(k))


class OnDisk:
    """States in a file that has no name, and is gone with the process, however that ends.

    Args:
        n: unknowns of a state.
        folder: on the disk.

    Raises:
        InputError: a folder in which no file can be made.
    """

    def __init__(self, n: int, folder: str) -> None:
        try:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (open until the sweeps are done)
        except OSError as error:
            raise InputError(
                "-reduced_checkpoints_disk", f"{folder} ({error.strerror})", "a folder to write in"
            ) from None
        self._n, self._places, self._free = n, dict[int, int](), list[int]()

    def __setitem__(self, k: int, state: Tensor) -> None:
        place = self._places[k] = self._free.pop() if self._free else len(self._places)
        self._file.seek(place * DOUBLE * self._n)
        self._file.write(state.numpy().tobytes())

    def __getitem__(self, k: int) -> Tensor:
        self._file.seek(self._places[k] * DOUBLE * self._n)
        return torch.from_numpy(np.frombuffer(bytearray(self._file.read(DOUBLE * self._n))))

    def __delitem__(self, k: int) -> None:
        self._free.append(self._places.pop(k))


def _library() -> ModuleType:
    """`checkpoint_schedules`, which only these sweeps need."""
    try:
        return import_module("checkpoint_schedules")
    except ImportError:
        legal = "pip install 'checkpoint-schedules>=1.0.4', or pdeopt[checkpoints]; or 0, to keep all states"
        raise InputError("-reduced_checkpoints", "no library checkpoint-schedules", legal) from None
