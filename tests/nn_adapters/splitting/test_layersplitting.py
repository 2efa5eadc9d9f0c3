"""Training by splitting: exact blocks, forms that agree, least squares as a special case, ranks, restarts."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import nn_adapters as nna
from nn_adapters.splitting import SplitTrainingSettings, StreamedLayers, WholeLayers
from nn_adapters.splitting.proximal import SPLIT_ACTIVATIONS
from nn_adapters.splitting.splitlayers import split_layers
from pdeopt.core.errors import InputError
from pdeopt.core.memory import forget_peak, used_memory
from pdeopt.core.monitor import Reason
from pdeopt.optimize.splitting import ADMM
from tests.helpers.parallel_splitting import FORMS, network, samples, splitting_of, weights
from tests.helpers.splitting import never_rises
from tests.helpers.support import python
from tests.helpers.threads import on_threads

ACTIVATIONS = [nn.ReLU, nn.LeakyReLU, lambda: nn.Hardtanh(0.0, 1.0), nn.Tanh, nn.Softplus, nn.Identity]


def ode_network():
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Linear(4, 5), nn.ReLU(), nna.LayerStack(lambda: nna.dense(5, "relu"), 3, 1.0), nn.Linear(5, 3)
    ).double()


def split(net, form="backward", iterations=10, **settings):
    x, y = samples()
    return splitting_of(form, iterations, net, x, y, SplitTrainingSettings(form=form, **settings))


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("loss", ["hinge", "squared", "cross_entropy"])
def test_no_block_raises_the_augmented_lagrangian(act, loss):
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(4, 6), act(), nn.Linear(6, 5, bias=False), act(), nn.Linear(5, 3)).double()
    never_rises(split(net, "seed", loss=loss, states="random", gamma=2.0))


def test_no_block_of_an_ode_network_raises_the_augmented_lagrangian():
    never_rises(split(ode_network(), states="random", gamma=2.0))


def test_a_stream_of_all_samples_without_forgetting_is_the_direct_form():
    """One increment of length 1 gives the least squares of the same states; a and m are those of the forward pass."""
    stream = split(
        network(),
        "streaming",
        batch=40,
        momentum=0.0,
        forgetting=0.0,
        ridge=0.0,
        step=1.0,
        scaling="none",
        ridge_share=0.0,
    )
    for block in stream.sweep(1):
        stream.update(block)
    a = stream.states.start[0]
    for k, layer in enumerate(stream.layers, start=1):
        direct = np.linalg.lstsq(layer.map.rows(a[k - 1]).numpy(), stream.states.z[k].numpy(), rcond=None)[0].T
        assert np.allclose(stream.W[k - 1], direct, rtol=0, atol=1e-11)


@pytest.mark.parametrize("loss", ["hinge", "squared"])
def test_the_first_step_of_a_stream_moves_the_outputs_of_each_layer_by_its_length(loss):
    """The root mean square over samples and entries, whatever ridge, loss and targets; later ones follow the mean."""
    stream = split(network(), loss=loss, form="streaming", batch=40, momentum=0.0, forgetting=0.0, ridge=0.3, step=0.2)
    sizes = []
    for iteration in (1, 2):
        before = [W.clone() for W in stream.W]
        for block in stream.sweep(iteration):
            stream.update(block)
        a = stream.states.start[0]
        moves = [layer.map.rows(a[k]) @ (stream.W[k] - before[k]).T for k, layer in enumerate(stream.layers)]
        sizes.append([float(move.square().mean().sqrt()) for move in moves])
    assert np.allclose(sizes[0], 0.2, rtol=1e-12)
    # with X of norm q1, then q2, the second step is 0.9 * 0.2 q2 / sqrt((q1^2 + q2^2) / 2)
    changes = (stream._changes.sqrt() / np.sqrt(2)).numpy()
    ratio = np.array(sizes[1]) / 0.18
    assert np.all(ratio < np.sqrt(2)) and np.all(changes > 0) and not np.allclose(ratio, 1.0, rtol=1e-6)


@pytest.mark.parametrize("form", ["seed", "backward"])
@pytest.mark.parametrize("ridge", [0.0, 0.2])
def test_one_layer_is_ridge_regression(form, ridge):
    """min |W [x; 1] - y|^2 + alpha |W|^2, whose alpha is the sum of ridge beta over the samples."""
    ridges = pytest.importorskip("sklearn.linear_model")
    x, y = samples()
    net = nn.Linear(4, 3).double()
    splitting = WholeLayers(net, x, y, SplitTrainingSettings(loss="squared", form=form, ridge=ridge, beta=0.5))
    result = ADMM(splitting, max_it=400, rtol=1e-13).solve()
    rows = torch.cat([x, torch.ones(len(x), 1).double()], 1)
    oracle = ridges.Ridge(ridge * 0.5 * len(x), fit_intercept=False).fit(rows, nn.functional.one_hot(y, 3).double())
    assert result.converged
    assert np.allclose(splitting.W[0], oracle.coef_, rtol=0, atol=1e-10)
    assert torch.equal(net.weight, splitting.W[0][:, :4])


@pytest.mark.parametrize("widths", [(6,), (6, 5)])
def test_a_linear_network_is_least_squares(widths):
    """Where no layer is narrower than the samples, W_L ... W_1 has all matrices, and its best outputs are theirs."""
    x, y = samples()
    torch.manual_seed(0)
    hidden = [each for n, m in zip((4, *widths), widths) for each in (nn.Linear(n, m), nn.Identity())]
    net = nn.Sequential(*hidden, nn.Linear(widths[-1], 3)).double()
    settings = SplitTrainingSettings(
        loss="squared", batch=40, momentum=0.0, forgetting=0.0, ridge=1e-9, step=1.0, scaling="none", ridge_share=0.0
    )
    ADMM(StreamedLayers(150, net, x, y, settings), max_it=150, multipliers=False, rtol=0.0).solve()
    rows = np.c_[x, np.ones(len(x))]
    expected = rows @ np.linalg.lstsq(rows, np.eye(3)[y], rcond=None)[0]
    assert np.allclose(net(x).detach(), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("form", ["seed", "backward"])
def test_fixed_points_satisfy_the_conditions_of_the_split_problem(form):
    """Where ADMM has converged, the Lagrangian is stationary in all blocks, and the outputs fit the weights."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    splitting = split(net, form, loss="squared", gamma=1.0, beta=1.0, ridge=0.3)
    result = ADMM(splitting, max_it=1000, rtol=1e-7).solve()
    assert result.converged, result.message
    unknowns = [*splitting.W, *splitting.states.a[1:], *splitting.states.z[1:]]
    assert all(float(each.norm()) > 0.1 for each in [*unknowns, splitting.states.multiplier])
    for each in unknowns:
        each.requires_grad_()
    gradients = torch.autograd.grad(_lagrangian(splitting), unknowns)
    # at the kink of ReLU a minimum has no gradient
    slopes = [torch.where(each.abs() < 1e-9, 0.0, g) for g, each in zip(gradients, map(torch.Tensor.detach, unknowns))]
    assert max(float(g.norm()) for g in slopes) < 1e-5
    assert float((splitting.states.z[-1] - splitting.states.mapped(2)).detach().abs().max()) < 1e-6


