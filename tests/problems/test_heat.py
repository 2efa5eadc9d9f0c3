"""The heat problem against theorems, independent solutions and the optima of another program."""

import numpy as np
import pytest
import skfem
import torch
from scipy.io import loadmat

from pdeopt.control.objective import ControlCost
from pdeopt.control.problem import ControlProblem
from pdeopt.control.reduced import ReducedObjective
from pdeopt.control.stepjacobian import SparseStepJacobian, StepJacobian
from pdeopt.control.verify import assert_consistent, randomize, taylor_rates, taylor_remainders
from pdeopt.core.errors import InputError
from pdeopt.optimize.fullspace.sqp import SQPSolver
from pdeopt.steps.timegrid import TimeGrid
from problems.heat import Heat, HeatCase, HeatSettings, Space, main
from tests.helpers.support import ROOT, python, relative

REFERENCES = sorted((ROOT / "tests/reference").glob("heat_*.mat"))
SMALL = ("-nx", "6", "-ny", "4", "-nt", "4", "-solver", "newton")


def solve(method="newton", tolerance=1e-12, **words):
    case = HeatCase(HeatSettings(**words))
    result = SQPSolver(case.problem, type=method, opt_tol=tolerance, feas_tol=tolerance).solve()
    assert result.converged, result.message
    return case, result


@pytest.mark.parametrize("method", ["newton", "composite"])
@pytest.mark.parametrize("file", REFERENCES, ids=lambda file: file.stem)
def test_solutions_are_those_of_the_independent_script(file, method):
    reference = loadmat(file, squeeze_me=True)
    numbers = {
        name: float(reference[name]) for name in ("T", "kappa", "alpha", "theta", "reaction", "length", "height")
    }
    sizes = {name: int(reference[name]) for name in ("nx", "ny", "nt")}
    kinds = {name: str(reference[name.split("_")[-1]]) for name in ("heat_control", "heat_boundary", "target")}
    tolerance = 1e-12 if method == "newton" else 1e-14  # Newton's last step overshoots its tolerance by far
    case, result = solve(method, tolerance, **numbers, **sizes, **kinds)
    arrays, space = case.arrays(result), case.space
    free, control = (nodes[np.lexsort(space.points[:, nodes])] for nodes in (space.free, space.control))
    place = np.searchsorted(space.control, control)
    assert result.objective == pytest.approx(float(reference["objective"]), rel=1e-10)
    assert relative(arrays["state"][1:, free], reference["u"]) <= 1e-8
    assert relative(arrays["control"][:, place], reference["z"]) <= 1e-8
    assert relative(arrays["multiplier"][:, free], reference["lam"]) <= 1e-8


def test_the_plans_optimum():
    assert solve(nx=12, ny=4, nt=8)[1].objective == pytest.approx(0.00105448677191, abs=5e-15)


# -- the C++ example -----------------------------------------------------------------------------------------

INSULATED = dict(
    length=0.6,
    height=0.2,
    nt=99,
    T=0.99,
    kappa=0.1,
    reaction=1.0,
    source=1.0,
    target="one",
    alpha=1e-4,
    theta=0.5,
    heat_boundary="neumann",
)


def test_the_published_objective_without_control():
    problem = HeatCase(HeatSettings(**INSULATED)).problem
    z = problem.create_design()
    assert problem.at(problem.join(problem.solve_state(z), z)).value == pytest.approx(5.405865e-2, abs=5e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words, J",
    [((), 6.800282e-4), (("-tao_type", "bnls", "-lower", "0", "-upper", "10"), 2.100918e-3)],
    ids=["free", "bounded"],
)
def test_the_published_optima(words, J):
    file = ROOT / "problems/options/heat_neumann.opts"
    assert main(["-options_file", str(file), *words]) == pytest.approx(J, rel=5e-7)


# -- space ---------------------------------------------------------------------------------------------------


def meshes():
    quads = skfem.MeshQuad.init_tensor(np.linspace(0, 3, 7), np.linspace(0, 1, 4))
    skewed = skfem.MeshQuad(quads.p + np.array([[0.3], [0.0]]) * quads.p[1], quads.t)
    return {"rectangles": quads, "parallelograms": skewed, "triangles": quads.to_meshtri()}


@pytest.mark.parametrize("kind", ["rectangles", "parallelograms", "triangles"])
def test_integrals_of_linear_functions_are_exact(kind):
    space = Space(meshes()[kind], dirichlet=False)
    one, y = np.ones(space.free.size), space.points[1]
    assert one @ space.M @ one == pytest.approx(3.0)
    assert y @ space.M @ y == pytest.approx(1.0)
    assert np.abs(space.A @ one).max() <= 1e-12
    assert y @ space.A @ y == pytest.approx(3.0)
    assert one @ space.load(lambda x, y: y) == pytest.approx(1.5)


