"""Points in a box."""

import pytest
import torch

from nn_adapters.pinn.points import POINT_SAMPLERS, adaptive_points, hammersley, latin_hypercube, within
from pdeopt.core.errors import InputError

BOX = ((-1.0, 1.0), (0.0, 3.0))


def test_hammersley_by_hand():
    found = hammersley(4, ((0.0, 1.0),) * 3)
    expected = [[1 / 8, 0, 0], [3 / 8, 1 / 2, 1 / 3], [5 / 8, 1 / 4, 2 / 3], [7 / 8, 3 / 4, 1 / 9]]
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), atol=1e-16)


def test_hammersley_integrates_better_than_random_points():
    def error(sampler):
        x = POINT_SAMPLERS[sampler](4096, ((0.0, 1.0), (0.0, 1.0)), 0)
        return abs(float((x[:, 0] * x[:, 1]).mean()) - 0.25)

    assert error("hammersley") < 5e-4 and error("hammersley") < 0.2 * error("uniform")


def test_a_latin_hypercube_has_one_point_a_slice():
    x = latin_hypercube(50, BOX, seed=3)
    for column, (low, high) in zip(x.T, BOX):
        slices = ((column - low) / (high - low) * 50).floor().long()
        assert sorted(slices.tolist()) == list(range(50))


@pytest.mark.parametrize("sampler", POINT_SAMPLERS)
def test_points_are_in_the_box_and_of_the_seed(sampler):
    x = POINT_SAMPLERS[sampler](200, BOX, 1)
    assert x.shape == (200, 2) and x.dtype == torch.float64
    assert (x >= torch.tensor([-1.0, 0.0])).all() and (x <= torch.tensor([1.0, 3.0])).all()
    assert torch.equal(x, POINT_SAMPLERS[sampler](200, BOX, 1))


def test_adaptive_points_come_where_the_residual_is():
    """With density |r| + mean |r|, half of a set where r lives, and half anywhere."""

    def residual(x):
        return (x[:, 0].abs() < 0.1).double()

    x = adaptive_points(residual, 4000, BOX, seed=5, candidates=20)
    assert float(residual(x).mean()) == pytest.approx(0.5 + 0.5 * 0.1, abs=0.05)
    assert len(torch.unique(x, dim=0)) == 4000
    assert torch.equal(x, adaptive_points(residual, 4000, BOX, seed=5, candidates=20))
    flat = adaptive_points(lambda x: torch.zeros(len(x), dtype=torch.float64), 100, BOX)
    assert flat.shape == (100, 2)


@pytest.mark.parametrize("sampler", POINT_SAMPLERS.values())
def test_points_within_a_domain(sampler):
    """A quarter of a disk in a box: as many as asked for, and evenly, all inside."""
    box = ((-1.0, 1.0), (-1.0, 1.0))
    draw = within(lambda x: (x > 0.0).all(1) & (x.square().sum(1) < 1.0), sampler)
    x = draw(1000, box, seed=3)
    assert x.shape == (1000, 2) and (x > 0.0).all() and (x.square().sum(1) < 1.0).all()
    assert float(x[:, 0].mean()) == pytest.approx(4.0 / (3.0 * torch.pi), abs=0.03)
    assert float(x[:, 1].mean()) == pytest.approx(4.0 / (3.0 * torch.pi), abs=0.03)
    assert torch.equal(x, draw(1000, box, seed=3))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: hammersley(0, BOX), ">= 1"),
        (lambda: latin_hypercube(3, ((1.0, 1.0),)), "low < high"),
        (lambda: adaptive_points(lambda x: x[:, 0] * torch.nan, 5, BOX), "finite"),
        (lambda: within(lambda x: x[:, 0] > 2.0)(5, BOX), "domain in a box"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()
