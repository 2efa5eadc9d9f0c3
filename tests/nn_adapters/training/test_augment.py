"""Rates and virtual samples for large batches."""

import pytest
import torch
from torch import nn

from nn_adapters.curvature.kfac import KFAC
from nn_adapters.curvature.likelihoods import CrossEntropy
from nn_adapters.training.augment import RunningMixup, erase_rectangles
from nn_adapters.training.rates import Course, scaled_rate
from pdeopt.core.errors import InputError
from tests.helpers.curvature import closure_of


def test_rates_grow_with_the_batch_and_have_a_course():
    assert scaled_rate(0.1, 8192, 128) == pytest.approx(6.4)
    assert scaled_rate(0.1, 8192, 128, "sqrt") == pytest.approx(0.8)
    assert scaled_rate(0.1, 8192, 128, "none") == 0.1
    assert [Course(8, 3)(k) for k in range(4)] == [0.25, 0.5, 0.75, 1.0]
    for kind, half in (("constant", 1.0), ("cosine", 0.5), ("polynomial", 0.25)):
        course = Course(10, 2, kind)
        assert course(6) == pytest.approx(half) and course(10) == course(99) == pytest.approx(float(half == 1.0))
    assert Course(3, 3)(3) == 1.0
    with pytest.raises(InputError, match=r"linear \| sqrt"):
        scaled_rate(0.1, 2, 1, "cubic")
    with pytest.raises(InputError, match="at least 1"):
        scaled_rate(0.1, 2, 0)
    with pytest.raises(InputError, match="0 to 5"):
        Course(5, 6)
    with pytest.raises(InputError, match="cosine"):
        Course(5, 0, "straight")


def test_running_mixup_is_its_recursion():
    """The factors stand in the shares of classes, from which samples follow; the third batch is a smaller one."""
    torch.manual_seed(0)
    batches = [(torch.randn(n, 3), (torch.arange(n) + k) % 4) for k, n in enumerate((5, 5, 3, 5))]
    mix, factors = RunningMixup(4, 0.5, seed=7), []
    found, targets = mix(*batches[0])
    assert torch.equal(found, batches[0][0]) and torch.equal(targets, torch.eye(4)[batches[0][1]])
    for x, y in batches[1:]:
        old, old_targets = found, targets
        found, targets = mix(x, y)
        both, fresh = min(len(x), len(old)), torch.eye(4)[y]
        factors.append(float((targets[:both] - old_targets[:both]).norm() / (fresh[:both] - old_targets[:both]).norm()))
        expected = factors[-1] * x[:both] + (1.0 - factors[-1]) * old[:both]
        assert torch.allclose(found[:both], expected, atol=1e-5)
        assert torch.equal(found[both:], x[both:]) and torch.equal(targets[both:], fresh[both:])
        assert torch.allclose(targets.sum(1), torch.ones(len(x)))
    assert all(0.0 < a < 1.0 for a in factors) and len(set(factors)) == 3
    with pytest.raises(InputError, match="alpha"):
        RunningMixup(4, 0.0)


def test_running_mixup_goes_on_to_the_last_bit():
    batches = [(torch.full((2, 3), float(k)), torch.tensor([0, k % 2])) for k in range(4)]
    whole, first, again = (RunningMixup(2, seed=3) for _ in range(3))
    expected = [whole(*batch) for batch in batches][-1]
    for batch in batches[:2]:
        first(*batch)
    again.recall(first.memory())
    found = [again(*batch) for batch in batches[2:]][-1]
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_shares_of_classes_are_targets_as_classes_are():
    """K-FAC's factors do not depend on targets: with one-hot shares its steps are those with classes."""
    x, y, found = torch.randn(12, 3).double(), torch.arange(12) % 2, []
    for targets in (y, nn.functional.one_hot(y, 2).double()):
        torch.manual_seed(0)
        network, loss = nn.Linear(3, 2).double(), CrossEntropy(smoothing=0.1)
        optimizer = KFAC(network, loss)
        optimizer.step(closure_of(optimizer, network, loss, x, targets))
        found.append(network.weight.detach())
    assert torch.allclose(*found, rtol=1e-10)


def test_erased_rectangles_are_rectangles():
    x, generator = torch.ones(400, 2, 12, 20), torch.Generator().manual_seed(0)
    found = erase_rectangles(x, 0.5, generator)
    erased = found[:, 0] == 0
    assert torch.equal(found[:, 0], found[:, 1]) and x.min() == 1.0
    hit = erased.flatten(1).any(1)
    assert 0.4 < float(hit.float().mean()) < 0.6
    rows, columns = erased.any(2), erased.any(1)
    assert torch.equal(erased, rows[:, :, None] & columns[:, None, :])
    for line in (rows, columns):  # without gaps
        assert int((line[:, 1:] != line[:, :-1]).sum(1).max()) <= 2
    area = erased[hit].flatten(1).double().mean(1)
    assert float(area.min()) > 0.005 and float(area.max()) < 0.35 and 0.1 < float(area.mean()) < 0.17
    assert torch.equal(erase_rectangles(x, 0.0), x)
    with pytest.raises(InputError, match="images"):
        erase_rectangles(torch.ones(3, 4), 0.5)
