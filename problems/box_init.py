"""The unit square pushed through a deep ReLU ResNet with random weights, for each initialization.

Layers u + relu(W u + b) of width 2. He and Glorot blow the image up and flatten it to a line; Box keeps both its
size and its shape (Cyr, Gulian, Patel, Perego, Trask 2020).

    python -m problems.box_init -depth 128 -seeds 20 -plot box_init.png
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from mpi4py import MPI
from petsc4py import PETSc
from torch import Tensor

from nn_adapters.layers.blocks import LayerStack, dense
from nn_adapters.layers.init import INITIALIZATIONS, initialize
from pdeopt.control.checkpoint import replace_file
from pdeopt.core.errors import on_root
from pdeopt.core.options import require_all_read
from pdeopt.core.settings import Settings, read, setting
from problems.shared import case as script
from problems.shared import report


@dataclass(frozen=True)
class BoxInitSettings(Settings):
    """The problem's parameters."""

    depth: int = setting(128, "layers", at_least=1)
    seeds: int = setting(20, "networks of each kind; medians over them are shown", at_least=1)
    points: int = setting(33, "points of the square along each side", at_least=2)
    summary: str = setting("", "write a summary to this .json file")
    plot: str = setting("", "write a picture of the first images to this .png, .pdf or .svg file")


def square(points: int) -> Tensor:
    """A grid of points x points in [0, 1]^2, shape (points^2, 2)."""
    line = torch.linspace(0.0, 1.0, points, dtype=torch.float64)
    return torch.cartesian_prod(line, line)


def image(kind: str, depth: int, seed: int, points: Tensor) -> Tensor:
    """Where a network of this initialization takes the points, (n, 2) -> (n, 2)."""
    network = LayerStack(lambda: dense(2, "relu"), depth, Tf=depth).double()
    initialize(network, kind, torch.Generator().manual_seed(seed))
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


def main(argv: Sequence[str] | None = None) -> float:
    """Print the table, and return the largest entry of the image for Box (the median over the seeds)."""
    with script.command_line(argv, __doc__, (BoxInitSettings, "Image of the unit square")):
        settings = read(BoxInitSettings)
        require_all_read()
        report.check_targets(MPI.COMM_WORLD, settings)
        start, images, table = square(settings.points), {}, {}
        PETSc.Sys.Print(f"{'':8s}{'max|x|':>12s}{'aspect ratio':>15s}")
        for kind in INITIALIZATIONS:
            images[kind] = [image(kind, settings.depth, seed, start) for seed in range(settings.seeds)]
            table[kind] = measure(images[kind])
            PETSc.Sys.Print(f"{kind:8s}{table[kind][0]:12.2e}{table[kind][1]:15.2e}")
        if settings.plot:
            picture = {"square": start, **{kind: found[0] for kind, found in images.items()}}
            on_root(MPI.COMM_WORLD, lambda: replace_file(settings.plot, _picture(settings.plot, picture)))
        if settings.summary:
            found = {kind: {"largest": entry, "aspect_ratio": aspect} for kind, (entry, aspect) in table.items()}
            text = json.dumps({"problem": "box_init", "parameters": asdict(settings), **found}, indent=2) + "\n"
            on_root(MPI.COMM_WORLD, lambda: replace_file(settings.summary, text.encode()))
        return table["box"][0]


def _picture(file: str, images: dict[str, Tensor]) -> bytes:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(images), figsize=(3.6 * len(images), 3.6), layout="constrained")
    color = next(iter(images.values()))
    for axis, (name, points) in zip(axes, images.items()):
        axis.scatter(*points.T, c=color[:, 0] - color[:, 1], s=3, cmap="coolwarm")
        axis.set(title=name)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=Path(file).suffix[1:], dpi=120)
    plt.close(figure)
    return buffer.getvalue()


if __name__ == "__main__":
    script.start(main)
