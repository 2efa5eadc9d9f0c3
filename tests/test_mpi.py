"""The same numbers on any number of ranks, and no rank left behind where one fails."""

import time

import numpy as np
import pytest

from tests.helpers.support import python, relative

pytestmark = pytest.mark.mpi


@pytest.fixture(scope="module")
def serial(tmp_path_factory):
    return run(tmp_path_factory.mktemp("serial"), 1)


def run(folder, ranks):
    file = folder / f"{ranks}.npz"
    done = python("-m", "tests.helpers.parallel", "everything", file, ranks=ranks)
    assert done.returncode == 0, done.stderr
    return dict(np.load(file))


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_everything_is_the_same_on_several_ranks(serial, tmp_path, ranks):
    """Values, derivatives, sweeps, operators, optima and multipliers of five problems."""
    found = run(tmp_path, ranks)
    assert set(found) == set(serial)
    errors = {name: relative(found[name], serial[name]) for name in serial if "adjoint_error" not in name}
    solved = ("composite", "newton", "tao")  # solutions to a tolerance; the rest are formulas
    wrong = {
        name: error
        for name, error in errors.items()
        if error > (1e-9 if name.split(": ")[1].startswith(solved) else 1e-12)
    }
    assert not wrong
    assert all(found[name] <= 1e-13 for name in found if "adjoint_error" in name)


@pytest.mark.parametrize(
    "words",
    [
        ("-solver", "newton"),
        ("-solver", "sqp"),
        ("-solver", "sqp", "-control", "nodal"),
        ("-solver", "tao", "-tao_type", "ntr"),
    ],
)
def test_the_burgers_script_gives_the_same_solution_on_three_ranks(tmp_path, words):
    solutions = []
    for ranks in (1, 3):
        file = tmp_path / f"{ranks}.npz"
        tight = ("-nx", 16, "-nt", 16, "-sqp_opt_tol", 1e-11, "-sqp_feas_tol", 1e-11)
        if "tao" in words:
            tight = ("-nx", 16, "-nt", 16, "-sqp_opt_tol", 1e-11)
        done = python("-m", "problems.burgers", *tight, *words, "-output", file, ranks=ranks)
        assert done.returncode == 0, done.stderr
        solutions.append(np.load(file))
    one, three = solutions
    assert relative(three["objective"], one["objective"]) <= 1e-12
    for name in ("state", "control", "multiplier"):
        assert relative(three[name], one[name]) <= (1e-7 if "tao" in words else 1e-10), name


def test_a_failure_on_one_rank_is_a_reason_on_all():
    done = python("-m", "tests.helpers.parallel", "failing", ranks=2)
    assert done.returncode == 0, done.stderr


def test_a_rank_that_raises_ends_all_ranks_with_a_traceback():
    start = time.monotonic()
    done = python("-m", "tests.helpers.parallel", "raising", ranks=2)
    assert done.returncode != 0 and "ZeroDivisionError" in done.stderr
    assert time.monotonic() - start < 60  # it did end; how fast is no theorem


def test_more_ranks_than_steps_are_refused():
    done = python("-m", "problems.burgers", "-nt", 2, "-nx", 8, ranks=3)
    assert done.returncode == 2
    assert "3 for 2 time steps" in done.stderr and "Traceback" not in done.stderr
