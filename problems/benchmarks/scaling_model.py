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
from typing import Any

import matplotlib
import numpy as np

from problems.benchmarks import layer_model
from problems.benchmarks.clocks import Costs, Inner, Layout, sequential_solves, solve
from problems.benchmarks.kkt import WORK
from problems.benchmarks.processes import Row, plain, run, write

matplotlib.use("agg")
from matplotlib import pyplot as plt

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
    """A solver with its costs: iterations, and inner steps in each."""

    layout: Layout
    costs: Costs
    iterations: int
    inner: Inner

    def seconds(self, ranks: int) -> float:
        """Predicted time of a KKT solve on so many ranks."""
        layout = replace(self.layout, ranks=ranks)
        return float(solve(layout, self.costs, self.iterations, self.inner).time.max())


class Prediction:
    """MGRIT with some windows, and the serial solver, for one problem.

    Args:
        name, steps: the problem, and N.
        windows: steps of a window, for each of which there is a prediction.
        network: what messages cost; None: as on this machine.
        counted_at: steps of the systems whose iterations are counted.
    """

    def __init__(self, name: str, steps: int, windows: Sequence[int], network: Network | None, counted_at: int) -> None:
        self.name, self.steps, self.network = name, steps, network
        self.ranks = [2**k for k in range(int(np.log2(steps)) + 1)]
        mesh, smaller = PROBLEMS[name]
        self.here = run("problems.benchmarks.costs", name, *mesh, ranks=2)
        measured, self.methods = run("problems.benchmarks.costs", name, *mesh), dict[int, Method]()
        for window in windows:
            layout = Layout(steps, 1, window, staged=measured["staged"])
            cycles = ["-wathen_propagator", "mgrit", "-mgrit_window", window, "-mgrit_cycles", layout.cycles]
            its = run(WORK, "kkt", name, *smaller, "-nt", counted_at, *cycles)
            self.methods[window] = self._method(measured, layout, its)
        measured["parts"]["sweep"] = measured["parts"]["alone"]
        its = run(WORK, "kkt", name, *smaller, "-nt", counted_at, "-wathen_propagator", "forward")
        self.serial = self._method(measured, layout.serial, its)

    def _method(self, measured: dict[str, Any], layout: Layout, found: dict[str, Any]) -> Method:
        worst = max((found[rhs] for rhs in ("newton", "random")), key=lambda one: one["iterations"])
        parts = {part: tuple(seconds) for part, seconds in measured["parts"].items()}
        message, reduction = self.here["message"], self.here["reduction"]
        if self.network is not None:
            message = self.network.latency + 8 * measured["n"] / self.network.bandwidth
            reduction = self.network.latency
        costs = Costs(parts, message, reduction)
        inner = Inner(found["inner_kind"], *(worst[key] // worst["iterations"] for key in ("applications", "products")))
        return Method(layout, costs, worst["iterations"], inner)

    def crossover(self, window: int) -> int | None:
        """The smallest number of ranks that is faster than the serial solver."""
        serial = self.serial.seconds(1)
        return next((ranks for ranks in self.ranks if self.methods[window].seconds(ranks) < serial), None)

    def rows(self) -> list[Row]:
        """The prediction as a table."""
        case, serial = f"{self.name}, {self.steps} steps", self.serial.seconds(1)
        rows = [plain(f"{case}, serial ({self.serial.iterations} its)", serial, "s")]
        for window, method in self.methods.items():
            here = f"{case}, windows of {window}"
            for ranks in self.ranks:
                note = f"{sequential_solves(replace(method.layout, ranks=ranks))} step solves in a row"
                seconds = method.seconds(ranks)
                rows.append(plain(f"{here} ({method.iterations} its), {ranks} ranks ({note})", seconds, "s"))
            best = min(self.ranks, key=method.seconds)
            rows.append(plain(f"{here}, faster than serial from", self.crossover(window) or float("inf"), "ranks"))
            rows.append(plain(f"{here}, best on {best} ranks", serial / method.seconds(best), "x serial"))
        return rows

    def check(self, steps: int = 256) -> list[Row]:
        """The model with what messages cost here against measured solves of few steps."""
        window, rows = next(iter(self.methods)), []
        words = ["-nt", steps, "-wathen_propagator", "mgrit", "-mgrit_window", window, "-only_newton", "-repeat", 3]
        for ranks in (1, 2):
            measured = run(WORK, "kkt", self.name, *PROBLEMS[self.name][0], *words, ranks=ranks)["newton"]
            method = self.methods[window]
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
        label = f"serial substitution, {self.serial.iterations} iterations"
        axes.axhline(self.serial.seconds(1), color="0.3", linestyle="--", label=label)
        for window, method in self.methods.items():
            seconds = [method.seconds(ranks) for ranks in self.ranks]
            label = f"MGRIT, windows of {window}, {method.iterations} iterations"
            line = axes.loglog(self.ranks, seconds, ".-", label=label)[0]
            if (ranks := self.crossover(window)) is not None:
                axes.plot(ranks, method.seconds(ranks), "o", color=line.get_color(), fillstyle="none", markersize=11)
        bottom = axes.get_ylim()[0]
        ideal = [seconds[0] / ranks for ranks in self.ranks]
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
