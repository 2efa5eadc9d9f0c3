"""Least squares with many unknowns: damped systems of a PINN by all ways, over the number of unknowns and on two ranks.

    OMP_NUM_THREADS=1 python -m problems.benchmarks.large_squares -case sizes
    OMP_NUM_THREADS=1 python -m problems.benchmarks.large_squares -case whole
    OMP_NUM_THREADS=1 mpiexec -n 2 python -m problems.benchmarks.large_squares -case ranks

The Klein-Gordon equation, residual networks. Seconds are of the processor, of this rank.

* `sizes`: an iteration's linear algebra, J with two dampings, after some iterations on 400 drawn rows.
* `ranks`: three iterations on 6000 rows, n 1361 by the normal equations and n 50,247 by conjugate gradients.
* `whole`: a run of 50,247 unknowns.
* `inverse`: 200 coefficients of a rod, against TAO's Newton.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import time
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from mpi4py import MPI

import nn_adapters as nna
import pdeopt as po
from pdeopt.optimize.squares import (
    DampedSteps,
    LevenbergSettings,
    Linearized,
    Products,
    ReducedSquares,
    TerminalSquares,
)
from problems.benchmarks.posterior import Conductor
from problems.shared.equations import EQUATIONS

#: Layers and width of the networks, by about how many unknowns they have.
NETWORKS = {1400: (4, 21), 5000: (5, 34), 13_000: (6, 50), 50_000: (10, 74)}
#: How systems are solved, by name.
WAYS: dict[str, dict[str, Any]] = {
    "normal": {"linear": "normal"},
    "woodbury": {"linear": "woodbury"},
    "cg": {"linear": "cg", "coarse": "none"},
    "additive": {"linear": "cg", "coarse": "none", "local": "additive"},
    "multiplicative": {"linear": "cg", "coarse": "none", "local": "multiplicative"},
    "coarse rows": {"linear": "cg", "coarse": "rows"},
    "coarse spectral": {"linear": "cg", "coarse": "spectral", "coarse_size": 200},
    "two levels": {"linear": "cg", "coarse": "spectral", "coarse_size": 200, "local": "additive"},
}
EQUATION = EQUATIONS["klein_gordon"]


def function(layers: int, width: int, points: int) -> nna.PINN:
    """The loss at so many points."""
    form = list(EQUATION.forms)[-1]
    return EQUATION.function(points, layers, width, "resnet", "tanh", False, features=form)


def start(f: nna.PINN, iterations: int) -> tuple[torch.Tensor, float]:
    """A point and its damping, after some iterations on few rows."""
    words = {"linear": "woodbury", "rows": 400, "resample_every": 3, "candidates": 8000}
    method = po.LevenbergMarquardt(f, max_it=iterations, rtol=0.0, **words)
    return method.minimize(f.initial()).design, method.radius


def sizes(unknowns: list[int], rows: int, iterations: int, ways: list[str]) -> None:
    """Two dampings by each way: seconds, steps, and the part of f that the model loses."""
    for n in unknowns:
        f = function(*NETWORKS[n], rows)
        x, lam = start(f, iterations)
        for name in ways:
            begin = time.process_time()
            settings = LevenbergSettings(**WAYS[name])
            at = Linearized(settings.linear, settings)
            at.set(f, x)
            steps, found, counts = DampedSteps(at, settings, None, torch.empty(0)), [], []
            for damping in (lam, lam / 100.0):
                p = steps.systems[0].solve(damping, at.r)
                if p is None:
                    found.append(math.nan)
                    continue
                Jp = at.forward(p)
                found.append(-float((2.0 * at.r + Jp) @ Jp) / at.f)
                counts.append(steps.systems[0].steps if isinstance(steps.systems[0], Products) else 1)
            row = {"n": f.size, "rows": rows, "lam": lam, "way": name, "cpu": time.process_time() - begin}
            _print(row | {"steps": counts, "decrease": found})


def ranks(unknowns: list[int], rows: int) -> None:
    """Three iterations on all ranks: seconds of each, after the first Jacobian, and the last value."""
    for n in unknowns:
        f = function(*NETWORKS[n], rows)
        way = WAYS["normal" if n < 10_000 else "coarse rows"]
        marks: list[float] = []
        method = po.LevenbergMarquardt(f, team=MPI.COMM_WORLD, max_it=3, rtol=0.0, **way)
        result = method.minimize(f.initial(), observers=[lambda m, h, marks=marks: marks.append(time.process_time())])
        spent = MPI.COMM_WORLD.allgather(marks[-1] - marks[0])
        norm = float(result.design.norm())
        _print({"n": f.size, "ranks": len(spent), "cpu": spent, "f": result.history["objective"], "norm": norm})


def whole(seconds: float, rows: int) -> None:
    """A run; the error is told four times in sixteen iterations, its time not counted."""
    f, begin, aside = function(*NETWORKS[50_000], 3000), time.process_time(), 0.0

    def observe(method: po.LevenbergMarquardt, history: po.History) -> None:
        nonlocal aside
        now = time.process_time()
        if history[-1].iteration % 4 == 0:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
            row = {"iteration": history[-1].iteration, "f": method.f, "error": EQUATION.relative_error(f, method.x)}
            _print(row | {"cpu": now - begin - aside, "gigabytes": memory})
        aside += time.process_time() - now

    words = {"linear": "cg", "rows": rows, "resample_every": 4, "candidates": 12_000}
    method = po.LevenbergMarquardt(f, max_it=10**6, rtol=0.0, **words)
    limit = lambda _: time.process_time() - begin - aside > seconds  # noqa: E731
    method.minimize(f.initial(), observers=[observe], until=limit)


def inverse(side: int = 200) -> None:
    """The rod of `problems.benchmarks.posterior`, with a prior of squares: seconds and iterations to the same value."""
    rod, grid = Conductor(side, 1), po.TimeGrid.uniform(40, T=1.0)
    n = rod.state_dim
    p = 0.6 * np.sin(2 * np.pi * rod.h * (np.arange(side) + 0.5))
    forward = po.ControlProblem(rod, po.Tracking(np.zeros(n)), grid)
    truth = forward.create_design()
    truth.setArray(np.linalg.solve(rod.root.numpy(), p))
    B = rod.sensors()
    data = forward.layout.rows(forward.solve_state(truth)).numpy() @ sp.csr_matrix(B).T
    misfit = po.Tracking(data, observe=B, times=grid.times[1:], weight=1e4)
    problem = po.ControlProblem(rod, misfit + TerminalSquares(lambda u, w: w * 0.5**0.5), grid)
    for name in ("nls", "lm"):
        begin = time.process_time()
        if name == "nls":
            result = po.solve(problem, method="tao", tao_type="nls", gauss_newton=True, opt_tol=1e-6)
        else:
            method = po.LevenbergMarquardt(
                ReducedSquares(problem), rtol=1e-6, linear="cg", damping=1e-18, geodesic=False
            )
            result = method.minimize(torch.zeros(problem.param_dim, dtype=torch.float64))
        row = {"method": name, "iterations": result.iterations, "cpu": time.process_time() - begin}
        _print(row | {"objective": result.objective, "message": result.message})


def _print(row: dict[str, Any]) -> None:
    if MPI.COMM_WORLD.rank == 0:
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-case", choices=("sizes", "ranks", "whole", "inverse"), default="sizes")
    parser.add_argument("-unknowns", type=int, nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("-ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("-rows", type=int, default=6000)
    parser.add_argument("-iterations", type=int, default=20)
    parser.add_argument("-seconds", type=float, default=300.0)
    given = parser.parse_args()
    if given.case == "sizes":
        sizes(given.unknowns, given.rows, given.iterations, given.ways)
    elif given.case == "ranks":
        ranks([n for n in given.unknowns if n in (1400, 50_000)], given.rows)
    elif given.case == "whole":
        whole(given.seconds, 1000)
    else:
        inverse()
