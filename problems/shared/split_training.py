"""A run of training by splitting: samples dealt out to ranks, the clock, accuracies on the way, summary and picture."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from petsc4py import PETSc
from torch import Tensor, nn

import nn_adapters as nna
import pdeopt as po
from nn_adapters.splitting import LOSSES, LayerSplitting
from pdeopt.core import InputError, digest, on_root
from pdeopt.core.arrays import Array
from pdeopt.core.memory import used_memory
from pdeopt.optimize.splitting import ADMM
from problems.shared import pictures
from problems.shared.checkpoints import SplitCheckpoints
from problems.shared.files import versions

#: Samples that are evaluated at a time.
CHUNK = 2000


# -- samples -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Samples:
    """The samples of one rank.

    Attributes:
        name: of the data set.
        x, y, x_test, y_test: this rank's, (samples, features) and classes.
        counts: training samples of each rank.
        classes: their number.
        print: a fingerprint of those of all ranks.
    """

    name: str
    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    counts: list[int]
    classes: int
    print: str


def deal(comm: Any, load: Callable[[], nna.Dataset], shares: Sequence[float], limit: int = 0) -> Samples:
    """Samples that the first rank reads, in a row, to all ranks. Collective.

    Args:
        comm: mpi4py communicator.
        load: called on the first rank.
        shares: of the ranks, relative to one another; empty for equal ones.
        limit: training samples that are used at most; 0 for all.

    Raises:
        InputError: other numbers of shares than ranks, or fewer training samples than ranks.
    """
    if shares and (len(shares) != comm.size or min(shares) < 0 or not sum(shares) > 0):
        raise InputError("-shares", ",".join(map(str, shares)), f"{comm.size} numbers >= 0, one a rank, not all 0")
    found: list[nna.Dataset] = []

    def read() -> tuple[str, int, int, str, int]:
        data = load()
        n = min(limit or len(data.x_train), len(data.x_train))
        if n < comm.size:
            raise InputError("samples", n, f">= {comm.size}, the ranks")
        first = slice(None) if n == len(data.x_train) else torch.arange(n)  # numbers of rows copy, and free the rest
        x, y, x_test = data.x_train.flatten(1)[first], data.y_train[first], data.x_test.flatten(1)
        data = replace(data, x_train=x, y_train=y, x_test=x_test)
        found.append(data)
        print_of = digest(data.x_train, data.y_train, data.x_test, data.y_test)
        return data.name, n, data.x_train.shape[1], print_of, data.classes

    name, n, features, print_of, classes = on_root(comm, read)
    data = found[0] if found else None
    tests = int(comm.bcast(0 if data is None else len(data.x_test)))
    counts, test_counts = _parts(n, shares or [1.0] * comm.size), _parts(tests, [1.0] * comm.size)
    x, y, x_test, y_test = (
        _scatter(comm, None if data is None else getattr(data, which), rows, width)
        for which, rows, width in (
            ("x_train", counts, features),
            ("y_train", counts, 0),
            ("x_test", test_counts, features),
            ("y_test", test_counts, 0),
        )
    )
    return Samples(name, x, y, x_test, y_test, counts, classes, print_of)


def _parts(n: int, shares: Sequence[float]) -> list[int]:
    """n samples in parts as the shares are."""
    ends = np.round(n * np.cumsum([0.0, *shares]) / sum(shares)).astype(int)
    return [int(count) for count in np.diff(ends)]


def _scatter(comm: Any, whole: Tensor | None, rows: Sequence[int], width: int) -> Tensor:
    """This rank's rows of what the first rank has: float32 (rows, width), or int64 (rows,) for width 0."""
    if comm.size == 1 and whole is not None:
        return whole
    shape = (rows[comm.rank], width) if width else (rows[comm.rank],)
    own = torch.empty(shape, dtype=torch.float32 if width else torch.int64)
    kind, numbers = (MPI.FLOAT, [count * width for count in rows]) if width else (MPI.INT64_T, list(rows))
    starts = [sum(numbers[:rank]) for rank in range(comm.size)]
    source = None if whole is None else [whole.contiguous().numpy(), numbers, starts, kind]
    comm.Scatterv(source, [own.numpy(), kind])
    return own


