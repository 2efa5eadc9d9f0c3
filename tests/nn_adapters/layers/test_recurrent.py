"""GRUs that are solved in parallel over their sequence."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import nn

from nn_adapters.layers.parts.grugates import GRU_STEPS, long_step
from nn_adapters.layers.parts.layerstep import AutogradStep
from nn_adapters.layers.recurrent import GRUParallel, GRUStep
from pdeopt.core.errors import InputError


def sequences(batch=3, steps=20, size=5):
    return torch.randn(batch, steps, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def gru(kind="implicit", layers=2, **words):
    torch.manual_seed(1)
    return GRUParallel(
        None, 5, 4, 20, layers, kind, **{"coarsening": "4", "levels": 2, "serial": "never", **words}
    ).double()


@pytest.mark.parametrize("layers", [1, 2])
def test_the_classic_unit_is_that_of_pytorch(layers):
    network = gru("classic", layers, cycles=6, adjoint_cycles=6)
    reference = nn.GRU(5, 4, layers, batch_first=True).double()
    network.load_state_dict(reference.state_dict())
    x = sequences()
    found, expected = network(x), reference(x)[0][:, -1]
    assert torch.allclose(found, expected, rtol=0, atol=1e-13)
    names = [name for name, _ in reference.named_parameters()]
    own = torch.autograd.grad(found.square().sum(), [dict(network.named_parameters())[name] for name in names])
    for a, b in zip(own, torch.autograd.grad(expected.square().sum(), list(reference.parameters()))):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


def test_a_step_of_the_implicit_unit_solves_its_equation():
    network = gru(layers=1, levels=1)
    x = sequences()[:, :2]
    W, b, U, c = (getattr(network, f"{name}_l0").detach() for name in ("weight_ih", "bias_ih", "weight_hh", "bias_hh"))
    h = torch.zeros(3, 4, dtype=torch.float64)
    for t in range(2):
        a, s = x[:, t] @ W.T + b, h @ U.T + c
        r, z = torch.sigmoid(a[:, :4] + s[:, :4]), torch.sigmoid(a[:, 4:8] + s[:, 4:8])
        n = torch.tanh(a[:, 8:] + r * s[:, 8:])
        h_new = (h + (1 - z) * n) / (1 + (1 - z))
        assert torch.allclose((1 + (1 - z)) * h_new, h + (1 - z) * n)
        h = h_new
    short = GRUParallel(None, 5, 4, 2, 1, "implicit", levels=1).double()
    short.load_state_dict(network.state_dict())
    assert torch.allclose(short(x), h, atol=1e-14)


@pytest.mark.parametrize("kind", ["implicit", "classic"])
def test_parallel_solves_converge_to_serial_values_and_gradients(kind):
    network, x = gru(kind, cycles=6, adjoint_cycles=6), sequences().requires_grad_()
    parameters = [x, *network.parameters()]
    found, expected = network(x), network.forward_in_series(x)
    assert torch.allclose(found, expected, atol=1e-13)
    pairs = zip(*(torch.autograd.grad(y.square().sum(), parameters) for y in (found, expected)))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in pairs)


@pytest.mark.parametrize("kind", GRU_STEPS)
@pytest.mark.parametrize("dt", [1.0, 4.0, torch.tensor([1.0, 4.0, 2.5])])
def test_derivatives_by_hand_are_those_of_autograd(kind, dt):
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    h, gates, shared, w = draw(3, 2, 4), draw(3, 2, 12), [draw(12, 4), draw(12)], draw(3, 2, 4)
    gates[1, :, 4:8] = 1e4  # a padded step keeps the state
    lengths = lambda rows: dt if isinstance(dt, float) else dt[rows]  # noqa: E731
    own, reference = (
        step.linearize([gates], shared, lengths) for step in (GRUStep(kind), AutogradStep(GRU_STEPS[kind]))
    )
    every = slice(0, None, 1)
    found = own.remember(h, every)
    assert torch.allclose(found, reference.remember(h, every), rtol=0, atol=1e-14)
    assert torch.equal(found[1], h[1])
    assert torch.allclose(own.pullback(w, every), reference.pullback(w, every), rtol=0, atol=1e-13)
    found = [*own.gradients(w, every), *own.kept_back()]
    for a, b in zip(found, reference.gradients(w, every), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", GRU_STEPS)
@pytest.mark.parametrize("dt", [4.0, torch.tensor([1.0, 4.0, 2.5])])
def test_long_steps_have_derivatives_by_hand_and_gates_of_the_state_halfway(kind, dt):
    generator, step = torch.Generator().manual_seed(3), GRU_STEPS[kind]
    h, w, gates, *shared = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((3, 2, 4), (3, 2, 4), (3, 2, 12), (12, 4), (12,))
    )
    lengths = lambda rows: dt if isinstance(dt, float) else dt[rows]  # noqa: E731
    own, reference = (
        each.over_intervals(1.0).linearize([gates], shared, lengths)
        for each in (GRUStep(kind), AutogradStep(step, partial(long_step, step)))
    )
    middle = step(h, [gates], shared, (dt - 1.0) / 2)
    for each in (own, reference):
        each.states = h
        assert torch.allclose(each.advance(h, slice(None)), step(h, [gates], shared, dt, at=middle), rtol=0, atol=1e-14)
    for rows in (slice(None), slice(1, 2)):
        assert torch.allclose(own.pullback(w[rows], rows), reference.pullback(w[rows], rows), rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", GRU_STEPS)
def test_a_long_step_is_its_short_ones_to_second_order(kind):
    """Of slow units, whose gates a state that moves changes: the error of m steps falls as m^3."""
    generator, errors = torch.Generator().manual_seed(4), []
    h, gates, *shared = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((1, 2, 4), (1, 2, 12), (12, 4), (12,))
    )
    gates[..., 4:8] += 10.0  # z near one: a step moves little
    for m in (8, 16, 32):
        exact = h
        for _ in range(m):
            exact = GRU_STEPS[kind](exact, [gates], shared, 1.0)
        errors.append(float((long_step(GRU_STEPS[kind], 1.0, h, [gates], shared, float(m)) - exact).norm()))
    assert all(7.5 < b / a < 10 for a, b in pairwise(errors))


def test_gradients_are_those_of_differences():
    network, x = gru(layers=2, cycles=6, adjoint_cycles=6), sequences(1).requires_grad_()
    (gradient,) = torch.autograd.grad(network(x).sum(), x)
    direction, h = sequences(1).cos(), 1e-5
    with torch.no_grad():
        difference = (network(x + h * direction).sum() - network(x - h * direction).sum()) / (2 * h)
    assert float((gradient * direction).sum()) == pytest.approx(float(difference), rel=1e-7)


def test_coarse_implicit_steps_are_stable():
    """However long the step, |h| stays below the largest |n| < 1."""
    network = gru(layers=1, coarsening="20", cycles=0)
    assert float(network(100 * sequences()).abs().max()) < 1.0


def test_sequences_of_another_length_and_unknown_units_are_refused():
    with pytest.raises(InputError, match="20, input"):
        gru()(sequences(steps=19))
    with pytest.raises(InputError, match=r"implicit \| classic"):
        gru("lstm")


@pytest.mark.parametrize("kind", ["implicit", "classic"])
def test_padded_sequences_are_those_of_their_true_steps(kind):
    torch.manual_seed(0)
    words = {"coarsening": "4", "cycles": 4, "adjoint_cycles": 4, "relaxation": "FCF", "serial": "never"}
    network = GRUParallel(None, 3, 5, 16, 2, kind, **words).double()
    x, lengths = torch.randn(3, 16, 3, dtype=torch.float64), [16, 5, 9]
    mask = torch.arange(16) < torch.tensor(lengths)[:, None]
    serial = network.serial()
    expected = torch.cat([serial(x[i : i + 1, :n]) for i, n in enumerate(lengths)])
    assert torch.equal(serial(x, mask), serial(torch.where(mask[..., None], x, 7.0), mask))
    torch.testing.assert_close(serial(x, mask), expected, rtol=0, atol=1e-14)
    x.requires_grad_()
    found = network(x, mask)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    (g,) = torch.autograd.grad(found.square().sum(), x)
    assert not bool(g[~mask].any())
    (g_expected,) = torch.autograd.grad(serial(x, mask).square().sum(), x)
    torch.testing.assert_close(g, g_expected, rtol=0, atol=1e-12)
    with pytest.raises(InputError, match="mask of sequences"):
        network(x, mask[:, :4])
