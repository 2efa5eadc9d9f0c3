"""Test accuracy against CPU seconds: ADMM on split layers beside SGD, Adam and L-BFGS on the same network and data.

    OMP_NUM_THREADS=1 python -m problems.benchmarks.admm -only accuracy -data_dir DATA -json build/admm.json
    OMP_NUM_THREADS=1 python -m problems.benchmarks.admm_accuracy -data_dir DATA -sets har peaks -curves build/accuracy

Everything runs in one process, on one thread, one after the other; seconds are those of the processor, from the first
step on, without evaluations. SGD (momentum 0.9) and Adam minimize cross-entropy in batches of 100 with a rate that
falls linearly to zero; of their grid the rate with the best *test* accuracy on seed 0 is taken, which favors them.
L-BFGS minimizes cross-entropy of all samples. ADMM has its default settings on all data; the forms with all samples
are as published, on dense networks with hard sigmoids.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from mpi4py import MPI
from torch import nn

import nn_adapters as nna
import pdeopt as po
from nn_adapters.splitting import SplitTrainingSettings
from pdeopt.optimize.splitting import ADMM, AdmmSettings
from problems import admm_mnist
from problems.admm_mnist import SplitScriptSettings
from problems.benchmarks.processes import Row, bar, plain, show, table, write
from problems.shared import pictures
from problems.shared.checkpoints import SplitCheckpoints
from problems.shared.files import CheckpointFiles, DataFiles
from problems.shared.split_training import CpuClock, CurvePoint, Samples, deal

#: Rates that are tried.
RATES = {"sgd": (0.03, 0.1, 0.3), "adam": (1e-3, 3e-3, 1e-2)}

#: Samples of a batch of SGD and Adam.
BATCH = 100

#: Points in percent that ADMM may be behind Adam.
TOLERANCE = 1.0

Curve = list[CurvePoint]


@dataclass(frozen=True)
class Budget:
    """How far the methods go on a data set.

    Attributes:
        gradients: epochs of SGD and Adam.
        whole: iterations of the forms with all samples, and seconds after which they end; 0 for none of them.
        lbfgs: seconds of L-BFGS.
    """

    gradients: int
    whole: tuple[int, float]
    lbfgs: float


BUDGETS = {
    "mnist": Budget(2, (40, 40.0), 25.0),
    "fashion_mnist": Budget(2, (40, 0.0), 15.0),
    "har": Budget(8, (60, 6.0), 6.0),
    "peaks": Budget(20, (200, 6.0), 6.0),
}


class Problem:
    """A data set and the network of `problems.admm_mnist` for it."""

    def __init__(self, data: str, data_dir: str, limit: int = 0) -> None:
        self.own = SplitScriptSettings(data=data, evaluate_every=0.25)
        self.samples: Samples = deal(
            MPI.COMM_SELF, lambda: admm_mnist.load(self.own, data, DataFiles(data_dir=data_dir)), [], limit
        )
        self.widths, self.layers, self.epochs = admm_mnist.sizes(self.own, data)

    def network(self, own: SplitScriptSettings) -> nn.Module:
        """First weights, the same for all methods on a seed."""
        features, classes = self.samples.x.shape[1], self.samples.classes
        return admm_mnist.make_network(features, self.widths, self.layers, own, classes)


class Course:
    """Accuracies of a run on the way, whose seconds are not counted."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.curve, self.clock = problem, Curve(), CpuClock()

    @torch.no_grad()
    def look(self, network: Callable[[Any], Any], iteration: int, epoch: float, loss: float) -> None:
        """A point of the curve."""
        with self.clock.paused():
            x, y = self.problem.samples.x_test, self.problem.samples.y_test
            right = sum(int((network(a).argmax(1) == b).sum()) for a, b in zip(x.split(2000), y.split(2000)))
            self.curve.append(CurvePoint(iteration, epoch, self.clock.seconds, loss, right / len(y)))


# -- the methods -------------------------------------------------------------------------------------------


