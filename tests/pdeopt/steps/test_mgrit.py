"""MGRIT for any chain of steps: on linear problems everything is known."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from mpi4py import MPI

from pdeopt.core.errors import InputError
from pdeopt.steps.mgrit import Mgrit, MgritSettings
from pdeopt.steps.timegrid import TimeGrid
from pdeopt.steps.transfer import level_offsets, whole_intervals
from tests.helpers.support import python

N, DIM = 12, 3


class Linear:
    """u_i = Phi_i u_{i-1} + g_i on several levels, with coarse steps that are not powers of fine ones."""

    def __init__(self, num_steps, factors, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.counts = [num_steps]
        for m in factors:
            self.counts.append(-(-self.counts[-1] // m))
        self.Phi = [0.6 * torch.randn(n, DIM, DIM, generator=generator, dtype=torch.float64) for n in self.counts]
        self.g = torch.randn(num_steps, DIM, generator=generator, dtype=torch.float64)
        self.entry = torch.randn(DIM, generator=generator, dtype=torch.float64)

    def phis(self, adjoint=False):
        def step(Phi):
            return lambda u, rows: torch.einsum("kij,kj->ki", Phi.mT[rows] if adjoint else Phi[rows], u)

        return [step(Phi) for Phi in self.Phi]

    def exact(self, adjoint=False):
        """The states where each step arrives."""
        u, states = self.entry, [None] * self.counts[0]
        for i in reversed(range(self.counts[0])) if adjoint else range(self.counts[0]):
            Phi = self.Phi[0][i].T if adjoint else self.Phi[0][i]
            u = Phi @ u + self.g[i]
            states[i] = u
        return torch.stack(states)


def solve(problem, factors, adjoint=False, **words):
    """The states after each step in the last run, the outcome."""
    settings = MgritSettings(**{"start": "constant", **words})
    grid = TimeGrid.uniform(problem.counts[0], 1.0, MPI.COMM_SELF)
    mgrit = Mgrit(grid, factors, settings, adjoint)
    states = torch.full_like(problem.g, torch.nan)
    phi = problem.phis(adjoint)[0]

    def final(u, rows):
        states[rows] = phi(u, rows) + problem.g[rows]
        return phi(u, rows)

    outcome = mgrit.solve(problem.phis(adjoint), problem.entry, problem.g, final=final)
    return states, outcome


@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize(
    "num_steps, factors, cycles, relaxation",
    [
        (12, [2], 6, "F"),
        (12, [2], 3, "FCF"),
        (12, [3], 4, "F"),
        (12, [3], 2, "FCF"),
        (12, [2], 2, "FCFCF"),
        (11, [3], 4, "F"),
        (13, [4], 4, "F"),
        (7, [7], 1, "F"),
        (5, [8], 1, "F"),
        (1, [], 0, "F"),
    ],
)
def test_two_levels_are_exact_after_as_many_cycles_as_information_needs(
    num_steps, factors, cycles, relaxation, adjoint
):
    """F-relaxation carries the exact solution over one interval a cycle, each C more over another one."""
    problem, m = Linear(num_steps, factors), (factors or [1])[0]
    exact = problem.exact(adjoint)
    points = exact[::m] if adjoint else exact[np.minimum(np.arange(m, num_steps + m, m), num_steps) - 1]
    for fewer in range(min(cycles, 2)):
        count = cycles - fewer
        states, outcome = solve(problem, factors, adjoint, cycles=count, adjoint_cycles=count, relaxation=relaxation)
        if fewer == 0 and factors:
            assert torch.allclose(states, exact, rtol=0, atol=1e-12)
            assert torch.allclose(outcome.points, points, rtol=0, atol=1e-12)
        elif factors:
            assert not torch.allclose(outcome.points, points, rtol=0, atol=1e-12)


@pytest.mark.parametrize("relaxation, powers", [("F", 1), ("FCF", 2), ("FCFCF", 3)])
def test_errors_at_c_points_go_through_the_dense_two_level_matrix(relaxation, powers):
    """E = (I - A_c^-1 A_i) (I - A_i)^nu over C-points, A_i the ideal and A_c the coarse bidiagonal system."""
    m, problem = 3, Linear(N, [3])
    ideal = [torch.linalg.multi_dot([problem.Phi[0][m * k + j] for j in reversed(range(m))]) for k in range(N // m)]

    def system(blocks):
        A = torch.eye(len(blocks) * DIM, dtype=torch.float64)
        for k in range(1, len(blocks)):
            A[k * DIM : (k + 1) * DIM, (k - 1) * DIM : k * DIM] = -blocks[k]
        return A

    A_i, A_c = system(ideal), system(list(problem.Phi[1]))
    identity = torch.eye(len(A_i), dtype=torch.float64)
    E = (identity - torch.linalg.solve(A_c, A_i)) @ torch.linalg.matrix_power(identity - A_i, powers - 1)
    ends = problem.exact()[m - 1 :: m].reshape(-1)
    points = [solve(problem, [m], cycles=k, relaxation=relaxation)[1].points.reshape(-1) for k in (0, 1, 2)]
    for before, after in pairwise(points):
        assert torch.allclose(after - ends, E @ (before - ends), atol=1e-12)


@pytest.mark.parametrize("num_steps", [8, 9, 16, 31])
@pytest.mark.parametrize("factors", [[2, 2], [4, 2], [2, 3, 2]])
@pytest.mark.parametrize(
    "words",
    [dict(cycle="V"), dict(cycle="F"), dict(relaxation="FCF"), dict(start="nested"), dict(cycle="F", start="nested")],
)
def test_any_number_of_levels_and_steps_converges_to_the_same_states(num_steps, factors, words):
    problem = Linear(num_steps, factors)
    for adjoint in (False, True):
        states, _ = solve(problem, factors, adjoint, cycles=40, adjoint_cycles=40, **words)
        assert torch.allclose(states, problem.exact(adjoint), atol=1e-11)


def test_an_exact_coarse_step_needs_one_cycle_on_every_hierarchy():
    problem = Linear(N, [3])
    problem.Phi[1] = torch.stack(
        [torch.linalg.multi_dot([problem.Phi[0][3 * k + j] for j in reversed(range(3))]) for k in range(4)]
    )
    states, _ = solve(problem, [3], cycles=1)
    assert torch.allclose(states, problem.exact(), atol=1e-12)


def test_a_nested_start_is_the_solution_of_the_coarse_problem():
    problem = Linear(N, [3])
    problem.g.zero_()
    _, outcome = solve(problem, [3], cycles=0, start="nested")
    coarse = Linear(4, [])
    coarse.Phi, coarse.entry, coarse.g = [problem.Phi[1]], problem.entry, torch.zeros(4, DIM, dtype=torch.float64)
    assert torch.allclose(outcome.points, coarse.exact(), atol=1e-13)


def test_a_tolerance_ends_the_cycles_and_residuals_are_kept():
    problem = Linear(32, [2])
    problem.Phi = [0.5 * Phi for Phi in problem.Phi]
    _, outcome = solve(problem, [2], cycles=40, rtol=1e-3)
    assert 1 < len(outcome.residuals) < 16 and outcome.residuals[-1] <= 1e-3 < outcome.residuals[-2]


@pytest.mark.parametrize("text", ["1", "a", "4,", "4,1", ""])
def test_factors_that_are_none_are_refused(text):
    with pytest.raises(InputError, match="integers >= 2"):
        MgritSettings(coarsening=text).factors(64)


@pytest.mark.parametrize(
    "text, levels, num_steps, expected",
    [
        ("16", 2, 1024, [16]),
        ("16,4", 4, 1024, [16, 4, 4]),
        ("8", 20, 100, [8, 8]),
        ("8", 1, 100, []),
        ("64", 2, 10, []),
        *[("auto", 2, n, [m]) for n, m in ((16, 4), (32, 8), (64, 8), (256, 16), (1024, 32), (4096, 64), (99999, 64))],
        ("auto", 3, 512, [8, 8]),
    ],
)
def test_factors_end_where_the_steps_do(text, levels, num_steps, expected):
    assert MgritSettings(coarsening=text, levels=levels).factors(num_steps) == expected


@pytest.mark.parametrize("num_steps, factors, ranks", [(16, [4], 3), (17, [4, 2], 2), (100, [7], 4), (3, [], 3)])
def test_ranks_have_whole_intervals(num_steps, factors, ranks):
    offsets = whole_intervals(num_steps, factors, ranks)
    assert offsets[0] == 0 and offsets[-1] == num_steps and (np.diff(offsets) > 0).all()
    assert all(offset % int(np.prod(factors)) == 0 for offset in offsets[:-1])


@pytest.mark.parametrize(
    "num_steps, factors, ranks",
    [(64, [4, 4, 4], 16), (65, [2] * 6, 7), (1000, [3, 5, 2, 2], 300), (40, [3, 3, 3, 3], 4), (8, [2, 2, 2], 3)],
)
def test_coarse_levels_move_to_ranks_that_get_whole_intervals(num_steps, factors, ranks):
    """The finest level alone limits the ranks; nobody gets steps who had none, and nothing moves without need."""
    levels = level_offsets(whole_intervals(num_steps, factors, ranks), factors)
    assert (np.diff(levels[0][1]) > 0).all()
    for (_, fine), (left, own), factor, rest in zip(levels, levels[1:], factors, [*factors[1:], 1]):
        assert own[-1] == left[-1] == -(-fine[-1] // factor) and len(own) == ranks + 1
        assert np.array_equal(left, -(-fine // factor))
        has, had = np.diff(own) > 0, np.diff(left) > 0
        assert (had | ~has).all() and not (own[:-1][has] % rest).any()
        if not (left[:-1][had] % rest).any():
            assert np.array_equal(left, own)


def test_more_ranks_than_intervals_are_refused():
    with pytest.raises(InputError, match="at most 2"):
        whole_intervals(32, [16], 3)


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_networks_give_the_same_on_several_ranks(ranks):
    done = python("-m", "tests.helpers.parallel_layers", ranks=ranks)
    parts = ("layers", "in_turn", "cycles", "given", "unlike", "splines", "sequences", "samples", "manners")
    parts += ("settings", "restarts", "fitted")
    assert {f"{part}: same" for part in parts} <= set(done.stdout.splitlines()), done.stderr[-3000:]
