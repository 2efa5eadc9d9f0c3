"""APTS on MNIST and CIFAR-10 against SGD, Adam and L-BFGS that are tuned, at equal work.

    OMP_NUM_THREADS=1 python -m problems.benchmarks.apts -data_dir DATA -json build/apts.json

Work is counted in gradients of all training samples, those of parts by their share: 30 on MNIST (9,000 samples, 1,000
for validation), 40 on the CIFAR-10 subset (3,600 and 400). The accuracy of a run is that on the test set of the weights
that did best on the validation set, of twenty times that both are measured; so runs that overfit stop early, all of
them alike. A rival's setting is the best in validation of its grid, on seed 0; APTS has one setting for both data sets.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

from problems.benchmarks.layer_parallel import script
from problems.benchmarks.processes import Row, bar, measure, plain, table

#: Rivals and the settings that are tried.
GRID: dict[str, tuple[str, tuple[object, ...]]] = {
    "sgd": ("-lr", (0.01, 0.03, 0.1, 0.3)),
    "adam": ("-lr", (3e-4, 1e-3, 3e-3, 1e-2)),
    "lbfgs": ("-lbfgs_memory", (10, 50)),
}

#: Parts that are compared; the first has one.
DATA, WEIGHTS = (1, 2, 4, 8), {"mnist": (2, 3), "cifar": (2, 3, 5)}

#: Test accuracies in points that APTS may be behind.
TOLERANCE = 0.5


class Benchmark:
    """The cases; `-quick` trains for a tenth of the work, on one seed."""

    def __init__(self, data_dir: str = "", quick: bool = False, seeds: int = 3) -> None:
        self.data_dir, self.quick, self.seeds = data_dir, quick, 1 if quick else seeds

    def mnist(self) -> list[Row]:
        """The fully connected network."""
        return self._compare("mnist", 30)

    def cifar(self) -> list[Row]:
        """The convolutional network."""
        return self._compare("cifar", 40)

    def _compare(self, name: str, work: float) -> list[Row]:
        def runs(*words: object, seeds: range) -> list[dict[str, Any]]:
            budget = work / 10 if self.quick else work
            return [
                script(f"apts_{name}", "-opt_max_work", budget, "-data_dir", self.data_dir, "-seed", seed, *words)
                for seed in seeds
            ]

        rows, lines, rivals = [], {}, {}
        for rival, (option, values) in GRID.items():
            tried = {value: runs("-optimizer", rival, option, value, seeds=range(1))[0] for value in values}
            best = max(tried, key=lambda value: tried[value]["validation_accuracy"])
            found = [tried[best], *runs("-optimizer", rival, option, best, seeds=range(1, self.seeds))]
            title = f"{rival}, {option} {best}"
            lines[title] = _points(found)
            rivals[rival] = statistics.mean(lines[title])
            rows.append(plain(f"{name}: {title}, test accuracy, mean of seeds", rivals[rival], "%"))
        means = {}
        for option, number in [("data", d) for d in DATA] + [("weights", w) for w in WEIGHTS[name]]:
            title = f"APTS, {number} in {option}"
            lines[title] = _points(runs(f"-apts_{option}", number, seeds=range(self.seeds)))
            means[option, number] = statistics.mean(lines[title])
            best_rival = max(rivals.values())
            rows.append(plain(f"{name}: {title}, test accuracy, mean of seeds", means[option, number], "%"))
            case = f"{name}: {title}, less the best of the rivals"
            rows.append(bar(case, means[option, number] - best_rival, "points", -TOLERANCE, False))
        for option in ("data", "weights"):
            lowest = min(mean for (kind, number), mean in means.items() if kind == option and number > 1)
            case = f"{name}: the lowest of more parts in {option}, less one part"
            rows.append(bar(case, lowest - means["data", 1], "points", -TOLERANCE, False))
        table(f"{name}: test accuracy, %", [f"seed {seed}" for seed in range(self.seeds)], lines)
        return rows


def _points(runs: list[dict[str, Any]]) -> list[float]:
    return [100 * run["test_accuracy"] for run in runs]


CASES: dict[str, Callable[[Benchmark], list[Row]]] = {name: getattr(Benchmark, name) for name in ("mnist", "cifar")}


def main(argv: list[str] | None = None) -> list[Row]:
    """Measure, print the table, write it as JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-json", default="", help="write the rows to this file")
    parser.add_argument("-only", nargs="+", choices=CASES, default=list(CASES), help="these cases alone")
    parser.add_argument("-data_dir", required=True, help="folder of the data sets")
    parser.add_argument("-seeds", type=int, default=3, help="runs of each setting")
    parser.add_argument("-quick", action="store_true", help="a tenth of the work, one seed: does it run?")
    options: Any = parser.parse_args(argv)
    return measure(CASES, options.only, Benchmark(options.data_dir, options.quick, options.seeds), options.json)


if __name__ == "__main__":
    main()
