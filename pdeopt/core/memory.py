"""Memory that is free, and sizes that cannot fit into it, refused before anything is allocated."""

from __future__ import annotations

import ctypes
import os
import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from pdeopt.core.errors import InputError

UNITS = ("B", "kB", "MB", "GB", "TB", "PB", "EB")

#: What is not worth asking the system for, which takes as long as stating a small problem: less than Python itself has.
ALWAYS_FREE = 1 << 26

#: Bytes of a number in double precision.
DOUBLE = 8


def require_memory(needed: float, what: str, got: object, legal: str = "a smaller size") -> None:
    """Refuse a size that this process cannot have room for.

    Args:
        needed: bytes, an estimate from below: what may fit is tried.
        what, got, legal: as for `InputError`.

    Raises:
        InputError: more is needed than is free; the message says both.

    Example:
        >>> require_memory(8 * points, "-points", points)
    """
    if needed > ALWAYS_FREE and needed > (free := free_memory()):
        raise InputError(what, f"{got}, which needs about {in_words(needed)}, {in_words(free)} are free", legal)


def free_memory() -> float:
    """Bytes that this process may still allocate: of the machine, of its control groups, and of its own limits."""
    return max(min(_of_machine(), *_of_groups(), _of_limits()), 0.0)


def used_memory() -> tuple[float, float]:
    """Bytes of this process now, and at most since it started or `forget_peak` was called.

    Where the system does not tell, as outside of Linux, both are the largest so far.
    """
    found = {line.split(":")[0]: line.split()[1] for line in _lines("/proc/self/status") if line.startswith("Vm")}
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    now, most = (1024 * float(found.get(name, largest)) for name in ("VmRSS", "VmHWM"))
    return now, most


def forget_peak() -> None:
    """Let the largest memory of this process be the present one, where the system can.

    The allocator gives back what it keeps of arrays that are freed, as those of a file that was read.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def in_words(size: float) -> str:
    """Bytes with two digits and a unit, 7.5 TB."""
    for unit in UNITS:
        if size < 999.5 or unit == UNITS[-1]:
            break
        size /= 1000
    return f"{size:.2g} {unit}" if size < 99.5 else f"{size:.0f} {unit}" if size < 999.5 else f"{size:.1e} {unit}"


def _of_machine() -> float:
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return float(line.split()[1]) * 1024
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def _of_groups() -> Iterator[float]:
    """What the control groups of Linux, of version 2 or 1, and all those above them, leave."""
    for line in _lines("/proc/self/cgroup"):
        number, controllers, path = line.split(":", 2)
        if number == "0":
            root, limit, used = Path("/sys/fs/cgroup"), "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, limit, used = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        own = root / path.lstrip("/")
        for group in (own, *own.parents):
            if group.is_relative_to(root):
                yield _number(group / limit) - _number(group / used, 0.0) + _cached(group / "memory.stat")


def _of_limits() -> float:
    """What `ulimit -v` leaves."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return float("inf")
    pages = next(_lines("/proc/self/statm"), "0").split()[0]
    return float(limit - int(pages) * os.sysconf("SC_PAGE_SIZE"))


def _cached(stat: Path) -> float:
    """Of the memory that a group uses, the part that copies of files take, which gives way."""
    return sum(float(line.split()[1]) for line in _lines(stat) if line.startswith("inactive_file "))


def _number(file: Path, without: float = float("inf")) -> float:
    word = next(_lines(file), "")
    return float(word) if word.isdigit() else without


def _lines(file: str | Path) -> Iterator[str]:
    """The lines of a file of the kernel's; none where there is no such file."""
    try:
        yield from Path(file).read_text().splitlines()
    except OSError:
        return
