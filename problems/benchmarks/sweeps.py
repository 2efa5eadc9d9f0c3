"""Sweeps over time: factors and substitution, against the memory that they read and against a loop over steps.

    OMP_NUM_THREADS=1 python -m problems.benchmarks.sweeps -json build/sweeps.json

CPU milliseconds of one thread, least of the repetitions. The limit is the time that a copy takes to move as many bytes,
with a working set of the same size: entries of 8 bytes with an index of 4, and five reads or writes of 8 a row. Before
them, time and memory of one reduced gradient over many steps.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.linalg.lapack import dgttrf, dgttrs
from torch import Tensor

from pdeopt.control.reduced import ReducedObjective
from pdeopt.core.arrays import Array
from pdeopt.core.memory import forget_peak, used_memory
from pdeopt.steps import Sparsity, StepMatrix, step_solver, substitution
from problems.benchmarks.processes import Row, bar, plain, table, write
from problems.burgers import BurgersCase, BurgersSettings
from problems.heat import HeatCase, HeatSettings

#: Steps that a loop over steps is timed for.
LOOP = 64


def least_ms(function: Callable[[], Any], repeat: int = 7) -> float:
    """The least CPU milliseconds of a call."""
    function()
    seconds = []
    for _ in range(repeat):
        begin = time.process_time()
        function()
        seconds.append(time.process_time() - begin)
    return 1e3 * min(seconds)


def copy_ms(moved: float, working_set: float) -> float:
    """Milliseconds in which a copy moves so many bytes inside a working set of so many."""
    source = np.ones(max(int(working_set) // 16, 1024))
    target = np.empty_like(source)
    times = max(int(2e7 / source.nbytes), 1)

    def copies() -> None:
        for _ in range(times):
            np.copyto(target, source)

    return least_ms(copies, 3) * moved / (2 * times * source.nbytes)


class Case:
    """The matrices of some steps.

    Args:
        name: of the case.
        A, B: one a step, or one for all.
        batch: steps.
    """

    def __init__(self, name: str, A: StepMatrix, B: StepMatrix, batch: int) -> None:
        self.name, self.A, self.B, self.batch, self.n = name, A, B, batch, A.shape[0]
        self.rows = torch.randn(batch, self.n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def measured(self) -> list[float]:
        """Milliseconds: factors, both first sweeps after them; a sweep forward, backward; their limit; a loop."""
        A, B, batch, rows = self.A, self.B, self.batch, self.rows
        sweeps = substitution(A, B, batch)

        def all_new() -> None:
            new = substitution(A, B, batch)
            new.backward(new.forward(rows))

        entries = sweeps._triangles.entries
        alike = A.is_constant and B.is_constant
        distinct = min(sweeps._chunks[0].end, batch) if alike else batch  # a chunk is read again and again
        limit = copy_ms(batch * (12 * entries + 5 * 16 * self.n), 12 * distinct * entries)
        times = [least_ms(lambda: sweeps.forward(rows)), least_ms(lambda: sweeps.backward(rows))]
        return [least_ms(lambda: substitution(A, B, batch)), least_ms(all_new), *times, limit, self.loop()]

    def loop(self) -> float:
        """A forward sweep as a loop over steps, by SciPy's LAPACK or SuperLU, factors not counted."""
        solve = _tridiagonal(self.A) if _is_tridiagonal(self.A.sparsity) else _general(self.A)
        B = [self.B[i : i + 1].as_csr() if not self.B.is_constant else self.B.as_csr() for i in range(LOOP)]

        def loop() -> None:
            x = np.zeros(self.n)
            for i in range(LOOP):
                x = solve(i, self.rows[i].numpy() - B[i] @ x)

        return least_ms(loop, 3) * self.batch / LOOP


def _is_tridiagonal(pattern: Sparsity) -> bool:
    return bool(np.abs(pattern.rows - pattern.cols).max() <= 1) and pattern.shape[0] > 3


def _tridiagonal(A: StepMatrix) -> Callable[[int, Array], Array]:
    step = [A[i : i + 1].as_csr() for i in range(1 if A.is_constant else LOOP)]
    factors = [dgttrf(*(each.diagonal(k) for k in (-1, 0, 1)))[:5] for each in step]
    return lambda i, r: dgttrs(*factors[i % len(factors)], r)[0]


