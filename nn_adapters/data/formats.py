"""Readers of the file formats in which data sets come: IDX, CIFAR-10 batches, LIBSVM text, MATLAB, NumPy, UCI HAR.

They read any file of the format, not only those of known data sets. Nothing is ever unpickled. A file that is damaged,
truncated or of another format, that has numbers which are not finite, or that would expand beyond a limit
(`data.limits`) raises `InputError`, which names it; sizes are compared before anything of that size is allocated.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import os
import tarfile
import zipfile
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import scipy.io
import scipy.sparse as sp

from nn_adapters.data.limits import LIMIT_MB, Allowance, BoundedStream, refusing, regular_file
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

#: The largest index of LIBSVM text.
LARGEST_INDEX = 2**63 - 1

#: Classes of the variables of a MATLAB file that are numbers.
MAT_NUMBERS = {"double", "single", "logical", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))}


def checksum(path: Path) -> str:
    """The SHA-256 checksum of a file, hexadecimal.

    Args:
        path: of the file.

    Raises:
        InputError: no file that can be read.
    """
    digest = hashlib.sha256()
    if not regular_file(path):
        raise InputError(str(path), "no file", "a file of data")
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def verify_checksum(path: Path, expected: str) -> str:
    """Check the SHA-256 checksum of a file.

    Args:
        path: of the file.
        expected: hexadecimal digits, or the first of them.

    Returns:
        All digits.

    Raises:
        InputError: another checksum, or no file that can be read.
    """
    if not (found := checksum(path)).startswith(expected):
        raise InputError(f"{path}: damaged or another file; sha256", found, expected)
    return found


def read_idx(path: str | Path, limit_mb: float = LIMIT_MB) -> Array:
    """An IDX file, as of MNIST: an array of any shape, in native byte order.

    Args:
        path: of the file, which may be compressed by gzip.
        limit_mb: megabytes that it may expand to, here and in all readers; a large file to 16 times its size.

    Raises:
        InputError: a file that is missing, damaged, of another format or too large; so do all readers.
    """
    return _read(path, _idx, "an IDX file: 0, 0, type, number of dimensions, dimensions, that many numbers", limit_mb)


def read_cifar10(path: str | Path) -> tuple[Array, Array]:
    """A batch of CIFAR-10's binary version: images (n, 3, 32, 32) and labels (n,), both uint8.

    Args:
        path: of the file.
    """
    legal = "a batch of CIFAR-10's binary version: images of 1 + 3072 bytes, labels 0..9"
    return _read(path, lambda content, _: _cifar10(content), legal)


def read_cifar10_archive(
    path: str | Path, batches: Sequence[str], limit_mb: float = LIMIT_MB
) -> list[tuple[Array, Array]]:
    """Batches of `cifar-10-binary.tar.gz`, images and labels each; nothing is unpacked to disk.

    Args:
        path: of the archive.
        batches: names of the files in it, in the order wanted.
        limit_mb: see `read_idx`.
    """

    def parse(content: bytes, allowed: Allowance) -> list[tuple[Array, Array]]:
        found = {}
        stream = BoundedStream(gzip.GzipFile(fileobj=io.BytesIO(content)), allowed)
        with tarfile.open(fileobj=stream, mode="r|") as archive:  # type: ignore[call-overload]
            for member in archive:
                wanted = Path(member.name).name in batches and member.isreg() and not member.issparse()
                if wanted and (file := archive.extractfile(member)):
                    allowed.check(member.size)
                    found[Path(member.name).name] = _cifar10(file.read())
        while stream.read(1 << 16):  # to the end, where the checksum is
            pass
        return [found[name] for name in batches]

    return _read(path, parse, f"a compressed archive of {', '.join(batches)}", limit_mb)


def read_libsvm(path: str | Path, features: int | None = None) -> tuple[sp.csr_matrix, Array]:
    """LIBSVM text, lines of `label index:value ...` with ascending indices from 1: sparse x (n, features) and y (n,).

    It takes no more memory than a few times the file, whatever the indices; `x.toarray()` is the dense table.

    Args:
        path: of the file.
        features: how many; by default, the largest index.
    """
    legal = "lines of `label index:value ...`, indices from 1 upward"
    return _read(path, lambda content, _: _libsvm(content, features), legal)


def read_mat(path: str | Path, name: str, limit_mb: float = LIMIT_MB) -> Array:
    """A variable of numbers in a MATLAB file up to version 7.

    Args:
        path: of the file.
        name: of the variable.
        limit_mb: see `read_idx`.
    """

    def parse(content: bytes, allowed: Allowance) -> Array:
        _check_mat(content, allowed)
        variables = {each: (shape, kind) for each, shape, kind in scipy.io.whosmat(io.BytesIO(content))}
        if name not in variables:
            raise ValueError(f"variables {', '.join(variables)}")
        shape, kind = variables[name]
        if kind not in MAT_NUMBERS:
            raise ValueError(f"{name} is a {kind}")
        allowed.check(8 * math.prod(shape))
        return _numbers(name, scipy.io.loadmat(io.BytesIO(content), variable_names=[name])[name])

    return _read(path, parse, f"a MATLAB file up to version 7, with the variable {name}", limit_mb)


def read_npz(path: str | Path, names: Sequence[str], limit_mb: float = LIMIT_MB) -> list[Array]:
    """Arrays of numbers in a `.npz` file of NumPy.

    Args:
        path: of the file.
        names: of the arrays, in the order wanted.
        limit_mb: see `read_idx`.
    """

    def parse(content: bytes, allowed: Allowance) -> list[Array]:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:  # anything else NumPy takes for an array or a pickle
            allowed.check_zip(archive)
            if damaged := archive.testzip():  # NumPy does not read to the end, where the checksum is
                raise ValueError(f"checksum of {damaged}")
            return [_npy(name, archive.read(f"{name}.npy")) for name in names]

    return _read(path, parse, f"a .npz file of NumPy, with {', '.join(names)}, of numbers", limit_mb)


def read_har(path: str | Path, limit_mb: float = LIMIT_MB) -> tuple[Array, Array, Array]:
    """The inertial signals of UCI HAR, training and test part joined.

    Args:
        path: of the folder `UCI HAR Dataset` or of its zip archive.
        limit_mb: see `read_idx`.

    Returns:
        Signals (n, 128, 9) in float32, the channels in the order of `HAR_CHANNELS`; labels 0..5 (n,); subjects (n,).
    """
    legal = "the folder `UCI HAR Dataset` or its zip archive, with train/Inertial Signals/*.txt and the like"

    def parse(content: bytes, allowed: Allowance) -> tuple[Array, Array, Array]:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            allowed.check_zip(archive)
            return _har(zipfile.Path(archive, "UCI HAR Dataset/"))

    if os.path.isdir(path):
        return refusing(path, legal, lambda: _har(Path(path)))
    return _read(path, parse, legal, limit_mb)


def _read(path: str | Path, parse: Callable[[bytes, Allowance], T], legal: str, limit_mb: float = LIMIT_MB) -> T:
    """What `parse` makes of the contents of a file and of what it may expand to."""
    if not regular_file(path):
        raise InputError(str(path), "no such file", legal)
    return refusing(path, legal, lambda: parse(Path(path).read_bytes(), Allowance(path, limit_mb)))


def _numbers(name: str, array: Array) -> Array:
    """The array, if it holds finite numbers."""
    array = np.asarray(array)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} of type {array.dtype}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"{name} has numbers that are not finite")
    return array


# -- the formats -------------------------------------------------------------------------------------------


def _idx(content: bytes, allowed: Allowance) -> Array:
    plain = io.BytesIO(content)
    stream = BoundedStream(gzip.GzipFile(fileobj=plain) if content[:2] == b"\x1f\x8b" else plain, allowed)
    begin = stream.read(4)
    if len(begin) < 4 or begin[:2] != b"\0\0" or begin[2] not in IDX_TYPES or begin[3] == 0:
        raise ValueError(f"it begins with {begin.hex(' ')}")
    kind, dimensions = np.dtype(IDX_TYPES[begin[2]]), stream.read(4 * begin[3])
    if len(dimensions) < 4 * begin[3]:
        raise ValueError("it ends within the dimensions")
    shape = [int.from_bytes(dimensions[i : i + 4], "big") for i in range(0, len(dimensions), 4)]
    size = kind.itemsize * math.prod(shape)
    numbers = stream.read(size + 1)  # one more: to the end, where the checksum is
    if len(numbers) != size:
        found = f"more than {size}" if len(numbers) > size else str(len(numbers))
        raise ValueError(f"{found} bytes of numbers, where the dimensions {shape} need {size}")
    return _numbers("the file", np.frombuffer(numbers, kind).reshape(shape).astype(kind.newbyteorder("=")))


def _cifar10(content: bytes) -> tuple[Array, Array]:
    if len(content) == 0 or len(content) % CIFAR_RECORD:
        raise ValueError(f"{len(content)} bytes, no multiple of {CIFAR_RECORD}")
    records = np.frombuffer(content, np.uint8).reshape(-1, CIFAR_RECORD)
    if records[:, 0].max() > 9:
        raise ValueError(f"label {records[:, 0].max()}")
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]


def _libsvm(content: bytes, features: int | None) -> tuple[sp.csr_matrix, Array]:
    labels, ends, columns, values = array("d"), array("q", [0]), array("q"), array("d")
    for number, line in enumerate(content.decode("ascii").splitlines(), 1):
        if words := line.split("#")[0].split():
            label, row = _libsvm_row(number, words)
            labels.append(label)
            columns.extend(row)
            values.extend(row.values())
            ends.append(len(columns))
    if not columns:
        raise ValueError("labels without values" if labels else "no data")
    indices = np.frombuffer(columns, np.int64) - 1
    largest = int(indices.max()) + 1
    if features is not None and largest > features:
        raise ValueError(f"an index above {features}")
    shape = (len(labels), largest if features is None else features)
    return sp.csr_matrix((np.array(values), indices, np.array(ends)), shape), np.array(labels)


def _libsvm_row(number: int, words: Sequence[str]) -> tuple[float, dict[int, float]]:
    """The label of a line and its values by index, which the format has in ascending order."""
    pairs = [word.split(":") for word in words[1:]]
    shown = ascii(" ".join(words)[:60])
    try:
        label, row = float(words[0]), {int(index): float(value) for index, value in pairs}
    except ValueError:
        raise ValueError(f"line {number}: {shown}") from None
    if any("_" in word for word in words):  # Python's numbers may have them
        raise ValueError(f"line {number}: {shown}")
    indices = [0, *(int(index) for index, _ in pairs)]
    if indices != sorted(set(indices)) or indices[-1] > LARGEST_INDEX:
        raise ValueError(f"line {number}: indices not from 1 upward, to {LARGEST_INDEX}")
    if not all(map(math.isfinite, (label, *row.values()))):
        raise ValueError(f"line {number}: not finite")
    return label, row


def _check_mat(content: bytes, allowed: Allowance) -> None:
    """Refuse compressed variables of a file of version 5 to 7 that are too large: SciPy unpacks them at once."""
    order = {b"IM": "little", b"MI": "big"}.get(content[126:128])
    place = 128
    while order and place + 8 <= len(content):
        kind, size = (int.from_bytes(content[place + i : place + i + 4], order) for i in (0, 4))  # type: ignore[arg-type]
        if kind == 15:  # miCOMPRESSED
            allowed.check_deflated(content[place + 8 : place + 8 + size])
        place += 8 + size


def _npy(name: str, content: bytes) -> Array:
    """An array from the contents of a .npy file, whose header is compared with them first."""
    stream = io.BytesIO(content)
    headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, _, kind = headers[np.lib.format.read_magic(stream)](stream)
    if kind.hasobject:
        raise ValueError(f"{name} of objects; nothing is read that would need allow_pickle")
    if kind.itemsize * math.prod(shape) != len(content) - stream.tell():
        raise ValueError(f"{name} of {len(content) - stream.tell()} bytes, where its header says {shape} of {kind}")
    return _numbers(name, np.load(io.BytesIO(content), allow_pickle=False))


def _har(root: Path | zipfile.Path) -> tuple[Array, Array, Array]:
    parts = [_har_part(root / part, part) for part in ("train", "test")]
    x, y, subject = (np.concatenate(arrays) for arrays in zip(*parts))
    return x, y, subject


def _har_part(folder: Path | zipfile.Path, part: str) -> tuple[Array, Array, Array]:
    signals = [_table(folder / "Inertial Signals" / f"{name}_{part}.txt", HAR_WINDOW) for name in HAR_CHANNELS]
    label, subject = (_table(folder / f"{name}_{part}.txt", 1)[:, 0] for name in ("y", "subject"))
    if len({len(array) for array in (*signals, label, subject)}) != 1:
        raise ValueError(f"{part}: files of different lengths")
    if not np.isin(label, range(1, 7)).all():
        raise ValueError(f"{part}: labels other than 1..6")
    return np.stack(signals, axis=2), label.astype(int) - 1, subject.astype(int)


def _table(file: Path | zipfile.Path, width: int) -> Array:
    if not file.is_file():  # a pipe would never end
        raise ValueError(f"no file {file.name}")
    text = file.read_text(encoding="ascii")
    if not text.strip():
        raise ValueError(f"{file.name} is empty")
    try:
        table = np.loadtxt(io.StringIO(text), dtype=np.float32, ndmin=2)
    except ValueError as error:
        raise ValueError(f"{file.name}: {error}") from None
    if table.shape[1] != width:
        raise ValueError(f"{file.name} has lines of {table.shape[1]} numbers, not {width}")
    return _numbers(file.name, table)
