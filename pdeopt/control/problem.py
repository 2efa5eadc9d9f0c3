"""`ControlProblem`: constraint, objective and time grid lifted to PETSc vectors.

The unknowns are x = [u | z] (states, then design variables: controls and, on rank 0, the global
parameters p) and the multiplier lam, each distributed as the time steps. `at(x)` gives a `Linearization`:
J, F and their derivatives at a point, a value with every operator that a solver needs.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from petsc4py import PETSc
from torch import Tensor

from pdeopt.control.constraint import TimeDependentConstraint, require_layout
from pdeopt.control.controlmap import ControlMap, StepControls
from pdeopt.control.linearization import InitialNode, Linearization
from pdeopt.control.objective import Objective, Sum, Tracking
from pdeopt.control.propagator import Propagator
from pdeopt.control.state_solve import solve_steps, solve_stretches
from pdeopt.control.stepjacobian import SparseStepJacobian, StepJacobian
from pdeopt.core.arrays import assign, free_garbage, real_array
from pdeopt.core.autodiff import jvp, plainly
from pdeopt.core.errors import InputError
from pdeopt.core.memory import DOUBLE, require_memory
from pdeopt.core.monitor import ControlResult, logged
from pdeopt.steps.sparse import StepMatrix
from pdeopt.steps.timegrid import Steps, TimeGrid
from pdeopt.steps.vectorlayout import Fields, VectorLayout
from pdeopt.steps.windows import chunks

ARGUMENTS = ("constraint", "objective", "grid", "control_map")

#: Copies of its unknowns that a problem takes at least: state, control, multiplier, their gradients, Jacobians.
COPIES = 6

#: Unknown states of linearizations after which what Python let go of is freed: that takes longer than a small solve.
GARBAGE = 1 << 13

#: Unknown states of a stretch of steps, and the fewest stretches into which all steps are cut.
STRETCH_UNKNOWNS, FEWEST_STRETCHES = 1 << 14, 8


def stretch_length(n: int) -> int:
    """The most steps of a stretch, for n unknowns of a state."""
    return max(STRETCH_UNKNOWNS // n, 1)


class ControlProblem:
    """min J(u, z, p) subject to F_i(u_{i-1}, u_i, z_i; p) = 0 for i = 1..N, u_0 = G(p).

    J = sum_{i=1}^N J_i(u_i, z_i; p) + J_0(u_0, 0; p). The problem lifts what a user wrote for a batch of steps to PETSc
    vectors over all of them; solvers see nothing else. All calls but the sizes are collective over `grid.comm`.

    Args:
        constraint: F and G.
        objective: the J_i.
        grid: the time steps and who owns them.
        control_map: z_step = E z; None where the design variables are one control a step.
        initial_state: u_0, (n,), or p -> u_0, (param_dim,) -> (n,); default the constraint's.

    Attributes:
        n, m, param_dim: unknowns of a state, controls of a step, global parameters.
        state_mass, control_mass, param_mass: the inner products that the constraint declares, checked once, here.
        layout: sizes of vectors on this rank, and the vectors themselves.
        controls: flat design controls -> rows (n_local, m), with its `adjoint`.
        initial: the node t_0: G, J_0 and their derivatives.
        propagator: solves with the state Jacobian over all steps, serial or parallel in time.

    Raises:
        InputError: functions that return another shape than (batch, n) or (batch,), another type than float64, or an
            initial state that is not finite; masses that are no inner products; rows of the control map that are not
            the steps; what terms of the objective refuse.

    Example:
        >>> problem = ControlProblem(constraint, Tracking(target) + ControlCost(1e-2), TimeGrid.uniform(100, T=1.0))
        >>> u = problem.solve_state(problem.create_design())
        >>> lin = problem.at(problem.join(u, problem.create_design()))
    """

    @plainly
    def __init__(
        self,
        constraint: TimeDependentConstraint,
        objective: Objective,
        grid: TimeGrid,
        control_map: ControlMap | None = None,
        initial_state: Any = None,
    ) -> None:
        _require_kinds(constraint, objective, grid, control_map)
        _require_space(constraint, objective, grid, control_map)
        self.constraint, self.objective, self.grid, self.control_map = constraint, objective, grid, control_map
        self.n, self.m, self.param_dim = _dimensions(constraint)
        _require_memory(self, self.n + grid.n_local * self.m)
        self._has_room = False  # for states, too: with few checkpoints nobody needs it
        self.state_mass = StepMatrix.form(constraint.state_mass, self.n, "constraint.state_mass")
        self.control_mass = StepMatrix.form(constraint.control_mass, self.m, "constraint.control_mass")
        self.param_mass = StepMatrix.form(constraint.param_mass, self.param_dim, "constraint.param_mass")
        self.initial_state = StateFunction(constraint.initial_state if initial_state is None else initial_state, self.n)
        self.initial = InitialNode(self.initial_state, objective, grid.node_zero, self.m)
        self.controls = StepControls(grid, self.m, control_map)
        self.layout = VectorLayout(grid, self.n, self.controls.size, self.param_dim)
        self.propagator = Propagator(grid)
        self._linearizations, self._garbage_period = 0, max(GARBAGE // (grid.num_steps * self.n), 1)
        _require_shapes(self)

    # -- vectors: those of the layout that a user needs -------------------------------------------------------

    @property
    def control_size(self) -> int:
        """Flat design controls of this rank, as bounds and starts have them."""
        return self.layout.control_size

    def create_primal(self) -> PETSc.Vec:
        """A zero vector x = [u | z | p]; entries of a rank in this order."""
        return self.layout.create_primal()

    def create_design(self) -> PETSc.Vec:
        """A zero vector of the design variables [z | p]."""
        return self.layout.create_design()

    def create_multiplier(self) -> PETSc.Vec:
        """A zero vector of states or multipliers, (n_local, n) on each rank."""
        return self.layout.create_multiplier()

    def create_kkt(self) -> PETSc.Vec:
        """A zero vector [u | z | p | lam]."""
        return self.layout.create_kkt()

    def fields(self, x: PETSc.Vec) -> Fields:
        """Copies of u (n_local, n), of the flat controls, and of p on all ranks."""
        return self.layout.fields(x)

    def unpack(self, result: ControlResult) -> Fields:
        """The states u_1..u_N, the flat controls and p of a result, as `fields` has them. Collective."""
        return self.layout.fields(self.layout.join(result.state, result.design))

    def join(self, u: PETSc.Vec, design: PETSc.Vec) -> PETSc.Vec:
        """A new x = [u | design]."""
        return self.layout.join(u, design)

    def split(self, x: PETSc.Vec) -> tuple[PETSc.Vec, PETSc.Vec]:
        """New vectors u and [z | p] with the entries of x."""
        return self.layout.split(x)

    # -- evaluations -----------------------------------------------------------------------------------------

    @cached_property
    def stretches(self) -> list[slice]:
        """Rows of this rank in stretches of steps, whose Jacobians need not be kept together; mostly a single one.

        Many steps that are unlike, on one rank, are several: what is evaluated for one of them stays in a core's cache,
        so that this costs no time, and memory is that of states and controls.
        """
        rows, length = self.grid.n_local, stretch_length(self.n)
        is_serial = self.grid.mpi.size == 1 and self.propagator.settings.propagator == "serial"
        if not is_serial or rows < FEWEST_STRETCHES * length or self.constraint.pattern is None:
            return [slice(0, rows)]
        p = torch.zeros(self.param_dim, dtype=torch.float64)
        u, z = self.initial_state(p).expand(2, -1), torch.zeros(2, self.m, dtype=torch.float64)
        first_and_last = self.grid.steps[:: rows - 1].with_parameters(p)
        jacobian = self.constraint.linearize(u, u, z, first_and_last)
        if isinstance(jacobian, SparseStepJacobian) and all(b.is_constant for b in jacobian.blocks.values()):
            return [slice(0, rows)]
        return [slice(chunk.begin, chunk.end) for chunk in chunks(0, rows, length)]

    @plainly
    def at(self, x: PETSc.Vec) -> Linearization:
        """J, F and their derivatives at x; work is done when asked for, once.

        Raises `InputError` where states and multipliers of all steps cannot fit into memory.
        """
        if not self._has_room:
            _require_memory(self, self.grid.n_local * (2 * self.n + self.m))
            self._has_room = True
        self._linearizations += 1
        if self._linearizations % self._garbage_period == 0:
            free_garbage(self.grid.comm)  # of the linearizations before
        return Linearization(
            self.constraint, self.objective, self.initial, self.layout, self.controls, x, self.stretches
        )

    @plainly
    @logged("pdeoptState")
    def solve_state(
        self, design: PETSc.Vec, guess: PETSc.Vec | None = None, jacobian: StepJacobian | None = None
    ) -> PETSc.Vec:
        """The state u(z, p) as a new vector.

        Newton's method on all steps at once, or on one of the `stretches` after the other, each linear solve one
        forward substitution without a loop over steps; where it does not contract, the steps are solved one by one.

        Args:
            design: [z | p].
            guess: a state to begin with; default u_i = u_0.
            jacobian: step Jacobians near the solution, from a design nearby; used while they serve.

        Raises:
            SolveFailure: no solution found in some step.
        """
        z, p = self.layout.design_fields(design)
        u0, steps = self.initial_state(p), self.grid.steps.with_parameters(p)
        start = None if guess is None else self.layout.rows(guess)
        if len(self.stretches) > 1 and jacobian is None:
            u = solve_stretches(self.constraint, u0, start, self.controls(z), steps, self.stretches)
        else:
            start = u0.expand(len(steps), -1) if start is None else start
            u = solve_steps(self.constraint, self.propagator, u0, start, self.controls(z), steps, jacobian)
        out = self.create_multiplier()
        assign(out, u)
        return out

    @plainly
    def constant_state(self, design: PETSc.Vec) -> PETSc.Vec:
        """u_i = u_0 for all i as a new vector: a start where nothing better is known."""
        _, p = self.layout.design_fields(design)
        out = self.create_multiplier()
        assign(out, self.initial_state(p).expand(self.grid.n_local, -1))
        return out

    @plainly
    @logged("pdeoptAdjoint")
    def solve_adjoint(self, lin: Linearization) -> PETSc.Vec:
        """lam with J_u + F_u' lam = 0 at the linearization, a new vector. Raises `SolveFailure`."""
        lam = self.propagator.backward(lin.jacobian, -lin.gradient_fields[0])
        out = self.create_multiplier()
        assign(out, lam)
        return out


