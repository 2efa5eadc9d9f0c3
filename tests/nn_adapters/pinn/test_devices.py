"""PINNs on another device than the host: the same numbers, and one way there and one back for a value with a gradient.

The device is a pretended one, which any machine has (`tests.helpers.pretended`), and a GPU where there is one.
"""

import pytest
import torch

from nn_adapters.pinn.domains import PolygonFactor
from nn_adapters.pinn.features import Features, stretched
from nn_adapters.pinn.loss import PINN
from nn_adapters.pinn.network import Network
from nn_adapters.pinn.points import uniform_points
from nn_adapters.pinn.terms import Term
from pdeopt.core.errors import InputError
from pdeopt.core.team import checked_device
from pdeopt.optimize.descent import SSBroyden
from pdeopt.optimize.squares import LevenbergMarquardt
from tests.helpers.pinns import burgers, fields, hard, points, soft, somewhere, wave
from tests.helpers.pretended import DEVICE, PretendedDevice, There
from tests.helpers.support import python, relative

BOX = [(-1.0, 1.0), (0.0, 1.0)]


class Watched:
    """A device, and what is known of its crossings."""

    def __init__(self, name, pretended=None):
        self.name, self.pretended = name, pretended

    def forget(self):
        """The crossings so far."""
        if self.pretended is not None:
            self.pretended.spent()

    def spent(self, *expected):
        """Those since then are as expected; a real device does not tell them."""
        assert self.pretended is None or self.pretended.spent() == list(expected)

    def has(self, *tensors):
        return all(each.device.type == self.name for each in tensors)


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device that PyTorch can use")


@pytest.fixture(params=["pretended", pytest.param("cuda", marks=GPU)])
def device(request):
    if request.param == "cuda":
        yield Watched("cuda")
        return
    with PretendedDevice() as pretended:
        yield Watched(DEVICE, pretended)


def corner():
    """A polygon's factor, waves, and an activation that torch differentiates."""
    features = stretched(Features(lambda x: x, 2), (2.0, 3.0), (0.5, 0.0))
    term = Term(0.9 * points(), lambda u, d, x: d["xx"] + d["yy"] + 1.0, ("xx", "yy"))
    square = PolygonFactor([(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)])
    return PINN(Network(2, (5, 5), activation="silu"), [term], "xy", factor=square, features=features)


def second_stage():
    """The lift is a network that was trained on the host."""
    first = wave()
    lift = first.field(somewhere(first, 4), {"t": 0.5})
    term = Term(points(), burgers, ("x", "t", "xx"))
    return PINN(Network(5, (4,)), [term], "xt", lift, lambda x: x[:, 1] - 0.5, features=first.ansatz.features)


MAKES = [hard, soft, wave, fields, corner, second_stage]


def moved(function, device, **words):
    """The same function, evaluated on the device."""
    words = {"features": function.ansatz.features, "balance": function.balance, "device": device.name} | words
    coefficients = function.ansatz.coefficients
    args = function.network, function.terms, function.names, function.lift, function.factor
    return PINN(*args, coefficients=coefficients, **words)


@pytest.mark.parametrize("make", MAKES)
def test_a_value_and_its_gradient_go_there_once_and_come_back_once(make, device, monkeypatch):
    monkeypatch.setattr("nn_adapters.pinn.terms.JETS_ON_DEVICE", 24 * 64)  # several chunks, of two sizes
    host = make()
    theta, there = somewhere(host), moved(host, device)
    assert len(there.evaluated[0].chunks) > 1
    device.forget()
    value, gradient = there.value_and_gradient(theta)
    device.spent("there", "home")
    expected = host.value_and_gradient(theta)
    assert value == pytest.approx(expected[0], rel=1e-12) and relative(gradient, expected[1]) < 1e-12
    assert there.value(theta) == pytest.approx(value, rel=1e-12)
    device.spent("there", "home")
    assert gradient.is_cpu


@pytest.mark.parametrize("make", [wave, fields])
def test_products_with_the_hessian(make, device):
    host = make()
    theta, there = somewhere(host), moved(host, device)
    device.forget()
    product = there.hvp(theta, theta)
    device.spent("there", "there", "home")  # the point and the direction
    assert product.is_cpu and relative(product, host.hvp(theta, theta)) < 1e-10


