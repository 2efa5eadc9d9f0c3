"""Memory: of reduced gradients with and without checkpoints, and of solves with all steps at once.

    OMP_NUM_THREADS=1 python -m problems.benchmarks.memory -json build/memory.json

Each figure is the largest resident memory of a process of its own; "above imports" is above what Python with PyTorch
and PETSc takes. A trajectory is the states of all steps, 8 n N bytes. Gradients are of the README's reaction and
diffusion, n unknowns, with one control a step that acts everywhere alike, or with one a node.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

import pdeopt as po
from problems.benchmarks.processes import Row, bar, measure, peak_mb, plain, run
from problems.heat import HeatCase, HeatSettings

MB = 2**20


class ReactionDiffusion(po.TimeDependentConstraint):
    """u_t = D u_xx + u(1 - u) + z on (0, 1), u = 0 at both ends, u_0 = 0; implicit Euler.

    Args:
        n: unknowns of a state.
        distributed: a control at each node; else one number a step, the same everywhere.
    """

    def __init__(self, n: int, distributed: bool) -> None:
        self.n, self.h = n, 1.0 / (n + 1)
        self.state_dim, self.control_dim = n, n if distributed else 1
        self.state_mass = self.h * sp.eye(n)
        self.control_mass = self.state_mass if distributed else None
        self.second_difference = po.StepMatrix.constant(sp.diags([1.0, -2.0, 1.0], [-1, 0, 1], (n, n)) / self.h**2)

    def initial_state(self, p: Tensor) -> Tensor:
        return torch.zeros(self.n, dtype=torch.float64)

    def residual(self, u_old: Tensor, u_new: Tensor, z: Tensor, steps: po.Steps) -> Tensor:
        f = 0.02 * self.second_difference(u_new) + u_new * (1 - u_new) + z
        return self.h * (u_new - u_old - steps.dt[:, None] * f)


def reaction_diffusion(n: int, nt: int, distributed: bool) -> po.ControlProblem:
    """Track sin(pi x) over [0, nt / 1000]."""
    constraint = ReactionDiffusion(n, distributed)
    target = np.sin(np.pi * constraint.h * np.arange(1, n + 1))
    objective = po.Tracking(target, constraint.state_mass) + po.ControlCost(1e-3, constraint.control_mass)
    return po.ControlProblem(constraint, objective, po.TimeGrid.uniform(nt, T=nt / 1000))


# -- tasks, each in a process of its own ----------------------------------------------------------------------------


def gradient(words: argparse.Namespace) -> dict[str, Any]:
    """One reduced value and gradient: CPU seconds, stretches solved for, memory."""
    warm = po.ReducedObjective(reaction_diffusion(words.n, 1000, words.distributed))  # loads libraries
    warm.value_and_gradient(torch.zeros(warm.size, dtype=torch.float64))
    imports = peak_mb()
    problem = reaction_diffusion(words.n, words.nt, words.distributed)
    reduced = po.ReducedObjective(problem, checkpoints=words.checkpoints, checkpoints_disk=words.disk)
    z = 0.3 * torch.sin(torch.arange(reduced.size, dtype=torch.float64) / 50)
    base, begin = peak_mb(), time.process_time()
    value, g = reduced.value_and_gradient(z)
    found = {"cpu": time.process_time() - begin, "value": value, "size": float(g.norm())}
    sweeps = reduced.sweeps
    stretches = {"solved": sweeps.solved, "stretches": len(sweeps.stretches)} if sweeps else {}
    return found | stretches | {"imports_mb": imports, "base_mb": base, "peak_mb": peak_mb()}


def heat(words: argparse.Namespace) -> dict[str, Any]:
    """Heat 60 x 20 from zero to optimality by `po.solve`, as the options of PETSc say."""
    imports = peak_mb()
    problem = HeatCase(HeatSettings(nt=words.nt)).problem
    begin = time.process_time()
    result = po.solve(problem, method="newton")
    cpu, krylov = time.process_time() - begin, sum(result.history["krylov"])
    vector = 8 * problem.layout.kkt_size / MB
    found = {"cpu": cpu, "iterations": result.iterations, "krylov": krylov, "message": result.message}
    return found | {"imports_mb": imports, "peak_mb": peak_mb(), "vector_mb": vector}


TASKS = {"gradient": gradient, "heat": heat}


# -- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Benchmark:
    """The cases; `quick` takes small sizes, to see that all runs."""

    quick: bool = False

    def of(self, task: str, *words: object) -> dict[str, Any]:
        """What a task finds."""
        found: dict[str, Any] = run("problems.benchmarks.memory", "-task", task, *words)
        return found

    def checkpoints(self) -> list[Row]:
        """Gradients with k states kept: time and memory against those with all."""
        rows, nt = [], 8000 if self.quick else 200_000
        whole = self.of("gradient", "-nt", nt)
        name = f"gradient, n 63, {nt} steps"
        rows += [plain(f"{name}, all states", whole["peak_mb"], "MB peak"), plain("the same", whole["cpu"], "CPU s")]
        for kept, disk in ((5, ""), (20, ""), (100, ""), (1000, ""), (1000, "/tmp")):
            found = self.of("gradient", "-nt", nt, "-checkpoints", kept, *(["-disk", disk] if disk else []))
            error = abs(found["value"] / whole["value"] - 1)
            note = f"{found['solved']} solves of {found['stretches']} stretches, J differs by {error:.0e}"
            case = f"{name}, {kept} kept{' on disk' * bool(disk)}"
            rows.append(plain(f"{case} ({note})", found["peak_mb"], "MB peak"))
            rows.append(bar(f"{case}, time / all", found["cpu"] / whole["cpu"], "x", 2 if kept == 1000 else None))
        return rows

    def long(self) -> list[Row]:
        """A million steps."""
        nt = 20_000 if self.quick else 1_000_000
        found = self.of("gradient", "-nt", nt, "-checkpoints", 1000)
        note = f"{found['solved']} solves of {found['stretches']} stretches, {found['cpu']:.0f} CPU s"
        rows = [bar(f"gradient, n 63, {nt} steps, 1000 kept ({note})", found["peak_mb"], "MB peak", 1000)]
        return [*rows, plain("the same, above set-up", found["peak_mb"] - found["base_mb"], "MB")]

    def gradients(self) -> list[Row]:
        """A control a node: trajectories of one gradient."""
        rows = []
        for nt in (4000,) if self.quick else (16_000, 64_000):
            for kept in (0, 100):
                found = self.of("gradient", "-nt", nt, "-distributed", "-checkpoints", kept)
                trajectories = (found["peak_mb"] - found["base_mb"]) * MB / (8 * 63 * nt)
                case = f"gradient, n 63, a control a node, {nt} steps, {kept or 'all'} kept, trajectories"
                rows.append(bar(case, trajectories, "", None if kept else 12))
        return rows

    def steps(self) -> list[Row]:
        """Heat with all steps at once."""
        rows, per_step = [], []
        for nt, limit in ((16, None), (32, None)) if self.quick else ((256, None), (1024, None), (4096, 3584)):
            found = self.of("heat", "-nt", nt)
            above = found["peak_mb"] - found["imports_mb"]
            per_step.append(above / nt)
            note = "{iterations} its, {krylov} Krylov, {cpu:.3g} CPU s, a KKT vector {vector_mb:.3g} MB".format(**found)
            rows.append(bar(f"heat 60 x 20, nt {nt} ({note})", found["peak_mb"], "MB peak", limit))
            rows.append(bar(f"heat 60 x 20, nt {nt}, above imports", above, "MB", 300 if nt == 256 else None))
        return [*rows, bar("memory a step, most steps / fewest", per_step[-1] / per_step[0], "x", 1.1)]


CASES: dict[str, Callable[[Benchmark], list[Row]]] = {
    name: getattr(Benchmark, name) for name in ("steps", "gradients", "checkpoints", "long")
}


def main(argv: list[str] | None = None) -> list[Row]:
    """Measure, print the table, write it as JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-json", default="", help="write the rows to this file")
    parser.add_argument("-only", nargs="+", choices=CASES, default=list(CASES), help="these cases alone")
    parser.add_argument("-quick", action="store_true", help="small sizes: does it run?")
    options = parser.parse_args(argv)
    return measure(CASES, options.only, Benchmark(options.quick), options.json)


def work(argv: list[str]) -> None:
    """One task, and what it found as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("-task", choices=TASKS)
    for name, default in {"n": 63, "nt": 1000, "checkpoints": 0}.items():
        parser.add_argument(f"-{name}", type=int, default=default)
    parser.add_argument("-disk", default="")
    parser.add_argument("-distributed", action="store_true")
    words = parser.parse_args(argv)
    print(json.dumps(TASKS[words.task](words)))


if __name__ == "__main__":
    work(sys.argv[1:]) if "-task" in sys.argv else main()
