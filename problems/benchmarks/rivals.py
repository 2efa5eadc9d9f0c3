"""Burgers and heat control without pdeopt: the baselines of the benchmark "time to optimality".

Each rival is what an experienced user of the named library would write for

    min  sum_{i=0}^N w_i/2 |u_i - d|_M^2 + sum_{k=1}^N tau alpha/2 |z_k|_Q^2
    s.t. M (u_k - u_{k-1}) + tau [theta S(u_k) + (1 - theta) S(u_{k-1})] = tau B z_k,

with P1 elements on (0, 1), S(u) = nu A u + N(u), u = 0 at both ends and controls at every
node: B holds the rows of the mass matrix Q at the free nodes, M their columns at the free
nodes.  All of them start at z = 0 and stop when the Riesz norm of the reduced gradient is at
most ``tol`` (IPOPT: its KKT error, scaled alike).  "SciPy L-BFGS-B" is the first version of such
code, with ``solve_banded``; the others call LAPACK directly and work in Riesz coordinates, a few
times faster than most users would be.  Heat control (`reduced_heat.py`) is quadratic: conjugate gradients
and PyROL.  The module needs NumPy, scikit-fem and SciPy >= 1.11; PyROL and CasADi are imported by their own
functions only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from time import process_time

import numpy as np
from scipy.optimize import minimize
from scipy.sparse.linalg import LinearOperator, cg

from problems.benchmarks.reduced_burgers import BandedBurgers, ReducedBurgers
from problems.benchmarks.reduced_heat import ReducedHeat


@dataclass(frozen=True)
class RivalResult:
    """Outcome of one rival; ``cpu_s`` covers set-up and solve, but no imports."""

    name: str
    objective: float
    optimality: float
    iterations: int
    cpu_s: float
    note: str


# --- The reduced functional ---------------------------------------------------------------


class RieszObjective:
    """The reduced functional of y = L' z, whose Euclidean gradient norm is the Riesz norm.

    ``optimality`` is the norm of the last gradient; the calls are counted for ``note``.
    """

    def __init__(self, problem):
        self.problem = problem
        self.dim = problem.size
        self.optimality = np.inf
        self.values = self.gradients = self.products = 0
        self._y = self._z = np.zeros(self.dim)

    def control(self, y):
        """z = L^-T y, computed once for each y."""
        if not np.array_equal(y, self._y):
            self._y, self._z = np.array(y), self.problem.to_control(y)
        return self._z

    def value(self, y):
        self.values += 1
        return self.problem.value(self.control(y))

    def gradient(self, y):
        self.gradients += 1
        gradient = self.problem.to_riesz(self.problem.gradient(self.control(y)))
        self.optimality = float(np.linalg.norm(gradient))
        return gradient

    def hessian_vector(self, y, dy):
        self.products += 1
        dz = self.problem.to_control(dy)
        return self.problem.to_riesz(self.problem.hessian_vector(self.control(y), dz))

    def note(self):
        counts = f"{self.values} values, {self.gradients} gradients"
        return counts + (f", {self.products} Hessian products" if self.products else "")


def _result(name, problem, z, iterations, start, note):
    """Stop the clock, then judge z, (nt * (nx + 1),), by the one functional of this module."""
    cpu = process_time() - start
    objective, optimality = float(problem.value(z)), problem.optimality(z)
    return RivalResult(name, objective, optimality, int(iterations), cpu, note)


# --- SciPy --------------------------------------------------------------------------------


def scipy_lbfgsb_banded(nx, nt, tol=1e-8, **params):
    """SciPy's L-BFGS-B in the controls themselves with ``solve_banded``: what a user writes first."""

    def gradient(z):
        found = problem.gradient(z)
        norm.append(float(np.linalg.norm(problem.to_riesz(found))))
        return found

    def stop(intermediate_result):
        if norm[-1] <= tol:
            raise StopIteration

    start, norm = process_time(), []
    problem = BandedBurgers(nx, nt, **params)
    options = {"ftol": 0, "gtol": 0, "maxiter": 10_000, "maxfun": 20_000}
    found = minimize(
        problem.value, np.zeros(nt * (nx + 1)), jac=gradient, method="L-BFGS-B", callback=stop, options=options
    )
    return _result("SciPy L-BFGS-B", problem, found.x, found.nit, start, f"{len(norm)} gradients")


