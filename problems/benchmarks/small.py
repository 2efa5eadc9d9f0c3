"""Small problems: an ODE over few and many steps, a field of parameters, a horizon that moves on.

    OMP_NUM_THREADS=1 python -m problems.benchmarks.small -json build/small.json

CPU seconds of one thread, the least of a few repeats; the problem is stated anew in each, and its sparsities are found
anew, but nothing is imported. CasADi needs `pip install casadi`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

import pdeopt as po
from pdeopt.core.arrays import Array
from problems.benchmarks.processes import Row, bar, measure, plain


class VanDerPol(po.TimeDependentConstraint):
    """x' = (1 - y^2) x - y + z, y' = x by the midpoint rule; u = (x, y), u_0 = (0, 1)."""

    state_dim, control_dim = 2, 1

    def initial_state(self, p: Tensor) -> Tensor:
        return torch.tensor([0.0, 1.0], dtype=torch.float64)

    def residual(self, u_old: Tensor, u_new: Tensor, z: Tensor, steps: po.Steps) -> Tensor:
        x, y = (0.5 * (u_old + u_new)).chunk(2, dim=1)
        return u_new - u_old - steps.dt[:, None] * torch.cat([(1 - y**2) * x - y + z, x], dim=1)


def van_der_pol(nt: int) -> po.ControlProblem:
    """Bring the oscillator to rest: the integral of x^2 + y^2 + z^2 over (0, 5)."""
    objective = po.Tracking(np.zeros(2), mass=2 * np.eye(2)) + po.ControlCost(2.0)
    return po.ControlProblem(VanDerPol(), objective, po.TimeGrid.uniform(nt, T=5.0))


def casadi_van_der_pol(nt: int) -> float:
    """The same by CasADi, a step mapped over all of them, and IPOPT with MUMPS; J."""
    import casadi as ca

    tau = 5.0 / nt
    old, new, z = ca.SX.sym("old", 2), ca.SX.sym("new", 2), ca.SX.sym("z")
    x, y = ((old[k] + new[k]) / 2 for k in range(2))
    step = ca.Function("step", [old, new, z], [(new - old) / tau - ca.vertcat((1 - y**2) * x - y + z, x)])
    cost = ca.Function("cost", [new, z], [ca.sumsqr(new) + z**2])
    u, controls = ca.MX.sym("u", 2, nt), ca.MX.sym("z", 1, nt)
    before = ca.horzcat(ca.DM([0.0, 1.0]), u[:, :-1])
    J = ca.sum2(cost.map(nt)(u, controls)) - ca.sumsqr(u[:, -1]) / 2 + 0.5  # trapezoidal weights, divided by tau
    nlp = {"x": ca.vertcat(ca.vec(u), ca.vec(controls)), "f": J, "g": ca.vec(step.map(nt)(before, u, controls))}
    ipopt: dict[str, Any] = {"tol": 1e-8, "nlp_scaling_method": "none", "print_level": 0, "sb": "yes"}
    options: Any = {"print_time": False, "ipopt": ipopt}
    solver = ca.nlpsol("van_der_pol", "ipopt", nlp, options)
    found = solver(x0=np.r_[np.tile([0.0, 1.0], nt), np.zeros(nt)], lbg=0, ubg=0)
    return tau * float(found["f"])


class Rod(po.TimeDependentConstraint):
    """u_t = (exp(p) u_x)_x + 1 on (0, 1), u = 0 at both ends and at the start; a value of p between any two nodes.

    Finite volumes, implicit Euler; p has the inner product of H1.

    Args:
        n: nodes inside.
    """

    control_dim = 0

    def __init__(self, n: int) -> None:
        self.state_dim, self.param_dim, self.h = n, n + 1, 1 / (n + 1)
        slope = sp.diags([-1.0, 1.0], [0, 1], (n, n + 1)) / self.h**0.5
        self.state_mass, self.param_mass = self.h * sp.eye(n), self.h * sp.eye(n + 1) + slope.T @ slope

    def initial_state(self, p: Tensor) -> Tensor:
        return torch.zeros(self.state_dim, dtype=torch.float64)

    def residual(self, u_old: Tensor, u_new: Tensor, z: Tensor, steps: po.Steps) -> Tensor:
        end = torch.zeros_like(u_new[:, :1])
        slope = torch.diff(torch.cat([end, u_new, end], dim=1), dim=1) / self.h
        flow = torch.diff(torch.exp(steps.p) * slope, dim=1)
        return self.h * (u_new - u_old - steps.dt[:, None]) - steps.dt[:, None] * flow


@dataclass
class Field:
    """The logarithm of a conductivity from states that are seen everywhere, with 0.3 % noise.

    Args:
        n: values of the field.
        nt: time steps over (0, 1).
        weight: beta of the prior beta/2 |p|^2 in H1.
    """

    n: int = 200
    nt: int = 100
    weight: float = 1e-7

    def __post_init__(self) -> None:
        rod, self.grid = Rod(self.n - 1), po.TimeGrid.uniform(self.nt, T=1.0)
        x = rod.h * (np.arange(self.n) + 0.5)
        self.truth = 0.5 * np.sin(2 * np.pi * x) - np.exp(-(((x - 0.7) / 0.12) ** 2))
        forward = po.ControlProblem(rod, po.Tracking(np.zeros(self.n - 1)), self.grid)
        p = forward.create_design()
        p.setArray(self.truth)
        u = forward.fields(forward.join(forward.solve_state(p), p))[0].numpy()
        noise = 0.003 * np.abs(u).max() * np.random.default_rng(0).standard_normal(u.shape)
        self.data, self.prior = np.vstack([np.zeros(self.n - 1), u + noise]), po.StepMatrix.constant(rod.param_mass)

    def problem(self) -> po.ControlProblem:
        """Stated anew."""
        rod = Rod(self.n - 1)
        misfit = po.Tracking(self.data, rod.state_mass)
        prior = po.TerminalLoss(lambda u, p: 0.5 * self.weight * (p * self.prior(p[None])[0]).sum())
        return po.ControlProblem(rod, misfit + prior, self.grid)


class ReactionDiffusion(po.TimeDependentConstraint):
    """u_t = D u_xx + u(1 - u) + z on (0, 1), u = 0 at both ends; the example of the README.

    Args:
        n: nodes inside.
    """

    def __init__(self, n: int, D: float = 0.02) -> None:
        self.state_dim = self.control_dim = n
        self.h, self.D = 1 / (n + 1), D
        self.state_mass = self.control_mass = self.h * sp.eye(n)
        self.second_difference = po.StepMatrix.constant(sp.diags([1.0, -2.0, 1.0], [-1, 0, 1], (n, n)) / self.h**2)

    def initial_state(self, p: Tensor) -> Tensor:
        return torch.zeros(self.state_dim, dtype=torch.float64)

    def residual(self, u_old: Tensor, u_new: Tensor, z: Tensor, steps: po.Steps) -> Tensor:
        f = self.D * self.second_difference(u_new) + u_new * (1 - u_new) + z
        return self.h * (u_new - u_old - steps.dt[:, None] * f)


#: How the field is sought.
FIELD_METHODS: dict[str, dict[str, Any]] = {
    "po.solve as it stands": {},
    "the same, Gauss-Newton": {"gauss_newton": True},
    "composite step, reduced": {"method": "sqp", "precond": "reduced"},
    "composite step, reduced, Gauss-Newton": {"method": "sqp", "precond": "reduced", "gauss_newton": True},
    "Newton, by factors": {"method": "newton", "precond": "direct"},
    "TAO nls": {"method": "tao", "tao_type": "nls"},
    "TAO nls, Gauss-Newton": {"method": "tao", "tao_type": "nls", "gauss_newton": True},
}


def _find(field: Field, words: dict[str, Any]) -> Any:
    return po.solve(field.problem(), **words)


def _moving(now: float, x: Array, t: Tensor) -> Array:
    """A target that swells and shrinks, at the times `now` + t."""
    rows: Array = np.outer(1 + 0.5 * np.sin(now + t.numpy()), np.sin(np.pi * x))
    return rows


class Benchmark:
    """The cases; their sizes shrink with `-quick`.

    Args:
        quick: small sizes, to see that all runs.
        repeat: repetitions, of which the least counts.
    """

    def __init__(self, quick: bool = False, repeat: int = 3) -> None:
        self.quick, self.repeat = quick, repeat

    def least(self, function: Callable[[], Any]) -> tuple[float, Any]:
        """CPU seconds of a call, and what it returned."""
        seconds = []
        for _ in range(self.repeat):
            begin = time.process_time()
            found = function()
            seconds.append(time.process_time() - begin)
        return min(seconds), found

    def ode(self) -> list[Row]:
        """Van der Pol's oscillator."""
        nt = 500 if self.quick else 10_000
        seconds, found = self.least(lambda: po.solve(van_der_pol(120), method="tao", opt_tol=1e-6))
        case = f"van der Pol, 120 steps, TAO lmvm ({found.iterations} its)"
        rows = [bar(case, 1e3 * seconds / found.iterations, "ms an iteration", 2)]
        seconds, found = self.least(lambda: po.solve(van_der_pol(nt), method="newton"))
        case = f"van der Pol, {nt} steps, Newton ({found.iterations} its, J {found.objective:.6f})"
        try:
            rival, J = self.least(lambda: casadi_van_der_pol(nt))
        except ImportError:
            return [*rows, plain(case, seconds, "CPU s")]
        return [
            *rows,
            plain(f"van der Pol, {nt} steps, CasADi + IPOPT (J {J:.6f})", rival, "CPU s"),
            bar(case, seconds, "CPU s", rival),
        ]

    def field(self) -> list[Row]:
        """A field of parameters."""
        field, rows = Field(20, 10) if self.quick else Field(), []
        for name, words in FIELD_METHODS.items():
            seconds, found = self.least(partial(_find, field, words))
            error = float(np.linalg.norm(found.design.getArray() - field.truth) / np.linalg.norm(field.truth))
            case = f"field of {field.n}, {field.nt} steps, {name} ({found.iterations} its, error {error:.3f})"
            rows.append(bar(case, seconds, "CPU s", 5) if found.converged else plain(f"{case}: failed", seconds, ""))
        return rows

    def horizon(self) -> list[Row]:
        """Plans of a receding horizon, five steps on from one to the next."""
        n, nt, applied = (15, 20, 5) if self.quick else (63, 100, 5)
        reaction, grid = ReactionDiffusion(n), po.TimeGrid.uniform(nt, T=1.0)
        x, cost = reaction.h * np.arange(1, n + 1), po.ControlCost(1e-3, reaction.control_mass)

        def plan(k: int, state: Any, last: tuple[po.ControlProblem, Any] | None) -> tuple[po.ControlProblem, Any]:
            target = po.Tracking(partial(_moving, k * applied / nt, x), reaction.state_mass)
            problem = po.ControlProblem(reaction, target + cost, grid, initial_state=state)
            start = None if last is None else po.shifted(*last, applied)
            return problem, po.solve(problem, method="newton", start=start)

        po.solve(van_der_pol(20), method="newton")  # what is loaded once is not counted
        begin = time.process_time()
        first = plan(0, None, None)
        unknown = time.process_time() - begin
        state = first[0].unpack(first[1])[0][applied - 1]
        zero, (_, found) = self.least(lambda: plan(1, state, None))
        later, (_, again) = self.least(lambda: plan(1, state, first))
        case = f"reaction and diffusion, n {n}, {nt} steps"
        return [
            plain(f"{case}: the first plan, sparsities found ({first[1].iterations} its)", unknown, "CPU s"),
            plain(f"{case}: the second, from zero ({found.iterations} its)", zero, "CPU s"),
            plain(f"{case}: the second, from the first one shifted ({again.iterations} its)", later, "CPU s"),
            bar("shifted / the first plan", later / unknown, "x", 0.15),
            plain("shifted / from zero", later / zero, "x"),
        ]


CASES: dict[str, Callable[[Benchmark], list[Row]]] = {
    "horizon": Benchmark.horizon,
    "ode": Benchmark.ode,
    "field": Benchmark.field,
}


def main(argv: list[str] | None = None) -> list[Row]:
    """Measure, print the table, write it as JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-json", default="", help="write the rows to this file")
    parser.add_argument("-only", nargs="+", choices=CASES, default=list(CASES), help="these cases alone")
    parser.add_argument("-repeat", type=int, default=3, help="repetitions of timings, of which the least counts")
    parser.add_argument("-quick", action="store_true", help="small sizes: does it run?")
    options = parser.parse_args(argv)
    return measure(CASES, options.only, Benchmark(options.quick, options.repeat), options.json)


if __name__ == "__main__":
    main()