def _lagrangian(s):
    """The formula of the module's docstring, for autograd, with the ridge of the weights."""
    v = s.states
    total = s.loss.value(v.z[-1], v.y).sum()
    for k, layer in enumerate(s.layers, start=1):
        m = layer.map.rows(v.a[k - 1]) @ s.W[k - 1].T
        total = total + v.beta[k] * (
            (v.z[k] - m).square().sum() + s.settings.ridge * s.count * s.W[k - 1].square().sum()
        )
        if k < len(s.layers):
            total = total + v.gamma[k] * (v.a[k] - layer.after(v.a[k - 1], v.z[k])).square().sum()
        else:
            total = total + (v.multiplier * (v.z[k] - m)).sum()
    return total


def test_a_stream_learns():
    x, y = samples(400)
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 3)).double()
    splitting = StreamedLayers(100, net, x, y, SplitTrainingSettings(batch=100))
    ADMM(splitting, max_it=100, multipliers=False, rtol=0.0).solve()
    assert float((net(x).argmax(1) == y).double().mean()) > 0.92


@pytest.mark.parametrize("form", FORMS)
def test_restarts_bit_for_bit(form):
    whole, first, second = (split(network(), form, batch=16, iterations=6, step=1.0) for _ in range(3))
    settings = {"multipliers": form != "streaming", "warm_up": 1, "rtol": 0.0}
    expected = ADMM(whole, max_it=6, **settings).solve()
    third = expected.history["products"][2]
    before = ADMM(first, **settings).solve(until=lambda method: method.constraint.work.products > third)
    assert before.reason == Reason.WORK_DONE and before.iterations == 3
    second.recall(first.memory())
    found = ADMM(second, max_it=6, **settings).solve(history=before.history)
    assert torch.equal(found.design, expected.design)
    for name in ("feasibility", "products", "solves"):
        assert found.history[name][-1] == expected.history[name][-1]


