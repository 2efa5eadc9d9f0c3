"""Data sets for classification by name: read from files of known checksums, or generated.

`load_dataset(name, ...)` makes any of them. Files are read from `data_dir`; with `fetch`, those that are missing are
downloaded, by the package pooch. Without either, only the generated sets and scikit-learn's digits are there: no set
ever stands in for another.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from nn_adapters.data import formats
from nn_adapters.data.dataset import Dataset, make_dataset, split_by_class
from nn_adapters.data.generated import GENERATED_SETS
from nn_adapters.data.limits import LIMIT_MB
from nn_adapters.data.sources import Source
from pdeopt.core.arrays import Array
from pdeopt.core.errors import InputError

#: The subjects of UCI HAR whose windows are the test set.
HAR_TEST_SUBJECTS = (2, 4, 9, 10, 12, 13, 18, 20, 24)


def load_dataset(
    name: str, data_dir: str | Path | None = "", fetch: bool = False, seed: int = 0, limit_mb: float = LIMIT_MB
) -> Dataset:
    """The data set of this name.

    Args:
        name: one of `DATASET_NAMES`.
        data_dir: the folder of the files, in the layout of `SHA256`; empty for none.
        fetch: download what is missing there (or, without a `data_dir`, in the user's cache). Not by several
            ranks at a time.
        seed: of a generated set, and of the split into training and test samples where a set has none of its own.
        limit_mb: megabytes that a file may expand to; a large one may to 16 times its size.

    Returns:
        The set; `docs/data.md` tells shapes and units of each.

    Raises:
        InputError: an unknown name, no place to read from, or one for a set that has no files, a missing or damaged
            file, one that would expand beyond the limit, or a package that is missing.

    Example:
        >>> data = load_dataset("peaks")
        >>> data.x_train.shape, data.classes
        (torch.Size([5000, 2]), 5)
    """
    if name in GENERATED_SETS:
        refuse_place(name, data_dir, fetch)
        return GENERATED_SETS[name](seed=seed)
    if name not in STORED_SETS:
        raise InputError("data set", name, " | ".join(DATASET_NAMES))
    return STORED_SETS[name](Source(name, data_dir, fetch, limit_mb), seed)


def refuse_place(name: str, data_dir: str | Path | None, fetch: bool) -> None:
    """Raise where data without files are to come from a folder, or to be downloaded.

    Args:
        name: of the data.
        data_dir, fetch: as of `load_dataset`.

    Raises:
        InputError: either of the two.
    """
    if data_dir or fetch:
        got = f"{data_dir or 'a download'} for {name}, which has no files"
        raise InputError("-data_dir, -fetch", got, "neither, or a data set that is stored: " + " | ".join(STORED_SETS))


def _idx_images(name: str, folder: str) -> Callable[[Source, int], Dataset]:
    """MNIST, or a set in its format: images (n, 1, 28, 28) in 0..1."""

    def part(source: Source, name: str) -> tuple[Array, Array]:
        names = [f"{folder}/{name}-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1")]
        images, labels = (formats.read_idx(source.path(name + ".gz", name), source.limit_mb) for name in names)
        return images[:, None] / np.float32(255), labels

    return lambda source, seed: make_dataset(name, part(source, "train"), part(source, "t10k"), classes=10)


def _cifar10(source: Source, seed: int) -> Dataset:
    """Images (n, 3, 32, 32), RGB in 0..1: the whole set, or else the subset."""
    folder = "cifar10/cifar-10-batches-bin"
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    path = source.path("cifar10/cifar-10-binary.tar.gz", folder, "cifar10/cifar10_subset_4000_1000.npz")
    if path.suffix == ".npz":
        arrays = formats.read_npz(path, ["x_train", "y_train", "x_test", "y_test"], source.limit_mb)
        batches = [(arrays[i].transpose(0, 3, 1, 2), arrays[i + 1]) for i in (0, 2)]
    elif path.is_dir():
        batches = [formats.read_cifar10(source.path(f"{folder}/{name}")) for name in names]
    else:
        batches = formats.read_cifar10_archive(path, names, source.limit_mb)
    *train, (x_test, y_test) = [(images / np.float32(255), labels) for images, labels in batches]
    x_train, y_train = (np.concatenate(arrays) for arrays in zip(*train))
    return make_dataset("cifar10", (x_train, y_train), (x_test, y_test), classes=10)


def _har(source: Source, seed: int) -> Dataset:
    """Windows (n, 128, 9) of nine signals at 50 Hz in g and rad/s, split by subject."""
    folder, arrays = "uci-har/UCI HAR Dataset", "uci-har/uci_har_inertial.npz"
    path = source.path(folder + ".zip", folder, arrays)
    if path.suffix == ".npz":
        names = [f"{k}_{part}" for k in ("x", "y", "subject") for part in ("train", "test")]
        parts = formats.read_npz(path, names, source.limit_mb)
        x, y, subject = (np.concatenate(parts[i : i + 2]) for i in (0, 2, 4))
    else:
        x, y, subject = formats.read_har(path, source.limit_mb)
    test = np.isin(subject, HAR_TEST_SUBJECTS)
    return make_dataset("har", (x[~test], y[~test]), (x[test], y[test]), classes=6)


def _indian_pines(source: Source, seed: int) -> Dataset:
    """Spectra (n, bands) of the labeled pixels; each band has mean 0 and deviation 1 over the training pixels."""
    corrected, whole = "indian-pines/Indian_pines_corrected.mat", "indian-pines/Indian_pines.mat"
    labels = source.path("indian-pines/Indian_pines_gt.mat")
    path = source.path(corrected, whole)
    cube = formats.read_mat(path, path.stem.lower(), source.limit_mb)
    y = formats.read_mat(labels, "indian_pines_gt", source.limit_mb).astype(int)
    if cube.ndim != 3 or cube.shape[:2] != y.shape:
        raise InputError(f"{path}: shape", cube.shape, f"{y.shape} and the bands, as {labels.name} has labels")
    x, y = cube[y > 0].astype(float), y[y > 0] - 1
    train, test = split_by_class(y, seed)
    x = (x - x[train].mean(0)) / np.maximum(x[train].std(0), 1e-12)
    return make_dataset("indian_pines", (x[train], y[train]), (x[test], y[test]), classes=16)


def _australian(source: Source, seed: int) -> Dataset:
    """Features (n, 14), each scaled to -1..1 over the whole set, as LIBSVM's `australian_scale` is."""
    x, label = formats.read_libsvm(source.path("libsvm/australian"), 14)
    y = (label > 0).astype(int)
    x = scaled_to_one(x.toarray())
    train, test = split_by_class(y, seed)
    return make_dataset("australian", (x[train], y[train]), (x[test], y[test]), classes=2)


def scaled_to_one(x: Array) -> Array:
    """Each column scaled to -1..1, as LIBSVM's `svm-scale` does; one of equal numbers becomes 0."""
    least, most = x.min(0), x.max(0)
    return (2 * x - least - most) / np.where(most > least, most - least, 1)


#: Sets that are read from files, by name.
STORED_SETS: dict[str, Callable[[Source, int], Dataset]] = {
    "mnist": _idx_images("mnist", "mnist"),
    "fashion_mnist": _idx_images("fashion_mnist", "fashion-mnist"),
    "cifar10": _cifar10,
    "har": _har,
    "indian_pines": _indian_pines,
    "australian": _australian,
}

#: All sets.
DATASET_NAMES = [*GENERATED_SETS, *STORED_SETS]
