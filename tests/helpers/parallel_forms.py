"""Run under mpiexec: a weak form in parallel over time, and on a mesh that the ranks share."""

import shutil
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from mpi4py import MPI

import pdeopt as po
from pdeopt.core.arrays import assign, copy
from problems.heat3d import Heat3dCase, Heat3dSettings
from problems.shared.flow import taylor_hood
from tests.helpers.forms import Functions, burgers, tracking
from tests.helpers.krylov import options

import ufl  # isort: skip (after the cache is chosen)
from dolfinx import fem  # isort: skip
from dolfinx.mesh import create_interval, create_unit_square, locate_entities_boundary  # isort: skip
from ufl import dS, ds, dx, grad, inner  # isort: skip

WORLD, SELF = MPI.COMM_WORLD, MPI.COMM_SELF


def over_time():
    constraint, _ = burgers(32)
    u0 = constraint.initial_state(torch.empty(0, dtype=torch.float64))
    J = [po.solve(tracking(constraint, u0, 0.05, 8, comm=comm)).objective for comm in (None, SELF)]
    assert abs(J[0] - J[1]) <= 1e-10 * J[1], J


def problem_of(comm):
    """Nonlinear conduction, held at the left, heated through the right edge; a cost in UFL."""
    grid = po.TimeGrid.uniform(4, 1.0, comm, comm.size)
    on = Functions(create_unit_square(grid.space, 4, 4, partitioner=po.mesh_partitioner(grid)), ("Lagrange", 2))
    right = ufl.conditional(ufl.gt(ufl.SpatialCoordinate(on.mesh)[0], 0.99), 1.0, 0.0)
    flow = (1 + on.u**2) * inner(grad(on.u), grad(on.v)) * dx - on.z * (1 + on.u) * on.v * right * ds
    left = fem.locate_dofs_geometrical(on.V, lambda x: np.isclose(x[0], 0))
    bcs = [fem.dirichletbc(0.5, left, on.V)]
    mass = 0.5 * on.z**2 * right * ds
    constraint = on.constraint(
        (on.u - on.u_old) * on.v * dx + on.dt * flow, bcs=bcs, control_mass=mass, initial=lambda x: 0.5 + x[0] * x[1]
    )
    x = ufl.SpatialCoordinate(on.mesh)
    objective = po.FormObjective(constraint, state=0.5 * (on.u - x[0]) ** 2 * dx, control=5e-3 * on.z**2 * right * ds)
    return po.ControlProblem(constraint, objective, grid), on


def without_time():
    """An equation that all ranks share has the optimum of a rank alone."""
    results = []
    for comm in (WORLD, SELF):
        node = po.SingleNode(comm, comm.size)
        on = Functions(create_unit_square(node.space, 6, 6, partitioner=po.mesh_partitioner(node)))
        F = (inner(grad(on.u), grad(on.v)) + (on.u + on.u**3 - on.z) * on.v) * dx
        constraint = po.FormConstraint(F, on.u, None, on.z, None)
        x = ufl.SpatialCoordinate(on.mesh)
        J = po.FormObjective(constraint, state=0.5 * (on.u - x[0] * x[1]) ** 2 * dx, control=5e-4 * on.z**2 * dx)
        results.append(po.solve(po.ControlProblem(constraint, J, node), upper=1.0))
    assert abs(results[0].objective / results[1].objective - 1) <= 1e-9, [r.objective for r in results]
    assert all(result.converged for result in results)


def natural(layout, rows):
    """Rows of all unknowns in their natural order, on all ranks."""
    whole = torch.from_numpy(np.concatenate(layout.mpi.allgather(rows.numpy()), axis=1))
    return whole[:, np.argsort(layout.natural_order)]


def point(problem, seed):
    """A vector whose entries do not depend on the ranks."""
    draw, constraint = torch.Generator().manual_seed(seed), problem.constraint
    rows = [
        torch.rand(4, layout.size, generator=draw, dtype=torch.float64)[:, layout.natural]
        for layout in (constraint.layout, constraint.controls)
    ]
    return problem.layout.pack(problem.create_primal(), rows[0], rows[1].reshape(-1), torch.empty(0).double())


