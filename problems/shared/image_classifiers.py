"""What the image classifiers trained by APTS share: command line, rivals, accuracies on the way, summary."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor, nn

from nn_adapters.data.dataset import Dataset
from nn_adapters.data.datasets import load_dataset
from nn_adapters.losses.network import NetworkLoss
from pdeopt.control.checkpoint import replace_file
from pdeopt.core.errors import on_root
from pdeopt.core.options import require_all_read
from pdeopt.core.settings import Settings, read, setting
from pdeopt.core.team import BACKENDS, Team, team_of
from pdeopt.optimize.descent.apts import APTS, APTSSettings
from pdeopt.optimize.descent.minimizer import StopSettings
from pdeopt.optimize.descent.quasinewton import LBFGS, LBFGSSettings
from pdeopt.optimize.descent.trust import TrustRegionMinimizer, TrustSettings
from problems.shared import report
from problems.shared.case import command_line
from problems.shared.layer_training import OutputSettings

MINIMIZERS: dict[str, type] = {"apts": APTS, "tr": TrustRegionMinimizer, "lbfgs": LBFGS}
#: Settings of the trust-region methods that differ from their defaults: the same for all data.
STOCHASTIC = {"model": "first", "batch": 100}
#: A step of a whole batch after the parts costs work and gains nothing here.
STOCHASTIC_APTS = STOCHASTIC | {"global_it": 0}


@dataclass(frozen=True)
class ClassifierSettings(Settings):
    """Data, network and optimizer."""

    data: str = setting("mnist", "data set", choices=("mnist", "fashion_mnist", "digits", "cifar10"))
    samples: int = setting(10_000, "training samples at most, those for validation with them; 0 for all", at_least=0)
    validation: float = setting(0.1, "part of them that choose the best weights of the run", above=0, at_most=0.5)
    optimizer: str = setting("apts", "optimizer", choices=(*MINIMIZERS, "sgd", "adam"))
    lr: float = setting(0.03, "learning rate of sgd and adam", above=0)
    batch: int = setting(100, "samples of a batch of sgd and adam", at_least=1)
    precision: str = setting("single", "of the network's evaluation", choices=("single", "double"))
    backend: str = setting("mpi", "processes that share the parts: mpiexec, or torchrun", choices=BACKENDS)
    seed: int = setting(0, "of the first weights, and of the order of the samples")


@dataclass(frozen=True)
class Mark:
    """Accuracies on the way."""

    work: float
    validation: float
    test: float


class Accuracies:
    """Accuracies of the weights, twenty times in a run."""

    def __init__(
        self, loss: NetworkLoss, validation: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], max_work: float
    ) -> None:
        self.loss, self._sets, self._every = loss, (validation, test), max_work / 20
        self.marks: list[Mark] = []

    def __call__(self, theta: Tensor, last: bool = False) -> None:
        work = self.loss.tally.work
        if last or work >= self._every * (len(self.marks) + 1):
            self.marks.append(Mark(work, *(accuracy(self.loss, theta, *each) for each in self._sets)))

    @property
    def best(self) -> Mark:
        """The mark whose weights classify most of the validation samples rightly."""
        return max(self.marks, key=lambda mark: mark.validation)


def accuracy(loss: NetworkLoss, theta: Tensor, x: Tensor, y: Tensor) -> float:
    """Share of the samples that these weights classify rightly."""
    return float((loss.predict(theta, x).argmax(1) == y.to(loss.x.device)).double().mean())


def split(data: Dataset, settings: ClassifierSettings) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Samples and classes for training, validation and test; each pixel's channel has mean 0 and deviation 1."""
    count = min(settings.samples or len(data.x_train), len(data.x_train))
    first = count - max(1, round(settings.validation * count))
    x, y, x_test = data.x_train[:count], data.y_train[:count], data.x_test
    mean, deviation = x[:first].mean(), x[:first].std()
    x, x_test = (x - mean) / deviation, (x_test - mean) / deviation
    return [x[:first], y[:first]], [x[first:], y[first:]], [x_test, data.y_test]


def gradient_method(
    loss: NetworkLoss, settings: ClassifierSettings, max_work: float, watch: Callable[[Tensor], None]
) -> Tensor:
    """PyTorch's SGD with momentum 0.9, or Adam, on batches, until the work is done."""
    theta = loss.parameters().requires_grad_()
    if settings.optimizer == "sgd":
        optimizer: Any = torch.optim.SGD([theta], lr=settings.lr, momentum=0.9)
    else:
        optimizer = torch.optim.Adam([theta], lr=settings.lr)
    generator = torch.Generator().manual_seed(settings.seed)
    while True:
        for rows in torch.randperm(loss.samples, generator=generator).split(settings.batch):
            theta.grad = loss.subset(rows).value_and_gradient(theta.detach())[1]
            optimizer.step()
            watch(theta.detach())
            if loss.tally.work >= max_work:
                return theta.detach()


