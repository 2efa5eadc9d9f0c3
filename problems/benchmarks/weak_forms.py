"""The equations of heat, Burgers and Klein-Gordon as weak forms in UFL: the same discretizations as in their scripts.

Needs DOLFINx: `make setup-fenicsx`.
"""

import numpy as np
import torch
import ufl
from dolfinx import fem
from dolfinx.mesh import CellType, create_interval, create_rectangle
from mpi4py import MPI
from ufl import dx, grad, inner

import pdeopt as po


class Functions:
    """A mesh, and the functions and constants of a step on it.

    Args:
        mesh: of DOLFINx.
        element: of the state.
        controlled: whether there is a control, of Lagrange elements of degree 1.
    """

    def __init__(self, mesh, element=("Lagrange", 1), controlled=True):
        self.mesh, self.V = mesh, po.function_space(mesh, element)
        self.Z = po.function_space(mesh, ("Lagrange", 1))
        self.u, self.u_old = fem.Function(self.V), fem.Function(self.V)
        self.z, self.v = fem.Function(self.Z) if controlled else None, ufl.TestFunction(self.V)
        self.dt, self.t = fem.Constant(mesh, 0.0), fem.Constant(mesh, 0.0)

    def boundary(self, value=0.0):
        """u is this on the whole boundary."""
        ends = self.mesh.geometry.x.min(0), self.mesh.geometry.x.max(0)

        def on(x):
            return sum(np.isclose(x[i], end[i]) for i in range(self.mesh.geometry.dim) for end in ends) > 0

        return fem.dirichletbc(value, fem.locate_dofs_geometrical(self.V, on), self.V)

    def constraint(self, F, **others):
        bcs = others.pop("bcs") if "bcs" in others else [self.boundary()]
        return po.FormConstraint(F, self.u, self.u_old, self.z, self.dt, others.pop("t", None), bcs, **others)

    def points(self, constraint):
        """Coordinates of the unknowns of the state, (n, 3)."""
        return self.V.tabulate_dof_coordinates()[constraint.state_dofs]


def interval(elements, left=0.0, right=1.0):
    return create_interval(MPI.COMM_SELF, elements, [left, right])


def heat(nx, ny, kappa=0.05):
    """The constraint of `problems.heat`, and its functions."""
    on = Functions(create_rectangle(MPI.COMM_SELF, [[0, 0], [3, 1]], [nx, ny], CellType.quadrilateral))
    F = (on.u - on.u_old) * on.v * dx + on.dt * (kappa * inner(grad(on.u), grad(on.v)) - on.z * on.v) * dx
    return on.constraint(F), on


def burgers(elements, theta=1.0, nu=0.01):
    """The constraint of `problems.burgers`, and its functions."""
    on = Functions(interval(elements))

    def spatial(u):
        return (nu * u.dx(0) * on.v.dx(0) + u * u.dx(0) * on.v) * dx

    F = (on.u - on.u_old) * on.v * dx - on.dt * on.z * on.v * dx + on.dt * theta * spatial(on.u)
    if theta < 1:
        F += on.dt * (1 - theta) * spatial(on.u_old)
    return on.constraint(F, initial=lambda x: 1.0 * (x[0] <= 0.5)), on


def klein_gordon(elements, g=1.0):
    """The constraint of `problems.klein_gordon`, and its functions: (u, v) of a mixed space, moving boundary values."""
    mesh = interval(elements, -1.0, 1.0)
    P1 = ufl.FiniteElement("Lagrange", mesh.ufl_cell(), 1)
    on = Functions(mesh, ufl.MixedElement([P1, P1]))
    (u, v), (u_old, v_old), (eta, phi) = (ufl.split(f) for f in (on.u, on.u_old, on.v))
    x, square = fem.Function(on.Z), fem.Function(on.Z)
    x.interpolate(lambda points: points[0])
    square.interpolate(lambda points: points[0] ** 2)
    middle, mean, velocity = on.t - on.dt / 2, (u + u_old) / 2, (v + v_old) / 2
    f = -x * ufl.cos(middle) + square * ufl.cos(middle) ** 2
    nodes = dx(metadata={"quadrature_rule": "GLL", "quadrature_degree": 1})
    F = (u - u_old - on.dt * velocity) * eta * nodes + (v - v_old) * phi * dx
    F += on.dt * (mean.dx(0) * phi.dx(0) + (g * mean**2 - f - on.z) * phi) * dx
    ends, bcs = [fem.Function(on.V.sub(k).collapse()[0]) for k in (0, 1)], []
    for k, end in enumerate(ends):
        dofs = fem.locate_dofs_geometrical((on.V.sub(k), end.function_space), lambda x: np.isclose(abs(x[0]), 1))
        bcs.append(fem.dirichletbc(end, dofs, on.V.sub(k)))

    def at_time(t):
        ends[0].interpolate(lambda points: points[0] * np.cos(t))
        ends[1].interpolate(lambda points: -points[0] * np.sin(t))

    start = fem.Function(on.V)
    start.sub(0).interpolate(lambda points: points[0])
    return on.constraint(F, t=on.t, bcs=bcs, at_time=at_time, initial=start, conservative=True), on


def bump(points):
    """The target of `problems.heat` at points, (n, 3)."""
    x, y = torch.from_numpy(points[:, 0]), torch.from_numpy(points[:, 1])

    def target(t):
        t = t[:, None]
        return torch.sin(torch.pi * t) * torch.exp(-8 * ((x - 0.75 - 1.5 * t) ** 2 + (y - 0.5) ** 2))

    return target