class StateFunction:
    """p -> u_0 of a user as rows of double precision; one of NumPy or lists where it does not depend on p.

    Args:
        given: (param_dim,) -> (n,), or u_0 itself, which is copied unless it is a tensor that requires gradients.
        n: unknowns of a state.
    """

    def __init__(self, given: Any, n: int) -> None:
        is_parameter = isinstance(given, Tensor) and given.requires_grad
        u0 = given if is_parameter or callable(given) else real_array(given, "initial_state")
        self.function: Callable[[Tensor], Any] = given if callable(given) else lambda p: u0
        self.n = n

    def __call__(self, p: Tensor) -> Tensor:
        """u_0, (n,). Raises `InputError` for another shape or no real numbers."""
        u0 = self.recorded(p)
        return u0 if len(p) else u0.detach()

    def recorded(self, p: Tensor) -> Tensor:
        """The same with the graph of what the user computed it from."""
        u0 = self.function(p)
        if not isinstance(u0, Tensor) or u0.is_complex():
            u0 = torch.from_numpy(np.ma.filled(real_array(u0, "initial_state(p)"), np.nan))  # type: ignore[no-untyped-call]
        if tuple(u0.shape) != (self.n,):
            raise InputError("initial_state(p)", f"shape {tuple(u0.shape)}", f"shape ({self.n},)")
        return u0.to(torch.float64)


