"""Methods that sample, on logistic regression: ASTROM against batch trust region, MLVR against SVRG, SARAH and SSN.

    OMP_NUM_THREADS=1 python -m problems.benchmarks.sampling -data_dir DATA -json build/sampling.json -plot sampling.png

What is compared is counted: Hessian products and Hessians of a sample count by its part of all samples, and so does
all work, in gradients of all samples. lambda is 1/N, starts are zero, tolerances are relative to the first gradient.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nn_adapters.losses.logistic import LogisticLoss
from pdeopt.core.monitor import History, Result
from pdeopt.optimize.descent.minimizer import Minimizer
from problems.benchmarks.processes import Row, bar, measure, plain, show, table
from problems.logistic import LogisticSettings, load, minimizer
from problems.shared.files import DataFiles

#: Tolerances of the two cases.
ASTROM_RTOL, MLVR_RTOL = 1e-6, 1e-8


@dataclass
class Share:
    """Observes a run: Hessians and Hessian products, weighted by the part of the samples that they are of."""

    hessians: float = 0.0
    products: float = 0.0
    _share: float = math.nan

    def __call__(self, solver: Any, history: History) -> None:
        if len(history) > 1:
            self.hessians += self._share
            self.products += self._share * (history[-1].hessian_products - history[-2].hessian_products)
        self._share = getattr(solver, "samples", solver.function.samples) / solver.function.samples


class Problem:
    """A data set's loss, with the norm of the first gradient."""

    def __init__(self, name: str, data_dir: str, quick: bool) -> None:
        sizes = {"samples": 600, "features": 500} if quick else {}
        self.name, self.loss = name, load(LogisticSettings(data=name, **sizes), DataFiles(data_dir))
        self.start = torch.zeros(self.loss.size, dtype=torch.float64)
        self.first = self.loss.norm(self.loss.value_and_gradient(self.start)[1])

    def run(self, optimizer: str, rtol: float, observers: Any = (), **settings: Any) -> Result:
        """Minimize from zero."""
        solver: Minimizer = minimizer(optimizer, self.loss, gtol=rtol * self.first, max_it=100000, **settings)
        return solver.minimize(self.start, observers=observers)


