"""Tensors and a text in one file that is checked when it is read, and written whole or not at all.

The format is safetensors: a length, a header in JSON, numbers. Nothing is ever unpickled. The header's metadata hold
the text, one checksum of it and of the tensors' names, types and shapes, and one of all numbers. A file is written
beside the old one, synced and renamed over it: at every instant one complete file exists, and what a killed writer left
beside it is removed by the next.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from pdeopt.core.errors import InputError, SolveFailure

#: What a file that is half written ends in.
PART = ".part"

#: Bytes of a header at most, as in the library of safetensors.
LARGEST_HEADER = 100_000_000

#: Types of numbers by the names that safetensors gives them.
TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {kind: name for name, kind in TYPES.items()}

#: What a header may end in that is none of this format.
BROKEN = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, MemoryError)

#: What the text of a file says in any case.
FORMAT = "pdeopt checkpoint 3"


def write_tensors(path: str, tensors: Mapping[str, Tensor], text: Mapping[str, Any]) -> None:
    """Write tensors and a text of JSON values, atomically.

    Args:
        path: of the file, which is replaced.
        tensors: of any shapes, by name.
        text: with an entry "fingerprint", what must be equal where the file is read.

    Raises:
        OSError: the file cannot be written; the old one is as it was.
        SolveFailure: numbers that are not finite, but of names that begin with "history."; the old one is as it was.
    """
    for name, value in tensors.items():
        if not _may_be_written(name, value):
            raise SolveFailure(f"checkpoint: {name} is not finite", "the last one is kept")
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    words = json.dumps({"format": FORMAT, **text})
    table = {name: (NAMES[tensor.dtype], list(tensor.shape)) for name, tensor in plain.items()}
    sums = {"header": words, "sha256": _of_header(words, table), "sha256.data": _of_numbers(plain)}
    replace_file(path, save(plain, metadata=sums))


def read_tensors(
    path: str, fingerprint: Mapping[str, Any], what: str = "-restart", legal: str = "a file written by -checkpoint"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_tensors` wrote. Nothing is allocated, and no numbers are read, before the header is known to be true.

    Args:
        path: of the file; a pipe or a device is refused, not waited for.
        fingerprint: as it was written.
        what: the option or argument that named the file, for messages.
        legal: what may be given, for messages.

    Returns:
        Tensors and text. All numbers are finite, but those of the names that begin with "history.".

    Raises:
        InputError: no such file, a damaged file, or one with another fingerprint.
    """
    with _refused(path, what, legal), _regular_file(path) as file:
        header, words = _checked_header(file)
        text = json.loads(words)
        _compare(f"{what} {path}", text["fingerprint"], fingerprint)
        file.seek(0)
        tensors = load(file.read())
        if header["__metadata__"]["sha256.data"] != _of_numbers(tensors):
            raise ValueError("checksum of the numbers")
    for name, tensor in tensors.items():
        if not _may_be_written(name, tensor):
            raise InputError(what, f"{path}, whose {name} is not finite", "finite numbers")
    return tensors, text


def _may_be_written(name: str, tensor: Tensor) -> bool:
    return name.startswith("history.") or bool(torch.isfinite(tensor).all())


def read_text(path: str, what: str = "-restart", legal: str = "a file written by -checkpoint") -> dict[str, Any]:
    """The text alone of a file of `write_tensors`, of any fingerprint.

    Args:
        path, what, legal: as for `read_tensors`.

    Raises:
        InputError: no such file, or a damaged one.
    """
    with _refused(path, what, legal), _regular_file(path) as file:
        text: dict[str, Any] = json.loads(_checked_header(file)[1])
        return text


def digest(*tensors: Tensor) -> str:
    """A fingerprint of data: equal for equal types, shapes and numbers.

    Args:
        *tensors: of any shapes.
    """
    return _of_numbers({str(place): tensor.detach().cpu() for place, tensor in enumerate(tensors)})[:16]


# -- reading -----------------------------------------------------------------------------------------------


@contextmanager
def _refused(path: str, what: str, legal: str) -> Iterator[None]:
    """Whatever a file breaks inside is an `InputError` that names it."""
    try:
        yield
    except InputError:
        raise
    except (OSError, SafetensorError, *BROKEN) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InputError(what, f"{path}, which is damaged or no checkpoint ({reason})", legal) from None


def _regular_file(path: str) -> BinaryIO:
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError("no regular file")
    return os.fdopen(handle, "rb")


def _checked_header(file: BinaryIO) -> tuple[dict[str, Any], str]:
    """The header and its text, whose sizes fit the file and whose checksum is right."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, LARGEST_HEADER):
        raise ValueError("length of the header")
    header = _parsed(file.read(length))
    end = 0
    for (begin, behind), name in sorted((entry["data_offsets"], name) for name, entry in _entries(header)):
        kind, shape = TYPES[header[name]["dtype"]], header[name]["shape"]
        if any(type(number) is not int or number < 0 for number in (*shape, begin, behind)) or begin != end:
            raise ValueError(f"place of {name}")
        if behind - begin != math.prod(shape) * kind.itemsize:
            raise ValueError(f"size of {name}")
        end = behind
    if 8 + length + end != size:
        raise ValueError("size of the file")
    metadata = header["__metadata__"]
    table = {name: (entry["dtype"], entry["shape"]) for name, entry in _entries(header)}
    if metadata["sha256"] != _of_header(metadata["header"], table):
        raise ValueError("checksum of the header")
    if json.loads(metadata["header"])["format"] != FORMAT:
        raise ValueError("format")
    return header, metadata["header"]


def _parsed(words: bytes) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(words)
    return found


def _entries(header: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    return ((name, entry) for name, entry in header.items() if name != "__metadata__")


def _of_header(words: str, table: Mapping[str, tuple[str, list[int]]]) -> str:
    """The checksum of the text and of the tensors' names, types and shapes."""
    return hashlib.sha256(json.dumps([words, sorted(table.items())]).encode()).hexdigest()


def _of_numbers(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        if tensor.numel():
            found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _compare(what: str, stored: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> None:
    """Raise `InputError` for the first difference; JSON has lists for tuples."""
    for name, legal in json.loads(json.dumps(fingerprint)).items():
        if (got := stored.get(name)) != legal:
            raise InputError(f"{what}: {name} of the checkpoint", got, f"{legal}, as this run has")


# -- writing -----------------------------------------------------------------------------------------------


def replace_file(path: str, content: bytes) -> None:
    """Put `content` at `path`; see `replacing`."""
    with replacing(path) as file:
        file.write(content)


@contextmanager
def replacing(path: str) -> Iterator[BinaryIO]:
    """A file to write to, which becomes that at `path` at the end: a reader sees the old one or the new one whole.

    Args:
        path: of the file; what killed writers of it left beside it is removed.

    Raises:
        OSError: it cannot be written; the old file is as it was, as after any error inside.
    """
    target = Path(path)
    _sweep(target)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=PART, dir=target.parent)
    try:
        with os.fdopen(handle, "w+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # as long as its writer lives: see `_sweep`
            yield file
            file.flush()
            os.fsync(file.fileno())
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(name, 0o666 & ~mask)  # mkstemp's files are private
            os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    directory = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _sweep(target: Path) -> None:
    """Remove what writers of this file left beside it that live no more: their locks ended with them."""
    with os.scandir(target.parent) as entries:
        left = [e.path for e in entries if e.name.startswith(f".{target.name}.") and e.name.endswith(PART)]
    for path in left:
        try:
            handle = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)
        except OSError:  # its writer is at work, or has just finished
            pass
        finally:
            os.close(handle)