def found(problem):
    """Values and derivatives at a point, in natural order."""
    constraint, lin, dx_ = problem.constraint, problem.at(point(problem, 1)), point(problem, 2)
    lam, out = problem.create_multiplier(), problem.create_primal()
    assign(lam, problem.fields(point(problem, 3))[0])
    F, JF = (copy(v).reshape(4, -1) for v in (lin.residual, lin.jvp(dx_, problem.create_multiplier())))
    rows = [(constraint.layout, F), (constraint.layout, JF)]
    for function in (lambda: lin.vjp(lam, out), lambda: lin.hvp(lam, dx_, out)):
        u, z, _ = problem.fields(function())
        rows += [(constraint.layout, u), (constraint.controls, z.reshape(4, -1))]
    value = torch.tensor([[lin.value, po.RieszMetric(problem).norm(dx_)]])
    return [value, *(natural(*each) for each in rows)]


def over_space():
    """Values, derivatives and optima are those of a rank alone."""
    (shared, on), (alone, _) = problem_of(WORLD), problem_of(SELF)
    for one, two in zip(found(shared), found(alone)):
        assert one.shape == two.shape and (one - two).abs().max() <= 1e-11 * (1 + two.abs().max())
    for precond in ("direct", "reduced"):
        with options(sqp_kkt_precond=precond):
            results = [po.SQPSolver(each, type="newton", opt_tol=1e-9).solve() for each in (shared, alone)]
        assert abs(results[0].objective / results[1].objective - 1) <= 1e-9, precond
        assert results[0].iterations == results[1].iterations and results[0].message == results[1].message
    whole = shared.constraint.values(shared.unpack(results[0])[0].numpy())
    assert whole.shape == (4, len(on.u.x.array)) and np.isclose(whole, 0.5).any()


def cube():
    """Trilinear elements with integrals by values at nodes are finite differences, on any number of ranks."""
    words = {"n": 3, "nt": 4, "alpha": 1e-2}
    shared = Heat3dCase(Heat3dSettings(**words, space_ranks=WORLD.size, discretization="lumped"))
    alone = Heat3dCase(Heat3dSettings(**words), SELF)
    results = [po.SQPSolver(case.problem, type="newton", opt_tol=1e-10).solve() for case in (shared, alone)]
    found, expected = (case.arrays(result) for case, result in zip((shared, alone), results))
    for name, values in (found or {}).items():
        assert np.abs(values - expected[name]).max() <= 1e-9 * (1 + np.abs(values).max()), name


def function_layout():
    """Owners and ghosts of a mixed space: all have the values of the same unknowns."""
    mesh = create_unit_square(WORLD, 3, 3)
    cell = mesh.ufl_cell()
    pair = ufl.MixedElement(ufl.VectorElement("Lagrange", cell, 2), ufl.FiniteElement("Lagrange", cell, 1))
    V = po.function_space(mesh, pair)
    layout, dofs = po.function_layout(V)
    f = fem.Function(V)
    f.sub(0).interpolate(lambda x: np.stack([x[0] + 3 * x[1], x[0] - x[1]]))
    f.sub(1).interpolate(lambda x: 7 + x[0] * x[1])
    f.x.scatter_forward()
    seen = layout.extend(torch.from_numpy(f.x.array[dofs[: layout.n_owned]])[None])[0].numpy()
    assert np.allclose(seen[: len(dofs)], f.x.array[dofs])
    assert sorted(layout.natural_order) == list(range(layout.size)) and layout.size == V.dofmap.index_map.size_global
    alone = po.function_space(create_unit_square(SELF, 3, 3), pair)
    own, _ = po.function_layout(alone)
    g = fem.Function(alone)
    g.sub(0).interpolate(lambda x: np.stack([x[0] + 3 * x[1], x[0] - x[1]]))
    g.sub(1).interpolate(lambda x: 7 + x[0] * x[1])
    assert np.allclose(
        g.x.array[np.argsort(own.natural)], natural(layout, torch.from_numpy(seen[None, : layout.n_owned]))
    )


def listed(path):
    """Times, names and files of a series."""
    lines = ElementTree.parse(path).iter("DataSet")
    return [(float(line.attrib["timestep"]), line.attrib["name"], path.parent / line.attrib["file"]) for line in lines]


def pieces(path):
    """Points and values of the one field of a file of DOLFINx, of each rank that shares the step."""
    for piece in ElementTree.parse(path).iter("Piece"):
        arrays = ElementTree.parse(path.parent / piece.attrib["Source"]).iter("DataArray")
        real = [array for array in arrays if array.attrib["type"] == "Float64"]
        yield [
            np.array(array.text.split(), dtype=float).reshape(-1, int(array.attrib["NumberOfComponents"]))
            for array in real
        ]


