"""Dense networks as control problems: derivatives by hand against PyTorch's, Gauss-Newton steps, ranks."""

import numpy as np
import pytest
import torch
from torch import nn

import nn_adapters as nna
import pdeopt as po
from nn_adapters.control.chain import DenseChain
from nn_adapters.control.densenetwork import DenseNetwork
from nn_adapters.control.intervals import exact_cycles, interval_matrices, sums_of_layers
from nn_adapters.control.scoreloss import classification_loss
from nn_adapters.curvature.factors import KroneckerFactors
from nn_adapters.curvature.layers import curved_layers
from nn_adapters.curvature.likelihoods import CrossEntropy
from pdeopt.core.monitor import Reason
from pdeopt.optimize.curvedproblem import CurvedObjective, curved_function
from pdeopt.steps.mgrit import MgritSettings
from tests.helpers.dense_networks import WIDTH, dense_problem, own
from tests.helpers.support import python

KINDS = [("tanh", "dense", 8), ("relu", "affine", 1), ("sigmoid", "none", 3)]


def penalty(problem, x):
    z, p = x.split([problem.layout.control_size, problem.layout.param_size])
    return 0.5 * 1e-2 * problem.grid.steps.dt[0] * z.square().sum() + 0.5 * 2e-2 * p.square().sum()


