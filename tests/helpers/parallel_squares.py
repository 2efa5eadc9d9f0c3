"""Levenberg-Marquardt with shared rows: `python -m tests.helpers.parallel_squares FILE`, in which rank 0 writes."""

from __future__ import annotations

import sys

import numpy as np
from mpi4py import MPI

from pdeopt.optimize.squares.levenberg import LevenbergMarquardt
from tests.helpers.pinns import hard, somewhere

SMALL = dict(part_size=16, coarse_size=20)
WAYS = {
    "normal": dict(linear="normal"),
    "woodbury": dict(linear="woodbury"),
    "coarse rows": dict(linear="cg", **SMALL),
    "two levels": dict(linear="cg", coarse="spectral", local="additive", **SMALL),
    "sweeps": dict(linear="cg", keep="none", coarse="none", cg_it=10),
    "drawn": dict(linear="normal", resample_every=2, rows=100),
}


def main(file):
    """Each way for a few iterations."""
    found = {}
    for name, words in WAYS.items():
        function = hard()
        method = LevenbergMarquardt(function, team=MPI.COMM_WORLD, max_it=3, rtol=0.0, **words)
        result = method.minimize(somewhere(function))
        everywhere = MPI.COMM_WORLD.allgather((result.design.numpy().tobytes(), function.tally.work))
        assert len(set(everywhere)) == 1, f"{name}: ranks differ, work {[work for _, work in everywhere]}"
        found[name], found[f"{name}, work"] = result.design.numpy(), function.tally.work
    if MPI.COMM_WORLD.rank == 0:
        np.savez(file, **found)


if __name__ == "__main__":
    main(sys.argv[1])
