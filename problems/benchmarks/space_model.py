"""Strong scaling in space x time, predicted: measured costs, counted iterations and messages, the clocks of the ranks.

    OMP_NUM_THREADS=1 python -m problems.benchmarks.space_model -json build/space_model.json -plot build/space_model.png

KKT systems of the cube of `problems.heat3d` by `wathen`, MGRIT over time, conjugate gradients with multigrid (hypre)
inside a step. What the parts cost is timed on one rank for cubes of several sizes; what a step solve sends is counted
by Open MPI on 2, 4 and 8 ranks; `clocks` runs the algorithm over time with it. A rank waits for its messages one after
the other, which is pessimistic. Not in the model: setting up, and that a multigrid of more ranks coarsens otherwise.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import matplotlib
import numpy as np
import torch
from mpi4py import MPI

from pdeopt.precond.schur import LOOSE_STEPS
from problems.benchmarks.clocks import Costs, Inner, Layout, sequential_solves, solve
from problems.benchmarks.processes import Row, bar, counted, plain, run, write
from problems.benchmarks.scaling_model import Network

matplotlib.use("agg")
from matplotlib import pyplot as plt

MODULE = "problems.benchmarks.space_model"

#: Options of all runs.
SOLVER = ("-step_pc_type", "hypre", "-alpha", 1e-3)

#: Nodes along an edge of the cubes whose parts are timed, and of those whose messages are counted.
TIMED, COUNTED = (4, 8, 16), (8, 24)

#: Splits of the ranks, time x space, on which iterations are counted.
SPLITS = ((1, 1), (2, 1), (1, 2), (4, 1), (2, 2), (1, 4), (8, 1), (4, 2), (2, 4), (1, 8))

#: Neighbors of a box, corners included: the coarse grids of multigrid see them.
MOST_NEIGHBORS = 26


def boxes(n: int, ranks: int) -> tuple[int, int, int]:
    """A power of two of ranks along the three edges of a cube, in boxes as cubic as can be, see `po.grid_layout`."""
    parts = [1, 1, 1]
    for _ in range(int(np.log2(ranks))):
        parts[int(np.argmin(parts))] *= 2
    return parts[0], parts[1], parts[2]


@dataclass(frozen=True)
class Exchange:
    """Where the ranks of a step meet, on so many of them.

    Attributes:
        unknowns: of a rank.
        neighbors: of the rank that has most, corners included.
        faces: of them, those across a face.
        ghosts: nodes across the faces.
    """

    unknowns: int
    neighbors: int
    faces: int
    ghosts: int

    @classmethod
    def of(cls, n: int, ranks: int) -> Exchange:
        parts = boxes(n, ranks)
        sides = [-(-n // part) for part in parts]
        reach = [min(part - 1, 2) for part in parts]  # neighbors along an edge
        unknowns = int(np.prod(sides))
        faces, ghosts = sum(reach), sum(count * unknowns // side for count, side in zip(reach, sides))
        return cls(unknowns, int(np.prod([1 + count for count in reach])) - 1, faces, ghosts)


@dataclass(frozen=True)
class StepSolve:
    """What an iteration of a step solve sends, counted.

    Attributes:
        alone, iterations: of a solve, on one rank and on several, whose multigrid is a little weaker.
        messages: to a neighbor, by the nodes along an edge of the cube: its multigrid has more levels.
        sums: over the ranks of a step.
    """

    alone: float
    iterations: float
    messages: Mapping[int, float]
    sums: float

    def to_a_neighbor(self, n: int) -> float:
        """Messages, which grow with the number of levels."""
        sizes = sorted(self.messages)
        slope = (self.messages[sizes[-1]] - self.messages[sizes[0]]) / np.log2(sizes[-1] / sizes[0])
        return float(self.messages[sizes[-1]] + slope * np.log2(n / sizes[-1]))

    def seconds(self, n: int, ranks: int, network: Network) -> float:
        """Of the messages and sums of a solve."""
        if ranks == 1:
            return 0.0
        here = Exchange.of(n, ranks)
        messages = self.to_a_neighbor(n) * here.neighbors * network.latency
        volume = 8 * self.to_a_neighbor(n) * here.ghosts / network.bandwidth  # each level has less: a bound
        return self.iterations * (messages + volume + self.sums * np.log2(ranks) * network.latency)


class Prediction:
    """Seconds of a KKT solve on every split of the ranks.

    Args:
        n, steps: nodes along an edge of the cube, and N; powers of two.
        parts: what `costs` found for cubes of several sizes, by nodes along an edge.
        step: what a step solve sends.
        krylov: iterations, `inner` steps in each, and `exchanges` of ghosts in each.
        network: what messages cost.
        window: steps of a window of MGRIT.
    """

    def __init__(
        self,
        n: int,
        steps: int,
        parts: Mapping[int, Mapping[str, Sequence[float]]],
        step: StepSolve,
        krylov: Mapping[str, Any],
        network: Network,
        window: int = 16,
    ) -> None:
        self.n, self.parts, self.step, self.network = n, parts, step, network
        self.iterations, self.inner, self.exchanges = (
            krylov["iterations"],
            Inner(**krylov["inner"]),
            krylov["exchanges"],
        )
        self.layout = Layout(steps, 1, window)

    def costs(self, space: int) -> Costs:
        """Of the parts on so many ranks a step, interpolated between cubes of measured sizes."""
        here, found = Exchange.of(self.n, space), {}
        sizes = sorted(self.parts)
        for part in self.parts[sizes[0]]:
            calls, rows = np.array([self.parts[size][part] for size in sizes]).T
            found[part] = float(np.median(calls)), _interpolated(here.unknowns, [s**3 for s in sizes], rows)
        exchange = here.faces * self.network.latency
        a, b = found["sweep"]
        more = self.step.iterations / self.step.alone if space > 1 else 1.0
        found["sweep"] = a, more * b + self.step.seconds(self.n, space, self.network)
        a, b = found["operator"]  # here are the exchanges of all parts but step solves, of all steps in one
        volume = 8 * here.ghosts / self.network.bandwidth
        found["operator"] = a + self.exchanges * exchange, b + self.exchanges * volume
        message = self.network.latency + 8 * here.unknowns / self.network.bandwidth
        return Costs(found, message, self.network.latency)

    def seconds(self, time: int, space: int) -> float:
        """On time x space ranks; substitution on one rank in time."""
        layout = self.layout.serial if time == 1 else replace(self.layout, ranks=time)
        clocks = solve(layout, self.costs(space), self.iterations, self.inner)
        return float(clocks.time.max() + clocks.reductions * np.log2(space) * self.network.latency)

    def splits(self, ranks: int) -> dict[tuple[int, int], float]:
        """Seconds by time x space, for so many ranks."""
        most = self.n**3 // 64  # boxes of 4^3 nodes
        pairs = [(ranks // space, space) for space in 2 ** np.arange(int(np.log2(ranks)) + 1) if space <= most]
        return {(time, int(space)): self.seconds(time, space) for time, space in pairs if time <= self.layout.steps}

    @cached_property
    def table(self) -> dict[int, dict[tuple[int, int], float]]:
        """The splits by ranks, up to 65,536 or as many as there are boxes of all steps."""
        counts = 2 ** np.arange(17)
        return {int(ranks): found for ranks in counts if (found := self.splits(int(ranks)))}

    def rows(self) -> list[Row]:
        """The best split of so many ranks, beside those along one direction alone."""
        name, serial, rows = f"heat3d {self.n}^3, {self.layout.steps} steps", self.table[1][1, 1], []
        for ranks, found in self.table.items():
            time, space = min(found, key=lambda split: found[split])
            alone = [f"{found[split]:.3g}" if split in found else "-" for split in ((ranks, 1), (1, ranks))]
            in_a_row = sequential_solves(replace(self.layout, ranks=time) if time > 1 else self.layout.serial)
            note = f"best {time}x{space}; time alone {alone[0]} s, space alone {alone[1]} s; {in_a_row} solves in a row"
            rows.append(plain(f"{name}, {ranks} ranks ({note})", found[time, space], "s"))
        best = min(min(found.values()) for found in self.table.values())
        return [*rows, plain(f"{name}: best speed-up", serial / best, "x one rank")]

    def plot(self, file: str) -> None:
        """Best split, time alone and space alone against ranks."""
        figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
        lines = {
            "best split": lambda ranks, found: min(found.values()),
            "ranks in time alone": lambda ranks, found: found.get((ranks, 1)),
            "ranks in space alone": lambda ranks, found: found.get((1, ranks)),
        }
        for label, seconds in lines.items():
            points = [(ranks, at) for ranks, found in self.table.items() if (at := seconds(ranks, found)) is not None]
            axes.loglog(*zip(*points), ".-", label=label)
        serial = self.table[1][1, 1]
        axes.loglog(
            list(self.table), [serial / ranks for ranks in self.table], ":", color="0.6", label="ideal", zorder=0
        )
        for ranks, found in list(self.table.items())[2::3]:
            time, space = min(found, key=lambda split: found[split])
            axes.annotate(f"{time}x{space}", (ranks, found[time, space]), xytext=(0, -14), textcoords="offset points")
        axes.set(xlabel="ranks, time x space", ylabel="predicted seconds of a KKT solve")
        axes.set_title(f"cube of {self.n}^3 nodes, {self.layout.steps:,} steps; {self.network}", fontsize="medium")
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
        figure.savefig(file, dpi=150)
        plt.close(figure)


def _interpolated(unknowns: int, sizes: Sequence[int], seconds: np.ndarray) -> float:
    """Seconds a row between measured ones, linear in logarithms; above them in proportion, below them the smallest."""
    if unknowns >= sizes[-1]:
        return float(seconds[-1] * unknowns / sizes[-1])
    floor = np.maximum(seconds, 1e-9)
    return float(np.exp(np.interp(np.log(unknowns), np.log(sizes), np.log(floor))))


# -- what is measured ------------------------------------------------------------------------------------------


def measured_parts(sizes: Sequence[int]) -> dict[int, dict[str, Sequence[float]]]:
    """Seconds (a call, a row) of each part, by the nodes along an edge; step solves as loose as `wathen` has them."""
    words = ("-mgrit_window", 4, "-rounds", 5, "-step_ksp_rtol", LOOSE_STEPS, *SOLVER)
    found = {n: run("problems.benchmarks.costs", "heat3d", "-n", n, *words)["parts"] for n in sizes}
    for parts in found.values():
        parts["sweep"] = parts["alone"]  # steps of windows are solved one after the other, too
    return found


def counted_messages(n: int, ranks: int) -> dict[str, float]:
    """Messages and sums in an iteration of a step solve: of the rank that sends most, to a neighbor in the mean."""
    few, many = (_monitored(n, ranks, solves) for solves in (2, 12))
    iterations = many["iterations"] - few["iterations"]
    messages = max(b - a for a, b in zip(few["messages"], many["messages"])) / iterations
    return {
        "messages": messages,
        "to_a_neighbor": messages / Exchange.of(n, ranks).neighbors,
        "sums": max(b - a for a, b in zip(few["sums"], many["sums"])) / iterations,
    }


def _monitored(n: int, ranks: int, solves: int) -> dict[str, Any]:
    """Iterations of so many step solves, and what each rank has sent in all, as Open MPI's monitoring writes it."""
    with tempfile.TemporaryDirectory() as folder:
        words = {"enable": "2", "enable_output": "3", "filename": f"{folder}/sent"}
        names = {f"OMPI_MCA_pml_monitoring_{name}": word for name, word in words.items()}
        with patch.dict("os.environ", names):
            found = run(MODULE, "messages", "-solves", solves, "-n", n, "-nt", 2, *SOLVER, ranks=ranks)
        texts = [Path(folder, f"sent.{rank}.prof").read_text() for rank in range(ranks)]
    pairs = [re.findall(r"^E\t(\d+)\t(\d+)\t\d+ bytes\t(\d+) msgs", text, re.M) for text in texts]
    found["messages"] = [sum(int(count) for a, b, count in each if a != b) for each in pairs]
    found["sums"] = [sum(map(int, re.findall(r"^A2A\t.*\t(\d+) msgs", text, re.M))) for text in texts]
    return dict(found)