def _general(A: StepMatrix) -> Callable[[int, Array], Array]:
    solvers = [step_solver(A[i : i + 1]) for i in range(1 if A.is_constant else LOOP)]

    def solve(i: int, r: Array) -> Array:
        found: Tensor = solvers[i % len(solvers)].solve(torch.from_numpy(r[None]))
        return found[0].numpy()

    return solve


def burgers(nx: int) -> Case:
    """Burgers' steps at a random state: tridiagonal, all unlike."""
    problem = BurgersCase(BurgersSettings(nx=nx, nt=nx)).problem
    x = problem.create_primal()
    x.setRandom()
    blocks = problem.at(x).jacobian.blocks
    return Case(f"Burgers, n {nx - 1}, {nx} unlike steps", blocks["A"], blocks["B"], nx)


def heat(nx: int, ny: int, nt: int) -> Case:
    """Heat's steps in the plane, all alike."""
    problem = HeatCase(HeatSettings(nx=nx, ny=ny, nt=nt)).problem
    blocks = problem.at(problem.create_primal()).jacobian.blocks
    return Case(f"heat {nx} x {ny}, n {problem.n}, {nt} like steps", blocks["A"], blocks["B"], nt)


def small(n: int, batch: int) -> Case:
    """Dense steps of a few unknowns, all unlike."""
    full, draw = Sparsity(np.ones((n, n))), torch.Generator().manual_seed(0)
    A, B = (StepMatrix(full, torch.randn(batch, n * n, generator=draw, dtype=torch.float64)) for _ in "AB")
    A.values[:, torch.from_numpy(full.rows == full.cols)] += 4.0 * n
    return Case(f"ODE, n {n}, {batch} unlike steps", A, B, batch)


def reduced_gradient(nx: int, nt: int) -> list[Row]:
    """CPU seconds of one value and gradient from a zero control, and its memory above set-up in trajectories."""
    warm, problem = (BurgersCase(BurgersSettings(nx=nx, nt=steps)).problem for steps in (nx, nt))
    for each in (warm, problem):  # the first one loads libraries
        f = ReducedObjective(each)
        control = torch.zeros(f.size, dtype=torch.float64)
        forget_peak()
        (before, _), begin = used_memory(), time.process_time()
        f.value_and_gradient(control)
        seconds, (_, peak) = time.process_time() - begin, used_memory()
    case, trajectory = f"one reduced gradient, n {problem.n}, {nt} steps", 8 * nt * problem.n
    name = f"{case}: memory in trajectories of {trajectory / 2**20:.1f} MB"
    return [plain(case, seconds, "s"), bar(name, (peak - before) / trajectory, "", 12)]


def main(argv: list[str] | None = None) -> list[Row]:
    """Measure, print the table, write it as JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-json", default="", help="write the rows to this file")
    parser.add_argument("-quick", action="store_true", help="small cases")
    options = parser.parse_args(argv)
    cases = [burgers(64), heat(15, 5, 256), small(2, 1000)]
    if not options.quick:
        cases += [burgers(128), burgers(256), heat(60, 20, 256), small(2, 10_000), small(8, 1000)]
    rows, lines = reduced_gradient(64, 16_000), dict[str, list[float]]()
    for case in cases:
        factors, new, forward, _, limit, loop = lines[case.name] = case.measured()
        rows.append(plain(f"{case.name}: factors", factors, "ms"))
        rows.append(plain(f"{case.name}: factors and first sweeps, forward and backward", new, "ms"))
        rows.append(bar(f"{case.name}: a sweep against a copy of what it reads", forward / limit, "x", None))
        rows.append(bar(f"{case.name}: a loop over steps against a sweep", loop / forward, "x", 1, at_most=False))
    columns = ["factors, ms", "with first sweeps", "forward", "backward", "limit of memory", "loop over steps"]
    table("sweeps", columns, lines)
    write(options.json, rows)
    return rows


if __name__ == "__main__":
    main()
