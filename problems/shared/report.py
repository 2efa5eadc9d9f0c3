"""What a problem script writes: summary, picture and solution. Nothing before all of it is known to fit."""

from __future__ import annotations

import io
import json
import math
import os
import platform
import resource
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy
import torch
from mpi4py import MPI
from petsc4py import PETSc

import pdeopt
from pdeopt.control.checkpoint import replace_file
from pdeopt.control.metric import RieszMetric
from pdeopt.core.errors import InputError, on_root
from pdeopt.core.monitor import Result

if TYPE_CHECKING:
    from problems.shared.case import Case, ScriptSettings

#: Endings of the files that an option takes, and the package that some of them need.
ENDINGS = {
    "summary": {".json": ""},
    "plot": dict.fromkeys((".png", ".pdf", ".svg"), "matplotlib"),
    "output": {".npz": "", ".mat": "", ".h5": "h5py"},
}


@dataclass(frozen=True)
class Panel:
    """One image of the picture: values over space (columns) and time (rows)."""

    title: str
    values: np.ndarray
    extent: tuple[float, float, float, float]


def check_targets(mpi: Any, *settings: Any) -> None:
    """Raise `InputError` for a file of these settings that cannot be written. Collective."""

    def check() -> None:
        for option in ("summary", "plot", "output", "checkpoint"):
            for path in filter(None, (getattr(each, option, "") for each in settings)):
                _check_ending(option, path)
                _check_folder(option, path)

    on_root(mpi, check)


def _check_ending(option: str, path: str) -> None:
    endings = ENDINGS.get(option)
    ending = Path(path).suffix
    if endings is None:
        return
    if ending not in endings:
        raise InputError(f"-{option}", path, "a name that ends in " + " | ".join(endings))
    if endings[ending] and find_spec(endings[ending]) is None:
        raise InputError(f"-{option} {path}", f"no package {endings[ending]}", f"pip install {endings[ending]}")


def _check_folder(option: str, path: str) -> None:
    """Try to make a file beside the target: permissions, full disks and read-only mounts all show."""
    if Path(path).is_dir():
        raise InputError(f"-{option}", f"{path}, a folder", "the name of a file")
    try:
        with tempfile.TemporaryFile(dir=Path(path).parent):
            pass
    except OSError as error:
        raise InputError(
            f"-{option}", f"{path} ({error.strerror})", "a file in a folder that can be written to"
        ) from None


def write(case: Case, settings: ScriptSettings, result: Result, metric: RieszMetric, seconds: float) -> None:
    """Write the files that the options ask for. Collective."""
    grid = case.problem.grid
    summary = summarize(case, settings, result, metric, seconds)
    arrays = case.arrays(result) if settings.plot or settings.output else None

    def write_all() -> None:
        if settings.output:
            replace_file(settings.output, _solution(Path(settings.output).suffix, arrays or {}))
        if settings.plot:
            replace_file(settings.plot, _picture(Path(settings.plot).suffix, case, arrays or {}, result))
        if settings.summary:
            replace_file(settings.summary, (json.dumps(_json(summary), indent=2) + "\n").encode())

    on_root(grid.mpi, write_all)
    PETSc.Sys.Print(
        f"{case.name}: objective {result.objective:.14g} after {result.iterations} iterations, "
        f"{result.message.split(':')[0]} ({seconds:.2f} s)",
        comm=grid.comm,
    )


def summarize(
    case: Case, settings: ScriptSettings, result: Result, metric: RieszMetric, seconds: float
) -> dict[str, Any]:
    """The summary as a dictionary of JSON values. Collective."""
    problem, last = case.problem, result.history[-1]
    u, z, _ = problem.fields(problem.join(result.state, result.design))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "problem": {"name": case.name, **case.parameters},
        "solver": settings.solver,
        "reason": int(result.reason),
        "message": result.message,
        "objective": last.objective,
        "control_norm": metric.control_norm(z),
        "state_norm": metric.state_norm(u),
        "optimality": last.optimality,
        "feasibility": last.feasibility,
        "iterations": last.iteration,
        "krylov_iterations": _by_iteration(result.history["krylov"]),
        "wall_time_s": seconds,
        "peak_memory_mb": problem.grid.mpi.allreduce(memory, MPI.MAX),
        "ranks": problem.grid.mpi.size,
        "versions": versions(),
        "history": result.history.columns(),
    }


def _by_iteration(krylov: list[int]) -> list[int]:
    """One entry an outer iteration: what the start took is the first one's."""
    return [krylov[0] + krylov[1], *krylov[2:]] if len(krylov) > 1 else []


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    return {
        "pdeopt": pdeopt.__version__,
        "petsc": ".".join(map(str, PETSc.Sys.getVersion())),
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "torch": torch.__version__,
        "mpi": MPI.Get_library_version().split(",")[0].splitlines()[0].strip("\0 "),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }


def _json(value: Any) -> Any:
    """Values that every JSON reader takes: NaN and infinity become null."""
    if isinstance(value, dict):
        return {key: _json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _solution(ending: str, arrays: dict[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    if ending == ".npz":
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    elif ending == ".mat":
        from scipy.io import savemat

        savemat(buffer, arrays)
    else:
        import h5py

        with h5py.File(buffer, "w") as file:
            for name, array in arrays.items():
                file[name] = array
    return buffer.getvalue()


def _picture(ending: str, case: Case, arrays: dict[str, np.ndarray], result: Result) -> bytes:
    """The panels of the case and the convergence history."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = case.panels(arrays)
    figure, axes = plt.subplots(1, len(panels) + 1, figsize=(4.2 * (len(panels) + 1), 3.8), layout="constrained")
    for axis, panel in zip(axes, panels):
        bound = np.abs(panel.values).max() or 1.0
        signed = panel.values.min() < -1e-3 * bound
        colors = {"cmap": "RdBu_r", "vmin": -bound, "vmax": bound} if signed else {"cmap": "viridis"}
        image = axis.imshow(panel.values, origin="lower", aspect="auto", extent=panel.extent, **colors)
        axis.set(title=panel.title, xlabel="x", ylabel="t")
        figure.colorbar(image, ax=axis)
    history, axis = result.history, axes[-1]
    for name, style in (("optimality", "o-"), ("feasibility", "s--")):
        axis.semilogy(history["iteration"], np.maximum(history[name], 1e-17), style, label=name, markersize=4)
    axis.set(title="convergence", xlabel="iteration")
    axis.legend()
    axis.grid(True, alpha=0.3)
    figure.suptitle(f"{case.name}: J = {result.objective:.8g}")
    buffer = io.BytesIO()
    figure.savefig(buffer, format=ending[1:], dpi=120)
    plt.close(figure)
    return buffer.getvalue()