def _require_memory(problem: ControlProblem, numbers: int) -> None:
    """Refuse a problem with so many numbers in all steps of this rank that a few copies of them cannot fit."""
    sizes = f"{problem.grid.num_steps} steps of {problem.n} states and {problem.m} controls"
    require_memory(COPIES * DOUBLE * numbers, "problem", sizes, "a smaller one, or with TAO -reduced_checkpoints")


def _require_kinds(constraint: object, objective: object, grid: object, control_map: object) -> None:
    kinds = (TimeDependentConstraint, Objective, TimeGrid, ControlMap | None)
    for what, found, kind in zip(ARGUMENTS, (constraint, objective, grid, control_map), kinds):
        if not isinstance(found, kind):
            raise InputError(what, type(found).__name__, getattr(kind, "__name__", "ControlMap or None"))


def _require_space(constraint: TimeDependentConstraint, objective: Objective, grid: TimeGrid, E: object) -> None:
    """Refuse what would be wrong in silence where several ranks share a step: a constraint that takes its rows for
    whole ones, a layout of other ranks, terms of the objective that would be counted by each rank."""
    require_layout(constraint, grid)
    k = grid.space_ranks
    if k == 1:
        return
    if constraint.layout is None:
        got = f"{type(constraint).__name__} with whole rows, {k} ranks a step"
        raise InputError("constraint", got, "a SpaceConstraint with a layout on grid.space_comm, or space_ranks 1")
    if E is not None:
        raise InputError("control_map", f"one with {k} ranks a step", "one control a step, or space_ranks 1")
    for term in objective.terms if isinstance(objective, Sum) else [objective]:
        if not term.adds_up:
            legal = "Tracking | ControlCost | a term with adds_up = True, whose values add up over the ranks of a step"
            raise InputError("objective", f"{type(term).__name__} with {k} ranks a step", legal)


def _dimensions(constraint: TimeDependentConstraint) -> tuple[int, int, int]:
    """n, m and the number of parameters."""
    found = []
    for name, least in (("state_dim", 1), ("control_dim", 0), ("param_dim", 0)):
        try:
            dim = operator.index(getattr(constraint, name, None))  # type: ignore[arg-type]
        except TypeError:
            dim = -1
        if dim < least:
            got = getattr(constraint, name, "nothing")
            raise InputError(f"{type(constraint).__name__}.{name}", got, f"an integer >= {least}")
        found.append(dim)
    return found[0], found[1], found[2]


