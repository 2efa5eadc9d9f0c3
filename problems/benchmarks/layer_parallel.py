"""Layer-parallel networks: time, gradient errors and memory against PyTorch, training, initialization.

    OMP_NUM_THREADS=1 python -m problems.benchmarks.layer_parallel -json build/layer_parallel.json -data_dir DATA

Every measurement runs in a process of its own; ratios are of one process, or of processes one after the other.
Weights are smooth from layer to layer with a tenth of noise, as those of trained networks are.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from problems.benchmarks.processes import ENVIRONMENT, Row, bar, measure, plain, run, show, table

WORK = "problems.benchmarks.layer_work"


class Benchmark:
    """The cases; their sizes shrink with `-quick`. There are four runs of nested iteration for each of its seeds."""

    def __init__(self, quick: bool = False, repeat: int = 7, data_dir: str = "", seeds: int = 12) -> None:
        self.quick, self.repeat, self.data_dir, self.seeds = quick, repeat, data_dir, 1 if quick else seeds

    def converged(self) -> list[Row]:
        """MGRIT to convergence against autograd, layer after layer."""
        rows = []
        for ranks in (1, 2, 4):
            found = run(WORK, "converged", "-layers", 256, ranks=ranks)
            rows.append(bar(f"256 layers, {ranks} ranks, states", found["state"], "relative error", 1e-12))
            rows.append(bar(f"256 layers, {ranks} ranks, gradient", found["gradient"], "relative error", 1e-10))
        return rows

    def speed(self) -> list[Row]:
        """Forward and gradient of the Peaks network on one core."""
        rows = []
        for layers, limit in ((256, 1.0),) if self.quick else ((1024, 3.0), (4096, 5.0)):
            for act in ("relu", "tanh"):
                found = run(WORK, "speed", "-layers", layers, "-activation", act, "-repeat", self.repeat)
                case = f"{layers} layers, {act}"
                for name, seconds in found["seconds"].items():
                    rows.append(plain(f"{case}: {name}", 1e3 * seconds, "ms"))
                rows.append(bar(f"{case}, {found['best']}: gradient error", found["error"], "relative", 1e-2))
                ratio = found["seconds"]["eager PyTorch"] / found["seconds"][found["best"]]
                rows.append(bar(f"{case}: eager PyTorch / pdeopt", ratio, "x", limit if act == "relu" else None, False))
                by_hand = found["seconds"]["serial adjoint by hand"] / found["seconds"][found["best"]]
                rows.append(plain(f"{case}: serial adjoint by hand / pdeopt", by_hand, "x"))
        found = run(WORK, "speed", "-layers", 64, "-compile", 1)["seconds"]  # a thousand layers do not compile
        rows += [plain(f"64 layers, relu: {name}", 1e3 * seconds, "ms") for name, seconds in found.items()]
        return rows

    def wide(self) -> list[Row]:
        """Two ranks of one thread against PyTorch with two threads."""
        rows = []
        for width in (64,) if self.quick else (64, 256):
            words = ("-layers", 64 if self.quick else 1024, "-width", width, "-repeat", 3)
            serial = run(WORK, "eager", *words, "-threads", 2)["seconds"]
            parallel = run(WORK, "parallel", *words, ranks=2)
            rows.append(plain(f"width {width}: PyTorch, two threads", serial, "s"))
            rows.append(plain(f"width {width}: two ranks, {parallel['setting']}", parallel["seconds"], "s"))
            rows.append(bar(f"width {width}: gradient error", parallel["error"], "relative", 1e-2))
            rows.append(bar(f"width {width}: PyTorch / two ranks", serial / parallel["seconds"], "x", 1.2, False))
        return rows

    def cycles(self) -> list[Row]:
        """Cycles to a gradient error of 1e-2 over the number of layers."""
        rows, counts = [], []
        for layers in (64, 256) if self.quick else (64, 256, 1024, 4096, 16384):
            found = run(WORK, "cycles", "-layers", layers)
            counts.append(found["cycles"])
            rows.append(plain(f"{layers} layers, cycles to 1e-2 ({found['errors']})", counts[-1], "cycles"))
        return [*rows, bar("cycles to 1e-2, largest less smallest", max(counts) - min(counts), "cycles", 1)]

    def memory(self) -> list[Row]:
        """Memory of forward and gradient above what the network needs."""
        words = ("-layers", 512 if self.quick else 4096)
        found = {
            kind: run(WORK, "memory", *words, "-kind", kind)["mb"] for kind in ("eager", "parallel", "checkpointed")
        }
        rows = [plain(f"memory, {words[1]} layers, {kind}", mb, "MB") for kind, mb in found.items()]
        return [*rows, bar("memory, pdeopt / autograd", found["parallel"] / found["eager"], "x", 1.1)]

    def training(self) -> list[Row]:
        """The same run, layer-parallel and serial: accuracies of the weights, run serially."""
        runs: dict[str, tuple[list[object], float]] = {
            "peaks": (["-epochs", 200, "-batch", 500, "-lr", 1e-2], 0.97),
            "mnist": (["-data", "mnist", "-layers", 16, "-epochs", 5, "-lr", 4e-3], 0.98),
            "fashion_mnist": (["-layers", 16, "-epochs", 6, "-lr", 4e-3], 0.88),
            "har_gru": (["-data", "har", "-epochs", 3], 0.90),
        }
        rows = []
        for name, (words, limit) in runs.items():
            own = [*words, "-data_dir", self.data_dir]
            if self.quick or (name != "peaks" and not self.data_dir):
                rows.append(show(Row(f"{name}: left out, no -data_dir", None, "")))
                continue
            accuracy = {}
            ways: dict[str, list[object]] = {"parallel": [], "serial": ["-layer_mgrit_levels", 1]}
            for way, more in ways.items():
                found = script(name, *own, *more)
                accuracy[way] = found["test_accuracy"]
                rows.append(plain(f"{name}, {way} ({found['seconds']:.0f} s)", found["test_accuracy"], "accuracy"))
            rows.append(bar(f"{name}, parallel", accuracy["parallel"], "accuracy", limit, False))
            rows.append(
                bar(f"{name}, serial - parallel", accuracy["serial"] - accuracy["parallel"], "points / 100", 5e-3)
            )
            if name == "har_gru":
                classic = script(name, *own, "-kind", "classic", "-layer_mgrit_levels", 1)
                gap = classic["test_accuracy"] - accuracy["parallel"]
                rows.append(bar("har_gru, classic serial - implicit parallel", gap, "points / 100", 1e-2))
        return rows

    def nested(self) -> list[Row]:
        """Nested iteration against training at full depth, at equal work: Peaks validation accuracy of many runs."""
        rows, lines = [], {}
        columns = ["mean", "median", "max", "min", "std"]
        for channels in (5,) if self.quick else (5, 8):
            found = run(WORK, "nested", "-channels", channels, "-seeds", self.seeds)
            for kind in ("nested", "not nested"):
                lines[f"{channels} channels, {kind}"] = [found[kind][column] for column in columns]
                rows += [Row(f"{channels} channels, {kind}, {c}", found[kind][c], "%") for c in columns]
            better = found["nested"]["mean"] - found["not nested"]["mean"]
            narrower = found["not nested"]["std"] - found["nested"]["std"]
            published = {5: (86.7, 7.7), 8: (92.3, 5.2)}[channels]
            rows.append(bar(f"{channels} channels, nested - not nested, mean", better, "%", 0.0, False))
            rows.append(bar(f"{channels} channels, not nested - nested, std", narrower, "%", 0.0, False))
            rows.append(bar(f"{channels} channels, nested, mean", found["nested"]["mean"], "%", published[0], False))
            rows.append(bar(f"{channels} channels, nested, std", found["nested"]["std"], "%", published[1]))
        table("Peaks validation accuracy, %", columns, lines)
        return rows

    def initialization(self) -> list[Row]:
        """Box, and LSGD after it."""
        box = script("box_init")["box"]
        rows = [
            bar("Box, 128 layers, largest entry, median of 20 seeds", box["largest"], "", 2.0),
            bar("the same, aspect ratio of the image", box["aspect_ratio"], "", 0.5, False),
        ]
        for depth in (1, 4, 16, 64):
            found = script("function_regression", "-depth", depth, "-init", "box", "-method", "lsgd")["rms_error"]
            rows.append(bar(f"sin 2 pi x, depth {depth}, Box and LSGD", found, "RMS", 1e-2 if depth == 1 else 3e-3))
        return rows


def script(name: str, *words: object) -> Any:
    """The summary of a problem script, run in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "summary.json"
        command = [sys.executable, "-m", f"problems.{name}", *map(str, words), "-summary", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | ENVIRONMENT, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed with {done.returncode}:\n{done.stderr[-2000:]}")
        return json.loads(file.read_text())


CASES: dict[str, Callable[[Benchmark], list[Row]]] = {
    name: getattr(Benchmark, name)
    for name in ("converged", "speed", "wide", "cycles", "memory", "initialization", "nested", "training")
}


def main(argv: list[str] | None = None) -> list[Row]:
    """Measure, print the table, write it as JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-json", default="", help="write the rows to this file")
    parser.add_argument("-only", nargs="+", choices=CASES, default=list(CASES), help="these cases alone")
    parser.add_argument("-repeat", type=int, default=7, help="repetitions of timings, of which the median counts")
    parser.add_argument("-data_dir", default="", help="folder of the data sets, for the training runs")
    parser.add_argument("-quick", action="store_true", help="small sizes: does it run?")
    options: Any = parser.parse_args(argv)
    return measure(CASES, options.only, Benchmark(options.quick, options.repeat, options.data_dir), options.json)


if __name__ == "__main__":
    main()
