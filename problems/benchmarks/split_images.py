"""Training by splitting on a network of convolutions, against Adam: accuracy against epochs and seconds.

    OMP_NUM_THREADS=1 python -m problems.benchmarks.split_images -data_dir DATA -json build/split_images.json

MNIST; two convolutions of 5 x 5 with stride 2, of 8 and 16 channels, and a dense layer. Adam's step falls linearly to
zero, as that of the increments does; its first one is the best of a grid in test accuracy on seed 0, which favors it.
Seconds are those of the processor on one thread, without evaluations.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

import nn_adapters as nna
from nn_adapters.splitting import SplitTrainingSettings, StreamedLayers
from pdeopt.core.monitor import History
from pdeopt.optimize.splitting import ADMM
from problems.benchmarks.processes import Row, measure, plain, table

#: First steps of Adam, with batches of 100.
STEPS = (1e-3, 3e-3, 1e-2)

#: Samples of a batch of the split network.
BATCHES = (250,)

#: Epochs done, and seconds and test accuracy after them.
Mark = tuple[float, float, float]


class Benchmark:
    """The case; `-quick` takes a twentieth of the samples."""

    def __init__(self, data_dir: str, epochs: int = 2, quick: bool = False) -> None:
        self.data, self.epochs = nna.load_dataset("mnist", data_dir), epochs
        self.samples = len(self.data.x_train) // (20 if quick else 1)

    def mnist(self) -> list[Row]:
        """Test accuracies after each epoch."""
        lines: dict[str, list[Mark]] = {}
        tried = {lr: self._marks(partial(self._adam, lr)) for lr in STEPS}
        best = max(tried, key=lambda lr: tried[lr][-1][-1])
        lines[f"Adam, lr {best:g}"] = tried[best]
        for batch in BATCHES:
            lines[f"split, batches of {batch}"] = self._marks(partial(self._split, batch))
        columns = [f"epoch {k + 1}: {what}" for k in range(self.epochs) for what in ("s", "%")]
        table("MNIST", columns, {name: [x for mark in marks for x in mark[1:]] for name, marks in lines.items()})
        return [
            plain(f"mnist: {name}, after epoch {epoch:.0f}: {what}", value, unit)
            for name, marks in lines.items()
            for epoch, seconds, accuracy in marks
            for what, value, unit in (("seconds", seconds, "s"), ("test accuracy", accuracy, "%"))
        ]

    def _marks(self, run: Callable[[Callable[[float, nn.Module], None]], None]) -> list[Mark]:
        """The marks of a run, which calls `mark` after each epoch."""
        marks: list[Mark] = []
        begin = time.process_time()

        def mark(epoch: float, network: nn.Module) -> None:
            nonlocal begin
            now = time.process_time()
            marks.append((epoch, now - begin, self._accuracy(network)))
            begin += time.process_time() - now

        run(mark)
        return marks

    def _network(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 8, 5, 2, 2), nn.ReLU(), nn.Conv2d(8, 16, 5, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(784, 10)
        )

    def _adam(self, lr: float, mark: Callable[[float, nn.Module], None]) -> None:
        network, n = self._network(), self.samples
        optimizer = torch.optim.Adam(network.parameters(), lr)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, self.epochs * -(-n // 100))
        for epoch in range(1, self.epochs + 1):
            for rows in torch.randperm(n).split(100):
                optimizer.zero_grad()
                outputs = network(self.data.x_train[rows])
                nn.functional.cross_entropy(outputs, self.data.y_train[rows]).backward()
                optimizer.step()
                schedule.step()
            mark(epoch, network)

    def _split(self, batch: int, mark: Callable[[float, nn.Module], None]) -> None:
        network, each = self._network(), self.samples // batch
        x, y = self.data.x_train[: self.samples], self.data.y_train[: self.samples]
        splitting = StreamedLayers(self.epochs * each, network, x, y, SplitTrainingSettings(batch=batch))

        def watch(method: ADMM, history: History) -> None:
            iteration = history[-1].iteration
            if iteration and iteration % each == 0:
                splitting.design()
                mark(iteration / each, network)

        ADMM(splitting, max_it=self.epochs * each, multipliers=False, rtol=0.0).solve(observers=[watch])

    def _accuracy(self, network: nn.Module) -> float:
        data = self.data
        with torch.no_grad():
            found = torch.cat([network(x).argmax(1) for x in data.x_test.split(1000)])
        return 100.0 * float((found == data.y_test).double().mean())


CASES: dict[str, Callable[[Benchmark], list[Row]]] = {"mnist": Benchmark.mnist}


def main(argv: list[str] | None = None) -> list[Row]:
    """Measure, print the table, write it as JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-json", default="", help="write the rows to this file")
    parser.add_argument("-data_dir", required=True, help="folder of the data sets")
    parser.add_argument("-epochs", type=int, default=2, help="passes through the samples")
    parser.add_argument("-quick", action="store_true", help="a twentieth of the samples: does it run?")
    options: Any = parser.parse_args(argv)
    benchmark = Benchmark(options.data_dir, options.epochs, options.quick)
    return measure(CASES, list(CASES), benchmark, options.json)


if __name__ == "__main__":
    main()
