"""Samples and their classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pdeopt.core.arrays import Array
from pdeopt.core.errors import InputError


@dataclass(frozen=True, eq=False)
class Dataset:
    """Samples and their classes, for training and for tests.

    Attributes:
        name: of the set.
        x_train, x_test: float32, (samples, ...); shapes and units are those of the set, see `docs/data.md`.
        y_train, y_test: classes 0..classes - 1, int64, (samples,).
        classes: their number.
        costs: what making the set took, as the seconds of its parts.
    """

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: int
    costs: Mapping[str, float] = field(default_factory=dict)


def make_dataset(name: str, train: tuple[Any, Any], test: tuple[Any, Any], classes: int) -> Dataset:
    """A `Dataset` from arrays.

    Args:
        name: of the set.
        train, test: samples (n, ...) and their classes (n,), anything that NumPy converts; they are copied.
        classes: their number.

    Raises:
        InputError: no samples, samples that are not finite in single precision, classes other than 0..classes - 1, or
            more or fewer classes than samples.
    """
    (x_train, y_train), (x_test, y_test) = (
        _part(f"data set {name}: {part}", x, y, classes) for part, (x, y) in (("training", train), ("test", test))
    )
    if x_train.shape[1:] != x_test.shape[1:]:
        shapes = tuple(x_train.shape[1:]), tuple(x_test.shape[1:])
        raise InputError(f"data set {name}: samples", f"{shapes[0]} for training, {shapes[1]} for tests", "one shape")
    return Dataset(name, x_train, y_train, x_test, y_test, classes)


def _part(what: str, x: Any, y: Any, classes: int) -> tuple[Tensor, Tensor]:
    """Samples and classes as tensors, checked."""
    x, y = np.asarray(x), np.asarray(y)
    if x.dtype.kind not in "biuf" or y.dtype.kind not in "biuf":
        raise InputError(what, f"samples of type {x.dtype}, classes of type {y.dtype}", "real numbers")
    if x.ndim == 0 or y.ndim != 1 or len(x) != len(y) or len(x) == 0:
        raise InputError(what, f"samples {x.shape}, classes {y.shape}", "at least one sample, as many classes, (n,)")
    if not np.isin(y, np.arange(classes)).all():
        raise InputError(f"{what} classes", f"{y.min()} to {y.max()}", f"whole numbers 0..{classes - 1}")
    with np.errstate(over="ignore"):
        samples = np.array(x, dtype=np.float32)
    if not np.isfinite(samples).all():
        raise InputError(f"{what} samples", "numbers that are not finite", "finite numbers of single precision")
    return torch.from_numpy(samples), torch.from_numpy(y.astype(np.int64))


def split_by_class(y: Array, seed: int, share: float = 0.2) -> tuple[Array, Array]:
    """Training and test rows, shuffled: of each class this share, but at least one row, is for tests.

    Args:
        y: classes, (n,).
        seed: of the random numbers.
        share: that is for tests, 0..1.

    Returns:
        Indices of the training samples and of the test samples.

    Raises:
        InputError: no classes.
    """
    if not len(y):
        raise InputError("samples", "none", "at least one")
    rng = np.random.default_rng(seed)
    classes = [rng.permutation(np.flatnonzero(y == c)) for c in np.unique(y)]
    counts = [max(1, round(share * len(rows))) for rows in classes]
    train = np.concatenate([rows[n:] for rows, n in zip(classes, counts)])
    test = np.concatenate([rows[:n] for rows, n in zip(classes, counts)])
    return rng.permutation(train), rng.permutation(test)
