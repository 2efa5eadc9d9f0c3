"""Problems that are written for whole steps, and one without time, spread over ranks: a part of `parallel_space`."""

import tempfile
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from mpi4py import MPI
from petsc4py import PETSc

import pdeopt as po
from pdeopt.optimize.parts.inequalities import Inequalities, own_rows, whole_rows
from problems.burgers import BurgersCase, BurgersSettings
from problems.heat import HeatCase, HeatSettings
from problems.klein_gordon import KleinGordonCase, KleinGordonSettings
from problems.poisson import PoissonCase, PoissonSettings
from problems.shared import files
from tests.helpers.krylov import options

WORLD, SELF = MPI.COMM_WORLD, MPI.COMM_SELF

#: KKT systems to rounding: by factors, which of steps that ranks share only MUMPS finds.
EXACT = "direct" if PETSc.Sys.hasExternalPackage("mumps") else "reduced"


def splits():
    """Ranks that may share a step."""
    return [k for k in (1, 2, 4) if WORLD.size % k == 0 and k <= WORLD.size]


def same_in_blocks(case, result):
    """A file that is written two steps or less at a time has what the first rank would have whole."""
    if find_spec("h5py") is None:
        return
    whole, folder = case.arrays(result), WORLD.bcast(tempfile.mkdtemp() if WORLD.rank == 0 else None)
    path = Path(folder) / "solution.h5"
    with patch.object(files, "BLOCK", 2 * 8 * case.problem.constraint.layout.size):
        files.write_blocks(str(path), case.problem, case.fields(result))
    if WORLD.rank == 0:
        import h5py

        with h5py.File(path) as file:
            assert set(file) == set(whole) and all(np.array_equal(file[name], whole[name]) for name in whole)
        path.unlink()
        path.parent.rmdir()


def spread():
    """Constraints that are written for whole steps: the same solution, in as many iterations."""
    conduction = {"heat_control": "boundary", "heat_boundary": "neumann", "source": 1.0, "theta": 0.5}
    makes = (
        lambda k, comm: HeatCase(HeatSettings(nx=5, ny=3, nt=4, space_ranks=k, **conduction), comm),
        lambda k, comm: BurgersCase(BurgersSettings(nx=8, nt=4, nu=0.05, space_ranks=k), comm),
        lambda k, comm: KleinGordonCase(KleinGordonSettings(nx=6, nt=4, T=1.0, space_ranks=k), comm),
    )
    for alone, make in ((make(1, SELF), make) for make in makes):
        expected = po.SQPSolver(alone.problem, type="newton", opt_tol=1e-9).solve()
        arrays = alone.arrays(expected)
        for k in splits()[1:]:
            case = make(k, WORLD)
            result = po.SQPSolver(case.problem, type="newton", opt_tol=1e-9).solve()
            assert result.iterations == expected.iterations and result.message == expected.message
            for name, values in (case.arrays(result) or {}).items():
                tol = 1e-10 if EXACT == "direct" else 1e-7
                assert np.abs(values - arrays[name]).max() <= tol * (1 + np.abs(values).max()), (case.name, k, name)
            same_in_blocks(case, result)
    with pytest.raises(po.InputError, match="control_map"):
        BurgersCase(BurgersSettings(nx=8, nt=4, control="nodal", space_ranks=WORLD.size))


def apart():
    """Equal shares in the given order: who has positions alone has no controls, velocities alone are not tracked."""
    words = dict(nx=6, nt=4, T=1.0)
    expected = po.SQPSolver(KleinGordonCase(KleinGordonSettings(**words), SELF).problem, type="newton").solve()
    for k in splits()[1:]:
        for way in ("reduced", "wathen", EXACT):
            with options(mat_partitioning_type="average", sqp_kkt_precond=way):
                case = KleinGordonCase(KleinGordonSettings(space_ranks=k, **words), WORLD)
                assert min(case.problem.grid.space_comm.tompi4py().allgather(case.problem.m)) == 0
                result = po.SQPSolver(case.problem, type="newton").solve()
            assert result.reason > 0 and abs(result.objective / expected.objective - 1) <= 1e-9, (k, way)
    with pytest.raises(po.InputError, match="semidefinite"):
        case.problem.constraint.form(-np.eye(10))
    least = KleinGordonSettings(nx=2, nt=2, T=1.0, space_ranks=WORLD.size)  # one position, one velocity
    if WORLD.size == 2:
        assert po.solve(KleinGordonCase(least, WORLD).problem).reason > 0
    else:
        with pytest.raises(po.InputError, match="4 for 2 unknowns"):
            KleinGordonCase(least, WORLD)


