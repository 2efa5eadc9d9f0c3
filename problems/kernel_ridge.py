"""Kernel ridge regression, by blocks of low rank where the samples have few dimensions, else by features.

    python -m problems.kernel_ridge -samples 65536 -hier_rtol 1e-5 -summary ridge.json
    python -m problems.kernel_ridge -samples 65536 -width 1 -hier_rank 8 -plot ridge.png
    python -m problems.kernel_ridge -data mnist -data_dir DATA -ridge_centers 2000 -ridge_single -lambda 1e-3
    mpiexec -n 4 python -m problems.kernel_ridge -samples 65536 -kernel matern

Generated values are a smooth function of points of the unit cube, with noise. Of a data set, each class has values 1
for its samples and -1 for the others.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from mpi4py import MPI
from petsc4py import PETSc

import pdeopt as po
from pdeopt.core import sections
from pdeopt.lowrank import METHODS, HierarchicalSettings, KernelRidge, RidgeSettings
from problems.shared import pictures
from problems.shared.command_line import command_line, start
from problems.shared.files import DataFiles, ReportFiles, check_targets, versions, write_report
from problems.shared.kernel_data import KernelSamples, KernelSettings, LambdaSettings, draw_blocks, load, make_kernel

#: Rows of the exact matrix that are compared.
EXACT_ROWS = 1000


@dataclass(frozen=True)
class MethodSettings(po.Settings, includes=(RidgeSettings,)):
    """How the regression is solved."""

    method: str = po.setting(
        "auto",
        "blocks of low rank, features by some of the samples, or random ones; auto: by measured ranks",
        choices=METHODS,
        reads={"auto": (HierarchicalSettings,), "hodlr": (HierarchicalSettings,)},
    )


OPTIONS = [
    *sections(KernelSettings),
    *sections(LambdaSettings),
    *sections(MethodSettings),
    *sections(DataFiles),
    *sections(ReportFiles),
]


def main(argv: Sequence[str] | None = None) -> float:
    """Fit; the error of the test samples: the share that is classified wrongly, or relative in the 2-norm."""
    with command_line(argv, __doc__, OPTIONS):
        settings, files, report = po.read(KernelSettings), po.read(DataFiles), po.read(ReportFiles)
        shift = po.read(LambdaSettings).lambda_
        check_targets(MPI.COMM_WORLD, report)
        samples = load(settings, files)
        kernel = make_kernel(settings, samples.x)
        model = KernelRidge(kernel, shift, po.read(MethodSettings).method)
        begin = time.process_time()
        model.fit(samples.x, targets(samples))
        seconds = MPI.COMM_WORLD.allreduce(time.process_time() - begin)
        po.require_all_read()
        found = model.predict(samples.x_test)
        error = test_error(samples, found)
        exact = exact_error(model, samples, shift)
        PETSc.Sys.Print(
            f"kernel_ridge, {samples.name}, {len(samples.x)} samples, {model.method}: test error {error:.4g}, residual "
            f"{model.residual:.1e} in {model.iterations} iterations, exact rows {exact:.1e}, ranks {model.ranks}, "
            f"{model.nbytes / 1e6:.0f} MB ({seconds:.2f} CPU s)"
        )
        summary = {
            "problem": "kernel_ridge",
            "data": samples.name,
            "samples": len(samples.x),
            "dim": samples.x.shape[1],
            "method": model.method,
            "residual": model.residual,
            "exact_residual": exact,
            "iterations": model.iterations,
            "cpu_seconds": seconds,
            "memory_mb": model.nbytes / 1e6,
            "dense_mb": 8.0 * len(samples.x) ** 2 / 1e6,
            "ranks_by_level": model.ranks,
            "test_error": error,
            "ranks": MPI.COMM_WORLD.size,
            "parameters": {**asdict(settings), "width": kernel.width, "lambda": shift, "ridge": asdict(model.settings)},
            "versions": versions(),
        }
        write_report(MPI.COMM_WORLD, report, summary, lambda: _picture(model, samples, found))
        return error


def targets(samples: KernelSamples) -> np.ndarray:
    """What is regressed: the values; or for each class 1 where a sample belongs to it, else -1."""
    if not samples.classes:
        return samples.y
    return 2.0 * np.eye(samples.classes)[samples.y] - 1.0


def test_error(samples: KernelSamples, found: np.ndarray) -> float:
    """Of predictions at the test samples."""
    if samples.classes:
        return float(np.mean(found.argmax(axis=1) != samples.y_test))
    return float(np.linalg.norm(found - samples.y_test) / np.linalg.norm(samples.y_test))


def exact_error(model: KernelRidge, samples: KernelSamples, shift: float) -> float:
    """|(K + lambda) alpha - y| / |y| of some rows of the exact matrix; NaN for a method without alpha."""
    if model.method != "hodlr":
        return float("nan")
    rows = np.random.default_rng(0).permutation(len(samples.x))[:EXACT_ROWS]
    y = targets(samples).reshape(len(samples.x), -1)[rows]
    left = model.predict(samples.x[rows]).reshape(y.shape) + shift * model.alpha[rows] - y
    return float(np.linalg.norm(left) / np.linalg.norm(y))


def _picture(model: KernelRidge, samples: KernelSamples, found: np.ndarray) -> Any:
    """Ranks of the blocks; beside them the function, or which classes are confused."""
    figure = pictures.new_figure(9.5, 4.2)
    left, right = figure.subplots(1, 2)
    if model.block_ranks:
        draw_blocks(left, model.block_ranks, model.measured)
    else:
        left.set_axis_off()
        left.text(0.5, 0.5, "no blocks were asked for", ha="center")
    if samples.classes:
        table = np.zeros((samples.classes, samples.classes), dtype=int)
        np.add.at(table, (samples.y_test, found.argmax(axis=1)), 1)
        pictures.confusion(right, table)
    elif samples.x.shape[1] == 2:
        drawn = right.tripcolor(*samples.x_test.T, found, shading="gouraud")
        right.set(title="regression", xlabel="$x_1$", ylabel="$x_2$", aspect="equal")
        figure.colorbar(drawn, ax=right, shrink=0.8)
    else:
        right.plot(samples.y_test, found, ".", markersize=3)
        right.set(title="test samples", xlabel="value", ylabel="prediction")
    figure.suptitle(f"kernel ridge regression, {samples.name}, {len(samples.x)} samples, {model.method}")
    return figure


if __name__ == "__main__":
    start(main)