def counted_iterations(time: int, space: int, options: argparse.Namespace) -> dict[str, Any]:
    """Iterations of a KKT solve, what is done in each, and those of its step solves."""
    words = ("-n", options.counted_n, "-nt", options.counted_steps, "-space_ranks", space)
    words += ("-wathen_propagator", "mgrit", "-mgrit_window", options.window)
    return dict(run(MODULE, "kkt", *words, *SOLVER, ranks=time * space))


# -- what the processes do -------------------------------------------------------------------------------------


def _work(task: str) -> None:
    """Solve for single steps, or a KKT system, by the options, and print what it took."""
    from petsc4py import PETSc

    from pdeopt.steps import StepCounter
    from pdeopt.steps.stepsolve import step_solver
    from problems.benchmarks.kkt_work import problem_of

    torch.set_num_threads(1)
    if task == "messages":
        problem = problem_of("heat3d", space_ranks=MPI.COMM_WORLD.size)
        design = problem.create_design()
        A = problem.at(problem.join(problem.constant_state(design), design)).jacobian.blocks["A"]
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(PETSc.Options().getInt("solves"), problem.n, generator=generator, dtype=torch.float64)
        step_solver(A).solve(rows)
        found: dict[str, Any] = {"iterations": StepCounter.iterations}
    else:
        found = _solve_kkt(problem_of("heat3d"))
    if MPI.COMM_WORLD.rank == 0:
        print(json.dumps(found), flush=True)


