"""What is expected of any file: that it may be damaged, and that a few bytes of it can stand for terabytes.

A reader has one `Allowance`, and compares every size with it before it allocates: those that a file states, and those
that turn up while it is unpacked.
"""

from __future__ import annotations

import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pdeopt.core.errors import InputError

T = TypeVar("T")

#: Megabytes that any file may expand to.
LIMIT_MB = 256.0

#: A larger file may expand to this many times its size: a bomb grows a thousandfold, images and text up to tenfold.
EXPANSION = 16

#: The ways of zip archives whose unpacking can be stopped: the others unpack a whole block, of any size, at once.
BOUNDED_ZIP = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def regular_file(path: str | Path) -> bool:
    """True for a file that can be read: no folder, no pipe that never ends, no name that is none."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):  # a name that is too long for the system
        return False


def refusing(path: str | Path, legal: str, read: Callable[[], T]) -> T:
    """What `read` returns; whatever it raises becomes an `InputError`, of one line.

    Args:
        path: of the file or folder that is read, for the error.
        legal: what it should be.
        read: the reader.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the readers of NumPy and SciPy take for only half wrong
            return read()
    except InputError:
        raise
    except Exception as error:  # a damaged file makes readers of other packages fail in any way
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise InputError(str(path), f"truncated, damaged or of another format ({reason})", legal) from None


class Allowance:
    """The bytes that a file may expand to: `limit_mb`, or `EXPANSION` times its size if that is more.

    Args:
        path: of the file.
        limit_mb: megabytes that it may expand to in any case.
    """

    def __init__(self, path: str | Path, limit_mb: float) -> None:
        size = Path(path).stat().st_size if regular_file(path) else 0
        self.path, self.bytes = path, max(1e6 * limit_mb, EXPANSION * size)

    def check(self, size: int) -> None:
        """Refuse to expand to so many bytes.

        Raises:
            InputError: more than are allowed.
        """
        if size > self.bytes:
            legal = f"at most {self.bytes / 1e6:.0f} MB for this file; -data_limit, or limit_mb, raises that"
            raise InputError(str(self.path), f"contents of {_megabytes(size)}", legal)

    def check_zip(self, archive: zipfile.ZipFile) -> None:
        """Refuse an archive that is larger, all files together, or that is packed in ways that are not bounded."""
        self.check(sum(member.file_size for member in archive.infolist()))
        if any(member.compress_type not in BOUNDED_ZIP for member in archive.infolist()):
            raise ValueError("packed in another way than deflate")

    def check_deflated(self, content: bytes) -> None:
        """Unpack a stream of zlib, keeping nothing, to see how large it is."""
        unpacker, count = zlib.decompressobj(), 0
        while content and not unpacker.eof:
            count += len(unpacker.decompress(content, 1 << 20))
            content = unpacker.unconsumed_tail
            self.check(count)


class BoundedStream:
    """A stream that is unpacked as it is read, up to what is allowed.

    Args:
        stream: with `read(size)`.
        allowance: of its file.
    """

    def __init__(self, stream: Any, allowance: Allowance) -> None:
        self.stream, self.allowance, self.count = stream, allowance, 0

    def read(self, size: int) -> bytes:
        """At most `size` bytes; refuses, before it reads, to go beyond what is allowed."""
        self.allowance.check(self.count + size)
        content: bytes = self.stream.read(size)
        self.count += len(content)
        return content


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.0f} MB" if size < 1e15 else "more than a million GB"