def scipy_lbfgsb(nx, nt, tol=1e-8, maxcor=20, **params):
    """SciPy's L-BFGS-B in the coordinates y; ``params`` as for ReducedBurgers."""

    def stop(intermediate_result):
        if objective.optimality <= tol:  # the last gradient is that of the accepted iterate
            raise StopIteration

    start = process_time()
    problem = ReducedBurgers(nx, nt, **params)
    objective = RieszObjective(problem)
    found = minimize(
        objective.value,
        np.zeros(objective.dim),
        jac=objective.gradient,
        method="L-BFGS-B",
        callback=stop,
        options={"maxcor": maxcor, "ftol": 0, "gtol": 0, "maxiter": 10_000, "maxfun": 20_000},
    )
    z = objective.control(found.x)
    return _result("SciPy L-BFGS-B, tuned", problem, z, found.nit, start, objective.note())


def scipy_trust_ncg(nx, nt, tol=1e-8, **params):
    """SciPy's trust-region Newton-CG in the coordinates y, where ``gtol`` is the Riesz norm."""
    start = process_time()
    problem = ReducedBurgers(nx, nt, **params)
    objective = RieszObjective(problem)
    found = minimize(
        objective.value,
        np.zeros(objective.dim),
        jac=objective.gradient,
        hessp=objective.hessian_vector,
        method="trust-ncg",
        options={"gtol": tol},
    )
    z = objective.control(found.x)
    return _result("SciPy trust-ncg", problem, z, found.nit, start, objective.note())


def scipy_cg(nx, nt, tol=1e-8, **params):
    """SciPy's conjugate gradients on the reduced Hessian of heat in the coordinates y, to a Riesz norm."""
    start, count = process_time(), []
    problem = ReducedHeat(nx, nt, **params)
    objective = RieszObjective(problem)
    zero = np.zeros(objective.dim)
    H = LinearOperator((zero.size, zero.size), matvec=lambda dy: objective.hessian_vector(zero, dy), dtype=float)
    y, _ = cg(H, -objective.gradient(zero), rtol=0.0, atol=tol, callback=count.append)
    return _result("SciPy CG", problem, problem.to_control(y), len(count), start, objective.note())


# --- PyROL --------------------------------------------------------------------------------


def _rol_objective(rol, objective):
    """The RieszObjective behind ROL's interface of vectors."""

    class Objective(rol.Objective):
        def value(self, y, tol):
            return objective.value(y.array)

        def gradient(self, g, y, tol):
            g.array[:] = objective.gradient(y.array)

        def hessVec(self, hv, v, y, tol):
            hv.array[:] = objective.hessian_vector(y.array, v.array)

    return Objective()


def _rol_parameters(rol, entries):
    """ROL's nested parameter list from nested dictionaries."""
    parameters = rol.ParameterList()
    for key, entry in entries.items():
        parameters[key] = _rol_parameters(rol, entry) if isinstance(entry, dict) else entry
    return parameters


def pyrol(nx, nt, tol=1e-8, step="Trust Region", make=ReducedBurgers, **params):
    """ROL's reduced-space trust-region Newton-CG, or its L-BFGS for step="Line Search"."""
    import pyrol as rol
    from pyrol.vectors import NumPyVector

    start = process_time()
    problem = make(nx, nt, **params)
    objective = RieszObjective(problem)
    options = {
        "General": {"Secant": {"Maximum Storage": 20}, "Krylov": {"Iteration Limit": 100}},
        "Step": {"Type": step, "Trust Region": {"Subproblem Solver": "Truncated CG"}},
        "Status Test": {"Gradient Tolerance": tol, "Step Tolerance": 1e-16, "Iteration Limit": 10_000},
    }
    y, dual = NumPyVector(np.zeros(objective.dim)), NumPyVector(np.zeros(objective.dim))
    rol_problem = rol.Problem(_rol_objective(rol, objective), y, dual)
    solver = rol.Solver(rol_problem, _rol_parameters(rol, options))
    solver.solve()
    iterations = solver.getAlgorithmState().iter
    z = objective.control(y.array)
    return _result(f"PyROL {step.lower()}", problem, z, iterations, start, objective.note())


