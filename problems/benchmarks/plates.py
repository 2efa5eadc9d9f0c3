"""Two problems on the unit square with inequalities, by pdeopt's methods for them and by CasADi and IPOPT at 1e-12.

    python -m problems.benchmarks.plates
    python -m problems.benchmarks.plates moreau_yosida

`plate` reacts, has a control in each node and bounds on state and control. `wind` is carried along with four heaters,
which together have a limit, and a bound that moves with time. Both are 12 by 12 nodes and 24 steps of implicit Euler;
both programs see the same matrices. CasADi needs `pip install casadi`.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

import pdeopt as po
from pdeopt.core.arrays import Array
from problems.benchmarks.inequalities import counted

SIDE, STEPS, T = 12, 24, 1.0


class Plate(po.TimeDependentConstraint):
    """u_t = L u - c u^3 + C z, u = 0 at the start and around the square, by finite differences and implicit Euler.

    Args:
        diffusion, wind: L is diffusion times the Laplacian less the derivative along (wind, wind), upwind.
        reaction: c.
        heaters: C is the identity, or has four columns, a bump each.
    """

    def __init__(self, diffusion: float, wind: float, reaction: float, heaters: bool) -> None:
        h = 1 / (SIDE + 1)
        second = sp.diags([1.0, -2.0, 1.0], [-1, 0, 1], shape=(SIDE, SIDE)) / h**2
        first = sp.diags([-1.0, 1.0], [-1, 0], shape=(SIDE, SIDE)) / h
        line, one = diffusion * second - wind * first, sp.eye(SIDE)
        self.L = (sp.kron(line, one) + sp.kron(one, line)).tocsr()
        self.x, self.y = (part.ravel() for part in np.meshgrid(*2 * [h * np.arange(1, SIDE + 1)], indexing="ij"))
        bumps = [np.exp(-30 * ((self.x - a) ** 2 + (self.y - b) ** 2)) for a in (0.3, 0.7) for b in (0.3, 0.7)]
        self.C = sp.csr_matrix(np.stack(bumps, axis=1)) if heaters else sp.eye(SIDE**2, format="csr")
        self.reaction, self.area, self.state_dim, self.control_dim = reaction, h**2, SIDE**2, self.C.shape[1]
        self.state_mass = self.area * sp.eye(self.state_dim)
        self.control_mass = sp.eye(4) if heaters else self.state_mass
        self._L, self._C = po.StepMatrix.constant(self.L), po.StepMatrix.constant(self.C)

    def initial_state(self, p: Tensor) -> Tensor:
        return torch.zeros(self.state_dim, dtype=torch.float64)

    def residual(self, u_old: Tensor, u_new: Tensor, z: Tensor, steps: po.Steps) -> Tensor:
        slope = self._L(u_new) - self.reaction * u_new**3 + self._C(z)
        return self.area * (u_new - u_old - steps.dt[:, None] * slope)

    def target(self) -> Array:
        """A hill that walks along the diagonal, (N + 1, n)."""
        t = np.linspace(0, T, STEPS + 1)[:, None]
        return np.asarray(np.exp(-10 * ((self.x - 0.2 - 0.6 * t) ** 2 + (self.y - 0.2 - 0.6 * t) ** 2)))


class Bounded(NamedTuple):
    """A plate, the price of its control, and what is bounded: u, z, and the sum of z at each step."""

    plate: Plate
    price: float
    state_upper: Array
    lower: float
    upper: float
    together: float | None = None

    def problem(self) -> po.ControlProblem:
        plate = self.plate
        cost = po.ControlCost(self.price, plate.control_mass)
        return po.ControlProblem(
            plate, po.Tracking(plate.target(), plate.state_mass) + cost, po.TimeGrid.uniform(STEPS, T)
        )

    def words(self) -> dict[str, Any]:
        """Arguments of `solve`."""
        found: dict[str, Any] = {"state_upper": self.state_upper, "lower": self.lower, "upper": self.upper}
        if self.together is not None:
            found["path"] = lambda u, z, steps: z.sum(1) - self.together
        return found


def plate() -> Bounded:
    """Reaction and diffusion; u <= 0.4."""
    upper = np.full((STEPS, SIDE**2), 0.4)
    return Bounded(Plate(0.05, 0.0, 1.0, heaters=False), 1e-4, upper, -1.0, 8.0)


def wind() -> Bounded:
    """Four heaters of at most 20 together; u <= 0.15 to 0.55 in turn."""
    t = T / STEPS * np.arange(1, STEPS + 1)[:, None]
    upper = np.broadcast_to(0.35 + 0.2 * np.sin(2 * np.pi * t), (STEPS, SIDE**2)).copy()
    return Bounded(Plate(0.05, 0.5, 0.0, heaters=True), 1e-5, upper, 0.0, 12.0, together=20.0)


def by_ipopt(case: Bounded) -> tuple[float, float]:
    """J and CPU seconds."""
    import casadi as ca

    plate, begin, tau = case.plate, time.process_time(), T / STEPS
    n, m = plate.state_dim, plate.control_dim
    L, C, M, Q = (
        ca.DM(sp.csc_matrix(each)) for each in (plate.L, plate.C, plate.state_mass, sp.csr_matrix(plate.control_mass))
    )
    u, z = ca.MX.sym("u", n, STEPS), ca.MX.sym("z", m, STEPS)
    before = ca.horzcat(ca.DM.zeros(n, 1), u[:, :-1])
    F = u - before - tau * (L @ u - plate.reaction * u**3 + C @ z)
    e, d = u - ca.DM(plate.target()[1:].T), plate.target()[0]
    weights = ca.DM(np.r_[np.full(STEPS - 1, tau), tau / 2])
    J = ca.dot(ca.sum1(e * (M @ e)).T, weights) / 2 + tau / 4 * float(d @ (plate.state_mass @ d))
    J += tau * case.price / 2 * ca.sum2(ca.sum1(z * (Q @ z)))
    total = ca.DM(np.inf if case.together is None else case.together)
    g, most = ca.vertcat(ca.vec(F), ca.sum1(z).T), np.r_[np.zeros(n * STEPS), np.full(STEPS, float(total))]
    low = np.r_[np.full(n * STEPS, -np.inf), np.full(m * STEPS, case.lower)]
    high = np.r_[case.state_upper.ravel(), np.full(m * STEPS, case.upper)]
    ipopt = {"tol": 1e-12, "print_level": 0, "sb": "yes", "bound_relax_factor": 0.0, "honor_original_bounds": "yes"}
    options: Any = {"print_time": False, "ipopt": ipopt}
    solver = ca.nlpsol("plate", "ipopt", {"x": ca.vertcat(ca.vec(u), ca.vec(z)), "f": 100 * J, "g": g}, options)
    least = np.r_[np.zeros(n * STEPS), np.full(STEPS, -np.inf)]
    found = solver(x0=np.zeros(len(low)), lbx=low, ubx=high, lbg=least, ubg=most)
    return float(found["f"]) / 100, time.process_time() - begin


def main(method: str = "auto") -> None:
    """Both problems by a method of pdeopt and by IPOPT, a line of JSON each."""
    for make in (plate, wind):
        case = make()
        problem, begin = case.problem(), time.process_time()
        with counted() as count:
            result = po.solve(problem, method, **case.words())
        assert isinstance(result, po.InequalityResult)
        seconds, reports = time.process_time() - begin, result.inequalities.values()
        J, other = by_ipopt(case)
        row = {"case": make.__name__, "message": result.message, "objective": result.objective, "ipopt": J}
        row |= {"beside_ipopt": result.objective - J, "violation": max(report.violation for report in reports)}
        free = sum("without" in record.note for record in result.history.records)
        row |= {"matrices": count[0] - free, "active": {report.name: report.active for report in reports}}
        print(json.dumps(row | {"cpu": seconds, "cpu_ipopt": other}))


if __name__ == "__main__":
    main(*sys.argv[1:2])
