from itertools import pairwise

import pytest
import torch

from pdeopt.core.errors import InputError
from pdeopt.core.monitor import History, Reason
from pdeopt.functions.decomposition import Decomposition
from pdeopt.functions.hierarchy import Hierarchy, Transfer
from pdeopt.optimize.descent.quasinewton import LBFGS, SSBroyden
from pdeopt.optimize.descent.schwarz import SPQN
from tests.helpers.functions import Hole, Quadratic, Rosenbrock, start
from tests.helpers.support import python, relative


def split(n, parts=3, overlap=0):
    return Decomposition.blocks([1] * n, parts, overlap)


@pytest.mark.parametrize("method, plain", [("lbfgs", LBFGS), ("ssbroyden", SSBroyden)])
def test_without_local_steps_it_is_the_global_method(method, plain):
    found = SPQN(Rosenbrock(15), decomposition=split(15), local_it=0, method=method, gtol=1e-9).minimize(start(15))
    expected = plain(Rosenbrock(15), gtol=1e-9).minimize(start(15))
    for column in ("objective", "optimality", "radius", "gradients", "work"):
        assert found.history[column][1:] == expected.history[column][1:]


@pytest.mark.parametrize("type", ["additive", "multiplicative"])
@pytest.mark.parametrize("sync", ["line", "subspace"])
def test_one_part_solved_exactly_is_that_solve(type, sync):
    f = Quadratic.random(12)
    words = dict(local_it=200, type=type, sync=sync, gtol=1e-8)
    result = SPQN(f, decomposition=split(12, 1), **words).minimize(start(12))
    assert result.converged and result.iterations == 1
    assert relative(result.design, f.minimum) < 1e-8


def test_exact_local_solves_of_separate_parts_are_the_solution():
    """A block diagonal Hessian: subspace minimization and both sweeps end after one iteration."""
    A = torch.block_diag(*(Quadratic.random(4, seed=k).A for k in range(3)))
    for words in (dict(), dict(sync="line"), dict(type="multiplicative"), dict(type="multiplicative", colors=1)):
        f = Quadratic(A, start(12, 3))
        result = SPQN(f, decomposition=split(12), local_it=100, gtol=1e-7, **words).minimize(start(12))
        assert result.converged and result.iterations == 1, words


def test_a_multiplicative_sweep_with_exact_solves_is_block_gauss_seidel():
    f, x = Quadratic.random(9, 20.0), start(9)
    expected = x.clone()
    for rows in split(9).parts:
        rest = f.b[rows] - f.A[rows] @ expected + f.A[rows][:, rows] @ expected[rows]
        expected[rows] = torch.linalg.solve(f.A[rows][:, rows], rest)
    minimizer = SPQN(f, decomposition=split(9), type="multiplicative", local_it=200, gtol=1e-12)
    minimizer.attach(f)
    minimizer.minimize(x, until=lambda m: True)
    assert relative(x + minimizer.parts.multiplicative(f, minimizer.x, minimizer.f, minimizer.g), expected) < 1e-9


WORDS = [
    dict(),
    dict(sync="line"),
    dict(type="multiplicative"),
    dict(type="multiplicative", colors=2),
    dict(method="ssbroyden", local="ssbroyden", keep=True),
    dict(pairs="all", directions="both"),
    dict(momentum=0.9),
    dict(every=3, local_memory=3, memory=3),
]


@pytest.mark.parametrize("words", WORDS, ids=str)
@pytest.mark.parametrize("overlap", [0, 1])
def test_every_variant_finds_the_minimum_monotonously(words, overlap):
    f = Rosenbrock(12)
    result = SPQN(f, decomposition=split(12, 3, overlap), local_it=5, gtol=1e-8, **words).minimize(start(12))
    assert result.converged, result.message
    assert relative(result.design, torch.ones(12, dtype=torch.float64)) < 1e-6
    objective = result.history["objective"]
    assert all(b <= a for a, b in pairwise(objective))
    assert result.history[-1].gradients == f.tally.gradients and result.history[-1].work == pytest.approx(f.tally.work)


