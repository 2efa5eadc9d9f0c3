"""The training loop of layer-parallel classifiers: batches, evaluation, bias of gradients, checkpoints, groups.

Loss, optimizer and autograd are PyTorch's. Data parallel x layer parallel: `RankGroups` splits a communicator into
groups that share the layers; each group takes its part of a batch, and gradients are averaged over the groups.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nn_adapters.data.datasets import Dataset
from nn_adapters.layers.layerparallel import LayerParallel
from nn_adapters.layers.parallelmodule import exactly, measure_bias, mgrit_solvers
from nn_adapters.training.regularize import smoothness, tikhonov
from pdeopt.core.errors import InputError, SolveFailure, on_root
from pdeopt.core.settings import Settings, setting


@dataclass(frozen=True)
class TrainingSettings(Settings):
    """Options of all training scripts."""

    epochs: int = setting(10, "passes through the training samples", at_least=0)
    batch: int = setting(100, "samples of a batch", at_least=1)
    lr: float = setting(1e-3, "learning rate", above=0)
    optimizer: str = setting("adam", "of torch.optim", choices=("adam", "sgd", "adamw"))
    schedule: str = setting("cosine", "learning rate over the run", choices=("constant", "cosine"))
    tikhonov: float = setting(0.0, "weight of |theta|^2 / 2 of the layers", at_least=0)
    smoothness: float = setting(0.0, "weight of sum |d theta / dt|^2 / 2 of the layers", at_least=0)
    seed: int = setting(0, "of weights and batches", at_least=0)
    samples: int = setting(0, "training samples that are used; 0 for all", at_least=0)
    bias_every: int = setting(
        0, "batches between measurements of the gradient's error; 0 for the end alone", at_least=0
    )
    bias_limit: float = setting(
        None,
        "relative error above which a cycle is added, and below a tenth of which one is "
        "taken away again (with -bias_every)",
        above=0,
        kind=float,
    )
    layer_ranks: int = setting(0, "ranks that share the layers; 0 for all, else data parallel, too", at_least=0)
    nested: int = setting(
        1,
        "levels of nested iteration: half the layers on each shallower one, the same work on all, "
        "as much as `epochs` at full depth",
        at_least=1,
    )
    checkpoint: str = setting("", "write checkpoints to this file, after each epoch")
    restart: str = setting("", "go on from this checkpoint")


class RankGroups:
    """Ranks in groups of `layer_ranks`, `layers` the communicator of a group, `data` that of equal places in groups."""

    def __init__(self, comm: Any, layer_ranks: int = 0) -> None:
        self.all, size = comm, layer_ranks or comm.size
        if comm.size % size:
            raise InputError("-layer_ranks", layer_ranks, f"a number that divides the {comm.size} ranks")
        self.layers = comm.Split(comm.rank // size, comm.rank)
        self.data = comm.Split(comm.rank % size, comm.rank)

    def average(self, gradients: list[Tensor]) -> None:
        """Replace gradients by their mean over the groups. Collective."""
        if self.data.size == 1 or not gradients:
            return
        flat = torch.cat([g.reshape(-1) for g in gradients]).cpu()
        total = torch.empty_like(flat)
        self.data.Allreduce(flat.numpy(), total.numpy())
        parts = (total / self.data.size).split([g.numel() for g in gradients])
        for g, part in zip(gradients, parts):
            g.copy_(part.reshape(g.shape))


@dataclass
class Epoch:
    """What is known after an epoch; the gradient's error where it was measured."""

    epoch: int
    loss: float
    accuracy: float
    seconds: float
    gradient_error: float | None = None


@dataclass
class GradientBias:
    """The relative error of a gradient, the cycles (forward, adjoint) that gave it, and the step that it entered."""

    batch: int
    error: float
    cycles: tuple[int, int]
    rate: float


