"""u_t = D Lap u + u(1 - u) + z in a square, u = 0 at the left, as a weak form in UFL, steered toward x sin(pi y)."""

import numpy as np
import ufl
from dolfinx import fem, mesh
from mpi4py import MPI
from ufl import dx, grad, inner

import pdeopt as po

square = mesh.create_unit_square(MPI.COMM_SELF, 24, 24)
V = po.function_space(square, ("Lagrange", 1))
u, u_old, z, v = fem.Function(V), fem.Function(V), fem.Function(V), ufl.TestFunction(V)
dt = fem.Constant(square, 0.0)
F = (u - u_old) * v * dx + dt * (0.02 * inner(grad(u), grad(v)) - u * (1 - u) * v - z * v) * dx
left = fem.locate_dofs_geometrical(V, lambda x: np.isclose(x[0], 0))
step = po.FormConstraint(F, u, u_old, z, dt, bcs=[fem.dirichletbc(0.0, left, V)])

target = step.coefficients(lambda x: x[0] * np.sin(np.pi * x[1]), u)
objective = po.Tracking(target, step.state_mass) + po.ControlCost(1e-3, step.control_mass)
problem = po.ControlProblem(step, objective, po.TimeGrid.uniform(32, T=1.0))
result = po.solve(problem)
print(f"J = {result.objective:.8f} after {result.iterations} iterations, {result.message}")
