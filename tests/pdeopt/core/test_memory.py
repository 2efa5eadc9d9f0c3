"""Sizes that cannot fit are refused, with what they need and what is free."""

import resource

import pytest

from pdeopt.control.problem import ControlProblem
from pdeopt.core import memory
from pdeopt.core.errors import InputError
from pdeopt.core.memory import free_memory, in_words, require_memory
from pdeopt.functions.smooth import SmoothFunction
from pdeopt.optimize.parts.inversehessian import DenseInverse
from pdeopt.steps.timegrid import TimeGrid
from tests.helpers import examples


def test_free_memory_is_some_and_not_more_than_there_is(monkeypatch):
    assert 2**26 < free_memory() < 2**50
    monkeypatch.setattr(memory, "_of_machine", lambda: 5e9)
    assert free_memory() <= 5e9


def test_limits_of_the_process_count(monkeypatch):
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    monkeypatch.setattr(resource, "getrlimit", lambda which: (2 * used, 2 * used))
    assert free_memory() <= 2 * used


@pytest.mark.parametrize("version", [1, 2])
def test_control_groups_count_and_those_above_them(version, monkeypatch):
    root = {1: "/sys/fs/cgroup/memory", 2: "/sys/fs/cgroup"}[version]
    limit, use = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes"), 2: ("memory.max", "memory.current")}[version]
    files = {
        "/proc/self/cgroup": {1: "4:cpu,memory:", 2: "0::"}[version] + "/job/step",
        f"{root}/job/step/{limit}": "max",
        f"{root}/job/{limit}": "3000000",
        f"{root}/job/{use}": "2500000",
        f"{root}/job/memory.stat": "anon 1\ninactive_file 200000",
    }
    monkeypatch.setattr(memory, "_lines", lambda file: iter(files.get(str(file), "").splitlines()))
    assert min(memory._of_groups()) == 700000


@pytest.mark.parametrize("size, words", [(900, "900 B"), (7.5e12, "7.5 TB"), (20e9, "20 GB"), (1e23, "1.0e+05 EB")])
def test_sizes_are_told_with_two_digits(size, words):
    assert in_words(size) == words


def test_what_fits_passes_and_the_rest_says_both_numbers():
    require_memory(1.0, "points", 1)
    with pytest.raises(InputError, match=r"points: got 5, which needs about 1 EB, .* are free; legal: fewer"):
        require_memory(1e18, "points", 5, "fewer")


def test_grids_problems_and_dense_matrices_ask():
    with pytest.raises(InputError, match=r"num_steps.* TB"):
        TimeGrid.uniform(10**12, T=1.0)
    problem = examples.burgers()
    problem.constraint.state_dim = 10**12
    with pytest.raises(InputError, match=r"problem.* [TP]B"):
        ControlProblem(problem.constraint, problem.objective, problem.grid)

    class Large(SmoothFunction):
        def _value_and_gradient(self, x):
            raise NotImplementedError

    with pytest.raises(InputError, match=r"dense inverse Hessian.* PB"):
        DenseInverse(Large(10**8))