@pytest.mark.parametrize("boundary", [False, True])
@pytest.mark.parametrize("kind", ["rectangles", "triangles"])
def test_the_control_has_its_mass_matrix_and_its_free_rows(kind, boundary):
    space = Space(meshes()[kind], boundary=boundary)
    one, x = np.ones(space.control.size), space.points[0, space.control]
    assert one @ space.Q @ one == pytest.approx(3.0)
    assert x @ space.Q @ x == pytest.approx(9.0)
    shared = np.isin(space.control, space.free)
    assert shared.any() and np.array_equal(
        space.B[np.isin(space.free, space.control)].toarray(), space.Q[shared].toarray()
    )
    assert boundary == (space.control.size == 7) and (space.points[1, space.free].min() == 0) == boundary


@pytest.mark.parametrize(
    "words",
    [dict(), dict(theta=0.5), dict(heat_control="boundary"), dict(heat_boundary="neumann", reaction=2.0)],
    ids=str,
)
def test_derivatives_are_those_of_the_residual(words):
    assert_consistent(HeatCase(HeatSettings(nx=5, ny=3, nt=4, **words)).problem)


# -- time ----------------------------------------------------------------------------------------------------


def test_equal_steps_share_one_set_of_values():
    constraint = HeatCase(HeatSettings(nx=4, ny=3, nt=2)).problem.constraint
    n, m = constraint.state_dim, constraint.control_dim
    uneven = np.r_[0.0, 0.1, 0.3, 1.0]
    for times, number in ((np.linspace(0, 3.7, 1025), 1), (np.linspace(0, 1e3, 4), 1), (uneven, 3)):
        steps = TimeGrid(times).steps
        rows = [torch.randn(len(steps), k, dtype=torch.float64) for k in (n, n, m)]
        jacobian = constraint.linearize(*rows, steps)
        assert isinstance(jacobian, SparseStepJacobian)
        assert {len(block.values) for block in jacobian.blocks.values()} == {number}
        assert relative(jacobian.jvp(*rows), StepJacobian(constraint, *rows, steps).jvp(*rows)) <= 1e-13


def steps_error(steps, theta):
    """At t = 1 for u = v (t + t^2), v the lowest discrete mode: the error of time alone."""
    space, grid = Space(meshes()["rectangles"]), TimeGrid.uniform(steps, 1.0)
    x, y = space.points
    v = np.sin(np.pi * x / 3) * np.sin(np.pi * y)
    rate = (v[space.free] @ space.A @ v[space.free]) / (v[space.free] @ space.M @ v[space.free])
    heat = Heat(space.M, space.A, space.Q, space.B, np.zeros(space.free.size), theta)
    problem = ControlProblem(heat, ControlCost(1.0), grid)
    t = grid.times[1:] - (1 - theta) / steps  # where the step's average of the control is taken
    z = problem.create_design()
    z.setArray(np.outer(1 + 2 * t + rate * (t + t * t), v).ravel())
    u = problem.solve_state(z).getArray().reshape(steps, -1)
    return np.abs(u[-1] - 2 * v[space.free]).max()


@pytest.mark.parametrize("theta, order", [(0.5, 2), (1.0, 1)])
def test_the_order_in_time(theta, order):
    errors = [steps_error(steps, theta) for steps in (16, 32, 64)]
    assert np.log2(errors[-2] / errors[-1]) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("theta", [0.5, 1.0])
def test_insulated_heat_is_what_came_in(theta):
    """d/dt int u = int f + the flux through the controlled edge, in every step."""
    words = dict(heat_boundary="neumann", heat_control="boundary", length=0.6, height=0.2, source=3.0)
    case = HeatCase(HeatSettings(nx=6, ny=4, nt=5, theta=theta, **words))
    problem, space = case.problem, case.space
    z = randomize(problem.create_design(), 1)
    u = problem.solve_state(z).getArray().reshape(5, -1)
    source = 3.0 * space.load(lambda x, y: np.hypot(x - 0.1, y - 0.1) <= 0.07).sum()
    flux = (z.getArray().reshape(5, -1) @ space.Q).sum(1)
    assert source > 0
    assert (u @ space.M).sum(1) == pytest.approx(np.cumsum(source + flux) / 5, rel=1e-12)


# -- control through the boundary ----------------------------------------------------------------------------


def test_gradient_and_hessian_of_boundary_control_pass_the_taylor_test():
    problem = HeatCase(HeatSettings(nx=6, ny=4, nt=5, theta=0.5, heat_control="boundary")).problem
    z, dz = (randomize(problem.create_design(), seed) for seed in (1, 2))
    remainders = taylor_remainders(ReducedObjective(problem), z, dz)
    assert taylor_rates(remainders["value"])[-1] == pytest.approx(1, abs=0.1)
    assert taylor_rates(remainders["gradient"])[-1] == pytest.approx(2, abs=1e-3)
    assert max(remainders["hessian"]) <= 1e-12 * max(remainders["value"])  # the problem is quadratic


# -- meshes from files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["vtk", "msh"])
def test_a_mesh_file_is_as_good_as_the_rectangle(tmp_path, ending):
    file = tmp_path / f"mesh.{ending}"
    skfem.MeshQuad.init_tensor(np.linspace(0, 3, 7), np.linspace(0, 1, 5)).save(file)
    for control in ("distributed", "boundary"):
        words = (*SMALL, "-heat_control", control)
        assert main([*words, "-mesh", str(file)]) == pytest.approx(main(words), rel=1e-10)


