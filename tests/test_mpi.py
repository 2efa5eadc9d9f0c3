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


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_everything_is_the_same_on_several_ranks(serial, tmp_path, ranks):
    """Values, derivatives, sweeps, operators, optima and multipliers of five problems."""
    found = run(tmp_path, ranks)
    assert set(found) == set(serial)
    errors = {name: relative(found[name], serial[name]) for name in serial if "adjoint_error" not in name}
    solved = ("composite", "newton", "feasible", "tao")  # solutions to a tolerance; the rest are formulas
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
        pytest.param(("-solver", "newton"), marks=pytest.mark.slow),
        pytest.param(("-solver", "sqp"), marks=pytest.mark.slow),
        ("-solver", "sqp", "-control", "nodal"),
        pytest.param(("-solver", "tao", "-tao_type", "ntr"), marks=pytest.mark.slow),
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


# -- how a run on several ranks ends ---------------------------------------------------------------------------

slow = pytest.mark.slow
WRONG = "ZeroDivisionError: of this rank"
#: Ways to end with an error, on one rank or more: ranks, exit code, what is shown, once.
ERRORS = [
    pytest.param("residual", 2, 1, WRONG, marks=slow),
    pytest.param("residual", 3, 1, WRONG, marks=slow),
    pytest.param("objective", 2, 1, WRONG, marks=slow),
    pytest.param("tao", 2, 1, WRONG, marks=slow),
    pytest.param("shell", 2, 1, WRONG, marks=slow),
    pytest.param("monitor", 3, 1, WRONG, marks=slow),
    pytest.param("monitor of tao", 2, 1, WRONG, marks=slow),
    ("callback", 2, 1, WRONG),
    pytest.param("thread", 2, 1, WRONG, marks=slow),
    pytest.param("interrupt", 2, 130, "KeyboardInterrupt", marks=slow),
    pytest.param("exit", 3, 3, "", marks=slow),
    ("raise exit", 2, 3, ""),
    pytest.param("exit with words", 2, 1, "enough", marks=slow),
    pytest.param("all raise", 2, 1, WRONG, marks=slow),
    pytest.param("all bad input", 3, 1, "InputError: size", marks=slow),
    pytest.param("all but one raise", 3, 1, WRONG, marks=slow),
    pytest.param("all exit 3", 2, 3, "", marks=slow),
]


@pytest.mark.parametrize("way, ranks, code, shown", ERRORS)
def test_an_error_ends_all_ranks_at_once_and_is_shown_once(way, ranks, code, shown):
    """A program of a user's, without the scripts' `start`."""
    done = python("-m", "tests.helpers.ending", way, ranks=ranks, timeout=120)
    took = time.time() - max(float(line[3:]) for line in done.stdout.splitlines() if line.startswith("at "))
    assert done.returncode == code, done.stderr
    assert done.stderr.count("Traceback") == bool(shown and shown != "enough"), done.stderr
    assert not shown or done.stderr.count(shown) == 1, done.stderr
    assert took < 10  # 5 on a machine that has nothing else to do


@pytest.mark.slow
@pytest.mark.parametrize("way", ["all exit 0", "one is earlier", "one is earlier by exit", "caught"])
def test_an_end_without_an_error_waits_for_the_others(way):
    done = python("-m", "tests.helpers.ending", way, ranks=2)
    assert done.returncode == 0 and not done.stderr, done.stderr


@pytest.mark.slow
def test_a_script_says_once_what_is_wrong_on_one_rank_alone():
    done = python("-m", "tests.helpers.parallel", "raising", ranks=2)
    assert done.returncode == 1 and done.stderr.count("ZeroDivisionError: division by zero") == 1, done.stderr


def test_more_ranks_than_steps_are_refused():
    done = python("-m", "problems.burgers", "-nt", 2, "-nx", 8, ranks=3)
    assert done.returncode == 2
    assert "3 for 2 time steps" in done.stderr and "Traceback" not in done.stderr
