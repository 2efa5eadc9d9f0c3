"""What it costs in accuracy that workers do not wait for each other: MNIST after equal epochs, and how late steps are.

    OMP_NUM_THREADS=1 python -m problems.benchmarks.asynchronous -data_dir DATA -json build/asynchronous.json

784-100-10, SGD of one rate and batch everywhere but in "large batch", where both are times the workers. Each way has
taken every sample as often when it is tested; accuracies are means over the seeds. Synchronous workers share a batch;
asynchronous ones have batches of their own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
from mpi4py import MPI
from petsc4py import PETSc
from torch import Tensor, nn

import nn_adapters as nna
from problems.benchmarks.processes import Row, bar, plain, run, table, write

RATE, BATCH = 0.1, 64
WORKERS = 1, 2, 4

#: Most that an asynchronous way may lose against the synchronous one, in points of accuracy.
LOST = 0.5


class Task:
    """The data, a network, and batches of an epoch in an order of the seed.

    Args:
        data: of images.
        epochs, seed: of a run.
        samples: for training; 0 for all.
    """

    def __init__(self, data: nna.Dataset, epochs: int, seed: int, samples: int) -> None:
        self.data, self.epochs, self.seed = data, epochs, seed
        self.count = samples or len(data.x_train)
        torch.manual_seed(seed)
        inputs = data.x_train[0].numel()
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(inputs, 100), nn.ReLU(), nn.Linear(100, data.classes))

    def rows(self, batch: int) -> Iterator[Tensor]:
        """The samples of each batch of all epochs."""
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.epochs):
            yield from torch.randperm(self.count, generator=generator).split(batch)

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Samples and labels."""
        return self.data.x_train[rows], self.data.y_train[rows]

    @torch.no_grad()
    def accuracy(self) -> float:
        """On the test samples, in percent."""
        return 100.0 * float((self.network(self.data.x_test).argmax(1) == self.data.y_test).double().mean())


def synchronous(task: Task, comm: Any, workers: int = 1, **words: Any) -> dict[str, float]:
    """Workers share batches of `workers` times the size."""
    sums = nna.GradientSums(task.network, comm, **words)
    optimizer = torch.optim.SGD(task.network.parameters(), RATE * workers)
    for rows in task.rows(BATCH * workers):
        x, y = task.batch(rows[comm.rank :: comm.size])
        optimizer.zero_grad()
        sums.samples = len(x)
        if len(x):
            nn.functional.cross_entropy(task.network(x), y).backward()
        sums.finish()
        optimizer.step()
    found = {"mean": sums.delay, "most": sums.delay, "megabytes": sums.sent / 1e6}
    sums.close()
    return found


def windows(task: Task, comm: Any) -> dict[str, float]:
    """Each rank takes every N-th batch, on weights in windows of MPI."""
    server = nna.WeightServer(task.network, comm)
    optimizer = torch.optim.SGD(task.network.parameters(), RATE)
    for number, rows in enumerate(task.rows(BATCH)):
        if number % comm.size == comm.rank:
            x, y = task.batch(rows)
            server.pull()
            optimizer.zero_grad()
            nn.functional.cross_entropy(task.network(x), y).backward()
            optimizer.step()
            server.push()
    server.finish()
    late = [each for own in comm.allgather(server.staleness) for each in own]
    found = {"mean": sum(late) / len(late), "most": max(late), "megabytes": server.sent / 1e6}
    server.close()
    return found


def threads(task: Task, workers: int) -> dict[str, float]:
    """Threads of one process take the batches."""
    training = nna.Hogwild(task.network, nn.functional.cross_entropy, RATE, workers)
    training.run(task.batch(rows) for rows in task.rows(BATCH))
    late = training.staleness
    return {"mean": sum(late) / len(late), "most": max(late), "megabytes": 0.0}


