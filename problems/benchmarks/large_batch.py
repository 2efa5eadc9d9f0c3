"""Batches of 8192 against batches of 128, at the same epochs: linear scaling, LARS, LAMB, Adam and K-FAC.

    OMP_NUM_THREADS=1 python -m problems.benchmarks.large_batch -data_dir DATA -json build/large_batch.json

MLP 784-500-500-10 with ReLU on all of MNIST, 20 epochs, that is, 140 steps at 8192; a warm-up of two epochs and a
cosine but where stated. The rate at 128 is the best of a grid on seed 0 in 5 epochs; rates of the others are of grids
on seed 0 in 20 epochs. Runs are in this process; CPU seconds are those of the steps, of one thread.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from petsc4py import PETSc

from problems import large_batch
from problems.benchmarks.processes import Row, bar, measure, plain

#: Rates that are tried for SGD at batch 128.
SGD = (0.03, 0.1, 0.3)
#: Rivals at batch 8192 and the rates that are tried; LARS goes 20 epochs, K-FAC half of them.
LARS, RIVALS = (30.0, 50.0), {"sgd": (0.3, 0.6), "lamb": (0.1, 0.2), "adam": (2e-3, 5e-3)}
#: Steps after which linear scaling is looked at.
DIVERGED = 40


class Benchmark:
    """The cases; `-quick` does a few steps of each."""

    def __init__(self, data_dir: str = "", quick: bool = False, seeds: int = 3) -> None:
        self.data_dir, self.quick, self.seeds = data_dir, quick, 1 if quick else seeds

    def small(self) -> list[Row]:
        """The rate of SGD at batch 128."""
        words = ("-optimizer", "sgd", "-batch", 128, "-epochs", 5, "-warmup", 0)
        return [plain(f"batch 128: SGD at {lr}, 5 epochs", self._run(*words, "-lr", lr)["accuracy"], "%") for lr in SGD]

    def large(self) -> list[Row]:
        """SGD at 128, its rate scaled to 8192, and LARS."""
        seeds = range(self.seeds)
        scaled = ("-optimizer", "sgd", "-lr", 0.1, "-scaling", "linear", "-max_steps", DIVERGED)
        rows = []
        for name, more in (("", ("-warmup", 0)), (" after a warm-up", ())):
            found = [self._run(*scaled, *more, "-seed", seed)["train_loss"] for seed in seeds]
            label = f"batch 8192: least loss of linear scaling{name}, {DIVERGED} steps, 2.3 at the start"
            rows.append(bar(label, min(found), "", 2.3, False))
        small = [self._run("-optimizer", "sgd", "-batch", 128, "-seed", seed) for seed in seeds]
        lars = [self._run("-seed", seed) for seed in seeds]
        rows += [_mean("batch 128: SGD at 0.1", small), _mean("batch 8192: LARS at 50", lars)]
        lost = statistics.mean(a["accuracy"] - b["accuracy"] for a, b in zip(small, lars))
        return [*rows, bar("batch 128 less LARS at 8192, test accuracy", lost, "points", 1.0)]

    def rivals(self) -> list[Row]:
        """Other optimizers at 8192, one seed."""
        rows = []
        for name, rates in RIVALS.items():
            found = {lr: self._run("-optimizer", name, "-lr", lr) for lr in rates}
            lr = max(found, key=lambda rate: found[rate]["accuracy"])
            rows.append(_mean(f"batch 8192: {name} at {lr}, of {rates}", [found[lr]]))
        for epochs in (5, 10):
            rows.append(
                _mean(f"batch 8192: K-FAC, {epochs} epochs", [self._run("-optimizer", "kfac", "-epochs", epochs)])
            )
        return rows

    def lars(self) -> list[Row]:
        """Rates and warm-ups of LARS at 8192, one seed."""
        runs = {f"rate {lr}": ("-lr", lr) for lr in LARS} | {"rate 50, no warm-up": ("-warmup", 0)}
        return [_mean(f"batch 8192: LARS, {name}", [self._run(*words)]) for name, words in runs.items()]

    def _run(self, *words: object) -> dict[str, Any]:
        """The summary of a run, with the accuracy in per cent; a loss that is not finite is an infinite one."""
        more = ["-max_steps", 2] if self.quick else []
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            path = Path(folder) / "run.json"
            given = [
                *words,
                "-data",
                "mnist",
                "-check_every",
                10**6,
                "-data_dir",
                self.data_dir,
                "-summary",
                path,
                *more,
            ]
            try:
                large_batch.main([str(word) for word in given])
            except ArithmeticError:
                found = {"train_loss": float("inf"), "test_accuracy": 0.1, "cpu_seconds": 0.0}
            else:
                found = json.loads(path.read_text())
        found["accuracy"] = 100 * found["test_accuracy"]
        print("  ", *words, f"loss {found['train_loss']:.4g}, {found['accuracy']:.2f} %", flush=True)
        return found


def _mean(name: str, runs: list[dict[str, Any]]) -> Row:
    """Test accuracy over seeds, with the spread and CPU seconds in its name."""
    values = [run["accuracy"] for run in runs]
    spread = f", {min(values):.2f} to {max(values):.2f}" if len(runs) > 1 else ""
    return plain(
        f"{name} ({statistics.mean(run['cpu_seconds'] for run in runs):.0f} CPU s{spread})",
        statistics.mean(values),
        "%",
    )


NAMES = ("small", "large", "lars", "rivals")
CASES: dict[str, Callable[[Benchmark], list[Row]]] = {name: getattr(Benchmark, name) for name in NAMES}


def main(argv: list[str] | None = None) -> list[Row]:
    """Measure, print the table, write it as JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-json", default="", help="write the rows to this file")
    parser.add_argument("-only", nargs="+", choices=CASES, default=list(CASES), help="these cases alone")
    parser.add_argument("-data_dir", required=True, help="folder of the data sets")
    parser.add_argument("-seeds", type=int, default=3, help="runs of each setting")
    parser.add_argument("-quick", action="store_true", help="a few steps, one seed: does it run?")
    options: Any = parser.parse_args(argv)
    torch.set_num_threads(1)
    for name in ("json", "only", "data_dir", "seeds", "quick"):
        PETSc.Options().delValue(name)  # those of this program are not the scripts'
    return measure(CASES, options.only, Benchmark(options.data_dir, options.quick, options.seeds), options.json)


if __name__ == "__main__":
    main()