# --- CasADi and IPOPT ---------------------------------------------------------------------


def _casadi_matrices(ca, n, h):
    """Sparse P1 mass and stiffness matrices (n + 1, n + 1) at all nodes, natural ends."""
    band = ca.DM(ca.Sparsity.banded(n + 1, 1))
    ends = ca.diag(ca.DM([1] + [2] * (n - 1) + [1]))
    return h / 6 * (band + 2 * ends - ca.DM.eye(n + 1)), (ends - band + ca.DM.eye(n + 1)) / h


def _casadi_nlp(ca, problem):
    """Symbols u (nx - 1, nt) and z (nx + 1, nt), the objective and the constraints of all steps."""
    nt, tau, theta, inner = problem.nt, problem.tau, problem.theta, slice(1, problem.nx)
    mass, stiffness = _casadi_matrices(ca, problem.nx, problem.h)
    target = ca.DM(problem.target[inner])
    u, z = ca.MX.sym("u", problem.nx - 1, nt), ca.MX.sym("z", problem.nx + 1, nt)
    states, zeros = ca.horzcat(target, u), ca.MX.zeros(1, nt + 1)  # u_0 is the target
    left, right = ca.vertcat(zeros, states), ca.vertcat(states, zeros)
    flux = problem.flux / 3 * (left**2 + left * right + right**2)
    slope = problem.nu * stiffness[inner, inner] @ states + flux[1:, :] - flux[:-1, :]
    steps = mass[inner, inner] @ (states[:, 1:] - states[:, :-1]) - tau * mass[inner, :] @ z
    steps += tau * (theta * slope[:, 1:] + (1 - theta) * slope[:, :-1])
    error = u - ca.repmat(target, 1, nt)
    tracking = ca.sum1(error * (mass[inner, inner] @ error)) @ ca.DM(problem.weights[1:])
    return u, z, (tracking + tau * problem.alpha * ca.dot(z, mass @ z)) / 2, steps


def casadi_ipopt(nx, nt, tol=1e-8, linear_solver="mumps", **params):
    """Full-space Newton: CasADi's matrix graph with exact Hessian, IPOPT, sparse factorization.

    Dividing the objective by tau h and the steps by h makes IPOPT's maximum norms comparable
    to the Riesz norm.  The state starts at u_0 in every step.
    """
    import casadi as ca

    if not ca.has_nlpsol("ipopt"):  # also loads the plugin, before the clock starts
        raise ImportError("this CasADi has no IPOPT")
    start = process_time()
    problem = ReducedBurgers(nx, nt, **params)
    u, z, objective, steps = _casadi_nlp(ca, problem)
    nlp = {
        "x": ca.vertcat(ca.vec(u), ca.vec(z)),
        "f": objective / (problem.tau * problem.h),
        "g": ca.vec(steps) / problem.h,
    }
    ipopt = {"tol": tol, "nlp_scaling_method": "none", "linear_solver": linear_solver}
    silence = {"print_level": 0, "sb": "yes"}
    options = {"print_time": False, "ipopt": ipopt | silence}
    solver = ca.nlpsol("burgers", "ipopt", nlp, options)
    build = process_time() - start
    guess = np.concatenate([np.tile(problem.target[1:-1], nt), np.zeros(z.numel())])
    found = solver(x0=guess, lbg=0, ubg=0)
    control = np.array(found["x"]).ravel()[u.numel() :]
    iterations, note = solver.stats()["iter_count"], f"build {build:.3f} s"
    return _result("CasADi + IPOPT", problem, control, iterations, start, note)


BURGERS: dict[str, Callable[..., RivalResult]] = {
    "SciPy L-BFGS-B": scipy_lbfgsb_banded,
    "SciPy L-BFGS-B, tuned": scipy_lbfgsb,
    "SciPy trust-ncg": scipy_trust_ncg,
    "PyROL": pyrol,
    "CasADi + IPOPT": casadi_ipopt,
}

HEAT: dict[str, Callable[..., RivalResult]] = {"SciPy CG": scipy_cg, "PyROL": partial(pyrol, make=ReducedHeat)}
