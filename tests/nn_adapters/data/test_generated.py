"""Sets that need no files: what they are made of, and that their classes can be told as they should."""

import numpy as np
import pytest
import torch

from nn_adapters.data.datasets import load_dataset
from nn_adapters.data.generated import moving_shapes, peaks, peaks_grid
from pdeopt.core.errors import InputError
from tests.helpers.data_files import check_dataset, samples_of_each_class


def test_digits():
    pytest.importorskip("sklearn")
    data = load_dataset("digits")
    check_dataset(data, "digits", 10, (1438, 1, 8, 8), (359, 1, 8, 8))
    assert (data.x_train.min(), data.x_train.max()) == (0, 1)


def test_peaks_is_the_function_of_matlab():
    points, f = peaks_grid()
    assert points.shape == (256**2, 2) and abs(points).max() == 3
    edges = np.linspace(f.min(), f.max(), 6)
    np.testing.assert_allclose(edges, [-6.54972, -3.61870, -0.68767, 2.24335, 5.17437, 8.10539], atol=5e-6)


def test_peaks_has_points_of_the_grid_by_level():
    data = load_dataset("peaks")
    check_dataset(data, "peaks", 5, (5000, 2), (200, 2))
    assert samples_of_each_class(data.y_train) == [1000] * 5 and samples_of_each_class(data.y_test) == [40] * 5
    points, f = peaks_grid()
    value = {tuple(point): v for point, v in zip(points.astype(np.float32).tolist(), f)}
    rows = [tuple(row) for row in torch.cat([data.x_train, data.x_test]).tolist()]
    assert len(set(rows)) == 5200  # no point twice, none in both parts
    level = np.floor(5 * (np.array([value[row] for row in rows]) - f.min()) / np.ptp(f)).clip(max=4)
    assert level.tolist() == torch.cat([data.y_train, data.y_test]).tolist()
    with pytest.raises(InputError, match="at most 1798"):
        peaks(train=1798)


@pytest.mark.parametrize("name", ["peaks", "moving_shapes", "synthetic_har", "indian_pines_like"])
def test_generated_sets_depend_on_the_seed_alone(name):
    first, again, other = load_dataset(name, seed=3), load_dataset(name, seed=3), load_dataset(name, seed=4)
    for part in ("x_train", "y_train", "x_test", "y_test"):
        assert torch.equal(getattr(first, part), getattr(again, part))
        assert not torch.equal(getattr(first, part), getattr(other, part))


def accuracy(data, features):
    """Share of the test set that a linear least-squares classifier on `features(x)` gets right."""
    train, test = (
        torch.nn.functional.pad(features(x).flatten(1).double(), (0, 1), value=1.0) for x in (data.x_train, data.x_test)
    )
    targets = torch.nn.functional.one_hot(data.y_train).double()
    ridge = train.T @ train + 1e-2 * len(train) * torch.eye(train.shape[1], dtype=torch.float64)
    scores = test @ torch.linalg.solve(ridge, train.T @ targets)
    return (scores.argmax(1) == data.y_test).double().mean().item()


def displacement(x):
    """How far the shape moves between frames, and turns, by the phase of the lowest Fourier modes."""
    f = torch.fft.fft2(x[:, :, 0])
    modes = torch.stack([f[..., 0, 1], f[..., 1, 0]], 2)
    steps = (modes[:, 1:] * modes[:, :-1].conj()).angle()
    (a, b), (c, d) = steps[:, :-1].unbind(2), steps[:, 1:].unbind(2)
    return torch.cat([steps.mean(1), (a * d - b * c).mean(1, keepdim=True)], 1)


def test_single_frames_of_moving_shapes_do_not_tell():
    data = load_dataset("moving_shapes")
    check_dataset(data, "moving_shapes", 6, (600, 8, 1, 16, 16), (120, 8, 1, 16, 16))
    assert (data.x_train.min(), data.x_train.max()) == (0, 1) and samples_of_each_class(data.y_test) == [20] * 6
    assert all(accuracy(data, lambda x, k=k: x[:, k]) < 0.35 for k in (0, 4, 7))
    assert accuracy(data, displacement) > 0.9


def test_sizes_of_moving_shapes():
    data = moving_shapes(25, frames=5, size=12)
    assert data.x_train.shape == (25, 5, 1, 12, 12) and data.x_test.shape == (5, 5, 1, 12, 12)
    for words in ({"n": 4}, {"frames": 1}, {"size": 7}):
        with pytest.raises(InputError, match=next(iter(words))):
            moving_shapes(**words)


def spectrum(x):
    """Power of each frequency, and the phase by which neighboring channels differ there."""
    f = torch.fft.rfft(x, n=512, dim=1)[:, 5:35]
    cross = (f[..., 1:] * f[..., :-1].conj()).mean(-1)
    return torch.cat([cross.abs(), cross.imag], 1) / cross.abs().sum(1, keepdim=True)


def test_synthetic_har_is_told_by_frequency_and_phase():
    data = load_dataset("synthetic_har")
    check_dataset(data, "synthetic_har", 6, (600, 128, 9), (120, 128, 9))
    assert accuracy(data, lambda x: x) < 0.4
    assert accuracy(data, spectrum) > 0.9


def test_indian_pines_like():
    data = load_dataset("indian_pines_like")
    check_dataset(data, "indian_pines_like", 16, (2000, 220), (400, 220))
    assert accuracy(data, lambda x: x) > 0.9
    assert data.x_train.diff(dim=1).std() < data.x_train.std()  # neighboring bands are alike
