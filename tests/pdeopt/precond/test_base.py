"""What every preconditioner has: a life cycle, a view, and the way from a matrix that the user made."""

import re

import pytest
import torch
from petsc4py import PETSc

from pdeopt.control.metric import RieszMetric
from pdeopt.control.verify import randomize
from pdeopt.core.errors import SolveFailure, as_raised
from pdeopt.kkt.operator import KKTOperator
from pdeopt.precond.base import Preconditioner
from pdeopt.precond.blockjacobi import TimeBlockJacobi
from pdeopt.precond.operator import blocks_of, operator_of
from pdeopt.precond.timemg import TimeMultigridPC
from pdeopt.precond.wathen import WathenPC
from pdeopt.steps.stepsolve import step_solver
from tests.helpers import examples
from tests.helpers.krylov import heat, iterations, operator_at_zero, preconditioner, solver
from tests.helpers.matrices import densify
from tests.helpers.oracle import Oracle
from tests.helpers.support import entries, relative


class StepByStep(Preconditioner):
    """diag(W, A W^-1 A')^-1.

    The example of the base class.
    """

    def update(self, pc):
        self.blocks = blocks_of(pc.getOperators()[1])
        self.steps = step_solver(self.blocks.A)

    def apply(self, pc, x, y):
        g, c = self.blocks.layout.kkt_fields(x)
        lam = self.steps.solve(self.blocks.state.multiply(self.steps.solve(c)), transpose=True)
        self.blocks.layout.pack(y, *self.blocks.inverse(g), lam)


def test_the_example_of_an_own_preconditioner_is_the_matrix_that_it_says():
    problem = heat(4)
    operator = operator_at_zero(problem)
    blocks = blocks_of(operator.shell())
    K = Oracle(problem).kkt(torch.zeros(problem.layout.kkt_size, dtype=torch.float64), "gauss-newton")
    states, primal = problem.layout.state_size, problem.layout.primal_size
    W, A = K[:primal, :primal], torch.block_diag(*densify(blocks.A).expand(4, -1, -1))
    lower = A @ torch.linalg.solve(W[:states, :states], A.T)
    expected = torch.linalg.inv(torch.block_diag(W, lower))
    assert relative(preconditioner(operator, StepByStep()), expected) <= 1e-10
    assert iterations(operator, StepByStep(), kind="minres") < 40  # positive definite: MINRES may use it


class Watched(Preconditioner):
    """The identity, which writes down what is asked of it."""

    def __init__(self, fails=False):
        self.calls, self.fails = [], fails

    def initialize(self, pc):
        super().initialize(pc)
        self.calls.append("initialize")

    def update(self, pc):
        self.calls.append("update")
        self.own(lambda: self.calls.append("free first"), lambda: self.calls.append("free last"))
        if self.fails:
            raise SolveFailure("no factors", "none")

    def apply(self, pc, x, y):
        x.copy(y)


def test_it_is_initialized_once_updated_with_the_matrix_and_freed_in_reverse():
    context, operator = Watched(), operator_at_zero(heat(4))
    with solver(operator, context, prefix="watched_") as ksp:
        ksp.getPC().setUp()
        assert context.prefix == "watched_"
        ksp.getOperators()[0].stateIncrease()
        ksp.getPC().setUp()
        ksp.getPC().setUp()  # nothing has changed
        assert context.calls == ["initialize", "update", "free last", "free first", "update"]
    assert context.calls[-2:] == ["free last", "free first"]


def test_a_failure_comes_out_of_petsc_as_it_was_raised():
    failure = SolveFailure("no pivot", "another")
    with pytest.raises(SolveFailure) as found, as_raised():
        try:
            raise failure
        except SolveFailure as inner:
            raise PETSc.Error(101) from inner
    assert found.value is failure
    with pytest.raises(PETSc.Error), as_raised():
        raise PETSc.Error(101)


def test_a_failure_of_update_is_that_of_the_solve():
    with pytest.raises(SolveFailure, match="no factors"):
        preconditioner(operator_at_zero(heat(4)), Watched(fails=True))


