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

from nn_adapters.data.dataset import Dataset
from nn_adapters.layers.layerparallel import LayerParallel
from nn_adapters.layers.parallelmodule import exactly, measure_bias, mgrit_solvers
from nn_adapters.parallel.gradientsums import GradientSums
from nn_adapters.parallel.groups import Groups
from nn_adapters.training.checkpoint import load_checkpoint, save_checkpoint
from nn_adapters.training.regularize import smoothness, tikhonov
from pdeopt.core.arrays import Array
from pdeopt.core.errors import SolveFailure
from pdeopt.core.interrupt import Interrupted
from pdeopt.core.settings import Settings, setting
from pdeopt.core.storage import digest
from pdeopt.optimize.checkpoint import CheckpointFile


@dataclass(frozen=True)
class TrainingSettings(Settings):
    """Training."""

    epochs: int = setting(10, "passes through the training samples", at_least=0)
    batch: int = setting(100, "samples of a batch", at_least=1)
    lr: float = setting(1e-3, "learning rate", above=0, at_most=1e30)
    optimizer: str = setting("adam", "optimizer of PyTorch", choices=("adam", "sgd", "adamw"))
    schedule: str = setting("cosine", "course of the learning rate over the run", choices=("constant", "cosine"))
    tikhonov: float = setting(0.0, "weight of |theta|^2 / 2, theta the parameters of the layers", at_least=0)
    smoothness: float = setting(0.0, "weight of sum |d theta / dt|^2 / 2, differences from layer to layer", at_least=0)
    seed: int = setting(0, "seed of the first weights and of the batches", at_least=0)
    samples: int = setting(0, "training samples that are used; 0 for all", at_least=0)
    bias_every: int = setting(
        0, "batches between measurements of the gradient's error; 0 for the end alone", at_least=0
    )
    bias_limit: float = setting(
        None,
        "relative error of the gradient above which a cycle is added, and below a tenth of which one is taken away "
        "(with -bias_every)",
        above=0,
        kind=float,
    )
    layer_ranks: int = setting(
        0, "ranks of a group that shares the layers; 0 for one group of all. Groups share each batch", at_least=0
    )
    nested: int = setting(
        1,
        "levels of nested iteration: half the layers on each shallower one, the same work on all, together as much as "
        "-epochs at full depth",
        at_least=1,
    )
    checkpoint: str = setting("", "file for checkpoints, written after each epoch")
    restart: str = setting("", "checkpoint from which training goes on")


@dataclass
class Epoch:
    """What is known after an epoch.

    Attributes:
        epoch: its number, from 1.
        loss: the mean of the batches' losses, before their steps.
        accuracy: share of the test samples that are classified rightly, run serially.
        seconds: since the start of the run, over restarts.
        gradient_error: relative, where it was measured.
    """

    epoch: int
    loss: float
    accuracy: float
    seconds: float
    gradient_error: float | None = None


#: Settings that may change where a run goes on: how far, how fast, and on which ranks.
FREE = ("epochs", "lr", "schedule", "layer_ranks", "checkpoint", "restart")


@dataclass
class GradientBias:
    """The error of a gradient that came from inexact solves.

    Attributes:
        batch: number of the batch, from 1.
        error: relative to the gradient of exact solves.
        cycles: forward and adjoint ones that gave it.
        rate: step size with which it entered.
    """

    batch: int
    error: float
    cycles: tuple[int, int]
    rate: float


