"""What the training scripts share: options, training, progress, summary and picture."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from petsc4py import PETSc
from torch import nn

import nn_adapters as nna
import pdeopt as po
from nn_adapters.curvature import SECOND_ORDER, second_order_settings
from nn_adapters.training import FIRST_ORDER
from pdeopt.core import Section, checked_device, interruptible, on_root, read_text, require_memory, sections
from pdeopt.optimize import CurvedSettings
from problems.shared import pictures
from problems.shared.command_line import command_line, finish
from problems.shared.files import DataFiles, ReportFiles, check_targets, tell_finished, write_report
from problems.shared.sqp_training import AsControl, SqpTraining, TrainedBySettings, train


@dataclass(frozen=True)
class LayerTraining:
    """A script that trains a classifier whose layers are solved in parallel.

    Attributes:
        name, doc: of the script.
        own: class of its settings.
        data: (its settings, files of data, seed) -> samples.
        make: (its settings, communicator of the layers, MGRIT, samples) -> classifier.
        defaults: the script's own defaults, by class of settings.
        numbers: (its settings, samples of a batch) -> numbers in single precision that training has in memory at least.
        passes: its default of `-epochs` for the samples that the settings name, where that is not one for all.
        control: what it says of its network as a control problem; None where the network is none for `NetworkFunction`.
        second_order: optimizers of second order that its layers have what they need for.
    """

    name: str
    doc: str | None
    own: type[po.Settings]
    data: Callable[[Any, DataFiles, int], nna.Dataset]
    make: Callable[[Any, Any, nna.MgritSettings, nna.Dataset], nn.Module]
    defaults: Mapping[type[po.Settings], Mapping[str, Any]] = field(default_factory=dict)
    numbers: Callable[[Any, int], float] = lambda own, batch: 0.0
    passes: Callable[[Any, DataFiles], int] | None = None
    control: AsControl | None = field(default_factory=AsControl)
    second_order: tuple[str, ...] = ("kfac",)

    @property
    def options(self) -> list[Section]:
        """All that the script reads."""
        ways = () if self.control is None else (TrainedBySettings,)
        groups = (self.own, *ways, nna.TrainingSettings, nna.MgritSettings, DataFiles, ReportFiles)
        found = [section for group in groups for section in sections(group, **self.defaults.get(group, {}))]
        refused = {("optimizer", name) for name in SECOND_ORDER if name not in self.second_order}
        if self.control is not None and self.control.parts is None:  # states and sweeps are those of dense networks
            refused |= {("gn_sweeps", "mgrit"), ("gn_sweeps", "one_shot")}
            found = [section for section in found if section.settings is not CurvedSettings]
        taken = [
            replace(section, when=tuple(path for path in section.when if not refused & set(path))) for section in found
        ]
        return [section for section in taken if section.when]  # the others no run of this script reads

    def _read(self, group: type[po.Settings], **given: Any) -> Any:
        return po.read(group, **{**self.defaults.get(group, {}), **given})

    def run(self, argv: Sequence[str] | None) -> float:
        """Train as the options say; the test accuracy of the weights, run serially. Collective."""
        with command_line(argv, self.doc, self.options):
            own, files = self._read(self.own), self._read(DataFiles)
            epochs = {} if self.passes is None else {"epochs": self.passes(own, files)}
            settings = self._read(nna.TrainingSettings, **epochs)
            mgrit, report = self._read(nna.MgritSettings), self._read(ReportFiles)
            if self.control is not None and po.read(TrainedBySettings).solver == "sqp":
                return self._solve(self.control, settings, mgrit, files, report)
            if settings.optimizer in SECOND_ORDER:
                self._require_curvature(settings.optimizer)
                second_order_settings(settings.optimizer)  # reads its options before the data come
            po.require_all_read()
            check_targets(MPI.COMM_WORLD, report, settings)
            self._require_room(own, settings.batch)
            _levels(own, settings)  # refuses what it cannot have, before the data come
            if settings.device:
                checked_device(settings.device)  # so does this
            samples = on_root(MPI.COMM_WORLD, lambda: self.data(own, files, settings.seed))
            sizes = f"{len(samples.x_train)} for training, {len(samples.x_test)} for tests"
            PETSc.Sys.Print(f"{self.name}: data set {samples.name}, samples: {sizes}")
            torch.manual_seed(settings.seed)
            with interruptible():
                training, failure = self._train(own, settings, mgrit, samples)
            parameters = {**vars(own), **vars(files), **vars(report), **vars(settings)}
            _report(self.name, report, training, parameters)
            training.files.leave()
            finish(self.name, not failure, failure)
            return training.history[-1].accuracy

    def _solve(
        self, control: AsControl, settings: nna.TrainingSettings, mgrit: nna.MgritSettings, files: Any, report: Any
    ) -> float:
        """Train as a control problem; the test accuracy. Collective."""
        own = po.read(self.own, **{**self.defaults.get(self.own, {}), **control.defaults})
        refused = {"-checkpoint": settings.checkpoint, "-restart": settings.restart, "-nested": settings.nested > 1}
        refused |= {"-device": settings.device}
        if given := ", ".join(name for name, value in refused.items() if value):
            raise po.InputError("-solver", f"sqp with {given}", "sqp without, or epochs")
        if control.parts is None and MPI.COMM_WORLD.size > 1:
            raise po.InputError("-solver", f"sqp on {MPI.COMM_WORLD.size} ranks", "one rank, for this network")
        check_targets(MPI.COMM_WORLD, report)
        self._require_room(own, settings.samples)
        load = control.data or self.data
        samples = on_root(MPI.COMM_WORLD, lambda: load(own, files, settings.seed))
        torch.manual_seed(settings.seed)
        network = self.make(own, None, mgrit, samples)
        training = SqpTraining(network, control, samples, settings.samples, settings.smoothness)
        po.require_all_read()
        parameters = {**vars(own), **vars(files), **vars(report), "samples": settings.samples, "seed": settings.seed}
        accuracy, failure = train(self.name, training, report, parameters)
        finish(self.name, not failure, failure)
        return accuracy

    def _require_curvature(self, name: str) -> None:
        if name not in self.second_order:
            legal = " | ".join((*FIRST_ORDER, *self.second_order))
            raise po.InputError("-optimizer", f"{name}, which {self.name} has no curvature for", legal)

    def _require_room(self, own: Any, batch: int) -> None:
        sizes = ", ".join(f"-{key} {value}" for key, value in vars(own).items() if type(value) is int)
        needed = 4 * self.numbers(own, min(batch, 100)) / MPI.COMM_WORLD.size  # there may be fewer samples
        require_memory(needed, "sizes", sizes, "smaller ones")

    def _train(
        self, own: Any, settings: nna.TrainingSettings, mgrit: nna.MgritSettings, samples: nna.Dataset
    ) -> tuple[Any, str]:
        """Train on each level of nested iteration, shallowest first; the last training, and why it failed."""
        levels, groups = _levels(own, settings), nna.Groups(MPI.COMM_WORLD, settings.layer_ranks)
        epochs = nna.nested_epochs(settings.epochs, settings.nested) if settings.nested > 1 else [settings.epochs]
        training, failure = None, ""
        first = on_root(MPI.COMM_WORLD, lambda: _first_level(settings.restart, len(levels)))
        with Progress(self.name, sum(epochs)) as progress:
            for number in range(first, len(levels)):
                level, its = levels[number], epochs[number]
                network = self.make(level, groups.layers, mgrit, samples)
                if training is not None:
                    nna.deepen(training.network, network)
                how = replace(settings, epochs=its, restart=settings.restart if number == first else "")
                problem = {"problem": self.name, **vars(level), "level": number}
                training = nna.Training(network, samples, how, groups, progress, problem)
                done = len(training.history)
                try:
                    last = training.run()
                except po.SolveFailure as found:
                    failure, last = str(found), nna.Epoch(0, math.nan, training.accuracy(), 0.0)
                if training.files.signal or failure:
                    break
        ended_early = training.files.signal or failure
        if settings.restart and number == first and done == len(training.history) and not ended_early:
            tell_finished(self.name)
        if not training.history:
            training.history.append(last)
        return training, failure


def _first_level(restart: str, levels: int) -> int:
    """The level of nested iteration that a checkpoint is of; 0 without one, or where it is of another run."""
    level = read_text(restart)["fingerprint"].get("level") if restart else 0
    return level if isinstance(level, int) and 0 <= level < levels else 0


def _levels(own: Any, settings: nna.TrainingSettings) -> list[Any]:
    """The script's settings on each level of nested iteration, shallowest first."""
    if settings.nested == 1:
        return [own]
    layers = getattr(own, "layers", 0)
    most = (layers & -layers).bit_length()  # as often as the layers can be halved
    if settings.nested > most:
        raise po.InputError(
            "-nested",
            f"{settings.nested} with {layers} layers" if layers else "a network without layers",
            f"1 to {max(most, 1)}, as often as the layers can be halved",
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

    def __call__(self, epoch: nna.Epoch) -> None:
        if self._bar is not None:
            note = f"loss {epoch.loss:.4f}, accuracy {epoch.accuracy:.4f}"
            self._bar.update(self._task, completed=epoch.epoch, note=note)
            return
        damping = "" if epoch.damping is None else f"  damping {epoch.damping:.1e}"
        error = "" if epoch.gradient_error is None else f"  gradient error {epoch.gradient_error:.1e}"
        PETSc.Sys.Print(
            f"epoch {epoch.epoch:4d}  loss {epoch.loss:.5f}  test accuracy {epoch.accuracy:.4f}  "
            f"{epoch.seconds:8.1f} s{damping}{error}"
        )


def _report(name: str, files: ReportFiles, training: nna.Training, parameters: dict[str, Any]) -> None:
    """Write what the options ask for, and a line. Collective."""
    solvers, last = nna.mgrit_solvers(training.network), training.history[-1]
    residuals = dict(zip(("forward", "adjoint"), training.residuals))
    summary = {
        "problem": name,
        "train_loss": last.loss,
        "test_accuracy": last.accuracy,
        "epochs": last.epoch,
        "gradient_error": last.gradient_error,
        "seconds": last.seconds,
        "ranks": MPI.COMM_WORLD.size,
        "coarsening": solvers[0].factors if solvers else [],
        "cycles": [solvers[0].forward.cycles, solvers[0].adjoint.cycles] if solvers else [],
        "bias": [vars(each) for each in training.control.bias],
        "accumulated_bias": training.control.accumulated,
        "serial": training.control.why_serial,
        "residuals": residuals,
        "costs": {**training.data.costs, **_costs(training)},
        "history": [vars(epoch) for epoch in training.history],
        "parameters": parameters,
    }
    table = training.confusion() if files.plot else np.zeros((0, 0))
    write_report(MPI.COMM_WORLD, files, summary, lambda: _picture(name, training.history, table, residuals))
    if training.data.costs:
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in _costs(training).items())
        PETSc.Sys.Print(f"{name}: {training.data.costs.get('frames', 0):.0f} frames encoded; seconds: {parts}")
    if training.control.why_serial:
        PETSc.Sys.Print(f"{name}: layers went one after the other: {training.control.why_serial}")
    PETSc.Sys.Print(
        f"{name}: test accuracy {last.accuracy:.4f}, loss {last.loss:.5f} after {last.epoch} epochs "
        f"({last.seconds:.1f} s)"
    )


