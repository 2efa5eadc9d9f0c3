"""The files of problem scripts: options that name them, checks before a run, and the writing.

Nothing is written before all names are known to fit, and each file is written whole or not at all.
"""

from __future__ import annotations

import io
import json
import math
import os
import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy
import torch
from mpi4py import MPI
from petsc4py import PETSc

import nn_adapters as nna
import pdeopt as po
from nn_adapters.data.datasets import refuse_place
from nn_adapters.data.limits import LIMIT_MB
from pdeopt.core import on_root, read_text, replace_file, replacing
from pdeopt.optimize import CheckpointFile
from problems.shared.command_line import EndSettings
from problems.shared.fields import BLOCK, Fields

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Endings of the files that an option takes, and the package that some of them need.
ENDINGS = {
    "summary": {".json": ""},
    "plot": dict.fromkeys((".png", ".pdf", ".svg"), "matplotlib"),
    "output": {".npz": "", ".mat": "", ".h5": "h5py"},
    "series": {".pvd": ""},
}


@dataclass(frozen=True)
class ReportFiles(po.Settings, includes=(EndSettings,)):
    """Files that report on a run."""

    summary: str = po.setting("", "write a summary to this .json file")
    plot: str = po.setting("", "write a picture to this .png, .pdf or .svg file")


@dataclass(frozen=True)
class SolutionFile(po.Settings):
    """The file of the solution."""

    output: str = po.setting("", "write the solution to this .npz, .mat or .h5 file")


@dataclass(frozen=True)
class SeriesFiles(po.Settings):
    """The files of the solution for ParaView."""

    series: str = po.setting("", "write the solution as a series of files for ParaView, this .pvd and a folder")


@dataclass(frozen=True)
class CheckpointFiles(po.Settings):
    """Files of an interrupted run."""

    checkpoint: str = po.setting("", "write checkpoints to this file")
    checkpoint_every: int = po.setting(1, "iterations from checkpoint to checkpoint", at_least=1)
    restart: str = po.setting("", "go on from this checkpoint")

    def of_run(self, comm: Any, unit: str = "iteration") -> RunFiles:
        """The checkpoints of one run on the ranks of a communicator; what is counted is called `unit`."""
        return RunFiles(self.checkpoint, self.checkpoint_every, comm, unit)


class RunFiles(CheckpointFile):
    """The checkpoints of a script's run."""

    def tell_if_finished(self, name: str, before: po.History, result: po.Result) -> None:
        """Say so where the run that a checkpoint is of had nothing left to do."""
        if result.iterations == before[-1].iteration and not self.signal:
            tell_finished(name)


def tell_finished(name: str) -> None:
    """Say that the run that a checkpoint is of had nothing left to do. Collective."""
    PETSc.Sys.Print(f"{name}: the run of -restart was finished: nothing was left to do")


@dataclass(frozen=True)
class DataFiles(po.Settings):
    """Where data sets come from."""

    data_dir: str = po.setting("", "folder of data sets")
    fetch: bool = po.setting(False, "download the data set where it is missing")
    data_limit: float = po.setting(
        LIMIT_MB, "megabytes that a data file may expand to; a large one may to 16 times its size", above=0
    )

    def load(self, name: str, seed: int = 0) -> nna.Dataset:
        """The data set of this name; see `nna.load_dataset`."""
        return nna.load_dataset(name, self.data_dir, self.fetch, seed, self.data_limit)

    def generated(self, data: nna.Dataset) -> nna.Dataset:
        """Data that have no files, so that no place for them is passed over in silence."""
        refuse_place(data.name, self.data_dir, self.fetch)
        return data


def choose(data: str, files: DataFiles, stored: str, free: str) -> str:
    """The data set that `-data auto` stands for: the stored one where there is a place for files, else the free one."""
    if data != "auto":
        return data
    return stored if files.data_dir or files.fetch else free


# -- checks ------------------------------------------------------------------------------------------------


