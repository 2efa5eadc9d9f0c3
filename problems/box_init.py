"""The unit square pushed through a deep ReLU ResNet with random weights, for each initialization.

Layers u + relu(W u + b) of width 2. He and Glorot blow the image up and flatten it to a line; Box keeps both its
size and its shape (Cyr, Gulian, Patel, Perego, Trask 2020).

    python -m problems.box_init -depth 128 -seeds 20 -plot box_init.png
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from petsc4py import PETSc
from torch import Tensor

import nn_adapters as nna
import pdeopt as po
from pdeopt.core import require_memory, sections
from pdeopt.core.memory import DOUBLE
from problems.shared import pictures
from problems.shared.command_line import command_line, start
from problems.shared.files import ReportFiles, check_targets, write_report


@dataclass(frozen=True)
class BoxInitSettings(po.Settings):
    """The problem's parameters."""

    depth: int = po.setting(128, "layers", at_least=1)
    seeds: int = po.setting(20, "networks of each kind; medians over them are shown", at_least=1)
    points: int = po.setting(33, "points of the square along each side", at_least=2)


def square(points: int) -> Tensor:
    """A grid of points x points in [0, 1]^2, shape (points^2, 2)."""
    line = torch.linspace(0.0, 1.0, points, dtype=torch.float64)
    return torch.cartesian_prod(line, line)


def image(kind: str, depth: int, seed: int, points: Tensor) -> Tensor:
    """Where a network of this initialization takes the points, (n, 2) -> (n, 2)."""
    network = nna.LayerStack(lambda: nna.dense(2, "relu"), depth, Tf=depth).double()
    nna.initialize(network, kind, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return network(points)  # type: ignore[no-any-return]


def aspect_ratio(points: Tensor) -> float:
    """The smallest over the largest singular value of the centered points, (n, 2)."""
    s = torch.linalg.svdvals(points - points.mean(0))
    return float(s[-1] / s[0])


def measure(images: list[Tensor]) -> tuple[float, float]:
    """Medians of the largest entry and of the aspect ratio."""
    largest = [float(x.abs().max()) for x in images]
    return float(np.median(largest)), float(np.median([aspect_ratio(x) for x in images]))


OPTIONS = [*sections(BoxInitSettings), *sections(ReportFiles)]


def main(argv: Sequence[str] | None = None) -> float:
    """Print the table, and return the largest entry of the image for Box (the median over the seeds)."""
    with command_line(argv, __doc__, OPTIONS):
        settings, report = po.read(BoxInitSettings), po.read(ReportFiles)
        po.require_all_read()
        check_targets(MPI.COMM_WORLD, report)
        numbers = 2 * settings.points**2 * settings.seeds
        given = f"{settings.points}, {settings.seeds}"
        require_memory(DOUBLE * len(nna.INITIALIZATIONS) * numbers, "-points, -seeds", given, "smaller ones")
        points, images, table = square(settings.points), {}, {}
        PETSc.Sys.Print(f"{'':8s}{'max|x|':>12s}{'aspect ratio':>15s}")
        for kind in nna.INITIALIZATIONS:
            images[kind] = [image(kind, settings.depth, seed, points) for seed in range(settings.seeds)]
            table[kind] = measure(images[kind])
            PETSc.Sys.Print(f"{kind:8s}{table[kind][0]:12.2e}{table[kind][1]:15.2e}")
        rows = {kind: {"largest": entry, "aspect_ratio": aspect} for kind, (entry, aspect) in table.items()}
        shown = {"square": points, **{kind: found[0] for kind, found in images.items()}}
        found = {"problem": "box_init", "parameters": asdict(settings), **rows}
        write_report(MPI.COMM_WORLD, report, found, lambda: _picture(shown))
        return table["box"][0]


def _picture(images: dict[str, Tensor]) -> Any:
    """The square and its images, each point in its color."""
    figure = pictures.new_figure(3.6 * len(images), 3.6)
    color = next(iter(images.values()))
    for axis, (name, points) in zip(figure.subplots(1, len(images)), images.items()):
        axis.scatter(*points.T, c=color[:, 0] - color[:, 1], s=3, cmap="coolwarm")
        axis.set(title=name)
    return figure


if __name__ == "__main__":
    start(main)
