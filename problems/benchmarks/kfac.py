"""K-FAC with one setting against SGD and Adam that are tuned: steps, epochs and CPU seconds until a loss is reached.

    OMP_NUM_THREADS=1 python -m problems.benchmarks.kfac -data_dir DATA -json build/kfac.json
    OMP_NUM_THREADS=1 python -m problems.benchmarks.kfac -data_dir DATA -only mlp -batches 64 256

A rival's rate is the best of its grid on seed 0, of fewest steps or highest test accuracy; K-FAC has the defaults of
its options everywhere. All methods are evaluated at the same average of their weights. Figures are medians over seeds,
with the least and the largest. Runs are in this process; CPU seconds are those of the steps, without evaluations of the
loss, of one thread.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from petsc4py import PETSc

from problems import autoencoder, kfac_mnist
from problems.benchmarks.processes import Row, bar, measure, plain, table

BATCHES = 64, 128, 256, 512, 1024, 2048, 4096, 8192
#: Rates that are tried.
SGD, ADAM, SGD_CODE = (0.03, 0.1, 0.3, 1.0), (1e-3, 3e-3, 1e-2), (3e-3, 1e-2, 3e-2, 0.1)
#: A rival is stopped at so many times the steps of K-FAC.
MORE = 4
#: Epochs of rivals on CIFAR-10; K-FAC has half of them.
EPOCHS, PER_EPOCH = 12, 40
IMAGES = ("-data", "cifar10", "-samples", 4000, "-batch", 100, "-standardize", "true")
CIFAR = (*IMAGES, "-network", "cnn", "-activation", "relu", "-check_every", 10**6)
#: Events of `-log_view` in a step.
PHASES = {
    "gradient, and again where the last step is judged": "pdeoptNetGradient",
    "factors": "pdeoptNetFactors",
    "messages of the factors": "pdeoptNetMessages",
    "inverses": "pdeoptNetInverses",
    "preconditioned gradient": "pdeoptNetPrecondition",
    "quadratic model": "pdeoptNetModel",
    "loss after the step": "pdeoptNetCheck",
    "update": "pdeoptNetUpdate",
}

Runs = list[dict[str, Any]]


class Benchmark:
    """The cases; `-quick` does a few steps of each."""

    def __init__(self, data_dir: str, quick: bool = False, seeds: int = 3, batches: Sequence[int] = BATCHES) -> None:
        self.data_dir, self.quick, self.seeds, self.batches = data_dir, quick, 1 if quick else seeds, batches

    def mlp(self) -> list[Row]:
        """196-100-100-10 on pooled MNIST, 16,384 samples, to 0.05."""
        rows, words = [], ("-data", "mnist", "-target_loss", 0.05)
        mine = {b: self._runs(kfac_mnist, *words, "-batch", b, "-max_steps", 3000) for b in self.batches}
        rivals: dict[int, float | None] = {}
        for b, runs in mine.items():
            rows.append(_told(f"mlp: K-FAC at batch {b}", runs))
            most = int(MORE * (_median(runs, "steps") or 300))
            more = ("-batch", b, "-max_steps", most, "-check_every", max(1, 4096 // b))
            best = self._best(kfac_mnist, "sgd", SGD, *words, *more)
            rows += _compared("mlp", f"SGD at batch {b}", runs, best, most, {"steps": 0.7})
            rivals[b] = _median(best, "steps") if best else None
        lines: dict[str, list[float | None]] = {
            "K-FAC, steps": [_median(runs, "steps") for runs in mine.values()],
            "K-FAC, epochs": [_median(runs, "epochs") for runs in mine.values()],
            "K-FAC, CPU s": [_median(runs, "cpu_seconds") for runs in mine.values()],
            "SGD, best rate, steps": list(rivals.values()),
        }
        table("pooled MNIST to 0.05, batch", [str(b) for b in mine], lines)
        flat = [_median(mine[b], "epochs") or math.inf for b in (64, 128, 256) if b in mine]
        if len(flat) == 3:
            rows.append(bar("mlp: epochs from 64 to 256, largest by smallest", max(flat) / min(flat), "", 1.25))
        return rows

    def fashion(self) -> list[Row]:
        """The same network on Fashion-MNIST to 0.25, batch 8192."""
        words = ("-data", "fashion_mnist", "-target_loss", 0.25, "-batch", 8192, "-max_steps", 120)
        runs = self._runs(kfac_mnist, *words)
        steps = _median(runs, "steps") or math.inf
        rows = [_told("fashion: K-FAC at batch 8192", runs), bar("fashion: steps of K-FAC", steps, "steps", 45)]
        return rows + _compared("fashion", "SGD", runs, self._best(kfac_mnist, "sgd", SGD, *words), 120, {})

    def autoencoder(self) -> list[Row]:
        """196-120-60-30-10-... on pooled MNIST to 1.4."""
        words = ("-data", "mnist", "-target_loss", 1.4)
        runs = {b: self._runs(autoencoder, *words, "-batch", b, "-max_steps", 600) for b in (512, 2048, 8192)}
        rows = [_told(f"autoencoder: K-FAC at {b}", found) for b, found in runs.items()]
        most, steps = 2500, {b: _median(found, "steps") or math.nan for b, found in runs.items()}
        rows.append(bar("autoencoder: steps at 512 by those at 8192", steps[512] / steps[8192], "", 1.6))
        for name, rates in (("adam", ADAM), ("sgd", SGD_CODE)):
            more = ("-batch", 512, "-max_steps", most, "-check_every", 20)
            best = self._best(autoencoder, name, rates, *words, *more)
            bars = {"steps": 0.25, "cpu_seconds": 0.8}
            rows += _compared("autoencoder", f"{name} at 512", runs[512], best, most, bars)
        return rows

    def cnn(self) -> list[Row]:
        """Two convolutions of ReLU on 4000 images of CIFAR-10: test accuracy at half the epochs."""
        runs = self._runs(kfac_mnist, *CIFAR, "-max_steps", EPOCHS // 2 * PER_EPOCH)
        mine = _accuracy(runs)
        rows, rivals = [_tested(f"cnn: K-FAC, {EPOCHS // 2} epochs", runs)], []
        for name, rates in (("sgd", SGD[:3]), ("adam", ADAM)):
            words = (*CIFAR, "-optimizer", name, "-max_steps", EPOCHS * PER_EPOCH)
            tried = {lr: self._run(kfac_mnist, *words, "-lr", lr) for lr in rates}
            lr = max(tried, key=lambda rate: tried[rate]["test_accuracy"])
            found = [tried[lr], *self._runs(kfac_mnist, *words, "-lr", lr, first=1)]
            rivals.append(_accuracy(found))
            rows.append(_tested(f"cnn: {name}, rate {lr:g}, {EPOCHS} epochs", found))
        return [*rows, bar("cnn: mean of K-FAC less that of the best rival", mine - max(rivals), "points", -2, False)]

    def phases(self) -> list[Row]:
        """What the parts of a step take, and a step in gradients."""
        PETSc.Log.begin()
        rows = []
        self._run(kfac_mnist, "-data", "mnist", "-max_steps", 1)  # PyTorch loads forward derivatives
        for name, script, b in (("mlp", kfac_mnist, 64), ("mlp", kfac_mnist, 8192), ("autoencoder", autoencoder, 512)):
            before = {phase: _seconds(event) for phase, event in PHASES.items()}
            run = self._run(script, "-data", "mnist", "-batch", b, "-max_steps", 40, "-check_every", 40)
            spent = {phase: _seconds(event) - before[phase] for phase, event in PHASES.items()}
            whole = sum(spent.values())
            shares: dict[str, list[float]] = {phase: [100 * each / whole] for phase, each in spent.items()}
            table(f"{name} at batch {b}: share of a step, %", ["%"], shares)
            rival = ("-optimizer", "sgd", "-lr", 1e-3, "-max_steps", 40, "-check_every", 40, "-averaging", 0)
            gradient = self._run(script, "-data", "mnist", "-batch", b, *rival)["cpu_seconds"]
            rows.append(plain(f"phases: {name} at batch {b}, a step in SGD's", run["cpu_seconds"] / gradient, ""))
        return rows

    def _runs(self, script: Any, *words: object, first: int = 0) -> Runs:
        return [self._run(script, *words, "-seed", seed) for seed in range(first, self.seeds)]

    def _best(self, script: Any, name: str, rates: tuple[float, ...], *words: object) -> Runs:
        """Runs of all seeds at the rate that needs fewest steps; none where no rate has reached the loss."""
        tried = {lr: self._run(script, *words, "-optimizer", name, "-lr", lr) for lr in rates}
        told = {lr: run["steps"] if run["reached"] else None for lr, run in tried.items()}
        print(f"  {name}, steps by rate on seed 0: {told}", flush=True)
        reached = {lr: run for lr, run in tried.items() if run["reached"]}
        if not reached:
            return []
        lr = min(reached, key=lambda rate: reached[rate]["steps"])
        return [tried[lr], *self._runs(script, *words, "-optimizer", name, "-lr", lr, first=1)]

    def _run(self, script: Any, *words: object) -> dict[str, Any]:
        """The summary of a run."""
        more = ["-max_steps", 3] if self.quick else []
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            path = Path(folder) / "run.json"
            given = [*words, "-data_dir", self.data_dir, "-rival", "none", "-summary", path, *more]
            try:
                script.main([str(word) for word in given])
            except ArithmeticError:  # a rate that is too large
                return {"reached": False, "steps": 0, "test_accuracy": 0.0, "cpu_seconds": 0.0}
            return json.loads(path.read_text())  # type: ignore[no-any-return]


def _median(runs: Runs, name: str) -> float | None:
    """Over seeds; None where one has not reached the loss."""
    return statistics.median(run[name] for run in runs) if all(run["reached"] for run in runs) else None


def _told(case: str, runs: Runs) -> Row:
    """Median of the steps, with their spread and the seconds."""
    steps, seconds = sorted(run["steps"] for run in runs), statistics.median(run["cpu_seconds"] for run in runs)
    missed = "" if all(run["reached"] for run in runs) else ", NOT ALL HAVE REACHED IT"
    return plain(f"{case}, {steps[0]} to {steps[-1]}, {seconds:.1f} CPU s{missed}", statistics.median(steps), "steps")


def _tested(case: str, runs: Runs) -> Row:
    """Mean test accuracy with its spread."""
    found = sorted(100 * run["test_accuracy"] for run in runs)
    seconds = statistics.median(run["cpu_seconds"] for run in runs)
    return plain(f"{case}, {found[0]:.1f} to {found[-1]:.1f}, {seconds:.1f} CPU s", _accuracy(runs), "%")


def _accuracy(runs: Runs) -> float:
    return 100 * statistics.mean(run["test_accuracy"] for run in runs)


def _compared(case: str, rival: str, mine: Runs, best: Runs, most: int, bars: dict[str, float]) -> list[Row]:
    """Ratios of medians of K-FAC and a rival; where no rate of that has reached the loss, a bound."""
    if not best or _median(best, "steps") is None:
        which = "on all seeds" if best else "at any rate"
        rows = [plain(f"{case}: {rival} has not reached it {which} in so many steps", most, "steps")]
        if "steps" in bars:
            share = (_median(mine, "steps") or math.inf) / most
            rows.append(bar(f"{case}: steps, share of {rival}'s, below", share, "", bars["steps"]))
        return rows
    rows = [_told(f"{case}: {rival}", best)]
    for name, limit in bars.items():
        share = (_median(mine, name) or math.inf) / (_median(best, name) or math.inf)
        rows.append(bar(f"{case}: {name.replace('_', ' ')}, share of {rival}'s", share, "", limit))
    return rows


def _seconds(event: str) -> float:
    return float(PETSc.Log.Event(event).getPerfInfo()["time"])


NAMES = ("mlp", "fashion", "autoencoder", "cnn", "phases")
CASES: dict[str, Callable[[Benchmark], list[Row]]] = {name: getattr(Benchmark, name) for name in NAMES}


def main(argv: list[str] | None = None) -> list[Row]:
    """Measure, print the table, write it as JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-json", default="", help="write the rows to this file")
    parser.add_argument("-only", nargs="+", choices=CASES, default=list(CASES), help="these cases alone")
    parser.add_argument("-batches", nargs="+", type=int, default=BATCHES, help="of the case mlp, these alone")
    parser.add_argument("-data_dir", required=True, help="folder of the data sets")
    parser.add_argument("-seeds", type=int, default=3, help="runs of each setting")
    parser.add_argument("-quick", action="store_true", help="a few steps, one seed: does it run?")
    options: Any = parser.parse_args(argv)
    torch.set_num_threads(1)
    for name in ("json", "only", "batches", "data_dir", "seeds", "quick"):
        PETSc.Options().delValue(name)  # those of this program are not the scripts'
    benchmark = Benchmark(options.data_dir, options.quick, options.seeds, options.batches)
    return measure(CASES, options.only, benchmark, options.json)


if __name__ == "__main__":
    main()
