"""Oracles: dense matrices of NumPy, and the same numbers said in another way."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from pdeopt.core.errors import InputError
from pdeopt.steps.observation import Measurements, Observation, SeenForm
from pdeopt.steps.sparse import StepMatrix
from pdeopt.steps.timegrid import TimeGrid

B = np.array([[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.0, 2.0]])
GRID = TimeGrid([0.0, 0.1, 0.3, 0.6, 1.0])

OBSERVATIONS = {
    "numbers": ([2, 0], np.eye(4)[[2, 0]]),
    "twice": (np.array([1, 1, 3], dtype=np.int32), np.eye(4)[[1, 1, 3]]),
    "tensor": (torch.tensor([3]), np.eye(4)[[3]]),
    "mask": ([True, False, False, True], np.eye(4)[[0, 3]]),
    "slice": (slice(-3, None, 2), np.eye(4)[[1, 3]]),
    "range": (range(1, 3), np.eye(4)[[1, 2]]),
    "sparse": (sp.coo_matrix(B), B),
    "dense": (B.tolist(), B),
    "step matrix": (StepMatrix.constant(B), B),
}


@pytest.mark.parametrize("name", OBSERVATIONS)
def test_an_observation_is_its_matrix(name):
    observe, expected = OBSERVATIONS[name]
    observation = Observation(observe)
    observation.check(4)
    u, e = (
        np.random.default_rng(0).standard_normal((3, 4)),
        np.random.default_rng(1).standard_normal((3, len(expected))),
    )
    assert np.array_equal(observation.matrix(4).toarray(), expected)
    assert np.allclose(observation(torch.from_numpy(u)), u @ expected.T, atol=1e-15)
    assert np.allclose(observation.transpose(torch.from_numpy(e), 4), e @ expected, atol=1e-15)


@pytest.mark.parametrize("name", OBSERVATIONS)
def test_the_form_of_what_is_seen(name):
    observe, B = OBSERVATIONS[name]
    k = len(B)
    M = np.eye(k) + 0.3 * np.eye(k, k=1) + 0.3 * np.eye(k, k=-1)
    form = SeenForm(Observation(observe).matrix(4), StepMatrix.constant(M))
    assert np.allclose(form().as_csr().toarray(), B.T @ M @ B, atol=1e-15)
    kept = np.ones((2, k))
    kept[1, 0] = 0.0
    masked = form(torch.from_numpy(kept))
    for i in range(2):
        P = np.diag(kept[i])
        found = StepMatrix(masked.sparsity, masked.values[i : i + 1]).as_csr().toarray()
        assert np.allclose(found, B.T @ P @ M @ P @ B, atol=1e-15)


@pytest.mark.parametrize(
    ("observe", "said"),
    [
        ([], "nothing"),
        (np.zeros(4, dtype=bool), "nothing"),
        (slice(4, None), "nothing of 4"),
        ([-1], "component -1; legal: 0 to 3"),
        ([0, 4], "component 4"),
        ([True, False], r"mask of shape \(2,\); legal: shape \(4,\)"),
        ([0.0, 1.0], "type float64"),
        (2, r"shape \(\)"),
        ("all", "<U3"),
        (np.ma.array([0, 1], mask=[True, False]), "MaskedArray"),
        (np.ones((2, 3)), r"shape \(2, 3\); legal: shape \(k, 4\)"),
        (1j * np.ones((2, 4)), "complex"),
        (np.full((2, 4), np.nan), "finite"),
        (sp.csr_matrix((2, 4)), "without entries"),
        (np.ones((1, 2, 4)), r"shape \(1, 2, 4\)"),
    ],
)
def test_what_cannot_be_observed(observe, said):
    with pytest.raises(InputError, match=said):
        Observation(observe).check(4)


DATA = np.arange(10.0).reshape(5, 2)


def rows(measurements):
    """Targets, what was measured and weights of all nodes of the grid."""
    steps = GRID._steps(np.arange(5))
    target, kept = measurements(steps, 2)
    kept = torch.ones_like(target) if kept is None else kept
    return target.expand(5, 2).tolist(), kept.expand(5, 2).tolist(), measurements.weight(steps).tolist()


@pytest.mark.parametrize(
    "target",
    [
        DATA.astype(np.int16),
        DATA.astype(">f4"),
        np.asfortranarray(DATA)[::-1][::-1],
        DATA.tolist(),
        torch.from_numpy(DATA).requires_grad_(),
        torch.from_numpy(DATA).float(),
        np.ma.array(DATA),
        lambda t: np.interp(t, GRID.times, np.arange(5))[:, None] * 2 + np.arange(2),
        lambda t: torch.from_numpy(DATA)[np.searchsorted(GRID.times, t - 1e-9)],
        lambda t: torch.from_numpy(DATA).requires_grad_()[np.searchsorted(GRID.times, t - 1e-9)],
    ],
)
def test_targets_of_any_kind(target):
    found, kept, weight = rows(Measurements(target))
    assert np.allclose(found, DATA, atol=1e-12) and np.array_equal(kept, np.ones((5, 2)))
    assert weight == GRID._steps(np.arange(5)).weight.tolist()


def test_a_target_is_copied():
    given = np.zeros(2)
    measurements = Measurements(given)
    given[:] = 1.0
    assert measurements.target.tolist() == [0.0, 0.0]


def test_measurements_at_some_times_are_those_that_are_not_masked():
    mask = np.ones((5, 2), dtype=bool)
    mask[[1, 4]] = False
    masked = np.array(rows(Measurements(np.ma.array(np.where(mask, np.nan, DATA), mask=mask)))[0])
    target, _, weight = (np.array(x) for x in rows(Measurements(DATA[[4, 1]], times=[1.0, 0.1])))
    assert np.array_equal(masked[[1, 4]], DATA[[1, 4]]) and np.array_equal(target[[1, 4]], DATA[[1, 4]])
    assert weight[[0, 2, 3]].tolist() == [0.0, 0.0, 0.0]
    assert weight[[1, 4]].tolist() == GRID._steps(np.array([1, 4])).weight.tolist()


def test_weights_belong_to_the_rows_of_the_target():
    assert rows(Measurements(DATA, weight=2))[2] == [2.0] * 5
    assert rows(Measurements(DATA[:2], times=[1.0, 0.1], weight=[3.0, 4.0]))[2] == [0.0, 4.0, 0.0, 0.0, 3.0]
    assert rows(Measurements(DATA, weight=np.arange(5)))[2] == [0.0, 1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("times", [[0.0, 0.1 + 0.2], np.float32([0.3, 0.6]), torch.tensor([0.6], dtype=torch.float64)])
def test_times_are_nodes_to_rounding(times):
    measurements = Measurements(np.ones(2), times=times)
    measurements.check(GRID.times, 2)
    assert sum(w > 0 for w in rows(measurements)[2]) == len(times)


def test_a_function_is_asked_for_what_is_measured_alone():
    def known(t):
        return np.where(t[:, None] > 0.5, np.nan, 1.0) * np.ones(2)

    assert np.array_equal(np.array(rows(Measurements(known, times=[0.1, 0.3]))[0])[1:3], np.ones((2, 2)))
    with pytest.raises(InputError, match="masked"):
        rows(Measurements(known))
    _, kept, _ = rows(Measurements(lambda t: np.ma.masked_invalid(known(t))))
    assert np.array_equal(np.array(kept)[:, 0], GRID.times < 0.5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (dict(target=np.ones((4, 2))), r"shape \(4, 2\); legal: 5 rows, one for each node"),
        (dict(target=np.ones(3)), r"shape \(3,\); legal: shape \(2,\)"),
        (dict(target=1.0), r"shape \(\)"),
        (dict(target=np.ones((1, 5, 2))), r"shape \(1, 5, 2\)"),
        (dict(target=None), "NoneType"),
        (dict(target=[[1.0], [1.0, 2.0]]), "real numbers"),
        (dict(target=[1.0, np.nan]), "numpy.ma.masked_invalid"),
        (dict(target=np.ma.masked_all(2)), "masked entries alone"),
        (dict(target=np.ma.array([1.0, np.inf], mask=[True, False])), "infinite"),
        (dict(target=np.ones((2, 2)), times=[0.1]), "1 rows, one for each of `times`"),
        (dict(target=np.ones(2), times=[0.15]), "0.15; legal: nodes of the time grid; the nearest is 0.1"),
        (dict(target=np.ones(2), times=[2.0]), "the nearest is 1"),
        (dict(target=np.ones(2), times=[0.1, 0.1]), "0.1 twice"),
        (dict(target=np.ones(2), times=[]), "times"),
        (dict(target=np.ones(2), times=[np.nan]), "times"),
        (dict(target=np.ones(2), times="1"), "times"),
        (dict(target=np.ones(2), weight=[1.0, 2.0]), r"weight: got shape \(2,\)"),
        (dict(target=DATA, weight=np.ones(4)), r"shape \(5,\)"),
        (dict(target=DATA, weight=-1.0), "finite numbers >= 0"),
        (dict(target=DATA, weight=np.zeros(5)), "not all 0"),
        (dict(target=DATA, weight="1"), "weight"),
    ],
)
def test_what_are_no_measurements(arguments, said):
    with pytest.raises(InputError, match=said):
        Measurements(**arguments).check(GRID.times, 2)


def test_times_inside_a_step_are_seen_without_the_grid():
    with pytest.raises(InputError, match=r"0\.2, inside a time step"):
        Measurements(np.ones(2), times=[0.2, 0.3]).weight(GRID.steps)
