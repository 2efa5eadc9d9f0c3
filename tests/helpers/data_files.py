"""Small files of each format of data sets; what a reader should find in them."""

import gzip
import struct

import numpy as np
import scipy.io
import torch

from nn_adapters.data import formats
from nn_adapters.data.dataset import Dataset

CIFAR_NAMES = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]


def write_idx(path, array, zipped=True):
    codes = {np.dtype(kind).newbyteorder("="): code for code, kind in formats.IDX_TYPES.items()}
    content = struct.pack(f">BBBB{array.ndim}I", 0, 0, codes[array.dtype], array.ndim, *array.shape)
    content += array.astype(array.dtype.newbyteorder(">")).tobytes()
    path.write_bytes(gzip.compress(content) if zipped else content)
    return array


def cifar10_batch(n, seed=0):
    rng = np.random.default_rng(seed)
    images, labels = rng.integers(256, size=(n, 3, 32, 32), dtype=np.uint8), np.arange(n, dtype=np.uint8) % 10
    content = b"".join(bytes([label]) + image.tobytes() for image, label in zip(images, labels))
    return content, images, labels


def write_cifar10(path):
    content, images, labels = cifar10_batch(3)
    path.write_bytes(content)
    return images, labels


def write_libsvm(path):
    path.write_bytes(b"-1 1:0.5 3:-2e1 # a comment\n\n+1 2:12\n+1\n-1 1:1 2:2 3:3")  # no newline at the end
    return np.array([[0.5, 0, -20], [0, 12, 0], [0, 0, 0], [1, 2, 3]]), np.array([-1.0, 1, 1, -1])


def write_mat(path):
    array = np.random.default_rng(0).integers(1000, size=(40, 50), dtype=np.uint16)
    scipy.io.savemat(path, {"cube": array, "other": 1}, do_compression=True)
    return array


def write_npz(path):
    arrays = {"a": np.arange(600.0).reshape(20, 30), "b": np.arange(500)}
    np.savez_compressed(path, **arrays)
    return [arrays["a"], arrays["b"]]


def write_har(folder, counts=(("train", 5, (1, 3)), ("test", 4, (2, 4)))):
    """The original folder; by default with subjects 2 and 4, who are of the test set."""
    rng, parts = np.random.default_rng(0), []
    for part, n, subjects in counts:
        x, y = rng.standard_normal((n, 128, 9)).astype(np.float32), np.arange(n) % 6
        subject = np.resize(np.repeat(subjects, 6), n)
        (folder / part / "Inertial Signals").mkdir(parents=True)
        for i, name in enumerate(formats.HAR_CHANNELS):
            lines = ["  ".join(f"{value: .7e}" for value in row) for row in x[:, :, i]]
            (folder / part / "Inertial Signals" / f"{name}_{part}.txt").write_text("\n".join(lines) + "\n")
        (folder / part / f"y_{part}.txt").write_text("".join(f"{label + 1}\n" for label in y))
        (folder / part / f"subject_{part}.txt").write_text("".join(f"{number}\n" for number in subject))
        parts.append((x, y, subject))
    return [np.concatenate(arrays) for arrays in zip(*parts)]


def check_dataset(data, name, classes, train, test):
    """Kinds, shapes and classes; each class occurs."""
    assert isinstance(data, Dataset) and (data.name, data.classes) == (name, classes)
    assert (tuple(data.x_train.shape), tuple(data.x_test.shape)) == (train, test)
    for x, y in ((data.x_train, data.y_train), (data.x_test, data.y_test)):
        assert x.dtype == torch.float32 and y.dtype == torch.int64 and len(x) == len(y)
        assert torch.isfinite(x).all()
        assert set(y.tolist()) == set(range(classes))


def samples_of_each_class(y):
    return y.bincount().tolist()