def _solve_kkt(problem: Any) -> dict[str, Any]:
    from pdeopt.precond.operator import SchurOperator
    from pdeopt.precond.schur import PropagatedSchur
    from pdeopt.space.layouts.layout import Layout as Ghosts
    from pdeopt.steps import StepCounter
    from problems.benchmarks.kkt_work import System

    system = System(problem, "gauss-newton")
    solution, before = system.newton.duplicate(), (StepCounter.iterations, StepCounter.solves)
    with (
        counted(PropagatedSchur, "apply") as applications,
        counted(SchurOperator, "mult") as products,
        counted(Ghosts, "extend") as extended,
        counted(Ghosts, "collect") as collected,
    ):
        system.ksp.solve(system.newton, solution)
    iterations, kind = system.ksp.getIterationNumber(), system.inner_kind
    inner = {"kind": kind, "applications": applications[0] // iterations, "products": products[0] // iterations}
    step = (StepCounter.iterations - before[0]) / (StepCounter.solves - before[1])
    exchanges = (extended[0] + collected[0]) / iterations
    return {"iterations": iterations, "inner": inner, "exchanges": exchanges, "step_iterations": step}


def predict(options: argparse.Namespace) -> tuple[Prediction, list[Row]]:
    """The prediction, and the rows of what was counted for it."""
    rows, counts = [], {(n, ranks): counted_messages(n, ranks) for n in COUNTED for ranks in (2, 4, 8)}
    to_a_neighbor = {n: counts[n, 8]["to_a_neighbor"] for n in COUNTED}
    sums = max(found["sums"] for found in counts.values())
    all_splits = {split: counted_iterations(*split, options) for split in SPLITS}
    first, most = all_splits[1, 1], max(found["step_iterations"] for found in all_splits.values())
    for (time, space), found in all_splits.items():
        name = f"{options.counted_n}^3, {options.counted_steps} steps, {time}x{space}: Krylov iterations, "
        difference = abs(found["iterations"] - first["iterations"])
        rows.append(bar(f"{name}{found['iterations']}, against 1x1", difference, "", 0))
        change = abs(found["step_iterations"] - first["step_iterations"])
        rows.append(bar(f"  step iterations a solve, {found['step_iterations']:.3g}, against 1x1", change, "", 1))
    krylov = {**first, "exchanges": all_splits[1, 2]["exchanges"]}
    step = StepSolve(first["step_iterations"], most, to_a_neighbor, sums)
    for (n, ranks), found in counts.items():
        name = f"{n}^3 on {ranks} ranks, an iteration of a step solve: messages"
        rows.append(
            plain(
                f"{name}, {found['messages']:.0f}, model / counted",
                step.to_a_neighbor(n) * Exchange.of(n, ranks).neighbors / found["messages"],
                "x",
            )
        )
    network = Network(options.latency, options.bandwidth)
    return Prediction(options.n, options.steps, measured_parts(TIMED), step, krylov, network, options.window), rows


def main(argv: list[str] | None = None) -> list[Row]:
    """Count, measure, predict, print the table; write it and the picture where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-json", default="", help="write the rows to this file")
    parser.add_argument("-plot", default="", help="write a picture to this file")
    parser.add_argument("-n", type=int, default=64, help="nodes along an edge of the cube, a power of two")
    parser.add_argument("-steps", type=int, default=1024, help="time steps, a power of two")
    parser.add_argument("-window", type=int, default=16, help="steps of a window, a power of two")
    parser.add_argument("-counted_n", type=int, default=8, help="nodes along an edge where iterations are counted")
    parser.add_argument("-counted_steps", type=int, default=256, help="steps where iterations are counted")
    parser.add_argument("-latency", type=float, default=2e-6, help="seconds of a message, and of a level of a sum")
    parser.add_argument("-bandwidth", type=float, default=1e10, help="bytes a second")
    options = parser.parse_args(argv)
    prediction, rows = predict(options)
    rows += prediction.rows()
    write(options.json, rows)
    if options.plot:
        prediction.plot(options.plot)
    return rows


if __name__ == "__main__":
    if sys.argv[1:2] in (["messages"], ["kkt"]):
        _work(sys.argv[1])
    else:
        main()
