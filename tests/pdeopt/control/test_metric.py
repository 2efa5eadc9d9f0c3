import pytest
import torch

from pdeopt.control.metric import RieszMetric
from pdeopt.control.verify import randomize
from tests.helpers import examples
from tests.helpers.oracle import Oracle
from tests.helpers.support import entries, relative


@pytest.fixture(params=examples.EXAMPLES)
def problem(request):
    return examples.EXAMPLES[request.param]()


def test_the_metric_is_that_of_the_dense_masses(problem):
    metric, R = RieszMetric(problem), Oracle(problem).metric()
    x = randomize(problem.create_primal(), 0)
    assert relative(entries(metric.primal(x, x.duplicate())), R @ entries(x)) <= 1e-14
    assert metric.norm(x) == pytest.approx(float((entries(x) @ R @ entries(x)) ** 0.5), rel=1e-14)


def test_its_inverse_is_its_inverse(problem):
    metric, x = RieszMetric(problem), randomize(problem.create_primal(), 0)
    y = metric.primal_inverse(metric.primal(x, x.duplicate()), x.duplicate())
    assert relative(entries(y), entries(x)) <= 1e-12


def test_the_dual_norm_is_that_of_the_representative(problem):
    metric, x = RieszMetric(problem), randomize(problem.create_primal(), 0)
    assert metric.dual_norm(metric.primal(x, x.duplicate())) == pytest.approx(metric.norm(x), rel=1e-12)


def test_lumping_keeps_row_sums_and_no_less_than_the_diagonal(problem):
    metric, R = RieszMetric(problem), Oracle(problem).metric()[problem.layout.state_size :, problem.layout.state_size :]
    assert relative(entries(metric.design_lumped()), torch.maximum(R.sum(1), R.diagonal())) <= 1e-13


def test_residuals_are_measured_in_the_dual_of_the_state(problem):
    metric, c = RieszMetric(problem), randomize(problem.create_multiplier(), 0)
    R = Oracle(problem).metric()[: problem.layout.state_size, : problem.layout.state_size]
    expected = entries(c) @ torch.linalg.solve(R, entries(c))
    assert metric.residual_norm(c) == pytest.approx(float(expected**0.5), rel=1e-12)


def test_norms_of_fields_are_norms(problem):
    metric, x = RieszMetric(problem), randomize(problem.create_primal(), 0)
    u, z, p = problem.fields(x)
    total = metric.state_norm(u) ** 2 + metric.control_norm(z) ** 2 + float(p @ metric.of_parameters(p))
    assert metric.norm(x) == pytest.approx(total**0.5, rel=1e-13)


@pytest.mark.parametrize("nx", [8, 32])
def test_the_norm_of_a_constant_is_its_integral(nx):
    """On the unit square, whatever the mesh: the control lives on all nodes."""
    problem = examples.burgers(nx=nx, nt=4)
    z = torch.full((problem.layout.control_size,), 3.0, dtype=torch.float64)
    assert RieszMetric(problem).control_norm(z) == pytest.approx(3.0, rel=1e-13)


def test_a_norm_of_nan_is_nan():
    problem = examples.dense()
    x = problem.create_primal()
    x.set(float("nan"))
    metric = RieszMetric(problem)
    assert metric.norm(x) != metric.norm(x)