def check_targets(mpi: Any, *settings: po.Settings) -> None:
    """Raise `InputError` for a file of these settings that cannot be written, or restarted from. Collective."""

    def check() -> None:
        for option in ("summary", "plot", "output", "series", "checkpoint"):
            for path in filter(None, (getattr(each, option, "") for each in settings)):
                _check_ending(option, path)
                _check_folder(option, path)
        for path in filter(None, (getattr(each, "restart", "") for each in settings)):
            read_text(path)

    on_root(mpi, check)


def _check_ending(option: str, path: str) -> None:
    endings = ENDINGS.get(option)
    ending = Path(path).suffix
    if endings is None:
        return
    if ending not in endings:
        raise po.InputError(f"-{option}", path, "a name that ends in " + " | ".join(endings))
    if package := endings[ending]:
        try:
            import_module(package)  # now, as h5py does not load after DOLFINx
        except ImportError:
            raise po.InputError(f"-{option} {path}", f"no package {package}", f"pip install {package}") from None


def _check_folder(option: str, path: str) -> None:
    """Try to make a file beside the target: permissions, full disks and read-only mounts all show."""
    if Path(path).is_dir():
        raise po.InputError(f"-{option}", f"{path}, a folder", "the name of a file")
    try:
        with tempfile.TemporaryFile(dir=Path(path).parent):
            pass
    except OSError as error:
        got = f"{path} ({error.strerror})"
        raise po.InputError(f"-{option}", got, "a file in a folder that can be written to") from None


# -- writing -----------------------------------------------------------------------------------------------


def write_report(mpi: Any, files: ReportFiles, summary: Mapping[str, Any], picture: Callable[[], Figure]) -> None:
    """Write the summary and the picture that the options ask for. Collective.

    Args:
        mpi: communicator or team of all ranks; its first rank writes.
        files: the names.
        summary: of values that JSON has; NaN and infinity become null.
        picture: called on the first rank, and only where a picture is asked for.
    """

    def write() -> None:
        if files.plot:
            buffer = io.BytesIO()
            picture().savefig(buffer, format=Path(files.plot).suffix[1:], dpi=120)
            replace_file(files.plot, buffer.getvalue())
        if files.summary:
            replace_file(files.summary, (json.dumps(_json(summary), indent=2) + "\n").encode())

    on_root(mpi, write)


def write_arrays(path: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays by name to a .npz or .mat file; of one rank."""
    buffer, ending = io.BytesIO(), Path(path).suffix
    if ending == ".npz":
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    else:
        from scipy.io import savemat

        savemat(buffer, dict(arrays))
    replace_file(path, buffer.getvalue())


def write_blocks(path: str, problem: po.ControlProblem, fields: Fields) -> None:
    """Write fields by name to a .h5 file, a block of steps after the other: no rank has all of a field. Collective.

    The first rank writes: h5py of PyPI and of Debian has no MPI.
    """
    mpi, opened, file = problem.grid.mpi, ExitStack(), list[Any]()
    with opened:
        on_root(mpi, lambda: file.append(_opened_h5(path, opened)))
        for name, field in fields.items():
            for block in [field] if isinstance(field, np.ndarray) else field.blocks(problem, BLOCK):
                on_root(mpi, partial(_append, file, name, block))
        on_root(mpi, opened.close)  # the file takes its place


def _opened_h5(path: str, opened: ExitStack) -> Any:
    import h5py

    return opened.enter_context(h5py.File(opened.enter_context(replacing(path)), "w"))


def _append(file: Sequence[Any], name: str, block: np.ndarray) -> None:
    """Rows behind those that an array of the file has, which is made of the first ones."""
    if name not in file[0]:
        file[0].create_dataset(name, data=block, maxshape=(None, *block.shape[1:]) if block.ndim else None)
    else:
        rows = file[0][name]
        rows.resize(len(rows) + len(block), axis=0)
        rows[-len(block) :] = block


def _json(value: Any) -> Any:
    """Values that every JSON reader takes: NaN and infinity become null."""
    if isinstance(value, Mapping):
        return {key: _json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    return {
        "pdeopt": po.__version__,
        "petsc": ".".join(map(str, PETSc.Sys.getVersion())),
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "torch": torch.__version__,
        "mpi": MPI.Get_library_version().split(",")[0].splitlines()[0].strip("\0 "),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
