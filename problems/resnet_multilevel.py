"""A residual network on a subset of Fashion-MNIST, or other images, by optimizers of several levels and of one.

The images are averaged over squares of 4 x 4 pixels and standardized. The weights are random on the coarsest level and
prolonged: layers that stand for one coarse layer begin equal, for all optimizers. The coarser levels have half the
layers each, and a part of the samples.

    python -m problems.resnet_multilevel -data_dir DATA -optimizer rmtr -opt_monitor
    python -m problems.resnet_multilevel -data_dir DATA -optimizer tr -tr_memory 5 -summary run.json
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from mpi4py import MPI
from petsc4py import PETSc
from torch import Tensor, nn
from torch.nn import functional as F

from nn_adapters.data.datasets import DATASET_NAMES, load_dataset
from nn_adapters.layers.blocks import ACTIVATIONS, dense
from nn_adapters.losses.depth import ResNet, depth_hierarchy
from nn_adapters.losses.network import NetworkLoss
from pdeopt.control.checkpoint import replace_file
from pdeopt.core.errors import InputError
from pdeopt.core.monitor import History, Result
from pdeopt.core.options import require_all_read
from pdeopt.core.settings import Settings, read, setting
from pdeopt.functions.hierarchy import Hierarchy
from pdeopt.optimize.descent.minimizer import Minimizer, StopSettings
from pdeopt.optimize.descent.multilevel import MGOPT, MGOPTSettings
from pdeopt.optimize.descent.quasinewton import LBFGS, LBFGSSettings
from pdeopt.optimize.descent.rmtr import RMTR, RMTRSettings
from pdeopt.optimize.descent.trust import TrustRegionMinimizer, TrustSettings
from problems.shared.case import command_line, start

#: Optimizers by name, and what replaces their defaults.
OPTIMIZERS: dict[str, tuple[type[Minimizer], dict[str, Any]]] = {
    "rmtr": (RMTR, {"cycle": "F", "start": "nested", "nested": 40, "pre": 0}),
    "mgopt": (MGOPT, {"start": "nested"}),
    "tr": (TrustRegionMinimizer, {}),
    "lbfgs": (LBFGS, {}),
}
MULTILEVEL = ("rmtr", "mgopt")


@dataclass(frozen=True)
class ResNetSettings(Settings):
    """Network, data and optimizer."""

    data: str = setting("fashion_mnist", "data set of images", choices=DATASET_NAMES)
    samples: int = setting(2000, "training samples, of a random subset", at_least=1)
    pool: int = setting(4, "pixels on a side of the squares that are averaged; 1 for small images", at_least=1)
    layers: int = setting(32, "residual layers", at_least=1)
    width: int = setting(32, "features", at_least=1)
    Tf: float = setting(3.0, "time of the layers", above=0)
    activation: str = setting("tanh", "activation", choices=tuple(ACTIVATIONS))
    tikhonov: float = setting(1e-4, "factor of 1/2 |parameters|^2", at_least=0)
    levels: int = setting(3, "levels, each of half the layers; also for the start of one level", at_least=1)
    coarse_samples: float = setting(0.5, "part of the samples that the next coarser level has", above=0, at_most=1)
    optimizer: str = setting(
        "rmtr", "recursive trust region, MG/OPT, or one level: trust region, L-BFGS", choices=tuple(OPTIMIZERS)
    )
    seed: int = setting(0, "of the subsets and the weights")


@dataclass(frozen=True)
class FileSettings(Settings):
    """What is written, and where data come from."""

    data_dir: str = setting("", "folder of data sets")
    fetch: bool = setting(False, "download the data set where it is missing")
    summary: str = setting("", "write a summary to this .json file")


class Classification:
    """The hierarchy of networks for a data set.

    Args:
        settings: of the problem.
        files: where the data come from.

    Attributes:
        hierarchy: of the losses, one level for optimizers of one level.
        start: parameters, (size,).

    Raises:
        InputError: layers that cannot be halved as often, more samples than there are, data that are missing.
    """

    def __init__(self, settings: ResNetSettings, files: FileSettings) -> None:
        factor = 2 ** (settings.levels - 1)
        if settings.layers % factor:
            raise InputError("-layers", f"{settings.layers} on {settings.levels} levels", f"a multiple of {factor}")
        data = load_dataset(settings.data, files.data_dir, files.fetch, settings.seed)
        if settings.samples > len(data.x_train):
            raise InputError("-samples", settings.samples, f"1 to {len(data.x_train)}")
        generator = torch.Generator().manual_seed(settings.seed)
        order = torch.randperm(len(data.x_train), generator=generator)[: settings.samples]
        x, self.x_test = _features(settings.pool, data.x_train[order], data.x_test)
        self.settings, self.y_test = settings, data.y_test
        torch.manual_seed(settings.seed)
        losses = []
        for level in range(settings.levels):
            count = math.ceil(settings.samples * settings.coarse_samples**level)  # the order is random: so are subsets
            network = self._network(x.shape[1], data.classes, settings.layers >> level)
            losses.append(NetworkLoss(network, F.cross_entropy, x[:count], data.y_train[order][:count]))
        whole = depth_hierarchy(losses, settings.tikhonov)
        self.loss, y = losses[0], losses[-1].parameters() * whole.functions[-1].scale
        for transfer in reversed(whole.transfers):
            y = transfer.prolong(y)
        self.start = y
        self.hierarchy = whole if settings.optimizer in MULTILEVEL else Hierarchy(whole.functions[:1])

    def _network(self, features: int, classes: int, layers: int) -> ResNet:
        settings = self.settings
        opening = nn.Sequential(nn.Linear(features, settings.width), ACTIVATIONS[settings.activation]())
        head = nn.Linear(settings.width, classes)
        return ResNet(opening, lambda: dense(settings.width, settings.activation), layers, head, settings.Tf)

    def accuracy(self, theta: Tensor) -> float:
        """On the test samples."""
        return float((self.loss.predict(theta, self.x_test).argmax(1) == self.y_test).double().mean())


def _features(pool: int, *images: Tensor) -> list[Tensor]:
    """Means over squares, standardized by those of the first images: (samples, features), double precision."""
    pooled = [F.avg_pool2d(part.double(), pool).flatten(1) for part in images]
    mean, deviation = pooled[0].mean(0), pooled[0].std(0)
    return [(part - mean) / (deviation + 1e-3) for part in pooled]


def main(argv: Sequence[str] | None = None) -> float:
    """Train as the options say; the test accuracy."""
    sections = [
        (ResNetSettings, "Network"),
        (FileSettings, "Files"),
        (RMTRSettings, "-rmtr_*"),
        (MGOPTSettings, "-mgopt_*"),
        (TrustSettings, "-tr_*"),
        (LBFGSSettings, "-lbfgs_*"),
        (StopSettings, "-opt_*"),
    ]
    with command_line(argv, __doc__, *sections):
        settings, files = read(ResNetSettings), read(FileSettings)
        problem = Classification(settings, files)
        kind, defaults = OPTIMIZERS[settings.optimizer]
        optimizer, accuracies = kind(problem.hierarchy, max_it=50, **defaults), []

        def observe(minimizer: Any, history: History) -> None:
            if len(history) == 1:
                require_all_read()
            accuracies.append(problem.accuracy(minimizer.x))

        result = optimizer.minimize(problem.start, observers=[observe])
        write(settings, files, problem, result, accuracies)
        return accuracies[-1]


def write(
    settings: ResNetSettings, files: FileSettings, problem: Classification, result: Result, accuracies: list[float]
) -> None:
    """Say how it ended, and write the summary."""
    last = result.history[-1]
    PETSc.Sys.Print(
        f"resnet_multilevel, {settings.optimizer}: loss {last.objective:.5f}, test accuracy "
        f"{accuracies[-1]:.4f}, work {last.work:.1f} ({result.message})",
        comm=MPI.COMM_WORLD,
    )
    if files.summary:
        summary = {
            "problem": "resnet_multilevel",
            "loss": last.objective,
            "test_accuracy": accuracies[-1],
            "levels": len(problem.hierarchy),
            "costs": [f.costs.gradient for f in problem.hierarchy.functions],
            "iterations": last.iteration,
            "gradients": last.gradients,
            "values": last.values,
            "hessian_products": last.hessian_products,
            "work": last.work,
            "reason": result.reason.name,
            "history": {**result.history.columns(), "test_accuracy": accuracies},
            "parameters": asdict(settings),
        }
        replace_file(files.summary, (json.dumps(summary, indent=2) + "\n").encode())


if __name__ == "__main__":
    start(main)