def _require_shapes(problem: ControlProblem) -> None:
    n, m, p = problem.n, problem.m, torch.zeros(problem.param_dim, dtype=torch.float64)
    u0 = problem.initial_state(p)
    if not u0.isfinite().all():
        raise InputError("initial_state(p)", "NaN or infinite entries", "finite numbers")
    problem.objective.check(n, m, problem.grid)
    steps = problem.grid.steps.with_parameters(p)
    most = stretch_length(n)  # of very many steps, those at both ends do
    for part in [steps] if len(steps) <= 2 * most else [steps[:most], steps[-most:]]:
        _require_shapes_of(problem, u0, part)
    if problem.grid.space_ranks == 1:
        _require_look_back(problem, u0)


def _require_shapes_of(problem: ControlProblem, u0: Tensor, steps: Steps) -> None:
    rows = len(steps)
    u, z = u0.expand(rows, -1), torch.zeros(rows, problem.m, dtype=torch.float64)
    functions: dict[str, tuple[Callable[..., Any], tuple[Any, ...], tuple[int, ...]]]
    functions = {"residual": (problem.constraint.residual, (u, u, z, steps), (rows, problem.n))}
    for term in problem.objective.terms if isinstance(problem.objective, Sum) else [problem.objective]:
        functions[f"objective {type(term).__name__}"] = (term.value, (u, z, steps), (rows,))
    for name, (function, arguments, shape) in functions.items():
        _require_tensor(f"{name} of {rows} steps", function(*arguments), shape)
        if problem.grid.space_ranks == 1:  # else it would send messages, or not, as each rank finds
            _require_torch(name, function, tuple(x[:1] for x in arguments))


def _require_look_back(problem: ControlProblem, u0: Tensor) -> None:
    """Refuse an equation without time as the one step of a grid, where the trapezoidal rule would halve its tracking
    term and count that of u_0, in silence."""
    grid, terms = problem.grid, problem.objective.terms if isinstance(problem.objective, Sum) else [problem.objective]
    if grid.num_steps > 1 or not len(grid.node_zero):
        return
    if any(isinstance(term, Tracking) and term.measurements.is_integral for term in terms):
        u, z = u0[None], torch.zeros(1, problem.m, dtype=torch.float64)
        steps = grid.steps.with_parameters(torch.zeros(problem.param_dim, dtype=torch.float64))
        with torch.enable_grad():
            looks_back = problem.constraint.residual(u.clone().requires_grad_(), u, z, steps).requires_grad
        pattern = problem.constraint.pattern  # what UFL differentiates is on the tape whatever it depends on
        if grid.all(not looks_back or (pattern is not None and pattern.B.nnz == 0)):  # of the rows of all ranks
            got = "one step that does not depend on u_old: Tracking would be halved, and count u_0"
            legal = (
                "pdeopt.stationary(residual, objective, ...) or SingleNode() without time, or Tracking with a weight"
            )
            raise InputError("grid", got, legal)


def _require_torch(what: str, function: Callable[..., Tensor], arguments: tuple[Any, ...]) -> None:
    """Raise `InputError` where NumPy stands between the arguments and the result, so that nothing can differentiate.

    Where the tape of PyTorch shows that the result depends on an argument, or its values show that it does not, nothing
    does; else a derivative tells, for which PyTorch loads much that a problem with derivatives of its own never needs.
    """
    *fields, steps = arguments
    try:
        for k, x in enumerate(fields):

            def of_one(y: Tensor, before: Any = fields[:k], after: Any = fields[k + 1 :]) -> Tensor:
                return function(*before, y, *after, steps)

            with torch.enable_grad():  # parameters of a module, which count as constants, may be on the tape as well
                found, plain = of_one(x.detach().clone().requires_grad_()), of_one(x)
            elsewhere = torch.linspace(0.5, 1.5, x.numel(), dtype=x.dtype).reshape(x.shape)
            is_on_tape = found.requires_grad and not plain.requires_grad
            if not (is_on_tape or torch.equal(plain, of_one(elsewhere))):
                jvp(of_one, (x,), (torch.ones_like(x),))
    except RuntimeError as error:
        if "numpy" in str(error) or "data pointer" in str(error):  # of a tensor that is being differentiated
            legal = "torch functions of the states and controls; NumPy does for what does not depend on them"
            raise InputError(what, f"a conversion to NumPy ({error})", legal) from error


def _require_tensor(what: str, found: object, shape: tuple[int, ...]) -> None:
    legal = f"a torch tensor of shape {shape} and type float64, by torch functions, which can be differentiated"
    if not isinstance(found, Tensor):
        raise InputError(what, type(found).__name__, legal)
    if tuple(found.shape) != shape or found.dtype != torch.float64:
        raise InputError(what, f"shape {tuple(found.shape)} and type {found.dtype}", legal)