def test_a_boundary_named_control_is_the_controlled_one(tmp_path):
    file = str(tmp_path / "mesh.vtk")
    mesh = skfem.MeshTri.init_circle(3).with_boundaries({"control": lambda x: x[0] > 0})
    mesh.save(file)
    case, _ = solve(mesh=file, nt=4, heat_control="boundary")
    x, y = case.space.points[:, case.space.control]
    assert np.hypot(x, y) == pytest.approx(1.0) and x.min() == pytest.approx(0.0, abs=1e-12) and x.max() == 1.0
    assert case.space.Q.sum() == pytest.approx(np.pi, rel=1e-2)


def test_points_outside_all_cells_do_not_count(tmp_path):
    meshio, file = pytest.importorskip("meshio"), str(tmp_path / "mesh.vtk")
    mesh = meshes()["triangles"]
    meshio.Mesh(np.c_[np.c_[[9.0, 9.0], mesh.p].T, np.zeros(mesh.p.shape[1] + 1)], {"triangle": mesh.t.T + 1}).write(
        file
    )
    own, other = Space(mesh), HeatCase(HeatSettings(mesh=file)).space
    assert np.array_equal(own.free + 1, other.free) and np.array_equal(own.control + 1, other.control)
    assert relative(own.M.toarray(), other.M.toarray()) <= 1e-14


# -- the script ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("control, number", [("distributed", 35), ("boundary", 7)])
def test_what_is_written(tmp_path, control, number):
    pytest.importorskip("matplotlib")
    objective = main(
        [
            *SMALL,
            "-heat_control",
            control,
            "-output",
            str(tmp_path / "s.npz"),
            "-plot",
            str(tmp_path / "p.png"),
            "-summary",
            str(tmp_path / "s.json"),
        ]
    )
    found = np.load(tmp_path / "s.npz")
    assert {name: found[name].shape for name in found} == {
        "x": (35,),
        "y": (35,),
        "cells": (24, 4),
        "control_nodes": (number,),
        "t": (5,),
        "target": (5, 35),
        "state": (5, 35),
        "control": (4, number),
        "multiplier": (4, 35),
        "objective": (),
    }
    assert found["objective"] == objective
    edge = (found["x"] % 3 == 0) | (found["y"] == 1)
    assert not found["state"][:, edge].any() and not found["state"][0].any()
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG") and (tmp_path / "s.json").exists()


@pytest.mark.mpi
def test_two_ranks_find_the_same():
    one, two = (python("-m", "problems.heat", *SMALL, "-theta", 0.5, ranks=ranks) for ranks in (1, 2))
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    objective = [float(done.stdout.split("objective")[1].split()[0]) for done in (one, two)]
    assert objective[0] == pytest.approx(objective[1], rel=1e-11)


BAD = {
    "nx": (("-nx", 1), "-nx", ">= 2"),
    "kappa": (("-kappa", 0), "-kappa", "> 0"),
    "alpha": (("-alpha", "-1"), "-alpha", "> 0"),
    "theta": (("-theta", 0.4), "-theta", ">= 0.5"),
    "height": (("-height", 0), "-height", "> 0"),
    "reaction": (("-reaction", "-1"), "-reaction", ">= 0"),
    "source": (("-source", "inf"), "-source", "finite"),
    "target": (("-target", "two"), "-target", "bump | one"),
    "control": (("-heat_control", "edge"), "-heat_control", "distributed | boundary"),
    "boundary": (("-heat_boundary", "robin"), "-heat_boundary", "dirichlet | neumann"),
    "misspelt": (("-kapa", 1), "-kapa", "-kappa"),
    "no mesh file": (("-mesh", "{}/none.msh"), "none.msh", "meshio"),
    "no mesh at all": (("-mesh", "{}/text.vtk"), "text.vtk", "meshio"),
    "unknown format": (("-mesh", "{}/text.foo"), "text.foo", "meshio"),
    "tetrahedra": (("-mesh", "{}/solid.vtk"), "tetra", "triangles or quadrilaterals"),
    "no free node": (("-mesh", "{}/two.vtk"), "mesh", "-heat_boundary neumann"),
    "no edge below": (("-mesh", "{}/diamond.vtk", "-heat_control", "boundary"), "least y", "named control"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_with_what_is_legal(tmp_path, case):
    for name in ("text.vtk", "text.foo"):
        (tmp_path / name).write_text("no mesh\n")
    skfem.MeshTet().save(tmp_path / "solid.vtk")
    skfem.MeshTri().save(tmp_path / "two.vtk")
    skfem.MeshTri.init_circle(1).save(tmp_path / "diamond.vtk")
    words, name, legal = BAD[case]
    with pytest.raises(InputError) as error:
        main([*SMALL, *(str(word).format(tmp_path) for word in words)])
    assert name in str(error.value) and legal in str(error.value)
