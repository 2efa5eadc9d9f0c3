"""K-FAC on several ranks: equal steps, what is sent, what is held; layers in parallel."""

import json

import pytest

from nn_adapters.curvature.factors import owners
from tests.helpers.parallel_kfac import LAYERS, STEPS, WIDTH
from tests.helpers.support import python, relative

pytestmark = [pytest.mark.mpi, pytest.mark.slow]  # four processes that each import PyTorch


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    path = tmp_path_factory.mktemp("kfac") / "runs.json"
    done = python("-m", "tests.helpers.parallel_kfac", path, ranks=4)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text())


@pytest.mark.parametrize("ranks", [2, 4])
def test_steps_do_not_depend_on_the_ranks(runs, ranks):
    one = runs["float64 1"]["outputs"]
    assert relative(runs[f"float64 {ranks}"]["outputs"], one) <= 1e-9
    assert 0.0 < relative(runs[f"bfloat16 {ranks}"]["outputs"], one) <= 0.1


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("kind", ["free kfac", "free none", "natural"])
def test_steps_by_products_do_not_depend_on_the_ranks(runs, kind, ranks):
    one, found = runs[f"{kind} 1"], runs[f"{kind} {ranks}"]
    assert relative(found["outputs"], one["outputs"]) <= 1e-9
    assert found["iterations"] == one["iterations"] and found["equal"]


def test_a_sample_that_is_no_number_on_one_rank_is_a_failure_of_all(runs):
    """Of K-FAC and of Hessian-free steps; and no weight has changed."""
    assert runs["broken"] == [[True, True, True]] * 4


def test_restarts_to_the_last_bit_on_as_many_ranks_and_to_rounding_on_others(runs):
    again, whole = runs["restarted"], {ranks: runs[f"whole {ranks}"] for ranks in (1, 2)}
    assert again["2 2"] == whole[2]
    assert relative(again["2 4"], whole[1]) <= 1e-9 and relative(again["4 1"], whole[1]) <= 1e-9


@pytest.mark.parametrize("ranks", [2, 4])
def test_late_statistics_are_as_late_on_any_number_of_ranks(runs, ranks):
    one = runs["late 1"]["outputs"]
    assert relative(runs[f"late {ranks}"]["outputs"], one) <= 1e-9
    assert relative(one, runs["float64 1"]["outputs"]) > 1e-6


@pytest.mark.parametrize("ranks", [2, 4])
def test_what_is_sent_is_less_than_an_allreduce_of_gradients_and_factors(runs, ranks):
    """That sends 2 (N - 1) / N of them from each rank, on average; here in 8 bytes, without the weights."""
    gradient, factors = WIDTH * (WIDTH + 1), (WIDTH + 1) * (WIDTH + 2) // 2 + WIDTH * (WIDTH + 1) // 2
    allreduce = STEPS * LAYERS * (gradient + factors) * 8 * 2 * (ranks - 1)  # of all ranks
    assert sum(runs[f"float64 {ranks}"]["sent"]) <= 1.05 * allreduce
    assert sum(runs[f"bfloat16 {ranks}"]["sent"]) <= 0.8 * sum(runs[f"float64 {ranks}"]["sent"])


@pytest.mark.parametrize("ranks, share", [(2, 0.6), (4, 0.35)])
def test_a_rank_holds_its_layers_alone(runs, ranks, share):
    (whole,) = runs["float64 1"]["held"]
    held = runs[f"float64 {ranks}"]["held"]
    assert sum(held) == whole and max(held) <= share * whole


def test_layers_in_parallel_take_the_steps_of_the_serial_network(runs):
    for ranks in (1, 2):
        assert relative(runs[f"chain {ranks}"]["outputs"], runs["serial"]["outputs"]) <= 1e-8
        assert runs[f"chain {ranks}"]["damping"] == runs["serial"]["damping"]


def test_owners_share_the_work_of_inverses():
    shapes = [(k, 2 * k) for k in range(1, 30)]
    found = owners(shapes, 4)
    work = [sum(m**3 + n**3 for (m, n), owner in zip(shapes, found) if owner == rank) for rank in range(4)]
    assert max(work) <= 1.1 * min(work)
