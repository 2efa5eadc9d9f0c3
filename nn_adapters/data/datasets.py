"""Data sets for classification: read from files of known checksums, or generated.

`load_dataset(name, ...)` makes any of them. Files are read from `data_dir`; with `fetch`, those that are missing are
downloaded, by the package pooch. Without either, only the generated sets and scikit-learn's digits are there: no set
ever stands in for another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from scipy.ndimage import gaussian_filter1d
from torch import Tensor

from nn_adapters.data import formats
from pdeopt.core.arrays import Array
from pdeopt.core.errors import InputError

#: Files by their place in `data_dir`, and their checksums.
SHA256 = {
    "mnist/train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "mnist/train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "mnist/t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "mnist/t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    "mnist/train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "mnist/train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "mnist/t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "mnist/t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    "fashion-mnist/train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    "fashion-mnist/train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    "fashion-mnist/t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    "fashion-mnist/t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    "fashion-mnist/train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "fashion-mnist/train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "fashion-mnist/t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "fashion-mnist/t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    "cifar10/cifar-10-binary.tar.gz": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    "cifar10/cifar-10-batches-bin/data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
    "cifar10/cifar-10-batches-bin/data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
    "cifar10/cifar-10-batches-bin/data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
    "cifar10/cifar-10-batches-bin/data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
    "cifar10/cifar-10-batches-bin/data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
    "cifar10/cifar-10-batches-bin/test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
    "cifar10/cifar10_subset_4000_1000.npz": "5e81f99fe5af185b32d0cb5efbf72c956a858f8e684fdfba6995f9e197878f5c",
    "uci-har/UCI HAR Dataset.zip": "2045e435c955214b38145fb5fa00776c72814f01b203fec405152dac7d5bfeb0",
    "uci-har/uci_har_inertial.npz": "d1a1a6b11172aaf30a6b21d2f879d46c142b3ffcc5c0b3e6289abf333f0bfe68",
    "indian-pines/Indian_pines_corrected.mat": "ec2f8808710919d566f70f0d4aa885aae1ddfd42b734aba71c5e12ca65450939",
    "indian-pines/Indian_pines_gt.mat": "65c4687a8ab04f6da4789799bc3bc4f6e88bccac3ed6a2e6ae367e5e6b9e429c",
    "libsvm/australian": "25a5d45d53b5db7c402f1bf58aea5ed5f0387ad525ec7f0131585f1f63033b38",
}

#: Where the files whose places begin so are to be had: the folders to try, in this order.
MIRRORS = {
    "mnist/": ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"),
    "fashion-mnist/": (
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    ),
    "cifar10/": ("https://www.cs.toronto.edu/~kriz/",),
    "uci-har/": ("https://archive.ics.uci.edu/ml/machine-learning-databases/00240/",),
    "indian-pines/Indian_pines_corrected": ("https://www.ehu.eus/ccwintco/uploads/6/67/",),
    "indian-pines/Indian_pines_gt": ("https://www.ehu.eus/ccwintco/uploads/c/c4/",),
    "libsvm/": ("https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/binary/",),
}

#: The subjects of UCI HAR whose windows are the test set.
HAR_TEST_SUBJECTS = (2, 4, 9, 10, 12, 13, 18, 20, 24)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Samples and their classes.

    Attributes:
        x_train, x_test: float32, (samples, ...); shapes and units are those of the set, see `docs/data.md`.
        y_train, y_test: classes 0..classes - 1, int64, (samples,).
        classes: how many.
    """

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: int


def load_dataset(name: str, data_dir: str | Path | None = "", fetch: bool = False, seed: int = 0) -> Dataset:
    """The data set of this name.

    Args:
        name: one of `DATASET_NAMES`.
        data_dir: the folder of the files, in the layout of `SHA256`; empty for none.
        fetch: download what is missing there (or, without a `data_dir`, in the user's cache). Not by several
            ranks at a time.
        seed: of a generated set, and of the split into training and test samples where a set has none of its own.

    Raises:
        InputError: an unknown name, no place to read from, a missing or damaged file, or a package that is missing.
    """
    if name in GENERATED:
        return GENERATED[name](seed=seed)
    if name not in STORED:
        raise InputError("data set", name, " | ".join(DATASET_NAMES))
    return STORED[name](_Source(name, data_dir, fetch), seed)


