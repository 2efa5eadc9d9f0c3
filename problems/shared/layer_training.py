"""What the training scripts share: command line, progress, summary and picture."""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from mpi4py import MPI
from petsc4py import PETSc
from torch import nn

from nn_adapters.data.dataset import Dataset
from nn_adapters.layers.parallelmodule import mgrit_solvers
from nn_adapters.training.groups import RankGroups
from nn_adapters.training.loop import Epoch, Training, TrainingSettings
from nn_adapters.training.nested import deepen, nested_epochs
from pdeopt.control.checkpoint import replace_file
from pdeopt.core.errors import InputError, on_root
from pdeopt.core.options import require_all_read
from pdeopt.core.settings import Settings, read, setting
from pdeopt.steps.mgrit import MgritSettings
from problems.shared import report
from problems.shared.case import command_line


@dataclass(frozen=True)
class OutputSettings(Settings):
    """What is written, and where data come from."""

    summary: str = setting("", "write a summary to this .json file")
    plot: str = setting("", "write a picture to this .png, .pdf or .svg file")
    data_dir: str = setting("", "folder of data sets")
    fetch: bool = setting(False, "download the data set where it is missing")


#: (settings of the script, communicator of the layers, MGRIT, data) -> classifier
Make = Callable[[Any, Any, MgritSettings, Dataset], nn.Module]


def main(
    name: str,
    doc: str,
    own: type,
    data: Callable[[Any, OutputSettings, int], Dataset],
    make: Make,
    argv: Sequence[str] | None,
    mgrit: MgritSettings | None = None,
    problem: dict[str, Any] | None = None,
    **defaults: Any,
) -> float:
    """Train as the options say; the test accuracy of the weights, run serially. Collective.

    Args:
        name, doc: of the script.
        own: its settings class.
        data: (its settings, output settings, seed) -> samples.
        make: the classifier.
        mgrit: defaults of MGRIT.
        problem: defaults of the script's settings.
        defaults: of the training settings.
    """
    mgrit = mgrit or MgritSettings()
    sections = [(own, name), (TrainingSettings, "Training"), (OutputSettings, "Files"), (MgritSettings, "MGRIT")]
    with command_line(argv, doc, *sections):
        settings, output = read(TrainingSettings, **defaults), read(OutputSettings)
        own_settings, solver = read(own, **(problem or {})), read(MgritSettings, **vars(mgrit))
        require_all_read()
        report.check_targets(MPI.COMM_WORLD, output, settings)
        samples = on_root(MPI.COMM_WORLD, lambda: data(own_settings, output, settings.seed))
        torch.manual_seed(settings.seed)
        groups = RankGroups(MPI.COMM_WORLD, settings.layer_ranks)
        epochs = nested_epochs(settings.epochs, settings.nested) if settings.nested > 1 else [settings.epochs]
        shallow: nn.Module | None = None
        with Progress(name, sum(epochs)) as progress:
            for own_level, its in zip(_levels(own_settings, settings), epochs):
                network = make(own_level, groups.layers, solver, samples)
                if shallow is not None:
                    deepen(shallow, network)
                training = Training(network, samples, replace(settings, epochs=its), groups, progress)
                last, shallow = training.run(), network
        write(name, output, training, last, {**vars(own_settings), **vars(settings)})
        return last.accuracy


def _levels(own: Any, settings: TrainingSettings) -> list[Any]:
    """The script's settings on each level of nested iteration, shallowest first."""
    if settings.nested == 1:
        return [own]
    divisor = 2 ** (settings.nested - 1)
    layers = getattr(own, "layers", 0)
    if layers % divisor or not layers or settings.checkpoint or settings.restart:
        raise InputError(
            "-nested",
            f"{settings.nested} with {layers} layers" if layers else "a network without layers",
            f"a multiple of {divisor} layers, no -checkpoint and no -restart",
        )
    return [replace(own, layers=layers >> k) for k in reversed(range(settings.nested))]


class Progress:
    """A bar on a terminal, plain lines elsewhere; rank 0 alone."""

    def __init__(self, name: str, epochs: int) -> None:
        self.name, self.epochs = name, epochs
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if MPI.COMM_WORLD.size == 1 and sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn()
            self._bar = Bar(TextColumn("{task.description}"), *columns)
            self._bar.start()
            self._task = self._bar.add_task(self.name, total=self.epochs, note="")
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, epoch: Epoch) -> None:
        if self._bar is not None:
            note = f"loss {epoch.loss:.4f}, accuracy {epoch.accuracy:.4f}"
            self._bar.update(self._task, completed=epoch.epoch, note=note)
            return
        error = "" if epoch.gradient_error is None else f"  gradient error {epoch.gradient_error:.1e}"
        PETSc.Sys.Print(
            f"epoch {epoch.epoch:4d}  loss {epoch.loss:.5f}  test accuracy {epoch.accuracy:.4f}  "
            f"{epoch.seconds:8.1f} s{error}"
        )


def write(name: str, output: OutputSettings, training: Training, last: Epoch, parameters: dict[str, Any]) -> None:
    """Write what the options ask for. Collective."""
    solvers = mgrit_solvers(training.network)
    residuals = dict(zip(("forward", "adjoint"), training.residuals))
    summary = {
        "problem": name,
        "train_loss": last.loss if math.isfinite(last.loss) else None,
        "test_accuracy": last.accuracy,
        "epochs": last.epoch,
        "gradient_error": last.gradient_error,
        "seconds": last.seconds,
        "ranks": MPI.COMM_WORLD.size,
        "coarsening": solvers[0].factors if solvers else [],
        "cycles": [solvers[0].forward.cycles, solvers[0].adjoint.cycles] if solvers else [],
        "bias": [vars(each) for each in training.bias],
        "accumulated_bias": training.accumulated_bias,
        "residuals": residuals,
        "history": [vars(epoch) for epoch in training.history],
        "parameters": parameters,
    }
    confusion = training.confusion() if output.plot else None

    def write_all() -> None:
        if output.plot:
            replace_file(output.plot, _picture(Path(output.plot).suffix, name, training.history, confusion, residuals))
        if output.summary:
            replace_file(output.summary, (json.dumps(summary, indent=2) + "\n").encode())

    on_root(MPI.COMM_WORLD, write_all)
    PETSc.Sys.Print(
        f"{name}: test accuracy {last.accuracy:.4f}, loss {last.loss:.5f} after {last.epoch} epochs "
        f"({last.seconds:.1f} s)"
    )


def _picture(ending: str, name: str, history: list[Epoch], confusion: Any, residuals: dict[str, list[float]]) -> bytes:
    """Loss and accuracy, confusion matrix, residuals of MGRIT."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    curves, accuracy, table, cycles = figure.subplots(1, 4)
    epochs = [e.epoch for e in history]
    curves.semilogy(epochs, [max(e.loss, 1e-16) for e in history])
    curves.set(title=f"{name}: training loss", xlabel="epoch")
    accuracy.plot(epochs, [e.accuracy for e in history])
    accuracy.set(title="test accuracy, serial", xlabel="epoch")
    table.imshow(confusion, cmap="Blues")
    table.set(title="confusion", xlabel="predicted", ylabel="class")
    for which, values in residuals.items():
        if values:
            cycles.semilogy(range(1, len(values) + 1), values, "o-", label=which)
    cycles.set(title="MGRIT residuals (-layer_mgrit_rtol)", xlabel="cycle")
    buffer = io.BytesIO()
    figure.savefig(buffer, format=ending[1:])
    return buffer.getvalue()