class Benchmark:
    """The cases; sizes and grids shrink with `quick`."""

    def __init__(self, data_dir: str = "", sets: list[str] | None = None, seeds: int = 5, quick: bool = False) -> None:
        self.data_dir, self.seeds, self.quick = data_dir, seeds, quick
        self.sets = sets or (["australian", "mnist49", "generated"] if data_dir else ["generated"])
        self.curves: dict[str, dict[str, History]] = {}

    def astrom(self) -> list[Row]:
        """ASTROM from 1 % of the samples against batch trust region, to the same accuracy."""
        rows: list[Row] = []
        for problem in self._problems():
            share = Share()
            batch = problem.run("tr", ASTROM_RTOL, [share], radius=1.0)  # that of ASTROM
            reference = (share.products, share.hessians, batch.history[-1].gradients)
            found, errors = [], []
            for seed in range(self.seeds):
                share = Share()
                result = problem.run("astrom", ASTROM_RTOL, [share], seed=seed)
                found.append((share.products, share.hessians, result.history[-1].gradients))
                errors.append(abs(result.objective - batch.objective) if result.converged else math.inf)
                self.curves.setdefault(f"{problem.name}: ASTROM", {})[f"seed {seed}"] = result.history
            self.curves[f"{problem.name}: ASTROM"]["batch trust region"] = batch.history
            columns = ["CG work", "Hessian work", "gradients"]
            lines = {f"ASTROM, seed {seed}": each for seed, each in enumerate(found)}
            table(f"{problem.name}, relative gradient {ASTROM_RTOL:g}", columns, {"batch": reference, **lines})
            for k, (column, limit) in enumerate(zip(columns, (0.35, 0.4, 2.0))):
                ratio = statistics.mean(each[k] for each in found) / reference[k]
                rows.append(bar(f"{problem.name}: {column}, ASTROM / batch, mean", ratio, "x", limit))
                rows.append(plain(f"{problem.name}: the same, largest", max(e[k] for e in found) / reference[k], "x"))
            rows.append(bar(f"{problem.name}: loss, ASTROM - batch, largest", max(errors), "", 1e-9))
        return rows

    def mlvr(self) -> list[Row]:
        """MLVR with its defaults, three levels, against SVRG, SARAH and SSN, each the best of a grid."""
        rows: list[Row] = []
        for problem in self._problems():
            work = {f"MLVR, {levels} levels": self._work(problem, "mlvr", levels=levels) for levels in (3, 2)}
            cap = 300.0
            for method in ("ssn", "svrg", "sarah"):
                settings, best = self._tuned(problem, method, cap)
                work[method.upper()] = self._work(problem, method, **settings) if settings else [best]
                chosen = ", ".join(f"{key} {value:.3g}" for key, value in settings.items())
                case = f"{problem.name}: {method.upper()}, best of the grid: {chosen or 'none converges'}"
                rows.append(show(Row(case, best if settings else None, "gradients")))
            columns = ["mean", *(f"seed {seed}" for seed in range(self.seeds))]
            lines = {name: [statistics.mean(each), *each] for name, each in work.items()}
            table(f"{problem.name}, effective gradients to {MLVR_RTOL:g}", columns, lines)
            means = {name: statistics.mean(each) for name, each in work.items()}
            rivals = {name: mean for name, mean in means.items() if not name.startswith("MLVR")}
            best_rival = min(rivals, key=lambda name: rivals[name])
            rows += [plain(f"{problem.name}: {name}, mean", mean, "gradients") for name, mean in means.items()]
            ratio = means["MLVR, 3 levels"] / rivals[best_rival]
            rows.append(bar(f"{problem.name}: MLVR, 3 levels / {best_rival}", ratio, "x", 0.7))
        return rows

    def _problems(self) -> Iterator[Problem]:
        for name in self.sets:
            yield Problem(name, self.data_dir, self.quick)

    def _work(self, problem: Problem, method: str, **settings: Any) -> list[float]:
        """Effective gradients of each seed."""
        found = []
        for seed in range(self.seeds):
            result = problem.run(method, MLVR_RTOL, seed=seed, max_work=2000.0, **settings)
            self.curves.setdefault(f"{problem.name}: MLVR", {})[f"{method}, {settings}"] = result.history
            found.append(result.history[-1].work if result.converged else math.inf)
        return found

    def _tuned(self, problem: Problem, method: str, cap: float) -> tuple[dict[str, Any], float]:
        """The settings of the grid with the least work for seed 0, and that; runs end at the least so far."""
        best: dict[str, Any] = {}
        for settings in self._grid(problem.loss, method):
            result = problem.run(method, MLVR_RTOL, seed=0, max_work=cap, **settings)
            if result.converged and result.history[-1].work < cap:
                best, cap = settings, result.history[-1].work
        return best, cap if best else math.inf

    def _grid(self, loss: LogisticLoss, method: str) -> Iterator[dict[str, Any]]:
        if method == "ssn":
            shares = (0.1, 0.3) if self.quick else (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
            for share, rtol in itertools.product(shares, (0.1, 0.3) if self.quick else (0.01, 0.1, 0.3, 0.5)):
                yield {"coarsening": share, "cg_rtol": rtol}
            return
        curvature = 0.25 * float((torch.as_tensor(loss.rows) ** 2).sum(1).max())  # of the steepest sample
        batches = (16,) if self.quick else (1, 8) if loss.samples < 1000 else (16, 128)
        sizes = (1.0, 3.0) if self.quick else (0.3, 1.0, 3.0, 10.0)
        for batch, epochs, size in itertools.product(batches, (1, 2), sizes):
            yield {"batch": batch, "steps": max(epochs * loss.samples // batch, 2), "step_size": size / curvature}


def picture(curves: dict[str, dict[str, History]], file: str) -> None:
    """Gradient norms over work, a panel for each case and set."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(curves), 3.8), layout="constrained")
    for axis, (title, runs) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items()):
        for name, history in runs.items():
            axis.semilogy(history["work"], history["optimality"], label=name)
        axis.set(title=title, xlabel="work, full gradients", ylabel="gradient norm")
        axis.legend(fontsize=5)
    figure.savefig(file, format=Path(file).suffix[1:])


CASES: dict[str, Callable[[Benchmark], list[Row]]] = {"astrom": Benchmark.astrom, "mlvr": Benchmark.mlvr}


def main(argv: list[str] | None = None) -> list[Row]:
    """Measure, print the tables, write rows as JSON and a picture where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-json", default="", help="write the rows to this file")
    parser.add_argument("-plot", default="", help="write a picture to this .png, .pdf or .svg file")
    parser.add_argument("-only", nargs="+", choices=CASES, default=list(CASES), help="these cases alone")
    parser.add_argument("-sets", nargs="+", default=None, help="these data sets: australian, mnist49, generated")
    parser.add_argument("-data_dir", default="", help="folder of the data sets; without it, the generated one alone")
    parser.add_argument("-seeds", type=int, default=5, help="runs of each random method")
    parser.add_argument("-quick", action="store_true", help="small sizes: does it run?")
    options: Any = parser.parse_args(argv)
    benchmark = Benchmark(options.data_dir, options.sets, options.seeds, options.quick)
    rows = measure(CASES, options.only, benchmark, options.json)
    if options.plot:
        picture(benchmark.curves, options.plot)
    return rows


if __name__ == "__main__":
    main()