def viewed(context, steps, tmp_path):
    """What -ksp_view prints of a preconditioner of this many steps."""
    path = str(tmp_path / "view.txt")
    with solver(operator_at_zero(heat(steps)), context, prefix="viewed_") as ksp:
        ksp.setUp()
        viewer = PETSc.Viewer().createASCII(path)
        ksp.view(viewer)
        viewer.destroy()
    return [line.strip() for line in open(path)]


WATHEN = ["Python: pdeopt.precond.schur.PropagatedSchur"]
MGRIT = [
    *WATHEN,
    "Schur complement: matched",
    "propagator: mgrit, windows of 4 steps, cycles: 3",
    "levels: 2, of 16, 4 steps",
]


@pytest.mark.parametrize(
    "words, lines",
    [
        (dict(wathen_propagator="mgrit", mgrit_window=4, mgrit_cycles=3), MGRIT),
        (dict(wathen_propagator="mgrit", mgrit_window=2, mgrit_levels=2), ["levels: 2, of 16, 8 steps"]),
        (dict(wathen_propagator="window", mgrit_window=4), [*WATHEN, "propagator: window, 16 steps in windows of 4"]),
        (dict(), [*WATHEN, "propagator: forward, 16 steps one after the other"]),
        (
            dict(wathen_schur="new_state"),
            ["Schur complement: new_state", "propagator: window, 16 steps in windows of 1"],
        ),
        (dict(wathen_schur="exact"), ["Schur complement: exact, by factors of the KKT matrix"]),
        (
            dict(wathen_propagator="multigrid"),
            ["type is MULTIPLICATIVE, levels=3 cycles=w"]
            + [f"Schur complement: matched diagonal blocks of {steps} steps" for steps in (8, 16)],
        ),
    ],
)
def test_the_view_tells_schur_complement_propagator_window_and_levels(options, tmp_path, words, lines):
    options(**words)
    found = viewed(WathenPC(), 16, tmp_path)
    assert not [line for line in lines if line not in found], found


def test_the_view_of_block_jacobi_tells_its_windows_and_their_solver(options, tmp_path):
    options(block_jacobi_window=4, block_jacobi_damping=0.5)
    found = viewed(TimeBlockJacobi(), 16, tmp_path)
    assert "windows of 4 steps, by wathen, damping 0.5" in found
    assert "propagator: window, 16 steps in windows of 4" in found
    options(block_jacobi_local="exact")
    assert "windows of 4 steps, by LU, damping 0.5" in viewed(TimeBlockJacobi(), 16, tmp_path)


def test_the_view_of_multigrid_tells_all_its_levels(options, tmp_path):
    options(timemg_coarsening=4, timemg_transfer="injection")
    found = viewed(TimeMultigridPC(), 32, tmp_path)
    assert "levels: 3, of 32, 8, 2 steps" in found and "transfer: injection; operators: rediscretized" in found
    windows = re.findall(r"propagator: window, (\d+) steps in windows of 16", "\n".join(found))
    assert sorted(map(int, windows)) == [8, 32]  # the smoothers; the coarsest level is solved otherwise
    assert "propagator: forward, 2 steps one after the other" in found


@pytest.mark.parametrize("name", ["heat", "dense"])
def test_an_assembled_matrix_knows_its_operator(name):
    """A solver made by hand has the residuals of the one on the shell."""
    problem = examples.EXAMPLES[name]()
    K = KKTOperator(RieszMetric(problem), "metric")
    K.set_point(problem.at(randomize(problem.create_primal(), 3)))
    b = randomize(problem.create_kkt(), 6)
    matrix, solutions = K.assemble(), []
    assert operator_of(matrix).lin is K.lin
    for each in (matrix, K.shell()):
        ksp = PETSc.KSP().create()
        ksp.setOperators(each)
        ksp.setType("fgmres")
        ksp.setTolerances(rtol=1e-10)
        ksp.getPC().setType("python")
        ksp.getPC().setPythonContext(WathenPC())
        x = b.duplicate()
        ksp.solve(b, x)
        assert ksp.getConvergedReason() > 0
        solutions.append(entries(x))
        ksp.destroy()
        each.destroy()
    assert relative(*solutions) <= 1e-7
