"""The published tables of layer-parallel training: what was published, what this code does, and why they differ.

    OMP_NUM_THREADS=1 python -m problems.benchmarks.layer_tables -json build/layer_tables.json -data_dir DATA

Speed-ups are of forward and gradient. On one to four ranks they are measured, with pipelines of 4 micro-batches a rank
(GPipe) beside them; beyond, calls and messages are counted and priced by `layer_model`. Nested iteration and Box are
the cases `nested` and `initialization` of `layer_parallel`.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import nn_adapters as nna
from pdeopt.steps.mgrit import MgritSettings
from problems.benchmarks.layer_model import LayerCosts, measure_costs, predict
from problems.benchmarks.layer_parallel import Benchmark, script
from problems.benchmarks.processes import Row, bar, measure, plain, run, show, table
from problems.har_gru import Classifier, SequenceSettings, standardized

WORK = "problems.benchmarks.layer_work"


@dataclass(frozen=True)
class Network:
    """A published network: width, samples of a batch, layers, those that are measured here, and what was said of it."""

    name: str
    width: int
    batch: int
    layers: int
    measured: int
    ranks: int
    published: float
    why: str


NETWORKS = (
    Network(
        "Peaks",
        8,
        500,
        1024,
        1024,
        256,
        6.0,
        "complete runs of C++ code, whose serial layers have no overhead of calls; a batched call gains on one rank",
    ),
    Network(
        "Indian Pines",
        220,
        100,
        512,
        128,
        128,
        4.4,
        "complete runs; a layer of 220 features is all arithmetic, so that only ranks gain",
    ),
)

#: Two cycles forward and two for the adjoint, which stay, also where they do not pay.
TWO_CYCLES = (
    "-bias_limit",
    0,
    "-layer_mgrit_serial",
    "never",
    "-layer_mgrit_cycles",
    2,
    "-layer_mgrit_adjoint_cycles",
    2,
)

#: Accuracy of HAR in percent (G. E. Moon, E. C. Cyr, ICLR 2022).
HAR_ACCURACY = 90.0


class Tables:
    """The tables; their sizes shrink with `-quick`. Nested iteration has two seeds where HAR has one."""

    def __init__(self, quick: bool = False, data_dir: str = "", seeds: int = 1) -> None:
        self.quick, self.data_dir, self.seeds = quick, data_dir, 1 if quick else seeds
        self.old = Benchmark(quick, data_dir=data_dir, seeds=2 * self.seeds)

    def har(self) -> list[Row]:
        """Accuracy of both units by the script's defaults, and of both by their cycles, also where these do not pay."""
        if not self.data_dir and not self.quick:
            return [show(Row("HAR: left out, no -data_dir", None, ""))]
        words = ["-epochs", 1, "-hidden", 16] if self.quick else ["-data_dir", self.data_dir]
        rows, lines = [], {}
        for kind in ("classic", "implicit"):
            serial, cycles = [], []
            for seed in range(self.seeds):
                own = [*words, "-kind", kind, "-seed", seed]
                found = script("har_gru", *own)
                how = f"in series, {found['serial']}" if found["serial"] else "by cycles"
                serial.append(100 * found["test_accuracy"])
                rows.append(plain(f"HAR, {kind}, seed {seed}, by default: {how}", serial[-1], "%"))
                found = script("har_gru", *own, *TWO_CYCLES)
                cycles.append(100 * found["test_accuracy"])
                rows.append(plain(f"HAR, {kind}, seed {seed}, cycles 2/2", cycles[-1], "%"))
            mean, parallel = sum(serial) / self.seeds, sum(cycles) / self.seeds
            lines[kind] = [mean, parallel]
            rows.append(
                bar(f"HAR, {kind}: by default - by cycles, mean of {self.seeds} seeds", mean - parallel, "points", 0.5)
            )
            rows.append(plain(f"HAR, {kind}: gradient error at the end", found["gradient_error"], "relative"))
        table(f"HAR, test accuracy in percent; published about {HAR_ACCURACY:g}", ["by default", "by cycles"], lines)
        return rows

    def units(self) -> list[Row]:
        """The error of dU by cycles, both units with PyTorch's first weights and with trained ones, 50 sequences."""
        name, batch, bars = "har" if self.data_dir else "synthetic_har", 50, {"implicit": 2e-2, "classic": 5e-2}
        data, rows = standardized(nna.load_dataset(name, self.data_dir)), []
        x, labels = data.x_train[:: len(data.x_train) // batch].double(), data.y_train[:: len(data.x_train) // batch]
        for kind, most in bars.items():
            for which, weights in (("first", {}), ("trained", self._trained(kind))):
                for cycles in (2, 16):
                    error = error_of_recurrent_weights(kind, cycles, x, labels, self._hidden(), weights)
                    case = f"{name}, {kind}, {which} weights, {cycles}/{cycles} cycles: error of dU"
                    rows.append(bar(case, error, "relative", most if cycles == 2 else 1e-10))
        return rows

    def _hidden(self) -> int:
        return 8 if self.quick else 48

    def _trained(self, kind: str) -> dict[str, Tensor]:
        """Weights after the script's epochs, one layer after the other; after one of generated signals with -quick."""
        words = ["-epochs", 1, "-samples", 300] if self.quick else []
        files = ["-data_dir", self.data_dir] if self.data_dir else []
        with tempfile.TemporaryDirectory() as folder:
            file = str(Path(folder) / "run.safetensors")
            script("har_gru", "-kind", kind, "-hidden", self._hidden(), *words, *files, "-checkpoint", file)
            stored = load_file(file)
        return {name.removeprefix("parameter."): v for name, v in stored.items() if name.startswith("parameter.")}

    def strong(self) -> list[Row]:
        """Speed-up over layers one after the other, measured on a few ranks and predicted beyond."""
        rows: list[Row] = []
        for network in NETWORKS:
            layers = 64 if self.quick else network.measured
            words = ("-layers", layers, "-width", network.width, "-batch", network.batch, "-repeat", 3)
            serial = run(WORK, "eager", *words)["seconds"]
            for ranks in (1, 2) if self.quick else (1, 2, 4):
                name = f"{network.name}, {layers} layers, {ranks} ranks"
                for task in ("default", "parallel"):
                    found = run(WORK, task, *words, ranks=ranks)
                    how = f"{'by default, ' * (task == 'default')}{found.get('setting', 'no setting')}"
                    rows.append(plain(f"{name}: {how}", serial / found["seconds"], "x PyTorch"))
                pipe = run(WORK, "pipeline", *words, ranks=ranks)["seconds"]
                rows.append(plain(f"{name}: GPipe, {4 * ranks} micro-batches", serial / pipe, "x PyTorch"))
            costs = measure_costs(network.width, network.batch, 20 if self.quick else 100)
            rows += self._predicted(network, layers if self.quick else network.layers, costs)
        return rows

    def _predicted(self, network: Network, layers: int, costs: LayerCosts) -> list[Row]:
        one, settings = predict(layers, 1, MgritSettings(1), costs), MgritSettings(3, "8", adjoint_cycles=1)
        most = layers // 64
        found = {ranks: one / predict(layers, ranks, settings, costs) for ranks in (1, 2, 4, 8, most) if ranks <= most}
        case = f"{network.name}, predicted for {most} ranks; published {network.published:g} on {network.ranks}"
        print(f"{network.name}: {network.why}")
        return [
            *(plain(f"{network.name}, predicted, {ranks} ranks", gain, "x serial") for ranks, gain in found.items()),
            plain(case, max(found.values()), "x serial"),
        ]

    def weak(self) -> list[Row]:
        """Seconds where layers grow with the ranks, predicted; 1 is perfect."""
        costs = measure_costs(8, 500, 20 if self.quick else 300)
        settings = MgritSettings(20, "16,4", adjoint_cycles=1)
        first, rows = predict(1024, 1, settings, costs), []
        for ranks in (1, 4, 16, 64, 256, 1024):
            share = predict(1024 * ranks, ranks, settings, costs) / first
            rows.append(plain(f"Peaks, 1024 layers a rank, {ranks} ranks", share, "x one rank"))
        return rows

    def nested(self) -> list[Row]:
        """Nested iteration."""
        return self.old.nested()

    def box(self) -> list[Row]:
        """Box initialization."""
        return self.old.initialization()


def error_of_recurrent_weights(
    kind: str, cycles: int, x: Tensor, labels: Tensor, hidden: int, weights: dict[str, Tensor]
) -> float:
    """Of the gradient by U of two stacked GRUs, relative to that of steps one after the other.

    Args:
        kind, hidden: of the units.
        cycles: forward, and as many for the adjoint.
        x, labels: sequences.
        weights: those of a `har_gru.Classifier` by name; none for PyTorch's first ones.
    """
    torch.manual_seed(0)
    words = {"cycles": cycles, "adjoint_cycles": cycles, "serial": "never"}
    settings = nna.MgritSettings(**{**nna.layers.SEQUENCES, **words})
    data = nna.Dataset("", x, labels, x, labels, 6)
    network = Classifier(SequenceSettings(hidden=hidden, kind=kind), None, settings, data)
    if weights:
        network.load_state_dict(weights)
    gru, head = network.double().gru, network.closing
    matrices = [gru.weight_hh_l0, gru.weight_hh_l1]
    found, exact = (
        torch.cat([g.flatten() for g in torch.autograd.grad(nn.functional.cross_entropy(head(out), labels), matrices)])
        for out in (gru(x), gru.forward_in_series(x))
    )
    return float((found - exact).norm() / exact.norm())


CASES: dict[str, Callable[[Tables], list[Row]]] = {
    name: getattr(Tables, name) for name in ("har", "units", "strong", "weak", "nested", "box")
}


def main(argv: list[str] | None = None) -> list[Row]:
    """Measure, print the tables, write them as JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-json", default="", help="write the rows to this file")
    parser.add_argument("-only", nargs="+", choices=CASES, default=list(CASES), help="these tables alone")
    parser.add_argument("-data_dir", default="", help="folder of the data sets")
    parser.add_argument("-seeds", type=int, default=1, help="of training runs; 3 for what was published")
    parser.add_argument("-quick", action="store_true", help="small sizes: does it run?")
    options: Any = parser.parse_args(argv)
    return measure(CASES, options.only, Tables(options.quick, options.data_dir, options.seeds), options.json)


if __name__ == "__main__":
    main()