@pytest.mark.parametrize("act, opening, layers", KINDS)
def test_value_gradient_and_products_are_those_of_autograd(act, opening, layers):
    problem, start, network, labels = dense_problem(layers, act=act, opening=opening)
    x, function = own(problem, start), curved_function(problem)
    assert isinstance(function, DenseNetwork)
    point = function.at(x)
    scores = network(problem.constraint.features)
    loss = nn.functional.cross_entropy(scores, labels)
    assert point.value == pytest.approx(float(loss.detach() + penalty(problem, x)), rel=1e-13)
    parts = list(network.parameters())
    order = sorted(range(len(parts)), key=lambda k: not any(parts[k] is q for q in network[-2].parameters()))
    flat = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, [parts[k] for k in order])])
    rest = torch.autograd.functional.jacobian(lambda y: penalty(problem, y), x)
    assert torch.allclose(point.gradient, flat + rest, atol=1e-14)
    generic = CurvedObjective(problem).at(x)
    d = torch.randn(len(x), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.allclose(generic.gradient, point.gradient, atol=1e-14)
    by_hand, derived = (each.curvature().product(d).image for each in (point, generic))
    assert torch.allclose(by_hand, derived, atol=1e-13)
    assert float(d @ by_hand) > 0


@pytest.mark.parametrize("layers", [1, 5])
def test_a_price_of_jumps_from_layer_to_layer(layers):
    """By hand, through the control map, and by its formula; the preconditioner knows its diagonal."""
    gamma, T = 0.3, 2.0
    problem, start, *_ = dense_problem(layers, T=T, smoothness=gamma)
    plain = dense_problem(layers, T=T)[0]
    x, function = own(problem, start), curved_function(problem)
    assert isinstance(function, DenseNetwork)
    d = torch.randn(len(x), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows = [v[: problem.layout.control_size].view(layers, -1).diff(dim=0) * (layers / T) for v in (x, d)]
    point, without, generic = function.at(x), curved_function(plain).at(x), CurvedObjective(problem).at(x)
    assert point.value == pytest.approx(without.value + 0.5 * gamma * float(rows[0].square().sum()), rel=1e-13)
    assert generic.value == pytest.approx(point.value, rel=1e-13)
    assert torch.allclose(generic.gradient, point.gradient, atol=1e-12)
    products = [each.curvature().product(d).image for each in (point, generic, without)]
    assert torch.allclose(products[0], products[1], atol=1e-11)
    assert float(d @ products[0]) == pytest.approx(float(d @ products[2] + gamma * rows[1].square().sum()), rel=1e-12)
    unit = torch.zeros_like(d)
    unit[0] = 1.0
    found = function.terms.product(unit)[0]
    assert found == pytest.approx(float(function.terms.layers[0]), rel=1e-14)


def test_smooth_controls_pass_the_taylor_test():
    po.assert_consistent(dense_problem(2, samples=4, opening="none", smoothness=0.1)[0])


def test_states_follow_a_step_with_second_order():
    problem, start, *_ = dense_problem()
    x, function = own(problem, start), curved_function(problem, states="unknown")
    d = torch.randn(len(x), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    point, misses = function.at(x), []
    for size in (1e-2, 1e-3):
        ahead = point.ahead(size * d, point.curvature().product(size * d).state)
        misses.append(float((ahead.state - function.at(x + size * d).state).norm()))
        assert abs(ahead.value - function.at(x + size * d).value) < 10 * size**3  # restored linearly
    assert misses[0] / misses[1] == pytest.approx(100, rel=0.2)


def test_full_space_points_agree_with_the_generic_ones():
    problem, start, *_ = dense_problem(4)
    x = own(problem, start)
    functions = curved_function(problem, states="unknown"), CurvedObjective(problem, unknown=True)
    u = torch.randn(4, *problem.constraint.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    a, b = functions[0].at(x, u.mT.reshape(-1)), functions[1].at(x, u.reshape(-1))
    d = torch.linspace(-1, 1, len(x), dtype=torch.float64)
    assert a.value == pytest.approx(b.value, rel=1e-12) and torch.allclose(a.gradient, b.gradient, atol=1e-13)
    p, q = a.curvature().product(d), b.curvature().product(d)
    assert torch.allclose(p.image, q.image, atol=1e-12)
    assert torch.allclose(p.state.view(4, WIDTH, -1).mT.reshape(-1), q.state, atol=1e-12)


def test_factors_are_the_exact_ones_of_kfac():
    problem, start, network, _ = dense_problem(3)
    function = curved_function(problem)
    found = function.at(own(problem, start)).curvature().factors().batches.pairs
    layers = curved_layers(network)
    kfac = KroneckerFactors(network, layers, CrossEntropy())
    kfac.average([(problem.constraint.features,)])
    blocks, dt = kfac.blocks(), float(problem.grid.steps.dt[0])
    assert torch.allclose(found[0].A, torch.stack(blocks.A[1:4]), atol=1e-13)
    assert torch.allclose(found[0].G, torch.stack(blocks.G[1:4]), atol=1e-13) and dt < 1
    for pair, k in zip(found[1:], (0, 4)):
        assert torch.allclose(pair.A[0], blocks.A[k], atol=1e-13) and torch.allclose(pair.G[0], blocks.G[k], atol=1e-13)


def test_few_samples_of_the_curvature_are_those_of_a_smaller_network():
    problem, start, *_ = dense_problem(samples=12)
    x, rows = own(problem, start), torch.tensor([0, 3, 7])
    constraint = problem.constraint
    few = nna.LayerConstraint(constraint.block, constraint.features[rows], constraint.opening, constraint.head)
    objective = classification_loss(few, None, torch.arange(12)[rows] % 4) + po.ControlCost(1e-2)
    small = curved_function(po.ControlProblem(few, objective + nna.ParameterCost(2e-2), problem.grid))
    function, d = curved_function(problem), torch.linspace(-1, 1, len(x), dtype=torch.float64)
    point = function.at(x)
    work = function.tally.work
    found = point.curvature(rows).product(d).image
    assert function.tally.work - work == pytest.approx(0.25)  # by its share of the samples
    assert torch.allclose(found, small.at(x).curvature().product(d).image, atol=1e-14)


@pytest.mark.parametrize("factor, layers", [("4", 16), ("4,2", 15), ("16", 8)])
def test_sweeps_by_mgrit_are_exact_and_transposes(factor, layers):
    problem, start, *_ = dense_problem(layers)
    g = torch.Generator().manual_seed(3)
    W = start[0][:, : WIDTH**2].unflatten(1, (WIDTH, WIDTH))
    V, du, end = (torch.rand(*shape, WIDTH, 5, generator=g, dtype=torch.float64) for shape in ((layers,), (), ()))
    settings = exact_cycles(MgritSettings(coarsening=factor, levels=2 + factor.count(",")), layers)
    serial, cycles = (DenseChain(problem.grid, problem.constraint.block, s).linearized(W, V) for s in (None, settings))
    assert torch.allclose(cycles.forward(du, V, V), serial.forward(du, V, V), atol=1e-9)
    for a, b in zip(cycles.backward(end), serial.backward(end)):
        assert torch.allclose(a, b, atol=1e-9)
    after, before = serial.forward(du)[-1], serial.backward(end)[1]
    assert float((after * end).sum()) == pytest.approx(float((du * before).sum()), rel=1e-13)


@pytest.mark.parametrize("factor, layers", [(4, 16), (3, 8)])
def test_coarse_steps_are_products_of_layers_to_second_order(factor, layers):
    g, errors = torch.Generator().manual_seed(4), []
    W, D = (torch.randn(layers, 3, n, generator=g, dtype=torch.float64) for n in (3, 5))
    sums, single = sums_of_layers(W, D, factor), D[:, :, None] * W[..., None]
    assert torch.allclose(sums, torch.stack([part.sum(0) for part in single.split(factor)]), rtol=0, atol=1e-14)
    for size in (2e-2, 1e-2):
        alike = size * single[:1].expand_as(single)  # products of alike matrices need no order
        found = interval_matrices(torch.stack([part.sum(0) for part in alike.split(factor)]), layers, factor)
        for part, B in zip(alike.split(factor), found):
            exact = torch.eye(3).double()[:, :, None].expand(3, 3, 5)
            for A in part:
                exact = exact + torch.einsum("abs,bcs->acs", A, exact)
            errors.append(float((exact - torch.eye(3).double()[:, :, None] - B).norm()))
    half = len(errors) // 2
    assert all(fine < max(coarse / 6, 1e-14) for coarse, fine in zip(errors[:half], errors[half:]))  # third order: 8


def test_one_shot_converges_to_solved_states_and_adjoints():
    """Where steps end, values and gradients are those of solved equations: both have the same optima."""
    problem, start, *_ = dense_problem(layers=16)
    x, generator = own(problem, start), torch.Generator().manual_seed(5)
    d = 0.3 * torch.randn(len(x), generator=generator, dtype=torch.float64)
    exact, errors = curved_function(problem).at(x + d), []
    first = curved_function(problem, sweeps="one_shot").at(x)
    assert first.value == curved_function(problem).at(x).value
    assert first.gradient.isfinite().all()
    point = first.ahead(d, first.curvature().product(d).state)
    for _ in range(4):
        errors.append(float((point.gradient - exact.gradient).norm() / exact.gradient.norm()))
        point = point.refined()
    assert errors[0] > 1e-9 and errors[1] < 1e-2 * errors[0] and errors[-1] < 1e-11
    assert point.value == pytest.approx(exact.value, rel=1e-13)


def test_one_shot_trains_as_solved_states_do():
    problem, start, *_ = dense_problem(layers=16)
    function, x = curved_function(problem, sweeps="one_shot"), own(problem, start)
    found, solved = (po.GaussNewton(f, max_it=8).minimize(x) for f in (function, curved_function(problem)))
    assert found.objective == pytest.approx(solved.objective, rel=0.02)
    assert found.objective < 0.9 * found.history[0].objective
    assert curved_function(problem).value(found.design) == pytest.approx(found.objective, rel=1e-4)
    assert function.chain.count.cycles >= 2 * (function.chain.count.sweeps - 1) > 0  # all but the first states


def test_quasi_newton_steps_in_one_shot_end_in_the_same_optimum():
    """L-BFGS with values and gradients of two cycles: where it ends, the gradient of solved equations is zero."""
    problem, start, *_ = dense_problem(samples=6)
    exact, few, x = curved_function(problem), curved_function(problem, sweeps="one_shot"), own(problem, start)
    found, solved = (po.LBFGS(f, rtol=1e-5, max_it=300).minimize(x) for f in (few, exact))
    assert found.converged and solved.converged
    first, last = (float(exact.value_and_gradient(z)[1].norm()) for z in (x, found.design))
    assert last < 2e-5 * first
    assert found.objective == pytest.approx(solved.objective, rel=1e-7)
    assert few.chain.count.cycles == 2 * (few.chain.count.sweeps - 1) > 0  # all but the first states


@pytest.mark.parametrize("words", [{"states": "eliminated"}, {"states": "unknown"}, {"sweeps": "one_shot"}])
def test_a_restart_goes_on_to_the_last_bit(words):
    problem, start, *_ = dense_problem(samples=40)
    x = own(problem, start)
    settings = {"samples": 10, "factors_every": 3}
    whole = po.GaussNewton(curved_function(problem, **words), max_it=9, **settings).minimize(x)
    kept = []

    def keep(method, history):
        if len(history) == 5:
            kept.append((method.memory(), type(history)(list(history.records))))

    po.GaussNewton(curved_function(problem, **words), max_it=9, **settings).minimize(x, observers=[keep])
    memory, history = kept[0]
    again = po.GaussNewton(curved_function(problem, **words), max_it=9, **settings)
    found = again.minimize(x, memory=memory, history=history)
    assert torch.equal(found.design, whole.design)
    assert found.history["work"] == whole.history["work"]


def test_solve_trains_a_network_and_gives_its_states():
    problem, start, *_ = dense_problem()
    result = po.solve(problem, method="gauss_newton", start=own(problem, start), max_it=6)
    assert result.method == "gauss_newton" and result.objective < 0.95 * result.history[0].objective
    u, (z, _) = problem.layout.rows(result.state), problem.layout.design_fields(result.design)
    rows = problem.constraint.layer(u[:-1], z.reshape(len(u), -1)[1:], problem.grid.steps[1:])
    assert torch.allclose(rows, u[1:], atol=1e-13)


def test_weights_without_a_loss_end_with_a_reason():
    problem, start, *_ = dense_problem()
    x = own(problem, start)
    x[0] = 1e200
    result = po.GaussNewton(curved_function(problem)).minimize(x)
    assert not result.converged and result.reason == Reason.DIVERGED_NAN


def test_what_is_no_network_is_refused_or_generic():
    with pytest.raises(po.InputError, match="at least one sample"):
        nna.LayerConstraint(nna.dense(3), torch.zeros(0, 3))
    with pytest.raises(po.InputError, match="one a sample"):
        classification_loss(nna.LayerConstraint(nna.dense(3), torch.zeros(2, 3)), None, torch.zeros(3))
    constraint = nna.LayerConstraint(
        nna.conv(1), torch.rand(2, 1, 3, 3), head=nn.Sequential(nn.Flatten(), nn.Linear(9, 2))
    )
    objective = classification_loss(constraint, None, torch.tensor([0, 1])) + po.ControlCost(1e-2)
    problem = po.ControlProblem(constraint, objective, po.TimeGrid.uniform(2, 1.0))
    assert isinstance(curved_function(problem), CurvedObjective)
    with pytest.raises(po.InputError, match="gn_sweeps"):
        curved_function(problem, sweeps="mgrit")
    with pytest.raises(po.InputError, match="one_shot with states unknown"):
        curved_function(problem, states="unknown", sweeps="one_shot")


@pytest.mark.mpi
@pytest.mark.parametrize("most", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_find_the_same(tmp_path, most):
    found = {}
    for ranks in (1, most):
        file = tmp_path / f"{ranks}.npz"
        ended = python("-m", "tests.helpers.dense_networks", file, ranks=ranks)
        assert ended.returncode == 0, ended.stderr
        found[ranks] = np.load(file)
    for key in found[1].files:
        assert np.allclose(found[most][key], found[1][key], rtol=0, atol=1e-8), key


def test_any_network_has_the_same_products_and_factors():
    problem, start, network, labels = dense_problem(3)
    function = nna.NetworkFunction(network, CrossEntropy(), problem.constraint.features, labels, l2=1e-2)
    theta = function.parameters()
    point, d = function.at(theta), torch.linspace(-1, 1, function.size, dtype=torch.float64)
    loss = nn.functional.cross_entropy(network(problem.constraint.features), labels).detach()
    assert point.value == pytest.approx(float(loss) + 0.5e-2 * float(theta @ theta))
    assert function.verify(theta)["gradient"] < 1e-5
    dense = curved_function(problem).at(own(problem, start)).curvature()
    sizes = problem.layout.control_size, problem.layout.param_size
    opening = 3 * WIDTH  # of [opening | layers | head]
    z, ends = d[opening : opening + sizes[0]], torch.cat([d[:opening], d[opening + sizes[0] :]])
    image = dense.product(torch.cat([z, ends])).image
    costs = torch.cat([1e-2 * problem.grid.steps.dt[0] * z, 2e-2 * ends])
    z, ends = (image - costs).split(sizes)
    expected = torch.cat([ends[:opening], z, ends[opening:]]) + 1e-2 * d
    found = point.curvature()
    assert torch.allclose(found.product(d).image, expected, atol=1e-13)
    factors = found.factors()
    again = function.recalled(factors.memory())
    assert torch.equal(factors.inverse(0.1)(d), again.inverse(0.1)(d))
    recurrent = nn.Sequential(nna.GRUStack(2, 3), nn.Linear(3, 4))
    x = torch.randn(4, 5, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gru = nna.NetworkFunction(recurrent, CrossEntropy(), x, torch.arange(4))
    result = po.GaussNewton(gru, max_it=8).minimize(gru.parameters())
    assert result.history[-1].objective < 0.8 * result.history[0].objective


@pytest.mark.parametrize("kind", ["classic", "implicit"])
def test_recurrent_units_have_factors_of_their_affine_maps(kind):
    generator, steps, samples = torch.Generator().manual_seed(6), 2, 9
    x, labels = torch.randn(samples, steps, 2, generator=generator), torch.arange(samples) % 3
    torch.manual_seed(7)
    network = nn.Sequential(nna.GRUParallel(None, 2, 3, steps, 2, kind), nn.Linear(3, 3))
    function = nna.NetworkFunction(network, CrossEntropy(), x, labels, l2=1e-2)
    theta = torch.cat([p.detach().double().reshape(-1) for p in network.parameters()])
    assert torch.equal(function.parameters(), theta)
    with torch.no_grad():
        assert torch.allclose(function.outputs(theta, x).float(), network(x), atol=1e-6)
    found = [po.GaussNewton(function, max_it=6, precond=precond).minimize(theta) for precond in ("factors", "none")]
    assert found[0].objective < found[1].objective < found[0].history[0].objective
