"""Why the counts are flat: the preconditioned Schur complement of heat control, mode by mode.

    python -m problems.benchmarks.mode_analysis

In the eigenfunctions of the Laplacian heat control falls apart into scalar problems in time, u_t + kappa mu u = z.
For each eigenvalue the preconditioned Schur complement is a small dense matrix, built here by the same `LinearMgrit`
that solves the real problem. The extreme eigenvalues over all modes bound the iterations of CG,

    2 ((sqrt k - 1) / (sqrt k + 1))^n <= 1e-8,   k = largest / smallest,

which are printed beside those that a solve of the 2-D problem takes. Exactly inverted, the eigenvalues lie in
[1/2, 1]: with a = 1 + tau kappa mu - exp(i omega), the symbol of a step, and c the shift, S has |a|^2 + c^2 and the
matched approximation |a + c|^2 = |a|^2 + c^2 + 2 c Re a, where 0 <= 2 c Re a <= |a|^2 + c^2.
"""

from __future__ import annotations

import argparse
import math

import numpy as np
import torch
from petsc4py import PETSc
from torch import Tensor

from pdeopt.control.metric import RieszMetric
from pdeopt.optimize.fullspace.kktsolver import KKTSolver
from pdeopt.steps.linear_mgrit import LinearMgrit, LinearMgritSettings
from pdeopt.steps.sparse import StepMatrix
from pdeopt.steps.timegrid import TimeGrid
from problems.heat import HeatCase, HeatSettings

KAPPA = 0.05


def main(argv: list[str] | None = None) -> list[tuple[float, int, float, float, int, int]]:
    """Print and return rows of alpha, steps, extreme eigenvalues, predicted and measured iterations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-steps", type=int, nargs="+", default=(32, 64, 128, 256), help="numbers of steps")
    parser.add_argument("-alphas", type=float, nargs="+", default=(1.0, 1e-2, 1e-4, 1e-6, 1e-8), help="control weights")
    parser.add_argument("-cycles", type=int, default=2, help="cycles of MGRIT; 0 for forward")
    options = parser.parse_args(argv)
    rows = []
    print("   alpha  steps   smallest  largest   predicted  measured")
    for alpha in options.alphas:
        for steps in options.steps:
            low, high = extremes(steps, alpha, options.cycles)
            rows.append((alpha, steps, low, high, predicted(low, high), measured(steps, alpha, options.cycles)))
            print("{:8.0e} {:6d} {:10.3f} {:8.3f} {:11d} {:9d}".format(*rows[-1]), flush=True)
    return rows


def extremes(steps: int, alpha: float, cycles: int) -> tuple[float, float]:
    """The extreme eigenvalues over modes with kappa mu tau from almost none to very stiff."""
    slow = KAPPA * math.pi**2 * (1 / 9 + 1)  # the slowest mode of (0,3) x (0,1)
    found = [eigenvalues(steps, alpha, rate, cycles) for rate in np.geomspace(slow, 1e3 * steps, 12)]
    return float(min(v[0] for v in found)), float(max(v[-1] for v in found))


def eigenvalues(steps: int, alpha: float, rate: float, cycles: int) -> np.ndarray:
    """Those of M S for one mode u' + rate u = z on (0, 1), ascending; M = (T + N)^-T W (T + N)^-1 by MGRIT."""
    tau = 1.0 / steps
    W = torch.full((steps, 1), tau, dtype=torch.float64)
    W[-1] /= 2
    T = torch.diag(torch.full((steps,), 1 + tau * rate, dtype=torch.float64))
    T -= torch.diag(torch.ones(steps - 1, dtype=torch.float64), -1)
    S = T @ torch.diag(1 / W[:, 0]) @ T.T + tau / alpha * torch.eye(steps, dtype=torch.float64)
    A, B = (StepMatrix.constant(np.array([[value]])) for value in (1 + tau * rate + tau / math.sqrt(alpha), -1.0))
    settings = LinearMgritSettings(cycles=max(cycles, 1), levels=20 if cycles else 1)
    inverse = LinearMgrit(TimeGrid.uniform(steps, 1.0, PETSc.COMM_SELF), A, B, settings)

    def column(r: Tensor) -> Tensor:
        return inverse.adjoint(W * inverse.forward(r))

    M = torch.stack([column(unit[:, None])[:, 0] for unit in torch.eye(steps, dtype=torch.float64)], dim=1)
    L = torch.linalg.cholesky(S)
    return torch.linalg.eigvalsh(L.T @ M @ L).numpy()


def predicted(low: float, high: float) -> int:
    """Iterations of CG to 1e-8 by Chebyshev's bound."""
    root = math.sqrt(high / low)
    return math.ceil(math.log(2e8) / -math.log((root - 1) / (root + 1)))


def measured(steps: int, alpha: float, cycles: int) -> int:
    """Iterations of CG with S to 1e-8 for heat control on 24 x 8 elements."""
    prefix = "mode_"
    options = {
        "mgrit_cycles": max(cycles, 1),
        "mode_kkt_ksp_type": "preonly",
        "mode_kkt_wathen_ksp_type": "cg",
        "mode_kkt_wathen_ksp_rtol": 1e-8,
        "mode_kkt_wathen_ksp_max_it": 100,
        "mode_kkt_wathen_ksp_norm_type": "unpreconditioned",
        "mode_kkt_wathen_propagator": "mgrit" if cycles else "forward",
    }
    for name, value in options.items():
        PETSc.Options().setValue(name, value)
    problem = HeatCase(HeatSettings(nx=24, ny=8, nt=steps, alpha=alpha, kappa=KAPPA), PETSc.COMM_SELF).problem
    lin = problem.at(problem.create_primal())
    solver = KKTSolver(RieszMetric(problem), "gauss-newton", prefix, "wathen")
    solver.set_point(lin)
    right = problem.layout.join_kkt(lin.gradient, lin.residual, problem.create_kkt())
    solver.ksp.solve(right, right.duplicate())
    iterations = solver.ksp.getPC().getPythonContext().schur_solver.getIterationNumber()
    solver.destroy()
    for name in options:
        PETSc.Options().delValue(name)
    return iterations


if __name__ == "__main__":
    main()
