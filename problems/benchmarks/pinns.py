"""Training of physics-informed networks: dense and Schwarz-preconditioned quasi-Newton methods against L-BFGS.

    OMP_NUM_THREADS=1 python -m problems.benchmarks.pinns -json build/pinns.json -plot build/pinns

Work is in gradients of the whole loss at 10,000 points, every call counted, those of local solves by their part of the
layers. Every run is a process of its own on one core; times are of the processor.

* `dense`: self-scaled Broyden on 4 layers of 20, five seeds, to a relative error of 1e-5.
* `burgers`, `klein_gordon`: the best variant of SPQN to the error published for L-BFGS, 4.6e-4 and 6.1e-4; L-BFGS with
  3 pairs may take five times as much work, with 10 and 100 pairs as much; the published settings of SPQN as well.
* `equal`: SPQN with dense matrices, local and global, against the dense method alone, both with levels of points and
  without, at equal work, on four equations, residual networks 6x20.
* `divergence`: four equations, ten seeds, the methods in turn, 600 gradients at 1,000 points, 6x20.
* `overhead`: the optimizers' own time in that of the gradients, 8 layers of 20.
* `least_squares`: Levenberg-Marquardt with the defaults of the scripts: errors at some times of the processor, the
  worst of the seeds.
* `same`: Levenberg-Marquardt, self-scaled Broyden with three levels of points, SOAP and Nystroem-Newton-CG on the same
  networks, features and starts: seconds to some errors.
* `long`: toward 1e-7, points drawn anew where the residual is large.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pdeopt.optimize.descent.minimizer import Minimizer
from pdeopt.optimize.descent.quasinewton import LBFGS, SSBroyden
from pdeopt.optimize.descent.schwarz import SPQN
from problems.benchmarks import pinn_rivals
from problems.benchmarks.processes import Row, bar, execute, measure, plain, show, table
from problems.shared.equations import EQUATIONS

#: The defaults of the scripts: three levels of points, one sweep of local solves at the start, dense matrices in both.
BEST = ["-optimizer", "spqn"]
#: The paper's settings, but for the line search of the synchronization, without which it diverges.
PUBLISHED = ["-optimizer", "spqn", "-point_levels", "1", "-spqn_method", "lbfgs", "-spqn_memory", "3"]
PUBLISHED += ["-spqn_sync", "line", "-spqn_every", "1", "-spqn_local", "lbfgs", "-spqn_local_it", "50"]
PUBLISHED += ["-spqn_local_memory", "3"]
ADDITIVE, MULTIPLICATIVE = [*PUBLISHED, "-spqn_type", "additive"], [*PUBLISHED, "-spqn_type", "multiplicative"]
DENSE = ["-optimizer", "ssbroyden"]
#: A residual network for runs on all four equations.
SMALL = ["-layers", 6, "-width", 20]
#: Seconds of the processor, and errors that Levenberg-Marquardt is to have then.
IN_TIME = {
    "burgers": {9: 1e-3, 13: 2e-4, 25: 3e-5, 60: 5e-6},
    "klein_gordon": {30: 1e-4, 45: 5e-6, 75: 1e-6},
    "diffusion_transport": {25: 1e-4},
    "allen_cahn": {60: 1e-3, 300: 1e-5},
    "kdv": {120: 1e-4},
    "schroedinger": {120: 1e-4},
}
#: The networks of the scripts' least squares, for all methods.
SAME = {
    "burgers": ["-layers", 4, "-width", 20, "-features", "periodic", "-activation", "tanh"],
    "klein_gordon": ["-layers", 2, "-width", 24, "-features", "waves", "-activation", "sin"],
}
#: What the parts of the best variant are worth.
PARTS = {
    "SPQN": BEST,
    "SPQN, all points": [*BEST, "-point_levels", "1"],
    "dense, levels of points": [*DENSE, "-point_levels", "3"],
    "dense": DENSE,
}


class Benchmark:
    """The cases; small ones with `-quick`.

    Args:
        plot: files of pictures begin so; none if empty.
        seeds: of the comparisons.
        seconds: of the processor, of each run of `same`.
    """

    def __init__(self, quick: bool = False, plot: str = "", seeds: int = 3, seconds: float = 60.0) -> None:
        self.quick, self.plot, self.seeds = quick, plot, 1 if quick else seeds
        self.seconds = 3.0 if quick else seconds
        self.points = 500 if quick else 10_000

    def train(self, problem: str, *words: object) -> dict[str, Any]:
        """The summary of a run of `problems.pinn_...`."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "summary.json"
            limit = () if "-max_cpu_seconds" in words else ("-max_cpu_seconds", 0)
            execute(f"problems.pinn_{problem}", "-points", self.points, "-summary", file, *limit, *words)
            summary: dict[str, Any] = json.loads(file.read_text())
        numbers = (
            f"error {summary['relative_l2']:.3e}",
            f"loss {summary['loss']:.3e}",
            f"work {summary['work']:.0f}",
            f"{summary['cpu_seconds']:.0f} CPU s",
        )
        print(f"  {problem} {' '.join(map(str, words))}:", *numbers, flush=True)
        return summary

    def dense(self) -> list[Row]:
        """Self-scaled Broyden to 1e-5."""
        rows, net = [], ["-layers", 4, "-width", 20, "-body", "mlp", "-adaptive", 0]
        for seed in range(1 if self.quick else 5):
            limits = ["-max_gradients", 100 if self.quick else 5000, "-target_error", 1e-5, "-error_every", 50]
            found = self.train("burgers", *DENSE, *net, *limits, "-seed", seed)
            name = f"Burgers 4x20, dense, seed {seed}"
            rows.append(bar(f"{name}, {found['gradients']} gradients", found["relative_l2"], "relative L2", 1e-5))
            rows.append(bar(name, found["cpu_seconds"], "CPU s", 600))
        return rows

    def burgers(self) -> list[Row]:
        """Burgers, residual network 8x20, 8 parts."""
        return self._compare("burgers", 4.6e-4, self.seeds)

    def klein_gordon(self) -> list[Row]:
        """Klein-Gordon, residual network 6x50, 6 parts."""
        return self._compare("klein_gordon", 6.1e-4, self.seeds)

    def _compare(self, problem: str, target: float, seeds: int) -> list[Row]:
        """SPQN to the target; how far the others come with so much work, or five times as much."""
        rows, curves = [], {}
        for seed in range(seeds):
            common = ["-max_gradients", 0, "-seed", seed, "-target_error", target, "-error_every", 10]
            cap = 60 if self.quick else 4000
            best = self.train(problem, *BEST, *common, "-opt_max_work", cap)
            work = best["work"]
            rows.append(
                bar(
                    f"{problem}, seed {seed}, best SPQN: error after work {work:.0f}",
                    best["relative_l2"],
                    "relative L2",
                    target,
                )
            )
            runs = {"SPQN, best": best}
            for pairs, times in ((3, 5.0), (10, 1.0), (100, 1.0)):
                words = ["-optimizer", "lbfgs", "-lbfgs_memory", pairs, "-opt_max_work", times * work]
                found = runs[f"L-BFGS, {pairs} pairs"] = self.train(problem, *words, *common)
                reached = found["relative_l2"] <= target
                rows.append(
                    bar(
                        f"{problem}, seed {seed}: work of SPQN / {'that' if reached else 'more than that'} of L-BFGS, "
                        f"{pairs} pairs, which is at {found['relative_l2']:.1e}",
                        work / found["work"],
                        "x",
                        1.0 / times if reached else 1.0 / times + 1e-2,
                    )
                )
            for name, words in {"ASPQN": ADDITIVE, "MSPQN": MULTIPLICATIVE, "dense": DENSE}.items():
                found = runs[f"{name}, as published" if name != "dense" else "dense alone"] = self.train(
                    problem, *words, *common, "-opt_max_work", work
                )
                rows.append(
                    plain(
                        f"{problem}, seed {seed}, {name}: error after work {found['work']:.0f}",
                        found["relative_l2"],
                        "relative L2",
                    )
                )
            curves = curves or runs
            lines = {name: [r["work"], r["gradients"], r["cpu_seconds"], r["relative_l2"]] for name, r in runs.items()}
            table(f"{problem}, seed {seed}", ["work", "calls of gradients", "CPU s", "relative L2"], lines)
        if self.plot:
            _picture(f"{self.plot}_{problem}.png", problem, curves)
        return rows

    def equal(self) -> list[Row]:
        """Dense matrices with and without local solves, with and without levels, at equal work."""
        rows, work = [], 40 if self.quick else 250
        for problem in EQUATIONS:
            errors: dict[str, float] = {}
            for name, words in PARTS.items():
                words = [*words, *SMALL, "-max_gradients", "0", "-opt_max_work", str(work), "-seed"]
                found = [self.train(problem, *words, seed)["relative_l2"] for seed in range(self.seeds)]
                errors[name] = statistics.geometric_mean(found)
                rows.append(plain(f"{problem}: error after work {work}, {name}", errors[name], "relative L2"))
            ratio = errors["SPQN"] / errors["dense"]
            rows.append(plain(f"{problem}: error of SPQN / dense alone", ratio, "x"))
        ratios = [row.measured for row in rows if row.unit == "x" and row.measured is not None]
        return [*rows, bar("the best of the four", min(ratios), "x", 1.0)]

    def divergence(self) -> list[Row]:
        """Runs that end in NaN, or above their start."""
        bad, runs = 0, 0
        points, kinds = self.points, (ADDITIVE, MULTIPLICATIVE, BEST, DENSE)
        self.points = min(points, 1000)
        for problem in EQUATIONS:
            for seed in range(2 if self.quick else 10):
                words = [*kinds[seed % len(kinds)], "-max_gradients", 100 if self.quick else 600, "-seed", seed]
                found = self.train(problem, *words, *SMALL)
                good = found["loss"] is not None and found["loss"] <= found["start_loss"]
                bad, runs = bad + (not good), runs + 1
        self.points = points
        return [bar(f"of {runs} runs, those that end in NaN or above their start", bad, "runs", 0)]

    def overhead(self) -> list[Row]:
        """Time outside the function, in that inside."""
        function = EQUATIONS["burgers"].function(points=self.points, layers=8, width=20, body="resnet", adaptive=True)
        limit = 5 if self.quick else 60
        methods: dict[str, Minimizer] = {
            "L-BFGS, 10 pairs": LBFGS(function, max_gradients=limit),
            "L-BFGS, 100 pairs": LBFGS(function, memory=100, max_gradients=2 * limit),
            "dense": SSBroyden(function, max_gradients=limit),
            "SPQN, additive": SPQN(function, parts=8, local_it=5, max_gradients=limit),
            "SPQN, dense": SPQN(function, parts=8, method="ssbroyden", local_it=0, max_gradients=limit),
        }
        return [bar(f"overhead of {name}, 8x20", _overhead(m, function), "x", 0.1) for name, m in methods.items()]

    def least_squares(self) -> list[Row]:
        """Levenberg-Marquardt: errors at the times of `IN_TIME`."""
        rows = []
        for problem, bars in IN_TIME.items():
            limit = 3 if self.quick else 1 + max(bars)
            words = ["-optimizer", "lm", "-max_cpu_seconds", limit, "-error_every", 50, "-seed"]
            runs = [self.train(problem, *words, seed)["curve"] for seed in range(self.seeds)]
            for seconds, error in bars.items():
                found = [_error_at(run, seconds) for run in runs]
                rows.append(bar(f"{problem}: error after {seconds} CPU s, worst", max(found), "relative L2", error))
                print(f"  {problem}, {seconds} s:", ", ".join(f"{each:.1e}" for each in found))
        return rows

    def same(self) -> list[Row]:
        """Seconds of four methods to the same errors, everything else the same."""
        rows = []
        for problem, words in SAME.items():
            net, spent = [*words, "-body", "mlp", "-adaptive", 0], self.seconds
            limit = ["-max_cpu_seconds", spent, "-error_every", 20, "-max_gradients", 0]
            kinds = {"Levenberg-Marquardt": ["-optimizer", "lm"], "dense": PARTS["dense, levels of points"]}
            for seed in range(self.seeds):
                runs = {name: self.train(problem, *kind, *net, *limit, "-seed", seed) for name, kind in kinds.items()}
                curves = {name: run["curve"] for name, run in runs.items()}
                curves |= {name: _rival(problem, name, spent, seed) for name in pinn_rivals.METHODS}
                for name, curve in curves.items():
                    times = {error: _time_to(curve, error) for error in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)}
                    told = ", ".join(f"{error:.0e} at {seconds:.0f} s" for error, seconds in times.items() if seconds)
                    text = f"{problem}, seed {seed}, {name}: {told or 'none'}; at the end"
                    rows.append(plain(text, curve["relative_l2"][-1], "relative L2"))
                first, *others = curves.items()
                for name, curve in others:
                    text = f"{problem}, seed {seed}: {first[0]} is ahead of {name} from then on"
                    rows.append(show(Row(text, crossing(first[1], curve), "CPU s")))
        return rows

    def long(self) -> list[Row]:
        """As far as it goes."""
        words = ["-layers", 4, "-width", 20, "-body", "mlp", "-adaptive", 0, "-resample_every", 500]
        words += ["-target_error", 1e-7]
        found = self.train("burgers", *DENSE, *words, "-max_gradients", 300 if self.quick else 20_000)
        return [
            plain(f"Burgers 4x20, dense, {found['gradients']} gradients", found["relative_l2"], "relative L2"),
            plain("Burgers 4x20, dense, long run", found["cpu_seconds"], "CPU s"),
        ]


