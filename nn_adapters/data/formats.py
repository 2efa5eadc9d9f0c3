"""Readers of the file formats in which data sets come: IDX, CIFAR-10 batches, LIBSVM text, MATLAB, NumPy, UCI HAR.

They read any file of the format, not only those of known data sets. Nothing is ever unpickled. A file that is damaged,
truncated or of another format raises `InputError`, which names it.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import scipy.io

from pdeopt.core.arrays import Array
from pdeopt.core.errors import InputError

T = TypeVar("T")

#: Types of the numbers of an IDX file, by their code.
IDX_TYPES = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}

#: Bytes of an image of CIFAR-10 with its label.
CIFAR_RECORD = 1 + 3 * 32 * 32

#: The signals of UCI HAR, in the order of the last axis, and the lengths of their windows.
HAR_CHANNELS = [f"{kind}_{axis}" for kind in ("body_acc", "body_gyro", "total_acc") for axis in "xyz"]
HAR_WINDOW = 128

#: A dense table of more numbers than this is not what a LIBSVM file stands for.
DENSE_LIMIT = 2**28


def verify_checksum(path: Path, expected: str) -> None:
    """Check the SHA-256 checksum of a file.

    Args:
        path: of the file.
        expected: hexadecimal digits.

    Raises:
        InputError: another checksum.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != expected:
        raise InputError(f"{path}: damaged or another file; sha256", digest.hexdigest(), expected)


def read_idx(path: str | Path) -> Array:
    """An IDX file, as of MNIST: an array of any shape, in native byte order.

    Args:
        path: of the file, which may be compressed by gzip.

    Raises:
        InputError: a file that is missing, damaged or of another format; so do all readers.
    """
    return _read(path, _idx, "an IDX file: 0, 0, type, number of dimensions, dimensions, that many numbers")


def read_cifar10(path: str | Path) -> tuple[Array, Array]:
    """A batch of CIFAR-10's binary version: images (n, 3, 32, 32) and labels (n,), both uint8.

    Args:
        path: of the file.
    """
    return _read(path, _cifar10, "a batch of CIFAR-10's binary version: images of 1 + 3072 bytes, labels 0..9")


def read_cifar10_archive(path: str | Path, batches: Sequence[str]) -> list[tuple[Array, Array]]:
    """Batches of `cifar-10-binary.tar.gz`, images and labels each; nothing is unpacked to disk.

    Args:
        path: of the archive.
        batches: names of the files in it, in the order wanted.
    """

    def parse(content: bytes) -> list[tuple[Array, Array]]:
        found = {}
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
            for member in archive:
                if (name := Path(member.name).name) in batches and (file := archive.extractfile(member)):
                    found[name] = _cifar10(file.read())
        return [found[name] for name in batches]

    return _read(path, parse, f"a compressed archive of {', '.join(batches)}")


def read_libsvm(path: str | Path, features: int | None = None) -> tuple[Array, Array]:
    """LIBSVM text, lines of `label index:value ...` with indices from 1 upward: x (n, features) and y (n,), dense.

    Args:
        path: of the file.
        features: how many; by default, the largest index.
    """

    def parse(content: bytes) -> tuple[Array, Array]:
        lines = [line.split("#")[0].split() for line in content.decode("ascii").splitlines()]
        rows = [_libsvm_row(number, words) for number, words in enumerate(lines, 1) if words]
        if not rows:
            raise ValueError("no data")
        width = max(max(row, default=0) for _, row in rows) if features is None else features
        if len(rows) * width > DENSE_LIMIT:
            raise ValueError(f"{len(rows)} x {width} numbers, too many for a dense table")
        x = np.zeros((len(rows), width))
        for i, (_, row) in enumerate(rows):
            if max(row, default=0) > width:
                raise ValueError(f"an index above {width}")
            x[i, np.fromiter(row, dtype=int) - 1] = list(row.values())
        return x, np.array([label for label, _ in rows])

    return _read(path, parse, "lines of `label index:value ...`, indices from 1 upward")


def read_mat(path: str | Path, name: str) -> Array:
    """A variable in a MATLAB file up to version 7.

    Args:
        path: of the file.
        name: of the variable.
    """

    def parse(content: bytes) -> Array:
        variables = scipy.io.loadmat(io.BytesIO(content))
        if name not in variables:
            raise ValueError(f"variables {', '.join(k for k in variables if not k.startswith('__'))}")
        return np.asarray(variables[name])

    return _read(path, parse, f"a MATLAB file up to version 7, with the variable {name}")


def read_npz(path: str | Path, names: Sequence[str]) -> list[Array]:
    """Arrays in a `.npz` file of NumPy.

    Args:
        path: of the file.
        names: of the arrays, in the order wanted.
    """

    def parse(content: bytes) -> list[Array]:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:  # anything else NumPy takes for an array or a pickle
            if damaged := archive.testzip():  # NumPy does not read to the end, where the checksum is
                raise ValueError(f"checksum of {damaged}")
        arrays = np.load(io.BytesIO(content), allow_pickle=False)
        return [arrays[name] for name in names]

    return _read(path, parse, f"a .npz file of NumPy, with {', '.join(names)}, of numbers")


