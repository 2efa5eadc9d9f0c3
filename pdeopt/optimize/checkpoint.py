"""Checkpoints: a point, a method's memory and the history, in one safetensors file with a checksum.

Written beside the old file, synced and renamed over it, so that at every instant one complete file
exists. Independent of the number of ranks. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from petsc4py import PETSc
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from pdeopt.control.problem import ControlProblem
from pdeopt.core.arrays import Array, assign, copy
from pdeopt.core.errors import InputError, on_root
from pdeopt.core.monitor import DescentRecord, History, Record

FORMAT = "pdeopt checkpoint 2"
FIELDS = ("state", "control", "parameters", "multiplier")


@dataclass(frozen=True)
class Checkpoint:
    """What a run goes on from.

    Attributes:
        x: the point [u | z | p], in the layout of the problem.
        lam: the multiplier.
        memory: numbers that the method keeps from one iteration to the next, by name.
        history: of all iterations so far.
    """

    x: PETSc.Vec
    lam: PETSc.Vec
    memory: dict[str, float]
    history: History


def write_checkpoint(path: str, problem: ControlProblem, fingerprint: dict[str, Any], checkpoint: Checkpoint) -> None:
    """Write a checkpoint atomically. Collective; an error of rank 0 is raised on all.

    Args:
        path: of the file, which is replaced.
        problem: whose layout the vectors have.
        fingerprint: what must be equal at a restart, as JSON values: the problem's parameters, the solver.
        checkpoint: what is written; the file does not depend on the number of ranks.

    Raises:
        OSError: the file cannot be written.
    """
    arrays = dict(zip(FIELDS, _gather(problem, checkpoint)))
    text = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "memory": checkpoint.memory,
        "history": checkpoint.history.as_rows(),
    }

    on_root(problem.grid.mpi, lambda: _store(path, arrays, text))


def read_checkpoint(path: str, problem: ControlProblem, fingerprint: dict[str, Any]) -> Checkpoint:
    """Read a checkpoint of the same problem. Collective.

    Args:
        path: of the file.
        problem: with the same numbers of unknowns, on any number of ranks.
        fingerprint: as it was written.

    Returns:
        The checkpoint, its vectors in the layout of `problem`.

    Raises:
        InputError: no such file, a damaged file, or one of another problem; on all ranks.
    """
    arrays, text = on_root(problem.grid.mpi, lambda: _load(path, fingerprint))
    x, lam = problem.create_primal(), problem.create_multiplier()
    parts = [_own_part(problem, arrays[name], size) for name, size in zip(FIELDS, _sizes(problem))]
    assign(x, *parts[:3])
    assign(lam, parts[3])
    return Checkpoint(x, lam, text["memory"], History([Record(**row) for row in text["history"]]))


def write_memory(path: str, fingerprint: dict[str, Any], memory: dict[str, Any], history: History) -> None:
    """Write what a `Minimizer` needs to go on, atomically. For unknowns that every rank has; one rank writes.

    Args:
        path: of the file, which is replaced.
        fingerprint: what must be equal at a restart, as JSON values.
        memory: `Minimizer.memory()`, tensors and numbers; more of both may be added.
        history: of all iterations so far.

    Raises:
        OSError: the file cannot be written.
    """
    arrays = {name: value.detach().contiguous().numpy() for name, value in memory.items() if isinstance(value, Tensor)}
    numbers = {name: value for name, value in memory.items() if name not in arrays}
    text = {"format": FORMAT, "fingerprint": fingerprint, "memory": numbers, "history": history.as_rows()}
    _store(path, arrays, text)


def read_memory(path: str, fingerprint: dict[str, Any]) -> tuple[dict[str, Any], History]:
    """What `write_memory` wrote, for `minimize(x, memory=..., history=...)`.

    Args:
        path: of the file.
        fingerprint: as it was written.

    Returns:
        Memory and history.

    Raises:
        InputError: no such file, a damaged file, or one of another problem.
    """
    arrays, text = _load(path, fingerprint)
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return tensors | text["memory"], History([DescentRecord(**row) for row in text["history"]])


def _store(path: str, arrays: dict[str, Array], text: dict[str, Any]) -> None:
    header = json.dumps(text)
    replace_file(path, save(arrays, metadata={"header": header, "sha256": _checksum(arrays, header)}))


def replace_file(path: str, content: bytes) -> None:
    """Put `content` at `path` so that a reader sees the old file or the new one, never a part."""
    target = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
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


def _sizes(problem: ControlProblem) -> tuple[int, int, int, int]:
    return problem.layout.state_size, problem.layout.control_size, problem.layout.param_size, problem.layout.state_size


def _gather(problem: ControlProblem, checkpoint: Checkpoint) -> list[Array]:
    """All fields, flat and whole, on rank 0; empty on the others."""
    entries = torch.cat([copy(checkpoint.x), copy(checkpoint.lam)]).split(_sizes(problem))
    gathered = (problem.grid.mpi.gather(part.numpy()) for part in entries)
    return [np.empty(0) if parts is None else np.concatenate(parts) for parts in gathered]


def _own_part(problem: ControlProblem, whole: Array, size: int) -> Tensor:
    start = int(problem.grid.mpi.exscan(size) or 0)
    total = int(problem.grid.mpi.allreduce(size))
    if whole.size != total:
        raise InputError("-restart", f"a field of {whole.size} numbers", f"{total} numbers, as this problem has")
    return torch.from_numpy(whole[start : start + size].copy())


def _checksum(arrays: dict[str, Array], header: str) -> str:
    digest = hashlib.sha256(header.encode())
    for name in sorted(arrays):
        digest.update(name.encode() + np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


def _load(path: str, fingerprint: dict[str, Any]) -> tuple[dict[str, Array], dict[str, Any]]:
    if not Path(path).is_file():
        raise InputError("-restart", f"{path}, which is no file", "a file written by -checkpoint")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = metadata["header"]
        if metadata["sha256"] != _checksum(arrays, header):
            raise ValueError("checksum")
        text = json.loads(header)
        if text["format"] != FORMAT:
            raise ValueError("format")
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise InputError(
            "-restart", f"{path}, which is damaged or no checkpoint ({error})", "a file written by -checkpoint"
        ) from None
    for name, legal in fingerprint.items():
        got = text["fingerprint"].get(name)
        if got != legal:
            raise InputError(f"-restart {path}: {name} of the checkpoint", got, f"{legal}, as this run has")
    return arrays, text
