"""Kernel matrices: time, memory and errors of hierarchical blocks; a cut preconditioner; digits; support vectors.

    OMP_NUM_THREADS=1 python -m problems.benchmarks.kernels -data_dir DATA -json build/kernels.json

CPU seconds of one thread. Right-hand sides are random, which is the hardest case for rows of the exact matrix.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from petsc4py import PETSc

from pdeopt.lowrank import (
    Gaussian,
    HierarchicalKernel,
    HierarchicalPC,
    HierarchicalSettings,
    KernelMatrix,
    KernelRidge,
    PivotedCholesky,
    RidgeSettings,
    SymmetricFactor,
)
from pdeopt.optimize.descent import SupportNewtonSettings, SupportVectorNewton
from pdeopt.optimize.splitting import ADMM, SupportVectors
from problems import kernel_svm
from problems.benchmarks.processes import Row, bar, measure, plain
from problems.kernel_ridge import targets, test_error
from problems.shared.files import DataFiles
from problems.shared.kernel_data import KernelSettings, load, make_kernel

LAMBDA = 0.1


class Benchmark:
    """The cases, and what the command line says."""

    def __init__(self, data_dir: str, quick: bool) -> None:
        self.data_dir, self.quick = data_dir, quick

    def blocks(self) -> Iterator[Row]:
        """Gaussian kernel of width 0.2 on points of the unit square: build, factor, solve."""
        seconds: dict[tuple[float, int], float] = {}
        for rtol in (1e-5, 1e-6, 1e-8):
            for n in (1024, 4096) if self.quick else (4096, 16384, 65536):
                x = np.random.default_rng(0).random((n, 2))
                clock = time.process_time()
                H = HierarchicalKernel(Gaussian(0.2), x, rtol=rtol)
                built = time.process_time()
                S = SymmetricFactor(H, LAMBDA)
                done = time.process_time()
                b = np.random.default_rng(1).standard_normal(n)
                right = H.from_points(b)
                a = S.solve(right)
                residual = float(np.linalg.norm(H.product(a) + LAMBDA * a - right) / np.linalg.norm(b))
                alpha, rows = H.to_points(a), np.random.default_rng(2).permutation(n)[:1000]
                left = Gaussian(0.2).block(x[rows], x) @ alpha + LAMBDA * alpha[rows] - b[rows]
                exact = float(np.linalg.norm(left) / np.linalg.norm(b[rows]))
                case = f"n {n}, rtol {rtol:g}"
                seconds[rtol, n] = done - clock
                limit = 2.5 if n == 65536 and rtol == 1e-5 else None
                yield plain(f"{case}: build", built - clock, "s")
                yield bar(f"{case}: build and factor", done - clock, "s", limit)
                yield bar(f"{case}: residual of the compressed system", residual, "", 1e-10)
                yield plain(f"{case}: residual of 1000 exact rows", exact, "")
                yield plain(f"{case}: memory of matrix and factor", (H.nbytes + S.nbytes) / 1e6, "MB")
                yield plain(f"{case}: largest rank", H.ranks[0], "")
            sizes = sorted(n for each, n in seconds if each == rtol)
            ratio = seconds[rtol, sizes[-1]] / seconds[rtol, sizes[0]]
            yield bar(f"rtol {rtol:g}: time of n {sizes[-1]} / n {sizes[0]}", ratio, "", 25)

    def cut(self) -> Iterator[Row]:
        """CG to 1e-8, preconditioned by blocks of small rank, or without singular values up to `cut`; by centers."""
        n = 2048 if self.quick else 65536
        x = np.random.default_rng(0).random((n, 2))
        for width in (0.2, 0.5, 1.0):
            operator = KernelMatrix(Gaussian(width), x, LAMBDA, HierarchicalSettings(rtol=1e-7))
            numbers = 8 * operator.hierarchy.tree.depth  # as many numbers as rank 8 has
            for name, value in (("rank", 8), ("centers", numbers), ("cut", 0.1), ("cut", 0.01)):
                steps, seconds, megabytes = _cg(operator, name, value)
                case = f"n {n}, width {width:g}, {name} {value:g}"
                yield bar(f"{case}: iterations of CG", steps, "", None if name == "cut" else 15)
                yield plain(f"{case}: CG", seconds, "s")
                yield plain(f"{case}: memory of the factor", megabytes, "MB")

    def digits(self) -> Iterator[Row]:
        """MNIST by Nystrom features in single precision, 60,000 samples."""
        if not self.data_dir:
            return
        settings = KernelSettings(data="mnist", samples=2000 if self.quick else None)
        samples = load(settings, DataFiles(self.data_dir))
        kernel, y = make_kernel(settings, samples.x), targets(samples)
        for centers in (200,) if self.quick else (500, 1000, 2000, 4000):
            model = KernelRidge(kernel, 1e-3, "nystrom", RidgeSettings(centers=centers, single=True))
            clock = time.process_time()
            model.fit(samples.x, y)
            seconds = time.process_time() - clock
            accuracy = 100.0 * (1.0 - test_error(samples, model.predict(samples.x_test)))
            judged = centers == 2000
            yield bar(f"MNIST, {centers} centers: CPU", seconds, "s", 20 if judged else None)
            yield bar(f"MNIST, {centers} centers: accuracy", accuracy, "%", 97 if judged else None, at_most=False)

    def machines(self) -> Iterator[Row]:
        """Dual objectives and seconds against scikit-learn's SVC at its default tolerance of 1e-3; also ADMM's."""
        _svc_once()
        for n, noise, bound, width in self._machines():
            name = "generated" if n else "australian"
            settings = KernelSettings(data=name, samples=n, noise=noise, width=width)
            samples = load(settings, DataFiles(self.data_dir))
            y, _ = kernel_svm.labels(samples)
            kernel = make_kernel(settings, samples.x)
            clock = time.process_time()
            machine = SupportVectorNewton(PivotedCholesky(kernel, samples.x), y, bound, SupportNewtonSettings())
            result = machine.solve()
            seconds = time.process_time() - clock
            spent, best = _svc(kernel, samples.x, y, bound, 1e-3 if n else 1e-6)
            case = f"{name}, n {len(y)}, noise {noise:g}, C {bound:g}, width {kernel.width:.2g}"
            above = (_dual(kernel, samples.x, y, result.design) - best) / abs(best)
            yield bar(f"{case}: objective above SVC's, relative", above, "", 1e-6)
            yield plain(f"{case}: gap", machine.gap, "")
            yield plain(f"{case}: rank", len(machine.factor.phi), "")
            yield bar(f"{case}: Newton", seconds, "s", spent if n else None)
            yield plain(f"{case}: SVC", spent, "s")

    def _machines(self) -> list[tuple[int | None, float, float, float | None]]:
        """Samples, noise, C and width."""
        if self.quick:
            return [(1000, 0.3, 1.0, None)]
        sizes = [(n, noise, 1.0, None) for n in (10_000, 20_000, 40_000) for noise in (0.1, 0.3, 1.0)]
        others = [(10_000, noise, 10.0, None) for noise in (0.1, 0.3, 1.0)] + [(10_000, 0.3, 1.0, 0.1)]
        return [*sizes, *others, *([(None, 0.0, 1.0, None)] if self.data_dir else [])]

    def splitting(self) -> Iterator[Row]:
        """Support vectors by ADMM, for kernels of any rank."""
        n = 1000 if self.quick else 10_000
        settings = KernelSettings(samples=n, noise=0.3)
        samples = load(settings, DataFiles())
        y, _ = kernel_svm.labels(samples)
        kernel = make_kernel(settings, samples.x)
        clock = time.process_time()
        matrix = KernelMatrix(kernel, samples.x, 1.0, HierarchicalSettings(rtol=1e-7))
        result = ADMM(SupportVectors(matrix, y, 1.0), max_it=5000, rtol=1e-5).solve()
        seconds = time.process_time() - clock
        spent, best = _svc(kernel, samples.x, y, 1.0, 1e-6)
        above = (_dual(kernel, samples.x, y, result.design) - best) / abs(best)
        yield bar(f"generated, n {n}, ADMM: objective above SVC's, relative", above, "", 1e-6)
        yield plain(f"generated, n {n}, ADMM: iterations", result.iterations, "")
        yield bar(f"generated, n {n}: ADMM", seconds, "s", spent)


def _cg(operator: KernelMatrix, name: str, value: float) -> tuple[int, float, float]:
    """Iterations (1000 for none that suffices), seconds of CG without the factor, and megabytes of the factor."""
    options = PETSc.Options()
    options.setValue(f"hier_{name}", value)
    matrix, solver, context = operator.shell(), PETSc.KSP().create(), HierarchicalPC()
    solver.setOperators(matrix)
    solver.setType("cg")
    solver.setNormType(PETSc.KSP.NormType.UNPRECONDITIONED)
    solver.setTolerances(rtol=1e-8, atol=0.0, max_it=1000)
    solver.getPC().setType("python")
    solver.getPC().setPythonContext(context)
    solver.setUp()
    right, left = matrix.createVecs()
    right.setArray(np.random.default_rng(1).standard_normal(right.getLocalSize()))
    clock = time.process_time()
    solver.solve(right, left)
    seconds, steps = time.process_time() - clock, solver.getIterationNumber()
    solver.destroy()
    matrix.destroy()
    options.delValue(f"hier_{name}")
    return steps, seconds, context.factor.nbytes / 1e6


def _svc_once() -> None:
    """Both ways once, so that no figure has what a first call takes."""
    x, y = np.random.default_rng(0).random((200, 2)), np.repeat([-1.0, 1.0], 100)
    SupportVectorNewton(PivotedCholesky(Gaussian(0.5), x), y, 1.0, SupportNewtonSettings()).solve()
    _svc(Gaussian(0.5), x, y, 1.0, 1e-3)


def _svc(kernel: Gaussian, x: np.ndarray, y: np.ndarray, bound: float, tol: float) -> tuple[float, float]:
    """Seconds and dual objective of scikit-learn."""
    from sklearn.svm import SVC

    clock = time.process_time()
    machine = SVC(C=bound, gamma=0.5 / kernel.width**2, tol=tol, cache_size=1000).fit(x, y)
    seconds = time.process_time() - clock
    a = np.zeros(len(y))
    a[machine.support_] = machine.dual_coef_[0]
    return seconds, _dual(kernel, x, y, a)


def _dual(kernel: Gaussian, x: np.ndarray, y: np.ndarray, a: np.ndarray) -> float:
    """a'Ka/2 - y'a with the exact kernel."""
    own = np.flatnonzero(a)
    parts = np.array_split(own, 1 + len(own) // 1000)
    return float(sum(0.5 * a[part] @ (kernel.block(x[part], x[own]) @ a[own]) for part in parts) - y @ a)


CASES: dict[str, Callable[[Benchmark], Any]] = {
    "blocks": Benchmark.blocks,
    "cut": Benchmark.cut,
    "digits": Benchmark.digits,
    "machines": Benchmark.machines,
    "splitting": Benchmark.splitting,
}


def main(argv: list[str] | None = None) -> list[Row]:
    """Measure, print the tables, write rows as JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-json", default="", help="write the rows to this file")
    parser.add_argument("-only", nargs="+", choices=CASES, default=list(CASES), help="these cases alone")
    parser.add_argument("-data_dir", default="", help="folder of the data sets; without it, generated points alone")
    parser.add_argument("-quick", action="store_true", help="small sizes: does it run?")
    options: Any = parser.parse_args(argv)
    return measure(CASES, options.only, Benchmark(options.data_dir, options.quick), options.json)


if __name__ == "__main__":
    main()
