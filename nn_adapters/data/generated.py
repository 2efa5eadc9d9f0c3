"""Data sets that need no files: generated ones, and scikit-learn's digits.

No set stands in for another: those that are made like measured ones have names of their own.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.ndimage import gaussian_filter1d

from nn_adapters.data.dataset import Dataset, make_dataset, split_by_class
from pdeopt.core.arrays import Array
from pdeopt.core.errors import InputError


def digits(seed: int = 0) -> Dataset:
    """scikit-learn's digits: images (n, 1, 8, 8) in 0..1, ten classes; a fifth of each class is for tests.

    Args:
        seed: of the split into training and test samples.

    Raises:
        InputError: no package scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError("data set digits", "no package scikit-learn", "pip install scikit-learn") from None
    data = load_digits()
    x, y = data.images[:, None] / 16, data.target
    train, test = split_by_class(y, seed)
    return make_dataset("digits", (x[train], y[train]), (x[test], y[test]), classes=10)


def peaks_grid() -> tuple[Array, Array]:
    """MATLAB's `peaks` on the grid of 256 x 256 points of [-3, 3]^2: points (65536, 2) and values (65536,)."""
    axis = np.linspace(-3, 3, 256)
    x, y = (array.ravel() for array in np.meshgrid(axis, axis))
    f = 3 * (1 - x) ** 2 * np.exp(-(x**2) - (y + 1) ** 2)
    f -= 10 * (x / 5 - x**3 - y**5) * np.exp(-(x**2) - y**2) + np.exp(-((x + 1) ** 2) - y**2) / 3
    return np.stack([x, y], axis=1), f


def peaks(seed: int = 0, train: int = 1000, test: int = 40) -> Dataset:
    """Points (n, 2) of the grid of `peaks_grid`; the five classes are level sets of equal height.

    The test problem of layer-parallel training (S. Guenther, L. Ruthotto, J. B. Schroder, E. C. Cyr, N. R. Gauger,
    SIAM J. Math. Data Sci. 2, 2020).

    Args:
        seed: of the random choice of points.
        train, test: points of each class for training and for tests; no point is in both.

    Raises:
        InputError: more points than a class has.
    """
    points, f = peaks_grid()
    rng = np.random.default_rng(seed)
    level = np.digitize(f, np.linspace(f.min(), f.max(), 6)[1:-1])
    least = np.bincount(level).min()
    if min(train, test) < 0 or train + test > least:
        raise InputError("peaks: train, test", f"{train}, {test}", f"together at most {least}, points of a class")
    rows = np.stack([rng.choice(np.flatnonzero(level == c), train + test, replace=False) for c in range(5)])
    first, rest = (rng.permutation(part.ravel()) for part in (rows[:, :train], rows[:, train:]))
    return make_dataset("peaks", (points[first], level[first]), (points[rest], level[rest]), classes=5)