@pytest.mark.parametrize("make", MAKES)
def test_residuals_jacobians_and_products(make, device):
    host = make()
    theta, there, d = somewhere(host), moved(host, device), somewhere(host, 3)
    (r, J), (r_host, J_host) = there.linearize(theta), host.linearize(theta)
    assert r.is_cpu and device.has(J)
    assert relative(r, r_host) < 1e-12 and relative(J.cpu(), J_host) < 1e-12
    assert (
        relative(there.jvp(theta, d), J_host @ d) < 1e-12 and relative(there.vjp(theta, r), J_host.T @ r_host) < 1e-12
    )
    assert there.linearize(theta, out=J)[1] is J
    rows = torch.randperm(host.rows, generator=torch.Generator().manual_seed(0))[:20]
    r_some, J_some = there.linearize(theta, rows)
    device.forget()
    again = there.residual(theta, rows)  # where these rows are is known there
    device.spent("there", "home")
    assert relative(r_some, r_host[rows]) < 1e-12 and relative(again, r_some) < 1e-12
    assert relative(J_some.cpu(), J_host[rows]) < 1e-12
    assert relative(there.vjp(theta, r_some, rows), J_host[rows].T @ r_some) < 1e-12
    assert relative(there.jvp(theta, d, rows), J_host[rows] @ d) < 1e-12
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        out = torch.empty(host.rows, 7, dtype=dtype)
        there.columns(theta, 5, out)
        assert relative(out.double(), J_host[:, 5:12]) < bound


def test_all_that_is_made_of_it_stays_there(device):
    host = wave(draw=lambda n, seed: uniform_points(n, BOX, seed))
    theta, there, other = somewhere(host), moved(host, device), points(40, 9)
    pairs = [
        (host.with_points(other), there.with_points(other)),
        (host.with_points(other), there.with_points(other.to(device.name))),
        (host.subset(torch.arange(30)), there.subset(torch.arange(30))),
        (host.sample(theta, 50, seed=1, candidates=400), there.sample(theta, 50, seed=1, candidates=400)),
    ]
    pairs += [(a.recalled(a.sample_memory()), b.recalled(b.sample_memory())) for a, b in pairs[-1:]]
    for a, b in pairs:
        assert device.has(b.evaluated[0].chunks[0].x) and b.terms[0].points.is_cpu
        assert all(torch.as_tensor(numbers).is_cpu for numbers in b.sample_memory().values())
        assert torch.equal(a.terms[0].points, b.terms[0].points)
        assert b.value(theta) == pytest.approx(a.value(theta), rel=1e-11)


@pytest.mark.parametrize("rule", ["ntk", "gradients"])
def test_weights_follow_and_given_numbers_go_with_their_points(rule, device):
    host = moved(fields(), Watched("cpu"), balance=rule)
    theta, there = somewhere(host), moved(host, device)
    assert there.balanced(theta).factors == pytest.approx(host.balanced(theta).factors, rel=1e-10)
    assert there.coefficients_at(theta) == host.coefficients_at(theta)
    drawn, expected = there.sample(theta, 60, seed=2), host.sample(theta, 60, seed=2)
    assert drawn.value(theta) == pytest.approx(expected.value(theta), rel=1e-10)


def test_values_are_where_the_points_are(device):
    host = fields()
    theta, there, x = somewhere(host), moved(host, device), points(9, 3)
    at = x.to(device.name)
    for name in ("predict", "residuals"):
        here = getattr(moved(wave(), device), name)(somewhere(wave()), x)
        found = getattr(moved(wave(), device), name)(somewhere(wave()), at)
        assert here.is_cpu and device.has(found) and relative(found.cpu(), here) < 1e-12
    assert there.residuals(theta).is_cpu
    assert relative(there.predict(theta, x), host.predict(theta, x)) < 1e-12
    assert relative(host.predict(theta, at).cpu(), host.predict(theta, x)) < 1e-12
    assert relative(there.predict(theta.to(device.name), x), host.predict(theta, x)) < 1e-12
    u = there.field(theta)
    assert u(x).is_cpu and device.has(u(at)) and relative(u(at).cpu(), host.field(theta)(x)) < 1e-12


