"""Digits by a dense network, trained on large batches: LARS, LAMB, K-FAC, warm-up, and pictures of the curvature.

python -m problems.large_batch                                           # scikit-learn's digits
python -m problems.large_batch -data_dir DATA                            # batch 8192, LARS
python -m problems.large_batch -data_dir DATA -optimizer sgd -batch 128
python -m problems.large_batch -data_dir DATA -optimizer sgd -scaling linear -warmup 0   # does not train
python -m problems.large_batch -data_dir DATA -sharpness true -spectrum true -beside small.json,full.json -plot a.png
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import nn_adapters as nna
import pdeopt as po
from nn_adapters.curvature import FisherMatrix, curved_layers
from nn_adapters.training import COURSES, SCALINGS
from problems.shared import pictures
from problems.shared.command_line import start
from problems.shared.curvature_training import CurvatureScript, dense_network
from problems.shared.fit_steps import Fit, FitSettings, FitSteps, hidden_widths

#: Learning rates by default, those of their batches: of sgd and adam 128, of lars and lamb 8192.
RATES = {"sgd": 0.1, "adam": 1e-3, "lars": 50.0, "lamb": 0.05}
#: Passes through the training samples by default, and steps that are more of them where samples are few.
EPOCHS, STEPS = 20, 140
#: Of the largest eigenvalue: its relative error, and products with the Hessian at most.
ERROR, PRODUCTS = 0.02, 40
#: Steps of Lanczos for the spectrum, and probes.
LANCZOS, PROBES = 50, 1


@dataclass(frozen=True)
class LargeBatchSettings(FitSettings):
    """Data, network and optimizer."""

    samples: int = po.setting(0, "training samples at most; 0 for all", at_least=0)
    pool: bool = po.setting(False, "means of 2x2 pixels")
    activation: str = po.setting("relu", "activation", choices=tuple(nna.ACTIVATIONS))
    weight_norm: bool = po.setting(False, "parametrize weights by length and direction (not with kfac)")
    optimizer: str = po.setting(
        "lars", "optimizer; sgd has momentum 0.9", choices=(*RATES, "kfac"), reads={"kfac": (nna.KFACSettings,)}
    )
    lr: float = po.setting(
        None,
        "learning rate; by default 0.1 of sgd and 1e-3 of adam, for batches of 128, 50 of lars, 0.05 of lamb",
        above=0,
        at_most=1e30,
        kind=float,
    )
    batch: int = po.setting(8192, "samples of a batch; all, where there are fewer", at_least=1)
    scaling: str = po.setting("none", "how the rate grows from -base_batch to -batch", choices=tuple(SCALINGS))
    base_batch: int = po.setting(128, "batch that -lr is for (with -scaling)", at_least=1)
    epochs: int = po.setting(
        None,
        f"passes through the training samples; by default {EPOCHS}, and at least {STEPS} steps",
        at_least=0,
        kind=int,
    )
    warmup: float = po.setting(2.0, "epochs in which the rate grows to its value", at_least=0)
    course: str = po.setting("cosine", "course of the rate after it", choices=tuple(COURSES))
    max_steps: int = po.setting(0, "steps at most, of those that -epochs takes; 0 for all", at_least=0)
    check_every: int = po.setting(
        0, "steps from one evaluation of all samples to the next; 0 for those of an epoch", at_least=0
    )
    weight_decay: float = po.setting(
        0.0, "decay of matrices, not of biases (of kfac: -kfac_decay)", at_least=0, at_most=1e30
    )
    smoothing: float = po.setting(0.0, "smoothing of the labels", at_least=0, at_most=0.99)
    mixup: float = po.setting(0.0, "alpha of running mixup; 0 for none", at_least=0, at_most=1e6)
    erase: float = po.setting(0.0, "share of the images that lose a random rectangle", at_least=0, at_most=1)
    sharpness: bool = po.setting(False, "find the largest eigenvalue of the Hessian at each evaluation")
    spectrum: bool = po.setting(False, "find the spectrum of the Fisher matrix at the end")
    curvature_samples: int = po.setting(1000, "training samples of both", at_least=1)
    beside: str = po.setting("", "summaries of other runs, with commas, whose curves the picture has, too")


class LargeBatchSteps(FitSteps):
    """Steps at a rate that has a course, on samples that may be virtual; curvature on the way."""

    own: LargeBatchSettings
    free = ("max_steps", "beside", "spectrum")

    def __init__(self, task: Fit, own: LargeBatchSettings, comm: Any) -> None:
        if own.spectrum:
            curved_layers(task.network)  # raises what the end of the run would
        read_summaries(own.beside)
        self.rate = 0.0
        super().__init__(task, own, comm)
        classes = task.network(task.x[:1]).shape[1]
        self.mix = nna.RunningMixup(classes, own.mixup, own.seed) if own.mixup else None
        self.erasing = torch.Generator().manual_seed(own.seed)
        warmup = min(round(own.warmup * self.per_epoch), self.whole)
        self.course = nna.Course(self.whole, warmup, own.course)
        self.sharpness: list[tuple[float, float]] = []

    @property
    def per_epoch(self) -> int:
        """Steps of an epoch; samples that fill no batch are left out."""
        return max(1, len(self.task.x) // self.own.batch)

    @property
    def whole(self) -> int:
        """Steps of all epochs."""
        if self.own.epochs is not None:
            return self.own.epochs * self.per_epoch
        return max(EPOCHS, -(-STEPS // self.per_epoch)) * self.per_epoch

    @property
    def most(self) -> int:
        return min(self.own.max_steps or self.whole, self.whole)

    @property
    def every(self) -> int:
        return self.own.check_every or self.per_epoch

    def make_optimizer(self) -> Any:
        own, network = self.own, self.task.network
        if own.optimizer == "kfac":
            return super().make_optimizer()
        batch = min(own.batch, len(self.task.x))
        self.rate = nna.scaled_rate(own.lr or RATES[own.optimizer], batch, own.base_batch, own.scaling)
        if own.optimizer in ("lars", "lamb"):
            kind = nna.LARS if own.optimizer == "lars" else nna.LAMB
            return kind(nna.layerwise_groups(network, own.weight_decay), lr=self.rate)
        groups = nna.parameter_groups(network, own.weight_decay)
        if own.optimizer == "adam":
            return torch.optim.AdamW(groups, lr=self.rate)
        return torch.optim.SGD(groups, lr=self.rate, momentum=0.9)

    def samples(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        x, y = super().samples(rows)
        if self.own.erase:
            x = nna.erase_rectangles(x, self.own.erase, self.erasing)
        return self.mix(x, y) if self.mix else (x, y)

    def step(self) -> float:
        if self.rate:
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate * self.course(self.count)
        return super().step()

    def observe(self) -> None:
        if self.own.sharpness:
            x, y = (part[: self.own.curvature_samples] for part in (self.task.x, self.task.y))
            H = nna.HessianMatrix(self.task.network, self.task.loss, [(x, y)])
            start = torch.randn(H.size, generator=torch.Generator().manual_seed(self.own.seed)).to(x)
            self.sharpness.append((self.epochs, nna.largest_eigenvalue(H.times, start, ERROR, PRODUCTS).value))

    def found(self) -> dict[str, Any]:
        own, more = self.own, dict[str, Any]()
        if own.sharpness:
            more["sharpness"] = dict(zip(("epochs", "value"), map(list, zip(*self.sharpness))))
        if own.spectrum:
            x, layers = self.task.x[: own.curvature_samples], curved_layers(self.task.network)
            F = FisherMatrix(self.task.network, layers, self.task.loss, [(x,)])
            size = sum(p.numel() for layer in layers for p in layer.parameters)
            found = nna.spectral_density(F.times, size, LANCZOS, PROBES, own.seed, x)
            more["spectrum"] = {"values": found.values.tolist(), "counts": (size * found.weights).tolist()}
        return {"samples": len(self.task.x), "rate": self.rate or None, **more}

    def memory(self) -> dict[str, Any]:
        mix = {f"mix.{name}": value for name, value in self.mix.memory().items()} if self.mix else {}
        sharpness = torch.tensor(self.sharpness, dtype=torch.float64).reshape(-1, 2)
        return {**super().memory(), **mix, "erasing": self.erasing.get_state(), "sharpness": sharpness}

    def recall(self, memory: dict[str, Any]) -> None:
        super().recall(memory)
        if self.mix:
            self.mix.recall({name[4:]: value for name, value in memory.items() if name[:4] == "mix."})
        self.erasing.set_state(memory["erasing"])
        self.sharpness = [(epoch, value) for epoch, value in memory["sharpness"].tolist()]


def read_summaries(paths: str) -> list[dict[str, Any]]:
    """Summaries of other runs.

    Args:
        paths: of their files, with commas between them.

    Raises:
        InputError: a file that is none.
    """
    found = []
    for path in filter(None, paths.split(",")):
        try:
            run = json.loads(Path(path).read_text())
            if run["problem"]["name"] != "large_batch" or not {"history", "samples"} <= set(run):
                raise KeyError
        except (OSError, ValueError, TypeError, KeyError):
            raise po.InputError("-beside", path, "summaries of problems.large_batch (-summary FILE)") from None
        found.append(run)
    return found


def task(own: LargeBatchSettings, data: nna.Dataset) -> Fit:
    """Cross-entropy of the classes."""
    sizes = [data.x_train.shape[1:].numel(), *hidden_widths(own.widths, (500, 500)), data.classes]
    network = dense_network(sizes, own.activation).to(data.x_train.dtype)
    if own.weight_norm:
        nna.weight_norm(network)
    loss = nna.CrossEntropy(smoothing=own.smoothing)
    return Fit(network, loss, data.x_train, data.y_train, data.x_test, data.y_test, True)


def picture(name: str, found: dict[str, Any]) -> Any:
    """Loss and sharpness over the epochs, and the spectrum at the end, of this run and of those beside it."""
    runs = [found, *read_summaries(found["problem"]["beside"])]
    has = {part: any(part in run for run in runs) for part in ("sharpness", "spectrum")}
    figure = pictures.new_figure(4.4 * (1 + sum(has.values())), 3.8)
    axes = iter(figure.subplots(1, 1 + sum(has.values()), squeeze=False)[0])
    loss, sharp = next(axes), next(axes) if has["sharpness"] else None
    spectral = next(axes) if has["spectrum"] else None
    for run in runs:
        own, history, samples = run["problem"], run["history"], run["samples"]
        label = f"{own['optimizer']}, batch {min(own['batch'], samples)}"
        epochs = np.array(history["steps"]) * min(own["batch"], samples) / samples
        loss.semilogy(epochs, history["loss"], label=f"{label}: {100 * run['test_accuracy']:.1f} %")
        if sharp is not None and "sharpness" in run:
            sharp.semilogy(run["sharpness"]["epochs"], run["sharpness"]["value"], label=label)
        if spectral is not None and "spectrum" in run:
            values, counts = (np.array(run["spectrum"][key]) for key in ("values", "counts"))
            kept = values > 1e-6 * values.max()
            above = np.cumsum(counts[kept][::-1])[::-1]
            spectral.loglog(values[kept], np.maximum(above, 0.5), label=label)
    loss.set(title="loss of all training samples, and test accuracy", xlabel="epoch")
    if sharp is not None:
        sharp.set(title="largest eigenvalue of the Hessian", xlabel="epoch")
    if spectral is not None:
        spectral.set(title="Fisher matrix at the end", xlabel="eigenvalue", ylabel="eigenvalues at least as large")
    for axis in figure.axes:
        axis.legend(fontsize="small")
    return figure


SCRIPT = CurvatureScript("large_batch", __doc__, task, (), {}, LargeBatchSettings, LargeBatchSteps, picture)
OPTIONS = SCRIPT.options


def main(argv: Sequence[str] | None = None) -> float:
    """Train; the loss of all training samples."""
    return SCRIPT.run(argv)


if __name__ == "__main__":
    start(main)