def _classes(n: int, classes: int, rng: np.random.Generator) -> Array:
    """The classes of n training samples and of n/5 test samples after them, in random order, of each as many."""
    if n < 5:
        raise InputError("n, samples", n, "n >= 5")
    return np.concatenate([rng.permutation(np.arange(m) % classes) for m in (n, n // 5)])


def moving_shapes(n: int = 600, frames: int = 8, size: int = 16, seed: int = 0) -> Dataset:
    """Videos (n, frames, 1, size, size) in 0..1 of a disc, square or diamond that moves: the class is how.

    Right, left, down, up, clockwise or counterclockwise. It starts anywhere, and what leaves on one side comes in on
    the other: single frames of all classes are alike.

    Args:
        n: videos for training; there are n/5 for tests.
        frames, size: of a video, at least 2 and 8.
        seed: of the random numbers.

    Raises:
        InputError: fewer than five videos, or sizes that are too small.
    """
    if frames < 2 or size < 8:
        raise InputError("moving_shapes: frames, size", f"{frames}, {size}", "frames >= 2, size >= 8")
    rng = np.random.default_rng(seed)
    y = _classes(n, 6, rng)
    t = np.arange(frames) * rng.uniform(0.8, 1.2, (len(y), 1))
    line = np.array([1, -1, 1j, -1j, 0, 0])[y, None] * 1.5 * t
    turn = np.where(y < 4, 0, size / 4)[:, None] * np.exp(1j * np.where(y == 4, 1, -1)[:, None] * 2 * np.pi * t / 8)
    start, phase = rng.random((2, len(y), 1)) * size, np.exp(2j * np.pi * rng.random((len(y), 1)))
    center = start[0] + 1j * start[1] + line + phase * turn
    dx, dy = (np.abs((np.arange(size) - c[..., None] + size / 2) % size - size / 2) for c in (center.real, center.imag))
    dx, dy = dx[:, :, None, :], dy[:, :, :, None]
    kind = rng.integers(3, size=(len(y), 1, 1, 1))
    distance = np.choose(kind, [np.hypot(dx, dy), np.maximum(dx, dy), dx + dy])
    radius = size * rng.uniform(0.12, 0.2, (len(y), 1, 1, 1))
    x = np.clip(radius - distance + 0.5, 0, 1)[:, :, None]
    return make_dataset("moving_shapes", (x[:n], y[:n]), (x[n:], y[n:]), classes=6)


def synthetic_har(n: int = 600, noise: float = 0.5, seed: int = 0) -> Dataset:
    """Signals (n, 128, 9), like windows of UCI HAR: three frequencies, a wave going up or down the channels; noise.

    Args:
        n: windows for training; there are n/5 for tests.
        noise: its standard deviation.
        seed: of the random numbers.

    Raises:
        InputError: fewer than five windows.
    """
    rng = np.random.default_rng(seed)
    y = _classes(n, 6, rng)

    def random(low: float, high: float) -> Array:
        return rng.uniform(low, high, (len(y), 1, 1))

    frequency = np.array([1.2, 1.8, 2.6])[y % 3, None, None] * random(0.92, 1.08)  # Hz
    delay = np.where(y < 3, 1, -1)[:, None, None] * np.arange(9) * random(0.5, 0.8)
    angle = 2 * np.pi * frequency * np.arange(128)[:, None] / 50 + delay + random(0, 2 * np.pi)
    x = random(0.7, 1.3) * (np.sin(angle) + random(0, 0.4) * np.sin(2 * angle))
    x += noise * rng.standard_normal(x.shape)
    return make_dataset("synthetic_har", (x[:n], y[:n]), (x[n:], y[n:]), classes=6)


def indian_pines_like(n: int = 2000, features: int = 220, noise: float = 1.0, seed: int = 0) -> Dataset:
    """Spectra (n, features) of 16 classes, like pixels of Indian Pines: smooth random means, smooth and white noise.

    Args:
        n: spectra for training; there are n/5 for tests.
        features: of a spectrum, at least 2.
        noise: its size, over that of the means.
        seed: of the random numbers.

    Raises:
        InputError: fewer than five spectra, or fewer than two features.
    """
    if features < 2:
        raise InputError("indian_pines_like: features", features, "features >= 2")
    rng = np.random.default_rng(seed)
    y = _classes(n, 16, rng)

    def smooth(rows: int) -> Array:
        curves = gaussian_filter1d(rng.standard_normal((rows, features)), features / 20, mode="wrap")
        return np.asarray(curves / curves.std())

    x = smooth(16)[y] + noise * (0.5 * smooth(len(y)) + 0.5 * rng.standard_normal((len(y), features)))
    return make_dataset("indian_pines_like", (x[:n], y[:n]), (x[n:], y[n:]), classes=16)


#: Sets that need no files, by name.
GENERATED_SETS: dict[str, Callable[..., Dataset]] = {
    "peaks": peaks,
    "digits": digits,
    "moving_shapes": moving_shapes,
    "synthetic_har": synthetic_har,
    "indian_pines_like": indian_pines_like,
}