def read_har(path: str | Path) -> tuple[Array, Array, Array]:
    """The inertial signals of UCI HAR, training and test part joined.

    Args:
        path: of the folder `UCI HAR Dataset` or of its zip archive.

    Returns:
        Signals (n, 128, 9) in float32, the channels in the order of `HAR_CHANNELS`; labels 0..5 (n,); subjects (n,).
    """
    path = Path(path)
    try:
        if path.is_dir():
            return _har(path)
        with zipfile.ZipFile(path) as archive:
            return _har(zipfile.Path(archive, "UCI HAR Dataset/"))
    except (OSError, ValueError, KeyError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        legal = "the folder `UCI HAR Dataset` or its zip archive, with train/Inertial Signals/*.txt and the like"
        raise InputError(str(path), _reason(error), legal) from None


def _read(path: str | Path, parse: Callable[[bytes], T], legal: str) -> T:
    """What `parse` makes of the contents of a file; whatever it raises becomes an `InputError`."""
    path = Path(path)
    if not path.is_file():
        raise InputError(str(path), "no such file", legal)
    try:
        return parse(path.read_bytes())
    except Exception as error:  # damaged files make the readers of SciPy, NumPy and tarfile fail in any way
        raise InputError(str(path), _reason(error), legal) from None


def _reason(error: Exception) -> str:
    return f"truncated, damaged or of another format ({type(error).__name__}: {error})"


def _idx(content: bytes) -> Array:
    if content[:2] == b"\x1f\x8b":
        content = gzip.decompress(content)
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in IDX_TYPES or content[3] == 0:
        raise ValueError(f"it begins with {content[:4].hex(' ')}")
    kind, start = np.dtype(IDX_TYPES[content[2]]), 4 + 4 * content[3]
    if len(content) < start:
        raise ValueError(f"{len(content)} bytes, within the dimensions")
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4)]
    size = start + kind.itemsize * int(np.prod(np.array(shape, dtype=object)))  # of Python: it does not overflow
    if len(content) != size:
        raise ValueError(f"{len(content)} bytes, where the dimensions {shape} need {size}")
    return np.frombuffer(content, kind, offset=start).reshape(shape).astype(kind.newbyteorder("="))


def _cifar10(content: bytes) -> tuple[Array, Array]:
    if len(content) == 0 or len(content) % CIFAR_RECORD:
        raise ValueError(f"{len(content)} bytes, no multiple of {CIFAR_RECORD}")
    records = np.frombuffer(content, np.uint8).reshape(-1, CIFAR_RECORD)
    if records[:, 0].max() > 9:
        raise ValueError(f"label {records[:, 0].max()}")
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]


def _libsvm_row(number: int, words: Sequence[str]) -> tuple[float, dict[int, float]]:
    """The label of a line and its values by index, which the format has in ascending order."""
    pairs = [word.split(":") for word in words[1:]]
    try:
        label, row = float(words[0]), {int(index): float(value) for index, value in pairs}
    except ValueError:
        raise ValueError(f"line {number}: {' '.join(words)[:60]}") from None
    indices = [0, *(int(index) for index, _ in pairs)]
    if indices != sorted(set(indices)):
        raise ValueError(f"line {number}: indices not from 1 upward")
    if not np.isfinite([label, *row.values()]).all():
        raise ValueError(f"line {number}: not finite")
    return label, row


def _har(root: Path | zipfile.Path) -> tuple[Array, Array, Array]:
    parts = [_har_part(root / part, part) for part in ("train", "test")]
    x, y, subject = (np.concatenate(arrays) for arrays in zip(*parts))
    return x, y, subject


def _har_part(folder: Path | zipfile.Path, part: str) -> tuple[Array, Array, Array]:
    signals = [_table(folder / "Inertial Signals" / f"{name}_{part}.txt", HAR_WINDOW) for name in HAR_CHANNELS]
    label, subject = (_table(folder / f"{name}_{part}.txt", 1)[:, 0].astype(int) for name in ("y", "subject"))
    if len({len(array) for array in (*signals, label, subject)}) != 1:
        raise ValueError(f"{part}: files of different lengths")
    if not np.isin(label, range(1, 7)).all():
        raise ValueError(f"{part}: labels other than 1..6")
    return np.stack(signals, axis=2), label - 1, subject


def _table(file: Path | zipfile.Path, width: int) -> Array:
    text = file.read_text(encoding="ascii")
    if not text.strip():
        raise ValueError(f"{file.name} is empty")
    try:
        table = np.loadtxt(io.StringIO(text), dtype=np.float32, ndmin=2)
    except ValueError as error:
        raise ValueError(f"{file.name}: {error}") from None
    if table.shape[1] != width:
        raise ValueError(f"{file.name} has lines of {table.shape[1]} numbers, not {width}")
    return table
