"""What the image classifiers trained by APTS share: options, rivals, accuracies on the way, summary."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor, nn

import nn_adapters as nna
import pdeopt as po
from pdeopt.core import Interrupted, Section, Team, digest, interruptible, on_root, sections, team_of
from pdeopt.core.team import BACKENDS
from pdeopt.optimize.descent import StopSettings
from problems.shared import pictures
from problems.shared.checkpoints import DescentCheckpoints, method_fingerprint
from problems.shared.command_line import command_line, finish
from problems.shared.files import CheckpointFiles, DataFiles, ReportFiles, check_targets, choose, write_report
from problems.shared.gradient_steps import GradientSteps
from problems.shared.optimizers import Optimizers

#: Iterations from checkpoint to checkpoint.
EVERY = 20

#: Settings of the trust-region methods that differ from their defaults: the same for all data.
STOCHASTIC = {"model": "first", "batch": 100}
#: A step of a whole batch after the parts costs work and gains nothing here.
STOCHASTIC_APTS = STOCHASTIC | {"global_it": 0}

#: The choices of the trust-region method with Kronecker factors as its metric.
_KFAC_OF_TR = ("optimizer", "tr"), ("tr_metric", "kfac")

METHODS = {"apts": (po.APTS, STOCHASTIC_APTS), "tr": (po.TrustRegionMinimizer, STOCHASTIC), "lbfgs": (po.LBFGS, {})}


@dataclass(frozen=True)
class ClassifierSettings(po.Settings):
    """Data, network and optimizer."""

    data: str = po.setting(
        "auto",
        "images; auto: mnist with -data_dir or -fetch, else scikit-learn's digits",
        choices=("auto", "mnist", "fashion_mnist", "digits", "cifar10"),
    )
    samples: int = po.setting(10_000, "training samples at most, those for validation with them; 0 for all", at_least=0)
    validation: float = po.setting(
        0.1, "share of those samples that choose the best weights of the run", above=0, at_most=0.5
    )
    optimizer: str = po.setting("apts", "APTS or a rival", choices=(*METHODS, "sgd", "adam"))
    lr: float = po.setting(0.03, "learning rate of sgd and adam", above=0, at_most=1e30)
    batch: int = po.setting(100, "samples of a batch of sgd and adam", at_least=1)
    precision: str = po.setting("single", "precision of the network's evaluation", choices=("single", "double"))
    backend: str = po.setting("mpi", "processes that share the parts: mpiexec, or torchrun", choices=BACKENDS)
    seed: int = po.setting(0, "seed of the first weights, and of the order of the samples")


@dataclass(frozen=True)
class Mark:
    """Accuracies on the way."""

    work: float
    validation: float
    test: float


class Accuracies:
    """Accuracies of the weights, twenty times in a run."""

    def __init__(
        self, loss: nna.NetworkLoss, validation: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], max_work: float
    ) -> None:
        self.loss, self._sets, self._every = loss, (validation, test), max_work / 20
        self.marks: list[Mark] = []

    def __call__(self, theta: Tensor, last: bool = False) -> None:
        work = self.loss.tally.work
        is_new = not self.marks or work > self.marks[-1].work  # a run that goes on comes by its last point again
        if last or (is_new and work >= self._every * (len(self.marks) + 1)):
            self.marks.append(Mark(work, *(accuracy(self.loss, theta, *each) for each in self._sets)))

    def memory(self) -> dict[str, Any]:
        """What `recall` takes."""
        return {"marks": [asdict(mark) for mark in self.marks]}

    def recall(self, memory: dict[str, Any] | None) -> None:
        """Go on from what `memory` gave, if anything."""
        self.marks = [Mark(**mark) for mark in memory["marks"]] if memory else []

    @property
    def best(self) -> Mark:
        """The mark whose weights classify most of the validation samples rightly."""
        return max(self.marks, key=lambda mark: mark.validation)


def accuracy(loss: nna.NetworkLoss, theta: Tensor, x: Tensor, y: Tensor) -> float:
    """Share of the samples that these weights classify rightly."""
    return float((loss.predict(theta, x).argmax(1) == y.to(loss.x.device)).double().mean())


def split(data: nna.Dataset, settings: ClassifierSettings) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Samples and classes for training, validation and test; each pixel's channel has mean 0 and deviation 1."""
    count = min(settings.samples or len(data.x_train), len(data.x_train))
    first = count - max(1, round(settings.validation * count))
    x, y, x_test = data.x_train[:count], data.y_train[:count], data.x_test
    mean, deviation = x[:first].mean(), x[:first].std()
    x, x_test = (x - mean) / deviation, (x_test - mean) / deviation
    return [x[:first], y[:first]], [x[first:], y[first:]], [x_test, data.y_test]


