"""Measurements in processes of their own, on one thread each, and the rows of the tables that they fill."""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

# Open MPI refuses root and more ranks than cores, pins all runs to the same core, and its waiting ranks take the
# cores from those that work.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "OMPI_MCA_hwloc_base_binding_policy": "none",
    "OMPI_MCA_btl_vader_single_copy_mechanism": "none",
}


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    case: str
    measured: float | None
    unit: str
    bar: str = ""
    met: bool | None = None


def run(module: str, *words: object, ranks: int = 1) -> Any:
    """What `python -m module words...` prints in its last line, as JSON; under mpiexec for more than one rank."""
    return json.loads(execute(module, *words, ranks=ranks).splitlines()[-1])


def execute(module: str, *words: object, ranks: int = 1) -> str:
    """What `python -m module words...` prints; under mpiexec for more than one rank."""
    command = [sys.executable, "-m", module, *map(str, words)]
    if ranks > 1:
        folders = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        command = [shutil.which("mpiexec", path=folders) or "mpiexec", "-n", str(ranks), *command]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | ENVIRONMENT, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout


def bar(case: str, measured: float, unit: str, limit: float | None, at_most: bool = True) -> Row:
    """A row that is judged, where there is a limit."""
    if limit is None:
        return plain(case, measured, unit)
    met = measured <= limit if at_most else measured >= limit
    return show(Row(case, measured, unit, f"{'<=' if at_most else '>='} {limit:g}", met))


def plain(case: str, measured: float, unit: str) -> Row:
    """A row that is not judged."""
    return show(Row(case, measured, unit))


def show(row: Row) -> Row:
    """Print a row as soon as it is known."""
    verdict = "" if row.met is None else ("met" if row.met else "MISSED")
    measured = "-" if row.measured is None else f"{row.measured:.4g}"
    print(f"{row.case:100s} {measured:>10s} {row.unit:15s} {row.bar:8s} {verdict}", flush=True)
    return row


def table(title: str, columns: Sequence[str], lines: Mapping[str, Sequence[object]]) -> None:
    """Print lines of a table, as they go into a page of the documentation."""
    print(f"\n| {title} | {' | '.join(columns)} |\n|---{'|---' * len(columns)}|")
    for name, entries in lines.items():
        print(f"| {name} | {' | '.join('-' if entry is None else f'{entry:.4g}' for entry in entries)} |", flush=True)


def write(file: str, rows: list[Row]) -> None:
    """The rows as JSON, if there is a file's name."""
    if file:
        Path(file).write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


def measure(cases: Mapping[str, Callable[[T], list[Row]]], names: Sequence[str], benchmark: T, file: str) -> list[Row]:
    """The rows of these cases, written to the file as they come; a process that fails fails its case alone."""
    rows: list[Row] = []
    for name in names:
        try:
            rows += cases[name](benchmark)
        except RuntimeError as failure:
            print(failure, file=sys.stderr)
            rows.append(show(Row(f"{name}: failed", None, "", met=False)))
        write(file, rows)
    return rows


def peak_mb() -> float:
    """The largest memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def memory_mb() -> float:
    """The memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**20


def median_seconds(
    function: Callable[[], Any], repeat: int = 5, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Median of the seconds that a call takes, by the wall's clock or that of the processor."""
    seconds = []
    for _ in range(repeat):
        begin = clock()
        function()
        seconds.append(clock() - begin)
    return statistics.median(seconds)


@contextmanager
def counted(cls: type, name: str) -> Iterator[list[int]]:
    """Counts the calls of a method inside the block."""
    method, count = getattr(cls, name), [0]

    def call(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        return method(*args, **kwargs)

    setattr(cls, name, call)
    try:
        yield count
    finally:
        setattr(cls, name, method)
