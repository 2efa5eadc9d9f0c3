"""Kronecker factors as the metric of trust regions: theorems, refusals, restarts; and metrics of other functions."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from nn_adapters.curvature.likelihoods import SquaredError
from nn_adapters.curvature.networkmetric import FactorSettings, NetworkMetric
from nn_adapters.losses.network import NetworkLoss
from pdeopt.control.metric import RieszMetric
from pdeopt.control.reduced import ReducedObjective
from pdeopt.core.arrays import copy
from pdeopt.core.errors import InputError
from pdeopt.functions.smooth import ScaledFunction
from pdeopt.functions.units import in_units
from pdeopt.optimize.descent.apts import APTS
from pdeopt.optimize.descent.trust import TrustRegionMinimizer
from tests.helpers import examples
from tests.helpers.functions import quadratic, zeros
from tests.helpers.small_network import network
from tests.helpers.support import relative

EXACT = FactorSettings(fisher="exact", average=0.0, damping=0.0)


def one_layer():
    """Least squares of one linear layer whose inputs have very different units: its Fisher matrix is I (x) E aa'."""
    torch.manual_seed(0)
    x = torch.randn(50, 4).double() * torch.logspace(-2, 2, 4).double()
    return NetworkLoss(nn.Linear(4, 3).double(), SquaredError(), x, torch.randn(50, 3).double(), factors=EXACT)


@pytest.mark.parametrize("model", ["metric", "lsr1", "hvp"])
def test_the_step_in_the_metric_of_gauss_newton_is_newtons(model):
    """One linear layer: the first step ends at the minimum, with one product of conjugate gradients."""
    f = one_layer()
    run = TrustRegionMinimizer(f, model=model, metric="kfac", radius=1e4, max_it=1, cg_max_it=1, gtol=0.0)
    result = run.minimize(f.parameters())
    assert result.history[1].optimality <= 1e-10 * result.history[0].optimality


@pytest.mark.parametrize("model", ["first", "metric", "lsr1", "hvp"])
def test_a_limited_step_has_the_length_of_the_radius_in_the_metric(model):
    f = one_layer()
    x = f.parameters()
    run = TrustRegionMinimizer(f, model=model, metric="kfac", radius=0.1, max_it=1, gtol=0.0)
    metric = f.metric("kfac")
    metric.refresh(f, x)
    assert metric.now.norm(run.minimize(x).design - x) == pytest.approx(0.1, rel=1e-9)


def test_roots_of_the_metric_are_roots_of_the_matrix():
    f = network()
    metric = f.metric("kfac")
    metric.refresh(f, f.parameters())
    u, v = torch.randn(2, f.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    now = metric.now
    assert float(metric.root(u) @ metric.root(v)) == pytest.approx(float(u @ now.multiply(v)), rel=1e-12)
    for there, back in ((metric.root, metric.root_solve), (metric.adjoint, metric.adjoint_solve)):
        assert relative(back(there(u)), u) <= 1e-10
    assert float(u @ metric.adjoint(v)) == pytest.approx(float(metric.root(u) @ v), rel=1e-12)
    part = torch.arange(f.layers[0], f.layers[0] + f.layers[1])
    assert relative(now.local(part).root(u[part]), metric.root(u.index_fill(0, part, 0.0) - u)[part].neg()) <= 1e-12
    with pytest.raises(InputError, match="whole layers"):
        metric.local(torch.arange(3))


def test_steps_do_not_depend_on_the_units_of_the_inputs():
    """Invariance under an affine change of the inputs, which no step in the metric of numbers has."""
    found = []
    for scale in (torch.ones(3).double(), torch.tensor([1e-2, 1.0, 30.0]).double()):
        f = network()
        with torch.no_grad():
            f.network[0].weight.div_(scale)
        f.x, f.factors = f.x * scale, EXACT
        run = TrustRegionMinimizer(f, model="metric", metric="kfac", radius=0.3, max_it=12, metric_every=3)
        found.append(run.minimize(f.parameters()).history["objective"])
    assert relative(torch.tensor(found[1]), torch.tensor(found[0])) <= 1e-6
    assert all(b <= a for a, b in pairwise(found[0])) and found[0][-1] < 0.98 * found[0][0]


@pytest.mark.parametrize(
    "kind, words",
    [
        (TrustRegionMinimizer, dict(metric_every=2)),
        (TrustRegionMinimizer, dict(metric_every=3, model="metric", batch=20)),
        (APTS, dict(metric_every=2, weights=2, data=2)),
    ],
)
def test_a_restart_goes_on_with_the_same_iterates(kind, words):
    saved = {}

    def save(run, history):
        if history[-1].iteration == 3:
            saved.update(memory=run.memory(), history=type(history)(list(history.records)))

    f = network()
    expected = kind(f, max_it=7, metric="kfac", **words).minimize(f.parameters(), observers=[save])
    f = network()
    found = kind(f, max_it=7, metric="kfac", **words).minimize(zeros(f), **saved)
    assert torch.equal(found.design, expected.design)
    assert found.history["objective"] == expected.history["objective"]


def test_a_refresh_counts_what_it_costs():
    for fisher, passes in (("sampled", 1), ("exact", 2)):
        f = network()
        f.factors = FactorSettings(fisher=fisher)
        run = TrustRegionMinimizer(f, metric="kfac", metric_every=2, max_it=4, radius=0.1)
        run.minimize(f.parameters())
        assert run.spent().gradients == 5 + 3 * passes and run.spent().work == pytest.approx(5 + 3 * passes)


def test_the_metric_of_a_control_problem_is_that_of_functions():
    """The same iterates as in coordinates in which it is Euclidean from the start."""
    reduced = ReducedObjective(examples.burgers(nt=8))
    scale = copy(RieszMetric(reduced.problem).root())
    words = dict(max_it=6, radius=0.2, gtol=0.0)
    z = TrustRegionMinimizer(reduced, metric="riesz", **words).minimize(zeros(reduced)).design
    y = TrustRegionMinimizer(ScaledFunction(reduced, scale), **words).minimize(zeros(reduced)).design
    assert relative(z, y / scale) <= 1e-8


def test_a_unit_of_the_function_changes_nothing():
    f, unit = network(), 2.0**40
    words = dict(metric="kfac", model="metric", max_it=5, gtol=0.0)
    plain = TrustRegionMinimizer(f, **words).minimize(f.parameters()).design
    other = TrustRegionMinimizer(in_units(f, unit), **words).minimize(f.parameters(), unit=1.0).design
    assert relative(other, plain) <= 1e-9


def test_what_has_no_such_metric_is_named():
    f, x = network(), torch.zeros(4, 3).double()
    with pytest.raises(InputError, match="metric kfac of Quadratic: got none"):
        TrustRegionMinimizer(quadratic(), metric="kfac").minimize(zeros(quadratic()))
    with pytest.raises(InputError, match=r"got riesz; legal: none \| kfac"):
        TrustRegionMinimizer(f, metric="riesz").minimize(f.parameters())
    with pytest.raises(InputError, match="norm of a trust region with metric kfac"):
        TrustRegionMinimizer(f, metric="kfac", norm="inf").minimize(f.parameters())
    with pytest.raises(InputError, match="l1_loss"):
        NetworkMetric(f.network, nn.functional.l1_loss, x, EXACT)
    with pytest.raises(InputError, match="GRU"):
        NetworkMetric(nn.GRU(3, 2).double(), SquaredError(), x, EXACT)