class _Source:
    """Finds the files of a set, and downloads them where it may."""

    def __init__(self, name: str, data_dir: str | Path | None, fetch: bool) -> None:
        self.root, self.fetch = Path(data_dir) if data_dir else None, fetch
        if not data_dir and not fetch:
            legal = "-data_dir FOLDER that has its files, or -fetch to download them"
            raise InputError(f"data set {name}", "no place to read it from", legal)

    def path(self, *places: str) -> Path:
        """The first of these places that is there, its checksum verified; the first of all is what is downloaded."""
        root = Path(_pooch().os_cache("pdeopt")) if self.root is None else self.root
        for place in places:
            if (path := root / place).exists():
                if place in SHA256:
                    formats.verify_checksum(path, SHA256[place])
                return path
        if not self.fetch:
            raise InputError("-data_dir", f"{root} without {places[0]}", " or ".join(places) + ", or -fetch")
        return _download(root / places[0], places[0])


def _pooch() -> Any:
    try:
        import pooch
    except ImportError:
        raise InputError("-fetch", "no package pooch", "pip install pooch, or -data_dir FOLDER") from None
    return pooch


def _download(path: Path, place: str) -> Path:
    """Download a file from the first mirror that has it. pooch renames it into place once its checksum is right."""
    pooch, failures = _pooch(), []
    for folder in next(mirrors for start, mirrors in MIRRORS.items() if place.startswith(start)):
        try:
            pooch.retrieve(folder + quote(path.name), f"sha256:{SHA256[place]}", path.name, path.parent)
            return path
        except (OSError, ValueError) as error:  # the network's errors are OSErrors, a wrong checksum is a ValueError
            failures.append(f"{folder}: {error}")
    raise InputError(f"-fetch: {path.name}", "; ".join(failures), f"a connection, or -data_dir with {place}")


def _dataset(name: str, train: tuple[Any, Any], test: tuple[Any, Any], classes: int) -> Dataset:
    x_train, x_test = (torch.from_numpy(np.array(x, dtype=np.float32)) for x, _ in (train, test))
    y_train, y_test = (torch.from_numpy(np.array(y, dtype=np.int64)) for _, y in (train, test))
    return Dataset(name, x_train, y_train, x_test, y_test, classes)


def _split(y: Array, seed: int, share: float = 0.2) -> tuple[Array, Array]:
    """Training and test rows, shuffled: of each class this share, but at least one row, is for tests."""
    rng = np.random.default_rng(seed)
    classes = [rng.permutation(np.flatnonzero(y == c)) for c in np.unique(y)]
    counts = [max(1, round(share * len(rows))) for rows in classes]
    train = np.concatenate([rows[n:] for rows, n in zip(classes, counts)])
    test = np.concatenate([rows[:n] for rows, n in zip(classes, counts)])
    return rng.permutation(train), rng.permutation(test)


def _idx_images(name: str, folder: str) -> Callable[[_Source, int], Dataset]:
    """MNIST and its kin: images (n, 1, 28, 28) in 0..1."""

    def part(source: _Source, name: str) -> tuple[Array, Array]:
        names = [f"{folder}/{name}-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1")]
        images, labels = (formats.read_idx(source.path(name + ".gz", name)) for name in names)
        return images[:, None] / np.float32(255), labels

    return lambda source, seed: _dataset(name, part(source, "train"), part(source, "t10k"), classes=10)