@pytest.mark.parametrize("form", FORMS)
def test_a_restart_counts_work_as_a_run_of_one_piece(form):
    """Matrices of 5 and 7 entries: thirds of n^3, added up from another start, ended in another last digit."""
    whole, first, second = (split(network(), form, batch=16, iterations=40) for _ in range(3))
    settings = {"multipliers": form != "streaming", "rtol": 0.0}
    expected = ADMM(whole, max_it=40, **settings).solve().history
    before = ADMM(first, max_it=23, **settings).solve().history
    second.recall(first.memory())
    found = ADMM(second, max_it=40, **settings).solve(history=before).history
    for name in ("products", "solves"):
        assert found[name] == expected[name] and all(each.is_integer() for each in found[name])


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", [3, pytest.param(2, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_find_the_same_weights(tmp_path, ranks):
    """Unequal shares, and a rank without a sample."""
    file = tmp_path / "found.json"
    done = python("-m", "tests.helpers.parallel_splitting", file, ranks=ranks)
    assert done.returncode == 0, done.stderr
    for form, (found, primal) in json.loads(file.read_text()).items():
        expected, residuals = weights(form, None)
        assert np.allclose(found, expected, rtol=0, atol=1e-12)
        assert np.allclose(primal, residuals, rtol=1e-10)


def test_networks_are_read_and_written():
    net = ode_network()
    layers = split_layers(net)
    assert [(layer.inputs, layer.outputs, layer.skip) for layer in layers] == [(5, 5, 0), *[(6, 5, 1)] * 3, (6, 3, 0)]
    x = samples()[0]
    splitting = split(net)
    assert torch.allclose(splitting.states.z[-1], net(x))
    for W in splitting.W:
        W += 1
    splitting.design()
    splitting.states.forget()
    assert torch.allclose(splitting.states.mapped(1), net[0](x))


@pytest.mark.parametrize(
    "net, match",
    [
        (nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3)), "two linear layers"),
        (nn.Sequential(nn.Linear(4, 3), nn.ReLU()), "no linear layer at the end"),
        (nn.Sequential(nn.ReLU(), nn.Linear(4, 3)), "before it"),
        (nn.Sequential(nn.Linear(4, 3), nn.GELU(), nn.Linear(3, 3)), "Softplus"),
        (nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(4, 3)), "fit"),
        (nn.Sequential(nn.Linear(5, 3)), "entries of a sample"),
        (nn.Sequential(nn.Linear(4, 2)), "0 to 1"),
    ],
)
def test_networks_that_cannot_be_split_are_refused(net, match):
    with pytest.raises(InputError, match=match):
        split(net.double())


def test_samples_that_do_not_fit_are_refused():
    x, y = samples()
    with pytest.raises(InputError, match="the same number"):
        WholeLayers(network(), x, y[1:])
    with pytest.raises(InputError, match="finite"):
        WholeLayers(network(), x * np.nan, y)
    with pytest.raises(InputError, match=">= 1"):
        WholeLayers(network(), x[:0], y[:0])
    for loss, targets in (("hinge", x[:, :3]), ("squared", x)):
        with pytest.raises(InputError, match=r"\(samples, 3\) with the squared loss"):
            WholeLayers(network(), x, targets, SplitTrainingSettings(loss=loss))


@pytest.mark.parametrize("name", ["beta", "gamma", "step", "softness"])
@pytest.mark.parametrize("value", [0.0, -1.0, np.nan])
def test_penalties_that_are_none_are_refused(name, value):
    with pytest.raises(InputError, match=f"{name}.*> 0"):
        split(network(), **{name: value})


