"""Samples and their classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pdeopt.core.arrays import Array


@dataclass(frozen=True, eq=False)
class Dataset:
    """Samples and their classes, for training and for tests.

    Attributes:
        name: of the set.
        x_train, x_test: float32, (samples, ...); shapes and units are those of the set, see `docs/data.md`.
        y_train, y_test: classes 0..classes - 1, int64, (samples,).
        classes: their number.
    """

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: int


def make_dataset(name: str, train: tuple[Any, Any], test: tuple[Any, Any], classes: int) -> Dataset:
    """A `Dataset` from arrays.

    Args:
        name: of the set.
        train, test: samples (n, ...) and their classes (n,), anything that NumPy converts; they are copied.
        classes: their number.
    """
    x_train, x_test = (torch.from_numpy(np.array(x, dtype=np.float32)) for x, _ in (train, test))
    y_train, y_test = (torch.from_numpy(np.array(y, dtype=np.int64)) for _, y in (train, test))
    return Dataset(name, x_train, y_train, x_test, y_test, classes)


def split_by_class(y: Array, seed: int, share: float = 0.2) -> tuple[Array, Array]:
    """Training and test rows, shuffled: of each class this share, but at least one row, is for tests.

    Args:
        y: classes, (n,).
        seed: of the random numbers.
        share: that is for tests, 0..1.

    Returns:
        Indices of the training samples and of the test samples.
    """
    rng = np.random.default_rng(seed)
    classes = [rng.permutation(np.flatnonzero(y == c)) for c in np.unique(y)]
    counts = [max(1, round(share * len(rows))) for rows in classes]
    train = np.concatenate([rows[n:] for rows, n in zip(classes, counts)])
    test = np.concatenate([rows[:n] for rows, n in zip(classes, counts)])
    return rng.permutation(train), rng.permutation(test)