def gradient_method(
    loss: nna.NetworkLoss,
    settings: ClassifierSettings,
    max_work: float,
    watch: Accuracies,
    checkpoints: DescentCheckpoints,
) -> Tensor:
    """PyTorch's SGD with momentum 0.9, or Adam, on batches, until the work is done; the last weights."""
    method = GradientSteps(loss, settings.optimizer, settings.lr, settings.batch, settings.seed)
    history = po.History()
    if going_on := checkpoints.resume():
        method.recall(going_on["memory"])
        history = going_on["history"]
    watch.recall(checkpoints.run_before)
    try:
        while loss.tally.work < max_work:
            history = method.step()
            watch(method.theta)
            checkpoints.observe(method, history)
    except Interrupted:  # the file of checkpoints knows
        pass
    checkpoints.end(checkpoints.fingerprint["problem"], po.Result(method.theta, po.Reason.ITERATING, "", history))
    return method.theta


@dataclass(frozen=True)
class ClassifierScript:
    """A script that trains a classifier of images by APTS or a rival.

    Attributes:
        name, doc: of the script.
        network: for the samples.
        max_work: full gradients that a run may take, by default.
        defaults: of its `ClassifierSettings`.
        apts: of the settings of APTS.
    """

    name: str
    doc: str | None
    network: Callable[[nna.Dataset], nn.Module]
    max_work: float
    defaults: dict[str, Any]
    apts: dict[str, Any] = field(default_factory=dict)

    @property
    def optimizers(self) -> Optimizers:
        """The optimizers beside those of PyTorch."""
        methods = METHODS | {"apts": (po.APTS, STOCHASTIC_APTS | self.apts)}
        return Optimizers(methods, stop={"max_work": self.max_work, "gtol": 0.0, "max_it": 2**31})

    @property
    def options(self) -> list[Section]:
        """All that the script reads."""
        own = sections(ClassifierSettings, **self.defaults)
        files = [*sections(DataFiles), *sections(ReportFiles), *sections(CheckpointFiles, checkpoint_every=EVERY)]
        factors = Section(nna.FactorSettings, when=((("apts_metric", "kfac"),), _KFAC_OF_TR))
        return [*own, *self.optimizers.options("apts"), factors, *files]

    def run(self, argv: Sequence[str] | None) -> float:
        """Train as the options say; the test accuracy of the weights that are best in validation. Collective."""
        with command_line(argv, self.doc, self.options):
            settings, files = po.read(ClassifierSettings, **self.defaults), po.read(DataFiles)
            settings = replace(settings, data=choose(settings.data, files, "mnist", "digits"))
            report, kept = po.read(ReportFiles), po.read(CheckpointFiles, checkpoint_every=EVERY)
            stop = po.read(StopSettings, **self.optimizers.stop)
            factors = None
            if settings.optimizer in METHODS:
                method = self.optimizers.make(settings.optimizer)  # reads its options before the data come
                has_factors = getattr(method.settings, "metric", "none") == "kfac"
                factors = po.read(nna.FactorSettings) if has_factors else None
            po.require_all_read()
            check_targets(MPI.COMM_WORLD, report, kept)
            team = team_of(settings.backend)
            data = on_root(team, lambda: files.load(settings.data, settings.seed))
            torch.manual_seed(settings.seed)
            begin = time.perf_counter()
            training, validation, test = split(data, settings)
            precision = torch.float32 if settings.precision == "single" else torch.float64
            mean = nn.functional.cross_entropy
            words = {"precision": precision, "chunk": 1000, "factors": factors}
            loss = nna.NetworkLoss(self.network(data), mean, *training, **words)
            watch = Accuracies(loss, (validation[0], validation[1]), (test[0], test[1]), stop.max_work)
            data_print = digest(loss.x, loss.y, *validation, *test)
            print_of = {"problem": self.name, **vars(settings), "samples": data_print}
            print_of |= {f"metric_{name}": value for name, value in (vars(factors) if factors else {}).items()}
            checkpoints = DescentCheckpoints(kept, team, print_of, watch.memory)
            with interruptible():
                theta, converged, message, own = self._minimize(loss, settings, stop, team, watch, checkpoints)
            watch(theta, last=True)
            found = summary(self.name, watch, message, time.perf_counter() - begin, vars(settings) | own)
            write_report(team, report, found, lambda: _picture(self.name, watch.marks))
            if team.rank == 0:
                _print(found)
            checkpoints.leave()
            finish(self.name, converged, message)
            return watch.best.test

    def _minimize(
        self,
        loss: nna.NetworkLoss,
        settings: ClassifierSettings,
        stop: StopSettings,
        team: Team,
        watch: Accuracies,
        checkpoints: DescentCheckpoints,
    ) -> tuple[Tensor, bool, str, dict[str, Any]]:
        """Train within the work that `stop` allows: last weights, whether all is well, why it stopped, settings."""
        if settings.optimizer not in METHODS:
            theta = gradient_method(loss, settings, stop.max_work, watch, checkpoints)
            finite = bool(theta.isfinite().all())
            return theta, finite, "all work done" if finite else "weights are not finite: a smaller -lr", {}
        minimizer: Any = self.optimizers.make(settings.optimizer, loss, team, seed=settings.seed)
        averaged = settings.optimizer != "lbfgs"
        checkpoints.fingerprint |= method_fingerprint(minimizer)
        going_on = checkpoints.resume()
        watch.recall(checkpoints.run_before)

        def look(run: Any, history: po.History) -> None:
            watch(run.mean if averaged else run.x)

        result = minimizer.minimize(loss.parameters(), observers=[look, checkpoints.observe], **going_on)
        checkpoints.end(self.name, result)
        return result.design, result.reason > 0, result.message, vars(minimizer.settings)


def summary(name: str, watch: Accuracies, message: str, seconds: float, parameters: dict[str, Any]) -> dict[str, Any]:
    """The run as values of JSON."""
    best, tally = watch.best, watch.loss.tally
    return {
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


def _print(found: dict[str, Any]) -> None:
    accuracies = f"test accuracy {found['test_accuracy']:.4f} (validation {found['validation_accuracy']:.4f})"
    calls = f"work {found['work']:.1f}, {found['gradients']} gradients of parts"
    print(f"{found['problem']}: {accuracies}, {calls} ({found['seconds']:.1f} s): {found['message']}", flush=True)


def _picture(name: str, marks: list[Mark]) -> Any:
    """Accuracies over the work."""
    figure = pictures.new_figure(5.0, 3.6)
    axis = figure.subplots()
    for kind in ("validation", "test"):
        axis.plot([mark.work for mark in marks], [getattr(mark, kind) for mark in marks], ".-", label=kind)
    axis.set(title=f"{name}: accuracy", xlabel="work in full gradients")
    axis.legend()
    axis.grid(True, alpha=0.3)
    return figure
