import pytest
import torch

from pdeopt.core.errors import InputError
from pdeopt.functions.decomposition import Decomposition
from pdeopt.functions.smooth import FirstOrderConsistent
from tests.helpers.functions import Quadratic, Rosenbrock, start


@pytest.mark.parametrize("blocks, parts, overlap", [(8, 8, 0), (8, 3, 0), (7, 4, 1), (50, 6, 2), (5, 1, 0)])
def test_any_number_of_blocks_goes_into_any_number_of_parts(blocks, parts, overlap):
    sizes = [3 + k % 4 for k in range(blocks)]
    d = Decomposition.blocks(sizes, parts, overlap)
    x = start(sum(sizes))
    assert len(d) == parts and torch.cat(d.parts).unique().tolist() == list(range(sum(sizes)))
    together = d.assemble({s: x[indices] for s, indices in enumerate(d.parts)})
    assert torch.allclose(together, x, atol=1e-15)  # the weights are a partition of unity
    blocks_of = [len(part) for part in Decomposition.blocks([1] * blocks, parts).parts]
    assert max(blocks_of) - min(blocks_of) <= 1


def test_overlapping_parts_share_blocks():
    d = Decomposition.blocks([2] * 6, 3, overlap=1)
    assert d.parts[1].tolist() == list(range(2, 10))
    assert d.weights[0].tolist() == [1.0] * 2 + [0.5] * 4


def test_bad_parts_are_named():
    half = torch.arange(3)
    with pytest.raises(InputError, match="1 to 4"):
        Decomposition.blocks([5] * 4, 6)
    with pytest.raises(InputError, match="in none"):
        Decomposition(6, [half])
    with pytest.raises(InputError, match="no unknowns"):
        Decomposition(3, [half, torch.empty(0, dtype=torch.int64)])
    with pytest.raises(InputError, match="increasing"):
        Decomposition(3, [torch.tensor([0, 2, 1])])
    with pytest.raises(InputError, match="0 to 2"):
        Decomposition(3, [torch.tensor([0, 1, 2, 3])])


def test_parts_of_one_color_share_nothing():
    d = Decomposition.blocks([1] * 12, 6, overlap=1)
    assert d.colors(0) == [[s] for s in range(6)] and d.colors(2) == [[0, 2, 4], [1, 3, 5]]
    colors = d.colors(1)  # neighbors overlap: one group is not enough
    assert len(colors) == 2 and sorted(s for group in colors for s in group) == list(range(6))
    for group in colors:
        indices = torch.cat([d.parts[s] for s in group])
        assert len(indices.unique()) == len(indices)


def test_a_local_function_is_the_whole_on_its_part():
    f, d = Rosenbrock(10), Decomposition.blocks([1] * 10, 3, overlap=1)
    x = start(10)
    value, g = f.value_and_gradient(x)
    for s, indices in enumerate(d.parts):
        local, zero = f.local(d, s, x), torch.zeros(len(indices), dtype=torch.float64)
        v, dg = local.value_and_gradient(zero)
        assert v == value and torch.equal(dg, g[indices])
        step = start(len(indices), s)
        assert local.value(step) == pytest.approx(f.value(x + d.prolong(s, step)), rel=1e-14)
    assert f.tally.gradients == 4 and f.tally.values == 6


def test_first_order_consistency_is_exact():
    model, x, g = Quadratic.random(7, seed=3), start(7), start(7, 5)
    consistent = FirstOrderConsistent(model, x, g)
    assert torch.allclose(consistent.value_and_gradient(x)[1], g, rtol=1e-12, atol=1e-12)
    d, eps = start(7, 8), 1e-6
    slope = (consistent.value(x + eps * d) - consistent.value(x - eps * d)) / (2 * eps)
    assert slope == pytest.approx(float(g @ d), rel=1e-7)
    assert torch.equal(consistent.hvp(x, d), model.A @ d)