@dataclass
class Training:
    """One training run of a classifier with cross-entropy: batches, evaluation, checkpoints, error of gradients.

    The loop is that of PyTorch: loss, `backward`, `optimizer.step()`. What it adds: batches that do not depend on the
    ranks, gradients averaged over groups of ranks, regularization of layers (S. Guenther, L. Ruthotto, J. B. Schroder,
    E. C. Cyr, N. R. Gauger, SIAM J. Math. Data Sci. 2, 2020), and cycles that follow the gradient's error.
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

    Attributes:
        optimizer: of torch.
        history: records of the epochs so far.
        bias: measured errors of gradients.
        residuals: of MGRIT, forward and adjoint, in the last batch.
        files: the checkpoints of the run; `files.signal` is what has ended it.

    Raises:
        InputError: a file to restart from that is no checkpoint of such a network, run and data.

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
    bias: list[GradientBias] = field(default_factory=list)

    def __post_init__(self) -> None:
        kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
        words = {"momentum": 0.9} if self.settings.optimizer == "sgd" else {}
        self.optimizer = kinds[self.settings.optimizer](self.network.parameters(), lr=self.settings.lr, **words)
        self.samples = min(self.settings.samples or len(self.data.x_train), len(self.data.x_train))
        self._seconds, self._batches_done = 0.0, 0
        self._losses: list[float] = []  # of the batches of an epoch that is not done
        self.residuals: tuple[list[float], list[float]] = ([], [])
        data = self.groups.data
        self._sums = GradientSums(self.network, data) if data.size > 1 else None
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
        for group in self.optimizer.param_groups:
            group["lr"] = _rate(self.settings, epoch)
        for number, rows in enumerate(self._batches(epoch), start=1):
            if number > len(self._losses):
                self._losses.append(self._batch(rows, epoch, number))
                self.files.after(self._batches_done, self._save, is_due=False)
        error = self.gradient_error() if epoch == self.settings.epochs else None
        loss, seconds = sum(self._losses) / max(len(self._losses), 1), time.perf_counter() - self._started
        self.history.append(Epoch(epoch, loss, self.accuracy(), seconds, error))
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
        if self.settings.bias_every and self._batches_done % self.settings.bias_every == 0:
            self._measure(rows)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(rows)
        value = _mean(float(loss.detach()), len(rows), self.groups.data)
        if not math.isfinite(value):
            raise SolveFailure(
                f"the loss is {value} in epoch {epoch}, batch {number}",
                "a smaller -lr; -restart goes on from the last checkpoint",
            )
        if self._sums is not None:
            self._sums.samples = len(rows)
        loss.backward()
        for solver in mgrit_solvers(self.network)[:1]:
            self.residuals = solver.residuals
        if self._sums is not None:
            self._sums.finish()
        self.optimizer.step()
        return value

    def _measure(self, rows: Tensor) -> None:
        """Compare the gradient of a batch with the exact one; add or take away a cycle where a limit asks for it.

        SGD with gradients of relative errors b_k and step lengths a_k converges if sum a_k b_k is bounded.
        """
        solvers, rate = mgrit_solvers(self.network), self.optimizer.param_groups[0]["lr"]
        if not solvers or not solvers[0].factors:
            return
        cycles = solvers[0].forward.cycles, solvers[0].adjoint.cycles
        error = measure_bias(self.network, lambda: self.loss(rows))
        self.bias.append(GradientBias(self._batches_done, error, cycles, rate))
        limit = self.settings.bias_limit
        if limit is None:
            return
        change = 1 if error > limit else -1 if error < 0.1 * limit else 0
        for each in solvers:
            for solver in (each.forward, each.adjoint):
                solver.cycles = max(solver.cycles + change, 1)

    @property
    def accumulated_bias(self) -> float:
        """sum a_k b_k over all batches; a measured error b_k stands for those of the batches after it, too."""
        ends = [each.batch for each in self.bias[1:]] + [self._batches_done + 1]
        return sum(each.rate * each.error * (end - each.batch) for each, end in zip(self.bias, ends))

    def loss(self, rows: Tensor) -> Tensor:
        """Mean cross-entropy of samples, and the regularization of this rank's layers."""
        value = nn.functional.cross_entropy(self.network(self.data.x_train[rows]), self.data.y_train[rows])
        for part in self.network.modules():
            if isinstance(part, LayerParallel):
                if self.settings.tikhonov:
                    value = value + self.settings.tikhonov * tikhonov(part)
                if self.settings.smoothness:
                    value = value + self.settings.smoothness * smoothness(part)
        return value

    def gradient_error(self) -> float:
        """The relative error of the gradient of the first batch. Collective."""
        if not any(solver.factors for solver in mgrit_solvers(self.network)) or self.samples == 0:
            return 0.0
        rows = torch.arange(min(self.settings.batch, self.samples))
        return measure_bias(self.network, lambda: self.loss(rows))

    @torch.no_grad()
    def predict(self, x: Tensor, chunk: int = 2000) -> Tensor:
        """Classes (samples,) of samples (samples, ...), all layers one after the other. Collective."""
        with exactly(self.network):
            return torch.cat([self.network(part).argmax(1) for part in x.split(chunk)])

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
        return {**self.problem, **own, "samples": self.samples, "data": samples}

    def _save(self) -> None:
        rows = [[math.nan if each is None else each for each in asdict(epoch).values()] for epoch in self.history]
        run = {
            "batches": self._batches_done,
            "losses": self._losses,
            "seconds": time.perf_counter() - self._started,
            "cycles": [(each.forward.cycles, each.adjoint.cycles) for each in mgrit_solvers(self.network)],
            "bias": [asdict(each) for each in self.bias],
            "residuals": self.residuals,
        }
        table = torch.tensor(rows, dtype=torch.float64).reshape(len(rows), 5)
        path = self.settings.checkpoint
        save_checkpoint(path, self.network, self.optimizer, self.groups.all, self._fingerprint, run, table)

    def _resume(self) -> None:
        path = self.settings.restart
        run, table = load_checkpoint(path, self.network, self.optimizer, self.groups.all, self._fingerprint)
        for number, *row, error in table.tolist():
            self.history.append(Epoch(int(number), *row, None if math.isnan(error) else error))
        self._batches_done, self._losses, self._seconds = run["batches"], run["losses"], run["seconds"]
        self.bias = [GradientBias(**each | {"cycles": tuple(each["cycles"])}) for each in run["bias"]]
        self.residuals = tuple(run["residuals"])  # type: ignore[assignment]
        if self.settings.bias_limit is not None:
            for solver, (forward, adjoint) in zip(mgrit_solvers(self.network), run["cycles"]):
                solver.forward.cycles, solver.adjoint.cycles = forward, adjoint


def _mean(own: float, samples: int, comm: Any) -> float:
    """The mean over the samples of all ranks."""
    if comm.size == 1:
        return own
    total, count = comm.allreduce(np.array([own * samples, samples]))
    return float(total / count)


def _rate(settings: TrainingSettings, epoch: int) -> float:
    """The learning rate of an epoch, from 1."""
    share = (epoch - 1) / max(settings.epochs, 1)
    return settings.lr * (0.5 * (1 + math.cos(math.pi * share)) if settings.schedule == "cosine" else 1.0)
