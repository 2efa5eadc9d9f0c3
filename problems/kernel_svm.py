"""A support vector machine with a kernel: its dual by Newton's method, or by ADMM with a solve an iteration.

    python -m problems.kernel_svm -samples 4096 -plot svm.png
    python -m problems.kernel_svm -data australian -data_dir DATA -bound 1 -summary svm.json
    python -m problems.kernel_svm -samples 4096 -kernel laplace -method admm
    mpiexec -n 4 python -m problems.kernel_svm -samples 65536

Generated points are of the unit cube; their label is the sign of a smooth function with noise.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from petsc4py import PETSc

import pdeopt as po
from pdeopt.core import Section, digest, interruptible, sections
from pdeopt.lowrank import HierarchicalSettings, Kernel, KernelMatrix, PivotedCholesky
from pdeopt.optimize.descent import SupportNewtonSettings, SupportVectorNewton
from pdeopt.optimize.splitting import ADMM, AdmmSettings, SupportVectors
from problems.shared import pictures
from problems.shared.checkpoints import SplitCheckpoints
from problems.shared.command_line import command_line, finish, start
from problems.shared.files import CheckpointFiles, DataFiles, ReportFiles, check_targets, versions, write_report
from problems.shared.kernel_data import KernelSamples, KernelSettings, load, make_kernel

#: Iterations from checkpoint to checkpoint; points of the picture in each direction.
EVERY, GRID = 100, 120

#: Defaults of ADMM that differ from its own.
ADMM_DEFAULTS = {"max_it": 5000, "rtol": 1e-5}


@dataclass(frozen=True)
class PenaltySettings(po.Settings):
    """ADMM for a support vector machine."""

    penalty: float = po.setting(1.0, "of ADMM: what is added to the diagonal of the matrix", above=0)


@dataclass(frozen=True)
class FactorSettings(po.Settings):
    """Newton's method for a support vector machine."""

    factor_rank: int = po.setting(2000, "rows of the factor of the kernel matrix at most", at_least=1)


BY_NEWTON, BY_ADMM = (
    (FactorSettings, SupportNewtonSettings),
    (PenaltySettings, HierarchicalSettings, Section(AdmmSettings, defaults=ADMM_DEFAULTS)),
)


@dataclass(frozen=True)
class MachineSettings(po.Settings):
    """The support vector machine."""

    bound: float = po.setting(1.0, "C, of the coefficients of the dual", above=0)
    method: str = po.setting(
        "auto",
        "Newton's method, where the matrix is one of -factor_rank; ADMM with blocks of low rank; auto: by its rank",
        choices=("auto", "newton", "admm"),
        reads={"auto": (*BY_NEWTON, *BY_ADMM), "newton": BY_NEWTON, "admm": BY_ADMM},
    )


OPTIONS = [
    *sections(KernelSettings),
    *sections(MachineSettings),
    *sections(DataFiles),
    *sections(ReportFiles),
    *sections(CheckpointFiles, checkpoint_every=EVERY),
]


def main(argv: Sequence[str] | None = None) -> float:
    """Train; the objective of the dual, a'Ka/2 - sum |a|."""
    with command_line(argv, __doc__, OPTIONS):
        settings, own = po.read(KernelSettings), po.read(MachineSettings)
        files, report = po.read(DataFiles), po.read(ReportFiles)
        kept = po.read(CheckpointFiles, checkpoint_every=EVERY)
        check_targets(MPI.COMM_WORLD, report, kept)
        samples = load(settings, files)
        y, y_test = labels(samples)
        kernel = make_kernel(settings, samples.x)
        begin = time.process_time()
        machine, method = make_machine(kernel, samples.x, y, own, bool(kept.checkpoint or kept.restart))
        po.require_all_read()
        seconds = [time.process_time() - begin]
        checkpoints = SplitCheckpoints(kept, MPI.COMM_WORLD, fingerprint(settings, own, samples))
        with interruptible():
            if isinstance(machine, SupportVectors):
                going_on: dict[str, Any] = checkpoints.resume_split(machine) | {"observers": [checkpoints.observe]}
            else:
                going_on = {}
            begin = time.process_time()
            result = method.solve(**going_on)
        seconds.append(time.process_time() - begin)
        checkpoints.end("kernel_svm", result)
        found = decision(kernel, samples.x, result.design, machine.offset, samples.x_test)
        objective, error = machine.dual(), float(np.mean(np.where(found > 0.0, 1.0, -1.0) != y_test))
        summary = {
            "problem": "kernel_svm",
            "data": samples.name,
            "samples": len(y),
            "method": "admm" if isinstance(machine, SupportVectors) else "newton",
            "objective": objective,
            "test_error": error,
            "support_vectors": int(np.count_nonzero(result.design)),
            "offset": machine.offset,
            "iterations": result.iterations,
            "reason": result.reason.name,
            "message": result.message,
            "cpu_seconds": MPI.COMM_WORLD.allreduce(sum(seconds)),
            "seconds": {"setup": seconds[0], "iterations": seconds[1]},
            "ranks_by_level": ranks_of(machine),
            "ranks": MPI.COMM_WORLD.size,
            "parameters": {**asdict(settings), **asdict(own), "width": kernel.width, "solver": asdict(method.settings)},
            "versions": versions(),
            "history": result.history.as_rows(),
        }
        PETSc.Sys.Print(
            f"kernel_svm, {samples.name}, {len(y)} samples, {summary['method']}: objective {objective:.10g}, "
            f"test error {error:.4f}, {summary['support_vectors']} support vectors, {result.iterations} iterations "
            f"({summary['cpu_seconds']:.2f} CPU s)"
        )
        write_report(MPI.COMM_WORLD, report, summary, lambda: _picture(kernel, samples, y, machine, result))
        checkpoints.leave()
        finish("kernel_svm", result.reason > 0, result.message)
        return objective