def test_a_dead_entry_of_the_samples_is_no_obstacle():
    x, y = samples()
    x[:, 1] = 0.0
    splitting = WholeLayers(network(), x, y, SplitTrainingSettings(form="seed", ridge=0.0))
    with pytest.warns(UserWarning, match="5 inputs is singular"):
        result = ADMM(splitting, max_it=3).solve()
    assert result.reason == Reason.DIVERGED_MAX_IT and bool(result.design.isfinite().all())


def test_weights_stay_where_the_loss_has_nothing_to_gain():
    """The cross entropy of one class is zero: what targets differ by is rounding, which must not become a step."""
    torch.manual_seed(0)
    stack = nna.LayerStack(lambda: nna.dense(5, "relu"), 1, 1.0)
    net, (x, _) = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), stack, nn.Linear(5, 1)).double(), samples()
    settings = SplitTrainingSettings(form="streaming", loss="cross_entropy", batch=20, precision="float64")
    splitting = splitting_of("streaming", 4, net, x, torch.zeros(len(x), dtype=torch.int64), settings)
    before = [W.clone() for W in splitting.W]
    ADMM(splitting, max_it=4, multipliers=False, rtol=0.0).solve()
    assert all((W - first).abs().max() <= 1e-12 for W, first in zip(splitting.W, before))


def test_numbers_that_overflow_name_the_block_and_keep_the_last_weights():
    splitting = split(network(), "streaming", batch=40, step=1e300)
    result = ADMM(splitting, max_it=5, multipliers=False, rtol=0.0).solve()
    assert not result.converged and "block" in result.message and "iteration" in result.message
    assert bool(result.design.isfinite().all())


@pytest.mark.parametrize("form", FORMS)
def test_numbers_that_overflow_on_one_rank_end_all(form):
    x, y = samples()
    x[-1] *= 1e300
    networks = [network(), network()]
    settings = SplitTrainingSettings(form=form, batch=40, loss="squared", precision="float64")

    def run(team):
        words = networks[team.rank], x.chunk(2)[team.rank], y.chunk(2)[team.rank], settings, team
        splitting = splitting_of(form, 5, *words)
        return ADMM(splitting, max_it=5, multipliers=form != "streaming", rtol=0.0).solve()

    for result in on_threads(2, run):
        assert result.reason == Reason.DIVERGED_LINEAR_SOLVE and "iteration 1, block" in result.message
        assert bool(result.design.isfinite().all())


def test_more_ranks_than_samples_are_refused():
    x, y = samples()
    networks = [network(), network()]

    def start(team):
        own = slice(0, 1 - team.rank)
        with pytest.raises(InputError, match=">= 2, the ranks"):
            WholeLayers(networks[team.rank], x[own], y[own], None, team)

    on_threads(2, start)


def test_all_activations_by_name_are_used():
    assert {type(layer.activation) for layer in split_layers(network())} <= {
        type(a) for a in SPLIT_ACTIVATIONS.values()
    }


def test_memory_is_that_of_the_states():
    """The whole forms keep nothing a second time, and say what they take."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30_000, 20, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 3, (30_000,), generator=generator)
    net = nn.Sequential(nn.Linear(20, 60), nn.Hardtanh(0.0, 1.0), nn.Linear(60, 60), nn.ReLU(), nn.Linear(60, 3))
    net = net.double()
    small = WholeLayers(net, x[:5000], y[:5000], SplitTrainingSettings(form="seed"))
    ADMM(small, max_it=1).solve()  # what libraries take
    forget_peak()
    before = used_memory()[0]
    splitting = WholeLayers(net, x, y, SplitTrainingSettings(form="seed", states="random"))
    ADMM(splitting, max_it=1, rtol=0.0).solve()
    predicted = splitting.predicted_memory()
    expected = sum(predicted.values()) - sum(predicted[part] for part in ("process", "libraries", "data"))
    assert predicted["states"] + predicted["multiplier"] == 30_000 * 8 * (4 * 60 + 2 * 3)
    assert used_memory()[1] - before < 1.1 * expected + 2e7  # a second copy were 6e7


def test_memory_of_a_stream_does_not_depend_on_the_samples():
    parts = [split(network(), "streaming", batch=8).predicted_memory()]
    x, y = samples(400)
    parts.append(StreamedLayers(5, network(), x, y, SplitTrainingSettings(batch=8)).predicted_memory())
    rest = [sum(each.values()) - each["data"] for each in parts]
    assert rest[0] == rest[1] and parts[1]["data"] == 10 * parts[0]["data"]