def by_gradients(problem: Problem, kind: str, rate: float, epochs: int, seed: int) -> Curve:
    """SGD with momentum, or Adam, whose rate falls linearly."""
    network, x, y = problem.network(replace(problem.own, seed=seed)), problem.samples.x, problem.samples.y
    course = Course(problem)
    if kind == "sgd":
        optimizer: Any = torch.optim.SGD(network.parameters(), lr=rate, momentum=0.9, fused=True)
    else:
        optimizer = torch.optim.Adam(network.parameters(), lr=rate, fused=True)
    generator, per_epoch, step = torch.Generator().manual_seed(seed), -(-len(x) // BATCH), 0
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(BATCH):
            optimizer.param_groups[0]["lr"] = rate * (1 - step / (epochs * per_epoch))
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(network(x[rows]), y[rows])
            loss.backward()
            optimizer.step()
            step += 1
            if step % max(per_epoch // 4, 1) == 0 or step == epochs * per_epoch:
                course.look(network, step, step / per_epoch, float(loss.detach()))
    return course.curve


def by_lbfgs(problem: Problem, seconds: float, seed: int) -> Curve:
    """pdeopt's L-BFGS on all samples."""
    network = problem.network(replace(problem.own, seed=seed))
    x, y = problem.samples.x, problem.samples.y
    loss = nna.NetworkLoss(network, nn.functional.cross_entropy, x, y, precision=torch.float32, chunk=2000)
    course = Course(problem)

    def look(method: Any, history: po.History) -> None:
        theta = method.x
        course.look(lambda part: loss.predict(theta, part), history[-1].iteration, 0.0, history[-1].objective)

    method = po.LBFGS(loss, max_it=2**31 - 1, gtol=0.0)
    method.minimize(loss.parameters(), observers=[look], until=lambda _: course.clock.seconds > seconds)
    return course.curve


def by_admm(
    problem: Problem,
    form: str,
    states: str,
    seed: int,
    epochs: int,
    seconds: float = 0.0,
    split: Mapping[str, Any] | None = None,
    **more: Any,
) -> Curve:
    """ADMM with its default settings, but for those of `split`."""
    own = replace(problem.own, seed=seed, form=form, states=states, max_cpu_seconds=seconds, **more)
    how = SplitTrainingSettings(**{"form": form, "states": states, "seed": seed, "loss": own.loss, **(split or {})})
    limits = AdmmSettings(**admm_mnist.ADMM_DEFAULTS, multipliers=form != "streaming")
    training = admm_mnist.prepare(own, how, problem.network(own), problem.samples, epochs, MPI.COMM_SELF, say=None)
    checkpoints = SplitCheckpoints(CheckpointFiles(), MPI.COMM_SELF, {}, training.memory)
    training.run(ADMM(training.splitting, limits), checkpoints, "admm_accuracy")
    return training.marks


# -- the comparison ----------------------------------------------------------------------------------------


class Accuracy:
    """All methods on each data set; `quick` uses few samples and one seed."""

    def __init__(
        self, data_dir: str, seeds: int = 3, sets: Sequence[str] = tuple(BUDGETS), quick: bool = False
    ) -> None:
        self.data_dir, self.seeds, self.sets, self.quick = data_dir, 1 if quick else seeds, sets, quick
        self.curves: dict[str, dict[str, list[Curve]]] = {}

    def rows(self) -> Iterator[Row]:
        """Run; rows as they come."""
        for data in self.sets:
            problem = Problem(data, self.data_dir, 1000 if self.quick else 0)
            self.curves[data] = {}
            for title, runs in self._methods(problem, self._budget(data)):
                self.curves[data][title] = runs
                ends = [100 * run[-1].test_accuracy for run in runs]
                seconds = statistics.mean(run[-1].cpu_seconds for run in runs)
                yield plain(f"{data}: {title}, {seconds:.1f} CPU s", statistics.mean(ends), "%")
            yield from self._verdicts(data)

    def _budget(self, data: str) -> Budget:
        return Budget(1, (2, 5.0), 1.0) if self.quick else BUDGETS[data]

    def _methods(self, problem: Problem, budget: Budget) -> Iterator[tuple[str, list[Curve]]]:
        seeds = range(self.seeds)
        epochs = 1 if self.quick else problem.epochs
        for kind, rates in RATES.items():
            tried = {rate: by_gradients(problem, kind, rate, budget.gradients, 0) for rate in rates}
            best = max(tried, key=lambda rate: tried[rate][-1].test_accuracy)
            rest = [by_gradients(problem, kind, best, budget.gradients, seed) for seed in seeds[1:]]
            yield f"{kind}, rate {best:g}", [tried[best], *rest]
        yield "streaming", [by_admm(problem, "streaming", "forward", seed, epochs) for seed in seeds]
        forms = (("seed", "random"), ("seed", "forward"), ("backward", "forward")) if budget.whole[1] else ()
        published: dict[str, Any] = {} if problem.layers else {"activation": "hard_sigmoid"}
        for form, states in forms:
            yield f"{form}, {states} states", [by_admm(problem, form, states, 0, *budget.whole, **published)]
        yield "lbfgs", [by_lbfgs(problem, budget.lbfgs, 0)]

    def _verdicts(self, data: str) -> Iterator[Row]:
        curves = self.curves[data]
        adam, streaming = next(runs for title, runs in curves.items() if title.startswith("adam")), curves["streaming"]
        ends = [statistics.mean(100 * run[-1].test_accuracy for run in runs) for runs in (streaming, adam)]
        yield bar(f"{data}: streaming less Adam at the end", ends[0] - ends[1], "points", -TOLERANCE, False)
        if data == "mnist":
            for level, limit in ((0.95, 20.0), (0.965, 80.0)):
                case = f"{data}: streaming, CPU seconds to {100 * level:g} %, the slowest seed"
                yield _reached(case, max(seconds_to(run, level) for run in streaming), "CPU s", limit)
            slowest = [max(seconds_to(run, 0.975) for run in runs) for runs in (streaming, adam)]
            for name, seconds in zip(("streaming", "Adam"), slowest):
                if seconds < float("inf"):
                    yield plain(f"{data}: {name}, CPU seconds to 97.5 %, the slowest seed", seconds, "CPU s")
            yield _reached(f"{data}: streaming, CPU seconds to 97.5 %, over Adam's", slowest[0] / slowest[1], "", 3.0)

    def show(self) -> None:
        """Accuracies in percent after some seconds, as a table for each data set."""
        for data, methods in self.curves.items():
            longest = max(run[-1].cpu_seconds for runs in methods.values() for run in runs)
            marks = [mark for mark in (1, 2, 5, 10, 20, 40, 80, 160, 320) if mark < 2 * longest]
            lines = {
                title: [*(_mean_at(runs, mark) for mark in marks), _mean_at(runs, float("inf"))]
                for title, runs in methods.items()
            }
            table(f"{data}: test accuracy, %", [*(f"{mark} CPU s" for mark in marks), "end"], lines)

    def write(self, file: str) -> None:
        """The curves as FILE.json, and a picture of them, FILE.png."""
        found = {
            data: {title: [[asdict(point) for point in run] for run in runs] for title, runs in methods.items()}
            for data, methods in self.curves.items()
        }
        Path(f"{file}.json").write_text(json.dumps(found) + "\n")
        picture(self.curves).savefig(f"{file}.png", dpi=100)


def _reached(case: str, measured: float, unit: str, limit: float) -> Row:
    """A row that is judged; without a number where it was not reached."""
    return (
        bar(case, measured, unit, limit)
        if measured < float("inf")
        else show(Row(case, None, unit, f"<= {limit:g}", False))
    )


def seconds_to(run: Curve, level: float) -> float:
    """CPU seconds until a test accuracy is reached; infinite where it is not."""
    return next((point.cpu_seconds for point in run if point.test_accuracy >= level), float("inf"))


def _mean_at(runs: Sequence[Curve], seconds: float) -> float | None:
    """The mean of the last accuracies up to then, in percent."""
    found = [[point for point in run if point.cpu_seconds <= seconds] for run in runs]
    return statistics.mean(100 * points[-1].test_accuracy for points in found) if all(found) else None


def picture(curves: Mapping[str, Mapping[str, Sequence[Curve]]]) -> Any:
    """Errors over the seconds, a panel a data set; the first seed of each method."""
    figure = pictures.new_figure(4.4 * len(curves), 3.8)
    for axis, (data, methods) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items()):
        for title, runs in methods.items():
            points = [point for point in runs[0] if point.cpu_seconds > 0]
            seconds, errors = zip(*((point.cpu_seconds, 100 - 100 * point.test_accuracy) for point in points))
            axis.loglog(seconds, errors, label=title, linewidth=2 if title == "streaming" else 1)
        axis.set(title=data, xlabel="CPU seconds", ylabel="test error, %")
        axis.grid(True, which="both", alpha=0.3)
        axis.legend(fontsize=7)
    return figure


def main(argv: list[str] | None = None) -> list[Row]:
    """Measure, print the tables, write rows and curves where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-json", default="", help="write the rows to this file")
    parser.add_argument("-curves", default="", help="write all curves to NAME.json, and a picture to NAME.png")
    parser.add_argument("-data_dir", required=True, help="folder of the data sets")
    parser.add_argument("-sets", nargs="+", choices=BUDGETS, default=list(BUDGETS), help="these data sets alone")
    parser.add_argument("-seeds", type=int, default=3, help="runs of each method with batches")
    parser.add_argument("-quick", action="store_true", help="few samples, one seed: does it run?")
    options: Any = parser.parse_args(argv)
    return accuracy(
        Accuracy(options.data_dir, options.seeds, options.sets, options.quick), options.json, options.curves
    )


def accuracy(benchmark: Accuracy, file: str = "", curves: str = "") -> list[Row]:
    """The rows, written as they come, with tables and curves."""
    torch.set_num_threads(1)
    rows: list[Row] = []
    for row in benchmark.rows():
        rows.append(row)
        write(file, rows)
        if curves:
            benchmark.write(curves)
    benchmark.show()
    return rows


if __name__ == "__main__":
    main()
