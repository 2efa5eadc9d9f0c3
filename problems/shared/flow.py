"""What the flows of `problems.navier_stokes` share: elements, conditions, and what is written and drawn of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

import pdeopt as po
from pdeopt.space.fenicsx import cell_coefficients, part_of
from problems.shared.fields import Fields, Readable, StepField
from problems.shared.pictures import Panel


def taylor_hood(mesh: Any, *more: str) -> Any:
    """P2 for both components of the velocity, P1 for the pressure; further fields as one of these each, by its name."""
    import ufl

    names = ("velocity", "pressure", *more)
    if hasattr(ufl, "VectorElement"):
        cell = mesh.ufl_cell()
        kinds = {"velocity": ufl.VectorElement("Lagrange", cell, 2), "pressure": ufl.FiniteElement("Lagrange", cell, 1)}
        return ufl.MixedElement([kinds[name] for name in names])
    from basix.ufl import element, mixed_element  # of DOLFINx 0.7 and later

    cell = mesh.basix_cell()
    kinds = {"velocity": element("Lagrange", cell, 2, shape=(2,)), "pressure": element("Lagrange", cell, 1)}
    return mixed_element([kinds[name] for name in names])


def fixed(space: Any, where: Any, value: Any = None) -> Any:
    """A Dirichlet condition on a part of a mixed space, zero by default."""
    from dolfinx import fem

    part, _ = space.collapse()
    given = fem.Function(part)
    if value is not None:
        given.interpolate(value)
    return fem.dirichletbc(given, fem.locate_dofs_geometrical((space, part), where), space)


class Flow(Readable):
    """A flow and its control, and what is written and drawn of them.

    Attributes:
        constraint: the state is (u, p), without what is fixed.
        problem: with the objective.
        spaces: of the state, velocity and pressure first, and of the control.
    """

    name = "navier_stokes"
    constraint: po.FormConstraint
    problem: po.ControlProblem
    spaces: tuple[Any, Any]

    def fields(self, result: po.Result) -> Fields:
        """Nodes, triangles, velocity there at t_1 ... t_N, (N, nodes, 2), and control. Collective."""
        problem, corners = self.problem, po.function_space(self.spaces[0].mesh, ("Lagrange", 1))
        u, z, _ = problem.unpack(result)
        x, y = corners.tabulate_dof_coordinates()[:, :2].T
        places = {"x": x, "y": y, "triangles": cell_coefficients(corners), "t": problem.grid.times}
        velocity = StepField(u, "", lambda rows, t: self._velocity(rows, corners))
        control = StepField(z.reshape(len(u), problem.m), "")
        return {**places, "velocity": velocity, "control": control, "objective": np.array(result.objective)}

    def _velocity(self, rows: Tensor, corners: Any) -> np.ndarray:
        """At the nodes, (batch, nodes, 2), of whole rows of states."""
        from dolfinx import fem

        out, velocity = fem.Function(corners), self.spaces[0].sub(0)
        parts = [part_of(velocity.sub(k)) for k in range(2)]
        found = list[np.ndarray]()
        for values in self.constraint.values(rows):  # only of what is written
            for part, places, _ in parts:
                part.x.array[:] = values[places]
                out.interpolate(part)
                found.append(out.x.array.copy())
        return np.stack(found).reshape(len(rows), 2, -1).transpose(0, 2, 1)

    def write_series(self, path: str, result: po.Result) -> None:
        """Velocity, pressure and control at t_1 ... t_N; no rank gathers more than its rows. Collective."""
        (V, Z), (u, z, _) = self.spaces, self.problem.unpack(result)
        states, controls = self.constraint.values(u), self.constraint.values(z.reshape(len(u), -1), "control")
        fields = {"velocity": (V.sub(0), states), "pressure": (V.sub(1), states), "control": (Z, controls)}
        po.write_functions(path, self.problem.grid, fields)

    def panels(self, arrays: dict[str, np.ndarray]) -> list[list[Panel]]:
        """The speed at a third of the time, and at its end."""
        speed, triangles = np.linalg.norm(arrays["velocity"], axis=2), (arrays["x"], arrays["y"], arrays["triangles"])
        words: dict[str, Any] = {"triangles": triangles, "names": ("x", "y"), "scale": "speed"}
        steps = [(len(speed) - 1) // 3, len(speed) - 1]
        return [[Panel(f"speed, t = {arrays['t'][k + 1]:.2g}", speed[k], **words)] for k in steps]