#: What a launch of several ranks runs.
WAYS: dict[str, Callable[[Task, Any], dict[str, float]]] = {
    "synchronous": synchronous,
    "synchronous, bfloat16 messages": lambda task, comm: synchronous(task, comm, precision="bfloat16"),
    "synchronous, large batch": lambda task, comm: synchronous(task, comm, comm.size),
    "gradients 1 step late": lambda task, comm: synchronous(task, comm, delay=1),
    "gradients 4 steps late": lambda task, comm: synchronous(task, comm, delay=4),
    "windows of MPI": windows,
}
THREADS = "threads"

#: Ways that for one worker are the synchronous one.
ALONE = "synchronous, bfloat16 messages", "synchronous, large batch", "windows of MPI"


def work(options: Any) -> dict[str, dict[str, float]]:
    """All ways, on the ranks of this launch; threads on one rank, of any number."""
    comm = MPI.COMM_WORLD
    data = nna.load_dataset(options.data, options.data_dir)
    ways = dict(WAYS)
    if comm.size == 1:
        ways = {name: way for name, way in WAYS.items() if name not in ALONE}
        ways |= {f"{THREADS} {n}": lambda task, _, n=n: threads(task, n) for n in WORKERS}  # type: ignore[misc]
    found: dict[str, dict[str, float]] = {}
    for name, way in ways.items():
        runs = []
        for seed in range(options.seeds):
            task = Task(data, options.epochs, seed, options.samples)
            runs.append(way(task, comm) | {"accuracy": task.accuracy()})
        found[name] = {key: sum(each[key] for each in runs) / len(runs) for key in runs[0]}
        found[name]["most"] = max(each["most"] for each in runs)
    return found


def report(found: dict[int, dict[str, dict[str, float]]], epochs: int) -> list[Row]:
    """Tables, and what asynchronous workers lose."""
    found[1] |= dict.fromkeys(ALONE, found[1]["synchronous"])
    for n in WORKERS:
        found[n][THREADS] = found[1][f"{THREADS} {n}"]
    columns = [f"{n} worker{'s' * (n > 1)}" for n in WORKERS]
    for title, key in (
        (f"test accuracy after {epochs} epochs, %", "accuracy"),
        ("steps of others between reading and writing, mean", "mean"),
        ("the same, most", "most"),
        ("megabytes that a rank sends in an epoch", "megabytes"),
    ):
        scale = epochs if key == "megabytes" else 1
        table(title, columns, {way: [found[n][way][key] / scale for n in WORKERS] for way in (*WAYS, THREADS)})
    rows = [plain("test accuracy of one synchronous worker", found[1]["synchronous"]["accuracy"], "%")]
    for way in ("windows of MPI", THREADS):
        for n in WORKERS[1:]:
            lost = found[n]["synchronous"]["accuracy"] - found[n][way]["accuracy"]
            rows.append(bar(f"points of accuracy that {way} lose, {n} workers", lost, "points", LOST))
    return rows


def main(argv: list[str] | None = None) -> list[Row]:
    """Run it; the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-json", default="", help="write the rows to this file")
    parser.add_argument("-data_dir", default="", help="folder of the data sets")
    parser.add_argument("-data", default="mnist", help="data set of images; digits needs no folder")
    parser.add_argument("-samples", type=int, default=0, help="training samples; 0 for all")
    parser.add_argument("-epochs", type=int, default=3, help="passes through the samples")
    parser.add_argument("-seeds", type=int, default=3, help="runs of each way")
    parser.add_argument("-work", action="store_true", help="run the ways on the ranks of this launch, and print them")
    options: Any = parser.parse_args(argv)
    torch.set_num_threads(1)
    for name in vars(options):
        PETSc.Options().delValue(name)  # those of this program are not the scripts'
    if options.work:
        found = work(options)
        if MPI.COMM_WORLD.rank == 0:
            print(json.dumps(found))
        return []
    words = [f"-{name}" for name in ("data_dir", "data", "samples", "epochs", "seeds")]
    values = [getattr(options, word[1:]) for word in words]
    pairs = [each for pair in zip(words, values) for each in pair if pair[1] != ""]
    ways = {n: run("problems.benchmarks.asynchronous", "-work", *pairs, ranks=n) for n in WORKERS}
    rows = report(ways, options.epochs)
    write(options.json, rows)
    return rows


if __name__ == "__main__":
    main()
