"""Random networks whose layers are split: blocks are exact, and weights the same however samples are dealt out."""

import pytest
import torch
from torch import nn

import nn_adapters as nna
from nn_adapters.splitting import LOSSES
from pdeopt.optimize.splitting import ADMM
from tests.helpers.splitting import never_rises
from tests.helpers.stress import many
from tests.helpers.threads import on_threads

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import strategies as st  # noqa: E402

ACTIVATIONS = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "hard_sigmoid": lambda: nn.Hardtanh(0.0, 1.0),
    "tanh": nn.Tanh,
    "softplus": nn.Softplus,
    "identity": nn.Identity,
}

NETWORKS = st.fixed_dictionaries(
    {
        "channels": st.integers(0, 3),  # of a convolution in front; 0 for none
        "widths": st.lists(st.integers(1, 6), max_size=4),
        "layers": st.integers(0, 3),  # of an ODE network
        "bias": st.booleans(),
        "act": st.sampled_from(list(ACTIVATIONS)),
        "classes": st.integers(1, 4),
        "seed": st.integers(0, 99),
    }
)


def make(channels, widths, layers, bias, act, classes, seed):
    """A network for images of 1 x 3 x 3."""
    torch.manual_seed(seed)
    act, before, parts = ACTIVATIONS[act], 9, []
    if channels:
        parts += [nn.Conv2d(1, channels, 2, bias=bias), act()]
        before = 4 * channels
    parts.append(nn.Flatten())
    for width in widths:
        parts += [nn.Linear(before, width, bias=bias), act()]
        before = width
    if layers:
        parts.append(nna.LayerStack(lambda: nn.Sequential(nn.Linear(before, before, bias=bias), act()), layers))
    return nn.Sequential(*parts, nn.Linear(before, classes)).double()


def samples(count, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 1, 3, 3, generator=generator, dtype=torch.float64)
    return x, torch.randint(classes, (count,), generator=generator)


@many(200, 6)
@hypothesis.given(
    NETWORKS, st.integers(1, 12), st.sampled_from(list(LOSSES)), st.floats(0.1, 10.0), st.floats(0.1, 10.0)
)
def test_no_block_raises_the_augmented_lagrangian(network, count, loss, beta, gamma):
    settings = nna.SplitTrainingSettings(form="backward", states="random", loss=loss, beta=beta, gamma=gamma)
    x, y = samples(count, network["classes"], network["seed"])
    never_rises(nna.WholeLayers(make(**network), x, y, settings), least=0.0)


def nearby(values, seed, size=4e-16):
    """The same numbers but for a random last digit or two of each: what another order of a sum changes."""
    generator = torch.Generator().manual_seed(seed)
    return values * (1.0 + size * (2.0 * torch.rand(values.shape, generator=generator, dtype=values.dtype) - 1.0))


def nudged(network, seed):
    """The network with such weights."""
    with torch.no_grad():
        for place, each in enumerate(network.parameters()):
            each.copy_(nearby(each, 100 * seed + place))
    return network


@many(200, 6)
@hypothesis.given(
    NETWORKS,
    st.lists(st.integers(0, 5), min_size=2, max_size=4).filter(lambda shares: sum(shares) >= len(shares)),
    st.sampled_from(list(LOSSES)),
    st.sampled_from(["streaming", "seed", "backward"]),
    st.integers(1, 8),
)
def test_weights_are_those_of_one_rank(network, shares, loss, form, batch):
    """Shares that are unequal, and empty ones.

    A stream divides increments by their own size, and with them the rounding of targets that hardly differ from the
    outputs. By how much is measured: one rank with data and weights that differ in their last digits.
    """
    x, y = samples(sum(shares), network["classes"], network["seed"])
    settings = nna.SplitTrainingSettings(form=form, loss=loss, batch=batch, precision="float64", gamma=2.0, step=0.5)

    def weights(network, x, y, team):
        words = network, x, y, settings, team
        splitting = nna.StreamedLayers(4, *words) if form == "streaming" else nna.WholeLayers(*words)
        return ADMM(splitting, max_it=4, multipliers=form != "streaming", rtol=0.0).solve().design

    parts = list(zip(x.split(shares), y.split(shares)))
    networks = [make(**network) for _ in (None, *shares)]  # not by the threads, which share torch's generator
    whole = weights(networks.pop(), x, y, None)
    found = on_threads(len(shares), lambda team: weights(networks[team.rank], *parts[team.rank], team))
    near = [weights(nudged(make(**network), seed), nearby(x, seed), y, None) for seed in range(6)]
    rounding = max(float((each - whole).abs().max()) for each in near)
    largest = max(1.0, float(whole.abs().max()))
    hypothesis.assume(rounding < 1e-3 * largest)  # weights without three digits say nothing of ranks
    for each in found:
        assert float((each - whole).abs().max()) < 1e-12 * largest + 10.0 * rounding