def test_it_is_where_the_points_of_the_first_term_are(device):
    term = Term(points().to(device.name), burgers, ("x", "t", "xx"))
    assert device.has(PINN(Network(2, (4,)), [term], "xt").evaluated[0].inputs[0])
    assert PINN(Network(2, (4,)), [term], "xt", device="cpu").evaluated[0].inputs[0].is_cpu


@pytest.mark.parametrize("make", [hard, fields])
def test_parts_of_layers(make, device):
    host = make()
    theta, there = somewhere(host), moved(host, device)
    decomposition = host.decompose(2)
    for part, own in enumerate(decomposition.parts):
        expected, found = host.local(decomposition, part, theta), there.local(decomposition, part, theta)
        d = somewhere(host, 7)[own]
        device.forget()
        value, gradient = found.value_and_gradient(d)
        device.spent("there", "home")
        f, g = expected.value_and_gradient(d)
        assert value == pytest.approx(f, rel=1e-12) and relative(gradient, g) < 1e-12
        assert found.value(d) == pytest.approx(f, rel=1e-12)


@pytest.mark.parametrize("linear", ["normal", "woodbury", "svd", "cg"])
def test_least_squares_keeps_the_jacobian_there(linear, device):
    host = soft()
    start, words = host.initial(0), {"linear": linear, "max_it": 4}
    expected = LevenbergMarquardt(host, **words).minimize(start)
    method = LevenbergMarquardt(moved(host, device), **words)
    found = method.minimize(start)
    assert found.design.is_cpu and found.objective < 0.5 * found.history[0].objective
    assert found.objective == pytest.approx(expected.objective, rel=1e-6)
    assert method.at.J is None if linear == "cg" else device.has(method.at.J.matrix)
    if device.pretended is not None and linear in ("normal", "woodbury"):
        assert 0 < device.pretended.largest <= 2 * host.rows  # points go there, and vectors


def test_quasi_newton_steps_are_those_of_the_host(device):
    host = hard()
    results = [SSBroyden(each, max_it=8).minimize(host.initial(0)) for each in (host, moved(host, device))]
    assert relative(results[1].design, results[0].design) < 1e-8


def test_what_waits_or_mixes_is_seen():
    """By the pretended device: a residual that asks for a number, and one that has tensors of the host."""

    def asks(u, d, x):
        return u * float(x.abs().max())

    def mixes(u, d, x):
        return u + torch.ones(len(x), dtype=torch.float64)

    network, x = Network(2, (3,)), points(20)
    with PretendedDevice() as pretended:
        function = PINN(network, [Term(x, asks)], "xt", device=DEVICE)
        pretended.spent()
        function.value_and_gradient(function.initial(0))
        assert pretended.spent() == ["there", "number", "home"]
        with pytest.raises(RuntimeError, match="of the host"):
            PINN(network, [Term(x, mixes)], "xt", device=DEVICE)
        with pytest.raises((RuntimeError, TypeError)):
            x.to(DEVICE).numpy()
        assert torch.equal((2.0 * x.to(DEVICE)).cpu(), 2.0 * x) and isinstance(x.to(DEVICE), There)


#: As if there were GPUs: "cuda" for this rank, and one that is named; each rank says its number and what it got.
TURNS = """
from types import SimpleNamespace
from unittest import mock
import torch
from mpi4py import MPI
from pdeopt.core.team import checked_device
found = []
with mock.patch("torch.zeros", lambda *size, device, dtype: SimpleNamespace(device=device, sum=lambda: 0.0)):
    for count in (1, 2, 3):
        with mock.patch("torch.cuda.device_count", lambda: count):
            found.append(checked_device("cuda").index)
    assert str(checked_device("cuda:1")) == "cuda:1" and str(checked_device("cpu")) == "cpu"
rank, size = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
assert found == ([None] * 3 if size == 1 else [0, rank % 2, rank % 3]), (rank, found)
"""


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.mpi)])
def test_ranks_of_a_node_take_its_devices_in_turn(ranks):
    done = python("-c", TURNS, ranks=ranks)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["nonsense", "cuda:99", "meta"])
def test_a_device_that_is_not_there(name):
    with pytest.raises(InputError, match=rf"device: got {name}.*legal: cpu"):
        PINN(Network(2, (3,)), [Term(points(), burgers, ("x", "t", "xx"))], "xt", device=name)
    assert checked_device("cpu") == torch.device("cpu")