def train(
    network: nn.Module,
    data: Dataset,
    settings: ClassifierSettings,
    stop: StopSettings,
    team: Team | None,
    own: Any = None,
) -> tuple[Accuracies, Tensor, str]:
    """Train within the work that `stop` allows; accuracies, last weights, and why it stopped.

    Args:
        own: settings of the optimizer.
    """
    training, validation, test = split(data, settings)
    precision = torch.float32 if settings.precision == "single" else torch.float64
    loss = NetworkLoss(network, nn.functional.cross_entropy, *training, precision=precision, chunk=1000)
    watch = Accuracies(loss, (validation[0], validation[1]), (test[0], test[1]), stop.max_work)
    if settings.optimizer in MINIMIZERS:
        extra = {"team": team} if settings.optimizer != "lbfgs" else {}
        minimizer = MINIMIZERS[settings.optimizer](loss, own, stop, **extra)
        averaged = isinstance(minimizer, TrustRegionMinimizer)
        result = minimizer.minimize(
            loss.parameters(), observers=[lambda run, history: watch(run.mean if averaged else run.x)]
        )
        theta, message = result.design, result.message
    else:
        theta, message = gradient_method(loss, settings, stop.max_work, watch), "all work done"
    watch(theta, last=True)
    return watch, theta, message


def main(
    name: str,
    doc: str,
    network: Callable[[Dataset], nn.Module],
    argv: Sequence[str] | None,
    max_work: float,
    **defaults: Any,
) -> float:
    """Train as the options say; the test accuracy of the weights that are best in validation. Collective."""
    sections = [
        (ClassifierSettings, name),
        (APTSSettings, "APTS, -apts_*"),
        (TrustSettings, "Trust region, -tr_*"),
        (LBFGSSettings, "L-BFGS, -lbfgs_*"),
        (StopSettings, "When to stop, -opt_*"),
        (OutputSettings, "Files"),
    ]
    with command_line(argv, doc, *sections):
        settings, output = read(ClassifierSettings, **defaults), read(OutputSettings)
        stop = replace(read(StopSettings, max_work=max_work, gtol=0.0, max_it=2**31))
        kind = MINIMIZERS.get(settings.optimizer)
        words = {"apts": STOCHASTIC_APTS, "tr": STOCHASTIC}.get(settings.optimizer, {})
        words = words | {"seed": settings.seed} if words else {}
        own = None if kind is None else read(kind.Settings, **words)  # type: ignore[attr-defined]
        require_all_read()
        report.check_targets(MPI.COMM_WORLD, output)
        team = team_of(settings.backend)
        data = on_root(team, lambda: load_dataset(settings.data, output.data_dir, output.fetch, settings.seed))
        torch.manual_seed(settings.seed)
        begin = time.perf_counter()
        watch, _, message = train(network(data), data, settings, stop, team, own)
        seconds = time.perf_counter() - begin
        if team.rank == 0:
            write(name, output, watch, message, seconds, vars(settings) | ({} if own is None else vars(own)))
        return watch.best.test


def write(
    name: str, output: OutputSettings, watch: Accuracies, message: str, seconds: float, parameters: dict[str, Any]
) -> None:
    """The summary, a picture where the options ask for it, and a line."""
    best, tally = watch.best, watch.loss.tally
    if output.summary:
        summary = {
            "problem": name,
            "test_accuracy": best.test,
            "validation_accuracy": best.validation,
            "last_test_accuracy": watch.marks[-1].test,
            "work": tally.work,
            "gradients": tally.gradients,
            "values": tally.values,
            "hessian_products": tally.hessian_products,
            "message": message,
            "seconds": seconds,
            "history": [vars(mark) for mark in watch.marks],
            "parameters": parameters,
        }
        replace_file(output.summary, (json.dumps(summary, indent=2) + "\n").encode())
    if output.plot:
        replace_file(output.plot, _picture(name, watch.marks, Path(output.plot).suffix))
    print(
        f"{name}: test accuracy {best.test:.4f} (validation {best.validation:.4f}), work {tally.work:.1f}, "
        f"{tally.gradients} gradients of parts ({seconds:.1f} s): {message}",
        flush=True,
    )


def _picture(name: str, marks: list[Mark], ending: str) -> bytes:
    import io

    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axis = figure.subplots()
    for kind in ("validation", "test"):
        axis.plot([mark.work for mark in marks], [getattr(mark, kind) for mark in marks], label=kind)
    axis.set(title=f"{name}: accuracy", xlabel="work in full gradients")
    axis.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format=ending[1:])
    return buffer.getvalue()


__all__ = ["STOCHASTIC", "STOCHASTIC_APTS", "Accuracies", "ClassifierSettings", "accuracy", "main", "split", "train"]