def _cifar10(source: _Source, seed: int) -> Dataset:
    """Images (n, 3, 32, 32), RGB in 0..1: the whole set, or else the subset."""
    folder = "cifar10/cifar-10-batches-bin"
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    path = source.path("cifar10/cifar-10-binary.tar.gz", folder, "cifar10/cifar10_subset_4000_1000.npz")
    if path.suffix == ".npz":
        arrays = formats.read_npz(path, ["x_train", "y_train", "x_test", "y_test"])
        batches = [(arrays[i].transpose(0, 3, 1, 2), arrays[i + 1]) for i in (0, 2)]
    elif path.is_dir():
        batches = [formats.read_cifar10(source.path(f"{folder}/{name}")) for name in names]
    else:
        batches = formats.read_cifar10_archive(path, names)
    *train, (x_test, y_test) = [(images / np.float32(255), labels) for images, labels in batches]
    x_train, y_train = (np.concatenate(arrays) for arrays in zip(*train))
    return _dataset("cifar10", (x_train, y_train), (x_test, y_test), classes=10)


def _har(source: _Source, seed: int) -> Dataset:
    """Windows (n, 128, 9) of nine signals at 50 Hz in g and rad/s, split by subject."""
    folder, arrays = "uci-har/UCI HAR Dataset", "uci-har/uci_har_inertial.npz"
    path = source.path(folder + ".zip", folder, arrays)
    if path.suffix == ".npz":
        parts = [formats.read_npz(path, [f"{k}_{part}" for k in ("x", "y", "subject")]) for part in ("train", "test")]
        x, y, subject = (np.concatenate(pair) for pair in zip(*parts))
    else:
        x, y, subject = formats.read_har(path)
    test = np.isin(subject, HAR_TEST_SUBJECTS)
    return _dataset("har", (x[~test], y[~test]), (x[test], y[test]), classes=6)


def _indian_pines(source: _Source, seed: int) -> Dataset:
    """Spectra (n, bands) of the labeled pixels; each band has mean 0 and deviation 1 over the training pixels."""
    corrected, whole = "indian-pines/Indian_pines_corrected.mat", "indian-pines/Indian_pines.mat"
    labels = source.path("indian-pines/Indian_pines_gt.mat")
    path = source.path(corrected, whole)
    cube, y = formats.read_mat(path, path.stem.lower()), formats.read_mat(labels, "indian_pines_gt").astype(int)
    if cube.ndim != 3 or cube.shape[:2] != y.shape:
        raise InputError(f"{path}: shape", cube.shape, f"{y.shape} and the bands, as {labels.name} has labels")
    x, y = cube[y > 0].astype(float), y[y > 0] - 1
    train, test = _split(y, seed)
    x = (x - x[train].mean(0)) / np.maximum(x[train].std(0), 1e-12)
    return _dataset("indian_pines", (x[train], y[train]), (x[test], y[test]), classes=16)


def _australian(source: _Source, seed: int) -> Dataset:
    """Features (n, 14), each scaled to -1..1 over the whole set, as LIBSVM's `australian_scale` is."""
    x, label = formats.read_libsvm(source.path("libsvm/australian"), 14)
    y = (label > 0).astype(int)
    x = 2 * (x - x.min(0)) / np.ptp(x, axis=0) - 1
    train, test = _split(y, seed)
    return _dataset("australian", (x[train], y[train]), (x[test], y[test]), classes=2)


def digits(seed: int = 0) -> Dataset:
    """scikit-learn's digits: images (n, 1, 8, 8) in 0..1."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError("data set digits", "no package scikit-learn", "pip install scikit-learn") from None
    data = load_digits()
    x, y = data.images[:, None] / 16, data.target
    train, test = _split(y, seed)
    return _dataset("digits", (x[train], y[train]), (x[test], y[test]), classes=10)


def peaks_grid() -> tuple[Array, Array]:
    """MATLAB's `peaks` on the grid of 256 x 256 points of [-3, 3]^2: points (65536, 2) and values (65536,)."""
    axis = np.linspace(-3, 3, 256)
    x, y = (array.ravel() for array in np.meshgrid(axis, axis))
    f = 3 * (1 - x) ** 2 * np.exp(-(x**2) - (y + 1) ** 2)
    f -= 10 * (x / 5 - x**3 - y**5) * np.exp(-(x**2) - y**2) + np.exp(-((x + 1) ** 2) - y**2) / 3
    return np.stack([x, y], axis=1), f