# -- the run -----------------------------------------------------------------------------------------------


class CpuClock:
    """Seconds that the processor has spent on this process, but for those in `paused`.

    Args:
        before: seconds of a run that goes on.
    """

    def __init__(self, before: float = 0.0) -> None:
        self._begin = time.process_time() - before
        self._until: float | None = None

    @property
    def seconds(self) -> float:
        """So far."""
        return (time.process_time() if self._until is None else self._until) - self._begin

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The seconds of the block are not counted."""
        self._until = time.process_time()
        try:
            yield
        finally:
            self._begin += time.process_time() - self._until
            self._until = None


@dataclass(frozen=True)
class CurvePoint:
    """What is known of the weights at some time.

    Attributes:
        iteration, epoch: passes through the training samples.
        cpu_seconds: of the process that has spent most, from the first iteration on, without evaluations.
        train_loss: the mean loss of the training samples.
        test_accuracy: share of the test samples that are classified rightly.
    """

    iteration: int
    epoch: float
    cpu_seconds: float
    train_loss: float
    test_accuracy: float


def say_point(point: CurvePoint) -> None:
    """Print a line."""
    PETSc.Sys.Print(
        f"epoch {point.epoch:7.2f}  loss {point.train_loss:.5f}  test accuracy {point.test_accuracy:.4f}  "
        f"{point.cpu_seconds:8.1f} CPU s"
    )


class SplitTraining:
    """ADMM on the layers of a network, with evaluations whose seconds are not counted.

    Args:
        network: that is trained.
        samples: of this rank.
        make: the split layers; the seconds that it takes are counted.
        iterations, per_epoch: of the whole run, and of one epoch.
        every: epochs from one evaluation to the next.
        max_cpu_seconds: at which the run ends; 0 for none.
        comm: mpi4py communicator.
        say: called with each evaluation.

    Attributes:
        marks: evaluations so far.
        clock: of the run.
        splitting: the split layers.
    """

    def __init__(
        self,
        network: nn.Module,
        samples: Samples,
        make: Callable[[], LayerSplitting],
        iterations: int,
        per_epoch: float,
        every: float,
        max_cpu_seconds: float,
        comm: Any,
        say: Callable[[CurvePoint], None] | None,
    ) -> None:
        self.say = say
        self.network, self.samples, self.comm = network, samples, comm
        self.iterations, self.per_epoch, self.every, self.limit = iterations, per_epoch, every, max_cpu_seconds
        self.marks: list[CurvePoint] = []
        self.iteration = 0
        self.clock = CpuClock()
        self.splitting = make()

    def run(self, admm: ADMM, checkpoints: SplitCheckpoints, name: str) -> po.Result:
        """Train; the last weights are in the network. Collective."""
        with self.clock.paused():
            going_on = checkpoints.resume_split(self.splitting)
            if before := checkpoints.run_before:
                self.marks = [CurvePoint(**mark) for mark in before["marks"]]
        if before:
            self.clock = CpuClock(before["seconds"][self.comm.rank])
        result = admm.solve(observers=[self._look, checkpoints.observe], until=self._is_done, **going_on)
        with self.clock.paused():
            checkpoints.end(name, result)
        if result.iterations > self.marks[-1].iteration:
            self._evaluate()
        return result

    def memory(self) -> dict[str, Any]:
        """What a restart needs beside the split layers. Collective."""
        return {"marks": [asdict(mark) for mark in self.marks], "seconds": self.comm.allgather(self.clock.seconds)}

    def _look(self, admm: ADMM, history: po.History) -> None:
        self.iteration = int(history[-1].iteration)
        passes = self.per_epoch * self.every
        is_due = self.iteration == 0 or int(self.iteration / passes) > int((self.iteration - 1) / passes)
        if is_due and not (self.marks and self.marks[-1].iteration >= self.iteration):
            self._evaluate()

    def _evaluate(self) -> None:
        """A mark of the present weights, and a line."""
        with self.clock.paused():
            samples, seconds = self.samples, max(self.comm.allgather(self.clock.seconds))
            self.splitting.design()
            loss = LOSSES[self.splitting.settings.loss].value
            losses, right = 0.0, 0
            for x, y in zip(samples.x.split(CHUNK), samples.y.split(CHUNK)):
                losses += float(loss(self._outputs(x), y).sum())
            for x, y in zip(samples.x_test.split(CHUNK), samples.y_test.split(CHUNK)):
                right += int((self._outputs(x).argmax(1) == y).sum())
            loss_sum, right_sum, tests = self.comm.allreduce(np.array([losses, right, len(samples.y_test)])).tolist()
            epoch, n = self.iteration / self.per_epoch, sum(samples.counts)
            self.marks.append(CurvePoint(self.iteration, epoch, seconds, loss_sum / n, right_sum / tests))
            if self.say:
                self.say(self.marks[-1])

    @torch.no_grad()
    def _outputs(self, x: Tensor) -> Tensor:
        return self.network(x)  # type: ignore[no-any-return]

    def _is_done(self, admm: ADMM) -> bool:
        if self.iteration >= self.iterations:
            return True
        return bool(self.limit) and max(self.comm.allgather(self.clock.seconds)) >= self.limit


# -- what is written ---------------------------------------------------------------------------------------


def summary(name: str, training: SplitTraining, result: po.Result, imports: float, parameters: Any) -> dict[str, Any]:
    """The run as values of JSON. Collective.

    Args:
        name: of the script.
        training: that has run.
        result: of it.
        imports: bytes of the process before samples were read.
        parameters: what the options said.
    """
    last, comm, work = training.marks[-1], training.comm, training.splitting.work
    samples = training.samples
    tests = samples.x_test.nbytes + samples.y_test.nbytes
    predicted = {**training.splitting.predicted_memory(), "test samples": tests}
    own = {
        "samples": samples.counts[comm.rank],
        "predicted_mb": {part: size / 1e6 for part, size in {**predicted, "all": sum(predicted.values())}.items()},
        "observed_mb": {"imports": imports / 1e6, "all": used_memory()[1] / 1e6},
    }
    sent = comm.allgather(work.bytes)
    return {
        "problem": name,
        "data": training.samples.name,
        "test_accuracy": last.test_accuracy,
        "train_loss": last.train_loss,
        "cpu_seconds": last.cpu_seconds,
        "iterations": result.iterations,
        "reason": result.reason.name,
        "message": result.message,
        "curve": [asdict(mark) for mark in training.marks],
        "memory": comm.allgather(own),
        "bytes_sent": {"each_rank": sent, "together": sum(sent)},
        "ranks": comm.size,
        "parameters": parameters,
        "versions": versions(),
        "history": result.history.as_rows(),
    }


def picture(title: str, marks: Sequence[CurvePoint], history: po.History) -> Any:
    """Accuracy and loss over the seconds, residuals over the iterations."""
    figure = pictures.new_figure(11.0, 3.6)
    accuracy, loss, residuals = figure.subplots(1, 3)
    seconds = [mark.cpu_seconds for mark in marks]
    accuracy.plot(seconds, [mark.test_accuracy for mark in marks], ".-")
    accuracy.set(title="test accuracy", xlabel="CPU seconds")
    loss.semilogy(seconds, [mark.train_loss for mark in marks], ".-", nonpositive="mask")
    loss.set(title="training loss", xlabel="CPU seconds")
    for name, label in (("feasibility", "z - W a of the outputs"), ("optimality", "move of the weights")):
        residuals.semilogy(history["iteration"], _shown(history[name]), label=label, nonpositive="mask")
    residuals.set(title="residuals", xlabel="iteration")
    residuals.legend()
    for axis in (accuracy, loss, residuals):
        axis.grid(True, alpha=0.3)
    figure.suptitle(title)
    return figure


def _shown(values: Sequence[float]) -> Array:
    """Without the zeros of a start."""
    return pictures.without_negligible_start(values)