def series():
    """For ParaView: each function at its time, from ranks that share the mesh or the steps."""
    folder = Path(WORLD.bcast(tempfile.mkdtemp() if WORLD.rank == 0 else None))
    for k in (1, WORLD.size):
        grid = po.TimeGrid([0.0, 0.1, 0.3, 0.7, 1.5], WORLD, space_ranks=k)
        square = create_unit_square(grid.space, 3, 3, partitioner=po.mesh_partitioner(grid))
        V = po.function_space(square, taylor_hood(square))
        f, t = fem.Function(V), grid.times[grid.begin + 1 : grid.end + 1, None]
        f.sub(0).interpolate(lambda x: np.stack([x[0] + 2 * x[1], x[0] ** 2]))
        po.write_functions(f"{folder}/{k}.pvd", grid, {name: (V.sub(0), t * f.x.array) for name in ("first", "second")})
        patch = po.grid_layout(grid.space_comm, (3, 4))
        rows = torch.ones(grid.n_local, patch.layout.n_owned, dtype=torch.float64)
        po.write_series(f"{folder}/grid_{k}.pvd", grid, patch, {"state": rows}, [(0.0, 1.0)] * 2)
        names = [(t, name) for t in grid.times[1:] for name in ("first", "second")]
        for t, name, file in listed(folder / f"{k}.pvd") if WORLD.rank == 0 else ():
            parts = list(pieces(file))
            assert (t, name) == names.pop(0) and len(parts) == k
            for x, values in parts:
                assert np.allclose(values[:, :2], t * np.c_[x[:, 0] + 2 * x[:, 1], x[:, 0] ** 2])
        if WORLD.rank == 0:
            assert not list((folder / str(k)).glob("*.pvd"))
            steps = listed(folder / f"grid_{k}.pvd")
            assert [t for t, _, _ in steps] == list(grid.times[1:]) and all(file.stat().st_size for _, _, file in steps)
    for path, values in (("a.vtk", t * f.x.array), ("a.pvd", f.x.array[None, 1:])):
        with pytest.raises(po.InputError, match=r"series of files.*\.pvd|field velocity: got shape"):
            po.write_functions(f"{folder}/{path}", grid, {"velocity": (V.sub(0), values)})
    WORLD.Barrier()
    if WORLD.rank == 0:
        shutil.rmtree(folder)


def refused():
    """What would be wrong in silence, by name."""
    on = Functions(create_interval(WORLD, 32, [0.0, 1.0]))
    heat = (on.u - on.u_old) * on.v * dx + on.dt * (inner(grad(on.u), grad(on.v)) - on.z * on.v) * dx
    constraint = on.constraint(heat, bcs=[])
    objective = po.ControlCost(1.0, constraint.control_mass)
    for grid in (po.TimeGrid.uniform(4, 1.0, SELF), po.TimeGrid.uniform(4, 1.0, WORLD)):
        with pytest.raises(po.InputError, match="a mesh, made with"):
            po.ControlProblem(constraint, objective, grid)
    alone, _ = burgers(32)
    with pytest.raises(po.InputError, match="a mesh, made with"):
        po.ControlProblem(alone, objective, po.TimeGrid.uniform(4, 1.0, WORLD, WORLD.size))
    with pytest.raises(po.InputError, match="interior facets"):
        on.constraint(heat + on.dt * on.u("+") * on.v("-") * dS, bcs=[])
    with pytest.raises(po.InputError, match="parameters on a mesh of"):
        on.constraint(heat, bcs=[], p=[fem.Function(on.Z)])
    square = Functions(create_unit_square(WORLD, 4, 4))
    facets = locate_entities_boundary(square.mesh, 1, lambda x: np.isclose(x[1], 0))
    held = fem.locate_dofs_topological(square.V, 1, facets)[: 0 if WORLD.rank else None]  # by one of the ranks alone
    with pytest.raises(po.InputError, match=r"bcs.*remote=True"):
        F = (square.dt * square.u - square.z) * square.v * dx
        square.constraint(F, bcs=[fem.dirichletbc(0.0, held, square.V)])


for part in (over_time, over_space, without_time, cube, function_layout, series, refused):
    part()
