"""Strong scaling of KKT solves in time, predicted: measured costs and iterations, counted operations and messages.

    OMP_NUM_THREADS=1 python -m problems.benchmarks.scaling_model -json build/scaling_model.json -plot build/scaling

Parts are timed on one rank (`costs`), iterations counted at fewer steps, and `clocks` runs the algorithm with them
on up to one rank a step. `tests/problems/test_scaling_model.py` compares its schedule with those of real runs. Messages
and sums cost what a cluster's network takes, or, with `-network here`, what they do on this machine.
Not in the model: setting up, and that rows of many steps leave the caches.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace

import matplotlib
import numpy as np

from problems.benchmarks import layer_model
from problems.benchmarks.clocks import Clocks, Costs, Inner, Layout, reduced, sequential_solves, solve
from problems.benchmarks.kkt import WORK
from problems.benchmarks.processes import Row, plain, run, write

matplotlib.use("agg")
from matplotlib import pyplot as plt

#: What an outer iteration does with the Schur complement.
INNER = ("applications", "products")

#: Meshes whose costs are measured, and smaller ones for iterations, which do not depend on them.
PROBLEMS = {"heat": (["-nx", 60, "-ny", 20], ["-nx", 15, "-ny", 5]), "burgers": (["-nx", 128], ["-nx", 128])}


@dataclass(frozen=True)
class Network:
    """Seconds of a message without content, and of a level in the tree of a sum; bytes a second."""

    latency: float
    bandwidth: float

    def __str__(self) -> str:
        return f"latency {1e6 * self.latency:g} µs, {1e-9 * self.bandwidth:g} GB/s"


@dataclass(frozen=True)
class Method:
    """A solver with its costs: iterations, and inner steps in each.

    Attributes:
        inner: steps on the Schur complement; or None, on the reduced Hessian.
        cycles: of a sweep over time on the reduced Hessian, in the mean.
    """

    layout: Layout
    costs: Costs
    iterations: int
    inner: Inner | None
    cycles: int = 0

    def seconds(self, ranks: int) -> float:
        """Predicted time of a KKT solve on so many ranks."""
        return float(self._clocks(replace(self.layout, ranks=ranks)).time.max())

    def _clocks(self, layout: Layout) -> Clocks:
        if self.inner is not None:
            return solve(layout, self.costs, self.iterations, self.inner)
        return reduced(layout, self.costs, self.iterations, [self.cycles] * (2 * self.iterations + 3))


class Prediction:
    """MGRIT with some windows, and the serial solvers, for one problem.

    Args:
        name, steps: the problem, and N.
        windows: steps of a window, for each of which there is a prediction.
        network: what messages cost; None: as on this machine.
        counted_at: steps of the systems whose iterations are counted.

    Attributes:
        methods: by what they are called; the first is the default.
        rivals: on one rank, by substitution; the `serial` one is the fastest of them.
    """

    def __init__(self, name: str, steps: int, windows: Sequence[int], network: Network | None, counted_at: int) -> None:
        self.name, self.steps, self.network, self.counted_at = name, steps, network, counted_at
        self.ranks = [2**k for k in range(int(np.log2(steps)) + 1)]
        mesh, self.smaller = PROBLEMS[name]
        self.here = run("problems.benchmarks.costs", name, *mesh, ranks=2)
        self.measured, self.methods = run("problems.benchmarks.costs", name, *mesh), dict[str, Method]()
        for window in windows:
            layout = Layout(steps, 1, window)
            cycles = ["-mgrit_window", window, "-mgrit_cycles", layout.cycles]
            self.methods[f"matched, windows of {window}"] = self._method(layout, "-wathen_propagator", "mgrit", *cycles)
        layout = Layout(steps, 1, windows[0])
        words = ["-precond", "reduced", "-propagator", "mgrit", "-mgrit_window", windows[0]]
        self.methods[f"reduced, windows of {windows[0]}"] = self._method(layout, *words)
        self.measured["parts"]["sweep"] = self.measured["parts"]["alone"]
        self.rivals = {
            "matched": self._method(layout.serial, "-wathen_propagator", "forward"),
            "reduced": self._method(layout.serial, "-precond", "reduced"),
        }
        self.rival = min(self.rivals, key=lambda rival: self.rivals[rival].seconds(1))
        self.serial = self.rivals[self.rival]

    def _method(self, layout: Layout, *words: object) -> Method:
        """With iterations that are counted now."""
        found = run(WORK, "kkt", self.name, *self.smaller, "-nt", self.counted_at, *words)
        worst = max((found[rhs] for rhs in ("newton", "random")), key=lambda one: one["iterations"])
        parts = {part: tuple(seconds) for part, seconds in self.measured["parts"].items()}
        message, reduction = self.here["message"], self.here["reduction"]
        if self.network is not None:
            message = self.network.latency + 8 * self.measured["n"] / self.network.bandwidth
            reduction = self.network.latency
        costs, its = Costs(parts, message, reduction), worst["iterations"]
        if "reduced" in words:
            return Method(layout, costs, its, None, round(worst["cycles"]))
        return Method(layout, costs, its, Inner(found["inner_kind"], *(worst[key] // its for key in INNER)))

    def crossover(self, name: str) -> int | None:
        """The smallest number of ranks on which a method is faster than the fastest serial solver."""
        serial = self.serial.seconds(1)
        return next((ranks for ranks in self.ranks if self.methods[name].seconds(ranks) < serial), None)

    def rows(self) -> list[Row]:
        """The prediction as a table."""
        case, serial = f"{self.name}, {self.steps} steps", self.serial.seconds(1)
        rows = [
            plain(f"{case}, {name}, substitution ({rival.iterations} its)", rival.seconds(1), "s")
            for name, rival in self.rivals.items()
        ]
        for name, method in self.methods.items():
            here = f"{case}, {name}"
            for ranks in self.ranks:
                note = f"{sequential_solves(replace(method.layout, ranks=ranks))} step solves in a row"
                seconds = method.seconds(ranks)
                rows.append(plain(f"{here} ({method.iterations} its), {ranks} ranks ({note})", seconds, "s"))
            best = min(self.ranks, key=method.seconds)
            turn, against = self.crossover(name) or float("inf"), f"{self.rival}, substitution"
            rows.append(plain(f"{here}, faster than {against} from", turn, "ranks"))
            rows.append(plain(f"{here}, best on {best} ranks", serial / method.seconds(best), f"x {against}"))
            two = method.seconds(1) / method.seconds(2)
            rows.append(plain(f"{here}, two ranks against one", two, "x"))
        return rows

    def check(self, steps: int = 256) -> list[Row]:
        """The model with what messages cost here against measured solves of few steps."""
        method, rows = next(iter(self.methods.values())), []
        window = method.layout.window
        words = ["-nt", steps, "-wathen_propagator", "mgrit", "-mgrit_window", window, "-only_newton", "-repeat", 3]
        for ranks in (1, 2):
            measured = run(WORK, "kkt", self.name, *PROBLEMS[self.name][0], *words, ranks=ranks)["newton"]
            method = replace(
                method,
                layout=replace(method.layout, steps=steps),
                iterations=measured["iterations"],
                costs=replace(method.costs, **self.here),
            )
            case = f"{self.name}, {steps} steps, {ranks} ranks ({measured['seconds']:.3g} s): predicted / measured"
            rows.append(plain(case, method.seconds(ranks) / measured["seconds"], "x"))
        return [
            *rows,
            plain(f"{self.name}, a message here", 1e6 * self.here["message"], "us"),
            plain(f"{self.name}, a sum over two ranks here", 1e6 * self.here["reduction"], "us"),
        ]

    def plot(self, file: str) -> None:
        """Time against ranks, with the crossovers."""
        figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
        label = f"one rank, {self.rival}, substitution, {self.serial.iterations} iterations"
        axes.axhline(self.serial.seconds(1), color="0.3", linestyle="--", label=label)
        for name, method in self.methods.items():
            seconds = [method.seconds(ranks) for ranks in self.ranks]
            line = axes.loglog(self.ranks, seconds, ".-", label=f"MGRIT, {name}, {method.iterations} iterations")[0]
            if (ranks := self.crossover(name)) is not None:
                axes.plot(ranks, method.seconds(ranks), "o", color=line.get_color(), fillstyle="none", markersize=11)
        bottom = axes.get_ylim()[0]
        ideal = [self.serial.seconds(1) / ranks for ranks in self.ranks]
        axes.loglog(self.ranks, ideal, ":", color="0.6", label="ideal", zorder=0)
        axes.set_ylim(bottom=bottom)
        axes.set(xlabel="ranks in time", ylabel="predicted seconds of a KKT solve")
        message, reduction = (f"{1e6 * s:.3g} µs" for s in (method.costs.message, method.costs.reduction))
        network = f"{self.network or 'this machine'}: {message} a row, {reduction} a level of a sum"
        axes.set_title(f"{self.name}, {self.steps:,} steps; {network}", fontsize="medium")
        small = dict.fromkeys(("fontsize", "title_fontsize"), "small")
        axes.legend(title="ring: faster than serial from here", loc="lower left", **small)
        axes.grid(alpha=0.3)
        figure.savefig(file, dpi=150)
        plt.close(figure)


def main(argv: list[str] | None = None) -> list[Row]:
    """Measure, predict, print the table; write it and the pictures where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-json", default="", help="write the rows to this file")
    parser.add_argument("-plot", default="", help="write pictures to files that begin so, PLOT_heat.png for instance")
    parser.add_argument(
        "-only",
        nargs="+",
        choices=[*PROBLEMS, "layers"],
        default=list(PROBLEMS),
        help="these problems alone; layers alone: those of a network, see `layer_model`",
    )
    parser.add_argument("-steps", type=int, default=65_536, help="time steps, a power of two")
    parser.add_argument("-windows", type=int, nargs="+", default=[16, 4, 64], help="steps of a window, powers of two")
    parser.add_argument("-counted_at", type=int, default=4096, help="steps of the systems whose iterations are counted")
    parser.add_argument("-network", choices=("cluster", "here"), default="cluster", help="what messages cost")
    parser.add_argument("-latency", type=float, default=2e-6, help="seconds of a message, and of a level of a sum")
    parser.add_argument("-bandwidth", type=float, default=1e10, help="bytes a second")
    options = parser.parse_args(argv)
    if options.only == ["layers"]:
        words = ["-json", options.json, "-plot", options.plot and f"{options.plot}_layers.png"]
        return layer_model.main([*words, "-layers", str(options.steps)])
    network = Network(options.latency, options.bandwidth) if options.network == "cluster" else None
    rows: list[Row] = []
    for name in options.only:
        prediction = Prediction(name, options.steps, options.windows, network, options.counted_at)
        rows += [*prediction.rows(), *prediction.check()]
        write(options.json, rows)
        if options.plot:
            prediction.plot(f"{options.plot}_{name}.png")
    return rows


if __name__ == "__main__":
    main()
