"""Samples and kernels of the scripts with kernel matrices: their options, and the pictures of blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

import nn_adapters as nna
import pdeopt as po
from nn_adapters.data import DATASET_NAMES
from pdeopt.core import require_memory
from pdeopt.core.memory import DOUBLE
from pdeopt.lowrank import Kernel, kernel_of
from problems.shared.files import DataFiles

#: Samples of which distances are measured, and points of a generated test set.
MEASURED, TESTS = 500, 1000


@dataclass(frozen=True)
class KernelSettings(po.Settings):
    """The samples, and the kernel."""

    data: str = po.setting("generated", "generated, or a data set for classification, as australian or mnist")
    samples: int = po.setting(None, "training samples; by default 4096 generated ones, or all", kind=int, at_least=2)
    dim: int = po.setting(2, "dimension of generated points", at_least=1)
    noise: float = po.setting(0.1, "deviation of the noise of generated values", at_least=0)
    kernel: str = po.setting("gaussian", "kernel", choices=("gaussian", "matern", "laplace", "polynomial"))
    width: float = po.setting(
        None, "of the kernel; by default 0.2 for generated points, else half the median distance", kind=float, above=0
    )
    smoothness: float = po.setting(1.5, "of the Matern kernel: 0.5, 1.5 or 2.5", above=0)
    degree: int = po.setting(3, "of the polynomial kernel", at_least=1)
    seed: int = po.setting(0, "of generated samples, and of those that are drawn", at_least=0)


@dataclass(frozen=True)
class LambdaSettings(po.Settings):
    """The ridge."""

    lambda_: float = po.setting(
        0.1, "ridge of the regression: the variance of the noise of a Gaussian process", above=0
    )


@dataclass(frozen=True)
class KernelSamples:
    """Points with values or classes, all of them on each rank.

    Attributes:
        name: of the set.
        x, x_test: (n, d).
        y, y_test: values (n,); for a data set, classes 0..classes - 1.
        classes: their number; 0 for values.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    classes: int


def load(settings: KernelSettings, files: DataFiles) -> KernelSamples:
    """The samples of the settings.

    Raises:
        InputError: an unknown set, or more samples than there is memory for.
    """
    if settings.data == "generated":
        n = settings.samples or 4096
        given = f"{n}, {settings.dim}"
        require_memory(4.0 * DOUBLE * n * (settings.dim + 128), "-samples, -dim", given, "smaller ones")
        x = np.random.default_rng(settings.seed).random((n + TESTS, settings.dim))
        y = waves(x, settings.seed)
        noise = settings.noise * np.random.default_rng(settings.seed + 1).standard_normal(n)
        return KernelSamples("generated", x[:n], y[:n] + noise, x[n:], y[n:], 0)
    if settings.data not in DATASET_NAMES:
        raise po.InputError("-data", settings.data, "generated | " + " | ".join(DATASET_NAMES))
    data: nna.Dataset = files.load(settings.data, settings.seed)
    rows = np.arange(len(data.x_train))
    if settings.samples:
        rows = np.random.default_rng(settings.seed).permutation(rows)[: settings.samples]
    x, x_test = (each.flatten(1).double().numpy() for each in (data.x_train, data.x_test))
    return KernelSamples(data.name, x[rows], data.y_train.numpy()[rows], x_test, data.y_test.numpy(), data.classes)


def waves(x: np.ndarray, seed: int) -> np.ndarray:
    """A smooth function of points in the unit cube: the mean of some waves of about one length."""
    generator = np.random.default_rng(seed + 2)
    directions = generator.standard_normal((8, x.shape[1])) * 2.0 * np.pi / np.sqrt(x.shape[1])
    return np.asarray(np.sqrt(2.0 / 8.0) * np.cos(x @ directions.T + generator.uniform(0, 2 * np.pi, 8)).sum(axis=1))


def width_of(settings: KernelSettings, x: np.ndarray) -> float:
    """The width of the settings, or half the median distance of some of the samples."""
    if settings.width is not None:
        return settings.width
    if settings.data == "generated":
        return 0.2
    some = x[np.random.default_rng(settings.seed).permutation(len(x))[:MEASURED]]
    squares = np.sum(some**2, axis=1)
    distances = np.sqrt(np.maximum(squares[:, None] + squares - 2.0 * some @ some.T, 0.0))
    return 0.5 * float(np.median(distances[np.triu_indices(len(some), 1)])) or 1.0


def make_kernel(settings: KernelSettings, x: np.ndarray) -> Kernel:
    """The kernel of the settings for these samples."""
    shapes: dict[str, dict[str, Any]] = {
        "matern": {"smoothness": settings.smoothness},
        "polynomial": {"degree": settings.degree},
    }
    return kernel_of(settings.kernel, width_of(settings, x), **shapes.get(settings.kernel, {}))


def draw_blocks(axis: Any, ranks: list[list[int]], n: int) -> None:
    """The blocks of a hierarchical matrix, colored by their ranks, which are written into the large ones."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    patches, values = [], []
    for depth, level in enumerate(ranks, start=1):
        side = n / 2**depth
        for pair, rank in enumerate(level):
            corner = 2 * pair * side
            for place in ((corner + side, corner), (corner, corner + side)):
                patches.append(Rectangle(place, side, side))
                values.append(rank)
                if depth <= 4:
                    middle = (place[0] + side / 2, place[1] + side / 2)
                    axis.text(*middle, str(rank), ha="center", va="center", fontsize=14 - 2 * depth)
    leaves = 2 ** len(ranks)
    collection = PatchCollection(patches, cmap="YlGnBu", edgecolor="white", linewidth=0.3)
    collection.set_array(np.array(values, dtype=float))
    axis.add_collection(collection)
    diagonal = [Rectangle((k * n / leaves, k * n / leaves), n / leaves, n / leaves) for k in range(leaves)]
    axis.add_collection(PatchCollection(diagonal, facecolor="#b0413e", edgecolor="none"))
    axis.set(title="ranks of the blocks", xlim=(0, n), ylim=(n, 0), aspect="equal")
    if values:
        axis.figure.colorbar(collection, ax=axis, shrink=0.8)