@pytest.mark.parametrize("words", WORDS, ids=str)
def test_a_restart_goes_on_with_the_same_iterates(words):
    saved = {}

    def save(minimizer, history):
        if history[-1].iteration == 4:
            saved.update(memory=minimizer.memory(), records=list(history.records))

    def new():
        return SPQN(Rosenbrock(12), decomposition=split(12), local_it=3, max_it=12, gtol=1e-10, **words)

    whole = new().minimize(start(12), observers=[save])
    rest = new().minimize(start(12), memory=saved["memory"], history=History(saved["records"]))
    assert rest.history["objective"] == whole.history["objective"] and torch.equal(rest.design, whole.design)


def test_secant_pairs_are_those_of_the_global_steps():
    """s = x_new - x_half, y the gradients' difference at exactly these points."""
    f, pairs = Quadratic.random(9), []
    minimizer = SPQN(f, decomposition=split(9), local_it=2, max_it=5)
    new = minimizer.method.new_inverse

    def spy():
        inverse = new()
        update = inverse.update
        inverse.update = lambda s, y, *rest: pairs.append((s, y)) or update(s, y, *rest)
        return inverse

    minimizer.method.new_inverse = spy
    minimizer.minimize(start(9))
    assert len(pairs) >= 4 and all(relative(y, f.A @ s) < 1e-9 for s, y in pairs)


def two_levels(n=64):
    """The energy of a bar, (x_{i+1} - x_i)^2 + c x_i^2, whose coarse unknowns are pairs."""
    K = 2.0 * torch.eye(n) - torch.diag(torch.ones(n - 1), 1) - torch.diag(torch.ones(n - 1), -1)
    A = K.double() * n + torch.eye(n, dtype=torch.float64)
    transfer = Transfer.aggregates(torch.arange(n) // 4)
    P = torch.from_numpy(transfer.P.toarray())
    b = start(n)
    fine, coarse = Quadratic(A, b), Quadratic(P.T @ A @ P, P.T @ b)
    coarse.costs = coarse.costs.times(0.25)
    return Hierarchy([fine, coarse], [transfer])


def test_the_coarse_function_moves_the_start_and_is_counted_at_its_price():
    h = two_levels()
    result = SPQN(h, parts=4, local_it=0, coarse_rtol=1e-8, coarse_it=500, gtol=1e-6).minimize(start(64))
    fine = h.functions[0]
    first = result.history[0]
    assert result.converged and relative(result.design, fine.minimum) < 1e-6
    assert 1.0 < first.work < first.gradients and first.objective < fine.value(start(64))
    Rg = h.transfers[0].restrict(fine.value_and_gradient(start(64) * 0 + result.design)[1])
    assert Rg.norm() < 1e-6


def test_bad_input_is_named():
    with pytest.raises(InputError, match="1 to 5"):
        SPQN(Rosenbrock(5), parts=9)
    with pytest.raises(InputError, match="unknowns of the decomposition"):
        SPQN(Rosenbrock(5), decomposition=split(6))
    with pytest.raises(InputError, match="local_it"):
        SPQN(Rosenbrock(5), parts=2, local_it=-1)
    beyond = torch.full((4,), 9.0, dtype=torch.float64)
    assert SPQN(Hole(4), parts=2).minimize(beyond).reason == Reason.DIVERGED_NAN
    assert SPQN(Hole(4), parts=2, gtol=1e-7).minimize(beyond / 6.5).converged


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_do_not_change_the_iterates(ranks):
    """Replicated unknowns whose parts the ranks share, and windows of time of distributed controls."""
    outputs = []
    for number in (1, ranks):
        done = python("-m", "tests.helpers.parallel_schwarz", ranks=number)
        assert done.returncode == 0, done.stderr
        outputs.append(torch.tensor(eval(done.stdout.splitlines()[-1])))
    for output in outputs[1:]:
        assert relative(output, outputs[0]) < 1e-9