Machine = SupportVectors | SupportVectorNewton


def make_machine(
    kernel: Kernel, x: np.ndarray, y: np.ndarray, own: MachineSettings, is_kept: bool
) -> tuple[Machine, Any]:
    """The machine, and what solves it: Newton's method where the kernel's matrix has a rank that is low enough.

    Raises:
        InputError: checkpoints of Newton's method, which has none.
    """
    if own.method == "newton" and is_kept:
        raise po.InputError("-method", "newton with -checkpoint or -restart, which it has not", "admm")
    if own.method == "auto":  # which way it will be, a user need not know
        for group in (FactorSettings, SupportNewtonSettings, PenaltySettings, HierarchicalSettings, AdmmSettings):
            po.read(group)
    if own.method != "admm" and not is_kept:
        rank = po.read(FactorSettings).factor_rank
        factor = PivotedCholesky(kernel, x, most=rank, comm=MPI.COMM_WORLD)
        if own.method == "newton" or factor.rest <= factor.rtol:
            machine = SupportVectorNewton(factor, y, own.bound)
            return machine, machine
    split = SupportVectors(KernelMatrix(kernel, x, po.read(PenaltySettings).penalty), y, own.bound)
    return split, ADMM(split, **ADMM_DEFAULTS)


def ranks_of(machine: Machine) -> list[int]:
    """Of the blocks by levels; or that of the whole matrix."""
    return machine.matrix.hierarchy.ranks if isinstance(machine, SupportVectors) else [len(machine.factor.phi)]


def labels(samples: KernelSamples) -> tuple[np.ndarray, np.ndarray]:
    """-1 or 1 of the training and of the test samples.

    Raises:
        InputError: a data set with more than two classes.
    """
    if samples.classes not in (0, 2):
        raise po.InputError("-data", f"{samples.name}, with {samples.classes} classes", "generated, or two classes")
    level = 0.5 if samples.classes else 0.0
    found = [np.where(y > level, 1.0, -1.0) for y in (samples.y, samples.y_test)]
    return found[0], found[1]


def decision(kernel: Any, x: np.ndarray, z: np.ndarray, offset: float, points: np.ndarray) -> np.ndarray:
    """sum_s k(point, x_s) z_s + offset; its sign is the class."""
    own = np.flatnonzero(z)
    parts = [kernel.block(part, x[own]) @ z[own] for part in np.array_split(points, 1 + len(points) // 1000)]
    return np.concatenate(parts) + offset


def fingerprint(settings: KernelSettings, own: MachineSettings, samples: KernelSamples) -> dict[str, Any]:
    """What must be equal where a run goes on."""
    data = digest(*(torch.from_numpy(np.ascontiguousarray(each, dtype=float)) for each in (samples.x, samples.y)))
    return {"problem": "kernel_svm", **asdict(settings), **asdict(own), "data_digest": data}


def _picture(kernel: Any, samples: KernelSamples, y: np.ndarray, machine: Machine, result: po.Result) -> Any:
    """The decision function in the plane, or its values at the test samples; and convergence."""
    figure = pictures.new_figure(9.5, 4.2)
    left, right = figure.subplots(1, 2)
    x, z = samples.x, result.design
    if x.shape[1] == 2:
        low, high = x.min(axis=0), x.max(axis=0)
        axes = [np.linspace(a, b, GRID) for a, b in zip(low, high)]
        points = np.stack(np.meshgrid(*axes), axis=-1).reshape(-1, 2)
        values = decision(kernel, x, z, machine.offset, points).reshape(GRID, GRID)
        bound = float(np.abs(values).max())
        drawn = left.contourf(*axes, values, levels=21, cmap="RdBu", vmin=-bound, vmax=bound)
        left.contour(*axes, values, levels=[-1.0, 0.0, 1.0], colors="black", linestyles=["--", "-", "--"])
        shown = np.random.default_rng(0).permutation(len(x))[:600]
        for label, color in ((1.0, "#1f4e8c"), (-1.0, "#a02c2c")):
            some = shown[y[shown] == label]
            left.plot(*x[some].T, ".", color=color, markersize=2)
        free = np.flatnonzero((z != 0.0) & (np.abs(z) < machine.bound))
        left.plot(*x[free].T, "o", markerfacecolor="none", color="black", markersize=5)
        left.set(title="decision function; margin, free support vectors", aspect="equal")
        figure.colorbar(drawn, ax=left, shrink=0.8)
    else:
        values = decision(kernel, x, z, machine.offset, samples.x_test)
        test = labels(samples)[1]
        left.hist([values[test > 0], values[test < 0]], bins=30, stacked=True, color=["#1f4e8c", "#a02c2c"])
        left.set(title="decision function of the test samples, by class", xlabel="value")
    pictures.convergence(right, result.history)
    figure.suptitle(f"support vector machine, {samples.name}, {len(x)} samples")
    return figure


if __name__ == "__main__":
    start(main)
