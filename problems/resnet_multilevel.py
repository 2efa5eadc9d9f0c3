"""A residual network on a subset of Fashion-MNIST, or other images, by optimizers of several levels and of one.

The images are averaged over squares of 4 x 4 pixels and standardized. The weights are random on the coarsest level and
prolonged: layers that stand for one coarse layer begin equal, for all optimizers. The coarser levels have half the
layers each, and a part of the samples.

    python -m problems.resnet_multilevel -data_dir DATA -optimizer rmtr -opt_monitor
    python -m problems.resnet_multilevel -data_dir DATA -optimizer tr -tr_memory 5 -summary run.json
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from mpi4py import MPI
from petsc4py import PETSc
from torch import Tensor, nn
from torch.nn import functional as F

import nn_adapters as nna
import pdeopt as po
from pdeopt.core import digest, interruptible, require_memory, sections
from pdeopt.core.memory import DOUBLE
from problems.shared import pictures
from problems.shared.checkpoints import DescentCheckpoints, method_fingerprint
from problems.shared.command_line import command_line, finish, start
from problems.shared.files import CheckpointFiles, DataFiles, ReportFiles, check_targets, write_report
from problems.shared.optimizers import Optimizers

#: Optimizers by name, and what replaces their defaults.
OPTIMIZERS = Optimizers(
    {
        "rmtr": (po.RMTR, {"cycle": "F", "start": "nested", "nested": 40, "pre": 0}),
        "mgopt": (po.MGOPT, {"start": "nested"}),
        "tr": (po.TrustRegionMinimizer, {}),
        "lbfgs": (po.LBFGS, {}),
    },
    stop={"max_it": 50},
)
MULTILEVEL = ("rmtr", "mgopt")


@dataclass(frozen=True)
class ResNetSettings(po.Settings):
    """Network, data and optimizer."""

    data: str = po.setting("fashion_mnist", "data set of images", choices=nna.DATASET_NAMES)
    samples: int = po.setting(2000, "training samples, of a random subset", at_least=1)
    pool: int = po.setting(4, "pixels on a side of the squares that are averaged; 1 for small images", at_least=1)
    layers: int = po.setting(32, "residual layers", at_least=1)
    width: int = po.setting(32, "features of a layer", at_least=1)
    Tf: float = po.setting(3.0, "time of the layers", above=0)
    activation: str = po.setting("tanh", "activation of the layers", choices=tuple(nna.ACTIVATIONS))
    tikhonov: float = po.setting(1e-4, "weight of the regularization 1/2 |parameters|^2", at_least=0)
    levels: int = po.setting(3, "levels, each of half the layers; also for the start of one level", at_least=1)
    coarse_samples: float = po.setting(0.5, "part of the samples that the next coarser level has", above=0, at_most=1)
    optimizer: str = po.setting(
        "rmtr", "recursive trust region, MG/OPT, or one level: trust region, L-BFGS", choices=tuple(OPTIMIZERS)
    )
    seed: int = po.setting(0, "seed of the subsets and the weights")


class Classification:
    """The hierarchy of networks for a data set.

    Args:
        settings: of the problem.
        files: where the data come from.

    Attributes:
        hierarchy: of the losses, one level for optimizers of one level.
        start: parameters, (size,).
        data: a fingerprint of the samples.

    Raises:
        InputError: layers that cannot be halved as often, more samples than there are, data that are missing.
    """

    def __init__(self, settings: ResNetSettings, files: DataFiles) -> None:
        most = (settings.layers & -settings.layers).bit_length()
        if settings.levels > most:
            legal = f"at most {most} levels, as often as the layers can be halved"
            raise po.InputError("-levels", f"{settings.levels} with {settings.layers} layers", legal)
        data = files.load(settings.data, settings.seed)
        if settings.samples > len(data.x_train):
            raise po.InputError("-samples", settings.samples, f"1 to {len(data.x_train)}")
        if data.x_train.dim() != 4:
            raise po.InputError(
                "-data", f"{data.name}, which has no images", "images, as fashion_mnist | mnist | digits"
            )
        side = min(data.x_train.shape[2:])
        if settings.pool > side:
            raise po.InputError("-pool", settings.pool, f"1 to {side}, the pixels on a side")
        generator = torch.Generator().manual_seed(settings.seed)
        order = torch.randperm(len(data.x_train), generator=generator)[: settings.samples]
        x, self.x_test = _features(settings.pool, data.x_train[order], data.x_test)
        self.settings, self.y_test = settings, data.y_test
        torch.manual_seed(settings.seed)
        losses = []
        for level in range(settings.levels):
            count = math.ceil(settings.samples * settings.coarse_samples**level)  # the order is random: so are subsets
            network = self._network(x.shape[1], data.classes, settings.layers >> level)
            losses.append(nna.NetworkLoss(network, F.cross_entropy, x[:count], data.y_train[order][:count]))
        whole = nna.depth_hierarchy(losses, settings.tikhonov)
        self.loss, y = losses[0], losses[-1].parameters() * whole.functions[-1].scale
        for transfer in reversed(whole.transfers):
            y = transfer.prolong(y)
        self.start, self.data = y, digest(losses[0].x, losses[0].y, self.x_test, self.y_test)
        self.hierarchy = whole if settings.optimizer in MULTILEVEL else po.Hierarchy(whole.functions[:1])

    def _network(self, features: int, classes: int, layers: int) -> nna.ResNet:
        settings = self.settings
        opening = nn.Sequential(nn.Linear(features, settings.width), nna.ACTIVATIONS[settings.activation]())
        head = nn.Linear(settings.width, classes)
        return nna.ResNet(opening, lambda: nna.dense(settings.width, settings.activation), layers, head, settings.Tf)

    def accuracy(self, theta: Tensor) -> float:
        """On the test samples."""
        return float((self.loss.predict(theta, self.x_test).argmax(1) == self.y_test).double().mean())


def _features(pool: int, *images: Tensor) -> list[Tensor]:
    """Means over squares, standardized by those of the first images: (samples, features), double precision."""
    pooled = [F.avg_pool2d(part.double(), pool).flatten(1) for part in images]
    mean, deviation = pooled[0].mean(0), pooled[0].std(0)
    return [(part - mean) / (deviation + 1e-3) for part in pooled]


OPTIONS = [
    *sections(ResNetSettings),
    *OPTIMIZERS.options(ResNetSettings().optimizer),
    *sections(DataFiles),
    *sections(ReportFiles),
    *sections(CheckpointFiles),
]


def main(argv: Sequence[str] | None = None) -> float:
    """Train as the options say; the test accuracy."""
    with command_line(argv, __doc__, OPTIONS):
        settings, files, report = po.read(ResNetSettings), po.read(DataFiles), po.read(ReportFiles)
        kept = po.read(CheckpointFiles)
        check_targets(MPI.COMM_WORLD, report, kept)
        sizes = f"{settings.layers}, {settings.width}, {settings.samples}"
        needed = DOUBLE * settings.layers * settings.width * (settings.width + settings.samples)
        require_memory(needed, "-layers, -width, -samples", sizes, "smaller ones")
        problem = Classification(settings, files)
        optimizer, accuracies = OPTIMIZERS.make(settings.optimizer, problem.hierarchy), []

        own = {"problem": "resnet_multilevel", **asdict(settings), "data": problem.data}
        print_of = own | method_fingerprint(optimizer)
        checkpoints = DescentCheckpoints(kept, MPI.COMM_WORLD, print_of, lambda: {"accuracies": accuracies})

        def observe(minimizer: Any, history: po.History) -> None:
            po.require_all_read()
            accuracies[len(history) - 1 :] = [problem.accuracy(minimizer.x)]

        with interruptible():
            going_on = checkpoints.resume()
            accuracies.extend((checkpoints.run_before or {}).get("accuracies", []))
            observers = [observe, checkpoints.observe]
            result = optimizer.minimize(problem.start, observers=observers, **going_on)
        checkpoints.end("resnet_multilevel", result)
        last = result.history[-1]
        PETSc.Sys.Print(
            f"resnet_multilevel, {settings.optimizer}: loss {last.objective:.5f}, test accuracy "
            f"{accuracies[-1]:.4f}, work {last.work:.1f} ({result.message})",
            comm=MPI.COMM_WORLD,
        )
        found = summary(settings, problem, result, accuracies)
        write_report(MPI.COMM_WORLD, report, found, lambda: _picture(settings.optimizer, result, accuracies))
        checkpoints.leave()
        # Iterations are here what epochs are elsewhere: the asked work.
        asked = result.reason > 0 or result.reason == po.Reason.DIVERGED_MAX_IT
        finish("resnet_multilevel", asked, result.message)
        return accuracies[-1]


def summary(
    settings: ResNetSettings, problem: Classification, result: po.Result, accuracies: list[float]
) -> dict[str, Any]:
    """The run as values of JSON."""
    last = result.history[-1]
    return {
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


def _picture(optimizer: str, result: po.Result, accuracies: list[float]) -> Any:
    """Loss and test accuracy over the work."""
    figure = pictures.new_figure(9.0, 3.6)
    left, right = figure.subplots(1, 2)
    left.semilogy(result.history["work"], result.history["objective"], ".-")
    left.set(title="loss", xlabel="work in full gradients")
    right.plot(result.history["work"], accuracies, ".-")
    right.set(title="test accuracy", xlabel="work in full gradients")
    for axis in (left, right):
        axis.grid(True, alpha=0.3)
    figure.suptitle(f"residual network, {optimizer}: test accuracy {accuracies[-1]:.4f}")
    return figure


if __name__ == "__main__":
    start(main)