def _rival(problem: str, method: str, seconds: float, seed: int) -> dict[str, list[float]]:
    """The curve of a run of `pinn_rivals`."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "curve.json"
        words = problem, method, "-seconds", seconds, "-seed", seed, "-json", file
        execute("problems.benchmarks.pinn_rivals", *words)
        found: dict[str, list[float]] = json.loads(file.read_text())
    return found


def _error_at(curve: dict[str, list[float]], seconds: float) -> float:
    """The last error that was measured until then."""
    return [error for time, error in zip(curve["cpu_seconds"], curve["relative_l2"]) if time <= seconds][-1]


def _time_to(curve: dict[str, list[float]], error: float) -> float:
    """When an error below this was first measured; 0 for never."""
    return next((time for time, each in zip(curve["cpu_seconds"], curve["relative_l2"]) if each <= error), 0.0)


def crossing(ours: dict[str, list[float]], theirs: dict[str, list[float]]) -> float | None:
    """From when on the best error so far of one curve is below that of another to the end; None for never."""
    times = sorted({*ours["cpu_seconds"], *theirs["cpu_seconds"]})
    behind = [time for time in times if _best(ours, time) >= _best(theirs, time)]
    later = [time for time in times if not behind or time > behind[-1]]
    return later[0] if later else None


def _best(curve: dict[str, list[float]], seconds: float) -> float:
    """The least error that was measured until then; infinite where there is none yet."""
    known = (error for time, error in zip(curve["cpu_seconds"], curve["relative_l2"]) if time <= seconds)
    return min(known, default=math.inf)


def _overhead(minimizer: Minimizer, function: Any) -> float:
    """Processor time of a run outside the calls of the function, divided by that inside."""
    inside = [0.0]

    def timed(method: Any) -> Any:
        def call(*arguments: Any) -> Any:
            begin = time.process_time()
            found = method(*arguments)
            inside[0] += time.process_time() - begin
            return found

        return call

    class Timed(type(function)):  # type: ignore[misc]
        """Its local functions are timed with it."""

        def local(self, *arguments: Any) -> Any:
            found = timed(super().local)(*arguments)
            found._value_and_gradient = timed(found._value_and_gradient)
            return found

    function.__class__ = Timed
    evaluate = function._value_and_gradient
    function._value_and_gradient = timed(evaluate)
    start, begin = function.initial(0), time.process_time()
    minimizer.minimize(start)
    total = time.process_time() - begin
    del function._value_and_gradient
    function.__class__ = Timed.__bases__[0]
    return (total - inside[0]) / inside[0]


def _picture(file: str, problem: str, runs: dict[str, dict[str, Any]]) -> None:
    """Error over work and over time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for name, run in runs.items():
        history = run["history"]
        points = [(w, e) for w, e in zip(history["work"], history["relative_l2"]) if e is not None]
        for axis, unit in zip(axes, (1.0, run["cpu_seconds"] / run["work"])):
            axis.loglog([unit * w for w, _ in points], [e for _, e in points], label=name)
    axes[0].set(title=problem, xlabel="work in full gradients", ylabel="relative L2 error")
    axes[1].set(xlabel="processor time in s")
    axes[1].legend()
    figure.savefig(file, dpi=120)


NAMES = "overhead dense burgers klein_gordon equal divergence least_squares same long"
CASES_BY_NAME = {name: getattr(Benchmark, name) for name in NAMES.split()}


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Measure and print the rows of the cases that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-quick", action="store_true", help="small cases, to see that all runs")
    parser.add_argument("-only", nargs="+", choices=CASES_BY_NAME, default=list(CASES_BY_NAME), help="cases")
    parser.add_argument("-seeds", type=int, default=3, help="of the comparisons")
    parser.add_argument("-seconds", type=float, default=60.0, help="of the processor, of each run of `same`")
    parser.add_argument("-plot", default="", help="pictures, in files whose names begin so")
    parser.add_argument("-json", default="", help="write the rows to this file")
    options = parser.parse_args(argv)
    benchmark = Benchmark(options.quick, options.plot, options.seeds, options.seconds)
    return measure(CASES_BY_NAME, options.only, benchmark, options.json)


if __name__ == "__main__":
    main()
