"""A trained network as lift of another: its jets, and that the second one begins where the first one ends."""

import math

import pytest
import torch

from nn_adapters.pinn.features import Features
from nn_adapters.pinn.jets import JetBasis
from nn_adapters.pinn.loss import PINN
from nn_adapters.pinn.network import Network
from nn_adapters.pinn.terms import Term
from pdeopt.core.errors import InputError
from pdeopt.optimize.squares import LevenbergMarquardt
from tests.helpers.pinns import burgers, fields, points, somewhere, wave
from tests.helpers.support import relative


@pytest.mark.parametrize("make", [wave, fields])
@pytest.mark.parametrize("at", [None, {"t": 0.3}])
def test_jets_of_a_trained_network(make, at):
    """Against nested differentiation; with an input that is fixed, derivatives by it are zero."""
    function, x, basis = make(), points(9), JetBasis("xt", ("t", "xxx", "xxt"))
    theta = somewhere(function)
    u = function.field(theta, at)
    found = basis.of_function(u, x)
    assert relative(found, basis.of_function(lambda x: u(x), x)) < 1e-13
    if at is None:
        assert relative(u(x).movedim(-1, 0) if u(x).ndim > 1 else u(x), function.predict(theta, x)) < 1e-14
    else:
        assert float(found[basis.rows["xxt"]].abs().max()) == 0.0


def test_a_second_network_goes_on_from_the_first():
    """The lift of the second is the first at t = 1/2: so values are the same there, for any second parameters."""
    first = wave()
    theta = somewhere(first)
    term = Term(points(), burgers, ("x", "t", "xx"))
    lift, features = first.field(theta, {"t": 0.5}), first.ansatz.features
    second = PINN(first.network, [term], "xt", lift, lambda x: x[:, 1] - 0.5, features=features)
    x = points(20)
    x[:, 1] = 0.5
    assert relative(second.predict(somewhere(second, 5), x), first.predict(theta, x)) < 1e-14


def test_a_second_network_takes_away_what_the_first_leaves():
    """u' = cos x: the second network is small by its factor, of higher frequency, and the error falls by orders."""
    x = torch.linspace(0.0, 3.0, 200, dtype=torch.float64)[:, None]
    term = Term(x, lambda u, d, x: d["x"] - torch.cos(x[:, 0]), ("x",))
    first = PINN(Network(1, (4,)), [term], "x", factor=lambda x: x[:, 0])
    theta = LevenbergMarquardt(first, max_it=40).minimize(first.initial(0)).design
    size = first.value(theta) ** 0.5
    network, fast = Network(1, (10, 10), activation="sin"), Features(lambda x: 6.0 * x - 9.0, 1)
    second = PINN(network, [term], "x", first.field(theta), lambda x: size * x[:, 0], features=fast)
    found = LevenbergMarquardt(second, max_it=30).minimize(second.initial(1)).design
    errors = [float((f.predict(t, x) - torch.sin(x[:, 0])).norm()) for f, t in ((first, theta), (second, found))]
    assert errors[1] < 0.01 * errors[0]


def test_what_does_not_fit_a_trained_network():
    function = wave()
    theta = somewhere(function)
    with pytest.raises(InputError, match=r"fixed.*y.*x \| t"):
        function.field(theta, {"y": 0.0})
    with pytest.raises(InputError, match="inputs of a trained network"):
        PINN(Network(2, (3,)), [Term(points(), lambda u, d, x: u)], "xy", function.field(theta))


def test_parities_and_derivatives_that_are_not_there():
    """An even feature, and a lift or factor that is not; a root at 0 has no derivative there."""
    even, network = Features(lambda x: torch.stack([x[:, 0].square(), x[:, 1]], 1), 2, even="x"), Network(2, (3,))
    term = Term(points(), burgers, ("x", "t", "xx"))
    PINN(network, [term], "xt", lambda x: torch.cos(math.pi * x[:, 0]), lambda x: 1 - x[:, 0] ** 2, features=even)
    PINN(network, [term], "xt", lambda x: torch.sin(x[:, 0]), lambda x: x[:, 0] * x[:, 1], features=even)
    for lift, factor in ((torch.sin, None), (torch.exp, torch.cos), (torch.sin, torch.cos)):
        of_x = [None if f is None else (lambda x, f=f: f(x[:, 0])) for f in (lift, factor)]
        with pytest.raises(InputError, match=r"itself at -x.*both even or both odd"):
            PINN(network, [term], "xt", *of_x, features=even)
    with pytest.raises(InputError, match="periods of features"):
        PINN(network, [term], "xt", features=Features(lambda x: x, 2, even="z"))
    at_zero = Term(torch.zeros(3, 2, dtype=torch.float64), burgers, ("x", "t", "xx"))
    with pytest.raises(InputError, match=r"factor.*not finite at \(0, 0\)"):
        PINN(network, [at_zero], "xt", factor=lambda x: x[:, 0].abs().sqrt())