@dataclass
class Training:
    """One training run.

    Args:
        network: the classifier; equal outside of its layer-parallel parts on all ranks.
        data: the samples, whole on each rank.
        settings: how.
        groups: of ranks.
        observe: called after each epoch.
    """

    network: nn.Module
    data: Dataset
    settings: TrainingSettings
    groups: RankGroups
    observe: Callable[[Epoch], None] = lambda epoch: None
    history: list[Epoch] = field(default_factory=list)
    bias: list[GradientBias] = field(default_factory=list)

    def __post_init__(self) -> None:
        kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
        words = {"momentum": 0.9} if self.settings.optimizer == "sgd" else {}
        self.optimizer = kinds[self.settings.optimizer](self.network.parameters(), lr=self.settings.lr, **words)
        self.samples = min(self.settings.samples or len(self.data.x_train), len(self.data.x_train))
        self._started, self._batches_done = 0.0, 0
        self.residuals: tuple[list[float], list[float]] = ([], [])  # of MGRIT, in the last batch
        if self.settings.restart:
            self._restore(self.settings.restart)

    def run(self) -> Epoch:
        """Train for the rest of the epochs; the last epoch's record, with the gradient's error. Collective.

        Raises:
            SolveFailure: a loss that is not finite; the last checkpoint is that of the epoch before.
        """
        self._started = time.perf_counter() - (self.history[-1].seconds if self.history else 0.0)
        for epoch in range(len(self.history) + 1, self.settings.epochs + 1):
            self._set_rate(epoch)
            losses = [self._batch(rows, epoch, number) for number, rows in enumerate(self._batches(epoch), start=1)]
            error = self.gradient_error() if epoch == self.settings.epochs else None
            seconds = time.perf_counter() - self._started
            self.history.append(Epoch(epoch, sum(losses) / max(len(losses), 1), self.accuracy(), seconds, error))
            if self.settings.checkpoint:
                self._save(self.settings.checkpoint)
            self.observe(self.history[-1])
        return self.history[-1] if self.history else Epoch(0, math.nan, self.accuracy(), 0.0, self.gradient_error())

    def _set_rate(self, epoch: int) -> None:
        share = (epoch - 1) / max(self.settings.epochs, 1)
        scale = 0.5 * (1 + math.cos(math.pi * share)) if self.settings.schedule == "cosine" else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * scale

    def _batches(self, epoch: int) -> Iterator[Tensor]:
        """The samples of each batch, those of this rank's group; the same whatever the ranks."""
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + epoch)
        order = torch.randperm(self.samples, generator=generator)
        groups = self.groups.data
        for rows in order.split(self.settings.batch):
            own = rows[groups.rank :: groups.size]
            if len(rows) >= groups.size:  # every group has a sample
                yield own

    def _batch(self, rows: Tensor, epoch: int, number: int) -> float:
        """One step of the optimizer; the loss before it."""
        self._batches_done += 1
        if self.settings.bias_every and self._batches_done % self.settings.bias_every == 0:
            self._measure(rows)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(rows)
        value = float(self.groups.data.allreduce(float(loss.detach())) / self.groups.data.size)
        if not math.isfinite(value):
            raise SolveFailure(
                f"the loss is {value} in epoch {epoch}, batch {number}",
                "a smaller -lr; -restart goes on from the last checkpoint",
            )
        loss.backward()
        for solver in mgrit_solvers(self.network)[:1]:
            self.residuals = solver.residuals
        self.groups.average([p.grad for p in self.network.parameters() if p.grad is not None])
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
        """sum a_k b_k over all batches, where the last measured error stands for those that follow it."""
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
        """Of the first batch, relative. Collective."""
        if not any(solver.factors for solver in mgrit_solvers(self.network)) or self.samples == 0:
            return 0.0
        rows = torch.arange(min(self.settings.batch, self.samples))
        return measure_bias(self.network, lambda: self.loss(rows))

    @torch.no_grad()
    def predict(self, x: Tensor, chunk: int = 2000) -> Tensor:
        """Classes of samples, all layers one after the other. Collective."""
        with exactly(self.network):
            return torch.cat([self.network(part).argmax(1) for part in x.split(chunk)])

    def accuracy(self) -> float:
        """Share of the test samples that the weights classify rightly, run serially. Collective."""
        return float((self.predict(self.data.x_test) == self.data.y_test).double().mean())

    def confusion(self) -> np.ndarray:
        """Test samples of each class (rows) by what they are taken for (columns). Collective."""
        table = np.zeros((self.data.classes, self.data.classes), dtype=int)
        np.add.at(table, (self.data.y_test.numpy(), self.predict(self.data.x_test).numpy()), 1)
        return table

    def _tensors(self) -> dict[str, Tensor]:
        """Parameters and the optimizer's state of this rank, by name."""
        found = {}
        for name, parameter in self.network.named_parameters():
            found[f"parameter.{name}"] = parameter.detach()
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if torch.is_tensor(value):
                    found[f"state.{key}.{name}"] = value
        return found

    def _grid_of(self, key: str) -> Any:
        """Where the rows of a tensor live; None if all ranks have it."""
        for name, module in self.network.named_modules():
            inner = f".{name}.stack" if name else ".stack"
            if isinstance(module, LayerParallel) and inner in key:
                return module.grid
        return None

    def _save(self, path: str) -> None:
        """Write a checkpoint, in one piece or not at all. Collective."""
        whole = {}
        for key, value in self._tensors().items():
            grid = self._grid_of(key)
            if grid is not None and value.dim() > 0:
                parts = grid.mpi.gather(value.cpu().numpy())
                value = value if parts is None else torch.from_numpy(np.concatenate(parts))
            whole[key] = value.cpu().contiguous().clone()
        columns = ("epoch", "loss", "accuracy", "seconds")
        whole["history"] = torch.tensor([[getattr(e, c) for c in columns] for e in self.history], dtype=torch.float64)

        def write() -> None:
            beside = Path(path).with_name(Path(path).name + ".part")
            save_file(whole, beside, metadata={"pdeopt": "training", "seed": str(self.settings.seed)})
            os.replace(beside, path)

        on_root(self.groups.all, write)

    def _restore(self, path: str) -> None:
        """Go on from a checkpoint, written on any number of ranks."""
        try:
            with safe_open(path, framework="pt") as file:
                stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise InputError("-restart", f"{path} ({error})", "a checkpoint of this script") from None
        self.history = [Epoch(int(row[0]), *map(float, row[1:])) for row in stored.pop("history", torch.zeros(0, 4))]
        known = dict(self.network.named_parameters())
        for key, value in stored.items():
            kind, _, name = key.partition(".")
            state, name = name.split(".", 1) if kind == "state" else ("", name)
            if name not in known:
                raise InputError("-restart", f"{path} with a parameter {name}", " | ".join(known))
            grid = self._grid_of(key)
            own = value[grid.begin : grid.end].clone() if grid is not None and value.dim() > 0 else value
            if value.dim() > 0 and own.shape != known[name].shape:
                raise InputError("-restart", f"{path}: {name} of shape {tuple(value.shape)}", "a network of this size")
            if kind == "parameter":
                with torch.no_grad():
                    known[name].copy_(own)
            else:
                self.optimizer.state[known[name]][state] = own
