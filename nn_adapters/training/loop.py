"""The training loop of layer-parallel classifiers: batches, evaluation, bias of gradients, checkpoints, groups.

Loss, optimizer and autograd are PyTorch's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor, nn

from nn_adapters.curvature.secondorder import SecondOrder
from nn_adapters.data.dataset import Dataset
from nn_adapters.layers.parallelmodule import exactly, measure_bias, mgrit_solvers
from nn_adapters.parallel.gradientsums import GradientSums
from nn_adapters.parallel.groups import Groups
from nn_adapters.training.checkpoint import load_checkpoint, save_checkpoint
from nn_adapters.training.cyclecontrol import CycleControl
from nn_adapters.training.graphs import CapturedGradient
from nn_adapters.training.regularize import regularized
from nn_adapters.training.trainingsettings import FREE, TrainingSettings, check_optimizer, named_optimizer, set_rate
from pdeopt.core.arrays import Array
from pdeopt.core.errors import SolveFailure
from pdeopt.core.interrupt import Interrupted
from pdeopt.core.storage import digest
from pdeopt.core.team import checked_device
from pdeopt.optimize.checkpoint import CheckpointFile

#: Numbers of the samples that are classified at once, at most: samples may be in a file that is larger than the memory.
NUMBERS = 1 << 25
#: Epochs after which gradients may have a third of the error that they may have at first.
HORIZON = 20


@dataclass
class Epoch:
    """What is known after an epoch.

    Attributes:
        epoch: its number, from 1.
        loss: the mean of the batches' losses, before their steps.
        accuracy: share of the test samples that are classified rightly, run serially.
        seconds: since the start of the run, over restarts.
        gradient_error: relative, where it was measured.
        damping: of an optimizer of second order.
    """

    epoch: int
    loss: float
    accuracy: float
    seconds: float
    gradient_error: float | None = None
    damping: float | None = None


@dataclass
class Training:
    """One training run of a classifier with cross-entropy: batches, evaluation, checkpoints, error of gradients.

    The loop is that of PyTorch: loss, `backward`, `optimizer.step()`. What it adds: batches that do not depend on the
    ranks, gradients averaged over groups of ranks, regularization of layers (S. Guenther, L. Ruthotto, J. B. Schroder,
    E. C. Cyr, N. R. Gauger, SIAM J. Math. Data Sci. 2, 2020), cycles that follow the gradient's error, and, on a GPU,
    gradients as CUDA graphs. Samples stay on the host, and go batch by batch to where the network is.
    A loop of your own needs none of it: a `LayerParallel` network is an ordinary module.

    A checkpoint holds all that the run goes on from, to the last bit: weights, buffers, the optimizer's state, cycles,
    random states, and the place in the epoch. Inside `interruptible()`, a signal ends the run after its batch, with a
    checkpoint.

    Args:
        network: the classifier, samples (batch, ...) to scores (batch, classes); equal outside of its layer-parallel
            parts on all ranks.
        data: the samples, whole on each rank.
        settings: how.
        groups: of ranks; the network's layers are on `groups.layers`.
        observe: called after each epoch, on all ranks.
        problem: what else must be equal where a run goes on, as JSON values: depth, width, activation.
        optimizer: any of torch, of the network's parameters; by default the one that the settings name. `KFAC` and
            `HessianFree` call the loss as often as they need; on several groups they take `groups.data` as their team.

    Attributes:
        history: records of the epochs so far.
        control: sets the cycles of the layers; `control.bias` has measured errors of gradients.
        residuals: of MGRIT, forward and adjoint, in the last batch.
        files: the checkpoints of the run; `files.signal` is what has ended it.
        costs: seconds of batches of first order, for reading samples ("disk"), forward and backward passes; those of a
            CUDA graph are "backward".
        captured: gradients as CUDA graphs, where that was asked for and may be.

    Raises:
        InputError: an optimizer of second order of another network, or without its team; what it refuses, as dropout; a
            file to restart from that is no checkpoint of such a network, run and data.

    Example:
        >>> layers = LayerParallel(None, lambda: dense(8), 64)
        >>> network = nn.Sequential(nn.Linear(2, 8), layers, nn.Linear(8, 5))
        >>> last = Training(network, load_dataset("peaks"), TrainingSettings(epochs=20)).run()
    """

    network: nn.Module
    data: Dataset
    settings: TrainingSettings
    groups: Groups = field(default_factory=lambda: Groups(MPI.COMM_SELF))
    observe: Callable[[Epoch], None] = lambda epoch: None
    problem: Mapping[str, Any] = field(default_factory=dict)
    history: list[Epoch] = field(default_factory=list)
    optimizer: Any = None
    costs: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("disk", "forward", "backward"), 0.0))

    def __post_init__(self) -> None:
        if self.settings.device:
            self.network.to(checked_device(self.settings.device))
        self.optimizer = self.optimizer or named_optimizer(self.network, self.settings, self.groups.data)
        self.samples = min(self.settings.samples or len(self.data.x_train), len(self.data.x_train))
        self._seconds, self._batches_done = 0.0, 0
        self._losses: list[float] = []  # of the batches of an epoch that is not done
        self.residuals: tuple[list[float], list[float]] = ([], [])
        data, is_second = self.groups.data, isinstance(self.optimizer, SecondOrder)
        check_optimizer(self.optimizer, self.network, data)
        self._sums = GradientSums(self.network, data) if data.size > 1 and not is_second else None
        may_be = self.settings.cuda_graphs == "auto" and not is_second and self.groups.all.size == 1
        is_there = may_be and _device(self.network).type == "cuda"
        self.captured = CapturedGradient(self.network, self._loss_of) if is_there else None
        horizon = HORIZON * -(-self.samples // self.settings.batch)
        limit, every = self.settings.bias_limit or None, self.settings.bias_every
        self.control = CycleControl(self.network, limit, every, horizon, self.groups.all)
        self.files = CheckpointFile(self.settings.checkpoint, 1, self.groups.all, "batch")
        if self.settings.restart:
            self._resume()

    def run(self) -> Epoch:
        """Train for the rest of the epochs. Collective.

        Returns:
            The last epoch's record, with the gradient's error. Where a signal has ended the run before the first epoch
            is done, a record of epoch 0.

        Raises:
            SolveFailure: a loss that is not finite; the last checkpoint is that of the epoch before.
        """
        self._started = time.perf_counter() - self._seconds
        try:
            for epoch in range(len(self.history) + 1, self.settings.epochs + 1):
                self._epoch(epoch)
                self.observe(self.history[-1])
        except Interrupted:  # `files.signal` says so
            pass
        return self.history[-1] if self.history else Epoch(0, math.nan, self.accuracy(), 0.0, self.gradient_error())

    def _epoch(self, epoch: int) -> None:
        """The batches of an epoch that are not done, and its record."""
        set_rate(self.optimizer, self.settings, epoch)
        for number, rows in enumerate(self._batches(epoch), start=1):
            if number > len(self._losses):
                self._losses.append(self._batch(rows, epoch, number))
                self.files.after(self._batches_done, self._save, is_due=False)
        error = self.gradient_error() if epoch == self.settings.epochs else None
        loss, seconds = sum(self._losses) / max(len(self._losses), 1), time.perf_counter() - self._started
        damping = self.optimizer.damping if isinstance(self.optimizer, SecondOrder) else None
        self.history.append(Epoch(epoch, loss, self.accuracy(), seconds, error, damping))
        self._losses = []
        self.files.end(self._batches_done, self._save)

    def _batches(self, epoch: int) -> Iterator[Tensor]:
        """The samples of each batch, those of this rank's group; the same whatever the ranks."""
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + epoch)
        order = torch.randperm(self.samples, generator=generator)
        for rows in order.split(self.settings.batch):
            if len(rows) >= self.groups.data.size:  # every group has a sample
                yield self.groups.rows(rows)

    def _batch(self, rows: Tensor, epoch: int, number: int) -> float:
        """One step of the optimizer; the loss before it."""
        self._batches_done += 1
        rate = self.optimizer.param_groups[0].get("lr", 1.0)
        self.control.before(self._batches_done, rate, lambda: self.loss(rows))
        value = self._step(rows, f"epoch {epoch}, batch {number}")
        self.control.after(self._batches_done, rate)
        return value

    def _step(self, rows: Tensor, where: str) -> float:
        if isinstance(self.optimizer, SecondOrder):
            return _second_order_step(self, rows, where)
        self.optimizer.zero_grad(set_to_none=True)
        value = (_gradient if self.captured is None else _captured_gradient)(self, rows, where)
        for solver in mgrit_solvers(self.network)[:1]:
            self.residuals = solver.residuals
        self.optimizer.step()
        return value

    def loss(self, rows: Tensor) -> Tensor:
        """Mean cross-entropy of samples, and the regularization of this rank's layers."""
        return self._loss_of(*_read(self, rows))

    def _loss_of(self, x: Tensor, y: Tensor) -> Tensor:
        is_second = isinstance(self.optimizer, SecondOrder)  # whose loss keeps what it needs of the targets
        loss = self.optimizer.model.likelihood if is_second else nn.functional.cross_entropy
        value = loss(self.network(x), y)
        return regularized(value, self.network, self.settings.tikhonov, self.settings.smoothness)  # type: ignore[no-any-return]

    def gradient_error(self) -> float:
        """The relative error of the gradient of the first batch. Collective."""
        if not self.control.solvers or self.control.why_serial or self.samples == 0:
            return 0.0
        rows = torch.arange(min(self.settings.batch, self.samples))
        return measure_bias(self.network, lambda: self.loss(rows))

    @torch.no_grad()
    def predict(self, x: Tensor, chunk: int = 2000) -> Tensor:
        """Classes (samples,) of samples (samples, ...), all layers one after the other. Collective."""
        chunk = max(1, min(chunk, NUMBERS // max(x[0].numel(), 1))) if len(x) else chunk
        device = _device(self.network)
        with exactly(self.network):
            return torch.cat([self.network(part.to(device)).argmax(1).cpu() for part in x.split(chunk)])

    def accuracy(self) -> float:
        """Share of the test samples that are classified rightly, all layers one after the other. Collective."""
        return float((self.predict(self.data.x_test) == self.data.y_test).double().mean())

    def confusion(self) -> Array:
        """Test samples of each class (rows) by what they are taken for (columns), (classes, classes). Collective."""
        table = np.zeros((self.data.classes, self.data.classes), dtype=int)
        np.add.at(table, (self.data.y_test.numpy(), self.predict(self.data.x_test).numpy()), 1)
        return table

    # -- checkpoints ---------------------------------------------------------------------------------------

    @cached_property
    def _fingerprint(self) -> dict[str, Any]:
        data, own = self.data, {k: v for k, v in asdict(self.settings).items() if k not in FREE}
        samples = digest(data.x_train[: self.samples], data.y_train[: self.samples], data.x_test, data.y_test)
        if isinstance(self.optimizer, SecondOrder):
            own |= {f"{self.settings.optimizer}.{name}": value for name, value in vars(self.optimizer.settings).items()}
        return {**self.problem, **own, "samples": self.samples, "data": samples}

    def _save(self) -> None:
        rows = [[math.nan if each is None else each for each in asdict(epoch).values()] for epoch in self.history]
        run = {
            "batches": self._batches_done,
            "losses": self._losses,
            "seconds": time.perf_counter() - self._started,
            "control": self.control.state(),
            "residuals": self.residuals,
        }
        table = torch.tensor(rows, dtype=torch.float64).reshape(len(rows), 6)
        path = self.settings.checkpoint
        save_checkpoint(path, self.network, self.optimizer, self.groups.all, self._fingerprint, run, table)

    def _resume(self) -> None:
        path = self.settings.restart
        run, table = load_checkpoint(path, self.network, self.optimizer, self.groups.all, self._fingerprint)
        for number, *row, error, damping in table.tolist():
            rest = (None if math.isnan(each) else each for each in (error, damping))
            self.history.append(Epoch(int(number), *row, *rest))
        self._batches_done, self._losses, self._seconds = run["batches"], run["losses"], run["seconds"]
        self.residuals = tuple(run["residuals"])  # type: ignore[assignment]
        self.control.go_on_from(run["control"])


def _gradient(training: Training, rows: Tensor, where: str) -> float:
    """Set the gradient of a batch; its loss, the mean over the samples of all ranks."""
    begin, read = time.perf_counter(), training.costs["disk"]
    loss = training.loss(rows)
    value = _finite(_mean(float(loss.detach()), len(rows), training.groups.data), where)
    middle = time.perf_counter()
    training.costs["forward"] += middle - begin - (training.costs["disk"] - read)
    if training._sums is not None:
        training._sums.samples = len(rows)
    loss.backward()  # type: ignore[no-untyped-call]
    if training._sums is not None:
        training._sums.finish()
    training.costs["backward"] += time.perf_counter() - middle
    return value


def _captured_gradient(training: Training, rows: Tensor, where: str) -> float:
    """As `_gradient`, on a device, as a CUDA graph."""
    assert training.captured is not None
    samples, begin = _read(training, rows), time.perf_counter()
    value = _finite(float(training.captured(*samples)), where)
    training.costs["backward"] += time.perf_counter() - begin
    return value


def _read(training: Training, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Samples and their classes, where the network is."""
    begin, device = time.perf_counter(), _device(training.network)
    x, y = (part[rows].to(device) for part in (training.data.x_train, training.data.y_train))
    training.costs["disk"] += time.perf_counter() - begin
    return x, y


def _device(network: nn.Module) -> torch.device:
    return next((parameter.device for parameter in network.parameters()), torch.device("cpu"))


def _finite(value: float, where: str) -> float:
    """A loss; raises `SolveFailure` where it is none."""
    if not math.isfinite(value):
        raise SolveFailure(
            f"the loss is {value} in {where}", "a smaller -lr; -restart goes on from the last checkpoint"
        )
    return value


def _mean(own: float, samples: int, comm: Any) -> float:
    """The mean over the samples of all ranks."""
    if comm.size == 1:
        return own
    total, count = comm.allreduce(np.array([own * samples, samples]))
    return float(total / count)


def _second_order_step(training: Training, rows: Tensor, where: str) -> float:
    """A step of an optimizer that calls the loss itself; the loss before it, with all layers' regularization."""
    network, own, layers = training.network, training.settings, training.groups.layers
    is_spread = layers.size > 1 and (own.tikhonov > 0.0 or own.smoothness > 0.0)

    def closure() -> Tensor:
        training.optimizer.zero_grad()
        value = training.loss(rows)
        value.backward()  # type: ignore[no-untyped-call]
        if not is_spread:
            return value.detach()
        with torch.no_grad():  # the same number, to the last bit, on all ranks that share the layers
            part = float(regularized(torch.zeros(()), network, own.tikhonov, own.smoothness))
        whole = float(value) - part + layers.allreduce(part)
        return torch.tensor(layers.bcast(whole), dtype=torch.float64)

    try:
        value = training.optimizer.step(closure)
    except SolveFailure as failure:
        remedy = f"{failure.remedy}; -restart goes on from the last checkpoint"
        raise SolveFailure(f"{failure.what}, in {where}", remedy) from failure
    for solver in mgrit_solvers(network)[:1]:
        training.residuals = solver.residuals
    return _mean(float(value), len(rows), training.groups.data)
