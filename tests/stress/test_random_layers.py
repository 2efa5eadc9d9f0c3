"""Random settings of MGRIT over every kind of layer: once converged, values and gradients are the serial ones."""

import pytest
import torch
from torch import nn

from nn_adapters.layers.blocks import Direct, conv, dense
from nn_adapters.layers.layerparallel import LayerParallel
from nn_adapters.layers.parallelmodule import exactly
from nn_adapters.layers.recurrent import GRUParallel
from tests.helpers.stress import many

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import strategies as st  # noqa: E402

#: Every kind of layer, and the shape of a sample's features.
LAYERS = {
    "dense": (lambda: dense(3), (3,)),
    "relu": (lambda: dense(3, "relu"), (3,)),
    "gelu": (lambda: dense(3, "gelu"), (3,)),
    "more axes": (lambda: dense(3), (2, 3)),
    "no bias": (lambda: nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh()), (3,)),
    "two layers": (lambda: nn.Sequential(nn.Linear(3, 5), nn.SiLU(), nn.Linear(5, 3)), (3,)),
    "norm": (lambda: nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 3), nn.Tanh()), (3,)),
    "image": (lambda: conv(2), (2, 4, 4)),
    "signal": (lambda: conv(2, dim=1), (2, 5)),
    "feedforward": (lambda: Direct(dense(3)), (3,)),
}

SETTINGS = st.fixed_dictionaries(
    {
        "coarsening": st.sampled_from(["2", "3", "4", "5", "16", "64", "4,2", "2,3", "3,2,2"]),
        "levels": st.integers(1, 4),
        "relaxation": st.sampled_from(["F", "FCF", "FCFCF"]),
        "cycle": st.sampled_from(["V", "F"]),
        "start": st.sampled_from(["nested", "constant", "warm"]),
        "cache": st.sampled_from([1, 2, 1024]),
    }
)
TOLERANCE = 1e-9


def close(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        error = float((a - b).detach().abs().max()) if a.numel() else 0.0
        assert error <= TOLERANCE * max(1.0, float(b.detach().abs().max())), f"off by {error}"


def value_and_gradients(function, x, parameters):
    x = x.clone().requires_grad_()
    value = function(x)
    weight = torch.randn(value.shape, generator=torch.Generator().manual_seed(5), dtype=value.dtype)
    return [value.detach(), *torch.autograd.grad((value * weight).sum(), [x, *parameters])]


@pytest.fixture
def check():
    """Compare one network with its serial form: value, and gradients of input and parameters."""

    def check(name, layers, batch, settings, seed, Tf):
        block, shape = LAYERS[name]
        torch.manual_seed(seed)
        settings = {**settings, "cycles": layers + 1, "adjoint_cycles": layers + 1, "serial": "never"}
        network = LayerParallel(None, block, layers, Tf, **settings).double()
        serial = network.serial()
        x = torch.randn(batch, *shape, dtype=torch.float64)
        found = value_and_gradients(network, x, list(network.parameters()))
        value, g, *alone = value_and_gradients(serial, x, list(serial.parameters()))
        count = len(alone) // layers
        close(found, [value, g, *(torch.stack(alone[at::count]) for at in range(count))])
        with exactly(network):
            close([network(x)], [value])

    return check


def test_random_layers_are_the_serial_ones(tally, check):
    @many(160, 12)
    @hypothesis.given(
        st.sampled_from(sorted(LAYERS)),
        st.integers(1, 40),
        st.integers(1, 5),
        SETTINGS,
        st.integers(0, 999),
        st.sampled_from([0.1, 1.0, 3.0]),
    )
    def one(name, layers, batch, settings, seed, Tf):
        tally.tried += 1
        check(name, layers, batch, settings, seed, Tf)

    one()


def test_random_sequences_are_the_serial_ones(tally):
    @many(40, 4)
    @hypothesis.given(
        st.sampled_from(["implicit", "classic"]), st.integers(1, 30), st.integers(1, 2), SETTINGS, st.integers(0, 999)
    )
    def one(kind, steps, depth, settings, seed):
        tally.tried += 1
        torch.manual_seed(seed)
        settings = {**settings, "cycles": steps + 1, "adjoint_cycles": steps + 1, "serial": "never"}
        network = GRUParallel(None, 3, 4, steps, depth, kind, **settings).double()
        x = torch.randn(3, steps, 3, dtype=torch.float64)
        parameters = list(network.parameters())
        close(
            value_and_gradients(network, x, parameters), value_and_gradients(network.forward_in_series, x, parameters)
        )

    one()
