"""What the scripts of second-order training share: a run until a loss is reached, its summary, picture, checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor, nn

import nn_adapters as nna
import pdeopt as po
from pdeopt.core import DescentRecord, Interrupted, Section, digest, interruptible, on_root, require_memory, sections
from pdeopt.optimize import read_memory, write_memory
from problems.shared import pictures
from problems.shared.command_line import command_line, finish
from problems.shared.files import CheckpointFiles, DataFiles, ReportFiles, check_targets, choose, write_report
from problems.shared.fit_steps import FIRST_ORDER, Fit, FitSettings, FitSteps, hidden_widths

#: Steps from checkpoint to checkpoint.
EVERY = 20


def loss_picture(name: str, found: dict[str, Any]) -> Any:
    """The loss over the steps."""
    figure = pictures.new_figure(6, 4)
    axis = figure.subplots()
    for run in (found, *([found["rival"]] if "rival" in found else [])):
        axis.semilogy(run["history"]["steps"], run["history"]["loss"], label=run["problem"]["optimizer"])
    axis.legend()
    axis.set(title=f"{name}: {found['problem']['optimizer']}", xlabel="step", ylabel="loss of all training samples")
    return figure


@dataclass(frozen=True)
class CurvatureScript:
    """A script that trains a network until its loss is reached.

    Attributes:
        name, doc: of the script.
        task: (settings, data in the precision of the run) -> what is trained.
        more: groups of options that `task` reads.
        defaults: of `settings`.
        settings, steps: how it is trained.
        picture: (name, summary) -> a figure.
    """

    name: str
    doc: str | None
    task: Callable[[FitSettings, nna.Dataset], Fit]
    more: tuple[type[po.Settings], ...]
    defaults: dict[str, Any]
    settings: type[FitSettings] = FitSettings
    steps: type[FitSteps] = FitSteps
    picture: Callable[[str, dict[str, Any]], Any] = loss_picture

    @property
    def options(self) -> list[Section]:
        """All that the script reads."""
        own = [*sections(self.settings, **self.defaults), *(part for each in self.more for part in sections(each))]
        files = [*sections(DataFiles), *sections(ReportFiles), *sections(CheckpointFiles, checkpoint_every=EVERY)]
        return [*own, *files]

    def run(self, argv: Sequence[str] | None) -> float:
        """Train as the options say; the last loss. Collective."""
        comm = MPI.COMM_WORLD
        with command_line(argv, self.doc, self.options):
            own, files = po.read(self.settings, **self.defaults), po.read(DataFiles)
            report, kept = po.read(ReportFiles), po.read(CheckpointFiles, checkpoint_every=EVERY)
            name = choose(own.data, files, "mnist", "digits")
            torch.manual_seed(own.seed)
            hidden_widths(own.widths, (1,))
            data = on_root(comm, lambda: files.load(name, own.seed))
            task = self.task(own, prepared(data, own))
            same = replace(task, network=deepcopy(task.network))
            steps = self.steps(task, own, comm)
            po.require_all_read()
            check_targets(comm, report, kept)
            run = FitRun(self.name, own, steps, kept, comm)
            with interruptible():
                found = run.train()
            if own.optimizer not in FIRST_ORDER and own.rival != "none" and found["message"] != "interrupted":
                found |= self._rival(same, own, comm)
            write_report(comm, report, found, lambda: self.picture(self.name, found))
            if comm.rank == 0:
                print(_line(f"{self.name}, {data.name}", found, task.classes))
                if "rival" in found:
                    of = f"{self.name}, {own.rival} of rate {own.rival_lr:g}"
                    print(_line(of, found["rival"] | {"cpu_seconds": found["rival_cpu_seconds"]}, task.classes))
            run.file.leave()
            missed = own.target_loss is not None and not found["reached"]
            finish(self.name, not missed, f"loss {found['train_loss']:.4g}: more -max_steps, or a larger -target_loss")
            return float(found["train_loss"])

    def _rival(self, task: Fit, own: FitSettings, comm: Any) -> dict[str, Any]:
        """What the rival does from the same weights with the same batches; seconds, which differ, by themselves."""
        rival = replace(own, optimizer=own.rival, lr=own.rival_lr)
        found = FitRun(self.name, rival, self.steps(task, rival, comm), CheckpointFiles(), comm).train()
        return {"rival_cpu_seconds": found.pop("cpu_seconds"), "rival": found}


def _line(name: str, found: dict[str, Any], is_classifier: bool) -> str:
    tested = "test_accuracy" if is_classifier else "test_loss"
    return (
        f"{name}: loss {found['train_loss']:.5g}, {tested.replace('_', ' ')} {found[tested]:.4f} "
        f"after {found['steps']} steps, {found['epochs']:.2f} epochs ({found['cpu_seconds']:.2f} CPU s)"
    )


class FitRun:
    """One run: steps, evaluations, checkpoints.

    Args:
        name: of the script.
        own, steps: what is done.
        kept: files of checkpoints; where to go on is read here.
        comm: of all ranks.
    """

    def __init__(self, name: str, own: FitSettings, steps: FitSteps, kept: CheckpointFiles, comm: Any) -> None:
        self.own, self.steps, self.kept = own, steps, kept
        self.file = kept.of_run(comm, "step")
        task = steps.task
        self.print = {"problem": name, **{k: v for k, v in vars(own).items() if k not in steps.free}}
        self.print |= {"data": digest(task.x, task.y, task.x_test, task.y_test)}
        if isinstance(steps.optimizer, nna.SecondOrder):
            self.print |= {f"settings.{k}": v for k, v in vars(steps.optimizer.settings).items()}
        self.history = po.History()
        if kept.restart:
            memory, self.history = read_memory(kept.restart, self.print, comm)
            steps.recall(memory)

    def train(self) -> dict[str, Any]:
        """Steps until the loss is reached; the summary."""
        steps, own = self.steps, self.own
        message = "all steps done"
        if not len(self.history):
            self._record(steps.loss())
        before = self.history[-1].iteration
        try:
            while steps.count < steps.most and not self._reached:
                steps.step()
                if steps.count % steps.every == 0 or steps.count == steps.most:
                    self._record(steps.loss())
                self.file.after(steps.count, self._save)
        except Interrupted:  # the file of checkpoints knows
            message = "interrupted"
        if self.history[-1].iteration != steps.count:
            self._record(steps.loss())
        self.file.end(steps.count, self._save)
        if self.kept.restart and before == steps.count:
            self.file.tell_if_finished(self.print["problem"], self.history, _Ended(steps.count))
        last, task = self.history[-1], steps.task
        found = {
            "problem": {"name": self.print["problem"], **vars(own)},
            "message": "loss reached" if self._reached else message,
            "steps": steps.count,
            "epochs": steps.epochs,
            "reached": self._reached,
            "train_loss": last.objective,
            "test_accuracy" if task.classes else "test_loss": steps.test(),
            "cpu_seconds": steps.seconds,
            "ranks": steps.comm.size,
            "history": {"steps": self.history["iteration"], "loss": self.history["objective"]},
        }
        optimizer, found = steps.optimizer, found | steps.found()
        return found | {k: getattr(optimizer, k) for k in ("damping", "taken_back") if hasattr(optimizer, k)}

    @property
    def _reached(self) -> bool:
        return self.own.target_loss is not None and self.history[-1].objective <= self.own.target_loss

    def _record(self, loss: float) -> None:
        if not torch.isfinite(torch.tensor(loss)):
            raise po.SolveFailure(f"the loss is {loss} after step {self.steps.count}", "a smaller -lr")
        steps = self.steps
        self.history.append(DescentRecord(steps.count, loss, 0.0, 0.0, 0, steps.count, 0, steps.epochs))
        steps.observe()

    def _save(self) -> None:
        write_memory(self.kept.checkpoint, self.print, self.steps.memory(), self.history, self.steps.comm)


@dataclass(frozen=True)
class _Ended:
    """What is asked of a result where a run was finished before it began."""

    iterations: int


def prepared(data: nna.Dataset, own: FitSettings) -> nna.Dataset:
    """Some of the samples, pooled, in the precision of the run."""
    dtype = torch.float32 if own.precision == "single" else torch.float64
    count = min(own.samples or len(data.x_train), len(data.x_train))

    def ready(x: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(x, 2).to(dtype) if own.pool else x.to(dtype)

    return nna.Dataset(
        data.name, ready(data.x_train[:count]), data.y_train[:count], ready(data.x_test), data.y_test, data.classes
    )


def dense_network(sizes: Sequence[int], activation: str) -> nn.Sequential:
    """Linear layers with an activation after each but the last."""
    numbers = sum(a * b + 2 * (a * a + b * b) for a, b in pairwise(sizes))  # weights, factors, inverses
    require_memory(4 * numbers, "-widths", str(list(sizes)), "smaller ones")
    parts: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise(sizes):
        parts += [nn.Linear(before, after), nna.activation(activation)]
    return nn.Sequential(*parts[:-1])