def _costs(training: nna.Training) -> dict[str, float]:
    """Seconds by part: reading, an encoder that is not trained, forward and backward passes."""
    made = training.data.costs
    return {
        "disk": made.get("disk", 0.0) + training.costs["disk"],
        "encoder": made.get("encoder", 0.0),
        **{part: training.costs[part] for part in ("forward", "backward")},
    }


def _picture(name: str, history: list[nna.Epoch], table: np.ndarray, residuals: dict[str, list[float]]) -> Any:
    """Loss and accuracy, confusion matrix, and residuals of MGRIT where its cycles measure them."""
    measured = {which: values for which, values in residuals.items() if values}
    figure = pictures.new_figure(11.0 + 3.4 * bool(measured), 3.6)
    curves, accuracy, confused, *rest = figure.subplots(1, 3 + bool(measured))
    epochs = [e.epoch for e in history]
    curves.semilogy(epochs, [e.loss for e in history], nonpositive="mask")
    curves.set(title="training loss", xlabel="epoch")
    accuracy.plot(epochs, [e.accuracy for e in history])
    accuracy.set(title="test accuracy", xlabel="epoch")
    for axis in (curves, accuracy):
        axis.grid(True, alpha=0.3)
    pictures.confusion(confused, table)
    for axis in rest:
        for which, values in measured.items():
            axis.semilogy(range(1, len(values) + 1), values, "o-", label=which)
        axis.set(title="residuals of MGRIT, last batch", xlabel="cycle")
        axis.legend()
    figure.suptitle(f"{name}: test accuracy {history[-1].accuracy:.4f}")
    return figure
