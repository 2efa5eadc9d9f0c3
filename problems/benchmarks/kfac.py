"""K-FAC with one setting against SGD and Adam that are tuned: steps, epochs and CPU seconds until a loss is reached.

    OMP_NUM_THREADS=1 python -m problems.benchmarks.kfac -data_dir DATA -json build/kfac.json

A rival's rate is the best of its grid on seed 0, the one that needs fewest steps; K-FAC has the defaults of its options
everywhere. Runs are in this process; CPU seconds are those of the steps, without evaluations of the loss, of one
thread.
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

from problems import autoencoder, kfac_mnist
from problems.benchmarks.processes import Row, bar, measure, plain, table

BATCHES = 64, 128, 256, 512, 1024, 2048, 4096, 8192
#: Batches at which the rates of rivals are tried.
RIVAL_BATCHES = 64, 256, 1024, 8192
#: Rates that are tried.
SGD, ADAM = (0.03, 0.1, 0.3, 1.0, 2.0), (1e-3, 3e-3, 1e-2)
SGD_CODE = (1e-3, 3e-3, 1e-2, 3e-2)
#: Epochs of rivals on CIFAR-10; K-FAC has half of them.
EPOCHS, CIFAR = 8, ("-data", "cifar10", "-network", "cnn", "-samples", 4000, "-batch", 100)


class Benchmark:
    """The cases; `-quick` does a few steps of each."""

    def __init__(self, data_dir: str = "", quick: bool = False, seeds: int = 3) -> None:
        self.data_dir, self.quick, self.seeds = data_dir, quick, 1 if quick else seeds

    def mlp(self) -> list[Row]:
        """196-100-100-10 on pooled MNIST, 16,384 samples, to 0.05."""
        rows, words = [], ("-data", "mnist", "-target_loss", 0.05)
        kfac = {b: self._runs(kfac_mnist, *words, "-batch", b, "-max_steps", 3000) for b in BATCHES}
        steps = {b: _mean(found, "steps") for b, found in kfac.items()}
        epochs = {b: _mean(found, "epochs") for b, found in kfac.items()}
        lines: dict[str, list[float | None]] = {
            "K-FAC, steps": list(steps.values()),
            "K-FAC, epochs": list(epochs.values()),
            "K-FAC, CPU s": [_mean(found, "cpu_seconds") for found in kfac.values()],
        }
        best: dict[int, tuple[float | None, float]] = {}
        for b in RIVAL_BATCHES:
            most = int(4 * (steps[b] or 1000))
            best[b] = self._best(kfac_mnist, "sgd", SGD, *words, "-batch", b, "-max_steps", most)
            if best[b][0] is None:
                rows.append(plain(f"mlp: SGD at batch {b} has not reached it in so many steps", most, "steps"))
            elif (mine := steps[b]) is not None:
                rows.append(bar(f"mlp: steps at batch {b}, share of SGD's", mine / best[b][0], "", 0.7))
        lines["SGD, best rate, steps"] = [best[b][0] if b in best else None for b in BATCHES]
        table("pooled MNIST to 0.05, batch", [str(b) for b in BATCHES], lines)
        flat = [epochs[b] or float("inf") for b in (64, 128, 256)]
        return [*rows, bar("mlp: epochs from 64 to 256, largest by smallest", max(flat) / min(flat), "", 1.25)]

    def fashion(self) -> list[Row]:
        """The same network on Fashion-MNIST to 0.25, batch 8192."""
        words = ("-data", "fashion_mnist", "-target_loss", 0.25, "-batch", 8192, "-max_steps", 120)
        steps = _mean(self._runs(kfac_mnist, *words), "steps")
        sgd, _ = self._best(kfac_mnist, "sgd", SGD, *words)
        return [
            bar("fashion: steps of K-FAC at batch 8192", steps or float("inf"), "steps", 45),
            plain("fashion: steps of SGD, of 120", sgd or float("nan"), "steps"),
        ]

    def autoencoder(self) -> list[Row]:
        """196-120-60-30-10-... on pooled MNIST to 1.4."""
        words = ("-data", "mnist", "-target_loss", 1.4)
        runs = {b: self._runs(autoencoder, *words, "-batch", b, "-max_steps", 600) for b in (512, 2048, 8192)}
        steps = {b: _mean(found, "steps") or float("inf") for b, found in runs.items()}
        seconds = {b: _mean(found, "cpu_seconds") or float("inf") for b, found in runs.items()}
        rows = [plain(f"autoencoder: K-FAC at {b}, {seconds[b]:.1f} CPU s", steps[b], "steps") for b in runs]
        for name, rates in (("adam", ADAM), ("sgd", SGD_CODE)):
            more = ("-batch", 512, "-max_steps", 2000, "-check_every", 20)
            found, cpu = self._best(autoencoder, name, rates, *words, *more)
            if found is None:
                rows.append(plain(f"autoencoder: {name} has not reached it in so many steps, batch 512", 2000, "steps"))
                continue
            rows.append(plain(f"autoencoder: {name} at 512, {cpu:.1f} CPU s", found, "steps"))
            rows.append(bar(f"autoencoder: steps of K-FAC, share of {name}'s", steps[512] / found, "", 0.25))
            rows.append(bar(f"autoencoder: CPU seconds of K-FAC, share of {name}'s", seconds[512] / cpu, "", 0.8))
        return [*rows, bar("autoencoder: steps at 512 by those at 8192", steps[512] / steps[8192], "", 1.6)]

    def cnn(self) -> list[Row]:
        """A small convolutional network on a subset of CIFAR-10: test accuracy at half the epochs."""
        per_epoch = 40
        runs = self._runs(kfac_mnist, *CIFAR, "-max_steps", EPOCHS // 2 * per_epoch)
        mine = 100 * statistics.mean(run["test_accuracy"] for run in runs)
        rows, rivals = [plain(f"cnn: K-FAC, {EPOCHS // 2} epochs, test accuracy", mine, "%")], []
        for name, rates in (("sgd", (0.01, 0.03, 0.1)), ("adam", ADAM)):
            words = (*CIFAR, "-optimizer", name, "-max_steps", EPOCHS * per_epoch)
            tried = {lr: self._run(kfac_mnist, *words, "-lr", lr) for lr in rates}
            lr = max(tried, key=lambda rate: tried[rate]["test_accuracy"])
            found = [tried[lr], *self._runs(kfac_mnist, *words, "-lr", lr, first=1)]
            rivals.append(100 * statistics.mean(run["test_accuracy"] for run in found))
            rows.append(plain(f"cnn: {name}, rate {lr}, {EPOCHS} epochs, test accuracy", rivals[-1], "%"))
        return [*rows, bar("cnn: K-FAC less the best rival", mine - max(rivals), "points", -2, False)]

    def _runs(self, script: Any, *words: object, first: int = 0) -> list[dict[str, Any]]:
        return [self._run(script, *words, "-seed", seed) for seed in range(first, self.seeds)]

    def _best(self, script: Any, name: str, rates: tuple[float, ...], *words: object) -> tuple[float | None, float]:
        """Steps and seconds of the best rate, means over seeds; None where none has reached the loss."""
        tried = {lr: self._run(script, *words, "-optimizer", name, "-lr", lr) for lr in rates}
        reached = {lr: run for lr, run in tried.items() if run["reached"]}
        if not reached:
            return None, float("nan")
        lr = min(reached, key=lambda rate: reached[rate]["steps"])
        found = [tried[lr], *self._runs(script, *words, "-optimizer", name, "-lr", lr, first=1)]
        print(f"  {name}: rate {lr} of {rates}, steps {[run['steps'] for run in found]}", flush=True)
        return _mean(found, "steps"), _mean(found, "cpu_seconds") or float("nan")

    def _run(self, script: Any, *words: object) -> dict[str, Any]:
        """The summary of a run."""
        more = ["-max_steps", 3] if self.quick else []
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            path = Path(folder) / "run.json"
            given = [*words, "-data_dir", self.data_dir, "-summary", path, *more]
            try:
                script.main([str(word) for word in given])
            except ArithmeticError:  # a rate that is too large
                return {"reached": False, "steps": 0, "test_accuracy": 0.0, "cpu_seconds": 0.0}
            return json.loads(path.read_text())  # type: ignore[no-any-return]


def _mean(runs: list[dict[str, Any]], name: str) -> float | None:
    """Over seeds; None where one has not reached the loss."""
    return statistics.mean(run[name] for run in runs) if all(run["reached"] for run in runs) else None


NAMES = ("mlp", "fashion", "autoencoder", "cnn")
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
