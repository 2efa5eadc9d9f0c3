"""One run of training by splitting on this many ranks, measured: memory, seconds by kinds, counted work.

    mpiexec -n 2 python -m problems.benchmarks.admm_work -form seed -samples 60000 -iterations 2

prints JSON: what each rank found. Seconds in calls of MPI, in which ranks also wait, are told apart from the others.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor, nn

import nn_adapters as nna
from nn_adapters.splitting import LayerSplitting, SplitTrainingSettings, StreamedLayers, WholeLayers
from pdeopt.core.memory import forget_peak, used_memory
from pdeopt.core.messages import even_parts

#: Widths of the published network.
WIDTHS = (784, 500, 500, 10)


class TimedTeam:
    """A communicator whose calls are timed: processor seconds, those of waiting among them."""

    def __init__(self, comm: Any) -> None:
        self.comm, self.rank, self.size, self.seconds = comm, comm.rank, comm.size, 0.0

    def timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call, timed."""

        def wrapped(*words: Any) -> Any:
            begin = time.process_time()
            found = call(*words)
            self.seconds += time.process_time() - begin
            return found

        return wrapped

    def __getattr__(self, name: str) -> Any:
        return self.timed(getattr(self.comm, name))

    def Ialltoallv(self, sent: Any, received: Any) -> Any:
        """The same, its request, too."""
        return TimedRequest(self, self.timed(self.comm.Ialltoallv)(sent, received))


class TimedRequest:
    """A request whose calls are timed."""

    def __init__(self, team: TimedTeam, request: Any) -> None:
        self.Test, self.Wait = team.timed(request.Test), team.timed(request.Wait)


def published_network(widths: tuple[int, ...] = WIDTHS, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Dense layers with hard sigmoids, the same on all ranks."""
    torch.manual_seed(0)
    parts: list[nn.Module] = [nn.Flatten()]
    for one, other in pairwise(widths):
        parts += [nn.Linear(one, other), nn.Hardtanh(0.0, 1.0)]
    return nn.Sequential(*parts[:-1]).to(dtype)


def share_of(samples: int, comm: Any, dtype: torch.dtype, data_dir: str = "") -> tuple[Tensor, Tensor]:
    """This rank's samples of MNIST, or of numbers of its size."""
    parts = even_parts(samples, comm.size)
    begin, count = sum(parts[: comm.rank]), parts[comm.rank]
    if data_dir:
        data = nna.load_dataset("mnist", data_dir)
        own = slice(begin, begin + count)
        return data.x_train[own].flatten(1).to(dtype), data.y_train[own].clone()
    generator = torch.Generator().manual_seed(comm.rank)
    x = torch.empty(count, WIDTHS[0], dtype=dtype)
    for rows in x.split(500):
        rows.uniform_(generator=generator)
    return x, torch.randint(0, WIDTHS[-1], (count,), generator=generator)


def run(form: str, samples: int, batch: int, iterations: int, precision: str, data_dir: str = "") -> dict[str, Any]:
    """What one rank finds. Collective."""
    comm = MPI.COMM_WORLD
    dtype = torch.float32 if form == "streaming" else torch.float64
    x, y = share_of(samples, comm, dtype, data_dir)
    forget_peak()
    imports = used_memory()[0] - x.nbytes - y.nbytes  # with what reading has left behind
    team, network = TimedTeam(comm), published_network(dtype=dtype)
    settings = SplitTrainingSettings(form=form, batch=batch, precision=precision)
    words = (network, x, y, settings, None if comm.size == 1 else team)
    splitting: LayerSplitting = StreamedLayers(iterations, *words) if form == "streaming" else WholeLayers(*words)
    rounds = []
    for iteration in range(1, iterations + 1):
        before = _numbers(splitting, team)
        for block in splitting.sweep(iteration):
            splitting.update(block)
        splitting.ascend()
        rounds.append([now - then for now, then in zip(_numbers(splitting, team), before)])
    return {
        "imports": imports,
        "observed": used_memory()[1],
        "predicted": splitting.predicted_memory(),
        "rounds": [dict(zip(NUMBERS, one)) for one in rounds],
    }


#: What an iteration is measured by.
NUMBERS = ("cpu", "wall", "mpi", "products", "solves", "bytes")


def _numbers(splitting: LayerSplitting, team: TimedTeam) -> list[float]:
    work = splitting.work
    return [time.process_time(), time.perf_counter(), team.seconds, work.products, work.solves, work.bytes]


def main(argv: list[str] | None = None) -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-form", choices=("seed", "streaming"), default="seed")
    parser.add_argument("-samples", type=int, default=60_000, help="those of all ranks")
    parser.add_argument("-batch", type=int, default=8000, help="samples of a batch, those of all ranks (streaming)")
    parser.add_argument("-iterations", type=int, default=2)
    parser.add_argument("-precision", default="float64", help="of messages")
    parser.add_argument("-data_dir", default="", help="folder with MNIST; else numbers of its size")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = MPI.COMM_WORLD.gather(run(**vars(options)))
    if found is not None:
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
