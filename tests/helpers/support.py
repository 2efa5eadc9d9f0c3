"""Tools of the tests: processes, MPI, and numbers of PETSc objects."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from petsc4py import PETSc

from pdeopt.control.problem import ControlProblem
from tests.helpers.quickstart import quick_python

ROOT = Path(__file__).resolve().parents[2]

# One thread a rank. Open MPI refuses root and more ranks than cores, pins all runs to the same core, and its
# waiting ranks take the cores from those that work.
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


def python(*words: object, ranks: int = 1, timeout: float = 600.0) -> subprocess.CompletedProcess[str]:
    """`python words...` in the project's root, under mpiexec for more than one rank; words begin with -m or -c."""
    start = command(*words, ranks=ranks, start=quick_python())
    return subprocess.run(start, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout)


def gloo(ranks: int, *words: object) -> None:
    """`python -m words...` on several processes as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    processes = [
        subprocess.Popen(
            [*quick_python(), "-m", *map(str, words)],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
            env=environment() | place | {"RANK": str(rank)},
        )
        for rank in range(ranks)
    ]
    errors = [process.communicate(timeout=600)[1] for process in processes]
    assert all(process.returncode == 0 for process in processes), errors


def environment() -> dict[str, str]:
    """That of a process under MPI, without what an MPI that runs here has left: mpiexec would take it for its own."""
    left = ("PMIX_", "ORTE_", "OMPI_", "PRTE_", "PYTHONDONTWRITEBYTECODE")  # the last: modules are compiled once
    return {name: value for name, value in os.environ.items() if not name.startswith(left)} | ENVIRONMENT


def command(*words: object, ranks: int = 1, start: Sequence[str] = (sys.executable,)) -> list[str]:
    """The words of a process; mpiexec is the one beside this Python, or else the first on the path."""
    start = [*start, *map(str, words)]
    if ranks == 1:
        return start
    folders = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return [shutil.which("mpiexec", path=folders) or "mpiexec", "-n", str(ranks), *start]


def entries(vec: PETSc.Vec) -> torch.Tensor:
    """A copy of the local entries."""
    return torch.from_numpy(vec.getArray(readonly=True).copy())


def vector(template: PETSc.Vec, values: torch.Tensor) -> PETSc.Vec:
    """A vector like `template` with these local entries."""
    vec = template.duplicate()
    vec.setArray(values.detach().numpy())
    return vec


def dense(matrix: PETSc.Mat) -> torch.Tensor:
    """All entries of a matrix, by products with unit vectors: it may be a shell."""
    x, y = matrix.createVecs()
    columns = []
    for k in range(matrix.getSize()[1]):
        x.set(0.0)
        x.setValue(k, 1.0)
        x.assemble()
        matrix.mult(x, y)
        columns.append(entries(y))
    return torch.stack(columns, dim=1)


def random_design(problem: ControlProblem, seed: int, size: float = 1.0) -> PETSc.Vec:
    """A random design; the same numbers on any number of ranks only where there is one."""
    generator = torch.Generator().manual_seed(seed)
    z = problem.create_design()
    return vector(z, size * torch.randn(z.getLocalSize(), generator=generator, dtype=torch.float64))


def relative(found: object, expected: object) -> float:
    """The largest difference relative to the largest expected entry."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max(initial=0.0) / max(np.abs(expected).max(initial=0.0), 1e-300))
