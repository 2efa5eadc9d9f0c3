"""The unit square pushed through a deep ReLU ResNet with random weights, for each initialization.

Layers u + relu(W u + b) of width 2. He and Glorot blow the image up and flatten it to a line; Box keeps both its
size and its shape (Cyr, Gulian, Patel, Perego, Trask 2020).

    python -m problems.box_init -depth 128 -seeds 20 -plot box_init.png
"""

from __future__ import annotations

import contextlib
import itertools
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
from pdeopt.core import Interrupted, interruptible, on_root, read_tensors, require_memory, sections, write_tensors
from pdeopt.core.memory import DOUBLE
from problems.shared import pictures
from problems.shared.command_line import command_line, start
from problems.shared.files import CheckpointFiles, ReportFiles, check_targets, tell_finished, write_report


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


class Study:
    """The images of all networks, kind by kind.

    Args:
        settings: of the problem.
        points: of the square, (n, 2).
        kept: files of checkpoints.

    Attributes:
        files: the checkpoints of this run.
    """

    def __init__(self, settings: BoxInitSettings, points: Tensor, kept: CheckpointFiles) -> None:
        self.settings, self.points, self.kept = settings, points, kept
        self.files = kept.of_run(MPI.COMM_WORLD, "network")
        self.images: dict[str, list[Tensor]] = {kind: [] for kind in nna.INITIALIZATIONS}

    def run(self) -> dict[str, list[Tensor]]:
        """The images by kind, (n, 2) each, of the kinds that a signal has let be begun. Collective."""
        if self.kept.restart:
            self._resume()
        before, done = self._done(), 0
        with contextlib.suppress(Interrupted):
            for kind, seed in itertools.product(self.images, range(self.settings.seeds)):
                done += 1
                if done > before:
                    self.images[kind].append(image(kind, self.settings.depth, seed, self.points))
                    self.files.after(done, self._save)
        self.files.end(self._done(), self._save)
        if self.kept.restart and self._done() == before and not self.files.signal:
            tell_finished("box_init")
        return {kind: found for kind, found in self.images.items() if found}

    def _done(self) -> int:
        return sum(map(len, self.images.values()))

    def _save(self) -> None:
        """Images need not be finite, as histories need not."""
        tensors = {f"history.{kind}": torch.stack(found) for kind, found in self.images.items() if found}
        text = {"fingerprint": self._fingerprint()}
        on_root(MPI.COMM_WORLD, lambda: write_tensors(self.kept.checkpoint, tensors, text))

    def _resume(self) -> None:
        path, own, shape = self.kept.restart, self._fingerprint(), tuple(self.points.shape)
        tensors, _ = on_root(MPI.COMM_WORLD, lambda: read_tensors(path, own))
        for name, found in tensors.items():
            kind = name.removeprefix("history.")
            if kind not in self.images or tuple(found.shape[1:]) != shape or len(found) > self.settings.seeds:
                raise po.InputError(f"-restart {path}", f"{name} of shape {tuple(found.shape)}", f"(seeds, *{shape})")
            self.images[kind] = list(found)

    def _fingerprint(self) -> dict[str, Any]:
        return {"problem": "box_init", **asdict(self.settings)}


#: Networks from checkpoint to checkpoint.
EVERY = 5

OPTIONS = [*sections(BoxInitSettings), *sections(ReportFiles), *sections(CheckpointFiles, checkpoint_every=EVERY)]


def main(argv: Sequence[str] | None = None) -> float:
    """Print the table, and return the largest entry of the image for Box (the median over the seeds)."""
    with command_line(argv, __doc__, OPTIONS):
        settings, report = po.read(BoxInitSettings), po.read(ReportFiles)
        kept = po.read(CheckpointFiles, checkpoint_every=EVERY)
        po.require_all_read()
        check_targets(MPI.COMM_WORLD, report, kept)
        numbers = 2 * settings.points**2 * settings.seeds
        given = f"{settings.points}, {settings.seeds}"
        require_memory(DOUBLE * len(nna.INITIALIZATIONS) * numbers, "-points, -seeds", given, "smaller ones")
        points = square(settings.points)
        study = Study(settings, points, kept)
        with interruptible():
            images = study.run()
        table = {kind: measure(found) for kind, found in images.items()}
        PETSc.Sys.Print(f"{'':8s}{'max|x|':>12s}{'aspect ratio':>15s}")
        for kind, (largest, aspect) in table.items():
            PETSc.Sys.Print(f"{kind:8s}{largest:12.2e}{aspect:15.2e}")
        rows = {kind: {"largest": entry, "aspect_ratio": aspect} for kind, (entry, aspect) in table.items()}
        shown = {"square": points, **{kind: found[0] for kind, found in images.items()}}
        found = {"problem": "box_init", "parameters": asdict(settings), **rows}
        write_report(MPI.COMM_WORLD, report, found, lambda: _picture(shown))
        study.files.leave()
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