def peaks(seed: int = 0, train: int = 1000, test: int = 40) -> Dataset:
    """Points (n, 2) of the grid of `peaks_grid`, so many of each class: level sets of five equal heights."""
    points, f = peaks_grid()
    rng = np.random.default_rng(seed)
    level = np.digitize(f, np.linspace(f.min(), f.max(), 6)[1:-1])
    least = np.bincount(level).min()
    if min(train, test) < 0 or train + test > least:
        raise InputError("peaks: train, test", f"{train}, {test}", f"together at most {least}, points of a class")
    rows = np.stack([rng.choice(np.flatnonzero(level == c), train + test, replace=False) for c in range(5)])
    first, rest = (rng.permutation(part.ravel()) for part in (rows[:, :train], rows[:, train:]))
    return _dataset("peaks", (points[first], level[first]), (points[rest], level[rest]), classes=5)


def _classes(n: int, classes: int, rng: np.random.Generator) -> Array:
    """The classes of n training samples and of n/5 test samples after them, in random order, of each as many."""
    if n < 5:
        raise InputError("n, samples", n, "n >= 5")
    return np.concatenate([rng.permutation(np.arange(m) % classes) for m in (n, n // 5)])


def moving_shapes(n: int = 600, frames: int = 8, size: int = 16, seed: int = 0) -> Dataset:
    """Videos (n, frames, 1, size, size) in 0..1 of a disc, square or diamond that moves: the class is how.

    Right, left, down, up, clockwise or anticlockwise. It starts anywhere, and what leaves on one side comes in on the
    other: single frames of all classes are alike.
    There are n videos for training and n/5 for tests.
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
    return _dataset("moving_shapes", (x[:n], y[:n]), (x[n:], y[n:]), classes=6)


def synthetic_har(n: int = 600, noise: float = 0.5, seed: int = 0) -> Dataset:
    """Signals (n, 128, 9), like windows of UCI HAR: three frequencies, a wave going up or down the channels; noise.

    There are n windows for training and n/5 for tests.
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
    return _dataset("synthetic_har", (x[:n], y[:n]), (x[n:], y[n:]), classes=6)


def indian_pines_like(n: int = 2000, features: int = 220, noise: float = 1.0, seed: int = 0) -> Dataset:
    """Spectra (n, features) of 16 classes, like pixels of Indian Pines: smooth random means, smooth and white noise.

    There are n spectra for training and n/5 for tests.
    """
    if features < 2:
        raise InputError("indian_pines_like: features", features, "features >= 2")
    rng = np.random.default_rng(seed)
    y = _classes(n, 16, rng)

    def smooth(rows: int) -> Array:
        curves = gaussian_filter1d(rng.standard_normal((rows, features)), features / 20, mode="wrap")
        return np.asarray(curves / curves.std())

    x = smooth(16)[y] + noise * (0.5 * smooth(len(y)) + 0.5 * rng.standard_normal((len(y), features)))
    return _dataset("indian_pines_like", (x[:n], y[:n]), (x[n:], y[n:]), classes=16)


#: Sets that need no files.
GENERATED: dict[str, Callable[..., Dataset]] = {
    "peaks": peaks,
    "digits": digits,
    "moving_shapes": moving_shapes,
    "synthetic_har": synthetic_har,
    "indian_pines_like": indian_pines_like,
}

#: Sets that are read from files.
STORED: dict[str, Callable[[_Source, int], Dataset]] = {
    "mnist": _idx_images("mnist", "mnist"),
    "fashion_mnist": _idx_images("fashion_mnist", "fashion-mnist"),
    "cifar10": _cifar10,
    "har": _har,
    "indian_pines": _indian_pines,
    "australian": _australian,
}

DATASET_NAMES = [*GENERATED, *STORED]