def stationary():
    """Poisson's equation, which has no time: all ranks share it, and find the same, with bounds and sparse controls."""
    sparse = dict(target="waves", alpha=1e-5, beta=1e-3)
    for words, bounds in ((dict(), (None, None)), (dict(target="waves"), (-5.0, 2.0)), (sparse, (-30.0, 30.0))):
        cases = [PoissonCase(PoissonSettings(n=8, space_ranks=comm.size, **words), comm) for comm in (WORLD, SELF)]
        solved = []
        for case in cases:
            lower, upper = case.bounds(*bounds)
            solved.append(po.solve(case.problem, lower=lower, upper=upper, opt_tol=1e-11, feas_tol=1e-11))
        result, expected = solved
        assert result.reason > 0 and result.iterations == expected.iterations, words
        arrays = [case.arrays(each) for case, each in zip(cases, solved)]
        for name, values in (arrays[0] or {}).items():
            assert np.abs(values - arrays[1][name]).max() <= 1e-9 * (1 + np.abs(values).max()), (words, name)
    lower, upper = cases[0].bounds(-30.0, 30.0)
    projected = po.solve(cases[0].problem, method="tao", lower=lower, upper=upper, opt_tol=1e-7, max_it=300)
    assert abs(projected.objective / expected.objective - 1) <= 1e-6
    with pytest.raises(po.InputError, match="all ranks share"):
        PoissonCase(PoissonSettings(n=8), WORLD)
    with options(sqp_kkt_precond="circulant"), pytest.raises(po.InputError, match="circulant"):
        po.SQPSolver(cases[0].problem, type="newton").solve()


def inequalities():
    """Bounds on states: the same optimum, multipliers and places; rows that any split can go on with."""
    alone = HeatCase(HeatSettings(nx=7, ny=4, nt=4), SELF).problem
    ways = (("interior", "wathen"), ("moreau_yosida", EXACT))
    words = [dict(method=method, precond=precond, state_upper=0.05, upper=2.0) for method, precond in ways]
    expected = [po.solve(alone, **each) for each in words]
    for k in splits()[1:]:
        problem = HeatCase(HeatSettings(nx=7, ny=4, nt=4, space_ranks=k)).problem
        for each, one in zip(words, expected):
            result = po.solve(problem, **each)
            assert abs(result.objective / one.objective - 1) <= 1e-9 and result.reason > 0, (k, each)
            assert result.iterations == one.iterations, (k, each)
            of_all, of_one = (x.inequalities["state_upper"] for x in (result, one))
            assert abs(of_all.integral / of_one.integral - 1) <= 1e-7 and of_all.active == of_one.active, (k, each)
            assert (of_all.step, of_all.component) == (of_one.step, of_one.component), (k, each)
        rows, whole = (Inequalities(each, state_upper=0.05, upper=2.0) for each in (problem, alone))
        entries = np.random.default_rng(1).random((4, whole.kept.shape[1])).tolist()
        for each in (rows, whole):
            assert whole_rows(each, own_rows(each, entries)) == entries
        with pytest.raises(po.InputError, match="path constraints"):
            Inequalities(problem, path=lambda u, z, steps: u - 1.0)
        with pytest.raises(po.InputError, match="initial state"):
            Inequalities(problem, state_lower=0.1)


SPREAD = (spread, apart, stationary, inequalities)
